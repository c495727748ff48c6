package comfyuitest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"image"
	"net/http"
	"slices"
	"strings"
)

// unrecorded are the headers that the recorder left out.
var unrecorded = []string{"Date", "Server"}

func (r *replay) compareHeaders(wanted string, resp *http.Response, line capture) {
	got := map[string]string{}
	for name, values := range resp.Header {
		if !slices.Contains(unrecorded, name) {
			got[name] = strings.Join(values, ", ")
		}
	}
	if resp.Close && resp.StatusCode != http.StatusSwitchingProtocols {
		got["Connection"] = "close" // net/http takes it out
	}
	if len(resp.TransferEncoding) > 0 {
		got["Transfer-Encoding"] = strings.Join(resp.TransferEncoding, ", ")
	}
	if line.Kind == "ws-open" {
		delete(got, "Upgrade")
		delete(got, "Sec-Websocket-Accept")
	}
	for name, want := range line.Headers {
		canonical := http.CanonicalHeaderKey(name)
		value, ok := got[canonical]
		delete(got, canonical)
		switch {
		case !ok && resp.StatusCode == http.StatusNotModified && canonical == "Content-Type":
			// net/http never sends it.
		case !ok:
			r.fail("%s: header %s is missing, want %q", wanted, name, want)
		case canonical == "Content-Length":
			// The length of what is compared apart from it.
		case !r.same(value, want):
			r.fail("%s: header %s is %q, want %q", wanted, name, value, want)
		}
	}
	for name, value := range got {
		r.fail("%s: header %s: %q, the server sent none", wanted, name, value)
	}
}

func (r *replay) same(got, want string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.differ.renames.same(got, want)
}

func (r *replay) compareBody(wanted string, resp *http.Response, data []byte, line capture) {
	kind := resp.Header.Get("Content-Type")
	path, _, _ := strings.Cut(line.Path, "?")
	switch {
	case line.Cut != "" || slices.Contains(ownWords, path):
		r.compareKind(wanted, data, line)
	case line.BodyBase64 != nil:
		r.compareBytes(wanted, kind, data, line.BodyBase64)
	case line.BodyText != nil:
		r.compareJSON(wanted, data, []byte(*line.BodyText))
	case strings.HasPrefix(kind, "application/json"):
		r.compareJSON(wanted, data, line.Body)
	default:
		var text string
		if err := json.Unmarshal(line.Body, &text); err != nil {
			r.fail("%s: got text, want %s", wanted, short(line.Body))
			return
		}
		if string(data) != text {
			r.fail("%s: got %q, want %q", wanted, short(data), short([]byte(text)))
		}
	}
}

// ownWords are the answers that say what an installation consists of: the pod has another.
var ownWords = []string{"/", "/extensions", "/internal/folder_paths", "/internal/files/output", "/internal/logs/raw"}

// compareKind holds an answer of ownWords, or one that was cut, against the recorded one: it is of the same kind, and not empty.
func (r *replay) compareKind(wanted string, data []byte, line capture) {
	got, err := parseJSON(data)
	want, wantErr := parseJSON(line.Body)
	_, isPage := want.(string)
	if len(data) == 0 || wantErr != nil || !isPage && (err != nil || typeName(got) != typeName(want)) {
		r.fail("%s: got %s, want something like %s", wanted, short(data), short(line.Body))
	}
}

func (r *replay) compareJSON(wanted string, got, want []byte) {
	a, err := parseJSON(got)
	if err != nil {
		r.fail("%s: got %s: %v", wanted, short(got), err)
		return
	}
	b, err := parseJSON(want)
	if err != nil {
		r.fail("%s: the recording: %s: %v", wanted, short(want), err)
		return
	}
	r.mu.Lock()
	if r.peculiar.ended {
		b = r.sameRemaining(a, b)
	}
	r.differ.found = nil
	r.differ.compare("", a, b)
	found := r.differ.found
	r.mu.Unlock()
	for i, difference := range found {
		if i == 3 {
			break
		}
		r.fail("%s: %s", wanted, difference)
	}
}

// sameRemaining makes nothing of queue_remaining in the first answer after a freeze: whether the job has ended by then is
// chance, and the recordings have both.
func (r *replay) sameRemaining(got, want any) any {
	answer, _ := want.(object)
	if _, is := answer.get("exec_info"); is && (r.differ.matches("", got, execInfoOf(0)) || r.differ.matches("", got, execInfoOf(1))) {
		return got
	}
	return want
}

func execInfoOf(remaining int64) object {
	return object{{"exec_info", object{{"queue_remaining", remaining}}}}
}

// compareBytes: pictures that the pod itself makes are compressed by another library, so what they show is compared.
func (r *replay) compareBytes(wanted, kind string, got, want []byte) {
	if bytes.Equal(got, want) {
		return
	}
	switch kind {
	case "image/png", "image/gif", "image/jpeg":
		r.comparePictures(wanted, kind, got, want)
	case "image/webp":
		if len(got) < 12 || string(got[:4]) != "RIFF" || string(got[8:12]) != "WEBP" {
			r.fail("%s: %x is no WebP", wanted, got[:min(len(got), 16)])
		}
	default:
		r.fail("%s: got %d bytes %x, want %d bytes %x", wanted, len(got), got[:min(len(got), 32)], len(want), want[:min(len(want), 32)])
	}
}

func (r *replay) comparePictures(wanted, kind string, got, want []byte) {
	a, _, err := image.Decode(bytes.NewReader(got))
	if err != nil {
		r.fail("%s: %v", wanted, err)
		return
	}
	b, _, err := image.Decode(bytes.NewReader(want))
	if err != nil {
		r.fail("%s: the recording: %v", wanted, err)
		return
	}
	if a.Bounds() != b.Bounds() {
		r.fail("%s: a picture of %v, want %v", wanted, a.Bounds(), b.Bounds())
		return
	}
	if kind == "image/jpeg" {
		return // lossy
	}
	for y := a.Bounds().Min.Y; y < a.Bounds().Max.Y; y++ {
		for x := a.Bounds().Min.X; x < a.Bounds().Max.X; x++ {
			if nrgbaAt(a, x, y) != nrgbaAt(b, x, y) {
				r.fail("%s: pixel %d,%d is %v, want %v", wanted, x, y, nrgbaAt(a, x, y), nrgbaAt(b, x, y))
				return
			}
		}
	}
	texts, wantedTexts := pngTextsOf(got), pngTextsOf(want)
	if len(texts) != len(wantedTexts) {
		r.fail("%s: texts %v, want %v", wanted, texts, wantedTexts)
		return
	}
	for i, text := range wantedTexts {
		if texts[i].keyword != text.keyword || !r.same(texts[i].text, text.text) {
			r.fail("%s: text %v, want %v", wanted, texts[i], text)
		}
	}
}

// compareBinary holds a binary frame against the recorded one, or against its beginning. Images are those of the run.
func (r *replay) compareBinary(wanted string, got []byte, want capture) {
	data := want.Binary
	if data == nil {
		data = want.BinaryPrefix
	}
	if len(got) < 8 || len(data) < 8 || !bytes.Equal(got[:4], data[:4]) {
		r.fail("%s: got %x, want %x", wanted, got[:min(len(got), 16)], data[:min(len(data), 16)])
		return
	}
	switch binary.BigEndian.Uint32(got) {
	case 1:
		if !bytes.Equal(got[4:8], data[4:8]) || !samePicture(got[8:], data[8:]) {
			r.fail("%s: got %x, want %x", wanted, got[:min(len(got), 24)], data[:min(len(data), 24)])
		}
	case 4:
		meta, picture := withMetadata(got)
		if want.Binary == nil {
			return // its beginning ends within the metadata
		}
		wantedMeta, wantedPicture := withMetadata(data)
		r.compareJSON(wanted, meta, wantedMeta)
		if !samePicture(picture, wantedPicture) {
			r.fail("%s: got a picture %x, want %x", wanted, picture[:min(len(picture), 8)], wantedPicture[:min(len(wantedPicture), 8)])
		}
	default:
		if want.Binary != nil && !bytes.Equal(got, data) || want.Binary == nil && len(got) != want.BinaryLength {
			r.fail("%s: got %x, want %x", wanted, short(got), short(data))
		}
	}
}

// withMetadata splits a frame of type 4.
func withMetadata(frame []byte) (meta, picture []byte) {
	length := int(binary.BigEndian.Uint32(frame[4:]))
	if length > len(frame)-8 {
		return nil, nil
	}
	return frame[8 : 8+length], frame[8+length:]
}

// samePicture tells whether both are of one format, by its first bytes.
func samePicture(got, want []byte) bool {
	return len(got) >= 4 && len(want) >= 4 && bytes.Equal(got[:3], want[:3])
}
