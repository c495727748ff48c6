package comfyui_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// The round trips to Redis of a client: 4 for a job at most, progress apart; for the leases of all its jobs 2 each third of a lease,
// however many they are; none for a client that has no job.
func TestRoundTripsToRedis(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string][]comfyui.JobOption{"an id of its own": nil, "the caller's id": {comfyui.WithJobID("the-job")}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				server := newSimRedis()
				b.t.Cleanup(server.Close)
				client := server.client(b.t, nil)
				trips := countTrips(client)
				// Progress is written as seldom as the test needs to leave it out.
				c := b.client(comfyui.WithStore(newRedisStore(b.t, client)), comfyui.WithTiming(comfyui.Timing{ProgressWrite: time.Minute}))
				r, err := c.Execute(b.ctx, graphOf(b.t, "Work", 0))
				succeeded(b.t, r, err) // it has loaded the scripts
				trips.Store(0)
				r, err = c.Execute(b.ctx, graphOf(b.t, "Work", 1), opts...)
				succeeded(b.t, r, err)
				n := trips.Swap(0)
				b.t.Logf("%d round trips", n)
				assert.LessOrEqual(b.t, n, int64(4))
				time.Sleep(time.Hour)
				assert.Zero(b.t, trips.Load(), "idle")
			})
		})
	}
	t.Run("a thousand jobs that wait", func(t *testing.T) {
		t.Parallel()
		const jobs = 1000
		bubble(t, func(b *bench) {
			server := newSimRedis()
			b.t.Cleanup(server.Close)
			client := server.client(b.t, nil)
			trips := countTrips(client)
			store := newRedisStore(b.t, client)
			c := b.client(comfyui.WithStore(store))
			for n := range jobs {
				_, err := c.Submit(b.ctx, graphOf(b.t, "Endless", n), comfyui.WithJobID(fmt.Sprint("job-", n)))
				require.NoError(b.t, err)
			}
			time.Sleep(25 * time.Second)
			trips.Store(0)
			time.Sleep(100 * time.Second)
			n := trips.Swap(0)
			b.t.Logf("%d round trips in 10 thirds of a lease", n)
			assert.LessOrEqual(b.t, n, int64(2*10+2+100), "two a renewal; the progress of the one that runs apart, one a second")
			// And a cancel that somebody has recorded comes with the next renewal.
			_, err := store.RequestCancel(b.ctx, "job-900")
			require.NoError(b.t, err)
			time.Sleep(12 * time.Second)
			r, err := store.Get(b.ctx, "job-900")
			require.NoError(b.t, err)
			assert.Equal(b.t, comfyui.StatusCancelled, r.Progress.Status)
		}, comfyuitest.WithNode("Endless", comfyuitest.Steps(3600, time.Second)))
	})
}

// Progress is in the store ProgressWrite after it was made, whatever else the client waits for: another process shows it.
func TestProgressComesToTheStore(t *testing.T) {
	t.Parallel()
	for _, every := range []time.Duration{500 * time.Millisecond, 5 * time.Second} {
		t.Run(every.String(), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				server := newSimRedis()
				b.t.Cleanup(server.Close)
				store := newRedisStore(b.t, server.client(b.t, nil))
				c := b.client(comfyui.WithStore(store), comfyui.WithTiming(comfyui.Timing{ProgressWrite: every}))
				j, err := c.Submit(b.ctx, graphOf(b.t, "Long", 1))
				require.NoError(b.t, err)
				other, err := b.client(comfyui.WithStore(store)).Attach(b.ctx, j.ID())
				require.NoError(b.t, err)
				before := c.Stats().StoreWrites
				for range 50 {
					time.Sleep(time.Second)
					r, err := store.Get(b.ctx, j.ID())
					require.NoError(b.t, err)
					assert.LessOrEqual(b.t, j.Progress().Step-r.Progress.Step, every.Seconds()+1)
					assert.LessOrEqual(b.t, j.Progress().Step-other.Progress().Step, every.Seconds()+2)
				}
				writes := c.Stats().StoreWrites - before
				assert.LessOrEqual(b.t, writes, int64(50/every.Seconds())+2, "and no more often than that")
			})
		})
	}
}
