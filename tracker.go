package comfyui

import (
	"cmp"
	"container/heap"
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/comfypod/comfyui/internal/wire"
)

const (
	// posters bounds the submissions under way at one time, and with them what a pod that answers slowly has to bear.
	posters = 16
	// errands bounds the other calls to the pod under way: looks and history reads.
	errands = 8
	// cancellers bounds the cancels under way: many of them hold up none of the others.
	cancellers = 4
	// askers and watchers bound the reads of records under way: those that something waits for, and those that are routine. They
	// are apart from each other and from the rest, so that a store that hangs does not hold up what needs the pod alone.
	askers, watchers = 4, 4
	// writers bounds the store writes under way.
	writers = 4
	// storeTime bounds a call to a store that keeps no bound itself.
	storeTime = 30 * time.Second
	// maxWatches bounds the jobs that are watched at one time in a store that needs a goroutine for each.
	maxWatches = 4
	// streamLinger is how long the stream stays up after the last job, for the next one.
	streamLinger = time.Minute
	// maxStrays bounds the frames kept for prompts that are not known yet, while a POST has no answer.
	maxStrays = 256
	// maxAdopted bounds the streams opened under the client ids of former owners.
	maxAdopted = 4
)

// tracker follows all jobs of a client. What it knows of them changes in one place at a time: whoever learns something, be it the
// stream, a worker or the clock, tells it, and the tracker takes it in under its lock. It does no I/O there, waits for nothing and
// calls no function of the caller's, so that nobody holds it up; and news need not cross to another goroutine to be taken in.
type tracker struct {
	client   *PodClient
	opts     *options
	timing   Timing
	endpoint *endpoint
	reads    *queueReads
	retrier  *retrier
	counters *counters
	store    Store
	memory   *MemoryStore // the same, if it is one; else nil
	owner    string       // random: the identity behind leases
	ears     *ears        // nil: the store tells nothing by itself

	ctx     context.Context
	cancel  context.CancelCauseFunc
	wg      sync.WaitGroup
	stopped chan struct{} // closed when run has ended
	timer   *time.Timer   // run waits for it
	prompts promptSet
	hook    *callback // Hooks.Event; nil: none
	gauges  gauges

	posting, errand, cancelling, writing, asking, watching, renewal *crew
	cancels                                                         cancelLine

	// mu guards what is below, and the jobs.
	mu       sync.Mutex
	closed   bool
	clock    time.Time // what the timer is set for; zero: nothing
	jobs     map[string]*tracked
	byPrompt map[string]*tracked
	wakes    wakeHeap
	queue    []*tracked // ready to be posted, in order
	shown    *queueRead // the newest, for those in queue; nil: none
	strays   []wire.Message
	inFlight int // jobs that are on the pod or being posted
	stream   *stream
	adopted  map[string]*adoption
	current  map[*stream]string // the prompt that a stream's frames last named
	pod      podView
	due      dues
	later    []func() // to be done when the lock is free
	news     []Event  // of the observation that is being taken in: kept for its room
}

// gauges are what Stats reads of the tracker's state.
type gauges struct {
	following, owned, unwritten atomic.Int64
	stream                      atomic.Value // StreamState
}

// podView is what is known of the pod as a whole.
type podView struct {
	stream       StreamState
	upSince      time.Time // of the stream; zero while it is not up
	heard        bool      // the stream brought more than its greeting since it came up
	refusedAt    time.Time // when the pod last refused a connection or a proxy said that it is not there
	proven       int64     // endpoint.lines.breaks when the process was last known to be the one before
	contactAt    time.Time // when the pod last answered
	silentSince  time.Time // the first failure since then; zero: none
	failure      error     // the newest one
	incarnation  int       // raised by every restart that is proven
	highest      float64   // the highest number that the pod's own counter gave
	highestAt    time.Time // when that was learned
	oldest       string    // its oldest history entry, when last seen
	ended        string    // the newest history entry that was read
	running      string    // the prompt that was last seen to run
	movedAt      time.Time // when its queue last moved: what is added to it is no move, since a dead worker's queue grows too
	shape        queueShape
	remaining    int           // of the last status frame; -1: not known
	cost         time.Duration // of the last look
	lookedAt     time.Time     // when it ended
	queueBytes   int
	wholeAt      time.Time // when the whole queue was last read
	copiesUntil  time.Time // a prompt may come a second time until then: only the whole queue shows that
	failures     int       // looks that failed in a row
	poison       error     // a CUDA fault of one of our jobs since the last restart
	poisonedAt   time.Time
	stalledAt    time.Time // when a job was given up because nothing moved; zero once anything has run since
	fingerprints bool      // a fingerprint is wanted with the next look
}

// queueShape tells one state of the pod's queue from another.
type queueShape struct {
	running, pending int
	first            string
}

// movedFrom tells whether something was taken from the queue since it was in another shape.
func (q queueShape) movedFrom(was queueShape) bool {
	return q.first != was.first || q.running != was.running || q.pending < was.pending
}

// dues are the tracker's own appointments; zero: none.
type dues struct {
	look, count, renew, deaf, linger time.Time
	looking, renewing                bool
	deafCount                        int64
}

func newTracker(c *PodClient) *tracker {
	ctx, cancel := context.WithCancelCause(context.Background())
	t := &tracker{
		client: c, opts: c.opts, timing: c.opts.timing, endpoint: c.endpoint, retrier: c.retrier, counters: c.counters,
		store: c.opts.store, owner: uuid.NewString(), ctx: ctx, cancel: cancel, stopped: make(chan struct{}),
		timer: time.NewTimer(time.Hour), jobs: map[string]*tracked{}, byPrompt: map[string]*tracked{},
		adopted: map[string]*adoption{}, current: map[*stream]string{},
	}
	t.reads = &queueReads{t: t}
	t.memory, _ = t.store.(*MemoryStore)
	switch s := t.store.(type) {
	case *MemoryStore:
		t.ears = newEars(t, s)
	case *RedisStore:
		t.ears = newEars(t, s)
	case Watcher: // also one that embeds a store of ours: its Watch may be another
		t.ears = newEars(t, &watches{t: t, of: s})
	}
	t.prompts.ids = map[string]struct{}{}
	t.posting, t.errand, t.cancelling = newCrew(t, posters, 0), newCrew(t, errands, 0), newCrew(t, cancellers, 0)
	t.writing = newCrew(t, writers, storeTime)
	t.asking, t.watching, t.renewal = newCrew(t, askers, storeTime), newCrew(t, watchers, storeTime), newCrew(t, 1, storeTime)
	t.pod = podView{stream: StreamIdle, remaining: -1, highest: math.Inf(-1), fingerprints: true}
	t.gauges.stream.Store(StreamIdle)
	if f := c.opts.hooks.Event; f != nil {
		t.hook = newCallback(f)
		t.hook.missed = t.hookMissed
	}
	t.stream = newStream(c.opts.clientID, c.endpoint, c.opts, c.counters, t)
	return t
}

// hookMissed says that Hooks.Event has missed events, or does so no longer. While that begins, the lock is held.
func (t *tracker) hookMissed(events int, over bool) {
	if !over {
		t.log(slog.LevelWarn, "comfyui: Hooks.Event does not keep up: the oldest events are dropped", "kept", maxHeldEvents, "dropped", events)
		return
	}
	t.opts.logger.Log(t.ctx, slog.LevelWarn, "comfyui: Hooks.Event takes events again, and has missed some", "dropped", events, "pod", t.opts.name)
}

// start begins the tracker's goroutines; stop ends them.
func (t *tracker) start() {
	t.wg.Go(func() { t.stream.run(t.ctx) })
	t.wg.Go(func() { t.client.watchHealth(t.ctx) })
	go t.run()
}

// stop ends every job's handle with ErrClosed and waits for all goroutines but callbacks. Jobs go on on the pod.
func (t *tracker) stop() {
	t.cancel(ErrClosed)
	<-t.stopped
	t.wg.Wait()
	t.leave()
}

// run is the clock: it does what is due until the tracker is stopped.
func (t *tracker) run() {
	defer close(t.stopped)
	defer t.timer.Stop()
	for {
		select {
		case <-t.ctx.Done():
			t.mu.Lock()
			t.abandon()
			t.unlock()
			return
		case <-t.timer.C:
			t.mu.Lock()
			t.clock = time.Time{}
			t.wake(time.Now())
			t.setClock()
			t.unlock()
		}
	}
}

// tell has the tracker take something in; false: it has stopped. f must not wait for anything.
func (t *tracker) tell(f func()) bool {
	t.mu.Lock()
	defer t.unlock()
	if t.closed {
		return false
	}
	f()
	t.setClock()
	return true
}

// afterwards has something done once the lock is free: what writes to the caller's logger, for one.
func (t *tracker) afterwards(f func()) { t.later = append(t.later, f) }

func (t *tracker) log(level slog.Level, text string, args ...any) {
	t.afterwards(func() { t.opts.logger.Log(t.ctx, level, text, append(args, "pod", t.opts.name)...) })
}

func (t *tracker) unlock() {
	later := t.later
	t.later = nil
	t.mu.Unlock()
	for _, f := range later {
		f()
	}
}

// setClock sets the timer for what is due before what it is set for. It is never set back: run finds out by itself that there is
// nothing to do yet, which is rarer than that the next appointment moves.
func (t *tracker) setClock() {
	if next := t.nextWake(); !next.IsZero() && (t.clock.IsZero() || next.Before(t.clock)) {
		t.clock = next
		t.timer.Reset(time.Until(next))
	}
}

// crew runs work on a bounded number of goroutines, first come, first served. What the work returns is told to the tracker. A
// goroutine that has nothing to do stays for a moment: the next job of a row finds it with its stack grown.
type crew struct {
	t     *tracker
	limit int
	bound time.Duration // of one piece of work; 0: it has its own
	ready chan task     // for those who wait

	mu      sync.Mutex
	workers int // goroutines
	waiting int // of these, those that wait and have not been given anything
	queue   []task
}

// task is some work; it returns what is to be told, or nil.
type task func(context.Context) func()

// crewLinger is how long a goroutine without work stays.
const crewLinger = 100 * time.Millisecond

func newCrew(t *tracker, limit int, bound time.Duration) *crew {
	return &crew{t: t, limit: limit, bound: bound, ready: make(chan task, limit)}
}

func (c *crew) do(work task) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.waiting > 0:
		c.waiting--
		c.ready <- work // has room: never more than were waiting
	case c.workers < c.limit:
		c.workers++
		c.t.wg.Go(func() { c.run(work) })
	default:
		c.queue = append(c.queue, work)
	}
}

func (c *crew) run(work task) {
	idle := time.NewTimer(crewLinger)
	defer idle.Stop()
	for work != nil {
		if after := c.perform(work); after != nil {
			c.t.tell(after)
		}
		work = c.next(idle)
	}
}

func (c *crew) perform(work task) func() {
	if c.bound <= 0 {
		return work(c.t.ctx)
	}
	ctx, cancel := context.WithTimeout(c.t.ctx, c.bound)
	defer cancel()
	return work(ctx)
}

// next is what to do now; nil: end.
func (c *crew) next(idle *time.Timer) task {
	if work := c.queued(); work != nil {
		return work
	}
	idle.Reset(crewLinger)
	select {
	case work := <-c.ready:
		return work
	case <-idle.C:
	case <-c.t.ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case work := <-c.ready: // given at the last moment
		return work
	default:
	}
	c.waiting--
	c.workers--
	return nil
}

// queued takes the first of the queue; nil: there is none, and the caller counts as one who waits.
func (c *crew) queued() task {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) == 0 {
		c.waiting++
		return nil
	}
	work := c.queue[0]
	c.queue = c.queue[1:]
	return work
}

// promptSet is what the streams need to know of the jobs to drop the frames of others.
type promptSet struct {
	open atomic.Int32 // POSTs without an answer: an old pod may name their prompts itself

	mu  sync.RWMutex
	ids map[string]struct{}
}

func (p *promptSet) has(id []byte) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	_, ok := p.ids[string(id)]
	return ok
}

func (p *promptSet) add(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ids[id] = struct{}{}
}

func (p *promptSet) remove(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.ids, id)
}

// ---------------------------------------------------------------- one job

// tracked is a job that the tracker follows.
type tracked struct {
	jobState
	handle  *Job
	inputs  []inputFile
	secrets map[string]any // keys of extra_data that are never stored
	number  *float64       // the caller's queue number, when this process knows it
	lease   *lease         // nil for a follower
	first   int            // the attempt with which this run of the job began: policies count from there
	watched []func() bool  // end the watch over each ctx of CancelWithContext

	posting   postingState
	look      bool // the next POST could be a repeat: look first
	inherited bool // a former owner may have posted the attempt
	write     writeState
	cancel    cancelState
	settle    settleState
	absent    absentState
	follow    *followState // nil for who drives the job

	claimedAt   time.Time // when this client became its driver
	acceptedAt  time.Time // on the local clock
	seenAt      time.Time // when the pod was last known to have the attempt
	movedAt     time.Time // when the attempt last moved
	incarnation int       // of the pod in which it was last seen
	breaks      int64     // endpoint.lines.breaks when it was last seen by a call
	sighted     bool      // seen there by this client since it drives the job
	hearsay     bool      // only a former owner's record says that the pod has it
	witnesses   []string  // what the pod had then, see podView.witnesses
	adopted     *adoption // the stream that brings its frames, if it was posted under another client id; nil: ours, or none
	leaving     bool      // the verdict is known, but the pod may still have the prompt: it must be taken off first
	left        bool      // the pod has it no more
	intent      intentState
	asking      bool // the record is read, because the lease may be lost
	reading     bool // the record is read, because somebody may want a cancel
	concluded   bool
	finished    bool
	end         *Event // held back until the record has landed
	holdUntil   time.Time

	dueAt  time.Time // the earliest of what advance has found to be due later; zero: nothing
	wakeAt time.Time // the same, as the heap knows it
	index  int       // in wakes; -1: not in it
}

type postingState struct {
	queued, busy bool
	reads        int64                   // of the pod's queue that had begun when it was queued
	made         int                     // POSTs of this attempt that were made
	at           time.Time               // not before; zero: at once
	streamBy     time.Time               // the stream is waited for until then
	enough       context.CancelCauseFunc // makes the worker stop at the next safe point; nil: there is none
	cut          context.CancelFunc      // makes it stop at once; nil: there is none
	found        chan struct{}           // closed when the stream has shown the prompt
}

type writeState struct {
	dirty, urgent, busy bool
	pending             bool      // something was to be written, and has not landed yet: counted in Stats.StorePending
	attempt             int       // the newest attempt that the store is known to have
	at                  time.Time // the next write, if dirty
	failures            int
}

type settleState struct {
	busy   bool
	at, by time.Time
	tries  int
	entry  *wire.HistoryEntry // read, and not taken in before the POST is answered; nil: none
}

type absentState struct {
	again  time.Time // it is looked for once more then; zero: it is not missed
	unread time.Time // the pod is asked for its history entry until then; zero: it has not failed to give that
	busy   bool      // evidence is being gathered
}

// followState is how a follower learns what another owner does.
type followState struct {
	ear   *ear // nil: the store tells nothing
	live  bool // all that is written is told
	busy  bool // the record is being read
	again bool // there was a reason to read it since that began
	heard bool // a version was told since that began
	at    time.Time
	lease time.Time // as last seen, on the store's clock
	since time.Time // on ours: when the record was read before that was written, but for the first
	read  time.Time // when the record was last read

	missedSince time.Time // the store does not have the record since then; zero: it has
}

// intentState is whether the store was asked for a cancel by somebody else before an interrupt is judged.
type intentState struct{ busy, known bool }

// lease is the owner's proof that it may act for a job. It is shared with the workers that act.
type lease struct {
	t     *tracker
	jobID string

	mu   sync.Mutex
	at   time.Time // when the request was sent that the store last confirmed
	told time.Time // when the store last told whether a cancel is wanted
	lost bool
}

// errUnconfirmed: what only the owner of a job may send was not sent, because the store did not confirm the lease.
var errUnconfirmed = errors.New("the lease is not confirmed")

// freshFor is how long after a confirmation the holder may still send: what it sends must have arrived before the lease can
// end. With the default timing Request exceeds Lease; then half of the lease has to do, since renewals go on while the pod
// thinks about its answer.
func (l *lease) freshFor() time.Duration {
	ttl := l.t.timing.Lease
	return max(ttl-l.t.timing.Request, ttl/2)
}

// fresh tells whether confirm need not ask the store.
func (l *lease) fresh() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.lost && time.Since(l.at) < l.freshFor()
}

// confirm is called right before the bytes of something that only the owner may send. An old confirmation is renewed first.
func (l *lease) confirm(ctx context.Context) error {
	if l.fresh() {
		return nil
	}
	l.mu.Lock()
	lost := l.lost
	l.mu.Unlock()
	if lost {
		return fmt.Errorf("%w: %w", errUnconfirmed, ErrFenced)
	}
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	now := time.Now()
	gone, err := l.t.store.Renew(ctx, l.t.owner, l.t.timing.Lease, []string{l.jobID})
	if err != nil {
		return fmt.Errorf("%w: %w", errUnconfirmed, err)
	}
	if len(gone) > 0 {
		return fmt.Errorf("%w: %w", errUnconfirmed, ErrFenced)
	}
	l.confirmed(now)
	return nil
}

// freshIntent is how long what the store said of a cancel is good enough for a POST.
const freshIntent = time.Second

// cancelWanted asks the store, unless it has just told, whether somebody has asked for a cancel. A store that does not answer is no
// reason not to post: the cancel is honoured when it does.
func (l *lease) cancelWanted(ctx context.Context) bool {
	l.mu.Lock()
	told := l.told
	l.mu.Unlock()
	if time.Since(told) < freshIntent {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, max(l.t.timing.StoreWait, time.Second))
	defer cancel()
	rec, err := l.t.store.Get(ctx, l.jobID)
	return err == nil && rec.CancelRequested
}

func (l *lease) toldIntent(at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told = at
}

func (l *lease) confirmed(at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at.After(l.at) {
		l.at = at
	}
}

func (l *lease) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost = true
}

// admission is a job that is to be followed.
type admission struct {
	rec       *Record
	graph     *plan
	opts      *jobOptions
	drive     bool // the lease is ours
	fresh     bool // its id was made just now: no POST can have been made for it
	reopened  bool // to be run again after its end
	confirmed time.Time
	ctx       context.Context
}

// admit takes a job in, or finds it among those that are followed already.
func (t *tracker) admit(a admission) *Job {
	now := time.Now()
	j := t.jobs[a.rec.JobID]
	if j != nil && !(a.drive && j.lease == nil) {
		t.listenIn(j, a)
		return j.handle
	}
	if j == nil {
		j = &tracked{jobState: jobState{rec: *a.rec, graph: a.graph}, handle: newJob(t.client, a.rec), index: -1}
		t.jobs[a.rec.JobID] = j
		t.gauges.following.Add(1)
	} else {
		t.followed(j, a.rec, now) // what the former owner wrote last
		j.graph = a.graph
	}
	j.first = 1
	if a.reopened {
		j.first = j.rec.Attempt
	}
	j.number = a.opts.number
	j.movedAt, j.seenAt = now, now
	t.listenIn(j, a)
	if a.drive {
		t.drive(j, a, now)
	}
	t.advance(j, now)
	return j.handle
}

// join finds a job that this client drives already; nil: it does not.
func (t *tracker) join(a admission) *Job {
	j := t.jobs[a.rec.JobID]
	if j == nil || j.lease == nil {
		return nil
	}
	t.listenIn(j, a)
	return j.handle
}

// drive makes this client the job's driver.
func (t *tracker) drive(j *tracked, a admission, now time.Time) {
	t.followNoMore(j)
	j.lease = &lease{t: t, jobID: j.rec.JobID, at: a.confirmed, told: a.confirmed}
	t.gauges.owned.Add(1)
	j.look, j.claimedAt = !a.fresh, a.confirmed
	j.inherited = j.rec.Epoch > 1 && !a.reopened
	j.write.attempt = j.rec.Attempt
	if a.reopened { // the store has only the former end yet
		j.write.attempt = 0
		j.write.dirty, j.write.urgent = true, true
	}
	if j.rec.CancelRequested {
		t.wantCancel(j, now)
	}
	j.posting.streamBy = now.Add(t.timing.StreamWait)
	switch {
	case j.rec.Accepted:
		t.onPod(j, now)
		j.hearsay = true
		if !j.rec.AttemptAt.IsZero() {
			j.acceptedAt = j.rec.AttemptAt // as near as the record tells: Limits count from there
		}
		t.lookBy(now)
	case j.number == nil && j.rec.Number != 0: // the caller's, which the record keeps until the pod has taken the attempt
		number := j.rec.Number
		j.number = &number
	}
	t.register(j)
	t.due.linger = time.Time{}
	t.stream.setWanted(true)
	if t.due.renew.IsZero() {
		t.due.renew = now.Add(t.renewEvery())
	}
}

// renewEvery is the time between two renewals of leases.
func (t *tracker) renewEvery() time.Duration { return max(t.timing.Lease/3, time.Millisecond) }

// listenIn adds the callbacks of a caller that joins or starts a job.
func (t *tracker) listenIn(j *tracked, a admission) {
	for _, f := range a.opts.onEvent {
		j.handle.attach(newCallback(f))
	}
	if a.opts.cancelWithContext && a.ctx != nil {
		id := j.rec.JobID
		j.watched = append(j.watched, context.AfterFunc(a.ctx, func() { t.tell(func() { t.cancelByContext(id) }) }))
	}
	// What is not stored, and the one who drives the job by now may lack: Attach and Recover have none of it.
	if len(j.inputs) == 0 {
		j.inputs = a.opts.inputs
	}
	if len(j.secrets) == 0 {
		j.secrets = secretsOf(a.opts.extraData)
		j.hidden = hides(t.opts.apiKey, j.secrets)
	}
}

// unwatch lets go of the callers' ctxs.
func (j *tracked) unwatch() {
	for _, stop := range j.watched {
		stop()
	}
	j.watched = nil
}

// register makes frames of the job's prompt find it.
func (t *tracker) register(j *tracked) {
	t.byPrompt[j.rec.PromptID] = j
	t.prompts.add(j.rec.PromptID)
}

func (t *tracker) unregister(j *tracked) {
	if t.byPrompt[j.rec.PromptID] == j {
		delete(t.byPrompt, j.rec.PromptID)
		t.prompts.remove(j.rec.PromptID)
	}
}

// onPod notes that the pod has the job's attempt.
func (t *tracker) onPod(j *tracked, now time.Time) {
	if j.acceptedAt.IsZero() {
		j.acceptedAt = now
		t.inFlight++
	}
	j.seenAt, j.incarnation = now, t.pod.incarnation
	j.sighted, j.hearsay, j.witnesses, j.breaks = false, false, t.pod.witnesses(), t.endpoint.lines.breaks.Load()
	t.adoptStream(j)
}

// offPod undoes onPod.
func (t *tracker) offPod(j *tracked) {
	if j.acceptedAt.IsZero() {
		return
	}
	j.acceptedAt = time.Time{}
	t.inFlight--
	t.abandonStream(j)
	t.pump()
}

// observe takes an observation in and spreads its news. It reports whether there was any.
func (t *tracker) observe(j *tracked, o observation, now time.Time) bool {
	wasAccepted, wasStarted := j.rec.Accepted, j.rec.Started
	t.news = j.apply(o, now, t.news[:0])
	evs := t.news
	defer clear(evs)
	if j.rec.Started && !wasStarted {
		t.pod.stalledAt = time.Time{}
	}
	if j.rec.Accepted && !wasAccepted {
		t.onPod(j, now)
		j.handle.accept()
		j.write.urgent = true
		if j.posting.found != nil {
			close(j.posting.found)
			j.posting.found = nil
		}
	}
	if len(evs) == 0 {
		return false
	}
	if _, waits := o.(obsQueued); !waits || !wasAccepted { // a place in the queue is the queue's affair: see podView.movedAt
		j.movedAt = now
	}
	t.spread(j, evs, now)
	return true
}

// spread shows events to observers and the store; the end waits for its record.
func (t *tracker) spread(j *tracked, evs []Event, now time.Time) {
	for i := range evs {
		if len(evs[i].Outputs) > 0 {
			evs[i].Outputs = t.client.outputsFrom(j.rec.Pod, evs[i].Outputs)
		}
	}
	if last := &evs[len(evs)-1]; last.Kind.terminal() {
		end := *last
		j.end = &end
		evs = evs[:len(evs)-1]
	}
	if j.end == nil { // an end is shown when it stands: another owner may know better
		j.handle.publish(&j.rec, evs)
	} else {
		j.handle.tell(evs)
	}
	if t.hook != nil {
		t.hook.push(evs)
	}
	if j.lease == nil {
		return
	}
	if !j.write.dirty {
		j.write.dirty, j.write.at = true, now.Add(max(0, t.timing.ProgressWrite))
		if j.index >= 0 && j.write.at.Before(j.wakeAt) { // not every frame is followed by an advance
			j.wakeAt = j.write.at
			heap.Fix(&t.wakes, j.index)
		}
	}
	if j.end != nil {
		j.write.urgent = true
	}
}

// advance does what is due for a job and notes when to look at it again. It derives everything from the job's state, so that
// calling it once too often does no harm.
func (t *tracker) advance(j *tracked, now time.Time) {
	j.dueAt = time.Time{}
	switch {
	case j.finished && !j.unwritten():
		t.forget(j)
		return
	case j.rec.Progress.Status.Terminal():
		t.conclude(j, now)
	case j.lease == nil:
		t.followAlong(j, now)
	default:
		t.heldDue(j, now)
		t.keepLimits(j, now)
		t.judge(j, now)
		if !j.rec.Progress.Status.Terminal() {
			t.settleDue(j, now)
			t.cancelDue(j, now)
			t.absentDue(j, now)
			t.postDue(j, now)
		} else {
			t.conclude(j, now)
		}
	}
	t.writeDue(j, now)
	t.reschedule(j, now)
}

// at asks for another look at the job.
func (j *tracked) at(when time.Time) {
	if j.dueAt.IsZero() || when.Before(j.dueAt) {
		j.dueAt = when
	}
}

func (j *tracked) unwritten() bool { return j.lease != nil && (j.write.dirty || j.write.busy) }

// ------------------------------------------------------------------ ends

// keepLimits ends a job that has reached one of its limits, once it is off the pod.
func (t *tracker) keepLimits(j *tracked, now time.Time) {
	if j.attempt.verdict != nil || j.rec.Progress.Status.Terminal() {
		return
	}
	name, over, next := j.overLimit(now, t)
	if !next.IsZero() {
		j.at(next)
	}
	if name == "Stall" {
		t.pod.stalledAt = now
	}
	if name == "" {
		if j.rec.Accepted && t.gone(now) {
			t.observe(j, obsVerdict{j.failure(CategoryOf(ErrPodGone), errors.Join(ErrPodGone, t.pod.failure))}, now)
		}
		return
	}
	t.takeOff(j, j.failure(CategoryTimeout, &limitError{name, over}), now)
}

// limitError says which limit a job has reached.
type limitError struct {
	name  string
	limit time.Duration
}

func (e *limitError) Error() string {
	return "the job reached its limit " + e.name + " of " + e.limit.String()
}

func (e *limitError) Timeout() bool { return true }

// overLimit returns the limit that the job has reached, or when the next one is due.
func (j *tracked) overLimit(now time.Time, t *tracker) (name string, limit time.Duration, next time.Time) {
	l := j.rec.Options.Limits
	check := func(what string, d time.Duration, from time.Time) {
		if d <= 0 || from.IsZero() || name != "" {
			return
		}
		if end := from.Add(d); !now.Before(end) {
			name, limit = what, d
		} else if next.IsZero() || end.Before(next) {
			next = end
		}
	}
	check("Total", l.Total, j.rec.CreatedAt)
	if !j.rec.Accepted {
		return name, limit, next
	}
	if j.rec.Started {
		check("Run", l.Run, j.rec.StartedAt)
	} else {
		check("Queue", l.Queue, j.acceptedAt)
	}
	check("Stall", l.stall(), t.stalledSince(j, now))
	return name, limit, next
}

// stalledSince is when neither the job nor the pod's queue has moved since; while nobody could have seen it move the count
// starts anew.
func (t *tracker) stalledSince(j *tracked, now time.Time) time.Time {
	since := j.movedAt
	if j.rec.Started && t.pod.stream != StreamUp {
		return now
	}
	if j.rec.Started && t.pod.upSince.After(since) {
		since = t.pod.upSince
	}
	if t.pod.movedAt.After(since) {
		since = t.pod.movedAt
	}
	if !t.pod.silentSince.IsZero() { // the pod does not answer: Gone is the limit for that
		return now
	}
	return since
}

// gone tells whether the pod has been unreachable for too long.
func (t *tracker) gone(now time.Time) bool {
	s := t.pod.silentSince
	return t.timing.Gone > 0 && !s.IsZero() && now.Sub(s) >= t.timing.Gone
}

// takeOff fails a job whose prompt the pod must not go on with.
func (t *tracker) takeOff(j *tracked, err *Error, now time.Time) {
	t.observe(j, obsVerdict{err}, now)
	j.leaving = j.rec.Accepted || j.posting.busy
	if j.leaving {
		t.wantCancel(j, now)
	}
}

// judge turns the pod's verdict over an attempt into the job's end or a new attempt.
func (t *tracker) judge(j *tracked, now time.Time) {
	v := j.attempt.verdict
	switch {
	case v == nil:
		return
	case j.leaving && !j.left:
		if now.Before(j.cancel.until) {
			j.at(j.cancel.until)
			return
		}
	case j.posting.busy && !j.rec.Accepted:
		return
	}
	if (v.interrupted || v.vanished) && !t.intentKnown(j) {
		return
	}
	err := v.err
	switch {
	case j.leaving:
		t.warnOfLeftover(j, now)
		t.finishFailed(j, StatusFailed, err, now)
	case j.rec.CancelRequested && (v.interrupted || v.vanished || errors.Is(err, ErrCancelled)):
		t.finishFailed(j, StatusCancelled, j.failure(CategoryCancelled, ErrCancelled), now)
	case j.rec.CancelRequested:
		t.finishFailed(j, StatusFailed, err, now)
	case j.rec.Options.AtMostOnce && v.vanished && errors.Is(err, ErrJobLost):
		t.finishFailed(j, StatusFailed, j.failure(CategoryUnknown, errors.Join(ErrOutcomeUnknown, ErrJobLost)), now)
	default:
		t.retryOrFail(j, err, now)
	}
}

// warnOfLeftover warns of a prompt that could not be taken off the pod in time. Whether it is there at all is not looked for any more.
func (t *tracker) warnOfLeftover(j *tracked, now time.Time) {
	if j.left || !j.rec.Accepted && !j.posting.busy {
		return
	}
	if j.posting.busy {
		j.posting.cut()
	}
	w := j.failure(CategoryUnavailable, errors.New("the pod has not confirmed the cancel; the prompt may still be on it"))
	t.observe(j, obsWarning{w}, now)
}

// newAttempts are the categories for which a new attempt can help on the same pod.
var newAttempts = []Category{CategoryLost, CategoryOutOfMemory, CategoryPodFault, CategoryInterrupted, CategoryExecution, CategoryMissingAsset}

func (t *tracker) retryOrFail(j *tracked, err *Error, now time.Time) {
	wait, again := t.retrier.next(err, j.rec.Attempt-j.first+1, now.Sub(j.rec.CreatedAt))
	if !again || !slices.Contains(newAttempts, err.Category) || j.rec.Options.AtMostOnce || errors.Is(err, ErrRemoved) {
		t.finishFailed(j, StatusFailed, err, now)
		return
	}
	t.counters.retries.Add(1)
	info := RetryInfo{
		Pod: t.opts.name, Op: "execute", JobID: j.rec.JobID, Try: j.rec.Attempt, Wait: wait, NewAttempt: true, Err: err,
	}
	t.afterwards(func() { t.client.notifyRetry(info) })
	t.nextAttempt(j, err, now.Add(wait), now)
}

// nextAttempt opens a new attempt. It is in the store before it is posted.
func (t *tracker) nextAttempt(j *tracked, err *Error, at, now time.Time) {
	t.leaveAttempt(j)
	t.observe(j, obsRetry{promptID: promptID(j.rec.JobID, j.rec.WorkflowHash, j.rec.Attempt+1), at: at, err: err}, now)
	j.rec.AttemptAt, j.rec.ClientID = at, t.opts.clientID
	if j.number != nil {
		j.rec.Number = *j.number
	}
	j.write.dirty, j.write.urgent = true, true
	j.posting.made = 0
	j.look = j.inherited // a former owner may have been further than the store remembers
	t.register(j)
}

// leaveAttempt forgets what belongs to the attempt that is over.
func (t *tracker) leaveAttempt(j *tracked) {
	t.unregister(j)
	t.offPod(j)
	j.settle, j.absent, j.intent, j.leaving = settleState{}, absentState{}, intentState{}, false
	j.left = false
	j.cancel.touched, j.cancel.hit = false, time.Time{}
	j.posting.streamBy = time.Time{}
}

// finishFailed ends the job other than well.
func (t *tracker) finishFailed(j *tracked, status Status, err *Error, now time.Time) {
	t.observe(j, obsEnd{status, err}, now)
}

// intentKnown asks the store, once, whether somebody wanted the job cancelled, before an interrupt or a vanished prompt is
// taken for somebody else's doing.
func (t *tracker) intentKnown(j *tracked) bool {
	if j.intent.known || j.rec.CancelRequested {
		return true
	}
	if !j.intent.busy {
		j.intent.busy = true
		id := j.rec.JobID
		t.asking.do(func(ctx context.Context) func() {
			ctx, cancel := context.WithTimeout(ctx, max(t.timing.StoreWait, time.Second))
			defer cancel()
			rec, err := t.store.Get(ctx, id)
			return func() {
				j.intent = intentState{known: true}
				if err == nil && rec.CancelRequested {
					j.rec.CancelRequested = true
				}
				t.advance(j, time.Now())
			}
		})
	}
	return false
}

// conclude lets go of a job that has ended: when its record has landed, or after StoreWait.
func (t *tracker) conclude(j *tracked, now time.Time) {
	if !j.concluded {
		j.concluded = true
		j.holdUntil = now.Add(max(0, t.timing.StoreWait))
		t.leaveAttempt(j)
		t.countEnd(j)
		j.unwatch()
	}
	if j.finished {
		return
	}
	if !j.unwritten() {
		t.forget(j) // first: whoever sees the end finds it in Stats too
		t.finish(j, nil)
		return
	}
	if !now.Before(j.holdUntil) {
		w := j.failure(CategoryStorage, errors.New("the end of the job has not reached the store yet; it is written as soon as the store answers"))
		t.finish(j, w)
		return
	}
	j.at(j.holdUntil)
}

func (t *tracker) countEnd(j *tracked) {
	if j.lease == nil {
		return
	}
	switch j.rec.Progress.Status {
	case StatusSucceeded:
		t.counters.succeeded.Add(1)
	case StatusCancelled:
		t.counters.cancelled.Add(1)
	default:
		t.counters.failed.Add(1)
	}
}

// finish shows the end to those who wait.
func (t *tracker) finish(j *tracked, warning *Error) {
	j.finished = true
	result := resultOf(&j.rec, t.client)
	if warning != nil {
		result.Warnings = append(result.Warnings, warning)
	}
	var err error
	if j.rec.Failure != nil {
		err = j.rec.Failure
	}
	j.handle.publish(&j.rec, nil)
	j.handle.finish(result, err, j.end)
	if t.hook != nil && j.end != nil {
		t.hook.push([]Event{*j.end})
	}
}

// forget drops a job that needs no more.
func (t *tracker) forget(j *tracked) {
	if t.jobs[j.rec.JobID] != j {
		return
	}
	delete(t.jobs, j.rec.JobID)
	t.followNoMore(j)
	if j.index >= 0 {
		heap.Remove(&t.wakes, j.index)
	}
	t.gauges.following.Add(-1)
	if j.lease != nil {
		t.released()
	}
}

// released notes that this client drives one job less.
func (t *tracker) released() {
	if t.gauges.owned.Add(-1) == 0 {
		t.due.linger = time.Now().Add(streamLinger)
	}
}

// ---------------------------------------------------------------- stream

func (t *tracker) follows(promptID []byte) bool {
	return t.prompts.open.Load() > 0 || t.prompts.has(promptID)
}

func (t *tracker) frameIn(f *frame) {
	t.mu.Lock()
	defer t.unlock()
	if !t.closed {
		t.frame(f)
		t.setClock()
	}
}

func (t *tracker) streamIn(s *stream, state StreamState, err error) {
	t.tell(func() { t.streamChanged(s, state, err) })
}

// frame takes one frame in. A frame that names no prompt is about nobody, but for what only a running node can send: that
// belongs to the prompt that this stream last named.
func (t *tracker) frame(f *frame) {
	now := time.Now()
	t.contact(now)
	switch {
	case f.preview != nil:
		if j := t.jobOf(f.from, f.preview.promptID); j != nil {
			preview := f.preview.Preview
			preview.Node = cmp.Or(preview.Node, j.rec.Progress.Node) // pods before 0.3.45 do not name it
			t.observe(j, obsPreview{&preview}, now)
		}
		return
	case f.text != nil:
		if j := t.jobOf(f.from, ""); j != nil {
			t.observe(j, obsText{f.text.Node, f.text.Text}, now)
		}
		return
	}
	if f.from == t.stream && f.msg.SID == "" && f.msg.Type != wire.FeatureFlags { // as stream.hears has it
		t.pod.heard = true
	}
	if f.msg.Type == wire.Status {
		t.statusFrame(f.msg.Remaining, now)
		return
	}
	t.message(f.from, &f.msg, now)
}

func (t *tracker) message(from *stream, m *wire.Message, now time.Time) {
	var j *tracked
	switch {
	case m.PromptID != "":
		j = t.byPrompt[m.PromptID]
		if j == nil {
			t.keepStray(m)
			return
		}
		t.current[from] = m.PromptID
	case m.Type == wire.Other:
		j = t.jobOf(from, "")
	}
	if j == nil || j.lease == nil {
		return
	}
	t.onSight(j, now, t.pod.incarnation)
	hadEnd := j.attempt.ended != nil
	t.observe(j, m, now)
	switch {
	case m.Type == wire.Executing && m.NodeNull:
		// The history is written by now (server.md §2).
		delete(t.current, from)
		if j.rec.Accepted && !j.settle.busy {
			t.settleNow(j, now)
		}
	case j.attempt.ended != nil && !hadEnd:
		j.settle.at, j.settle.by = now.Add(settleFirst), now.Add(t.timing.Settle)
	}
	if j.needsLook(m) {
		t.advance(j, now)
	}
}

// keepStray keeps a frame about a prompt that may turn out to be one that is being posted: an old pod names prompts itself. Steps are
// not worth the room.
func (t *tracker) keepStray(m *wire.Message) {
	if t.prompts.open.Load() == 0 || m.Type == wire.Progress || m.Type == wire.ProgressState {
		return
	}
	if len(t.strays) == maxStrays {
		t.strays = slices.Delete(t.strays, 0, 1)
	}
	t.strays = append(t.strays, *m)
}

// takeStrays has the frames about a prompt taken in that came before its POST was answered.
func (t *tracker) takeStrays(promptID string, now time.Time) {
	var its []wire.Message
	t.strays = slices.DeleteFunc(t.strays, func(m wire.Message) bool {
		if m.PromptID == promptID {
			its = append(its, m)
		}
		return m.PromptID == promptID
	})
	for i := range its {
		t.message(t.stream, &its[i], now)
	}
}

// needsLook tells whether a frame may make something due: progress never does.
func (j *tracked) needsLook(m *wire.Message) bool {
	return m.Type != wire.Progress && m.Type != wire.ProgressState || j.index < 0 || j.write.urgent
}

// jobOf finds the job of a frame, by its prompt or, failing that, by what the stream named last.
func (t *tracker) jobOf(from *stream, promptID string) *tracked {
	if promptID == "" {
		promptID = t.current[from]
	}
	j := t.byPrompt[promptID]
	if j == nil || j.lease == nil {
		return nil
	}
	return j
}

// statusFrame uses the pod's count: a queue that is shorter than our jobs on it means that one has ended unheard.
func (t *tracker) statusFrame(remaining int, now time.Time) {
	if remaining < 0 || remaining == t.pod.remaining {
		return
	}
	if remaining < t.pod.remaining {
		t.pod.movedAt = now
	}
	t.pod.remaining = remaining
	if remaining < t.inFlight && t.due.count.IsZero() {
		t.due.count = now.Add(unheardDelay)
	}
}

// countOpen has the pod looked at if it has fewer prompts than jobs of ours are open.
func (t *tracker) countOpen(now time.Time) {
	t.due.count = time.Time{}
	open := 0
	for _, j := range t.jobs {
		// A frame can be older than the answer to a POST that was faster.
		if j.rec.Accepted && j.attempt.ended == nil && !j.concluded && now.Sub(j.acceptedAt) > deafAfter {
			open++
		}
	}
	if t.pod.remaining < open {
		t.lookBy(now)
	}
}

const (
	// settleFirst is how long after a terminal frame the history is read if the frame that follows it does not come.
	settleFirst = 3 * time.Millisecond
	// unheardDelay lets the frames of an end arrive before it is looked for, and bounds how often jobs are counted.
	unheardDelay = 50 * time.Millisecond
	// deafAfter is how long the stream may lack what a look has shown before it is taken for deaf. A pod may be silent for
	// a second and a half while it collects garbage (server.md §2).
	deafAfter = 2 * time.Second
)

// streamChanged takes in that a stream came up or went down.
func (t *tracker) streamChanged(s *stream, state StreamState, err error) {
	if s != t.stream {
		return
	}
	now := time.Now()
	was := t.pod.stream
	if state == StreamDown && was == StreamDeaf || state == StreamConnecting && was == StreamDeaf {
		state = StreamDeaf // until a new connection is up
	}
	t.pod.stream = state
	t.gauges.stream.Store(state)
	switch state {
	case StreamUp:
		t.contact(now)
		t.pod.upSince, t.pod.heard, t.pod.fingerprints = now, false, true
		t.lookBy(now) // what happened meanwhile is not replayed
	case StreamDown, StreamIdle, StreamDeaf:
		t.pod.upSince, t.pod.heard, t.due.deaf = time.Time{}, false, time.Time{}
		delete(t.current, s)
		if err != nil {
			// That a proxy refuses sockets says nothing of the process behind it.
			if errors.Is(err, syscall.ECONNREFUSED) {
				t.noteRefusal(err, now)
			}
			t.log(slog.LevelDebug, "comfyui: stream down", "error", err)
		}
		if state != StreamIdle {
			t.lookBy(now)
		}
	}
	if state == was {
		return
	}
	for _, j := range t.jobs {
		if j.lease == nil || j.concluded {
			continue
		}
		ev := Event{
			Kind: EventStream, JobID: j.rec.JobID, PromptID: j.rec.PromptID, Attempt: j.rec.Attempt, Time: now, Source: SourceStream,
			Progress: j.rec.Progress, Stream: state, Err: err,
		}
		j.handle.publish(&j.rec, []Event{ev})
		if t.hook != nil {
			t.hook.push([]Event{ev})
		}
		if !j.rec.Accepted {
			t.advance(j, now)
		}
	}
}

// suspectDeaf starts the clock for a stream that should have brought a frame since some moment: heard is the count of then.
func (t *tracker) suspectDeaf(since time.Time, heard int64, now time.Time) {
	if t.pod.stream == StreamUp && t.due.deaf.IsZero() && since.After(t.pod.upSince) && t.stream.heard.Load() == heard {
		t.due.deaf, t.due.deafCount = now.Add(deafAfter), heard
	}
}

// deafDue replaces a connection that has heard nothing since it should have.
func (t *tracker) deafDue(now time.Time) {
	t.due.deaf = time.Time{}
	if t.pod.stream != StreamUp || t.stream.heard.Load() != t.due.deafCount {
		return
	}
	t.counters.deaf.Add(1)
	t.log(slog.LevelInfo, "comfyui: the stream is deaf; reconnecting")
	t.streamChanged(t.stream, StreamDeaf, nil)
	t.stream.reconnect()
}

// adoption is a stream under the client id of a former owner, to whom the pod sends the frames of jobs that were taken over.
type adoption struct {
	*stream
	leave context.CancelFunc
	jobs  int // that need it
}

// adoptStream listens for a job that was posted under another client id.
func (t *tracker) adoptStream(j *tracked) {
	id := j.rec.ClientID
	if id == "" || id == t.opts.clientID || j.adopted != nil {
		return
	}
	a := t.adopted[id]
	if a == nil {
		if len(t.adopted) >= maxAdopted {
			return
		}
		ctx, leave := context.WithCancel(t.ctx)
		a = &adoption{stream: newStream(id, t.endpoint, t.opts, t.counters, t), leave: leave}
		t.adopted[id] = a
		a.setWanted(true)
		t.wg.Go(func() { a.run(ctx) })
	}
	a.jobs++
	j.adopted = a
}

// abandonStream ends the job's adopted stream if no other job needs it.
func (t *tracker) abandonStream(j *tracked) {
	a := j.adopted
	if a == nil {
		return
	}
	j.adopted = nil
	if a.jobs--; a.jobs == 0 {
		a.leave()
		delete(t.adopted, a.clientID)
		delete(t.current, a.stream)
	}
}

// ------------------------------------------------------------ the pod

// contact notes that the pod answers. After a silence that ends the streams' pauses: they grew while nothing was there.
func (t *tracker) contact(now time.Time) {
	if !t.pod.silentSince.IsZero() && t.pod.stream != StreamUp {
		t.stream.hurry()
		for _, s := range t.adopted {
			s.hurry()
		}
	}
	t.pod.contactAt, t.pod.silentSince, t.pod.failure = now, time.Time{}, nil
}

// noContact notes that the pod did not answer.
func (t *tracker) noContact(err error, now time.Time) {
	if t.pod.silentSince.IsZero() {
		t.pod.silentSince = now
	}
	t.pod.failure = err
	t.noteRefusal(err, now)
}

// noteRefusal keeps signs that no process is there: a refused connection, or a proxy that says so.
func (t *tracker) noteRefusal(err error, now time.Time) {
	if isRefusal(err) {
		t.pod.refusedAt = now
	}
}

// lookBy asks for a look at the pod's queue at a time at the latest.
func (t *tracker) lookBy(when time.Time) {
	if t.due.look.IsZero() || when.Before(t.due.look) {
		t.due.look = when
	}
}

// lookPeriod is the time between two looks when nothing presses.
func (t *tracker) lookPeriod() time.Duration {
	period := t.timing.Poll
	// A connection that has brought nothing but its greeting may be deaf.
	if t.pod.stream == StreamUp && t.pod.heard {
		period = t.timing.PollStreaming
	}
	if period > 0 && t.pod.failures > 0 {
		period = min(period<<min(t.pod.failures-1, 3), max(period, 5*time.Second))
	}
	if period <= 0 {
		return period
	}
	return max(period, 20*t.pod.cost)
}

// look reads /queue and then /history for all jobs that the pod should have.
func (t *tracker) look(now time.Time) {
	t.due.look = time.Time{}
	if t.due.looking {
		return // the answer asks for the next one
	}
	var wanted []sought
	for _, j := range t.jobs {
		if j.lease != nil && j.rec.Accepted && !j.concluded && !j.finished {
			wanted = append(wanted, sought{j.rec.JobID, j.rec.PromptID, j.rec.Attempt})
		}
	}
	if len(wanted) == 0 {
		return
	}
	t.due.looking = true
	r := &reconciler{
		endpoint: t.endpoint, reads: t.reads, started: now, wanted: wanted, fingerprint: t.pod.fingerprints, witnesses: t.pod.witnesses(),
		incarnation: t.pod.incarnation, proven: t.pod.proven, heard: t.stream.heard.Load(),
		single: t.asksSingly(wanted, now),
	}
	t.errand.do(func(ctx context.Context) func() {
		r.started = time.Now() // it may have had to wait
		r.run(ctx)
		return func() { t.looked(r) }
	})
}

// asksSingly tells whether the next look is to ask for each job alone: they are few, beside the size of the queue, and nothing is to be
// learned that only the whole of it shows.
func (t *tracker) asksSingly(wanted []sought, now time.Time) bool {
	few := min(fewJobs, t.pod.queueBytes/jobWeight)
	if t.pod.queueBytes <= heavyQueue || len(wanted) > few || t.pod.fingerprints || !t.pod.wholeAt.After(t.pod.copiesUntil) {
		return false
	}
	period := wholeEvery
	for _, w := range wanted {
		if stall := t.jobs[w.jobID].rec.Options.Limits.stall(); stall > 0 {
			period = min(period, stall/3) // that the queue moves is to be seen in time
		}
	}
	return now.Sub(t.pod.wholeAt) < period
}

// expectCopies notes that a prompt may be on the pod twice, or may still come there a second time.
func (t *tracker) expectCopies(now time.Time) {
	t.pod.copiesUntil = now.Add(max(time.Second, t.timing.Grace))
	t.lookBy(now)
}

// looked takes in what a look has found.
func (t *tracker) looked(r *reconciler) {
	now := time.Now()
	t.due.looking, t.pod.lookedAt = false, now
	if r.err != nil {
		t.pod.failures++
		t.noContact(r.err, now)
	} else {
		t.pod.failures, t.pod.cost = 0, r.cost
		t.contact(now)
	}
	t.tookLook(r, now)
	for _, w := range r.wanted {
		if j := t.jobs[w.jobID]; j != nil && j.lease != nil && j.rec.PromptID == w.promptID && !j.concluded {
			t.found(j, r, now)
			if r.err == nil && j.cancel.hit.After(r.started) { // too late for this look
				t.lookAfterCancel(now)
			}
			t.advance(j, now)
		}
	}
	if period := t.lookPeriod(); period > 0 && t.gauges.owned.Load() > 0 {
		t.lookBy(now.Add(period))
	}
}

// tookLook takes in what a look says of the pod as a whole.
func (t *tracker) tookLook(r *reconciler, now time.Time) {
	if r.evidence.taken && r.incarnation == t.pod.incarnation {
		t.tookEvidence(r)
	}
	if r.whole {
		if r.shape.first != "" {
			t.pod.running = r.shape.first
		}
		t.pod.queueBytes, t.pod.wholeAt = r.bytes, now
		if r.shape.movedFrom(t.pod.shape) {
			t.pod.movedAt = now
		}
		t.pod.shape = r.shape
	}
}

// tookEvidence compares the process with the one before.
func (t *tracker) tookEvidence(r *reconciler) {
	t.pod.fingerprints = false
	switch {
	case r.evidence.gone && r.breaks > t.pod.proven:
		t.restarted()
	case r.evidence.gone: // somebody has cleared the history
		t.pod.ended, t.pod.running = "", ""
	}
	t.pod.oldest, t.pod.proven = r.evidence.oldest, r.breaks
}

// witnesses are prompts that the process must still have, in its queue or its history, if it is the one before.
func (p *podView) witnesses() []string {
	return slices.DeleteFunc([]string{p.oldest, p.ended, p.running}, func(id string) bool { return id == "" })
}

// restarted notes that another process answers than before.
func (t *tracker) restarted() {
	t.pod.incarnation++
	t.pod.highest, t.pod.oldest, t.pod.ended, t.pod.running = math.Inf(-1), "", "", ""
	t.pod.fingerprints = true
	t.pod.poison, t.pod.poisonedAt, t.pod.stalledAt = nil, time.Time{}, time.Time{}
	t.endpoint.forgetVersion()
	t.log(slog.LevelWarn, "comfyui: the pod has restarted")
}

// found takes in what a look says of one job.
func (t *tracker) found(j *tracked, r *reconciler, now time.Time) {
	at, ok := r.spots[j.rec.PromptID]
	if !ok {
		return
	}
	if at.copies > 1 {
		t.removeDuplicate(j, at.promptID, r.started)
	} else if at.stray != "" {
		t.removeDuplicate(j, at.stray, r.started)
	}
	heardOf := j.rec.ClientID == t.opts.clientID
	switch at.place {
	case placeRunning:
		j.cancel.outlived(r.started, true)
		t.onSight(j, r.started, r.incarnation)
		j.witnesses, j.breaks = t.pod.witnesses(), r.breaks
		wasRunning := j.rec.Started
		if t.observe(j, obsRunning{at.number}, now) && !wasRunning && heardOf {
			t.suspectDeaf(r.started, r.heard, now)
		}
	case placePending:
		j.cancel.outlived(r.started, false)
		t.onSight(j, r.started, r.incarnation)
		j.witnesses, j.breaks = t.pod.witnesses(), r.breaks
		t.observe(j, obsQueued{at.number, at.ahead}, now)
	case placeHistory:
		if j.attempt.ended == nil && heardOf {
			t.suspectDeaf(r.started, r.heard, now)
		}
		t.historyRead(j, at.entry, now)
	case placeAbsent:
		t.notFound(j, r.started, now)
	case placeUnread:
		t.unread(j, at.err, r.started, now)
	}
}

// onSight notes that the pod had the job at a time, in an incarnation of it.
func (t *tracker) onSight(j *tracked, at time.Time, incarnation int) {
	if at.After(j.seenAt) {
		j.seenAt = at
	}
	j.incarnation = max(j.incarnation, incarnation)
	j.sighted, j.hearsay, j.absent.again, j.absent.unread = true, false, time.Time{}, time.Time{}
}

// historyRead takes in the history entry of a job.
func (t *tracker) historyRead(j *tracked, entry *wire.HistoryEntry, now time.Time) {
	t.pod.ended = entry.PromptID
	j.absent.again, j.absent.unread = time.Time{}, time.Time{}
	j.left = true
	if j.awaitsReply(now) && mayLack(j.rec.Workflow, entry) {
		j.settle.entry = entry
		j.at(j.acceptedAt.Add(replyWait))
		return
	}
	t.decide(j, entry, now)
}

// decide lets the history say how the attempt ended.
func (t *tracker) decide(j *tracked, entry *wire.HistoryEntry, now time.Time) {
	j.settle.entry = nil
	t.observe(j, obsHistory{entry, outputsOf(t.client, entry.Outputs)}, now)
	t.notePoison(j, now)
}

// replyWait is how long a job that is over on the pod waits for the answer to its POST, if there is a sign that outputs failed
// validation: that answer alone says so (server.md §1), and it may still be on its way when the history has been read.
const replyWait = 2 * time.Second

func (j *tracked) awaitsReply(now time.Time) bool {
	return j.posting.busy && now.Before(j.acceptedAt.Add(replyWait))
}

// mayLack tells whether the pod may have dropped outputs: a node that feeds no other is an output as a rule, and did not run as one.
func mayLack(workflow json.RawMessage, entry *wire.HistoryEntry) bool {
	w, err := ParseWorkflow(workflow)
	return err == nil && slices.ContainsFunc(w.ends(), func(id string) bool { return !slices.Contains(entry.Targets, id) })
}

// heldDue decides by the history that was held back, when the answer has come or has been waited for long enough.
func (t *tracker) heldDue(j *tracked, now time.Time) {
	switch entry := j.settle.entry; {
	case entry == nil:
	case j.awaitsReply(now):
		j.at(j.acceptedAt.Add(replyWait))
	default:
		t.decide(j, entry, now)
	}
}

// notePoison remembers a fault that only a restart of the pod clears.
func (t *tracker) notePoison(j *tracked, now time.Time) {
	v := j.attempt.verdict
	var e *ExecutionError
	if v != nil && v.err != nil && errors.As(v.err, &e) && poisonsPod(e) {
		t.pod.poison, t.pod.poisonedAt = e, now
	}
}

// ---------------------------------------------------- the end on the pod

// settleNow reads the history of a job whose end the stream has told.
func (t *tracker) settleNow(j *tracked, now time.Time) {
	if j.settle.by.IsZero() {
		j.settle.by = now.Add(t.timing.Settle)
	}
	j.settle.at = now
	t.settleDue(j, now)
}

func (t *tracker) settleDue(j *tracked, now time.Time) {
	if j.settle.at.IsZero() || j.settle.busy || j.attempt.verdict != nil {
		return
	}
	if now.Before(j.settle.at) {
		j.at(j.settle.at)
		return
	}
	j.settle.busy = true
	id, prompt := j.rec.JobID, j.rec.PromptID
	t.errand.do(func(ctx context.Context) func() {
		entry, err := t.endpoint.history(ctx, prompt)
		return func() { t.settled(id, prompt, entry, err) }
	})
}

// settled takes in the answer. The pod writes the history a moment after the terminal frame (server.md §3.2); when it does not
// come in time, or was cleared, the stream's word stands.
func (t *tracker) settled(jobID, promptID string, entry *wire.HistoryEntry, err error) {
	j, now := t.jobs[jobID], time.Now()
	if j == nil || j.lease == nil || j.concluded || j.rec.PromptID != promptID {
		return
	}
	j.settle.busy = false
	j.settle.tries++
	told := err == nil || unreadable(err)
	if told {
		t.contact(now)
	} else {
		t.noContact(err, now)
	}
	switch {
	case entry != nil:
		j.settle.at = time.Time{}
		t.historyRead(j, entry, now)
	case j.attempt.ended == nil:
		// node:null without a terminal frame: frames were missed.
		j.settle.at = time.Time{}
		t.lookBy(now)
	case told && !now.Before(j.settle.by) || t.gone(now):
		j.settle.at = time.Time{}
		t.warnOfGap(j, now)
		t.observe(j, obsSettled{}, now)
		t.notePoison(j, now)
	default:
		j.settle.at = now.Add(min(time.Second, settleFirst<<min(j.settle.tries, 10)))
	}
	t.advance(j, now)
}

// warnOfGap warns that the stream, whose word stands for the history's, has not brought all of the attempt.
func (t *tracker) warnOfGap(j *tracked, now time.Time) {
	if t.unbrokenSince(j.acceptedAt) || j.attempt.ended == nil || j.attempt.ended.Type != wire.ExecutionSuccess {
		return
	}
	w := j.failure(CategoryUnknown, errors.New("the pod's history was gone, or could not be read, and the stream had a gap: outputs may be missing"))
	t.observe(j, obsWarning{w}, now)
}

// notFound takes in that the pod had the job neither in its queue nor in its history when the look began.
func (t *tracker) notFound(j *tracked, looked, now time.Time) {
	if looked.Before(j.seenAt) || j.absent.busy {
		return // it was seen, or taken, after the look began
	}
	if j.leaving {
		j.left = true
		return
	}
	if j.attempt.ended != nil {
		return // the history is late, or gone: settle has the word
	}
	if j.cancel.touched && j.rec.CancelRequested {
		t.observe(j, obsVanished{j.failure(CategoryCancelled, ErrCancelled)}, now)
		return
	}
	j.absent.unread = time.Time{} // it has told
	if t.missed(&j.absent.again, max(0, t.timing.Grace), looked) {
		t.gatherEvidence(j)
	}
}

// unreadFor is how long a history entry that the pod cannot give is asked for.
const unreadFor = time.Minute

// unread takes in that the pod had the job no more in its queue when the look began, and cannot give its history entry: the stream has
// the word or, where it has not told the end, nobody.
func (t *tracker) unread(j *tracked, cause error, looked, now time.Time) {
	if looked.Before(j.seenAt) || j.absent.busy {
		return
	}
	j.left = true
	if !j.leaving && j.attempt.ended == nil && t.missed(&j.absent.unread, unreadFor, looked) {
		t.observe(j, obsVerdict{j.failure(CategoryUnknown, errors.Join(ErrOutcomeUnknown, cause))}, now)
	}
}

// missed tells whether something is missed since so long. The first time it has the pod looked at again.
func (t *tracker) missed(until *time.Time, patience time.Duration, looked time.Time) bool {
	if until.IsZero() {
		*until = looked.Add(patience)
		t.lookBy(*until)
		return false
	}
	return !looked.Before(*until)
}

func (t *tracker) absentDue(j *tracked, now time.Time) {
	for _, again := range [...]time.Time{j.absent.again, j.absent.unread} {
		if !j.absent.busy && now.Before(again) {
			j.at(again)
			t.lookBy(again)
		}
	}
}

// gatherEvidence asks whether the process is the one that took the job.
func (t *tracker) gatherEvidence(j *tracked) {
	j.absent.busy = true
	id, prompt := j.rec.JobID, j.rec.PromptID
	r := &reconciler{endpoint: t.endpoint, reads: t.reads, started: time.Now(), witnesses: j.witnesses, incarnation: t.pod.incarnation}
	t.errand.do(func(ctx context.Context) func() {
		if r.lookAtQueue(ctx); r.err == nil {
			r.takeFingerprint(ctx)
		}
		return func() { t.vanished(id, prompt, r) }
	})
}

// vanished says what it means that a job is gone from the pod (design: 6. Gone from the pod).
func (t *tracker) vanished(jobID, promptID string, r *reconciler) {
	j, now := t.jobs[jobID], time.Now()
	if j == nil || j.lease == nil || j.concluded || j.rec.PromptID != promptID {
		return
	}
	j.absent.busy = false
	if r.err != nil {
		t.noContact(r.err, now)
		t.lookBy(now.Add(max(t.timing.Poll, time.Second))) // not at once: what fails at once would be asked without end
		t.advance(j, now)
		return
	}
	t.contact(now)
	t.tookLook(r, now)
	if j.absent.again.IsZero() || j.attempt.ended != nil { // it was heard of meanwhile
		t.advance(j, now)
		return
	}
	cause := ErrOutcomeUnknown
	switch {
	case t.lostByRestart(j, r):
		cause = ErrJobLost
	case !j.rec.Started && !j.hearsay && (t.unbrokenSince(j.seenAt) || r.evidence.same):
		cause = ErrRemoved
	}
	t.observe(j, obsVanished{j.failure(CategoryOf(cause), cause)}, now)
	t.advance(j, now)
}

// unbrokenSince tells whether the stream has been up since a time: then the process is the same, and whatever it had to tell of a
// job was heard.
func (t *tracker) unbrokenSince(when time.Time) bool {
	return !t.pod.upSince.IsZero() && !t.pod.upSince.After(when)
}

// lostByRestart weighs the evidence. An empty history alone proves nothing, since anybody can clear it; nor does a stream that
// broke, since a proxy may have cut it. But a process that ends takes all its connections with it.
func (t *tracker) lostByRestart(j *tracked, r *reconciler) bool {
	switch {
	case j.incarnation < t.pod.incarnation:
		return true
	case t.unbrokenSince(j.seenAt) || r.evidence.same || r.breaks <= j.breaks:
		return false
	}
	// What was seen to run leaves the queue for the history, and for nothing else.
	gone := r.evidence.gone || j.rec.Started && j.sighted
	return gone || r.evidence.empty && t.pod.refusedAt.After(j.seenAt)
}

// ---------------------------------------------------------------- store

// writeDue sends the record to the store: at once for what must not be lost, else at most every ProgressWrite.
func (t *tracker) writeDue(j *tracked, now time.Time) {
	w := &j.write
	if j.lease == nil || !w.dirty || w.busy {
		return
	}
	if (!w.urgent || w.failures > 0) && now.Before(w.at) {
		j.at(w.at)
		return
	}
	w.dirty, w.urgent, w.busy = false, false, true
	j.rec.Rev++
	if !w.pending {
		w.pending = true
		t.gauges.unwritten.Add(1)
	}
	lease := j.lease
	if t.memory != nil { // takes a lock, copies, and that is all: no reason to go through a worker
		wanted, stored, err := t.writeRecord(t.ctx, &j.rec)
		t.wrote(j, lease, &j.rec, wanted, stored, err)
		return
	}
	rec := j.rec.Clone()
	t.writing.do(func(ctx context.Context) func() {
		wanted, stored, err := t.writeRecord(ctx, rec)
		return func() { t.wrote(j, lease, rec, wanted, stored, err) }
	})
}

// writeRecord updates the record, and creates it again if the store has lost it. wanted: somebody has asked for a cancel. With
// ErrFenced stored is what the store has.
func (t *tracker) writeRecord(ctx context.Context, rec *Record) (wanted bool, stored *Record, err error) {
	t.counters.storeWrites.Add(1)
	if t.memory != nil {
		if kept, _, err := t.memory.update(ctx, rec); err == nil {
			return kept.cancelRequested, nil, nil
		}
	}
	stored, err = t.store.Update(ctx, rec)
	if errors.Is(err, ErrJobNotFound) {
		if _, err = t.store.Get(ctx, rec.JobID); errors.Is(err, ErrJobNotFound) {
			stored, err = t.recreate(ctx, rec)
		}
	}
	if err != nil && !errors.Is(err, ErrFenced) {
		t.counters.storeErrors.Add(1)
	}
	return err == nil && stored.CancelRequested, stored, err
}

// recreate brings back a record that the store has lost, with what it should say by now.
func (t *tracker) recreate(ctx context.Context, rec *Record) (*Record, error) {
	fresh := rec.Clone()
	fresh.Owner = t.owner
	stored, err := t.store.Create(ctx, fresh, t.timing.Lease)
	if err != nil {
		return nil, err
	}
	if stored.Owner != t.owner {
		return stored, ErrFenced
	}
	rec.Epoch, rec.Rev = stored.Epoch, max(rec.Rev, stored.Rev)
	return stored, nil
}

// wrote takes in the store's answer to what was written under a lease.
func (t *tracker) wrote(j *tracked, l *lease, rec *Record, wanted bool, stored *Record, err error) {
	if j.lease != l { // lost, and won again perhaps
		return
	}
	now := time.Now()
	j.write.busy = false
	switch {
	case errors.Is(err, ErrFenced):
		t.fenced(j, stored, now)
		return
	case err != nil:
		// What was to be written is still to be written, with whatever is new by then.
		j.write.failures++
		j.write.dirty, j.write.at = true, now.Add(min(30*time.Second, 100*time.Millisecond<<min(j.write.failures, 8)))
		j.write.urgent = true
		t.log(slog.LevelWarn, "comfyui: the store did not take a record", "job", j.rec.JobID, "error", err)
	default:
		j.write.failures = 0
		t.landed(j)
		j.write.attempt = max(j.write.attempt, rec.Attempt)
		j.rec.Epoch, j.rec.Rev = rec.Epoch, max(j.rec.Rev, rec.Rev)
		j.lease.toldIntent(now)
		if wanted {
			t.learnIntent(j)
		}
	}
	t.advance(j, now)
}

// landed notes that nothing of the job waits for the store.
func (t *tracker) landed(j *tracked) {
	if j.write.pending {
		j.write.pending = false
		t.gauges.unwritten.Add(-1)
	}
}

// fenced turns the job's driver into a follower of whoever drives it now.
func (t *tracker) fenced(j *tracked, stored *Record, now time.Time) {
	t.log(slog.LevelWarn, "comfyui: another owner drives the job now", "job", j.rec.JobID)
	j.lease.lose()
	j.stopPosting()
	t.leaveAttempt(j)
	j.lease = nil
	j.cancel.stop()
	t.landed(j)
	j.write = writeState{}
	if j.end != nil { // what this process held for the end was never stored
		j.end, j.concluded = nil, false
	}
	t.released()
	if stored != nil && !j.finished {
		t.seenLease(j, stored, now)
		t.followed(j, stored, now)
	}
	t.advance(j, now)
}

// renew extends the leases of all jobs that this client drives, and learns of cancels that others have asked for.
func (t *tracker) renew(now time.Time) {
	t.due.renew = time.Time{}
	var ids []string
	driven := map[string]*tracked{}
	for id, j := range t.jobs {
		if j.lease != nil && !j.rec.Progress.Status.Terminal() {
			ids = append(ids, id)
			driven[id] = j
		}
	}
	if len(ids) == 0 {
		return
	}
	t.due.renew = now.Add(t.renewEvery())
	if t.due.renewing {
		return
	}
	t.due.renewing = true
	t.renewal.do(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, t.timing.Lease)
		defer cancel()
		asked := time.Now()
		lost, err := t.store.Renew(ctx, t.owner, t.timing.Lease, ids)
		if err != nil {
			t.counters.storeErrors.Add(1)
		}
		reader, ok := t.store.(intentReader)
		if !ok {
			return func() { t.renewed(asked, ids, lost, err, t.readIntent) }
		}
		cancels, _ := reader.cancelsRequested(ctx, ids) // what cannot be read now is read with the next renewal
		return func() {
			t.renewed(asked, ids, lost, err, nil)
			for _, id := range cancels {
				t.learnIntent(driven[id])
			}
		}
	})
}

// renewed takes in what became of the leases. readIntent, if any, is called for each job whose lease goes on.
func (t *tracker) renewed(asked time.Time, ids, lost []string, err error, readIntent func(*tracked)) {
	t.due.renewing = false
	isLost := make(map[string]bool, len(lost))
	for _, id := range lost {
		isLost[id] = true
	}
	for _, id := range ids {
		j := t.jobs[id]
		if j == nil || j.lease == nil || j.rec.Progress.Status.Terminal() {
			continue
		}
		switch {
		case isLost[id]:
			t.lostLease(j)
		case err == nil:
			j.lease.confirmed(asked)
			if readIntent != nil {
				readIntent(j)
			}
		}
	}
}

// lostLease finds out whether the record has another owner or is gone, and brings it back in that case.
func (t *tracker) lostLease(j *tracked) {
	if j.asking {
		return
	}
	j.asking = true
	id, lease := j.rec.JobID, j.lease
	t.asking.do(func(ctx context.Context) func() {
		stored, err := t.store.Get(ctx, id)
		return func() {
			now := time.Now()
			j.asking = false
			switch {
			case j.lease != lease || j.concluded:
			case errors.Is(err, ErrJobNotFound):
				j.write.dirty, j.write.urgent = true, true // the Update that finds it missing creates it again
				t.advance(j, now)
			case err == nil && stored.Epoch < j.rec.Epoch: // the store has lost the claim
				j.write.dirty, j.write.urgent = true, true
				t.advance(j, now)
			case err == nil && (stored.Owner != t.owner || stored.Progress.Status.Terminal()):
				t.fenced(j, stored, now)
			default:
				t.advance(j, now)
			}
		}
	})
}

// readIntent looks whether somebody has asked for a cancel; nothing else may be written for a while that would tell.
func (t *tracker) readIntent(j *tracked) {
	if j.rec.CancelRequested || j.cancel.refused || j.reading {
		return
	}
	j.reading = true
	id := j.rec.JobID
	t.watching.do(func(ctx context.Context) func() {
		stored, err := t.store.Get(ctx, id)
		return func() {
			j.reading = false
			if err == nil && stored.CancelRequested {
				t.learnIntent(j)
			}
		}
	})
}

// learnIntent takes in that somebody wants a job cancelled.
func (t *tracker) learnIntent(j *tracked) {
	if now := time.Now(); j != nil && j.lease != nil && !j.concluded && !j.rec.CancelRequested && !j.cancel.refused {
		j.rec.CancelRequested = true
		t.wantCancel(j, now)
		t.advance(j, now)
	}
}

// ------------------------------------------------------------- followers

const (
	// followPeriod is how often the record of a job that another owner drives is read while nothing is told of it.
	followPeriod = time.Second
	// toldPeriod is how often it is read although all is told: one word of it may have been lost.
	toldPeriod = 5 * time.Second
)

// followAlong reads the record of a job that another owner drives, now and then and when there is news of it, and takes the job over
// when that owner's lease runs out.
func (t *tracker) followAlong(j *tracked, now time.Time) {
	f := j.following()
	if f.ear == nil && t.ears != nil {
		f.ear = t.ears.listenTo(j)
	}
	if f.busy {
		return
	}
	if now.Before(f.at) {
		j.at(f.at)
		return
	}
	f.busy, f.again, f.heard = true, false, false
	id := j.rec.JobID
	claim := t.mayClaim(j, now)
	t.watching.do(func(ctx context.Context) func() {
		asked := time.Now()
		rec, ours, err := t.claimOrGet(ctx, id, claim)
		return func() {
			switch {
			case ours:
				t.tookOver(j, rec, asked)
			case j.follow == f && !j.finished:
				t.readRecord(j, rec, err, time.Now())
			}
		}
	})
}

// claimOrGet returns a record that is ours, or else as it stands.
func (t *tracker) claimOrGet(ctx context.Context, id string, claim bool) (rec *Record, ours bool, err error) {
	if claim {
		rec, err = t.store.Claim(ctx, id, t.owner, t.timing.Lease)
		if err == nil || errors.Is(err, ErrJobHeld) && rec != nil {
			return rec, err == nil, nil
		}
	}
	rec, err = t.store.Get(ctx, id)
	return rec, false, err
}

// following is what there is to know of a job that this client does not drive.
func (j *tracked) following() *followState {
	if j.follow == nil {
		j.follow = &followState{}
	}
	return j.follow
}

// followNoMore is for a job that this client drives from now on, or lets go of.
func (t *tracker) followNoMore(j *tracked) {
	if j.follow != nil && j.follow.ear != nil {
		j.follow.ear.close()
	}
	j.follow = nil
}

// mayClaim tells whether the owner may have lost its lease. The store knows.
func (t *tracker) mayClaim(j *tracked, now time.Time) bool {
	f := j.follow
	switch {
	case f.since.IsZero() || j.rec.Pod != t.opts.name:
		return false
	case f.lease.IsZero() || j.rec.Owner == t.owner: // a lease of this client's own is that of a claim whose reply was lost
		return true
	}
	return !now.Before(t.lapse(f))
}

// lapse is when the lease of an owner that does not renew any more has run out: one that does moves its end, compared with
// itself, whatever the clocks say.
func (t *tracker) lapse(f *followState) time.Time { return f.since.Add(t.timing.Lease + followPeriod) }

// readRecord takes in what the store has of a followed job.
func (t *tracker) readRecord(j *tracked, rec *Record, err error, now time.Time) {
	f := j.follow
	f.busy, f.at = false, now.Add(followPeriod)
	switch {
	case err == nil:
		free := f.lease.IsZero()
		t.seenLease(j, rec, now)
		if !f.heard || newer(rec, &j.rec) { // what was told meanwhile was written after it was read
			t.followed(j, rec, now)
		}
		switch {
		case f.again, !free && f.lease.IsZero(): // given back
			f.at = now
		case f.live && !t.mayClaim(j, now):
			f.at = now.Add(max(followPeriod, min(toldPeriod, t.timing.Lease/6)))
			if lapse := t.lapse(f); lapse.Before(f.at) && lapse.After(now) {
				f.at = lapse
			}
		}
	case errors.Is(err, ErrJobNotFound):
		t.missedRecord(j, now)
	default:
		t.counters.storeErrors.Add(1)
	}
	t.advance(j, now)
}

// seenLease notes when the lease was last renewed: after the record was last read.
func (t *tracker) seenLease(j *tracked, rec *Record, now time.Time) {
	f := j.following()
	f.missedSince = time.Time{}
	switch {
	case f.since.IsZero():
		f.lease, f.since = rec.LeaseUntil, now
	case !rec.LeaseUntil.Equal(f.lease):
		f.lease, f.since = rec.LeaseUntil, f.read
	}
	f.read = now
}

// followed shows what another owner has written.
func (t *tracker) followed(j *tracked, rec *Record, now time.Time) {
	was := j.rec
	was.Progress = j.handle.shown()
	fresh := *rec
	fresh.Progress.Fraction = max(fresh.Progress.Fraction, was.Progress.Fraction) // the writer may be behind what was shown here
	evs := eventsBetween(&was, &fresh)
	for i := range evs {
		if evs[i].Time.IsZero() { // the record does not tell when
			evs[i].Time = now
		}
	}
	j.rec, j.attempt = fresh, attemptState{}
	if rec.Accepted {
		j.handle.accept()
	}
	if len(evs) > 0 {
		t.spread(j, evs, now)
	}
}

// told takes in what the store has told of a followed job. What its owner goes through is shown at once; an end, and all that is not
// in line with what is known, only as the record has it.
func (t *tracker) told(e *ear, news rumour, now time.Time) {
	j := e.job
	f := j.follow
	if f == nil || f.ear != e {
		return
	}
	f.live = news.live
	for _, v := range news.versions {
		switch {
		case v.JobID != j.rec.JobID || v.Epoch != j.rec.Epoch || v.Progress.Status.Terminal():
			news.look = true
		case v.Rev > j.rec.Rev:
			f.heard = true
			fresh := cloneWithout(v)
			fresh.Pod, fresh.Workflow = j.rec.Pod, j.rec.Workflow
			fresh.Owner, fresh.LeaseUntil, fresh.CancelRequested = j.rec.Owner, j.rec.LeaseUntil, j.rec.CancelRequested
			t.followed(j, fresh, now)
		}
	}
	if news.look {
		f.at, f.again = now, true
	}
	t.advance(j, now)
}

// tookOver makes this client the driver of a job that it followed.
func (t *tracker) tookOver(j *tracked, rec *Record, asked time.Time) {
	now := time.Now()
	if j.lease != nil || j.finished {
		return
	}
	t.followNoMore(j)
	t.followed(j, rec, now)
	if j.finished || rec.Progress.Status.Terminal() {
		t.advance(j, now)
		return
	}
	if j.graph == nil {
		j.graph = graphOf(rec)
	}
	t.counters.recovered.Add(1)
	t.drive(j, admission{rec: rec, confirmed: asked}, now)
	t.advance(j, now)
}

// missedRecord takes in that the record of a followed job is not there: its owner creates it again at the next renewal, if it lives.
func (t *tracker) missedRecord(j *tracked, now time.Time) {
	f := j.follow
	if f.missedSince.IsZero() {
		f.missedSince = now
	}
	if now.Sub(f.missedSince) > t.timing.Lease {
		t.vanishedRecord(j)
	}
}

// vanishedRecord ends the handle of a followed job whose record is gone for good: nobody can tell how it ended.
func (t *tracker) vanishedRecord(j *tracked) {
	j.unwatch()
	j.finished, j.concluded = true, true
	t.forget(j)
	j.handle.finish(nil, j.noEnd(ErrJobNotFound), nil)
}

// noEnd is what Wait returns in place of an end.
func (j *tracked) noEnd(cause error) *Error {
	e := j.failure(CategoryOf(cause), cause)
	e.Op = "wait"
	return e
}

// ears hear what the store tells of the jobs that others drive, on one goroutine for all of them: the store tells under locks of
// its own, under which the tracker's must not be taken.
type ears struct {
	t     *tracker
	store announcer
	wake  chan struct{} // holds one token while there is something in queue

	mu      sync.Mutex
	running bool
	queue   []*ear // those that have something new
}

// ear is a versionSink for one followed job.
type ear struct {
	of    *ears
	job   *tracked
	jobID string

	// Guarded by of.mu.
	queued, closed bool
	news           rumour
}

// rumour is what a store has told of a job.
type rumour struct {
	versions []*Record // oldest first
	look     bool      // the record may tell more
	live     bool      // all that is written is told
}

func newEars(t *tracker, store announcer) *ears {
	return &ears{t: t, store: store, wake: make(chan struct{}, 1)}
}

// listenTo has the store tell of a job, until close.
func (s *ears) listenTo(j *tracked) *ear {
	e := &ear{of: s, job: j, jobID: j.rec.JobID}
	e.note(func() {
		if !s.running {
			s.running = true
			s.t.wg.Go(s.run)
		}
	})
	return e
}

func (e *ear) close() { e.note(func() { e.closed = true }) }

// put and hears implement versionSink.
func (e *ear) put(v *Record) {
	e.note(func() {
		if v == nil {
			e.news.look = true
		} else {
			e.news.versions = withVersion(e.news.versions, v)
		}
	})
}

func (e *ear) hears(live bool) { e.note(func() { e.news.live, e.news.look = live, true }) }

// note changes what the ear holds, and has it looked at.
func (e *ear) note(change func()) {
	s := e.of
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	if !e.queued {
		e.queued = true
		s.queue = append(s.queue, e)
	}
	signal(s.wake)
}

// take is what is new of an ear.
func (e *ear) take() (news rumour, closed bool) {
	e.of.mu.Lock()
	defer e.of.mu.Unlock()
	news = e.news
	e.queued, e.news = false, rumour{live: news.live}
	return news, e.closed
}

// run serves the ears until the tracker stops.
func (s *ears) run() {
	stops := map[*ear]func(context.Context){} // of those that are being told
	stop := func(e *ear) {
		ctx, cancel := s.t.lastCalls(s.t.ctx)
		defer cancel()
		stops[e](ctx)
		delete(stops, e)
	}
	for {
		select {
		case <-s.wake:
		case <-s.t.ctx.Done():
			for e := range stops {
				stop(e)
			}
			return
		}
		s.mu.Lock()
		queue := s.queue
		s.queue = nil
		s.mu.Unlock()
		for _, e := range queue {
			news, closed := e.take()
			switch told := stops[e] != nil; {
			case closed && told:
				stop(e)
			case closed:
			case !told:
				stops[e] = s.store.announce(e.jobID, e)
			default:
				s.t.tell(func() { s.t.told(e, news, time.Now()) })
			}
		}
	}
}

// watches make an announcer of any Watcher. It needs a goroutine for each job that it watches, so that of many jobs it watches a few;
// the others wait for their turn.
type watches struct {
	t  *tracker
	of Watcher

	mu      sync.Mutex
	busy    int
	waiting list.List // of *watch
}

type watch struct {
	ctx   context.Context
	jobID string
	to    versionSink
}

// announce implements announcer.
func (s *watches) announce(jobID string, to versionSink) (stop func(context.Context)) {
	ctx, cancel := context.WithCancel(s.t.ctx)
	w := &watch{ctx, jobID, to}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy < maxWatches {
		s.busy++
		s.t.wg.Go(func() { s.run(w) })
		return func(context.Context) { cancel() }
	}
	place := s.waiting.PushBack(w)
	return func(context.Context) {
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.waiting.Remove(place)
	}
}

// run watches jobs, one after another, until none waits.
func (s *watches) run(w *watch) {
	for w != nil {
		s.watch(w)
		w = s.next()
	}
}

func (s *watches) next() *watch {
	s.mu.Lock()
	defer s.mu.Unlock()
	if first := s.waiting.Front(); first != nil {
		return s.waiting.Remove(first).(*watch)
	}
	s.busy--
	return nil
}

// watch watches a job for as long as it is followed. Whatever an event says, the record says it better.
func (s *watches) watch(w *watch) {
	const shortest, longest = followPeriod, time.Minute
	for wait := shortest; w.ctx.Err() == nil; wait = min(2*wait, longest) {
		for _, err := range s.of.Watch(w.ctx, w.jobID) {
			if err != nil {
				break
			}
			w.to.hears(true)
			wait = shortest
		}
		w.to.hears(false)
		select {
		case <-time.After(wait):
		case <-w.ctx.Done():
		}
	}
}

// -------------------------------------------------------------- schedule

// wakeHeap orders jobs by when they are to be looked at.
type wakeHeap []*tracked

func (h wakeHeap) Len() int           { return len(h) }
func (h wakeHeap) Less(i, k int) bool { return h[i].wakeAt.Before(h[k].wakeAt) }
func (h wakeHeap) Swap(i, k int) {
	h[i], h[k] = h[k], h[i]
	h[i].index, h[k].index = i, k
}

func (h *wakeHeap) Push(x any) {
	j := x.(*tracked)
	j.index = len(*h)
	*h = append(*h, j)
}

func (h *wakeHeap) Pop() any {
	old := *h
	j := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	j.index = -1
	return j
}

// reschedule puts j where its next appointment belongs.
func (t *tracker) reschedule(j *tracked, now time.Time) {
	if j.dueAt.IsZero() || t.jobs[j.rec.JobID] != j {
		if j.index >= 0 {
			heap.Remove(&t.wakes, j.index)
		}
		return
	}
	// What was due now has been done; should it be due still, the goroutine must not spin on it.
	j.wakeAt = j.dueAt
	if soonest := now.Add(time.Millisecond); j.wakeAt.Before(soonest) {
		j.wakeAt = soonest
	}
	if j.index >= 0 {
		heap.Fix(&t.wakes, j.index)
	} else {
		heap.Push(&t.wakes, j)
	}
}

// nextWake is when something is due; zero: nothing.
func (t *tracker) nextWake() time.Time {
	var next time.Time
	earliest := func(when time.Time) {
		if !when.IsZero() && (next.IsZero() || when.Before(next)) {
			next = when
		}
	}
	if !t.due.looking {
		earliest(t.due.look)
	}
	earliest(t.due.count)
	earliest(t.due.renew)
	earliest(t.due.deaf)
	earliest(t.due.linger)
	if len(t.wakes) > 0 {
		earliest(t.wakes[0].wakeAt)
	}
	return next
}

// wake does what is due.
func (t *tracker) wake(now time.Time) {
	past := func(when time.Time) bool { return !when.IsZero() && !now.Before(when) }
	if past(t.due.deaf) {
		t.deafDue(now)
	}
	if past(t.due.renew) {
		t.renew(now)
	}
	if past(t.due.count) {
		t.countOpen(now)
	}
	if !t.due.looking && past(t.due.look) {
		t.look(now)
	}
	if past(t.due.linger) {
		t.due.linger = time.Time{}
		if t.gauges.owned.Load() == 0 {
			t.stream.setWanted(false)
		}
	}
	for len(t.wakes) > 0 && past(t.wakes[0].wakeAt) {
		t.advance(t.wakes[0], now)
	}
}

// --------------------------------------------------------------- closing

// abandon ends every handle; the jobs go on on the pod.
func (t *tracker) abandon() {
	t.closed = true
	for _, j := range t.jobs {
		j.stopPosting()
		j.unwatch()
		if !j.finished {
			j.handle.finish(nil, j.noEnd(ErrClosed), nil)
		}
	}
}

// lastCalls bounds calls to the store that end something.
func (t *tracker) lastCalls(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), max(t.timing.StoreWait, time.Second))
}

// giveBack releases leases.
func (t *tracker) giveBack(ctx context.Context, jobIDs []string) {
	if len(jobIDs) == 0 {
		return
	}
	if err := t.store.Release(ctx, t.owner, jobIDs); err != nil {
		t.opts.logger.Warn("comfyui: leases were not given back; they run out by themselves", "pod", t.opts.name, "error", err)
	}
}

// leave writes what the store does not have yet, as far as there is time, and gives the leases back in any case, so that others need
// not wait for their ends. It runs when all other goroutines have ended.
func (t *tracker) leave() {
	var held []string
	var must, may []*tracked // what is more than progress goes first
	for id, j := range t.jobs {
		over := j.rec.Progress.Status.Terminal()
		if j.lease != nil && !over {
			held = append(held, id)
		}
		switch {
		case !j.unwritten():
		case over || j.write.urgent || j.write.busy:
			must = append(must, j)
		default:
			may = append(may, j)
		}
	}
	t.writeLast(append(must, may...))
	ctx, cancel := t.lastCalls(context.Background())
	defer cancel()
	t.giveBack(ctx, held)
}

func (t *tracker) writeLast(jobs []*tracked) {
	ctx, cancel := t.lastCalls(context.Background())
	defer cancel()
	for _, j := range jobs {
		j.rec.Rev++
		if _, _, err := t.writeRecord(ctx, &j.rec); err != nil && ctx.Err() != nil {
			return
		}
	}
}
