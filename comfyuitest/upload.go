package comfyuitest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"image"
	"image/color"
	"image/png"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
)

// form is a multipart body as aiohttp reads it.
type form struct {
	values map[string]string
	files  map[string]uploaded
}

type uploaded struct {
	filename string
	data     []byte
}

var (
	quotedFilename = regexp.MustCompile(`;\s*filename="((?:[^"\\]|\\.)*)"`)
	escaped        = regexp.MustCompile(`\\(.)`)
)

var errFormTooLarge = errors.New("multipart body exceeds the limit")

// readForm reads a multipart body. Any other body is an empty form. A part counts as a file if it has a filename.
func readForm(r *request, limit int64) (*form, error) {
	f := &form{values: map[string]string{}, files: map[string]uploaded{}}
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	switch {
	case err != nil:
		return f, nil //nolint:nilerr // as aiohttp: a body of another type holds no fields
	case kind == "application/x-www-form-urlencoded":
		fields, err := url.ParseQuery(string(r.body))
		for name, values := range fields {
			f.values[name] = values[0]
		}
		return f, err
	case kind != "multipart/form-data":
		return f, nil
	}
	reader := multipart.NewReader(bytes.NewReader(r.body), params["boundary"])
	total := int64(0)
	for {
		part, err := reader.NextRawPart()
		if errors.Is(err, io.EOF) {
			if total == 0 && !bytes.Contains(r.body, []byte("--"+params["boundary"]+"--")) {
				return nil, io.ErrUnexpectedEOF
			}
			return f, nil
		}
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(part)
		if err != nil {
			return nil, err
		}
		if total += int64(len(data)); total > limit && limit > 0 {
			return nil, errFormTooLarge
		}
		disposition := part.Header.Get("Content-Disposition")
		_, names, err := mime.ParseMediaType(disposition)
		if err != nil {
			return nil, err
		}
		if filename := names["filename"]; filename != "" {
			if quoted := quotedFilename.FindStringSubmatch(disposition); quoted != nil {
				// The mime package keeps a backslash that escapes nothing, aiohttp drops it.
				// It also takes slashes off the front.
				filename = escaped.ReplaceAllString(strings.TrimLeft(quoted[1], `\/`), "$1")
			}
			if _, again := f.files[names["name"]]; !again { // of several the server takes the first
				f.files[names["name"]] = uploaded{filename, data}
			}
		} else if _, again := f.values[names["name"]]; !again {
			f.values[names["name"]] = string(data)
		}
	}
}

func (p *process) postImage(r *request) *answer {
	return p.upload(r, func(_ *form, data []byte, to fileRef) bool {
		p.files.put(to.kind, to.subfolder, to.name, data)
		return true
	})
}

// upload stores the part image under a free name, unless the same content is there already or overwriting is asked for.
// save returns false where the server's code raises.
func (p *process) upload(r *request, save func(f *form, data []byte, to fileRef) bool) *answer {
	f, err := readForm(r, p.pod.config.maxUpload)
	switch {
	case errors.Is(err, errFormTooLarge):
		return tooLarge(p.pod.config.maxUpload)
	case err != nil:
		return troubleAnswer()
	}
	kind, given := f.values["type"]
	if !given {
		kind = kindInput
	}
	if !isKind(kind) {
		return troubleAnswer()
	}
	sent, isFile := f.files["image"]
	if !isFile {
		if f.values["image"] != "" {
			return troubleAnswer()
		}
		return emptyAnswer(http.StatusBadRequest)
	}
	subfolder := f.values["subfolder"]
	full := path.Join(subfolder, sent.filename)
	if isOutside(subfolder) || path.IsAbs(sent.filename) || isOutside(full) {
		return emptyAnswer(http.StatusBadRequest)
	}
	const longestName = 255 // bytes, on the usual file systems
	if base := path.Base(sent.filename); base == "." || len(base) > longestName {
		return troubleAnswer()
	}
	name, duplicate := sent.filename, false
	if overwrite := f.values["overwrite"]; overwrite != "true" && overwrite != "1" {
		name, duplicate = p.freeName(kind, subfolder, sent)
	}
	at := fileRef{kind, path.Dir(path.Join(subfolder, name)), path.Base(name)}
	if strings.Contains(name, "/") && len(p.files.list(kind, at.subfolder)) == 0 {
		return troubleAnswer() // the server makes the subfolder, but no folder that the name asks for
	}
	if !duplicate && !save(f, sent.data, at) {
		return troubleAnswer()
	}
	return jsonAnswer(object{{"name", name}, {"subfolder", subfolder}, {"type", kind}})
}

// freeName counts a name up until it is free, or until a file has the same content.
func (p *process) freeName(kind, subfolder string, sent uploaded) (name string, duplicate bool) {
	name = sent.filename
	for i := 1; ; i++ {
		at := path.Join(subfolder, name)
		there, exists := p.files.get(kind, path.Dir(at), path.Base(at))
		if !exists {
			return name, false
		}
		if bytes.Equal(there.data, sent.data) {
			return name, true
		}
		stem, ext := splitExt(sent.filename)
		name = stem + " (" + strconv.Itoa(i) + ")" + ext
	}
}

// splitExt is os.path.splitext: a name that only begins with dots has no extension.
func splitExt(name string) (stem, ext string) {
	ext = path.Ext(name)
	if strings.Trim(strings.TrimSuffix(path.Base(name), ext), ".") == "" {
		return name, ""
	}
	return strings.TrimSuffix(name, ext), ext
}

// postMask stores the original with the alpha channel of the mask. An original that is not there, or that may not be
// read, is no error: the answer is the same and nothing is saved.
func (p *process) postMask(r *request) *answer {
	return p.upload(r, func(f *form, mask []byte, to fileRef) bool {
		text, given := f.values["original_ref"]
		if !given {
			return false
		}
		v, err := parseJSON([]byte(text))
		ref, isObject := v.(object)
		if err != nil || !isObject {
			return false
		}
		filename, hasName := ref.get("filename")
		name, isText := filename.(string)
		if !hasName || !isText {
			return false
		}
		kind := textOf(ref, "type", kindOutput)
		from, refused := locate(name, kind, textOf(ref, "subfolder", ""))
		if refused != 0 {
			return true
		}
		at := path.Join(from.subfolder, from.name)
		original, there := p.files.get(from.kind, path.Dir(at), path.Base(at))
		if !there {
			return true
		}
		data, err := withAlpha(original.data, mask)
		if err != nil {
			return false
		}
		p.files.put(to.kind, to.subfolder, to.name, data)
		return true
	})
}

func textOf(o object, key, missing string) string {
	v, has := o.get(key)
	text, isText := v.(string)
	if !has || !isText {
		return missing
	}
	return text
}

var errMaskSize = errors.New("images do not match")

// withAlpha is the original picture with the mask's alpha channel, and with the texts of the original.
func withAlpha(original, mask []byte) ([]byte, error) {
	picture, _, err := image.Decode(bytes.NewReader(original))
	if err != nil {
		return nil, err
	}
	alpha, _, err := image.Decode(bytes.NewReader(mask))
	if err != nil {
		return nil, err
	}
	b, m := picture.Bounds(), alpha.Bounds()
	if b.Size() != m.Size() {
		return nil, errMaskSize
	}
	out := image.NewNRGBA(image.Rect(0, 0, b.Dx(), b.Dy()))
	for y := range b.Dy() {
		for x := range b.Dx() {
			c := color.NRGBAModel.Convert(picture.At(b.Min.X+x, b.Min.Y+y)).(color.NRGBA)
			_, _, _, a := alpha.At(m.Min.X+x, m.Min.Y+y).RGBA()
			c.A = uint8(a >> 8)
			out.SetNRGBA(x, y, c)
		}
	}
	return encodePNG(out, png.DefaultCompression, pngTextsOf(original))
}

// pngTextsOf reads the tEXt chunks of a PNG.
func pngTextsOf(data []byte) []textChunk {
	var texts []textChunk
	const signature = 8
	for at := signature; at+12 <= len(data); {
		length := int(binary.BigEndian.Uint32(data[at:]))
		if length < 0 || at+12+length > len(data) {
			break
		}
		if string(data[at+4:at+8]) == "tEXt" {
			if keyword, text, ok := bytes.Cut(data[at+8:at+8+length], []byte{0}); ok {
				texts = append(texts, textChunk{string(keyword), string(text)})
			}
		}
		at += 12 + length
	}
	return texts
}
