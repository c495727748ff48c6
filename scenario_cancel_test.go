package comfyui_test

import (
	"fmt"
	"net/http"
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
