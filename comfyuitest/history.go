package comfyuitest

import "slices"

// history holds the ended prompts in the order in which they first ended. Its queue's lock guards it.
type history struct {
	size    int
	order   []string
	entries map[string]*historyEntry
}

// historyEntry is one ended prompt.
type historyEntry struct {
	item     *item
	extra    any    // the item's, without secrets
	outputs  object // by node id
	meta     object
	status   string // success or error
	messages []message
	shown    encoded // the entry as GET /history has it
}

// message is one of the events that the history keeps.
type message struct {
	event string
	data  object
}

func newHistory(size int) *history {
	return &history{size: size, entries: map[string]*historyEntry{}}
}

// put stores an entry. A repeated id keeps its place.
func (h *history) put(id string, entry *historyEntry) {
	if _, again := h.entries[id]; !again {
		h.order = append(h.order, id)
	}
	h.entries[id] = entry
	if len(h.order) > h.size {
		delete(h.entries, h.order[0])
		h.order = h.order[1:]
	}
}

func (h *history) remove(id string) {
	if _, known := h.entries[id]; known {
		delete(h.entries, id)
		h.order = slices.DeleteFunc(h.order, func(other string) bool { return other == id })
	}
}

func (h *history) clear() {
	h.order, h.entries = nil, map[string]*historyEntry{}
}

// page returns the ids that GET /history shows: maxItems nil is no limit; a negative offset means the newest.
func (h *history) page(maxItems *int, offset int) []string {
	if offset < 0 && maxItems != nil {
		offset = len(h.order) - *maxItems
	}
	var ids []string
	for i, id := range h.order {
		if i < offset {
			continue
		}
		ids = append(ids, id)
		if maxItems != nil && len(ids) >= *maxItems {
			break
		}
	}
	return ids
}

// encode makes the entry's JSON, which no request changes any more.
func (e *historyEntry) encode() encoded {
	return pyJSON(object{
		{"prompt", e.item.tuple(e.extra)},
		{"outputs", e.outputs},
		{"status", e.statusJSON()},
		{"meta", e.meta},
	})
}

func (e *historyEntry) statusJSON() object {
	messages := make([]any, len(e.messages))
	for i, m := range e.messages {
		messages[i] = []any{m.event, m.data}
	}
	return object{{"status_str", e.status}, {"completed", e.status == "success"}, {"messages", messages}}
}

// historyPage is what GET /history answers.
func (q *queue) historyPage(maxItems *int, offset int) object {
	q.mu.Lock()
	defer q.mu.Unlock()
	page := object{}
	for _, id := range q.history.page(maxItems, offset) {
		page = append(page, field{id, q.history.entries[id].shown})
	}
	return page
}

func (q *queue) historyOf(id string) (*historyEntry, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	entry, known := q.history.entries[id]
	return entry, known
}

func (q *queue) removeHistory(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.history.remove(id)
}

func (q *queue) clearHistory() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.history.clear()
}

// historyEntries returns all entries, the oldest first.
func (q *queue) historyEntries() []*historyEntry {
	q.mu.Lock()
	defer q.mu.Unlock()
	entries := make([]*historyEntry, len(q.history.order))
	for i, id := range q.history.order {
		entries[i] = q.history.entries[id]
	}
	return entries
}
