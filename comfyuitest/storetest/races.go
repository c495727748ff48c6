package storetest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/comfypod/comfyui"
)

const racers = 16

var raceCases = []testCase{
	{"Race/of Creates has one owner", func(f *fixture) {
		for round := range 10 {
			id := fmt.Sprint("job-", round)
			var owners sync.Map
			f.race(func(i int) {
				owner := fmt.Sprint("owner-", i)
				r, err := f.store.Create(f.ctx, newRecord(id, owner), long)
				if perform(f, err) {
					owners.Store(r.Owner, true)
				}
			})
			n := 0
			owners.Range(func(any, any) bool { n++; return true })
			if n != 1 {
				f.Fatalf("%d owners, want 1", n)
			}
		}
	}},
	{"Race/of Claims has one winner and one epoch", func(f *fixture) {
		for round := range 10 {
			id := fmt.Sprint("job-", round)
			f.create(id, "former", long)
			f.must(f.store.Release(f.ctx, "former", []string{id}))
			var won atomic.Int32
			f.race(func(i int) {
				owner := fmt.Sprint("owner-", i)
				r, err := f.store.Claim(f.ctx, id, owner, long)
				switch {
				case err == nil && r.Owner == owner && r.Epoch == 2:
					won.Add(1)
				case !errors.Is(err, comfyui.ErrJobHeld):
					f.Errorf("claim: %+v, %v", r, err)
				}
			})
			if n := won.Load(); n != 1 {
				f.Fatalf("%d winners, want 1", n)
			}
		}
	}},
	{"Race/of Updates by one owner leaves the newest", func(f *fixture) {
		r := f.create("job", "a", long)
		f.race(func(i int) {
			for n := range 20 {
				late := r.Clone()
				late.Rev = int64(n*racers+i) + 2
				late.Progress.Step = float64(late.Rev)
				_, err := f.store.Update(f.ctx, late)
				perform(f, err)
			}
		})
		got := f.get("job")
		if want := int64(20*racers) + 1; got.Rev != want || got.Progress.Step != float64(want) {
			f.Fatalf("rev %d with step %v, want %d", got.Rev, got.Progress.Step, want)
		}
	}},
	{"Race/of owners that fence one another loses no epoch", func(f *fixture) {
		f.create("job", "first", 0)
		var epochs sync.Map
		f.race(func(i int) {
			owner := fmt.Sprint("owner-", i)
			for range 10 {
				r, err := f.store.Claim(f.ctx, "job", owner, long)
				if errors.Is(err, comfyui.ErrJobHeld) {
					continue
				}
				if !perform(f, err) {
					return
				}
				if other, taken := epochs.LoadOrStore(r.Epoch, owner); taken && other != owner {
					f.Errorf("epoch %d is %s's and %s's", r.Epoch, other, owner)
				}
				_, err = f.store.Update(f.ctx, next(r, nil))
				perform(f, err)
				perform(f, f.store.Release(f.ctx, owner, []string{"job"}))
			}
		})
	}},
	{"Race/of an end with cancels, renewals and walks", func(f *fixture) {
		for round := range 10 {
			id := fmt.Sprint("job-", round)
			r := f.create(id, "a", long)
			f.race(func(i int) {
				switch i % 4 {
				case 0:
					got, err := f.store.Update(f.ctx, next(r, withStatus(comfyui.StatusSucceeded)))
					if perform(f, err) && got.Progress.Status != comfyui.StatusSucceeded {
						f.Errorf("status %q after the end", got.Progress.Status)
					}
				case 1:
					_, err := f.store.RequestCancel(f.ctx, id)
					perform(f, err)
				case 2:
					_, err := f.store.Renew(f.ctx, "a", long, []string{id})
					perform(f, err)
				case 3:
					for _, err := range f.store.Unfinished(f.ctx, "") {
						perform(f, err)
					}
				}
			})
			got := f.get(id)
			if got.Progress.Status != comfyui.StatusSucceeded || !got.LeaseUntil.IsZero() {
				f.Fatalf("status %q, lease until %v", got.Progress.Status, got.LeaseUntil)
			}
		}
		f.wantIDs(f.unfinished(""))
	}},
}

// race runs do on many goroutines at once and waits for them.
func (f *fixture) race(do func(i int)) {
	var all sync.WaitGroup
	start := make(chan struct{})
	for i := range racers {
		all.Go(func() {
			<-start
			do(i)
		})
	}
	close(start)
	all.Wait()
}
