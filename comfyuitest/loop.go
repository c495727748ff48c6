package comfyuitest

import "context"

// eventLoop is the server's one thread for HTTP, sockets and validation. Whoever is on it keeps all others waiting.
type eventLoop struct {
	token chan struct{}
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
