package comfyuitest

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// testPNG is a small picture with an alpha channel, and a text.
func testPNG(t *testing.T) []byte {
	t.Helper()
	img := image.NewNRGBA(image.Rect(0, 0, 4, 3))
	for y := range 3 {
		for x := range 4 {
			img.SetNRGBA(x, y, color.NRGBA{uint8(60 * x), uint8(80 * y), 30, uint8(50 + 50*x)})
		}
	}
	data, err := encodePNG(img, png.BestSpeed, []textChunk{{"prompt", "the graph"}})
	require.NoError(t, err)
	return data
}

func view(t *testing.T, p *Pod, query string, header ...string) reply {
	t.Helper()
	h := http.Header{}
	for i := 0; i+1 < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	r, err := send(p, http.MethodGet, "/view?"+query, "", h)
	require.NoError(t, err)
	return r
}

func TestView(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		data := testPNG(t)
		p.files.put(kindOutput, "", "x.png", data)
		p.files.put(kindOutput, "a/b", "y.bin", []byte("0123456789"))
		f, _ := p.files.get(kindOutput, "", "x.png")

		r := view(t, p, "filename=x.png")
		require.Equal(t, http.StatusOK, r.status)
		require.Equal(t, data, r.body)
		require.Equal(t, "image/png", r.header.Get("Content-Type"))
		require.Equal(t, `filename="x.png"`, r.header.Get("Content-Disposition"))
		require.Equal(t, f.etag(), r.header.Get("Etag"))
		require.Equal(t, "Sat, 01 Jan 2000 00:00:00 GMT", r.header.Get("Last-Modified"), "the bubble's time")
		require.Equal(t, "bytes", r.header.Get("Accept-Ranges"))
		require.Equal(t, "nosniff", r.header.Get("X-Content-Type-Options"))

		for query, want := range map[string]int{
			"":                                          404,
			"filename=":                                 400,
			"filename=../x.png":                         400,
			"filename=/etc/passwd":                      400,
			"filename=a..b":                             400,
			"filename=x.png&type=bogus":                 400,
			"filename=x.png&subfolder=..":               403,
			"filename=x.png&subfolder=/etc":             403,
			"filename=x.png&subfolder=a/../..":          403,
			"filename=x.png/":                           404,
			"filename=nope.png":                         404,
			"filename=x.png&type=temp":                  404,
			"filename=x.png&subfolder=nope":             404,
			"filename=.":                                404,
			"filename=a%00b.png":                        404,
			"filename=anything/x.png":                   200,
			"filename=x.png&subfolder=a/..":             200,
			"filename=y.bin&subfolder=a/b":              200,
			"filename=x.png%20%5Boutput%5D":             200,
			"filename=x.png%20%5Binput%5D":              404,
			"filename=y.bin&subfolder=a/b&preview=webp": 500,
			"filename=y.bin&subfolder=a/b&channel=rgb":  500,
		} {
			r := view(t, p, query)
			require.Equal(t, want, r.status, query)
			if want == 404 || want == 400 || want == 403 {
				require.Empty(t, r.body, query)
				require.Empty(t, r.header.Values("Content-Type"), query)
			}
		}
		head := do(t, p, http.MethodHead, "/api/view?filename=y.bin&subfolder=a/b", "")
		require.Equal(t, "10", head.header.Get("Content-Length"))
		require.Empty(t, head.body)
	})
}

func TestViewRanges(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.files.put(kindTemp, "", "y.bin", []byte("0123456789"))
		f, _ := p.files.get(kindTemp, "", "y.bin")
		now := f.modified.UTC().Format(http.TimeFormat)
		past := f.modified.Add(-time.Hour).UTC().Format(http.TimeFormat)
		for _, c := range []struct {
			header       []string
			status       int
			body, ranged string
		}{
			{[]string{"Range", "bytes=0-3"}, 206, "0123", "bytes 0-3/10"},
			{[]string{"Range", "bytes=8-"}, 206, "89", "bytes 8-9/10"},
			{[]string{"Range", "bytes=-4"}, 206, "6789", "bytes 6-9/10"},
			{[]string{"Range", "bytes=-40"}, 206, "0123456789", "bytes 0-9/10"},
			{[]string{"Range", "bytes=5-100"}, 206, "56789", "bytes 5-9/10"},
			{[]string{"Range", "bytes=10-"}, 416, "", "bytes */10"},
			{[]string{"Range", "bytes=5-2"}, 416, "", "bytes */10"},
			{[]string{"Range", "bytes=0-3,6-9"}, 416, "", "bytes */10"},
			{[]string{"Range", "items=0-3"}, 416, "", "bytes */10"},
			{[]string{"Range", "bytes=-0"}, 206, "0123456789", "bytes 0-9/10"},
			{[]string{"Range", "Bytes=0-3"}, 206, "0123", "bytes 0-3/10"},
			{[]string{"Range", "bytes=-"}, 416, "", "bytes */10"},
			{[]string{"Range", "bytes=0-3", "If-Range", f.etag()}, 206, "0123", "bytes 0-3/10"},
			{[]string{"Range", "bytes=0-3", "If-Range", `"other"`}, 206, "0123", "bytes 0-3/10"},
			{[]string{"Range", "bytes=0-3", "If-Range", now}, 206, "0123", "bytes 0-3/10"},
			{[]string{"Range", "bytes=0-3", "If-Range", past}, 200, "0123456789", ""},
			{[]string{"If-None-Match", f.etag()}, 304, "", ""},
			{[]string{"If-None-Match", `"a", *`}, 304, "", ""},
			{[]string{"If-None-Match", `"other"`, "If-Modified-Since", now}, 200, "0123456789", ""},
			{[]string{"If-Modified-Since", now}, 304, "", ""},
			{[]string{"If-Modified-Since", past}, 200, "0123456789", ""},
			{[]string{"If-Match", `"other"`}, 412, "", ""},
			{[]string{"If-Match", f.etag()}, 200, "0123456789", ""},
			{[]string{"If-Unmodified-Since", past}, 412, "", ""},
		} {
			r := view(t, p, "filename=y.bin&type=temp", c.header...)
			require.Equal(t, c.status, r.status, "%v", c.header)
			require.Equal(t, c.body, string(r.body), "%v", c.header)
			require.Equal(t, c.ranged, r.header.Get("Content-Range"), "%v", c.header)
		}
	})
}

func TestViewRecodes(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.files.put(kindOutput, "", "x.png", testPNG(t))
		for _, query := range []string{"preview=webp;90", "preview=webp", "preview=bmp", "preview=jpeg;90&channel=a"} {
			r := view(t, p, "filename=x.png&"+query, "Range", "bytes=0-3")
			require.Equal(t, http.StatusOK, r.status, "no ranges")
			require.Equal(t, "image/webp", r.header.Get("Content-Type"))
			require.Empty(t, r.header.Get("Etag"))
			require.Equal(t, "WEBPVP8L", string(r.body[8:16]))
		}
		r := view(t, p, "filename=x.png&preview=jpeg;50")
		require.Equal(t, "image/jpeg", r.header.Get("Content-Type"))
		small, err := jpeg.Decode(bytes.NewReader(r.body))
		require.NoError(t, err)
		require.Equal(t, image.Pt(4, 3), small.Bounds().Size())

		r = view(t, p, "filename=x.png&channel=rgb")
		img, err := png.Decode(bytes.NewReader(r.body))
		require.NoError(t, err)
		require.Equal(t, color.RGBA{120, 80, 30, 255}, color.RGBAModel.Convert(img.At(2, 1)), "the colour stays, the alpha goes")
		r = view(t, p, "filename=x.png&channel=a")
		img, err = png.Decode(bytes.NewReader(r.body))
		require.NoError(t, err)
		require.Equal(t, color.NRGBA{0, 0, 0, 150}, color.NRGBAModel.Convert(img.At(2, 1)))
		require.Equal(t, testPNG(t), view(t, p, "filename=x.png&channel=rgba").body)
	})
}

// webpGolden was read pixel by pixel with Pillow.
const webpGolden = "UklGRrIAAABXRUJQVlA4TKYAAAAvAQAAEIBAAAAA4v////////////////////////////////////////8fAAAAAgEAAIj/////////////////////////" +
	"////////////////fwgEAAAg/v////////////////////////////////////////8hEAAAgPj/////////////////////////////////////////DyBAYJCAfwEC"

func TestWebP(t *testing.T) {
	t.Parallel()
	img := image.NewNRGBA(image.Rect(0, 0, 2, 1))
	img.SetNRGBA(0, 0, color.NRGBA{1, 2, 3, 4})
	img.SetNRGBA(1, 0, color.NRGBA{255, 128, 64, 32})
	data, err := encodeWebP(img)
	require.NoError(t, err)
	require.Equal(t, len(data)-8, int(binary.LittleEndian.Uint32(data[4:])))
	require.Equal(t, int64(2), int64(data[21]&0x3f)+1, "the width")
	_, err = encodeWebP(image.NewNRGBA(image.Rect(0, 0, 0, 1)))
	require.Error(t, err)
	require.Equal(t, webpGolden, base64.StdEncoding.EncodeToString(data))
}

func TestActiveFiles(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ version, name, kind, disposition string }{
		{"0.27.0", "p.html", "application/octet-stream", `filename="p.html"`},
		{"0.27.0", "p.svg", "image/svg+xml", `filename="p.svg"`},
		{"0.27.0", `a"b.txt`, "text/plain", `filename="a"b.txt"`},
		{"0.33.0", "p.html", "application/octet-stream", `attachment; filename="p.html"`},
		{"0.33.0", "p.svg", "application/octet-stream", `attachment; filename="p.svg"`},
		{"0.33.0", `a"b.txt`, "text/plain", `filename="a\"b.txt"`},
		{"0.33.0", "p.unknownext", "application/octet-stream", `filename="p.unknownext"`},
	} {
		bubble(t, func(t *testing.T, p *Pod) {
			p.files.put(kindOutput, "", c.name, []byte("x"))
			r := view(t, p, "filename="+strings.ReplaceAll(c.name, `"`, "%22"))
			require.Equal(t, c.kind, r.header.Get("Content-Type"))
			require.Equal(t, c.disposition, r.header.Get("Content-Disposition"))
			if c.name == "p.svg" {
				r = view(t, p, "filename=p.svg", "Sec-Fetch-Dest", "image")
				require.Equal(t, "image/svg+xml", r.header.Get("Content-Type"))
			}
		}, WithVersion(c.version))
	}
}

// formPart is one part of a multipart body; the filename "-" stands for none.
type formPart struct{ name, filename, value string }

func upload(t *testing.T, p *Pod, path string, parts ...formPart) reply {
	t.Helper()
	var body bytes.Buffer
	w := multipart.NewWriter(&body)
	for _, part := range parts {
		header := textproto.MIMEHeader{}
		disposition := `form-data; name="` + part.name + `"`
		if part.filename != "-" {
			disposition += `; filename="` + part.filename + `"`
		}
		header.Set("Content-Disposition", disposition)
		field, err := w.CreatePart(header)
		require.NoError(t, err)
		_, err = field.Write([]byte(part.value))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	r, err := send(p, http.MethodPost, path, body.String(), http.Header{"Content-Type": {w.FormDataContentType()}})
	require.NoError(t, err)
	return r
}

func TestUploadImage(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		img := func(filename, data string) formPart { return formPart{"image", filename, data} }
		field := func(name, value string) formPart { return formPart{name, "-", value} }
		for _, c := range []struct {
			parts  []formPart
			status int
			answer string
		}{
			{[]formPart{img("x.png", "one")}, 200, `{"name": "x.png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("x.png", "one")}, 200, `{"name": "x.png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("x.png", "two")}, 200, `{"name": "x (1).png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("x.png", "two")}, 200, `{"name": "x (1).png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("x.png", "three")}, 200, `{"name": "x (2).png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("x.png", "four"), field("overwrite", "true")}, 200, `{"name": "x.png", "subfolder": "", "type": "input"}`},
			{[]formPart{field("overwrite", "1"), img("x.png", "five")}, 200, `{"name": "x.png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("x.png", "six"), field("overwrite", "yes")}, 200, `{"name": "x (3).png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("x.png", "a"), field("subfolder", "a/b"), field("type", "temp")}, 200, `{"name": "x.png", "subfolder": "a/b", "type": "temp"}`},
			{[]formPart{img("a/x.png", "a"), field("type", "temp")}, 500, ""},
			{[]formPart{img("a/b/x.png", "b"), field("type", "temp"), field("overwrite", "1")}, 200, `{"name": "a/b/x.png", "subfolder": "", "type": "temp"}`},
			{[]formPart{img(".png", "b")}, 200, `{"name": ".png", "subfolder": "", "type": "input"}`},
			{[]formPart{img(".png", "c")}, 200, `{"name": ".png (1)", "subfolder": "", "type": "input"}`},
			{[]formPart{img("clip.mp4", "v"), field("type", "output")}, 200, `{"name": "clip.mp4", "subfolder": "", "type": "output"}`},
			{[]formPart{img("x.png", "a"), field("subfolder", "../..")}, 400, ""},
			{[]formPart{img("x.png", "a"), field("subfolder", "/etc")}, 400, ""},
			{[]formPart{img("../x.png", "a")}, 400, ""},
			{[]formPart{img("/slash.png", "a")}, 200, `{"name": "slash.png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("/etc/x.png", "a")}, 500, ""}, // as etc/x.png, and there is no folder etc
			{[]formPart{img(".", "a")}, 500, ""},
			{[]formPart{img("x.png/", "five")}, 200, `{"name": "x.png/", "subfolder": "", "type": "input"}`},
			{[]formPart{img("x.png/", "a")}, 500, ""}, // it would be x.png/ (1)
			{[]formPart{img(strings.Repeat("n", 251)+".png", "a")}, 200, `{"name": "` + strings.Repeat("n", 251) + `.png", "subfolder": "", "type": "input"}`},
			{[]formPart{img(strings.Repeat("n", 252)+".png", "a")}, 500, ""},
			{[]formPart{img("first.png", "a"), img("second.png", "b")}, 200, `{"name": "first.png", "subfolder": "", "type": "input"}`},
			{[]formPart{img("y.png", "a"), field("type", "temp"), field("type", "output")}, 200, `{"name": "y.png", "subfolder": "", "type": "temp"}`},
			{[]formPart{field("type", "input")}, 400, ""},
			{[]formPart{img("x.png", "a"), field("type", "bogus")}, 500, ""},
			{[]formPart{field("image", "no file")}, 500, ""},
			{[]formPart{img("", "no name")}, 500, ""},
			{[]formPart{img(`b\s.png`, "x")}, 200, `{"name": "bs.png", "subfolder": "", "type": "input"}`},
		} {
			r := upload(t, p, "/upload/image", c.parts...)
			require.Equal(t, c.status, r.status, "%v", c.parts)
			switch c.status {
			case 200:
				require.Equal(t, c.answer, string(r.body), "%v", c.parts)
			case 400:
				require.Empty(t, r.body)
			}
		}
		require.Equal(t, http.StatusBadRequest, do(t, p, http.MethodPost, "/upload/image", `{}`).status)
		require.Equal(t, "five", string(view(t, p, "filename=x.png&type=input").body))
		require.Equal(t, "two", string(view(t, p, "filename=x%20(1).png&type=input").body))
		require.Equal(t, "b", string(view(t, p, "filename=x.png&type=temp&subfolder=a/b").body))
	})
}

func TestUploadLimit(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		big := strings.Repeat("x", 1000)
		r := upload(t, p, "/upload/image", formPart{"image", "x", big[:999]})
		require.Equal(t, http.StatusOK, r.status)
		r = upload(t, p, "/upload/image", formPart{"image", "y", big + "x"})
		require.Equal(t, http.StatusRequestEntityTooLarge, r.status)
		require.Equal(t, "Maximum request body size 1000 exceeded.", string(r.body))
		r = do(t, p, http.MethodPost, "/prompt", `{"prompt": "`+big+`"}`)
		require.Equal(t, http.StatusRequestEntityTooLarge, r.status)
		require.Equal(t, "text/plain; charset=utf-8", r.header.Get("Content-Type"))
		require.Contains(t, string(do(t, p, http.MethodGet, "/features", "").body), `"max_upload_size": 1000.0`)
	}, WithMaxUpload(1000))
}

func TestUploadMask(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.files.put(kindInput, "", "o.png", testPNG(t))
		p.files.put(kindInput, "", "o.txt", []byte("no picture"))
		mask := image.NewNRGBA(image.Rect(0, 0, 4, 3))
		mask.SetNRGBA(2, 1, color.NRGBA{A: 77})
		data, err := encodePNG(mask, png.BestSpeed, nil)
		require.NoError(t, err)
		send := func(name, ref string) reply {
			parts := []formPart{{"image", name, string(data)}, {"subfolder", "-", "clipspace"}}
			if ref != "" {
				parts = append(parts, formPart{"original_ref", "-", ref})
			}
			return upload(t, p, "/upload/mask", parts...)
		}
		r := send("m.png", `{"filename": "o.png", "type": "input"}`)
		require.Equal(t, `{"name": "m.png", "subfolder": "clipspace", "type": "input"}`, string(r.body))
		saved := view(t, p, "filename=m.png&type=input&subfolder=clipspace")
		img, err := png.Decode(bytes.NewReader(saved.body))
		require.NoError(t, err)
		require.Equal(t, color.NRGBA{120, 80, 30, 77}, color.NRGBAModel.Convert(img.At(2, 1)), "the original's colours, the mask's alpha")
		require.Equal(t, []textChunk{{"prompt", "the graph"}}, pngTextsOf(saved.body))

		for name, ref := range map[string]string{
			"missing.png": `{"filename": "nope.png"}`, "outside.png": `{"filename": "../o.png"}`, "kind.png": `{"filename": "o.png", "type": "bogus"}`,
		} {
			require.Equal(t, http.StatusOK, send(name, ref).status, "nothing is saved, and nobody is told")
			require.Equal(t, http.StatusNotFound, view(t, p, "filename="+name+"&type=input&subfolder=clipspace").status)
		}
		for _, ref := range []string{"", "{", "[]", "{}", `{"filename": "o.txt", "type": "input"}`} {
			require.Equal(t, http.StatusInternalServerError, send("bad.png", ref).status, ref)
		}
	})
}

func TestUploadedImageIsAChoiceAtOnce(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		graph := graphOf("1", "LoadImage", object{{"image", "new.png"}}, "2", "PreviewImage", object{{"images", []any{"1", 0}}})
		require.Equal(t, http.StatusBadRequest, submit(t, p, graph, "", "").status)
		require.Equal(t, http.StatusOK, upload(t, p, "/upload/image", formPart{"image", "new.png", string(testPNG(t))}).status)
		id := queue1(t, p, graph, "")
		require.NoError(t, p.WaitIdle(t.Context()))
		synctest.Wait()
		entry := at(t, get(t, p, "/history/"+id), id, "outputs", "2", "images", 0)
		require.Equal(t, "temp", at(t, entry, "type"))
		require.Contains(t, string(do(t, p, http.MethodGet, "/object_info/LoadImage", "").body), `"new.png"`)
	})
}

// FuzzRange: whatever a Range header says, what is sent lies inside the file.
func FuzzRange(f *testing.F) {
	for _, seed := range []string{"bytes=0-3", "bytes=-4", "bytes=5-", "bytes=99999999999999999999-", "items=0-1", ""} {
		f.Add(seed, 10)
	}
	f.Fuzz(func(t *testing.T, header string, size int) {
		size &= 0xffff
		start, end, ok := parseRange(header, size)
		if ok {
			require.True(t, 0 <= start && start < end && end <= size, "%q of %d: %d to %d", header, size, start, end)
		}
	})
}
