package comfyuitest

import (
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Texts of errors hold what Python's str and repr make of a value, and validation converts values as int, float and bool
// do. This file is the little of Python that a client sees beside its JSON. Values are those of parseJSON.

// maxIntDigits is Python's limit for turning text into an int.
const maxIntDigits = 4300

// exception is what the server's Python code would have raised.
type exception struct{ typ, message string }

func raise(typ, format string, args ...any) *exception {
	return &exception{typ, fmt.Sprintf(format, args...)}
}

// pyStr is str(v).
func pyStr(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case json.Number:
		return pyRepr(v)
	case fmt.Stringer:
		return v.String()
	}
	return pyRepr(v)
}

// pyRepr is repr(v).
func pyRepr(v any) string {
	switch v := v.(type) {
	case nil:
		return "None"
	case bool:
		if v {
			return "True"
		}
		return "False"
	case string:
		return reprString(v)
	case int:
		return strconv.Itoa(v)
	case int64:
		return strconv.FormatInt(v, 10)
	case wholeNumber:
		return string(v)
	case json.Number:
		if parsed, err := parseJSON([]byte(v)); err == nil {
			return pyRepr(parsed)
		}
		return string(v)
	case float64:
		return reprFloat(v)
	case []any:
		parts := make([]string, len(v))
		for i := range v {
			parts[i] = pyRepr(v[i])
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case object:
		parts := make([]string, len(v))
		for i, f := range v {
			parts[i] = reprString(f.key) + ": " + pyRepr(f.value)
		}
		return "{" + strings.Join(parts, ", ") + "}"
	default:
		return fmt.Sprint(v)
	}
}

func reprFloat(f float64) string {
	switch {
	case math.IsNaN(f):
		return "nan"
	case math.IsInf(f, 1):
		return "inf"
	case math.IsInf(f, -1):
		return "-inf"
	}
	return string(appendFloat(nil, f))
}

func reprString(s string) string {
	quote := '\''
	if strings.Contains(s, "'") && !strings.Contains(s, `"`) {
		quote = '"'
	}
	out := []byte{byte(quote)}
	for _, r := range s {
		switch {
		case r == quote || r == '\\':
			out = append(out, '\\', byte(r))
		case r == '\n':
			out = append(out, `\n`...)
		case r == '\r':
			out = append(out, `\r`...)
		case r == '\t':
			out = append(out, `\t`...)
		case unicode.IsPrint(r):
			out = utf8.AppendRune(out, r)
		case r <= 0xff:
			out = fmt.Appendf(out, `\x%02x`, r)
		case r <= 0xffff:
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			out = fmt.Appendf(out, `\U%08x`, r)
		}
	}
	return string(append(out, byte(quote)))
}

// typeName is type(v).__name__.
func typeName(v any) string {
	switch v := v.(type) {
	case nil:
		return "NoneType"
	case bool:
		return "bool"
	case string:
		return "str"
	case int, int64, wholeNumber:
		return "int"
	case float64:
		return "float"
	case json.Number:
		if strings.ContainsAny(string(v), ".eEnN") {
			return "float"
		}
		return "int"
	case []any, link:
		return "list"
	case object, map[string]any:
		return "dict"
	case imageBatch, maskBatch:
		return "Tensor"
	default:
		return "object"
	}
}

var (
	pythonInt   = regexp.MustCompile(`^[+-]?\d+(?:_\d+)*$`)
	pythonFloat = regexp.MustCompile(`^[+-]?(?:\d+(?:_\d+)*(?:\.(?:\d+(?:_\d+)*)?)?|\.\d+(?:_\d+)*)(?:[eE][+-]?\d+(?:_\d+)*)?$`)
)

// toInt is int(v): an int64, or a wholeNumber beyond it.
func toInt(v any) (any, *exception) {
	switch v := v.(type) {
	case bool:
		if v {
			return int64(1), nil
		}
		return int64(0), nil
	case int64, wholeNumber:
		return v, nil
	case float64:
		switch {
		case math.IsNaN(v):
			return nil, raise("ValueError", "cannot convert float NaN to integer")
		case math.IsInf(v, 0):
			return nil, raise("OverflowError", "cannot convert float infinity to integer")
		}
		whole, _ := big.NewFloat(v).Int(nil)
		return wholeOf(whole), nil
	case string:
		return parseInt(v)
	default:
		return nil, raise("TypeError", "int() argument must be a string, a bytes-like object or a real number, not '%s'", typeName(v))
	}
}

func parseInt(s string) (any, *exception) {
	text := strings.TrimSpace(s)
	if !pythonInt.MatchString(text) {
		return nil, raise("ValueError", "invalid literal for int() with base 10: %s", reprString(s))
	}
	text = strings.ReplaceAll(text, "_", "")
	if digits := len(strings.TrimLeft(text, "+-")); digits > maxIntDigits {
		return nil, raise("ValueError", "Exceeds the limit (%d digits) for integer string conversion: value has %d digits; "+
			"use sys.set_int_max_str_digits() to increase the limit", maxIntDigits, digits)
	}
	whole, ok := new(big.Int).SetString(text, 10)
	if !ok {
		return nil, raise("ValueError", "invalid literal for int() with base 10: %s", reprString(s))
	}
	return wholeOf(whole), nil
}

func wholeOf(n *big.Int) any {
	if n.IsInt64() {
		return n.Int64()
	}
	return wholeNumber(n.String())
}

// toFloat is float(v).
func toFloat(v any) (any, *exception) {
	switch v := v.(type) {
	case bool:
		if v {
			return 1.0, nil
		}
		return 0.0, nil
	case int64:
		return float64(v), nil
	case wholeNumber:
		f, err := strconv.ParseFloat(string(v), 64)
		if err != nil {
			return nil, raise("OverflowError", "int too large to convert to float")
		}
		return f, nil
	case float64:
		return v, nil
	case string:
		return parseFloat(v)
	default:
		return nil, raise("TypeError", "float() argument must be a string or a real number, not '%s'", typeName(v))
	}
}

func parseFloat(s string) (any, *exception) {
	text := strings.TrimSpace(s)
	if pythonFloat.MatchString(text) {
		// Out of range is infinity here as there.
		f, _ := strconv.ParseFloat(strings.ReplaceAll(text, "_", ""), 64)
		return f, nil
	}
	unsigned, negative := strings.CutPrefix(text, "-")
	sign := 1
	if negative {
		sign = -1
	} else {
		unsigned = strings.TrimPrefix(text, "+")
	}
	switch strings.ToLower(unsigned) {
	case "nan":
		return math.NaN(), nil
	case "inf", "infinity":
		return math.Inf(sign), nil
	}
	return nil, raise("ValueError", "could not convert string to float: %s", reprString(s))
}

// toBool is bool(v).
func toBool(v any) bool {
	switch v := v.(type) {
	case nil:
		return false
	case bool:
		return v
	case string:
		return v != ""
	case int64:
		return v != 0
	case float64:
		return v != 0
	case []any:
		return len(v) > 0
	case object:
		return len(v) > 0
	default:
		return true
	}
}

// less is a < b for numbers, whatever their size; bools are numbers, and nothing is less than NaN or more.
func less(a, b any) (bool, *exception) {
	x, isX := exactNumber(a)
	y, isY := exactNumber(b)
	if !isX || !isY {
		return false, raise("TypeError", "'<' not supported between instances of '%s' and '%s'", typeName(a), typeName(b))
	}
	if x == nil || y == nil {
		return false, nil
	}
	return x.Cmp(y) < 0, nil
}

// exactNumber is v without rounding, nil for NaN.
func exactNumber(v any) (*big.Float, bool) {
	switch v := v.(type) {
	case bool:
		return new(big.Float).SetInt64(int64(map[bool]int{true: 1}[v])), true
	case int64:
		return new(big.Float).SetInt64(v), true
	case wholeNumber:
		whole, ok := new(big.Int).SetString(string(v), 10)
		if !ok {
			return nil, true
		}
		return new(big.Float).SetInt(whole), true
	case float64:
		if math.IsNaN(v) {
			return nil, true
		}
		return new(big.Float).SetFloat64(v), true
	default:
		return nil, false
	}
}

// isOneOf is v in list.
func isOneOf(v any, list []any) bool {
	return slices.ContainsFunc(list, func(choice any) bool { return sameJSON(v, choice) })
}
