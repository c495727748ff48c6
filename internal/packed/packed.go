// Package packed makes workflows small for a store. They are JSON with many repeated words, and are read far less often than
// they are kept.
package packed

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
)

// The first byte says how the rest is to be read.
const (
	plain    = 'p' // as it is
	deflated = 'd' // its length as a uvarint, then deflate
)

const (
	// worthwhile is the length from which on packing is tried. Below it deflate saves less memory than it costs time, when a
	// process that starts reads thousands.
	worthwhile = 4 << 10
	// most bounds what Unpack returns.
	most = 1 << 30
)

var errMalformed = errors.New("packed: malformed")

var deflaters = sync.Pool{New: func() any {
	w, err := flate.NewWriter(nil, flate.BestSpeed)
	if err != nil {
		panic(err) // the level is a valid one
	}
	return w
}}

var inflaters = sync.Pool{New: func() any { return flate.NewReader(bytes.NewReader(nil)) }}

// Pack returns data in a form that Unpack reads; never longer than data by more than a byte, and never empty.
func Pack(data []byte) []byte {
	if len(data) >= worthwhile {
		if p := deflate(data); len(p) < len(data) {
			return p
		}
	}
	return append([]byte{plain}, data...)
}

func deflate(data []byte) []byte {
	var b bytes.Buffer
	b.WriteByte(deflated)
	b.Write(binary.AppendUvarint(nil, uint64(len(data))))
	w := deflaters.Get().(*flate.Writer)
	defer deflaters.Put(w)
	w.Reset(&b)
	// Writes into a bytes.Buffer do not fail.
	_, _ = w.Write(data)
	_ = w.Close()
	return b.Bytes()
}

// Unpack returns what was packed. It fails for bytes that Pack did not make, and makes room for no more than they hold.
func Unpack(p string) ([]byte, error) {
	if len(p) == 0 {
		return nil, errMalformed
	}
	kind, body := p[0], p[1:]
	switch kind {
	case plain:
		return []byte(body), nil
	case deflated:
		n, used := binary.Uvarint([]byte(body[:min(len(body), binary.MaxVarintLen64)]))
		if used <= 0 || n > most {
			return nil, errMalformed
		}
		return inflate(body[used:], int(n))
	}
	return nil, errMalformed
}

func inflate(body string, n int) ([]byte, error) {
	r := inflaters.Get().(io.ReadCloser)
	defer inflaters.Put(r)
	if err := r.(flate.Resetter).Reset(strings.NewReader(body), nil); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	// A length that the bytes cannot have is not believed: deflate makes nothing smaller than a thousandth.
	if n > 1032*(len(body)+1) {
		return nil, errMalformed
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	if k, err := r.Read(make([]byte, 1)); k != 0 || !errors.Is(err, io.EOF) {
		return nil, errMalformed
	}
	return data, nil
}
