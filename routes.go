package comfyui

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"os"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/gorilla/websocket"

	"github.com/comfypod/comfyui/internal/wire"
)

// ---------------------------------------------------------------- the public routes

// Queue is a pod's queue. Pending stands in the order in which it will run.
type Queue struct{ Running, Pending []QueueItem }

// QueueItem is a prompt that waits or runs. Number is its priority: lower runs first. ExtraData and Workflow are as they were
// posted, but for what the pod itself put in.
type QueueItem struct {
	Number    float64
	PromptID  string
	ClientID  string
	ExtraData json.RawMessage
	Workflow  json.RawMessage
	Targets   []string // the output nodes that run
}

// HistoryEntry is a prompt that has ended, as the pod remembers it: in memory, until it restarts, and the newest 10,000 only.
// Status is "success" or "error", the latter for an interrupted one too, and "" where the pod keeps none; the last
// terminal message decides where they differ. Messages are [name, data] pairs.
type HistoryEntry struct {
	PromptID  string
	Status    string
	Completed bool
	Outputs   []Output
	Messages  []json.RawMessage
	Workflow  json.RawMessage
}

// SystemStats is what the pod says of its machine. Sizes are in bytes. Raw is the whole answer.
type SystemStats struct {
	Version, OS, Python, PyTorch string
	Args                         []string
	RAMTotal, RAMFree            int64
	Devices                      []Device
	Raw                          json.RawMessage
}

// Device is a GPU, or the CPU of a pod without one.
type Device struct {
	Name, Type                    string
	Index                         int
	VRAMTotal, VRAMFree           int64 // bytes
	TorchVRAMTotal, TorchVRAMFree int64
}

// Queue reads GET /queue. It carries the graphs of all prompts and can be megabytes.
func (c *PodClient) Queue(ctx context.Context) (*Queue, error) {
	var q *Queue
	err := c.repeat(ctx, retryOp{op: "queue"}, func(ctx context.Context) error {
		running, pending, _, err := c.endpoint.queue(ctx, true)
		if err != nil {
			return err
		}
		q = &Queue{Running: queueItems(running), Pending: queueItems(pending)}
		return nil
	})
	return q, err
}

func queueItems(items []wire.QueueItem) []QueueItem {
	to := make([]QueueItem, 0, len(items))
	for _, it := range items {
		to = append(to, QueueItem{it.Number, it.PromptID, it.ClientID, it.ExtraData, it.Graph, it.Outputs})
	}
	return to
}

// History reads GET /history/{id}. CategoryNotFound when the pod does not remember the prompt: it waits, runs, was never there,
// or is forgotten.
func (c *PodClient) History(ctx context.Context, promptID string) (*HistoryEntry, error) {
	const op = "history"
	if promptID == "" {
		return nil, c.refuse(op, "the prompt id is empty")
	}
	var entry *HistoryEntry
	err := c.repeat(ctx, retryOp{op: op}, func(ctx context.Context) error {
		h, err := c.endpoint.historyOf(ctx, promptID, true)
		if err != nil {
			return err
		}
		if h == nil {
			return &Error{
				Op: op, Pod: c.Name(), PromptID: promptID, Category: CategoryNotFound,
				Err: errors.New("the pod's history has no such prompt"),
			}
		}
		entry = &HistoryEntry{
			PromptID: h.PromptID, Status: h.Status, Completed: h.Completed,
			Outputs: outputsOf(c, h.Outputs), Messages: h.RawMessages, Workflow: h.Graph,
		}
		return nil
	})
	return entry, err
}

// outputsOf splits what nodes have put out. An output that cannot be read is kept raw.
func outputsOf(pod *PodClient, nodes []wire.NodeOutput) []Output {
	var outputs []Output
	for _, n := range nodes {
		values, err := wire.Outputs(n.Output)
		if err != nil {
			outputs = append(outputs, Output{Node: n.Node, Raw: n.Output, pod: pod})
			continue
		}
		for _, v := range values {
			o := Output{Node: n.Node, Key: v.Key, Text: v.Text, Raw: v.Raw, pod: pod}
			o.File = (*FileRef)(v.File)
			outputs = append(outputs, o)
		}
	}
	return outputs
}

// Interrupt stops a prompt that runs, at its next node or step. A prompt that waits, has ended or is unknown is left alone, with no
// error; Job.Cancel does more. On a pod older than 0.3.57, which interrupts whatever runs, it does so only while this prompt
// runs and nothing waits; otherwise CategoryConflict.
func (c *PodClient) Interrupt(ctx context.Context, promptID string) error {
	const op = "interrupt"
	if promptID == "" {
		return c.refuse(op, `the prompt id is empty, which would interrupt whatever runs; if that is meant, use Do(ctx, "POST", "/interrupt", nil, nil)`)
	}
	return c.repeat(ctx, retryOp{op: op}, func(ctx context.Context) error {
		targeted, err := c.endpoint.interruptsByID(ctx)
		if err != nil {
			return err
		}
		if targeted {
			return c.endpoint.interrupt(ctx, promptID, nil)
		}
		running, pending, _, err := c.endpoint.queue(ctx, false)
		if err != nil {
			return err
		}
		switch {
		case !slices.ContainsFunc(running, func(it wire.QueueItem) bool { return it.PromptID == promptID }):
			return nil
		case len(running) > 1 || len(pending) > 0:
			return &Error{
				Op: op, Pod: c.Name(), PromptID: promptID, Category: CategoryConflict,
				Err: errors.New("this pod can only interrupt whatever runs, and other prompts wait: one of them could be hit"),
			}
		}
		return c.endpoint.interrupt(ctx, promptID, nil)
	})
}

// DeleteQueued removes prompts that wait. One that runs, has ended or is unknown is left alone, with no error. An id that is queued
// twice loses one copy.
func (c *PodClient) DeleteQueued(ctx context.Context, promptIDs ...string) error {
	return c.repeat(ctx, retryOp{op: "delete queued"}, func(ctx context.Context) error {
		return c.endpoint.deleteQueued(ctx, nil, promptIDs...)
	})
}

// ClearQueue removes all prompts that wait, those of other clients too.
func (c *PodClient) ClearQueue(ctx context.Context) error {
	const op = "clear queue"
	// Repeated after a lost answer it could remove what others have queued since.
	return c.repeat(ctx, retryOp{op: op, safe: neverSent}, func(ctx context.Context) error {
		return c.endpoint.post(ctx, op, "/queue", []byte(`{"clear":true}`), nil)
	})
}

// ObjectInfo describes node classes, as GET /object_info does: all of them (several megabytes, seconds of the pod's event loop), or
// those named. A class that the pod does not have is not in the result.
func (c *PodClient) ObjectInfo(ctx context.Context, classes ...string) (map[string]json.RawMessage, error) {
	const op = "object info"
	all := map[string]json.RawMessage{}
	paths := []string{"/object_info"}
	if len(classes) > 0 {
		paths = paths[:0]
		for _, class := range classes {
			if class == "" {
				return nil, c.refuse(op, "the name of a class is empty")
			}
			paths = append(paths, "/object_info/"+url.PathEscape(class))
		}
	}
	for _, path := range paths {
		err := c.repeat(ctx, retryOp{op: op}, func(ctx context.Context) error {
			r, err := c.endpoint.read(ctx, call{op: op, method: http.MethodGet, path: path}, largeReply)
			if err != nil {
				return err
			}
			some, err := wire.ObjectInfo(r.body)
			if err != nil {
				return c.endpoint.malformed(op, r, err)
			}
			maps.Copy(all, some)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Models lists the model files in a folder such as "checkpoints", or the folders when folder is "". CategoryNotFound for a folder that
// the pod does not have.
func (c *PodClient) Models(ctx context.Context, folder string) ([]string, error) {
	path := "/models"
	if folder != "" {
		path += "/" + url.PathEscape(folder)
	}
	var names []string
	err := c.getJSON(ctx, "models", path, &names)
	return names, err
}

// SystemStats reads GET /system_stats. It asks the GPU, so it can fail after a CUDA fault.
func (c *PodClient) SystemStats(ctx context.Context) (*SystemStats, error) {
	var stats *SystemStats
	err := c.repeat(ctx, retryOp{op: "system stats"}, func(ctx context.Context) error {
		s, err := c.endpoint.systemStats(ctx)
		if err != nil {
			return err
		}
		stats = &SystemStats{
			s.Version, s.OS, s.Python, s.PyTorch, s.Args, s.RAMTotal, s.RAMFree, devicesOf(s.Devices), s.Raw,
		}
		return nil
	})
	return stats, err
}

func devicesOf(from []wire.Device) []Device {
	var devices []Device
	for _, d := range from {
		devices = append(devices, Device(d))
	}
	return devices
}

// Features reads GET /features: what the server supports, such as max_upload_size in bytes. CategoryNotFound from servers before
// 0.3.45.
func (c *PodClient) Features(ctx context.Context) (map[string]any, error) {
	var features map[string]any
	err := c.getJSON(ctx, "features", "/features", &features)
	return features, err
}

// FreeMemory asks the pod to unload its models, and to drop its caches. It does so between jobs, at once when it is idle.
func (c *PodClient) FreeMemory(ctx context.Context, unloadModels, freeMemory bool) error {
	return c.repeat(ctx, retryOp{op: "free memory"}, func(ctx context.Context) error {
		return c.endpoint.freeMemory(ctx, unloadModels, freeMemory)
	})
}

// UploadOption configures Upload and UploadMask.
type UploadOption func(*uploadOptions)

type uploadOptions struct {
	subfolder string
	fileType  string // "": the server's default, input
	overwrite bool
}

// UploadSubfolder puts the file into a subfolder, which the pod makes.
func UploadSubfolder(path string) UploadOption { return func(o *uploadOptions) { o.subfolder = path } }

// UploadTemp puts the file among the temporary ones, which a restart removes; the default is the input folder.
func UploadTemp() UploadOption { return func(o *uploadOptions) { o.fileType = "temp" } }

// UploadOverwrite replaces a file of that name; by default the pod gives the new one another name.
func UploadOverwrite() UploadOption { return func(o *uploadOptions) { o.overwrite = true } }

// Upload sends an image, or a video or audio file, to the pod and returns the name that the pod gave it: "x (1).png" when another
// file is called "x.png". name has no folders; see UploadSubfolder.
//
// r is streamed. It is sent again after a failure if it is an io.Seeker, from where it stands; the pod keeps one copy of equal
// content. When r tells its size (Len, or Seek) a file over the pod's limit is CategoryTooLarge before a byte is sent. Upload
// gives up after Timing.Request without progress.
func (c *PodClient) Upload(ctx context.Context, name string, r io.Reader, opts ...UploadOption) (FileRef, error) {
	return c.upload(ctx, uploadFile{op: "upload", path: "/upload/image", name: name, r: r}, opts)
}

// UploadMask sends a mask for original, which must be on the pod: CategoryNotFound otherwise, where the pod itself would answer with
// a name and save nothing. The pod puts the mask into the alpha channel of a copy of the original, under the name that is returned.
func (c *PodClient) UploadMask(ctx context.Context, original FileRef, name string, r io.Reader, opts ...UploadOption) (FileRef, error) {
	const op = "upload mask"
	if original.Filename == "" {
		return FileRef{}, c.refuse(op, "the original has no file name")
	}
	original.Type = cmp.Or(original.Type, "output")
	err := c.repeat(ctx, retryOp{op: op}, func(ctx context.Context) error {
		return c.exists(ctx, op, original)
	})
	if err != nil {
		return FileRef{}, err
	}
	return c.upload(ctx, uploadFile{op: op, path: "/upload/mask", original: &original, name: name, r: r}, opts)
}

func (c *PodClient) upload(ctx context.Context, f uploadFile, opts []UploadOption) (FileRef, error) {
	for _, opt := range opts {
		if opt != nil {
			opt(&f.uploadOptions)
		}
	}
	if fault := f.check(); fault != "" {
		return FileRef{}, c.refuse(f.op, fault)
	}
	f.measure()
	var ref FileRef
	again := func(err error) bool { return !f.stuck && (f.seeker != nil || neverSent(err)) }
	err := c.repeat(ctx, retryOp{op: f.op, safe: again}, func(ctx context.Context) (err error) {
		ref, err = c.endpoint.upload(ctx, &f)
		return err
	})
	return ref, err
}

// Do calls a route that the package has no method for, with the client's headers, credentials, prefix and query. path begins with a
// slash and may hold a query. body: nil; []byte, string or json.RawMessage, sent as JSON as they are; an io.Reader, streamed; else
// anything that marshals to JSON.
//
// An answer other than 2xx is an *Error. GET and HEAD are repeated by category; other methods only when nothing was sent. The caller
// closes the body; a silence of Timing.BodyIdle within it is an error of category timeout.
func (c *PodClient) Do(ctx context.Context, method, path string, query url.Values, body any) (*http.Response, error) {
	method = strings.ToUpper(cmp.Or(method, http.MethodGet))
	op := method + " " + pathOf(path)
	q := call{op: op, method: method}
	target, err := url.Parse(path)
	if err != nil {
		return nil, c.refuse(op, fmt.Sprintf("the path cannot be read: %v", withoutURL(err)))
	}
	if target.IsAbs() || target.Host != "" || !strings.HasPrefix(path, "/") {
		return nil, c.refuse(op, `the path must begin with a slash, as "/queue" does`)
	}
	q.path, q.query = target.EscapedPath(), target.Query()
	for k, v := range query {
		q.query[k] = append(q.query[k], v...)
	}
	open, err := bodyOf(body)
	if err != nil {
		return nil, c.refuse(op, "the body cannot be made into JSON: "+err.Error())
	}
	_, once := body.(io.Reader)
	safe := func(err error) bool {
		return neverSent(err) || !once && (method == http.MethodGet || method == http.MethodHead)
	}
	var resp *http.Response
	err = c.repeat(ctx, retryOp{op: op, safe: safe}, func(context.Context) (err error) {
		q := q
		q.body = open()
		resp, err = c.endpoint.send(ctx, q) //nolint:bodyclose // the caller's; and not bound to the loop, which it outlives
		return err
	})
	return resp, err
}

// pathOf is a path for an error's text: without query.
func pathOf(path string) string {
	path, _, _ = strings.Cut(path, "?")
	return clip(path)
}

func bodyOf(body any) (func() *outgoing, error) {
	var data []byte
	switch b := body.(type) {
	case nil:
		return func() *outgoing { return nil }, nil
	case []byte:
		data = b
	case json.RawMessage:
		data = b
	case string:
		data = []byte(b)
	case io.Reader:
		size := sizeOf(b)
		return func() *outgoing {
			return &outgoing{contentType: "application/octet-stream", size: size, open: func() io.Reader { return b }}
		}, nil
	default:
		var err error
		if data, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	return func() *outgoing { return jsonBody(data, nil) }, nil
}

// repeat runs a call under the retry policies until ctx or the client ends.
func (c *PodClient) repeat(ctx context.Context, what retryOp, try func(ctx context.Context) error) error {
	if err := c.usable(what.op); err != nil {
		return err
	}
	ctx, done := c.endpoint.bind(ctx)
	defer done()
	return c.endpoint.retries.do(ctx, what, func(ctx context.Context, _ int) error { return try(ctx) })
}

// usable is ErrClosed for a zero PodClient and for a closed one.
func (c *PodClient) usable(op string) error {
	if c == nil || c.endpoint == nil || c.endpoint.life.Err() != nil {
		return &Error{Op: op, Pod: c.Name(), Category: CategoryClosed, Err: ErrClosed}
	}
	return nil
}

// refuse is the error of a call that is wrong before it is sent.
func (c *PodClient) refuse(op, fault string) error {
	if err := c.usable(op); err != nil {
		return err
	}
	return &Error{Op: op, Pod: c.Name(), Category: CategoryValidation, Err: errors.New(fault)}
}

// getJSON is for small answers: encoding/json makes many times the memory of a bad one.
func (c *PodClient) getJSON(ctx context.Context, op, path string, to any) error {
	return c.repeat(ctx, retryOp{op: op}, func(ctx context.Context) error {
		r, err := c.endpoint.read(ctx, call{op: op, method: http.MethodGet, path: path}, smallReply)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(wire.Sanitize(r.body), to); err != nil {
			return c.endpoint.malformed(op, r, err)
		}
		return nil
	})
}

// ---------------------------------------------------------------- the endpoint

// endpoint speaks HTTP with one pod. It knows routes and errors, not jobs. Each call is one try, but for those through retries. It
// starts no goroutine of its own.
type endpoint struct {
	opts     *options
	timing   Timing
	counters *counters
	retries  *retrier
	client   *http.Client    // follows no redirect
	strange  *http.Client    // the same without cookies, for other hosts
	own      *http.Transport // nil: the caller's
	tells    bool            // the transport is net/http's, which tells how far a request got
	life     context.Context
	end      context.CancelCauseFunc

	lines *lines

	mu          sync.Mutex
	known       string    // the pod's version; "": not known
	maxUpload   int64     // of /features; 0: not known, -1: none told
	noCancel    time.Time // until then /api/jobs/{id}/cancel is taken as absent
	noJobsRoute time.Time // until then /api/jobs/{id} is taken as absent
	keepsIDs    bool      // the pod took the last prompt under the id that it was given
	health      healthMemory
}

// Bounds of what is read of an answer, after decompression.
const (
	smallReply   = 4 << 20
	largeReply   = 128 << 20 // /queue carries all graphs, /object_info all nodes, /history all outputs
	refusalReply = 64 << 10
	maxHops      = 5
	absentFor    = time.Minute // how long a route that was not there is not asked for again: the pod may be replaced
)

// newEndpoint does no I/O.
func newEndpoint(o *options, c *counters) *endpoint {
	e := &endpoint{opts: o, timing: o.timing.withDefaults(), counters: c}
	e.life, e.end = context.WithCancelCause(context.Background())
	e.retries = newRetrier(o, c, nil)
	client := http.Client{}
	if o.httpClient != nil {
		client = *o.httpClient
	}
	if client.Transport == nil {
		if shared, ok := http.DefaultTransport.(*http.Transport); ok {
			e.own = e.transport(shared)
			client.Transport = e.own
		}
	}
	_, e.tells = client.Transport.(*http.Transport)
	e.lines = openLines(client.Transport, o.base.Host)
	client.Timeout = 0 // it would cut bodies
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	strange := client
	strange.Jar = nil
	e.client, e.strange = &client, &strange
	return e
}

func (e *endpoint) transport(from *http.Transport) *http.Transport {
	t := from.Clone()
	t.DialContext = (&net.Dialer{Timeout: max(e.timing.Connect, 0), KeepAlive: 30 * time.Second}).DialContext
	t.TLSHandshakeTimeout = max(e.timing.Connect, 0)
	t.MaxIdleConnsPerHost = posters + errands + 8 // so that no connection is dropped that the next call needs
	t.MaxResponseHeaderBytes = 1 << 20
	// Without pings a dead HTTP/2 connection would swallow call after call.
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: max(e.timing.Ping, 0), PingTimeout: max(e.timing.Connect, 0)}
	return t
}

// close ends the calls in flight and the bodies that are being read: they return ErrClosed.
func (e *endpoint) close() {
	e.end(ErrClosed)
	if e.own != nil {
		e.own.CloseIdleConnections()
	}
}

// bind makes a ctx that ends with the client too.
func (e *endpoint) bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(e.life, func() { cancel(ErrClosed) })
	return ctx, func() {
		stop()
		cancel(context.Canceled)
	}
}

// url joins a path, which may be escaped, to the pod's prefix, and adds the kept query. It may hold credentials.
func (e *endpoint) url(path string, query url.Values) *url.URL {
	u := *e.opts.base
	full := u.EscapedPath() + path
	if plain, err := url.PathUnescape(full); err == nil {
		u.Path, u.RawPath = plain, full
	} else {
		u.Path, u.RawPath = full, ""
	}
	all := url.Values{}
	maps.Copy(all, query)
	for k, v := range e.opts.query {
		if _, taken := all[k]; !taken {
			all[k] = v
		}
	}
	u.RawQuery = all.Encode()
	return &u
}

// streamURL is where the WebSocket of a client id is. It may hold credentials.
func (e *endpoint) streamURL(clientID string) *url.URL {
	u := e.url("/ws", url.Values{"clientId": {clientID}})
	u.Scheme = map[string]string{"http": "ws", "https": "wss"}[u.Scheme]
	return u
}

// authorize sets the headers of the options, those of the header functions, and basic auth unless one of them is an Authorization.
func (e *endpoint) authorize(ctx context.Context, h http.Header) error {
	for name, values := range e.opts.header {
		h[name] = slices.Clone(values)
	}
	for _, f := range e.opts.headerFuncs {
		more, err := f(ctx)
		if err == nil {
			err = checkHeader(more)
		}
		if err != nil {
			return fmt.Errorf("the header function failed: %w", withoutURL(err))
		}
		for name, values := range more {
			h[http.CanonicalHeaderKey(name)] = slices.Clone(values)
		}
	}
	if user := e.opts.userinfo; user != nil && h.Get("Authorization") == "" {
		password, _ := user.Password()
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	if h.Get("User-Agent") == "" {
		h.Set("User-Agent", userAgent())
	}
	return nil
}

// checkHeader refuses what net/http would refuse at each try, as if the network had failed. It shows no value.
func checkHeader(h http.Header) error {
	for name, values := range h {
		if name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r) }) {
			return fmt.Errorf("the header name %q is empty or has a character that none may have", name)
		}
		if slices.ContainsFunc(values, func(v string) bool {
			return strings.ContainsFunc(v, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f })
		}) {
			return fmt.Errorf("the value of the header %s has a line feed or another control character in it; trim what comes from a file", name)
		}
	}
	return nil
}

var userAgent = sync.OnceValue(func() string {
	const module = "github.com/comfypod/comfyui"
	version := "devel"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range append([]*debug.Module{&info.Main}, info.Deps...) {
			if m.Path == module && m.Version != "" {
				version = strings.Trim(m.Version, "()")
			}
		}
	}
	return "comfyui-go/" + version
})

// dialer is that of the options, else one with the proxy, TLS and dial functions of the HTTP transport. It never offers compression:
// ComfyUI answers the offer in a form that the websocket package refuses.
func (e *endpoint) dialer() *websocket.Dialer {
	var d websocket.Dialer
	if e.opts.dialer != nil {
		d = *e.opts.dialer
	} else {
		d.Proxy = http.ProxyFromEnvironment
		if t, ok := e.client.Transport.(*http.Transport); ok {
			d.Proxy, d.NetDialContext, d.NetDialTLSContext = t.Proxy, t.DialContext, t.DialTLSContext
			if dial := t.Dial; dial != nil && d.NetDialContext == nil { //nolint:staticcheck // the caller's may still use it
				d.NetDial = dial
			}
			// The transport itself writes to its TLS settings at its first request; a clone comes after that.
			if d.TLSClientConfig = t.Clone().TLSClientConfig; d.TLSClientConfig != nil {
				d.TLSClientConfig.NextProtos = nil // a WebSocket is HTTP/1.1
			}
		}
	}
	d.EnableCompression = false
	if d.HandshakeTimeout == 0 {
		d.HandshakeTimeout = max(e.timing.Connect, 0)
	}
	if d.Jar == nil {
		d.Jar = e.client.Jar
	}
	return &d
}

// call is one HTTP request.
type call struct {
	op, method, path string
	query            url.Values
	header           http.Header
	body             *outgoing             // nil: none
	accept           func(status int) bool // beside 2xx
	small            bool                  // Timing.Request bounds the answer's body too
	needsBody        bool                  // the pod does nothing before it has the whole body
	roams            bool                  // a redirect to another host is followed, without credentials
}

// send makes one try, up to the answer's headers, within Timing.Request. An answer that is neither 2xx nor accepted becomes an *Error.
// The caller closes the body.
func (e *endpoint) send(ctx context.Context, q call) (*http.Response, error) {
	e.counters.calls.Add(1)
	resp, err := e.exchange(ctx, q)
	if err != nil {
		e.counters.callErrors.Add(1)
		return nil, err
	}
	return resp, nil
}

func (e *endpoint) exchange(ctx context.Context, q call) (*http.Response, error) {
	l := e.lifeline(ctx, q.op)
	reached := &connection{endpoint: e, line: l, body: q.body}
	l.reached = reached
	req, err := e.request(l, q, reached)
	if err != nil {
		l.end()
		return nil, err
	}
	client := e.client
	for hop := 0; ; hop++ {
		reached.tries.Store(0)
		cookies := req.Header["Cookie"] // without those of the jar
		resp, err := exchangeOnce(client, req)
		if err != nil {
			if resp != nil {
				_ = resp.Body.Close()
			}
			err = e.unanswered(l, q, req, reached, err)
			reached.over()
			l.end()
			return nil, err
		}
		if resp.Request == nil { // a RoundTripper of the caller's
			resp.Request = req
		}
		if resp.StatusCode/100 == 2 || q.accept != nil && q.accept(resp.StatusCode) {
			resp.Body = &incoming{from: resp.Body, line: l, req: req, small: q.small}
			if !q.small {
				l.pause()
			}
			return resp, nil
		}
		next, away := e.redirected(q, req, resp, hop)
		if next == nil {
			err := e.refused(l, q, req, resp)
			l.end()
			return nil, err
		}
		_ = resp.Body.Close()
		req = next
		if away {
			client = e.strange
		} else {
			req.Header["Cookie"] = cookies
		}
	}
}

// exchangeOnce is client.Do, which copies all headers for a redirect that it may have to follow: one of ours follows none.
func exchangeOnce(client *http.Client, req *http.Request) (*http.Response, error) {
	transport, ok := client.Transport.(*http.Transport)
	if !ok || client.Jar != nil {
		return client.Do(req)
	}
	resp, err := transport.RoundTrip(req)
	var notTLS tls.RecordHeaderError
	if errors.As(err, &notTLS) && string(notTLS.RecordHeader[:]) == "HTTP/" {
		err = http.ErrSchemeMismatch // as client.Do has it
	}
	return resp, err
}

func (e *endpoint) request(l *lifeline, q call, reached *connection) (*http.Request, error) {
	ctx := httptrace.WithClientTrace(l.ctx, reached.trace())
	req, err := http.NewRequestWithContext(ctx, q.method, "", nil)
	if err != nil {
		return nil, &Error{Op: q.op, Pod: e.opts.name, Category: CategoryValidation, Err: withoutURL(err)}
	}
	req.URL = e.url(q.path, q.query)
	req.Host = req.URL.Host
	req.Header.Set("Accept", "application/json, */*;q=0.5")
	if err := e.authorize(l.ctx, req.Header); err != nil {
		if cut := l.cut(); cut != nil {
			return nil, cut
		}
		return nil, &Error{Op: q.op, Pod: e.opts.name, Category: CategoryAuth, Err: &unsent{err}}
	}
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
		req.Header.Del("Host")
	}
	// What describes the message is not the options' to say, though they may have been copied from a browser: a transport reads no
	// compressed answer that it did not ask for itself.
	req.Header.Del("Accept-Encoding")
	maps.Copy(req.Header, q.header)
	if q.body != nil {
		q.body.moved, q.body.over = l.extend, l.ctx.Done()
		q.body.told = e.tells && q.body.replays && q.body.size <= wholeBody
		q.body.attach(req)
	}
	return req, nil
}

// redirected is the request that a redirect asks for; nil: it is not followed. Only GET and HEAD follow, within the pod's own
// origin with all headers, elsewhere only for a call that roams, and then without credentials. A login page is no answer; a
// call that roams looks at what comes, since a file can have any name.
func (e *endpoint) redirected(q call, from *http.Request, resp *http.Response, hop int) (next *http.Request, away bool) {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return nil, false
	}
	if hop >= maxHops || q.method != http.MethodGet && q.method != http.MethodHead {
		return nil, false
	}
	location := resp.Header.Get("Location")
	to, err := from.URL.Parse(location)
	if err != nil || location == "" || to.Scheme != "http" && to.Scheme != "https" || isLogin(location) && !q.roams {
		return nil, false
	}
	to.User = nil
	home := sameOrigin(from.URL, to)
	if !home && !q.roams || from.URL.Scheme == "https" && to.Scheme == "http" {
		return nil, false
	}
	next = from.Clone(from.Context())
	next.URL = to
	if from.Body != nil && from.Body != http.NoBody {
		if from.GetBody == nil {
			return nil, false // it is spent
		}
		next.Body, _ = from.GetBody() // an outgoingReader's does not fail
	}
	if home {
		return next, false
	}
	next.Host = ""
	next.Header = http.Header{"User-Agent": {userAgent()}}
	for _, name := range []string{"Accept", "Accept-Encoding", "Range", "If-Range", "If-None-Match", "If-Modified-Since"} {
		if v := q.header[name]; len(v) > 0 {
			next.Header[name] = v
		}
	}
	return next, true
}

// sameOrigin takes an upgrade to https on the default ports as the same.
func sameOrigin(a, b *url.URL) bool {
	if !strings.EqualFold(a.Hostname(), b.Hostname()) {
		return false
	}
	return a.Scheme == b.Scheme && portOf(a) == portOf(b) || a.Scheme == "http" && portOf(a) == "80" && b.Scheme == "https" && portOf(b) == "443"
}

func portOf(u *url.URL) string {
	if p := u.Port(); p != "" {
		return p
	}
	return map[string]string{"http": "80", "https": "443"}[u.Scheme]
}

// lifeline is what a call hangs on: it ends with the caller's ctx, with the client, and when nothing moves for too long.
type lifeline struct {
	endpoint *endpoint
	op       string
	ctx      context.Context
	cancel   context.CancelCauseFunc
	unhook   func() bool
	reached  *connection // nil: nothing was sent

	mu    sync.Mutex
	timer *time.Timer   // nil: no limit
	limit time.Duration // what the timer runs for
	over  bool          // nothing starts the timer again
}

// errOver is the cause of a call that ended as it should.
var errOver = errors.New("the call is over")

// silence is the cause of a call that ended for want of an answer.
type silence time.Duration

func (s silence) Error() string { return fmt.Sprintf("the pod was silent for %s", time.Duration(s)) }
func (s silence) Timeout() bool { return true }

func (e *endpoint) lifeline(parent context.Context, op string) *lifeline {
	l := &lifeline{endpoint: e, op: op, limit: e.timing.Request}
	l.ctx, l.cancel = context.WithCancelCause(parent)
	l.unhook = context.AfterFunc(e.life, func() { l.cancel(ErrClosed) })
	if e.life.Err() != nil {
		l.cancel(ErrClosed)
	}
	if l.limit > 0 {
		l.timer = time.AfterFunc(l.limit, l.silent)
	}
	return l
}

// extend starts the time anew, because something moved.
func (l *lifeline) extend() { l.restart(0) }

// watch starts the time anew with another limit; a negative one is none.
func (l *lifeline) watch(limit time.Duration) { l.restart(limit) }

func (l *lifeline) restart(limit time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if limit != 0 {
		l.limit = limit
	} else if l.timer == nil || l.over {
		return
	}
	switch {
	case l.limit < 0:
	case l.timer == nil:
		l.timer = time.AfterFunc(l.limit, l.silent)
	default:
		l.timer.Reset(l.limit)
	}
}

func (l *lifeline) silent() {
	l.mu.Lock()
	limit := l.limit
	l.mu.Unlock()
	l.cancel(silence(limit))
}

// pause stops the time until watch.
func (l *lifeline) pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	if l.timer != nil {
		l.timer.Stop()
	}
}

func (l *lifeline) end() {
	l.pause()
	l.unhook()
	l.cancel(errOver)
	if l.reached != nil {
		l.reached.leave(false)
	}
}

// cut is why the call was ended from this side; nil: it was not.
func (l *lifeline) cut() *Error {
	if l.ctx.Err() == nil {
		return nil
	}
	e := &Error{Op: l.op, Pod: l.endpoint.opts.name}
	var s silence
	switch cause := context.Cause(l.ctx); {
	case errors.Is(cause, errOver):
		return nil
	case errors.Is(cause, ErrClosed):
		e.Category, e.Err = CategoryClosed, ErrClosed
	case errors.As(cause, &s):
		e.Category, e.Err = CategoryTimeout, s
	default:
		e.Category, e.Err = CategoryContext, endOf(l.ctx)
	}
	return e
}

// connection is how far a request got.
type connection struct {
	endpoint *endpoint
	line     *lifeline
	body     *outgoing // nil: none
	state    atomic.Int32
	tries    atomic.Int32 // connections that one request was given

	conn  net.Conn // the last of them. This and what follows is guarded by lines.mu
	spare bool     // one was idle when it was sought, for this request and all others that sought one
}

// lines is what a transport tells of its connections to a pod. Clients that share a transport share them.
type lines struct {
	// breaks counts signs that connections to the pod were lost, idle ones too, or that a proxy found no process: another process
	// may answer since then. A time-out is none: a pod that is silent is busy as a rule.
	breaks atomic.Int64

	mu      sync.Mutex
	busy    map[net.Conn]*connection // by the request that is on it
	waiting map[net.Conn]time.Time   // to be used again: since when
	oldest  time.Time                // none of them waits for longer
	seeking int                      // requests that wait for a connection
	suspect bool                     // one of them had to make one, though one should have been idle
}

// linesOf are the lines of the transports in use.
var linesOf struct {
	mu sync.Mutex
	of map[lineKey]weak.Pointer[lines]
}

type lineKey struct {
	transport *http.Transport
	host      string
}

// openLines returns the lines of a transport to a host.
func openLines(rt http.RoundTripper, host string) *lines {
	transport, ok := rt.(*http.Transport)
	if !ok {
		return &lines{}
	}
	key := lineKey{transport, host}
	linesOf.mu.Lock()
	defer linesOf.mu.Unlock()
	if l := linesOf.of[key].Value(); l != nil {
		return l
	}
	if linesOf.of == nil {
		linesOf.of = map[lineKey]weak.Pointer[lines]{}
	}
	l := &lines{}
	linesOf.of[key] = weak.Make(l)
	runtime.AddCleanup(l, closeLines, key)
	return l
}

// closeLines forgets the lines that nobody uses any more.
func closeLines(key lineKey) {
	linesOf.mu.Lock()
	defer linesOf.mu.Unlock()
	if linesOf.of[key].Value() == nil {
		delete(linesOf.of, key)
	}
}

// keptIdle is how long an idle connection is sure to be kept: ComfyUI closes it after 75 s, which is no sign of anything.
const keptIdle = time.Minute

// idle counts the connections that wait, and drops those that may have been closed for that.
func (l *lines) idle(now time.Time) int {
	if now.Sub(l.oldest) > keptIdle {
		l.oldest = now
		for conn, since := range l.waiting {
			switch {
			case now.Sub(since) > keptIdle:
				delete(l.waiting, conn)
			case since.Before(l.oldest):
				l.oldest = since
			}
		}
	}
	return len(l.waiting)
}

const (
	connectionUntold int32 = iota // a RoundTripper that does not tell
	connectionSought
	connectionMade
)

func (c *connection) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GetConn:      func(string) { c.seek() },
		GotConn:      c.made,
		WroteHeaders: c.sending,
		PutIdleConn: func(err error) {
			if err == nil {
				c.leave(true)
			}
		},
	}
}

// seek notes that the transport looks for a connection.
func (c *connection) seek() {
	if c.state.Swap(connectionSought) == connectionSought {
		return
	}
	l := c.endpoint.lines
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seeking++
	c.spare = l.idle(time.Now()) >= l.seeking
}

// found looks for signs that a connection was lost: the transport had to take another one for the same request, or had to make one
// though one should have been idle, and it turns out that nobody else has taken that.
func (c *connection) found(conn net.Conn, reused bool) {
	sought := c.state.Swap(connectionMade) == connectionSought
	lost := c.tries.Add(1) > 1
	c.leave(false)
	l := c.endpoint.lines
	l.mu.Lock()
	defer l.mu.Unlock()
	if sought {
		l.seeking--
	}
	if l.busy == nil {
		l.busy, l.waiting = map[net.Conn]*connection{}, map[net.Conn]time.Time{}
	}
	delete(l.waiting, conn)
	l.busy[conn], c.conn = c, conn
	if l.suspect = l.suspect || !reused && c.spare; l.suspect {
		idle := l.idle(time.Now())
		if idle > l.seeking {
			lost, idle = true, 0
			clear(l.waiting)
		}
		l.suspect = idle > 0 && l.seeking > 0
	}
	if lost {
		c.endpoint.lines.breaks.Add(1)
	}
}

// leave notes that the request is done with its connection, and whether that waits to be used again. Another request may have been
// given it already.
func (c *connection) leave(idle bool) {
	l := c.endpoint.lines
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.conn == nil || l.busy[c.conn] != c {
		return
	}
	delete(l.busy, c.conn)
	if idle {
		l.waiting[c.conn] = time.Now()
	}
	c.conn = nil
}

// over ends the search that found nothing.
func (c *connection) over() {
	if c.state.Load() != connectionSought {
		return
	}
	l := c.endpoint.lines
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seeking--
}

// made asks confirm before the headers go out: there are routes that act without reading a body. If it refuses, the connection is
// spoilt for writing, because nothing else keeps an HTTP/1 transport from sending the headers. HTTP/2 heeds the ctx.
func (c *connection) made(info httptrace.GotConnInfo) {
	c.found(info.Conn, info.Reused)
	if c.body == nil || c.body.confirm == nil {
		return
	}
	refusal := c.body.ask(true)
	if refusal == nil {
		return
	}
	c.line.cancel(refusal)
	if t, ok := info.Conn.(*tls.Conn); ok && t.ConnectionState().NegotiatedProtocol == "h2" {
		return // others' requests are on it
	}
	if err := info.Conn.SetWriteDeadline(time.Unix(1, 0)); err != nil {
		_ = info.Conn.Close()
	}
}

// sending is called when the transport has the headers in its buffer and reads the body next. One that is left to the transport
// begins here. Where that is refused the call is over, and with it the connection or, in HTTP/2, the request's part of it.
func (c *connection) sending() {
	if c.body == nil || !c.body.told {
		return
	}
	if err := c.body.begin(); err != nil {
		c.line.cancel(err)
		return
	}
	c.line.extend()
}

// unsent marks the error of a request that cannot have reached the pod.
type unsent struct{ error }

func (u *unsent) Unwrap() error { return u.error }

// neverSent tells whether the request that failed cannot have reached the pod.
func neverSent(err error) bool {
	var u *unsent
	return errors.As(err, &u)
}

// unanswered is the error of a request that got no answer.
func (e *endpoint) unanswered(l *lifeline, q call, req *http.Request, reached *connection, err error) error {
	left := true
	if q.body != nil {
		var refusal, broken error
		left, refusal, broken = q.body.seal()
		switch {
		case refusal != nil:
			return &Error{Op: q.op, Pod: e.opts.name, Category: CategoryOf(refusal), Err: &unsent{refusal}}
		case broken != nil && l.ctx.Err() == nil:
			return &Error{Op: q.op, Pod: e.opts.name, Category: CategoryValidation, Err: fmt.Errorf("the body cannot be read: %w", broken)}
		}
	}
	failed := l.cut()
	if failed == nil {
		err = withoutURL(err)
		failed = &Error{Op: q.op, Pod: e.opts.name, Category: CategoryOf(err), Err: e.scrubbed(err, req.Header)}
		if failed.Category == CategoryUnknown {
			failed.Category = CategoryNetwork
		}
		if failed.Category == CategoryNetwork {
			e.lines.breaks.Add(1)
		}
	}
	// A transport sends a POST again only when nothing of it went out before. So a body that was read and a last try that got no
	// connection is a request of which nothing was sent.
	if reached.state.Load() == connectionSought || !left && q.needsBody {
		failed.Err = &unsent{failed.Err}
	}
	return failed
}

// refused is the error of an answer that is no success.
func (e *endpoint) refused(l *lifeline, q call, req *http.Request, resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, refusalReply)) // what there is of it
	_ = resp.Body.Close()
	if cut := l.cut(); cut != nil && cut.Category != CategoryTimeout {
		return cut
	}
	failed := e.refusal(q.op, resp.StatusCode, resp.Header, body, req.Header)
	if isRefusal(failed) {
		e.lines.breaks.Add(1)
	}
	switch {
	case strings.Contains(resp.Header.Get("Location"), pendingMark):
		failed.Category, failed.Err = CategoryTimeout, &pendingResult{failed.Err}
	case resp.StatusCode/100 == 3 && failed.Category != CategoryAuth:
		failed.Err = fmt.Errorf("%w, which is not followed%s", failed.Err, redirectAdvice(req.URL, resp.Header.Get("Location")))
	case failed.Category == CategoryNotFound && onEveryPod(q.path):
		failed.Category = CategoryUnavailable
		failed.Err = fmt.Errorf("every ComfyUI has this route, so something else answers, or the pod is not up yet: %w", failed.Err)
	}
	return failed
}

// refusal classifies an answer that is no success to a request with the headers sent.
func (e *endpoint) refusal(op string, status int, header http.Header, body []byte, sent http.Header) *Error {
	failed := classifyRefusal(status, header, body, e.scrubber(sent))
	failed.Op, failed.Pod = op, e.opts.name
	return failed
}

func redirectAdvice(from *url.URL, location string) string {
	if to, err := from.Parse(location); err == nil && from.Scheme == "http" && to.Scheme == "https" && to.Hostname() == from.Hostname() {
		return "; give the base URL as https"
	}
	return ""
}

// pendingResult marks the redirect that Modal answers with after 150 seconds: the request goes on, and its result will be elsewhere.
// https://modal.com/docs/guide/webhook-timeouts
type pendingResult struct{ error }

func (p *pendingResult) Unwrap() error { return p.error }

const pendingMark = "__modal_function_call_id="

// onEveryPod tells routes that all versions of the server have under one name.
func onEveryPod(path string) bool {
	switch path {
	case "/prompt", "/queue", "/interrupt", "/system_stats", "/upload/image", "/upload/mask":
		return true
	}
	return path == "/history" || strings.HasPrefix(path, "/history/") || path == "/object_info" || strings.HasPrefix(path, "/object_info/")
}

// malformed is the error of an answer that cannot be read: a page instead of JSON, as a rule.
func (e *endpoint) malformed(op string, r *reply, cause error) error {
	failed := &Error{Op: op, Pod: e.opts.name, Category: CategoryProtocol, StatusCode: r.status, Err: cause}
	if isHTML(r.header, r.body) {
		from := strings.TrimPrefix(r.url.String(), e.opts.base.String()) // the pod's own name says nothing
		if bytes.Contains(bytes.ToLower(r.body), []byte(`type="password"`)) || isLogin(from) {
			failed.Category = CategoryAuth
		}
		page := r.body[:min(len(r.body), refusalReply)]
		failed.Err = fmt.Errorf("a page came instead of JSON: %s", excerpt(r.status, r.header, page, e.scrubber(r.sent)))
	}
	return failed
}

const (
	redacted = "[redacted]"
	// shortestSecret: what is shorter cannot be told from text.
	shortestSecret = 4
)

// scrubber takes the client's credentials out of texts that may repeat them: pages of proxies do.
func (e *endpoint) scrubber(sent http.Header) func(string) string {
	var pairs []string
	for _, secret := range e.secrets(sent) {
		pairs = append(pairs, secret, redacted)
	}
	return strings.NewReplacer(pairs...).Replace
}

// scrubbed is err, with another text if its own holds a credential.
func (e *endpoint) scrubbed(err error, sent http.Header) error {
	text := err.Error()
	if clean := e.scrubber(sent)(text); clean != text {
		return &scrubbedError{clean, err}
	}
	return err
}

// scrubbedError answers errors.Is and errors.As as err does, and does not unwrap: nobody comes by err's text that way.
type scrubbedError struct {
	text string
	err  error
}

func (s *scrubbedError) Error() string        { return s.text }
func (s *scrubbedError) Is(target error) bool { return errors.Is(s.err, target) }
func (s *scrubbedError) As(target any) bool   { return errors.As(s.err, target) }

// secrets are the client's credentials, the longest first: one can hold another.
func (e *endpoint) secrets(sent http.Header) []string {
	var all []string
	request := http.Request{Header: sent}
	for _, cookie := range request.Cookies() {
		all = append(all, cookie.Value)
	}
	if _, password, ok := request.BasicAuth(); ok {
		all = append(all, password)
	}
	for name, values := range sent {
		switch name {
		case "Accept", "Accept-Encoding", "Accept-Language", "Content-Type", "User-Agent", "Origin", "Referer", "Range", "If-Range", "Cache-Control":
			continue
		}
		for _, v := range values {
			all = append(all, v)
			if _, credentials, ok := strings.Cut(v, " "); ok {
				all = append(all, credentials)
			}
		}
	}
	for _, values := range e.opts.query {
		all = append(all, values...)
		for _, v := range values {
			all = append(all, url.QueryEscape(v))
		}
	}
	if e.opts.userinfo != nil {
		password, _ := e.opts.userinfo.Password()
		all = append(all, password)
	}
	all = append(all, e.opts.apiKey)
	all = slices.DeleteFunc(all, func(s string) bool {
		switch s {
		case "true", "false", "null", "http", "https": // headers that are no credentials say so
			return true
		}
		return len(s) < shortestSecret
	})
	slices.SortFunc(all, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), strings.Compare(a, b)) })
	return slices.Compact(all)
}

// incoming is an answer's body. Its errors are *Error; a download's silence is bounded by Timing.BodyIdle.
type incoming struct {
	from  io.ReadCloser
	line  *lifeline
	req   *http.Request
	small bool
}

func (b *incoming) Read(p []byte) (int, error) {
	if !b.small {
		b.line.watch(b.line.endpoint.timing.BodyIdle)
		defer b.line.pause()
	}
	n, err := b.from.Read(p)
	if err == nil || err == io.EOF { //nolint:errorlint // the contract of io.Reader
		return n, err
	}
	if cut := b.line.cut(); cut != nil {
		return n, cut
	}
	e := b.line.endpoint
	err = withoutURL(err)
	failed := &Error{Op: b.line.op, Pod: e.opts.name, Category: CategoryOf(err), Err: e.scrubbed(err, b.req.Header)}
	if failed.Category == CategoryUnknown {
		failed.Category = CategoryNetwork
	}
	if failed.Category == CategoryNetwork {
		e.lines.breaks.Add(1)
	}
	return n, failed
}

func (b *incoming) Close() error {
	err := b.from.Close()
	b.line.end()
	return err
}

// outgoing is a request's body. It knows whether anything of it may have left, asks confirm right before, and lets nothing more out
// once it is sealed, however late the transport comes to read.
type outgoing struct {
	contentType string
	size        int64            // -1: not known
	open        func() io.Reader // the whole body
	replays     bool             // open may be called more than once
	confirm     func() error     // nil: nobody asks
	moved       func()           // called when some of it went out
	over        <-chan struct{}  // closed when the call has ended
	told        bool             // the transport reads it by itself, and tells before: connection.sending

	mu      sync.Mutex
	sealed  bool
	left    bool
	sent    int64
	asked   bool          // confirm, for the connection at hand
	refusal error         // confirm's
	broken  error         // the reader's
	reading chan struct{} // closed when the Read that is under way is done
}

func jsonBody(data []byte, confirm func() error) *outgoing {
	return &outgoing{
		contentType: "application/json", size: int64(len(data)), confirm: confirm,
		open: func() io.Reader { return bytes.NewReader(data) }, replays: true,
	}
}

// wholeBody is the size up to which a body is as good as sent when the transport begins to write it: the system takes it whole.
const wholeBody = 16 << 10

func (o *outgoing) attach(req *http.Request) {
	req.Header.Set("Content-Type", o.contentType)
	req.ContentLength = o.size
	if o.size == 0 {
		req.Body = http.NoBody
		return
	}
	if o.told { // before a body whose reader it does not know the transport sends the headers, in a packet of their own
		req.Body = io.NopCloser(o.open())
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(o.open()), nil }
		return
	}
	req.Body = &outgoingReader{o: o, from: o.open()}
	if o.replays {
		req.GetBody = func() (io.ReadCloser, error) { return &outgoingReader{o: o, from: o.open()}, nil }
	}
}

// seal stops what has not left yet. left: some of it may have.
func (o *outgoing) seal() (left bool, refusal, broken error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sealed = true
	return o.left || o.size == 0, o.refusal, o.broken
}

// gone is how many bytes the transport has taken.
func (o *outgoing) gone() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sent
}

// settled waits until the transport's goroutine has let go of the caller's reader. false: it is in a Read that does not end.
func (o *outgoing) settled(ctx context.Context, most time.Duration) bool {
	o.mu.Lock()
	reading := o.reading
	o.mu.Unlock()
	if reading == nil {
		return true
	}
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-reading:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

var errSealed = errors.New("the request is over")

// ask asks confirm, once for each connection; an error stops the request before any of its body is out.
func (o *outgoing) ask(connected bool) error {
	refusal := o.confirm()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked, o.refusal = connected, refusal
	return refusal
}

// begin lets the first byte out, if confirm agrees.
func (o *outgoing) begin() error {
	o.mu.Lock()
	sealed, asked, refusal := o.sealed, o.asked, o.refusal
	o.asked = false // a replay asks again
	o.mu.Unlock()
	if !sealed && !asked && o.confirm != nil {
		refusal = o.ask(false) // the transport did not tell of its connection
	}
	if refusal != nil {
		return refusal
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sealed {
		return errSealed
	}
	o.left = true
	return nil
}

func (o *outgoing) enter() (leave func(n int, err error), err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sealed {
		return nil, errSealed
	}
	reading := make(chan struct{})
	o.reading = reading
	return func(n int, err error) {
		o.mu.Lock()
		defer o.mu.Unlock()
		close(reading)
		o.reading = nil
		o.sent += int64(n)
		if err != nil && err != io.EOF { //nolint:errorlint // the contract of io.Reader
			o.broken = err
		}
	}, nil
}

type outgoingReader struct {
	o     *outgoing
	from  io.Reader
	begun bool
	buf   []byte // of readAside
}

func (r *outgoingReader) Read(p []byte) (int, error) {
	if !r.begun {
		if err := r.o.begin(); err != nil {
			return 0, err
		}
		r.begun = true
	}
	leave, err := r.o.enter()
	if err != nil {
		return 0, err
	}
	var n int
	if r.o.replays { // in memory
		n, err = r.from.Read(p)
		leave(n, err)
	} else {
		n, err = r.readAside(p, leave)
	}
	if n > 0 && r.o.moved != nil {
		r.o.moved()
	}
	return n, err
}

// readAside lets go when the call is over, though the caller's reader may hang: the transport waits for its Read to end, whatever its
// ctx says.
func (r *outgoingReader) readAside(p []byte, leave func(int, error)) (int, error) {
	if r.buf == nil {
		r.buf = make([]byte, 32<<10)
	}
	buf := r.buf[:min(len(p), len(r.buf))]
	var n int
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		n, err = r.from.Read(buf)
		leave(n, err)
	}()
	select {
	case <-done:
		return copy(p, buf[:n]), err
	case <-r.o.over:
		return 0, errSealed
	}
}

// Close leaves the reader to the caller, whose it is.
func (r *outgoingReader) Close() error { return nil }

// reply is an answer that was read to its end.
type reply struct {
	status int
	header http.Header
	sent   http.Header // the request's
	url    *url.URL    // where the answer came from, after redirects; it may hold credentials
	body   []byte
}

// read makes one try and reads the whole answer, at most limit bytes after decompression.
func (e *endpoint) read(ctx context.Context, q call, limit int64) (*reply, error) {
	q.small = true
	resp, err := e.send(ctx, q)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	r := &reply{status: resp.StatusCode, header: resp.Header, sent: resp.Request.Header, url: resp.Request.URL}
	if resp.ContentLength <= limit {
		r.body, err = readAll(io.LimitReader(resp.Body, limit+1), resp.ContentLength)
	}
	if err == nil && (resp.ContentLength > limit || int64(len(r.body)) > limit) {
		err = &Error{
			Op: q.op, Pod: e.opts.name, Category: CategoryProtocol, StatusCode: r.status,
			Err: fmt.Errorf("the answer is longer than %d MiB", limit>>20),
		}
	}
	if err != nil {
		e.counters.callErrors.Add(1)
		return nil, err
	}
	return r, nil
}

// readAll is io.ReadAll for an answer of a length that was claimed, or a negative one. A claim is not believed beyond 64 KiB.
func readAll(r io.Reader, claimed int64) ([]byte, error) {
	if claimed < 0 {
		claimed = 512
	}
	body := make([]byte, 0, min(claimed, 64<<10)+1) // with room for the end to be seen
	for {
		n, err := r.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		switch {
		case err == io.EOF:
			return body, nil
		case err != nil:
			return body, err
		case len(body) == cap(body):
			body = slices.Grow(body, len(body))
		}
	}
}

// post sends JSON, one try. confirm may be nil; its error stops the request so that the pod cannot have acted on it.
func (e *endpoint) post(ctx context.Context, op, path string, body []byte, confirm func() error) error {
	q := call{op: op, method: http.MethodPost, path: path, body: jsonBody(body, confirm), needsBody: path == "/queue"}
	_, err := e.read(ctx, q, smallReply)
	return err
}

// postOutcome is what is known of a prompt after its POST.
type postOutcome int

const (
	postAccepted  postOutcome = iota
	postRefused               // definite: nothing was queued
	postUnsent                // nothing of it reached the pod
	postAmbiguous             // it may have been queued, now or later: look before repeating
)

func (o postOutcome) String() string {
	return [...]string{"accepted", "refused", "unsent", "ambiguous"}[o]
}

// postPrompt posts a prompt, one try. A 409 says that the pod has the id: accepted, with an empty reply. confirm (may be nil) is
// called right before the body goes out, each time the transport sends it.
func (e *endpoint) postPrompt(ctx context.Context, body []byte, confirm func() error) (wire.PromptReply, postOutcome, error) {
	const op = "post prompt"
	q := call{
		op: op, method: http.MethodPost, path: "/prompt", body: jsonBody(body, confirm), needsBody: true,
		accept: func(status int) bool { return status == http.StatusConflict },
	}
	r, err := e.read(ctx, q, largeReply)
	if err != nil {
		return wire.PromptReply{}, outcomeOf(err), err
	}
	if r.status == http.StatusConflict {
		return wire.PromptReply{}, postAccepted, nil
	}
	accepted, err := wire.DecodePromptReply(r.body)
	if err != nil {
		return wire.PromptReply{}, postAmbiguous, e.malformed(op, r, err)
	}
	return accepted, postAccepted, nil
}

// outcomeOf reads what the error of a POST /prompt proves. Only a status that says that the request was not acted on is definite:
// behind a 5xx the prompt may well be queued.
func outcomeOf(err error) postOutcome {
	if neverSent(err) {
		return postUnsent
	}
	var e *Error
	if !errors.As(err, &e) {
		return postAmbiguous
	}
	var pending *pendingResult
	switch s := e.StatusCode; {
	case errors.As(err, &pending):
		return postAmbiguous
	case s == http.StatusRequestTimeout:
		return postAmbiguous
	case s >= 300 && s <= http.StatusRequestHeaderFieldsTooLarge, s == http.StatusUnavailableForLegalReasons:
		return postRefused
	}
	return postAmbiguous
}

// queue reads the queue and the size of the answer in bytes, one try.
func (e *endpoint) queue(ctx context.Context, withGraphs bool) (running, pending []wire.QueueItem, size int, err error) {
	const op = "queue"
	r, err := e.read(ctx, call{op: op, method: http.MethodGet, path: "/queue"}, largeReply)
	if err != nil {
		return nil, nil, 0, err
	}
	if running, pending, err = wire.Queue(r.body, withGraphs); err != nil {
		return nil, nil, 0, e.malformed(op, r, err)
	}
	e.health.answered()
	return running, pending, len(r.body), nil
}

// queueRemaining counts the prompts that run and wait. It is the cheapest route of the pod. One try.
func (e *endpoint) queueRemaining(ctx context.Context) (int, error) {
	const op = "queue length"
	r, err := e.read(ctx, call{op: op, method: http.MethodGet, path: "/prompt"}, smallReply)
	if err != nil {
		return 0, err
	}
	var answer struct {
		ExecInfo struct {
			QueueRemaining *int `json:"queue_remaining"`
		} `json:"exec_info"`
	}
	if err = json.Unmarshal(wire.Sanitize(r.body), &answer); err == nil && answer.ExecInfo.QueueRemaining == nil {
		err = errors.New("no exec_info.queue_remaining in the answer")
	}
	if err != nil {
		return 0, e.malformed(op, r, err)
	}
	e.health.answered()
	return *answer.ExecInfo.QueueRemaining, nil
}

// history reads one entry without its graph, one try. nil, nil: the pod has none.
func (e *endpoint) history(ctx context.Context, promptID string) (*wire.HistoryEntry, error) {
	return e.historyOf(ctx, promptID, false)
}

func (e *endpoint) historyOf(ctx context.Context, promptID string, withGraph bool) (*wire.HistoryEntry, error) {
	entries, err := e.historyEntries(ctx, "/history/"+url.PathEscape(promptID), nil, withGraph)
	if err != nil {
		var failed *Error
		if errors.As(err, &failed) {
			failed.PromptID = promptID
		}
		return nil, err
	}
	for i := range entries {
		if entries[i].PromptID == promptID {
			return &entries[i], nil
		}
	}
	return nil, nil
}

// oldestHistory reads the oldest entry, one try: another one, or none, tells of a restart or of a full history. nil, nil: empty.
func (e *endpoint) oldestHistory(ctx context.Context) (*wire.HistoryEntry, error) {
	entries, err := e.historyEntries(ctx, "/history", url.Values{"max_items": {"1"}, "offset": {"0"}}, false)
	if err != nil || len(entries) == 0 {
		return nil, err
	}
	return &entries[0], nil
}

// newestHistory reads the newest n entries, oldest first, one try.
func (e *endpoint) newestHistory(ctx context.Context, n int) ([]wire.HistoryEntry, error) {
	return e.historyEntries(ctx, "/history", url.Values{"max_items": {strconv.Itoa(n)}}, false)
}

func (e *endpoint) historyEntries(ctx context.Context, path string, query url.Values, withGraphs bool) ([]wire.HistoryEntry, error) {
	const op = "history"
	r, err := e.read(ctx, call{op: op, method: http.MethodGet, path: path, query: query}, largeReply)
	if err != nil {
		return nil, err
	}
	entries, err := wire.History(r.body, withGraphs)
	if err != nil {
		return nil, e.malformed(op, r, err)
	}
	return entries, nil
}

// tellsJobs tells whether what the pod's /api/jobs/{id} says of a prompt can stand for its queue and its history: it has the route
// (since 0.6.0), and nothing has spoken against that for a while.
func (e *endpoint) tellsJobs(ctx context.Context) bool {
	if e.absent(&e.noJobsRoute) {
		return false
	}
	version, err := e.version(ctx)
	if err != nil || version == "" { // it is not asked each time
		e.distrustJobs()
	}
	return err == nil && atLeast(version, 0, 6)
}

// distrustJobs leaves /api/jobs/{id} alone for a while: a proxy keeps it to itself, or the server stumbles over a job.
func (e *endpoint) distrustJobs() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.noJobsRoute = time.Now().Add(absentFor)
}

// tookPrompt notes what the pod has made of a prompt id.
func (e *endpoint) tookPrompt(asked, got string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.keepsIDs = asked == got
}

// keepsPromptIDs tells whether the pod is known to keep the prompt ids that it is given: a proxy may drop them on the way to it.
func (e *endpoint) keepsPromptIDs() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.keepsIDs
}

// apiJob reads /api/jobs/{id}, one try. supported: the pod has the route (since 0.6.0); nil and true: it does not know the prompt.
// The server reads its queue and then its history: a prompt that it does not know was in neither at that moment.
func (e *endpoint) apiJob(ctx context.Context, promptID string) (job *wire.Job, supported bool, err error) {
	const op = "job"
	if e.absent(&e.noJobsRoute) {
		return nil, false, nil
	}
	q := call{op: op, method: http.MethodGet, path: "/api/jobs/" + url.PathEscape(promptID), accept: isNoRoute}
	r, err := e.read(ctx, q, largeReply)
	if err != nil {
		return nil, false, err
	}
	if isNoRoute(r.status) {
		if refusal, ok := wire.DecodeRefusal(r.body); ok && r.status == http.StatusNotFound && refusal.Message == "Job not found" {
			return nil, true, nil
		}
		return nil, false, e.missing(q, r, &e.noJobsRoute)
	}
	j, err := wire.DecodeJob(r.body)
	if err == nil && (j.ID != promptID || !slices.Contains(jobStates, j.Status)) {
		err = fmt.Errorf("it is about %q, in state %q", j.ID, j.Status)
	}
	if err != nil {
		return nil, true, e.malformed(op, r, err)
	}
	return &j, true, nil
}

// jobStates are the states of /api/jobs; cancelled since 0.9.0.
var jobStates = []string{jobPending, jobRunning, "completed", "failed", "cancelled"}

const jobPending, jobRunning = "pending", "in_progress"

// cancelJob cancels a prompt that waits or runs, one try. supported: the pod has the route (since 0.26.0). cancelled is false for
// prompts that have ended or are unknown.
func (e *endpoint) cancelJob(ctx context.Context, promptID string, confirm func() error) (supported, cancelled bool, err error) {
	const op = "cancel job"
	if e.absent(&e.noCancel) {
		return false, false, nil
	}
	q := call{
		op: op, method: http.MethodPost, path: "/api/jobs/" + url.PathEscape(promptID) + "/cancel", accept: isNoRoute,
		body: jsonBody([]byte("{}"), confirm), // the route reads none
	}
	r, err := e.read(ctx, q, smallReply)
	if err != nil {
		return false, false, err
	}
	if isNoRoute(r.status) {
		return false, false, e.missing(q, r, &e.noCancel)
	}
	var answer struct {
		Cancelled *bool `json:"cancelled"`
	}
	err = json.Unmarshal(r.body, &answer)
	if err == nil && answer.Cancelled == nil {
		err = errors.New("it does not say whether the prompt was cancelled")
	}
	if err != nil {
		return true, false, e.malformed(op, r, err)
	}
	return true, *answer.Cancelled, nil
}

func isNoRoute(status int) bool {
	return status == http.StatusNotFound || status == http.StatusMethodNotAllowed
}

// missing remembers for a while that the pod lacks a route. A page is a proxy's: it says nothing of the pod.
func (e *endpoint) missing(q call, r *reply, until *time.Time) error {
	if isHTML(r.header, r.body) {
		failed := e.refusal(q.op, r.status, r.header, r.body, r.sent)
		failed.Category = CategoryUnavailable
		return failed
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	*until = time.Now().Add(absentFor)
	return nil
}

func (e *endpoint) absent(until *time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return time.Now().Before(*until)
}

// interrupt stops what runs, if it is this prompt, one try. "" stops whatever runs, as does any id on a pod where interruptsByID is
// false.
func (e *endpoint) interrupt(ctx context.Context, promptID string, confirm func() error) error {
	body := []byte("{}")
	if promptID != "" {
		body = jsonOf(map[string]string{"prompt_id": promptID})
	}
	return e.post(ctx, "interrupt", "/interrupt", body, confirm)
}

// interruptsByID tells whether the pod heeds the id of an interrupt: since 0.3.57. A pod that cannot say, as after a CUDA fault, is
// taken for one that does not.
func (e *endpoint) interruptsByID(ctx context.Context) (bool, error) {
	version, err := e.version(ctx)
	var failed *Error
	if err != nil && !(errors.As(err, &failed) && failed.StatusCode == http.StatusInternalServerError) {
		return false, err
	}
	return atLeast(version, 0, 3, 57), nil
}

// deleteQueued removes prompts that wait, one try: one copy of each id.
func (e *endpoint) deleteQueued(ctx context.Context, confirm func() error, promptIDs ...string) error {
	if len(promptIDs) == 0 {
		return nil
	}
	return e.post(ctx, "delete queued", "/queue", jsonOf(map[string][]string{"delete": promptIDs}), confirm)
}

// freeMemory asks the pod to unload models and to drop caches, one try.
func (e *endpoint) freeMemory(ctx context.Context, unload, free bool) error {
	return e.post(ctx, "free memory", "/free", jsonOf(map[string]bool{"unload_models": unload, "free_memory": free}), nil)
}

// jsonOf marshals what cannot fail: strings and booleans.
func jsonOf(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

func (e *endpoint) systemStats(ctx context.Context) (wire.SystemStats, error) {
	const op = "system stats"
	r, err := e.read(ctx, call{op: op, method: http.MethodGet, path: "/system_stats"}, smallReply)
	if err != nil {
		return wire.SystemStats{}, err
	}
	stats, err := wire.DecodeSystemStats(r.body)
	if err != nil {
		return wire.SystemStats{}, e.malformed(op, r, err)
	}
	e.health.answered()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.known = stats.Version
	return stats, nil
}

// version is that of the server, "" where it tells none; remembered until forgetVersion.
func (e *endpoint) version(ctx context.Context) (string, error) {
	e.mu.Lock()
	known := e.known
	e.mu.Unlock()
	if known != "" {
		return known, nil
	}
	stats, err := e.systemStats(ctx)
	return stats.Version, err
}

// forgetVersion forgets what a restart may change: version, limits, routes.
func (e *endpoint) forgetVersion() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.known, e.maxUpload, e.noCancel, e.noJobsRoute, e.keepsIDs = "", 0, time.Time{}, time.Time{}, false
}

// ignoresPromptIDs tells whether the pod names prompts itself, whatever the POST says: before 0.3.45. Where the pod tells no version
// it is taken for a new one.
func (e *endpoint) ignoresPromptIDs(ctx context.Context) bool {
	version, err := e.version(ctx)
	return err == nil && version != "" && !atLeast(version, 0, 3, 45)
}

// atLeast compares versions such as "0.3.57" and "v0.26.0-rc1"; what is no version is older than all.
func atLeast(version string, want ...int) bool {
	parts := strings.Split(strings.TrimPrefix(version, "v"), ".")
	for i, w := range want {
		if i >= len(parts) {
			return false
		}
		digits := parts[i]
		if end := strings.IndexFunc(digits, func(r rune) bool { return r < '0' || r > '9' }); end >= 0 {
			digits = digits[:end]
		}
		n, err := strconv.Atoi(digits)
		if err != nil || n < w {
			return false
		}
		if n > w {
			return true
		}
	}
	return true
}

// uploadLimit is the pod's max_upload_size in bytes; 0: not known.
func (e *endpoint) uploadLimit(ctx context.Context) int64 {
	e.mu.Lock()
	limit := e.maxUpload
	e.mu.Unlock()
	if limit != 0 {
		return max(limit, 0)
	}
	r, err := e.read(ctx, call{op: "features", method: http.MethodGet, path: "/features", accept: isNoRoute}, smallReply)
	if err != nil {
		return 0
	}
	limit = -1
	var features struct {
		MaxUploadSize float64 `json:"max_upload_size"`
	}
	if !isNoRoute(r.status) && json.Unmarshal(wire.Sanitize(r.body), &features) == nil &&
		features.MaxUploadSize >= 1 && features.MaxUploadSize < 1<<62 {
		limit = int64(features.MaxUploadSize)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.maxUpload = limit
	return max(limit, 0)
}

// uploadFile is a file on its way to the pod.
type uploadFile struct {
	op, path, name string
	original       *FileRef // of a mask
	r              io.Reader
	uploadOptions

	size   int64     // -1: not known
	seeker io.Seeker // nil: r cannot be read twice
	start  int64     // where r stood
	stuck  bool      // a Read of r does not end: nobody else may touch it
}

// check finds what the pod would answer with a bare 400 or 500.
func (f *uploadFile) check() string {
	switch {
	case f.r == nil:
		return "the reader is nil"
	case f.name == "":
		return "the file has no name"
	case f.name == "." || strings.Contains(f.name, "..") || strings.ContainsAny(f.name, "/\\\x00"):
		return fmt.Sprintf(`the file name %q has a folder, or ".." in it; UploadSubfolder sets the folder`, f.name)
	case strings.Contains(f.subfolder, "..") || strings.HasPrefix(f.subfolder, "/") || strings.ContainsAny(f.subfolder, "\\\x00"):
		return fmt.Sprintf(`the subfolder %q leaves the pod's folder, or is no relative path with slashes`, f.subfolder)
	}
	return ""
}

// measure finds the size of r, and whether it can be read twice.
func (f *uploadFile) measure() {
	f.size = sizeOf(f.r)
	if s, ok := f.r.(io.Seeker); ok {
		if start, err := s.Seek(0, io.SeekCurrent); err == nil {
			f.seeker, f.start = s, start
		}
	}
}

// sizeOf is what is left in a reader that can tell; -1: it cannot.
func sizeOf(r io.Reader) int64 {
	if l, ok := r.(interface{ Len() int }); ok {
		return int64(l.Len())
	}
	if file, ok := r.(*os.File); ok {
		if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
			return -1
		}
	}
	s, ok := r.(io.Seeker)
	if !ok {
		return -1
	}
	at, err := s.Seek(0, io.SeekCurrent)
	if err != nil {
		return -1
	}
	end, err := s.Seek(0, io.SeekEnd)
	if err != nil {
		return -1
	}
	if _, err := s.Seek(at, io.SeekStart); err != nil {
		return -1
	}
	return max(end-at, 0)
}

// worthAsking is the size from which the pod's limit is asked for before sending: no pod's limit is below, as a rule.
const worthAsking = 1 << 20

// upload sends the file, one try. It does not hold it in memory.
func (e *endpoint) upload(ctx context.Context, f *uploadFile) (FileRef, error) {
	if f.size >= worthAsking {
		if limit := e.uploadLimit(ctx); limit > 0 && f.size > limit {
			failed := e.tooLarge(f.op, f.size, limit)
			failed.Err = &unsent{failed.Err}
			return FileRef{}, failed
		}
	}
	if f.seeker != nil {
		if _, err := f.seeker.Seek(f.start, io.SeekStart); err != nil {
			return FileRef{}, &Error{Op: f.op, Pod: e.opts.name, Category: CategoryValidation, Err: fmt.Errorf("the file cannot be read again: %w", err)}
		}
	}
	body, err := f.form()
	if err != nil {
		return FileRef{}, &Error{Op: f.op, Pod: e.opts.name, Category: CategoryValidation, Err: err}
	}
	r, err := e.read(ctx, call{op: f.op, method: http.MethodPost, path: f.path, body: body, needsBody: true}, smallReply)
	_, _, _ = body.seal()
	f.stuck = !body.settled(ctx, e.timing.Connect)
	if err != nil {
		// A server that has seen enough may hang up before it says so.
		if sent := body.gone(); CategoryOf(err) == CategoryNetwork && sent >= worthAsking {
			if limit := e.uploadLimit(ctx); limit > 0 && sent > limit {
				return FileRef{}, e.tooLarge(f.op, sent, limit)
			}
		}
		return FileRef{}, err
	}
	var stored struct {
		Name      string `json:"name"`
		Subfolder string `json:"subfolder"`
		Type      string `json:"type"`
	}
	if err = json.Unmarshal(r.body, &stored); err == nil && stored.Name == "" {
		err = errors.New("no name in the answer")
	}
	if err != nil {
		return FileRef{}, e.malformed(f.op, r, err)
	}
	return FileRef{Filename: stored.Name, Subfolder: stored.Subfolder, Type: stored.Type}, nil
}

func (e *endpoint) tooLarge(op string, size, limit int64) *Error {
	return &Error{
		Op: op, Pod: e.opts.name, Category: CategoryTooLarge,
		Err: fmt.Errorf("%d bytes are over the pod's limit of %d (--max-upload-size)", size, limit),
	}
}

// form is the multipart body, with the file streamed between its head and its tail.
func (f *uploadFile) form() (*outgoing, error) {
	var head bytes.Buffer
	w := multipart.NewWriter(&head)
	fields := [][2]string{{"subfolder", f.subfolder}, {"type", f.fileType}}
	if f.overwrite {
		fields = append(fields, [2]string{"overwrite", "true"})
	}
	if f.original != nil {
		fields = append(fields, [2]string{"original_ref", string(jsonOf(map[string]string{
			"filename": f.original.Filename, "subfolder": f.original.Subfolder, "type": f.original.Type,
		}))})
	}
	for _, field := range fields {
		if field[1] == "" {
			continue
		}
		if err := w.WriteField(field[0], field[1]); err != nil {
			return nil, err
		}
	}
	if _, err := w.CreatePart(textproto.MIMEHeader{
		"Content-Disposition": {multipart.FileContentDisposition("image", f.name)},
		"Content-Type":        {cmp.Or(mime.TypeByExtension(path.Ext(f.name)), "application/octet-stream")},
	}); err != nil {
		return nil, err
	}
	tail := "\r\n--" + w.Boundary() + "--\r\n"
	size := int64(-1)
	if f.size >= 0 {
		size = int64(head.Len()) + f.size + int64(len(tail))
	}
	return &outgoing{
		contentType: w.FormDataContentType(), size: size,
		open: func() io.Reader { return io.MultiReader(&head, f.r, strings.NewReader(tail)) },
	}, nil
}

// view asks for a file, one try to the headers. 200, 206, 304 and 416 are returned as they are. A redirect to another host, as
// hosted pods send them, is followed without credentials.
func (e *endpoint) view(ctx context.Context, op string, query url.Values, header http.Header) (*http.Response, error) {
	h := http.Header{"Accept": {"*/*"}, "Accept-Encoding": {"identity"}}
	maps.Copy(h, header)
	return e.send(ctx, call{
		op: op, method: http.MethodGet, path: "/view", query: query, header: h, roams: true,
		accept: func(status int) bool {
			return status == http.StatusNotModified || status == http.StatusRequestedRangeNotSatisfiable
		},
	})
}
