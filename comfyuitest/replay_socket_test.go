package comfyuitest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// messageConn is a socket's protocol: gorilla's, or deflatedConn for what gorilla cannot take.
type messageConn interface {
	ReadMessage() (kind int, data []byte, err error)
	WriteMessage(kind int, data []byte) error
}

// replaySocket is a socket of the recorded client.
type replaySocket struct {
	name string
	conn messageConn
	raw  net.Conn
	want []capture

	mu       sync.Mutex
	received int
	pongs    int
	err      error
	ended    chan struct{}
}

func (r *replay) openSocket(line capture) {
	r.learn(line.Path)
	s := &replaySocket{name: line.Conn, ended: make(chan struct{})}
	for _, other := range r.lines {
		if other.Kind == "ws" && other.Conn == line.Conn {
			s.want = append(s.want, other)
		}
	}
	dialer := websocket.Dialer{NetDialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := r.pod.DialContext(ctx, network, addr)
		s.raw = conn
		return conn, err
	}}
	if strings.Contains(line.Headers["Sec-WebSocket-Extensions"], "permessage-deflate") {
		r.openDeflated(line, s)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), replayPatience)
	defer cancel()
	conn, resp, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(r.pod.URL(), "http")+r.differ.renames.actual(line.Path), nil)
	if resp != nil {
		defer func() { _ = resp.Body.Close() }()
	}
	switch {
	case line.Status == 0:
		if err == nil {
			r.fail("socket %s: connected, the server could not be reached", line.Conn)
			_ = conn.Close()
		}
		return
	case err != nil:
		r.fail("socket %s: %v", line.Conn, err)
		return
	}
	r.compareHeaders("socket "+line.Conn, resp, line)
	s.conn = conn
	r.sockets[line.Conn] = s
	conn.SetPongHandler(func(string) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pongs++
		return nil
	})
	go r.read(s)
}

// openDeflated offers permessage-deflate as the recorded client did. Gorilla offers it without context takeover alone, which
// the server never confirms.
func (r *replay) openDeflated(line capture, s *replaySocket) {
	conn, err := r.pod.DialContext(context.Background(), "tcp", "")
	if err != nil {
		r.fail("socket %s: %v", line.Conn, err)
		return
	}
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: pod\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n", line.Path)
	if err != nil {
		r.fail("socket %s: %v", line.Conn, err)
		return
	}
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		r.fail("socket %s: %v %v", line.Conn, resp, err)
		return
	}
	defer func() { _ = resp.Body.Close() }()
	r.compareHeaders("socket "+line.Conn, resp, line)
	s.conn, s.raw = &deflatedConn{Conn: conn, reader: reader}, conn
	r.sockets[line.Conn] = s
	go r.read(s)
}

// deflatedConn is the client's end of a socket with permessage-deflate.
type deflatedConn struct {
	net.Conn

	reader  *bufio.Reader
	inflate inflater
}

func (c *deflatedConn) ReadMessage() (kind int, data []byte, err error) {
	var head [4]byte
	if _, err := io.ReadFull(c.reader, head[:2]); err != nil {
		return 0, nil, err
	}
	length := int(head[1])
	if length == 126 {
		if _, err := io.ReadFull(c.reader, head[2:]); err != nil {
			return 0, nil, err
		}
		length = int(binary.BigEndian.Uint16(head[2:]))
	}
	data = make([]byte, length)
	if _, err := io.ReadFull(c.reader, data); err != nil {
		return 0, nil, err
	}
	kind = int(head[0] & 15)
	if kind == websocket.CloseMessage {
		return 0, nil, io.EOF
	}
	if head[0]&0x40 == 0 {
		return 0, nil, fmt.Errorf("frame %x is not compressed", head)
	}
	data, err = c.inflate.expand(data)
	return kind, data, err
}

// WriteMessage writes short control frames, the only ones that the recorded client sent. The mask is zero.
func (c *deflatedConn) WriteMessage(kind int, data []byte) error {
	_, err := c.Write(append([]byte{0x80 | byte(kind), 0x80 | byte(len(data)), 0, 0, 0, 0}, data...))
	return err
}

// openStalled connects the client of the next post, and never reads.
func (r *replay) openStalled(i int) {
	for _, line := range r.lines[i:] {
		var body struct {
			ClientID string `json:"client_id"`
		}
		if line.Kind != "http" || json.Unmarshal(line.Request, &body) != nil || body.ClientID == "" {
			continue
		}
		s := &replaySocket{name: "stalled", ended: make(chan struct{})}
		close(s.ended)
		dialer := websocket.Dialer{NetDialContext: r.pod.DialContext}
		conn, resp, err := dialer.DialContext(context.Background(), "ws"+strings.TrimPrefix(r.pod.URL(), "http")+"/ws?clientId="+body.ClientID, nil)
		if err != nil {
			r.t.Fatal(err)
		}
		_ = resp.Body.Close()
		s.conn, s.raw = conn, conn.NetConn()
		r.sockets[s.name] = s
		return
	}
	r.t.Fatal("nobody posts after the stalled client")
}

func (s *replaySocket) abort() { _ = s.raw.Close() }

// read takes frames until the socket ends, and compares each with the recorded one.
func (r *replay) read(s *replaySocket) {
	defer close(s.ended)
	for {
		kind, data, err := s.conn.ReadMessage()
		s.mu.Lock()
		if err != nil {
			s.err = err
			s.mu.Unlock()
			return
		}
		n := s.received
		s.received++
		s.mu.Unlock()
		r.frame(s, n, kind, data)
	}
}

func (r *replay) frame(s *replaySocket, n, kind int, data []byte) {
	if n >= len(s.want) {
		if r.peculiar.lost {
			return
		}
		r.fail("socket %s: frame %d, the server sent none: %s", s.name, n, short(data))
		return
	}
	want := s.want[s.expected(n, data)]
	wanted := fmt.Sprintf("socket %s, frame %d (recorded at %.4fs)", s.name, n, want.T)
	if (kind == websocket.BinaryMessage) != (want.Text == "") {
		r.fail("%s: got %s, want %s", wanted, short(data), short([]byte(want.Text)))
		return
	}
	if kind == websocket.BinaryMessage {
		r.compareBinary(wanted, data, want)
		return
	}
	r.compareJSON(wanted, data, []byte(want.Text))
}

// expected is the recorded frame that the n-th one is held against. A tick makes two frames, one after the other, and the
// status of a post may fall between them: then either order is right.
func (s *replaySocket) expected(n int, data []byte) int {
	is := func(i int, kind string) bool {
		return i >= 0 && i < len(s.want) && strings.HasPrefix(s.want[i].Text, `{"type": "`+kind+`"`)
	}
	status := bytes.HasPrefix(data, []byte(`{"type": "status"`))
	switch {
	case is(n, "progress_state") && is(n+1, "status") && is(n+2, "progress") && status:
		return n + 1
	case is(n-1, "progress_state") && is(n, "status") && is(n+1, "progress") && !status:
		return n - 1
	}
	return n
}

func (r *replay) sendFrame(line capture, kind int, data []byte) {
	s := r.sockets[line.Conn]
	if s == nil {
		r.fail("socket %s is not open", line.Conn)
		return
	}
	if err := s.conn.WriteMessage(kind, data); err != nil {
		r.fail("socket %s: %v", line.Conn, err)
	}
}

func (r *replay) sendHuge() {
	for _, s := range r.sockets {
		// The server closes before all is sent.
		_ = s.conn.WriteMessage(websocket.TextMessage, bytes.Repeat([]byte("x"), 5<<20))
	}
}

// closeSocket ends a socket as the client did, or waits for the end that the server made. Until then all frames of the
// recording must have come, and no others.
func (r *replay) closeSocket(line capture) {
	s := r.sockets[line.Conn]
	if s == nil {
		r.fail("socket %s is not open", line.Conn)
		return
	}
	switch line.How {
	case "client closed":
		r.checkFrames(s)
		_ = s.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
		s.await()
		s.abort()
	case "client aborted":
		r.checkFrames(s)
		s.abort()
	default:
		if !s.await() {
			r.fail("socket %s stays open, the server ended it: %s", s.name, line.How)
		}
		r.checkFrames(s)
		code := websocket.CloseAbnormalClosure
		var closed *websocket.CloseError
		if errors.As(s.err, &closed) {
			code = closed.Code
		}
		if code != line.Code && code != r.peculiar.code {
			r.fail("socket %s: closed with %d, want %d", s.name, code, line.Code)
		}
		s.abort()
	}
	pongs := 0
	for _, other := range r.lines {
		if other.Kind == "ws-pong" && other.Conn == line.Conn {
			pongs++
		}
	}
	s.await()
	if s.pongs != pongs {
		r.fail("socket %s: %d pongs, want %d", s.name, s.pongs, pongs)
	}
	delete(r.sockets, line.Conn)
}

func (s *replaySocket) await() bool {
	select {
	case <-s.ended:
		return true
	case <-time.After(replayPatience):
		return false
	}
}

func (r *replay) checkFrames(s *replaySocket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.received; n < len(s.want) {
		r.fail("socket %s: %d frames, want %d; missing %s", s.name, n, len(s.want), short([]byte(s.want[n].Text)))
	}
}
