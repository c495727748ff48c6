package comfyui_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
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

var _ = strings.Contains
