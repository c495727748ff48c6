package media

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// scanWebP walks the RIFF chunks to EXIF.
func scanWebP(f *file) error {
	for offset := int64(12); offset+8 <= f.size; {
		if err := f.step(); err != nil {
			return err
		}
		head, err := f.bytes(offset, 8)
		if err != nil {
			return err
		}
		length := int64(binary.LittleEndian.Uint32(head[4:]))
		if string(head[:4]) == "EXIF" {
			data, err := f.bytes(offset+8, length)
			if err != nil {
				return err
			}
			f.exif(data)
		}
		offset += 8 + length + length&1
	}
	return nil
}

// scanJPEG walks the segments in front of the image data to APP1.
func scanJPEG(f *file) error {
	for offset := int64(2); ; {
		if err := f.step(); err != nil {
			return err
		}
		head, err := f.bytes(offset, 4)
		if err != nil {
			return err
		}
		if head[0] != 0xff {
			return errTruncated
		}
		marker := head[1]
		switch {
		case marker == 0xff: // a fill byte
			offset++
			continue
		case marker == 0xda || marker == 0xd9: // the image data, or the end
			return nil
		case marker == 0x01 || marker >= 0xd0 && marker <= 0xd7: // no length follows
			offset += 2
			continue
		}
		length := int64(binary.BigEndian.Uint16(head[2:]))
		if length < 2 {
			return errTruncated
		}
		if marker == 0xe1 {
			data, err := f.bytes(offset+4, length-2)
			if err != nil {
				return err
			}
			if bytes.HasPrefix(data, []byte("Exif\x00\x00")) {
				f.exif(data)
			}
		}
		offset += 2 + length
	}
}

// exif takes the texts from the first directory of an EXIF block. The server puts "prompt:{…}" under Model and
// "workflow:{…}" under Make, further texts below; what counts is the name in front of the colon.
func (f *file) exif(data []byte) {
	data = bytes.TrimPrefix(data, []byte("Exif\x00\x00"))
	var order binary.ByteOrder
	switch {
	case bytes.HasPrefix(data, []byte("II*\x00")):
		order = binary.LittleEndian
	case bytes.HasPrefix(data, []byte("MM\x00*")):
		order = binary.BigEndian
	default:
		return
	}
	if len(data) < 8 {
		return
	}
	const entrySize, typeASCII, maxTexts = 12, 2, 32
	directory, ok := after(data, order.Uint32(data[4:]))
	if !ok || len(directory) < 2 {
		return
	}
	count, texts := int(order.Uint16(directory)), 0
	for entry := range slices.Chunk(directory[2:], entrySize) {
		if count--; count < 0 || len(entry) < entrySize {
			return
		}
		length := order.Uint32(entry[4:])
		if order.Uint16(entry[2:]) != typeASCII || length <= 4 { // four bytes stand in the entry itself: no workflow
			continue
		}
		text, ok := after(data, order.Uint32(entry[8:]))
		if !ok || uint64(length) > uint64(len(text)) {
			continue
		}
		// The entries of a hostile file can all point to the same bytes: few are looked at, and none is copied.
		if texts++; texts > maxTexts {
			return
		}
		name, _, ok := bytes.Cut(text[:min(length, uint32(len("workflow:")))], []byte{':'})
		if ok {
			f.keep(string(name), text[len(name)+1:length])
		}
	}
}

func after(data []byte, offset uint32) ([]byte, bool) {
	if uint64(offset) > uint64(len(data)) {
		return nil, false
	}
	return data[offset:], true
}
