package comfyui_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// generate runs a workflow on a pod and returns the paths of the images that it made.
func generate(ctx context.Context, podURL, dir string) ([]string, error) {
	client, err := comfyui.NewPodClient(podURL) // such as "http://127.0.0.1:8188"
	if err != nil {
		return nil, err
	}
	defer client.Close()

	workflow, err := comfyui.LoadWorkflow("testdata/workflow.json") // or an image that ComfyUI saved
	if err != nil {
		return nil, err
	}
	if err := workflow.Set("SaveImage", "filename_prefix", "cat"); err != nil {
		return nil, err
	}
	result, err := client.Execute(ctx, workflow,
		comfyui.WithJobID("order-7"), // the same id again joins the job, or returns its result
		comfyui.OnEvent(func(e comfyui.Event) {
			log.Printf("%-9s %3.0f%% %s", e.Kind, 100*e.Progress.Fraction, e.Progress.NodeTitle)
		}))
	if err != nil {
		return nil, err
	}
	return result.SaveAll(ctx, dir)
}

// A workflow from its file to the images that it makes. The pod of this example runs in the test; yours is ComfyUI at its URL.
func Example() {
	pod := comfyuitest.NewPod()
	defer pod.Close()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()

	paths, err := generate(context.Background(), pod.URL(), dir)
	if err != nil {
		log.Fatal(err)
	}
	for _, path := range paths {
		fmt.Println("saved", filepath.Base(path))
	}
	// Output: saved cat_00001_.png
}
