// Package comfyuitest is a ComfyUI pod inside the test: a server that answers, runs graphs and fails as real ones do, without
// Python, a GPU, or a model.
//
//	pod := comfyuitest.Start(t, comfyuitest.WithNode("Sampler", comfyuitest.Steps(20, time.Second)))
//	client := NewMyClient(pod.URL())
//
// It speaks ComfyUI's HTTP routes and its WebSocket, message for message: the order of the frames of a job, who receives which,
// previews, cached runs, expansions, blocked outputs, validation and its answers, the queue's order, history, jobs, files. It does
// so as the release of [WithVersion] does, from 0.3.40 on, with that release's faults. The package's own tests replay recordings of
// 0.3.40, 0.3.64, 0.8.0, 0.27.0 and 0.33.0; what differs in other releases follows the history of the server's source.
//
// # Nodes
//
// The pod runs the built-in nodes that need no model for real: EmptyImage, LoadImage, ImageScale, ImageInvert, ImageBlend,
// SaveImage, PreviewImage and others of their kind, with real PNG files that carry the graph. [WithNode] adds classes of its own:
// [Steps] takes its time and reports it, [Fail] raises, and any other [Node] is a Go function. Its [Call] reports progress and
// previews, saves files, puts anything into the outputs, hands values to the nodes behind it, blocks them, expands to a subgraph,
// and, through [Call.Pod], kills the worker or the server.
//
// The server caches: a node whose class and inputs, and those of all nodes before it, are as they were does not run again. Change
// an input, a seed for instance, to run a graph anew.
//
// # Faults
//
// [Pod.Inject] does things to HTTP requests, the one that opens a socket included: an answer that is not the pod's, before or
// after it handled the request, a lost reply, a reset, a hang, half a body. [Pod.CutStreams] and [Pod.RefuseStreams] spoil sockets,
// [Pod.SendText] and [Pod.SendBinary] send what no server would. [Pod.Restart] is a crash, [Pod.Freeze] a busy event loop,
// [Pod.KillWorker] a dead worker thread, [Pod.Interrupt] and [Pod.ClearHistory] are somebody else's doing.
// [WithHandler] puts a proxy in front, for the rest.
//
// What makes no sense, such as a route that no request can match or a negative size, panics: a test must not pass because its
// fault never came about. What a scripted node does wrong ends the job with an error that says so.
//
// The races are the server's own and need no injection: an interrupt that comes too late is lost, a success is told before
// the history has it, a client that is back on the socket too soon is deaf, one that does not read stalls everyone.
//
// # What happened
//
// The pod counts, over restarts: [Pod.Prompts] and [Pod.Runs] tell how often a prompt was posted, began, succeeded and was
// interrupted, so that a test can say that it ran once. [Pod.Requests] counts requests, [Pod.Streams] open sockets, and
// [Pod.WaitIdle] waits until nothing is left to run.
//
// # Time
//
// A pod takes no time of its own: only nodes and faults wait, and only as long as they are told to. With [WithPipes] a pod
// works inside a testing/synctest bubble, where hours pass at once and a goroutine that is left behind fails the test. The pod and
// its clients must be made inside, and the clients' idle connections closed, or shared with [Pod.Client]:
//
//	synctest.Test(t, func(t *testing.T) {
//		pod := comfyuitest.Start(t, comfyuitest.WithPipes(), comfyuitest.WithNode("Sampler", comfyuitest.Steps(20, time.Hour)))
//		client := NewMyClient(pod.URL(), pod.Client(), pod.DialContext)
//		…
//	})
package comfyuitest
