package comfyui_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

const imageGraph = `{
  "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 255}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "batch/blue"}}
}`

// runExample runs imageGraph on a pod in this process.
func runExample(ctx context.Context) (result *comfyui.Result, stop func()) {
	pod := comfyuitest.NewPod()
	client, err := comfyui.NewPodClient(pod.URL())
	if err != nil {
		log.Fatal(err)
	}
	w, err := comfyui.ParseWorkflow([]byte(imageGraph))
	if err != nil {
		log.Fatal(err)
	}
	result, err = client.Execute(ctx, w)
	if err != nil {
		log.Fatal(err)
	}
	return result, func() {
		_ = client.Close()
		pod.Close()
	}
}

// Subfolders are kept. Saved again, equal files are kept too; a file of another content would become "blue_00001_ (1).png".
func ExampleResult_SaveAll() {
	ctx := context.Background()
	result, stop := runExample(ctx)
	defer stop()
	dir, err := os.MkdirTemp("", "outputs")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()

	for range 2 {
		paths, err := result.SaveAll(ctx, dir)
		if err != nil {
			log.Fatal(err)
		}
		for _, path := range paths {
			name, _ := filepath.Rel(dir, path)
			fmt.Println(filepath.ToSlash(name))
		}
	}
	// Output:
	// batch/blue_00001_.png
	// batch/blue_00002_.png
	// batch/blue_00001_.png
	// batch/blue_00002_.png
}

// A file can be read without saving it. The reader resumes by itself when the connection is cut.
func ExampleOutput_Open() {
	ctx := context.Background()
	result, stop := runExample(ctx)
	defer stop()
	for _, output := range result.Outputs {
		body, err := output.Open(ctx)
		if err != nil {
			log.Fatal(err)
		}
		data, err := io.ReadAll(body)
		_ = body.Close()
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s %s %q\n", output.Key, output.File.Filename, data[1:4])
	}
	// Output:
	// images blue_00001_.png "PNG"
	// images blue_00002_.png "PNG"
}

// A file that one job has put out is what LoadImage takes in the next one.
func ExampleFileRef_String() {
	fmt.Println(comfyui.FileRef{Filename: "photo.png", Subfolder: "in", Type: "input"})
	fmt.Println(comfyui.FileRef{Filename: "ComfyUI_00001_.png", Type: "output"})
	// Output:
	// in/photo.png
	// ComfyUI_00001_.png [output]
}
