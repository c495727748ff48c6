package comfyui_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

func TestS11HistoryComesAfterSuccess(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		b.pod.Inject(comfyuitest.Fault{Route: "GET /history/", Status: 200, Body: `{}`, Times: 5, Header: http.Header{"Content-Type": {"application/json"}}})
		r, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1))
		succeeded(t, r, err)
		require.Len(t, r.Outputs, 1)
		b.ranOnce()
	})
}

// cuts are the ways for a socket to end.
var cuts = map[string]comfyuitest.CutMode{
	"close": comfyuitest.CutClose, "reset": comfyuitest.CutReset, "black hole": comfyuitest.CutBlackhole, "deaf": comfyuitest.CutDeaf,
}

// The socket is cut at every moment of a job, in every way, and every job ends right.
func TestS12SocketCutAtAnyMoment(t *testing.T) {
	t.Parallel()
	for name, mode := range cuts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				c := b.client()
				for at := time.Duration(0); at <= 2400*time.Millisecond; at += 100 * time.Millisecond {
					j, err := c.Submit(b.ctx, graphOf(t, "Work", int(at)))
					require.NoError(t, err)
					time.Sleep(at)
					b.pod.CutStreams(mode)
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
					assert.Equal(t, 1, b.pod.Runs(r.PromptID))
				}
			})
		})
	}
}

// The socket is cut between the terminal frame and the read of the history.
func TestS12SocketCutAfterTheTerminalFrame(t *testing.T) {
	t.Parallel()
	for name, mode := range cuts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.pod.Inject(comfyuitest.Fault{Route: "GET /history/", Effect: comfyuitest.Drop, Times: 3})
				j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 1))
				require.NoError(t, err)
				time.Sleep(2*time.Second + time.Millisecond)
				b.pod.CutStreams(mode)
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				b.ranOnce()
			})
		})
	}
}

// A socket that goes deaf in the middle of a job is noticed and replaced; the job ends long before a time-out.
func TestS13DeafSocket(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client()
		j, err := c.Submit(b.ctx, graphOf(t, "Long", 1))
		require.NoError(t, err)
		time.Sleep(10 * time.Second)
		b.pod.CutStreams(comfyuitest.CutDeaf)
		start := time.Now()
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.LessOrEqual(t, time.Since(start), 50*time.Second+comfyuiPollStreaming, "one slow poll after its end")
		next, err := c.Submit(b.ctx, graphOf(t, "Long", 2))
		require.NoError(t, err)
		time.Sleep(30 * time.Second)
		assert.Equal(t, comfyui.StreamUp, c.Stats().Stream)
		assert.Positive(t, c.Stats().Deaf, "noticed")
		assert.Positive(t, next.Progress().Step, "the new connection hears")
		_, err = next.Wait(b.ctx)
		require.NoError(t, err)
		for _, p := range b.pod.Prompts() {
			assert.Equal(t, 1, p.Runs)
		}
	})
}

const comfyuiPollStreaming = 15 * time.Second

// The clean-up of the old socket's handler removes the new one (C#16010): the reconnect itself is deaf.
func TestS13ReconnectIsDeaf(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.NewPod(comfyuitest.WithPipes(), comfyuitest.WithNode("Long", comfyuitest.Steps(60, time.Second)))
		defer pod.Close()
		var mu sync.Mutex
		var conns []net.Conn
		transport := &http.Transport{DialContext: pod.DialContext}
		dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := pod.DialContext(ctx, network, addr)
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			return conn, err
		}
		d := wsDialer(dial)
		c, err := comfyui.NewPodClient(pod.URL(), comfyui.WithHTTPClient(&http.Client{Transport: transport}), comfyui.WithDialer(d),
			comfyui.WithTiming(comfyui.Timing{ReconnectMin: time.Nanosecond}))
		require.NoError(t, err)
		defer transport.CloseIdleConnections()
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		w, err := comfyui.ParseWorkflow([]byte(`{"1":{"class_type":"Long","inputs":{}}}`))
		require.NoError(t, err)
		j, err := c.Submit(ctx, w)
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		mu.Lock()
		_ = conns[len(conns)-1].Close()
		mu.Unlock()
		r, err := j.Wait(ctx)
		succeeded(t, r, err)
		assert.Equal(t, 1, pod.Runs(r.PromptID))
	})
}

func TestS14SilentSocket(t *testing.T) {
	t.Parallel()
	silent := comfyuitest.WithHandler(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/ws") {
				conn, err := upgrader.Upgrade(w, r, nil)
				if err != nil {
					return
				}
				defer conn.Close()
				for {
					if _, _, err := conn.ReadMessage(); err != nil { // pings are answered, nothing is sent
						return
					}
				}
			}
			next.ServeHTTP(w, r)
		})
	})
	bubble(t, func(b *bench) {
		c := b.client()
		for i := range 3 {
			r, err := c.Execute(b.ctx, graphOf(t, "Work", i))
			succeeded(t, r, err)
			assert.Equal(t, 1, b.pod.Runs(r.PromptID))
		}
		assert.NotEqual(t, comfyui.StreamUp, c.Stats().Stream)
	}, silent)
}

func TestS15HalfOpen(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client()
		j, err := c.Submit(b.ctx, graphOf(t, "Hours", 1))
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		b.pod.CutStreams(comfyuitest.CutBlackhole)
		time.Sleep(90 * time.Second) // two ping periods without a frame, and the backoff
		assert.Equal(t, comfyui.StreamUp, c.Stats().Stream)
		assert.EqualValues(t, 2, c.Stats().Dials)
		before := j.Progress().Step
		time.Sleep(20 * time.Second)
		assert.Greater(t, j.Progress().Step, before)
		require.NoError(t, j.Cancel(b.ctx))
	}, comfyuitest.WithNode("Hours", comfyuitest.Steps(3600, time.Second)))
}

// A pod that is back is heard again at once: the stream does not sit out a pause that it took while nothing was there.
func TestS15StreamComesBackWithThePod(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		c := b.client(comfyui.WithTiming(comfyui.Timing{ReconnectMin: 10 * time.Minute, ReconnectMax: 10 * time.Minute}))
		var rec journal
		j, err := c.Submit(b.ctx, graphOf(t, "Long", 1), rec.option())
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		const down = 2 * time.Minute
		b.pod.Restart(down)
		back := time.Now().Add(down)
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Equal(t, 2, r.Attempt)
		ups := slices.DeleteFunc(rec.of(comfyui.EventStream), func(ev comfyui.Event) bool { return ev.Stream != comfyui.StreamUp || ev.Time.Before(back) })
		require.NotEmpty(t, ups)
		assert.Less(t, ups[0].Time.Sub(back), 6*time.Second, "with the first answer")
		assert.LessOrEqual(t, c.Stats().Dials, int64(3), "no tight loop")
	})
}

func TestS16SocketRefusedForGood(t *testing.T) {
	t.Parallel()
	for _, status := range []int{403, 404, 502} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.pod.RefuseStreams(status)
				c := b.client()
				start := time.Now()
				j, err := c.Submit(b.ctx, graphOf(t, "Long", 1))
				require.NoError(t, err)
				var states []comfyui.EventKind
				for ev := range j.Events(b.ctx) {
					states = append(states, ev.Kind)
				}
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				b.ranOnce()
				assert.Contains(t, states, comfyui.EventStarted)
				assert.LessOrEqual(t, time.Since(start), 65*time.Second, "polling tells of the end within a poll or so")
				assert.LessOrEqual(t, b.pod.Requests("GET /ws"), 12, "no tight loop")
				assert.LessOrEqual(t, b.pod.Requests("GET /queue"), 80)

				// An hour of it: the attempts stay bounded.
				j, err = c.Submit(b.ctx, graphOf(t, "Hours", 1))
				require.NoError(t, err)
				before := b.pod.Requests("GET /ws")
				time.Sleep(30 * time.Minute)
				assert.LessOrEqual(t, b.pod.Requests("GET /ws")-before, 130)
				require.NoError(t, j.Cancel(b.ctx))
			}, comfyuitest.WithNode("Hours", comfyuitest.Steps(3600, time.Second)))
		})
	}
}

// ---------------------------------------------------------------- hostile pods

// hostile answers every route but /ws with what serve writes.
func hostile(t *testing.T, serve func(w http.ResponseWriter, r *http.Request)) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(serve))
	t.Cleanup(server.Close)
	return server
}

func TestS44EndlessFrames(t *testing.T) {
	t.Parallel()
	for name, pour := range map[string]func(conn net.Conn) error{
		"one endless text frame": func(conn net.Conn) error {
			if _, err := conn.Write([]byte{0x81, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}); err != nil {
				return err
			}
			return pourForever(conn, bytes.Repeat([]byte("x"), 1<<16))
		},
		"an endless message of fragments": func(conn net.Conn) error {
			if _, err := conn.Write([]byte{0x01, 1, '{'}); err != nil {
				return err
			}
			return pourForever(conn, bytes.Repeat([]byte{0x00, 1, ' '}, 1<<14))
		},
		"small frames without end": func(conn net.Conn) error {
			return pourForever(conn, bytes.Repeat([]byte{0x81, 2, '{', '}'}, 1<<14))
		},
		"a million levels of JSON": func(conn net.Conn) error {
			head := binary.BigEndian.AppendUint64([]byte{0x81, 127}, 1_000_000)
			return pourForever(conn, append(head, bytes.Repeat([]byte("["), 1_000_000)...))
		},
		"an endless binary frame": func(conn net.Conn) error {
			if _, err := conn.Write([]byte{0x82, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 0, 0, 0, 1}); err != nil {
				return err
			}
			return pourForever(conn, make([]byte, 1<<16))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod := comfyuitest.Start(t, comfyuitest.WithNode("Quick", comfyuitest.Steps(1, 0)), withSockets(func(conn *websocket.Conn) {
				greet(conn)
				_ = pour(conn.NetConn())
			}))
			c, err := comfyui.NewPodClient(pod.URL(), comfyui.WithPreviews(), comfyui.WithTiming(comfyui.Timing{Poll: 20 * time.Millisecond, PollStreaming: 20 * time.Millisecond}))
			require.NoError(t, err)
			defer c.Close()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			r, err := c.Execute(ctx, graphOf(t, "Quick", 1))
			succeeded(t, r, err)
		})
	}
}

func pourForever(conn net.Conn, data []byte) error {
	for {
		if _, err := conn.Write(data); err != nil {
			return err
		}
	}
}

// Answers that never end, or hold far more than they should, cost bounded memory and time.
func TestS44EndlessAnswers(t *testing.T) {
	t.Parallel()
	server := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/queue"):
			w.Header().Set("Content-Length", "1099511627776")
			_, _ = io.WriteString(w, `{"queue_running":[`)
			pourAnswer(w, r, "0,")
		case strings.Contains(r.URL.Path, "/history"):
			_, _ = io.WriteString(w, strings.Repeat("[", 1_000_000))
		case strings.Contains(r.URL.Path, "/system_stats"):
			http.Redirect(w, r, r.URL.Path+"/again", http.StatusFound)
		default:
			http.NotFound(w, r)
		}
	})
	c, err := comfyui.NewPodClient(server.URL, comfyui.WithTiming(comfyui.Timing{Request: 5 * time.Second}),
		comfyui.WithRetry(comfyui.CategoryProtocol, comfyui.RetryPolicy{}), comfyui.WithRetry(comfyui.CategoryTimeout, comfyui.RetryPolicy{}),
		comfyui.WithRetry(comfyui.CategoryUnavailable, comfyui.RetryPolicy{}))
	require.NoError(t, err)
	defer c.Close()
	_, err = c.Queue(t.Context())
	require.Error(t, err)
	_, err = c.History(t.Context(), "x")
	require.Error(t, err)
	_, err = c.SystemStats(t.Context())
	require.Error(t, err)
}

// pourAnswer writes until the client has had enough.
func pourAnswer(w http.ResponseWriter, r *http.Request, text string) {
	chunk := strings.Repeat(text, 1<<12)
	for r.Context().Err() == nil {
		if _, err := io.WriteString(w, chunk); err != nil {
			return
		}
	}
}

// -------------------------------------------------------------------- closing

// Close at any moment, with every kind of call in flight: they return ErrClosed, no goroutine stays, and no job is lost.
func TestS45CloseAtAnyMoment(t *testing.T) {
	t.Parallel()
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				rng := rand.New(rand.NewPCG(seed, 0))
				if seed%4 == 1 {
					b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.Hang, Times: -1})
				}
				if seed%4 == 2 {
					b.pod.RefuseStreams(502)
				}
				store := comfyui.NewMemoryStore()
				c := b.client(comfyui.WithStore(store))
				var wg sync.WaitGroup
				check := func(err error) {
					if err != nil && !errors.Is(err, comfyui.ErrClosed) {
						t.Errorf("seed %d: %v", seed, err)
					}
				}
				for i := range 5 {
					wg.Go(func() {
						_, err := c.Execute(b.ctx, graphOf(t, "Work", i), comfyui.WithJobID(fmt.Sprint("job", i)))
						check(err)
					})
				}
				closeAt := rng.IntN(12)
				pause := time.Duration(rng.Int64N(int64(15 * time.Second)))
				wg.Go(func() {
					j, err := c.Submit(b.ctx, graphOf(t, "Work", 9), comfyui.WithJobID("events"))
					check(err)
					if err == nil {
						seen := 0
						for range j.Events(b.ctx) {
							if seen++; seen == closeAt {
								check(c.Close()) // legal inside the loop
							}
						}
						<-j.Done()
					}
				})
				wg.Go(func() {
					for range c.Recover(b.ctx) {
					}
				})
				wg.Go(func() { _, err := c.Queue(b.ctx); check(err) })
				time.Sleep(pause)
				require.NoError(t, c.Close())
				require.NoError(t, c.Close())
				wg.Wait()
				_, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
				require.ErrorIs(t, err, comfyui.ErrClosed)

				// Whoever comes next finds every job, and each has run once.
				b.pod.RefuseStreams(0)
				if seed%4 == 1 {
					return
				}
				heir := b.client(comfyui.WithStore(store))
				for i := range 5 {
					r, err := heir.Execute(b.ctx, graphOf(t, "Work", i), comfyui.WithJobID(fmt.Sprint("job", i)))
					succeeded(t, r, err)
					assert.Equal(t, 1, b.pod.Runs(r.PromptID))
				}
			})
		})
	}
}

// The greeting comes when the client has said goodbye already, and the pod says nothing more: Close does not wait for it, with pings or
// without.
func TestS45CloseBeforeTheGreeting(t *testing.T) {
	t.Parallel()
	for _, ping := range []time.Duration{0, -1} {
		t.Run(fmt.Sprintf("ping=%s", ping), func(t *testing.T) {
			t.Parallel()
			var over chan struct{}
			late := withSockets(func(conn *websocket.Conn) {
				time.Sleep(500 * time.Millisecond)
				greet(conn)
				select {
				case <-over:
				case <-time.After(time.Minute):
				}
			})
			bubble(t, func(b *bench) {
				over = make(chan struct{}) // of this bubble
				defer close(over)
				c := b.client(comfyui.WithTiming(comfyui.Timing{Ping: ping}))
				var wg sync.WaitGroup
				wg.Go(func() {
					_, err := c.Execute(b.ctx, graphOf(t, "Work", 1))
					assert.ErrorIs(t, err, comfyui.ErrClosed)
				})
				time.Sleep(200 * time.Millisecond)
				start := time.Now()
				require.NoError(t, c.Close())
				assert.Less(t, time.Since(start), 5*time.Second)
				wg.Wait()
			}, late)
		})
	}
}

// Close while a cancel waits for its end: that is told, and not that the job has ended.
func TestS45CloseUnderACancel(t *testing.T) {
	t.Parallel()
	for _, l := range []line{streaming, polling} {
		for try := range 10 { // two things happen at once then, and either may be seen first
			t.Run(fmt.Sprintf("%s/%d", l, try), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					l.open(b)
					c := b.client()
					j, err := c.Submit(b.ctx, graphOf(t, "Long", 1))
					require.NoError(t, err)
					b.pod.Inject(comfyuitest.Fault{Route: "POST /", Effect: comfyuitest.Hang, Times: -1})
					cancelled := make(chan error, 1)
					go func() { cancelled <- j.Cancel(b.ctx) }()
					time.Sleep(time.Second)
					require.NoError(t, c.Close())
					var e *comfyui.Error
					require.ErrorAs(t, <-cancelled, &e)
					require.ErrorIs(t, e, comfyui.ErrClosed)
					assert.Equal(t, comfyui.CategoryClosed, e.Category)
					assert.Equal(t, "cancel", e.Op)
					assert.Equal(t, j.ID(), e.JobID)
					assert.Equal(t, j.Pod(), e.Pod)
					require.ErrorIs(t, j.Cancel(b.ctx), comfyui.ErrClosed, "and again")
				})
			})
		}
	}
}

// A Recover that Close or its ctx cuts short has not seen to every job, and says so.
func TestS45RecoverCutShort(t *testing.T) {
	t.Parallel()
	for _, closes := range []bool{true, false} {
		t.Run(fmt.Sprintf("closes=%t", closes), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				_, err := b.client(comfyui.WithStore(store)).Submit(b.ctx, graphOf(t, "Long", 1))
				require.NoError(t, err)
				c := b.client(comfyui.WithStore(store))
				ctx, cancel := context.WithCancelCause(b.ctx)
				cause, category := errors.New("enough"), comfyui.CategoryContext
				time.AfterFunc(2*time.Second, func() {
					if closes {
						_ = c.Close()
					}
					cancel(cause)
				})
				if closes {
					cause, category = comfyui.ErrClosed, comfyui.CategoryClosed
				}
				var errs []error
				for j, err := range c.Recover(ctx) { // the job has an owner, whose lease is waited for
					assert.Nil(t, j)
					errs = append(errs, err)
				}
				require.Len(t, errs, 1)
				require.ErrorIs(t, errs[0], cause)
				assert.Equal(t, category, comfyui.CategoryOf(errs[0]))
			})
		})
	}
}

func TestS45ZeroClient(t *testing.T) {
	t.Parallel()
	var c comfyui.PodClient
	w := graphOf(t, "Work", 1)
	_, err := c.Execute(t.Context(), w)
	require.ErrorIs(t, err, comfyui.ErrClosed)
	_, err = c.Submit(t.Context(), w)
	require.ErrorIs(t, err, comfyui.ErrClosed)
	_, err = c.Attach(t.Context(), "x")
	require.ErrorIs(t, err, comfyui.ErrClosed)
	for _, err := range c.Recover(t.Context()) {
		require.ErrorIs(t, err, comfyui.ErrClosed)
	}
	require.NoError(t, c.Close())
	assert.Equal(t, comfyui.StreamIdle, c.Stats().Stream)
	assert.Empty(t, c.Name())
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var upgrader = websocket.Upgrader{}

// withSockets has the pod's WebSockets served by something else.
func withSockets(serve func(*websocket.Conn)) comfyuitest.Option {
	return comfyuitest.WithHandler(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.HasSuffix(r.URL.Path, "/ws") {
				next.ServeHTTP(w, r)
				return
			}
			conn, err := upgrader.Upgrade(w, r, nil)
			if err != nil {
				return
			}
			defer conn.Close()
			serve(conn)
		})
	})
}

// greet sends the first frame of a pod that knows no feature flags.
func greet(conn *websocket.Conn) {
	_ = conn.WriteMessage(websocket.TextMessage, []byte(`{"type":"status","data":{"status":{"exec_info":{"queue_remaining":0}},"sid":"x"}}`))
}

func wsDialer(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *websocket.Dialer {
	return &websocket.Dialer{NetDialContext: dial}
}
