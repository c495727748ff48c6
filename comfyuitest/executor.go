package comfyuitest

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// executor is the prompt worker: one thread that takes item after item from the queue and runs its graph.
type executor struct {
	process *process
	life    context.Context // ends with the process, or when the worker is killed
	kill    context.CancelFunc
	cache   *outputCache
	unequal int // how many values that equal nothing went into signatures

	mu        sync.Mutex
	client    client // of the job that runs, or ran last
	lastNode  string // the node that a client which reconnects is told of; "": none
	interrupt bool   // the one flag for the whole pod
	calls     map[*Call]struct{}
	objects   map[string]any // instances of nodes, by id and class
	busy      bool
}

func newExecutor(p *process) *executor {
	life, kill := context.WithCancel(p.ctx)
	return &executor{process: p, life: life, kill: kill, cache: newOutputCache(p.version), calls: map[*Call]struct{}{}, objects: map[string]any{}}
}

// work runs until the process ends or something kills the worker. What kills it leaves its item in the running list.
func (e *executor) work() {
	defer e.kill()
	for {
		it, err := e.process.queue.get(e.life)
		if err != nil {
			return
		}
		e.setBusy(true)
		if it != nil {
			began := time.Now()
			if !e.execute(it) {
				return
			}
			e.process.logExecuted(time.Since(began))
		}
		if e.process.queue.takeFlags().freeMemory {
			e.cache = newOutputCache(e.process.version)
			e.keepInstances(nil)
		}
		e.setBusy(false)
	}
}

func (e *executor) setBusy(busy bool) {
	e.mu.Lock()
	e.busy = busy
	e.mu.Unlock()
	if !busy {
		e.process.pod.changed.signal()
	}
}

func (e *executor) isBusy() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.busy
}

// execute runs one item to its end; false if the worker died on it.
func (e *executor) execute(it *item) bool {
	r := newRun(e, it)
	if !it.executable() {
		return false
	}
	entry, alive := r.execute()
	if !alive {
		return false
	}
	e.process.queue.done(it, entry)
	if r.client.known {
		r.pace(paceIdle)
		e.process.hub.toClient(r.client, "executing", object{{"node", nil}, {"prompt_id", it.id}})
	}
	return true
}

// executable is false for an extra_data in which Python cannot look for a key: old servers let it through to the worker.
func (it *item) executable() bool {
	switch it.extra.(type) {
	case object, []any, string:
		return true
	}
	return false
}

// executingFor returns the node that a socket is told of when it connects in the middle of its job.
func (e *executor) executingFor(sid string) (string, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.lastNode, e.lastNode != "" && e.client.known && e.client.sid == sid
}

func (e *executor) setLastNode(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lastNode = id
}

// begin is the start of a job: here, and only here, an interrupt that nothing has seen is forgotten.
func (e *executor) begin(c client) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.interrupt = false
	e.client = c
}

func (e *executor) instance(key string, make func() any) any {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, there := e.objects[key]; !there {
		e.objects[key] = make()
	}
	return e.objects[key]
}

// keepInstances drops the instances of nodes that the graph does not have.
func (e *executor) keepInstances(g *graph) {
	e.mu.Lock()
	defer e.mu.Unlock()
	maps.DeleteFunc(e.objects, func(key string, _ any) bool {
		id, class, _ := strings.Cut(key, "\x00")
		return g == nil || g.nodes[id] == nil || g.nodes[id].class != class
	})
}

// raiseInterrupt sets the flag and ends the ctx of the nodes that run. Whether anything comes of it is up to them.
func (e *executor) raiseInterrupt() {
	e.mu.Lock()
	e.interrupt = true
	calls := slices.Collect(maps.Keys(e.calls))
	e.mu.Unlock()
	for _, c := range calls {
		c.interrupt()
	}
}

// takeInterrupt is the check at node starts and ticks; seeing the flag resets it.
func (e *executor) takeInterrupt() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	set := e.interrupt
	e.interrupt = false
	return set
}

func (e *executor) attach(c *Call) {
	e.mu.Lock()
	e.calls[c] = struct{}{}
	set := e.interrupt
	e.mu.Unlock()
	if set {
		c.interrupt()
	}
}

func (e *executor) detach(c *Call) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.calls, c)
}

// run is one execution of one item.
type run struct {
	executor *executor
	process  *process
	item     *item
	client   client
	dyn      *dynamicPrompt
	list     *executionList
	signer   *signer

	ctx      context.Context // ends the calls that the job's end leaves behind
	cancel   context.CancelFunc
	messages []message
	executed []string
	shown    []string // nodes with output, in order
	ui       map[string]*nodeUI
	inner    map[string][]nodeResult // expansions that are under way, by the node that expanded
	async    map[string]*nodeCalls   // async nodes that are under way
	unblock  chan string             // async nodes that are done
	waiting  int                     // how many are not

	mu       sync.Mutex
	progress []*nodeProgress // in the order in which nodes began
}

func newRun(e *executor, it *item) *run {
	ctx, cancel := context.WithCancel(e.life)
	r := &run{
		executor: e, process: e.process, item: it, client: it.client, ctx: ctx, cancel: cancel,
		dyn: newDynamicPrompt(it.graph), ui: map[string]*nodeUI{},
		inner: map[string][]nodeResult{}, async: map[string]*nodeCalls{},
	}
	r.signer = &signer{process: e.process, dyn: r.dyn, changed: map[string]string{}}
	r.list = newExecutionList(r.dyn, e.process.pod.classes, r.isCached)
	return r
}

func (r *run) isCached(id string) bool { return r.executor.cache.has(r.dyn, id) }

// nodeResult is one call's share of what a node gave.
type nodeResult struct {
	values    []any
	blocked   *blocker
	expansion *expansion
}

// nodeFailure ends a job.
type nodeFailure struct {
	node        string // of the posted graph
	interrupted bool
	fatal       bool // kills the worker
	typ         string
	message     string
	traceback   []string
	inputs      any
}

type stepResult int

const (
	stepDone stepResult = iota
	stepPending
	stepFailed
	stepDead // the worker died, or the process ended
)

// execute runs the graph; alive is false if the worker died on it.
func (r *run) execute() (entry *historyEntry, alive bool) {
	defer r.cancel()
	e := r.executor
	e.begin(r.client)
	r.process.pod.book.began(r.item.id)
	r.pace(paceStart)
	r.addMessage("execution_start", object{{"prompt_id", r.item.id}}, false)
	e.cache.begin(r.dyn, r.signer.sign)
	e.keepInstances(r.item.graph)
	cached := slices.DeleteFunc(slices.Clone(r.item.graph.order), func(id string) bool { return !r.isCached(id) })
	r.pace(paceCached)
	r.addMessage("execution_cached", object{{"nodes", cached}, {"prompt_id", r.item.id}}, false)

	known := e.cache.nodeIDs(r.dyn)
	success := true
	for _, id := range r.item.outputs {
		if err := r.list.add(id); err != nil {
			return nil, false // not caught by the server: the worker dies
		}
	}
	for !r.list.empty() {
		id, failure, dead := r.stage()
		if dead {
			return nil, false
		}
		if failure != nil {
			r.reportFailure(failure, known) // the success of the job is not touched
			return r.finish(success), true
		}
		result, failure := r.step(id)
		switch result {
		case stepDead:
			return nil, false
		case stepFailed:
			success = false
			r.reportFailure(failure, known)
			return r.finish(success), true
		case stepDone:
			r.list.complete(id)
		case stepPending:
		}
	}
	r.pace(paceEnd)
	r.process.pod.book.ended(r.item.id)
	r.addMessage("execution_success", object{{"prompt_id", r.item.id}}, false)
	return r.finish(success), true
}

// addMessage sends an event and keeps it for the history.
func (r *run) addMessage(event string, data object, broadcast bool) {
	data = append(data, field{"timestamp", time.Now().UnixMilli()})
	r.messages = append(r.messages, message{event, data})
	if r.client.known || broadcast {
		r.process.hub.toClient(r.client, event, data)
	}
}

// finish makes the history entry.
func (r *run) finish(success bool) *historyEntry {
	r.executor.setLastNode("")
	if !r.process.version.atLeast(0, 3, 68) {
		r.showCache()
	}
	entry := &historyEntry{item: r.item, extra: r.item.publicExtra(r.process.version), outputs: object{}, meta: object{}, messages: r.messages, status: "error"}
	if success {
		entry.status = "success"
	}
	for _, id := range r.shown {
		entry.outputs = append(entry.outputs, field{id, r.ui[id].output})
		entry.meta = append(entry.meta, field{id, r.ui[id].meta})
	}
	return entry
}

// showCache collects the outputs as servers did that kept them in a cache of their own: those of all nodes that the cache
// knows, whether or not they ran in this job.
func (r *run) showCache() {
	r.shown = nil
	for _, id := range r.executor.cache.nodeIDs(r.dyn) {
		if _, ui := r.executor.cache.get(r.dyn, id); ui != nil {
			r.show(id, ui)
		}
	}
}

func (r *run) show(id string, ui *nodeUI) {
	if !slices.Contains(r.shown, id) {
		r.shown = append(r.shown, id)
	}
	r.ui[id] = ui
}

// stage chooses the next node, waiting for async ones if it must.
func (r *run) stage() (id string, failure *nodeFailure, dead bool) {
	for {
		r.collectUnblocked()
		if ready := r.list.ready(); len(ready) > 0 {
			return r.list.pick(ready), nil, r.ctx.Err() != nil
		}
		if r.waiting == 0 {
			return "", &nodeFailure{
				node: r.list.blamed(), typ: "graph.DependencyCycleError", message: "Dependency cycle detected", inputs: []any{},
			}, false
		}
		select {
		case done := <-r.unblock:
			r.unblocked(done)
		case <-r.ctx.Done():
			return "", nil, true
		}
	}
}

func (r *run) collectUnblocked() {
	for {
		select {
		case done := <-r.unblock:
			r.unblocked(done)
		default:
			return
		}
	}
}

func (r *run) unblocked(id string) {
	r.waiting--
	r.list.blocks[id]--
}

// step takes a staged node as far as it goes now.
func (r *run) step(id string) (stepResult, *nodeFailure) {
	if outputs, ui := r.executor.cache.get(r.dyn, id); outputs != nil {
		r.sendCached(id, ui)
		r.finishProgress(id)
		return stepDone, nil
	}
	if calls, under := r.async[id]; under {
		delete(r.async, id)
		return r.collect(id, calls)
	}
	if results, under := r.inner[id]; under {
		delete(r.inner, id)
		return r.resolve(id, results)
	}
	return r.begin(id)
}

// sendCached shows a cached node: with null if it has no output.
func (r *run) sendCached(id string, ui *nodeUI) {
	var output any
	if ui != nil {
		output = ui.output
	}
	if r.client.known {
		r.pace(paceExecuted + " " + id)
		r.process.hub.toClient(r.client, "executed", object{
			{"node", id}, {"display_node", r.dyn.display(id)}, {"output", output}, {"prompt_id", r.item.id},
		})
	}
	if ui != nil && (r.client.known || !r.process.version.forgetsCachedOutputs()) {
		r.show(id, ui)
	}
}

// forgetsCachedOutputs is the fault of the versions in which a job without client_id has no outputs in the history for the
// nodes that it took from the cache (C#14939).
func (v version) forgetsCachedOutputs() bool {
	return v.atLeast(0, 3, 68) && !v.atLeast(0, 28, 0)
}

// begin starts a node.
func (r *run) begin(id string) (stepResult, *nodeFailure) {
	n := r.dyn.node(id)
	class := r.process.pod.classes[n.class]
	if class == nil {
		return r.fail(id, nil, &NodeError{"KeyError", pyRepr(n.class)})
	}
	r.startProgress(id)
	inputs := r.inputsOf(n, class)
	if r.client.known {
		r.pace(paceExecute + " " + id)
		r.executor.setLastNode(r.dyn.display(id))
		r.process.hub.toClient(r.client, "executing", object{
			{"node", id}, {"display_node", r.dyn.display(id)}, {"prompt_id", r.item.id},
		})
	}
	return r.callAll(id, class, inputs)
}

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
		if outcome.interrupted || outcome.err != nil {
			return r.failCall(id, in, outcome)
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
		{"prompt_id", r.item.id}, {"node_id", id}, {"node_type", class.name}, {"executed", slices.Clone(r.executed)},
		{"exception_message", "Execution Blocked: " + found.message}, {"exception_type", "ExecutionBlocked"},
		{"traceback", []any{}}, {"current_inputs", []any{}}, {"current_outputs", []any{}},
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
		if outcome := calls.outcomes[i]; outcome.interrupted || outcome.err != nil {
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
		r.pace(paceExecuted + " " + id)
		r.process.hub.toClient(r.client, "executed", object{
			{"node", id}, {"display_node", r.dyn.display(id)}, {"output", output}, {"prompt_id", r.item.id},
		})
	}
}

// expand puts the subgraphs of a node's calls into the graph; the node waits for what its results link to.
func (r *run) expand(id string, results []nodeResult) (stepResult, *nodeFailure) {
	var added, outputs []string
	var links []link
	for _, result := range results {
		if result.expansion == nil {
			continue
		}
		for _, n := range result.expansion.nodes {
			display := id
			if other, has := result.expansion.display[n.id]; has {
				display = other
			}
			r.dyn.add(n, id, display)
			class := r.process.pod.classes[n.class]
			if class == nil {
				return r.fail(id, nil, &NodeError{"KeyError", pyRepr(n.class)})
			}
			added = append(added, n.id)
			if class.output {
				outputs = append(outputs, n.id)
			}
		}
		for _, v := range result.expansion.results {
			if l, linked := v.(link); linked {
				links = append(links, l)
			}
		}
	}
	r.executor.cache.expand(r.dyn, id, added, r.signer.sign)
	for _, output := range outputs {
		if err := r.list.add(output); err != nil {
			return r.fail(id, nil, &NodeError{err.typ, err.message})
		}
	}
	for _, l := range links {
		if err := r.list.link(l.node, id); err != nil {
			return r.fail(id, nil, &NodeError{err.typ, err.message})
		}
	}
	r.inner[id] = results
	return stepPending, nil
}

// resolve replaces the links of an expansion's results by what they link to.
func (r *run) resolve(id string, results []nodeResult) (stepResult, *nodeFailure) {
	for i, result := range results {
		if result.expansion == nil {
			continue
		}
		var values []any
		for _, v := range result.expansion.results {
			l, linked := v.(link)
			if !linked {
				values = append(values, v)
				continue
			}
			if outputs, _ := r.executor.cache.get(r.dyn, l.node); outputs != nil {
				slot, _ := outputs.slot(l.slot)
				values = append(values, slot...)
			}
		}
		results[i] = nodeResult{values: values}
	}
	return r.store(id, r.process.pod.classes[r.dyn.node(id).class], results)
}

// store keeps a node's outputs for the nodes behind it and for later jobs.
func (r *run) store(id string, class *class, results []nodeResult) (stepResult, *nodeFailure) {
	r.executor.cache.setOutputs(r.dyn, id, mergeResults(class, results))
	r.finishProgress(id)
	r.executed = append(r.executed, id)
	return stepDone, nil
}

// mergeResults makes of the values of each call the lists of each slot.
func mergeResults(class *class, results []nodeResult) *nodeOutputs {
	outputs := &nodeOutputs{}
	count := 0
	if !class.anyReturns {
		count = len(class.returns)
	} else {
		for _, result := range results {
			count = max(count, len(result.values))
		}
	}
	outputs.slots = make([][]any, count)
	for slot := range count {
		isList := slot < len(class.returns) && class.returns[slot].list
		for _, result := range results {
			switch {
			case result.blocked != nil:
				outputs.slots[slot] = append(outputs.slots[slot], result.blocked)
			case slot >= len(result.values):
				if !isList {
					outputs.slots[slot] = append(outputs.slots[slot], nil)
				}
			default:
				outputs.slots[slot] = appendSlot(outputs.slots[slot], result.values[slot], isList)
			}
		}
	}
	if class.anyReturns {
		for _, result := range results {
			if result.blocked != nil {
				outputs.rest = append(outputs.rest, result.blocked)
			}
		}
	}
	return outputs
}

func appendSlot(slot []any, value any, isList bool) []any {
	if list, ok := value.([]any); ok && isList {
		return append(slot, list...)
	}
	return append(slot, value)
}

// failCall ends the job by a call's error; the worker itself dies of what Python's Exception does not cover.
func (r *run) failCall(id string, in nodeInputValues, outcome *callOutcome) (stepResult, *nodeFailure) {
	if outcome.interrupted {
		return stepFailed, &nodeFailure{node: r.dyn.real(id), interrupted: true}
	}
	return r.fail(id, in.formatted(), outcome.err)
}

func (r *run) fail(id string, inputs object, err error) (stepResult, *nodeFailure) {
	var raised *NodeError
	if !errors.As(err, &raised) {
		raised = &NodeError{"RuntimeError", err.Error()}
	}
	if raised.ExceptionType == "SystemExit" || raised.ExceptionType == "KeyboardInterrupt" {
		r.executor.kill()
		return stepDead, nil
	}
	if inputs == nil {
		inputs = object{}
	}
	class := r.dyn.node(id).class
	return stepFailed, &nodeFailure{
		node: r.dyn.real(id), typ: raised.ExceptionType, message: raised.Message + r.process.version.tips(class, raised),
		traceback: traceback(class, raised), inputs: inputs,
	}
}

const (
	tipsMemory = "This error means you ran out of memory on your GPU.\n\n" +
		"TIPS: If the workflow worked before you might have accidentally set the batch_size to a large number."
	tipsShapes = "\n\nTIPS: If you have any \"Load CLIP\" or \"*CLIP Loader\" nodes in your workflow connected to this sampler " +
		"node make sure the correct file(s) and type is selected."
)

// tips is what the server appends to a message: since 0.3.42 a line feed, and advice where it has some.
func (v version) tips(class string, e *NodeError) string {
	if !v.atLeast(0, 3, 42) {
		return ""
	}
	return "\n" + v.advice(class, e)
}

func (v version) advice(class string, e *NodeError) string {
	switch {
	case e.ExceptionType == "torch.OutOfMemoryError" || e.ExceptionType == "torch.cuda.OutOfMemoryError":
		return tipsMemory
	case e.ExceptionType == "torch.AcceleratorError" && strings.Contains(e.Message, "out of memory") && v.atLeast(0, 17, 0):
		return tipsMemory
	case e.ExceptionType == "RuntimeError" && strings.Contains(e.Message, "mat1 and mat2 shapes") && strings.Contains(class, "Sampler") && v.atLeast(0, 14, 0):
		return tipsShapes
	}
	return ""
}

// traceback has the form of a real one: the server's own frames, then the node's.
func traceback(class string, e *NodeError) []string {
	return []string{
		"  File \"/comfyui/execution.py\", line 510, in execute\n    output_data, output_ui, has_subgraph, has_pending_tasks = await get_output_data(prompt_id, unique_id, obj, input_data_all)\n",
		"  File \"/comfyui/execution.py\", line 286, in process_inputs\n    result = f(**inputs)\n",
		"  File \"/comfyui/custom_nodes/comfyuitest.py\", line 1, in run\n    raise " + e.ExceptionType + "  # " + class + "\n",
	}
}

// reportFailure sends the terminal event of a job that did not succeed.
func (r *run) reportFailure(f *nodeFailure, known []string) {
	r.pace(paceEnd)
	class := ""
	if n := r.item.graph.nodes[f.node]; n != nil {
		class = n.class
	}
	data := object{
		{"prompt_id", r.item.id}, {"node_id", f.node}, {"node_type", class}, {"executed", append([]string{}, r.executed...)},
	}
	if f.interrupted {
		r.process.pod.book.interrupted(r.item.id)
		r.addMessage("execution_interrupted", data, true)
		return
	}
	r.addMessage("execution_error", append(data,
		field{"exception_message", f.message}, field{"exception_type", f.typ}, field{"traceback", append([]string{}, f.traceback...)},
		field{"current_inputs", f.inputs}, field{"current_outputs", known}), false)
}
