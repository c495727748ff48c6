package comfyui_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

const savedAndShown = `{
	"1":{"class_type":"EmptyImage","inputs":{"width":16,"height":16,"batch_size":2,"color":255}},
	"2":{"class_type":"ImageScale","inputs":{"image":["1",0],"upscale_method":"nearest-exact","width":32,"height":32,"crop":"disabled"}},
	"3":{"class_type":"SaveImage","inputs":{"images":["2",0],"filename_prefix":"%s"}},
	"4":{"class_type":"PreviewImage","inputs":{"images":["1",0]}}
}`

// The same workflow again: the pod runs no node, and the outputs are there all the same.
func TestS17EverythingCached(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
		c := b.client()
		w := parsed(t, fmt.Sprintf(savedAndShown, "s17"))
		first, err := c.Execute(b.ctx, w)
		succeeded(t, first, err)
		l.middle(b)
		for range 3 {
			var log journal
			r, err := c.Execute(b.ctx, w, log.option())
			succeeded(t, r, err)
			log.sane(t)
			assert.NotEqual(t, first.PromptID, r.PromptID, "a job of its own")
			assert.Equal(t, files(first), files(r))
			assert.ElementsMatch(t, []string{"1", "2", "3", "4"}, r.CachedNodes)
			assert.Equal(t, wentWell, log.states())
			assert.Empty(t, log.of(comfyui.EventNode), "no node runs")
			for _, ev := range log.all() {
				assert.Empty(t, ev.Progress.Node, "%s", ev.Kind)
			}
			last := log.all()[len(log.all())-1]
			assert.Equal(t, 4, last.Progress.NodesDone)
			assert.Equal(t, 1.0, last.Progress.Fraction)
			if l.heard() {
				cached := log.of(comfyui.EventCached)
				require.Len(t, cached, 1)
				assert.Equal(t, 4, cached[0].Progress.NodesDone)
				assert.Len(t, log.of(comfyui.EventOutput), 2, "the cached outputs are shown")
			}
			p := b.prompt(r.PromptID)
			assert.Equal(t, 1, p.Posts)
			assert.Equal(t, 1, p.Runs)
		}
	})
}

// files are the outputs' files.
func files(r *comfyui.Result) map[comfyui.FileRef]string {
	refs := map[comfyui.FileRef]string{}
	for _, o := range r.Outputs {
		if o.File != nil {
			refs[*o.File] = o.Node + " " + o.Key
		}
	}
	return refs
}

// Two workflows that share their first nodes: those are cached, the others run.
func TestS17PartlyCached(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, l line) {
		c := b.client()
		r, err := c.Execute(b.ctx, parsed(t, fmt.Sprintf(savedAndShown, "one")))
		succeeded(t, r, err)
		var log journal
		r, err = c.Execute(b.ctx, parsed(t, fmt.Sprintf(savedAndShown, "two")), log.option())
		succeeded(t, r, err)
		log.sane(t)
		assert.ElementsMatch(t, []string{"1", "2", "4"}, r.CachedNodes)
		assert.Len(t, r.Outputs, 4)
		for _, ev := range log.of(comfyui.EventNode) {
			assert.Equal(t, "3", ev.Node)
		}
		if l.heard() {
			assert.Len(t, log.of(comfyui.EventNode), 1)
		}
		b.untouched(r.PromptID)
	})
}

// An output node without output is told of with null when it comes from the cache; and frames can hold worse.
func TestS18ExecutedWithNullOutput(t *testing.T) {
	t.Parallel()
	mute := comfyuitest.WithNode("Mute", comfyuitest.Node{Output: true})
	everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
		c := b.client()
		for i := range 3 {
			var log journal
			r, err := c.Execute(b.ctx, graphOf(t, "Mute", 1), log.option())
			require.NoError(t, err)
			assert.Equal(t, comfyui.StatusSucceeded, r.Status)
			assert.NotNil(t, r.Outputs, "an empty list, in JSON too")
			assert.Empty(t, r.Outputs)
			assert.Equal(t, wentWell, log.states())
			assert.Empty(t, log.of(comfyui.EventOutput))
			log.sane(t)
			b.untouched(r.PromptID)
			if i == 0 {
				l.middle(b)
			} else {
				assert.Equal(t, []string{"1"}, r.CachedNodes)
			}
		}
	}, mute)
}

// Frames about the running prompt that no server should send do no harm.
func TestS18MalformedFrames(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				c := b.client(comfyui.WithClientID("me"))
				var log journal
				j, err := c.Submit(b.ctx, graphOf(t, "Work", 1), log.option())
				require.NoError(t, err)
				time.Sleep(time.Second)
				for _, frame := range []string{
					`{"type":"executed","data":{"node":"1","output":null,"prompt_id":%q}}`,
					`{"type":"executed","data":{"node":null,"output":null,"prompt_id":%q}}`,
					`{"type":"executed","data":{"node":"nowhere","display_node":null,"output":{"images":null},"prompt_id":%q}}`,
					`{"type":"executed","data":{"node":"1","output":[],"prompt_id":%q}}`,
					`{"type":"executed","data":{"node":"1","output":7,"prompt_id":%q}}`,
					`{"type":"executed","data":{"node":"1","output":{"images":{"filename":7}},"prompt_id":%q}}`,
					`{"type":"executed","data":{"prompt_id":%q}}`,
					`{"type":"executing","data":{"node":{},"prompt_id":%q}}`,
					`{"type":"executing","data":{"node":"","prompt_id":%q}}`,
					`{"type":"execution_cached","data":{"nodes":null,"prompt_id":%q}}`,
					`{"type":"execution_cached","data":{"nodes":[null,1,{}],"prompt_id":%q}}`,
					`{"type":"progress","data":{"value":null,"max":null,"node":null,"prompt_id":%q}}`,
					`{"type":"progress","data":{"value":-5,"max":-1,"node":"1","prompt_id":%q}}`,
					`{"type":"progress","data":{"value":1e308,"max":1e-308,"node":"1","prompt_id":%q}}`,
					`{"type":"progress_state","data":{"nodes":null,"prompt_id":%q}}`,
					`{"type":"progress_state","data":{"nodes":{"1":null,"2":[],"":{}},"prompt_id":%q}}`,
					`{"type":"execution_start","data":{"prompt_id":%q}}`,
				} {
					b.pod.SendText("me", fmt.Appendf(nil, frame, j.PromptID()))
				}
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				require.Len(t, r.Outputs, 1, "the history's word counts")
				assert.Equal(t, "1", r.Outputs[0].Node)
				assert.Equal(t, wentWell, log.states())
				log.sane(t)
				b.untouched(r.PromptID)
			}, comfyuitest.WithVersion(release))
		})
	}
}

const blockedOutput = `{
	"1":{"class_type":"Gate","inputs":{"message":%q}},
	"2":{"class_type":"Sink","inputs":{"in":["1",0]}},
	"3":{"class_type":"Work","inputs":{}}
}`

// gate blocks the nodes behind it with the message that it is given.
var (
	gate = comfyuitest.WithNode("Gate", comfyuitest.Node{Run: func(_ context.Context, c *comfyuitest.Call) error {
		c.Block(c.Inputs["message"].(string))
		return nil
	}})
	sink = comfyuitest.WithNode("Sink", comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
		c.Put("text", "never")
		return nil
	}})
)

// ExecutionBlocker's execution_error is not the end: the job succeeds, with a warning where its frame was heard.
func TestS19BlockedOutput(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, l line) {
		c := b.client()
		var log journal
		r, err := c.Execute(b.ctx, parsed(t, fmt.Sprintf(blockedOutput, "no prompt given")), log.option())
		succeeded(t, r, err)
		log.sane(t)
		require.Len(t, r.Outputs, 1, "of the output that was not blocked")
		assert.Equal(t, "3", r.Outputs[0].Node)
		assert.Equal(t, wentWell, log.states())
		b.untouched(r.PromptID)
		warnings := log.of(comfyui.EventWarning)
		if !l.heard() {
			assert.Empty(t, warnings, "the history does not tell of it")
			assert.Empty(t, r.Warnings)
			return
		}
		require.Len(t, warnings, 1)
		require.Len(t, r.Warnings, 1)
		for _, err := range []error{warnings[0].Err, r.Warnings[0]} {
			var blocked *comfyui.ExecutionError
			require.ErrorAs(t, err, &blocked)
			assert.Equal(t, "ExecutionBlocked", blocked.ExceptionType)
			assert.Contains(t, blocked.Message, "no prompt given")
			assert.Equal(t, "2", blocked.NodeID)
		}
	}, gate, sink)
}

// Every output is blocked, with a message and without: a success without outputs.
func TestS19EverythingBlocked(t *testing.T) {
	t.Parallel()
	for message, warnings := range map[string]int{"stop": 1, "": 0} {
		t.Run("message="+message, func(t *testing.T) {
			t.Parallel()
			everywhere(t, []string{"0.3.64", "0.33.0"}, []line{streaming, polling}, func(t *testing.T, b *bench, l line) {
				w := parsed(t, fmt.Sprintf(`{"1":{"class_type":"Gate","inputs":{"message":%q}},"2":{"class_type":"Sink","inputs":{"in":["1",0]}}}`, message))
				var log journal
				r, err := b.client().Execute(b.ctx, w, log.option())
				require.NoError(t, err)
				assert.Equal(t, comfyui.StatusSucceeded, r.Status)
				assert.Empty(t, r.Outputs)
				if l.heard() {
					assert.Len(t, r.Warnings, warnings)
				}
				log.sane(t)
				b.untouched(r.PromptID)
			}, gate, sink)
		})
	}
}

// The blocker of a job without client id is told to everyone; it is nobody's failure but that job's.
func TestS19BlockedForSomebodyElse(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				c := b.client()
				b.send("POST", "/prompt", `{"prompt":`+fmt.Sprintf(blockedOutput, "theirs")+`}`)
				var log journal
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), log.option())
				succeeded(t, r, err)
				assert.Empty(t, r.Warnings)
				assert.Empty(t, log.of(comfyui.EventWarning))
				log.sane(t)
				b.untouched(r.PromptID)
			}, comfyuitest.WithVersion(release), gate, sink)
		})
	}
}

// loops expands into two nodes that wait for each other: found at run time only. The history then says success, and its
// messages end in an error.
var loops = comfyuitest.WithNode("Loops", comfyuitest.Node{Run: func(_ context.Context, c *comfyuitest.Call) error {
	c.Expand(map[string]any{
		"a": map[string]any{"class_type": "Gate", "inputs": map[string]any{"in": []any{"b", 0}}},
		"b": map[string]any{"class_type": "Gate", "inputs": map[string]any{"in": []any{"a", 0}}},
	}, []any{"a", 0})
	return nil
}})

func TestS20StatusSaysSuccessMessagesSayError(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
		c := b.client()
		var log journal
		j, err := c.Submit(b.ctx, parsed(t, `{
			"1":{"class_type":"Slow","inputs":{}},
			"2":{"class_type":"Loops","inputs":{"after":["1",0]}},
			"3":{"class_type":"Sink","inputs":{"in":["2",0]}}
		}`), log.option())
		require.NoError(t, err)
		time.Sleep(time.Second)
		l.middle(b)
		r, err := j.Wait(b.ctx)
		var failed *comfyui.ExecutionError
		require.ErrorAs(t, err, &failed)
		assert.Contains(t, failed.ExceptionType, "DependencyCycle")
		assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err), "a cycle is the graph's own, whenever it is found")
		require.NotNil(t, r)
		assert.Equal(t, comfyui.StatusFailed, r.Status)
		assert.Equal(t, ranAndFailed, log.states())
		log.sane(t)
		p := b.ranOnce()
		assert.Equal(t, 1, p.Posts)
		entry, err := c.History(b.ctx, r.PromptID)
		require.NoError(t, err)
		assert.Equal(t, "success", entry.Status, "what this test is about")
	}, loops, gate, sink, slow)
}

// slow takes two seconds and saves nothing.
var slow = comfyuitest.WithNode("Slow", comfyuitest.Node{Run: func(ctx context.Context, c *comfyuitest.Call) error {
	return pause(ctx, 2*time.Second)
}})

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

var (
	_ = errors.Is
	_ = math.Inf
	_ = strings.Contains
	_ sync.Mutex
	_ = synctest.Wait
)
