package comfyui

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
)

// PodClient drives one ComfyUI process. It is safe for concurrent use. A zero PodClient answers every call with ErrClosed.
type PodClient struct {
	opts     *options
	endpoint *endpoint
	retrier  *retrier
	counters *counters
	// retryHook is Hooks.Retry; nil: none.
	retryHook *herald[RetryInfo]

	mu      sync.Mutex
	tracker *tracker // nil until the first job
	closed  bool
	ended   sync.WaitGroup // Close calls under way
}

// NewPodClient returns a client for the pod at baseURL. It does no I/O and starts no goroutine.
//
// "host:8188", a path prefix and a query (kept on every request, as token proxies want) all work; ws and wss stand for http and
// https. Userinfo becomes basic auth. Userinfo and query are never printed or stored. The URL must reach one ComfyUI process: a
// load balancer over several makes every answer of the pod a lie.
//
// The error says which option is wrong.
func NewPodClient(baseURL string, opts ...Option) (*PodClient, error) {
	o, err := newOptions(baseURL, opts)
	if err != nil {
		return nil, &Error{Op: "new pod client", Category: CategoryValidation, Err: err}
	}
	c := &PodClient{opts: o, counters: &counters{}}
	c.endpoint = newEndpoint(o, c.counters)
	c.retrier = c.endpoint.retries
	c.retrier.notify = c.notifyRetry
	if f := o.hooks.Retry; f != nil {
		c.retryHook = &herald[RetryInfo]{f: f}
	}
	return c, nil
}

// Option configures a PodClient; see NewPodClient.
type Option func(*options)

// options is what NewPodClient was given. It does not change afterwards.
type options struct {
	name        string
	base        *url.URL // without userinfo and query: may be printed
	query       url.Values
	userinfo    *url.Userinfo
	httpClient  *http.Client
	dialer      *websocket.Dialer
	header      http.Header
	headerFuncs []func(context.Context) (http.Header, error)
	apiKey      string // extra_data.api_key_comfy_org of every POST
	clientID    string
	store       Store
	retry       map[Category]RetryPolicy
	timing      Timing
	jobDefaults []JobOption
	maxInFlight int
	previews    bool
	logger      *slog.Logger
	hooks       Hooks
}

func newOptions(baseURL string, opts []Option) (*options, error) {
	o := &options{
		header:   http.Header{},
		clientID: uuid.NewString(),
		retry:    map[Category]RetryPolicy{},
		logger:   slog.New(slog.DiscardHandler),
	}
	if err := o.parseBase(baseURL); err != nil {
		return nil, err
	}
	for _, opt := range opts {
		if opt != nil {
			opt(o)
		}
	}
	o.timing = o.timing.withDefaults()
	if o.store == nil {
		o.store = NewMemoryStore()
	}
	return o, o.validate()
}

// validate says what is wrong with the options.
func (o *options) validate() error {
	faults := []error{validateRetries(o.retry)}
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if o.name == "" {
		fault("WithPodName: the name is empty")
	}
	for option, text := range map[string]string{"WithPodName": o.name, "WithClientID": o.clientID} {
		if !utf8.ValidString(text) { // the record would hold another one
			fault("%s: %q is not UTF-8", option, text)
		}
	}
	if o.clientID == "" {
		fault("WithClientID: the id is empty")
	}
	if isNil(o.store) {
		fault("WithStore: the %T is nil", o.store)
	}
	if err := checkHeader(o.header); err != nil {
		fault("WithHeader: %w", err)
	}
	if o.maxInFlight < 0 {
		fault("WithMaxInFlight: %d is negative; 0 means no bound", o.maxInFlight)
	}
	t := o.timing
	for name, d := range map[string]time.Duration{
		"Connect": t.Connect, "Request": t.Request, "ReconnectMin": t.ReconnectMin, "ReconnectMax": t.ReconnectMax, "Poll": t.Poll,
		"Cancel": t.Cancel, "Lease": t.Lease, "Retention": t.Retention,
	} {
		if d < 0 {
			fault("WithTiming: %s cannot be switched off: give it a positive duration, or 0 for its default", name)
		}
	}
	if t.ReconnectMax < t.ReconnectMin {
		fault("WithTiming: ReconnectMax %s is below ReconnectMin %s", t.ReconnectMax, t.ReconnectMin)
	}
	return errors.Join(faults...)
}

// parseBase takes "host:8188" as well as a URL with a path prefix, userinfo and a query.
func (o *options) parseBase(baseURL string) error {
	raw := strings.TrimSpace(baseURL)
	if raw == "" {
		return errors.New("the pod's base URL is empty; give one such as http://127.0.0.1:8188")
	}
	if scheme, _, ok := strings.Cut(raw, "://"); !ok || strings.ContainsAny(scheme, "/?#@") { // a query can hold a URL
		raw = "http://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil {
		// url.Error repeats the URL, which can hold a password.
		return errors.New("the pod's base URL cannot be parsed; give one such as http://127.0.0.1:8188")
	}
	switch u.Scheme {
	case "http", "https":
	case "ws":
		u.Scheme = "http"
	case "wss":
		u.Scheme = "https"
	default:
		return fmt.Errorf("the pod's base URL has the scheme %q; use http or https", u.Scheme)
	}
	if u.Host == "" {
		return errors.New("the pod's base URL names no host; give one such as http://127.0.0.1:8188")
	}
	if port := u.Port(); port != "" {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return fmt.Errorf("the pod's base URL has the port %s; ports end at 65535", port)
		}
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return errors.New("the query of the pod's base URL cannot be parsed")
	}
	o.query, o.userinfo = query, u.User
	u.User, u.RawQuery, u.Fragment, u.RawFragment = nil, "", "", ""
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), strings.TrimRight(u.RawPath, "/")
	o.base = u
	o.name = u.String()
	return nil
}

// WithPodName sets the pod's name in records, errors and hooks. The default is the base URL without userinfo and query. Recover
// finds a job by it: it must differ from pod to pod, and stay the same when the URL changes.
func WithPodName(name string) Option { return func(o *options) { o.name = name } }

// WithHTTPClient sets the HTTP client. It is copied: redirects are the library's own business, and its Timeout is not applied
// to bodies (Timing.Request and Timing.BodyIdle are).
func WithHTTPClient(c *http.Client) Option { return func(o *options) { o.httpClient = c } }

// WithDialer sets the WebSocket dialer. The default is made from the HTTP client's *http.Transport (TLS, proxy, dial) and Jar.
func WithDialer(d *websocket.Dialer) Option { return func(o *options) { o.dialer = d } }

// WithHeader sets a header of every HTTP request and WebSocket handshake. Content-Type and Accept-Encoding stay the library's business.
func WithHeader(name, value string) Option { return func(o *options) { o.header.Set(name, value) } }

// WithHeaderFunc adds headers that are asked for at each request and dial, such as short-lived tokens. An error of f fails
// that request with CategoryAuth.
func WithHeaderFunc(f func(context.Context) (http.Header, error)) Option {
	return func(o *options) {
		if f != nil {
			o.headerFuncs = append(o.headerFuncs, f)
		}
	}
}

// WithBearerToken is WithHeader("Authorization", "Bearer "+token).
func WithBearerToken(token string) Option { return WithHeader("Authorization", "Bearer "+token) }

// WithComfyAPIKey sends key as extra_data.api_key_comfy_org of every POST /prompt, for nodes that call paid services. It is
// never stored: whoever recovers the job needs the option too.
func WithComfyAPIKey(key string) Option { return func(o *options) { o.apiKey = key } }

// WithClientID sets the id under which the pod knows this client's WebSocket; the default is a new UUID. A stable id per
// worker slot lets events survive a restart of the worker. Two live processes must never share one: the pod sends the
// events to one of them.
func WithClientID(id string) Option { return func(o *options) { o.clientID = id } }

// WithStore sets where job records are kept; the default is NewMemoryStore(), which forgets them with the process.
func WithStore(s Store) Option { return func(o *options) { o.store = s } }

// WithRetry replaces the policy of a category; see RetryPolicy.
func WithRetry(c Category, p RetryPolicy) Option { return func(o *options) { o.retry[c] = p } }

// WithTiming replaces timings; zero fields keep their defaults.
func WithTiming(t Timing) Option { return func(o *options) { o.timing = t } }

// WithJobDefaults adds options that are applied before those of each Execute and Submit, and to recovered jobs.
func WithJobDefaults(opts ...JobOption) Option {
	return func(o *options) { o.jobDefaults = append(o.jobDefaults, opts...) }
}

// WithMaxInFlight makes Submit wait while n of this client's jobs are on the pod; 0 means no bound.
func WithMaxInFlight(n int) Option { return func(o *options) { o.maxInFlight = n } }

// WithPreviews asks for preview images: events of kind preview. Without it their bytes are not even copied off the socket.
func WithPreviews() Option { return func(o *options) { o.previews = true } }

// WithLogger sets the logger; the default is silence. No credential is ever logged.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) {
		if l != nil {
			o.logger = l
		}
	}
}

// WithHooks sets the hooks; see Hooks.
func WithHooks(h Hooks) Option { return func(o *options) { o.hooks = h } }

// Timing bounds every wait of a PodClient. A zero field keeps its default. A negative one switches BodyIdle, Ping,
// PollStreaming or Gone off, and makes of StreamWait, Grace, Settle, StoreWait or ProgressWrite no wait at all; the others must
// not be negative.
type Timing struct {
	Connect       time.Duration // 10s   TCP + TLS + WebSocket handshake
	Request       time.Duration // 60s   one call, to the end of a small body; a download, to its headers
	BodyIdle      time.Duration // 30s   silence inside a download before it is resumed
	StreamWait    time.Duration // 3s    POST waits so long for a stream that is being dialled; not at all for one known to be down
	Ping          time.Duration // 20s   WebSocket ping period; dead after two without any frame
	ReconnectMin  time.Duration // 500ms
	ReconnectMax  time.Duration // 30s
	Poll          time.Duration // 1s    reconcile period while the stream is down
	PollStreaming time.Duration // 15s   reconcile period while it is up
	Grace         time.Duration // 10s   an unanswered POST is looked for so long; also between the two looks that make a job lost
	Settle        time.Duration // 10s   ended by the stream, /history still {}: waited so long, then the stream's outputs stand
	Gone          time.Duration // 10m   pod unreachable so long: its jobs end with ErrPodGone
	Cancel        time.Duration // 30s   a cancel that has no ctx of its own (CancelWithContext, Limits) is tried so long
	Lease         time.Duration // 30s   renewed at a third
	StoreWait     time.Duration // 1s    Wait holds a known end back at most so long for its record to land
	ProgressWrite time.Duration // 500ms progress to the store, newest per job
	Retention     time.Duration // 24h   an ended record is kept so long
}

func (t Timing) withDefaults() Timing {
	or := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	or(&t.Connect, 10*time.Second)
	or(&t.Request, 60*time.Second)
	or(&t.BodyIdle, 30*time.Second)
	or(&t.StreamWait, 3*time.Second)
	or(&t.Ping, 20*time.Second)
	or(&t.ReconnectMin, 500*time.Millisecond)
	or(&t.ReconnectMax, 30*time.Second)
	or(&t.Poll, time.Second)
	or(&t.PollStreaming, 15*time.Second)
	or(&t.Grace, 10*time.Second)
	or(&t.Settle, 10*time.Second)
	or(&t.Gone, 10*time.Minute)
	or(&t.Cancel, 30*time.Second)
	or(&t.Lease, 30*time.Second)
	or(&t.StoreWait, time.Second)
	or(&t.ProgressWrite, 500*time.Millisecond)
	or(&t.Retention, 24*time.Hour)
	return t
}

// Hooks are told what happens. They are called on goroutines that block nothing else, one call after another; nil ones are skipped.
//
// What a hook has not taken yet is kept for it, in bounded memory. Event gets every state change of every job and the newest of what
// comes between them; but when 32,768 events wait for it, because it hangs or is slower than the jobs for long, the oldest are dropped.
// The logger (WithLogger) is told when that begins and, with how many were dropped, when Event takes events again: whoever needs
// every end for sure reads it from [Job.Wait] or the Store. Retry and Health miss the oldest of more than 256.
type Hooks struct {
	Event  func(Event)          // every event of every job of the client
	Retry  func(RetryInfo)      // before every wait
	Health func(was, is Health) // when State changes
}

// RetryInfo tells Hooks.Retry what failed and how long the wait will be.
type RetryInfo struct {
	Pod, Op, JobID string
	Try            int // the one that failed, from 1
	Wait           time.Duration
	NewAttempt     bool // a new attempt of the job, not a repeated call
	Err            error
}

// Stats is a snapshot; counters are since NewPodClient.
type Stats struct {
	Following int // jobs followed now
	Owned     int // of these, driven by this client
	Stream    StreamState

	Submitted, Joined, Recovered           int64 // jobs made; known ids that were asked for again; jobs taken over
	Succeeded, Failed, Cancelled           int64 // ends of jobs that this client drove
	Attempts                               int64 // POSTs that opened a new attempt
	AmbiguousPosts, DuplicatesRemoved      int64 // POSTs whose answer proved nothing; second copies taken off the pod
	Calls, CallErrors, Retries             int64 // HTTP requests; those that failed; waits before another try or attempt
	Dials, DialErrors, Deaf                int64 // of the WebSocket; connections that were replaced because they were deaf
	Frames, FrameBytes, FramesSkipped      int64 // received; in bytes; other clients' and unreadable ones
	StoreWrites, StoreErrors, StorePending int64 // records written; failed calls; records that wait for the store now
}

// counters are the running totals behind Stats.
type counters struct {
	submitted, joined, recovered      atomic.Int64
	succeeded, failed, cancelled      atomic.Int64
	attempts                          atomic.Int64
	ambiguousPosts, duplicatesRemoved atomic.Int64
	calls, callErrors, retries        atomic.Int64
	dials, dialErrors, deaf           atomic.Int64
	frames, frameBytes, framesSkipped atomic.Int64
	storeWrites, storeErrors          atomic.Int64
}

// Name is the pod's name: WithPodName, else the base URL without userinfo and query.
func (c *PodClient) Name() string {
	if c == nil || c.opts == nil {
		return ""
	}
	return c.opts.name
}

// notifyRetry tells Hooks.Retry, on a goroutine that blocks nothing.
func (c *PodClient) notifyRetry(info RetryInfo) {
	c.opts.logger.Debug("comfyui: retrying", "pod", info.Pod, "op", info.Op, "job", info.JobID, "try", info.Try, "wait", info.Wait, "error", info.Err)
	if c.retryHook != nil {
		c.retryHook.tell(info)
	}
}

// running returns the tracker, and starts it for the first job.
func (c *PodClient) running(op, jobID string) (*tracker, error) {
	if c == nil || c.opts == nil {
		return nil, &Error{Op: op, JobID: jobID, Category: CategoryClosed, Err: ErrClosed}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, c.closedError(op, jobID)
	}
	if c.tracker == nil {
		c.tracker = newTracker(c)
		c.tracker.start()
	}
	return c.tracker, nil
}

func (c *PodClient) closedError(op, jobID string) error {
	return &Error{Op: op, Pod: c.Name(), JobID: jobID, Category: CategoryClosed, Err: ErrClosed}
}

// storeCall makes a call to the store for a caller, and repeats it as the policies say: each may be repeated with no other effect.
func (c *PodClient) storeCall(ctx context.Context, op, jobID string, call func(context.Context) error) error {
	ctx, done := c.endpoint.bind(ctx)
	defer done()
	err := c.retrier.do(ctx, retryOp{op: op, jobID: jobID}, func(ctx context.Context, _ int) error {
		err := call(ctx)
		if err == nil {
			return nil
		}
		failed := c.storeError(ctx, op, jobID, err)
		if failed.Category == CategoryStorage {
			c.counters.storeErrors.Add(1)
		}
		return failed
	})
	if err == nil {
		return nil
	}
	e := *asError(err)
	e.Op, e.Pod, e.JobID = op, c.Name(), jobID
	return &e
}

// storeError is an error of the store in a call of the caller's: that ctx has ended, if it has. What the store names itself keeps
// its category.
func (c *PodClient) storeError(ctx context.Context, op, jobID string, err error) *Error {
	if ctx.Err() != nil {
		return c.retrier.ended(ctx, retryOp{op: op, jobID: jobID}, err)
	}
	e := &Error{Op: op, Pod: c.Name(), JobID: jobID, Category: CategoryStorage, Err: err}
	for _, named := range []error{ErrJobNotFound, ErrJobConflict, ErrOtherPod, ErrJobHeld, ErrFenced, ErrSchema} {
		if errors.Is(err, named) {
			e.Category = CategoryOf(named)
		}
	}
	return e
}

// Execute runs the workflow and returns how it ended. It is Submit and Job.Wait in one: idempotent by job id (WithJobID), so
// that a caller that was killed, or whose ctx ended, calls it again and gets the one run's result. The Result is non-nil for
// every job that has ended, also beside an error; see Job.Wait.
func (c *PodClient) Execute(ctx context.Context, w *Workflow, opts ...JobOption) (*Result, error) {
	j, err := c.begin(ctx, "execute", w, opts)
	if err != nil {
		return nil, err
	}
	r, err := j.Wait(ctx)
	if err != nil && r == nil {
		return nil, reword(err, "execute")
	}
	return r, err
}

// reword names the call that the caller made.
func reword(err error, op string) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	copied := *e
	copied.Op = op
	return &copied
}

// Submit records the job, has the pod take it and returns once the pod has. A job id that is known already is joined: the Job
// is then the running or ended one. When ctx ends first the job goes on, and Error.JobID names it. A job that the pod refuses
// is recorded as failed; the error is the same that Wait returns.
func (c *PodClient) Submit(ctx context.Context, w *Workflow, opts ...JobOption) (*Job, error) {
	j, err := c.begin(ctx, "submit", w, opts)
	if err != nil {
		return nil, err
	}
	select {
	case <-j.taken:
	case <-ctx.Done():
		return nil, j.contextError("submit", ctx)
	}
	select {
	case <-j.done:
		if r, err := j.outcome(); err != nil && !j.wasAccepted() {
			if r == nil { // not the job's end
				err = reword(err, "submit")
			}
			return nil, err
		}
	default:
	}
	return j, nil
}

// begin records the job, or finds the one that its id names, and has the tracker follow it.
func (c *PodClient) begin(ctx context.Context, op string, w *Workflow, opts []JobOption) (*Job, error) {
	t, err := c.running(op, "")
	if err != nil {
		return nil, err
	}
	o, err := c.jobOptions(w, opts)
	if err != nil {
		return nil, &Error{Op: op, Pod: c.Name(), JobID: o.id, Category: CategoryValidation, Err: err}
	}
	rec, err := c.newRecord(w, o, t)
	if err != nil {
		return nil, &Error{Op: op, Pod: c.Name(), JobID: o.id, Category: CategoryValidation, Err: err}
	}
	a := admission{graph: planOf(w), opts: o, ctx: ctx}
	asked := time.Now()
	stored, err := c.create(ctx, op, t, rec)
	if err != nil {
		return nil, err
	}
	a.rec, a.confirmed = stored, asked
	a.fresh = o.fresh && stored.Epoch == 1
	created := stored.Owner == t.owner && stored.Rev == 0 && stored.CreatedAt.Equal(rec.CreatedAt)
	if created {
		c.counters.submitted.Add(1)
	} else {
		c.counters.joined.Add(1)
	}
	switch {
	case stored.WorkflowHash != rec.WorkflowHash:
		return nil, &Error{Op: op, Pod: c.Name(), JobID: o.id, Status: stored.Progress.Status, Category: CategoryConflict, Err: ErrJobConflict}
	case stored.Progress.Status.Terminal():
		if o.rerunFailed && stored.Progress.Status != StatusSucceeded {
			return c.rerun(ctx, op, t, a, rec)
		}
		return c.endedJob(stored, o.onEvent), nil
	case stored.Pod != c.opts.name:
		return nil, &Error{Op: op, Pod: c.Name(), JobID: o.id, Status: stored.Progress.Status, Category: CategoryConflict, Err: fmt.Errorf("%w: it is on %q", ErrOtherPod, stored.Pod)}
	case created:
		a.drive = true
		return c.admit(op, t, a)
	}
	return c.claim(ctx, op, t, a)
}

// create makes the record, or returns the one that is there.
func (c *PodClient) create(ctx context.Context, op string, t *tracker, rec *Record) (stored *Record, err error) {
	err = c.storeCall(ctx, op, rec.JobID, func(ctx context.Context) (err error) {
		c.counters.storeWrites.Add(1)
		stored, err = t.store.Create(ctx, rec, c.opts.timing.Lease)
		return err
	})
	return stored, err
}

// claim drives a job whose lease is free, and follows one that another owner drives.
func (c *PodClient) claim(ctx context.Context, op string, t *tracker, a admission) (*Job, error) {
	// A lease of one's own that lapsed while the store was away must not be claimed anew: that would fence the job's driver.
	var driven *Job
	if !t.tell(func() { driven = t.join(a) }) {
		return nil, c.closedError(op, a.rec.JobID)
	}
	if driven != nil {
		return driven, nil
	}
	rec, err := c.claimLease(ctx, op, t, &a)
	switch {
	case err == nil && rec.Progress.Status.Terminal():
		return c.endedJob(rec, a.opts.onEvent), nil
	case err == nil:
		if rec.Epoch > a.rec.Epoch {
			c.counters.recovered.Add(1)
		}
		a.rec, a.drive = rec, true
	case errors.Is(err, ErrJobHeld) && rec != nil:
		a.rec = rec
	case errors.Is(err, ErrJobHeld):
	default:
		return nil, err
	}
	return c.admit(op, t, a)
}

// claimLease claims the lease of the admission's job and notes when. With ErrJobHeld it returns the record too, if the store does.
func (c *PodClient) claimLease(ctx context.Context, op string, t *tracker, a *admission) (rec *Record, err error) {
	id := a.rec.JobID
	err = c.storeCall(ctx, op, id, func(ctx context.Context) (err error) {
		a.confirmed = time.Now()
		rec, err = t.store.Claim(ctx, id, t.owner, c.opts.timing.Lease)
		return err
	})
	return rec, err
}

func (c *PodClient) admit(op string, t *tracker, a admission) (j *Job, err error) {
	if !t.tell(func() { j = t.admit(a) }) {
		return nil, c.closedError(op, a.rec.JobID)
	}
	return j, nil
}

// rerun reopens a job that failed or was cancelled.
func (c *PodClient) rerun(ctx context.Context, op string, t *tracker, a admission, wanted *Record) (*Job, error) {
	rec, err := c.claimEnded(ctx, op, t, &a)
	if err != nil {
		return nil, err
	}
	if rec == nil {
		return c.admit(op, t, a)
	}
	if !rec.Progress.Status.Terminal() || rec.Progress.Status == StatusSucceeded {
		a.rec, a.drive = rec, !rec.Progress.Status.Terminal()
		if !a.drive {
			return c.endedJob(rec, a.opts.onEvent), nil
		}
		return c.admit(op, t, a)
	}
	next := wanted.Clone()
	next.Attempt = rec.Attempt + 1
	next.PromptID = promptID(next.JobID, next.WorkflowHash, next.Attempt)
	next.Owner, next.Epoch, next.Rev, next.LeaseUntil = rec.Owner, rec.Epoch, rec.Rev, rec.LeaseUntil
	a.rec, a.drive, a.reopened = next, true, true
	return c.admit(op, t, a)
}

// claimEnded claims an ended job. While another process holds it, that one is about to reopen it: it is waited for, until the
// job is open (then the record is nil, and a has it) or that lease has run out.
func (c *PodClient) claimEnded(ctx context.Context, op string, t *tracker, a *admission) (*Record, error) {
	for {
		rec, err := c.claimLease(ctx, op, t, a)
		switch {
		case err == nil:
			return rec, nil
		case !errors.Is(err, ErrJobHeld) || rec == nil:
			return nil, err
		case !rec.Progress.Status.Terminal():
			a.rec = rec
			return nil, nil
		}
		timer := time.NewTimer(max(c.opts.timing.Lease/60, 10*time.Millisecond))
		select {
		case <-timer.C:
		case <-ctx.Done():
		case <-t.ctx.Done():
		}
		timer.Stop()
	}
}

// endedJob is the handle of a job that has ended before.
func (c *PodClient) endedJob(rec *Record, onEvent []func(Event)) *Job {
	j := newJob(c, rec)
	j.accepted = true
	last := terminalEvent(rec)
	last.Outputs = c.outputsFrom(rec.Pod, last.Outputs)
	var err error
	if rec.Failure != nil {
		err = rec.Failure
	}
	j.finish(resultOf(rec, c), err, &last)
	for _, f := range onEvent {
		j.attach(newCallback(f))
	}
	return j
}

// addUp applies options in their order.
func addUp(all ...[]JobOption) *jobOptions {
	o := &jobOptions{}
	for _, opt := range slices.Concat(all...) {
		if opt != nil {
			opt(o)
		}
	}
	return o
}

// maxJobID bounds a caller's job id: it becomes part of keys.
const maxJobID = 512

// jobOptions adds the options up and checks them, and the workflow, before anything is stored or sent.
func (c *PodClient) jobOptions(w *Workflow, opts []JobOption) (*jobOptions, error) {
	o := addUp(c.opts.jobDefaults, opts)
	if o.id == "" {
		o.id, o.fresh = uuid.NewString(), true
	}
	if len(o.id) > maxJobID || strings.ContainsRune(o.id, 0) || !utf8.ValidString(o.id) { // JSON has no place for other bytes
		return o, fmt.Errorf("the job id must be at most %d bytes of UTF-8 without NUL", maxJobID)
	}
	if err := w.check(); err != nil {
		return o, err
	}
	if o.number != nil && (math.IsNaN(*o.number) || math.IsInf(*o.number, 0)) {
		return o, errors.New("WithNumber: the queue number must be finite")
	}
	l := o.limits
	if l.Total < 0 || l.Queue < 0 || l.Run < 0 {
		return o, errors.New("WithLimits: Total, Queue and Run cannot be negative; 0 means no limit")
	}
	for _, in := range o.inputs {
		if in.open == nil {
			return o, fmt.Errorf("WithInput: node %q, input %q: open is nil", in.node, in.input)
		}
		if err := w.hasInput(in.node, in.input); err != nil {
			return o, fmt.Errorf("WithInput: %w", err)
		}
	}
	return o, nil
}

// newRecord is the record of a new job.
func (c *PodClient) newRecord(w *Workflow, o *jobOptions, t *tracker) (*Record, error) {
	graph, err := w.MarshalJSON()
	if err != nil {
		return nil, err
	}
	extra, err := storedExtra(o.extraData)
	if err != nil {
		return nil, err
	}
	hash := w.hash()
	now := time.Now()
	rec := &Record{
		Schema: recordSchema, JobID: o.id, Pod: c.opts.name, ClientID: c.opts.clientID, PromptID: promptID(o.id, hash, 1), Attempt: 1,
		WorkflowHash: hash, Workflow: graph, ExtraData: extra,
		Options: RecordOptions{Limits: o.limits, AllowPartial: o.allowPartial, AtMostOnce: o.atMostOnce, Front: o.front},
		Labels:  maps.Clone(o.labels), Progress: Progress{Status: StatusPending, QueueAhead: -1, NodesTotal: len(w.nodes)},
		CreatedAt: now, AttemptAt: now, Retention: c.opts.timing.Retention, Owner: t.owner,
	}
	if o.number != nil {
		rec.Number = *o.number
	}
	return rec, nil
}

// storedExtra is the caller's extra data without its secrets.
func storedExtra(extra map[string]any) (json.RawMessage, error) {
	open := maps.Clone(extra)
	for _, key := range secretKeys {
		delete(open, key)
	}
	if _, taken := open[markerKey]; taken {
		return nil, fmt.Errorf("WithExtraData: the key %q is the library's own", markerKey)
	}
	if len(open) == 0 {
		return nil, nil
	}
	raw, err := json.Marshal(open)
	if err != nil {
		return nil, fmt.Errorf("WithExtraData: %w", err)
	}
	return raw, nil
}

// Attach drives a stored job if its lease is free, and follows it if another owner has it. It returns ErrJobNotFound for an
// unknown id, and ErrOtherPod for a job that is on another pod and has not ended.
func (c *PodClient) Attach(ctx context.Context, jobID string) (*Job, error) {
	const op = "attach"
	t, err := c.running(op, jobID)
	if err != nil {
		return nil, err
	}
	rec, err := c.stored(ctx, op, t, jobID)
	switch {
	case err != nil:
		return nil, err
	case rec.Progress.Status.Terminal():
		return c.endedJob(rec, nil), nil
	case rec.Pod != c.opts.name:
		return nil, &Error{Op: op, Pod: c.Name(), JobID: jobID, Status: rec.Progress.Status, Category: CategoryConflict, Err: fmt.Errorf("%w: it is on %q", ErrOtherPod, rec.Pod)}
	}
	return c.claim(ctx, op, t, c.admissionOf(rec))
}

// stored reads a record.
func (c *PodClient) stored(ctx context.Context, op string, t *tracker, jobID string) (rec *Record, err error) {
	err = c.storeCall(ctx, op, jobID, func(ctx context.Context) (err error) {
		rec, err = t.store.Get(ctx, jobID)
		return err
	})
	return rec, err
}

// admissionOf is a stored job with the client's job defaults.
func (c *PodClient) admissionOf(rec *Record) admission {
	o := addUp(c.opts.jobDefaults)
	o.inputs = nil // of another job
	return admission{rec: rec, graph: graphOf(rec), opts: o}
}

// Recover takes over this pod's unfinished jobs whose leases are free and yields them; then it waits for the leases that run,
// and yields the jobs whose owners do not come back. It ends when each unfinished job that it saw has an owner or an end, which
// takes about one lease; or when the loop ends. When ctx or the client ends first, that error is the last that it yields. A job
// that cannot be taken over yields an error, and the walk goes on.
func (c *PodClient) Recover(ctx context.Context) iter.Seq2[*Job, error] {
	const op = "recover"
	return func(yield func(*Job, error) bool) {
		t, err := c.running(op, "")
		if err != nil {
			yield(nil, err)
			return
		}
		ctx, done := c.endpoint.bind(ctx)
		defer done()
		failing := map[string]time.Time{}
		held, more := c.recoverSome(ctx, t, t.store.Unfinished(ctx, c.opts.name), c.claimFree, failing, yield)
		for more && len(held) > 0 {
			timer := time.NewTimer(max(c.opts.timing.Lease/6, 10*time.Millisecond))
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
			}
			held, more = c.recoverSome(ctx, t, withoutErrors(held), c.claimHeld, failing, yield)
		}
		if more && ctx.Err() != nil {
			yield(nil, c.storeError(ctx, op, "", nil))
		}
	}
}

func withoutErrors(recs []*Record) iter.Seq2[*Record, error] {
	return func(yield func(*Record, error) bool) {
		for _, rec := range recs {
			if !yield(rec, nil) {
				return
			}
		}
	}
}

// recoverPatience is how long Recover tries for a job that it saw while the store fails.
const recoverPatience = 2 * time.Minute

// recoverSome claims records and yields the jobs that it got. held are those that another owner has, and those for which the store
// has been failing, since when failing says; more: the caller wants to go on.
func (c *PodClient) recoverSome(ctx context.Context, t *tracker, recs iter.Seq2[*Record, error], claim claimer, failing map[string]time.Time, yield func(*Job, error) bool) (held []*Record, more bool) {
	const op = "recover"
	for got := range claims(ctx, t, recs, claim) {
		switch {
		case errors.Is(got.err, ErrJobHeld):
			delete(failing, got.rec.JobID)
			held = append(held, got.rec)
			continue
		case errors.Is(got.err, ErrJobNotFound):
			continue
		case got.err != nil && ctx.Err() != nil:
			return nil, true
		case got.err != nil && got.rec == nil: // one that cannot be read, or the walk
			if !yield(nil, c.storeError(ctx, op, "", got.err)) {
				return nil, false
			}
			continue
		case got.err != nil:
			id := got.rec.JobID
			err := c.storeError(ctx, op, id, got.err)
			since, told := failing[id]
			if err.Category == CategoryStorage && (!told || time.Since(since) < recoverPatience) {
				held = append(held, got.rec)
			}
			if told {
				continue
			}
			failing[id] = time.Now()
			if !yield(nil, err) {
				return nil, false
			}
			continue
		case got.claimed == nil || got.claimed.Progress.Status.Terminal():
			continue
		}
		c.counters.recovered.Add(1)
		a := c.admissionOf(got.claimed)
		a.drive, a.confirmed = true, got.asked
		j, err := c.admit(op, t, a)
		if err != nil {
			yield(nil, err)
			return nil, false
		}
		if !yield(j, nil) {
			return nil, false
		}
	}
	return held, true
}

// claimed is what became of a record that Recover wanted.
type claimed struct {
	rec     *Record   // as it was read; nil: it could not be
	claimed *Record   // nil, without an error: nothing is to be done
	asked   time.Time // when the claim was sent
	err     error
}

// claimer tries to claim one record.
type claimer func(ctx context.Context, t *tracker, rec *Record) claimed

// claimFree claims a job that this client does not follow yet.
func (c *PodClient) claimFree(ctx context.Context, t *tracker, rec *Record) claimed {
	if followed := false; !t.tell(func() { followed = t.jobs[rec.JobID] != nil }) || followed {
		return claimed{rec: rec}
	}
	asked := time.Now()
	got, err := t.store.Claim(ctx, rec.JobID, t.owner, c.opts.timing.Lease)
	if err != nil {
		got = nil
	}
	return claimed{rec: rec, claimed: got, asked: asked, err: err}
}

// claimHeld claims a job whose lease ran, unless it was renewed meanwhile: then it has an owner. The store says so by another end
// of the lease, so that no two clocks are compared.
func (c *PodClient) claimHeld(ctx context.Context, t *tracker, rec *Record) claimed {
	now, err := t.store.Get(ctx, rec.JobID)
	switch {
	case errors.Is(err, ErrJobNotFound), err == nil && now.Progress.Status.Terminal(),
		// Its own lease is that of a claim whose reply was lost.
		err == nil && now.LeaseUntil.After(rec.LeaseUntil) && now.Owner != t.owner:
		return claimed{rec: rec}
	}
	return c.claimFree(ctx, t, rec)
}

// claimersAtOnce is how many claims of Recover are under way at one time: each takes a round trip.
const claimersAtOnce = 16

// claims makes the claims and yields what became of them. What was claimed when the loop ends is given back.
func claims(ctx context.Context, t *tracker, recs iter.Seq2[*Record, error], claim claimer) iter.Seq[claimed] {
	return func(yield func(claimed) bool) {
		working, enough := context.WithCancel(ctx)
		read, made := make(chan *Record), make(chan claimed)
		var workers sync.WaitGroup
		workers.Go(func() {
			defer close(read)
			for rec, err := range recs {
				if err != nil {
					made <- claimed{err: err}
					continue
				}
				select {
				case read <- rec:
				case <-working.Done():
					return
				}
			}
		})
		for range claimersAtOnce {
			workers.Go(func() {
				for rec := range read {
					made <- claim(working, t, rec)
				}
			})
		}
		go func() {
			workers.Wait()
			close(made)
		}()
		defer func() {
			enough()
			var unwanted []string
			for got := range made {
				if got.claimed != nil {
					unwanted = append(unwanted, got.rec.JobID)
				}
			}
			// An Execute of the same job may have found the lease to be this client's own, and drive the job by now.
			t.tell(func() {
				unwanted = slices.DeleteFunc(unwanted, func(id string) bool { return t.jobs[id] != nil })
			})
			last, cancel := t.lastCalls(ctx)
			defer cancel()
			t.giveBack(last, unwanted)
		}()
		for got := range made {
			if !yield(got) {
				return
			}
		}
	}
}

// Stats returns what the client has done and is doing.
func (c *PodClient) Stats() Stats {
	if c == nil || c.counters == nil {
		return Stats{Stream: StreamIdle}
	}
	n := c.counters
	s := Stats{
		Stream:    StreamIdle,
		Submitted: n.submitted.Load(), Joined: n.joined.Load(), Recovered: n.recovered.Load(),
		Succeeded: n.succeeded.Load(), Failed: n.failed.Load(), Cancelled: n.cancelled.Load(),
		Attempts: n.attempts.Load(), AmbiguousPosts: n.ambiguousPosts.Load(), DuplicatesRemoved: n.duplicatesRemoved.Load(),
		Calls: n.calls.Load(), CallErrors: n.callErrors.Load(), Retries: n.retries.Load(),
		Dials: n.dials.Load(), DialErrors: n.dialErrors.Load(), Deaf: n.deaf.Load(),
		Frames: n.frames.Load(), FrameBytes: n.frameBytes.Load(), FramesSkipped: n.framesSkipped.Load(),
		StoreWrites: n.storeWrites.Load(), StoreErrors: n.storeErrors.Load(),
	}
	c.mu.Lock()
	t := c.tracker
	c.mu.Unlock()
	if t != nil {
		s.Following, s.Owned = int(t.gauges.following.Load()), int(t.gauges.owned.Load())
		s.StorePending = t.gauges.unwritten.Load()
		s.Stream, _ = t.gauges.stream.Load().(StreamState)
	}
	return s
}

// Close ends the client: calls in flight and handles return ErrClosed, leases are given back, and all goroutines but callbacks
// in progress have ended when it returns. It cancels no job: those on the pod go on, and whoever attaches to them or recovers
// them gets their ends. It is idempotent, and may be called from a callback or inside a loop over events.
func (c *PodClient) Close() error {
	if c == nil || c.opts == nil {
		return nil
	}
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	if first {
		c.ended.Add(1)
	}
	t := c.tracker
	c.mu.Unlock()
	if !first {
		c.ended.Wait()
		return nil
	}
	defer c.ended.Done()
	c.endpoint.close()
	if t != nil {
		t.stop()
	}
	return nil
}
