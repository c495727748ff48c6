package comfyui

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestVersionOfANotification(t *testing.T) {
	t.Parallel()
	r, err := versionOf("3 14\n" + `{"schema":1,"job_id":"j","progress":{"status":"running"}}`)
	require.NoError(t, err)
	assert.Equal(t, int64(3), r.Epoch)
	assert.Equal(t, int64(14), r.Rev)
	assert.Equal(t, StatusRunning, r.Progress.Status)
	for _, payload := range []string{"", "3 14", "3 14\n", "x 14\n{}", "3\n{}", "3 14\n{", "3 14\n{\"schema\":2}"} {
		_, err := versionOf(payload)
		require.Error(t, err, payload)
	}
}

// Whoever writes into these keys and channels: the store answers with a record or with an error.
func FuzzRedisReplies(f *testing.F) {
	f.Add("there", "a", "1", "2", "1767000000000000", "0", `{"schema":1,"job_id":"j"}`, "p{}", "1 2\n{}")
	f.Add("written", "a", "1", "2", "0", "0", "", "", "")
	f.Add("schema", "2", "", "", "", "", "", "", "9999999999999999999 1\n{")
	f.Add("fenced", "", "-1", "-9223372036854775808", "9223372036854775807", "1", "null", "d\xff\xff\xff\xff\x0f", "\n")
	f.Fuzz(func(t *testing.T, verdict, owner, epoch, rev, lease, cancel, record, workflow, payload string) {
		s := &RedisStore{}
		in := &Record{JobID: "j"}
		w, err := redisWriteOf(in)
		require.NoError(t, err)
		for _, reply := range []any{
			[]any{verdict, []any{owner, epoch, rev, lease, cancel, record, workflow}},
			[]any{verdict, owner},
			[]any{verdict, []any{owner, nil, rev}},
			[]any{verdict},
			[]any{[]any{verdict}},
			verdict,
			nil,
			int64(1),
		} {
			for _, written := range []*redisWrite{w, nil} {
				a, err := answerOf(reply)
				stored, err := s.settle("get", in, written, a, err)
				if stored == nil && err == nil {
					t.Fatalf("neither record nor error of %q", reply)
				}
				if err != nil && !strings.Contains(err.Error(), "store get") {
					t.Fatalf("an error without its place: %v", err)
				}
			}
		}
		if r, err := versionOf(payload); err == nil {
			_ = eventsBetween(nil, r)
		}
	})
}
