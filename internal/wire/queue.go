package wire

import (
	"cmp"
	"encoding/json"
	"slices"
)

// QueueItem is a prompt that is queued or running.
type QueueItem struct {
	Number    float64
	PromptID  string
	ClientID  string
	Marker    Marker
	ExtraData json.RawMessage // only withGraphs
	Graph     json.RawMessage // only withGraphs
	Outputs   []string        // only withGraphs: the output nodes
}

// Marker is what this library puts into extra_data, under comfyui_go, to find its jobs again. It is zero for the prompts of others.
type Marker struct {
	JobID   string
	Attempt int
	Nonce   string
}

// Queue reads the answer to GET /queue, pending in the order in which it will run: by number, then by prompt id. Graphs are passed
// over unless withGraphs. An answer without both lists, and an item of fewer than the five elements that every version sends, is
// ErrMalformed: from half an answer nobody must conclude that a prompt is gone.
func Queue(body []byte, withGraphs bool) (running, pending []QueueItem, err error) {
	d := borrow()
	defer d.giveBack()
	s := &d.s
	s.begin(body)
	hasRunning, hasPending := false, false
	for s.object(); s.next(); {
		switch string(s.key) {
		case "queue_running":
			running, hasRunning = d.queueItems(withGraphs)
		case "queue_pending":
			pending, hasPending = d.queueItems(withGraphs)
		default:
			s.skip()
		}
	}
	s.end()
	if !hasRunning || !hasPending {
		s.fail()
	}
	if s.bad {
		return nil, nil, s.err("queue")
	}
	slices.SortStableFunc(pending, func(a, b QueueItem) int {
		return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.PromptID, b.PromptID))
	})
	return running, pending, nil
}

// queueItems is not ok for what is no list of items.
func (d *Decoder) queueItems(withGraphs bool) (items []QueueItem, ok bool) {
	s := &d.s
	if !s.list() {
		return nil, false
	}
	ok = true
	for s.elem() && s.take() {
		item, isItem := d.queueItem(withGraphs, withGraphs)
		items = append(items, item)
		ok = ok && isItem
	}
	return items, ok
}

// queueItem reads [number, prompt id, graph, extra_data, output nodes, …]; history entries hold the same list.
func (d *Decoder) queueItem(withGraphs, withOutputs bool) (item QueueItem, ok bool) {
	s := &d.s
	if !s.list() {
		return item, false
	}
	n := 0
	for ; s.elem(); n++ {
		switch {
		case n == 0:
			item.Number = s.number()
		case n == 1:
			item.PromptID = d.id()
		case n == 2 && withGraphs:
			item.Graph = s.raw()
		case n == 3:
			item.ExtraData = d.extraData(&item, withGraphs)
		case n == 4 && withOutputs:
			item.Outputs = d.ids()
		default:
			s.skip()
		}
	}
	return item, n >= 5
}

func (d *Decoder) extraData(item *QueueItem, keep bool) json.RawMessage {
	s := &d.s
	start := s.i
	if s.object() {
		for s.next() {
			switch string(s.key) {
			case "client_id":
				item.ClientID = d.id()
			case "comfyui_go":
				item.Marker = d.marker()
			default:
				s.skip()
			}
		}
	}
	if !keep {
		return nil
	}
	return s.copyFrom(start)
}

func (d *Decoder) marker() (m Marker) {
	s := &d.s
	if !s.object() {
		return m
	}
	for s.next() {
		switch string(s.key) {
		case "job_id":
			m.JobID = string(s.text())
		case "attempt":
			m.Attempt = s.int()
		case "nonce":
			m.Nonce = string(s.text())
		default:
			s.skip()
		}
	}
	return m
}
