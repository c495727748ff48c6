package comfyuitest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Fault is something done to the requests that match. The first that matches and is not used up acts.
type Fault struct {
	// Route is the method and the beginning of the path, without /api: "POST /prompt", "GET /history", "GET /ws". A path alone
	// is of any method; "" is every request.
	Route  string
	Skip   int // matching requests let through first
	Times  int // then so many are hit; 0: one; negative: all
	Effect Effect
	// Delay is how long the pod does not see the request (AnswerBefore, Slow), or how long the client waits for what it gets (all
	// others but Hang).
	Delay  time.Duration
	Status int         // for Answer, AnswerAfter and AnswerBefore; 0: 502
	Header http.Header // likewise
	Body   string      // likewise
}

// Effect is what a [Fault] does.
type Effect int

// The effects. "The pod handles it" means that all its consequences come about, also if the client has gone by then. A socket that
// it opens for a client which does not hear of it is lost at once, but has displaced the one before.
const (
	Answer       Effect = iota // Status and Body; the pod never sees the request
	AnswerAfter                // the pod handles it, its answer is replaced (a 524, a 500 that queued)
	AnswerBefore               // Status and Body at once, and the pod handles it Delay later
	Drop                       // connection reset, the pod never sees the request
	DropAfter                  // the pod handles it, then the connection is reset: a lost reply
	Hang                       // no answer until the client goes
	Slow                       // handled after Delay
	Truncate                   // half of the body, or of a socket's first frames, then a reset
)

// CutMode is a way for a socket to end or to go wrong.
type CutMode int

// The modes. The server's side of a closed or reset socket is cleaned up at once, so that the client's next socket hears;
// for a socket that does not, use CutDeaf, or let the client cut the connection itself and dial again at once.
const (
	CutClose     CutMode = iota // close frame and FIN
	CutReset                    // RST
	CutBlackhole                // stays open, nothing passes either way
	CutDeaf                     // pings are answered, no message comes
)

// faults are the faults in force.
type faults struct {
	mu     sync.Mutex
	active []*activeFault
}

type activeFault struct {
	Fault

	skip, left int // left is negative for all
}

// Inject puts a fault in force; remove ends it. It panics if the fault makes no sense: a route that no request can match, for
// instance, would let a test pass without its fault.
func (p *Pod) Inject(f Fault) (remove func()) {
	if err := f.check(); err != nil {
		panic(fmt.Sprintf("comfyuitest: Inject: %v", err))
	}
	a := &activeFault{Fault: f, skip: f.Skip, left: f.Times}
	if f.Times == 0 {
		a.left = 1
	}
	p.faults.mu.Lock()
	defer p.faults.mu.Unlock()
	p.faults.active = append(p.faults.active, a)
	return func() {
		p.faults.mu.Lock()
		defer p.faults.mu.Unlock()
		p.faults.active = slices.DeleteFunc(p.faults.active, func(other *activeFault) bool { return other == a })
	}
}

func (f Fault) check() error {
	switch {
	case f.Effect < Answer || f.Effect > Truncate:
		return fmt.Errorf("unknown effect %d", f.Effect)
	case f.Skip < 0:
		return fmt.Errorf("negative skip %d", f.Skip)
	case f.Delay < 0:
		return fmt.Errorf("negative delay %v", f.Delay)
	case f.Status != 0:
		if err := checkStatus(f.Status); err != nil {
			return err
		}
	}
	return checkRoute(f.Route)
}

// checkStatus: below 200 an answer is not over.
func checkStatus(status int) error {
	if status < http.StatusOK || status > 999 {
		return fmt.Errorf("status %d is no final answer's", status)
	}
	return nil
}

var routePattern = regexp.MustCompile(`^(?:(?:GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS)(?: /[^ ?#]*)?|/[^ ?#]*)?$`)

func checkRoute(route string) error {
	if !routePattern.MatchString(route) {
		return fmt.Errorf("route %q: want a method, the beginning of a path, or both as in \"GET /history\", without a query", route)
	}
	return nil
}

// match returns the fault that hits a request. A request that a fault lets through because of Skip goes on to the next one.
func (f *faults) match(method, path string) (Fault, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.active {
		if a.left == 0 || !matchesRoute(a.Route, method, path) {
			continue
		}
		if a.skip > 0 {
			a.skip--
			continue
		}
		if a.left > 0 {
			a.left--
		}
		return a.Fault, true
	}
	return Fault{}, false
}

// matchesRoute tells whether a request is of a route: a prefix match with /api stripped on both sides.
func matchesRoute(route, method, path string) bool {
	wanted, prefix, hasMethod := strings.Cut(route, " ")
	if !hasMethod {
		if route != "" && !strings.HasPrefix(route, "/") {
			return route == method
		}
		wanted, prefix = "", route
	}
	if wanted != "" && wanted != method {
		return false
	}
	return strings.HasPrefix(stripAPI(path), stripAPI(prefix))
}

func stripAPI(path string) string {
	if rest, found := strings.CutPrefix(path, "/api"); found && (rest == "" || rest[0] == '/') {
		return rest
	}
	return path
}

// faulty wraps the pod's handler: requests are counted, and faults act on them.
func (p *Pod) faulty(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.book.count(r.Method + " " + stripAPI(r.URL.Path))
		fault, hit := p.faults.match(r.Method, r.URL.Path)
		if !hit {
			next.ServeHTTP(w, r)
			return
		}
		p.act(fault, next, w, r)
	})
}

// act does what a fault says. Requests that take time are ended with the process that got them.
func (p *Pod) act(f Fault, next http.Handler, w http.ResponseWriter, r *http.Request) {
	switch f.Effect {
	case Answer:
		f.wait(r)
		f.answer(w, r)
	case AnswerAfter:
		next.ServeHTTP(newRecorder(), r)
		f.wait(r)
		f.answer(w, r)
	case AnswerBefore:
		p.answerBefore(f, next, w, r)
	case Drop:
		f.wait(r)
		resetRequest(w)
	case DropAfter:
		next.ServeHTTP(newRecorder(), r)
		f.wait(r)
		resetRequest(w)
	case Hang:
		hang(r)
		resetRequest(w)
	case Slow:
		p.slow(f, next, w, r)
	case Truncate:
		f.truncate(next, w, r)
	}
}

// wait lets the delay pass, or ends the request if nobody waits for it any more.
func (f Fault) wait(r *http.Request) {
	if !wait(r.Context(), f.Delay) {
		panic(http.ErrAbortHandler)
	}
}

func (f Fault) answer(w http.ResponseWriter, r *http.Request) {
	for name, values := range f.Header {
		w.Header()[http.CanonicalHeaderKey(name)] = slices.Clone(values)
	}
	status := f.Status
	if status == 0 {
		status = http.StatusBadGateway
	}
	linger(w, r, func() {
		if _, given := w.Header()["Content-Length"]; !given && bodyAllowed(status) {
			w.Header().Set("Content-Length", strconv.Itoa(len(f.Body)))
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, f.Body) // the client may be gone
	})
}

// bodyAllowed is false for the answers that end with their header.
func bodyAllowed(status int) bool {
	return status != http.StatusNoContent && status != http.StatusNotModified
}

// answerBefore handles the request in the pod's own time: it no longer depends on the client.
func (p *Pod) answerBefore(f Fault, next http.Handler, w http.ResponseWriter, r *http.Request) {
	held := hold(context.WithValue(p.life, processKey{}, (*process)(nil)), w, r)
	p.tasks.start(func() {
		if wait(p.life, f.Delay) {
			defer func() {
				if cause := recover(); cause != nil && cause != http.ErrAbortHandler { //nolint:errorlint // as net/http compares it
					panic(cause)
				}
			}()
			next.ServeHTTP(newRecorder(), held)
		}
	})
	f.answer(w, r)
}

// slow is a proxy that holds the request: it reaches the pod even if its client gives it up meanwhile, unless the process ends.
func (p *Pod) slow(f Fault, next http.Handler, w http.ResponseWriter, r *http.Request) {
	held := hold(context.WithoutCancel(r.Context()), w, r)
	life := p.life
	if proc := p.processOf(r); proc != nil {
		life = proc.ctx
	}
	if !wait(life, f.Delay) {
		panic(http.ErrAbortHandler)
	}
	next.ServeHTTP(w, held)
}

// hold takes the whole request, so that ctx alone decides how long it lives.
func hold(ctx context.Context, w http.ResponseWriter, r *http.Request) *http.Request {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		resetRequest(w)
		panic(http.ErrAbortHandler)
	}
	held := r.Clone(ctx)
	held.Body = io.NopCloser(bytes.NewReader(body))
	return held
}

// hang waits for the client to go, or for the process to end.
func hang(r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // only then does net/http watch the connection
	<-r.Context().Done()
}

// truncate lets half of the answer's body through.
func (f Fault) truncate(next http.Handler, w http.ResponseWriter, r *http.Request) {
	rec := newRecorder()
	next.ServeHTTP(rec, r)
	if rec.socket != nil {
		f.truncateSocket(rec.sent(), w, r)
		return
	}
	for name, values := range rec.header {
		w.Header()[name] = values
	}
	w.Header().Set("Content-Length", strconv.Itoa(max(rec.body.Len(), 1))) // an empty body is cut short too
	w.WriteHeader(rec.status)
	_, _ = w.Write(rec.body.Bytes()[:rec.body.Len()/2])
	_ = http.NewResponseController(w).Flush()
	drained(r)
	f.wait(r)
	resetRequest(w)
}

// drained waits until the client has got what was written: the reset would take back the rest.
func drained(r *http.Request) {
	conn, overTCP := r.Context().Value(connKey{}).(*net.TCPConn)
	for overTCP && unsent(conn) > 0 && wait(r.Context(), time.Millisecond) {
	}
}

// truncateSocket lets the handshake and half of what came with it through.
func (f Fault) truncateSocket(sent []byte, w http.ResponseWriter, r *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	defer resetConn(conn)
	const endOfHeader = "\r\n\r\n"
	handshake := bytes.Index(sent, []byte(endOfHeader)) + len(endOfHeader)
	_, _ = conn.Write(sent[:handshake+(len(sent)-handshake)/2]) // the client may be gone
	f.wait(r)
}

// resetRequest ends the request's connection with a RST.
func resetRequest(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		resetConn(conn)
		return
	}
	panic(http.ErrAbortHandler)
}

// wait lets time pass; false if ctx ended first.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// recorder takes an answer that the client never sees, or sees only in part.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
	socket net.Conn // the client's end, if the pod made a socket of it
}

func newRecorder() *recorder { return &recorder{header: http.Header{}, status: http.StatusOK} }

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

// Hijack gives a socket whose client has gone.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	client, pod := newPipe("pod")
	client.out.closeWriter(io.EOF)
	r.socket = client
	return pod, bufio.NewReadWriter(bufio.NewReader(pod), bufio.NewWriter(pod)), nil
}

// sent is what the pod wrote to the socket until it saw that the client has gone.
func (r *recorder) sent() []byte {
	sent, _ := io.ReadAll(r.socket) // from memory, and closed
	return sent
}
