package comfyui_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/png"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

// process is a client that can die without a word, or be stopped and go on, like a process that gets SIGKILL or SIGSTOP: none of
// its calls reaches the store or the pod any more.
type process struct {
	*comfyui.PodClient
	trigger func(event string) bool // asked at every event; true: die here

	mu    sync.Mutex
	gate  chan struct{} // closed while the process runs
	over  chan struct{} // closed with the test
	dead  bool
	conns map[net.Conn]struct{}
}

var errDead = errors.New("the process is dead")

// process starts one. Its events are "store before Update" and "store after Update", with every method of the store, and "pod
// before POST /prompt", "pod after POST /prompt" (some of its bytes are out) and "pod answers POST /prompt" (nobody has read the
// answer), with every request.
func (b *bench) process(store comfyui.Store, trigger func(event string) bool, opts ...comfyui.Option) *process {
	b.t.Helper()
	p := &process{trigger: trigger, gate: make(chan struct{}), over: make(chan struct{}), conns: map[net.Conn]struct{}{}}
	close(p.gate)
	transport := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		if err := p.pass(ctx); err != nil {
			return nil, err
		}
		conn, err := b.pod.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return p.own(conn), nil
	}}
	p.PodClient = b.client(append([]comfyui.Option{
		comfyui.WithHTTPClient(&http.Client{Transport: transport}),
		comfyui.WithStore(storetest.Flaky(store, p.storeCall)),
	}, opts...)...)
	b.t.Cleanup(func() {
		close(p.over)
		transport.CloseIdleConnections()
	})
	return p
}

// pass blocks while the process is stopped, and for ever once it is dead.
func (p *process) pass(ctx context.Context) error {
	p.mu.Lock()
	gate := p.gate
	p.mu.Unlock()
	select {
	case <-gate:
		return ctx.Err()
	default:
	}
	select {
	case <-gate:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	case <-p.over:
		return errDead
	}
}

func (p *process) happens(event string) {
	if p.trigger != nil && p.trigger(event) {
		p.kill()
	}
}

func (p *process) storeCall(ctx context.Context, method string) (err error, after bool) {
	p.happens("store before " + method)
	if err := p.pass(ctx); err != nil {
		return err, false
	}
	p.happens("store after " + method)
	if p.isDead() {
		return errDead, true
	}
	return nil, false
}

func (p *process) isDead() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead {
		return
	}
	p.dead = true
	p.gate = make(chan struct{})
	for conn := range p.conns { // the kernel sends what it has, and closes
		_ = conn.Close()
	}
}

// stop and cont are SIGSTOP and SIGCONT.
func (p *process) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gate = make(chan struct{})
}

func (p *process) cont() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.gate)
}

func (p *process) own(conn net.Conn) net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[conn] = struct{}{}
	return &processConn{Conn: conn, p: p, ended: make(chan struct{})}
}

type processConn struct {
	net.Conn
	p     *process
	asked atomic.Value // string: the request whose answer is awaited; "" for none
	once  sync.Once
	ended chan struct{}
}

func (c *processConn) Write(b []byte) (int, error) {
	request := ""
	for _, method := range []string{"POST", "GET"} {
		if path, ok := bytes.CutPrefix(b, []byte(method+" ")); ok {
			path, _, _ = bytes.Cut(path, []byte(" "))
			request = method + " " + string(path)
		}
	}
	if request != "" {
		c.asked.Store(request)
		c.p.happens("pod before " + request)
	}
	if err := c.wait(); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(b)
	if request != "" && err == nil {
		c.p.happens("pod after " + request)
	}
	return n, err
}

func (c *processConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if request, _ := c.asked.Swap("").(string); request != "" && n > 0 {
		c.p.happens("pod answers " + request)
	}
	if werr := c.wait(); werr != nil {
		return 0, werr
	}
	return n, err
}

func (c *processConn) wait() error {
	c.p.mu.Lock()
	gate, dead := c.p.gate, c.p.dead
	c.p.mu.Unlock()
	if dead {
		return errDead
	}
	select {
	case <-gate:
		return nil
	case <-c.ended:
		return net.ErrClosed
	case <-c.p.over:
		return errDead
	}
}

func (c *processConn) Close() error {
	c.once.Do(func() { close(c.ended) })
	c.p.mu.Lock()
	delete(c.p.conns, c.Conn)
	c.p.mu.Unlock()
	return c.Conn.Close()
}

// nth is a trigger for the n-th event of those that begin with a prefix.
func nth(n int64, prefix string) func(string) bool {
	var seen atomic.Int64
	return func(event string) bool {
		return len(event) >= len(prefix) && event[:len(prefix)] == prefix && seen.Add(1) == n
	}
}

// recoverAll is what a worker does at its start; it returns when each job has ended.
func recoverAll(b *bench, c *comfyui.PodClient) map[string]*comfyui.Result {
	b.t.Helper()
	var jobs []*comfyui.Job
	for j, err := range c.Recover(b.ctx) {
		require.NoError(b.t, err)
		jobs = append(jobs, j)
	}
	results := map[string]*comfyui.Result{}
	for _, j := range jobs {
		r, err := j.Wait(b.ctx)
		require.NotNil(b.t, r, "job %s: %v", j.ID(), err)
		results[j.ID()] = r
	}
	return results
}

// failsFirst runs out of memory once, and then takes two seconds.
func failsFirst() comfyuitest.Node {
	var failed atomic.Bool
	return comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
		if !failed.Swap(true) {
			return &comfyuitest.NodeError{ExceptionType: "torch.OutOfMemoryError", Message: "Allocation on device"}
		}
		select {
		case <-time.After(2 * time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
		c.Save("images", "output", "late.png", []byte("png"))
		return nil
	}}
}

// background executes a job for a process that is not going to see its end.
func background(b *bench, p *process, w *comfyui.Workflow, opts ...comfyui.JobOption) {
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(b.ctx)
	wg.Go(func() { _, _ = p.Execute(ctx, w, opts...) })
	b.t.Cleanup(func() { cancel(); wg.Wait() })
}

// The process is killed before and after each of its calls to the store and to the pod, in turn, until it gets through.
func TestS34KilledAtEveryStep(t *testing.T) {
	t.Parallel()
	for _, class := range []string{"Work", "Memory"} {
		for _, site := range []string{"store before", "store after", "pod before", "pod after", "pod answers"} {
			t.Run(class+"/"+site, func(t *testing.T) {
				t.Parallel()
				reached := int64(0)
				for n := int64(1); n < 100; n++ {
					through := false
					bubble(t, func(b *bench) {
						store := comfyui.NewMemoryStore()
						p := b.process(store, nth(n, site))
						background(b, p, graphOf(t, class, 1), comfyui.WithJobID("the-job"))
						time.Sleep(20 * time.Second)
						through = !p.isDead()

						heir := b.client(comfyui.WithStore(store))
						recovered := recoverAll(b, heir)
						r, err := heir.Execute(b.ctx, graphOf(t, class, 1), comfyui.WithJobID("the-job"))
						succeeded(t, r, err)
						if was := recovered["the-job"]; was != nil {
							assert.Equal(t, r.PromptID, was.PromptID)
							assert.Equal(t, r.FinishedAt, was.FinishedAt)
						}
						prompts := b.pod.Prompts()
						attempts := map[string]int{"Work": 1, "Memory": 2}[class]
						require.Len(t, prompts, attempts)
						assert.Equal(t, attempts, r.Attempt)
						for _, p := range prompts {
							assert.Equal(t, 1, p.Posts, "posts")
							assert.Equal(t, 1, p.Runs, "runs")
						}
					}, comfyuitest.WithNode("Memory", failsFirst()))
					if t.Failed() {
						t.Fatalf("killed %s call %d", site, n)
					}
					if through {
						break
					}
					reached = n
				}
				t.Logf("killed at %d calls", reached)
				assert.Greater(t, reached, int64(2))
			})
		}
	}
}

// The states that a job can be in when its process dies.
func TestS34KilledInEveryState(t *testing.T) {
	t.Parallel()
	never := func(string) bool { return false }
	for name, c := range map[string]struct {
		class    string
		trigger  func() func(string) bool // kills; else the process dies at a time
		busy     bool                     // another job runs first
		deaf     bool                     // no stream: nothing but the answer tells that the pod took the prompt
		diesAt   time.Duration
		was      comfyui.Status // in the record that the dead process left
		accepted bool
		posts    int // by the heir
	}{
		"before the POST":     {class: "Work", trigger: func() func(string) bool { return nth(1, "pod before POST /prompt") }, was: comfyui.StatusPending, posts: 1},
		"the reply lost":      {class: "Work", trigger: func() func(string) bool { return nth(1, "pod answers POST /prompt") }, deaf: true, was: comfyui.StatusPending},
		"pending":             {class: "Work", busy: true, diesAt: 5 * time.Second, was: comfyui.StatusQueued, accepted: true},
		"running":             {class: "Long", diesAt: 5 * time.Second, was: comfyui.StatusRunning, accepted: true},
		"finished but unread": {class: "Long", diesAt: 59*time.Second + 990*time.Millisecond, was: comfyui.StatusRunning, accepted: true},
		"retry waiting":       {class: "Memory", trigger: nil, diesAt: 900 * time.Millisecond, was: comfyui.StatusPending, posts: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				trigger := never
				if c.trigger != nil {
					trigger = c.trigger()
				}
				p := b.process(store, trigger)
				if c.deaf {
					b.pod.RefuseStreams(http.StatusForbidden)
				}
				if c.busy {
					_, err := b.bystander().Submit(b.ctx, graphOf(t, "Long", 7))
					require.NoError(t, err)
				}
				background(b, p, graphOf(t, c.class, 1), comfyui.WithJobID("the-job"), comfyui.WithLabels(map[string]string{"for": "me"}))
				time.Sleep(c.diesAt + time.Millisecond)
				p.kill()
				left, err := store.Get(b.ctx, "the-job")
				require.NoError(t, err)
				assert.Equal(t, c.was, left.Progress.Status)
				assert.Equal(t, c.accepted, left.Accepted)
				died := time.Now()
				posted := b.pod.Requests("POST /prompt")

				heir := b.client(comfyui.WithStore(store))
				taken := 0
				for j, err := range heir.Recover(b.ctx) {
					require.NoError(t, err)
					taken++
					assert.LessOrEqual(t, time.Since(died), 40*time.Second, "a lease and a bit")
					assert.Equal(t, map[string]string{"for": "me"}, j.Labels())
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
					assert.Equal(t, left.CreatedAt.Unix(), r.CreatedAt.Unix())
					assert.Equal(t, left.Attempt, r.Attempt, "attempts")
				}
				assert.Equal(t, 1, taken)
				assert.EqualValues(t, 1, heir.Stats().Recovered)
				assert.Equal(t, c.posts, b.pod.Requests("POST /prompt")-posted, "posts by the heir")
				for _, p := range b.pod.Prompts() {
					assert.Equal(t, 1, p.Runs)
					assert.Equal(t, 1, p.Posts)
				}
				ended, err := store.Get(b.ctx, "the-job")
				require.NoError(t, err)
				assert.Equal(t, comfyui.StatusSucceeded, ended.Progress.Status)
				assert.EqualValues(t, 2, ended.Epoch)
			}, comfyuitest.WithNode("Memory", failsFirst()))
		})
	}
}

// A retry that waits is waited for by the heir: neither sooner, nor from the beginning.
func TestS34NextAttemptSurvives(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		policy := comfyui.WithRetry(comfyui.CategoryOutOfMemory, comfyui.RetryPolicy{MaxAttempts: 2, InitialInterval: 5 * time.Minute})
		p := b.process(store, nil, policy)
		background(b, p, graphOf(t, "Memory", 1), comfyui.WithJobID("the-job"))
		time.Sleep(10 * time.Second)
		p.kill()
		left, err := store.Get(b.ctx, "the-job")
		require.NoError(t, err)
		require.Equal(t, 2, left.Attempt)
		require.ErrorContains(t, left.Failure, "Allocation on device")

		heir := b.client(comfyui.WithStore(store), policy)
		results := recoverAll(b, heir)
		require.Equal(t, comfyui.StatusSucceeded, results["the-job"].Status)
		assert.Equal(t, 2, results["the-job"].Attempt)
		assert.WithinDuration(t, left.NextAttempt, results["the-job"].StartedAt, time.Second)
		assert.Len(t, b.pod.Prompts(), 2)
	}, comfyuitest.WithNode("Memory", failsFirst()))
}

func TestS34AtMostOnceSurvives(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		event string
		runs  int
	}{
		"nobody knows whether it was posted": {"pod before POST /prompt", 0},
		"the pod has it":                     {"pod answers POST /prompt", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				p := b.process(store, nth(1, c.event))
				background(b, p, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"), comfyui.AtMostOnce())
				time.Sleep(time.Second)
				heir := b.client(comfyui.WithStore(store))
				r := recoverAll(b, heir)["the-job"]
				require.NotNil(t, r)
				_, err := heir.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				if c.runs == 0 {
					require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
					assert.Equal(t, comfyui.StatusFailed, r.Status)
					assert.Empty(t, b.pod.Prompts())
					return
				}
				require.NoError(t, err)
				b.ranOnce()
			})
		})
	}
}

func TestS34LimitsSurvive(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		limits comfyui.Limits
		busy   bool
		ended  time.Duration // since the beginning
	}{
		"Total": {comfyui.Limits{Total: 50 * time.Second}, false, 50 * time.Second},
		"Run":   {comfyui.Limits{Run: 50 * time.Second}, false, 50 * time.Second},
		"Queue": {comfyui.Limits{Queue: 50 * time.Second}, true, 50 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				if c.busy {
					_, err := b.bystander().Submit(b.ctx, graphOf(t, "Long", 7))
					require.NoError(t, err)
				}
				begun := time.Now()
				p := b.process(store, nil)
				background(b, p, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"), comfyui.WithLimits(c.limits))
				time.Sleep(10 * time.Second)
				p.kill()
				heir := b.client(comfyui.WithStore(store))
				r := recoverAll(b, heir)["the-job"]
				require.NotNil(t, r)
				assert.Equal(t, comfyui.StatusFailed, r.Status)
				assert.InDelta(t, c.ended.Seconds(), r.FinishedAt.Sub(begun).Seconds(), 3)
				_, err := heir.Execute(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
				assert.Equal(t, comfyui.CategoryTimeout, comfyui.CategoryOf(err))
				assert.ErrorContains(t, err, name)
			})
		})
	}
}

// Whoever asks for a cancel records it; whoever drives the job next honours it, whatever the pod knew of it.
func TestS34CancelIntentSurvives(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		event string
		busy  bool
		after time.Duration
		runs  int
	}{
		"before the POST": {event: "pod before POST /prompt"},
		"the reply lost":  {event: "pod answers POST /prompt", runs: 1},
		"pending":         {after: 5 * time.Second, busy: true},
		"running":         {after: 5 * time.Second, runs: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				if c.busy {
					_, err := b.bystander().Submit(b.ctx, graphOf(t, "Endless", 7))
					require.NoError(t, err)
				}
				p := b.process(store, nth(1, cmpOr(c.event, "never")))
				background(b, p, graphOf(t, "Endless", 1), comfyui.WithJobID("the-job"))
				time.Sleep(c.after + time.Second)
				p.kill()
				_, err := store.RequestCancel(b.ctx, "the-job")
				require.NoError(t, err)

				heir := b.client(comfyui.WithStore(store))
				r := recoverAll(b, heir)["the-job"]
				require.NotNil(t, r)
				assert.Equal(t, comfyui.StatusCancelled, r.Status)
				_, err = heir.Execute(b.ctx, graphOf(t, "Endless", 1), comfyui.WithJobID("the-job"))
				require.ErrorIs(t, err, comfyui.ErrCancelled)
				q, err := heir.Queue(b.ctx)
				require.NoError(t, err)
				for _, item := range slices.Concat(q.Running, q.Pending) {
					assert.NotEqual(t, r.PromptID, item.PromptID, "it is still on the pod")
				}
				runs := 0
				for _, prompt := range b.pod.Prompts() {
					if prompt.ID == r.PromptID {
						runs += prompt.Runs
						assert.Zero(t, prompt.Ends)
					}
				}
				assert.Equal(t, c.runs, runs)
			}, comfyuitest.WithNode("Endless", comfyuitest.Steps(3600, time.Second)))
		})
	}
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// A cancel that another process has recorded reaches the living owner within a third of the lease.
func TestS34CancelByAnotherProcess(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		owner, other := b.client(comfyui.WithStore(store)), b.client(comfyui.WithStore(store))
		j, err := owner.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		theirs, err := other.Attach(b.ctx, "the-job")
		require.NoError(t, err)
		asked := time.Now()
		require.NoError(t, theirs.Cancel(b.ctx))
		assert.LessOrEqual(t, time.Since(asked), 15*time.Second)
		_, err = theirs.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrCancelled)
		_, err = j.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrCancelled)
		assert.Zero(t, b.ranOnce().Ends)
	})
}

func TestS35TwoRecoverersOneOwnerEach(t *testing.T) {
	t.Parallel()
	const jobs = 1000
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		p := b.process(store, nil)
		for n := range jobs {
			background(b, p, graphOf(t, "Fast", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
		}
		time.Sleep(5 * time.Second)
		p.kill()
		var wg sync.WaitGroup
		owners := make([]map[string]*comfyui.Result, 2)
		for n := range owners {
			c := b.client(comfyui.WithStore(store))
			wg.Go(func() { owners[n] = recoverAll(b, c) })
		}
		wg.Wait()
		taken := 0
		for id := range owners[0] {
			assert.NotContains(t, owners[1], id, "two owners")
		}
		for _, results := range owners {
			for _, r := range results {
				assert.Equal(t, comfyui.StatusSucceeded, r.Status)
				taken++
			}
		}
		for range store.Unfinished(b.ctx, "") {
			t.Error("a job was left")
		}
		prompts := b.pod.Prompts()
		assert.Len(t, prompts, jobs)
		for _, prompt := range prompts {
			require.Equal(t, 1, prompt.Runs)
			require.Equal(t, 1, prompt.Posts)
		}
		t.Logf("%d jobs, %d left to recover: %d by one, %d by the other", jobs, taken, len(owners[0]), len(owners[1]))
		assert.NotZero(t, len(owners[0])*len(owners[1]))
	}, comfyuitest.WithNode("Fast", comfyuitest.Steps(1, 50*time.Millisecond)))
}

// A process that is stopped past its lease, at each of its calls in turn, turns follower and tells what the new owner has.
func TestS35StoppedPastItsLease(t *testing.T) {
	t.Parallel()
	for _, site := range []string{"store before", "store after", "pod before", "pod answers"} {
		t.Run(site, func(t *testing.T) {
			t.Parallel()
			reached := int64(0)
			for n := int64(1); n < 100; n++ {
				through := false
				bubble(t, func(b *bench) {
					store := comfyui.NewMemoryStore()
					var stopped atomic.Bool
					hit := nth(n, site)
					var p *process
					p = b.process(store, func(event string) bool {
						// Between the check of its lease and the bytes of a POST nothing can help it (design: exception 2).
						if hit(event) && event != "pod before POST /prompt" {
							stopped.Store(true)
							p.stop()
						}
						return false
					})
					var wg sync.WaitGroup
					var mine *comfyui.Result
					var mineErr error
					wg.Go(func() { mine, mineErr = p.Execute(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job")) })
					time.Sleep(20 * time.Second)
					heir := b.client(comfyui.WithStore(store))
					var theirs *comfyui.Result
					var err error
					wg.Go(func() {
						time.Sleep(15 * time.Second)
						theirs, err = heir.Execute(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
					})
					time.Sleep(60 * time.Second)
					if stopped.Load() {
						p.cont()
					}
					wg.Wait()
					succeeded(t, theirs, err)
					succeeded(t, mine, mineErr)
					assert.Equal(t, theirs.FinishedAt, mine.FinishedAt)
					p1 := b.ranOnce()
					assert.Equal(t, 1, p1.Posts)
					synctest.Wait() // its Wait holds the end back so long only: the store's no may come in the same moment
					assert.Zero(t, p.Stats().Owned)
					through = !stopped.Load()
				})
				if t.Failed() {
					t.Fatalf("stopped %s call %d", site, n)
				}
				if through && n > 25 {
					break
				}
				if !through {
					reached = n
				}
			}
			t.Logf("stopped at calls up to %d", reached)
			assert.Greater(t, reached, int64(2))
		})
	}
}

// What a stopped owner comes back to do, the store and the pod refuse: it cancels nothing and removes nothing.
func TestS35StaleOwnerCancelsNothing(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		p := b.process(store, nil)
		var wg sync.WaitGroup
		// Its own limit is over while it is stopped; the new owner has the record's, which are the same: Run is counted from the start.
		wg.Go(func() {
			r, err := p.Execute(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"), comfyui.CancelWithContext())
			succeeded(t, r, err)
		})
		time.Sleep(5 * time.Second)
		p.stop()
		heir := b.client(comfyui.WithStore(store))
		time.Sleep(31 * time.Second)
		j, err := heir.Attach(b.ctx, "the-job")
		require.NoError(t, err)
		p.cont()
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		wg.Wait()
		assert.EqualValues(t, 0, p.Stats().Owned)
		assert.EqualValues(t, 1, heir.Stats().Recovered)
		stored, err := store.Get(b.ctx, "the-job")
		require.NoError(t, err)
		assert.EqualValues(t, 2, stored.Epoch)
		b.ranOnce()
	})
}

func TestS36ExecuteAgain(t *testing.T) {
	t.Parallel()
	execute := func(b *bench, c *comfyui.PodClient, class string, opts ...comfyui.JobOption) (*comfyui.Result, error) {
		return c.Execute(b.ctx, graphOf(b.t, class, 1), append(opts, comfyui.WithJobID("the-job"))...)
	}
	for _, same := range []bool{true, false} {
		who := map[bool]string{true: "same process", false: "another process"}[same]
		run := func(name string, f func(t *testing.T, b *bench, first, second *comfyui.PodClient)) {
			t.Run(who+"/"+name, func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					store := comfyui.NewMemoryStore()
					first := b.client(comfyui.WithStore(store))
					second := first
					if !same {
						second = b.client(comfyui.WithStore(store))
					}
					f(b.t, b, first, second)
				}, comfyuitest.WithNode("Memory", failsFirst()), comfyuitest.WithNode("Flops", comfyuitest.Fail("ValueError", "no")),
					comfyuitest.WithNode("Twice", failsTwice()))
			})
		}
		run("while it runs", func(t *testing.T, b *bench, first, second *comfyui.PodClient) {
			j, err := first.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
			require.NoError(t, err)
			time.Sleep(5 * time.Second)
			r, err := execute(b, second, "Long")
			succeeded(t, r, err)
			mine, err := j.Wait(b.ctx)
			succeeded(t, mine, err)
			assert.Equal(t, mine.FinishedAt.UnixNano(), r.FinishedAt.UnixNano())
			assert.Equal(t, 1, b.ranOnce().Posts)
			assert.EqualValues(t, 1, second.Stats().Joined)
		})
		run("after success", func(t *testing.T, b *bench, first, second *comfyui.PodClient) {
			r, err := execute(b, first, "Work")
			succeeded(t, r, err)
			requests := b.pod.Requests("")
			for _, opts := range [][]comfyui.JobOption{nil, {comfyui.RerunFailed()}} {
				again, err := execute(b, second, "Work", opts...)
				succeeded(t, again, err)
				assert.Equal(t, r.Outputs[0].File, again.Outputs[0].File)
				assert.Equal(t, r.FinishedAt.UnixNano(), again.FinishedAt.UnixNano())
			}
			assert.Equal(t, requests, b.pod.Requests(""), "the pod is not asked")
			b.ranOnce()
		})
		run("after failure", func(t *testing.T, b *bench, first, second *comfyui.PodClient) {
			_, err := execute(b, first, "Flops")
			require.Equal(t, comfyui.CategoryExecution, comfyui.CategoryOf(err))
			r, err := execute(b, second, "Flops")
			require.Equal(t, comfyui.CategoryExecution, comfyui.CategoryOf(err))
			require.NotNil(t, r)
			b.ranOnce()
		})
		run("rerun after failure", func(t *testing.T, b *bench, first, second *comfyui.PodClient) {
			_, err := execute(b, first, "Memory", comfyui.AtMostOnce())
			require.Equal(t, comfyui.CategoryOutOfMemory, comfyui.CategoryOf(err))
			asked := time.Now()
			r, err := execute(b, second, "Memory", comfyui.RerunFailed(), comfyui.AtMostOnce())
			succeeded(t, r, err)
			assert.Equal(t, 2, r.Attempt)
			assert.LessOrEqual(t, time.Since(asked), 5*time.Second, "it waits for nobody")
			prompts := b.pod.Prompts()
			require.Len(t, prompts, 2)
			assert.NotEqual(t, prompts[0].ID, prompts[1].ID)
			r, err = execute(b, second, "Memory", comfyui.RerunFailed())
			succeeded(t, r, err)
			assert.Len(t, b.pod.Prompts(), 2)
		})
		run("rerun after cancel", func(t *testing.T, b *bench, first, second *comfyui.PodClient) {
			j, err := first.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
			require.NoError(t, err)
			require.NoError(t, j.Cancel(b.ctx))
			_, err = execute(b, second, "Long")
			require.ErrorIs(t, err, comfyui.ErrCancelled)
			r, err := execute(b, second, "Long", comfyui.RerunFailed())
			succeeded(t, r, err)
			assert.Equal(t, 2, r.Attempt)
			assert.Len(t, b.pod.Prompts(), 2)
		})
		run("two rerun it at once", func(t *testing.T, b *bench, first, second *comfyui.PodClient) {
			_, err := execute(b, first, "Memory", comfyui.AtMostOnce())
			require.Error(t, err)
			var wg sync.WaitGroup
			for _, c := range []*comfyui.PodClient{first, second} {
				wg.Go(func() {
					r, err := execute(b, c, "Memory", comfyui.RerunFailed())
					if assert.NoError(t, err) {
						assert.Equal(t, 2, r.Attempt)
					}
				})
			}
			wg.Wait()
			assert.Len(t, b.pod.Prompts(), 2)
		})
		run("rerun retries as at first", func(t *testing.T, b *bench, first, second *comfyui.PodClient) {
			_, err := execute(b, first, "Twice", comfyui.AtMostOnce())
			require.Error(t, err)
			r, err := execute(b, second, "Twice", comfyui.RerunFailed())
			succeeded(t, r, err)
			assert.Equal(t, 3, r.Attempt)
		})
		run("another workflow", func(t *testing.T, b *bench, first, second *comfyui.PodClient) {
			_, err := first.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
			require.NoError(t, err)
			_, err = second.Execute(b.ctx, graphOf(t, "Long", 2), comfyui.WithJobID("the-job"))
			require.ErrorIs(t, err, comfyui.ErrJobConflict)
			assert.Equal(t, comfyui.CategoryConflict, comfyui.CategoryOf(err))
			assert.Len(t, b.pod.Prompts(), 1)
		})
	}
}

// failsTwice runs out of memory twice.
func failsTwice() comfyuitest.Node {
	var runs atomic.Int64
	return comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
		if runs.Add(1) <= 2 {
			return &comfyuitest.NodeError{ExceptionType: "torch.OutOfMemoryError", Message: "Allocation on device"}
		}
		c.Save("images", "output", "late.png", []byte("png"))
		return nil
	}}
}

// A process that dies between the claim of an ended job and the write that reopens it leaves the end as it was; whoever reruns the
// job next waits for that lease.
func TestS36RerunOfADeadRerun(t *testing.T) {
	t.Parallel()
	for _, event := range []string{"store after Claim", "store before Update", "store after Update", "pod before POST /prompt", "pod answers POST /prompt"} {
		t.Run(event, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				_, err := b.client(comfyui.WithStore(store)).Execute(b.ctx, graphOf(t, "Memory", 1), comfyui.WithJobID("the-job"), comfyui.AtMostOnce())
				require.Error(t, err)
				p := b.process(store, nth(1, event))
				background(b, p, graphOf(t, "Memory", 1), comfyui.WithJobID("the-job"), comfyui.RerunFailed())
				time.Sleep(time.Second)
				require.True(t, p.isDead())
				heir := b.client(comfyui.WithStore(store))
				r, err := heir.Execute(b.ctx, graphOf(t, "Memory", 1), comfyui.WithJobID("the-job"), comfyui.RerunFailed())
				succeeded(t, r, err)
				assert.Equal(t, 2, r.Attempt)
				prompts := b.pod.Prompts()
				require.Len(t, prompts, 2)
				assert.Equal(t, 1, prompts[1].Posts)
			}, comfyuitest.WithNode("Memory", failsFirst()))
		})
	}
}

// outage is a store that can be down.
type outage struct {
	down  atomic.Bool
	hangs bool // calls take RedisCallTimeout's five seconds to fail
}

var errStoreDown = errors.New("connection refused")

func (o *outage) call(ctx context.Context, _ string) (err error, after bool) {
	if !o.down.Load() {
		return nil, false
	}
	if o.hangs {
		select {
		case <-time.After(5 * time.Second):
		case <-ctx.Done():
			return ctx.Err(), false
		}
	}
	return errStoreDown, false
}

func TestS37StoreDownAtSubmission(t *testing.T) {
	t.Parallel()
	for _, hangs := range []bool{false, true} {
		t.Run(fmt.Sprintf("hangs=%t", hangs), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				o := &outage{hangs: hangs}
				o.down.Store(true)
				store := comfyui.NewMemoryStore()
				c := b.client(comfyui.WithStore(storetest.Flaky(store, o.call)))
				asked := time.Now()
				_, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				require.ErrorIs(t, err, errStoreDown)
				assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err))
				assert.True(t, comfyui.CategoryStorage.Retryable())
				assert.LessOrEqual(t, time.Since(asked), 30*time.Second)
				assert.Zero(t, b.pod.Requests("POST /prompt"))
				for _, call := range []func() error{
					func() error { _, err := c.Attach(b.ctx, "the-job"); return err },
					func() error {
						for _, err := range c.Recover(b.ctx) {
							return err
						}
						return nil
					},
				} {
					assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(call()))
				}
				o.down.Store(false)
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				succeeded(t, r, err)
				b.ranOnce()
			})
		})
	}
}

// Minutes of jobs are on the pod, and in some's retry, while the store is away for one.
func TestS37StoreDownUnderRunningJobs(t *testing.T) {
	t.Parallel()
	for hangs, jobs := range map[bool]int{false: 1000, true: 200} {
		t.Run(fmt.Sprintf("hangs=%t", hangs), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				o := &outage{hangs: hangs}
				store := comfyui.NewMemoryStore()
				c := b.client(comfyui.WithStore(storetest.Flaky(store, o.call)))
				handles := make([]*comfyui.Job, jobs)
				for n := range jobs {
					class := "Fast"
					if n%50 == 49 {
						class = "Memory"
					}
					var err error
					handles[n], err = c.Submit(b.ctx, graphOf(t, class, n), comfyui.WithJobID(fmt.Sprint("job-", n)))
					require.NoError(t, err)
				}
				time.Sleep(10 * time.Second)
				o.down.Store(true)
				most, ended := int64(0), 0
				for range 60 {
					time.Sleep(time.Second)
					most = max(most, c.Stats().StorePending)
				}
				for _, j := range handles {
					select {
					case <-j.Done():
						ended++
					default:
					}
				}
				_, err := c.Submit(b.ctx, graphOf(t, "Work", 1))
				assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err))
				o.down.Store(false)
				warned := 0
				for _, j := range handles {
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
					for _, w := range r.Warnings {
						if w.Category == comfyui.CategoryStorage {
							warned++
						}
					}
				}
				time.Sleep(time.Minute)
				for n := range jobs {
					r, err := store.Get(b.ctx, fmt.Sprint("job-", n))
					require.NoError(t, err)
					assert.Equal(t, comfyui.StatusSucceeded, r.Progress.Status, "job %d landed", n)
				}
				runs := 0
				for _, p := range b.pod.Prompts() {
					assert.Equal(t, 1, p.Posts)
					assert.Equal(t, 1, p.Runs)
					runs++
				}
				assert.Equal(t, jobs+jobs/50, runs, "one prompt an attempt")
				assert.Zero(t, c.Stats().StorePending)
				assert.LessOrEqual(t, most, int64(jobs), "one record a job, however long it takes")
				assert.Greater(t, ended, jobs/4, "they end while the store is away")
				assert.Greater(t, warned, jobs/4)
				assert.GreaterOrEqual(t, most, int64(warned))
				t.Logf("%d jobs: %d ended while the store was away, %d with a storage warning, %d records waited at most", jobs, ended, warned, most)
			}, comfyuitest.WithNode("Fast", comfyuitest.Steps(1, time.Minute/time.Duration(jobs))), comfyuitest.WithNode("Memory", failsFirstPerSeed()))
		})
	}
}

// failsFirstPerSeed runs out of memory on the first attempt of each job.
func failsFirstPerSeed() comfyuitest.Node {
	var seen sync.Map
	return comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
		if _, again := seen.LoadOrStore(fmt.Sprint(c.Inputs["seed"]), true); !again {
			return &comfyuitest.NodeError{ExceptionType: "torch.OutOfMemoryError", Message: "Allocation on device"}
		}
		c.Save("images", "output", "late.png", []byte("png"))
		return nil
	}}
}

// failover is a store that another one replaces, which knows less.
type failover struct {
	to atomic.Pointer[comfyui.MemoryStore]
}

func newFailover() *failover {
	f := &failover{}
	f.to.Store(comfyui.NewMemoryStore())
	return f
}

func (f *failover) Create(ctx context.Context, r *comfyui.Record, ttl time.Duration) (*comfyui.Record, error) {
	return f.to.Load().Create(ctx, r, ttl)
}

func (f *failover) Get(ctx context.Context, id string) (*comfyui.Record, error) {
	return f.to.Load().Get(ctx, id)
}

func (f *failover) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	return f.to.Load().Update(ctx, r)
}

func (f *failover) Claim(ctx context.Context, id, owner string, ttl time.Duration) (*comfyui.Record, error) {
	return f.to.Load().Claim(ctx, id, owner, ttl)
}

func (f *failover) Renew(ctx context.Context, owner string, ttl time.Duration, ids []string) ([]string, error) {
	return f.to.Load().Renew(ctx, owner, ttl, ids)
}

func (f *failover) Release(ctx context.Context, owner string, ids []string) error {
	return f.to.Load().Release(ctx, owner, ids)
}

func (f *failover) RequestCancel(ctx context.Context, id string) (*comfyui.Record, error) {
	return f.to.Load().RequestCancel(ctx, id)
}

func (f *failover) Unfinished(ctx context.Context, pod string) iter.Seq2[*comfyui.Record, error] {
	return f.to.Load().Unfinished(ctx, pod)
}

// forget has the store remember only what some records said; leases run from now.
func (f *failover) forget(b *bench, remembered ...*comfyui.Record) {
	b.t.Helper()
	s := comfyui.NewMemoryStore()
	for _, r := range remembered {
		_, err := s.Create(b.ctx, r, time.Until(r.LeaseUntil))
		require.NoError(b.t, err)
		_, err = s.Update(b.ctx, r)
		require.NoError(b.t, err)
	}
	f.to.Store(s)
}

func TestS39StoreForgets(t *testing.T) {
	t.Parallel()
	t.Run("the record of a job whose process is dead", func(t *testing.T) {
		t.Parallel()
		for _, class := range []string{"Work", "Long", "Memory"} {
			t.Run(class, func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					store := newFailover()
					p := b.process(store, nil)
					background(b, p, graphOf(t, class, 1), comfyui.WithJobID("the-job"))
					time.Sleep(3500 * time.Millisecond)
					p.kill()
					store.forget(b)
					heir := b.client(comfyui.WithStore(store))
					r, err := heir.Execute(b.ctx, graphOf(t, class, 1), comfyui.WithJobID("the-job"))
					succeeded(t, r, err)
					for _, prompt := range b.pod.Prompts() {
						assert.Equal(t, 1, prompt.Posts)
					}
					assert.Equal(t, len(b.pod.Prompts()), r.Attempt)
				}, comfyuitest.WithNode("Memory", failsFirst()))
			})
		}
	})
	t.Run("the record of a job whose process lives", func(t *testing.T) {
		t.Parallel()
		for _, after := range []time.Duration{0, time.Millisecond, 500 * time.Millisecond, 1500 * time.Millisecond} {
			for _, class := range []string{"Work", "Long", "Memory"} {
				t.Run(fmt.Sprint(class, after), func(t *testing.T) {
					t.Parallel()
					bubble(t, func(b *bench) {
						store := newFailover()
						c := b.client(comfyui.WithStore(store))
						j, err := c.Submit(b.ctx, graphOf(t, class, 1), comfyui.WithJobID("the-job"))
						require.NoError(t, err)
						time.Sleep(after)
						store.forget(b)
						r, err := j.Wait(b.ctx)
						succeeded(t, r, err)
						stored, err := store.Get(b.ctx, "the-job")
						require.NoError(t, err)
						assert.Equal(t, comfyui.StatusSucceeded, stored.Progress.Status)
						for _, prompt := range b.pod.Prompts() {
							assert.Equal(t, 1, prompt.Posts)
							assert.Equal(t, 1, prompt.Runs)
						}
					}, comfyuitest.WithNode("Memory", failsFirst()))
				})
			}
		}
	})
	t.Run("the record of a job that is still to be posted", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			store := newFailover()
			b.pod.Restart(20 * time.Second) // the POST is tried for so long, past the time that a confirmation is good for
			c := b.client(comfyui.WithStore(store))
			var wg sync.WaitGroup
			wg.Go(func() {
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				succeeded(t, r, err)
			})
			time.Sleep(18 * time.Second)
			store.forget(b)
			wg.Wait()
			b.ranOnce()
			stored, err := store.Get(b.ctx, "the-job")
			require.NoError(t, err)
			assert.Equal(t, comfyui.StatusSucceeded, stored.Progress.Status)
		})
	})
	t.Run("a takeover", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			store := newFailover()
			p := b.process(store, nil)
			background(b, p, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
			time.Sleep(5 * time.Second)
			p.kill()
			before, err := store.Get(b.ctx, "the-job")
			require.NoError(t, err)
			heir := b.client(comfyui.WithStore(store))
			var job *comfyui.Job
			for j, err := range heir.Recover(b.ctx) {
				require.NoError(t, err)
				job = j
			}
			require.NotNil(t, job)
			time.Sleep(time.Second)
			before.LeaseUntil = time.Now().Add(30 * time.Second)
			store.forget(b, before)
			time.Sleep(15 * time.Second)
			assert.Equal(t, 1, heir.Stats().Owned, "it drives on: its epoch is the newer one")
			r, err := job.Wait(b.ctx)
			succeeded(t, r, err)
			stored, err := store.Get(b.ctx, "the-job")
			require.NoError(t, err)
			assert.Equal(t, comfyui.StatusSucceeded, stored.Progress.Status)
			assert.EqualValues(t, 2, stored.Epoch)
			b.ranOnce()
		})
	})
	t.Run("a new attempt", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			store := newFailover()
			p := b.process(store, nil)
			background(b, p, graphOf(t, "Memory", 1), comfyui.WithJobID("the-job"))
			var before *comfyui.Record
			for before == nil || !before.Accepted { // the first attempt
				time.Sleep(time.Millisecond)
				before, _ = store.Get(b.ctx, "the-job")
			}
			for len(b.pod.Prompts()) < 2 {
				time.Sleep(time.Millisecond)
			}
			p.kill() // the second attempt is on the pod, and the store knows only of the first
			store.forget(b, before)
			r := recoverAll(b, b.client(comfyui.WithStore(store)))["the-job"]
			require.NotNil(t, r)
			assert.Equal(t, comfyui.StatusSucceeded, r.Status)
			prompts := b.pod.Prompts()
			require.Len(t, prompts, 2)
			assert.Equal(t, 1, prompts[1].Posts, "the second attempt is found")
		}, comfyuitest.WithNode("Memory", failsFirst()), comfyuitest.WithVersion("0.33.0"))
	})
}

// The heir of a job opens a new attempt just when the store has lost the record: what brings that back is an epoch behind.
func TestS39RecordOfAnHeirIsLostBeforeANewAttempt(t *testing.T) {
	t.Parallel()
	store := newFailover()
	var lost atomic.Bool
	fails := comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
		if lost.Load() {
			c.Save("images", "output", "late.png", []byte("png"))
			return nil
		}
		if err := pause(ctx, 64*time.Second); err != nil { // between two renewals
			return err
		}
		lost.Store(true)
		store.to.Store(comfyui.NewMemoryStore())
		return &comfyuitest.NodeError{ExceptionType: "torch.OutOfMemoryError", Message: "Allocation on device"}
	}}
	bubble(t, func(b *bench) {
		p := b.process(store, nil)
		background(b, p, graphOf(t, "Memory", 1), comfyui.WithJobID("the-job"))
		time.Sleep(5 * time.Second)
		p.kill()
		heir := b.client(comfyui.WithStore(store))
		r := recoverAll(b, heir)["the-job"]
		require.NotNil(t, r)
		assert.Equal(t, comfyui.StatusSucceeded, r.Status)
		assert.Equal(t, 2, r.Attempt)
		stored, err := store.Get(b.ctx, "the-job")
		require.NoError(t, err)
		assert.Equal(t, comfyui.StatusSucceeded, stored.Progress.Status)
		assert.Zero(t, heir.Stats().StorePending)
	}, comfyuitest.WithNode("Memory", fails))
}

// Who follows a job whose record the store has lost goes on: its owner brings the record back.
func TestS39FollowerOfALostRecord(t *testing.T) {
	t.Parallel()
	for _, owned := range []bool{true, false} {
		t.Run(fmt.Sprintf("the owner lives=%t", owned), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := newFailover()
				p := b.process(store, nil)
				_, err := p.Submit(b.ctx, graphOf(t, "Mute", 1), comfyui.WithJobID("the-job"))
				require.NoError(t, err)
				j, err := b.client(comfyui.WithStore(store)).Attach(b.ctx, "the-job")
				require.NoError(t, err)
				time.Sleep(22 * time.Second) // the next renewal is some time away
				if !owned {
					p.kill()
				}
				store.forget(b)
				start := time.Now()
				r, err := j.Wait(b.ctx)
				if owned {
					succeeded(t, r, err)
					return
				}
				require.ErrorIs(t, err, comfyui.ErrJobNotFound)
				assert.Nil(t, r)
				assert.WithinDuration(t, start.Add(30*time.Second), time.Now(), 5*time.Second, "a lease")
			}, comfyuitest.WithNode("Mute", comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
				c.Put("text", "at last")
				return pause(ctx, 5*time.Minute) // without a word: nothing is written meanwhile
			}}))
		})
	}
}

// Reads of records that take longer than the time between two renewals do not pile up.
func TestS37SlowReadsDoNotPileUp(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		var slow atomic.Bool
		var reads atomic.Int64
		c := b.client(comfyui.WithStore(storetest.Flaky(store, func(ctx context.Context, method string) (error, bool) {
			if method == "Get" {
				reads.Add(1)
				if slow.Load() {
					_ = pause(ctx, 5*time.Second)
				}
			}
			return nil, false
		})))
		const jobs = 50
		for i := range jobs {
			_, err := c.Submit(b.ctx, graphOf(t, "Endless", i))
			require.NoError(t, err)
		}
		slow.Store(true)
		time.Sleep(10 * time.Minute)
		slow.Store(false)
		before := reads.Load()
		time.Sleep(9 * time.Second)
		assert.LessOrEqual(t, reads.Load()-before, int64(2*jobs), "of the last renewal, and of the next")
	}, comfyuitest.WithNode("Endless", comfyuitest.Steps(36000, time.Second)))
}

// The store goes away after an attempt was recorded and before it could be posted, for longer than a confirmation of the lease is
// good for: the POST waits, the job does not fail.
func TestS37StoreDownBeforeThePost(t *testing.T) {
	t.Parallel()
	for _, forgets := range []bool{false, true} {
		for _, hangs := range []bool{false, true} {
			t.Run(fmt.Sprintf("hangs=%t/forgets=%t", hangs, forgets), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					o, store := &outage{hangs: hangs}, newFailover()
					b.pod.Restart(25 * time.Second)
					c := b.client(comfyui.WithStore(storetest.Flaky(store, o.call)))
					var wg sync.WaitGroup
					wg.Go(func() {
						r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
						succeeded(t, r, err)
					})
					time.Sleep(5 * time.Second)
					o.down.Store(true)
					time.Sleep(60 * time.Second)
					assert.Zero(t, len(b.pod.Prompts()), "no lease, no POST")
					o.down.Store(false)
					if forgets {
						store.forget(b)
					}
					wg.Wait()
					assert.Equal(t, 1, b.ranOnce().Posts)
					r, err := store.Get(b.ctx, "the-job")
					require.NoError(t, err)
					assert.Equal(t, comfyui.StatusSucceeded, r.Progress.Status)
				})
			})
		}
	}
}

// A store that hangs holds up neither the jobs on the pod nor those who only follow.
func TestS37HungStoreHoldsNothingUp(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		o, store := &outage{hangs: true}, comfyui.NewMemoryStore()
		owner := b.client(comfyui.WithStore(store))
		c := b.client(comfyui.WithStore(storetest.Flaky(store, o.call)))
		mine, err := c.Submit(b.ctx, graphOf(t, "Long", 1))
		require.NoError(t, err)
		for n := range 100 {
			id := fmt.Sprint("job-", n)
			_, err := owner.Submit(b.ctx, graphOf(t, "Long", 2+n), comfyui.WithJobID(id))
			require.NoError(t, err)
			_, err = c.Attach(b.ctx, id)
			require.NoError(t, err)
		}
		time.Sleep(time.Until(time.Date(2000, 1, 1, 0, 0, 50, 0, time.UTC)))
		o.down.Store(true)
		r, err := mine.Wait(b.ctx)
		succeeded(t, r, err)
		assert.LessOrEqual(t, time.Since(r.FinishedAt), 2*time.Second, "StoreWait and a little")
		assert.LessOrEqual(t, r.FinishedAt.Sub(r.StartedAt), 61*time.Second)
	})
}

// Execute, Attach and Recover of a job that this very client drives join it, whatever became of its lease meanwhile.
func TestS36OwnJobAgainAfterAnOutage(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		o, store := &outage{}, comfyui.NewMemoryStore()
		c := b.client(comfyui.WithStore(storetest.Flaky(store, o.call)))
		j, err := c.Submit(b.ctx, graphOf(t, "Endless", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		o.down.Store(true)
		time.Sleep(49 * time.Second) // the lease has lapsed, and the next renewal is a second away
		o.down.Store(false)
		again, err := c.Attach(b.ctx, "the-job")
		require.NoError(t, err)
		joined, err := c.Submit(b.ctx, graphOf(t, "Endless", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		for range c.Recover(b.ctx) {
			t.Error("it is driven already")
		}
		time.Sleep(time.Minute)
		assert.Equal(t, 1, c.Stats().Owned)
		stored, err := store.Get(b.ctx, "the-job")
		require.NoError(t, err)
		assert.EqualValues(t, 1, stored.Epoch)
		require.NoError(t, again.Cancel(b.ctx))
		for _, j := range []*comfyui.Job{j, again, joined} {
			_, err := j.Wait(b.ctx)
			require.ErrorIs(t, err, comfyui.ErrCancelled)
		}
	}, comfyuitest.WithNode("Endless", comfyuitest.Steps(3600, time.Second)))
}

// The reply of Create is lost with the caller's patience: the record is there, with a lease that nobody renews. The same client
// takes it up when it is asked again.
func TestS36CreatedAndNeverAdmitted(t *testing.T) {
	t.Parallel()
	for _, later := range []time.Duration{time.Second, 5 * time.Minute} {
		t.Run(later.String(), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				ctx, cancel := context.WithCancel(b.ctx)
				defer cancel()
				c := b.client(comfyui.WithStore(storetest.Flaky(store, func(_ context.Context, method string) (error, bool) {
					if method == "Create" && ctx.Err() == nil {
						cancel()
						return errStoreDown, true
					}
					return nil, false
				})))
				_, err := c.Execute(ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				require.Equal(t, comfyui.CategoryContext, comfyui.CategoryOf(err))
				time.Sleep(later)
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				succeeded(t, r, err)
				assert.Equal(t, 1, b.ranOnce().Posts)
			})
		})
	}
}

// A job that waits for room on the pod is cancelled at once.
func TestS31CancelWhileItWaitsForRoom(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		c := b.client(comfyui.WithStore(store), comfyui.WithMaxInFlight(1))
		_, err := c.Submit(b.ctx, graphOf(t, "Endless", 1))
		require.NoError(t, err)
		for _, id := range []string{"", "the-job"} { // never looked for, and looked for
			ctx, cancel := context.WithCancel(b.ctx)
			opts := []comfyui.JobOption{comfyui.CancelWithContext()}
			if id != "" {
				opts = append(opts, comfyui.WithJobID(id))
			}
			time.AfterFunc(time.Second, cancel)
			var ended atomic.Bool
			_, err := c.Execute(ctx, graphOf(t, "Endless", 2), append(opts, comfyui.OnEvent(func(ev comfyui.Event) {
				ended.Store(ev.Kind == comfyui.EventCancelled)
			}))...)
			require.Equal(t, comfyui.CategoryContext, comfyui.CategoryOf(err))
			time.Sleep(time.Second)
			assert.True(t, ended.Load(), "id %q", id)
			cancel()
		}
		assert.Len(t, b.pod.Prompts(), 1)
	}, comfyuitest.WithNode("Endless", comfyuitest.Steps(3600, time.Second)))
}

// The end is not written, because another owner has the job: what was shown of it goes neither back nor from an end to something else.
func TestS35FencedAtTheEnd(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		var slow atomic.Bool
		c := b.client(comfyui.WithStore(storetest.Flaky(store, func(ctx context.Context, method string) (error, bool) {
			if method == "Update" && slow.Load() {
				_ = pause(ctx, 200*time.Millisecond)
			}
			return nil, false
		})))
		var log journal
		j, err := c.Submit(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"), log.option())
		require.NoError(t, err)
		time.Sleep(1950 * time.Millisecond)
		rec, err := store.Get(b.ctx, "the-job")
		require.NoError(t, err)
		require.NoError(t, store.Release(b.ctx, rec.Owner, []string{"the-job"}))
		_, err = store.Claim(b.ctx, "the-job", "somebody", 30*time.Second)
		require.NoError(t, err)
		slow.Store(true)
		for before, ended := j.Progress(), false; !ended; {
			select {
			case <-j.Done():
				ended = true
			case <-time.After(10 * time.Millisecond):
			}
			p := j.Progress()
			require.False(t, before.Status.Terminal() && p.Status != before.Status, "%s became %s", before.Status, p.Status)
			require.GreaterOrEqual(t, p.Fraction, before.Fraction)
			before = p
		}
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Equal(t, wentWell, log.states())
		log.sane(t)
		b.ranOnce()
	})
}

// Who follows a job and then drives it, because its owner has given it back, tells every state on the way.
func TestS35FollowerTellsEveryState(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		p := b.process(store, nil)
		var slow atomic.Bool
		c := b.client(comfyui.WithStore(storetest.Flaky(store, func(ctx context.Context, method string) (error, bool) {
			if method == "Get" && slow.Load() {
				_ = pause(ctx, 20*time.Second)
			}
			return nil, false
		})))
		b.raw("Work", 7)
		background(b, p, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
		time.Sleep(time.Second)
		var log journal
		j, err := c.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"), log.option())
		require.NoError(t, err)
		slow.Store(true)
		time.Sleep(4 * time.Second) // the job runs, as its record says, which the follower has not read
		require.NotContains(t, log.states(), comfyui.EventStarted)
		p.kill()
		rec, err := store.Get(b.ctx, "the-job")
		require.NoError(t, err)
		require.True(t, rec.Started)
		require.NoError(t, store.Release(b.ctx, rec.Owner, []string{"the-job"}))
		slow.Store(false)
		_, err = c.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Equal(t, wentWell[1:], log.states(), "it was queued before")
		for _, ev := range log.all() {
			assert.False(t, ev.Time.IsZero(), "%s has no time", ev.Kind)
		}
		b.untouched(r.PromptID)
	})
}

// A worker recovers the jobs that it finds, and is then asked for them again, with what is not stored: the file to upload.
func TestS36InputOfWhoJoins(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		p := b.process(store, nth(1, "pod before POST /upload"))
		w := func() *comfyui.Workflow {
			return parsed(t, `{"1":{"class_type":"LoadImage","inputs":{"image":"x.png"}},"2":{"class_type":"SaveImage","inputs":{"images":["1",0],"filename_prefix":"out"}}}`)
		}
		opts := []comfyui.JobOption{comfyui.WithJobID("the-job"), comfyui.WithInput("1", "image", "mine.png", func(context.Context) (io.ReadCloser, error) {
			var picture bytes.Buffer
			err := png.Encode(&picture, image.NewGray(image.Rect(0, 0, 8, 8)))
			return io.NopCloser(&picture), err
		})}
		background(b, p, w(), opts...)
		time.Sleep(time.Second)
		require.True(t, p.isDead())
		heir := b.client(comfyui.WithStore(store))
		for _, err := range heir.Recover(b.ctx) {
			require.NoError(t, err)
		}
		r, err := heir.Execute(b.ctx, w(), opts...)
		succeeded(t, r, err)
		assert.Equal(t, 1, b.ranOnce().Posts)
	})
}

// A job is lost to another owner and won back while a POST of the first time still hangs: nobody has cancelled it.
func TestS35WonBackUnderAHangingPost(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		c := b.client(comfyui.WithStore(store))
		b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.Hang, Times: 1})
		b.pod.Inject(comfyuitest.Fault{Route: "GET /queue", Effect: comfyuitest.Hang, Times: 1})
		time.AfterFunc(5*time.Second, func() {
			rec, err := store.Get(b.ctx, "the-job")
			if assert.NoError(t, err) {
				assert.NoError(t, store.Release(b.ctx, rec.Owner, []string{"the-job"}))
				_, err = store.Claim(b.ctx, "the-job", "somebody", time.Second)
				assert.NoError(t, err)
			}
		})
		r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
		succeeded(t, r, err)
		b.ranOnce()
		stored, err := store.Get(b.ctx, "the-job")
		require.NoError(t, err)
		assert.EqualValues(t, 3, stored.Epoch)
	})
}

// A process that closes gives its jobs back: a follower drives them a moment later.
func TestS35FollowerTakesOverFromCloser(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		first, second := b.client(comfyui.WithStore(store)), b.client(comfyui.WithStore(store))
		_, err := first.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		j, err := second.Attach(b.ctx, "the-job")
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		assert.Equal(t, 0, second.Stats().Owned)
		require.NoError(t, first.Close())
		time.Sleep(3 * time.Second)
		assert.Equal(t, 1, second.Stats().Owned)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Equal(t, 1, b.ranOnce().Posts)
	})
}

// Close cuts a POST off that the pod takes all the same; the next process finds it.
func TestS34ClosedInsideThePost(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 504, Delay: 5 * time.Second})
		c := b.client(comfyui.WithStore(store))
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
			assert.ErrorIs(t, err, comfyui.ErrClosed)
		})
		time.Sleep(time.Second)
		require.NoError(t, c.Close())
		wg.Wait()
		heir := b.client(comfyui.WithStore(store))
		r := recoverAll(b, heir)["the-job"]
		require.NotNil(t, r)
		assert.Equal(t, comfyui.StatusSucceeded, r.Status)
		assert.Equal(t, 1, b.ranOnce().Posts)
	})
}

// onRedis runs f with a pod over loopback TCP and a client's options for a store on a real redis-server.
func onRedis(t *testing.T, f func(t *testing.T, b *bench, s *redisServer, store *comfyui.RedisStore)) {
	t.Helper()
	server := startRedis(t)
	pod := comfyuitest.Start(t,
		comfyuitest.WithNode("Work", comfyuitest.Steps(4, 20*time.Millisecond)),
		comfyuitest.WithNode("Long", comfyuitest.Steps(100, 20*time.Millisecond)),
		comfyuitest.WithNode("Endless", comfyuitest.Steps(200, 500*time.Millisecond)),
	)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	store := newRedisStore(t, server.client(t, func(o *redis.Options) { o.MaxRetries = -1 }), comfyui.RedisCallTimeout(5*time.Second))
	f(t, &bench{t, pod, ctx}, server, store)
}

// brisk is a timing for real time.
var brisk = comfyui.WithTiming(comfyui.Timing{
	Request: 5 * time.Second, StreamWait: 500 * time.Millisecond, ReconnectMin: 20 * time.Millisecond, Poll: 50 * time.Millisecond,
	PollStreaming: 300 * time.Millisecond, Grace: 200 * time.Millisecond, Settle: 2 * time.Second, Lease: 2 * time.Second,
	ProgressWrite: 20 * time.Millisecond, StoreWait: 100 * time.Millisecond,
})

func TestS34RecoveryOnRedis(t *testing.T) {
	t.Parallel()
	onRedis(t, func(t *testing.T, b *bench, _ *redisServer, store *comfyui.RedisStore) {
		p := b.process(store, nil, brisk)
		for n := range 20 {
			background(b, p, graphOf(t, "Work", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
		}
		require.NoError(t, waitFor(b.ctx, func() bool { return b.pod.Requests("POST /prompt") >= 10 }))
		p.kill()
		one, other := b.client(comfyui.WithStore(store), brisk), b.client(comfyui.WithStore(store), brisk)
		var wg sync.WaitGroup
		var first, second map[string]*comfyui.Result
		wg.Go(func() { first = recoverAll(b, one) })
		wg.Go(func() { second = recoverAll(b, other) })
		wg.Wait()
		for id := range first {
			assert.NotContains(t, second, id, "two owners")
		}
		for n := range 20 {
			r, err := one.Execute(b.ctx, graphOf(t, "Work", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
			succeeded(t, r, err)
		}
		assert.Len(t, b.pod.Prompts(), 20)
		for _, prompt := range b.pod.Prompts() {
			assert.Equal(t, 1, prompt.Runs)
		}
	})
}

// waitFor looks until it is so.
func waitFor(ctx context.Context, so func() bool) error {
	for !so() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// What the store gives back is what the first caller was given, to the last field.
func TestS36StoredResultsAreEqual(t *testing.T) {
	t.Parallel()
	onRedis(t, func(t *testing.T, b *bench, _ *redisServer, store *comfyui.RedisStore) {
		c := b.client(comfyui.WithStore(store))
		for class, fails := range map[string]bool{"Work": false, "Nope": true} {
			opts := []comfyui.JobOption{comfyui.WithJobID(class), comfyui.WithLabels(map[string]string{"of": class})}
			first, firstErr := c.Execute(b.ctx, graphOf(t, class, 1), opts...)
			again, againErr := c.Execute(b.ctx, graphOf(t, class, 1), opts...)
			assert.Equal(t, fails, firstErr != nil, "%s: %v", class, firstErr)
			assert.Equal(t, fmt.Sprint(firstErr), fmt.Sprint(againErr))
			assert.True(t, reflect.DeepEqual(first, again), "%s: %+v and %+v", class, first, again)
		}
	})
}

func TestS35FencedOnRedis(t *testing.T) {
	t.Parallel()
	onRedis(t, func(t *testing.T, b *bench, _ *redisServer, store *comfyui.RedisStore) {
		p := b.process(store, nil, brisk)
		j, err := p.Submit(b.ctx, graphOf(t, "Endless", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		p.stop()
		heir := b.client(comfyui.WithStore(store), brisk)
		theirs := recovered(b, heir)
		require.Len(t, theirs, 1)
		p.cont()
		require.NoError(t, waitFor(b.ctx, func() bool { return p.Stats().Owned == 0 }))
		require.NoError(t, j.Cancel(b.ctx), "a follower's cancel goes by the record")
		for _, j := range []*comfyui.Job{j, theirs[0]} {
			_, err := j.Wait(b.ctx)
			require.ErrorIs(t, err, comfyui.ErrCancelled)
		}
		stored, err := store.Get(b.ctx, "the-job")
		require.NoError(t, err)
		assert.EqualValues(t, 2, stored.Epoch)
		assert.Equal(t, comfyui.StatusCancelled, stored.Progress.Status)
		assert.Equal(t, 1, b.ranOnce().Posts)
	})
}

func recovered(b *bench, c *comfyui.PodClient) (jobs []*comfyui.Job) {
	b.t.Helper()
	for j, err := range c.Recover(b.ctx) {
		require.NoError(b.t, err)
		jobs = append(jobs, j)
	}
	return jobs
}

func TestS40Schema(t *testing.T) {
	t.Parallel()
	onRedis(t, func(t *testing.T, b *bench, server *redisServer, store *comfyui.RedisStore) {
		raw := server.client(t, nil)
		change := func(id, from, to string) {
			t.Helper()
			keys, err := raw.Keys(b.ctx, "*job:"+id).Result()
			require.NoError(t, err)
			require.Len(t, keys, 1)
			record, err := raw.HGet(b.ctx, keys[0], "record").Result()
			require.NoError(t, err)
			require.Contains(t, record, from)
			require.NoError(t, raw.HSet(b.ctx, keys[0], "record", strings.Replace(record, from, to, 1)).Err())
			if strings.Contains(to, `"schema":2`) {
				require.NoError(t, raw.HSet(b.ctx, keys[0], "schema", "2").Err())
			}
		}
		p := b.process(store, nil, brisk)
		for n, id := range []string{"newer", "extended"} {
			_, err := p.Submit(b.ctx, graphOf(t, "Long", n), comfyui.WithJobID(id))
			require.NoError(t, err)
		}
		time.Sleep(100 * time.Millisecond) // the writes that follow acceptance
		p.kill()
		change("newer", `"schema":1`, `"schema":2`)
		change("extended", `"schema":1`, `"schema":1,"colour":"green"`)

		heir := b.client(comfyui.WithStore(store), brisk)
		_, err := heir.Execute(b.ctx, graphOf(t, "Long", 0), comfyui.WithJobID("newer"))
		require.ErrorIs(t, err, comfyui.ErrSchema)
		assert.ErrorContains(t, err, "newer version of the library")
		_, err = heir.Attach(b.ctx, "newer")
		require.ErrorIs(t, err, comfyui.ErrSchema)

		var refused error
		taken := 0
		for j, err := range heir.Recover(b.ctx) {
			if err != nil {
				refused = errors.Join(refused, err)
				continue
			}
			taken++
			r, err := j.Wait(b.ctx)
			succeeded(t, r, err)
		}
		require.ErrorIs(t, refused, comfyui.ErrSchema)
		assert.Equal(t, 1, taken, "the walk goes on")
		keys, err := raw.Keys(b.ctx, "*job:extended").Result()
		require.NoError(t, err)
		record, err := raw.HGet(b.ctx, keys[0], "record").Result()
		require.NoError(t, err)
		assert.Contains(t, record, `"colour":"green"`)
		assert.Contains(t, record, `"status":"succeeded"`)
		newer, err := raw.Keys(b.ctx, "*job:newer").Result()
		require.NoError(t, err)
		record, err = raw.HGet(b.ctx, newer[0], "record").Result()
		require.NoError(t, err)
		assert.Contains(t, record, `"schema":2`, "nobody has touched it")
	})
}

// An attempt that fails before the reply to its POST has come does not keep the next one from being posted.
func TestS8FailureBeforeTheReply(t *testing.T) {
	t.Parallel()
	for _, wait := range []time.Duration{100 * time.Millisecond, 10 * time.Second} {
		t.Run(wait.String(), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				c := b.client(comfyui.WithRetry(comfyui.CategoryOutOfMemory, comfyui.RetryPolicy{MaxAttempts: 2, InitialInterval: wait}))
				ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
				defer cancel()
				r, err := c.Execute(ctx, graphOf(t, "Memory", 1))
				succeeded(t, r, err)
				assert.Equal(t, 2, r.Attempt)
			}, comfyuitest.WithNode("Memory", failsFirst()), comfyuitest.WithHandler(func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method != http.MethodPost || r.URL.Path != "/prompt" {
						next.ServeHTTP(w, r)
						return
					}
					reply := httptest.NewRecorder()
					next.ServeHTTP(reply, r)
					time.Sleep(3 * time.Second)
					w.WriteHeader(reply.Code)
					_, _ = w.Write(reply.Body.Bytes())
				})
			}))
		})
	}
}

// Who leaves the loop early drives what it was given, and leaves the rest to others at once.
func TestS35LoopLeftEarly(t *testing.T) {
	t.Parallel()
	for _, after := range []int{1, 7} {
		t.Run(fmt.Sprint(after), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				p := b.process(store, nil)
				for n := range 40 {
					background(b, p, graphOf(t, "Work", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
				}
				time.Sleep(time.Second)
				p.kill()
				time.Sleep(time.Minute)
				one, other := b.client(comfyui.WithStore(store)), b.client(comfyui.WithStore(store))
				taken := 0
				for _, err := range one.Recover(b.ctx) {
					require.NoError(t, err)
					if taken++; taken == after {
						break
					}
				}
				assert.Equal(t, after, one.Stats().Owned)
				begun := time.Now()
				rest := 0
				for _, err := range other.Recover(b.ctx) {
					require.NoError(t, err)
					rest++
					assert.Zero(t, time.Since(begun), "nothing is held")
				}
				assert.Equal(t, 40, taken+rest)
				for range one.Recover(b.ctx) {
					t.Error("each has an owner")
				}
			})
		})
	}
}

// A panic in the loop over Recover leaves nothing behind.
func TestS35LoopPanics(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		p := b.process(store, nil)
		for n := range 40 {
			background(b, p, graphOf(t, "Work", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
		}
		time.Sleep(time.Second)
		p.kill()
		time.Sleep(time.Minute)
		c := b.client(comfyui.WithStore(store))
		assert.PanicsWithValue(t, "mine", func() {
			for range c.Recover(b.ctx) {
				panic("mine")
			}
		})
		require.NoError(t, c.Close())
	})
}

// The pod restarts while nobody drives the job: whoever takes it over then has seen nothing of that, however long it has been
// connected, and must not say that somebody removed the job.
func TestS34PodRestartsWhileNobodyLooks(t *testing.T) {
	t.Parallel()
	for _, connected := range []bool{false, true} {
		t.Run(fmt.Sprintf("connected=%t", connected), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				p := b.process(store, nil)
				background(b, p, graphOf(t, "Long", 1), comfyui.WithJobID("before"))
				time.Sleep(time.Second)
				background(b, p, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				time.Sleep(3 * time.Second)
				p.kill()
				left, err := store.Get(b.ctx, "the-job")
				require.NoError(t, err)
				require.True(t, left.Accepted)
				require.False(t, left.Started)
				b.pod.Restart(time.Second)
				time.Sleep(2 * time.Second)

				heir := b.client(comfyui.WithStore(store))
				if connected {
					_, err := heir.Submit(b.ctx, graphOf(t, "Long", 7))
					require.NoError(t, err)
				}
				time.Sleep(time.Minute)
				r := recoverAll(b, heir)["the-job"]
				require.NotNil(t, r)
				_, err = heir.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				require.NotErrorIs(t, err, comfyui.ErrRemoved)
				require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
			})
		})
	}
}

// The store is away while Recover waits for the leases of a dead process to run out: that is told, and the jobs are taken over when
// it is back.
func TestS35StoreAwayWhileRecoverWaits(t *testing.T) {
	t.Parallel()
	for _, away := range []time.Duration{3 * time.Second, time.Minute} {
		for _, hangs := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v/hangs=%t", away, hangs), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					const jobs = 20
					o, store := &outage{hangs: hangs}, comfyui.NewMemoryStore()
					p := b.process(store, nil)
					for n := range jobs {
						background(b, p, graphOf(t, "Work", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
					}
					time.Sleep(time.Second)
					p.kill()
					heir := b.client(comfyui.WithStore(storetest.Flaky(store, o.call)))
					time.AfterFunc(28*time.Second, func() { o.down.Store(true) })
					time.AfterFunc(28*time.Second+away, func() { o.down.Store(false) })
					taken, failures := 0, 0
					for j, err := range heir.Recover(b.ctx) {
						if err != nil {
							failures++
							assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err))
							continue
						}
						taken++
						r, err := j.Wait(b.ctx)
						succeeded(t, r, err)
					}
					assert.Equal(t, jobs, taken)
					assert.LessOrEqual(t, failures, jobs, "each is told of once")
					for _, prompt := range b.pod.Prompts() {
						assert.Equal(t, 1, prompt.Posts)
						assert.Equal(t, 1, prompt.Runs)
					}
				})
			})
		}
	}
	t.Run("for good", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			o, store := &outage{}, comfyui.NewMemoryStore()
			p := b.process(store, nil)
			background(b, p, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
			time.Sleep(time.Second)
			p.kill()
			heir := b.client(comfyui.WithStore(storetest.Flaky(store, o.call)))
			time.AfterFunc(5*time.Second, func() { o.down.Store(true) })
			begun, failures := time.Now(), 0
			for _, err := range heir.Recover(b.ctx) {
				require.Error(t, err)
				failures++
			}
			assert.Equal(t, 1, failures)
			assert.LessOrEqual(t, time.Since(begun), 5*time.Minute, "it ends")
		})
	})
}

// A follower's claim takes effect and its reply is lost: the lease is its own, and it drives the job at once.
func TestS35ClaimWithoutAReply(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		p := b.process(store, nil)
		background(b, p, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
		time.Sleep(5 * time.Second)
		var lost atomic.Bool
		follower := b.client(comfyui.WithStore(storetest.Flaky(store, func(_ context.Context, method string) (error, bool) {
			if r, _ := store.Get(b.ctx, "the-job"); method == "Claim" && r.LeaseUntil.Before(time.Now()) && !lost.Swap(true) {
				return errStoreDown, true
			}
			return nil, false
		})))
		_, err := follower.Attach(b.ctx, "the-job")
		require.NoError(t, err)
		p.kill()
		for !lost.Load() {
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(3 * time.Second)
		assert.Equal(t, 1, follower.Stats().Owned)
	})
}

// Who closes with more to write than there is time for gives all leases back nevertheless.
func TestS35CloseWithMuchToWrite(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		const jobs = 200
		var slow atomic.Bool
		memory := comfyui.NewMemoryStore()
		store := storetest.Flaky(memory, func(_ context.Context, method string) (error, bool) {
			if method == "Update" && slow.Load() {
				time.Sleep(20 * time.Millisecond)
			}
			return nil, false
		})
		// Nothing is written in time, so that there is much to write at the end.
		c := b.client(comfyui.WithStore(store), comfyui.WithTiming(comfyui.Timing{ProgressWrite: time.Hour}))
		for n := range jobs {
			_, err := c.Submit(b.ctx, graphOf(b.t, "Long", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
			require.NoError(b.t, err)
		}
		b.raw("Long", 1000)
		time.Sleep(2 * time.Minute) // the jobs move up
		slow.Store(true)
		require.NoError(b.t, c.Close())
		for n := range jobs {
			rec, err := memory.Get(b.ctx, fmt.Sprint("job-", n))
			require.NoError(b.t, err)
			assert.True(b.t, rec.Progress.Status.Terminal() || rec.LeaseUntil.IsZero(), "%s is held until %s", rec.JobID, rec.LeaseUntil)
		}
	})
}

// The job is lost to another owner and won back while a cancel of the first time still hangs: the next one is made all the same.
func TestS35WonBackUnderAHangingCancel(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		c := b.client(comfyui.WithStore(store))
		j, err := c.Submit(b.ctx, graphOf(t, "Hour", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		time.Sleep(2 * time.Second)
		b.pod.Inject(comfyuitest.Fault{Route: "POST /jobs", Effect: comfyuitest.Hang, Times: 1})
		time.AfterFunc(5*time.Second, func() { // until the cancel has ended by Request
			rec, err := store.Get(b.ctx, "the-job")
			if assert.NoError(t, err) {
				assert.NoError(t, store.Release(b.ctx, rec.Owner, []string{"the-job"}))
				_, err = store.Claim(b.ctx, "the-job", "somebody", 90*time.Second)
				assert.NoError(t, err)
			}
		})
		require.NoError(t, j.Cancel(b.ctx))
		_, err = j.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrCancelled)
		assert.Zero(t, b.ranOnce().Ends)
	}, comfyuitest.WithVersion("0.33.0"), comfyuitest.WithNode("Hour", comfyuitest.Steps(720, 5*time.Second)))
}
