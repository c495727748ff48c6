package comfyui_test

import (
	"encoding/json"
	"fmt"
	"log"

	"github.com/comfypod/comfyui"
)

const exampleGraph = `{
  "3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20, "model": ["4", 0]}, "_meta": {"title": "Sampler"}},
  "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "base.safetensors"}},
  "9": {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
}`

// A picture that ComfyUI saved carries the workflow that made it.
func ExampleLoadWorkflow() {
	w, err := comfyui.LoadWorkflow("internal/media/testdata/simple.png")
	if err != nil {
		log.Fatal(err)
	}
	for node := range w.Nodes() {
		fmt.Println(node.ID, node.Class, node.Title)
	}
	// Output:
	// 1 EmptyImage Empty Image
	// 2 SaveImage Save Image
}

func ExampleParseWorkflow() {
	_, err := comfyui.ParseWorkflow([]byte(`{"nodes": [], "links": []}`))
	fmt.Println(err)
	_, err = comfyui.ParseWorkflow([]byte(`{"name": "not-a-workflow"}`))
	fmt.Println(err)
	// Output:
	// <nil>
	// comfyui: parse workflow: it is not a workflow: no entry of the JSON object is a node, which is an object with a class_type
}

// A node is named by its id, or by a title or class that no other node has.
func ExampleWorkflow_Set() {
	w, err := comfyui.ParseWorkflow([]byte(exampleGraph))
	if err != nil {
		log.Fatal(err)
	}
	for _, err := range []error{
		w.Set("3", "seed", uint64(18446744073709551615)),                // by id; every digit is kept
		w.Set("Sampler", "steps", 30),                                   // by title
		w.Set("LoadImage", "image", comfyui.FileRef{Filename: "a.png"}), // by class
		w.Set("Sampler", "sed", 1),
	} {
		if err != nil {
			fmt.Println(err)
		}
	}
	data, err := json.MarshalIndent(w, "", "  ")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(data))
	// Output:
	// comfyui: set Sampler.sed: node "3" (KSampler) has no input "sed"; it has seed, steps, model
	// {
	//   "3": {
	//     "class_type": "KSampler",
	//     "inputs": {
	//       "seed": 18446744073709551615,
	//       "steps": 30,
	//       "model": [
	//         "4",
	//         0
	//       ]
	//     },
	//     "_meta": {
	//       "title": "Sampler"
	//     }
	//   },
	//   "4": {
	//     "class_type": "CheckpointLoaderSimple",
	//     "inputs": {
	//       "ckpt_name": "base.safetensors"
	//     }
	//   },
	//   "9": {
	//     "class_type": "LoadImage",
	//     "inputs": {
	//       "image": "a.png"
	//     }
	//   }
	// }
}

func ExampleWorkflow_Get() {
	w, err := comfyui.ParseWorkflow([]byte(exampleGraph))
	if err != nil {
		log.Fatal(err)
	}
	for _, input := range []string{"steps", "model"} {
		value, err := w.Get("KSampler", input)
		fmt.Printf("%T %v %v\n", value, value, err)
	}
	// Output:
	// int64 20 <nil>
	// comfyui.Link {4 0} <nil>
}

// Each job of a batch gets a workflow of its own. Clones are cheap: they share what is not changed.
func ExampleWorkflow_Clone() {
	w, err := comfyui.ParseWorkflow([]byte(exampleGraph))
	if err != nil {
		log.Fatal(err)
	}
	for seed := range 2 {
		c := w.Clone()
		if err := c.Set("KSampler", "seed", 100+seed); err != nil {
			log.Fatal(err)
		}
		value, _ := c.Get("KSampler", "seed")
		fmt.Println(value)
	}
	value, _ := w.Get("KSampler", "seed")
	fmt.Println(value)
	// Output:
	// 100
	// 101
	// 1
}
