package wire

import (
	"bufio"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// line is one line of a recording of a real server; see testdata/captures.
type line struct {
	Kind         string          `json:"kind"`
	Text         *string         `json:"text"`
	Binary       *string         `json:"binary"`
	BinaryPrefix *string         `json:"binary_prefix"`
	BinaryLength int             `json:"binary_length"`
	Method       string          `json:"method"`
	Path         string          `json:"path"`
	Status       int             `json:"status"`
	Body         json.RawMessage `json:"body"`
	BodyText     *string         `json:"body_text"`
	Cut          string          `json:"cut"`
}

// answer is the body of an HTTP answer; nil: none that is JSON.
func (l *line) answer() []byte {
	if l.BodyText != nil {
		return []byte(*l.BodyText)
	}
	return l.Body
}

// recorded calls each with every line of every recording.
func recorded(t testing.TB, each func(t testing.TB, file string, l *line)) {
	t.Helper()
	files, err := filepath.Glob("../../testdata/captures/*/*.jsonl")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		f, err := os.Open(file)
		require.NoError(t, err)
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 64<<20)
		for lines.Scan() {
			var l line
			require.NoError(t, json.Unmarshal(lines.Bytes(), &l), file)
			each(t, file, &l)
		}
		require.NoError(t, lines.Err(), file)
		require.NoError(t, f.Close())
	}
}

// object decodes JSON as the oracle does: encoding/json, after Sanitize.
func object(t testing.TB, b []byte) map[string]any {
	t.Helper()
	var v map[string]any
	require.NoError(t, json.Unmarshal(Sanitize(b), &v), "%s", b)
	return v
}

// in follows a path of keys; nil where it leads nowhere.
func in(v any, path ...string) any {
	for _, key := range path {
		object, _ := v.(map[string]any)
		v = object[key]
	}
	return v
}

func str(v any) string {
	s, _ := v.(string)
	return s
}

func num(v any) float64 {
	f, _ := v.(float64)
	return f
}

func strs(v any) (list []string) {
	values, _ := v.([]any)
	for _, v := range values {
		list = append(list, v.(string))
	}
	return list
}

func TestRecordedTextFrames(t *testing.T) {
	t.Parallel()
	d := NewDecoder()
	seen := map[Type]int{}
	recorded(t, func(t testing.TB, file string, l *line) {
		if l.Kind != "ws" || l.Text == nil {
			return
		}
		frame := []byte(*l.Text)
		m, err := d.Text(frame)
		require.NoError(t, err, "%s: %s", file, frame)
		seen[m.Type]++
		assertMessage(t, object(t, frame), m, file)

		peeked, promptID, ok := d.Peek(frame)
		assert.True(t, ok, file)
		assert.Equal(t, m.Type, peeked, file)
		assert.Equal(t, m.PromptID, string(promptID), file)
	})
	for typ := Other; typ <= ExecutionInterrupted; typ++ {
		assert.NotZero(t, seen[typ], "no recording has %s", typ)
	}
}

// assertMessage compares what was decoded with what encoding/json says of the same frame.
func assertMessage(t testing.TB, frame map[string]any, m Message, file string) {
	t.Helper()
	data := frame["data"]
	want := Message{Type: m.Type, Name: str(frame["type"]), PromptID: str(in(data, "prompt_id")), Remaining: -1}
	if m.Type != Other {
		assert.Equal(t, want.Name, m.Type.String(), file)
	}
	switch m.Type {
	case Other, FeatureFlags:
		raw, err := json.Marshal(data)
		require.NoError(t, err)
		assert.JSONEq(t, string(raw), string(m.Raw), file)
		want.Raw = m.Raw
	case Status:
		want.Remaining = int(num(in(data, "status", "exec_info", "queue_remaining")))
		want.SID = str(in(data, "sid"))
	case ExecutionStart, ExecutionSuccess:
		want.Timestamp = int64(num(in(data, "timestamp")))
	case ExecutionCached:
		want.Timestamp = int64(num(in(data, "timestamp")))
		want.Cached = strs(in(data, "nodes"))
	case Executing, Executed:
		node, present := data.(map[string]any)["node"]
		want.Node, want.Display = str(node), str(in(data, "display_node"))
		want.NodeNull = m.Type == Executing && present && node == nil
		if output := in(data, "output"); output != nil {
			raw, err := json.Marshal(output)
			require.NoError(t, err)
			assert.JSONEq(t, string(raw), string(m.Output), file)
			want.Output = m.Output
		}
	case Progress:
		want.Node, want.Value, want.Max = str(in(data, "node")), num(in(data, "value")), num(in(data, "max"))
	case ProgressState:
		nodes, _ := in(data, "nodes").(map[string]any)
		assert.Len(t, m.Nodes, len(nodes), file)
		for _, n := range m.Nodes {
			v := nodes[n.ID]
			want.Nodes = append(want.Nodes, NodeState{
				ID: str(in(v, "node_id")), Display: str(in(v, "display_node_id")), Parent: str(in(v, "parent_node_id")),
				Real: str(in(v, "real_node_id")), Value: num(in(v, "value")), Max: num(in(v, "max")), State: str(in(v, "state")),
			})
		}
	case ExecutionError, ExecutionInterrupted:
		want.Node, want.Timestamp = str(in(data, "node_id")), int64(num(in(data, "timestamp")))
		want.Failure = failureOf(data)
	}
	assert.Equal(t, want, m, file)
}

func failureOf(data any) *Failure {
	return &Failure{
		NodeID: str(in(data, "node_id")), NodeType: str(in(data, "node_type")), ExceptionType: str(in(data, "exception_type")),
		Message: str(in(data, "exception_message")), Traceback: strs(in(data, "traceback")), Executed: strs(in(data, "executed")),
	}
}

func TestRecordedBinaryFrames(t *testing.T) {
	t.Parallel()
	d := NewDecoder()
	seen := map[uint32]int{}
	recorded(t, func(t testing.TB, file string, l *line) {
		encoded := l.Binary
		if encoded == nil {
			encoded = l.BinaryPrefix
		}
		if l.Kind != "ws" || encoded == nil {
			return
		}
		frame, err := base64.StdEncoding.DecodeString(*encoded)
		require.NoError(t, err)
		b, need, err := d.BinaryHeader(frame)
		require.NoError(t, err, file)
		if need > len(frame) {
			require.NotNil(t, l.BinaryPrefix, file)
			return
		}
		seen[b.Kind]++
		switch b.Kind {
		case KindPreview, KindPreviewWithMetadata:
			magic := map[string]string{"image/jpeg": "\xff\xd8\xff", "image/png": "\x89PNG"}[b.ContentType]
			require.NotEmpty(t, magic, "%s: content type %q", file, b.ContentType)
			if len(frame) > b.Payload+4 {
				assert.True(t, strings.HasPrefix(string(frame[b.Payload:]), magic), file)
			}
		case KindText:
			assert.Regexp(t, `^[0-9.:]+$`, b.Node, file)
			assert.Equal(t, string(frame[b.Payload:]), b.Text, file)
			assert.NotEmpty(t, b.Text, file)
		}
		if b.Kind == KindPreviewWithMetadata {
			assert.Len(t, b.PromptID, 36, file)
			assert.NotEmpty(t, b.Node, file)
			assert.NotEmpty(t, b.Display, file)
		}
	})
	for _, kind := range []uint32{KindPreview, KindText, KindPreviewWithMetadata, 99} {
		assert.NotZero(t, seen[kind], "no recording has a frame of kind %d", kind)
	}
}

func TestRecordedAnswers(t *testing.T) {
	t.Parallel()
	seen := map[string]int{}
	recorded(t, func(t testing.TB, file string, l *line) {
		body := l.answer()
		if l.Kind != "http" || body == nil || l.Cut != "" {
			return
		}
		path, _, _ := strings.Cut(strings.TrimPrefix(l.Path, "/api"), "?")
		at := file + " " + l.Method + " " + l.Path
		name := ""
		switch {
		case l.Status == 200 && l.Method == "GET" && path == "/queue":
			name = "queue"
			assertQueue(t, body, at)
		case l.Status == 200 && l.Method == "GET" && (path == "/history" || strings.HasPrefix(path, "/history/")):
			name = "history"
			assertHistory(t, body, at)
		case l.Status == 200 && l.Method == "GET" && strings.HasPrefix(path, "/jobs/"):
			name = "job"
			assertJob(t, body, at)
		case l.Status == 200 && l.Method == "POST" && path == "/prompt":
			name = "reply"
			assertPromptReply(t, body, at)
		case l.Status >= 400 && l.Method == "POST" && path == "/prompt":
			name = "refusal"
			assertRefusal(t, body, at)
		case l.Status == 200 && path == "/system_stats":
			name = "stats"
			assertSystemStats(t, body, at)
		}
		seen[name]++
	})
	for _, name := range []string{"queue", "history", "job", "reply", "refusal", "stats"} {
		assert.NotZero(t, seen[name], "no recording has a %s", name)
	}
}

func assertQueue(t testing.TB, body []byte, at string) {
	t.Helper()
	want := object(t, body)
	for _, withGraphs := range []bool{false, true} {
		running, pending, err := Queue(body, withGraphs)
		require.NoError(t, err, at)
		for key, got := range map[string][]QueueItem{"queue_running": running, "queue_pending": pending} {
			items := slices.Clone(want[key].([]any))
			if key == "queue_pending" {
				slices.SortStableFunc(items, func(a, b any) int {
					a1, b1 := a.([]any), b.([]any)
					return cmp.Or(cmp.Compare(num(a1[0]), num(b1[0])), strings.Compare(str(a1[1]), str(b1[1])))
				})
			}
			require.Len(t, got, len(items), at)
			for i := range got {
				item := items[i].([]any)
				assert.Equal(t, item[0], got[i].Number, at)
				assert.Equal(t, item[1], got[i].PromptID, at)
				assertItem(t, item, got[i], withGraphs, at)
			}
		}
	}
}

func assertItem(t testing.TB, want []any, got QueueItem, withGraphs bool, at string) {
	t.Helper()
	assert.Equal(t, str(in(want[3], "client_id")), got.ClientID, at)
	assert.Equal(t, Marker{
		JobID: str(in(want[3], "comfyui_go", "job_id")), Attempt: int(num(in(want[3], "comfyui_go", "attempt"))),
		Nonce: str(in(want[3], "comfyui_go", "nonce")),
	}, got.Marker, at)
	if !withGraphs {
		assert.Nil(t, got.Graph, at)
		assert.Nil(t, got.ExtraData, at)
		return
	}
	assert.Equal(t, want[2], value(t, got.Graph), at)
	assert.Equal(t, want[3], value(t, got.ExtraData), at)
	assert.Equal(t, strs(want[4]), got.Outputs, at)
}

func value(t testing.TB, b []byte) (v any) {
	t.Helper()
	require.NoError(t, json.Unmarshal(b, &v), "%s", b)
	return v
}

func assertHistory(t testing.TB, body []byte, at string) {
	t.Helper()
	want := object(t, body)
	for _, withGraphs := range []bool{false, true} {
		entries, err := History(body, withGraphs)
		require.NoError(t, err, at)
		require.Len(t, entries, len(want), at)
		for _, got := range entries {
			entry := want[got.PromptID]
			prompt := in(entry, "prompt").([]any)
			assert.Equal(t, num(prompt[0]), got.Number, at)
			assertItem(t, prompt, QueueItem{
				ClientID: got.ClientID, Marker: got.Marker, Graph: got.Graph, ExtraData: got.ExtraData, Outputs: strs(prompt[4]),
			}, withGraphs, at)
			assert.Equal(t, strs(prompt[4]), got.Targets, at)
			assertEnd(t, in(entry, "status"), in(entry, "outputs"), got, withGraphs, at)
		}
	}
}

// assertEnd compares the status and the outputs of an ended prompt.
func assertEnd(t testing.TB, status, outputs any, got HistoryEntry, withRaw bool, at string) {
	t.Helper()
	assert.Equal(t, str(in(status, "status_str")), got.Status, at)
	assert.Equal(t, in(status, "completed") == true, got.Completed, at)
	messages := in(status, "messages").([]any)
	require.Len(t, got.Messages, len(messages), at)
	if withRaw {
		require.Len(t, got.RawMessages, len(messages), at)
	} else {
		require.Empty(t, got.RawMessages, at)
	}
	var terminal *Message
	for i, m := range messages {
		pair := m.([]any)
		assertMessage(t, map[string]any{"type": pair[0], "data": pair[1]}, got.Messages[i], at)
		if withRaw {
			assert.Equal(t, m, value(t, got.RawMessages[i]), at)
		}
		switch pair[0] {
		case "execution_success", "execution_error", "execution_interrupted":
			terminal = &got.Messages[i]
		}
	}
	assert.Same(t, terminal, got.Terminal(), at)
	assert.NotNil(t, terminal, at)

	require.Len(t, got.Outputs, len(outputs.(map[string]any)), at)
	for _, o := range got.Outputs {
		want := in(outputs, o.Node)
		assert.Equal(t, want, value(t, o.Output), at)
		assertOutputs(t, want.(map[string]any), o.Output, at)
	}
}

func assertOutputs(t testing.TB, want map[string]any, node json.RawMessage, at string) {
	t.Helper()
	values, err := Outputs(node)
	require.NoError(t, err, at)
	got := map[string][]any{}
	for _, v := range values {
		switch {
		case v.File != nil:
			got[v.Key] = append(got[v.Key], *v.File)
		case v.IsText:
			got[v.Key] = append(got[v.Key], v.Text)
		default:
			got[v.Key] = append(got[v.Key], value(t, v.Raw))
		}
	}
	for key, list := range want {
		var expected []any
		for _, v := range list.([]any) {
			switch {
			case v == nil:
			case str(in(v, "filename")) != "":
				expected = append(expected, File{str(in(v, "filename")), str(in(v, "subfolder")), str(in(v, "type"))})
			default:
				expected = append(expected, v)
			}
		}
		assert.Equal(t, expected, got[key], at)
		delete(got, key)
	}
	assert.Empty(t, got, at)
}

func assertJob(t testing.TB, body []byte, at string) {
	t.Helper()
	want := object(t, body)
	got, err := DecodeJob(body)
	require.NoError(t, err, at)
	assert.Equal(t, want["id"], got.ID, at)
	assert.Equal(t, want["status"], got.Status, at)
	assert.Equal(t, num(want["priority"]), got.Number, at)
	assert.Equal(t, int64(num(want["create_time"])), got.CreateTime, at)
	assert.Equal(t, int64(num(want["execution_start_time"])), got.StartTime, at)
	assert.Equal(t, int64(num(want["execution_end_time"])), got.EndTime, at)
	assert.Equal(t, int(num(want["outputs_count"])), got.OutputsCount, at)
	assert.Equal(t, str(want["workflow_id"]), got.WorkflowID, at)
	if failure := want["execution_error"]; failure == nil {
		assert.Nil(t, got.Failure, at)
	} else {
		assert.Equal(t, failureOf(failure), got.Failure, at)
	}
	if want["execution_status"] == nil {
		assert.Equal(t, HistoryEntry{}, got.History, at)
		return
	}
	assert.Equal(t, got.Outputs, got.History.Outputs, at)
	assert.Equal(t, got.ID, got.History.PromptID, at)
	assert.Equal(t, str(in(want, "workflow", "extra_data", "client_id")), got.History.ClientID, at)
	assert.Equal(t, str(in(want, "workflow", "extra_data", "comfyui_go", "job_id")), got.History.Marker.JobID, at)
	assertEnd(t, want["execution_status"], want["outputs"], got.History, false, at)
}

func assertPromptReply(t testing.TB, body []byte, at string) {
	t.Helper()
	want := object(t, body)
	got, err := DecodePromptReply(body)
	require.NoError(t, err, at)
	assert.Equal(t, want["prompt_id"], got.PromptID, at)
	assert.Equal(t, num(want["number"]), got.Number, at)
	assertNodeErrors(t, want["node_errors"], got.NodeErrors, at)
}

func assertRefusal(t testing.TB, body []byte, at string) {
	t.Helper()
	got, ok := DecodeRefusal(body)
	var want map[string]any
	if json.Unmarshal(body, &want) != nil {
		assert.False(t, ok, at)
		return
	}
	require.True(t, ok, at)
	assert.Equal(t, str(in(want["error"], "type")), got.Type, at)
	assert.Equal(t, str(in(want["error"], "message")), got.Message, at)
	assert.Equal(t, str(in(want["error"], "details")), got.Details, at)
	assertNodeErrors(t, want["node_errors"], got.Nodes, at)
}

func assertNodeErrors(t testing.TB, want any, got map[string]NodeErrors, at string) {
	t.Helper()
	nodes, _ := want.(map[string]any)
	require.Len(t, got, len(nodes), at)
	for id, n := range got {
		assert.Equal(t, in(nodes, id, "class_type"), n.Class, at)
		assert.Equal(t, strs(in(nodes, id, "dependent_outputs")), n.DependentOutputs, at)
		errors := in(nodes, id, "errors").([]any)
		require.Len(t, n.Errors, len(errors), at)
		for i, e := range n.Errors {
			assert.Equal(t, str(in(errors[i], "type")), e.Type, at)
			assert.Equal(t, str(in(errors[i], "message")), e.Message, at)
			assert.Equal(t, str(in(errors[i], "details")), e.Details, at)
			assert.Equal(t, str(in(errors[i], "extra_info", "input_name")), e.Input, at)
			assert.Equal(t, in(errors[i], "extra_info"), value(t, e.ExtraInfo), at)
		}
	}
}

func assertSystemStats(t testing.TB, body []byte, at string) {
	t.Helper()
	want := object(t, body)
	got, err := DecodeSystemStats(body)
	require.NoError(t, err, at)
	assert.Equal(t, in(want, "system", "comfyui_version"), got.Version, at)
	assert.Equal(t, in(want, "system", "os"), got.OS, at)
	assert.Equal(t, in(want, "system", "python_version"), got.Python, at)
	assert.Equal(t, in(want, "system", "pytorch_version"), got.PyTorch, at)
	assert.Equal(t, strs(in(want, "system", "argv")), got.Args, at)
	assert.Equal(t, int64(num(in(want, "system", "ram_total"))), got.RAMTotal, at)
	assert.Equal(t, int64(num(in(want, "system", "ram_free"))), got.RAMFree, at)
	assert.Equal(t, want, value(t, got.Raw), at)
	devices := want["devices"].([]any)
	require.Len(t, got.Devices, len(devices), at)
	for i, v := range got.Devices {
		assert.Equal(t, Device{
			Name: str(in(devices[i], "name")), Type: str(in(devices[i], "type")), Index: int(num(in(devices[i], "index"))),
			VRAMTotal: int64(num(in(devices[i], "vram_total"))), VRAMFree: int64(num(in(devices[i], "vram_free"))),
			TorchVRAMTotal: int64(num(in(devices[i], "torch_vram_total"))), TorchVRAMFree: int64(num(in(devices[i], "torch_vram_free"))),
		}, v, at)
	}
}
