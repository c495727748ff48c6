package storetest

import (
	"context"
	"iter"
	"time"

	"github.com/comfypod/comfyui"
)

// Flaky wraps a store for tests of code above it. Before each call it asks fail, with the name of the method ("Create", "Get",
// "Update", "Claim", "Renew", "Release", "RequestCancel", "Unfinished", "Watch"). The error that fail returns is the call's: in
// place of the call (after false), as when a store is down, or after the call took effect (after true), as when a reply is lost.
// With a nil error the call goes through. Of Unfinished and Watch the error is the only element, or comes after the others.
//
// fail is called by whoever calls the store, from many goroutines at once. The result is a comfyui.Watcher if s is.
func Flaky(s comfyui.Store, fail func(ctx context.Context, method string) (err error, after bool)) comfyui.Store {
	f := flaky{store: s, fail: fail}
	if w, ok := s.(comfyui.Watcher); ok {
		return flakyWatcher{flaky: f, watcher: w}
	}
	return f
}

type flaky struct {
	store comfyui.Store
	fail  func(ctx context.Context, method string) (err error, after bool)
}

type flakyWatcher struct {
	flaky
	watcher comfyui.Watcher
}

func (f flaky) Create(ctx context.Context, r *comfyui.Record, ttl time.Duration) (*comfyui.Record, error) {
	return spoil(ctx, f, "Create", func() (*comfyui.Record, error) { return f.store.Create(ctx, r, ttl) })
}

func (f flaky) Get(ctx context.Context, jobID string) (*comfyui.Record, error) {
	return spoil(ctx, f, "Get", func() (*comfyui.Record, error) { return f.store.Get(ctx, jobID) })
}

func (f flaky) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	return spoil(ctx, f, "Update", func() (*comfyui.Record, error) { return f.store.Update(ctx, r) })
}

func (f flaky) Claim(ctx context.Context, jobID, owner string, ttl time.Duration) (*comfyui.Record, error) {
	return spoil(ctx, f, "Claim", func() (*comfyui.Record, error) { return f.store.Claim(ctx, jobID, owner, ttl) })
}

func (f flaky) Renew(ctx context.Context, owner string, ttl time.Duration, jobIDs []string) ([]string, error) {
	return spoil(ctx, f, "Renew", func() ([]string, error) { return f.store.Renew(ctx, owner, ttl, jobIDs) })
}

func (f flaky) Release(ctx context.Context, owner string, jobIDs []string) error {
	_, err := spoil(ctx, f, "Release", func() (struct{}, error) { return struct{}{}, f.store.Release(ctx, owner, jobIDs) })
	return err
}

func (f flaky) RequestCancel(ctx context.Context, jobID string) (*comfyui.Record, error) {
	return spoil(ctx, f, "RequestCancel", func() (*comfyui.Record, error) { return f.store.RequestCancel(ctx, jobID) })
}

func (f flaky) Unfinished(ctx context.Context, pod string) iter.Seq2[*comfyui.Record, error] {
	return spoilSeq(ctx, f, "Unfinished", f.store.Unfinished(ctx, pod))
}

func (f flakyWatcher) Watch(ctx context.Context, jobID string) iter.Seq2[comfyui.Event, error] {
	return spoilSeq(ctx, f.flaky, "Watch", f.watcher.Watch(ctx, jobID))
}

// spoil replaces the result of call by the error that the test asked for.
func spoil[T any](ctx context.Context, f flaky, method string, call func() (T, error)) (T, error) {
	err, after := f.fail(ctx, method)
	if err == nil {
		return call()
	}
	if after {
		_, _ = call() // it takes effect, and its result is what gets lost
	}
	var none T
	return none, err
}

func spoilSeq[T any](ctx context.Context, f flaky, method string, seq iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		err, after := f.fail(ctx, method)
		if err != nil && !after {
			yield(none, err)
			return
		}
		for v, e := range seq {
			if !yield(v, e) {
				return
			}
		}
		if err != nil {
			yield(none, err)
		}
	}
}
