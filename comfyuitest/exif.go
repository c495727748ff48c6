package comfyuitest

import (
	"bytes"
	"encoding/binary"
	"image"
	"image/color"
)

// Cameras store a picture as the sensor saw it, and say in its EXIF data how to turn it; the server turns it while loading.

// upright is the orientation of a picture that needs no turning.
const upright = 1

// exifOrientation reads the orientation, 1 to 8, from the EXIF data of a JPEG file.
func exifOrientation(jpeg []byte) int {
	const startOfScan, app1 = 0xda, 0xe1
	for at := 2; at+4 <= len(jpeg) && jpeg[at] == 0xff; {
		marker, length := jpeg[at+1], int(binary.BigEndian.Uint16(jpeg[at+2:]))
		if marker == startOfScan || length < 2 || at+2+length > len(jpeg) {
			break
		}
		segment := jpeg[at+4 : at+2+length]
		if tiff, ok := bytes.CutPrefix(segment, []byte("Exif\x00\x00")); ok && marker == app1 {
			return tiffOrientation(tiff)
		}
		at += 2 + length
	}
	return upright
}

// tiffOrientation finds the tag in the first directory of a TIFF structure.
func tiffOrientation(tiff []byte) int {
	const tagOrientation, typeShort, entrySize = 0x0112, 3, 12
	if len(tiff) < 8 {
		return upright
	}
	var order binary.ByteOrder = binary.BigEndian
	if string(tiff[:2]) == "II" {
		order = binary.LittleEndian
	}
	directory := uint64(order.Uint32(tiff[4:]))
	if order.Uint16(tiff[2:]) != 42 || directory+2 > uint64(len(tiff)) {
		return upright
	}
	entries := tiff[directory+2:]
	for range order.Uint16(tiff[directory:]) {
		if len(entries) < entrySize {
			break
		}
		if order.Uint16(entries) == tagOrientation && order.Uint16(entries[2:]) == typeShort {
			if value := int(order.Uint16(entries[8:])); value >= 1 && value <= 8 {
				return value
			}
		}
		entries = entries[entrySize:]
	}
	return upright
}

// turned is a picture shown in another orientation.
type turned struct {
	image.Image

	orientation int
}

// Bounds begins at 0, 0.
func (t turned) Bounds() image.Rectangle {
	size := t.Image.Bounds().Size()
	if t.orientation >= 5 {
		return image.Rect(0, 0, size.Y, size.X)
	}
	return image.Rect(0, 0, size.X, size.Y)
}

// At implements [image.Image].
func (t turned) At(x, y int) color.Color {
	bounds := t.Image.Bounds()
	right, bottom := bounds.Dx()-1, bounds.Dy()-1
	switch t.orientation {
	case 2:
		x = right - x
	case 3:
		x, y = right-x, bottom-y
	case 4:
		y = bottom - y
	case 5:
		x, y = y, x
	case 6:
		x, y = y, bottom-x
	case 7:
		x, y = right-y, bottom-x
	case 8:
		x, y = right-y, x
	}
	return t.Image.At(bounds.Min.X+x, bounds.Min.Y+y)
}
