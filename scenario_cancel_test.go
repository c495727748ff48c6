package comfyui_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// browser posts a prompt as the pod's own page does, without a marker, and returns its id.
func (b *bench) browser(class string) string {
	b.t.Helper()
	before := len(b.pod.Prompts())
	b.send(http.MethodPost, "/prompt", fmt.Sprintf(`{"client_id":"browser","prompt":{"1":{"class_type":%q,"inputs":{"seed":77}}}}`, class))
	prompts := b.pod.Prompts()
	require.Len(b.t, prompts, before+1)
	return prompts[before].ID
}

// A prompt without the library's marker is nobody's, least of all the job's that is being cancelled.
func TestS31OldPodCancelBehindAPromptOfTheBrowser(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		theirs := b.browser("Long")
		j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 1))
		require.NoError(t, err)
		require.NoError(t, j.Cancel(b.ctx))
		_, err = j.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrCancelled)
		require.NoError(t, b.pod.WaitIdle(b.ctx))
		b.untouched(theirs)
		assert.Zero(t, b.pod.Runs(j.PromptID()))
	}, comfyuitest.WithVersion("0.3.40"))
}

// The job ends, unseen, just before its cancel, and a prompt of the pod's own page runs after it.
func TestS31OldPodCancelOfAJobThatHasJustEnded(t *testing.T) {
	t.Parallel()
	for at := 1900 * time.Millisecond; at < 3200*time.Millisecond; at += 50 * time.Millisecond {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.pod.RefuseStreams(http.StatusForbidden)
				j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 1))
				require.NoError(t, err)
				theirs := b.browser("Long")
				time.Sleep(at)
				err = j.Cancel(b.ctx)
				if err != nil {
					require.Equal(t, comfyui.CategoryConflict, comfyui.CategoryOf(err))
				}
				require.NoError(t, b.pod.WaitIdle(b.ctx))
				b.untouched(theirs)
			}, comfyuitest.WithVersion("0.3.40"))
		})
	}
}

// Whoever gives a cancel up is told why it has not come about.
func TestS31CancelGivenUp(t *testing.T) {
	t.Parallel()
	onVersions(t, func(b *bench) {
		j, err := b.client().Submit(b.ctx, graphOf(b.t, "Long", 1))
		require.NoError(b.t, err)
		time.Sleep(2 * time.Second)
		b.pod.Restart(2 * time.Hour)
		ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
		defer cancel()
		err = j.Cancel(ctx)
		require.ErrorIs(b.t, err, context.DeadlineExceeded)
		require.ErrorIs(b.t, err, syscall.ECONNREFUSED)
		assert.Equal(b.t, comfyui.CategoryContext, comfyui.CategoryOf(err))
	})
}

// Another process asks for the cancel of a job that waits for room: it is read before the POST, which is not made.
func TestS31CancelIsReadBeforeThePost(t *testing.T) {
	t.Parallel()
	for _, id := range []bool{true, false} {
		t.Run(fmt.Sprintf("its id was given=%t", id), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				c := b.client(comfyui.WithStore(store), comfyui.WithMaxInFlight(1))
				first, err := c.Submit(b.ctx, graphOf(t, "Work", 1))
				require.NoError(t, err)
				var opts []comfyui.JobOption
				if id {
					opts = append(opts, comfyui.WithJobID("the-job"))
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					r, err := c.Execute(b.ctx, graphOf(t, "Work", 2), opts...)
					assert.ErrorIs(t, err, comfyui.ErrCancelled)
					if assert.NotNil(t, r) {
						assert.Equal(t, comfyui.StatusCancelled, r.Status)
					}
				})
				time.Sleep(time.Second)
				for rec, err := range store.Unfinished(b.ctx, "") {
					require.NoError(t, err)
					if rec.JobID != first.ID() {
						_, err := store.RequestCancel(b.ctx, rec.JobID)
						require.NoError(t, err)
					}
				}
				wg.Wait()
				assert.Equal(t, 1, b.pod.Requests("POST /prompt"))
				_, err = first.Wait(b.ctx)
				require.NoError(t, err)
			})
		})
	}
}

// An upload that takes long is broken off by a cancel and by a limit.
func TestS31S33EndDuringTheUpload(t *testing.T) {
	t.Parallel()
	for _, cancels := range []bool{true, false} {
		t.Run(fmt.Sprintf("cancels=%t", cancels), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				c := b.client()
				opts := []comfyui.JobOption{comfyui.WithJobID("the-job"), comfyui.WithInput("1", "image", "x.png", trickle)}
				if !cancels {
					opts = append(opts, comfyui.WithLimits(comfyui.Limits{Total: 5 * time.Second}))
				}
				var wg sync.WaitGroup
				defer wg.Wait()
				if cancels {
					wg.Go(func() {
						time.Sleep(5 * time.Second)
						j, err := c.Attach(b.ctx, "the-job")
						if assert.NoError(t, err) {
							assert.NoError(t, j.Cancel(b.ctx))
						}
					})
				}
				start := time.Now()
				r, err := c.Execute(b.ctx, parsed(t, `{"1":{"class_type":"Work","inputs":{"image":"x"}}}`), opts...)
				assert.WithinDuration(t, start.Add(5*time.Second), time.Now(), 2*time.Second)
				require.NotNil(t, r)
				if cancels {
					require.ErrorIs(t, err, comfyui.ErrCancelled)
					assert.Equal(t, comfyui.StatusCancelled, r.Status)
				} else {
					assert.Equal(t, comfyui.CategoryTimeout, comfyui.CategoryOf(err), "%v", err)
					assert.Equal(t, comfyui.StatusFailed, r.Status)
				}
				assert.Zero(t, b.pod.Requests("POST /prompt"))
			})
		})
	}
}

// A file that cannot be opened ends the job; so does an open that returns nothing at all, which must not panic.
func TestInputThatDoesNotOpen(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func(context.Context) (io.ReadCloser, error){
		"on fire": func(context.Context) (io.ReadCloser, error) { return nil, errors.New("on fire") },
		"neither": func(context.Context) (io.ReadCloser, error) { return nil, nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				_, err := b.client().Execute(b.ctx, parsed(t, `{"1":{"class_type":"Work","inputs":{"image":"x"}}}`), comfyui.WithInput("1", "image", "x.png", open))
				assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err), "%v", err)
				assert.ErrorContains(t, err, name)
				assert.ErrorContains(t, err, `opening "x.png"`)
				assert.Zero(t, b.pod.Requests("POST /prompt"))
			})
		})
	}
}

// trickle is a file that comes at a byte a second, for an hour.
func trickle(ctx context.Context) (io.ReadCloser, error) {
	return io.NopCloser(io.LimitReader(slowReader{ctx}, 3600)), nil
}

type slowReader struct{ ctx context.Context }

func (r slowReader) Read(p []byte) (int, error) { return 1, pause(r.ctx, time.Second) }

// oneAtATime lets a pod answer one request at a time, as its event loop does, and each after d.
func oneAtATime(d time.Duration) func(http.Handler) http.Handler {
	return func(pod http.Handler) http.Handler {
		loop := make(chan struct{}, 1)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/ws" {
				loop <- struct{}{}
				defer func() { <-loop }()
				time.Sleep(d)
			}
			pod.ServeHTTP(w, r)
		})
	}
}

// A backlog is cancelled: the pod is told so a few times for all jobs, and none is cancelled again before a look has shown that it
// is there still.
func TestS31CancelOfABacklog(t *testing.T) {
	t.Parallel()
	const jobs, answer = 200, 20 * time.Millisecond
	for _, release := range []string{"0.3.40", "0.3.64", "0.27.0", "0.33.0"} {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			var sent traffic
			bubble(t, func(b *bench) {
				b.raw("Hour", 1)
				client := b.client()
				var backlog []*comfyui.Job
				for i := range jobs {
					j, err := client.Submit(b.ctx, graphOf(b.t, "Work", 10+i))
					require.NoError(b.t, err)
					backlog = append(backlog, j)
				}
				before, _ := sent.of("GET /queue")
				began := time.Now()
				ctx, stop := context.WithTimeout(b.ctx, time.Minute)
				defer stop()
				var wg sync.WaitGroup
				for _, j := range backlog {
					wg.Go(func() { assert.NoError(b.t, j.Cancel(ctx)) })
				}
				wg.Wait()
				for _, j := range backlog {
					_, err := j.Wait(ctx)
					require.ErrorIs(b.t, err, comfyui.ErrCancelled)
				}
				queues, _ := sent.of("GET /queue")
				cancels, _ := sent.of("POST /api/jobs/*")
				deletes, _ := sent.of("POST /queue")
				histories, _ := sent.of("GET /history/*")
				b.t.Logf("%s: %d cancels, %d deletes, %d queues, %d histories", time.Since(began), cancels, deletes, queues-before, histories)
				assert.LessOrEqual(b.t, cancels+deletes, jobs/10)
				assert.LessOrEqual(b.t, queues-before, 30)
				assert.LessOrEqual(b.t, time.Since(began), 2*jobs*answer)
			}, comfyuitest.WithVersion(release), proxied(sent.wrap, oneAtATime(answer)), comfyuitest.WithNode("Hour", comfyuitest.Steps(3600, time.Second)))
		})
	}
}

// sharded is a store of which a part is away: the lease of one job cannot be renewed.
type sharded struct {
	*comfyui.MemoryStore
	away string
}

func (s sharded) Renew(ctx context.Context, owner string, ttl time.Duration, jobIDs []string) ([]string, error) {
	if slices.Contains(jobIDs, s.away) {
		return nil, errors.New("the shard is away")
	}
	return s.MemoryStore.Renew(ctx, owner, ttl, jobIDs)
}

// Prompts that wait are taken off together. A job among them whose lease is not confirmed holds up none of the others; nor does a proxy
// that keeps the queue to itself where the pod can cancel jobs one by one, nor a no to all for one.
func TestS31CancelsTogether(t *testing.T) {
	t.Parallel()
	const odd = "job-20"
	type troubled struct {
		away     string
		fault    *comfyuitest.Fault
		releases []string
	}
	for name, tc := range map[string]troubled{
		"a lease not confirmed":   {away: odd, releases: releases},
		"the queue is forbidden":  {fault: &comfyuitest.Fault{Route: "POST /queue", Times: -1, Status: http.StatusForbidden}, releases: []string{"0.27.0", "0.33.0"}},
		"the queue is not routed": {fault: &comfyuitest.Fault{Route: "POST /queue", Times: -1, Status: http.StatusNotFound}, releases: []string{"0.27.0", "0.33.0"}},
	} {
		for _, release := range tc.releases {
			t.Run(name+"/"+release, func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					b.raw("Hour", 1)
					client := b.client(comfyui.WithStore(sharded{comfyui.NewMemoryStore(), tc.away}))
					var jobs []*comfyui.Job
					for i := range 40 {
						j, err := client.Submit(b.ctx, graphOf(t, "Work", 10+i), comfyui.WithJobID(fmt.Sprint("job-", i)))
						require.NoError(t, err)
						jobs = append(jobs, j)
					}
					time.Sleep(20 * time.Second) // no renewal has been confirmed for more than half of the lease
					if tc.fault != nil {
						b.pod.Inject(*tc.fault)
					}
					ctx, stop := context.WithTimeout(b.ctx, 15*time.Second)
					defer stop()
					var wg sync.WaitGroup
					for _, j := range jobs {
						wg.Go(func() {
							if err := j.Cancel(ctx); j.ID() != tc.away {
								assert.NoError(t, err)
							} else {
								assert.ErrorContains(t, err, "the shard is away")
							}
						})
					}
					wg.Wait()
				}, comfyuitest.WithVersion(release), proxied(oneAtATime(20*time.Millisecond)), comfyuitest.WithNode("Hour", comfyuitest.Steps(3600, time.Second)))
			})
		}
	}
}

// Jobs reach their limits one after another at a pod that takes long to tell its queue. That the cancels have come about is seen in time:
// no job ends with the warning that its prompt may still be there.
func TestS33LimitsAtAPodWithASlowQueue(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.pod.RefuseStreams(http.StatusForbidden)
				b.raw("Hour", 1)
				client := b.client()
				var wg sync.WaitGroup
				for i := range 20 {
					wg.Go(func() {
						limits := comfyui.Limits{Queue: time.Minute + time.Duration(i)*5*time.Second}
						r, err := client.Execute(b.ctx, graphOf(t, "Work", 10+i), comfyui.WithLimits(limits))
						assert.Equal(t, comfyui.CategoryTimeout, comfyui.CategoryOf(err), "%v", err)
						if assert.NotNil(t, r) {
							assert.Empty(t, r.Warnings)
						}
					})
				}
				wg.Wait()
			}, comfyuitest.WithVersion(release), slowAnswer(http.MethodGet, "/queue", 10*time.Second), comfyuitest.WithNode("Hour", comfyuitest.Steps(3600, time.Second)))
		})
	}
}

// The answer to a POST is lost, and the pod is out of reach from then on. Nobody knows whether it has the job, so that a cancel is not said to
// have come about: the job ends as one of a pod that is gone.
func TestS31CancelWhileThePostIsInDoubt(t *testing.T) {
	t.Parallel()
	for _, id := range []bool{true, false} {
		t.Run(fmt.Sprintf("its id was given=%t", id), func(t *testing.T) {
			t.Parallel()
			var away atomic.Bool
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				c := b.client(comfyui.WithStore(store))
				var opts []comfyui.JobOption
				if id {
					opts = append(opts, comfyui.WithJobID("the-job"))
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), opts...)
					assert.ErrorIs(t, err, comfyui.ErrPodGone)
					if assert.NotNil(t, r) {
						assert.Equal(t, comfyui.StatusFailed, r.Status)
					}
				})
				time.Sleep(time.Minute)
				for rec, err := range store.Unfinished(b.ctx, "") {
					require.NoError(t, err)
					j, err := c.Attach(b.ctx, rec.JobID)
					require.NoError(t, err)
					assert.NoError(t, j.Cancel(b.ctx))
				}
				wg.Wait()
				b.ranOnce()
			}, proxied(func(pod http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					switch {
					case away.Load():
						w.WriteHeader(http.StatusBadGateway)
					case r.Method == http.MethodPost && r.URL.Path == "/prompt":
						away.Store(true)
						pod.ServeHTTP(httptest.NewRecorder(), r)
						w.WriteHeader(http.StatusBadGateway)
					case r.URL.Path == "/ws":
						w.WriteHeader(http.StatusForbidden)
					default:
						pod.ServeHTTP(w, r)
					}
				})
			}))
		})
	}
}
