package comfyuitest

import (
	"encoding/json"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// TestJSONIsPythons: the texts are what json.dumps(json.loads(text)) gives.
func TestJSONIsPythons(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		`{"b":1,"a":[1,2.0,-0.0,1e3,null,true,false]}`:                         `{"b": 1, "a": [1, 2.0, -0.0, 1000.0, null, true, false]}`,
		`{"a":1,"b":2,"a":3}`:                                                  `{"a": 3, "b": 2}`,
		"[\"\u00fc\u4e2d\U0001F600\u007f\\u0001\\/\\n\\\"\"]":                  `["\u00fc\u4e2d\ud83d\ude00` + "\u007f" + `\u0001/\n\""]`,
		`[1e16,1e15,123456789012345680000,0.0001,0.00001,1.5e-7,1e400,-1e400]`: `[1e+16, 1000000000000000.0, 123456789012345680000, 0.0001, 1e-05, 1.5e-07, Infinity, -Infinity]`,
		`[NaN,Infinity,-Infinity,9223372036854775807,9223372036854775808,-0]`:  `[NaN, Infinity, -Infinity, 9223372036854775807, 9223372036854775808, 0]`,
		` { } `:    `{}`,
		`[ ]`:      `[]`,
		`"\b\f\t"`: `"\b\f\t"`,
	} {
		v, err := parseJSON([]byte(in))
		require.NoError(t, err, in)
		require.Equal(t, want, string(pyJSON(v)), in)
		require.Equal(t, want, string(pyJSON(json.RawMessage(in))), in)
	}
}

func TestMalformedJSON(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		``, ` `, `{`, `}`, `[1,]`, `{"a":}`, `{"a" 1}`, `{"a":1,}`, `{a:1}`, `[1 2]`, `nul`, `+1`, `01`, `1.`, `.5`, `1e`, `--1`, `"`, `"\x"`,
		"\"\n\"", `1 2`, `Nan`, `-Inf`, strings.Repeat("[", 2000) + strings.Repeat("]", 2000),
	} {
		_, err := parseJSON([]byte(text))
		require.ErrorIs(t, err, errBadJSON, text)
	}
}

func TestJSONOfGoValues(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		value any
		want  string
	}{
		{map[string]any{"b": 1, "a": []string{"x"}}, `{"a": ["x"], "b": 1}`},
		{struct {
			A []int          `json:"a"`
			B map[string]int `json:"b,omitempty"`
		}{A: []int{1}}, `{"a": [1]}`},
		{json.Number("1.50"), `1.5`},
		{math.NaN(), `NaN`},
		{encoded(`{"as": "it is"}`), `{"as": "it is"}`},
		{json.RawMessage(`{"a"`), `null`},
		{func() {}, ``},
		{[]object{{{"a", 1}}}, `[{"a": 1}]`},
	} {
		got := string(pyJSON(c.value))
		if c.want == "" {
			require.Equal(t, byte('"'), got[0], "what JSON cannot hold becomes its text")
			continue
		}
		require.Equal(t, c.want, got)
	}
}

func TestSameJSON(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{`{"a": 1, "b": [true]}`, `{"b": [1.0], "a": 1.0}`, true},
		{`{"a": 1}`, `{"a": 1, "b": 2}`, false},
		{`[1, 2]`, `[2, 1]`, false},
		{`"1"`, `1`, false},
		{`null`, `false`, false},
		{`NaN`, `NaN`, false},
		{`9223372036854775808`, `9223372036854775808`, true},
		{`{}`, `[]`, false},
	} {
		a, err := parseJSON([]byte(c.a))
		require.NoError(t, err)
		b, err := parseJSON([]byte(c.b))
		require.NoError(t, err)
		require.Equal(t, c.same, sameJSON(a, b), "%s %s", c.a, c.b)
	}
}

func TestManyKeys(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		keys := rapid.SliceOfN(rapid.StringMatching(`[a-z]{1,2}`), 0, 60).Draw(t, "keys")
		var b strings.Builder
		want := object{}
		for i, key := range keys {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(`"` + key + `":` + string(pyJSON(i)))
			want = want.set(key, int64(i))
		}
		got, err := parseJSON([]byte("{" + b.String() + "}"))
		require.NoError(t, err)
		require.Equal(t, want, got)
	})
}

// FuzzJSON: what encoding/json takes is taken, means the same, and what is written can be read again and stays.
func FuzzJSON(f *testing.F) {
	for _, seed := range []string{`{"a": [1, 2.5, "x\u00fc", null]}`, `[NaN, Infinity]`, `"\ud83d\ude00"`, `1e999`, `{"a":1,"a":2}`, `[[[[]]]]`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := parseJSON(data)
		if err != nil {
			if json.Valid(data) {
				depth := 0
				for _, c := range data {
					if c == '[' || c == '{' {
						depth++
					}
				}
				require.Greater(t, depth, maxJSONDepth, "%s: %v", data, err)
			}
			return
		}
		text := pyJSON(v)
		again, err := parseJSON(text)
		require.NoError(t, err, "%s", text)
		require.Equal(t, string(text), string(pyJSON(again)))
		var theirs any
		if json.Unmarshal(data, &theirs) == nil {
			var ours any
			require.NoError(t, json.Unmarshal(text, &ours), "%s", text)
			require.Equal(t, theirs, ours)
		}
	})
}
