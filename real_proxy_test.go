package comfyui_test

import (
	"bytes"
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// podProxy stands between a client and a real pod, on loopback, and does to their connections what networks and proxies do.
type podProxy struct {
	*httptest.Server
	target *url.URL

	mu      sync.Mutex
	conns   map[*proxiedConn]bool // the open ones; true: a WebSocket
	refuse  int                   // the answer to handshakes; 0: they pass
	lose    []lostPost            // for the next POST /prompt, in order
	held    []*http.Request       // to be sent to the pod after the next GET /queue
	posts   int                   // POST /prompt that reached the pod
	sockets int                   // handshakes that were tried
	away    bool                  // every connection is reset
	healed  chan struct{}         // closed at the end: black holes let go of the pod
}

// lostPost is what happens to one POST /prompt.
type lostPost int

const (
	postNeverArrives lostPost = iota // reset before the pod has a byte of it
	postAnswerReset                  // the pod has it; its answer does not come back
	postAnswer502                    // the pod has it; a proxy answers 502 in its place
	postArrivesLate                  // a proxy answers 524; the pod gets it after the client has looked at the queue once
)

// socketEnd is a way for a WebSocket to end or to go wrong.
type socketEnd int

const (
	endFIN socketEnd = iota
	endRST
	endBlackHole // stays open, nothing passes either way; the pod keeps its side
)

type proxiedKey struct{}

func newPodProxy(t *testing.T, podURL string) *podProxy {
	t.Helper()
	target, err := url.Parse(podURL)
	require.NoError(t, err)
	p := &podProxy{target: target, conns: map[*proxiedConn]bool{}, healed: make(chan struct{})}
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	transport := &http.Transport{}
	forward := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: transport,
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	p.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { p.serve(w, r, forward) }))
	_ = p.Listener.Close()
	p.Listener = &proxyListener{listener, p}
	p.Config.ErrorLog = log.New(io.Discard, "", 0)
	p.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, proxiedKey{}, c) }
	p.Start()
	t.Cleanup(func() {
		close(p.healed)
		p.reset()
		p.Close()
		transport.CloseIdleConnections()
	})
	return p
}

func (p *podProxy) serve(w http.ResponseWriter, r *http.Request, forward http.Handler) {
	conn, _ := r.Context().Value(proxiedKey{}).(*proxiedConn)
	route := r.Method + " " + strings.TrimPrefix(r.URL.Path, "/api")
	switch {
	case p.isAway():
		conn.reset()
	case strings.HasSuffix(route, " /ws"):
		if status := p.handshake(conn); status != 0 {
			http.Error(w, "the proxy lets no WebSocket through", status)
			return
		}
		forward.ServeHTTP(w, r)
	case route == "POST /prompt":
		p.post(w, r, conn, forward)
	default:
		forward.ServeHTTP(w, r)
		if route == "GET /queue" {
			p.deliver(forward)
		}
	}
}

func (p *podProxy) isAway() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.away
}

// handshake notes a WebSocket; a status other than 0 refuses it.
func (p *podProxy) handshake(conn *proxiedConn) (status int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sockets++
	if p.refuse == 0 {
		p.conns[conn] = true
	}
	return p.refuse
}

func (p *podProxy) post(w http.ResponseWriter, r *http.Request, conn *proxiedConn, forward http.Handler) {
	p.mu.Lock()
	how := lostPost(-1)
	if len(p.lose) > 0 {
		how, p.lose = p.lose[0], p.lose[1:]
	}
	if how != postNeverArrives {
		p.posts++
	}
	p.mu.Unlock()
	switch how {
	case postNeverArrives:
		conn.reset()
	case postAnswerReset:
		forward.ServeHTTP(httptest.NewRecorder(), r)
		conn.reset()
	case postAnswer502:
		forward.ServeHTTP(httptest.NewRecorder(), r)
		http.Error(w, "<html><body><h1>502 Bad Gateway</h1></body></html>", http.StatusBadGateway)
	case postArrivesLate:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			conn.reset()
			return
		}
		held := r.Clone(context.WithoutCancel(r.Context()))
		held.Body = io.NopCloser(bytes.NewReader(body))
		p.mu.Lock()
		p.held = append(p.held, held)
		p.mu.Unlock()
		http.Error(w, "a timeout occurred", 524)
	default:
		forward.ServeHTTP(w, r)
	}
}

// deliver sends what was held back.
func (p *podProxy) deliver(forward http.Handler) {
	p.mu.Lock()
	held := p.held
	p.held = nil
	p.mu.Unlock()
	for _, r := range held {
		forward.ServeHTTP(httptest.NewRecorder(), r)
	}
}

// losePosts says what happens to the next POST /prompt.
func (p *podProxy) losePosts(how ...lostPost) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lose = append(p.lose, how...)
}

// refuseSockets answers every handshake so; 0: they pass again.
func (p *podProxy) refuseSockets(status int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = status
}

// cutSockets ends the WebSockets that are open and returns how many there were.
func (p *podProxy) cutSockets(how socketEnd) int {
	cut := p.take(func(socket bool) bool { return socket })
	for _, c := range cut {
		switch how {
		case endFIN:
			_ = c.Close()
		case endRST:
			c.reset()
		case endBlackHole:
			c.dark.Store(true)
		}
	}
	return len(cut)
}

// take removes connections from the list.
func (p *podProxy) take(which func(socket bool) bool) []*proxiedConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	var taken []*proxiedConn
	for c, socket := range p.conns {
		if which(socket) {
			taken = append(taken, c)
			delete(p.conns, c)
		}
	}
	return taken
}

// leave makes the pod unreachable until the returned function is called.
func (p *podProxy) leave() (comeBack func()) {
	p.mu.Lock()
	p.away = true
	p.mu.Unlock()
	p.reset()
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.away = false
	}
}

// reset resets every connection.
func (p *podProxy) reset() {
	for _, c := range p.take(func(bool) bool { return true }) {
		c.reset()
	}
}

func (p *podProxy) counts() (posts, sockets int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.posts, p.sockets
}

type proxyListener struct {
	net.Listener
	proxy *podProxy
}

func (l *proxyListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	conn := &proxiedConn{Conn: c, proxy: l.proxy}
	l.proxy.mu.Lock()
	defer l.proxy.mu.Unlock()
	l.proxy.conns[conn] = false
	return conn, nil
}

// proxiedConn is the client's side of a connection through the proxy.
type proxiedConn struct {
	net.Conn
	proxy *podProxy
	dark  atomic.Bool // a black hole
}

func (c *proxiedConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if !c.dark.Load() {
			return n, err
		}
		if err != nil { // the client's going does not reach the pod either
			<-c.proxy.healed
			return 0, err
		}
	}
}

func (c *proxiedConn) Write(b []byte) (int, error) {
	if c.dark.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

func (c *proxiedConn) Close() error {
	c.proxy.mu.Lock()
	delete(c.proxy.conns, c)
	c.proxy.mu.Unlock()
	return c.Conn.Close()
}

func (c *proxiedConn) reset() {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}
