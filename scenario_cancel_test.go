package comfyui_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// browser posts a prompt as the pod's own page does, without a marker, and returns its id.
func (b *bench) browser(class string) string {
	b.t.Helper()
	before := len(b.pod.Prompts())
	b.send(http.MethodPost, "/prompt", fmt.Sprintf(`{"client_id":"browser","prompt":{"1":{"class_type":%q,"inputs":{"seed":77}}}}`, class))
	prompts := b.pod.Prompts()
	require.Len(b.t, prompts, before+1)
	return prompts[before].ID
}

// A prompt without the library's marker is nobody's, least of all the job's that is being cancelled.
func TestS31OldPodCancelBehindAPromptOfTheBrowser(t *testing.T) {
	t.Parallel()
	bubble(t, func(b *bench) {
		theirs := b.browser("Long")
		j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 1))
		require.NoError(t, err)
		require.NoError(t, j.Cancel(b.ctx))
		_, err = j.Wait(b.ctx)
		require.ErrorIs(t, err, comfyui.ErrCancelled)
		require.NoError(t, b.pod.WaitIdle(b.ctx))
		b.untouched(theirs)
		assert.Zero(t, b.pod.Runs(j.PromptID()))
	}, comfyuitest.WithVersion("0.3.40"))
}

// The job ends, unseen, just before its cancel, and a prompt of the pod's own page runs after it.
func TestS31OldPodCancelOfAJobThatHasJustEnded(t *testing.T) {
	t.Parallel()
	for at := 1900 * time.Millisecond; at < 3200*time.Millisecond; at += 50 * time.Millisecond {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				b.pod.RefuseStreams(http.StatusForbidden)
				j, err := b.client().Submit(b.ctx, graphOf(t, "Work", 1))
				require.NoError(t, err)
				theirs := b.browser("Long")
				time.Sleep(at)
				err = j.Cancel(b.ctx)
				if err != nil {
					require.Equal(t, comfyui.CategoryConflict, comfyui.CategoryOf(err))
				}
				require.NoError(t, b.pod.WaitIdle(b.ctx))
				b.untouched(theirs)
			}, comfyuitest.WithVersion("0.3.40"))
		})
	}
}

// Another process asks for the cancel of a job that waits for room: it is read before the POST, which is not made.
func TestS31CancelIsReadBeforeThePost(t *testing.T) {
	t.Parallel()
	for _, id := range []bool{true, false} {
		t.Run(fmt.Sprintf("its id was given=%t", id), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				store := comfyui.NewMemoryStore()
				c := b.client(comfyui.WithStore(store), comfyui.WithMaxInFlight(1))
				first, err := c.Submit(b.ctx, graphOf(t, "Work", 1))
				require.NoError(t, err)
				var opts []comfyui.JobOption
				if id {
					opts = append(opts, comfyui.WithJobID("the-job"))
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					r, err := c.Execute(b.ctx, graphOf(t, "Work", 2), opts...)
					assert.ErrorIs(t, err, comfyui.ErrCancelled)
					if assert.NotNil(t, r) {
						assert.Equal(t, comfyui.StatusCancelled, r.Status)
					}
				})
				time.Sleep(time.Second)
				for rec, err := range store.Unfinished(b.ctx, "") {
					require.NoError(t, err)
					if rec.JobID != first.ID() {
						_, err := store.RequestCancel(b.ctx, rec.JobID)
						require.NoError(t, err)
					}
				}
				wg.Wait()
				assert.Equal(t, 1, b.pod.Requests("POST /prompt"))
				_, err = first.Wait(b.ctx)
				require.NoError(t, err)
			})
		})
	}
}

// An upload that takes long is broken off by a cancel and by a limit.
func TestS31S33EndDuringTheUpload(t *testing.T) {
	t.Parallel()
	for _, cancels := range []bool{true, false} {
		t.Run(fmt.Sprintf("cancels=%t", cancels), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				c := b.client()
				opts := []comfyui.JobOption{comfyui.WithJobID("the-job"), comfyui.WithInput("1", "image", "x.png", trickle)}
				if !cancels {
					opts = append(opts, comfyui.WithLimits(comfyui.Limits{Total: 5 * time.Second}))
				}
				var wg sync.WaitGroup
				defer wg.Wait()
				if cancels {
					wg.Go(func() {
						time.Sleep(5 * time.Second)
						j, err := c.Attach(b.ctx, "the-job")
						if assert.NoError(t, err) {
							assert.NoError(t, j.Cancel(b.ctx))
						}
					})
				}
				start := time.Now()
				r, err := c.Execute(b.ctx, parsed(t, `{"1":{"class_type":"Work","inputs":{"image":"x"}}}`), opts...)
				assert.WithinDuration(t, start.Add(5*time.Second), time.Now(), 2*time.Second)
				require.NotNil(t, r)
				if cancels {
					require.ErrorIs(t, err, comfyui.ErrCancelled)
					assert.Equal(t, comfyui.StatusCancelled, r.Status)
				} else {
					assert.Equal(t, comfyui.CategoryTimeout, comfyui.CategoryOf(err), "%v", err)
					assert.Equal(t, comfyui.StatusFailed, r.Status)
				}
				assert.Zero(t, b.pod.Requests("POST /prompt"))
			})
		})
	}
}

// A file that cannot be opened ends the job; so does an open that returns nothing at all, which must not panic.
func TestInputThatDoesNotOpen(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func(context.Context) (io.ReadCloser, error){
		"on fire": func(context.Context) (io.ReadCloser, error) { return nil, errors.New("on fire") },
		"neither": func(context.Context) (io.ReadCloser, error) { return nil, nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(b *bench) {
				_, err := b.client().Execute(b.ctx, parsed(t, `{"1":{"class_type":"Work","inputs":{"image":"x"}}}`), comfyui.WithInput("1", "image", "x.png", open))
				assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err), "%v", err)
				assert.ErrorContains(t, err, name)
				assert.ErrorContains(t, err, `opening "x.png"`)
				assert.Zero(t, b.pod.Requests("POST /prompt"))
			})
		})
	}
}

// trickle is a file that comes at a byte a second, for an hour.
func trickle(ctx context.Context) (io.ReadCloser, error) {
	return io.NopCloser(io.LimitReader(slowReader{ctx}, 3600)), nil
}

type slowReader struct{ ctx context.Context }

func (r slowReader) Read(p []byte) (int, error) { return 1, pause(r.ctx, time.Second) }
