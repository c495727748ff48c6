package comfyui

import (
	"context"
	"io"
	"time"
)

// JobOption configures one job.
type JobOption func(*jobOptions)

// jobOptions is what the options of one Execute or Submit add up to.
type jobOptions struct {
	id                string
	labels            map[string]string
	extraData         map[string]any
	limits            Limits
	number            *float64
	front             bool
	inputs            []inputFile
	onEvent           []func(Event)
	allowPartial      bool
	rerunFailed       bool
	atMostOnce        bool
	cancelWithContext bool
}

// inputFile is a file that is uploaded before each attempt.
type inputFile struct {
	node, input, name string
	open              func(context.Context) (io.ReadCloser, error)
}

// Limits are stored with the job, so that whoever drives it keeps them. Zero: no limit, but Stall, whose default is 10m.
// A job that reaches one is cancelled on the pod and fails with CategoryTimeout.
type Limits struct {
	Total time.Duration // from Create to the end, all attempts
	Queue time.Duration // accepted to started, one attempt
	Run   time.Duration // started to ended, one attempt
	Stall time.Duration // neither the job nor the pod's queue moved; not counted for a running job while the stream is down; negative: never
}

type Job struct{ _ *struct{} }

type Result struct {
	JobID       string            `json:"job_id"`
	PromptID    string            `json:"prompt_id"`
	Pod         string            `json:"pod"`
	Attempt     int               `json:"attempt"`
	Status      Status            `json:"status"`
	Labels      map[string]string `json:"labels,omitempty"`
	Outputs     []Output          `json:"outputs"`
	Warnings    []*Error          `json:"warnings,omitempty"`
	CachedNodes []string          `json:"cached_nodes,omitempty"`
	CreatedAt   time.Time         `json:"created_at"`
	StartedAt   time.Time         `json:"started_at,omitzero"`
	FinishedAt  time.Time         `json:"finished_at"`
}
