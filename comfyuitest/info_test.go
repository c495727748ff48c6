package comfyuitest

import (
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
)

func TestRoutes(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		for _, c := range []struct {
			method, path string
			status       int
			allow        string
		}{
			{"GET", "/nonsense", 404, ""},
			{"GET", "/api/nonsense", 404, ""},
			{"GET", "/history/", 404, ""},
			{"GET", "/history/%7Bx%7D", 404, ""},
			{"POST", "/nonsense", 405, "GET,HEAD"},
			{"PUT", "/prompt", 405, "GET,HEAD,POST"},
			{"DELETE", "/api/queue", 405, "GET,HEAD,POST"},
			{"OPTIONS", "/prompt", 200, ""},
			{"GET", "/api/internal/logs", 404, ""},
			{"GET", "/internal/logs", 200, ""},
			{"POST", "/internal/logs", 405, "GET,HEAD"},
			{"GET", "/internal/logs/subscribe", 405, "PATCH"},
			{"POST", "/internal/nonsense", 404, ""},
			{"POST", "/internal", 404, ""},
			{"POST", "//prompt", 404, ""},
			{"GET", "//prompt", 404, ""},
			{"GET", "/models", 200, ""},
			{"GET", "/models/loras", 200, ""},
			{"GET", "/models/unknown", 404, ""},
			{"GET", "/embeddings", 200, ""},
			{"GET", "/extensions", 200, ""},
			{"GET", "/view_metadata/loras?filename=x.safetensors", 404, ""},
			{"GET", "/users", 200, ""},
			{"GET", "/", 200, ""},
			{"GET", "/api/assets", 503, ""},
			{"GET", "/internal/files/bogus", 400, ""},
			{"GET", "/object_info/Unknown", 200, ""},
			{"POST", "/free", 500, ""},
		} {
			r := do(t, p, c.method, c.path, "")
			require.Equal(t, c.status, r.status, c.path)
			require.Equal(t, c.allow, r.header.Get("Allow"), c.path)
		}
		require.Equal(t, object{}, get(t, p, "/object_info/Unknown"))
		all := get(t, p, "/object_info").(object)
		require.Equal(t, at(t, all, "EmptyImage"), at(t, get(t, p, "/object_info/EmptyImage"), "EmptyImage"))
		_, has := all.get("Mine")
		require.True(t, has)
		device := at(t, get(t, p, "/system_stats"), "devices", 0)
		for _, key := range []string{"name", "type", "index", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free"} {
			at(t, device, key)
		}
	}, WithNode("Mine", Node{}))
}

func TestOrigins(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		version, origin, site string
		status                int
	}{
		{"0.33.0", "http://example.com", "", 403},
		{"0.33.0", "http://POD:1", "", 200},
		{"0.33.0", "http://POD", "", 200},
		{"0.33.0", "http://POD:9999", "", 403},
		{"0.33.0", "null", "", 200},
		{"0.33.0", "", "cross-site", 403},
		{"0.33.0", "", "same-origin", 200},
		{"0.3.64", "", "cross-site", 200},
		{"0.3.64", "http://example.com", "", 403},
	} {
		bubble(t, func(t *testing.T, p *Pod) {
			header := http.Header{}
			if c.origin != "" {
				host, _, err := net.SplitHostPort(p.addr)
				require.NoError(t, err)
				header.Set("Origin", strings.Replace(c.origin, "POD", host, 1))
			}
			if c.site != "" {
				header.Set("Sec-Fetch-Site", c.site)
			}
			r, err := send(p, http.MethodGet, "/prompt", "", header)
			require.NoError(t, err)
			require.Equal(t, c.status, r.status, "%+v", c)
		}, WithVersion(c.version))
	}
}

func TestFeatures(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]string{
		"0.3.64": `{"supports_preview_metadata": true, "max_upload_size": 104857600}`,
		"0.27.0": `{"supports_preview_metadata": true, "max_upload_size": 104857600, "extension": {"manager": {"supports_v4": true}}, "node_replacements": true, "assets": false}`,
		"0.33.0": `{"supports_preview_metadata": true, "supports_model_type_tags": true, "max_upload_size": 104857600, "extension": {"manager": {"supports_v4": true}}, "node_replacements": true, "assets": false}`,
	} {
		bubble(t, func(t *testing.T, p *Pod) {
			require.Equal(t, want, string(do(t, p, http.MethodGet, "/api/features", "").body))
		}, WithVersion(version))
	}
	bubble(t, func(t *testing.T, p *Pod) {
		require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/features", "").status)
	}, WithVersion("0.3.44"))
}

func TestLogs(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		s := dial(t, p, "me")
		s.until("status")
		subscribe := func(body string) int {
			return do(t, p, http.MethodPatch, "/internal/logs/subscribe", body).status
		}
		require.Equal(t, 500, subscribe(`{"clientId": "me"}`))
		require.Equal(t, 500, subscribe(``))
		require.Equal(t, 200, subscribe(`{"clientId": "me", "enabled": true}`))
		queue1(t, p, graphOf("1", "Work", nil), "")
		require.Equal(t, `{"entries": [{"t": "2000-01-01T00:00:00.000000", "m": "got prompt\n"}], "size": null}`, string(pyJSON(s.until("logs").data0(t))))
		require.Equal(t, "Prompt executed in 0.00 seconds\n", at(t, s.until("logs").data0(t), "entries", 0, "m"))
		require.Equal(t, 200, subscribe(`{"clientId": "me", "enabled": false}`))
		queue1(t, p, graphOf("1", "Work", nil), "")
		require.NoError(t, p.WaitIdle(t.Context()))
		synctest.Wait()
		require.NotContains(t, s.pending(), "logs")
		require.Len(t, at(t, get(t, p, "/internal/logs/raw"), "entries"), 4)
		require.Contains(t, string(do(t, p, http.MethodGet, "/internal/logs", "").body), "got prompt")
		for range 400 {
			p.process.log("line\n", false)
		}
		require.Len(t, at(t, get(t, p, "/internal/logs/raw"), "entries"), maxLogLines)
	}, WithVersion("0.3.64"), WithNode("Work", Node{Output: true}))
}

func TestUserdata(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		put := func(path, body string) reply { return do(t, p, http.MethodPost, path, body) }
		require.Equal(t, []any{}, get(t, p, "/v2/userdata"))
		require.Equal(t, `"workflows/a.json"`, string(put("/userdata/workflows%2Fa.json", "one").body))
		require.Equal(t, http.StatusConflict, put("/userdata/workflows%2Fa.json?overwrite=false", "two").status)
		require.Equal(t, int64(3), at(t, put("/userdata/workflows%2Fsub%2Fb.json?full_info=true", "two").json(t), "size"))
		require.Equal(t, http.StatusForbidden, put("/userdata/..%2Fx", "x").status)
		require.Equal(t, "one", string(do(t, p, http.MethodGet, "/userdata/workflows%2Fa.json", "").body))
		require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/userdata/nope", "").status)
		require.Equal(t, `["a.json"]`, string(do(t, p, http.MethodGet, "/userdata?dir=workflows", "").body))
		require.Equal(t, `[["a.json", "a.json"], ["sub/b.json", "sub", "b.json"]]`,
			string(do(t, p, http.MethodGet, "/userdata?dir=workflows&recurse=true&split=true", "").body))
		require.Equal(t, "sub/b.json", at(t, get(t, p, "/userdata?dir=workflows&recurse=true&full_info=true"), 1, "path"))
		require.Equal(t, http.StatusBadRequest, do(t, p, http.MethodGet, "/userdata?dir=", "").status)
		require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/userdata?dir=nope", "").status)
		require.Equal(t, http.StatusForbidden, do(t, p, http.MethodGet, "/userdata?dir=..", "").status)
		require.Equal(t, "directory", at(t, get(t, p, "/v2/userdata"), 0, "type"))
		require.Len(t, get(t, p, "/v2/userdata?path=workflows"), 3)
		require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/v2/userdata?path=nope", "").status)
		require.Equal(t, `"moved.json"`, string(put("/userdata/workflows%2Fa.json/move/moved.json", "").body))
		require.Equal(t, http.StatusNotFound, do(t, p, http.MethodGet, "/userdata/workflows%2Fa.json", "").status)
		require.Equal(t, http.StatusNoContent, do(t, p, http.MethodDelete, "/userdata/moved.json", "").status)
		require.Equal(t, http.StatusNotFound, do(t, p, http.MethodDelete, "/userdata/moved.json", "").status)
	})
}

// TestSystemStatsGrew: each release told more of itself.
func TestSystemStatsGrew(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		version             string
		frontend, templates bool
	}{{"0.3.45", false, false}, {"0.3.46", true, false}, {"0.3.60", true, false}, {"0.3.61", true, true}} {
		bubble(t, func(t *testing.T, p *Pod) {
			system := at(t, get(t, p, "/system_stats"), "system").(object)
			_, frontend := system.get("required_frontend_version")
			_, templates := system.get("required_templates_version")
			require.Equal(t, c.frontend, frontend, c.version)
			require.Equal(t, c.templates, templates, c.version)
		}, WithVersion(c.version))
	}
}

// TestAssets: they came without a flag, and got one with 0.17.0.
func TestAssets(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		version string
		status  int
	}{{"0.8.2", 404}, {"0.9.0", 200}, {"0.16.4", 200}, {"0.17.0", 503}} {
		bubble(t, func(t *testing.T, p *Pod) {
			r := do(t, p, http.MethodGet, "/api/assets", "")
			require.Equal(t, c.status, r.status, c.version)
			if c.status == http.StatusOK {
				require.Equal(t, `{"assets": [], "total": 0, "has_more": false}`, string(r.body))
			}
		}, WithVersion(c.version))
	}
}
