package comfyui

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/comfypod/comfyui/internal/wire"
)

const (
	// maxTextFrame bounds what is read of one text frame; a longer one is drained and skipped. An executed frame can carry
	// megabytes of a custom node's output.
	maxTextFrame = 64 << 20
	// maxImageFrame bounds a preview that somebody asked for.
	maxImageFrame = 64 << 20
	// maxTextProgress bounds a binary frame of type 3.
	maxTextProgress = 1 << 20
	// keptBuffer is the largest read buffer that is kept for the next frame.
	keptBuffer = 1 << 20
	// closeWait is how long a clean close waits for the pod's answer. The pod must have forgotten the old socket before the
	// new one comes, or its clean-up removes the new one (server.md §3.1).
	closeWait = time.Second
)

// announceFeatures must be the first frame that the client sends, or the pod ignores it (recording feature-flags-late). It
// makes previews come with their prompt and node.
var announceFeatures = []byte(`{"type":"feature_flags","data":{"supports_preview_metadata":true}}`)

// streamSink is what a stream feeds: the tracker.
type streamSink interface {
	// follows tells whether frames of a prompt are wanted. It is called for every frame.
	follows(promptID []byte) bool
	// frameIn hands over a frame, which may be overwritten afterwards.
	frameIn(f *frame)
	// streamIn tells that s is in another state.
	streamIn(s *stream, state StreamState, err error)
}

// frame is one decoded frame of a stream.
type frame struct {
	from    *stream
	msg     wire.Message
	preview *previewFrame // set for an image; msg is empty then
	text    *wire.Binary  // set for a node's progress in words; msg is empty then
}

// previewFrame is an image; promptID is empty on pods or for jobs that send it without metadata.
type previewFrame struct {
	promptID string
	Preview
}

// stream is the WebSocket of one client id: it dials, listens, pings, and dials again. Its goroutine is the only one that
// reads; beside it one goroutine a connection sends pings.
type stream struct {
	clientID string
	endpoint *endpoint
	timing   Timing
	previews bool
	counters *counters
	sink     streamSink

	want   chan struct{} // holds a token after wanted has changed
	wanted atomic.Bool
	redial chan struct{} // holds a token when the connection is to be replaced
	soon   chan struct{} // holds a token when the pause before the next one is to end
	heard  atomic.Int64  // frames since the process began that only a hearing socket gets
	decode *wire.Decoder
	buf    []byte
	frame  frame // the one that is being handed over
}

func newStream(clientID string, e *endpoint, o *options, c *counters, sink streamSink) *stream {
	return &stream{
		clientID: clientID, endpoint: e, timing: o.timing, previews: o.previews, counters: c, sink: sink,
		want: make(chan struct{}, 1), redial: make(chan struct{}, 1), soon: make(chan struct{}, 1), decode: wire.NewDecoder(),
	}
}

// setWanted makes the stream connect, or close after what it is doing.
func (s *stream) setWanted(wanted bool) {
	if s.wanted.Swap(wanted) != wanted {
		signal(s.want)
	}
}

// reconnect replaces the connection, which hears nothing.
func (s *stream) reconnect() { signal(s.redial) }

// hurry ends the pause before the next connection: the pod answers again.
func (s *stream) hurry() { signal(s.soon) }

// signal leaves a token in c, which holds one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run lives until ctx ends.
func (s *stream) run(ctx context.Context) {
	wait := s.timing.ReconnectMin
	for {
		if !s.untilWanted(ctx) {
			return
		}
		s.sink.streamIn(s, StreamConnecting, nil)
		heard, err := s.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		if !s.wanted.Load() {
			s.sink.streamIn(s, StreamIdle, nil)
			wait = s.timing.ReconnectMin
			continue
		}
		s.sink.streamIn(s, StreamDown, err)
		// A pod that takes connections and drops or ignores them is not healed by dialling faster: only a frame that tells
		// of work shows that a connection was good.
		if heard {
			wait = s.timing.ReconnectMin
		}
		if !s.pause(ctx, jittered(wait)) {
			return
		}
		wait = min(2*wait, s.timing.ReconnectMax)
	}
}

// jittered spreads d over its upper half, so that clients of one pod do not come back all at once.
func jittered(d time.Duration) time.Duration {
	if d <= 1 {
		return d
	}
	return d/2 + rand.N(d/2)
}

func (s *stream) untilWanted(ctx context.Context) bool {
	for !s.wanted.Load() {
		select {
		case <-s.want:
		case <-ctx.Done():
			return false
		}
	}
	return ctx.Err() == nil
}

// pause waits for d, or until the pod is known to be back, or the stream is no longer wanted.
func (s *stream) pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			return true
		case <-s.soon:
			return true
		case <-s.want:
			if !s.wanted.Load() {
				s.sink.streamIn(s, StreamIdle, nil)
				return s.untilWanted(ctx)
			}
		case <-ctx.Done():
			return false
		}
	}
}

// connect dials and serves one connection. heard tells whether it brought more than its greeting.
func (s *stream) connect(ctx context.Context) (heard bool, err error) {
	s.counters.dials.Add(1)
	conn, err := s.dial(ctx)
	if err != nil {
		s.counters.dialErrors.Add(1)
		return false, err
	}
	before := s.heard.Load()
	err = s.serve(ctx, conn)
	return s.heard.Load() != before, err
}

func (s *stream) dial(ctx context.Context) (*websocket.Conn, error) {
	const op = "dial stream"
	ctx, cancel := context.WithTimeout(ctx, s.timing.Connect)
	defer cancel()
	u := s.endpoint.streamURL(s.clientID)
	header := http.Header{}
	if err := s.endpoint.authorize(ctx, header); err != nil {
		return nil, &Error{Op: op, Pod: s.endpoint.opts.name, Category: CategoryAuth, Err: err}
	}
	// The handshake is not the options' to say, though they may have been copied from a browser: the dialer refuses to go on.
	for _, name := range []string{"Connection", "Upgrade", "Sec-Websocket-Key", "Sec-Websocket-Version", "Sec-Websocket-Extensions"} {
		header.Del(name)
	}
	dialer := s.endpoint.dialer()
	if dialer.Jar != nil { // beside a Cookie header of the options the dialer would leave them out
		request := http.Request{Header: header}
		for _, cookie := range dialer.Jar.Cookies(s.endpoint.url("/ws", nil)) {
			request.AddCookie(cookie)
		}
	}
	conn, resp, err := dialer.DialContext(ctx, u.String(), header)
	if err == nil {
		return conn, nil
	}
	if resp == nil {
		return nil, &Error{Op: op, Pod: s.endpoint.opts.name, Category: plainCategory(err), Err: s.endpoint.scrubbed(withoutURL(err), header)}
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	_ = resp.Body.Close()
	return nil, s.endpoint.refusal(op, resp.StatusCode, resp.Header, body, header)
}

// serve reads conn until it fails, is to be replaced or is no longer wanted, and closes it.
func (s *stream) serve(ctx context.Context, conn *websocket.Conn) error {
	l := &listening{stream: s, conn: conn, over: make(chan struct{})}
	for _, old := range []chan struct{}{s.redial, s.soon} {
		select {
		case <-old: // meant for the connection before
		default:
		}
	}
	tended := make(chan struct{})
	go func() {
		defer close(tended)
		l.tend(ctx)
	}()
	err := l.listen()
	close(l.over)
	<-tended
	_ = conn.Close()
	return err
}

// listening is one connection.
type listening struct {
	*stream
	conn    *websocket.Conn
	closing atomic.Bool   // the goodbye is said: no more patience
	aliveAt time.Time     // when the connection was last given time; of the goroutine that listens
	over    chan struct{} // closed when listen has ended
}

// tend pings and closes cleanly when it is time.
func (l *listening) tend(ctx context.Context) {
	var tick <-chan time.Time
	if l.timing.Ping > 0 {
		ticker := time.NewTicker(l.timing.Ping)
		defer ticker.Stop()
		tick = ticker.C
	}
	for l.wanted.Load() {
		select {
		case <-tick:
			if err := l.conn.WriteControl(websocket.PingMessage, nil, time.Now().Add(l.timing.Ping)); err != nil {
				_ = l.conn.Close() // listen fails and tells why
				return
			}
		case <-l.redial:
			l.goodbye()
			return
		case <-l.want:
		case <-ctx.Done():
			l.goodbye()
			return
		case <-l.over:
			return
		}
	}
	l.goodbye()
}

// goodbye closes cleanly: it gives the pod a moment to answer, so that it has forgotten this socket before another comes.
func (l *listening) goodbye() {
	l.closing.Store(true)
	deadline := time.Now().Add(closeWait)
	text := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	if err := l.conn.WriteControl(websocket.CloseMessage, text, deadline); err != nil {
		_ = l.conn.Close()
		return
	}
	_ = l.conn.SetReadDeadline(deadline) // listen ends with the pod's answer or by this
}

// alive gives the connection another two ping periods, and a little more, so that it need not be done for each frame: it costs as much
// as to read one. Without pings the connection has all the time.
func (l *listening) alive() {
	if l.closing.Load() {
		return
	}
	var until time.Time
	if l.timing.Ping > 0 {
		now, more := time.Now(), l.timing.Ping/64
		if now.Sub(l.aliveAt) < more {
			return
		}
		l.aliveAt, until = now, now.Add(2*l.timing.Ping+more)
	}
	_ = l.conn.SetReadDeadline(until)
	if l.closing.Load() { // just now: its deadline must not be lost
		_ = l.conn.SetReadDeadline(time.Now().Add(closeWait))
	}
}

// listen hands frames over until the connection fails.
func (l *listening) listen() error {
	_ = l.conn.SetReadDeadline(time.Now().Add(l.timing.Connect)) // for the greeting
	_ = l.conn.SetWriteDeadline(time.Now().Add(l.timing.Connect))
	l.conn.SetPongHandler(func(string) error { l.alive(); return nil })
	if err := l.conn.WriteMessage(websocket.TextMessage, announceFeatures); err != nil {
		return l.failed(err)
	}
	for greeted := false; ; {
		kind, r, err := l.conn.NextReader()
		if err != nil {
			return l.failed(err)
		}
		l.counters.frames.Add(1)
		if !greeted {
			greeted = true
			l.sink.streamIn(l.stream, StreamUp, nil)
		}
		if kind == websocket.TextMessage {
			err = l.textFrame(r)
		} else {
			err = l.binaryFrame(r)
		}
		if err != nil {
			return l.failed(err)
		}
		l.alive()
	}
}

// failed tells of the end of a connection.
func (s *stream) failed(err error) error {
	return &Error{Op: "stream", Pod: s.endpoint.opts.name, Category: CategoryNetwork, Err: withoutURL(err)}
}

// textFrame reads one text frame and hands it over if it is wanted. Only a failed read is an error.
func (s *stream) textFrame(r io.Reader) error {
	data, whole, err := s.read(r, maxTextFrame)
	if err != nil {
		return err
	}
	s.counters.frameBytes.Add(int64(len(data)))
	if !whole {
		s.counters.framesSkipped.Add(1)
		return nil
	}
	kind, promptID, ok := s.decode.Peek(data)
	if !ok || (len(promptID) > 0 && !s.sink.follows(promptID)) {
		s.counters.framesSkipped.Add(1)
		s.hears(kind, ok)
		return nil
	}
	msg, err := s.decode.Text(data)
	if err != nil {
		s.counters.framesSkipped.Add(1)
		return nil //nolint:nilerr // a frame that cannot be read is skipped: the history tells the rest
	}
	if msg.SID == "" { // the greeting is outside the pod's queue of messages: a deaf socket gets it too
		s.hears(kind, true)
	}
	s.frame = frame{from: s, msg: msg}
	s.sink.frameIn(&s.frame)
	return nil
}

// hears counts a frame that proves that the pod's messages reach this socket.
func (s *stream) hears(kind wire.Type, ok bool) {
	if ok && kind != wire.FeatureFlags {
		s.heard.Add(1)
	}
}

// binaryFrame reads a preview that somebody wants, or a node's words; the rest is left for NextReader to drain.
func (s *stream) binaryFrame(r io.Reader) error {
	head, _, err := s.read(r, 8)
	if err != nil {
		return err
	}
	kind := uint32(0)
	if len(head) >= 4 {
		kind = binary.BigEndian.Uint32(head)
	}
	limit := maxImageFrame
	switch {
	case (kind == wire.KindPreview || kind == wire.KindPreviewWithMetadata) && s.previews:
	case kind == wire.KindText:
		limit = maxTextProgress
	default:
		s.counters.framesSkipped.Add(1)
		return nil
	}
	data, whole, err := s.readMore(r, len(head), limit)
	if err != nil {
		return err
	}
	s.counters.frameBytes.Add(int64(len(data)))
	b, err := s.decode.Binary(data)
	if err != nil || !whole || (b.PromptID != "" && !s.sink.follows([]byte(b.PromptID))) {
		s.counters.framesSkipped.Add(1)
		return nil //nolint:nilerr // as in textFrame
	}
	s.heard.Add(1)
	f := frame{from: s}
	if kind == wire.KindText {
		f.text = &b
	} else {
		f.preview = &previewFrame{
			promptID: b.PromptID,
			Preview:  Preview{Node: cmp.Or(b.Display, b.Node), ContentType: b.ContentType, Data: bytes.Clone(data[b.Payload:])},
		}
	}
	s.sink.frameIn(&f)
	return nil
}

// read reads up to limit bytes of a frame into the stream's buffer; whole is false when there were more.
func (s *stream) read(r io.Reader, limit int) (data []byte, whole bool, err error) {
	if cap(s.buf) > keptBuffer {
		s.buf = nil
	}
	return s.readMore(r, 0, limit)
}

// readMore goes on after the first n bytes of the buffer.
func (s *stream) readMore(r io.Reader, n, limit int) (data []byte, whole bool, err error) {
	buf := s.buf[:cap(s.buf)]
	for {
		if n == limit {
			s.buf = buf
			return buf[:n], false, nil
		}
		if n == len(buf) {
			grown := make([]byte, max(4096, 2*len(buf)))
			copy(grown, buf)
			buf = grown
		}
		m, err := r.Read(buf[n:min(len(buf), limit)])
		n += m
		if err == io.EOF {
			s.buf = buf
			return buf[:n], true, nil
		}
		if err != nil {
			return nil, false, err
		}
	}
}
