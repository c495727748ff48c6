package comfyuitest

import (
	"fmt"
	"slices"
	"strings"
)

// refusal is an answer to POST /prompt that queues nothing.
type refusal struct {
	status int
	body   any // the JSON of a 400; nil: the plain 500 page
}

var serverError = &refusal{status: 500}

// validation is what a class's own check may ask of the pod.
type validation struct {
	version version
	files   *fileStore
}

// verdict is what is known of a node. A node behind a broken one is invalid without errors of its own.
type verdict struct {
	valid  bool
	errors []object
}

// validator checks one prompt, as execution.py's validate_prompt does.
type validator struct {
	validation
	classes   map[string]*class
	graph     *graph
	verdicts  map[string]*verdict
	visiting  []string // the path from an output to the node that is checked now
	converted bool
}

// validatePrompt checks graph and tells which outputs are to run, in the order of the graph. Values that validation
// converts ("5" to 5) are changed in graph, as the server does, so that /queue and /history show them converted.
func validatePrompt(v version, classes map[string]*class, files *fileStore, promptID string, g *graph,
	targets []string, hasTargets bool,
) (outputs []string, nodeErrors map[string]any, refused *refusal) {
	p := &validator{validation: validation{v, files}, classes: classes, graph: g, verdicts: map[string]*verdict{}}
	candidates, refused := p.findOutputs(targets, hasTargets && v.atLeast(0, 3, 48))
	if refused != nil {
		return nil, nil, refused
	}
	broken := map[string]*nodeErrorEntry{}
	var reasons []string
	for _, id := range candidates {
		own := p.checkOutput(id)
		if own.valid {
			outputs = append(outputs, id)
			continue
		}
		for _, e := range own.errors {
			message, _ := e.get("message")
			details, _ := e.get("details")
			reasons = append(reasons, fmt.Sprintf("%s: %s", message, details))
		}
		p.blame(id, broken)
	}
	if p.converted {
		g.render()
	}
	nodeErrors = map[string]any{}
	for id, entry := range broken {
		nodeErrors[id] = object{{"errors", entry.errors}, {"dependent_outputs", entry.outputs}, {"class_type", g.nodes[id].class}}
	}
	if len(outputs) == 0 {
		return nil, nil, refuse("prompt_outputs_failed_validation", "Prompt outputs failed validation", strings.Join(reasons, "\n"),
			object{}, nodeErrors)
	}
	return outputs, nodeErrors, nil
}

type nodeErrorEntry struct {
	errors  []object
	outputs []string
}

// blame adds output to every node that is known to have errors: also to those that an earlier output alone depends on.
func (p *validator) blame(output string, broken map[string]*nodeErrorEntry) {
	for id, found := range p.verdicts {
		if found.valid || len(found.errors) == 0 {
			continue
		}
		if broken[id] == nil {
			broken[id] = &nodeErrorEntry{errors: found.errors}
		}
		broken[id].outputs = append(broken[id].outputs, output)
	}
}

func refuse(typ, message, details string, extra object, nodeErrors map[string]any) *refusal {
	return &refusal{400, object{
		{"error", object{{"type", typ}, {"message", message}, {"details", details}, {"extra_info", extra}}},
		{"node_errors", nodeErrors},
	}}
}

// findOutputs looks at the classes of all nodes, and returns the outputs that are wanted.
func (p *validator) findOutputs(targets []string, hasTargets bool) ([]string, *refusal) {
	// Since 0.14.0 replaced nodes are looked for first, and that takes every node for an object with an object of inputs. Those
	// without a class or inputs are left out since 0.15.1.
	if p.version.atLeast(0, 14, 0) {
		for _, id := range p.graph.order {
			if !p.graph.nodes[id].replaceable(p.version.atLeast(0, 15, 1)) {
				return nil, serverError
			}
		}
	}
	var outputs []string
	for _, id := range p.graph.order {
		n := p.graph.nodes[id]
		class, refused := p.classOf(n)
		if refused != nil {
			return nil, refused
		}
		if class.output && (!hasTargets || slices.Contains(targets, id)) {
			outputs = append(outputs, id)
		}
	}
	if len(outputs) == 0 {
		return nil, refuse("prompt_no_outputs", "Prompt has no outputs", "", object{}, map[string]any{})
	}
	return outputs, nil
}

func (n *graphNode) replaceable(skipsBroken bool) bool {
	if _, isObject := n.value.(object); !isObject {
		return false
	}
	class, hasClass := n.fields().get("class_type")
	_, hasInputs := n.fields().get("inputs")
	if !hasClass || !hasInputs {
		return skipsBroken
	}
	_, isObject := n.inputFields()
	return isObject && hashable(class)
}

func hashable(v any) bool {
	switch v.(type) {
	case []any, object:
		return false
	default:
		return true
	}
}

// classOf finds the class of a node, or the answer of the version when there is none.
func (p *validator) classOf(n *graphNode) (*class, *refusal) {
	titled := p.version.atLeast(0, 12, 0)
	switch value := n.value.(type) {
	case object:
	case []any:
		if titled || isOneOf("class_type", value) {
			return nil, serverError
		}
		return nil, refuseClassless(n.id)
	case string:
		if titled || strings.Contains(value, "class_type") {
			return nil, serverError
		}
		return nil, refuseClassless(n.id)
	default:
		return nil, serverError
	}
	name, given := n.fields().get("class_type")
	if !given && !titled {
		return nil, refuseClassless(n.id)
	}
	if !hashable(name) {
		return nil, serverError
	}
	if class := p.classes[n.class]; class != nil && n.class != "" {
		return class, nil
	}
	if !titled {
		return nil, refuse("invalid_prompt", fmt.Sprintf("Cannot execute because node %s does not exist.", pyStr(name)),
			nodeDetails(n.id), object{}, map[string]any{})
	}
	return nil, refuseMissing(n, name, given)
}

func nodeDetails(id string) string {
	return fmt.Sprintf("Node ID '#%s'", id)
}

func refuseClassless(id string) *refusal {
	return refuse("invalid_prompt", "Cannot execute because a node is missing the class_type property.", nodeDetails(id), object{},
		map[string]any{})
}

// refuseMissing names the node by its title, since 0.12.0.
func refuseMissing(n *graphNode, class any, given bool) *refusal {
	if meta, ok := n.fields().get("_meta"); ok {
		if _, isObject := meta.(object); !isObject {
			return serverError
		}
	}
	title, titled := n.metaTitle()
	if given && !titled {
		title = class
	}
	message := fmt.Sprintf("Node '%s' not found. The custom node may not be installed.", pyStr(title))
	if !given {
		shown := "ID #" + n.id
		if toBool(title) {
			shown = pyStr(title)
		}
		message = fmt.Sprintf("Node '%s' has no class_type. The workflow may be corrupted or a custom node is missing.", shown)
	}
	return refuse("missing_node_type", message, nodeDetails(n.id),
		object{{"node_id", n.id}, {"class_type", class}, {"node_title", title}}, map[string]any{})
}

// checkOutput checks all that an output depends on.
func (p *validator) checkOutput(id string) *verdict {
	found, raised := p.check(id)
	if raised != nil {
		found = &verdict{errors: []object{{
			{"type", "exception_during_validation"},
			{"message", "Exception when validating node"},
			{"details", raised.message},
			{"extra_info", object{{"exception_type", raised.typ}, {"traceback", tracebackOf("validate_prompt")}}},
		}}}
		p.verdicts[id] = found
	}
	p.visiting = p.visiting[:0]
	return found
}

// tracebackOf has the form of Python's; its lines belong to no release.
func tracebackOf(functions ...string) []string {
	lines := make([]string, len(functions))
	for i, function := range functions {
		lines[i] = fmt.Sprintf("  File \"/comfyui/execution.py\", line 1, in %s\n", function)
	}
	return append(lines, "  File \"/comfyui/execution.py\", line 1, in validate_inputs\n")
}

// check checks one node, those behind its links first.
func (p *validator) check(id string) (*verdict, *exception) {
	if found := p.verdicts[id]; found != nil {
		return found, nil
	}
	if at := slices.Index(p.visiting, id); at >= 0 {
		return p.cycle(id, p.visiting[at:]), nil
	}
	n := p.graph.nodes[id]
	class := p.classes[n.class]
	inputs, raised := p.inputsOf(n, class)
	if raised != nil {
		return nil, raised
	}
	c := &nodeCheck{validator: p, node: n, class: class, valid: true}
	for i := range inputs {
		if raised := c.input(&inputs[i]); raised != nil {
			return nil, raised
		}
	}
	if raised := c.ownCheck(); raised != nil {
		return nil, raised
	}
	found := &verdict{c.valid && len(c.errors) == 0, c.errors}
	if cyclic := p.verdicts[id]; cyclic != nil {
		found = &verdict{false, slices.Concat(cyclic.errors, c.errors)}
	}
	p.verdicts[id] = found
	return found, nil
}

// cycle handles a node that depends on itself. Before 0.20.0 the server recursed until Python stopped it, which left the nodes
// invalid without an error.
func (p *validator) cycle(id string, path []string) *verdict {
	if !p.version.atLeast(0, 20, 0) {
		return &verdict{}
	}
	names := make([]string, 0, len(path)+1)
	for _, step := range slices.Concat(path, []string{id}) {
		names = append(names, fmt.Sprintf("%s (%s)", step, p.graph.nodes[step].class))
	}
	for _, step := range path {
		p.verdicts[step] = &verdict{errors: []object{{
			{"type", "dependency_cycle"},
			{"message", "Dependency cycle detected"},
			{"details", strings.Join(names, " -> ")},
			{"extra_info", object{{"node_id", step}, {"cycle_nodes", slices.Clone(path)}}},
		}}}
	}
	return p.verdicts[id]
}

// inputsOf lists what the class declares; for a class that takes anything, what the node has.
func (p *validator) inputsOf(n *graphNode, c *class) ([]input, *exception) {
	given, has := n.fields().get("inputs")
	if !has {
		return nil, raise("KeyError", "'inputs'")
	}
	if c.anyInputs {
		inputs := make([]input, len(n.inputOrder))
		for i, name := range n.inputOrder {
			inputs[i] = input{name: name, group: groupOptional, typ: "*"}
		}
		return inputs, nil
	}
	inputs := slices.DeleteFunc(slices.Clone(c.inputs), func(in input) bool { return in.group == groupHidden })
	switch given.(type) {
	case object, []any, string:
	default:
		if len(inputs) > 0 {
			return nil, raise("TypeError", "argument of type '%s' is not iterable", typeName(given))
		}
	}
	return inputs, nil
}

// nodeCheck is the check of one node.
type nodeCheck struct {
	*validator
	node   *graphNode
	class  *class
	valid  bool // whether all behind its links are
	errors []object
}

func (c *nodeCheck) fail(in *input, typ, message, details string, extra ...field) {
	info := append(object{{"input_name", in.name}}, extra...)
	c.errors = append(c.errors, object{{"type", typ}, {"message", message}, {"details", details}, {"extra_info", info}})
}

func (c *nodeCheck) input(in *input) *exception {
	fields, _ := c.node.inputFields()
	value, given := fields.get(in.name)
	if !given {
		if in.group == groupRequired {
			c.fail(in, "required_input_missing", "Required input is missing", in.name)
		}
		return nil
	}
	if list, isList := value.([]any); isList {
		return c.link(in, list)
	}
	return c.literal(in, value)
}

func (c *nodeCheck) link(in *input, list []any) *exception {
	config := field{"input_config", in.config(c.files)}
	if len(list) != 2 {
		c.fail(in, "bad_linked_input", "Bad linked input, must be a length-2 list of [node_id, slot_index]", in.name,
			config, field{"received_value", list})
		return nil
	}
	from, raised := c.linkedNode(list[0])
	if raised != nil {
		return raised
	}
	fromClass := c.classes[from.class]
	received, raised := slotOf(fromClass, list[1])
	if raised != nil {
		return raised
	}
	wanted := in.typeNow(c.files)
	if !fromClass.anyReturns && !c.class.anyInputs && !c.fits(received, wanted) {
		c.fail(in, "return_type_mismatch", "Return type mismatch between linked nodes",
			fmt.Sprintf("%s, received_type(%s) mismatch input_type(%s)", in.name, received, pyStr(wanted)),
			config, field{"received_type", received}, field{"linked_node", list})
		return nil
	}
	c.visiting = append(c.visiting, c.node.id)
	depth := len(c.visiting)
	found, raised := c.check(from.id)
	c.visiting = c.visiting[:depth-1]
	switch {
	case raised != nil:
		c.valid = false
		c.verdicts[from.id] = &verdict{errors: []object{{
			{"type", "exception_during_inner_validation"},
			{"message", "Exception when validating inner node"},
			{"details", raised.message},
			{"extra_info", object{
				{"input_name", in.name},
				config,
				{"exception_message", raised.message},
				{"exception_type", raised.typ},
				{"traceback", tracebackOf("validate_inputs")},
				{"linked_node", list},
			}},
		}}}
	case !found.valid:
		c.valid = false
	}
	return nil
}

func (c *nodeCheck) linkedNode(id any) (*graphNode, *exception) {
	if !hashable(id) {
		return nil, raise("TypeError", "unhashable type: '%s'", typeName(id))
	}
	name, _ := id.(string)
	n := c.graph.nodes[name]
	if _, isText := id.(string); !isText || n == nil {
		return nil, raise("KeyError", "%s", pyRepr(id))
	}
	return n, nil
}

// slotOf is the type of the output that index picks.
func slotOf(c *class, index any) (string, *exception) {
	sequence := "tuple"
	if c.schema {
		sequence = "list"
	}
	switch index := index.(type) {
	case bool:
		if index {
			return c.slot(1)
		}
		return c.slot(0)
	case int64:
		if index < -1<<31 || index > 1<<31 {
			return "", raise("IndexError", "%s index out of range", sequence)
		}
		return c.slot(int(index))
	case wholeNumber:
		return "", raise("IndexError", "cannot fit 'int' into an index-sized integer")
	default:
		return "", raise("TypeError", "%s indices must be integers or slices, not %s", sequence, typeName(index))
	}
}

// fits tells whether an output may be linked to an input: types are lists of names, and one name in common is enough.
func (p *validator) fits(received string, wanted any) bool {
	wantedText, isText := wanted.(string)
	if received == wantedText && isText {
		return true
	}
	star := p.version.atLeast(0, 8, 0)
	if star && (received == "*" || wantedText == "*") {
		return true
	}
	if !isText {
		return false
	}
	names := splitTypes(wantedText)
	for _, name := range splitTypes(received) {
		if slices.Contains(names, name) || star && (name == "*" || slices.Contains(names, "*")) {
			return true
		}
	}
	return false
}

func splitTypes(s string) []string {
	names := strings.Split(s, ",")
	for i := range names {
		names[i] = strings.TrimSpace(names[i])
	}
	return names
}

func (c *nodeCheck) literal(in *input, value any) *exception {
	if wrapper, isObject := value.(object); isObject {
		// A list that is meant as a value, and not as a link, comes wrapped.
		if inner, ok := wrapper.get("__value__"); ok {
			value = inner
			c.convert(in, value)
		}
	}
	wanted := in.typeNow(c.files)
	converted, raised := convertTo(wanted, value)
	if raised != nil {
		c.fail(in, "invalid_input_type", fmt.Sprintf("Failed to convert an input value to a %s value", wanted),
			fmt.Sprintf("%s, %s, %s", in.name, pyStr(value), raised.message),
			field{"input_config", in.config(c.files)}, field{"received_value", value}, field{"exception_message", raised.message})
		return nil
	}
	if !identical(converted, value) {
		value = converted
		c.convert(in, value)
	}
	if c.class.validate != nil && slices.Contains(c.class.validateArgs, in.name) {
		return nil
	}
	if failed, raised := c.bounds(in, value); failed || raised != nil {
		return raised
	}
	c.choice(in, wanted, value)
	return nil
}

func (c *nodeCheck) convert(in *input, value any) {
	c.node.setInput(in.name, value)
	c.converted = true
}

// convertTo is what validation makes of a value for an input of type wanted.
func convertTo(wanted, value any) (any, *exception) {
	switch wanted {
	case "INT":
		return toInt(value)
	case "FLOAT":
		return toFloat(value)
	case "STRING":
		return pyStr(value), nil
	case "BOOLEAN":
		return toBool(value), nil
	default:
		return value, nil
	}
}

// identical tells whether conversion changed anything; 1 and 1.0 are equal, but not identical.
func identical(a, b any) bool {
	return typeName(a) == typeName(b) && sameJSON(a, b)
}

func (c *nodeCheck) bounds(in *input, value any) (failed bool, raised *exception) {
	config := field{"input_config", in.config(c.files)}
	if limit, ok := in.options.get("min"); ok {
		below, raised := less(value, limit)
		if raised != nil {
			return false, raised
		}
		if below {
			c.fail(in, "value_smaller_than_min", fmt.Sprintf("Value %s smaller than min of %s", pyStr(value), pyStr(limit)), in.name,
				config, field{"received_value", value})
			return true, nil
		}
	}
	if limit, ok := in.options.get("max"); ok {
		above, raised := less(limit, value)
		if raised != nil {
			return false, raise(raised.typ, "'>' not supported between instances of '%s' and '%s'", typeName(value), typeName(limit))
		}
		if above {
			c.fail(in, "value_bigger_than_max", fmt.Sprintf("Value %s bigger than max of %s", pyStr(value), pyStr(limit)), in.name,
				config, field{"received_value", value})
			return true, nil
		}
	}
	return false, nil
}

// choice checks a value against a list; the lists of schema classes only since 0.8.0.
func (c *nodeCheck) choice(in *input, wanted, value any) {
	choices, isList := wanted.([]any)
	if wanted == "COMBO" && c.version.atLeast(0, 8, 0) {
		listed, _ := in.options.get("options")
		choices, _ = listed.([]any)
		isList = true
	}
	if !isList {
		return
	}
	wrong := []any{value}
	reprs := c.version.atLeast(0, 21, 0)
	if several, isSeveral := value.([]any); isSeveral && reprs && multiselect(in) {
		wrong = several
	}
	wrong = slices.DeleteFunc(slices.Clone(wrong), func(v any) bool { return isOneOf(v, choices) })
	if len(wrong) == 0 {
		return
	}
	config, list := any(in.config(c.files)), pyRepr(choices)
	if len(choices) > 20 {
		config, list = nil, fmt.Sprintf("(list of length %d)", len(choices))
	}
	shown := "'" + pyStr(value) + "'"
	if reprs {
		texts := make([]string, len(wrong))
		for i := range wrong {
			texts[i] = pyRepr(wrong[i])
		}
		shown = strings.Join(texts, ", ")
	}
	c.fail(in, "value_not_in_list", "Value not in list", fmt.Sprintf("%s: %s not in %s", in.name, shown, list),
		field{"input_config", config}, field{"received_value", value})
}

func multiselect(in *input) bool {
	several, _ := in.options.get("multiselect")
	return toBool(several)
}

// ownCheck runs the class's own validation. Its refusal is told once for each input that it was given.
func (c *nodeCheck) ownCheck() *exception {
	if c.class.validate == nil {
		return nil
	}
	inputs := map[string]any{}
	var missing []string
	for _, name := range c.class.validateArgs {
		value, given := c.node.inputs[name]
		if _, isLink := value.(link); isLink {
			value = nil
		}
		inputs[name] = value
		if !given {
			missing = append(missing, reprString(name))
		}
	}
	if len(missing) > 0 {
		return missingArguments(c.class.name, missing)
	}
	refusal, raised := c.class.validate(&c.validation, inputs)
	if raised != nil || refusal == "" {
		return raised
	}
	for _, name := range c.class.validateArgs {
		c.fail(&input{name: name}, "custom_validation_failed", "Custom validation failed for node", name+" - "+refusal)
	}
	return nil
}

func missingArguments(class string, names []string) *exception {
	plural, list := "", names[0]
	if n := len(names); n > 1 {
		plural = "s"
		list = strings.Join(names[:n-1], ", ") + " and " + names[n-1]
		if n > 2 {
			list = strings.Join(names[:n-1], ", ") + ", and " + names[n-1]
		}
	}
	return raise("TypeError", "%s.VALIDATE_INPUTS() missing %d required positional argument%s: %s", class, len(names), plural, list)
}
