package media

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func read(data []byte) (Texts, error) { return Read(bytes.NewReader(data), int64(len(data))) }

// The files were saved by a real server (0.33); each has the graph that ran and the editor's workflow.
func TestReadWhatTheServerWrites(t *testing.T) {
	t.Parallel()
	for name, outputClass := range map[string]string{
		"simple.png":    "SaveImage",
		"subgraph.png":  "SaveImage",
		"animated.png":  "SaveAnimatedPNG",
		"animated.webp": "SaveAnimatedWEBP",
		"video.mp4":     "SaveVideo",
		"video.webm":    "SaveWEBM",
		"audio.mp3":     "SaveAudioMP3",
		"audio.flac":    "SaveAudio",
		"audio.opus":    "SaveAudioOpus",
		"tensor.latent": "SaveLatent",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data, err := os.ReadFile(filepath.Join("testdata", name))
			require.NoError(t, err)
			texts, err := read(data)
			require.NoError(t, err)

			var prompt map[string]struct {
				ClassType string `json:"class_type"`
			}
			require.NoError(t, json.Unmarshal(texts.Prompt, &prompt))
			var classes []string
			for _, node := range prompt {
				classes = append(classes, node.ClassType)
			}
			assert.Contains(t, classes, outputClass)

			var workflow struct{ Nodes, Links []json.RawMessage }
			require.NoError(t, json.Unmarshal(texts.Workflow, &workflow))
			assert.NotEmpty(t, workflow.Nodes)
			assert.NotEmpty(t, workflow.Links)

			// Cut anywhere, a file is an error or has whole texts: the prompt of these is never half of one.
			for cut := 0; cut < len(data); cut += 7 {
				texts, err := read(data[:cut])
				if err == nil && texts.Prompt != nil {
					require.True(t, json.Valid(texts.Prompt), "cut at %d", cut)
				}
			}
		})
	}
}

func TestReadOtherForms(t *testing.T) {
	t.Parallel()
	const prompt = `{"1":{"class_type":"A","_meta":{"title":"é"}}}`
	latin1 := strings.ReplaceAll(prompt, "é", "\xe9")
	for name, data := range map[string][]byte{
		"tEXt in Latin-1":       png(chunk("tEXt", "prompt\x00"+latin1)),
		"tEXt in UTF-8":         png(chunk("tEXt", "prompt\x00"+prompt)),
		"zTXt":                  png(chunk("zTXt", "prompt\x00\x00"+deflated(latin1))),
		"iTXt":                  png(chunk("iTXt", "prompt\x00\x00\x00en\x00Prompt\x00"+prompt)),
		"iTXt compressed":       png(chunk("iTXt", "prompt\x00\x01\x00\x00\x00"+deflated(prompt))),
		"the last of two":       png(chunk("tEXt", "prompt\x00{}"), chunk("IDAT", "xx"), chunk("tEXt", "prompt\x00"+prompt)),
		"damage after it":       png(chunk("tEXt", "prompt\x00"+prompt), "\xff\xff\xff\xffIDATxx"),
		"JPEG":                  jpeg(exif(binary.BigEndian, prompt)),
		"JPEG, little-endian":   jpeg(exif(binary.LittleEndian, prompt)),
		"ID3v2.3 UTF-16":        id3(3, "\x01"+utf16le("prompt")+"\x00\x00"+utf16le(prompt)),
		"ID3v2.4 UTF-16BE":      id3(4, "\x02"+utf16be("prompt")+"\x00\x00"+utf16be(prompt)),
		"ID3v2.3 Latin-1":       id3(3, "\x00prompt\x00"+latin1),
		"Matroska, live stream": []byte("\x1a\x45\xdf\xa3\x80" + "\x18\x53\x80\x67\xff" + "\x1f\x43\xb6\x75\xff" + "\xe7\x81\x00" + tags("PROMPT", prompt)),
		"QuickTime": []byte(boxOf("ftyp", "qt  ") + boxOf("moov", boxOf("meta",
			boxOf("hdlr", strings.Repeat("\x00", 25))+boxOf("keys", "\x00\x00\x00\x00\x00\x00\x00\x01"+boxOf("mdta", "prompt"))+
				boxOf("ilst", boxOf("\x00\x00\x00\x01", boxOf("data", "\x00\x00\x00\x01\x00\x00\x00\x00"+prompt)))))),
		"MP4 with a wide box": []byte(boxOf("ftyp", "isom") + "\x00\x00\x00\x01mdat\x00\x00\x00\x00\x00\x00\x00\x12xx" + boxOf("moov", boxOf("udta", boxOf("meta",
			"\x00\x00\x00\x00"+boxOf("hdlr", strings.Repeat("\x00", 25))+boxOf("keys", "\x00\x00\x00\x00\x00\x00\x00\x01"+boxOf("mdta", "prompt"))+
				boxOf("ilst", boxOf("\x00\x00\x00\x01", boxOf("data", "\x00\x00\x00\x01\x00\x00\x00\x00"+prompt))))))),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			texts, err := read(data)
			require.NoError(t, err)
			assert.Equal(t, prompt, string(texts.Prompt))
		})
	}
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	bomb := deflated(strings.Repeat("\x00", MaxText+1))
	for name, test := range map[string]struct {
		data []byte
		want error
	}{
		"empty":                  {nil, ErrFormat},
		"JSON":                   {[]byte(`{"1": {"class_type": "A"}}`), ErrFormat},
		"a bomb in zTXt":         {png(chunk("zTXt", "prompt\x00\x00"+bomb)), errTooLarge},
		"a bomb in iTXt":         {png(chunk("iTXt", "workflow\x00\x01\x00\x00\x00"+bomb)), errTooLarge},
		"a length that is a lie": {[]byte(pngSignature + "\x7f\xff\xff\xfftEXtprompt\x00{"), errTruncated},
		"not zlib":               {png(chunk("zTXt", "prompt\x00\x00nope")), errTruncated},
		"many boxes":             {[]byte(boxOf("ftyp", "isom") + strings.Repeat("\x00\x00\x00\x08free", maxSteps+1)), errTooMany},
		"tags in tags":           {[]byte("\x1a\x45\xdf\xa3\x80" + nested(20)), errTooMany},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			texts, err := read(test.data)
			require.ErrorIs(t, err, test.want)
			assert.Empty(t, texts)
		})
	}
}

func TestReadNothing(t *testing.T) {
	t.Parallel()
	texts, err := read(png(chunk("tEXt", "parameters\x00a cat"), chunk("zTXt", "prompt"), chunk("IDAT", "")))
	require.NoError(t, err)
	assert.Empty(t, texts)
}

func FuzzRead(f *testing.F) {
	names, err := filepath.Glob("testdata/*.*")
	if err != nil || len(names) == 0 {
		f.Fatal("no seeds", err)
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add(jpeg(exif(binary.LittleEndian, "{}")))
	f.Add(id3(4, "\x02"+utf16be("prompt")+"\x00\x00"+utf16be("{}")))
	f.Fuzz(func(t *testing.T, data []byte) {
		texts, err := read(data)
		if err != nil && (texts.Prompt != nil || texts.Workflow != nil) {
			t.Fatal("texts beside an error")
		}
		if _, again := read(data); (again == nil) != (err == nil) {
			t.Fatal("read twice, different answers")
		}
	})
}

func FuzzPNGText(f *testing.F) {
	f.Add("tEXt", []byte("prompt\x00{}"))
	f.Add("zTXt", []byte("prompt\x00\x00"+deflated("{}")))
	f.Add("iTXt", []byte("workflow\x00\x01\x00\x00\x00"+deflated("{}")))
	f.Add("iTXt", []byte("workflow\x00\x00\x00en\x00x\x00{}"))
	f.Add("comf", []byte("prompt\x00{}"))
	f.Fuzz(func(t *testing.T, kind string, data []byte) {
		switch kind {
		case "tEXt", "zTXt", "iTXt", "comf":
		default:
			return
		}
		name, text, err := (&file{inflatable: 1 << 20}).pngText(kind, data)
		if err == nil && name == "" && text != nil {
			t.Fatal("a text without a name")
		}
		if len(text) > max(1<<20, 2*len(data)) {
			t.Fatalf("%d bytes out of %d", len(text), len(data))
		}
		if err != nil && !errors.Is(err, errTruncated) && !errors.Is(err, errTooLarge) {
			t.Fatalf("an error of another kind: %v", err)
		}
	})
}

func png(chunks ...string) []byte {
	return []byte(pngSignature + chunk("IHDR", strings.Repeat("\x00", 13)) + strings.Join(chunks, "") + chunk("IEND", ""))
}

func chunk(kind, data string) string {
	out := binary.BigEndian.AppendUint32(nil, uint32(len(data)))
	out = append(out, kind+data...)
	return string(binary.BigEndian.AppendUint32(out, crc32.ChecksumIEEE(out[4:])))
}

func deflated(text string) string {
	var buf bytes.Buffer
	z := zlib.NewWriter(&buf)
	_, _ = z.Write([]byte(text))
	_ = z.Close()
	return buf.String()
}

func jpeg(exif string) []byte {
	app1 := "Exif\x00\x00" + exif
	length := binary.BigEndian.AppendUint16(nil, uint16(len(app1)+2))
	return []byte("\xff\xd8\xff\xe0\x00\x04ab\xff\xff\xe1" + string(length) + app1 + "\xff\xda\x00\x02")
}

// exif has two entries: a short one, and Model with "prompt:…".
func exif(order interface {
	binary.ByteOrder
	binary.AppendByteOrder
}, prompt string,
) string {
	text := "prompt:" + prompt + "\x00"
	out := []byte("MM\x00*")
	if order.Uint16([]byte{1, 0}) == 1 {
		out = []byte("II*\x00")
	}
	out = order.AppendUint32(out, 8)
	out = order.AppendUint16(out, 2)
	for _, entry := range [][4]uint32{{0x0100, 3, 1, 64}, {0x0110, 2, uint32(len(text)), 8 + 2 + 2*12 + 4}} {
		out = order.AppendUint16(out, uint16(entry[0]))
		out = order.AppendUint16(out, uint16(entry[1]))
		out = order.AppendUint32(out, entry[2])
		out = order.AppendUint32(out, entry[3])
	}
	out = order.AppendUint32(out, 0)
	return string(out) + text
}

func id3(version byte, txxx string) []byte {
	size := func(n int) string {
		if version == 3 {
			return string(binary.BigEndian.AppendUint32(nil, uint32(n)))
		}
		return string([]byte{byte(n >> 21 & 0x7f), byte(n >> 14 & 0x7f), byte(n >> 7 & 0x7f), byte(n & 0x7f)})
	}
	frames := "TIT2" + size(2) + "\x00\x00\x03x" + "TXXX" + size(len(txxx)) + "\x00\x00" + txxx + strings.Repeat("\x00", 32)
	n := len(frames)
	return []byte("ID3" + string([]byte{version, 0, 0, byte(n >> 21 & 0x7f), byte(n >> 14 & 0x7f), byte(n >> 7 & 0x7f), byte(n & 0x7f)}) + frames)
}

func utf16be(s string) string {
	var out []byte
	for _, unit := range utf16.Encode([]rune(s)) {
		out = binary.BigEndian.AppendUint16(out, unit)
	}
	return string(out)
}

func utf16le(s string) string {
	out := []byte("\xff\xfe")
	for _, unit := range utf16.Encode([]rune(s)) {
		out = binary.LittleEndian.AppendUint16(out, unit)
	}
	return string(out)
}

func boxOf(kind, data string) string {
	return string(binary.BigEndian.AppendUint32(nil, uint32(len(data)+8))) + kind + data
}

func element(id, data string) string { // a length of four bytes
	n := uint32(len(data)) | 0x10000000
	return id + string(binary.BigEndian.AppendUint32(nil, n)) + data
}

func tags(name, text string) string {
	return element("\x12\x54\xc3\x67", element("\x73\x73", element("\x67\xc8", element("\x44\x87", text)+element("\x45\xa3", name))))
}

func nested(n int) string {
	out := ""
	for range n {
		out = element("\x67\xc8", out)
	}
	return out
}
