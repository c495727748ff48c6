package comfyuitest

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// abortNotice is how long the server takes to see that a connection was cut without a close frame. A client that is back
// sooner is registered first, and the late cleanup of its old handler then removes the new socket: it is deaf.
const abortNotice = 2 * time.Millisecond

// stream is one client's socket.
type stream struct {
	ws  *wsConn
	sid string

	cleaned bool // its handler has nothing left to unregister; guarded by the hub's lock

	mu         sync.Mutex
	blackholed bool
}

func (s *stream) send(f *frame) error {
	if s.isBlackholed() {
		return nil
	}
	return s.ws.send(f)
}

func (s *stream) isBlackholed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blackholed
}

func (s *stream) blackhole() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blackholed = true
}

// envelope is a message on its way to the sockets.
type envelope struct {
	frame    *frame
	sid      string
	everyone bool
	fatal    bool // ends the publish loop, and with it the process
}

// hub is the WebSocket side: who is connected, and the one queue that every message goes through.
type hub struct {
	loop *eventLoop

	mu       sync.Mutex
	sockets  []*stream      // those that hear, one a sid, in the order of registration
	features map[string]any // by sid: what that client announced
	open     map[*stream]struct{}
	inbox    []envelope
	wake     chan struct{} // holds a token when the inbox may have something
}

func newHub(loop *eventLoop) *hub {
	return &hub{loop: loop, features: map[string]any{}, open: map[*stream]struct{}{}, wake: make(chan struct{}, 1)}
}

// toClient queues a message for a job's client; a job without one is everyone's.
func (h *hub) toClient(c client, event string, data any) {
	h.send(c, textFrame(event, data))
}

// send queues a frame for a job's client.
func (h *hub) send(c client, f *frame) {
	h.enqueue(envelope{frame: f, sid: c.sid, everyone: !c.known, fatal: c.fatal})
}

func (h *hub) toEveryone(event string, data any) {
	h.enqueue(envelope{frame: textFrame(event, data), everyone: true})
}

func (h *hub) enqueue(e envelope) {
	h.mu.Lock()
	h.inbox = append(h.inbox, e)
	h.mu.Unlock()
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// publish sends what is queued, in order, one frame after the other: a client that does not read holds up all. It returns
// false if a message ended the server.
func (h *hub) publish(ctx context.Context) bool {
	for {
		h.mu.Lock()
		batch := h.inbox
		h.inbox = nil
		h.mu.Unlock()
		for _, e := range batch {
			if !h.loop.enter(ctx) {
				return true
			}
			if e.fatal {
				h.loop.leave()
				return false
			}
			targets := h.targets(e)
			h.loop.leave()
			for _, s := range targets {
				_ = s.send(e.frame) // the reader of that socket sees its end
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-h.wake:
		case <-ctx.Done():
			return true
		}
	}
}

func (h *hub) targets(e envelope) []*stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e.everyone {
		return slices.Clone(h.sockets)
	}
	if at := h.find(e.sid); at >= 0 {
		return h.sockets[at : at+1 : at+1]
	}
	return nil
}

// find returns the index of the socket that hears under sid, or -1. The caller holds mu.
func (h *hub) find(sid string) int {
	return slices.IndexFunc(h.sockets, func(s *stream) bool { return s.sid == sid })
}

// register makes s the socket of its sid. The one before is displaced: it stays open and hears nothing more.
func (h *hub) register(s *stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropLocked(s.sid)
	// Copied, because a publish may still walk the old slice.
	h.sockets = append(slices.Clone(h.sockets), s)
	h.features[s.sid] = object{}
	h.open[s] = struct{}{}
}

// unregister is what a handler does at its end: it removes the socket of its sid, whichever socket that is by now.
func (h *hub) unregister(s *stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.cleaned {
		return
	}
	s.cleaned = true
	h.dropLocked(s.sid)
	delete(h.open, s)
}

func (h *hub) dropLocked(sid string) {
	if at := h.find(sid); at >= 0 {
		h.sockets = slices.Delete(slices.Clone(h.sockets), at, at+1)
	}
	delete(h.features, sid)
}

// supports tells whether the client announced a feature.
func (h *hub) supports(c client, feature string) bool {
	if !c.known {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	flags, _ := h.features[c.sid].(object)
	value, _ := flags.get(feature)
	return value == true
}

// announce stores the feature flags of a sid; false when nobody is registered under it.
func (h *hub) announce(sid string, flags any) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, known := h.features[sid]; !known {
		return false
	}
	h.features[sid] = flags
	return true
}

func (h *hub) openStreams() []*stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	streams := make([]*stream, 0, len(h.open))
	for s := range h.open {
		streams = append(streams, s)
	}
	return streams
}

func (h *hub) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.open)
}

// cut ends or spoils the sockets that are open now.
func (h *hub) cut(mode CutMode) {
	for _, s := range h.openStreams() {
		switch mode {
		case CutClose:
			h.unregisterExactly(s)
			if !s.isBlackholed() {
				// A client that does not read gets no close frame.
				_ = s.ws.conn.SetWriteDeadline(time.Now().Add(time.Second))
				_ = s.ws.sendClose(closeNormal)
			}
			s.ws.close()
		case CutReset:
			h.unregisterExactly(s)
			s.ws.reset()
		case CutBlackhole:
			s.blackhole()
		case CutDeaf:
			h.deafen(s)
		}
	}
}

// unregisterExactly removes s at once and leaves a newer socket of the same sid alone, now and when its handler ends.
func (h *hub) unregisterExactly(s *stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.cleaned = true
	if at := h.find(s.sid); at >= 0 && h.sockets[at] == s {
		h.dropLocked(s.sid)
	}
	delete(h.open, s)
}

func (h *hub) deafen(s *stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropLocked(s.sid)
}

// forget takes a socket that its client has left out of the count.
func (h *hub) forget(s *stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.open, s)
}

func textFrame(event string, data any) *frame {
	payload := appendJSONString(append(make([]byte, 0, 256), `{"type": `...), event)
	payload = appendJSON(append(payload, `, "data": `...), data)
	return newFrame(opText, append(payload, '}'))
}

func binaryFrame(kind uint32, parts ...[]byte) *frame {
	payload := binary.BigEndian.AppendUint32(nil, kind)
	for _, part := range parts {
		payload = append(payload, part...)
	}
	return newFrame(opBinary, payload)
}

// serveStream is the handler of /ws, from the upgrade to the end of the socket.
func (p *process) serveStream(conn net.Conn, reader *bufio.Reader, header string, ext extension, clientID string) {
	s := &stream{ws: newWSConn(conn, reader, ext), sid: clientID}
	if s.sid == "" {
		s.sid = strings.ReplaceAll(uuid.NewString(), "-", "")
	}
	defer s.ws.close()
	if !p.loop.enter(p.ctx) {
		return
	}
	err := p.greet(s, header)
	p.loop.leave()
	if err == nil {
		err = p.listen(s)
	}
	p.endStream(s, err)
}

// greet completes the handshake and sends the frames that are outside the queue: nothing of the queue can come before.
func (p *process) greet(s *stream, header string) error {
	s.ws.writing <- struct{}{} // what a cut sends comes after the handshake
	p.hub.register(s)          // before the client knows of the socket; and on a dead connection too, as far as the handler goes on there
	_, err := s.ws.conn.Write([]byte(header))
	<-s.ws.writing
	if err != nil {
		return err
	}
	if err := s.send(textFrame("status", object{{"status", p.queueInfo()}, {"sid", s.sid}})); err != nil {
		return err
	}
	if node, ok := p.executor.executingFor(s.sid); ok {
		return s.send(textFrame("executing", object{{"node", node}}))
	}
	return nil
}

// listen reads what the client sends until the socket ends.
func (p *process) listen(s *stream) error {
	first := true
	for {
		op, payload, err := s.ws.read()
		if err != nil {
			return err
		}
		if s.isBlackholed() {
			continue
		}
		if !p.loop.enter(p.ctx) {
			return p.ctx.Err()
		}
		var to *stream
		var reply *frame
		switch op {
		case opPing:
			to, reply = s, newFrame(opPong, payload)
		case opText:
			if first {
				to, first = p.negotiate(s, payload)
				reply = textFrame("feature_flags", p.features())
			}
		case opClose:
			p.hub.unregister(s)
			err = errPeerClosed
		}
		p.loop.leave()
		// Off the loop: a client that does not read holds up this handler alone.
		if to != nil {
			if failed := to.send(reply); to == s {
				err = failed
			}
		}
		if err != nil {
			return err
		}
	}
}

// negotiate reads what may be the client's feature_flags; it returns the socket that gets the reply, nil for none, and whether
// the next message may still be them. Only a JSON object settles it, and on a socket that is no longer registered nothing does.
func (p *process) negotiate(s *stream, payload []byte) (to *stream, still bool) {
	value, err := parseJSON(payload)
	message, isObject := value.(object)
	if err != nil || !isObject || !p.version.atLeast(0, 3, 45) {
		return nil, true
	}
	if kind, _ := message.get("type"); kind != "feature_flags" {
		return nil, false
	}
	flags, given := message.get("data")
	if !given {
		flags = object{}
	}
	if !p.hub.announce(s.sid, flags) {
		return nil, true
	}
	// The reply goes to whoever holds the sid, which on a displaced socket is another one.
	for _, holder := range p.hub.targets(envelope{sid: s.sid}) {
		to = holder
	}
	return to, false
}

// endStream is the end of a handler, by close frame, protocol error, or loss of the connection.
func (p *process) endStream(s *stream, err error) {
	var broken *wsError
	switch {
	case s.isBlackholed():
		// The client gave up, and no FIN comes through a black hole: the server would keep the socket for ever, and its
		// handler cleans nothing up.
		p.hub.forget(s)
		return
	case errors.Is(err, errPeerClosed):
		_ = s.ws.sendClose(closeNormal)
		return
	case errors.As(err, &broken):
		_ = s.ws.sendClose(broken.code)
	default:
		wait(p.ctx, abortNotice)
	}
	if p.loop.enter(p.ctx) {
		p.hub.unregister(s)
		p.loop.leave()
	}
}
