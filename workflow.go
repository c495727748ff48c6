package comfyui

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/comfypod/comfyui/internal/media"
	"github.com/comfypod/comfyui/internal/rawjson"
	"github.com/comfypod/comfyui/internal/wire"
)

// maxWorkflowSize bounds what is read as a workflow. A pod takes bodies of 100 MB by default (--max-upload-size).
const maxWorkflowSize = 100 << 20

// Workflow is a graph of nodes in the API format, which a pod runs, or in the UI format, which the editor saves and
// PodClient.Convert turns into the former.
//
// It keeps what was loaded: the order of nodes and inputs, every digit of every number (seeds beyond 2^53), and fields that
// the library does not know. One field is left out: is_changed, which a server adds to nodes as it runs them and which, sent
// back, makes it take changed input files for unchanged ones.
//
// Like a map, a Workflow may be used by many goroutines at a time only while none of them calls Set or UnmarshalJSON. Execute
// and Submit take a snapshot: the workflow may be changed when they have returned, and a Clone at any time. The zero Workflow
// is empty, and cannot be run.
type Workflow struct {
	nodes []*graphNode    // API format, in the order they were loaded in
	info  *graphInfo      // what nodes are called; never changes
	ui    json.RawMessage // UI format; then nodes is nil
}

// graphNode is one entry of an API-format graph. It never changes, so that clones can share it.
type graphNode struct {
	id, class, title string
	raw              json.RawMessage
}

// Node is one node of a Workflow.
type Node struct {
	ID, Class, Title string
	// Inputs is a copy. A link is a Link; other values are as Workflow.Get returns them.
	Inputs map[string]any
}

// Link is an input that is fed by an output of another node.
type Link struct {
	Node string // the id of that node
	Slot int    // which of its outputs, from 0
}

// LoadWorkflow reads a workflow from a file: JSON, or a picture, video or sound that a ComfyUI server saved, which carries the
// graph that made it. Those are PNG (animated ones too), WebP and JPEG (EXIF), MP4 and QuickTime, WebM and Matroska, MP3, FLAC,
// Opus and Vorbis in Ogg, and .latent. The name of the file does not matter. Of the two graphs that a server writes the one in
// API format, "prompt", is taken; a file that has the editor's "workflow" only yields that, in UI format. A server
// can be told to write neither (--disable-metadata), and what re-encodes a picture drops both.
//
// The errors of the file system stay visible to errors.Is. JSON of more than 100 MiB, or with a graph nested deeper than 256, is
// refused.
func LoadWorkflow(path string) (*Workflow, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, loadError(err) // it names the path
	}
	defer func() { _ = file.Close() }() // it was only read
	w, err := readWorkflow(file)
	if err != nil {
		return nil, loadError(fmt.Errorf("%s: %w", path, err))
	}
	return w, nil
}

func loadError(err error) *Error {
	e := &Error{Op: "load workflow", Category: CategoryValidation, Err: err}
	if errors.Is(err, fs.ErrNotExist) {
		e.Category = CategoryNotFound
	}
	return e
}

func readWorkflow(file *os.File) (*Workflow, error) {
	stat, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if stat.IsDir() {
		return nil, invalidf("it is a directory")
	}
	if stat.Mode().IsRegular() { // a video is not read into memory
		w, err := mediaWorkflow(file, stat.Size())
		if !errors.Is(err, media.ErrFormat) {
			return w, err
		}
	}
	data, err := io.ReadAll(io.LimitReader(file, maxWorkflowSize+1))
	if err != nil {
		return nil, err
	}
	return parseWorkflow(data)
}

// ParseWorkflow reads a workflow from the bytes of a file that LoadWorkflow would read. JSON can also be the body of a POST
// /prompt, {"prompt": {…}, "client_id": …}; of that only the graph is taken.
func ParseWorkflow(data []byte) (*Workflow, error) {
	w, err := parseWorkflow(data)
	if err != nil {
		return nil, fmt.Errorf("comfyui: parse workflow: %w", err)
	}
	return w, nil
}

func parseWorkflow(data []byte) (*Workflow, error) {
	w, err := mediaWorkflow(bytes.NewReader(data), int64(len(data)))
	if !errors.Is(err, media.ErrFormat) {
		return w, err
	}
	return graphFromJSON(data)
}

func mediaWorkflow(r io.ReaderAt, size int64) (*Workflow, error) {
	texts, err := media.Read(r, size)
	switch {
	case err != nil:
		return nil, err
	case texts.Prompt == nil && texts.Workflow == nil:
		return nil, invalidf("it carries no workflow; files that ComfyUI saved do, unless they were re-encoded or the server was told --disable-metadata")
	case texts.Prompt == nil:
		return graphFromJSON(texts.Workflow)
	}
	w, err := graphFromJSON(texts.Prompt)
	if err != nil && texts.Workflow != nil { // other programs put words under "prompt"
		if ui, uiErr := graphFromJSON(texts.Workflow); uiErr == nil {
			return ui, nil
		}
	}
	return w, err
}

// graphFromJSON takes what looks like a workflow. Whether a pod would take it is for check.
func graphFromJSON(data []byte) (*Workflow, error) {
	raw, err := compactWorkflow(data)
	if err != nil {
		return nil, err
	}
	if inner := unwrapRequest(raw); inner != nil {
		raw = inner
	}
	w := new(Workflow)
	w.set(raw)
	switch {
	case w.isUI() || slices.ContainsFunc(w.nodes, func(n *graphNode) bool { return n.class != "" }):
		return w, nil
	case rawjson.Kind(raw) != '{':
		return nil, invalidf("a workflow is a JSON object, and this is %s", kindName(raw))
	case len(w.nodes) == 0:
		return nil, invalidf("it is empty: {} holds no nodes")
	}
	return nil, invalidf("it is not a workflow: no entry of the JSON object is a node, which is an object with a class_type")
}

func compactWorkflow(data []byte) (json.RawMessage, error) {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	switch {
	case len(data) > maxWorkflowSize:
		return nil, invalidf("it is larger than %d MiB", maxWorkflowSize>>20)
	case len(bytes.TrimSpace(data)) == 0:
		return nil, invalidf("it is empty")
	case bytes.HasPrefix(data, []byte{0xff, 0xfe}), bytes.HasPrefix(data, []byte{0xfe, 0xff}):
		return nil, invalidf("it is UTF-16; save it as UTF-8")
	}
	raw, err := rawjson.Compact(wire.Sanitize(data)) // the server's encoder writes NaN
	if err != nil {
		return nil, invalidf("it is no valid JSON: %v", err)
	}
	return raw, nil
}

// requestFields are what a body of POST /prompt can hold beside the graph.
var requestFields = []string{"client_id", "prompt_id", "number", "front", "extra_data", "partial_execution_targets"}

// unwrapRequest returns the graph in the body of a POST /prompt; nil if raw is none, or could be read otherwise.
func unwrapRequest(raw json.RawMessage) json.RawMessage {
	var graph json.RawMessage
	for _, m := range rawjson.Members(raw) {
		switch {
		case m.Name == "prompt" && rawjson.Kind(m.Value) == '{' && rawjson.Field(m.Value, "class_type") == nil:
			graph = m.Value
		case !slices.Contains(requestFields, m.Name):
			return nil
		}
	}
	return graph
}

// set takes an object that has passed rawjson.Compact.
func (w *Workflow) set(raw json.RawMessage) {
	*w = Workflow{}
	members := rawjson.Members(raw)
	if slices.ContainsFunc(members, func(m rawjson.Member) bool { return m.Name == "nodes" && rawjson.Kind(m.Value) == '[' }) {
		w.ui = raw
		return
	}
	for _, m := range members {
		w.nodes = append(w.nodes, newGraphNode(m.Name, m.Value))
	}
	w.info = newGraphInfo(w.nodes)
}

func newGraphNode(id string, raw json.RawMessage) *graphNode {
	if rawjson.Field(raw, "is_changed") != nil {
		kept := slices.DeleteFunc(rawjson.Members(raw), func(m rawjson.Member) bool { return m.Name == "is_changed" })
		raw = rawjson.AppendMembers(nil, kept)
	}
	return &graphNode{
		id:    id,
		class: rawjson.Text(rawjson.Field(raw, "class_type")),
		title: rawjson.Text(rawjson.Field(rawjson.Field(raw, "_meta"), "title")),
		raw:   raw,
	}
}

func kindName(raw json.RawMessage) string {
	switch rawjson.Kind(raw) {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a text"
	case 'n':
		return "null"
	case 't', 'f':
		return "a boolean"
	}
	return "a number"
}

// Set gives an input of a node a value. The node is named by its id, else by a title that no other node has, else by a class
// that no other node has. The input must be one that the node has in the workflow; an unknown one is an error that lists
// the names.
//
// The value can be anything that encoding/json can encode: NaN and the infinities cannot, nor can text that is not UTF-8. Integers keep
// every digit. Some values have a meaning of their own:
//
//   - a FileRef, a *FileRef, or an Output with a file becomes the text that LoadImage takes (FileRef.String);
//   - a Link feeds the input from another node of the workflow;
//   - a list of a text and a number is a link too, as in the JSON of a workflow;
//   - any other list is wrapped as the editor does, {"__value__": […]}, since a pod takes a bare one for a link that is broken.
//
// A value takes the place of a link, and a link that of a value: what fed the input before does not any more.
func (w *Workflow) Set(node, input string, value any) error {
	if err := w.setInput(node, input, value); err != nil {
		return fmt.Errorf("comfyui: set %s.%s: %w", node, input, err)
	}
	return nil
}

func (w *Workflow) setInput(node, input string, value any) error {
	at, err := w.find(node)
	if err != nil {
		return err
	}
	n := w.nodes[at]
	inputs, i, err := n.input(input)
	if err != nil {
		return err
	}
	raw, err := w.encode(value)
	if err != nil {
		return err
	}
	inputs[i].Value = raw
	w.nodes[at] = n.withInputs(inputs)
	return nil
}

// hasInput returns why a Set of that input would fail, whatever the value.
func (w *Workflow) hasInput(node, input string) error {
	at, err := w.find(node)
	if err != nil {
		return err
	}
	_, _, err = w.nodes[at].input(input)
	return err
}

// Get returns the value of an input; nodes are named as in Set. Texts, booleans and null are string, bool and nil; an integer is an
// int64, or a uint64 where that is too small, or a json.Number beyond both; any other number is a float64. A link is a Link,
// a list (wrapped or not) is []any, an object map[string]any.
func (w *Workflow) Get(node, input string) (any, error) {
	at, err := w.find(node)
	if err == nil {
		var inputs []rawjson.Member
		var i int
		if inputs, i, err = w.nodes[at].input(input); err == nil {
			return decodeInput(inputs[i].Value), nil
		}
	}
	return nil, fmt.Errorf("comfyui: get %s.%s: %w", node, input, err)
}

// Clone returns a copy that shares no changes with w. It is cheap: nodes are copied when they are changed.
func (w *Workflow) Clone() *Workflow {
	if w == nil {
		return nil
	}
	return &Workflow{nodes: slices.Clone(w.nodes), info: w.info, ui: w.ui}
}

// Nodes yields the nodes in the order of the file. A UI-format workflow yields none: Convert it first.
func (w *Workflow) Nodes() iter.Seq[Node] {
	return func(yield func(Node) bool) {
		if w == nil {
			return
		}
		for _, n := range slices.Clone(w.nodes) { // a Set inside the loop is fine
			node := Node{ID: n.id, Class: n.class, Title: n.title, Inputs: map[string]any{}}
			for _, m := range rawjson.Members(rawjson.Field(n.raw, "inputs")) {
				node.Inputs[m.Name] = decodeInput(m.Value)
			}
			if !yield(node) {
				return
			}
		}
	}
}

// ends returns the nodes that feed no other.
func (w *Workflow) ends() []string {
	feeds := map[string]bool{}
	for n := range w.Nodes() {
		for _, v := range n.Inputs {
			if link, ok := v.(Link); ok {
				feeds[link.Node] = true
			}
		}
	}
	var ends []string
	for _, n := range w.nodes {
		if !feeds[n.id] {
			ends = append(ends, n.id)
		}
	}
	return ends
}

// MarshalJSON returns the graph with nodes and fields in the order in which they were loaded, in UI format if it was loaded in
// that. A nil Workflow is null, an empty one {}.
func (w *Workflow) MarshalJSON() ([]byte, error) {
	switch {
	case w == nil:
		return []byte("null"), nil
	case w.isUI():
		return slices.Clone(w.ui), nil
	}
	members := make([]rawjson.Member, len(w.nodes))
	for i, n := range w.nodes {
		members[i] = rawjson.Member{Name: n.id, Value: n.raw}
	}
	return rawjson.AppendMembers(nil, members), nil
}

// UnmarshalJSON replaces w with what ParseWorkflow would make of data; {} makes it empty, and null leaves it alone.
func (w *Workflow) UnmarshalJSON(data []byte) error {
	if w == nil {
		return errors.New("comfyui: unmarshal workflow: the *Workflow is nil")
	}
	data = bytes.TrimSpace(data)
	if string(data) == "null" {
		return nil
	}
	if inside, ok := bytes.CutPrefix(data, []byte("{")); ok && string(bytes.TrimSpace(inside)) == "}" {
		*w = Workflow{}
		return nil
	}
	parsed, err := graphFromJSON(data)
	if err != nil {
		return fmt.Errorf("comfyui: unmarshal workflow: %w", err)
	}
	*w = *parsed
	return nil
}

// Convert turns a UI-format workflow into API format with the pod's /object_info; an API-format one is returned as it is.
//
// This version cannot convert yet: for a UI-format workflow it returns an Error of CategoryValidation that says how to save it
// in API format.
func (c *PodClient) Convert(ctx context.Context, w *Workflow) (*Workflow, error) {
	const op = "convert"
	if err := c.usable(op); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, &Error{Op: op, Pod: c.Name(), Category: CategoryContext, Err: endOf(ctx)}
	}
	switch {
	case w == nil:
		return nil, &Error{Op: op, Pod: c.Name(), Category: CategoryValidation, Err: w.check()}
	case w.isUI():
		return nil, &Error{Op: op, Pod: c.Name(), Category: CategoryValidation, Err: uiFormatError()}
	}
	return w, nil
}

// invalidf is an error in what the caller gave.
func invalidf(format string, args ...any) error {
	return &ValidationError{Type: "invalid_workflow", Message: fmt.Sprintf(format, args...)}
}

// isUI reports whether the workflow is in UI format, which no pod runs.
func (w *Workflow) isUI() bool { return w != nil && w.ui != nil }

const saveAsAPI = `save it in API format: in the editor "Export (API)" in the Workflow menu, or "Save (API Format)" in older versions`

func uiFormatError() *ValidationError {
	return &ValidationError{
		Type:    "ui_format",
		Message: "the workflow is in the editor's UI format, which a pod does not run",
		Details: saveAsAPI,
	}
}

// check returns what is wrong with the workflow before any POST: a *ValidationError that says what to do. It refuses
// what a server answers with a bare 500 (server.md, POST /prompt) and nodes without a class; all else is for the server to judge.
func (w *Workflow) check() error {
	switch {
	case w == nil:
		return &ValidationError{Type: "no_workflow", Message: "the workflow is nil", Details: "load one with LoadWorkflow or ParseWorkflow"}
	case w.isUI():
		return uiFormatError()
	case len(w.nodes) == 0:
		return &ValidationError{Type: "no_workflow", Message: "the workflow is empty", Details: "load one with LoadWorkflow or ParseWorkflow"}
	}
	faults := map[string]NodeErrors{}
	for _, n := range w.nodes {
		if fault := n.fault(); fault != "" {
			faults[n.id] = NodeErrors{Class: n.class, Errors: []NodeError{{Type: "invalid_node", Message: "it " + fault}}}
		}
	}
	if len(faults) == 0 {
		return nil
	}
	return &ValidationError{
		Type:    "invalid_workflow",
		Message: "the workflow has entries that are no nodes (a node is an object with a class_type and inputs)",
		Nodes:   faults,
	}
}

// canonical returns the one form that equal workflows have, whatever the order of keys and the white space they were loaded with:
// keys sorted, numbers digit for digit.
func (w *Workflow) canonical() []byte {
	if w == nil {
		return []byte("null")
	}
	if w.isUI() {
		return rawjson.AppendCanonical(nil, w.ui)
	}
	nodes := slices.SortedFunc(slices.Values(w.nodes), byID)
	size := 2
	for _, n := range nodes {
		size += len(n.id) + len(n.raw) + 4
	}
	out := append(make([]byte, 0, size), '{')
	for i, n := range nodes {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(rawjson.AppendText(out, n.id), ':')
		out = rawjson.AppendCanonical(out, n.raw)
	}
	return append(out, '}')
}

// hash is the hex SHA-256 of the canonical form: a job's workflow hash.
func (w *Workflow) hash() string {
	sum := sha256.Sum256(w.canonical())
	return hex.EncodeToString(sum[:])
}

// graphInfo returns the names of the nodes, shared with all clones; never nil.
func (w *Workflow) graphInfo() *graphInfo {
	if w == nil || w.info == nil {
		return &graphInfo{}
	}
	return w.info
}

// find resolves the name of a node to its place.
func (w *Workflow) find(name string) (int, error) {
	switch {
	case w == nil || !w.isUI() && len(w.nodes) == 0:
		return 0, invalidf("the workflow is empty; load one with LoadWorkflow or ParseWorkflow")
	case w.isUI():
		return 0, invalidf("the workflow is in the editor's UI format, whose inputs have no names; %s", saveAsAPI)
	}
	if at := slices.IndexFunc(w.nodes, func(n *graphNode) bool { return n.id == name }); at >= 0 {
		return at, nil
	}
	var several error
	for _, by := range []struct {
		what  string
		match func(*graphNode) bool
	}{
		{"title", func(n *graphNode) bool { return name != "" && n.title == name }},
		{"class", func(n *graphNode) bool { return name != "" && n.class == name }},
	} {
		var found []int
		for at, n := range w.nodes {
			if by.match(n) {
				found = append(found, at)
			}
		}
		switch len(found) {
		case 0:
		case 1:
			return found[0], nil
		default:
			several = cmp.Or(several, invalidf("%d nodes have the %s %q; name one by its id: %s", len(found), by.what, name, w.list(found)))
		}
	}
	if several != nil {
		return 0, several
	}
	return 0, invalidf("no node has the id, title or class %q; there are %s", name, w.list(w.places()))
}

// places are those of all nodes.
func (w *Workflow) places() []int {
	all := make([]int, len(w.nodes))
	for i := range all {
		all[i] = i
	}
	return all
}

// list describes nodes for an error, not too many.
func (w *Workflow) list(at []int) string {
	const most = 12
	var b strings.Builder
	for i, at := range at[:min(len(at), most)] {
		if i > 0 {
			b.WriteString(", ")
		}
		n := w.nodes[at]
		fmt.Fprintf(&b, "%q (%s", n.id, n.class)
		if n.title != "" && n.title != n.class {
			fmt.Fprintf(&b, ", %q", n.title)
		}
		b.WriteString(")")
	}
	if more := len(at) - most; more > 0 {
		fmt.Fprintf(&b, " and %d more", more)
	}
	return b.String()
}

// input returns the node's inputs, the caller's to change, and the place of one of them.
func (n *graphNode) input(name string) ([]rawjson.Member, int, error) {
	inputs := rawjson.Members(rawjson.Field(n.raw, "inputs"))
	at := slices.IndexFunc(inputs, func(m rawjson.Member) bool { return m.Name == name })
	if at >= 0 {
		return inputs, at, nil
	}
	if len(inputs) == 0 {
		return nil, 0, invalidf("node %q (%s) has no inputs", n.id, n.class)
	}
	names := make([]string, len(inputs))
	for i, m := range inputs {
		names[i] = m.Name
	}
	return nil, 0, invalidf("node %q (%s) has no input %q; it has %s", n.id, n.class, name, strings.Join(names, ", "))
}

func (n *graphNode) withInputs(inputs []rawjson.Member) *graphNode {
	fields := rawjson.Members(n.raw)
	for i := range fields {
		if fields[i].Name == "inputs" {
			fields[i].Value = rawjson.AppendMembers(nil, inputs)
		}
	}
	return &graphNode{id: n.id, class: n.class, title: n.title, raw: rawjson.AppendMembers(nil, fields)}
}

// fault says why the entry is no node; "": it is one.
func (n *graphNode) fault() string {
	if rawjson.Kind(n.raw) != '{' {
		return "is " + kindName(n.raw)
	}
	if n.class == "" {
		return "has no class_type"
	}
	if inputs := rawjson.Field(n.raw, "inputs"); inputs != nil && rawjson.Kind(inputs) != '{' {
		return "has inputs that are " + kindName(inputs)
	}
	return ""
}

// encode makes JSON of a value of Set.
func (w *Workflow) encode(value any) (json.RawMessage, error) {
	switch v := value.(type) {
	case FileRef:
		return encodeFile(&v)
	case *FileRef:
		return encodeFile(v)
	case Output:
		return encodeFile(v.File)
	case Link:
		return w.encodeLink(v)
	case *Link:
		if v == nil {
			return nil, invalidf("the *Link is nil")
		}
		return w.encodeLink(*v)
	case string:
		return encodeText(v)
	}
	raw, err := encodeJSON(value)
	if err != nil || rawjson.Kind(raw) != '[' {
		return raw, err
	}
	if link, ok := decodeLink(raw); ok {
		return w.encodeLink(link)
	}
	return rawjson.AppendMembers(nil, []rawjson.Member{{Name: wrapperKey, Value: raw}}), nil
}

func encodeFile(f *FileRef) (json.RawMessage, error) {
	if f == nil || f.Filename == "" {
		return nil, invalidf("the value names no file")
	}
	return encodeText(f.String())
}

func encodeText(s string) (json.RawMessage, error) {
	if !utf8.ValidString(s) {
		return nil, invalidf("the text %q is not valid UTF-8", s)
	}
	return rawjson.AppendText(nil, s), nil
}

// encodeLink refuses what the server would answer with exception_during_validation only.
func (w *Workflow) encodeLink(l Link) (json.RawMessage, error) {
	if !slices.ContainsFunc(w.nodes, func(n *graphNode) bool { return n.id == l.Node }) {
		return nil, invalidf("the link leads to a node %q that is not there; there are %s", l.Node, w.list(w.places()))
	}
	if l.Slot < 0 {
		return nil, invalidf("the link leads to output %d; they count from 0", l.Slot)
	}
	raw := rawjson.AppendText([]byte{'['}, l.Node)
	return fmt.Appendf(raw, ",%d]", l.Slot), nil
}

func encodeJSON(value any) (json.RawMessage, error) {
	var buf bytes.Buffer
	encoder := json.NewEncoder(&buf)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		var unsupported *json.UnsupportedValueError
		if errors.As(err, &unsupported) && isFloat(unsupported.Value) {
			return nil, invalidf("the value is or holds %s, which JSON cannot express", unsupported.Str)
		}
		return nil, invalidf("a %T cannot be a value: %v", value, err)
	}
	raw, err := rawjson.Compact(buf.Bytes())
	if err != nil {
		return nil, invalidf("the value cannot be sent: %v", err)
	}
	return raw, nil
}

func isFloat(v reflect.Value) bool { return v.IsValid() && v.CanFloat() }

// wrapperKey is under which the editor puts a list that is a value, as opposed to a link.
const wrapperKey = "__value__"

// decodeInput decodes a value as it stands under a node's inputs.
func decodeInput(raw json.RawMessage) any {
	if link, ok := decodeLink(raw); ok {
		return link
	}
	if members := rawjson.Members(raw); len(members) == 1 && members[0].Name == wrapperKey && rawjson.Kind(members[0].Value) == '[' {
		raw = members[0].Value
	}
	return decodeValue(raw)
}

// decodeLink takes what the server takes for a link: a list of a text and a number.
func decodeLink(raw json.RawMessage) (Link, bool) {
	pair := rawjson.Elements(raw)
	if len(pair) != 2 || rawjson.Kind(pair[0]) != '"' || rawjson.Kind(pair[1]) != 0 {
		return Link{}, false
	}
	slot, err := strconv.ParseFloat(string(pair[1]), 64)
	if err != nil || slot != math.Trunc(slot) || math.Abs(slot) > math.MaxInt32 {
		return Link{}, false
	}
	return Link{rawjson.Text(pair[0]), int(slot)}, true
}

func decodeValue(raw json.RawMessage) any {
	switch rawjson.Kind(raw) {
	case '{':
		object := map[string]any{}
		for _, m := range rawjson.Members(raw) {
			object[m.Name] = decodeValue(m.Value)
		}
		return object
	case '[':
		list := []any{}
		for _, element := range rawjson.Elements(raw) {
			list = append(list, decodeValue(element))
		}
		return list
	case '"':
		return rawjson.Text(raw)
	case 't':
		return true
	case 'f':
		return false
	case 'n':
		return nil
	}
	return decodeNumber(string(raw))
}

func decodeNumber(s string) any {
	if !strings.ContainsAny(s, ".eE") {
		if n, err := strconv.ParseInt(s, 10, 64); err == nil {
			return n
		}
		if n, err := strconv.ParseUint(s, 10, 64); err == nil {
			return n
		}
		return json.Number(s)
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil { // beyond the range of a float64
		return json.Number(s)
	}
	return f
}

// graphInfo is what the nodes of a workflow are called. It never changes and is shared by goroutines, by clones, and by all jobs
// that run a workflow.
type graphInfo struct {
	nodes []nodeInfo // by id
}

type nodeInfo struct{ id, class, title string }

func newGraphInfo(nodes []*graphNode) *graphInfo {
	g := &graphInfo{nodes: make([]nodeInfo, 0, len(nodes))}
	for _, n := range slices.SortedFunc(slices.Values(nodes), byID) {
		g.nodes = append(g.nodes, nodeInfo{n.id, n.class, n.title})
	}
	return g
}

func byID(a, b *graphNode) int { return cmp.Compare(a.id, b.id) }

// node returns what a node is called. An id that a node made up as it expanded ("57.0.0.1") is not ok.
func (g *graphInfo) node(id string) (class, title string, ok bool) {
	at, ok := slices.BinarySearchFunc(g.nodes, id, func(n nodeInfo, id string) int { return cmp.Compare(n.id, id) })
	if !ok {
		return "", "", false
	}
	return g.nodes[at].class, g.nodes[at].title, true
}

// plannedSteps is the number of steps that a node says in its inputs that it will make; 0: it says none, or a link does.
func (n *graphNode) plannedSteps() float64 {
	raw := rawjson.Field(rawjson.Field(n.raw, "inputs"), "steps")
	if len(raw) == 0 || rawjson.Kind(raw) != 0 {
		return 0
	}
	steps, err := strconv.ParseFloat(string(raw), 64)
	if err != nil || math.IsNaN(steps) {
		return 0
	}
	return steps
}
