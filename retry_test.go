package comfyui

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cenkalti/backoff/v4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// told collects what a retrier tells Hooks.Retry.
type told struct {
	mu   sync.Mutex
	list []RetryInfo
}

func (n *told) add(r RetryInfo) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.list = append(n.list, r)
}

func retrierFor(policies map[Category]RetryPolicy) (*retrier, *told, *counters) {
	heard, c := &told{}, &counters{}
	return newRetrier(&options{name: "pod", retry: policies}, c, heard.add), heard, c
}

func failing(c Category) error { return &Error{Op: "try", Category: c, Err: errors.New("no")} }

func TestDefaultRetryPolicies(t *testing.T) {
	t.Parallel()
	attempts := map[Category]int{
		CategoryNetwork: 6, CategoryTimeout: 3, CategoryUnavailable: 8, CategoryOverloaded: 6, CategoryProtocol: 3, CategoryStorage: 3,
		CategoryLost: 2, CategoryOutOfMemory: 2,
	}
	for _, c := range append(categories, "", "new") {
		p := DefaultRetryPolicy(c)
		require.NoError(t, p.validate(), c)
		assert.Equal(t, max(attempts[c], 1), p.MaxAttempts, "%s", c)
		if attempts[c] == 0 {
			_, ok := p.wait(1, 0, 0)
			assert.False(t, ok, c)
		}
		// Raised by hand, no policy hammers the pod.
		p.MaxAttempts = 5
		wait, ok := p.wait(1, 0, 0)
		assert.True(t, ok, c)
		assert.GreaterOrEqual(t, wait, 100*time.Millisecond, c)
	}
}

func TestZeroPolicyNeverRetries(t *testing.T) {
	t.Parallel()
	for _, p := range []RetryPolicy{{}, {MaxAttempts: 1}} {
		_, ok := p.wait(1, 0, time.Hour)
		assert.False(t, ok)
	}
}

func TestPolicyWaits(t *testing.T) {
	t.Parallel()
	p := RetryPolicy{MaxAttempts: 8, InitialInterval: time.Second, MaxInterval: 10 * time.Second, Multiplier: 2}
	for try, want := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 3: 4 * time.Second, 4: 8 * time.Second, 5: 10 * time.Second, 7: 10 * time.Second} {
		wait, ok := p.wait(try, 0, 0)
		assert.True(t, ok)
		assert.Equal(t, want, wait, "try %d", try)
	}
	_, ok := p.wait(8, 0, 0)
	assert.False(t, ok, "MaxAttempts counts the first try")
	_, ok = p.wait(0, 0, 0)
	assert.False(t, ok)

	wait, ok := p.wait(1, 0, 7*time.Second)
	assert.True(t, ok)
	assert.Equal(t, 7*time.Second, wait, "Retry-After is waited for")
	wait, _ = p.wait(1, 0, time.Hour)
	assert.Equal(t, 2*time.Minute, wait, "and capped")
	wait, _ = p.wait(4, 0, time.Second)
	assert.Equal(t, 8*time.Second, wait, "and never shortens the policy's wait")

	p.MaxElapsed = 10 * time.Second
	_, ok = p.wait(3, 6*time.Second, 0)
	assert.True(t, ok)
	_, ok = p.wait(3, 7*time.Second, 0)
	assert.False(t, ok)

	zero, ok := RetryPolicy{MaxAttempts: 2}.wait(1, 0, 0)
	assert.True(t, ok)
	assert.Equal(t, 500*time.Millisecond, zero)
}

func TestPolicyWaitProperty(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		initial := time.Duration(rapid.Int64Range(1, int64(time.Hour)).Draw(t, "initial"))
		p := RetryPolicy{
			MaxAttempts:     rapid.IntRange(2, 1<<20).Draw(t, "attempts"),
			InitialInterval: initial,
			MaxInterval:     initial + time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "more")),
			Multiplier:      rapid.Float64Range(1, 1e6).Draw(t, "multiplier"),
			Jitter:          rapid.Float64Range(0, 1).Draw(t, "jitter"),
		}
		require.NoError(t, p.validate())
		try := rapid.IntRange(1, p.MaxAttempts-1).Draw(t, "try")
		wait, ok := p.wait(try, 0, 0)
		require.True(t, ok)
		require.GreaterOrEqual(t, wait, time.Duration(0))
		require.LessOrEqual(t, wait, p.MaxInterval+1, "MaxInterval bounds the wait, jitter and all")
	})
}

func TestPolicyValidation(t *testing.T) {
	t.Parallel()
	for name, p := range map[string]RetryPolicy{
		"MaxAttempts":  {MaxAttempts: -1},
		"negative":     {InitialInterval: -1},
		"negative max": {MaxInterval: -1},
		"elapsed":      {MaxElapsed: -1},
		"below":        {InitialInterval: 2, MaxInterval: 1},
		"shrinks":      {Multiplier: 0.5},
		"NaN":          {Multiplier: math.NaN()},
		"infinite":     {Multiplier: math.Inf(1)},
		"jitter":       {Jitter: 1.5},
		"jitter below": {Jitter: -0.5},
		"jitter NaN":   {Jitter: math.NaN()},
	} {
		require.Error(t, p.validate(), name)
		err := validateRetries(map[Category]RetryPolicy{CategoryLost: p, CategoryAuth: {}})
		require.ErrorContains(t, err, `the retry policy for "lost"`, name)
	}
	require.NoError(t, validateRetries(map[Category]RetryPolicy{CategoryLost: {}, CategoryNetwork: {MaxAttempts: 3}}))
}

func TestRetrierRepeatsByCategory(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		policy := RetryPolicy{MaxAttempts: 4, InitialInterval: time.Second, MaxInterval: time.Minute, Multiplier: 2}
		r, heard, c := retrierFor(map[Category]RetryPolicy{CategoryNetwork: policy})
		start := time.Now()
		tries := []int{}
		err := r.do(t.Context(), retryOp{op: "op", jobID: "j"}, func(_ context.Context, try int) error {
			tries = append(tries, try)
			return failing(CategoryNetwork)
		})
		assert.Equal(t, CategoryNetwork, CategoryOf(err))
		assert.Equal(t, []int{1, 2, 3, 4}, tries)
		assert.Equal(t, 7*time.Second, time.Since(start))
		require.Len(t, heard.list, 3)
		assert.Equal(t, "pod", heard.list[0].Pod)
		assert.Equal(t, "op", heard.list[0].Op)
		assert.Equal(t, "j", heard.list[0].JobID)
		assert.False(t, heard.list[0].NewAttempt)
		for i, info := range heard.list {
			assert.Equal(t, i+1, info.Try)
			assert.Equal(t, time.Second<<i, info.Wait)
			require.Error(t, info.Err)
		}
		assert.EqualValues(t, 3, c.retries.Load())

		start = time.Now()
		err = r.do(t.Context(), retryOp{}, func(_ context.Context, try int) error {
			if try < 3 {
				return failing(CategoryNetwork)
			}
			return nil
		})
		require.NoError(t, err)
		assert.Equal(t, 3*time.Second, time.Since(start))

		for _, c := range []Category{CategoryValidation, CategoryAuth, CategoryExecution, CategoryContext, CategoryClosed, CategoryUnknown} {
			n := 0
			err = r.do(t.Context(), retryOp{}, func(context.Context, int) error { n++; return failing(c) })
			assert.Equal(t, c, CategoryOf(err))
			assert.Equal(t, 1, n, c)
		}

		n := 0
		err = r.do(t.Context(), retryOp{safe: func(error) bool { return false }}, func(context.Context, int) error { n++; return failing(CategoryNetwork) })
		require.Error(t, err)
		assert.Equal(t, 1, n, "not safe to repeat")

		n = 0
		err = r.do(t.Context(), retryOp{fixed: &RetryPolicy{MaxAttempts: 2}}, func(context.Context, int) error { n++; return failing(CategoryValidation) })
		require.Error(t, err)
		assert.Equal(t, 2, n, "a fixed policy asks for no category")

		n = 0
		err = r.do(t.Context(), retryOp{}, func(context.Context, int) error {
			n++
			return &Error{Category: CategoryStorage, Err: ErrSchema}
		})
		require.ErrorIs(t, err, ErrSchema)
		assert.Equal(t, 1, n, "a newer schema stays newer")
	})
}

// The category of each failure decides anew.
func TestRetrierChangesPolicyWithTheFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, _ := retrierFor(map[Category]RetryPolicy{
			CategoryNetwork:     {MaxAttempts: 10, InitialInterval: time.Second, Multiplier: 1},
			CategoryUnavailable: {MaxAttempts: 3, InitialInterval: time.Minute, MaxInterval: time.Minute, Multiplier: 1},
		})
		start := time.Now()
		err := r.do(t.Context(), retryOp{}, func(_ context.Context, try int) error {
			if try == 2 {
				return failing(CategoryUnavailable)
			}
			if try == 5 {
				return failing(CategoryAuth)
			}
			return failing(CategoryNetwork)
		})
		assert.Equal(t, CategoryAuth, CategoryOf(err))
		assert.Equal(t, 63*time.Second, time.Since(start))
	})
}

func TestRetrierHonoursRetryAfter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, _ := retrierFor(nil)
		start := time.Now()
		err := r.do(t.Context(), retryOp{}, func(_ context.Context, try int) error {
			if try == 1 {
				return fmt.Errorf("wrapped: %w", &Error{Category: CategoryOverloaded, RetryAfter: 45 * time.Second})
			}
			return nil
		})
		require.NoError(t, err)
		assert.Equal(t, 45*time.Second, time.Since(start))
	})
}

func TestRetrierEndsWithContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, _ := retrierFor(nil)
		why := errors.New("the caller's reason")

		// During a wait.
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(700*time.Millisecond, func() { cancel(why) })
		err := r.do(ctx, retryOp{op: "op", jobID: "j"}, func(context.Context, int) error { return failing(CategoryUnavailable) })
		var e *Error
		require.ErrorAs(t, err, &e)
		assert.Equal(t, CategoryContext, e.Category)
		assert.Equal(t, "j", e.JobID)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, why)
		require.ErrorContains(t, err, "no", "the last cause is kept")

		// During the second try, which says only that ctx ended.
		ctx2, cancel2 := context.WithTimeout(t.Context(), time.Minute)
		defer cancel2()
		err = r.do(ctx2, retryOp{op: "op"}, func(ctx context.Context, try int) error {
			if try == 1 {
				return failing(CategoryNetwork)
			}
			<-ctx.Done()
			return &Error{Op: "op", Category: CategoryContext, Err: ctx.Err()}
		})
		require.ErrorAs(t, err, &e)
		assert.Equal(t, CategoryContext, e.Category)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "network: no")

		// Before the first try.
		ctx3, cancel3 := context.WithCancel(t.Context())
		cancel3()
		err = r.do(ctx3, retryOp{}, func(ctx context.Context, _ int) error { return &Error{Category: CategoryContext, Err: ctx.Err()} })
		assert.Equal(t, CategoryContext, CategoryOf(err))

		// A final failure stays what it is, whatever ctx does meanwhile.
		ctx4, cancel4 := context.WithCancel(t.Context())
		err = r.do(ctx4, retryOp{}, func(context.Context, int) error { cancel4(); return failing(CategoryValidation) })
		assert.Equal(t, CategoryValidation, CategoryOf(err))

		// The client was closed.
		ctx5, cancel5 := context.WithCancelCause(t.Context())
		time.AfterFunc(700*time.Millisecond, func() { cancel5(ErrClosed) })
		err = r.do(ctx5, retryOp{}, func(context.Context, int) error { return failing(CategoryUnavailable) })
		assert.Equal(t, CategoryClosed, CategoryOf(err))
		require.ErrorIs(t, err, ErrClosed)
		require.NotErrorIs(t, err, context.Canceled)
	})
}

// A failure that wraps backoff's own error, wherever it comes from, neither ends the loop nor loses its wrapping.
func TestRetrierHidesBackoff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, _ := retrierFor(nil)
		n := 0
		err := r.do(t.Context(), retryOp{}, func(context.Context, int) error {
			n++
			return &Error{Op: "outer", Category: CategoryProtocol, Err: backoff.Permanent(errors.New("inner"))}
		})
		assert.Equal(t, 3, n)
		require.EqualError(t, err, "comfyui: outer: protocol: inner")
	})
}

func TestRetrierNext(t *testing.T) {
	t.Parallel()
	r, heard, c := retrierFor(map[Category]RetryPolicy{CategoryLost: {MaxAttempts: 3, InitialInterval: time.Second, Multiplier: 3}})
	wait, ok := r.next(ErrJobLost, 1, 0)
	assert.True(t, ok)
	assert.Equal(t, time.Second, wait)
	wait, ok = r.next(ErrJobLost, 2, time.Hour)
	assert.True(t, ok)
	assert.Equal(t, 3*time.Second, wait)
	_, ok = r.next(ErrJobLost, 3, 0)
	assert.False(t, ok)
	_, ok = r.next(&ExecutionError{ExceptionType: "ValueError"}, 1, 0)
	assert.False(t, ok)
	_, ok = r.next(&ExecutionError{ExceptionType: "torch.OutOfMemoryError"}, 1, 0)
	assert.True(t, ok)
	assert.Empty(t, heard.list)
	assert.Zero(t, c.retries.Load())
}

// Ten thousand callers of a dead pod: the retries come a few a second, and nobody waits for ever.
func TestRetryBudgetStopsStorms(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, c := retrierFor(map[Category]RetryPolicy{CategoryNetwork: {MaxAttempts: 6, InitialInterval: time.Second, MaxInterval: 10 * time.Second, Multiplier: 2}})
		var mu sync.Mutex
		retriesAt := map[int]int{} // by second
		start := time.Now()
		var all sync.WaitGroup
		for range 10_000 {
			all.Go(func() {
				err := r.do(t.Context(), retryOp{}, func(_ context.Context, try int) error {
					if try > 1 {
						mu.Lock()
						retriesAt[int(time.Since(start).Seconds())]++
						mu.Unlock()
					}
					return failing(CategoryNetwork)
				})
				if CategoryOf(err) != CategoryNetwork {
					t.Errorf("the last failure is what the caller gets: %v", err)
				}
			})
		}
		all.Wait()
		total := 0
		for second, n := range retriesAt { // the burst, and what its first wait has earned
			total += n
			assert.LessOrEqual(t, n, int(retryBurst+2*retryRate), "second %d", second)
		}
		assert.Less(t, time.Since(start), 10*time.Minute)
		assert.Less(t, total, 1000)
		assert.Greater(t, total, 100)
		assert.EqualValues(t, total, c.retries.Load())
	})
}

func TestRetryBudgetRefills(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newRetryBudget()
		for range 30 {
			wait, ok := b.take()
			require.True(t, ok)
			require.Zero(t, wait)
		}
		wait, ok := b.take()
		assert.True(t, ok)
		assert.InDelta(t, float64(time.Second)/3, float64(wait), 1e6, "the next waits for its token")
		b.putBack()
		for range 5 {
			b.succeeded()
		}
		wait, ok = b.take()
		assert.True(t, ok)
		assert.Zero(t, wait, "five successes are worth a retry")
		waiting := 0
		for {
			wait, ok = b.take()
			if !ok {
				break
			}
			waiting++
			require.LessOrEqual(t, wait, retryQueue)
		}
		assert.InDelta(t, 90, waiting, 1)
		time.Sleep(time.Hour)
		for range 30 {
			wait, ok = b.take()
			require.True(t, ok)
			require.Zero(t, wait)
		}
		wait, _ = b.take()
		assert.Positive(t, wait, "a full bucket is no fuller after an hour")
	})
}
