package comfyui

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/comfypod/comfyui/internal/wire"
)

// HealthState says what a pod is good for now.
type HealthState string

const (
	HealthReady    HealthState = "ready"    // answers, and has nothing to do
	HealthBusy     HealthState = "busy"     // works, and has jobs; or accepts connections and has not answered for a moment
	HealthStarting HealthState = "starting" // refuses connections, or its proxy answers 404, 502, 503: never yet ready
	HealthDegraded HealthState = "degraded" // HTTP works, the stream does not: jobs are followed by polling
	HealthStalled  HealthState = "stalled"  // jobs wait and none runs, or one runs that never moves: the worker is dead
	HealthPoisoned HealthState = "poisoned" // a CUDA fault that only a restart clears
	HealthDown     HealthState = "down"     // does not answer, or not as a ComfyUI
)

// StreamState is the state of a client's WebSocket.
type StreamState string

const (
	StreamIdle       StreamState = "idle" // not needed: no job is followed
	StreamConnecting StreamState = "connecting"
	StreamUp         StreamState = "up"
	StreamDeaf       StreamState = "deaf" // connected, but the pod sends nothing there: issue 16010 of ComfyUI
	StreamDown       StreamState = "down"
)

// Health is a look at a pod.
type Health struct {
	Pod              string
	State            HealthState
	Version          string // of ComfyUI
	Devices          []Device
	Running, Pending int           // prompts of all clients
	Latency          time.Duration // of the cheapest call
	Stream           StreamState
	Reasons          []string // why State is what it is; for people
	CheckedAt        time.Time
}

const (
	// probeTime bounds the calls of one look. A pod can be silent for a minute and be fine; Health does not wait for that.
	probeTime = 10 * time.Second
	// idleWorker is how long prompts must have waited, with none running and the same one in front, to make a dead worker. A
	// worker takes the next prompt at once, but for a second and a half of collecting garbage.
	idleWorker = 3 * time.Second
	// stuckPrompt is how long one of our prompts may run without moving, strangePrompt how long anybody else's, of which
	// nothing is heard, while others wait.
	stuckPrompt   = 10 * time.Minute
	strangePrompt = time.Hour
	// frozenFor is how long a pod that was ready may leave calls without an answer before it is down.
	frozenFor = 2 * time.Minute
	// faultsSought is how many of the newest history entries are searched for a CUDA fault.
	faultsSought = 16
)

// Health looks at the pod: queue, version, devices, stream. An unreachable pod is a state, not an error; the error is only for a
// ctx that ended and for a closed client. It takes at most 13 seconds: ten for a silent pod, and three when jobs wait and none
// runs, because one look does not tell a dead worker. What cannot be seen from outside in one look (a prompt that never moves, a pod that has
// been ready before) is known from earlier looks and from the jobs that the client follows.
func (c *PodClient) Health(ctx context.Context) (Health, error) {
	h, _, err := c.checkHealth(ctx, "health")
	return h, err
}

// WaitReady waits until the pod can run jobs: nil at ready, busy or degraded. A pod that starts may take minutes; ctx bounds the
// wait. It returns at once when the credentials are refused: CategoryAuth. When ctx ends, the error tells the last state.
func (c *PodClient) WaitReady(ctx context.Context) error {
	const op = "wait ready"
	if err := c.usable(op); err != nil {
		return err
	}
	ctx, done := c.endpoint.bind(ctx)
	defer done()
	what := retryOp{
		op: op, patient: true,
		fixed: &RetryPolicy{
			MaxAttempts: math.MaxInt, InitialInterval: 500 * time.Millisecond, MaxInterval: 5 * time.Second, Multiplier: 1.5, Jitter: 0.2,
		},
		safe: func(err error) bool { return CategoryOf(err) != CategoryAuth },
	}
	return c.endpoint.retries.do(ctx, what, func(ctx context.Context, _ int) error {
		h, cause, err := c.checkHealth(ctx, op)
		if err != nil {
			return err
		}
		switch h.State {
		case HealthReady, HealthBusy, HealthDegraded:
			return nil
		}
		failed := &Error{Op: op, Pod: h.Pod, Category: CategoryUnavailable, Err: errors.New(string(h.State) + ": " + strings.Join(h.Reasons, "; "))}
		var e *Error
		if errors.As(cause, &e) {
			failed.Category, failed.StatusCode, failed.RetryAfter = e.Category, e.StatusCode, e.RetryAfter
			failed.Err = fmt.Errorf("%s: %w", h.State, e.Err)
		}
		return failed
	})
}

// watchHealth looks at the pod again and again until ctx ends, so that Hooks.Health is told without anybody asking. It does
// nothing without that hook.
func (c *PodClient) watchHealth(ctx context.Context) {
	if c.opts.hooks.Health == nil {
		return
	}
	for {
		h, _, err := c.checkHealth(ctx, "health")
		if err != nil {
			return
		}
		wait := 15 * time.Second
		if h.State != HealthReady && h.State != HealthBusy {
			wait = 5 * time.Second
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// checkHealth looks, judges, remembers, and tells Hooks.Health. cause: why the pod did not answer.
func (c *PodClient) checkHealth(ctx context.Context, op string) (h Health, cause, err error) {
	if err := c.usable(op); err != nil {
		return Health{Pod: c.Name(), State: HealthDown, Stream: StreamIdle}, nil, err
	}
	e := c.endpoint
	ctx, done := e.bind(ctx)
	defer done()
	o := c.observed()
	p := e.probe(ctx, o)
	if err := c.usable(op); err != nil { // ctx may learn of it a moment later
		return Health{Pod: c.Name(), State: HealthDown, Stream: o.stream}, nil, err
	}
	if ctx.Err() != nil {
		return Health{Pod: c.Name(), State: HealthDown, Stream: o.stream}, nil, e.retries.ended(ctx, retryOp{op: op}, nil)
	}
	h = judgeHealth(p, o, time.Now())
	h.Pod = c.Name()
	if o.poison != nil && p.faultSought && !p.fault {
		c.forgetPoison(o.poisonedAt)
	}
	e.health.judged(h, c.opts.hooks.Health)
	return h, p.err, nil
}

// observed is what following jobs has shown of the pod.
type observed struct {
	stream       StreamState
	everReady    bool                 // the pod has answered before
	poison       error                // a CUDA fault seen since the last sign of a restart
	poisonedAt   time.Time            //
	queueMovedAt time.Time            // when the pod's queue last changed
	stalledAt    time.Time            // when a job was given up because nothing moved; zero once anything has run since
	running      map[string]time.Time // our prompts that run, and when each last moved
}

// observed asks the tracker, if there is one.
func (c *PodClient) observed() observed {
	o := observed{stream: StreamIdle}
	c.mu.Lock()
	t := c.tracker
	c.mu.Unlock()
	if t == nil {
		return o
	}
	t.tell(func() {
		now := time.Now()
		o = observed{
			stream: t.pod.stream, everReady: !t.pod.contactAt.IsZero(), poison: t.pod.poison, poisonedAt: t.pod.poisonedAt,
			queueMovedAt: t.pod.movedAt, stalledAt: t.pod.stalledAt, running: map[string]time.Time{},
		}
		for _, j := range t.jobs {
			if j.lease != nil && j.rec.Started && !j.concluded {
				o.running[j.rec.PromptID] = t.stalledSince(j, now)
			}
		}
	})
	return o
}

// forgetPoison tells the tracker that the process with the fault is gone.
func (c *PodClient) forgetPoison(since time.Time) {
	c.mu.Lock()
	t := c.tracker
	c.mu.Unlock()
	if t == nil {
		return
	}
	t.tell(func() {
		if t.pod.poisonedAt.Equal(since) {
			t.pod.poison, t.pod.poisonedAt = nil, time.Time{}
		}
	})
}

// probe is what a look from outside has found.
type probe struct {
	err              error // of the cheapest calls; nil: they were answered
	latency          time.Duration
	running, pending []string // prompt ids, as they run
	version          string
	devices          []Device
	statsErr         error // of /system_stats, which asks the GPU
	faultSought      bool  // the history was searched for a CUDA fault
	fault            bool  // and has one: there was no restart since

	// From memory.
	ready      bool          // the pod has answered before
	degraded   bool          // the last verdict
	silentFor  time.Duration // since the first call without an answer
	waitingFor time.Duration // the same prompt was in front and none ran
	runningFor time.Duration // the same prompt was seen running
}

// runner is the prompt that runs; "": none.
func (p *probe) runner() string {
	if len(p.running) == 0 {
		return ""
	}
	return p.running[0]
}

// front is the prompt that waits in front while none runs; "": there is none.
func (p *probe) front() string {
	if len(p.running) > 0 || len(p.pending) == 0 {
		return ""
	}
	return p.pending[0]
}

// probe looks at the pod.
func (e *endpoint) probe(ctx context.Context, o observed) probe {
	ctx, cancel := within(ctx, probeTime+idleWorker)
	defer cancel()
	p := e.lookAtQueue(ctx)
	if p.err == nil && len(p.running) == 0 && len(p.pending) > 0 && p.waitingFor < idleWorker {
		timer := time.NewTimer(idleWorker - p.waitingFor)
		select {
		case <-timer.C:
			p = e.lookAtQueue(ctx)
		case <-ctx.Done():
			timer.Stop()
		}
	}
	if p.err != nil || ctx.Err() != nil {
		return p
	}
	stats, err := e.systemStats(ctx)
	p.version, p.devices, p.statsErr = stats.Version, devicesOf(stats.Devices), err
	if err != nil {
		e.mu.Lock()
		p.version = e.known
		e.mu.Unlock()
	}
	var failed *Error
	if o.poison != nil || errors.As(err, &failed) && failed.StatusCode >= 500 {
		p.fault, p.faultSought = e.faultInHistory(ctx)
	}
	return p
}

// within bounds a look: an end is the pod's silence, not the caller's.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, silence(d))
}

func (e *endpoint) lookAtQueue(ctx context.Context) probe {
	ctx, cancel := within(ctx, probeTime)
	defer cancel()
	var p probe
	turn := e.health.turn()
	start := time.Now()
	n, err := e.queueRemaining(ctx)
	p.latency = time.Since(start)
	if err == nil && n > 0 { // /queue carries all graphs
		var running, pending []wire.QueueItem
		running, pending, _, err = e.queue(ctx, false)
		p.running, p.pending = idsOf(running), idsOf(pending)
	}
	p.err = err
	if c := CategoryOf(err); c != CategoryContext && c != CategoryClosed { // they say nothing of the pod
		e.health.looked(&p, turn, time.Now())
	}
	return p
}

func idsOf(items []wire.QueueItem) []string {
	ids := make([]string, 0, len(items))
	for _, it := range items {
		ids = append(ids, it.PromptID)
	}
	return ids
}

// faultInHistory searches the newest entries for a fault that poisons the process. The history lives as long as the process.
func (e *endpoint) faultInHistory(ctx context.Context) (found, sought bool) {
	entries, err := e.newestHistory(ctx, faultsSought)
	if err != nil {
		return false, false
	}
	return slices.ContainsFunc(entries, func(h wire.HistoryEntry) bool {
		m := h.Terminal()
		if m == nil || m.Type != wire.ExecutionError {
			return false
		}
		_, x := classifyExecution(m.Failure)
		return poisonsPod(x)
	}), true
}

// healthMemory is what one look hands to the next.
type healthMemory struct {
	mu           sync.Mutex
	last         Health
	ready        bool
	turns        uint64    // looks that were begun
	lookedAt     time.Time // at the queue
	lookedTurn   uint64    // of that look
	silentSince  time.Time
	front        string // the prompt that waited in front while none ran
	waitingSince time.Time
	runner       string // the prompt that ran
	runningSince time.Time
	hook         *herald[[2]Health] // tells Hooks.Health; nil: nothing to tell yet
}

// answered notes that the pod has answered as a ComfyUI does.
func (m *healthMemory) answered() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ready = true
}

// turn is taken when a look begins.
func (m *healthMemory) turn() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.turns++
	return m.turns
}

// looked takes a look at the queue in, and adds what earlier ones say. Of looks at the same time the one that began last knows
// best: what an earlier one has seen may be out of date by now.
func (m *healthMemory) looked(p *probe, turn uint64, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.ready, p.degraded = m.ready, m.last.State == HealthDegraded
	if p.err != nil {
		if m.silentSince.IsZero() {
			m.silentSince = now
		}
		p.silentFor = now.Sub(m.silentSince)
		return
	}
	m.ready, m.silentSince = true, time.Time{}
	front, runner := p.front(), p.runner()
	if turn > m.lookedTurn {
		m.lookedTurn = turn
		if front == "" || front != m.front || now.Sub(m.lookedAt) > time.Minute { // much can have run meanwhile
			m.front, m.waitingSince = front, now
		}
		m.lookedAt = now
		if runner == "" || runner != m.runner {
			m.runner, m.runningSince = runner, now
		}
	}
	if front == m.front {
		p.waitingFor = now.Sub(m.waitingSince)
	}
	if runner == m.runner {
		p.runningFor = now.Sub(m.runningSince)
	}
}

// judged takes a verdict in and tells a change of state, in order.
func (m *healthMemory) judged(h Health, hook func(was, is Health)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	was := m.last
	m.last = h
	if hook == nil || was.State == "" || was.State == h.State {
		return
	}
	if m.hook == nil {
		m.hook = &herald[[2]Health]{f: func(change [2]Health) { hook(change[0], change[1]) }}
	}
	m.hook.tell([2]Health{was, h})
}

// judgeHealth decides. It is pure.
func judgeHealth(p probe, o observed, now time.Time) Health {
	h := Health{
		Version: p.version, Devices: p.devices, Running: len(p.running), Pending: len(p.pending), Latency: p.latency,
		Stream: o.stream, CheckedAt: now,
	}
	because := func(s HealthState, format string, args ...any) {
		if h.State == "" {
			h.State = s
		}
		h.Reasons = append(h.Reasons, fmt.Sprintf(format, args...))
	}
	if p.err != nil {
		judgeSilence(p, p.ready || o.everReady, because)
		return h
	}
	if o.poison != nil && (p.fault || !p.faultSought) {
		because(HealthPoisoned, "a CUDA fault %s ago; only a restart of the pod clears it: %v", now.Sub(o.poisonedAt).Round(time.Second), o.poison)
	} else if p.fault {
		because(HealthPoisoned, "the pod's history has a CUDA fault and the GPU does not answer; only a restart of the pod clears it")
	}
	judgeWorker(p, o, now, because)
	switch o.stream {
	case StreamDown, StreamDeaf:
		because(HealthDegraded, "the WebSocket is %s; jobs are followed by polling", o.stream)
	case StreamConnecting:
		if p.degraded {
			because(HealthDegraded, "the WebSocket is not up yet; jobs are followed by polling")
		}
	}
	if h.State == "" {
		h.State = HealthReady
		if h.Running+h.Pending > 0 {
			h.State = HealthBusy
		}
	}
	if p.statsErr != nil {
		h.Reasons = append(h.Reasons, fmt.Sprintf("/system_stats fails, which asks the GPU: %v", p.statsErr))
	}
	return h
}

// judgeSilence tells a pod that starts, one that is frozen for a moment, and one that is down.
func judgeSilence(p probe, ready bool, because func(HealthState, string, ...any)) {
	category := CategoryOf(p.err)
	switch {
	case category == CategoryAuth || category == CategoryProtocol || category == CategoryValidation:
		because(HealthDown, "the pod does not answer as a ComfyUI: %v", p.err)
	case category == CategoryOverloaded:
		because(HealthBusy, "too many requests: %v", p.err)
	case !ready:
		because(HealthStarting, "the pod has not answered yet: %v", p.err)
	case category == CategoryTimeout && !neverSent(p.err) && p.silentFor < frozenFor:
		because(HealthBusy, "the pod accepts connections and is silent; its event loop can be blocked for a while: %v", p.err)
	default:
		because(HealthDown, "the pod does not answer: %v", p.err)
	}
}

// judgeWorker looks for signs that nothing runs any more.
func judgeWorker(p probe, o observed, now time.Time, because func(HealthState, string, ...any)) {
	switch {
	case len(p.running) == 0 && len(p.pending) > 0 && p.waitingFor >= idleWorker:
		because(HealthStalled, "%d prompts wait and none has run for %s", len(p.pending), p.waitingFor.Round(time.Second))
		return
	case len(p.running) == 0 && !o.stalledAt.IsZero():
		because(HealthStalled, "a job was given up %s ago because nothing moved, and nothing has run since", now.Sub(o.stalledAt).Round(time.Second))
		return
	}
	for _, id := range p.running {
		moved, ours := o.running[id]
		still, limit := p.runningFor, strangePrompt
		if ours {
			still, limit = now.Sub(moved), stuckPrompt
		} else if since := now.Sub(o.queueMovedAt); !o.queueMovedAt.IsZero() && since < still {
			still = since
		}
		if still >= limit && (ours || len(p.pending) > 0) {
			because(HealthStalled, "prompt %s runs and has not moved for %s", id, still.Round(time.Second))
			return
		}
	}
}
