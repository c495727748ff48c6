package comfyui

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// serve is a client of a pod that is only a handler.
func serve(t *testing.T, handler http.HandlerFunc, opts ...Option) *PodClient {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return clientOf(t, server.URL, opts...)
}

func clientOf(t *testing.T, baseURL string, opts ...Option) *PodClient {
	t.Helper()
	o, err := newOptions(baseURL, opts)
	require.NoError(t, err)
	e, err := newEndpoint(o, &counters{})
	require.NoError(t, err)
	t.Cleanup(e.close)
	return &PodClient{opts: o, endpoint: e}
}

// noRetry makes every failure final.
func noRetry() Option {
	return func(o *options) {
		for _, c := range []Category{CategoryNetwork, CategoryTimeout, CategoryUnavailable, CategoryOverloaded, CategoryProtocol} {
			o.retry[c] = RetryPolicy{}
		}
	}
}

// pipes is a network without sockets, for synctest.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	dials  atomic.Int64
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

func (p *pipes) DialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	p.dials.Add(1)
	here, there := net.Pipe()
	select {
	case p.conns <- there:
		return here, nil
	case <-p.closed:
		return nil, &net.OpError{Op: "dial", Net: "pipe", Err: errors.New("connection refused")}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// servePipes is serve inside a synctest bubble.
func servePipes(t *testing.T, handler http.HandlerFunc, opts ...Option) (*PodClient, *pipes) {
	t.Helper()
	p := newPipes()
	server := &http.Server{Handler: handler}
	go func() { _ = server.Serve(p) }()
	transport := &http.Transport{DialContext: p.DialContext}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		_ = server.Close()
		_ = p.Close()
	})
	return clientOf(t, "http://pod", append([]Option{WithHTTPClient(&http.Client{Transport: transport})}, opts...)...), p
}

func TestURLJoinsPrefixAndQuery(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		base, path string
		query      url.Values
		want       string
	}{
		{"host:8188", "/prompt", nil, "http://host:8188/prompt"},
		{"https://host/a/b/", "/queue", nil, "https://host/a/b/queue"},
		{"https://host/a%2Fb", "/history/x%2Fy", nil, "https://host/a%2Fb/history/x%2Fy"},
		{"http://h/?token=s3cret", "/view", url.Values{"filename": {"a b.png"}}, "http://h/view?filename=a+b.png&token=s3cret"},
		{"http://h/?type=x", "/view", url.Values{"type": {"temp"}}, "http://h/view?type=temp"},
		{"http://user:pass@h", "/prompt", nil, "http://h/prompt"},
	} {
		c := clientOf(t, test.base)
		assert.Equal(t, test.want, c.endpoint.url(test.path, test.query).String())
	}
	c := clientOf(t, "https://host/pod?token=x")
	assert.Equal(t, "wss://host/pod/ws?clientId=me&token=x", c.endpoint.streamURL("me").String())
}

func TestZeroAndClosedClientsAnswerErrClosed(t *testing.T) {
	t.Parallel()
	closed := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("a closed client called") })
	closed.endpoint.close()
	var null *PodClient
	ctx := t.Context()
	for name, c := range map[string]*PodClient{"nil": null, "zero": {}, "closed": closed} {
		for call, err := range map[string]error{
			"queue":     second(c.Queue(ctx)),
			"history":   second(c.History(ctx, "")),
			"interrupt": c.Interrupt(ctx, ""),
			"delete":    c.DeleteQueued(ctx, "a"),
			"clear":     c.ClearQueue(ctx),
			"info":      second(c.ObjectInfo(ctx, "A")),
			"models":    second(c.Models(ctx, "vae")),
			"stats":     second(c.SystemStats(ctx)),
			"features":  second(c.Features(ctx)),
			"free":      c.FreeMemory(ctx, true, true),
			"upload":    second(c.Upload(ctx, "a.png", strings.NewReader("x"))),
			"mask":      second(c.UploadMask(ctx, FileRef{Filename: "a"}, "a.png", strings.NewReader("x"))),
			"do":        second(c.Do(ctx, "GET", "/x", nil, nil)), //nolint:bodyclose // there is none
		} {
			require.ErrorIs(t, err, ErrClosed, "%s %s", name, call)
			assert.Equal(t, CategoryClosed, CategoryOf(err), "%s %s", name, call)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestPostPromptOutcomes(t *testing.T) {
	t.Parallel()
	page := "<html><head><title>Bad gateway</title></head><body>x</body></html>"
	for _, test := range []struct {
		name     string
		status   int
		header   map[string]string
		body     string
		outcome  postOutcome
		category Category
	}{
		{"accepted", 200, nil, `{"prompt_id":"p","number":3,"node_errors":{}}`, postAccepted, ""},
		{"no JSON", 200, map[string]string{"Content-Type": "text/html"}, page, postAmbiguous, CategoryProtocol},
		{"login page", 200, map[string]string{"Content-Type": "text/html"}, `<form><input type="password"></form>`, postAmbiguous, CategoryAuth},
		{"no id", 200, nil, `{"number":3}`, postAmbiguous, CategoryProtocol},
		{"duplicate", 409, nil, `{"error":"prompt_id already exists"}`, postAccepted, ""},
		{"validation", 400, nil, `{"error":{"type":"no_prompt","message":"No prompt provided"},"node_errors":{}}`, postRefused, CategoryValidation},
		{"old validation", 400, nil, `{"error":"Prompt has no outputs","node_errors":[]}`, postRefused, CategoryValidation},
		{"auth", 401, nil, "", postRefused, CategoryAuth},
		{"forbidden", 403, nil, "", postRefused, CategoryAuth},
		{"not up", 404, nil, "", postRefused, CategoryUnavailable},
		{"no route", 405, nil, "405: Method Not Allowed", postRefused, CategoryUnavailable},
		{"slow", 408, nil, "", postAmbiguous, CategoryTimeout},
		{"too large", 413, map[string]string{"Content-Type": "text/html"}, page, postRefused, CategoryTooLarge},
		{"overload", 429, map[string]string{"Retry-After": "7"}, "", postRefused, CategoryOverloaded},
		{"login", 302, map[string]string{"Location": "/login?next=x"}, "", postRefused, CategoryAuth},
		{"see other", 303, map[string]string{"Location": "/elsewhere"}, "", postRefused, CategoryProtocol},
		{"modal", 303, map[string]string{"Location": "/prompt?__modal_function_call_id=fc-1"}, "", postAmbiguous, CategoryTimeout},
		{"moved", 307, map[string]string{"Location": "/other"}, "", postRefused, CategoryProtocol},
		{"500", 500, nil, "500 Internal Server Error\n\nServer got itself in trouble", postAmbiguous, CategoryProtocol},
		{"502", 502, map[string]string{"Content-Type": "text/html"}, page, postAmbiguous, CategoryUnavailable},
		{"503", 503, nil, "", postAmbiguous, CategoryUnavailable},
		{"504", 504, nil, "", postAmbiguous, CategoryUnavailable},
		{"520", 520, nil, "", postAmbiguous, CategoryUnavailable},
		{"522", 522, nil, "", postAmbiguous, CategoryUnavailable},
		{"524", 524, nil, "", postAmbiguous, CategoryUnavailable},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var posts, others atomic.Int64
			c := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodPost || r.URL.Path != "/prompt" {
					others.Add(1)
				}
				posts.Add(1)
				_, _ = io.Copy(io.Discard, r.Body)
				for k, v := range test.header {
					w.Header().Set(k, v)
				}
				w.WriteHeader(test.status)
				_, _ = io.WriteString(w, test.body)
			})
			asked := 0
			reply, outcome, err := c.endpoint.postPrompt(t.Context(), []byte(`{"prompt":{}}`), func() error { asked++; return nil })
			assert.Equal(t, test.outcome, outcome, "%v", err)
			assert.Equal(t, test.category, CategoryOf(err), "%v", err)
			assert.Equal(t, 1, asked)
			assert.EqualValues(t, 1, posts.Load())
			assert.Zero(t, others.Load(), "the method changed, or the redirect was followed")
			if test.status == 200 && err == nil {
				assert.Equal(t, "p", reply.PromptID)
			}
			if test.status == 429 {
				var e *Error
				require.ErrorAs(t, err, &e)
				assert.Equal(t, 7*time.Second, e.RetryAfter)
			}
		})
	}
}

func TestPostPromptThatNeverLeft(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := listener.Addr().String()
	require.NoError(t, listener.Close())
	_, outcome, err := clientOf(t, address).endpoint.postPrompt(t.Context(), []byte("{}"), nil)
	assert.Equal(t, postUnsent, outcome)
	assert.Equal(t, CategoryNetwork, CategoryOf(err))

	var served atomic.Int64
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err == nil && r.Method == http.MethodPost {
			served.Add(1)
		}
		_, _ = io.WriteString(w, `{"exec_info":{"queue_remaining":0}}`)
	})
	// On a new connection, and on one that is reused and closed meanwhile.
	for range 3 {
		_, outcome, err = c.endpoint.postPrompt(t.Context(), []byte(`{"prompt":{}}`), func() error { return ErrFenced })
		assert.Equal(t, postUnsent, outcome)
		require.ErrorIs(t, err, ErrFenced)
		assert.Equal(t, CategoryConflict, CategoryOf(err))
		_, err = c.endpoint.queueRemaining(t.Context())
		require.NoError(t, err)
	}
	assert.Zero(t, served.Load())
}

func TestPostPromptWithoutAnswer(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(http.ResponseWriter){
		"reset":     func(w http.ResponseWriter) { reset(t, w) },
		"half":      func(w http.ResponseWriter) { w.Header().Set("Content-Length", "100"); _, _ = io.WriteString(w, `{"prompt_id"`) },
		"malformed": func(w http.ResponseWriter) { _, _ = io.WriteString(w, `{"prompt_id":"p"`) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := serve(t, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				cut(w)
			})
			_, outcome, err := c.endpoint.postPrompt(t.Context(), []byte(`{"prompt":{}}`), nil)
			assert.Equal(t, postAmbiguous, outcome)
			require.Error(t, err)
		})
	}
}

func reset(t *testing.T, w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if !assert.NoError(t, err) {
		return
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

func TestCallsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		defer close(hang)
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/prompt":
				_, _ = io.Copy(io.Discard, r.Body)
				<-hang
			case "/queue": // headers, then a drop every 20 seconds, for ever
				w.WriteHeader(http.StatusOK)
				for {
					if _, err := io.WriteString(w, " "); err != nil || http.NewResponseController(w).Flush() != nil {
						return
					}
					select {
					case <-hang:
						return
					case <-time.After(20 * time.Second):
					}
				}
			case "/view": // a first half
				w.Header().Set("Content-Length", "10")
				_, _ = io.WriteString(w, "12345")
				_ = http.NewResponseController(w).Flush()
				<-hang
			}
		}, noRetry())
		start := time.Now()
		_, outcome, err := c.endpoint.postPrompt(t.Context(), []byte("{}"), nil)
		assert.Equal(t, postAmbiguous, outcome)
		assert.Equal(t, CategoryTimeout, CategoryOf(err), "%v", err)
		assert.Equal(t, time.Minute, time.Since(start))

		start = time.Now()
		_, err = c.Queue(t.Context())
		assert.Equal(t, CategoryTimeout, CategoryOf(err), "%v", err)
		assert.Equal(t, time.Minute, time.Since(start))

		start = time.Now()
		resp, err := c.endpoint.view(t.Context(), nil, nil)
		require.NoError(t, err)
		time.Sleep(5 * time.Minute) // a slow reader is no silent pod
		got, err := io.ReadAll(resp.Body)
		assert.Equal(t, "12345", string(got))
		assert.Equal(t, CategoryTimeout, CategoryOf(err), "%v", err)
		assert.Equal(t, 5*time.Minute+30*time.Second, time.Since(start))
		require.NoError(t, resp.Body.Close())

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = c.Queue(ctx)
		assert.Equal(t, CategoryContext, CategoryOf(err))
		require.ErrorIs(t, err, context.DeadlineExceeded)

		go func() {
			time.Sleep(time.Second)
			c.endpoint.close()
		}()
		_, err = c.Queue(t.Context())
		assert.Equal(t, CategoryClosed, CategoryOf(err))
		require.ErrorIs(t, err, ErrClosed)
	})
}

var _ = fmt.Sprint
