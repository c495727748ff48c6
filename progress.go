package comfyui

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/comfypod/comfyui/internal/wire"
)

// Status is where a job stands.
type Status string

// A job goes from pending (recorded, not yet taken by the pod, or waiting for its next attempt) to queued (in the pod's queue)
// to running, and ends as succeeded, failed or cancelled. A new attempt takes it back to pending; an end is final.
const (
	StatusPending   Status = "pending"
	StatusQueued    Status = "queued"
	StatusRunning   Status = "running"
	StatusSucceeded Status = "succeeded"
	StatusFailed    Status = "failed"
	StatusCancelled Status = "cancelled"
)

// Terminal tells whether s is an end.
func (s Status) Terminal() bool {
	return s == StatusSucceeded || s == StatusFailed || s == StatusCancelled
}

// Progress is a snapshot of how far a job is.
type Progress struct {
	Status Status `json:"status"`
	// Fraction blends finished nodes and the steps of running ones, from 0 to 1. It never falls, not even when a new
	// attempt begins, and is 1 only for a job that succeeded.
	Fraction float64 `json:"fraction"`
	// QueueAhead is how many prompts the pod runs before this one, as of the last look at its queue; -1: not known.
	QueueAhead int `json:"queue_ahead"`
	// NodesDone of NodesTotal nodes have run or were taken from the pod's cache, in this attempt. Nodes that no output
	// needs never run, so a succeeded job may show fewer done.
	NodesDone  int `json:"nodes_done"`
	NodesTotal int `json:"nodes_total"`
	// Node is the id of the node that runs, as the workflow names it: for a node that expanded into others, the outer one.
	Node      string `json:"node,omitempty"`
	NodeClass string `json:"node_class,omitempty"`
	NodeTitle string `json:"node_title,omitempty"`
	// Step of Steps of that node, as it reports them; a node may start over.
	Step  float64 `json:"step,omitempty"`
	Steps float64 `json:"steps,omitempty"`
	// Elapsed is since this attempt began to run; Remaining is an estimate from the pace so far, 0: not known.
	Elapsed   time.Duration `json:"elapsed_ns"`
	Remaining time.Duration `json:"remaining_ns,omitempty"`
}

// EventKind says what an Event tells.
type EventKind string

// Kinds of events. The states (snapshot, queued, started, retrying, and the three ends) reach every subscriber; of the
// others a slow subscriber gets the newest.
const (
	EventSnapshot  EventKind = "snapshot" // the first event of Job.Events: where the job stands
	EventQueued    EventKind = "queued"   // the pod has taken this attempt
	EventStarted   EventKind = "started"
	EventCached    EventKind = "cached" // Progress.NodesDone counts the nodes that the pod took from its cache
	EventNode      EventKind = "node"   // another node runs
	EventProgress  EventKind = "progress"
	EventOutput    EventKind = "output" // a node's outputs, before the job has ended
	EventPreview   EventKind = "preview"
	EventWarning   EventKind = "warning"  // Err tells
	EventRetrying  EventKind = "retrying" // a new attempt will be made; Err tells why
	EventStream    EventKind = "stream"   // the state of the WebSocket changed
	EventSucceeded EventKind = "succeeded"
	EventFailed    EventKind = "failed"
	EventCancelled EventKind = "cancelled"
	EventOther     EventKind = "other" // a message type that the library does not know; Raw holds it
)

// state tells whether every subscriber must see an event of this kind.
func (k EventKind) state() bool {
	switch k {
	case EventSnapshot, EventQueued, EventStarted, EventRetrying, EventSucceeded, EventFailed, EventCancelled:
		return true
	}
	return false
}

// Source says where an Event's news came from.
type Source string

// Sources of events.
const (
	SourceStream Source = "stream" // the pod's WebSocket
	SourcePoll   Source = "poll"   // the pod's HTTP routes
	SourceStore  Source = "store"  // another process, through the store
	SourceLocal  Source = "local"  // this client's own doing: pending, retrying, warnings
)

// Event is one piece of news of a job. It marshals to JSON and back; Err keeps its category, detail and sentinels, so
// errors.Is and errors.As work after.
type Event struct {
	Kind     EventKind
	JobID    string
	PromptID string
	Attempt  int
	Time     time.Time
	Source   Source
	Node     string // of kinds node, progress, output, preview
	Progress Progress
	Outputs  []Output // of kind output: the node's; of an end: all
	Preview  *Preview
	Stream   StreamState // of kind stream
	Err      error       // of kinds warning, retrying, failed, cancelled
	Raw      json.RawMessage
}

// eventJSON is the JSON form of Event.
type eventJSON struct {
	Kind     EventKind       `json:"kind"`
	JobID    string          `json:"job_id"`
	PromptID string          `json:"prompt_id,omitempty"`
	Attempt  int             `json:"attempt"`
	Time     time.Time       `json:"time"`
	Source   Source          `json:"source"`
	Node     string          `json:"node,omitempty"`
	Progress Progress        `json:"progress"`
	Outputs  []Output        `json:"outputs,omitempty"`
	Preview  *Preview        `json:"preview,omitempty"`
	Stream   StreamState     `json:"stream,omitempty"`
	Err      *Error          `json:"error,omitempty"`
	Raw      json.RawMessage `json:"raw,omitempty"`
}

// MarshalJSON writes e with its error in the form of Error.MarshalJSON.
func (e Event) MarshalJSON() ([]byte, error) {
	j := eventJSON{
		e.Kind, e.JobID, e.PromptID, e.Attempt, e.Time, e.Source, e.Node, e.Progress, e.Outputs, e.Preview, e.Stream, asError(e.Err), e.Raw,
	}
	return json.Marshal(j)
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (e *Event) UnmarshalJSON(data []byte) error {
	var j eventJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return fmt.Errorf("comfyui: decoding an event: %w", err)
	}
	*e = Event{
		Kind: j.Kind, JobID: j.JobID, PromptID: j.PromptID, Attempt: j.Attempt, Time: j.Time, Source: j.Source, Node: j.Node,
		Progress: j.Progress, Outputs: j.Outputs, Preview: j.Preview, Stream: j.Stream, Raw: j.Raw,
	}
	if j.Err != nil {
		e.Err = j.Err
	}
	return nil
}

// Preview is an image of unfinished work. Data is the receiver's to keep.
type Preview struct {
	Node        string `json:"node,omitempty"`
	ContentType string `json:"content_type"` // image/jpeg, image/png
	Data        []byte `json:"data"`
}

// jobState is what is known of one job: the record that the store keeps, and what only matters while an attempt is on the
// pod. apply alone changes it; it does no I/O, knows no clock and takes no lock, and whatever the order, repetition or
// omission of observations, an end is final and progress does not go back.
type jobState struct {
	rec     Record
	graph   *plan
	attempt attemptState
	hidden  *strings.Replacer // takes out of a text the secrets that the pod was given with the job; nil: there are none
}

// attemptState is forgotten when the next attempt begins.
type attemptState struct {
	nodes    map[string]*nodeRun // by display id; nil before the first frame about a node
	accounts bool                // the pod sends progress_state: it alone says which nodes are done
	base     float64             // Fraction when nodes from the cache were counted: the pace is measured from there
	outputs  []Output            // from executed frames: what stands if the history is gone
	ended    *wire.Message       // the terminal frame that the stream brought
	verdict  *verdict            // how this attempt ended, short of success; the tracker decides what follows
}

// nodeRun is the progress of one node of the workflow.
type nodeRun struct {
	done     bool
	fraction float64         // of its steps; does not fall when the node starts over
	inner    map[string]bool // nodes that it expanded into: finished or not
	finished int             // of these, so that news need not count them
}

// verdict is an end of an attempt that is not success.
type verdict struct {
	err         *Error
	interrupted bool // execution_interrupted: a cancel, ours or somebody's
	vanished    bool // not in the queue and not in the history
}

// observation is something learned about one job; see apply for the kinds.
type observation interface{}

type (
	// obsAccepted: the pod has taken this attempt.
	obsAccepted struct {
		promptID string // as the pod names it; old pods make their own
		clientID string // under which it was posted
		number   float64
		warnings []*Error
		source   Source
	}
	// obsQueued: the attempt was seen pending, with so many before it; ahead -1: not known.
	obsQueued struct {
		number float64
		ahead  int
	}
	// obsRunning: the attempt was seen in queue_running.
	obsRunning struct{ number float64 }
	// obsHistory: the attempt's history entry.
	obsHistory struct {
		entry   *wire.HistoryEntry
		outputs []Output
	}
	// obsSettled: the terminal frame stands alone; the history did not come.
	obsSettled struct{}
	// obsVanished: neither in the queue nor in the history, for good; err says what that means.
	obsVanished struct{ err *Error }
	// obsVerdict: an attempt ended before it was on the pod, or without the pod's word.
	obsVerdict struct{ err *Error }
	// obsRetry: a new attempt will be made at a time.
	obsRetry struct {
		promptID string
		at       time.Time
		err      *Error
	}
	// obsEnd: the job has ended so; err is nil for success.
	obsEnd struct {
		status Status
		err    *Error
	}
	// obsWarning: something that does not change the job's course.
	obsWarning struct{ err *Error }
	// obsPreview: an image of unfinished work.
	obsPreview struct{ preview *Preview }
	// obsText: a node's progress in words.
	obsText struct{ node, text string }
)

// apply takes one observation in and appends the events that it makes to evs. A *wire.Message is a frame of the stream about
// this job's prompt; it is not kept.
func (s *jobState) apply(o observation, now time.Time, evs []Event) []Event {
	if s.rec.Progress.Status.Terminal() {
		return evs
	}
	e := emitter{s: s, now: now, evs: evs}
	switch o := o.(type) {
	case *wire.Message:
		e.source = SourceStream
		e.frame(o)
	case obsPreview:
		e.source = SourceStream
		e.started()
		e.emit(Event{Kind: EventPreview, Node: o.preview.Node, Preview: o.preview})
	case obsText:
		e.source = SourceStream
		raw, _ := json.Marshal(map[string]string{"type": "progress_text", "node": o.node, "text": o.text})
		e.emit(Event{Kind: EventOther, Node: o.node, Raw: raw})
	case obsAccepted:
		e.source = o.source
		e.accepted(o)
	case obsQueued:
		e.source = SourcePoll
		e.queued(o)
	case obsRunning:
		e.source = SourcePoll
		e.seen(o.number)
		e.started()
	case obsHistory:
		e.source = SourcePoll
		e.history(o)
	case obsSettled:
		e.source = SourceStream
		e.settled()
	case obsVanished:
		e.source = SourcePoll
		e.judged(&verdict{err: o.err, vanished: true})
	case obsVerdict:
		e.source = SourceLocal
		e.judged(&verdict{err: o.err})
	case obsRetry:
		e.source = SourceLocal
		e.retry(o)
	case obsEnd:
		e.source = SourceLocal
		e.end(o.status, o.err)
	case obsWarning:
		e.source = SourceLocal
		e.warn(o.err)
	}
	return e.evs
}

// emitter is one call of apply.
type emitter struct {
	s      *jobState
	now    time.Time
	source Source
	evs    []Event
}

func (e *emitter) emit(ev Event) {
	r := &e.s.rec
	ev.JobID, ev.PromptID, ev.Attempt = r.JobID, r.PromptID, r.Attempt
	ev.Time, ev.Source, ev.Progress = e.now, e.source, r.Progress
	e.evs = append(e.evs, ev)
}

func (e *emitter) warn(err *Error) {
	e.s.rec.Warnings = append(e.s.rec.Warnings, err)
	e.emit(Event{Kind: EventWarning, Err: err})
}

func (e *emitter) accepted(o obsAccepted) {
	r := &e.s.rec
	if r.Accepted {
		return
	}
	r.Accepted = true
	r.PromptID, r.Number, r.ClientID = o.promptID, o.number, o.clientID
	if r.Progress.Status == StatusPending {
		r.Progress.Status = StatusQueued
	}
	e.emit(Event{Kind: EventQueued})
	for _, w := range o.warnings {
		e.warn(w)
	}
}

// seen takes a sight of the attempt on the pod, which proves that it was accepted.
func (e *emitter) seen(number float64) {
	r := &e.s.rec
	if !r.Accepted {
		e.accepted(obsAccepted{promptID: r.PromptID, clientID: r.ClientID, number: number})
	}
}

func (e *emitter) queued(o obsQueued) {
	e.seen(o.number)
	p := &e.s.rec.Progress
	// A look at the queue can be older than a frame: running does not go back to queued.
	// One that was not at the whole queue does not tell the place: that of the last one stands.
	if p.Status != StatusQueued || o.ahead < 0 || p.QueueAhead == o.ahead {
		return
	}
	p.QueueAhead = o.ahead
	e.emit(Event{Kind: EventProgress})
}

// started takes any sign that the attempt runs. After a verdict there is no such sign: what comes is late.
func (e *emitter) started() bool {
	r := &e.s.rec
	if e.s.attempt.verdict != nil {
		return false
	}
	if r.Started {
		return true
	}
	e.seen(r.Number)
	r.Started, r.Progress.Status, r.Progress.QueueAhead = true, StatusRunning, 0
	r.StartedAt = e.now
	e.s.attempt.base = r.Progress.Fraction
	e.emit(Event{Kind: EventStarted})
	return true
}

// frame takes a message of the stream about this prompt. Frames can come late, twice or not at all.
func (e *emitter) frame(m *wire.Message) {
	a := &e.s.attempt
	switch m.Type {
	case wire.ExecutionStart:
		e.started()
	case wire.ExecutionCached:
		if e.started() {
			e.cached(m.Cached)
		}
	case wire.Executing:
		if m.NodeNull || m.Node == "" { // the end of the prompt: the tracker reads the history
			return
		}
		if e.started() {
			e.executing(m.Node, m.Display)
		}
	case wire.Progress:
		if e.started() {
			e.progress(m)
		}
	case wire.ProgressState:
		if e.started() {
			e.progressState(m.Nodes)
		}
	case wire.Executed:
		if e.started() {
			e.executed(m)
		}
	case wire.ExecutionError:
		if blocked(m) {
			// Not an end: the job goes on without what the blocked node would have made.
			_, cause := e.s.executionError(m.Failure)
			e.warn(e.s.failure(CategoryExecution, cause))
			return
		}
		e.terminalFrame(m)
	case wire.ExecutionSuccess, wire.ExecutionInterrupted:
		e.terminalFrame(m)
	case wire.Other:
		e.emit(Event{Kind: EventOther, Raw: otherRaw(m)})
	}
	if a.ended == nil && a.verdict == nil {
		e.s.clock(e.now)
	}
}

// executionError is what the pod says of a failed node, without the secrets that the pod was given with the job: a node may
// repeat them.
func (s *jobState) executionError(f *wire.Failure) (Category, *ExecutionError) {
	category, err := classifyExecution(f)
	if s.hidden != nil {
		err.Message = s.hidden.Replace(err.Message)
		err.Traceback = slices.Clone(err.Traceback)
		for i, line := range err.Traceback {
			err.Traceback[i] = s.hidden.Replace(line)
		}
	}
	return category, err
}

// blocked tells the ExecutionBlocker's message, which looks like an error and is none: it has no timestamp, is not in the
// history, and the job goes on (server.md §3.3, blocked-* recordings).
func blocked(m *wire.Message) bool {
	return m.Type == wire.ExecutionError && m.Failure != nil && m.Failure.ExceptionType == "ExecutionBlocked"
}

func otherRaw(m *wire.Message) json.RawMessage {
	name, _ := json.Marshal(m.Name)
	data := []byte(m.Raw)
	if len(data) == 0 {
		data = []byte("null")
	}
	return bytes.Join([][]byte{[]byte(`{"type":`), name, []byte(`,"data":`), data, []byte(`}`)}, nil)
}

// terminalFrame notes the end that the stream tells of. The history decides; this says that it is time to read it.
func (e *emitter) terminalFrame(m *wire.Message) {
	if !e.started() {
		return
	}
	if e.s.attempt.ended == nil {
		kept := *m
		e.s.attempt.ended = &kept
	}
}

func (e *emitter) cached(nodes []string) {
	e.s.cached(nodes)
	if len(nodes) > 0 {
		e.s.attempt.base = e.s.rec.Progress.Fraction
		e.emit(Event{Kind: EventCached})
	}
}

// cached notes nodes that the pod did not have to run: the stream tells of them, and the history to who has not heard it.
func (s *jobState) cached(nodes []string) {
	for _, id := range nodes {
		if n, own := s.node(id, ""); own && !n.done {
			n.done = true
			s.rec.CachedNodes = append(s.rec.CachedNodes, id)
		}
	}
	s.sum()
}

// executing: on pods without progress_state it is all that tells when the node before is done.
func (e *emitter) executing(id, display string) {
	p := &e.s.rec.Progress
	n, own := e.s.node(id, display)
	if !own {
		n.within(id, false)
	}
	name := id
	if display != "" {
		name = display
	}
	if p.Node == name {
		return
	}
	// Where progress_state tells what is done, another node may run beside the one before.
	if before := e.s.attempt.nodes[p.Node]; before != nil && len(before.inner) == 0 && !e.s.attempt.accounts {
		before.done = true
	}
	e.current(name)
	e.s.sum()
	e.emit(Event{Kind: EventNode, Node: name})
}

// current makes a node the one that Progress names.
func (e *emitter) current(id string) {
	p := &e.s.rec.Progress
	p.Node, p.Step, p.Steps = id, 0, 0
	p.NodeClass, p.NodeTitle, _ = e.s.graph.node(id)
}

func (e *emitter) progress(m *wire.Message) {
	n, own := e.s.node(m.Node, m.Display)
	if own {
		if m.Node != e.s.rec.Progress.Node && m.Node != "" && !n.done {
			e.current(m.Node)
			e.emit(Event{Kind: EventNode, Node: m.Node})
		}
		n.step(m.Value, m.Max)
	}
	p := &e.s.rec.Progress
	if m.Max > 0 {
		p.Step, p.Steps = m.Value, m.Max
	}
	e.s.sum()
	e.s.clock(e.now)
	e.emit(Event{Kind: EventProgress, Node: p.Node})
}

// progressState is the pod's own account of all nodes so far (since 0.3.45).
func (e *emitter) progressState(nodes []wire.NodeState) {
	e.s.attempt.accounts = true
	p := &e.s.rec.Progress
	running, moved := "", false
	var step, steps float64
	for i := range nodes {
		st := &nodes[i]
		n, own := e.s.node(st.ID, st.Display)
		finished := st.State == "finished"
		switch {
		case own && finished:
			moved = moved || !n.done
			n.done = true
		case own:
			moved = n.step(st.Value, st.Max) || moved
		default:
			moved = n.within(st.ID, finished) || moved
		}
		if st.State == "running" && (own || st.Display != "") {
			running = st.Display
			if running == "" {
				running = st.ID
			}
			step, steps = st.Value, st.Max
		}
	}
	if running != "" && running != p.Node {
		e.current(running)
		e.s.sum()
		e.emit(Event{Kind: EventNode, Node: running})
		moved = false
	}
	// A node that reports no steps counts as one step of one, which is no news to show.
	if steps > 1 && (p.Step != step || p.Steps != steps) {
		p.Step, p.Steps, moved = step, steps, true
	}
	if moved {
		e.s.sum()
		e.s.clock(e.now)
		e.emit(Event{Kind: EventProgress, Node: p.Node})
	}
}

func (e *emitter) executed(m *wire.Message) {
	n, own := e.s.node(m.Node, m.Display)
	if own {
		n.done = true
	} else {
		n.within(m.Node, true)
	}
	e.s.sum()
	if len(m.Output) == 0 {
		return
	}
	outs := outputsOf(nil, []wire.NodeOutput{{Node: m.Node, Output: m.Output}})
	if len(outs) == 0 {
		return
	}
	a := &e.s.attempt
	if !hasOutputs(a.outputs, m.Node) {
		a.outputs = append(a.outputs, outs...)
	}
	e.emit(Event{Kind: EventOutput, Node: m.Node, Outputs: outs})
}

func hasOutputs(outs []Output, node string) bool {
	for i := range outs {
		if outs[i].Node == node {
			return true
		}
	}
	return false
}

// history decides how the attempt ended: by its last terminal message, because status_str can say success over an error
// (server.md §3.4); by status_str where there is no message.
func (e *emitter) history(o obsHistory) {
	if e.s.attempt.verdict != nil { // a limit, as a rule
		e.partial(o.outputs)
		return
	}
	e.seen(o.entry.Number)
	for i := range o.entry.Messages {
		if m := &o.entry.Messages[i]; m.Type == wire.ExecutionCached {
			e.s.cached(m.Cached)
		}
	}
	switch last := o.entry.Terminal(); {
	case last != nil:
		e.ended(last, o.outputs)
	case o.entry.Status == "success":
		e.succeed(o.outputs)
	default:
		e.judged(&verdict{err: e.s.failure(CategoryExecution, fmt.Errorf("the pod's history has status %q and no message that tells why", o.entry.Status))})
	}
}

// ended takes a terminal message, of the history or, failing that, of the stream.
func (e *emitter) ended(m *wire.Message, outs []Output) {
	switch m.Type {
	case wire.ExecutionSuccess:
		e.succeed(outs)
	case wire.ExecutionInterrupted:
		e.partial(outs)
		e.judged(&verdict{interrupted: true, err: e.s.failure(CategoryInterrupted, ErrInterrupted)})
	default:
		e.partial(outs)
		category, cause := e.s.executionError(m.Failure)
		e.judged(&verdict{err: e.s.failure(category, cause)})
	}
}

// settled ends the attempt by what the stream alone told.
func (e *emitter) settled() {
	if a := &e.s.attempt; a.ended != nil && a.verdict == nil {
		e.ended(a.ended, a.outputs)
	}
}

// partial keeps what an attempt made before it failed.
func (e *emitter) partial(outs []Output) { e.s.rec.Outputs = outs }

func (e *emitter) succeed(outs []Output) {
	if !e.started() {
		return
	}
	e.s.rec.Outputs = outs
	e.end(StatusSucceeded, nil)
}

// judged notes an end that is not success; the first one stands.
func (e *emitter) judged(v *verdict) {
	if e.s.attempt.verdict == nil {
		e.s.attempt.verdict = v
	}
}

func (e *emitter) retry(o obsRetry) {
	r := &e.s.rec
	r.Attempt++
	r.PromptID, r.Accepted, r.Started, r.Number = o.promptID, false, false, 0
	r.NextAttempt, r.Failure = o.at, o.err
	r.AttemptAt, r.StartedAt = time.Time{}, time.Time{}
	r.Outputs, r.CachedNodes = nil, nil
	r.Progress = Progress{Status: StatusPending, Fraction: r.Progress.Fraction, QueueAhead: -1, NodesTotal: r.Progress.NodesTotal}
	e.s.attempt = attemptState{}
	e.emit(Event{Kind: EventRetrying, Err: o.err})
}

func (e *emitter) end(status Status, err *Error) {
	r := &e.s.rec
	p := &r.Progress
	if e.s.attempt.verdict != nil && status == StatusSucceeded {
		return
	}
	e.s.clock(e.now)
	p.Status, p.Node, p.NodeClass, p.NodeTitle, p.Step, p.Steps, p.Remaining = status, "", "", "", 0, 0, 0
	r.FinishedAt, r.NextAttempt, r.Failure = e.now, time.Time{}, err
	kind := EventSucceeded
	switch status {
	case StatusSucceeded:
		for _, n := range e.s.attempt.nodes { // without progress_state nothing else tells it of an expansion or of a last node without output
			n.done = true
		}
		e.s.sum()
		p.Fraction, p.QueueAhead = 1, 0
	case StatusCancelled:
		kind = EventCancelled
	default:
		kind = EventFailed
	}
	if status != StatusSucceeded && r.Outputs == nil { // no history told of any
		r.Outputs = e.s.attempt.outputs
	}
	ev := Event{Kind: kind, Outputs: r.Outputs}
	if err != nil {
		err.Status, ev.Err = status, err
	}
	e.emit(ev)
	e.s.attempt = attemptState{}
}

// failure makes the error of this attempt.
func (s *jobState) failure(c Category, cause error) *Error {
	return &Error{
		Op: "execute", Pod: s.rec.Pod, JobID: s.rec.JobID, PromptID: s.rec.PromptID, Attempt: s.rec.Attempt,
		Status: s.rec.Progress.Status, Category: c, Err: cause,
	}
}

// node finds the run of the workflow's node that id belongs to; own is false for an inner node of an expansion, which counts
// for the outer one.
func (s *jobState) node(id, display string) (n *nodeRun, own bool) {
	_, _, own = s.graph.node(id)
	key := id
	if !own && display != "" {
		key = display
	}
	n = s.attempt.nodes[key]
	if n != nil {
		return n, own
	}
	n = &nodeRun{}
	if s.attempt.nodes == nil {
		s.attempt.nodes = map[string]*nodeRun{}
	}
	if _, _, known := s.graph.node(key); known || len(s.attempt.nodes) < s.rec.Progress.NodesTotal+maxStrangers {
		s.attempt.nodes[key] = n
	}
	return n, own
}

// maxStrangers bounds what is kept of nodes that are not the workflow's own, maxInner what is kept of those that one of its own
// has expanded into, whatever a pod sends. Each piece of news walks through the former.
const (
	maxStrangers = 256
	maxInner     = 10_000
)

// within takes in a node that n expanded into, and tells whether that was news.
func (n *nodeRun) within(id string, finished bool) bool {
	was, known := n.inner[id]
	if was || known && !finished || !known && len(n.inner) >= maxInner {
		return false
	}
	if n.inner == nil {
		n.inner = map[string]bool{}
	}
	n.inner[id] = finished
	if finished {
		n.finished++
	}
	return finished
}

// step takes in a node's own count and tells whether that was news.
func (n *nodeRun) step(value, steps float64) bool {
	if steps <= 0 || n.done {
		return false
	}
	f := math.Min(math.Max(value/steps, 0), 1)
	if !(f > n.fraction) {
		return false
	}
	n.fraction = f
	return true
}

// share is how much of the node is done, from 0 to 1.
func (n *nodeRun) share() float64 {
	if n.done {
		return 1
	}
	if len(n.inner) == 0 {
		return n.fraction
	}
	// One more may follow: an expansion tells of its nodes as they come.
	return float64(n.finished) / float64(len(n.inner)+1)
}

// almost is the most that Fraction shows before success.
const almost = 0.999

// sum counts nodes anew and raises Fraction; it never lowers it.
func (s *jobState) sum() {
	p := &s.rec.Progress
	done, weight := 0, 0.0
	for id, n := range s.attempt.nodes {
		w, own := s.graph.weight(id)
		if !own {
			continue
		}
		if n.done {
			done++
		}
		weight += w * n.share()
	}
	p.NodesDone = max(p.NodesDone, done)
	if total := s.graph.total(); total > 0 {
		if f := math.Min(weight/total, almost); f > p.Fraction {
			p.Fraction = f
		}
	}
}

// clock brings Elapsed and Remaining up to now.
func (s *jobState) clock(now time.Time) {
	p := &s.rec.Progress
	if s.rec.StartedAt.IsZero() {
		return
	}
	p.Elapsed = max(p.Elapsed, now.Sub(s.rec.StartedAt))
	p.Remaining = remaining(p.Elapsed, s.attempt.base, p.Fraction)
}

// remaining estimates from the pace since base; there is no estimate before a twentieth of the way.
func remaining(elapsed time.Duration, base, fraction float64) time.Duration {
	gained := fraction - base
	if elapsed <= 0 || gained < 0.05 || fraction >= 1 {
		return 0
	}
	left := float64(elapsed) * (1 - fraction) / gained
	if left > float64(30*24*time.Hour) {
		return 0
	}
	return time.Duration(left)
}

// plan is what a workflow tells of the work ahead. It never changes. A nil plan knows no node.
type plan struct {
	graph *graphInfo
	steps map[string]float64 // of nodes that say in their inputs how many steps they will make
	whole float64
}

// maxPlannedSteps bounds what one node may weigh against the others.
const maxPlannedSteps = 1000

// planOf weighs the nodes: a sampler of twenty steps is worth twenty-one nodes without steps, since that is where the time goes.
func planOf(w *Workflow) *plan {
	p := &plan{graph: w.graphInfo(), whole: float64(len(w.nodes))}
	for _, n := range w.nodes {
		steps := n.plannedSteps()
		if steps <= 1 {
			continue
		}
		if p.steps == nil {
			p.steps = map[string]float64{}
		}
		steps = math.Min(steps, maxPlannedSteps)
		p.steps[n.id] = steps
		p.whole += steps
	}
	return p
}

// graphOf is the plan of a stored job; nil when its workflow is gone.
func graphOf(r *Record) *plan {
	w, err := ParseWorkflow(r.Workflow)
	if err != nil {
		return nil
	}
	return planOf(w)
}

func (p *plan) node(id string) (class, title string, ok bool) {
	if p == nil {
		return "", "", false
	}
	return p.graph.node(id)
}

// weight is a node's part of the whole.
func (p *plan) weight(id string) (w float64, ok bool) {
	if _, _, ok = p.node(id); !ok {
		return 0, false
	}
	return 1 + p.steps[id], true
}

func (p *plan) total() float64 {
	if p == nil {
		return 0
	}
	return p.whole
}
