package comfyuitest

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
)

// class is a node class as the server knows it.
type class struct {
	name, displayName, category, description string
	module                                   string // python_module of /object_info
	output                                   bool
	async                                    bool
	schema                                   bool    // defined by a schema ("V3"): /object_info lists more fields
	deprecated                               bool    // only of a schema class
	inputs                                   []input // required, then optional, then hidden, in the order of INPUT_TYPES
	anyInputs                                bool    // made from a Node with nil Inputs: anything goes, links included
	inputIsList                              bool
	returns                                  []returnSlot
	anyReturns                               bool // made from a Node, which does not say what it returns: every slot fits every input
	searchAliases                            []string
	essentials                               string // essentials_category of /object_info

	// validate is the class's own check of the inputs that validateArgs names, which are then not checked against
	// min, max and choices. It refuses with a text, or raises. nil: none.
	validateArgs []string
	validate     func(env *validation, inputs map[string]any) (refusal string, raised *exception)
	changed      func(files *fileStore, inputs map[string]any) string // IS_CHANGED, part of the cache key; nil: none
	run          func(ctx context.Context, c *Call) error
}

// returnSlot is an output of a class.
type returnSlot struct {
	typ, name string
	list      bool
}

// The groups of INPUT_TYPES.
const (
	groupRequired = "required"
	groupOptional = "optional"
	groupHidden   = "hidden"
)

// input is an entry of INPUT_TYPES.
type input struct {
	name, group string
	typ         any    // a type's name, or []any: the choices of a list in the old form
	options     object // nil: the entry has none
	choices     func(files *fileStore) []any
}

// typeNow is the type, with the choices as they are now.
func (in *input) typeNow(files *fileStore) any {
	if in.choices != nil {
		return in.choices(files)
	}
	return in.typ
}

// config is the input as messages of validation show it.
func (in *input) config(files *fileStore) []any {
	options := in.options
	if options == nil {
		options = object{}
	}
	return []any{in.typeNow(files), options}
}

// spec is the input as /object_info shows it.
func (in *input) spec(files *fileStore, schema bool) any {
	switch {
	case in.group == groupHidden && !schema:
		return in.typ
	case in.options == nil:
		return []any{in.typeNow(files)}
	default:
		return []any{in.typeNow(files), in.options}
	}
}

// parseInputs reads INPUT_TYPES written as JSON.
func parseInputs(text string) []input {
	value, err := parseJSON([]byte(text))
	if err != nil {
		panic(fmt.Sprintf("comfyuitest: inputs %s: %v", text, err))
	}
	groups, _ := value.(object)
	var inputs []input
	for _, group := range []string{groupRequired, groupOptional, groupHidden} {
		entries, _ := groups.get(group)
		fields, _ := entries.(object)
		for _, f := range fields {
			in, err := inputOf(f.key, group, f.value)
			if err != nil {
				panic(fmt.Sprintf("comfyuitest: %v", err))
			}
			inputs = append(inputs, in)
		}
	}
	return inputs
}

// inputOf reads an entry: [type], [type, options], or for hidden ones just the type.
func inputOf(name, group string, spec any) (input, error) {
	in := input{name: name, group: group}
	list, ok := spec.([]any)
	if !ok {
		in.typ = spec
		if _, isText := spec.(string); !isText {
			return input{}, fmt.Errorf("input %s: want a type or [type, options], got %s", name, pyJSON(spec))
		}
		return in, nil
	}
	if len(list) == 0 || len(list) > 2 {
		return input{}, fmt.Errorf("input %s: want [type, options], got %s", name, pyJSON(spec))
	}
	in.typ = list[0]
	switch in.typ.(type) {
	case string, []any:
	default:
		return input{}, fmt.Errorf("input %s: want a type's name or a list of choices, got %s", name, pyJSON(in.typ))
	}
	if len(list) == 2 {
		if in.options, ok = list[1].(object); !ok {
			return input{}, fmt.Errorf("input %s: want options as an object, got %s", name, pyJSON(list[1]))
		}
	}
	return in, nil
}

// classOf makes a class of a scripted node. It panics when the node's Inputs make no sense.
func classOf(name string, n Node) *class {
	c := &class{
		name: name, displayName: name, category: "comfyuitest", module: "custom_nodes.comfyuitest",
		output: n.Output, async: n.Async, inputIsList: n.InputIsList,
		anyInputs: n.Inputs == nil, anyReturns: true, run: n.Run,
	}
	inputs, err := nodeInputs(n.Inputs)
	if err != nil {
		panic(fmt.Sprintf("comfyuitest: node %s: %v", name, err))
	}
	c.inputs = inputs
	return c
}

// nodeInputs reads Node.Inputs: groups as /object_info has them, or flat, name to type or choices, all of them required.
// A Go map has no order, so inputs come sorted by name.
func nodeInputs(given map[string]any) ([]input, error) {
	groups := map[string]map[string]any{}
	for _, key := range []string{groupRequired, groupOptional, groupHidden} {
		if entries, isGroup := stringMap(given[key]); isGroup {
			groups[key] = entries
		}
	}
	if len(groups) != len(given) {
		if len(groups) > 0 {
			return nil, fmt.Errorf("inputs are either all in groups (required, optional, hidden) or all flat")
		}
		groups[groupRequired] = given
	}
	var inputs []input
	for _, group := range []string{groupRequired, groupOptional, groupHidden} {
		for _, name := range slices.Sorted(maps.Keys(groups[group])) {
			in, err := nodeInput(name, group, groups[group][name])
			if err != nil {
				return nil, err
			}
			inputs = append(inputs, in)
		}
	}
	return inputs, nil
}

// stringMap is a map with text keys, whatever the type of its values.
func stringMap(v any) (map[string]any, bool) {
	from := reflect.ValueOf(v)
	if from.Kind() != reflect.Map || from.Type().Key().Kind() != reflect.String {
		return nil, false
	}
	to := make(map[string]any, from.Len())
	for key, value := range from.Seq2() {
		to[key.String()] = value.Interface()
	}
	return to, true
}

// nodeInput reads one entry of Node.Inputs: "INT", []string{"a", "b"}, []any{"INT", options} or []any{choices, options}.
func nodeInput(name, group string, given any) (input, error) {
	data, err := json.Marshal(given)
	if err != nil {
		return input{}, fmt.Errorf("input %s: %w", name, err)
	}
	value, err := parseJSON(data)
	if err != nil {
		return input{}, fmt.Errorf("input %s: %w", name, err)
	}
	list, isList := value.([]any)
	if isList && (isTexts(given) || !isSpec(list)) {
		value = []any{list}
	}
	if text, isText := value.(string); isText && group != groupHidden {
		value = []any{text}
	}
	in, err := inputOf(name, group, value)
	if err != nil {
		return input{}, err
	}
	if in.typ == "FLOAT" {
		// encoding/json writes 1.0 as 1, which Python would take for an int.
		for i, f := range in.options {
			if whole, ok := f.value.(int64); ok {
				in.options[i].value = float64(whole)
			}
		}
	}
	return in, nil
}

// isTexts tells a []string, which is always one of choices.
func isTexts(v any) bool {
	typ := reflect.TypeOf(v)
	return typ != nil && typ.Kind() == reflect.Slice && typ.Elem().Kind() == reflect.String
}

// isSpec tells [type, options] and [choices] from a bare list of choices.
func isSpec(list []any) bool {
	switch len(list) {
	case 1:
		_, choices := list[0].([]any)
		return choices || isTypeName(list[0])
	case 2:
		_, options := list[1].(object)
		return options
	default:
		return false
	}
}

// isTypeName tells a type, INT or IMAGE, from a single choice.
func isTypeName(v any) bool {
	text, ok := v.(string)
	if !ok || text == "" {
		return false
	}
	for _, r := range text {
		if (r < 'A' || r > 'Z') && r != '_' && r != '*' && r != ',' {
			return false
		}
	}
	return true
}

// objectInfo is the entry of c in /object_info.
func objectInfo(v version, c *class, files *fileStore) json.RawMessage {
	inputs, order := object{{groupRequired, object{}}}, object{{groupRequired, []string{}}}
	for i := range c.inputs {
		in := &c.inputs[i]
		entries, _ := inputs.get(in.group)
		names, _ := order.get(in.group)
		fields, _ := entries.(object)
		list, _ := names.([]string)
		inputs = inputs.set(in.group, fields.set(in.name, in.spec(files, c.schema)))
		order = order.set(in.group, append(list, in.name))
	}
	types, names, lists := []any{}, []any{}, []any{}
	for _, slot := range c.returns {
		name := slot.name
		if name == "" {
			name = slot.typ
		}
		types, names, lists = append(types, slot.typ), append(names, name), append(lists, slot.list)
	}
	if c.anyReturns && len(c.returns) == 0 && !c.output {
		types, names, lists = append(types, "*"), append(names, "*"), append(lists, false)
	}
	if c.schema {
		return schemaInfo(v, c, inputs, order, types, names, lists)
	}
	info := object{{"input", inputs}, {"input_order", order}}
	if v.atLeast(0, 12, 0) {
		info = info.set("is_input_list", c.inputIsList)
	}
	info = append(info,
		field{"output", types}, field{"output_is_list", lists}, field{"output_name", names},
		field{"name", c.name}, field{"display_name", c.displayName}, field{"description", c.description},
		field{"python_module", c.module}, field{"category", c.category}, field{"output_node", c.output})
	if v.atLeast(0, 19, 0) {
		info = info.set("has_intermediate_output", false)
	}
	if v.atLeast(0, 11, 0) {
		info = info.set("search_aliases", slices.Concat([]string{}, c.searchAliases))
	}
	if v.atLeast(0, 15, 0) && c.essentials != "" {
		info = info.set("essentials_category", c.essentials)
	}
	return pyJSON(info)
}

// schemaInfo lists every field that the release knows, set or not, as the server does for classes defined by a schema.
func schemaInfo(v version, c *class, inputs, order object, types, names, lists []any) json.RawMessage {
	orNull := func(set bool, value any) any {
		if set {
			return value
		}
		return nil
	}
	var info object
	add := func(known bool, key string, value any) {
		if known {
			info = append(info, field{key, value})
		}
	}
	add(true, "input", inputs)
	add(true, "input_order", order)
	add(v.atLeast(0, 12, 0), "is_input_list", c.inputIsList)
	add(true, "output", types)
	add(true, "output_is_list", lists)
	add(true, "output_name", names)
	add(true, "output_tooltips", make([]any, len(types)))
	add(v.atLeast(0, 4, 0), "output_matchtypes", nil)
	add(true, "name", c.name)
	add(true, "display_name", orNull(c.displayName != "", c.displayName))
	add(true, "description", c.description)
	add(true, "python_module", c.module)
	add(true, "category", c.category)
	add(true, "output_node", c.output)
	add(true, "deprecated", c.deprecated)
	add(true, "experimental", false)
	add(v.atLeast(0, 11, 1), "dev_only", false)
	add(true, "api_node", false)
	add(v.atLeast(0, 9, 2), "price_badge", nil)
	add(v.atLeast(0, 11, 0), "search_aliases", orNull(len(c.searchAliases) > 0, c.searchAliases))
	add(v.atLeast(0, 15, 0), "essentials_category", orNull(c.essentials != "", c.essentials))
	add(v.atLeast(0, 19, 0), "has_intermediate_output", false)
	return pyJSON(info)
}

// slot is the type of output n; slots count from the end when negative, as in Python.
func (c *class) slot(n int) (string, *exception) {
	if c.anyReturns {
		return "*", nil
	}
	if n < 0 {
		n += len(c.returns)
	}
	if n < 0 || n >= len(c.returns) {
		if c.schema {
			return "", raise("IndexError", "list index out of range")
		}
		return "", raise("IndexError", "tuple index out of range")
	}
	return c.returns[n].typ, nil
}

// input finds a declared input that a graph can set.
func (c *class) input(name string) *input {
	for i := range c.inputs {
		if c.inputs[i].name == name && c.inputs[i].group != groupHidden {
			return &c.inputs[i]
		}
	}
	return nil
}
