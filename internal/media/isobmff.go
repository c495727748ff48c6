package media

import (
	"encoding/binary"
	"math"
)

// box is one box of an MP4 or QuickTime file; its content is [start, end).
type box struct {
	kind       string
	start, end int64
}

// boxes calls yield for the boxes in [start, end) until it returns false.
func (f *file) boxes(start, end int64, yield func(box) (bool, error)) error {
	for start+8 <= end {
		if err := f.step(); err != nil {
			return err
		}
		head, err := f.bytes(start, 8)
		if err != nil {
			return err
		}
		length, header := int64(binary.BigEndian.Uint32(head)), int64(8)
		switch length {
		case 0: // to the end
			length = end - start
		case 1:
			long, err := f.bytes(start+8, 8)
			if err != nil {
				return err
			}
			wide := binary.BigEndian.Uint64(long)
			if wide > math.MaxInt64 {
				return errTruncated
			}
			length, header = int64(wide), 16
		}
		if length < header || length > end-start {
			return errTruncated
		}
		more, err := yield(box{string(head[4:]), start + header, start + length})
		if err != nil || !more {
			return err
		}
		start += length
	}
	return nil
}

// scanISOBMFF follows moov / udta / meta, where the server's writer (libav with use_metadata_tags) puts a list of names, keys,
// and a list of values, ilst. QuickTime files have meta in moov.
func scanISOBMFF(f *file) error {
	return f.boxes(0, f.size, func(b box) (bool, error) {
		if b.kind != "moov" {
			return true, nil
		}
		return false, f.boxes(b.start, b.end, func(b box) (bool, error) {
			switch b.kind {
			case "meta":
				return true, f.isobmffMeta(b)
			case "udta":
				return true, f.boxes(b.start, b.end, func(b box) (bool, error) {
					if b.kind != "meta" {
						return true, nil
					}
					return true, f.isobmffMeta(b)
				})
			}
			return true, nil
		})
	})
}

func (f *file) isobmffMeta(meta box) error {
	// In MP4 a version and flags stand in front of the boxes, in QuickTime they do not.
	probe, err := f.bytes(meta.start, min(8, meta.end-meta.start))
	if err != nil {
		return err
	}
	if len(probe) == 8 && string(probe[4:]) != "hdlr" {
		meta.start += 4
	}
	var keys []string
	return f.boxes(meta.start, meta.end, func(b box) (bool, error) {
		var err error
		switch b.kind {
		case "keys":
			keys, err = f.isobmffKeys(b)
		case "ilst":
			err = f.isobmffValues(b, keys)
		}
		return true, err
	})
}

// isobmffKeys reads version and flags, a count, and that many names as boxes of their own.
func (f *file) isobmffKeys(b box) ([]string, error) {
	var keys []string
	err := f.boxes(b.start+8, b.end, func(key box) (bool, error) {
		name := ""
		if length := key.end - key.start; length <= int64(len("workflow")) { // others keep their place only
			text, err := f.bytes(key.start, length)
			if err != nil {
				return false, err
			}
			name = string(text)
		}
		keys = append(keys, name)
		return true, nil
	})
	return keys, err
}

// isobmffValues reads entries whose type is the number of a key, from 1, each with a data box: kind, locale, text.
func (f *file) isobmffValues(b box, keys []string) error {
	return f.boxes(b.start, b.end, func(entry box) (bool, error) {
		number := uint64(binary.BigEndian.Uint32([]byte(entry.kind)))
		if number == 0 || number > uint64(len(keys)) || keys[number-1] == "" {
			return true, nil
		}
		return true, f.boxes(entry.start, entry.end, func(data box) (bool, error) {
			if data.kind != "data" || data.end-data.start < 8 {
				return true, nil
			}
			text, err := f.bytes(data.start+8, data.end-data.start-8)
			if err != nil {
				return false, err
			}
			f.keep(keys[number-1], text)
			return true, nil
		})
	})
}
