package comfyuitest

import (
	"bytes"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"mime"
	"net/http"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

func addFileRoutes(t *routeTable) {
	t.add(everywhere, "GET", "/view", (*process).getView)
	t.add(everywhere, "POST", "/upload/image", (*process).postImage)
	t.add(everywhere, "POST", "/upload/mask", (*process).postMask)
	t.add(everywhere, "GET", "/view_metadata/{folder}", func(*process, *request) *answer { return emptyAnswer(http.StatusNotFound) })
}

// fileRef is what a request says of a file: the kind is "" for a folder that the server does not have.
type fileRef struct{ kind, subfolder, name string }

// annotatedName splits "x.png [temp]" into the name and the kind; without a known suffix the kind is "".
func annotatedName(name string) (string, string) {
	for _, kind := range []string{kindOutput, kindInput, kindTemp} {
		if plain, found := strings.CutSuffix(name, "["+kind+"]"); found {
			// The server cuts one character more than the suffix: the space before it.
			if plain != "" {
				plain = plain[:len(plain)-1]
			}
			return plain, kind
		}
	}
	return name, ""
}

func isKind(kind string) bool { return kind == kindInput || kind == kindOutput || kind == kindTemp }

// locate checks a file's name and folder as /view and /upload/mask do: 0, or the status of the refusal.
func locate(filename, kind, subfolder string) (fileRef, int) {
	name, annotated := annotatedName(filename)
	switch {
	case name == "" || name[0] == '/' || strings.Contains(name, ".."):
		return fileRef{}, http.StatusBadRequest
	case annotated != "":
		kind = annotated
	case !isKind(kind):
		return fileRef{}, http.StatusBadRequest
	}
	if isOutside(subfolder) {
		return fileRef{}, http.StatusForbidden
	}
	return fileRef{kind, subfolder, name}, 0
}

// isOutside tells whether a subfolder leaves its folder.
func isOutside(subfolder string) bool {
	clean := path.Clean(subfolder)
	return path.IsAbs(subfolder) || clean == ".." || strings.HasPrefix(clean, "../")
}

func (p *process) getView(r *request) *answer {
	filename, given := r.param("filename")
	if !given {
		return emptyAnswer(http.StatusNotFound)
	}
	kind, given := r.param("type")
	if !given {
		kind = kindOutput
	}
	subfolder, _ := r.param("subfolder")
	ref, refused := locate(filename, kind, subfolder)
	if refused != 0 {
		return emptyAnswer(refused)
	}
	name := ref.name[strings.LastIndex(ref.name, "/")+1:]
	f, there := p.files.get(ref.kind, ref.subfolder, name)
	if !there {
		return emptyAnswer(http.StatusNotFound)
	}
	channel, _ := r.param("channel")
	if preview, asked := r.param("preview"); asked {
		return viewPreview(f, name, preview, channel)
	}
	switch channel {
	case "rgb":
		return viewRecoded(f, name, opaqueImage)
	case "a":
		return viewRecoded(f, name, alphaImage)
	default:
		return p.viewFile(r, f, name)
	}
}

func disposition(name string) http.Header {
	return http.Header{"Content-Disposition": {`filename="` + name + `"`}}
}

// viewPreview is the file as WebP or JPEG. What is no image is an exception in the handler.
func viewPreview(f file, name, preview, channel string) *answer {
	picture, _, err := image.Decode(bytes.NewReader(f.data))
	if err != nil {
		return troubleAnswer()
	}
	parts := strings.Split(preview, ";")
	format := parts[0]
	if format != "webp" && format != "jpeg" || strings.Contains(channel, "a") {
		format = "webp"
	}
	quality := 90
	if n, err := strconv.Atoi(parts[len(parts)-1]); err == nil && n >= 0 {
		quality = n
	}
	var buf bytes.Buffer
	if format == "jpeg" {
		if err := jpeg.Encode(&buf, opaqueImage(picture), &jpeg.Options{Quality: min(max(quality, 1), 100)}); err != nil {
			return troubleAnswer()
		}
	} else {
		if channel == "rgb" {
			picture = opaqueImage(picture)
		}
		data, err := encodeWebP(picture)
		if err != nil {
			return troubleAnswer()
		}
		buf.Write(data)
	}
	return &answer{kind: "image/" + format, body: buf.Bytes(), header: disposition(name)}
}

func viewRecoded(f file, name string, recode func(image.Image) image.Image) *answer {
	picture, _, err := image.Decode(bytes.NewReader(f.data))
	if err != nil {
		return troubleAnswer()
	}
	var buf bytes.Buffer
	if err := png.Encode(&buf, recode(picture)); err != nil {
		return troubleAnswer()
	}
	return &answer{kind: "image/png", body: buf.Bytes(), header: disposition(name)}
}

// opaqueImage drops the alpha channel and keeps the colours.
func opaqueImage(picture image.Image) image.Image {
	b := picture.Bounds()
	out := image.NewRGBA(image.Rect(0, 0, b.Dx(), b.Dy()))
	for y := range b.Dy() {
		for x := range b.Dx() {
			c := color.NRGBAModel.Convert(picture.At(b.Min.X+x, b.Min.Y+y)).(color.NRGBA)
			out.SetRGBA(x, y, color.RGBA{c.R, c.G, c.B, 255})
		}
	}
	return out
}

// alphaImage is black, with the alpha channel of the picture.
func alphaImage(picture image.Image) image.Image {
	b := picture.Bounds()
	out := image.NewNRGBA(image.Rect(0, 0, b.Dx(), b.Dy()))
	for y := range b.Dy() {
		for x := range b.Dx() {
			_, _, _, a := picture.At(b.Min.X+x, b.Min.Y+y).RGBA()
			out.SetNRGBA(x, y, color.NRGBA{A: uint8(a >> 8)})
		}
	}
	return out
}

// viewFile is the file as it is, with what aiohttp's FileResponse makes of conditions and ranges.
func (p *process) viewFile(r *request, f file, name string) *answer {
	kind := mimeType(name)
	a := &answer{header: disposition(name)}
	nosniff := p.version.atLeast(0, 28, 0)
	if nosniff {
		quoted := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(name)
		a.header = disposition(quoted)
		a.header.Set("X-Content-Type-Options", "nosniff")
		if isActive(kind) {
			a.header.Set("Vary", "Sec-Fetch-Dest")
			a.header.Set("Cache-Control", "no-store")
			if kind != "image/svg+xml" || r.Header.Get("Sec-Fetch-Dest") != "image" {
				kind = "application/octet-stream"
				a.header.Set("Content-Disposition", `attachment; filename="`+quoted+`"`)
			}
		}
	} else if isForcedDownload(kind) {
		kind = "application/octet-stream"
	}
	a.kind = kind
	fileResponse(r, f, a)
	return a
}

// mimeTypes are those that Python knows and Go may not, or knows otherwise.
var mimeTypes = map[string]string{
	".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
	".svg": "image/svg+xml", ".html": "text/html", ".htm": "text/html", ".css": "text/css", ".js": "text/javascript",
	".txt": "text/plain", ".json": "application/json", ".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime",
	".mp3": "audio/mpeg", ".wav": "audio/x-wav", ".ogg": "audio/ogg", ".bin": "application/octet-stream", ".xml": "text/xml",
	".glb": "model/gltf-binary", ".gltf": "model/gltf+json", ".flac": "audio/flac", ".opus": "audio/opus",
	".csv": "text/csv", ".zip": "application/zip", ".bmp": "image/bmp", ".tiff": "image/tiff", ".md": "text/markdown",
	".pdf": "application/pdf", ".avi": "video/x-msvideo", ".mhtml": "message/rfc822",
}

func mimeType(name string) string {
	ext := strings.ToLower(path.Ext(name))
	if kind, known := mimeTypes[ext]; known {
		return kind
	}
	kind, _, _ := strings.Cut(mime.TypeByExtension(ext), ";")
	if kind == "" {
		return "application/octet-stream"
	}
	return kind
}

func isForcedDownload(kind string) bool {
	return slices.Contains([]string{"text/html", "text/html-sandboxed", "application/xhtml+xml", "text/javascript", "text/css"}, kind)
}

// isActive tells whether a browser might run what is in the file.
func isActive(kind string) bool {
	return isForcedDownload(kind) || strings.HasSuffix(kind, "+xml") || strings.HasSuffix(kind, "/xml") ||
		slices.Contains([]string{"application/javascript", "application/x-javascript", "application/ecmascript", "message/rfc822"}, kind)
}

// fileResponse answers with a file: conditions first, then If-Range, of which only a date counts, then one range.
func fileResponse(r *request, f file, a *answer) {
	etag, modified := f.etag(), f.modified.Truncate(time.Second)
	switch {
	case r.Header.Get("If-Match") != "" && !etagIn(r.Header.Get("If-Match"), etag),
		r.Header.Get("If-Match") == "" && modifiedAfter(modified, r.Header.Get("If-Unmodified-Since")):
		a.status = http.StatusPreconditionFailed
		return
	case r.Header.Get("If-None-Match") != "" && etagIn(r.Header.Get("If-None-Match"), etag),
		r.Header.Get("If-None-Match") == "" && notModifiedSince(modified, r.Header.Get("If-Modified-Since")):
		a.status = http.StatusNotModified
		setValidators(a, f)
		return
	}
	header := r.Header.Get("Range")
	if since, err := http.ParseTime(r.Header.Get("If-Range")); err == nil && modified.After(since) {
		header = ""
	}
	start, end := 0, len(f.data)
	if header != "" {
		var ok bool
		if start, end, ok = parseRange(header, len(f.data)); !ok {
			a.status = http.StatusRequestedRangeNotSatisfiable
			a.header.Set("Content-Range", "bytes */"+strconv.Itoa(len(f.data)))
			a.chunked = true
			return
		}
		a.status = http.StatusPartialContent
		a.header.Set("Content-Range", "bytes "+strconv.Itoa(start)+"-"+strconv.Itoa(end-1)+"/"+strconv.Itoa(len(f.data)))
	}
	setValidators(a, f)
	a.header.Set("Accept-Ranges", "bytes")
	a.body = f.data[start:end]
}

func setValidators(a *answer, f file) {
	a.header.Set("Etag", f.etag())
	a.header.Set("Last-Modified", f.modified.UTC().Format(http.TimeFormat))
}

func etagIn(header, etag string) bool {
	for part := range strings.SplitSeq(header, ",") {
		if part = strings.TrimPrefix(strings.TrimSpace(part), "W/"); part == etag || part == "*" {
			return true
		}
	}
	return false
}

func modifiedAfter(modified time.Time, header string) bool {
	since, err := http.ParseTime(header)
	return err == nil && modified.After(since)
}

func notModifiedSince(modified time.Time, header string) bool {
	since, err := http.ParseTime(header)
	return err == nil && !modified.After(since)
}

var rangePattern = regexp.MustCompile(`(?i)^bytes=(\d*)-(\d*)$`)

// parseRange reads one range; several, an unknown unit or one outside the file are refused.
func parseRange(header string, size int) (start, end int, ok bool) {
	m := rangePattern.FindStringSubmatch(header)
	if m == nil || m[1] == "" && m[2] == "" {
		return 0, 0, false
	}
	first, errFirst := strconv.Atoi(m[1])
	last, errLast := strconv.Atoi(m[2])
	switch {
	case m[1] == "":
		if errLast != nil {
			return 0, 0, false
		}
		if last == 0 {
			return 0, size, size > 0 // -0 is 0 in Python: the slice is the whole
		}
		return max(size-last, 0), size, size > 0
	case errFirst != nil || first >= size:
		return 0, 0, false
	case m[2] == "":
		return first, size, true
	case errLast != nil || last < first:
		return 0, 0, false
	default:
		return first, min(last+1, size), true
	}
}
