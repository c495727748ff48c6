package comfyuitest

import (
	"encoding/json"
	"math"
)

// graph is a prompt as it was posted.
type graph struct {
	order []string
	nodes map[string]*graphNode
	raw   json.RawMessage // as the server prints it

	tree object // what raw is rendered from
}

// graphNode is one node of a graph. A node that is no object, or lacks its class or inputs, is kept: whether that is a 400 or
// a 500 depends on the version.
type graphNode struct {
	id, class  string
	inputs     map[string]any // link, nil, bool, string, json.Number, []any or map[string]any
	inputOrder []string

	value any // as parseJSON gave it
}

// link names an output of another node.
type link struct {
	node string
	slot int
}

// MarshalJSON implements [json.Marshaler].
func (l link) MarshalJSON() ([]byte, error) {
	return pyJSON([]any{l.node, l.slot}), nil
}

// newGraph takes over the tree of a posted graph.
func newGraph(tree object) *graph {
	g := &graph{order: make([]string, len(tree)), nodes: make(map[string]*graphNode, len(tree)), tree: tree}
	for i, f := range tree {
		g.order[i] = f.key
		g.nodes[f.key] = parseNode(f.key, f.value)
	}
	g.render()
	return g
}

func parseNode(id string, value any) *graphNode {
	n := &graphNode{id: id, value: value}
	class, _ := n.fields().get("class_type")
	n.class, _ = class.(string)
	if fields, ok := n.inputFields(); ok {
		n.inputs = make(map[string]any, len(fields))
		for _, f := range fields {
			n.inputOrder = append(n.inputOrder, f.key)
			n.inputs[f.key] = inputValue(f.value)
		}
	}
	return n
}

// fields is the node as an object, empty if it is none.
func (n *graphNode) fields() object {
	o, _ := n.value.(object)
	return o
}

// inputFields are the inputs as posted; false if they are missing or no object.
func (n *graphNode) inputFields() (object, bool) {
	inputs, _ := n.fields().get("inputs")
	o, ok := inputs.(object)
	return o, ok
}

// metaTitle is the title that the editor gave the node.
func (n *graphNode) metaTitle() (any, bool) {
	meta, _ := n.fields().get("_meta")
	o, _ := meta.(object)
	return o.get("title")
}

// setInput replaces a value, as validation does when it converts one. The value is part of the graph's tree.
func (n *graphNode) setInput(name string, value any) {
	fields, _ := n.inputFields()
	fields.set(name, value)
	n.inputs[name] = inputValue(value)
}

// render brings raw up to date.
func (g *graph) render() {
	g.raw = pyJSON(g.tree)
}

// inputValue is a value of a graph as a node sees it.
func inputValue(v any) any {
	if list, ok := v.([]any); ok {
		if l, ok := asLink(list); ok {
			return l
		}
	}
	return plainValue(v)
}

// plainValue is v in the types of encoding/json.
func plainValue(v any) any {
	switch v := v.(type) {
	case int64, wholeNumber, float64:
		return json.Number(pyJSON(v))
	case object:
		m := make(map[string]any, len(v))
		for _, f := range v {
			m[f.key] = plainValue(f.value)
		}
		return m
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = plainValue(v[i])
		}
		return list
	default:
		return v
	}
}

func asLink(list []any) (link, bool) {
	if len(list) != 2 {
		return link{}, false
	}
	node, isText := list[0].(string)
	slot, isNumber := list[1].(int64)
	if !isText || !isNumber || slot < math.MinInt32 || slot > math.MaxInt32 {
		return link{}, false
	}
	return link{node, int(slot)}, true
}
