package comfyui

import (
	"bytes"
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"
)

// recordSchema is the version of Record's JSON that this package writes, and the newest that it reads. It is raised only by a
// change that an older version would misunderstand; new fields alone keep it.
const recordSchema = 1

// Record is what a Store keeps of one job: all that another process needs to take the job over, and, once it has ended, how.
// A Record belongs to whoever holds it: stores copy what they are given and what they return.
//
// It marshals to JSON. A version of this package keeps the fields that it does not know (of a record, of its options and of
// its limits), so that its updates lose nothing of what a later version wrote; for that an owner must write the record that
// it was given, changed, and not one that it built anew.
type Record struct {
	Schema       int               `json:"schema"` // 1; 0 is written as 1
	JobID        string            `json:"job_id"`
	Pod          string            `json:"pod"` // PodClient.Name of the pod that runs it
	ClientID     string            `json:"client_id"`
	PromptID     string            `json:"prompt_id"`
	Attempt      int               `json:"attempt"`            // from 1
	Accepted     bool              `json:"accepted,omitempty"` // the pod is known to have taken this attempt
	Started      bool              `json:"started,omitempty"`  // this attempt is known to have begun to run
	Number       float64           `json:"number,omitempty"`   // the pod's queue number
	WorkflowHash string            `json:"workflow_hash"`
	Workflow     json.RawMessage   `json:"workflow,omitempty"` // dropped at the end
	ExtraData    json.RawMessage   `json:"extra_data,omitempty"`
	Options      RecordOptions     `json:"options,omitzero"`
	Labels       map[string]string `json:"labels,omitempty"`
	Progress     Progress          `json:"progress"` // its Status is the job's
	Outputs      []Output          `json:"outputs,omitempty"`
	CachedNodes  []string          `json:"cached_nodes,omitempty"`
	Warnings     []*Error          `json:"warnings,omitempty"`
	Failure      *Error            `json:"failure,omitempty"`     // of the job, or the newest attempt's cause while retrying
	NextAttempt  time.Time         `json:"next_attempt,omitzero"` // while retrying: not before
	CreatedAt    time.Time         `json:"created_at"`            // the job's, by its first owner's clock
	AttemptAt    time.Time         `json:"attempt_at,omitzero"`   // this attempt's submission
	StartedAt    time.Time         `json:"started_at,omitzero"`   // this attempt began to run
	FinishedAt   time.Time         `json:"finished_at,omitzero"`  // the job ended
	Retention    time.Duration     `json:"retention_ns"`          // kept so long after the end; 0 or less: for good

	// Kept by the store, not inside its JSON blob.

	Owner           string    `json:"-"` // who holds or last held the lease
	Epoch           int64     `json:"-"` // the lease's fencing number, from 1, raised by each Claim that changes hands
	Rev             int64     `json:"-"` // raised by the owner with every new content
	LeaseUntil      time.Time `json:"-"` // by the store's clock; zero: no lease
	CancelRequested bool      `json:"-"` // sticky

	unknown *unknownFields
}

// RecordOptions are the options of a job that whoever drives it must keep.
type RecordOptions struct {
	Limits       Limits `json:"limits,omitzero"`
	AllowPartial bool   `json:"allow_partial,omitempty"`
	AtMostOnce   bool   `json:"at_most_once,omitempty"`
	Front        bool   `json:"front,omitempty"`
}

// Clone returns a deep copy: nothing that is reached from it is shared, but for the causes inside its Errors, which nobody
// changes. Clone of nil is nil.
func (r *Record) Clone() *Record {
	if r == nil {
		return nil
	}
	c := cloneWithout(r)
	c.Workflow = bytes.Clone(r.Workflow)
	return c
}

// cloneWithout is Clone without the workflow.
func cloneWithout(r *Record) *Record {
	c := *r
	c.Workflow = nil
	c.ExtraData = bytes.Clone(r.ExtraData)
	c.Labels = maps.Clone(r.Labels)
	c.Outputs = cloneOutputs(r.Outputs)
	c.CachedNodes = slices.Clone(r.CachedNodes)
	c.Warnings = slices.Clone(r.Warnings)
	for i, w := range c.Warnings {
		c.Warnings[i] = cloneError(w)
	}
	c.Failure = cloneError(r.Failure)
	return &c
}

func cloneOutputs(outputs []Output) []Output {
	c := slices.Clone(outputs)
	for i := range c {
		if f := c[i].File; f != nil {
			file := *f
			c[i].File = &file
		}
		c[i].Raw = bytes.Clone(c[i].Raw)
	}
	return c
}

func cloneError(e *Error) *Error {
	if e == nil {
		return nil
	}
	c := *e
	return &c
}

// recordFields is a Record without its methods: what encoding/json sees.
type recordFields Record

// MarshalJSON writes the record without what the store keeps beside it (Owner, Epoch, Rev, LeaseUntil, CancelRequested), and
// with the fields of a later version that it was read with. Numbers that JSON cannot hold (NaN, infinities: a node may report
// them as progress) are written as 0. The error is ErrSchema for a record whose Schema is newer than this version's, and
// else for a Workflow, ExtraData or Raw that is no JSON.
func (r *Record) MarshalJSON() ([]byte, error) {
	if r == nil {
		return []byte("null"), nil
	}
	if err := checkSchema(r.Schema, r.JobID); err != nil {
		return nil, err
	}
	fields := recordFields(*r)
	fields.Schema = recordSchema
	for _, f := range []*float64{&fields.Number, &fields.Progress.Fraction, &fields.Progress.Step, &fields.Progress.Steps} {
		if math.IsNaN(*f) || math.IsInf(*f, 0) {
			*f = 0
		}
	}
	data, err := marshalUnescaped(&fields)
	if err != nil || r.unknown == nil {
		return data, err
	}
	return r.unknown.addTo(data)
}

// UnmarshalJSON reads what MarshalJSON writes, and leaves alone what the store keeps beside it. The error is ErrSchema for a
// record of a newer schema, whatever else it holds.
func (r *Record) UnmarshalJSON(data []byte) error {
	var fields recordFields
	// Few records hold unknown fields: only those pay for a second look.
	if err := unmarshalStrict(data, &fields); err != nil {
		if err := unmarshalSchema(data); err != nil {
			return err
		}
		fields = recordFields{}
		if err := json.Unmarshal(data, &fields); err != nil {
			return fmt.Errorf("comfyui: a job record that cannot be read: %w", err)
		}
		fields.unknown = recordShape.unknownIn(data)
	}
	if err := checkSchema(fields.Schema, fields.JobID); err != nil {
		return err
	}
	fields.Schema = recordSchema
	fields.Owner, fields.Epoch, fields.Rev = r.Owner, r.Epoch, r.Rev
	fields.LeaseUntil, fields.CancelRequested = r.LeaseUntil, r.CancelRequested
	*r = Record(fields)
	return nil
}

// unmarshalSchema looks only at the schema: a newer one may hold the other fields in forms that this version cannot read.
func unmarshalSchema(data []byte) error {
	var head struct {
		Schema int             `json:"schema"`
		JobID  json.RawMessage `json:"job_id"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return fmt.Errorf("comfyui: a job record that cannot be read: %w", err)
	}
	return checkSchema(head.Schema, string(head.JobID))
}

func checkSchema(schema int, jobID string) error {
	switch {
	case schema > recordSchema:
		return fmt.Errorf("comfyui: the record of job %.80q has schema %d and this version reads schema %d; a newer version of the library wrote it: %w",
			strings.Trim(jobID, `"`), schema, recordSchema, ErrSchema)
	case schema < 0:
		return fmt.Errorf("comfyui: the record of job %.80q has the impossible schema %d", strings.Trim(jobID, `"`), schema)
	}
	return nil
}

func marshalUnescaped(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// unmarshalStrict refuses fields that v does not have.
func unmarshalStrict(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the record")
	}
	return nil
}

// unknownFields are what a JSON object of a later version holds beyond the fields of this one. They are never changed, so
// that records may share them.
type unknownFields struct {
	values map[string]json.RawMessage
	inside map[string]*unknownFields // in the objects of known fields
}

// objectShape names the fields that this version knows of a JSON object, and the objects among them whose unknown fields
// are kept too.
type objectShape struct {
	known  []string
	inside map[string]objectShape
}

var recordShape = objectShape{
	known: jsonNames(reflect.TypeFor[recordFields]()),
	inside: map[string]objectShape{"options": {
		known:  jsonNames(reflect.TypeFor[RecordOptions]()),
		inside: map[string]objectShape{"limits": {known: jsonNames(reflect.TypeFor[Limits]())}},
	}},
}

func jsonNames(t reflect.Type) []string {
	var names []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case !f.IsExported() || name == "-":
		case name == "":
			names = append(names, f.Name)
		default:
			names = append(names, name)
		}
	}
	return names
}

// unknownIn returns nil when there is nothing that the shape does not name.
func (s objectShape) unknownIn(object []byte) *unknownFields {
	var all map[string]json.RawMessage
	if json.Unmarshal(object, &all) != nil {
		return nil
	}
	found := unknownFields{values: map[string]json.RawMessage{}, inside: map[string]*unknownFields{}}
	for name, value := range all {
		// encoding/json takes a name in any case for the field.
		i := slices.IndexFunc(s.known, func(known string) bool { return strings.EqualFold(known, name) })
		if i < 0 {
			found.values[name] = value
		} else if shape, ok := s.inside[s.known[i]]; ok {
			if u := shape.unknownIn(value); u != nil {
				found.inside[s.known[i]] = u
			}
		}
	}
	if len(found.values)+len(found.inside) == 0 {
		return nil
	}
	return &found
}

func (u *unknownFields) addTo(object []byte) ([]byte, error) {
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(object, &all); err != nil {
		return nil, err
	}
	for name, value := range u.values {
		if _, taken := all[name]; !taken {
			all[name] = value
		}
	}
	for name, inner := range u.inside {
		value, ok := all[name]
		if !ok {
			value = json.RawMessage("{}")
		}
		value, err := inner.addTo(value)
		if err != nil {
			return nil, err
		}
		all[name] = value
	}
	return marshalUnescaped(all)
}

// Store keeps the records of jobs, for one process or for many. *MemoryStore and *RedisStore are Stores; package storetest
// has the suite that any other should pass.
//
// Each method is atomic, uses the store's own clock, and may be repeated with the same arguments with no other effect, as a
// network client does when a reply is lost. It touches the keys of one job, or those of one shard at a time, so that a
// cluster can hold them. Records that are given are not kept and those returned are copies. A lease runs until the moment
// LeaseUntil, which is already outside of it.
//
// Errors are of type *Error. Those that match ErrJobNotFound, ErrJobHeld, ErrFenced and ErrSchema say that nothing was
// changed; any other means that it is not known whether the call took effect. A store is safe for concurrent use.
type Store interface {
	// Create stores r, with Epoch 1 and a lease of ttl for r.Owner, if no record has its id. It returns the record as it
	// stands, its own or the one that was there: r.Owner holds the lease if and only if it is the returned Owner and the
	// job has not ended. A repeat by the same Owner changes nothing. Workflows are not compared. A record has no TTL
	// while its job is unfinished. A record that is created as ended (its owner ended it while the store had lost it) is
	// stored as a terminal Update would leave it.
	Create(ctx context.Context, r *Record, ttl time.Duration) (*Record, error)

	// Get returns the record, or ErrJobNotFound.
	Get(ctx context.Context, jobID string) (*Record, error)

	// Update replaces the content of a record and returns the record as it then stands. The first of these that applies
	// decides:
	//
	//   - no record: ErrJobNotFound; Update never creates one;
	//   - r.Epoch is below the stored one, or equal with another Owner: ErrFenced, with the stored record;
	//   - same Epoch and Owner, r.Rev not above the stored one (a replay, or a late write): no error, no change;
	//   - same Epoch and Owner, ended under this Epoch: ErrFenced, with the stored record;
	//   - else r is written. Its Epoch may be above the stored one: then the store has lost a Claim, and r's Owner and Epoch
	//     stand.
	//
	// CancelRequested is never cleared, but by a write that reopens an ended job under a higher Epoch than the one it ended
	// under. A terminal write frees the lease, keeps Owner, drops Workflow, takes the job out of Unfinished and starts
	// Retention; a reopening one undoes that. A lapsed lease that nobody claimed does not refuse the write.
	Update(ctx context.Context, r *Record) (*Record, error)

	// Claim gives owner a lease of ttl and raises Epoch by one, if the lease is free or has lapsed. While another's lease
	// runs it returns ErrJobHeld with the record. Claiming a running lease of one's own extends it, in the same Epoch. An
	// ended job can be claimed, to run it again: it stays ended until an Update reopens it, and is kept for ttl at least.
	// ErrJobNotFound.
	Claim(ctx context.Context, jobID, owner string, ttl time.Duration) (*Record, error)

	// Renew makes owner's leases of these jobs run for ttl from now, those that have lapsed too if nobody claimed them.
	// lost are the ids that another owns, or that are absent or ended. It is one round trip a shard. When it fails in
	// part, lost is what is known and err says why the rest is not.
	Renew(ctx context.Context, owner string, ttl time.Duration, jobIDs []string) (lost []string, err error)

	// Release frees those of the leases that owner holds, and leaves the others alone.
	Release(ctx context.Context, owner string, jobIDs []string) error

	// RequestCancel sets CancelRequested, for anyone and whatever the lease, and returns the record; that of an ended job
	// is returned unchanged. ErrJobNotFound.
	RequestCancel(ctx context.Context, jobID string) (*Record, error)

	// Unfinished yields the unfinished records of pod ("": of every pod). One that is there throughout is yielded exactly
	// once; one that comes or ends meanwhile at most once. A record that cannot be read yields an error, and the walk goes
	// on; it ends early only when the store cannot be reached or ctx ends, with that error.
	Unfinished(ctx context.Context, pod string) iter.Seq2[*Record, error]
}

// Watcher is what a Store may also be. Without it those who follow a job that another process drives poll Get.
type Watcher interface {
	// Watch yields the events of a job in whatever process it runs: a snapshot first, then what the records written since
	// tell, up to the terminal event; there it ends. States are never skipped: what a record implies is told even when it
	// jumped over it. Of progress only the newest is told, so that a slow receiver costs bounded memory and delays
	// nobody. A lost notification is made good by Get. Each range over the sequence watches anew. An error ends it:
	// ErrJobNotFound, the ctx's, or that the store cannot be reached.
	Watch(ctx context.Context, jobID string) iter.Seq2[Event, error]
}

// storeError makes the error of a store's method. r is the record as it stands, where it is known.
func storeError(method, jobID string, r *Record, err error) error {
	e := &Error{Op: "store " + method, JobID: jobID, Category: toldCategory(err, 0), Err: err}
	if r != nil {
		e.Pod, e.PromptID, e.Attempt, e.Status = r.Pod, r.PromptID, r.Attempt, r.Progress.Status
	}
	switch {
	case e.Category != "":
	case holds(err, errBadRecord, 0):
		e.Category = CategoryValidation
	case holds(err, context.Canceled, 0), holds(err, context.DeadlineExceeded, 0):
		e.Category = CategoryContext
	default:
		e.Category = CategoryStorage
	}
	return e
}

// errBadRecord is a call that no store can carry out.
var errBadRecord = errors.New("comfyui: a record needs a job id")

func checkRecord(r *Record) error {
	if r == nil || r.JobID == "" {
		return errBadRecord
	}
	return checkSchema(r.Schema, r.JobID)
}

// MemoryStore is a Store and a Watcher inside one process: what PodClients use that are given no other. It starts no
// goroutine; ended records that are past their Retention are dropped by the calls that come after. The zero MemoryStore is
// ready for use.
type MemoryStore struct {
	mu         sync.Mutex
	jobs       map[string]*memoryJob
	unfinished map[string]*memoryJob
	expiring   expiryHeap // the ended jobs that have a Retention
}

// memoryJob is one record. Its content is never changed, only replaced, so that it can be copied without the lock.
type memoryJob struct {
	content *Record
	hold
	endedIn int64     // the Epoch of the terminal write; of no meaning while unfinished
	expires time.Time // zero: never
	at      int       // index in MemoryStore.expiring, -1 when not there
	watches []*versionQueue
}

// hold is what a store keeps of a record beside its content.
type hold struct {
	owner           string
	epoch, rev      int64
	leaseUntil      time.Time
	cancelRequested bool
}

// record copies the content, under the hold. The workflow, which can be large, is given's own if that has the same: the
// caller gets its own bytes back, and not those of the store.
func (h hold) record(content, given *Record) *Record {
	r := cloneWithout(content)
	if given != nil && bytes.Equal(given.Workflow, content.Workflow) {
		r.Workflow = given.Workflow
	} else {
		r.Workflow = bytes.Clone(content.Workflow)
	}
	r.Owner, r.Epoch, r.Rev, r.CancelRequested = h.owner, h.epoch, h.rev, h.cancelRequested
	r.LeaseUntil = h.leaseUntil.Round(0).UTC()
	return r
}

// NewMemoryStore returns an empty store.
func NewMemoryStore() *MemoryStore { return &MemoryStore{} }

// Create implements Store.
func (s *MemoryStore) Create(ctx context.Context, r *Record, ttl time.Duration) (*Record, error) {
	if err := checkRecord(r); err != nil {
		return nil, storeError("create", jobIDOf(r), nil, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, storeError("create", r.JobID, nil, err)
	}
	content := storedContent(r, nil)

	s.mu.Lock()
	now := time.Now()
	s.expire(now)
	j := s.find(r.JobID, now)
	if j == nil {
		j = &memoryJob{
			hold: hold{owner: r.Owner, epoch: 1, rev: r.Rev, leaseUntil: now.Add(ttl), cancelRequested: r.CancelRequested},
			at:   -1,
		}
		if s.jobs == nil {
			s.jobs, s.unfinished = map[string]*memoryJob{}, map[string]*memoryJob{}
		}
		s.jobs[r.JobID] = j
		s.put(j, content, now)
	}
	h, content := j.hold, j.content
	s.mu.Unlock()
	return h.record(content, r), nil
}

// Get implements Store.
func (s *MemoryStore) Get(ctx context.Context, jobID string) (*Record, error) {
	if err := ctx.Err(); err != nil {
		return nil, storeError("get", jobID, nil, err)
	}
	s.mu.Lock()
	j := s.find(jobID, time.Now())
	if j == nil {
		s.mu.Unlock()
		return nil, storeError("get", jobID, nil, ErrJobNotFound)
	}
	h, content := j.hold, j.content
	s.mu.Unlock()
	return h.record(content, nil), nil
}

// Update implements Store.
func (s *MemoryStore) Update(ctx context.Context, r *Record) (*Record, error) {
	if err := checkRecord(r); err != nil {
		return nil, storeError("update", jobIDOf(r), nil, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, storeError("update", r.JobID, nil, err)
	}
	content := storedContent(r, s.peek(r.JobID))

	s.mu.Lock()
	now := time.Now()
	s.expire(now)
	j := s.find(r.JobID, now)
	if j == nil {
		s.mu.Unlock()
		return nil, storeError("update", r.JobID, nil, ErrJobNotFound)
	}
	write, err := j.accepts(r)
	if write {
		reopens := j.content.Progress.Status.Terminal() && !content.Progress.Status.Terminal()
		j.owner, j.epoch, j.rev = r.Owner, r.Epoch, r.Rev
		j.cancelRequested = !reopens && (j.cancelRequested || r.CancelRequested)
		s.put(j, content, now)
	}
	h, content := j.hold, j.content
	s.mu.Unlock()

	stored := h.record(content, r)
	if err != nil {
		return stored, storeError("update", r.JobID, stored, err)
	}
	return stored, nil
}

// accepts judges a write; Store.Update has the rules.
func (j *memoryJob) accepts(r *Record) (write bool, err error) {
	switch {
	case r.Epoch < j.epoch, r.Epoch == j.epoch && r.Owner != j.owner:
		return false, ErrFenced
	case r.Epoch > j.epoch:
		return true, nil
	case r.Rev <= j.rev:
		return false, nil
	case j.content.Progress.Status.Terminal() && j.endedIn == j.epoch:
		return false, ErrFenced
	}
	return true, nil
}

// Claim implements Store.
func (s *MemoryStore) Claim(ctx context.Context, jobID, owner string, ttl time.Duration) (*Record, error) {
	if err := ctx.Err(); err != nil {
		return nil, storeError("claim", jobID, nil, err)
	}
	s.mu.Lock()
	now := time.Now()
	s.expire(now)
	j := s.find(jobID, now)
	if j == nil {
		s.mu.Unlock()
		return nil, storeError("claim", jobID, nil, ErrJobNotFound)
	}
	runs := now.Before(j.leaseUntil)
	held := runs && j.owner != owner
	if !held {
		if !runs {
			j.owner = owner
			j.epoch++
		}
		j.leaseUntil = now.Add(ttl)
		s.keepFor(j, now.Add(ttl))
	}
	h, content := j.hold, j.content
	s.mu.Unlock()

	stored := h.record(content, nil)
	if held {
		return stored, storeError("claim", jobID, stored, ErrJobHeld)
	}
	return stored, nil
}

// Renew implements Store.
func (s *MemoryStore) Renew(ctx context.Context, owner string, ttl time.Duration, jobIDs []string) (lost []string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, storeError("renew", "", nil, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.expire(now)
	for _, id := range jobIDs {
		j := s.unfinished[id]
		if j == nil || j.owner != owner {
			lost = append(lost, id)
			continue
		}
		j.leaseUntil = now.Add(ttl)
	}
	return lost, nil
}

// Release implements Store.
func (s *MemoryStore) Release(ctx context.Context, owner string, jobIDs []string) error {
	if err := ctx.Err(); err != nil {
		return storeError("release", "", nil, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.expire(now)
	for _, id := range jobIDs {
		if j := s.find(id, now); j != nil && j.owner == owner {
			j.leaseUntil = time.Time{}
		}
	}
	return nil
}

// RequestCancel implements Store.
func (s *MemoryStore) RequestCancel(ctx context.Context, jobID string) (*Record, error) {
	if err := ctx.Err(); err != nil {
		return nil, storeError("request cancel", jobID, nil, err)
	}
	s.mu.Lock()
	now := time.Now()
	s.expire(now)
	j := s.find(jobID, now)
	if j == nil {
		s.mu.Unlock()
		return nil, storeError("request cancel", jobID, nil, ErrJobNotFound)
	}
	if !j.content.Progress.Status.Terminal() {
		j.cancelRequested = true
	}
	h, content := j.hold, j.content
	s.mu.Unlock()
	return h.record(content, nil), nil
}

// Unfinished implements Store.
func (s *MemoryStore) Unfinished(ctx context.Context, pod string) iter.Seq2[*Record, error] {
	return func(yield func(*Record, error) bool) {
		s.mu.Lock()
		jobs := slices.Collect(maps.Values(s.unfinished))
		s.mu.Unlock()

		for _, j := range jobs {
			if err := ctx.Err(); err != nil {
				yield(nil, storeError("unfinished", "", nil, err))
				return
			}
			s.mu.Lock()
			h, content := j.hold, j.content
			there := s.unfinished[content.JobID] == j
			s.mu.Unlock()
			if !there || pod != "" && content.Pod != pod {
				continue
			}
			if !yield(h.record(content, nil), nil) {
				return
			}
		}
	}
}

// Watch implements Watcher.
func (s *MemoryStore) Watch(ctx context.Context, jobID string) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		versions := newVersionQueue()
		s.mu.Lock()
		j := s.find(jobID, time.Now())
		if j != nil {
			versions.put(j.content)
			j.watches = append(j.watches, versions)
		}
		s.mu.Unlock()
		if j == nil {
			yield(Event{}, storeError("watch", jobID, nil, ErrJobNotFound))
			return
		}
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			j.watches = slices.DeleteFunc(j.watches, func(q *versionQueue) bool { return q == versions })
		}()
		versions.yieldEvents(ctx, jobID, yield)
	}
}

// find returns nil for a record that is past its Retention. The lock is held.
func (s *MemoryStore) find(jobID string, now time.Time) *memoryJob {
	j := s.jobs[jobID]
	if j == nil || !j.expired(now) {
		return j
	}
	s.drop(j)
	return nil
}

func (j *memoryJob) expired(now time.Time) bool {
	return !j.expires.IsZero() && !now.Before(j.expires)
}

// peek returns the content of a record, which must not be changed, or nil.
func (s *MemoryStore) peek(jobID string) *Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j := s.jobs[jobID]; j != nil {
		return j.content
	}
	return nil
}

// put makes content that of the job. The lock is held.
func (s *MemoryStore) put(j *memoryJob, content *Record, now time.Time) {
	j.content = content
	if content.Progress.Status.Terminal() {
		j.leaseUntil, j.endedIn = time.Time{}, j.epoch
		delete(s.unfinished, content.JobID)
		s.unschedule(j)
		if content.Retention > 0 {
			j.expires = now.Add(content.Retention)
			heap.Push(&s.expiring, j)
		}
	} else {
		s.unfinished[content.JobID] = j
		s.unschedule(j)
	}
	for _, w := range j.watches {
		w.put(content)
	}
}

// keepFor puts the end of an ended job's record off to until, if that is later. The lock is held.
func (s *MemoryStore) keepFor(j *memoryJob, until time.Time) {
	if j.at >= 0 && until.After(j.expires) {
		j.expires = until
		heap.Fix(&s.expiring, j.at)
	}
}

// unschedule makes the job's record one that does not expire. The lock is held.
func (s *MemoryStore) unschedule(j *memoryJob) {
	if j.at >= 0 {
		heap.Remove(&s.expiring, j.at)
	}
	j.expires = time.Time{}
}

// expire drops a few records that are past their Retention: more than one call can add, so that they never pile up, and few
// enough that no call is slowed. The lock is held.
func (s *MemoryStore) expire(now time.Time) {
	for range 4 {
		if len(s.expiring) == 0 || !s.expiring[0].expired(now) {
			return
		}
		s.drop(s.expiring[0])
	}
}

func (s *MemoryStore) drop(j *memoryJob) {
	s.unschedule(j)
	delete(s.jobs, j.content.JobID)
}

// expiryHeap has the job that expires first at index 0.
type expiryHeap []*memoryJob

func (h expiryHeap) Len() int           { return len(h) }
func (h expiryHeap) Less(a, b int) bool { return h[a].expires.Before(h[b].expires) }
func (h expiryHeap) Swap(a, b int) {
	h[a], h[b] = h[b], h[a]
	h[a].at, h[b].at = a, b
}

func (h *expiryHeap) Push(x any) {
	j := x.(*memoryJob)
	j.at = len(*h)
	*h = append(*h, j)
}

func (h *expiryHeap) Pop() any {
	last := len(*h) - 1
	j := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	j.at = -1
	return j
}

// storedContent is the part of r that a store in memory keeps: a copy without the workflow of an ended job, and without
// the client that outputs are opened with, which no other store could keep. The workflow is shared with old's if it is the
// same.
func storedContent(r, old *Record) *Record {
	content := cloneWithout(r)
	content.Schema = recordSchema
	for i := range content.Outputs {
		content.Outputs[i].pod = nil
	}
	switch {
	case r.Progress.Status.Terminal():
	case old != nil && bytes.Equal(old.Workflow, r.Workflow):
		content.Workflow = old.Workflow
	default:
		content.Workflow = bytes.Clone(r.Workflow)
	}
	return content
}

func jobIDOf(r *Record) string {
	if r == nil {
		return ""
	}
	return r.JobID
}

// maxVersions bounds what a watch holds for a receiver that does not come: the versions of a record between which a state
// changed. Beyond it versions are merged, and eventsBetween tells the states between from what the newer one implies.
const maxVersions = 16

// versionQueue holds the versions of one record that a watch has not told yet. Those that differ in progress alone are
// merged into the newest. The records are shared and must not be changed.
type versionQueue struct {
	mu       sync.Mutex
	versions []*Record     // oldest first
	wake     chan struct{} // holds one token while there may be versions
}

func newVersionQueue() *versionQueue { return &versionQueue{wake: make(chan struct{}, 1)} }

func (q *versionQueue) put(v *Record) {
	q.mu.Lock()
	n := len(q.versions)
	switch {
	case n > 0 && q.versions[n-1].Progress.Status.Terminal():
		// The watch ends there, whatever became of the job later.
	case n == maxVersions, n > 0 && sameState(q.versions[n-1], v):
		q.versions[n-1] = v
	default:
		q.versions = append(q.versions, v)
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *versionQueue) take() []*Record {
	q.mu.Lock()
	defer q.mu.Unlock()
	versions := q.versions
	q.versions = nil
	return versions
}

// yieldEvents tells the versions as they come, from a snapshot to the terminal event.
func (q *versionQueue) yieldEvents(ctx context.Context, jobID string, yield func(Event, error) bool) {
	var told *Record
	for {
		for _, v := range q.take() {
			for _, e := range eventsBetween(told, v) {
				if e.Time.IsZero() {
					e.Time = time.Now()
				}
				if !yield(e, nil) {
					return
				}
			}
			if v.Progress.Status.Terminal() {
				return
			}
			told = v
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			yield(Event{}, storeError("watch", jobID, told, ctx.Err()))
			return
		}
	}
}

// sameState reports whether two versions of a record tell the same states, so that the older one can be left out.
func sameState(a, b *Record) bool {
	return a.Progress.Status == b.Progress.Status && a.Attempt == b.Attempt && a.NextAttempt.Equal(b.NextAttempt) &&
		a.Accepted == b.Accepted && a.Started == b.Started && len(a.Warnings) == len(b.Warnings)
}

// eventsBetween tells what a change of a job's record means, to those who see only the record. old is the version told last,
// nil for none: then the first event is a snapshot. Versions between the two may be missing: the states that the newer one
// implies are told all the same, in their order, with the older one's progress; of progress itself there is only the newest.
// Events have the time that the record gives, or none. The terminal event, if there is one, is the last.
func eventsBetween(old, cur *Record) []Event {
	if old == nil {
		events := []Event{recordEvent(EventSnapshot, cur, cur.Progress)}
		if cur.Progress.Status.Terminal() {
			events = append(events, terminalEvent(cur))
		}
		return events
	}

	var events []Event
	add := func(kind EventKind, status Status) {
		progress := cur.Progress
		if status != progress.Status {
			progress = old.Progress
			progress.Status = status
		}
		events = append(events, recordEvent(kind, cur, progress))
	}

	from := phaseOf(old.Progress.Status)
	again := old.Attempt > 0 && cur.Attempt != old.Attempt || from == phaseEnded && !cur.Progress.Status.Terminal()
	retryTold := retrying(old) && (!retrying(cur) || old.NextAttempt.Equal(cur.NextAttempt))
	switch {
	case again:
		if !retryTold {
			add(EventRetrying, StatusPending)
		}
		from = phasePending
	case retrying(old) && cur.Progress.Status.Terminal():
		from = phaseRunning // what the ended attempt went through has been told
	}
	if !retrying(cur) || !again {
		to := passed(cur)
		if retrying(cur) && retryTold {
			to = phasePending
		}
		if from < phaseQueued && to >= phaseQueued {
			add(EventQueued, StatusQueued)
		}
		if from < phaseRunning && to >= phaseRunning {
			add(EventStarted, StatusRunning)
		}
	}
	if retrying(cur) && !again && !retryTold {
		add(EventRetrying, StatusPending)
	}

	stateTold := len(events) > 0
	fresh := cur.Warnings
	if n := len(old.Warnings); n <= len(fresh) {
		fresh = fresh[n:]
	}
	for _, w := range fresh {
		e := recordEvent(EventWarning, cur, cur.Progress)
		e.Err = errorOf(w)
		events = append(events, e)
	}

	switch {
	case cur.Progress.Status.Terminal():
		if from != phaseEnded || again {
			events = append(events, terminalEvent(cur))
		}
	case !stateTold && cur.Progress != old.Progress:
		add(EventProgress, cur.Progress.Status)
	}
	return events
}

func recordEvent(kind EventKind, r *Record, p Progress) Event {
	e := Event{
		Kind: kind, JobID: r.JobID, PromptID: r.PromptID, Attempt: r.Attempt, Source: SourceStore, Progress: p,
	}
	switch kind {
	case EventQueued:
		e.Time = r.AttemptAt
	case EventStarted:
		e.Time = r.StartedAt
	case EventProgress:
		e.Node = p.Node
	case EventRetrying:
		e.Err = errorOf(r.Failure)
	}
	return e
}

func terminalEvent(r *Record) Event {
	kind := EventFailed
	switch r.Progress.Status {
	case StatusSucceeded:
		kind = EventSucceeded
	case StatusCancelled:
		kind = EventCancelled
	}
	e := recordEvent(kind, r, r.Progress)
	e.Time = r.FinishedAt
	e.Outputs = cloneOutputs(r.Outputs)
	e.Err = errorOf(r.Failure)
	return e
}

// errorOf copies e into an error that is nil when e is.
func errorOf(e *Error) error {
	if e == nil {
		return nil
	}
	return cloneError(e)
}

// retrying: the newest attempt has failed, and another one waits for its time.
func retrying(r *Record) bool {
	return r.Progress.Status == StatusPending && !r.NextAttempt.IsZero()
}

// phase orders the states of one attempt.
type phase int

const (
	phasePending phase = iota
	phaseQueued
	phaseRunning
	phaseEnded
)

func phaseOf(s Status) phase {
	switch s {
	case StatusQueued:
		return phaseQueued
	case StatusRunning:
		return phaseRunning
	case StatusSucceeded, StatusFailed, StatusCancelled:
		return phaseEnded
	}
	return phasePending
}

// passed is the last phase before the end that the record's attempt is known to have reached.
func passed(r *Record) phase {
	switch {
	case r.Progress.Status == StatusRunning, r.Progress.Status == StatusSucceeded, r.Started:
		return phaseRunning
	case r.Progress.Status == StatusQueued, r.Accepted:
		return phaseQueued
	}
	return phasePending
}
