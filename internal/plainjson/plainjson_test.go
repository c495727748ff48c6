package plainjson

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type shape struct {
	S string          `json:"s"`
	N int64           `json:"n"`
	F float64         `json:"f"`
	B bool            `json:"b"`
	R json.RawMessage `json:"r"`
	O struct {
		X int64 `json:"x"`
	} `json:"o"`
	M map[string]string `json:"m"`
}

// read is how records are read.
func read(text string) (s shape, ok bool) {
	r := NewReader(text)
	for name := range r.Fields([]string{"s", "n", "f", "b", "r", "o", "m"}) {
		switch name {
		case "s":
			s.S = r.String()
		case "n":
			s.N = r.Int()
		case "f":
			s.F = r.Float()
		case "b":
			s.B = r.Bool()
		case "r":
			if json.Unmarshal([]byte(r.Raw()), &s.R) != nil {
				r.GiveUp()
			}
		case "o":
			for range r.Fields([]string{"x"}) {
				s.O.X = r.Int()
			}
		case "m":
			s.M = map[string]string{}
			for key := range r.Object {
				s.M[key] = r.String()
			}
		}
	}
	return s, r.OK()
}

func TestReads(t *testing.T) {
	t.Parallel()
	want := shape{S: "grüße, {}[]:", N: -170, F: -1.5e-7, B: true, R: json.RawMessage(`{"a":["]}\"",{}],"b":1}`)}
	want.O.X, want.M = 5, map[string]string{"a": "b", "": "c"}
	data, err := json.Marshal(want)
	require.NoError(t, err)
	got, ok := read(string(data))
	require.True(t, ok, "%s", data)
	assert.Equal(t, want, got)
	got, ok = read(`{}`)
	assert.True(t, ok)
	assert.Equal(t, shape{}, got)
}

func TestGivesUp(t *testing.T) {
	t.Parallel()
	for _, data := range []string{
		``, `null`, `[]`, `{`, `{}x`, `{} `, `{"s"}`, `{"s":}`, `{"s":"a"`, `{"s":"a",}`, `{,}`, `{"s":"\n"}`, "{\"s\":\"\n\"}", "{\"s\":\"\xff\"}",
		`{"s":"a}`, `{"s": "a"}`, `{"s":1}`, `{"s":null}`, `{"n":1.5}`, `{"n":01}`, `{"n":-}`, `{"n":-0}`, `{"n":+1}`, `{"n":9223372036854775808}`, `{"n":"1"}`,
		`{"f":.5}`, `{"f":1.}`, `{"f":1e}`, `{"f":0x1p2}`, `{"f":Inf}`, `{"f":1e999}`, `{"f":01}`, `{"b":True}`, `{"b":1}`, `{"s":"a""n":1}`, `{"q":1}`, `{"s":"a","s":"b"}`, `{"n":1,"s":"a"}`, `{"S":"a"}`,
		`{"o":{"x":1}`, `{"o":1}`, `{"r":{}`, `{"r":"a}`, `{"r":"a\`,
	} {
		_, ok := read(data)
		assert.False(t, ok, data)
	}
}

// What is read is read as encoding/json reads it.
func FuzzReader(f *testing.F) {
	f.Add([]byte(`{"s":"a","n":-1,"f":1.5e3,"b":true,"r":{"a":[1]},"o":{"x":1}}`))
	f.Add([]byte(`{"s":"\u00fc","n":01,"f":-0.0,"r":"}","o":{}}`))
	f.Add([]byte(`{"r":[}],"s":""}`))
	f.Add([]byte(`{"m":{"a":"b","a":"c"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, ok := read(string(data))
		if !ok {
			return
		}
		var want shape
		require.NoError(t, json.Unmarshal(data, &want))
		assert.Equal(t, want, got)
	})
}
