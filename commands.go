package comfyui

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/comfypod/comfyui/internal/wire"
)

// What a client does to the pod for its jobs: posting, looking, cancelling. The parts that run on workers touch no state of
// the tracker's; methods of *tracker that take a *tracked run under its lock.

// promptID names an attempt: two processes that repeat an attempt use the same id, and a job whose record was lost can still
// be matched to what the pod runs.
func promptID(jobID, workflowHash string, attempt int) string {
	return uuid.NewSHA1(promptSpace, []byte(jobID+"\x00"+workflowHash+"\x00"+strconv.Itoa(attempt))).String()
}

// promptSpace is the namespace of prompt ids.
var promptSpace = uuid.NewSHA1(uuid.NameSpaceURL, []byte("https://github.com/comfypod/comfyui"))

// markerKey is the key of extra_data under which a prompt names its job, for pods that ignore prompt ids.
const markerKey = "comfyui_go"

// secretKeys are the keys of extra_data that the pod takes for secrets.
var secretKeys = []string{"api_key_comfy_org", "auth_token_comfy_org"}

// secretsOf picks what is sent and never stored.
func secretsOf(extra map[string]any) map[string]any {
	var secrets map[string]any
	for _, key := range secretKeys {
		if v, ok := extra[key]; ok {
			if secrets == nil {
				secrets = map[string]any{}
			}
			secrets[key] = v
		}
	}
	return secrets
}

// hides takes the secrets that the pod is given with a job out of a text; nil: there are none.
func hides(apiKey string, secrets map[string]any) *strings.Replacer {
	var pairs []string
	for _, v := range append(slices.Collect(maps.Values(secrets)), apiKey) {
		if secret, ok := v.(string); ok && len(secret) >= shortestSecret {
			pairs = append(pairs, secret, redacted)
		}
	}
	if pairs == nil {
		return nil
	}
	return strings.NewReplacer(pairs...)
}

// ------------------------------------------------------------- submission

// submission is what a worker needs to post one attempt.
type submission struct {
	t          *tracker
	rec        *Record // a copy
	attempts   []sought
	look       bool
	lookOnly   bool      // it is to be cancelled: only what a former owner posted matters
	inherited  bool      // a former owner may have posted it
	graceUntil time.Time // a former owner's POST may arrive until then
	free       bool      // free the pod's memory first
	borrow     func()    // fetches inputs and secrets, which somebody who joined the job may have brought
	inputs     []inputFile
	secrets    map[string]any
	number     *float64
	lease      *lease
	patience   context.Context
	seen       <-chan struct{} // closed: the stream has shown the prompt
	read       *queueRead      // it may show the prompt: made while the job was waiting for its turn; nil: none
	nudges     int             // of the number, for POSTs that were made before this submission
	posts      int
	doubtful   bool // one of them may have arrived
	looked     bool // the pod has been asked, and did not have it
}

// submitted is how a submission ended. One of accepted, stopped and err is set.
type submitted struct {
	accepted   bool
	stopped    bool
	looked     bool
	attempt    int
	promptID   string
	clientID   string
	number     float64
	posts      int  // POSTs that it took; 0: it was found
	made       int  // POSTs that were made
	answered   bool // the last of them was answered with a number
	postedAt   time.Time
	heard      int64 // frames that the stream had heard then
	nodeErrors map[string]wire.NodeErrors
	workflow   json.RawMessage // with uploaded names; nil: unchanged
	err        *Error
}

// postDue queues the attempt when everything that must come first has.
func (t *tracker) postDue(j *tracked, now time.Time) {
	p := &j.posting
	if j.rec.Accepted || p.busy || j.attempt.verdict != nil {
		return
	}
	if j.rec.CancelRequested {
		if j.look { // somebody may have posted it: then it is to be found and taken off the pod
			p.queued = false
			t.post(j)
			return
		}
		t.finishFailed(j, StatusCancelled, j.failure(CategoryCancelled, ErrCancelled), now)
		t.conclude(j, now)
		return
	}
	if p.queued {
		return
	}
	if now.Before(p.at) {
		j.at(p.at)
		return
	}
	if now.Before(j.rec.NextAttempt) {
		j.at(j.rec.NextAttempt)
		return
	}
	if j.write.attempt < j.rec.Attempt {
		return // the record comes first: wrote looks again
	}
	if !t.streamSettled(j, now) {
		return
	}
	p.queued, p.reads = true, t.reads.begun.Load()
	t.queue = append(t.queue, j)
	t.pump()
}

// streamSettled tells whether the stream is up, or no longer waited for: so that no frame is missed, but a stream that is
// known to be down holds nothing up.
func (t *tracker) streamSettled(j *tracked, now time.Time) bool {
	if t.pod.stream != StreamConnecting && t.pod.stream != StreamIdle || t.timing.StreamWait <= 0 {
		return true
	}
	if j.posting.streamBy.IsZero() {
		j.posting.streamBy = now.Add(t.timing.StreamWait)
	}
	if now.Before(j.posting.streamBy) {
		j.at(j.posting.streamBy)
		return false
	}
	return true
}

// pump starts queued submissions while there is room on the pod and among the workers.
func (t *tracker) pump() {
	for len(t.queue) > 0 {
		posting := int(t.prompts.open.Load())
		if posting >= posters || t.opts.maxInFlight > 0 && t.inFlight+posting >= t.opts.maxInFlight {
			return
		}
		j := t.queue[0]
		t.queue[0] = nil
		t.queue = t.queue[1:]
		if !j.posting.queued { // a cancel overtook it
			continue
		}
		j.posting.queued = false
		if j.lease == nil || j.concluded || j.attempt.verdict != nil {
			continue
		}
		t.post(j)
	}
	t.shown = nil
}

func (t *tracker) post(j *tracked) {
	now := time.Now()
	j.rec.AttemptAt = now
	work, cut := context.WithCancel(t.ctx)
	patience, enough := context.WithCancelCause(work)
	found := make(chan struct{})
	j.posting.busy, j.posting.cut, j.posting.enough, j.posting.found = true, cut, enough, found
	rec := j.rec // what it refers to is replaced, never changed
	s := &submission{
		t: t, rec: &rec, look: j.look, free: j.rec.Failure != nil && j.rec.Failure.Category == CategoryOutOfMemory,
		number: j.number, lease: j.lease, patience: patience, seen: found, read: t.shownSince(j.posting.reads, now),
		nudges: j.posting.made + max(0, int(j.rec.Epoch)-1), // a former owner may have posted it too
	}
	s.borrow = func() { t.tell(func() { s.inputs, s.secrets = j.inputs, j.secrets }) }
	s.lookOnly, s.inherited = j.look && j.rec.CancelRequested, j.inherited
	if j.look {
		s.attempts = t.allAttempts(j)
		if j.inherited {
			s.graceUntil = j.claimedAt.Add(max(0, t.timing.Grace))
		}
	} else {
		s.attempts = []sought{{j.rec.JobID, j.rec.PromptID, j.rec.Attempt}}
	}
	id, attempt := j.rec.JobID, j.rec.Attempt
	t.prompts.open.Add(1)
	t.posting.do(func(context.Context) func() {
		result := s.run(work)
		return func() { t.submitted(id, attempt, j, result) }
	})
}

// allAttempts are the prompts under which the pod may have the attempt that the record names or, when the store has lost
// something, a later one; the newest first. What came before the record's attempt is known to be over.
func (t *tracker) allAttempts(j *tracked) []sought {
	most := j.rec.Attempt
	for _, c := range newAttempts {
		most = max(most, j.rec.Attempt-1+min(t.retrier.attempts(c), maxSoughtAttempts))
	}
	all := make([]sought, 0, most-j.rec.Attempt+1)
	for n := most; n >= j.rec.Attempt; n-- {
		all = append(all, sought{j.rec.JobID, promptID(j.rec.JobID, j.rec.WorkflowHash, n), n})
	}
	return all
}

// maxSoughtAttempts bounds the history reads of one look.
const maxSoughtAttempts = 8

// submitted takes in how a submission ended.
func (t *tracker) submitted(jobID string, attempt int, j *tracked, r submitted) {
	now := time.Now()
	open := t.prompts.open.Add(-1)
	defer func() {
		if open == 0 {
			t.strays = nil
		}
		t.pump()
	}()
	j.posting.cut()
	j.posting.busy, j.posting.cut, j.posting.enough, j.posting.found = false, nil, nil, nil
	j.posting.made += r.made
	if t.jobs[jobID] != j || j.lease == nil || j.concluded {
		return
	}
	if j.rec.Attempt != attempt { // it was over before its reply came: the next one has waited for that
		t.advance(j, now)
		return
	}
	if r.workflow != nil {
		j.rec.Workflow = r.workflow
	}
	switch {
	case r.accepted:
		t.contact(now)
		t.accepted(j, r, now)
	case j.rec.Accepted:
		t.lookBy(now) // the stream has shown it, whatever became of the last POST
	case errors.Is(r.err, errUnconfirmed):
		// Not posted, and no fault of the job: either there is another owner, or the store is away or has lost the record.
		j.posting.at, j.look = now.Add(unconfirmedPause), true
		t.lostLease(j)
	case errors.Is(r.err, errCancelWanted):
		j.rec.CancelRequested = true
		t.wantCancel(j, now)
	case r.stopped && j.attempt.verdict != nil:
		j.left = true
	case r.stopped && j.rec.CancelRequested && j.look && !r.looked:
		// Nobody knows yet whether the pod has it: postDue has that looked up.
	case r.stopped && j.rec.CancelRequested:
		t.observe(j, obsVerdict{j.failure(CategoryCancelled, ErrCancelled)}, now)
		j.left = true
	case r.stopped:
		// The lease was lost, and won again before the worker had noticed: drive has it looked for.
	default:
		if CategoryOf(r.err) == CategoryClosed {
			return
		}
		j.left = true
		if r.err.Category == CategoryNetwork || r.err.Category == CategoryTimeout {
			t.noteRefusal(r.err, now)
		}
		t.observe(j, obsVerdict{r.err}, now)
	}
	t.advance(j, now)
}

// accepted takes in that the pod has the attempt.
func (t *tracker) accepted(j *tracked, r submitted, now time.Time) {
	if r.promptID != j.rec.PromptID { // an old pod names prompts itself; or another attempt was found there
		t.unregister(j)
		j.rec.PromptID, j.rec.Attempt = r.promptID, r.attempt
		t.register(j)
	}
	j.look = false
	t.noteNumber(j, r, now)
	if r.answered { // each POST makes the pod send a status frame to everyone
		t.suspectDeaf(r.postedAt, r.heard, now)
	}
	var warnings []*Error
	if len(r.nodeErrors) > 0 {
		invalid := j.failure(CategoryValidation, validationOf(r.nodeErrors))
		if !j.rec.Options.AllowPartial {
			t.observe(j, obsAccepted{promptID: r.promptID, clientID: r.clientID, number: r.number, source: SourcePoll}, now)
			t.takeOff(j, invalid, now)
			return
		}
		warnings = append(warnings, invalid)
	}
	wasAccepted := j.rec.Accepted
	t.observe(j, obsAccepted{promptID: r.promptID, clientID: r.clientID, number: r.number, warnings: warnings, source: SourcePoll}, now)
	if wasAccepted { // the stream was faster; it knew no number
		j.rec.Number, j.rec.ClientID = r.number, r.clientID
		for _, w := range warnings {
			t.observe(j, obsWarning{w}, now)
		}
	}
	t.takeStrays(r.promptID, now)
	switch {
	case r.posts != 1:
		t.expectCopies(now) // the POST before may have arrived too
	case t.pod.fingerprints && t.pod.failures == 0:
		t.lookBy(now) // what else the process has tells it from the next one, which could come at any moment
	case t.pod.stream == StreamUp:
		t.lookBy(now.Add(min(max(t.timing.Poll, 0), t.lookPeriod()))) // where it stands in the queue
	default:
		t.lookBy(now.Add(max(t.timing.Poll, 0)))
	}
}

// noteNumber watches the pod's counter: one that goes back belongs to another process. Answers may overtake each other, so
// only a POST that was sent after the higher number had come proves that.
func (t *tracker) noteNumber(j *tracked, r submitted, now time.Time) {
	if !r.answered || j.number != nil || j.rec.Options.Front || r.number != math.Trunc(r.number) || r.number < 0 {
		return
	}
	if r.number < t.pod.highest {
		if !r.postedAt.After(t.pod.highestAt) {
			return
		}
		t.restarted()
		t.lookBy(now)
	}
	t.pod.highest, t.pod.highestAt = r.number, now
}

// stopPosting makes the submission under way stop at the next safe point.
func (j *tracked) stopPosting() {
	if j.posting.enough != nil {
		j.posting.enough(errNoMorePosts)
	}
}

// unconfirmedPause is the time between two tries to post for a lease that the store does not confirm.
const unconfirmedPause = time.Second

var (
	errNoMorePosts  = errors.New("the job is not to be posted any more")
	errCancelWanted = errors.New("somebody has asked for the job's cancel")
)

// run brings the attempt onto the pod, or finds it there.
func (s *submission) run(ctx context.Context) submitted {
	result := s.bring(ctx)
	result.made = s.posts
	return result
}

func (s *submission) bring(ctx context.Context) submitted {
	if s.look {
		if result, done := s.firstLook(ctx); done {
			return result
		}
	}
	s.borrow()
	workflow, err := s.upload()
	switch {
	case err != nil && s.patience.Err() != nil:
		return s.over(ctx)
	case err != nil:
		return submitted{err: s.blame(err)}
	}
	if workflow != nil {
		s.rec.Workflow = workflow
	}
	if s.free {
		if err := s.t.endpoint.freeMemory(ctx, true, true); err != nil {
			s.t.opts.logger.Warn("comfyui: the pod's memory was not freed", "pod", s.rec.Pod, "job", s.rec.JobID, "error", err)
		}
	}
	var result submitted
	err = s.t.retrier.do(s.patience, retryOp{op: "submit", jobID: s.rec.JobID, safe: s.mayRepeat}, func(context.Context, int) (err error) {
		result, err = s.post(ctx)
		return err
	})
	switch {
	case err == nil:
	case s.patience.Err() != nil && !errors.Is(err, ErrPodGone): // a POST in doubt that could not be looked for is not taken back
		result = s.over(ctx)
	default:
		result = submitted{err: s.blame(err)}
	}
	result.workflow = workflow
	return result
}

// firstLook looks for the attempt before it is posted. done: the submission ends with that.
func (s *submission) firstLook(ctx context.Context) (result submitted, done bool) {
	patience := s.patience
	if s.lookOnly {
		patience = ctx
	}
	err := s.t.retrier.do(patience, retryOp{op: "submit", jobID: s.rec.JobID, safe: s.mayRepeat}, func(context.Context, int) (err error) {
		result, err = s.lookThrough(ctx, patience, s.graceUntil)
		return err
	})
	switch {
	case result.accepted:
		return result, true
	case patience.Err() != nil:
		return s.over(ctx), true
	case err != nil:
		return submitted{err: s.blame(err)}, true
	case s.lookOnly:
		return submitted{stopped: true, looked: true}, true
	case s.rec.Options.AtMostOnce && s.inherited:
		return submitted{err: s.blame(&Error{Category: CategoryUnknown, Err: ErrOutcomeUnknown})}, true
	}
	return submitted{}, false
}

// over is how a submission ends that was told to stop.
func (s *submission) over(ctx context.Context) submitted {
	if ctx.Err() != nil {
		return submitted{err: s.blame(&Error{Category: CategoryClosed, Err: ErrClosed})}
	}
	return submitted{stopped: true, looked: s.looked}
}

// mayRepeat: what was fenced, and what may have been done once for a job that must not be done twice, is not repeated.
func (s *submission) mayRepeat(err error) bool {
	for _, final := range []error{errUnconfirmed, errCancelWanted, ErrOutcomeUnknown, ErrPodGone} {
		if errors.Is(err, final) {
			return false
		}
	}
	return true
}

// blame makes err an *Error of this attempt.
func (s *submission) blame(err error) *Error {
	e := *asError(err)
	e.Op, e.Pod, e.JobID, e.PromptID, e.Attempt, e.Status = "submit", s.rec.Pod, s.rec.JobID, s.rec.PromptID, s.rec.Attempt, StatusPending
	return &e
}

// post makes one POST and, if its answer leaves open whether it arrived, finds out.
func (s *submission) post(ctx context.Context) (submitted, error) {
	if s.patience.Err() != nil {
		return submitted{}, context.Cause(s.patience)
	}
	if s.doubtful { // what was not there when it was looked for may have come since
		found, err := s.lookOnce(ctx)
		if err != nil || found.accepted {
			found.posts = s.posts + 1
			return found, err
		}
	}
	if s.lease.cancelWanted(ctx) {
		return submitted{}, errCancelWanted
	}
	body, err := s.body()
	if err != nil {
		return submitted{}, err
	}
	s.posts++
	if s.posts == 1 {
		s.t.counters.attempts.Add(1)
	}
	postedAt, heard := time.Now(), s.t.stream.heard.Load()
	reply, outcome, err := s.t.endpoint.postPrompt(ctx, body, func() error { return s.lease.confirm(ctx) })
	switch outcome {
	case postAccepted:
		id := reply.PromptID
		if id == "" { // 409: it was there already
			id = s.rec.PromptID
		}
		s.t.endpoint.tookPrompt(s.rec.PromptID, id)
		return submitted{
			accepted: true, attempt: s.rec.Attempt, promptID: id, clientID: s.t.opts.clientID, number: reply.Number,
			nodeErrors: reply.NodeErrors, posts: s.posts, answered: reply.PromptID != "", postedAt: postedAt, heard: heard,
		}, nil
	case postRefused, postUnsent:
		return submitted{}, err
	}
	s.t.counters.ambiguousPosts.Add(1)
	s.doubtful = true
	until := time.Now().Add(max(0, s.t.timing.Grace))
	if answeredByPod(err) {
		until = time.Time{}
	}
	found, lookErr := s.lookThrough(ctx, ctx, until)
	switch {
	case found.accepted:
		found.posts = s.posts + 1 // so that another copy, still on its way, is looked for
		return found, nil
	case lookErr != nil:
		return submitted{}, errors.Join(lookErr, err)
	case s.rec.Options.AtMostOnce:
		return submitted{}, &Error{Category: CategoryUnknown, Err: errors.Join(ErrOutcomeUnknown, err)}
	}
	return submitted{}, err
}

// answeredByPod tells ComfyUI's own 500: its handler has ended, so the prompt is in the queue by now or never will be. A
// proxy's 502, a time-out or a reset proves nothing of the kind.
func answeredByPod(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.StatusCode == http.StatusInternalServerError && strings.Contains(err.Error(), "Server got itself in trouble")
}

// lookThrough looks for the attempt until a time, at least once; while the pod does not answer, through Gone. A pod that refuses the look
// for good is the retry policies' affair, unless there was a POST, which may have arrived. A ctx that ends patience ends it between two
// looks.
func (s *submission) lookThrough(ctx, patience context.Context, until time.Time) (submitted, error) {
	timing := s.t.timing
	wait := max(timing.Poll, 50*time.Millisecond)
	var silent time.Time
	for {
		began := time.Now() // what is not there then may come until the look has ended
		found, err := s.lookOnce(ctx)
		now := time.Now()
		s.looked = s.looked || err == nil
		switch {
		case found.accepted:
			return found, nil
		case err == nil && !began.Before(until):
			return submitted{}, nil
		case err == nil:
			silent, wait = time.Time{}, max(timing.Poll, 50*time.Millisecond)
		case ctx.Err() != nil, forGood(err) && !s.inherited && !s.doubtful:
			return submitted{}, err
		default:
			if silent.IsZero() {
				silent = now
			}
			if timing.Gone > 0 && now.Sub(silent) >= timing.Gone {
				return submitted{}, &Error{Category: CategoryOf(ErrPodGone), Err: errors.Join(ErrPodGone, err)}
			}
			wait = min(2*wait, 5*time.Second)
		}
		pause := wait
		if left := until.Sub(now); left > 0 && left < pause {
			pause = left
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-s.seen:
		case <-patience.Done():
		}
		timer.Stop()
		if patience.Err() != nil {
			return submitted{}, context.Cause(patience)
		}
	}
}

// lookOnce looks for any attempt of the job in the pod's queue, then in its history.
func (s *submission) lookOnce(ctx context.Context) (submitted, error) {
	select {
	case <-s.seen:
		return submitted{accepted: true, attempt: s.rec.Attempt, promptID: s.rec.PromptID, clientID: s.t.opts.clientID}, nil
	default:
	}
	r := &reconciler{
		endpoint: s.t.endpoint, reads: s.t.reads, started: time.Now(), wanted: s.attempts, byMarker: true, proven: math.MaxInt64,
	}
	read := s.read
	s.read = nil
	if !r.shownBy(read) && (r.knowsNone(ctx) || r.err != nil) {
		return submitted{}, r.err
	}
	r.run(ctx)
	for _, w := range s.attempts {
		if spot := r.spots[w.promptID]; spot.place > placeAbsent {
			client := spot.clientID
			if client == "" {
				client = s.rec.ClientID
			}
			return submitted{accepted: true, attempt: spot.attempt, promptID: spot.promptID, clientID: client, number: spot.number}, nil
		} else if spot.place == placeUnread {
			r.err = cmp.Or(r.err, spot.err)
		}
	}
	return submitted{}, r.err
}

// upload puts the job's files on the pod and returns the workflow with the names that the pod gave them; nil: it has none.
func (s *submission) upload() (json.RawMessage, error) {
	if len(s.inputs) == 0 {
		return nil, nil
	}
	w, err := ParseWorkflow(s.rec.Workflow)
	if err != nil {
		return nil, err
	}
	for _, in := range s.inputs {
		ref, err := s.uploadOne(in)
		if err != nil {
			return nil, fmt.Errorf("input %q of node %q: %w", in.input, in.node, err)
		}
		if err := w.Set(in.node, in.input, ref); err != nil {
			return nil, err
		}
	}
	return w.MarshalJSON()
}

// uploadOne can be broken off at any moment, unlike a POST: half a file on the pod does nothing.
func (s *submission) uploadOne(in inputFile) (ref FileRef, err error) {
	err = s.t.retrier.do(s.patience, retryOp{op: "upload", jobID: s.rec.JobID}, func(ctx context.Context, _ int) error {
		file, err := in.open(ctx)
		if err == nil && file == nil {
			err = errors.New("there is neither a reader nor an error")
		}
		if err != nil {
			return &Error{Category: CategoryValidation, Err: fmt.Errorf("opening %q: %w", in.name, err)}
		}
		ref, err = s.t.client.Upload(ctx, in.name, file)
		if cerr := file.Close(); err == nil && cerr != nil {
			err = &Error{Category: CategoryValidation, Err: cerr}
		}
		return err
	})
	return ref, err
}

// body is the request of the next POST.
func (s *submission) body() ([]byte, error) {
	extra, err := s.extraData()
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, len(s.rec.Workflow)+len(extra)+256)
	b = append(append(b, `{"prompt":`...), s.rec.Workflow...)
	b = append(append(b, `,"client_id":`...), jsonOf(s.t.opts.clientID)...)
	b = append(append(b, `,"prompt_id":`...), jsonOf(s.rec.PromptID)...)
	if s.number != nil {
		// An equal number under an equal id makes the pod compare graphs, which can stop its worker (server.md §1).
		number, towards := *s.number, math.Inf(1)
		if number > math.MaxFloat64/2 { // near the end nothing is left above
			towards = -towards
		}
		for range s.nudges + s.posts {
			number = math.Nextafter(number, towards)
		}
		b = append(append(b, `,"number":`...), jsonOf(number)...)
	} else if s.rec.Options.Front {
		b = append(b, `,"front":true`...)
	}
	b = append(append(b, `,"extra_data":`...), extra...)
	return append(b, '}'), nil
}

// marker is what extra_data holds under markerKey.
type marker struct {
	JobID   string `json:"job_id"`
	Attempt int    `json:"attempt"`
	Nonce   string `json:"nonce"`
}

// extraData is the caller's, the secrets, and the marker.
func (s *submission) extraData() ([]byte, error) {
	mark := marker{JobID: s.rec.JobID, Attempt: s.rec.Attempt, Nonce: uuid.NewString()}
	key := s.t.opts.apiKey
	if len(s.rec.ExtraData) == 0 && key == "" && len(s.secrets) == 0 {
		return slices.Concat([]byte(`{"`+markerKey+`":`), jsonOf(mark), []byte{'}'}), nil
	}
	extra := map[string]any{}
	if len(s.rec.ExtraData) > 0 {
		stored := map[string]json.RawMessage{}
		if err := json.Unmarshal(s.rec.ExtraData, &stored); err != nil {
			return nil, &Error{Category: CategoryValidation, Err: fmt.Errorf("extra data: %w", err)}
		}
		for k, v := range stored {
			extra[k] = v
		}
	}
	if key != "" {
		extra["api_key_comfy_org"] = key
	}
	maps.Copy(extra, s.secrets)
	extra[markerKey] = mark
	return json.Marshal(extra)
}

// ------------------------------------------------------------------ looking

// sought is an attempt that is looked for.
type sought struct {
	jobID, promptID string
	attempt         int
}

type place int

const (
	placeUnknown place = iota // the pod did not say
	placeUnread               // not in the queue, and the pod cannot give its history entry
	placeAbsent
	placePending
	placeRunning
	placeHistory
)

// spot is where the pod has an attempt.
type spot struct {
	place    place
	promptID string // as the pod names it
	clientID string
	attempt  int
	number   float64
	ahead    int
	copies   int    // of it in the queue
	stray    string // another pending prompt of the same attempt
	entry    *wire.HistoryEntry
	err      error // of placeUnread
}

// reconciler is one look at the pod: its queue first and then, for what is not there, its history. The other way round a job
// that ends in between would be in neither (server.md §3.8).
type reconciler struct {
	endpoint    *endpoint
	reads       *queueReads
	started     time.Time
	wanted      []sought
	byMarker    bool     // an old pod may know the attempts by their marker only
	single      bool     // ask for each job alone, where the pod can do that
	fingerprint bool     // compare the process with the one before
	witnesses   []string // prompts that it must have
	incarnation int      // of the pod when the look began
	proven      int64    // endpoint.lines.breaks when the witnesses were last known to be there
	heard       int64    // frames that the stream had heard when the look began

	err      error
	breaks   int64 // endpoint.lines.breaks when the queue had been read
	whole    bool  // the whole queue was read
	cost     time.Duration
	bytes    int
	shape    queueShape
	spots    map[string]spot // by the prompt id that was sought
	evidence evidence
}

// evidence is what the history says of the process.
type evidence struct {
	taken  bool // all was read that it takes
	oldest string
	same   bool // a witness is still there
	gone   bool // there were witnesses, and none of them is
	empty  bool // there is none at all
}

const (
	heavyQueue    = 256 << 10   // bytes of a reply from which single jobs are asked for instead
	wholeEvery    = time.Minute // and the whole queue only so often: it alone shows copies, places, and whether the queue moves
	jobWeight     = 64 << 10    // bytes of a reply that may be saved by one request more
	fewJobs       = 32          // at most so many
	lookReads     = 4           // at one time
	markerHistory = 128         // newest entries searched for a marker
)

func (r *reconciler) run(ctx context.Context) {
	if !r.whole && (!r.single || !r.lookSingly(ctx)) {
		r.lookAtQueue(ctx)
	}
	if r.err == nil {
		r.lookAtHistory(ctx)
	}
	if r.err != nil {
		r.doubtAbsent()
	} else if r.fingerprint || r.breaks > r.proven {
		r.takeFingerprint(ctx)
	}
}

// doubtAbsent is for a look that was not made to its end: what it has not found may be where it has not looked.
func (r *reconciler) doubtAbsent() {
	for id, s := range r.spots {
		if s.place == placeAbsent {
			s.place = placeUnknown
			r.spots[id] = s
		}
	}
}

// knowsNone tells whether the pod says of each attempt that it does not know it: to learn that there is nothing, the queue need not be
// read. Anything else is for the queue and the history to tell, which show more.
func (r *reconciler) knowsNone(ctx context.Context) bool {
	if !r.endpoint.keepsPromptIDs() || !r.endpoint.tellsJobs(ctx) {
		return false
	}
	return !slices.ContainsFunc(r.wanted, func(w sought) bool {
		job, told, err := r.ask(ctx, w.promptID)
		r.err = err
		return !told || job != nil
	})
}

// lookSingly asks for each job; false: the queue has to be read after all. What is over is left to the history, which tells it word
// for word.
func (r *reconciler) lookSingly(ctx context.Context) bool {
	start := time.Now()
	if !r.endpoint.tellsJobs(ctx) {
		return false
	}
	r.spots = make(map[string]spot, len(r.wanted))
	all := true
	var mu sync.Mutex
	atOnce(r.wanted, func(w sought) bool {
		job, told, err := r.ask(ctx, w.promptID)
		at := spot{place: placeAbsent, promptID: w.promptID, attempt: w.attempt, ahead: -1, copies: 1}
		switch {
		case job == nil:
		case job.Status == jobPending:
			at.place, at.number = placePending, job.Number
		case job.Status == jobRunning:
			at.place, at.number = placeRunning, job.Number
		}
		mu.Lock()
		defer mu.Unlock()
		r.spots[w.promptID] = at
		if err != nil {
			r.err = err
		}
		all = all && told
		return all
	})
	r.cost, r.breaks = time.Since(start), r.endpoint.lines.breaks.Load()
	// Whether it is another process shows in the whole queue only.
	return r.err != nil || all && r.breaks <= r.proven
}

// ask reads what /api/jobs says of a prompt. told: that can be relied on. err: nothing answers, and a queue would not either.
func (r *reconciler) ask(ctx context.Context, promptID string) (job *wire.Job, told bool, err error) {
	job, told, err = r.endpoint.apiJob(ctx, promptID)
	if err == nil {
		return job, told, nil
	}
	r.endpoint.distrustJobs()
	if answered(err) {
		err = nil
	}
	return nil, false, err
}

// answered tells whether something has answered, the pod or what stands before it.
func answered(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.StatusCode != 0
}

// unreadable tells whether the pod has answered, and cannot give what was asked for: a server stumbles over a history entry that is no
// JSON, or a proxy keeps the route to itself.
func unreadable(err error) bool { return answered(err) && forGood(err) }

// forGood tells failures that waiting does not mend from those of a pod that is away or busy.
func forGood(err error) bool {
	c := CategoryOf(err)
	return c == CategoryProtocol || c == CategoryAuth
}

// atOnce reads some things, a few at one time, until one of the reads returns false.
func atOnce[T any](of []T, read func(T) bool) {
	part := func(of []T) {
		for _, v := range of {
			if !read(v) {
				return
			}
		}
	}
	if len(of) <= lookReads {
		part(of)
		return
	}
	var wg sync.WaitGroup
	for some := range slices.Chunk(of, (len(of)+lookReads-1)/lookReads) {
		wg.Go(func() { part(some) })
	}
	wg.Wait()
}

func (r *reconciler) lookAtQueue(ctx context.Context) {
	read, err := r.reads.after(ctx)
	if err != nil {
		r.err = err
		return
	}
	r.takeQueue(read)
}

// shownBy tells whether a read shows any of the attempts, and takes it in then. One that was made before the look tells nothing of what
// it does not show.
func (r *reconciler) shownBy(read *queueRead) bool {
	if read == nil {
		return false
	}
	r.takeQueue(read)
	for _, s := range r.spots {
		if s.place > placeAbsent {
			return true
		}
	}
	r.whole = false
	return false
}

func (r *reconciler) takeQueue(read *queueRead) {
	running, pending := read.running, read.pending
	r.started, r.whole, r.cost, r.bytes, r.breaks = read.begunAt, true, read.cost, read.bytes, read.breaks
	r.shape = queueShape{running: len(running), pending: len(pending)}
	if len(running) > 0 {
		r.shape.first = running[0].PromptID
	}
	isWitness := func(it wire.QueueItem) bool { return slices.Contains(r.witnesses, it.PromptID) }
	r.evidence.same = slices.ContainsFunc(running, isWitness) || slices.ContainsFunc(pending, isWitness)
	byPrompt := make(map[string]*spot, len(r.wanted))
	byMarker := make(map[marked]*spot, len(r.wanted))
	for _, w := range r.wanted {
		s := &spot{place: placeAbsent, promptID: w.promptID, attempt: w.attempt, ahead: -1}
		byPrompt[w.promptID] = s
		if w.jobID != "" {
			byMarker[marked{w.jobID, w.attempt}] = s
		}
	}
	take := func(item *wire.QueueItem, at place, ahead int) {
		s := byPrompt[item.PromptID]
		if s == nil {
			if s = byMarker[marked{item.Marker.JobID, item.Marker.Attempt}]; s == nil {
				return
			}
			if s.place > placeAbsent { // the attempt has been seen under its own id, or this is the second that has not
				if at == placePending {
					s.stray = item.PromptID
				}
				return
			}
			s.promptID = item.PromptID
		}
		s.copies++
		if s.place <= placeAbsent {
			s.place, s.number, s.ahead, s.clientID = at, item.Number, ahead, item.ClientID
		}
	}
	for i := range running {
		take(&running[i], placeRunning, 0)
	}
	for i := range pending {
		take(&pending[i], placePending, len(running)+i)
	}
	r.spots = make(map[string]spot, len(byPrompt))
	for id, s := range byPrompt {
		r.spots[id] = *s
	}
}

// queueReads are the reads of the pod's whole queue. It carries the graph of every prompt, so that looks which begin while one is under
// way share the next: what that shows is younger than each of them.
type queueReads struct {
	t     *tracker
	begun atomic.Int64 // reads

	mu      sync.Mutex
	current *queueRead // under way; nil: none
	next    *queueRead // begins when that has ended; nil: nobody has asked for it
	rest    time.Time  // until then: the pod has other things to do than to tell its queue
}

// queueRead is one of them. What it has found is not changed any more once ended is closed.
type queueRead struct {
	turn             int64 // how many have begun, with it
	begunAt, endedAt time.Time
	ended            chan struct{} // closed
	running, pending []wire.QueueItem
	bytes            int
	cost             time.Duration
	breaks           int64 // endpoint.lines.breaks when it had been made
	err              error
}

const (
	// hungRead is how long a read holds up the next: a connection that hangs must not hang all looks.
	hungRead = 5 * time.Second
	// longestRest bounds the pause after a read, which is as long as the read was.
	longestRest = time.Second
	// shownFor is how long what a read shows counts for jobs that wait for their turn, if it did not take longer itself.
	shownFor = time.Second
)

// after returns a read that begins after the call. When ctx ends the read goes on for others.
func (q *queueReads) after(ctx context.Context) (*queueRead, error) {
	q.mu.Lock()
	r := q.next
	if r == nil {
		r = &queueRead{ended: make(chan struct{})}
		before := q.current
		q.next = r
		q.t.wg.Go(func() { q.read(r, before) })
	}
	q.mu.Unlock()
	select {
	case <-r.ended:
		return r, r.err
	case <-ctx.Done():
		err := endOf(ctx)
		return nil, &Error{Op: "queue", Pod: q.t.opts.name, Category: CategoryOf(err), Err: err}
	}
}

// read makes r when the one before has ended and the pod has had a rest.
func (q *queueReads) read(r, before *queueRead) {
	if before != nil {
		q.wait(before.ended, hungRead)
	}
	q.mu.Lock()
	rest := time.Until(q.rest)
	q.mu.Unlock()
	q.wait(nil, rest)
	q.mu.Lock()
	q.next, q.current = nil, r
	r.turn, r.begunAt = q.begun.Add(1), time.Now()
	q.mu.Unlock()
	r.running, r.pending, r.bytes, r.err = q.t.endpoint.queue(q.t.ctx, false)
	r.endedAt, r.breaks = time.Now(), q.t.endpoint.lines.breaks.Load()
	r.cost = r.endedAt.Sub(r.begunAt)
	q.mu.Lock()
	if q.current == r {
		q.current = nil
	}
	q.rest = r.endedAt.Add(min(r.cost, longestRest))
	q.mu.Unlock()
	if r.err == nil {
		q.t.tell(func() { q.t.show(r) })
	}
	close(r.ended)
}

// wait waits for an event, for a time at most.
func (q *queueReads) wait(event <-chan struct{}, most time.Duration) {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-event:
	case <-timer.C:
	case <-q.t.ctx.Done():
	}
}

// show keeps a read for the jobs that wait for their turn to be looked for.
func (t *tracker) show(r *queueRead) {
	if len(t.queue) > 0 && (t.shown == nil || r.turn > t.shown.turn) {
		t.shown = r
	}
}

// shownSince is the read of the queue that was kept, if it began after so many others and the same process answers still.
func (t *tracker) shownSince(reads int64, now time.Time) *queueRead {
	r := t.shown
	if r == nil || r.turn <= reads || now.Sub(r.endedAt) > max(shownFor, r.cost) || r.breaks != t.endpoint.lines.breaks.Load() {
		return nil
	}
	return r
}

// marked names an attempt as its marker does.
type marked struct {
	jobID   string
	attempt int
}

// lookAtHistory reads the entries of what is not in the queue.
func (r *reconciler) lookAtHistory(ctx context.Context) {
	var absent []string
	for id, s := range r.spots {
		if s.place == placeAbsent {
			absent = append(absent, id)
		}
	}
	var mu sync.Mutex
	atOnce(absent, func(id string) bool {
		entry, err := r.endpoint.history(ctx, id)
		mu.Lock()
		defer mu.Unlock()
		r.tookEntry(id, entry, err)
		return r.err == nil
	})
	if r.byMarker && r.err == nil {
		r.searchMarkers(ctx)
	}
}

func (r *reconciler) tookEntry(id string, entry *wire.HistoryEntry, err error) {
	s := r.spots[id]
	switch {
	case err != nil && unreadable(err): // it says nothing of the other jobs
		s.place, s.err = placeUnread, err
	case err != nil:
		r.err = err
		s.place = placeUnknown
	case entry != nil:
		s.place, s.entry, s.number, s.clientID = placeHistory, entry, entry.Number, entry.ClientID
	}
	r.spots[id] = s
}

// searchMarkers looks through the newest history of a pod that names prompts itself.
func (r *reconciler) searchMarkers(ctx context.Context) {
	missing := map[marked]string{}
	for _, w := range r.wanted {
		if r.spots[w.promptID].place == placeAbsent {
			missing[marked{w.jobID, w.attempt}] = w.promptID
		}
	}
	if len(missing) == 0 || !r.endpoint.ignoresPromptIDs(ctx) {
		return
	}
	entries, err := r.endpoint.newestHistory(ctx, markerHistory)
	if err != nil {
		r.err = err
		return
	}
	for i := range entries {
		e := &entries[i]
		if id, ok := missing[marked{e.Marker.JobID, e.Marker.Attempt}]; ok {
			s := r.spots[id]
			s.place, s.entry, s.promptID, s.number, s.clientID = placeHistory, e, e.PromptID, e.Number, e.ClientID
			r.spots[id] = s
		}
	}
}

// takeFingerprint looks for the witnesses: entries do not vanish from the history while a process lives, but for the oldest of ten
// thousand and what somebody deletes.
func (r *reconciler) takeFingerprint(ctx context.Context) {
	e := evidence{taken: true, same: r.evidence.same}
	entry, err := r.endpoint.oldestHistory(ctx)
	switch {
	case err != nil && !unreadable(err):
		r.err = err
		return
	case err != nil:
		e.taken = false
	case entry == nil:
		e.empty = true
	default:
		e.oldest = entry.PromptID
		e.same = e.same || slices.Contains(r.witnesses, e.oldest)
	}
	for _, id := range r.witnesses {
		if e.same || e.empty {
			break
		}
		found, err := r.endpoint.history(ctx, id)
		switch {
		case err != nil && !unreadable(err):
			r.err = err
			return
		case err != nil:
			e.taken = false
		default:
			e.same = found != nil
		}
	}
	e.taken = e.taken || e.same // a witness that could not be read is none that is gone
	e.gone = e.taken && r.whole && len(r.witnesses) > 0 && !e.same
	r.evidence = e
}

// isRefusal tells whether an error says that no process answers at the pod's address: a refused connection, or a proxy's word.
func isRefusal(err error) bool {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return true
	}
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.StatusCode {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, 520, 521, 522, 523, 524:
		return true
	}
	return false
}

// ---------------------------------------------------------------- cancelling

// cancelState is the wish to take a job off the pod.
type cancelState struct {
	until   time.Time // tried until then, and as long as somebody waits
	waiters map[*cancelWaiter]struct{}
	busy    bool
	next    time.Time
	failure error     // of the last try
	refused bool      // it cannot be done without hitting another's job
	touched bool      // the pod has said that it took the prompt out or will stop it
	hit     time.Time // when it last did; zero once a look since then has shown the prompt all the same
	waited  bool      // the last try took the prompt for one that waits
	cleared time.Time // what a look that began before then says of copies is out of date
}

// cancelWaiter is one call of Job.Cancel. It hears of the job's end from the handle.
type cancelWaiter struct{ refused chan error } // buffered

// refuse answers everyone who waits.
func (c *cancelState) refuse(err error) {
	for w := range c.waiters {
		w.refused <- err
	}
	clear(c.waiters)
}

// stop gives the wish up; those who wait go on waiting for the job's end.
func (c *cancelState) stop() { c.until = time.Time{} }

// wantCancel has the job taken off the pod, for as long as Timing.Cancel.
func (t *tracker) wantCancel(j *tracked, now time.Time) {
	if until := now.Add(t.timing.Cancel); until.After(j.cancel.until) {
		j.cancel.until = until
	}
	j.cancel.next = now
	j.stopPosting()
}

// cancelByContext is CancelWithContext: the intent is recorded first, as for every cancel.
func (t *tracker) cancelByContext(jobID string) {
	j := t.jobs[jobID]
	if j == nil || j.concluded || j.finished {
		return
	}
	t.asking.do(func(ctx context.Context) func() {
		ctx, cancel := context.WithTimeout(ctx, t.timing.Cancel)
		defer cancel()
		err := t.recordCancel(ctx, jobID)
		return func() {
			if err != nil {
				t.log(slog.LevelWarn, "comfyui: the cancel was not recorded", "job", jobID, "error", err)
			}
			t.cancelRequested(jobID, nil)
		}
	})
}

// recordCancel has whoever drives the job know that it is to be cancelled.
func (t *tracker) recordCancel(ctx context.Context, jobID string) error {
	return t.client.storeCall(ctx, "cancel", jobID, func(ctx context.Context) error {
		_, err := t.store.RequestCancel(ctx, jobID)
		return err
	})
}

// cancelRequested starts the cancel of a job whose record says so; w, if any, waits for its end.
func (t *tracker) cancelRequested(jobID string, w *cancelWaiter) {
	j, now := t.jobs[jobID], time.Now()
	if j == nil || j.finished {
		return
	}
	if w != nil {
		if j.cancel.waiters == nil {
			j.cancel.waiters = map[*cancelWaiter]struct{}{}
		}
		j.cancel.waiters[w] = struct{}{}
	}
	j.rec.CancelRequested, j.cancel.refused = true, false
	if j.lease != nil {
		if w == nil {
			t.wantCancel(j, now)
		}
		j.cancel.next = now
		j.stopPosting()
	}
	if j.follow != nil {
		j.follow.at = now
	}
	t.advance(j, now)
}

// cancelDue tries to take the prompt off the pod, again and again: an interrupt is one flag, reset when a job starts, and can
// be lost (server.md §3.7).
func (t *tracker) cancelDue(j *tracked, now time.Time) {
	c := &j.cancel
	wanted := j.leaving || j.rec.CancelRequested
	if !wanted || c.busy || j.left || !j.rec.Accepted || len(c.waiters) == 0 && !now.Before(c.until) {
		return
	}
	if now.Before(c.next) {
		j.at(c.next)
		return
	}
	c.busy, c.waited = true, !j.rec.Started
	together := c.waited && j.lease.fresh() && !refuses(c.failure)
	t.cancels.add(cancelTry{j.rec.JobID, j.rec.PromptID, c.waited, together, j.lease})
	t.cancelling.do(t.cancelSome)
}

// cancelTry is one try to take a prompt off the pod.
type cancelTry struct {
	jobID, promptID string
	waits           bool // nothing says that it runs
	together        bool // with others: nothing is known that would hold them up
	lease           *lease
}

// refuses tells whether the pod, or what stands before it, answered a cancel with a no that may be meant for one prompt of many, or for the
// way it was told.
func refuses(err error) bool { return answered(err) && !isRefusal(err) }

// cancelLine has the tries that nobody has begun.
type cancelLine struct {
	mu    sync.Mutex
	tries []cancelTry
}

func (l *cancelLine) add(c cancelTry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tries = append(l.tries, c)
}

// cancelBatch bounds what is deleted by one request: the server goes through its whole queue for each.
const cancelBatch = 64

// take returns the first try, with those behind it that can be made together with it.
func (l *cancelLine) take() []cancelTry {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(1, len(l.tries))
	for n > 0 && n < min(cancelBatch, len(l.tries)) && l.tries[0].together && l.tries[n].together {
		n++
	}
	tries := l.tries[:n:n]
	if l.tries = l.tries[n:]; len(l.tries) == 0 {
		l.tries = nil
	}
	return tries
}

// cancelSome makes the tries that are next. Prompts that wait are taken out of the queue together: one request each would take longer than
// a busy pod takes to come to them.
func (t *tracker) cancelSome(ctx context.Context) func() {
	tries := t.cancels.take()
	var touched bool
	var err error
	switch len(tries) {
	case 0: // another has taken them along
		return nil
	case 1:
		touched, err = t.cancelOnPod(ctx, tries[0])
	default:
		ids := make([]string, 0, len(tries))
		for _, try := range tries {
			ids = append(ids, try.promptID)
		}
		err = t.endpoint.deleteQueued(ctx, func() error {
			for _, try := range tries {
				if err := try.lease.confirm(ctx); err != nil {
					return err
				}
			}
			return nil
		}, ids...)
		touched = err == nil
	}
	return func() {
		for _, try := range tries {
			t.cancelTried(try.jobID, try.promptID, touched, err)
		}
	}
}

const (
	cancelAgain  = time.Second      // the time between two tries
	cancelUnseen = 15 * time.Second // between two where the pod has said that it hit the prompt, and no look has told since
)

// outlived takes in that a look which began at a time has shown the prompt: a hit before then did not do.
func (c *cancelState) outlived(looked time.Time, running bool) {
	if c.hit.IsZero() || looked.Before(c.hit) {
		return
	}
	c.next = c.hit.Add(cancelAgain)
	if running && c.waited {
		c.next = looked
	}
	c.hit = time.Time{}
}

func (t *tracker) cancelTried(jobID, promptID string, touched bool, err error) {
	j, now := t.jobs[jobID], time.Now()
	if j == nil {
		return
	}
	c := &j.cancel
	c.busy = false
	if j.lease == nil || j.concluded {
		return
	}
	if j.rec.PromptID != promptID {
		t.advance(j, now)
		return
	}
	c.touched, c.failure = c.touched || touched, err
	c.next = now.Add(cancelAgain)
	if touched && err == nil { // a look tells: of a thousand cancels none is made twice meanwhile
		c.hit, c.next = now, now.Add(cancelUnseen)
	}
	switch {
	case err == nil:
		t.contact(now)
	case CategoryOf(err) == CategoryConflict && !errors.Is(err, ErrFenced):
		// It cannot be done without hitting another's job: the job goes on.
		j.rec.CancelRequested, c.refused = false, true
		c.until = now
		refused := j.failure(CategoryConflict, err)
		refused.Op = "cancel"
		c.refuse(refused)
	case !errors.Is(err, errUnconfirmed):
		t.noContact(err, now)
	}
	t.lookAfterCancel(now)
	t.advance(j, now)
}

// cancelLookPause bounds the time between two looks after cancels: what shows them must come well before Timing.Cancel ends.
const cancelLookPause = 2 * time.Second

// lookAfterCancel asks for a look that shows what cancels have done, but not for each of many at a large queue.
func (t *tracker) lookAfterCancel(now time.Time) {
	t.lookBy(latest(now, t.pod.lookedAt.Add(min(4*t.pod.cost, cancelLookPause))))
}

func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// cancelOnPod makes one try. touched: the pod has said that it hit the prompt, or was told to take it out of the queue.
func (t *tracker) cancelOnPod(ctx context.Context, try cancelTry) (touched bool, err error) {
	promptID, confirm := try.promptID, func() error { return try.lease.confirm(ctx) }
	supported, cancelled, err := t.endpoint.cancelJob(ctx, promptID, confirm)
	if err == nil && supported || err != nil && !answered(err) {
		return cancelled, err
	}
	// The pod lacks the route, or a proxy keeps it to itself.
	if try.waits { // if it does not, nothing happens, and a look shows it
		err := t.endpoint.deleteQueued(ctx, confirm, promptID)
		return err == nil, err
	}
	r := &reconciler{endpoint: t.endpoint, reads: t.reads, started: time.Now(), wanted: []sought{{promptID: promptID}}}
	r.lookAtQueue(ctx)
	if r.err != nil {
		return false, r.err
	}
	switch r.spots[promptID].place {
	case placePending:
		return true, t.endpoint.deleteQueued(ctx, confirm, promptID)
	case placeRunning:
		return true, t.interruptRunning(ctx, promptID, r.shape, confirm)
	}
	return false, nil
}

// interruptRunning stops the prompt that runs. A pod before 0.3.57 ignores the id and stops whatever runs when the request
// arrives: there it is done only when no other job could be hit.
func (t *tracker) interruptRunning(ctx context.Context, promptID string, shape queueShape, confirm func() error) error {
	targeted, err := t.endpoint.interruptsByID(ctx)
	if err != nil {
		return err
	}
	if !targeted && (shape.pending > 0 || shape.running > 1) {
		return &Error{
			Op: "cancel", Pod: t.opts.name, PromptID: promptID, Category: CategoryConflict,
			Err: errors.New("this pod cannot interrupt one prompt by its id, and others wait in its queue that might be hit; cancel it when they are gone, or update ComfyUI to 0.3.57 or later"),
		}
	}
	return t.endpoint.interrupt(ctx, promptID, confirm)
}

// removeDuplicate takes one pending copy of a prompt out of the queue; a look that began after that shows whether there are more.
func (t *tracker) removeDuplicate(j *tracked, promptID string, looked time.Time) {
	if j.cancel.busy || !looked.After(j.cancel.cleared) {
		return
	}
	j.cancel.busy = true
	id, lease := j.rec.JobID, j.lease
	t.errand.do(func(ctx context.Context) func() {
		err := t.endpoint.deleteQueued(ctx, func() error { return lease.confirm(ctx) }, promptID)
		return func() {
			now := time.Now()
			if err == nil {
				t.counters.duplicatesRemoved.Add(1)
			}
			t.expectCopies(now)
			if j := t.jobs[id]; j != nil {
				j.cancel.busy, j.cancel.cleared = false, now
				if err != nil && !neverSent(err) { // it may still come
					j.cancel.cleared = now.Add(max(0, t.timing.Grace))
				}
				t.advance(j, now)
			}
		}
	})
}

// Cancel takes the job off the pod and returns nil when it has ended, however it did: see Wait. The intent is recorded first,
// so that whoever drives the job honours it. The cancel is verified and issued again until the job has ended or ctx ends
// (CategoryContext, with the last failure, if any: the job may still end as cancelled). CategoryConflict: a pod before ComfyUI
// 0.3.57 runs it and cannot stop it without risk to the jobs of others; the job goes on.
func (j *Job) Cancel(ctx context.Context) error {
	const op = "cancel"
	select {
	case <-j.Done():
		return j.ended(op)
	default:
	}
	t, err := j.client.running(op, j.id)
	if err != nil {
		return err
	}
	if err := t.recordCancel(ctx, j.id); err != nil && !errors.Is(err, ErrJobNotFound) {
		return j.placed(asError(err))
	}
	w := &cancelWaiter{refused: make(chan error, 1)}
	if !t.tell(func() { t.cancelRequested(j.id, w) }) {
		return j.client.closedError(op, j.id)
	}
	select {
	case err := <-w.refused:
		return err
	case <-j.done:
		return j.ended(op)
	case <-ctx.Done():
		e := j.contextError(op, ctx)
		t.tell(func() { e.Err = errors.Join(e.Err, t.dropWaiter(j.id, w)) })
		return e
	}
}

// ended says why nobody has to wait for the job any more: nil when it has ended.
func (j *Job) ended(op string) error {
	if _, err := j.outcome(); errors.Is(err, ErrClosed) {
		return reword(err, op)
	}
	return nil
}

// dropWaiter returns why the job has not been cancelled yet, as far as that is known.
func (t *tracker) dropWaiter(jobID string, w *cancelWaiter) error {
	j := t.jobs[jobID]
	if j == nil {
		return nil
	}
	delete(j.cancel.waiters, w)
	return j.cancel.failure
}

// asError makes err an *Error, with the category that its chain tells; nil stays nil.
func asError(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) && error(e) == err { //nolint:errorlint // only err itself is kept as it is
		return e
	}
	return &Error{Category: CategoryOf(err), Err: err}
}
