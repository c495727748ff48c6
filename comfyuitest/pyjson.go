package comfyuitest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// The server's JSON is that of Python's json.dumps: a space after each comma and colon, everything beyond ASCII escaped,
// keys in the order in which they were set, integers and floats told apart, NaN and Infinity written as such. Clients have
// met all of that in the wild, so the pod writes the same bytes.

// object is a JSON object whose keys keep their order.
type object []field

type field struct {
	key   string
	value any
}

func (o object) get(key string) (any, bool) {
	for _, f := range o {
		if f.key == key {
			return f.value, true
		}
	}
	return nil, false
}

// set replaces a value in place or appends it, as assignment to a Python dict does.
func (o object) set(key string, value any) object {
	for i := range o {
		if o[i].key == key {
			o[i].value = value
			return o
		}
	}
	return append(o, field{key, value})
}

func (o object) without(key string) object {
	return slices.DeleteFunc(slices.Clone(o), func(f field) bool { return f.key == key })
}

// encoded is JSON that already has the server's form.
type encoded []byte

// pyJSON encodes v as the server would.
func pyJSON(v any) []byte { return appendJSON(nil, v) }

func appendJSON(dst []byte, v any) []byte {
	switch v := v.(type) {
	case nil:
		return append(dst, "null"...)
	case encoded:
		return append(dst, v...)
	case bool:
		return strconv.AppendBool(dst, v)
	case string:
		return appendJSONString(dst, v)
	case int:
		return strconv.AppendInt(dst, int64(v), 10)
	case int64:
		return strconv.AppendInt(dst, v, 10)
	case wholeNumber:
		return append(dst, v...)
	case float64:
		return appendFloat(dst, v)
	case object:
		dst = append(dst, '{')
		for i, f := range v {
			if i > 0 {
				dst = append(dst, ", "...)
			}
			dst = appendJSONString(dst, f.key)
			dst = append(dst, ": "...)
			dst = appendJSON(dst, f.value)
		}
		return append(dst, '}')
	case map[string]any:
		ordered := make(object, 0, len(v))
		for _, key := range slices.Sorted(maps.Keys(v)) {
			ordered = append(ordered, field{key, v[key]})
		}
		return appendJSON(dst, ordered)
	case []any:
		return appendList(dst, v)
	case []string:
		return appendList(dst, v)
	case []object:
		return appendList(dst, v)
	case json.Number:
		return appendRaw(dst, []byte(v))
	case json.RawMessage:
		return appendRaw(dst, v)
	default:
		return appendOther(dst, v)
	}
}

func appendList[T any](dst []byte, list []T) []byte {
	dst = append(dst, '[')
	for i, v := range list {
		if i > 0 {
			dst = append(dst, ", "...)
		}
		dst = appendJSON(dst, v)
	}
	return append(dst, ']')
}

// appendOther takes the values of other types that a scripted node may give; what JSON cannot hold becomes its text.
func appendOther(dst []byte, v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		return appendJSONString(dst, fmt.Sprint(v))
	}
	return appendRaw(dst, data)
}

// appendFloat writes a float as Python's repr does: always with a point or an exponent, the exponent from 1e16 on.
func appendFloat(dst []byte, f float64) []byte {
	switch {
	case math.IsNaN(f):
		return append(dst, "NaN"...)
	case math.IsInf(f, 1):
		return append(dst, "Infinity"...)
	case math.IsInf(f, -1):
		return append(dst, "-Infinity"...)
	}
	if magnitude := math.Abs(f); magnitude != 0 && (magnitude < 1e-4 || magnitude >= 1e16) {
		return strconv.AppendFloat(dst, f, 'e', -1, 64)
	}
	start := len(dst)
	dst = strconv.AppendFloat(dst, f, 'f', -1, 64)
	if !bytes.ContainsRune(dst[start:], '.') {
		dst = append(dst, ".0"...)
	}
	return dst
}

const hexDigits = "0123456789abcdef"

// appendJSONString escapes as json.dumps with ensure_ascii does. Bytes that are no UTF-8 become U+FFFD.
func appendJSONString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			i++
			switch {
			case c == '"' || c == '\\':
				dst = append(dst, '\\', c)
			case c == '\n':
				dst = append(dst, `\n`...)
			case c == '\r':
				dst = append(dst, `\r`...)
			case c == '\t':
				dst = append(dst, `\t`...)
			case c == '\b':
				dst = append(dst, `\b`...)
			case c == '\f':
				dst = append(dst, `\f`...)
			case c < 0x20:
				dst = appendEscape(dst, rune(c))
			default:
				dst = append(dst, c)
			}
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		i += size
		if high, low := utf16.EncodeRune(r); high != utf8.RuneError {
			dst = appendEscape(appendEscape(dst, high), low)
			continue
		}
		dst = appendEscape(dst, r)
	}
	return append(dst, '"')
}

func appendEscape(dst []byte, r rune) []byte {
	return append(dst, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}

// appendRaw writes client JSON as the server would after reading it. What is no JSON becomes null.
func appendRaw(dst []byte, raw []byte) []byte {
	v, err := parseJSON(raw)
	if err != nil {
		return append(dst, "null"...)
	}
	return appendJSON(dst, v)
}

var errBadJSON = errors.New("malformed JSON")

// maxJSONDepth is where Python's recursion limit ends json.loads.
const maxJSONDepth = 990

// parseJSON reads what Python's json.loads reads: NaN and Infinity are allowed, a repeated key keeps its first place and
// its last value. Objects become object, numbers int64 or wholeNumber when whole, else float64.
func parseJSON(data []byte) (any, error) {
	p := jsonParser{data: data}
	v, err := p.value(0)
	if err != nil {
		return nil, err
	}
	p.space()
	if p.pos != len(p.data) {
		return nil, errBadJSON
	}
	return v, nil
}

type jsonParser struct {
	data []byte
	pos  int
}

func (p *jsonParser) space() {
	for p.pos < len(p.data) {
		switch p.data[p.pos] {
		case ' ', '\t', '\r', '\n':
			p.pos++
		default:
			return
		}
	}
}

func (p *jsonParser) peek() byte {
	if p.pos < len(p.data) {
		return p.data[p.pos]
	}
	return 0
}

func (p *jsonParser) literal(text string, v any) (any, error) {
	if !bytes.HasPrefix(p.data[p.pos:], []byte(text)) {
		return nil, errBadJSON
	}
	p.pos += len(text)
	return v, nil
}

func (p *jsonParser) value(depth int) (any, error) {
	if depth > maxJSONDepth {
		return nil, errBadJSON
	}
	p.space()
	switch c := p.peek(); {
	case c == '{':
		return p.object(depth)
	case c == '[':
		return p.list(depth)
	case c == '"':
		return p.text()
	case c == 't':
		return p.literal("true", true)
	case c == 'f':
		return p.literal("false", false)
	case c == 'n':
		return p.literal("null", nil)
	case c == 'N':
		return p.literal("NaN", math.NaN())
	case c == 'I':
		return p.literal("Infinity", math.Inf(1))
	case c == '-' && bytes.HasPrefix(p.data[p.pos:], []byte("-I")):
		return p.literal("-Infinity", math.Inf(-1))
	case c == '-' || '0' <= c && c <= '9':
		return p.number()
	}
	return nil, errBadJSON
}

func (p *jsonParser) object(depth int) (any, error) {
	p.pos++
	o := object{}
	var index keyIndex
	for first := true; ; first = false {
		p.space()
		if first && p.peek() == '}' {
			p.pos++
			return o, nil
		}
		if p.peek() != '"' {
			return nil, errBadJSON
		}
		key, err := p.text()
		if err != nil {
			return nil, err
		}
		p.space()
		if p.peek() != ':' {
			return nil, errBadJSON
		}
		p.pos++
		v, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		o = index.put(o, key, v)
		p.space()
		switch p.peek() {
		case ',':
			p.pos++
		case '}':
			p.pos++
			return o, nil
		default:
			return nil, errBadJSON
		}
	}
}

// keyIndex finds repeated keys: small objects are searched, large ones get a map.
type keyIndex map[string]int

func (x *keyIndex) put(o object, key string, v any) object {
	if len(o) < 16 {
		return o.set(key, v)
	}
	if *x == nil {
		*x = make(keyIndex, 2*len(o))
		for i, f := range o {
			(*x)[f.key] = i
		}
	}
	if at, repeated := (*x)[key]; repeated {
		o[at].value = v
		return o
	}
	(*x)[key] = len(o)
	return append(o, field{key, v})
}

func (p *jsonParser) list(depth int) (any, error) {
	p.pos++
	list := []any{}
	p.space()
	if p.peek() == ']' {
		p.pos++
		return list, nil
	}
	for {
		v, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
		p.space()
		switch p.peek() {
		case ',':
			p.pos++
		case ']':
			p.pos++
			return list, nil
		default:
			return nil, errBadJSON
		}
	}
}

func (p *jsonParser) text() (string, error) {
	start := p.pos
	plain := true // nothing to unescape or refuse
	for p.pos++; p.pos < len(p.data); p.pos++ {
		switch c := p.data[p.pos]; {
		case c == '\\':
			p.pos++
			plain = false
		case c == '"':
			p.pos++
			if plain {
				return string(p.data[start+1 : p.pos-1]), nil
			}
			var s string
			if err := json.Unmarshal(p.data[start:p.pos], &s); err != nil {
				return "", fmt.Errorf("%w: %w", errBadJSON, err)
			}
			return s, nil
		case c < ' ' || c >= utf8.RuneSelf:
			plain = false
		}
	}
	return "", errBadJSON
}

func (p *jsonParser) number() (any, error) {
	start := p.pos
	for p.pos < len(p.data) && bytes.IndexByte([]byte("+-.0123456789Ee"), p.data[p.pos]) >= 0 {
		p.pos++
	}
	text := p.data[start:p.pos]
	whole := !bytes.ContainsAny(text, ".eE")
	if !json.Valid(text) {
		return nil, errBadJSON
	}
	if !whole {
		f, err := strconv.ParseFloat(string(text), 64)
		if err != nil && !errors.Is(err, strconv.ErrRange) {
			return nil, fmt.Errorf("%w: %w", errBadJSON, err)
		}
		return f, nil
	}
	if n, err := strconv.ParseInt(string(text), 10, 64); err == nil {
		return n, nil
	}
	return wholeNumber(text), nil
}

// wholeNumber is an integer too large for int64: Python keeps it whole.
type wholeNumber string

// MarshalJSON implements [json.Marshaler].
func (n wholeNumber) MarshalJSON() ([]byte, error) { return []byte(n), nil }

// sameJSON tells whether two parsed values are equal in Python: keys in any order, 1 equal to 1.0 and to True.
func sameJSON(a, b any) bool {
	switch a := a.(type) {
	case object:
		b, ok := b.(object)
		if !ok || len(a) != len(b) {
			return false
		}
		for _, f := range a {
			other, has := b.get(f.key)
			if !has || !sameJSON(f.value, other) {
				return false
			}
		}
		return true
	case []any:
		b, ok := b.([]any)
		return ok && slices.EqualFunc(a, b, sameJSON)
	case nil:
		return b == nil
	case string:
		b, ok := b.(string)
		return ok && a == b
	case wholeNumber:
		b, ok := b.(wholeNumber)
		return ok && a == b
	}
	x, isNumber := asNumber(a)
	y, isOther := asNumber(b)
	return isNumber && isOther && x == y
}

func asNumber(v any) (float64, bool) {
	switch v := v.(type) {
	case bool:
		if v {
			return 1, true
		}
		return 0, true
	case int64:
		return float64(v), true
	case float64:
		return v, true
	}
	return 0, false
}
