package wire

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func binaryFrame(kind, second uint32, rest ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, kind)
	b = binary.BigEndian.AppendUint32(b, second)
	for _, r := range rest {
		b = append(b, r...)
	}
	return b
}

func TestBinary(t *testing.T) {
	t.Parallel()
	metadata := `{"node_id": "57.0.0.1", "prompt_id": "p", "display_node_id": "57", "parent_node_id": "57", "real_node_id": "57", "image_type": "image/png"}`
	for _, c := range []struct {
		name  string
		frame []byte
		want  Binary
	}{
		{"jpeg", binaryFrame(1, 1, "image"), Binary{Kind: 1, ContentType: "image/jpeg", Payload: 8}},
		{"png", binaryFrame(1, 2, "image"), Binary{Kind: 1, ContentType: "image/png", Payload: 8}},
		{"unknown format", binaryFrame(1, 7, "image"), Binary{Kind: 1, Payload: 8}},
		{"empty image", binaryFrame(1, 1), Binary{Kind: 1, ContentType: "image/jpeg", Payload: 8}},
		{"text", binaryFrame(3, 2, "57", "50 %"), Binary{Kind: 3, Node: "57", Text: "50 %", Payload: 10}},
		{"text, no node, no text", binaryFrame(3, 0), Binary{Kind: 3, Payload: 8}},
		{"text, no UTF-8", binaryFrame(3, 1, "\xff", "a\xffb"), Binary{Kind: 3, Node: "\uFFFD", Text: "a\uFFFDb", Payload: 9}},
		{
			"metadata", binaryFrame(4, uint32(len(metadata)), metadata, "image"),
			Binary{Kind: 4, ContentType: "image/png", PromptID: "p", Node: "57.0.0.1", Display: "57", Payload: 8 + len(metadata)},
		},
		{"no metadata", binaryFrame(4, 2, "{}", "image"), Binary{Kind: 4, Payload: 10}},
		{"metadata of other types", binaryFrame(4, 40, `{"node_id":7,"prompt_id":null,"x":[NaN]}`), Binary{Kind: 4, Node: "7", Payload: 48}},
		{"unknown kind", binaryFrame(99, 5), Binary{Kind: 99, Payload: 4}},
		{"unknown kind, nothing more", binaryFrame(99, 5)[:4], Binary{Kind: 99, Payload: 4}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b, err := NewDecoder().Binary(c.frame)
			require.NoError(t, err)
			assert.Equal(t, c.want, b)
			checkBinary(t, NewDecoder(), c.frame)
		})
	}
}

func TestBinaryMalformed(t *testing.T) {
	t.Parallel()
	for name, frame := range map[string][]byte{
		"empty":                   {},
		"cut in the kind":         {0, 0, 0},
		"cut in the format":       binaryFrame(1, 1)[:7],
		"cut in the length":       binaryFrame(4, 2)[:5],
		"cut in the metadata":     binaryFrame(4, 10, "{}"),
		"cut in the node":         binaryFrame(3, 3, "57"),
		"metadata too long":       binaryFrame(4, maxMetadata+1, "{}"+strings.Repeat(" ", maxMetadata-1)),
		"metadata of 4 GB":        binaryFrame(4, 1<<32-1, "{}"),
		"node of 4 GB":            binaryFrame(3, 1<<32-1, "1"),
		"metadata is no object":   binaryFrame(4, 4, "null", "image"),
		"metadata is no JSON":     binaryFrame(4, 3, "{x}", "image"),
		"metadata and more":       binaryFrame(4, 4, "{}{}", "image"),
		"metadata of no length":   binaryFrame(4, 0, "{}"),
		"metadata nested too far": binaryFrame(4, 2008, `{"a":`+strings.Repeat("[", 1001)+strings.Repeat("]", 1001)+"}"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, err := NewDecoder().Binary(frame)
			require.ErrorIs(t, err, ErrMalformed)
			assert.Equal(t, Binary{}, b)
		})
	}
}

func TestBinaryHeaderAsksForWhatItNeeds(t *testing.T) {
	t.Parallel()
	metadata := `{"node_id": "1"` + strings.Repeat(" ", maxMetadata-16) + `}`
	frame := binaryFrame(KindPreviewWithMetadata, maxMetadata, metadata, "image")
	d := NewDecoder()
	var asked []int
	prefix := frame[:0]
	for {
		b, need, err := d.BinaryHeader(prefix)
		require.NoError(t, err)
		if need <= len(prefix) {
			assert.Equal(t, "1", b.Node)
			assert.Equal(t, "image", string(frame[b.Payload:]))
			break
		}
		assert.Equal(t, Binary{}, b)
		asked = append(asked, need)
		prefix = frame[:need]
	}
	assert.Equal(t, []int{4, 8, MaxBinaryHeader}, asked)
}

// checkBinary compares with a plain reading of the format, and checks that prefixes give the same.
func checkBinary(t testing.TB, d *Decoder, frame []byte) {
	t.Helper()
	whole, err := d.Binary(frame)
	if err != nil {
		require.ErrorIs(t, err, ErrMalformed)
		require.Equal(t, Binary{}, whole)
	}
	prefix := frame[:0]
	for {
		b, need, headerErr := d.BinaryHeader(prefix)
		require.LessOrEqual(t, need, MaxBinaryHeader)
		if headerErr != nil {
			require.Error(t, err)
			return
		}
		if need > len(frame) {
			require.Error(t, err)
			return
		}
		if need <= len(prefix) {
			b.Text = whole.Text // as far as it was in the prefix
			require.NoError(t, err)
			require.Equal(t, whole, b)
			break
		}
		prefix = frame[:need]
	}
	require.LessOrEqual(t, whole.Payload, len(frame))
	payload := frame[whole.Payload:]
	switch binary.BigEndian.Uint32(frame) {
	case KindPreview:
		require.Equal(t, 8, whole.Payload)
	case KindText:
		require.True(t, utf8.ValidString(whole.Text))
		require.Equal(t, string(bytes.ToValidUTF8(payload, []byte("\uFFFD"))), whole.Text)
		require.Equal(t, string(bytes.ToValidUTF8(frame[8:whole.Payload], []byte("\uFFFD"))), whole.Node)
	case KindPreviewWithMetadata:
		f := oracleFields(oracleJSON(frame[8:whole.Payload]))
		require.NotNil(t, f)
		require.Equal(t, Binary{
			Kind: KindPreviewWithMetadata, ContentType: oracleID(f["image_type"]), PromptID: oracleID(f["prompt_id"]),
			Node: oracleID(f["node_id"]), Display: oracleID(f["display_node_id"]), Payload: whole.Payload,
		}, whole)
	default:
		require.Equal(t, Binary{Kind: whole.Kind, Payload: 4}, whole)
	}
}
