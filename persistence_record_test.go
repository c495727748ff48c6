package comfyui

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func fullRecord() *Record {
	created := time.Date(2026, 3, 1, 10, 20, 30, 123456789, time.UTC)
	return &Record{
		Schema: 1, JobID: "job", Pod: "pod", ClientID: "client", PromptID: "prompt", Attempt: 2, Accepted: true, Started: true,
		Number: -1.5, WorkflowHash: "hash", Workflow: json.RawMessage(`{"1":{"text":"<b>&"}}`), ExtraData: json.RawMessage(`{"a":1}`),
		Options: RecordOptions{
			Limits:       Limits{Total: time.Hour, Queue: time.Minute, Run: time.Second, Stall: -1},
			AllowPartial: true, AtMostOnce: true, Front: true,
		},
		Labels: map[string]string{"k": "v"},
		Progress: Progress{
			Status: StatusRunning, Fraction: 0.5, QueueAhead: -1, NodesDone: 1, NodesTotal: 2, Node: "3",
			NodeClass: "KSampler", NodeTitle: "Sampler", Step: 1, Steps: 2, Elapsed: time.Second, Remaining: time.Second,
		},
		Outputs:     []Output{{Node: "9", Key: "images", File: &FileRef{Filename: "a.png", Subfolder: "s", Type: "output"}}, {Node: "9", Key: "text", Text: "t"}, {Node: "9", Key: "x", Raw: json.RawMessage(`[1]`)}},
		CachedNodes: []string{"1"},
		Warnings:    []*Error{{Op: "validate", Category: CategoryValidation, Err: errors.New("dropped")}},
		Failure:     &Error{Op: "run", Pod: "pod", JobID: "job", Category: CategoryLost, Err: ErrJobLost},
		NextAttempt: created.Add(1), CreatedAt: created, AttemptAt: created.Add(2), StartedAt: created.Add(3), FinishedAt: created.Add(4),
		Retention: 24 * time.Hour,
	}
}

func TestRecordJSONKeepsEveryField(t *testing.T) {
	t.Parallel()
	want := fullRecord()
	data, err := json.Marshal(want)
	require.NoError(t, err)

	got := Record{Owner: "o", Epoch: 3, Rev: 4, LeaseUntil: time.Unix(1, 0), CancelRequested: true}
	require.NoError(t, json.Unmarshal(data, &got))
	assert.Equal(t, "o", got.Owner, "what the store keeps beside the JSON is left alone")
	assert.Equal(t, int64(3), got.Epoch)
	assert.Equal(t, int64(4), got.Rev)
	assert.True(t, got.CancelRequested)
	require.ErrorIs(t, got.Failure, ErrJobLost)

	got.Owner, got.Epoch, got.Rev, got.LeaseUntil, got.CancelRequested = "", 0, 0, time.Time{}, false
	assert.JSONEq(t, string(want.Workflow), string(got.Workflow))
	got.Workflow = want.Workflow
	again, err := json.Marshal(&got)
	require.NoError(t, err)
	assert.Equal(t, string(data), string(again))
	got.Failure, got.Warnings, want.Failure, want.Warnings = nil, nil, nil, nil
	assert.Equal(t, want, &got)
}

// The names are what other versions read: a change of one is a change of the schema.
func TestRecordJSONNames(t *testing.T) {
	t.Parallel()
	data, err := json.Marshal(fullRecord())
	require.NoError(t, err)
	var fields map[string]json.RawMessage
	require.NoError(t, json.Unmarshal(data, &fields))
	names := []string{}
	for name := range fields {
		names = append(names, name)
	}
	assert.ElementsMatch(t, []string{
		"schema", "job_id", "pod", "client_id", "prompt_id", "attempt", "accepted", "started", "number", "workflow_hash", "workflow",
		"extra_data", "options", "labels", "progress", "outputs", "cached_nodes", "warnings", "failure", "next_attempt", "created_at",
		"attempt_at", "started_at", "finished_at", "retention_ns",
	}, names)
	assert.JSONEq(t, `{"limits":{"Total":3600000000000,"Queue":60000000000,"Run":1000000000,"Stall":-1},"allow_partial":true,"at_most_once":true,"front":true}`, string(fields["options"]))

	minimal, err := json.Marshal(&Record{})
	require.NoError(t, err)
	assert.JSONEq(t, `{"schema":1,"job_id":"","pod":"","client_id":"","prompt_id":"","attempt":0,"workflow_hash":"",
		"progress":{"status":"","fraction":0,"queue_ahead":0,"nodes_done":0,"nodes_total":0,"elapsed_ns":0},
		"created_at":"0001-01-01T00:00:00Z","retention_ns":0}`, string(minimal))
}

func TestS40NewerSchemaIsRefused(t *testing.T) {
	t.Parallel()
	for name, data := range map[string]string{
		"otherwise equal":        `{"schema":2,"job_id":"j"}`,
		"fields in another form": `{"schema":2,"job_id":{"id":"j"},"progress":[1,2],"attempt":"one"}`,
		"much newer":             `{"job_id":"j","later":true,"schema":900}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r Record
			err := json.Unmarshal([]byte(data), &r)
			require.ErrorIs(t, err, ErrSchema)
			assert.Contains(t, err.Error(), "newer version of the library")
			assert.Zero(t, r)
		})
	}
	_, err := json.Marshal(&Record{Schema: 2})
	require.ErrorIs(t, err, ErrSchema)
	require.Error(t, json.Unmarshal([]byte(`{"schema":-1}`), &Record{}))
}

func TestS40UnknownFieldsSurviveAnUpdate(t *testing.T) {
	t.Parallel()
	const later = `{"schema":1,"job_id":"j","priority":{"class":"<high>","n":18446744073709551616},
		"options":{"front":true,"pin":"gpu-1","limits":{"Total":5,"Queue":0,"Run":0,"Stall":0,"Idle":7}},
		"progress":{"status":"queued","fraction":0.5,"queue_ahead":0,"nodes_done":0,"nodes_total":0,"elapsed_ns":0},
		"pod":"p","client_id":"","prompt_id":"","attempt":1,"workflow_hash":"","created_at":"0001-01-01T00:00:00Z","retention_ns":0}`
	var r Record
	require.NoError(t, json.Unmarshal([]byte(later), &r))
	assert.True(t, r.Options.Front)
	assert.Equal(t, time.Duration(5), r.Options.Limits.Total)

	updated := r.Clone()
	updated.Progress.Status, updated.Options.Front, updated.Attempt = StatusRunning, false, 2
	data, err := json.Marshal(updated)
	require.NoError(t, err)
	assert.JSONEq(t, strings.NewReplacer(`"queued"`, `"running"`, `"front":true,`, ``, `"attempt":1`, `"attempt":2`).Replace(later), string(data))

	updated.Options = RecordOptions{}
	data, err = json.Marshal(updated)
	require.NoError(t, err)
	assert.Contains(t, string(data), `"options":{"limits":{"Idle":7},"pin":"gpu-1"}`, "also where this version would leave the object out")
}

func TestRecordJSONOfNumbersThatJSONCannotHold(t *testing.T) {
	t.Parallel()
	r := &Record{JobID: "j", Number: math.Inf(-1), Progress: Progress{Fraction: math.NaN(), Step: math.Inf(1), Steps: math.NaN()}}
	data, err := json.Marshal(r)
	require.NoError(t, err)
	var got Record
	require.NoError(t, json.Unmarshal(data, &got))
	assert.Zero(t, got.Number)
	assert.Equal(t, Progress{}, got.Progress)
	assert.True(t, math.IsNaN(r.Progress.Fraction), "the record itself is left alone")
}

func TestRecordJSONRefuses(t *testing.T) {
	t.Parallel()
	for _, data := range []string{``, `[]`, `"x"`, `{"schema":1.5}`, `{"schema":1}{}`, `{"schema":1,"attempt":"1"}`, `{"created_at":"yesterday"}`} {
		var r Record
		require.Error(t, r.UnmarshalJSON([]byte(data)), data)
		assert.Zero(t, r)
	}
	_, err := json.Marshal(&Record{Workflow: json.RawMessage(`{`)})
	require.Error(t, err)
	var none *Record
	data, err := json.Marshal(none)
	require.NoError(t, err)
	assert.Equal(t, "null", string(data))
}

func TestRecordClone(t *testing.T) {
	t.Parallel()
	r := fullRecord()
	r.Owner, r.Epoch, r.Rev, r.LeaseUntil, r.CancelRequested = "o", 1, 2, time.Unix(3, 0), true
	c := r.Clone()
	assert.Equal(t, r, c)

	c.Workflow[0], c.ExtraData[0], c.Labels["k"], c.CachedNodes[0] = 'x', 'x', "x", "x"
	c.Outputs[0].File.Filename, c.Outputs[1].Text, c.Outputs[2].Raw[0] = "x", "x", 'x'
	c.Warnings[0].Op, c.Failure.Op = "x", "x"
	want := fullRecord()
	want.Owner, want.Epoch, want.Rev, want.LeaseUntil, want.CancelRequested = "o", 1, 2, time.Unix(3, 0), true
	assert.Equal(t, want, r)

	var none *Record
	assert.Nil(t, none.Clone())
	assert.Equal(t, &Record{}, (&Record{}).Clone())
}

// What MarshalJSON writes is read the fast way, and no field is forgotten there: or its speed would be gone unnoticed.
func TestRecordsAreReadTheFastWay(t *testing.T) {
	t.Parallel()
	for _, r := range []*Record{fullRecord(), {JobID: "j"}, {Options: RecordOptions{Limits: Limits{Total: 1}}, Number: 1e300, Labels: map[string]string{}}} {
		data, err := r.MarshalJSON()
		require.NoError(t, err)
		var fast, slow recordFields
		assert.True(t, readRecord(string(data), &fast), "%s", data)
		require.NoError(t, json.Unmarshal(data, &slow))
		assert.Equal(t, slow, fast)
	}
}

// Whatever the bytes, reading them ends without a panic, and what was read can be written and read again.
func FuzzRecordJSON(f *testing.F) {
	full, err := json.Marshal(fullRecord())
	require.NoError(f, err)
	f.Add(full)
	f.Add([]byte(`{"schema":2}`))
	f.Add([]byte(`{"schema":1,"later":[1],"OPTIONS":{"x":1,"limits":null},"options":{"limits":{"Total":1,"y":2}}}`))
	f.Add([]byte(`{"labels":null,"outputs":[{"file":null,"raw":null}],"warnings":[null,{}],"failure":{"cause":{}}}`))
	f.Add([]byte(`{"progress":{"fraction":1e308},"created_at":"9999-12-31T23:59:59.999999999+23:59"}`))
	histories, err := filepath.Glob("testdata/captures/*/success.jsonl")
	require.NoError(f, err)
	for _, name := range histories {
		data, err := os.ReadFile(name)
		require.NoError(f, err)
		f.Add([]byte(`{"schema":1,"workflow":` + strings.SplitN(string(data), "\n", 2)[0] + `}`))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var fast recordFields
		if readRecord(string(data), &fast) {
			var slow recordFields
			require.NoError(t, json.Unmarshal(data, &slow))
			assert.Equal(t, slow, fast)
		}
		var r Record
		if err := r.UnmarshalJSON(data); err != nil {
			return
		}
		first, err := json.Marshal(&r)
		require.NoError(t, err)
		var again Record
		require.NoError(t, json.Unmarshal(first, &again))
		second, err := json.Marshal(&again)
		require.NoError(t, err)
		assert.Equal(t, string(first), string(second))
		_ = r.Clone()
		_ = eventsBetween(nil, &r)
		_ = eventsBetween(&r, &again)
	})
}

func TestMemoryStoreZeroValue(t *testing.T) {
	t.Parallel()
	var s MemoryStore
	ctx := t.Context()
	_, err := s.Get(ctx, "job")
	require.ErrorIs(t, err, ErrJobNotFound)
	for r, err := range s.Unfinished(ctx, "") {
		t.Fatalf("an element in an empty store: %v, %v", r, err)
	}
	_, err = s.Create(ctx, fullRecord(), time.Minute)
	require.NoError(t, err)
	_, err = s.Get(ctx, "job")
	require.NoError(t, err)
}

func TestMemoryStoreRefusesARecordWithoutAnID(t *testing.T) {
	t.Parallel()
	s := NewMemoryStore()
	for _, r := range []*Record{nil, {}} {
		_, err := s.Create(t.Context(), r, time.Minute)
		require.Equal(t, CategoryValidation, CategoryOf(err))
		_, err = s.Update(t.Context(), r)
		require.Equal(t, CategoryValidation, CategoryOf(err))
	}
}

// Ended records go, without anybody asking for them, and no call drops many.
func TestMemoryStoreDropsExpiredRecordsLittleByLittle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := NewMemoryStore()
		ctx := t.Context()
		end := func(id string) {
			r, err := s.Create(ctx, &Record{JobID: id, Owner: "a", Retention: time.Minute}, time.Minute)
			require.NoError(t, err)
			r.Rev++
			r.Progress.Status = StatusSucceeded
			_, err = s.Update(ctx, r)
			require.NoError(t, err)
		}
		for n := range 1000 {
			end("old-" + string(rune('a'+n%26)) + strings.Repeat("x", n/26))
		}
		require.Len(t, s.jobs, 1000)
		time.Sleep(time.Minute)
		before := len(s.jobs)
		_, err := s.RequestCancel(ctx, "none")
		require.ErrorIs(t, err, ErrJobNotFound)
		assert.Less(t, len(s.jobs), before)
		assert.GreaterOrEqual(t, len(s.jobs), before-10, "a call pays for few")
		for n := range 500 {
			end("new-" + string(rune('a'+n%26)) + strings.Repeat("x", n/26))
		}
		assert.Len(t, s.jobs, 500)
		assert.Len(t, s.expiring, 500)
		assert.Empty(t, s.unfinished)
	})
}

// A store that outlives its clients must not hold on to them.
func TestMemoryStoreKeepsNoClient(t *testing.T) {
	t.Parallel()
	s := NewMemoryStore()
	r := fullRecord()
	r.Outputs[0].pod = &PodClient{}
	got, err := s.Create(t.Context(), r, time.Minute)
	require.NoError(t, err)
	assert.Nil(t, got.Outputs[0].pod)
	assert.NotNil(t, r.Outputs[0].pod)
}

// A watch that is left costs nothing any more.
func TestMemoryStoreForgetsWatches(t *testing.T) {
	t.Parallel()
	s := NewMemoryStore()
	_, err := s.Create(t.Context(), fullRecord(), time.Minute)
	require.NoError(t, err)
	for range 10 {
		for _, err := range s.Watch(t.Context(), "job") {
			require.NoError(t, err)
			assert.Len(t, s.jobs["job"].watches, 1)
			break
		}
	}
	assert.Empty(t, s.jobs["job"].watches)
}
