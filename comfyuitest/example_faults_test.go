package comfyuitest_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/comfypod/comfyui/comfyuitest"
	"github.com/gorilla/websocket"
)

// dial opens a socket to the pod.
func dial(pod *comfyuitest.Pod, clientID string) (*websocket.Conn, error) {
	dialer := websocket.Dialer{NetDialContext: pod.DialContext}
	conn, resp, err := dialer.DialContext(context.Background(), "ws"+strings.TrimPrefix(pod.URL(), "http")+"/ws?clientId="+clientID, nil) //nolint:bodyclose // an upgrade has none
	if err != nil && resp != nil {
		return nil, fmt.Errorf("%w: %d", err, resp.StatusCode)
	}
	return conn, err
}

// An overloaded proxy answers twice for the pod, then lets requests through.
func ExampleFault() {
	pod := comfyuitest.NewPod()
	defer pod.Close()

	pod.Inject(comfyuitest.Fault{
		Route: "GET /queue", Times: 2,
		Effect: comfyuitest.Answer, Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"7"}}, Body: "slow down",
	})
	for range 3 {
		fmt.Println(request(pod, http.MethodGet, "/queue", ""))
	}
	fmt.Println("requests:", pod.Requests("GET /queue"))
	// Output:
	// slow down
	// slow down
	// {"queue_running": [], "queue_pending": []}
	// requests: 3
}

// A socket ends without a close frame, as when a machine dies.
func ExamplePod_CutStreams() {
	pod := comfyuitest.NewPod()
	defer pod.Close()

	conn, err := dial(pod, "me")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = conn.Close() }()
	pod.CutStreams(comfyuitest.CutReset)
	for err == nil {
		_, _, err = conn.ReadMessage()
	}
	fmt.Println("closed in good order:", websocket.IsCloseError(err, websocket.CloseNormalClosure))
	fmt.Println("open sockets:", pod.Streams())
	// Output:
	// closed in good order: false
	// open sockets: 0
}

// A proxy that does not know WebSockets: HTTP works, sockets do not.
func ExamplePod_RefuseStreams() {
	pod := comfyuitest.NewPod()
	defer pod.Close()

	pod.RefuseStreams(http.StatusForbidden)
	_, err := dial(pod, "me")
	fmt.Println(err)
	fmt.Println(request(pod, http.MethodGet, "/prompt", ""))
	// Output:
	// websocket: bad handshake: 403
	// {"exec_info": {"queue_remaining": 0}}
}

// The server is busy, importing a custom node say: it takes requests, and answers them all when it is done.
func ExamplePod_Freeze() {
	pod := comfyuitest.NewPod()
	defer pod.Close()

	thaw := pod.Freeze()
	answer := make(chan string, 1)
	go func() { answer <- request(pod, http.MethodGet, "/prompt", "") }()
	select {
	case text := <-answer:
		fmt.Println(text)
	default:
		fmt.Println("no answer yet")
	}
	thaw()
	fmt.Println(<-answer)
	// Output:
	// no answer yet
	// {"exec_info": {"queue_remaining": 0}}
}

// The worker thread is dead: prompts are accepted, and none runs until the pod is restarted.
func ExamplePod_KillWorker() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Work", comfyuitest.Steps(1, 0)))
	defer pod.Close()

	pod.KillWorker()
	request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Work", "inputs": {}}}}`)
	fmt.Println(request(pod, http.MethodGet, "/prompt", ""))
	fmt.Println("runs:", pod.Prompts()[0].Runs)
	// Output:
	// {"exec_info": {"queue_remaining": 1}}
	// runs: 0
}

// Somebody else interrupts whatever runs. The node hears it by its ctx.
func ExamplePod_Interrupt() {
	started := make(chan struct{})
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Work", comfyuitest.Node{
		Output: true,
		Run: func(ctx context.Context, _ *comfyuitest.Call) error {
			close(started)
			<-ctx.Done()
			return ctx.Err()
		},
	}))
	defer pod.Close()

	request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Work", "inputs": {}}}}`)
	<-started
	pod.Interrupt()
	if err := pod.WaitIdle(context.Background()); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("interrupts:", pod.Prompts()[0].Interrupts, "ends:", pod.Prompts()[0].Ends)
	fmt.Println(strings.Contains(request(pod, http.MethodGet, "/history", ""), "execution_interrupted"))
	// Output:
	// interrupts: 1 ends: 0
	// true
}

// The history of a pod that others use is cleared before a client has read it.
func ExamplePod_ClearHistory() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Work", comfyuitest.Steps(1, 0)))
	defer pod.Close()

	request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Work", "inputs": {}}}}`)
	if err := pod.WaitIdle(context.Background()); err != nil {
		fmt.Println(err)
		return
	}
	pod.ClearHistory()
	fmt.Println(request(pod, http.MethodGet, "/history", ""))
	fmt.Println("ends:", pod.Prompts()[0].Ends)
	// Output:
	// {}
	// ends: 1
}

// What no fault can say: a proxy that wants a login and a path prefix.
func ExampleWithHandler() {
	pod := comfyuitest.NewPod(comfyuitest.WithHandler(func(pod http.Handler) http.Handler {
		pod = http.StripPrefix("/gpu-7", pod)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, password, _ := r.BasicAuth(); password != "sesame" {
				http.Error(w, "who are you?", http.StatusUnauthorized)
				return
			}
			pod.ServeHTTP(w, r)
		})
	}))
	defer pod.Close()

	fmt.Print(request(pod, http.MethodGet, "/gpu-7/prompt", ""))
	fmt.Println("seen by the pod:", pod.Requests(""))
	// Output:
	// who are you?
	// seen by the pod: 0
}

// A node that makes others: it expands to a graph of its own, whose last node gives its value.
func ExampleCall_Expand() {
	twice := comfyuitest.Node{Run: func(_ context.Context, c *comfyuitest.Call) error {
		invert := func(image any) map[string]any {
			return map[string]any{"class_type": "ImageInvert", "inputs": map[string]any{"image": image}}
		}
		c.Expand(map[string]any{"1": invert(c.Inputs["image"]), "2": invert([]any{"1", 0})}, []any{"2", 0})
		return nil
	}}
	pod := comfyuitest.NewPod(comfyuitest.WithNode("InvertTwice", twice))
	defer pod.Close()

	conn, err := dial(pod, "me")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = conn.Close() }()
	request(pod, http.MethodPost, "/prompt", `{"client_id": "me", "prompt": {
		"5": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
		"6": {"class_type": "InvertTwice", "inputs": {"image": ["5", 0]}},
		"7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}}}}`)
	var frame struct {
		Type string
		Data struct {
			Node        any
			DisplayNode any `json:"display_node"`
		}
	}
	for frame.Type != "execution_success" {
		if err := conn.ReadJSON(&frame); err != nil {
			fmt.Println(err)
			return
		}
		if frame.Type == "executing" {
			fmt.Println(frame.Data.Node, "shown as", frame.Data.DisplayNode)
		}
	}
	// Output:
	// 5 shown as 5
	// 6 shown as 6
	// 6.0.0.1 shown as 6
	// 6.0.0.2 shown as 6
	// 7 shown as 7
}

// A node that blocks what comes after it: the job still succeeds, though the frames tell of an error that is none.
func ExampleCall_Block() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Gate", comfyuitest.Node{
		Run: func(_ context.Context, c *comfyuitest.Call) error {
			c.Block("no face was found")
			return nil
		},
	}))
	defer pod.Close()

	request(pod, http.MethodPost, "/prompt", `{"prompt": {
		"1": {"class_type": "Gate", "inputs": {}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}}`)
	if err := pod.WaitIdle(context.Background()); err != nil {
		fmt.Println(err)
		return
	}
	history := request(pod, http.MethodGet, "/history", "")
	fmt.Println(strings.Contains(history, `"outputs": {}`), strings.Contains(history, `"status_str": "success"`))
	// Output:
	// true true
}
