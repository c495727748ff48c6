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

	"github.com/cenkalti/backoff/v4"
)

// RetryPolicy says how often, and after which waits, something is tried again. It is chosen by the category of the failure.
//
// MaxAttempts counts the first try; 0 and 1 mean no retry, so the zero policy never retries. The wait after try n is
// InitialInterval × Multiplier^(n−1), at most MaxInterval, spread at random by ±Jitter (0 to 1), and never less than a
// Retry-After of the pod (up to two minutes of it). MaxElapsed bounds the time from the first try to the end of the last wait;
// 0: no bound but ctx. A zero InitialInterval, MaxInterval or Multiplier stands for 500ms, 30s and 2.
//
// Policies apply to calls (network, timeout, unavailable, overloaded, protocol, storage) and to new attempts of a job (lost: 2
// in all; out_of_memory: 2, after /free; pod_fault, interrupted, execution, missing_asset: 1).
type RetryPolicy struct {
	MaxAttempts                              int
	InitialInterval, MaxInterval, MaxElapsed time.Duration
	Multiplier, Jitter                       float64
}

// DefaultRetryPolicy returns what applies to a category without WithRetry. Those that never retry have MaxAttempts 1 and the
// waits that apply once it is raised.
func DefaultRetryPolicy(c Category) RetryPolicy {
	p := RetryPolicy{MaxAttempts: 1, InitialInterval: time.Second, MaxInterval: 30 * time.Second, Multiplier: 2, Jitter: 0.5}
	switch c {
	case CategoryNetwork: // a restart of a process behind a live host takes some ten seconds
		p.MaxAttempts, p.InitialInterval, p.MaxInterval, p.MaxElapsed = 6, 500*time.Millisecond, 10*time.Second, time.Minute
	case CategoryTimeout: // each try has taken its whole time already
		p.MaxAttempts, p.MaxInterval, p.MaxElapsed = 3, 10*time.Second, 3*time.Minute
	case CategoryUnavailable: // a pod that starts behind its proxy
		p.MaxAttempts, p.MaxInterval, p.MaxElapsed = 8, 15*time.Second, 2*time.Minute
	case CategoryOverloaded: // as a rule with a Retry-After
		p.MaxAttempts, p.InitialInterval, p.MaxElapsed = 6, 2*time.Second, 5*time.Minute
	case CategoryProtocol: // half an answer, a page of a proxy that is being deployed; seldom better the third time
		p.MaxAttempts, p.InitialInterval, p.MaxInterval, p.MaxElapsed = 3, 500*time.Millisecond, 5*time.Second, 30*time.Second
	case CategoryStorage: // a failover; the caller of Submit waits for it
		p.MaxAttempts, p.InitialInterval, p.MaxInterval, p.MaxElapsed = 3, 200*time.Millisecond, 2*time.Second, 15*time.Second
	case CategoryLost: // once: a workflow that kills the pod must not kill it for ever
		p.MaxAttempts = 2
	case CategoryOutOfMemory: // once: /free has helped by then, or nothing does
		p.MaxAttempts, p.InitialInterval = 2, 2*time.Second
	case CategoryPodFault, CategoryInterrupted, CategoryExecution, CategoryMissingAsset:
	default:
		return RetryPolicy{MaxAttempts: 1}
	}
	return p
}

// validate says what is wrong with a policy.
func (p RetryPolicy) validate() error {
	switch {
	case p.MaxAttempts < 0:
		return fmt.Errorf("its MaxAttempts is %d; 0 and 1 mean no retry", p.MaxAttempts)
	case p.InitialInterval < 0 || p.MaxInterval < 0 || p.MaxElapsed < 0:
		return errors.New("a duration is negative")
	case p.MaxInterval > 0 && p.MaxInterval < p.InitialInterval:
		return fmt.Errorf("its MaxInterval %s is below its InitialInterval %s", p.MaxInterval, p.InitialInterval)
	case p.Multiplier != 0 && !(p.Multiplier >= 1) || math.IsInf(p.Multiplier, 0):
		return fmt.Errorf("its Multiplier is %v; it must be 1 or more, or 0 for 2", p.Multiplier)
	case !(p.Jitter >= 0 && p.Jitter <= 1):
		return fmt.Errorf("its Jitter is %v; it must be between 0 and 1", p.Jitter)
	}
	return nil
}

// validateRetries checks what WithRetry was given.
func validateRetries(policies map[Category]RetryPolicy) error {
	var faults []error
	for c, p := range policies {
		if err := p.validate(); err != nil {
			faults = append(faults, fmt.Errorf("the retry policy for %q is invalid: %w", c, err))
		}
	}
	slices.SortFunc(faults, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(faults...)
}

// wait is the time between try (from 1) and the next; false: there is no next.
func (p RetryPolicy) wait(try int, elapsed, retryAfter time.Duration) (time.Duration, bool) {
	if try < 1 || try >= p.MaxAttempts {
		return 0, false
	}
	if p.InitialInterval == 0 {
		p.InitialInterval = 500 * time.Millisecond
	}
	if p.MaxInterval == 0 {
		p.MaxInterval = max(30*time.Second, p.InitialInterval)
	}
	if p.Multiplier == 0 {
		p.Multiplier = 2
	}
	// backoff bounds the interval before the jitter; here MaxInterval bounds the wait.
	most := float64(p.MaxInterval) / (1 + p.Jitter)
	interval := min(float64(p.InitialInterval)*math.Pow(p.Multiplier, float64(try-1)), most)
	b := backoff.NewExponentialBackOff(
		backoff.WithInitialInterval(time.Duration(interval)),
		backoff.WithRandomizationFactor(p.Jitter),
		backoff.WithMaxElapsedTime(0),
	)
	wait := max(b.NextBackOff(), min(retryAfter, maxHonouredRetryAfter))
	if p.MaxElapsed > 0 && elapsed+wait > p.MaxElapsed {
		return 0, false
	}
	return wait, true
}

// maxHonouredRetryAfter caps a pod's Retry-After.
const maxHonouredRetryAfter = 2 * time.Minute

// retrier repeats what its error's category allows, honours Retry-After, keeps within a budget per pod against retry storms, and
// tells Hooks.Retry before every wait. It is the only retry loop of the package and safe for concurrent use.
type retrier struct {
	pod      string
	policies map[Category]RetryPolicy // from WithRetry; the others are the defaults
	counters *counters
	notify   func(RetryInfo) // nil: nobody asks
	budget   *retryBudget
}

func newRetrier(o *options, c *counters, notify func(RetryInfo)) *retrier {
	return &retrier{pod: o.name, policies: o.retry, counters: c, notify: notify, budget: newRetryBudget()}
}

// retryOp is what is tried.
type retryOp struct {
	op, jobID string
	safe      func(error) bool // whether it may be repeated after this error; nil: any
	fixed     *RetryPolicy     // nil: by the category of each error
	patient   bool             // waits by profession: outside the budget
}

// do tries until there is no error, or one that is not repeated, which it returns as it is. When ctx ends first the error has
// category context (closed, if that is what ended ctx) and holds both ctx's error and the last failure.
func (r *retrier) do(ctx context.Context, what retryOp, try func(ctx context.Context, try int) error) error {
	s := &retrySchedule{ctx: ctx, retrier: r, what: what, start: time.Now()}
	err := backoff.RetryNotify(func() error {
		s.try++
		err := try(ctx, s.try)
		if err == nil {
			r.budget.succeeded()
			return nil
		}
		s.failed(err)
		return errTry
	}, s, func(_ error, wait time.Duration) {
		r.counters.retries.Add(1)
		if r.notify != nil {
			r.notify(RetryInfo{Pod: r.pod, Op: what.op, JobID: what.jobID, Try: s.try, Wait: wait, Err: s.last})
		}
	})
	switch {
	case err == nil:
		return nil
	case s.again && ctx.Err() != nil:
		return r.ended(ctx, what, s.last)
	}
	return s.last
}

// errTry is all that backoff sees of a failed try: an error that wraps backoff's own type, wherever it came from, would end
// the loop and lose its wrapping.
var errTry = errors.New("try failed")

// retrySchedule is the backoff.BackOffContext of one do.
type retrySchedule struct {
	ctx     context.Context
	retrier *retrier
	what    retryOp
	start   time.Time
	try     int
	last    error // the last failure that says more than that ctx ended
	again   bool  // only ctx stood, or stands, in the way of another try
}

func (s *retrySchedule) Reset()                   {}
func (s *retrySchedule) Context() context.Context { return s.ctx }

func (s *retrySchedule) failed(err error) {
	s.again = s.ctx.Err() != nil && isEnd(err)
	if !s.again || s.last == nil {
		s.last = err
	}
}

func (s *retrySchedule) NextBackOff() time.Duration {
	if s.again || s.what.safe != nil && !s.what.safe(s.last) {
		return backoff.Stop
	}
	policy := s.retrier.policy(s.last)
	if s.what.fixed != nil {
		policy = *s.what.fixed
	}
	elapsed := time.Since(s.start)
	wait, ok := policy.wait(s.try, elapsed, retryAfterOf(s.last))
	if !ok {
		return backoff.Stop
	}
	if s.ctx.Err() != nil {
		s.again = true
		return backoff.Stop
	}
	if s.what.patient {
		s.again = true
		return wait
	}
	ready, ok := s.retrier.budget.take()
	if !ok {
		return backoff.Stop
	}
	wait = max(wait, ready)
	if policy.MaxElapsed > 0 && elapsed+wait > policy.MaxElapsed {
		s.retrier.budget.putBack()
		return backoff.Stop
	}
	s.again = true
	return wait
}

// attempts is how often a job is tried for a category.
func (r *retrier) attempts(c Category) int {
	if p, ok := r.policies[c]; ok {
		return max(1, p.MaxAttempts)
	}
	return DefaultRetryPolicy(c).MaxAttempts
}

// policy is that of the error's category. A record of a newer schema is of category storage and the same the next time.
func (r *retrier) policy(err error) RetryPolicy {
	if errors.Is(err, ErrSchema) {
		return RetryPolicy{}
	}
	c := CategoryOf(err)
	if p, ok := r.policies[c]; ok {
		return p
	}
	return DefaultRetryPolicy(c)
}

// next is the wait between try and the one after it under the policy for err; false: none is left. elapsed is the time since the
// first try began. Pure but for the jitter.
func (r *retrier) next(err error, try int, elapsed time.Duration) (wait time.Duration, ok bool) {
	return r.policy(err).wait(try, elapsed, retryAfterOf(err))
}

func retryAfterOf(err error) time.Duration {
	var e *Error
	if errors.As(err, &e) {
		return e.RetryAfter
	}
	return 0
}

// ended is the error of a call that ctx ended.
func (r *retrier) ended(ctx context.Context, what retryOp, last error) *Error {
	end := endOf(ctx)
	e := &Error{Op: what.op, Pod: r.pod, JobID: what.jobID, Category: CategoryContext, Err: end}
	if errors.Is(end, ErrClosed) {
		e.Category = CategoryClosed
	}
	if last != nil && !isEnd(last) {
		e.Err = errors.Join(end, last)
	}
	return e
}

// endOf is why a ctx ended: its error, and its cause when that is another.
func endOf(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, ErrClosed) {
		return ErrClosed
	}
	if errors.Is(cause, err) {
		return cause
	}
	return errors.Join(err, cause)
}

// isEnd tells whether an error says no more than that a ctx or the client ended.
func isEnd(err error) bool {
	c := CategoryOf(err)
	return c == CategoryContext || c == CategoryClosed
}

// retryBudget keeps the retries of all calls of a client within what a pod in trouble can bear: a token bucket. Each retry takes a
// token; time and successes put them back. When it is empty a retry waits for the token that is to come, in turn; when too many
// wait already it is refused, and its call fails with the error that it has.
//
// So ten thousand callers of a dead pod make retryBurst retries at once, retryRate a second from then on, and those that would have
// to wait longer than retryQueue fail at once, instead of all coming back together with the pod.
type retryBudget struct {
	mu     sync.Mutex
	tokens float64 // negative: so many wait for theirs
	at     time.Time
}

const (
	retryBurst  = 30.0             // tokens of a full bucket
	retryRate   = 3.0              // tokens a second
	retryReward = 0.2              // tokens for a success
	retryQueue  = 30 * time.Second // the longest wait for a token
)

func newRetryBudget() *retryBudget { return &retryBudget{tokens: retryBurst} }

// take reserves a token; it is there after the wait. false: too many are waiting.
func (b *retryBudget) take() (time.Duration, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if !b.at.IsZero() {
		b.tokens = min(b.tokens+now.Sub(b.at).Seconds()*retryRate, retryBurst)
	}
	b.at = now
	wait := time.Duration(max(1-b.tokens, 0) / retryRate * float64(time.Second))
	if wait > retryQueue {
		return 0, false
	}
	b.tokens--
	return wait, true
}

func (b *retryBudget) putBack()   { b.add(1) }
func (b *retryBudget) succeeded() { b.add(retryReward) }

func (b *retryBudget) add(tokens float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tokens = min(b.tokens+tokens, retryBurst)
}
