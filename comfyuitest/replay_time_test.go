package comfyuitest

import (
	"encoding/json"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

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
	case r.peculiar.slowUnseen:
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
		if line.posts() && json.Unmarshal(line.Body, &answer) == nil && r.created[answer.PromptID] != 0 {
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
		if r.peculiar.throttled && r.v.atLeast(0, 9, 2) {
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
		case line.posts() && line.Status == http.StatusOK && line.T > opened:
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
		if seen, ok := interruptOf(line); ok {
			interrupted = r.interruptBefore(line.T)
			ticks[seen.key] = seen // the tick that saw it
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
		if !line.posts() || json.Unmarshal(line.Request, &post) != nil || post.PromptID != t.key[0] {
			continue
		}
		seconds, _ := post.Prompt[root].Inputs["seconds"].(float64)
		return seconds * max(next.value-t.value, 1)
	}
	return 0
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

// tick is a progress frame.
type tick struct {
	key       [2]string // prompt and node
	value, at float64
}

func tickOf(line capture) (tick, bool) {
	message, ok := tickFrame(line)
	return tick{key: [2]string{message.Data.PromptID, message.Data.Node}, value: message.Data.Value}, ok && message.Type == "progress"
}

// interruptOf is the tick at which a node noticed an interrupt.
func interruptOf(line capture) (tick, bool) {
	message, ok := tickFrame(line)
	return tick{key: [2]string{message.Data.PromptID, message.Data.NodeID}, at: line.T}, ok && message.Type == "execution_interrupted"
}

type tickMessage struct {
	Type string `json:"type"`
	Data struct {
		Value    float64 `json:"value"`
		PromptID string  `json:"prompt_id"`
		Node     string  `json:"node"`
		NodeID   string  `json:"node_id"`
	} `json:"data"`
}

func tickFrame(line capture) (message tickMessage, ok bool) {
	err := json.Unmarshal([]byte(line.Text), &message)
	return message, err == nil
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
