package wire

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Each target compares with the oracle, so a fuzzer finds not only panics but every document on which this package and encoding/json
// disagree.

// hostile are seeds for all targets that read JSON.
var hostile = []string{
	"", " ", "{", "{}", "[]", "null", "{}{}", `{"type"`, `{"type":"progress","data":{"prompt_id":"\ud800\u0041"}}`,
	`{"data":{"value":1},"type":"progress"}`, `{"type":"executing","data":null,"data":{"node":null}}`, `{"type":"executed","data":{"output":NaN}}`,
	strings.Repeat("[", 2000), strings.Repeat(`{"a":`, 1001), `{"a":` + strings.Repeat("[", 999) + strings.Repeat("]", 999) + "}",
	`{"error":"no_prompt","node_errors":[]}`, `<html>502</html>`,
}

func seedFrames(f *testing.F) {
	for _, s := range hostile {
		f.Add([]byte(s))
	}
	d := NewDecoder()
	seen := map[string]int{}
	recorded(f, func(_ testing.TB, _ string, l *line) {
		if l.Kind != "ws" || l.Text == nil {
			return
		}
		m, err := d.Text([]byte(*l.Text))
		if err == nil && seen[m.Name] < 5 && len(*l.Text) < 8<<10 {
			seen[m.Name]++
			f.Add([]byte(*l.Text))
		}
	})
}

func seedAnswers(f *testing.F, method, path string) {
	for _, s := range hostile {
		f.Add([]byte(s))
	}
	seen := 0
	recorded(f, func(_ testing.TB, _ string, l *line) {
		body := l.answer()
		if l.Kind == "http" && l.Method == method && strings.HasPrefix(strings.TrimPrefix(l.Path, "/api"), path) && len(body) < 8<<10 && seen < 60 {
			seen++
			f.Add(body)
		}
	})
	require.NotZero(f, seen)
}

func FuzzText(f *testing.F) {
	seedFrames(f)
	d := NewDecoder()
	f.Fuzz(func(t *testing.T, frame []byte) { checkText(t, d, frame) })
}

// FuzzPeek checks that Peek says what Text says, on a Decoder of its own: nothing that Text leaves behind helps it.
func FuzzPeek(f *testing.F) {
	seedFrames(f)
	peeker, reader := NewDecoder(), NewDecoder()
	f.Fuzz(func(t *testing.T, frame []byte) {
		typ, promptID, ok := peeker.Peek(frame)
		m, err := reader.Text(frame)
		require.Equal(t, err == nil, ok)
		require.Equal(t, m.Type, typ)
		require.Equal(t, m.PromptID, string(promptID))
	})
}

func FuzzBinaryHeader(f *testing.F) {
	recorded(f, func(_ testing.TB, _ string, l *line) {
		if l.Kind == "ws" && l.Binary != nil && len(*l.Binary) < 1<<10 {
			frame, err := base64.StdEncoding.DecodeString(*l.Binary)
			require.NoError(f, err)
			f.Add(frame)
		}
	})
	f.Add(binaryFrame(KindPreviewWithMetadata, 1<<31, "{}"))
	f.Add(binaryFrame(KindPreviewWithMetadata, 2, "{}", "image"))
	f.Add(binaryFrame(KindText, 3, "1.2", "half \xff"))
	f.Add(binaryFrame(99, 0))
	d := NewDecoder()
	f.Fuzz(func(t *testing.T, frame []byte) { checkBinary(t, d, frame) })
}

func FuzzSanitize(f *testing.F) {
	seedAnswers(f, "GET", "/history")
	f.Add([]byte(`[NaN, -Infinity, "NaN\"Infinity", Infinity]`))
	f.Add([]byte(`{"NaN": -NaN, "x": 1Infinity, "y`))
	f.Fuzz(func(t *testing.T, b []byte) { checkSanitize(t, b) })
}

func FuzzQueue(f *testing.F) {
	seedAnswers(f, "GET", "/queue")
	f.Fuzz(func(t *testing.T, body []byte) { checkQueue(t, body) })
}

func FuzzHistory(f *testing.F) {
	seedAnswers(f, "GET", "/history")
	f.Fuzz(func(t *testing.T, body []byte) { checkHistory(t, body) })
}

func FuzzOutputs(f *testing.F) {
	for _, s := range hostile {
		f.Add([]byte(s))
	}
	d := NewDecoder()
	recorded(f, func(_ testing.TB, _ string, l *line) {
		if l.Kind == "ws" && l.Text != nil && len(*l.Text) < 4<<10 {
			if m, err := d.Text([]byte(*l.Text)); err == nil && m.Output != nil {
				f.Add([]byte(m.Output))
			}
		}
	})
	f.Fuzz(func(t *testing.T, node []byte) { checkOutputs(t, node) })
}

func FuzzReplies(f *testing.F) {
	seedAnswers(f, "POST", "/prompt")
	seedAnswers(f, "GET", "/jobs/")
	seedAnswers(f, "GET", "/system_stats")
	seedAnswers(f, "GET", "/object_info/")
	f.Fuzz(func(t *testing.T, body []byte) { checkReplies(t, body) })
}
