package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/comfypod/comfyui"
)

var randomCases = []testCase{
	{"Random/calls of several owners give what the contract says, repeated or not", func(f *fixture) {
		run := 0
		// rapid asks a *testing.T for its deadline, which one in a bubble does not have.
		rapid.Check(struct{ testing.TB }{f.T}, func(rt *rapid.T) {
			run++
			m := &model{rt: rt, store: f.store, ctx: f.ctx, advance: f.advance, prefix: fmt.Sprintf("run-%d-", run), jobs: map[string]*modelJob{}}
			rt.Repeat(map[string]func(*rapid.T){
				"Create":        m.create,
				"Get":           m.get,
				"Update":        m.update,
				"Claim":         m.claim,
				"Renew":         m.renew,
				"Release":       m.release,
				"RequestCancel": m.requestCancel,
				"Unfinished":    m.unfinished,
				"Pass":          m.pass,
			})
		})
	}},
}

// model is the contract in a few lines, and the store beside it. Times are those since the beginning; those that matter are
// apart by more than a slow machine adds.
type model struct {
	rt      *rapid.T
	store   comfyui.Store
	ctx     context.Context
	advance func(time.Duration)
	prefix  string // of the ids, so that one store serves many runs
	now     time.Duration
	jobs    map[string]*modelJob
}

// modelJob is a stored record.
type modelJob struct {
	record  *comfyui.Record // but for LeaseUntil
	lease   time.Duration   // its end; 0: none
	endedIn int64
	expires time.Duration // 0: never
}

const (
	modelTTL       = 100 * time.Second
	modelRetention = 150 * time.Second
)

func (m *model) job(rt *rapid.T) (string, *modelJob) {
	id := m.prefix + rapid.SampledFrom([]string{"x", "y", "z"}).Draw(rt, "job")
	return id, m.find(id)
}

func (m *model) find(id string) *modelJob {
	j := m.jobs[id]
	if j != nil && j.expires != 0 && m.now >= j.expires {
		delete(m.jobs, id)
		return nil
	}
	return j
}

func drawOwner(rt *rapid.T) string {
	return rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "owner")
}

func (j *modelJob) ended() bool { return j.record.Progress.Status.Terminal() }

// put makes r the content, as a terminal or another write does.
func (m *model) put(j *modelJob, r *comfyui.Record) {
	j.record = r
	j.expires = 0
	if j.ended() {
		r.Workflow = nil
		j.lease, j.endedIn = 0, r.Epoch
		j.expires = m.now + r.Retention
	}
}

func (m *model) create(rt *rapid.T) {
	id, j := m.job(rt)
	r := newRecord(id, drawOwner(rt))
	r.Retention = modelRetention
	m.repeat(rt, func() (*comfyui.Record, error) { return m.store.Create(m.ctx, r, modelTTL) }, func() (*modelJob, error) {
		if j == nil {
			stored := r.Clone()
			stored.Epoch = 1
			j = &modelJob{lease: m.now + modelTTL}
			m.put(j, stored)
			m.jobs[id] = j
		}
		return j, nil
	})
}

func (m *model) get(rt *rapid.T) {
	id, j := m.job(rt)
	m.repeat(rt, func() (*comfyui.Record, error) { return m.store.Get(m.ctx, id) }, func() (*modelJob, error) {
		if j == nil {
			return nil, comfyui.ErrJobNotFound
		}
		return j, nil
	})
}

func (m *model) update(rt *rapid.T) {
	id, j := m.job(rt)
	r := newRecord(id, "a")
	if j != nil {
		r = j.record.Clone()
	}
	r.Retention = modelRetention
	r.Workflow = newRecord(id, "a").Workflow
	r.Owner = drawOwner(rt)
	if j != nil && rapid.Bool().Draw(rt, "by the owner") {
		r.Owner = j.record.Owner
	}
	r.Epoch += int64(rapid.SampledFrom([]int{0, 0, 0, 0, -1, 1}).Draw(rt, "epoch"))
	r.Rev += int64(rapid.SampledFrom([]int{1, 1, 1, 2, 0, -1}).Draw(rt, "rev"))
	r.CancelRequested = false
	withStatus(rapid.SampledFrom([]comfyui.Status{
		comfyui.StatusPending, comfyui.StatusQueued, comfyui.StatusRunning, comfyui.StatusSucceeded, comfyui.StatusFailed, comfyui.StatusCancelled,
	}).Draw(rt, "status"))(r)
	r.Progress.Fraction = rapid.Float64Range(0, 1).Draw(rt, "fraction")

	m.repeat(rt, func() (*comfyui.Record, error) { return m.store.Update(m.ctx, r) }, func() (*modelJob, error) {
		switch {
		case j == nil:
			return nil, comfyui.ErrJobNotFound
		case r.Epoch < j.record.Epoch, r.Epoch == j.record.Epoch && r.Owner != j.record.Owner:
			return j, comfyui.ErrFenced
		case r.Epoch == j.record.Epoch && r.Rev <= j.record.Rev:
			return j, nil
		case r.Epoch == j.record.Epoch && j.ended() && j.endedIn == r.Epoch:
			return j, comfyui.ErrFenced
		}
		stored := r.Clone()
		stored.CancelRequested = j.record.CancelRequested && (!j.ended() || r.Progress.Status.Terminal())
		m.put(j, stored)
		return j, nil
	})
}

func (m *model) claim(rt *rapid.T) {
	id, j := m.job(rt)
	owner := drawOwner(rt)
	m.repeat(rt, func() (*comfyui.Record, error) { return m.store.Claim(m.ctx, id, owner, modelTTL) }, func() (*modelJob, error) {
		switch {
		case j == nil:
			return nil, comfyui.ErrJobNotFound
		case j.lease <= m.now:
			j.record.Owner = owner
			j.record.Epoch++
		case j.record.Owner != owner:
			return j, comfyui.ErrJobHeld
		}
		j.lease = m.now + modelTTL
		if j.expires != 0 {
			j.expires = max(j.expires, m.now+modelTTL)
		}
		return j, nil
	})
}

func (m *model) ids() []string {
	return []string{m.prefix + "x", m.prefix + "y", m.prefix + "z", m.prefix + "none"}
}

func (m *model) renew(rt *rapid.T) {
	owner := drawOwner(rt)
	var want []string
	for _, id := range m.ids() {
		if j := m.find(id); j == nil || j.ended() || j.record.Owner != owner {
			want = append(want, id)
		} else {
			j.lease = m.now + modelTTL
		}
	}
	for range rapid.IntRange(1, 2).Draw(rt, "times") {
		lost, err := m.store.Renew(m.ctx, owner, modelTTL, m.ids())
		slices.Sort(lost)
		slices.Sort(want)
		if err != nil || !slices.Equal(lost, want) {
			rt.Fatalf("Renew by %s lost %q, %v; want %q", owner, lost, err, want)
		}
	}
}

func (m *model) release(rt *rapid.T) {
	owner := drawOwner(rt)
	for _, id := range m.ids() {
		if j := m.find(id); j != nil && j.record.Owner == owner {
			j.lease = 0
		}
	}
	for range rapid.IntRange(1, 2).Draw(rt, "times") {
		if err := m.store.Release(m.ctx, owner, m.ids()); err != nil {
			rt.Fatalf("Release: %v", err)
		}
	}
}

func (m *model) requestCancel(rt *rapid.T) {
	id, j := m.job(rt)
	m.repeat(rt, func() (*comfyui.Record, error) { return m.store.RequestCancel(m.ctx, id) }, func() (*modelJob, error) {
		if j == nil {
			return nil, comfyui.ErrJobNotFound
		}
		if !j.ended() {
			j.record.CancelRequested = true
		}
		return j, nil
	})
}

func (m *model) unfinished(rt *rapid.T) {
	got := map[string]*comfyui.Record{}
	for r, err := range m.store.Unfinished(m.ctx, "") {
		if err != nil {
			rt.Fatalf("Unfinished: %v", err)
		}
		got[r.JobID] = r
	}
	for _, id := range m.ids() {
		j := m.find(id)
		if want := j != nil && !j.ended(); want != (got[id] != nil) {
			rt.Fatalf("%s is unfinished: %v, want %v", id, got[id] != nil, want)
		} else if want {
			m.check(rt, got[id], j)
		}
	}
}

// pass lets some time pass, where the clock can be moved.
func (m *model) pass(rt *rapid.T) {
	d := rapid.SampledFrom([]time.Duration{30 * time.Second, 70 * time.Second, 110 * time.Second}).Draw(rt, "time")
	if m.advance == nil {
		rt.Skip("real time")
	}
	m.advance(d)
	m.now += d
}

// repeat makes a call once or twice: the second must give the same and change nothing.
func (m *model) repeat(rt *rapid.T, call func() (*comfyui.Record, error), want func() (*modelJob, error)) {
	j, wantErr := want()
	for range rapid.IntRange(1, 2).Draw(rt, "times") {
		got, err := call()
		if wantErr == nil && err != nil || !errors.Is(err, wantErr) {
			rt.Fatalf("error %v, want %v", err, wantErr)
		}
		if j == nil {
			if got != nil {
				rt.Fatalf("a record came with %v", err)
			}
			continue
		}
		m.check(rt, got, j)
	}
}

func (m *model) check(rt *rapid.T, got *comfyui.Record, j *modelJob) {
	if d := difference(got, j.record); d != "" {
		rt.Fatal(d)
	}
	if got.LeaseUntil.IsZero() != (j.lease == 0) {
		rt.Fatalf("LeaseUntil %v, but the model's lease is %v", got.LeaseUntil, j.lease)
	}
}
