package comfyui_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/png"
	"io"
	"log"
	"os"
	"time"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// examplePod is a pod with two nodes for the examples: a Sampler that reports its steps, and Broken.
func examplePod() (*comfyuitest.Pod, *comfyui.PodClient) {
	pod := comfyuitest.NewPod(
		comfyuitest.WithNode("Sampler", comfyuitest.Steps(4, time.Millisecond)),
		comfyuitest.WithNode("Broken", comfyuitest.Fail("RuntimeError", "mat1 and mat2 shapes cannot be multiplied")),
	)
	client, err := comfyui.NewPodClient(pod.URL())
	if err != nil {
		log.Fatal(err)
	}
	return pod, client
}

func exampleWorkflow(json string) *comfyui.Workflow {
	w, err := comfyui.ParseWorkflow([]byte(json))
	if err != nil {
		log.Fatal(err)
	}
	return w
}

const samplerGraph = `{"1": {"class_type": "Sampler", "inputs": {"seed": 1}, "_meta": {"title": "The sampler"}}}`

// Submit returns as soon as the pod has the job; its events tell how it goes on, and Wait how it ended.
func ExamplePodClient_Submit() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()
	ctx := context.Background()

	job, err := client.Submit(ctx, exampleWorkflow(samplerGraph), comfyui.WithLabels(map[string]string{"tenant": "a"}))
	if err != nil {
		log.Fatal(err)
	}
	for event := range job.Events(ctx) { // ends with the job
		switch event.Kind {
		case comfyui.EventProgress: // of progress a slow reader gets the newest only
		case comfyui.EventSucceeded, comfyui.EventFailed, comfyui.EventCancelled:
			fmt.Println("end:", event.Kind)
		}
	}
	result, err := job.Wait(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Status, "with", len(result.Outputs), "file for tenant", result.Labels["tenant"])
	// Output:
	// end: succeeded
	// succeeded with 1 file for tenant a
}

// A job id makes a request idempotent: whoever asks again, in this process or in another one that shares the store, gets the one
// run's result.
func ExamplePodClient_Execute() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()
	ctx := context.Background()

	for range 3 {
		result, err := client.Execute(ctx, exampleWorkflow(samplerGraph), comfyui.WithJobID("order-7"))
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(result.JobID, result.Status, "in attempt", result.Attempt)
	}
	fmt.Println("the pod ran", len(pod.Prompts()), "prompt,", pod.Prompts()[0].Runs, "time")

	_, err := client.Execute(ctx, exampleWorkflow(`{"1": {"class_type": "Sampler", "inputs": {"seed": 2}}}`), comfyui.WithJobID("order-7"))
	fmt.Println("another workflow:", errors.Is(err, comfyui.ErrJobConflict))
	// Output:
	// order-7 succeeded in attempt 1
	// order-7 succeeded in attempt 1
	// order-7 succeeded in attempt 1
	// the pod ran 1 prompt, 1 time
	// another workflow: true
}

// Errors tell what kind of failure it is, where it happened, and whether it is worth another try.
func ExampleError() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()
	ctx := context.Background()

	_, err := client.Execute(ctx, exampleWorkflow(`{"7": {"class_type": "Broken", "inputs": {}}}`))
	var raised *comfyui.ExecutionError
	if errors.As(err, &raised) {
		fmt.Printf("node %s (%s): %s\n", raised.NodeID, raised.NodeType, raised.Message)
	}
	fmt.Println(comfyui.CategoryOf(err), comfyui.CategoryOf(err).Retryable())

	_, err = client.Execute(ctx, exampleWorkflow(`{"1": {"class_type": "EmptyImage", "inputs": {"width": 0, "height": 8, "batch_size": 1, "color": 0}},
		"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}}`))
	var refused *comfyui.ValidationError
	if errors.As(err, &refused) {
		for id, node := range refused.Nodes {
			fmt.Printf("node %s (%s), input %s: %s\n", id, node.Class, node.Errors[0].Input, node.Errors[0].Message)
		}
	}
	fmt.Println(comfyui.CategoryOf(err), comfyui.CategoryOf(err).Retryable())
	// Output:
	// node 7 (Broken): mat1 and mat2 shapes cannot be multiplied
	// execution false
	// node 1 (EmptyImage), input width: Value 0 smaller than min of 1
	// validation false
}

// Cancel returns when the job has ended: nothing of it is left on the pod then.
func ExampleJob_Cancel() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Long", comfyuitest.Steps(1000, 10*time.Millisecond)))
	defer pod.Close()
	client, err := comfyui.NewPodClient(pod.URL())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	ctx := context.Background()

	job, err := client.Submit(ctx, exampleWorkflow(`{"1": {"class_type": "Long", "inputs": {}}}`))
	if err != nil {
		log.Fatal(err)
	}
	for event := range job.Events(ctx) {
		if event.Kind == comfyui.EventProgress {
			break
		}
	}
	if err := job.Cancel(ctx); err != nil {
		log.Fatal(err)
	}
	result, err := job.Wait(ctx)
	fmt.Println(result.Status, errors.Is(err, comfyui.ErrCancelled))
	// Output: cancelled true
}

// A file is uploaded to the pod that runs the job, before each attempt, and the node's input gets the name that the pod gave it.
func ExampleWithInput() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()

	var picture bytes.Buffer
	if err := png.Encode(&picture, image.NewRGBA(image.Rect(0, 0, 32, 16))); err != nil {
		log.Fatal(err)
	}
	workflow := exampleWorkflow(`{
		"1": {"class_type": "LoadImage", "inputs": {"image": ""}},
		"2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
		"3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "inverted"}}
	}`)
	result, err := client.Execute(context.Background(), workflow,
		comfyui.WithInput("LoadImage", "image", "photo.png", func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(picture.Bytes())), nil // a file: os.Open
		}))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Outputs[0].File)
	// Output: inverted_00001_.png [output]
}

// A job outlives the process that submitted it. The next one, with the same store, recovers what is unfinished.
func ExamplePodClient_Recover() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Sampler", comfyuitest.Steps(50, time.Millisecond)))
	defer pod.Close()
	store := comfyui.NewMemoryStore() // NewRedisStore keeps jobs when the process is gone
	ctx := context.Background()

	before, err := comfyui.NewPodClient(pod.URL(), comfyui.WithStore(store))
	if err != nil {
		log.Fatal(err)
	}
	if _, err := before.Submit(ctx, exampleWorkflow(samplerGraph), comfyui.WithJobID("order-7")); err != nil {
		log.Fatal(err)
	}
	if err := before.Close(); err != nil { // cancels no job
		log.Fatal(err)
	}

	client, err := comfyui.NewPodClient(pod.URL(), comfyui.WithStore(store))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	for job, err := range client.Recover(ctx) {
		if err != nil {
			log.Print(err)
			continue
		}
		result, err := job.Wait(ctx)
		if err != nil {
			log.Print(err)
			continue
		}
		fmt.Println(job.ID(), result.Status)
	}
	fmt.Println("the pod ran it", pod.Prompts()[0].Runs, "time")
	// Output:
	// order-7 succeeded
	// the pod ran it 1 time
}

// A pod takes a moment to start. Health tells what it is good for.
func ExamplePodClient_WaitReady() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()

	if err := client.WaitReady(ctx); err != nil {
		log.Fatal(err)
	}
	health, err := client.Health(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(health.State, health.Running, health.Pending)
	// Output: ready 0 0
}

// Limits stand in the job's record: whoever drives the job keeps them.
func ExampleWithLimits() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Long", comfyuitest.Steps(1000, 10*time.Millisecond)))
	defer pod.Close()
	client, err := comfyui.NewPodClient(pod.URL())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	_, err = client.Execute(context.Background(), exampleWorkflow(`{"1": {"class_type": "Long", "inputs": {}}}`),
		comfyui.WithLimits(comfyui.Limits{Run: 50 * time.Millisecond}))
	fmt.Println(comfyui.CategoryOf(err))
	// Output: timeout
}

// Previews are images of unfinished work, for those who ask.
func ExampleWithPreviews() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Sampler", comfyuitest.Node{
		Output: true,
		Run: func(_ context.Context, c *comfyuitest.Call) error {
			c.ProgressPreview(1, 1, "image/png", []byte("a picture"))
			return nil
		},
	}))
	defer pod.Close()
	client, err := comfyui.NewPodClient(pod.URL(), comfyui.WithPreviews())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	ended := make(chan struct{})
	_, err = client.Execute(context.Background(), exampleWorkflow(samplerGraph), comfyui.OnEvent(func(e comfyui.Event) {
		switch e.Kind {
		case comfyui.EventPreview:
			fmt.Println(e.Preview.Node, e.Preview.ContentType, len(e.Preview.Data), "bytes")
		case comfyui.EventSucceeded: // callbacks run beside the caller, which may be told of the end first
			close(ended)
		}
	}))
	if err != nil {
		log.Fatal(err)
	}
	<-ended
	// Output: 1 image/png 9 bytes
}

// Uploads can be made by hand, too; the FileRef goes into any node that loads files.
func ExamplePodClient_Upload() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()
	ctx := context.Background()

	for range 2 {
		ref, err := client.Upload(ctx, "notes.txt", bytes.NewReader([]byte("the same content")), comfyui.UploadSubfolder("mine"))
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(ref)
	}
	ref, err := client.Upload(ctx, "notes.txt", bytes.NewReader([]byte("other content")), comfyui.UploadSubfolder("mine"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(ref)

	file, err := client.Open(ctx, ref)
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	if _, err := io.Copy(os.Stdout, file); err != nil {
		log.Fatal(err)
	}
	// Output:
	// mine/notes.txt
	// mine/notes.txt
	// mine/notes (1).txt
	// other content
}
