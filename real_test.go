package comfyui_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	_ "image/jpeg"
	"image/png"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
)

// TestRealPod does to the pod that COMFYUI_POD names what a program does; docs/testing.md says how to run it. It uses the pod's
// own nodes, and those of testdata/probe_nodes where they are installed. It takes its own prompts off the pod at the end and
// touches nobody else's.
func TestRealPod(t *testing.T) {
	p := namedPod(t)
	for _, c := range []struct {
		name   string
		probes bool // needs the nodes of testdata/probe_nodes
		test   func(r *realRun)
	}{
		{"ready", false, (*realRun).ready},
		{"routes", false, (*realRun).routes},
		{"images", false, (*realRun).images},
		{"invalid workflows", false, (*realRun).invalid},
		{"partly valid", false, (*realRun).partlyValid},
		{"upload", false, (*realRun).upload},
		{"upload mask", false, (*realRun).uploadMask},
		{"same job id", false, (*realRun).sameJobID},
		{"two clients", false, (*realRun).twoClients},
		{"steps and previews", true, (*realRun).stepsAndPreviews},
		{"without previews", true, (*realRun).withoutPreviews},
		{"repeated steps", true, (*realRun).repeatedSteps},
		{"execution errors", true, (*realRun).executionErrors},
		{"out of memory twice", true, (*realRun).outOfMemoryTwice},
		{"blocked", true, (*realRun).blocked},
		{"expansion", true, (*realRun).expansion},
		{"odd outputs", true, (*realRun).oddOutputs},
		{"many files", true, (*realRun).manyFiles},
		{"unknown frames", true, (*realRun).unknownFrames},
		{"queue order", true, (*realRun).queueOrder},
		{"cancel pending", true, (*realRun).cancelPending},
		{"cancel running", true, (*realRun).cancelRunning},
		{"cancel silent node", true, (*realRun).cancelSilentNode},
		{"cancel last node", true, (*realRun).cancelLastNode},
		{"cancel with context", true, (*realRun).cancelWithContext},
		{"run limit", true, (*realRun).runLimit},
		{"interrupted by others", true, (*realRun).interruptedByOthers},
		{"removed by others", true, (*realRun).removedByOthers},
		{"closed and recovered", true, (*realRun).closedAndRecovered},
		{"frozen", true, (*realRun).frozen},
		{"socket cut", true, (*realRun).socketCut},
		{"socket cut at the end", false, (*realRun).socketCutAtTheEnd},
		{"sockets cut at random", false, (*realRun).socketsCutAtRandom},
		{"no socket", false, (*realRun).noSocket},
		{"lost post", false, (*realRun).lostPost},
		{"unreachable", true, (*realRun).unreachable},
		{"restart", true, (*realRun).restart},
		{"restart at most once", true, (*realRun).restartAtMostOnce},
		{"dead worker", true, (*realRun).deadWorker},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.probes && !p.probes {
				t.Skip("the pod has not the nodes of testdata/probe_nodes (docs/testing.md)")
			}
			c.test(newRealRun(t, p))
		})
	}
}

// realPod is the pod that COMFYUI_POD names.
type realPod struct {
	url     string
	version string
	probes  bool
}

// since tells whether the pod is of a release or a later one.
func (p realPod) since(release string) bool {
	numbers := func(version string) (ns []int) {
		for part := range strings.SplitSeq(version, ".") {
			n, _ := strconv.Atoi(part)
			ns = append(ns, n)
		}
		return ns
	}
	return slices.Compare(numbers(p.version), numbers(release)) >= 0
}

func namedPod(t *testing.T) realPod {
	t.Helper()
	p := realPod{url: strings.TrimRight(os.Getenv("COMFYUI_POD"), "/")}
	if p.url == "" {
		t.Skip("set COMFYUI_POD to the URL of a ComfyUI server to run this (docs/testing.md)")
	}
	if !strings.Contains(p.url, "://") {
		p.url = "http://" + p.url
	}
	c, err := comfyui.NewPodClient(p.url)
	require.NoError(t, err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	require.NoError(t, c.WaitReady(ctx))
	stats, err := c.SystemStats(ctx)
	require.NoError(t, err)
	p.version = stats.Version
	info, err := c.ObjectInfo(ctx, "ProbeSleep")
	p.probes = err == nil && info["ProbeSleep"] != nil
	return p
}

// realRun is one test on a real pod.
type realRun struct {
	*testing.T
	pod realPod
	ctx context.Context //nolint:containedctx // of the test

	mu   sync.Mutex
	jobs []*comfyui.Job
}

func newRealRun(t *testing.T, p realPod) *realRun {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	t.Cleanup(cancel)
	r := &realRun{T: t, pod: p, ctx: ctx}
	t.Cleanup(r.sweep) // when the clients are closed
	return r
}

// part runs a part of the test by itself.
func (r *realRun) part(name string, test func(r *realRun)) {
	r.Helper()
	r.Run(name, func(t *testing.T) { test(newRealRun(t, r.pod)) })
}

// sweep takes what this test has left off the pod.
func (r *realRun) sweep() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, j := range r.jobs {
		if _, err := j.Wait(ctx); comfyui.CategoryOf(err) != comfyui.CategoryClosed || j.PromptID() == "" {
			continue
		}
		r.post(ctx, "/queue", fmt.Sprintf(`{"delete":[%q]}`, j.PromptID()))
		if queue := r.text(ctx, "/queue"); strings.Contains(queue, j.PromptID()) {
			r.post(ctx, "/interrupt", fmt.Sprintf(`{"prompt_id":%q}`, j.PromptID()))
		}
	}
}

// text reads a route without the library.
func (r *realRun) text(ctx context.Context, path string) string {
	r.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.pod.url+path, nil)
	require.NoError(r, err)
	return r.send(req)
}

func (r *realRun) post(ctx context.Context, path, body string) {
	r.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.pod.url+path, strings.NewReader(body))
	require.NoError(r, err)
	req.Header.Set("Content-Type", "application/json")
	r.send(req)
}

func (r *realRun) send(req *http.Request) string {
	r.Helper()
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	require.NoError(r, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(r, err)
	require.Equal(r, http.StatusOK, resp.StatusCode, "%s %s: %s", req.Method, req.URL.Path, body)
	return string(body)
}

func (r *realRun) client(opts ...comfyui.Option) *comfyui.PodClient {
	r.Helper()
	return r.clientOf(r.pod.url, opts...)
}

// hasty notices in seconds what a client with the default timing notices in minutes.
var hasty = comfyui.WithTiming(comfyui.Timing{
	Ping: 500 * time.Millisecond, ReconnectMin: 100 * time.Millisecond, ReconnectMax: time.Second, Poll: 200 * time.Millisecond,
	PollStreaming: 2 * time.Second, Grace: 2 * time.Second, Settle: 3 * time.Second,
})

func (r *realRun) clientOf(podURL string, opts ...comfyui.Option) *comfyui.PodClient {
	r.Helper()
	c, err := comfyui.NewPodClient(podURL, opts...)
	require.NoError(r, err)
	r.Cleanup(func() { assert.NoError(r, c.Close()) })
	return c
}

// submit runs a workflow and remembers the job for sweep.
func (r *realRun) submit(c *comfyui.PodClient, w *comfyui.Workflow, opts ...comfyui.JobOption) *comfyui.Job {
	r.Helper()
	j, err := c.Submit(r.ctx, w, opts...)
	require.NoError(r, err)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.jobs = append(r.jobs, j)
	return j
}

// follow submits a job and records its events.
func (r *realRun) follow(c *comfyui.PodClient, w *comfyui.Workflow, opts ...comfyui.JobOption) (*comfyui.Job, *recorder) {
	r.Helper()
	rec := &recorder{more: make(chan struct{}, 1)}
	return r.submit(c, w, append(opts, comfyui.OnEvent(rec.take))...), rec
}

// end waits for a job's end and looks at all its events: Fraction never falls, and the end comes last.
func (r *realRun) end(j *comfyui.Job, rec *recorder) (*comfyui.Result, []comfyui.Event, error) {
	r.Helper()
	result, err := j.Wait(r.ctx)
	require.NotNil(r, result, "error: %v", err)
	rec.until(r, "end", func(e comfyui.Event) bool { return e.Progress.Status.Terminal() })
	events := rec.all()
	fraction := 0.0
	for i, e := range events {
		assert.GreaterOrEqual(r, e.Progress.Fraction, fraction, "event %d, %s", i, e.Kind)
		fraction = e.Progress.Fraction
		assert.Equal(r, i == len(events)-1, e.Progress.Status.Terminal(), "event %d, %s", i, e.Kind)
		if e.Kind != comfyui.EventSucceeded {
			assert.Less(r, e.Progress.Fraction, 1.0, "event %d, %s", i, e.Kind)
		}
	}
	if err == nil {
		assert.Equal(r, comfyui.StatusSucceeded, result.Status)
		assert.InDelta(r, 1, fraction, 0)
	}
	return result, events, err
}

// run is submit, follow and end of a job that succeeds.
func (r *realRun) run(c *comfyui.PodClient, w *comfyui.Workflow, opts ...comfyui.JobOption) (*comfyui.Result, []comfyui.Event) {
	r.Helper()
	j, rec := r.follow(c, w, opts...)
	result, events, err := r.end(j, rec)
	require.NoError(r, err)
	return result, events
}

// fail is the same for a job that does not.
func (r *realRun) fail(c *comfyui.PodClient, w *comfyui.Workflow, opts ...comfyui.JobOption) (*comfyui.Result, error) {
	r.Helper()
	j, rec := r.follow(c, w, opts...)
	result, _, err := r.end(j, rec)
	require.Error(r, err)
	assert.NotEqual(r, comfyui.StatusSucceeded, result.Status)
	return result, err
}

// ranOnce asks the pod itself: one prompt of the job in its history, none in its queue, and that one was not taken from the
// cache, as a second run of it would have been.
func (r *realRun) ranOnce(result *comfyui.Result) {
	r.Helper()
	mark := regexp.MustCompile(`"job_id": ?` + regexp.QuoteMeta(fmt.Sprintf("%q", result.JobID)))
	assert.Empty(r, mark.FindAllString(r.text(r.ctx, "/queue"), -1), "prompts in the queue")
	assert.Len(r, mark.FindAllString(r.text(r.ctx, "/history?max_items=200"), -1), 1, "prompts in the history")
	assert.Empty(r, cachedNodes(r.text(r.ctx, "/history/"+result.PromptID)), "nodes from the cache")
}

// cachedNodes reads execution_cached of a history entry.
func cachedNodes(history string) string {
	found := regexp.MustCompile(`"execution_cached", \{"nodes": \[([^\]]*)\]`).FindStringSubmatch(history)
	if found == nil {
		return "no execution_cached in " + history
	}
	return found[1]
}

func isStream(state comfyui.StreamState) func(comfyui.Event) bool {
	return func(e comfyui.Event) bool { return e.Kind == comfyui.EventStream && e.Stream == state }
}

// recorder keeps a job's events.
type recorder struct {
	more chan struct{}

	mu     sync.Mutex
	events []comfyui.Event
}

func (rec *recorder) take(e comfyui.Event) {
	rec.mu.Lock()
	rec.events = append(rec.events, e)
	rec.mu.Unlock()
	select {
	case rec.more <- struct{}{}:
	default:
	}
}

func (rec *recorder) all() []comfyui.Event {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return slices.Clone(rec.events)
}

func (rec *recorder) count(are func(comfyui.Event) bool) int {
	n := 0
	for _, e := range rec.all() {
		if are(e) {
			n++
		}
	}
	return n
}

// until waits for an event.
func (rec *recorder) until(r *realRun, what string, is func(comfyui.Event) bool) {
	r.Helper()
	rec.untilSo(r, what, 1, is)
}

// untilSo waits for so many events.
func (rec *recorder) untilSo(r *realRun, what string, many int, are func(comfyui.Event) bool) {
	r.Helper()
	for rec.count(are) < many {
		select {
		case <-rec.more:
		case <-r.ctx.Done():
			require.Fail(r, "no such event", "%d × %s: got %v", many, what, kindsOf(rec.all()))
		}
	}
}

func (rec *recorder) untilKind(r *realRun, kind comfyui.EventKind) {
	r.Helper()
	rec.until(r, string(kind), func(e comfyui.Event) bool { return e.Kind == kind })
}

func kindsOf(events []comfyui.Event) []comfyui.EventKind {
	kinds := make([]comfyui.EventKind, 0, len(events))
	for _, e := range events {
		kinds = append(kinds, e.Kind)
	}
	return kinds
}

// ----------------------------------------------------------------- workflows

// node is one node of a workflow: its class and inputs. A link is link("1").
type node struct {
	class  string
	inputs inputs
}

type (
	nodes  map[string]node
	inputs map[string]any
)

func link(id string) []any { return []any{id, 0} }

func (r *realRun) workflow(ns nodes) *comfyui.Workflow {
	r.Helper()
	graph := map[string]any{}
	for id, n := range ns {
		graph[id] = map[string]any{"class_type": n.class, "inputs": n.inputs}
	}
	data, err := json.Marshal(graph)
	require.NoError(r, err)
	w, err := comfyui.ParseWorkflow(data)
	require.NoError(r, err)
	return w
}

// fresh is a number that no run has used: it defeats the pod's cache.
func fresh() int { return rand.IntN(1 << 24) }

// picture is a workflow that saves one image of 32 × 24 pixels in a colour.
func (r *realRun) picture(rgb int) *comfyui.Workflow {
	r.Helper()
	return r.workflow(nodes{
		"1": {"EmptyImage", inputs{"width": 16, "height": 16, "batch_size": 1, "color": rgb}},
		"2": {"ImageScale", inputs{"image": link("1"), "upscale_method": "nearest-exact", "width": 32, "height": 24, "crop": "disabled"}},
		"3": {"SaveImage", inputs{"images": link("2"), "filename_prefix": "comfyui_go/real"}},
	})
}

// slow is a workflow of so many steps; with a fresh seed.
func (r *realRun) slow(steps int, seconds float64, more inputs) *comfyui.Workflow {
	r.Helper()
	in := inputs{"steps": steps, "seconds": seconds, "seed": fresh()}
	maps.Copy(in, more)
	return r.workflow(nodes{
		"1": {"ProbeSleep", in},
		"2": {"SaveImage", inputs{"images": link("1"), "filename_prefix": "comfyui_go/slow"}},
	})
}

func (r *realRun) decodePNG(path string) image.Image {
	r.Helper()
	file, err := os.Open(path)
	require.NoError(r, err)
	defer file.Close()
	img, err := png.Decode(file)
	require.NoError(r, err)
	return img
}

func colourOf(img image.Image) int {
	c := color.NRGBAModel.Convert(img.At(0, 0)).(color.NRGBA)
	return int(c.R)<<16 | int(c.G)<<8 | int(c.B)
}

// ---------------------------------------------------------------- the main path

func (r *realRun) ready() {
	c := r.client()
	require.NoError(r, c.WaitReady(r.ctx))
	h, err := c.Health(r.ctx)
	require.NoError(r, err)
	assert.Contains(r, []comfyui.HealthState{comfyui.HealthReady, comfyui.HealthBusy}, h.State, "%v", h.Reasons)
	assert.NotEmpty(r, h.Version)
	assert.NotEmpty(r, h.Devices)
	assert.Positive(r, h.Latency)
	r.Logf("ComfyUI %s, %s, node pack: %t", h.Version, h.State, r.pod.probes)
}

func (r *realRun) images() {
	c := r.client()
	rgb := fresh()
	result, events := r.run(c, r.picture(rgb), comfyui.WithLabels(map[string]string{"suite": "real"}))
	r.ranOnce(result)
	assert.Equal(r, map[string]string{"suite": "real"}, result.Labels)
	assert.Empty(r, result.CachedNodes)
	assert.Empty(r, result.Warnings)
	assert.False(r, result.StartedAt.Before(result.CreatedAt) || result.FinishedAt.Before(result.StartedAt), "%+v", result)
	require.Len(r, result.Outputs, 1)
	assert.Equal(r, "3", result.Outputs[0].Node)
	assert.Equal(r, "images", result.Outputs[0].Key)
	kinds := kindsOf(events)
	for _, kind := range []comfyui.EventKind{comfyui.EventQueued, comfyui.EventStarted, comfyui.EventNode, comfyui.EventOutput, comfyui.EventSucceeded} {
		assert.Contains(r, kinds, kind)
	}
	last := events[len(events)-1]
	assert.Equal(r, 3, last.Progress.NodesDone)
	assert.Equal(r, 3, last.Progress.NodesTotal)
	assert.Equal(r, result.Outputs, last.Outputs)

	dir := r.TempDir()
	paths, err := result.SaveAll(r.ctx, dir)
	require.NoError(r, err)
	require.Len(r, paths, 1)
	assert.Equal(r, filepath.Join(dir, "comfyui_go"), filepath.Dir(paths[0]), "the subfolder is kept")
	img := r.decodePNG(paths[0])
	assert.Equal(r, image.Pt(32, 24), img.Bounds().Size())
	assert.Equal(r, rgb, colourOf(img))
	again, err := result.SaveAll(r.ctx, dir)
	require.NoError(r, err)
	assert.Equal(r, paths, again, "an equal file is kept")

	w, err := comfyui.LoadWorkflow(paths[0])
	require.NoError(r, err, "the picture carries its workflow, unless the pod runs with --disable-metadata")
	cached, _ := r.run(c, w)
	assert.ElementsMatch(r, []string{"1", "2", "3"}, cached.CachedNodes)
	assert.NotEqual(r, result.PromptID, cached.PromptID)
	require.Len(r, cached.Outputs, 1)
	assert.Equal(r, result.Outputs[0].File, cached.Outputs[0].File)
}

func (r *realRun) sameJobID() {
	c := r.client()
	id, w := fmt.Sprint("real-", fresh()), r.picture(fresh())
	var wg sync.WaitGroup
	results := make([]*comfyui.Result, 4)
	for i := range results {
		wg.Go(func() {
			var err error
			results[i], err = c.Execute(r.ctx, w, comfyui.WithJobID(id))
			assert.NoError(r, err)
		})
	}
	wg.Wait()
	for _, result := range results {
		require.NotNil(r, result)
		assert.Equal(r, results[0].Outputs, result.Outputs)
	}
	r.ranOnce(results[0])
	_, err := c.Execute(r.ctx, r.picture(fresh()), comfyui.WithJobID(id))
	require.ErrorIs(r, err, comfyui.ErrJobConflict)

	// Another process that lost its records finds the prompt by its id.
	other := r.client()
	result, err := other.Execute(r.ctx, w, comfyui.WithJobID(id))
	require.NoError(r, err)
	assert.Equal(r, results[0].PromptID, result.PromptID)
	r.ranOnce(result)
}

// twoClients share the pod; each gets what it asked for.
func (r *realRun) twoClients() {
	clients := []*comfyui.PodClient{r.client(), r.client(comfyui.WithTiming(comfyui.Timing{PollStreaming: time.Second}))}
	dir := r.TempDir()
	var wg sync.WaitGroup
	for _, c := range clients {
		for range 6 {
			wg.Go(func() {
				rgb := fresh()
				j, err := c.Submit(r.ctx, r.picture(rgb))
				if !assert.NoError(r, err) {
					return
				}
				result, err := j.Wait(r.ctx)
				if !assert.NoError(r, err) || !assert.Len(r, result.Outputs, 1) {
					return
				}
				path, err := result.Outputs[0].Save(r.ctx, dir)
				if assert.NoError(r, err) {
					assert.Equal(r, rgb, colourOf(r.decodePNG(path)))
				}
				r.ranOnce(result)
			})
		}
	}
	wg.Wait()
	for _, c := range clients {
		s := c.Stats()
		assert.EqualValues(r, 6, s.Succeeded)
		assert.EqualValues(r, 6, s.Attempts)
		assert.Zero(r, s.AmbiguousPosts+s.DuplicatesRemoved+s.Retries+s.Deaf+s.DialErrors, "%+v", s)
	}
}

func (r *realRun) invalid() {
	c := r.client()
	save := node{"SaveImage", inputs{"images": link("1"), "filename_prefix": "x"}}
	for name, w := range map[string]struct {
		nodes    nodes
		category comfyui.Category
		node     string // that has an error
	}{
		"unknown class":      {nodes{"1": {"NoSuchNodeAnywhere", inputs{}}, "2": save}, comfyui.CategoryMissingAsset, ""},
		"missing input":      {nodes{"1": {"EmptyImage", inputs{"width": 16}}, "2": save}, comfyui.CategoryValidation, "1"},
		"too small":          {nodes{"1": {"EmptyImage", inputs{"width": -1, "height": 16, "batch_size": 1, "color": 0}}, "2": save}, comfyui.CategoryValidation, "1"},
		"no such model":      {nodes{"1": {"CheckpointLoaderSimple", inputs{"ckpt_name": "no such model.safetensors"}}, "2": {"PreviewAny", inputs{"source": link("1")}}}, comfyui.CategoryMissingAsset, "1"},
		"no output":          {nodes{"1": {"EmptyImage", inputs{"width": 16, "height": 16, "batch_size": 1, "color": 0}}}, comfyui.CategoryValidation, ""},
		"no such input file": {nodes{"1": {"LoadImage", inputs{"image": "no such file.png"}}, "2": save}, comfyui.CategoryMissingAsset, "1"},
	} {
		r.part(name, func(r *realRun) {
			var e *comfyui.Error
			result, err := c.Execute(r.ctx, r.workflow(w.nodes))
			require.ErrorAs(r, err, &e)
			var v *comfyui.ValidationError
			require.ErrorAs(r, err, &v)
			assert.Equal(r, w.category, e.Category, "%v", err)
			assert.Equal(r, comfyui.StatusFailed, e.Status)
			if w.node != "" {
				assert.NotEmpty(r, v.Nodes[w.node].Errors, "%v", err)
			}
			if result != nil {
				assert.Equal(r, comfyui.StatusFailed, result.Status)
			}
			r.Log(err)
		})
	}
	assert.EqualValues(r, 6, c.Stats().Attempts, "one POST each")
}

// partlyValid: one output can run, the other cannot.
func (r *realRun) partlyValid() {
	c := r.client()
	ns := func() nodes {
		return nodes{
			"1": {"EmptyImage", inputs{"width": 8, "height": 8, "batch_size": 1, "color": fresh()}},
			"2": {"SaveImage", inputs{"images": link("1"), "filename_prefix": "comfyui_go/partly"}},
			"3": {"SaveImage", inputs{"filename_prefix": "comfyui_go/partly"}},
		}
	}
	var v *comfyui.ValidationError
	result, err := r.fail(c, r.workflow(ns()))
	require.ErrorAs(r, err, &v)
	assert.Contains(r, v.Nodes, "3")
	assert.Equal(r, comfyui.CategoryValidation, comfyui.CategoryOf(err))
	assert.Equal(r, comfyui.StatusFailed, result.Status)
	for _, o := range result.Outputs { // what the rest had made before it could be taken off the pod
		assert.Equal(r, "2", o.Node)
	}

	result, _ = r.run(c, r.workflow(ns()), comfyui.AllowPartial())
	require.Len(r, result.Outputs, 1)
	require.Len(r, result.Warnings, 1)
	require.ErrorAs(r, result.Warnings[0], &v)
	r.ranOnce(result)
}

// -------------------------------------------------------------------- files

// pngOf is a picture as a caller has one.
func (r *realRun) pngOf(rgb, side int) []byte {
	r.Helper()
	img := image.NewNRGBA(image.Rect(0, 0, side, side))
	for i := range side * side {
		img.Set(i%side, i/side, color.NRGBA{uint8(rgb >> 16), uint8(rgb >> 8), uint8(rgb), 255})
	}
	var b bytes.Buffer
	require.NoError(r, png.Encode(&b, img))
	return b.Bytes()
}

func (r *realRun) upload() {
	c := r.client()
	name := fmt.Sprintf("comfyui_go_%06x.png", fresh())
	one, two := r.pngOf(fresh(), 8), r.pngOf(fresh(), 8)
	first, err := c.Upload(r.ctx, name, bytes.NewReader(one))
	require.NoError(r, err)
	assert.Equal(r, comfyui.FileRef{Filename: name, Type: "input"}, first)
	same, err := c.Upload(r.ctx, name, bytes.NewReader(one))
	require.NoError(r, err)
	assert.Equal(r, first, same)
	renamed, err := c.Upload(r.ctx, name, bytes.NewReader(two))
	require.NoError(r, err)
	assert.NotEqual(r, first, renamed, "other content under the same name")
	replaced, err := c.Upload(r.ctx, name, bytes.NewReader(two), comfyui.UploadOverwrite(), comfyui.UploadSubfolder("comfyui_go"))
	require.NoError(r, err)
	assert.Equal(r, comfyui.FileRef{Filename: name, Subfolder: "comfyui_go", Type: "input"}, replaced)
	for ref, want := range map[comfyui.FileRef][]byte{first: one, renamed: two, replaced: two} {
		assert.Equal(r, want, r.read(c, ref), "%s", ref)
	}

	// A job that brings its picture along: the pod renames it, and the workflow gets that name.
	rgb := fresh()
	w := r.workflow(nodes{
		"1": {"LoadImage", inputs{"image": "to be uploaded"}},
		"2": {"SaveImage", inputs{"images": link("1"), "filename_prefix": "comfyui_go/loaded"}},
	})
	result, _ := r.run(c, w, comfyui.WithInput("LoadImage", "image", name, func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(r.pngOf(rgb, 20))), nil
	}))
	r.ranOnce(result)
	path, err := result.Outputs[0].Save(r.ctx, r.TempDir())
	require.NoError(r, err)
	img := r.decodePNG(path)
	assert.Equal(r, rgb, colourOf(img))
	assert.Equal(r, image.Pt(20, 20), img.Bounds().Size())
}

func (r *realRun) read(c *comfyui.PodClient, ref comfyui.FileRef) []byte {
	r.Helper()
	body, err := c.Open(r.ctx, ref)
	require.NoError(r, err)
	defer body.Close()
	data, err := io.ReadAll(body)
	require.NoError(r, err)
	return data
}

func (r *realRun) uploadMask() {
	c := r.client()
	stem := fmt.Sprintf("comfyui_go_%06x", fresh())
	original, err := c.Upload(r.ctx, stem+".png", bytes.NewReader(r.pngOf(fresh(), 8)))
	require.NoError(r, err)
	mask, err := c.UploadMask(r.ctx, original, stem+"_mask.png", bytes.NewReader(r.pngOf(0, 8)))
	require.NoError(r, err)
	_, err = png.Decode(bytes.NewReader(r.read(c, mask)))
	require.NoError(r, err)
	_, err = c.UploadMask(r.ctx, comfyui.FileRef{Filename: stem + "_none.png", Type: "input"}, stem+"_mask2.png", bytes.NewReader(r.pngOf(0, 8)))
	require.Error(r, err, "the pod answers 200 and saves nothing")
	assert.Equal(r, comfyui.CategoryNotFound, comfyui.CategoryOf(err), "%v", err)
}

func (r *realRun) routes() {
	c := r.client()
	_, err := c.Queue(r.ctx)
	require.NoError(r, err)
	_, err = c.History(r.ctx, "no-such-prompt")
	require.Error(r, err)
	assert.Equal(r, comfyui.CategoryNotFound, comfyui.CategoryOf(err))
	result, _ := r.run(c, r.picture(fresh()))
	entry, err := c.History(r.ctx, result.PromptID)
	require.NoError(r, err)
	assert.Equal(r, "success", entry.Status)
	assert.True(r, entry.Completed)
	assert.NotEmpty(r, entry.Messages)
	assert.Len(r, entry.Outputs, 1)
	w, err := comfyui.ParseWorkflow(entry.Workflow)
	require.NoError(r, err)
	assert.Len(r, slices.Collect(w.Nodes()), 3)

	require.NoError(r, c.Interrupt(r.ctx, "no-such-prompt"))
	require.NoError(r, c.DeleteQueued(r.ctx, "no-such-prompt"))
	info, err := c.ObjectInfo(r.ctx, "EmptyImage", "SaveImage")
	require.NoError(r, err)
	assert.ElementsMatch(r, []string{"EmptyImage", "SaveImage"}, slices.Collect(maps.Keys(info)))
	all, err := c.ObjectInfo(r.ctx)
	require.NoError(r, err)
	assert.Greater(r, len(all), 50)
	folders, err := c.Models(r.ctx, "")
	require.NoError(r, err)
	assert.Contains(r, folders, "checkpoints")
	_, err = c.Models(r.ctx, "checkpoints")
	require.NoError(r, err)
	_, err = c.Models(r.ctx, "no-such-folder")
	assert.Equal(r, comfyui.CategoryNotFound, comfyui.CategoryOf(err), "%v", err)
	stats, err := c.SystemStats(r.ctx)
	require.NoError(r, err)
	assert.NotEmpty(r, stats.Version)
	assert.NotEmpty(r, stats.Python)
	assert.NotEmpty(r, stats.Args)
	assert.Positive(r, stats.RAMTotal)
	assert.NotEmpty(r, stats.Devices)
	if features, err := c.Features(r.ctx); r.pod.since("0.3.45") {
		require.NoError(r, err)
		assert.Contains(r, features, "max_upload_size")
	} else {
		assert.Equal(r, comfyui.CategoryNotFound, comfyui.CategoryOf(err), "%v", err)
	}
	require.NoError(r, c.FreeMemory(r.ctx, true, true))
	resp, err := c.Do(r.ctx, http.MethodGet, "/prompt", nil, nil)
	require.NoError(r, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(r, err)
	assert.Contains(r, string(body), "queue_remaining")
	_, err = c.Do(r.ctx, http.MethodGet, "/no/such/route", url.Values{"a": {"b"}}, nil) //nolint:bodyclose // there is none
	assert.Equal(r, comfyui.CategoryNotFound, comfyui.CategoryOf(err), "%v", err)
	_, err = c.Open(r.ctx, comfyui.FileRef{Filename: "no such file.png", Type: "output"})
	assert.Equal(r, comfyui.CategoryNotFound, comfyui.CategoryOf(err), "%v", err)
}

// ----------------------------------------------------------------- progress

func (r *realRun) stepsAndPreviews() {
	c := r.client(comfyui.WithPreviews())
	for _, kind := range []string{"latent", "jpeg", "png"} {
		r.part(kind, func(r *realRun) {
			result, events := r.run(c, r.slow(8, 0.15, inputs{"preview": kind}))
			r.ranOnce(result)
			previews, steps := 0, map[float64]bool{}
			for _, e := range events {
				if e.Kind == comfyui.EventProgress && e.Progress.Node == "1" {
					steps[e.Progress.Step] = true
					assert.InDelta(r, 8, e.Progress.Steps, 0)
					assert.Equal(r, "ProbeSleep", e.Progress.NodeClass)
				}
				if e.Kind != comfyui.EventPreview {
					continue
				}
				previews++
				assert.Equal(r, "1", e.Node)
				_, format, err := image.Decode(bytes.NewReader(e.Preview.Data))
				require.NoError(r, err)
				assert.Equal(r, e.Preview.ContentType, "image/"+format)
			}
			assert.GreaterOrEqual(r, len(steps), 6, "steps seen: %v", steps)
			assert.GreaterOrEqual(r, previews, 6)
		})
	}
}

func (r *realRun) withoutPreviews() {
	_, events := r.run(r.client(), r.slow(4, 0.15, inputs{"preview": "jpeg"}))
	assert.NotContains(r, kindsOf(events), comfyui.EventPreview)
}

// repeatedSteps: nodes that start over, and nodes that run side by side.
func (r *realRun) repeatedSteps() {
	if !r.pod.since("0.3.45") {
		r.Skip("the pod knows no async nodes")
	}
	c := r.client()
	seed := fresh()
	result, events := r.run(c, r.workflow(nodes{
		"1": {"ProbeList", inputs{"count": 3, "seed": seed}},
		"2": {"ProbeSleep", inputs{"steps": 5, "seconds": 0.12, "seed": seed, "image": link("1"), "bars": 2}},
		"3": {"ProbeSleepAsync", inputs{"steps": 5, "seconds": 0.15, "seed": seed}},
		"4": {"ProbeSleepAsync", inputs{"steps": 6, "seconds": 0.15, "seed": seed}},
		"5": {"SaveImage", inputs{"images": link("2"), "filename_prefix": "comfyui_go/list"}},
		"6": {"SaveImage", inputs{"images": link("3"), "filename_prefix": "comfyui_go/side"}},
		"7": {"SaveImage", inputs{"images": link("4"), "filename_prefix": "comfyui_go/side"}},
	}))
	r.ranOnce(result)
	assert.Equal(r, 7, events[len(events)-1].Progress.NodesDone)
	files := 0
	for _, o := range result.Outputs {
		if o.File != nil {
			files++
		}
	}
	assert.Equal(r, 5, files)
	running := map[string]bool{}
	for _, e := range events {
		running[e.Progress.Node] = true
	}
	for _, id := range []string{"2", "3", "4"} {
		assert.True(r, running[id], "node %s was shown: %v", id, running)
	}
}

// --------------------------------------------------------------------- ends

// raise is a workflow that fails in node 2, after an output was made.
func (r *realRun) raise(kind string) *comfyui.Workflow {
	r.Helper()
	seed := fresh()
	return r.workflow(nodes{
		"1": {"EmptyImage", inputs{"width": 8, "height": 8, "batch_size": 1, "color": seed}},
		"2": {"ProbeRaise", inputs{"kind": kind, "seed": seed, "image": link("1"), "steps": 3}},
		"3": {"SaveImage", inputs{"images": link("2"), "filename_prefix": "comfyui_go/raise"}},
	})
}

func (r *realRun) executionErrors() {
	for kind, want := range map[string]struct {
		category comfyui.Category
		message  string
	}{
		"RuntimeError":        {comfyui.CategoryExecution, "probe failed"},
		"ValueError":          {comfyui.CategoryExecution, "probe got a bad value"},
		"no message":          {comfyui.CategoryExecution, ""},
		"shapes":              {comfyui.CategoryExecution, "mat1 and mat2 shapes"},
		"missing file":        {comfyui.CategoryMissingAsset, "No such file or directory"},
		"oom":                 {comfyui.CategoryOutOfMemory, "CUDA out of memory"},
		"oom allocation":      {comfyui.CategoryOutOfMemory, "Allocation on device"},
		"accelerator oom":     {comfyui.CategoryOutOfMemory, "CUDA error: out of memory"},
		"cuda illegal access": {comfyui.CategoryPodFault, "illegal memory access"},
		"cuda assert":         {comfyui.CategoryPodFault, "device-side assert"},
	} {
		r.part(kind, func(r *realRun) {
			c := r.client(comfyui.WithRetry(comfyui.CategoryOutOfMemory, comfyui.RetryPolicy{}))
			result, err := r.fail(c, r.raise(kind))
			assert.Equal(r, want.category, comfyui.CategoryOf(err), "%v", err)
			var x *comfyui.ExecutionError
			require.ErrorAs(r, err, &x)
			assert.Equal(r, "2", x.NodeID)
			assert.Equal(r, "ProbeRaise", x.NodeType)
			assert.Contains(r, x.Message, want.message)
			assert.NotContains(r, x.Message, "\n", "without the server's advice")
			assert.NotEmpty(r, x.ExceptionType)
			assert.NotEmpty(r, x.Traceback)
			assert.Equal(r, comfyui.StatusFailed, result.Status)
			assert.Equal(r, 1, result.Attempt)
			r.ranOnce(result)
			h, err := c.Health(r.ctx)
			require.NoError(r, err)
			assert.Equal(r, want.category == comfyui.CategoryPodFault, h.State == comfyui.HealthPoisoned, "%s: %v", h.State, h.Reasons)
		})
	}
}

// outOfMemoryTwice: the models are freed and it is tried once more.
func (r *realRun) outOfMemoryTwice() {
	c := r.client()
	j, rec := r.follow(c, r.raise("oom"))
	result, events, err := r.end(j, rec)
	require.Error(r, err)
	assert.Equal(r, comfyui.CategoryOutOfMemory, comfyui.CategoryOf(err))
	assert.Equal(r, 2, result.Attempt)
	assert.Contains(r, kindsOf(events), comfyui.EventRetrying)
	i := slices.Index(kindsOf(events), comfyui.EventQueued)
	require.GreaterOrEqual(r, i, 0)
	first := events[i].PromptID
	assert.NotEqual(r, first, result.PromptID)
	for _, id := range []string{first, result.PromptID} {
		entry, err := c.History(r.ctx, id)
		require.NoError(r, err)
		assert.Equal(r, "error", entry.Status)
	}
}

func (r *realRun) blocked() {
	c := r.client()
	ns := func(silent bool) nodes {
		seed := fresh()
		return nodes{
			"1": {"EmptyImage", inputs{"width": 8, "height": 8, "batch_size": 1, "color": seed}},
			"2": {"ProbeBlock", inputs{"message": "not today", "silent": silent, "seed": seed, "image": link("1")}},
			"3": {"SaveImage", inputs{"images": link("2"), "filename_prefix": "comfyui_go/blocked"}},
			"4": {"SaveImage", inputs{"images": link("1"), "filename_prefix": "comfyui_go/free"}},
		}
	}
	result, _ := r.run(c, r.workflow(ns(false)))
	require.Len(r, result.Outputs, 1)
	assert.Equal(r, "4", result.Outputs[0].Node)
	require.NotEmpty(r, result.Warnings)
	assert.Contains(r, result.Warnings[0].Error(), "not today")
	r.ranOnce(result)
	result, _ = r.run(c, r.workflow(ns(true)))
	require.Len(r, result.Outputs, 1)
	assert.Empty(r, result.Warnings)
}

func (r *realRun) expansion() {
	c := r.client(comfyui.WithPreviews())
	ns := func(more inputs) nodes {
		in := inputs{"count": 3, "steps": 4, "seconds": 0.05, "seed": fresh()}
		maps.Copy(in, more)
		return nodes{"1": {"ProbeExpand", in}, "2": {"SaveImage", inputs{"images": link("1"), "filename_prefix": "comfyui_go/expand"}}}
	}
	for name, more := range map[string]inputs{"flat": {}, "text": {"text": true}, "nested": {"nested": true}} {
		r.part(name, func(r *realRun) {
			result, events := r.run(c, r.workflow(ns(more)))
			r.ranOnce(result)
			for _, e := range events {
				assert.Contains(r, []string{"", "1", "2"}, e.Progress.Node, "%s: the workflow's own node", e.Kind)
			}
			assert.Equal(r, 2, events[len(events)-1].Progress.NodesDone)
			texts := 0
			for _, o := range result.Outputs {
				if o.Text == "inner text" {
					texts++
				}
			}
			assert.Equal(r, more["text"] == true, texts == 1, "%+v", result.Outputs)
		})
	}
	_, err := r.fail(c, r.workflow(ns(inputs{"fail": true})))
	var x *comfyui.ExecutionError
	require.ErrorAs(r, err, &x)
	assert.Equal(r, "1", x.NodeID, "the outer node")
	assert.Equal(r, "probe failed", x.Message)
	_, err = r.fail(c, r.workflow(ns(inputs{"cycle": true})))
	require.ErrorAs(r, err, &x, "history says success over it")
}

func (r *realRun) oddOutputs() {
	c := r.client()
	seed := fresh()
	result, _ := r.run(c, r.workflow(nodes{
		"1": {"ProbeOddKeys", inputs{"seed": seed}},
		"2": {"ProbeNaN", inputs{"seed": seed}},
		"3": {"ProbeText", inputs{"text": "grüße, 世界", "seed": seed}},
		"4": {"ProbeVideoLike", inputs{"folder": "output", "seed": seed}},
		"5": {"ProbeSleep", inputs{"steps": 0, "seconds": 0.0, "seed": seed}},
		"6": {"ProbeEnd", inputs{"image": link("5")}},
	}))
	r.ranOnce(result)
	files, texts := map[string]string{}, []string{}
	for _, o := range result.Outputs {
		if o.File != nil {
			body, err := o.Open(r.ctx)
			require.NoError(r, err, "%s", o.File)
			data, err := io.ReadAll(body)
			require.NoError(r, err)
			require.NoError(r, body.Close())
			files[o.Key+" "+o.File.Filename] = string(data)
		} else if o.Text != "" {
			texts = append(texts, o.Text)
		}
	}
	for name, start := range map[string]string{
		fmt.Sprintf("gifs odd_%d.gif", seed): "\x89PNG", fmt.Sprintf("audio odd_%d.flac", seed): "fLaC", fmt.Sprintf("3d odd_%d.glb", seed): "glTF",
		fmt.Sprintf("files odd %d #1 & 100%%.bin", seed): "odd bytes", fmt.Sprintf("images clip_%d_00001_.mp4", seed): "\x00\x00\x00\x18ftypisom",
	} {
		assert.True(r, strings.HasPrefix(files[name], start), "%s: %.20q of %q", name, files[name], slices.Collect(maps.Keys(files)))
	}
	assert.Contains(r, texts, "grüße, 世界")
	assert.Contains(r, texts, "NaN in a string stays: NaN, Infinity")
	paths, err := result.SaveAll(r.ctx, r.TempDir())
	require.NoError(r, err)
	assert.Len(r, paths, 5)
	data, err := json.Marshal(result)
	require.NoError(r, err)
	assert.True(r, json.Valid(data))
}

func (r *realRun) manyFiles() {
	c := r.client()
	result, _ := r.run(c, r.workflow(nodes{"1": {"ProbeManyImages", inputs{"count": 60, "folder": "temp", "subfolder": "comfyui_go many/ä", "seed": fresh()}}}))
	r.ranOnce(result)
	assert.Len(r, result.Outputs, 60)
	paths, err := result.SaveAll(r.ctx, r.TempDir())
	require.NoError(r, err)
	assert.Len(r, paths, 60)
}

func (r *realRun) unknownFrames() {
	c := r.client(comfyui.WithPreviews())
	seed := fresh()
	ns := nodes{
		"1": {"ProbeFrames", inputs{"binary_type": 99, "size": 100_000, "seed": seed}},
		"2": {"ProbeProgressText", inputs{"text": "half way", "scope": "client", "seed": seed, "image": link("1")}},
		"3": {"SaveImage", inputs{"images": link("2"), "filename_prefix": "comfyui_go/frames"}},
	}
	if !r.pod.since("0.3.45") { // it names the prompt itself: frames without a prompt that overtake its answer are nobody's
		ns["4"] = node{"ProbeSleep", inputs{"steps": 4, "seconds": 0.2, "seed": seed}}
		ns["1"].inputs["image"] = link("4")
	}
	result, events := r.run(c, r.workflow(ns))
	r.ranOnce(result)
	var raw []string
	for _, e := range events {
		if e.Kind == comfyui.EventOther {
			assert.True(r, json.Valid(e.Raw), "%s", e.Raw)
			raw = append(raw, string(e.Raw))
		}
	}
	for _, want := range []string{"probe.custom", "probe.list", "probe.null", "half way"} {
		assert.Contains(r, strings.Join(raw, "\n"), want)
	}
}

// -------------------------------------------------------------- queue, cancel

func (r *realRun) queueOrder() {
	c := r.client()
	blocker := r.submit(c, r.slow(12, 0.2, nil))
	// The first of them is behind the blocker, however long the queue of the pod is.
	var jobs []*comfyui.Job
	for _, opts := range [][]comfyui.JobOption{nil, {comfyui.WithNumber(1e9)}, {comfyui.AtFront()}} {
		jobs = append(jobs, r.submit(c, r.picture(fresh()), opts...))
	}
	q, err := c.Queue(r.ctx)
	require.NoError(r, err)
	at := func(j *comfyui.Job) int {
		return slices.IndexFunc(q.Pending, func(it comfyui.QueueItem) bool { return it.PromptID == j.PromptID() })
	}
	assert.Less(r, at(jobs[2]), at(jobs[0]), "front")
	assert.Less(r, at(jobs[0]), at(jobs[1]), "a high number")
	_, err = blocker.Wait(r.ctx)
	require.NoError(r, err)
	started := map[*comfyui.Job]time.Time{}
	for _, j := range jobs {
		result, err := j.Wait(r.ctx)
		require.NoError(r, err)
		r.ranOnce(result)
		started[j] = result.StartedAt
	}
	assert.True(r, started[jobs[2]].Before(started[jobs[0]]) && started[jobs[0]].Before(started[jobs[1]]))
}

// running submits a job and waits until it runs.
func (r *realRun) running(c *comfyui.PodClient, w *comfyui.Workflow, opts ...comfyui.JobOption) (*comfyui.Job, *recorder) {
	r.Helper()
	j, rec := r.follow(c, w, opts...)
	rec.untilKind(r, comfyui.EventStarted)
	return j, rec
}

// cancelled checks the end of a cancelled job.
func (r *realRun) cancelled(j *comfyui.Job, rec *recorder) *comfyui.Result {
	r.Helper()
	result, events, err := r.end(j, rec)
	require.ErrorIs(r, err, comfyui.ErrCancelled)
	assert.Equal(r, comfyui.CategoryCancelled, comfyui.CategoryOf(err))
	assert.Equal(r, comfyui.StatusCancelled, result.Status)
	assert.Equal(r, comfyui.EventCancelled, events[len(events)-1].Kind)
	assert.NotContains(r, r.text(r.ctx, "/queue"), result.PromptID)
	return result
}

func (r *realRun) cancelPending() {
	c := r.client()
	blocker, _ := r.running(c, r.slow(12, 0.2, nil))
	j, jrec := r.follow(c, r.picture(fresh()))
	other := r.submit(c, r.picture(fresh()))
	require.NoError(r, j.Cancel(r.ctx))
	result := r.cancelled(j, jrec)
	assert.Equal(r, "{}", strings.TrimSpace(r.text(r.ctx, "/history/"+result.PromptID)), "it never ran")
	require.NoError(r, j.Cancel(r.ctx), "again")
	for _, j := range []*comfyui.Job{blocker, other} {
		result, err := j.Wait(r.ctx)
		require.NoError(r, err)
		r.ranOnce(result)
	}
	require.NoError(r, other.Cancel(r.ctx), "after the end")
	_, err := other.Wait(r.ctx)
	require.NoError(r, err)
}

func (r *realRun) cancelRunning() {
	c := r.client()
	j, rec := r.running(c, r.slow(300, 0.1, nil))
	next := r.submit(c, r.picture(fresh()))
	rec.until(r, "a step", func(e comfyui.Event) bool { return e.Progress.Step > 0 })
	alone := r.cancelBefore(j, next)
	r.cancelled(j, rec)
	if alone {
		return
	}
	result, err := next.Wait(r.ctx)
	require.NoError(r, err, "the next one is not hit")
	r.ranOnce(result)
}

// cancelBefore cancels a job that runs, with another one waiting behind it. A pod that cannot interrupt a prompt by its id might hit the
// next one: there it is refused until the next one has been cancelled, too, which alone tells.
func (r *realRun) cancelBefore(j, next *comfyui.Job) (alone bool) {
	r.Helper()
	err := j.Cancel(r.ctx)
	if r.pod.since("0.3.57") {
		require.NoError(r, err)
		return false
	}
	assert.Equal(r, comfyui.CategoryConflict, comfyui.CategoryOf(err), "%v", err)
	require.NoError(r, next.Cancel(r.ctx))
	_, err = next.Wait(r.ctx)
	require.ErrorIs(r, err, comfyui.ErrCancelled)
	require.NoError(r, j.Cancel(r.ctx))
	return true
}

// cancelSilentNode: the interrupt is seen when the node has ended.
func (r *realRun) cancelSilentNode() {
	c := r.client()
	j, rec := r.running(c, r.workflow(nodes{
		"1": {"ProbeSleepSilent", inputs{"seconds": 3.0, "seed": fresh()}},
		"2": {"SaveImage", inputs{"images": link("1"), "filename_prefix": "comfyui_go/silent"}},
	}))
	next := r.submit(c, r.picture(fresh()))
	alone := r.cancelBefore(j, next)
	r.cancelled(j, rec)
	if alone {
		return
	}
	result, err := next.Wait(r.ctx)
	require.NoError(r, err, "the next one is not hit")
	r.ranOnce(result)
}

// cancelLastNode: a last node without ticks runs to its end; the job tells the truth.
func (r *realRun) cancelLastNode() {
	c := r.client()
	j, rec := r.follow(c, r.workflow(nodes{
		"1": {"ProbeSleep", inputs{"steps": 1, "seconds": 0.1, "seed": fresh()}},
		"2": {"ProbeEnd", inputs{"image": link("1"), "seconds": 3.0}},
	}))
	rec.until(r, "the last node", func(e comfyui.Event) bool { return e.Progress.Node == "2" })
	next := r.submit(c, r.picture(fresh()))
	alone := r.cancelBefore(j, next) // nil: it has ended
	result, _, err := r.end(j, rec)
	if strings.Contains(r.text(r.ctx, "/history/"+result.PromptID), "execution_interrupted") {
		require.ErrorIs(r, err, comfyui.ErrCancelled) // a busy pod can tell of a node and hear the interrupt before it begins it
	} else {
		require.NoError(r, err)
		assert.Equal(r, comfyui.StatusSucceeded, result.Status)
	}
	if alone {
		return
	}
	result, err = next.Wait(r.ctx)
	require.NoError(r, err, "the next one is not hit")
	r.ranOnce(result)
}

func (r *realRun) cancelWithContext() {
	c := r.client()
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	rec := &recorder{more: make(chan struct{}, 1)}
	j, err := c.Submit(ctx, r.slow(300, 0.1, nil), comfyui.CancelWithContext(), comfyui.OnEvent(rec.take))
	require.NoError(r, err)
	r.jobs = append(r.jobs, j)
	rec.untilKind(r, comfyui.EventStarted)
	cancel()
	r.cancelled(j, rec)
}

func (r *realRun) runLimit() {
	c := r.client()
	result, err := r.fail(c, r.slow(300, 0.1, nil), comfyui.WithLimits(comfyui.Limits{Run: time.Second}))
	assert.Equal(r, comfyui.CategoryTimeout, comfyui.CategoryOf(err), "%v", err)
	assert.Equal(r, comfyui.StatusFailed, result.Status)
	assert.NotContains(r, r.text(r.ctx, "/queue"), result.PromptID, "it was taken off the pod")
}

func (r *realRun) interruptedByOthers() {
	c := r.client()
	j, rec := r.running(c, r.slow(300, 0.1, nil))
	r.post(r.ctx, "/interrupt", fmt.Sprintf(`{"prompt_id":%q}`, j.PromptID()))
	_, _, err := r.end(j, rec)
	require.ErrorIs(r, err, comfyui.ErrInterrupted)
	assert.Equal(r, comfyui.CategoryInterrupted, comfyui.CategoryOf(err))
}

func (r *realRun) removedByOthers() {
	c := r.client(hasty)
	blocker := r.submit(c, r.slow(30, 0.2, nil))
	j, rec := r.follow(c, r.picture(fresh()))
	r.post(r.ctx, "/queue", fmt.Sprintf(`{"delete":[%q]}`, j.PromptID()))
	_, _, err := r.end(j, rec)
	require.ErrorIs(r, err, comfyui.ErrRemoved)
	result, err := blocker.Wait(r.ctx)
	require.NoError(r, err)
	r.ranOnce(result)
}

// closedAndRecovered: a process ends in the middle of a job, the next one takes the job over and hears it to its end.
func (r *realRun) closedAndRecovered() {
	store := comfyui.NewMemoryStore()
	first := r.client(comfyui.WithStore(store))
	j, rec := r.running(first, r.slow(25, 0.2, nil))
	rec.until(r, "a step", func(e comfyui.Event) bool { return e.Progress.Step > 0 })
	pending := r.submit(first, r.picture(fresh()))
	require.NoError(r, first.Close())
	_, err := j.Wait(r.ctx)
	require.ErrorIs(r, err, comfyui.ErrClosed)

	second := r.client(comfyui.WithStore(store))
	var ids []string
	for recovered, err := range second.Recover(r.ctx) {
		require.NoError(r, err)
		r.jobs = append(r.jobs, recovered)
		ids = append(ids, recovered.ID())
	}
	require.ElementsMatch(r, []string{j.ID(), pending.ID()}, ids)
	again, err := second.Attach(r.ctx, j.ID())
	require.NoError(r, err)
	steps := 0
	for e := range again.Events(r.ctx) {
		if e.Source == comfyui.SourceStream && e.Progress.Step > 0 {
			steps++
		}
	}
	assert.Positive(r, steps, "progress under the former client id")
	for _, id := range ids {
		again, err := second.Attach(r.ctx, id)
		require.NoError(r, err)
		result, err := again.Wait(r.ctx)
		require.NoError(r, err)
		r.ranOnce(result)
	}
}

// frozen: the pod says nothing for seconds and is fine.
func (r *realRun) frozen() {
	for _, mode := range []string{"loop", "gil"} {
		r.part(mode, func(r *realRun) {
			c := r.client(comfyui.WithTiming(comfyui.Timing{Ping: time.Second, Poll: 200 * time.Millisecond, PollStreaming: time.Second}))
			result, _ := r.run(c, r.workflow(nodes{
				"1": {"ProbeHold", inputs{"mode": mode, "seconds": 4.0, "seed": fresh()}},
				"2": {"SaveImage", inputs{"images": link("1"), "filename_prefix": "comfyui_go/held"}},
			}))
			r.ranOnce(result)
			assert.Zero(r, c.Stats().Retries)
		})
	}
}

// ----------------------------------------------------------------- networks

// socketCut: the WebSocket ends in the middle of a job, in every way, twice.
func (r *realRun) socketCut() {
	for name, how := range map[string]socketEnd{"FIN": endFIN, "RST": endRST, "black hole": endBlackHole} {
		r.part(name, func(r *realRun) {
			proxy := newPodProxy(r.T, r.pod.url)
			c := r.clientOf(proxy.URL, hasty, comfyui.WithPreviews())
			defer c.Close()
			j, rec := r.follow(c, r.slow(40, 0.2, inputs{"preview": "jpeg"}))
			for range 2 {
				onSocket := func(e comfyui.Event) bool { return e.Source == comfyui.SourceStream }
				rec.untilSo(r, "steps over the socket", rec.count(onSocket)+5, onSocket)
				ups := rec.count(isStream(comfyui.StreamUp))
				require.Equal(r, 1, proxy.cutSockets(how))
				rec.untilSo(r, "another socket", ups+1, isStream(comfyui.StreamUp))
			}
			result, _, err := r.end(j, rec)
			require.NoError(r, err)
			r.ranOnce(result)
			posts, sockets := proxy.counts()
			assert.Equal(r, 1, posts)
			assert.GreaterOrEqual(r, sockets, 3)
			assert.LessOrEqual(r, sockets, 8, "no tight loop")
		})
	}
}

// socketCutAtTheEnd: fast jobs, and the WebSocket ends just after each is taken.
func (r *realRun) socketCutAtTheEnd() {
	for name, how := range map[string]socketEnd{"FIN": endFIN, "RST": endRST, "black hole": endBlackHole} {
		r.part(name, func(r *realRun) {
			proxy := newPodProxy(r.T, r.pod.url)
			c := r.clientOf(proxy.URL, hasty)
			defer c.Close()
			for range 5 {
				j := r.submit(c, r.picture(fresh()))
				proxy.cutSockets(how)
				result, err := j.Wait(r.ctx)
				require.NoError(r, err)
				r.ranOnce(result)
			}
			posts, _ := proxy.counts()
			assert.Equal(r, 5, posts)
		})
	}
}

// socketsCutAtRandom: many jobs at once, while their WebSocket is cut again and again.
func (r *realRun) socketsCutAtRandom() {
	proxy := newPodProxy(r.T, r.pod.url)
	c := r.clientOf(proxy.URL, hasty)
	var running sync.WaitGroup
	for range 60 {
		running.Go(func() {
			result, err := c.Execute(r.ctx, r.picture(fresh()))
			if assert.NoError(r, err) && assert.Len(r, result.Outputs, 1) {
				r.ranOnce(result)
			}
		})
	}
	over := make(chan struct{})
	go func() {
		running.Wait()
		close(over)
	}()
	for tick := time.NewTicker(60 * time.Millisecond); ; {
		select {
		case <-tick.C:
			proxy.cutSockets(socketEnd(rand.IntN(3)))
			continue
		case <-over:
			tick.Stop()
		}
		break
	}
	posts, sockets := proxy.counts()
	assert.Equal(r, 60, posts)
	r.Logf("%d jobs over %d sockets", posts, sockets)
}

// noSocket: a proxy that lets no WebSocket through.
func (r *realRun) noSocket() {
	proxy := newPodProxy(r.T, r.pod.url)
	proxy.refuseSockets(http.StatusForbidden)
	c := r.clientOf(proxy.URL)
	for range 3 {
		result, events := r.run(c, r.picture(fresh()))
		r.ranOnce(result)
		assert.Contains(r, kindsOf(events), comfyui.EventStarted)
	}
	if r.pod.probes {
		j, rec := r.running(c, r.slow(300, 0.1, nil))
		require.NoError(r, j.Cancel(r.ctx))
		r.cancelled(j, rec)
		_, err := r.fail(c, r.raise("ValueError"))
		assert.Equal(r, comfyui.CategoryExecution, comfyui.CategoryOf(err))
	}
	assert.Equal(r, comfyui.StreamDown, c.Stats().Stream)
	h, err := c.Health(r.ctx)
	require.NoError(r, err)
	assert.Equal(r, comfyui.HealthDegraded, h.State, "%v", h.Reasons)
	require.NoError(r, c.WaitReady(r.ctx))
	_, sockets := proxy.counts()
	assert.LessOrEqual(r, sockets, 20, "no tight loop")
}

// lostPost: whatever becomes of the POST and its answer, the job runs once.
func (r *realRun) lostPost() {
	for name, lost := range map[string][]lostPost{
		"never arrives":          {postNeverArrives},
		"reset":                  {postAnswerReset},
		"502":                    {postAnswer502},
		"late":                   {postArrivesLate},
		"never arrives, then so": {postNeverArrives, postAnswerReset},
	} {
		for _, socket := range []bool{true, false} {
			for _, once := range []bool{false, true} {
				r.part(fmt.Sprintf("%s/socket=%t/at most once=%t", name, socket, once), func(r *realRun) {
					proxy := newPodProxy(r.T, r.pod.url)
					if !socket {
						proxy.refuseSockets(http.StatusBadGateway)
					}
					proxy.losePosts(lost...)
					c := r.clientOf(proxy.URL, hasty)
					defer c.Close()
					var opts []comfyui.JobOption
					if once {
						opts = append(opts, comfyui.AtMostOnce())
					}
					result, err := c.Execute(r.ctx, r.picture(fresh()), opts...)
					posts, _ := proxy.counts()
					if once && lost[0] == postNeverArrives {
						require.ErrorIs(r, err, comfyui.ErrOutcomeUnknown)
						assert.Zero(r, posts)
						return
					}
					require.NoError(r, err)
					assert.Equal(r, 1, posts)
					assert.GreaterOrEqual(r, c.Stats().AmbiguousPosts, int64(1))
					r.ranOnce(result)
				})
			}
		}
	}
}

// unreachable: for a while nothing gets through, and the jobs end meanwhile.
func (r *realRun) unreachable() {
	proxy := newPodProxy(r.T, r.pod.url)
	c := r.clientOf(proxy.URL, hasty)
	long, rec := r.running(c, r.slow(10, 0.2, nil))
	short := r.submit(c, r.picture(fresh()))
	back := proxy.leave()
	rec.until(r, "the socket's end", isStream(comfyui.StreamDown))
	direct := r.client()
	require.Eventually(r, func() bool { // the pod itself tells when it is over
		_, err := direct.History(r.ctx, short.PromptID())
		return err == nil
	}, time.Minute, 100*time.Millisecond)
	back()
	for _, j := range []*comfyui.Job{long, short} {
		result, err := j.Wait(r.ctx)
		require.NoError(r, err)
		r.ranOnce(result)
	}
	posts, _ := proxy.counts()
	assert.Equal(r, 2, posts)
}

// ----------------------------------------------------------------- restarts

// restartPod runs the command that kills the pod and starts it again.
func (r *realRun) restartPod() {
	r.Helper()
	command := os.Getenv("COMFYUI_POD_RESTART")
	if command == "" {
		r.Skip("set COMFYUI_POD_RESTART to a shell command that kills the pod's server and starts it again (docs/testing.md)")
	}
	ctx, cancel := context.WithTimeout(r.ctx, 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	r.Logf("%s: %s", command, bytes.TrimSpace(out))
	require.NoError(r, err)
	direct := r.client()
	require.NoError(r, direct.WaitReady(ctx))
}

func (r *realRun) needsRestart() {
	r.Helper()
	if os.Getenv("COMFYUI_POD_RESTART") == "" {
		r.Skip("set COMFYUI_POD_RESTART to a shell command that kills the pod's server and starts it again (docs/testing.md)")
	}
}

// restart: the server dies with one job running and one waiting. Both are lost, and each is sent once more.
func (r *realRun) restart() {
	r.needsRestart()
	for _, socket := range []bool{true, false} {
		r.part(fmt.Sprintf("socket=%t", socket), func(r *realRun) {
			proxy := newPodProxy(r.T, r.pod.url)
			if !socket {
				proxy.refuseSockets(http.StatusForbidden)
			}
			c := r.clientOf(proxy.URL, hasty)
			defer c.Close()
			before, _ := r.run(c, r.picture(fresh())) // so that there is a history to be lost
			long, longRec := r.running(c, r.slow(40, 0.1, nil))
			short, shortRec := r.follow(c, r.picture(fresh()))
			longRec.untilKind(r, comfyui.EventStarted)
			r.restartPod()
			for j, rec := range map[*comfyui.Job]*recorder{long: longRec, short: shortRec} {
				result, events, err := r.end(j, rec)
				require.NoError(r, err)
				assert.Equal(r, 2, result.Attempt)
				r.ranOnce(result)
				i := slices.IndexFunc(events, func(e comfyui.Event) bool { return e.Kind == comfyui.EventRetrying })
				require.GreaterOrEqual(r, i, 0)
				require.ErrorIs(r, events[i].Err, comfyui.ErrJobLost)
				paths, err := result.SaveAll(r.ctx, r.TempDir())
				require.NoError(r, err)
				assert.Len(r, paths, 1)
			}
			posts, _ := proxy.counts()
			assert.Equal(r, 5, posts)
			path, err := before.Outputs[0].Save(r.ctx, r.TempDir())
			require.NoError(r, err, "outputs survive")
			assert.NotEmpty(r, path)
		})
	}
}

// restartAtMostOnce: what may have run is not sent again.
func (r *realRun) restartAtMostOnce() {
	r.needsRestart()
	proxy := newPodProxy(r.T, r.pod.url)
	c := r.clientOf(proxy.URL, hasty)
	r.run(c, r.picture(fresh()))
	j, rec := r.running(c, r.slow(40, 0.1, nil), comfyui.AtMostOnce())
	r.restartPod()
	result, _, err := r.end(j, rec)
	require.ErrorIs(r, err, comfyui.ErrOutcomeUnknown)
	require.ErrorIs(r, err, comfyui.ErrJobLost)
	assert.Equal(r, 1, cmp.Or(result.Attempt, 1))
	posts, _ := proxy.counts()
	assert.Equal(r, 2, posts)
}

// deadWorker: the server takes jobs and runs none, until it is started anew.
func (r *realRun) deadWorker() {
	r.needsRestart()
	c := r.client(hasty)
	r.run(c, r.picture(fresh()))
	killer := r.submit(c, r.workflow(nodes{
		"1": {"ProbeDieThread", inputs{"kind": "SystemExit", "seed": fresh()}},
		"2": {"SaveImage", inputs{"images": link("1"), "filename_prefix": "comfyui_go/dead"}},
	}), comfyui.WithLimits(comfyui.Limits{Stall: 5 * time.Second}))
	behind := r.submit(c, r.picture(fresh()), comfyui.WithLimits(comfyui.Limits{Stall: 5 * time.Second}))
	for _, j := range []*comfyui.Job{behind, killer} {
		result, err := j.Wait(r.ctx)
		require.Error(r, err)
		assert.Equal(r, comfyui.CategoryTimeout, comfyui.CategoryOf(err), "%v", err)
		assert.Contains(r, err.Error(), "Stall")
		assert.Equal(r, comfyui.StatusFailed, result.Status)
	}
	h, err := c.Health(r.ctx)
	require.NoError(r, err)
	r.Logf("%s: %v", h.State, h.Reasons)
	r.restartPod()
	result, _ := r.run(c, r.picture(fresh()))
	r.ranOnce(result)
}
