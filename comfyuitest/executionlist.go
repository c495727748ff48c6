package comfyuitest

import "slices"

// executionList dissolves the graph: nodes whose inputs are there can be staged, and a staged one can be put back with more
// before it.
type executionList struct {
	dyn      *dynamicPrompt
	classes  map[string]*class
	cached   func(id string) bool
	order    []string // pending nodes, as they were added
	pending  map[string]bool
	blocks   map[string]int             // how many nodes and tasks a node waits for
	blocking map[string]map[string]bool // whom a node holds up
	follows  map[string][]string        // blocking, in order
}

func newExecutionList(dyn *dynamicPrompt, classes map[string]*class, cached func(id string) bool) *executionList {
	return &executionList{
		dyn: dyn, classes: classes, cached: cached, pending: map[string]bool{}, blocks: map[string]int{},
		blocking: map[string]map[string]bool{}, follows: map[string][]string{},
	}
}

// add adds a node and all that it needs. A link to a node that does not exist is Python's NodeNotFoundError.
func (l *executionList) add(id string) *exception {
	type edge struct{ from, to string }
	stack := []string{id}
	var links []edge
	for len(stack) > 0 {
		id := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if l.pending[id] {
			continue
		}
		n := l.dyn.node(id)
		if n == nil {
			return raise("comfy_execution.graph.NodeNotFoundError", "Node %s not found", id)
		}
		l.pending[id] = true
		l.order = append(l.order, id)
		l.blocks[id] = 0
		l.blocking[id] = map[string]bool{}
		l.follows[id] = nil
		for _, name := range n.inputOrder {
			if from, linked := n.inputs[name].(link); linked && !l.cached(from.node) {
				stack = append(stack, from.node)
				links = append(links, edge{from.node, id})
			}
		}
	}
	for _, e := range links {
		if err := l.link(e.from, e.to); err != nil {
			return err
		}
	}
	return nil
}

// link makes to wait for from.
func (l *executionList) link(from, to string) *exception {
	if l.cached(from) {
		return nil
	}
	if err := l.add(from); err != nil {
		return err
	}
	if !l.blocking[from][to] {
		l.blocking[from][to] = true
		l.follows[from] = append(l.follows[from], to)
		l.blocks[to]++
	}
	return nil
}

func (l *executionList) empty() bool { return len(l.order) == 0 }

func (l *executionList) ready() []string {
	var ready []string
	for _, id := range l.order {
		if l.blocks[id] == 0 {
			ready = append(ready, id)
		}
	}
	return ready
}

func (l *executionList) complete(id string) {
	l.order = slices.DeleteFunc(l.order, func(other string) bool { return other == id })
	delete(l.pending, id)
	for _, follower := range l.follows[id] {
		l.blocks[follower]--
	}
	delete(l.blocking, id)
	delete(l.follows, id)
}

// pick chooses as the server does: an output or async node, else one just before an output, else one before that.
func (l *executionList) pick(ready []string) string {
	for _, id := range ready {
		if c := l.classOf(id); c != nil && (c.output || c.async) {
			return id
		}
	}
	for _, id := range ready {
		if slices.ContainsFunc(l.follows[id], l.isOutput) {
			return id
		}
	}
	for _, id := range ready {
		for _, follower := range l.follows[id] {
			if slices.ContainsFunc(l.follows[follower], l.isOutput) {
				return id
			}
		}
	}
	return ready[0]
}

func (l *executionList) classOf(id string) *class {
	if n := l.dyn.node(id); n != nil {
		return l.classes[n.class]
	}
	return nil
}

func (l *executionList) isOutput(id string) bool {
	c := l.classOf(id)
	return c != nil && c.output
}

// blamed is the node that an unsolvable rest of the graph is blamed on: the first of a cycle that an expansion made.
func (l *executionList) blamed() string {
	waits := map[string]map[string]bool{}
	for _, id := range l.order {
		waits[id] = map[string]bool{}
	}
	for _, from := range l.order {
		for _, to := range l.follows[from] {
			waits[to][from] = true
		}
	}
	for {
		free := slices.DeleteFunc(slices.Clone(l.order), func(id string) bool {
			blockers, there := waits[id]
			return !there || len(blockers) > 0
		})
		if len(free) == 0 {
			break
		}
		for _, id := range free {
			delete(waits, id)
			for _, blockers := range waits {
				delete(blockers, id)
			}
		}
	}
	cycle := slices.DeleteFunc(slices.Clone(l.order), func(id string) bool { return waits[id] == nil })
	for _, id := range cycle {
		if display := l.dyn.display(id); display != id {
			return display
		}
	}
	return cycle[0]
}
