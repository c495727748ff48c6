package comfyui_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

// versions are pods of every manner of behaving.
var versions = []string{"0.3.40", "0.3.64", "0.8.0", "0.27.0", "0.33.0"}

// onVersions runs a test on each of them, with a stream and without.
func onVersions(t *testing.T, f func(b *bench), opts ...comfyuitest.Option) {
	t.Helper()
	for _, version := range versions {
		for _, stream := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/stream=%t", version, stream), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					if !stream {
						b.pod.RefuseStreams(http.StatusForbidden)
					}
					f(b)
				}, append(opts[:len(opts):len(opts)], comfyuitest.WithVersion(version))...)
			})
		}
	}
}

// follow collects a job's events to its end.
func (b *bench) follow(j *comfyui.Job) (events []comfyui.Event, r *comfyui.Result, err error) {
	b.t.Helper()
	for ev := range j.Events(b.ctx) {
		events = append(events, ev)
	}
	r, err = j.Wait(b.ctx)
	fraction := 0.0
	for _, ev := range events {
		assert.GreaterOrEqual(b.t, ev.Progress.Fraction, fraction, "progress fell")
		fraction = ev.Progress.Fraction
	}
	return events, r, err
}

func kinds(events []comfyui.Event) map[comfyui.EventKind]int {
	counted := map[comfyui.EventKind]int{}
	for _, ev := range events {
		counted[ev.Kind]++
	}
	return counted
}

func TestS29RestartMidJob(t *testing.T) {
	t.Parallel()
	for name, down := range map[string]time.Duration{"at once": 0, "slow": 2 * time.Minute} {
		for _, first := range []bool{true, false} {
			for _, stage := range []string{"pending", "running"} {
				if first && down == 0 {
					continue // nothing is left that could tell a restart from a cleared history
				}
				t.Run(fmt.Sprintf("%s/first=%t/%s", name, first, stage), func(t *testing.T) {
					t.Parallel()
					bubble(t, func(b *bench) {
						c := b.client()
						if !first {
							_, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
							require.NoError(t, err)
						}
						if stage == "pending" {
							_, err := b.bystander().Submit(b.ctx, graphOf(t, "Long", 7))
							require.NoError(t, err)
						}
						j, err := c.Submit(b.ctx, graphOf(t, "Long", 2))
						require.NoError(t, err)
						time.Sleep(5 * time.Second)
						old := j.PromptID()
						b.pod.Restart(down)
						events, r, err := b.follow(j)
						succeeded(t, r, err)
						assert.Equal(t, 2, r.Attempt)
						assert.NotEqual(t, old, r.PromptID)
						assert.Equal(t, 1, b.pod.Runs(r.PromptID), "resubmitted once")
						assert.Equal(t, 1, kinds(events)[comfyui.EventRetrying])
					})
				})
			}
		}
	}
}

func TestS29RestartAtMostOnce(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client()
		_, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
		require.NoError(t, err)
		j, err := c.Submit(b.ctx, graphOf(t, "Long", 2), comfyui.AtMostOnce())
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		b.pod.Restart(20 * time.Second)
		r, err := j.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
		assert.Equal(t, 1, r.Attempt)
		assert.Len(t, b.pod.Prompts(), 2)
	})
}

func TestS29EachLostJobIsResubmittedOnce(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client()
		_, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
		require.NoError(t, err)
		var jobs []*comfyui.Job
		for i := range 20 {
			j, err := c.Submit(b.ctx, graphOf(t, "Work", 100+i))
			require.NoError(t, err)
			jobs = append(jobs, j)
		}
		time.Sleep(7 * time.Second) // some have ended, one runs, most wait
		b.pod.Restart(10 * time.Second)
		for _, j := range jobs {
			r, err := j.Wait(b.ctx)
			succeeded(t, r, err)
			assert.Equal(t, 1, b.pod.Runs(r.PromptID))
			assert.LessOrEqual(t, r.Attempt, 2)
		}
		ends := 0
		for _, p := range b.pod.Prompts() {
			ends += p.Ends
		}
		assert.Equal(t, 21, ends)
	})
}

func TestS30HistoryClearedBeforeItWasRead(t *testing.T) {
	t.Parallel()
	t.Run("outputs of the stream", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			b.pod.Inject(comfyuitest.Fault{Route: "GET /history/", Status: 200, Body: "{}", Times: -1, Header: http.Header{"Content-Type": {"application/json"}}})
			r, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1))
			succeeded(t, r, err)
			b.ranOnce()
		})
	})
	t.Run("nothing tells", func(t *testing.T) {
		t.Parallel()
		for _, version := range versions {
			t.Run(version, func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					b.pod.RefuseStreams(403)
					c := b.client()
					j, err := c.Submit(b.ctx, graphOf(t, "Work", 1))
					require.NoError(t, err)
					time.Sleep(1500 * time.Millisecond)
					require.NoError(t, b.pod.WaitIdle(b.ctx))
					b.pod.ClearHistory() // before the next look
					r, err := j.Wait(b.ctx)
					require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
					assert.Equal(t, comfyui.StatusFailed, r.Status)
					assert.False(t, comfyui.CategoryOf(err).Retryable())
					b.ranOnce()
				}, comfyuitest.WithVersion(version))
			})
		}
	})
}

func TestS31CancelEverywhere(t *testing.T) {
	t.Parallel()
	onVersions(t, func(b *bench) {
		c := b.client()
		other, err := b.client(comfyui.WithClientID("other")).Submit(b.ctx, graphOf(b.t, "Work", 50))
		require.NoError(b.t, err)
		j, err := c.Submit(b.ctx, graphOf(b.t, "Long", 1))
		require.NoError(b.t, err)
		require.NoError(b.t, j.Cancel(b.ctx), "pending")
		_, r, err := b.follow(j)
		require.ErrorIs(b.t, err, comfyui.ErrCancelled)
		assert.Equal(b.t, comfyui.StatusCancelled, r.Status)
		assert.Zero(b.t, b.pod.Runs(r.PromptID))
		_, err = other.Wait(b.ctx)
		require.NoError(b.t, err)

		j, err = c.Submit(b.ctx, graphOf(b.t, "Long", 2))
		require.NoError(b.t, err)
		time.Sleep(5 * time.Second)
		require.NoError(b.t, j.Cancel(b.ctx), "running")
		r, err = j.Wait(b.ctx)
		require.ErrorIs(b.t, err, comfyui.ErrCancelled)
		assert.Equal(b.t, 1, b.pod.Runs(r.PromptID))
		require.NoError(b.t, j.Cancel(b.ctx), "after the end")

		j, err = c.Submit(b.ctx, graphOf(b.t, "Work", 3))
		require.NoError(b.t, err)
		r, err = j.Wait(b.ctx)
		succeeded(b.t, r, err)
		require.NoError(b.t, j.Cancel(b.ctx))
	})
}

// Other jobs are never hit, whenever a cancel comes.
func TestS31CancelAtRandomMoments(t *testing.T) {
	t.Parallel()
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				rng := rand.New(rand.NewPCG(7, uint64(len(version))))
				c, other := b.client(), b.client(comfyui.WithClientID("other"))
				for i := range 40 {
					var wg sync.WaitGroup
					victim, err := c.Submit(b.ctx, graphOf(t, "Work", i))
					require.NoError(t, err)
					for k := range 2 {
						wg.Go(func() {
							r, err := other.Execute(b.ctx, graphOf(t, "Work", 1000+2*i+k))
							if assert.NoError(t, err) {
								assert.Equal(t, 1, b.pod.Runs(r.PromptID))
							}
						})
					}
					time.Sleep(time.Duration(rng.Int64N(int64(3 * time.Second))))
					err = victim.Cancel(b.ctx)
					if err != nil {
						assert.Equal(t, comfyui.CategoryConflict, comfyui.CategoryOf(err), "%v", err)
						assert.Equal(t, "0.3.40", version)
					}
					r, werr := victim.Wait(b.ctx)
					require.NotNil(t, r)
					if !errors.Is(werr, comfyui.ErrCancelled) {
						require.NoError(t, werr)
					}
					wg.Wait()
				}
			}, comfyuitest.WithVersion(version))
		})
	}
}

func TestS31OldPodWithOthersWaiting(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client()
		j, err := c.Submit(b.ctx, graphOf(t, "Long", 1))
		require.NoError(t, err)
		other, err := b.client(comfyui.WithClientID("other")).Submit(b.ctx, graphOf(t, "Work", 2))
		require.NoError(t, err)
		time.Sleep(3 * time.Second)
		err = j.Cancel(b.ctx)
		require.Error(t, err)
		assert.Equal(t, comfyui.CategoryConflict, comfyui.CategoryOf(err))
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		_, err = other.Wait(b.ctx)
		require.NoError(t, err)
	}, comfyuitest.WithVersion("0.3.40"))
}

func TestS31CancelledByAnotherProcess(t *testing.T) {
	t.Parallel()
	onVersions(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		owner, stranger := b.client(comfyui.WithStore(store)), b.client(comfyui.WithStore(store))
		j, err := owner.Submit(b.ctx, graphOf(b.t, "Long", 1), comfyui.WithJobID("shared"))
		require.NoError(b.t, err)
		time.Sleep(5 * time.Second)
		there, err := stranger.Attach(b.ctx, "shared")
		require.NoError(b.t, err)
		require.NoError(b.t, there.Cancel(b.ctx))
		_, err = j.Wait(b.ctx)
		require.ErrorIs(b.t, err, comfyui.ErrCancelled)
		r, err := there.Wait(b.ctx)
		require.ErrorIs(b.t, err, comfyui.ErrCancelled)
		assert.Equal(b.t, comfyui.StatusCancelled, r.Status)
		b.ranOnce()
	})
}

func TestS31CancelWithContext(t *testing.T) {
	t.Parallel()
	onVersions(t, func(b *bench) {
		ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
		defer cancel()
		c := b.client()
		_, err := c.Execute(ctx, graphOf(b.t, "Long", 1), comfyui.WithJobID("x"), comfyui.CancelWithContext())
		require.ErrorIs(b.t, err, context.DeadlineExceeded)
		assert.Equal(b.t, comfyui.CategoryContext, comfyui.CategoryOf(err))
		_, err = c.Execute(b.ctx, graphOf(b.t, "Long", 1), comfyui.WithJobID("x"))
		require.ErrorIs(b.t, err, comfyui.ErrCancelled)
		require.NoError(b.t, b.pod.WaitIdle(b.ctx))
	})
}

// Whoever joins with CancelWithContext cancels with his ctx too.
func TestS31CancelWithTheContextOfWhoJoined(t *testing.T) {
	t.Parallel()
	for _, first := range []bool{true, false} {
		t.Run(fmt.Sprintf("the first too=%t", first), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				c := b.client()
				opts := []comfyui.JobOption{comfyui.WithJobID("x")}
				if first {
					opts = append(opts, comfyui.CancelWithContext())
				}
				j, err := c.Submit(b.ctx, graphOf(t, "Long", 1), opts...)
				require.NoError(t, err)
				ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
				defer cancel()
				_, err = c.Execute(ctx, graphOf(t, "Long", 1), comfyui.WithJobID("x"), comfyui.CancelWithContext())
				require.ErrorIs(t, err, context.DeadlineExceeded)
				_, err = j.Wait(b.ctx)
				require.ErrorIs(t, err, comfyui.ErrCancelled)
			})
		})
	}
}

// A store that fails once does not lose the cancel of a caller who only follows the job: nobody else tells its driver.
func TestS31CancelWithContextWhileTheStoreFails(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		driven, err := b.client(comfyui.WithStore(store)).Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("x"))
		require.NoError(t, err)
		failures := 1
		c := b.client(comfyui.WithStore(storetest.Flaky(store, func(_ context.Context, method string) (err error, after bool) {
			if method == "RequestCancel" && failures > 0 {
				failures--
				return errStoreDown, false
			}
			return nil, false
		})))
		ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
		defer cancel()
		_, err = c.Execute(ctx, graphOf(t, "Long", 1), comfyui.WithJobID("x"), comfyui.CancelWithContext())
		require.ErrorIs(t, err, context.DeadlineExceeded)
		_, err = driven.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrCancelled)
		assert.EqualValues(t, 1, c.Stats().StoreErrors)
	})
}

func TestS32DeadWorker(t *testing.T) {
	t.Parallel()
	onVersions(t, func(b *bench) {
		c := b.client()
		_, err := c.Execute(b.ctx, graphOf(b.t, "Work", 1))
		require.NoError(b.t, err)
		b.pod.KillWorker()
		start := time.Now()
		j, err := c.Submit(b.ctx, graphOf(b.t, "Work", 2))
		require.NoError(b.t, err)
		time.Sleep(time.Minute)
		_, err = c.Health(b.ctx)
		require.NoError(b.t, err)
		time.Sleep(10 * time.Second)
		h, err := c.Health(b.ctx)
		require.NoError(b.t, err)
		assert.Equal(b.t, comfyui.HealthStalled, h.State, "%v", h.Reasons)
		r, err := j.Wait(b.ctx)
		require.Error(b.t, err)
		assert.Equal(b.t, comfyui.CategoryTimeout, comfyui.CategoryOf(err))
		assert.Equal(b.t, comfyui.StatusFailed, r.Status)
		assert.GreaterOrEqual(b.t, time.Since(start), 10*time.Minute)
		assert.LessOrEqual(b.t, time.Since(start), 12*time.Minute)
	})
}

// Others go on to post: the queue of a dead worker grows, but it does not move.
func TestS32DeadWorkerWhileOthersPost(t *testing.T) {
	t.Parallel()
	for _, front := range []bool{false, true} {
		t.Run(fmt.Sprintf("at the front=%t", front), func(t *testing.T) {
			t.Parallel()
			onVersions(t, func(b *bench) {
				b.pod.KillWorker()
				start := time.Now()
				j, err := b.client().Submit(b.ctx, graphOf(b.t, "Work", 1))
				require.NoError(b.t, err)
				for i := range 30 {
					time.Sleep(time.Minute)
					b.send(http.MethodPost, "/prompt", fmt.Sprintf(`{"prompt":{"1":{"class_type":"Work","inputs":{"seed":%d}}},"client_id":"raw","front":%t}`, i, front))
				}
				r, err := j.Wait(b.ctx)
				require.Error(b.t, err)
				assert.Equal(b.t, comfyui.CategoryTimeout, comfyui.CategoryOf(err))
				assert.WithinDuration(b.t, start.Add(10*time.Minute), r.FinishedAt, 2*time.Minute)
			})
		})
	}
}

// A queue so large that the pod is asked for single jobs: it moves, and who waits in it has not stalled.
func TestS32LongWaitInALargeQueue(t *testing.T) {
	t.Parallel()
	everywhere(t, []string{"0.3.64", "0.33.0"}, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		large := strings.Repeat("x", 30<<10)
		for i := range 13 {
			b.send(http.MethodPost, "/prompt", fmt.Sprintf(`{"prompt":{"1":{"class_type":"Long","inputs":{"seed":%d,"text":%q}}},"client_id":"raw"}`, i, large))
		}
		r, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1))
		succeeded(t, r, err)
		assert.Greater(t, r.StartedAt.Sub(r.CreatedAt), 12*time.Minute)
	})
}

func TestS33Limits(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		limits  comfyui.Limits
		waiting bool // behind another job
		class   string
	}{
		"total while running": {limits: comfyui.Limits{Total: 7 * time.Second}},
		"total while queued":  {limits: comfyui.Limits{Total: 7 * time.Second}, waiting: true},
		"queue":               {limits: comfyui.Limits{Queue: 7 * time.Second}, waiting: true},
		"run":                 {limits: comfyui.Limits{Run: 7 * time.Second}},
		"stall":               {limits: comfyui.Limits{Stall: 7 * time.Second}, class: "Silent"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			silent := comfyuitest.WithNode("Silent", comfyuitest.Node{Output: true, Run: func(ctx context.Context, _ *comfyuitest.Call) error {
				select {
				case <-ctx.Done():
				case <-time.After(5 * time.Minute):
				}
				return ctx.Err()
			}})
			for _, version := range versions {
				t.Run(version, func(t *testing.T) {
					t.Parallel()
					bubble(t, func(b *bench) {
						if tc.waiting {
							_, err := b.client(comfyui.WithClientID("other")).Submit(b.ctx, graphOf(t, "Long", 9))
							require.NoError(t, err)
						}
						class := tc.class
						if class == "" {
							class = "Long"
						}
						start := time.Now()
						r, err := b.client().Execute(b.ctx, graphOf(t, class, 1), comfyui.WithLimits(tc.limits))
						require.Error(t, err)
						assert.Equal(t, comfyui.CategoryTimeout, comfyui.CategoryOf(err), "%v", err)
						assert.Equal(t, comfyui.StatusFailed, r.Status)
						assert.GreaterOrEqual(t, time.Since(start), 7*time.Second)
						assert.LessOrEqual(t, time.Since(start), 40*time.Second)
						require.NoError(t, b.pod.WaitIdle(b.ctx))
						for _, p := range b.pod.Prompts() {
							if p.ID == r.PromptID {
								assert.Zero(t, p.Ends, "cancelled on the pod")
							} else {
								assert.Equal(t, 1, p.Ends)
							}
						}
					}, silent, comfyuitest.WithVersion(version))
				})
			}
		})
	}
}

// What a node had put out before the job was ended is in the Result, whoever tells of it.
func TestS33OutputsOfAJobThatWasEnded(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		stream bool
		limits comfyui.Limits
		then   func(b *bench) // while the second node runs
	}{
		"Run limit":            {stream: true, limits: comfyui.Limits{Run: 10 * time.Second}},
		"Total limit":          {stream: true, limits: comfyui.Limits{Total: 10 * time.Second}},
		"Run limit, no stream": {limits: comfyui.Limits{Run: 10 * time.Second}},
		"history cleared": {
			stream: true, limits: comfyui.Limits{Run: 10 * time.Second},
			then: func(b *bench) {
				b.pod.Inject(comfyuitest.Fault{Route: "GET /history", Times: -1, Effect: comfyuitest.Answer, Status: http.StatusOK, Body: "{}"})
				b.pod.Inject(comfyuitest.Fault{Route: "GET /api/jobs", Times: -1, Effect: comfyuitest.Answer, Status: http.StatusNotFound})
			},
		},
		"pod gone": {stream: true, then: func(b *bench) { b.pod.Restart(2 * time.Hour) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				if !tc.stream {
					b.pod.RefuseStreams(http.StatusForbidden)
				}
				w := parsed(t, `{"1":{"class_type":"Work","inputs":{}},"2":{"class_type":"Long","inputs":{"after":["1",0]}}}`)
				j, err := b.client().Submit(b.ctx, w, comfyui.WithLimits(tc.limits))
				require.NoError(t, err)
				time.Sleep(5 * time.Second)
				if tc.then != nil {
					tc.then(b)
				}
				r, err := j.Wait(b.ctx)
				require.Error(t, err)
				require.Equal(t, comfyui.StatusFailed, r.Status, "%v", err)
				require.Len(t, r.Outputs, 1)
				assert.Equal(t, "1", r.Outputs[0].Node)
			})
		})
	}
}

func TestS33PodGone(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client()
		j, err := c.Submit(b.ctx, graphOf(t, "Long", 1))
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		b.pod.Restart(2 * time.Hour)
		start := time.Now()
		r, err := j.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrPodGone)
		require.ErrorIs(t, err, syscall.ECONNREFUSED, "and why")
		assert.Equal(t, comfyui.StatusFailed, r.Status)
		assert.InDelta(t, (10 * time.Minute).Seconds(), time.Since(start).Seconds(), 30)
	})
}

// A limit also ends a job of which nobody knows whether the pod has taken it, though the pod never answers again and is never given up.
func TestS33TotalWhileThePostIsInDoubt(t *testing.T) {
	t.Parallel()
	for _, gone := range []time.Duration{0, -1} {
		t.Run(fmt.Sprintf("gone=%s", gone), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.pod.RefuseStreams(http.StatusForbidden)
				b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.DropAfter, Times: 1})
				b.pod.Inject(comfyuitest.Fault{Route: "GET /", Effect: comfyuitest.Drop, Times: -1})
				c := b.client(comfyui.WithTiming(comfyui.Timing{Gone: gone}), comfyui.WithMaxInFlight(1))
				start := time.Now()
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithLimits(comfyui.Limits{Total: time.Minute}))
				require.Equal(t, comfyui.CategoryTimeout, comfyui.CategoryOf(err), "%v", err)
				assert.ErrorContains(t, err, "Total")
				assert.LessOrEqual(t, time.Since(start), 2*time.Minute)
				require.Len(t, r.Warnings, 1)
				assert.ErrorContains(t, r.Warnings[0], "may still be on it")
				b.ranOnce()
				// Its place is free for the next one, in an attempt to post at least.
				_, err = c.Execute(b.ctx, graphOf(t, "Work", 2), comfyui.WithLimits(comfyui.Limits{Total: time.Minute}))
				require.Error(t, err)
				assert.Len(t, b.pod.Prompts(), 2)
			})
		})
	}
}

// Whoever hears of an output can open it: while the job runs too, and where another process drives it.
func TestOutputsOfEventsOpen(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		var mu sync.Mutex
		told := map[string]int{}
		opens := func(who string) func(comfyui.Event) {
			return func(ev comfyui.Event) {
				for _, o := range ev.Outputs {
					body, err := o.Open(b.ctx)
					if assert.NoError(t, err, "%s: %s", who, ev.Kind) {
						assert.NoError(t, body.Close())
					}
					mu.Lock()
					told[who+" "+string(ev.Kind)]++
					mu.Unlock()
				}
			}
		}
		c := b.client(comfyui.WithStore(store), comfyui.WithHooks(comfyui.Hooks{Event: opens("hook")}))
		follower := b.client(comfyui.WithStore(store), comfyui.WithJobDefaults(comfyui.OnEvent(opens("follower"))))
		_, err := c.Submit(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("j"), comfyui.OnEvent(opens("callback")))
		require.NoError(t, err)
		j, err := follower.Attach(b.ctx, "j")
		require.NoError(t, err)
		_, err = j.Wait(b.ctx)
		require.NoError(t, err)
		_, err = follower.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("j")) // the end again
		require.NoError(t, err)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		assert.Equal(t, map[string]int{
			"hook output": 1, "hook succeeded": 1, "callback output": 1, "callback succeeded": 1, "follower succeeded": 2,
		}, told)
	})
}

// Pods give equal names to the files of different jobs.
func TestOutputsOfAnotherPodAreNotOpenedHere(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		_, err := b.client(comfyui.WithStore(store), comfyui.WithPodName("there")).Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("j"))
		require.NoError(t, err)

		here := b.client(comfyui.WithStore(store), comfyui.WithPodName("here"))
		j, err := here.Attach(b.ctx, "j")
		require.NoError(t, err)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Equal(t, "there", r.Pod)
		_, err = r.Outputs[0].Open(b.ctx)
		require.ErrorContains(t, err, "another pod")
		assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err))
		_, err = r.SaveAll(b.ctx, t.TempDir())
		require.ErrorContains(t, err, "another pod")
		for ev := range j.Events(b.ctx) {
			for _, o := range ev.Outputs {
				_, err = o.Open(b.ctx)
				require.Error(t, err)
			}
		}
		assert.Zero(t, b.pod.Requests("GET /view"))
	})
}
