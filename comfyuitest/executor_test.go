package comfyuitest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// scripted is an output node of a few lines.
func scripted(run func(c *Call) error) Node {
	return Node{Output: true, Run: func(_ context.Context, c *Call) error { return run(c) }}
}

// terminal is the last event of a job that the history keeps.
func terminal(t *testing.T, p *Pod, id string) (string, object) {
	t.Helper()
	messages := at(t, get(t, p, "/history/"+id), id, "status", "messages").([]any)
	last := messages[len(messages)-1]
	return at(t, last, 0).(string), at(t, last, 1).(object)
}

func interruptBody(id string) string {
	if id == "" {
		return ""
	}
	return `{"prompt_id": "` + id + `"}`
}

// TestInterrupt: one flag for the pod, reset when a job starts, seen at node starts and ticks only.
func TestInterrupt(t *testing.T) {
	t.Parallel()

	for _, c := range []struct {
		name  string
		ticks bool
		graph string
		want  string
		node  string
	}{
		{"at a tick", true, graphOf("1", "Gate", nil), "execution_interrupted", "1"},
		{"a last node without ticks succeeds", false, graphOf("1", "Gate", nil), "execution_success", ""},
		{"at the next node", false, graphOf("1", "Gate", nil, "2", "Work", object{{"after", []any{"1", 0}}}), "execution_interrupted", "2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			gated(t, c.ticks, func(t *testing.T, p *Pod, g *gate) {
				id := queue1(t, p, c.graph, "me")
				<-g.entered
				next := queue1(t, p, graphOf("1", "Work", nil), "me")
				require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/interrupt", interruptBody(id)).status)
				g.pass <- struct{}{}
				require.NoError(t, p.WaitIdle(t.Context()))
				event, data := terminal(t, p, id)
				require.Equal(t, c.want, event)
				if c.node != "" {
					require.Equal(t, c.node, at(t, data, "node_id"))
					require.Equal(t, "error", at(t, get(t, p, "/history/"+id), id, "status", "status_str"))
					require.Equal(t, 1, p.Prompts()[0].Interrupts)
				}
				event, _ = terminal(t, p, next)
				require.Equal(t, "execution_success", event, "the next job is not hit")
			}, WithNode("Work", Node{Output: true}))
		})
	}

	t.Run("a node that looks at ctx", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, p *Pod) {
			id := queue1(t, p, graphOf("1", "Wait", nil), "")
			synctest.Wait()
			p.Interrupt()
			require.NoError(t, p.WaitIdle(t.Context()))
			event, _ := terminal(t, p, id)
			require.Equal(t, "execution_interrupted", event)
		}, WithNode("Wait", Node{Output: true, Run: func(ctx context.Context, _ *Call) error {
			<-ctx.Done()
			return ctx.Err()
		}}))
	})

	t.Run("steps see it at the next step", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, p *Pod) {
			began := time.Now()
			queue1(t, p, graphOf("1", "Work", nil), "")
			time.Sleep(90 * time.Minute)
			p.Interrupt()
			require.NoError(t, p.WaitIdle(t.Context()))
			require.Equal(t, 2*time.Hour, time.Since(began))
		}, WithNode("Work", Steps(10, time.Hour)))
	})

	t.Run("while nothing runs", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, p *Pod) {
			p.Interrupt()
			id := queue1(t, p, graphOf("1", "Work", nil), "")
			require.NoError(t, p.WaitIdle(t.Context()))
			event, _ := terminal(t, p, id)
			require.Equal(t, "execution_success", event)
		}, WithNode("Work", Steps(2, time.Second)))
	})
}

// TestInterruptBeforeTheStart: the flag is reset when a job starts, so that what came just before is lost.
func TestInterruptBeforeTheStart(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.chance.pace = func(_, step string) {
			if step == paceTake {
				p.Interrupt()
			}
		}
		id := queue1(t, p, graphOf("1", "Work", nil), "")
		require.NoError(t, p.WaitIdle(t.Context()))
		event, _ := terminal(t, p, id)
		require.Equal(t, "execution_success", event)
		require.Zero(t, p.Prompts()[0].Interrupts)
	}, WithNode("Work", Steps(3, time.Second)))
}

func TestInterruptRoute(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, version string
		body          func(running, pending string) string
		status        int
		hits          bool
	}{
		{"the running one", "0.27.0", func(running, _ string) string { return interruptBody(running) }, 200, true},
		{"a pending one", "0.27.0", func(_, pending string) string { return interruptBody(pending) }, 200, false},
		{"an unknown one", "0.27.0", func(_, _ string) string { return interruptBody("unknown") }, 200, false},
		{"bare", "0.27.0", func(_, _ string) string { return "" }, 200, true},
		{"an object without id", "0.27.0", func(_, _ string) string { return "{}" }, 200, true},
		{"an empty id", "0.27.0", func(_, _ string) string { return `{"prompt_id": ""}` }, 200, true},
		{"a null id", "0.27.0", func(_, _ string) string { return `{"prompt_id": null}` }, 200, true},
		{"no JSON", "0.27.0", func(_, _ string) string { return `{"prompt` }, 200, true},
		{"a list", "0.27.0", func(_, _ string) string { return `[]` }, 500, false},
		{"old servers ignore the id", "0.3.56", func(_, pending string) string { return interruptBody(pending) }, 200, true},
		{"since 0.3.57 they do not", "0.3.57", func(_, pending string) string { return interruptBody(pending) }, 200, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			gated(t, true, func(t *testing.T, p *Pod, g *gate) {
				running := queue1(t, p, graphOf("1", "Gate", nil), "")
				<-g.entered
				pending := queue1(t, p, graphOf("1", "Work", nil), "")
				r := do(t, p, http.MethodPost, "/interrupt", c.body(running, pending))
				require.Equal(t, c.status, r.status)
				if c.status == http.StatusOK {
					require.Empty(t, r.body)
				}
				g.pass <- struct{}{}
				require.NoError(t, p.WaitIdle(t.Context()))
				event, _ := terminal(t, p, running)
				require.Equal(t, c.hits, event == "execution_interrupted")
				event, _ = terminal(t, p, pending)
				require.Equal(t, "execution_success", event)
			}, WithVersion(c.version), WithNode("Work", Node{Output: true}))
		})
	}
}

// The hidden inputs of a class stand among the current inputs of its failure: for a SaveImage the whole graph.
func TestHiddenInputsOfAFailure(t *testing.T) {
	t.Parallel()
	hidden := map[string]any{"required": map[string]any{}, "hidden": map[string]any{
		"unique_id": "UNIQUE_ID", "key": "API_KEY_COMFY_ORG", "info": "EXTRA_PNGINFO",
	}}
	paid := Fail("ValueError", "bad")
	paid.Inputs = hidden
	bubble(t, func(t *testing.T, p *Pod) {
		for _, c := range []struct{ graph, rest, inputs string }{
			{
				graphOf("3", "SaveImage", object{{"images", "x"}, {"filename_prefix", "y"}}), ``,
				`{"images": ["x"], "filename_prefix": ["y"], "prompt": ["{'3': {'class_type': 'SaveImage', 'inputs': {'images': 'x', 'filename_prefix': 'y'}}}"], "extra_pnginfo": [null]}`,
			},
			{
				graphOf("5", "Paid", nil), `, "extra_data": {"api_key_comfy_org": "secret", "extra_pnginfo": {"workflow": 1}}`,
				`{"unique_id": ["5"], "key": ["secret"], "info": ["{'workflow': 1}"]}`,
			},
		} {
			r := do(t, p, http.MethodPost, "/prompt", `{"prompt": `+c.graph+c.rest+`}`)
			require.Equal(t, http.StatusOK, r.status, "%s", r.body)
			require.NoError(t, p.WaitIdle(t.Context()))
			prompts := p.Prompts()
			event, data := terminal(t, p, prompts[len(prompts)-1].ID)
			require.Equal(t, "execution_error", event)
			require.JSONEq(t, c.inputs, string(pyJSON(at(t, data, "current_inputs"))))
		}
	}, WithVersion("0.27.0"), WithNode("Paid", paid))
}

func TestNodeErrors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, version string
		node          Node
		typ, message  string
	}{
		{"of a type", "0.27.0", Fail("ValueError", "bad"), "ValueError", "bad\n"},
		{"without message", "0.27.0", Fail("Exception", ""), "Exception", "\n"},
		{"before 0.3.42", "0.3.41", Fail("ValueError", "bad"), "ValueError", "bad"},
		{"out of memory", "0.27.0", Fail("torch.OutOfMemoryError", "Allocation on device"), "torch.OutOfMemoryError", "Allocation on device\n" + tipsMemory},
		{"accelerator", "0.27.0", Fail("torch.AcceleratorError", "CUDA error: out of memory"), "torch.AcceleratorError", "CUDA error: out of memory\n" + tipsMemory},
		{"accelerator, not taken as out of memory", "0.3.64", Fail("torch.AcceleratorError", "CUDA error: out of memory"), "torch.AcceleratorError", "CUDA error: out of memory\n"},
		{"a Go error", "0.27.0", scripted(func(*Call) error { return errors.New("plain") }), "RuntimeError", "plain\n"},
		{"a wrapped one", "0.27.0", scripted(func(*Call) error {
			return fmt.Errorf("outer: %w", &NodeError{"KeyError", "'x'"})
		}), "KeyError", "'x'\n"},
		{"a panic", "0.27.0", scripted(func(*Call) error { panic("oops") }), "RuntimeError", "panic: oops\n"},
		{"an error that cannot tell its text", "0.27.0", scripted(func(*Call) error {
			var none *NodeError
			return none
		}), "RuntimeError", "panic: runtime error: invalid memory address or nil pointer dereference\n"},
		{"a goroutine that ends itself", "0.27.0", scripted(func(*Call) error { runtime.Goexit(); return nil }), "RuntimeError", "the node ended its goroutine\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				id := queue1(t, p, graphOf("3", "Make", nil, "4", "Work", object{{"text", "x"}, {"number", 1.5}, {"image", []any{"3", 0}}}), "me")
				data := s.until("execution_error").data0(t)
				require.Equal(t, "status", s.next().event(), "the history is written after the terminal event")
				require.Equal(t, `{"type": "executing", "data": {"node": null, "prompt_id": "`+id+`"}}`, string(s.next().data))
				require.Equal(t, c.typ, at(t, data, "exception_type"))
				require.Equal(t, c.message, at(t, data, "exception_message"))
				require.Equal(t, "4", at(t, data, "node_id"))
				require.Equal(t, "Work", at(t, data, "node_type"))
				require.Equal(t, []any{"3"}, at(t, data, "executed"))
				require.Equal(t, `{"text": ["x"], "number": [1.5], "image": ["a picture"]}`, string(pyJSON(at(t, data, "current_inputs"))))
				require.NotEmpty(t, at(t, data, "traceback"))
				event, kept := terminal(t, p, id)
				require.Equal(t, "execution_error", event)
				require.Equal(t, data, kept)
				require.Equal(t, Prompt{ID: id, Posts: 1, Runs: 1}, counts(p.Prompts()[0]))
			}, WithVersion(c.version), WithNode("Work", c.node),
				WithNode("Make", Node{Run: func(_ context.Context, c *Call) error { c.Return("a picture"); return nil }}))
		})
	}
}

func TestErrorWithoutClient(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "bystander")
		s.until("status")
		queue1(t, p, graphOf("1", "Work", nil), "")
		require.NoError(t, p.WaitIdle(t.Context()))
		synctest.Wait()
		require.NotContains(t, s.pending(), "execution_error")
		s.abort()
	}, WithNode("Work", Fail("ValueError", "bad")))

	gated(t, true, func(t *testing.T, p *Pod, g *gate) {
		s := dial(t, p, "bystander")
		queue1(t, p, graphOf("1", "Gate", nil), "")
		<-g.entered
		p.Interrupt()
		g.pass <- struct{}{}
		s.until("execution_interrupted")
	})
}

func TestBlockedOutputs(t *testing.T) {
	t.Parallel()
	block := func(message string) Option {
		return WithNode("Block", Node{Run: func(_ context.Context, c *Call) error { c.Block(message); return nil }})
	}
	graph := graphOf("1", "Block", nil, "2", "Pass", object{{"in", []any{"1", 0}}}, "3", "Show", object{{"in", []any{"2", 0}}}, "4", "Show", object{{"in", 1}})
	opts := []Option{
		WithNode("Pass", Node{Run: func(_ context.Context, c *Call) error { c.Return(c.Inputs["in"]); return nil }}),
		WithNode("Show", scripted(func(c *Call) error { c.Put("text", fmt.Sprint(c.Inputs["in"])); return nil })),
	}
	for _, client := range []string{"me", ""} {
		t.Run("message, client "+client, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				id := queue1(t, p, graph, client)
				data := s.until("execution_error").data0(t)
				require.Equal(t, "ExecutionBlocked", at(t, data, "exception_type"))
				require.Equal(t, "Execution Blocked: no face", at(t, data, "exception_message"))
				require.Equal(t, "2", at(t, data, "node_id"), "the first node that is blocked tells, once")
				_, has := data.get("timestamp")
				require.False(t, has)
				require.NoError(t, p.WaitIdle(t.Context()))
				synctest.Wait()
				require.NotContains(t, s.pending(), "execution_error")
				event, _ := terminal(t, p, id)
				require.Equal(t, "execution_success", event)
				require.Equal(t, `{"4": {"text": ["1"]}}`, string(pyJSON(at(t, get(t, p, "/history/"+id), id, "outputs"))))
			}, append(opts, block("no face"))...)
		})
	}
	t.Run("silent", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, p *Pod) {
			s := dial(t, p, "me")
			id := queue1(t, p, graph, "me")
			require.NotContains(t, events(s.job()), "execution_error")
			require.Len(t, at(t, get(t, p, "/history/"+id), id, "outputs"), 1)
		}, append(opts, block(""))...)
	})
}

// TestCache: what is cached shows no node running, and says its output again.
func TestCache(t *testing.T) {
	t.Parallel()
	opts := []Option{
		WithNode("Make", Node{Run: func(_ context.Context, c *Call) error { c.Return(c.Inputs["n"]); return nil }}),
		WithNode("Show", scripted(func(c *Call) error { c.Put("text", fmt.Sprint(c.Inputs["in"])); return nil })),
		WithNode("Quiet", Node{Output: true}),
	}
	graph := func(n int) string {
		return graphOf("1", "Make", object{{"n", n}}, "2", "Show", object{{"in", []any{"1", 0}}}, "3", "Quiet", object{{"in", []any{"1", 0}}})
	}
	for _, c := range []struct {
		version string
		keeps   bool // the outputs of jobs before the last one
		history int  // outputs of a cached job without a client
	}{{"0.3.64", false, 1}, {"0.22.0", false, 0}, {"0.27.0", true, 0}, {"0.28.0", true, 1}} {
		t.Run(c.version, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				queue1(t, p, graph(1), "me")
				s.job()
				id := queue1(t, p, graph(1), "me")
				frames := s.job()
				require.Equal(t, []string{
					"execution_start", "execution_cached", "executed", "progress_state", "executed", "progress_state", "execution_success", "executing",
				}, events(frames))
				require.Equal(t, []any{"1", "2", "3"}, at(t, frames[1].data0(t), "nodes"))
				require.Equal(t, `{"text": ["1"]}`, string(pyJSON(at(t, frames[2].data0(t), "output"))))
				require.Nil(t, at(t, frames[4].data0(t), "output"))
				require.Contains(t, string(frames[3].data), `"2": {"value": 1, "max": 1, "state": "finished"`)
				require.Len(t, at(t, get(t, p, "/history/"+id), id, "outputs"), 1)

				id = queue1(t, p, graph(1), "")
				require.NoError(t, p.WaitIdle(t.Context()))
				require.Len(t, at(t, get(t, p, "/history/"+id), id, "outputs"), c.history)

				queue1(t, p, graph(2), "me")
				require.Empty(t, at(t, s.job()[1].data0(t), "nodes"))
				queue1(t, p, graph(1), "me")
				require.Equal(t, c.keeps, len(at(t, s.job()[1].data0(t), "nodes").([]any)) > 0)

				require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/free", `{"free_memory": true}`).status)
				require.NoError(t, p.WaitIdle(t.Context()))
				queue1(t, p, graph(1), "me")
				require.Empty(t, at(t, s.job()[1].data0(t), "nodes"), "/free clears the cache, at once when idle")
			}, append(opts, WithVersion(c.version))...)
		})
	}
}

func TestPartlyCached(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		queue1(t, p, graphOf("1", "Make", nil, "2", "Show", object{{"in", []any{"1", 0}}, {"n", 1}}), "me")
		s.job()
		// Ids do not count: what counts is the class and what is before it.
		queue1(t, p, graphOf("5", "Make", nil, "6", "Show", object{{"in", []any{"5", 0}}, {"n", 2}}), "me")
		frames := s.job()
		require.Equal(t, []any{"5"}, at(t, frames[1].data0(t), "nodes"))
		require.Contains(t, string(frames[3].data), `"node": "6"`)
	}, WithNode("Make", Node{}), WithNode("Show", Node{Output: true}))
}

func TestLists(t *testing.T) {
	t.Parallel()
	opts := []Option{
		WithNode("List", Node{OutputIsList: []bool{true, false}, Run: func(_ context.Context, c *Call) error {
			c.Return([]any{"a", "b", "c"}, "same")
			return nil
		}}),
		WithNode("Each", Node{Run: func(_ context.Context, c *Call) error {
			c.Progress(1, 1)
			c.Return(fmt.Sprintf("%v %v %v", c.Inputs["x"], c.Inputs["y"], c.Inputs["z"]))
			return nil
		}}),
		WithNode("All", Node{Output: true, InputIsList: true, Run: func(_ context.Context, c *Call) error {
			c.Put("text", c.Inputs["in"].([]any)...)
			return nil
		}}),
		WithNode("One", scripted(func(c *Call) error { c.Put("text", c.Inputs["in"]); return nil })),
	}
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		id := queue1(t, p, graphOf("1", "List", nil,
			"2", "Each", object{{"x", []any{"1", 0}}, {"y", []any{"1", 1}}, {"z", 7}},
			"3", "All", object{{"in", []any{"2", 0}}}, "4", "One", object{{"in", []any{"2", 0}}}), "me")
		frames := s.job()
		ticks := slices.DeleteFunc(events(frames), func(event string) bool { return event != "progress" })
		require.Len(t, ticks, 3, "the steps start again for each item")
		outputs := at(t, get(t, p, "/history/"+id), id, "outputs")
		want := []any{"a same 7", "b same 7", "c same 7"}
		require.Equal(t, want, at(t, outputs, "3", "text"))
		require.Equal(t, want, at(t, outputs, "4", "text"), "the outputs of a node's calls are joined")
	}, opts...)
}

func TestExpansion(t *testing.T) {
	t.Parallel()
	node := func(class string, inputs map[string]any) map[string]any {
		return map[string]any{"class_type": class, "inputs": inputs}
	}
	picture := struct{ pixels int }{3} // no JSON
	expand := Node{Run: func(_ context.Context, c *Call) error {
		graph := map[string]any{
			"1": node("Inner", map[string]any{"in": picture}),
			"2": node("Inner", map[string]any{"in": []any{"1", 0}, "outer": []any{"56", 0}}),
			"9": node("Show", map[string]any{"in": []any{"2", 0}}),
		}
		switch c.Inputs["mode"] {
		case "cycle":
			graph["1"] = node("Inner", map[string]any{"in": []any{"2", 0}})
			delete(graph, "9")
		case "fail":
			graph["2"] = node("Broken", map[string]any{"in": []any{"1", 0}})
		case "nested":
			graph["1"] = node("Expand", map[string]any{"mode": "plain"})
		case "unknown":
			graph["1"] = node("Missing", nil)
		}
		c.Expand(graph, []any{"2", 0}, "constant")
		return nil
	}}
	opts := []Option{
		WithNode("Expand", expand), WithNode("Broken", Fail("ValueError", "inner")), WithNode("Source", Node{}),
		WithNode("Inner", Node{Run: func(_ context.Context, c *Call) error { c.Return(c.Inputs["in"]); return nil }}),
		WithNode("Show", scripted(func(c *Call) error { c.Put("text", fmt.Sprintf("%v %v", c.Inputs["in"], c.Inputs["also"])); return nil })),
	}
	graph := func(mode string) string {
		return graphOf("56", "Source", nil, "57", "Expand", object{{"mode", mode}, {"outer", []any{"56", 0}}},
			"60", "Show", object{{"in", []any{"57", 0}}, {"also", []any{"57", 1}}})
	}
	for _, version := range []string{"0.3.64", "0.27.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				id := queue1(t, p, graph("plain"), "me")
				var running []string
				for _, f := range s.job() {
					if f.event() == "executing" {
						data := f.data0(t)
						running = append(running, fmt.Sprint(data[0].value, " ", data[1].value))
					}
				}
				require.Equal(t, []string{"56 56", "57 57", "57.0.0.1 57", "57.0.0.2 57"}, running[:4])
				require.ElementsMatch(t, []string{"57.0.0.9 57", "60 60"}, running[4:6])
				entry := get(t, p, "/history/"+id)
				require.Equal(t, []any{"{3} <nil>"}, at(t, entry, id, "outputs", "57.0.0.9", "text"), "outputs stand under the inner id")
				require.Equal(t, []any{"{3} constant"}, at(t, entry, id, "outputs", "60", "text"))
				require.Equal(t, `{"node_id": "57.0.0.9", "display_node": "57", "parent_node": "57", "real_node_id": "57"}`,
					string(pyJSON(at(t, entry, id, "meta", "57.0.0.9"))))

				id = queue1(t, p, graph("plain"), "me")
				for _, f := range s.job() {
					require.NotContains(t, string(f.data), "57.0.0")
				}
				_, has := at(t, get(t, p, "/history/"+id), id, "outputs").(object).get("57.0.0.9")
				require.False(t, has, "an expansion taken from the cache shows none of its inner outputs")

				id = queue1(t, p, graph("fail"), "me")
				data := s.until("execution_error").data0(t)
				require.Equal(t, "57", at(t, data, "node_id"), "an error names the outer node")
				require.Equal(t, "Expand", at(t, data, "node_type"))
				event, _ := terminal(t, p, id)
				require.Equal(t, "execution_error", event)

				id = queue1(t, p, graph("cycle"), "me")
				data = s.until("execution_error").data0(t)
				require.Equal(t, "57", at(t, data, "node_id"))
				require.Equal(t, "Dependency cycle detected", at(t, data, "exception_message"))
				require.NoError(t, p.WaitIdle(t.Context()))
				require.Equal(t, "success", at(t, get(t, p, "/history/"+id), id, "status", "status_str"), "a staging error does not touch it")
				event, _ = terminal(t, p, id)
				require.Equal(t, "execution_error", event)

				queue1(t, p, graph("nested"), "me")
				var inner []string
				for _, f := range s.job() {
					if f.event() == "executing" {
						inner = append(inner, fmt.Sprint(f.data0(t)[0].value))
					}
				}
				require.Contains(t, inner, "57.0.0.1.0.0.1")

				queue1(t, p, graph("unknown"), "me")
				require.Equal(t, "KeyError", at(t, s.until("execution_error").data0(t), "exception_type"))
			}, append(opts, WithVersion(version))...)
		})
	}
}

func TestReconnectDuringAnExpansion(t *testing.T) {
	t.Parallel()
	gated(t, false, func(t *testing.T, p *Pod, g *gate) {
		queue1(t, p, graphOf("57", "Expand", nil, "60", "Show", object{{"in", []any{"57", 0}}}), "me")
		<-g.entered
		s := dial(t, p, "me")
		s.until("status")
		require.Equal(t, `{"type": "executing", "data": {"node": "57"}}`, string(s.next().data), "the outer node")
		g.pass <- struct{}{}
		s.until("execution_success")
	}, WithNode("Show", Node{Output: true}), WithNode("Expand", Node{Run: func(_ context.Context, c *Call) error {
		c.Expand(map[string]any{"1": map[string]any{"class_type": "Gate", "inputs": map[string]any{}}}, []any{"1", 0})
		return nil
	}}))
}

func TestAsyncNodes(t *testing.T) {
	t.Parallel()
	slow := Node{Async: true, Run: func(ctx context.Context, c *Call) error {
		wait(ctx, time.Second)
		c.Return(c.NodeID)
		return ctx.Err()
	}}
	graph := graphOf("1", "Slow", object{{"n", 1}}, "2", "Slow", object{{"n", 2}}, "3", "Show", object{{"a", []any{"1", 0}}, {"b", []any{"2", 0}}})
	show := WithNode("Show", scripted(func(c *Call) error { c.Put("text", fmt.Sprintf("%v %v", c.Inputs["a"], c.Inputs["b"])); return nil }))
	for _, c := range []struct {
		version string
		took    time.Duration
	}{{"0.3.44", 2 * time.Second}, {"0.3.45", time.Second}, {"0.27.0", time.Second}} {
		t.Run(c.version, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				began := time.Now()
				id := queue1(t, p, graph, "")
				require.NoError(t, p.WaitIdle(t.Context()))
				require.Equal(t, c.took, time.Since(began))
				require.Equal(t, []any{"1 2"}, at(t, get(t, p, "/history/"+id), id, "outputs", "3", "text"))
			}, WithVersion(c.version), WithNode("Slow", slow), show)
		})
	}
	t.Run("an error ends the others", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, p *Pod) {
			began := time.Now()
			id := queue1(t, p, graphOf("1", "Slow", nil, "2", "Bad", nil, "3", "Show", object{{"a", []any{"1", 0}}, {"b", []any{"2", 0}}}), "")
			require.NoError(t, p.WaitIdle(t.Context()))
			require.Equal(t, time.Millisecond, time.Since(began))
			_, data := terminal(t, p, id)
			require.Equal(t, "2", at(t, data, "node_id"))
			require.Equal(t, object{}, at(t, data, "current_inputs"))
		}, WithNode("Slow", slow), show, WithNode("Bad", Node{Async: true, Run: func(ctx context.Context, _ *Call) error {
			wait(ctx, time.Millisecond)
			return errors.New("bad")
		}}))
	})
	t.Run("an interrupt", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, p *Pod) {
			id := queue1(t, p, graph, "")
			synctest.Wait()
			p.Interrupt()
			require.NoError(t, p.WaitIdle(t.Context()))
			event, _ := terminal(t, p, id)
			require.Equal(t, "execution_interrupted", event)
		}, WithNode("Slow", slow), show)
	})
	t.Run("behind a list", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, p *Pod) {
			began := time.Now()
			id := queue1(t, p, graphOf("1", "List", nil, "2", "Slow", object{{"in", []any{"1", 0}}}, "3", "Show", object{{"a", []any{"2", 0}}}), "")
			require.NoError(t, p.WaitIdle(t.Context()))
			require.Equal(t, time.Second, time.Since(began), "the calls of one node run at the same time")
			require.Len(t, at(t, get(t, p, "/history/"+id), id, "outputs", "3", "text"), 3)
		}, WithNode("Slow", slow), show, WithNode("List", Node{OutputIsList: []bool{true}, Run: func(_ context.Context, c *Call) error {
			c.Return([]any{1, 2, 3})
			return nil
		}}))
	})
}

func TestOutputValues(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		id := queue1(t, p, graphOf("1", "Work", nil), "me")
		want := `{"odd": [NaN, Infinity, -Infinity, 1e+308, 1.0, 1, null, {"a": [1, 2]}, "\u00fc\n"], "empty": [], ` +
			`"files": [{"filename": "x #1.bin", "subfolder": "a/b", "type": "temp"}]}`
		require.Contains(t, string(s.until("executed").data), `"output": `+want)
		require.NoError(t, p.WaitIdle(t.Context()))
		require.Contains(t, string(do(t, p, http.MethodGet, "/history/"+id, "").body), `"outputs": {"1": `+want+`}`)
		require.Equal(t, "data", string(do(t, p, http.MethodGet, "/view?type=temp&subfolder=a/b&filename=x%20%231.bin", "").body))
	}, WithNode("Work", scripted(func(c *Call) error {
		c.Put("odd", math.NaN(), math.Inf(1), math.Inf(-1), 1e308, 1.0, 1, nil, map[string]any{"a": []int{1, 2}}, "ü\n")
		c.Put("empty")
		c.Save("files", "temp", "a/b/x #1.bin", []byte("data"))
		return nil
	})))
}

func TestWorkerDies(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		node Node
	}{
		{"by SystemExit", Fail("SystemExit", "1")},
		{"by the node", scripted(func(c *Call) error { c.Pod().KillWorker(); c.Put("text", "never seen"); return nil })},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				id := queue1(t, p, graphOf("1", "Work", nil), "me")
				s.until("executing")
				synctest.Wait()
				require.Empty(t, s.pending())
				later := queue1(t, p, graphOf("1", "Work", nil), "me")
				require.Equal(t, []string{id}, queueIDs(t, p, "queue_running"), "for ever")
				require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/interrupt", interruptBody(id)).status)
				require.Equal(t, true, at(t, do(t, p, http.MethodPost, "/api/jobs/"+id+"/cancel", "").json(t), "cancelled"))
				synctest.Wait()
				require.Equal(t, []string{later}, queueIDs(t, p, "queue_pending"))
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				require.ErrorIs(t, p.WaitIdle(ctx), context.DeadlineExceeded)

				p.Restart(0)
				require.NoError(t, p.WaitIdle(t.Context()))
				require.Empty(t, queueIDs(t, p, "queue_pending"))
			}, WithNode("Work", c.node))
		})
	}
}

// TestSuccessBeforeHistory: /history/{id} is there with executing{node: null}, and not before execution_success.
func TestSuccessBeforeHistory(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		id := queue1(t, p, graphOf("1", "Work", nil), "me")
		s.job()
		require.Len(t, get(t, p, "/history/"+id), 1)
		id = queue1(t, p, graphOf("1", "Peek", nil), "me")
		s.until("execution_start")
		require.Equal(t, object{}, get(t, p, "/history/"+id))
		require.NoError(t, p.WaitIdle(t.Context()))
	}, WithNode("Work", Node{Output: true}), WithNode("Peek", Steps(1, time.Hour)))
}

func TestInstancesStay(t *testing.T) {
	t.Parallel()
	made := 0
	bubble(t, func(t *testing.T, p *Pod) {
		for n := range 3 {
			queue1(t, p, graphOf("1", "Work", object{{"n", n}}), "")
			require.NoError(t, p.WaitIdle(t.Context()))
		}
		require.Equal(t, 1, made)
		queue1(t, p, graphOf("2", "Work", object{{"n", 7}}), "")
		queue1(t, p, graphOf("1", "Work", object{{"n", 8}}), "")
		require.NoError(t, p.WaitIdle(t.Context()))
		require.Equal(t, 3, made, "a job without the node drops its instance")
	}, WithNode("Work", scripted(func(c *Call) error {
		c.object(func() any { made++; return made })
		return nil
	})))
}
