package comfyui

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui/comfyuitest"
)

func TestJudgeHealth(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	fault := &ExecutionError{NodeID: "3", ExceptionType: "torch.AcceleratorError", Message: "CUDA error: device-side assert triggered"}
	failed := func(c Category, status int) error {
		return &Error{Op: "queue length", Category: c, StatusCode: status, Err: errors.New("no")}
	}
	refused := &Error{Category: CategoryNetwork, Err: &unsent{errors.New("connection refused")}}
	silent := &Error{Category: CategoryTimeout, Err: silence(probeTime)}
	deaf := &Error{Category: CategoryTimeout, Err: &unsent{silence(probeTime)}}
	one, two := []string{"a"}, []string{"a", "b"}
	for _, test := range []struct {
		name   string
		p      probe
		o      observed
		want   HealthState
		reason string
	}{
		{"idle", probe{}, observed{stream: StreamIdle}, HealthReady, ""},
		{"idle, stream up", probe{}, observed{stream: StreamUp}, HealthReady, ""},
		{"idle, stream coming", probe{}, observed{stream: StreamConnecting}, HealthReady, ""},
		{"works", probe{running: one}, observed{stream: StreamUp}, HealthBusy, ""},
		{"works, others wait", probe{running: one, pending: two}, observed{}, HealthBusy, ""},
		{"just queued", probe{pending: one}, observed{}, HealthBusy, ""},

		{"refused, never ready", probe{err: refused}, observed{}, HealthStarting, "has not answered yet"},
		{"502, never ready", probe{err: failed(CategoryUnavailable, 502)}, observed{}, HealthStarting, ""},
		{"404, never ready", probe{err: failed(CategoryUnavailable, 404)}, observed{}, HealthStarting, ""},
		{"silent, never ready", probe{err: silent}, observed{}, HealthStarting, ""},
		{"refused, ready before", probe{err: refused, ready: true}, observed{}, HealthDown, "does not answer"},
		{"refused, a job ran before", probe{err: refused}, observed{everReady: true}, HealthDown, ""},
		{"502, ready before", probe{err: failed(CategoryUnavailable, 502), ready: true}, observed{}, HealthDown, ""},
		{"429", probe{err: failed(CategoryOverloaded, 429)}, observed{}, HealthBusy, "too many requests"},
		{"401", probe{err: failed(CategoryAuth, 401)}, observed{}, HealthDown, "as a ComfyUI"},
		{"no ComfyUI", probe{err: failed(CategoryProtocol, 200)}, observed{}, HealthDown, "as a ComfyUI"},
		{"frozen", probe{err: silent, ready: true, silentFor: time.Minute}, observed{}, HealthBusy, "event loop"},
		{"frozen for long", probe{err: silent, ready: true, silentFor: 3 * time.Minute}, observed{}, HealthDown, ""},
		{"no connection in time", probe{err: deaf, ready: true}, observed{}, HealthDown, ""},

		{"stream down", probe{}, observed{stream: StreamDown}, HealthDegraded, "WebSocket is down"},
		{"stream deaf, jobs run", probe{running: one}, observed{stream: StreamDeaf}, HealthDegraded, "deaf"},
		{"stream still coming", probe{degraded: true}, observed{stream: StreamConnecting}, HealthDegraded, "not up yet"},
		{"stream up again", probe{degraded: true}, observed{stream: StreamUp}, HealthReady, ""},

		{"dead worker", probe{pending: two, waitingFor: idleWorker}, observed{}, HealthStalled, "2 prompts wait and none has run for 3s"},
		{"collects garbage", probe{pending: two, waitingFor: idleWorker - 1}, observed{}, HealthBusy, ""},
		{"given up", probe{}, observed{stalledAt: ago(time.Minute)}, HealthStalled, "given up 1m0s ago"},
		{"given up, but something runs", probe{running: one}, observed{stalledAt: ago(time.Minute)}, HealthBusy, ""},
		{
			"ours stuck",
			probe{running: one, runningFor: time.Second},
			observed{running: map[string]time.Time{"a": ago(11 * time.Minute)}},
			HealthStalled, "has not moved for 11m0s",
		},
		{
			"ours slow",
			probe{running: one, runningFor: 5 * time.Hour},
			observed{running: map[string]time.Time{"a": ago(9 * time.Minute)}},
			HealthBusy, "",
		},
		{"a stranger's stuck", probe{running: one, pending: one, runningFor: time.Hour}, observed{}, HealthStalled, ""},
		{"a stranger's, nobody waits", probe{running: one, runningFor: 5 * time.Hour}, observed{}, HealthBusy, ""},
		{
			"a stranger's, the queue moved",
			probe{running: one, pending: one, runningFor: 5 * time.Hour},
			observed{queueMovedAt: ago(time.Minute)},
			HealthBusy, "",
		},

		{"poisoned", probe{}, observed{poison: fault, poisonedAt: ago(time.Minute)}, HealthPoisoned, "1m0s ago"},
		{"poisoned, its history says so", probe{faultSought: true, fault: true}, observed{poison: fault, poisonedAt: now}, HealthPoisoned, ""},
		{"restarted since", probe{faultSought: true}, observed{poison: fault, poisonedAt: now}, HealthReady, ""},
		{"poisoned by others", probe{statsErr: failed(CategoryProtocol, 500), faultSought: true, fault: true}, observed{}, HealthPoisoned, "/system_stats fails"},
		{"no stats", probe{statsErr: failed(CategoryProtocol, 500), faultSought: true}, observed{}, HealthReady, "/system_stats fails"},
		{
			"poisoned, stalled and deaf",
			probe{pending: one, waitingFor: time.Minute},
			observed{poison: fault, poisonedAt: now, stream: StreamDeaf},
			HealthPoisoned, "none has run",
		},
		{"stalled and deaf", probe{pending: one, waitingFor: time.Minute}, observed{stream: StreamDeaf}, HealthStalled, "deaf"},
	} {
		h := judgeHealth(test.p, test.o, now)
		assert.Equal(t, test.want, h.State, "%s: %v", test.name, h.Reasons)
		assert.Contains(t, strings.Join(h.Reasons, "\n"), test.reason, test.name)
		if test.reason == "" && (test.want == HealthReady || test.want == HealthBusy) {
			assert.Empty(t, h.Reasons, "%s: what is well needs no reason", test.name)
		} else {
			assert.NotEmpty(t, h.Reasons, test.name)
		}
		assert.Equal(t, len(test.p.running), h.Running)
		assert.Equal(t, len(test.p.pending), h.Pending)
		assert.Equal(t, test.o.stream, h.Stream)
		assert.Equal(t, now, h.CheckedAt)
	}
}

// podClient is a client of the simulated pod.
func podClient(t *testing.T, pod *comfyuitest.Pod, opts ...Option) *PodClient {
	t.Helper()
	c, err := NewPodClient(pod.URL(), append([]Option{WithHTTPClient(pod.Client())}, opts...)...)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

func workflowOf(t *testing.T, class string) *Workflow {
	t.Helper()
	w, err := ParseWorkflow(fmt.Appendf(nil, `{"1":{"class_type":%q,"inputs":{"seed":%d}}}`, class, seeds.Add(1)))
	require.NoError(t, err)
	return w
}

var seeds atomic.Int64 // makes every workflow new to the cache

func TestHealthOfAPod(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(comfyuitest.WithPipes(), comfyuitest.WithVersion("0.27.0"),
			comfyuitest.WithNode("Slow", comfyuitest.Steps(10, 10*time.Second)))
		defer pod.Close()
		c := podClient(t, pod)
		ctx := t.Context()
		require.NoError(t, c.WaitReady(ctx))
		h, err := c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthReady, h.State, "%v", h.Reasons)
		assert.Equal(t, "0.27.0", h.Version)
		assert.NotEmpty(t, h.Devices)
		assert.Equal(t, c.Name(), h.Pod)
		assert.Equal(t, StreamIdle, h.Stream)
		assert.Empty(t, h.Reasons)
		assert.Equal(t, 2, pod.Requests("GET /prompt"))
		assert.Zero(t, pod.Requests("GET /queue"), "an empty queue is not read")

		first, err := c.Submit(ctx, workflowOf(t, "Slow"))
		require.NoError(t, err)
		second, err := c.Submit(ctx, workflowOf(t, "Slow"))
		require.NoError(t, err)
		time.Sleep(time.Second)
		h, err = c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthBusy, h.State, "%v", h.Reasons)
		assert.Equal(t, 1, h.Running)
		assert.Equal(t, 1, h.Pending)
		assert.Equal(t, StreamUp, h.Stream)
		require.NoError(t, c.WaitReady(ctx), "busy is ready enough")
		for _, j := range []*Job{first, second} {
			_, err = j.Wait(ctx)
			require.NoError(t, err)
		}
	})
}

// Of two looks at once, that of the monitor for one, the one that began first can be answered last.
func TestHealthTakesNoOldLookForNew(t *testing.T) {
	t.Parallel()
	var m healthMemory
	start := time.Now()
	looked := func(turn uint64, at time.Duration, pending ...string) probe {
		p := probe{pending: pending}
		m.looked(&p, turn, start.Add(at))
		return p
	}
	older, newer := m.turn(), m.turn()
	assert.Zero(t, looked(newer, 0, "a").waitingFor)
	assert.Zero(t, looked(older, 0).waitingFor)
	assert.Equal(t, idleWorker, looked(m.turn(), idleWorker, "a").waitingFor, "the older look has hidden the newer one")

	older = m.turn()
	looked(m.turn(), 2*idleWorker)
	assert.Zero(t, looked(older, time.Minute, "a").waitingFor, "it waited when that look began, and does no more")
}

func TestHealthOfADeadWorker(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(comfyuitest.WithPipes(), comfyuitest.WithNode("Slow", comfyuitest.Steps(1, 0)))
		defer pod.Close()
		changes := make(chan Health, 10)
		c := podClient(t, pod, WithHooks(Hooks{Health: func(was, is Health) {
			assert.NotEqual(t, was.State, is.State)
			changes <- is
		}}))
		ctx := t.Context()
		require.NoError(t, c.WaitReady(ctx))
		pod.KillWorker()
		_, err := c.Submit(ctx, workflowOf(t, "Slow"))
		require.NoError(t, err)
		start := time.Now()
		h, err := c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthStalled, h.State)
		assert.LessOrEqual(t, time.Since(start), idleWorker+time.Second)
		start = time.Now()
		h, err = c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthStalled, h.State)
		assert.Less(t, time.Since(start), time.Second, "the look before counts")
		synctest.Wait()
		require.Len(t, changes, 1)
		assert.Equal(t, HealthStalled, (<-changes).State)

		waiting, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		err = c.WaitReady(waiting)
		assert.Equal(t, CategoryContext, CategoryOf(err))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "stalled", "the last state is told")

		pod.Restart(0)
		require.NoError(t, c.WaitReady(ctx))
	})
}

func TestHealthOfAPoisonedPod(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(comfyuitest.WithPipes(),
			comfyuitest.WithNode("Fault", comfyuitest.Fail("torch.AcceleratorError", "CUDA error: an illegal memory access was encountered")),
			comfyuitest.WithNode("Fine", comfyuitest.Steps(1, 0)))
		defer pod.Close()
		c := podClient(t, pod)
		ctx := t.Context()
		_, err := c.Execute(ctx, workflowOf(t, "Fault"))
		assert.Equal(t, CategoryPodFault, CategoryOf(err))
		h, err := c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthPoisoned, h.State, "%v", h.Reasons)
		_, err = c.Execute(ctx, workflowOf(t, "Fine"))
		require.NoError(t, err)
		h, err = c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthPoisoned, h.State, "what needs no GPU still runs")

		// A process that knows nothing, when the GPU does not answer.
		remove := pod.Inject(comfyuitest.Fault{Route: "GET /system_stats", Times: -1, Effect: comfyuitest.Answer, Status: 500, Body: "500 Internal Server Error"})
		fresh := podClient(t, pod)
		h, err = fresh.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthPoisoned, h.State, "%v", h.Reasons)
		remove()

		time.Sleep(time.Hour) // the stream is let go; nobody would hear of the restart
		pod.Restart(0)
		h, err = c.Health(ctx)
		require.NoError(t, err)
		assert.Contains(t, []HealthState{HealthReady, HealthDegraded}, h.State, "%v", h.Reasons)
		history := pod.Requests("GET /history")
		_, err = c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, history, pod.Requests("GET /history"), "and it is forgotten")
	})
}

func TestHealthOfAPodThatStarts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(comfyuitest.WithPipes())
		defer pod.Close()
		var states []HealthState
		var mu sync.Mutex
		var told []RetryInfo
		c := podClient(t, pod, WithHooks(Hooks{
			Health: func(_, is Health) {
				mu.Lock()
				defer mu.Unlock()
				states = append(states, is.State)
			},
			Retry: func(r RetryInfo) {
				mu.Lock()
				defer mu.Unlock()
				told = append(told, r)
			},
		}))
		ctx := t.Context()
		pod.Restart(3 * time.Minute)
		h, err := c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthStarting, h.State, "%v", h.Reasons)
		start := time.Now()
		require.NoError(t, c.WaitReady(ctx))
		assert.InDelta(t, 180, time.Since(start).Seconds(), 6)

		pod.Restart(time.Minute)
		h, err = c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthDown, h.State, "it has been ready")
		require.NoError(t, c.WaitReady(ctx))
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		assert.Equal(t, []HealthState{HealthReady, HealthDown, HealthReady}, states)
		assert.Greater(t, len(told), 30)
		assert.Less(t, len(told), 100, "no tight loop")
		assert.Equal(t, "wait ready", told[0].Op)
	})
}

func TestHealthOfAPodBehindAProxy(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		status int
		want   HealthState
	}{{404, HealthStarting}, {502, HealthStarting}, {503, HealthStarting}, {524, HealthStarting}, {401, HealthDown}, {403, HealthDown}, {200, HealthDown}} {
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(test.status) })
		h, err := c.Health(t.Context())
		require.NoError(t, err)
		assert.Equal(t, test.want, h.State, "%d: %v", test.status, h.Reasons)
		assert.Len(t, h.Reasons, 1)
	}
}

func TestWaitReadyReturnsAtOnceOnAuth(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.WriteHeader(http.StatusUnauthorized)
	})
	err := c.WaitReady(t.Context())
	var e *Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, CategoryAuth, e.Category)
	assert.Equal(t, http.StatusUnauthorized, e.StatusCode)
	assert.EqualValues(t, 1, asked.Load())
}

func TestWaitReadyEndsWithTheClient(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, _ := servePipes(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
		time.AfterFunc(10*time.Second, c.endpoint.close)
		require.ErrorIs(t, c.WaitReady(t.Context()), ErrClosed)
		require.ErrorIs(t, c.WaitReady(t.Context()), ErrClosed)
		h, err := c.Health(t.Context())
		require.ErrorIs(t, err, ErrClosed)
		assert.Equal(t, HealthDown, h.State)
		require.ErrorIs(t, (&PodClient{}).WaitReady(t.Context()), ErrClosed)
		_, err = (&PodClient{}).Health(t.Context())
		require.ErrorIs(t, err, ErrClosed)
	})
}

// S24, as Health sees it: frozen is busy, not dead, and nobody waits a minute to hear it.
func TestS24FrozenPodIsBusy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(comfyuitest.WithPipes())
		defer pod.Close()
		c := podClient(t, pod)
		ctx := t.Context()
		require.NoError(t, c.WaitReady(ctx))
		thaw := pod.Freeze()
		start := time.Now()
		h, err := c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthBusy, h.State, "%v", h.Reasons)
		assert.Equal(t, probeTime, time.Since(start))
		require.NoError(t, c.WaitReady(ctx))
		time.Sleep(2 * time.Minute)
		h, err = c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthDown, h.State)
		thaw()
		h, err = c.Health(ctx)
		require.NoError(t, err)
		assert.Equal(t, HealthReady, h.State)

		thaw = pod.Freeze()
		defer thaw()
		ended, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = c.Health(ended)
		assert.Equal(t, CategoryContext, CategoryOf(err))
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

func TestHealthWithoutAStream(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(comfyuitest.WithPipes(), comfyuitest.WithNode("Slow", comfyuitest.Steps(100, time.Second)))
		defer pod.Close()
		pod.RefuseStreams(http.StatusForbidden)
		c := podClient(t, pod)
		ctx := t.Context()
		j, err := c.Submit(ctx, workflowOf(t, "Slow"))
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		for range 20 {
			h, err := c.Health(ctx)
			require.NoError(t, err)
			assert.Equal(t, HealthDegraded, h.State, "%v", h.Reasons)
			time.Sleep(700 * time.Millisecond)
		}
		require.NoError(t, c.WaitReady(ctx), "degraded runs jobs")
		require.NoError(t, j.Cancel(ctx))
	})
}

func TestWatchHealthTellsChanges(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(comfyuitest.WithPipes())
		defer pod.Close()
		var mu sync.Mutex
		var changes []string
		c := podClient(t, pod, WithHooks(Hooks{Health: func(was, is Health) {
			mu.Lock()
			defer mu.Unlock()
			changes = append(changes, string(was.State)+">"+string(is.State))
		}}))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); c.watchHealth(ctx) }()
		time.Sleep(time.Minute)
		pod.Restart(time.Minute)
		time.Sleep(2 * time.Minute)
		cancel()
		<-done
		mu.Lock()
		defer mu.Unlock()
		assert.Equal(t, []string{"ready>down", "down>ready"}, changes)
		assert.Less(t, pod.Requests("GET /prompt"), 30)

		silent := podClient(t, pod)
		before := pod.Requests("")
		silent.watchHealth(t.Context()) // returns at once: nobody is to be told
		assert.Equal(t, before, pod.Requests(""))
	})
}
