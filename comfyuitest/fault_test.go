package comfyuitest

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFaultEffects(t *testing.T) {
	t.Parallel()
	isReset := func(t *testing.T, err error) {
		t.Helper()
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	for _, c := range []struct {
		name   string
		fault  Fault
		reply  func(t *testing.T, r reply, err error)
		queued int // at once
		later  int // after the delay
	}{
		{"answer", Fault{Effect: Answer, Status: 429, Header: http.Header{"retry-after": {"7"}}, Body: "slow down"}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 429, r.status)
			require.Equal(t, "7", r.header.Get("Retry-After"))
			require.Equal(t, "slow down", string(r.body))
		}, 0, 0},
		{"answer after", Fault{Effect: AnswerAfter, Status: 524}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 524, r.status)
		}, 1, 1},
		{"answer before", Fault{Effect: AnswerBefore, Status: 524, Delay: time.Minute}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 524, r.status)
		}, 0, 1},
		{"drop", Fault{Effect: Drop}, func(t *testing.T, _ reply, err error) { isReset(t, err) }, 0, 0},
		{"drop after", Fault{Effect: DropAfter}, func(t *testing.T, _ reply, err error) { isReset(t, err) }, 1, 1},
		{"slow", Fault{Effect: Slow, Delay: 30 * time.Second}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 200, r.status)
		}, 1, 1},
		{"truncate", Fault{Effect: Truncate}, func(t *testing.T, r reply, err error) {
			isReset(t, err)
			require.Equal(t, 200, r.status)
			require.True(t, strings.HasPrefix(string(r.body), `{"prompt_id": "`), "%s", r.body)
		}, 1, 1},
		{"without a status", Fault{}, func(t *testing.T, r reply, err error) {
			require.NoError(t, err)
			require.Equal(t, 502, r.status)
		}, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				c.fault.Route = "POST /prompt"
				p.Inject(c.fault)
				body := `{"prompt": ` + graphOf("1", "Work", nil) + `}`
				r, err := try(p, http.MethodPost, "/api/prompt", body)
				c.reply(t, r, err)
				synctest.Wait()
				require.Len(t, p.Prompts(), c.queued)
				time.Sleep(2 * time.Minute)
				require.Len(t, p.Prompts(), c.later)
				require.Equal(t, 1, p.Requests("POST /prompt"))
				require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/prompt", body).status, "used up")
			}, WithNode("Work", Node{Output: true}))
		})
	}
}

func TestHang(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.Inject(Fault{Route: "POST /prompt", Effect: Hang})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL()+"/prompt", strings.NewReader(`{}`))
		require.NoError(t, err)
		_, err = p.Client().Do(req) //nolint:bodyclose // there is none
		require.ErrorIs(t, err, context.DeadlineExceeded)

		p.Inject(Fault{Route: "GET /queue", Effect: Hang})
		failed := make(chan error, 1)
		go func() {
			_, err := try(p, http.MethodGet, "/queue", "")
			failed <- err
		}()
		time.Sleep(time.Hour)
		p.Restart(0)
		require.Error(t, <-failed, "a hanging request ends with its process")
	})
}

func TestFaultOrder(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		statuses := func(n int) []int {
			var list []int
			for range n {
				list = append(list, do(t, p, http.MethodGet, "/queue", "").status)
			}
			return list
		}
		remove := p.Inject(Fault{Route: "GET /queue", Skip: 1, Times: 2, Status: 501})
		p.Inject(Fault{Route: "GET /", Status: 502})
		always := p.Inject(Fault{Times: -1, Status: 503})
		require.Equal(t, []int{502, 501, 501, 503, 503}, statuses(5), "the first that matches and is not used up")
		always()
		require.Equal(t, []int{200}, statuses(1))
		remove()
		p.Inject(Fault{Route: "GET /queue", Times: -1, Status: 504})()
		require.Equal(t, []int{200}, statuses(1))
		require.Equal(t, 7, p.Requests("GET /api/queue"))
		require.Equal(t, 7, p.Requests("/queue"))
		require.Equal(t, 7, p.Requests(""))
		require.Zero(t, p.Requests("POST /queue"))
	})
}

func TestMatchesRoute(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		route, method, path string
		want                bool
	}{
		{"", "GET", "/queue", true},
		{"GET /history", "GET", "/history/x", true},
		{"GET /history", "GET", "/api/history/x", true},
		{"GET /api/history", "GET", "/history/x", true},
		{"GET /history", "POST", "/history", false},
		{"/history", "POST", "/history", true},
		{"POST", "POST", "/history", true},
		{"POST", "GET", "/history", false},
		{"GET /jobs", "GET", "/api/jobs", true},
		{"GET /queue", "GET", "/apiqueue", false},
	} {
		require.Equal(t, c.want, matchesRoute(c.route, c.method, c.path), "%+v", c)
	}
}

func TestFaultsOverTCP(t *testing.T) {
	t.Parallel()
	p := Start(t, WithNode("Work", Node{Output: true}))
	body := `{"prompt": ` + graphOf("1", "Work", nil) + `}`
	for _, effect := range []Effect{Drop, DropAfter} {
		p.Inject(Fault{Route: "POST /prompt", Effect: effect})
		_, err := try(p, http.MethodPost, "/prompt", body)
		require.True(t, errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF), "%v", err)
	}
	p.Inject(Fault{Route: "POST /prompt", Effect: Truncate})
	r, err := try(p, http.MethodPost, "/prompt", body)
	require.Error(t, err)
	require.NotErrorIs(t, err, io.EOF, "a reset, not a quiet end")
	require.Equal(t, 200, r.status)
	require.NoError(t, p.WaitIdle(t.Context()))
	require.Len(t, p.Prompts(), 2)
}

// TestRefusedDuplicate: a 409 of unreleased servers is made with a fault.
func TestRefusedDuplicate(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		p.Inject(Fault{
			Route: "POST /prompt", Effect: AnswerAfter, Status: http.StatusConflict,
			Header: http.Header{"Content-Type": {"application/json; charset=utf-8"}}, Body: `{"error": "prompt_id already exists"}`,
		})
		r := submit(t, p, graphOf("1", "Work", nil), "", "")
		require.Equal(t, http.StatusConflict, r.status)
		require.Equal(t, "prompt_id already exists", at(t, r.json(t), "error"))
	}, WithNode("Work", Node{Output: true}))
}
