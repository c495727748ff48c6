package storetest_test

import (
	"context"
	"errors"
	"iter"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

// broken are stores that each break one promise.
var broken = map[string]func(sound) comfyui.Store{
	"Create overwrites":                    func(s sound) comfyui.Store { return createOverwrites{s} },
	"Create takes a lapsed lease":          func(s sound) comfyui.Store { return createClaims{s} },
	"Update does not fence":                func(s sound) comfyui.Store { return updateUnfenced{s} },
	"Update applies replays":               func(s sound) comfyui.Store { return updateReplays{s} },
	updateGivesNothing:                     func(s sound) comfyui.Store { return updateSilent{s} },
	"Update revives":                       func(s sound) comfyui.Store { return updateRevives{s} },
	"Update returns another Rev":           func(s sound) comfyui.Store { return updateMisreports{s} },
	"Retention is ignored":                 func(s sound) comfyui.Store { return keepsForGood{s} },
	"Claim steals":                         func(s sound) comfyui.Store { return claimSteals{s} },
	"Claim always raises the epoch":        func(s sound) comfyui.Store { return claimRaises{s} },
	"Renew loses nothing":                  func(s sound) comfyui.Store { return renewLosesNothing{s} },
	"Renew does not revive a lapsed lease": func(s sound) comfyui.Store { return renewRunningOnly{s} },
	"Release frees all":                    func(s sound) comfyui.Store { return releaseAll{s} },
	"RequestCancel is forgotten":           func(s sound) comfyui.Store { return cancelForgotten{s} },
	"RequestCancel needs a lease":          func(s sound) comfyui.Store { return cancelHeldOnly{s} },
	"Unfinished repeats":                   func(s sound) comfyui.Store { return walkRepeats{s} },
	"Unfinished ignores the pod":           func(s sound) comfyui.Store { return walkAllPods{s} },
	"Get shares":                           func(s sound) comfyui.Store { return &getShares{sound: s} },
	"Watch skips a state":                  func(s sound) comfyui.Store { return watchSkips{s} },
	"Watch goes on":                        func(s sound) comfyui.Store { return watchGoesOn{s} },
	"Watch buffers all progress":           func(s sound) comfyui.Store { return watchPolls{s} },
}

const (
	brokenEnv          = "STORETEST_BROKEN"
	updateGivesNothing = "Update gives nothing"
)

// The suite fails for each broken store, and for no sound one that is wrapped as they are.
func TestSuiteFindsBrokenStores(t *testing.T) {
	t.Parallel()
	for _, name := range append(slices.Collect(keys(broken)), "") {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestBrokenStore$", "-rapid.nofailfile") //nolint:gosec // this binary
			cmd.Env = append(os.Environ(), brokenEnv+"="+name)
			out, err := cmd.CombinedOutput()
			if name == "" {
				require.NoError(t, err, "%s", out)
				return
			}
			var exit *exec.ExitError
			require.ErrorAs(t, err, &exit, "%s", out)
			assert.Contains(t, string(out), "--- FAIL: TestBrokenStore")
			assert.NotContains(t, string(out), "panic: ", "it says what is wrong")
		})
	}
}

func keys[V any](m map[string]V) iter.Seq[string] {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func TestBrokenStore(t *testing.T) {
	name, ok := os.LookupEnv(brokenEnv)
	if !ok {
		t.Skip("run by TestSuiteFindsBrokenStores")
	}
	store := func(*testing.T) comfyui.Store {
		if name == "" {
			return comfyui.NewMemoryStore()
		}
		return broken[name](sound{comfyui.NewMemoryStore()})
	}
	if name == updateGivesNothing { // as subtests, of which each one fails for itself
		storetest.Run(t, store, nil)
		return
	}
	synctest.Test(t, func(t *testing.T) { storetest.Run(t, store, time.Sleep) })
}

type sound struct{ *comfyui.MemoryStore }

type createOverwrites struct{ sound }

func (s createOverwrites) Create(ctx context.Context, r *comfyui.Record, ttl time.Duration) (*comfyui.Record, error) {
	was, err := s.sound.Create(ctx, r, ttl)
	if err == nil && was.Owner != r.Owner {
		r = r.Clone()
		r.Epoch = was.Epoch + 1
		return s.Update(ctx, r)
	}
	return was, err
}

type createClaims struct{ sound }

func (s createClaims) Create(ctx context.Context, r *comfyui.Record, ttl time.Duration) (*comfyui.Record, error) {
	was, err := s.sound.Create(ctx, r, ttl)
	if err == nil && was.Owner != r.Owner && !was.Progress.Status.Terminal() {
		if claimed, err := s.Claim(ctx, r.JobID, r.Owner, ttl); err == nil {
			return claimed, nil
		}
	}
	return was, err
}

type updateUnfenced struct{ sound }

func (s updateUnfenced) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	if was, err := s.Get(ctx, r.JobID); err == nil {
		r = r.Clone()
		r.Owner, r.Epoch = was.Owner, was.Epoch
	}
	return s.sound.Update(ctx, r)
}

type updateReplays struct{ sound }

func (s updateReplays) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	if was, err := s.Get(ctx, r.JobID); err == nil {
		r = r.Clone()
		r.Rev = was.Rev + 1
	}
	return s.sound.Update(ctx, r)
}

type updateSilent struct{ sound }

func (s updateSilent) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	_, err := s.sound.Update(ctx, r)
	return nil, err
}

type updateRevives struct{ sound }

func (s updateRevives) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	got, err := s.sound.Update(ctx, r)
	if errors.Is(err, comfyui.ErrJobNotFound) {
		return s.Create(ctx, r, time.Minute)
	}
	return got, err
}

type updateMisreports struct{ sound }

func (s updateMisreports) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	got, err := s.sound.Update(ctx, r)
	if err == nil {
		got.Rev = 1
	}
	return got, err
}

type keepsForGood struct{ sound }

func (s keepsForGood) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	r = r.Clone()
	r.Retention *= 1000
	got, err := s.sound.Update(ctx, r)
	if got != nil {
		got.Retention /= 1000
	}
	return got, err
}

func (s keepsForGood) Get(ctx context.Context, id string) (*comfyui.Record, error) {
	got, err := s.sound.Get(ctx, id)
	if got != nil && got.Rev > 1 {
		got.Retention /= 1000
	}
	return got, err
}

type claimSteals struct{ sound }

func (s claimSteals) Claim(ctx context.Context, id, owner string, ttl time.Duration) (*comfyui.Record, error) {
	if was, err := s.Get(ctx, id); err == nil && was.Owner != owner {
		_ = s.Release(ctx, was.Owner, []string{id})
	}
	return s.sound.Claim(ctx, id, owner, ttl)
}

type claimRaises struct{ sound }

func (s claimRaises) Claim(ctx context.Context, id, owner string, ttl time.Duration) (*comfyui.Record, error) {
	_ = s.Release(ctx, owner, []string{id})
	return s.sound.Claim(ctx, id, owner, ttl)
}

type renewLosesNothing struct{ sound }

func (s renewLosesNothing) Renew(ctx context.Context, owner string, ttl time.Duration, ids []string) ([]string, error) {
	_, err := s.sound.Renew(ctx, owner, ttl, ids)
	return nil, err
}

type renewRunningOnly struct{ sound }

func (s renewRunningOnly) Renew(ctx context.Context, owner string, ttl time.Duration, ids []string) ([]string, error) {
	var lost, running []string
	for _, id := range ids {
		if r, err := s.Get(ctx, id); err == nil && time.Now().Before(r.LeaseUntil) {
			running = append(running, id)
		} else {
			lost = append(lost, id)
		}
	}
	more, err := s.sound.Renew(ctx, owner, ttl, running)
	return append(lost, more...), err
}

type releaseAll struct{ sound }

func (s releaseAll) Release(ctx context.Context, owner string, ids []string) error {
	for _, id := range ids {
		if r, err := s.Get(ctx, id); err == nil {
			_ = s.sound.Release(ctx, r.Owner, []string{id})
		}
	}
	return s.sound.Release(ctx, owner, ids)
}

type cancelForgotten struct{ sound }

func (s cancelForgotten) Claim(ctx context.Context, id, owner string, ttl time.Duration) (*comfyui.Record, error) {
	r, err := s.sound.Claim(ctx, id, owner, ttl)
	if err == nil {
		r.CancelRequested = false
	}
	return r, err
}

type cancelHeldOnly struct{ sound }

func (s cancelHeldOnly) RequestCancel(ctx context.Context, id string) (*comfyui.Record, error) {
	if r, err := s.Get(ctx, id); err == nil && !time.Now().Before(r.LeaseUntil) {
		return r, nil
	}
	return s.sound.RequestCancel(ctx, id)
}

type walkRepeats struct{ sound }

func (s walkRepeats) Unfinished(ctx context.Context, pod string) iter.Seq2[*comfyui.Record, error] {
	return func(yield func(*comfyui.Record, error) bool) {
		for r, err := range s.sound.Unfinished(ctx, pod) {
			if !yield(r, err) || err == nil && r.JobID == "stay-007" && !yield(r, err) {
				return
			}
		}
	}
}

type walkAllPods struct{ sound }

func (s walkAllPods) Unfinished(ctx context.Context, _ string) iter.Seq2[*comfyui.Record, error] {
	return s.sound.Unfinished(ctx, "")
}

type getShares struct {
	sound
	last sync.Map
}

func (s *getShares) Get(ctx context.Context, id string) (*comfyui.Record, error) {
	r, err := s.sound.Get(ctx, id)
	if err != nil {
		return r, err
	}
	if last, ok := s.last.Load(id); ok && last.(*comfyui.Record).Rev == r.Rev {
		return last.(*comfyui.Record), nil
	}
	s.last.Store(id, r)
	return r, nil
}

type watchSkips struct{ sound }

func (s watchSkips) Watch(ctx context.Context, id string) iter.Seq2[comfyui.Event, error] {
	return func(yield func(comfyui.Event, error) bool) {
		for e, err := range s.sound.Watch(ctx, id) {
			if e.Kind != comfyui.EventQueued && !yield(e, err) {
				return
			}
		}
	}
}

type watchGoesOn struct{ sound }

func (s watchGoesOn) Watch(ctx context.Context, id string) iter.Seq2[comfyui.Event, error] {
	return func(yield func(comfyui.Event, error) bool) {
		for e, err := range s.sound.Watch(ctx, id) {
			if !yield(e, err) {
				return
			}
		}
		<-ctx.Done()
		yield(comfyui.Event{}, ctx.Err())
	}
}

type watchPolls struct{ sound }

func (s watchPolls) Watch(ctx context.Context, id string) iter.Seq2[comfyui.Event, error] {
	return func(yield func(comfyui.Event, error) bool) {
		for e, err := range s.sound.Watch(ctx, id) {
			for range 30 {
				if !yield(e, err) {
					return
				}
				if e.Kind != comfyui.EventProgress && (e.Kind != comfyui.EventStarted || e.Progress.Fraction != 1) {
					break
				}
			}
		}
	}
}

// plain hides that a store is a Watcher.
type plain struct{ comfyui.Store }

func TestSuiteOfAStoreThatIsNoWatcher(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(*testing.T) comfyui.Store { return plain{comfyui.NewMemoryStore()} }, nil)
}

func TestFlakyThatDoesNotFailConforms(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		storetest.Run(t, func(*testing.T) comfyui.Store {
			return storetest.Flaky(comfyui.NewMemoryStore(), func(context.Context, string) (error, bool) { return nil, false })
		}, time.Sleep)
	})
}

func TestFlaky(t *testing.T) {
	t.Parallel()
	down := errors.New("down")
	for _, after := range []bool{false, true} {
		var fails string // the method that fails
		inner := comfyui.NewMemoryStore()
		s := storetest.Flaky(inner, func(_ context.Context, method string) (error, bool) {
			if method == fails {
				return down, after
			}
			return nil, after
		})
		ctx := t.Context()
		r := &comfyui.Record{JobID: "job", Owner: "a", Rev: 1}

		fails = "Create"
		got, err := s.Create(ctx, r, time.Minute)
		require.ErrorIs(t, err, down)
		assert.Nil(t, got)
		_, err = inner.Get(ctx, "job")
		assert.Equal(t, after, err == nil, "took effect")
		fails = ""
		r, err = s.Create(ctx, r, time.Minute)
		require.NoError(t, err)

		fails = "Update"
		r.Rev = 2
		_, err = s.Update(ctx, r)
		require.ErrorIs(t, err, down)
		r, err = s.Get(ctx, "job")
		require.NoError(t, err)
		assert.Equal(t, after, r.Rev == 2)

		fails = "RequestCancel"
		_, err = s.RequestCancel(ctx, "job")
		require.ErrorIs(t, err, down)
		fails = "Renew"
		_, err = s.Renew(ctx, "a", time.Hour, []string{"job"})
		require.ErrorIs(t, err, down)
		renewed, err := s.Get(ctx, "job")
		require.NoError(t, err)
		assert.Equal(t, after, renewed.CancelRequested)
		assert.Equal(t, after, renewed.LeaseUntil.After(r.LeaseUntil))

		fails = "Release"
		require.ErrorIs(t, s.Release(ctx, "a", []string{"job"}), down)
		r, err = s.Get(ctx, "job")
		require.NoError(t, err)
		assert.Equal(t, after, r.LeaseUntil.IsZero())
		require.NoError(t, inner.Release(ctx, "a", []string{"job"}))
		fails = "Claim"
		_, err = s.Claim(ctx, "job", "b", time.Minute)
		require.ErrorIs(t, err, down)
		r, err = s.Get(ctx, "job")
		require.NoError(t, err)
		assert.Equal(t, after, r.Owner == "b")

		fails = "Get"
		_, err = s.Get(ctx, "job")
		require.ErrorIs(t, err, down)

		fails = "Unfinished"
		var walk []error
		for _, err := range s.Unfinished(ctx, "") {
			walk = append(walk, err)
		}
		fails = "Watch"
		var watch []error
		ctx, cancel := context.WithCancel(ctx)
		for _, err := range s.(comfyui.Watcher).Watch(ctx, "job") {
			watch = append(watch, err)
			cancel()
		}
		cancel()
		if !after {
			assert.Equal(t, []error{down}, walk)
			assert.Equal(t, []error{down}, watch)
		} else {
			assert.Equal(t, []error{nil, down}, walk)
			require.Len(t, watch, 3)
			require.NoError(t, watch[0])
			require.ErrorIs(t, watch[1], context.Canceled)
			assert.Equal(t, down, watch[2])
		}
	}
	_, watcher := storetest.Flaky(plain{comfyui.NewMemoryStore()}, nil).(comfyui.Watcher)
	assert.False(t, watcher)
}
