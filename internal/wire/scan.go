package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// ErrMalformed is what every error of this package is, by errors.Is: the bytes are no JSON, are nested too deeply, or
// have a shape from which nothing true can be told.
var ErrMalformed = errors.New("malformed")

// maxDepth is how deeply objects and lists may be nested. Python's own encoder gives up near its recursion limit of
// 1000, so no ComfyUI sends more.
const maxDepth = 1000

// malformedError says where the trouble is, never what stands there: a body can hold credentials.
type malformedError struct {
	what string
	at   int
}

func (e *malformedError) Error() string {
	return fmt.Sprintf("malformed %s at byte %d", e.what, e.at)
}

func (e *malformedError) Unwrap() error { return ErrMalformed }

// scanner walks one JSON document. It checks the whole grammar, in one pass, without recursion. The first fault makes it
// bad and leaves nothing to read, so a walk needs to look at bad only at its end.
//
// A walk over an object reads:
//
//	if s.object() {
//		for s.next() {
//			switch string(s.key) {
//			case "x":
//				x = s.number()
//			default:
//				s.skip()
//			}
//		}
//	}
//
// and consumes exactly one value a turn. Every method that reads a value takes a value of another type for an absent one.
type scanner struct {
	b      []byte
	i      int
	key    []byte // of the value at hand; valid until the next call
	buf    []byte // unescaped text; valid until the next call
	depth  int    // containers entered by object and list
	parts  int    // passed to take
	fresh  bool   // the container at hand has given nothing yet
	bareAt int    // where the last NaN or infinity stood; -1: there was none
	bad    bool
	badAt  int
}

// maxScratch is how much of a buffer is kept from one document to the next.
const maxScratch = 64 << 10

func (s *scanner) reset(b []byte) {
	buf := s.buf
	if cap(buf) > maxScratch {
		buf = nil
	}
	*s = scanner{b: b, buf: buf, bareAt: -1}
	s.space()
}

// begin is reset for a document that must be an object.
func (s *scanner) begin(b []byte) {
	s.reset(b)
	if s.at() != '{' {
		s.fail()
	}
}

func (s *scanner) fail() {
	if !s.bad {
		s.bad, s.badAt = true, min(s.i, len(s.b))
	}
	s.i = len(s.b)
}

// end checks that nothing follows the document.
func (s *scanner) end() {
	s.space()
	if s.i < len(s.b) {
		s.fail()
	}
}

func (s *scanner) err(what string) error {
	if !s.bad {
		return nil
	}
	return &malformedError{what: what, at: s.badAt}
}

func (s *scanner) space() {
	s.i = skipSpace(s.b, s.i)
}

// at returns the byte at hand, 0 at the end: no JSON value begins with it.
func (s *scanner) at() byte {
	if s.i < len(s.b) {
		return s.b[s.i]
	}
	return 0
}

// object enters the object at hand. Another value is skipped.
func (s *scanner) object() bool { return s.enter('{') }

// list enters the list at hand. Another value is skipped.
func (s *scanner) list() bool { return s.enter('[') }

func (s *scanner) enter(open byte) bool {
	if s.at() != open {
		s.skip()
		return false
	}
	s.i++
	s.depth++
	s.fresh = true
	return true
}

// next moves to the next value of the object at hand and sets its key; false at the end of the object, which is then left.
func (s *scanner) next() bool {
	if !s.separate('}') {
		return false
	}
	if s.at() != '"' {
		s.fail()
		return false
	}
	s.key = s.str()
	s.space()
	if s.at() != ':' {
		s.fail()
		return false
	}
	s.i++
	s.space()
	return !s.bad
}

// elem moves to the next value of the list at hand; false at the end of the list, which is then left.
func (s *scanner) elem() bool { return s.separate(']') }

func (s *scanner) separate(closing byte) bool {
	s.space()
	c := s.at()
	switch {
	case c == closing:
		s.i++
		s.depth--
		s.fresh = false
		return false
	case s.fresh:
		s.fresh = false
		return true
	case c == ',':
		s.i++
		s.space()
		return true
	}
	s.fail()
	return false
}

// str reads the string at hand. The result is valid until the next call.
func (s *scanner) str() []byte {
	start := s.i + 1
	end, plain := stringEnd(s.b, s.i)
	if end < 0 {
		s.fail()
		return nil
	}
	s.i = end
	token := s.b[start : end-1]
	if plain || (bytes.IndexByte(token, '\\') < 0 && utf8.Valid(token)) {
		return token
	}
	s.buf = unescape(slices.Grow(s.buf[:0], len(token)), token)
	return s.buf
}

// text reads a string, or what a number or a boolean reads as: ids should be strings, and servers and nodes are not strict
// about it. Null, NaN, the infinities and containers are nil. The result is valid until the next call.
func (s *scanner) text() []byte {
	switch c := s.at(); {
	case c == '"':
		return s.str()
	case c == '-' || '0' <= c && c <= '9' || c == 't' || c == 'f':
		start := s.i
		s.skip()
		if s.bad || s.bareAt == start {
			return nil
		}
		return s.b[start:s.i]
	}
	s.skip()
	return nil
}

// number reads a number as a finite one: NaN as 0, the infinities and numbers too large as ±math.MaxFloat64. No number is 0.
func (s *scanner) number() float64 {
	token := s.numberToken()
	if len(token) == 0 || token[0] == 'N' {
		return 0
	}
	return parseFloat(token)
}

// integer reads a number, its fraction cut off, and what does not fit as the nearest that does. No number is 0.
func (s *scanner) integer() int64 {
	token := s.numberToken()
	if n, err := strconv.ParseInt(string(token), 10, 64); err == nil {
		return n
	}
	if len(token) == 0 || token[0] == 'N' {
		return 0
	}
	switch f := parseFloat(token); {
	case f >= math.MaxInt64:
		return math.MaxInt64
	case f <= math.MinInt64:
		return math.MinInt64
	default:
		return int64(f)
	}
}

func (s *scanner) int() int {
	return int(min(max(s.integer(), math.MinInt), math.MaxInt))
}

// numberToken reads a number, NaN and the infinities among them, as it stands there; nil: the value is none.
func (s *scanner) numberToken() []byte {
	start := s.i
	c := s.at()
	s.skip()
	if s.bad || !(c == '-' || '0' <= c && c <= '9' || c == 'N' || c == 'I') {
		return nil
	}
	return s.b[start:s.i]
}

func (s *scanner) boolean() bool {
	is := s.at() == 't'
	s.skip()
	return is
}

// raw reads any value as a copy without NaN and Infinity.
func (s *scanner) raw() []byte {
	start := s.i
	s.skip()
	return s.copyFrom(start)
}

// copyFrom copies what was passed since start, without NaN and Infinity.
func (s *scanner) copyFrom(start int) []byte {
	switch {
	case s.bad:
		return nil
	case s.bareAt >= start:
		return Sanitize(s.b[start:s.i])
	}
	return bytes.Clone(s.b[start:s.i])
}

// rewind goes back to a value that was passed, depth containers deep.
func (s *scanner) rewind(i, depth int) {
	s.i, s.depth, s.bareAt = i, depth, -1
}

// The parts of one document that cost a decoder much more than the few bytes that they may stand in are counted: a part takes 16 bytes
// or more on average, in what servers send, once there are many. A history of 10,000 entries, the server's limit, may have 26 for each.
const (
	fewParts     = 1 << 12
	bytesPerPart = 16
	maxParts     = 1 << 18
)

// take counts a part, and fails when there are too many.
func (s *scanner) take() bool {
	if s.parts++; s.parts > min(fewParts+len(s.b)/bytesPerPart, maxParts) {
		s.fail()
		return false
	}
	return true
}

// since is what was passed since start, in the memory of the document.
func (s *scanner) since(start int) []byte {
	if s.bad {
		return nil
	}
	return s.b[start:s.i:s.i]
}

// skip passes the value at hand.
func (s *scanner) skip() {
	if c := s.at(); c == '{' || c == '[' {
		s.skipContainer()
		return
	}
	if end := s.scalarEnd(s.i); end >= 0 {
		s.i = end
		return
	}
	s.fail()
}

// skipContainer keeps what it is in as bits, one a level, so that no input makes it grow.
func (s *scanner) skipContainer() {
	var objects [maxDepth/64 + 1]uint64
	b, i := s.b, s.i
	level, limit := 0, maxDepth-s.depth
	inObject := false
	for {
		switch c := byteAt(b, i); c {
		case '{', '[':
			if level == limit {
				s.i = i
				s.fail()
				return
			}
			level++
			inObject = c == '{'
			word, bit := level>>6, uint64(1)<<(level&63)
			if inObject {
				objects[word] |= bit
			} else {
				objects[word] &^= bit
			}
			i = skipSpace(b, i+1)
			if c := byteAt(b, i); c == '}' || c == ']' {
				break // empty, or the wrong bracket: seen below
			}
			if inObject {
				i = keyEnd(b, i)
			}
			if i < 0 {
				s.fail()
				return
			}
			continue
		default:
			end := s.scalarEnd(i)
			if end < 0 {
				s.i = i
				s.fail()
				return
			}
			i = end
		}
		// A value has ended, or an empty container is about to.
	after:
		for {
			if level == 0 {
				s.i = i
				return
			}
			i = skipSpace(b, i)
			c := byteAt(b, i)
			switch {
			case c == ',':
				i = skipSpace(b, i+1)
				if inObject {
					if i = keyEnd(b, i); i < 0 {
						s.fail()
						return
					}
				}
				break after
			case inObject && c == '}', !inObject && c == ']':
				i++
				level--
				inObject = objects[level>>6]&(1<<(level&63)) != 0
			default:
				s.i = i
				s.fail()
				return
			}
		}
	}
}

// keyEnd passes a key, its colon and the space around; -1: it is none.
func keyEnd(b []byte, i int) int {
	if byteAt(b, i) != '"' {
		return -1
	}
	i, _ = stringEnd(b, i)
	if i < 0 {
		return -1
	}
	i = skipSpace(b, i)
	if byteAt(b, i) != ':' {
		return -1
	}
	return skipSpace(b, i+1)
}

// scalarEnd returns where the string, number or literal at i ends; -1: there is none.
func (s *scanner) scalarEnd(i int) int {
	b := s.b
	switch c := byteAt(b, i); c {
	case '"':
		end, _ := stringEnd(b, i)
		return end
	case '-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9':
		if c == '-' && byteAt(b, i+1) == 'I' {
			s.bareAt = i
			return literalEnd(b, i+1, "Infinity")
		}
		return numberEnd(b, i)
	case 't':
		return literalEnd(b, i, "true")
	case 'f':
		return literalEnd(b, i, "false")
	case 'n':
		return literalEnd(b, i, "null")
	case 'N':
		s.bareAt = i
		return literalEnd(b, i, "NaN")
	case 'I':
		s.bareAt = i
		return literalEnd(b, i, "Infinity")
	}
	return -1
}

func byteAt(b []byte, i int) byte {
	if uint(i) < uint(len(b)) {
		return b[i]
	}
	return 0
}

func skipSpace(b []byte, i int) int {
	for i < len(b) {
		if c := b[i]; c > ' ' || (c != ' ' && c != '\n' && c != '\t' && c != '\r') {
			break
		}
		i++
	}
	return i
}

func literalEnd(b []byte, i int, literal string) int {
	if len(b)-i >= len(literal) && string(b[i:i+len(literal)]) == literal {
		return i + len(literal)
	}
	return -1
}

func numberEnd(b []byte, i int) int {
	if byteAt(b, i) == '-' {
		i++
	}
	if byteAt(b, i) == '0' {
		i++
	} else if i = digitsEnd(b, i); i < 0 {
		return -1
	}
	if byteAt(b, i) == '.' {
		if i = digitsEnd(b, i+1); i < 0 {
			return -1
		}
	}
	if c := byteAt(b, i); c == 'e' || c == 'E' {
		i++
		if c := byteAt(b, i); c == '+' || c == '-' {
			i++
		}
		return digitsEnd(b, i)
	}
	return i
}

// digitsEnd passes one or more digits; -1: there is none.
func digitsEnd(b []byte, i int) int {
	start := i
	for i < len(b) && b[i]-'0' <= 9 {
		i++
	}
	if i == start {
		return -1
	}
	return i
}

const (
	eachByte = 0x0101010101010101
	highBits = 0x8080808080808080
)

// stringEnd returns where the string that opens at i ends, after its quote; -1: it does not, or it is no JSON string. plain
// means ASCII without escapes. It looks at eight bytes at once: the lowest marked one is never marked by mistake.
func stringEnd(b []byte, i int) (end int, plain bool) {
	plain = true
	i++
	for {
		for i+8 <= len(b) {
			w := binary.LittleEndian.Uint64(b[i:])
			quote, escape := w^('"'*eachByte), w^('\\'*eachByte)
			marked := ((quote-eachByte)&^quote | (escape-eachByte)&^escape | (w-' '*eachByte)&^w | w) & highBits
			if marked != 0 {
				i += bits.TrailingZeros64(marked) >> 3
				break
			}
			i += 8
		}
		switch c := byteAt(b, i); {
		case c == '"':
			return i + 1, plain
		case c == '\\':
			plain = false
			if i = escapeEnd(b, i); i < 0 {
				return -1, false
			}
		case c < ' ':
			return -1, false
		case c >= utf8.RuneSelf:
			plain = false
			for i++; i < len(b) && b[i] >= utf8.RuneSelf; i++ {
			}
		default:
			i++
		}
	}
}

// escapeEnd passes the escape at i; -1: it is none.
func escapeEnd(b []byte, i int) int {
	switch byteAt(b, i+1) {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return i + 2
	case 'u':
		if hex4(b, i+2) >= 0 {
			return i + 6
		}
	}
	return -1
}

// hex4 reads four hexadecimal digits; -1: they are not.
func hex4(b []byte, i int) rune {
	if i+4 > len(b) {
		return -1
	}
	var r rune
	for _, c := range b[i : i+4] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return -1
		}
		r = r<<4 | rune(c)
	}
	return r
}

// unescape appends what the inside of a JSON string stands for. What is no UTF-8, and half a surrogate pair, becomes U+FFFD.
func unescape(dst, token []byte) []byte {
	for i := 0; i < len(token); {
		c := token[i]
		switch {
		case c >= utf8.RuneSelf:
			r, size := utf8.DecodeRune(token[i:])
			dst = utf8.AppendRune(dst, r)
			i += size
		case c != '\\':
			dst = append(dst, c)
			i++
		case token[i+1] == 'u':
			r := hex4(token, i+2)
			i += 6
			if utf16.IsSurrogate(r) {
				r = utf16.DecodeRune(r, lowSurrogate(token, i))
				if r != utf8.RuneError {
					i += 6
				}
			}
			dst = utf8.AppendRune(dst, r)
		default:
			dst = append(dst, escaped(token[i+1]))
			i += 2
		}
	}
	return dst
}

func lowSurrogate(token []byte, i int) rune {
	if byteAt(token, i) == '\\' && byteAt(token, i+1) == 'u' {
		return hex4(token, i+2)
	}
	return -1
}

func escaped(c byte) byte {
	switch c {
	case 'b':
		return '\b'
	case 'f':
		return '\f'
	case 'n':
		return '\n'
	case 'r':
		return '\r'
	case 't':
		return '\t'
	}
	return c
}

var powersOfTen = [...]float64{1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15}

// parseFloat reads a number of the JSON grammar, or Infinity, as a finite one. Up to 15 digits without an exponent are a division of
// two exact numbers, hence rounded as strconv rounds.
func parseFloat(token []byte) float64 {
	var mantissa int64
	digits, point := 0, -1
	negative := token[0] == '-'
	for i, c := range token {
		switch {
		case c-'0' <= 9 && digits < 15:
			mantissa = mantissa*10 + int64(c-'0')
			digits++
		case c == '.':
			point = digits
		case c == '-' && i == 0:
		default:
			return parseFloatSlowly(token)
		}
	}
	f := float64(mantissa)
	if point >= 0 {
		f /= powersOfTen[digits-point]
	}
	if negative {
		f = -f
	}
	return f
}

func parseFloatSlowly(token []byte) float64 {
	f, _ := strconv.ParseFloat(string(token), 64) // out of range is infinite; no other error is left
	if math.IsInf(f, 0) {
		return math.Copysign(math.MaxFloat64, f)
	}
	return f
}
