// Package media finds the workflow that a ComfyUI server wrote into a picture, a video, a sound or a latent.
//
// It reads the containers' metadata only, never the pixels, and is made for hostile files: whatever a length field says,
// no more memory is taken than the file has bytes (and than MaxText), compressed texts are bounded too, and no file makes it
// walk for ever.
package media

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// MaxText bounds one text: a chunk, a tag or a header, after decompression. Larger ones are an error.
const MaxText = 64 << 20

// maxSteps bounds the boxes, chunks and elements that are walked in one file. A film of hours has some ten thousand.
const maxSteps = 1 << 18

var (
	// ErrFormat says that the bytes are of no format that the package knows.
	ErrFormat = errors.New("not a media format that is known to carry a workflow")

	errTruncated = errors.New("the file is cut short or damaged")
	errTooLarge  = fmt.Errorf("a text in the file is larger than %d MiB", MaxText>>20)
	errTooMany   = errors.New("the file has too many parts")
)

// Texts are what a server writes: the graph that ran, and the editor's workflow that it was made from. Nil: the file has none.
type Texts struct {
	Prompt   []byte // API format
	Workflow []byte // UI format
}

// Read returns the texts of a file of size bytes: ErrFormat for a format that it does not know, and nil with empty Texts for a
// sound file that carries none. A damaged file yields what stands before the damage.
func Read(r io.ReaderAt, size int64) (Texts, error) {
	f := &file{r: r, size: size, inflatable: MaxText}
	head, err := f.bytes(0, min(size, headSize))
	if err != nil {
		return Texts{}, err
	}
	scan := formatOf(head)
	if scan == nil && looksLikeSafetensors(head, size) {
		scan = scanSafetensors
	}
	if scan == nil {
		return Texts{}, ErrFormat
	}
	if err := scan(f); err != nil && f.found.Prompt == nil && f.found.Workflow == nil {
		return Texts{}, err
	}
	return f.found, nil
}

// headSize is how many bytes of a file tell its format.
const headSize = 12

func formatOf(head []byte) func(*file) error {
	has := func(offset int, magic string) bool {
		return len(head) >= offset+len(magic) && string(head[offset:offset+len(magic)]) == magic
	}
	switch {
	case has(0, pngSignature):
		return scanPNG
	case has(0, "RIFF") && has(8, "WEBP"):
		return scanWebP
	case has(0, "\xff\xd8\xff"):
		return scanJPEG
	case has(4, "ftyp"):
		return scanISOBMFF
	case has(0, "\x1a\x45\xdf\xa3"):
		return scanMatroska
	case has(0, "ID3"):
		return scanID3
	case has(0, "fLaC"):
		return scanFLAC
	case has(0, "OggS"):
		return scanOgg
	}
	return nil
}

// file is the file that is being read, and what was found so far.
type file struct {
	r          io.ReaderAt
	size       int64
	steps      int
	inflatable int64 // so many bytes may still come out of compressed texts
	found      Texts
}

// step counts one part of the file.
func (f *file) step() error {
	if f.steps++; f.steps > maxSteps {
		return errTooMany
	}
	return nil
}

// bytes reads n bytes at offset. It allocates nothing for bytes that the file does not have.
func (f *file) bytes(offset, n int64) ([]byte, error) {
	switch {
	case offset < 0 || n < 0 || offset > f.size || n > f.size-offset:
		return nil, errTruncated
	case n > MaxText:
		return nil, errTooLarge
	}
	buf := make([]byte, n)
	if read, err := f.r.ReadAt(buf, offset); int64(read) < n {
		if errors.Is(err, io.EOF) {
			err = errTruncated
		}
		return nil, err
	}
	return buf, nil
}

// keep takes a text if it is one of the two. The last of a name counts, as in the editor. Names are compared without case:
// Matroska writes them in capitals.
func (f *file) keep(name string, text []byte) {
	text = bytes.TrimRight(text, "\x00")
	switch {
	case len(text) == 0:
	case strings.EqualFold(name, "prompt"):
		f.found.Prompt = text
	case strings.EqualFold(name, "workflow"):
		f.found.Workflow = text
	}
}

// fromLatin1 returns text as UTF-8. Some writers put UTF-8 where the format says Latin-1: that is left as it is.
func fromLatin1(text []byte) []byte {
	if utf8.Valid(text) {
		return text
	}
	out := make([]byte, 0, len(text)+len(text)/8)
	for _, b := range text {
		out = utf8.AppendRune(out, rune(b))
	}
	return out
}
