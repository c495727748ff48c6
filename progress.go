package comfyui

import (
	"encoding/json"
	"time"
)

type Status string

const (
	StatusPending   Status = "pending"
	StatusQueued    Status = "queued"
	StatusRunning   Status = "running"
	StatusSucceeded Status = "succeeded"
	StatusFailed    Status = "failed"
	StatusCancelled Status = "cancelled"
)

type Progress struct {
	Status     Status        `json:"status"`
	Fraction   float64       `json:"fraction"`
	QueueAhead int           `json:"queue_ahead"` // -1: not known
	NodesDone  int           `json:"nodes_done"`
	NodesTotal int           `json:"nodes_total"`
	Node       string        `json:"node,omitempty"`
	NodeClass  string        `json:"node_class,omitempty"`
	NodeTitle  string        `json:"node_title,omitempty"`
	Step       float64       `json:"step,omitempty"`
	Steps      float64       `json:"steps,omitempty"`
	Elapsed    time.Duration `json:"elapsed_ns"`
	Remaining  time.Duration `json:"remaining_ns,omitempty"` // 0: not known
}

type EventKind string

const (
	EventSnapshot  EventKind = "snapshot"
	EventQueued    EventKind = "queued"
	EventStarted   EventKind = "started"
	EventCached    EventKind = "cached"
	EventNode      EventKind = "node"
	EventProgress  EventKind = "progress"
	EventOutput    EventKind = "output"
	EventPreview   EventKind = "preview"
	EventWarning   EventKind = "warning"
	EventRetrying  EventKind = "retrying"
	EventStream    EventKind = "stream"
	EventSucceeded EventKind = "succeeded"
	EventFailed    EventKind = "failed"
	EventCancelled EventKind = "cancelled"
	EventOther     EventKind = "other" // a message type that the library does not know; Raw holds it
)

type Source string

const (
	SourceStream Source = "stream"
	SourcePoll   Source = "poll"
	SourceStore  Source = "store"
	SourceLocal  Source = "local" // this client's own doing: pending, retrying, warnings
)

// Event marshals to JSON and back; Err keeps its category, detail and sentinels, so errors.Is and errors.As work after.
type Event struct {
	Kind     EventKind
	JobID    string
	PromptID string
	Attempt  int
	Time     time.Time
	Source   Source
	Node     string
	Progress Progress
	Outputs  []Output
	Preview  *Preview
	Stream   StreamState // of kind stream
	Err      error
	Raw      json.RawMessage
}

// Preview: Data is the receiver's to keep.
type Preview struct {
	Node        string `json:"node,omitempty"`
	ContentType string `json:"content_type"` // image/jpeg, image/png
	Data        []byte `json:"data"`
}
