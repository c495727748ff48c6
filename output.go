package comfyui

import (
	"cmp"
	"encoding/json"
	"strings"
)

type FileRef struct {
	Filename  string `json:"filename"`
	Subfolder string `json:"subfolder"`
	Type      string `json:"type"`
}

// String returns what LoadImage and its kin take: "sub/name.png" for an input, "sub/name.png [output]" or "… [temp]" for others.
func (f FileRef) String() string {
	name := f.Filename
	if f.Subfolder != "" {
		name = f.Subfolder + "/" + name
	}
	if (f.Type == "" || f.Type == "input") && !strings.HasSuffix(name, "]") { // "x [output]" can be the name of an input
		return name
	}
	return name + " [" + cmp.Or(f.Type, "input") + "]"
}

type Output struct {
	Node string          `json:"node"`
	Key  string          `json:"key"`
	File *FileRef        `json:"file,omitempty"`
	Text string          `json:"text,omitempty"`
	Raw  json.RawMessage `json:"raw,omitempty"`
	pod  *PodClient      // nil after decoding by hand: then use PodClient.Open
}
