package comfyuitest

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestJobFrameByFrame(t *testing.T) {
	t.Parallel()
	p := Start(t, WithVersion("0.27.0"))
	s := dial(t, p, "me")
	require.Equal(t, `{"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "me"}}`, string(s.next().data))
	id := queue1(t, p, graphOf(
		"1", "EmptyImage", object{{"width", 8}, {"height", 8}, {"batch_size", 1}, {"color", 0}},
		"2", "SaveImage", object{{"images", []any{"1", 0}}, {"filename_prefix", "x"}}), "me")
	require.Equal(t, []string{
		"execution_start", "execution_cached",
		"progress_state", "executing", "progress_state",
		"progress_state", "executing", "executed", "progress_state",
		"execution_success", "executing",
	}, events(s.job()))
	require.Equal(t, "success", at(t, get(t, p, "/history/"+id), id, "status", "status_str"))
}

func TestStepsInABubble(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := Start(t, WithPipes(), WithVersion("0.3.64"), WithNode("Work", Steps(3, time.Hour)))
		s := dial(t, p, "me")
		began := time.Now()
		id := queue1(t, p, graphOf("1", "Work", nil), "me")
		require.Equal(t, []string{
			"execution_start", "execution_cached", "progress_state", "executing",
			"progress_state", "progress", "progress_state", "progress", "progress_state", "progress",
			"executed", "progress_state", "execution_success", "executing",
		}, events(s.job()))
		require.Equal(t, 3*time.Hour, time.Since(began))
		require.Equal(t, 1, p.Runs(id))
	})
}
