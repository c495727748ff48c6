package comfyuitest

import (
	"context"
	"sync"
)

// eventLoop is the server's one thread for HTTP, sockets and validation. Whoever is on it keeps all others waiting.
type eventLoop struct {
	token chan struct{}

	mu      sync.Mutex
	freezes int
}

func newEventLoop() *eventLoop {
	return &eventLoop{token: make(chan struct{}, 1)}
}

// enter waits for the loop; false when ctx ended first.
func (l *eventLoop) enter(ctx context.Context) bool {
	select {
	case l.token <- struct{}{}:
		return true
	default:
	}
	select {
	case l.token <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (l *eventLoop) leave() { <-l.token }

// freeze keeps the loop until every freeze is thawed. Only the first one has to wait for it.
func (l *eventLoop) freeze(ctx context.Context) (thaw func()) {
	l.mu.Lock()
	l.freezes++
	first := l.freezes == 1
	l.mu.Unlock()
	if first && !l.enter(ctx) {
		return func() {}
	}
	return sync.OnceFunc(func() {
		l.mu.Lock()
		l.freezes--
		last := l.freezes == 0
		l.mu.Unlock()
		if last {
			l.leave()
		}
	})
}
