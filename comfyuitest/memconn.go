package comfyuitest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// pipeBuffer is how much one direction of a pipe holds before its writer waits, as the buffers of a loopback socket would.
// Without it a client that looks away for a moment would stop the pod's publish loop.
const pipeBuffer = 256 << 10

// pipeConn is one end of a connection in memory. It differs from [net.Pipe] where a client can tell: writes are buffered,
// the peer of a closed end reads what was written before, and an end can be reset.
type pipeConn struct {
	in, out                     *pipeHalf
	readDeadline, writeDeadline pipeDeadline
	local, remote               pipeAddr
}

type pipeAddr string

func (pipeAddr) Network() string  { return "pipe" }
func (a pipeAddr) String() string { return string(a) }

// pipeAddresses are those of the pods on pipes that are open. Each has one of its own: by their URLs clients, and the stores that they
// share, tell pods apart.
var pipeAddresses addresses

type addresses struct {
	mu    sync.Mutex
	taken map[uint32]bool
}

// take returns a free address of the loopback where nothing listens, so that a client that misses the pipes reaches no real server.
func (a *addresses) take() (addr string, leave func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.taken == nil {
		a.taken = map[uint32]bool{}
	}
	host := uint32(127<<24 + 1)
	for a.taken[host] {
		host++
	}
	a.taken[host] = true
	ip := binary.BigEndian.AppendUint32(nil, host)
	return net.JoinHostPort(net.IP(ip).String(), "1"), sync.OnceFunc(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.taken, host)
	})
}

func newPipe(server pipeAddr) (client, pod *pipeConn) {
	toPod, toClient := newPipeHalf(), newPipeHalf()
	client = &pipeConn{in: toClient, out: toPod, local: "client", remote: server, readDeadline: newPipeDeadline(), writeDeadline: newPipeDeadline()}
	pod = &pipeConn{in: toPod, out: toClient, local: server, remote: "client", readDeadline: newPipeDeadline(), writeDeadline: newPipeDeadline()}
	return client, pod
}

func (c *pipeConn) Read(p []byte) (int, error) {
	n, err := c.in.read(p, c.readDeadline.expired())
	if err != nil && !errors.Is(err, io.EOF) {
		err = &net.OpError{Op: "read", Net: "pipe", Source: c.local, Addr: c.remote, Err: err}
	}
	return n, err
}

func (c *pipeConn) Write(p []byte) (int, error) {
	n, err := c.out.write(p, c.writeDeadline.expired())
	if err != nil {
		err = &net.OpError{Op: "write", Net: "pipe", Source: c.local, Addr: c.remote, Err: err}
	}
	return n, err
}

// Close sends what is buffered and then EOF; the peer's later writes fail.
func (c *pipeConn) Close() error {
	c.out.closeWriter(io.EOF)
	c.in.closeReader(net.ErrClosed, syscall.EPIPE)
	return nil
}

// reset ends both directions at once. The peer still reads what has reached its end, then gets the error.
func (c *pipeConn) reset() {
	c.out.closeWriter(syscall.ECONNRESET)
	c.in.closeReader(net.ErrClosed, syscall.ECONNRESET)
}

func (c *pipeConn) LocalAddr() net.Addr  { return c.local }
func (c *pipeConn) RemoteAddr() net.Addr { return c.remote }

func (c *pipeConn) SetDeadline(t time.Time) error {
	c.readDeadline.set(t)
	c.writeDeadline.set(t)
	return nil
}

func (c *pipeConn) SetReadDeadline(t time.Time) error {
	c.readDeadline.set(t)
	return nil
}

func (c *pipeConn) SetWriteDeadline(t time.Time) error {
	c.writeDeadline.set(t)
	return nil
}

// pipeHalf is one direction. Its waits are on channels, so that a testing/synctest bubble can tell that they are idle.
type pipeHalf struct {
	mu       sync.Mutex
	buf      []byte
	readErr  error         // for the reader, once buf is empty
	writeErr error         // for the writer
	changed  chan struct{} // closed at the next change; nil while nobody waits
}

func newPipeHalf() *pipeHalf { return &pipeHalf{} }

// wait returns a channel that the next change closes. The caller holds mu.
func (h *pipeHalf) wait() <-chan struct{} {
	if h.changed == nil {
		h.changed = make(chan struct{})
	}
	return h.changed
}

// notify wakes those who wait. The caller holds mu.
func (h *pipeHalf) notify() {
	if h.changed != nil {
		close(h.changed)
		h.changed = nil
	}
}

func (h *pipeHalf) read(p []byte, expired <-chan struct{}) (int, error) {
	for {
		if isClosed(expired) {
			return 0, os.ErrDeadlineExceeded
		}
		h.mu.Lock()
		if len(h.buf) > 0 || len(p) == 0 {
			n := copy(p, h.buf)
			h.buf = h.buf[n:]
			if len(h.buf) == 0 {
				h.buf = nil
			}
			h.notify()
			h.mu.Unlock()
			return n, nil
		}
		if h.readErr != nil {
			err := h.readErr
			h.mu.Unlock()
			return 0, err
		}
		changed := h.wait()
		h.mu.Unlock()
		select {
		case <-changed:
		case <-expired:
		}
	}
}

func (h *pipeHalf) write(p []byte, expired <-chan struct{}) (int, error) {
	written := 0
	for {
		if isClosed(expired) {
			return written, os.ErrDeadlineExceeded
		}
		h.mu.Lock()
		if h.writeErr != nil {
			err := h.writeErr
			h.mu.Unlock()
			return written, err
		}
		if room := min(pipeBuffer-len(h.buf), len(p)-written); room > 0 {
			h.buf = append(h.buf, p[written:written+room]...)
			written += room
			h.notify()
		}
		if written == len(p) {
			h.mu.Unlock()
			return written, nil
		}
		changed := h.wait()
		h.mu.Unlock()
		select {
		case <-changed:
		case <-expired:
		}
	}
}

// closeWriter ends the direction at the writer's end: the reader gets readErr after what is buffered.
func (h *pipeHalf) closeWriter(readErr error) {
	h.close(readErr, net.ErrClosed)
}

// closeReader ends the direction at the reader's end: what is buffered is lost.
func (h *pipeHalf) closeReader(readErr, writeErr error) {
	h.drop()
	h.close(readErr, writeErr)
}

func (h *pipeHalf) close(readErr, writeErr error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.readErr == nil {
		h.readErr = readErr
	}
	if h.writeErr == nil {
		h.writeErr = writeErr
	}
	h.notify()
}

func (h *pipeHalf) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.buf = nil
}

// pipeDeadline closes a channel when its time has come.
type pipeDeadline struct {
	mu    *sync.Mutex
	state *deadlineState
}

type deadlineState struct {
	timer *time.Timer
	done  chan struct{}
}

func newPipeDeadline() pipeDeadline {
	return pipeDeadline{mu: &sync.Mutex{}, state: &deadlineState{done: make(chan struct{})}}
}

func (d pipeDeadline) expired() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state.done
}

func (d pipeDeadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state.timer != nil && !d.state.timer.Stop() {
		<-d.state.done // it is closing the channel right now
	}
	d.state.timer = nil
	if isClosed(d.state.done) {
		d.state.done = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	done := d.state.done
	left := time.Until(t)
	if left <= 0 {
		close(done)
		return
	}
	d.state.timer = time.AfterFunc(left, func() { close(done) })
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// handoff is the listener of one process: connections are handed to it, so that it can end while the pod's port stays open.
type handoff struct {
	addr    net.Addr
	accepts chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

func newHandoff(addr net.Addr) *handoff {
	return &handoff{addr: addr, accepts: make(chan net.Conn), closed: make(chan struct{})}
}

// Accept implements [net.Listener].
func (h *handoff) Accept() (net.Conn, error) {
	select {
	case conn := <-h.accepts:
		return conn, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (h *handoff) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

// Addr implements [net.Listener].
func (h *handoff) Addr() net.Addr { return h.addr }

// give hands a connection over; false when the process has ended.
func (h *handoff) give(conn net.Conn) bool {
	select {
	case h.accepts <- conn:
		return true
	case <-h.closed:
		return false
	}
}

// dial connects in memory.
func (h *handoff) dial(ctx context.Context) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, dialError(h.addr.String(), err)
	}
	client, pod := newPipe(pipeAddr(h.addr.String()))
	select {
	case h.accepts <- pod:
		return client, nil
	case <-h.closed:
		return nil, refusedDial(h.addr.String())
	case <-ctx.Done():
		return nil, dialError(h.addr.String(), ctx.Err())
	}
}

// refusedDial is how a dial fails while nobody listens.
func refusedDial(addr string) error {
	return dialError(addr, os.NewSyscallError("connect", syscall.ECONNREFUSED))
}

func dialError(addr string, err error) error {
	return &net.OpError{Op: "dial", Net: "pipe", Addr: pipeAddr(addr), Err: err}
}

// resetConn ends a connection with a RST instead of a FIN.
func resetConn(conn net.Conn) {
	switch conn := conn.(type) {
	case *net.TCPConn:
		_ = conn.SetLinger(0) // failing only when it is closed already
		_ = conn.Close()
	case *pipeConn:
		conn.reset()
	default:
		_ = conn.Close()
	}
}
