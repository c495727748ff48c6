package comfyui_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

// The tests of this file count: so many cuts, lost replies, restarts, cancels; so many missed ends, second runs, wrong hits. Each
// has a number that it does with -scale 1, a small part of which is done by default. What they do is drawn from -seed and the
// number of the trial, which is also the name of the subtest, so that one trial can be done again:
//
//	go test -run Reliability -scale 1 -seed 7 -v .
//	go test -run 'TestS12Reliability$/^17$' -scale 1 -seed 7 .
//
// Time is virtual, but the order in which goroutines run within one moment is the scheduler's: a rare failure may take some -count.
var (
	seed  = flag.Uint64("seed", 1, "what the Reliability tests and TestKill do is drawn from it")
	scale = flag.Float64("scale", 0.01, "which part of their counts the Reliability tests do; 1: all")
)

// scaled is a count under -scale, and not less than the least.
func scaled(count, least int) int { return max(least, int(math.Ceil(float64(count)**scale))) }

// tally is what the trials of a test have counted.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
}

func (s *tally) add(what string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what] += n
}

func (s *tally) get(what string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts[what]
}

// line is the summary: the counts, those of zero too.
func (s *tally) line(names ...string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var parts []string
	for _, name := range names {
		parts = append(parts, fmt.Sprintf("%d %s", s.counts[name], name))
	}
	return fmt.Sprintf("seed %d, scale %v: %s", *seed, *scale, strings.Join(parts, ", "))
}

// pace is a Timing under which a trial is done.
type pace struct {
	name   string
	timing comfyui.Timing
}

// paces are the default, one of a client in a hurry, and one of a client that looks seldom.
var paces = []pace{
	{"default", comfyui.Timing{}},
	{"hasty", comfyui.Timing{
		Connect: time.Second, Request: 5 * time.Second, StreamWait: 200 * time.Millisecond, Ping: 3 * time.Second, ReconnectMin: 20 * time.Millisecond,
		ReconnectMax: time.Second, Poll: 100 * time.Millisecond, PollStreaming: time.Second, Grace: 2 * time.Second, Settle: time.Second,
		Cancel: 5 * time.Second, Lease: 5 * time.Second, StoreWait: 100 * time.Millisecond, ProgressWrite: 50 * time.Millisecond,
	}},
	{"lazy", comfyui.Timing{
		StreamWait: time.Nanosecond, Ping: 50 * time.Second, ReconnectMin: 5 * time.Second, ReconnectMax: 2 * time.Minute, Poll: 7 * time.Second,
		PollStreaming: 50 * time.Second, Grace: 30 * time.Second, Settle: 40 * time.Second, Lease: 2 * time.Minute, ProgressWrite: 10 * time.Second,
	}},
}

// poll and pollStreaming are the periods in force.
func (p pace) poll() time.Duration          { return cmp.Or(p.timing.Poll, time.Second) }
func (p pace) pollStreaming() time.Duration { return cmp.Or(p.timing.PollStreaming, 15*time.Second) }
func (p pace) grace() time.Duration         { return cmp.Or(p.timing.Grace, 10*time.Second) }

// trial is one part of a test: a pod in a bubble, and what is done to it.
type trial struct {
	*bench
	n       int
	rng     *rand.Rand
	release string
	pace    pace
	sum     *tally
	ends    sync.Map // when the pod was done with a job, by its seed
	seeds   int      // given to workflows so far
}

// trials does so many trials with so many cases each, over all versions and paces. names are the counts that are printed, the
// first of them that of the cases.
func trials(t *testing.T, count, each int, names []string, f func(w *trial), opts ...func(w *trial) comfyuitest.Option) {
	t.Helper()
	t.Parallel()
	sum := &tally{counts: map[string]int{}}
	var done atomic.Int64
	t.Cleanup(func() {
		if !t.Failed() {
			assert.EqualValues(t, done.Load()*int64(each), sum.get(names[0]), names[0])
		}
		t.Log(sum.line(names...))
	})
	for n := range count {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			done.Add(1)
			w := &trial{
				n: n, rng: rand.New(rand.NewPCG(*seed, uint64(n))), release: versions[n%len(versions)], sum: sum,
				pace: paces[n/len(versions)%len(paces)],
			}
			t.Cleanup(func() {
				if t.Failed() {
					test, sub, _ := strings.Cut(t.Name(), "/")
					t.Logf("ComfyUI %s, %s pace; again: go test -run '^%s$/^%s$' -seed %d -scale %v .", w.release, w.pace.name, test, sub, *seed, *scale)
				}
			})
			var more []comfyuitest.Option
			for _, opt := range opts {
				more = append(more, opt(w))
			}
			bubble(t, func(b *bench) {
				b.ctx, w.bench = b.t.Context(), b
				f(w)
			}, append([]comfyuitest.Option{
				comfyuitest.WithVersion(w.release), w.node("Quick", comfyuitest.Steps(0, 0)), w.node("Short", comfyuitest.Steps(3, 50*time.Millisecond)),
				w.node("Work", comfyuitest.Steps(4, 500*time.Millisecond)), w.node("Long", comfyuitest.Steps(30, time.Second)), w.node("Silent", silent),
			}, more...)...)
		})
	}
}

// node is a class that notes when it was done.
func (w *trial) node(class string, n comfyuitest.Node) comfyuitest.Option {
	run := n.Run
	n.Run = func(ctx context.Context, c *comfyuitest.Call) error {
		err := run(ctx, c)
		w.ends.Store(fmt.Sprint(c.Inputs["job"]), time.Now())
		return err
	}
	return comfyuitest.WithNode(class, n)
}

// distant has every other pod be far away: a request takes up to a quarter of a second to it, so that what a client has seen there may
// be out of date when it acts.
func (w *trial) distant() comfyuitest.Option {
	return comfyuitest.WithHandler(func(next http.Handler) http.Handler {
		if w.n/2%2 == 0 {
			return next
		}
		return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if pause(r.Context(), time.Duration(rand.Int64N(int64(250*time.Millisecond)))) == nil { //nolint:gosec // any order will do
				next.ServeHTTP(rw, r)
			}
		})
	})
}

// silent takes two seconds, says nothing and hears no interrupt.
var silent = comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
	time.Sleep(2 * time.Second) // virtual; a pod that closes waits for it
	c.Save("images", "output", "silent.png", []byte("png"))
	return nil
}}

// upTo is a random time below most; now and then it is a round one, at which something else happens too.
func (w *trial) upTo(most time.Duration) time.Duration {
	d := time.Duration(w.rng.Int64N(int64(most)))
	if w.rng.IntN(3) == 0 {
		d = d.Truncate(50 * time.Millisecond)
	}
	return d
}

// triedJob is a job of a trial.
type triedJob struct {
	*comfyui.Job
	id        string
	log       *journal
	submitErr error
}

// workflow is one to three nodes that nothing was cached of.
func (w *trial) workflow(classes ...string) (*comfyui.Workflow, string) {
	w.seeds++
	id := fmt.Sprintf("%d-%d", w.n, w.seeds)
	nodes := map[string]any{}
	for n := range 1 + w.rng.IntN(3)*w.rng.IntN(2) {
		nodes[fmt.Sprint(n+1)] = map[string]any{
			"class_type": classes[w.rng.IntN(len(classes))], "inputs": map[string]any{"seed": fmt.Sprint(id, "-", n), "job": id},
		}
	}
	text, err := json.Marshal(nodes)
	require.NoError(w.t, err)
	return parsed(w.t, string(text)), id
}

// submit submits a job without waiting for the pod to take it.
func (w *trial) submit(wg *sync.WaitGroup, c *comfyui.PodClient, classes []string, opts ...comfyui.JobOption) *triedJob {
	graph, id := w.workflow(classes...)
	j := &triedJob{id: id, log: &journal{}}
	opts = append(opts, j.log.option())
	if w.rng.IntN(2) == 0 { // else the id is in the marker only
		opts = append(opts, comfyui.WithJobID(id))
	}
	wg.Go(func() { j.Job, j.submitErr = c.Submit(w.ctx, graph, opts...) })
	return j
}

// patience is longer than any job of a trial takes.
const patience = 2 * time.Hour

// end waits for a job; one that does not end is a missed end.
func (w *trial) end(j *triedJob) (*comfyui.Result, error) {
	w.t.Helper()
	if !assert.NoError(w.t, j.submitErr, "job %s", j.id) {
		w.t.FailNow()
	}
	ctx, cancel := context.WithTimeout(w.ctx, patience)
	defer cancel()
	r, err := j.Wait(ctx)
	if comfyui.CategoryOf(err) == comfyui.CategoryContext {
		w.sum.add("missed ends", 1)
		w.t.Fatalf("job %s (%s) did not end: %+v; prompts: %+v", j.id, j.ID(), j.Progress(), w.mine(j.ID()))
	}
	j.log.sane(w.t)
	return r, err
}

// well waits for a job that must end well, and run once.
func (w *trial) well(j *triedJob) {
	w.t.Helper()
	r, err := w.end(j)
	if err != nil || r.Status != comfyui.StatusSucceeded || len(r.Outputs) == 0 {
		w.sum.add("wrong ends", 1)
		w.t.Errorf("job %s ended as %+v: %v", j.id, r, err)
	}
	w.once(j)
}

// once asserts that the pod ran a job once.
func (w *trial) once(j *triedJob) {
	w.t.Helper()
	runs, ends := 0, 0
	for _, p := range w.mine(j.ID()) {
		runs, ends = runs+p.Runs, ends+p.Ends
	}
	if runs != 1 || ends != 1 {
		w.sum.add("run twice", 1)
		w.t.Errorf("job %s ran %d times, to its end %d times: %+v", j.id, runs, ends, w.mine(j.ID()))
	}
}

// --------------------------------------------------------- S12: cut sockets

// brittle is a line to the pod that breaks after so many bytes, in the middle of a frame as a rule.
type brittle struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error)

	mu    sync.Mutex
	left  int
	mode  comfyuitest.CutMode
	armed bool
}

// arm has the line break once, after n more bytes from the pod.
func (l *brittle) arm(n int, mode comfyuitest.CutMode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left, l.mode, l.armed = n, mode, true
}

// disarm reports whether the line had still to break.
func (l *brittle) disarm() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.armed
	l.armed = false
	return was
}

// pass says how many of n bytes pass; false: then the line breaks.
func (l *brittle) pass(n int) (int, comfyuitest.CutMode, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.armed || n < l.left {
		l.left -= n
		return n, 0, true
	}
	l.armed = false
	return l.left, l.mode, false
}

func (l *brittle) dialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := l.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &brittleConn{Conn: conn, line: l}, nil
}

type brittleConn struct {
	net.Conn
	line   *brittle
	broken atomic.Pointer[comfyuitest.CutMode]
}

func (c *brittleConn) Read(p []byte) (int, error) {
	for {
		if mode := c.broken.Load(); mode != nil && *mode != comfyuitest.CutBlackhole {
			_ = c.Close()
			if *mode == comfyuitest.CutReset {
				return 0, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
			}
			return 0, io.EOF
		}
		n, err := c.Conn.Read(p)
		if err != nil {
			return n, err
		}
		if c.broken.Load() != nil {
			continue // a black hole: until the deadline or Close
		}
		passed, mode, whole := c.line.pass(n)
		if !whole {
			c.broken.Store(&mode)
		}
		if passed > 0 {
			return passed, nil
		}
	}
}

func (c *brittleConn) Write(p []byte) (int, error) {
	if c.broken.Load() != nil {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// Sockets are closed, reset, swallowed or deafened at any moment, on the pod's side or in the middle of a frame, right after
// terminal frames too, one after another, with the reconnect refused for a while: no end is missed, and none is late.
func TestS12Reliability(t *testing.T) {
	const each = 25
	names := []string{"cuts", "close", "reset", "black hole", "deaf", "inside a frame", "while refused", "jobs", "missed ends", "wrong ends", "late ends", "run twice"}
	trials(t, scaled(10000/each, 5), each, names, func(w *trial) {
		var clients []*comfyui.PodClient
		var sockets []*brittle
		for n := range 1 + w.rng.IntN(3) {
			l := &brittle{dial: w.pod.DialContext}
			sockets = append(sockets, l)
			clients = append(clients, w.client(comfyui.WithTiming(w.pace.timing), comfyui.WithDialer(wsDialer(l.dialContext)), comfyui.WithClientID(fmt.Sprint("client-", n))))
		}
		for cut := 0; cut < each; {
			var wg sync.WaitGroup
			var jobs []*triedJob
			for range 1 + w.rng.IntN(4) {
				jobs = append(jobs, w.submit(&wg, clients[w.rng.IntN(len(clients))], []string{"Quick", "Short", "Work", "Silent"}))
			}
			if w.rng.IntN(2) == 0 {
				wg.Wait()
			}
			heal := w.spoilHistory()
			for range min(1+w.rng.IntN(3), each-cut) {
				w.cutOnce(sockets[w.rng.IntN(len(sockets))])
				cut++
			}
			wg.Wait()
			for _, j := range jobs {
				w.well(j)
				w.punctual(j, heal == nil)
			}
			w.sum.add("jobs", len(jobs))
			if heal != nil {
				heal()
			}
			for _, l := range sockets {
				if l.disarm() { // not a byte came any more
					w.pod.CutStreams(comfyuitest.CutReset)
				}
			}
			w.pod.RefuseStreams(0)
			time.Sleep(w.upTo(10 * time.Second))
		}
	})
}

// spoilHistory has the first reads of the history fail, now and then, so that a cut can come between a terminal frame and them.
func (w *trial) spoilHistory() (heal func()) {
	if w.rng.IntN(4) > 0 {
		return nil
	}
	fault := comfyuitest.Fault{Route: "GET /history/", Effect: comfyuitest.Drop, Times: 1 + w.rng.IntN(4)}
	if w.rng.IntN(2) == 0 { // it is not there yet; no second look a grace period later may find that
		fault.Effect, fault.Status, fault.Body, fault.Header = comfyuitest.Answer, http.StatusOK, "{}", http.Header{"Content-Type": {"application/json"}}
		fault.Times = 1
	}
	return w.pod.Inject(fault)
}

func (w *trial) cutOnce(l *brittle) {
	names := []string{"close", "reset", "black hole", "deaf"}
	name := names[w.rng.IntN(len(names))]
	inside := name != "deaf" && w.rng.IntN(3) == 0
	if inside {
		l.arm(w.rng.IntN(5000), cuts[name])
		w.sum.add("inside a frame", 1)
		time.Sleep(w.upTo(time.Second))
	} else {
		time.Sleep(w.upTo(3 * time.Second))
		w.pod.CutStreams(cuts[name])
	}
	w.pod.RefuseStreams(0)
	if w.rng.IntN(4) == 0 {
		w.pod.RefuseStreams([]int{403, 502}[w.rng.IntN(2)])
		w.sum.add("while refused", 1)
	}
	w.sum.add(name, 1)
	w.sum.add("cuts", 1)
}

// punctual asserts that a job's end was not learned later than the periods of the looks allow.
func (w *trial) punctual(j *triedJob, undisturbed bool) {
	w.t.Helper()
	done, ok := w.ends.Load(j.id)
	if !ok || !undisturbed {
		return
	}
	r, _ := j.Wait(w.ctx)
	evs := j.log.of(comfyui.EventSucceeded)
	if r == nil || len(evs) == 0 {
		return
	}
	lag := evs[0].Time.Sub(done.(time.Time))
	if lag > w.pace.pollStreaming()+2*w.pace.poll()+2*time.Second {
		w.sum.add("late ends", 1)
		w.t.Errorf("job %s ended %s before that was known", j.id, lag)
	}
}

// ------------------------------------------------------- S1: lost replies

// Replies to POSTs are lost in every way, in a row too, among several clients, with the looks that follow disturbed: every job
// runs once.
func TestS1Reliability(t *testing.T) {
	const each = 20
	lost := map[string]comfyuitest.Fault{
		"reset":     {Effect: comfyuitest.DropAfter},
		"502":       {Effect: comfyuitest.AnswerAfter, Status: 502, Body: "<html>bad gateway</html>"},
		"524":       {Effect: comfyuitest.AnswerAfter, Status: 524},
		"own 500":   {Effect: comfyuitest.AnswerAfter, Status: 500, Body: "500 Internal Server Error\n\nServer got itself in trouble"},
		"half":      {Effect: comfyuitest.Truncate},
		"not JSON":  {Effect: comfyuitest.AnswerAfter, Status: 200, Body: "ok"},
		"late":      {Effect: comfyuitest.AnswerBefore},
		"no answer": {Effect: comfyuitest.Hang},
	}
	kinds := []string{"reset", "502", "524", "own 500", "half", "not JSON", "late", "no answer"}
	names := append([]string{"lost replies"}, kinds...)
	names = append(names, "of them never arrived", "while looks failed", "jobs", "missed ends", "wrong ends", "run twice")
	trials(t, scaled(2000/each, 5), each, names, func(w *trial) {
		var clients []*comfyui.PodClient
		for n := range 1 + w.rng.IntN(3) {
			clients = append(clients, w.client(comfyui.WithTiming(w.pace.timing), comfyui.WithClientID(fmt.Sprint("client-", n))))
		}
		for n := 0; n < each; {
			w.pod.RefuseStreams([]int{0, 0, 0, 403}[w.rng.IntN(4)])
			if w.rng.IntN(3) == 0 {
				w.pod.CutStreams(comfyuitest.CutMode(w.rng.IntN(4)))
			}
			faults := min(1+w.rng.IntN(4), each-n)
			for range faults {
				kind := kinds[w.rng.IntN(len(kinds))]
				f := lost[kind]
				f.Route = "POST /prompt"
				switch kind {
				case "late":
					f.Status, f.Delay = []int{502, 504, 524}[w.rng.IntN(3)], w.upTo(w.pace.grace())
				case "no answer":
					w.sum.add("of them never arrived", 1)
				}
				w.pod.Inject(f)
				w.sum.add(kind, 1)
			}
			n += faults
			w.sum.add("lost replies", faults)
			var heal []func()
			if w.rng.IntN(3) == 0 {
				w.sum.add("while looks failed", faults)
				for _, route := range []string{"GET /queue", "GET /history"} {
					heal = append(heal, w.pod.Inject(comfyuitest.Fault{Route: route, Skip: w.rng.IntN(3), Times: 1 + w.rng.IntN(3), Effect: []comfyuitest.Effect{comfyuitest.Drop, comfyuitest.Answer, comfyuitest.Truncate}[w.rng.IntN(3)]}))
				}
			}
			var wg sync.WaitGroup
			var jobs []*triedJob
			// At least as many POSTs as faults; with fewer clients than jobs some of a job's are hit twice.
			for range faults + w.rng.IntN(3) {
				jobs = append(jobs, w.submit(&wg, clients[w.rng.IntN(len(clients))], []string{"Quick", "Short", "Work", "Silent"}))
				if w.rng.IntN(3) == 0 {
					time.Sleep(w.upTo(5 * time.Second))
				}
			}
			wg.Wait()
			for _, j := range jobs {
				w.well(j)
			}
			w.sum.add("jobs", len(jobs))
			for _, remove := range heal {
				remove()
			}
		}
	})
}

// ---------------------------------------------------------- S29: restarts

// jobPosts is what the pod has of a job: the POSTs that it took, and the ends that it came to.
func (w *trial) jobPosts(j *triedJob) (posts, ends int) {
	for _, p := range w.mine(j.id) {
		posts, ends = posts+p.Posts, ends+p.Ends
	}
	return posts, ends
}

// The pod restarts while jobs wait and run, at random moments, at once or after a while, with the stream up, cut or refused:
// each job that was lost is posted exactly once more, and none that was not.
func TestS29Reliability(t *testing.T) {
	const each = 5
	names := []string{
		"restarts", "jobs lost", "resubmitted once", "lost at most once", "without evidence", "ended before", "ended unread and run again", "not posted before",
		"missed ends", "wrong ends", "posted too often",
	}
	trials(t, scaled(500/each, 10), each, names, func(w *trial) {
		streams := w.rng.IntN(3) > 0
		if !streams {
			w.pod.RefuseStreams(http.StatusForbidden)
		}
		var clients []*comfyui.PodClient
		client := []func(...comfyui.Option) *comfyui.PodClient{w.client, w.bystander}[w.rng.IntN(2)] // with connections in common or not
		for n := range 1 + w.rng.IntN(2) {
			clients = append(clients, client(comfyui.WithTiming(w.pace.timing), comfyui.WithClientID(fmt.Sprint("client-", n))))
		}
		for range each {
			w.restartOnce(clients, streams)
			w.sum.add("restarts", 1)
		}
	})
}

// settle has a job of each client run to its end, so that the client knows the process.
func (w *trial) settle(clients []*comfyui.PodClient) {
	var wg sync.WaitGroup
	for _, c := range clients {
		j := w.submit(&wg, c, []string{"Quick"})
		wg.Wait()
		w.well(j)
	}
}

func (w *trial) restartOnce(clients []*comfyui.PodClient, streams bool) {
	down := []time.Duration{0, 0, time.Millisecond, time.Second, 7 * time.Second, time.Minute, 4 * time.Minute}[w.rng.IntN(7)]
	// Of a process that was never seen to end or to run anything, nothing tells a quick restart from a cleared queue and history.
	known := down >= time.Minute
	if w.rng.IntN(3) > 0 {
		w.settle(clients)
		known = true
	}
	var wg sync.WaitGroup
	var jobs []*triedJob
	atMostOnce := map[*triedJob]bool{}
	for range 1 + w.rng.IntN(5) {
		var opts []comfyui.JobOption
		once := w.rng.IntN(6) == 0
		if once {
			opts = append(opts, comfyui.AtMostOnce())
		}
		j := w.submitNamed(&wg, clients[w.rng.IntN(len(clients))], []string{"Quick", "Short", "Work", "Silent", "Long"}, opts...)
		atMostOnce[j] = once
		jobs = append(jobs, j)
	}
	heard := streams
	for _, c := range clients {
		synctest.Wait()
		heard = heard && c.Stats().Stream == comfyui.StreamUp
	}
	time.Sleep(w.upTo([]time.Duration{time.Second, 10 * time.Second, 90 * time.Second}[w.rng.IntN(3)]))
	if w.rng.IntN(3) == 0 {
		w.pod.CutStreams(comfyuitest.CutMode(w.rng.IntN(4)))
		heard = false
		time.Sleep(w.upTo(5 * time.Second))
	}
	synctest.Wait()
	type before struct{ posts, ends int }
	was := map[*triedJob]before{}
	for _, j := range jobs {
		posts, ends := w.jobPosts(j)
		was[j] = before{posts, ends}
	}
	w.pod.Restart(down)
	wg.Wait()
	for _, j := range jobs {
		r, err := w.end(j)
		posts, ends := w.jobPosts(j)
		again := posts - was[j].posts
		tell := func(count, what string) {
			w.sum.add(count, 1)
			w.t.Errorf("%s: job %s, restart of %s, heard %t, %d posts and %d ends before it, %d and %d in all: %+v, %v\n%+v",
				what, j.id, down, heard, was[j].posts, was[j].ends, posts, ends, r, err, w.mine(j.id))
		}
		lost := was[j].posts > 0 && was[j].ends == 0
		switch {
		case lost && atMostOnce[j]:
			w.sum.add("lost at most once", 1)
			if again != 0 {
				tell("posted too often", "posted again")
			}
			if !errors.Is(err, comfyui.ErrOutcomeUnknown) {
				tell("wrong ends", "an end that nobody can know")
			}
			continue
		case lost && !known && again == 0 && errors.Is(err, comfyui.ErrOutcomeUnknown):
			w.sum.add("without evidence", 1)
			continue
		case lost:
			w.sum.add("jobs lost", 1)
			if again == 1 {
				w.sum.add("resubmitted once", 1)
			} else {
				tell("posted too often", "lost")
			}
		case was[j].posts == 0:
			w.sum.add("not posted before", 1)
			if again != 1 {
				tell("posted too often", "not there before")
			}
		default:
			w.sum.add("ended before", 1)
			switch {
			case again == 1 && !heard && !atMostOnce[j]:
				w.sum.add("ended unread and run again", 1) // the promise's exception: it died before the result was read
			case again != 0:
				tell("posted too often", "it had ended")
			case !heard && (atMostOnce[j] || !known) && errors.Is(err, comfyui.ErrOutcomeUnknown):
				w.sum.add("without evidence", 1) // the same, and nobody can tell
				continue
			}
		}
		if err != nil || r.Status != comfyui.StatusSucceeded || ends < 1 {
			tell("wrong ends", "wrong end")
		}
	}
	time.Sleep(down + w.upTo(time.Minute)) // nothing is submitted to a pod that is not there
}

// submitNamed submits a job under the trial's own id for it.
func (w *trial) submitNamed(wg *sync.WaitGroup, c *comfyui.PodClient, classes []string, opts ...comfyui.JobOption) *triedJob {
	graph, id := w.workflow(classes...)
	j := &triedJob{id: id, log: &journal{}}
	wg.Go(func() {
		j.Job, j.submitErr = c.Submit(w.ctx, graph, append(opts, j.log.option(), comfyui.WithJobID(id))...)
	})
	return j
}

// ----------------------------------------------------------- S31: cancels

// Jobs of several clients, some of which share a store, and prompts of the pod's own page wait and run on one pod; random ones are
// cancelled at random moments, by their owner, by another process or by a context. Nobody else's is hit, and what a cancel says
// is so.
func TestS31Reliability(t *testing.T) {
	const each = 25
	names := []string{
		"cancels", "by the owner", "by another process", "by a context", "cancelled", "ended first", "refused by an old pod", "other jobs", "prompts of a browser",
		"others hit", "wrong answers", "missed ends", "wrong ends", "run twice",
	}
	trials(t, scaled(10000/each, 5), each, names, func(w *trial) {
		store := comfyui.NewMemoryStore()
		clients := []*comfyui.PodClient{
			w.client(comfyui.WithTiming(w.pace.timing), comfyui.WithStore(store)), w.client(comfyui.WithTiming(w.pace.timing), comfyui.WithStore(store)),
			w.bystander(comfyui.WithTiming(w.pace.timing)),
		}
		for left := each; left > 0; {
			w.pod.RefuseStreams([]int{0, 0, 502}[w.rng.IntN(3)])
			left -= w.cancelSome(clients, left)
			w.pod.CutStreams(comfyuitest.CutMode(w.rng.IntN(4)))
		}
	}, (*trial).distant)
}

// cancelSome does up to most cancels.
func (w *trial) cancelSome(clients []*comfyui.PodClient, most int) (cancels int) {
	type victim struct {
		*triedJob
		cancel func() error
	}
	classes := []string{"Quick", "Short", "Work", "Work", "Silent", "Long"}
	var submits, wg sync.WaitGroup
	var victims []*victim
	var others []*triedJob
	var browsers []string
	for range 2 + w.rng.IntN(6) {
		owner := w.rng.IntN(len(clients))
		c := clients[owner]
		switch {
		case w.rng.IntN(6) == 0:
			browsers = append(browsers, w.browse(classes[w.rng.IntN(4)]))
		case len(victims) < most && w.rng.IntN(2) == 0:
			v := &victim{}
			switch how := w.rng.IntN(4); {
			case how == 0 && owner < 2:
				w.sum.add("by another process", 1)
				v.triedJob = w.submitNamed(&submits, c, classes)
				v.cancel = func() error {
					there, err := clients[1-owner].Attach(w.ctx, v.id)
					if err != nil {
						return err
					}
					return there.Cancel(w.ctx)
				}
			case how == 1:
				w.sum.add("by a context", 1)
				ctx, cancel := context.WithCancel(w.ctx)
				graph, id := w.workflow(classes...)
				v.triedJob = &triedJob{id: id, log: &journal{}}
				submits.Go(func() {
					v.Job, v.submitErr = c.Submit(ctx, graph, v.log.option(), comfyui.WithJobID(id), comfyui.CancelWithContext())
				})
				v.cancel = func() error { cancel(); return nil }
			default:
				w.sum.add("by the owner", 1)
				v.triedJob = w.submitNamed(&submits, c, classes)
				v.cancel = func() error { return v.Cancel(w.ctx) }
			}
			victims = append(victims, v)
		default:
			others = append(others, w.submitNamed(&submits, c, classes[:4]))
		}
		if w.rng.IntN(2) == 0 {
			time.Sleep(w.upTo(time.Second))
		}
	}
	submits.Wait()
	answers := make([]error, len(victims))
	for i, v := range victims {
		if w.rng.IntN(3) > 0 {
			time.Sleep(w.upTo([]time.Duration{300 * time.Millisecond, 3 * time.Second, 15 * time.Second}[w.rng.IntN(3)]))
		}
		wg.Go(func() { answers[i] = v.cancel() })
		if w.rng.IntN(4) == 0 {
			others = append(others, w.submitNamed(&submits, clients[w.rng.IntN(len(clients))], classes[:4]))
		}
	}
	wg.Wait()
	submits.Wait()
	w.sum.add("cancels", len(victims))
	for i, v := range victims {
		w.cancelled(v.triedJob, answers[i])
	}
	for _, j := range others {
		w.well(j)
		w.unhit(w.mine(j.id)...)
	}
	require.NoError(w.t, w.pod.WaitIdle(w.ctx))
	for _, id := range browsers {
		w.unhit(w.prompt(id))
		w.untouched(id)
	}
	w.sum.add("other jobs", len(others))
	w.sum.add("prompts of a browser", len(browsers))
	return len(victims)
}

// browse posts a prompt as the pod's own page does, without a marker, and returns its id.
func (w *trial) browse(class string) string {
	w.seeds++
	const id = "browsed"
	w.send(http.MethodPost, "/prompt", fmt.Sprintf(`{"client_id":"browser","prompt":{"1":{"class_type":%q,"inputs":{"%s":"%d-%d"}}}}`, class, id, w.n, w.seeds))
	for _, p := range slices.Backward(w.pod.Prompts()) {
		if strings.Contains(string(p.Graph), fmt.Sprintf("%d-%d", w.n, w.seeds)) {
			return p.ID
		}
	}
	w.t.Fatal("the pod has not taken the prompt")
	return ""
}

// unhit asserts that no interrupt hit prompts that nobody cancelled.
func (w *trial) unhit(prompts ...comfyuitest.Prompt) {
	w.t.Helper()
	for _, p := range prompts {
		if p.Interrupts > 0 || p.Ends != 1 {
			w.sum.add("others hit", 1)
			w.t.Errorf("a prompt that nobody cancelled was hit: %+v", p)
		}
	}
}

// cancelled holds what a cancel and the job's end say to what the pod did.
func (w *trial) cancelled(j *triedJob, answer error) {
	w.t.Helper()
	r, err := w.end(j)
	runs, ends := 0, 0
	for _, p := range w.mine(j.id) {
		runs, ends = runs+p.Runs, ends+p.Ends
	}
	if runs > 1 {
		w.sum.add("run twice", 1)
		w.t.Errorf("job %s ran %d times", j.id, runs)
	}
	wrong := ""
	switch {
	case comfyui.CategoryOf(answer) == comfyui.CategoryConflict:
		w.sum.add("refused by an old pod", 1)
		if w.release != "0.3.40" || err != nil || ends != 1 {
			wrong = "refused, and yet"
		}
	case answer != nil:
		wrong = "the cancel failed"
	case errors.Is(err, comfyui.ErrCancelled):
		w.sum.add("cancelled", 1)
		if ends != 0 || r.Status != comfyui.StatusCancelled {
			wrong = "cancelled, and yet"
		}
	case err != nil:
		wrong = "neither cancelled nor well"
	default:
		w.sum.add("ended first", 1)
		if ends != 1 || len(r.Outputs) == 0 {
			wrong = "ended well, and yet"
		}
	}
	if wrong != "" {
		w.sum.add("wrong answers", 1)
		w.t.Errorf("%s: job %s: cancel: %v; wait: %v, %+v; pod: %+v", wrong, j.id, answer, err, r, w.mine(j.id))
	}
}

// -------------------------------------------- S35 and S37: the store

// Two processes recover the jobs of a third, which died at a random moment, with a store that answers late, by turns in memory and
// in Redis: each job has one of them for its owner, and runs once.
func TestS35Reliability(t *testing.T) {
	jobs := scaled(1000, 30)
	names := []string{"jobs", "left to recover", "by one", "by the other", "with two owners", "missed ends", "wrong ends", "run twice"}
	trials(t, len(versions), jobs, names, func(w *trial) {
		store, _ := w.store(w.n%2 == 1)
		late := func(context.Context, string) (err error, after bool) {
			time.Sleep(time.Duration(rand.Int64N(int64(20 * time.Millisecond)))) //nolint:gosec // any order will do
			return nil, false
		}
		p := w.process(store, nil)
		for n := range jobs {
			background(w.bench, p, graphOf(w.t, "Short", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
		}
		time.Sleep(time.Duration(w.rng.Int64N(int64(time.Duration(jobs) * 100 * time.Millisecond))))
		p.kill()
		var wg sync.WaitGroup
		owners := make([]map[string]*comfyui.Result, 2)
		for n := range owners {
			c := w.client(comfyui.WithStore(storetest.Flaky(store, late)))
			wg.Go(func() { owners[n] = recoverAll(w.bench, c) })
		}
		wg.Wait()
		w.sum.add("jobs", jobs)
		w.sum.add("left to recover", len(owners[0])+len(owners[1]))
		w.sum.add("by one", len(owners[0]))
		w.sum.add("by the other", len(owners[1]))
		for id := range owners[0] {
			if owners[1][id] != nil {
				w.sum.add("with two owners", 1)
				w.t.Errorf("job %s has two owners", id)
			}
		}
		// What the first process had not yet recorded is submitted again by whoever wants it.
		again := w.client(comfyui.WithStore(store))
		for n := range jobs {
			r, err := again.Execute(w.ctx, graphOf(w.t, "Short", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
			if err != nil || r.Status != comfyui.StatusSucceeded {
				w.sum.add("wrong ends", 1)
				w.t.Errorf("job %d ended as %+v: %v", n, r, err)
			}
		}
		w.ranOnceEach(jobs)
	})
}

// store is a new one; goAway has it refuse or hang until back is called.
func (w *trial) store(inRedis bool) (s comfyui.Store, goAway func(hang bool) (back func())) {
	if !inRedis {
		away := &[2]outage{{}, {hangs: true}} // one at a time
		fail := func(ctx context.Context, method string) (err error, after bool) {
			if err, after := away[0].call(ctx, method); err != nil {
				return err, after
			}
			return away[1].call(ctx, method)
		}
		return storetest.Flaky(comfyui.NewMemoryStore(), fail), func(hang bool) func() {
			o := &away[asInt(hang)]
			o.down.Store(true)
			return func() { o.down.Store(false) }
		}
	}
	server := newSimRedis()
	w.t.Cleanup(server.Close)
	return newRedisStore(w.t, server.client(w.t, nil), comfyui.RedisCallTimeout(5*time.Second)), func(hang bool) func() {
		if hang {
			return server.freeze()
		}
		return server.stop()
	}
}

// ranOnceEach asserts that the pod has had so many prompts, and has run each once.
func (w *trial) ranOnceEach(jobs int) {
	w.t.Helper()
	prompts := w.pod.Prompts()
	assert.Len(w.t, prompts, jobs)
	for _, p := range prompts {
		if p.Runs != 1 || p.Ends != 1 {
			w.sum.add("run twice", 1)
			w.t.Errorf("prompt %s ran %d times, to its end %d times", p.ID, p.Runs, p.Ends)
		}
	}
}

// The store is away for a minute, refused or hung, in memory or Redis, while two clients have their jobs on the pod: all end, none
// is posted again, and all records land.
func TestS37Reliability(t *testing.T) {
	jobs := scaled(1000, 40)
	names := []string{"jobs", "ended while the store was away", "with a storage warning", "wrong ends", "not landed", "run twice"}
	trials(t, 2*len(versions), jobs, names, func(w *trial) {
		store, goAway := w.store(w.n%2 == 1)
		var clients []*comfyui.PodClient
		for range 2 {
			clients = append(clients, w.client(comfyui.WithStore(store)))
		}
		handles := make([]*comfyui.Job, jobs)
		for n := range handles {
			var err error
			handles[n], err = clients[n%2].Submit(w.ctx, graphOf(w.t, "Share", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
			require.NoError(w.t, err)
		}
		time.Sleep(w.upTo(30 * time.Second))
		ended := func() (n int) {
			for _, j := range handles {
				select {
				case <-j.Done():
					n++
				default:
				}
			}
			return n
		}
		before := ended()
		back := goAway(w.n/2%2 == 1)
		time.Sleep(time.Minute)
		w.sum.add("ended while the store was away", ended()-before)
		back()
		for n, j := range handles {
			ctx, cancel := context.WithTimeout(w.ctx, patience)
			r, err := j.Wait(ctx)
			cancel()
			if err != nil || r.Status != comfyui.StatusSucceeded {
				w.sum.add("wrong ends", 1)
				w.t.Errorf("job %d ended as %+v: %v", n, r, err)
				continue
			}
			if slices.ContainsFunc(r.Warnings, func(e *comfyui.Error) bool { return e.Category == comfyui.CategoryStorage }) {
				w.sum.add("with a storage warning", 1)
			}
		}
		time.Sleep(time.Minute)
		for n := range handles {
			r, err := store.Get(w.ctx, fmt.Sprint("job-", n))
			if err != nil || r.Progress.Status != comfyui.StatusSucceeded {
				w.sum.add("not landed", 1)
				w.t.Errorf("the record of job %d is %+v, %v", n, r, err)
			}
		}
		for _, c := range clients {
			assert.Zero(w.t, c.Stats().StorePending)
		}
		w.sum.add("jobs", jobs)
		w.ranOnceEach(jobs)
	}, func(*trial) comfyuitest.Option {
		return comfyuitest.WithNode("Share", comfyuitest.Steps(1, 100*time.Second/time.Duration(jobs)))
	})
}

// ------------------------------------------------------------- soak

// resources are what a process must not lose hold of.
type resources struct{ goroutines, descriptors, heap int }

func resourcesNow(t *testing.T) resources {
	t.Helper()
	for range 3 { // finalizers and pools take more than one
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		entries = nil // not everywhere
	}
	return resources{runtime.NumGoroutine(), len(entries), int(m.HeapAlloc)}
}

// One client does thousands of jobs on a real socket, while sockets are cut, replies lost, jobs cancelled and failing, and pods
// restarted and replaced; then it is as small as it was after the first few.
func TestSoakReliability(t *testing.T) { //nolint:paralleltest // it counts goroutines
	const round = 100
	names := []string{"jobs", "well", "failed as they must", "cancelled", "lost for good", "pods", "restarts", "cuts", "lost replies"}
	sum := &tally{counts: map[string]int{}}
	rng := rand.New(rand.NewPCG(*seed, 0)) //nolint:gosec // repeatable is the point
	timing := comfyui.Timing{              // real time: what waits must be short
		Request: 5 * time.Second, StreamWait: 200 * time.Millisecond, ReconnectMin: 10 * time.Millisecond, ReconnectMax: 200 * time.Millisecond,
		Poll: 20 * time.Millisecond, PollStreaming: 200 * time.Millisecond, Grace: 100 * time.Millisecond, Settle: time.Second,
		Cancel: 5 * time.Second, Lease: 10 * time.Second, ProgressWrite: 10 * time.Millisecond, Retention: time.Millisecond,
	}
	var current atomic.Pointer[comfyuitest.Pod]
	transport := &http.Transport{MaxIdleConnsPerHost: 16, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return current.Load().DialContext(ctx, network, addr)
	}}
	defer transport.CloseIdleConnections()
	c, err := comfyui.NewPodClient("http://soak", comfyui.WithHTTPClient(&http.Client{Transport: transport}), comfyui.WithTiming(timing))
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Close()) }()
	do := func() {
		sum.add("pods", 1)
		sum.add("jobs", round)
		// Each round has a pod of its own, because a pod forgets no prompt.
		pod := comfyuitest.NewPod(comfyuitest.WithVersion(versions[*seed%uint64(len(versions))]), comfyuitest.WithNode("Quick", comfyuitest.Steps(1, 0)),
			comfyuitest.WithNode("Short", comfyuitest.Steps(3, time.Millisecond)), comfyuitest.WithNode("Bad", comfyuitest.Fail("ValueError", "bad")))
		defer pod.Close()
		current.Store(pod)
		restartAt := rng.IntN(3 * round)
		var wg sync.WaitGroup
		gate := make(chan struct{}, 8)
		for n := range round {
			gate <- struct{}{}
			class := []string{"Quick", "Quick", "Short", "Bad"}[rng.IntN(4)]
			cancel := rng.IntN(10) == 0
			switch rng.IntN(20) {
			case 0:
				sum.add("cuts", 1)
				pod.CutStreams(comfyuitest.CutMode(rng.IntN(4)))
			case 1:
				sum.add("lost replies", 1)
				pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: []comfyuitest.Effect{comfyuitest.DropAfter, comfyuitest.AnswerAfter, comfyuitest.Truncate}[rng.IntN(3)]})
			}
			if n == restartAt {
				sum.add("restarts", 1)
				pod.Restart(20 * time.Millisecond)
			}
			wg.Go(func() {
				defer func() { <-gate }()
				soakOne(t, c, sum, fmt.Sprint(sum.get("pods"), "-", n), class, cancel)
			})
		}
		wg.Wait()
	}
	for range 3 {
		do()
	}
	before := resourcesNow(t)
	for sum.get("jobs") < 3*round+scaled(10000, 2*round) {
		do()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var after resources
	_ = waitFor(ctx, func() bool { // the last may still be ending, and the stream be dialling
		after = resourcesNow(t)
		return after.goroutines <= before.goroutines && after.descriptors <= before.descriptors
	})
	t.Log(sum.line(names...))
	t.Logf("goroutines %d and %d, descriptors %d and %d, heap %d KiB and %d KiB", before.goroutines, after.goroutines, before.descriptors, after.descriptors, before.heap>>10, after.heap>>10)
	assert.LessOrEqual(t, after.goroutines, before.goroutines)
	assert.LessOrEqual(t, after.descriptors, before.descriptors)
	// The stream keeps up to 4096 texts, ids of ended jobs among them, so as not to make them anew with every frame.
	const texts = 512 << 10
	assert.LessOrEqual(t, after.heap, before.heap+texts, "what is left of each job would add up")
}

// soakOne does one job, to its right end.
func soakOne(t *testing.T, c *comfyui.PodClient, sum *tally, id, class string, cancel bool) {
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	graph, err := comfyui.ParseWorkflow(fmt.Appendf(nil, `{"1":{"class_type":%q,"inputs":{"seed":%q}}}`, class, id))
	if !assert.NoError(t, err) {
		return
	}
	j, err := c.Submit(ctx, graph, comfyui.WithJobID(id))
	if !assert.NoError(t, err) {
		return
	}
	if cancel {
		if err := j.Cancel(ctx); err != nil {
			assert.Equal(t, comfyui.CategoryConflict, comfyui.CategoryOf(err), "%v", err)
		}
	}
	r, err := j.Wait(ctx)
	var failed *comfyui.ExecutionError
	switch {
	case err == nil:
		sum.add("well", 1)
		assert.NotEqual(t, "Bad", class)
		assert.NotEmpty(t, r.Outputs)
	case class == "Bad" && errors.As(err, &failed):
		sum.add("failed as they must", 1)
	case cancel && errors.Is(err, comfyui.ErrCancelled):
		sum.add("cancelled", 1)
	case errors.Is(err, comfyui.ErrOutcomeUnknown): // it ran in the process that ended, and nobody can know how
		sum.add("lost for good", 1)
	default:
		t.Errorf("job %s (%s): %v", id, class, err)
	}
}
