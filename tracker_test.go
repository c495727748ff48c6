package comfyui

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

// A crew is never larger than its limit, does all that it is given in order, and is gone a moment after.
func TestCrew(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		pause time.Duration // before each task is given
	}{
		{"all at once", 0},
		{"one by one", time.Millisecond},
		{"as the goroutines leave", crewLinger},
		{"after they have left", 2 * crewLinger},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const limit, tasks = 3, 20
				tr := &tracker{ctx: t.Context()}
				c := newCrew(tr, limit, 0)
				var busy, most atomic.Int32
				var mu sync.Mutex
				var done, told []int
				for i := range tasks {
					time.Sleep(tt.pause)
					c.do(func(context.Context) func() {
						if n := busy.Add(1); n > most.Load() {
							most.Store(n)
						}
						defer busy.Add(-1)
						time.Sleep(10 * time.Millisecond)
						mu.Lock()
						defer mu.Unlock()
						done = append(done, i)
						return func() { told = append(told, i) }
					})
				}
				tr.wg.Wait()
				assert.Len(t, done, tasks)
				assert.ElementsMatch(t, done, told)
				assert.LessOrEqual(t, most.Load(), int32(limit))
				assert.Zero(t, c.workers)
				assert.Zero(t, c.waiting)
			})
		})
	}
}

// A crew at rest does not hold Close up.
func TestCrewEndsWithItsTracker(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		tr := &tracker{ctx: ctx}
		c := newCrew(tr, 2, 0)
		c.do(func(context.Context) func() { return nil })
		synctest.Wait()
		assert.Equal(t, 1, c.waiting)
		cancel()
		synctest.Wait()
		assert.Zero(t, c.workers)
	})
}
