package comfyuitest

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// peculiarity is what a recording needs beyond a pod and the same client.
type peculiarity struct {
	options []Option // the recorded server had a flag
	before  string   // a recording made just before, of which the answers tell
	// late: frames came so long after what they tell of that they give no timetable.
	late bool
	// lost: the last frames may come here though they did not come there.
	lost bool
	// ended: whether the job has ended when the first answer is made after the freeze is chance; the recordings have both.
	ended bool
	// slowUnseen: what no socket saw came later than the sockets' coming and going around it.
	slowUnseen bool
	// throttled: frames tell of steps only some 100 ms apart, which must not come closer here.
	throttled bool
	// code is another close code that is right: recordings disagree on it.
	code int
}

// peculiar lists the recordings that are not just played. None is left out. What is not compared in any of them: lengths of
// bodies apart from the bodies; numbers of log lines; facts of the machine (measuredKeys) and of the installation (ownWords);
// lines of tracebacks; how pictures are compressed, and what is on JPEG and WebP ones; the Content-Type of a 304, which net/http
// does not send.
var peculiar = map[string]peculiarity{
	"body-too-large":       {options: []Option{WithMaxUpload(1 << 20)}, code: websocket.CloseMessageTooBig},
	"compressed-responses": {options: []Option{WithCompression()}},
	"crash-in-node":        {lost: true},
	"frozen-gil":           {late: true, ended: true},
	"frozen-loop":          {late: true, ended: true},
	"progress-many-steps":  {throttled: true},
	"reconnect-abort":      {slowUnseen: true},
	"stalled-client":       {late: true},
	"subgraph-cycle":       {before: "subgraph-error"}, // current_outputs lists what the same node expanded to in the last job
	"subgraph-error":       {before: "subgraph-nested"},
}

// TestReplay replays every recording of a real server against the pod: the same requests and sockets in the same order and at
// the same distances, and holds every answer and every frame against what the server gave.
func TestReplay(t *testing.T) {
	t.Parallel()
	for _, release := range captureVersions {
		paths, err := filepath.Glob(filepath.Join(captureDir, release, "*.jsonl"))
		if err != nil || len(paths) != captureCounts[release] {
			t.Fatalf("%d recordings of %s: %v", len(paths), release, err)
		}
		for _, path := range paths {
			name := strings.TrimSuffix(filepath.Base(path), ".jsonl")
			t.Run(release+"/"+name, func(t *testing.T) {
				t.Parallel()
				lines := readCapture(t, path)
				synctest.Test(t, func(t *testing.T) { replayCapture(t, mustVersion(t, release), name, lines) })
			})
		}
	}
}

const (
	// replayPatience bounds every wait for something that the recording says will come; it is the bubble's time.
	replayPatience = 10 * time.Second
	// settleTime is how long a socket is listened to after its last recorded frame.
	settleTime = 20 * time.Millisecond
	// quick is how long requests take that wait for nothing.
	quick = 20 * time.Millisecond
	// raceMargin is the least distance between two things whose order is known.
	raceMargin = 20 * time.Microsecond
	// unseenDelay holds up ticks that no socket saw: those came later than the sockets' coming and going around them.
	unseenDelay = 3 * time.Millisecond
	// nodeTime is what a node takes at least, so that not all of a job happens in one instant of the bubble's clock.
	nodeTime = 10 * time.Microsecond
)

var recordedOn = time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC)

// replay is one recording on its way through a pod.
type replay struct {
	t        *testing.T
	peculiar peculiarity
	v        version
	lines    []capture
	pod      *Pod
	client   *http.Client
	start    time.Time

	mu        sync.Mutex
	differ    *differ
	failed    int
	timetable map[[2]string][]float64  // what is left of it, by prompt and step
	created   map[string]int64         // create_time by prompt, as far as /api/jobs tells
	durations map[string]time.Duration // by prompt, the same
	began     map[string]time.Time
	sockets   map[string]*replaySocket
	open      []*replayRequest
}

func replayCapture(t *testing.T, v version, name string, lines []capture) {
	t.Helper()
	time.Sleep(time.Until(recordedOn)) // a bubble's clock begins in the year 2000, before dates that requests name
	r := &replay{
		t: t, peculiar: peculiar[name], v: v, lines: lines, differ: newDiffer(), sockets: map[string]*replaySocket{}, start: time.Now(),
	}
	r.differ.sets = !v.atLeast(0, 3, 68)
	options := append([]Option{WithVersion(v.String()), WithPipes()}, r.peculiar.options...)
	for _, class := range recordedClasses(v) {
		takeTime(class)
		options = append(options, withClass(class))
	}
	r.pod = NewPod(options...)
	defer r.pod.Close()
	transport := &http.Transport{DialContext: r.pod.DialContext, DisableCompression: true}
	defer transport.CloseIdleConnections()
	r.client = &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	r.readJobs()
	r.prepare()
	r.prelude()
	time.Sleep(r.phase())
	r.start = time.Now()
	r.run()
	r.finish()
}

// takeTime makes a node as slow as the quickest are on a real server.
func takeTime(c *class) {
	run := c.run
	c.run = func(ctx context.Context, call *Call) error {
		wait(call.run.process.ctx, nodeTime)
		if run == nil {
			return nil
		}
		return run(ctx, call)
	}
}

// fail reports a difference; a recording that goes wrong early would report hundreds.
func (r *replay) fail(format string, args ...any) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed++
	if r.failed <= 6 {
		r.t.Errorf("%8.4fs %s", time.Since(r.start).Seconds(), fmt.Sprintf(format, args...))
	}
}

var savedFile = regexp.MustCompile(`"filename": "([^"]+)_(\d{5})_\.png", "subfolder": "([^"]*)", "type": "output"`)

// prepare brings the pod to where the recorded server was: one process made most recordings, one after the other.
func (r *replay) prepare() {
	for file, number := range r.firstFiles() {
		if number > 1 {
			name := fmt.Sprintf("%s_%05d_.png", file.prefix, number-1)
			r.pod.files.put(kindOutput, file.subfolder, name, r.viewed(name))
		}
	}
	r.pod.current().number = r.firstNumber()
	posted := r.posted()
	r.differ.foreign = func(id string) bool { return madeUpID.MatchString(id) && !posted[id] }
	r.pod.chance = chance{orderOutputs: r.recordedOrder}
	if !r.peculiar.late {
		r.timetable, r.began = r.readTimetable(), map[string]time.Time{}
		r.pod.chance.pace = r.pace
	}
}

// savedPrefix is what SaveImage numbers.
type savedPrefix struct{ subfolder, prefix string }

// firstFiles finds the first number of each prefix: the files before it are those of earlier recordings.
func (r *replay) firstFiles() map[savedPrefix]int {
	first := map[savedPrefix]int{}
	for _, line := range r.lines {
		for _, text := range []string{line.Text, string(line.Body)} {
			for _, found := range savedFile.FindAllStringSubmatch(text, -1) {
				file := savedPrefix{found[3], found[1]}
				number, err := strconv.Atoi(found[2])
				if err != nil {
					r.t.Fatal(err)
				}
				if known, ok := first[file]; !ok || number < known {
					first[file] = number
				}
			}
		}
	}
	return first
}

// posted are the ids of the recording's own prompts.
func (r *replay) posted() map[string]bool {
	ids := map[string]bool{}
	for _, line := range r.lines {
		for _, text := range []json.RawMessage{line.Request, line.Body} {
			var prompt struct {
				ID string `json:"prompt_id"`
			}
			if line.posts() && json.Unmarshal(text, &prompt) == nil {
				ids[prompt.ID] = true
			}
		}
	}
	return ids
}

// viewed is the whole file of that name, if the recording shows it.
func (r *replay) viewed(name string) []byte {
	for _, line := range r.lines {
		target, err := url.Parse(line.Path)
		if err != nil || line.Status != http.StatusOK || line.BodyBase64 == nil {
			continue
		}
		if query := target.Query(); query.Get("filename") == name && !query.Has("preview") && !query.Has("channel") {
			return line.BodyBase64
		}
	}
	return nil
}

// prelude runs what ran before.
func (r *replay) prelude() {
	name := r.peculiar.before
	if name == "" {
		return
	}
	number := r.pod.current().number
	for _, line := range readCapture(r.t, filepath.Join(captureDir, r.v.String(), name+".jsonl")) {
		if !line.posts() {
			continue
		}
		queued, err := send(r.pod, line.Method, line.Path, string(line.Request), nil)
		if err != nil || queued.status != http.StatusOK {
			r.t.Fatal(queued, err)
		}
	}
	if err := r.pod.WaitIdle(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	r.pod.ClearHistory()
	r.pod.current().number = number
}

// firstNumber is where the counter stood when the recording began.
func (r *replay) firstNumber() int64 {
	var used int64
	for _, line := range r.lines {
		if !line.posts() {
			continue
		}
		body, _ := parseJSON(line.Request)
		fields, isObject := body.(object)
		if _, given := fields.get("number"); given || !isObject && !strings.Contains(string(line.Request), "gzip") {
			continue
		}
		answer, _ := parseJSON(line.Body)
		given, _ := answer.(object)
		if number, _ := given.get("number"); line.Status == http.StatusOK {
			if n, isInt := number.(int64); isInt {
				return max(n, -n) - used
			}
		}
		used++
	}
	return 0
}

// recordedOrder is the order in which the recorded server took the outputs of a prompt: that of a Python set.
func (r *replay) recordedOrder(promptID string, outputs []string) []string {
	for _, line := range r.lines {
		order := outputsOf(line.Body, promptID)
		if slices.Equal(slices.Sorted(slices.Values(order)), slices.Sorted(slices.Values(outputs))) {
			return order
		}
	}
	return outputs
}

// run does what the client did, when it did it.
func (r *replay) run() {
	order := make([]int, len(r.lines))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(r.lines[a].done(), r.lines[b].done()) })
	for _, i := range order {
		line := r.lines[i]
		if line.Kind == "ws" || line.Kind == "ws-pong" {
			continue
		}
		r.awaitAnswers(line.done())
		time.Sleep(time.Until(r.start.Add(seconds(line.done()))))
		r.step(i, line)
	}
	r.awaitAnswers(math.Inf(1))
}

// awaitAnswers waits for what the recorded client had an answer to at that time.
func (r *replay) awaitAnswers(at float64) {
	r.open = slices.DeleteFunc(r.open, func(q *replayRequest) bool {
		if q.line.T > at {
			return false
		}
		select {
		case <-q.done:
		case <-time.After(replayPatience + seconds(q.line.Took)):
			r.fail("%s %s: no answer", q.line.Method, q.line.Path)
		}
		return true
	})
}

func (r *replay) step(i int, line capture) {
	switch line.Kind {
	case "note":
		r.note(i, line)
	case "ws-open":
		r.openSocket(line)
	case "ws-send":
		r.sendFrame(line, websocket.TextMessage, []byte(line.Text))
	case "ws-ping-sent":
		r.sendFrame(line, websocket.PingMessage, nil)
	case "ws-close":
		r.closeSocket(line)
	case "http":
		q := &replayRequest{line: line, done: make(chan struct{})}
		r.open = append(r.open, q)
		go func() {
			defer close(q.done)
			r.request(i, line)
		}()
	}
}

// note does what the recorded client noted beside the protocol: what it did to the process, and its unrecorded doings.
func (r *replay) note(i int, line capture) {
	switch line.Text {
	case "SIGKILL", "SIGTERM":
		r.pod.Restart(seconds(r.timeOfNote("the server listens") - line.T))
	case "SIGINT":
		// Silent at once, gone two seconds later.
		r.pod.Freeze()
		go func() {
			time.Sleep(seconds(r.timeOf("ws-close") - line.T))
			r.pod.Restart(time.Hour)
		}()
	case "a second client (not recorded) is connected and does not read":
		r.openStalled(i)
	case "the stalled client goes away":
		r.sockets["stalled"].abort()
	case "a text frame of 5 MB on the socket":
		r.sendHuge()
	}
}

func (r *replay) timeOfNote(text string) float64 {
	for _, line := range r.lines {
		if line.Kind == "note" && line.Text == text {
			return line.T
		}
	}
	return 3600
}

func (r *replay) timeOf(kind string) float64 {
	for _, line := range r.lines {
		if line.Kind == kind {
			return line.T
		}
	}
	return 0
}

// finish ends what the recording left open.
func (r *replay) finish() {
	for _, s := range r.sockets {
		time.Sleep(settleTime)
		r.checkFrames(s)
		s.abort()
		s.await()
	}
}
