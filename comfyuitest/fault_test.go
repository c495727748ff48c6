package comfyuitest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFaultEffects(t *testing.T) {
	t.Parallel()
	isReset := func(t *testing.T, err error) {
		t.Helper()
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	for _, c := range []struct {
		name   string
		fault  Fault
		reply  func(t *testing.T, r reply, err error)
		queued int // at once
		later  int // after the delay
	}{
		{"answer", Fault{Effect: Answer, Status: 429, Header: http.Header{"retry-after": {"7"}}, Body: "slow down"}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 429, r.status)
			require.Equal(t, "7", r.header.Get("Retry-After"))
			require.Equal(t, "slow down", string(r.body))
		}, 0, 0},
		{"answer after", Fault{Effect: AnswerAfter, Status: 524}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 524, r.status)
		}, 1, 1},
		{"answer before", Fault{Effect: AnswerBefore, Status: 524, Delay: time.Minute}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 524, r.status)
		}, 0, 1},
		{"drop", Fault{Effect: Drop}, func(t *testing.T, _ reply, err error) { isReset(t, err) }, 0, 0},
		{"drop after", Fault{Effect: DropAfter}, func(t *testing.T, _ reply, err error) { isReset(t, err) }, 1, 1},
		{"slow", Fault{Effect: Slow, Delay: 30 * time.Second}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 200, r.status)
		}, 1, 1},
		{"truncate", Fault{Effect: Truncate}, func(t *testing.T, r reply, err error) {
			isReset(t, err)
			require.Equal(t, 200, r.status)
			require.True(t, strings.HasPrefix(string(r.body), `{"prompt_id": "`), "%s", r.body)
		}, 1, 1},
		{"without a status", Fault{}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 502, r.status)
		}, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				c.fault.Route = "POST /prompt"
				p.Inject(c.fault)
				body := `{"prompt": ` + graphOf("1", "Work", nil) + `}`
				r, err := try(p, http.MethodPost, "/api/prompt", body)
				c.reply(t, r, err)
				synctest.Wait()
				require.Len(t, p.Prompts(), c.queued)
				time.Sleep(2 * time.Minute)
				require.Len(t, p.Prompts(), c.later)
				require.Equal(t, 1, p.Requests("POST /prompt"))
				require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/prompt", body).status, "used up")
			}, WithNode("Work", Node{Output: true}))
		})
	}
}

// TestEveryEffectOnEveryRoute: over sockets and pipes, what the client gets, and whether the pod handled it.
func TestEveryEffectOnEveryRoute(t *testing.T) {
	t.Parallel()
	for _, pipes := range []bool{true, false} {
		for _, route := range faultRoutes {
			for effect, want := range map[Effect]struct{ answered, reset, handled bool }{
				Answer:       {answered: true},
				AnswerAfter:  {answered: true, handled: true},
				AnswerBefore: {answered: true, handled: true},
				Drop:         {reset: true},
				DropAfter:    {reset: true, handled: true},
				Hang:         {},
				Slow:         {handled: true},
				Truncate:     {reset: true, handled: true},
			} {
				t.Run(fmt.Sprintf("pipes %v, %s %s, effect %d", pipes, route.method, route.path, effect), func(t *testing.T) {
					t.Parallel()
					opts := []Option{WithNode("Work", Node{Output: true})}
					if pipes {
						opts = append(opts, WithPipes())
					}
					p := Start(t, opts...)
					old := dial(t, p, "me")
					old.until("status")
					path, _, _ := strings.Cut(route.path, "?")
					p.Inject(Fault{Route: route.method + " " + path, Effect: effect, Status: 418})
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					if effect == Hang {
						time.AfterFunc(10*time.Millisecond, cancel)
					}
					req, err := http.NewRequestWithContext(ctx, route.method, p.URL()+route.path, strings.NewReader(route.body))
					require.NoError(t, err)
					for name, value := range route.header {
						req.Header.Set(name, value)
					}
					status, err := roundTrip(p, req)
					require.Equal(t, want.answered, status == 418, "status %d, %v", status, err)
					require.Equal(t, want.reset, errors.Is(err, syscall.ECONNRESET), "status %d, %v", status, err)
					require.Equal(t, effect == Hang, errors.Is(err, context.Canceled), "status %d, %v", status, err)
					if route.handled != nil {
						require.Eventually(t, func() bool { return route.handled(p) == want.handled }, 10*time.Second, time.Millisecond)
					}
				})
			}
		}
	}
}

// faultRoutes are routes of every kind, and how to tell that the pod handled a request; nil for those that change nothing.
var faultRoutes = []struct {
	method, path, body string
	header             map[string]string
	handled            func(p *Pod) bool
}{
	{"POST", "/api/prompt", `{"prompt": {"1": {"class_type": "Work", "inputs": {}}}}`, nil, func(p *Pod) bool { return len(p.Prompts()) == 1 }},
	{"POST", "/userdata/x", `content`, nil, func(p *Pod) bool { return len(p.files.all(kindUser)) == 1 }},
	{"PATCH", "/internal/logs/subscribe", `{"clientId": "me", "enabled": true}`, nil, func(p *Pod) bool {
		logs := p.current().logs
		logs.mu.Lock()
		defer logs.mu.Unlock()
		return len(logs.subscribers) == 1
	}},
	{"GET", "/api/object_info", "", nil, nil},
	{"GET", "/api/jobs", "", nil, nil},
	{"GET", "/history/x", "", nil, nil},
	{"GET", "/ws?clientId=me", "", map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
	}, func(p *Pod) bool {
		// The socket that was there before no longer hears.
		hub := p.current().hub
		hub.mu.Lock()
		defer hub.mu.Unlock()
		at := hub.find("me")
		return at < 0 || len(hub.open) > 1
	}},
}

// roundTrip sends a request on a connection of its own, so that net/http repeats nothing, and reads its answer, or a socket's first
// frames.
func roundTrip(p *Pod, req *http.Request) (status int, err error) {
	transport := &http.Transport{DialContext: p.DialContext, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		_, err = io.ReadFull(resp.Body, make([]byte, 60))
		return resp.StatusCode, err
	}
	_, err = io.ReadAll(resp.Body)
	return resp.StatusCode, err
}

// TestAnswerToALargeBody: an answer that comes before the body is read reaches the client all the same, and at once.
func TestAnswerToALargeBody(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, path, origin string
		fault              Fault
		status             int
	}{
		{"fault", "/upload/image", "", Fault{Route: "POST /upload", Times: -1, Status: 503, Body: "no"}, 503},
		{"too large", "/upload/image", "", Fault{Route: "PUT"}, 413},
		{"no route", "/nowhere", "", Fault{Route: "PUT"}, 405},
		{"foreign origin", "/upload/image", "http://example.com", Fault{Route: "PUT"}, 403},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := Start(t, WithMaxUpload(1<<20))
			p.Inject(c.fault)
			transport := &http.Transport{DisableKeepAlives: true, ExpectContinueTimeout: time.Minute}
			defer transport.CloseIdleConnections()
			post := func(body io.Reader, expect string) {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.URL()+c.path, body)
				require.NoError(t, err)
				if c.origin != "" {
					req.Header.Set("Origin", c.origin)
				}
				if expect != "" {
					req.Header.Set("Expect", expect)
				}
				resp, err := transport.RoundTrip(req)
				require.NoError(t, err)
				require.Equal(t, c.status, resp.StatusCode)
				data, err := io.ReadAll(resp.Body)
				require.NoError(t, err)
				require.NoError(t, resp.Body.Close())
				require.Equal(t, int64(len(data)), resp.ContentLength)
			}
			for range 6 {
				post(bytes.NewReader(make([]byte, 8<<20)), "")
				post(bytes.NewReader(make([]byte, 8<<20)), "100-continue")
			}
			endless, more := io.Pipe()
			defer func() { _ = more.Close() }()
			go func() { _, _ = more.Write(make([]byte, 2<<20)) }()
			post(endless, "")
		})
	}
}

// TestAnswerToABodyThatStops: a client that does not send what it announced loses the connection, like one of aiohttp.
func TestAnswerToABodyThatStops(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := Start(t, WithPipes())
		p.Inject(Fault{Route: "POST /upload", Status: 503, Body: "no"})
		conn, err := p.DialContext(t.Context(), "tcp", "pod")
		require.NoError(t, err)
		defer func() { _ = conn.Close() }()
		_, err = io.WriteString(conn, "POST /upload/image HTTP/1.1\r\nHost: pod\r\nContent-Length: 100\r\n\r\nhalf of it")
		require.NoError(t, err)
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(time.Minute)))
		got, err := io.ReadAll(conn)
		require.NoError(t, err, "%s", got)
		require.Contains(t, string(got), "503 Service Unavailable")
	})
}

// TestHalfOfALargeBody: all of the half, however slowly the client reads, unless it goes away.
func TestHalfOfALargeBody(t *testing.T) {
	t.Parallel()
	for _, opts := range [][]Option{nil, {WithPipes()}} {
		const size = 4 << 20
		p := Start(t, append(opts, WithNode("Save", scripted(func(c *Call) error {
			c.Save("images", "output", "x.bin", make([]byte, size))
			return nil
		})))...)
		queue1(t, p, graphOf("1", "Save", nil), "")
		require.NoError(t, p.WaitIdle(t.Context()))
		p.Inject(Fault{Route: "GET /view", Effect: Truncate, Times: -1})
		download := func(read func(body io.Reader)) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, p.URL()+"/view?filename=x.bin", nil)
			require.NoError(t, err)
			resp, err := p.Client().Do(req)
			require.NoError(t, err)
			require.Equal(t, int64(size), resp.ContentLength)
			read(resp.Body)
			require.NoError(t, resp.Body.Close())
		}
		for range 5 {
			download(func(body io.Reader) {
				got := 0
				for buf := make([]byte, 64<<10); ; runtime.Gosched() {
					n, err := body.Read(buf)
					if got += n; err != nil {
						require.ErrorIs(t, err, syscall.ECONNRESET)
						break
					}
				}
				require.Equal(t, size/2, got)
			})
		}
		download(func(io.Reader) {})
	}
}

func TestFaultDelay(t *testing.T) {
	t.Parallel()
	for effect := Answer; effect <= Truncate; effect++ {
		if effect == Hang {
			continue
		}
		t.Run(fmt.Sprint(effect), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				p.Inject(Fault{Route: "POST /prompt", Effect: effect, Delay: 100 * time.Second})
				began := time.Now()
				answered := make(chan time.Duration, 1)
				go func() {
					_, _ = try(p, http.MethodPost, "/prompt", `{"prompt": `+graphOf("1", "Work", nil)+`}`)
					answered <- time.Since(began)
				}()
				synctest.Wait()
				queued := effect == AnswerAfter || effect == DropAfter || effect == Truncate
				require.Equal(t, queued, len(p.Prompts()) == 1, "seen at once")
				if effect == AnswerBefore {
					require.Zero(t, <-answered)
				} else {
					require.Equal(t, 100*time.Second, <-answered)
				}
				time.Sleep(101 * time.Second)
				require.Equal(t, effect != Answer && effect != Drop, len(p.Prompts()) == 1)
			}, WithNode("Work", Node{Output: true}))
		})
	}
}

// TestSlowOutlivesItsClient: a proxy that holds a request sends it on, whether or not somebody still waits.
func TestSlowOutlivesItsClient(t *testing.T) {
	t.Parallel()
	for _, body := range []string{"", `{"prompt_id": ""}`} {
		gated(t, true, func(t *testing.T, p *Pod, g *gate) {
			id := queue1(t, p, graphOf("1", "Gate", nil), "")
			<-g.entered
			p.Inject(Fault{Route: "POST /interrupt", Effect: Slow, Delay: time.Minute})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL()+"/interrupt", strings.NewReader(body))
			require.NoError(t, err)
			_, err = p.Client().Do(req) //nolint:bodyclose // there is none
			require.ErrorIs(t, err, context.DeadlineExceeded)
			time.Sleep(2 * time.Minute)
			g.pass <- struct{}{}
			require.NoError(t, p.WaitIdle(t.Context()))
			require.Equal(t, Prompt{ID: id, Posts: 1, Runs: 1, Interrupts: 1}, counts(p.Prompts()[0]))
		})
	}
}

func TestBadFault(t *testing.T) {
	t.Parallel()
	p := Start(t)
	for _, f := range []Fault{
		{Route: "prompt"},
		{Route: "POST prompt"},
		{Route: "post /prompt"},
		{Route: "POST  /prompt"},
		{Route: "POST /prompt "},
		{Route: "GET /history?max_items=1"},
		{Route: "http://127.0.0.1/prompt"},
		{Effect: -1},
		{Effect: Truncate + 1},
		{Skip: -1},
		{Delay: -time.Second},
		{Status: 99},
		{Status: 101},
		{Status: 1000},
	} {
		require.Panics(t, func() { p.Inject(f) }, "%+v", f)
	}
	require.Panics(t, func() { p.Requests("prompt") })
	for _, route := range []string{"", "POST", "/prompt", "POST /prompt", "GET /api/userdata/a%2Fb.json", "DELETE /"} {
		p.Inject(Fault{Route: route})()
		require.Zero(t, p.Requests(route))
	}
}

func TestHang(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.Inject(Fault{Route: "POST /prompt", Effect: Hang})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL()+"/prompt", strings.NewReader(`{}`))
		require.NoError(t, err)
		_, err = p.Client().Do(req) //nolint:bodyclose // there is none
		require.ErrorIs(t, err, context.DeadlineExceeded)

		p.Inject(Fault{Route: "GET /queue", Effect: Hang})
		failed := make(chan error, 1)
		go func() {
			_, err := try(p, http.MethodGet, "/queue", "")
			failed <- err
		}()
		time.Sleep(time.Hour)
		p.Restart(0)
		require.Error(t, <-failed, "a hanging request ends with its process")
	})
}

func TestFaultOrder(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		statuses := func(n int) []int {
			var list []int
			for range n {
				list = append(list, do(t, p, http.MethodGet, "/queue", "").status)
			}
			return list
		}
		remove := p.Inject(Fault{Route: "GET /queue", Skip: 1, Times: 2, Status: 501})
		p.Inject(Fault{Route: "GET /", Status: 502})
		always := p.Inject(Fault{Times: -1, Status: 503})
		require.Equal(t, []int{502, 501, 501, 503, 503}, statuses(5), "the first that matches and is not used up")
		always()
		require.Equal(t, []int{200}, statuses(1))
		remove()
		p.Inject(Fault{Route: "GET /queue", Times: -1, Status: 504})()
		require.Equal(t, []int{200}, statuses(1))
		require.Equal(t, 7, p.Requests("GET /api/queue"))
		require.Equal(t, 7, p.Requests("/queue"))
		require.Equal(t, 7, p.Requests(""))
		require.Zero(t, p.Requests("POST /queue"))
	})
}

func TestMatchesRoute(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		route, method, path string
		want                bool
	}{
		{"", "GET", "/queue", true},
		{"GET /history", "GET", "/history/x", true},
		{"GET /history", "GET", "/api/history/x", true},
		{"GET /api/history", "GET", "/history/x", true},
		{"GET /history", "POST", "/history", false},
		{"/history", "POST", "/history", true},
		{"POST", "POST", "/history", true},
		{"POST", "GET", "/history", false},
		{"GET /jobs", "GET", "/api/jobs", true},
		{"GET /queue", "GET", "/apiqueue", false},
	} {
		require.Equal(t, c.want, matchesRoute(c.route, c.method, c.path), "%+v", c)
	}
}

func TestFaultsOverTCP(t *testing.T) {
	t.Parallel()
	p := Start(t, WithNode("Work", Node{Output: true}))
	body := `{"prompt": ` + graphOf("1", "Work", nil) + `}`
	for _, effect := range []Effect{Drop, DropAfter} {
		p.Inject(Fault{Route: "POST /prompt", Effect: effect})
		_, err := try(p, http.MethodPost, "/prompt", body)
		require.True(t, errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF), "%v", err)
	}
	p.Inject(Fault{Route: "POST /prompt", Effect: Truncate})
	r, err := try(p, http.MethodPost, "/prompt", body)
	require.Error(t, err)
	require.NotErrorIs(t, err, io.EOF, "a reset, not a quiet end")
	require.Equal(t, 200, r.status)
	require.NoError(t, p.WaitIdle(t.Context()))
	require.Len(t, p.Prompts(), 2)
}

// TestRefusedDuplicate: a 409 of unreleased servers is made with a fault.
func TestRefusedDuplicate(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.Inject(Fault{
			Route: "POST /prompt", Effect: AnswerAfter, Status: http.StatusConflict,
			Header: http.Header{"Content-Type": {"application/json; charset=utf-8"}}, Body: `{"error": "prompt_id already exists"}`,
		})
		r := submit(t, p, graphOf("1", "Work", nil), "", "")
		require.Equal(t, http.StatusConflict, r.status)
		require.Equal(t, "prompt_id already exists", at(t, r.json(t), "error"))
	}, WithNode("Work", Node{Output: true}))
}
