package comfyuitest

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// request is what a route gets: the body is read before, so that it never waits on the event loop.
type request struct {
	*http.Request

	body []byte
	vars map[string]string
}

func (r *request) param(name string) (string, bool) {
	// A semicolon is no separator to aiohttp: previews are asked for with preview=webp;90.
	// What cannot be read of the rest is left out.
	query, _ := url.ParseQuery(strings.ReplaceAll(r.URL.RawQuery, ";", "%3B"))
	values, given := query[name]
	if !given {
		return "", false
	}
	return values[0], true
}

// answer is a response. The zero status is 200.
type answer struct {
	status  int
	kind    string // Content-Type; "": none, with an empty body
	body    []byte
	header  http.Header
	chunked bool // sent without a length
}

func jsonAnswer(v any) *answer {
	return &answer{kind: "application/json; charset=utf-8", body: pyJSON(v)}
}

func jsonError(status int, v any) *answer {
	a := jsonAnswer(v)
	a.status = status
	return a
}

func emptyAnswer(status int) *answer { return &answer{status: status} }

func textAnswer(status int, text string) *answer {
	return &answer{status: status, kind: "text/plain; charset=utf-8", body: []byte(text)}
}

// troubleAnswer is aiohttp's page for an exception in a handler; it ends the connection.
func troubleAnswer() *answer {
	a := textAnswer(http.StatusInternalServerError, "500 Internal Server Error\n\nServer got itself in trouble")
	a.header = http.Header{"Connection": {"close"}}
	return a
}

func tooLarge(limit int64) *answer {
	return textAnswer(http.StatusRequestEntityTooLarge, "Maximum request body size "+strconv.FormatInt(limit, 10)+" exceeded.")
}

// noRoute is the answer of the route for static files, which gets what no other route takes.
func noRoute() *answer {
	return &answer{status: http.StatusNotFound, kind: "application/octet-stream", chunked: true}
}

// handlerFunc is a route. It runs on the event loop.
type handlerFunc func(p *process, r *request) *answer

// route is a method and a path, whose segments in braces match anything.
type route struct {
	method   string
	segments []string
	handle   handlerFunc
}

// The sets of routes: most exist bare and under /api.
const (
	everywhere = iota
	onlyAPI
	onlyBare
)

type routeTable struct{ routes []route }

func (t *routeTable) add(where int, method, path string, handle handlerFunc) {
	if where != onlyAPI {
		t.routes = append(t.routes, route{method: method, segments: strings.Split(path, "/"), handle: handle})
	}
	if where != onlyBare {
		t.routes = append(t.routes, route{method: method, segments: strings.Split("/api"+path, "/"), handle: handle})
	}
}

// routesOf lists what a version answers.
func routesOf(v version) *routeTable {
	t := &routeTable{}
	t.add(everywhere, "GET", "/prompt", (*process).getPrompt)
	t.add(everywhere, "POST", "/prompt", (*process).postPrompt)
	t.add(everywhere, "GET", "/queue", (*process).getQueue)
	t.add(everywhere, "POST", "/queue", (*process).postQueue)
	t.add(everywhere, "POST", "/interrupt", (*process).postInterrupt)
	t.add(everywhere, "POST", "/free", (*process).postFree)
	t.add(everywhere, "GET", "/history", (*process).getHistory)
	t.add(everywhere, "GET", "/history/{id}", (*process).getHistoryOf)
	t.add(everywhere, "POST", "/history", (*process).postHistory)
	t.add(everywhere, "GET", "/object_info", (*process).getObjectInfo)
	t.add(everywhere, "GET", "/object_info/{class}", (*process).getObjectInfoOf)
	addJobRoutes(t, v)
	addFileRoutes(t)
	addInfoRoutes(t, v)
	return t
}

// find returns the route of a request, or how to refuse it.
func (t *routeTable) find(method, path string) (route, map[string]string, *answer) {
	segments := strings.Split(path, "/")
	var allowed []string
	for _, r := range t.routes {
		vars, fits := r.match(segments)
		if !fits {
			continue
		}
		if r.method == method || r.method == "GET" && method == "HEAD" {
			return r, vars, nil
		}
		allowed = append(allowed, r.method)
	}
	switch {
	case takenAsStatic(path) && (method == "GET" || method == "HEAD"):
		return route{}, nil, noRoute()
	case takenAsStatic(path):
		allowed = append(allowed, "GET", "HEAD")
	case allowed == nil:
		return route{}, nil, textAnswer(http.StatusNotFound, "404: Not Found")
	case slices.Contains(allowed, "GET"):
		allowed = append(allowed, "HEAD")
	}
	slices.Sort(allowed)
	refusal := textAnswer(http.StatusMethodNotAllowed, "405: Method Not Allowed")
	refusal.header = http.Header{"Allow": {strings.Join(slices.Compact(allowed), ",")}}
	return route{}, nil, refusal
}

// takenAsStatic tells whether the route for static files, of GET and HEAD, takes a path: that of everything, but for the application
// under /internal and for two slashes in front.
func takenAsStatic(path string) bool {
	return path != "/internal" && !strings.HasPrefix(path, "/internal/") && !strings.HasPrefix(path, "//")
}

func (r *route) match(segments []string) (map[string]string, bool) {
	if len(segments) != len(r.segments) {
		return nil, false
	}
	var vars map[string]string
	for i, segment := range r.segments {
		if !strings.HasPrefix(segment, "{") {
			if segment != segments[i] {
				return nil, false
			}
			continue
		}
		value, err := url.PathUnescape(segments[i])
		// aiohttp's dynamic segments hold at least one character, and no brace.
		if err != nil || value == "" || strings.ContainsAny(value, "{}") {
			return nil, false
		}
		if vars == nil {
			vars = map[string]string{}
		}
		vars[strings.Trim(segment, "{}")] = value
	}
	return vars, true
}

// dispatch hands a request to its process.
func (p *Pod) dispatch(w http.ResponseWriter, r *http.Request) {
	proc := p.processOf(r)
	if proc == nil || proc.ctx.Err() != nil {
		panic(http.ErrAbortHandler)
	}
	if r.Context().Value(processKey{}) != proc {
		r = r.WithContext(proc.ctx)
	}
	proc.serve(w, r)
}

// processOf is the process that accepted a request's connection, or, if a proxy held the request, the one of the moment; nil for none.
func (p *Pod) processOf(r *http.Request) *process {
	if proc, _ := r.Context().Value(processKey{}).(*process); proc != nil {
		return proc
	}
	return p.current()
}

func (p *process) serve(w http.ResponseWriter, r *http.Request) {
	if stripAPI(r.URL.Path) == "/ws" && (r.Method == http.MethodGet || r.Method == http.MethodHead) {
		p.serveSocket(w, r)
		return
	}
	found, vars, refusal := p.pod.routes.find(r.Method, r.URL.EscapedPath())
	req := &request{Request: r, vars: vars}
	if refusal == nil {
		var failed *answer
		if req.body, failed = p.readBody(r); failed != nil {
			refusal = failed
		}
	}
	// A request that has arrived is handled, even if its client has given it up by then: after a freeze all of them are.
	if !p.loop.enter(p.ctx) {
		panic(http.ErrAbortHandler)
	}
	a := func() *answer {
		defer p.loop.leave()
		if early := p.guard(r); early != nil {
			return early
		}
		if refusal != nil {
			return refusal
		}
		return found.handle(p, req)
	}()
	if p.ctx.Err() != nil {
		panic(http.ErrAbortHandler)
	}
	if refusal != nil {
		linger(w, r, func() { p.write(w, r, a) })
		return
	}
	p.write(w, r, a)
}

// lingering is aiohttp's lingering_time.
const lingering = 10 * time.Second

// linger gives an answer that may come before the whole request is there, and then takes what is left of it: to close the connection
// while the client still writes would take the answer away from it.
func linger(w http.ResponseWriter, r *http.Request, answer func()) {
	control := http.NewResponseController(w)
	if control.EnableFullDuplex() != nil {
		answer()
		return
	}
	answer()
	_ = control.Flush()
	_ = control.SetReadDeadline(time.Now().Add(lingering))
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		panic(http.ErrAbortHandler) // net/http would wait on, and take what comes later for a request
	}
	_ = control.SetReadDeadline(time.Time{})
}

// readBody reads and decompresses a body, up to the limit. A multipart body may be a little larger than its parts.
func (p *process) readBody(r *http.Request) ([]byte, *answer) {
	limit := p.pod.config.maxUpload
	switch {
	case limit == 0:
		limit = math.MaxInt64
	case strings.HasPrefix(r.Header.Get("Content-Type"), "multipart/"):
		limit += 1 << 20
	}
	var reader io.Reader = r.Body
	switch strings.ToLower(r.Header.Get("Content-Encoding")) {
	case "gzip":
		unzipped, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, troubleAnswer()
		}
		reader = unzipped
	case "deflate":
		inflated, err := zlib.NewReader(r.Body)
		if err != nil {
			return nil, troubleAnswer()
		}
		reader = inflated
	case "br":
		return nil, textAnswer(http.StatusBadRequest, "Can not decode content-encoding: brotli (br). Please install `Brotli`")
	}
	body, err := io.ReadAll(io.LimitReader(reader, limit))
	switch {
	case err != nil && errors.Is(err, context.Canceled), err != nil && r.Context().Err() != nil:
		panic(http.ErrAbortHandler)
	case err != nil:
		return nil, troubleAnswer()
	case int64(len(body)) >= limit:
		return nil, tooLarge(p.pod.config.maxUpload)
	}
	return body, nil
}

// guard is what the server does before any route: it refuses foreign origins and answers OPTIONS.
func (p *process) guard(r *http.Request) *answer {
	if p.version.atLeast(0, 19, 0) && r.Header.Get("Sec-Fetch-Site") == "cross-site" {
		return emptyAnswer(http.StatusForbidden)
	}
	if origin := r.Header.Get("Origin"); origin != "" && foreignOrigin(r.Host, origin) {
		return emptyAnswer(http.StatusForbidden)
	}
	if r.Method == http.MethodOptions {
		return emptyAnswer(http.StatusOK)
	}
	return nil
}

// foreignOrigin tells whether a browser page from elsewhere calls a server on the loopback.
func foreignOrigin(host, origin string) bool {
	parsed, err := url.Parse(strings.ToLower(origin))
	if err != nil {
		return false
	}
	target := &url.URL{Host: strings.ToLower(host)}
	if !isLoopback(target.Hostname()) {
		return false
	}
	from, to := parsed.Host, target.Host
	if parsed.Port() == "" {
		to = target.Hostname()
	}
	if target.Port() == "" {
		from = parsed.Hostname()
	}
	return from != "" && to != "" && from != to
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (p *process) write(w http.ResponseWriter, r *http.Request, a *answer) {
	header := w.Header()
	for name, values := range a.header {
		header[http.CanonicalHeaderKey(name)] = values
	}
	body := a.body
	if a.kind != "" {
		header.Set("Content-Type", a.kind)
	} else {
		header["Content-Type"] = nil // else net/http guesses one
	}
	if p.pod.config.compress {
		body = compressed(r, header, a)
	}
	status := a.status
	if status == 0 {
		status = http.StatusOK
	}
	switch {
	case a.chunked:
		w.WriteHeader(status)
		_ = http.NewResponseController(w).Flush()
	case status == http.StatusNotModified:
		w.WriteHeader(status)
	default:
		header.Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(status)
		if r.Method != http.MethodHead {
			_, _ = w.Write(body) // the client may be gone
		}
	}
}

// compressed is the body as a server with --enable-compress-response-body sends it: JSON and text only, if the client takes
// gzip, but deflated if it takes that too.
func compressed(r *http.Request, header http.Header, a *answer) []byte {
	accepts := r.Header.Get("Accept-Encoding")
	plain := !strings.HasPrefix(a.kind, "application/json") && !strings.HasPrefix(a.kind, "text/plain")
	if plain || len(a.body) == 0 || !strings.Contains(accepts, "gzip") || a.status == http.StatusInternalServerError {
		return a.body
	}
	var buf bytes.Buffer
	var w io.WriteCloser
	if strings.Contains(accepts, "deflate") {
		header.Set("Content-Encoding", "deflate")
		w = zlib.NewWriter(&buf)
	} else {
		header.Set("Content-Encoding", "gzip")
		w = gzip.NewWriter(&buf)
	}
	_, _ = w.Write(a.body) // into memory
	_ = w.Close()
	return buf.Bytes()
}

// serveSocket upgrades a connection, unless sockets are refused.
func (p *process) serveSocket(w http.ResponseWriter, r *http.Request) {
	if !p.loop.enter(r.Context()) {
		panic(http.ErrAbortHandler)
	}
	refusal := p.guard(r)
	p.loop.leave()
	if status := p.pod.refusal(); status != 0 {
		refusal = emptyAnswer(status)
	}
	header, ext, problem := handshake(r)
	if refusal == nil && problem != "" {
		refusal = textAnswer(http.StatusBadRequest, problem)
	}
	if refusal != nil {
		p.write(w, r, refusal)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	p.serveStream(conn, buffered.Reader, header, ext, r.URL.Query().Get("clientId"))
}

func (p *process) queueInfo() object { return execInfo(p.queue.tasksRemaining()) }

func execInfo(remaining int) object {
	return object{{"exec_info", object{{"queue_remaining", remaining}}}}
}

func (p *process) getPrompt(*request) *answer { return jsonAnswer(p.queueInfo()) }

func (p *process) getQueue(*request) *answer {
	running, pending := p.queue.snapshot()
	tuples := func(items []*item) []any {
		list := make([]any, len(items))
		for i, it := range items {
			list[i] = it.shown()
		}
		return list
	}
	return jsonAnswer(object{{"queue_running", tuples(running)}, {"queue_pending", tuples(pending)}})
}

// jsonBody reads a body that must be JSON; anything else is an exception in the handler.
func (r *request) jsonBody() (any, bool) {
	text, ok := r.text()
	if !ok {
		return nil, false
	}
	v, err := parseJSON(text)
	return v, err == nil
}

// text is the body in UTF-8; false if the request names a charset that Python does not know, or the bytes are not of it.
func (r *request) text() ([]byte, bool) {
	_, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	charset := strings.ToLower(params["charset"])
	if err != nil || charset == "" {
		charset = "utf-8"
	}
	switch charset {
	case "utf-8", "utf8", "us-ascii", "ascii":
		return r.body, utf8.Valid(r.body)
	case "latin-1", "latin1", "iso-8859-1":
		var text []byte
		for _, c := range r.body {
			text = utf8.AppendRune(text, rune(c))
		}
		return text, true
	default:
		return nil, false
	}
}

// clearAndDelete is the body of POST /queue and POST /history.
func clearAndDelete(r *request, clear func(), remove func(id string) error) *answer {
	v, ok := r.jsonBody()
	if !ok {
		return troubleAnswer()
	}
	body, isObject := v.(object)
	if !isObject {
		return notADict(v, "clear", "delete")
	}
	if all, _ := body.get("clear"); toBool(all) {
		clear()
	}
	ids, given := body.get("delete")
	if !given {
		return emptyAnswer(http.StatusOK)
	}
	var list []any
	switch ids := ids.(type) {
	case []any:
		list = ids
	case string:
		for _, letter := range ids {
			list = append(list, string(letter))
		}
	case object:
		for _, f := range ids {
			list = append(list, f.key)
		}
	default:
		return troubleAnswer()
	}
	for _, id := range list {
		if text, isText := id.(string); isText {
			if err := remove(text); err != nil {
				return troubleAnswer()
			}
		}
	}
	return emptyAnswer(http.StatusOK)
}

// notADict is what becomes of handlers that look for keys in a body that is no object: lists and texts can be searched.
func notADict(v any, keys ...string) *answer {
	switch v := v.(type) {
	case []any:
		for _, key := range keys {
			if slices.Contains(v, any(key)) {
				return troubleAnswer()
			}
		}
		return emptyAnswer(http.StatusOK)
	case string:
		for _, key := range keys {
			if strings.Contains(v, key) {
				return troubleAnswer()
			}
		}
		return emptyAnswer(http.StatusOK)
	default:
		return troubleAnswer()
	}
}

func (p *process) postQueue(r *request) *answer {
	return clearAndDelete(r, p.queue.wipe, func(id string) error {
		_, err := p.queue.remove(id)
		return err
	})
}

func (p *process) postHistory(r *request) *answer {
	return clearAndDelete(r, p.queue.clearHistory, func(id string) error {
		p.queue.removeHistory(id)
		return nil
	})
}

// postInterrupt interrupts a prompt, or with an empty id or a body that is no JSON whatever runs.
func (p *process) postInterrupt(r *request) *answer {
	if !p.version.atLeast(0, 3, 57) {
		p.executor.raiseInterrupt()
		return emptyAnswer(http.StatusOK)
	}
	text, ok := r.text()
	if !ok {
		return troubleAnswer()
	}
	v, err := parseJSON(text)
	if err != nil {
		v = object{}
	}
	body, isObject := v.(object)
	if !isObject {
		return troubleAnswer()
	}
	id, _ := body.get("prompt_id")
	if !toBool(id) {
		p.executor.raiseInterrupt()
		return emptyAnswer(http.StatusOK)
	}
	if text, isText := id.(string); isText {
		p.queue.ifRunning(text, p.executor.raiseInterrupt)
	}
	return emptyAnswer(http.StatusOK)
}

func (p *process) postFree(r *request) *answer {
	v, ok := r.jsonBody()
	body, isObject := v.(object)
	if !ok || !isObject {
		return troubleAnswer()
	}
	unload, _ := body.get("unload_models")
	free, _ := body.get("free_memory")
	flags := freeFlags{unloadModels: toBool(unload), freeMemory: toBool(free)}
	if flags != (freeFlags{}) {
		p.queue.setFlags(flags)
	}
	return emptyAnswer(http.StatusOK)
}

func (p *process) getHistory(r *request) *answer {
	var maxItems *int
	offset := -1
	if text, given := r.param("max_items"); given {
		n, err := parseInt(text)
		whole, small := n.(int64)
		if err != nil || !small {
			return troubleAnswer()
		}
		limit := int(whole)
		maxItems = &limit
	}
	if text, given := r.param("offset"); given && p.version.atLeast(0, 3, 60) {
		n, err := parseInt(text)
		whole, small := n.(int64)
		if err != nil || !small {
			return troubleAnswer()
		}
		offset = int(whole)
	}
	return jsonAnswer(p.queue.historyPage(maxItems, offset))
}

func (p *process) getHistoryOf(r *request) *answer {
	id := r.vars["id"]
	entry, known := p.queue.historyOf(id)
	if !known {
		return jsonAnswer(object{})
	}
	return jsonAnswer(object{{id, entry.shown}})
}

func (p *process) getObjectInfo(*request) *answer {
	all := object{}
	for _, name := range slices.Sorted(maps.Keys(p.pod.classes)) {
		all = append(all, field{name, encoded(objectInfo(p.version, p.pod.classes[name], p.files))})
	}
	return jsonAnswer(all)
}

func (p *process) getObjectInfoOf(r *request) *answer {
	name := r.vars["class"]
	class := p.pod.classes[name]
	if class == nil {
		return jsonAnswer(object{})
	}
	return jsonAnswer(object{{name, encoded(objectInfo(p.version, class, p.files))}})
}

// rawMembers are the members of an object as they were sent.
func rawMembers(v object) map[string]json.RawMessage {
	members := make(map[string]json.RawMessage, len(v))
	for _, f := range v {
		members[f.key] = pyJSON(f.value)
	}
	return members
}
