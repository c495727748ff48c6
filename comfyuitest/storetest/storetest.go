// Package storetest is the conformance suite for comfyui.Store, and a wrapper that makes any Store fail on demand.
//
// A Store of one's own passes if this does:
//
//	func TestStore(t *testing.T) {
//		storetest.Run(t, func(t *testing.T) comfyui.Store { return newMyStore(t) }, nil)
//	}
package storetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"testing"
	"time"

	"github.com/comfypod/comfyui"
)

// Run runs the suite: each sentence of the contract of comfyui.Store, and of comfyui.Watcher if the store is one too, as a
// subtest of its own, then random calls of several owners against a model, and races.
//
// newStore returns an empty store, which the t that it is given cleans up. advance moves the clock of the stores; leases and
// retention are then tested with ttls of minutes. With nil the suite sleeps, with ttls of some 100 ms: a store over a network
// needs clocks and round trips that are well within that.
//
// Run may be called inside a testing/synctest bubble, with time.Sleep for advance. A bubble has no subtests: the cases then run
// one after another as one test, and the log names them.
func Run(t *testing.T, newStore func(t *testing.T) comfyui.Store, advance func(time.Duration)) {
	t.Helper()
	bubble := inBubble(t)
	for _, c := range slices.Concat(createCases, updateCases, leaseCases, cancelCases, unfinishedCases, watchCases, randomCases, raceCases) {
		run := func(t *testing.T) {
			store := newStore(t)
			watcher, _ := store.(comfyui.Watcher)
			c.run(&fixture{T: t, store: exact{store}, watcher: watcher, ctx: t.Context(), advance: advance})
		}
		if bubble {
			t.Logf("case: %s", c.name)
			run(t)
			continue
		}
		t.Run(c.name, run)
	}
}

// testCase is one sentence of the contract.
type testCase struct {
	name string
	run  func(f *fixture)
}

// inBubble reports whether t belongs to a synctest bubble, where Run, Parallel and Deadline of a T panic.
func inBubble(t *testing.T) (bubble bool) {
	defer func() { bubble = recover() != nil }()
	t.Deadline()
	return false
}

// fixture is an empty store and what a case needs to ask it.
type fixture struct {
	*testing.T
	store   comfyui.Store
	watcher comfyui.Watcher // nil: the store is none
	ctx     context.Context
	advance func(time.Duration)
}

// exact makes an error of what a store must not give: neither a record nor an error.
type exact struct{ comfyui.Store }

var errNeither = errors.New("neither a record nor an error")

func recordOrError(r *comfyui.Record, err error) (*comfyui.Record, error) {
	if r == nil && err == nil {
		err = errNeither
	}
	return r, err
}

func (s exact) Create(ctx context.Context, r *comfyui.Record, ttl time.Duration) (*comfyui.Record, error) {
	return recordOrError(s.Store.Create(ctx, r, ttl))
}

func (s exact) Get(ctx context.Context, jobID string) (*comfyui.Record, error) {
	return recordOrError(s.Store.Get(ctx, jobID))
}

func (s exact) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	return recordOrError(s.Store.Update(ctx, r))
}

func (s exact) Claim(ctx context.Context, jobID, owner string, ttl time.Duration) (*comfyui.Record, error) {
	return recordOrError(s.Store.Claim(ctx, jobID, owner, ttl))
}

func (s exact) RequestCancel(ctx context.Context, jobID string) (*comfyui.Record, error) {
	return recordOrError(s.Store.RequestCancel(ctx, jobID))
}

func (s exact) Unfinished(ctx context.Context, pod string) iter.Seq2[*comfyui.Record, error] {
	return func(yield func(*comfyui.Record, error) bool) {
		for r, err := range s.Store.Unfinished(ctx, pod) {
			if !yield(recordOrError(r, err)) {
				return
			}
		}
	}
}

const (
	// long is a ttl that does not run out within a case, virtual or not.
	long = 24 * time.Hour
	// patience bounds each wait for something that should come at once.
	patience = 30 * time.Second
)

// short is a ttl that lapse lets run out. No case relies on its running.
func (f *fixture) short() time.Duration {
	if f.advance == nil {
		return 100 * time.Millisecond
	}
	return time.Minute
}

// brief is a Retention that expire lets run out, and that still runs when the next call comes, slow as the store may be.
func (f *fixture) brief() time.Duration { return max(f.short(), 3*time.Second) }

// lapse lets what has the ttl short run out, expire what has the Retention brief.
func (f *fixture) lapse()  { f.pass(f.short()) }
func (f *fixture) expire() { f.pass(f.brief()) }

func (f *fixture) pass(d time.Duration) {
	if f.advance == nil {
		time.Sleep(d + 50*time.Millisecond)
		return
	}
	f.advance(d)
}

// newRecord has something in every field.
func newRecord(jobID, owner string) *comfyui.Record {
	created := time.Date(2026, 3, 1, 10, 20, 30, 123456789, time.UTC)
	return &comfyui.Record{
		Schema:       1,
		JobID:        jobID,
		Pod:          "pod-1",
		ClientID:     "client-" + owner,
		PromptID:     "prompt-" + jobID,
		Attempt:      1,
		Accepted:     true,
		Number:       -3.5,
		WorkflowHash: "hash-" + jobID,
		Workflow:     json.RawMessage(`{"3":{"class_type":"KSampler","inputs":{"seed":18446744073709551615,"text":"<lora:a&b>"}}}`),
		ExtraData:    json.RawMessage(`{"note":"a <b> & c"}`),
		Options:      comfyui.RecordOptions{Limits: comfyui.Limits{Total: time.Hour, Stall: -1}, AllowPartial: true, Front: true},
		Labels:       map[string]string{"tenant": "a", "": "empty"},
		Progress: comfyui.Progress{
			Status: comfyui.StatusQueued, Fraction: 0.25, QueueAhead: 3, NodesDone: 1, NodesTotal: 4,
			Node: "3", NodeClass: "KSampler", NodeTitle: "Sämpler", Step: 5, Steps: 20, Elapsed: time.Second, Remaining: time.Minute,
		},
		Outputs:     []comfyui.Output{{Node: "9", Key: "images", File: &comfyui.FileRef{Filename: "a.png", Subfolder: "s", Type: "output"}}, {Node: "9", Key: "text", Text: "done"}, {Node: "9", Key: "other", Raw: json.RawMessage(`{"n":1}`)}},
		CachedNodes: []string{"1", "2"},
		Warnings:    []*comfyui.Error{{Op: "validate", Category: comfyui.CategoryValidation, Err: errors.New("node 7 was dropped")}},
		NextAttempt: created.Add(4 * time.Second),
		CreatedAt:   created,
		AttemptAt:   created.Add(time.Second),
		Rev:         1,
		Owner:       owner,
	}
}

// next returns r as its owner writes it next, changed.
func next(r *comfyui.Record, change func(r *comfyui.Record)) *comfyui.Record {
	n := r.Clone()
	n.Rev++
	if change != nil {
		change(n)
	}
	return n
}

func withStatus(s comfyui.Status) func(*comfyui.Record) {
	return func(r *comfyui.Record) {
		r.Progress.Status = s
		if s.Terminal() {
			r.FinishedAt = r.CreatedAt.Add(time.Hour)
		}
	}
}

func (f *fixture) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatalf("unexpected error: %v", err)
	}
}

func (f *fixture) wantError(err, want error) {
	f.Helper()
	if !errors.Is(err, want) {
		f.Fatalf("error %v, want %v", err, want)
	}
}

// create stores a new record of owner.
func (f *fixture) create(jobID, owner string, ttl time.Duration) *comfyui.Record {
	f.Helper()
	r, err := f.store.Create(f.ctx, newRecord(jobID, owner), ttl)
	f.must(err)
	return r
}

func (f *fixture) get(jobID string) *comfyui.Record {
	f.Helper()
	r, err := f.store.Get(f.ctx, jobID)
	f.must(err)
	return r
}

func (f *fixture) update(r *comfyui.Record) *comfyui.Record {
	f.Helper()
	stored, err := f.store.Update(f.ctx, r)
	f.must(err)
	return stored
}

func (f *fixture) claim(jobID, owner string, ttl time.Duration) *comfyui.Record {
	f.Helper()
	r, err := f.store.Claim(f.ctx, jobID, owner, ttl)
	f.must(err)
	return r
}

// end writes the terminal record that follows r.
func (f *fixture) end(r *comfyui.Record, s comfyui.Status) *comfyui.Record {
	f.Helper()
	return f.update(next(r, withStatus(s)))
}

// unfinished returns the ids that Unfinished yields, sorted.
func (f *fixture) unfinished(pod string) []string {
	f.Helper()
	var ids []string
	for r, err := range f.store.Unfinished(f.ctx, pod) {
		f.must(err)
		ids = append(ids, r.JobID)
	}
	slices.Sort(ids)
	return ids
}

func (f *fixture) wantIDs(got []string, want ...string) {
	f.Helper()
	if !slices.Equal(got, want) {
		f.Fatalf("job ids %q, want %q", got, want)
	}
}

// wantSame compares all of two records, but for the moment at which the lease ends.
func (f *fixture) wantSame(got, want *comfyui.Record) {
	f.Helper()
	if d := difference(got, want); d != "" {
		f.Fatal(d)
	}
}

// wantUnchanged compares all of the stored record with one that was returned earlier.
func (f *fixture) wantUnchanged(was *comfyui.Record) {
	f.Helper()
	now := f.get(was.JobID)
	f.wantSame(now, was)
	if !now.LeaseUntil.Equal(was.LeaseUntil) {
		f.Fatalf("LeaseUntil changed from %v to %v", was.LeaseUntil, now.LeaseUntil)
	}
}

func (f *fixture) wantHolder(r *comfyui.Record, owner string, epoch int64) {
	f.Helper()
	if r.Owner != owner || r.Epoch != epoch {
		f.Fatalf("owner %q in epoch %d, want %q in %d", r.Owner, r.Epoch, owner, epoch)
	}
}

func difference(got, want *comfyui.Record) string {
	if got == nil || want == nil {
		return fmt.Sprintf("record %s, want %s", named(got), named(want))
	}
	if g, w := contentOf(got), contentOf(want); !bytes.Equal(g, w) {
		return fmt.Sprintf("content\n%s\nwant\n%s", g, w)
	}
	if got.Owner != want.Owner || got.Epoch != want.Epoch || got.Rev != want.Rev || got.CancelRequested != want.CancelRequested {
		return fmt.Sprintf("owner %q, epoch %d, rev %d, cancel %v; want %q, %d, %d, %v",
			got.Owner, got.Epoch, got.Rev, got.CancelRequested, want.Owner, want.Epoch, want.Rev, want.CancelRequested)
	}
	return ""
}

func named(r *comfyui.Record) string {
	if r == nil {
		return "none"
	}
	return fmt.Sprintf("rev %d of owner %q in epoch %d", r.Rev, r.Owner, r.Epoch)
}

func contentOf(r *comfyui.Record) []byte {
	data, err := json.Marshal(r)
	if err != nil {
		return []byte(err.Error())
	}
	return data
}
