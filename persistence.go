package comfyui

import (
	"context"
	"encoding/json"
	"iter"
	"time"
)

type Record struct {
	Schema       int               `json:"schema"` // 1
	JobID        string            `json:"job_id"`
	Pod          string            `json:"pod"`
	ClientID     string            `json:"client_id"`
	PromptID     string            `json:"prompt_id"`
	Attempt      int               `json:"attempt"`            // from 1
	Accepted     bool              `json:"accepted,omitempty"` // the pod is known to have taken this attempt
	Started      bool              `json:"started,omitempty"`  // this attempt is known to have begun to run
	Number       float64           `json:"number,omitempty"`
	WorkflowHash string            `json:"workflow_hash"`
	Workflow     json.RawMessage   `json:"workflow,omitempty"` // dropped at the end
	ExtraData    json.RawMessage   `json:"extra_data,omitempty"`
	Options      RecordOptions     `json:"options,omitzero"`
	Labels       map[string]string `json:"labels,omitempty"`
	Progress     Progress          `json:"progress"` // its Status is the job's
	Outputs      []Output          `json:"outputs,omitempty"`
	CachedNodes  []string          `json:"cached_nodes,omitempty"`
	Warnings     []*Error          `json:"warnings,omitempty"`
	Failure      *Error            `json:"failure,omitempty"` // of the job, or the newest attempt's cause while retrying
	NextAttempt  time.Time         `json:"next_attempt,omitzero"`
	CreatedAt    time.Time         `json:"created_at"`
	AttemptAt    time.Time         `json:"attempt_at,omitzero"`
	StartedAt    time.Time         `json:"started_at,omitzero"`
	FinishedAt   time.Time         `json:"finished_at,omitzero"`
	Retention    time.Duration     `json:"retention_ns"`

	// Kept by the store, not inside its JSON blob.
	Owner           string    `json:"-"` // who holds or last held the lease
	Epoch           int64     `json:"-"`
	Rev             int64     `json:"-"` // raised by the owner with every new content
	LeaseUntil      time.Time `json:"-"` // the store's clock
	CancelRequested bool      `json:"-"` // sticky
}

type RecordOptions struct {
	Limits       Limits `json:"limits,omitzero"`
	AllowPartial bool   `json:"allow_partial,omitempty"`
	AtMostOnce   bool   `json:"at_most_once,omitempty"`
	Front        bool   `json:"front,omitempty"`
}

// Store: each method is atomic, touches one job's keys (one slot) or one shard's, uses the store's clock, and may be
// repeated with the same arguments with no other effect. Returned records are copies. Errors other than the named ones
// mean "not known whether it took effect".
type Store interface {
	// Create stores r with Epoch 1 and a lease of ttl for r.Owner, if no record has its id. It returns the record as it
	// stands: r.Owner holds the lease iff it is the returned Owner and the job has not ended. A repeat by the same Owner
	// changes nothing. It compares no workflows. No TTL while unfinished.
	Create(ctx context.Context, r *Record, ttl time.Duration) (*Record, error)
	// Get: ErrJobNotFound.
	Get(ctx context.Context, jobID string) (*Record, error)
	// Update replaces the content and returns the stored record. In order: absent: ErrJobNotFound (it never revives);
	// r.Epoch lower: ErrFenced; same Epoch, other Owner: ErrFenced; same both and r.Rev not above the stored one: nil, no
	// change (a replay, or a late write); same both and ended: ErrFenced; else written (a higher Epoch too: the store lost a
	// claim). With ErrFenced the newer record is returned too. CancelRequested is never cleared, but by a write that reopens
	// an ended job under a higher Epoch. A terminal write frees the lease, keeps Owner, drops Workflow, leaves the index and
	// starts Retention; a reopening one undoes that. A lapsed lease that nobody claimed does not refuse the write.
	Update(ctx context.Context, r *Record) (*Record, error)
	// Claim gives owner the lease and Epoch+1 if it is free or lapsed; ErrJobHeld (with the record) while another's runs.
	// Claiming a running lease of one's own extends it, same Epoch. An ended job can be claimed, to rerun it; its TTL is then
	// at least ttl.
	Claim(ctx context.Context, jobID, owner string, ttl time.Duration) (*Record, error)
	// Renew extends owner's leases, lapsed ones too if nobody claimed them. lost: ids that another owns, or that are absent
	// or ended. One round trip a shard; a partial failure returns what is known and err.
	Renew(ctx context.Context, owner string, ttl time.Duration, jobIDs []string) (lost []string, err error)
	// Release frees those of the leases that owner holds. Others are left alone.
	Release(ctx context.Context, owner string, jobIDs []string) error
	// RequestCancel sets CancelRequested, by anyone, whatever the lease; an ended job is returned unchanged.
	RequestCancel(ctx context.Context, jobID string) (*Record, error)
	// Unfinished yields pod's unfinished records ("": every pod's), each that was there throughout exactly once. A record
	// that cannot be read yields an error and the walk goes on.
	Unfinished(ctx context.Context, pod string) iter.Seq2[*Record, error]
}

// Watcher is what a Store may also be; without it followers poll Get. Watch starts with a snapshot and ends after the
// terminal event; states are never skipped, progress is the newest; a lost notification is made good by Get.
// *MemoryStore and *RedisStore are Stores and Watchers.
type Watcher interface {
	Watch(ctx context.Context, jobID string) iter.Seq2[Event, error]
}

type MemoryStore struct{ _ *struct{} }
