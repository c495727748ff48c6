package packed

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestPackAndUnpack(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		data := rapid.SliceOf(rapid.Byte()).Draw(rt, "data")
		data = bytes.Repeat(data, rapid.SampledFrom([]int{1, 2, 300}).Draw(rt, "times"))
		p := Pack(data)
		assert.NotEmpty(rt, p)
		assert.LessOrEqual(rt, len(p), len(data)+1)
		got, err := Unpack(string(p))
		require.NoError(rt, err)
		assert.True(rt, bytes.Equal(data, got))
	})
}

func TestPackMakesWorkflowsSmall(t *testing.T) {
	t.Parallel()
	node := `"7":{"class_type":"KSampler","inputs":{"cfg":8,"denoise":1,"latent_image":["5",0],"model":["4",0],"negative":["7",0]}},`
	data := []byte(strings.Repeat(node, 60))
	assert.Less(t, len(Pack(data)), len(data)/10)
}

func TestUnpackRefuses(t *testing.T) {
	t.Parallel()
	good := Pack(bytes.Repeat([]byte("workflow "), 1000))
	huge := append([]byte{deflated}, binary.AppendUvarint(nil, 1<<29)...)
	for name, p := range map[string][]byte{
		"nothing":      {},
		"unknown":      []byte("xabc"),
		"no length":    {deflated},
		"cut":          good[:len(good)-5],
		"longer":       append([]byte{deflated, 1}, good[3:]...),
		"a huge claim": append(huge, good[3:]...),
		"over a bound": append([]byte{deflated}, binary.AppendUvarint(nil, 1<<40)...),
		"garbage":      {deflated, 5, 0xff, 0xff, 0xff},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Unpack(string(p))
			require.ErrorIs(t, err, errMalformed)
		})
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add([]byte("p{}"))
	f.Add(Pack(bytes.Repeat([]byte(`{"1":{}}`), 500)))
	if data, err := os.ReadFile("packed.go"); err == nil {
		f.Add(Pack(data))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		data, err := Unpack(string(p))
		if err != nil {
			return
		}
		again, err := Unpack(string(Pack(data)))
		require.NoError(t, err)
		assert.True(t, bytes.Equal(data, again))
	})
}

func BenchmarkUnpack(b *testing.B) {
	node := `"7":{"class_type":"KSampler","inputs":{"cfg":8,"denoise":1,"latent_image":["5",0],"model":["4",0],"negative":["7",0]}},`
	for name, n := range map[string]int{"2KiB": 16, "8KiB": 64, "64KiB": 512} {
		p := string(Pack([]byte(strings.Repeat(node, n))))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Unpack(p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
