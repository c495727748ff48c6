package comfyuitest

import (
	"encoding/binary"
	"errors"
	"image"
	"image/color"
)

// encodeWebP writes a lossless WebP, which /view?preview=webp needs and the standard library lacks. It does not try to be
// small: every channel is coded with eight bits.
func encodeWebP(picture image.Image) ([]byte, error) {
	b := picture.Bounds()
	if b.Dx() < 1 || b.Dy() < 1 || b.Dx() > 1<<14 || b.Dy() > 1<<14 {
		return nil, errors.New("webp: bad size")
	}
	w := &bitWriter{}
	w.write(0x2f, 8)
	w.write(uint32(b.Dx()-1), 14)
	w.write(uint32(b.Dy()-1), 14)
	w.write(1, 1) // alpha is used
	w.write(0, 3) // version
	w.write(0, 1) // no transform
	w.write(0, 1) // no colour cache
	w.write(0, 1) // one group of prefix codes
	w.eightBitCode(256 + 24)
	for range 3 {
		w.eightBitCode(256)
	}
	// The code of distances, which are never used: a single symbol.
	w.write(1, 1)
	w.write(0, 1)
	w.write(0, 1)
	w.write(0, 1)
	for y := range b.Dy() {
		for x := range b.Dx() {
			c := color.NRGBAModel.Convert(picture.At(b.Min.X+x, b.Min.Y+y)).(color.NRGBA)
			for _, v := range []uint8{c.G, c.R, c.B, c.A} {
				w.write(uint32(reversed(v)), 8) // prefix codes are packed from their first bit on
			}
		}
	}
	data := w.bytes()
	if len(data)%2 == 1 {
		data = append(data, 0)
	}
	out := append([]byte("RIFF"), binary.LittleEndian.AppendUint32(nil, uint32(12+len(data)))...)
	out = append(out, "WEBPVP8L"...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(data)))
	return append(out, data...), nil
}

// bitWriter packs bits from the least significant on.
type bitWriter struct {
	out   []byte
	acc   uint64
	count uint
}

func (w *bitWriter) write(v uint32, bits uint) {
	w.acc |= uint64(v) << w.count
	w.count += bits
	for w.count >= 8 {
		w.out = append(w.out, byte(w.acc))
		w.acc >>= 8
		w.count -= 8
	}
}

func (w *bitWriter) bytes() []byte {
	if w.count > 0 {
		w.out = append(w.out, byte(w.acc))
		w.acc, w.count = 0, 0
	}
	return w.out
}

// eightBitCode declares a prefix code in which the first 256 symbols have eight bits each and the others none.
func (w *bitWriter) eightBitCode(symbols int) {
	w.write(0, 1) // not the simple form
	// The code lengths are themselves coded, with lengths in this order: 17, 18, 0, 1, …, 8, … Only 0 and 8 occur.
	const given = 12
	w.write(given-4, 4)
	for _, length := range []uint32{0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1} {
		w.write(length, 3)
	}
	w.write(0, 1) // lengths for all symbols follow
	for symbol := range symbols {
		if symbol < 256 {
			w.write(1, 1) // 8
		} else {
			w.write(0, 1) // 0
		}
	}
}

func reversed(v uint8) uint8 {
	v = v>>4 | v<<4
	v = v>>2&0x33 | v<<2&0xcc
	return v>>1&0x55 | v<<1&0xaa
}
