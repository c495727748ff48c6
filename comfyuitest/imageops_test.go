package comfyuitest

import (
	"bytes"
	"encoding/json"
	"image"
	"image/color"
	"image/gif"
	"image/png"
	"os"
	"slices"
	"testing"
)

// reference is what torch and Pillow make of the same pictures; testdata/imageops.py wrote it.
type reference struct {
	Scaled []struct {
		Method        string
		Width, Height int
		Bytes         []int
	}
	Blended []struct {
		Mode  string
		Bytes []int
	}
	Printed []struct {
		Shape  []int
		Values []float32
		Text   string
	}
}

func readReference(t *testing.T) reference {
	t.Helper()
	data, err := os.ReadFile("testdata/imageops.json")
	if err != nil {
		t.Fatal(err)
	}
	var r reference
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func pattern(width, height int) imageBatch {
	b := imageBatch{count: 1, width: width, height: height}
	for y := range height {
		for x := range width {
			for c := range channels {
				b.pix = append(b.pix, float32((x*37+y*91+c*53)%256)/255)
			}
		}
	}
	return b
}

// within tells whether bytes differ by rounding alone: float arithmetic in another order may land on the other side of a step.
func within(got []float32, want []int, steps int) (worst int, ok bool) {
	if len(got) != len(want) {
		return 0, false
	}
	for i := range got {
		difference := int(toByte(got[i])) - want[i]
		worst = max(worst, difference, -difference)
	}
	return worst, worst <= steps
}

func TestScale(t *testing.T) {
	t.Parallel()
	cases := readReference(t).Scaled
	if len(cases) == 0 {
		t.Fatal("no cases")
	}
	for _, tc := range cases {
		got, failure := pattern(7, 5).scale(tc.Method, tc.Width, tc.Height)
		if failure != nil {
			t.Errorf("%s: %v", tc.Method, failure)
			continue
		}
		if worst, ok := within(got.pix, tc.Bytes, 1); !ok {
			t.Errorf("%s to %dx%d: off by %d (%d values, want %d)", tc.Method, tc.Width, tc.Height, worst, len(got.pix), len(tc.Bytes))
		}
	}
}

func TestBlend(t *testing.T) {
	t.Parallel()
	source := pattern(7, 5)
	for _, tc := range readReference(t).Blended {
		got, failure := source.blend(source.invert(), tc.Mode, 0.3)
		if failure != nil {
			t.Errorf("%s: %v", tc.Mode, failure)
			continue
		}
		if worst, ok := within(got.pix, tc.Bytes, 1); !ok {
			t.Errorf("%s: off by %d", tc.Mode, worst)
		}
	}
	if _, failure := source.blend(pattern(3, 9), "normal", 1); failure != nil {
		t.Errorf("other size: %v", failure)
	}
	if _, failure := source.blend(source, "lighten", 1); failure == nil {
		t.Error("an unknown mode was taken")
	}
}

func TestTensorText(t *testing.T) {
	t.Parallel()
	for _, tc := range readReference(t).Printed {
		if got := tensorText(tc.Shape, tc.Values); got != tc.Text {
			t.Errorf("shape %v: got\n%s\nwant\n%s", tc.Shape, got, tc.Text)
		}
	}
}

func TestCenterCrop(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ width, height, wantWidth, wantHeight int }{
		{7, 5, 7, 5}, {5, 5, 5, 5}, {7, 1, 7, 1}, {1, 5, 1, 5}, {14, 10, 7, 5},
	} {
		got := pattern(7, 5).centerCrop(tc.width, tc.height)
		if got.width != tc.wantWidth || got.height != tc.wantHeight || len(got.pix) != got.width*got.height*channels {
			t.Errorf("%dx%d: cropped to %dx%d", tc.width, tc.height, got.width, got.height)
		}
	}
	middle := pattern(7, 5).centerCrop(1, 5).pix
	if want := pattern(7, 5).pix[3*channels : 4*channels]; !slices.Equal(middle[:channels], want) {
		t.Errorf("the middle column begins with %v, want %v", middle[:channels], want)
	}
}

func TestEightBitValuesSurvive(t *testing.T) {
	t.Parallel()
	for value := range 256 {
		if got := toByte(float32(value) / 255); int(got) != value {
			t.Errorf("%d came back as %d", value, got)
		}
	}
}

func TestImagesOf(t *testing.T) {
	t.Parallel()
	transparent := image.NewNRGBA(image.Rect(0, 0, 2, 1))
	transparent.SetNRGBA(0, 0, color.NRGBA{200, 100, 50, 0})
	transparent.SetNRGBA(1, 0, color.NRGBA{10, 20, 30, 255})
	batch, mask, failure := imagesOf([]image.Image{transparent, image.NewGray(image.Rect(0, 0, 3, 3))})
	if failure != nil || batch.count != 1 || toByte(batch.pix[0]) != 200 || toByte(batch.pix[5]) != 30 {
		t.Errorf("colours under transparency: %v %v", batch, failure)
	}
	if !slices.Equal(mask.pix, []float32{1, 0}) {
		t.Errorf("mask %v", mask.pix)
	}
	_, mask, failure = imagesOf([]image.Image{image.NewGray(image.Rect(0, 0, 3, 3))})
	if failure != nil || mask.width != 64 || mask.height != 64 || slices.Max(mask.pix) != 0 {
		t.Errorf("mask of an opaque picture: %dx%d, %v", mask.width, mask.height, failure)
	}
}

func TestTooManyFloats(t *testing.T) {
	t.Parallel()
	for _, size := range [][3]int{{4096, 16384, 16384}, {1, 0, 5}, {1, 5, -1}} {
		if _, failure := newImageBatch(size[0], size[1], size[2]); failure == nil {
			t.Errorf("%v was made", size)
		}
	}
	if _, failure := pattern(1, 1).scale(methodArea, 1<<30, 1<<30); failure == nil {
		t.Error("a picture of 2^60 pixels was made")
	}
}

func TestComposeGIF(t *testing.T) {
	t.Parallel()
	palette := color.Palette{color.NRGBA{}, color.NRGBA{255, 0, 0, 255}, color.NRGBA{0, 255, 0, 255}}
	first := image.NewPaletted(image.Rect(0, 0, 2, 1), palette)
	first.Pix = []uint8{1, 1}
	second := image.NewPaletted(image.Rect(1, 0, 2, 1), palette)
	second.Pix = []uint8{2}
	frames := composeGIF(&gif.GIF{
		Image: []*image.Paletted{first, second, second}, Disposal: []byte{gif.DisposalNone, gif.DisposalPrevious, gif.DisposalBackground},
		Config: image.Config{Width: 2, Height: 1},
	})
	if len(frames) != 3 {
		t.Fatalf("%d frames", len(frames))
	}
	want := color.NRGBA{255, 0, 0, 255}
	if got := nrgbaAt(frames[1], 0, 0); got != want {
		t.Errorf("the second frame lost the first: %v", got)
	}
	if got := nrgbaAt(frames[1], 1, 0); got != (color.NRGBA{0, 255, 0, 255}) {
		t.Errorf("the second frame shows %v", got)
	}
}

func TestEncodePNG(t *testing.T) {
	t.Parallel()
	data, err := encodePNG(pattern(7, 5).rgba(0), png.BestSpeed, []textChunk{{"prompt", `{"1": {}}`}, {"workflow", "[]"}})
	if err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	batch, _, failure := imagesOf([]image.Image{img})
	if failure != nil || !slices.Equal(batch.pix, pattern(7, 5).pix) {
		t.Error("the picture changed")
	}
	if got := pngTextsOf(data); !slices.Equal(got, []textChunk{{"prompt", `{"1": {}}`}, {"workflow", "[]"}}) {
		t.Errorf("texts %v", got)
	}
}
