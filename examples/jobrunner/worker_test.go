package main

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

const payload = `{"1": {"class_type": "Node", "inputs": {"seed": 7}}}`

// written is what a task was given as its result, one after another.
type written struct {
	mu   sync.Mutex
	docs []string
}

func (w *written) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.docs = append(w.docs, string(p))
	return len(p), nil
}

func (w *written) last(t *testing.T, v any) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	require.NotEmpty(t, w.docs)
	require.NoError(t, json.Unmarshal([]byte(w.docs[len(w.docs)-1]), v))
}

// newWorker is a handler with a client of its own, as each process has one.
func newWorker(t *testing.T, pod *comfyuitest.Pod, store comfyui.Store) *handler {
	t.Helper()
	// Retries are asynq's business here, not the library's.
	client, err := comfyui.NewPodClient(pod.URL(), comfyui.WithStore(store), comfyui.WithRetry(comfyui.CategoryOutOfMemory, comfyui.RetryPolicy{}))
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return &handler{pod: client, store: store}
}

// total counts the runs of all prompts.
func total(pod *comfyuitest.Pod) (n int) {
	for _, p := range pod.Prompts() {
		n += p.Runs
	}
	return n
}

func TestProgressThenResult(t *testing.T) {
	t.Parallel()
	pod := comfyuitest.Start(t, comfyuitest.WithNode("Node", comfyuitest.Steps(10, 10*time.Millisecond)))
	h, out := newWorker(t, pod, comfyui.NewMemoryStore()), &written{}
	require.NoError(t, h.run(t.Context(), "order-7", []byte(payload), out))

	var first comfyui.Progress
	require.NoError(t, json.Unmarshal([]byte(out.docs[0]), &first))
	require.False(t, first.Status.Terminal())
	var result comfyui.Result
	out.last(t, &result)
	require.Equal(t, "order-7", result.JobID)
	require.Equal(t, comfyui.StatusSucceeded, result.Status)
	require.Len(t, result.Outputs, 1)
}

// What asynq retries, and how often the pod has run the job after two deliveries.
func TestRedelivery(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		node    comfyuitest.Node
		payload string
		ok      bool // the delivery succeeds
		retried bool // else: asynq delivers the task again
		runs    int
	}{
		"success is not repeated":              {node: comfyuitest.Steps(1, 0), ok: true, runs: 1},
		"a failed node is final":               {node: comfyuitest.Fail("ValueError", "no such thing"), runs: 1},
		"out of memory gets a new attempt":     {node: comfyuitest.Fail("torch.OutOfMemoryError", "Allocation on device"), retried: true, runs: 2},
		"a missing node may be installed soon": {payload: `{"1": {"class_type": "Missing", "inputs": {}}}`, retried: true},
		"what is no workflow is final":         {payload: `[]`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod := comfyuitest.Start(t, comfyuitest.WithNode("Node", c.node))
			h := newWorker(t, pod, comfyui.NewMemoryStore())
			if c.payload == "" {
				c.payload = payload
			}
			for range 2 {
				err := verdict(h.run(t.Context(), "order-7", []byte(c.payload), &written{}))
				if c.ok {
					require.NoError(t, err)
					continue
				}
				require.Error(t, err)
				require.Equal(t, c.retried, !isSkipped(err), "%v", err)
				require.False(t, workerGone(err), "%v", err)
			}
			require.Equal(t, c.runs, total(pod))
		})
	}
}

// A retry that comes when the pod is well again.
func TestRetrySucceeds(t *testing.T) {
	t.Parallel()
	failures := 1
	pod := comfyuitest.Start(t, comfyuitest.WithNode("Node", comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
		if failures > 0 {
			failures--
			return &comfyuitest.NodeError{ExceptionType: "torch.OutOfMemoryError", Message: "Allocation on device"}
		}
		c.Put("text", "done")
		return nil
	}}))
	h, out := newWorker(t, pod, comfyui.NewMemoryStore()), &written{}
	err := verdict(h.run(t.Context(), "order-7", []byte(payload), out))
	require.Error(t, err)
	require.False(t, isSkipped(err))
	require.GreaterOrEqual(t, retryDelay(0, err, nil), 15*time.Second)

	require.NoError(t, h.run(t.Context(), "order-7", []byte(payload), out))
	var result comfyui.Result
	out.last(t, &result)
	require.Equal(t, 2, result.Attempt)
	require.Equal(t, "done", result.Outputs[0].Text)
}

// A cancel stands, even if asynq delivers the task again because it has not heard of it.
func TestCancelStands(t *testing.T) {
	t.Parallel()
	node := newGate()
	pod := comfyuitest.Start(t, comfyuitest.WithNode("Node", node.Node))
	h := newWorker(t, pod, comfyui.NewMemoryStore())
	first := make(chan error, 1)
	go func() { first <- verdict(h.run(t.Context(), "order-7", []byte(payload), &written{})) }()
	<-node.running
	job, err := h.pod.Attach(t.Context(), "order-7")
	require.NoError(t, err)
	require.NoError(t, job.Cancel(t.Context()))
	for _, err := range []error{<-first, verdict(h.run(t.Context(), "order-7", []byte(payload), &written{}))} {
		require.ErrorIs(t, err, comfyui.ErrCancelled)
		require.True(t, isSkipped(err))
	}
	require.Equal(t, 1, total(pod))
}

// A worker that stops in the middle of a job, in each way that it may, and another one that gets the task then.
func TestWorkerGone(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]func(h *handler, cancel context.CancelFunc){
		"closed":         func(h *handler, _ context.CancelFunc) { _ = h.pod.Close() },
		"context ended":  func(_ *handler, cancel context.CancelFunc) { cancel() },
		"both at a time": func(h *handler, cancel context.CancelFunc) { cancel(); _ = h.pod.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node := newGate()
			pod := comfyuitest.Start(t, comfyuitest.WithNode("Node", node.Node))
			store := comfyui.NewMemoryStore()

			h := newWorker(t, pod, store)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- verdict(h.run(ctx, "order-7", []byte(payload), &written{})) }()
			<-node.running
			stop(h, cancel)
			err := <-ended
			require.Error(t, err)
			require.True(t, workerGone(err), "%v", err)
			require.False(t, isSkipped(err), "%v", err)
			require.Zero(t, retryDelay(0, err, nil))

			other, out := newWorker(t, pod, store), &written{}
			go func() { ended <- verdict(other.run(t.Context(), "order-7", []byte(payload), out)) }()
			require.Eventually(t, func() bool { return other.pod.Stats().Joined == 1 }, 10*time.Second, time.Millisecond)
			node.open()
			require.NoError(t, <-ended)
			var result comfyui.Result
			out.last(t, &result)
			require.Equal(t, comfyui.StatusSucceeded, result.Status)
			require.Equal(t, 1, total(pod))
		})
	}
}

// A kill is no failure of the task: asynq's own error for it is not counted, and the task comes again at once.
func TestKilledWorkerIsNotCounted(t *testing.T) {
	t.Parallel()
	require.True(t, workerGone(asynq.ErrLeaseExpired))
	require.Zero(t, retryDelay(0, asynq.ErrLeaseExpired, nil))
	require.True(t, workerGone(context.DeadlineExceeded), "the delivery took too long")
}

func TestRetryDelayHonoursThePod(t *testing.T) {
	t.Parallel()
	err := verdict(&comfyui.Error{Category: comfyui.CategoryOverloaded, RetryAfter: time.Hour})
	require.Equal(t, time.Hour, retryDelay(0, err, nil))
}

// gate is a node that runs until it is opened.
type gate struct {
	comfyuitest.Node
	running chan struct{}
	open    func()
}

func newGate() *gate {
	opened := make(chan struct{})
	g := &gate{running: make(chan struct{}), open: sync.OnceFunc(func() { close(opened) })}
	g.Node = comfyuitest.Node{Output: true, Run: func(ctx context.Context, c *comfyuitest.Call) error {
		close(g.running)
		select {
		case <-opened:
		case <-ctx.Done():
			return ctx.Err()
		}
		c.Put("text", "done")
		return nil
	}}
	return g
}

func isSkipped(err error) bool { return errors.Is(err, asynq.SkipRetry) }
