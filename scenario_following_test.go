package comfyui_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"strings"
	"sync"
	"testing"
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
				t := b.t
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
				t := b.t
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

// chatty is a node that says all it can: steps, previews, words, a message of its own.
var chatty = comfyuitest.WithNode("Chatty", comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
	for i := range 8 {
		if err := pause(ctx, 250*time.Millisecond); err != nil {
			return err
		}
		c.ProgressPreview(float64(i+1), 8, "image/jpeg", []byte("\xff\xd8 preview"))
		c.Text("step")
		c.Send("chatty.note", map[string]any{"i": i})
	}
	c.Put("text", "done")
	return nil
}})

// A job without client id is heard by everyone: its steps, previews and words are no news of the jobs that wait.
func TestS21OtherClientsBroadcasts(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, cut}, func(t *testing.T, b *bench, l line) {
		c := b.client(comfyui.WithPreviews())
		silent := func(log *journal, why string) {
			t.Helper()
			assert.Empty(t, log.of(comfyui.EventStarted, comfyui.EventNode, comfyui.EventPreview, comfyui.EventOutput, comfyui.EventOther, comfyui.EventWarning), why)
			for _, ev := range log.all() {
				assert.Zero(t, ev.Progress.Fraction, why)
				assert.Empty(t, ev.Progress.Node, why)
				assert.Zero(t, ev.Progress.Step, why)
			}
		}
		broadcast := func(seed int) {
			b.send("POST", "/prompt", fmt.Sprintf(`{"prompt":{"1":{"class_type":"Chatty","inputs":{"seed":%d}}}}`, seed))
		}

		broadcast(1)
		var waits journal
		first, err := c.Submit(b.ctx, graphOf(t, "Chatty", 100), waits.option())
		require.NoError(t, err)
		broadcast(2)
		var waitsLonger journal
		second, err := c.Submit(b.ctx, graphOf(t, "Chatty", 101), waitsLonger.option())
		require.NoError(t, err)

		time.Sleep(1900 * time.Millisecond)
		silent(&waits, "while the other job runs")
		assert.Equal(t, comfyui.StatusQueued, first.Progress().Status)
		time.Sleep(1100 * time.Millisecond)
		l.middle(b)
		r, err := first.Wait(b.ctx)
		require.NoError(t, err)
		assert.Equal(t, comfyui.StatusSucceeded, r.Status)
		time.Sleep(1500 * time.Millisecond) // the second broadcast is under way, after a job of this stream has ended
		silent(&waitsLonger, "while others run")
		_, err = second.Wait(b.ctx)
		require.NoError(t, err)
		for _, log := range []*journal{&waits, &waitsLonger} {
			log.sane(t)
			if l.heard() {
				previews := log.of(comfyui.EventPreview)
				assert.Len(t, previews, 8, "its own")
				for _, ev := range previews {
					assert.Equal(t, "1", ev.Node, "the node that runs, where the frame names none")
					assert.Equal(t, ev.Node, ev.Preview.Node)
				}
				assert.NotEmpty(t, log.of(comfyui.EventOther))
			}
		}
		for _, p := range b.pod.Prompts() {
			b.untouched(p.ID)
		}
	}, chatty)
}

// A socket that comes up while a job of its client runs is told of the node, without a prompt id. That may be any of the
// client's jobs.
func TestS21ExecutingWithoutPromptID(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				c := b.client(comfyui.WithClientID("me"))
				w := func(node string) *comfyui.Workflow {
					return parsed(t, fmt.Sprintf(`{%q:{"class_type":"Long","inputs":{}},"shared":{"class_type":"Slow","inputs":{}}}`, node))
				}
				_, err := c.Submit(b.ctx, w("a"))
				require.NoError(t, err)
				var log journal
				waiting, err := c.Submit(b.ctx, w("b"), log.option())
				require.NoError(t, err)
				for range 5 {
					time.Sleep(5 * time.Second)
					b.pod.CutStreams(comfyuitest.CutReset)
					b.pod.SendText("", []byte(`{"type":"executing","data":{"node":"b"}}`))
					b.pod.SendText("", []byte(`{"type":"progress","data":{"value":3,"max":4,"node":"b"}}`))
					b.pod.SendText("", []byte(`{"type":"progress","data":{"value":3,"max":4}}`))
					b.pod.SendText("", []byte(`{"type":"executing","data":{"node":null}}`))
					b.pod.SendText("", []byte(`{"type":"execution_success","data":{}}`))
					b.pod.SendText("", []byte(`{"type":"execution_error","data":{"exception_type":"X"}}`))
					b.pod.SendText("", []byte(`{"type":"execution_interrupted","data":{"prompt_id":"somebody's"}}`))
					b.pod.SendText("", []byte(`{"type":"execution_error","data":{"prompt_id":"somebody's","exception_type":"ValueError"}}`))
				}
				assert.Empty(t, log.of(comfyui.EventStarted, comfyui.EventNode, comfyui.EventWarning))
				assert.Equal(t, comfyui.StatusQueued, waiting.Progress().Status)
				r, err := waiting.Wait(b.ctx)
				succeeded(t, r, err)
				log.sane(t)
				for _, p := range b.pod.Prompts() {
					b.untouched(p.ID)
				}
			}, comfyuitest.WithVersion(release), slow)
		})
	}
}

// unfold is a node that becomes three: one that works, one that unfolds again while depth is left, and an output.
var unfold = comfyuitest.WithNode("Unfold", comfyuitest.Node{Run: func(_ context.Context, c *comfyuitest.Call) error {
	depth, _ := c.Inputs["depth"].(json.Number)
	left, _ := depth.Int64()
	inner, inputs := "Slow", map[string]any{}
	if left > 0 {
		inner, inputs = "Unfold", map[string]any{"depth": left - 1, "fail": c.Inputs["fail"]}
	} else if c.Inputs["fail"] == true {
		inner = "Broken"
	}
	c.Expand(map[string]any{
		"a": map[string]any{"class_type": "Work", "inputs": map[string]any{"depth": left}},
		"b": map[string]any{"class_type": inner, "inputs": inputs},
		"c": map[string]any{"class_type": "Work", "inputs": map[string]any{"after": []any{"b", 0}}},
	}, []any{"b", 0})
	return nil
}})

var broken = comfyuitest.WithNode("Broken", comfyuitest.Node{Run: func(ctx context.Context, _ *comfyuitest.Call) error {
	return &comfyuitest.NodeError{ExceptionType: "ValueError", Message: "inner trouble"}
}})

// A subgraph that the editor has flattened ("57:8"), and behind it a node that unfolds at run time, twice.
const unfolding = `{
	"57:8":{"class_type":"Slow","inputs":{}},
	"57":{"class_type":"Unfold","inputs":{"depth":1,"fail":%t,"after":["57:8",0]}},
	"9":{"class_type":"Work","inputs":{"after":["57",0]}}
}`

func TestS22ExpandingNodes(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
		c := b.client()
		var log journal
		j, err := c.Submit(b.ctx, parsed(t, fmt.Sprintf(unfolding, false)), log.option())
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		l.middle(b)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		log.sane(t)
		inProgressOf(t, &log, "57:8", "57", "9")
		assert.Equal(t, wentWell, log.states())
		b.untouched(r.PromptID)
		inner := map[string]bool{}
		for _, o := range r.Outputs {
			inner[o.Node] = true
		}
		assert.Len(t, inner, 5, "two of each unfolding, one of the graph: %v", inner)
		assert.Contains(t, inner, "9")
		if l.heard() {
			var nodes []string
			for _, ev := range log.of(comfyui.EventNode) {
				if len(nodes) == 0 || nodes[len(nodes)-1] != ev.Node {
					nodes = append(nodes, ev.Node)
				}
			}
			assert.Subset(t, nodes, []string{"57:8", "57", "9"})
			steps := log.of(comfyui.EventProgress)
			assert.Greater(t, len(steps), 8)
			assert.Equal(t, 3, log.all()[len(log.all())-1].Progress.NodesDone)
		}
	}, unfold, slow)
}

// inProgressOf asserts that all events are in terms of the workflow's own nodes.
func inProgressOf(t *testing.T, log *journal, nodes ...string) {
	t.Helper()
	for _, ev := range log.all() {
		assert.Equal(t, len(nodes), ev.Progress.NodesTotal, "%s", ev.Kind)
		if ev.Progress.Node != "" {
			assert.Contains(t, nodes, ev.Progress.Node, "%s", ev.Kind)
			assert.NotEmpty(t, ev.Progress.NodeClass, "%s at %s", ev.Kind, ev.Progress.Node)
		}
		if ev.Kind == comfyui.EventNode || ev.Kind == comfyui.EventProgress && ev.Node != "" {
			assert.Contains(t, nodes, ev.Node, "%s", ev.Kind)
		}
	}
}

// An inner node fails: the outer one is named.
func TestS22InnerNodeFails(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		var log journal
		r, err := b.client().Execute(b.ctx, parsed(t, fmt.Sprintf(unfolding, true)), log.option())
		var failed *comfyui.ExecutionError
		require.ErrorAs(t, err, &failed)
		assert.Equal(t, "57", failed.NodeID)
		assert.Equal(t, "inner trouble", failed.Message)
		require.NotNil(t, r)
		log.sane(t)
		inProgressOf(t, &log, "57:8", "57", "9")
		assert.Equal(t, 1, b.ranOnce().Posts)
	}, unfold, slow, broken)
}

// From the cache an expansion shows none of its inner outputs, in no frame and not in the history: not the library's to invent.
func TestS22ExpansionFromTheCache(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		c := b.client()
		w := parsed(t, fmt.Sprintf(unfolding, false))
		r, err := c.Execute(b.ctx, w)
		succeeded(t, r, err)
		var log journal
		r, err = c.Execute(b.ctx, w, log.option())
		succeeded(t, r, err)
		log.sane(t)
		inProgressOf(t, &log, "57:8", "57", "9")
		assert.ElementsMatch(t, []string{"57:8", "57", "9"}, r.CachedNodes)
		assert.Empty(t, log.of(comfyui.EventNode))
		b.untouched(r.PromptID)
	}, unfold, slow)
}

// odd puts out what JSON in Go cannot say, and sends messages of its own.
var odd = comfyuitest.WithNode("Odd", comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
	for i, data := range []any{map[string]any{"prompt_id": c.PromptID, "x": 1}, []any{1, nil}, nil, "text", 7} {
		c.Send("odd.message", data)
		c.Progress(float64(i+1), 5)
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	c.Put("loss", math.NaN(), math.Inf(1), math.Inf(-1), 1.5)
	c.Put("text", "NaN", "Infinity")
	c.Put("animated", true, false)
	c.Put("nested", map[string]any{"list": []any{nil, 1, "x"}}, nil)
	c.Put("none")
	c.Save("images", "output", "odd.png", []byte("png"))
	return nil
}})

func TestS23NaNAndUnknownMessages(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
		store := comfyui.NewMemoryStore()
		c := b.client(comfyui.WithStore(store))
		var log journal
		j, err := c.Submit(b.ctx, graphOf(t, "Odd", 1), comfyui.WithJobID("odd"), log.option())
		require.NoError(t, err)
		time.Sleep(500 * time.Millisecond)
		l.middle(b)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		log.sane(t)
		assert.Equal(t, wentWell, log.states())
		b.untouched(r.PromptID)

		byKey := map[string][]comfyui.Output{}
		for _, o := range r.Outputs {
			byKey[o.Key] = append(byKey[o.Key], o)
		}
		require.Len(t, byKey["loss"], 1, "what is no number is null, and null is left out")
		assert.JSONEq(t, "1.5", string(byKey["loss"][0].Raw))
		require.Len(t, byKey["text"], 2)
		assert.Equal(t, "NaN", byKey["text"][0].Text)
		require.Len(t, byKey["images"], 1)
		assert.Equal(t, "odd.png", byKey["images"][0].File.Filename)

		// All of it goes through JSON, whatever the node put out.
		_, err = json.Marshal(r)
		require.NoError(t, err)
		for _, ev := range log.all() {
			data, err := json.Marshal(ev)
			require.NoError(t, err, "%s", ev.Kind)
			require.NoError(t, json.Unmarshal(data, &comfyui.Event{}))
		}
		rec, err := store.Get(b.ctx, "odd")
		require.NoError(t, err)
		_, err = json.Marshal(rec)
		require.NoError(t, err)

		if l.heard() {
			others := log.of(comfyui.EventOther)
			require.NotEmpty(t, others)
			assert.JSONEq(t, fmt.Sprintf(`{"type":"odd.message","data":{"prompt_id":%q,"x":1}}`, r.PromptID), string(others[0].Raw))
		}
	}, odd)
}

// Frames of every broken and oversized form, in the middle of a job: skipped, and the socket hears what comes after.
func TestS23BrokenFrames(t *testing.T) {
	t.Parallel()
	be := func(n ...uint32) string {
		var b []byte
		for _, v := range n {
			b = binary.BigEndian.AppendUint32(b, v)
		}
		return string(b)
	}
	binaries := []string{
		"", "\x00", be(1), be(1, 1), be(2, 2), be(1, 99) + "image", be(3), be(3, 4), be(3, 1<<31) + "1", be(3, 0) + "text of nobody", be(4), be(4, 1<<31),
		be(4, 5) + "{", be(4, 2) + "{}", be(4, 4) + "null", be(4, 2) + "[]image", be(99, 1) + "future", be(1<<31, 0),
		be(1, 1) + strings.Repeat("x", 5<<20), be(4, 1<<20) + strings.Repeat("[", 1<<20), be(3, 1) + strings.Repeat("x", 3<<20), be(77) + strings.Repeat("x", 5<<20),
	}
	texts := []string{
		"", "{", "null", "[]", `"text"`, "7", "NaN", `{"type":null}`, `{"type":7,"data":{}}`, `{"type":"status"}`, `{"type":"status","data":null}`,
		`{"type":"status","data":{"status":{"exec_info":null}}}`, `{"type":"status","data":{"status":{"exec_info":{"queue_remaining":-1}}}}`,
		`{"type":"status","data":{"status":{"exec_info":{"queue_remaining":1e99}}}}`, `{"data":{}}`, `{"type":"progress_state"}`, "\xff\xfe", "{\"type\":\"\xc3\"}",
		`{"type":"x","data":` + strings.Repeat("[", 100_000) + `}`, `{"type":"x","data":"` + strings.Repeat("y", 9<<20) + `"}`,
		`{"type":"executed","data":{"node":"1","output":{"x":[NaN,-Infinity,Infinity]},"prompt_id":"somebody's"}}`,
	}
	for _, previews := range []bool{false, true} {
		t.Run(fmt.Sprintf("previews=%t", previews), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				opts := []comfyui.Option{comfyui.WithClientID("me")}
				if previews {
					opts = append(opts, comfyui.WithPreviews())
				}
				c := b.client(opts...)
				var log journal
				j, err := c.Submit(b.ctx, graphOf(t, "Long", 1), log.option())
				require.NoError(t, err)
				for _, frame := range texts {
					time.Sleep(time.Second)
					b.pod.SendText("me", []byte(frame))
				}
				for _, frame := range binaries {
					time.Sleep(time.Second)
					b.pod.SendBinary("me", []byte(frame))
				}
				time.Sleep(2 * time.Second)
				assert.Equal(t, comfyui.StreamUp, c.Stats().Stream)
				assert.EqualValues(t, 1, c.Stats().Dials, "the connection is the first one")
				assert.Positive(t, c.Stats().FramesSkipped)
				before := j.Progress().Step
				assert.Greater(t, before, 40.0, "and it hears")
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				assert.Equal(t, wentWell, log.states())
				log.sane(t)
				b.untouched(r.PromptID)
			})
		})
	}
}

// The event loop stands still for a minute, or for five, at any moment: the pod is busy, not dead; nothing is lost or repeated.
func TestS24EventLoopFrozen(t *testing.T) {
	t.Parallel()
	for _, frozen := range []time.Duration{time.Minute, 5 * time.Minute} {
		for _, at := range []time.Duration{0, time.Millisecond, time.Second, 1999 * time.Millisecond} {
			for _, l := range []line{streaming, polling, cut} {
				t.Run(fmt.Sprintf("%s from %s on/%s", frozen, at, l), func(t *testing.T) {
					t.Parallel()
					bubble(t, func(b *bench) {
						t := b.t
						l.open(b)
						c := b.client()
						r, err := c.Execute(b.ctx, graphOf(t, "Work", 0))
						succeeded(t, r, err)
						var log journal
						if at == 0 {
							b.freeze(frozen)
						}
						j, err := c.Submit(b.ctx, graphOf(t, "Work", 1), log.option())
						require.NoError(t, err)
						if at > 0 {
							time.Sleep(at)
							l.middle(b)
							b.freeze(frozen)
						}
						r, err = j.Wait(b.ctx)
						succeeded(t, r, err)
						assert.Equal(t, wentWell, log.states())
						log.sane(t)
						b.untouched(r.PromptID)
						assert.Len(t, b.pod.Prompts(), 2)
					})
				})
			}
		}
	}
}

// freeze stops the pod's event loop for a time.
func (b *bench) freeze(d time.Duration) {
	thaw := b.pod.Freeze()
	time.AfterFunc(d, thaw)
}

// A POST that the frozen pod takes in when it wakes, long after it was given up: also the caller who allows one POST only gets his
// one run.
func TestS24FrozenAtThePost(t *testing.T) {
	t.Parallel()
	for _, release := range releases {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				b.pod.RefuseStreams(403)
				c := b.client()
				b.freeze(3 * time.Minute)
				var log journal
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.AtMostOnce(), log.option())
				succeeded(t, r, err)
				assert.Equal(t, wentWell, log.states())
				log.sane(t)
				b.untouched(r.PromptID)
				b.ranOnce()
			}, comfyuitest.WithVersion(release))
		})
	}
}

// A job that has ended before Submit returns: Wait returns at once, with the outputs.
func TestS25FastJob(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		opts []comfyuitest.Option
	}{{"quick", nil}, {"quick and its answer late", []comfyuitest.Option{slowAnswer(http.MethodPost, "/prompt", 5*time.Second)}}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, l line) {
				c := b.client()
				for i := range 3 {
					var log journal
					j, err := c.Submit(b.ctx, graphOf(t, "Quick", i/2), log.option()) // the second is cached
					require.NoError(t, err)
					submitted := time.Now()
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
					most := 10 * time.Millisecond
					if l == polling {
						most = 1100 * time.Millisecond // one poll
					}
					assert.LessOrEqual(t, time.Since(submitted), most)
					again, err := j.Wait(b.ctx)
					succeeded(t, again, err)
					assert.Equal(t, r, again)
					assert.Equal(t, wentWell, log.states())
					log.sane(t)
					b.untouched(r.PromptID)

					// Who comes after the end sees where it stands, and the end.
					var kinds []comfyui.EventKind
					for ev := range j.Events(b.ctx) {
						kinds = append(kinds, ev.Kind)
					}
					assert.Equal(t, []comfyui.EventKind{comfyui.EventSnapshot, comfyui.EventSucceeded}, kinds)
				}
			}, append(tc.opts, comfyuitest.WithNode("Quick", comfyuitest.Steps(1, 0)))...)
		})
	}
}

// Who comes in the middle sees first where the job stands, by its attempt too.
func TestS25EventsFromTheMiddle(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		j, err := b.client().Submit(b.ctx, graphOf(t, "Fails", 1))
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		first := true
		for ev := range j.Events(b.ctx) {
			assert.Equal(t, first, ev.Kind == comfyui.EventSnapshot, "%s", ev.Kind)
			assert.Equal(t, 2, ev.Attempt, "%s", ev.Kind)
			assert.Equal(t, j.PromptID(), ev.PromptID, "%s", ev.Kind)
			first = false
		}
		assert.False(t, first)
	}, comfyuitest.WithNode("Fails", failsFirst()))
}

// echo puts out its seed after a step or two.
var echo = comfyuitest.WithNode("Echo", comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
	if err := pause(ctx, 30*time.Millisecond); err != nil {
		return err
	}
	c.Progress(1, 1)
	c.Put("text", fmt.Sprint(c.Inputs["seed"]))
	return nil
}})

// Many jobs of one client at once, each workflow twice: each gets its own prompt and its own outputs.
func TestS26ManyJobsNoMixUp(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, lines, func(t *testing.T, b *bench, l line) {
		c := b.client()
		const jobs = 60
		var wg sync.WaitGroup
		results := make([]*comfyui.Result, jobs)
		logs := make([]journal, jobs)
		for i := range jobs {
			wg.Go(func() {
				r, err := c.Execute(b.ctx, graphOf(t, "Echo", i/2), comfyui.WithLabels(map[string]string{"i": fmt.Sprint(i)}), logs[i].option())
				if assert.NoError(t, err, "job %d", i) {
					results[i] = r
				}
			})
		}
		time.Sleep(500 * time.Millisecond)
		l.middle(b)
		wg.Wait()
		prompts := map[string]bool{}
		for i, r := range results {
			require.NotNil(t, r, "job %d", i)
			require.Len(t, r.Outputs, 1)
			assert.Equal(t, fmt.Sprint(i/2), r.Outputs[0].Text)
			assert.Equal(t, fmt.Sprint(i), r.Labels["i"])
			prompts[r.PromptID] = true
			b.untouched(r.PromptID)
			assert.Equal(t, wentWell, logs[i].states(), "job %d", i)
			logs[i].sane(t)
			for _, ev := range logs[i].of(comfyui.EventOutput, comfyui.EventSucceeded) {
				require.Len(t, ev.Outputs, 1)
				assert.Equal(t, fmt.Sprint(i/2), ev.Outputs[0].Text)
			}
		}
		assert.Len(t, prompts, jobs)
		assert.Len(t, b.pod.Prompts(), jobs, "and no other prompt")
		assert.EqualValues(t, jobs, c.Stats().Succeeded)
		assert.Zero(t, c.Stats().Following)
	}, echo)
}

// The same with lost replies: what is found on the pod is the job's own attempt, not its twin's.
func TestS26TwinsWithLostReplies(t *testing.T) {
	t.Parallel()
	everywhere(t, releases, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.DropAfter, Times: 6})
		c := b.client()
		var wg sync.WaitGroup
		var mu sync.Mutex
		prompts := map[string]bool{}
		for range 12 {
			wg.Go(func() {
				r, err := c.Execute(b.ctx, graphOf(t, "Echo", 1))
				if !assert.NoError(t, err) {
					return
				}
				mu.Lock()
				defer mu.Unlock()
				prompts[r.PromptID] = true
			})
		}
		wg.Wait()
		assert.Len(t, prompts, 12)
		assert.Len(t, b.pod.Prompts(), 12)
		for id := range prompts {
			b.untouched(id)
		}
		assert.EqualValues(t, 6, c.Stats().AmbiguousPosts)
	}, echo)
}
