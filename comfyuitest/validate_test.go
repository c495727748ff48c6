package comfyuitest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
)

func mustVersion(tb testing.TB, s string) version {
	tb.Helper()
	v, err := parseVersion(s)
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

// recordedClasses are those of the server that was recorded, as far as its recordings use them.
func recordedClasses(v version) map[string]*class {
	classes := builtinClasses(v)
	for _, c := range probeClasses(v) {
		classes[c.name] = c
	}
	return classes
}

// post is the body of POST /prompt.
type post struct {
	Prompt  json.RawMessage `json:"prompt"`
	Targets *[]string       `json:"partial_execution_targets"`
}

// parseGraph reads a graph.
func parseGraph(raw json.RawMessage) (*graph, error) {
	value, err := parseJSON(raw)
	if err != nil {
		return nil, err
	}
	tree, ok := value.(object)
	if !ok {
		return nil, fmt.Errorf("a prompt that is a %s", typeName(value))
	}
	return newGraph(tree), nil
}

// TestValidateRecorded holds validation against every answer to POST /prompt that a real server gave.
func TestValidateRecorded(t *testing.T) {
	t.Parallel()
	for _, name := range captureVersions {
		// In a bubble, because one of the nodes sleeps in its validation.
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { checkRecordedAnswers(t, name) }) })
	}
}

func checkRecordedAnswers(t *testing.T, name string) {
	t.Helper()
	v := mustVersion(t, name)
	paths, err := filepath.Glob(filepath.Join(captureDir, name, "*.jsonl"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no recordings of %s: %v", name, err)
	}
	checked := 0
	for _, path := range paths {
		for _, line := range readCapture(t, path) {
			if !line.posts() || line.Status != 200 && line.Status != 400 {
				continue
			}
			var p post
			if json.Unmarshal(line.Request, &p) != nil || p.Prompt == nil || bytes.Contains(line.Body, []byte("invalid_prompt_id")) {
				continue
			}
			checked++
			checkRecordedAnswer(t, v, strings.TrimSuffix(filepath.Base(path), ".jsonl"), p, line)
		}
	}
	want := 180
	if captureCounts[name] < 126 {
		want = 122
	}
	if checked < want {
		t.Errorf("%s: only %d posts were checked", name, checked)
	}
}

func checkRecordedAnswer(t *testing.T, v version, scenario string, p post, line capture) {
	t.Helper()
	g, err := parseGraph(p.Prompt)
	if err != nil {
		t.Errorf("%v %s: %v", v, scenario, err)
		return
	}
	files := newFileStore()
	if scenario == "upload-image" {
		files.put("input", "", loadedName(t, p.Prompt), nil)
	}
	var targets []string
	if p.Targets != nil {
		targets = *p.Targets
	}
	outputs, nodeErrors, refused := validatePrompt(v, recordedClasses(v), files, "", g, targets, p.Targets != nil)
	if refused != nil {
		if refused.status != line.Status {
			t.Errorf("%v %s: refused with %d %s, the server said %d %s", v, scenario, refused.status, pyJSON(refused.body), line.Status, line.Body)
			return
		}
		sameAnswer(t, v, scenario, parsed(t, pyJSON(refused.body)), parsed(t, line.Body))
		return
	}
	if line.Status != 200 {
		t.Errorf("%v %s: accepted, the server said %d %s", v, scenario, line.Status, line.Body)
		return
	}
	if len(outputs) == 0 {
		t.Errorf("%v %s: accepted without an output", v, scenario)
	}
	answer, _ := parsed(t, line.Body).(object)
	want, _ := answer.get("node_errors")
	sameAnswer(t, v, scenario, parsed(t, pyJSON(object{{"node_errors", nodeErrors}})), object{{"node_errors", want}})
}

// loadedName is the file that a graph's LoadImage takes.
func loadedName(t *testing.T, prompt json.RawMessage) string {
	t.Helper()
	var nodes map[string]struct {
		Inputs struct{ Image any } `json:"inputs"`
	}
	if err := json.Unmarshal(prompt, &nodes); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if name, ok := n.Inputs.Image.(string); ok {
			return name
		}
	}
	t.Fatalf("no LoadImage in %s", prompt)
	return ""
}

func parsed(tb testing.TB, raw []byte) any {
	tb.Helper()
	v, err := parseJSON(raw)
	if err != nil {
		tb.Fatalf("%v in %s", err, raw)
	}
	return v
}

func sameAnswer(t *testing.T, v version, scenario string, got, want any) {
	t.Helper()
	d := newDiffer()
	d.compare("", got, want)
	for _, difference := range d.found {
		t.Errorf("%v %s: %s", v, scenario, difference)
	}
}

func TestValidatePrompt(t *testing.T) {
	t.Parallel()
	old, young := version{0, 3, 64}, version{0, 33, 0}
	for _, tc := range []struct {
		name    string
		version version
		graph   string
		targets []string
		status  int    // 0: accepted
		want    string // part of the answer, or of the graph when accepted
	}{
		{"int from text", young, `{"1": {"class_type": "Any"}, "2": {"class_type": "EmptyImage", "inputs": {"width": "64", "height": 8.9, "batch_size": true, "color": " 1_0 "}}, "3": {"class_type": "Out", "inputs": {"x": ["2", 0]}}}`, nil, 0, `"width": 64, "height": 8, "batch_size": 1, "color": 10`},
		{"float from int", young, `{"2": {"class_type": "Typed", "inputs": {"f": 1, "s": 5, "b": ""}}}`, nil, 0, `"f": 1.0, "s": "5", "b": false`},
		{"wrapped value", young, `{"2": {"class_type": "Typed", "inputs": {"f": {"__value__": 2.5}}}}`, nil, 0, `"f": 2.5`},
		{"bad float", young, `{"2": {"class_type": "Typed", "inputs": {"f": "x"}}}`, nil, 400, `"details": "f, x, could not convert string to float: 'x'"`},
		{"null int", young, `{"2": {"class_type": "Typed", "inputs": {"i": null}}}`, nil, 400, `i, None, int() argument must be a string, a bytes-like object or a real number, not 'NoneType'`},
		{"below float min", young, `{"2": {"class_type": "Typed", "inputs": {"f": -1}}}`, nil, 400, `"Value -1.0 smaller than min of 0.0"`},
		{"list with quotes, old", old, `{"2": {"class_type": "Typed", "inputs": {"c": "it's"}}}`, nil, 400, `c: 'it's' not in ['a', 'b']`},
		{"list with quotes", young, `{"2": {"class_type": "Typed", "inputs": {"c": "it's"}}}`, nil, 400, `c: \"it's\" not in ['a', 'b']`},
		{"combo of a schema", young, `{"2": {"class_type": "Typed", "inputs": {"combo": "z"}}}`, nil, 400, `combo: 'z' not in ['x', 'y']`},
		{"combo of a schema, old", old, `{"2": {"class_type": "Typed", "inputs": {"combo": "z"}}}`, nil, 0, `"combo": "z"`},
		{"anything goes", young, `{"1": {"class_type": "Any", "inputs": {"a": 1}}, "2": {"class_type": "Out", "inputs": {"x": ["1", 7], "y": [1, 2, 3]}}}`, nil, 400, `bad_linked_input`},
		{"any slot of a scripted node", young, `{"1": {"class_type": "Any", "inputs": {}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 7]}}}`, nil, 0, ``},
		{"negative slot", young, `{"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", -1]}}}`, nil, 0, ``},
		{"slot of a schema class", young, `{"1": {"class_type": "PrimitiveInt", "inputs": {"value": 1}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}}}`, nil, 400, `list index out of range`},
		{"slot that is a float", young, `{"1": {"class_type": "PrimitiveInt", "inputs": {"value": 1}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0.5]}}}`, nil, 400, `list indices must be integers or slices, not float`},
		{"link with a number", young, `{"1": {"class_type": "EmptyImage", "inputs": {}}, "2": {"class_type": "PreviewImage", "inputs": {"images": [1, 0]}}}`, nil, 400, `"details": "1"`},
		{"load without a name", young, `{"1": {"class_type": "LoadImage", "inputs": {}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}`, nil, 400, `LoadImage.VALIDATE_INPUTS() missing 1 required positional argument: 'image'`},
		{"load a number", young, `{"1": {"class_type": "LoadImage", "inputs": {"image": 5}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}`, nil, 400, `'int' object has no attribute 'endswith'`},
		{"null inputs, old", old, `{"2": {"class_type": "PreviewImage", "inputs": null}}`, nil, 400, `argument of type 'NoneType' is not iterable`},
		{"null inputs", young, `{"2": {"class_type": "PreviewImage", "inputs": null}}`, nil, 500, ``},
		{"list inputs, old", old, `{"2": {"class_type": "PreviewImage", "inputs": []}}`, nil, 400, `required_input_missing`},
		{"list as a node, old", old, `{"2": []}`, nil, 400, `missing the class_type`},
		{"list as a node, 0.12", version{0, 12, 0}, `{"2": []}`, nil, 500, ``},
		{"list as a class", young, `{"2": {"class_type": ["PreviewImage"], "inputs": {}}}`, nil, 500, ``},
		{"number as a class", young, `{"2": {"class_type": 5, "inputs": {}}}`, nil, 400, `Node '5' not found`},
		{"null meta", young, `{"2": {"class_type": "None", "_meta": null, "inputs": {}}}`, nil, 500, ``},
		{"title of a missing class", young, `{"2": {"class_type": "Missing", "_meta": {"title": "Mine"}, "inputs": {}}}`, nil, 400, `"message": "Node 'Mine' not found. The custom node may not be installed."`},
		{"no class, no title", young, `{"7": {"inputs": {}}}`, nil, 400, `"message": "Node 'ID #7' has no class_type.`},
		{"targets", young, `{"1": {"class_type": "Out", "inputs": {}}, "2": {"class_type": "Out", "inputs": {}}}`, []string{"2"}, 0, ``},
		{"targets that match nothing", young, `{"1": {"class_type": "Out", "inputs": {}}}`, []string{"2"}, 400, `prompt_no_outputs`},
		{"targets before they were known", version{0, 3, 47}, `{"1": {"class_type": "Out", "inputs": {}}}`, []string{"2"}, 0, ``},
		{"output that is its own input", young, `{"1": {"class_type": "Out", "inputs": {"x": ["1", 0]}}}`, nil, 400, `"details": "1 (Out) -> 1 (Out)"`},
		{"output that is its own input, old", old, `{"1": {"class_type": "Out", "inputs": {"x": ["1", 0]}}}`, nil, 400, `"node_errors": {}`},
		{"inputs missing behind a link", young, `{"1": {"class_type": "EmptyImage"}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}`, nil, 400, `exception_during_inner_validation`},
	} {
		classes := builtinClasses(tc.version)
		classes["Any"] = classOf("Any", Node{})
		classes["Out"] = classOf("Out", Node{Output: true})
		classes["Typed"] = classOf("Typed", Node{Output: true, Inputs: map[string]any{"optional": map[string]any{
			"i": "INT", "f": []any{"FLOAT", map[string]any{"min": 0.0}}, "s": "STRING", "b": "BOOLEAN", "c": []string{"a", "b"},
			"combo": []any{"COMBO", map[string]any{"options": []string{"x", "y"}}},
		}}})
		g, err := parseGraph(json.RawMessage(tc.graph))
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		outputs, nodeErrors, refused := validatePrompt(tc.version, classes, newFileStore(), "", g, tc.targets, tc.targets != nil)
		status, answer := 0, string(g.raw)
		if refused != nil {
			status, answer = refused.status, string(pyJSON(refused.body))
		} else if len(outputs) == 0 || len(nodeErrors) > 0 {
			t.Errorf("%s: outputs %v, errors %s", tc.name, outputs, pyJSON(nodeErrors))
		}
		if status != tc.status || !strings.Contains(answer, tc.want) {
			t.Errorf("%s: %d %s\nwant %d with %s", tc.name, status, answer, tc.status, tc.want)
		}
	}
}

func TestClassOf(t *testing.T) {
	t.Parallel()
	c := classOf("Mine", Node{Inputs: map[string]any{
		"b": "INT", "a": []string{"x", "y"}, "c": []any{"FLOAT", map[string]any{"default": 1.0}}, "d": []any{[]string{"k"}, map[string]any{}},
	}})
	want := `{"input": {"required": {"a": [["x", "y"]], "b": ["INT"], "c": ["FLOAT", {"default": 1.0}], "d": [["k"], {}]}}, ` +
		`"input_order": {"required": ["a", "b", "c", "d"]}, "output": ["*"], "output_is_list": [false], "output_name": ["*"], ` +
		`"name": "Mine", "display_name": "Mine", "description": "", "python_module": "custom_nodes.comfyuitest", ` +
		`"category": "comfyuitest", "output_node": false}`
	if got := string(objectInfo(version{0, 3, 64}, c, newFileStore())); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for _, inputs := range []map[string]any{
		{"required": map[string]any{"a": []any{"INT"}, "b": []string{"ONE"}}, "optional": map[string]any{"c": []any{"FLOAT", map[string]any{"max": 1}}}},
		{"required": map[string][]any{"a": {"INT"}, "b": {[]string{"ONE"}}}, "optional": map[string][2]any{"c": {"FLOAT", map[string]int{"max": 1}}}},
		{"required": map[string]any{"a": "INT", "b": []any{[]any{"ONE"}}}, "optional": map[string]any{"c": json.RawMessage(`["FLOAT", {"max": 1.0}]`)}},
	} {
		want := `{"input": {"required": {"a": ["INT"], "b": [["ONE"]]}, "optional": {"c": ["FLOAT", {"max": 1.0}]}}, `
		if got := string(objectInfo(version{0, 3, 64}, classOf("Mine", Node{Inputs: inputs}), newFileStore())); !strings.HasPrefix(got, want) {
			t.Errorf("%v: got  %s\nwant %s", inputs, got, want)
		}
	}
	for name, inputs := range map[string]map[string]any{
		"no JSON":     {"a": func() {}},
		"half groups": {"required": map[string]any{"a": "INT"}, "b": "INT"},
		"a number":    {"a": 5},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("inputs with %s were taken", name)
				}
			}()
			classOf("Bad", Node{Inputs: inputs})
		}()
	}
}

func FuzzValidatePrompt(f *testing.F) {
	for _, name := range captureVersions {
		paths, err := filepath.Glob(filepath.Join(captureDir, name, "invalid-*.jsonl"))
		if err != nil {
			f.Fatal(err)
		}
		for _, path := range paths {
			for _, line := range readCapture(f, path) {
				var p post
				if line.Method == "POST" && json.Unmarshal(line.Request, &p) == nil && p.Prompt != nil {
					f.Add([]byte(p.Prompt), uint8(len(name)))
				}
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, release uint8) {
		g, err := parseGraph(data)
		if err != nil {
			return
		}
		v := []version{{0, 3, 40}, {0, 3, 64}, {0, 8, 0}, {0, 12, 0}, {0, 20, 0}, newestVersion}[release%6]
		classes := recordedClasses(v)
		delete(classes, "ProbeValidate") // it may sleep
		outputs, nodeErrors, refused := validatePrompt(v, classes, newFileStore(), "", g, nil, false)
		if (refused == nil) == (len(outputs) == 0) {
			t.Fatalf("outputs %v, refused %v", outputs, refused)
		}
		if !json.Valid(pyJSON(nodeErrors)) && !bytes.Contains(pyJSON(nodeErrors), []byte("NaN")) && !bytes.Contains(pyJSON(nodeErrors), []byte("Infinity")) {
			t.Fatalf("node errors are no JSON: %s", pyJSON(nodeErrors))
		}
		again, err := parseGraph(g.raw)
		if err != nil || string(again.raw) != string(g.raw) {
			t.Fatalf("the graph changed: %v\n%s\n%s", err, g.raw, again.raw)
		}
	})
}
