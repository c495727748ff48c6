package comfyuitest

import (
	"cmp"
	"encoding/json"
	"maps"
	"slices"
	"strconv"
)

// dynamicPrompt is a job's graph with what its nodes expanded to.
type dynamicPrompt struct {
	original  *graph
	ephemeral map[string]*graphNode
	parents   map[string]string // of the nodes of expansions
	displays  map[string]string
	order     []string // ids of ephemeral, as they came
}

// opaque is an input of an expansion's node that is no JSON: an image, say.
type opaque struct{ value any }

func newDynamicPrompt(g *graph) *dynamicPrompt {
	return &dynamicPrompt{original: g, ephemeral: map[string]*graphNode{}, parents: map[string]string{}, displays: map[string]string{}}
}

// node returns a node, or nil.
func (d *dynamicPrompt) node(id string) *graphNode {
	if n := d.ephemeral[id]; n != nil {
		return n
	}
	return d.original.nodes[id]
}

func (d *dynamicPrompt) add(n *graphNode, parent, display string) {
	d.ephemeral[n.id] = n
	d.parents[n.id] = parent
	d.displays[n.id] = display
	d.order = append(d.order, n.id)
}

// real is the node of the posted graph that a node stems from.
func (d *dynamicPrompt) real(id string) string {
	for parent, inner := d.parents[id]; inner; parent, inner = d.parents[id] {
		id = parent
	}
	return id
}

// display is the node that a client should show.
func (d *dynamicPrompt) display(id string) string {
	for shown, inner := d.displays[id]; inner; shown, inner = d.displays[id] {
		id = shown
	}
	return id
}

// parent is the node that expanded to this one; nil for nodes of the posted graph.
func (d *dynamicPrompt) parent(id string) any {
	if parent, inner := d.parents[id]; inner {
		return parent
	}
	return nil
}

// expansion is a subgraph with the ids that the server gives its nodes.
type expansion struct {
	nodes   []*graphNode
	display map[string]string // override_display_id
	results []any             // values, or links
}

// newExpansion names the nodes after the node that expands and the item of the list that it ran for: 57.0.0.1.
func newExpansion(root string, call int, tree object, results []any) *expansion {
	prefix := root + "." + strconv.Itoa(call) + ".0."
	local := map[string]bool{}
	for _, f := range tree {
		local[f.key] = true
	}
	rename := func(l link) link {
		if local[l.node] {
			l.node = prefix + l.node
		}
		return l
	}
	e := &expansion{display: map[string]string{}}
	for _, f := range tree {
		n := parseNode(prefix+f.key, f.value)
		for name, v := range n.inputs {
			if l, linked := v.(link); linked {
				n.inputs[name] = rename(l)
			}
		}
		if display, ok := n.fields().get("override_display_id"); ok {
			e.display[n.id], _ = display.(string)
		}
		e.nodes = append(e.nodes, n)
	}
	for _, v := range results {
		if l, linked := linkOf(v); linked {
			v = rename(l)
		}
		e.results = append(e.results, v)
	}
	return e
}

// linkOf reads a link as Go code writes it: []any{"1", 0}.
func linkOf(v any) (link, bool) {
	switch v := v.(type) {
	case link:
		return v, true
	case []any:
		if len(v) == 2 {
			if slot, whole := v[1].(int); whole {
				return asLink([]any{v[0], int64(slot)})
			}
		}
		return asLink(v)
	}
	return link{}, false
}

// expansionTree reads a graph that a node gave, in the order of its ids. Inputs may be values that are no JSON.
func expansionTree(graph any) (object, bool) {
	nodes, isMap := graph.(map[string]any)
	if !isMap {
		data, err := json.Marshal(graph)
		if err != nil {
			return nil, false
		}
		value, err := parseJSON(data)
		if err != nil {
			return nil, false
		}
		tree, isObject := value.(object)
		return tree, isObject
	}
	var tree object
	for _, id := range slices.SortedFunc(maps.Keys(nodes), compareIDs) {
		tree = append(tree, field{id, expansionNode(nodes[id])})
	}
	return tree, true
}

func expansionNode(v any) any {
	fields, isMap := v.(map[string]any)
	if !isMap {
		return jsonOrOpaque(v)
	}
	var node object
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		inputs, isInputs := fields[key].(map[string]any)
		if key != "inputs" || !isInputs {
			node = append(node, field{key, jsonOrOpaque(fields[key])})
			continue
		}
		var list object
		for _, name := range slices.Sorted(maps.Keys(inputs)) {
			list = append(list, field{name, jsonOrOpaque(inputs[name])})
		}
		node = append(node, field{key, list})
	}
	return node
}

// jsonOrOpaque is v as parseJSON would give it, if it is of a type that JSON has.
func jsonOrOpaque(v any) any {
	switch v.(type) {
	case nil, bool, string, int, int64, float64, json.Number, json.RawMessage, []any, map[string]any, []string:
		if value, err := parseJSON(pyJSON(v)); err == nil {
			return value
		}
	}
	return opaque{v}
}

// compareIDs puts 2 before 10.
func compareIDs(a, b string) int {
	x, errX := strconv.Atoi(a)
	y, errY := strconv.Atoi(b)
	if errX == nil && errY == nil {
		return cmp.Compare(x, y)
	}
	return cmp.Compare(a, b)
}
