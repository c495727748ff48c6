// Package rawjson takes JSON apart without losing anything: the order of keys, the digits of numbers, fields that nobody knows.
//
// Compact is the gate. The other functions take only what has passed it (or a part of that), and trust it.
package rawjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	// MaxDepth is how deep Compact lets lists and objects be nested. The server's decoder (Python's) ends at about a thousand.
	MaxDepth = 256
	// MaxMembers is how many members Compact lets an object have: a Member takes much more memory than the few bytes it can
	// stand in, and those can come out of a picture of some kilobytes.
	MaxMembers = 1 << 17
)

// Member is one member of an object. Value shares memory with the object.
type Member struct {
	Name  string
	Value json.RawMessage
}

// Compact returns data without white space, if it is one JSON value of valid UTF-8, not nested deeper than MaxDepth, and with no object
// of more than MaxMembers members. A syntax error names line and column.
func Compact(data []byte) (json.RawMessage, error) {
	if !utf8.Valid(data) {
		return nil, errors.New("it is not valid UTF-8")
	}
	if err := checkSize(data); err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	buf.Grow(len(data))
	if err := json.Compact(&buf, data); err != nil {
		var syntax *json.SyntaxError
		if errors.As(json.Unmarshal(data, new(json.RawMessage)), &syntax) { // json.Compact does not say where
			line, column := position(data, syntax.Offset)
			return nil, fmt.Errorf("line %d, column %d: %w", line, column, err)
		}
		return nil, err
	}
	return buf.Bytes(), nil
}

// checkSize looks at the brackets and colons that stand outside strings. What it takes for a level need not be one in what is no JSON.
func checkSize(data []byte) error {
	var members [MaxDepth + 1]int // of the objects that are open
	depth := 0
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '"':
			i = stringEnd(data, i) - 1
		case '{', '[':
			if depth++; depth > MaxDepth {
				return fmt.Errorf("it is nested deeper than %d", MaxDepth)
			}
			members[depth] = 0
		case '}', ']':
			depth = max(depth-1, 0)
		case ':':
			if members[depth]++; members[depth] > MaxMembers {
				return fmt.Errorf("it has an object of more than %d members", MaxMembers)
			}
		}
	}
	return nil
}

// position counts from 1; a column is one byte.
func position(data []byte, offset int64) (line, column int) {
	before := data[:min(max(offset-1, 0), int64(len(data)))]
	return bytes.Count(before, []byte{'\n'}) + 1, len(before) - bytes.LastIndexByte(before, '\n')
}

// Members returns the members of an object in their order; nil for any other value. Of a key that comes twice the last value
// counts, at the place of the first, as in Python.
func Members(object json.RawMessage) []Member {
	if Kind(object) != '{' {
		return nil
	}
	var members []Member
	for i := 1; object[i] != '}'; {
		if object[i] == ',' {
			i++
		}
		keyEnd := stringEnd(object, i)
		end := valueEnd(object, keyEnd+1)
		members = append(members, Member{Text(object[i:keyEnd]), object[keyEnd+1 : end : end]})
		i = end
	}
	return lastWins(members)
}

func lastWins(members []Member) []Member {
	if len(members) <= 16 && !anyTwice(members) { // nearly all objects: no map is needed
		return members
	}
	first := make(map[string]int, len(members))
	kept := members[:0]
	for _, m := range members {
		if at, twice := first[m.Name]; twice {
			kept[at].Value = m.Value
			continue
		}
		first[m.Name] = len(kept)
		kept = append(kept, m)
	}
	clear(members[len(kept):])
	return kept
}

func anyTwice(members []Member) bool {
	for i := range members {
		for j := range i {
			if members[i].Name == members[j].Name {
				return true
			}
		}
	}
	return false
}

// Field returns the member of an object that has a name; nil if there is none.
func Field(object json.RawMessage, name string) json.RawMessage {
	if Kind(object) != '{' {
		return nil
	}
	var value json.RawMessage
	for i := 1; object[i] != '}'; {
		if object[i] == ',' {
			i++
		}
		keyEnd := stringEnd(object, i)
		end := valueEnd(object, keyEnd+1)
		if isText(object[i:keyEnd], name) {
			value = object[keyEnd+1 : end : end]
		}
		i = end
	}
	return value
}

// isText is Text(value) == s, mostly without an allocation.
func isText(value json.RawMessage, s string) bool {
	if bytes.IndexByte(value, '\\') < 0 {
		return string(value[1:len(value)-1]) == s
	}
	return Text(value) == s
}

// Elements returns the elements of a list; nil for any other value.
func Elements(list json.RawMessage) []json.RawMessage {
	if Kind(list) != '[' {
		return nil
	}
	elements := []json.RawMessage{}
	for i := 1; list[i] != ']'; {
		if list[i] == ',' {
			i++
		}
		end := valueEnd(list, i)
		elements = append(elements, list[i:end:end])
		i = end
	}
	return elements
}

// Kind is the first byte of a value: { [ " t f n, or 0 for a number and for no value.
func Kind(value json.RawMessage) byte {
	if len(value) == 0 || value[0] == '-' || value[0] >= '0' && value[0] <= '9' {
		return 0
	}
	return value[0]
}

// Text decodes a string; "" for any other value.
func Text(value json.RawMessage) string {
	if Kind(value) != '"' {
		return ""
	}
	if bytes.IndexByte(value, '\\') < 0 {
		return string(value[1 : len(value)-1])
	}
	var s string
	_ = json.Unmarshal(value, &s) // it has passed Compact
	return s
}

// AppendText appends s, which is valid UTF-8, as a string with the fewest escapes.
func AppendText(dst []byte, s string) []byte {
	dst = append(dst, '"')
	kept := 0 // s up to here is in dst
	for i := range len(s) {
		c := s[i]
		if c >= 0x20 && c != '"' && c != '\\' {
			continue
		}
		dst = append(dst, s[kept:i]...)
		kept = i + 1
		if c < 0x20 {
			dst = fmt.Appendf(dst, "\\u%04x", c)
		} else {
			dst = append(dst, '\\', c)
		}
	}
	return append(append(dst, s[kept:]...), '"')
}

// AppendMembers appends an object of members.
func AppendMembers(dst []byte, members []Member) []byte {
	dst = append(dst, '{')
	for i, m := range members {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(AppendText(dst, m.Name), ':')
		dst = append(dst, m.Value...)
	}
	return append(dst, '}')
}

// AppendCanonical appends value in the one form that all equal values have: keys in the order of their bytes, strings with the
// fewest escapes, numbers digit for digit.
func AppendCanonical(dst []byte, value json.RawMessage) []byte {
	switch Kind(value) {
	case '{':
		members := Members(value)
		slices.SortFunc(members, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
		dst = append(dst, '{')
		for i, m := range members {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = append(AppendText(dst, m.Name), ':')
			dst = AppendCanonical(dst, m.Value)
		}
		return append(dst, '}')
	case '[':
		dst = append(dst, '[')
		for i, element := range Elements(value) {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = AppendCanonical(dst, element)
		}
		return append(dst, ']')
	case '"':
		if bytes.IndexByte(value, '\\') >= 0 {
			return AppendText(dst, Text(value))
		}
	}
	return append(dst, value...)
}

// stringEnd is the index behind the string that begins at i; behind the data if it does not end.
func stringEnd(data []byte, i int) int {
	for i++; i < len(data); i++ {
		switch data[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return len(data)
}

// valueEnd is the index behind the value that begins at i.
func valueEnd(data []byte, i int) int {
	for depth := 0; ; {
		switch data[i] {
		case '"':
			i = stringEnd(data, i)
		case '{', '[':
			depth++
			i++
		case '}', ']':
			if depth == 0 { // behind a number or a word
				return i
			}
			depth--
			i++
		case ',':
			if depth == 0 {
				return i
			}
			i++
			continue
		default:
			i++
			if i == len(data) {
				return i
			}
			continue
		}
		if depth == 0 {
			return i
		}
	}
}
