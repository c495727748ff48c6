package comfyuitest

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestJobs lists a pending, a running, a completed, a failed and a cancelled job.
func TestJobs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ version, cancelled string }{{"0.6.0", "failed"}, {"0.9.0", "cancelled"}, {"0.33.0", "cancelled"}} {
		t.Run(c.version, func(t *testing.T) {
			t.Parallel()
			gated(t, true, func(t *testing.T, p *Pod, g *gate) {
				work := func(class string, n int) string {
					r := submit(t, p, graphOf("1", class, object{{"n", n}}), "", `"extra_data": {"extra_pnginfo": {"workflow": {"id": "w`+class+`"}}}`)
					require.Equal(t, http.StatusOK, r.status)
					return at(t, r.json(t), "prompt_id").(string)
				}
				done, failed := work("Work", 0), work("Fail", 0)
				require.NoError(t, p.WaitIdle(t.Context()))
				stopped := work("Gate", 0)
				<-g.entered
				p.Interrupt()
				g.pass <- struct{}{}
				running, pending := work("Gate", 1), work("Work", 1)
				<-g.entered

				list := func(query string) []string {
					ids := []string{}
					for _, job := range at(t, get(t, p, "/api/jobs"+query), "jobs").([]any) {
						ids = append(ids, at(t, job, "id").(string)+" "+at(t, job, "status").(string))
					}
					return ids
				}
				// They were made in the same moment of the bubble, so that the listing keeps its own order.
				all := []string{running + " in_progress", pending + " pending", done + " completed", failed + " failed", stopped + " " + c.cancelled}
				require.Equal(t, all, list(""))
				require.Equal(t, all[:2], list("?status=pending,%20IN_PROGRESS,"))
				require.Equal(t, all[2:3], list("?status=completed"))
				require.Equal(t, all[1:3], list("?limit=2&offset=1"))
				require.Equal(t, all, list("?offset=-3&sort_by=Execution_Duration&sort_order=ASC"))
				require.Equal(t, []string{all[1], all[2]}, list("?workflow_id=wWork"))
				require.Empty(t, list("?offset=99"))
				require.Equal(t, `{"offset": 1, "limit": 2, "total": 5, "has_more": true}`,
					string(pyJSON(at(t, get(t, p, "/api/jobs?limit=2&offset=1"), "pagination"))))
				require.Equal(t, `{"offset": 0, "limit": null, "total": 5, "has_more": false}`,
					string(pyJSON(at(t, get(t, p, "/api/jobs"), "pagination"))))
				for query, message := range map[string]string{
					"sort_by=x": "sort_by must be 'created_at' or 'execution_duration'", "sort_order=up": "sort_order must be 'asc' or 'desc'",
					"limit=0": "limit must be a positive integer", "limit=x": "limit must be an integer", "offset=x": "offset must be an integer",
				} {
					r := do(t, p, http.MethodGet, "/api/jobs?"+query, "")
					require.Equal(t, http.StatusBadRequest, r.status)
					require.Equal(t, message, at(t, r.json(t), "error"))
				}
				require.Contains(t, string(do(t, p, http.MethodGet, "/api/jobs?status=bogus", "").body), "Invalid status value(s): bogus. Valid values: pending, ")

				job := get(t, p, "/api/jobs/"+done)
				require.Equal(t, "success", at(t, job, "execution_status", "status_str"))
				require.Equal(t, "Work", at(t, job, "workflow", "prompt", "1", "class_type"))
				require.Equal(t, int64(1), at(t, job, "outputs_count"))
				require.Equal(t, "steps_00001_.png", at(t, job, "preview_output", "filename"))
				require.Equal(t, "1", at(t, job, "preview_output", "nodeId"))
				require.Equal(t, "ValueError", at(t, get(t, p, "/api/jobs/"+failed), "execution_error", "exception_type"))
				require.Equal(t, "in_progress", at(t, get(t, p, "/api/jobs/"+running), "status"))
				require.Equal(t, "pending", at(t, get(t, p, "/api/jobs/"+pending), "status"))
				r := do(t, p, http.MethodGet, "/api/jobs/unknown", "")
				require.Equal(t, http.StatusNotFound, r.status)
				require.Equal(t, `{"error": "Job not found"}`, string(r.body))
				require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/jobs", "").status, "only under /api")
				g.pass <- struct{}{}
			}, WithVersion(c.version), WithNode("Work", Steps(1, 0)), WithNode("Fail", Fail("ValueError", "x")))
		})
	}
}

// TestJobsTheServerStumblesOver: seen on 0.27.0; the queue and the history show such jobs all the same.
func TestJobsTheServerStumblesOver(t *testing.T) {
	t.Parallel()
	for info, want := range map[string]int{
		`null`: 500, `[]`: 500, `{"workflow": null}`: 500, `{"workflow": [1]}`: 500, `{"workflow": {}}`: 200, `{}`: 200,
	} {
		t.Run(info, func(t *testing.T) {
			t.Parallel()
			gated(t, true, func(t *testing.T, p *Pod, g *gate) {
				r := submit(t, p, graphOf("1", "Gate", nil), "", `"extra_data": {"extra_pnginfo": `+info+`}`)
				require.Equal(t, http.StatusOK, r.status)
				id := at(t, r.json(t), "prompt_id").(string)
				<-g.entered
				ask := func() {
					for _, path := range []string{"/api/jobs/" + id, "/api/jobs"} {
						require.Equal(t, want, do(t, p, http.MethodGet, path, "").status, path)
					}
					require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/api/jobs/other", "").status)
				}
				ask()
				require.Equal(t, []string{id}, queueIDs(t, p, "queue_running"))
				g.pass <- struct{}{}
				require.NoError(t, p.WaitIdle(t.Context()))
				ask()
				require.Equal(t, http.StatusOK, do(t, p, http.MethodGet, "/history/"+id, "").status)
			})
		})
	}
	v := func(text string) version {
		v, err := parseVersion(text)
		require.NoError(t, err)
		return v
	}
	file := func(name, format any) object {
		return object{{"filename", name}, {"format", format}, {"type", "output"}}
	}
	for _, c := range []struct {
		version, key string
		items        []any
		want         bool
	}{
		{"0.27.0", "files", []any{file("a.bin", nil)}, false},
		{"0.27.0", "files", []any{file(nil, nil)}, true},
		{"0.27.0", "files", []any{file("a.bin", int64(3))}, true},
		{"0.27.0", "files", []any{file("a.glb", nil), file(nil, nil)}, false}, // it looks no further
		{"0.33.0", "files", []any{file("a.glb", nil), file(nil, nil)}, true},  // it counts
		{"0.27.0", "images", []any{file(nil, nil)}, false},
		{"0.33.0", "images", []any{file(nil, nil)}, true},
		{"0.33.0", "images", []any{file("a.png", nil), file(nil, nil)}, false},
	} {
		require.Equal(t, c.want, v(c.version).summarize(object{{"1", object{{c.key, c.items}}}}).stumbles, "%s %s %v", c.version, c.key, c.items)
	}
}

// TestJobIsSomewhereAsItEnds: a job that ends while it is asked for is in the queue or in the history, as on the server.
func TestJobIsSomewhereAsItEnds(t *testing.T) {
	t.Parallel()
	p := &process{version: newestVersion, queue: newQueue(10, func(int) {})}
	for range 20_000 {
		it := &item{number: int64(1), id: idA, extra: object{}}
		p.queue.removeHistory(idA)
		p.queue.running = []*item{it}
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.queue.done(it, &historyEntry{item: it, extra: object{}, status: "success"})
		}()
		require.NotEqual(t, http.StatusNotFound, p.getJob(&request{vars: map[string]string{"id": idA}}).status)
		<-done
	}
}

func TestJobsBeforeThereWereAny(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		for _, path := range []string{"/api/jobs", "/api/jobs/x"} {
			r := do(t, p, http.MethodGet, path, "")
			require.Equal(t, http.StatusNotFound, r.status)
			require.Empty(t, r.body)
			require.Equal(t, "application/octet-stream", r.header.Get("Content-Type"))
		}
		r := do(t, p, http.MethodPost, "/api/jobs/x/cancel", "")
		require.Equal(t, http.StatusMethodNotAllowed, r.status)
		require.Equal(t, "405: Method Not Allowed", string(r.body))
		require.Equal(t, "GET,HEAD", r.header.Get("Allow"))
	}, WithVersion("0.5.1"))
}

func TestCancelRoutes(t *testing.T) {
	t.Parallel()
	gated(t, true, func(t *testing.T, p *Pod, g *gate) {
		cancel := func(id string) any {
			r := do(t, p, http.MethodPost, "/api/jobs/"+id+"/cancel", "")
			require.Equal(t, http.StatusOK, r.status)
			return at(t, r.json(t), "cancelled")
		}
		running := queue1(t, p, graphOf("1", "Gate", nil), "")
		<-g.entered
		pending := queue1(t, p, graphOf("1", "Work", nil), "")
		require.Equal(t, true, cancel(pending))
		require.Equal(t, false, cancel(pending), "it has vanished")
		require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/api/jobs/"+pending, "").status)
		require.Equal(t, object{}, get(t, p, "/history/"+pending))
		require.Equal(t, true, cancel(running))
		require.Equal(t, true, cancel(running), "until it ends")
		require.Equal(t, false, cancel("unknown"))
		g.pass <- struct{}{}
		require.NoError(t, p.WaitIdle(t.Context()))
		require.Equal(t, false, cancel(running))
		require.Equal(t, "cancelled", at(t, get(t, p, "/api/jobs/"+running), "status"))

		running = queue1(t, p, graphOf("1", "Gate", object{{"n", 2}}), "")
		<-g.entered
		pending = queue1(t, p, graphOf("1", "Work", nil), "")
		batch := func(body string) reply { return do(t, p, http.MethodPost, "/api/jobs/cancel", body) }
		r := batch(`{"job_ids": ["` + pending + `", "nope", 5]}`)
		require.Equal(t, http.StatusBadRequest, r.status)
		require.Equal(t, `{"error": "job_ids contains invalid id(s)", "invalid_ids": ["nope", "5"]}`, string(r.body))
		require.Equal(t, []string{pending}, queueIDs(t, p, "queue_pending"), "none is cancelled")
		for body, message := range map[string]string{"": "Request body must be valid JSON", "{": "Request body must be valid JSON", "[]": "job_ids must be a list", `{"job_ids": 1}`: "job_ids must be a list"} {
			r := batch(body)
			require.Equal(t, http.StatusBadRequest, r.status)
			require.Equal(t, message, at(t, r.json(t), "error"), body)
		}
		require.Equal(t, `{"cancelled": false}`, string(batch(`{"job_ids": ["`+idA+`"]}`).body))
		require.Equal(t, `{"cancelled": true}`, string(batch(`{"job_ids": ["`+idA+`", "`+pending+`", "`+running+`"]}`).body))
		g.pass <- struct{}{}
		require.NoError(t, p.WaitIdle(t.Context()))
		event, _ := terminal(t, p, running)
		require.Equal(t, "execution_interrupted", event)
	}, WithNode("Work", Node{Output: true}))

	bubble(t, func(t *testing.T, p *Pod) {
		require.Equal(t, http.StatusMethodNotAllowed, do(t, p, http.MethodPost, "/api/jobs/x/cancel", "").status)
		require.Equal(t, http.StatusMethodNotAllowed, do(t, p, http.MethodPost, "/api/jobs/cancel", `{}`).status)
	}, WithVersion("0.25.0"))
}

// TestOutputSummary: each release counts and shows outputs its own way.
func TestOutputSummary(t *testing.T) {
	t.Parallel()
	file := func(name, kind string) object {
		return object{{"filename", name}, {"subfolder", ""}, {"type", kind}}
	}
	outputs := object{{"1", object{
		{"text", []any{"hello"}},
		{"images", []any{file("t.png", "temp"), nil}},
		{"result", []any{"x.glb", "words"}},
		{"files", []any{file("n.md", "output"), file("o.bin", "output")}},
		{"animated", []any{true}},
	}}}
	for _, c := range []struct {
		version            string
		count, previewable int
		preview            string
	}{
		{"0.6.0", 3, 1, `{"filename": "t.png", "subfolder": "", "type": "temp", "nodeId": "1", "mediaType": "images"}`},
		{"0.12.0", 7, 1, `{"filename": "t.png", "subfolder": "", "type": "temp", "nodeId": "1", "mediaType": "images"}`},
		{"0.14.0", 4, 2, `{"filename": "x.glb", "type": "output", "subfolder": "", "mediaType": "3d", "nodeId": "1"}`},
		{"0.27.0", 5, 2, `{"filename": "x.glb", "type": "output", "subfolder": "", "mediaType": "3d", "nodeId": "1"}`},
		{"0.33.0", 4, 3, `{"filename": "x.glb", "type": "output", "subfolder": "", "mediaType": "3d", "nodeId": "1"}`},
	} {
		v, err := parseVersion(c.version)
		require.NoError(t, err)
		s := v.summarize(outputs)
		require.Equal(t, c.count, s.count, c.version)
		require.Equal(t, c.previewable, s.previewable, c.version)
		require.Equal(t, c.preview, string(pyJSON(s.preview)), c.version)
	}
	texts := object{{"1", object{{"text", []any{"hello"}}, {"files", []any{file("n.md", "output")}}}}}
	for version, want := range map[string]string{
		"0.15.0": `null`, "0.16.0": `{"content": "hello", "nodeId": "1", "mediaType": "text"}`,
		"0.30.0": `{"filename": "n.md", "subfolder": "", "type": "output", "nodeId": "1", "mediaType": "files"}`,
	} {
		v, err := parseVersion(version)
		require.NoError(t, err)
		require.Equal(t, want, string(pyJSON(v.summarize(texts).preview)), version)
	}
	old, _ := parseVersion("0.13.0")
	require.Equal(t, outputs, old.normalizedOutputs(outputs))
	fresh, _ := parseVersion("0.14.0")
	lists, _ := fresh.normalizedOutputs(outputs)[0].value.(object)
	images, _ := lists.get("images")
	require.Len(t, images, 1, "nulls go")
	results, _ := lists.get("result")
	require.Equal(t, "3d", at(t, results, 0, "mediaType"))
	require.Equal(t, "words", at(t, results, 1))
}
