package comfyuitest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/png"
	"path"
	"runtime"
	"strings"
	"sync"
	"time"
)

// Node is how a class behaves.
type Node struct {
	// Output marks an output node: one that a graph runs for. The others run only when an output needs them.
	Output bool
	// Inputs declares the inputs, for /object_info and validation: by name a type ("INT"), a list of choices, or
	// []any{type, options} as in /object_info; either flat, all of them required, or in the groups "required", "optional" and
	// "hidden". nil: anything goes, unchecked.
	Inputs map[string]any
	// Run is the node's work; nil: it ends at once. Its ctx ends with an interrupt, a restart and Close. A Run that looks at
	// neither ctx nor [Call.Progress] is a node that hears no interrupt, as many real ones are.
	Run func(ctx context.Context, c *Call) error
	// Async lets other nodes run while this one does, as nodes written with async def do since 0.3.45. A real graph
	// interleaves the frames of several nodes only with such.
	Async bool
	// OutputIsList tells, by output slot, that [Call.Return] gives a list there, as []any, whose items go to the next node one
	// by one.
	OutputIsList []bool
	// InputIsList gives Run whole lists: each value of [Call.Inputs] is then a []any. Otherwise a node behind a list runs once
	// for each of its items.
	InputIsList bool
}

// Steps returns an output node that reports n steps, each after the given time, and saves one small PNG under "images".
// An interrupt is seen at the next step, as in a sampler.
func Steps(n int, each time.Duration) Node {
	return Node{Output: true, Run: func(_ context.Context, c *Call) error {
		for step := range n {
			if !wait(c.life, each) {
				return c.life.Err()
			}
			c.Progress(float64(step+1), float64(n))
		}
		c.Save("images", "output", c.files().nextName("steps", ".png"), stepsPNG)
		return nil
	}}
}

// Fail returns an output node that ends with an exception of that type, such as "torch.OutOfMemoryError".
func Fail(exceptionType, message string) Node {
	return Node{Output: true, Run: func(context.Context, *Call) error {
		return &NodeError{ExceptionType: exceptionType, Message: message}
	}}
}

// NodeError ends a node as a Python exception would. Any other error that a Run returns is a RuntimeError with its text.
type NodeError struct{ ExceptionType, Message string }

// Error implements error.
func (e *NodeError) Error() string { return e.ExceptionType + ": " + e.Message }

// stepsPNG is what Steps saves: eight grey pixels square.
var stepsPNG = func() []byte {
	img := image.NewGray(image.Rect(0, 0, 8, 8))
	for i := range img.Pix {
		img.Pix[i] = 128
	}
	var buf bytes.Buffer
	_ = png.Encode(&buf, img) // into memory
	return buf.Bytes()
}()

// Call is one run of one node. A panic in Run ends the node as an exception does, with its text. The methods may be called from any goroutine while Run runs, but for [Call.Progress], which
// must be called by the goroutine that runs it.
type Call struct {
	PromptID, NodeID string
	// Inputs are the node's inputs by name: constants in the types of encoding/json, with numbers as json.Number, and what the
	// linked nodes gave to [Call.Return].
	Inputs map[string]any

	run   *run
	class *class
	life  context.Context // ends with the process, the job or Close, not with an interrupt
	// interrupt ends the ctx that Run got.
	interrupt context.CancelFunc

	mu          sync.Mutex
	over        bool // Run has returned, or the server no longer waits for it
	interrupted bool // a tick saw the interrupt
	bar         progressBar
	ui          object
	result      *callResult
}

// callResult is what a node gives to the nodes behind it.
type callResult struct {
	values  []any
	graph   object // of an expansion; nil: none
	expand  bool
	blocked *blocker
}

// blocker is an ExecutionBlocker.
type blocker struct{ message string }

// progressBar is the state of comfy.utils.ProgressBar, which newer servers throttle.
type progressBar struct {
	started    bool
	value, max float64
	sentAt     time.Time
	sentValue  float64
}

// The throttle of progress bars since 0.9.2.
const (
	throttleInterval = 100 * time.Millisecond
	throttlePercent  = 0.5
)

// Progress reports a step: a progress frame and, where the version has it, a progress_state. From 0.9.2 on steps are
// throttled: at most one each 100 ms and each 0.5 %, but the first and the last always. A value that is not above the last
// one begins a new bar.
//
// A reported step is where the server notices an interrupt. Progress does not return then: like an exception it ends Run,
// and the deferred calls run.
func (c *Call) Progress(value, max float64) { c.tick(value, max, nil) }

// Preview sends an image of the work so far, as a step of its own with the value of the last one. contentType is image/jpeg
// or image/png. Clients that announced supports_preview_metadata get a binary frame of type 4, others one of type 1.
func (c *Call) Preview(contentType string, data []byte) {
	checkPreview(contentType)
	c.mu.Lock()
	value, limit := c.bar.value, c.bar.max
	if !c.bar.started {
		value, limit = 0, 1
	}
	c.mu.Unlock()
	c.tick(value, limit, &previewImage{contentType, data})
}

// ProgressPreview is a step that carries an image, the way samplers send theirs: one step instead of the two that Progress
// and Preview make, with the image before the progress frame (type 4) or after it (type 1), and never throttled.
func (c *Call) ProgressPreview(value, max float64, contentType string, data []byte) {
	checkPreview(contentType)
	c.tick(value, max, &previewImage{contentType, data})
}

func checkPreview(contentType string) {
	if contentType != "image/jpeg" && contentType != "image/png" {
		panic(fmt.Sprintf("comfyuitest: a preview is image/jpeg or image/png, got %q", contentType))
	}
}

// Save stores a file and lists it under key in the outputs. fileType is "output" or "temp"; name may have a subfolder before
// it. A file of that name is replaced. Save panics if fileType is no folder of the server's.
func (c *Call) Save(key, fileType, name string, data []byte) {
	if !isKind(fileType) {
		panic(fmt.Sprintf("comfyuitest: Save: a file's type is output, temp or input, got %q", fileType))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over || c.life.Err() != nil {
		return
	}
	subfolder, filename := path.Split(path.Clean("/" + name))
	subfolder = strings.Trim(subfolder, "/")
	c.run.process.files.put(fileType, subfolder, filename, data)
	c.appendUI(key, object{{"filename", filename}, {"subfolder", subfolder}, {"type", fileType}})
}

// Put appends values to the list under key in the outputs; they need not be files. Floats may be NaN or infinite. Without
// values the key gets an empty list.
func (c *Call) Put(key string, values ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over {
		c.appendUI(key, values...)
	}
}

func (c *Call) appendUI(key string, values ...any) {
	list, _ := c.ui.get(key)
	items, _ := list.([]any)
	for _, v := range values {
		items = append(items, plainOutput(v))
	}
	if items == nil {
		items = []any{}
	}
	c.ui = c.ui.set(key, items)
}

// plainOutput is a value as the history keeps it, whatever Go type a node gave.
func plainOutput(v any) any {
	switch v := v.(type) {
	case nil, bool, string, float64, object:
		return v
	}
	parsed, err := parseJSON(pyJSON(v))
	if err != nil {
		return nil
	}
	return parsed
}

// Send sends a message of its own to the job's client, or to everyone if the job has none. data is anything that
// encoding/json takes.
func (c *Call) Send(msgType string, data any) {
	if c.alive() {
		c.run.process.hub.toClient(c.run.client, msgType, data)
	}
}

// Text sends text progress, a binary frame of type 3, to the job's client, or to everyone if the job has none.
func (c *Call) Text(text string) { c.sendText(c.run.client, text) }

func (c *Call) sendText(to client, text string) {
	if c.alive() {
		length := [4]byte{0, 0, byte(len(c.NodeID) >> 8), byte(len(c.NodeID))}
		c.run.process.hub.send(to, binaryFrame(3, length[:], []byte(c.NodeID), []byte(text)))
	}
}

// Return sets the values of the node's outputs, for the nodes that link to them.
func (c *Call) Return(values ...any) { c.setResult(callResult{values: values}) }

// Block gives an ExecutionBlocker to the nodes behind: they do not run, and the job still succeeds. A message makes an
// execution_error frame of the type ExecutionBlocked that is not the job's end; with an empty one no frame tells of it.
func (c *Call) Block(message string) { c.setResult(callResult{blocked: &blocker{message}}) }

// Expand puts a subgraph in the node's place. graph is in API format, with ids of its own, and becomes JSON; the server
// names the nodes "57.0.0.1" for the node 1 of the expansion of 57. results are the values of the node's outputs, or links
// into the subgraph: []any{"1", 0}. Inputs in a map[string]any may be values that are no JSON, as images are between nodes.
// Expand panics if graph is no JSON object.
func (c *Call) Expand(graph any, results ...any) {
	tree, isGraph := expansionTree(graph)
	if !isGraph {
		panic(fmt.Sprintf("comfyuitest: Expand: a graph is a JSON object, got %T", graph))
	}
	c.setResult(callResult{graph: tree, expand: true, values: results})
}

func (c *Call) setResult(r callResult) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over {
		c.result = &r
	}
}

// Pod returns the pod that runs the node, so that a node can do what nodes of real servers do to theirs: kill the worker,
// end the process, hold the event loop.
func (c *Call) Pod() *Pod { return c.run.process.pod }

// files is the pod's disk; one of its own for a node whose process has ended, so that nothing of it is seen.
func (c *Call) files() *fileStore {
	if c.life.Err() != nil {
		return newFileStore()
	}
	return c.run.process.files
}

// object is the node's instance: made once, and kept for as long as the jobs that follow have the same node.
func (c *Call) object(make func() any) any {
	return c.run.executor.instance(c.NodeID+"\x00"+c.class.name, make)
}

// extraPNGInfo is the hidden input EXTRA_PNGINFO: nil, or what the client put under extra_pnginfo.
func (c *Call) extraPNGInfo() any {
	extra, _ := c.run.item.extra.(object)
	info, _ := extra.get("extra_pnginfo")
	return info
}

// promptGraph is the hidden input PROMPT: the graph as it was posted, in the server's JSON.
func (c *Call) promptGraph() encoded { return c.run.item.prompt }

func (c *Call) alive() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.over && c.life.Err() == nil
}

// previewImage is an image on its way to the client.
type previewImage struct {
	contentType string
	data        []byte
}

// tick is the hook behind the server's progress bars.
func (c *Call) tick(value, limit float64, image *previewImage) {
	c.run.pace(paceTick, c.NodeID, number(value))
	c.mu.Lock()
	if c.over || c.life.Err() != nil {
		c.mu.Unlock()
		return
	}
	if !c.bar.due(c.run.process.version, value, limit, image != nil) {
		c.mu.Unlock()
		return
	}
	if c.run.executor.takeInterrupt() {
		c.interrupted, c.over = true, true
		c.mu.Unlock()
		c.interrupt()
		runtime.Goexit()
	}
	defer c.mu.Unlock()
	c.run.reportTick(c.NodeID, number(c.bar.value), number(limit), image)
}

// due notes a step and tells whether it is reported.
func (b *progressBar) due(v version, value, limit float64, image bool) bool {
	value = min(value, limit)
	first := !b.started || value <= b.value && !image || limit != b.max
	b.started, b.value, b.max = true, value, limit
	now := time.Now()
	report := first || image || value >= limit || !v.atLeast(0, 9, 2) ||
		now.Sub(b.sentAt) >= throttleInterval && (limit <= 0 || (value-max(0, b.sentValue))/limit*100 >= throttlePercent)
	if report {
		b.sentAt, b.sentValue = now, value
	}
	return report
}

// number is a float as the server's nodes give it: whole values are ints in Python.
func number(f float64) any {
	if whole := int64(f); float64(whole) == f {
		return whole
	}
	return f
}

// perform runs the node on a goroutine of its own, so that an interrupt can end it, and calls done at its end.
func (c *Call) perform(outcome *callOutcome, done func()) {
	ctx, interrupt := context.WithCancel(c.life)
	c.interrupt = interrupt
	c.run.executor.attach(c)
	returned := false
	defer func() {
		cause := recover()
		c.run.executor.detach(c)
		interrupt()
		c.mu.Lock()
		c.over = true
		outcome.interrupted = c.interrupted
		c.mu.Unlock()
		if !returned && !outcome.interrupted {
			outcome.raised = panicError(cause)
		}
		done()
	}()
	var err error
	if c.class.run != nil {
		c.run.process.pod.tasks.run(foreignCode{"node", c.class.name}, func() { err = c.class.run(ctx, c) })
	}
	outcome.raised = exceptionOf(err) // which asks err for its text: that is the node's code too
	returned = true
	if errors.Is(err, context.Canceled) && ctx.Err() != nil && c.life.Err() == nil {
		// Only an interrupt ends ctx before the node's life: the node has seen it, as at a tick.
		c.run.executor.takeInterrupt()
		c.mu.Lock()
		c.interrupted = true
		c.mu.Unlock()
	}
}

// abandon lets a node that goes on after its process has ended say nothing more.
func (c *Call) abandon() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
}

// taken returns what the node gave.
func (c *Call) taken() (callResult, object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.result == nil {
		return callResult{}, c.ui
	}
	return *c.result, c.ui
}

// callOutcome is how one call of a node ended.
type callOutcome struct {
	raised      *NodeError
	interrupted bool
}

// exceptionOf makes a Python exception of what Run returned; nil for no error.
func exceptionOf(err error) *NodeError {
	if err == nil {
		return nil
	}
	var raised *NodeError
	if errors.As(err, &raised) && raised != nil {
		return raised
	}
	return &NodeError{ExceptionType: "RuntimeError", Message: err.Error()}
}

// panicError makes a Python exception of a panic, or of a Run that ended its goroutine.
func panicError(cause any) *NodeError {
	if cause == nil {
		return &NodeError{ExceptionType: "RuntimeError", Message: "the node ended its goroutine"}
	}
	return &NodeError{ExceptionType: "RuntimeError", Message: fmt.Sprint("panic: ", cause)}
}
