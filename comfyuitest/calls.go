package comfyuitest

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"sync"
)

// nodeInputValues is what a node's inputs hold: for each a list of values.
type nodeInputValues struct {
	names  []string
	values [][]any
}

func (r *run) inputsOf(n *graphNode, class *class) nodeInputValues {
	var in nodeInputValues
	add := func(name string, values []any) {
		in.names = append(in.names, name)
		in.values = append(in.values, values)
	}
	for _, name := range n.inputOrder {
		switch v := n.inputs[name].(type) {
		case link:
			values := []any{nil}
			if outputs, _ := r.executor.cache.get(r.dyn, v.node); outputs != nil {
				if slot, there := outputs.slot(v.slot); there {
					values = slot
				}
			}
			add(name, values)
		case opaque:
			add(name, []any{v.value})
		default:
			if class.anyInputs || class.input(name) != nil {
				add(name, []any{v})
			}
		}
	}
	return in
}

func (in nodeInputValues) longest() int {
	longest := 0
	for _, values := range in.values {
		longest = max(longest, len(values))
	}
	return longest
}

// at returns the inputs of one call; the last value of a shorter list is repeated.
func (in nodeInputValues) at(i int) map[string]any {
	inputs := make(map[string]any, len(in.names))
	for k, name := range in.names {
		switch values := in.values[k]; {
		case i < len(values):
			inputs[name] = values[i]
		case len(values) > 0:
			inputs[name] = values[len(values)-1]
		}
	}
	return inputs
}

func (in nodeInputValues) lists() map[string]any {
	inputs := make(map[string]any, len(in.names))
	for k, name := range in.names {
		inputs[name] = slices.Clone(in.values[k])
	}
	return inputs
}

// formatted is current_inputs of an execution_error.
func (in nodeInputValues) formatted() object {
	formatted := object{}
	for k, name := range in.names {
		values := make([]any, len(in.values[k]))
		for i, v := range in.values[k] {
			values[i] = formatValue(v)
		}
		formatted = append(formatted, field{name, values})
	}
	return formatted
}

// withHidden adds what the server passes to classes in the old form under their hidden inputs: a failing SaveImage tells the whole
// graph, and a node that calls paid services its key.
func (r *run) withHidden(in nodeInputValues, id string, class *class) nodeInputValues {
	if class.schema {
		return in
	}
	in.names, in.values = slices.Clone(in.names), slices.Clone(in.values)
	extra, _ := r.item.extra.(object)
	extra = slices.Concat(extra, r.item.sensitive)
	for i := range class.inputs {
		hidden := &class.inputs[i]
		if hidden.group != groupHidden {
			continue
		}
		var value any
		switch hidden.typ {
		case "PROMPT":
			value, _ = parseJSON(r.item.prompt)
		case "UNIQUE_ID":
			value = id
		case "EXTRA_PNGINFO", "AUTH_TOKEN_COMFY_ORG", "API_KEY_COMFY_ORG":
			value, _ = extra.get(strings.ToLower(hidden.typ.(string)))
		default:
			continue
		}
		in.names = append(in.names, hidden.name)
		in.values = append(in.values, []any{value})
	}
	return in
}

func formatValue(v any) any {
	switch v := v.(type) {
	case nil, bool, string, json.Number, int, int64, float64:
		return v
	default:
		return pyStr(v)
	}
}

// nodeCalls are the calls of one node: several when it stands behind a list.
type nodeCalls struct {
	class    *class
	inputs   nodeInputValues
	calls    []*Call // nil where a blocker took the call's place
	outcomes []*callOutcome
	blocked  []*blocker
	mu       sync.Mutex
	left     int // async calls that are not done, and one while more may come
}

// callAll calls the node for each item of its lists.
func (r *run) callAll(id string, class *class, in nodeInputValues) (stepResult, *nodeFailure) {
	calls := &nodeCalls{class: class, inputs: in, left: 1}
	count := in.longest()
	if class.inputIsList || count == 0 {
		count = 1
	}
	async := class.async && r.process.version.atLeast(0, 3, 45)
	if async && r.unblock == nil {
		r.unblock = make(chan string)
	}
	for i := range count {
		if r.executor.takeInterrupt() {
			return stepFailed, &nodeFailure{node: r.dyn.real(id), interrupted: true}
		}
		inputs := in.at(i)
		if class.inputIsList {
			inputs = in.lists()
		}
		if b := r.blockerIn(id, class, inputs); b != nil {
			calls.add(nil, nil, b)
			continue
		}
		c := &Call{PromptID: r.item.id, NodeID: id, Inputs: inputs, run: r, class: class, life: r.ctx}
		outcome := &callOutcome{}
		calls.add(c, outcome, nil)
		if async {
			calls.launch()
			r.process.pod.tasks.start(func() { c.perform(outcome, func() { r.finished(id, calls) }) })
			continue
		}
		done := make(chan struct{})
		r.process.pod.tasks.start(func() { c.perform(outcome, func() { close(done) }) })
		select {
		case <-done:
		case <-r.ctx.Done():
			c.abandon()
			return stepDead, nil
		}
		if r.ctx.Err() != nil {
			return stepDead, nil
		}
		if outcome.interrupted || outcome.raised != nil {
			return r.failCall(id, r.withHidden(in, id, class), outcome)
		}
	}
	if !async {
		return r.collect(id, calls)
	}
	r.async[id] = calls
	r.waiting++
	r.list.blocks[id]++
	calls.close(func() { r.process.pod.tasks.start(func() { r.finished(id, nil) }) })
	return stepPending, nil
}

func (n *nodeCalls) add(c *Call, outcome *callOutcome, b *blocker) {
	n.calls = append(n.calls, c)
	n.outcomes = append(n.outcomes, outcome)
	n.blocked = append(n.blocked, b)
}

func (n *nodeCalls) launch() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.left++
}

// close tells that no more calls come; if all are done already, it says so by calling finished.
func (n *nodeCalls) close(finished func()) {
	if n.oneLess() {
		finished()
	}
}

func (n *nodeCalls) oneLess() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.left--
	return n.left == 0
}

// finished tells the worker that a call of an async node is done, once all of the node's are.
func (r *run) finished(id string, calls *nodeCalls) {
	if calls != nil && !calls.oneLess() {
		return
	}
	select {
	case r.unblock <- id:
	case <-r.ctx.Done():
	}
}

// blockerIn returns the silent blocker that takes the call's place, after telling of one that has a message.
func (r *run) blockerIn(id string, class *class, inputs map[string]any) *blocker {
	var found *blocker
	for _, name := range slices.Sorted(maps.Keys(inputs)) {
		switch v := inputs[name].(type) {
		case *blocker:
			found = v
		case []any:
			if class.inputIsList {
				for _, item := range v {
					if b, isBlocker := item.(*blocker); isBlocker {
						found = b
						break
					}
				}
			}
		}
		if found != nil {
			break
		}
	}
	if found == nil || found.message == "" {
		return found
	}
	r.process.hub.toClient(r.client, "execution_error", object{
		{"prompt_id", r.item.id},
		{"node_id", id},
		{"node_type", class.name},
		{"executed", slices.Clone(r.executed)},
		{"exception_message", "Execution Blocked: " + found.message},
		{"exception_type", "ExecutionBlocked"},
		{"traceback", []any{}},
		{"current_inputs", []any{}},
		{"current_outputs", []any{}},
	})
	return &blocker{}
}

// collect takes what the calls of a node gave.
func (r *run) collect(id string, calls *nodeCalls) (stepResult, *nodeFailure) {
	results := make([]nodeResult, len(calls.calls))
	ui := object(nil)
	expands := false
	for i, c := range calls.calls {
		if c == nil {
			results[i].blocked = calls.blocked[i]
			continue
		}
		if outcome := calls.outcomes[i]; outcome.interrupted || outcome.raised != nil {
			return r.failCall(id, nodeInputValues{}, outcome)
		}
		given, shown := c.taken()
		ui = mergeUI(ui, shown)
		results[i] = nodeResult{values: given.values, blocked: given.blocked}
		if given.expand {
			expands = true
			results[i].expansion = newExpansion(id, i, given.graph, given.values)
		}
	}
	r.showUI(id, ui)
	if expands {
		return r.expand(id, results)
	}
	return r.store(id, calls.class, results)
}

// mergeUI joins the outputs of a node's calls: those of the first call's keys.
func mergeUI(ui, more object) object {
	if ui == nil {
		return more
	}
	for i := range ui {
		if list, there := more.get(ui[i].key); there {
			first, _ := ui[i].value.([]any)
			next, _ := list.([]any)
			ui[i].value = append(slices.Clip(first), next...)
		}
	}
	return ui
}

func (r *run) showUI(id string, output object) {
	if len(output) == 0 {
		return
	}
	ui := &nodeUI{output: output, meta: object{
		{"node_id", id}, {"display_node", r.dyn.display(id)}, {"parent_node", r.dyn.parent(id)}, {"real_node_id", r.dyn.real(id)},
	}}
	r.executor.cache.setUI(r.dyn, id, ui)
	r.show(id, ui)
	if r.client.known {
		r.pace(paceExecuted, id)
		r.process.hub.toClient(r.client, "executed", object{
			{"node", id}, {"display_node", r.dyn.display(id)}, {"output", output}, {"prompt_id", r.item.id},
		})
	}
}
