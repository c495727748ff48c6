package comfyui

import (
	"encoding/json"
	"time"
)

type Category string

const (
	CategoryNetwork      Category = "network"
	CategoryTimeout      Category = "timeout"
	CategoryUnavailable  Category = "unavailable"
	CategoryOverloaded   Category = "overloaded"
	CategoryAuth         Category = "auth"
	CategoryNotFound     Category = "not_found"
	CategoryTooLarge     Category = "too_large"
	CategoryValidation   Category = "validation" // the caller's input, here or on the pod
	CategoryConflict     Category = "conflict"
	CategoryMissingAsset Category = "missing_asset"
	CategoryExecution    Category = "execution"
	CategoryOutOfMemory  Category = "out_of_memory"
	CategoryPodFault     Category = "pod_fault"
	CategoryInterrupted  Category = "interrupted"
	CategoryLost         Category = "lost"
	CategoryCancelled    Category = "cancelled"
	CategoryContext      Category = "context" // the caller's ctx ended; says nothing of the job
	CategoryClosed       Category = "closed"
	CategoryProtocol     Category = "protocol"
	CategoryStorage      Category = "storage"
	CategoryUnknown      Category = "unknown"
)

// Error is the type of every error that the package returns, but for those of pure functions.
type Error struct {
	Op, Pod, JobID, PromptID string
	Attempt                  int
	Status                   Status // of the job, when known: terminal means over; else the job goes on, and Execute joins it
	Category                 Category
	StatusCode               int
	RetryAfter               time.Duration
	Err                      error
}

type ValidationError struct {
	Type, Message, Details string
	Nodes                  map[string]NodeErrors
}

type NodeErrors struct {
	Class            string      `json:"class_type"`
	DependentOutputs []string    `json:"dependent_outputs"`
	Errors           []NodeError `json:"errors"`
}

type NodeError struct {
	Type      string          `json:"type"`
	Message   string          `json:"message"`
	Details   string          `json:"details"`
	Input     string          `json:"input_name,omitempty"` // extra_info.input_name
	ExtraInfo json.RawMessage `json:"extra_info,omitempty"`
}

type ExecutionError struct {
	NodeID, NodeType, ExceptionType, Message string
	Traceback                                []string
}

var (
	ErrClosed         error // the client is closed; the job goes on
	ErrJobNotFound    error
	ErrJobConflict    error // the id belongs to another workflow
	ErrOtherPod       error // the job is on a pod that this client does not drive
	ErrJobHeld        error // Store: another's lease runs
	ErrFenced         error // Store: a newer epoch or another owner has the job
	ErrSchema         error // a record of a newer schema
	ErrJobLost        error // the pod restarted and the job is gone with it
	ErrPodGone        error // the pod has been unreachable for Timing.Gone
	ErrOutcomeUnknown error // it may have run, and nothing tells how it ended
	ErrInterrupted    error // interrupted by someone else
	ErrRemoved        error // removed from the pod's queue by someone else
	ErrCancelled      error // cancelled by Cancel or CancelWithContext
)
