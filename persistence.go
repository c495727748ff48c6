package comfyui

import (
	"bytes"
	"container/heap"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/comfypod/comfyui/internal/packed"
	"github.com/comfypod/comfyui/internal/plainjson"
	"github.com/comfypod/comfyui/internal/redisscript"
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
	read, err := recordOf(string(data))
	if err != nil {
		return err
	}
	read.Owner, read.Epoch, read.Rev = r.Owner, r.Epoch, r.Rev
	read.LeaseUntil, read.CancelRequested = r.LeaseUntil, r.CancelRequested
	*r = *read
	return nil
}

// recordOf reads what MarshalJSON writes.
func recordOf(text string) (*Record, error) {
	fields := new(recordFields)
	if !readRecord(text, fields) {
		// Something that this version does not write, or does not know.
		data := []byte(text)
		if err := unmarshalSchema(data); err != nil {
			return nil, err
		}
		*fields = recordFields{}
		if err := json.Unmarshal(data, fields); err != nil {
			return nil, fmt.Errorf("comfyui: a job record that cannot be read: %w", err)
		}
		fields.unknown = recordShape.unknownIn(data)
	}
	if err := checkSchema(fields.Schema, fields.JobID); err != nil {
		return nil, err
	}
	fields.Schema = recordSchema
	return (*Record)(fields), nil
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

// readRecord reads a record as MarshalJSON writes it, which is how nearly all come: a process that starts reads thousands. It is
// not ok with anything else.
func readRecord(text string, f *recordFields) (ok bool) {
	r := plainjson.NewReader(text)
	decode := func(v any) {
		if json.Unmarshal([]byte(r.Raw()), v) != nil {
			r.GiveUp()
		}
	}
	moment := func(t *time.Time) {
		if t.UnmarshalText([]byte(r.Text())) != nil {
			r.GiveUp()
		}
	}
	for name := range r.Fields(recordShape.known) {
		switch name {
		case "schema":
			f.Schema = int(r.Int())
		case "job_id":
			f.JobID = r.String()
		case "pod":
			f.Pod = r.String()
		case "client_id":
			f.ClientID = r.String()
		case "prompt_id":
			f.PromptID = r.String()
		case "attempt":
			f.Attempt = int(r.Int())
		case "accepted":
			f.Accepted = r.Bool()
		case "started":
			f.Started = r.Bool()
		case "number":
			f.Number = r.Float()
		case "workflow_hash":
			f.WorkflowHash = r.String()
		case "workflow":
			decode(&f.Workflow)
		case "extra_data":
			decode(&f.ExtraData)
		case "options":
			readOptions(r, &f.Options)
		case "labels":
			f.Labels = map[string]string{}
			for label := range r.Object {
				f.Labels[strings.Clone(label)] = r.String()
			}
		case "progress":
			readProgress(r, &f.Progress)
		case "outputs":
			decode(&f.Outputs)
		case "cached_nodes":
			decode(&f.CachedNodes)
		case "warnings":
			decode(&f.Warnings)
		case "failure":
			decode(&f.Failure)
		case "next_attempt":
			moment(&f.NextAttempt)
		case "created_at":
			moment(&f.CreatedAt)
		case "attempt_at":
			moment(&f.AttemptAt)
		case "started_at":
			moment(&f.StartedAt)
		case "finished_at":
			moment(&f.FinishedAt)
		case "retention_ns":
			f.Retention = time.Duration(r.Int())
		default:
			r.GiveUp()
		}
	}
	return r.OK()
}

func readOptions(r *plainjson.Reader, o *RecordOptions) {
	for name := range r.Fields(recordShape.inside["options"].known) {
		switch name {
		case "limits":
			for limit := range r.Fields(recordShape.inside["options"].inside["limits"].known) {
				switch limit {
				case "Total":
					o.Limits.Total = time.Duration(r.Int())
				case "Queue":
					o.Limits.Queue = time.Duration(r.Int())
				case "Run":
					o.Limits.Run = time.Duration(r.Int())
				case "Stall":
					o.Limits.Stall = time.Duration(r.Int())
				default:
					r.GiveUp()
				}
			}
		case "allow_partial":
			o.AllowPartial = r.Bool()
		case "at_most_once":
			o.AtMostOnce = r.Bool()
		case "front":
			o.Front = r.Bool()
		default:
			r.GiveUp()
		}
	}
}

var progressNames = jsonNames(reflect.TypeFor[Progress]())

func readProgress(r *plainjson.Reader, p *Progress) {
	for name := range r.Fields(progressNames) {
		switch name {
		case "status":
			p.Status = Status(r.String())
		case "fraction":
			p.Fraction = r.Float()
		case "queue_ahead":
			p.QueueAhead = int(r.Int())
		case "nodes_done":
			p.NodesDone = int(r.Int())
		case "nodes_total":
			p.NodesTotal = int(r.Int())
		case "node":
			p.Node = r.String()
		case "node_class":
			p.NodeClass = r.String()
		case "node_title":
			p.NodeTitle = r.String()
		case "step":
			p.Step = r.Float()
		case "steps":
			p.Steps = r.Float()
		case "elapsed_ns":
			p.Elapsed = time.Duration(r.Int())
		case "remaining_ns":
			p.Remaining = time.Duration(r.Int())
		default:
			r.GiveUp()
		}
	}
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

// Watcher is what a Store may also be. Without it those who follow a job that another process drives poll Get. A PodClient watches
// four such jobs at a time, and polls the others: each takes a goroutine, and perhaps a connection. Of a *MemoryStore and a
// *RedisStore, which can tell of any number at no such cost, it follows all.
type Watcher interface {
	// Watch yields the events of a job in whatever process it runs: a snapshot first, then what the records written since
	// tell, up to the terminal event; there it ends. States are never skipped: what a record implies is told even when it
	// jumped over it. Of progress only the newest is told, so that a slow receiver costs bounded memory and delays
	// nobody. A lost notification is made good by Get. Each range over the sequence watches anew. An error ends it:
	// ErrJobNotFound, the ctx's, or that the store cannot be reached.
	Watch(ctx context.Context, jobID string) iter.Seq2[Event, error]
}

// intentReader is a Store that tells of many jobs at once which of them somebody wants cancelled: one round trip for all that a
// client drives, instead of one each.
type intentReader interface {
	cancelsRequested(ctx context.Context, jobIDs []string) (requested []string, err error)
}

// announcer is a Store that tells of any number of jobs without a goroutine for each, as those who range over Watch need one.
type announcer interface {
	// announce tells the sink what happens to a job's record until stop is called. announce does not wait for anything; stop, with
	// the last one, for the store's own goroutines, but no longer than ctx.
	announce(jobID string, to versionSink) (stop func(ctx context.Context))
}

// versionSink is told what happens to one job's record, under the store's locks: it must not wait for anything.
type versionSink interface {
	// put takes a version that was written. It is shared and must not be changed. nil: something may have happened that only the
	// record tells.
	put(v *Record)
	// hears tells whether all that is written from now on will be told. What was written before, the record tells.
	hears(live bool)
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

// errBadRecord is a record that no store can keep.
var errBadRecord = errors.New("the record cannot be stored")

func checkRecord(r *Record) error {
	if r == nil || r.JobID == "" {
		return fmt.Errorf("%w: it has no job id", errBadRecord)
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
	watches []versionSink
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
	h, content, err := s.update(ctx, r)
	if content == nil {
		return nil, err
	}
	stored := h.record(content, r)
	if err != nil {
		err = storeError("update", r.JobID, stored, err)
	}
	return stored, err
}

// update is Update without the copy of what is stored, which must not be changed. content is nil if there is no record.
func (s *MemoryStore) update(ctx context.Context, r *Record) (h hold, content *Record, err error) {
	if err := checkRecord(r); err != nil {
		return hold{}, nil, storeError("update", jobIDOf(r), nil, err)
	}
	if err := ctx.Err(); err != nil {
		return hold{}, nil, storeError("update", r.JobID, nil, err)
	}
	content = storedContent(r, s.peek(r.JobID))

	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.expire(now)
	j := s.find(r.JobID, now)
	if j == nil {
		return hold{}, nil, storeError("update", r.JobID, nil, ErrJobNotFound)
	}
	write, err := j.accepts(r)
	if write {
		reopens := j.content.Progress.Status.Terminal() && !content.Progress.Status.Terminal()
		j.owner, j.epoch, j.rev = r.Owner, r.Epoch, r.Rev
		j.cancelRequested = !reopens && (j.cancelRequested || r.CancelRequested)
		s.put(j, content, now)
	}
	return j.hold, j.content, err
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

// cancelsRequested implements intentReader.
func (s *MemoryStore) cancelsRequested(ctx context.Context, jobIDs []string) (requested []string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, storeError("read cancels", "", nil, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range jobIDs {
		if j := s.unfinished[id]; j != nil && j.cancelRequested {
			requested = append(requested, id)
		}
	}
	return requested, nil
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
			for _, w := range j.watches {
				w.put(nil)
			}
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
		defer s.unwatch(j, versions)
		t := teller{yield: yield}
		for {
			for _, v := range versions.take() {
				if !t.tell(v) {
					return
				}
			}
			select {
			case <-versions.wake:
			case <-ctx.Done():
				yield(Event{}, storeError("watch", jobID, t.told, ctx.Err()))
				return
			}
		}
	}
}

// announce implements announcer.
func (s *MemoryStore) announce(jobID string, to versionSink) (stop func(context.Context)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := s.find(jobID, time.Now())
	if j == nil {
		return func(context.Context) {}
	}
	j.watches = append(j.watches, to)
	to.hears(true)
	return func(context.Context) { s.unwatch(j, to) }
}

func (s *MemoryStore) unwatch(j *memoryJob, w versionSink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j.watches = slices.DeleteFunc(j.watches, func(other versionSink) bool { return other == w })
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

// RedisStore is a Store and a Watcher for many processes, on a single Redis, Sentinel or Cluster. Everything of one job is in
// one hash slot, and every change is one script that gives the same result when go-redis repeats it because a reply was lost.
// Times are the server's. A RedisStore starts goroutines only inside its calls, and one subscription while somebody watches or
// follows a job that another process drives.
//
// Redis must keep what it has acknowledged as well as the jobs need it kept: with asynchronous replication a failover loses the
// last writes, which owners then write again.
type RedisStore struct {
	client  redis.UniversalClient
	options redisOptions

	watching sync.Mutex
	feed     *redisFeed // nil while nobody watches or follows
}

// RedisOption configures a RedisStore; see NewRedisStore.
type RedisOption func(*redisOptions)

type redisOptions struct {
	prefix      string
	shards      int
	callTimeout time.Duration
}

// NewRedisStore returns a store on client, which stays the caller's: close it after the clients that use the store. It does no
// I/O. It refuses nil and *redis.Ring, on which a rehash would fork the truth. It needs Redis 6.2 or later, with
// maxmemory-policy noeviction: a Redis that evicts keys loses jobs.
func NewRedisStore(client redis.UniversalClient, opts ...RedisOption) (*RedisStore, error) {
	refuse := func(format string, args ...any) (*RedisStore, error) {
		return nil, &Error{Op: "new redis store", Category: CategoryValidation, Err: fmt.Errorf(format, args...)}
	}
	if isNil(client) {
		return refuse("NewRedisStore needs a Redis client")
	}
	if _, ring := client.(*redis.Ring); ring {
		return refuse("a *redis.Ring cannot hold jobs: when a node goes, their keys move and a job gets a second record; use a single Redis, Sentinel or Cluster")
	}
	o := redisOptions{prefix: "comfyui", shards: 16, callTimeout: 5 * time.Second}
	for _, opt := range opts {
		if opt != nil {
			opt(&o)
		}
	}
	switch {
	case o.prefix == "" || strings.ContainsAny(o.prefix, "{}"):
		return refuse("the Redis prefix %q is empty or has a brace, which would move keys to other slots", o.prefix)
	case o.shards < 1 || o.shards > maxRedisShards:
		return refuse("%d Redis shards; use 1 to %d", o.shards, maxRedisShards)
	case o.callTimeout <= 0:
		return refuse("the Redis call timeout %v is not positive", o.callTimeout)
	}
	return &RedisStore{client: impatient(client, o.callTimeout), options: o}, nil
}

// isNil also finds the nil pointer that hides in an interface.
func isNil(v any) bool {
	of := reflect.ValueOf(v)
	return !of.IsValid() || of.Kind() == reflect.Pointer && of.IsNil()
}

// impatient returns client, or where that can be a view of it whose reads and writes end, if those of client might not: a call
// that was given up goes on until then.
func impatient(client redis.UniversalClient, timeout time.Duration) redis.UniversalClient {
	c, ok := client.(*redis.Client)
	if !ok {
		return client
	}
	within := func(d time.Duration) bool { return 0 < d && d <= timeout }
	if o := c.Options(); within(o.ReadTimeout) && within(o.WriteTimeout) {
		return client
	}
	return c.WithTimeout(timeout)
}

const (
	maxRedisShards = 1024
	// redisBatch is how many jobs one script handles, so that none keeps Redis from its other work for long.
	redisBatch = 128
	// redisPage is how many ids a walk asks a shard for, redisReadBatch how many records at once, and redisReaders how many of
	// these requests are under way: they bound what is held in memory.
	redisPage      = 1000
	redisReadBatch = 256
	redisReaders   = 4
)

// RedisPrefix sets what all keys and channels begin with, in braces and with the number of the shard: "{comfyui:7}:…". The
// default is "comfyui". Programs that share a prefix share their jobs.
func RedisPrefix(prefix string) RedisOption { return func(o *redisOptions) { o.prefix = prefix } }

// RedisShards sets over how many hash slots the jobs are spread, 1 to 1024; the default is 16. It is fixed for the life of a
// prefix: with another number the same job has another key.
func RedisShards(n int) RedisOption { return func(o *redisOptions) { o.shards = n } }

// RedisCallTimeout bounds each call, whatever the timeouts and retries of the client's own options; the default is 5s. A call
// that touches many shards or pages has this for each round trip.
func RedisCallTimeout(d time.Duration) RedisOption {
	return func(o *redisOptions) { o.callTimeout = d }
}

// shardOf hashes by FNV-1a, which hash/fnv does with two allocations.
func (s *RedisStore) shardOf(jobID string) int {
	h := uint32(2166136261)
	for i := range len(jobID) {
		h = (h ^ uint32(jobID[i])) * 16777619
	}
	return int(h % uint32(max(1, s.options.shards)))
}

func (s *RedisStore) key(shard int, name string) string {
	return "{" + s.options.prefix + ":" + strconv.Itoa(shard) + "}:" + name
}

func (s *RedisStore) index(shard int) string { return s.key(shard, "unfinished") }

func (s *RedisStore) job(jobID string) string { return s.key(s.shardOf(jobID), "job:"+jobID) }

func (s *RedisStore) channel(jobID string) string { return s.key(s.shardOf(jobID), "watch:"+jobID) }

// Create implements Store.
func (s *RedisStore) Create(ctx context.Context, r *Record, ttl time.Duration) (*Record, error) {
	if err := checkRecord(r); err != nil {
		return nil, storeError("create", jobIDOf(r), nil, err)
	}
	w, err := redisWriteOf(r)
	if err != nil {
		return nil, storeError("create", r.JobID, nil, err)
	}
	ended := "0"
	if r.Progress.Status.Terminal() {
		ended = "1" // the first epoch
	}
	a, err := s.run(ctx, redisscript.Create, []string{s.job(r.JobID), s.index(s.shardOf(r.JobID))},
		r.JobID, s.channel(r.JobID), recordSchema, r.Owner, r.Rev, flag(r.CancelRequested), r.Pod, string(r.Progress.Status), ended,
		ttl.Microseconds(), w.retention, w.record, w.workflowSum, w.workflow())
	return s.settle("create", r, w, a, err)
}

// Get implements Store.
func (s *RedisStore) Get(ctx context.Context, jobID string) (*Record, error) {
	a, err := s.run(ctx, redisscript.Get, []string{s.job(jobID)})
	return s.settle("get", &Record{JobID: jobID}, nil, a, err)
}

// Update implements Store.
func (s *RedisStore) Update(ctx context.Context, r *Record) (*Record, error) {
	if err := checkRecord(r); err != nil {
		return nil, storeError("update", jobIDOf(r), nil, err)
	}
	w, err := redisWriteOf(r)
	if err != nil {
		return nil, storeError("update", r.JobID, nil, err)
	}
	write := func(workflow []byte) (redisAnswer, error) {
		return s.run(ctx, redisscript.Update, []string{s.job(r.JobID), s.index(s.shardOf(r.JobID))},
			r.JobID, s.channel(r.JobID), recordSchema, r.Owner, r.Epoch, r.Rev, flag(r.CancelRequested), r.Pod, string(r.Progress.Status),
			flag(r.Progress.Status.Terminal()), w.retention, w.record, w.workflowSum, workflow)
	}
	// The workflow, which can be large, hardly ever changes: it is sent only when Redis asks for it.
	a, err := write(nil)
	if err == nil && a.verdict == redisscript.NeedWorkflow {
		a, err = write(w.workflow())
	}
	return s.settle("update", r, w, a, err)
}

// Claim implements Store.
func (s *RedisStore) Claim(ctx context.Context, jobID, owner string, ttl time.Duration) (*Record, error) {
	a, err := s.run(ctx, redisscript.Claim, []string{s.job(jobID), s.index(s.shardOf(jobID))},
		jobID, recordSchema, owner, ttl.Microseconds())
	return s.settle("claim", &Record{JobID: jobID}, nil, a, err)
}

// Renew implements Store.
func (s *RedisStore) Renew(ctx context.Context, owner string, ttl time.Duration, jobIDs []string) (lost []string, err error) {
	err = s.runBatches(ctx, "renew", redisscript.Renew, jobIDs, []any{owner, ttl.Microseconds()}, func(id string) {
		lost = append(lost, id)
	})
	return lost, err
}

// cancelsRequested implements intentReader.
func (s *RedisStore) cancelsRequested(ctx context.Context, jobIDs []string) (requested []string, err error) {
	err = s.runBatches(ctx, "read cancels", redisscript.Cancels, jobIDs, nil, func(id string) { requested = append(requested, id) })
	return requested, err
}

// Release implements Store.
func (s *RedisStore) Release(ctx context.Context, owner string, jobIDs []string) error {
	return s.runBatches(ctx, "release", redisscript.Release, jobIDs, []any{owner}, func(string) {})
}

// RequestCancel implements Store.
func (s *RedisStore) RequestCancel(ctx context.Context, jobID string) (*Record, error) {
	a, err := s.run(ctx, redisscript.RequestCancel, []string{s.job(jobID)}, recordSchema)
	return s.settle("request cancel", &Record{JobID: jobID}, nil, a, err)
}

// Unfinished implements Store. It asks all shards at once for a page of their ids, and reads and decodes the jobs of some shards
// while it hands out those of others.
func (s *RedisStore) Unfinished(ctx context.Context, pod string) iter.Seq2[*Record, error] {
	return func(yield func(*Record, error) bool) {
		walk := &redisWalk{RedisStore: s, pod: pod, found: make(chan []foundRecord)}
		walking, stop := context.WithCancel(ctx)
		var walker sync.WaitGroup
		walker.Go(func() {
			defer close(walk.found)
			walk.run(walking)
		})
		defer walker.Wait()
		defer stop()

		for batch := range walk.found {
			for _, found := range batch {
				if !yield(found.record, found.err) {
					return
				}
			}
		}
		if err := ctx.Err(); err != nil {
			yield(nil, storeError("unfinished", "", nil, err))
		}
	}
}

// redisWalk is one walk through the unfinished jobs of a pod, or of all.
type redisWalk struct {
	*RedisStore
	pod   string
	found chan []foundRecord // what each round trip brought
}

// foundRecord is one record of a walk, or why it or others cannot be read.
type foundRecord struct {
	record *Record
	err    error
}

// send reports whether the receiver is still there.
func (w *redisWalk) send(ctx context.Context, found ...foundRecord) bool {
	select {
	case w.found <- found:
		return true
	case <-ctx.Done():
		return false
	}
}

// run reads what the indexes name. A shard that cannot be read is left out, with an error; the walk ends when all that it asked
// for failed.
func (w *redisWalk) run(ctx context.Context) {
	cursors := make(map[int]string, w.options.shards) // of the shards that have more
	for shard := range max(1, w.options.shards) {     // a zero store fails, instead of having no jobs
		cursors[shard] = "0"
	}
	seen := map[string]struct{}{} // ZSCAN may repeat an entry
	for len(cursors) > 0 {
		batches, err := w.scanIndexes(ctx, cursors, seen)
		if err != nil && !w.send(ctx, foundRecord{err: storeError("unfinished", "", nil, err)}) {
			return
		}
		w.readJobs(ctx, batches)
	}
}

// scanIndexes returns the new ids of the next page of every shard, and moves the cursors. Shards that are at their end or
// cannot be read leave cursors.
func (w *redisWalk) scanIndexes(ctx context.Context, cursors map[int]string, seen map[string]struct{}) (batches []redisJobs, err error) {
	asked := maps.Clone(cursors)
	pages, err := callRedis(ctx, w.RedisStore, func(ctx context.Context) (map[int]*redis.Cmd, error) {
		pipe := w.client.Pipeline()
		pages := make(map[int]*redis.Cmd, len(asked))
		for shard, cursor := range asked {
			pages[shard] = redisscript.Scan.Eval(ctx, pipe, []string{w.index(shard)}, cursor, redisPage)
		}
		_, err := pipe.Exec(ctx)
		return pages, err
	})
	clear(cursors)
	for shard, page := range pages {
		reply, ok := page.Val().([]any)
		if page.Err() != nil || !ok || len(reply) != 2 {
			continue
		}
		if cursor, _ := reply[0].(string); cursor != "0" {
			cursors[shard] = cursor
		}
		entries, _ := reply[1].([]any)
		ids := make([]string, 0, len(entries))
		for _, entry := range entries {
			id, ok := entry.(string)
			if _, repeated := seen[id]; ok && !repeated {
				seen[id] = struct{}{}
				ids = append(ids, id)
			}
		}
		for batch := range slices.Chunk(ids, redisReadBatch) {
			batches = append(batches, redisJobs{shard, batch})
		}
	}
	return batches, err
}

// readJobs reads these jobs, some shards at a time, and sends what came. It gives up when all readers in turn have failed.
func (w *redisWalk) readJobs(ctx context.Context, batches []redisJobs) {
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	var readers sync.WaitGroup
	var next, failed atomic.Int32 // failed: in a row
	for range min(redisReaders, len(batches)) {
		readers.Go(func() {
			for ctx.Err() == nil {
				n := int(next.Add(1)) - 1
				if n >= len(batches) {
					return
				}
				found, err := w.readBatch(ctx, batches[n])
				if err != nil {
					found = []foundRecord{{err: storeError("unfinished", "", nil, err)}}
				}
				switch {
				case !w.send(ctx, found...):
					return
				case err == nil:
					failed.Store(0)
				case failed.Add(1) >= redisReaders:
					giveUp()
				}
			}
		})
	}
	readers.Wait()
}

// readBatch returns the unfinished records among these jobs, and takes jobs that are gone off the index.
func (w *redisWalk) readBatch(ctx context.Context, jobs redisJobs) ([]foundRecord, error) {
	keys := make([]string, len(jobs.ids))
	for i, id := range jobs.ids {
		keys[i] = w.key(jobs.shard, "job:"+id)
	}
	read := w.readFields
	if readsReplicas(w.client) {
		read = w.readFieldsByScript
	}
	values, err := callRedis(ctx, w.RedisStore, func(ctx context.Context) ([]readFields, error) { return read(ctx, keys) })
	if err != nil {
		return nil, err
	}
	found := make([]foundRecord, 0, len(values))
	var gone []string
	for i, v := range values {
		switch {
		case v.err != nil:
			found = append(found, foundRecord{err: storeError("unfinished", jobs.ids[i], nil, v.err)})
		case v.fields.at(redisEpoch) == "":
			gone = append(gone, jobs.ids[i])
		case v.fields.at(redisEnded) == "0" && (w.pod == "" || v.fields.at(redisPod) == w.pod):
			r, err := v.fields.record()
			if err != nil {
				err = storeError("unfinished", jobs.ids[i], nil, err)
			}
			found = append(found, foundRecord{r, err})
		}
	}
	if len(gone) > 0 {
		// If this fails, the next walk tries again.
		_, _ = w.runPipeline(ctx, redisscript.Forget, []redisJobs{{jobs.shard, gone}}, nil)
	}
	return found, nil
}

// readsReplicas reports whether client may answer a plain read from a replica, which may lag.
func readsReplicas(client redis.UniversalClient) bool {
	switch c := client.(type) {
	case *redis.Client:
		return false
	case *redis.ClusterClient:
		return c.Options().ReadOnly
	}
	return true
}

// readFields are those of one job, or that another program has made something else of its key.
type readFields struct {
	fields redisFields
	err    error
}

// redisWalkFields are what a walk asks for, as arguments of a command.
var redisWalkFields = func() (args []any) {
	for _, name := range append(slices.Clone(redisscript.Fields), "ended", "pod") {
		args = append(args, name)
	}
	return args
}()

func (s *RedisStore) readFields(ctx context.Context, keys []string) ([]readFields, error) {
	pipe := s.client.Pipeline()
	cmds := make([]*redis.StringSliceCmd, len(keys))
	for i, key := range keys {
		// HMGet would make of each value an any, and of each argument another.
		args := append(make([]any, 0, 2+len(redisWalkFields)), "hmget", key)
		cmds[i] = redis.NewStringSliceCmd(ctx, append(args, redisWalkFields...)...)
		_ = pipe.Process(ctx, cmds[i])
	}
	_, _ = pipe.Exec(ctx)
	values := make([]readFields, len(cmds))
	for i, cmd := range cmds {
		switch err := cmd.Err(); {
		case err == nil:
			values[i].fields = cmd.Val()
		case isWrongType(err):
			values[i].err = err
		default:
			return nil, err
		}
	}
	return values, nil
}

func (s *RedisStore) readFieldsByScript(ctx context.Context, keys []string) ([]readFields, error) {
	reply, err := redisscript.Read.Run(ctx, s.client, keys, redisWalkFields...).Slice()
	if err != nil {
		return nil, err
	}
	if len(reply) != len(keys) {
		return nil, errBadReply
	}
	values := make([]readFields, len(reply))
	for i, v := range reply {
		switch v := v.(type) {
		case []any:
			values[i].fields = fieldsOf(v)
		case error:
			if !isWrongType(v) {
				return nil, v
			}
			values[i].err = v
		default:
			return nil, errBadReply
		}
	}
	return values, nil
}

// isWrongType: another program has made something else of the key.
func isWrongType(err error) bool { return redis.HasErrorPrefix(err, "WRONGTYPE") }

// redisWrite is a record as the scripts take it.
type redisWrite struct {
	content     *Record // as it will be stored
	record      []byte  // JSON, without the workflow
	workflowSum string  // "": no workflow
	retention   int64   // ms; 0: for good
}

func redisWriteOf(r *Record) (*redisWrite, error) {
	content := storedContent(r, r)
	rest := *content
	rest.Workflow = nil
	record, err := rest.MarshalJSON()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRecord, err)
	}
	w := &redisWrite{content: content, record: record, retention: max(0, ceilMillis(r.Retention))}
	if len(content.Workflow) > 0 {
		sum := sha256.Sum256(content.Workflow)
		w.workflowSum = hex.EncodeToString(sum[:16])
	}
	return w, nil
}

// workflow is packed; nil: none.
func (w *redisWrite) workflow() []byte {
	if w.workflowSum == "" {
		return nil
	}
	return packed.Pack(w.content.Workflow)
}

// ceilMillis rounds up: what is kept for a while is not kept for good.
func ceilMillis(d time.Duration) int64 { return (d + time.Millisecond - 1).Milliseconds() }

func flag(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

// settle turns a verdict on r into what a method returns. w is what was to be written.
func (s *RedisStore) settle(method string, r *Record, w *redisWrite, a redisAnswer, err error) (*Record, error) {
	var stored *Record
	if err == nil && a.verdict == redisscript.Written && w == nil {
		err = errBadReply
	}
	if err == nil {
		switch a.verdict {
		case redisscript.Written:
			var h hold
			if h, err = a.fields.hold(); err == nil {
				return h.record(w.content, r), nil
			}
		case redisscript.There:
			stored, err = a.fields.record()
		case redisscript.Held:
			stored, err = a.recordWith(ErrJobHeld)
		case redisscript.Fenced:
			stored, err = a.recordWith(ErrFenced)
		case redisscript.Absent:
			err = ErrJobNotFound
		case redisscript.Schema:
			err = a.schemaError(r.JobID)
		default:
			err = errBadReply
		}
	}
	if err != nil {
		return stored, storeError(method, r.JobID, stored, err)
	}
	return stored, nil
}

// redisAnswer is a script's reply: see package redisscript.
type redisAnswer struct {
	verdict string
	fields  redisFields
}

// Where redisscript.Fields are, and the two that a walk asks for too.
const (
	redisOwner = iota
	redisEpoch
	redisRev
	redisLease
	redisCancel
	redisRecord
	redisWorkflow
	redisEnded
	redisPod
)

var errBadReply = errors.New("a reply of Redis that no script gives: another program uses these keys")

func answerOf(reply any) (redisAnswer, error) {
	parts, _ := reply.([]any)
	if len(parts) == 0 {
		return redisAnswer{}, errBadReply
	}
	verdict, ok := parts[0].(string)
	if !ok {
		return redisAnswer{}, errBadReply
	}
	a := redisAnswer{verdict: verdict}
	if len(parts) > 1 {
		if fields, ok := parts[1].([]any); ok {
			parts = fields
		} else {
			parts = parts[1:]
		}
		a.fields = fieldsOf(parts)
	}
	return a, nil
}

// redisFields are values of a job's hash, in the order of redisscript.Fields; "" for one that is not there.
type redisFields []string

func fieldsOf(reply []any) redisFields {
	f := make(redisFields, len(reply))
	for i, v := range reply {
		f[i], _ = v.(string)
	}
	return f
}

// at is "" for one that is not there.
func (f redisFields) at(i int) string {
	if i >= len(f) {
		return ""
	}
	return f[i]
}

// hold reads owner, epoch, rev, lease end and cancel flag.
func (f redisFields) hold() (hold, error) {
	epoch, err1 := strconv.ParseInt(f.at(redisEpoch), 10, 64)
	rev, err2 := strconv.ParseInt(f.at(redisRev), 10, 64)
	lease, err3 := strconv.ParseInt(f.at(redisLease), 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return hold{}, fmt.Errorf("%w: %w", errBadReply, err)
	}
	h := hold{owner: f.at(redisOwner), epoch: epoch, rev: rev, cancelRequested: f.at(redisCancel) == "1"}
	if lease != 0 {
		h.leaseUntil = time.UnixMicro(lease)
	}
	return h, nil
}

func (f redisFields) record() (*Record, error) {
	h, err := f.hold()
	if err != nil {
		return nil, err
	}
	r, err := recordOf(f.at(redisRecord))
	if err != nil {
		return nil, err
	}
	r.Owner, r.Epoch, r.Rev, r.LeaseUntil, r.CancelRequested = h.owner, h.epoch, h.rev, h.leaseUntil.UTC(), h.cancelRequested
	if p := f.at(redisWorkflow); p != "" {
		workflow, err := packed.Unpack(p)
		if err != nil {
			return nil, fmt.Errorf("the workflow of job %q: %w", r.JobID, err)
		}
		r.Workflow = workflow
	}
	return r, nil
}

// recordWith is for a record that stands against a call: that is the error, even when the record cannot be read.
func (a redisAnswer) recordWith(refusal error) (*Record, error) {
	r, err := a.fields.record()
	if err != nil {
		return nil, errors.Join(refusal, err)
	}
	return r, refusal
}

func (a redisAnswer) schemaError(jobID string) error {
	schema, err := strconv.Atoi(a.fields.at(0))
	if err == nil {
		err = checkSchema(schema, jobID)
	}
	if err == nil {
		err = errBadReply
	}
	return err
}

// run runs a script that answers.
func (s *RedisStore) run(ctx context.Context, script *redis.Script, keys []string, args ...any) (redisAnswer, error) {
	reply, err := callRedis(ctx, s, func(ctx context.Context) (any, error) {
		return script.Run(ctx, s.client, keys, args...).Result()
	})
	if err != nil {
		return redisAnswer{}, err
	}
	return answerOf(reply)
}

// redisJobs are some jobs of one shard.
type redisJobs struct {
	shard int
	ids   []string
}

// batchesOf sorts the ids by shard.
func (s *RedisStore) batchesOf(jobIDs []string, size int) []redisJobs {
	byShard := map[int][]string{}
	for _, id := range jobIDs {
		shard := s.shardOf(id)
		byShard[shard] = append(byShard[shard], id)
	}
	var batches []redisJobs
	for _, shard := range slices.Sorted(maps.Keys(byShard)) {
		for ids := range slices.Chunk(byShard[shard], size) {
			batches = append(batches, redisJobs{shard, ids})
		}
	}
	return batches
}

// runBatches runs a script over jobs of any shards, in one round trip for each node, and hands each id that it returns to take. What
// else it returns are errors, of single jobs.
func (s *RedisStore) runBatches(ctx context.Context, method string, script *redis.Script, jobIDs []string, args []any, take func(id string)) error {
	if err := ctx.Err(); err != nil {
		return storeError(method, "", nil, err)
	}
	replies, err := s.runPipeline(ctx, script, s.batchesOf(jobIDs, redisBatch), args)
	for _, reply := range replies {
		items, ok := reply.([]any)
		if !ok {
			err = errors.Join(err, errBadReply)
		}
		for _, item := range items {
			switch item := item.(type) {
			case string:
				take(item)
			case error:
				err = errors.Join(err, item)
			default:
				err = errors.Join(err, errBadReply)
			}
		}
	}
	if err != nil {
		return storeError(method, "", nil, err)
	}
	return nil
}

// runPipeline returns the replies of the batches that went well, and why the others did not. The scripts are sent whole: inside
// a pipeline nothing makes up for one that Redis does not have.
func (s *RedisStore) runPipeline(ctx context.Context, script *redis.Script, batches []redisJobs, args []any) (replies []any, err error) {
	if len(batches) == 0 {
		return nil, nil
	}
	cmds, err := callRedis(ctx, s, func(ctx context.Context) ([]*redis.Cmd, error) {
		pipe := s.client.Pipeline()
		sent := make([]*redis.Cmd, 0, len(batches))
		for _, b := range batches {
			keys := []string{s.index(b.shard)}
			argv := slices.Clone(args)
			for _, id := range b.ids {
				keys = append(keys, s.key(b.shard, "job:"+id))
				argv = append(argv, id)
			}
			sent = append(sent, script.Eval(ctx, pipe, keys, argv...))
		}
		_, err := pipe.Exec(ctx)
		return sent, err
	})
	for _, cmd := range cmds {
		if cmd.Err() == nil {
			replies = append(replies, cmd.Val())
		}
	}
	return replies, err
}

// callRedis runs do, which talks to Redis, and waits no longer than ctx and the store's timeout: go-redis does not heed a ctx
// while it waits for a reply. When callRedis gives up, do goes on by itself until the client does: by its ReadTimeout, which
// ends a read that is under way (see impatient), or when it is closed. There are never more of these than connections in the
// client's pool, because waiting for one does heed the ctx.
func callRedis[T any](ctx context.Context, s *RedisStore, do func(ctx context.Context) (T, error)) (T, error) {
	var none T
	if err := ctx.Err(); err != nil {
		return none, err
	}
	if s == nil || s.client == nil {
		return none, errors.New("a RedisStore that NewRedisStore did not make")
	}
	type outcome struct {
		value T
		err   error
	}
	bounded, cancel := context.WithTimeout(ctx, s.options.callTimeout)
	defer cancel()
	done := make(chan outcome, 1)
	go func() {
		value, err := do(bounded)
		done <- outcome{value, err}
	}()
	var o outcome
	select {
	case o = <-done:
	case <-bounded.Done():
		select {
		case o = <-done:
		default:
			o.err = bounded.Err()
		}
	}
	switch {
	case o.err == nil:
	case ctx.Err() != nil:
		o.err = ctx.Err()
	case bounded.Err() != nil:
		o.err = s.noAnswer()
	}
	return o.value, o.err
}

func (s *RedisStore) noAnswer() error {
	return fmt.Errorf("no answer from Redis within %v: %w", s.options.callTimeout, os.ErrDeadlineExceeded)
}

const (
	// redisWatchGet is how often a watch looks at the record although notifications come: one of them may have been lost.
	redisWatchGet = 5 * time.Second
	// redisWatchPoll is how often it looks while none come.
	redisWatchPoll = time.Second
	// redisWatchPatience is how long a watch bears that Redis fails, or has lost the record until its owner writes it again.
	redisWatchPatience = 2 * time.Minute
	// redisFeedPing is how often the subscription is pinged. Without a sign of life in twice that time it is made anew.
	redisFeedPing = 10 * time.Second
)

// Watch implements Watcher. All watches of a store share one subscription. A Redis that fails is borne for two minutes, a client
// that is closed is not.
func (s *RedisStore) Watch(ctx context.Context, jobID string) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		r, err := s.Get(ctx, jobID)
		if err != nil {
			yield(Event{}, storeError("watch", jobID, nil, errors.Unwrap(err)))
			return
		}
		t := teller{yield: yield}
		if !t.tell(r) {
			return
		}
		w := &redisWatch{versionQueue: newVersionQueue(), look: make(chan struct{}, 1)}
		stop := s.announce(jobID, w)
		defer stop(ctx)
		// What was written since the snapshot the record tells: now, or when the subscription is confirmed.
		look := time.NewTimer(redisWatchPoll)
		defer look.Stop()
		var failing time.Time
		for {
			select {
			case <-w.wake:
			case <-w.look:
				look.Reset(0)
				continue
			case <-look.C:
				r, err = s.Get(ctx, jobID)
				switch {
				case err == nil:
					failing = time.Time{}
				case failing.IsZero() && !errors.Is(err, redis.ErrClosed):
					failing = time.Now()
				case errors.Is(err, redis.ErrClosed), time.Since(failing) >= redisWatchPatience:
					yield(Event{}, storeError("watch", jobID, t.told, errors.Unwrap(err)))
					return
				}
				if err != nil || !w.live.Load() {
					look.Reset(redisWatchPoll)
				} else {
					look.Reset(redisWatchGet)
				}
			case <-ctx.Done():
			}
			if err := ctx.Err(); err != nil {
				yield(Event{}, storeError("watch", jobID, t.told, err))
				return
			}
			heard := w.take()
			for _, v := range heard {
				if newer(v, t.told) && !t.tell(v) {
					return
				}
			}
			// The record is the truth, even if it is older than what was told: Redis has lost something. But what was heard
			// while it was read may be newer than it.
			if r != nil && (newer(r, t.told) || len(heard) == 0) && !t.tell(r) {
				return
			}
			r = nil
		}
	}
}

// newer orders two versions of a record.
func newer(a, b *Record) bool { return a.Epoch > b.Epoch || a.Epoch == b.Epoch && a.Rev > b.Rev }

// redisWatch is what Watch is told.
type redisWatch struct {
	*versionQueue
	look chan struct{} // holds one token when the record must be looked at: notifications may have been missed
	live atomic.Bool   // notifications come
}

func (w *redisWatch) put(v *Record) {
	if v == nil {
		signal(w.look)
		return
	}
	w.versionQueue.put(v)
}

func (w *redisWatch) hears(live bool) {
	w.live.Store(live)
	signal(w.look)
}

// redisFeed is the subscription behind all who watch jobs of a store. It lives as long as there are any.
type redisFeed struct {
	store   *RedisStore
	stop    context.CancelFunc
	done    chan struct{} // closed when its goroutines have ended
	changed chan struct{} // holds one token when there is something in touched

	mu      sync.Mutex
	watches map[string][]versionSink // by channel
	touched map[string]struct{}      // channels whose watches came or went
	live    map[string]bool          // channels whose notifications come
}

// announce implements announcer. stop waits no longer than ctx, and no longer than a call may take.
func (s *RedisStore) announce(jobID string, to versionSink) (stop func(ctx context.Context)) {
	channel := s.channel(jobID)
	s.watching.Lock()
	defer s.watching.Unlock()
	feed := s.feed
	if feed == nil {
		ctx, stop := context.WithCancel(context.Background())
		feed = &redisFeed{
			store: s, stop: stop, done: make(chan struct{}), changed: make(chan struct{}, 1),
			watches: map[string][]versionSink{}, touched: map[string]struct{}{}, live: map[string]bool{},
		}
		s.feed = feed
		defer func() { go feed.run(ctx) }() // with something to subscribe to
	}
	feed.add(channel, to)
	return func(ctx context.Context) { s.leave(ctx, feed, channel, to) }
}

// leave ends a watch, and with the last one the feed.
func (s *RedisStore) leave(ctx context.Context, feed *redisFeed, channel string, w versionSink) {
	s.watching.Lock()
	last := feed.remove(channel, w)
	if last {
		s.feed = nil
	}
	s.watching.Unlock()
	if !last {
		return
	}
	feed.stop()
	bound := time.NewTimer(s.options.callTimeout)
	defer bound.Stop()
	select {
	case <-feed.done:
	case <-ctx.Done():
	case <-bound.C:
	}
}

func (f *redisFeed) add(channel string, w versionSink) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watches[channel] = append(f.watches[channel], w)
	if f.live[channel] {
		w.hears(true)
	}
	f.touch(channel)
}

func (f *redisFeed) remove(channel string, w versionSink) (last bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	left := slices.DeleteFunc(f.watches[channel], func(other versionSink) bool { return other == w })
	if f.watches[channel] = left; len(left) == 0 {
		delete(f.watches, channel)
	}
	f.touch(channel)
	return len(f.watches) == 0
}

// touch has the subscription adjusted to the watches of a channel. The lock is held.
func (f *redisFeed) touch(channel string) {
	f.touched[channel] = struct{}{}
	signal(f.changed)
}

// run keeps a subscription until ctx ends.
func (f *redisFeed) run(ctx context.Context) {
	defer close(f.done)
	const shortest, longest = 100 * time.Millisecond, 5 * time.Second
	wait := shortest
	for {
		if heard := f.subscribe(ctx); heard {
			wait = shortest
		}
		f.deaf()
		pause := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
			wait = min(2*wait, longest)
		}
	}
}

// subscribe holds one subscription to the channels of all watches until it fails, and reports whether it heard anything.
func (f *redisFeed) subscribe(ctx context.Context) (heard bool) {
	sub := f.store.client.Subscribe(ctx)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer func() { _ = sub.Close() }()

	subscribed := map[string]bool{}
	f.touchAll()
	// Without a subscription the reader would make the connection, under a lock of go-redis that adjust cannot wait for with a bound.
	if err := f.adjust(ctx, sub, subscribed); err != nil || len(subscribed) == 0 {
		return false
	}
	failed, signs := make(chan struct{}), make(chan struct{}, 1)
	reader.Go(func() {
		defer close(failed)
		f.read(ctx, sub, signs)
	})
	ping := time.NewTicker(redisFeedPing)
	defer ping.Stop()
	for quiet := 0; ; {
		var err error
		select {
		case <-ctx.Done():
			return heard
		case <-failed:
			return heard
		case <-signs:
			heard, quiet = true, 0
		case <-f.changed:
			err = f.adjust(ctx, sub, subscribed)
		case <-ping.C:
			if quiet++; quiet > 2 {
				return heard
			}
			err = f.ping(ctx, sub)
		}
		if err != nil {
			return heard
		}
	}
}

// touchAll is for a subscription that begins.
func (f *redisFeed) touchAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for channel := range f.watches {
		f.touched[channel] = struct{}{}
	}
}

// adjust subscribes to what is watched and to nothing else.
func (f *redisFeed) adjust(ctx context.Context, sub *redis.PubSub, subscribed map[string]bool) error {
	var add, drop []string
	f.mu.Lock()
	for channel := range f.touched {
		switch watched := f.watches[channel] != nil; {
		case watched && !subscribed[channel]:
			add = append(add, channel)
		case !watched && subscribed[channel]:
			drop = append(drop, channel)
			delete(f.live, channel)
		}
	}
	clear(f.touched)
	f.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, f.store.options.callTimeout)
	defer cancel()
	if len(add) > 0 {
		if err := sub.Subscribe(ctx, add...); err != nil {
			return err
		}
	}
	if len(drop) > 0 {
		if err := sub.Unsubscribe(ctx, drop...); err != nil {
			return err
		}
	}
	for _, channel := range add {
		subscribed[channel] = true
	}
	for _, channel := range drop {
		delete(subscribed, channel)
	}
	return nil
}

func (f *redisFeed) ping(ctx context.Context, sub *redis.PubSub) error {
	ctx, cancel := context.WithTimeout(ctx, f.store.options.callTimeout)
	defer cancel()
	return sub.Ping(ctx)
}

// read hands on what comes until the subscription fails or is closed.
func (f *redisFeed) read(ctx context.Context, sub *redis.PubSub, signs chan struct{}) {
	for {
		message, err := sub.Receive(ctx)
		if err != nil {
			return
		}
		signal(signs)
		switch m := message.(type) {
		case *redis.Subscription:
			if m.Kind == "subscribe" {
				f.confirmed(m.Channel)
			}
		case *redis.Message:
			f.notified(m.Channel, m.Payload)
		}
	}
}

// confirmed: from here on notifications come; what was written before, the record tells.
func (f *redisFeed) confirmed(channel string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live[channel] = true
	for _, w := range f.watches[channel] {
		w.hears(true)
	}
}

// deaf: no notifications come until there is a new subscription.
func (f *redisFeed) deaf() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for channel := range f.live {
		for _, w := range f.watches[channel] {
			w.hears(false)
		}
	}
	clear(f.live)
}

// notified hands a version of a record to those who watch it, or has them look for themselves.
func (f *redisFeed) notified(channel, payload string) {
	r, err := versionOf(payload)
	if err != nil {
		r = nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.watches[channel] {
		w.put(r)
	}
}

// versionOf reads a notification: epoch, rev, and the record's JSON, which is left out when it is long. Of a lease that was given
// back an empty one tells.
func versionOf(payload string) (*Record, error) {
	head, record, _ := strings.Cut(payload, "\n")
	epoch, rev, _ := strings.Cut(head, " ")
	e, err1 := strconv.ParseInt(epoch, 10, 64)
	v, err2 := strconv.ParseInt(rev, 10, 64)
	r := &Record{Epoch: e, Rev: v}
	return r, errors.Join(err1, err2, r.UnmarshalJSON([]byte(record)))
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
// merged into the newest.
type versionQueue struct {
	mu       sync.Mutex
	versions []*Record     // oldest first
	wake     chan struct{} // holds one token while there may be versions
}

func newVersionQueue() *versionQueue { return &versionQueue{wake: make(chan struct{}, 1)} }

// put and hears implement versionSink.
func (q *versionQueue) put(v *Record) {
	if v == nil {
		return
	}
	q.mu.Lock()
	q.versions = withVersion(q.versions, v)
	q.mu.Unlock()
	signal(q.wake)
}

func (q *versionQueue) hears(bool) {}

// withVersion adds the newest version to those that were not told yet, oldest first.
func withVersion(versions []*Record, v *Record) []*Record {
	n := len(versions)
	switch {
	case n > 0 && versions[n-1].Progress.Status.Terminal():
		// The watch ends there, whatever became of the job later.
	case n == maxVersions, n > 0 && sameState(versions[n-1], v):
		versions[n-1] = v
	default:
		versions = append(versions, v)
	}
	return versions
}

func (q *versionQueue) take() []*Record {
	q.mu.Lock()
	defer q.mu.Unlock()
	versions := q.versions
	q.versions = nil
	return versions
}

// teller tells the receiver of a watch what versions of a record mean, from a snapshot to the terminal event.
type teller struct {
	yield func(Event, error) bool
	told  *Record // the version told last; nil: none
}

// tell reports whether the watch goes on.
func (t *teller) tell(v *Record) bool {
	for _, e := range eventsBetween(t.told, v) {
		if e.Time.IsZero() {
			e.Time = time.Now()
		}
		if !t.yield(e, nil) {
			return false
		}
	}
	t.told = v
	return !v.Progress.Status.Terminal()
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
