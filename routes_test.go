package comfyui

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/color"
	imagepng "image/png"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui/comfyuitest"
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
	e := newEndpoint(o, &counters{})
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
		{"user:pa%40ss@h:1", "/prompt", nil, "http://h:1/prompt"},
		{"[::1]:8188", "/prompt", nil, "http://[::1]:8188/prompt"},
		{"http://[fe80::1%25eth0]:8188/a", "/prompt", nil, "http://[fe80::1%25eth0]:8188/a/prompt"},
		{"h:1/?next=http://x", "/prompt", nil, "http://h:1/prompt?next=http%3A%2F%2Fx"},
		{"h/pod?next=http://x", "/prompt", nil, "http://h/pod/prompt?next=http%3A%2F%2Fx"},
		{"http://h/a b//", "/prompt", nil, "http://h/a%20b/prompt"},
		{"http://h:1/#/view", "/prompt", nil, "http://h:1/prompt"},
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
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := listener.Addr().String()
	require.NoError(t, listener.Close())
	_, outcome, err := clientOf(t, address).endpoint.postPrompt(t.Context(), []byte("{}"), nil)
	assert.Equal(t, postUnsent, outcome)
	assert.Equal(t, CategoryNetwork, CategoryOf(err))
}

// Not even the headers of a request leave that confirm refuses: old pods interrupt without reading the body.
func TestConfirmStopsTheWholeRequest(t *testing.T) {
	t.Parallel()
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(proto, func(t *testing.T) {
			t.Parallel()
			var posts atomic.Int64
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				assert.Equal(t, proto, r.Proto)
				if r.Method == http.MethodPost {
					posts.Add(1)
				}
				_, _ = io.WriteString(w, `{"exec_info":{"queue_remaining":0}}`)
			}))
			if server.EnableHTTP2 = proto == "HTTP/2.0"; server.EnableHTTP2 {
				server.StartTLS()
			} else {
				server.Start()
			}
			defer server.Close()
			c := clientOf(t, server.URL, WithHTTPClient(server.Client()))
			for range 3 { // on a new connection, and on one that is reused
				asked := 0
				refuse := func() error { asked++; return ErrFenced }
				_, outcome, err := c.endpoint.postPrompt(t.Context(), []byte(`{"prompt":{}}`), refuse)
				assert.Equal(t, postUnsent, outcome)
				require.ErrorIs(t, err, ErrFenced)
				assert.Equal(t, CategoryConflict, CategoryOf(err))
				for _, err := range []error{
					c.endpoint.interrupt(t.Context(), "x", refuse),
					c.endpoint.deleteQueued(t.Context(), refuse, "x"),
					third(c.endpoint.cancelJob(t.Context(), "x", refuse)),
				} {
					require.ErrorIs(t, err, ErrFenced)
					assert.True(t, neverSent(err))
				}
				assert.GreaterOrEqual(t, asked, 4)
				_, err = c.endpoint.queueRemaining(t.Context())
				require.NoError(t, err)
			}
			assert.Zero(t, posts.Load())

			asked := 0
			_, _, _ = c.endpoint.postPrompt(t.Context(), []byte(`{"prompt":{}}`), func() error { asked++; return nil })
			assert.EqualValues(t, 1, posts.Load())
			assert.Equal(t, 1, asked)
		})
	}
}

func third[T, U any](_ T, _ U, err error) error { return err }

func TestPostPromptWithoutAnswer(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(http.ResponseWriter){
		"reset": func(w http.ResponseWriter) { reset(t, w) },
		"half": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, `{"prompt_id"`)
		},
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
		resp, err := c.endpoint.view(t.Context(), viewOp, nil, nil)
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

// ---------------------------------------------------------------- S7, S9

// A refused workflow is told node by node, after one POST, whatever the version and shape.
func TestS7RefusedWorkflowByNode(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, body string
		category   Category
		check      func(*testing.T, *ValidationError)
	}{
		{
			"by node",
			`{"error":{"type":"prompt_outputs_failed_validation","message":"Prompt outputs failed validation","details":"","extra_info":{}},
			"node_errors":{"3":{"errors":[{"type":"value_smaller_than_min","message":"Value 0 smaller than min of 1","details":"width",
			"extra_info":{"input_name":"width","received_value":0}}],"dependent_outputs":["9"],"class_type":"EmptyImage"}}}`,
			CategoryValidation,
			func(t *testing.T, v *ValidationError) {
				assert.Equal(t, "prompt_outputs_failed_validation", v.Type)
				n := v.Nodes["3"]
				assert.Equal(t, "EmptyImage", n.Class)
				assert.Equal(t, []string{"9"}, n.DependentOutputs)
				assert.Equal(t, "width", n.Errors[0].Input)
				assert.JSONEq(t, `{"input_name":"width","received_value":0}`, string(n.Errors[0].ExtraInfo))
			},
		},
		{
			"old: a text and a list", `{"error":"Prompt has no outputs","node_errors":[]}`, CategoryValidation,
			func(t *testing.T, v *ValidationError) {
				assert.Equal(t, "Prompt has no outputs", v.Message)
				assert.Empty(t, v.Nodes)
			},
		},
		{
			"a missing class", `{"error":{"type":"missing_node_type","message":"Node 'X' not found.","details":"Node ID '#1'","extra_info":{}},"node_errors":{}}`,
			CategoryMissingAsset, func(t *testing.T, v *ValidationError) { assert.Equal(t, "Node ID '#1'", v.Details) },
		},
		{
			"NaN inside", `{"error":{"type":"t","message":"m","details":"","extra_info":{}},"node_errors":{"1":{"errors":[{"type":"x","message":"y","details":"",
			"extra_info":{"input_name":"a","received_value":NaN}}],"dependent_outputs":[],"class_type":"C"}}}`,
			CategoryValidation, func(t *testing.T, v *ValidationError) { assert.Equal(t, "a", v.Nodes["1"].Errors[0].Input) },
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var posts atomic.Int64
			c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				posts.Add(1)
				w.Header().Set("Content-Type", "application/json; charset=utf-8")
				w.WriteHeader(http.StatusBadRequest)
				_, _ = io.WriteString(w, test.body)
			})
			_, outcome, err := c.endpoint.postPrompt(t.Context(), []byte(`{"prompt":{}}`), nil)
			assert.Equal(t, postRefused, outcome)
			assert.Equal(t, test.category, CategoryOf(err))
			var v *ValidationError
			require.ErrorAs(t, err, &v)
			test.check(t, v)
			assert.EqualValues(t, 1, posts.Load())
			_, again := c.endpoint.retries.next(err, 1, 0)
			assert.False(t, again)
		})
	}
}

// A header that is no credential can hold a word of every answer.
func TestS7RefusalsAreReadWhateverIsInTheHeaders(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"error":{"type":"prompt_outputs_failed_validation","message":"Prompt outputs failed validation"},"node_errors":{"1":{"errors":[`+
			`{"type":"value_not_in_list","details":"ckpt: 'x.safetensors' not in (list of length 30)","extra_info":{"input_config":["COMBO",{"image_upload":true}]}}]}}}`)
	}, noRetry(), WithHeader("ngrok-skip-browser-warning", "true"), WithHeader("X-Key", "COMBO"), WithHeader("X-Other", `image_upload":true`))
	_, _, err := c.endpoint.postPrompt(t.Context(), []byte("{}"), nil)
	var v *ValidationError
	require.ErrorAs(t, err, &v)
	assert.Equal(t, CategoryMissingAsset, CategoryOf(err))
	assert.JSONEq(t, `{"input_config":["[redacted]",{"image_upload":true}]}`, string(v.Nodes["1"].Errors[0].ExtraInfo))
}

// credentials is a client with every kind of credential, and what no other host, error or log may see of them.
func credentials(t *testing.T, base string) (*PodClient, []string) {
	u, err := url.Parse(base)
	require.NoError(t, err)
	u.User, u.RawQuery = url.UserPassword("someone", "pass-w0rd"), "token=query-t0ken"
	c := clientOf(t, u.String(), noRetry(),
		WithHeader("X-API-Key", "header-k3y"),
		WithHeader("Cookie", "session=cook1e"),
		WithHeaderFunc(func(context.Context) (http.Header, error) {
			return http.Header{"x-fresh": {"fresh-t0ken"}}, nil
		}),
		WithComfyAPIKey("comfy-k3y"))
	return c, []string{"pass-w0rd", "query-t0ken", "header-k3y", "cook1e", "fresh-t0ken", "comfy-k3y", "c29tZW9uZTpwYXNzLXcwcmQ="}
}

func dump(r *http.Request) string {
	var b strings.Builder
	_ = r.Header.Write(&b)
	return r.Method + " " + r.URL.String() + "\n" + b.String()
}

func TestS9NoCredentialLeavesTheHost(t *testing.T) {
	t.Parallel()
	var strangerSaw atomic.Value
	strangerSaw.Store("")
	stranger := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		strangerSaw.Store(dump(r))
		_, _ = io.WriteString(w, "bytes")
	}))
	defer stranger.Close()
	var posts, hops atomic.Int64
	home := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		assert.Contains(t, dump(r), "header-k3y", "the pod itself is told")
		assert.Contains(t, dump(r), "fresh-t0ken")
		switch r.URL.Path {
		case "/history":
			hops.Add(1)
			assert.Equal(t, http.MethodGet, r.Method)
			http.Redirect(w, r, "/elsewhere/history?token=query-t0ken", http.StatusFound)
			return
		case "/elsewhere/history":
			hops.Add(1)
			_, _ = io.WriteString(w, "{}")
			return
		}
		if r.Method == http.MethodPost {
			posts.Add(1)
		}
		w.Header().Set("Location", stranger.URL+"/file?X-Amz-Signature=s1gned")
		w.WriteHeader(map[string]int{"/queue": 302, "/interrupt": 307, "/prompt": 303, "/view": 302}[r.URL.Path])
	}))
	defer home.Close()
	c, secrets := credentials(t, home.URL)
	clean := func(text string) {
		t.Helper()
		for _, secret := range append(secrets, "s1gned") {
			assert.NotContains(t, text, secret)
		}
	}

	_, err := c.Queue(t.Context())
	assert.Equal(t, CategoryProtocol, CategoryOf(err))
	clean(err.Error())
	err = c.endpoint.interrupt(t.Context(), "x", nil)
	assert.Equal(t, CategoryProtocol, CategoryOf(err))
	_, outcome, err := c.endpoint.postPrompt(t.Context(), []byte("{}"), nil)
	assert.Equal(t, postRefused, outcome)
	clean(err.Error())
	assert.EqualValues(t, 2, posts.Load())
	assert.Empty(t, strangerSaw.Load(), "only files are fetched from elsewhere")

	resp, err := c.endpoint.view(t.Context(), viewOp, url.Values{"filename": {"a.png"}}, http.Header{"Range": {"bytes=5-"}})
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	assert.Equal(t, "bytes", string(body))
	saw := strangerSaw.Load().(string)
	assert.Contains(t, saw, "GET /file?X-Amz-Signature=s1gned")
	assert.Contains(t, saw, "Range: bytes=5-")
	assert.NotContains(t, saw, "filename")
	for _, secret := range secrets {
		assert.NotContains(t, saw, secret)
	}

	oldest, err := c.endpoint.oldestHistory(t.Context())
	require.NoError(t, err)
	assert.Nil(t, oldest)
	assert.EqualValues(t, 2, hops.Load(), "a GET follows within the host")
}

// A hop to another host does not come back with credentials either.
func TestS9CredentialsStayAwayAfterAHop(t *testing.T) {
	t.Parallel()
	var home, stranger *httptest.Server
	var saw []string
	home = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/back" {
			saw = append(saw, dump(r))
			return
		}
		http.Redirect(w, r, stranger.URL+"/one", http.StatusFound)
	}))
	defer home.Close()
	stranger = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		saw = append(saw, dump(r))
		to := "/two"
		if r.URL.Path == "/two" {
			to = home.URL + "/back"
		}
		http.Redirect(w, r, to, http.StatusTemporaryRedirect)
	}))
	defer stranger.Close()
	c, secrets := credentials(t, home.URL)
	resp, err := c.endpoint.view(t.Context(), viewOp, nil, nil)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Len(t, saw, 3)
	for _, secret := range secrets {
		assert.NotContains(t, strings.Join(saw, "\n"), secret)
	}
}

func TestS9ErrorsHoldNoCredential(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]http.HandlerFunc{
		"echo": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(502); _, _ = io.WriteString(w, dump(r)) },
		"echo in JSON": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(400)
			_, _ = fmt.Fprintf(w, `{"error":{"type":"t","message":%q,"details":%q}}`, r.URL.RawQuery, r.Header.Get("Authorization"))
		},
		"echo in a page": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			_, _ = fmt.Fprintf(w, "<title>%s</title>", r.Header.Get("X-Fresh"))
		},
		"echo in a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://someone:pass-w0rd@other.example/?"+r.URL.RawQuery, http.StatusFound)
		},
		"reset": func(w http.ResponseWriter, _ *http.Request) { reset(t, w) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(answer)
			defer server.Close()
			c, secrets := credentials(t, server.URL)
			_, queue := c.Queue(t.Context())
			_, features := c.Features(t.Context())
			_, _, post := c.endpoint.postPrompt(t.Context(), []byte("{}"), nil)
			for _, err := range []error{queue, features, post} {
				require.Error(t, err)
				data, fault := encodeError(err)
				require.NoError(t, fault)
				for _, secret := range secrets {
					assert.NotContains(t, err.Error(), secret)
					assert.NotContains(t, string(data), secret)
					assert.NotContains(t, fmt.Sprintf("%+v", err), secret)
				}
			}
		})
	}
	c := clientOf(t, "http://someone:pass-w0rd@127.0.0.1:1/?token=query-t0ken", noRetry())
	_, err := c.Queue(t.Context())
	require.Error(t, err)
	assert.NotContains(t, err.Error(), "query-t0ken")
	assert.NotContains(t, err.Error(), "pass-w0rd")
	assert.Contains(t, err.Error(), "127.0.0.1:1", "but it names the pod")
}

func TestS9CredentialsInEveryGuise(t *testing.T) {
	t.Parallel()
	const key = `kä"y\1`
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		cookie, err := r.Cookie("session")
		assert.NoError(t, err)
		_, password, _ := r.BasicAuth()
		text := "no " + key + cookie.Value + password
		if r.Method == http.MethodGet {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, strings.Repeat("x", 190)+text)
			return
		}
		w.WriteHeader(http.StatusBadRequest)
		data, _ := json.Marshal(map[string]any{"error": map[string]string{"type": "t", "message": text, "details": text}})
		_, _ = w.Write(data)
	}, noRetry(), WithHeader("X-API-Key", key), WithHeader("Cookie", "a=b; session=cook1e"), WithHeader("Authorization", "Basic c29tZW9uZTpwYXNzLXcwcmQ="))
	_, _, post := c.endpoint.postPrompt(t.Context(), []byte("{}"), nil)
	_, get := c.Queue(t.Context())
	for _, err := range []error{post, get} {
		require.ErrorContains(t, err, "no [redact")
		for _, secret := range []string{key, "kä", "cook1e", "pass-w0rd"} {
			assert.NotContains(t, err.Error(), secret)
		}
	}
}

func TestS9StreamRefusalHoldsNoCredential(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		for _, cookie := range r.Cookies() {
			_, _ = io.WriteString(w, cookie.String()+" ")
		}
		_, _ = io.WriteString(w, r.URL.RawQuery+" "+r.Header.Get("Authorization")+r.Header.Get("X-Fresh")+r.Header.Get("X-Api-Key"))
	}))
	defer server.Close()
	c, secrets := credentials(t, server.URL)
	c.endpoint.client.Jar = jarOf(t, server.URL, "jar", "jar-c00kie")
	s := &stream{endpoint: c.endpoint, timing: c.endpoint.timing, clientID: "x"}
	_, err := s.dial(t.Context())
	require.ErrorContains(t, err, "session=[redacted] [redacted] clientId=x&token=[redacted]")
	for _, secret := range append(secrets, "jar-c00kie") {
		assert.NotContains(t, err.Error(), secret)
	}
}

func jarOf(t *testing.T, rawURL, name, value string) http.CookieJar {
	t.Helper()
	jar, err := cookiejar.New(nil)
	require.NoError(t, err)
	jar.SetCookies(mustURL(t, rawURL), []*http.Cookie{{Name: name, Value: value}})
	return jar
}

// A cookie that the redirect replaced is not sent beside the new one.
func TestRedirectReplacesCookies(t *testing.T) {
	t.Parallel()
	var saw []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		saw = append(saw, r.Header.Get("Cookie"))
		if r.URL.Path == "/prompt" {
			http.SetCookie(w, &http.Cookie{Name: "sid", Value: "new"})
			http.Redirect(w, r, "/there", http.StatusFound)
			return
		}
		_, _ = io.WriteString(w, `{"exec_info":{"queue_remaining":0}}`)
	}))
	defer server.Close()
	c := clientOf(t, server.URL, noRetry(), WithHeader("Cookie", "own=1"), WithHTTPClient(&http.Client{Jar: jarOf(t, server.URL, "sid", "old")}))
	_, err := c.endpoint.queueRemaining(t.Context())
	require.NoError(t, err)
	assert.Equal(t, []string{"own=1; sid=old", "own=1; sid=new"}, saw)
}

func TestS9LoginPages(t *testing.T) {
	t.Parallel()
	var logins atomic.Int64
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/queue":
			http.Redirect(w, r, "/login?next=/queue", http.StatusFound)
		case "/login":
			logins.Add(1)
		case "/features":
			w.Header().Set("Content-Type", "text/html")
			_, _ = io.WriteString(w, `<html><title>Sign in</title><form><input name=p type="password"></form></html>`)
		case "/models":
			_, _ = io.WriteString(w, "<html><title>Welcome to nginx!</title></html>")
		}
	}, noRetry())
	_, err := c.Queue(t.Context())
	assert.Equal(t, CategoryAuth, CategoryOf(err))
	assert.Zero(t, logins.Load())
	_, err = c.Features(t.Context())
	assert.Equal(t, CategoryAuth, CategoryOf(err))
	require.ErrorContains(t, err, "Sign in")
	_, err = c.Models(t.Context(), "")
	assert.Equal(t, CategoryProtocol, CategoryOf(err))
	require.ErrorContains(t, err, "Welcome to nginx!")
}

// Hosted pods redirect to a URL with the file's name in it, which is no sign of a login page; the page itself is.
func TestS9FilesAreNoLoginPages(t *testing.T) {
	t.Parallel()
	far := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/oauth2/start" {
			w.Header().Set("Content-Type", "text/html")
			_, _ = io.WriteString(w, "<title>Who are you?</title>")
			return
		}
		_, _ = io.WriteString(w, "pixels")
	}))
	defer far.Close()
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		name := r.URL.Query().Get("filename")
		if name == "secret.png" {
			http.Redirect(w, r, far.URL+"/oauth2/start", http.StatusFound)
			return
		}
		http.Redirect(w, r, far.URL+"/bucket/"+url.PathEscape(name)+"?sig=x", http.StatusFound)
	}, noRetry())
	for _, name := range []string{"road_sign_00001_.png", "login.png", "auth (1).webp"} {
		body, err := c.Open(t.Context(), FileRef{Filename: name, Type: "output"})
		require.NoError(t, err, name)
		require.NoError(t, body.Close())
	}
	_, err := c.Open(t.Context(), FileRef{Filename: "secret.png", Type: "output"})
	assert.Equal(t, CategoryAuth, CategoryOf(err))
	require.ErrorContains(t, err, "Who are you?")
	_, err = c.UploadMask(t.Context(), FileRef{Filename: "secret.png"}, "m.png", strings.NewReader("x"))
	assert.Equal(t, CategoryAuth, CategoryOf(err))
}

func TestRedirectsWithinThePod(t *testing.T) {
	t.Parallel()
	a, b := mustURL(t, "http://pod/x"), mustURL(t, "https://pod/x")
	assert.True(t, sameOrigin(a, b), "an upgrade")
	assert.False(t, sameOrigin(b, a), "a downgrade")
	assert.True(t, sameOrigin(a, mustURL(t, "http://POD:80/y")))
	assert.False(t, sameOrigin(a, mustURL(t, "http://pod:8080/")))
	assert.False(t, sameOrigin(a, mustURL(t, "http://pod.example/")))
	assert.Equal(t, "; give the base URL as https", redirectAdvice(a, "https://pod/x"))
	assert.Empty(t, redirectAdvice(a, "/login"))
}

// A GET may have a body, which goes along when it is redirected.
func TestRedirectKeepsTheBody(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/old" {
			http.Redirect(w, r, "/new", http.StatusTemporaryRedirect)
			return
		}
		_, _ = io.Copy(w, r.Body)
	}, noRetry())
	resp, err := c.Do(t.Context(), "GET", "/old", nil, map[string]int{"a": 1})
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	assert.Equal(t, `{"a":1}`, string(text))
}

func mustURL(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	require.NoError(t, err)
	return u
}

// ---------------------------------------------------------------- S43

func TestS43UploadRenamed(t *testing.T) {
	t.Parallel()
	var got *http.Request
	var content []byte
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		got = r
		assert.NoError(t, r.ParseMultipartForm(1<<20))
		f, _, err := r.FormFile("image")
		if assert.NoError(t, err) {
			content, _ = io.ReadAll(f)
		}
		_, _ = io.WriteString(w, `{"name":"a \"b\" (1).png","subfolder":"sub/dir","type":"temp"}`)
	})
	ref, err := c.Upload(t.Context(), `a "b" é.png`, strings.NewReader("content"), UploadSubfolder("sub/dir"), UploadTemp(), UploadOverwrite())
	require.NoError(t, err)
	assert.Equal(t, FileRef{Filename: `a "b" (1).png`, Subfolder: "sub/dir", Type: "temp"}, ref)
	assert.Equal(t, "/upload/image", got.URL.Path)
	assert.Equal(t, "content", string(content))
	assert.Positive(t, got.ContentLength, "a known size is told")
	form := got.MultipartForm
	assert.Equal(t, `a "b" é.png`, form.File["image"][0].Filename)
	assert.Equal(t, "image/png", form.File["image"][0].Header.Get("Content-Type"))
	assert.Equal(t, map[string][]string{"subfolder": {"sub/dir"}, "type": {"temp"}, "overwrite": {"true"}}, form.Value)

	_, err = c.Upload(t.Context(), "plain.bin", io.MultiReader(strings.NewReader("streamed")))
	require.NoError(t, err)
	assert.Equal(t, "streamed", string(content))
	assert.EqualValues(t, -1, got.ContentLength)
	assert.Empty(t, got.MultipartForm.Value)
}

func TestS43UploadTooLarge(t *testing.T) {
	t.Parallel()
	const limit = 2 << 20
	var uploads, features atomic.Int64
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/features" {
			features.Add(1)
			_, _ = fmt.Fprintf(w, `{"max_upload_size": %d.0}`, limit)
			return
		}
		uploads.Add(1)
		if n, _ := io.Copy(io.Discard, io.LimitReader(r.Body, limit+4096)); n <= limit+1024 {
			_, _ = io.WriteString(w, `{"name":"a","subfolder":"","type":"input"}`)
			return
		}
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		_, _ = io.WriteString(w, "Maximum request body size 2097152 exceeded.")
		_, _ = io.Copy(io.Discard, r.Body)
	}, noRetry())
	_, err := c.Upload(t.Context(), "a", strings.NewReader(strings.Repeat("x", limit+1)))
	assert.Equal(t, CategoryTooLarge, CategoryOf(err))
	require.ErrorContains(t, err, "2097153 bytes are over the pod's limit of 2097152")
	assert.Zero(t, uploads.Load(), "told before a byte is sent")

	_, err = c.Upload(t.Context(), "a", strings.NewReader(strings.Repeat("x", limit)))
	require.NoError(t, err)
	_, err = c.Upload(t.Context(), "a", strings.NewReader("small"))
	require.NoError(t, err)
	assert.EqualValues(t, 1, features.Load(), "asked once")

	_, err = c.Upload(t.Context(), "a", io.MultiReader(strings.NewReader(strings.Repeat("x", 2*limit))))
	assert.Equal(t, CategoryTooLarge, CategoryOf(err), "%v", err)
	assert.EqualValues(t, 3, uploads.Load())
}

// A server that has seen enough hangs up, and its 413 is lost.
func TestS43UploadTooLargeWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/features" {
			_, _ = io.WriteString(w, `{"max_upload_size": 1048576}`)
			return
		}
		_, _ = io.CopyN(io.Discard, r.Body, 4<<20)
		reset(t, w)
	}, noRetry())
	_, err := c.Upload(t.Context(), "a", io.MultiReader(strings.NewReader(strings.Repeat("x", 64<<20))))
	assert.Equal(t, CategoryTooLarge, CategoryOf(err), "%v", err)
}

func TestUploadRefusesBadNames(t *testing.T) {
	t.Parallel()
	c := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("nothing is sent") })
	for _, name := range []string{"", ".", "..", "a/b.png", `a\b.png`, "../x", "a\x00b"} {
		_, err := c.Upload(t.Context(), name, strings.NewReader("x"))
		assert.Equal(t, CategoryValidation, CategoryOf(err), "%q", name)
	}
	for _, folder := range []string{"/abs", "../up", "a/../../b", `a\b`} {
		_, err := c.Upload(t.Context(), "a.png", strings.NewReader("x"), UploadSubfolder(folder))
		assert.Equal(t, CategoryValidation, CategoryOf(err), "%q", folder)
	}
	_, err := c.Upload(t.Context(), "a.png", nil)
	assert.Equal(t, CategoryValidation, CategoryOf(err))
	_, err = c.UploadMask(t.Context(), FileRef{}, "a.png", strings.NewReader("x"))
	assert.Equal(t, CategoryValidation, CategoryOf(err))
}

// once is a reader that cannot go back.
type once struct{ io.Reader }

func TestUploadIsRepeatedFromWhereItStood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var tries atomic.Int64
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			n := tries.Add(1)
			if n < 3 {
				_, _ = io.CopyN(io.Discard, r.Body, 10)
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			f, _, err := r.FormFile("image")
			if assert.NoError(t, err) {
				data, _ := io.ReadAll(f)
				assert.Equal(t, "the rest", string(data))
			}
			_, _ = io.WriteString(w, `{"name":"a","subfolder":"","type":"input"}`)
		})
		r := strings.NewReader("the head, the rest")
		_, _ = r.Seek(10, io.SeekStart)
		_, err := c.Upload(t.Context(), "a", r)
		require.NoError(t, err)
		assert.EqualValues(t, 3, tries.Load())

		tries.Store(0)
		_, err = c.Upload(t.Context(), "a", once{strings.NewReader("gone")})
		assert.Equal(t, CategoryUnavailable, CategoryOf(err))
		assert.EqualValues(t, 1, tries.Load(), "a reader that is used up is not sent again")
	})
}

// A big file over a slow line takes longer than Timing.Request; only silence ends it.
func TestUploadLastsAsLongAsItMoves(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		defer close(stop)
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			_, _ = io.WriteString(w, `{"name":"a","subfolder":"","type":"input"}`)
		}, noRetry())
		start := time.Now()
		_, err := c.Upload(t.Context(), "a", &drip{n: 20, every: 50 * time.Second})
		require.NoError(t, err)
		assert.Equal(t, 1000*time.Second, time.Since(start))

		_, err = c.Upload(t.Context(), "a", &drip{n: 2, every: 61 * time.Second})
		assert.Equal(t, CategoryTimeout, CategoryOf(err), "%v", err)
	})
}

// drip is a slow reader.
type drip struct {
	n     int
	every time.Duration
}

func (d *drip) Read(p []byte) (int, error) {
	if d.n == 0 {
		return 0, io.EOF
	}
	d.n--
	time.Sleep(d.every)
	return copy(p, "drop"), nil
}

// A reader that hangs holds nobody: Upload gives up, though it cannot end the Read.
func TestUploadOfAReaderThatHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, _ := servePipes(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }, noRetry())
		r, w := io.Pipe()
		start := time.Now()
		_, err := c.Upload(t.Context(), "a.png", r)
		assert.Equal(t, CategoryTimeout, CategoryOf(err), "%v", err)
		assert.LessOrEqual(t, time.Since(start), 2*c.endpoint.timing.Request)

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start = time.Now()
		_, err = c.Upload(ctx, "a.png", r)
		assert.Equal(t, CategoryContext, CategoryOf(err), "%v", err)
		_, err = c.Do(ctx, http.MethodPost, "/userdata/x", nil, r) //nolint:bodyclose // there is none
		assert.Equal(t, CategoryContext, CategoryOf(err), "%v", err)
		assert.Equal(t, time.Second, time.Since(start))
		require.NoError(t, w.Close())
	})
}

func TestUploadOfABrokenReader(t *testing.T) {
	t.Parallel()
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	broken := errors.New("the disk is gone")
	_, err := c.Upload(t.Context(), "a", io.MultiReader(strings.NewReader("half"), &failingReader{broken}))
	require.ErrorIs(t, err, broken)
	assert.Equal(t, CategoryValidation, CategoryOf(err))
}

type failingReader struct{ err error }

func (r *failingReader) Read([]byte) (int, error) { return 0, r.err }

func TestUploadMask(t *testing.T) {
	t.Parallel()
	var form map[string][]string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/view" {
			if r.URL.Query().Get("filename") != "there.png" {
				w.WriteHeader(http.StatusNotFound)
			}
			return
		}
		assert.Equal(t, "/upload/mask", r.URL.Path)
		assert.NoError(t, r.ParseMultipartForm(1<<20))
		form = r.MultipartForm.Value
		_, _ = io.WriteString(w, `{"name":"m.png","subfolder":"clipspace","type":"input"}`)
	})
	ref, err := c.UploadMask(t.Context(), FileRef{Filename: "there.png", Type: "input"}, "m.png", strings.NewReader("x"), UploadSubfolder("clipspace"))
	require.NoError(t, err)
	assert.Equal(t, FileRef{"m.png", "clipspace", "input"}, ref)
	assert.JSONEq(t, `{"filename":"there.png","subfolder":"","type":"input"}`, form["original_ref"][0])

	form = nil
	_, err = c.UploadMask(t.Context(), FileRef{Filename: "nope.png"}, "m.png", strings.NewReader("x"))
	assert.Equal(t, CategoryNotFound, CategoryOf(err), "the pod would say 200 and save nothing")
	assert.Nil(t, form)

	c = serve(t, func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, "a.png", r.URL.Query().Get("filename"), "/view looks at the last part of a name only")
		w.WriteHeader(map[string]int{"..": http.StatusForbidden, "sub": http.StatusNotFound}[r.URL.Query().Get("subfolder")])
	})
	_, err = c.UploadMask(t.Context(), FileRef{Filename: "a.png", Subfolder: ".."}, "m.png", strings.NewReader("x"))
	assert.Equal(t, CategoryValidation, CategoryOf(err), "it is not about credentials")
	_, err = c.UploadMask(t.Context(), FileRef{Filename: "sub/a.png"}, "m.png", strings.NewReader("x"))
	assert.Equal(t, CategoryNotFound, CategoryOf(err))
	var failed *Error
	require.ErrorAs(t, err, &failed)
	assert.Equal(t, "upload mask", failed.Op)
}

// ---------------------------------------------------------------- S44

func TestS44HostileBodies(t *testing.T) {
	t.Parallel()
	var member bytes.Buffer // 8 MiB in 8 KiB; a gzip stream may hold any number of them
	z := gzip.NewWriter(&member)
	_, err := z.Write(make([]byte, 8<<20))
	require.NoError(t, err)
	require.NoError(t, z.Close())
	bomb := func(w http.ResponseWriter, served *atomic.Int64) {
		w.Header().Set("Content-Encoding", "gzip")
		for range 1 << 17 { // 1 TiB
			if _, err := w.Write(member.Bytes()); err != nil {
				return
			}
			served.Add(1)
		}
	}
	deep := strings.Repeat("[", 1_000_000)
	for name, answer := range map[string]func(http.ResponseWriter, *atomic.Int64){
		"1 TB": func(w http.ResponseWriter, _ *atomic.Int64) {
			w.Header().Set("Content-Length", "1000000000000")
			_, _ = io.WriteString(w, "{")
		},
		"gzip bomb": bomb,
		"gzip bomb in a 502": func(w http.ResponseWriter, n *atomic.Int64) {
			w.Header().Set("Content-Encoding", "gzip")
			w.WriteHeader(502)
			bomb(w, n)
		},
		"endless": func(w http.ResponseWriter, served *atomic.Int64) {
			page := make([]byte, 1<<20)
			for {
				if _, err := w.Write(page); err != nil {
					return
				}
				served.Add(1)
			}
		},
		"endless 500": func(w http.ResponseWriter, served *atomic.Int64) {
			w.WriteHeader(500)
			page := make([]byte, 1<<20)
			for {
				if _, err := w.Write(page); err != nil {
					return
				}
				served.Add(1)
			}
		},
		"deep lists": func(w http.ResponseWriter, _ *atomic.Int64) { _, _ = io.WriteString(w, deep) },
		"deep objects": func(w http.ResponseWriter, _ *atomic.Int64) {
			_, _ = io.WriteString(w, strings.Repeat(`{"a":`, 500_000))
		},
		"deep 400": func(w http.ResponseWriter, _ *atomic.Int64) {
			w.WriteHeader(400)
			_, _ = io.WriteString(w, `{"error":`+deep)
		},
		"a huge header": func(w http.ResponseWriter, _ *atomic.Int64) {
			w.Header().Set("X-Large", strings.Repeat("x", 2<<20))
			w.WriteHeader(200)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var served atomic.Int64
			c := serve(t, func(w http.ResponseWriter, _ *http.Request) { answer(w, &served) }, noRetry())
			for call, err := range map[string]error{
				"small":    second(c.endpoint.queueRemaining(t.Context())),
				"features": second(c.Features(t.Context())),
				"stats":    second(c.SystemStats(t.Context())),
				"refusal":  c.endpoint.interrupt(t.Context(), "x", nil),
			} {
				if call == "refusal" && name != "1 TB" && !strings.Contains(name, "00") && !strings.Contains(name, "bomb") && name != "endless" && name != "a huge header" {
					assert.NoError(t, err, "what an interrupt answers is not read")
					continue
				}
				var e *Error
				require.ErrorAs(t, err, &e, call)
				assert.Less(t, len(err.Error()), 1000)
			}
			assert.Less(t, served.Load(), int64(1<<13), "what fills the sockets' buffers, and no more")
		})
	}
}

func TestS44HostileQueue(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"deep":    `{"queue_running":` + strings.Repeat("[", 1_000_000),
		"half":    `{"queue_running":[],"queue_pending":[`,
		"no list": `{"queue_running":{},"queue_pending":[]}`,
		"one":     `{"queue_running":[]}`,
		"short":   `{"queue_running":[[1,"a"]],"queue_pending":[]}`,
	} {
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) }, noRetry())
		_, _, _, err := c.endpoint.queue(t.Context(), true)
		assert.Equal(t, CategoryProtocol, CategoryOf(err), name)
		_, _, _, err = c.endpoint.queue(t.Context(), false)
		assert.Equal(t, CategoryProtocol, CategoryOf(err), name)
	}
}

func TestS44EndlessRedirects(t *testing.T) {
	t.Parallel()
	var hops atomic.Int64
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		hops.Add(1)
		http.Redirect(w, r, r.URL.Path+"/x", http.StatusFound)
	}, noRetry())
	_, err := c.Queue(t.Context())
	assert.Equal(t, CategoryProtocol, CategoryOf(err))
	assert.EqualValues(t, maxHops+1, hops.Load())
}

func TestS44SlowHeaders(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		stop := make(chan struct{})
		go func() { // a pod that sends a byte of its headers every 20 seconds
			for {
				conn, err := p.Accept()
				if err != nil {
					return
				}
				go func() {
					defer func() { _ = conn.Close() }()
					if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil { // an answer before the request is no answer
						return
					}
					_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nX: ")
					for {
						select {
						case <-stop:
							return
						case <-time.After(20 * time.Second):
						}
						if _, err := io.WriteString(conn, "x"); err != nil {
							return
						}
					}
				}()
			}
		}()
		defer func() { close(stop); _ = p.Close() }()
		transport := &http.Transport{DialContext: p.DialContext}
		defer transport.CloseIdleConnections()
		c := clientOf(t, "http://pod", noRetry(), WithHTTPClient(&http.Client{Transport: transport}))
		start := time.Now()
		_, err := c.Queue(t.Context())
		assert.Equal(t, CategoryTimeout, CategoryOf(err))
		assert.Equal(t, time.Minute, time.Since(start))
	})
}

// ---------------------------------------------------------------- the other routes

func TestRetriesOfSafeCalls(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			if asked.Add(1) < 3 {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			_, _ = io.WriteString(w, `{"queue_running":[],"queue_pending":[]}`)
		})
		q, err := c.Queue(t.Context())
		require.NoError(t, err)
		assert.Empty(t, q.Running)
		assert.EqualValues(t, 3, asked.Load())
		assert.EqualValues(t, 2, c.endpoint.counters.retries.Load())
		assert.EqualValues(t, 3, c.endpoint.counters.calls.Load())
		assert.EqualValues(t, 2, c.endpoint.counters.callErrors.Load())

		asked.Store(0)
		err = c.ClearQueue(t.Context())
		assert.Equal(t, CategoryUnavailable, CategoryOf(err))
		assert.EqualValues(t, 1, asked.Load(), "it may have been done; others may have queued since")

		asked.Store(0)
		resp, err := c.Do(t.Context(), "post", "/custom", nil, map[string]int{"a": 1}) //nolint:bodyclose // there is none
		assert.Nil(t, resp)
		assert.Equal(t, CategoryUnavailable, CategoryOf(err))
		assert.EqualValues(t, 1, asked.Load())
	})
}

func TestCallsThatNeverLeftAreRepeated(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		_ = p.Close()
		transport := &http.Transport{DialContext: p.DialContext}
		c := clientOf(t, "http://pod", WithHTTPClient(&http.Client{Transport: transport}))
		err := c.ClearQueue(t.Context())
		assert.Equal(t, CategoryNetwork, CategoryOf(err))
		assert.True(t, neverSent(err))
		assert.EqualValues(t, 6, p.dials.Load())
		_, err = c.Do(t.Context(), http.MethodPost, "/x", nil, once{strings.NewReader("x")}) //nolint:bodyclose // there is none
		assert.Equal(t, CategoryNetwork, CategoryOf(err))
		assert.EqualValues(t, 12, p.dials.Load(), "of a reader nothing was taken, so it can be sent again")
	})
}

func TestDo(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path == "/pre/none" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		_, _ = fmt.Fprintf(w, "%s %s %s %s", r.Method, r.URL, r.Header.Get("Content-Type"), body)
	}, func(o *options) { o.base.Path, o.query = "/pre", url.Values{"t": {"1"}} })
	do := func(method, path string, query url.Values, body any) string {
		t.Helper()
		resp, err := c.Do(t.Context(), method, path, query, body)
		require.NoError(t, err)
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return string(text)
	}
	assert.Equal(t, "GET /pre/x?t=1  ", do("", "/x", nil, nil))
	assert.Equal(t, "GET /pre/x?a=1&a=2&t=1  ", do("get", "/x?a=1", url.Values{"a": {"2"}}, nil))
	assert.Equal(t, `POST /pre/x?t=1 application/json {"a":1}`, do("POST", "/x", nil, map[string]int{"a": 1}))
	assert.Equal(t, `PUT /pre/x?t=1 application/json raw`, do("PUT", "/x", nil, []byte("raw")))
	assert.Equal(t, `PUT /pre/x?t=1 application/json raw`, do("PUT", "/x", nil, "raw"))
	assert.Equal(t, `PUT /pre/x?t=1 application/json {}`, do("PUT", "/x", nil, json.RawMessage("{}")))
	assert.Equal(t, `PUT /pre/x?t=1 application/octet-stream bytes`, do("PUT", "/x", nil, strings.NewReader("bytes")))
	assert.Equal(t, `POST /pre/a%20b?t=1 application/json `, do("POST", "/a%20b", nil, ""))

	_, err := c.Do(t.Context(), "GET", "/none?secret=1", nil, nil) //nolint:bodyclose // there is none
	assert.Equal(t, CategoryNotFound, CategoryOf(err))
	assert.NotContains(t, err.Error(), "secret")
	for _, path := range []string{"", "x", "http://other/x", "//other/x", "/%zz"} {
		_, err = c.Do(t.Context(), "GET", path, nil, nil) //nolint:bodyclose // there is none
		assert.Equal(t, CategoryValidation, CategoryOf(err), path)
	}
	require.ErrorContains(t, err, `invalid URL escape "%zz"`)
	_, err = c.Do(t.Context(), "POST", "/x", nil, func() {}) //nolint:bodyclose // there is none
	assert.Equal(t, CategoryValidation, CategoryOf(err))
	_, err = c.Do(t.Context(), "BAD METHOD", "/x", nil, nil) //nolint:bodyclose // there is none
	assert.Equal(t, CategoryValidation, CategoryOf(err))
}

// A body that Do returned outlives the call, not the client.
func TestDoBodyOutlivesTheCall(t *testing.T) {
	t.Parallel()
	more := make(chan struct{})
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "a")
		_ = http.NewResponseController(w).Flush()
		<-more
		_, _ = io.WriteString(w, "b")
		_ = http.NewResponseController(w).Flush()
		<-more
	})
	defer close(more)
	resp, err := c.Do(t.Context(), "GET", "/x", nil, nil)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	two := make([]byte, 2)
	more <- struct{}{}
	_, err = io.ReadFull(resp.Body, two)
	require.NoError(t, err)
	c.endpoint.close()
	_, err = resp.Body.Read(two)
	require.ErrorIs(t, err, ErrClosed)
}

func TestHeaders(t *testing.T) {
	t.Parallel()
	var got http.Header
	var host string
	handler := func(w http.ResponseWriter, r *http.Request) {
		got, host = r.Header, r.Host
		_, _ = io.WriteString(w, `{"exec_info":{"queue_remaining":2}}`)
	}
	c := serve(t, handler, WithHeader("X-A", "1"), WithHeader("Host", "inner.example"), WithBearerToken("tok"),
		WithHeaderFunc(func(context.Context) (http.Header, error) { return http.Header{"x-b": {"2"}}, nil }),
		func(o *options) { o.userinfo = url.UserPassword("u", "p") })
	n, err := c.endpoint.queueRemaining(t.Context())
	require.NoError(t, err)
	assert.Equal(t, 2, n)
	assert.Equal(t, "1", got.Get("X-A"))
	assert.Equal(t, "2", got.Get("X-B"))
	assert.Equal(t, "inner.example", host)
	assert.Equal(t, "Bearer tok", got.Get("Authorization"), "a header that is given wins over userinfo")
	assert.True(t, strings.HasPrefix(got.Get("User-Agent"), "comfyui-go/"), got.Get("User-Agent"))
	assert.Empty(t, got.Get("Origin"), "an Origin would be a 403")

	c = serve(t, handler, func(o *options) { o.userinfo = url.UserPassword("u", "p") })
	_, err = c.endpoint.queueRemaining(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "Basic dTpw", got.Get("Authorization"))

	broken := errors.New("no token today")
	c = serve(t, func(http.ResponseWriter, *http.Request) { t.Error("sent without its header") },
		WithHeaderFunc(func(context.Context) (http.Header, error) { return nil, broken }))
	_, outcome, err := c.endpoint.postPrompt(t.Context(), []byte("{}"), nil)
	assert.Equal(t, postUnsent, outcome)
	assert.Equal(t, CategoryAuth, CategoryOf(err))
	require.ErrorIs(t, err, broken)
}

// Headers that were copied from elsewhere do not change what the package itself says of its requests.
func TestHeadersOfTheMessageAreTheLibrarys(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/upload/image":
			_, header, err := r.FormFile("image")
			if assert.NoError(t, err) {
				_, _ = fmt.Fprintf(w, `{"name":%q}`, header.Filename)
			}
		case "/queue":
			assert.Equal(t, "gzip", r.Header.Get("Accept-Encoding"), "what the transport can read")
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			_, _ = io.WriteString(z, `{"queue_running":[],"queue_pending":[]}`)
			_ = z.Close()
		case "/view":
			assert.Equal(t, "identity", r.Header.Get("Accept-Encoding"))
			assert.Empty(t, r.Header.Get("Range"))
			_, _ = io.WriteString(w, "pixels")
		case "/custom":
			assert.Equal(t, "application/json", r.Header.Get("Content-Type"))
		}
	}, noRetry(), WithHeader("Content-Type", "text/plain"), WithHeader("Accept-Encoding", "gzip, deflate, br"), WithHeader("Accept", "text/html"))
	ref, err := c.Upload(t.Context(), "a.png", strings.NewReader("x"))
	require.NoError(t, err)
	assert.Equal(t, "a.png", ref.Filename)
	_, err = c.Queue(t.Context())
	require.NoError(t, err)
	body, err := c.Open(t.Context(), FileRef{Filename: "a.png"})
	require.NoError(t, err)
	require.NoError(t, body.Close())
	resp, err := c.Do(t.Context(), http.MethodPost, "/custom", nil, map[string]int{"a": 1})
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
}

// A handshake that was copied from a browser would keep the stream down for ever.
func TestHeadersOfTheHandshakeAreTheLibrarys(t *testing.T) {
	t.Parallel()
	pod := comfyuitest.Start(t)
	c := clientOf(t, pod.URL(), WithHeader("Connection", "keep-alive"), WithHeader("Upgrade", "h2c"), WithHeader("Sec-WebSocket-Key", "x"),
		WithHeader("Sec-WebSocket-Version", "8"), WithHeader("Sec-WebSocket-Extensions", "permessage-deflate"))
	s := &stream{endpoint: c.endpoint, timing: c.endpoint.timing, clientID: "x"}
	conn, err := s.dial(t.Context())
	require.NoError(t, err)
	require.NoError(t, conn.Close())
}

// What net/http takes for a failure of the network, time and again.
func TestHeadersThatCannotBeSent(t *testing.T) {
	t.Parallel()
	c := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("sent") },
		WithHeaderFunc(func(context.Context) (http.Header, error) {
			return http.Header{"Authorization": {"Bearer s3cret-token\n"}}, nil
		}))
	_, err := c.Queue(t.Context())
	require.ErrorContains(t, err, "the header function failed: the value of the header Authorization has a line feed")
	assert.Equal(t, CategoryAuth, CategoryOf(err))
	assert.NotContains(t, err.Error(), "s3cret")
}

// Each of these would fail or hang at the first call, and far from its cause.
func TestNewPodClientSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	var memory *MemoryStore
	var redisStore *RedisStore
	for _, c := range []struct {
		url  string
		opt  Option
		says string
	}{
		{"", nil, "base URL is empty"},
		{"http://", nil, "names no host"},
		{"ftp://pod", nil, `scheme "ftp"; use http or https`},
		{"http://u:s3cret%zz@pod", nil, "cannot be parsed"},
		{"pod:65536", nil, "the port 65536"},
		{"pod?token=%zz", nil, "the query of"},
		{"pod", WithPodName(""), "WithPodName: "},
		{"pod", WithClientID(""), "WithClientID: "},
		{"pod", WithPodName("gpu\xff"), `WithPodName: "gpu\xff" is not UTF-8`},
		{"pod", WithClientID("slot\xff"), `WithClientID: "slot\xff" is not UTF-8`},
		{"pod", WithMaxInFlight(-1), "WithMaxInFlight: -1"},
		{"pod", WithTiming(Timing{Lease: -1}), "WithTiming: Lease cannot be switched off"},
		{"pod", WithTiming(Timing{ReconnectMin: time.Minute}), "WithTiming: ReconnectMax 30s is below"},
		{"pod", WithRetry(CategoryNetwork, RetryPolicy{Multiplier: math.NaN()}), `the retry policy for "network"`},
		{"pod", WithStore(memory), "WithStore: the *comfyui.MemoryStore is nil"},
		{"pod", WithStore(redisStore), "WithStore: the *comfyui.RedisStore is nil"},
		{"pod", WithHeader("", "x"), "WithHeader: the header name"},
		{"pod", WithHeader("X Key", "x"), "WithHeader: the header name"},
		{"pod", WithHeader("X-Key:", "x"), "WithHeader: the header name"},
		{"pod", WithHeader("X-Clé", "x"), "WithHeader: the header name"},
		{"pod", WithBearerToken("s3cret\n"), "WithHeader: the value of the header Authorization has a line feed"},
	} {
		_, err := NewPodClient(c.url, c.opt)
		require.ErrorContains(t, err, c.says)
		assert.NotContains(t, err.Error(), "s3cret")
		var e *Error
		require.ErrorAs(t, err, &e)
		assert.Equal(t, CategoryValidation, e.Category, "%v", err)
	}
	_, err := NewPodClient(" ws://[::1]:8188/prefix/?token=x ", nil, WithStore(nil), WithHTTPClient(nil), WithDialer(nil), WithHeaderFunc(nil),
		WithLogger(nil), WithJobDefaults(nil), WithHeader("X-Name", "Zoë\tB"))
	require.NoError(t, err)
}

func TestHeaderFuncIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := clientOf(t, "http://pod", noRetry(), WithHeaderFunc(func(ctx context.Context) (http.Header, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}))
		start := time.Now()
		_, err := c.Queue(t.Context())
		assert.Equal(t, CategoryTimeout, CategoryOf(err))
		assert.Equal(t, time.Minute, time.Since(start))
	})
}

func TestHTTPClientIsCopied(t *testing.T) {
	t.Parallel()
	jar, err := cookiejar.New(nil)
	require.NoError(t, err)
	given := &http.Client{Timeout: time.Nanosecond, Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("mine") }}
	var cookies []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		cookies = append(cookies, r.Header.Get("Cookie"))
		http.SetCookie(w, &http.Cookie{Name: "sticky", Value: "1"})
		_, _ = io.WriteString(w, `{"exec_info":{"queue_remaining":0}}`)
	}, WithHTTPClient(given))
	for range 2 {
		_, err = c.endpoint.queueRemaining(t.Context())
		require.NoError(t, err, "Timeout is not applied")
	}
	assert.Equal(t, []string{"", "sticky=1"}, cookies, "Jar is")
	assert.Equal(t, time.Nanosecond, given.Timeout, "the caller's own is as it was")
	assert.Same(t, jar, c.endpoint.dialer().Jar)
}

func TestDialer(t *testing.T) {
	t.Parallel()
	dialed := errors.New("dialed")
	transport := &http.Transport{
		Proxy:           func(*http.Request) (*url.URL, error) { return nil, nil },
		DialContext:     func(context.Context, string, string) (net.Conn, error) { return nil, dialed },
		TLSClientConfig: &tls.Config{ServerName: "pod", NextProtos: []string{"h2", "http/1.1"}, MinVersion: tls.VersionTLS13},
	}
	d := clientOf(t, "http://pod", WithHTTPClient(&http.Client{Transport: transport})).endpoint.dialer()
	_, err := d.NetDialContext(t.Context(), "tcp", "x")
	require.ErrorIs(t, err, dialed)
	assert.Equal(t, "pod", d.TLSClientConfig.ServerName)
	assert.Empty(t, d.TLSClientConfig.NextProtos, "a WebSocket over HTTP/2 would fail")
	assert.Len(t, transport.TLSClientConfig.NextProtos, 2)
	assert.Equal(t, 10*time.Second, d.HandshakeTimeout)
	assert.NotNil(t, d.Proxy)

	given := &websocket.Dialer{EnableCompression: true, HandshakeTimeout: time.Second}
	d = clientOf(t, "http://pod", WithDialer(given)).endpoint.dialer()
	assert.False(t, d.EnableCompression)
	assert.Equal(t, time.Second, d.HandshakeTimeout)
	assert.True(t, given.EnableCompression)

	d = clientOf(t, "http://pod", WithTiming(Timing{Connect: 3 * time.Second})).endpoint.dialer()
	assert.NotNil(t, d.NetDialContext)
	assert.Equal(t, 3*time.Second, d.HandshakeTimeout)
}

// The first dial and the first request of a client happen at the same moment, and the transport sets itself up in it.
func TestDialerBesideTheFirstRequest(t *testing.T) {
	t.Parallel()
	for range 20 {
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"exec_info":{"queue_remaining":0}}`)
		})
		var wg sync.WaitGroup
		wg.Go(func() { assert.Nil(t, c.endpoint.dialer().Jar) })
		wg.Go(func() {
			_, err := c.endpoint.queueRemaining(t.Context())
			assert.NoError(t, err)
		})
		wg.Wait()
	}
}

func TestJobRoutes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		mode := "new"
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			switch mode {
			case "old":
				if r.Method == http.MethodPost {
					w.WriteHeader(http.StatusMethodNotAllowed)
					_, _ = io.WriteString(w, "405: Method Not Allowed")
					return
				}
				w.Header().Set("Content-Type", "application/octet-stream")
				w.WriteHeader(http.StatusNotFound)
			case "proxy":
				w.Header().Set("Content-Type", "text/html")
				w.WriteHeader(http.StatusNotFound)
				_, _ = io.WriteString(w, "<title>404</title>")
			default:
				switch r.URL.Path {
				case "/api/jobs/known":
					_, _ = io.WriteString(w, `{"id":"known","status":"pending","priority":3,"create_time":1,"outputs_count":0}`)
				case "/api/jobs/known/cancel":
					_, _ = io.WriteString(w, `{"cancelled":true}`)
				case "/api/jobs/other/cancel":
					_, _ = io.WriteString(w, `{"cancelled":false}`)
				default:
					w.WriteHeader(http.StatusNotFound)
					_, _ = io.WriteString(w, `{"error":"Job not found"}`)
				}
			}
		})
		e, ctx := c.endpoint, t.Context()
		job, supported, err := e.apiJob(ctx, "known")
		require.NoError(t, err)
		assert.True(t, supported)
		assert.Equal(t, "pending", job.Status)
		job, supported, err = e.apiJob(ctx, "unknown")
		require.NoError(t, err)
		assert.True(t, supported)
		assert.Nil(t, job)
		supported, cancelled, err := e.cancelJob(ctx, "known", nil)
		require.NoError(t, err)
		assert.True(t, supported && cancelled)
		supported, cancelled, err = e.cancelJob(ctx, "other", nil)
		require.NoError(t, err)
		assert.True(t, supported)
		assert.False(t, cancelled)
		before := asked.Load()
		_, _, err = e.cancelJob(ctx, "known", func() error { return ErrFenced })
		require.ErrorIs(t, err, ErrFenced)
		assert.True(t, neverSent(err))
		assert.LessOrEqual(t, asked.Load(), before+1)

		mode = "old"
		for range 3 {
			before = asked.Load()
			_, supported, err = e.apiJob(ctx, "known")
			require.NoError(t, err)
			assert.False(t, supported)
			supported, _, err = e.cancelJob(ctx, "known", nil)
			require.NoError(t, err)
			assert.False(t, supported)
		}
		assert.Equal(t, before, asked.Load(), "remembered for a while")
		time.Sleep(absentFor + time.Second)
		mode = "new"
		_, supported, err = e.apiJob(ctx, "known")
		require.NoError(t, err)
		assert.True(t, supported, "but not for ever")

		mode = "proxy"
		_, _, err = e.apiJob(ctx, "known")
		assert.Equal(t, CategoryUnavailable, CategoryOf(err), "a page says nothing of the pod")
		_, _, err = e.cancelJob(ctx, "known", nil)
		assert.Equal(t, CategoryUnavailable, CategoryOf(err))
	})
}

func TestVersionIsRemembered(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, `{"system":{"comfyui_version":"0.3.%d","argv":["main.py"],"ram_total":5,"os":"linux"},"devices":[{"name":"cpu","type":"cpu","index":null,"vram_total":7,"vram_free":3}]}`, 56+asked.Add(1))
	})
	for range 2 {
		v, err := c.endpoint.version(t.Context())
		require.NoError(t, err)
		assert.Equal(t, "0.3.57", v)
	}
	c.endpoint.forgetVersion()
	v, err := c.endpoint.version(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "0.3.58", v)

	stats, err := c.SystemStats(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "0.3.59", stats.Version)
	assert.Equal(t, []string{"main.py"}, stats.Args)
	assert.Equal(t, []Device{{Name: "cpu", Type: "cpu", VRAMTotal: 7, VRAMFree: 3}}, stats.Devices)
	v, err = c.endpoint.version(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "0.3.59", v)
}

func TestAtLeast(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]bool{
		"0.3.57": true, "0.3.58": true, "0.4": true, "v0.26.0-rc1": true, "1": true, "0.3.57-dev": true,
		"0.3.56": false, "0.3": false, "0.2.99": false, "": false, "unknown": false, "v": false,
	} {
		assert.Equal(t, want, atLeast(version, 0, 3, 57), version)
	}
}

func TestInterruptHitsNoOtherJob(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, version, queue string
		interrupts           int64
		category             Category
	}{
		{"targeted", "0.3.57", `[[1,"other",{},{},[]]],"queue_pending":[[2,"mine",{},{},[]]]`, 1, ""},
		{"bare, it runs alone", "0.3.56", `[[1,"mine",{},{},[]]],"queue_pending":[]`, 1, ""},
		{"bare, something waits", "0.3.56", `[[1,"mine",{},{},[]]],"queue_pending":[[2,"x",{},{},[]]]`, 0, CategoryConflict},
		{"bare, another runs", "0.3.56", `[[1,"x",{},{},[]]],"queue_pending":[]`, 0, ""},
		{"bare, nothing runs", "", `[],"queue_pending":[]`, 0, ""},
		{"the GPU is gone, it runs alone", "fault", `[[1,"mine",{},{},[]]],"queue_pending":[]`, 1, ""},
		{"the GPU is gone, something waits", "fault", `[[1,"mine",{},{},[]]],"queue_pending":[[2,"x",{},{},[]]]`, 0, CategoryConflict},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var interrupts atomic.Int64
			c := serve(t, func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/system_stats":
					if test.version == "fault" {
						w.WriteHeader(http.StatusInternalServerError)
						return
					}
					_, _ = fmt.Fprintf(w, `{"system":{"comfyui_version":%q},"devices":[]}`, test.version)
				case "/queue":
					_, _ = fmt.Fprintf(w, `{"queue_running":%s}`, test.queue)
				case "/interrupt":
					interrupts.Add(1)
					body, _ := io.ReadAll(r.Body)
					assert.JSONEq(t, `{"prompt_id":"mine"}`, string(body))
				}
			})
			err := c.Interrupt(t.Context(), "mine")
			assert.Equal(t, test.category, CategoryOf(err))
			assert.Equal(t, test.interrupts, interrupts.Load())
		})
	}
	c := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("a bare interrupt by mistake") })
	assert.Equal(t, CategoryValidation, CategoryOf(c.Interrupt(t.Context(), "")))
}

// The public reads, against what real servers answered.
func TestRecordedAnswers(t *testing.T) {
	t.Parallel()
	seen := map[string]int{}
	for _, file := range []string{"info-routes.jsonl", "success-several-outputs.jsonl", "queue-listing.jsonl", "nan.jsonl", "body-too-large.jsonl", "text-output.jsonl"} {
		recorded(t, file, func(version, _ string, l recordedLine) {
			if l.Kind != "http" || l.Method != http.MethodGet || l.Status != http.StatusOK {
				return
			}
			c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", l.Headers["Content-Type"])
				_, _ = w.Write(l.bytes())
			})
			ctx := t.Context()
			switch {
			case l.Path == "/system_stats":
				stats, err := c.SystemStats(ctx)
				require.NoError(t, err)
				assert.Equal(t, version, stats.Version)
				assert.NotEmpty(t, stats.Devices)
				assert.Positive(t, stats.RAMTotal)
				assert.NotEmpty(t, stats.Args)
				assert.True(t, json.Valid(stats.Raw))
				seen["stats"]++
			case l.Path == "/features":
				features, err := c.Features(ctx)
				require.NoError(t, err)
				assert.Contains(t, features, "max_upload_size")
				limit := c.endpoint.uploadLimit(ctx)
				assert.True(t, limit == 1<<20 || limit == 100<<20, limit)
				seen["features"]++
			case l.Path == "/object_info/EmptyImage":
				info, err := c.ObjectInfo(ctx, "EmptyImage")
				require.NoError(t, err)
				assert.Contains(t, string(info["EmptyImage"]), "batch_size")
				seen["info"]++
			case l.Path == "/models":
				names, err := c.Models(ctx, "")
				require.NoError(t, err)
				assert.Contains(t, names, "checkpoints")
				seen["models"]++
			case l.Path == "/queue":
				q, err := c.Queue(ctx)
				require.NoError(t, err)
				for _, it := range append(q.Running, q.Pending...) {
					assert.NotEmpty(t, it.PromptID)
					assert.True(t, json.Valid(it.Workflow))
					assert.True(t, json.Valid(it.ExtraData))
					assert.NotEmpty(t, it.Targets)
					seen["queued"]++
				}
			case strings.HasPrefix(l.Path, "/history/"):
				id := strings.TrimPrefix(l.Path, "/history/")
				h, err := c.History(ctx, id)
				if string(l.bytes()) == "{}" {
					assert.Equal(t, CategoryNotFound, CategoryOf(err))
					return
				}
				require.NoError(t, err, l.Path)
				assert.Equal(t, id, h.PromptID)
				assert.Equal(t, "success", h.Status)
				assert.True(t, h.Completed)
				assert.NotEmpty(t, h.Messages)
				assert.True(t, json.Valid(h.Workflow))
				for _, o := range h.Outputs {
					assert.NotEmpty(t, o.Node)
					assert.Same(t, c, o.pod)
					if o.File != nil {
						seen["files"]++
					}
				}
				seen["history"]++
			}
		})
	}
	for _, what := range []string{"stats", "features", "info", "models", "queued", "history", "files"} {
		assert.Positive(t, seen[what], what)
	}
}

func TestHistoryOfAnUnknownPrompt(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") })
	_, err := c.History(t.Context(), "a/b")
	var e *Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, CategoryNotFound, e.Category)
	assert.Equal(t, "a/b", e.PromptID)
	entry, err := c.endpoint.history(t.Context(), "x")
	require.NoError(t, err)
	assert.Nil(t, entry)
	_, err = c.History(t.Context(), "")
	assert.Equal(t, CategoryValidation, CategoryOf(err))

	c = serve(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }, noRetry())
	_, err = c.endpoint.history(t.Context(), "x")
	assert.Equal(t, CategoryUnavailable, CategoryOf(err), "a 404 of something in front is not an absent prompt")
}

func TestPostsOfTheQueue(t *testing.T) {
	t.Parallel()
	var posts []string
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		posts = append(posts, r.URL.Path+" "+string(body))
	})
	require.NoError(t, c.DeleteQueued(t.Context(), "a", "b"))
	require.NoError(t, c.DeleteQueued(t.Context()))
	require.NoError(t, c.ClearQueue(t.Context()))
	require.NoError(t, c.FreeMemory(t.Context(), true, false))
	require.NoError(t, c.endpoint.interrupt(t.Context(), "", nil))
	assert.Equal(t, []string{
		`/queue {"delete":["a","b"]}`, `/queue {"clear":true}`, `/free {"free_memory":false,"unload_models":true}`, `/interrupt {}`,
	}, posts)
	require.ErrorIs(t, c.endpoint.interrupt(t.Context(), "x", func() error { return ErrFenced }), ErrFenced)
	require.ErrorIs(t, c.endpoint.deleteQueued(t.Context(), func() error { return ErrFenced }, "x"), ErrFenced)
	assert.Len(t, posts, 4)
}

func TestObjectInfoOfSomeClasses(t *testing.T) {
	t.Parallel()
	var paths []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		paths = append(paths, r.URL.EscapedPath())
		switch r.URL.Path {
		case "/object_info/A b":
			_, _ = io.WriteString(w, `{"A b":{"default":NaN}}`)
		case "/object_info":
			_, _ = io.WriteString(w, `{"X":{},"Y":{}}`)
		default:
			_, _ = io.WriteString(w, `{}`)
		}
	})
	some, err := c.ObjectInfo(t.Context(), "A b", "Unknown")
	require.NoError(t, err)
	assert.Equal(t, map[string]json.RawMessage{"A b": json.RawMessage(`{"default":null}`)}, some)
	all, err := c.ObjectInfo(t.Context())
	require.NoError(t, err)
	assert.Len(t, all, 2)
	assert.Equal(t, []string{"/object_info/A%20b", "/object_info/Unknown", "/object_info"}, paths)
}

// The transport may come to read a body long after the call has failed: nothing may leave then.
func TestObjectInfoOfANamelessClass(t *testing.T) {
	t.Parallel()
	c := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("a request for all of it, or for nothing") })
	_, err := c.ObjectInfo(t.Context(), "")
	assert.Equal(t, CategoryValidation, CategoryOf(err))
}

func TestSealedBodySendsNothing(t *testing.T) {
	t.Parallel()
	asked := 0
	o := jsonBody([]byte("body"), func() error { asked++; return nil })
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://x", nil)
	require.NoError(t, err)
	o.attach(req)
	left, _, _ := o.seal()
	assert.False(t, left)
	n, err := req.Body.Read(make([]byte, 10))
	assert.Zero(t, n)
	require.ErrorIs(t, err, errSealed)
	again, err := req.GetBody()
	require.NoError(t, err)
	_, err = again.Read(make([]byte, 10))
	require.ErrorIs(t, err, errSealed)
	assert.Zero(t, asked)

	// Sealed while confirm is asked.
	o = jsonBody([]byte("body"), func() error { _, _, _ = o.seal(); return nil })
	req.Body = nil
	o.attach(req)
	_, err = req.Body.Read(make([]byte, 10))
	require.ErrorIs(t, err, errSealed)
	left, _, _ = o.seal()
	assert.False(t, left)
}

// The pod need not wait for a short body: the transport sends it with its headers, which it does for no reader of ours.
func TestShortBodyTravelsWithItsHeaders(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, `{"prompt_id":"p","number":1,"node_errors":{}}`)
	}))
	t.Cleanup(server.Close)
	var mu sync.Mutex
	var writes [][]byte
	transport := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		return &writeConn{conn, func(p []byte) {
			mu.Lock()
			defer mu.Unlock()
			writes = append(writes, bytes.Clone(p))
		}}, err
	}}
	t.Cleanup(transport.CloseIdleConnections)
	c := clientOf(t, server.URL, WithHTTPClient(&http.Client{Transport: transport}))
	asked := 0
	body := bytes.Repeat([]byte("x"), 1<<10)
	_, outcome, err := c.endpoint.postPrompt(t.Context(), body, func() error { asked++; return nil })
	require.NoError(t, err)
	assert.Equal(t, postAccepted, outcome)
	assert.Equal(t, 1, asked)
	mu.Lock()
	defer mu.Unlock()
	require.Len(t, writes, 1)
	assert.True(t, bytes.HasPrefix(writes[0], []byte("POST /prompt ")))
	assert.True(t, bytes.HasSuffix(writes[0], body))
}

// writeConn shows what is written to it.
type writeConn struct {
	net.Conn
	show func(p []byte)
}

func (c *writeConn) Write(p []byte) (int, error) {
	c.show(p)
	return c.Conn.Write(p)
}

// A RoundTripper that tells nothing of its connections, and fails, leaves it open what left.
// A RoundTripper need not fill in what net/http's own does.
func TestRoundTripperThatAnswersLittle(t *testing.T) {
	t.Parallel()
	c := clientOf(t, "http://pod", noRetry(), WithHTTPClient(&http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		if r.URL.Path == "/view" {
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"text/html"}}}, nil
		}
		return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(`{"exec_info":{"queue_remaining":3}}`))}, nil
	})}))
	n, err := c.endpoint.queueRemaining(t.Context())
	require.NoError(t, err)
	assert.Equal(t, 3, n)
	_, err = c.Open(t.Context(), FileRef{Filename: "a.png"})
	assert.Equal(t, CategoryProtocol, CategoryOf(err))
}

func TestHTTPSToAnHTTPPod(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	c := clientOf(t, strings.Replace(server.URL, "http:", "https:", 1), noRetry())
	_, err := c.Queue(t.Context())
	assert.Equal(t, CategoryProtocol, CategoryOf(err), "%v", err)
}

func TestForeignRoundTripper(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		trip    func(*http.Request) (*http.Response, error)
		outcome postOutcome
	}{
		"after reading": {func(r *http.Request) (*http.Response, error) {
			_, _ = io.ReadAll(r.Body)
			return nil, io.ErrUnexpectedEOF
		}, postAmbiguous},
		"before reading": {func(*http.Request) (*http.Response, error) { return nil, io.ErrUnexpectedEOF }, postUnsent},
	} {
		c := clientOf(t, "http://pod", WithHTTPClient(&http.Client{Transport: roundTrip(test.trip)}))
		_, outcome, err := c.endpoint.postPrompt(t.Context(), []byte("{}"), nil)
		assert.Equal(t, test.outcome, outcome, name)
		assert.Equal(t, CategoryNetwork, CategoryOf(err))
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// With COMFYUI_POD=URL: the routes on a real server.
func TestRealPodRoutes(t *testing.T) {
	base := os.Getenv("COMFYUI_POD")
	if base == "" {
		t.Skip("COMFYUI_POD is not set")
	}
	checkRoutes(t, base)
}

// The same on the simulated pod, in each of its versions.
func TestSimulatedPodRoutes(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"0.3.40", "0.3.64", "0.8.0", "0.27.0", "0.33.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			checkRoutes(t, comfyuitest.Start(t, comfyuitest.WithVersion(version)).URL())
		})
	}
}

func checkRoutes(t *testing.T, base string) {
	c, err := NewPodClient(base)
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Close()) }()
	ctx := t.Context()
	require.NoError(t, c.WaitReady(ctx))
	h, err := c.Health(ctx)
	require.NoError(t, err)
	t.Logf("%+v", h)
	assert.Contains(t, []HealthState{HealthReady, HealthBusy}, h.State)

	stats, err := c.SystemStats(ctx)
	require.NoError(t, err)
	assert.Equal(t, h.Version, stats.Version)
	features, err := c.Features(ctx)
	if atLeast(stats.Version, 0, 3, 45) {
		require.NoError(t, err)
		assert.NotEmpty(t, features)
		assert.Positive(t, c.endpoint.uploadLimit(ctx))
	}
	info, err := c.ObjectInfo(ctx, "EmptyImage", "NoSuchClass")
	require.NoError(t, err)
	assert.Len(t, info, 1)
	folders, err := c.Models(ctx, "")
	require.NoError(t, err)
	assert.Contains(t, folders, "checkpoints")
	_, err = c.Models(ctx, "no such folder")
	assert.Equal(t, CategoryNotFound, CategoryOf(err))
	_, err = c.Queue(ctx)
	require.NoError(t, err)
	_, err = c.History(ctx, uuid.NewString())
	assert.Equal(t, CategoryNotFound, CategoryOf(err))
	require.NoError(t, c.DeleteQueued(ctx, uuid.NewString()))
	require.NoError(t, c.Interrupt(ctx, uuid.NewString()))
	require.NoError(t, c.FreeMemory(ctx, true, true))

	var png bytes.Buffer
	name := uuid.NewString() + ".png"
	var refs []FileRef
	for _, shade := range []uint8{1, 2, 1} {
		png.Reset()
		picture := image.NewGray(image.Rect(0, 0, 8, 8))
		picture.SetGray(0, 0, color.Gray{Y: shade})
		require.NoError(t, imagepng.Encode(&png, picture))
		ref, err := c.Upload(ctx, name, bytes.NewReader(png.Bytes()), UploadSubfolder("routes"))
		require.NoError(t, err)
		refs = append(refs, ref)
	}
	assert.Equal(t, FileRef{name, "routes", "input"}, refs[0])
	assert.NotEqual(t, refs[0], refs[1], "other content has another name")
	assert.Equal(t, refs[0], refs[2], "equal content is kept once")
	resp, err := c.endpoint.view(ctx, viewOp, url.Values{"filename": {name}, "subfolder": {"routes"}, "type": {"input"}}, http.Header{"Range": {"bytes=1-3"}})
	require.NoError(t, err)
	part, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	assert.Equal(t, http.StatusPartialContent, resp.StatusCode)
	assert.Equal(t, "PNG", string(part))
	mask := bytes.NewReader(png.Bytes())
	ref, err := c.UploadMask(ctx, refs[0], "mask-"+name, mask, UploadSubfolder("clipspace"))
	require.NoError(t, err)
	require.NoError(t, c.exists(ctx, "view", ref), "it was saved")
	_, err = c.UploadMask(ctx, FileRef{Filename: "nope-" + name, Type: "input"}, "mask-"+name, mask)
	assert.Equal(t, CategoryNotFound, CategoryOf(err))

	post := func(graph string, confirm func() error) (postOutcome, error) {
		_, outcome, err := c.endpoint.postPrompt(ctx, fmt.Appendf(nil, `{"prompt":%s,"prompt_id":%q,"client_id":"x"}`, graph, uuid.NewString()), confirm)
		return outcome, err
	}
	outcome, err := post(`{"1":{"class_type":"NoSuchClass","inputs":{}}}`, nil)
	assert.Equal(t, postRefused, outcome)
	assert.Equal(t, CategoryMissingAsset, CategoryOf(err), "%v", err)
	outcome, err = post(`{"1":{"class_type":"LoadImage","inputs":{"image":"not there.png"}},"2":{"class_type":"PreviewImage","inputs":{"images":["1",0]}}}`, nil)
	assert.Equal(t, postRefused, outcome)
	assert.Equal(t, CategoryMissingAsset, CategoryOf(err), "%v", err)
	outcome, err = post(`null`, nil)
	assert.Equal(t, postAmbiguous, outcome)
	assert.Equal(t, CategoryProtocol, CategoryOf(err), "%v", err)
	outcome, err = post(`{}`, func() error { return ErrFenced })
	assert.Equal(t, postUnsent, outcome)
	require.ErrorIs(t, err, ErrFenced)

	supported, cancelled, err := c.endpoint.cancelJob(ctx, uuid.NewString(), nil)
	require.NoError(t, err)
	assert.Equal(t, atLeast(stats.Version, 0, 26), supported)
	assert.False(t, cancelled)
	job, supported, err := c.endpoint.apiJob(ctx, uuid.NewString())
	require.NoError(t, err)
	assert.Equal(t, atLeast(stats.Version, 0, 6), supported)
	assert.Nil(t, job)
	_, err = c.endpoint.oldestHistory(ctx)
	require.NoError(t, err)
	raw, err := c.Do(ctx, http.MethodGet, "/history?max_items=1", nil, nil)
	require.NoError(t, err)
	require.NoError(t, raw.Body.Close())
}

func TestS45CloseEndsCalls(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/view" {
				_, _ = io.WriteString(w, "half")
				_ = http.NewResponseController(w).Flush()
			} else if r.URL.Path == "/queue" && r.Method == http.MethodGet {
				w.WriteHeader(http.StatusBadGateway) // the call waits to be repeated
				return
			}
			<-stop
		})
		ctx := t.Context()
		file, err := c.endpoint.view(ctx, viewOp, nil, nil) //nolint:bodyclose // it is, below
		require.NoError(t, err)
		calls := map[string]func() error{
			"waits for an answer": func() error { return second(c.Features(ctx)) },
			"waits to be repeated": func() error {
				err := second(c.Queue(ctx))
				if err != nil {
					assert.ErrorContains(t, err, "Bad Gateway", "the last failure is told")
				}
				return err
			},
			"posts": func() error {
				_, outcome, err := c.endpoint.postPrompt(ctx, []byte("{}"), nil)
				assert.Equal(t, postAmbiguous, outcome)
				return err
			},
			"uploads": func() error { return second(c.Upload(ctx, "a", &drip{n: 1000, every: time.Second})) },
			"reads": func() error {
				_, err := io.ReadAll(file.Body)
				return err
			},
			"does":   func() error { return second(c.Do(ctx, "POST", "/x", nil, nil)) }, //nolint:bodyclose // there is none
			"health": func() error { return second(c.Health(ctx)) },
			"ready":  func() error { return c.WaitReady(ctx) },
		}
		var all sync.WaitGroup
		for name, call := range calls {
			all.Go(func() {
				err := call()
				assert.ErrorIs(t, err, ErrClosed, name)
				assert.Equal(t, CategoryClosed, CategoryOf(err), name)
				assert.NotErrorIs(t, err, context.Canceled, name)
			})
		}
		time.Sleep(1500 * time.Millisecond)
		start := time.Now()
		c.endpoint.close()
		all.Wait()
		assert.LessOrEqual(t, time.Since(start), time.Second, "an upload ends with the Read of its source that is under way")
		require.NoError(t, file.Body.Close())
		close(stop)
	})
}

// The transport that the client made itself keeps no connection after Close.
func TestS45CloseLetsGoOfConnections(t *testing.T) {
	t.Parallel()
	gone := make(chan struct{}, 1)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"exec_info":{"queue_remaining":0}}`)
	}))
	server.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateClosed {
			gone <- struct{}{}
		}
	}
	server.Start()
	defer server.Close()
	c := clientOf(t, server.URL)
	_, err := c.endpoint.queueRemaining(t.Context())
	require.NoError(t, err)
	c.endpoint.close()
	<-gone
}

func TestUploadOfAFile(t *testing.T) {
	t.Parallel()
	var length int64
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		length = r.ContentLength
		f, _, err := r.FormFile("image")
		if assert.NoError(t, err) {
			data, _ := io.ReadAll(f)
			assert.Equal(t, "content", string(data))
		}
		_, _ = io.WriteString(w, `{"name":"a","subfolder":"","type":"input"}`)
	})
	path := filepath.Join(t.TempDir(), "a")
	require.NoError(t, os.WriteFile(path, []byte("content"), 0o600))
	file, err := os.Open(path)
	require.NoError(t, err)
	defer func() { _ = file.Close() }()
	_, err = c.Upload(t.Context(), "a", file)
	require.NoError(t, err)
	assert.Positive(t, length)
	assert.Zero(t, sizeOf(file), "it was read")

	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer func() { _ = r.Close() }()
	go func() {
		_, _ = io.WriteString(w, "content")
		_ = w.Close()
	}()
	_, err = c.Upload(t.Context(), "a", r)
	require.NoError(t, err)
	assert.EqualValues(t, -1, length, "a pipe has no size")

	require.NoError(t, file.Close())
	assert.EqualValues(t, -1, sizeOf(file))
	c = serve(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	_, err = c.Upload(t.Context(), "a", file)
	assert.Equal(t, CategoryValidation, CategoryOf(err), "%v", err)
	require.ErrorIs(t, err, os.ErrClosed)
}

// A transport's own error may repeat a header.
func TestS9TransportErrorsHoldNoCredential(t *testing.T) {
	t.Parallel()
	cause := fmt.Errorf(`invalid header "X-API-Key: header-k3y": %w`, io.ErrUnexpectedEOF)
	c := clientOf(t, "http://pod", noRetry(), WithHeader("X-API-Key", "header-k3y"),
		WithHTTPClient(&http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) { return nil, cause })}))
	_, err := c.Queue(t.Context())
	require.ErrorIs(t, err, cause)
	for e := err; e != nil; e = errors.Unwrap(e) {
		assert.NotContains(t, e.Error(), "header-k3y")
	}
	data, fault := encodeError(err)
	require.NoError(t, fault)
	assert.NotContains(t, string(data), "header-k3y")
	back, fault := decodeError(data)
	require.NoError(t, fault)
	require.ErrorIs(t, back, io.ErrUnexpectedEOF)
}

// ComfyUI closes a connection that nobody has used for 75 s: that it is gone then says nothing of the process.
func TestIdleConnectionsAreForgottenInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := &lines{}
		use := func() *connection {
			c, conn := &connection{endpoint: &endpoint{lines: l}}, &net.TCPConn{}
			c.seek()
			c.found(conn, false)
			return c
		}
		idle := func() int { return l.idle(time.Now()) }
		first, second := use(), use()
		assert.Zero(t, idle(), "both are in use")
		first.leave(true)
		time.Sleep(keptIdle / 2)
		second.leave(true)
		assert.Equal(t, 2, idle())
		time.Sleep(keptIdle / 2)
		assert.Equal(t, 2, idle(), "the first may be open still")
		time.Sleep(time.Nanosecond)
		assert.Equal(t, 1, idle())
		time.Sleep(keptIdle / 2)
		assert.Zero(t, idle())
		use().leave(false)
		assert.Zero(t, idle(), "closed, it waits for nobody")
		assert.Zero(t, l.breaks.Load())
	})
}
