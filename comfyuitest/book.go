package comfyuitest

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"sync"
)

// Prompt is all that the pod knows of one prompt id, over restarts.
type Prompt struct {
	ID, ClientID string
	ExtraData    map[string]json.RawMessage // as the client sent it, in the newest POST
	Graph        json.RawMessage            // in the newest POST
	Posts        int                        // POST /prompt that queued it
	Runs         int                        // times that it began to run
	Ends         int                        // times that it ran to success
	Interrupts   int                        // times that an interrupt hit it
}

// book is what the pod remembers for the test.
type book struct {
	mu       sync.Mutex
	order    []string
	prompts  map[string]*Prompt
	requests map[string]int
}

func newBook() *book {
	return &book{prompts: map[string]*Prompt{}, requests: map[string]int{}}
}

// Prompts returns all prompts that were ever queued, in the order of their first POST.
func (p *Pod) Prompts() []Prompt {
	p.book.mu.Lock()
	defer p.book.mu.Unlock()
	prompts := make([]Prompt, len(p.book.order))
	for i, id := range p.book.order {
		prompts[i] = *p.book.prompts[id]
		prompts[i].ExtraData = maps.Clone(prompts[i].ExtraData)
	}
	return prompts
}

// Runs returns how often a prompt began to run, over restarts.
func (p *Pod) Runs(promptID string) int {
	p.book.mu.Lock()
	defer p.book.mu.Unlock()
	if prompt := p.book.prompts[promptID]; prompt != nil {
		return prompt.Runs
	}
	return 0
}

// Requests returns how many requests of a route came, those that a fault took too. The route is as in [Fault].
func (p *Pod) Requests(route string) int {
	if err := checkRoute(route); err != nil {
		panic(fmt.Sprintf("comfyuitest: Requests: %v", err))
	}
	p.book.mu.Lock()
	defer p.book.mu.Unlock()
	total := 0
	for request, count := range p.book.requests {
		method, path, _ := strings.Cut(request, " ")
		if matchesRoute(route, method, path) {
			total += count
		}
	}
	return total
}

func (b *book) count(request string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.requests[request]++
}

// queued notes a POST that put a prompt into the queue.
func (b *book) queued(id, clientID string, extra map[string]json.RawMessage, graph json.RawMessage) {
	b.mu.Lock()
	defer b.mu.Unlock()
	prompt := b.prompt(id)
	prompt.ClientID, prompt.ExtraData, prompt.Graph = clientID, extra, graph
	prompt.Posts++
}

func (b *book) prompt(id string) *Prompt {
	prompt := b.prompts[id]
	if prompt == nil {
		prompt = &Prompt{ID: id}
		b.prompts[id] = prompt
		b.order = append(b.order, id)
	}
	return prompt
}

func (b *book) began(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.prompt(id).Runs++
}

func (b *book) ended(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.prompt(id).Ends++
}

func (b *book) interrupted(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.prompt(id).Interrupts++
}
