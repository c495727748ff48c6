package wire

import (
	"bytes"
	"encoding/binary"
	"unicode/utf8"
)

// The kinds of binary frames that are known.
const (
	KindPreview             = 1 // an image
	KindText                = 3 // a node's progress as text
	KindPreviewWithMetadata = 4 // an image and what it is of
)

const (
	maxMetadata = 16 << 10

	// MaxBinaryHeader is how many leading bytes of a frame BinaryHeader asks for at most.
	MaxBinaryHeader = 8 + maxMetadata
)

// Binary is what stands before the payload of a binary frame.
type Binary struct {
	Kind        uint32 // KindPreview, KindText, KindPreviewWithMetadata; others as they are
	ContentType string // of an image: image/jpeg or image/png; "" when the server names an unknown format
	PromptID    string // KindPreviewWithMetadata
	Node        string // KindPreviewWithMetadata, KindText
	Display     string // KindPreviewWithMetadata
	Text        string // KindText: as far as it was in the bytes given
	Payload     int    // where the image, the text, or whatever an unknown kind carries, begins
}

// BinaryHeader reads the first bytes of a binary frame. When need is above len(prefix) there were too few: call again with so many; a
// frame that is shorter is cut. It never asks for more than MaxBinaryHeader. A header that would need more is ErrMalformed.
func (d *Decoder) BinaryHeader(prefix []byte) (b Binary, need int, err error) {
	if len(prefix) < 4 {
		return Binary{}, 4, nil
	}
	b.Kind = binary.BigEndian.Uint32(prefix)
	switch b.Kind {
	case KindPreview, KindText, KindPreviewWithMetadata:
	default:
		b.Payload = 4
		return b, b.Payload, nil
	}
	if len(prefix) < 8 {
		return Binary{}, 8, nil
	}
	second := binary.BigEndian.Uint32(prefix[4:])
	if b.Kind == KindPreview {
		b.ContentType = previewFormat(second)
		b.Payload = 8
		return b, b.Payload, nil
	}
	if second > maxMetadata {
		return Binary{}, 0, &malformedError{what: "binary frame", at: 4}
	}
	b.Payload = 8 + int(second)
	if len(prefix) < b.Payload {
		return Binary{}, b.Payload, nil
	}
	header := prefix[8:b.Payload]
	if b.Kind == KindText {
		b.Node = d.names.str(validUTF8(header))
		b.Text = string(validUTF8(prefix[b.Payload:]))
		return b, b.Payload, nil
	}
	if err := d.metadata(&b, header); err != nil {
		return Binary{}, 0, err
	}
	return b, b.Payload, nil
}

// Binary reads a whole binary frame. One that ends within its header is ErrMalformed.
func (d *Decoder) Binary(frame []byte) (Binary, error) {
	b, need, err := d.BinaryHeader(frame)
	if err == nil && need > len(frame) {
		err = &malformedError{what: "binary frame", at: len(frame)}
	}
	if err != nil {
		return Binary{}, err
	}
	return b, nil
}

func previewFormat(format uint32) string {
	switch format {
	case 1:
		return "image/jpeg"
	case 2:
		return "image/png"
	}
	return ""
}

func (d *Decoder) metadata(b *Binary, header []byte) error {
	s := &d.s
	s.begin(header)
	defer d.release()
	for s.object(); s.next(); {
		switch string(s.key) {
		case "node_id":
			b.Node = d.id()
		case "prompt_id":
			b.PromptID = d.prompt()
		case "display_node_id":
			b.Display = d.id()
		case "image_type":
			b.ContentType = d.id()
		default:
			s.skip()
		}
	}
	s.end()
	return s.err("metadata of a preview")
}

// validUTF8 returns b, or a copy in which what is no UTF-8 is U+FFFD.
func validUTF8(b []byte) []byte {
	if utf8.Valid(b) {
		return b
	}
	return bytes.ToValidUTF8(b, []byte("\uFFFD"))
}
