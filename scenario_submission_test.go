package comfyui_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// bench is a pod and a client in a bubble, where time is virtual and the default timing costs nothing.
type bench struct {
	t   *testing.T
	pod *comfyuitest.Pod
	ctx context.Context
}

func bubble(t *testing.T, f func(b *bench), opts ...comfyuitest.Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(append([]comfyuitest.Option{
			comfyuitest.WithPipes(),
			comfyuitest.WithNode("Work", comfyuitest.Steps(4, 500*time.Millisecond)),
			comfyuitest.WithNode("Long", comfyuitest.Steps(60, time.Second)),
		}, opts...)...)
		defer pod.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		f(&bench{t, pod, ctx})
	})
}

func (b *bench) client(opts ...comfyui.Option) *comfyui.PodClient {
	b.t.Helper()
	c, err := comfyui.NewPodClient(b.pod.URL(), append([]comfyui.Option{comfyui.WithHTTPClient(b.pod.Client())}, opts...)...)
	require.NoError(b.t, err)
	b.t.Cleanup(func() { _ = c.Close() })
	return c
}

// graphOf is a workflow of one node of a class.
func graphOf(t *testing.T, class string, seed int) *comfyui.Workflow {
	t.Helper()
	w, err := comfyui.ParseWorkflow(fmt.Appendf(nil, `{"1":{"class_type":%q,"inputs":{"seed":%d}}}`, class, seed))
	require.NoError(t, err)
	return w
}

// ranOnce asserts what the promise is about: one prompt, posted and run once.
func (b *bench) ranOnce() comfyuitest.Prompt {
	b.t.Helper()
	prompts := b.pod.Prompts()
	require.Len(b.t, prompts, 1)
	assert.Equal(b.t, 1, prompts[0].Runs, "runs")
	return prompts[0]
}

func succeeded(t *testing.T, r *comfyui.Result, err error) {
	t.Helper()
	require.NoError(t, err)
	require.Equal(t, comfyui.StatusSucceeded, r.Status)
	require.NotEmpty(t, r.Outputs)
}

func TestS1PostReplyLost(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"0.3.40", "0.3.64", "0.27.0", "0.33.0"} {
		for name, fault := range map[string]comfyuitest.Fault{
			"reset":     {Route: "POST /prompt", Effect: comfyuitest.DropAfter},
			"502":       {Route: "POST /prompt", Effect: comfyuitest.AnswerAfter, Status: 502, Body: "<html>bad gateway</html>"},
			"524":       {Route: "POST /prompt", Effect: comfyuitest.AnswerAfter, Status: 524},
			"half":      {Route: "POST /prompt", Effect: comfyuitest.Truncate},
			"no JSON":   {Route: "POST /prompt", Effect: comfyuitest.AnswerAfter, Status: 200, Body: "ok"},
			"never":     {Route: "POST /prompt", Effect: comfyuitest.Hang, Times: 1},
			"own 500":   {Route: "POST /prompt", Effect: comfyuitest.AnswerAfter, Status: 500, Body: "500 Internal Server Error\n\nServer got itself in trouble"},
			"too late":  {Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 504, Delay: 3 * time.Second},
			"two in it": {Route: "POST /prompt", Effect: comfyuitest.DropAfter, Times: 2},
		} {
			for _, stream := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%s/stream=%t", version, name, stream), func(t *testing.T) {
					t.Parallel()
					bubble(t, func(b *bench) {
						if !stream {
							b.pod.RefuseStreams(http.StatusForbidden)
						}
						b.pod.Inject(fault)
						c := b.client()
						r, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
						succeeded(t, r, err)
						b.ranOnce()
						assert.Positive(t, c.Stats().AmbiguousPosts+c.Stats().Submitted)
					}, comfyuitest.WithVersion(version))
				})
			}
		}
	}
}

func TestS2PostAppearsLater(t *testing.T) {
	t.Parallel()
	for _, late := range []time.Duration{time.Second, 5 * time.Second, 9 * time.Second} {
		t.Run(late.String(), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 524, Delay: late})
				c := b.client()
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
				succeeded(t, r, err)
				p := b.ranOnce()
				assert.Equal(t, 1, p.Posts)
				assert.EqualValues(t, 1, c.Stats().AmbiguousPosts)
			})
		})
	}
}

// A request that a proxy held for longer than the grace period arrives beside its repeat: one of the two is taken out.
func TestS2PostAppearsAfterTheGracePeriod(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		blocker, err := b.client(comfyui.WithClientID("other")).Submit(b.ctx, graphOf(t, "Long", 1))
		require.NoError(t, err)
		b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 524, Delay: 15 * time.Second})
		c := b.client()
		r, err := c.Execute(b.ctx, graphOf(t, "Work", 2))
		succeeded(t, r, err)
		assert.EqualValues(t, 1, c.Stats().DuplicatesRemoved)
		assert.Equal(t, 1, b.pod.Runs(r.PromptID))
		_, err = blocker.Wait(b.ctx)
		require.NoError(t, err)
	})
}

// What was not there through the grace period comes while the client waits for its next try: it is looked for once more before that.
func TestS2PostAppearsBetweenTwoTries(t *testing.T) {
	t.Parallel()
	policy := comfyui.WithRetry(comfyui.CategoryUnavailable, comfyui.RetryPolicy{MaxAttempts: 3, InitialInterval: 20 * time.Second})
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 524, Delay: 15 * time.Second})
		r, err := b.client(policy).Execute(b.ctx, graphOf(t, "Work", 1))
		succeeded(t, r, err)
		assert.Equal(t, 1, b.ranOnce().Posts)
	})
}

// A prompt stands in the queue twice, and a look that has seen both is answered after one was taken out: the last copy stays.
func TestS2CopiesInAnAnswerThatIsOutOfDate(t *testing.T) {
	t.Parallel()
	for _, by := range []time.Duration{0, 200 * time.Millisecond, 700 * time.Millisecond, time.Second, 2 * time.Second} {
		t.Run(by.String(), func(t *testing.T) {
			t.Parallel()
			late := comfyuitest.WithHandler(func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/queue") {
						_ = pause(r.Context(), 1500*time.Millisecond)
					}
					next.ServeHTTP(w, r)
				})
			})
			bubble(t, func(b *bench) {
				t := b.t
				b.pod.RefuseStreams(http.StatusForbidden)
				b.raw("Long", 1)
				c := b.client()
				others := make([]*comfyui.Job, 30)
				for i := range others {
					var err error
					others[i], err = c.Submit(b.ctx, graphOf(t, "Work", 100+i))
					require.NoError(t, err)
				}
				b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 524, Delay: 15 * time.Second})
				var wg sync.WaitGroup
				defer wg.Wait()
				wg.Go(func() {
					time.Sleep(10 * time.Second)
					for _, j := range others { // each cancel has the client look at once
						time.Sleep(500 * time.Millisecond)
						wg.Go(func() { assert.NoError(t, j.Cancel(b.ctx)) })
					}
				})
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 2))
				succeeded(t, r, err)
				assert.EqualValues(t, 1, c.Stats().DuplicatesRemoved)
				assert.Equal(t, 1, b.pod.Runs(r.PromptID))
			}, late, slowAnswer(http.MethodGet, "/queue", by), comfyuitest.WithVersion("0.33.0"))
		})
	}
}

func TestS3PostThatNeverLeft(t *testing.T) {
	t.Parallel()
	t.Run("dial refused, then up", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			b.pod.Restart(3 * time.Second)
			c := b.client()
			r, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
			succeeded(t, r, err)
			assert.Equal(t, 1, b.ranOnce().Posts)
			assert.Zero(t, c.Stats().AmbiguousPosts, "what never left is not ambiguous")
		})
	})
	t.Run("a proxy's 502 proves nothing", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.Answer, Status: 502, Times: 2})
			c := b.client()
			r, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
			succeeded(t, r, err)
			assert.Equal(t, 1, b.ranOnce().Posts)
			assert.EqualValues(t, 2, c.Stats().AmbiguousPosts)
		})
	})
	t.Run("a pod that stays away", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			b.pod.Restart(time.Hour)
			_, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1))
			require.Error(t, err)
			assert.Equal(t, comfyui.CategoryNetwork, comfyui.CategoryOf(err))
			assert.Empty(t, b.pod.Prompts())
		})
	})
}

func TestS4OldPodIgnoresThePromptID(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client()
		j, err := c.Submit(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("mine"))
		require.NoError(t, err)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		p := b.ranOnce()
		assert.Equal(t, p.ID, r.PromptID, "the pod's id is adopted")
		var marker struct {
			JobID   string `json:"job_id"`
			Attempt int    `json:"attempt"`
		}
		require.NoError(t, json.Unmarshal(p.ExtraData["comfyui_go"], &marker))
		assert.Equal(t, "mine", marker.JobID)
		assert.Equal(t, 1, marker.Attempt)
	}, comfyuitest.WithVersion("0.3.40"))
}

// After a lost reply the job is found by its marker, even when it has ended by then.
func TestS4OldPodLostReplyOfAShortJob(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		b.pod.RefuseStreams(http.StatusForbidden)
		b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerAfter, Status: 524})
		r, err := b.client().Execute(b.ctx, graphOf(t, "Quick", 1))
		succeeded(t, r, err)
		assert.Equal(t, b.ranOnce().ID, r.PromptID)
	}, comfyuitest.WithVersion("0.3.40"), comfyuitest.WithNode("Quick", comfyuitest.Steps(0, 0)))
}

// JSON has no place for what is not UTF-8: neither the marker nor the record would name the job, and a lost reply had it run twice.
func TestS4JobIDsThatJSONCannotHold(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		b.pod.RefuseStreams(http.StatusForbidden)
		c := b.client()
		for _, id := range []string{"a\xffb", "a\x00b", strings.Repeat("x", 513)} {
			_, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID(id))
			require.Error(t, err, "%q", id)
			assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err))
		}
		assert.Zero(t, b.pod.Requests(""))

		for i, id := range []string{"a\u2028<&>b", "\x7f\x01\n", "\ufffd", strings.Repeat("é", 256)} {
			b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.DropAfter})
			r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID(id))
			succeeded(t, r, err)
			assert.Equal(t, id, r.JobID)
			assert.Len(t, b.pod.Prompts(), i+1, "posts")
		}
	}, comfyuitest.WithVersion("0.3.40"))
}

// Frames about the prompt come before the answer that names it, among the many steps of somebody else's.
func TestS4S8FramesBeforeTheNameIsKnown(t *testing.T) {
	t.Parallel()
	for _, after := range []time.Duration{100 * time.Millisecond, time.Second} {
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				b.raw("Work", 9) // the job starts in two seconds
				time.AfterFunc(after, func() {
					for i := range 300 {
						b.pod.SendText("", fmt.Appendf(nil, `{"type":"progress","data":{"value":%d,"max":300,"node":"1","prompt_id":"of-others"}}`, i))
					}
				})
				var log journal
				r, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1), log.option())
				succeeded(t, r, err)
				log.sane(t)
				assert.Len(t, log.of(comfyui.EventNode), 1)
				assert.Len(t, log.of(comfyui.EventOutput), 1)
				b.untouched(r.PromptID)
			}, comfyuitest.WithVersion("0.3.40"), slowAnswer(http.MethodPost, "/prompt", 10*time.Second))
		})
	}
}

func TestS5DuplicateIDQueuedBehindA500(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		b.pod.Inject(comfyuitest.Fault{
			Route: "POST /prompt", Effect: comfyuitest.AnswerAfter, Status: 500, Body: "500 Internal Server Error\n\nServer got itself in trouble",
		})
		c := b.client()
		r, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
		succeeded(t, r, err)
		assert.Equal(t, 1, b.ranOnce().Posts)
	})
}

func TestS5ConflictMeansAccepted(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerAfter, Status: 409, Body: `{"error":"prompt_id already exists"}`})
		r, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1))
		succeeded(t, r, err)
		assert.Equal(t, 1, b.ranOnce().Posts)
	})
}

// An equal id is never posted with an equal number: the pod's heap would compare the graphs, which can kill its worker.
func TestS5RepeatedPostNudgesTheNumber(t *testing.T) {
	t.Parallel()
	for _, number := range []float64{-5, 0, 1 << 60, math.MaxFloat64, -math.MaxFloat64} {
		t.Run(fmt.Sprint(number), func(t *testing.T) {
			t.Parallel()
			nudges(t, number)
		})
	}
}

func nudges(t *testing.T, number float64) {
	var numbers []float64
	spy := comfyuitest.WithHandler(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/prompt") {
				var body struct {
					Number float64 `json:"number"`
				}
				if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
					t.Error(err)
				}
				numbers = append(numbers, body.Number)
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			next.ServeHTTP(w, r)
		})
	})
	bubble(t, func(b *bench) {
		policy := comfyui.RetryPolicy{MaxAttempts: 3}
		_, err := b.client(comfyui.WithRetry(comfyui.CategoryUnavailable, policy)).Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithNumber(number))
		require.Error(t, err)
		require.Len(t, numbers, 3)
		assert.Equal(t, number, numbers[0])
		if number == math.MaxFloat64 { // there is nothing above
			slices.Reverse(numbers)
		}
		assert.Less(t, numbers[0], numbers[1])
		assert.Less(t, numbers[1], numbers[2])
		for i := range 2 {
			assert.Equal(t, math.Nextafter(numbers[i], math.Inf(1)), numbers[i+1], "by the least step")
		}
	}, spy)
}

// Nor by the next owner of a job, who cannot know whether the one before has posted it.
func TestS5NextOwnerNudgesTheNumber(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		p := b.process(store, nth(1, "pod before POST /prompt"))
		background(b, p, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"), comfyui.WithNumber(-5))
		time.Sleep(time.Second)
		heir := b.client(comfyui.WithStore(store))
		for _, err := range heir.Recover(b.ctx) {
			require.NoError(t, err)
		}
		time.Sleep(20 * time.Second) // through the grace period
		q, err := heir.Queue(b.ctx)
		require.NoError(t, err)
		require.Len(t, q.Running, 1)
		assert.Greater(t, q.Running[0].Number, -5.0)
		assert.InDelta(t, -5, q.Running[0].Number, 1e-9, "by the least step")
		assert.Equal(t, 1, b.ranOnce().Posts)
	})
}

const partlyValid = `{
	"1":{"class_type":"EmptyImage","inputs":{"width":16,"height":16,"batch_size":1,"color":0}},
	"2":{"class_type":"SaveImage","inputs":{"images":["1",0],"filename_prefix":"good"}},
	"3":{"class_type":"EmptyImage","inputs":{"width":-1,"height":16,"batch_size":1,"color":0}},
	"4":{"class_type":"SaveImage","inputs":{"images":["3",0],"filename_prefix":"bad"}}
}`

func TestS6PartlyValid(t *testing.T) {
	t.Parallel()
	w, err := comfyui.ParseWorkflow([]byte(partlyValid))
	require.NoError(t, err)
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			// Something runs before it, so that what the pod accepted of it can be seen to be cancelled.
			first, err := b.client(comfyui.WithClientID("other")).Submit(b.ctx, graphOf(t, "Long", 1))
			require.NoError(t, err)
			r, err := b.client().Execute(b.ctx, w)
			var invalid *comfyui.ValidationError
			require.ErrorAs(t, err, &invalid)
			assert.Contains(t, invalid.Nodes, "3")
			require.NotNil(t, r)
			assert.Equal(t, comfyui.StatusFailed, r.Status)
			_, err = first.Wait(b.ctx)
			require.NoError(t, err)
			require.NoError(t, b.pod.WaitIdle(b.ctx))
			assert.Zero(t, b.pod.Runs(r.PromptID), "the rest was cancelled")
		})
	})
	t.Run("allowed", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			r, err := b.client().Execute(b.ctx, w, comfyui.AllowPartial())
			succeeded(t, r, err)
			require.Len(t, r.Warnings, 1)
			var invalid *comfyui.ValidationError
			require.ErrorAs(t, r.Warnings[0], &invalid)
			require.Len(t, r.Outputs, 1)
			assert.Equal(t, "2", r.Outputs[0].Node)
		})
	})
}

// What the pod says of outputs that it dropped is in the answer to the POST alone. A job that is over before that has come waits for it.
func TestS6S8PartlyValidAndOverBeforeTheReply(t *testing.T) {
	t.Parallel()
	w, err := comfyui.ParseWorkflow([]byte(partlyValid))
	require.NoError(t, err)
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		var invalid *comfyui.ValidationError
		r, err := b.client().Execute(b.ctx, w)
		require.ErrorAs(t, err, &invalid)
		assert.Contains(t, invalid.Nodes, "3")
		assert.Equal(t, comfyui.StatusFailed, r.Status)
		r, err = b.client().Execute(b.ctx, w, comfyui.AllowPartial())
		succeeded(t, r, err)
		require.Len(t, r.Warnings, 1)
		require.ErrorAs(t, r.Warnings[0], &invalid)
		for _, p := range b.pod.Prompts() {
			assert.Equal(t, 1, p.Posts)
		}
	}, slowAnswer(http.MethodPost, "/prompt", time.Second))
}

// An answer that never comes is not waited for.
func TestS1S8OverAndNeverAnswered(t *testing.T) {
	t.Parallel()
	everywhere(t, releases[1:], []line{streaming}, func(t *testing.T, b *bench, _ line) { // an older pod names the prompt in the answer
		start := time.Now()
		r, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1))
		succeeded(t, r, err)
		assert.Less(t, time.Since(start), 10*time.Second)
		b.ranOnce()
	}, slowAnswer(http.MethodPost, "/prompt", time.Hour))
}

func TestS7RefusedByValidation(t *testing.T) {
	t.Parallel()
	t.Run("by node", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			w, err := comfyui.ParseWorkflow([]byte(strings.ReplaceAll(partlyValid, `"width":16`, `"width":-1`)))
			require.NoError(t, err)
			c := b.client()
			r, err := c.Execute(b.ctx, w)
			var invalid *comfyui.ValidationError
			require.ErrorAs(t, err, &invalid)
			assert.Contains(t, invalid.Nodes, "1")
			assert.Contains(t, invalid.Nodes, "3")
			assert.Equal(t, "value_smaller_than_min", invalid.Nodes["1"].Errors[0].Type)
			assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err))
			assert.False(t, comfyui.CategoryOf(err).Retryable())
			require.NotNil(t, r)
			assert.Equal(t, 1, b.pod.Requests("POST /prompt"))
			_, err = c.Submit(b.ctx, w)
			require.ErrorAs(t, err, &invalid, "Submit tells it at once")
		})
	})
	t.Run("old shape", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(b *bench) {
			b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Status: 400, Body: `{"error":"Prompt has no outputs","node_errors":[]}`, Header: http.Header{"Content-Type": {"application/json"}}})
			_, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1))
			var invalid *comfyui.ValidationError
			require.ErrorAs(t, err, &invalid)
			assert.Contains(t, err.Error(), "Prompt has no outputs")
			assert.Equal(t, 1, b.pod.Requests("POST /prompt"))
		})
	})
}

func TestS8StartBeforeTheReply(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"0.3.40", "0.33.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			slow := comfyuitest.WithHandler(func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/prompt") {
						answer := httptest.NewRecorder()
						next.ServeHTTP(answer, r)
						time.Sleep(time.Second) // the pod has begun; its answer is on its way
						for k, v := range answer.Header() {
							w.Header()[k] = v
						}
						w.WriteHeader(answer.Code)
						_, _ = w.Write(answer.Body.Bytes())
						return
					}
					next.ServeHTTP(w, r)
				})
			})
			bubble(t, func(b *bench) {
				j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 1))
				require.NoError(t, err)
				var kinds []comfyui.EventKind
				for ev := range j.Events(b.ctx) {
					kinds = append(kinds, ev.Kind)
				}
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				b.ranOnce()
				assert.Contains(t, kinds, comfyui.EventProgress)
				assert.False(t, r.StartedAt.IsZero())
			}, slow, comfyuitest.WithVersion(version))
		})
	}
}

func TestS9PagesAndRedirectsOnPost(t *testing.T) {
	t.Parallel()
	var leaked atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			leaked.Add(1)
		}
	}))
	t.Cleanup(elsewhere.Close)
	for name, tc := range map[string]struct {
		status   int
		body     string
		header   http.Header
		category comfyui.Category
	}{
		"413 of nginx":          {413, "<html><title>413 Request Entity Too Large</title></html>", http.Header{"Content-Type": {"text/html"}}, comfyui.CategoryTooLarge},
		"401":                   {401, "", nil, comfyui.CategoryAuth},
		"403 page":              {403, "<html>Forbidden</html>", nil, comfyui.CategoryAuth},
		"302 to a login page":   {302, "", http.Header{"Location": {elsewhere.URL + "/login"}}, comfyui.CategoryAuth},
		"429 with a time given": {429, "", http.Header{"Retry-After": {"1"}}, comfyui.CategoryOverloaded},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod := comfyuitest.Start(t)
			pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Status: tc.status, Body: tc.body, Header: tc.header, Times: -1})
			c, err := comfyui.NewPodClient(pod.URL(), comfyui.WithBearerToken("sesame"), comfyui.WithRetry(comfyui.CategoryOverloaded, comfyui.RetryPolicy{}))
			require.NoError(t, err)
			defer c.Close()
			w, err := comfyui.ParseWorkflow([]byte(partlyValid))
			require.NoError(t, err)
			_, err = c.Execute(t.Context(), w)
			require.Error(t, err)
			assert.Equal(t, tc.category, comfyui.CategoryOf(err), "%v", err)
			assert.NotContains(t, err.Error(), "sesame")
			assert.NotContains(t, err.Error(), "<html>")
			assert.Equal(t, 1, pod.Requests("POST /prompt"))
		})
	}
	t.Cleanup(func() { assert.Zero(t, leaked.Load()) })
}

// A job with an id of the caller's is looked for before it is posted. A pod that refuses that look for good refuses the job, as it would
// the POST: nobody waits for Gone.
func TestS9RefusedLook(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]comfyui.Category{
		http.StatusUnauthorized:        comfyui.CategoryAuth,
		http.StatusForbidden:           comfyui.CategoryAuth,
		http.StatusFound:               comfyui.CategoryProtocol,
		http.StatusInternalServerError: comfyui.CategoryProtocol,
	} {
		for _, route := range []string{"", "GET /history"} {
			t.Run(fmt.Sprintf("%d %s", status, route), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					heal := b.pod.Inject(comfyuitest.Fault{Route: route, Status: status, Times: -1})
					c := b.client()
					start := time.Now()
					r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
					require.Equal(t, want, comfyui.CategoryOf(err), "%v", err)
					require.NotNil(t, r)
					assert.Equal(t, comfyui.StatusFailed, r.Status)
					assert.Less(t, time.Since(start), 30*time.Second)
					assert.Empty(t, b.pod.Prompts())
					heal()
					r, err = c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"), comfyui.RerunFailed())
					succeeded(t, r, err)
					b.ranOnce()
				})
			})
		}
	}
}

// Nor does anybody wait where the look cannot be made at all.
func TestS9LookThatCannotBeMade(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		url  func(string) string
		opt  comfyui.Option
		want comfyui.Category
	}{
		"no token": {
			opt: comfyui.WithHeaderFunc(func(context.Context) (http.Header, error) { return nil, errors.New("no token today") }), want: comfyui.CategoryAuth,
		},
		"no TLS": {
			url: func(url string) string { return strings.Replace(url, "http:", "https:", 1) }, want: comfyui.CategoryProtocol,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				url := b.pod.URL()
				if tc.url != nil {
					url = tc.url(url)
				}
				c, err := comfyui.NewPodClient(url, comfyui.WithHTTPClient(b.pod.Client()), tc.opt)
				require.NoError(t, err)
				defer c.Close()
				start := time.Now()
				_, err = c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("the-job"))
				require.Equal(t, tc.want, comfyui.CategoryOf(err), "%v", err)
				assert.Less(t, time.Since(start), 30*time.Second)
			})
		})
	}
}

func TestS10UIFormatIsRefusedBeforeAnyPost(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		w, err := comfyui.ParseWorkflow([]byte(`{"last_node_id":1,"nodes":[{"id":1,"type":"SaveImage","inputs":[],"widgets_values":[]}],"links":[],"version":0.4}`))
		require.NoError(t, err)
		_, err = b.client().Execute(b.ctx, w)
		require.Error(t, err)
		assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err))
		assert.Contains(t, err.Error(), "API")
		assert.Zero(t, b.pod.Requests(""))
	})
}

// A caller's ctx that has ended is told as that, with its cause, by every call, and names the job.
func TestEndedContextOfEveryCall(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		j, err := b.client(comfyui.WithStore(store)).Submit(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("there"))
		require.NoError(t, err)
		synctest.Wait() // it runs
		c := b.client(comfyui.WithStore(store))
		cause := errors.New("the program ends")
		ctx, cancel := context.WithCancelCause(b.ctx)
		cancel(cause)
		for name, call := range map[string]func() error{
			"execute":     func() error { _, err := c.Execute(ctx, graphOf(t, "Work", 1)); return err },
			"submit":      func() error { _, err := c.Submit(ctx, graphOf(t, "Work", 2), comfyui.WithJobID("new")); return err },
			"submit/join": func() error { _, err := c.Submit(ctx, graphOf(t, "Long", 1), comfyui.WithJobID("there")); return err },
			"attach":      func() error { _, err := c.Attach(ctx, "there"); return err },
			"wait":        func() error { _, err := j.Wait(ctx); return err },
			"cancel":      func() error { return j.Cancel(ctx) },
		} {
			var e *comfyui.Error
			require.ErrorAs(t, call(), &e, name)
			assert.Equal(t, comfyui.CategoryContext, e.Category, "%s: %v", name, e)
			require.ErrorIs(t, e, context.Canceled, name)
			require.ErrorIs(t, e, cause, name)
			op, _, _ := strings.Cut(name, "/")
			assert.Equal(t, op, e.Op)
			assert.NotEmpty(t, e.JobID, name)
			assert.Equal(t, c.Name(), e.Pod, name)
			if op == "wait" || op == "cancel" { // those of a Job know where it stands
				assert.Equal(t, []any{j.PromptID(), 1, j.Progress().Status}, []any{e.PromptID, e.Attempt, e.Status}, name)
			}
		}
		assert.Equal(t, 1, b.pod.Requests("POST /prompt"))
	})
}

// Close ends the calls that wait, and each says which it was.
func TestCloseNamesTheCall(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client(comfyui.WithMaxInFlight(1))
		j, err := c.Submit(b.ctx, graphOf(t, "Long", 1))
		require.NoError(t, err)
		var wg sync.WaitGroup
		for op, call := range map[string]func() error{
			"submit":  func() error { _, err := c.Submit(b.ctx, graphOf(t, "Work", 2)); return err },
			"execute": func() error { _, err := c.Execute(b.ctx, graphOf(t, "Work", 3)); return err },
			"wait":    func() error { _, err := j.Wait(b.ctx); return err },
		} {
			wg.Go(func() {
				var e *comfyui.Error
				err := call()
				if assert.ErrorAs(t, err, &e, op) {
					assert.Equal(t, op, e.Op)
					assert.Equal(t, comfyui.CategoryClosed, e.Category)
					assert.NotEmpty(t, e.JobID)
				}
			})
		}
		synctest.Wait()
		require.NoError(t, c.Close())
		wg.Wait()
	})
}

func TestZeroHandles(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var j comfyui.Job
		_, err := j.Wait(t.Context())
		require.ErrorIs(t, err, comfyui.ErrClosed)
		require.ErrorIs(t, j.Cancel(t.Context()), comfyui.ErrClosed)
		<-j.Done()
		for ev := range j.Events(t.Context()) {
			assert.Equal(t, comfyui.EventSnapshot, ev.Kind)
		}
		assert.Empty(t, j.ID()+j.PromptID()+j.Pod())
		assert.Zero(t, j.Progress())

		var c comfyui.PodClient
		_, err = c.Execute(t.Context(), nil)
		require.ErrorIs(t, err, comfyui.ErrClosed)
		_, err = c.Attach(t.Context(), "x")
		require.ErrorIs(t, err, comfyui.ErrClosed)
		for _, err := range c.Recover(t.Context()) {
			require.ErrorIs(t, err, comfyui.ErrClosed)
		}
		_, err = c.Queue(t.Context())
		require.ErrorIs(t, err, comfyui.ErrClosed)
		require.NoError(t, c.Close())
	})
}

func TestNilOptionsChangeNothing(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		store := comfyui.NewMemoryStore()
		_, err := b.client(comfyui.WithStore(store), nil).Submit(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("there"), nil)
		require.NoError(t, err)
		c := b.client(comfyui.WithStore(store), comfyui.WithJobDefaults(nil), comfyui.WithStore(store))
		j, err := c.Attach(b.ctx, "there")
		require.NoError(t, err)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		for _, err := range c.Recover(b.ctx) {
			require.NoError(t, err)
		}
		_, err = c.Execute(b.ctx, nil)
		require.Error(t, err)
		assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err))
	})
}

// The caller's logger may ask the client, and take its time.
func TestLoggerIsTheCallersOwnAffair(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		h := &askingHandler{}
		c := b.client(comfyui.WithLogger(slog.New(h)))
		h.ask = func() {
			_, _ = c.Health(b.ctx)
			time.Sleep(100 * time.Millisecond)
		}
		j, err := c.Submit(b.ctx, graphOf(t, "Fails", 1))
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		b.pod.CutStreams(comfyuitest.CutReset)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Positive(t, h.asked.Load())
	}, comfyuitest.WithNode("Fails", fails(1, "torch.OutOfMemoryError", "Allocation on device")))
}

type askingHandler struct {
	ask   func()
	asked atomic.Int64
}

func (h *askingHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *askingHandler) Handle(context.Context, slog.Record) error {
	h.asked.Add(1)
	h.ask()
	return nil
}

func (h *askingHandler) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h *askingHandler) WithGroup(string) slog.Handler      { return h }
