package comfyuitest

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// TestChaos does whatever can be done to a pod, in a random order: nothing gets stuck, no goroutine is left, and after a
// restart the pod works.
func TestChaos(t *testing.T) {
	t.Parallel()
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, p *Pod) {
				r := rand.New(rand.NewPCG(seed, 1))
				thaw, heal := func() {}, []func(){}
				for step := range 60 {
					act(t, p, r, step, &thaw, &heal)
					if r.IntN(3) == 0 {
						time.Sleep(time.Duration(r.IntN(2000)) * time.Millisecond)
					}
				}
				thaw()
				for _, remove := range heal {
					remove()
				}
				p.RefuseStreams(0)
				time.Sleep(time.Minute)
				p.Restart(0)
				s := dial(t, p, "last")
				id := queue1(t, p, graphOf("1", "Fast", object{{"n", "last"}}), "last")
				s.job()
				require.Equal(t, 1, p.Runs(id))
				require.NoError(t, p.WaitIdle(t.Context()))
			}, WithNode("Fast", Steps(2, 0)), WithNode("Slow", Steps(5, time.Second)), WithNode("Bad", Fail("ValueError", "bad")))
		})
	}
}

func act(t *testing.T, p *Pod, r *rand.Rand, step int, thaw *func(), heal *[]func()) {
	t.Helper()
	background := func(method, path, body string) {
		go func() { _, _ = try(p, method, path, body) }() // ends with the pod, if nothing else ends it
	}
	class := []string{"Fast", "Slow", "Bad"}[r.IntN(3)]
	name := string(rune('a' + r.IntN(3)))
	switch r.IntN(16) {
	case 0, 1, 2, 3:
		background(http.MethodPost, "/prompt", `{"client_id": "`+name+`", "prompt": `+graphOf("1", class, object{{"n", step}})+`}`)
	case 4, 5:
		// Not dialled here: the loop may be frozen, or the server down.
		go func() { _, _ = tryDial(t, p, name) }()
	case 6:
		p.CutStreams(CutMode(r.IntN(4)))
	case 7:
		p.Interrupt()
	case 8:
		p.Restart(time.Duration(r.IntN(3)) * time.Second)
	case 9:
		p.KillWorker()
	case 10:
		(*thaw)()
		*thaw = p.Freeze()
	case 11:
		(*thaw)()
	case 12:
		*heal = append(*heal, p.Inject(Fault{Effect: Effect(r.IntN(8)), Delay: time.Second, Times: r.IntN(3)}))
	case 13:
		p.RefuseStreams([]int{0, 403}[r.IntN(2)])
	case 14:
		background(http.MethodPost, "/queue", `{"clear": true}`)
		background(http.MethodGet, "/history", "")
	case 15:
		p.SendText(name, []byte("hello"))
		p.ClearHistory()
		synctest.Wait()
	}
}
