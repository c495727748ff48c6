//go:build unix

package comfyui_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

var kills = flag.Int("kills", 30, "how many processes TestKill kills")

// TestKill kills worker processes with SIGKILL while they run jobs on a pod, with their records in Redis, and has others recover
// the jobs. Half of the kills come at every step in turn (right before or after the n-th write to Redis or to the pod, or after
// the n-th answer), half at random times; some processes have a living rival, and some are stopped past their leases and go on.
// In the end every job must have ended right and have run once.
//
//	go test -run 'TestKill$' -kills 1000 -seed 7 -v .
func TestKill(t *testing.T) {
	exe, err := os.Executable()
	require.NoError(t, err)
	h := &killer{t: t, exe: exe, redis: startRedis(t), sum: killSum{states: map[string]int{}}}
	lanes := min(12, max(1, *kills/5))
	var wg sync.WaitGroup
	for n := range lanes {
		quota := *kills / lanes
		if n < *kills%lanes {
			quota++
		}
		lane := h.newLane(n, lanes)
		wg.Go(func() { lane.run(quota) })
	}
	wg.Wait()
	s := &h.sum
	t.Logf("seed %d: %d jobs, %d kills (%d at a step, %d at random, %d of a rival), %d stopped past the lease; %d ended right, %d run twice, %d lost; %d posted twice and removed in time",
		*seed, s.jobs, s.stepKills+s.randomKills+s.rivalKills, s.stepKills, s.randomKills, s.rivalKills, s.stops, s.right, s.twice, s.lost, s.reposted)
	for _, state := range killStates {
		t.Logf("%5d × a job was %s when its process was killed", s.states[state], state)
		if *kills >= 500 {
			assert.NotZero(t, s.states[state], state)
		}
	}
	require.Zero(t, s.lost, "lost")
	require.Zero(t, s.twice, "run twice")
	require.Equal(t, s.jobs, s.right, "ended right")
}

// killer is what the lanes of a TestKill share.
type killer struct {
	t     *testing.T
	exe   string
	redis *redisServer

	mu  sync.Mutex
	sum killSum
}

type killSum struct {
	jobs, right, twice, lost, reposted        int
	stepKills, randomKills, rivalKills, stops int
	states                                    map[string]int
}

// killStates are where a job can be when its process dies, as its record and the pod tell.
var killStates = []string{
	"not recorded", "recorded and not posted", "posted, the reply lost", "pending on the pod", "running", "finished and not read", "waiting for its next attempt", "ended",
}

func (h *killer) add(f func(*killSum)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(&h.sum)
}

// lane is one pod with its own records in Redis; its rounds come one after another.
type lane struct {
	*killer
	n, lanes int
	rng      *rand.Rand
	pod      *comfyuitest.Pod
	prefix   string
	store    *comfyui.RedisStore
	round    int
	steps    int // kills at a step so far
	left     int // kills to do
}

func (h *killer) newLane(n, lanes int) *lane {
	l := &lane{
		killer: h, n: n, lanes: lanes, rng: rand.New(rand.NewPCG(*seed, uint64(n))), //nolint:gosec // repeatable is the point
		prefix: fmt.Sprintf("kill-%d", n),
	}
	l.pod = comfyuitest.Start(h.t,
		comfyuitest.WithNode("Quick", comfyuitest.Steps(1, 0)),
		comfyuitest.WithNode("Work", comfyuitest.Steps(4, 15*time.Millisecond)),
		comfyuitest.WithNode("Long", comfyuitest.Steps(200, 50*time.Millisecond)),
		comfyuitest.WithNode("Memory", comfyuitest.Node{Output: true, Run: failFirst()}),
	)
	var err error
	l.store, err = comfyui.NewRedisStore(h.redis.client(h.t, nil), comfyui.RedisPrefix(l.prefix), comfyui.RedisShards(2))
	require.NoError(h.t, err)
	return l
}

// failFirst runs out of memory on the first attempt of a job: each has a seed of its own.
func failFirst() func(context.Context, *comfyuitest.Call) error {
	var seen sync.Map
	return func(_ context.Context, c *comfyuitest.Call) error {
		if _, again := seen.LoadOrStore(fmt.Sprint(c.Inputs["seed"]), true); !again {
			return &comfyuitest.NodeError{ExceptionType: "torch.OutOfMemoryError", Message: "Allocation on device"}
		}
		c.Put("text", "enough")
		return nil
	}
}

// killJob is a job of a round.
type killJob struct {
	ID     string
	Class  string
	Seed   int
	Cancel bool
}

// killPlan is what a child is told.
type killPlan struct {
	Redis, Prefix, Pod string
	Jobs               []killJob
	Submit             bool   // else it only recovers
	Site               string // where it kills itself; "": nowhere
	N                  int64  // at which event there
}

var killSites = []string{"redis before write", "redis after write", "redis after read", "pod before write", "pod after write", "pod after read"}

// killDepth is how many events of a site are tried in turn.
const killDepth = 40

func (l *lane) run(quota int) {
	l.left = quota
	for l.left > 0 && !l.t.Failed() {
		l.round++
		l.runRound()
	}
}

func (l *lane) jobs() []killJob {
	job := func(n int, class string, cancel bool) killJob {
		return killJob{ID: fmt.Sprintf("%d-%d-%d", l.n, l.round, n), Class: class, Seed: l.round*10 + n, Cancel: cancel}
	}
	jobs := []killJob{job(0, "Work", false), job(1, "Quick", false)}
	if l.rng.IntN(2) == 0 {
		jobs = append(jobs, job(2, "Memory", false))
	}
	if l.rng.IntN(4) == 0 {
		jobs = append(jobs, job(3, "Long", true))
	}
	return jobs
}

// runRound kills processes over the same few jobs, and then lets one finish them.
func (l *lane) runRound() {
	plan := killPlan{Redis: l.redis.addr, Prefix: l.prefix, Pod: l.pod.URL(), Jobs: l.jobs(), Submit: true}
	var stopped *killedChild
	for n := 1 + l.rng.IntN(4); n > 0 && l.left > 0; n-- {
		switch l.rng.IntN(8) {
		case 0:
			if stopped == nil {
				stopped = l.stopOne(plan)
			}
		case 1:
			l.killRival(plan)
		case 2, 3, 4:
			l.killAtStep(plan)
		default:
			l.killAtRandom(plan)
		}
		plan.Submit = l.rng.IntN(3) > 0
	}
	plan.Submit = true
	last := l.start(plan)
	if stopped != nil {
		// It comes back while another works, or has worked, on its jobs.
		time.Sleep(time.Duration(l.rng.IntN(1500)) * time.Millisecond)
		stopped.signal(syscall.SIGCONT)
	}
	said := l.results(last)
	if stopped != nil {
		l.agree(plan, stopped, said)
	}
	l.count(plan, said)
}

func (l *lane) killAtStep(plan killPlan) {
	i := l.n + l.lanes*l.steps
	l.steps++
	plan.Site, plan.N = killSites[i%len(killSites)], int64(1+i/len(killSites)%killDepth)
	child := l.start(plan)
	if child.killed() {
		l.killedOne(plan, func(s *killSum) { s.stepKills++ })
	}
}

func (l *lane) killAtRandom(plan killPlan) {
	child := l.start(plan)
	time.Sleep(l.soon())
	child.signal(syscall.SIGKILL)
	if child.killed() {
		l.killedOne(plan, func(s *killSum) { s.randomKills++ })
	}
}

// killedOne counts a kill, and where it found the jobs.
func (l *lane) killedOne(plan killPlan, kind func(*killSum)) {
	l.left--
	states := make([]string, len(plan.Jobs))
	prompts := l.pod.Prompts()
	for i, j := range plan.Jobs {
		record, err := l.store.Get(context.Background(), j.ID)
		if errors.Is(err, comfyui.ErrJobNotFound) {
			states[i] = "not recorded"
			continue
		}
		require.NoError(l.t, err)
		states[i] = stateOf(j, record, prompts)
	}
	l.add(func(s *killSum) {
		kind(s)
		for _, state := range states {
			s.states[state]++
		}
	})
}

func stateOf(j killJob, record *comfyui.Record, prompts []comfyuitest.Prompt) string {
	at := slices.IndexFunc(prompts, func(p comfyuitest.Prompt) bool { return p.ID == record.PromptID })
	switch {
	case record.Progress.Status.Terminal():
		return "ended"
	case at < 0 && record.Attempt > 1:
		return "waiting for its next attempt"
	case at < 0:
		return "recorded and not posted"
	case !record.Accepted:
		return "posted, the reply lost"
	case prompts[at].Runs == 0:
		return "pending on the pod"
	case prompts[at].Ends > 0 || j.Class == "Memory" && record.Attempt == 1: // which fails at once
		return "finished and not read"
	}
	return "running"
}

// killRival kills one of two processes that want the same jobs.
func (l *lane) killRival(plan killPlan) {
	one, other := l.start(plan), l.start(plan)
	time.Sleep(l.soon())
	one.signal(syscall.SIGKILL)
	if one.killed() {
		l.killedOne(plan, func(s *killSum) { s.rivalKills++ })
	}
	time.Sleep(l.soon())
	other.signal(syscall.SIGKILL)
	if other.killed() {
		l.killedOne(plan, func(s *killSum) { s.rivalKills++ })
	}
}

// stopOne stops a process, and lets its leases run out.
func (l *lane) stopOne(plan killPlan) *killedChild {
	plan.Submit = true
	child := l.start(plan)
	time.Sleep(l.soon())
	child.signal(syscall.SIGSTOP)
	l.add(func(s *killSum) { s.stops++ })
	time.Sleep(killLease + killLease/4)
	return child
}

func (l *lane) soon() time.Duration {
	most := 300
	if l.rng.IntN(3) == 0 {
		most = 1800 // past the end of a former owner's lease
	}
	return time.Duration(l.rng.IntN(most*1000)) * time.Microsecond
}

// killedResult is what a child says of a job.
type killedResult struct {
	ID      string
	Status  comfyui.Status
	Attempt int
	Err     string
}

// results waits for a child that nobody kills.
func (l *lane) results(c *killedChild) map[string]killedResult {
	said := map[string]killedResult{}
	select {
	case <-c.ended:
	case <-time.After(time.Minute):
		c.signal(syscall.SIGQUIT) // its goroutines are worth seeing
		<-c.ended
		l.t.Errorf("lane %d round %d: a process did not finish:\n%s", l.n, l.round, c.stderr.Bytes())
		return said
	}
	for line := range strings.Lines(c.stdout.String()) {
		var r killedResult
		if json.Unmarshal([]byte(line), &r) == nil && r.ID != "" {
			said[r.ID] = r
		}
	}
	if len(said) == 0 {
		l.t.Logf("lane %d round %d: a process said nothing: %v\n%s%s", l.n, l.round, c.cmd.ProcessState, c.stdout.String(), c.stderr.String())
	}
	return said
}

// agree holds a process that was stopped past its leases to what the one says that took them over.
func (l *lane) agree(plan killPlan, stopped *killedChild, said map[string]killedResult) {
	for id, r := range l.results(stopped) {
		if other := said[id]; other.Status != r.Status || other.Attempt != r.Attempt {
			l.t.Errorf("lane %d round %d: job %s is %+v for the process that was stopped, %+v for the other", l.n, l.round, id, r, other)
		}
	}
}

// count holds what the last process says to what the pod and Redis say.
func (l *lane) count(plan killPlan, said map[string]killedResult) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := l.pod.WaitIdle(ctx); err != nil {
		l.t.Errorf("lane %d round %d: the pod still runs something", l.n, l.round)
	}
	prompts := map[string][]comfyuitest.Prompt{}
	for _, p := range l.pod.Prompts() {
		var marker struct {
			JobID string `json:"job_id"`
		}
		_ = json.Unmarshal(p.ExtraData["comfyui_go"], &marker)
		prompts[marker.JobID] = append(prompts[marker.JobID], p)
	}
	for _, j := range plan.Jobs {
		wanted, attempts := comfyui.StatusSucceeded, 1
		switch {
		case j.Cancel:
			wanted = comfyui.StatusCancelled
		case j.Class == "Memory":
			attempts = 2
		}
		runs, posts, ends := 0, 0, 0
		for _, p := range prompts[j.ID] {
			runs += p.Runs
			posts += p.Posts
			ends += p.Ends
		}
		record, err := l.store.Get(ctx, j.ID)
		lost := err != nil || !record.Progress.Status.Terminal() || said[j.ID].Status == ""
		twice := runs > attempts || ends > 1 || len(prompts[j.ID]) > attempts
		right := !lost && !twice && said[j.ID].Status == wanted && record.Progress.Status == wanted && said[j.ID].Attempt == record.Attempt &&
			(j.Cancel || runs == attempts && ends == 1 && record.Attempt == attempts)
		l.add(func(s *killSum) {
			s.jobs++
			s.right += asInt(right)
			s.twice += asInt(twice)
			s.lost += asInt(lost)
			s.reposted += max(0, posts-max(runs, 1))
		})
		if !right {
			l.t.Logf("lane %d round %d: job %s (%s): said %+v, stored %+v (%v), pod: %d prompts, %d posts, %d runs, %d ends",
				l.n, l.round, j.ID, j.Class, said[j.ID], record, err, len(prompts[j.ID]), posts, runs, ends)
		}
	}
}

func asInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// killedChild is a worker process.
type killedChild struct {
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
	stdin          io.Closer
	ended          chan struct{}
}

// start returns when the child has begun to work.
func (l *lane) start(plan killPlan) *killedChild {
	text, err := json.Marshal(plan)
	require.NoError(l.t, err)
	c := &killedChild{cmd: exec.Command(l.exe, "-test.run=^TestKillWorker$"), ended: make(chan struct{})} //nolint:gosec,noctx // this very program; killed by Cleanup
	c.cmd.Env = append(os.Environ(), killEnv+"="+string(text))
	c.stdin, err = c.cmd.StdinPipe()
	require.NoError(l.t, err)
	out, err := c.cmd.StdoutPipe()
	require.NoError(l.t, err)
	c.cmd.Stderr = &c.stderr
	require.NoError(l.t, c.cmd.Start())
	l.t.Cleanup(func() {
		c.signal(syscall.SIGKILL)
		<-c.ended
	})
	begun := make(chan struct{})
	go func() {
		defer close(c.ended)
		lines := bufio.NewReader(out)
		_, _ = lines.ReadString('\n')
		close(begun)
		_, _ = io.Copy(&c.stdout, lines)
		_ = c.cmd.Wait()
	}()
	<-begun
	return c
}

func (c *killedChild) signal(s syscall.Signal) { _ = c.cmd.Process.Signal(s) }

// killed waits for the child's end and tells whether it was killed.
func (c *killedChild) killed() bool {
	<-c.ended
	status, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}

// ------------------------------------------------------------ the worker

const (
	killEnv   = "COMFYUI_KILL_WORKER"
	killLease = time.Second
)

// TestKillWorker is the process that TestKill kills: a worker that recovers what is there and executes its jobs.
func TestKillWorker(t *testing.T) {
	text := os.Getenv(killEnv)
	if text == "" {
		t.Skip("only run by TestKill")
	}
	var plan killPlan
	require.NoError(t, json.Unmarshal([]byte(text), &plan))
	go func() { // no worker outlives its test
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(3)
	}()
	w := newKillWorker(t, plan)
	fmt.Println("ready")
	w.work()
	os.Exit(0)
}

type killWorker struct {
	plan   killPlan
	client *comfyui.PodClient
	store  comfyui.Store
	events atomic.Int64
}

func newKillWorker(t *testing.T, plan killPlan) *killWorker {
	w := &killWorker{plan: plan}
	store, err := comfyui.NewRedisStore(redis.NewClient(&redis.Options{
		Addr: plan.Redis, Dialer: w.dial("redis"),
	}), comfyui.RedisPrefix(plan.Prefix), comfyui.RedisShards(2))
	require.NoError(t, err)
	w.store = store
	w.client, err = comfyui.NewPodClient(plan.Pod,
		comfyui.WithPodName("pod"), comfyui.WithStore(store),
		comfyui.WithHTTPClient(&http.Client{Transport: &http.Transport{DialContext: w.dial("pod")}}),
		comfyui.WithRetry(comfyui.CategoryOutOfMemory, comfyui.RetryPolicy{MaxAttempts: 2, InitialInterval: 100 * time.Millisecond}),
		comfyui.WithTiming(comfyui.Timing{
			Request: 5 * time.Second, StreamWait: 200 * time.Millisecond, ReconnectMin: 20 * time.Millisecond, Poll: 50 * time.Millisecond,
			PollStreaming: 300 * time.Millisecond, Grace: 300 * time.Millisecond, Settle: time.Second, Lease: killLease,
			ProgressWrite: 20 * time.Millisecond,
		}))
	require.NoError(t, err)
	return w
}

// work ends when every job of the plan that is known has ended.
func (w *killWorker) work() {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		for j, err := range w.client.Recover(ctx) {
			if err != nil {
				fmt.Fprintln(os.Stderr, "recover:", err)
				continue
			}
			wg.Go(func() { _, _ = j.Wait(ctx) })
		}
	})
	for _, job := range w.plan.Jobs {
		wg.Go(func() { w.one(ctx, job) })
	}
	wg.Wait()
}

func (w *killWorker) one(ctx context.Context, job killJob) {
	graph, err := comfyui.ParseWorkflow(fmt.Appendf(nil, `{"1":{"class_type":%q,"inputs":{"seed":%d}}}`, job.Class, job.Seed))
	if err != nil {
		panic(err)
	}
	var j *comfyui.Job
	if w.plan.Submit {
		j, err = w.client.Submit(ctx, graph, comfyui.WithJobID(job.ID))
	} else {
		j, err = w.client.Attach(ctx, job.ID)
	}
	var result *comfyui.Result
	if err == nil {
		if job.Cancel {
			_ = j.Cancel(ctx)
		}
		result, err = j.Wait(ctx)
	}
	if errors.Is(err, comfyui.ErrJobNotFound) && !w.plan.Submit {
		return
	}
	said := killedResult{ID: job.ID}
	if result != nil {
		said.Status, said.Attempt = result.Status, result.Attempt
	} else {
		var e *comfyui.Error
		if errors.As(err, &e) && e.Status.Terminal() { // the pod refused it: the record tells the same
			said.Status, said.Attempt = e.Status, e.Attempt
		}
	}
	if err != nil {
		said.Err = err.Error()
	}
	line, _ := json.Marshal(said)
	fmt.Printf("%s\n", line)
}

// dial makes connections that kill the process at the plan's event.
func (w *killWorker) dial(peer string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	var d net.Dialer
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := d.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &killConn{conn, peer, w}, nil
	}
}

func (w *killWorker) pass(site string) {
	if site == w.plan.Site && w.events.Add(1) == w.plan.N {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

type killConn struct {
	net.Conn
	peer string
	w    *killWorker
}

func (c *killConn) Write(p []byte) (int, error) {
	c.w.pass(c.peer + " before write")
	n, err := c.Conn.Write(p)
	c.w.pass(c.peer + " after write")
	return n, err
}

func (c *killConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.w.pass(c.peer + " after read")
	return n, err
}

// A real server stops answering under running jobs: they end, and their records land after.
func TestS37RedisAway(t *testing.T) {
	t.Parallel()
	onRedis(t, func(t *testing.T, b *bench, server *redisServer, store *comfyui.RedisStore) {
		c := b.client(comfyui.WithStore(store), brisk)
		var jobs []*comfyui.Job
		for n := range 50 {
			j, err := c.Submit(b.ctx, graphOf(t, "Work", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
			require.NoError(t, err)
			jobs = append(jobs, j)
		}
		require.NoError(t, server.cmd.Process.Signal(syscall.SIGSTOP))
		ended := 0
		for _, j := range jobs {
			r, err := j.Wait(b.ctx)
			succeeded(t, r, err)
			ended++
		}
		require.NoError(t, server.cmd.Process.Signal(syscall.SIGCONT))
		assert.Equal(t, len(jobs), ended)
		assert.NotZero(t, c.Stats().StorePending)
		require.NoError(t, waitFor(b.ctx, func() bool { return c.Stats().StorePending == 0 }))
		for n := range 50 {
			r, err := store.Get(b.ctx, fmt.Sprint("job-", n))
			require.NoError(t, err)
			assert.Equal(t, comfyui.StatusSucceeded, r.Progress.Status)
		}
		for _, prompt := range b.pod.Prompts() {
			assert.Equal(t, 1, prompt.Posts)
			assert.Equal(t, 1, prompt.Runs)
		}
	})
}
