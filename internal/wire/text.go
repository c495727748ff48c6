// Package wire decodes what a ComfyUI server sends: the frames of its WebSocket and the bodies of its HTTP answers. Bytes in,
// typed messages out; no I/O, no goroutines. Unknown message types are kept raw.
//
// All decoders share one reading of JSON. The whole document is checked against the grammar, and beyond it NaN, Infinity and
// -Infinity are taken, which Python writes. Nesting is bounded. Of equal keys the last wins. A value of a type that was not
// expected is taken as absent, because custom nodes send what they like; ids may be numbers. Text that is no UTF-8 gets U+FFFD.
// What is decoded is a small multiple of the input at most, and the number of its parts is bounded; the input is for the caller to bound.
package wire

import (
	"encoding/json"
	"slices"
	"sync"
)

// Type is the type of a text frame.
type Type uint8

const (
	Other Type = iota // a type that this package does not know, or none
	Status
	FeatureFlags
	ExecutionStart
	ExecutionCached
	Executing
	Progress
	ProgressState
	Executed
	ExecutionSuccess
	ExecutionError
	ExecutionInterrupted
)

var typeNames = [...]string{
	Other:                "other",
	Status:               "status",
	FeatureFlags:         "feature_flags",
	ExecutionStart:       "execution_start",
	ExecutionCached:      "execution_cached",
	Executing:            "executing",
	Progress:             "progress",
	ProgressState:        "progress_state",
	Executed:             "executed",
	ExecutionSuccess:     "execution_success",
	ExecutionError:       "execution_error",
	ExecutionInterrupted: "execution_interrupted",
}

// String returns the name on the wire; "other" for Other.
func (t Type) String() string { return typeNames[t] }

// typeOf is asked for every frame: a switch costs a third of a walk through the names.
func typeOf(name []byte) Type {
	switch string(name) {
	case "status":
		return Status
	case "feature_flags":
		return FeatureFlags
	case "execution_start":
		return ExecutionStart
	case "execution_cached":
		return ExecutionCached
	case "executing":
		return Executing
	case "progress":
		return Progress
	case "progress_state":
		return ProgressState
	case "executed":
		return Executed
	case "execution_success":
		return ExecutionSuccess
	case "execution_error":
		return ExecutionError
	case "execution_interrupted":
		return ExecutionInterrupted
	}
	return Other
}

// Message is one text frame, or one message of a history entry. It shares no memory with the bytes that it was read from.
type Message struct {
	Type      Type
	Name      string // the wire name, also for Other
	PromptID  string // of any type; "": none, as in status frames and the executing sent on reconnect
	Node      string // executing, progress, executed, error, interrupted; "" when null or absent
	NodeNull  bool   // executing: node is present and null, the end of a prompt
	Display   string // executing, executed: display_node
	Value     float64
	Max       float64         // progress, with Value: finite, whatever the server sent
	Nodes     []NodeState     // progress_state, in the order of the JSON
	Cached    []string        // execution_cached
	Output    json.RawMessage // executed: without NaN and Infinity; nil when null
	Failure   *Failure        // never nil for execution_error and execution_interrupted, else nil
	Timestamp int64           // ms; 0: absent (an ExecutionBlocked error has none)
	Remaining int             // status: queue_remaining; -1: absent
	SID       string          // status sent on connect
	Raw       json.RawMessage // Other and FeatureFlags: data without NaN and Infinity; nil when absent
}

// NodeState is one node of a progress_state. Value and Max are finite.
type NodeState struct {
	ID, Display, Parent, Real string
	Value, Max                float64
	State                     string // "running", "finished", and what later servers may add
}

// Failure is what execution_error and execution_interrupted say. Of an interrupted prompt only NodeID, NodeType and Executed are known.
type Failure struct {
	NodeID, NodeType, ExceptionType, Message string
	Traceback                                []string
	Executed                                 []string
}

// Decoder decodes the frames of one stream. It keeps the ids and names that come again and again, a bounded number of them. It
// is not safe for concurrent use.
type Decoder struct {
	s        scanner
	names    interner
	promptID string // the one seen last
	peeked   []byte
	nodes    []NodeState
	texts    []string
	places   map[string]int
}

func NewDecoder() *Decoder { return &Decoder{} }

// decoders are those of documents that come one at a time, kept for their buffers and names.
var decoders = sync.Pool{New: func() any { return NewDecoder() }}

func borrow() *Decoder { return decoders.Get().(*Decoder) }

func (d *Decoder) giveBack() {
	d.release()
	decoders.Put(d)
}

// Peek finds the type and the prompt id of a text frame and allocates nothing. The id is valid until the next call and as long as
// the frame is. It is what Text would give as PromptID. ok is false when Text would fail.
func (d *Decoder) Peek(frame []byte) (t Type, promptID []byte, ok bool) {
	s := &d.s
	s.begin(frame)
	defer d.release()
	for s.object(); s.next(); {
		switch string(s.key) {
		case "type":
			t = typeOf(d.nameText())
		case "data":
			promptID = d.peekPromptID()
		default:
			s.skip()
		}
	}
	s.end()
	if s.bad {
		return Other, nil, false
	}
	return t, promptID, true
}

func (d *Decoder) peekPromptID() (promptID []byte) {
	s := &d.s
	if !s.object() {
		return nil
	}
	for s.next() {
		if string(s.key) != "prompt_id" {
			s.skip()
			continue
		}
		promptID = s.text()
		if len(s.buf) > 0 && len(promptID) > 0 && &promptID[0] == &s.buf[0] {
			d.peeked = append(d.peeked[:0], promptID...) // the next escaped text overwrites buf
			promptID = d.peeked
		}
	}
	return promptID
}

// Text decodes one text frame. A frame that is no JSON object is ErrMalformed; one without type is Other.
func (d *Decoder) Text(frame []byte) (Message, error) {
	s := &d.s
	s.begin(frame)
	defer d.release()
	m := Message{Remaining: -1}
	// As a rule type comes first and data once: then data is decoded as it is met. Otherwise it is passed, and decoded when
	// its type is known.
	dataAt, typed, decoded := -1, false, false
	var decodedAs Type
	for s.object(); s.next(); {
		switch string(s.key) {
		case "type":
			d.name(&m)
			typed = true
		case "data":
			decoded = typed && dataAt < 0
			dataAt, decodedAs = s.i, m.Type
			if decoded {
				d.data(&m)
			} else {
				s.skip()
			}
		default:
			s.skip()
		}
	}
	s.end()
	if dataAt >= 0 && !s.bad && (!decoded || decodedAs != m.Type) {
		m = Message{Type: m.Type, Name: m.Name, Remaining: -1}
		s.rewind(dataAt, 1)
		d.data(&m)
	}
	if s.bad {
		return Message{}, s.err("text frame")
	}
	m.complete()
	return m, nil
}

// complete makes good for data that never came.
func (m *Message) complete() {
	if m.Failure == nil && (m.Type == ExecutionError || m.Type == ExecutionInterrupted) {
		m.Failure = &Failure{}
	}
}

// release lets go of the frame, and of scratch that an unusual one has made large.
func (d *Decoder) release() {
	d.s.b, d.s.key = nil, nil
	if cap(d.peeked) > maxScratch {
		d.peeked = nil
	}
}

// name reads the type of a message.
func (d *Decoder) name(m *Message) {
	name := d.nameText()
	if m.Type = typeOf(name); m.Type == Other {
		m.Name = d.names.str(name)
	} else {
		m.Name = m.Type.String()
	}
}

// nameText reads the type of a frame: a string, or nothing.
func (d *Decoder) nameText() []byte {
	if d.s.at() != '"' {
		d.s.skip()
		return nil
	}
	return d.s.str()
}

// data reads the data of a message whose Type is set.
func (d *Decoder) data(m *Message) {
	s := &d.s
	start := s.i
	m.complete()
	if s.object() {
		for s.next() {
			if string(s.key) == "prompt_id" {
				m.PromptID = d.prompt()
				continue
			}
			switch m.Type {
			case Progress:
				d.progress(m)
			case ProgressState:
				d.progressState(m)
			case Executing:
				d.executing(m)
			case Executed:
				d.executed(m)
			case Status:
				d.status(m)
			case ExecutionStart, ExecutionSuccess, ExecutionCached:
				d.stage(m)
			case ExecutionError, ExecutionInterrupted:
				d.failure(m)
			default:
				s.skip()
			}
		}
	}
	if m.Type == Other || m.Type == FeatureFlags {
		m.Raw = s.copyFrom(start)
	}
}

func (d *Decoder) prompt() string {
	id := d.s.text()
	switch {
	case string(id) == d.promptID:
	case len(id) > maxInternedLen:
		return string(id)
	default:
		d.promptID = d.names.str(id)
	}
	return d.promptID
}

func (d *Decoder) id() string { return d.names.str(d.s.text()) }

func (d *Decoder) progress(m *Message) {
	switch s := &d.s; string(s.key) {
	case "value":
		m.Value = s.number()
	case "max":
		m.Max = s.number()
	case "node":
		m.Node = d.id()
	default:
		s.skip()
	}
}

func (d *Decoder) executing(m *Message) {
	switch s := &d.s; string(s.key) {
	case "node":
		m.NodeNull = s.at() == 'n'
		m.Node = d.id()
	case "display_node":
		m.Display = d.id()
	default:
		s.skip()
	}
}

func (d *Decoder) executed(m *Message) {
	switch s := &d.s; string(s.key) {
	case "node":
		m.Node = d.id()
	case "display_node":
		m.Display = d.id()
	case "output":
		m.Output = d.nonNull()
	default:
		s.skip()
	}
}

// nonNull reads any value as raw, null and the like as nil.
func (d *Decoder) nonNull() json.RawMessage {
	switch s := &d.s; s.at() {
	case 'n', 'N', 'I':
		s.skip()
		return nil
	default:
		raw := s.raw()
		if string(raw) == "null" { // -Infinity
			return nil
		}
		return raw
	}
}

func (d *Decoder) status(m *Message) {
	s := &d.s
	switch string(s.key) {
	case "sid":
		m.SID = d.id()
	case "status":
		m.Remaining = -1
		if s.object() {
			for s.next() {
				if string(s.key) == "exec_info" {
					m.Remaining = d.queueRemaining()
				} else {
					s.skip()
				}
			}
		}
	default:
		s.skip()
	}
}

func (d *Decoder) queueRemaining() int {
	s := &d.s
	remaining := -1
	if s.object() {
		for s.next() {
			switch c := s.at(); {
			case string(s.key) != "queue_remaining":
				s.skip()
			case '0' <= c && c <= '9':
				remaining = s.int()
			default:
				remaining = -1
				s.skip()
			}
		}
	}
	return remaining
}

func (d *Decoder) stage(m *Message) {
	switch s := &d.s; {
	case string(s.key) == "timestamp":
		m.Timestamp = s.integer()
	case string(s.key) == "nodes" && m.Type == ExecutionCached:
		m.Cached = d.ids()
	default:
		s.skip()
	}
}

func (d *Decoder) failure(m *Message) {
	switch s := &d.s; string(s.key) {
	case "node_id":
		m.Node = d.id()
		m.Failure.NodeID = m.Node
	case "node_type":
		m.Failure.NodeType = d.id()
	case "exception_type":
		m.Failure.ExceptionType = d.id()
	case "exception_message":
		m.Failure.Message = string(s.text())
	case "traceback":
		m.Failure.Traceback = d.lines()
	case "executed":
		m.Failure.Executed = d.ids()
	case "timestamp":
		m.Timestamp = s.integer()
	default:
		s.skip()
	}
}

// ids reads a list of ids; nulls and containers in it are left out.
func (d *Decoder) ids() []string {
	return d.list(func(b []byte) string { return d.names.str(b) })
}

// lines reads a list of texts, or one text.
func (d *Decoder) lines() []string {
	if d.s.at() == '"' {
		return []string{string(d.s.str())}
	}
	return d.list(func(b []byte) string { return string(b) })
}

func (d *Decoder) list(keep func([]byte) string) []string {
	s := &d.s
	if !s.list() {
		return nil
	}
	d.texts = d.texts[:0]
	for s.elem() {
		if b := s.text(); b != nil {
			d.texts = append(d.texts, keep(b))
		}
	}
	list := slices.Clone(d.texts)
	clear(d.texts)
	if len(list) == 0 {
		return nil
	}
	if cap(d.texts) > maxScratch/16 {
		d.texts = nil
	}
	return list
}

func (d *Decoder) progressState(m *Message) {
	s := &d.s
	if string(s.key) != "nodes" {
		s.skip()
		return
	}
	m.Nodes = nil
	if !s.object() {
		return
	}
	d.nodes = d.nodes[:0]
	for s.next() && s.take() {
		d.nodes = append(d.nodes, NodeState{ID: d.names.str(s.key)})
		d.nodeState(&d.nodes[len(d.nodes)-1])
	}
	if n := lastWins(d.nodes, d.emptied(), func(n *NodeState) string { return n.ID }); len(n) > 0 && !s.bad {
		m.Nodes = slices.Clone(n)
	}
	clear(d.nodes)
	if cap(d.nodes) > 512 {
		d.nodes = nil
	}
}

func (d *Decoder) nodeState(n *NodeState) {
	s := &d.s
	if !s.object() {
		return
	}
	for s.next() {
		switch string(s.key) {
		case "value":
			n.Value = s.number()
		case "max":
			n.Max = s.number()
		case "state":
			n.State = d.state()
		case "display_node_id":
			n.Display = d.near(n.ID)
		case "parent_node_id":
			n.Parent = d.id()
		case "real_node_id":
			n.Real = d.near(n.ID)
		default:
			s.skip()
		}
	}
}

// near reads an id that is likely to be the one given.
func (d *Decoder) near(id string) string {
	b := d.s.text()
	if string(b) == id {
		return id
	}
	return d.names.str(b)
}

func (d *Decoder) state() string {
	b := d.s.text()
	switch string(b) {
	case "running":
		return "running"
	case "finished":
		return "finished"
	}
	return d.names.str(b)
}

// emptied returns the scratch map of d, empty.
func (d *Decoder) emptied() map[string]int {
	if d.places == nil || len(d.places) > maxInterned {
		d.places = make(map[string]int)
	}
	clear(d.places)
	return d.places
}

// lastWins gives each key its last value, at the place of its first, in the memory of list. places is empty.
func lastWins[T any](list []T, places map[string]int, key func(*T) string) []T {
	if len(list) < 2 {
		return list
	}
	kept := list[:0]
	for i := range list {
		k := key(&list[i])
		switch at, again := places[k]; {
		case again:
			kept[at] = list[i]
		case len(kept) == i:
			places[k] = i
			kept = list[:i+1]
		default:
			places[k] = len(kept)
			kept = append(kept, list[i])
		}
	}
	return kept
}
