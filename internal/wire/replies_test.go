package wire

import (
	"encoding/json"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestDecodePromptReply(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]PromptReply{
		`{"prompt_id": "p", "number": 7, "node_errors": {}}`:      {PromptID: "p", Number: 7},
		`{"prompt_id": "p", "number": -5.0, "node_errors": []}`:   {PromptID: "p", Number: -5},
		`{"prompt_id": "", "number": 0}`:                          {},
		`{"prompt_id": "None", "number": NaN, "more": [NaN]}`:     {PromptID: "None"},
		`{"prompt_id": 12, "node_errors": null}`:                  {PromptID: "12"},
		`{"prompt_id": null, "prompt_id": "p", "number": "text"}`: {PromptID: "p"},
		`{"prompt_id": "p", "node_errors": {"1": {"class_type": "C", "dependent_outputs": ["2", 3], "errors": [{"type": "t", "message": "m", "details": "d",
			"extra_info": {"input_name": "i", "received_value": NaN}}, {"type": "u", "extra_info": null}, {"extra_info": "x"}, null]}, "2": null}}`: {
			PromptID: "p", NodeErrors: map[string]NodeErrors{
				"1": {Class: "C", DependentOutputs: []string{"2", "3"}, Errors: []NodeError{
					{Type: "t", Message: "m", Details: "d", Input: "i", ExtraInfo: json.RawMessage(`{"input_name": "i", "received_value": null}`)},
					{Type: "u"},
					{ExtraInfo: json.RawMessage(`"x"`)},
					{},
				}},
				"2": {},
			},
		},
	} {
		got, err := DecodePromptReply([]byte(body))
		require.NoError(t, err, body)
		assert.Equal(t, want, got, body)
	}
	for _, body := range []string{``, `null`, `[]`, `{}`, `{"number": 1}`, `{"prompt_id": null}`, `{"prompt_id": ["p"]}`, `{"prompt_id": NaN}`, `<html>`, `{"prompt_id": "p"`, `{"error": "x"}`} {
		got, err := DecodePromptReply([]byte(body))
		require.ErrorIs(t, err, ErrMalformed, body)
		assert.Equal(t, PromptReply{}, got, body)
	}
}

func TestDecodeRefusal(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]Refusal{
		`{"error": {"type": "prompt_no_outputs", "message": "Prompt has no outputs", "details": "", "extra_info": {}}, "node_errors": {}}`: {
			Type: "prompt_no_outputs", Message: "Prompt has no outputs", ExtraInfo: json.RawMessage(`{}`),
		},
		`{"error": "Invalid prompt", "node_errors": []}`:                  {Message: "Invalid prompt"},
		`{"error": "prompt_id already exists"}`:                           {Message: "prompt_id already exists"},
		`{"error": "Invalid job IDs", "invalid_ids": ["x"]}`:              {Message: "Invalid job IDs"},
		`{"node_errors": {"1": {"class_type": "C"}}, "error": {}}`:        {Nodes: map[string]NodeErrors{"1": {Class: "C"}}},
		`{"error": {"type": "a", "details": "b"}, "error": {"type":"c"}}`: {Type: "c"},
		`{"error": {"type": "a"}, "error": "x"}`:                          {Message: "x"},
		`{"error": null, "error": "last"}`:                                {Message: "last"},
	} {
		got, ok := DecodeRefusal([]byte(body))
		assert.True(t, ok, body)
		assert.Equal(t, want, got, body)
	}
	for _, body := range []string{
		``, `null`, `[]`, `"x"`, `{}`, `{"error": null}`, `{"error": 413}`, `{"error": ["x"]}`, `{"detail": "Not Found"}`, `{"error": "x"`, `{"error": "x"}}`, `{"error": "first", "error": null}`,
		`<html><body>502 Bad Gateway</body></html>`, "500 Internal Server Error\n\nServer got itself in trouble", "Maximum request body size 1048576 exceeded.",
	} {
		got, ok := DecodeRefusal([]byte(body))
		assert.False(t, ok, body)
		assert.Equal(t, Refusal{}, got, body)
	}
}

func TestDecodeJob(t *testing.T) {
	t.Parallel()
	pending, err := DecodeJob([]byte(`{"id": "p", "status": "pending", "priority": 7, "create_time": 1795489290218, "outputs_count": 0}`))
	require.NoError(t, err)
	assert.Equal(t, Job{ID: "p", Status: "pending", Number: 7, CreateTime: 1795489290218}, pending)

	failed, err := DecodeJob([]byte(`{"workflow": {"extra_data": {"client_id": "c", "comfyui_go": {"job_id": "j", "attempt": 3}}, "prompt": {"1": {"x": NaN}}},
		"execution_status": {"status_str": "error", "completed": false, "messages": [["execution_error", {"node_id": "1", "exception_type": "E"}]]},
		"execution_error": {"node_id": "1", "exception_type": "E", "exception_message": "m\n"}, "outputs": {"9": {"text": [NaN]}}, "outputs_count": 1,
		"execution_start_time": 1.0, "execution_end_time": 2, "priority": 1, "workflow_id": "w", "status": "failed", "id": "p", "preview_output": null}`))
	require.NoError(t, err)
	outputs := []NodeOutput{{"9", json.RawMessage(`{"text": [null]}`)}}
	assert.Equal(t, Job{
		ID: "p", Status: "failed", Number: 1, OutputsCount: 1, WorkflowID: "w", StartTime: 1, EndTime: 2, Outputs: outputs,
		Failure: &Failure{NodeID: "1", ExceptionType: "E", Message: "m\n"},
		History: HistoryEntry{
			PromptID: "p", Number: 1, ClientID: "c", Marker: Marker{JobID: "j", Attempt: 3}, Status: "error", Outputs: outputs,
			Messages: []Message{{
				Type: ExecutionError, Name: "execution_error", Node: "1", Remaining: -1, Failure: &Failure{NodeID: "1", ExceptionType: "E"},
			}},
		},
	}, failed)
	for _, body := range []string{``, `{}`, `null`, `{"error": "Job not found"}`, `{"id": "p"}`, `{"status": "pending"}`, `{"id": "", "status": "x"}`, `{"id": "p", "status": "x"`, `<html>`} {
		got, err := DecodeJob([]byte(body))
		require.ErrorIs(t, err, ErrMalformed, body)
		assert.Equal(t, Job{}, got, body)
	}
}

func TestDecodeSystemStats(t *testing.T) {
	t.Parallel()
	body := ` {"devices": [{"name": "cuda:0 X", "type": "cuda", "index": 0, "vram_total": 25276514304, "vram_free": 1e10, "torch_vram_total": NaN, "torch_vram_free": 9e99}, null, {"index": null}],
		"system": {"os": "posix"}, "system": {"comfyui_version": "0.27.0", "python_version": "3.11", "pytorch_version": "2.15", "argv": ["main.py", "--cpu"], "ram_total": 5, "ram_free": null}} `
	got, err := DecodeSystemStats([]byte(body))
	require.NoError(t, err)
	assert.True(t, json.Valid(got.Raw))
	got.Raw = nil
	assert.Equal(t, SystemStats{
		Version: "0.27.0", Python: "3.11", PyTorch: "2.15", Args: []string{"main.py", "--cpu"}, RAMTotal: 5,
		Devices: []Device{{Name: "cuda:0 X", Type: "cuda", VRAMTotal: 25276514304, VRAMFree: 1e10, TorchVRAMFree: math.MaxInt64}, {}, {}},
	}, got)
	for _, body := range []string{``, `{}`, `[]`, `{"system": null}`, `{"devices": []}`, `{"system": {}`, `{"system": {}} x`, `<html>`} {
		got, err := DecodeSystemStats([]byte(body))
		require.ErrorIs(t, err, ErrMalformed, body)
		assert.Equal(t, SystemStats{}, got, body)
	}
}
