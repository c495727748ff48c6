package comfyuitest

import (
	"net/http"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkJob is one job of one node that does nothing, from the POST to the end on the socket.
func BenchmarkJob(b *testing.B) {
	for name, opts := range map[string][]Option{"tcp": nil, "pipes": {WithPipes()}} {
		b.Run(name, func(b *testing.B) {
			p := Start(b, append(opts, WithNode("Work", Node{Output: true}))...)
			s := dial(b, p, "me")
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				n++
				queue1(b, p, graphOf("1", "Work", object{{"n", n}}), "me")
				for f := s.until("executing"); f.data0(b)[0].value != nil; f = s.until("executing") {
				}
			}
		})
	}
}

// BenchmarkTick is one step of a node, as a client of its own sees it.
func BenchmarkTick(b *testing.B) {
	ready, next := make(chan struct{}), make(chan int)
	p := Start(b, WithNode("Work", scripted(func(c *Call) error {
		close(ready)
		for n := range next {
			c.Progress(float64(n), 1e9)
		}
		return nil
	})), WithVersion("0.9.1")) // without the throttle
	s := dial(b, p, "me")
	queue1(b, p, graphOf("1", "Work", nil), "me")
	<-ready
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		n++
		next <- n
		s.until("progress")
	}
	close(next)
}

// BenchmarkQueue is GET /queue with 10,000 pending prompts.
func BenchmarkQueue(b *testing.B) {
	p := Start(b, WithNode("Work", Node{Output: true}))
	p.KillWorker()
	for n := range 10_000 {
		queue1(b, p, graphOf("1", "Work", object{{"n", n}}), "me")
	}
	b.ReportAllocs()
	for b.Loop() {
		r := do(b, p, http.MethodGet, "/queue", "")
		require.Greater(b, len(r.body), 1_000_000)
	}
}

// BenchmarkHistory is GET /history/{id} among 10,000 entries.
func BenchmarkHistory(b *testing.B) {
	p := Start(b, WithNode("Work", Node{Output: true}))
	var id string
	for n := range 10_000 {
		id = queue1(b, p, graphOf("1", "Work", object{{"n", strconv.Itoa(n)}}), "")
	}
	require.NoError(b, p.WaitIdle(b.Context()))
	b.ReportAllocs()
	for b.Loop() {
		do(b, p, http.MethodGet, "/history/"+id, "")
	}
}
