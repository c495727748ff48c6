package comfyui

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui/comfyuitest"
)

// noise is data that differs at each place.
func noise(n int) []byte {
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(data)
	return data
}

// hasty retries as the default policies do, without the waits.
func hasty() Option {
	return func(o *options) {
		for _, c := range []Category{CategoryNetwork, CategoryTimeout, CategoryUnavailable, CategoryOverloaded, CategoryProtocol} {
			p := DefaultRetryPolicy(c)
			p.InitialInterval, p.MaxInterval, p.Jitter = time.Nanosecond, time.Nanosecond, 0
			o.retry[c] = p
		}
	}
}

// savedOn runs one node that saves on the pod, and returns its outputs.
func savedOn(t *testing.T, pod *comfyuitest.Pod, c *PodClient, class string) []Output {
	t.Helper()
	body := fmt.Sprintf(`{"client_id": "test", "prompt": {"1": {"class_type": %q, "inputs": {}}}}`, class)
	reply, outcome, err := c.endpoint.postPrompt(t.Context(), []byte(body), nil)
	require.NoError(t, err)
	require.Equal(t, postAccepted, outcome)
	require.NoError(t, pod.WaitIdle(t.Context()))
	entry, err := c.History(t.Context(), reply.PromptID)
	require.NoError(t, err)
	return entry.Outputs
}

// saves is a node that saves one file.
func saves(fileType, name string, data []byte) comfyuitest.Node {
	return comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
		c.Save("images", fileType, name, data)
		return nil
	}}
}

// tree lists the files below dir, with their contents.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		files[filepath.ToSlash(rel)] = string(data)
		return err
	}))
	return files
}

func TestFileRefString(t *testing.T) {
	t.Parallel()
	for want, f := range map[string]FileRef{
		"x.png":                  {Filename: "x.png", Type: "input"},
		"y.png":                  {Filename: "y.png"},
		"a/b/x.png":              {"x.png", "a/b", "input"},
		"a/x.png [output]":       {"x.png", "a", "output"},
		"x.png [temp]":           {Filename: "x.png", Type: "temp"},
		"x [output] [input]":     {Filename: "x [output]", Type: "input"}, // the server would cut the suffix of the name
		"x [output] [temp]":      {Filename: "x [output]", Type: "temp"},
		"[1].png":                {Filename: "[1].png"},
		"sub/x[output] [input]":  {Filename: "x[output]", Subfolder: "sub"},
		"sub/x[output] [output]": {Filename: "x[output]", Subfolder: "sub", Type: "output"},
	} {
		assert.Equal(t, want, f.String())
	}
}

func TestFileQuery(t *testing.T) {
	t.Parallel()
	for want, f := range map[string]FileRef{
		"filename=x.png&type=output":                    {Filename: "x.png"},
		"filename=x.png&subfolder=a%2Fb&type=temp":      {"x.png", "a/b", "temp"},
		"filename=x.png&subfolder=a%2Fb&type=input":     {"b/x.png", "a", "input"},
		"filename=x.png&subfolder=..&type=output":       {"x.png", "..", "output"},
		"filename=passwd&subfolder=%2Fetc&type=output":  {"/etc/passwd", "", "output"},
		"filename=a+%26+100%25.png&type=output":         {Filename: "a & 100%.png"},
		"filename=x.png&subfolder=a%5Cb&type=output":    {"x.png", `a\b`, "output"},
		"filename=x.png&subfolder=a%2F%2Fb&type=output": {"x.png", `a//b`, "output"},
	} {
		assert.Equal(t, want, f.query().Encode())
	}
}

func TestOpenReadsAFile(t *testing.T) {
	t.Parallel()
	data := noise(300_000)
	pod := comfyuitest.Start(t, comfyuitest.WithNode("Save", saves("output", "sub dir/ünï #1 & 100%.bin", data)), comfyuitest.WithNode("Empty", saves("temp", "empty.bin", nil)))
	c := clientOf(t, pod.URL())
	outputs := savedOn(t, pod, c, "Save")
	require.Len(t, outputs, 1)
	assert.Equal(t, &FileRef{"ünï #1 & 100%.bin", "sub dir", "output"}, outputs[0].File)

	body, err := outputs[0].Open(t.Context())
	require.NoError(t, err)
	got, err := io.ReadAll(struct{ io.Reader }{body}) // Read
	require.NoError(t, err)
	assert.Equal(t, data, got)
	require.NoError(t, body.Close())
	require.NoError(t, body.Close())

	body, err = c.Open(t.Context(), *outputs[0].File)
	require.NoError(t, err)
	var buf bytes.Buffer
	n, err := io.Copy(&buf, body) // WriteTo
	require.NoError(t, err)
	assert.EqualValues(t, len(data), n)
	assert.Equal(t, data, buf.Bytes())
	n2, err := body.Read(make([]byte, 1))
	assert.Zero(t, n2)
	require.ErrorIs(t, err, io.EOF, "the end stays the end")
	require.NoError(t, body.Close())
	_, err = body.Read(make([]byte, 1))
	require.ErrorIs(t, err, fs.ErrClosed)

	body, err = savedOn(t, pod, c, "Empty")[0].Open(t.Context())
	require.NoError(t, err)
	got, err = io.ReadAll(body)
	require.NoError(t, err)
	assert.Empty(t, got)
	require.NoError(t, body.Close())
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	c := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("a request") })
	file := &FileRef{Filename: "x.png", Type: "output"}
	var decoded Output
	require.NoError(t, json.Unmarshal([]byte(`{"node":"9","key":"images","file":{"filename":"x.png","subfolder":"","type":"output"}}`), &decoded))
	dir := filepath.Join(t.TempDir(), "never")
	for _, test := range []struct {
		output Output
		want   string
	}{
		{decoded, "use PodClient.Open"},
		{Output{Node: "9", Key: "text", Text: "x", pod: c}, `output "text" of node "9" is no file`},
		{Output{File: &FileRef{}, pod: c}, "no filename"},
	} {
		_, err := test.output.Open(t.Context())
		require.ErrorContains(t, err, test.want)
		assert.Equal(t, CategoryValidation, CategoryOf(err))
	}
	for _, o := range []Output{decoded, {Text: "x", pod: c}} {
		_, err := o.Save(t.Context(), dir)
		assert.Equal(t, CategoryValidation, CategoryOf(err))
	}
	nowhere := Output{File: file, pod: c}
	_, err := nowhere.Save(t.Context(), "")
	require.ErrorContains(t, err, `"." is the current one`)
	assert.Equal(t, CategoryValidation, CategoryOf(err))
	_, err = (&Result{Outputs: []Output{nowhere}}).SaveAll(t.Context(), "")
	require.ErrorContains(t, err, `"." is the current one`)
	assert.Equal(t, CategoryValidation, CategoryOf(err))
	assert.NoDirExists(t, dir)

	for _, c := range []*PodClient{nil, {}} {
		_, err := c.Open(t.Context(), *file)
		require.ErrorIs(t, err, ErrClosed)
		_, err = c.Open(t.Context(), FileRef{})
		require.ErrorIs(t, err, ErrClosed)
	}
	_, err = (*Result)(nil).SaveAll(t.Context(), dir)
	assert.Equal(t, CategoryValidation, CategoryOf(err))
}

// The pod's own answer to such a name has no text.
func TestOpenOfWhatIsNoName(t *testing.T) {
	t.Parallel()
	c := clientOf(t, comfyuitest.Start(t).URL())
	for _, f := range []FileRef{{Filename: ".."}, {Filename: "a/"}, {Filename: "x.png", Type: "drawer"}} {
		_, err := c.Open(t.Context(), f)
		require.ErrorContains(t, err, "the pod takes no file name or type such as those of "+f.String())
		assert.Equal(t, CategoryValidation, CategoryOf(err))
	}
}

// S41: a download that is cut, however often and wherever, is resumed, and the bytes are those of the file.
func TestS41CutDownloadIsResumed(t *testing.T) {
	t.Parallel()
	data := noise(1 << 20)
	for name, faults := range map[string][]comfyuitest.Fault{
		"once":                      {{Effect: comfyuitest.Truncate}},
		"again and again":           {{Effect: comfyuitest.Truncate, Times: 4}},
		"before the answer":         {{Effect: comfyuitest.Drop}},
		"then 502 and 503":          {{Effect: comfyuitest.Truncate}, {Status: 502, Body: "<html>Bad Gateway</html>"}, {Status: 503}},
		"then dropped":              {{Effect: comfyuitest.Truncate}, {Effect: comfyuitest.Drop, Times: 2}, {Effect: comfyuitest.Truncate}},
		"then a page instead of it": {{Effect: comfyuitest.Truncate}, {Status: 200, Header: http.Header{"Content-Type": {"text/html; charset=utf-8"}}, Body: "<html>starting</html>"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod := comfyuitest.Start(t, comfyuitest.WithNode("Save", saves("output", "x.bin", data)))
			c := clientOf(t, pod.URL(), hasty())
			output := savedOn(t, pod, c, "Save")[0]
			for i := range faults {
				faults[i].Route = "GET /view"
			}
			requests := 1
			inject := func() {
				requests = 1
				for _, f := range faults {
					requests += max(f.Times, 1)
					t.Cleanup(pod.Inject(f))
				}
				requests += pod.Requests("GET /view")
			}

			inject()
			body, err := output.Open(t.Context())
			require.NoError(t, err)
			got, err := io.ReadAll(body)
			require.NoError(t, err)
			assert.True(t, bytes.Equal(data, got))
			require.NoError(t, body.Close())
			assert.Equal(t, requests, pod.Requests("GET /view"))

			inject()
			dir := t.TempDir()
			path, err := output.Save(t.Context(), dir)
			require.NoError(t, err)
			assert.Equal(t, filepath.Join(dir, "x.bin"), path)
			files := tree(t, dir)
			assert.Len(t, files, 1, "nothing else is left")
			assert.True(t, string(data) == files["x.bin"])
			assert.Equal(t, requests, pod.Requests("GET /view"))
		})
	}
}

// view is a /view that cuts, changes and forgets as it is told. Each answer takes the next step; the last step stays.
type view struct {
	t     *testing.T
	steps []viewStep

	mu     sync.Mutex
	ranges []string // of the requests that came
}

type viewStep struct {
	data        []byte
	etag        string
	ignoreRange bool
	noLength    bool // chunked
	upTo        int  // cut there; 0: not
	status      int  // 0: as asked
	header      http.Header
}

func (v *view) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	step := v.steps[0]
	if len(v.steps) > 1 {
		v.steps = v.steps[1:]
	}
	v.ranges = append(v.ranges, r.Header.Get("Range"))
	v.mu.Unlock()
	assert.Equal(v.t, "identity", r.Header.Get("Accept-Encoding"))
	assert.Empty(v.t, r.Header.Get("If-Range"))

	from, status := 0, http.StatusOK
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil && !step.ignoreRange {
		status = http.StatusPartialContent
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(step.data)-1, len(step.data)))
		if from >= len(step.data) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", len(step.data)))
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
	} else {
		from = 0
	}
	if step.etag != "" {
		w.Header().Set("Etag", step.etag)
	}
	for name, values := range step.header {
		w.Header()[name] = values
	}
	if !step.noLength {
		w.Header().Set("Content-Length", fmt.Sprint(len(step.data)-from))
	}
	if step.status != 0 {
		status = step.status
	}
	w.WriteHeader(status)
	to := len(step.data)
	if step.upTo > 0 {
		to = step.upTo
	}
	_, _ = w.Write(step.data[from:max(to, from)])
	_ = http.NewResponseController(w).Flush()
	if step.upTo > 0 {
		panic(http.ErrAbortHandler)
	}
}

// S41: what cannot be resumed is begun again, or is an error; it is never put together from two files.
func TestS41OnlyTheSameFileIsResumed(t *testing.T) {
	t.Parallel()
	a, b := noise(200_000), noise(210_000)
	const cut = 90_000
	for name, test := range map[string]struct {
		steps      []viewStep
		ranges     []string // that Save sends
		saved      []byte   // nil: an error
		opened     []byte   // nil: an error
		openPrefix bool     // of what was opened before the error
	}{
		"the same": {
			steps: []viewStep{{data: a, etag: `"a"`, upTo: cut}, {data: a, etag: `"a"`}}, ranges: []string{"", "bytes=90000-"},
			saved: a, opened: a,
		},
		"Range is ignored": {
			steps: []viewStep{{data: a, etag: `"a"`, upTo: cut}, {data: a, etag: `"a"`, ignoreRange: true}}, ranges: []string{"", "bytes=90000-"},
			saved: a, opened: a,
		},
		"Range is ignored, and cut again while skipping": {
			steps:  []viewStep{{data: a, etag: `"a"`, upTo: cut}, {data: a, etag: `"a"`, ignoreRange: true, upTo: cut / 2}, {data: a, etag: `"a"`}},
			ranges: []string{"", "bytes=90000-", "bytes=90000-"}, saved: a, opened: a,
		},
		"no length": {
			steps: []viewStep{{data: a, etag: `"a"`, noLength: true, upTo: cut}, {data: a, etag: `"a"`}}, ranges: []string{"", "bytes=90000-"},
			saved: a, opened: a,
		},
		"changed": {
			steps: []viewStep{{data: a, etag: `"a"`, upTo: cut}, {data: b, etag: `"b"`}}, ranges: []string{"", "bytes=90000-", ""},
			saved: b, openPrefix: true,
		},
		"changed, and Range is ignored": {
			steps: []viewStep{{data: a, etag: `"a"`, upTo: cut}, {data: b, etag: `"b"`, ignoreRange: true}}, ranges: []string{"", "bytes=90000-"},
			saved: b, openPrefix: true,
		},
		"changed, and shorter than what was read": {
			steps: []viewStep{{data: a, etag: `"a"`, upTo: cut}, {data: a[:1000], etag: `"s"`}}, ranges: []string{"", "bytes=90000-", ""},
			saved: a[:1000], openPrefix: true,
		},
		"another length under the same Etag": {
			steps: []viewStep{{data: a, etag: `"a"`, upTo: cut}, {data: b, etag: `"a"`}}, ranges: []string{"", "bytes=90000-", ""},
			saved: b, openPrefix: true,
		},
		"a weak Etag": {
			steps: []viewStep{{data: a, etag: `W/"a"`, upTo: cut}, {data: a, etag: `W/"a"`}}, ranges: []string{"", "bytes=90000-", ""},
			saved: a, openPrefix: true,
		},
		"no Etag": {
			steps: []viewStep{{data: a, upTo: cut}, {data: a, upTo: cut}, {data: a}}, ranges: []string{"", "bytes=90000-", ""},
			saved: a, openPrefix: true,
		},
		"changed before anything came": {
			steps: []viewStep{{data: a, etag: `"a"`, status: 502}, {data: b, etag: `"b"`}}, ranges: []string{"", ""}, saved: b, opened: b,
		},
		"changes each time": {
			steps: func() (steps []viewStep) {
				for i := range 2 * maxRestarts {
					steps = append(steps, viewStep{data: a, etag: fmt.Sprintf(`"%d"`, i), upTo: cut, ignoreRange: true})
				}
				return steps
			}(),
			openPrefix: true,
		},
		"gone after the cut": {
			steps: []viewStep{{data: a, etag: `"a"`, upTo: cut}, {status: 404}}, openPrefix: true,
		},
		"compressed": {steps: []viewStep{{data: a, header: http.Header{"Content-Encoding": {"gzip"}}}}},
		"a page": {
			steps: []viewStep{{data: []byte("<html>Sign in</html>"), header: http.Header{"Content-Type": {"text/html"}}}},
		},
		"206 though nothing was asked for": {steps: []viewStep{{data: a, status: 206}}},
		"304":                              {steps: []viewStep{{status: 304}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			play := func() (*view, Output) {
				v := &view{t: t, steps: slices.Clone(test.steps)}
				return v, Output{File: &FileRef{Filename: "x.png", Type: "output"}, pod: serve(t, v.ServeHTTP, hasty())}
			}

			dir := t.TempDir()
			v, output := play()
			path, err := output.Save(t.Context(), dir)
			files := tree(t, dir)
			if test.saved == nil {
				require.Error(t, err)
				assert.Empty(t, path)
				assert.Empty(t, files, "neither a short file nor a part of one")
			} else {
				require.NoError(t, err)
				assert.Len(t, files, 1)
				assert.True(t, string(test.saved) == files["x.png"])
			}
			if test.ranges != nil {
				assert.Equal(t, test.ranges, v.ranges)
			}

			_, output = play()
			body, err := output.Open(t.Context())
			if err != nil {
				assert.Nil(t, body)
				assert.Nil(t, test.opened)
				assert.False(t, test.openPrefix)
				return
			}
			got, err := io.ReadAll(body)
			require.NoError(t, body.Close())
			switch {
			case test.opened != nil:
				require.NoError(t, err)
				assert.True(t, bytes.Equal(test.opened, got))
			default:
				require.Error(t, err)
				assert.True(t, test.openPrefix)
				assert.True(t, bytes.HasPrefix(a, got), "only bytes of the first file")
				if name != "gone after the cut" {
					assert.Equal(t, CategoryConflict, CategoryOf(err))
				}
				_, again := body.Read(make([]byte, 1))
				require.Error(t, again)
			}
		})
	}
}

// A cache that kept half of the file, and knows no ranges, must not pass it off as the rest.
func TestS41ShorterThanWhatHasCome(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Etag", `"same"`)
		if asked.Add(1) == 1 {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write(noise(500))
			return
		}
		_, _ = w.Write(noise(300))
	}, hasty())
	dir := t.TempDir()
	_, err := Output{File: &FileRef{Filename: "a.bin", Type: "output"}, pod: c}.Save(t.Context(), dir)
	assert.Equal(t, CategoryProtocol, CategoryOf(err))
	require.ErrorContains(t, err, "500 bytes of the file have come, and now it is shorter")
	assert.Empty(t, tree(t, dir))
}

// S41: a pod that always cuts is given up, whatever it sends, and no short file appears.
func TestS41EndlessCutsAreGivenUp(t *testing.T) {
	t.Parallel()
	data := noise(100_000)
	var requests atomic.Int64
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		from := 0
		_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
		v := &view{t: t, steps: []viewStep{{data: data, etag: `"a"`, upTo: from + 1}}}
		v.ServeHTTP(w, r)
	}, hasty())
	dir := t.TempDir()
	_, err := Output{File: &FileRef{Filename: "x.png"}, pod: c}.Save(t.Context(), dir)
	require.Error(t, err)
	assert.Equal(t, CategoryNetwork, CategoryOf(err))
	assert.Empty(t, tree(t, dir))
	assert.EqualValues(t, 1+maxCuts, requests.Load())
}

// S41: a file that changes each time is given up too, though much of it comes.
func TestS41EndlessChangesAreGivenUp(t *testing.T) {
	t.Parallel()
	data := noise(2 * enoughBytes)
	var requests atomic.Int64
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		v := &view{t: t, steps: []viewStep{{data: data, etag: fmt.Sprintf(`"%d"`, requests.Add(1)), upTo: enoughBytes + 1, ignoreRange: true}}}
		v.ServeHTTP(w, r)
	}, hasty())
	dir := t.TempDir()
	_, err := Output{File: &FileRef{Filename: "x.png"}, pod: c}.Save(t.Context(), dir)
	assert.Equal(t, CategoryConflict, CategoryOf(err))
	assert.Empty(t, tree(t, dir))
	assert.EqualValues(t, 2+maxRestarts, requests.Load())
}

// S41: a transport that ends a short body as if it were whole.
func TestS41QuietShortBody(t *testing.T) {
	t.Parallel()
	data := noise(1000)
	tries := 0
	quiet := roundTripFunc(func(r *http.Request) (*http.Response, error) {
		from := 0
		_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
		resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Etag": {`"a"`}}, ContentLength: 1000, Request: r}
		if from > 0 {
			resp.StatusCode, resp.ContentLength = http.StatusPartialContent, int64(1000-from)
			resp.Header.Set("Content-Range", fmt.Sprintf("bytes %d-999/1000", from))
		}
		tries++
		resp.Body = io.NopCloser(bytes.NewReader(data[from:min(400*tries, 1000)]))
		return resp, nil
	})
	c := clientOf(t, "http://pod", hasty(), WithHTTPClient(&http.Client{Transport: quiet}))
	dir := t.TempDir()
	_, err := Output{File: &FileRef{Filename: "x.bin"}, pod: c}.Save(t.Context(), dir)
	require.NoError(t, err)
	assert.Equal(t, map[string]string{"x.bin": string(data)}, tree(t, dir))
	assert.Equal(t, 3, tries)
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// S41: temp files go with the process that made them.
func TestS41TempOutputAfterRestart(t *testing.T) {
	t.Parallel()
	pod := comfyuitest.Start(t, comfyuitest.WithNode("Preview", saves("temp", "x.png", noise(100))), comfyuitest.WithNode("Save", saves("output", "y.png", noise(10))))
	c := clientOf(t, pod.URL(), hasty())
	outputs := append(savedOn(t, pod, c, "Preview"), savedOn(t, pod, c, "Save")...)
	pod.Restart(0)
	require.Eventually(t, func() bool {
		_, err := c.SystemStats(t.Context())
		return err == nil
	}, 30*time.Second, time.Millisecond)

	_, err := outputs[0].Open(t.Context())
	var e *Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, CategoryNotFound, e.Category)
	assert.Equal(t, http.StatusNotFound, e.StatusCode)
	require.ErrorContains(t, err, "the pod has no file x.png [temp], and temp files are gone when a pod restarts")

	dir := t.TempDir()
	result := &Result{JobID: "job", Status: StatusSucceeded, Outputs: outputs}
	paths, err := result.SaveAll(t.Context(), dir)
	assert.Equal(t, []string{filepath.Join(dir, "y.png")}, paths, "what is there is saved")
	require.ErrorAs(t, err, &e)
	assert.Equal(t, "job", e.JobID)
	assert.Equal(t, StatusSucceeded, e.Status)
	assert.Equal(t, CategoryNotFound, e.Category)
	require.ErrorContains(t, err, "temp files are gone")
	assert.Len(t, tree(t, dir), 1)
}

// S41: silence inside a body ends that try; the rest is asked for.
func TestS41SilentDownloadIsResumed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data := noise(50_000)
		tries := 0
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			if tries++; tries == 2 {
				<-r.Context().Done() // no headers either
				return
			}
			if tries == 1 {
				w.Header().Set("Content-Length", "50000")
				w.Header().Set("Etag", `"a"`)
				_, _ = w.Write(data[:20_000])
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
				return
			}
			(&view{t: t, steps: []viewStep{{data: data, etag: `"a"`}}}).ServeHTTP(w, r)
		}, WithTiming(Timing{Request: 7 * time.Second, BodyIdle: 11 * time.Second}))
		start := time.Now()
		dir := t.TempDir()
		_, err := Output{File: &FileRef{Filename: "x.bin"}, pod: c}.Save(t.Context(), dir)
		require.NoError(t, err)
		assert.True(t, string(data) == tree(t, dir)["x.bin"])
		assert.Equal(t, 3, tries)
		assert.GreaterOrEqual(t, time.Since(start), 18*time.Second)
		assert.Less(t, time.Since(start), 21*time.Second, "one wait between the tries")
	})
}

// A slow reader is not a silent pod.
func TestSlowReaderIsNotCut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data := noise(200_000)
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			(&view{t: t, steps: []viewStep{{data: data, etag: `"a"`}}}).ServeHTTP(w, r)
		}, noRetry(), WithTiming(Timing{Request: time.Second, BodyIdle: time.Second}))
		body, err := c.Open(t.Context(), FileRef{Filename: "x.bin"})
		require.NoError(t, err)
		var got []byte
		buf := make([]byte, 50_000)
		for err == nil {
			var n int
			n, err = body.Read(buf)
			got = append(got, buf[:n]...)
			time.Sleep(time.Minute)
		}
		require.ErrorIs(t, err, io.EOF)
		assert.True(t, bytes.Equal(data, got))
		require.NoError(t, body.Close())
	})
}

// Whatever ends a read ends it at once, and says what it was.
func TestReadEnds(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		end  func(c *PodClient, body io.Closer, cancel context.CancelFunc)
		want error
		kind Category
	}{
		"the reader is closed": {func(_ *PodClient, body io.Closer, _ context.CancelFunc) { _ = body.Close() }, context.Canceled, CategoryContext},
		"ctx ends":             {func(_ *PodClient, _ io.Closer, cancel context.CancelFunc) { cancel() }, context.Canceled, CategoryContext},
		"the client is closed": {func(c *PodClient, _ io.Closer, _ context.CancelFunc) { c.endpoint.close() }, ErrClosed, CategoryClosed},
	} {
		for _, when := range []string{"in a body", "before a try"} {
			t.Run(name+" "+when, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
						if r.Header.Get("Range") != "" {
							w.WriteHeader(http.StatusServiceUnavailable)
							return
						}
						w.Header().Set("Content-Length", "100")
						w.Header().Set("Etag", `"a"`)
						_, _ = w.Write([]byte("abc"))
						_ = http.NewResponseController(w).Flush()
						if when == "before a try" {
							panic(http.ErrAbortHandler)
						}
						<-r.Context().Done()
					}, WithTiming(Timing{BodyIdle: time.Hour}), WithRetry(CategoryUnavailable, RetryPolicy{MaxAttempts: 2, InitialInterval: time.Hour, MaxInterval: time.Hour}))
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					body, err := c.Open(ctx, FileRef{Filename: "x.png"})
					require.NoError(t, err)
					ended := make(chan error, 1)
					go func() {
						_, err := io.ReadAll(body)
						ended <- err
					}()
					synctest.Wait()
					start := time.Now()
					test.end(c, body, cancel)
					err = <-ended
					assert.Zero(t, time.Since(start))
					require.ErrorIs(t, err, test.want)
					assert.Equal(t, test.kind, CategoryOf(err))
					require.NoError(t, body.Close())
				})
			})
		}
	}
}

// S42: whatever names the pod gives, files land in dir.
func TestS42NamesNeverLeaveDir(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("l", 300)
	for _, test := range []struct {
		ref  FileRef
		want string
	}{
		{FileRef{"x.png", "", "output"}, "x.png"},
		{FileRef{"x.png", "a/b", "output"}, "a/b/x.png"},
		{FileRef{"../../x.png", "", "output"}, "__/__/x.png"},
		{FileRef{"x.png", "../..", "output"}, "__/__/x.png"},
		{FileRef{"x.png", `..\..`, "output"}, "__/__/x.png"},
		{FileRef{`..\x.png`, "", "output"}, "__/x.png"},
		{FileRef{"..", "", "output"}, "__"},
		{FileRef{".", "..", "output"}, "__/_"},
		{FileRef{"/etc/passwd", "", "output"}, "etc/passwd"},
		{FileRef{"passwd", "/etc", "output"}, "etc/passwd"},
		{FileRef{`C:\Windows\x.dll`, "", "output"}, "C_/Windows/x.dll"},
		{FileRef{"a\x00b.png", "c\x00", "output"}, "c_/a_b.png"},
		{FileRef{"CON", "", "output"}, "_CON"},
		{FileRef{"nul.png", "com1", "output"}, "_com1/_nul.png"},
		{FileRef{"x.png. .", "y ", "output"}, "y/x.png"},
		{FileRef{long + ".png", "", "output"}, long[:196] + ".png"},
	} {
		t.Run(fmt.Sprintf("%.40q", test.ref), func(t *testing.T) {
			t.Parallel()
			c := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "data") }) // a pod that serves anything
			outside := t.TempDir()
			dir := filepath.Join(outside, "a", "b", "dir")
			path, err := Output{File: &test.ref, pod: c}.Save(t.Context(), dir)
			require.NoError(t, err)
			assert.Equal(t, filepath.Join(dir, filepath.FromSlash(test.want)), path)
			assert.Equal(t, map[string]string{"a/b/dir/" + test.want: "data"}, tree(t, outside))
		})
	}
}

// S42: a pod refuses such folders with a 403, which says nothing of credentials and nothing of the other files.
func TestS42RefusedFolderStopsNothing(t *testing.T) {
	t.Parallel()
	pod := comfyuitest.Start(t, comfyuitest.WithNode("Save", saves("output", "x.png", noise(10))))
	c := clientOf(t, pod.URL(), hasty())
	result := &Result{}
	for _, f := range []FileRef{
		{"x.png", "..", "output"}, {"x.png", "/etc", "output"}, {"../x.png", "", "output"}, {"/etc/passwd", "", "output"}, {"x.png", "a/../..", "output"},
	} {
		result.Outputs = append(result.Outputs, Output{File: &f, pod: c})
		_, err := c.Open(t.Context(), f)
		assert.Equal(t, CategoryValidation, CategoryOf(err), f)
		assert.ErrorContains(t, err, "outside its folders")
	}
	result.Outputs = append(result.Outputs, savedOn(t, pod, c, "Save")...)
	dir := t.TempDir()
	paths, err := result.SaveAll(t.Context(), dir)
	require.Error(t, err)
	assert.Equal(t, []string{filepath.Join(dir, "x.png")}, paths)
	assert.Len(t, tree(t, dir), 1)
}

// S42: symbolic links in dir lead nowhere outside.
func TestS42SymlinksNeverLeaveDir(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "data") })
	save := func(dir, subfolder, name string) (string, error) {
		return Output{File: &FileRef{name, subfolder, "output"}, pod: c}.Save(t.Context(), dir)
	}
	top := t.TempDir()
	dir, outside := filepath.Join(top, "dir"), filepath.Join(top, "outside")
	require.NoError(t, errors.Join(os.MkdirAll(filepath.Join(dir, "inside"), 0o700), os.Mkdir(outside, 0o700), os.WriteFile(filepath.Join(outside, "data"), []byte("data"), 0o600)))
	for name, target := range map[string]string{
		"absolute": outside, "relative": "../outside", "file.png": filepath.Join(outside, "data"), "dangling.png": filepath.Join(outside, "new"), "within": "inside",
		"loop": "loop",
	} {
		require.NoError(t, os.Symlink(target, filepath.Join(dir, name)))
	}

	for _, subfolder := range []string{"absolute", "relative", "relative/deeper", "loop"} {
		_, err := save(dir, subfolder, "x.png")
		require.Error(t, err, subfolder)
		assert.Equal(t, CategoryStorage, CategoryOf(err))
	}
	// A link in the place of the file is left alone, wherever it leads.
	for _, name := range []string{"file.png", "dangling.png"} {
		path, err := save(dir, "", name)
		require.NoError(t, err)
		assert.Equal(t, strings.Replace(filepath.Join(dir, name), ".png", " (1).png", 1), path)
	}
	path, err := save(dir, "within", "x.png")
	require.NoError(t, err, "a link that stays inside is the user's own")
	assert.FileExists(t, path)
	assert.FileExists(t, filepath.Join(dir, "inside", "x.png"))
	assert.Equal(t, map[string]string{"data": "data"}, tree(t, outside), "nothing outside has changed")

	link := filepath.Join(top, "link")
	require.NoError(t, os.Symlink(dir, link))
	_, err = save(link, "", "y.png")
	require.NoError(t, err, "dir itself may be a link")
	assert.FileExists(t, filepath.Join(dir, "y.png"))
}

// contentByQuery answers with what it was asked for as content.
func contentByQuery(w http.ResponseWriter, r *http.Request) {
	_, _ = io.WriteString(w, r.FormValue("subfolder")+" "+r.FormValue("type")+" "+r.FormValue("filename"))
}

func TestSaveAll(t *testing.T) {
	t.Parallel()
	c := serve(t, contentByQuery)
	file := func(subfolder, name, fileType string) Output {
		return Output{Node: "9", Key: "images", File: &FileRef{name, subfolder, fileType}, pod: c}
	}
	result := &Result{Outputs: []Output{
		{Node: "1", Key: "text", Text: "not a file", pod: c},
		file("", "a.png", "output"),
		file("", "a.png", "temp"), // another file of that name
		file("sub/dir", "a.png", "output"),
		file("", "a.png", "output"), // again
		{Node: "2", Key: "n", Raw: json.RawMessage("1"), pod: c},
		file("", "taken.png", "output"),
		file("", "A.PNG", "output"), // the same name on some systems
	}}
	dir := filepath.Join(t.TempDir(), "new", "dir")
	require.NoError(t, os.MkdirAll(dir, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "taken.png"), []byte("the user's own"), 0o600))

	var first map[string]string
	for range 3 { // the second and third time all is there
		paths, err := result.SaveAll(t.Context(), dir)
		require.NoError(t, err)
		var names []string
		for _, p := range paths {
			rel, err := filepath.Rel(dir, p)
			require.NoError(t, err)
			names = append(names, filepath.ToSlash(rel))
		}
		assert.Equal(t, []string{"a.png", "a (1).png", "sub/dir/a.png", "taken (1).png", "A.PNG"}, names)
		files := tree(t, dir)
		assert.Equal(t, map[string]string{
			"a.png": " output a.png", "a (1).png": " temp a.png", "sub/dir/a.png": "sub/dir output a.png", "taken.png": "the user's own",
			"taken (1).png": " output taken.png", "A.PNG": " output A.PNG",
		}, files)
		if first != nil {
			assert.Equal(t, first, files)
		}
		first = files
	}

	empty := filepath.Join(t.TempDir(), "empty")
	paths, err := (&Result{Outputs: result.Outputs[:1]}).SaveAll(t.Context(), empty)
	require.NoError(t, err)
	assert.Empty(t, paths)
	assert.NoDirExists(t, empty)
}

func TestSaveAllGoesOnAfterAFailure(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("subfolder") == "gone" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		contentByQuery(w, r)
	})
	result := &Result{JobID: "j", PromptID: "p", Pod: "pod", Attempt: 2, Status: StatusSucceeded}
	for i := range 20 {
		subfolder := map[bool]string{true: "gone", false: "there"}[i%5 == 0]
		result.Outputs = append(result.Outputs, Output{File: &FileRef{fmt.Sprintf("%02d.png", i), subfolder, "output"}, pod: c})
	}
	result.Outputs = append(result.Outputs, Output{File: &FileRef{Filename: "decoded.png"}})
	dir := t.TempDir()
	paths, err := result.SaveAll(t.Context(), dir)
	assert.Len(t, paths, 16)
	assert.True(t, slices.IsSorted(paths), "in the order of the outputs")
	assert.Len(t, tree(t, dir), 16)
	var e *Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, CategoryNotFound, e.Category)
	assert.Equal(t, []any{"j", "p", "pod", 2, StatusSucceeded}, []any{e.JobID, e.PromptID, e.Pod, e.Attempt, e.Status})
	for _, text := range []string{"gone/00.png", "gone/05.png", "gone/10.png", "gone/15.png", "knows no pod"} {
		assert.ErrorContains(t, err, text)
	}
}

func TestSaveAllStopsWhenAllWouldFail(t *testing.T) {
	t.Parallel()
	var requests atomic.Int64
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		w.WriteHeader(http.StatusUnauthorized)
	})
	result := &Result{}
	for i := range 100 {
		result.Outputs = append(result.Outputs, Output{File: &FileRef{Filename: fmt.Sprintf("%d.png", i)}, pod: c})
	}
	paths, err := result.SaveAll(t.Context(), t.TempDir())
	assert.Empty(t, paths)
	assert.Equal(t, CategoryAuth, CategoryOf(err))
	assert.LessOrEqual(t, requests.Load(), int64(saveWorkers))

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = result.SaveAll(ctx, t.TempDir())
	require.ErrorIs(t, err, context.Canceled)
	assert.Equal(t, CategoryContext, CategoryOf(err))
	assert.LessOrEqual(t, requests.Load(), int64(saveWorkers))
}

func TestSaveAllIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var now, most atomic.Int64
		c, _ := servePipes(t, func(w http.ResponseWriter, r *http.Request) {
			n := now.Add(1)
			defer now.Add(-1)
			for seen := most.Load(); n > seen && !most.CompareAndSwap(seen, n); seen = most.Load() {
			}
			time.Sleep(time.Second)
			contentByQuery(w, r)
		})
		result := &Result{}
		for i := range 12 {
			result.Outputs = append(result.Outputs, Output{File: &FileRef{Filename: fmt.Sprintf("%d.png", i)}, pod: c})
		}
		start := time.Now()
		paths, err := result.SaveAll(t.Context(), t.TempDir())
		require.NoError(t, err)
		assert.Len(t, paths, 12)
		assert.EqualValues(t, saveWorkers, most.Load())
		assert.Equal(t, 3*time.Second, time.Since(start))
	})
}

// Savers in one directory never replace each other's files, and equal files come to one.
func TestSaveConcurrently(t *testing.T) {
	t.Parallel()
	c := serve(t, contentByQuery)
	dir := t.TempDir()
	const savers, kinds = 24, 6
	paths := make([]string, savers)
	var group sync.WaitGroup
	for i := range savers {
		group.Go(func() {
			var err error
			paths[i], err = Output{File: &FileRef{"x.png", "", fmt.Sprint(i % kinds)}, pod: c}.Save(t.Context(), dir)
			assert.NoError(t, err)
		})
	}
	group.Wait()
	for i, p := range paths {
		data, err := os.ReadFile(p)
		require.NoError(t, err)
		assert.Equal(t, fmt.Sprintf(" %d x.png", i%kinds), string(data))
	}
	assert.Len(t, tree(t, dir), kinds)
}

func TestSaveWithoutHardLinks(t *testing.T) {
	t.Parallel()
	root, err := os.OpenRoot(t.TempDir())
	require.NoError(t, err)
	t.Cleanup(func() { _ = root.Close() })
	for i, want := range []string{"x.png", "x.png", "x (1).png", "x (1).png"} {
		part, err := newPartFile(root, ".")
		require.NoError(t, err)
		part.link = func(from, to string) error { return &os.LinkError{Op: "link", Old: from, New: to, Err: syscall.EPERM} }
		_, err = part.file.WriteString([]string{"one", "one", "two", "two"}[i])
		require.NoError(t, err)
		require.NoError(t, part.file.Close())
		name, err := part.publish("x.png")
		require.NoError(t, err)
		assert.Equal(t, want, name)
		part.remove()
	}
	assert.Equal(t, map[string]string{"x.png": "one", "x (1).png": "two"}, tree(t, root.Name()))
}

func TestSaveReportsTheFileSystem(t *testing.T) {
	t.Parallel()
	c := serve(t, contentByQuery)
	blocked := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(blocked, nil, 0o600))
	output := Output{File: &FileRef{Filename: "x.png"}, pod: c}
	_, err := output.Save(t.Context(), blocked)
	require.ErrorIs(t, err, syscall.ENOTDIR)
	assert.Equal(t, CategoryStorage, CategoryOf(err))
	_, err = (&Result{Outputs: []Output{output}}).SaveAll(t.Context(), blocked)
	require.ErrorIs(t, err, syscall.ENOTDIR)
	assert.Equal(t, CategoryStorage, CategoryOf(err))

	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "x.png"), 0o700))
	path, err := output.Save(t.Context(), dir)
	require.NoError(t, err)
	assert.Equal(t, filepath.Join(dir, "x (1).png"), path, "a directory has the name")
}

// A failing writer ends io.Copy with its own error, and nothing is asked for again.
func TestWriterFails(t *testing.T) {
	t.Parallel()
	var requests atomic.Int64
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		_, _ = w.Write(noise(1 << 20))
	})
	body, err := c.Open(t.Context(), FileRef{Filename: "x.bin"})
	require.NoError(t, err)
	full := errors.New("no space left")
	_, err = io.Copy(writerFunc(func(p []byte) (int, error) { return len(p) / 2, full }), body)
	require.ErrorIs(t, err, full)
	_, err = io.Copy(writerFunc(func(p []byte) (int, error) { return len(p) / 2, nil }), body)
	require.ErrorIs(t, err, io.ErrShortWrite)
	require.NoError(t, body.Close())
	assert.EqualValues(t, 1, requests.Load())
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func serveBytes(b *testing.B, data []byte) string {
	b.Helper()
	modified := time.Now()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Etag", `"a"`)
		http.ServeContent(w, r, "x.bin", modified, bytes.NewReader(data))
	}))
	b.Cleanup(server.Close)
	return server.URL
}

// The target is 0.95 × the throughput of io.Copy from the raw response, for 64 MiB and more.
func BenchmarkDownload(b *testing.B) {
	data := noise(64 << 20)
	o, err := newOptions(serveBytes(b, data), nil)
	require.NoError(b, err)
	e := newEndpoint(o, &counters{})
	require.NoError(b, err)
	b.Cleanup(e.close)
	c := &PodClient{opts: o, endpoint: e}
	file := FileRef{Filename: "x.bin", Type: "output"}
	raw := func(b *testing.B) *http.Response {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, o.base.String()+"/view?"+file.query().Encode(), nil)
		require.NoError(b, err)
		resp, err := e.client.Do(req)
		require.NoError(b, err)
		return resp
	}
	toFile := func(b *testing.B, from io.Reader) {
		f, err := os.Create(filepath.Join(b.TempDir(), "x.bin"))
		require.NoError(b, err)
		_, err = io.Copy(f, from)
		require.NoError(b, errors.Join(err, f.Close(), os.Remove(f.Name())))
	}
	for name, run := range map[string]func(b *testing.B){
		"discard/raw io.Copy": func(b *testing.B) {
			resp := raw(b)
			_, err := io.Copy(io.Discard, resp.Body)
			require.NoError(b, errors.Join(err, resp.Body.Close()))
		},
		"discard/Open": func(b *testing.B) {
			body, err := c.Open(b.Context(), file)
			require.NoError(b, err)
			_, err = io.Copy(io.Discard, body)
			require.NoError(b, errors.Join(err, body.Close()))
		},
		"file/raw io.Copy": func(b *testing.B) {
			resp := raw(b)
			toFile(b, resp.Body)
			require.NoError(b, resp.Body.Close())
		},
		"file/Save": func(b *testing.B) {
			path, err := Output{File: &file, pod: c}.Save(b.Context(), b.TempDir())
			require.NoError(b, errors.Join(err, os.Remove(path)))
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				run(b)
			}
		})
	}
}

// What a job saved carries the workflow that made it, and an output can be the input of the next one.
func TestSavedImageCarriesItsWorkflow(t *testing.T) {
	t.Parallel()
	pod := comfyuitest.Start(t)
	c, err := NewPodClient(pod.URL())
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	made := parsed(t, `{"1":{"class_type":"EmptyImage","inputs":{"width":8,"height":8,"batch_size":1,"color":18}},
		"2":{"class_type":"SaveImage","inputs":{"images":["1",0],"filename_prefix":"sub/a"}}}`)
	result, err := c.Execute(t.Context(), made)
	require.NoError(t, err)
	paths, err := result.SaveAll(t.Context(), t.TempDir())
	require.NoError(t, err)
	require.Len(t, paths, 1)
	loaded, err := LoadWorkflow(paths[0])
	require.NoError(t, err)
	assert.Equal(t, made.hash(), loaded.hash())

	next := parsed(t, `{"1":{"class_type":"LoadImage","inputs":{"image":""}},"2":{"class_type":"SaveImage","inputs":{"images":["1",0],"filename_prefix":"b"}}}`)
	require.NoError(t, next.Set("LoadImage", "image", result.Outputs[0]))
	_, err = c.Execute(t.Context(), next)
	require.NoError(t, err)
}
