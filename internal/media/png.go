package media

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"io"
)

const pngSignature = "\x89PNG\r\n\x1a\n"

// scanPNG walks the chunks. Still pictures have tEXt chunks, animated ones (SaveAnimatedPNG) a private chunk, comf, after the
// image data; other writers use zTXt and iTXt.
func scanPNG(f *file) error {
	for offset := int64(len(pngSignature)); offset < f.size; {
		if err := f.step(); err != nil {
			return err
		}
		head, err := f.bytes(offset, 8)
		if err != nil {
			return err
		}
		length, kind := int64(binary.BigEndian.Uint32(head)), string(head[4:])
		switch kind {
		case "IEND":
			return nil
		case "tEXt", "zTXt", "iTXt", "comf":
			data, err := f.bytes(offset+8, length)
			if err != nil {
				return err
			}
			name, text, err := f.pngText(kind, data)
			if err != nil {
				return err
			}
			f.keep(name, text)
		}
		offset += 8 + length + 4 // with the checksum
	}
	return errTruncated
}

// pngText decodes a chunk that holds a name and a text. A chunk that is not made right is skipped: its name is "".
func (f *file) pngText(kind string, data []byte) (name string, text []byte, err error) {
	key, rest, ok := bytes.Cut(data, []byte{0})
	if !ok {
		return "", nil, nil
	}
	name = string(key)
	if name != "prompt" && name != "workflow" { // nothing else is worth decompressing
		return "", nil, nil
	}
	switch kind {
	case "tEXt", "comf":
		return name, fromLatin1(rest), nil
	case "zTXt": // method, compressed text
		if len(rest) < 1 || rest[0] != 0 {
			return "", nil, nil
		}
		text, err = f.inflate(rest[1:])
		return name, fromLatin1(text), err
	}
	// iTXt: compressed, method, language NUL, translated name NUL, text
	if len(rest) < 2 {
		return "", nil, nil
	}
	compressed, method := rest[0] == 1, rest[1]
	_, rest, ok = bytes.Cut(rest[2:], []byte{0})
	if !ok {
		return "", nil, nil
	}
	_, rest, ok = bytes.Cut(rest, []byte{0})
	if !ok {
		return "", nil, nil
	}
	if !compressed {
		return name, rest, nil
	}
	if method != 0 {
		return "", nil, nil
	}
	text, err = f.inflate(rest)
	return name, text, err
}

// inflate bounds what comes out of one file, whatever went in.
func (f *file) inflate(data []byte) ([]byte, error) {
	z, err := zlib.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, errTruncated
	}
	text, err := io.ReadAll(io.LimitReader(z, f.inflatable+1))
	f.inflatable -= int64(len(text))
	switch {
	case f.inflatable < 0:
		return nil, errTooLarge
	case err != nil:
		return nil, errors.Join(errTruncated, err)
	}
	return text, nil
}
