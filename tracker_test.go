package comfyui

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui/comfyuitest"
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

// Whoever has seen the end of a job finds it in Stats: the client follows it no more.
func TestStatsKnowTheEnd(t *testing.T) {
	t.Parallel()
	pod := comfyuitest.Start(t, comfyuitest.WithNode("Quick", comfyuitest.Node{Output: true}))
	c, err := NewPodClient(pod.URL())
	require.NoError(t, err)
	defer c.Close()
	for i := range 200 {
		w, err := ParseWorkflow(fmt.Appendf(nil, `{"1":{"class_type":"Quick","inputs":{"seed":%d}}}`, i))
		require.NoError(t, err)
		_, err = c.Execute(t.Context(), w)
		require.NoError(t, err)
		s := c.Stats()
		require.Equal(t, []any{0, 0, int64(i + 1)}, []any{s.Following, s.Owned, s.Succeeded}, "job %d", i)
	}
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

// answer is what a look was told of the queue.
type answer struct {
	read *queueRead
	err  error
	at   time.Time
}

// Looks share a read of the queue that begins after each of them, and what it says, an error too. One that does not wait any longer takes
// nothing from the others, and a read that hangs does not hang the next.
func TestQueueReads(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(t *testing.T, pod *comfyuitest.Pod, reads *queueReads, look func(context.Context, time.Duration) func() answer){
		"shared by those who asked before it began": func(t *testing.T, pod *comfyuitest.Pod, _ *queueReads, look func(context.Context, time.Duration) func() answer) {
			pod.Inject(comfyuitest.Fault{Route: "GET /queue", Effect: comfyuitest.Slow, Delay: 2 * time.Second, Times: 2})
			began := time.Now()
			first := look(t.Context(), 0)
			var rest []func() answer
			for i := range 20 {
				rest = append(rest, look(t.Context(), time.Duration(1+i)*50*time.Millisecond))
			}
			require.NoError(t, first().err)
			assert.EqualValues(t, 1, first().read.turn)
			assert.Equal(t, 2*time.Second, first().read.cost)
			for _, a := range rest {
				require.NoError(t, a().err)
				assert.EqualValues(t, 2, a().read.turn)
				assert.Equal(t, 5*time.Second, a().at.Sub(began), "the pod has a second for other things between the two")
			}
			assert.Equal(t, 2, pod.Requests("GET /queue"))
		},
		"an error reaches each": func(t *testing.T, pod *comfyuitest.Pod, _ *queueReads, look func(context.Context, time.Duration) func() answer) {
			pod.Inject(comfyuitest.Fault{Route: "GET /queue", Effect: comfyuitest.Slow, Delay: time.Second, Times: 1})
			first := look(t.Context(), 0)
			time.Sleep(time.Second / 2)
			pod.Inject(comfyuitest.Fault{Route: "GET /queue", Status: http.StatusBadGateway, Times: 1})
			var rest []func() answer
			for range 10 {
				rest = append(rest, look(t.Context(), 0))
			}
			require.NoError(t, first().err)
			for _, a := range rest {
				var e *Error
				require.ErrorAs(t, a().err, &e)
				assert.Equal(t, http.StatusBadGateway, e.StatusCode)
			}
			assert.Equal(t, 2, pod.Requests("GET /queue"))
		},
		"a ctx ends its own wait": func(t *testing.T, pod *comfyuitest.Pod, _ *queueReads, look func(context.Context, time.Duration) func() answer) {
			pod.Inject(comfyuitest.Fault{Route: "GET /queue", Effect: comfyuitest.Slow, Delay: 2 * time.Second, Times: -1})
			began := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			impatient := []func() answer{look(ctx, 0), look(ctx, time.Millisecond)} // each begins a read
			patient := look(t.Context(), 2*time.Millisecond)
			for _, a := range impatient {
				assert.Equal(t, CategoryContext, CategoryOf(a().err))
				require.ErrorIs(t, a().err, context.DeadlineExceeded)
				assert.Equal(t, time.Second, a().at.Sub(began))
			}
			require.NoError(t, patient().err)
			assert.EqualValues(t, 2, patient().read.turn)
			assert.Equal(t, 2, pod.Requests("GET /queue"))
		},
		"one hangs": func(t *testing.T, pod *comfyuitest.Pod, reads *queueReads, look func(context.Context, time.Duration) func() answer) {
			pod.Inject(comfyuitest.Fault{Route: "GET /queue", Effect: comfyuitest.Hang, Times: 1})
			began := time.Now()
			hung, next := look(t.Context(), 0), look(t.Context(), time.Millisecond)
			require.NoError(t, next().err)
			assert.Equal(t, hungRead, next().at.Sub(began).Truncate(time.Second))
			assert.Equal(t, CategoryTimeout, CategoryOf(hung().err))
			synctest.Wait()
			assert.Nil(t, reads.current)
			assert.Nil(t, reads.next)
		},
		"the client is closed": func(t *testing.T, pod *comfyuitest.Pod, reads *queueReads, look func(context.Context, time.Duration) func() answer) {
			pod.Inject(comfyuitest.Fault{Route: "GET /queue", Effect: comfyuitest.Hang, Times: -1})
			hung, next := look(t.Context(), 0), look(t.Context(), time.Second)
			time.Sleep(2 * time.Second)
			require.NoError(t, reads.t.client.Close())
			require.ErrorIs(t, hung().err, ErrClosed)
			require.ErrorIs(t, next().err, ErrClosed)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				pod := comfyuitest.NewPod(comfyuitest.WithPipes())
				defer pod.Close()
				c, err := NewPodClient(pod.URL(), WithHTTPClient(pod.Client()))
				require.NoError(t, err)
				defer func() { assert.NoError(t, c.Close()) }()
				tr, err := c.running("test", "")
				require.NoError(t, err)
				f(t, pod, tr.reads, func(ctx context.Context, at time.Duration) func() answer {
					told := make(chan answer, 1)
					tr.wg.Go(func() {
						time.Sleep(at)
						read, err := tr.reads.after(ctx)
						told <- answer{read, err, time.Now()}
					})
					return sync.OnceValue(func() answer { return <-told })
				})
			})
		})
	}
}
