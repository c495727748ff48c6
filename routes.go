package comfyui

import (
	"encoding/json"
)

type Queue struct{ Running, Pending []QueueItem } // Pending in the order it will run

type QueueItem struct {
	Number    float64
	PromptID  string
	ClientID  string
	ExtraData json.RawMessage
	Workflow  json.RawMessage
	Targets   []string
}

type HistoryEntry struct {
	PromptID  string
	Status    string
	Completed bool
	Outputs   []Output
	Messages  []json.RawMessage
	Workflow  json.RawMessage
}

type SystemStats struct {
	Version, OS, Python, PyTorch string
	Args                         []string
	RAMTotal, RAMFree            int64
	Devices                      []Device
	Raw                          json.RawMessage
}

type Device struct {
	Name, Type                    string
	Index                         int
	VRAMTotal, VRAMFree           int64 // bytes
	TorchVRAMTotal, TorchVRAMFree int64
}

type UploadOption func(*uploadOptions)

type uploadOptions struct {
	subfolder string
	fileType  string
	overwrite bool
}

// endpoint speaks HTTP with one pod.
type endpoint struct{}
