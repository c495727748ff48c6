package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/comfypod/comfyui"
)

var watchCases = []testCase{
	{"Watch/a snapshot first, each state, and the end after the terminal event", watch(func(f *fixture, w comfyui.Watcher) {
		r := newRecord("job", "a")
		withStatus(comfyui.StatusPending)(r)
		r.Accepted, r.NextAttempt, r.Progress.Fraction = false, time.Time{}, 0
		r, err := f.store.Create(f.ctx, r, long)
		f.must(err)
		events := f.follow(w, "job")
		events.want(comfyui.EventSnapshot, comfyui.StatusPending)

		r = f.update(next(r, func(r *comfyui.Record) { withStatus(comfyui.StatusQueued)(r); r.Accepted = true }))
		events.want(comfyui.EventQueued, comfyui.StatusQueued)
		r = f.update(next(r, func(r *comfyui.Record) { withStatus(comfyui.StatusRunning)(r); r.Started = true }))
		events.want(comfyui.EventStarted, comfyui.StatusRunning)
		r = f.update(next(r, func(r *comfyui.Record) { r.Progress.Fraction, r.Progress.Node = 0.5, "9" }))
		e := events.want(comfyui.EventProgress, comfyui.StatusRunning)
		if e.Progress != r.Progress || e.JobID != "job" || e.PromptID != r.PromptID || e.Attempt != 1 || e.Source != comfyui.SourceStore || e.Time.IsZero() {
			f.Fatalf("event %+v of record %+v", e, r)
		}
		r = f.update(next(r, func(r *comfyui.Record) {
			r.Warnings = append(r.Warnings, &comfyui.Error{Op: "run", Category: comfyui.CategoryExecution, Err: errors.New("node 9 blocked")})
		}))
		if e := events.want(comfyui.EventWarning, comfyui.StatusRunning); comfyui.CategoryOf(e.Err) != comfyui.CategoryExecution {
			f.Fatalf("the event of the warning has the error %v, want the record's", e.Err)
		}
		r = f.end(r, comfyui.StatusSucceeded)
		e = events.want(comfyui.EventSucceeded, comfyui.StatusSucceeded)
		got, err := json.Marshal(e.Outputs)
		f.must(err)
		want, err := json.Marshal(r.Outputs)
		f.must(err)
		if string(got) != string(want) || !e.Time.Equal(r.FinishedAt) {
			f.Fatalf("outputs %s at %v, want %s at %v", got, e.Time, want, r.FinishedAt)
		}
		events.wantEnd()
	})},
	{"Watch/of an ended job", watch(func(f *fixture, w comfyui.Watcher) {
		for _, s := range []comfyui.Status{comfyui.StatusFailed, comfyui.StatusCancelled} {
			id := string(s)
			f.update(next(f.create(id, "a", long), func(r *comfyui.Record) {
				withStatus(s)(r)
				r.Failure = &comfyui.Error{Op: "run", JobID: id, Category: comfyui.CategoryOutOfMemory, Err: errors.New("no memory")}
			}))
			for range 2 {
				events := f.follow(w, id)
				events.want(comfyui.EventSnapshot, s)
				if e := events.want(comfyui.EventKind(s), s); comfyui.CategoryOf(e.Err) != comfyui.CategoryOutOfMemory {
					f.Fatalf("the event of the end has the error %v, want the record's failure", e.Err)
				}
				events.wantEnd()
			}
		}
	})},
	{"Watch/absent", watch(func(f *fixture, w comfyui.Watcher) {
		n := 0
		for _, err := range w.Watch(f.bounded(), "none") {
			f.wantError(err, comfyui.ErrJobNotFound)
			n++
		}
		if n != 1 {
			f.Fatalf("%d elements, want one error", n)
		}
	})},
	{"Watch/a new attempt is told with its cause", watch(func(f *fixture, w comfyui.Watcher) {
		r := f.create("job", "a", long)
		r = f.update(next(r, func(r *comfyui.Record) { withStatus(comfyui.StatusRunning)(r); r.Started = true }))
		events := f.follow(w, "job")
		events.want(comfyui.EventSnapshot, comfyui.StatusRunning)
		r = f.update(next(r, func(r *comfyui.Record) {
			withStatus(comfyui.StatusPending)(r)
			r.Accepted, r.Started = false, false
			r.NextAttempt = r.NextAttempt.Add(time.Minute)
			r.Failure = &comfyui.Error{Op: "follow", Category: comfyui.CategoryLost, Err: errors.New("the pod restarted")}
		}))
		if e := events.want(comfyui.EventRetrying, comfyui.StatusPending); comfyui.CategoryOf(e.Err) != comfyui.CategoryLost {
			f.Fatalf("the event of the new attempt has the error %v, want its cause", e.Err)
		}
		r = f.update(next(r, func(r *comfyui.Record) {
			withStatus(comfyui.StatusQueued)(r)
			r.Attempt, r.PromptID, r.Accepted, r.Failure, r.NextAttempt = 2, "prompt-2", true, nil, time.Time{}
		}))
		if e := events.want(comfyui.EventQueued, comfyui.StatusQueued); e.Attempt != 2 || e.PromptID != "prompt-2" {
			f.Fatalf("event %+v", e)
		}
		f.end(r, comfyui.StatusSucceeded)
		events.want(comfyui.EventStarted, comfyui.StatusRunning)
		events.want(comfyui.EventSucceeded, comfyui.StatusSucceeded)
		events.wantEnd()
	})},
	{"Watch/states are never skipped for one who does not come, progress is the newest", watch(func(f *fixture, w comfyui.Watcher) {
		r := newRecord("job", "a")
		withStatus(comfyui.StatusPending)(r)
		r.Accepted, r.NextAttempt = false, time.Time{}
		r, err := f.store.Create(f.ctx, r, long)
		f.must(err)
		slow, prompt := f.follow(w, "job"), f.follow(w, "job")
		slow.want(comfyui.EventSnapshot, comfyui.StatusPending)
		prompt.want(comfyui.EventSnapshot, comfyui.StatusPending)

		r = f.update(next(r, func(r *comfyui.Record) { withStatus(comfyui.StatusQueued)(r); r.Accepted = true }))
		prompt.want(comfyui.EventQueued, comfyui.StatusQueued)
		r = f.update(next(r, func(r *comfyui.Record) { withStatus(comfyui.StatusRunning)(r); r.Started = true }))
		prompt.want(comfyui.EventStarted, comfyui.StatusRunning)
		for i := range 1000 {
			r = f.update(next(r, func(r *comfyui.Record) { r.Progress.Fraction = float64(i+1) / 1000 }))
		}
		for {
			if e := prompt.want(comfyui.EventProgress, comfyui.StatusRunning); e.Progress.Fraction == 1 {
				break
			}
		}

		var kinds []comfyui.EventKind
		for {
			e := slow.next("the newest progress")
			if !slices.Contains(kinds, e.Kind) {
				kinds = append(kinds, e.Kind)
			}
			if e.Progress.Fraction == 1 {
				break
			}
		}
		// The start may itself bring the newest progress.
		if !slices.Equal(kinds, []comfyui.EventKind{comfyui.EventQueued, comfyui.EventStarted}) &&
			!slices.Equal(kinds, []comfyui.EventKind{comfyui.EventQueued, comfyui.EventStarted, comfyui.EventProgress}) {
			f.Fatalf("events %q", kinds)
		}
		if n := slow.told; n > 20 {
			f.Fatalf("%d events told to one who did not come: progress must be merged", n)
		}
		f.end(r, comfyui.StatusSucceeded)
		for _, events := range []*watching{slow, prompt} {
			events.want(comfyui.EventSucceeded, comfyui.StatusSucceeded)
			events.wantEnd()
		}
	})},
	{"Watch/what a record jumped over is told", watch(func(f *fixture, w comfyui.Watcher) {
		r := newRecord("job", "a")
		withStatus(comfyui.StatusPending)(r)
		r.Accepted, r.NextAttempt = false, time.Time{}
		r, err := f.store.Create(f.ctx, r, long)
		f.must(err)
		events := f.follow(w, "job")
		events.want(comfyui.EventSnapshot, comfyui.StatusPending)
		f.end(r, comfyui.StatusSucceeded)
		events.want(comfyui.EventQueued, comfyui.StatusQueued)
		events.want(comfyui.EventStarted, comfyui.StatusRunning)
		events.want(comfyui.EventSucceeded, comfyui.StatusSucceeded)
		events.wantEnd()
	})},
	{"Watch/ends with its ctx", watch(func(f *fixture, w comfyui.Watcher) {
		f.create("job", "a", long)
		ctx, cancel := context.WithCancel(f.bounded())
		defer cancel()
		n := 0
		for e, err := range w.Watch(ctx, "job") {
			switch n++; n {
			case 1:
				f.must(err)
				if e.Kind != comfyui.EventSnapshot {
					f.Fatalf("event %q, want a snapshot", e.Kind)
				}
				cancel()
			default:
				f.wantError(err, context.Canceled)
			}
		}
		if n != 2 {
			f.Fatalf("%d elements, want a snapshot and the error", n)
		}
	})},
	{"Watch/many at once, in one order, to the end", watch(func(f *fixture, w comfyui.Watcher) {
		r := newRecord("job", "a")
		withStatus(comfyui.StatusPending)(r)
		r.Accepted, r.NextAttempt, r.Progress.Fraction = false, time.Time{}, 0
		r, err := f.store.Create(f.ctx, r, long)
		f.must(err)
		ctx, cancel := context.WithCancel(f.bounded())
		var watchers sync.WaitGroup
		defer watchers.Wait() // also when an update fails: they may not report after the case
		defer cancel()
		for range 8 {
			watchers.Go(func() {
				var last comfyui.Event
				for e, err := range w.Watch(ctx, "job") {
					if errors.Is(ctx.Err(), context.Canceled) || !perform(f, err) {
						return
					}
					if e.Progress.Fraction < last.Progress.Fraction {
						f.Errorf("progress fell from %v to %v", last.Progress.Fraction, e.Progress.Fraction)
					}
					last = e
				}
				if last.Kind != comfyui.EventSucceeded {
					f.Errorf("the last event is %q", last.Kind)
				}
			})
		}
		for i := range 100 {
			r = f.update(next(r, func(r *comfyui.Record) {
				withStatus(comfyui.StatusRunning)(r)
				r.Progress.Fraction = float64(i+1) / 100
			}))
		}
		f.end(r, comfyui.StatusSucceeded)
		watchers.Wait()
	})},
}

// watch skips the case for a store that is no Watcher.
func watch(run func(f *fixture, w comfyui.Watcher)) func(f *fixture) {
	return func(f *fixture) {
		const none = "the store is no comfyui.Watcher"
		switch {
		case f.watcher != nil:
			run(f, f.watcher)
		case inBubble(f.T):
			f.Log(none)
		default:
			f.Skip(none)
		}
	}
}

// watching pulls the events of one watch.
type watching struct {
	f    *fixture
	pull func() (comfyui.Event, error, bool)
	told int
}

func (f *fixture) follow(w comfyui.Watcher, jobID string) *watching {
	pull, stop := iter.Pull2(w.Watch(f.bounded(), jobID))
	f.Cleanup(stop)
	return &watching{f: f, pull: pull}
}

func (w *watching) next(wanted string) comfyui.Event {
	w.f.Helper()
	e, err, ok := w.pull()
	switch {
	case !ok:
		w.f.Fatalf("the watch has ended, want %s", wanted)
	case err != nil:
		w.f.Fatalf("unexpected error: %v, want %s", err, wanted)
	}
	w.told++
	return e
}

func (w *watching) want(kind comfyui.EventKind, status comfyui.Status) comfyui.Event {
	w.f.Helper()
	e := w.next(fmt.Sprintf("event %q", kind))
	if e.Kind != kind || e.Progress.Status != status {
		w.f.Fatalf("event %q with status %q, want %q with %q (%s)", e.Kind, e.Progress.Status, kind, status, fmt.Sprintf("%+v", e))
	}
	return e
}

func (w *watching) wantEnd() {
	w.f.Helper()
	if e, err, ok := w.pull(); ok {
		w.f.Fatalf("the watch goes on with %+v, %v", e, err)
	}
}
