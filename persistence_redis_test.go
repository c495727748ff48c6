package comfyui_test

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
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
	addr string
	cmd  *exec.Cmd
}

// startRedis skips the test where there is no redis-server: apt-get install redis-server.
func startRedis(t testing.TB, args ...string) *redisServer {
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
		if s := tryRedis(t, binary, addr, args); s != nil {
			return s
		}
	}
	t.Fatal("redis-server does not start")
	return nil
}

// tryRedis returns nil if another program has taken the port meanwhile.
func tryRedis(t testing.TB, binary, addr string, args []string) *redisServer {
	t.Helper()
	_, port, _ := net.SplitHostPort(addr)
	args = append([]string{
		"--port", port, "--bind", "127.0.0.1", "--dir", t.TempDir(), "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction",
	}, args...)
	s := &redisServer{addr: addr, cmd: exec.Command(binary, args...)} //nolint:gosec,noctx // it outlives no test: killed by Cleanup
	require.NoError(t, s.cmd.Start())
	ended := make(chan struct{})
	go func() { _ = s.cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		<-ended
	})
	client := redis.NewClient(&redis.Options{Addr: addr, MaxRetries: -1})
	defer func() { _ = client.Close() }()
	for {
		if err := client.Ping(t.Context()).Err(); err == nil {
			return s
		}
		select {
		case <-ended:
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
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
func startRedisCluster(t testing.TB) *redis.ClusterClient {
	t.Helper()
	const slots = 16384
	var nodes []*redisServer
	for i := range 3 {
		nodes = append(nodes, startRedis(t, "--cluster-enabled", "yes", "--cluster-config-file", fmt.Sprintf("node-%d.conf", i), "--cluster-node-timeout", "5000"))
	}
	ctx := t.Context()
	var addrs []string
	for i, node := range nodes {
		client := node.client(t, nil)
		require.NoError(t, client.ClusterAddSlotsRange(ctx, i*slots/3, (i+1)*slots/3-1).Err())
		host, port, _ := net.SplitHostPort(nodes[0].addr)
		require.NoError(t, client.ClusterMeet(ctx, host, port).Err())
		addrs = append(addrs, node.addr)
	}
	for _, node := range nodes {
		client := node.client(t, nil)
		require.Eventually(t, func() bool {
			info, err := client.ClusterInfo(ctx).Result()
			return err == nil && strings.Contains(info, "cluster_state:ok") && strings.Contains(info, "cluster_known_nodes:3")
		}, time.Minute, 20*time.Millisecond, "the cluster does not form")
	}
	cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs})
	t.Cleanup(func() { _ = cluster.Close() })
	return cluster
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
		client := redis.NewClient(&redis.Options{Dialer: func(context.Context, string, string) (net.Conn, error) {
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

func TestRedisStoreConformsOnARealServer(t *testing.T) {
	t.Parallel()
	client := startRedis(t).client(t, nil)
	storetest.Run(t, func(t *testing.T) comfyui.Store { return newRedisStore(t, client) }, nil)
}

func TestRedisStoreConformsOnACluster(t *testing.T) {
	t.Parallel()
	client := startRedisCluster(t)
	storetest.Run(t, func(t *testing.T) comfyui.Store { return newRedisStore(t, client) }, nil)
}
