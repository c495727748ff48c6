package storetest

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/comfypod/comfyui"
)

var createCases = []testCase{
	{"Create/stores the record with epoch 1 and a lease for its owner", func(f *fixture) {
		given := newRecord("job", "a")
		created, err := f.store.Create(f.ctx, given, long)
		f.must(err)
		f.wantHolder(created, "a", 1)
		want := given.Clone()
		want.Epoch = 1
		f.wantSame(created, want)
		if created.LeaseUntil.IsZero() {
			f.Fatal("no lease")
		}
		f.wantUnchanged(created)
		_, err = f.store.Claim(f.ctx, "job", "b", long)
		f.wantError(err, comfyui.ErrJobHeld)
	}},
	{"Create/returns the record that is there and changes nothing", func(f *fixture) {
		was := f.create("job", "a", long)
		other := newRecord("job", "b")
		other.Progress.Fraction = 0.9
		got, err := f.store.Create(f.ctx, other, 2*long)
		f.must(err)
		f.wantSame(got, was)
		f.wantUnchanged(was)
	}},
	{"Create/a repeat by the same owner changes nothing", func(f *fixture) {
		was := f.create("job", "a", long)
		for range 3 {
			again := newRecord("job", "a")
			again.Rev = 7
			again.Progress.Fraction = 0.9
			got, err := f.store.Create(f.ctx, again, 2*long)
			f.must(err)
			f.wantSame(got, was)
			f.wantUnchanged(was)
		}
	}},
	{"Create/compares no workflows", func(f *fixture) {
		was := f.create("job", "a", long)
		other := newRecord("job", "b")
		other.Workflow, other.WorkflowHash = json.RawMessage(`{}`), "another"
		got, err := f.store.Create(f.ctx, other, long)
		f.must(err)
		f.wantSame(got, was)
	}},
	{"Create/a lapsed lease is not taken", func(f *fixture) {
		f.create("job", "a", f.short())
		f.lapse()
		got, err := f.store.Create(f.ctx, newRecord("job", "b"), long)
		f.must(err)
		f.wantHolder(got, "a", 1)
	}},
	{"Create/an ended job is returned and not revived", func(f *fixture) {
		ended := f.end(f.create("job", "a", long), comfyui.StatusSucceeded)
		for _, owner := range []string{"a", "b"} {
			got, err := f.store.Create(f.ctx, newRecord("job", owner), long)
			f.must(err)
			f.wantSame(got, ended)
		}
		f.wantUnchanged(ended)
		f.wantIDs(f.unfinished(""))
	}},
	{"Create/no TTL while unfinished", func(f *fixture) {
		r := newRecord("job", "a")
		r.Retention = f.short() / 10
		_, err := f.store.Create(f.ctx, r, f.short())
		f.must(err)
		f.lapse()
		f.lapse()
		f.get("job")
		f.wantIDs(f.unfinished(""), "job")
	}},
	{"Create/of an ended record stores it as a terminal update would leave it", func(f *fixture) {
		r := newRecord("job", "a")
		withStatus(comfyui.StatusFailed)(r)
		r.Failure = &comfyui.Error{Op: "run", Category: comfyui.CategoryExecution, Err: fmt.Errorf("node 3 failed")}
		r.Retention = f.brief()
		got, err := f.store.Create(f.ctx, r, long)
		f.must(err)
		if got.Workflow != nil || !got.LeaseUntil.IsZero() || got.Progress.Status != comfyui.StatusFailed {
			f.Fatalf("workflow %s, lease until %v, status %q", got.Workflow, got.LeaseUntil, got.Progress.Status)
		}
		f.wantUnchanged(got)
		f.wantIDs(f.unfinished(""))
		f.expire()
		_, err = f.store.Get(f.ctx, "job")
		f.wantError(err, comfyui.ErrJobNotFound)
	}},
	{"Create/keeps the cancel request of a record that the store had lost", func(f *fixture) {
		r := newRecord("job", "a")
		r.CancelRequested = true
		got, err := f.store.Create(f.ctx, r, long)
		f.must(err)
		if !got.CancelRequested || !f.get("job").CancelRequested {
			f.Fatal("the cancel request is gone")
		}
	}},
	{"Create/refuses a record of a newer schema", func(f *fixture) {
		newer := newRecord("newer", "a")
		newer.Schema = 2
		_, err := f.store.Create(f.ctx, newer, long)
		f.wantError(err, comfyui.ErrSchema)
		_, err = f.store.Get(f.ctx, "newer")
		f.wantError(err, comfyui.ErrJobNotFound)
	}},
	{"Create/what is given is not kept and what is returned is a copy", func(f *fixture) {
		given := newRecord("job", "a")
		created, err := f.store.Create(f.ctx, given, long)
		f.must(err)
		want := created.Clone()
		scribble(given)
		scribble(created)
		f.wantSame(f.get("job"), want)
		scribble(f.get("job"))
		f.wantSame(f.get("job"), want)
		for r, err := range f.store.Unfinished(f.ctx, "") {
			f.must(err)
			scribble(r)
		}
		f.wantSame(f.get("job"), want)

		written := next(want, nil)
		stored := f.update(written)
		want = stored.Clone()
		scribble(written)
		scribble(stored)
		f.wantSame(f.get("job"), want)
		scribble(f.claim("job", "a", long))
		cancelled, err := f.store.RequestCancel(f.ctx, "job")
		f.must(err)
		want = cancelled.Clone()
		scribble(cancelled)
		f.wantSame(f.get("job"), want)
	}},
	{"Create/odd ids", func(f *fixture) {
		for _, id := range []string{"a b", "{x}", "}{", "ü/..", "a:b:c", "a\nb", "*", "[a-z]", "'; --", fmt.Sprintf("%0512d", 7)} {
			r := f.create(id, "a", long)
			f.wantUnchanged(r)
			if r = f.end(r, comfyui.StatusSucceeded); r.JobID != id {
				f.Fatalf("id %q, want %q", r.JobID, id)
			}
		}
		f.wantIDs(f.unfinished(""))
	}},
	{"Get/absent", func(f *fixture) {
		_, err := f.store.Get(f.ctx, "none")
		f.wantError(err, comfyui.ErrJobNotFound)
	}},
	{"Get/fields of a later version survive an update", func(f *fixture) {
		data := contentOf(newRecord("job", "a"))
		data = append([]byte(`{"later":{"a":[1,2]},`), data[1:]...)
		var r comfyui.Record
		f.must(json.Unmarshal(data, &r))
		r.Owner, r.Rev = "a", 1
		_, err := f.store.Create(f.ctx, &r, long)
		f.must(err)
		f.update(next(f.get("job"), withStatus(comfyui.StatusRunning)))
		ended := f.end(f.get("job"), comfyui.StatusSucceeded)
		var fields map[string]json.RawMessage
		f.must(json.Unmarshal(contentOf(ended), &fields))
		if string(fields["later"]) != `{"a":[1,2]}` {
			f.Fatalf("the field of a later version is now %s", fields["later"])
		}
	}},
	{"Context/an ended one ends every call with its error", func(f *fixture) {
		was := f.create("job", "a", long)
		ctx, cancel := context.WithCancel(f.ctx)
		cancel()
		_, createErr := f.store.Create(ctx, newRecord("job", "a"), long)
		_, getErr := f.store.Get(ctx, "job")
		_, updateErr := f.store.Update(ctx, next(was, nil))
		_, claimErr := f.store.Claim(ctx, "job", "a", long)
		_, renewErr := f.store.Renew(ctx, "a", long, []string{"job"})
		_, cancelErr := f.store.RequestCancel(ctx, "job")
		var walkErr error
		for _, err := range f.store.Unfinished(ctx, "") {
			walkErr = err
		}
		for _, err := range []error{createErr, getErr, updateErr, claimErr, renewErr, f.store.Release(ctx, "a", []string{"job"}), cancelErr, walkErr} {
			f.wantError(err, context.Canceled)
		}
	}},
}

// scribble changes all that is reached from a record.
func scribble(r *comfyui.Record) {
	for i := range r.Workflow {
		r.Workflow[i] = 'x'
	}
	for i := range r.ExtraData {
		r.ExtraData[i] = 'x'
	}
	for k := range r.Labels {
		r.Labels[k] = "scribbled"
	}
	for i := range r.Outputs {
		if r.Outputs[i].File != nil {
			r.Outputs[i].File.Filename = "scribbled"
		}
		for j := range r.Outputs[i].Raw {
			r.Outputs[i].Raw[j] = 'x'
		}
		r.Outputs[i].Node = "scribbled"
	}
	for i := range r.CachedNodes {
		r.CachedNodes[i] = "scribbled"
	}
	for _, w := range r.Warnings {
		w.Op = "scribbled"
	}
	r.JobID, r.Owner, r.Epoch, r.Rev = "scribbled", "scribbled", 99, 99
}

var updateCases = []testCase{
	{"Update/replaces the content and returns the stored record", func(f *fixture) {
		r := f.create("job", "a", long)
		r.Rev = 5
		r.Pod, r.ClientID, r.PromptID, r.Attempt, r.Started, r.Number = "pod-2", "c2", "p2", 2, true, 8
		r.WorkflowHash, r.Workflow, r.ExtraData = "h2", json.RawMessage(`{"1":{}}`), nil
		r.Options, r.Labels, r.Outputs, r.CachedNodes, r.Warnings = comfyui.RecordOptions{AtMostOnce: true}, nil, nil, nil, nil
		r.Progress = comfyui.Progress{Status: comfyui.StatusRunning, QueueAhead: -1}
		r.NextAttempt, r.StartedAt, r.Retention = time.Time{}, r.CreatedAt.Add(time.Minute), time.Minute
		want := r.Clone()
		stored := f.update(r)
		f.wantSame(stored, want)
		f.wantUnchanged(stored)
	}},
	{"Update/absent", func(f *fixture) {
		r := newRecord("none", "a")
		r.Epoch = 1
		for range 2 {
			_, err := f.store.Update(f.ctx, r)
			f.wantError(err, comfyui.ErrJobNotFound)
			_, err = f.store.Get(f.ctx, "none")
			f.wantError(err, comfyui.ErrJobNotFound)
		}
	}},
	{"Update/of a lower epoch is fenced and gets the newer record", func(f *fixture) {
		first := f.create("job", "a", f.short())
		f.lapse()
		was := f.claim("job", "b", long)
		for _, change := range []func(*comfyui.Record){nil, withStatus(comfyui.StatusSucceeded)} {
			got, err := f.store.Update(f.ctx, next(first, change))
			f.wantError(err, comfyui.ErrFenced)
			f.wantSame(got, was)
		}
		f.wantUnchanged(was)
	}},
	{"Update/of the same epoch by another owner is fenced", func(f *fixture) {
		was := f.create("job", "a", long)
		foreign := next(was, withStatus(comfyui.StatusRunning))
		foreign.Owner, foreign.Rev = "b", 99
		got, err := f.store.Update(f.ctx, foreign)
		f.wantError(err, comfyui.ErrFenced)
		f.wantSame(got, was)
		f.wantUnchanged(was)
	}},
	{"Update/a replay or a late write is no error and no change", func(f *fixture) {
		r := next(f.create("job", "a", long), withStatus(comfyui.StatusRunning))
		r.Rev = 5
		was := f.update(r)
		for rev := int64(1); rev <= 5; rev++ {
			late := was.Clone()
			late.Rev = rev
			late.Progress.Fraction = 0.99
			withStatus(comfyui.StatusFailed)(late)
			f.wantSame(f.update(late), was)
			f.wantUnchanged(was)
		}
	}},
	{"Update/of an ended job in its epoch is fenced, a replay of the end is not", func(f *fixture) {
		r := f.create("job", "a", long)
		last := next(r, withStatus(comfyui.StatusSucceeded))
		ended := f.update(last)
		f.wantSame(f.update(last), ended)
		f.wantSame(f.update(next(r, withStatus(comfyui.StatusRunning))), ended)
		for _, s := range []comfyui.Status{comfyui.StatusRunning, comfyui.StatusFailed, comfyui.StatusSucceeded} {
			got, err := f.store.Update(f.ctx, next(ended, withStatus(s)))
			f.wantError(err, comfyui.ErrFenced)
			f.wantSame(got, ended)
		}
		f.wantUnchanged(ended)
	}},
	{"Update/of a higher epoch is written, with its owner", func(f *fixture) {
		r := next(f.create("job", "a", long), withStatus(comfyui.StatusRunning))
		r.Owner, r.Epoch, r.Rev = "b", 4, 1
		got := f.update(r)
		f.wantHolder(got, "b", 4)
		f.wantSame(got, r)
		f.wantUnchanged(got)
		f.wantSame(f.update(r), got)
		_, err := f.store.Update(f.ctx, next(newRecord("job", "a"), nil))
		f.wantError(err, comfyui.ErrFenced)
	}},
	{"Update/a lapsed lease that nobody claimed does not refuse", func(f *fixture) {
		r := f.create("job", "a", f.short())
		f.lapse()
		f.wantSame(f.update(next(r, withStatus(comfyui.StatusRunning))), next(r, withStatus(comfyui.StatusRunning)))
	}},
	{"Update/does not move the lease", func(f *fixture) {
		r := f.create("job", "a", f.short())
		if got := f.update(next(r, nil)); !got.LeaseUntil.Equal(r.LeaseUntil) {
			f.Fatalf("LeaseUntil moved from %v to %v", r.LeaseUntil, got.LeaseUntil)
		}
	}},
	{"Update/the end frees the lease, keeps the owner, drops the workflow, leaves Unfinished", func(f *fixture) {
		for _, s := range []comfyui.Status{comfyui.StatusSucceeded, comfyui.StatusFailed, comfyui.StatusCancelled} {
			id := string(s)
			r := next(f.create(id, "a", long), withStatus(s))
			got := f.update(r)
			f.wantHolder(got, "a", 1)
			if got.Workflow != nil || !got.LeaseUntil.IsZero() {
				f.Fatalf("workflow %s, lease until %v", got.Workflow, got.LeaseUntil)
			}
			r.Workflow = nil
			f.wantSame(got, r)
			f.wantUnchanged(got)
			f.wantIDs(f.unfinished(""))
			f.wantHolder(f.claim(id, "b", long), "b", 2)
		}
	}},
	{"Update/the end starts Retention", func(f *fixture) {
		r := f.create("job", "a", long)
		r.Retention = f.short()
		ended := f.end(r, comfyui.StatusSucceeded)
		f.lapse()
		_, getErr := f.store.Get(f.ctx, "job")
		_, updateErr := f.store.Update(f.ctx, next(ended, nil))
		_, claimErr := f.store.Claim(f.ctx, "job", "b", long)
		_, cancelErr := f.store.RequestCancel(f.ctx, "job")
		for _, err := range []error{getErr, updateErr, claimErr, cancelErr} {
			f.wantError(err, comfyui.ErrJobNotFound)
		}
		f.wantHolder(f.create("job", "b", long), "b", 1)
		f.wantIDs(f.unfinished(""), "job")
	}},
	{"Update/without a Retention the ended record stays", func(f *fixture) {
		ended := f.end(f.create("job", "a", f.short()), comfyui.StatusSucceeded)
		f.lapse()
		f.wantUnchanged(ended)
	}},
	{"Update/reopens an ended job that was claimed, and undoes the end", func(f *fixture) {
		r := f.create("job", "a", long)
		r.Retention = f.brief()
		_, err := f.store.RequestCancel(f.ctx, "job")
		f.must(err)
		f.end(r, comfyui.StatusCancelled)
		claimed := f.claim("job", "b", long)
		f.wantHolder(claimed, "b", 2)
		again := next(claimed, withStatus(comfyui.StatusPending))
		again.Attempt, again.Workflow, again.FinishedAt = 2, json.RawMessage(`{"again":1}`), time.Time{}
		got := f.update(again)
		f.wantHolder(got, "b", 2)
		if got.CancelRequested || string(got.Workflow) != `{"again":1}` || got.Progress.Status != comfyui.StatusPending || got.LeaseUntil.IsZero() {
			f.Fatalf("cancel requested %v, workflow %s, status %q, lease until %v", got.CancelRequested, got.Workflow, got.Progress.Status, got.LeaseUntil)
		}
		f.wantSame(f.update(again), got)
		f.wantIDs(f.unfinished(""), "job")
		f.expire()
		f.wantUnchanged(got)
		_, err = f.store.Claim(f.ctx, "job", "c", long)
		f.wantError(err, comfyui.ErrJobHeld)
		f.wantHolder(f.end(got, comfyui.StatusSucceeded), "b", 2)
		f.wantIDs(f.unfinished(""))
	}},
	{"Update/reopens an ended job under a higher epoch when the claim was lost", func(f *fixture) {
		r := f.create("job", "a", long)
		r.Retention = f.brief()
		_, err := f.store.RequestCancel(f.ctx, "job")
		f.must(err)
		ended := f.end(r, comfyui.StatusCancelled)
		again := next(ended, withStatus(comfyui.StatusPending))
		again.Owner, again.Epoch, again.CancelRequested = "b", ended.Epoch+1, false
		got := f.update(again)
		f.wantHolder(got, "b", 2)
		if got.CancelRequested {
			f.Fatal("the cancel of the former run cancels this one")
		}
		f.wantIDs(f.unfinished(""), "job")
		got, err = f.store.RequestCancel(f.ctx, "job")
		f.must(err)
		f.wantSame(f.update(again), got)
		f.expire() // the Retention of the end that is undone
		f.wantUnchanged(got)
	}},
	{"Update/an ended job that was claimed can end anew", func(f *fixture) {
		f.end(f.create("job", "a", long), comfyui.StatusFailed)
		got := f.end(f.claim("job", "b", long), comfyui.StatusSucceeded)
		f.wantHolder(got, "b", 2)
		if !got.LeaseUntil.IsZero() {
			f.Fatal("the end left the lease")
		}
		_, err := f.store.Update(f.ctx, next(got, withStatus(comfyui.StatusRunning)))
		f.wantError(err, comfyui.ErrFenced)
	}},
}

var leaseCases = []testCase{
	{"Claim/a lapsed lease passes on, in the next epoch", func(f *fixture) {
		was := f.create("job", "a", f.short())
		f.lapse()
		got := f.claim("job", "b", long)
		f.wantHolder(got, "b", 2)
		if !got.LeaseUntil.After(was.LeaseUntil) {
			f.Fatalf("the new lease ends at %v, the old one ended at %v", got.LeaseUntil, was.LeaseUntil)
		}
		was.Owner, was.Epoch = "b", 2
		f.wantSame(got, was)
		f.wantUnchanged(got)
		f.wantIDs(f.unfinished(""), "job")
	}},
	{"Claim/a free lease passes on, in the next epoch", func(f *fixture) {
		f.create("job", "a", long)
		f.must(f.store.Release(f.ctx, "a", []string{"job"}))
		f.wantHolder(f.claim("job", "b", long), "b", 2)
	}},
	{"Claim/a lapsed lease of one's own begins the next epoch", func(f *fixture) {
		f.create("job", "a", f.short())
		f.lapse()
		f.wantHolder(f.claim("job", "a", long), "a", 2)
	}},
	{"Claim/another's running lease is held", func(f *fixture) {
		was := f.create("job", "a", long)
		for range 2 {
			got, err := f.store.Claim(f.ctx, "job", "b", long)
			f.wantError(err, comfyui.ErrJobHeld)
			f.wantSame(got, was)
			f.wantUnchanged(was)
		}
	}},
	{"Claim/a running lease of one's own is extended in the same epoch", func(f *fixture) {
		was := f.create("job", "a", long)
		for i := range 3 {
			got := f.claim("job", "a", long+time.Duration(i+1)*time.Hour)
			f.wantSame(got, was)
			if !got.LeaseUntil.After(was.LeaseUntil) {
				f.Fatalf("the lease ends at %v, before the claim at %v", got.LeaseUntil, was.LeaseUntil)
			}
			was = got
		}
	}},
	{"Claim/absent", func(f *fixture) {
		_, err := f.store.Claim(f.ctx, "none", "a", long)
		f.wantError(err, comfyui.ErrJobNotFound)
		_, err = f.store.Get(f.ctx, "none")
		f.wantError(err, comfyui.ErrJobNotFound)
	}},
	{"Claim/an ended job stays ended and is kept for the ttl at least", func(f *fixture) {
		r := f.create("job", "a", long)
		r.Retention = f.brief()
		ended := f.end(r, comfyui.StatusFailed)
		got := f.claim("job", "b", long)
		f.wantHolder(got, "b", 2)
		if got.Progress.Status != comfyui.StatusFailed || got.LeaseUntil.IsZero() {
			f.Fatalf("status %q, lease until %v", got.Progress.Status, got.LeaseUntil)
		}
		f.wantIDs(f.unfinished(""))
		f.expire()
		f.wantUnchanged(got)
		_, err := f.store.Claim(f.ctx, "job", "c", long)
		f.wantError(err, comfyui.ErrJobHeld)
		late, err := f.store.Update(f.ctx, next(ended, nil))
		f.wantError(err, comfyui.ErrFenced)
		f.wantSame(late, got)
	}},
	{"Claim/does not shorten Retention", func(f *fixture) {
		r := f.create("job", "a", long)
		r.Retention = long
		f.end(r, comfyui.StatusFailed)
		got := f.claim("job", "b", f.short())
		f.lapse()
		f.wantUnchanged(got)
		f.wantHolder(f.claim("job", "c", long), "c", got.Epoch+1)
	}},
	{"Renew/extends the owner's leases", func(f *fixture) {
		ids := []string{"j1", "j2", "j3"}
		for _, id := range ids {
			f.create(id, "a", f.short())
		}
		for range 2 {
			lost, err := f.store.Renew(f.ctx, "a", long, ids)
			f.must(err)
			f.wantIDs(lost)
		}
		f.lapse()
		for _, id := range ids {
			_, err := f.store.Claim(f.ctx, id, "b", long)
			f.wantError(err, comfyui.ErrJobHeld)
			f.wantHolder(f.get(id), "a", 1)
		}
	}},
	{"Renew/changes nothing but the end of the lease", func(f *fixture) {
		was := f.create("job", "a", f.short())
		_, err := f.store.Renew(f.ctx, "a", long, []string{"job"})
		f.must(err)
		got := f.get("job")
		f.wantSame(got, was)
		if !got.LeaseUntil.After(was.LeaseUntil) {
			f.Fatalf("the lease still ends at %v", got.LeaseUntil)
		}
	}},
	{"Renew/a lapsed lease that nobody claimed", func(f *fixture) {
		f.create("job", "a", f.short())
		f.lapse()
		lost, err := f.store.Renew(f.ctx, "a", long, []string{"job"})
		f.must(err)
		f.wantIDs(lost)
		_, err = f.store.Claim(f.ctx, "job", "b", long)
		f.wantError(err, comfyui.ErrJobHeld)
	}},
	{"Renew/tells what is lost and leaves it alone", func(f *fixture) {
		f.create("mine", "a", long)
		others := f.create("others", "b", long)
		f.create("taken", "a", f.short())
		ended := f.end(f.create("ended", "a", long), comfyui.StatusSucceeded)
		f.lapse()
		taken := f.claim("taken", "c", long)
		for range 2 {
			lost, err := f.store.Renew(f.ctx, "a", long, []string{"absent", "ended", "mine", "others", "taken"})
			f.must(err)
			slices.Sort(lost)
			f.wantIDs(lost, "absent", "ended", "others", "taken")
		}
		f.wantUnchanged(others)
		f.wantUnchanged(ended)
		f.wantUnchanged(taken)
	}},
	{"Renew/many and none", func(f *fixture) {
		lost, err := f.store.Renew(f.ctx, "a", long, nil)
		f.must(err)
		f.wantIDs(lost)
		var ids, want []string
		for i := range 300 {
			id := fmt.Sprintf("job-%03d", i)
			ids = append(ids, id)
			if i%3 == 0 {
				f.create(id, "a", f.short())
			} else {
				want = append(want, id)
			}
		}
		lost, err = f.store.Renew(f.ctx, "a", long, ids)
		f.must(err)
		slices.Sort(lost)
		f.wantIDs(lost, want...)
	}},
	{"Release/frees the leases that the owner holds, and no others", func(f *fixture) {
		f.create("mine", "a", long)
		others := f.create("others", "b", long)
		ended := f.end(f.create("ended", "a", long), comfyui.StatusSucceeded)
		for range 2 {
			f.must(f.store.Release(f.ctx, "a", []string{"mine", "others", "absent", "ended"}))
		}
		freed := f.get("mine")
		f.wantHolder(freed, "a", 1)
		if !freed.LeaseUntil.IsZero() {
			f.Fatalf("the lease still ends at %v", freed.LeaseUntil)
		}
		f.wantUnchanged(others)
		f.wantUnchanged(ended)
		f.wantIDs(f.unfinished(""), "mine", "others")
		f.wantHolder(f.claim("mine", "b", long), "b", 2)
		f.must(f.store.Release(f.ctx, "a", []string{"mine"}))
		_, err := f.store.Claim(f.ctx, "mine", "c", long)
		f.wantError(err, comfyui.ErrJobHeld)
		f.must(f.store.Release(f.ctx, "a", nil))
	}},
	{"Release/of an ended job that was claimed", func(f *fixture) {
		f.end(f.create("job", "a", long), comfyui.StatusFailed)
		f.claim("job", "b", long)
		f.must(f.store.Release(f.ctx, "b", []string{"job"}))
		f.wantHolder(f.claim("job", "c", long), "c", 3)
	}},
}

var cancelCases = []testCase{
	{"RequestCancel/by anyone, whatever the lease", func(f *fixture) {
		f.create("held", "a", long)
		f.create("lapsed", "a", f.short())
		f.create("free", "a", long)
		f.must(f.store.Release(f.ctx, "a", []string{"free"}))
		f.lapse()
		for _, id := range []string{"held", "lapsed", "free"} {
			was := f.get(id)
			was.CancelRequested = true
			for range 2 {
				got, err := f.store.RequestCancel(f.ctx, id)
				f.must(err)
				f.wantSame(got, was)
				f.wantUnchanged(was)
			}
		}
	}},
	{"RequestCancel/is never cleared", func(f *fixture) {
		r := f.create("job", "a", f.short())
		_, err := f.store.RequestCancel(f.ctx, "job")
		f.must(err)
		r = next(r, withStatus(comfyui.StatusRunning))
		r.CancelRequested = false
		if got := f.update(r); !got.CancelRequested {
			f.Fatal("cleared by an update")
		}
		f.lapse()
		if got := f.claim("job", "b", long); !got.CancelRequested {
			f.Fatal("cleared by a claim")
		}
		higher := next(r, nil)
		higher.Owner, higher.Epoch, higher.CancelRequested = "c", 9, false
		if got := f.update(higher); !got.CancelRequested {
			f.Fatal("cleared by an update of a higher epoch")
		}
		if got := f.end(higher, comfyui.StatusSucceeded); !got.CancelRequested {
			f.Fatal("cleared by the end")
		}
	}},
	{"RequestCancel/an ended job is returned unchanged", func(f *fixture) {
		ended := f.end(f.create("job", "a", long), comfyui.StatusSucceeded)
		got, err := f.store.RequestCancel(f.ctx, "job")
		f.must(err)
		f.wantSame(got, ended)
		f.wantUnchanged(ended)
	}},
	{"RequestCancel/absent", func(f *fixture) {
		_, err := f.store.RequestCancel(f.ctx, "none")
		f.wantError(err, comfyui.ErrJobNotFound)
		_, err = f.store.Get(f.ctx, "none")
		f.wantError(err, comfyui.ErrJobNotFound)
	}},
}

var unfinishedCases = []testCase{
	{"Unfinished/the records of one pod, or of all", func(f *fixture) {
		f.wantIDs(f.unfinished(""))
		for i, pod := range []string{"p1", "p1", "p2", ""} {
			r := newRecord(fmt.Sprint("j", i), "a")
			r.Pod = pod
			_, err := f.store.Create(f.ctx, r, long)
			f.must(err)
		}
		f.wantIDs(f.unfinished("p1"), "j0", "j1")
		f.wantIDs(f.unfinished("p2"), "j2")
		f.wantIDs(f.unfinished("p3"))
		f.wantIDs(f.unfinished(""), "j0", "j1", "j2", "j3")
		f.update(next(f.get("j0"), func(r *comfyui.Record) { r.Pod = "p3" }))
		f.wantIDs(f.unfinished("p1"), "j1")
		f.wantIDs(f.unfinished("p3"), "j0")
	}},
	{"Unfinished/held, lapsed and free ones, as they stand", func(f *fixture) {
		f.create("held", "a", long)
		f.create("lapsed", "a", f.short())
		f.create("free", "a", long)
		f.must(f.store.Release(f.ctx, "a", []string{"free"}))
		f.lapse()
		n := 0
		for r, err := range f.store.Unfinished(f.ctx, "") {
			f.must(err)
			f.wantUnchanged(r)
			n++
		}
		if n != 3 {
			f.Fatalf("%d records, want 3", n)
		}
	}},
	{"Unfinished/the store can be called from inside the walk, and left", func(f *fixture) {
		for i := range 20 {
			f.create(fmt.Sprint("j", i), "a", f.short())
		}
		f.lapse()
		n := 0
		for r, err := range f.store.Unfinished(f.ctx, "") {
			f.must(err)
			f.end(f.claim(r.JobID, "b", long), comfyui.StatusSucceeded)
			if n++; n == 10 {
				break
			}
		}
		if left := len(f.unfinished("")); left != 10 {
			f.Fatalf("%d unfinished, want 10", left)
		}
	}},
	{"Unfinished/exactly once while others come and go and leases move", func(f *fixture) {
		const stay = 250
		var ids []string
		for i := range stay {
			id := fmt.Sprintf("stay-%03d", i)
			f.create(id, "a", long)
			ids = append(ids, id)
			f.create(fmt.Sprintf("go-%03d", i), "a", long)
		}
		seen := map[string]int{}
		n := 0
		for r, err := range f.store.Unfinished(f.ctx, "") {
			f.must(err)
			seen[r.JobID]++
			if n < stay {
				f.create(fmt.Sprintf("come-%03d", n), "a", long)
				f.end(f.get(fmt.Sprintf("go-%03d", n)), comfyui.StatusSucceeded)
				_, err := f.store.Renew(f.ctx, "a", long+time.Duration(n)*time.Hour, []string{ids[n], ids[(n*7)%stay]})
				f.must(err)
				f.must(f.store.Release(f.ctx, "a", []string{ids[(n*13)%stay]}))
			}
			n++
		}
		for _, id := range ids {
			if seen[id] != 1 {
				f.Fatalf("%s was there throughout and was yielded %d times", id, seen[id])
			}
		}
		for id, times := range seen {
			if times != 1 {
				f.Fatalf("%s was yielded %d times", id, times)
			}
		}
	}},
}

// bounded returns a ctx that ends a case which waits in vain.
func (f *fixture) bounded() context.Context {
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	f.Cleanup(cancel)
	return ctx
}

// perform is for those goroutines of a case which report errors and end.
func perform(t testing.TB, err error) bool {
	if err != nil {
		t.Errorf("unexpected error: %v", err)
	}
	return err == nil
}
