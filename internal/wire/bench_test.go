package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

const benchPromptID = "3e6a5a3d-0469-45e3-bc84-0f5ecfa72c41"

// benchFrames are frames as servers write them. The one of 320 bytes is the commonest of all: a step of a single running node.
func benchFrames() []struct {
	name  string
	frame []byte
} {
	state := func(nodes int) []byte {
		var b strings.Builder
		for i := range nodes {
			if i > 0 {
				b.WriteString(", ")
			}
			fmt.Fprintf(&b, `"%d": {"value": 20, "max": 20, "state": "finished", "node_id": "%d", "prompt_id": "%s", `+
				`"display_node_id": "%d", "parent_node_id": null, "real_node_id": "%d"}`, i, i, benchPromptID, i, i)
		}
		return fmt.Appendf(nil, `{"type": "progress_state", "data": {"prompt_id": "%s", "nodes": {%s}}}`, benchPromptID, b.String())
	}
	return []struct {
		name  string
		frame []byte
	}{
		{"progress", []byte(`{"type": "progress", "data": {"value": 7, "max": 20, "prompt_id": "` + benchPromptID + `", "node": "31"}}`)},
		{"progress_state/320B", []byte(`{"type": "progress_state", "data": {"prompt_id": "` + benchPromptID + `", "nodes": {"31": {"value": 7, "max": 20, ` +
			`"state": "running", "node_id": "31", "prompt_id": "` + benchPromptID + `", "display_node_id": "31", "parent_node_id": null, "real_node_id": "31"}}}}`)},
		{"progress_state/30nodes", state(30)},
		{"executing", []byte(`{"type": "executing", "data": {"node": "31", "display_node": "31", "prompt_id": "` + benchPromptID + `"}}`)},
		{"status", []byte(`{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 3}}}}`)},
		{"executed", []byte(`{"type": "executed", "data": {"node": "9", "display_node": "9", "output": {"images": [{"filename": "ComfyUI_00001_.png", ` +
			`"subfolder": "", "type": "output"}]}, "prompt_id": "` + benchPromptID + `"}}`)},
	}
}

// baseline is what a client without this package does: encoding/json into the two fields that attribute a frame.
func baseline(b *testing.B, frame []byte) {
	b.ReportAllocs()
	b.SetBytes(int64(len(frame)))
	for b.Loop() {
		var m struct {
			Type string `json:"type"`
			Data struct {
				PromptID string `json:"prompt_id"`
			} `json:"data"`
		}
		if err := json.Unmarshal(frame, &m); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkText(b *testing.B) {
	for _, f := range benchFrames() {
		b.Run(f.name+"/wire", func(b *testing.B) {
			d := NewDecoder()
			b.ReportAllocs()
			b.SetBytes(int64(len(f.frame)))
			for b.Loop() {
				if _, err := d.Text(f.frame); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(f.name+"/encoding-json", func(b *testing.B) { baseline(b, f.frame) })
	}
}

func BenchmarkPeek(b *testing.B) {
	for _, f := range benchFrames() {
		b.Run(f.name+"/wire", func(b *testing.B) {
			d := NewDecoder()
			b.ReportAllocs()
			b.SetBytes(int64(len(f.frame)))
			for b.Loop() {
				if _, _, ok := d.Peek(f.frame); !ok {
					b.Fatal("not ok")
				}
			}
		})
		b.Run(f.name+"/encoding-json", func(b *testing.B) { baseline(b, f.frame) })
	}
}

func BenchmarkBinaryHeader(b *testing.B) {
	metadata := `{"node_id": "31", "display_node_id": "31", "real_node_id": "31", "prompt_id": "` + benchPromptID + `", "parent_node_id": null, "image_type": "image/jpeg"}`
	frame := binaryFrame(KindPreviewWithMetadata, uint32(len(metadata)), metadata, strings.Repeat("x", 100<<10))
	b.Run("wire", func(b *testing.B) {
		d := NewDecoder()
		b.ReportAllocs()
		for b.Loop() {
			if _, _, err := d.BinaryHeader(frame); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("encoding-json", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var m struct {
				NodeID   string `json:"node_id"`
				PromptID string `json:"prompt_id"`
			}
			if err := json.Unmarshal(frame[8:8+len(metadata)], &m); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// benchQueue is a queue of n prompts with graphs of about 16 KB.
func benchQueue(n int) []byte {
	var graph strings.Builder
	for i := range 100 {
		if i > 0 {
			graph.WriteString(", ")
		}
		fmt.Fprintf(&graph, `"%d": {"class_type": "KSampler", "inputs": {"seed": %d, "steps": 20, "cfg": 7.5, "sampler_name": "euler", "model": ["%d", 0], "positive": ["%d", 1]}}`, i, i*7919, i+1, i+2)
	}
	var b bytes.Buffer
	b.WriteString(`{"queue_running": [], "queue_pending": [`)
	for i := range n {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, `[%d, "3e6a5a3d-0469-45e3-bc84-%012d", {%s}, {"client_id": "583bf5366eb742db9db9c04ab41a8d7b", "comfyui_go": `+
			`{"job_id": "job-%d", "attempt": 1, "nonce": "n%d"}}, ["9"]]`, n-i, i, graph.String(), i, i)
	}
	b.WriteString("]}")
	return b.Bytes()
}

func BenchmarkQueue(b *testing.B) {
	body := benchQueue(100)
	b.Run("wire", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(body)))
		for b.Loop() {
			if _, _, err := Queue(body, false); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("encoding-json", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(body)))
		for b.Loop() {
			var q struct {
				Running [][]json.RawMessage `json:"queue_running"`
				Pending [][]json.RawMessage `json:"queue_pending"`
			}
			if err := json.Unmarshal(body, &q); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSanitize(b *testing.B) {
	body := benchQueue(100)
	for _, c := range []struct {
		name string
		body []byte
	}{{"clean", body}, {"one-nan", append(bytes.Clone(body[:len(body)-1]), `, "x": NaN}`...)}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(c.body)))
			for b.Loop() {
				Sanitize(c.body)
			}
		})
	}
}
