package comfyui

import (
	"encoding/json"
)

type FileRef struct {
	Filename  string `json:"filename"`
	Subfolder string `json:"subfolder"`
	Type      string `json:"type"`
}

type Output struct {
	Node string          `json:"node"`
	Key  string          `json:"key"`
	File *FileRef        `json:"file,omitempty"`
	Text string          `json:"text,omitempty"`
	Raw  json.RawMessage `json:"raw,omitempty"`
	pod  *PodClient      // nil after decoding by hand: then use PodClient.Open
}
