package comfyui

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// step is a version of a record, written as what changed.
type step func(r *Record)

func at(s Status) step { return func(r *Record) { r.Progress.Status = s } }

func queued(r *Record)  { r.Progress.Status, r.Accepted = StatusQueued, true }
func running(r *Record) { r.Progress.Status, r.Accepted, r.Started = StatusRunning, true, true }

func waits(attempt int, until time.Duration) step {
	return func(r *Record) {
		r.Progress.Status, r.Accepted, r.Started, r.Attempt = StatusPending, false, false, attempt
		r.NextAttempt = eventsEpoch.Add(until)
		r.Failure = &Error{Op: "follow", Category: CategoryLost, Err: errors.New("lost")}
	}
}

func attempt(n int) step {
	return func(r *Record) {
		r.Attempt, r.NextAttempt, r.Failure, r.Accepted, r.Started = n, time.Time{}, nil, false, false
	}
}

func warned(r *Record) {
	r.Warnings = append(slices.Clone(r.Warnings), &Error{Op: "run", Category: CategoryExecution, Err: errors.New("blocked")})
}

func fraction(f float64) step { return func(r *Record) { r.Progress.Fraction = f } }

var eventsEpoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func recordWith(old *Record, steps ...step) *Record {
	if old == nil {
		old = &Record{JobID: "job", Attempt: 1, PromptID: "p", Progress: Progress{Status: StatusPending}}
	}
	r := old.Clone()
	for _, s := range steps {
		s(r)
	}
	return r
}

func kindsOf(events []Event) []EventKind {
	kinds := []EventKind{}
	for _, e := range events {
		kinds = append(kinds, e.Kind)
	}
	return kinds
}

func TestEventsBetween(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		old, cur []step
		want     []EventKind
	}{
		{"nothing", []step{running}, nil, []EventKind{}},
		{"queued", nil, []step{queued}, []EventKind{EventQueued}},
		{"started", []step{queued}, []step{running}, []EventKind{EventStarted}},
		{"started, queued unseen", nil, []step{running}, []EventKind{EventQueued, EventStarted}},
		{"progress", []step{running}, []step{fraction(0.5)}, []EventKind{EventProgress}},
		{"progress while queued", []step{queued}, []step{func(r *Record) { r.Progress.QueueAhead = 2 }}, []EventKind{EventProgress}},
		{"started with progress", []step{queued}, []step{running, fraction(0.5)}, []EventKind{EventStarted}},
		{"success", []step{running}, []step{at(StatusSucceeded)}, []EventKind{EventSucceeded}},
		{"success, all unseen", nil, []step{at(StatusSucceeded)}, []EventKind{EventQueued, EventStarted, EventSucceeded}},
		{"refused: it was never queued", nil, []step{at(StatusFailed)}, []EventKind{EventFailed}},
		{"failed, all unseen", nil, []step{running, at(StatusFailed)}, []EventKind{EventQueued, EventStarted, EventFailed}},
		{"cancelled while queued", []step{queued}, []step{at(StatusCancelled)}, []EventKind{EventCancelled}},
		{"cancelled, queued unseen", nil, []step{queued, at(StatusCancelled)}, []EventKind{EventQueued, EventCancelled}},
		{"an end stays", []step{at(StatusFailed)}, []step{fraction(0.5)}, []EventKind{}},
		{"warning", []step{running}, []step{warned}, []EventKind{EventWarning}},
		{"two warnings, one new, with progress", []step{running, warned}, []step{warned, warned, fraction(0.2)}, []EventKind{EventWarning, EventWarning, EventProgress}},
		{"warning before the end", []step{running}, []step{warned, at(StatusSucceeded)}, []EventKind{EventWarning, EventSucceeded}},
		{"warnings begun anew", []step{running, warned, warned}, []step{func(r *Record) { r.Warnings = r.Warnings[:1] }}, []EventKind{EventWarning}},
		{"retrying, same attempt", []step{running}, []step{waits(1, 5)}, []EventKind{EventRetrying}},
		{"retrying, next attempt", []step{running}, []step{waits(2, 5)}, []EventKind{EventRetrying}},
		{"retrying, refused at once", nil, []step{waits(1, 5)}, []EventKind{EventRetrying}},
		{"retrying, the states before it unseen", nil, []step{waits(1, 5), func(r *Record) { r.Accepted, r.Started = true, true }}, []EventKind{EventQueued, EventStarted, EventRetrying}},
		{"still retrying", []step{waits(1, 5)}, nil, []EventKind{}},
		{"retrying again", []step{waits(1, 5)}, []step{waits(2, 9)}, []EventKind{EventRetrying}},
		{"put off", []step{waits(1, 5)}, []step{waits(1, 9)}, []EventKind{EventRetrying}},
		{"the retry begins", []step{waits(1, 5)}, []step{attempt(2)}, []EventKind{}},
		{"the retry is queued", []step{waits(1, 5)}, []step{attempt(2), queued}, []EventKind{EventQueued}},
		{"the retry is queued, the attempt counted before", []step{waits(2, 5)}, []step{attempt(2), queued}, []EventKind{EventQueued}},
		{"retry unseen", []step{running}, []step{attempt(2), running}, []EventKind{EventRetrying, EventQueued, EventStarted}},
		{"cancelled while retrying", []step{running, waits(1, 5), func(r *Record) { r.Accepted, r.Started = true, true }}, []step{at(StatusCancelled)}, []EventKind{EventCancelled}},
		{"a wait that came to success", []step{waits(1, 5)}, []step{at(StatusSucceeded)}, []EventKind{EventSucceeded}},
		{"reopened", []step{at(StatusFailed)}, []step{attempt(2), at(StatusPending)}, []EventKind{EventRetrying}},
		{"rerun unseen", []step{at(StatusFailed)}, []step{attempt(2), at(StatusSucceeded)}, []EventKind{EventRetrying, EventQueued, EventStarted, EventSucceeded}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			old := recordWith(nil, tt.old...)
			cur := recordWith(old, tt.cur...)
			events := eventsBetween(old, cur)
			assert.Equal(t, tt.want, kindsOf(events))
			for _, e := range events {
				assert.Equal(t, "job", e.JobID)
				assert.Equal(t, "p", e.PromptID)
				assert.Equal(t, cur.Attempt, e.Attempt)
				assert.Equal(t, SourceStore, e.Source)
			}
		})
	}
}

func TestEventsBetweenBeginWithASnapshot(t *testing.T) {
	t.Parallel()
	for s, want := range map[Status][]EventKind{
		StatusPending:   {EventSnapshot},
		StatusQueued:    {EventSnapshot},
		StatusRunning:   {EventSnapshot},
		StatusSucceeded: {EventSnapshot, EventSucceeded},
		StatusFailed:    {EventSnapshot, EventFailed},
		StatusCancelled: {EventSnapshot, EventCancelled},
	} {
		events := eventsBetween(nil, recordWith(nil, at(s)))
		assert.Equal(t, want, kindsOf(events), "status %s", s)
		assert.Equal(t, s, events[0].Progress.Status)
	}
}

func TestEventsBetweenCarryWhatTheRecordHolds(t *testing.T) {
	t.Parallel()
	old := recordWith(nil, fraction(0.1))
	cur := recordWith(old, running, fraction(0.7), func(r *Record) {
		r.AttemptAt, r.StartedAt, r.FinishedAt = eventsEpoch, eventsEpoch.Add(1), eventsEpoch.Add(2)
		r.Progress.Status = StatusFailed
		r.Outputs = []Output{{Node: "9", Key: "images", File: &FileRef{Filename: "a.png"}}}
		r.Failure = &Error{Op: "run", Category: CategoryExecution, Err: errors.New("boom")}
	})
	events := eventsBetween(old, cur)
	require.Equal(t, []EventKind{EventQueued, EventStarted, EventFailed}, kindsOf(events))

	assert.Equal(t, eventsEpoch, events[0].Time)
	assert.Equal(t, Progress{Status: StatusQueued, Fraction: 0.1}, events[0].Progress, "a state told late has the older progress")
	assert.Equal(t, eventsEpoch.Add(1), events[1].Time)
	assert.Equal(t, Progress{Status: StatusRunning, Fraction: 0.1}, events[1].Progress)
	end := events[2]
	assert.Equal(t, eventsEpoch.Add(2), end.Time)
	assert.Equal(t, cur.Progress, end.Progress)
	assert.Equal(t, cur.Outputs, end.Outputs)
	var failure *Error
	require.ErrorAs(t, end.Err, &failure)
	assert.Equal(t, CategoryExecution, failure.Category)

	end.Outputs[0].File.Filename, failure.Op = "scribbled", "scribbled"
	assert.Equal(t, "a.png", cur.Outputs[0].File.Filename, "events are the receiver's")
	assert.Equal(t, "run", cur.Failure.Op)

	success := eventsBetween(old, recordWith(old, at(StatusSucceeded)))
	assert.NoError(t, success[len(success)-1].Err, "no failure is a nil error")
}

// life draws the versions that one job's record goes through, from pending to an end.
func life(rt *rapid.T) []*Record {
	versions := []*Record{recordWith(nil)}
	add := func(steps ...step) { versions = append(versions, recordWith(versions[len(versions)-1], steps...)) }
	for n := 1; ; n++ {
		f := versions[len(versions)-1].Progress.Fraction
		progress := func() {
			for range rapid.IntRange(0, 3).Draw(rt, "progress") {
				f += (1 - f) / 10
				add(fraction(f))
			}
		}
		if rapid.Bool().Draw(rt, "queued") {
			add(queued)
			progress()
		}
		if rapid.Bool().Draw(rt, "running") {
			add(running)
			progress()
		}
		if rapid.Bool().Draw(rt, "warned") {
			add(warned)
		}
		if n == 4 || rapid.Bool().Draw(rt, "ends") {
			add(at(rapid.SampledFrom([]Status{StatusSucceeded, StatusFailed, StatusCancelled}).Draw(rt, "end")))
			return versions
		}
		add(waits(n, time.Duration(n)))
		add(attempt(n + 1))
	}
}

// Whichever versions a follower misses, it is told the states of those that it sees, in an order that a job can have, one
// snapshot and one end; its progress never falls.
func TestEventsBetweenOfAnyVersions(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		versions := life(rt)
		last := versions[len(versions)-1]
		var first, told *Record
		var events []Event
		for i, v := range versions {
			if i < len(versions)-1 && rapid.Bool().Draw(rt, "missed") {
				continue
			}
			events = append(events, eventsBetween(told, v)...)
			if status := events[len(events)-1].Progress.Status; status != v.Progress.Status {
				rt.Fatalf("told %q of a record that is %q", status, v.Progress.Status)
			}
			if told = v; first == nil {
				first = v
			}
		}

		from := Progress{}
		warnings := 0
		for i, e := range events {
			switch {
			case (e.Kind == EventSnapshot) != (i == 0):
				rt.Fatalf("snapshots: %q", kindsOf(events))
			case e.Progress.Status.Terminal() != (i == len(events)-1) && e.Kind != EventSnapshot && e.Kind != EventWarning:
				rt.Fatalf("ends: %q", kindsOf(events))
			case e.Progress.Fraction < from.Fraction:
				rt.Fatalf("progress fell from %v to %v", from.Fraction, e.Progress.Fraction)
			case e.Kind == EventStarted && from.Status != StatusQueued, e.Kind == EventQueued && from.Status != StatusPending:
				rt.Fatalf("%q after %q", e.Kind, from.Status)
			case e.Kind == EventWarning:
				warnings++
			}
			from = e.Progress
		}
		if want := len(last.Warnings) - len(first.Warnings); warnings != want {
			rt.Fatalf("%d warnings told of %d", warnings, want)
		}
	})
}

// What a watch holds is bounded, whatever the receiver does.
func TestVersionQueueIsBounded(t *testing.T) {
	t.Parallel()
	q := newVersionQueue()
	v := recordWith(nil)
	for n := range 10_000 {
		v = recordWith(v, attempt(n+2), queued)
		q.put(v)
		v = recordWith(v, running)
		q.put(v)
	}
	v = recordWith(v, at(StatusSucceeded))
	q.put(v)
	q.put(recordWith(v, attempt(20_000), at(StatusPending)))
	versions := q.take()
	assert.LessOrEqual(t, len(versions), maxVersions)
	assert.Same(t, v, versions[len(versions)-1], "the end is kept: the watch ends there")
	assert.Empty(t, q.take())
}
