// Package comfyui runs ComfyUI workflows on GPU pods of your own, and follows each job to its true end.
//
// A ComfyUI server takes a graph, runs it some time later, tells about it on a WebSocket, and remembers the outcome until it
// restarts. Replies get lost, sockets drop or go silent, proxies time out, pods crash, and so do the programs that wait for them.
// This package makes of that an ordinary call with a certain answer: a [Result] with its outputs, or an [*Error] that says what kind
// of failure it is, where it happened and whether it is worth another try.
//
// # Quick start
//
// A [PodClient] drives one ComfyUI process. Execute runs a [Workflow] and waits:
//
//	client, err := comfyui.NewPodClient("http://127.0.0.1:8188")
//	if err != nil {
//		return err
//	}
//	defer client.Close()
//	workflow, err := comfyui.LoadWorkflow("workflow.json")
//	if err != nil {
//		return err
//	}
//	if err := workflow.Set("KSampler", "seed", 42); err != nil {
//		return err
//	}
//	result, err := client.Execute(ctx, workflow)
//	if err != nil {
//		return err
//	}
//	paths, err := result.SaveAll(ctx, "out")
//
// The same from a shell, with a pod inside the program, so that nothing has to be installed:
//
//	go run github.com/comfypod/comfyui/examples/quickstart@latest
//
// NewPodClient does no I/O; the first job opens the WebSocket. The URL must lead to one process: behind a load balancer over
// several, no answer can be trusted. A client is safe for concurrent use, and one per pod is enough for any number of jobs.
//
// # Workflows
//
// [LoadWorkflow] and [ParseWorkflow] read JSON in API format ("Export (API)" in the editor), the body of a POST /prompt, or an image,
// video or sound that ComfyUI saved and that carries its graph. Set and Get name a node by its id, else by a title that no
// other node has, else by a class that no other node has. A Workflow keeps what it does not know, and every digit of a seed. Clone
// is cheap: give each job of a batch a clone of its own.
//
// A workflow in the editor's own UI format loads too, but a pod does not run it: Execute, Submit and Convert refuse it, before anything is sent,
// with an error that says how to save it.
//
// # Jobs and their ids
//
// Each Execute or Submit makes a job. [WithJobID] names it, a new UUID does otherwise. The id is what makes a request idempotent: whoever asks
// again with the same id and an equal workflow, in this process or in any other that shares the [Store], joins the job while it runs and gets its
// stored result when it has ended. The same id with another workflow is [ErrJobConflict]. [RerunFailed] starts an ended job again
// unless it succeeded.
//
// A job has one or more attempts, and each attempt one prompt id, derived from job id, workflow and number: two processes that repeat an
// attempt use the same id, and a lost record can still be matched with what the pod runs.
//
// [PodClient.Submit] returns a [*Job] once the pod has taken the job; [Job.Wait], [Job.Events] and [Job.Progress] follow it and
// [Job.Cancel] takes it off the pod: it returns when the job has ended, however it did. When the ctx of Execute, Submit or Wait ends, the
// job goes on (CategoryContext), unless [CancelWithContext] was given. Close cancels no job either.
//
// [WithInput] uploads a file before each attempt. [WithLimits] bounds a job; [AllowPartial] accepts that the pod drops
// outputs that it finds invalid; [AtMostOnce] forbids a second POST whatever happens. [WithNumber] and [AtFront] order the pod's queue, and
// [WithMaxInFlight] keeps it short.
//
// # Progress and events
//
// [Progress] blends finished nodes and the steps of running ones into one Fraction, which never falls, not even when another attempt
// begins, and is 1 only for a job that succeeded. It has the running node with class and title, its step, the place in the
// queue and an estimate of the time left.
//
// [Job.Events] is a sequence that begins with a snapshot and ends with the job's end, also when another process drives the job:
//
//	for event := range job.Events(ctx) {
//		fmt.Printf("%s %.0f%% %s\n", event.Kind, 100*event.Progress.Fraction, event.Progress.NodeTitle)
//	}
//
// [OnEvent] calls a function instead, and [Hooks] see every job of a client. A slow receiver slows nobody: it gets every state change
// and of the rest the newest; a hook that hangs for long misses the oldest, see [Hooks]. Preview images come only to those who ask, with [WithPreviews]. An [Event] marshals to JSON and back, its error
// included.
//
// The pod's /queue and /history are the truth; the WebSocket is a hint and a feed of progress. Without it (a proxy that refuses
// it, an outage, a socket that is open and deaf) jobs are followed by polling, and only the detail of their progress is lost.
//
// # Errors and retries
//
// Every error of a call is an [*Error], but for those of pure functions. Its [Category] says what kind of failure it is; CategoryOf finds it in
// any chain. Below it stand the cause and, where there is one, a [*ValidationError] (the pod refused the workflow: by node and input), an
// [*ExecutionError] (a node raised an exception), or a sentinel such as [ErrJobLost], [ErrInterrupted], [ErrOutcomeUnknown]. All of them survive
// JSON. No text and no JSON of an error holds a credential.
//
// Retries happen at two levels, by one loop, under the [RetryPolicy] of the category ([DefaultRetryPolicy], [WithRetry]):
//
//   - a call that is safe to repeat, after a failure of the network, a time-out, 429, 502, 503, 504 and their like. Retry-After is honoured, and a
//     budget per pod keeps ten thousand callers from storming one that is in trouble.
//   - a job, as a new attempt: by default one more when the pod restarted and lost it, and one more after running out of memory (the pod is
//     told to free its memory first).
//
// POST /prompt is safe to repeat never. When its answer is lost or proves nothing (a reset, a 502, a 524), the prompt id is looked for in the
// pod's queue and history for [Timing].Grace, and only what is absent is posted again. The README says in which cases a
// workflow can run twice all the same; AtMostOnce closes what can be closed.
//
// # Recovery and stores
//
// A [Record] of each job is in the [Store] before the first POST. With [NewMemoryStore], the default, it ends with the process; with [NewRedisStore] jobs
// outlive it: a new process calls [PodClient.Recover] and goes on where the last one was, without running anything twice:
//
//	for job, err := range client.Recover(ctx) {
//		if err != nil {
//			log.Print(err)
//			continue
//		}
//		go finish(job)
//	}
//
// Who drives a job holds its lease ([Timing].Lease, renewed at a third) and an epoch; a former owner is refused every write, finds out, and follows
// instead: its Wait returns the new owner's result. [PodClient.Attach] does the same for one job id. While the store is away running jobs are
// followed on, and new ones are refused (CategoryStorage).
//
// What is told across processes is at least once: events, callbacks after a recovery, files that are saved again. Functions and secrets are not
// in the record: a recovering client that wants callbacks has [Hooks], or OnEvent among its [WithJobDefaults], and it needs its own
// WithComfyAPIKey. A job with [WithInput] whose process died before the upload fails with CategoryMissingAsset when somebody else recovers it; Execute
// with its id and options goes on with it.
//
// Any store can be used that passes the suite in comfyuitest/storetest. docs/recovery.md in the repository has the data model in Redis,
// each point at which a process can die, and what to monitor.
//
// # Many pods
//
// One client drives one pod; clients of several pods share one Store, under names that differ ([WithPodName]). The program chooses the pod of each
// job, by [PodClient.Health] for example. A job stays with its pod: another pod's client gets [ErrOtherPod] until the job has ended, and
// its stored end afterwards.
//
// # Health
//
// [PodClient.Health] looks at a pod and says what it is good for: ready, busy, starting, degraded (HTTP works, the WebSocket does not), stalled
// (prompts wait and none runs: the worker is dead), poisoned (a CUDA fault that only a restart clears) or down. An unreachable pod is a
// state, not an error. [PodClient.WaitReady] waits for a pod that starts. [Hooks].Health is told of changes while jobs are followed.
//
// # Timing
//
// Every wait is bounded; [Timing] names the bounds and their defaults. Those that matter most:
//
//   - Grace, 10s: how long an unanswered POST is looked for, and the time between the two looks that make a job lost.
//   - Gone, 10m: a pod that is unreachable so long ends its jobs with [ErrPodGone].
//   - Poll, 1s, and PollStreaming, 15s: how often the pod's queue is read without and with a WebSocket. It is read less often where that is
//     slow.
//   - Lease, 30s: how soon another process may take a job over when its owner dies.
//   - [Limits].Stall, 10m: a job is given up when neither it nor the pod's queue has moved for so long.
//
// # Files
//
// [Result].SaveAll saves a job's files under a directory, and never leaves it, whatever the pod calls them. Downloads resume after a cut, and a
// file has its name when it is complete. [Output].Open and [PodClient.Open] stream; [PodClient.Upload] and [PodClient.UploadMask] send.
//
// # Testing with comfyuitest
//
// Package comfyuitest is a ComfyUI pod in process: the real server's routes, queue, history, messages and races, for the releases from
// 0.3.40 on, with the built-in image nodes that need no model, nodes that you script, and faults on demand: lost replies, cut and deaf sockets,
// restarts, a dead worker. With WithPipes it works inside testing/synctest, where a ten-minute time-out takes no time:
//
//	pod := comfyuitest.Start(t, comfyuitest.WithNode("KSampler", comfyuitest.Steps(20, time.Second)))
//	pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.DropAfter}) // queued, and the answer lost
//	client, err := comfyui.NewPodClient(pod.URL())
//
// # Resources
//
// Goroutines per pod are bounded, whatever the number of jobs: a few of the client's own, and one for each callback in progress. What a slow reader leaves lying is
// bounded too. The package keeps no global state, logs nothing without [WithLogger], and reads no environment variables but those that name a
// proxy. [PodClient.Stats] counts what a client has done.
package comfyui
