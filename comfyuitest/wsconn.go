package comfyuitest

import (
	"bufio"
	"bytes"
	"compress/flate"
	"crypto/sha1" //nolint:gosec // RFC 6455 asks for it; nothing secret depends on it
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"
)

// The server's end of a WebSocket, as aiohttp has it. It is written out here because the known libraries cannot take
// permessage-deflate the way aiohttp does (client_no_context_takeover is never confirmed, which some clients refuse), and
// because the pod needs frames that are encoded once and sent to many sockets as they are.

const (
	opContinuation = 0
	opText         = 1
	opBinary       = 2
	opClose        = 8
	opPing         = 9
	opPong         = 10

	closeNormal   = 1000
	closeProtocol = 1002
	closeNoText   = 1007
	closeTooBig   = 1009

	// maxClientMessage is aiohttp's default max_msg_size.
	maxClientMessage = 4 << 20
)

// wsError ends a socket with a close code.
type wsError struct {
	code int
	text string
}

func (e *wsError) Error() string { return fmt.Sprintf("websocket: %s (close code %d)", e.text, e.code) }

// errPeerClosed tells that the client sent a close frame.
var errPeerClosed = errors.New("websocket: close frame")

// wsConn is one upgraded connection. One goroutine reads; any number may write.
type wsConn struct {
	conn   net.Conn
	reader *bufio.Reader
	// writing holds a token while a frame goes out: a client that does not read holds up every writer of this socket.
	writing  chan struct{}
	deflate  *deflater
	inflate  *inflater
	partial  clientFrame // the message whose fragments are coming; op 0: none
	closing  chan struct{}
	closeOne sync.Once
}

func newWSConn(conn net.Conn, reader *bufio.Reader, ext extension) *wsConn {
	c := &wsConn{conn: conn, reader: reader, writing: make(chan struct{}, 1), closing: make(chan struct{})}
	if ext.bits != 0 {
		c.deflate, c.inflate = newDeflater(ext), &inflater{}
	}
	return c
}

// frame is a message that is encoded once, for sockets with and without compression.
type frame struct {
	op      byte
	payload []byte
	wire    []byte // header and payload, uncompressed
}

func newFrame(op byte, payload []byte) *frame {
	wire := make([]byte, 0, len(payload)+10)
	wire = append(appendFrameHeader(wire, op, len(payload)), payload...)
	return &frame{op: op, payload: wire[len(wire)-len(payload):], wire: wire}
}

func appendFrameHeader(dst []byte, op byte, length int) []byte {
	dst = append(dst, 0x80|op)
	switch {
	case length < 126:
		return append(dst, byte(length))
	case length < 1<<16:
		return binary.BigEndian.AppendUint16(append(dst, 126), uint16(length))
	default:
		return binary.BigEndian.AppendUint64(append(dst, 127), uint64(length))
	}
}

// send writes a frame. It waits for a client that does not read, until the connection is closed.
func (c *wsConn) send(f *frame) error {
	select {
	case c.writing <- struct{}{}:
	case <-c.closing:
		return net.ErrClosed
	}
	defer func() { <-c.writing }()
	wire := f.wire
	if c.deflate != nil && f.op < opClose {
		payload, err := c.deflate.compress(f.payload)
		if err != nil {
			return err
		}
		wire = append(appendFrameHeader(make([]byte, 0, len(payload)+10), f.op|0x40, len(payload)), payload...)
	}
	_, err := c.conn.Write(wire)
	return err
}

func (c *wsConn) sendClose(code int) error {
	return c.send(newFrame(opClose, binary.BigEndian.AppendUint16(nil, uint16(code))))
}

func (c *wsConn) close() {
	c.closeOne.Do(func() { close(c.closing) })
	_ = c.conn.Close()
}

func (c *wsConn) reset() {
	c.closeOne.Do(func() { close(c.closing) })
	resetConn(c.conn)
}

// read returns the next message or control frame of the client.
func (c *wsConn) read() (op byte, payload []byte, err error) {
	for {
		f, err := c.readFrame(maxClientMessage - len(c.partial.payload))
		switch {
		case err != nil:
			return 0, nil, err
		case f.op >= opClose:
			return f.op, f.payload, nil // between fragments, too
		case f.op == opContinuation && c.partial.op == 0:
			return 0, nil, &wsError{closeProtocol, "continuation of nothing"}
		case f.op != opContinuation && c.partial.op != 0:
			return 0, nil, &wsError{closeProtocol, "message inside a message"}
		case f.op != opContinuation:
			c.partial = f
		default:
			c.partial.payload = append(c.partial.payload, f.payload...)
		}
		if !f.last {
			continue
		}
		message := c.partial
		c.partial = clientFrame{}
		if message.compressed {
			if message.payload, err = c.inflate.expand(message.payload); err != nil {
				return 0, nil, err
			}
		}
		if message.op == opText && !utf8.Valid(message.payload) {
			return 0, nil, &wsError{closeNoText, "text that is no UTF-8"}
		}
		return message.op, message.payload, nil
	}
}

type clientFrame struct {
	op               byte
	last, compressed bool
	payload          []byte
}

func (c *wsConn) readFrame(limit int) (clientFrame, error) {
	var head [8]byte
	if _, err := io.ReadFull(c.reader, head[:2]); err != nil {
		return clientFrame{}, err
	}
	f := clientFrame{op: head[0] & 15, last: head[0]&0x80 != 0, compressed: head[0]&0x40 != 0}
	length := uint64(head[1] & 0x7f)
	switch {
	case head[0]&0x30 != 0 || f.compressed && (c.inflate == nil || f.op >= opClose):
		return clientFrame{}, &wsError{closeProtocol, "reserved bits are set"}
	case f.op > opBinary && f.op < opClose || f.op > opPong:
		return clientFrame{}, &wsError{closeProtocol, "unknown opcode"}
	case f.op >= opClose && (!f.last || length > 125):
		return clientFrame{}, &wsError{closeProtocol, "bad control frame"}
	case head[1]&0x80 == 0:
		return clientFrame{}, &wsError{closeProtocol, "frame without a mask"}
	}
	switch length {
	case 126:
		if _, err := io.ReadFull(c.reader, head[:2]); err != nil {
			return clientFrame{}, err
		}
		length = uint64(binary.BigEndian.Uint16(head[:2]))
	case 127:
		if _, err := io.ReadFull(c.reader, head[:8]); err != nil {
			return clientFrame{}, err
		}
		length = binary.BigEndian.Uint64(head[:8])
	}
	if length > uint64(max(limit, 0)) && f.op < opClose {
		return clientFrame{}, &wsError{closeTooBig, "message exceeds the limit"}
	}
	var mask [4]byte
	if _, err := io.ReadFull(c.reader, mask[:]); err != nil {
		return clientFrame{}, err
	}
	f.payload = make([]byte, length)
	if _, err := io.ReadFull(c.reader, f.payload); err != nil {
		return clientFrame{}, err
	}
	for i := range f.payload {
		f.payload[i] ^= mask[i&3]
	}
	return f, nil
}

// extension is what was agreed on permessage-deflate. bits 0: nothing.
type extension struct {
	bits       int // window of the server's compressor
	noTakeover bool
}

var (
	deflateOffer  = regexp.MustCompile(`permessage-deflate([^,]+)?`)
	deflateParams = regexp.MustCompile(`^(?:;\s*(?:(server_no_context_takeover)|(client_no_context_takeover)|` +
		`(server_max_window_bits(?:=(\d+))?)|(client_max_window_bits(?:=(\d+))?)))*$`)
)

// parseExtension takes the first offer that aiohttp would take.
func parseExtension(header string) extension {
	for _, offer := range deflateOffer.FindAllStringSubmatch(header, -1) {
		if offer[1] == "" {
			return extension{bits: 15}
		}
		params := deflateParams.FindStringSubmatch(offer[1])
		if params == nil {
			continue
		}
		ext := extension{bits: 15, noTakeover: params[1] != ""}
		if params[4] != "" {
			bits, err := strconv.Atoi(params[4])
			if err != nil || bits > 15 || bits < 9 {
				continue
			}
			ext.bits = bits
		}
		return ext
	}
	return extension{}
}

func (x extension) String() string {
	text := "permessage-deflate"
	if x.bits < 15 {
		text += "; server_max_window_bits=" + strconv.Itoa(x.bits)
	}
	if x.noTakeover {
		text += "; server_no_context_takeover"
	}
	return text
}

// deflater compresses messages, each with the ones before as its dictionary unless the client asked for no takeover.
type deflater struct {
	buf        bytes.Buffer
	w          *flate.Writer
	noTakeover bool
}

func newDeflater(ext extension) *deflater {
	level := flate.DefaultCompression
	if ext.bits < 15 {
		// compress/flate always looks 32 KB back; without matches any window will do.
		level = flate.HuffmanOnly
	}
	d := &deflater{noTakeover: ext.noTakeover}
	d.w, _ = flate.NewWriter(&d.buf, level) // fails for unknown levels only
	return d
}

var syncTail = []byte{0, 0, 0xff, 0xff}

func (d *deflater) compress(payload []byte) ([]byte, error) {
	d.buf.Reset()
	if d.noTakeover {
		d.w.Reset(&d.buf)
	}
	if _, err := d.w.Write(payload); err != nil {
		return nil, err
	}
	if err := d.w.Flush(); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(d.buf.Bytes(), syncTail), nil
}

// inflater expands messages of a client, which may always refer to its messages before: the server confirms no limit.
type inflater struct {
	window []byte
}

func (i *inflater) expand(payload []byte) ([]byte, error) {
	tail := []byte{0, 0, 0xff, 0xff, 1, 0, 0, 0xff, 0xff}
	r := flate.NewReaderDict(io.MultiReader(bytes.NewReader(payload), bytes.NewReader(tail)), i.window)
	out, err := io.ReadAll(io.LimitReader(r, maxClientMessage+1))
	if err != nil {
		return nil, &wsError{closeProtocol, "bad compressed data"}
	}
	if len(out) > maxClientMessage {
		return nil, &wsError{closeTooBig, "message exceeds the limit"}
	}
	i.window = append(i.window, out...)
	if extra := len(i.window) - 32<<10; extra > 0 {
		i.window = append([]byte(nil), i.window[extra:]...)
	}
	return out, nil
}

// handshake judges an upgrade request as aiohttp does: a refusal is a 400 with a text.
func handshake(r *http.Request) (header string, ext extension, refusal string) {
	get := func(name string) string {
		if values := r.Header.Values(name); len(values) > 0 {
			return values[0]
		}
		return "None"
	}
	if upgrade := get("Upgrade"); !strings.EqualFold(strings.TrimSpace(upgrade), "websocket") {
		return "", ext, "No WebSocket UPGRADE hdr: " + upgrade + "\n Can \"Upgrade\" only to \"WebSocket\"."
	}
	if connection := get("Connection"); !strings.Contains(strings.ToLower(connection), "upgrade") {
		return "", ext, "No CONNECTION upgrade hdr: " + connection
	}
	if v := r.Header.Get("Sec-WebSocket-Version"); v != "13" && v != "8" && v != "7" {
		return "", ext, "Unsupported version: " + v
	}
	key := get("Sec-WebSocket-Key")
	if raw, err := base64.StdEncoding.DecodeString(key); err != nil || len(raw) != 16 {
		if len(r.Header.Values("Sec-WebSocket-Key")) > 0 {
			key = pyRepr(key)
		}
		return "", ext, "Handshake error: " + key
	}
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // RFC 6455
	header = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: " +
		base64.StdEncoding.EncodeToString(sum[:]) + "\r\n"
	if ext = parseExtension(strings.Join(r.Header.Values("Sec-WebSocket-Extensions"), ", ")); ext.bits != 0 {
		header += "Sec-WebSocket-Extensions: " + ext.String() + "\r\n"
	}
	return header + "\r\n", ext, ""
}
