package wire

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// listOf is n equal elements.
func listOf(n int, part string) string { return strings.TrimSuffix(strings.Repeat(part+",", n), ",") }

// keysOf is n different keys with equal values.
func keysOf(n int, value string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `"%d":%s,`, i, value)
	}
	return strings.TrimSuffix(b.String(), ",")
}

// TestTooManyParts: a document that is nothing but small parts is no server's.
func TestTooManyParts(t *testing.T) {
	t.Parallel()
	decoders := map[string]func(parts int) error{
		"nodes": func(n int) error {
			_, err := NewDecoder().Text([]byte(`{"type":"progress_state","data":{"nodes":{` + keysOf(n, "{}") + `}}}`))
			return err
		},
		"queue": func(n int) error {
			_, _, err := Queue([]byte(`{"queue_running":[],"queue_pending":[`+listOf(n, "[0,0,0,0,0]")+`]}`), false)
			return err
		},
		"history": func(n int) error {
			_, err := History([]byte(`{`+keysOf(n, "{}")+`}`), false)
			return err
		},
		"messages": func(n int) error {
			_, err := History([]byte(`{"a":{"status":{"messages":[`+listOf(n-1, "0")+`]}}}`), false)
			return err
		},
		"outputs": func(n int) error {
			_, err := History([]byte(`{"a":{"outputs":{`+keysOf(n-1, "{}")+`}}}`), false)
			return err
		},
		"keys": func(n int) error {
			_, err := Outputs([]byte(`{` + keysOf(n, "0") + `}`))
			return err
		},
		"node errors": func(n int) error {
			_, err := DecodePromptReply([]byte(`{"prompt_id":"a","node_errors":{` + keysOf(n, "0") + `}}`))
			return err
		},
		"errors": func(n int) error {
			_, err := DecodePromptReply([]byte(`{"prompt_id":"a","node_errors":{"1":{"errors":[` + listOf(n-1, "0") + `]}}}`))
			return err
		},
		"classes": func(n int) error {
			_, err := ObjectInfo([]byte(`{` + keysOf(n, "{}") + `}`))
			return err
		},
		"devices": func(n int) error {
			_, err := DecodeSystemStats([]byte(`{"system":{},"devices":[` + listOf(n, "0") + `]}`))
			return err
		},
	}
	for name, decode := range decoders {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.NoError(t, decode(fewParts))
			require.ErrorIs(t, decode(8*fewParts), ErrMalformed)
		})
	}
}

func TestTake(t *testing.T) {
	t.Parallel()
	for size, want := range map[int]int{0: fewParts, 1600: fewParts + 100, 8 << 20: maxParts} {
		s := scanner{b: make([]byte, size)}
		n := 0
		for s.take() {
			n++
		}
		assert.Equal(t, want, n, "%d bytes", size)
		assert.True(t, s.bad)
	}
}

// TestMemoryIsBounded counts all that decoding a megabyte of the worst kind allocates, what is freed meanwhile too: growing slices are four
// fifths of it.
func TestMemoryIsBounded(t *testing.T) {
	const size = 1 << 20
	text := func(frame string) func() error {
		return func() error {
			_, err := NewDecoder().Text([]byte(frame))
			return err
		}
	}
	fill := func(part string) string { return listOf(size/(len(part)+1), part) }
	for name, decode := range map[string]func() error{
		"deep":          text(strings.Repeat("[", size)),
		"one string":    text(`{"type":"` + strings.Repeat("x", size) + `"}`),
		"escapes":       text(`{"type":"` + strings.Repeat(`\u00fc`, size/6) + `"}`),
		"no UTF-8":      text(`{"type":"` + strings.Repeat("\xff", size) + `"}`),
		"one number":    text(`{"type":"progress","data":{"value":` + strings.Repeat("1", size) + `}}`),
		"NaN":           text(`{"type":"x","data":[` + fill("NaN") + `]}`),
		"cached":        text(`{"type":"execution_cached","data":{"nodes":[` + fill("0") + `]}}`),
		"cached, long":  text(`{"type":"execution_cached","data":{"nodes":[` + fill(`"`+strings.Repeat("x", maxInternedLen+1)+`"`) + `]}}`),
		"traceback":     text(`{"type":"execution_error","data":{"traceback":[` + fill(`"ab"`) + `]}}`),
		"nodes":         text(`{"type":"progress_state","data":{"nodes":{` + keysOf(size/12, "{}") + `}}}`),
		"the same node": text(`{"type":"progress_state","data":{"nodes":{` + fill(`"":0`) + `}}}`),
		"queue": func() error {
			_, _, err := Queue([]byte(`{"queue_running":[],"queue_pending":[`+fill("[0,0,0,0,0]")+`]}`), true)
			return err
		},
		"history": func() error {
			_, err := History([]byte(`{`+keysOf(size/12, "{}")+`}`), true)
			return err
		},
		"messages": func() error {
			_, err := History([]byte(`{"a":{"status":{"messages":[`+fill("0")+`]}}}`), true)
			return err
		},
		"values": func() error {
			_, err := Outputs([]byte(`{"a":[` + fill("0") + `]}`))
			return err
		},
		"node errors": func() error {
			_, err := DecodePromptReply([]byte(`{"prompt_id":"a","node_errors":{` + keysOf(size/12, "0") + `}}`))
			return err
		},
		"classes": func() error {
			_, err := ObjectInfo([]byte(`{` + keysOf(size/12, "0") + `}`))
			return err
		},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := decode()
		runtime.ReadMemStats(&after)
		if err != nil {
			require.ErrorIs(t, err, ErrMalformed)
		}
		t.Logf("%s: %d MB", name, (after.TotalAlloc-before.TotalAlloc)>>20)
		assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(128*size), name)
	}
}
