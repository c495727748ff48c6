package comfyuitest

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// numbered are the parts of a pending item that order it.
func numbered(number float64, id string) *item {
	return &item{number: number, id: id, prompt: encoded(`{}`), extra: object{}}
}

// TestHeapIsPythons: the orders are those of Python's heapq for the same operations.
func TestHeapIsPythons(t *testing.T) {
	t.Parallel()
	numbers := func(h pyHeap) []float64 {
		list := make([]float64, len(h))
		for i, it := range h {
			list[i] = it.priority()
		}
		return list
	}
	var h pyHeap
	for _, n := range []float64{5, 3, 8, 1, 9, 2, 7, 4, 6, 0} {
		require.NoError(t, h.push(numbered(n, "x"+fmt.Sprint(n))))
	}
	// >>> h=[]; [heapq.heappush(h,n) for n in (5,3,8,1,9,2,7,4,6,0)]; h
	require.Equal(t, []float64{0, 1, 2, 4, 3, 8, 7, 5, 6, 9}, numbers(h))
	_, err := h.pop()
	require.NoError(t, err)
	// >>> heapq.heappop(h); h
	require.Equal(t, []float64{1, 3, 2, 4, 9, 8, 7, 5, 6}, numbers(h))
	h = slices.Delete(h, 1, 2)
	require.NoError(t, h.heapify())
	// >>> h.pop(1); heapq.heapify(h); h
	require.Equal(t, []float64{1, 2, 4, 6, 8, 7, 5, 9}, numbers(h))
}

func TestHeapPopsInOrder(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var h pyHeap
		ids := rapid.SliceOfDistinct(rapid.StringMatching(`[a-f0-9]{1,4}`), rapid.ID[string]).Draw(t, "ids")
		for _, id := range ids {
			require.NoError(t, h.push(numbered(float64(rapid.IntRange(-3, 3).Draw(t, "number")), id)))
		}
		var last *item
		for len(h) > 0 {
			it, err := h.pop()
			require.NoError(t, err)
			if last != nil {
				inOrder, err := last.before(it)
				require.NoError(t, err)
				require.True(t, inOrder, "%v %s before %v %s", last.number, last.id, it.number, it.id)
			}
			last = it
		}
	})
}

func TestBefore(t *testing.T) {
	t.Parallel()
	base := func() *item { return numbered(1, "a") }
	with := func(change func(*item)) *item { it := base(); change(it); return it }
	for _, c := range []struct {
		name       string
		a, b       *item
		less, fail bool
	}{
		{"number", numbered(1, "b"), numbered(2, "a"), true, false},
		{"id breaks a tie", numbered(1, "a"), numbered(1, "b"), true, false},
		{"wholly equal", base(), base(), false, false},
		{"int and float", with(func(it *item) { it.number = int64(1) }), base(), false, false},
		{"other graph", base(), with(func(it *item) { it.prompt = encoded(`{"1": {}}`) }), false, true},
		{
			"same graph, other order of keys", with(func(it *item) { it.prompt = encoded(`{"a": 1, "b": 2}`) }),
			with(func(it *item) { it.prompt = encoded(`{"b": 2.0, "a": 1}`) }), false, false,
		},
		{"other create_time", base(), with(func(it *item) { it.extra = object{{"create_time", int64(2)}} }), false, true},
		{"other outputs", with(func(it *item) { it.outputs = []string{"1"} }), with(func(it *item) { it.outputs = []string{"2"} }), true, false},
		{"other secrets", base(), with(func(it *item) { it.sensitive = object{{"k", "v"}} }), false, true},
	} {
		less, err := c.a.before(c.b)
		require.Equal(t, c.less, less, c.name)
		require.Equal(t, c.fail, err != nil, c.name)
	}
}

const (
	idA = "00000000-0000-4000-8000-00000000000a"
	idB = "00000000-0000-4000-8000-00000000000b"
	idC = "00000000-0000-4000-8000-00000000000c"
)

func postAs(t *testing.T, p *Pod, id string, number int, n int) reply {
	t.Helper()
	return submit(t, p, graphOf("1", "Work", object{{"n", n}}), "me", fmt.Sprintf(`"prompt_id": "%s", "number": %d`, id, number))
}

func queueIDs(t *testing.T, p *Pod, key string) []string {
	t.Helper()
	ids := []string{}
	for _, it := range at(t, get(t, p, "/queue"), key).([]any) {
		ids = append(ids, at(t, it, 1).(string))
	}
	return ids
}

// TestSameIDSameNumber: server.md, POST /prompt. The worker is held by a job, so that nothing is taken meanwhile.
func TestSameIDSameNumber(t *testing.T) {
	t.Parallel()
	work := WithNode("Work", Node{Output: true})

	t.Run("the POST compares", func(t *testing.T) {
		t.Parallel()
		gated(t, false, func(t *testing.T, p *Pod, g *gate) {
			queue1(t, p, graphOf("1", "Gate", nil), "")
			<-g.entered
			require.Equal(t, http.StatusOK, postAs(t, p, idA, 5, 1).status)
			synctest.Wait()
			s := dial(t, p, "x")
			s.until("status")
			require.Equal(t, http.StatusInternalServerError, postAs(t, p, idA, 5, 2).status)
			synctest.Wait()
			require.Empty(t, s.pending(), "no status frame")
			require.Equal(t, []string{idA, idA}, queueIDs(t, p, "queue_pending"), "queued all the same")
			g.pass <- struct{}{}
			require.NoError(t, p.WaitIdle(t.Context()))
			require.Equal(t, 2, p.Runs(idA))
			require.Equal(t, 2, p.Prompts()[1].Posts)
		}, work)
	})

	t.Run("wholly equal before create_time", func(t *testing.T) {
		t.Parallel()
		gated(t, false, func(t *testing.T, p *Pod, g *gate) {
			queue1(t, p, graphOf("1", "Gate", nil), "")
			<-g.entered
			require.Equal(t, http.StatusOK, postAs(t, p, idA, 5, 1).status)
			require.Equal(t, http.StatusOK, postAs(t, p, idA, 5, 1).status)
			g.pass <- struct{}{}
			require.NoError(t, p.WaitIdle(t.Context()))
			require.Equal(t, 2, p.Runs(idA))
		}, work, WithVersion("0.3.64"))
	})

	t.Run("the delete of another compares", func(t *testing.T) {
		t.Parallel()
		gated(t, false, func(t *testing.T, p *Pod, g *gate) {
			queue1(t, p, graphOf("1", "Gate", nil), "")
			<-g.entered
			require.Equal(t, http.StatusOK, postAs(t, p, idB, 1, 0).status)
			require.Equal(t, http.StatusOK, postAs(t, p, idA, 5, 1).status)
			require.Equal(t, http.StatusOK, postAs(t, p, idA, 5, 2).status, "the parent in the heap is another one")
			synctest.Wait()
			s := dial(t, p, "x")
			s.until("status")
			require.Equal(t, http.StatusInternalServerError, do(t, p, http.MethodPost, "/queue", `{"delete": ["`+idB+`"]}`).status)
			synctest.Wait()
			require.Empty(t, s.pending())
			require.Equal(t, []string{idA, idA}, queueIDs(t, p, "queue_pending"), "and it is gone")
			g.pass <- struct{}{}
			require.NoError(t, p.WaitIdle(t.Context()))
		}, work)
	})

	t.Run("the worker compares", func(t *testing.T) {
		t.Parallel()
		gated(t, false, func(t *testing.T, p *Pod, g *gate) {
			queue1(t, p, graphOf("1", "Gate", nil), "")
			<-g.entered
			require.Equal(t, http.StatusOK, postAs(t, p, idB, 1, 0).status)
			require.Equal(t, http.StatusOK, postAs(t, p, idA, 5, 1).status)
			require.Equal(t, http.StatusOK, postAs(t, p, idA, 5, 2).status)
			g.pass <- struct{}{}
			synctest.Wait()
			require.Empty(t, queueIDs(t, p, "queue_running"))
			require.Equal(t, []string{idA, idA}, queueIDs(t, p, "queue_pending"))
			require.Equal(t, object{}, get(t, p, "/history/"+idB), "the item that it took is lost")
			require.Equal(t, http.StatusOK, postAs(t, p, idC, 9, 3).status, "and no job ever runs again")
			synctest.Wait()
			require.Zero(t, p.Runs(idC))
		}, work)
	})
}

func TestSameIDTwice(t *testing.T) {
	t.Parallel()
	gated(t, false, func(t *testing.T, p *Pod, g *gate) {
		queue1(t, p, graphOf("1", "Gate", nil), "")
		<-g.entered
		for n := range 3 {
			r := submit(t, p, graphOf("1", "Work", object{{"n", n}}), "me", `"prompt_id": "`+idA+`"`)
			require.Equal(t, http.StatusOK, r.status)
		}
		require.Len(t, queueIDs(t, p, "queue_pending"), 3)
		require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/queue", `{"delete": ["`+idA+`", "unknown"]}`).status)
		require.Len(t, queueIDs(t, p, "queue_pending"), 2, "one delete takes one")
		g.pass <- struct{}{}
		require.NoError(t, p.WaitIdle(t.Context()))
		require.Equal(t, Prompt{ID: idA, Posts: 3, Runs: 2, Ends: 2}, counts(p.Prompts()[1]))
		entry := get(t, p, "/history/"+idA)
		require.Equal(t, int64(2), at(t, entry, idA, "prompt", 2, "1", "inputs", "n"), "the later run overwrites the entry")
	}, WithNode("Work", Node{Output: true}))
}

func counts(p Prompt) Prompt {
	return Prompt{ID: p.ID, Posts: p.Posts, Runs: p.Runs, Ends: p.Ends, Interrupts: p.Interrupts}
}

func TestQueueOrder(t *testing.T) {
	t.Parallel()
	gated(t, false, func(t *testing.T, p *Pod, g *gate) {
		first := submit(t, p, graphOf("1", "Gate", nil), "", `"front": true`)
		require.Equal(t, int64(0), at(t, first.json(t), "number"), "front does nothing while the counter is 0")
		<-g.entered
		var want []string
		for _, c := range []struct{ more, number string }{
			{`"number": -5`, "-5.0"}, {`"front": true`, "-1"}, {``, "2"}, {`"number": "2.5"`, "2.5"}, {`"front": false`, "3"}, {`"front": true`, "-4"},
		} {
			r := submit(t, p, graphOf("1", "Work", object{{"n", len(want)}}), "", c.more)
			require.Equal(t, http.StatusOK, r.status)
			require.Contains(t, string(r.body), `"number": `+c.number+`,`)
			want = append(want, at(t, r.json(t), "prompt_id").(string))
		}
		want = []string{want[0], want[5], want[1], want[2], want[3], want[4]} // -5.0, -4, -1, 2, 2.5, 3
		for _, bad := range []string{`"number": null`, `"number": "x"`, `"number": []`} {
			require.Equal(t, http.StatusInternalServerError, submit(t, p, graphOf("1", "Work", nil), "", bad).status)
		}
		g.pass <- struct{}{}
		require.NoError(t, p.WaitIdle(t.Context()))
		history := get(t, p, "/history").(object)
		var order []string
		for _, f := range history[1:] {
			order = append(order, f.key)
		}
		require.Equal(t, want, order)
	}, WithNode("Work", Node{Output: true}))
}

func TestQueueRoute(t *testing.T) {
	t.Parallel()
	gated(t, false, func(t *testing.T, p *Pod, g *gate) {
		running := queue1(t, p, graphOf("1", "Gate", nil), "")
		<-g.entered
		a, b := queue1(t, p, graphOf("1", "Work", nil), ""), queue1(t, p, graphOf("1", "Work", nil), "")
		synctest.Wait()
		s := dial(t, p, "x")
		s.until("status")
		require.Equal(t, int64(3), at(t, get(t, p, "/prompt"), "exec_info", "queue_remaining"))
		require.Len(t, at(t, get(t, p, "/api/queue"), "queue_running", 0).([]any), 5)

		for _, body := range []string{`{"delete": ["` + running + `", "unknown"]}`, `{}`, `{"clear": false}`, `{"clear": 0, "delete": []}`} {
			r := do(t, p, http.MethodPost, "/queue", body)
			require.Equal(t, http.StatusOK, r.status)
			require.Empty(t, r.body)
			require.Empty(t, r.header.Values("Content-Type"))
		}
		require.Empty(t, s.pending())
		require.Equal(t, []string{a, b}, queueIDs(t, p, "queue_pending"))
		for _, body := range []string{``, `{`, `{"delete": 5}`, `{"delete": null}`, `null`, `7`, `["delete"]`, `"delete"`} {
			require.Equal(t, http.StatusInternalServerError, do(t, p, http.MethodPost, "/queue", body).status, body)
		}
		require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/queue", `{"delete": ["`+a+`"]}`).status)
		require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/queue", `{"clear": true}`).status)
		synctest.Wait()
		require.Equal(t, []string{"status", "status"}, s.pending())
		require.Empty(t, queueIDs(t, p, "queue_pending"))
		require.Equal(t, object{}, get(t, p, "/history/"+a), "a deleted prompt leaves no trace")
		last := queue1(t, p, graphOf("1", "Work", nil), "")
		require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/queue", `{"delete": ["`+last+`"]}`).status)
		synctest.Wait()
		require.Equal(t, strings.Fields("status status status status status"), s.pending(), "the last one of the queue: two frames")
		g.pass <- struct{}{}
		require.NoError(t, p.WaitIdle(t.Context()))
	}, WithNode("Work", Node{Output: true}))
}

func TestHistoryRoute(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, p *Pod) {
		var ids []string
		for n := range 6 {
			ids = append(ids, queue1(t, p, graphOf("1", "Work", object{{"n", n}}), ""))
			require.NoError(t, p.WaitIdle(t.Context()))
		}
		ids = ids[1:] // the oldest of six is gone
		keys := func(path string) []string {
			list := []string{}
			for _, f := range get(t, p, path).(object) {
				list = append(list, f.key)
			}
			return list
		}
		require.Equal(t, ids, keys("/history"))
		require.Equal(t, ids[3:], keys("/api/history?max_items=2"), "the newest")
		require.Equal(t, ids[:1], keys("/history?max_items=1&offset=0"), "with an offset it counts from the oldest")
		require.Equal(t, ids[2:4], keys("/history?max_items=2&offset=2"))
		require.Equal(t, ids[4:], keys("/history?offset=4"))
		require.Empty(t, keys("/history?max_items=0"))
		require.Empty(t, keys("/history?max_items=-1"))
		require.Empty(t, keys("/history/unknown"))
		for _, query := range []string{"max_items=x", "offset=x", "max_items=", "max_items=1.5"} {
			r := do(t, p, http.MethodGet, "/history?"+query, "")
			require.Equal(t, http.StatusInternalServerError, r.status)
			require.Equal(t, "500 Internal Server Error\n\nServer got itself in trouble", string(r.body))
		}
		require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/history", `{"delete": ["`+ids[0]+`", "unknown"]}`).status)
		require.Equal(t, ids[1:], keys("/history"))
		require.Equal(t, http.StatusOK, do(t, p, http.MethodPost, "/history", `{"clear": true}`).status)
		require.Empty(t, keys("/history"))
		queue1(t, p, graphOf("1", "Work", nil), "")
		require.NoError(t, p.WaitIdle(t.Context()))
		p.ClearHistory()
		require.Empty(t, keys("/history"))
	}, WithHistorySize(5), WithNode("Work", Node{Output: true}))
}

func TestHistorySize(t *testing.T) {
	t.Parallel()
	for size := range 4 {
		bubble(t, func(t *testing.T, p *Pod) {
			var ids []string
			for n := range 6 {
				ids = append(ids, queue1(t, p, graphOf("1", "Work", object{{"n", n}}), ""))
				require.NoError(t, p.WaitIdle(t.Context()))
			}
			left := []string{}
			for _, f := range get(t, p, "/history").(object) {
				left = append(left, f.key)
			}
			require.Equal(t, ids[6-size:], left)
		}, WithHistorySize(size), WithNode("Work", Node{Output: true}))
	}
}

// TestHistoryBeforeThereWasAnOffset: until 0.3.60 the server did not look at it, so that what asks for the oldest gets the newest.
func TestHistoryBeforeThereWasAnOffset(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		version string
		first   string
	}{{"0.3.59", "b"}, {"0.3.60", "a"}} {
		bubble(t, func(t *testing.T, p *Pod) {
			for _, n := range []string{"a", "b"} {
				queue1(t, p, graphOf("1", "Work", object{{"n", n}}), "")
				require.NoError(t, p.WaitIdle(t.Context()))
			}
			page := get(t, p, "/history?max_items=1&offset=0").(object)
			require.Len(t, page, 1)
			require.Equal(t, c.first, at(t, page[0].value, "prompt", 2, "1", "inputs", "n"))
		}, WithVersion(c.version), WithNode("Work", Node{Output: true}))
	}
}

// A worker that learns of its death and of a prompt at once takes nothing: that prompt waits for ever.
func TestDeadWorkerTakesNothing(t *testing.T) {
	t.Parallel()
	q := newQueue(1, func(int) {})
	ctx, kill := context.WithCancel(t.Context())
	kill()
	require.NoError(t, q.put(numbered(1, "a")))
	_, err := q.get(ctx)
	require.ErrorIs(t, err, context.Canceled)
	running, pending := q.snapshot()
	require.Empty(t, running)
	require.Len(t, pending, 1)
}
