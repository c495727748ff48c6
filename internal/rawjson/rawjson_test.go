package rawjson

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestMembersKeepOrderAndDigits(t *testing.T) {
	t.Parallel()
	raw, err := Compact([]byte("{ \"z\": 18446744073709551615, \"a\" : {\"x\":[1, 2.50, {\"y\":\"}],\\\"\"}]},\n\"\\u0062\":1e5, \"z\": -0.10, \"t\":true,\"\":null}"))
	require.NoError(t, err)
	var got []string
	for _, m := range Members(raw) {
		got = append(got, m.Name+"="+string(m.Value))
	}
	assert.Equal(t, []string{`z=-0.10`, `a={"x":[1,2.50,{"y":"}],\""}]}`, `b=1e5`, `t=true`, `=null`}, got)
	assert.Equal(t, `{"":null,"a":{"x":[1,2.50,{"y":"}],\""}]},"b":1e5,"t":true,"z":-0.10}`, string(AppendCanonical(nil, raw)))
}

func TestCompactRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ data, want string }{
		"nothing":       {"", "unexpected end"},
		"syntax":        {"{\n  \"a\": 1,\n  \"b\" 2}", "line 3, column 7: invalid character '2'"},
		"two values":    {"{} {}", "line 1, column 4"},
		"deep":          {strings.Repeat("[", MaxDepth+1) + strings.Repeat("]", MaxDepth+1), "deeper than 256"},
		"deeper":        {strings.Repeat("[", 1<<20), "deeper than 256"},
		"not UTF-8":     {"{\"a\": \"\xff\"}", "UTF-8"},
		"not even JSON": {"hello", "line 1, column 1"},
		"many members":  {`{"a":[{}` + strings.Repeat(`,{"a":0}`, 9) + `]` + strings.Repeat(`,"":0`, MaxMembers) + `}`, "more than 131072 members"},
		"many inside":   {`[[{"":{}` + strings.Repeat(`,"":{"b":"}"}`, MaxMembers) + `}]]`, "more than 131072 members"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Compact([]byte(test.data))
			assert.ErrorContains(t, err, test.want)
		})
	}
	_, err := Compact([]byte(strings.Repeat("[", MaxDepth) + strings.Repeat("]", MaxDepth)))
	require.NoError(t, err)
	_, err = Compact([]byte(`[{"a":0` + strings.Repeat(`,"":{"b":0}`, MaxMembers-1) + `},0` + strings.Repeat(`,{"":0}`, MaxMembers) + `]`))
	require.NoError(t, err)
}

// Equal values have one canonical form, however they are written.
func TestCanonicalForm(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		value := values(3).Draw(t, "value")
		plain, err := json.Marshal(value) // escapes < > & and U+2028, sorts keys
		require.NoError(t, err)
		var indented bytes.Buffer
		encoder := json.NewEncoder(&indented)
		encoder.SetEscapeHTML(false)
		encoder.SetIndent(" ", "\t")
		require.NoError(t, encoder.Encode(value))

		first := canonical(t, plain)
		assert.Equal(t, first, canonical(t, indented.Bytes()))
		assert.Equal(t, first, canonical(t, []byte(first)), "a canonical form is its own")
		assert.JSONEq(t, string(plain), first)
	})
}

func canonical(t require.TestingT, data []byte) string {
	raw, err := Compact(data)
	require.NoError(t, err)
	return string(AppendCanonical(nil, raw))
}

func values(depth int) *rapid.Generator[any] {
	leaves := rapid.OneOf(
		rapid.Map(rapid.String(), func(s string) any { return s }),
		rapid.Map(rapid.Uint64(), func(n uint64) any { return n }),
		rapid.Map(rapid.Bool(), func(b bool) any { return b }),
		rapid.Just[any](nil),
	)
	if depth == 0 {
		return leaves
	}
	return rapid.OneOf(
		leaves,
		rapid.Map(rapid.SliceOfN(rapid.Deferred(func() *rapid.Generator[any] { return values(depth - 1) }), 0, 4), func(l []any) any { return l }),
		rapid.Map(rapid.MapOfN(rapid.String(), rapid.Deferred(func() *rapid.Generator[any] { return values(depth - 1) }), 0, 4), func(m map[string]any) any { return m }),
	)
}

func FuzzCompact(f *testing.F) {
	f.Add([]byte(`{"a":[1,"}",{"b":null}],"a":2.50}`))
	f.Add([]byte(` [ ] `))
	f.Add([]byte(`"\ud800 \u2028"`))
	f.Add([]byte(`-1e5`))
	f.Fuzz(func(t *testing.T, data []byte) {
		raw, err := Compact(data)
		if err != nil {
			return
		}
		form := AppendCanonical(nil, raw)
		if !json.Valid(form) {
			t.Fatalf("%q has the form %q, which is no JSON", data, form)
		}
		if again := AppendCanonical(nil, form); !bytes.Equal(again, form) {
			t.Fatalf("%q, then %q", form, again)
		}
		decode := func(data []byte) (v any) {
			decoder := json.NewDecoder(bytes.NewReader(data))
			decoder.UseNumber()
			if err := decoder.Decode(&v); err != nil {
				t.Fatal(err)
			}
			return v
		}
		if want := decode(data); !assert.ObjectsAreEqual(want, decode(form)) {
			t.Fatalf("%q is not %q", data, form)
		}
		if members := Members(raw); members != nil {
			var object map[string]json.RawMessage
			if err := json.Unmarshal(raw, &object); err != nil || len(object) != len(members) {
				t.Fatalf("%q: %d members, %d keys, %v", raw, len(members), len(object), err)
			}
			for _, m := range members {
				if field := Field(raw, m.Name); !bytes.Equal(field, m.Value) {
					t.Fatalf("%q: %q is %q and %q", raw, m.Name, m.Value, field)
				}
			}
			if !assert.ObjectsAreEqual(decode(raw), decode(AppendMembers(nil, members))) {
				t.Fatalf("%q does not come back", raw)
			}
		}
	})
}
