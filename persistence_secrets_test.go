package comfyui_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
)

// wiretap keeps what goes to Redis, from whichever client.
type wiretap struct {
	mu  sync.Mutex
	log bytes.Buffer
}

type tappedConn struct {
	net.Conn
	tap *wiretap
}

func (w *wiretap) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	return &tappedConn{conn, w}, err
}

func (c *tappedConn) Write(p []byte) (int, error) {
	c.tap.mu.Lock()
	c.tap.log.Write(p)
	c.tap.mu.Unlock()
	return c.Conn.Write(p)
}

func (w *wiretap) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.String()
}

// everything reads all that a Redis holds, whatever its type.
func everything(ctx context.Context, t *testing.T, client *redis.Client) (text string, keys int) {
	t.Helper()
	var b strings.Builder
	for it := client.Scan(ctx, 0, "*", 1000).Iterator(); it.Next(ctx); {
		key := it.Val()
		keys++
		fmt.Fprintln(&b, key)
		switch kind := client.Type(ctx, key).Val(); kind {
		case "hash":
			for field, value := range client.HGetAll(ctx, key).Val() {
				fmt.Fprintln(&b, field, value)
			}
		case "zset":
			fmt.Fprintln(&b, client.ZRange(ctx, key, 0, -1).Val())
		default:
			t.Errorf("key %q is a %s: read it here", key, kind)
		}
	}
	return b.String(), keys
}

// Tokens are everywhere: in the pod's address, in headers, in extra data, in what proxies, nodes and the pod say. None of them
// comes to Redis, in whatever state a job is and however it ends.
func TestNoSecretComesToRedis(t *testing.T) {
	t.Parallel()
	const key, token = "s3cr3t-comfy-key", "s3cr3t-comfy-token"
	signed := "https://bucket.example/model.safetensors?X-Amz-Signature=s3cr3t-signature&X-Amz-Credential=s3cr3t-credential"
	fails := func(format string, args ...any) comfyuitest.Node {
		return comfyuitest.Node{Output: true, Run: func(context.Context, *comfyuitest.Call) error {
			return &comfyuitest.NodeError{ExceptionType: "RuntimeError", Message: fmt.Sprintf(format, args...)}
		}}
	}
	server := startRedis(t)
	pod := comfyuitest.Start(t,
		comfyuitest.WithNode("Work", comfyuitest.Steps(4, 20*time.Millisecond)),
		comfyuitest.WithNode("Endless", comfyuitest.Steps(200, 500*time.Millisecond)),
		comfyuitest.WithNode("Memory", failsFirst()),
		comfyuitest.WithNode("SignedURL", fails("download of %s failed", signed)),
		comfyuitest.WithNode("SaysKey", fails("401: the key %s is unknown", key)),
		comfyuitest.WithNode("SaysToken", fails("401: the token %s has expired", token)),
		comfyuitest.WithNode("Blocks", comfyuitest.Node{Output: true, Run: func(_ context.Context, c *comfyuitest.Call) error {
			c.Block("no access to " + signed)
			return nil
		}}),
		// A proxy that repeats what it was sent.
		comfyuitest.WithHandler(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				if bytes.Contains(body, []byte(`"Refused"`)) {
					w.WriteHeader(http.StatusForbidden)
					_, _ = fmt.Fprintf(w, "refused: %s with %v", r.URL, r.Header)
					return
				}
				r.Body = io.NopCloser(bytes.NewReader(body))
				next.ServeHTTP(w, r)
			})
		}),
	)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	tap := &wiretap{}
	store := newRedisStore(t, server.client(t, func(o *redis.Options) { o.Dialer = tap.dial }), comfyui.RedisCallTimeout(5*time.Second))
	base := strings.Replace(pod.URL(), "http://", "http://s3cr3t-user:s3cr3t-password@", 1) + "/?token=s3cr3t-query"
	newClient := func() *comfyui.PodClient {
		c, err := comfyui.NewPodClient(base, comfyui.WithStore(store), brisk,
			comfyui.WithHeader("X-Api-Key", "s3cr3t-header"), comfyui.WithComfyAPIKey(key),
			comfyui.WithHeaderFunc(func(context.Context) (http.Header, error) {
				return http.Header{"X-Short-Lived": {"Bearer s3cr3t-short-lived"}}, nil
			}))
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	extra := comfyui.WithExtraData(map[string]any{"api_key_comfy_org": key, "auth_token_comfy_org": token, "open": "to all"})

	c := newClient()
	for _, class := range []string{"Work", "Memory", "SignedURL", "SaysKey", "SaysToken", "Blocks", "Refused", "Unknown"} {
		r, err := c.Execute(ctx, graphOf(t, class, 1), comfyui.WithJobID("job-"+class), extra)
		if class != "Refused" && class != "Unknown" {
			require.NotNil(t, r, "%s: %v", class, err)
		}
		assert.NotContains(t, fmt.Sprint(err), "s3cr3t")
	}
	_, err := c.Submit(ctx, graphOf(t, "Endless", 1), comfyui.WithJobID("running"), extra)
	require.NoError(t, err)
	_, err = c.Submit(ctx, graphOf(t, "Endless", 2), comfyui.WithJobID("waiting"), extra)
	require.NoError(t, err)
	// And what an heir writes.
	require.NoError(t, c.Close())
	heir := newClient()
	j, err := heir.Attach(ctx, "waiting")
	require.NoError(t, err)
	require.NoError(t, j.Cancel(ctx))

	held, keys := everything(ctx, t, server.client(t, nil))
	assert.Equal(t, 11, keys, "ten jobs, and the index of the shard with the one that runs")
	sent := tap.text()
	assert.Contains(t, held, "to all", "what is no secret is kept")
	assert.Contains(t, sent, "download of https://bucket.example/model.safetensors", "and errors tell what happened")
	for where, text := range map[string]string{"holds": held, "was sent": sent} {
		if at := strings.Index(text, "s3cr3t"); at >= 0 {
			t.Errorf("Redis %s %q", where, text[max(0, at-200):min(len(text), at+60)])
		}
	}
}
