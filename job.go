package comfyui

import (
	"context"
	"io"
	"iter"
	"maps"
	"slices"
	"sync"
	"time"
)

// JobOption configures one job; see Execute and Submit.
type JobOption func(*jobOptions)

// jobOptions is what the options of one Execute or Submit add up to.
type jobOptions struct {
	id                string
	fresh             bool // the id was made for this call
	labels            map[string]string
	extraData         map[string]any
	limits            Limits
	number            *float64
	front             bool
	inputs            []inputFile
	onEvent           []func(Event)
	allowPartial      bool
	rerunFailed       bool
	atMostOnce        bool
	cancelWithContext bool
}

// inputFile is a file that is uploaded before each attempt.
type inputFile struct {
	node, input, name string
	open              func(context.Context) (io.ReadCloser, error)
}

// WithJobID names the job. The id must be unique among all programs that share the pod; Execute and Submit with an id that is
// known already join that job instead of making another. The default is a new UUID.
func WithJobID(id string) JobOption { return func(o *jobOptions) { o.id = id } }

// WithLabels attaches labels, which come back in the Result and stand in the record. They are not sent to the pod.
func WithLabels(labels map[string]string) JobOption {
	return func(o *jobOptions) {
		if o.labels == nil {
			o.labels = make(map[string]string, len(labels))
		}
		maps.Copy(o.labels, labels)
	}
}

// WithExtraData adds keys to extra_data of POST /prompt, such as extra_pnginfo. The pod shows them in /queue and /history.
// The keys api_key_comfy_org and auth_token_comfy_org are secrets: they are sent and never stored.
func WithExtraData(data map[string]any) JobOption {
	return func(o *jobOptions) {
		if o.extraData == nil {
			o.extraData = make(map[string]any, len(data))
		}
		maps.Copy(o.extraData, data)
	}
}

// WithLimits bounds the job; see Limits.
func WithLimits(l Limits) JobOption { return func(o *jobOptions) { o.limits = l } }

// WithNumber sets the pod's queue number: lower runs first, and the pod's own counter starts at 0. It must be finite. When a
// POST has to be repeated the number is nudged up by the least step, because two equal entries can stop the pod's queue.
func WithNumber(number float64) JobOption { return func(o *jobOptions) { o.number = &number } }

// AtFront asks the pod to run the job before all that waits.
func AtFront() JobOption { return func(o *jobOptions) { o.front = true } }

// WithInput uploads a file before each attempt, to the pod that runs it, and sets the node's input to the name that the pod
// gave. node is an id, else a unique title, else a unique class; name is the file's name on the pod, which may rename it; open
// is called for each upload, again after one that failed, and must give the same content each time. An error of open ends the job
// with CategoryValidation. The content is no part of the workflow: with the same job id and another file the job is joined all the
// same. A job that is recovered before its first upload by a process that does not have the option fails with
// CategoryMissingAsset.
func WithInput(node, input, name string, open func(context.Context) (io.ReadCloser, error)) JobOption {
	return func(o *jobOptions) { o.inputs = append(o.inputs, inputFile{node, input, name, open}) }
}

// OnEvent calls f with each event of the job, one after another, on a goroutine of its own. A slow f gets the newest progress
// and every state; it slows nothing down. After Close, f may still be running its last call.
func OnEvent(f func(Event)) JobOption {
	return func(o *jobOptions) {
		if f != nil {
			o.onEvent = append(o.onEvent, f)
		}
	}
}

// AllowPartial accepts that the pod dropped some outputs of the workflow as invalid and runs the rest: the Result then has a
// warning for each. Without it such a job is cancelled and fails with a *ValidationError.
func AllowPartial() JobOption { return func(o *jobOptions) { o.allowPartial = true } }

// RerunFailed makes a stored failure or cancel start a new attempt; a stored success is returned, and a running job joined.
func RerunFailed() JobOption { return func(o *jobOptions) { o.rerunFailed = true } }

// AtMostOnce forbids a second POST: where another attempt, or the repeat of an unanswered POST, would be made, the job ends
// with ErrOutcomeUnknown instead.
func AtMostOnce() JobOption { return func(o *jobOptions) { o.atMostOnce = true } }

// CancelWithContext cancels the job when the ctx given to Execute or Submit ends. Without it the job goes on.
func CancelWithContext() JobOption { return func(o *jobOptions) { o.cancelWithContext = true } }

// Limits are stored with the job, so that whoever drives it keeps them. Zero means no limit, but for Stall, whose default is
// 10 minutes. A job that reaches one is cancelled on the pod and fails with CategoryTimeout.
type Limits struct {
	Total time.Duration // from Create to the end, all attempts
	Queue time.Duration // accepted to started, one attempt
	Run   time.Duration // started to ended, one attempt
	Stall time.Duration // neither the job nor the pod's queue moved; not counted for a running job while the stream is down; negative: never
}

// defaultStall is the Stall of a job that names none.
const defaultStall = 10 * time.Minute

func (l Limits) stall() time.Duration {
	if l.Stall == 0 {
		return defaultStall
	}
	return l.Stall
}

// Job is a handle to one job. It is safe for concurrent use; any number of handles may stand for one job. A zero Job has no client:
// it is done, and answers with ErrClosed.
type Job struct {
	client *PodClient
	id     string
	labels map[string]string
	done   chan struct{} // closed with the end, or with the client
	taken  chan struct{} // closed when the pod has taken the job, or with done

	mu        sync.Mutex
	promptID  string
	attempt   int
	progress  Progress
	startedAt time.Time
	accepted  bool // the pod has had it
	result    *Result
	err       error
	last      *Event // the end, for those who subscribe after it
	sinks     []eventSink
}

// eventSink takes events without waiting for anybody.
type eventSink interface{ push(evs []Event) }

func newJob(c *PodClient, r *Record) *Job {
	return &Job{
		client: c, id: r.JobID, labels: maps.Clone(r.Labels),
		done: make(chan struct{}), taken: make(chan struct{}),
		promptID: r.PromptID, attempt: r.Attempt, progress: r.Progress, startedAt: r.StartedAt,
	}
}

// ID is the job's id.
func (j *Job) ID() string { return j.id }

// PromptID is the pod's id of the newest attempt; "" before it is known.
func (j *Job) PromptID() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.promptID
}

// Pod is the name of the pod that has the job.
func (j *Job) Pod() string { return j.client.Name() }

// Labels are those given by WithLabels.
func (j *Job) Labels() map[string]string { return maps.Clone(j.labels) }

// Progress is the newest snapshot.
func (j *Job) Progress() Progress {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.progressAt(time.Now())
}

// progressAt lets Elapsed go on between two pieces of news. j.mu is held.
func (j *Job) progressAt(now time.Time) Progress {
	p := j.progress
	if p.Status == StatusRunning && !j.startedAt.IsZero() {
		p.Elapsed = max(p.Elapsed, now.Sub(j.startedAt))
	}
	return p
}

// Events yields what happens to the job: first a snapshot of where it stands, last its end. The sequence ends after that, when
// ctx ends, or when the client is closed. A slow reader gets the newest progress and every state.
func (j *Job) Events(ctx context.Context) iter.Seq[Event] {
	return func(yield func(Event) bool) {
		q := newEventQueue()
		snapshot, last := j.subscribe(q)
		defer j.unsubscribe(q)
		if !yield(snapshot) || (last != nil && !yield(*last)) || last != nil {
			return
		}
		for {
			for _, ev := range q.take() {
				if ctx.Err() != nil || !yield(ev) || ev.Kind.terminal() {
					return
				}
			}
			select {
			case <-q.wake:
			case <-ctx.Done():
				return
			case <-j.Done():
				if q.empty() { // the client is closed, and nothing is left to tell
					return
				}
			}
		}
	}
}

func (k EventKind) terminal() bool {
	return k == EventSucceeded || k == EventFailed || k == EventCancelled
}

// subscribe adds q; last is the end of a job that has ended already.
func (j *Job) subscribe(q *eventQueue) (snapshot Event, last *Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := time.Now()
	snapshot = Event{
		Kind: EventSnapshot, JobID: j.id, PromptID: j.promptID, Attempt: j.attempt, Time: now, Source: SourceLocal, Progress: j.progressAt(now),
	}
	if j.last != nil {
		return snapshot, j.last
	}
	j.sinks = append(j.sinks, q)
	return snapshot, nil
}

// attach adds a callback, which gets what happens from now on, or the end if that has been.
func (j *Job) attach(c *callback) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.last != nil {
		c.push([]Event{*j.last})
		return
	}
	j.sinks = append(j.sinks, c)
}

// wasAccepted tells whether the pod has had the job.
func (j *Job) wasAccepted() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.accepted
}

func (j *Job) unsubscribe(q *eventQueue) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if i := slices.Index(j.sinks, eventSink(q)); i >= 0 {
		j.sinks = slices.Delete(j.sinks, i, i+1)
	}
}

// Wait returns the job's end: its Result, and an error unless it succeeded. The Result is non-nil for every ended job, with
// what there is of outputs. When ctx ends first the error has CategoryContext and the job goes on; after Close it is ErrClosed.
func (j *Job) Wait(ctx context.Context) (*Result, error) {
	select {
	case <-j.Done():
		return j.outcome()
	default:
	}
	select {
	case <-j.Done():
		return j.outcome()
	case <-ctx.Done():
		return nil, j.contextError("wait", ctx)
	}
}

func (j *Job) outcome() (*Result, error) {
	if j.done == nil {
		return nil, j.client.closedError("wait", j.id)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.result.clone(), j.err
}

// contextError tells that the caller's ctx ended, which says nothing of the job but where it was.
func (j *Job) contextError(op string, ctx context.Context) *Error {
	return j.placed(&Error{Op: op, Category: CategoryContext, Err: endOf(ctx)})
}

// placed says in e, which nobody else has yet, what is known of the job.
func (j *Job) placed(e *Error) *Error {
	j.mu.Lock()
	defer j.mu.Unlock()
	e.Pod, e.JobID, e.PromptID, e.Attempt, e.Status = j.client.Name(), j.id, j.promptID, j.attempt, j.progress.Status
	return e
}

// Done is closed when Wait would return at once: the job has ended, or the client is closed.
func (j *Job) Done() <-chan struct{} {
	if j.done == nil {
		return noJob
	}
	return j.done
}

// noJob is the Done of a zero Job.
var noJob = func() chan struct{} {
	closed := make(chan struct{})
	close(closed)
	return closed
}()

// publish shows observers where the job stands and what happened. It is called by the tracker alone.
func (j *Job) publish(r *Record, evs []Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.promptID, j.attempt, j.progress, j.startedAt = r.PromptID, r.Attempt, r.Progress, r.StartedAt
	j.push(evs)
}

// tell shows observers what happened, and nothing new of where the job stands. It is called by the tracker alone.
func (j *Job) tell(evs []Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.push(evs)
}

// push gives events to the observers. j.mu is held.
func (j *Job) push(evs []Event) {
	if len(evs) == 0 {
		return
	}
	for _, s := range j.sinks {
		s.push(evs)
	}
}

// shown is where observers have seen the job to stand.
func (j *Job) shown() Progress {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.progress
}

// accept notes that the pod has the job. It is called by the tracker alone.
func (j *Job) accept() {
	j.mu.Lock()
	j.accepted = true
	j.mu.Unlock()
	j.letGo()
}

func (j *Job) letGo() {
	select {
	case <-j.taken:
	default:
		close(j.taken)
	}
}

// finish sets the outcome and lets every waiter go. The last event, if any, is the job's end. It is called once.
func (j *Job) finish(r *Result, err error, last *Event) {
	j.mu.Lock()
	j.result, j.err, j.last = r, err, last
	sinks := j.sinks
	j.sinks = nil
	j.mu.Unlock()
	if last != nil {
		for _, s := range sinks {
			s.push([]Event{*last})
		}
	}
	close(j.done)
	j.letGo() // Submit looks then whether the job has ended
}

// Result is how a job ended, the same for all who ask. For a job that failed or was cancelled it holds what there is. Times are in UTC.
type Result struct {
	JobID       string            `json:"job_id"`
	PromptID    string            `json:"prompt_id"`
	Pod         string            `json:"pod"`
	Attempt     int               `json:"attempt"`
	Status      Status            `json:"status"`
	Labels      map[string]string `json:"labels,omitempty"`
	Outputs     []Output          `json:"outputs"`
	Warnings    []*Error          `json:"warnings,omitempty"`
	CachedNodes []string          `json:"cached_nodes,omitempty"`
	CreatedAt   time.Time         `json:"created_at"`
	StartedAt   time.Time         `json:"started_at,omitzero"`
	FinishedAt  time.Time         `json:"finished_at"`
}

func resultOf(r *Record, c *PodClient) *Result {
	return &Result{
		JobID: r.JobID, PromptID: r.PromptID, Pod: r.Pod, Attempt: r.Attempt, Status: r.Progress.Status,
		Labels: maps.Clone(r.Labels), Outputs: c.outputsFrom(r.Pod, r.Outputs), Warnings: slices.Clone(r.Warnings), CachedNodes: slices.Clone(r.CachedNodes),
		CreatedAt: calendar(r.CreatedAt), StartedAt: calendar(r.StartedAt), FinishedAt: calendar(r.FinishedAt),
	}
}

// calendar is t as every process reads it from the store: in UTC, without the clock of the process that took it.
func calendar(t time.Time) time.Time { return t.Round(0).UTC() }

func (r *Result) clone() *Result {
	if r == nil {
		return nil
	}
	c := *r
	c.Labels, c.Outputs, c.Warnings, c.CachedNodes = maps.Clone(r.Labels), slices.Clone(r.Outputs), slices.Clone(r.Warnings), slices.Clone(r.CachedNodes)
	return &c
}

const (
	// maxQueuedEvents bounds what a slow reader leaves lying; states do not count.
	maxQueuedEvents = 256
	// maxHeldEvents bounds what is kept for a reader that hangs, states too: those of one job are few, those of all jobs never end.
	maxHeldEvents = 1 << 15
)

// eventQueue is what one reader has not yet taken. Of a job's progress, previews and stream states the newest is kept; of all that
// is no state, the newest maxQueuedEvents; of all together, the newest maxHeldEvents.
type eventQueue struct {
	wake chan struct{}

	mu     sync.Mutex
	events []Event
	loose  int // of events: those that are no state
	lead   int // of events: the first so many are states
	lost   int // states that were dropped since the reader took what there was
}

func newEventQueue() *eventQueue { return &eventQueue{wake: make(chan struct{}, 1)} }

func (q *eventQueue) push(evs []Event) { q.hold(evs) }

// hold is push. lost: how many were dropped of what was to be told in any case, if they are the first that the reader misses.
func (q *eventQueue) hold(evs []Event) (lost int) {
	q.mu.Lock()
	missed := q.lost > 0
	for i := range evs {
		q.add(evs[i])
	}
	if !missed {
		lost = q.lost
	}
	q.mu.Unlock()
	signal(q.wake)
	return lost
}

func (q *eventQueue) add(ev Event) {
	switch {
	case ev.Kind.state():
	case ev.Kind.newestOnly():
		// Only what lies behind the last state may be replaced: an event never overtakes a state.
		for i := len(q.events) - 1; i >= 0 && !q.events[i].Kind.state(); i-- {
			if q.events[i].Kind == ev.Kind && q.events[i].JobID == ev.JobID {
				q.events = slices.Delete(q.events, i, i+1)
				q.loose--
				break
			}
		}
		fallthrough
	default:
		if q.loose >= maxQueuedEvents {
			for q.events[q.lead].Kind.state() {
				q.lead++
			}
			q.events = slices.Delete(q.events, q.lead, q.lead+1)
			q.loose--
		}
		q.loose++
	}
	if len(q.events) >= maxHeldEvents {
		q.dropOldest()
	}
	q.events = append(q.events, ev)
}

func (q *eventQueue) dropOldest() {
	if q.events[0].Kind.state() {
		q.lost++
	} else {
		q.loose--
	}
	q.events[0] = Event{}
	q.events = q.events[1:]
	q.lead = max(0, q.lead-1)
}

// newestOnly tells whether an event makes an unread one of its kind worthless.
func (k EventKind) newestOnly() bool {
	return k == EventProgress || k == EventPreview || k == EventStream
}

func (q *eventQueue) take() []Event {
	evs, _ := q.takeAll()
	return evs
}

// takeAll is take. lost: how many states the reader has missed.
func (q *eventQueue) takeAll() (evs []Event, lost int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	evs, lost = q.events, q.lost
	q.events, q.loose, q.lead, q.lost = nil, 0, 0, 0
	return evs, lost
}

func (q *eventQueue) empty() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.events) == 0
}

// callback calls a function of the caller's with events, one after another. It has a goroutine only while there is something
// to tell, so that any number of callbacks costs nothing at rest; nobody waits for it, since the function may hang.
type callback struct {
	f      func(Event)
	q      *eventQueue
	missed func(states int, over bool) // told when the function begins to miss some, and when it takes events again; nil: nobody

	mu   sync.Mutex
	busy bool
}

func newCallback(f func(Event)) *callback { return &callback{f: f, q: newEventQueue()} }

func (c *callback) push(evs []Event) {
	if len(evs) == 0 {
		return
	}
	if lost := c.q.hold(evs); lost > 0 && c.missed != nil {
		c.missed(lost, false)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.busy {
		c.busy = true
		go c.run()
	}
}

func (c *callback) run() {
	for {
		evs, lost := c.q.takeAll()
		if lost > 0 && c.missed != nil {
			c.missed(lost, true)
		}
		if len(evs) == 0 {
			c.mu.Lock()
			if c.q.empty() {
				c.busy = false
				c.mu.Unlock()
				return
			}
			c.mu.Unlock()
			continue
		}
		for i := range evs {
			c.f(evs[i])
		}
	}
}

// herald calls a hook with values, one after another, on a goroutine that lives only while there is something to tell. A hook
// that does not keep up misses the oldest.
type herald[T any] struct {
	f func(T)

	mu    sync.Mutex
	queue []T
	busy  bool
}

func (t *herald[T]) tell(v T) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) == maxQueuedEvents {
		t.queue = slices.Delete(t.queue, 0, 1)
	}
	t.queue = append(t.queue, v)
	if !t.busy {
		t.busy = true
		go t.run()
	}
}

func (t *herald[T]) run() {
	for {
		t.mu.Lock()
		if len(t.queue) == 0 {
			t.busy = false
			t.mu.Unlock()
			return
		}
		v := t.queue[0]
		t.queue = t.queue[1:]
		t.mu.Unlock()
		t.f(v)
	}
}
