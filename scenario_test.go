package comfyui_test

import (
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// releases of ComfyUI between which what a client can do changed: without prompt ids, targeted interrupts and progress_state; with
// them; with routes that cancel one job and UUIDs only; the newest that was recorded.
var releases = []string{"0.3.40", "0.3.64", "0.27.0", "0.33.0"}

// line is what stands between client and pod.
type line string

const (
	streaming line = "stream"
	polling   line = "no stream"           // sockets are refused for good
	cut       line = "stream cut"          // in the middle of the scenario; the client reconnects
	cutOff    line = "stream cut for good" // and new sockets are refused
)

var lines = []line{streaming, polling, cut, cutOff}

// open prepares the pod for the line, before the first client.
func (l line) open(b *bench) {
	if l == polling {
		b.pod.RefuseStreams(http.StatusForbidden)
	}
}

// middle does to the stream what the line says. The scenario calls it in its middle.
func (l line) middle(b *bench) {
	switch l {
	case cutOff:
		b.pod.RefuseStreams(http.StatusBadGateway)
		b.pod.CutStreams(comfyuitest.CutReset)
	case cut:
		b.pod.CutStreams(comfyuitest.CutReset)
	}
}

// heard tells whether a client hears everything from the beginning.
func (l line) heard() bool { return l == streaming }

// everywhere runs a scenario as a subtest for each release and line, in a bubble of its own.
func everywhere(t *testing.T, releases []string, lines []line, f func(t *testing.T, b *bench, l line), opts ...comfyuitest.Option) {
	t.Helper()
	for _, release := range releases {
		for _, l := range lines {
			t.Run(fmt.Sprintf("%s/%s", release, l), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(b *bench) {
					l.open(b)
					f(b.t, b, l)
				}, append([]comfyuitest.Option{comfyuitest.WithVersion(release)}, opts...)...)
			})
		}
	}
}

// bystander is another program at the same pod: its own client id, store and connections.
func (b *bench) bystander(opts ...comfyui.Option) *comfyui.PodClient {
	b.t.Helper()
	return b.client(append([]comfyui.Option{comfyui.WithHTTPClient(b.strange())}, opts...)...)
}

// strange is the HTTP client of another program: it shares no connection with the clients under test.
func (b *bench) strange() *http.Client {
	transport := &http.Transport{DialContext: b.pod.DialContext}
	b.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// send is a request of another program.
func (b *bench) send(method, path, body string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.ctx, method, b.pod.URL()+path, strings.NewReader(body))
	require.NoError(b.t, err)
	req.Header.Set("Content-Type", "application/json")
	other := b.strange()
	defer other.CloseIdleConnections()
	resp, err := other.Do(req)
	require.NoError(b.t, err)
	require.NoError(b.t, resp.Body.Close())
	require.Equal(b.t, http.StatusOK, resp.StatusCode)
}

// prompt is what the pod knows of a prompt id.
func (b *bench) prompt(id string) comfyuitest.Prompt {
	b.t.Helper()
	prompts := b.pod.Prompts()
	i := slices.IndexFunc(prompts, func(p comfyuitest.Prompt) bool { return p.ID == id })
	require.GreaterOrEqual(b.t, i, 0, "the pod never had prompt %q", id)
	return prompts[i]
}

// untouched asserts that a prompt of somebody else ran once, to its end.
func (b *bench) untouched(id string) {
	b.t.Helper()
	p := b.prompt(id)
	assert.Equal(b.t, 1, p.Posts, "posts of a bystander")
	assert.Equal(b.t, 1, p.Runs, "runs of a bystander")
	assert.Equal(b.t, 1, p.Ends, "ends of a bystander")
	assert.Zero(b.t, p.Interrupts, "interrupts of a bystander")
}

// parsed is a workflow in API format.
func parsed(t *testing.T, text string) *comfyui.Workflow {
	t.Helper()
	w, err := comfyui.ParseWorkflow([]byte(text))
	require.NoError(t, err)
	return w
}

// journal keeps every event of a job, from the first on.
type journal struct {
	mu     sync.Mutex
	events []comfyui.Event
}

// option is for Submit and Execute.
func (j *journal) option() comfyui.JobOption {
	return comfyui.OnEvent(func(ev comfyui.Event) {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.events = append(j.events, ev)
	})
}

// all waits for what is on its way, without letting time pass, and returns what came.
func (j *journal) all() []comfyui.Event {
	synctest.Wait()
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.events)
}

// of returns the events of some kinds.
func (j *journal) of(kinds ...comfyui.EventKind) []comfyui.Event {
	return slices.DeleteFunc(j.all(), func(ev comfyui.Event) bool { return !slices.Contains(kinds, ev.Kind) })
}

// states are the kinds that tell where the job stands, in order.
func (j *journal) states() []comfyui.EventKind {
	var states []comfyui.EventKind
	for _, ev := range j.of(comfyui.EventQueued, comfyui.EventStarted, comfyui.EventRetrying, comfyui.EventSucceeded, comfyui.EventFailed, comfyui.EventCancelled) {
		states = append(states, ev.Kind)
	}
	return states
}

// A job's usual way.
var (
	wentWell     = []comfyui.EventKind{comfyui.EventQueued, comfyui.EventStarted, comfyui.EventSucceeded}
	ranAndFailed = []comfyui.EventKind{comfyui.EventQueued, comfyui.EventStarted, comfyui.EventFailed}
)

// sane asserts what holds for the events of every job, whatever happened to it.
func (j *journal) sane(t *testing.T) {
	t.Helper()
	evs := j.all()
	fraction, attempt := 0.0, 1
	queued, started := false, false
	for i, ev := range evs {
		p := ev.Progress
		assert.Equal(t, evs[0].JobID, ev.JobID, "event %d (%s)", i, ev.Kind)
		assert.False(t, i > 0 && ev.Time.Before(evs[i-1].Time), "event %d (%s) is older than the one before", i, ev.Kind)
		assert.GreaterOrEqual(t, p.Fraction, fraction, "event %d (%s): Fraction fell", i, ev.Kind)
		assert.False(t, p.Fraction >= 1 && ev.Kind != comfyui.EventSucceeded, "event %d (%s): Fraction is %v", i, ev.Kind, p.Fraction)
		assert.LessOrEqual(t, p.NodesDone, p.NodesTotal, "event %d (%s)", i, ev.Kind)
		assert.Equal(t, i == len(evs)-1, p.Status.Terminal(), "event %d of %d (%s): status %s", i, len(evs), ev.Kind, p.Status)
		fraction = p.Fraction
		switch ev.Kind {
		case comfyui.EventQueued:
			assert.False(t, queued, "event %d: queued twice", i)
			queued = true
		case comfyui.EventStarted:
			assert.True(t, queued && !started, "event %d: started out of turn", i)
			started = true
		case comfyui.EventRetrying:
			attempt++
			queued, started = false, false
		case comfyui.EventCached, comfyui.EventNode, comfyui.EventOutput, comfyui.EventPreview:
			assert.True(t, started, "event %d (%s) before the start", i, ev.Kind)
		}
		assert.Equal(t, attempt, ev.Attempt, "event %d (%s)", i, ev.Kind)
	}
}

// slowAnswer makes the pod handle requests of a path at once and answer them later.
func slowAnswer(method, path string, by time.Duration) comfyuitest.Option {
	return comfyuitest.WithHandler(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != method || !strings.HasSuffix(r.URL.Path, path) {
				next.ServeHTTP(w, r)
				return
			}
			answer := httptest.NewRecorder()
			next.ServeHTTP(answer, r)
			_ = pause(r.Context(), by)
			maps.Copy(w.Header(), answer.Header())
			w.WriteHeader(answer.Code)
			_, _ = w.Write(answer.Body.Bytes())
		})
	})
}
