package comfyui

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

// A crew is never larger than its limit, does all that it is given in order, and is gone a moment after.
func TestCrew(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		pause time.Duration // before each task is given
	}{
		{"all at once", 0},
		{"one by one", time.Millisecond},
		{"as the goroutines leave", crewLinger},
		{"after they have left", 2 * crewLinger},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const limit, tasks = 3, 20
				tr := &tracker{ctx: t.Context()}
				c := newCrew(tr, limit, 0)
				var busy, most atomic.Int32
				var mu sync.Mutex
				var done, told []int
				for i := range tasks {
					time.Sleep(tt.pause)
					c.do(func(context.Context) func() {
						if n := busy.Add(1); n > most.Load() {
							most.Store(n)
						}
						defer busy.Add(-1)
						time.Sleep(10 * time.Millisecond)
						mu.Lock()
						defer mu.Unlock()
						done = append(done, i)
						return func() { told = append(told, i) }
					})
				}
				tr.wg.Wait()
				assert.Len(t, done, tasks)
				assert.ElementsMatch(t, done, told)
				assert.LessOrEqual(t, most.Load(), int32(limit))
				assert.Zero(t, c.workers)
				assert.Zero(t, c.waiting)
			})
		})
	}
}

// A crew at rest does not hold Close up.
func TestCrewEndsWithItsTracker(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		tr := &tracker{ctx: ctx}
		c := newCrew(tr, 2, 0)
		c.do(func(context.Context) func() { return nil })
		synctest.Wait()
		assert.Equal(t, 1, c.waiting)
		cancel()
		synctest.Wait()
		assert.Zero(t, c.workers)
	})
}

// A hook that hangs is kept the newest events, in bounded memory, and the logger is told of what it misses.
func TestHookThatHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var text bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&text, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
				return slog.Attr{}
			}
			return a
		}}))
		var hang chan struct{}
		var told []Event
		tr := &tracker{ctx: t.Context(), opts: &options{logger: logger, name: "gpu"}}
		tr.hook = newCallback(func(ev Event) {
			told = append(told, ev)
			<-hang
		})
		tr.hook.missed = tr.hookMissed
		push := func(evs ...Event) {
			tr.mu.Lock()
			defer tr.unlock()
			tr.hook.push(evs)
		}
		jobs := 0
		run := func(n int) { // each job has a state, and some have progress
			for i := range n {
				id := strconv.Itoa(jobs)
				jobs++
				push(Event{JobID: id, Kind: EventStarted})
				for step := range 3 {
					if i%100 != 0 && i < n-1 {
						break
					}
					push(Event{JobID: id, Kind: EventProgress, Progress: Progress{Step: float64(step)}})
				}
			}
		}
		const full = "msg=\"comfyui: Hooks.Event does not keep up: the oldest events are dropped\" kept=32768 dropped=1 pod=gpu\n"
		again := func(n int) string {
			return fmt.Sprintf("msg=\"comfyui: Hooks.Event takes events again, and has missed some\" dropped=%d pod=gpu\n", n)
		}
		for range 2 {
			hang = make(chan struct{})
			push(Event{JobID: "first", Kind: EventQueued})
			synctest.Wait()
			run(maxHeldEvents - maxQueuedEvents)
			assert.Equal(t, maxHeldEvents, len(tr.hook.q.events))
			assert.Empty(t, text.String(), "all is kept")
			run(1000)
			assert.Equal(t, maxHeldEvents, len(tr.hook.q.events))
			assert.Equal(t, full, text.String(), "told once")
			text.Reset()
			close(hang)
			synctest.Wait()
			assert.Equal(t, again(1000), text.String())
			text.Reset()
			assert.Equal(t, "first", told[0].JobID)
			var states []int
			for _, ev := range told[1:] {
				if id, err := strconv.Atoi(ev.JobID); assert.NoError(t, err) && ev.Kind == EventStarted {
					states = append(states, id)
				}
			}
			assert.True(t, slices.IsSorted(states))
			assert.Equal(t, []int{jobs - (maxHeldEvents - maxQueuedEvents), jobs - 1, maxHeldEvents - maxQueuedEvents},
				[]int{states[0], states[len(states)-1], len(states)}, "the newest")
			last := told[len(told)-1]
			assert.Equal(t, EventProgress, last.Kind)
			assert.Equal(t, 2., last.Progress.Step, "the newest of its progress")
			told = nil
		}
	})
}
