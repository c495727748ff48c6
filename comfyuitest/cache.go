package comfyuitest

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// outputCache holds what nodes gave, by the signature of a node and all that is before it. Before 0.23.0 a job's start drops
// whatever its graph does not use; since then entries stay as long as memory lasts.
type outputCache struct {
	keepsAll   bool
	top        *cacheLevel
	generation int
}

// cacheLevel is the cache of one graph: the prompt's own, or that of an expansion in the older scheme.
type cacheLevel struct {
	keys    map[string]string // signature by node id, of the current job
	outputs map[string]*nodeOutputs
	ui      map[string]*nodeUI
	used    map[string]int // generation by signature, where entries stay
	levels  map[string]*cacheLevel
}

// nodeOutputs is a node's output slots, each a list of values.
type nodeOutputs struct {
	slots [][]any
	rest  []any // for slots beyond, of a class that does not say how many it has; nil: none
}

// slot returns the values of an output; false when there is no such slot.
func (o *nodeOutputs) slot(n int) ([]any, bool) {
	if n >= 0 && n < len(o.slots) {
		return o.slots[n], true
	}
	return o.rest, o.rest != nil
}

// nodeUI is what a node shows: its outputs in the history, and where they belong.
type nodeUI struct{ meta, output object }

// maxKeptEntries stands for the memory of a server that drops nothing until it has to.
const maxKeptEntries = 4096

func newOutputCache(v version) *outputCache {
	return &outputCache{keepsAll: v.atLeast(0, 23, 0), top: newCacheLevel()}
}

func newCacheLevel() *cacheLevel {
	return &cacheLevel{
		keys: map[string]string{}, outputs: map[string]*nodeOutputs{}, ui: map[string]*nodeUI{},
		used: map[string]int{}, levels: map[string]*cacheLevel{},
	}
}

// begin takes the nodes of a job's graph.
func (c *outputCache) begin(dyn *dynamicPrompt, sign func(id string) string) {
	c.generation++
	clear(c.top.keys)
	for _, id := range dyn.original.order {
		c.top.addKey(id, sign(id), c.generation)
	}
	used := map[string]bool{}
	for _, id := range dyn.original.order {
		used[levelKey(dyn, id)] = true
	}
	maps.DeleteFunc(c.top.levels, func(key string, _ *cacheLevel) bool { return !used[key] })
	if c.keepsAll {
		c.top.evict(c.generation)
		return
	}
	c.top.clean()
}

// expand takes the nodes of an expansion of parent.
func (c *outputCache) expand(dyn *dynamicPrompt, parent string, children []string, sign func(id string) string) {
	level := c.top
	if c.keepsAll {
		// A level here holds nothing, but its ids show in current_outputs of the next job with such a node.
		remembered := newCacheLevel()
		for _, id := range children {
			remembered.keys[id] = ""
		}
		c.top.levels[levelKey(dyn, parent)] = remembered
	} else {
		outer := c.levelOf(dyn, parent)
		key := levelKey(dyn, parent)
		if level = outer.levels[key]; level == nil {
			level = newCacheLevel()
			outer.levels[key] = level
		}
		clear(level.keys)
	}
	for _, id := range children {
		level.addKey(id, sign(id), c.generation)
	}
	if !c.keepsAll {
		level.clean()
	}
}

func levelKey(dyn *dynamicPrompt, id string) string {
	if n := dyn.node(id); n != nil {
		return id + "\x00" + n.class
	}
	return id
}

func (l *cacheLevel) addKey(id, signature string, generation int) {
	l.keys[id] = signature
	l.used[signature] = generation
}

// clean drops what the current graph does not use.
func (l *cacheLevel) clean() {
	kept := map[string]bool{}
	for _, signature := range l.keys {
		kept[signature] = true
	}
	maps.DeleteFunc(l.outputs, func(signature string, _ *nodeOutputs) bool { return !kept[signature] })
	maps.DeleteFunc(l.ui, func(signature string, _ *nodeUI) bool { return !kept[signature] })
	maps.DeleteFunc(l.used, func(signature string, _ int) bool { return !kept[signature] })
}

// evict drops the entries that were not used for longest, once there are too many.
func (l *cacheLevel) evict(generation int) {
	if len(l.used) <= maxKeptEntries {
		return
	}
	ages := slices.Sorted(maps.Values(l.used))
	oldest := min(ages[len(ages)/2], generation-1)
	gone := func(signature string) bool { return l.used[signature] <= oldest }
	maps.DeleteFunc(l.outputs, func(signature string, _ *nodeOutputs) bool { return gone(signature) })
	maps.DeleteFunc(l.ui, func(signature string, _ *nodeUI) bool { return gone(signature) })
	maps.DeleteFunc(l.used, func(_ string, age int) bool { return age <= oldest })
}

// levelOf finds the level that holds a node; nil when its expansion has none in this job.
func (c *outputCache) levelOf(dyn *dynamicPrompt, id string) *cacheLevel {
	if c.keepsAll {
		return c.top
	}
	var parents []string
	for parent, inner := dyn.parents[id]; inner; parent, inner = dyn.parents[parent] {
		parents = append(parents, parent)
	}
	level := c.top
	for _, parent := range slices.Backward(parents) {
		if level = level.levels[levelKey(dyn, parent)]; level == nil {
			return nil
		}
	}
	return level
}

func (c *outputCache) get(dyn *dynamicPrompt, id string) (*nodeOutputs, *nodeUI) {
	level := c.levelOf(dyn, id)
	if level == nil {
		return nil, nil
	}
	signature, known := level.keys[id]
	if !known {
		return nil, nil
	}
	return level.outputs[signature], level.ui[signature]
}

func (c *outputCache) has(dyn *dynamicPrompt, id string) bool {
	outputs, _ := c.get(dyn, id)
	return outputs != nil
}

func (c *outputCache) setOutputs(dyn *dynamicPrompt, id string, outputs *nodeOutputs) {
	if level := c.levelOf(dyn, id); level != nil {
		level.outputs[level.keys[id]] = outputs
	}
}

func (c *outputCache) setUI(dyn *dynamicPrompt, id string, ui *nodeUI) {
	if level := c.levelOf(dyn, id); level != nil {
		level.ui[level.keys[id]] = ui
	}
}

// nodeIDs lists the nodes of the current job that the cache knows: those of the graph, then those of expansions.
func (c *outputCache) nodeIDs(dyn *dynamicPrompt) []string {
	ids := slices.Clone(dyn.original.order)
	return append(ids, c.top.innerIDs()...)
}

func (l *cacheLevel) innerIDs() []string {
	var ids []string
	for _, key := range slices.Sorted(maps.Keys(l.levels)) {
		inner := l.levels[key]
		ids = append(ids, slices.Sorted(maps.Keys(inner.keys))...)
		ids = append(ids, inner.innerIDs()...)
	}
	return ids
}

// signer makes the signatures of one job's nodes.
type signer struct {
	process *process
	dyn     *dynamicPrompt
	changed map[string]string // IS_CHANGED by node id, asked once a job
	unknown int
}

// sign is the signature of a node: its class, what it says has changed, its constants, and the same of every node before
// it. Node ids do not count, but for nodes that are told theirs.
func (s *signer) sign(id string) string {
	var ancestors []string
	index := map[string]int{}
	s.ancestry(id, &ancestors, index)
	var b strings.Builder
	s.immediate(&b, id, index)
	for _, ancestor := range ancestors {
		s.immediate(&b, ancestor, index)
	}
	return b.String()
}

func (s *signer) ancestry(id string, ancestors *[]string, index map[string]int) {
	n := s.dyn.node(id)
	if n == nil {
		return
	}
	for _, name := range sortedInputs(n) {
		l, linked := n.inputs[name].(link)
		if !linked {
			continue
		}
		if _, known := index[l.node]; known {
			continue
		}
		index[l.node] = len(*ancestors)
		*ancestors = append(*ancestors, l.node)
		s.ancestry(l.node, ancestors, index)
	}
}

func sortedInputs(n *graphNode) []string {
	if slices.IsSorted(n.inputOrder) {
		return n.inputOrder
	}
	return slices.Sorted(slices.Values(n.inputOrder))
}

func (s *signer) immediate(b *strings.Builder, id string, index map[string]int) {
	n := s.dyn.node(id)
	if n == nil {
		s.unequal(b)
		return
	}
	class := s.process.pod.classes[n.class]
	fmt.Fprintf(b, "%q", n.class)
	if class == nil {
		s.unequal(b)
		return
	}
	b.WriteString(s.changedOf(id, n, class))
	if class.wantsID() {
		b.WriteString(" id=")
		b.Write(appendJSONString(nil, id))
	}
	for _, name := range sortedInputs(n) {
		b.WriteByte(' ')
		b.Write(appendJSONString(nil, name))
		switch v := n.inputs[name].(type) {
		case link:
			fmt.Fprintf(b, "<-%d.%d", index[v.node], v.slot)
		case opaque:
			s.unequal(b)
		default:
			b.WriteByte('=')
			b.Write(pyJSON(v))
		}
	}
	b.WriteByte('\n')
}

// unequal writes what equals nothing, as NaN does.
func (s *signer) unequal(b *strings.Builder) {
	s.unknown++
	s.process.executor.unequal++
	b.WriteString(" NaN" + strconv.Itoa(s.process.executor.unequal))
}

func (s *signer) changedOf(id string, n *graphNode, class *class) string {
	if class.changed == nil {
		return ""
	}
	if _, asked := s.changed[id]; !asked {
		constants := map[string]any{}
		for name, v := range n.inputs {
			if _, linked := v.(link); linked {
				v = nil
			}
			constants[name] = v
		}
		s.changed[id] = class.changed(s.process.files, constants)
	}
	return " changed=" + s.changed[id]
}

// wantsID tells whether the class has the hidden input UNIQUE_ID: two such nodes never share a cache entry.
func (c *class) wantsID() bool {
	return slices.ContainsFunc(c.inputs, func(in input) bool { return in.group == groupHidden && in.typ == "UNIQUE_ID" })
}
