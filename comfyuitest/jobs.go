package comfyuitest

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
)

// The states of /api/jobs.
const (
	jobPending    = "pending"
	jobInProgress = "in_progress"
	jobCompleted  = "completed"
	jobFailed     = "failed"
	jobCancelled  = "cancelled"
)

// jobStates lists the states that a version knows: cancelled came in 0.9.0, before it was failed.
func (v version) jobStates() []string {
	states := []string{jobPending, jobInProgress, jobCompleted, jobFailed}
	if v.atLeast(0, 9, 0) {
		states = append(states, jobCancelled)
	}
	return states
}

func addJobRoutes(t *routeTable, v version) {
	if v.atLeast(0, 6, 0) {
		t.add(onlyAPI, "GET", "/jobs", (*process).getJobs)
		t.add(onlyAPI, "GET", "/jobs/{id}", (*process).getJob)
	}
	if v.atLeast(0, 26, 0) {
		t.add(onlyAPI, "POST", "/jobs/{id}/cancel", (*process).postCancel)
		t.add(onlyAPI, "POST", "/jobs/cancel", (*process).postCancelBatch)
	}
}

// jobQuery is the query of GET /api/jobs.
type jobQuery struct {
	states     []string
	workflowID string
	byDuration bool
	ascending  bool
	limit      any // nil: none
	offset     int
}

func badQuery(text string) *answer {
	return jsonError(http.StatusBadRequest, object{{"error", text}})
}

func (p *process) jobQuery(r *request) (jobQuery, *answer) {
	known := p.version.jobStates()
	q := jobQuery{states: known}
	if text, _ := r.param("status"); text != "" {
		q.states = nil
		var unknown []string
		for state := range strings.SplitSeq(text, ",") {
			if state = strings.ToLower(strings.TrimSpace(state)); state == "" {
				continue
			}
			q.states = append(q.states, state)
			if !slices.Contains(known, state) {
				unknown = append(unknown, state)
			}
		}
		if unknown != nil {
			return q, badQuery("Invalid status value(s): " + strings.Join(unknown, ", ") + ". Valid values: " + strings.Join(known, ", "))
		}
	}
	q.workflowID, _ = r.param("workflow_id")
	switch sort, given := r.param("sort_by"); {
	case !given, strings.EqualFold(sort, "created_at"):
	case strings.EqualFold(sort, "execution_duration"):
		q.byDuration = true
	default:
		return q, badQuery("sort_by must be 'created_at' or 'execution_duration'")
	}
	switch order, given := r.param("sort_order"); {
	case !given, strings.EqualFold(order, "desc"):
	case strings.EqualFold(order, "asc"):
		q.ascending = true
	default:
		return q, badQuery("sort_order must be 'asc' or 'desc'")
	}
	if text, given := r.param("limit"); given {
		n, err := parseInt(text)
		limit, small := n.(int64)
		if err != nil || !small {
			return q, badQuery("limit must be an integer")
		}
		if limit <= 0 {
			return q, badQuery("limit must be a positive integer")
		}
		q.limit = limit
	}
	if text, given := r.param("offset"); given {
		n, err := parseInt(text)
		offset, small := n.(int64)
		if err != nil || !small {
			return q, badQuery("offset must be an integer")
		}
		q.offset = int(max(offset, 0))
	}
	return q, nil
}

func (p *process) getJobs(r *request) *answer {
	q, refused := p.jobQuery(r)
	if refused != nil {
		return refused
	}
	jobs, ok := p.jobs(q)
	if !ok {
		return troubleAnswer()
	}
	if q.workflowID != "" {
		jobs = slices.DeleteFunc(jobs, func(job object) bool {
			id, _ := job.get("workflow_id")
			return id != q.workflowID
		})
	}
	sortJobs(jobs, q)
	total := len(jobs)
	jobs = jobs[min(q.offset, total):]
	if limit, limited := q.limit.(int64); limited {
		jobs = jobs[:min(int(limit), len(jobs))]
	}
	return jsonAnswer(object{
		{"jobs", append([]object{}, jobs...)},
		{"pagination", object{
			{"offset", q.offset}, {"limit", q.limit}, {"total", total}, {"has_more", q.offset+len(jobs) < total},
		}},
	})
}

// jobs lists what the query's states ask for: running, pending, then the history; false: the server stumbles over one of them.
func (p *process) jobs(q jobQuery) (jobs []object, ok bool) {
	running, pending := p.queue.snapshot()
	ok = true
	take := func(job object, fine bool) {
		jobs, ok = append(jobs, job), ok && fine
	}
	if slices.Contains(q.states, jobInProgress) {
		for _, it := range running {
			take(p.queuedJob(it, jobInProgress))
		}
	}
	if slices.Contains(q.states, jobPending) {
		for _, it := range pending {
			take(p.queuedJob(it, jobPending))
		}
	}
	for _, entry := range p.queue.historyEntries() {
		if slices.Contains(q.states, p.version.endState(entry)) {
			take(p.endedJob(entry))
		}
	}
	return jobs, ok
}

// sortJobs keeps the order of equal ones, in both directions, as Python's sorted does.
func sortJobs(jobs []object, q jobQuery) {
	key := func(job object) float64 {
		if !q.byDuration {
			created, _ := job.get("create_time")
			n, _ := asNumber(created)
			return n
		}
		start, _ := job.get("execution_start_time")
		end, _ := job.get("execution_end_time")
		from, hasFrom := asNumber(start)
		to, hasTo := asNumber(end)
		if !hasFrom || !hasTo {
			return 0
		}
		return to - from
	}
	slices.SortStableFunc(jobs, func(a, b object) int {
		if q.ascending {
			return cmp.Compare(key(a), key(b))
		}
		return cmp.Compare(key(b), key(a))
	})
}

// pruned is an object without its nulls.
func pruned(o object) object {
	return slices.DeleteFunc(o, func(f field) bool { return f.value == nil })
}

// queuedJob is a prompt in the queue; false: the server stumbles over it.
func (p *process) queuedJob(it *item, state string) (object, bool) {
	created, workflow, ok := jobMetadata(it.extra)
	job := object{{"id", it.id}, {"status", state}, {"priority", it.number}, {"create_time", created}, {"outputs_count", 0}}
	if p.version.countsPreviewable() {
		job = append(job, field{"previewable_outputs_count", 0})
	}
	return pruned(append(job, field{"workflow_id", workflow})), ok
}

// jobMetadata is create_time, and the id of the editor's graph. The server takes for granted that extra_pnginfo and the graph, where
// they are, are objects: else the answer is a 500.
func jobMetadata(extra any) (created, workflow any, ok bool) {
	o, ok := extra.(object)
	created, _ = o.get("create_time")
	for _, key := range []string{"extra_pnginfo", "workflow"} {
		inner, has := o.get(key)
		if !has {
			return created, nil, ok
		}
		if o, ok = inner.(object); !ok {
			return created, nil, false
		}
	}
	workflow, _ = o.get("id")
	return created, workflow, ok
}

// endState is how an entry of the history ended. A run that ended in an error before any node failed counts as completed.
func (v version) endState(entry *historyEntry) string {
	if entry.status == "success" {
		return jobCompleted
	}
	if v.atLeast(0, 9, 0) && slices.ContainsFunc(entry.messages, func(m message) bool { return m.event == "execution_interrupted" }) {
		return jobCancelled
	}
	return jobFailed
}

// endedJob is an entry of the history; false: the server stumbles over it.
func (p *process) endedJob(entry *historyEntry) (object, bool) {
	var start, end, failure any
	for _, m := range entry.messages {
		at, _ := m.data.get("timestamp")
		switch m.event {
		case "execution_start":
			start = at
		case "execution_success", "execution_interrupted":
			end = at
		case "execution_error":
			end, failure = at, m.data
		}
	}
	created, workflow, ok := jobMetadata(entry.extra)
	summary := p.version.summarize(entry.outputs)
	job := object{
		{"id", entry.item.id},
		{"status", p.version.endState(entry)},
		{"priority", entry.item.number},
		{"create_time", created},
		{"execution_start_time", start},
		{"execution_end_time", end},
		{"execution_error", failure},
		{"outputs_count", summary.count},
	}
	if p.version.countsPreviewable() {
		job = append(job, field{"previewable_outputs_count", summary.previewable})
	}
	return pruned(append(job, field{"preview_output", summary.preview}, field{"workflow_id", workflow})), ok && !summary.stumbles
}

// getJob reads the queue and then the history, so that a job which ends in between is in one of them; but an entry of the history comes
// before a copy in the queue.
func (p *process) getJob(r *request) *answer {
	id := r.vars["id"]
	running, pending := p.queue.snapshot()
	if entry, ended := p.queue.historyOf(id); ended {
		job, ok := p.endedJob(entry)
		return jobAnswer(append(job,
			field{"outputs", p.version.normalizedOutputs(entry.outputs)},
			field{"execution_status", entry.statusJSON()},
			field{"workflow", object{{"prompt", entry.item.prompt}, {"extra_data", entry.extra}}}), ok)
	}
	for _, it := range running {
		if it.id == id {
			return jobAnswer(p.queuedJob(it, jobInProgress))
		}
	}
	for _, it := range pending {
		if it.id == id {
			return jobAnswer(p.queuedJob(it, jobPending))
		}
	}
	return jsonError(http.StatusNotFound, object{{"error", "Job not found"}})
}

func jobAnswer(job object, ok bool) *answer {
	if !ok {
		return troubleAnswer()
	}
	return jsonAnswer(job)
}

func (p *process) postCancel(r *request) *answer {
	cancelled, err := p.cancelJob(r.vars["id"])
	if err != nil {
		return troubleAnswer()
	}
	return jsonAnswer(object{{"cancelled", cancelled}})
}

// cancelJob interrupts a running job or takes a pending one out of the queue; ended and unknown ones are left alone.
func (p *process) cancelJob(id string) (bool, error) {
	if p.queue.ifRunning(id, p.executor.raiseInterrupt) {
		return true, nil
	}
	removed, err := p.queue.remove(id)
	if removed || err != nil {
		return removed, err
	}
	return p.queue.ifRunning(id, p.executor.raiseInterrupt), nil
}

func (p *process) postCancelBatch(r *request) *answer {
	text, ok := r.text()
	if !ok {
		return troubleAnswer()
	}
	v, err := parseJSON(text)
	if err != nil {
		return badQuery("Request body must be valid JSON")
	}
	body, _ := v.(object)
	given, _ := body.get("job_ids")
	ids, isList := given.([]any)
	if !isList {
		return badQuery("job_ids must be a list")
	}
	var invalid []string
	for _, id := range ids {
		text, isText := id.(string)
		switch {
		case !isText:
			invalid = append(invalid, pyRepr(id))
		case !isCanonicalUUID(text):
			invalid = append(invalid, text)
		}
	}
	if invalid != nil {
		return jsonError(http.StatusBadRequest, object{{"error", "job_ids contains invalid id(s)"}, {"invalid_ids", invalid}})
	}
	cancelled := false
	for _, id := range ids {
		done, err := p.cancelJob(id.(string))
		if err != nil {
			return troubleAnswer()
		}
		cancelled = cancelled || done
	}
	return jsonAnswer(object{{"cancelled", cancelled}})
}

// jobSummary is what a listing says of a job's outputs.
type jobSummary struct {
	count, previewable int
	preview            any  // nil: none
	stumbles           bool // the server expects a name or format to be text, and it is not
}

// countsPreviewable: previewable_outputs_count is listed.
func (v version) countsPreviewable() bool { return v.atLeast(0, 32, 0) }

// summarize counts the outputs and chooses the one to show: a saved one, else any that can be shown, else a text.
func (v version) summarize(outputs object) jobSummary {
	var s jobSummary
	var choice previewChoice
	for _, node := range outputs {
		lists, _ := node.value.(object)
		for _, list := range lists {
			items, isList := list.value.([]any)
			if list.key == "animated" || !isList {
				continue
			}
			for _, value := range items {
				if v.counts(list.key, value) {
					s.count++
				}
				item, isEntry := v.outputEntry(value)
				s.stumbles = s.stumbles || isEntry && v.stumblesOver(list.key, item, choice.saved != nil)
				switch {
				case isEntry && v.isPreviewable(list.key, item):
					s.previewable++
					choice.offer(v, node.key, list.key, item)
				case !isEntry && list.key == "text" && v.atLeast(0, 16, 0):
					choice.offerText(v, node.key, pyStr(value))
				}
			}
		}
	}
	s.preview = choice.best()
	return s
}

// counts tells whether an item is in outputs_count, which each release saw otherwise.
func (v version) counts(key string, value any) bool {
	_, isObject := value.(object)
	_, isEntry := v.outputEntry(value)
	switch {
	case !v.atLeast(0, 12, 0):
		return isObject
	case !v.atLeast(0, 14, 0):
		return true
	case v.atLeast(0, 16, 0) && !v.atLeast(0, 30, 0):
		return isEntry || key == "text"
	default:
		return isEntry
	}
}

// previewChoice holds the first of each kind of preview.
type previewChoice struct{ saved, shown, textFile, text any }

func (c *previewChoice) offer(v version, node, key string, item object) {
	enriched := slices.Clone(item).set("nodeId", node)
	if _, has := item.get("mediaType"); !has || !v.atLeast(0, 14, 0) {
		enriched = enriched.set("mediaType", key)
	}
	kind, _ := item.get("type")
	switch {
	case v.atLeast(0, 30, 0) && isTextOutput(key, item):
		c.textFile = firstOf(c.textFile, enriched)
	case kind == kindOutput:
		c.saved = firstOf(c.saved, enriched)
	default:
		c.shown = firstOf(c.shown, enriched)
	}
}

// offerText: before 0.30.0 a text could stand before an image that is shown later.
func (c *previewChoice) offerText(v version, node, text string) {
	enriched := append(textPreview(text), field{"nodeId", node}, field{"mediaType", "text"})
	if v.atLeast(0, 30, 0) {
		c.text = firstOf(c.text, enriched)
	} else {
		c.shown = firstOf(c.shown, enriched)
	}
}

func (c *previewChoice) best() any {
	for _, choice := range []any{c.saved, c.shown, c.textFile, c.text} {
		if choice != nil {
			return choice
		}
	}
	return nil
}

func firstOf(present any, next object) any {
	if present != nil {
		return present
	}
	return next
}

// outputEntry is an item of an output list as a file's entry; since 0.14.0 the name of a 3D file is one too.
func (v version) outputEntry(value any) (object, bool) {
	switch value := value.(type) {
	case object:
		return value, true
	case string:
		if v.atLeast(0, 14, 0) && v.is3D(value) {
			return object{{"filename", value}, {"type", "output"}, {"subfolder", ""}, {"mediaType", "3d"}}, true
		}
	}
	return nil, false
}

func (v version) is3D(name string) bool {
	return hasExtension(name, ".obj", ".fbx", ".gltf", ".glb") || v.atLeast(0, 14, 0) && hasExtension(name, ".usdz")
}

func hasExtension(name string, extensions ...string) bool {
	lower := strings.ToLower(name)
	return slices.ContainsFunc(extensions, func(ext string) bool { return strings.HasSuffix(lower, ext) })
}

const maxTextPreview = 1024

func textPreview(text string) object {
	runes := []rune(text)
	if len(runes) <= maxTextPreview {
		return object{{"content", text}}
	}
	return object{{"content", string(runes[:maxTextPreview])}, {"truncated", true}}
}

// showsAll: whatever stands under the key can be shown.
func (v version) showsAll(key string) bool {
	switch key {
	case "images", "video", "audio":
		return true
	case "3d":
		return v.atLeast(0, 14, 0)
	case "text":
		return v.atLeast(0, 16, 0)
	}
	return false
}

// stumblesOver: asked whether an item can be shown, the server calls methods of text on what may be none. chosen: it has found a saved
// one, after which it asks only to count.
func (v version) stumblesOver(key string, item object, chosen bool) bool {
	isText := func(key string) bool {
		value, has := item.get(key)
		_, ok := value.(string)
		return ok || !has
	}
	if v.showsAll(key) { // then it looks for texts among them
		return v.atLeast(0, 30, 0) && !chosen && key != "text" && !isText("filename")
	}
	format, _ := item.get("format")
	empty := slices.Contains([]string{"None", "False", "0", "0.0", "[]", "{}"}, pyRepr(format))
	return (!chosen || v.countsPreviewable()) && (!isText("filename") || !isText("format") && !empty)
}

func (v version) isPreviewable(key string, item object) bool {
	if v.showsAll(key) {
		return true
	}
	if format := textOf(item, "format", ""); strings.HasPrefix(format, "video/") || strings.HasPrefix(format, "audio/") {
		return true
	}
	name := textOf(item, "filename", "")
	return v.is3D(name) || v.atLeast(0, 30, 0) && hasExtension(name, ".txt", ".md", ".json")
}

func isTextOutput(key string, item object) bool {
	return key == "text" || hasExtension(textOf(item, "filename", ""), ".txt", ".md", ".json")
}

// normalizedOutputs is what GET /api/jobs/{id} makes of the outputs since 0.14.0: nulls go, names of 3D files become entries.
func (v version) normalizedOutputs(outputs object) object {
	if !v.atLeast(0, 14, 0) {
		return outputs
	}
	normalized := object{}
	for _, node := range outputs {
		lists, isObject := node.value.(object)
		if !isObject {
			normalized = append(normalized, node)
			continue
		}
		kept := object{}
		for _, list := range lists {
			items, isList := list.value.([]any)
			if list.key == "animated" || !isList {
				kept = append(kept, list)
				continue
			}
			var values []any
			for _, value := range items {
				if value == nil {
					continue
				}
				if entry, isEntry := v.outputEntry(value); isEntry {
					value = entry
				}
				values = append(values, value)
			}
			kept = append(kept, field{list.key, append([]any{}, values...)})
		}
		normalized = append(normalized, field{node.key, kept})
	}
	return normalized
}
