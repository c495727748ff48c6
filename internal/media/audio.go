package media

import (
	"bytes"
	"encoding/binary"
	"strings"
	"unicode/utf16"
)

// isOurs reports whether a name is one of the two.
func isOurs(name string) bool {
	return strings.EqualFold(name, "prompt") || strings.EqualFold(name, "workflow")
}

// scanID3 reads the TXXX frames of an ID3v2.3 or 2.4 tag, with which an MP3 begins.
func scanID3(f *file) error {
	const headerSize = 10
	head, err := f.bytes(0, headerSize)
	if err != nil {
		return err
	}
	version, flags := head[3], head[5]
	if version != 3 && version != 4 {
		return nil // 2.2 has other frames; the server's writer never makes it
	}
	tag, err := f.bytes(headerSize, syncsafe(head[6:]))
	if err != nil {
		return err
	}
	const unsynchronised, extended = 0x80, 0x40
	if flags&unsynchronised != 0 && version == 3 {
		tag = bytes.ReplaceAll(tag, []byte{0xff, 0}, []byte{0xff})
	}
	if flags&extended != 0 {
		if len(tag) < 4 {
			return errTruncated
		}
		skip := int64(binary.BigEndian.Uint32(tag)) + 4
		if version == 4 {
			skip = syncsafe(tag) // counts itself
		}
		if skip > int64(len(tag)) {
			return errTruncated
		}
		tag = tag[skip:]
	}
	for len(tag) >= headerSize && tag[0] != 0 { // zeros: padding
		if err := f.step(); err != nil {
			return err
		}
		length := int64(binary.BigEndian.Uint32(tag[4:]))
		if version == 4 {
			length = syncsafe(tag[4:])
		}
		if length > int64(len(tag)-headerSize) {
			return errTruncated
		}
		name, frameFlags, body := string(tag[:4]), tag[9], tag[headerSize:headerSize+length]
		tag = tag[headerSize+length:]
		if name == "TXXX" {
			f.userText(body, version, frameFlags)
		}
	}
	return nil
}

// userText reads an encoding, a description NUL, and a text.
func (f *file) userText(body []byte, version, flags byte) {
	if version == 4 {
		const compressedOrEncrypted, unsynchronised, dataLength = 0x0c, 0x02, 0x01
		if flags&compressedOrEncrypted != 0 {
			return
		}
		if flags&dataLength != 0 {
			if len(body) < 4 {
				return
			}
			body = body[4:]
		}
		if flags&unsynchronised != 0 {
			body = bytes.ReplaceAll(body, []byte{0xff, 0}, []byte{0xff})
		}
	} else if flags&0xc0 != 0 { // compressed or encrypted
		return
	}
	if len(body) < 1 {
		return
	}
	encoding, body := body[0], body[1:]
	switch encoding {
	case 0, 3:
		if name, text, ok := bytes.Cut(body, []byte{0}); ok && isOurs(string(name)) {
			f.keep(string(name), fromLatin1(text))
		}
	case 1, 2:
		for i := 0; i+1 < len(body); i += 2 {
			if body[i] != 0 || body[i+1] != 0 {
				continue
			}
			if name := string(fromUTF16(body[:i])); isOurs(name) {
				f.keep(name, fromUTF16(body[i+2:]))
			}
			return
		}
	}
}

// fromUTF16 is big-endian unless a mark says otherwise.
func fromUTF16(data []byte) []byte {
	var order binary.ByteOrder = binary.BigEndian
	if bytes.HasPrefix(data, []byte{0xff, 0xfe}) {
		order = binary.LittleEndian
	}
	units := make([]uint16, len(data)/2)
	for i := range units {
		units[i] = order.Uint16(data[2*i:])
	}
	return []byte(strings.TrimPrefix(string(utf16.Decode(units)), "\ufeff"))
}

// syncsafe reads four bytes of seven bits.
func syncsafe(b []byte) int64 {
	return int64(b[0]&0x7f)<<21 | int64(b[1]&0x7f)<<14 | int64(b[2]&0x7f)<<7 | int64(b[3]&0x7f)
}

// scanFLAC walks the metadata blocks to the comment.
func scanFLAC(f *file) error {
	for offset := int64(4); ; {
		if err := f.step(); err != nil {
			return err
		}
		head, err := f.bytes(offset, 4)
		if err != nil {
			return err
		}
		const last, kindComment = 0x80, 4
		length := int64(binary.BigEndian.Uint32(head) & 0xffffff)
		if head[0]&^last == kindComment {
			data, err := f.bytes(offset+4, length)
			if err != nil {
				return err
			}
			return f.vorbisComment(data)
		}
		if head[0]&last != 0 {
			return nil
		}
		offset += 4 + length
	}
}

// scanOgg puts the second packet of the first stream together: the comment of Opus and of Vorbis.
func scanOgg(f *file) error {
	var packet []byte
	packets := 0
	for offset := int64(0); ; {
		if err := f.step(); err != nil {
			return err
		}
		head, err := f.bytes(offset, 27)
		if err != nil {
			return err
		}
		if string(head[:4]) != "OggS" {
			return errTruncated
		}
		lacing, err := f.bytes(offset+27, int64(head[26]))
		if err != nil {
			return err
		}
		body := int64(0)
		for _, n := range lacing {
			body += int64(n)
		}
		offset += 27 + int64(len(lacing))
		page, err := f.bytes(offset, body)
		if err != nil {
			return err
		}
		offset += body
		for _, n := range lacing {
			if packets == 1 {
				if packet = append(packet, page[:n]...); len(packet) > MaxText {
					return errTooLarge
				}
			}
			page = page[n:]
			if n == 255 { // the packet goes on
				continue
			}
			if packets++; packets == 2 {
				return f.oggComment(packet)
			}
		}
	}
}

func (f *file) oggComment(packet []byte) error {
	for _, magic := range []string{"OpusTags", "\x03vorbis"} {
		if data, ok := bytes.CutPrefix(packet, []byte(magic)); ok {
			return f.vorbisComment(data)
		}
	}
	return nil
}

// vorbisComment reads the writer's name and a list of NAME=text, each with its length in front.
func (f *file) vorbisComment(data []byte) error {
	next := func() ([]byte, bool) {
		if len(data) < 4 {
			return nil, false
		}
		n := binary.LittleEndian.Uint32(data)
		if uint64(n) > uint64(len(data)-4) {
			return nil, false
		}
		text := data[4 : 4+n]
		data = data[4+n:]
		return text, true
	}
	if _, ok := next(); !ok || len(data) < 4 {
		return errTruncated
	}
	count := binary.LittleEndian.Uint32(data)
	data = data[4:]
	for range count {
		comment, ok := next()
		if !ok {
			return errTruncated
		}
		if name, text, ok := bytes.Cut(comment, []byte{'='}); ok && isOurs(string(name)) {
			f.keep(string(name), text)
		}
	}
	return nil
}
