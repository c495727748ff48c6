package comfyuitest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestJobFrameByFrame(t *testing.T) {
	t.Parallel()
	p := Start(t, WithVersion("0.27.0"))
	s := dial(t, p, "me")
	require.Equal(t, `{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "me"}}`, string(s.next().data))
	id := queue1(t, p, graphOf(
		"1", "EmptyImage", object{{"width", 8}, {"height", 8}, {"batch_size", 1}, {"color", 0}},
		"2", "SaveImage", object{{"images", []any{"1", 0}}, {"filename_prefix", "x"}}), "me")
	require.Equal(t, []string{
		"execution_start", "execution_cached",
		"progress_state", "executing", "progress_state",
		"progress_state", "executing", "executed", "progress_state",
		"execution_success", "executing",
	}, events(s.job()))
	require.Equal(t, "success", at(t, get(t, p, "/history/"+id), id, "status", "status_str"))
}

func TestStepsInABubble(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		began := time.Now()
		id := queue1(t, p, graphOf("1", "Work", nil), "me")
		frames := s.job()
		require.Equal(t, []string{
			"execution_start", "execution_cached", "progress_state", "executing",
			"progress_state", "progress", "progress_state", "progress", "progress_state", "progress",
			"executed", "progress_state", "execution_success", "executing",
		}, events(frames))
		require.Equal(t, `{"type": "progress", "data": {"value": 1, "max": 3, "prompt_id": "`+id+`", "node": "1"}}`, string(frames[5].data))
		require.Equal(t, 3*time.Hour, time.Since(began))
		require.Equal(t, 1, p.Runs(id))
		saved := at(t, get(t, p, "/history/"+id), id, "outputs", "1", "images", 0)
		require.Equal(t, `{"filename": "steps_00001_.png", "subfolder": "", "type": "output"}`, string(pyJSON(saved)))
		require.Equal(t, stepsPNG, do(t, p, http.MethodGet, "/view?filename=steps_00001_.png", "").body)
	}, WithVersion("0.3.64"), WithNode("Work", Steps(3, time.Hour)))
}

func TestPrompts(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		graph := graphOf("1", "Work", nil)
		r := submit(t, p, graph, "me", `"extra_data": {"marker": {"a": 1}, "api_key_comfy_org": "secret"}`)
		require.Equal(t, http.StatusOK, r.status)
		require.NoError(t, p.WaitIdle(t.Context()))
		p.Restart(0)
		prompts := p.Prompts()
		require.Len(t, prompts, 1, "over restarts")
		got := prompts[0]
		require.Equal(t, at(t, r.json(t), "prompt_id"), got.ID)
		require.Equal(t, "me", got.ClientID)
		require.JSONEq(t, graph, string(got.Graph))
		require.Equal(t, json.RawMessage(`{"a": 1}`), got.ExtraData["marker"])
		require.Equal(t, json.RawMessage(`"secret"`), got.ExtraData["api_key_comfy_org"], "as the client sent it")
		require.Equal(t, Prompt{ID: got.ID, Posts: 1, Runs: 1, Ends: 1}, counts(got))
		require.Zero(t, p.Runs("unknown"))
	}, WithNode("Work", Node{Output: true}))
}

func TestRestart(t *testing.T) {
	t.Parallel()
	for _, pipes := range []bool{true, false} {
		for _, down := range []time.Duration{0, 20 * time.Millisecond} {
			name := "over TCP"
			run := func(t *testing.T, f func(t *testing.T, p *Pod), opts ...Option) { t.Helper(); f(t, Start(t, opts...)) }
			if pipes {
				name, run = "over pipes", bubble
			}
			t.Run(name+", down for "+down.String(), func(t *testing.T) {
				t.Parallel()
				run(t, func(t *testing.T, p *Pod) {
					s := dial(t, p, "me")
					queue1(t, p, graphOf("1", "Save", nil), "me")
					s.job()
					running := queue1(t, p, graphOf("1", "Wait", nil), "me")
					s.until("executing")
					queue1(t, p, graphOf("1", "Wait", nil), "me")
					require.Equal(t, http.StatusOK, do(t, p, http.MethodGet, "/view?filename=x.bin&type=temp", "").status)

					p.Restart(down)
					err := s.end()
					require.False(t, websocket.IsCloseError(err, websocket.CloseNormalClosure, websocket.CloseGoingAway), "no close frame: %v", err)
					if down > 0 {
						if pipes { // where no time passes meanwhile
							_, err := p.DialContext(t.Context(), "tcp", "")
							require.ErrorIs(t, err, syscall.ECONNREFUSED)
							require.Zero(t, p.Streams())
						}
						require.NoError(t, p.WaitIdle(t.Context()), "waits until it is there again")
					}
					require.Equal(t, object{}, get(t, p, "/history"))
					require.Empty(t, queueIDs(t, p, "queue_pending"))
					require.Empty(t, queueIDs(t, p, "queue_running"))
					require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/view?filename=x.bin&type=temp", "").status)
					require.Equal(t, http.StatusOK, do(t, p, http.MethodGet, "/view?filename=x.bin&type=output", "").status)
					require.Equal(t, Prompt{ID: running, Posts: 1, Runs: 1}, counts(p.Prompts()[1]))

					back := dial(t, p, "me")
					back.until("status")
					r := submit(t, p, graphOf("1", "Save", nil), "me", "")
					require.Equal(t, int64(0), at(t, r.json(t), "number"), "numbers start at 0 again")
					require.Contains(t, events(back.job()), "executing", "the cache is gone")
				}, WithNode("Wait", Node{Output: true, Run: func(ctx context.Context, c *Call) error {
					<-ctx.Done()
					c.Save("images", "output", "late.bin", []byte("x"))
					c.Progress(1, 1)
					return ctx.Err()
				}}), WithNode("Save", scripted(func(c *Call) error {
					c.Save("images", "output", "x.bin", []byte("x"))
					c.Save("images", "temp", "x.bin", []byte("x"))
					return nil
				})))
			})
		}
	}
}

// TestRestartWhileDown: the newest Restart decides when the server is back.
func TestRestartWhileDown(t *testing.T) {
	t.Parallel()
	up := func(p *Pod) bool {
		_, err := try(p, http.MethodGet, "/prompt", "")
		return err == nil
	}
	bubble(t, func(t *testing.T, p *Pod) {
		p.Restart(time.Hour)
		require.False(t, up(p))
		p.Restart(0)
		require.True(t, up(p), "at once")
		id := queue1(t, p, graphOf("1", "Work", nil), "")
		require.NoError(t, p.WaitIdle(t.Context()))
		time.Sleep(2 * time.Hour)
		require.Contains(t, string(do(t, p, http.MethodGet, "/history", "").body), id, "the first Restart is over")

		p.Restart(time.Minute)
		p.Restart(time.Hour)
		time.Sleep(59 * time.Minute)
		require.False(t, up(p))
		time.Sleep(2 * time.Minute)
		require.True(t, up(p))
	}, WithNode("Work", Node{Output: true}))
	p := Start(t) // whose port must be free again
	for range 20 {
		p.Restart(time.Microsecond)
		p.Restart(0)
		require.True(t, up(p))
	}
}

// TestNodeEndsTheProcess: os._exit in a node.
func TestNodeEndsTheProcess(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		queue1(t, p, graphOf("1", "Crash", nil), "me")
		require.Error(t, s.end())
		_, err := try(p, http.MethodGet, "/prompt", "")
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		time.Sleep(2 * time.Minute)
		require.Equal(t, object{}, get(t, p, "/history"))
	}, WithNode("Crash", scripted(func(c *Call) error { c.Pod().Restart(time.Minute); c.Put("text", "never seen"); return nil })))
}

func TestRestartDuringRequests(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.Inject(Fault{Route: "POST /prompt", Effect: AnswerBefore, Status: 502, Delay: time.Minute})
		require.Equal(t, 502, submit(t, p, graphOf("1", "Work", nil), "", "").status)
		p.Restart(time.Second)
		time.Sleep(2 * time.Minute)
		require.Len(t, p.Prompts(), 1, "a request that a proxy held reaches the new process")
		require.Len(t, get(t, p, "/history"), 1)
	}, WithNode("Work", Node{Output: true}))
}

// TestClose: every goroutine ends, whatever is going on, and all calls afterwards return.
func TestClose(t *testing.T) { //nolint:paralleltest // counts goroutines
	for _, opts := range [][]Option{nil, {WithPipes()}} {
		ignore := goleak.IgnoreCurrent()
		came := make(chan string, 8)
		p := NewPod(append(opts, WithHandler(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				came <- r.URL.Path
				next.ServeHTTP(w, r)
			})
		}), WithNode("Wait", Node{Output: true, Run: func(ctx context.Context, _ *Call) error {
			<-ctx.Done()
			return ctx.Err()
		}}))...)
		s := dial(t, p, "me")
		s.until("status")
		queue1(t, p, graphOf("1", "Wait", nil), "me")
		s.until("executing")
		p.Inject(Fault{Route: "GET /history", Effect: Hang, Times: -1})
		p.Inject(Fault{Route: "GET /queue", Effect: Slow, Delay: time.Hour, Times: -1})
		p.Inject(Fault{Route: "POST /free", Effect: AnswerBefore, Delay: time.Hour})
		do(t, p, http.MethodPost, "/free", `{}`)
		done := make(chan error, 2)
		for _, path := range []string{"/history", "/queue"} {
			go func() {
				_, err := try(p, http.MethodGet, path, "")
				done <- err
			}()
		}
		for seen := map[string]bool{}; !seen["/history"] || !seen["/queue"]; {
			seen[<-came] = true
		}
		thaw := p.Freeze()
		p.Close()
		p.Close()
		thaw()
		require.Error(t, <-done)
		require.Error(t, <-done)
		require.Error(t, s.end())
		_, err := try(p, http.MethodGet, "/prompt", "")
		require.Error(t, err)
		p.Restart(0)
		p.Freeze()()
		p.KillWorker()
		p.Interrupt()
		p.ClearHistory()
		p.CutStreams(CutReset)
		p.SendText("", nil)
		require.Zero(t, p.Streams())
		require.NoError(t, p.WaitIdle(t.Context()))
		goleak.VerifyNone(t, ignore)
	}
}

// TestCloseLeavesBehind: a Run and a proxy that heed no context do not hold up Close for ever.
func TestCloseLeavesBehind(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		said := make(chan string, 1)
		release := make(chan struct{})
		entered := make(chan struct{}, 2)
		p := NewPod(WithPipes(), WithNode("Deaf", scripted(func(*Call) error {
			entered <- struct{}{}
			<-release
			return nil
		})), WithHandler(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				next.ServeHTTP(w, r)
				if r.URL.Path == "/free" {
					entered <- struct{}{}
					<-release
				}
			})
		}))
		p.complain = func(format string, args ...any) { said <- fmt.Sprintf(format, args...) }
		queue1(t, p, graphOf("1", "Deaf", nil), "")
		<-entered
		go func() { _, _ = try(p, http.MethodPost, "/free", "{}") }()
		<-entered
		p.Freeze()
		began := time.Now()
		p.Close()
		require.Equal(t, closePatience, time.Since(began))
		require.Equal(t, "comfyuitest: Close: still running 5s after its context ended: node Deaf, the handler of WithHandler", <-said)
		close(release)
		synctest.Wait()
		p.Close()
		require.Empty(t, said)
	})
}

func TestBadOptions(t *testing.T) {
	t.Parallel()
	for name, bad := range map[string]func(){
		"no class":         func() { WithNode("", Node{}) },
		"inputs":           func() { NewPod(WithNode("Bad", Node{Inputs: map[string]any{"x": 1}})) },
		"negative limit":   func() { WithMaxUpload(-1) },
		"negative history": func() { WithHistorySize(-1) },
		"no handler":       func() { NewPod(WithHandler(func(http.Handler) http.Handler { return nil })) },
		"version":          func() { WithVersion("latest") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.Panics(t, bad)
		})
	}
	p := Start(t)
	require.Panics(t, func() { p.CutStreams(CutDeaf + 1) })
	require.Panics(t, func() { p.RefuseStreams(http.StatusSwitchingProtocols) })
}

// TestBadCall: what a scripted node does wrong is told where its author looks, in the job's error.
func TestBadCall(t *testing.T) {
	t.Parallel()
	for message, bad := range map[string]func(c *Call){
		"a file's type is output": func(c *Call) { c.Save("images", "outputs", "x.png", nil) },
		"a preview is image/jpeg": func(c *Call) { c.Preview("png", nil) },
		"a graph is a JSON":       func(c *Call) { c.Expand([]any{}) },
	} {
		bubble(t, func(t *testing.T, p *Pod) {
			id := queue1(t, p, graphOf("1", "Bad", nil), "")
			require.NoError(t, p.WaitIdle(t.Context()))
			history := string(do(t, p, http.MethodGet, "/history/"+id, "").body)
			require.Contains(t, history, "panic: comfyuitest: ")
			require.Contains(t, history, message)
		}, WithNode("Bad", scripted(func(c *Call) error { bad(c); return nil })))
	}
}

func TestNoUploadLimit(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		require.Equal(t, http.StatusOK, do(t, p, http.MethodGet, "/prompt", "").status)
		require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/userdata/x", "content").status)
	}, WithMaxUpload(0))
}

func TestCloseWhileDown(t *testing.T) {
	t.Parallel()
	p := NewPod()
	p.Restart(time.Hour)
	_, err := p.DialContext(t.Context(), "tcp", "")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	p.Close()
	_, err = p.DialContext(t.Context(), "tcp", "")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}

func TestHandlerInFront(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		require.Equal(t, http.StatusUnauthorized, do(t, p, http.MethodGet, "/comfy/prompt", "").status)
		require.Zero(t, p.Requests(""), "the pod did not see it")
		r, err := send(p, http.MethodGet, "/comfy/prompt", "", http.Header{"Authorization": {"Bearer x"}})
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, r.status)
		p.Inject(Fault{Route: "GET /prompt", Effect: Drop})
		_, err = send(p, http.MethodGet, "/comfy/prompt", "", http.Header{"Authorization": {"Bearer x"}})
		require.NoError(t, err, "net/http repeats a GET on a connection that was used before")
		p.Inject(Fault{Route: "POST /prompt", Effect: Drop})
		_, err = send(p, http.MethodPost, "/comfy/prompt", "{}", http.Header{"Authorization": {"Bearer x"}})
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}, WithHandler(func(next http.Handler) http.Handler {
		next = http.StripPrefix("/comfy", next)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") == "" {
				http.Error(w, "who are you", http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, r)
		})
	}))
}

func TestWaitIdle(t *testing.T) {
	t.Parallel()
	gated(t, false, func(t *testing.T, p *Pod, g *gate) {
		require.NoError(t, p.WaitIdle(t.Context()))
		queue1(t, p, graphOf("1", "Gate", nil), "")
		<-g.entered
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.ErrorIs(t, p.WaitIdle(ctx), context.DeadlineExceeded)
		idle := make(chan error, 1)
		go func() { idle <- p.WaitIdle(t.Context()) }()
		synctest.Wait()
		require.Empty(t, idle)
		g.pass <- struct{}{}
		require.NoError(t, <-idle)
	})
}

func TestVersions(t *testing.T) {
	t.Parallel()
	for _, release := range []string{"0.3.40", "0.3.64", "0.8.0", "0.27.0", "0.33.0", "0.38.0", "v1.2"} {
		bubble(t, func(t *testing.T, p *Pod) {
			queue1(t, p, graphOf("1", "Work", nil), "me")
			require.NoError(t, p.WaitIdle(t.Context()))
			stats := get(t, p, "/system_stats")
			require.Equal(t, p.version.String(), at(t, stats, "system", "comfyui_version"))
		}, WithVersion(release), WithNode("Work", Steps(1, 0)))
	}
	require.Panics(t, func() { WithVersion("new") })
	require.Panics(t, func() { WithVersion("0.3.39") })
}

// TestManyClients: whatever happens at once, every job ends and every client hears of its own.
func TestManyClients(t *testing.T) {
	t.Parallel()
	p := Start(t, WithNode("Work", Steps(3, 0)))
	done := make(chan error, 16)
	for n := range cap(done) {
		go func() {
			done <- func() error {
				name := string(rune('a' + n))
				s, err := tryDial(t, p, name)
				if err != nil {
					return err
				}
				for i := range 20 {
					r, err := try(p, http.MethodPost, "/prompt",
						`{"client_id": "`+name+`", "prompt": `+graphOf("1", "Work", object{{"n", n*100 + i}})+`}`)
					if err != nil || r.status != http.StatusOK {
						return errors.Join(errors.New(string(r.body)), err)
					}
				}
				for range 20 {
					s.job()
				}
				return nil
			}()
		}()
	}
	for range cap(done) {
		require.NoError(t, <-done)
	}
	require.Len(t, p.Prompts(), 320)
	for _, prompt := range p.Prompts() {
		require.Equal(t, 1, prompt.Ends)
	}
}

// fatalT is a T whose Fatal can be seen.
type fatalT struct{ *testing.T }

func (fatalT) Fatal(args ...any) { panic(fmt.Sprint(args...)) }

// A pod on real sockets would hang in a bubble until the test binary gives up: the clock never moves on.
func TestStartTellsThatABubbleNeedsPipes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		require.PanicsWithValue(t, "comfyuitest: in a bubble of testing/synctest a pod needs WithPipes: beside real sockets the bubble's clock stands still",
			func() { Start(fatalT{t}) })
		require.NotPanics(t, func() { Start(fatalT{t}, WithPipes()) })
	})
	require.NotPanics(t, func() { Start(fatalT{t}) })
}

// TestPodsOnPipesHaveURLsOfTheirOwn: a store, say, tells pods apart by their URLs.
func TestPodsOnPipesHaveURLsOfTheirOwn(t *testing.T) {
	t.Parallel()
	a, b := NewPod(WithPipes()), NewPod(WithPipes())
	require.NotEqual(t, a.URL(), b.URL())
	require.Equal(t, http.StatusOK, do(t, a, http.MethodGet, "/prompt", "").status)
	b.Restart(time.Hour)
	_, err := b.DialContext(t.Context(), "tcp", "")
	require.ErrorContains(t, err, strings.TrimPrefix(b.URL(), "http://"))
	for _, p := range []*Pod{a, b, a} {
		p.Close()
		_, err := http.Get(p.URL()) //nolint:bodyclose,noctx // there is none
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
	}
}

// A client that was not given the pipes must not reach a ComfyUI of the developer's own.
func TestPipesStandAtNoRealServersAddress(t *testing.T) {
	t.Parallel()
	pod := Start(t, WithPipes())
	_, err := http.Get(pod.URL()) //nolint:bodyclose,noctx // there is none
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}
