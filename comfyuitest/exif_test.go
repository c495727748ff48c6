package comfyuitest

import (
	"bytes"
	"encoding/binary"
	"image"
	"image/color"
	"image/jpeg"
	"testing"
)

// withOrientation puts EXIF data into a JPEG file.
func withOrientation(plain []byte, order binary.AppendByteOrder, mark string, orientation uint16) []byte {
	tiff := order.AppendUint32(order.AppendUint16([]byte(mark), 42), 8)
	tiff = order.AppendUint16(tiff, 2)
	tiff = order.AppendUint32(order.AppendUint32(order.AppendUint16(order.AppendUint16(tiff, 0x0100), 4), 1), 7)
	tiff = order.AppendUint32(order.AppendUint16(order.AppendUint16(tiff, 0x0112), 3), 1)
	tiff = append(order.AppendUint16(tiff, orientation), 0, 0)
	segment := append([]byte("Exif\x00\x00"), tiff...)
	out := binary.BigEndian.AppendUint16(append(bytes.Clone(plain[:2]), 0xff, 0xe1), uint16(len(segment)+2))
	return append(append(out, segment...), plain[2:]...)
}

func jpegOf(tb testing.TB, img image.Image) []byte {
	tb.Helper()
	var b bytes.Buffer
	if err := jpeg.Encode(&b, img, &jpeg.Options{Quality: 100}); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func TestExifOrientation(t *testing.T) {
	t.Parallel()
	plain := jpegOf(t, image.NewGray(image.Rect(0, 0, 2, 2)))
	if got := exifOrientation(plain); got != upright {
		t.Errorf("without EXIF data: %d", got)
	}
	for orientation := uint16(1); orientation <= 8; orientation++ {
		for mark, order := range map[string]binary.AppendByteOrder{"II": binary.LittleEndian, "MM": binary.BigEndian} {
			data := withOrientation(plain, order, mark, orientation)
			if got := exifOrientation(data); got != int(orientation) {
				t.Errorf("%s: got %d, want %d", mark, got, orientation)
			}
			if _, err := jpeg.Decode(bytes.NewReader(data)); err != nil {
				t.Errorf("%s %d: %v", mark, orientation, err)
			}
		}
	}
	if got := exifOrientation(withOrientation(plain, binary.BigEndian, "MM", 9)); got != upright {
		t.Errorf("orientation 9: %d", got)
	}
}

func TestTurned(t *testing.T) {
	t.Parallel()
	// Two columns, one row: A B.
	source := image.NewGray(image.Rect(0, 0, 2, 1))
	source.Pix = []uint8{'A', 'B'}
	// Where A is, in a picture of that size.
	for orientation, want := range map[int]struct{ width, x, y int }{
		1: {2, 0, 0}, 2: {2, 1, 0}, 3: {2, 1, 0}, 4: {2, 0, 0}, 5: {1, 0, 0}, 6: {1, 0, 0}, 7: {1, 0, 1}, 8: {1, 0, 1},
	} {
		got := turned{source, orientation}
		if got.Bounds().Dx() != want.width || got.Bounds().Dx()*got.Bounds().Dy() != 2 {
			t.Errorf("%d: bounds %v", orientation, got.Bounds())
		}
		if c := color.GrayModel.Convert(got.At(want.x, want.y)); c != (color.Gray{'A'}) {
			t.Errorf("%d: %c at %d,%d", orientation, c, want.x, want.y)
		}
	}
}

func FuzzExifOrientation(f *testing.F) {
	plain := []byte{0xff, 0xd8, 0xff, 0xda, 0, 0}
	f.Add(plain)
	f.Add(withOrientation(plain, binary.LittleEndian, "II", 6))
	f.Add(withOrientation(plain, binary.BigEndian, "MM", 3))
	f.Fuzz(func(t *testing.T, data []byte) {
		if got := exifOrientation(data); got < 1 || got > 8 {
			t.Fatalf("orientation %d", got)
		}
	})
}
