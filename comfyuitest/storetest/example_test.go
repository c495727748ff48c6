package storetest_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

// A reply that is lost: the record is there, and its owner does not know.
func ExampleFlaky() {
	ctx := context.Background()
	lost := true
	store := storetest.Flaky(comfyui.NewMemoryStore(), func(_ context.Context, method string) (error, bool) {
		if method == "Create" && lost {
			lost = false
			return errors.New("connection reset"), true
		}
		return nil, false
	})

	job := &comfyui.Record{JobID: "order-7", Owner: "worker-a"}
	_, err := store.Create(ctx, job, time.Minute)
	fmt.Println(err)
	r, err := store.Create(ctx, job, time.Minute)
	fmt.Println(r.Owner, r.Epoch, err)
	// Output:
	// connection reset
	// worker-a 1 <nil>
}
