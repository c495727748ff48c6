package wire

import (
	"encoding/json"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestText(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, frame string
		want        Message
	}{
		{
			"progress", `{"type": "progress", "data": {"value": 7, "max": 20, "prompt_id": "p", "node": "3"}}`,
			Message{Type: Progress, PromptID: "p", Node: "3", Value: 7, Max: 20},
		},
		{
			"progress with numbers that are none", `{"type": "progress", "data": {"value": NaN, "max": Infinity, "prompt_id": null, "node": 3}}`,
			Message{Type: Progress, Node: "3", Max: math.MaxFloat64},
		},
		{
			"data before type", `{"data": {"value": 7, "prompt_id": "p"}, "type": "progress"}`,
			Message{Type: Progress, PromptID: "p", Value: 7},
		},
		{
			"type twice", `{"type": "executing", "data": {"value": 7, "node": null}, "type": "progress"}`,
			Message{Type: Progress, Value: 7},
		},
		{
			"data twice", `{"type": "progress", "data": {"value": 7, "prompt_id": "p"}, "data": {"max": 9}}`,
			Message{Type: Progress, Max: 9},
		},
		{"no type", `{"data": [1, NaN]}`, Message{Raw: json.RawMessage(`[1, null]`)}},
		{"type is no string", `{"type": 3, "data": "x"}`, Message{Raw: json.RawMessage(`"x"`)}},
		{"nothing", ` {} `, Message{}},
		{"unknown with prompt id", `{"type": "a.b", "data": {"prompt_id": "p"}}`, Message{Name: "a.b", PromptID: "p", Raw: json.RawMessage(`{"prompt_id": "p"}`)}},
		{"unknown without data", `{"type": "a.b"}`, Message{Name: "a.b"}},
		{"unknown with null", `{"type": "a.b", "data": null}`, Message{Name: "a.b", Raw: json.RawMessage(`null`)}},
		{"named like no type", `{"type": "other"}`, Message{Name: "other"}},
		{"features", `{"type": "feature_flags", "data": {"max_upload_size": 1048576.0}}`, Message{Type: FeatureFlags, Raw: json.RawMessage(`{"max_upload_size": 1048576.0}`)}},
		{"end of a prompt", `{"type": "executing", "data": {"node": null, "prompt_id": "p"}}`, Message{Type: Executing, PromptID: "p", NodeNull: true}},
		{"executing without node", `{"type": "executing", "data": {"prompt_id": "p"}}`, Message{Type: Executing, PromptID: "p"}},
		{"executing on reconnect", `{"type": "executing", "data": {"node": "57"}}`, Message{Type: Executing, Node: "57"}},
		{"data of another type", `{"type": "executing", "data": [null]}`, Message{Type: Executing}},
		{"output null", `{"type": "executed", "data": {"node": "1", "output": null}}`, Message{Type: Executed, Node: "1"}},
		{"output -Infinity", `{"type": "executed", "data": {"node": "1", "output": -Infinity}}`, Message{Type: Executed, Node: "1"}},
		{
			"output with NaN", `{"type": "executed", "data": {"output": {"NaN": [NaN, "NaN"]}, "node": "1"}}`,
			Message{Type: Executed, Node: "1", Output: json.RawMessage(`{"NaN": [null, "NaN"]}`)},
		},
		{
			"NaN within what is decoded later", `{"data": {"output": ["NaN"], "z": Infinity}, "type": "executed", "x": NaN}`,
			Message{Type: Executed, Output: json.RawMessage(`["NaN"]`)},
		},
		{
			"NaN beside a clean output", `{"type": "executed", "data": {"x": NaN, "output": {"text": ["NaN"]}, "y": Infinity}}`,
			Message{Type: Executed, Output: json.RawMessage(`{"text": ["NaN"]}`)},
		},
		{
			"cached", `{"type": "execution_cached", "data": {"nodes": ["1", 2, null, ["3"], NaN, -Infinity, ""], "prompt_id": "p", "timestamp": 1795489290219}}`,
			Message{Type: ExecutionCached, PromptID: "p", Cached: []string{"1", "2", ""}, Timestamp: 1795489290219},
		},
		{
			"blocked", `{"type": "execution_error", "data": {"prompt_id": "p", "node_id": "3", "node_type": "PreviewImage", "executed": ["2"], ` +
				`"exception_message": "Execution Blocked: no", "exception_type": "ExecutionBlocked", "traceback": [], "current_inputs": [NaN]}}`,
			Message{Type: ExecutionError, PromptID: "p", Node: "3", Failure: &Failure{
				NodeID: "3", NodeType: "PreviewImage", ExceptionType: "ExecutionBlocked", Message: "Execution Blocked: no", Executed: []string{"2"},
			}},
		},
		{"error without data", `{"type": "execution_error"}`, Message{Type: ExecutionError, Failure: &Failure{}}},
		{"error with null", `{"type": "execution_interrupted", "data": null}`, Message{Type: ExecutionInterrupted, Failure: &Failure{}}},
		{
			"traceback is one text", `{"type": "execution_error", "data": {"traceback": "line\n", "exception_message": "\ud83d\udca5\ud83d"}}`,
			Message{Type: ExecutionError, Failure: &Failure{Traceback: []string{"line\n"}, Message: "💥\uFFFD"}},
		},
		{
			"nodes", `{"type": "progress_state", "data": {"nodes": {"9": {"value": 1, "max": 2.5, "state": "pending", "display_node_id": "57", ` +
				`"parent_node_id": "57.0", "real_node_id": "9"}, "1": {}, "x": null}}}`,
			Message{Type: ProgressState, Nodes: []NodeState{{ID: "9", Display: "57", Parent: "57.0", Real: "9", Value: 1, Max: 2.5, State: "pending"}, {ID: "1"}, {ID: "x"}}},
		},
		{
			"a node twice", `{"type": "progress_state", "data": {"nodes": {"1": {"value": 1, "max": 3}, "2": {}, "1": {"value": 2}, "3": {}}}}`,
			Message{Type: ProgressState, Nodes: []NodeState{{ID: "1", Value: 2}, {ID: "2"}, {ID: "3"}}},
		},
		{"nodes twice", `{"type": "progress_state", "data": {"nodes": {"1": {}}, "nodes": []}}`, Message{Type: ProgressState}},
		{"text that is no UTF-8", "{\"type\": \"executing\", \"data\": {\"node\": \"a\xffb\"}}", Message{Type: Executing, Node: "a\uFFFDb"}},
		{"keys with escapes", `{"\u0074ype": "progress", "dat\u0061": {"v\u0061lue": 1}}`, Message{Type: Progress, Value: 1}},
		{"keys of another case", `{"Type": "progress", "DATA": {"value": 1}}`, Message{}},
		{"prompt id is a number", `{"type": "execution_start", "data": {"prompt_id": 12, "timestamp": 1.5e3}}`, Message{Type: ExecutionStart, PromptID: "12", Timestamp: 1500}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.want.Type != Other {
				c.want.Name = c.want.Type.String()
			}
			c.want.Remaining = -1
			frame := []byte(c.frame)
			m, err := NewDecoder().Text(frame)
			require.NoError(t, err)
			clear(frame) // as the next frame does
			assert.Equal(t, c.want, m)
			checkText(t, NewDecoder(), []byte(c.frame))
		})
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	for frame, want := range map[string]Message{
		`{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 3}}, "sid": "s"}}`:                        {Remaining: 3, SID: "s"},
		`{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}}}`:                                    {},
		`{"type": "status", "data": {"status": {"exec_info": {}}}}`:                                                        {Remaining: -1},
		`{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": null}}}}`:                                 {Remaining: -1},
		`{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 2}, "exec_info": 1}}}`:                    {Remaining: -1},
		`{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 2}}, "status": null}}`:                    {Remaining: -1},
		`{"type": "status", "data": {"status": null}}`:                                                                     {Remaining: -1},
		`{"type": "status", "data": null}`:                                                                                 {Remaining: -1},
		`{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 99999999999999999999}}}}`:                 {Remaining: math.MaxInt},
		`{"type": "status", "data": {"sid": "s", "status": {"exec_info": {"queue_remaining": 4, "queue_remaining": -1}}}}`: {Remaining: -1, SID: "s"},
	} {
		want.Type, want.Name = Status, "status"
		m, err := NewDecoder().Text([]byte(frame))
		require.NoError(t, err, frame)
		assert.Equal(t, want, m, frame)
	}
}

func TestTextMalformed(t *testing.T) {
	t.Parallel()
	for _, frame := range []string{
		"", " ", "null", "1", `"x"`, "[]", `[{"type": "status"}]`, "{", "}", `{"type"}`, `{"type":}`, `{"type": "x",}`, `{"type": "x"}}`, `{"type": "x"} x`,
		`{"type": 'x'}`, `{type: "x"}`, `{"type": "x" "data": 1}`, `{"data": [1 2]}`, `{"data": [1,]}`, `{"data": {"a": 1]}`, `{"data": [}`, `{"data": {]}`,
		`{"data": 01}`, `{"data": 1.}`, `{"data": -}`, `{"data": nan}`, `{"data": -NaN}`, `{"data": Infinit}`, `{"data": undefined}`, `{"data": "\x"}`, "{\"data\": \"\n\"}",
		`{"type": "execution_cached", "data": {"nodes": ["1"}}}`, `{"type": "execution_cached", "data": {"nodes": ["1"}]}`, `{"type": "execution_cached", "data": {"nodes": [}}`,
		`{"type": "progress", "data": {"value": 1]`, `{"type": "progress", "data": {]}`, `{"type": "progress", "data": {"value": 1,}}`, `{"type": "execution_cached", "data": {"nodes": [,]}}`,
		`{"type": "execution_cached", "data": {"nodes": ["1" "2"]}}`, `{"type": "execution_cached", "data": {"nodes": ["1",]}}`,
		"\xef\xbb\xbf{}", "{}\x00", "not json", "<html>",
	} {
		m, err := NewDecoder().Text([]byte(frame))
		require.ErrorIs(t, err, ErrMalformed, frame)
		assert.Equal(t, Message{}, m, frame)
		typ, promptID, ok := NewDecoder().Peek([]byte(frame))
		assert.False(t, ok, frame)
		assert.Equal(t, Other, typ)
		assert.Nil(t, promptID)
	}
}

// TestTruncated cuts frames of every type at every byte.
func TestTruncated(t *testing.T) {
	t.Parallel()
	d := NewDecoder()
	seen := map[string]bool{}
	recorded(t, func(t testing.TB, file string, l *line) {
		if l.Kind != "ws" || l.Text == nil || len(*l.Text) > 4<<10 {
			return
		}
		frame := []byte(*l.Text)
		m, err := d.Text(frame)
		require.NoError(t, err)
		if seen[m.Name] {
			return
		}
		seen[m.Name] = true
		for i := range frame {
			_, err := d.Text(frame[:i])
			require.ErrorIs(t, err, ErrMalformed, "%s: %s", file, frame[:i])
			_, _, ok := d.Peek(frame[:i])
			require.False(t, ok, "%s: %s", file, frame[:i])
		}
	})
	assert.GreaterOrEqual(t, len(seen), int(ExecutionInterrupted))
}

// TestMessagesOutliveTheirFrame: the stream reads every frame into one buffer.
func TestMessagesOutliveTheirFrame(t *testing.T) {
	t.Parallel()
	d, fresh := NewDecoder(), NewDecoder()
	var got, want []Message
	recorded(t, func(t testing.TB, _ string, l *line) {
		if l.Kind != "ws" || l.Text == nil || len(got) > 2000 {
			return
		}
		frame := []byte(*l.Text)
		m, err := d.Text(frame)
		require.NoError(t, err)
		clear(frame)
		got = append(got, m)
		m, err = fresh.Text([]byte(*l.Text))
		require.NoError(t, err)
		want = append(want, m)
	})
	assert.Equal(t, want, got)
	assert.Nil(t, d.s.b, "the decoder holds on to the frame")
}

func TestPeekOfEscapedIDs(t *testing.T) {
	t.Parallel()
	d := NewDecoder()
	frame := []byte(`{"data": {"prompt_id": "\u0061b", "x\u0079": "\u0063\u0064"}, "typ\u0065": "ex\u0065cuting", "\u007a": "\u007a\u007a"}`)
	typ, promptID, ok := d.Peek(frame)
	require.True(t, ok)
	assert.Equal(t, Executing, typ)
	assert.Equal(t, "ab", string(promptID))
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	for frame, want := range map[string]bool{
		`{"type": "execution_success"}`:                                                  true,
		`{"type": "execution_interrupted"}`:                                              true,
		`{"type": "execution_error"}`:                                                    true,
		`{"type": "execution_error", "data": {"exception_type": "RuntimeError"}}`:        true,
		`{"type": "execution_error", "data": {"exception_type": "ExecutionBlocked"}}`:    false,
		`{"type": "executing", "data": {"node": null, "prompt_id": "p"}}`:                false,
		`{"type": "executed", "data": {"exception_type": "x"}}`:                          false,
		`{"type": "execution_success.custom", "data": {"exception_type": "ValueError"}}`: false,
	} {
		m, err := NewDecoder().Text([]byte(frame))
		require.NoError(t, err)
		assert.Equal(t, want, m.Terminal(), frame)
	}
}

func TestSanitize(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		``:                                 ``,
		`NaN`:                              `null`,
		`[NaN, Infinity,-Infinity ,"NaN"]`: `[null, null,null ,"NaN"]`,
		`{"NaN": "a\"NaN", "b\\": NaN}`:    `{"NaN": "a\"NaN", "b\\": null}`,
		`{"a": "Infinity}`:                 `{"a": "Infinity}`,
		`[-NaN, 1Infinity, Nan, N, I, -]`:  `[-null, 1null, Nan, N, I, -]`,
		"[\"ü\xff NaN\", NaN]":             "[\"ü\xff NaN\", null]",
		`"\u004eaN"`:                       `"\u004eaN"`,
	} {
		assert.Equal(t, want, string(Sanitize([]byte(in))), in)
	}
	clean := []byte(`{"a": "NaN and Infinity"}`)
	assert.Same(t, &clean[0], &Sanitize(clean)[0], "a document without NaN is not copied")
}

func TestAllocations(t *testing.T) {
	d := NewDecoder()
	want := map[string]float64{"progress_state/320B": 1, "progress_state/30nodes": 1, "executed": 1}
	for _, f := range benchFrames() {
		assert.InDelta(t, want[f.name], testing.AllocsPerRun(100, func() {
			if _, err := d.Text(f.frame); err != nil {
				t.Error(err)
			}
		}), 0, f.name)
		assert.Zero(t, testing.AllocsPerRun(100, func() {
			if _, _, ok := d.Peek(f.frame); !ok {
				t.Error("not ok")
			}
		}), f.name)
	}
	escaped := []byte(`{"type": "x", "data": {"prompt_id": "\u0061\u0062"}}`)
	assert.Zero(t, testing.AllocsPerRun(100, func() { d.Peek(escaped) }))
}
