package media

import "math/bits"

// Element ids of Matroska and WebM that lead to the tags.
const (
	ebmlHeader    = 0x1a45dfa3
	mkvSegment    = 0x18538067
	mkvCluster    = 0x1f43b675
	mkvTags       = 0x1254c367
	mkvTag        = 0x7373
	mkvSimpleTag  = 0x67c8
	mkvTagName    = 0x45a3
	mkvTagString  = 0x4487
	mkvMaxDepth   = 8   // SimpleTags can nest
	mkvTagNameMax = 256 // longer names are none of ours
)

// scanMatroska walks Segment / Tags / Tag / SimpleTag.
func scanMatroska(f *file) error { return f.elements(0, f.size, 0) }

// elements walks the elements in [start, end).
func (f *file) elements(start, end int64, depth int) error {
	if depth > mkvMaxDepth {
		return errTooMany
	}
	for start < end {
		if err := f.step(); err != nil {
			return err
		}
		id, length, content, err := f.element(start, end)
		if err != nil {
			return err
		}
		stop := content + length
		if length < 0 { // not known, as in a live stream: its children follow as if they were its siblings
			if id != mkvSegment && id != mkvCluster {
				return errTruncated
			}
			start = content
			continue
		}
		switch id {
		case mkvSegment, mkvTags, mkvTag:
			err = f.elements(content, stop, depth+1)
		case mkvSimpleTag:
			err = f.simpleTag(content, stop, depth+1)
		}
		if err != nil {
			return err
		}
		start = stop
	}
	return nil
}

// simpleTag reads a name and a string, in whatever order.
func (f *file) simpleTag(start, end int64, depth int) error {
	if depth > mkvMaxDepth {
		return errTooMany
	}
	var name string
	textStart, textLength := int64(0), int64(-1)
	for start < end {
		if err := f.step(); err != nil {
			return err
		}
		id, length, content, err := f.element(start, end)
		if err != nil {
			return err
		}
		if length < 0 {
			return errTruncated
		}
		switch id {
		case mkvTagName:
			if length <= mkvTagNameMax {
				text, err := f.bytes(content, length)
				if err != nil {
					return err
				}
				name = string(text)
			}
		case mkvTagString:
			textStart, textLength = content, length
		case mkvSimpleTag:
			if err := f.simpleTag(content, content+length, depth+1); err != nil {
				return err
			}
		}
		start = content + length
	}
	if !isOurs(name) || textLength < 0 {
		return nil
	}
	text, err := f.bytes(textStart, textLength)
	if err != nil {
		return err
	}
	f.keep(name, text)
	return nil
}

// element reads an id and a length, each of which tells its own size by its leading zeros. length -1: not known.
func (f *file) element(start, end int64) (id uint64, length, content int64, err error) {
	head, err := f.bytes(start, min(12, end-start))
	if err != nil {
		return 0, 0, 0, err
	}
	n := bits.LeadingZeros8(head[0]) + 1
	if n > 4 || n >= len(head) {
		return 0, 0, 0, errTruncated
	}
	for _, b := range head[:n] {
		id = id<<8 | uint64(b)
	}
	rest := head[n:]
	m := bits.LeadingZeros8(rest[0]) + 1
	if m > 8 || m > len(rest) {
		return 0, 0, 0, errTruncated
	}
	size := uint64(rest[0]) & (1<<(8-m) - 1)
	for _, b := range rest[1:m] {
		size = size<<8 | uint64(b)
	}
	content = start + int64(n) + int64(m)
	if size == 1<<(7*m)-1 {
		return id, -1, content, nil
	}
	if size > uint64(end-content) {
		return 0, 0, 0, errTruncated
	}
	return id, int64(size), content, nil
}
