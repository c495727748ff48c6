package wire

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// TestStringsAtEveryOffset puts each kind of byte at each place of a string, because strings are read eight bytes at once.
func TestStringsAtEveryOffset(t *testing.T) {
	t.Parallel()
	pieces := []string{`"`, `\"`, `\/`, `\b`, `\f`, `\r`, `\t`, `\u00FC`, `\\`, `\n`, `\u00fc`, `\ud83d\ude00`, `\ud83d`, `\x`, `\u12`, "\n", "\x00", "\x1f", " ", "\x7f", "ü", "\xff", "\xe4\xb8", "語"}
	for length := range 20 {
		for at := range length + 1 {
			for _, piece := range pieces {
				document := `{"k":"` + strings.Repeat("a", at) + piece + strings.Repeat("b", length-at) + `"}`
				var want map[string]string
				wantErr := json.Unmarshal([]byte(document), &want)

				var s scanner
				s.reset([]byte(document))
				got := ""
				for s.object(); s.next(); {
					got = string(s.str())
				}
				s.end()
				require.Equal(t, wantErr != nil, s.bad, "%q", document)
				if wantErr == nil {
					require.Equal(t, want["k"], got, "%q", document)
				}
			}
		}
	}
}

func TestNumbers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		token string
		f     float64
		i     int64
	}{
		{"0", 0, 0},
		{"-0", math.Copysign(0, -1), 0},
		{"7", 7, 7},
		{"20.0", 20, 20},
		{"-3.75", -3.75, -3},
		{"0.1", 0.1, 0},
		{"1e3", 1000, 1000},
		{"1E+2", 100, 100},
		{"25e-1", 2.5, 2},
		{"0.30000000000000004", 0.30000000000000004, 0},
		{"999999999999999", 999999999999999, 999999999999999},
		{"1795489290218", 1795489290218, 1795489290218},
		{"9007199254740993", 9007199254740992, 9007199254740993},
		{"9223372036854775807", math.MaxInt64, math.MaxInt64},
		{"-9223372036854775808", math.MinInt64, math.MinInt64},
		{"9223372036854775808", 9223372036854775808, math.MaxInt64},
		{"-1e30", -1e30, math.MinInt64},
		{"1e999", math.MaxFloat64, math.MaxInt64},
		{"-1e999", -math.MaxFloat64, math.MinInt64},
		{"1e-999", 0, 0},
		{strings.Repeat("9", 5000), math.MaxFloat64, math.MaxInt64},
		{"0." + strings.Repeat("0", 5000) + "1", 0, 0},
		{"NaN", 0, 0},
		{"Infinity", math.MaxFloat64, math.MaxInt64},
		{"-Infinity", -math.MaxFloat64, math.MinInt64},
		{"null", 0, 0},
		{"true", 0, 0},
		{`"7"`, 0, 0},
		{"[7]", 0, 0},
		{`{"a":7}`, 0, 0},
	} {
		var s scanner
		s.reset([]byte("[" + c.token + "," + c.token + " ]"))
		require.True(t, s.list() && s.elem())
		f := s.number()
		assert.Equal(t, math.Float64bits(c.f), math.Float64bits(f), "%.20s: %v", c.token, f)
		require.True(t, s.elem())
		assert.Equal(t, c.i, s.integer(), "%.20s", c.token)
		assert.False(t, s.elem())
		s.end()
		assert.False(t, s.bad, "%.20s", c.token)
	}
}

func TestNumbersAreRoundedAsByStrconv(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		token := rapid.StringMatching(`-?(0|[1-9][0-9]{0,16})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,3})?`).Draw(t, "token")
		want, err := strconv.ParseFloat(token, 64)
		if err != nil {
			want = math.Copysign(math.MaxFloat64, want)
		}
		if got := parseFloat([]byte(token)); math.Float64bits(got) != math.Float64bits(want) {
			t.Fatalf("%s: got %v, want %v", token, got, want)
		}
	})
}

// TestGrammar holds skip against the grammar of encoding/json on short documents that are nearly right.
func TestGrammar(t *testing.T) {
	t.Parallel()
	alphabet := []string{"{", "}", "[", "]", ",", ":", `"a"`, `""`, "1", "-", "0", ".5", "e3", "true", "null", " ", "\t", "x", `"`}
	rapid.Check(t, func(t *rapid.T) {
		b := []byte(strings.Join(rapid.SliceOfN(rapid.SampledFrom(alphabet), 0, 12).Draw(t, "tokens"), ""))
		var s scanner
		s.reset(b)
		s.skip()
		s.end()
		if s.bad == json.Valid(b) {
			t.Fatalf("%q: bad is %t", b, s.bad)
		}
	})
}

func TestDepth(t *testing.T) {
	t.Parallel()
	nested := func(open, closing string, n int) string {
		return strings.Repeat(open, n) + "1" + strings.Repeat(closing, n)
	}
	for name, c := range map[string]struct {
		frame string
		ok    bool
	}{
		"lists, at the limit":          {`{"type": "x", "data": ` + nested("[", "]", maxDepth-1) + "}", true},
		"lists, beyond":                {`{"type": "x", "data": ` + nested("[", "]", maxDepth) + "}", false},
		"objects, at the limit":        {`{"type": "x", "data": ` + nested(`{"a":`, "}", maxDepth-1) + "}", true},
		"objects, beyond":              {`{"type": "x", "data": ` + nested(`{"a":`, "}", maxDepth) + "}", false},
		"within typed data, at it":     {`{"type": "executed", "data": {"output": ` + nested(`[`, "]", maxDepth-2) + "}}", true},
		"within typed data, beyond":    {`{"type": "executed", "data": {"output": ` + nested(`[`, "]", maxDepth-1) + "}}", false},
		"empty containers, at it":      {`{"data": ` + strings.Repeat("[", maxDepth-1) + strings.Repeat("]", maxDepth-1) + "}", true},
		"empty containers, beyond":     {`{"data": ` + strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth) + "}", false},
		"a million lists":              {`{"data": ` + nested("[", "]", 1e6) + "}", false},
		"a million objects, truncated": {strings.Repeat(`{"data":`, 1e6), false},
		"wide, not deep":               {`{"data": [` + strings.Repeat("[{}],", 1e5) + "0]}", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := NewDecoder().Text([]byte(c.frame))
			_, _, ok := NewDecoder().Peek([]byte(c.frame))
			assert.Equal(t, c.ok, ok)
			if c.ok {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, ErrMalformed)
			}
		})
	}
}

func TestErrorsTellWhereButNotWhat(t *testing.T) {
	t.Parallel()
	_, err := NewDecoder().Text([]byte(`{"type": "x", "api_key": "secret" oops}`))
	require.ErrorIs(t, err, ErrMalformed)
	assert.EqualError(t, err, "malformed text frame at byte 34")
	_, err = History([]byte("<html>secret</html>"), false)
	assert.EqualError(t, err, "malformed history at byte 0")
	_, _, err = Queue([]byte("{}"), false)
	assert.EqualError(t, err, "malformed queue at byte 2")
}

func TestInternerIsBounded(t *testing.T) {
	t.Parallel()
	d := NewDecoder()
	long := strings.Repeat("x", maxInternedLen+1)
	for i := range 3 * maxInterned {
		m, err := d.Text(fmt.Appendf(nil, `{"type": "executing", "data": {"node": "%d", "display_node": "%s%d", "prompt_id": "p%d"}}`, i, long, i, i))
		require.NoError(t, err)
		require.Equal(t, strconv.Itoa(i), m.Node)
		require.Equal(t, long+strconv.Itoa(i), m.Display)
		require.Equal(t, "p"+strconv.Itoa(i), m.PromptID)
		require.LessOrEqual(t, len(d.names.known), maxInterned)
	}
	for name := range d.names.known {
		require.LessOrEqual(t, len(name), maxInternedLen)
	}
}

// TestDecoderStaysSmall: one huge frame leaves nothing behind once the next has come.
func TestDecoderStaysSmall(t *testing.T) {
	t.Parallel()
	d := NewDecoder()
	long := `"\u0061` + strings.Repeat("x", 1<<20) + `"`
	for _, frame := range []string{
		`{"type": "executing", "data": {"prompt_id": ` + long + `, "node": ` + long + `}}`,
		`{"type": "execution_cached", "data": {"nodes": [` + listOf(1<<17, `"1"`) + `]}}`,
		`{"type": "progress_state", "data": {"nodes": {` + keysOf(1<<12, "{}") + `}}}`,
		`{"type": "progress_state", "data": {"nodes": {"1": {}}}}`,
	} {
		_, _, ok := d.Peek([]byte(frame))
		require.True(t, ok)
		_, err := d.Text([]byte(frame))
		require.NoError(t, err)
	}
	assert.LessOrEqual(t, cap(d.s.buf), maxScratch)
	assert.LessOrEqual(t, cap(d.peeked), maxScratch)
	assert.LessOrEqual(t, len(d.promptID), maxInternedLen)
	assert.LessOrEqual(t, cap(d.texts), maxScratch/16)
	assert.LessOrEqual(t, cap(d.nodes), 512)
	assert.LessOrEqual(t, len(d.places), maxInterned)
}
