package comfyui_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
)

// A key that another program has made out of a job's costs the jobs beside it nothing: neither their leases nor their recovery.
func TestRedisStoreBesideAStranger(t *testing.T) {
	t.Parallel()
	client := startRedis(t).client(t, nil)
	for prefix, reader := range map[string]redis.UniversalClient{
		"plain": client,
		// One that may read from replicas, for all that the store knows.
		"wrapped": struct{ redis.UniversalClient }{client},
	} {
		t.Run(prefix, func(t *testing.T) {
			t.Parallel()
			besideAStranger(t, client, reader, prefix)
		})
	}
}

func besideAStranger(t *testing.T, client *redis.Client, reader redis.UniversalClient, prefix string) {
	t.Helper()
	s, err := comfyui.NewRedisStore(reader, comfyui.RedisShards(1), comfyui.RedisPrefix(prefix))
	require.NoError(t, err)
	ctx := t.Context()
	var ids []string
	for n := range 20 {
		r, err := s.Create(ctx, &comfyui.Record{JobID: fmt.Sprint("job-", n), Owner: "a"}, time.Minute)
		require.NoError(t, err)
		ids = append(ids, r.JobID)
	}
	strange := "{" + prefix + ":0}:job:job-7"
	require.NoError(t, client.Del(ctx, strange).Err())
	require.NoError(t, client.Set(ctx, strange, "text", 0).Err())

	lost, err := s.Renew(ctx, "a", time.Hour, ids)
	assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), "what became of it is not known: %v", err)
	assert.Empty(t, lost)
	for _, id := range ids {
		if id == "job-7" {
			continue
		}
		r, err := s.Get(ctx, id)
		require.NoError(t, err)
		assert.Greater(t, time.Until(r.LeaseUntil), 50*time.Minute, id)
	}

	found, failures := 0, 0
	for r, err := range s.Unfinished(ctx, "") {
		if err != nil {
			failures++
			var e *comfyui.Error
			require.ErrorAs(t, err, &e)
			assert.Equal(t, "job-7", e.JobID)
			continue
		}
		assert.NotEqual(t, "job-7", r.JobID)
		found++
	}
	assert.Equal(t, 19, found)
	assert.Equal(t, 1, failures)

	assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(s.Release(ctx, "a", ids)))
	for _, id := range ids {
		if id != "job-7" {
			_, err := s.Claim(ctx, id, "b", time.Minute)
			require.NoError(t, err, id)
		}
	}
	assert.Equal(t, "text", client.Get(ctx, strange).Val(), "it is left alone")
}

// A Redis that is full takes no new job, but the ones that it has are driven to their ends, which give memory back.
func TestRedisStoreOnAFullRedis(t *testing.T) {
	t.Parallel()
	client := startRedis(t).client(t, nil)
	s := newRedisStore(t, client)
	ctx := t.Context()
	create := func(id string) *comfyui.Record {
		r, err := s.Create(ctx, &comfyui.Record{JobID: id, Owner: "a", Attempt: 1, Workflow: benchWorkflow(8), Progress: comfyui.Progress{Status: comfyui.StatusPending}}, time.Hour)
		require.NoError(t, err)
		return r
	}
	running, failing := create("running"), create("failing")
	create("free")
	failing.Rev++
	failing.Progress.Status = comfyui.StatusFailed
	failing, err := s.Update(ctx, failing)
	require.NoError(t, err)
	require.NoError(t, s.Release(ctx, "a", []string{"free"}))
	require.NoError(t, client.ConfigSet(ctx, "maxmemory", "1").Err())

	_, err = s.Create(ctx, &comfyui.Record{JobID: "new", Owner: "a"}, time.Hour)
	assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err))
	require.ErrorContains(t, err, "OOM")
	_, err = s.Get(ctx, "new")
	require.ErrorIs(t, err, comfyui.ErrJobNotFound)

	lost, err := s.Renew(ctx, "a", 2*time.Hour, []string{"running"})
	require.NoError(t, err)
	assert.Empty(t, lost)
	free, err := s.Claim(ctx, "free", "b", time.Hour)
	require.NoError(t, err)
	assert.EqualValues(t, 2, free.Epoch)
	require.NoError(t, s.Release(ctx, "b", []string{"free"}))
	got, err := s.RequestCancel(ctx, "running")
	require.NoError(t, err)
	assert.True(t, got.CancelRequested)
	for _, status := range []comfyui.Status{comfyui.StatusQueued, comfyui.StatusRunning, comfyui.StatusSucceeded} {
		running.Rev++
		running.Progress.Status = status
		running, err = s.Update(ctx, running)
		require.NoError(t, err, status)
	}
	_, err = s.Claim(ctx, failing.JobID, "b", time.Hour)
	require.NoError(t, err)
	got, err = s.Get(ctx, "running")
	require.NoError(t, err)
	assert.Equal(t, comfyui.StatusSucceeded, got.Progress.Status)
	assert.Empty(t, got.Workflow)
}

// What a Redis says that is not ready, not the master or not to be used is an error of the store: nothing is taken for done.
func TestRedisStoreThatIsRefused(t *testing.T) {
	t.Parallel()
	for _, refusal := range []string{
		"LOADING Redis is loading the dataset in memory", "READONLY You can't write against a read only replica.",
		"MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "BUSY Redis is busy running a script.",
		"CLUSTERDOWN The cluster is down", "TRYAGAIN Multiple keys request during rehashing of slot",
		"CROSSSLOT Keys in request don't hash to the same slot", "NOAUTH Authentication required.",
		"NOPERM User default has no permissions to run the 'evalsha' command", "NOREPLICAS Not enough good replicas to write.",
		"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
		"OOM command not allowed when used memory > 'maxmemory'.", "ERR max number of clients reached",
	} {
		t.Run(strings.Fields(refusal)[0], func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newSimRedis()
				t.Cleanup(server.Close)
				s := newRedisStore(t, server.client(t, nil))
				_, err := s.Create(t.Context(), &comfyui.Record{JobID: "job", Owner: "a"}, time.Hour)
				require.NoError(t, err)
				server.SetError(refusal)
				for method, call := range everyCall(t.Context(), s) {
					err := call()
					assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), "%s: %v", method, err)
					require.ErrorContains(t, err, refusal, method)
				}
				server.SetError("")
				_, err = s.Get(t.Context(), "job")
				require.NoError(t, err)
			})
		})
	}
}

// The caller closes its Redis client before the clients that use the store: calls and watches end with an error, at once.
func TestRedisStoreOfAClosedClient(t *testing.T) {
	t.Parallel()
	inWatchBench(t, func(b *watchBench) {
		require.NoError(b, b.client.Close())
		closed := time.Now()
		<-b.events.done
		require.ErrorIs(b, b.events.err, redis.ErrClosed)
		assert.Equal(b, comfyui.CategoryStorage, comfyui.CategoryOf(b.events.err))
		assert.LessOrEqual(b, time.Since(closed), 5*time.Second)
		for method, call := range everyCall(b.Context(), b.store) {
			err := call()
			require.ErrorIs(b, err, redis.ErrClosed, method)
		}
	})
}

// Slots move from one master to another while jobs are driven: calls may fail and be repeated, but none is answered wrongly.
func TestRedisStoreOnAClusterThatIsResharded(t *testing.T) {
	t.Parallel()
	nodes := startRedisCluster(t)
	client := clusterClient(t, nodes, redis.ClusterOptions{})
	const shards, jobs = 4, 200
	s := newRedisStore(t, client, comfyui.RedisPrefix("moving"), comfyui.RedisShards(shards), comfyui.RedisCallTimeout(5*time.Second))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var ids []string
	for n := range jobs {
		r, err := s.Create(ctx, &comfyui.Record{JobID: fmt.Sprint("job-", n), Owner: "a", Workflow: benchWorkflow(1)}, time.Hour)
		require.NoError(t, err)
		ids = append(ids, r.JobID)
	}

	moved := make(chan struct{})
	var worker sync.WaitGroup
	calls, failed := 0, 0
	count := func(err error) bool {
		calls++
		if err != nil {
			failed++
			assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), "%v", err)
		}
		return err == nil
	}
	worker.Go(func() {
		rev := map[string]int64{}
		for n := 0; ; n++ {
			select {
			case <-moved:
				return
			default:
			}
			lost, err := s.Renew(ctx, "a", time.Hour, ids)
			count(err)
			assert.Empty(t, lost)
			id := ids[n%jobs]
			r, err := s.Get(ctx, id)
			if count(err) {
				assert.GreaterOrEqual(t, r.Rev, rev[id], "what was acknowledged is there")
				r.Rev++
				if _, err = s.Update(ctx, r); count(err) {
					rev[id] = r.Rev
				}
			}
			_, err = s.Claim(ctx, id, "b", time.Hour)
			if !errors.Is(err, comfyui.ErrJobHeld) {
				count(err)
			}
			_, err = s.Create(ctx, &comfyui.Record{JobID: fmt.Sprint("new-", n), Owner: "a"}, time.Hour)
			count(err)
			if n%10 == 0 {
				seen := map[string]bool{}
				whole := true
				for r, err := range s.Unfinished(ctx, "") {
					if whole = count(err) && whole; err == nil {
						assert.False(t, seen[r.JobID], "%s twice", r.JobID)
						seen[r.JobID] = true
					}
				}
				for _, id := range ids {
					assert.True(t, !whole || seen[id], "%s is missing", id)
				}
			}
		}
	})
	for shard := range shards {
		moveSlot(ctx, t, nodes, fmt.Sprintf("{moving:%d}:unfinished", shard))
	}
	close(moved)
	worker.Wait()
	t.Logf("%d calls, %d of them failed while slots moved", calls, failed)
	assert.Positive(t, calls)
	lost, err := s.Renew(ctx, "a", time.Hour, ids)
	require.NoError(t, err)
	assert.Empty(t, lost)
}

// moveSlot gives the slot of a key to the next master, one key after another, as redis-cli --cluster reshard does.
func moveSlot(ctx context.Context, t *testing.T, nodes []*redisServer, key string) {
	t.Helper()
	clients := make([]*redis.Client, len(nodes))
	names := make([]string, len(nodes))
	for i, node := range nodes {
		clients[i] = node.client(t, nil)
		var err error
		names[i], err = clients[i].Do(ctx, "cluster", "myid").Text()
		require.NoError(t, err)
	}
	slot := clients[0].ClusterKeySlot(ctx, key).Val()
	from := int(slot) * len(nodes) / 16384
	to := (from + 1) % len(nodes)
	host, port, _ := strings.Cut(nodes[to].addr, ":")
	require.NoError(t, clients[to].Do(ctx, "cluster", "setslot", slot, "importing", names[from]).Err())
	require.NoError(t, clients[from].Do(ctx, "cluster", "setslot", slot, "migrating", names[to]).Err())
	for {
		keys, err := clients[from].ClusterGetKeysInSlot(ctx, int(slot), 10).Result()
		require.NoError(t, err)
		if len(keys) == 0 {
			break
		}
		for _, k := range keys {
			require.NoError(t, clients[from].Migrate(ctx, host, port, k, 0, 5*time.Second).Err())
		}
	}
	for _, i := range []int{to, from} {
		require.NoError(t, clients[i].Do(ctx, "cluster", "setslot", slot, "node", names[to]).Err())
	}
	clusterAgrees(ctx, t, nodes)
}
