package comfyui_test

import (
	"fmt"

	"github.com/comfypod/comfyui"
)

// A file that one job has put out is what LoadImage takes in the next one.
func ExampleFileRef_String() {
	fmt.Println(comfyui.FileRef{Filename: "photo.png", Subfolder: "in", Type: "input"})
	fmt.Println(comfyui.FileRef{Filename: "ComfyUI_00001_.png", Type: "output"})
	// Output:
	// in/photo.png
	// ComfyUI_00001_.png [output]
}
