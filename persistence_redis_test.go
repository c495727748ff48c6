package comfyui_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

var prefixes atomic.Int64

// newRedisStore returns a store under a prefix of its own: an empty one.
func newRedisStore(t testing.TB, client redis.UniversalClient, opts ...comfyui.RedisOption) *comfyui.RedisStore {
	t.Helper()
	opts = append([]comfyui.RedisOption{comfyui.RedisPrefix(fmt.Sprint("test-", prefixes.Add(1))), comfyui.RedisCallTimeout(time.Minute)}, opts...)
	s, err := comfyui.NewRedisStore(client, opts...)
	require.NoError(t, err)
	return s
}

// redisServer is a real one, on a free loopback port, without persistence unless args say otherwise.
type redisServer struct {
	addr   string
	binary string
	args   []string
	cmd    *exec.Cmd
	ended  chan struct{} // closed when it has
}

// startRedis skips the test where there is no redis-server: apt-get install redis-server.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	dir := t.TempDir()
	return startRedisWith(t, func(port string) []string {
		return append([]string{
			"--port", port, "--bind", "127.0.0.1", "--dir", dir, "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction",
		}, args...)
	})
}

func startRedisWith(t testing.TB, args func(port string) []string) *redisServer {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("no redis-server on this machine")
	}
	for range 10 {
		listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
		require.NoError(t, err)
		addr := listener.Addr().String()
		require.NoError(t, listener.Close())
		_, port, _ := net.SplitHostPort(addr)
		s := &redisServer{addr: addr, binary: binary, args: args(port)}
		if s.start(t) { // else another program has taken the port meanwhile
			t.Cleanup(s.kill)
			return s
		}
	}
	t.Fatal("redis-server does not start")
	return nil
}

// start reports whether the server answers.
func (s *redisServer) start(t testing.TB) bool {
	t.Helper()
	cmd := exec.Command(s.binary, s.args...) //nolint:gosec,noctx // killed by Cleanup
	require.NoError(t, cmd.Start())
	ended := make(chan struct{})
	s.cmd, s.ended = cmd, ended
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	client := redis.NewClient(&redis.Options{Addr: s.addr, MaxRetries: -1})
	defer func() { _ = client.Close() }()
	for {
		if err := client.Ping(t.Context()).Err(); err == nil {
			return true
		}
		select {
		case <-ended:
			return false
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *redisServer) kill() {
	_ = s.cmd.Process.Kill()
	<-s.ended
}

// killAndRestart loses what was not saved.
func (s *redisServer) killAndRestart(t testing.TB) {
	t.Helper()
	s.kill()
	require.True(t, s.start(t))
}

func (s *redisServer) client(t testing.TB, change func(*redis.Options)) *redis.Client {
	t.Helper()
	o := &redis.Options{Addr: s.addr}
	if change != nil {
		change(o)
	}
	client := redis.NewClient(o)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// startRedisCluster starts three masters and joins them.
func startRedisCluster(t testing.TB, args ...string) []*redisServer {
	t.Helper()
	const slots = 16384
	var nodes []*redisServer
	for i := range 3 {
		nodes = append(nodes, startRedis(t, append(args,
			"--cluster-enabled", "yes", "--cluster-config-file", fmt.Sprintf("node-%d.conf", i), "--cluster-node-timeout", "5000")...))
	}
	ctx := t.Context()
	for i, node := range nodes {
		client := node.client(t, nil)
		require.NoError(t, client.Do(ctx, "cluster", "set-config-epoch", i+1).Err())
		require.NoError(t, client.ClusterAddSlotsRange(ctx, i*slots/3, (i+1)*slots/3-1).Err())
		host, port, _ := net.SplitHostPort(nodes[0].addr)
		require.NoError(t, client.ClusterMeet(ctx, host, port).Err())
	}
	for _, node := range nodes {
		client := node.client(t, nil)
		require.Eventually(t, func() bool {
			info, err := client.ClusterInfo(ctx).Result()
			return err == nil && strings.Contains(info, "cluster_state:ok") && strings.Contains(info, "cluster_known_nodes:3")
		}, time.Minute, 20*time.Millisecond, "the cluster does not form")
	}
	clusterAgrees(ctx, t, nodes)
	return nodes
}

// clusterAgrees waits until all nodes have the same to say of who has which slots since which epoch. A node that takes a slot before it has
// heard of the newest epoch loses it again, and then two nodes name each other.
func clusterAgrees(ctx context.Context, t testing.TB, nodes []*redisServer) {
	t.Helper()
	var clients []*redis.Client
	for _, node := range nodes {
		clients = append(clients, node.client(t, nil))
	}
	view := func(node *redis.Client) string {
		text, err := node.ClusterNodes(ctx).Result()
		require.NoError(t, err)
		var lines []string
		for line := range strings.Lines(text) {
			fields := strings.Fields(line) // id, address, flags, master, ping, pong, epoch, state, slots…
			lines = append(lines, fmt.Sprint(fields[0], fields[6], fields[8:]))
		}
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	}
	require.Eventually(t, func() bool {
		return !slices.ContainsFunc(clients[1:], func(node *redis.Client) bool { return view(node) != view(clients[0]) })
	}, time.Minute, 20*time.Millisecond, "the nodes do not agree")
}

func clusterClient(t testing.TB, nodes []*redisServer, o redis.ClusterOptions) *redis.ClusterClient {
	t.Helper()
	for _, node := range nodes {
		o.Addrs = append(o.Addrs, node.addr)
	}
	client := redis.NewClusterClient(&o)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// bufferedConn is a net.Pipe with what a socket has: a buffer, without which a pipeline blocks on its first reply.
type bufferedConn struct {
	net.Conn
	mu     sync.Mutex
	buffer []byte
	more   chan struct{}
	done   chan struct{}
	closed sync.Once
}

func bufferWrites(conn net.Conn) net.Conn {
	c := &bufferedConn{Conn: conn, more: make(chan struct{}, 1), done: make(chan struct{})}
	go c.pump()
	return c
}

func (c *bufferedConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.buffer = append(c.buffer, p...)
	c.mu.Unlock()
	select {
	case c.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (c *bufferedConn) pump() {
	for {
		select {
		case <-c.more:
		case <-c.done:
			return
		}
		c.mu.Lock()
		p := c.buffer
		c.buffer = nil
		c.mu.Unlock()
		if _, err := c.Conn.Write(p); err != nil {
			return
		}
	}
}

// SetDeadline and SetWriteDeadline leave the pump alone.
func (c *bufferedConn) SetDeadline(t time.Time) error      { return c.SetReadDeadline(t) }
func (c *bufferedConn) SetWriteDeadline(_ time.Time) error { return nil }

func (c *bufferedConn) Close() error {
	c.closed.Do(func() { close(c.done) })
	return c.Conn.Close()
}

func TestRedisStoreConformsOnMiniredisInVirtualTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := miniredis.NewMiniRedis()
		server.ClockTTL(true)
		client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:6379", PoolSize: 1000, Dialer: func(context.Context, string, string) (net.Conn, error) {
			conn, err := server.Dial()
			return bufferWrites(conn), err
		}})
		t.Cleanup(func() {
			_ = client.Close()
			server.Close()
		})
		storetest.Run(t, func(t *testing.T) comfyui.Store { return newRedisStore(t, client) }, time.Sleep)
	})
}

// addWorker gives the servers a user with the rights that docs/recovery.md names, and no others: what a store does on a real server it does
// as that user.
func addWorker(t *testing.T, servers []*redisServer, cluster bool) (user, password string) {
	t.Helper()
	// The rights in a block, what it takes to connect, and what a cluster takes besides.
	said := regexp.MustCompile("(?s)\\*\\*ACL\\*\\*.*?```text\n(.*?)\n```.*?`(.*?)`.*?`(.*?)`").FindStringSubmatch(readText(t, "docs/recovery.md"))
	require.Len(t, said, 4)
	rights := said[1] + " " + said[2]
	if cluster {
		rights += " " + said[3]
	}
	user, password = "worker", "secret"
	rule := []any{"acl", "setuser", user, "reset", "on", ">" + password}
	for _, right := range strings.Fields(rights) {
		rule = append(rule, strings.Replace(right, "{comfyui:", "{test-", 1))
	}
	for _, server := range servers {
		require.NoError(t, server.client(t, nil).Do(t.Context(), rule...).Err())
		worker := server.client(t, func(o *redis.Options) { o.Username, o.Password = user, password })
		require.ErrorContains(t, worker.Get(t.Context(), "else").Err(), "NOPERM")
	}
	return user, password
}

func TestRedisStoreConformsOnARealServer(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	user, password := addWorker(t, []*redisServer{server}, false)
	client := server.client(t, func(o *redis.Options) { o.Username, o.Password = user, password })
	storetest.Run(t, func(t *testing.T) comfyui.Store { return newRedisStore(t, client) }, nil)
}

func TestRedisStoreConformsOnACluster(t *testing.T) {
	t.Parallel()
	nodes := startRedisCluster(t)
	user, password := addWorker(t, nodes, true)
	for name, options := range map[string]redis.ClusterOptions{
		"masters": {Username: user, Password: password},
		// There are none here, but the store must read as if there were.
		"and replicas": {Username: user, Password: password, RouteRandomly: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := clusterClient(t, nodes, options)
			storetest.Run(t, func(t *testing.T) comfyui.Store { return newRedisStore(t, client) }, nil)
		})
	}
}

// A cluster without one of its masters: what is known of the others is told.
func TestRedisStoreOnAClusterThatLostANode(t *testing.T) {
	t.Parallel()
	nodes := startRedisCluster(t, "--cluster-require-full-coverage", "no")
	client := clusterClient(t, nodes, redis.ClusterOptions{})
	s := newRedisStore(t, client)
	ctx := t.Context()
	var ids, absent []string
	for i := range 100 {
		id := fmt.Sprint("job-", i)
		_, err := s.Create(ctx, &comfyui.Record{JobID: id, Owner: "a"}, time.Hour)
		require.NoError(t, err)
		ids = append(ids, id)
		absent = append(absent, fmt.Sprint("none-", i))
	}
	nodes[1].kill()

	lost, err := s.Renew(ctx, "a", time.Hour, append(ids, absent...))
	assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), "%v", err)
	assert.NotEmpty(t, lost)
	assert.Less(t, len(lost), len(absent))
	assert.Subset(t, absent, lost)

	var walked []string
	failures := 0
	for r, err := range s.Unfinished(ctx, "") {
		if err != nil {
			failures++
			assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), "%v", err)
		} else {
			walked = append(walked, r.JobID)
		}
	}
	assert.Positive(t, failures)
	assert.NotEmpty(t, walked)
	assert.Less(t, len(walked), len(ids))
	assert.Subset(t, ids, walked)
}

// A real failover under Sentinel: the jobs that the replica had are there, and each has one owner.
func TestRedisStoreUnderSentinel(t *testing.T) {
	t.Parallel()
	master := startRedis(t)
	host, port, _ := net.SplitHostPort(master.addr)
	replica := startRedis(t, "--replicaof", host, port, "--repl-diskless-sync-delay", "0")
	config := filepath.Join(t.TempDir(), "sentinel.conf")
	require.NoError(t, os.WriteFile(config, []byte("sentinel monitor jobs "+host+" "+port+" 1\nsentinel down-after-milliseconds jobs 500\nsentinel failover-timeout jobs 2000\n"), 0o600))
	sentinel := startRedisWith(t, func(port string) []string {
		return []string{config, "--sentinel", "--port", port, "--bind", "127.0.0.1"}
	})
	ctx := t.Context()
	require.Eventually(t, func() bool {
		replicas, err := redis.NewSentinelClient(&redis.Options{Addr: sentinel.addr}).Replicas(ctx, "jobs").Result()
		return err == nil && len(replicas) == 1 && replicas[0]["flags"] == "slave" && replicas[0]["master-link-status"] == "ok"
	}, time.Minute, 50*time.Millisecond, "the sentinel does not see the replica")

	client := redis.NewFailoverClient(&redis.FailoverOptions{MasterName: "jobs", SentinelAddrs: []string{sentinel.addr}})
	t.Cleanup(func() { _ = client.Close() })
	s := newRedisStore(t, client)
	r, err := s.Create(ctx, &comfyui.Record{JobID: "job", Owner: "a", Attempt: 1, Progress: comfyui.Progress{Status: comfyui.StatusRunning}}, time.Hour)
	require.NoError(t, err)
	require.EqualValues(t, 1, master.client(t, nil).Wait(ctx, 1, time.Minute).Val(), "the replica has it")

	events := watchInBackground(ctx, s, "job")
	master.kill()
	require.Eventually(t, func() bool {
		role, err := replica.client(t, nil).Do(ctx, "role").Slice()
		return err == nil && role[0] == "master"
	}, time.Minute, 50*time.Millisecond, "no failover")
	require.Eventually(t, func() bool {
		_, err := s.Get(ctx, "job")
		return err == nil
	}, time.Minute, 50*time.Millisecond, "the client does not follow the failover")

	_, err = s.Claim(ctx, "job", "b", time.Hour)
	require.ErrorIs(t, err, comfyui.ErrJobHeld, "the lease has moved too")
	r.Rev++
	r.Progress.Status = comfyui.StatusSucceeded
	_, err = s.Update(ctx, r)
	require.NoError(t, err)
	<-events.done
	require.NoError(t, events.err)
	assert.Equal(t, comfyui.EventSucceeded, events.kinds[len(events.kinds)-1])
}
