package comfyuitest

import (
	"bytes"
	"context"
	"io"
	"net/http"
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
	Delay  time.Duration // for AnswerBefore and Slow
	Status int           // for Answer, AnswerAfter and AnswerBefore; 0: 502
	Header http.Header   // likewise
	Body   string        // likewise
}

// Effect is what a [Fault] does.
type Effect int

// The effects. "The pod handles it" means that all its consequences come about.
const (
	Answer       Effect = iota // Status and Body; the pod never sees the request
	AnswerAfter                // the pod handles it, its answer is replaced (a 524, a 500 that queued)
	AnswerBefore               // Status and Body at once, and the pod handles it Delay later
	Drop                       // connection reset, the pod never sees the request
	DropAfter                  // the pod handles it, then the connection is reset: a lost reply
	Hang                       // no answer until the client goes
	Slow                       // handled after Delay
	Truncate                   // half of the body, then a reset
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

// Inject puts a fault in force; remove ends it.
func (p *Pod) Inject(f Fault) (remove func()) {
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
		f.answer(w)
	case AnswerAfter:
		next.ServeHTTP(newRecorder(), r)
		f.answer(w)
	case AnswerBefore:
		p.answerBefore(f, next, w, r)
	case Drop:
		resetRequest(w)
	case DropAfter:
		next.ServeHTTP(newRecorder(), r)
		resetRequest(w)
	case Hang:
		hang(r)
		resetRequest(w)
	case Slow:
		if !wait(r.Context(), f.Delay) {
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(w, r)
	case Truncate:
		truncate(next, w, r)
	}
}

func (f Fault) answer(w http.ResponseWriter) {
	for name, values := range f.Header {
		w.Header()[http.CanonicalHeaderKey(name)] = slices.Clone(values)
	}
	status := f.Status
	if status == 0 {
		status = http.StatusBadGateway
	}
	w.WriteHeader(status)
	_, _ = io.WriteString(w, f.Body) // the client may be gone
}

// answerBefore handles the request in the pod's own time: it no longer depends on the client.
func (p *Pod) answerBefore(f Fault, next http.Handler, w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		resetRequest(w)
		return
	}
	later := r.Clone(context.WithValue(p.life, processKey{}, (*process)(nil)))
	later.Body = io.NopCloser(bytes.NewReader(body))
	p.tasks.start(func() {
		if wait(p.life, f.Delay) {
			defer func() {
				if cause := recover(); cause != nil && cause != http.ErrAbortHandler { //nolint:errorlint // as net/http compares it
					panic(cause)
				}
			}()
			next.ServeHTTP(newRecorder(), later)
		}
	})
	f.answer(w)
}

// hang waits for the client to go, or for the process to end.
func hang(r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // only then does net/http watch the connection
	<-r.Context().Done()
}

// truncate lets half of the answer's body through.
func truncate(next http.Handler, w http.ResponseWriter, r *http.Request) {
	rec := newRecorder()
	next.ServeHTTP(rec, r)
	for name, values := range rec.header {
		w.Header()[name] = values
	}
	w.Header().Set("Content-Length", strconv.Itoa(rec.body.Len()))
	w.WriteHeader(rec.status)
	_, _ = w.Write(rec.body.Bytes()[:rec.body.Len()/2])
	_ = http.NewResponseController(w).Flush()
	resetRequest(w)
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
}

func newRecorder() *recorder { return &recorder{header: http.Header{}, status: http.StatusOK} }

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }
