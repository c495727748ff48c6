package comfyuitest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// runGraph runs a graph to its end and returns its entry in the history.
func runGraph(t *testing.T, p *Pod, graph, more string) object {
	t.Helper()
	r := submit(t, p, graph, "", more)
	require.Equal(t, 200, r.status, "%s", r.body)
	id, _ := at(t, r.json(t), "prompt_id").(string)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	require.NoError(t, p.WaitIdle(ctx))
	entry, _ := at(t, get(t, p, "/history/"+id), id).(object)
	return entry
}

// savedFiles are the files that a node of a run saved.
func savedFiles(t *testing.T, p *Pod, entry object, node string) []image.Image {
	t.Helper()
	require.Equal(t, "success", at(t, entry, "status", "status_str"), "%s", pyJSON(entry))
	list, _ := at(t, entry, "outputs", node, "images").([]any)
	var pictures []image.Image
	for _, item := range list {
		picture, err := png.Decode(bytes.NewReader(storedFile(t, p, item)))
		require.NoError(t, err)
		pictures = append(pictures, picture)
	}
	return pictures
}

func storedFile(t *testing.T, p *Pod, item any) []byte {
	t.Helper()
	file := func(key string) string {
		text, _ := at(t, item, key).(string)
		return text
	}
	found, ok := p.files.get(file("type"), file("subfolder"), file("filename"))
	require.True(t, ok, "%s is not there", pyJSON(item))
	return found.data
}

func emptyImage(width, height, count, color int) object {
	return object{{"width", width}, {"height", height}, {"batch_size", count}, {"color", color}}
}

func TestSaveImageNames(t *testing.T) {
	t.Parallel()
	p := Start(t)
	for color, tc := range []struct {
		prefix string
		before []string
		want   []string
	}{
		{"plain", nil, []string{"plain_00001_.png", "plain_00002_.png"}},
		{"plain", nil, []string{"plain_00003_.png", "plain_00004_.png"}},
		{"sub/deep/name", nil, []string{"sub/deep/name_00001_.png", "sub/deep/name_00002_.png"}},
		{"gap", []string{"gap_00041_.png", "gap_x_.png", "gapless_00077_.png"}, []string{"gap_00042_.png", "gap_00043_.png"}},
		{"w%width%h%height%", nil, []string{"w12h8_00001_.png", "w12h8_00002_.png"}},
		{"n%batch_num%", nil, []string{"n0_00001_.png", "n1_00002_.png"}},
		{"ünï", nil, []string{"ünï_00001_.png", "ünï_00002_.png"}},
		{"slash/", nil, []string{"slash_00001_.png", "slash_00002_.png"}},
		{"slash/", nil, []string{"slash_00001_.png", "slash_00002_.png"}}, // never counts on: the server's own fault
	} {
		for _, name := range tc.before {
			p.files.put(kindOutput, "", name, nil)
		}
		entry := runGraph(t, p, graphOf(
			"1", "EmptyImage", emptyImage(12, 8, 2, color), // a new one each time, past the cache
			"2", "SaveImage", object{{"images", []any{"1", 0}}, {"filename_prefix", tc.prefix}}), "")
		require.Len(t, savedFiles(t, p, entry, "2"), 2)
		var got []string
		list, _ := at(t, entry, "outputs", "2", "images").([]any)
		for _, item := range list {
			name, _ := at(t, item, "filename").(string)
			if folder, _ := at(t, item, "subfolder").(string); folder != "" {
				name = folder + "/" + name
			}
			require.Equal(t, "output", at(t, item, "type"))
			got = append(got, name)
		}
		require.Equal(t, tc.want, got, tc.prefix)
	}
}

func TestSaveImageStaysInside(t *testing.T) {
	t.Parallel()
	p := Start(t)
	for _, prefix := range []string{"../x", "/etc/x", "a/../../x", ".."} {
		entry := runGraph(t, p, graphOf("1", "EmptyImage", emptyImage(8, 8, 1, 0),
			"2", "SaveImage", object{{"images", []any{"1", 0}}, {"filename_prefix", prefix}}), "")
		if prefix == ".." { // the folder itself is inside, and the name is odd
			continue
		}
		require.Equal(t, "error", at(t, entry, "status", "status_str"), prefix)
		message, _ := at(t, entry, "status", "messages", 2, 1, "exception_message").(string)
		require.True(t, strings.HasPrefix(message, "**** ERROR: Saving image outside the output folder is not allowed."), message)
	}
}

func TestFillIn(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	got := fillIn("%year%-%month%-%day%_%hour%.%minute%.%second%_%width%x%height%_%other%", 640, 480, now)
	require.Equal(t, "2026-03-04_05.06.07_640x480_%other%", got)
}

func TestSavedPicturesCarryTheGraph(t *testing.T) {
	t.Parallel()
	p := Start(t)
	graph := func(color int) string {
		return graphOf("1", "EmptyImage", object{{"width", "8"}, {"height", 8.0}, {"batch_size", 1}, {"color", color}},
			"2", "SaveImage", object{{"images", []any{"1", 0}}, {"filename_prefix", "é"}})
	}
	entry := runGraph(t, p, graph(0x102030), `"extra_data": {"extra_pnginfo": {"workflow": {"nodes": [1.5, "ü"]}, "note": "x"}}`)
	list, _ := at(t, entry, "outputs", "2", "images").([]any)
	require.Equal(t, []textChunk{
		{"prompt", `{"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1056816}}, ` +
			`"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "\u00e9"}}}`},
		{"workflow", `{"nodes": [1.5, "\u00fc"]}`},
		{"note", `"x"`},
	}, pngTextsOf(storedFile(t, p, list[0])))
	require.Equal(t, color.NRGBA{0x10, 0x20, 0x30, 0xff}, nrgbaAt(savedFiles(t, p, entry, "2")[0], 3, 3))

	for color, tc := range []struct{ info, message string }{
		{`["a"]`, "list indices must be integers or slices, not str"},
		{`5`, "'int' object is not iterable"},
		{`{"中": 1}`, `'latin-1' codec can't encode character '\u4e2d' in position 0`},
	} {
		entry := runGraph(t, p, graph(color), `"extra_data": {"extra_pnginfo": `+tc.info+`}`)
		message, _ := at(t, entry, "status", "messages", 2, 1, "exception_message").(string)
		require.Contains(t, message, tc.message)
	}
	entry = runGraph(t, p, graph(99), `"extra_data": {"extra_pnginfo": null}`)
	require.Equal(t, "success", at(t, entry, "status", "status_str"))
}

func TestPreviewImageKeepsItsPrefix(t *testing.T) {
	t.Parallel()
	p := Start(t)
	name := func(color int) string {
		entry := runGraph(t, p, graphOf("1", "EmptyImage", emptyImage(8, 8, 1, color), "2", "PreviewImage", object{{"images", []any{"1", 0}}}), "")
		require.Equal(t, "temp", at(t, entry, "outputs", "2", "images", 0, "type"))
		file, _ := at(t, entry, "outputs", "2", "images", 0, "filename").(string)
		return file
	}
	first, second := name(1), name(2)
	require.Regexp(t, `^ComfyUI_temp_[a-z]{5}_00001_\.png$`, first)
	require.Equal(t, strings.Replace(first, "_00001_", "_00002_", 1), second)
	p.Restart(0)
	p.Client().CloseIdleConnections()
	require.NotEqual(t, first[:len("ComfyUI_temp_xxxxx")], name(3)[:len("ComfyUI_temp_xxxxx")])
}

func TestImageNodes(t *testing.T) {
	t.Parallel()
	p := Start(t)
	source := image.NewNRGBA(image.Rect(0, 0, 4, 2))
	for i := range source.Pix {
		source.Pix[i] = uint8(i * 7)
	}
	data, err := encodePNG(source, png.DefaultCompression, nil)
	require.NoError(t, err)
	p.files.put(kindInput, "sub", "in.png", data)
	p.files.put(kindOutput, "", "out.png", data)
	p.files.put(kindInput, "", "broken.png", []byte("no picture"))

	load := func(name string) string {
		return graphOf("1", "LoadImage", object{{"image", name}}, "2", "ImageInvert", object{{"image", []any{"1", 0}}},
			"3", "ImageBlend", object{{"image1", []any{"1", 0}}, {"image2", []any{"2", 0}}, {"blend_factor", 0.25}, {"blend_mode", "normal"}},
			"4", "ImageScale", object{{"image", []any{"3", 0}}, {"upscale_method", "bilinear"}, {"width", 0}, {"height", 6}, {"crop", "disabled"}},
			"5", "ImageScaleBy", object{{"image", []any{"4", 0}}, {"upscale_method", "area"}, {"scale_by", 0.5}},
			"7", "SaveImage", object{{"images", []any{"2", 0}}, {"filename_prefix", "inverted"}},
			"8", "SaveImage", object{{"images", []any{"3", 0}}, {"filename_prefix", "blended"}},
			"9", "SaveImage", object{{"images", []any{"5", 0}}, {"filename_prefix", "scaled"}})
	}
	for _, name := range []string{"sub/in.png", "out.png [output]", "sub/in.png [input]"} {
		entry := runGraph(t, p, load(name), "")
		inverted := nrgbaAt(savedFiles(t, p, entry, "7")[0], 1, 1)
		blended := nrgbaAt(savedFiles(t, p, entry, "8")[0], 1, 1)
		original := source.NRGBAAt(1, 1)
		require.InDelta(t, 255-original.R, inverted.R, 1)
		require.InDelta(t, 0.75*float64(original.G)+0.25*(255-float64(original.G)), float64(blended.G), 1.01)
		require.Equal(t, image.Rect(0, 0, 6, 3), savedFiles(t, p, entry, "9")[0].Bounds())
	}
	entry := runGraph(t, p, load("broken.png"), "")
	require.Equal(t, "PIL.UnidentifiedImageError", at(t, entry, "status", "messages", 2, 1, "exception_type"))
	require.Equal(t, 400, submit(t, p, load("gone.png"), "", "").status)
	require.Equal(t, 400, submit(t, p, load("../in.png"), "", "").status)
}

func TestLoadImageTurnsPhotos(t *testing.T) {
	t.Parallel()
	p := Start(t)
	photo := image.NewGray(image.Rect(0, 0, 32, 16))
	for i := range photo.Pix {
		photo.Pix[i] = uint8(200 * (i % 32 / 16)) // the right half is bright
	}
	p.files.put(kindInput, "", "photo.jpg", withOrientation(jpegOf(t, photo), binary.BigEndian, "MM", 6))
	entry := runGraph(t, p, graphOf("1", "LoadImage", object{{"image", "photo.jpg"}}, "2", "PreviewImage", object{{"images", []any{"1", 0}}}), "")
	picture := savedFiles(t, p, entry, "2")[0]
	require.Equal(t, image.Rect(0, 0, 16, 32), picture.Bounds())
	require.Greater(t, nrgbaAt(picture, 8, 30).R, nrgbaAt(picture, 8, 2).R)
}

func TestLoadImageNoticesNewContent(t *testing.T) {
	t.Parallel()
	p := Start(t)
	graph := graphOf("1", "LoadImage", object{{"image", "x.png"}}, "2", "SaveImage", object{{"images", []any{"1", 0}}, {"filename_prefix", "x"}})
	for shade := range 3 {
		picture := image.NewGray(image.Rect(0, 0, 3, 3))
		for i := range picture.Pix {
			picture.Pix[i] = uint8(shade * 50)
		}
		data, err := encodePNG(picture, png.DefaultCompression, nil)
		require.NoError(t, err)
		p.files.put(kindInput, "", "x.png", data)
		for range 2 { // the second run takes all from the cache
			entry := runGraph(t, p, graph, "")
			require.Equal(t, fmt.Sprintf("x_%05d_.png", shade+1), at(t, entry, "outputs", "2", "images", 0, "filename"))
			require.Equal(t, uint8(shade*50), nrgbaAt(savedFiles(t, p, entry, "2")[0], 1, 1).R)
		}
	}
}

func TestPrimitivesFeedOtherNodes(t *testing.T) {
	t.Parallel()
	p := Start(t)
	entry := runGraph(t, p, graphOf("1", "PrimitiveInt", object{{"value", 24}}, "2", "PrimitiveString", object{{"value", "named"}},
		"3", "EmptyImage", object{{"width", []any{"1", 0}}, {"height", []any{"1", 0}}, {"batch_size", 1}, {"color", 5}},
		"4", "SaveImage", object{{"images", []any{"3", 0}}, {"filename_prefix", []any{"2", 0}}}), "")
	require.Equal(t, "named_00001_.png", at(t, entry, "outputs", "4", "images", 0, "filename"))
	require.Equal(t, image.Rect(0, 0, 24, 24), savedFiles(t, p, entry, "4")[0].Bounds())
	require.Equal(t, 400, submit(t, p, graphOf("1", "PrimitiveFloat", object{{"value", 1.5}}, "2", "PreviewImage", object{{"images", []any{"1", 0}}}), "", "").status)
}

func TestBuiltinsFailAsPythonDoes(t *testing.T) {
	t.Parallel()
	p := Start(t, WithNode("Give", Node{Run: func(_ context.Context, c *Call) error {
		switch c.Inputs["what"] {
		case "text":
			c.Return("abc")
		case "nothing":
			c.Return(nil)
		case "negative":
			c.Return(-4)
		case "huge":
			c.Return(1 << 20)
		case "picture":
			c.Return(image.NewGray(image.Rect(0, 0, 5, 7)))
		}
		return nil
	}}))
	for _, tc := range []struct{ what, class, input, exception string }{
		{"text", "ImageInvert", "image", "AttributeError"},
		{"nothing", "ImageInvert", "image", "TypeError"},
		{"picture", "ImageInvert", "image", ""},
		{"text", "EmptyImage", "width", "TypeError"},
		{"negative", "EmptyImage", "width", "RuntimeError"},
		{"huge", "EmptyImage", "width", "RuntimeError"},
	} {
		inputs := object{{"width", 8}, {"height", 1024}, {"batch_size", 1}, {"color", 0}}
		if tc.class == "ImageInvert" {
			inputs = object{}
		}
		entry := runGraph(t, p, graphOf("1", "Give", object{{"what", tc.what}}, "2", tc.class, inputs.set(tc.input, []any{"1", 0}),
			"3", "PreviewImage", object{{"images", []any{"2", 0}}}), "")
		if tc.exception == "" {
			require.Equal(t, image.Rect(0, 0, 5, 7), savedFiles(t, p, entry, "3")[0].Bounds())
			continue
		}
		require.Equal(t, tc.exception, at(t, entry, "status", "messages", 2, 1, "exception_type"), "%v", tc)
	}
}

// TestObjectInfoRecorded: the file is from /object_info of a real server.
func TestObjectInfoRecorded(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/object_info_0.33.0.json")
	require.NoError(t, err)
	recorded, _ := parsed(t, data).(object)
	v := mustVersion(t, "0.33.0")
	require.Len(t, recorded, len(builtinClasses(v)))
	files := newFileStore()
	files.put(kindInput, "", "example.png", nil)
	for _, f := range recorded {
		require.Equal(t, string(pyJSON(f.value)), string(objectInfo(v, builtinClasses(v)[f.key], files)))
	}
}

func TestObjectInfoByVersion(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ release, class, want string }{
		{"0.3.40", "ImageBlend", `"blend_mode": [["normal", "multiply", "screen", "overlay", "soft_light", "difference"]]`},
		{"0.3.40", "ImageBlend", `"display_name": "Image Blend"`},
		{"0.3.61", "ImageBlend", `"display_name": null`},
		{"0.3.61", "ImageBlend", `"blend_mode": ["COMBO", {"multiselect": false, "options": ["normal"`},
		{"0.33.0", "ImageBlend", `"category": "image/filters"`},
		{"0.3.40", "PrimitiveInt", `"value": ["INT", {"min": -9223372036854775807, "max": 9223372036854775807, "control_after_generate": true}]`},
		{"0.33.0", "PrimitiveInt", `"control_after_generate": "fixed"`},
		{"0.3.56", "PrimitiveString", `"value": ["STRING", {}]`},
		{"0.3.57", "PrimitiveString", `"value": ["STRING", {"multiline": false}]`},
		{"0.27.0", "PrimitiveString", `"deprecated": true`},
		{"0.28.0", "PrimitiveString", `"deprecated": false`},
		{"0.25.0", "SaveImage", `"output": [], "output_is_list": [], "output_name": []`},
		{"0.26.0", "SaveImage", `"output": ["IMAGE"], "output_is_list": [false], "output_name": ["images"]`},
		{"0.3.64", "SaveImage", `"hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}`},
		{"0.8.0", "PrimitiveFloat", `"step": 0.1`},
		{"0.33.0", "LoadImage", `"image": [["a.png", "b.jpg"], {"image_upload": true}]`},
		{"0.33.0", "ImageScale", `"search_aliases": ["resize", "resize image", "scale image", "image resize", "zoom", "zoom in", "change size"], "essentials_category": "Image Tools"`},
	} {
		v := mustVersion(t, tc.release)
		files := newFileStore()
		for _, name := range []string{"b.jpg", "notes.txt", "a.png"} {
			files.put(kindInput, "", name, nil)
		}
		files.put(kindInput, "sub", "c.png", nil)
		info := string(objectInfo(v, builtinClasses(v)[tc.class], files))
		require.Contains(t, info, tc.want, "%s %s", tc.release, tc.class)
	}
}
