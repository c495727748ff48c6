package comfyuitest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"image"
	"image/png"
	"slices"
)

// textChunk is a tEXt chunk of a PNG file: the server keeps the graph there under prompt, and the editor's under workflow.
type textChunk struct{ keyword, text string }

// afterHeader is where the first chunk after IHDR begins.
const afterHeader = 8 + 4 + 4 + 13 + 4

// encodePNG writes img with texts before its pixels.
func encodePNG(img image.Image, level png.CompressionLevel, texts []textChunk) ([]byte, error) {
	var plain bytes.Buffer
	encoder := png.Encoder{CompressionLevel: level}
	if err := encoder.Encode(&plain, img); err != nil {
		return nil, fmt.Errorf("encode PNG: %w", err)
	}
	var chunks []byte
	for _, t := range texts {
		chunks = appendChunk(chunks, "tEXt", slices.Concat([]byte(t.keyword), []byte{0}, []byte(t.text)))
	}
	data := plain.Bytes()
	return slices.Concat(data[:afterHeader], chunks, data[afterHeader:]), nil
}

func appendChunk(dst []byte, kind string, data []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(data)))
	start := len(dst)
	dst = append(append(dst, kind...), data...)
	return binary.BigEndian.AppendUint32(dst, crc32.ChecksumIEEE(dst[start:]))
}
