package wire

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestQueue(t *testing.T) {
	t.Parallel()
	body := []byte(`{"queue_running": [[-5.0, "r", {"1": {"inputs": {"x": NaN}}}, {"client_id": "c", "comfyui_go": {"job_id": "j", "attempt": 2, "nonce": "n"}, "y": Infinity}, ["9", 10]]],
		"queue_pending": [[3, "b", {}, {}, []], [3, "a", {}, null, null, "more", {"than": ["five"]}], [-1, null, 1, 2, 3], [NaN, "z", {}, {"comfyui_go": "x"}, []]], "more": 1}`)
	running, pending, err := Queue(body, false)
	require.NoError(t, err)
	assert.Equal(t, []QueueItem{{Number: -5, PromptID: "r", ClientID: "c", Marker: Marker{JobID: "j", Attempt: 2, Nonce: "n"}}}, running)
	assert.Equal(t, []QueueItem{{Number: -1}, {PromptID: "z"}, {Number: 3, PromptID: "a"}, {Number: 3, PromptID: "b"}}, pending)

	running, _, err = Queue(body, true)
	require.NoError(t, err)
	assert.Equal(t, QueueItem{
		Number: -5, PromptID: "r", ClientID: "c", Marker: Marker{JobID: "j", Attempt: 2, Nonce: "n"},
		Graph:     json.RawMessage(`{"1": {"inputs": {"x": null}}}`),
		ExtraData: json.RawMessage(`{"client_id": "c", "comfyui_go": {"job_id": "j", "attempt": 2, "nonce": "n"}, "y": null}`),
		Outputs:   []string{"9", "10"},
	}, running[0])
	checkQueue(t, body)
}

func TestQueueEmpty(t *testing.T) {
	t.Parallel()
	running, pending, err := Queue([]byte(`{"queue_running": [], "queue_pending": []}`), true)
	require.NoError(t, err)
	assert.Empty(t, running)
	assert.Empty(t, pending)
}

// TestQueueMalformed: whoever reads half a queue takes the other prompts for lost, and runs them again.
func TestQueueMalformed(t *testing.T) {
	t.Parallel()
	for _, body := range []string{
		``, `null`, `[]`, `{}`, `<html>`, `{"error": "x"}`, `{"queue_running": []}`, `{"queue_pending": []}`, `{"queue_running": null, "queue_pending": []}`,
		`{"queue_running": [], "queue_pending": {}}`, `{"queue_running": [[1, "a", {}, {}]], "queue_pending": []}`, `{"queue_running": [{}], "queue_pending": []}`,
		`{"queue_running": [], "queue_pending": [[1, "a", {}, {}, []], null]}`, `{"queue_running": [], "queue_pending": []`, `{"queue_running": [], "queue_pending": []}]`,
		`{"queue_running": [], "queue_pending": [], "queue_pending": 1}`,
	} {
		running, pending, err := Queue([]byte(body), false)
		require.ErrorIs(t, err, ErrMalformed, body)
		assert.Nil(t, running, body)
		assert.Nil(t, pending, body)
	}
	_, _, err := Queue([]byte(`{"queue_running": [], "queue_pending": 1, "queue_pending": []}`), false)
	require.NoError(t, err, "the last wins")
}

func TestHistoryEntry(t *testing.T) {
	t.Parallel()
	body := []byte(`{"b": {"prompt": [7, "b", {"1": {}}, {"client_id": "c", "comfyui_go": {"job_id": "j"}}, ["1"]],
		"outputs": {"9": {"images": []}, "2": {"x": NaN}, "3": null}, "meta": {},
		"status": {"status_str": "success", "completed": true, "messages": [["execution_start", {"prompt_id": "b", "timestamp": 5}],
			["execution_error", {"exception_type": "RuntimeError", "current_inputs": {"x": NaN}}], ["execution_error", {"exception_type": "ExecutionBlocked"}]]}},
		"a": {"prompt": [1, "a"], "outputs": null, "status": null}, "c": {}}`)
	entries, err := History(body, true)
	require.NoError(t, err)
	require.Len(t, entries, 3)
	start := Message{Type: ExecutionStart, Name: "execution_start", PromptID: "b", Timestamp: 5, Remaining: -1}
	failure := Message{Type: ExecutionError, Name: "execution_error", Remaining: -1, Failure: &Failure{ExceptionType: "RuntimeError"}}
	blocked := Message{Type: ExecutionError, Name: "execution_error", Remaining: -1, Failure: &Failure{ExceptionType: "ExecutionBlocked"}}
	assert.Equal(t, HistoryEntry{
		PromptID: "b", Number: 7, ClientID: "c", Marker: Marker{JobID: "j"}, Targets: []string{"1"}, Status: "success", Completed: true,
		Messages: []Message{start, failure, blocked},
		RawMessages: []json.RawMessage{
			json.RawMessage(`["execution_start", {"prompt_id": "b", "timestamp": 5}]`),
			json.RawMessage(`["execution_error", {"exception_type": "RuntimeError", "current_inputs": {"x": null}}]`),
			json.RawMessage(`["execution_error", {"exception_type": "ExecutionBlocked"}]`),
		},
		Outputs: []NodeOutput{{"9", json.RawMessage(`{"images": []}`)}, {"2", json.RawMessage(`{"x": null}`)}},
		Graph:   json.RawMessage(`{"1": {}}`), ExtraData: json.RawMessage(`{"client_id": "c", "comfyui_go": {"job_id": "j"}}`),
	}, entries[0])
	assert.Equal(t, failure, *entries[0].Terminal(), "what the messages say counts, not the status")
	assert.Equal(t, HistoryEntry{PromptID: "a", Number: 1}, entries[1])
	assert.Nil(t, entries[1].Terminal())
	assert.Equal(t, HistoryEntry{PromptID: "c"}, entries[2])

	lean, err := History(body, false)
	require.NoError(t, err)
	assert.Nil(t, lean[0].Graph)
	assert.Nil(t, lean[0].ExtraData)
	assert.Equal(t, entries[0].Marker, lean[0].Marker)
	checkHistory(t, body)
}

func TestHistoryMalformed(t *testing.T) {
	t.Parallel()
	for _, body := range []string{``, `null`, `[]`, `{`, `<html>`, `{"error": "x"}`, `{"a": null}`, `{"a": {}}}`, `{"a": {"outputs": {"1": }}}`} {
		entries, err := History([]byte(body), false)
		require.ErrorIs(t, err, ErrMalformed, body)
		assert.Nil(t, entries, body)
	}
	entries, err := History([]byte(`{}`), false)
	require.NoError(t, err)
	assert.Empty(t, entries)
}

func TestHistoryOfOddMessages(t *testing.T) {
	t.Parallel()
	entries, err := History([]byte(`{"a": {"status": {"messages": [null, [], ["x"], [1, 2], ["execution_error"], ["execution_interrupted", 3, 4], {"a": 1}]}}}`), true)
	require.NoError(t, err)
	require.Len(t, entries, 1)
	e := entries[0]
	require.Len(t, e.Messages, 7)
	require.Len(t, e.RawMessages, 7)
	var types []Type
	for _, m := range e.Messages {
		types = append(types, m.Type)
	}
	assert.Equal(t, []Type{Other, Other, Other, Other, ExecutionError, ExecutionInterrupted, Other}, types)
	assert.Same(t, &e.Messages[5], e.Terminal())
}

func TestOutputs(t *testing.T) {
	t.Parallel()
	raw := func(key, value string) OutputValue { return OutputValue{Key: key, Raw: json.RawMessage(value)} }
	for node, want := range map[string][]OutputValue{
		`{}`:   nil,
		`null`: nil,
		`{"images": [{"filename": "a.png", "subfolder": "s/ü", "type": "temp", "format": "x"}, {"type": "output", "filename": "b"}]}`: {
			{Key: "images", File: &File{"a.png", "s/ü", "temp"}}, {Key: "images", File: &File{"b", "", "output"}},
		},
		`{"text": ["a", "", "\u00e9"]}`: {
			{Key: "text", Text: "a", IsText: true}, {Key: "text", IsText: true}, {Key: "text", Text: "é", IsText: true},
		},
		`{"z": [1, -2.50, true, [null, [NaN]], {"x": {"filename": "deep"}}], "a": [NaN, null, Infinity]}`: {
			raw("z", "1"), raw("z", "-2.50"), raw("z", "true"), raw("z", "[null, [null]]"), raw("z", `{"x": {"filename": "deep"}}`),
		},
		`{"animated": [true, false]}`:                                           {raw("animated", "true"), raw("animated", "false")},
		`{"files": [{"filename": ""}, {"filename": null}, {"filename": [1]}]}`:  {raw("files", `{"filename": ""}`), raw("files", `{"filename": null}`), raw("files", `{"filename": [1]}`)},
		`{"images": [{"filename": "a", "subfolder": null, "type": 5}]}`:         {{Key: "images", File: &File{Filename: "a"}}},
		`{"text": "alone", "n": 5, "null": null, "f": {"filename": "a"}}`:       {{Key: "text", Text: "alone", IsText: true}, raw("n", "5"), {Key: "f", File: &File{Filename: "a"}}},
		`{"a": [1], "b": [2], "a": [3, 4], "c": []}`:                            {raw("a", "3"), raw("a", "4"), raw("b", "2")},
		`{"x": ["../../etc/passwd"], "y": [{"filename": "../x", "type": "t"}]}`: {{Key: "x", Text: "../../etc/passwd", IsText: true}, {Key: "y", File: &File{Filename: "../x", Type: "t"}}},
	} {
		values, err := Outputs(json.RawMessage(node))
		require.NoError(t, err, node)
		assert.Equal(t, want, values, node)
	}
	for _, node := range []string{``, `[]`, `"x"`, `5`, `{`, `{"a": [1}`, `{} {}`, `{"a": [` + strings.Repeat("[", maxDepth), `{"a": ["\ud"]}`} {
		values, err := Outputs(json.RawMessage(node))
		require.ErrorIs(t, err, ErrMalformed, node)
		assert.Nil(t, values, node)
	}
}

func TestOutputsOfLongLists(t *testing.T) {
	t.Parallel()
	deep := strings.Repeat("[", maxDepth-2) + strings.Repeat("]", maxDepth-2)
	long := "[" + strings.Repeat("0, ", maxValues) + "NaN]"
	values, err := Outputs(json.RawMessage(`{"images": [{"filename": "a"}], "wave": ` + long + `, "after": ["text"], "last": [` + deep + `]}`))
	require.NoError(t, err)
	require.Len(t, values, 4)
	assert.Equal(t, OutputValue{Key: "images", File: &File{Filename: "a"}}, values[0])
	assert.Equal(t, "wave", values[1].Key)
	assert.Equal(t, string(Sanitize([]byte(long))), string(values[1].Raw))
	assert.Equal(t, OutputValue{Key: "after", Text: "text", IsText: true}, values[2])
	assert.Equal(t, OutputValue{Key: "last", Raw: json.RawMessage(deep)}, values[3])

	values, err = Outputs(json.RawMessage(`{"wave": [` + strings.Repeat("0, ", maxValues-1) + `0]}`))
	require.NoError(t, err)
	assert.Len(t, values, maxValues)
}
