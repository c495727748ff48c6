package comfyuitest

import (
	"bufio"
	"bytes"
	"compress/flate"
	"encoding/binary"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

func TestExtensionOffers(t *testing.T) {
	t.Parallel()
	for offer, want := range map[string]string{
		"":                   "",
		"x-unknown":          "",
		"permessage-deflate": "permessage-deflate",
		"permessage-deflate; server_no_context_takeover; client_no_context_takeover":          "permessage-deflate; server_no_context_takeover",
		"permessage-deflate; client_no_context_takeover":                                      "permessage-deflate",
		"permessage-deflate; client_max_window_bits":                                          "permessage-deflate",
		"permessage-deflate; client_max_window_bits=10; server_max_window_bits=11":            "permessage-deflate; server_max_window_bits=11",
		"permessage-deflate; server_max_window_bits=8":                                        "",
		"permessage-deflate; server_max_window_bits=8, permessage-deflate":                    "permessage-deflate",
		"permessage-deflate; server_max_window_bits=16":                                       "",
		"permessage-deflate; unknown":                                                         "",
		"x-unknown, permessage-deflate; server_max_window_bits=9; server_no_context_takeover": "permessage-deflate; server_max_window_bits=9; server_no_context_takeover",
	} {
		got := ""
		if ext := parseExtension(offer); ext.bits != 0 {
			got = ext.String()
		}
		require.Equal(t, want, got, offer)
	}
}

// rawSocket is a client that does by hand what libraries do not.
type rawSocket struct {
	io.ReadWriteCloser
	*bufio.Reader
	header http.Header
}

func dialRaw(t *testing.T, p *Pod, header string) *rawSocket {
	t.Helper()
	conn, err := p.DialContext(t.Context(), "", "")
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	_, err = io.WriteString(conn, "GET /ws?clientId=raw HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"+header+"\r\n")
	require.NoError(t, err)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusSwitchingProtocols, resp.StatusCode)
	require.Equal(t, "ICX+Yqv66kxgM0FcWaLWlFLwTAI=", resp.Header.Get("Sec-WebSocket-Accept"))
	return &rawSocket{conn, r, resp.Header}
}

func (s *rawSocket) frame(t *testing.T) (first byte, payload []byte) {
	t.Helper()
	var head [2]byte
	_, err := io.ReadFull(s.Reader, head[:])
	require.NoError(t, err)
	size := int(head[1])
	if size == 126 {
		var length [2]byte
		_, err := io.ReadFull(s.Reader, length[:])
		require.NoError(t, err)
		size = int(binary.BigEndian.Uint16(length[:]))
	}
	payload = make([]byte, size)
	_, err = io.ReadFull(s.Reader, payload)
	require.NoError(t, err)
	return head[0], payload
}

// masked is a client's frame with a mask of zeros.
func masked(first byte, payload []byte) []byte {
	frame := appendFrameHeader(nil, 0, len(payload))
	frame[0] = first
	frame[1] |= 0x80
	return append(append(frame, 0, 0, 0, 0), payload...)
}

func TestCompression(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, offer string
		takeover    bool
	}{
		{"with takeover", "permessage-deflate", true},
		{"without", "permessage-deflate; server_no_context_takeover", false},
		{"with a small window", "permessage-deflate; server_max_window_bits=9", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dialRaw(t, p, "Sec-WebSocket-Extensions: "+c.offer+"\r\n")
				require.Equal(t, c.offer, s.header.Get("Sec-WebSocket-Extensions"))
				var window []byte
				next := func() string {
					first, payload := s.frame(t)
					require.Equal(t, byte(0x80|0x40|opText), first)
					if !c.takeover {
						window = nil
					}
					r := flate.NewReaderDict(io.MultiReader(bytes.NewReader(payload), bytes.NewReader(syncTail)), window)
					out, err := io.ReadAll(r)
					require.ErrorIs(t, err, io.ErrUnexpectedEOF, "a message ends with a flush, not with the stream")
					window = append(window, out...)
					return string(out)
				}
				require.Contains(t, next(), `"type": "status"`)
				for n := range 3 {
					p.SendText("raw", []byte(strings.Repeat("again and again ", 50+n)))
					require.Equal(t, strings.Repeat("again and again ", 50+n), next())
				}
				// The client's messages are compressed too, with its earlier ones as their dictionary.
				d := newDeflater(extension{bits: 15})
				for _, text := range []string{`not json`, `[1]`, `{"type": "feature_flags", "data": {}}`} {
					payload, err := d.compress([]byte(text))
					require.NoError(t, err)
					_, err = s.Write(masked(0x80|0x40|opText, payload))
					require.NoError(t, err)
				}
				require.Contains(t, next(), `"type": "feature_flags"`)
			})
		})
	}

	// gorilla offers no_context_takeover for both sides and takes nothing less.
	t.Run("gorilla", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, p *Pod) {
			d := websocket.Dialer{NetDialContext: p.DialContext, EnableCompression: true}
			_, _, err := d.DialContext(t.Context(), "ws"+strings.TrimPrefix(p.URL(), "http")+"/ws", nil) //nolint:bodyclose // an upgrade has none
			require.Error(t, err)
		})
	})
}

func TestProtocolErrors(t *testing.T) {
	t.Parallel()
	big := bytes.Repeat([]byte("x"), 3<<20)
	for _, c := range []struct {
		name  string
		bytes []byte
		code  int
	}{
		{"no mask", appendFrameHeader(nil, opText, 0), closeProtocol},
		{"reserved bits", masked(0x80|0x20|opText, nil), closeProtocol},
		{"compressed without agreement", masked(0x80|0x40|opText, nil), closeProtocol},
		{"unknown opcode", masked(0x80|3, nil), closeProtocol},
		{"long ping", masked(0x80|opPing, make([]byte, 126)), closeProtocol},
		{"fragmented ping", masked(opPing, nil), closeProtocol},
		{"continuation of nothing", masked(0x80|opContinuation, nil), closeProtocol},
		{"message inside a message", append(masked(opText, nil), masked(0x80|opText, nil)...), closeProtocol},
		{"text that is no UTF-8", masked(0x80|opText, []byte("\xff")), closeNoText},
		{"too big", masked(0x80|opText, make([]byte, maxClientMessage+1))[:14], closeTooBig},
		{"too big in parts", append(masked(opText, big), masked(0x80|opContinuation, big)...), closeTooBig},
		{"close frame", masked(0x80|opClose, []byte{3, 232}), closeNormal},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dialRaw(t, p, "")
				s.frame(t)
				_, _ = s.Write(c.bytes) // the server may have left before the end
				first, payload := s.frame(t)
				require.Equal(t, byte(0x80|opClose), first)
				require.Equal(t, c.code, int(binary.BigEndian.Uint16(payload)))
				_, err := s.ReadByte()
				require.Error(t, err)
				synctest.Wait()
				require.Zero(t, p.Streams())
			})
		})
	}
}

func TestFragmentsAndPings(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dialRaw(t, p, "")
		s.frame(t)
		for _, frame := range [][]byte{
			masked(0x80|opPing, []byte("hey")), masked(0x80|opPong, nil),
			masked(opText, []byte(`{"type": "feature`)), masked(0x80|opPing, nil), masked(0x80|opContinuation, []byte(`_flags"}`)),
		} {
			_, err := s.Write(frame)
			require.NoError(t, err)
		}
		first, payload := s.frame(t)
		require.Equal(t, byte(0x80|opPong), first)
		require.Equal(t, "hey", string(payload))
		first, _ = s.frame(t)
		require.Equal(t, byte(0x80|opPong), first)
		_, payload = s.frame(t)
		require.Contains(t, string(payload), "feature_flags")
	})
}

func TestHandshakeRefusals(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		upgrade := http.Header{
			"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"AAAAAAAAAAAAAAAAAAAAAA=="},
		}
		for _, c := range []struct {
			change map[string]string
			status int
			body   string
		}{
			{map[string]string{"Upgrade": ""}, 400, "No WebSocket UPGRADE hdr: None\n Can \"Upgrade\" only to \"WebSocket\"."},
			{map[string]string{"Upgrade": "h2c"}, 400, "No WebSocket UPGRADE hdr: h2c\n Can \"Upgrade\" only to \"WebSocket\"."},
			{map[string]string{"Connection": "keep-alive"}, 400, "No CONNECTION upgrade hdr: keep-alive"},
			{map[string]string{"Sec-Websocket-Version": ""}, 400, "Unsupported version: "},
			{map[string]string{"Sec-Websocket-Key": "short"}, 400, "Handshake error: 'short'"},
			{map[string]string{"Origin": "http://example.com"}, 403, ""},
		} {
			header := upgrade.Clone()
			for name, value := range c.change {
				if header.Set(name, value); value == "" {
					header.Del(name)
				}
			}
			r, err := send(p, http.MethodGet, "/ws", "", header)
			require.NoError(t, err)
			require.Equal(t, c.status, r.status)
			require.Equal(t, c.body, string(r.body))
		}
		require.Zero(t, p.Streams())
	})
}

// FuzzClientFrames: whatever a client sends, the server reads it in bounded memory and never panics.
func FuzzClientFrames(f *testing.F) {
	f.Add(masked(0x80|opText, []byte(`{"type": "feature_flags"}`)), false)
	f.Add(append(masked(opText, []byte("a")), masked(0x80|opContinuation, []byte("b"))...), false)
	f.Add(masked(0x80|0x40|opText, []byte{0xaa, 0x56, 0x4a}), true)
	f.Add([]byte{0x81, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, false)
	f.Fuzz(func(t *testing.T, data []byte, compressed bool) {
		ext := extension{}
		if compressed {
			ext.bits = 15
		}
		c := newWSConn(nil, bufio.NewReader(bytes.NewReader(data)), ext)
		for {
			op, payload, err := c.read()
			if err != nil {
				return
			}
			require.LessOrEqual(t, len(payload), maxClientMessage)
			require.Contains(t, []byte{opText, opBinary, opClose, opPing, opPong}, op)
		}
	})
}

// FuzzExtension: what is confirmed is something that the client can do.
func FuzzExtension(f *testing.F) {
	f.Add("permessage-deflate; client_max_window_bits; server_max_window_bits=10")
	f.Add("permessage-deflate; server_no_context_takeover, permessage-deflate")
	f.Fuzz(func(t *testing.T, header string) {
		ext := parseExtension(header)
		require.True(t, ext.bits == 0 || 9 <= ext.bits && ext.bits <= 15)
		if ext.noTakeover {
			require.Contains(t, header, "server_no_context_takeover")
		}
	})
}
