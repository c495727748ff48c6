package comfyui_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

// traffic counts what is asked of the pod and what is answered.
type traffic struct {
	mu              sync.Mutex
	requests, bytes map[string]int // by method and path, with * for an id
}

func (t *traffic) wrap(next http.Handler) http.Handler {
	t.requests, t.bytes = map[string]int{}, map[string]int{}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/ws") {
			next.ServeHTTP(w, r)
			return
		}
		route := r.Method + " " + r.URL.Path
		for _, long := range []string{"GET /api/jobs/", "POST /api/jobs/", "GET /history/"} {
			if strings.HasPrefix(route, long) {
				route = long + "*"
			}
		}
		t.mu.Lock()
		t.requests[route]++
		t.mu.Unlock()
		next.ServeHTTP(&metered{w, t, route}, r)
	})
}

func (t *traffic) of(route string) (requests, bytes int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.requests[route], t.bytes[route]
}

type metered struct {
	http.ResponseWriter
	to    *traffic
	route string
}

func (m *metered) Write(p []byte) (int, error) {
	n, err := m.ResponseWriter.Write(p)
	m.to.mu.Lock()
	defer m.to.mu.Unlock()
	m.to.bytes[m.route] += n
	return n, err
}

// proxied puts proxies in front of the pod, the outermost first.
func proxied(wraps ...func(http.Handler) http.Handler) comfyuitest.Option {
	return comfyuitest.WithHandler(func(next http.Handler) http.Handler {
		for _, wrap := range slices.Backward(wraps) {
			next = wrap(next)
		}
		return next
	})
}

// heavyGraph is a workflow with much to carry.
func heavyGraph(t *testing.T, class string, seed int) *comfyui.Workflow {
	return parsed(t, fmt.Sprintf(`{"1":{"class_type":%q,"inputs":{"seed":%d,"note":%q}}}`, class, seed, strings.Repeat("x", 140<<10)))
}

// backlog has somebody else run a large prompt for an hour, with another behind it.
func (b *bench) backlog() {
	b.t.Helper()
	other := b.bystander(comfyui.WithClientID("other"))
	for i := range 2 {
		_, err := other.Submit(b.ctx, heavyGraph(b.t, "Hour", 1000+i))
		require.NoError(b.t, err)
	}
	require.NoError(b.t, other.Close())
}

// relieve takes away what backlog has put there.
func (b *bench) relieve() {
	b.t.Helper()
	other := b.strange()
	defer other.CloseIdleConnections()
	req, err := http.NewRequestWithContext(b.ctx, http.MethodGet, b.pod.URL()+"/queue", nil)
	require.NoError(b.t, err)
	resp, err := other.Do(req)
	require.NoError(b.t, err)
	defer resp.Body.Close()
	var queue struct {
		Pending [][]any `json:"queue_pending"`
	}
	require.NoError(b.t, json.NewDecoder(resp.Body).Decode(&queue))
	for _, item := range queue.Pending {
		if strings.Contains(fmt.Sprint(item[2]), "Hour") {
			b.send(http.MethodPost, "/queue", fmt.Sprintf(`{"delete":[%q]}`, item[1]))
		}
	}
	b.pod.Interrupt()
}

const posters = 16 // submissions at one time

// submitMany submits jobs with ids of the caller's, many at one time.
func submitMany(b *bench, c *comfyui.PodClient, jobs int) {
	b.t.Helper()
	var wg sync.WaitGroup
	for worker := range posters {
		wg.Go(func() {
			for i := worker; i < jobs; i += posters {
				_, err := c.Submit(b.ctx, graphOf(b.t, "Work", 100+i), comfyui.WithJobID(fmt.Sprint("job-", i)))
				assert.NoError(b.t, err)
			}
		})
	}
	wg.Wait()
}

// TestS36FirstLooksBehindABacklog: whether the pod has the prompt of a caller's job id already is asked of the prompt, not of the
// whole queue: that would cost the square of what is submitted.
func TestS36FirstLooksBehindABacklog(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		release        string
		jobs           int
		queues, singly int // read at most
	}{
		{"0.5.1", 40, 60, 0},
		{"0.6.0", 100, posters + 4, 200},
		{"0.27.0", 100, posters + 4, 200},
		{"0.33.0", 1000, posters + 4, 2000}, // two attempts each
	} {
		t.Run(c.release, func(t *testing.T) {
			t.Parallel()
			var sent traffic
			bubble(t, func(b *bench) {
				b.raw("Long", 1)
				submitMany(b, b.client(), c.jobs)
				require.Len(b.t, b.pod.Prompts(), 1+c.jobs)
				for _, route := range []string{"GET /queue", "GET /api/jobs/*", "GET /history/*", "GET /system_stats"} {
					n, bytes := sent.of(route)
					b.t.Logf("%d jobs: %s %d times, %d bytes", c.jobs, route, n, bytes)
				}
				queues, _ := sent.of("GET /queue")
				assert.LessOrEqual(b.t, queues, c.queues)
				singly, _ := sent.of("GET /api/jobs/*")
				assert.LessOrEqual(b.t, singly, c.singly)
				looked, _ := sent.of("GET /history")
				assert.Zero(b.t, looked, "nobody asks for a fingerprint")
			}, comfyuitest.WithVersion(c.release), proxied(sent.wrap))
		})
	}
}

// TestS36FirstLooksShareTheQueue: where a pod does not tell of single prompts, those that are looked for at one time share a read.
func TestS36FirstLooksShareTheQueue(t *testing.T) {
	t.Parallel()
	for release, most := range map[string]int{"0.3.40": 12, "0.5.1": 12, "0.33.0": 4} {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				const jobs = 100
				b.raw("Long", 1)
				b.pod.Inject(comfyuitest.Fault{Route: "GET /queue", Effect: comfyuitest.Slow, Delay: 100 * time.Millisecond, Times: -1})
				submitMany(b, b.client(), jobs)
				require.Eventually(b.t, func() bool { return len(b.pod.Prompts()) == 1+jobs }, time.Minute, 10*time.Millisecond)
				read := b.pod.Requests("GET /queue")
				b.t.Logf("%d jobs: /queue read %d times", jobs, read)
				assert.Positive(b.t, read)
				assert.LessOrEqual(b.t, read, most)
			}, comfyuitest.WithVersion(release))
		})
	}
}

// TestS34HeirOfManyUnrecorded: of a process that died between its POSTs and their records, the heir does not read the whole queue for
// each job.
func TestS34HeirOfManyUnrecorded(t *testing.T) {
	t.Parallel()
	const others, jobs = 50, 200
	for _, release := range []string{"0.5.1", "0.27.0", "0.33.0"} {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				b.raw("Long", 1)
				for i := range others {
					b.raw("Work", 2+i)
				}
				store := comfyui.NewMemoryStore()
				p := b.process(storetest.Flaky(store, func(_ context.Context, method string) (error, bool) {
					if method == "Update" {
						return errors.New("down"), false
					}
					return nil, false
				}), nil)
				submitMany(b, p.PodClient, jobs)
				require.Eventually(t, func() bool { return len(b.pod.Prompts()) == 1+others+jobs }, time.Minute, time.Second)
				p.kill()

				asked := func() (queues, rest int) {
					return b.pod.Requests("GET /queue"), b.pod.Requests("GET /history") + b.pod.Requests("GET /api/jobs")
				}
				queues, rest := asked()
				heir := b.client(comfyui.WithStore(store))
				var taken []*comfyui.Job
				for j, err := range heir.Recover(b.ctx) {
					require.NoError(t, err)
					taken = append(taken, j)
				}
				require.Len(t, taken, jobs)
				for _, j := range taken {
					for range j.Events(b.ctx) {
						if j.Progress().Status == comfyui.StatusQueued {
							break
						}
					}
				}
				queuesNow, restNow := asked()
				t.Logf("%d jobs: /queue read %d times, single prompts asked for %d times", jobs, queuesNow-queues, restNow-rest)
				assert.LessOrEqual(t, queuesNow-queues, 10)
				assert.LessOrEqual(t, restNow-rest, 3*jobs)
				for _, j := range taken {
					r, err := j.Wait(b.ctx)
					succeeded(t, r, err)
				}
				for _, prompt := range b.pod.Prompts() {
					assert.Equal(t, 1, prompt.Posts)
					assert.Equal(t, 1, prompt.Runs)
				}
			}, comfyuitest.WithVersion(release), slowAnswer(http.MethodGet, "/queue", 100*time.Millisecond))
		})
	}
}

// jobsAnswer answers GET /api/jobs/{id} for the pod.
func jobsAnswer(answer http.HandlerFunc) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/api/jobs/") {
				answer(w, r)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

// strangeJobs are answers of what is no pod's own /api/jobs.
var strangeJobs = map[string]http.HandlerFunc{
	"empty 404": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) },
	"page": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, "<html><body>404 Not Found</body></html>")
	},
	"other JSON 404": func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"error":"no such route"}`)
	},
	"detail 404": func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"detail":"Not Found"}`)
	},
	"405":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusMethodNotAllowed) },
	"403":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
	"login": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/login", http.StatusFound) },
	"own 500": func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, "500 Internal Server Error\n\nServer got itself in trouble")
	},
	"another's job": func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"id":"somebody-else","status":"completed"}`)
	},
	"another API": func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, `{"id":%q,"status":"IN_QUEUE"}`, r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:])
	},
	"null":   func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `null`) },
	"reset":  func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	"silent": func(_ http.ResponseWriter, r *http.Request) { _ = pause(r.Context(), 15*time.Second) }, // past Timing.Request
}

// TestS36StrangeJobsRoute: what answers under /api/jobs is not the pod. The queue and the history are read instead, and the route is
// not asked again and again.
func TestS36StrangeJobsRoute(t *testing.T) {
	t.Parallel()
	for name, answer := range strangeJobs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var sent traffic
			bubble(t, func(b *bench) {
				t := b.t
				store := newFailover()
				program := func() *comfyui.PodClient {
					return b.client(comfyui.WithStore(store), comfyui.WithTiming(comfyui.Timing{Request: 10 * time.Second}))
				}
				c := program()
				r, err := c.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("first"))
				succeeded(t, r, err)
				store.forget(b)
				for _, again := range []*comfyui.PodClient{c, program()} {
					r, err = again.Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("first"))
					succeeded(t, r, err)
					assert.Equal(t, 1, b.ranOnce().Posts)
					store.forget(b)
				}
				time.Sleep(time.Hour / 2)
				before, _ := sent.of("GET /api/jobs/*")
				for i := range 10 {
					r, err = c.Execute(b.ctx, graphOf(t, "Work", 10+i), comfyui.WithJobID(fmt.Sprint("job-", i)))
					succeeded(t, r, err)
				}
				after, _ := sent.of("GET /api/jobs/*")
				assert.Equal(t, 1, after-before, "asked once")
			}, comfyuitest.WithVersion("0.33.0"), proxied(sent.wrap, jobsAnswer(answer)))
		})
	}
}

// TestS31CancelBehindAStrangeJobsRoute: a proxy that keeps /api/jobs to itself keeps nobody from a cancel.
func TestS31CancelBehindAStrangeJobsRoute(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"empty 404", "page", "other JSON 404", "405", "403", "login", "own 500", "another API", "null"} {
		for _, running := range []bool{true, false} {
			t.Run(fmt.Sprint(name, running), func(t *testing.T) {
				t.Parallel()
				strange := func(next http.Handler) http.Handler {
					return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						if strings.HasPrefix(r.URL.Path, "/api/jobs/") {
							strangeJobs[name](w, r)
							return
						}
						next.ServeHTTP(w, r)
					})
				}
				bubble(t, func(b *bench) {
					t := b.t
					if !running {
						b.raw("Long", 7)
					}
					j, err := b.client().Submit(b.ctx, graphOf(t, "Long", 1))
					require.NoError(t, err)
					time.Sleep(5 * time.Second)
					began := time.Now()
					require.NoError(t, j.Cancel(b.ctx))
					_, err = j.Wait(b.ctx)
					require.ErrorIs(t, err, comfyui.ErrCancelled)
					assert.Less(t, time.Since(began), 10*time.Second)
				}, comfyuitest.WithVersion("0.33.0"), proxied(strange))
			})
		}
	}
}

// TestS12FewJobsBehindALargeQueue: single jobs are asked for, where the pod can do that, and what became of them is noticed as soon.
func TestS12FewJobsBehindALargeQueue(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, release string, extra map[string]any, answer http.HandlerFunc) {
		t.Helper()
		var sent traffic
		proxy := []func(http.Handler) http.Handler{sent.wrap}
		if answer != nil {
			proxy = append(proxy, jobsAnswer(answer))
		}
		bubble(t, func(b *bench) {
			t := b.t
			b.pod.RefuseStreams(http.StatusForbidden)
			b.backlog()
			c := b.client(comfyui.WithTiming(comfyui.Timing{Request: 10 * time.Second}))
			var jobs []*comfyui.Job
			for i := range 3 {
				j, err := c.Submit(b.ctx, graphOf(t, "Work", i), comfyui.WithExtraData(extra), comfyui.WithJobID(fmt.Sprint("job-", i)))
				require.NoError(t, err)
				jobs = append(jobs, j)
			}
			time.Sleep(10 * time.Second)
			before, _ := sent.of("GET /queue")
			time.Sleep(50 * time.Second)
			if after, _ := sent.of("GET /queue"); release != "0.3.64" && extra == nil && answer == nil {
				assert.LessOrEqual(t, after-before, 1)
			}
			for i, j := range jobs {
				assert.Equal(t, 2+i, j.Progress().QueueAhead, "the place in the queue is known")
			}
			relieved := time.Now()
			b.relieve()
			for _, j := range jobs {
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				assert.Equal(t, 1, b.pod.Runs(r.PromptID))
			}
			assert.Less(t, time.Since(relieved), 20*time.Second, "noticed late")
		}, proxied(proxy...), comfyuitest.WithVersion(release), comfyuitest.WithNode("Hour", comfyuitest.Steps(3600, time.Second)))
	}
	for _, release := range []string{"0.3.64", "0.8.0", "0.27.0", "0.33.0"} {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			run(t, release, nil, nil)
		})
		t.Run(release+"/the server stumbles", func(t *testing.T) {
			t.Parallel()
			run(t, release, map[string]any{"extra_pnginfo": map[string]any{"workflow": nil}}, nil)
		})
	}
	for name, answer := range strangeJobs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t, "0.33.0", nil, answer)
		})
	}
}

// TestS2CopiesBehindALargeQueue: single jobs show no copies, so the queue is read where there may be one.
func TestS2CopiesBehindALargeQueue(t *testing.T) {
	t.Parallel()
	everywhere(t, []string{"0.3.64", "0.8.0", "0.33.0"}, []line{streaming, polling}, func(t *testing.T, b *bench, _ line) {
		b.backlog()
		c := b.client()
		before, err := c.Submit(b.ctx, graphOf(t, "Work", 1))
		require.NoError(t, err)
		time.Sleep(20 * time.Second)
		b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 524, Delay: 15 * time.Second})
		j, err := c.Submit(b.ctx, graphOf(t, "Work", 2))
		require.NoError(t, err)
		time.Sleep(20 * time.Second)
		assert.EqualValues(t, 1, c.Stats().DuplicatesRemoved)
		b.relieve()
		r, err := j.Wait(b.ctx)
		succeeded(t, r, err)
		assert.Equal(t, 1, b.pod.Runs(r.PromptID))
		_, err = before.Wait(b.ctx)
		require.NoError(t, err)
	}, comfyuitest.WithNode("Hour", comfyuitest.Steps(3600, time.Second)))
}

// TestS33StallBehindALargeQueue: that the queue moves shows in the whole of it.
func TestS33StallBehindALargeQueue(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		t := b.t
		b.pod.RefuseStreams(http.StatusForbidden)
		other := b.bystander(comfyui.WithClientID("other"))
		for i := range 12 {
			_, err := other.Submit(b.ctx, heavyGraph(t, "Ten", i))
			require.NoError(t, err)
		}
		require.NoError(t, other.Close())
		r, err := b.client().Execute(b.ctx, graphOf(t, "Work", 1), comfyui.WithLimits(comfyui.Limits{Stall: 30 * time.Second}))
		succeeded(t, r, err)
	}, comfyuitest.WithVersion("0.33.0"), comfyuitest.WithNode("Ten", comfyuitest.Steps(10, time.Second)))
}

// TestS4PodBehindARenamingProxy: a proxy that makes the body of POST /prompt anew drops the id, whatever the pod can do. The marker tells.
func TestS4PodBehindARenamingProxy(t *testing.T) {
	t.Parallel()
	rename := comfyuitest.WithHandler(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/prompt") {
				var body map[string]any
				if json.NewDecoder(r.Body).Decode(&body) == nil {
					delete(body, "prompt_id")
				}
				text, _ := json.Marshal(body)
				r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(text)), int64(len(text))
			}
			next.ServeHTTP(w, r)
		})
	})
	for _, fresh := range []bool{true, false} {
		t.Run(fmt.Sprint("another process:", fresh), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				store := newFailover()
				p := b.process(store, nil)
				background(b, p, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
				time.Sleep(3500 * time.Millisecond)
				p.kill()
				store.forget(b)
				heir := b.client(comfyui.WithStore(store))
				if !fresh { // it has posted here before
					_, err := heir.Submit(b.ctx, graphOf(t, "Work", 7), comfyui.WithJobID("another"))
					require.NoError(t, err)
				}
				r, err := heir.Execute(b.ctx, graphOf(t, "Long", 1), comfyui.WithJobID("the-job"))
				succeeded(t, r, err)
				for _, prompt := range b.pod.Prompts() {
					assert.Equal(t, 1, prompt.Runs)
				}
				assert.Len(t, b.pod.Prompts(), map[bool]int{true: 1, false: 2}[fresh])
			}, comfyuitest.WithVersion("0.33.0"), rename)
		})
	}
}

// TestS29AnotherVersionBehindALargeQueue: a pod that comes back as another release is asked in that release's ways.
func TestS29AnotherVersionBehindALargeQueue(t *testing.T) {
	t.Parallel()
	hour := comfyuitest.WithNode("Hour", comfyuitest.Steps(3600, time.Second))
	for _, c := range [][2]string{{"0.33.0", "0.3.40"}, {"0.3.40", "0.33.0"}, {"0.8.0", "0.3.64"}} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				t := b.t
				next := comfyuitest.NewPod(comfyuitest.WithPipes(), comfyuitest.WithVersion(c[1]), hour,
					comfyuitest.WithNode("Work", comfyuitest.Steps(4, 500*time.Millisecond)))
				defer next.Close()
				var now atomic.Pointer[comfyuitest.Pod]
				now.Store(b.pod)
				b.pod.RefuseStreams(http.StatusForbidden)
				next.RefuseStreams(http.StatusForbidden)
				b.backlog()
				transport := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
					return now.Load().DialContext(ctx, network, addr)
				}}
				defer transport.CloseIdleConnections()
				var told atomic.Int32
				logger := slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
					if strings.Contains(a.Value.String(), "the pod has restarted") {
						told.Add(1)
					}
					return a
				}}))
				client := b.client(comfyui.WithHTTPClient(&http.Client{Transport: transport}), comfyui.WithLogger(logger))
				j, err := client.Submit(b.ctx, graphOf(t, "Work", 1), comfyui.WithJobID("first"))
				require.NoError(t, err)
				time.Sleep(10 * time.Second)
				now.Store(next)
				b.pod.Close()
				r, err := j.Wait(b.ctx)
				succeeded(t, r, err)
				assert.Equal(t, 2, r.Attempt)
				for i := range 5 {
					r, err = client.Execute(b.ctx, graphOf(t, "Work", 10+i), comfyui.WithJobID(fmt.Sprint("job-", i)))
					succeeded(t, r, err)
				}
				for _, p := range next.Prompts() {
					assert.Equal(t, 1, p.Posts)
					assert.Equal(t, 1, p.Runs)
				}
				assert.Len(t, next.Prompts(), 6)
				health, err := client.Health(b.ctx)
				require.NoError(t, err)
				assert.Equal(t, c[1], health.Version)
				assert.EqualValues(t, 1, told.Load(), "times that the restart was noticed")
			}, comfyuitest.WithVersion(c[0]), hour)
		})
	}
}

// deaf is a node that hears no interrupt: its job succeeds, whoever cancels it.
var deaf = comfyuitest.WithNode("Deaf", comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
	time.Sleep(8 * time.Second)
	c.Save("images", "output", "deaf.png", []byte("an image"))
	return nil
}})

// TestS31CancelWhileLooksFail: a look that fails does not say that the pod has a job no more. One that is being cancelled would be taken
// for gone, while it runs to its end.
func TestS31CancelWhileLooksFail(t *testing.T) {
	t.Parallel()
	drop := func(route string) comfyuitest.Fault {
		return comfyuitest.Fault{Route: route, Effect: comfyuitest.Drop, Times: -1}
	}
	for name, faults := range map[string][]comfyuitest.Fault{
		"the job cannot be asked for": {drop("GET /jobs")},
		"nor does the queue tell":     {{Route: "GET /jobs", Status: http.StatusForbidden, Times: -1}, drop("GET /queue")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.pod.RefuseStreams(http.StatusForbidden)
				j, err := b.client().Submit(b.ctx, graphOf(b.t, "Deaf", 1))
				require.NoError(b.t, err)
				b.backlog()
				time.Sleep(3500 * time.Millisecond) // the queue is known to be large
				for _, f := range faults {
					heal := b.pod.Inject(f)
					time.AfterFunc(2*time.Second, heal)
				}
				require.NoError(b.t, j.Cancel(b.ctx))
				r, err := j.Wait(b.ctx)
				succeeded(b.t, r, err)
			}, deaf, comfyuitest.WithVersion("0.33.0"), comfyuitest.WithNode("Hour", comfyuitest.Steps(3600, time.Second)))
		})
	}
}

// TestS31CancelWhileTheHistoryFails: what is not in the queue may be in the part of the history that could not be read.
func TestS31CancelWhileTheHistoryFails(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		b.pod.RefuseStreams(http.StatusForbidden)
		heal := b.pod.Inject(comfyuitest.Fault{Route: "GET /history", Effect: comfyuitest.Drop, Times: -1})
		c := b.client()
		var jobs []*comfyui.Job
		for i, class := range []string{"Work", "Work", "Work", "Deaf"} {
			j, err := c.Submit(b.ctx, graphOf(b.t, class, i))
			require.NoError(b.t, err)
			jobs = append(jobs, j)
		}
		time.Sleep(8 * time.Second) // the last one runs
		var cancel sync.WaitGroup
		cancel.Go(func() { assert.NoError(b.t, jobs[3].Cancel(b.ctx)) })
		time.Sleep(time.Minute)
		heal()
		cancel.Wait()
		for _, j := range jobs {
			r, err := j.Wait(b.ctx)
			succeeded(b.t, r, err)
		}
	}, deaf)
}

// TestS3SlowLookAtTheEndOfGrace: what a look says is as old as its beginning. One that began before the end of the grace period and was
// answered after it does not tell that the former owner's POST has not arrived in time.
func TestS3SlowLookAtTheEndOfGrace(t *testing.T) {
	t.Parallel()
	for _, release := range []string{"0.3.64", "0.33.0"} {
		t.Run(release, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.raw("Long", 7)
				store := comfyui.NewMemoryStore()
				b.pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 524, Delay: 33 * time.Second, Times: 1}) // sent after 6 s
				p := b.process(store, nth(1, "pod answers POST /prompt"))
				background(b, p, graphOf(b.t, "Work", 1), comfyui.WithJobID("the-job"))
				time.Sleep(20 * time.Second)
				heir := b.client(comfyui.WithStore(store)) // claims after 30 s, and waits for another 10
				for _, r := range recoverAll(b, heir) {
					assert.Equal(b.t, 1, b.prompt(r.PromptID).Posts)
					assert.Equal(b.t, 1, b.pod.Runs(r.PromptID))
				}
				assert.Len(b.t, b.pod.Prompts(), 2)
			}, comfyuitest.WithVersion(release), slowAnswer(http.MethodGet, "/queue", 6*time.Second))
		})
	}
}
