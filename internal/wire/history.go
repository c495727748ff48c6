package wire

import (
	"encoding/json"
	"slices"
)

// HistoryEntry is a prompt that has ended.
type HistoryEntry struct {
	PromptID    string
	Number      float64
	ClientID    string
	Marker      Marker
	Targets     []string // the output nodes that were to run
	Status      string   // status_str: "success" or "error", also when interrupted; "" when status is null
	Completed   bool
	Messages    []Message         // as the stream carried them; one of an unexpected form is Other
	RawMessages []json.RawMessage // the same, as [name, data]; only withGraphs
	Outputs     []NodeOutput      // in the order of the JSON
	Graph       json.RawMessage   // only withGraphs
	ExtraData   json.RawMessage   // only withGraphs
}

// NodeOutput is what a node has put under ui; Outputs splits it. Output never is null.
type NodeOutput struct {
	Node   string
	Output json.RawMessage
}

// Terminal returns the last message that ends a prompt, which decides how it ended even where Status says otherwise; nil: there is
// none. An execution_error of type ExecutionBlocked ends nothing.
func (e *HistoryEntry) Terminal() *Message {
	for i := len(e.Messages) - 1; i >= 0; i-- {
		if m := &e.Messages[i]; m.Terminal() {
			return m
		}
	}
	return nil
}

// Terminal tells whether the message ends its prompt: execution_success, execution_interrupted, and execution_error unless its type is
// ExecutionBlocked.
func (m *Message) Terminal() bool {
	switch m.Type {
	case ExecutionSuccess, ExecutionInterrupted:
		return true
	case ExecutionError:
		return !m.Failure.Blocked()
	}
	return false
}

// Blocked tells whether the failure is an output that an ExecutionBlocker held back: the job goes on.
func (f *Failure) Blocked() bool { return f.ExceptionType == "ExecutionBlocked" }

// History reads the answer to GET /history or /history/{id}, in the order of the JSON: the oldest first. Graphs and raw messages
// are passed over unless withGraphs. An entry that is no object makes the answer ErrMalformed; what is not as expected within one is taken as absent.
func History(body []byte, withGraphs bool) ([]HistoryEntry, error) {
	d := borrow()
	defer d.giveBack()
	s := &d.s
	s.begin(body)
	var entries []HistoryEntry
	for s.object(); s.next() && s.take(); {
		entries = append(entries, d.historyEntry(withGraphs))
	}
	s.end()
	if s.bad {
		return nil, s.err("history")
	}
	return lastWins(entries, d.emptied(), func(e *HistoryEntry) string { return e.PromptID }), nil
}

func (d *Decoder) historyEntry(withGraphs bool) HistoryEntry {
	s := &d.s
	e := HistoryEntry{PromptID: string(s.key)} // seen once: nothing to intern
	if s.at() != '{' {
		s.fail()
	}
	for s.object(); s.next(); {
		switch string(s.key) {
		case "prompt":
			item, _ := d.queueItem(withGraphs, true)
			e.Number, e.ClientID, e.Marker, e.Targets = item.Number, item.ClientID, item.Marker, item.Outputs
			e.Graph, e.ExtraData = item.Graph, item.ExtraData
		case "outputs":
			e.Outputs = d.nodeOutputs()
		case "status":
			d.historyStatus(&e, withGraphs)
		default:
			s.skip()
		}
	}
	return e
}

func (d *Decoder) historyStatus(e *HistoryEntry, withRaw bool) {
	s := &d.s
	e.Status, e.Completed, e.Messages, e.RawMessages = "", false, nil, nil
	if !s.object() {
		return
	}
	for s.next() {
		switch string(s.key) {
		case "status_str":
			e.Status = d.id()
		case "completed":
			e.Completed = s.boolean()
		case "messages":
			e.Messages, e.RawMessages = d.messages(withRaw)
		default:
			s.skip()
		}
	}
}

// messages reads the list; as a rule it holds three: start, cached, and the end.
func (d *Decoder) messages(withRaw bool) (messages []Message, raw []json.RawMessage) {
	s := &d.s
	if !s.list() {
		return nil, nil
	}
	for s.elem() && s.take() {
		if messages == nil {
			messages = make([]Message, 0, 3)
		}
		start := s.i
		messages = append(messages, d.message())
		if withRaw {
			raw = append(raw, s.copyFrom(start))
		}
	}
	return messages, raw
}

// message reads [name, data].
func (d *Decoder) message() Message {
	s := &d.s
	m := Message{Remaining: -1}
	if !s.list() {
		return m
	}
	for n := 0; s.elem(); n++ {
		switch n {
		case 0:
			d.name(&m)
		case 1:
			d.data(&m)
		default:
			s.skip()
		}
	}
	m.complete()
	return m
}

func (d *Decoder) nodeOutputs() (outputs []NodeOutput) {
	s := &d.s
	if !s.object() {
		return nil
	}
	for s.next() && s.take() {
		outputs = append(outputs, NodeOutput{Node: d.names.str(s.key), Output: d.nonNull()})
	}
	outputs = lastWins(outputs, d.emptied(), func(o *NodeOutput) string { return o.Node })
	outputs = slices.DeleteFunc(outputs, func(o NodeOutput) bool { return o.Output == nil })
	if len(outputs) == 0 {
		return nil
	}
	return outputs
}
