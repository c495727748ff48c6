package comfyuitest

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// bubble runs a test on a pod over pipes, where time is fake and a goroutine that is left behind fails the test.
func bubble(t *testing.T, f func(t *testing.T, p *Pod), opts ...Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f(t, Start(t, append([]Option{WithPipes()}, opts...)...))
	})
}

// gated is a bubble with a class Gate, whose channels have to be made inside.
func gated(t *testing.T, ticks bool, f func(t *testing.T, p *Pod, g *gate), opts ...Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g := newGate(ticks)
		f(t, Start(t, append([]Option{WithPipes(), WithNode("Gate", g.node())}, opts...)...), g)
	})
}

// gate is a node that waits until it is let through, without ever looking at ctx, and then ticks if it is told to.
type gate struct {
	entered chan struct{}
	pass    chan struct{}
	ticks   bool
}

func newGate(ticks bool) *gate {
	return &gate{entered: make(chan struct{}, 16), pass: make(chan struct{}), ticks: ticks}
}

func (g *gate) node() Node {
	return Node{Output: true, Run: func(ctx context.Context, c *Call) error {
		g.entered <- struct{}{}
		select {
		case <-g.pass:
		case <-c.life.Done():
			return ctx.Err()
		}
		if g.ticks {
			c.Progress(1, 1)
		}
		return nil
	}}
}

func TestSecondSocketOfAClientTakesOver(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		old := dial(t, p, "me")
		old.until("status")
		fresh := dial(t, p, "me")
		fresh.until("status")
		require.Equal(t, 2, p.Streams(), "a displaced socket is not closed")

		queue1(t, p, graphOf("1", "Work", nil), "me")
		fresh.job()
		require.Empty(t, old.pending())

		// A displaced socket's feature flags are answered on the socket that hears.
		old.write(`{"type": "feature_flags", "data": {}}`)
		fresh.until("feature_flags")

		old.close()
		synctest.Wait()
		queue1(t, p, graphOf("1", "Work", object{{"n", 2}}), "me")
		require.NoError(t, p.WaitIdle(t.Context()))
		synctest.Wait()
		require.Empty(t, fresh.pending(), "the old handler's cleanup removed the new socket: no status either")
		require.Equal(t, 1, p.Streams())
		fresh.write(`{"type": "feature_flags", "data": {}}`)
		require.NoError(t, fresh.conn.WriteControl(websocket.PingMessage, nil, time.Time{}))
		<-fresh.pongs
		require.Empty(t, fresh.pending(), "a deaf socket gets pongs and nothing else")

		third := dial(t, p, "me")
		third.until("status")
		queue1(t, p, graphOf("1", "Work", object{{"n", 3}}), "me")
		third.job()
	}, WithNode("Work", Node{Output: true}))
}

func TestReconnectAtOnceIsDeaf(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		leave func(s *socket)
		pause time.Duration
		deaf  bool
	}{
		{"cut and back at once", (*socket).abort, 0, true},
		{"cut and back later", (*socket).abort, 5 * time.Millisecond, false},
		{"closed and back at once", (*socket).close, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				old := dial(t, p, "me")
				old.until("status")
				c.leave(old)
				time.Sleep(c.pause)
				back := dial(t, p, "me")
				back.until("status")
				time.Sleep(time.Second)
				queue1(t, p, graphOf("1", "Work", nil), "me")
				require.NoError(t, p.WaitIdle(t.Context()))
				synctest.Wait()
				require.Equal(t, c.deaf, len(back.pending()) == 0)
				require.Equal(t, 1, p.Streams())
			}, WithNode("Work", Node{Output: true}))
		})
	}
}

func TestConnectFramesAreOutsideTheQueue(t *testing.T) {
	t.Parallel()
	gated(t, false, func(t *testing.T, p *Pod, g *gate) {
		queue1(t, p, graphOf("5", "Gate", nil), "me")
		<-g.entered
		synctest.Wait()
		s := dial(t, p, "me")
		require.Equal(t, `{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 1}}, "sid": "me"}}`, string(s.next().data))
		require.Equal(t, `{"type": "executing", "data": {"node": "5"}}`, string(s.next().data), "without a prompt id")
		other := dial(t, p, "other")
		other.until("status")
		synctest.Wait()
		require.Empty(t, other.pending())
		g.pass <- struct{}{}
		require.Equal(t, "status", other.next().event(), "a bystander of a job with a client hears status only")
		synctest.Wait()
		require.Empty(t, other.pending())
		s.until("execution_success")
		synctest.Wait()
		after := dial(t, p, "me")
		after.until("status")
		synctest.Wait()
		require.Empty(t, after.pending(), "nothing is replayed after the end")
	})
}

func TestNoClientParam(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "")
		sid, _ := s.next().data0(t).get("sid")
		require.Len(t, sid, 32)
		queue1(t, p, graphOf("1", "Work", nil), sid.(string))
		s.job()
	}, WithNode("Work", Node{Output: true}))
}

func TestFeatureFlags(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, version string
		frames        []string
		answered      bool
	}{
		{"first", "0.27.0", []string{`{"type": "feature_flags", "data": {}}`}, true},
		{"without data", "0.27.0", []string{`{"type": "feature_flags"}`}, true},
		{"after no JSON", "0.27.0", []string{`hello`, `{"type": "feature_flags", "data": {}}`}, true},
		{"after a list", "0.27.0", []string{`[1]`, `{"type": "feature_flags", "data": {}}`}, true},
		{"after an object", "0.27.0", []string{`{}`, `{"type": "feature_flags", "data": {}}`}, false},
		{"twice", "0.27.0", []string{`{"type": "feature_flags", "data": {}}`, `{"type": "feature_flags", "data": {}}`}, true},
		{"before there were any", "0.3.44", []string{`{"type": "feature_flags", "data": {}}`}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				s.until("status")
				for _, frame := range c.frames {
					s.write(frame)
				}
				synctest.Wait()
				want := []string{}
				if c.answered {
					want = []string{"feature_flags"}
				}
				require.Equal(t, want, s.pending())
			}, WithVersion(c.version))
		})
	}
}

func TestPreviewFrames(t *testing.T) {
	t.Parallel()
	image := []byte("picture")
	for _, c := range []struct {
		name, flags string
		node        func(c *Call)
		want        []string
	}{
		{
			"described, before the progress", `{"supports_preview_metadata": true}`, func(c *Call) { c.ProgressPreview(1, 2, "image/png", image) },
			[]string{"progress_state", "binary 4", "progress"},
		},
		{
			"plain, after the progress", `{}`, func(c *Call) { c.ProgressPreview(1, 2, "image/png", image) },
			[]string{"progress_state", "progress", "binary 1"},
		},
		{
			"a flag that is not true", `{"supports_preview_metadata": 1}`, func(c *Call) { c.ProgressPreview(1, 2, "image/jpeg", image) },
			[]string{"progress_state", "progress", "binary 1"},
		},
		{
			"on its own", `{}`, func(c *Call) { c.Progress(1, 2); c.Preview("image/jpeg", image) },
			[]string{"progress_state", "progress", "progress_state", "progress", "binary 1"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				s.write(`{"type": "feature_flags", "data": ` + c.flags + `}`)
				s.until("feature_flags")
				id := queue1(t, p, graphOf("7", "Work", nil), "me")
				frames := s.job()
				require.Equal(t, c.want, events(frames[4:len(frames)-3]))
				for _, f := range frames {
					switch f.event() {
					case "binary 1":
						require.Contains(t, []uint32{1, 2}, binary.BigEndian.Uint32(f.data[4:]))
						require.Equal(t, image, f.data[8:])
					case "binary 4":
						n := binary.BigEndian.Uint32(f.data[4:])
						require.JSONEq(t, `{"node_id": "7", "prompt_id": "`+id+`", "display_node_id": "7", "parent_node_id": null,
							"real_node_id": "7", "image_type": "image/png"}`, string(f.data[8:8+n]))
						require.Equal(t, image, f.data[8+n:])
					}
				}
			}, WithNode("Work", Node{Output: true, Run: func(_ context.Context, call *Call) error { c.node(call); return nil }}))
		})
	}
}

func TestTextProgressAndCustomFrames(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s, other := dial(t, p, "me"), dial(t, p, "other")
		queue1(t, p, graphOf("12", "Work", nil), "me")
		require.Equal(t, "\x00\x00\x00\x03\x00\x00\x00\x0212half", string(s.until("binary 3").data))
		require.Equal(t, `{"type": "mine", "data": [1, null]}`, string(s.until("mine").data))
		s.until("execution_success")
		queue1(t, p, graphOf("12", "Work", object{{"n", 2}}), "")
		other.until("binary 3")
		other.until("mine")
		p.SendText("me", []byte(`{"broken`))
		require.Equal(t, `{"broken`, string(s.until("malformed: unexpected end of JSON input").data))
		p.SendBinary("", []byte{0, 0, 0, 99, 1})
		require.Equal(t, []byte{0, 0, 0, 99, 1}, s.until("binary 99").data)
		other.until("binary 99")
	}, WithNode("Work", Node{Output: true, Run: func(_ context.Context, c *Call) error {
		c.Text("half")
		c.Send("mine", []any{1, nil})
		return nil
	}}))
}

func TestStalledClientStopsThePublishLoop(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		stalled, err := p.DialContext(t.Context(), "", "")
		require.NoError(t, err)
		_, err = stalled.Write([]byte("GET /ws?clientId=stalled HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"))
		require.NoError(t, err)
		bystander := dial(t, p, "bystander")
		bystander.until("status")
		queue1(t, p, graphOf("1", "Flood", nil), "stalled")
		require.NoError(t, p.WaitIdle(t.Context()), "jobs go on")
		synctest.Wait()

		late := dial(t, p, "late")
		late.until("status")
		id := queue1(t, p, graphOf("1", "Work", nil), "late")
		require.NoError(t, p.WaitIdle(t.Context()))
		require.Equal(t, "success", at(t, get(t, p, "/history/"+id), id, "status", "status_str"), "HTTP works")
		require.NoError(t, late.conn.WriteControl(websocket.PingMessage, nil, time.Time{}))
		<-late.pongs
		synctest.Wait()
		require.Empty(t, late.pending())

		require.NoError(t, stalled.Close())
		require.Len(t, late.job(), 7, "all comes when the stalled client goes, also to sockets that connected meanwhile")
		bystander.until("status")
	}, WithNode("Work", Node{Output: true}), WithNode("Flood", Node{Output: true, Run: func(_ context.Context, c *Call) error {
		c.Send("flood", strings.Repeat("x", 8_000_000))
		return nil
	}}))
}

// TestStalledClientHoldsUpNobodyElse: what it still sends is answered when it reads, but HTTP and other sockets' pings do not wait for it.
func TestStalledClientHoldsUpNobodyElse(t *testing.T) {
	t.Parallel()
	for name, frame := range map[string]func(conn *websocket.Conn) error{
		"ping": func(conn *websocket.Conn) error { return conn.WriteControl(websocket.PingMessage, nil, time.Time{}) },
		"feature flags": func(conn *websocket.Conn) error {
			return conn.WriteMessage(websocket.TextMessage, []byte(`{"type": "feature_flags"}`))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				dialer := websocket.Dialer{NetDialContext: p.DialContext}
				stalled, _, err := dialer.DialContext(t.Context(), "ws"+strings.TrimPrefix(p.URL(), "http")+"/ws?clientId=stalled", nil) //nolint:bodyclose // an upgrade has none
				require.NoError(t, err)
				queue1(t, p, graphOf("1", "Flood", nil), "stalled")
				require.NoError(t, p.WaitIdle(t.Context()))
				require.NoError(t, frame(stalled))
				synctest.Wait()

				other := dial(t, p, "other")
				require.NoError(t, other.conn.WriteControl(websocket.PingMessage, nil, time.Time{}))
				<-other.pongs
				require.Equal(t, http.StatusOK, do(t, p, http.MethodGet, "/prompt", "").status)
				require.NoError(t, stalled.Close())
			}, WithNode("Flood", Node{Output: true, Run: func(_ context.Context, c *Call) error {
				c.Send("flood", strings.Repeat("x", 8_000_000))
				return nil
			}}))
		})
	}
}

func TestFrozenLoop(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		s.until("status")
		queue1(t, p, graphOf("1", "Work", nil), "me")
		s.until("executing")
		thaw, again := p.Freeze(), p.Freeze()
		began := time.Now()
		require.NoError(t, s.conn.WriteControl(websocket.PingMessage, nil, time.Time{}))
		answered := make(chan time.Duration, 1)
		go func() {
			_, _ = try(p, http.MethodGet, "/prompt", "")
			answered <- time.Since(began)
		}()
		time.Sleep(time.Minute)
		require.Equal(t, 1, p.Prompts()[0].Ends, "nodes go on")
		again()
		again()
		synctest.Wait()
		require.Empty(t, s.pending())
		require.Empty(t, s.pongs)
		thaw()
		require.Equal(t, time.Minute, <-answered)
		<-s.pongs
		s.until("execution_success")
	}, WithNode("Work", Steps(2, time.Second)))
}

func TestCutStreams(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		mode CutMode
		opts []Option
	}{
		{"close", CutClose, nil}, {"reset", CutReset, nil}, {"black hole", CutBlackhole, nil}, {"deaf", CutDeaf, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				s.until("status")
				p.CutStreams(c.mode)
				ping := s.conn.WriteControl(websocket.PingMessage, nil, time.Time{})
				queue1(t, p, graphOf("1", "Work", nil), "me")
				require.NoError(t, p.WaitIdle(t.Context()))
				synctest.Wait()
				require.Empty(t, s.pending())
				switch c.mode {
				case CutClose:
					require.True(t, websocket.IsCloseError(s.end(), websocket.CloseNormalClosure), "%v", s.err)
					require.Zero(t, p.Streams())
				case CutReset:
					require.ErrorContains(t, s.end(), "connection reset")
					require.Zero(t, p.Streams())
				case CutBlackhole:
					require.NoError(t, ping)
					require.Empty(t, s.pongs)
					require.Equal(t, 1, p.Streams())
				case CutDeaf:
					require.NoError(t, ping)
					<-s.pongs
				}
				// Whoever dials again at once is heard.
				back := dial(t, p, "me")
				back.until("status")
				time.Sleep(time.Second)
				queue1(t, p, graphOf("1", "Work", object{{"n", 2}}), "me")
				back.job()
			}, WithNode("Work", Node{Output: true}))
		})
	}
}

func TestCutStreamsOverTCP(t *testing.T) {
	t.Parallel()
	p := Start(t)
	for _, mode := range []CutMode{CutClose, CutReset} {
		s := dial(t, p, "me")
		s.until("status")
		p.CutStreams(mode)
		err := s.end()
		require.Equal(t, mode == CutClose, websocket.IsCloseError(err, websocket.CloseNormalClosure), "%v", err)
	}
	require.Zero(t, p.Streams())
}

// TestStreamsFromTheHandshakeOn: a socket that a client has is counted, and can be cut.
func TestStreamsFromTheHandshakeOn(t *testing.T) {
	t.Parallel()
	p := Start(t)
	for range 500 {
		s := dial(t, p, "me")
		require.Equal(t, 1, p.Streams())
		p.CutStreams(CutReset)
		require.Zero(t, p.Streams())
		require.Error(t, s.end())
	}
}

func TestRefuseStreams(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		s.until("status")
		p.RefuseStreams(http.StatusForbidden)
		_, err := tryDial(t, p, "other")
		require.ErrorContains(t, err, "status 403")
		require.Equal(t, 1, p.Streams(), "open ones stay")
		require.Equal(t, 2, p.Requests("GET /ws"), "refused ones are counted")
		p.RefuseStreams(0)
		dial(t, p, "other").until("status")
	})
}

func TestNoClientID(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "bystander")
		s.until("status")
		queue1(t, p, graphOf("1", "Work", nil), "")
		require.NoError(t, p.WaitIdle(t.Context()))
		synctest.Wait()
		require.Equal(t, []string{"status", "status", "progress_state", "progress_state", "progress", "binary 1", "progress_state", "status"},
			s.pending(), "everyone hears of progress; nobody of start, nodes, outputs and success")
	}, WithNode("Work", Node{Output: true, Run: func(_ context.Context, c *Call) error {
		c.ProgressPreview(1, 1, "image/png", []byte("x"))
		c.Put("text", "done")
		return nil
	}}))
}

// TestProgressStateCrossesOver: until 0.3.58 everyone heard it, whoever the job's client was.
func TestProgressStateCrossesOver(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		version string
		heard   []string
	}{
		{"0.3.57", []string{"status", "status", "status", "progress_state", "progress_state", "progress_state", "status"}},
		{"0.3.58", []string{"status", "status", "status", "status"}},
	} {
		bubble(t, func(t *testing.T, p *Pod) {
			bystander := dial(t, p, "bystander")
			queue1(t, p, graphOf("1", "Work", nil), "me")
			require.NoError(t, p.WaitIdle(t.Context()))
			synctest.Wait()
			require.Equal(t, c.heard, bystander.pending(), c.version)
		}, WithVersion(c.version), WithNode("Work", Steps(1, 0)))
	}
}

func TestThrottledProgress(t *testing.T) {
	t.Parallel()
	work := Node{Output: true, Run: func(ctx context.Context, c *Call) error {
		for i := range 400 {
			wait(ctx, 5*time.Millisecond)
			c.Progress(float64(i+1), 400)
		}
		return nil
	}}
	for _, c := range []struct {
		version string
		frames  int
	}{{"0.3.64", 400}, {"0.9.1", 400}, {"0.9.2", 21}, {"0.33.0", 21}} {
		t.Run(c.version, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				s := dial(t, p, "me")
				queue1(t, p, graphOf("1", "Work", nil), "me")
				var steps []string
				for _, f := range s.job() {
					if f.event() == "progress" {
						value, _ := f.data0(t).get("value")
						steps = append(steps, string(pyJSON(value)))
					}
				}
				require.Len(t, steps, c.frames)
				require.Equal(t, "1", steps[0])
				require.Equal(t, "400", steps[len(steps)-1])
			}, WithVersion(c.version), WithNode("Work", work))
		})
	}
}

// TestNewBarIsNotThrottled: a node that goes through its steps again begins with a frame.
func TestNewBarIsNotThrottled(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		queue1(t, p, graphOf("1", "Work", nil), "me")
		var values []any
		for _, f := range s.job() {
			if f.event() == "progress" {
				value, _ := f.data0(t).get("value")
				values = append(values, value)
			}
		}
		require.Equal(t, []any{int64(1), int64(9), int64(1), int64(9)}, values)
	}, WithNode("Work", Node{Output: true, Run: func(_ context.Context, c *Call) error {
		for range 2 {
			for i := range 9 {
				c.Progress(float64(i+1), 9)
			}
		}
		return nil
	}}))
}

func TestProgressBeforeThereWasState(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		queue1(t, p, graphOf("1", "Work", nil), "me")
		frames := s.job()
		require.Equal(t, []string{
			"execution_start", "execution_cached", "executing", "progress", "executed", "execution_success", "executing",
		}, events(frames))
		queue1(t, p, graphOf("1", "Work", object{{"n", 2}}), "")
		var m struct{ Data struct{ Node *string } }
		require.NoError(t, json.Unmarshal(s.until("progress").data, &m))
		require.Nil(t, m.Data.Node, "a job without client has told nobody of a node")
	}, WithVersion("0.3.40"), WithNode("Work", Steps(1, 0)))
}
