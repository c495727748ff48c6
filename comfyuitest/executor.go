package comfyuitest

import (
	"context"
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
