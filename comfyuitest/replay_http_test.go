package comfyuitest

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"regexp"
	"strconv"
	"strings"
)

// replayRequest is a request under way.
type replayRequest struct {
	line capture
	done chan struct{}
}

func (r *replay) request(i int, line capture) {
	ctx := context.Background()
	if strings.HasPrefix(line.Error, "TimeoutError") {
		timed, cancel := context.WithTimeout(ctx, seconds(line.Took))
		defer cancel()
		ctx = timed
	}
	body, contentType := r.requestBody(line)
	path := r.differ.renames.actual(line.Path)
	r.learn(line.Path)
	req, err := http.NewRequestWithContext(ctx, line.Method, r.pod.URL()+path, body)
	if err != nil {
		r.fail("%s %s: %v", line.Method, line.Path, err)
		return
	}
	req.URL.Path, req.URL.RawPath, req.URL.RawQuery = "", "", ""
	req.URL.Opaque = path // as it was written, with its odd escapes
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	for name, value := range line.RequestHeaders {
		req.Header.Set(name, r.differ.renames.actual(value))
	}
	if line.RequestHeaders["Accept-Encoding"] == "" {
		req.Header.Set("Accept-Encoding", "identity")
		if strings.Contains(line.Headers["Content-Encoding"], "deflate") {
			req.Header.Set("Accept-Encoding", "gzip, deflate") // the recorded client's own
		}
	}
	resp, err := r.client.Do(req)
	wanted := fmt.Sprintf("%s %s (recorded at %.4fs)", line.Method, line.Path, line.T)
	switch {
	case err != nil && line.Status == 0:
		return
	case err != nil:
		r.fail("%s: %v, want %d", wanted, err, line.Status)
		return
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		r.compareHeaders(wanted, resp, line)
		return
	}
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		r.fail("%s: %v", wanted, err)
		return
	}
	if resp.StatusCode != line.Status {
		r.fail("%s: got %d %s, want %d %s", wanted, resp.StatusCode, short(data), line.Status, short(line.Body))
		return
	}
	r.compareHeaders(wanted, resp, line)
	data, err = decompressed(resp, data)
	if err != nil {
		r.fail("%s: %v", wanted, err)
		return
	}
	r.compareBody(wanted, resp, data, line)
}

func decompressed(resp *http.Response, data []byte) ([]byte, error) {
	var reader io.Reader
	var err error
	switch resp.Header.Get("Content-Encoding") {
	case "gzip":
		reader, err = gzip.NewReader(bytes.NewReader(data))
	case "deflate":
		reader, err = zlib.NewReader(bytes.NewReader(data))
	default:
		return data, nil
	}
	if err != nil {
		return nil, err
	}
	return io.ReadAll(reader)
}

// learn marks the ids that the client made up.
func (r *replay) learn(text string) {
	for _, id := range clientMade.FindAllString(text, -1) {
		if r.differ.renames.actual(id) == id {
			r.differ.renames.know(id)
		}
	}
}

var clientMade = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}`)

// recordedPart is a field of a multipart body as it was recorded.
type recordedPart struct {
	Name        string  `json:"name"`
	Filename    *string `json:"filename"`
	ContentType string  `json:"content_type"`
	Bytes       string  `json:"bytes"`
	Value       string  `json:"value"`
}

// requestBody is what was sent, made again from what the recording tells of it.
func (r *replay) requestBody(line capture) (io.Reader, string) {
	if len(line.Request) == 0 || string(line.Request) == "null" {
		return nil, ""
	}
	var form struct {
		Multipart []recordedPart `json:"multipart"`
	}
	if json.Unmarshal(line.Request, &form) == nil && form.Multipart != nil {
		return r.formBody(form.Multipart)
	}
	var text string
	if json.Unmarshal(line.Request, &text) == nil {
		switch text {
		case "1.2 MB of JSON":
			text = `{"prompt": {}, "padding": "` + strings.Repeat("x", 1_200_000) + `"}`
		case "a prompt, gzip":
			return bytes.NewReader(r.compressedPrompt()), "application/json"
		}
		return strings.NewReader(text), "text/plain; charset=utf-8"
	}
	sent := r.differ.renames.actual(string(line.Request))
	r.learn(sent)
	return strings.NewReader(sent), "application/json"
}

// compressedPrompt is told by the history that follows.
func (r *replay) compressedPrompt() []byte {
	for _, line := range r.lines {
		value, err := parseJSON(line.Body)
		if err != nil {
			continue
		}
		entries, _ := value.(object)
		for _, f := range entries {
			entry, _ := f.value.(object)
			prompt, _ := entry.get("prompt")
			if item, ok := prompt.([]any); ok && isQueueItem(item) {
				var b bytes.Buffer
				w := gzip.NewWriter(&b)
				r.learn(f.key)
				if _, err := w.Write(pyJSON(object{{"prompt", item[2]}, {"prompt_id", f.key}})); err != nil {
					r.t.Fatal(err)
				}
				if err := w.Close(); err != nil {
					r.t.Fatal(err)
				}
				return b.Bytes()
			}
		}
	}
	r.t.Fatal("no history tells of the compressed prompt")
	return nil
}

func (r *replay) formBody(parts []recordedPart) (io.Reader, string) {
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	for _, p := range parts {
		disposition := fmt.Sprintf("form-data; name=%q", p.Name)
		header := textproto.MIMEHeader{}
		data := []byte(p.Value)
		if p.Filename != nil {
			disposition += fmt.Sprintf("; filename=%q", *p.Filename)
			header.Set("Content-Type", p.ContentType)
			data = r.fileBytes(p)
		}
		header.Set("Content-Disposition", disposition)
		field, err := w.CreatePart(header)
		if err != nil {
			r.t.Fatal(err)
		}
		if _, err := field.Write(data); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		r.t.Fatal(err)
	}
	return &b, w.FormDataContentType()
}

// fileBytes are the bytes of an uploaded file: base64, or "2020 bytes".
func (r *replay) fileBytes(p recordedPart) []byte {
	if count, isLarge := strings.CutSuffix(p.Bytes, " bytes"); isLarge {
		n, err := strconv.Atoi(count)
		if err != nil {
			r.t.Fatal(err)
		}
		if data := r.viewed(*p.Filename); len(data) == n {
			return data
		}
		return make([]byte, n)
	}
	data, err := base64.StdEncoding.DecodeString(p.Bytes)
	if err != nil {
		r.t.Fatal(err)
	}
	return data
}
