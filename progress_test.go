package comfyui

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/comfypod/comfyui/internal/wire"
)

const reducerGraph = `{
	"1":{"class_type":"Loader","inputs":{}},
	"2":{"class_type":"Sampler","inputs":{"steps":20,"model":["1",0]},"_meta":{"title":"Sample"}},
	"3":{"class_type":"Expander","inputs":{"image":["2",0]}},
	"57:8":{"class_type":"Scale","inputs":{"image":["3",0]}},
	"9":{"class_type":"SaveImage","inputs":{"images":["57:8",0]}}
}`

func newReducer(t require.TestingT) *jobState {
	w, err := ParseWorkflow([]byte(reducerGraph))
	require.NoError(t, err)
	return &jobState{
		graph: planOf(w),
		rec: Record{
			JobID: "job", Pod: "pod", PromptID: "p1", Attempt: 1,
			Progress: Progress{Status: StatusPending, QueueAhead: -1, NodesTotal: 5},
		},
	}
}

// reducerStart is some moment: the reducer knows no clock.
var reducerStart = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func frameOf(t wire.Type, change func(*wire.Message)) *wire.Message {
	m := &wire.Message{Type: t, PromptID: "p1", Timestamp: 1}
	if change != nil {
		change(m)
	}
	return m
}

func executingFrame(node, display string) *wire.Message {
	return frameOf(wire.Executing, func(m *wire.Message) { m.Node, m.Display = node, display })
}

func progressFrame(node string, value, most float64) *wire.Message {
	return frameOf(wire.Progress, func(m *wire.Message) { m.Node, m.Value, m.Max = node, value, most })
}

func stateFrame(nodes ...wire.NodeState) *wire.Message {
	return frameOf(wire.ProgressState, func(m *wire.Message) { m.Nodes = nodes })
}

func successEntry() obsHistory {
	return obsHistory{
		entry:   &wire.HistoryEntry{PromptID: "p1", Status: "success", Messages: []wire.Message{*frameOf(wire.ExecutionSuccess, nil)}},
		outputs: []Output{{Node: "9", Key: "images", File: &FileRef{Filename: "a.png", Type: "output"}}},
	}
}

func failureEntry(status string, messages ...wire.Message) obsHistory {
	return obsHistory{entry: &wire.HistoryEntry{PromptID: "p1", Status: status, Messages: messages}}
}

// anyObservation draws something that a pod, the store or the caller may bring, in no order.
func anyObservation() *rapid.Generator[observation] {
	return rapid.Custom(func(t *rapid.T) observation {
		node := rapid.SampledFrom([]string{"1", "2", "3", "57:8", "9", "3.0.0.1", "3.0.0.2", "nobody", ""}).Draw(t, "node")
		display := ""
		if len(node) > 4 && node[0] == '3' {
			display = "3"
		}
		value := rapid.Float64Range(-2, 30).Draw(t, "value")
		steps := rapid.SampledFrom([]float64{0, 1, 20, 5, -1}).Draw(t, "steps")
		failure := &wire.Failure{NodeID: node, NodeType: "T", ExceptionType: rapid.SampledFrom([]string{"RuntimeError", "ExecutionBlocked", "torch.OutOfMemoryError"}).Draw(t, "exception")}
		switch rapid.IntRange(0, 20).Draw(t, "kind") {
		case 0:
			return frameOf(wire.ExecutionStart, nil)
		case 1:
			return frameOf(wire.ExecutionCached, func(m *wire.Message) { m.Cached = []string{node} })
		case 2, 3:
			return executingFrame(node, display)
		case 4, 5:
			return progressFrame(node, value, steps)
		case 6, 7, 8:
			state := rapid.SampledFrom([]string{"running", "finished", "pending", "error"}).Draw(t, "state")
			return stateFrame(wire.NodeState{ID: node, Display: display, Value: value, Max: steps, State: state}, wire.NodeState{ID: "2", Display: "2", Value: 1, Max: 1, State: "finished"})
		case 9:
			return frameOf(wire.Executed, func(m *wire.Message) {
				m.Node, m.Display = node, display
				m.Output = json.RawMessage(`{"images":[{"filename":"x.png","subfolder":"","type":"output"}]}`)
			})
		case 10:
			return frameOf(wire.Executed, func(m *wire.Message) { m.Node = node })
		case 11:
			return frameOf(wire.ExecutionError, func(m *wire.Message) { m.Failure = failure })
		case 12:
			return frameOf(rapid.SampledFrom([]wire.Type{wire.ExecutionSuccess, wire.ExecutionInterrupted, wire.Other}).Draw(t, "type"), func(m *wire.Message) { m.Failure = &wire.Failure{} })
		case 13:
			return obsAccepted{promptID: "p1", clientID: "c", number: 3, source: SourcePoll}
		case 14:
			return obsQueued{number: 3, ahead: rapid.IntRange(-1, 5).Draw(t, "ahead")}
		case 15:
			return obsRunning{number: 3}
		case 16:
			return obsSettled{}
		case 17:
			return obsPreview{&Preview{Node: node, ContentType: "image/png"}}
		case 18:
			return rapid.SampledFrom([]observation{
				successEntry(), failureEntry("error", *frameOf(wire.ExecutionError, func(m *wire.Message) { m.Failure = failure })), failureEntry("error"),
				failureEntry("success", *frameOf(wire.ExecutionInterrupted, func(m *wire.Message) { m.Failure = failure })),
			}).Draw(t, "entry")
		case 19:
			return obsRetry{promptID: "p2", at: reducerStart, err: &Error{Category: CategoryLost, Err: ErrJobLost}}
		default:
			return rapid.SampledFrom([]observation{
				obsVanished{&Error{Category: CategoryLost, Err: ErrJobLost}},
				obsEnd{StatusFailed, &Error{Category: CategoryLost, Err: ErrJobLost}},
				obsEnd{StatusCancelled, &Error{Category: CategoryCancelled, Err: ErrCancelled}},
				obsWarning{&Error{Category: CategoryExecution}},
				obsVerdict{&Error{Category: CategoryTimeout}},
				obsText{node, "working"},
			}).Draw(t, "local")
		}
	})
}

// Whatever comes, in whatever order: an end is final, progress does not go back, and 1 means success. The million orders of the
// reliability table take some minutes:
//
//	go test -run 'TestReducerHoldsInAnyOrder$' -rapid.checks 1000000 -rapid.seed 1 -v .
func TestReducerHoldsInAnyOrder(t *testing.T) {
	t.Parallel()
	orders, observations, late := 0, 0, 0
	rapid.Check(t, func(t *rapid.T) {
		s := newReducer(t)
		now := reducerStart
		ends := 0
		orders++
		for range rapid.IntRange(1, 60).Draw(t, "length") {
			whole, before, started, accepted := s.rec, s.rec.Progress, s.rec.Started, s.rec.Accepted
			o := anyObservation().Draw(t, "observation")
			observations++
			now = now.Add(time.Duration(rapid.IntRange(0, 1000).Draw(t, "ms")) * time.Millisecond)
			evs := s.apply(o, now, nil)
			p := s.rec.Progress
			if before.Status.Terminal() {
				late++
				require.Equal(t, whole, s.rec, "an ended job changed")
				require.Empty(t, evs, "an ended job told news")
				continue
			}
			require.GreaterOrEqual(t, p.Fraction, before.Fraction)
			require.LessOrEqual(t, p.Fraction, 1.0)
			require.Equal(t, p.Status == StatusSucceeded, p.Fraction == 1, "fraction %v with status %s", p.Fraction, p.Status)
			require.LessOrEqual(t, p.NodesDone, p.NodesTotal)
			if s.rec.Started {
				require.True(t, s.rec.Accepted, "started without being accepted")
			}
			if _, retry := o.(obsRetry); !retry {
				require.GreaterOrEqual(t, p.NodesDone, before.NodesDone)
				require.False(t, started && !s.rec.Started, "a running attempt went back")
				require.False(t, accepted && !s.rec.Accepted, "an accepted attempt went back")
			}
			for i, ev := range evs {
				require.Equal(t, "job", ev.JobID)
				if ev.Kind.terminal() {
					ends++
					require.Equal(t, len(evs)-1, i, "news after the end")
				}
			}
		}
		require.LessOrEqual(t, ends, 1)
		require.Equal(t, s.rec.Progress.Status.Terminal(), ends == 1)
	})
	t.Logf("%d orders of %d observations, %d of them after the end: no end changed, no progress fell", orders, observations, late)
}

// An observation that is repeated, as after a reconnect, changes nothing but the clock.
func TestReducerTakesRepeats(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := newReducer(t)
		now := reducerStart
		for range rapid.IntRange(1, 30).Draw(t, "length") {
			o := anyObservation().Draw(t, "observation")
			switch o.(type) {
			case obsRetry, obsWarning, obsPreview, obsText:
				continue // each of these is news of its own
			}
			s.apply(o, now, nil)
			before := s.rec
			s.apply(o, now, nil)
			require.Equal(t, before.Progress.Status, s.rec.Progress.Status)
			require.Equal(t, before.Progress.Fraction, s.rec.Progress.Fraction)
			require.Equal(t, before.Progress.NodesDone, s.rec.Progress.NodesDone)
			require.Equal(t, before.CachedNodes, s.rec.CachedNodes)
		}
	})
}

func newsOf(evs []Event) []EventKind {
	kinds := make([]EventKind, 0, len(evs))
	for _, ev := range evs {
		kinds = append(kinds, ev.Kind)
	}
	return kinds
}

func TestReducerFollowsARun(t *testing.T) {
	t.Parallel()
	s := newReducer(t)
	at := func(sec int) time.Time { return reducerStart.Add(time.Duration(sec) * time.Second) }
	steps := []struct {
		name     string
		observe  observation
		at       int
		kinds    []EventKind
		fraction float64
		node     string
	}{
		{"accepted", obsAccepted{promptID: "p1", clientID: "c", number: 7, source: SourcePoll}, 0, []EventKind{EventQueued}, 0, ""},
		{"start", frameOf(wire.ExecutionStart, nil), 1, []EventKind{EventStarted}, 0, ""},
		{"cached", frameOf(wire.ExecutionCached, func(m *wire.Message) { m.Cached = []string{"1"} }), 1, []EventKind{EventCached}, 1. / 25, ""},
		{"node", executingFrame("2", "2"), 1, []EventKind{EventNode}, 1. / 25, "2"},
		{"half of the sampler", progressFrame("2", 10, 20), 2, []EventKind{EventProgress}, (1 + 21*.5) / 25, "2"},
		{"the sampler starts over", progressFrame("2", 1, 20), 3, []EventKind{EventProgress}, (1 + 21*.5) / 25, "2"},
		{"the next node, which expands", executingFrame("3.0.0.1", "3"), 3, []EventKind{EventNode}, 22. / 25, "3"},
		{"the pod's account", stateFrame(wire.NodeState{ID: "3.0.0.1", Display: "3", State: "finished", Value: 1, Max: 1}), 4, []EventKind{EventProgress}, 22.5 / 25, "3"},
		{"a flattened node", stateFrame(wire.NodeState{ID: "3", State: "finished"}, wire.NodeState{ID: "57:8", State: "running", Value: 0, Max: 1}), 5, []EventKind{EventNode}, 23. / 25, "57:8"},
		{"all nodes", stateFrame(wire.NodeState{ID: "57:8", State: "finished"}, wire.NodeState{ID: "9", State: "finished"}), 6, []EventKind{EventProgress}, almost, "57:8"},
		{"terminal frame", frameOf(wire.ExecutionSuccess, nil), 6, nil, almost, "57:8"},
		{"history", successEntry(), 7, []EventKind{EventSucceeded}, 1, ""},
	}
	for _, step := range steps {
		evs := s.apply(step.observe, at(step.at), nil)
		if step.kinds == nil {
			step.kinds = []EventKind{}
		}
		require.Equal(t, step.kinds, newsOf(evs), step.name)
		require.InDelta(t, step.fraction, s.rec.Progress.Fraction, 1e-9, step.name)
		require.Equal(t, step.node, s.rec.Progress.Node, step.name)
	}
	assert.Equal(t, 6*time.Second, s.rec.Progress.Elapsed)
	assert.Equal(t, []string{"1"}, s.rec.CachedNodes)
	assert.Len(t, s.rec.Outputs, 1)
	assert.Equal(t, 7.0, s.rec.Number)
}

func TestReducerJudgesByTheLastMessage(t *testing.T) {
	t.Parallel()
	failed := frameOf(wire.ExecutionError, func(m *wire.Message) {
		m.Failure = &wire.Failure{NodeID: "2", ExceptionType: "RuntimeError", Message: "boom\n"}
	})
	blockedMessage := frameOf(wire.ExecutionError, func(m *wire.Message) { m.Failure = &wire.Failure{ExceptionType: "ExecutionBlocked", Message: "no"} })
	for name, tc := range map[string]struct {
		entry       obsHistory
		succeeded   bool
		interrupted bool
		category    Category
	}{
		"success":                         {entry: successEntry(), succeeded: true},
		"success without messages":        {entry: failureEntry("success"), succeeded: true},
		"success over an error":           {entry: failureEntry("success", *frameOf(wire.ExecutionStart, nil), *failed), category: CategoryExecution},
		"error":                           {entry: failureEntry("error", *failed), category: CategoryExecution},
		"error without messages":          {entry: failureEntry("error"), category: CategoryExecution},
		"interrupted, status error":       {entry: failureEntry("error", *frameOf(wire.ExecutionInterrupted, func(m *wire.Message) { m.Failure = &wire.Failure{} })), interrupted: true, category: CategoryInterrupted},
		"a blocked output is no end":      {entry: failureEntry("success", *blockedMessage, *frameOf(wire.ExecutionSuccess, nil)), succeeded: true},
		"a blocked output after success":  {entry: failureEntry("success", *frameOf(wire.ExecutionSuccess, nil), *blockedMessage), succeeded: true},
		"a null status without a message": {entry: failureEntry(""), category: CategoryExecution},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newReducer(t)
			s.apply(tc.entry, reducerStart, nil)
			require.Equal(t, tc.succeeded, s.rec.Progress.Status == StatusSucceeded)
			if tc.succeeded {
				return
			}
			require.NotNil(t, s.attempt.verdict)
			assert.Equal(t, tc.interrupted, s.attempt.verdict.interrupted)
			assert.Equal(t, tc.category, s.attempt.verdict.err.Category)
		})
	}
}

func TestReducerKeepsTheStreamsOutputsForALostHistory(t *testing.T) {
	t.Parallel()
	s := newReducer(t)
	output := json.RawMessage(`{"images":[{"filename":"a.png","subfolder":"s","type":"output"}]}`)
	s.apply(frameOf(wire.Executed, func(m *wire.Message) { m.Node, m.Output = "9", output }), reducerStart, nil)
	s.apply(frameOf(wire.Executed, func(m *wire.Message) { m.Node, m.Output = "9", output }), reducerStart, nil)
	s.apply(frameOf(wire.ExecutionSuccess, nil), reducerStart, nil)
	require.False(t, s.rec.Progress.Status.Terminal(), "the history has the first word")
	evs := s.apply(obsSettled{}, reducerStart, nil)
	require.Equal(t, []EventKind{EventSucceeded}, newsOf(evs))
	require.Len(t, s.rec.Outputs, 1)
	assert.Equal(t, "s/a.png", fmt.Sprintf("%s/%s", s.rec.Outputs[0].File.Subfolder, s.rec.Outputs[0].File.Filename))
}

func TestEventSurvivesJSON(t *testing.T) {
	t.Parallel()
	cause := &ExecutionError{NodeID: "2", NodeType: "Sampler", ExceptionType: "RuntimeError", Message: "boom"}
	ev := Event{
		Kind: EventFailed, JobID: "j", PromptID: "p", Attempt: 2, Time: reducerStart, Source: SourcePoll, Node: "2",
		Progress: Progress{Status: StatusFailed, Fraction: .5, QueueAhead: -1, Elapsed: time.Second},
		Outputs:  []Output{{Node: "9", Key: "images", File: &FileRef{Filename: "a.png", Type: "output"}}},
		Preview:  &Preview{ContentType: "image/png", Data: []byte{1, 2}}, Stream: StreamUp,
		Err: &Error{Op: "execute", JobID: "j", Category: CategoryLost, Err: errors.Join(ErrJobLost, cause)}, Raw: json.RawMessage(`{"a":1}`),
	}
	data, err := json.Marshal(ev)
	require.NoError(t, err)
	var back Event
	require.NoError(t, json.Unmarshal(data, &back))
	require.ErrorIs(t, back.Err, ErrJobLost)
	var execution *ExecutionError
	require.ErrorAs(t, back.Err, &execution)
	assert.Equal(t, cause, execution)
	assert.Equal(t, CategoryLost, CategoryOf(back.Err))
	back.Err, ev.Err = nil, nil
	assert.Equal(t, ev, back)
}

func TestRemainingEstimatesFromThePaceSinceTheCache(t *testing.T) {
	t.Parallel()
	assert.Zero(t, remaining(0, 0, .5))
	assert.Zero(t, remaining(time.Second, .5, .52), "too early to tell")
	assert.Zero(t, remaining(time.Second, 0, 1))
	assert.Equal(t, 10*time.Second, remaining(10*time.Second, 0, .5))
	assert.Equal(t, 5*time.Second, remaining(5*time.Second, .5, .75), "what came from the cache took no time")
}

// A reader that does not keep up has the newest of each job, and every state.
func TestSlowReaderOfManyJobs(t *testing.T) {
	t.Parallel()
	q := newEventQueue()
	of := func(job string, k EventKind, step float64) Event {
		return Event{JobID: job, Kind: k, Progress: Progress{Step: step}}
	}
	for i := range 1000 {
		q.push([]Event{of("a", EventProgress, float64(i)), of("b", EventProgress, float64(-i))})
		if i == 10 {
			q.push([]Event{of("a", EventStarted, 0), of("b", EventQueued, 0)})
		}
	}
	assert.Equal(t, []Event{
		of("a", EventProgress, 10), of("b", EventProgress, -10), of("a", EventStarted, 0), of("b", EventQueued, 0),
		of("a", EventProgress, 999), of("b", EventProgress, -999),
	}, q.take())
	for i := range 1000 {
		q.push([]Event{of("a", EventWarning, float64(i)), of("a", EventRetrying, 0)})
	}
	left := newsOf(q.take())
	states := slices.DeleteFunc(slices.Clone(left), func(k EventKind) bool { return k != EventRetrying })
	assert.Len(t, states, 1000)
	assert.Len(t, left, 1000+maxQueuedEvents)
}

// Nodes that the workflow does not have cost bounded memory.
func TestReducerBoundsStrangers(t *testing.T) {
	t.Parallel()
	s := newReducer(t)
	for i := range 3 * maxStrangers {
		id := fmt.Sprint("x", i)
		s.apply(executingFrame(id, ""), reducerStart, nil)
		s.apply(stateFrame(wire.NodeState{ID: "y" + id, State: "finished"}), reducerStart, nil)
	}
	for i := range maxInner + 100 {
		id := fmt.Sprint("3.x", i)
		s.apply(executingFrame(id, "3"), reducerStart, nil)
		s.apply(stateFrame(wire.NodeState{ID: id, Display: "3", State: "finished"}), reducerStart, nil)
	}
	assert.LessOrEqual(t, len(s.attempt.nodes), maxStrangers+2*s.rec.Progress.NodesTotal)
	assert.LessOrEqual(t, len(s.attempt.nodes["3"].inner), maxInner)
	s.apply(executingFrame("9", "9"), reducerStart, nil)
	assert.Equal(t, "9", s.rec.Progress.Node)
	assert.Contains(t, s.attempt.nodes, "9")
}
