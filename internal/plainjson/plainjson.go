// Package plainjson reads objects of the plainest JSON, as encoding/json writes it, several times as fast: no white space, no
// escapes in strings. It gives up at anything else, and the reader turns to encoding/json; so it need not know all of JSON, but
// must never take for good what encoding/json reads otherwise or refuses.
package plainjson

import (
	"iter"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Reader walks one document. The first thing that it does not read makes OK false for good, and ends every walk.
//
//	r := plainjson.NewReader(text)
//	for name := range r.Fields([]string{"n", "s"}) {
//		switch name {
//		case "n":
//			n = r.Int()
//		case "s":
//			s = r.String()
//		}
//	}
//	if !r.OK() { … }
type Reader struct {
	data string
	at   int
	bad  bool
}

// NewReader reads one document.
func NewReader(text string) *Reader { return &Reader{data: text} }

// GiveUp makes the document one for encoding/json.
func (r *Reader) GiveUp() { r.bad = true }

// OK reports whether all of the document has been read.
func (r *Reader) OK() bool { return !r.bad && r.at == len(r.data) }

func (r *Reader) peek() byte {
	if r.bad || r.at >= len(r.data) {
		return 0
	}
	return r.data[r.at]
}

func (r *Reader) expect(c byte) bool {
	if r.peek() != c {
		r.bad = true
		return false
	}
	r.at++
	return true
}

// Object yields the keys of the object that begins here. The body of the loop reads exactly one value.
func (r *Reader) Object(yield func(key string) bool) {
	if !r.expect('{') {
		return
	}
	if r.peek() == '}' {
		r.at++
		return
	}
	for {
		key := r.Text()
		if !r.expect(':') || !yield(key) {
			r.bad = true
			return
		}
		if r.peek() == '}' {
			r.at++
			return
		}
		if !r.expect(',') {
			return
		}
	}
}

// Fields yields the names of the fields of the object that begins here. It gives up at one that is not in names, comes twice
// or comes in another order. The body of the loop reads exactly one value.
func (r *Reader) Fields(names []string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for key := range r.Object {
			for len(names) > 0 && names[0] != key {
				names = names[1:]
			}
			if len(names) == 0 {
				r.bad = true
				return
			}
			if !yield(names[0]) {
				return
			}
			names = names[1:]
		}
	}
}

// Text reads a string, and returns it as a part of the document, which stays in memory as long as it does.
func (r *Reader) Text() string {
	if !r.expect('"') {
		return ""
	}
	start, ascii := r.at, true
	for ; r.at < len(r.data); r.at++ {
		c := r.data[r.at]
		if plain[c] {
			continue
		}
		if c >= utf8.RuneSelf {
			ascii = false
			continue
		}
		if c != '"' {
			break
		}
		s := r.data[start:r.at]
		r.at++
		if !ascii && !utf8.ValidString(s) {
			break
		}
		return s
	}
	r.bad = true
	return ""
}

// plain are the bytes that stand for themselves in a string, whatever comes before and after them.
var plain = func() (is [256]bool) {
	for c := byte(' '); c < utf8.RuneSelf; c++ {
		is[c] = c != '"' && c != '\\'
	}
	return is
}()

// String reads a string, and returns a copy.
func (r *Reader) String() string { return strings.Clone(r.Text()) }

// Bool reads true or false.
func (r *Reader) Bool() bool {
	switch r.word() {
	case "true":
		return true
	case "false":
		return false
	}
	r.bad = true
	return false
}

// word returns the bytes up to the next comma or brace.
func (r *Reader) word() string {
	start := r.at
	for r.at < len(r.data) && r.data[r.at] != ',' && r.data[r.at] != '}' && r.data[r.at] != ']' {
		r.at++
	}
	return r.data[start:r.at]
}

// Int reads an integer of 64 bits.
func (r *Reader) Int() int64 {
	s := r.word()
	digits := s
	if len(digits) > 0 && digits[0] == '-' {
		digits = digits[1:]
	}
	if len(digits) == 0 || len(digits) > 18 || digits[0] == '0' && len(s) > 1 {
		r.bad = true
		return 0
	}
	var n int64
	for i := range len(digits) {
		if digits[i] < '0' || digits[i] > '9' {
			r.bad = true
			return 0
		}
		n = 10*n + int64(digits[i]-'0')
	}
	if s[0] == '-' {
		return -n
	}
	return n
}

// Float reads a number.
func (r *Reader) Float() float64 {
	s := r.word()
	if !isNumber(s) {
		r.bad = true
		return 0
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		r.bad = true
	}
	return f
}

// isNumber is JSON's grammar, which is narrower than that of strconv.
func isNumber(s string) bool {
	i := 0
	digits := func() bool {
		from := i
		for i < len(s) && '0' <= s[i] && s[i] <= '9' {
			i++
		}
		return i > from
	}
	if i < len(s) && s[i] == '-' {
		i++
	}
	whole := i
	if !digits() || s[whole] == '0' && i > whole+1 {
		return false
	}
	if i < len(s) && s[i] == '.' {
		i++
		if !digits() {
			return false
		}
	}
	if i < len(s) && (s[i] == 'e' || s[i] == 'E') {
		i++
		if i < len(s) && (s[i] == '+' || s[i] == '-') {
			i++
		}
		if !digits() {
			return false
		}
	}
	return i == len(s)
}

// Raw returns the value that begins here, whatever it is, as a part of the document. It is not checked: it may be no JSON.
func (r *Reader) Raw() string {
	start, depth := r.at, 0
	for ; r.at < len(r.data); r.at++ {
		switch r.data[r.at] {
		case '"':
			if r.skipText(); r.bad {
				return ""
			}
		case '{', '[':
			depth++
		case ',':
			if depth == 0 {
				return r.data[start:r.at]
			}
		case '}', ']':
			if depth == 0 {
				return r.data[start:r.at]
			}
			depth--
		}
	}
	return r.data[start:r.at]
}

// skipText leaves at on the closing quote.
func (r *Reader) skipText() {
	for r.at++; r.at < len(r.data); r.at++ {
		switch r.data[r.at] {
		case '"':
			return
		case '\\':
			r.at++
		}
	}
	r.at = len(r.data)
	r.bad = true
}
