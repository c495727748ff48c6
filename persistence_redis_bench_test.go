package comfyui_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

// benchWorkflow is a text-to-image graph with n sampler stages; 8 stages are some 8 KiB.
func benchWorkflow(n int) []byte {
	var b strings.Builder
	b.WriteString(`{"1":{"class_type":"CheckpointLoaderSimple","inputs":{"ckpt_name":"v1-5-pruned-emaonly.safetensors"},"_meta":{"title":"Load Checkpoint"}}`)
	for i := range n {
		fmt.Fprintf(&b, `,"%d":{"class_type":"CLIPTextEncode","inputs":{"text":"stage %d: a watercolour of a harbour at %02d:%02d, boats number %d","clip":["1",1]},"_meta":{"title":"CLIP Text Encode (Prompt)"}}`, 10*i+2, i, i*7%24, i*13%60, i*7919)
		fmt.Fprintf(&b, `,"%d":{"class_type":"KSampler","inputs":{"seed":%d,"steps":20,"cfg":8,"sampler_name":"euler","scheduler":"normal","denoise":1,"model":["1",0],"positive":["%d",0],"negative":["7",0],"latent_image":["5",0]},"_meta":{"title":"KSampler"}}`, 10*i+3, 156680208700286+int64(i)*99991, 10*i+2)
		fmt.Fprintf(&b, `,"%d":{"class_type":"VAEDecode","inputs":{"samples":["%d",0],"vae":["1",2]},"_meta":{"title":"VAE Decode"}}`, 10*i+4, 10*i+3)
		fmt.Fprintf(&b, `,"%d":{"class_type":"SaveImage","inputs":{"filename_prefix":"ComfyUI","images":["%d",0]},"_meta":{"title":"Save Image"}}`, 10*i+5, 10*i+4)
	}
	b.WriteString("}")
	return []byte(b.String())
}

// How long a process that starts takes to read what it may have to take over.
func BenchmarkRedisStoreUnfinished(b *testing.B) {
	const jobs = 10_000
	for _, stages := range []int{1, 8} {
		workflow := benchWorkflow(stages)
		b.Run(fmt.Sprintf("jobs=%d/workflow=%dB", jobs, len(workflow)), func(b *testing.B) {
			store := newRedisStore(b, startRedis(b).client(b, nil))
			var makers sync.WaitGroup
			for m := range 16 {
				makers.Go(func() {
					for i := m; i < jobs; i += 16 {
						r := benchRecord(0)
						r.JobID, r.Workflow = fmt.Sprintf("3f2c%012d", i), workflow
						_, err := store.Create(b.Context(), r, time.Hour)
						if err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			makers.Wait()
			b.ReportAllocs()
			for b.Loop() {
				n := 0
				for r, err := range store.Unfinished(b.Context(), "http://127.0.0.1:8188") {
					require.NoError(b, err)
					if len(r.Workflow) != len(workflow) {
						b.Fatal("no workflow")
					}
					n++
				}
				require.Equal(b, jobs, n)
			}
		})
	}
}

// What a process that starts takes to reconcile the jobs of a dead one with their pod, over loopback: until it drives all of them and
// knows where each stands now.
func BenchmarkRecover(b *testing.B) {
	const jobs = 9_900 // the history of a pod holds 10,000
	const unrecorded = "they moved up in the queue, and of 300 it was not recorded that the pod has them"
	for _, meanwhile := range []string{"they moved up in the queue", "they ended", unrecorded} {
		b.Run(fmt.Sprintf("jobs=%d/%s", jobs, meanwhile), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				orphans := newOrphans(b, jobs, map[string]int{unrecorded: 300}[meanwhile])
				if meanwhile == "they ended" {
					close(orphans.gate)
					require.NoError(b, orphans.pod.WaitIdle(b.Context()))
				} else {
					orphans.moveUp(b, jobs)
				}
				heir := orphans.client(b)
				read := orphans.pod.Requests("GET /queue")
				b.StartTimer()
				var found []*comfyui.Job
				for j, err := range heir.Recover(b.Context()) {
					require.NoError(b, err)
					found = append(found, j)
				}
				recovered := b.Elapsed()
				require.Len(b, found, jobs)
				for _, j := range found {
					if meanwhile == "they ended" {
						r, err := j.Wait(b.Context())
						require.NoError(b, err)
						require.Equal(b, comfyui.StatusSucceeded, r.Status)
						continue
					}
					for range j.Events(b.Context()) {
						ahead, waits := orphans.ahead[j.PromptID()]
						if p := j.Progress(); p.Status.Terminal() || p.Status == comfyui.StatusRunning || waits && p.QueueAhead == ahead {
							break
						}
					}
				}
				b.StopTimer()
				b.Logf("claimed after %v, reconciled after %v", recovered, b.Elapsed()) // of all rounds so far
				b.ReportMetric(float64(orphans.pod.Requests("GET /queue")-read), "reads-of-queue")
				if meanwhile != "they ended" {
					close(orphans.gate)
				}
				require.NoError(b, heir.Close())
				orphans.pod.Close()
				b.StartTimer()
			}
		})
	}
}

// orphans are jobs in the queue of a pod, whose process is gone.
type orphans struct {
	pod   *comfyuitest.Pod
	store *comfyui.RedisStore
	gate  chan struct{}  // holds the queue up: one token lets one job pass
	ahead map[string]int // by prompt, once one has passed
}

// newOrphans makes them, the last of them without a record that the pod has them.
func newOrphans(b *testing.B, jobs, unrecorded int) *orphans {
	b.Helper()
	o := &orphans{gate: make(chan struct{}), ahead: map[string]int{}}
	o.pod = comfyuitest.NewPod(
		comfyuitest.WithNode("Gate", comfyuitest.Node{Output: true, Run: func(ctx context.Context, _ *comfyuitest.Call) error {
			select {
			case <-o.gate:
			case <-ctx.Done():
			}
			return nil
		}}),
		comfyuitest.WithNode("Work", comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
			c.Put("text", "done")
			return nil
		}}),
	)
	o.store = newRedisStore(b, startRedis(b).client(b, nil))
	var failing atomic.Bool
	former, err := comfyui.NewPodClient(o.pod.URL(), comfyui.WithStore(storetest.Flaky(o.store, func(_ context.Context, method string) (error, bool) {
		if method == "Update" && failing.Load() {
			return errors.New("down"), false
		}
		return nil, false
	})))
	require.NoError(b, err)
	submit := func(class string, seed int) {
		w, err := comfyui.ParseWorkflow(fmt.Appendf(nil, `{"1":{"class_type":%q,"inputs":{"seed":%d}}}`, class, seed))
		if err == nil {
			_, err = former.Submit(b.Context(), w)
		}
		if err != nil {
			b.Error(err)
		}
	}
	submit("Gate", 0)
	submit("Gate", 1)
	submitted := 2
	submitUntil := func(jobs int) {
		var makers sync.WaitGroup
		for m := range 16 {
			makers.Go(func() {
				for n := submitted + m; n < jobs; n += 16 {
					submit("Work", n)
				}
			})
		}
		makers.Wait()
		submitted = jobs
	}
	submitUntil(jobs - unrecorded)
	// Close has no time for thousands of records.
	require.Eventually(b, func() bool { return former.Stats().StorePending == 0 }, time.Minute, time.Millisecond)
	failing.Store(true)
	submitUntil(jobs)
	require.Eventually(b, func() bool { return o.pod.Requests("POST /prompt") >= jobs }, time.Minute, time.Millisecond)
	require.NoError(b, former.Close())
	return o
}

// moveUp lets one job pass.
func (o *orphans) moveUp(b *testing.B, jobs int) {
	b.Helper()
	o.gate <- struct{}{}
	c := o.client(b)
	defer func() { _ = c.Close() }()
	for {
		q, err := c.Queue(b.Context())
		require.NoError(b, err)
		if len(q.Running) == 1 && len(q.Pending) == jobs-2 {
			for i, item := range q.Pending {
				o.ahead[item.PromptID] = i + 1
			}
			return
		}
	}
}

func (o *orphans) client(b *testing.B) *comfyui.PodClient {
	b.Helper()
	c, err := comfyui.NewPodClient(o.pod.URL(), comfyui.WithStore(o.store))
	require.NoError(b, err)
	return c
}

// What the store costs one job: its record made, queued, running and ended.
func BenchmarkRedisStoreJob(b *testing.B) {
	store := newRedisStore(b, startRedis(b).client(b, nil))
	workflow := benchWorkflow(8)
	n := 0
	for b.Loop() {
		n++
		r := benchRecord(0)
		r.JobID, r.Workflow = fmt.Sprint("job-", n), workflow
		got, err := store.Create(b.Context(), r, time.Minute)
		for _, status := range []comfyui.Status{comfyui.StatusQueued, comfyui.StatusRunning, comfyui.StatusSucceeded} {
			require.NoError(b, err)
			got.Rev++
			got.Progress.Status = status
			got, err = store.Update(b.Context(), got)
		}
		require.NoError(b, err)
	}
}

// One renewal of the leases of a client with many jobs.
func BenchmarkRedisStoreRenew(b *testing.B) {
	const jobs = 1000
	store := newRedisStore(b, startRedis(b).client(b, nil))
	var ids []string
	for i := range jobs {
		r := benchRecord(0)
		r.JobID = fmt.Sprint("job-", i)
		ids = append(ids, r.JobID)
		_, err := store.Create(b.Context(), r, time.Hour)
		require.NoError(b, err)
	}
	b.ResetTimer()
	for b.Loop() {
		lost, err := store.Renew(b.Context(), "owner", time.Hour, ids)
		require.NoError(b, err)
		require.Empty(b, lost)
	}
}
