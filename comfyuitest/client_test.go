package comfyuitest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// reply is an HTTP answer, read whole.
type reply struct {
	status int
	header http.Header
	body   []byte
}

func (r reply) json(tb testing.TB) any {
	tb.Helper()
	v, err := parseJSON(r.body)
	require.NoError(tb, err, "%s", r.body)
	return v
}

// at walks into JSON: keys of objects and indexes of lists.
func at(tb testing.TB, v any, path ...any) any {
	tb.Helper()
	for _, step := range path {
		switch step := step.(type) {
		case string:
			o, ok := v.(object)
			require.True(tb, ok, "no object at %v in %s", step, pyJSON(v))
			v, ok = o.get(step)
			require.True(tb, ok, "no %q in %s", step, pyJSON(o))
		case int:
			list, ok := v.([]any)
			require.True(tb, ok && step < len(list), "no item %d in %s", step, pyJSON(v))
			v = list[step]
		}
	}
	return v
}

func do(tb testing.TB, p *Pod, method, path, body string) reply {
	tb.Helper()
	r, err := try(p, method, path, body)
	require.NoError(tb, err)
	return r
}

func try(p *Pod, method, path, body string) (reply, error) {
	return send(p, method, path, body, nil)
}

func send(p *Pod, method, path, body string, header http.Header) (reply, error) {
	req, err := http.NewRequestWithContext(context.Background(), method, p.URL()+path, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for name, values := range header {
		req.Header[name] = values
	}
	resp, err := p.Client().Do(req)
	if err != nil {
		return reply{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, data}, err
}

func get(tb testing.TB, p *Pod, path string) any {
	tb.Helper()
	return do(tb, p, http.MethodGet, path, "").json(tb)
}

// graphOf makes a graph of alternating ids and nodes: "1", "Steps", inputs…
func graphOf(parts ...any) string {
	nodes := object{}
	for i := 0; i+2 < len(parts); i += 3 {
		inputs, _ := parts[i+2].(object)
		if inputs == nil {
			inputs = object{}
		}
		nodes = append(nodes, field{parts[i].(string), object{{"class_type", parts[i+1]}, {"inputs", inputs}}})
	}
	return string(pyJSON(nodes))
}

// post queues a graph for a client; more members of the body come as JSON without braces.
func submit(tb testing.TB, p *Pod, graph, clientID, more string) reply {
	tb.Helper()
	body := `{"prompt": ` + graph
	if clientID != "" {
		body += `, "client_id": "` + clientID + `"`
	}
	if more != "" {
		body += ", " + more
	}
	return do(tb, p, http.MethodPost, "/prompt", body+"}")
}

func queue1(tb testing.TB, p *Pod, graph, clientID string) string {
	tb.Helper()
	r := submit(tb, p, graph, clientID, "")
	require.Equal(tb, http.StatusOK, r.status, "%s", r.body)
	return at(tb, r.json(tb), "prompt_id").(string)
}

// socket is a client's WebSocket. A goroutine reads it, as clients do.
type socket struct {
	tb   testing.TB
	conn *websocket.Conn
	done chan struct{}

	mu     sync.Mutex
	frames []received
	err    error
	more   chan struct{}
	pongs  chan struct{}
}

type received struct {
	kind int
	data []byte
}

// event is the type of a text frame, or "binary N".
func (r received) event() string {
	if r.kind == websocket.BinaryMessage {
		return fmt.Sprintf("binary %d", r.data[3])
	}
	var m struct{ Type string }
	if err := json.Unmarshal(bytes.ReplaceAll(bytes.ReplaceAll(r.data, []byte("NaN"), []byte("0")), []byte("Infinity"), []byte("0")), &m); err != nil {
		return "malformed: " + err.Error()
	}
	return m.Type
}

func (r received) data0(tb testing.TB) object {
	tb.Helper()
	v, err := parseJSON(r.data)
	require.NoError(tb, err)
	return at(tb, v, "data").(object)
}

func dial(tb testing.TB, p *Pod, clientID string) *socket {
	tb.Helper()
	s, err := tryDial(tb, p, clientID)
	require.NoError(tb, err)
	return s
}

func tryDial(tb testing.TB, p *Pod, clientID string) (*socket, error) {
	dialer := websocket.Dialer{NetDialContext: p.DialContext}
	path := "/ws"
	if clientID != "" {
		path += "?clientId=" + clientID
	}
	conn, resp, err := dialer.DialContext(context.Background(), strings.Replace(p.URL(), "http", "ws", 1)+path, nil) //nolint:bodyclose // an upgrade has none
	if err != nil {
		if resp != nil {
			err = fmt.Errorf("%w: status %d", err, resp.StatusCode)
		}
		return nil, err
	}
	s := &socket{tb: tb, conn: conn, done: make(chan struct{}), more: make(chan struct{}, 1), pongs: make(chan struct{}, 16)}
	conn.SetPongHandler(func(string) error { s.pongs <- struct{}{}; return nil })
	go s.read()
	tb.Cleanup(s.abort)
	return s, nil
}

func (s *socket) read() {
	defer close(s.done)
	for {
		kind, data, err := s.conn.ReadMessage()
		s.mu.Lock()
		if err != nil {
			s.err = err
		} else {
			s.frames = append(s.frames, received{kind, data})
		}
		s.mu.Unlock()
		select {
		case s.more <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// next takes the next frame, waiting for it.
func (s *socket) next() received {
	s.tb.Helper()
	for {
		s.mu.Lock()
		if len(s.frames) > 0 {
			f := s.frames[0]
			s.frames = s.frames[1:]
			s.mu.Unlock()
			return f
		}
		err := s.err
		s.mu.Unlock()
		require.NoError(s.tb, err)
		<-s.more
	}
}

// until takes frames up to the first of that event, and returns it.
func (s *socket) until(event string) received {
	s.tb.Helper()
	for {
		if f := s.next(); f.event() == event {
			return f
		}
	}
}

// job takes the frames of one job, from its execution_start to executing with node null, status frames apart.
func (s *socket) job() []received {
	s.tb.Helper()
	frames := []received{s.until("execution_start")}
	for {
		f := s.next()
		if f.event() == "status" {
			continue
		}
		frames = append(frames, f)
		if f.event() == "executing" && f.data0(s.tb)[0].value == nil {
			return frames
		}
	}
}

func events(frames []received) []string {
	names := make([]string, len(frames))
	for i, f := range frames {
		names[i] = f.event()
	}
	return names
}

// pending returns the frames that are there and leaves them.
func (s *socket) pending() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return events(s.frames)
}

func (s *socket) write(text string) {
	s.tb.Helper()
	require.NoError(s.tb, s.conn.WriteMessage(websocket.TextMessage, []byte(text)))
}

// abort cuts the connection without a close frame.
func (s *socket) abort() {
	_ = s.conn.Close()
	<-s.done
}

// close ends the socket with a close frame and waits for the server's.
func (s *socket) close() {
	s.tb.Helper()
	require.NoError(s.tb, s.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(1000, "")))
	<-s.done
}

// end waits for the server to end the socket and returns why.
func (s *socket) end() error {
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
