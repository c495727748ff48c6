package comfyui_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/comfypod/comfyui"
)

func benchRecord(workflow int) *comfyui.Record {
	return &comfyui.Record{
		Schema: 1, Pod: "http://127.0.0.1:8188", ClientID: "1e5a0c9e-4f0e-4a4e-9d58-0f5d4b9a7a11", Owner: "owner",
		PromptID: "8a2f3c1e-4f0e-5a4e-9d58-0f5d4b9a7a11", Attempt: 1, WorkflowHash: "sha256:0123456789abcdef0123456789abcdef",
		Workflow:  json.RawMessage(`{"1":"` + string(bytes.Repeat([]byte("w"), workflow)) + `"}`),
		Progress:  comfyui.Progress{Status: comfyui.StatusPending, QueueAhead: -1, NodesTotal: 8},
		CreatedAt: time.Now(), Retention: time.Hour,
	}
}

// What the store costs one job: its record made, queued, running and ended.
func BenchmarkMemoryStoreJob(b *testing.B) {
	for _, size := range []int{1 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("workflow=%dKiB", size>>10), func(b *testing.B) {
			store, ctx := comfyui.NewMemoryStore(), b.Context()
			template := benchRecord(size)
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				n++
				r := *template
				r.JobID = strconv.Itoa(n)
				got, err := store.Create(ctx, &r, time.Minute)
				for _, status := range []comfyui.Status{comfyui.StatusQueued, comfyui.StatusRunning, comfyui.StatusSucceeded} {
					if err != nil {
						b.Fatal(err)
					}
					got.Rev++
					got.Progress.Status = status
					got.Retention = time.Millisecond
					got, err = store.Update(ctx, got)
				}
			}
		})
	}
}

func BenchmarkRecordJSON(b *testing.B) {
	r := benchRecord(0)
	r.Workflow = nil
	data, err := json.Marshal(r)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("marshal", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := r.MarshalJSON(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unmarshal", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			var got comfyui.Record
			if err := got.UnmarshalJSON(data); err != nil {
				b.Fatal(err)
			}
		}
	})
}
