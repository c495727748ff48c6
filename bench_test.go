package comfyui

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/comfypod/comfyui/comfyuitest"
)

// The benchmarks of docs/benchmarks.md. Each stands beside the bare loop that a program without the library would run, as
// sub-benchmarks "library" and "bare" of one name, so that benchstat can set them side by side.

// ------------------------------------------------------------------ frames

// firehose is a pod that has one running job and sends it a prepared batch of frames, over and over.
type firehose struct {
	*httptest.Server
	batch  []byte        // encoded frames
	frames int           // in the batch
	start  chan int      // frames to send
	prompt chan string   // the prompt id of the job that was posted
	sent   chan struct{} // all of them are written
}

// serverFrame encodes an unmasked frame.
func serverFrame(opcode byte, payload []byte) []byte {
	head := []byte{0x80 | opcode}
	switch n := len(payload); {
	case n < 126:
		head = append(head, byte(n))
	case n < 1<<16:
		head = binary.BigEndian.AppendUint16(append(head, 126), uint16(n))
	default:
		head = binary.BigEndian.AppendUint64(append(head, 127), uint64(n))
	}
	return append(head, payload...)
}

func newFirehose(b *testing.B) *firehose {
	f := &firehose{start: make(chan int), prompt: make(chan string, 1), sent: make(chan struct{}, 1)}
	var posted string
	mux := http.NewServeMux()
	mux.HandleFunc("POST /prompt", func(w http.ResponseWriter, r *http.Request) {
		var body struct {
			ID string `json:"prompt_id"`
		}
		_ = json.NewDecoder(r.Body).Decode(&body)
		posted = body.ID
		fmt.Fprintf(w, `{"prompt_id":%q,"number":1,"node_errors":{}}`, body.ID)
		f.prompt <- body.ID
	})
	mux.HandleFunc("GET /queue", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"queue_running":[[1,%q,{},{},[]]],"queue_pending":[]}`, posted)
	})
	mux.HandleFunc("GET /history", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{}`) })
	mux.HandleFunc("GET /ws", func(w http.ResponseWriter, r *http.Request) {
		conn, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer conn.Close()
		_ = conn.WriteMessage(websocket.TextMessage, []byte(`{"type":"status","data":{"status":{"exec_info":{"queue_remaining":0}},"sid":"x"}}`))
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			for {
				if _, _, err := conn.ReadMessage(); err != nil {
					return
				}
			}
		}()
		for {
			select {
			case n := <-f.start:
				f.pour(conn.NetConn(), n)
			case <-gone:
				return
			}
		}
	})
	f.Server = httptest.NewServer(mux)
	b.Cleanup(f.Close)
	return f
}

// fill prepares a batch of about 64 KiB of one frame.
func (f *firehose) fill(opcode byte, payload []byte) {
	frame := serverFrame(opcode, payload)
	f.frames = max(1, (64<<10)/len(frame))
	f.batch = bytes.Repeat(frame, f.frames)
}

func (f *firehose) pour(conn net.Conn, n int) {
	size := len(f.batch) / f.frames
	for n > 0 {
		k := min(n, f.frames)
		if _, err := conn.Write(f.batch[:k*size]); err != nil {
			return
		}
		n -= k
	}
	f.sent <- struct{}{}
}

const benchGraph = `{"1":{"class_type":"KSampler","inputs":{"steps":20}},"2":{"class_type":"SaveImage","inputs":{"images":["1",0]}}}`

// progressFrames are 320 bytes, as a real server's progress_state of one node.
func progressPayload(promptID string) []byte {
	return fmt.Appendf(nil, `{"type": "progress_state", "data": {"prompt_id": %q, "nodes": {"1": {"value": 7, "max": 20, "state": "running", "node_id": "1", "prompt_id": %q, "display_node_id": "1", "parent_node_id": null, "real_node_id": "1"}}}}`+strings.Repeat(" ", 320-294), promptID, promptID)
}

// follow runs a job on the firehose through the library.
func (f *firehose) follow(b *testing.B, opts ...Option) (c *PodClient, promptID string) {
	c, err := NewPodClient(f.URL, opts...)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	w, err := ParseWorkflow([]byte(benchGraph))
	if err != nil {
		b.Fatal(err)
	}
	if _, err := c.Submit(b.Context(), w); err != nil {
		b.Fatal(err)
	}
	return c, <-f.prompt
}

// library measures the whole way of a frame: read, decoded, applied to the job.
func (f *firehose) library(b *testing.B, c *PodClient) {
	b.ReportAllocs()
	before := c.Stats().Frames
	b.ResetTimer()
	f.start <- b.N
	<-f.sent
	for c.Stats().Frames-before < int64(b.N) {
		runtime.Gosched()
	}
}

// dial opens a bare socket.
func (f *firehose) dial(b *testing.B) *websocket.Conn {
	conn, resp, err := websocket.DefaultDialer.DialContext(b.Context(), "ws"+strings.TrimPrefix(f.URL, "http")+"/ws?clientId=bare", nil)
	if err != nil {
		b.Fatal(err)
	}
	_ = resp.Body.Close()
	b.Cleanup(func() { _ = conn.Close() })
	if _, _, err := conn.ReadMessage(); err != nil {
		b.Fatal(err)
	}
	return conn
}

// bareText is gorilla's ReadMessage and encoding/json into type and prompt id.
func (f *firehose) bareText(b *testing.B) {
	conn := f.dial(b)
	b.ReportAllocs()
	b.ResetTimer()
	f.start <- b.N
	for range b.N {
		_, data, err := conn.ReadMessage()
		if err != nil {
			b.Fatal(err)
		}
		var m struct {
			Type string `json:"type"`
			Data struct {
				PromptID string `json:"prompt_id"`
			} `json:"data"`
		}
		if err := json.Unmarshal(data, &m); err != nil {
			b.Fatal(err)
		}
	}
	<-f.sent
}

func BenchmarkProgressFrames(b *testing.B) {
	b.Run("library", func(b *testing.B) {
		f := newFirehose(b)
		c, id := f.follow(b)
		f.fill(websocket.TextMessage, progressPayload(id))
		f.library(b, c)
	})
	b.Run("bare", func(b *testing.B) {
		f := newFirehose(b)
		f.fill(websocket.TextMessage, progressPayload("0f7bd3a0-5c8e-5c0e-9b3a-0f7bd3a05c8e"))
		f.bareText(b)
	})
}

func BenchmarkForeignFrames(b *testing.B) {
	payload := progressPayload("0f7bd3a0-5c8e-5c0e-9b3a-0f7bd3a05c8e")
	b.Run("library", func(b *testing.B) {
		f := newFirehose(b)
		c, _ := f.follow(b)
		f.fill(websocket.TextMessage, payload)
		f.library(b, c)
	})
	b.Run("bare", func(b *testing.B) {
		f := newFirehose(b)
		f.fill(websocket.TextMessage, payload)
		f.bareText(b)
	})
}

// previewPayload is a type 4 frame with 100 KB of image.
func previewPayload(promptID string) []byte {
	meta := fmt.Appendf(nil, `{"node_id":"1","prompt_id":%q,"display_node_id":"1","parent_node_id":null,"real_node_id":"1","image_type":"image/jpeg"}`, promptID)
	p := binary.BigEndian.AppendUint32(nil, 4)
	p = binary.BigEndian.AppendUint32(p, uint32(len(meta)))
	p = append(p, meta...)
	return append(p, bytes.Repeat([]byte{0xff, 0xd8, 0xff, 0x00}, 25<<10)...)
}

func BenchmarkPreviews(b *testing.B) {
	library := func(b *testing.B, opts ...Option) {
		f := newFirehose(b)
		c, id := f.follow(b, opts...)
		f.fill(websocket.BinaryMessage, previewPayload(id))
		b.SetBytes(100 << 10)
		f.library(b, c)
	}
	b.Run("wanted/library", func(b *testing.B) { library(b, WithPreviews()) })
	b.Run("wanted/bare", func(b *testing.B) {
		f := newFirehose(b)
		payload := previewPayload("0f7bd3a0-5c8e-5c0e-9b3a-0f7bd3a05c8e")
		f.fill(websocket.BinaryMessage, payload)
		conn := f.dial(b)
		b.SetBytes(100 << 10)
		b.ReportAllocs()
		b.ResetTimer()
		f.start <- b.N
		for range b.N {
			_, r, err := conn.NextReader()
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(r, make([]byte, len(payload))); err != nil {
				b.Fatal(err)
			}
		}
		<-f.sent
	})
	b.Run("unwanted/library", func(b *testing.B) { library(b) })
}

// -------------------------------------------------------------------- jobs

// quickPod runs nodes that take no time.
func quickPod(b *testing.B) *comfyuitest.Pod {
	return comfyuitest.Start(b, comfyuitest.WithNode("Quick", comfyuitest.Node{
		Output: true,
		Run:    func(_ context.Context, c *comfyuitest.Call) error { c.Put("text", "done"); return nil },
	}))
}

func quickGraph(seed int) []byte {
	return fmt.Appendf(nil, `{"1":{"class_type":"Quick","inputs":{"seed":%d}},"2":{"class_type":"Quick","inputs":{"seed":%d,"in":["1",0]}}}`, seed, seed)
}

// bareClient is the loop that a program without the library runs: POST, listen for the end, GET /history.
type bareClient struct {
	url  string
	id   string
	http http.Client
	conn *websocket.Conn

	mu    sync.Mutex
	waits map[string]chan struct{}
	early map[string]bool // ended before anybody waited
}

func newBareClient(b *testing.B, podURL string) *bareClient {
	c := &bareClient{url: podURL, id: "bare", waits: map[string]chan struct{}{}, early: map[string]bool{}}
	c.http.Transport = &http.Transport{MaxIdleConnsPerHost: 64}
	conn, resp, err := websocket.DefaultDialer.DialContext(b.Context(), "ws"+strings.TrimPrefix(c.url, "http")+"/ws?clientId="+c.id, nil)
	if err != nil {
		b.Fatal(err)
	}
	_ = resp.Body.Close()
	c.conn = conn
	b.Cleanup(func() { _ = conn.Close(); c.http.CloseIdleConnections() })
	go c.listen()
	return c
}

func (c *bareClient) listen() {
	for {
		_, data, err := c.conn.ReadMessage()
		if err != nil {
			return
		}
		var m struct {
			Type string `json:"type"`
			Data struct {
				PromptID string  `json:"prompt_id"`
				Node     *string `json:"node"`
			} `json:"data"`
		}
		if json.Unmarshal(data, &m) != nil || m.Type != "executing" || m.Data.Node != nil {
			continue
		}
		c.mu.Lock()
		if w := c.waits[m.Data.PromptID]; w != nil {
			close(w)
			delete(c.waits, m.Data.PromptID)
		} else {
			c.early[m.Data.PromptID] = true
		}
		c.mu.Unlock()
	}
}

func (c *bareClient) run(graph []byte) error {
	body, err := json.Marshal(map[string]any{"prompt": json.RawMessage(graph), "client_id": c.id})
	if err != nil {
		return err
	}
	var posted struct {
		ID string `json:"prompt_id"`
	}
	if err := c.call(http.MethodPost, "/prompt", body, &posted); err != nil {
		return err
	}
	c.mu.Lock()
	var wait chan struct{}
	if c.early[posted.ID] {
		delete(c.early, posted.ID)
	} else {
		wait = make(chan struct{})
		c.waits[posted.ID] = wait
	}
	c.mu.Unlock()
	if wait != nil {
		<-wait
	}
	var history map[string]struct {
		Outputs map[string]map[string][]any `json:"outputs"`
		Status  struct {
			Status string `json:"status_str"`
		} `json:"status"`
	}
	if err := c.call(http.MethodGet, "/history/"+posted.ID, nil, &history); err != nil {
		return err
	}
	if history[posted.ID].Status.Status != "success" {
		return fmt.Errorf("job %s: %v", posted.ID, history)
	}
	return nil
}

func (c *bareClient) call(method, path string, body []byte, to any) error {
	req, err := http.NewRequestWithContext(context.Background(), method, c.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(resp.Body).Decode(to)
}

func libraryRun(b *testing.B, c *PodClient) func([]byte) error {
	return func(graph []byte) error {
		w, err := ParseWorkflow(graph)
		if err != nil {
			return err
		}
		_, err = c.Execute(b.Context(), w)
		return err
	}
}

func BenchmarkJobs(b *testing.B) {
	one := func(b *testing.B, run func([]byte) error) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if err := run(quickGraph(i)); err != nil {
				b.Fatal(err)
			}
		}
	}
	many := func(b *testing.B, run func([]byte) error) {
		b.ReportAllocs()
		work := make(chan int)
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				for i := range work {
					if err := run(quickGraph(i)); err != nil {
						b.Error(err)
					}
				}
			})
		}
		for i := 0; b.Loop(); i++ {
			work <- i
		}
		close(work)
		wg.Wait()
	}
	for name, loop := range map[string]func(*testing.B, func([]byte) error){"one after another": one, "32 at once": many} {
		b.Run(name+"/library", func(b *testing.B) {
			c, err := NewPodClient(quickPod(b).URL())
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			loop(b, libraryRun(b, c))
			b.ReportMetric(float64(c.Stats().Calls)/float64(c.Stats().Submitted), "calls/job")
		})
		b.Run(name+"/bare", func(b *testing.B) { loop(b, newBareClient(b, quickPod(b).URL()).run) })
	}
}

// BenchmarkRealPod runs a trivial job on the pod that COMFYUI_POD names, through the library and with the bare loop by turns: what else
// the server does falls on both alike. The medians are compared, since a server collects garbage for up to a second now and then.
func BenchmarkRealPod(b *testing.B) {
	podURL := strings.TrimRight(os.Getenv("COMFYUI_POD"), "/")
	if podURL == "" {
		b.Skip("set COMFYUI_POD to the URL of a ComfyUI server to run this (docs/testing.md)")
	}
	c, err := NewPodClient(podURL)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	if err := c.WaitReady(b.Context()); err != nil {
		b.Fatal(err)
	}
	runs := []func([]byte) error{libraryRun(b, c), newBareClient(b, podURL).run}
	var took [2][]time.Duration
	const warmUp = 3
	job := func(i int) time.Duration {
		graph := fmt.Appendf(nil, `{"1":{"class_type":"EmptyImage","inputs":{"width":8,"height":8,"batch_size":1,"color":%d}},`+
			`"2":{"class_type":"PreviewImage","inputs":{"images":["1",0]}}}`, rand.IntN(1<<24)) // new, or the pod would take it from its cache
		began := time.Now()
		if err := runs[i](graph); err != nil {
			b.Fatal(err)
		}
		return time.Since(began)
	}
	for range warmUp {
		job(0)
		job(1)
	}
	for n := 0; b.Loop(); n++ {
		for i := range runs {
			i = (i + n) % len(runs)
			took[i] = append(took[i], job(i))
		}
	}
	median := func(of []time.Duration) float64 {
		slices.Sort(of)
		return float64(of[len(of)/2].Microseconds()) / 1000
	}
	library, bare := median(took[0]), median(took[1])
	b.ReportMetric(0, "ns/op") // of a pair: it tells nothing
	b.ReportMetric(library, "ms-library")
	b.ReportMetric(bare, "ms-bare")
	b.ReportMetric(library/bare, "x-bare")
	b.ReportMetric(float64(c.Stats().Calls)/float64(c.Stats().Submitted), "calls/job")
}

// BenchmarkTerminalToWait measures the time from the pod's terminal frame to the return of Wait, over a live stream.
func BenchmarkTerminalToWait(b *testing.B) {
	var mu sync.Mutex
	var ended time.Time
	pod := comfyuitest.Start(b, comfyuitest.WithNode("Quick", comfyuitest.Node{
		Output: true,
		Run: func(_ context.Context, c *comfyuitest.Call) error {
			c.Put("text", "done")
			mu.Lock()
			ended = time.Now()
			mu.Unlock()
			return nil
		},
	}))
	c, err := NewPodClient(pod.URL())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	run := libraryRun(b, c)
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		if err := run(quickGraph(i)); err != nil {
			b.Fatal(err)
		}
		mu.Lock()
		took = append(took, time.Since(ended))
		mu.Unlock()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "µs-p50")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "µs-p99")
}

// BenchmarkFollowed measures what 10,000 queued jobs cost the client in memory and goroutines, their workflows apart.
func BenchmarkFollowed(b *testing.B) {
	const jobs = 10_000
	for b.Loop() {
		f := newFirehose(b)
		c, err := NewPodClient(f.URL, WithTiming(Timing{Poll: time.Hour, PollStreaming: -1}))
		if err != nil {
			b.Fatal(err)
		}
		go func() {
			for range jobs + 1 {
				<-f.prompt
			}
		}()
		w, err := ParseWorkflow([]byte(benchGraph))
		if err != nil {
			b.Fatal(err)
		}
		submit := func(n int) {
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					for range n / 16 {
						if _, err := c.Submit(b.Context(), w); err != nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
		}
		if _, err := c.Submit(b.Context(), w); err != nil {
			b.Fatal(err)
		}
		heap := func() (uint64, int) {
			c.endpoint.own.CloseIdleConnections() // they come with a burst of calls, not with the jobs, and go by themselves
			time.Sleep(200 * time.Millisecond)    // workers and the server's connections settle
			runtime.GC()
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.HeapAlloc, runtime.NumGoroutine()
		}
		bytesBefore, goroutinesBefore := heap()
		submit(jobs)
		bytesAfter, goroutinesAfter := heap()
		b.ReportMetric(float64(bytesAfter-bytesBefore)/jobs, "B/job")
		b.ReportMetric(float64(goroutinesAfter-goroutinesBefore), "goroutines-more")
		_ = c.Close()
		f.CloseClientConnections()
	}
}

// BenchmarkPolledEnd measures the time from the end of a job on the pod to the return of Wait while sockets are refused for good:
// at most Timing.Poll and one round trip.
func BenchmarkPolledEnd(b *testing.B) {
	const poll = 20 * time.Millisecond
	ended := make(chan time.Time, 1)
	pod := comfyuitest.Start(b, comfyuitest.WithNode("Quick", comfyuitest.Node{
		Output: true,
		Run: func(ctx context.Context, c *comfyuitest.Call) error {
			select { // ends somewhere between two looks
			case <-time.After(poll + time.Duration(rand.Int64N(int64(poll)))):
			case <-ctx.Done():
			}
			c.Put("text", "done")
			return nil
		},
	}))
	pod.RefuseStreams(http.StatusForbidden)
	c, err := NewPodClient(pod.URL(), WithTiming(Timing{Poll: poll}))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		w, err := ParseWorkflow(fmt.Appendf(nil, `{"1":{"class_type":"Quick","inputs":{"seed":%d}}}`, i))
		if err != nil {
			b.Fatal(err)
		}
		j, err := c.Submit(b.Context(), w)
		if err != nil {
			b.Fatal(err)
		}
		go func() {
			_ = pod.WaitIdle(b.Context())
			ended <- time.Now()
		}()
		if _, err := j.Wait(b.Context()); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(<-ended))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2])/float64(poll), "polls-p50")
	b.ReportMetric(float64(took[len(took)*99/100])/float64(poll), "polls-p99")
}
