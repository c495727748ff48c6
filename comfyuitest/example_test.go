package comfyuitest_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/comfypod/comfyui/comfyuitest"
)

// TestSynctestExamples runs the examples that need a test around them.
func TestSynctestExamples(t *testing.T) {
	t.Parallel()
	t.Run("a day of work", testADayOfWork)
	t.Run("late request", testLateRequest)
}

// request sends a body to the pod and returns the answer's, or the error.
func request(pod *comfyuitest.Pod, method, path, body string) string {
	req, err := http.NewRequestWithContext(context.Background(), method, pod.URL()+path, strings.NewReader(body))
	if err != nil {
		return err.Error()
	}
	resp, err := pod.Client().Do(req)
	if err != nil {
		return "no answer"
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// A pod runs a graph of built-in nodes and keeps the files.
func Example() {
	pod := comfyuitest.NewPod()
	defer pod.Close()

	var accepted struct {
		PromptID string `json:"prompt_id"`
	}
	answer := request(pod, http.MethodPost, "/prompt", `{"prompt": {
		"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 16711680}},
		"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "red"}}}}`)
	if err := json.Unmarshal([]byte(answer), &accepted); err != nil {
		fmt.Println(err)
		return
	}
	if err := pod.WaitIdle(context.Background()); err != nil {
		fmt.Println(err)
		return
	}

	var history map[string]struct {
		Outputs json.RawMessage
	}
	if err := json.Unmarshal([]byte(request(pod, http.MethodGet, "/history/"+accepted.PromptID, "")), &history); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s\n", history[accepted.PromptID].Outputs)
	fmt.Printf("%q\n", request(pod, http.MethodGet, "/view?filename=red_00001_.png", "")[:8])
	// Output:
	// {"2": {"images": [{"filename": "red_00001_.png", "subfolder": "", "type": "output"}]}}
	// "\x89PNG\r\n\x1a\n"
}

// A class of one's own: it takes a text, reports a step, and shows what it made of it.
func ExampleWithNode() {
	shout := comfyuitest.Node{
		Output: true,
		Inputs: map[string]any{"text": "STRING"},
		Run: func(_ context.Context, c *comfyuitest.Call) error {
			text, _ := c.Inputs["text"].(string)
			c.Progress(1, 1)
			c.Put("text", strings.ToUpper(text))
			return nil
		},
	}
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Shout", shout))
	defer pod.Close()

	refused := request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Shout", "inputs": {}}}}`)
	fmt.Println(strings.Contains(refused, "required_input_missing"))

	request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Shout", "inputs": {"text": "hello"}}}}`)
	if err := pod.WaitIdle(context.Background()); err != nil {
		fmt.Println(err)
		return
	}
	history := request(pod, http.MethodGet, "/history", "")
	fmt.Println(strings.Contains(history, `"text": ["HELLO"]`))
	// Output:
	// true
	// true
}

// The answer to a POST is lost, though the pod has queued the prompt: a client must not post it again.
func ExamplePod_Inject() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Work", comfyuitest.Steps(3, 0)))
	defer pod.Close()

	pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.DropAfter})
	fmt.Println(request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Work", "inputs": {}}},
		"prompt_id": "5e1b5d7e-8a3c-4d53-9a53-0a4b5f0c9d11"}`))

	if err := pod.WaitIdle(context.Background()); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("runs:", pod.Runs("5e1b5d7e-8a3c-4d53-9a53-0a4b5f0c9d11"))
	// Output:
	// no answer
	// runs: 1
}

// A crash takes the queue and the history; what the pod has counted stays.
func ExamplePod_Restart() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Forever", comfyuitest.Steps(1, 1000*time.Hour)))
	defer pod.Close()

	request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Forever", "inputs": {}}}}`)
	pod.Restart(0)
	fmt.Println(request(pod, http.MethodGet, "/queue", ""))
	fmt.Println("posts:", pod.Prompts()[0].Posts, "ends:", pod.Prompts()[0].Ends)
	// Output:
	// {"queue_running": [], "queue_pending": []}
	// posts: 1 ends: 0
}

// Old releases behave otherwise: this one does not know the id that the client chose.
func ExampleWithVersion() {
	pod := comfyuitest.NewPod(comfyuitest.WithVersion("0.3.40"), comfyuitest.WithNode("Work", comfyuitest.Steps(1, 0)))
	defer pod.Close()

	answer := request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Work", "inputs": {}}}, "prompt_id": "mine"}`)
	fmt.Println(strings.Contains(answer, "mine"))
	// Output:
	// false
}

// An exception of a GPU that ran out of memory, with the advice that the server appends to it.
func ExampleFail() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Sampler", comfyuitest.Fail("torch.OutOfMemoryError", "Allocation on device")))
	defer pod.Close()

	request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Sampler", "inputs": {}}}}`)
	if err := pod.WaitIdle(context.Background()); err != nil {
		fmt.Println(err)
		return
	}
	history := request(pod, http.MethodGet, "/history", "")
	fmt.Println(strings.Contains(history, `"exception_message": "Allocation on device\nThis error means you ran out of memory`))
	// Output:
	// true
}
