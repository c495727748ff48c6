package comfyui_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"regexp"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

// foreign is a job that another owner drives, by its writes alone.
type foreign struct {
	*bench
	store comfyui.Store // that owner's
	rec   *comfyui.Record
}

// foreign records one for the pod of a client.
func (b *bench) foreign(c *comfyui.PodClient, store comfyui.Store, id string) *foreign {
	b.t.Helper()
	rec, err := store.Create(b.ctx, &comfyui.Record{
		JobID: id, Pod: c.Name(), Owner: "another", Attempt: 1, PromptID: "p", CreatedAt: time.Now(), AttemptAt: time.Now(),
		Workflow: []byte(`{"1":{"class_type":"Work","inputs":{}}}`), Progress: comfyui.Progress{Status: comfyui.StatusPending}, Retention: time.Hour,
	}, 30*time.Second)
	require.NoError(b.t, err)
	return &foreign{b, store, rec}
}

// write is that owner's next one. It returns when those who were told have taken it in: no time passes.
func (f *foreign) write(status comfyui.Status, fraction float64) {
	f.t.Helper()
	next := f.rec.Clone()
	next.Rev++
	next.Progress.Status, next.Progress.Fraction = status, fraction
	switch status {
	case comfyui.StatusQueued:
		next.Accepted = true
	case comfyui.StatusRunning:
		next.Accepted, next.Started = true, true
		next.StartedAt = time.Now()
	case comfyui.StatusSucceeded:
		next.FinishedAt = time.Now()
		next.Outputs = []comfyui.Output{{Node: "1", Key: "text", Raw: []byte(`"done"`)}}
	}
	var err error
	f.rec, err = f.store.Update(f.ctx, next)
	require.NoError(f.t, err)
	synctest.Wait()
}

// renewing keeps that owner's lease.
func (f *foreign) renewing() (stop func()) {
	ctx, cancel := context.WithCancel(f.ctx)
	done, id := make(chan struct{}), f.rec.JobID
	go func() {
		defer close(done)
		for pause(ctx, 10*time.Second) == nil {
			_, err := f.store.Renew(ctx, "another", 30*time.Second, []string{id})
			assert.NoError(f.t, err)
		}
	}()
	return func() { cancel(); <-done }
}

// attach follows it.
func (f *foreign) attach(c *comfyui.PodClient) *comfyui.Job {
	f.t.Helper()
	j, err := c.Attach(f.ctx, f.rec.JobID)
	require.NoError(f.t, err)
	synctest.Wait()
	return j
}

// heard keeps what a job's events tell.
func heard(b *bench, j *comfyui.Job) *journal {
	var log journal
	go func() {
		for ev := range j.Events(b.ctx) {
			log.mu.Lock()
			log.events = append(log.events, ev)
			log.mu.Unlock()
		}
	}()
	synctest.Wait()
	return &log
}

// stranger is a Store and a Watcher of somebody else's making.
type stranger struct {
	comfyui.Store
	watch func(ctx context.Context, jobID string) iter.Seq2[comfyui.Event, error]
}

func (s stranger) Watch(ctx context.Context, jobID string) iter.Seq2[comfyui.Event, error] {
	return s.watch(ctx, jobID)
}

// onePrefix makes stores of one Redis share their jobs.
var onePrefix = comfyui.RedisPrefix("shared")

// sharedStores are two processes' views of one store.
var sharedStores = map[string]func(b *bench) (drives, follows comfyui.Store){
	"memory": func(*bench) (drives, follows comfyui.Store) {
		s := comfyui.NewMemoryStore()
		return s, s
	},
	"Redis": func(b *bench) (drives, follows comfyui.Store) {
		server := newSimRedis()
		b.t.Cleanup(server.Close)
		return newRedisStore(b.t, server.client(b.t, nil), onePrefix), newRedisStore(b.t, server.client(b.t, nil), onePrefix)
	},
	"any Watcher": func(*bench) (drives, follows comfyui.Store) {
		s := comfyui.NewMemoryStore()
		return s, storetest.Flaky(s, func(context.Context, string) (error, bool) { return nil, false })
	},
}

// A follower shows what another process writes as it is written, and not with its next look at the record.
func TestS35FollowerHearsAtOnce(t *testing.T) {
	t.Parallel()
	for name, stores := range sharedStores {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				drives, follows := stores(b)
				c := b.client(comfyui.WithStore(follows))
				f := b.foreign(c, drives, "the-job")
				j := f.attach(c)
				log := heard(b, j)
				time.Sleep(300 * time.Millisecond) // no look is due
				begin := time.Now()
				for _, step := range []struct {
					status   comfyui.Status
					fraction float64
					kind     comfyui.EventKind
				}{
					{comfyui.StatusQueued, 0, comfyui.EventQueued},
					{comfyui.StatusRunning, 0, comfyui.EventStarted},
					{comfyui.StatusRunning, 0.25, comfyui.EventProgress},
					{comfyui.StatusRunning, 0.5, comfyui.EventProgress},
				} {
					f.write(step.status, step.fraction)
					evs := log.all()
					require.Equal(b.t, step.kind, evs[len(evs)-1].Kind)
					require.InDelta(b.t, step.fraction, j.Progress().Fraction, 1e-9)
					require.Equal(b.t, step.status, j.Progress().Status)
				}
				f.write(comfyui.StatusSucceeded, 1)
				select {
				case <-j.Done():
				default:
					b.t.Fatal("the end was not shown")
				}
				r, err := j.Wait(b.ctx)
				succeeded(b.t, r, err)
				require.Len(b.t, r.Outputs, 1)
				assert.Equal(b.t, begin, time.Now(), "no time has passed")
				assert.Equal(b.t, wentWell, log.states())
				assert.Len(b.t, log.all(), 6, "each once, and a snapshot")
				assert.Zero(b.t, c.Stats().Following)
			})
		})
	}
}

// Between two real clients, with the writes of a real driver, everything comes to the follower in the moment in which it is written.
func TestS35FollowerOfALiveDriver(t *testing.T) {
	t.Parallel()
	for name, stores := range sharedStores {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				drives, follows := stores(b)
				driver, c := b.client(comfyui.WithStore(drives)), b.client(comfyui.WithStore(follows))
				_, err := driver.Submit(b.ctx, graphOf(b.t, "Long", 1), comfyui.WithJobID("the-job"))
				require.NoError(b.t, err)
				var log journal
				j, err := c.Submit(b.ctx, graphOf(b.t, "Long", 1), comfyui.WithJobID("the-job"), log.option())
				require.NoError(b.t, err)
				for ended := false; !ended; {
					time.Sleep(70 * time.Millisecond)
					synctest.Wait()
					rec, err := drives.Get(b.ctx, "the-job")
					require.NoError(b.t, err)
					p := j.Progress()
					p.Elapsed = rec.Progress.Elapsed // goes on by itself
					require.Equal(b.t, rec.Progress, p)
					ended = rec.Progress.Status.Terminal()
				}
				r, err := j.Wait(b.ctx)
				succeeded(b.t, r, err)
				assert.Equal(b.t, wentWell[len(wentWell)-len(log.states()):], log.states(), "from where it joined")
				assert.Zero(b.t, c.Stats().Recovered)
				b.ranOnce()
			})
		})
	}
}

// What is lost on the way from Redis is made good by a look at the record, and after some silence there is a new subscription.
func TestS35FollowerMissesANotification(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		server := newSimRedis()
		b.t.Cleanup(server.Close)
		drives, follows := newRedisStore(b.t, server.client(b.t, nil), onePrefix), newRedisStore(b.t, server.client(b.t, nil), onePrefix)
		c := b.client(comfyui.WithStore(follows))
		f := b.foreign(c, drives, "the-job")
		defer f.renewing()()
		j := f.attach(c)
		log := heard(b, j)
		require.Equal(b.t, 1, server.subscribers(func(c *simConn) { c.deaf.Store(true) }))
		f.write(comfyui.StatusQueued, 0)
		assert.Empty(b.t, log.states())
		time.Sleep(5 * time.Second)
		assert.Equal(b.t, wentWell[:1], log.states())
		time.Sleep(time.Minute)
		require.Equal(b.t, 2, server.subscribers(func(*simConn) {}), "a new one")
		f.write(comfyui.StatusRunning, 0.5)
		assert.Equal(b.t, wentWell[:2], log.states(), "which hears")
		server.subscribers(func(c *simConn) { c.deaf.Store(true) })
		f.write(comfyui.StatusSucceeded, 1)
		time.Sleep(5 * time.Second)
		assert.Equal(b.t, wentWell, log.states())
	})
}

// Redis goes away and comes back while a job is followed.
func TestS37FollowerWithoutRedis(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		server := newSimRedis()
		b.t.Cleanup(server.Close)
		drives, follows := newRedisStore(b.t, server.client(b.t, nil), onePrefix), newRedisStore(b.t, server.client(b.t, nil), onePrefix)
		c := b.client(comfyui.WithStore(follows))
		f := b.foreign(c, drives, "the-job")
		j := f.attach(c)
		log := heard(b, j)
		restart := server.stop()
		time.Sleep(20 * time.Second)
		restart()
		time.Sleep(2 * time.Second)         // go-redis tries once a second
		_, _ = drives.Get(b.ctx, "the-job") // on the connection that was cut
		f.write(comfyui.StatusQueued, 0)
		time.Sleep(5 * time.Second)
		assert.Equal(b.t, wentWell[:1], log.states())
		time.Sleep(300 * time.Millisecond)
		f.write(comfyui.StatusSucceeded, 1)
		assert.Equal(b.t, wentWell, log.states(), "at once again")
	})
}

// The store is closed under its followers: they wait, ask no more often than before, and end with their client.
func TestS37FollowerOfAClosedStore(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		server := newSimRedis()
		b.t.Cleanup(server.Close)
		client := server.client(b.t, nil)
		c := b.client(comfyui.WithStore(newRedisStore(b.t, client, onePrefix)))
		f := b.foreign(c, newRedisStore(b.t, server.client(b.t, nil), onePrefix), "the-job")
		j := f.attach(c)
		require.NoError(b.t, client.Close())
		time.Sleep(time.Minute)
		failed := c.Stats().StoreErrors
		assert.Positive(b.t, failed)
		assert.LessOrEqual(b.t, failed, int64(65))
		require.NoError(b.t, c.Close())
		_, err := j.Wait(b.ctx)
		require.ErrorIs(b.t, err, comfyui.ErrClosed)
	})
}

// A Watch that does not do what it should costs no more than the time between two looks at the record, and does not hold Close up.
func TestS35FollowerWithABrokenWatch(t *testing.T) {
	t.Parallel()
	const look, slowLook = time.Second, 5 * time.Second
	hang := func(ctx context.Context, yield func(comfyui.Event, error) bool) {
		<-ctx.Done()
		yield(comfyui.Event{}, ctx.Err())
	}
	for name, tt := range map[string]struct {
		watch  func(ctx context.Context, yield func(comfyui.Event, error) bool)
		within time.Duration
	}{
		"fails": {func(_ context.Context, yield func(comfyui.Event, error) bool) {
			yield(comfyui.Event{}, errors.New("no"))
		}, look},
		"ends at once": {func(context.Context, func(comfyui.Event, error) bool) {}, look},
		"hangs":        {hang, look},
		"hangs after the snapshot": {func(ctx context.Context, yield func(comfyui.Event, error) bool) {
			if yield(comfyui.Event{Kind: comfyui.EventSnapshot}, nil) {
				hang(ctx, yield)
			}
		}, slowLook},
		"ends after the snapshot": {func(_ context.Context, yield func(comfyui.Event, error) bool) {
			yield(comfyui.Event{Kind: comfyui.EventSnapshot}, nil)
		}, look},
		"tells of an end that is not one": {func(ctx context.Context, yield func(comfyui.Event, error) bool) {
			for pause(ctx, 100*time.Millisecond) == nil {
				if !yield(comfyui.Event{Kind: comfyui.EventFailed, Progress: comfyui.Progress{Status: comfyui.StatusFailed}}, nil) {
					return
				}
			}
		}, look},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				var watches atomic.Int64
				store := comfyui.NewMemoryStore()
				c := b.client(comfyui.WithStore(stranger{store, func(ctx context.Context, _ string) iter.Seq2[comfyui.Event, error] {
					watches.Add(1)
					return func(yield func(comfyui.Event, error) bool) { tt.watch(ctx, yield) }
				}}))
				f := b.foreign(c, store, "the-job")
				stop := f.renewing()
				j := f.attach(c)
				log := heard(b, j)
				time.Sleep(10 * time.Minute)
				assert.Positive(b.t, watches.Load())
				assert.Less(b.t, watches.Load(), int64(700), "it is not tried all the time")
				assert.Empty(b.t, log.states())
				f.write(comfyui.StatusQueued, 0)
				time.Sleep(tt.within)
				assert.Equal(b.t, wentWell[:1], log.states())
				f.write(comfyui.StatusSucceeded, 1)
				time.Sleep(tt.within)
				assert.Equal(b.t, wentWell, log.states())

				other := b.foreign(c, store, "another-job")
				other.attach(c)
				stop()
				require.NoError(b.t, c.Close())
			})
		})
	}
}

// A Watch that fails for a while is taken up again.
func TestS35FollowerWatchesAgain(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		var down atomic.Bool
		down.Store(true)
		c := b.client(comfyui.WithStore(storetest.Flaky(store, func(_ context.Context, method string) (error, bool) {
			if method == "Watch" && down.Load() {
				return errors.New("down"), false
			}
			return nil, false
		})))
		f := b.foreign(c, store, "the-job")
		defer f.renewing()()
		j := f.attach(c)
		log := heard(b, j)
		time.Sleep(5 * time.Minute)
		down.Store(false)
		time.Sleep(time.Minute + 300*time.Millisecond)
		f.write(comfyui.StatusSucceeded, 1)
		assert.Equal(b.t, wentWell, log.states())
	})
}

// forge sends what no owner has written to those who follow a job.
func forge(b *bench, server *simRedis, client *redis.Client, r *comfyui.Record) {
	b.t.Helper()
	text, err := r.MarshalJSON()
	require.NoError(b.t, err)
	channels := server.PubSubChannels("")
	require.Len(b.t, channels, 1)
	require.NoError(b.t, client.Publish(b.ctx, channels[0], fmt.Sprintf("%d %d\n%s", r.Epoch, r.Rev, text)).Err())
	synctest.Wait()
}

// An end is shown when the record has it, whatever was told; nor is anything shown that belongs elsewhere. A failover may undo what a
// master has told already.
func TestS35FollowerBelievesTheRecord(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(r *comfyui.Record){
		"an end":               func(r *comfyui.Record) { r.Progress.Status = comfyui.StatusFailed },
		"another owner's news": func(r *comfyui.Record) { r.Epoch++; r.Progress.Status = comfyui.StatusRunning },
		"a former owner's":     func(r *comfyui.Record) { r.Epoch--; r.Progress.Status = comfyui.StatusRunning },
		"old news":             func(r *comfyui.Record) { r.Rev -= 2; r.Progress.Status = comfyui.StatusPending },
		"another job's":        func(r *comfyui.Record) { r.JobID = "another-job"; r.Progress.Status = comfyui.StatusRunning },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				server := newSimRedis()
				b.t.Cleanup(server.Close)
				client := server.client(b.t, nil)
				store := newRedisStore(b.t, client, onePrefix)
				c := b.client(comfyui.WithStore(newRedisStore(b.t, server.client(b.t, nil), onePrefix)))
				f := b.foreign(c, store, "the-job")
				j := f.attach(c)
				log := heard(b, j)
				f.write(comfyui.StatusQueued, 0)
				forged := f.rec.Clone()
				forged.Rev++
				change(forged)
				forge(b, server, client, forged)
				assert.Equal(b.t, wentWell[:1], log.states())
				assert.Equal(b.t, comfyui.StatusQueued, j.Progress().Status)
				f.write(comfyui.StatusSucceeded, 1)
				assert.Equal(b.t, wentWell, log.states())
				log.sane(b.t)
			})
		})
	}
}

// lateReplies holds the replies to scripts back.
type lateReplies struct{ by atomic.Int64 }

func (l *lateReplies) DialHook(next redis.DialHook) redis.DialHook { return next }

func (l *lateReplies) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if strings.HasPrefix(cmd.Name(), "eval") {
			_ = pause(ctx, time.Duration(l.by.Load()))
		}
		return err
	}
}

func (l *lateReplies) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// A record that was read before something was told, and comes after it, undoes nothing and tells nothing twice.
func TestS35FollowerReadsWhatIsOld(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		server := newSimRedis()
		b.t.Cleanup(server.Close)
		client := server.client(b.t, nil)
		var late lateReplies
		client.AddHook(&late)
		c := b.client(comfyui.WithStore(newRedisStore(b.t, client, onePrefix)))
		f := b.foreign(c, newRedisStore(b.t, server.client(b.t, nil), onePrefix), "the-job")
		defer f.renewing()()
		j := f.attach(c)
		log := heard(b, j)
		late.by.Store(int64(2 * time.Second))
		f.write(comfyui.StatusQueued, 0)
		fraction := 0.0
		for n := range 200 {
			time.Sleep(170 * time.Millisecond)
			f.write(comfyui.StatusRunning, float64(n)/400)
			p := j.Progress()
			require.Equal(b.t, comfyui.StatusRunning, p.Status)
			require.GreaterOrEqual(b.t, p.Fraction, fraction)
			fraction = p.Fraction
		}
		f.write(comfyui.StatusSucceeded, 1)
		_, err := j.Wait(b.ctx)
		require.NoError(b.t, err)
		assert.Equal(b.t, wentWell, log.states())
		assert.Len(b.t, log.of(comfyui.EventProgress), 199)
		log.sane(b.t)
	})
}

// Who follows drives the job when its owner is gone: at once when the lease was given back, and else not before it has run out nor
// much later, whatever is told meanwhile. An owner that renews keeps it.
func TestS35FollowerTakesOver(t *testing.T) {
	t.Parallel()
	const lease = 30 * time.Second
	for name, stores := range sharedStores {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for offset := range 4 {
				bubble(t, func(b *bench) {
					drives, follows := stores(b)
					c := b.client(comfyui.WithStore(follows))
					f := b.foreign(c, drives, "the-job")
					f.attach(c)
					time.Sleep(time.Duration(offset) * 1700 * time.Millisecond)
					for range 30 {
						_, err := drives.Renew(b.ctx, "another", lease, []string{"the-job"})
						require.NoError(b.t, err)
						time.Sleep(10 * time.Second)
						require.Zero(b.t, c.Stats().Owned)
					}
					time.Sleep(lease - 10*time.Second - time.Millisecond)
					require.Zero(b.t, c.Stats().Owned, "it still runs")
					time.Sleep(2100 * time.Millisecond)
					require.Equal(b.t, 1, c.Stats().Owned)

					other := b.foreign(c, drives, "another-job")
					j := other.attach(c)
					time.Sleep(3300 * time.Millisecond)
					require.NoError(b.t, drives.Release(b.ctx, "another", []string{"another-job"}))
					synctest.Wait()
					if name == "any Watcher" { // nothing tells it
						time.Sleep(5 * time.Second)
					}
					require.EqualValues(b.t, 2, c.Stats().Recovered)
					require.NoError(b.t, j.Cancel(b.ctx))
				})
			}
		})
	}
}

// followed has a client follow many jobs that wait.
func (b *bench) followed(c *comfyui.PodClient, store comfyui.Store, jobs int) {
	b.t.Helper()
	for n := range jobs {
		rec, err := store.Create(b.ctx, &comfyui.Record{
			JobID: fmt.Sprint("job-", n), Pod: c.Name(), Owner: "another", Attempt: 1, Progress: comfyui.Progress{Status: comfyui.StatusQueued},
		}, time.Hour)
		require.NoError(b.t, err)
		_, err = c.Attach(b.ctx, rec.JobID)
		require.NoError(b.t, err)
	}
}

var goroutines = regexp.MustCompile(`(?m)^(\d+) @.*\n((?:#.*\n)*)`)

// ours counts this package's goroutines among those that came of one pprof label, directly or not.
func ours(t *testing.T, label string) (n int) {
	t.Helper()
	var text bytes.Buffer
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&text, 1))
	for _, m := range goroutines.FindAllStringSubmatch(text.String(), -1) {
		if strings.Contains(m[2], fmt.Sprintf("%q:%q", "follows", label)) && strings.Contains(m[2], "/comfyui.(") {
			each, err := strconv.Atoi(m[1])
			require.NoError(t, err)
			n += each
		}
	}
	return n
}

// A client that follows thousands of jobs has no more goroutines than one that follows one, and hardly more connections to Redis: some
// reads are under way at the same time.
func TestS35FollowersAreCheap(t *testing.T) {
	t.Parallel()
	for name, jobs := range map[string]int{"memory": 10_000, "Redis": 100, "any Watcher": 1000} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				drives, follows := sharedStores[name](b)
				var counts []int
				for _, n := range []int{1, jobs} {
					label := fmt.Sprint(name, n)
					pprof.Do(b.ctx, pprof.Labels("follows", label), func(context.Context) {
						c := b.client(comfyui.WithStore(follows))
						b.followed(c, drives, n)
						time.Sleep(3500 * time.Millisecond) // no look is due
						synctest.Wait()
						assert.Equal(b.t, n, c.Stats().Following)
						counts = append(counts, ours(b.t, label))
						require.NoError(b.t, c.Close())
						assert.Zero(b.t, ours(b.t, label))
					})
				}
				b.t.Logf("goroutines for 1 job and for %d: %d", jobs, counts)
				assert.Positive(b.t, counts[0])
				assert.InDelta(b.t, counts[0], counts[1], 4)
			})
		})
	}
}

// What it costs Redis that a client follows jobs of which nothing is new: a look now and then.
func TestFollowersRoundTripsToRedis(t *testing.T) {
	t.Parallel()
	const jobs, seconds = 20, 20
	trips := map[bool]int64{}
	for _, watched := range []bool{false, true} {
		bubble(t, func(b *bench) {
			server := newSimRedis()
			b.t.Cleanup(server.Close)
			client := server.client(b.t, nil)
			count := countTrips(client)
			var store comfyui.Store = newRedisStore(b.t, client, onePrefix)
			if !watched {
				store = struct{ comfyui.Store }{store}
			}
			c := b.client(comfyui.WithStore(store))
			b.followed(c, newRedisStore(b.t, server.client(b.t, nil), onePrefix), jobs)
			time.Sleep(5500 * time.Millisecond) // between two looks
			count.Store(0)
			time.Sleep(seconds * time.Second)
			trips[watched] = count.Load()
			assert.Equal(b.t, jobs, c.Stats().Following)
		})
	}
	t.Logf("round trips a job and a second: %.2f; of a store that does not tell: %.2f",
		float64(trips[true])/jobs/seconds, float64(trips[false])/jobs/seconds)
	assert.InDelta(t, jobs*seconds, trips[false], jobs*seconds/20)
	assert.LessOrEqual(t, trips[true], int64(jobs*seconds/5))
}

// Those that follow leave nothing behind, and nobody else's watches end with them.
func TestS45FollowersClose(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		server := newSimRedis()
		b.t.Cleanup(server.Close)
		store := newRedisStore(b.t, server.client(b.t, nil), onePrefix) // of both clients
		one, other := b.client(comfyui.WithStore(store)), b.client(comfyui.WithStore(store))
		f := b.foreign(one, store, "the-job")
		mine, theirs := f.attach(one), f.attach(other)
		b.followed(one, store, 20)
		synctest.Wait()
		assert.Len(b.t, server.PubSubChannels(""), 21)
		require.NoError(b.t, one.Close())
		synctest.Wait()
		assert.Len(b.t, server.PubSubChannels(""), 1)
		f.write(comfyui.StatusSucceeded, 1)
		r, err := theirs.Wait(b.ctx)
		succeeded(b.t, r, err)
		_, err = mine.Wait(b.ctx)
		require.ErrorIs(b.t, err, comfyui.ErrClosed)
		synctest.Wait()
		assert.Empty(b.t, server.PubSubChannels(""))
	})
}

// Nor does a Redis that hangs hold Close up.
func TestS45FollowersCloseOnAHungRedis(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		server := newSimRedis()
		b.t.Cleanup(server.Close)
		c := b.client(comfyui.WithStore(newRedisStore(b.t, server.client(b.t, nil), onePrefix, comfyui.RedisCallTimeout(5*time.Second))))
		f := b.foreign(c, newRedisStore(b.t, server.client(b.t, nil), onePrefix), "the-job")
		j := f.attach(c)
		thaw := server.freeze()
		defer thaw()
		time.Sleep(42 * time.Second) // the subscription is being made anew
		begin := time.Now()
		require.NoError(b.t, c.Close())
		assert.LessOrEqual(b.t, time.Since(begin), 3*time.Second)
		_, err := j.Wait(b.ctx)
		require.ErrorIs(b.t, err, comfyui.ErrClosed)
	})
}

// A few jobs of any Watcher are watched at a time; when one ends, the next has its turn.
func TestS35FollowersTakeTurns(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		var now, most atomic.Int64
		c := b.client(comfyui.WithStore(stranger{store, func(ctx context.Context, id string) iter.Seq2[comfyui.Event, error] {
			return func(yield func(comfyui.Event, error) bool) {
				most.Store(max(most.Load(), now.Add(1)))
				defer now.Add(-1)
				store.Watch(ctx, id)(yield)
			}
		}}))
		var jobs []*foreign
		for n := range 12 {
			f := b.foreign(c, store, fmt.Sprint("job-", n))
			f.attach(c)
			jobs = append(jobs, f)
		}
		assert.EqualValues(b.t, 4, now.Load())
		for _, f := range jobs[:8] {
			f.write(comfyui.StatusSucceeded, 1)
			time.Sleep(1300 * time.Millisecond) // of those that are not watched, the record tells
		}
		assert.EqualValues(b.t, 4, now.Load())
		for _, f := range jobs[8:] {
			f.write(comfyui.StatusSucceeded, 1)
		}
		assert.Zero(b.t, c.Stats().Following, "all of them are watched now")
		assert.Zero(b.t, now.Load())
		assert.EqualValues(b.t, 4, most.Load())
	})
}

// On a real Redis: a driver closes in the middle of its job, which is told, and the follower goes on with it.
func TestS35FollowerOnRedis(t *testing.T) {
	t.Parallel()
	onRedis(t, func(t *testing.T, b *bench, s *redisServer, _ *comfyui.RedisStore) {
		client := s.client(t, nil)
		mine := newRedisStore(t, client, onePrefix)
		driver, c := b.client(comfyui.WithStore(newRedisStore(t, s.client(t, nil), onePrefix)), brisk), b.client(comfyui.WithStore(mine), brisk)
		_, err := driver.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		j, err := c.Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
		require.NoError(t, err)
		channels := func() []string { return client.PubSubChannels(b.ctx, "*").Val() }
		require.NoError(t, waitFor(b.ctx, func() bool { return len(channels()) == 1 }))
		listener := client.Subscribe(b.ctx, channels()[0])
		defer func() { _ = listener.Close() }()
		require.NoError(t, waitFor(b.ctx, func() bool { return j.Progress().Fraction > 0.1 }))
		require.NoError(t, driver.Close())
		for told := "something"; told != ""; { // until it is told that the lease was given back
			m, err := listener.ReceiveMessage(b.ctx)
			require.NoError(t, err)
			told = m.Payload
		}
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.EqualValues(t, 1, c.Stats().Recovered)
		assert.Equal(t, 1, b.ranOnce().Posts)
		require.NoError(t, listener.Close())
		require.NoError(t, waitFor(b.ctx, func() bool { return len(channels()) == 0 }), "nobody listens any more")
	})
}
