package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"image/png"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// outcome is how a run of the program went.
type outcome struct {
	status         int
	stdout, stderr string
}

// complaint is the one line that tells what is wrong.
func (o outcome) complaint(t *testing.T) string {
	t.Helper()
	var found []string
	for line := range strings.Lines(o.stderr) {
		if strings.HasPrefix(line, "quickstart: ") {
			found = append(found, strings.TrimSpace(line))
		}
	}
	require.Len(t, found, 1, o.stderr)
	assert.True(t, strings.HasSuffix(strings.TrimSpace(o.stderr), found[0]), "it is the last line: %s", o.stderr)
	return found[0]
}

// runProgram gives up after a minute, which ends as a Ctrl-C does.
func runProgram(ctx context.Context, args ...string) outcome {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	status := run(ctx, args, &stdout, &stderr)
	return outcome{status, stdout.String(), stderr.String()}
}

func TestRunsWithoutAnyServer(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "made", "by the program")
	got := runProgram(t.Context(), "-out", dir, "-set", "Julia set.steps=12", "-set", "5.width=64", "-set", "5.height=48", "-previews")

	require.Equal(t, 0, got.status, got.stderr)
	assert.Equal(t, []string{filepath.Join(dir, "julia_00001_.png"), filepath.Join(dir, "quickstart_00001_.png")}, strings.Split(strings.TrimSpace(got.stdout), "\n"))
	for _, line := range []string{"starting a pod inside this program", "Julia set (5) 12/12", "100%  succeeded", "files saved in " + dir + ": 2"} {
		assert.Contains(t, got.stderr, line)
	}
	for name, width := range map[string]int{"julia_00001_.png": 64, "quickstart_00001_.png": 512} {
		path := filepath.Join(dir, name)
		assert.Equal(t, width, widthOf(t, path), name)
		w, err := comfyui.LoadWorkflow(path)
		require.NoError(t, err, "the file carries its workflow")
		steps, err := w.Get("DrawJulia", "steps")
		require.NoError(t, err)
		assert.Equal(t, int64(12), steps)
	}
	assert.Equal(t, 64, widthOf(t, filepath.Join(dir, "preview.png")))
}

func widthOf(t *testing.T, path string) int {
	t.Helper()
	file, err := os.Open(path)
	require.NoError(t, err)
	defer func() { assert.NoError(t, file.Close()) }()
	config, err := png.DecodeConfig(file)
	require.NoError(t, err)
	return config.Width
}

// The default workflow needs nothing that a real pod of any version lacks.
func TestRunsOnAPod(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"0.3.40", "0.3.64", "0.27.0", "0.33.0", "0.38.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			pod := comfyuitest.Start(t, comfyuitest.WithVersion(version))
			dir := t.TempDir()
			got := runProgram(t.Context(), "-pod", pod.URL(), "-out", dir, "-set", "Save.filename_prefix=sub/of mine")
			require.Equal(t, 0, got.status, got.stderr)
			path := filepath.Join(dir, "sub", "of mine_00001_.png")
			assert.Equal(t, path+"\n", got.stdout)
			assert.Equal(t, 512, widthOf(t, path))
			assert.Contains(t, got.stderr, "ComfyUI "+version)
			require.Len(t, pod.Prompts(), 1)
			assert.Equal(t, 1, pod.Prompts()[0].Runs)
		})
	}
}

// An image that ComfyUI saved is a workflow, too.
func TestRunsTheWorkflowOfAnImage(t *testing.T) {
	t.Parallel()
	pod, dir := comfyuitest.Start(t), t.TempDir()
	first := runProgram(t.Context(), "-pod", pod.URL(), "-out", dir)
	require.Equal(t, 0, first.status, first.stderr)
	second := runProgram(t.Context(), "-pod", pod.URL(), "-out", dir, "-workflow", strings.TrimSpace(first.stdout), "-set", "1.color=255")
	require.Equal(t, 0, second.status, second.stderr)
	assert.NotEqual(t, first.stdout, second.stdout)
}

func TestTellsWhatIsWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	taken := file("taken", "not a directory")
	pod := comfyuitest.Start(t)
	guarded := comfyuitest.Start(t, comfyuitest.WithHandler(func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "who are you?", http.StatusUnauthorized) })
	}))
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(secure.Close)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	silent := comfyuitest.Start(t)
	silent.Inject(comfyuitest.Fault{Effect: comfyuitest.Hang, Times: -1})
	website := comfyuitest.Start(t, comfyuitest.WithHandler(func(http.Handler) http.Handler { return http.NotFoundHandler() }))

	for _, test := range []struct {
		name string
		args []string
		want []string // what is wrong, and what to do
	}{
		{"no such file", []string{"-workflow", filepath.Join(dir, "no.json")}, []string{"there is no file " + filepath.Join(dir, "no.json"), "-workflow"}},
		{"a directory", []string{"-workflow", dir}, []string{"it is a directory", "-workflow takes JSON in API format"}},
		{"no JSON", []string{"-workflow", file("no-json", "seed: 1")}, []string{"it is no valid JSON", "-workflow takes JSON in API format"}},
		{"no workflow", []string{"-workflow", file("other.json", `{"a": 1}`)}, []string{"it is not a workflow", "-workflow takes JSON in API format"}},
		{"the editor's format", []string{"-workflow", file("ui.json", `{"nodes": [], "links": []}`), "-pod", pod.URL()}, []string{"UI format", `"Export (API)"`}},
		{"an unknown class", []string{"-workflow", file("class.json", `{"1": {"class_type": "NoSuchNode", "inputs": {}}}`), "-pod", pod.URL()}, []string{"NoSuchNode", "put it there"}},
		{"an invalid input", []string{"-pod", pod.URL(), "-set", "1.width=-5"}, []string{"Value -5 smaller than min of 1", "-set"}},
		{"nothing to save", []string{"-workflow", file("none.json", `{"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}}`), "-pod", pod.URL()}, []string{"Prompt has no outputs", "in the editor"}},
		{"a pod that is not there", []string{"-pod", "http://127.0.0.1:1", "-wait", "50ms"}, []string{"not ready after 50ms", "connection refused", "-wait"}},
		{"another server", []string{"-pod", website.URL(), "-wait", "50ms"}, []string{"not ready", "something else answers"}},
		{"a pod that asks who it is", []string{"-pod", guarded.URL()}, []string{"wants other credentials (who are you?)", "http://user:password@host"}},
		{"a certificate of its own", []string{"-pod", secure.URL}, []string{"is not trusted", "SSL_CERT_FILE"}},
		{"a silent pod", []string{"-pod", silent.URL(), "-wait", "50ms"}, []string{"not ready after 50ms (it does not answer)", "-wait"}},
		{"no URL at all", []string{"-pod", ""}, []string{"-pod is empty", "leave it out"}},
		{"no name of a file", []string{"-workflow", ""}, []string{"-workflow is empty", "leave it out"}},
		{"no time", []string{"-wait", "0"}, []string{"-wait 0s", "30s"}},
		{"no URL", []string{"-pod", "ftp://pod"}, []string{`the scheme "ftp"; use http or https`}},
		{"an unknown node", []string{"-set", "KSampler.seed=1"}, []string{"-set KSampler.seed=1", `no node has the id, title or class "KSampler"`, `"4" (SaveImage, "Save")`}},
		{"an unknown input", []string{"-set", "Save.filename=x"}, []string{`no input "filename"`, "it has images, filename_prefix"}},
		{"no assignment", []string{"-set", "seed=1"}, []string{"want NODE.INPUT=VALUE"}},
		{"an unknown flag", []string{"-steps", "3"}, []string{"-steps", "-h"}},
		{"an argument", []string{"workflow.json"}, []string{`"workflow.json"`, "-workflow"}},
		{"no directory", []string{"-out", filepath.Join(taken, "sub")}, []string{"the output directory cannot be made", "-out"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got := runProgram(t.Context(), append([]string{"-out", t.TempDir()}, test.args...)...)
			assert.Equal(t, 1, got.status)
			assert.Empty(t, got.stdout)
			line := got.complaint(t)
			for _, want := range test.want {
				assert.Contains(t, line, want)
			}
		})
	}
}

func TestTellsWhyAJobFailed(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		node comfyuitest.Node
		want []string
	}{
		{"an exception", comfyuitest.Fail("RuntimeError", "mat1 and mat2 shapes cannot be multiplied\n(77x2048 and 768x320)"), []string{"node 1 (Broken) raised RuntimeError: mat1 and mat2", "the pod's log"}},
		{"a CUDA fault", comfyuitest.Fail("torch.AcceleratorError", "CUDA error: an illegal memory access was encountered"), []string{"node 1 (Broken) raised torch.AcceleratorError", "restart"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			pod, dir := comfyuitest.Start(t, comfyuitest.WithNode("Broken", test.node)), t.TempDir()
			graph := filepath.Join(dir, "graph.json")
			require.NoError(t, os.WriteFile(graph, []byte(`{"1": {"class_type": "Broken", "inputs": {}}}`), 0o600))
			got := runProgram(t.Context(), "-pod", pod.URL(), "-out", dir, "-workflow", graph)
			assert.Equal(t, 1, got.status)
			line := got.complaint(t)
			for _, want := range test.want {
				assert.Contains(t, line, want)
			}
		})
	}
}

// slowPod has a node Slow that steps until it is interrupted, and tells when it runs.
func slowPod(t *testing.T, opts ...comfyuitest.Option) (pod *comfyuitest.Pod, graph string, running chan struct{}) {
	t.Helper()
	running = make(chan struct{}, 16)
	slow := comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
		running <- struct{}{}
		c.Progress(1, 2)
		<-ctx.Done()
		return ctx.Err()
	}}
	graph = filepath.Join(t.TempDir(), "slow.json")
	require.NoError(t, os.WriteFile(graph, []byte(`{"1": {"class_type": "Slow", "inputs": {}}}`), 0o600))
	return comfyuitest.Start(t, append(opts, comfyuitest.WithNode("Slow", slow))...), graph, running
}

func TestCancelsTheJobOnThePod(t *testing.T) {
	t.Parallel()
	pod, graph, running := slowPod(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	go func() {
		<-running
		cancel(errInterrupted)
	}()
	got := runProgram(ctx, "-pod", pod.URL(), "-out", t.TempDir(), "-workflow", graph)

	assert.Equal(t, exitInterrupted, got.status)
	assert.Contains(t, got.complaint(t), "was cancelled on the pod")
	require.Len(t, pod.Prompts(), 1)
	assert.Equal(t, 1, pod.Prompts()[0].Interrupts)
	require.NoError(t, pod.WaitIdle(t.Context()))
}

// The job of somebody else runs; ours waits behind it.
func TestCancelHitsNoOtherJob(t *testing.T) {
	t.Parallel()
	pod, graph, running := slowPod(t)
	body, err := os.ReadFile(graph)
	require.NoError(t, err)
	post(t, pod, body)
	<-running

	bounded, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	ctx, cancel := context.WithCancelCause(bounded)
	defer cancel(nil)
	stderr := &watched{seen: func(line string) {
		if strings.Contains(line, "queued, 1 ahead") {
			cancel(errInterrupted)
		}
	}}
	status := run(ctx, []string{"-pod", pod.URL(), "-out", t.TempDir(), "-workflow", graph}, &bytes.Buffer{}, stderr)

	assert.Equal(t, exitInterrupted, status)
	require.Len(t, pod.Prompts(), 2)
	assert.Zero(t, pod.Prompts()[0].Interrupts)
	assert.Zero(t, pod.Prompts()[1].Runs)
	pod.Interrupt()
	require.NoError(t, pod.WaitIdle(t.Context()))
	assert.Zero(t, pod.Prompts()[1].Runs, "it is off the queue")
}

func post(t *testing.T, pod *comfyuitest.Pod, graph []byte) {
	t.Helper()
	body, err := json.Marshal(map[string]json.RawMessage{"prompt": graph})
	require.NoError(t, err)
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, pod.URL()+"/prompt", bytes.NewReader(body))
	require.NoError(t, err)
	response, err := pod.Client().Do(request)
	require.NoError(t, err)
	require.NoError(t, response.Body.Close())
	require.Equal(t, http.StatusOK, response.StatusCode)
}

// watched is a writer that shows each write.
type watched struct {
	bytes.Buffer
	seen func(string)
}

func (w *watched) Write(p []byte) (int, error) {
	w.seen(string(p))
	return w.Buffer.Write(p)
}

// The interrupt comes while the answer to the submission is on its way: the job may be on the pod already, and must not stay there.
func TestCancelsAJobThatIsBeingSubmitted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	pod, graph, _ := slowPod(t, comfyuitest.WithHandler(func(pod http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			pod.ServeHTTP(w, r)
			if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/prompt") {
				cancel(errInterrupted)
			}
		})
	}))
	got := runProgram(ctx, "-pod", pod.URL(), "-out", t.TempDir(), "-workflow", graph)

	assert.Equal(t, exitInterrupted, got.status)
	assert.Contains(t, got.complaint(t), "was cancelled on the pod")
	require.NoError(t, pod.WaitIdle(t.Context()))
	require.Len(t, pod.Prompts(), 1)
	assert.Zero(t, pod.Prompts()[0].Ends)
}

func TestInterruptedBeforeAnythingWasSent(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errInterrupted)
	pod := comfyuitest.Start(t)
	got := runProgram(ctx, "-pod", pod.URL(), "-out", t.TempDir())
	assert.Equal(t, exitInterrupted, got.status)
	assert.Contains(t, got.complaint(t), "before anything was sent")
	assert.Empty(t, pod.Prompts())
}

// The interrupt comes while the images are downloaded: the job is done, and the program says how far it has come.
func TestInterruptedWhileItSaves(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	pod := comfyuitest.Start(t, comfyuitest.WithHandler(func(pod http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/view") {
				cancel(errInterrupted)
				<-r.Context().Done()
				return
			}
			pod.ServeHTTP(w, r)
		})
	}))
	dir := t.TempDir()
	got := runProgram(ctx, "-pod", pod.URL(), "-out", dir)
	assert.Equal(t, exitInterrupted, got.status)
	assert.Empty(t, got.stdout)
	assert.Contains(t, got.complaint(t), "the job is done, 0 of its files were saved")
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, left)
}

// TestInterruptedByTheTerminal sends the signal that Ctrl-C sends to the program itself.
func TestInterruptedByTheTerminal(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("one process cannot send another an interrupt there")
	}
	binary := filepath.Join(t.TempDir(), "quickstart")
	built, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".").CombinedOutput()
	require.NoError(t, err, string(built))

	pod, graph, running := slowPod(t)
	var stderr bytes.Buffer
	program := exec.CommandContext(t.Context(), binary, "-pod", pod.URL(), "-out", t.TempDir(), "-workflow", graph)
	program.Stderr = &stderr
	program.WaitDelay = time.Minute
	require.NoError(t, program.Start())
	<-running
	require.NoError(t, program.Process.Signal(os.Interrupt))
	var status *exec.ExitError
	require.True(t, errors.As(program.Wait(), &status), stderr.String())

	assert.Equal(t, exitInterrupted, status.ExitCode(), stderr.String())
	assert.Contains(t, stderr.String(), "was cancelled on the pod")
	assert.Equal(t, 1, pod.Prompts()[0].Interrupts)
}

// The job goes on when the socket does not; the outage is told once.
func TestFollowsWithoutASocket(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	pod := comfyuitest.Start(t, comfyuitest.WithNode("Slow", comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
		select {
		case <-release:
		case <-ctx.Done():
		}
		c.Save("images", "output", "a.png", []byte("made"))
		return ctx.Err()
	}}))
	pod.RefuseStreams(http.StatusForbidden)
	dir := t.TempDir()
	graph := filepath.Join(dir, "slow.json")
	require.NoError(t, os.WriteFile(graph, []byte(`{"1": {"class_type": "Slow", "inputs": {}}}`), 0o600))
	told := false
	stderr := &watched{seen: func(line string) {
		if strings.Contains(line, "followed by polling") && !told {
			told = true
			close(release)
		}
	}}
	var stdout bytes.Buffer
	bounded, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	status := run(bounded, []string{"-pod", pod.URL(), "-out", dir, "-workflow", graph}, &stdout, stderr)
	assert.Equal(t, 0, status, stderr.String())
	assert.Equal(t, filepath.Join(dir, "a.png")+"\n", stdout.String())
	assert.Equal(t, 1, strings.Count(stderr.String(), "followed by polling"), stderr.String())
}

func TestHelp(t *testing.T) {
	t.Parallel()
	got := runProgram(t.Context(), "-h")
	assert.Equal(t, 0, got.status)
	assert.Empty(t, got.stderr)
	for _, name := range []string{"-pod", "-workflow", "-set", "-out", "-wait", "-previews"} {
		assert.Contains(t, got.stdout, name)
	}
}
