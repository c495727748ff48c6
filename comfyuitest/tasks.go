package comfyuitest

import (
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// tasks counts the pod's goroutines, so that Close can wait for them.
type tasks struct {
	mu      sync.Mutex
	count   int
	closed  bool
	drained chan struct{}
	foreign map[foreignCode]int // of these, those that run code that is not the pod's
}

// foreignCode names code that is not the pod's: it may heed no context.
type foreignCode struct{ kind, name string }

// start runs f on a goroutine of its own, unless the pod is closing.
func (t *tasks) start(f func()) {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return
	}
	t.count++
	t.mu.Unlock()
	go func() {
		defer t.leave()
		f()
	}()
}

func (t *tasks) enter() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count++
}

func (t *tasks) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count--
	t.checkDrained()
}

// run calls what is not the pod's own code.
func (t *tasks) run(what foreignCode, f func()) {
	t.note(what, 1)
	defer t.note(what, -1)
	f()
}

func (t *tasks) note(what foreignCode, change int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.foreign == nil {
		t.foreign = map[foreignCode]int{}
	}
	if t.foreign[what] += change; t.foreign[what] == 0 {
		delete(t.foreign, what)
	}
}

func (t *tasks) checkDrained() {
	if t.count == 0 && t.drained != nil {
		close(t.drained)
		t.drained = nil
	}
}

// wait lets nothing more start and waits until all has ended, but no longer than that: then it returns what goes on.
func (t *tasks) wait(patience time.Duration) (left []string) {
	t.mu.Lock()
	t.closed = true
	if t.drained == nil {
		t.drained = make(chan struct{})
	}
	drained := t.drained
	t.checkDrained()
	t.mu.Unlock()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-drained:
		return nil
	case <-timer.C:
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for what := range t.foreign {
		left = append(left, what.kind+" "+what.name)
	}
	slices.Sort(left)
	return left
}

// connState counts the goroutines of connections; a hijacked one goes on inside the handler, which counts itself.
func (t *tasks) connState(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		t.enter()
	case http.StateClosed, http.StateHijacked:
		t.leave()
	}
}

func (t *tasks) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.enter()
		defer t.leave()
		next.ServeHTTP(w, r)
	})
}

// changes wakes those who wait for something to change.
type changes struct {
	mu sync.Mutex
	ch chan struct{}
}

// next returns a channel that the next change closes.
func (c *changes) next() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ch == nil {
		c.ch = make(chan struct{})
	}
	return c.ch
}

func (c *changes) signal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ch != nil {
		close(c.ch)
		c.ch = nil
	}
}
