package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/comfypod/comfyui/comfyuitest"
)

// runInfra runs what stands elsewhere in production, so that it outlives the workers: a redis-server, unless redisAddr names one, and
// a pod. Where they are is left in stateFile.
func runInfra(ctx context.Context, redisAddr string, steps int, stdout io.Writer) error {
	if at, err := readState(ctx); err == nil {
		_, err = fmt.Fprintln(stdout, "infra is up already:", at)
		return err
	}
	ctx, stop := context.WithCancelCause(ctx)
	var children sync.WaitGroup
	defer children.Wait()
	defer stop(nil)
	at := addresses{Redis: redisAddr}
	if redisAddr == "" {
		server, addr, err := startRedis(ctx)
		if err != nil {
			return err
		}
		children.Go(func() {
			_ = server.Wait()
			stop(fmt.Errorf("redis-server has ended: %s", server.ProcessState))
		})
		at.Redis = addr
	}
	if err := waitForRedis(ctx, at.Redis); err != nil {
		return err
	}
	pod := startPod(steps)
	defer pod.Close()
	at.Pod = pod.URL()
	state, err := json.Marshal(at)
	if err != nil {
		return err
	}
	if err := os.WriteFile(stateFile(), state, 0o600); err != nil {
		return err
	}
	defer func() { _ = os.Remove(stateFile()) }()
	if _, err := fmt.Fprintln(stdout, "infra is up:", at); err != nil {
		return err
	}
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// startRedis starts a redis-server that keeps nothing on disk, and that is killed when ctx ends.
func startRedis(ctx context.Context) (server *exec.Cmd, addr string, err error) {
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, "", errors.New("redis-server is missing: install it (apt-get install redis-server, brew install redis), or give -redis HOST:PORT of one that runs")
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0") // finds a free port
	if err != nil {
		return nil, "", err
	}
	addr = listener.Addr().String()
	if err := listener.Close(); err != nil {
		return nil, "", err
	}
	host, port, _ := net.SplitHostPort(addr)
	server = exec.CommandContext(ctx, binary, "--bind", host, "--port", port, "--save", "", "--appendonly", "no")
	return server, addr, server.Start()
}

func waitForRedis(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, fmt.Errorf("no Redis answers at %s", addr))
	defer cancel()
	client := redis.NewClient(&redis.Options{Addr: addr})
	defer func() { _ = client.Close() }()
	for client.Ping(ctx).Err() != nil {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// runsRoute tells how often the pod began to run ?prompt=ID. Real pods do not have it.
const runsRoute = "/jobrunner/runs"

func startPod(steps int) *comfyuitest.Pod {
	var pod *comfyuitest.Pod
	pod = comfyuitest.NewPod(
		comfyuitest.WithNode("SlowSampler", comfyuitest.Steps(steps, time.Second)),
		comfyuitest.WithHandler(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !strings.HasPrefix(r.URL.Path, runsRoute) {
					next.ServeHTTP(w, r)
					return
				}
				_, _ = fmt.Fprint(w, pod.Runs(r.FormValue("prompt")))
			})
		}))
	return pod
}

// addresses are where Redis and the pod are.
type addresses struct{ Redis, Pod string }

func (a addresses) String() string { return "redis " + a.Redis + ", pod " + a.Pod }

// complete fills in what the command line does not say from infra, which may just be starting.
func (a addresses) complete(ctx context.Context) (addresses, error) {
	if a.Redis != "" && a.Pod != "" {
		return a, nil
	}
	for deadline := time.Now().Add(5 * time.Second); ; {
		infra, err := readState(ctx)
		if err == nil {
			return addresses{Redis: cmp.Or(a.Redis, infra.Redis), Pod: cmp.Or(a.Pod, infra.Pod)}, nil
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return a, errors.New("infra is not up: start it (jobrunner infra), or give -redis HOST:PORT and -pod URL")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// stateFile is the user's own: all users share the directory.
func stateFile() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("comfyui-jobrunner-%d.json", os.Getuid()))
}

// readState tells where infra is. What one that was killed has left does not count.
func readState(ctx context.Context) (at addresses, err error) {
	data, err := os.ReadFile(stateFile())
	if err != nil {
		return at, err
	}
	if err := json.Unmarshal(data, &at); err != nil {
		return at, err
	}
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", strings.TrimPrefix(at.Pod, "http://"))
	if err != nil {
		return at, err
	}
	return at, conn.Close()
}
