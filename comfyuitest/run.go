package comfyuitest

import (
	"context"
	"slices"
	"sync"
	"time"
)

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
	entry.shown = entry.encode()
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
		r.pace(paceExecuted, id)
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
		r.pace(paceExecute, id)
		r.executor.setLastNode(r.dyn.display(id))
		r.process.hub.toClient(r.client, "executing", object{
			{"node", id}, {"display_node", r.dyn.display(id)}, {"prompt_id", r.item.id},
		})
	}
	return r.callAll(id, class, inputs)
}
