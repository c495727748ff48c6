package comfyuitest

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"io"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestPostPromptForms(t *testing.T) {
	t.Parallel()
	graph := graphOf("1", "Work", nil)
	bubble(t, func(t *testing.T, p *Pod) {
		for _, c := range []struct {
			body   string
			status int
			kind   string // of the error
			number bool   // whether a number is used up
		}{
			{`{"prompt": ` + graph + `}`, 200, "", true},
			{``, 500, "", false},
			{`{`, 500, "", false},
			{`null`, 500, "", false},
			{`7`, 500, "", false},
			{`[]`, 400, "no_prompt", true},
			{`"text"`, 400, "no_prompt", true},
			{`["prompt"]`, 500, "", true},
			{`"front"`, 500, "", false},
			{`["number"]`, 500, "", false},
			{`{}`, 400, "no_prompt", true},
			{`{"prompt": null}`, 500, "", true},
			{`{"prompt": 5}`, 500, "", true},
			{`{"prompt": "text"}`, 500, "", true},
			{`{"prompt": [1]}`, 500, "", true},
			{`{"prompt": []}`, 500, "", true},
			{`{"prompt": {}}`, 400, "prompt_no_outputs", true},
			{`{"prompt": {"1": null}}`, 500, "", true},
			{`{"prompt": {"nodes": [], "links": []}}`, 500, "", true},
			{`{"prompt": ` + graph + `, "extra_data": null}`, 500, "", true},
			{`{"prompt": ` + graph + `, "extra_data": [], "client_id": "x"}`, 500, "", true},
			{`{"prompt": ` + graph + `, "number": "x"}`, 500, "", false},
			{`{"prompt": ` + graph + `, "number": 3}`, 200, "", false},
			{`{"prompt": ` + graph + `, "partial_execution_targets": ["1"]}`, 200, "", true},
			{`{"prompt": ` + graph + `, "partial_execution_targets": null}`, 200, "", true},
			{`{"prompt": ` + graph + `, "partial_execution_targets": []}`, 400, "prompt_no_outputs", true},
			{`{"prompt": ` + graph + `, "partial_execution_targets": ["2"]}`, 400, "prompt_no_outputs", true},
			{`{"prompt": ` + graph + `, "partial_execution_targets": 5}`, 500, "", true},
			{`{"prompt": ` + graph + `, "client_id": 5}`, 200, "", true},
			{`{"prompt": ` + graph + `, "client_id": null}`, 200, "", true},
		} {
			before := p.process.number
			r := do(t, p, http.MethodPost, "/prompt", c.body)
			require.Equal(t, c.status, r.status, "%s: %s", c.body, r.body)
			if c.kind != "" {
				require.Equal(t, c.kind, at(t, r.json(t), "error", "type"), c.body)
				require.Equal(t, object{}, at(t, r.json(t), "node_errors"))
			}
			if c.status == 500 {
				require.Equal(t, "500 Internal Server Error\n\nServer got itself in trouble", string(r.body))
				require.Equal(t, "text/plain; charset=utf-8", r.header.Get("Content-Type"))
			}
			require.Equal(t, c.number, p.process.number > before, c.body)
		}
	}, WithNode("Work", Node{Output: true}))
}

// TestNoGraphOnOldServers: until 0.14.0 an empty list or text was a graph without outputs.
func TestNoGraphOnOldServers(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		for body, status := range map[string]int{`[]`: 400, `""`: 400, `[1]`: 500, `"x"`: 500, `5`: 500} {
			require.Equal(t, status, do(t, p, http.MethodPost, "/prompt", `{"prompt": `+body+`}`).status, body)
		}
	}, WithVersion("0.13.0"))
}

func TestPromptIDForms(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ version, given, want string }{ // "": the server's own; "400": refused
		{"0.3.44", `"` + idA + `"`, ""},
		{"0.3.45", `"` + idA + `"`, idA},
		{"0.3.64", `"MY JOB"`, "MY JOB"},
		{"0.3.64", `null`, "None"},
		{"0.3.64", `12345`, "12345"},
		{"0.3.64", `["a"]`, "['a']"},
		{"0.24.0", `"x"`, "x"},
		{"0.25.0", `"` + idA + `"`, idA},
		{"0.25.0", `null`, ""},
		{"0.25.0", `""`, "400"},
		{"0.25.0", `"00000000-0000-4000-8000-00000000000A"`, "400"},
		{"0.25.0", `"0000000000004000800000000000000a"`, "400"},
		{"0.25.0", `"{` + idA + `}"`, "400"},
		{"0.25.0", `"urn:uuid:` + idA + `"`, "400"},
		{"0.25.0", `7`, "400"},
	} {
		bubble(t, func(t *testing.T, p *Pod) {
			r := submit(t, p, graphOf("1", "Work", nil), "", `"prompt_id": `+c.given)
			if c.want == "400" {
				require.Equal(t, http.StatusBadRequest, r.status)
				require.Equal(t, "invalid_prompt_id", at(t, r.json(t), "error", "type"))
				return
			}
			require.Equal(t, http.StatusOK, r.status)
			id := at(t, r.json(t), "prompt_id").(string)
			if c.want == "" {
				require.True(t, isCanonicalUUID(id))
				require.NotEqual(t, idA, id)
			} else {
				require.Equal(t, c.want, id)
			}
		}, WithVersion(c.version), WithNode("Work", Node{Output: true}))
	}
}

func TestExtraData(t *testing.T) {
	t.Parallel()
	const secret = `"api_key_comfy_org": "sk"`
	for _, c := range []struct {
		version        string
		queue, history bool // whether the secret shows
		created        bool
	}{{"0.3.40", true, true, false}, {"0.3.45", true, false, false}, {"0.3.68", false, false, false}, {"0.3.69", false, false, true}} {
		t.Run(c.version, func(t *testing.T) {
			t.Parallel()
			gated(t, false, func(t *testing.T, p *Pod, g *gate) {
				r := submit(t, p, graphOf("1", "Gate", nil), "me", `"extra_data": {"marker": 1.50, `+secret+`, "client_id": "old"}`)
				id := at(t, r.json(t), "prompt_id").(string)
				<-g.entered
				extra := at(t, get(t, p, "/queue"), "queue_running", 0, 3).(object)
				require.Equal(t, "marker", extra[0].key)
				require.Equal(t, "me", at(t, extra, "client_id"), "copied into it, in place")
				_, shown := extra.get("api_key_comfy_org")
				require.Equal(t, c.queue, shown)
				_, created := extra.get("create_time")
				require.Equal(t, c.created, created)
				g.pass <- struct{}{}
				require.NoError(t, p.WaitIdle(t.Context()))
				extra = at(t, get(t, p, "/history/"+id), id, "prompt", 3).(object)
				_, shown = extra.get("api_key_comfy_org")
				require.Equal(t, c.history, shown)
			}, WithVersion(c.version))
		})
	}
}

// TestExtraDataKillsOldWorkers: what Python cannot search for client_id passes an old POST and ends the worker.
func TestExtraDataKillsOldWorkers(t *testing.T) {
	t.Parallel()
	for given, dies := range map[string]bool{`null`: true, `5`: true, `[]`: false, `"x"`: false} {
		bubble(t, func(t *testing.T, p *Pod) {
			r := submit(t, p, graphOf("1", "Work", nil), "", `"extra_data": `+given)
			require.Equal(t, http.StatusOK, r.status)
			id := at(t, r.json(t), "prompt_id").(string)
			if !dies {
				require.NoError(t, p.WaitIdle(t.Context()))
				require.Equal(t, 1, p.Runs(id))
				return
			}
			<-p.process.executor.life.Done()
			require.Equal(t, []string{id}, queueIDs(t, p, "queue_running"))
			require.Zero(t, p.Runs(id))
		}, WithVersion("0.3.64"), WithNode("Work", Node{Output: true}))
	}
}

func TestCompressedBodies(t *testing.T) {
	t.Parallel()
	body := []byte(`{"prompt": ` + graphOf("1", "Work", nil) + `}`)
	var gzipped, deflated bytes.Buffer
	for _, w := range []io.WriteCloser{gzip.NewWriter(&gzipped), zlib.NewWriter(&deflated)} {
		_, err := w.Write(body)
		require.NoError(t, err)
		require.NoError(t, w.Close())
	}
	bubble(t, func(t *testing.T, p *Pod) {
		for coding, data := range map[string]string{"gzip": gzipped.String(), "deflate": deflated.String()} {
			r, err := send(p, http.MethodPost, "/prompt", data, http.Header{"Content-Encoding": {coding}})
			require.NoError(t, err)
			require.Equal(t, http.StatusOK, r.status)
			r, err = send(p, http.MethodPost, "/prompt", "no such thing", http.Header{"Content-Encoding": {coding}})
			require.NoError(t, err)
			require.Equal(t, http.StatusInternalServerError, r.status)
		}
		r, err := send(p, http.MethodPost, "/prompt", string(body), http.Header{"Content-Encoding": {"br"}})
		require.NoError(t, err)
		require.Equal(t, http.StatusBadRequest, r.status)
		for accept, want := range map[string]string{"gzip, deflate": "deflate", "gzip": "gzip", "identity": "", "deflate": ""} {
			r, err := send(p, http.MethodGet, "/prompt", "", http.Header{"Accept-Encoding": {accept}})
			require.NoError(t, err)
			require.Equal(t, want, r.header.Get("Content-Encoding"))
			var plain io.Reader = bytes.NewReader(r.body)
			switch want {
			case "gzip":
				plain, err = gzip.NewReader(plain)
			case "deflate":
				plain, err = zlib.NewReader(plain)
			}
			require.NoError(t, err)
			text, err := io.ReadAll(plain)
			require.NoError(t, err)
			require.Equal(t, `{"exec_info": {"queue_remaining": 0}}`, string(text))
		}
		r, err = send(p, http.MethodPost, "/free", "", http.Header{"Accept-Encoding": {"gzip"}})
		require.NoError(t, err)
		require.Equal(t, http.StatusInternalServerError, r.status)
		require.Empty(t, r.header.Get("Content-Encoding"))
	}, WithCompression(), WithNode("Work", Node{Output: true}))
}

// TestClientIDThatKillsTheServer: a list or an object cannot be looked up among the sockets, which ends the publish loop and
// with it the process.
func TestClientIDThatKillsTheServer(t *testing.T) {
	t.Parallel()
	for _, id := range []string{`["x"]`, `{"a": 1}`} {
		bubble(t, func(t *testing.T, p *Pod) {
			s := dial(t, p, "me")
			s.until("status")
			_, _ = try(p, http.MethodPost, "/prompt", `{"prompt": `+graphOf("1", "Work", nil)+`, "client_id": `+id+`}`)
			require.Error(t, s.end())
			_, err := try(p, http.MethodGet, "/prompt", "")
			require.ErrorIs(t, err, syscall.ECONNREFUSED)
			p.Restart(time.Minute)
			require.NoError(t, p.WaitIdle(t.Context()))
			require.Equal(t, object{}, get(t, p, "/history"))
		}, WithNode("Work", Node{Output: true}))
	}
}

// TestIncompleteNodes: from 0.14.0 to 0.15.0 the search for replaced nodes stumbled over them.
func TestIncompleteNodes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		version string
		status  int
	}{{"0.13.0", 400}, {"0.14.0", 500}, {"0.15.0", 500}, {"0.15.1", 400}} {
		bubble(t, func(t *testing.T, p *Pod) {
			require.Equal(t, c.status, submit(t, p, `{"1": {"inputs": {}}}`, "", "").status, c.version)
			require.Equal(t, c.status, submit(t, p, `{"1": {"class_type": "SaveImage"}}`, "", "").status, c.version)
		}, WithVersion(c.version))
	}
}
