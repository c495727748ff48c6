package comfyui_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// ------------------------------------------------------------ S27: failures

const savesThenFails = `{
	"1":{"class_type":"Work","inputs":{}},
	"2":{"class_type":"Fails","inputs":{"after":["1",0]}}
}`

// Every exception of server.md §5 and the recordings: the category, the error by errors.As, what was made before, and how often
// the pod ran it.
func TestS27ExecutionErrors(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, exception, message string
		category                 comfyui.Category
		attempts                 int
		shown                    string // of the message; "" for all
	}{
		{name: "value", exception: "ValueError", message: "a bad value", category: comfyui.CategoryExecution, attempts: 1},
		{name: "no message", exception: "RuntimeError", category: comfyui.CategoryExecution, attempts: 1},
		{name: "shapes", exception: "RuntimeError", message: "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", category: comfyui.CategoryExecution, attempts: 1},
		{name: "oom", exception: "torch.OutOfMemoryError", message: "CUDA out of memory. Tried to allocate 2.00 GiB.", category: comfyui.CategoryOutOfMemory, attempts: 2},
		{name: "oom of old torch", exception: "torch.cuda.OutOfMemoryError", message: "Allocation on device", category: comfyui.CategoryOutOfMemory, attempts: 2},
		{name: "oom of the accelerator", exception: "torch.AcceleratorError", message: "CUDA error: out of memory", category: comfyui.CategoryOutOfMemory, attempts: 2},
		{name: "illegal access", exception: "RuntimeError", message: "CUDA error: an illegal memory access was encountered", category: comfyui.CategoryPodFault, attempts: 1},
		{name: "assert", exception: "torch.AcceleratorError", message: "CUDA error: device-side assert triggered", category: comfyui.CategoryPodFault, attempts: 1},
		{name: "invalid argument", exception: "RuntimeError", message: "CUDA error: invalid argument", category: comfyui.CategoryPodFault, attempts: 1},
		{name: "missing file", exception: "FileNotFoundError", message: "[Errno 2] No such file or directory: 'lora.safetensors'", category: comfyui.CategoryMissingAsset, attempts: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
				c := b.client()
				var log journal
				r, err := c.Execute(b.ctx, parsed(t, savesThenFails), log.option())
				var failed *comfyui.ExecutionError
				require.ErrorAs(t, err, &failed)
				assert.Equal(t, "2", failed.NodeID)
				assert.Equal(t, "Fails", failed.NodeType)
				assert.Equal(t, tc.exception, failed.ExceptionType)
				assert.Equal(t, tc.message, failed.Message, "without the server's advice")
				assert.Equal(t, tc.category, comfyui.CategoryOf(err))
				var e *comfyui.Error
				require.ErrorAs(t, err, &e)
				assert.Equal(t, comfyui.StatusFailed, e.Status)
				assert.Equal(t, tc.attempts, e.Attempt)
				require.NotNil(t, r)
				assert.Equal(t, comfyui.StatusFailed, r.Status)
				assert.Equal(t, tc.attempts, r.Attempt)
				require.Len(t, r.Outputs, 1, "what was made before")
				assert.Equal(t, "1", r.Outputs[0].Node)
				log.sane(t)
				require.Len(t, b.pod.Prompts(), tc.attempts)
				for _, p := range b.pod.Prompts() {
					assert.Equal(t, 1, p.Posts)
					assert.Equal(t, 1, p.Runs)
				}
				if tc.category == comfyui.CategoryOutOfMemory {
					assert.Equal(t, 1, b.pod.Requests("POST /free"), "memory is freed before the second attempt")
					assert.Len(t, log.of(comfyui.EventRetrying), 1)
				} else {
					assert.Zero(t, b.pod.Requests("POST /free"))
				}
			}, comfyuitest.WithNode("Fails", comfyuitest.Fail(tc.exception, tc.message)))
		})
	}
}

// fails is a node that fails so often and then works.
func fails(times int32, exception, message string) comfyuitest.Node {
	var left atomic.Int32
	left.Store(times)
	return comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
		if left.Add(-1) >= 0 {
			return &comfyuitest.NodeError{ExceptionType: exception, Message: message}
		}
		c.Put("text", "fine")
		return nil
	}}
}

// Out of memory once: the second attempt succeeds.
func TestS27OutOfMemoryOnce(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		for _, l := range lines {
			t.Run(fmt.Sprintf("%s/%s", release, l), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					t := b.t
					l.open(b)
					var log journal
					j, err := b.client().Submit(b.ctx, parsed(t, savesThenFails), log.option())
					require.NoError(t, err)
					time.Sleep(1900 * time.Millisecond)
					l.middle(b)
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
					assert.Equal(t, 2, r.Attempt)
					assert.Equal(t, []comfyui.EventKind{
						comfyui.EventQueued, comfyui.EventStarted, comfyui.EventRetrying, comfyui.EventQueued, comfyui.EventStarted, comfyui.EventSucceeded,
					}, log.states())
					log.sane(t)
					retrying := log.of(comfyui.EventRetrying)[0]
					assert.Equal(t, comfyui.CategoryOutOfMemory, comfyui.CategoryOf(retrying.Err))
					assert.Len(t, b.pod.Prompts(), 2)
					b.untouched(r.PromptID)
				}, comfyuitest.WithVersion(release), comfyuitest.WithNode("Fails", fails(1, "torch.OutOfMemoryError", "Allocation on device")))
			})
		}
	}
}

// The attempt has failed before the answer to its POST comes: the next one is made all the same.
func TestS27FailedBeforeTheReply(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		for _, l := range []line{streaming, polling} {
			t.Run(fmt.Sprintf("%s/%s", release, l), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					t := b.t
					l.open(b)
					var log journal
					r, err := b.client().Execute(b.ctx, graphOf(t, "Fails", 1), log.option())
					succeeded(t, r, err)
					assert.Equal(t, 2, r.Attempt)
					log.sane(t)
					assert.Len(t, b.pod.Prompts(), 2)
					b.untouched(r.PromptID)
				}, comfyuitest.WithVersion(release), slowAnswer(http.MethodPost, "/prompt", 10*time.Second),
					comfyuitest.WithNode("Fails", fails(1, "torch.OutOfMemoryError", "Allocation on device")))
			})
		}
	}
}

// A job that waits for its next attempt is not on the pod: its place is another's.
func TestS27RoomWhileARetryWaits(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		again := comfyui.WithRetry(comfyui.CategoryOutOfMemory, comfyui.RetryPolicy{MaxAttempts: 2, InitialInterval: 10 * time.Minute})
		c := b.client(comfyui.WithMaxInFlight(1), again)
		j, err := c.Submit(b.ctx, graphOf(t, "Fails", 1))
		require.NoError(t, err)
		start := time.Now()
		r, err := c.Execute(b.ctx, graphOf(t, "Work", 2))
		succeeded(t, r, err)
		assert.LessOrEqual(t, time.Since(start), time.Minute)
		r, err = j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Equal(t, 2, r.Attempt)
	}, comfyuitest.WithNode("Fails", fails(1, "torch.OutOfMemoryError", "Allocation on device")))
}

// The policy decides; AtMostOnce forbids.
func TestS27Policies(t *testing.T) {
	t.Parallel()
	never, thrice := comfyui.RetryPolicy{}, comfyui.RetryPolicy{MaxAttempts: 3, InitialInterval: time.Second}
	for _, tc := range []struct {
		name, exception string
		client          comfyui.Option
		job             []comfyui.JobOption
		attempts        int
		succeeds        bool
	}{
		{"oom never again", "torch.OutOfMemoryError", comfyui.WithRetry(comfyui.CategoryOutOfMemory, never), nil, 1, false},
		{"oom at most once", "torch.OutOfMemoryError", comfyui.WithRetry(comfyui.CategoryOutOfMemory, thrice), []comfyui.JobOption{comfyui.AtMostOnce()}, 1, false},
		{"oom twice", "torch.OutOfMemoryError", comfyui.WithRetry(comfyui.CategoryOutOfMemory, thrice), nil, 3, true},
		{"value error three times", "ValueError", comfyui.WithRetry(comfyui.CategoryExecution, thrice), nil, 3, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				var log journal
				r, err := b.client(tc.client).Execute(b.ctx, parsed(t, savesThenFails), append(tc.job, log.option())...)
				require.NotNil(t, r)
				assert.Equal(t, tc.succeeds, err == nil, "%v", err)
				assert.Equal(t, tc.attempts, r.Attempt)
				assert.Len(t, b.pod.Prompts(), tc.attempts)
				log.sane(t)
			}, comfyuitest.WithNode("Fails", fails(2, tc.exception, "again")))
		})
	}
}

// What validation refuses: by category, after one POST, and the pod has queued nothing.
func TestS27Refused(t *testing.T) {
	t.Parallel()
	loader := comfyuitest.WithNode("Loader", comfyuitest.Node{Output: true, Inputs: map[string]any{"model": []any{"sdxl.safetensors", "flux.safetensors"}}})
	sampler := comfyuitest.WithNode("Sampler", comfyuitest.Node{Output: true, Inputs: map[string]any{"name": []any{"euler", "heun"}}})
	empty := comfyuitest.WithNode("Empty", comfyuitest.Node{Output: true, Inputs: map[string]any{"model": []any{[]any{}}}})
	for name, tc := range map[string]struct {
		graph    string
		category comfyui.Category
		types    []string // by release, or one for all; "" says that it stands at the top
	}{
		"missing model":         {`{"1":{"class_type":"Loader","inputs":{"model":"nope.safetensors"}}}`, comfyui.CategoryMissingAsset, []string{"value_not_in_list"}},
		"a folder without any":  {`{"1":{"class_type":"Empty","inputs":{"model":"x"}}}`, comfyui.CategoryMissingAsset, []string{"value_not_in_list"}},
		"misspelt choice":       {`{"1":{"class_type":"Sampler","inputs":{"name":"oiler"}}}`, comfyui.CategoryValidation, []string{"value_not_in_list"}},
		"missing input":         {`{"1":{"class_type":"Loader","inputs":{}}}`, comfyui.CategoryValidation, []string{"required_input_missing"}},
		"missing node":          {`{"1":{"class_type":"Absent","inputs":{}}}`, comfyui.CategoryMissingAsset, nil},
		"missing picture":       {`{"1":{"class_type":"LoadImage","inputs":{"image":"nope.png"}},"2":{"class_type":"PreviewImage","inputs":{"images":["1",0]}}}`, comfyui.CategoryMissingAsset, []string{"custom_validation_failed"}},
		"two faults, one model": {`{"1":{"class_type":"Loader","inputs":{"model":"nope.safetensors"}},"2":{"class_type":"Loader","inputs":{}}}`, comfyui.CategoryValidation, []string{"value_not_in_list"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
				c := b.client()
				var log journal
				r, err := c.Execute(b.ctx, parsed(t, tc.graph), log.option())
				var invalid *comfyui.ValidationError
				require.ErrorAs(t, err, &invalid)
				assert.Equal(t, tc.category, comfyui.CategoryOf(err), "%v", err)
				if tc.types != nil {
					require.NotEmpty(t, invalid.Nodes["1"].Errors, "%v", err)
					assert.Equal(t, tc.types[0], invalid.Nodes["1"].Errors[0].Type)
				}
				require.NotNil(t, r)
				assert.Equal(t, comfyui.StatusFailed, r.Status)
				assert.Empty(t, r.Outputs)
				assert.Equal(t, []comfyui.EventKind{comfyui.EventFailed}, log.states())
				log.sane(t)
				assert.Empty(t, b.pod.Prompts(), "nothing was queued")
				assert.Equal(t, 1, b.pod.Requests("POST /prompt"), "and nothing repeated")
			}, loader, sampler, empty)
		})
	}
}

// A CUDA fault poisons the process: Health says so until it is restarted.
func TestS27PoisonedUntilRestart(t *testing.T) {
	t.Parallel()
	for _, l := range []line{streaming, polling} {
		t.Run(string(l), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				l.open(b)
				c := b.client()
				_, err := c.Execute(b.ctx, graphOf(t, "Fails", 1))
				require.Equal(t, comfyui.CategoryPodFault, comfyui.CategoryOf(err))
				h, err := c.Health(b.ctx)
				require.NoError(t, err)
				assert.Equal(t, comfyui.HealthPoisoned, h.State, "%v", h.Reasons)
				b.pod.Restart(10 * time.Second)
				time.Sleep(20 * time.Second)
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
				succeeded(t, r, err)
				h, err = c.Health(b.ctx)
				require.NoError(t, err)
				assert.NotEqual(t, comfyui.HealthPoisoned, h.State, "%v", h.Reasons)
			}, comfyuitest.WithNode("Fails", comfyuitest.Fail("torch.AcceleratorError", "CUDA error: device-side assert triggered")))
		})
	}
}

// ------------------------------------------ S28: somebody else's interrupt

// interrupts are the ways to stop a prompt that runs.
var interrupts = map[string]func(b *bench, promptID string){
	"bare":       func(b *bench, _ string) { b.pod.Interrupt() },
	"targeted":   func(b *bench, id string) { b.send(http.MethodPost, "/interrupt", fmt.Sprintf(`{"prompt_id":%q}`, id)) },
	"by its job": func(b *bench, id string) { b.send(http.MethodPost, "/api/jobs/"+id+"/cancel", "") },
}

func TestS28InterruptedBySomeoneElse(t *testing.T) {
	t.Parallel()
	for way, interrupt := range interrupts {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			of := releases
			if way == "by its job" {
				of = releases[2:]
			}
			everywhere(t, of, lines, func(t *testing.T, b *bench, l line) {
				c := b.client()
				var log journal
				j, err := c.Submit(b.ctx, graphOf(t, "Long", 1), log.option())
				require.NoError(t, err)
				next, err := c.Submit(b.ctx, graphOf(t, "Work", 2))
				require.NoError(t, err)
				time.Sleep(5 * time.Second)
				l.middle(b)
				interrupt(b, j.PromptID())
				r, err := j.Wait(b.ctx)
				require.ErrorIs(t, err, comfyui.ErrInterrupted)
				require.NotErrorIs(t, err, comfyui.ErrCancelled)
				assert.Equal(t, comfyui.CategoryInterrupted, comfyui.CategoryOf(err))
				require.NotNil(t, r)
				assert.Equal(t, comfyui.StatusFailed, r.Status)
				assert.Equal(t, ranAndFailed, log.states())
				log.sane(t)
				p := b.prompt(r.PromptID)
				assert.Equal(t, 1, p.Posts, "not repeated by default")
				assert.Equal(t, 1, p.Runs)
				assert.Zero(t, p.Ends)
				assert.Equal(t, 1, p.Interrupts)
				r, err = next.Wait(b.ctx)
				succeeded(t, r, err)
				b.untouched(r.PromptID)
				assert.Len(t, b.pod.Prompts(), 2)
			})
		})
	}
}

// The caller's policy may run it again; AtMostOnce forbids that.
func TestS28InterruptedAndRunAgain(t *testing.T) {
	t.Parallel()
	again := comfyui.WithRetry(comfyui.CategoryInterrupted, comfyui.RetryPolicy{MaxAttempts: 2, InitialInterval: time.Second})
	for _, atMostOnce := range []bool{false, true} {
		t.Run(fmt.Sprintf("at most once=%t", atMostOnce), func(t *testing.T) {
			t.Parallel()
			everywhere(t, []string{"0.3.40", "0.33.0"}, lines, func(t *testing.T, b *bench, l line) {
				var log journal
				opts := []comfyui.JobOption{log.option()}
				if atMostOnce {
					opts = append(opts, comfyui.AtMostOnce())
				}
				j, err := b.client(again).Submit(b.ctx, graphOf(t, "Long", 1), opts...)
				require.NoError(t, err)
				time.Sleep(5 * time.Second)
				l.middle(b)
				b.pod.Interrupt()
				r, err := j.Wait(b.ctx)
				log.sane(t)
				if atMostOnce {
					require.ErrorIs(t, err, comfyui.ErrInterrupted)
					b.ranOnce()
					return
				}
				succeeded(t, r, err)
				assert.Equal(t, 2, r.Attempt)
				assert.Len(t, b.pod.Prompts(), 2)
				b.untouched(r.PromptID)
			})
		})
	}
}

// removals are the ways to take a pending prompt off the queue.
var removals = map[string]func(b *bench, promptID string){
	"deleted":    func(b *bench, id string) { b.send(http.MethodPost, "/queue", fmt.Sprintf(`{"delete":[%q]}`, id)) },
	"cleared":    func(b *bench, _ string) { b.send(http.MethodPost, "/queue", `{"clear":true}`) },
	"by its job": interrupts["by its job"],
}

// A prompt that somebody takes off the queue looks like one that a restart took, but for the process, which is the same: also
// when the pod's history is empty, and for a client without a stream.
// Whether the process is the same cannot be told while the list of the history cannot be read: it is asked for again, not without end.
func TestS28RemovedWhileTheHistoryCannotBeListed(t *testing.T) {
	t.Parallel()
	var broken atomic.Bool
	bubble(t, func(b *bench) {
		_, err := b.bystander().Submit(b.ctx, graphOf(t, "Long", 1))
		require.NoError(t, err)
		j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 1))
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		broken.Store(true)
		b.pod.CutStreams(comfyuitest.CutReset) // what is known of the process is looked at anew
		b.send("POST", "/queue", fmt.Sprintf(`{"delete":[%q]}`, j.PromptID()))
		before := b.pod.Requests("GET /queue")
		time.Sleep(40 * time.Second)
		assert.LessOrEqual(t, b.pod.Requests("GET /queue")-before, 100)
		broken.Store(false)
		_, err = j.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrRemoved)
	}, comfyuitest.WithHandler(func(pod http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if broken.Load() && r.URL.Query().Has("max_items") {
				http.Error(w, "no", http.StatusNotImplemented) // which is not tried again
				return
			}
			pod.ServeHTTP(w, r)
		})
	}))
}

func TestS28RemovedBySomeoneElse(t *testing.T) {
	t.Parallel()
	for way, remove := range removals {
		for _, seasoned := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/seasoned=%t", way, seasoned), func(t *testing.T) {
				t.Parallel()
				of := releases
				if way == "by its job" {
					of = releases[2:]
				}
				everywhere(t, of, lines, func(t *testing.T, b *bench, l line) {
					other := b.bystander()
					if seasoned {
						_, err := other.Execute(b.ctx, graphOf(t, "Work", 7))
						require.NoError(t, err)
					}
					before, err := other.Submit(b.ctx, graphOf(t, "Long", 1))
					require.NoError(t, err)
					c := b.client()
					var log journal
					j, err := c.Submit(b.ctx, graphOf(t, "Work", 1), log.option())
					require.NoError(t, err)
					time.Sleep(5 * time.Second)
					l.middle(b)
					time.Sleep(2 * time.Second)
					remove(b, j.PromptID())
					start := time.Now()
					r, err := j.Wait(b.ctx)
					require.ErrorIs(t, err, comfyui.ErrRemoved)
					require.NotErrorIs(t, err, comfyui.ErrJobLost)
					assert.Equal(t, comfyui.CategoryInterrupted, comfyui.CategoryOf(err))
					assert.Less(t, time.Since(start), 45*time.Second)
					require.NotNil(t, r)
					assert.Equal(t, comfyui.StatusFailed, r.Status)
					assert.Equal(t, []comfyui.EventKind{comfyui.EventQueued, comfyui.EventFailed}, log.states())
					log.sane(t)
					p := b.prompt(r.PromptID)
					assert.Equal(t, 1, p.Posts)
					assert.Zero(t, p.Runs)
					r, err = before.Wait(b.ctx)
					succeeded(t, r, err)
					b.untouched(r.PromptID)
				})
			})
		}
	}
}

// ------------------------------------------------------------ S29: restarts

// raw posts a graph as some other program would that does not come back for it.
func (b *bench) raw(class string, seed int) {
	b.t.Helper()
	b.send(http.MethodPost, "/prompt", fmt.Sprintf(`{"prompt":{"1":{"class_type":%q,"inputs":{"seed":%d}}},"client_id":"raw"}`, class, seed))
}

// mine are the prompts of a job, told by their markers, in order of their first POST.
func (b *bench) mine(jobID string) []comfyuitest.Prompt {
	b.t.Helper()
	var mine []comfyuitest.Prompt
	for _, p := range b.pod.Prompts() {
		var marker struct {
			JobID string `json:"job_id"`
		}
		if raw := p.ExtraData["comfyui_go"]; raw != nil {
			require.NoError(b.t, json.Unmarshal(raw, &marker))
		}
		if marker.JobID == jobID {
			mine = append(mine, p)
		}
	}
	return mine
}

// A restart while the job waits or runs, slow or so quick that no connection is refused, with a stream and without, as the first
// job of the process or not: the job is lost and posted once more; with AtMostOnce it is not.
func TestS29Restart(t *testing.T) {
	t.Parallel()
	for _, down := range []time.Duration{0, 10 * time.Second, 2 * time.Minute} {
		for _, running := range []bool{false, true} {
			for _, seasoned := range []bool{false, true} {
				for _, atMostOnce := range []bool{false, true} {
					name := fmt.Sprintf("down=%s/running=%t/seasoned=%t/atmostonce=%t", down, running, seasoned, atMostOnce)
					t.Run(name, func(t *testing.T) {
						t.Parallel()
						everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
							c := b.client()
							if seasoned {
								_, err := c.Execute(b.ctx, graphOf(t, "Work", 7))
								require.NoError(t, err)
							}
							states := []comfyui.EventKind{comfyui.EventQueued}
							if running {
								states = append(states, comfyui.EventStarted)
							} else {
								b.raw("Long", 1)
							}
							var log journal
							opts := []comfyui.JobOption{comfyui.WithJobID("mine"), log.option()}
							if atMostOnce {
								opts = append(opts, comfyui.AtMostOnce())
							}
							j, err := c.Submit(b.ctx, graphOf(t, "Long", 2), opts...)
							require.NoError(t, err)
							time.Sleep(5*time.Second + 300*time.Millisecond)
							l.middle(b)
							time.Sleep(5 * time.Second)
							b.pod.Restart(down)
							restarted := time.Now()
							r, err := j.Wait(b.ctx)
							log.sane(t)
							prompts := b.mine("mine")
							assert.Equal(t, 1, prompts[0].Posts)
							assert.Zero(t, prompts[0].Ends)
							if atMostOnce {
								require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
								assert.Equal(t, comfyui.CategoryUnknown, comfyui.CategoryOf(err))
								require.NotNil(t, r)
								assert.Equal(t, 1, r.Attempt)
								assert.Len(t, prompts, 1, "no second POST")
								assert.Equal(t, append(states, comfyui.EventFailed), log.states())
								return
							}
							succeeded(t, r, err)
							assert.Equal(t, 2, r.Attempt)
							require.Len(t, prompts, 2)
							assert.Equal(t, prompts[1].ID, r.PromptID)
							b.untouched(r.PromptID)
							states = append(states, comfyui.EventRetrying, comfyui.EventQueued, comfyui.EventStarted, comfyui.EventSucceeded)
							assert.Equal(t, states, log.states())
							retrying := log.of(comfyui.EventRetrying)[0]
							require.ErrorIs(t, retrying.Err, comfyui.ErrJobLost)
							assert.Equal(t, comfyui.CategoryLost, comfyui.CategoryOf(retrying.Err))
							assert.Less(t, retrying.Time.Sub(restarted), down+45*time.Second, "two looks apart")
						})
					})
				}
			}
		}
	}
}

// A restart right after the POST of a client's first job, which waits behind another program's, with that program's next job in the
// history of the new process by the time that the job is missed: what the old process had tells the two apart.
func TestS29RestartRightAfterTheFirstPost(t *testing.T) {
	t.Parallel()
	for _, down := range []time.Duration{0, 10 * time.Second} {
		for _, seasoned := range []bool{false, true} {
			t.Run(fmt.Sprintf("down=%s/seasoned=%t", down, seasoned), func(t *testing.T) {
				t.Parallel()
				everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
					if seasoned {
						b.raw("Work", 1)
						require.NoError(t, b.pod.WaitIdle(b.ctx))
					}
					b.raw("Long", 2)
					time.Sleep(time.Second)
					j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 3))
					require.NoError(t, err)
					time.Sleep(100 * time.Millisecond)
					b.pod.Restart(down)
					time.Sleep(down + time.Millisecond)
					b.raw("Work", 4)
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
					assert.Equal(t, 2, r.Attempt)
					for _, p := range b.mine(j.ID()) {
						assert.Equal(t, 1, p.Posts)
					}
					b.untouched(r.PromptID)
				}, slowAnswer(http.MethodPost, "/prompt", 50*time.Millisecond))
			})
		}
	}
}

// A pod that cannot tell its history is not asked for it with each POST.
func TestS29FingerprintThatFails(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming}, func(t *testing.T, b *bench, _ line) {
		b.pod.Inject(comfyuitest.Fault{Route: "GET /history", Effect: comfyuitest.Answer, Status: 500, Times: -1})
		b.raw("Long", 1)
		c := b.client()
		for i := range 100 {
			_, err := c.Submit(b.ctx, graphOf(t, "Work", i))
			require.NoError(t, err)
			time.Sleep(50 * time.Millisecond)
		}
		assert.LessOrEqual(t, b.pod.Requests("GET /queue"), 10, "in five seconds")
	})
}

// Several jobs at once: each is posted once more, whatever it was doing.
func TestS29SeveralJobs(t *testing.T) {
	t.Parallel()
	for _, down := range []time.Duration{0, 2 * time.Minute} {
		t.Run(down.String(), func(t *testing.T) {
			t.Parallel()
			everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
				c := b.client()
				const jobs = 5
				var logs [jobs]journal
				var handles [jobs]*comfyui.Job
				for i := range jobs {
					var err error
					handles[i], err = c.Submit(b.ctx, graphOf(t, "Work", i/2), comfyui.WithJobID(fmt.Sprint(i)), logs[i].option())
					require.NoError(t, err)
				}
				time.Sleep(2500 * time.Millisecond) // the first has ended, its twin was cached, the third runs
				l.middle(b)
				time.Sleep(700 * time.Millisecond)
				b.pod.Restart(down)
				for i, j := range handles {
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
					logs[i].sane(t)
					prompts := b.mine(fmt.Sprint(i))
					ends := 0
					for _, p := range prompts {
						assert.Equal(t, 1, p.Posts, "job %d", i)
						ends += p.Ends
					}
					assert.Equal(t, 1, ends, "job %d", i)
					if i >= 2 {
						assert.Len(t, prompts, 2, "job %d", i)
						assert.Equal(t, 2, r.Attempt, "job %d", i)
					} else {
						assert.Len(t, prompts, 1, "job %d", i)
					}
				}
			})
		})
	}
}

// Jobs that are submitted at once have the client make connections that it does not come to use, and its first requests after a
// restart come together: that the connections were lost is noticed all the same.
func TestS29RestartAfterABurst(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		const jobs = 6
		c := b.bystander()
		_, err := c.Execute(b.ctx, graphOf(t, "Work", 99))
		require.NoError(t, err)
		for round := range 5 {
			var wg sync.WaitGroup
			var handles [jobs]*comfyui.Job
			for i := range jobs {
				wg.Go(func() {
					var err error
					handles[i], err = c.Submit(b.ctx, graphOf(t, "Work", round*jobs+i), comfyui.WithJobID(fmt.Sprint(round, "-", i)))
					assert.NoError(t, err)
				})
			}
			wg.Wait()
			time.Sleep(5*time.Second + 500*time.Millisecond) // two have ended, and their ends are known
			b.pod.Restart(0)
			for i, j := range handles {
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				ends := 0
				for _, p := range b.mine(fmt.Sprint(round, "-", i)) {
					assert.Equal(t, 1, p.Posts)
					ends += p.Ends
				}
				assert.Equal(t, 1, ends)
			}
		}
	})
}

// A workflow that kills the pod must not kill it for ever: lost twice is lost.
func TestS29LostTwice(t *testing.T) {
	t.Parallel()
	killer := comfyuitest.WithNode("Killer", comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
		if err := pause(ctx, 3*time.Second); err != nil {
			return err
		}
		c.Pod().Restart(20 * time.Second)
		return nil
	}})
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		var log journal
		r, err := b.client().Execute(b.ctx, graphOf(t, "Killer", 1), log.option())
		require.ErrorIs(t, err, comfyui.ErrJobLost)
		require.NotNil(t, r)
		assert.Equal(t, 2, r.Attempt)
		assert.Equal(t, comfyui.StatusFailed, r.Status)
		log.sane(t)
		require.Len(t, b.pod.Prompts(), 2)
		for _, p := range b.pod.Prompts() {
			assert.Equal(t, 1, p.Posts)
			assert.Equal(t, 1, p.Runs)
		}
	}, killer)
}

// onFirst calls f with the pod after it has handled the first request of a route, and drops the answer.
func onFirst(route string, f func(pod *comfyuitest.Pod)) (option comfyuitest.Option, use func(pod *comfyuitest.Pod)) {
	var pod atomic.Pointer[comfyuitest.Pod]
	var seen atomic.Bool
	method, path, _ := strings.Cut(route, " ")
	option = comfyuitest.WithHandler(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != method || !strings.HasSuffix(r.URL.Path, path) || !seen.CompareAndSwap(false, true) {
				next.ServeHTTP(w, r)
				return
			}
			next.ServeHTTP(httptest.NewRecorder(), r)
			f(pod.Load())
			panic(http.ErrAbortHandler)
		})
	})
	return option, pod.Store
}

// The pod takes the POST, and ends before it answers. The attempt is looked for and posted again under its id; at most once means
// that it is not.
func TestS29RestartAtThePost(t *testing.T) {
	t.Parallel()
	for _, down := range []time.Duration{0, 30 * time.Second} {
		for _, atMostOnce := range []bool{false, true} {
			for _, release := range releases {
				for _, l := range []line{streaming, polling} {
					t.Run(fmt.Sprintf("down=%s/atmostonce=%t/%s/%s", down, atMostOnce, release, l), func(t *testing.T) {
						t.Parallel()
						option, use := onFirst("POST /prompt", func(pod *comfyuitest.Pod) { pod.Restart(down) })
						bubble(t, func(b *bench) {
							t := b.t
							use(b.pod)
							l.open(b)
							var log journal
							opts := []comfyui.JobOption{comfyui.WithJobID("mine"), log.option()}
							if atMostOnce {
								opts = append(opts, comfyui.AtMostOnce())
							}
							r, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1), opts...)
							log.sane(t)
							posts, ends := 0, 0
							for _, p := range b.mine("mine") {
								posts, ends = posts+p.Posts, ends+p.Ends
							}
							if atMostOnce {
								require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
								assert.Equal(t, 1, posts)
								return
							}
							succeeded(t, r, err)
							assert.Equal(t, 2, posts)
							assert.Equal(t, 1, ends)
						}, comfyuitest.WithVersion(release), option)
					})
				}
			}
		}
	}
}

// The pod ends between the terminal frame and the read of the history: the stream has told all, and nothing is run again.
func TestS29RestartBeforeTheHistoryWasRead(t *testing.T) {
	t.Parallel()
	for _, down := range []time.Duration{0, 2 * time.Minute} {
		for _, atMostOnce := range []bool{false, true} {
			t.Run(fmt.Sprintf("down=%s/atmostonce=%t", down, atMostOnce), func(t *testing.T) {
				t.Parallel()
				everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, l line) {
					var log journal
					opts := []comfyui.JobOption{comfyui.WithJobID("mine"), log.option()}
					if atMostOnce {
						opts = append(opts, comfyui.AtMostOnce())
					}
					j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 1), opts...)
					require.NoError(t, err)
					free := b.pod.Inject(comfyuitest.Fault{Route: "GET /history", Effect: comfyuitest.Drop, Times: -1})
					time.Sleep(2500 * time.Millisecond) // it has ended half a second ago
					require.NoError(t, b.pod.WaitIdle(b.ctx))
					free()
					b.pod.Restart(down)
					r, err := j.Wait(b.ctx)
					log.sane(t)
					switch {
					case l.heard():
						succeeded(t, r, err)
						b.untouched(r.PromptID)
						b.ranOnce()
						assert.Equal(t, wentWell, log.states())
					case atMostOnce:
						require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
						b.ranOnce()
					default: // the pod died before the result was read: the one case for which the promise allows a second run
						succeeded(t, r, err)
						assert.Equal(t, 2, r.Attempt)
						b.untouched(r.PromptID)
					}
				})
			})
		}
	}
}

// Restarts at random moments, of random length, with all kinds of lines: each job ends well, and none is posted more than once
// beyond what was lost.
func TestS29RestartAtRandomMoments(t *testing.T) {
	t.Parallel()
	for seed := range uint64(120) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, 29))
			release, l := releases[rng.IntN(len(releases))], lines[rng.IntN(len(lines))]
			bubble(t, func(b *bench) {
				t := b.t
				l.open(b)
				c := b.client()
				if rng.IntN(2) == 0 {
					_, err := c.Execute(b.ctx, graphOf(t, "Work", 99))
					require.NoError(t, err)
				}
				jobs := make([]*comfyui.Job, 1+rng.IntN(4))
				logs := make([]journal, len(jobs))
				start := time.Now()
				for i := range jobs {
					var err error
					jobs[i], err = c.Submit(b.ctx, graphOf(t, "Work", i), comfyui.WithJobID(fmt.Sprint(i)), logs[i].option())
					require.NoError(t, err)
				}
				time.Sleep(time.Duration(rng.Int64N(int64(9 * time.Second))))
				if rng.IntN(2) == 0 {
					l.middle(b)
				}
				time.Sleep(time.Duration(rng.Int64N(int64(time.Second))))
				down := []time.Duration{0, time.Second, 7 * time.Second, time.Minute}[rng.IntN(4)]
				at := time.Since(start)
				b.pod.Restart(down)
				for i, j := range jobs {
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
					logs[i].sane(t)
					prompts := b.mine(fmt.Sprint(i))
					assert.LessOrEqual(t, len(prompts), 2)
					ends := 0
					for _, p := range prompts {
						assert.Equal(t, 1, p.Posts)
						ends += p.Ends
					}
					last := prompts[len(prompts)-1]
					assert.Equal(t, r.PromptID, last.ID)
					// An end that nobody had read goes with the process; a stream has told of it.
					if l.heard() || len(prompts) == 1 {
						assert.Equal(t, 1, ends, "job %d, restart of %s after %s, %s, %s", i, down, at, release, l)
					} else {
						assert.LessOrEqual(t, ends, 2)
					}
				}
			}, comfyuitest.WithVersion(release))
		})
	}
}

// ---------------------------------------------------- S30: history cleared

// clears are the ways in which an entry leaves the history.
var clears = map[string]func(b *bench, promptID string){
	"cleared": func(b *bench, _ string) { b.pod.ClearHistory() },
	"deleted": func(b *bench, id string) { b.send(http.MethodPost, "/history", fmt.Sprintf(`{"delete":[%q]}`, id)) },
}

// The history goes before it was read. Who has heard the end has the outputs; who has not says that nobody knows. Nothing runs twice,
// and nothing hangs.
func TestS30HistoryCleared(t *testing.T) {
	t.Parallel()
	for way, forget := range clears {
		for _, seasoned := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/seasoned=%t", way, seasoned), func(t *testing.T) {
				t.Parallel()
				everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
					c := b.client()
					if seasoned {
						_, err := c.Execute(b.ctx, graphOf(t, "Work", 7))
						require.NoError(t, err)
					}
					var log journal
					j, err := c.Submit(b.ctx, parsed(t, savesThenWaits), comfyui.WithJobID("mine"), log.option())
					require.NoError(t, err)
					time.Sleep(2300 * time.Millisecond)
					if l != streaming {
						l.middle(b)
						b.pod.RefuseStreams(502) // so that the end is not heard
					}
					time.Sleep(time.Second)
					unread := b.pod.Inject(comfyuitest.Fault{Route: "GET /history", Effect: comfyuitest.Hang, Times: -1})
					time.Sleep(2 * time.Second)
					require.NoError(t, b.pod.WaitIdle(b.ctx))
					forget(b, j.PromptID())
					unread()
					start := time.Now()
					r, err := j.Wait(b.ctx)
					log.sane(t)
					p := b.mine("mine")
					require.Equal(t, 1, len(p), "one POST")
					b.untouched(p[0].ID)
					assert.LessOrEqual(t, time.Since(start), 2*time.Minute)
					require.NotNil(t, r)
					assert.Equal(t, 1, r.Attempt)
					if l == streaming {
						succeeded(t, r, err)
						require.Len(t, r.Outputs, 2)
						assert.ElementsMatch(t, []string{"1", "3"}, []string{r.Outputs[0].Node, r.Outputs[1].Node})
						assert.Equal(t, wentWell, log.states())
						assert.Empty(t, r.Warnings)
						file, err := r.Outputs[0].Open(b.ctx)
						require.NoError(t, err, "the outputs know their pod")
						require.NoError(t, file.Close())
						return
					}
					require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
					require.NotErrorIs(t, err, comfyui.ErrJobLost)
					assert.False(t, comfyui.CategoryOf(err).Retryable())
					assert.Equal(t, comfyui.StatusFailed, r.Status)
					assert.Equal(t, ranAndFailed, log.states())
				}, slow, quick)
			})
		}
	}
}

const savesThenWaits = `{
	"1":{"class_type":"Work","inputs":{}},
	"2":{"class_type":"Slow","inputs":{"after":["1",0]}},
	"3":{"class_type":"Quick","inputs":{"after":["2",0]}}
}`

// quick takes no time.
var quick = comfyuitest.WithNode("Quick", comfyuitest.Steps(1, 0))

// A job that waited at one look, and has run and been forgotten at the next, was not removed: it may have run. Also when another
// prompt has begun to run since then, which is no witness of what was before it.
func TestS30RanBetweenTwoLooks(t *testing.T) {
	t.Parallel()
	for _, followed := range []bool{false, true} {
		t.Run(fmt.Sprintf("followed by another=%t", followed), func(t *testing.T) {
			t.Parallel()
			everywhere(t, releases, []line{polling}, func(t *testing.T, b *bench, _ line) {
				c := b.client()
				b.raw("Work", 1)
				j, err := c.Submit(b.ctx, graphOf(t, "Quick", 1), comfyui.WithJobID("mine"))
				require.NoError(t, err)
				b.raw("Mute", 2)
				time.Sleep(1500 * time.Millisecond)
				assert.Equal(t, comfyui.StatusQueued, j.Progress().Status)
				blind := b.pod.Inject(comfyuitest.Fault{Route: "GET /", Effect: comfyuitest.Hang, Times: -1})
				time.Sleep(2 * time.Second)
				require.NoError(t, b.pod.WaitIdle(b.ctx))
				b.pod.ClearHistory()
				if followed {
					b.raw("Long", 3)
				}
				blind()
				r, err := j.Wait(b.ctx)
				require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
				require.NotNil(t, r)
				b.untouched(r.PromptID)
			}, quick, comfyuitest.WithNode("Mute", comfyuitest.Node{Output: true}))
		})
	}
}

// The end is heard while the pod is asked what became of the job: then it is known.
func TestS30HeardAtTheLastMoment(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Pointer[func()]
			slowFingerprint := comfyuitest.WithHandler(func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if tell := asked.Load(); tell != nil && r.URL.Query().Get("offset") != "" {
						(*tell)()
						_ = pause(r.Context(), time.Second)
					}
					next.ServeHTTP(w, r)
				})
			})
			bubble(t, func(b *bench) {
				t := b.t
				j, err := b.client(comfyui.WithClientID("me")).Submit(b.ctx, graphOf(t, "Work", 1))
				require.NoError(t, err)
				time.Sleep(time.Second)
				b.pod.RefuseStreams(http.StatusBadGateway)
				b.pod.CutStreams(comfyuitest.CutReset)
				unread := b.pod.Inject(comfyuitest.Fault{Route: "GET /history", Effect: comfyuitest.Drop, Times: -1})
				require.NoError(t, b.pod.WaitIdle(b.ctx))
				b.pod.ClearHistory()
				unread()
				b.pod.RefuseStreams(0)
				time.Sleep(8 * time.Second) // the stream is up again, and the job was missed once
				late := func() {
					b.pod.SendText("me", fmt.Appendf(nil, `{"type":"executed","data":{"node":"1","output":{"text":["late"]},"prompt_id":%q}}`, j.PromptID()))
					b.pod.SendText("me", fmt.Appendf(nil, `{"type":"execution_success","data":{"prompt_id":%q,"timestamp":1}}`, j.PromptID()))
				}
				asked.Store(&late)
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				assert.Equal(t, "late", r.Outputs[0].Text)
				b.ranOnce()
			}, comfyuitest.WithVersion(release), slowFingerprint)
		})
	}
}

// The stream had a gap when the outputs passed, but brings the end; the history is gone: a success with a warning.
func TestS30StreamWithAGap(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				var log journal
				j, err := b.client().Submit(b.ctx, parsed(t, savesThenWaits), log.option())
				require.NoError(t, err)
				time.Sleep(1900 * time.Millisecond)
				b.pod.CutStreams(comfyuitest.CutReset)
				time.Sleep(time.Second) // it is up again: the first node's output was not heard
				b.pod.Inject(comfyuitest.Fault{Route: "GET /history/", Status: 200, Body: "{}", Header: http.Header{"Content-Type": {"application/json"}}, Times: -1})
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				require.Len(t, r.Outputs, 1)
				assert.Equal(t, "3", r.Outputs[0].Node)
				require.Len(t, r.Warnings, 1)
				assert.Contains(t, r.Warnings[0].Error(), "outputs may be missing")
				log.sane(t)
				b.untouched(r.PromptID)
			}, comfyuitest.WithVersion(release), slow, quick)
		})
	}
}

// The pod remembers few prompts, and the client polls: an entry can be evicted before it was read.
func TestS30HistoryEvicted(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, l line) {
		c := b.client()
		var jobs []*comfyui.Job
		for i := range 12 {
			j, err := c.Submit(b.ctx, graphOf(t, "Echo", i), comfyui.WithJobID(fmt.Sprint(i)))
			require.NoError(t, err)
			jobs = append(jobs, j)
		}
		unknown := 0
		for i, j := range jobs {
			r, err := j.Wait(b.ctx)
			require.NotNil(t, r)
			if l == polling && errors.Is(err, comfyui.ErrOutcomeUnknown) {
				unknown++
			} else {
				succeeded(t, r, err)
				assert.Equal(t, fmt.Sprint(i), r.Outputs[0].Text)
			}
			prompts := b.mine(fmt.Sprint(i))
			require.Len(t, prompts, 1)
			b.untouched(prompts[0].ID)
		}
		if l == polling {
			assert.Positive(t, unknown, "or this test shows nothing")
		}
	}, echo, comfyuitest.WithHistorySize(1))
}

// The pod cannot give a history entry: an output in it is no JSON, say, or a proxy keeps the route to itself. It is no sign that the
// pod is away: the job ends by what the stream has told or, without that, unknown, and the jobs beside it go on.
func TestS30HistoryThatCannotBeRead(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		all    bool // of the history, not only this entry
		status int
	}{
		"one entry":            {status: http.StatusInternalServerError},
		"all of it":            {all: true, status: http.StatusInternalServerError},
		"all of it, forbidden": {all: true, status: http.StatusForbidden},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, l line) {
				c := b.client()
				j, err := c.Submit(b.ctx, graphOf(t, "Work", 1))
				require.NoError(t, err)
				long, err := c.Submit(b.ctx, graphOf(t, "Hour", 2))
				require.NoError(t, err)
				route := "GET /history"
				if !tc.all {
					route += "/" + j.PromptID()
				}
				heal := b.pod.Inject(comfyuitest.Fault{
					Route: route, Times: -1, Status: tc.status, Body: "500 Internal Server Error\n\nServer got itself in trouble",
				})
				start := time.Now()
				r, err := j.Wait(b.ctx)
				if l == streaming {
					succeeded(t, r, err)
					assert.Len(t, r.Outputs, 1)
					assert.Empty(t, r.Warnings)
					assert.Less(t, time.Since(start), 20*time.Second)
				} else {
					require.ErrorIs(t, err, comfyui.ErrOutcomeUnknown)
					assert.ErrorContains(t, err, fmt.Sprintf("HTTP %d", tc.status), "the cause")
					assert.Less(t, time.Since(start), 2*time.Minute)
				}
				time.Sleep(12 * time.Minute) // longer than Gone
				heal()
				r, err = long.Wait(b.ctx)
				succeeded(t, r, err)
				for _, p := range b.pod.Prompts() {
					b.untouched(p.ID)
				}
			}, comfyuitest.WithNode("Hour", comfyuitest.Steps(200, 5*time.Second)))
		})
	}
}

// The first look after a restart has missed the job, and for some seconds the pod cannot give the history then, as when a proxy's token is
// renewed. The look at the end of the grace period is no second one that could not read the entry: the job is made again.
func TestS29HistoryRefusedAfterTheFirstLook(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		j, err := b.client().Submit(b.ctx, graphOf(t, "Long", 1))
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		b.pod.Restart(time.Second)
		time.Sleep(4 * time.Second)
		heal := b.pod.Inject(comfyuitest.Fault{Route: "GET /history", Times: -1, Status: http.StatusForbidden})
		time.Sleep(20 * time.Second)
		heal()
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Equal(t, 2, b.pod.Requests("POST /prompt"))
	})
}
