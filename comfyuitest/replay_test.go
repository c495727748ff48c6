package comfyuitest

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"compress/zlib"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"io"
	"math"
	"mime/multipart"
	"net"
	"net/http"
	"net/textproto"
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

// TestReplay replays every recording of a real server against the pod: the same requests and sockets in the same order and at
// the same distances, and holds every answer and every frame against what the server gave.
func TestReplay(t *testing.T) {
	t.Parallel()
	for _, release := range captureVersions {
		paths, err := filepath.Glob(filepath.Join(captureDir, release, "*.jsonl"))
		if err != nil || len(paths) != 126 {
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
	t      *testing.T
	name   string
	v      version
	lines  []capture
	pod    *Pod
	client *http.Client
	start  time.Time

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
	r := &replay{t: t, name: name, v: v, lines: lines, differ: newDiffer(), sockets: map[string]*replaySocket{}, start: time.Now()}
	r.differ.sets = !v.atLeast(0, 3, 68)
	r.pod = NewPod(append(replayOptions(name), func(c *config) { c.version = v }, WithPipes(), func(c *config) {
		c.classes = recordedClasses(v)
		for _, class := range c.classes {
			takeTime(class)
		}
	})...)
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
		call.run.process.sleep(nodeTime)
		if run == nil || call.life.Err() != nil {
			return nil
		}
		return run(ctx, call)
	}
}

func replayOptions(name string) []Option {
	switch name {
	case "body-too-large":
		return []Option{WithMaxUpload(1 << 20)}
	case "compressed-responses":
		return []Option{WithCompression()}
	default:
		return nil
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
	first := map[[2]string]int{}
	for _, line := range r.lines {
		for _, text := range []string{line.Text, string(line.Body)} {
			for _, found := range savedFile.FindAllStringSubmatch(text, -1) {
				key := [2]string{found[3], found[1]}
				number, err := strconv.Atoi(found[2])
				if err != nil {
					r.t.Fatal(err)
				}
				if known, ok := first[key]; !ok || number < known {
					first[key] = number
				}
			}
		}
	}
	for key, number := range first {
		if number > 1 {
			name := fmt.Sprintf("%s_%05d_.png", key[1], number-1)
			r.pod.files.put(kindOutput, key[0], name, r.viewed(name))
		}
	}
	r.pod.current().number = r.firstNumber()
	posted := map[string]bool{}
	for _, line := range r.lines {
		if line.Method == http.MethodPost && strings.HasSuffix(line.Path, "/prompt") {
			answer, _ := parseJSON(line.Body)
			fields, _ := answer.(object)
			id, _ := fields.get("prompt_id")
			text, _ := id.(string)
			posted[text] = true
			var sent struct {
				PromptID string `json:"prompt_id"`
			}
			if json.Unmarshal(line.Request, &sent) == nil {
				posted[sent.PromptID] = true
			}
		}
	}
	r.differ.foreign = func(id string) bool { return madeUpID.MatchString(id) && !posted[id] }
	r.pod.chance = chance{orderOutputs: r.recordedOrder}
	if !slices.Contains([]string{"frozen-loop", "frozen-gil", "stalled-client"}, r.name) { // their frames came late
		r.timetable, r.began = r.readTimetable(), map[string]time.Time{}
		r.pod.chance.pace = r.pace
	}
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

// before names the recording before one whose answers tell of it: current_outputs lists what the last job's expansion of the
// same node left behind.
var before = map[string]string{"subgraph-error": "subgraph-nested", "subgraph-cycle": "subgraph-error"}

// prelude runs what ran before.
func (r *replay) prelude() {
	name := before[r.name]
	if name == "" {
		return
	}
	number := r.pod.current().number
	for _, line := range readCapture(r.t, filepath.Join(captureDir, r.v.String(), name+".jsonl")) {
		if line.Method != http.MethodPost || line.Path != "/prompt" {
			continue
		}
		resp, err := r.client.Post(r.pod.URL()+line.Path, "application/json", bytes.NewReader(line.Request))
		if err != nil {
			r.t.Fatal(err)
		}
		resp.Body.Close()
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
		if line.Method != http.MethodPost || !strings.HasSuffix(line.Path, "/prompt") {
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

// outputsOf finds the list of outputs of a prompt in an answer of /queue or /history.
func outputsOf(body json.RawMessage, promptID string) []string {
	if !bytes.Contains(body, []byte(promptID)) {
		return nil
	}
	value, err := parseJSON(body)
	if err != nil {
		return nil
	}
	var found []string
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case object:
			for _, f := range v {
				walk(f.value)
			}
		case []any:
			if isQueueItem(v) && v[1] == promptID {
				list, _ := v[4].([]any)
				for _, id := range list {
					text, _ := id.(string)
					found = append(found, text)
				}
				return
			}
			for _, inner := range v {
				walk(inner)
			}
		}
	}
	walk(value)
	return found
}

// pace holds a step of a job up until it was seen when it was recorded: the recorded server took its time where a pod
// takes none, and collected garbage now and then.
func (r *replay) pace(promptID, step string) {
	key := [2]string{r.recordedID(promptID), step}
	r.mu.Lock()
	times := r.timetable[key]
	if len(times) > 0 {
		r.timetable[key] = times[1:]
	}
	r.mu.Unlock()
	switch {
	case len(times) > 0:
		time.Sleep(time.Until(r.start.Add(seconds(times[0]))))
	case step == paceStart:
		r.mu.Lock()
		r.began[key[0]] = time.Now()
		r.mu.Unlock()
	case step == paceEnd:
		r.mu.Lock()
		began := r.began[key[0]]
		r.mu.Unlock()
		time.Sleep(time.Until(began.Add(r.durations[key[0]])))
	case r.name == "reconnect-abort":
		time.Sleep(unseenDelay)
	}
}

// recordedID is the id that a prompt had when it was recorded.
func (r *replay) recordedID(promptID string) string {
	if recorded := r.differ.renames.recorded(promptID); recorded != "" {
		return recorded
	}
	return promptID
}

// phase is where in a millisecond the replay begins: posts that came within one when they were recorded do so here, and
// others do not. Equal times are seen in the order of jobs and in whether two items of the queue can be compared.
func (r *replay) phase() time.Duration {
	var done []float64
	var created []int64
	for _, line := range r.lines {
		var answer struct {
			PromptID string `json:"prompt_id"`
		}
		if line.Method == http.MethodPost && json.Unmarshal(line.Body, &answer) == nil && r.created[answer.PromptID] != 0 {
			done, created = append(done, line.done()*1000), append(created, r.created[answer.PromptID])
		}
	}
	best, most := 0.5, -1
	for _, phase := range []float64{0.5, 0.1, 0.3, 0.7, 0.9} {
		fits := 0
		for i := 1; i < len(done); i++ {
			if same := created[i] == created[i-1]; same == (math.Floor(done[i]+phase) == math.Floor(done[i-1]+phase)) {
				fits++
			}
		}
		if fits > most {
			best, most = phase, fits
		}
	}
	return time.Duration(best * float64(time.Millisecond))
}

// readJobs finds when jobs were created, and how long those took that no socket saw, in answers of /api/jobs.
func (r *replay) readJobs() {
	r.created, r.durations = map[string]int64{}, map[string]time.Duration{}
	unseen := len(r.framesBySocket()) == 0
	for _, line := range r.lines {
		var answer struct {
			Jobs []struct {
				ID      string `json:"id"`
				Created int64  `json:"create_time"`
				Start   int64  `json:"execution_start_time"`
				End     int64  `json:"execution_end_time"`
			} `json:"jobs"`
		}
		if line.Kind != "http" || json.Unmarshal(line.Body, &answer) != nil {
			continue
		}
		for _, job := range answer.Jobs {
			r.created[job.ID] = job.Created
			if job.End > 0 && unseen {
				r.durations[job.ID] = time.Duration(job.End-job.Start) * time.Millisecond
			}
		}
	}
}

// readTimetable notes when each step of each prompt was done, by the socket that saw most of that step.
func (r *replay) readTimetable() map[[2]string][]float64 {
	timetable := map[[2]string][]float64{}
	for conn, frames := range r.framesBySocket() {
		steps := map[[2]string][]float64{}
		times := r.doneTimes(conn, frames)
		for i, line := range frames {
			for _, key := range stepsIn(line, steps) {
				steps[key] = append(steps[key], times[i])
				if key[1] == paceStart {
					// The worker took the item when it sent the status frame before.
					take := [2]string{key[0], paceTake}
					steps[take] = append(steps[take], times[max(i-1, 0)])
				}
			}
		}
		if r.name == "progress-many-steps" && r.v.atLeast(0, 9, 2) {
			spaceTicks(steps, frames, times)
		}
		for key, times := range steps {
			// A socket that came later may show as new what another has shown before.
			if known := timetable[key]; len(times) > len(known) || len(times) == len(known) && times[0] < known[0] {
				timetable[key] = times
			}
		}
	}
	return timetable
}

// throttle is the least time between two ticks that newer servers show.
const throttle = 0.1

// spaceTicks keeps ticks as far apart as the server had them, whatever the way of their frames took.
func spaceTicks(steps map[[2]string][]float64, frames []capture, times []float64) {
	var last tick
	for i, line := range frames {
		t, ok := tickOf(line)
		if !ok {
			continue
		}
		t.at = times[i]
		if last.key == t.key {
			t.at = max(t.at, last.at+throttle+raceMargin.Seconds())
		}
		steps[[2]string{t.key[0], strings.Join([]string{paceTick, t.key[1], strconv.Itoa(int(t.value))}, " ")}] = []float64{t.at}
		last = t
	}
}

func (r *replay) framesBySocket() map[string][]capture {
	frames := map[string][]capture{}
	for _, line := range r.lines {
		if line.Kind == "ws" {
			frames[line.Conn] = append(frames[line.Conn], line)
		}
	}
	return frames
}

// doneTimes are when the server did what the frames of a socket tell of. It is when they came, unless the status frame of
// a post came after them: all go through one queue, so what is before that frame was done before the post.
func (r *replay) doneTimes(conn string, frames []capture) []float64 {
	var posts []float64
	opened := 0.0
	for _, line := range r.lines {
		switch {
		case line.Kind == "ws-open" && line.Conn == conn:
			opened = line.T
		case line.Method == http.MethodPost && strings.HasSuffix(line.Path, "/prompt") && line.Status == http.StatusOK && line.T > opened:
			posts = append(posts, line.done())
		}
	}
	queued := make([]bool, len(frames))
	last := int64(0)
	for i, line := range frames {
		if remaining, ok := queueRemaining(line.Text); ok {
			queued[i] = i > 0 && remaining > last // only a post makes it grow
			last = remaining
		}
	}
	count := 0
	for _, is := range queued {
		if is {
			count++
		}
	}
	times := make([]float64, len(frames))
	limit := math.Inf(1)
	ticks := map[[2]string]tick{} // the next one of each node
	interrupted := math.Inf(1)    // when the interrupt came that the next tick would see
	for i, line := range slices.Backward(frames) {
		if strings.Contains(line.Text, `"type": "execution_interrupted"`) {
			interrupted = r.interruptBefore(line.T)
		}
		if queued[i] {
			if count--; count < len(posts) {
				limit = min(limit, posts[count])
			}
		}
		limit -= raceMargin.Seconds()
		times[i] = min(line.T, limit)
		if t, ok := tickOf(line); ok {
			if next, ok := ticks[t.key]; ok {
				times[i] = min(times[i], next.at-r.stepTime(t, next))
			}
			times[i] = min(times[i], interrupted-raceMargin.Seconds())
			interrupted = math.Inf(1)
			t.at = times[i]
			ticks[t.key] = t
		}
		limit = min(limit, times[i])
	}
	return times
}

// interruptBefore is when the last interrupt before t was done.
func (r *replay) interruptBefore(t float64) float64 {
	last := math.Inf(1)
	for _, line := range r.lines {
		is := strings.HasSuffix(line.Path, "/interrupt") || strings.HasSuffix(line.Path, "/cancel")
		if is && line.Method == http.MethodPost && line.Status == http.StatusOK && line.T-line.Took < t {
			last = line.done()
		}
	}
	return last
}

// tick is a progress frame.
type tick struct {
	key       [2]string // prompt and node
	value, at float64
}

func tickOf(line capture) (tick, bool) {
	var message struct {
		Type string `json:"type"`
		Data struct {
			Value    float64 `json:"value"`
			PromptID string  `json:"prompt_id"`
			Node     string  `json:"node"`
		} `json:"data"`
	}
	if json.Unmarshal([]byte(line.Text), &message) != nil || message.Type != "progress" {
		return tick{}, false
	}
	return tick{key: [2]string{message.Data.PromptID, message.Data.Node}, value: message.Data.Value}, true
}

// stepTime is how long the node slept at least between two ticks.
func (r *replay) stepTime(t, next tick) float64 {
	root, _, _ := strings.Cut(t.key[1], ".")
	for _, line := range r.lines {
		var post struct {
			PromptID string `json:"prompt_id"`
			Prompt   map[string]struct {
				Inputs map[string]any `json:"inputs"`
			} `json:"prompt"`
		}
		if line.Method != http.MethodPost || json.Unmarshal(line.Request, &post) != nil || post.PromptID != t.key[0] {
			continue
		}
		seconds, _ := post.Prompt[root].Inputs["seconds"].(float64)
		return seconds * max(next.value-t.value, 1)
	}
	return 0
}

func queueRemaining(text string) (int64, bool) {
	var message struct {
		Type string `json:"type"`
		Data struct {
			Status struct {
				ExecInfo struct {
					QueueRemaining int64 `json:"queue_remaining"`
				} `json:"exec_info"`
			} `json:"status"`
		} `json:"data"`
	}
	if json.Unmarshal([]byte(text), &message) != nil || message.Type != "status" {
		return 0, false
	}
	return message.Data.Status.ExecInfo.QueueRemaining, true
}

// stepsIn are the steps of which a frame tells.
func stepsIn(line capture, seen map[[2]string][]float64) [][2]string {
	value, err := parseJSON([]byte(line.Text))
	message, _ := value.(object)
	payload, _ := message.get("data")
	data, _ := payload.(object)
	id, _ := data.get("prompt_id")
	prompt, isText := id.(string)
	if err != nil || !isText {
		return nil
	}
	text := func(key string) string {
		v, _ := data.get(key)
		if v == nil {
			return ""
		}
		return pyStr(v)
	}
	step := func(parts ...string) [][2]string { return [][2]string{{prompt, strings.Join(parts, " ")}} }
	switch kind, _ := message.get("type"); kind {
	case "execution_start":
		return step(paceStart)
	case "execution_cached":
		return step(paceCached)
	case "executing":
		if text("node") == "" {
			return step(paceIdle)
		}
		return step(paceExecute, text("node"))
	case "progress":
		return step(paceTick, text("node"), text("value"))
	case "executed":
		return step(paceExecuted, text("node"))
	case "execution_success", "execution_interrupted":
		return step(paceEnd)
	case "execution_error":
		if text("exception_type") == "ExecutionBlocked" {
			return nil
		}
		return step(paceEnd)
	case "progress_state":
		return newStates(prompt, data, seen)
	}
	return nil
}

// newStates are the nodes that a progress_state shows running or finished for the first time.
func newStates(prompt string, data object, seen map[[2]string][]float64) [][2]string {
	var steps [][2]string
	nodes, _ := data.get("nodes")
	list, _ := nodes.(object)
	for _, f := range list {
		entry, _ := f.value.(object)
		state, _ := entry.get("state")
		key := [2]string{prompt, pyStr(state) + " " + f.key}
		if len(seen[key]) == 0 && (state == paceRunning || state == paceFinished) {
			steps = append(steps, key)
		}
	}
	return steps
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

// done is when the server did what the line tells of: for a request some time between its sending and its answer.
func (c capture) done() float64 {
	if c.Kind != "http" {
		return c.T
	}
	if c.Took > quick.Seconds() {
		return c.T - c.Took // it waited for something that makes it wait here too
	}
	return c.T - c.Took*0.4
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

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

// messageConn is a socket's protocol: gorilla's, or deflatedConn for what gorilla cannot take.
type messageConn interface {
	ReadMessage() (kind int, data []byte, err error)
	WriteMessage(kind int, data []byte) error
}

// replaySocket is a socket of the recorded client.
type replaySocket struct {
	name string
	conn messageConn
	raw  net.Conn
	want []capture

	mu       sync.Mutex
	received int
	pongs    int
	err      error
	ended    chan struct{}
}

func (r *replay) openSocket(line capture) {
	r.learn(line.Path)
	s := &replaySocket{name: line.Conn, ended: make(chan struct{})}
	for _, other := range r.lines {
		if other.Kind == "ws" && other.Conn == line.Conn {
			s.want = append(s.want, other)
		}
	}
	dialer := websocket.Dialer{NetDialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := r.pod.DialContext(ctx, network, addr)
		s.raw = conn
		return conn, err
	}}
	if strings.Contains(line.Headers["Sec-WebSocket-Extensions"], "permessage-deflate") {
		r.openDeflated(line, s)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), replayPatience)
	defer cancel()
	conn, resp, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(r.pod.URL(), "http")+r.differ.renames.actual(line.Path), nil)
	if resp != nil {
		defer resp.Body.Close()
	}
	switch {
	case line.Status == 0:
		if err == nil {
			r.fail("socket %s: connected, the server could not be reached", line.Conn)
			conn.Close()
		}
		return
	case err != nil:
		r.fail("socket %s: %v", line.Conn, err)
		return
	}
	r.compareHeaders("socket "+line.Conn, resp, line)
	s.conn = conn
	r.sockets[line.Conn] = s
	conn.SetPongHandler(func(string) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pongs++
		return nil
	})
	go r.read(s)
}

// openDeflated offers permessage-deflate as the recorded client did. Gorilla offers it without context takeover alone, which
// the server never confirms.
func (r *replay) openDeflated(line capture, s *replaySocket) {
	conn, err := r.pod.DialContext(context.Background(), "tcp", "")
	if err != nil {
		r.fail("socket %s: %v", line.Conn, err)
		return
	}
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: pod\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n", line.Path)
	if err != nil {
		r.fail("socket %s: %v", line.Conn, err)
		return
	}
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		r.fail("socket %s: %v %v", line.Conn, resp, err)
		return
	}
	defer resp.Body.Close()
	r.compareHeaders("socket "+line.Conn, resp, line)
	s.conn, s.raw = &deflatedConn{Conn: conn, reader: reader}, conn
	r.sockets[line.Conn] = s
	go r.read(s)
}

// deflatedConn is the client's end of a socket with permessage-deflate.
type deflatedConn struct {
	net.Conn

	reader  *bufio.Reader
	inflate inflater
}

func (c *deflatedConn) ReadMessage() (kind int, data []byte, err error) {
	var head [4]byte
	if _, err := io.ReadFull(c.reader, head[:2]); err != nil {
		return 0, nil, err
	}
	length := int(head[1])
	if length == 126 {
		if _, err := io.ReadFull(c.reader, head[2:]); err != nil {
			return 0, nil, err
		}
		length = int(binary.BigEndian.Uint16(head[2:]))
	}
	data = make([]byte, length)
	if _, err := io.ReadFull(c.reader, data); err != nil {
		return 0, nil, err
	}
	kind = int(head[0] & 15)
	if kind == websocket.CloseMessage {
		return 0, nil, io.EOF
	}
	if head[0]&0x40 == 0 {
		return 0, nil, fmt.Errorf("frame %x is not compressed", head)
	}
	data, err = c.inflate.expand(data)
	return kind, data, err
}

// WriteMessage writes short control frames, the only ones that the recorded client sent. The mask is zero.
func (c *deflatedConn) WriteMessage(kind int, data []byte) error {
	_, err := c.Write(append([]byte{0x80 | byte(kind), 0x80 | byte(len(data)), 0, 0, 0, 0}, data...))
	return err
}

// openStalled connects the client of the next post, and never reads.
func (r *replay) openStalled(i int) {
	for _, line := range r.lines[i:] {
		var body struct {
			ClientID string `json:"client_id"`
		}
		if line.Kind != "http" || json.Unmarshal(line.Request, &body) != nil || body.ClientID == "" {
			continue
		}
		s := &replaySocket{name: "stalled", ended: make(chan struct{})}
		close(s.ended)
		dialer := websocket.Dialer{NetDialContext: r.pod.DialContext}
		conn, resp, err := dialer.DialContext(context.Background(), "ws"+strings.TrimPrefix(r.pod.URL(), "http")+"/ws?clientId="+body.ClientID, nil)
		if err != nil {
			r.t.Fatal(err)
		}
		resp.Body.Close()
		s.conn, s.raw = conn, conn.NetConn()
		r.sockets[s.name] = s
		return
	}
	r.t.Fatal("nobody posts after the stalled client")
}

func (s *replaySocket) abort() { s.raw.Close() }

// read takes frames until the socket ends, and compares each with the recorded one.
func (r *replay) read(s *replaySocket) {
	defer close(s.ended)
	for {
		kind, data, err := s.conn.ReadMessage()
		s.mu.Lock()
		if err != nil {
			s.err = err
			s.mu.Unlock()
			return
		}
		n := s.received
		s.received++
		s.mu.Unlock()
		r.frame(s, n, kind, data)
	}
}

func (r *replay) frame(s *replaySocket, n, kind int, data []byte) {
	if n >= len(s.want) {
		if r.name == "crash-in-node" {
			return // the last frames before a crash may never come
		}
		r.fail("socket %s: frame %d, the server sent none: %s", s.name, n, short(data))
		return
	}
	want := s.want[s.expected(n, data)]
	wanted := fmt.Sprintf("socket %s, frame %d (recorded at %.4fs)", s.name, n, want.T)
	if (kind == websocket.BinaryMessage) != (want.Text == "") {
		r.fail("%s: got %s, want %s", wanted, short(data), short([]byte(want.Text)))
		return
	}
	if kind == websocket.BinaryMessage {
		r.compareBinary(wanted, data, want)
		return
	}
	r.compareJSON(wanted, data, []byte(want.Text))
}

// expected is the recorded frame that the n-th one is held against. A tick makes two frames, one after the other, and the
// status of a post may fall between them: then either order is right.
func (s *replaySocket) expected(n int, data []byte) int {
	is := func(i int, kind string) bool {
		return i >= 0 && i < len(s.want) && strings.HasPrefix(s.want[i].Text, `{"type": "`+kind+`"`)
	}
	status := bytes.HasPrefix(data, []byte(`{"type": "status"`))
	switch {
	case is(n, "progress_state") && is(n+1, "status") && is(n+2, "progress") && status:
		return n + 1
	case is(n-1, "progress_state") && is(n, "status") && is(n+1, "progress") && !status:
		return n - 1
	}
	return n
}

func (r *replay) sendFrame(line capture, kind int, data []byte) {
	s := r.sockets[line.Conn]
	if s == nil {
		r.fail("socket %s is not open", line.Conn)
		return
	}
	if err := s.conn.WriteMessage(kind, data); err != nil {
		r.fail("socket %s: %v", line.Conn, err)
	}
}

func (r *replay) sendHuge() {
	for _, s := range r.sockets {
		// The server closes before all is sent.
		_ = s.conn.WriteMessage(websocket.TextMessage, bytes.Repeat([]byte("x"), 5<<20))
	}
}

// closeSocket ends a socket as the client did, or waits for the end that the server made. Until then all frames of the
// recording must have come, and no others.
func (r *replay) closeSocket(line capture) {
	s := r.sockets[line.Conn]
	if s == nil {
		r.fail("socket %s is not open", line.Conn)
		return
	}
	switch line.How {
	case "client closed":
		r.checkFrames(s)
		_ = s.conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
		s.await()
		s.raw.Close()
	case "client aborted":
		r.checkFrames(s)
		s.abort()
	default:
		if !s.await() {
			r.fail("socket %s stays open, the server ended it: %s", s.name, line.How)
		}
		r.checkFrames(s)
		var closed *websocket.CloseError
		if code := 1006; errors.As(s.err, &closed) {
			code = closed.Code
			if code != line.Code && !(r.name == "body-too-large" && code == websocket.CloseMessageTooBig) {
				r.fail("socket %s: closed with %d, want %d", s.name, code, line.Code)
			}
		}
		s.raw.Close()
	}
	pongs := 0
	for _, other := range r.lines {
		if other.Kind == "ws-pong" && other.Conn == line.Conn {
			pongs++
		}
	}
	s.await()
	if s.pongs != pongs {
		r.fail("socket %s: %d pongs, want %d", s.name, s.pongs, pongs)
	}
	delete(r.sockets, line.Conn)
}

func (s *replaySocket) await() bool {
	select {
	case <-s.ended:
		return true
	case <-time.After(replayPatience):
		return false
	}
}

func (r *replay) checkFrames(s *replaySocket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.received; n < len(s.want) {
		r.fail("socket %s: %d frames, want %d; missing %s", s.name, n, len(s.want), short([]byte(s.want[n].Text)))
	}
}

// finish ends what the recording left open.
func (r *replay) finish() {
	for _, s := range r.sockets {
		time.Sleep(settleTime)
		r.checkFrames(s)
		s.raw.Close()
		s.await()
	}
}

// replayRequest is a request under way.
type replayRequest struct {
	line capture
	done chan struct{}
}

func (r *replay) request(i int, line capture) {
	ctx := context.Background()
	if strings.HasPrefix(line.Error, "TimeoutError") {
		timed, cancel := context.WithTimeout(ctx, seconds(line.Took))
		defer cancel()
		ctx = timed
	}
	body, contentType := r.requestBody(line)
	path := r.differ.renames.actual(line.Path)
	r.learn(line.Path)
	req, err := http.NewRequestWithContext(ctx, line.Method, r.pod.URL()+path, body)
	if err != nil {
		r.fail("%s %s: %v", line.Method, line.Path, err)
		return
	}
	req.URL.Path, req.URL.RawPath, req.URL.RawQuery = "", "", ""
	req.URL.Opaque = path // as it was written, with its odd escapes
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	for name, value := range line.RequestHeaders {
		req.Header.Set(name, r.differ.renames.actual(value))
	}
	if line.RequestHeaders["Accept-Encoding"] == "" {
		req.Header.Set("Accept-Encoding", "identity")
		if r.name == "compressed-responses" {
			req.Header.Set("Accept-Encoding", "gzip, deflate")
		}
	}
	resp, err := r.client.Do(req)
	wanted := fmt.Sprintf("%s %s (recorded at %.4fs)", line.Method, line.Path, line.T)
	switch {
	case err != nil && line.Status == 0:
		return
	case err != nil:
		r.fail("%s: %v, want %d", wanted, err, line.Status)
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		r.compareHeaders(wanted, resp, line)
		return
	}
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		r.fail("%s: %v", wanted, err)
		return
	}
	if resp.StatusCode != line.Status {
		r.fail("%s: got %d %s, want %d %s", wanted, resp.StatusCode, short(data), line.Status, short(line.Body))
		return
	}
	r.compareHeaders(wanted, resp, line)
	data, err = decompressed(resp, data)
	if err != nil {
		r.fail("%s: %v", wanted, err)
		return
	}
	r.compareBody(wanted, resp, data, line)
}

func decompressed(resp *http.Response, data []byte) ([]byte, error) {
	var reader io.Reader
	var err error
	switch resp.Header.Get("Content-Encoding") {
	case "gzip":
		reader, err = gzip.NewReader(bytes.NewReader(data))
	case "deflate":
		reader, err = zlib.NewReader(bytes.NewReader(data))
	default:
		return data, nil
	}
	if err != nil {
		return nil, err
	}
	return io.ReadAll(reader)
}

// learn marks the ids that the client made up.
func (r *replay) learn(text string) {
	for _, id := range clientMade.FindAllString(text, -1) {
		if r.differ.renames.actual(id) == id {
			r.differ.renames.know(id)
		}
	}
}

var clientMade = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}`)

// part is a field of a multipart body as it was recorded.
type part struct {
	Name        string  `json:"name"`
	Filename    *string `json:"filename"`
	ContentType string  `json:"content_type"`
	Bytes       string  `json:"bytes"`
	Value       string  `json:"value"`
}

// requestBody is what was sent, made again from what the recording tells of it.
func (r *replay) requestBody(line capture) (io.Reader, string) {
	if len(line.Request) == 0 || string(line.Request) == "null" {
		return nil, ""
	}
	var form struct {
		Multipart []part `json:"multipart"`
	}
	if json.Unmarshal(line.Request, &form) == nil && form.Multipart != nil {
		return r.formBody(form.Multipart)
	}
	var text string
	if json.Unmarshal(line.Request, &text) == nil {
		switch text {
		case "1.2 MB of JSON":
			text = `{"prompt": {}, "padding": "` + strings.Repeat("x", 1_200_000) + `"}`
		case "a prompt, gzip":
			return bytes.NewReader(r.compressedPrompt()), "application/json"
		}
		return strings.NewReader(text), "text/plain; charset=utf-8"
	}
	sent := r.differ.renames.actual(string(line.Request))
	r.learn(sent)
	return strings.NewReader(sent), "application/json"
}

// compressedPrompt is told by the history that follows.
func (r *replay) compressedPrompt() []byte {
	for _, line := range r.lines {
		value, err := parseJSON(line.Body)
		if err != nil {
			continue
		}
		entries, _ := value.(object)
		for _, f := range entries {
			entry, _ := f.value.(object)
			prompt, _ := entry.get("prompt")
			if item, ok := prompt.([]any); ok && isQueueItem(item) {
				var b bytes.Buffer
				w := gzip.NewWriter(&b)
				r.learn(f.key)
				if _, err := w.Write(pyJSON(object{{"prompt", item[2]}, {"prompt_id", f.key}})); err != nil {
					r.t.Fatal(err)
				}
				if err := w.Close(); err != nil {
					r.t.Fatal(err)
				}
				return b.Bytes()
			}
		}
	}
	r.t.Fatal("no history tells of the compressed prompt")
	return nil
}

func (r *replay) formBody(parts []part) (io.Reader, string) {
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	for _, p := range parts {
		disposition := fmt.Sprintf("form-data; name=%q", p.Name)
		header := textproto.MIMEHeader{}
		data := []byte(p.Value)
		if p.Filename != nil {
			disposition += fmt.Sprintf("; filename=%q", *p.Filename)
			header.Set("Content-Type", p.ContentType)
			data = r.fileBytes(p)
		}
		header.Set("Content-Disposition", disposition)
		field, err := w.CreatePart(header)
		if err != nil {
			r.t.Fatal(err)
		}
		if _, err := field.Write(data); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		r.t.Fatal(err)
	}
	return &b, w.FormDataContentType()
}

// fileBytes are the bytes of an uploaded file: base64, or "2020 bytes".
func (r *replay) fileBytes(p part) []byte {
	if count, isLarge := strings.CutSuffix(p.Bytes, " bytes"); isLarge {
		n, err := strconv.Atoi(count)
		if err != nil {
			r.t.Fatal(err)
		}
		if data := r.viewed(*p.Filename); len(data) == n {
			return data
		}
		return make([]byte, n)
	}
	data, err := base64.StdEncoding.DecodeString(p.Bytes)
	if err != nil {
		r.t.Fatal(err)
	}
	return data
}

// unrecorded are the headers that the recorder left out.
var unrecorded = []string{"Date", "Server"}

func (r *replay) compareHeaders(wanted string, resp *http.Response, line capture) {
	got := map[string]string{}
	for name, values := range resp.Header {
		if !slices.Contains(unrecorded, name) {
			got[name] = strings.Join(values, ", ")
		}
	}
	if resp.Close && resp.StatusCode != http.StatusSwitchingProtocols {
		got["Connection"] = "close" // net/http takes it out
	}
	if len(resp.TransferEncoding) > 0 {
		got["Transfer-Encoding"] = strings.Join(resp.TransferEncoding, ", ")
	}
	if line.Kind == "ws-open" {
		delete(got, "Upgrade")
		delete(got, "Sec-Websocket-Accept")
	}
	for name, want := range line.Headers {
		canonical := http.CanonicalHeaderKey(name)
		value, ok := got[canonical]
		delete(got, canonical)
		switch {
		case !ok && resp.StatusCode == http.StatusNotModified && canonical == "Content-Type":
			// net/http never sends it.
		case !ok:
			r.fail("%s: header %s is missing, want %q", wanted, name, want)
		case canonical == "Content-Length":
			// The length of what is compared apart from it.
		case !r.same(value, want):
			r.fail("%s: header %s is %q, want %q", wanted, name, value, want)
		}
	}
	for name, value := range got {
		r.fail("%s: header %s: %q, the server sent none", wanted, name, value)
	}
}

func (r *replay) same(got, want string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.differ.renames.same(got, want)
}

func (r *replay) compareBody(wanted string, resp *http.Response, data []byte, line capture) {
	kind := resp.Header.Get("Content-Type")
	switch {
	case line.Cut != "" || r.ownWords(line):
		return
	case line.BodyBase64 != nil:
		r.compareBytes(wanted, kind, data, line.BodyBase64)
	case line.BodyText != nil:
		r.compareJSON(wanted, data, []byte(*line.BodyText))
	case strings.HasPrefix(kind, "application/json"):
		r.compareJSON(wanted, data, line.Body)
	default:
		var text string
		if err := json.Unmarshal(line.Body, &text); err != nil {
			r.fail("%s: got text, want %s", wanted, short(line.Body))
			return
		}
		if string(data) != text {
			r.fail("%s: got %q, want %q", wanted, short(data), short([]byte(text)))
		}
	}
}

// ownWords tells of answers that say what an installation consists of: the pod has another.
func (r *replay) ownWords(line capture) bool {
	path, _, _ := strings.Cut(line.Path, "?")
	return slices.Contains([]string{"/", "/extensions", "/internal/folder_paths", "/internal/files/output", "/internal/logs/raw"}, path)
}

func (r *replay) compareJSON(wanted string, got, want []byte) {
	a, err := parseJSON(got)
	if err != nil {
		r.fail("%s: got %s: %v", wanted, short(got), err)
		return
	}
	b, err := parseJSON(want)
	if err != nil {
		r.fail("%s: the recording: %s: %v", wanted, short(want), err)
		return
	}
	r.mu.Lock()
	if strings.HasPrefix(r.name, "frozen-") {
		b = r.sameRemaining(a, b)
	}
	r.differ.found = nil
	r.differ.compare("", a, b)
	found := r.differ.found
	r.mu.Unlock()
	for i, difference := range found {
		if i == 3 {
			break
		}
		r.fail("%s: %s", wanted, difference)
	}
}

// sameRemaining makes nothing of queue_remaining in the first answer after a freeze: whether the job has ended by then is
// chance, and the recordings have both.
func (r *replay) sameRemaining(got, want any) any {
	answer, _ := want.(object)
	if _, is := answer.get("exec_info"); is && (r.differ.matches("", got, execInfoOf(0)) || r.differ.matches("", got, execInfoOf(1))) {
		return got
	}
	return want
}

func execInfoOf(remaining int64) object {
	return object{{"exec_info", object{{"queue_remaining", remaining}}}}
}

// compareBytes: pictures that the pod itself makes are compressed by another library, so what they show is compared.
func (r *replay) compareBytes(wanted, kind string, got, want []byte) {
	if bytes.Equal(got, want) {
		return
	}
	switch kind {
	case "image/png", "image/gif", "image/jpeg":
		r.comparePictures(wanted, kind, got, want)
	case "image/webp":
		if len(got) < 12 || string(got[:4]) != "RIFF" || string(got[8:12]) != "WEBP" {
			r.fail("%s: %x is no WebP", wanted, got[:min(len(got), 16)])
		}
	default:
		r.fail("%s: got %d bytes %x, want %d bytes %x", wanted, len(got), got[:min(len(got), 32)], len(want), want[:min(len(want), 32)])
	}
}

func (r *replay) comparePictures(wanted, kind string, got, want []byte) {
	a, _, err := image.Decode(bytes.NewReader(got))
	if err != nil {
		r.fail("%s: %v", wanted, err)
		return
	}
	b, _, err := image.Decode(bytes.NewReader(want))
	if err != nil {
		r.fail("%s: the recording: %v", wanted, err)
		return
	}
	if a.Bounds() != b.Bounds() {
		r.fail("%s: a picture of %v, want %v", wanted, a.Bounds(), b.Bounds())
		return
	}
	if kind == "image/jpeg" {
		return // lossy
	}
	for y := a.Bounds().Min.Y; y < a.Bounds().Max.Y; y++ {
		for x := a.Bounds().Min.X; x < a.Bounds().Max.X; x++ {
			if nrgbaAt(a, x, y) != nrgbaAt(b, x, y) {
				r.fail("%s: pixel %d,%d is %v, want %v", wanted, x, y, nrgbaAt(a, x, y), nrgbaAt(b, x, y))
				return
			}
		}
	}
	texts, wantedTexts := pngTextsOf(got), pngTextsOf(want)
	if len(texts) != len(wantedTexts) {
		r.fail("%s: texts %v, want %v", wanted, texts, wantedTexts)
		return
	}
	for i, text := range wantedTexts {
		if texts[i].keyword != text.keyword || !r.same(texts[i].text, text.text) {
			r.fail("%s: text %v, want %v", wanted, texts[i], text)
		}
	}
}

// compareBinary holds a binary frame against the recorded one, or against its beginning. Images are those of the run.
func (r *replay) compareBinary(wanted string, got []byte, want capture) {
	data := want.Binary
	if data == nil {
		data = want.BinaryPrefix
	}
	if len(got) < 8 || len(data) < 8 || !bytes.Equal(got[:4], data[:4]) {
		r.fail("%s: got %x, want %x", wanted, got[:min(len(got), 16)], data[:min(len(data), 16)])
		return
	}
	switch binary.BigEndian.Uint32(got) {
	case 1:
		if !bytes.Equal(got[4:8], data[4:8]) || !samePicture(got[8:], data[8:]) {
			r.fail("%s: got %x, want %x", wanted, got[:min(len(got), 24)], data[:min(len(data), 24)])
		}
	case 4:
		meta, picture := withMetadata(got)
		if want.Binary == nil {
			return // its beginning ends within the metadata
		}
		wantedMeta, wantedPicture := withMetadata(data)
		r.compareJSON(wanted, meta, wantedMeta)
		if !samePicture(picture, wantedPicture) {
			r.fail("%s: got a picture %x, want %x", wanted, picture[:min(len(picture), 8)], wantedPicture[:min(len(wantedPicture), 8)])
		}
	default:
		if want.Binary != nil && !bytes.Equal(got, data) || want.Binary == nil && len(got) != want.BinaryLength {
			r.fail("%s: got %x, want %x", wanted, short(got), short(data))
		}
	}
}

// withMetadata splits a frame of type 4.
func withMetadata(frame []byte) (meta, picture []byte) {
	length := int(binary.BigEndian.Uint32(frame[4:]))
	if length > len(frame)-8 {
		return nil, nil
	}
	return frame[8 : 8+length], frame[8+length:]
}

// samePicture tells whether both are of one format, by its first bytes.
func samePicture(got, want []byte) bool {
	return len(got) >= 4 && len(want) >= 4 && bytes.Equal(got[:3], want[:3])
}
