package comfyuitest

import (
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

func addInfoRoutes(t *routeTable, v version) {
	if v.atLeast(0, 3, 45) {
		t.add(everywhere, "GET", "/features", func(p *process, _ *request) *answer { return jsonAnswer(p.features()) })
	}
	t.add(everywhere, "GET", "/system_stats", (*process).getSystemStats)
	t.add(everywhere, "GET", "/models", func(p *process, _ *request) *answer { return jsonAnswer(p.version.modelFolders()) })
	t.add(everywhere, "GET", "/models/{folder}", (*process).getModels)
	t.add(everywhere, "GET", "/embeddings", func(*process, *request) *answer { return jsonAnswer([]any{}) })
	t.add(everywhere, "GET", "/extensions", func(*process, *request) *answer { return jsonAnswer([]any{}) })
	t.add(onlyBare, "GET", "/", (*process).getPage)
	t.add(onlyBare, "GET", "/internal/logs", (*process).getLogs)
	t.add(onlyBare, "GET", "/internal/logs/raw", (*process).getRawLogs)
	t.add(onlyBare, "PATCH", "/internal/logs/subscribe", (*process).patchLogs)
	t.add(onlyBare, "GET", "/internal/folder_paths", (*process).getFolderPaths)
	t.add(onlyBare, "GET", "/internal/files/{kind}", (*process).getFiles)
	switch {
	case v.atLeast(0, 17, 0):
		for _, method := range []string{"GET", "POST"} {
			t.add(onlyAPI, method, "/assets", (*process).noAssets)
		}
		for _, method := range []string{"GET", "PUT", "DELETE"} {
			t.add(onlyAPI, method, "/assets/{id}", (*process).noAssets)
		}
	case v.atLeast(0, 9, 0):
		// On without a flag. Of the rest of its routes a pod without models needs none.
		t.add(onlyAPI, "GET", "/assets", func(*process, *request) *answer {
			return jsonAnswer(object{{"assets", []any{}}, {"total", 0}, {"has_more", false}})
		})
	}
	addUserRoutes(t)
}

// features is what the server announces, over HTTP and on the socket.
func (p *process) features() object {
	f := object{{"supports_preview_metadata", true}}
	if p.version.atLeast(0, 28, 0) {
		f = append(f, field{"supports_model_type_tags", true})
	}
	// The limit is a number of megabytes times a million: whole for the default, a float as soon as the flag is given.
	limit := any(p.pod.config.maxUpload)
	if p.pod.config.maxUpload != defaultMaxUpload {
		limit = float64(p.pod.config.maxUpload)
	}
	f = append(f, field{"max_upload_size", limit})
	if p.version.atLeast(0, 4, 0) {
		f = append(f, field{"extension", object{{"manager", object{{"supports_v4", true}}}}})
	}
	if p.version.atLeast(0, 14, 0) {
		f = append(f, field{"node_replacements", true})
	}
	if p.version.atLeast(0, 17, 0) {
		f = append(f, field{"assets", false})
	}
	return f
}

const (
	podMemory     = int64(24) << 30
	podMemoryFree = int64(20) << 30
)

func (p *process) getSystemStats(*request) *answer {
	system := object{{"os", "posix"}}
	if p.version.atLeast(0, 4, 0) {
		system[0].value = "linux"
	}
	system = append(system, field{"ram_total", podMemory}, field{"ram_free", podMemoryFree}, field{"comfyui_version", p.version.String()})
	if p.version.atLeast(0, 3, 46) {
		system = append(system, field{"required_frontend_version", "1.45.20"})
	}
	if p.version.atLeast(0, 3, 61) {
		system = append(system, field{"installed_templates_version", nil}, field{"required_templates_version", "0.11.1"})
	}
	if p.version.atLeast(0, 22, 0) {
		system = append(system, field{"comfy_package_versions", []any{
			object{{"name", "comfyui-frontend-package"}, {"installed", "1.45.20"}, {"required", "1.45.20"}},
		}})
	}
	system = append(system,
		field{"python_version", "3.11.7 (main, May  9 2026, 07:35:25) [GCC 12.2.0]"},
		field{"pytorch_version", "2.15.0+cpu"}, field{"embedded_python", false})
	if p.version.atLeast(0, 25, 0) {
		system = append(system, field{"deploy_environment", "local-git"})
	}
	system = append(system, field{"argv", p.argv()})
	device := object{
		{"name", "cpu"},
		{"type", "cpu"},
		{"index", nil},
		{"vram_total", podMemory},
		{"vram_free", podMemoryFree},
		{"torch_vram_total", podMemory},
		{"torch_vram_free", podMemoryFree},
	}
	return jsonAnswer(object{{"system", system}, {"devices", []any{device}}})
}

// argv is the command line that would make a server behave as the pod does.
func (p *process) argv() []string {
	argv := []string{"main.py", "--cpu", "--disable-api-nodes"}
	if p.pod.config.maxUpload != defaultMaxUpload {
		argv = append(argv, "--max-upload-size", string(appendFloat(nil, float64(p.pod.config.maxUpload)/(1<<20))))
	}
	if p.pod.config.compress {
		argv = append(argv, "--enable-compress-response-body")
	}
	return argv
}

// modelFolders lists the kinds of models; the pod has no model of any.
func (v version) modelFolders() []string {
	folders := []string{
		"checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision", "style_models", "embeddings",
		"diffusers", "vae_approx", "controlnet", "gligen", "upscale_models", "custom_nodes", "hypernetworks", "photomaker", "classifiers",
	}
	add := func(since bool, name, before string) {
		if !since {
			return
		}
		if at := slices.Index(folders, before); at >= 0 {
			folders = slices.Insert(folders, at, name)
			return
		}
		folders = append(folders, name)
	}
	add(v.atLeast(0, 3, 52), "model_patches", "")
	add(v.atLeast(0, 3, 53), "audio_encoders", "")
	add(v.atLeast(0, 3, 71), "latent_upscale_models", "custom_nodes")
	add(v.atLeast(0, 30, 0), "datasets", "hypernetworks")
	add(v.atLeast(0, 21, 0), "background_removal", "")
	add(v.atLeast(0, 20, 0), "frame_interpolation", "")
	add(v.atLeast(0, 22, 0), "geometry_estimation", "")
	add(v.atLeast(0, 21, 0), "optical_flow", "")
	add(v.atLeast(0, 23, 0), "detection", "")
	return folders
}

func (p *process) getModels(r *request) *answer {
	if !slices.Contains(p.version.modelFolders(), r.vars["folder"]) {
		return emptyAnswer(http.StatusNotFound)
	}
	return jsonAnswer([]any{})
}

func (p *process) getFolderPaths(*request) *answer {
	paths := object{}
	for _, name := range p.version.modelFolders() {
		paths = append(paths, field{name, []string{"/comfyui/models/" + name}})
	}
	return jsonAnswer(paths)
}

// getFiles lists the files at the top of a folder, the newest first.
func (p *process) getFiles(r *request) *answer {
	kind := r.vars["kind"]
	if !isKind(kind) {
		return jsonError(http.StatusBadRequest, object{{"error", "Invalid directory type"}})
	}
	type listed struct {
		name     string
		modified time.Time
	}
	var files []listed
	for _, name := range p.files.list(kind, "") {
		if f, there := p.files.get(kind, "", name); there && !strings.HasPrefix(name, ".") {
			files = append(files, listed{name, f.modified})
		}
	}
	slices.SortStableFunc(files, func(a, b listed) int { return b.modified.Compare(a.modified) })
	names := make([]string, len(files))
	for i, f := range files {
		names[i] = f.name
		if p.version.atLeast(0, 20, 0) {
			names[i] += " [" + kind + "]"
		}
	}
	return jsonAnswer(names)
}

// page stands for the editor, a file of the server's installation.
var page = file{
	data:     []byte("<!doctype html><html lang=\"en\"><head><title>ComfyUI</title></head><body></body></html>\n"),
	modified: time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC),
}

func (p *process) getPage(r *request) *answer {
	a := &answer{kind: "text/html"}
	a.header = http.Header{"Cache-Control": {"no-cache"}}
	if p.version.atLeast(0, 18, 0) {
		a.header.Set("Cache-Control", "no-store, must-revalidate")
	}
	fileResponse(r, page, a)
	return a
}

func (p *process) noAssets(*request) *answer {
	return jsonError(http.StatusServiceUnavailable, object{{"error", object{
		{"code", "SERVICE_DISABLED"},
		{"message", "Assets system is disabled. Start the server with --enable-assets to use this feature."},
		{"details", object{}},
	}}})
}

// logBook is the server's log: the newest lines, and who gets new ones on the socket.
type logBook struct {
	mu          sync.Mutex
	lines       []logLine
	subscribers []string
}

// logLine is a line as the server keeps it.
type logLine struct {
	at   time.Time
	text string
}

func (l logLine) json() object {
	return object{{"t", l.at.Format("2006-01-02T15:04:05.000000")}, {"m", l.text}}
}

const maxLogLines = 300

func newLogBook() *logBook { return &logBook{} }

// log writes a line; colour is what newer versions put around important ones.
func (p *process) log(text string, colour bool) {
	if p.version.atLeast(0, 23, 0) {
		if colour {
			text = "\x1b[32m" + strings.TrimSuffix(text, "\n") + "\x1b[0m\n"
		}
		text = "\x1b[32m[INFO]\x1b[0m " + text
	}
	line := logLine{time.Now(), text}
	p.logs.mu.Lock()
	p.logs.lines = append(p.logs.lines, line)
	if extra := len(p.logs.lines) - maxLogLines; extra > 0 {
		p.logs.lines = slices.Delete(p.logs.lines, 0, extra)
	}
	subscribers := slices.Clone(p.logs.subscribers)
	p.logs.mu.Unlock()
	for _, sid := range subscribers {
		p.hub.toClient(client{known: true, sid: sid}, "logs", object{{"entries", []any{line.json()}}, {"size", nil}})
	}
}

func (p *process) logExecuted(took time.Duration) {
	p.log(fmt.Sprintf("Prompt executed in %.2f seconds\n", took.Seconds()), true)
}

func (l *logBook) snapshot() []object {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := make([]object, len(l.lines))
	for i, line := range l.lines {
		lines[i] = line.json()
	}
	return lines
}

func (p *process) getLogs(*request) *answer {
	var text strings.Builder
	for _, line := range p.logs.snapshot() {
		text.WriteString(textOf(line, "t", "") + " - " + textOf(line, "m", ""))
	}
	return jsonAnswer(text.String())
}

func (p *process) getRawLogs(*request) *answer {
	return jsonAnswer(object{{"entries", p.logs.snapshot()}, {"size", object{{"cols", 80}, {"rows", 24}}}})
}

func (p *process) patchLogs(r *request) *answer {
	v, ok := r.jsonBody()
	body, isObject := v.(object)
	sid, hasID := body.get("clientId")
	enabled, hasEnabled := body.get("enabled")
	if !ok || !isObject || !hasID || !hasEnabled {
		return troubleAnswer()
	}
	name := clientKey(sid)
	p.logs.mu.Lock()
	defer p.logs.mu.Unlock()
	p.logs.subscribers = slices.DeleteFunc(p.logs.subscribers, func(other string) bool { return other == name })
	if toBool(enabled) {
		p.logs.subscribers = append(p.logs.subscribers, name)
	}
	return emptyAnswer(http.StatusOK)
}

// kindUser is the folder of /userdata. Like the server's user folder it outlives restarts.
const kindUser = "user"

func addUserRoutes(t *routeTable) {
	t.add(everywhere, "GET", "/users", func(*process, *request) *answer {
		return jsonAnswer(object{{"storage", "server"}, {"migrated", false}})
	})
	t.add(everywhere, "GET", "/userdata", (*process).getUserdata)
	t.add(everywhere, "GET", "/v2/userdata", (*process).getUserdataV2)
	t.add(everywhere, "GET", "/userdata/{file}", (*process).getUserFile)
	t.add(everywhere, "POST", "/userdata/{file}", (*process).postUserFile)
	t.add(everywhere, "DELETE", "/userdata/{file}", (*process).deleteUserFile)
	t.add(everywhere, "POST", "/userdata/{file}/move/{dest}", (*process).moveUserFile)
}

// userFiles lists the files below a directory, by path.
func (p *process) userFiles(dir string) []string {
	dir = cleanFolder(dir)
	return slices.DeleteFunc(p.files.all(kindUser), func(name string) bool {
		return dir != "" && !strings.HasPrefix(name, dir+"/")
	})
}

func (p *process) getUserdata(r *request) *answer {
	dir, _ := r.param("dir")
	if dir == "" {
		return textAnswer(http.StatusBadRequest, "Directory not provided")
	}
	if isOutside(dir) {
		return textAnswer(http.StatusForbidden, "Invalid directory")
	}
	names := p.userFiles(dir)
	if len(names) == 0 {
		return textAnswer(http.StatusNotFound, "Directory not found")
	}
	recurse, _ := r.param("recurse")
	full, _ := r.param("full_info")
	split, _ := r.param("split")
	list := []any{}
	for _, name := range names {
		relative := strings.TrimPrefix(strings.TrimPrefix(name, cleanFolder(dir)), "/")
		if strings.Contains(relative, "/") && !strings.EqualFold(recurse, "true") {
			continue
		}
		switch {
		case strings.EqualFold(full, "true"):
			list = append(list, p.userFileInfo(name, relative))
		case strings.EqualFold(split, "true"):
			list = append(list, append([]string{relative}, strings.Split(relative, "/")...))
		default:
			list = append(list, relative)
		}
	}
	return jsonAnswer(list)
}

func (p *process) userFileInfo(name, shown string) object {
	f, _ := p.files.get(kindUser, path.Dir(name), path.Base(name))
	modified := any(float64(f.modified.UnixNano()) / 1e9)
	if p.version.atLeast(0, 21, 0) {
		modified = f.modified.UnixMilli()
	}
	info := object{{"path", shown}, {"size", len(f.data)}, {"modified", modified}}
	if p.version.atLeast(0, 3, 49) {
		info = append(info, field{"created", modified})
	}
	return info
}

// getUserdataV2 lists files and directories below a directory, directories first.
func (p *process) getUserdataV2(r *request) *answer {
	dir, _ := r.param("path")
	if isOutside(dir) {
		return textAnswer(http.StatusBadRequest, "Invalid path requested")
	}
	names := p.userFiles(dir)
	if len(names) == 0 && dir != "" {
		return textAnswer(http.StatusNotFound, "Requested path not found")
	}
	directories, files := []object{}, []object{}
	seen := map[string]bool{}
	for _, name := range names {
		for parent := path.Dir(name); parent != "." && parent != cleanFolder(dir) && !seen[parent]; parent = path.Dir(parent) {
			seen[parent] = true
			directories = append(directories, object{{"name", path.Base(parent)}, {"path", parent}, {"type", "directory"}})
		}
		f, _ := p.files.get(kindUser, path.Dir(name), path.Base(name))
		files = append(files, object{
			{"name", path.Base(name)},
			{"path", name},
			{"type", "file"},
			{"size", len(f.data)},
			{"modified", float64(f.modified.UnixNano()) / 1e9},
		})
	}
	byName := func(a, b object) int {
		return strings.Compare(strings.ToLower(textOf(a, "name", "")), strings.ToLower(textOf(b, "name", "")))
	}
	slices.SortStableFunc(directories, byName)
	slices.SortStableFunc(files, byName)
	return jsonAnswer(append(directories, files...))
}

// userFile finds the file that a route names; a refusal is a status.
func (p *process) userFile(name string, mustExist bool) (file, int) {
	if isOutside(name) {
		return file{}, http.StatusForbidden
	}
	f, there := p.files.get(kindUser, path.Dir(name), path.Base(name))
	if !there && mustExist {
		return file{}, http.StatusNotFound
	}
	return f, 0
}

func (p *process) getUserFile(r *request) *answer {
	f, refused := p.userFile(r.vars["file"], true)
	if refused != 0 {
		return emptyAnswer(refused)
	}
	a := &answer{kind: mimeType(r.vars["file"]), header: http.Header{}}
	if p.version.atLeast(0, 28, 0) {
		a.header.Set("X-Content-Type-Options", "nosniff")
		a.header.Set("Content-Disposition", "attachment")
		if isActive(a.kind) {
			a.kind = "application/octet-stream"
		}
	}
	fileResponse(r, f, a)
	return a
}

func (p *process) postUserFile(r *request) *answer {
	return p.storeUserFile(r, r.vars["file"], r.body)
}

func (p *process) storeUserFile(r *request, name string, data []byte) *answer {
	if _, refused := p.userFile(name, false); refused != 0 {
		return emptyAnswer(refused)
	}
	_, there := p.files.get(kindUser, path.Dir(name), path.Base(name))
	if overwrite, _ := r.param("overwrite"); overwrite == "false" && there {
		return textAnswer(http.StatusConflict, "File already exists")
	}
	p.files.put(kindUser, path.Dir(name), path.Base(name), data)
	if full, _ := r.param("full_info"); strings.EqualFold(full, "true") {
		return jsonAnswer(p.userFileInfo(name, name))
	}
	return jsonAnswer(name)
}

func (p *process) deleteUserFile(r *request) *answer {
	name := r.vars["file"]
	if _, refused := p.userFile(name, true); refused != 0 {
		return emptyAnswer(refused)
	}
	p.files.remove(kindUser, path.Dir(name), path.Base(name))
	return emptyAnswer(http.StatusNoContent)
}

func (p *process) moveUserFile(r *request) *answer {
	from, to := r.vars["file"], r.vars["dest"]
	f, refused := p.userFile(from, true)
	if refused != 0 {
		return emptyAnswer(refused)
	}
	a := p.storeUserFile(r, to, f.data)
	if a.status == 0 && cleanFolder(from) != cleanFolder(to) {
		p.files.remove(kindUser, path.Dir(from), path.Base(from))
	}
	return a
}
