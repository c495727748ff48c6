package comfyui_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"sync/atomic"
	"time"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// flakyPod is a pod whose Sampler fails the first time.
func flakyPod() *comfyuitest.Pod {
	var failed atomic.Bool
	return comfyuitest.NewPod(comfyuitest.WithNode("Sampler", comfyuitest.Node{Output: true, Run: func(context.Context, *comfyuitest.Call) error {
		if !failed.Swap(true) {
			return &comfyuitest.NodeError{ExceptionType: "RuntimeError", Message: "the network drive is away"}
		}
		return nil
	}}))
}

// An ended job stays ended: whoever asks again gets its stored failure. RerunFailed starts it once more.
func ExampleRerunFailed() {
	pod := flakyPod()
	defer pod.Close()
	client, err := comfyui.NewPodClient(pod.URL())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	for _, options := range [][]comfyui.JobOption{nil, nil, {comfyui.RerunFailed()}} {
		result, err := client.Execute(context.Background(), exampleWorkflow(samplerGraph), append(options, comfyui.WithJobID("order-7"))...)
		fmt.Println(result.Status, result.Attempt, comfyui.CategoryOf(err))
	}
	// Output:
	// failed 1 execution
	// failed 1 execution
	// succeeded 2
}

// A policy with more than one attempt makes the library itself try again; hooks are told before each wait.
func ExampleWithRetry() {
	pod := flakyPod()
	defer pod.Close()
	policy := comfyui.DefaultRetryPolicy(comfyui.CategoryExecution)
	policy.MaxAttempts, policy.InitialInterval = 2, time.Millisecond
	told := make(chan comfyui.RetryInfo, 1)
	client, err := comfyui.NewPodClient(pod.URL(),
		comfyui.WithRetry(comfyui.CategoryExecution, policy),
		comfyui.WithHooks(comfyui.Hooks{Retry: func(r comfyui.RetryInfo) { told <- r }}))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	result, err := client.Execute(context.Background(), exampleWorkflow(samplerGraph))
	if err != nil {
		log.Fatal(err)
	}
	retry := <-told
	fmt.Println("try", retry.Try, "failed, a new attempt:", retry.NewAttempt)
	fmt.Println(result.Status, "at attempt", result.Attempt)
	// Output:
	// try 1 failed, a new attempt: true
	// succeeded at attempt 2
}

// A pod runs the outputs that it finds valid and drops the rest. Without AllowPartial such a job is cancelled and fails.
func ExampleAllowPartial() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()
	workflow := exampleWorkflow(`{
		"1": {"class_type": "Sampler", "inputs": {"seed": 1}},
		"2": {"class_type": "EmptyImage", "inputs": {"width": -5, "height": 8, "batch_size": 1, "color": 0}},
		"3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}}}`)

	_, err := client.Execute(context.Background(), workflow)
	var refused *comfyui.ValidationError
	if errors.As(err, &refused) {
		for node, problem := range refused.Nodes {
			fmt.Printf("node %s: %s: %s\n", node, problem.Errors[0].Input, problem.Errors[0].Message)
		}
	}
	result, err := client.Execute(context.Background(), workflow, comfyui.AllowPartial())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Status, "outputs:", len(result.Outputs), "warnings:", len(result.Warnings))
	// Output:
	// node 2: width: Value -5 smaller than min of 1
	// succeeded outputs: 1 warnings: 1
}

// The submission's answer is lost. Whether the pod has it can be looked up; where it does not show, another POST could run the
// workflow twice, and AtMostOnce forbids that.
func ExampleAtMostOnce() {
	pod := comfyuitest.NewPod(comfyuitest.WithNode("Sampler", comfyuitest.Steps(4, time.Millisecond)))
	defer pod.Close()
	pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.Answer, Status: 504}) // the pod never sees it
	client, err := comfyui.NewPodClient(pod.URL(), comfyui.WithTiming(comfyui.Timing{Grace: time.Millisecond}))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	_, err = client.Execute(context.Background(), exampleWorkflow(samplerGraph), comfyui.AtMostOnce())
	fmt.Println(errors.Is(err, comfyui.ErrOutcomeUnknown), "POSTs:", pod.Requests("POST /prompt"))
	// Output: true POSTs: 1
}

// Do calls routes that the package has no method for, those of custom nodes among them, with the client's credentials and prefix.
func ExamplePodClient_Do() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()

	response, err := client.Do(context.Background(), "GET", "/embeddings", nil, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(body))

	_, err = client.Do(context.Background(), "GET", "/no/such/route", nil, nil) //nolint:bodyclose // there is none
	fmt.Println(comfyui.CategoryOf(err))
	// Output:
	// []
	// not_found
}

// Health tells what a pod is good for; a pod that does not answer is a state, not an error.
func ExamplePodClient_Health() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()

	health, err := client.Health(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(health.State, "waiting:", health.Pending)
	pod.Close()
	health, err = client.Health(context.Background())
	fmt.Println(health.State, err)
	// Output:
	// ready waiting: 0
	// down <nil>
}

// The category says what kind of failure it is, wherever in a chain the error stands.
func ExampleCategoryOf() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()

	_, err := client.Execute(context.Background(), exampleWorkflow(`{"1": {"class_type": "NotInstalled", "inputs": {}}}`))
	err = fmt.Errorf("rendering the poster: %w", err)
	category := comfyui.CategoryOf(err)
	fmt.Println(category, "retryable, elsewhere perhaps:", category.Retryable())
	// Output: missing_asset retryable, elsewhere perhaps: true
}
