package comfyuitest

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// item is one accepted prompt.
type item struct {
	number    any // int64 from the counter, float64 from the client: the difference shows in every answer
	id        string
	graph     *graph
	prompt    encoded // the graph in the server's JSON
	extra     any     // extra_data; an object unless an old server let something else through
	outputs   []string
	sensitive object // secrets that newer servers keep apart
	client    client
	shown     func() encoded // the item as /queue shows it, encoded once: listings can have thousands
}

// client is a job's client_id: none, or the sid of the socket that hears of the job.
type client struct {
	known bool
	sid   string
	fatal bool // a client_id that cannot be looked up: the first message to it ends the server
}

func (it *item) priority() float64 {
	n, _ := asNumber(it.number)
	return n
}

// tuple is the item as /queue and /history show it: without the secrets that newer servers keep apart.
func (it *item) tuple(extra any) []any {
	return []any{it.number, it.id, it.prompt, extra, it.outputs}
}

// errNotComparable is Python's TypeError: '<' not supported between instances of 'dict' and 'dict'.
var errNotComparable = errors.New("items are not comparable")

// before is the < of Python tuples: by number, then id; with both equal the first unequal element decides, and graphs and
// extra_data have no order.
func (it *item) before(other *item) (bool, error) {
	if a, b := it.priority(), other.priority(); a != b {
		return a < b, nil
	}
	if it.id != other.id {
		return it.id < other.id, nil
	}
	if !sameEncoded(it.prompt, other.prompt) || !sameJSON(it.extra, other.extra) {
		return false, errNotComparable
	}
	if !slices.Equal(it.outputs, other.outputs) {
		return slices.Compare(it.outputs, other.outputs) < 0, nil
	}
	if !sameJSON(it.sensitive, other.sensitive) {
		return false, errNotComparable
	}
	return false, nil
}

func sameEncoded(a, b encoded) bool {
	if string(a) == string(b) {
		return true
	}
	x, errA := parseJSON(a)
	y, errB := parseJSON(b)
	return errA == nil && errB == nil && sameJSON(x, y)
}

// pyHeap is Python's heapq: /queue shows its order, and a comparison that raises leaves it as Python would.
type pyHeap []*item

func (h *pyHeap) push(it *item) error {
	*h = append(*h, it)
	return h.siftDown(0, len(*h)-1)
}

// pop loses the item that it would return when a comparison raises.
func (h *pyHeap) pop() (*item, error) {
	last := len(*h) - 1
	tail := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	if last == 0 {
		return tail, nil
	}
	top := (*h)[0]
	(*h)[0] = tail
	if err := h.siftUp(0); err != nil {
		return nil, err
	}
	return top, nil
}

func (h *pyHeap) heapify() error {
	for i := len(*h)/2 - 1; i >= 0; i-- {
		if err := h.siftUp(i); err != nil {
			return err
		}
	}
	return nil
}

func (h *pyHeap) siftDown(start, pos int) error {
	heap := *h
	for pos > start {
		parent := (pos - 1) / 2
		less, err := heap[pos].before(heap[parent])
		if err != nil {
			return err
		}
		if !less {
			return nil
		}
		heap[pos], heap[parent] = heap[parent], heap[pos]
		pos = parent
	}
	return nil
}

func (h *pyHeap) siftUp(pos int) error {
	heap := *h
	start, limit := pos, len(heap)/2
	for pos < limit {
		child := 2*pos + 1
		if child+1 < len(heap) {
			less, err := heap[child].before(heap[child+1])
			if err != nil {
				return err
			}
			if !less {
				child++
			}
		}
		heap[pos], heap[child] = heap[child], heap[pos]
		pos = child
	}
	return h.siftDown(start, pos)
}

// queue is the pod's pending and running prompts, with the history that its end fills.
type queue struct {
	mu      sync.Mutex
	pending pyHeap
	running []*item // one at most, or the one that killed the worker
	history *history
	flags   freeFlags
	wake    chan struct{}       // holds a token when there may be work
	updated func(remaining int) // called under mu, so that the status frames keep the order of the changes
	taking  func(id string)     // called before an item is taken; nil: nothing to do
}

// freeFlags are what /free asks for, done between jobs.
type freeFlags struct{ unloadModels, freeMemory bool }

func newQueue(historySize int, updated func(remaining int)) *queue {
	return &queue{history: newHistory(historySize), wake: make(chan struct{}, 1), updated: updated}
}

// remaining is queue_remaining. The caller holds mu.
func (q *queue) remaining() int { return len(q.pending) + len(q.running) }

func (q *queue) tasksRemaining() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.remaining()
}

// idle tells whether nothing is left to do, flags included.
func (q *queue) idle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.remaining() == 0 && q.flags == freeFlags{}
}

func (q *queue) notify() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// put queues an item. With an error it is queued all the same, but nobody is told: neither the clients nor, until the
// next put, the worker.
func (q *queue) put(it *item) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.pending.push(it); err != nil {
		return err
	}
	q.updated(q.remaining())
	q.notify()
	return nil
}

// get waits for the next item; nil when there are only flags to see to. An error kills the worker.
func (q *queue) get(ctx context.Context) (*item, error) {
	for {
		if ctx.Err() != nil { // what came after the worker's death is not its to take, though it may learn of both at once
			return nil, ctx.Err()
		}
		q.mu.Lock()
		if len(q.pending) > 0 && q.taking != nil {
			next := q.pending[0].id
			q.mu.Unlock()
			q.taking(next)
			q.mu.Lock()
		}
		if len(q.pending) > 0 && ctx.Err() == nil {
			it, err := q.pending.pop()
			if err == nil {
				q.running = append(q.running, it)
				q.updated(q.remaining())
			}
			q.mu.Unlock()
			return it, err
		}
		flags := q.flags != freeFlags{}
		q.mu.Unlock()
		if flags {
			return nil, nil
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (q *queue) done(it *item, entry *historyEntry) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running = slices.DeleteFunc(q.running, func(other *item) bool { return other == it })
	q.history.put(it.id, entry)
	q.updated(q.remaining())
}

// snapshot returns what runs and what is pending, the latter in heap order.
func (q *queue) snapshot() (running, pending []*item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.running), slices.Clone(q.pending)
}

func (q *queue) wipe() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.wipeLocked()
}

func (q *queue) wipeLocked() {
	q.pending = nil
	q.updated(q.remaining())
}

// remove takes one pending item with that id out. With an error it is gone all the same, but nobody is told.
func (q *queue) remove(id string) (bool, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	at := slices.IndexFunc(q.pending, func(it *item) bool { return it.id == id })
	if at < 0 {
		return false, nil
	}
	if len(q.pending) == 1 {
		q.wipeLocked()
	} else {
		q.pending = slices.Delete(q.pending, at, at+1)
		if err := q.pending.heapify(); err != nil {
			return false, err
		}
	}
	q.updated(q.remaining())
	return true, nil
}

// ifRunning calls do while no other job can become the running one, if the job with that id runs.
func (q *queue) ifRunning(id string, do func()) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !slices.ContainsFunc(q.running, func(it *item) bool { return it.id == id }) {
		return false
	}
	do()
	return true
}

func (q *queue) setFlags(flags freeFlags) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.flags.unloadModels = q.flags.unloadModels || flags.unloadModels
	q.flags.freeMemory = q.flags.freeMemory || flags.freeMemory
	q.notify()
}

func (q *queue) takeFlags() freeFlags {
	q.mu.Lock()
	defer q.mu.Unlock()
	flags := q.flags
	q.flags = freeFlags{}
	return flags
}
