package comfyuitest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// Pod is a ComfyUI server in this process. Its methods may be called from any goroutine, those of scripted nodes included.
type Pod struct {
	config  config
	version version
	classes map[string]*class
	routes  *routeTable
	files   *fileStore
	book    *book
	faults  faults
	changed changes
	tasks   tasks
	handler http.Handler
	client  *http.Client
	addr    string
	leave   func() // gives addr back

	chance chance // set by tests of this package, before the first request

	life     context.Context // ends with Close
	finish   context.CancelFunc
	complain func(format string, args ...any)

	mu       sync.Mutex
	process  *process     // nil while the server is down
	front    net.Listener // nil while the server is down, and for pipes
	postpone func()       // ends the wait of the Restart before
	refused  int          // the status for new sockets; 0: they are accepted
	closed   bool
}

// Option configures a [Pod].
type Option func(*config)

type config struct {
	version     version
	nodes       map[string]Node
	classes     map[string]*class // for the package's own tests
	pipes       bool
	maxUpload   int64
	compress    bool
	historySize int
	wrap        func(http.Handler) http.Handler
}

const (
	defaultMaxUpload   = 100 << 20
	defaultHistorySize = 10000 + 1
)

// NewPod starts a pod, like httptest.NewServer: on a free port of the loopback, and it panics when it cannot listen. It runs
// the built-in nodes that need no model, and those of [WithNode]. Close ends it.
func NewPod(opts ...Option) *Pod {
	c := config{version: newestVersion, nodes: map[string]Node{}, maxUpload: defaultMaxUpload, historySize: defaultHistorySize}
	for _, opt := range opts {
		opt(&c)
	}
	p := &Pod{config: c, version: c.version, files: newFileStore(), book: newBook()}
	p.classes = builtinClasses(c.version)
	for name, n := range c.nodes {
		p.classes[name] = scriptedClass(name, n)
	}
	maps.Copy(p.classes, c.classes)
	p.routes = routesOf(c.version)
	p.complain, p.postpone = log.Printf, func() {}
	p.life, p.finish = context.WithCancel(context.Background())
	p.handler = p.faulty(http.HandlerFunc(p.dispatch))
	if c.wrap != nil {
		p.handler = p.proxy(c.wrap(p.handler))
	}
	p.handler = p.tasks.handler(p.handler)
	p.client = &http.Client{Transport: &http.Transport{DialContext: p.DialContext, MaxIdleConnsPerHost: 64}}
	front, err := p.listen()
	if err != nil {
		panic(fmt.Sprintf("comfyuitest: %v", err))
	}
	if front != nil {
		p.addr, p.leave = front.Addr().String(), func() {}
	} else {
		p.addr, p.leave = pipeAddresses.take()
	}
	p.open(p.life, front)
	return p
}

// Start is [NewPod] with a Close at the test's end. In a bubble of testing/synctest the test fails without [WithPipes].
func Start(tb testing.TB, opts ...Option) *Pod {
	tb.Helper()
	p := NewPod(opts...)
	p.complain = tb.Logf
	tb.Cleanup(p.Close)
	if !p.config.pipes && hasBubble(tb) {
		tb.Fatal("comfyuitest: in a bubble of testing/synctest a pod needs WithPipes: beside real sockets the bubble's clock stands still")
	}
	return p
}

// hasBubble tells whether tb belongs to a bubble, where the Deadline of a T panics.
func hasBubble(tb testing.TB) (bubble bool) {
	t, isT := tb.(interface{ Deadline() (time.Time, bool) })
	if !isT {
		return false
	}
	defer func() { bubble = recover() != nil }()
	t.Deadline()
	return false
}

// proxy calls the handler of [WithHandler].
func (p *Pod) proxy(handler http.Handler) http.Handler {
	if handler == nil {
		panic("comfyuitest: WithHandler: wrap returned no handler")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.tasks.run(foreignCode{"the handler of", "WithHandler"}, func() { handler.ServeHTTP(w, r) })
	})
}

// WithVersion makes the pod behave as that release of ComfyUI: what it honours, answers and sends. Releases from 0.3.40 to the
// newest known one can be told apart, and a later one is like the newest known. It panics if the text is no version.
// Default: the newest known.
func WithVersion(version string) Option {
	v, err := parseVersion(version)
	if err != nil {
		panic(fmt.Sprintf("comfyuitest: %v", err))
	}
	return func(c *config) { c.version = v }
}

// WithNode adds a class, or replaces a built-in one.
func WithNode(class string, n Node) Option {
	if class == "" {
		panic("comfyuitest: WithNode: a class has a name")
	}
	return func(c *config) { c.nodes[class] = n }
}

// withClass adds a class as the built-in ones are defined, for tests of this package.
func withClass(added *class) Option {
	return func(c *config) {
		if c.classes == nil {
			c.classes = map[string]*class{}
		}
		c.classes[added.name] = added
	}
}

// WithPipes connects clients in memory instead of over TCP, for testing/synctest: make the pod and all its clients inside one
// bubble and use [Pod.Client] and [Pod.DialContext]; nothing listens at [Pod.URL]. Like sockets, and unlike [net.Pipe], these
// connections hold some 256 KiB each way before a writer waits.
func WithPipes() Option {
	return func(c *config) { c.pipes = true }
}

// WithMaxUpload limits request bodies, as --max-upload-size does; 0 is no limit. Default 100 MiB.
func WithMaxUpload(bytes int64) Option {
	if bytes < 0 {
		panic(fmt.Sprintf("comfyuitest: WithMaxUpload: negative limit %d", bytes))
	}
	return func(c *config) { c.maxUpload = bytes }
}

// WithHistorySize sets how many ended prompts the pod remembers; with 0 it forgets each at once. The oldest goes first. Default: the
// server's 10000, and like there one more, because it looks before it adds one.
func WithHistorySize(n int) Option {
	if n < 0 {
		panic(fmt.Sprintf("comfyuitest: WithHistorySize: negative size %d", n))
	}
	return func(c *config) { c.historySize = n }
}

// WithHandler puts a proxy in front of the pod: anything that [Fault] cannot say, such as a path prefix, a login or a log of
// the requests. The handler that wrap gets is the pod with its faults; wrap is called once.
func WithHandler(wrap func(http.Handler) http.Handler) Option {
	return func(c *config) { c.wrap = wrap }
}

// WithCompression compresses answers for clients that take it, as --enable-compress-response-body does: real pods behind
// slow lines run with it, and clients that read Content-Length as the body's length go wrong.
func WithCompression() Option {
	return func(c *config) { c.compress = true }
}

// scriptedClass is a class made of a [Node].
func scriptedClass(name string, n Node) *class {
	c := classOf(name, n)
	c.async, c.inputIsList = n.Async, n.InputIsList
	for _, list := range n.OutputIsList {
		c.returns = append(c.returns, returnSlot{typ: "*", list: list})
	}
	return c
}

// URL returns the pod's base URL.
func (p *Pod) URL() string { return "http://" + p.addr }

// Client returns an HTTP client that reaches the pod, over TCP or pipes, at [Pod.URL].
func (p *Pod) Client() *http.Client { return p.client }

// DialContext connects to the pod, whatever network and addr say, for clients that dial themselves, such as a WebSocket dialer.
func (p *Pod) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if !p.config.pipes {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", p.addr)
	}
	current := p.current()
	if current == nil {
		return nil, refusedDial(p.addr)
	}
	return current.conns.dial(ctx)
}

// closePatience is how long Close waits for goroutines that run somebody else's code.
const closePatience = 5 * time.Second

// Close ends the pod, at any moment, and waits for all its goroutines, those of nodes included: their ctx ends. A Run or a handler
// of [WithHandler] that goes on all the same for five seconds is left behind, which the log tells: that of the test, if there is
// one. What a node that is left behind still does shows nowhere. No Run may call Close.
func (p *Pod) Close() {
	p.mu.Lock()
	p.closed = true
	current, front := p.process, p.front
	p.process, p.front = nil, nil
	p.mu.Unlock()
	p.finish()
	if front != nil {
		_ = front.Close()
	}
	if current != nil {
		current.end()
	}
	p.client.CloseIdleConnections()
	p.changed.signal()
	p.leave()
	if left := p.tasks.wait(closePatience); left != nil {
		p.complain("comfyuitest: Close: still running %v after its context ended: %s", closePatience, strings.Join(left, ", "))
	}
}

// Restart ends the server as a crash does, at once and without a close frame, and starts it again after the given time:
// Restart returns without waiting for that, but with 0 the new server is there already. While it is down connections are
// refused, and another Restart decides anew when it is back. Queue, history, sockets, the cache and temp files are gone, numbers
// start at 0 again; outputs and inputs stay. Nodes that run hear it by their ctx.
func (p *Pod) Restart(down time.Duration) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.postpone()
	old, front := p.process, p.front
	if old != nil {
		old.cancel() // what its nodes still do shows nowhere
		p.files.clear(kindTemp)
		if down <= 0 {
			p.boot()
			p.mu.Unlock()
			old.end()
			return
		}
		p.process, p.front = nil, nil
	}
	var starting context.Context
	starting, p.postpone = context.WithCancel(p.life)
	p.mu.Unlock()
	if front != nil {
		_ = front.Close()
	}
	if old != nil {
		old.end()
	}
	if down <= 0 {
		p.revive(starting)
		return
	}
	p.tasks.start(func() {
		if wait(starting, down) {
			p.revive(starting)
		}
	})
}

// crash ends a process for good: only Restart starts another.
func (p *Pod) crash(proc *process) {
	p.mu.Lock()
	if p.process != proc {
		p.mu.Unlock()
		return
	}
	front := p.front
	p.process, p.front = nil, nil
	p.files.clear(kindTemp)
	p.mu.Unlock()
	if front != nil {
		_ = front.Close()
	}
	proc.end()
}

// revive starts a process after a time without one, unless ctx ends first: another Restart does it then.
func (p *Pod) revive(ctx context.Context) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		front, err := p.listen()
		if err == nil {
			p.open(ctx, front)
			return
		}
		// Somebody else has the port for the moment: a client's outgoing connection, say.
		if attempt == 100 || !wait(ctx, 50*time.Millisecond) {
			return
		}
	}
}

// open starts a process behind front; nil for pipes.
func (p *Pod) open(ctx context.Context, front net.Listener) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || ctx.Err() != nil {
		if front != nil {
			_ = front.Close()
		}
		return
	}
	p.front = front
	p.boot()
	if front != nil {
		p.tasks.start(func() { p.accept(front) })
	}
	p.changed.signal()
}

// listen takes the pod's address, once it has one, else a free one. Pipes need none.
func (p *Pod) listen() (net.Listener, error) {
	var config net.ListenConfig
	switch {
	case p.config.pipes:
		return nil, nil
	case p.addr != "":
		return config.Listen(p.life, "tcp", p.addr)
	}
	front, err := config.Listen(p.life, "tcp", "127.0.0.1:0")
	if err != nil {
		return config.Listen(p.life, "tcp", "[::1]:0")
	}
	return front, nil
}

// accept hands the connections of front to the process of the moment.
func (p *Pod) accept(front net.Listener) {
	for {
		conn, err := front.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors, for instance: later there may be some.
			wait(p.life, 5*time.Millisecond)
			continue
		}
		given := false
		for current := p.current(); current != nil && !given; current = p.current() {
			given = current.conns.give(conn)
		}
		if !given {
			resetConn(conn)
		}
	}
}

// Freeze stops the event loop: connections are accepted, but nothing is answered, no ping either, until thaw, when all comes
// at once. Nodes go on. Several freezes end with the last thaw.
func (p *Pod) Freeze() (thaw func()) {
	current := p.current()
	if current == nil {
		return func() {}
	}
	return current.loop.freeze(current.ctx)
}

// KillWorker ends the worker thread: prompts are accepted and never run, the one that runs stays in queue_running for ever.
// A restart brings it back.
func (p *Pod) KillWorker() {
	if current := p.current(); current != nil {
		current.executor.kill()
	}
}

// ClearHistory forgets all ended prompts.
func (p *Pod) ClearHistory() {
	if current := p.current(); current != nil {
		current.queue.clearHistory()
	}
}

// Interrupt is a bare POST /interrupt by someone else: it hits whatever runs.
func (p *Pod) Interrupt() {
	if current := p.current(); current != nil {
		current.executor.raiseInterrupt()
	}
}

// CutStreams spoils the sockets that are open now.
func (p *Pod) CutStreams(mode CutMode) {
	if mode < CutClose || mode > CutDeaf {
		panic(fmt.Sprintf("comfyuitest: CutStreams: unknown mode %d", mode))
	}
	if current := p.current(); current != nil {
		current.hub.cut(mode)
	}
}

// RefuseStreams answers new sockets with a status; 0 accepts them again. Open ones stay.
func (p *Pod) RefuseStreams(status int) {
	if status != 0 {
		if err := checkStatus(status); err != nil {
			panic(fmt.Sprintf("comfyuitest: RefuseStreams: %v", err))
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused = status
}

func (p *Pod) refusal() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refused
}

// SendText sends a text frame as it is, after all that is queued, to the socket that hears under that client id; "" means
// every socket.
func (p *Pod) SendText(clientID string, frame []byte) { p.sendRaw(clientID, opText, frame) }

// SendBinary is [Pod.SendText] with a binary frame.
func (p *Pod) SendBinary(clientID string, frame []byte) { p.sendRaw(clientID, opBinary, frame) }

func (p *Pod) sendRaw(clientID string, op byte, payload []byte) {
	if current := p.current(); current != nil {
		current.hub.enqueue(envelope{frame: newFrame(op, payload), sid: clientID, everyone: clientID == ""})
	}
}

// Streams returns how many sockets are open, deaf and displaced ones among them.
func (p *Pod) Streams() int {
	if current := p.current(); current != nil {
		return current.hub.count()
	}
	return 0
}

// WaitIdle waits until nothing is queued or runs, and what POST /free asked for is done. With a dead worker and a prompt in the
// queue that never comes about: only ctx ends it then.
func (p *Pod) WaitIdle(ctx context.Context) error {
	for {
		changed := p.changed.next()
		if p.idle() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("comfyuitest: the pod is not idle: %w", ctx.Err())
		}
	}
}

func (p *Pod) idle() bool {
	p.mu.Lock()
	current, closed := p.process, p.closed
	p.mu.Unlock()
	if current == nil {
		return closed
	}
	return current.queue.idle() && !current.executor.isBusy()
}

func (p *Pod) current() *process {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.process
}

// process is one life of the server: all that a restart takes away.
type process struct {
	pod      *Pod
	version  version
	files    *fileStore
	ctx      context.Context
	cancel   context.CancelFunc
	conns    *handoff
	server   *http.Server
	loop     *eventLoop
	hub      *hub
	queue    *queue
	executor *executor
	logs     *logBook

	number int64 // the counter of POST /prompt; used on the loop only
}

type (
	processKey struct{}
	connKey    struct{}
)

// boot makes a new process the pod's. The caller holds mu.
func (p *Pod) boot() {
	ctx, cancel := context.WithCancel(p.life)
	proc := &process{
		pod: p, version: p.version, files: p.files, ctx: ctx, cancel: cancel,
		conns: newHandoff(pipeAddr(p.addr)), loop: newEventLoop(), logs: newLogBook(),
	}
	proc.hub = newHub(proc.loop)
	proc.queue = newQueue(p.config.historySize, func(remaining int) {
		proc.hub.toEveryone("status", object{{"status", execInfo(remaining)}})
		p.changed.signal()
	})
	proc.queue.taking = func(id string) { p.chance.hold(id, paceTake) }
	proc.executor = newExecutor(proc)
	base := context.WithValue(ctx, processKey{}, proc)
	proc.server = &http.Server{
		Handler:     p.handler,
		BaseContext: func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		ConnState:   p.tasks.connState,
		ErrorLog:    log.New(io.Discard, "", 0),
		IdleTimeout: 75 * time.Second, // aiohttp's keepalive_timeout
	}
	p.process = proc
	p.tasks.start(func() {
		_ = proc.server.Serve(proc.conns)
		_ = proc.server.Close() // for connections that came in at the very end
	})
	p.tasks.start(func() {
		if !proc.hub.publish(ctx) {
			p.crash(proc)
		}
	})
	p.tasks.start(proc.executor.work)
}

// end cuts all connections, as the operating system does when a process dies. It waits for nothing: a node may be what
// ends its own process.
func (p *process) end() {
	p.cancel()
	for _, s := range p.hub.openStreams() {
		s.ws.close()
	}
	_ = p.conns.Close()
	_ = p.server.Close()
}
