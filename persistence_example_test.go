package comfyui_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/comfypod/comfyui"
)

func ExampleMemoryStore() {
	ctx := context.Background()
	store := comfyui.NewMemoryStore()

	job := &comfyui.Record{JobID: "order-7", Pod: "gpu-1", Owner: "worker-a", Progress: comfyui.Progress{Status: comfyui.StatusPending}}
	r, err := store.Create(ctx, job, 30*time.Second)
	fmt.Println(r.Owner, "has the lease in epoch", r.Epoch, err)

	_, err = store.Claim(ctx, "order-7", "worker-b", 30*time.Second)
	fmt.Println("held:", errors.Is(err, comfyui.ErrJobHeld))

	_ = store.Release(ctx, "worker-a", []string{"order-7"})
	r, err = store.Claim(ctx, "order-7", "worker-b", 30*time.Second)
	fmt.Println(r.Owner, "has the lease in epoch", r.Epoch, err)

	job.Epoch, job.Rev = 1, 1
	_, err = store.Update(ctx, job)
	fmt.Println("the former owner is fenced:", errors.Is(err, comfyui.ErrFenced))
	// Output:
	// worker-a has the lease in epoch 1 <nil>
	// held: true
	// worker-b has the lease in epoch 2 <nil>
	// the former owner is fenced: true
}

func ExampleNewRedisStore() {
	server, err := miniredis.Run() // in a program: the address of a real one
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()
	client := redis.NewClient(&redis.Options{Addr: server.Addr()})
	defer func() { _ = client.Close() }()

	store, err := comfyui.NewRedisStore(client, comfyui.RedisPrefix("studio"), comfyui.RedisCallTimeout(2*time.Second))
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	_, err = store.Create(ctx, &comfyui.Record{JobID: "order-7", Pod: "gpu-1", Owner: "worker-a"}, 30*time.Second)
	fmt.Println(err)
	for r, err := range store.Unfinished(ctx, "gpu-1") {
		fmt.Println(r.JobID, "is", r.Owner+"'s", err)
	}
	// Output:
	// <nil>
	// order-7 is worker-a's <nil>
}

func ExampleMemoryStore_Watch() {
	ctx := context.Background()
	store := comfyui.NewMemoryStore()
	r, _ := store.Create(ctx, &comfyui.Record{JobID: "order-7", Attempt: 1, Owner: "worker-a", Progress: comfyui.Progress{Status: comfyui.StatusPending}}, time.Minute)

	for event, err := range store.Watch(ctx, "order-7") {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(event.Kind, event.Progress.Status)
		if event.Kind == comfyui.EventSnapshot {
			// The owner writes only the end: the states that it implies are told too.
			r.Rev++
			r.Progress.Status = comfyui.StatusSucceeded
			r, _ = store.Update(ctx, r)
		}
	}
	// Output:
	// snapshot pending
	// queued queued
	// started running
	// succeeded succeeded
}

// counting is a Store that wraps another one; whatever it does not override goes through.
type counting struct {
	comfyui.Store
	updates int
}

func (c *counting) Update(ctx context.Context, r *comfyui.Record) (*comfyui.Record, error) {
	c.updates++
	return c.Store.Update(ctx, r)
}

func ExampleStore() {
	ctx := context.Background()
	store := &counting{Store: comfyui.NewMemoryStore()}

	r, _ := store.Create(ctx, &comfyui.Record{JobID: "order-7", Owner: "worker-a"}, time.Minute)
	for _, status := range []comfyui.Status{comfyui.StatusQueued, comfyui.StatusRunning, comfyui.StatusSucceeded} {
		r.Rev++
		r.Progress.Status = status
		r, _ = store.Update(ctx, r)
	}
	fmt.Println(store.updates, "updates, the job has", r.Progress.Status)
	// Output: 3 updates, the job has succeeded
}

func ExampleRecord_Clone() {
	r := &comfyui.Record{JobID: "order-7", Labels: map[string]string{"tenant": "a"}}
	c := r.Clone()
	c.Labels["tenant"] = "b"
	fmt.Println(r.Labels["tenant"], c.Labels["tenant"])
	// Output: a b
}
