package wire

import "bytes"

// Sanitize returns b with NaN, Infinity and -Infinity, where they stand outside strings, replaced by null; b itself when
// there are none. Python's encoder writes them and Go's decoder refuses them. It never changes what is in a string, and makes no valid
// JSON of what was malformed otherwise.
func Sanitize(b []byte) []byte {
	if !bytes.Contains(b, []byte("NaN")) && !bytes.Contains(b, []byte("Infinity")) {
		return b
	}
	var out []byte
	kept := 0 // b up to here is in out
	for i := 0; i < len(b); {
		end := -1
		switch b[i] {
		case '"':
			if i, _ = stringEnd(b, i); i < 0 {
				i = len(b) // no JSON from here on
			}
			continue
		case 'N':
			end = literalEnd(b, i, "NaN")
		case 'I':
			end = literalEnd(b, i, "Infinity")
		case '-':
			end = literalEnd(b, i, "-Infinity")
		}
		if end < 0 {
			i++
			continue
		}
		out = append(append(out, b[kept:i]...), "null"...)
		i, kept = end, end
	}
	if out == nil {
		return b
	}
	return append(out, b[kept:]...)
}
