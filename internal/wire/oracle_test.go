package wire

import (
	"bytes"
	"encoding/json"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The oracle says what encoding/json makes of a document once its NaN and infinities are replaced by numbers that it reads and that no
// document holds by itself.
const (
	oracleNaN = "1.000000000000000012345e999"
	oracleInf = "2.000000000000000012345e999"
)

var (
	oracleTokens = regexp.MustCompile(`(?s)"(?:[^"\\]|\\.)*"|-Infinity|Infinity|NaN`)
	oracleBare   = regexp.MustCompile(`-?[12]\.000000000000000012345e999`)
)

// oracleJSON is nil when the document is malformed or no object.
func oracleJSON(document []byte) json.RawMessage {
	b := oracleTokens.ReplaceAllFunc(document, func(token []byte) []byte {
		switch string(token) {
		case "NaN":
			return []byte(" " + oracleNaN + " ")
		case "Infinity":
			return []byte(" " + oracleInf + " ")
		case "-Infinity":
			return []byte(" -" + oracleInf + " ")
		}
		return token
	})
	b = bytes.Trim(b, " \t\r\n")
	if !json.Valid(b) || b[0] != '{' || oracleDepth(b) > maxDepth {
		return nil
	}
	return b
}

func oracleDepth(b []byte) (deepest int) {
	depth := 0
	for _, c := range oracleTokens.ReplaceAll(b, nil) {
		switch c {
		case '{', '[':
			depth++
			deepest = max(deepest, depth)
		case '}', ']':
			depth--
		}
	}
	return deepest
}

type fields = map[string]json.RawMessage

// oracleFields is nil when raw is no object.
func oracleFields(raw json.RawMessage) (f fields) {
	if len(raw) == 0 || raw[0] != '{' || json.Unmarshal(raw, &f) != nil {
		return nil
	}
	return f
}

func oracleList(raw json.RawMessage) (list []json.RawMessage) {
	if len(raw) == 0 || raw[0] != '[' || json.Unmarshal(raw, &list) != nil {
		return nil
	}
	return list
}

// oraclePairs are the keys and values of an object as they stand there, equal keys too.
func oraclePairs(raw json.RawMessage) (keys []string, values []json.RawMessage) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return nil, nil
	}
	for dec.More() {
		key, _ := dec.Token()
		var v json.RawMessage
		if dec.Decode(&v) != nil {
			panic("not a document of the oracle")
		}
		keys, values = append(keys, key.(string)), append(values, v)
	}
	return keys, values
}

// oracleKeys are the keys of an object in the order of their first appearance.
func oracleKeys(raw json.RawMessage) (unique []string) {
	keys, _ := oraclePairs(raw)
	for _, key := range keys {
		if !slices.Contains(unique, key) {
			unique = append(unique, key)
		}
	}
	return unique
}

func oracleIsText(raw json.RawMessage) bool {
	return len(raw) > 0 && !strings.ContainsAny(string(raw[:1]), "{[n") && !oracleBare.Match(raw)
}

func oracleString(raw json.RawMessage) (s string) {
	if len(raw) == 0 || raw[0] != '"' || json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

func oracleID(raw json.RawMessage) string {
	switch {
	case len(raw) > 0 && raw[0] == '"':
		return oracleString(raw)
	case oracleIsText(raw):
		return string(raw)
	}
	return ""
}

func oracleIDs(raw json.RawMessage) (ids []string) {
	for _, id := range oracleList(raw) {
		if oracleIsText(id) || id[0] == '"' {
			ids = append(ids, oracleID(id))
		}
	}
	return ids
}

func oracleLines(raw json.RawMessage) []string {
	if len(raw) > 0 && raw[0] == '"' {
		return []string{oracleString(raw)}
	}
	return oracleIDs(raw)
}

func oracleNumber(raw json.RawMessage) float64 {
	if len(raw) == 0 || !strings.ContainsAny(string(raw[:1]), "-0123456789") || string(raw) == oracleNaN {
		return 0
	}
	f, _ := strconv.ParseFloat(string(raw), 64)
	return min(max(f, -math.MaxFloat64), math.MaxFloat64)
}

func oracleInteger(raw json.RawMessage) int64 {
	if n, err := strconv.ParseInt(string(raw), 10, 64); err == nil {
		return n
	}
	switch f := oracleNumber(raw); {
	case f >= math.MaxInt64:
		return math.MaxInt64
	case f <= math.MinInt64:
		return math.MinInt64
	default:
		return int64(f)
	}
}

// oracleRaw is raw as Go's decoder takes it.
func oracleRaw(raw json.RawMessage) json.RawMessage {
	if raw == nil {
		return nil
	}
	var b bytes.Buffer
	if json.Compact(&b, oracleBare.ReplaceAll(raw, []byte("null"))) != nil {
		panic("not a document of the oracle")
	}
	return b.Bytes()
}

// compact makes raw comparable with oracleRaw; it stays nil when it is nil.
func compact(t testing.TB, raw json.RawMessage) json.RawMessage {
	t.Helper()
	if raw == nil {
		return nil
	}
	var b bytes.Buffer
	require.NoError(t, json.Compact(&b, raw), "%s", raw)
	return b.Bytes()
}

func oracleNonNull(raw json.RawMessage) json.RawMessage {
	if raw = oracleRaw(raw); string(raw) == "null" {
		return nil
	}
	return raw
}

func oracleMessage(name string, data json.RawMessage) Message {
	f := oracleFields(data)
	m := Message{Type: typeOf([]byte(name)), Name: name, PromptID: oracleID(f["prompt_id"]), Remaining: -1}
	switch m.Type {
	case Other, FeatureFlags:
		m.Raw = oracleRaw(data)
	case Status:
		m.SID = oracleID(f["sid"])
		remaining := oracleFields(oracleFields(f["status"])["exec_info"])["queue_remaining"]
		if len(remaining) > 0 && '0' <= remaining[0] && remaining[0] <= '9' && !oracleBare.Match(remaining) {
			m.Remaining = int(oracleInteger(remaining))
		}
	case ExecutionStart, ExecutionSuccess:
		m.Timestamp = oracleInteger(f["timestamp"])
	case ExecutionCached:
		m.Timestamp = oracleInteger(f["timestamp"])
		m.Cached = oracleIDs(f["nodes"])
	case Executing:
		m.Node, m.Display, m.NodeNull = oracleID(f["node"]), oracleID(f["display_node"]), string(f["node"]) == "null"
	case Executed:
		m.Node, m.Display, m.Output = oracleID(f["node"]), oracleID(f["display_node"]), oracleNonNull(f["output"])
	case Progress:
		m.Node, m.Value, m.Max = oracleID(f["node"]), oracleNumber(f["value"]), oracleNumber(f["max"])
	case ProgressState:
		nodes := oracleFields(f["nodes"])
		for _, id := range oracleKeys(f["nodes"]) {
			n := oracleFields(nodes[id])
			m.Nodes = append(m.Nodes, NodeState{
				ID: id, Display: oracleID(n["display_node_id"]), Parent: oracleID(n["parent_node_id"]), Real: oracleID(n["real_node_id"]),
				Value: oracleNumber(n["value"]), Max: oracleNumber(n["max"]), State: oracleID(n["state"]),
			})
		}
	case ExecutionError, ExecutionInterrupted:
		m.Failure = oracleFailure(data)
		m.Node, m.Timestamp = m.Failure.NodeID, oracleInteger(f["timestamp"])
	}
	return m
}

func oracleFailure(data json.RawMessage) *Failure {
	f := oracleFields(data)
	return &Failure{
		NodeID: oracleID(f["node_id"]), NodeType: oracleID(f["node_type"]), ExceptionType: oracleID(f["exception_type"]),
		Message: oracleID(f["exception_message"]), Traceback: oracleLines(f["traceback"]), Executed: oracleIDs(f["executed"]),
	}
}

// checkText compares Text and Peek with the oracle.
func checkText(t testing.TB, d *Decoder, frame []byte) {
	t.Helper()
	document := oracleJSON(frame)
	before := bytes.Clone(frame)
	m, err := d.Text(frame)
	peeked, promptID, ok := d.Peek(frame)
	require.Equal(t, before, frame, "the frame was changed")
	if document == nil {
		require.ErrorIs(t, err, ErrMalformed)
		require.Equal(t, Message{}, m)
		require.False(t, ok)
		return
	}
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, m.Type, peeked)
	require.Equal(t, m.PromptID, string(promptID))
	f := oracleFields(document)
	want := oracleMessage(oracleString(f["type"]), f["data"])
	m.Raw, m.Output = compact(t, m.Raw), compact(t, m.Output)
	require.Equal(t, want, m)
}

func oracleMarker(raw json.RawMessage) Marker {
	f := oracleFields(raw)
	return Marker{JobID: oracleID(f["job_id"]), Attempt: int(oracleInteger(f["attempt"])), Nonce: oracleID(f["nonce"])}
}

// oracleItem is false for what is no item.
func oracleItem(raw json.RawMessage, withGraphs bool) (item QueueItem, ok bool) {
	list := oracleList(raw)
	if len(list) < 5 {
		return item, false
	}
	extra := oracleFields(list[3])
	item = QueueItem{
		Number: oracleNumber(list[0]), PromptID: oracleID(list[1]), ClientID: oracleID(extra["client_id"]), Marker: oracleMarker(extra["comfyui_go"]),
	}
	if withGraphs {
		item.Graph, item.ExtraData, item.Outputs = oracleRaw(list[2]), oracleRaw(list[3]), oracleIDs(list[4])
	}
	return item, true
}

func oracleItems(raw json.RawMessage, withGraphs bool) (items []QueueItem, ok bool) {
	if len(raw) == 0 || raw[0] != '[' {
		return nil, false
	}
	for _, v := range oracleList(raw) {
		item, ok := oracleItem(v, withGraphs)
		if !ok {
			return nil, false
		}
		items = append(items, item)
	}
	return items, true
}

func checkQueue(t testing.TB, body []byte) {
	t.Helper()
	for _, withGraphs := range []bool{false, true} {
		running, pending, err := Queue(body, withGraphs)
		f := oracleFields(oracleJSON(body))
		wantRunning, ok1 := oracleItems(f["queue_running"], withGraphs)
		wantPending, ok2 := oracleItems(f["queue_pending"], withGraphs)
		if !ok1 || !ok2 {
			require.ErrorIs(t, err, ErrMalformed)
			require.Empty(t, running)
			require.Empty(t, pending)
			return
		}
		require.NoError(t, err)
		slices.SortStableFunc(wantPending, func(a, b QueueItem) int {
			if a.Number != b.Number {
				if a.Number < b.Number {
					return -1
				}
				return 1
			}
			return strings.Compare(a.PromptID, b.PromptID)
		})
		require.Equal(t, wantRunning, compactItems(t, running))
		require.Equal(t, wantPending, compactItems(t, pending))
	}
}

func compactItems(t testing.TB, items []QueueItem) []QueueItem {
	t.Helper()
	for i := range items {
		items[i].Graph, items[i].ExtraData = compact(t, items[i].Graph), compact(t, items[i].ExtraData)
	}
	return items
}

func checkHistory(t testing.TB, body []byte) {
	t.Helper()
	for _, withGraphs := range []bool{false, true} {
		entries, err := History(body, withGraphs)
		document := oracleJSON(body)
		_, values := oraclePairs(document)
		if document == nil || slices.ContainsFunc(values, func(v json.RawMessage) bool { return v[0] != '{' }) {
			require.ErrorIs(t, err, ErrMalformed)
			require.Empty(t, entries)
			return
		}
		require.NoError(t, err)
		f := oracleFields(document)
		var want []HistoryEntry
		for _, id := range oracleKeys(document) {
			want = append(want, oracleEntry(id, f[id], withGraphs))
		}
		for i := range entries {
			entries[i] = compactEntry(t, entries[i])
		}
		require.Equal(t, want, entries)
	}
}

func oracleEntry(id string, raw json.RawMessage, withGraphs bool) HistoryEntry {
	f := oracleFields(raw)
	e := HistoryEntry{PromptID: id, Outputs: oracleNodeOutputs(f["outputs"])}
	if list := oracleList(f["prompt"]); list != nil {
		for len(list) < 5 {
			list = append(list, nil)
		}
		extra := oracleFields(list[3])
		e.Number, e.ClientID, e.Marker = oracleNumber(list[0]), oracleID(extra["client_id"]), oracleMarker(extra["comfyui_go"])
		e.Targets = oracleIDs(list[4])
		if withGraphs {
			e.Graph, e.ExtraData = oracleRaw(list[2]), oracleRaw(list[3])
		}
	}
	oracleStatus(&e, f["status"], withGraphs)
	return e
}

func oracleStatus(e *HistoryEntry, raw json.RawMessage, withRaw bool) {
	status := oracleFields(raw)
	e.Status, e.Completed = oracleID(status["status_str"]), string(status["completed"]) == "true"
	for _, raw := range oracleList(status["messages"]) {
		m := Message{Remaining: -1}
		if pair := oracleList(raw); len(pair) > 0 {
			m = oracleMessage(oracleString(pair[0]), append(pair, nil)[1])
		}
		e.Messages = append(e.Messages, m)
		if withRaw {
			e.RawMessages = append(e.RawMessages, oracleRaw(raw))
		}
	}
}

func oracleNodeOutputs(raw json.RawMessage) (outputs []NodeOutput) {
	f := oracleFields(raw)
	for _, node := range oracleKeys(raw) {
		if output := oracleNonNull(f[node]); output != nil {
			outputs = append(outputs, NodeOutput{Node: node, Output: output})
		}
	}
	return outputs
}

func compactEntry(t testing.TB, e HistoryEntry) HistoryEntry {
	t.Helper()
	e.Graph, e.ExtraData = compact(t, e.Graph), compact(t, e.ExtraData)
	for i := range e.Messages {
		e.Messages[i].Raw, e.Messages[i].Output = compact(t, e.Messages[i].Raw), compact(t, e.Messages[i].Output)
	}
	for i := range e.RawMessages {
		e.RawMessages[i] = compact(t, e.RawMessages[i])
	}
	for i := range e.Outputs {
		e.Outputs[i].Output = compact(t, e.Outputs[i].Output)
	}
	return e
}

func oracleNodeErrors(raw json.RawMessage) (nodes map[string]NodeErrors) {
	for id, raw := range oracleFields(raw) {
		if nodes == nil {
			nodes = map[string]NodeErrors{}
		}
		f := oracleFields(raw)
		n := NodeErrors{Class: oracleID(f["class_type"]), DependentOutputs: oracleIDs(f["dependent_outputs"])}
		for _, e := range oracleList(f["errors"]) {
			n.Errors = append(n.Errors, oracleNodeError(e))
		}
		nodes[id] = n
	}
	return nodes
}

func oracleNodeError(raw json.RawMessage) NodeError {
	f := oracleFields(raw)
	return NodeError{
		Type: oracleID(f["type"]), Message: oracleID(f["message"]), Details: oracleID(f["details"]),
		Input: oracleID(oracleFields(f["extra_info"])["input_name"]), ExtraInfo: oracleNonNull(f["extra_info"]),
	}
}

func compactNodes(t testing.TB, nodes map[string]NodeErrors) map[string]NodeErrors {
	t.Helper()
	for _, n := range nodes {
		for i := range n.Errors {
			n.Errors[i].ExtraInfo = compact(t, n.Errors[i].ExtraInfo)
		}
	}
	return nodes
}

// checkReplies compares the decoders of the small answers with the oracle.
func checkReplies(t testing.TB, body []byte) {
	t.Helper()
	document := oracleJSON(body)
	f := oracleFields(document)
	checkPromptReply(t, body, f)
	checkRefusal(t, body, f)
	checkJob(t, body, f)
	checkSystemStats(t, body, document, f)
	checkObjectInfo(t, body, f)
}

func checkPromptReply(t testing.TB, body []byte, f fields) {
	t.Helper()
	got, err := DecodePromptReply(body)
	if id := f["prompt_id"]; !oracleIsText(id) && (len(id) == 0 || id[0] != '"') {
		require.ErrorIs(t, err, ErrMalformed)
		require.Equal(t, PromptReply{}, got)
		return
	}
	require.NoError(t, err)
	compactNodes(t, got.NodeErrors)
	require.Equal(t, PromptReply{
		PromptID: oracleID(f["prompt_id"]), Number: oracleNumber(f["number"]), NodeErrors: oracleNodeErrors(f["node_errors"]),
	}, got)
}

func checkRefusal(t testing.TB, body []byte, f fields) {
	t.Helper()
	got, ok := DecodeRefusal(body)
	e := f["error"]
	if len(e) == 0 || e[0] != '"' && e[0] != '{' {
		require.False(t, ok)
		require.Equal(t, Refusal{}, got)
		return
	}
	require.True(t, ok)
	want := oracleNodeError(e)
	if e[0] == '"' {
		want.Message = oracleString(e)
	}
	got.ExtraInfo = compact(t, got.ExtraInfo)
	compactNodes(t, got.Nodes)
	require.Equal(t, Refusal{
		Type: want.Type, Message: want.Message, Details: want.Details, ExtraInfo: want.ExtraInfo, Nodes: oracleNodeErrors(f["node_errors"]),
	}, got)
}

func checkJob(t testing.TB, body []byte, f fields) {
	t.Helper()
	got, err := DecodeJob(body)
	want := Job{
		ID: oracleID(f["id"]), Status: oracleID(f["status"]), Number: oracleNumber(f["priority"]), CreateTime: oracleInteger(f["create_time"]),
		OutputsCount: int(oracleInteger(f["outputs_count"])), WorkflowID: oracleID(f["workflow_id"]),
		StartTime: oracleInteger(f["execution_start_time"]), EndTime: oracleInteger(f["execution_end_time"]),
		Outputs: oracleNodeOutputs(f["outputs"]),
	}
	if want.ID == "" || want.Status == "" {
		require.ErrorIs(t, err, ErrMalformed)
		require.Equal(t, Job{}, got)
		return
	}
	require.NoError(t, err)
	if oracleFields(f["execution_error"]) != nil {
		want.Failure = oracleFailure(f["execution_error"])
	}
	if oracleFields(f["execution_status"]) != nil {
		extra := oracleFields(oracleFields(f["workflow"])["extra_data"])
		want.History = HistoryEntry{
			PromptID: want.ID, Number: want.Number, Outputs: want.Outputs, ClientID: oracleID(extra["client_id"]), Marker: oracleMarker(extra["comfyui_go"]),
		}
		oracleStatus(&want.History, f["execution_status"], false)
	}
	got.History = compactEntry(t, got.History)
	for i := range got.Outputs {
		got.Outputs[i].Output = compact(t, got.Outputs[i].Output)
	}
	require.Equal(t, want, got)
}

func checkObjectInfo(t testing.TB, body []byte, f fields) {
	t.Helper()
	got, err := ObjectInfo(body)
	if f == nil {
		require.ErrorIs(t, err, ErrMalformed)
		require.Nil(t, got)
		return
	}
	require.NoError(t, err)
	want := map[string]json.RawMessage{}
	for class, raw := range f {
		want[class] = oracleRaw(raw)
		got[class] = compact(t, got[class])
	}
	require.Equal(t, want, got)
}

func checkSystemStats(t testing.TB, body []byte, document json.RawMessage, f fields) {
	t.Helper()
	got, err := DecodeSystemStats(body)
	system := oracleFields(f["system"])
	if system == nil {
		require.ErrorIs(t, err, ErrMalformed)
		require.Equal(t, SystemStats{}, got)
		return
	}
	require.NoError(t, err)
	want := SystemStats{
		Version: oracleID(system["comfyui_version"]), OS: oracleID(system["os"]), Python: oracleID(system["python_version"]),
		PyTorch: oracleID(system["pytorch_version"]), Args: oracleLines(system["argv"]),
		RAMTotal: oracleInteger(system["ram_total"]), RAMFree: oracleInteger(system["ram_free"]), Raw: oracleRaw(document),
	}
	for _, raw := range oracleList(f["devices"]) {
		v := oracleFields(raw)
		want.Devices = append(want.Devices, Device{
			Name: oracleID(v["name"]), Type: oracleID(v["type"]), Index: int(oracleInteger(v["index"])),
			VRAMTotal: oracleInteger(v["vram_total"]), VRAMFree: oracleInteger(v["vram_free"]),
			TorchVRAMTotal: oracleInteger(v["torch_vram_total"]), TorchVRAMFree: oracleInteger(v["torch_vram_free"]),
		})
	}
	got.Raw = compact(t, got.Raw)
	require.Equal(t, want, got)
}

func checkSanitize(t testing.TB, b []byte) {
	t.Helper()
	before := bytes.Clone(b)
	clean := Sanitize(b)
	require.Equal(t, before, b, "the input was changed")
	require.Equal(t, clean, Sanitize(clean), "not idempotent")
	if json.Valid(b) {
		require.Equal(t, b, clean)
	}
	if document := oracleJSON(b); document != nil {
		require.True(t, json.Valid(clean))
		require.Equal(t, string(oracleRaw(document)), string(compact(t, clean)))
	} else if trimmed := bytes.Trim(b, " \t\r\n"); len(trimmed) > 0 && trimmed[0] == '{' && oracleDepth(b) <= maxDepth {
		require.False(t, json.Valid(clean), "Sanitize must not mend what is malformed otherwise")
	}
}

func checkOutputs(t testing.TB, node []byte) {
	t.Helper()
	values, err := Outputs(node)
	document := oracleJSON(node)
	if document == nil {
		if string(bytes.Trim(Sanitize(node), " \t\r\n")) == "null" {
			require.NoError(t, err)
			require.Empty(t, values)
		} else {
			require.ErrorIs(t, err, ErrMalformed)
		}
		return
	}
	require.NoError(t, err)
	var want []OutputValue
	f := oracleFields(document)
	for _, key := range oracleKeys(document) {
		list := []json.RawMessage{f[key]}
		if f[key][0] == '[' {
			list = oracleList(f[key])
		}
		for _, v := range list {
			if value, ok := oracleValue(key, v); ok {
				want = append(want, value)
			}
		}
	}
	for i := range values {
		values[i].Raw = compact(t, values[i].Raw)
	}
	require.Equal(t, want, values)
}

func oracleValue(key string, raw json.RawMessage) (v OutputValue, ok bool) {
	raw = oracleRaw(raw)
	v.Key = key
	f := oracleFields(raw)
	switch name := oracleString(f["filename"]); {
	case string(raw) == "null":
		return v, false
	case name != "":
		v.File = &File{Filename: name, Subfolder: oracleString(f["subfolder"]), Type: oracleString(f["type"])}
	case raw[0] == '"':
		v.Text, v.IsText = oracleString(raw), true
	default:
		v.Raw = raw
	}
	return v, true
}

func TestOracleReadsNaN(t *testing.T) {
	t.Parallel()
	document := oracleJSON([]byte(`{"a": [NaN, -Infinity, "NaN"]}`))
	list := oracleList(oracleFields(document)["a"])
	require.Len(t, list, 3)
	assert.Zero(t, oracleNumber(list[0]))
	assert.InDelta(t, -math.MaxFloat64, oracleNumber(list[1]), 0)
	assert.Equal(t, "NaN", oracleID(list[2]))
	assert.JSONEq(t, `{"a": [null, null, "NaN"]}`, string(oracleRaw(document)))
	for _, malformed := range []string{`{"a": 1Infinity}`, `{"a": -NaN}`, `{"a": NaN1}`, `{"a": --Infinity}`, `{"a": "NaN}`, `[1]`, ``} {
		assert.Nil(t, oracleJSON([]byte(malformed)), malformed)
	}
}
