package comfyui_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
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

func TestNewRedisStoreRefuses(t *testing.T) {
	t.Parallel()
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", MaxRetries: -1, DialerRetries: 1})
	t.Cleanup(func() { _ = client.Close() })
	ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "127.0.0.1:1"}, HeartbeatFrequency: time.Hour})
	t.Cleanup(func() { _ = ring.Close() })
	var none *redis.Client
	tests := []struct {
		name   string
		client redis.UniversalClient
		opts   []comfyui.RedisOption
		want   string
	}{
		{"nil", nil, nil, "needs a Redis client"},
		{"a nil client", none, nil, "needs a Redis client"},
		{"a Ring", ring, nil, "second record"},
		{"no prefix", client, []comfyui.RedisOption{comfyui.RedisPrefix("")}, "prefix"},
		{"a prefix with a brace", client, []comfyui.RedisOption{comfyui.RedisPrefix("a{b}")}, "prefix"},
		{"no shards", client, []comfyui.RedisOption{comfyui.RedisShards(0)}, "shards"},
		{"too many shards", client, []comfyui.RedisOption{comfyui.RedisShards(1025)}, "shards"},
		{"no timeout", client, []comfyui.RedisOption{comfyui.RedisCallTimeout(0)}, "timeout"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, err := comfyui.NewRedisStore(tt.client, tt.opts...)
			require.ErrorContains(t, err, tt.want)
			assert.Equal(t, comfyui.CategoryValidation, comfyui.CategoryOf(err))
			assert.Nil(t, s)
		})
	}
	s, err := comfyui.NewRedisStore(client, nil, comfyui.RedisShards(1024))
	require.NoError(t, err, "no I/O: nothing listens there")
	_, err = s.Get(t.Context(), "job")
	assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err))
	_, err = new(comfyui.RedisStore).Get(t.Context(), "job")
	assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), "a zero store answers too")
	walked := 0
	for _, err := range new(comfyui.RedisStore).Unfinished(t.Context(), "") {
		assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err))
		walked++
	}
	assert.Equal(t, 1, walked, "it does not say that there are no jobs")
}

// droppingProxy stands between go-redis and Redis and loses every nth reply: the command was carried out, and go-redis, which
// cannot know that, repeats it.
type droppingProxy struct {
	listener net.Listener
	target   string
	every    int64
	replies  atomic.Int64
	dropped  atomic.Int64
	conns    sync.WaitGroup
}

func startDroppingProxy(t *testing.T, target string, every int64) *droppingProxy {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &droppingProxy{listener: listener, target: target, every: every}
	p.conns.Go(p.serve)
	t.Cleanup(func() {
		_ = listener.Close()
		p.conns.Wait()
	})
	return p
}

func (p *droppingProxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.target) //nolint:noctx // loopback, in a test
		if err != nil {
			_ = client.Close()
			continue
		}
		p.conns.Go(func() {
			defer func() { _ = server.Close() }()
			_, _ = io.Copy(server, client)
		})
		p.conns.Go(func() {
			defer func() { _ = client.Close() }()
			defer func() { _ = server.Close() }()
			p.answer(client, server)
		})
	}
}

func (p *droppingProxy) answer(client, server net.Conn) {
	buffer := make([]byte, 64<<10)
	for {
		n, err := server.Read(buffer)
		if err != nil {
			return
		}
		if p.replies.Add(1)%p.every == 0 {
			if p.dropped.Add(1)%2 == 0 { // half of it arrives
				_, _ = client.Write(buffer[:n/2])
			}
			return
		}
		if _, err := client.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func TestS38LostRepliesChangeNothing(t *testing.T) {
	t.Parallel()
	proxy := startDroppingProxy(t, startRedis(t).addr, 11)
	client := redis.NewClient(&redis.Options{
		Addr: proxy.listener.Addr().String(), MaxRetries: 50, MinRetryBackoff: time.Microsecond, MaxRetryBackoff: 2 * time.Millisecond,
	})
	t.Cleanup(func() { _ = client.Close() })
	storetest.Run(t, func(t *testing.T) comfyui.Store { return newRedisStore(t, client) }, nil)
	t.Logf("%d of %d replies were lost", proxy.dropped.Load(), proxy.replies.Load())
	require.Greater(t, proxy.dropped.Load(), int64(100))
}

// simRedis is a miniredis in a synctest bubble, whose connections a test can freeze and cut.
type simRedis struct {
	*miniredis.Miniredis
	mu     sync.Mutex
	conns  []*simConn
	thawed chan struct{} // closed while nothing is frozen
	down   bool
}

// simConn is one connection to a simRedis.
type simConn struct {
	net.Conn
	server     *simRedis
	subscribes atomic.Bool
	deaf       atomic.Bool
	deadline   atomic.Int64 // of reads, ns since 1970; 0: none
	closed     chan struct{}
	once       sync.Once
}

func newSimRedis() *simRedis {
	s := &simRedis{Miniredis: miniredis.NewMiniRedis(), thawed: make(chan struct{})}
	s.ClockTTL(true)
	close(s.thawed)
	return s
}

func (s *simRedis) client(t *testing.T, change func(*redis.Options)) *redis.Client {
	t.Helper()
	// Who waits for a connection uses timers that go-redis keeps for all clients, also for those outside of the bubble.
	o := &redis.Options{Addr: "127.0.0.1:6379", Dialer: s.dial, DialTimeout: time.Second, PoolSize: 1000}
	if change != nil {
		change(o)
	}
	client := redis.NewClient(o)
	t.Cleanup(func() {
		_ = client.Close()
		time.Sleep(2 * time.Second) // its pool looks for a closed client once a second
	})
	return client
}

func (s *simRedis) dial(context.Context, string, string) (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, errors.New("connection refused")
	}
	conn, err := s.Dial()
	if err != nil {
		return nil, err
	}
	c := &simConn{Conn: bufferWrites(conn), server: s, closed: make(chan struct{})}
	s.conns = append(s.conns, c)
	return c, nil
}

func (c *simConn) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("\r\nsubscribe\r\n")) {
		c.subscribes.Store(true)
	}
	return c.Conn.Write(p)
}

func (c *simConn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if err != nil {
			return n, err
		}
		c.server.mu.Lock()
		thawed := c.server.thawed
		c.server.mu.Unlock()
		late, stop := c.late()
		select {
		case <-thawed:
		case <-c.closed:
			err = net.ErrClosed
		case <-late:
			err = os.ErrDeadlineExceeded
		}
		stop()
		if err != nil {
			return 0, err
		}
		if !c.deaf.Load() {
			return n, nil
		}
	}
}

// late fires at the read deadline; never when there is none.
func (c *simConn) late() (<-chan time.Time, func()) {
	ns := c.deadline.Load()
	if ns == 0 {
		return nil, func() {}
	}
	timer := time.NewTimer(time.Until(time.Unix(0, ns)))
	return timer.C, func() { timer.Stop() }
}

func (c *simConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

func (c *simConn) SetReadDeadline(t time.Time) error {
	c.deadline.Store(0)
	if !t.IsZero() {
		c.deadline.Store(t.UnixNano())
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *simConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// freeze makes Redis one that takes everything and answers nothing.
func (s *simRedis) freeze() (thaw func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	thawed := make(chan struct{})
	s.thawed = thawed
	return func() { close(thawed) }
}

// each calls do with every connection that subscribes.
func (s *simRedis) subscribers(do func(*simConn)) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if c.subscribes.Load() {
			do(c)
			n++
		}
	}
	return n
}

// stop cuts all connections and refuses new ones, until restart.
func (s *simRedis) stop() (restart func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = true
	for _, c := range s.conns {
		_ = c.Close()
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.down = false
	}
}

// everyCall calls each method of the store.
func everyCall(ctx context.Context, s *comfyui.RedisStore) map[string]func() error {
	r := &comfyui.Record{JobID: "job", Owner: "a", Epoch: 1, Rev: 9}
	return map[string]func() error{
		"Create":        func() error { _, err := s.Create(ctx, r, time.Hour); return err },
		"Get":           func() error { _, err := s.Get(ctx, "job"); return err },
		"Update":        func() error { _, err := s.Update(ctx, r); return err },
		"Claim":         func() error { _, err := s.Claim(ctx, "job", "a", time.Hour); return err },
		"Renew":         func() error { _, err := s.Renew(ctx, "a", time.Hour, []string{"job", "other"}); return err },
		"Release":       func() error { return s.Release(ctx, "a", []string{"job", "other"}) },
		"RequestCancel": func() error { _, err := s.RequestCancel(ctx, "job"); return err },
		"Unfinished": func() error {
			var last error
			for _, err := range s.Unfinished(ctx, "") {
				last = err
			}
			return last
		},
		"Watch": func() error {
			var last error
			for _, err := range s.Watch(ctx, "job") {
				last = err
			}
			return last
		},
	}
}

// A Redis that hangs holds no call past its ctx or the store's timeout, whatever the client's own timeouts.
func TestRedisStoreOnAHungRedis(t *testing.T) {
	t.Parallel()
	clients := map[string]func(*redis.Options){
		"defaults":                  nil,
		"no timeouts":               func(o *redis.Options) { o.ReadTimeout, o.WriteTimeout = -1, -1 },
		"no timeouts, no retries":   func(o *redis.Options) { o.ReadTimeout, o.WriteTimeout, o.MaxRetries = -1, -1, -1 },
		"heeding the ctx by halves": func(o *redis.Options) { o.ReadTimeout, o.ContextTimeoutEnabled = -1, true },
	}
	for name, change := range clients {
		for _, fromTheStart := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, from the start %v", name, fromTheStart), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					server := newSimRedis()
					t.Cleanup(server.Close)
					client := server.client(t, change)
					s := newRedisStore(t, client, comfyui.RedisCallTimeout(700*time.Millisecond))
					if !fromTheStart {
						_, err := s.Create(t.Context(), &comfyui.Record{JobID: "job", Owner: "a"}, time.Hour)
						require.NoError(t, err)
					}
					server.freeze()

					for method, call := range everyCall(t.Context(), s) {
						began := time.Now()
						err := call()
						assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), "%s: %v", method, err)
						require.ErrorIs(t, err, os.ErrDeadlineExceeded, method)
						assert.Equal(t, 700*time.Millisecond, time.Since(began), method)
					}

					short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
					defer cancel()
					began := time.Now()
					for method, call := range everyCall(short, s) {
						err := call()
						assert.Equal(t, comfyui.CategoryContext, comfyui.CategoryOf(err), "%s: %v", method, err)
						require.ErrorIs(t, err, context.DeadlineExceeded, method)
					}
					assert.Equal(t, 200*time.Millisecond, time.Since(began))

					cancelled, cancel := context.WithCancel(t.Context())
					time.AfterFunc(100*time.Millisecond, cancel)
					_, err := s.Get(cancelled, "job")
					require.ErrorIs(t, err, context.Canceled)
					// What go-redis still waits for ends with the client; else the bubble would not end.
				})
			})
		}
	}
}

// The same on sockets, where calls wait for the only connection too.
func TestRedisStoreOnAHungRedisWithOneConnection(t *testing.T) {
	t.Parallel()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0") // the kernel accepts, and nobody answers
	require.NoError(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	client := redis.NewClient(&redis.Options{Addr: listener.Addr().String(), PoolSize: 1, ReadTimeout: -1})
	t.Cleanup(func() { _ = client.Close() })
	s := newRedisStore(t, client, comfyui.RedisCallTimeout(20*time.Millisecond))
	for range 3 {
		for method, call := range everyCall(t.Context(), s) {
			err := call()
			assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), "%s: %v", method, err)
		}
	}
}

// A watch on a Redis that hangs later ends with its ctx, too.
func TestRedisWatchOnARedisThatHangsLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newSimRedis()
		t.Cleanup(server.Close)
		s := newRedisStore(t, server.client(t, func(o *redis.Options) { o.ReadTimeout = -1 }), comfyui.RedisCallTimeout(time.Second))
		_, err := s.Create(t.Context(), &comfyui.Record{JobID: "job", Owner: "a"}, time.Hour)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		began := time.Now()
		for e, err := range s.Watch(ctx, "job") {
			if err != nil {
				require.ErrorIs(t, err, context.DeadlineExceeded)
				break
			}
			assert.Equal(t, comfyui.EventSnapshot, e.Kind)
			synctest.Wait()
			server.freeze()
		}
		assert.Equal(t, 20*time.Second, time.Since(began))
	})
}

func TestRedisStoreRoundTrips(t *testing.T) {
	t.Parallel()
	client := startRedis(t).client(t, nil)
	trips := countTrips(client)
	s := newRedisStore(t, client, comfyui.RedisCallTimeout(5*time.Second))
	ctx := t.Context()
	one := func(id string) {
		r, err := s.Create(ctx, &comfyui.Record{JobID: id, Owner: "a", Attempt: 1, Workflow: benchWorkflow(8)}, time.Hour)
		for _, status := range []comfyui.Status{comfyui.StatusQueued, comfyui.StatusRunning, comfyui.StatusSucceeded} {
			require.NoError(t, err)
			r.Rev++
			r.Progress.Status = status
			r, err = s.Update(ctx, r)
		}
		require.NoError(t, err)
	}
	one("first") // loads the scripts
	assert.LessOrEqual(t, trips.Swap(0), int64(6))
	one("second")
	assert.Equal(t, int64(4), trips.Swap(0), "created, queued, running, ended")

	require.NoError(t, client.ScriptFlush(ctx).Err())
	trips.Store(0)
	one("third")
	assert.LessOrEqual(t, trips.Swap(0), int64(6), "scripts that Redis forgot are sent again")

	var ids []string
	for i := range 2000 {
		id := fmt.Sprint("job-", i)
		ids = append(ids, id)
		_, err := s.Create(ctx, &comfyui.Record{JobID: id, Owner: "a"}, time.Hour)
		require.NoError(t, err)
	}
	trips.Store(0)
	lost, err := s.Renew(ctx, "a", time.Hour, ids)
	require.NoError(t, err)
	assert.Empty(t, lost)
	assert.Equal(t, int64(1), trips.Swap(0), "all shards are on one node")
	require.NoError(t, s.Release(ctx, "a", ids))
	assert.Equal(t, int64(1), trips.Swap(0))
	for _, err := range s.Unfinished(ctx, "") {
		require.NoError(t, err)
	}
	assert.LessOrEqual(t, trips.Swap(0), int64(1+16), "one for the ids, one for the records of each shard")
	_, err = s.Renew(ctx, "a", time.Hour, nil)
	require.NoError(t, err)
	assert.Zero(t, trips.Load())
}

// An index that is longer than a page is walked by its cursor, and each job comes once all the same.
func TestRedisStoreWalksManyPages(t *testing.T) {
	t.Parallel()
	const jobs = 2500
	s := newRedisStore(t, startRedis(t).client(t, nil), comfyui.RedisShards(1))
	ctx := t.Context()
	want := make([]string, jobs)
	var makers sync.WaitGroup
	for m := range 8 {
		makers.Go(func() {
			for i := m; i < jobs; i += 8 {
				want[i] = fmt.Sprintf("job-%04d", i)
				_, err := s.Create(ctx, &comfyui.Record{JobID: want[i], Owner: "a"}, time.Hour)
				assert.NoError(t, err)
			}
		})
	}
	makers.Wait()
	var found []string
	for r, err := range s.Unfinished(ctx, "") {
		require.NoError(t, err)
		found = append(found, r.JobID)
	}
	slices.Sort(found)
	assert.Equal(t, want, found)
}

// countTrips counts what goes over the wire and comes back.
func countTrips(client *redis.Client) *atomic.Int64 {
	var h tripCounter
	client.AddHook(&h)
	return &h.n
}

type tripCounter struct{ n atomic.Int64 }

// count leaves out what go-redis does for each new connection.
func (h *tripCounter) count(first redis.Cmder) {
	switch first.Name() {
	case "hello", "client":
	default:
		h.n.Add(1)
	}
}

func (h *tripCounter) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h *tripCounter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		h.count(cmd)
		return next(ctx, cmd)
	}
}

func (h *tripCounter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		h.count(cmds[0])
		return next(ctx, cmds)
	}
}

// What is where, and for how long: docs and those who look into Redis rely on it.
func TestRedisStoreKeys(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newSimRedis()
		t.Cleanup(server.Close)
		client := server.client(t, nil)
		s, err := comfyui.NewRedisStore(client, comfyui.RedisPrefix("studio"), comfyui.RedisShards(1))
		require.NoError(t, err)
		ctx := t.Context()
		const job, index = "{studio:0}:job:order-7", "{studio:0}:unfinished"

		r, err := s.Create(ctx, &comfyui.Record{
			JobID: "order-7", Pod: "gpu-1", Owner: "a", Workflow: benchWorkflow(8), Retention: time.Hour,
			Progress: comfyui.Progress{Status: comfyui.StatusPending},
		}, time.Minute)
		require.NoError(t, err)
		assert.ElementsMatch(t, []string{job, index}, server.Keys())
		assert.Zero(t, server.TTL(job), "no TTL while unfinished")
		assert.Zero(t, server.TTL(index))
		until := time.Now().Add(time.Minute).UnixMicro()
		score, err := server.ZScore(index, "order-7")
		require.NoError(t, err)
		assert.Equal(t, float64(until), score)
		for field, want := range map[string]string{
			"schema": "1", "owner": "a", "epoch": "1", "rev": "0", "lease": fmt.Sprint(until), "cancel": "0", "pod": "gpu-1", "status": "pending", "ended": "0",
		} {
			assert.Equal(t, want, server.HGet(job, field), field)
		}
		assert.True(t, json.Valid([]byte(server.HGet(job, "record"))))
		assert.NotContains(t, server.HGet(job, "record"), "KSampler", "the workflow stands by itself")
		assert.Less(t, len(server.HGet(job, "workflow")), len(benchWorkflow(8))/3, "and is packed")
		packed := server.HGet(job, "workflow")

		r.Rev++
		r.Progress.Status = comfyui.StatusRunning
		r, err = s.Update(ctx, r)
		require.NoError(t, err)
		assert.Equal(t, packed, server.HGet(job, "workflow"))
		assert.Equal(t, "running", server.HGet(job, "status"))

		r.Rev++
		r.Progress.Status = comfyui.StatusSucceeded
		_, err = s.Update(ctx, r)
		require.NoError(t, err)
		assert.Equal(t, []string{job}, server.Keys())
		assert.Equal(t, time.Hour, server.TTL(job))
		assert.Empty(t, server.HGet(job, "workflow"))
		assert.Equal(t, "1", server.HGet(job, "ended"))

		_, err = s.Claim(ctx, "order-7", "b", 2*time.Hour)
		require.NoError(t, err)
		assert.Equal(t, 2*time.Hour, server.TTL(job))
		time.Sleep(2 * time.Hour)
		assert.Empty(t, server.Keys(), "nothing is left")
	})
}

func TestS40RedisRecordOfANewerSchema(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newSimRedis()
		t.Cleanup(server.Close)
		s, err := comfyui.NewRedisStore(server.client(t, nil), comfyui.RedisShards(1))
		require.NoError(t, err)
		ctx := t.Context()
		r := &comfyui.Record{JobID: "new", Pod: "p", Owner: "a", Rev: 1}
		created, err := s.Create(ctx, r, 0)
		require.NoError(t, err)
		_, err = s.Create(ctx, &comfyui.Record{JobID: "old", Pod: "p", Owner: "a"}, 0)
		require.NoError(t, err)
		const job = "{comfyui:0}:job:new"
		server.HSet(job, "schema", "2", "record", `{"schema":2,"id":{"job":"new"},"progress":[0.5]}`)
		keys, err := server.HKeys(job)
		require.NoError(t, err)
		before := map[string]string{}
		for _, field := range keys {
			before[field] = server.HGet(job, field)
		}

		created.Rev++
		higher := created.Clone()
		higher.Epoch = 7
		for name, call := range map[string]func() error{
			"Create":             func() error { _, err := s.Create(ctx, r, time.Hour); return err },
			"Get":                func() error { _, err := s.Get(ctx, "new"); return err },
			"Update":             func() error { _, err := s.Update(ctx, created); return err },
			"Update, next epoch": func() error { _, err := s.Update(ctx, higher); return err },
			"Claim":              func() error { _, err := s.Claim(ctx, "new", "b", time.Hour); return err },
			"RequestCancel":      func() error { _, err := s.RequestCancel(ctx, "new"); return err },
			"Watch": func() error {
				for _, err := range s.Watch(ctx, "new") {
					return err
				}
				return nil
			},
		} {
			err := call()
			require.ErrorIs(t, err, comfyui.ErrSchema, name)
			assert.Contains(t, err.Error(), "a newer version of the library wrote it", name)
		}
		for field, value := range before {
			assert.Equal(t, value, server.HGet(job, field), "%s is left alone", field)
		}

		var ids []string
		var failures []error
		for r, err := range s.Unfinished(ctx, "p") {
			if err != nil {
				failures = append(failures, err)
			} else {
				ids = append(ids, r.JobID)
			}
		}
		assert.Equal(t, []string{"old"}, ids, "the walk goes on")
		require.Len(t, failures, 1)
		require.ErrorIs(t, failures[0], comfyui.ErrSchema)
		var e *comfyui.Error
		require.ErrorAs(t, failures[0], &e)
		assert.Equal(t, "new", e.JobID)
	})
}

// What others did to the keys is an error or is put right; it never panics, and costs the other jobs nothing.
func TestRedisStoreAmongStrangers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newSimRedis()
		t.Cleanup(server.Close)
		s, err := comfyui.NewRedisStore(server.client(t, nil), comfyui.RedisShards(1))
		require.NoError(t, err)
		ctx := t.Context()
		for _, id := range []string{"good", "deleted", "no json", "no number", "no workflow", "string"} {
			_, err := s.Create(ctx, &comfyui.Record{JobID: id, Owner: "a", Workflow: benchWorkflow(1)}, time.Hour)
			require.NoError(t, err)
		}
		server.Del("{comfyui:0}:job:deleted")
		server.HSet("{comfyui:0}:job:no json", "record", "{")
		server.HSet("{comfyui:0}:job:no number", "rev", "many")
		server.HSet("{comfyui:0}:job:no workflow", "workflow", "dxyz")

		var ids []string
		failures := 0
		for r, err := range s.Unfinished(ctx, "") {
			if err != nil {
				failures++
			} else {
				ids = append(ids, r.JobID)
			}
		}
		assert.ElementsMatch(t, []string{"good", "string"}, ids)
		assert.Equal(t, 3, failures)
		members, err := server.ZMembers("{comfyui:0}:unfinished")
		require.NoError(t, err)
		assert.NotContains(t, members, "deleted", "an entry without a job goes")
		for _, id := range []string{"no json", "no number", "no workflow"} {
			_, err := s.Get(ctx, id)
			assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), id)
			_, err = s.Claim(ctx, id, "b", time.Hour)
			require.ErrorIs(t, err, comfyui.ErrJobHeld, "the verdict stands, even when the record cannot be read")
		}
		server.Del("{comfyui:0}:job:string")
		require.NoError(t, server.Set("{comfyui:0}:job:string", "text"))
		for name, call := range everyCallOf(ctx, s, "string") {
			err := call()
			assert.Equal(t, comfyui.CategoryStorage, comfyui.CategoryOf(err), name)
		}
	})
}

func everyCallOf(ctx context.Context, s *comfyui.RedisStore, id string) map[string]func() error {
	r := &comfyui.Record{JobID: id, Owner: "a", Epoch: 1, Rev: 9}
	return map[string]func() error{
		"Create":        func() error { _, err := s.Create(ctx, r, time.Hour); return err },
		"Get":           func() error { _, err := s.Get(ctx, id); return err },
		"Update":        func() error { _, err := s.Update(ctx, r); return err },
		"Claim":         func() error { _, err := s.Claim(ctx, id, "a", time.Hour); return err },
		"Renew":         func() error { _, err := s.Renew(ctx, "a", time.Hour, []string{id}); return err },
		"Release":       func() error { return s.Release(ctx, "a", []string{id}) },
		"RequestCancel": func() error { _, err := s.RequestCancel(ctx, id); return err },
	}
}

// eventsOf collects the events of a watch, with the time at which each came.
type eventsOf struct {
	mu    sync.Mutex
	kinds []comfyui.EventKind
	at    []time.Duration
	err   error
	done  chan struct{}
}

func watchInBackground(ctx context.Context, s *comfyui.RedisStore, id string) *eventsOf {
	e := &eventsOf{done: make(chan struct{})}
	began := time.Now()
	go func() {
		defer close(e.done)
		for event, err := range s.Watch(ctx, id) {
			e.mu.Lock()
			if err != nil {
				e.err = err
			} else {
				e.kinds = append(e.kinds, event.Kind)
				e.at = append(e.at, time.Since(began))
			}
			e.mu.Unlock()
		}
	}()
	return e
}

func (e *eventsOf) last() (comfyui.EventKind, time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.kinds) == 0 {
		return "", 0
	}
	return e.kinds[len(e.kinds)-1], e.at[len(e.at)-1]
}

// watchBench is a job in a simRedis and a watch of it.
type watchBench struct {
	*testing.T
	server *simRedis
	client *redis.Client
	store  *comfyui.RedisStore
	record *comfyui.Record
	events *eventsOf
	began  time.Time
}

func inWatchBench(t *testing.T, run func(b *watchBench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		server := newSimRedis()
		t.Cleanup(server.Close)
		client := server.client(t, nil)
		b := &watchBench{T: t, server: server, client: client, store: newRedisStore(t, client)}
		var err error
		b.record, err = b.store.Create(t.Context(), &comfyui.Record{JobID: "job", Owner: "a", Attempt: 1, Progress: comfyui.Progress{Status: comfyui.StatusPending}}, time.Hour)
		require.NoError(t, err)
		b.began = time.Now()
		b.events = watchInBackground(t.Context(), b.store, "job")
		synctest.Wait()
		b.want(comfyui.EventSnapshot, 0)
		run(b)
		<-b.events.done
	})
}

func (b *watchBench) write(s comfyui.Status) {
	b.Helper()
	r := b.record.Clone()
	r.Rev++
	r.Progress.Status = s
	var err error
	b.record, err = b.store.Update(b.Context(), r)
	require.NoError(b, err)
	synctest.Wait()
}

// want checks that the newest event came not more than within after the bench's own time.
func (b *watchBench) want(kind comfyui.EventKind, within time.Duration) {
	b.Helper()
	asked := time.Since(b.began)
	time.Sleep(within)
	synctest.Wait()
	got, at := b.events.last()
	require.Equal(b, kind, got)
	assert.LessOrEqual(b, at, asked+within)
}

func TestRedisWatchTellsAtOnce(t *testing.T) {
	t.Parallel()
	inWatchBench(t, func(b *watchBench) {
		for _, step := range []struct {
			status comfyui.Status
			kind   comfyui.EventKind
		}{
			{comfyui.StatusQueued, comfyui.EventQueued}, {comfyui.StatusRunning, comfyui.EventStarted}, {comfyui.StatusSucceeded, comfyui.EventSucceeded},
		} {
			b.write(step.status)
			b.want(step.kind, 0)
		}
	})
}

// A record that is too long for a notification is looked up.
func TestRedisWatchOfALongRecord(t *testing.T) {
	t.Parallel()
	inWatchBench(t, func(b *watchBench) {
		b.record.Labels = map[string]string{"long": strings.Repeat("x", 10_000)}
		b.write(comfyui.StatusQueued)
		b.want(comfyui.EventQueued, 0)
		b.write(comfyui.StatusCancelled)
		b.want(comfyui.EventCancelled, 0)
	})
}

// The subscription goes deaf without a sign, as behind a half-open connection: Get makes good what is lost, and after some
// silence there is a new subscription.
func TestRedisWatchMakesLostNotificationsGood(t *testing.T) {
	t.Parallel()
	inWatchBench(t, func(b *watchBench) {
		require.Equal(b, 1, b.server.subscribers(func(c *simConn) { c.deaf.Store(true) }))
		b.write(comfyui.StatusQueued)
		b.want(comfyui.EventQueued, 5*time.Second)
		time.Sleep(time.Minute)
		b.write(comfyui.StatusRunning)
		b.want(comfyui.EventStarted, 0)
		require.Equal(b, 2, b.server.subscribers(func(*simConn) {}))
		b.write(comfyui.StatusSucceeded)
	})
}

func TestRedisWatchReconnects(t *testing.T) {
	t.Parallel()
	inWatchBench(t, func(b *watchBench) {
		b.server.subscribers(func(c *simConn) { _ = c.Close() })
		b.write(comfyui.StatusQueued)
		b.want(comfyui.EventQueued, time.Second)
		b.write(comfyui.StatusRunning)
		b.want(comfyui.EventStarted, 0)
		b.write(comfyui.StatusSucceeded)
	})
}

func TestRedisWatchOutlivesAMinuteWithoutRedis(t *testing.T) {
	t.Parallel()
	inWatchBench(t, func(b *watchBench) {
		restart := b.server.stop()
		time.Sleep(time.Minute)
		restart()
		time.Sleep(2 * time.Second) // go-redis tries once a second
		b.write(comfyui.StatusRunning)
		b.want(comfyui.EventStarted, 10*time.Second)
		time.Sleep(time.Minute)
		b.write(comfyui.StatusFailed)
		b.want(comfyui.EventFailed, 0)
	})
}

func TestRedisWatchGivesUpAfterMinutesWithoutRedis(t *testing.T) {
	t.Parallel()
	inWatchBench(t, func(b *watchBench) {
		b.server.stop()
		<-b.events.done
		assert.Equal(b, comfyui.CategoryStorage, comfyui.CategoryOf(b.events.err))
		assert.InDelta(b, 2*time.Minute, time.Since(b.began), float64(10*time.Second))
	})
}

// The record is gone for a while, and its owner writes it again.
func TestRedisWatchOfARecordThatRedisLost(t *testing.T) {
	t.Parallel()
	inWatchBench(t, func(b *watchBench) {
		b.server.FlushAll()
		time.Sleep(20 * time.Second)
		b.record.Progress.Status = comfyui.StatusRunning
		var err error
		b.record, err = b.store.Create(b.Context(), b.record, time.Hour)
		require.NoError(b, err)
		b.want(comfyui.EventStarted, 5*time.Second)
		b.server.FlushAll()
		<-b.events.done
		require.ErrorIs(b, b.events.err, comfyui.ErrJobNotFound)
	})
}

// Many watches share one connection, and leave nothing behind.
func TestRedisWatchesShareASubscription(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newSimRedis()
		t.Cleanup(server.Close)
		s := newRedisStore(t, server.client(t, nil))
		for round := range 2 {
			var watches []*eventsOf
			var records []*comfyui.Record
			for i := range 50 {
				r, err := s.Create(t.Context(), &comfyui.Record{JobID: fmt.Sprintf("job-%d-%d", round, i), Owner: "a", Attempt: 1}, time.Hour)
				require.NoError(t, err)
				records = append(records, r)
				for range 3 {
					watches = append(watches, watchInBackground(t.Context(), s, r.JobID))
				}
				synctest.Wait()
			}
			assert.Equal(t, round+1, server.subscribers(func(*simConn) {}))
			assert.Len(t, server.PubSubChannels(""), 50)
			for _, r := range records {
				r.Rev++
				r.Progress.Status = comfyui.StatusSucceeded
				_, err := s.Update(t.Context(), r)
				require.NoError(t, err)
			}
			for _, w := range watches {
				<-w.done
				require.NoError(t, w.err)
				assert.Equal(t, comfyui.EventSucceeded, w.kinds[len(w.kinds)-1])
			}
			synctest.Wait()
			assert.Empty(t, server.PubSubChannels(""))
		}
	})
}

// A failover to a replica that lacked the last writes: here a server that is killed and starts from its last snapshot.
func TestS39RedisLosesItsLastWrites(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server := startRedis(t, "--dir", dir)
	client := server.client(t, nil)
	s := newRedisStore(t, client)
	ctx := t.Context()
	create := func(id string, ttl time.Duration) *comfyui.Record {
		r, err := s.Create(ctx, &comfyui.Record{JobID: id, Owner: "a", Attempt: 1, Rev: 1, Workflow: benchWorkflow(1), Progress: comfyui.Progress{Status: comfyui.StatusQueued}}, ttl)
		require.NoError(t, err)
		return r
	}
	write := func(r *comfyui.Record, status comfyui.Status) *comfyui.Record {
		r = r.Clone()
		r.Rev++
		r.Progress.Status = status
		stored, err := s.Update(ctx, r)
		require.NoError(t, err)
		return stored
	}
	moved, ended := create("moved", 0), create("ended", time.Hour)
	create("cancelled", time.Hour)
	write(create("reopened", time.Hour), comfyui.StatusFailed)
	require.NoError(t, client.Save(ctx).Err())

	// What is lost: a record, a claim, an end, a cancel, a rerun.
	fresh := write(create("fresh", time.Hour), comfyui.StatusRunning)
	claimed, err := s.Claim(ctx, "moved", "b", time.Hour)
	require.NoError(t, err)
	endWritten := write(ended, comfyui.StatusSucceeded)
	cancelled, err := s.RequestCancel(ctx, "cancelled")
	require.NoError(t, err)
	rerun, err := s.Claim(ctx, "reopened", "b", time.Hour)
	require.NoError(t, err)
	rerun.Workflow = benchWorkflow(1)
	rerun = write(rerun, comfyui.StatusPending)
	server.killAndRestart(t)

	// fresh: its owner finds it gone and creates it from its own state.
	_, err = s.Update(ctx, fresh)
	require.ErrorIs(t, err, comfyui.ErrJobNotFound)
	got, err := s.Create(ctx, fresh, time.Hour)
	require.NoError(t, err)
	assert.Equal(t, "a", got.Owner)
	assert.Equal(t, comfyui.StatusRunning, got.Progress.Status)
	write(got, comfyui.StatusSucceeded)

	// moved: the new owner's next write stands, and fences the former one; a third, that claimed after the failover, does not
	// become a second owner.
	lapsed, err := s.Get(ctx, "moved")
	require.NoError(t, err)
	assert.Equal(t, int64(1), lapsed.Epoch)
	third, err := s.Claim(ctx, "moved", "c", time.Hour)
	require.NoError(t, err)
	assert.Equal(t, claimed.Epoch, third.Epoch, "the same number twice: the store had lost the first")
	claimed.Rev++
	_, err = s.Update(ctx, claimed)
	require.ErrorIs(t, err, comfyui.ErrFenced)
	moved.Rev++
	_, err = s.Update(ctx, moved)
	require.ErrorIs(t, err, comfyui.ErrFenced)
	write(third, comfyui.StatusRunning)

	// ended: the end, written again, stands.
	got, err = s.Get(ctx, "ended")
	require.NoError(t, err)
	assert.Equal(t, comfyui.StatusQueued, got.Progress.Status)
	_, err = s.Update(ctx, endWritten)
	require.NoError(t, err)

	// cancelled: the owner knows of the request, and its next write brings it back.
	assert.True(t, write(cancelled, comfyui.StatusRunning).CancelRequested)

	// reopened: the rerun's next write stands, with its workflow.
	got = write(rerun, comfyui.StatusQueued)
	assert.Equal(t, "b", got.Owner)
	assert.JSONEq(t, string(benchWorkflow(1)), string(got.Workflow))

	var unfinished []string
	for r, err := range s.Unfinished(ctx, "") {
		require.NoError(t, err)
		unfinished = append(unfinished, r.JobID)
	}
	slices.Sort(unfinished)
	assert.Equal(t, []string{"cancelled", "moved", "reopened"}, unfinished)
}
