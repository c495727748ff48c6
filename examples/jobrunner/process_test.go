//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
)

// world is a directory for temporary files with everything that runs in it: processes of the program, found by each other and by
// nobody else.
type world struct {
	t       *testing.T
	program string
	tmp     string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	needRedis(t)
	w := &world{t: t, tmp: t.TempDir()}
	w.program = filepath.Join(w.tmp, "jobrunner")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", w.program, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return w
}

func needRedis(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("redis-server is missing: apt-get install redis-server")
	}
}

// process is one of the program. Its output is logged if the test fails.
type process struct {
	*exec.Cmd
	ended  chan error
	output *bytes.Buffer // complete when it has ended
}

func (w *world) start(args ...string) *process {
	w.t.Helper()
	p := &process{Cmd: exec.Command(w.program, args...), ended: make(chan error, 1), output: &bytes.Buffer{}} //nolint:noctx // ended by signals
	p.Env = append(os.Environ(), "TMPDIR="+w.tmp)
	p.Stdout, p.Stderr = p.output, p.output
	require.NoError(w.t, p.Start())
	done := make(chan struct{})
	go func() {
		p.ended <- p.Wait()
		close(done)
	}()
	w.t.Cleanup(func() {
		_ = p.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			_ = p.Process.Kill()
			<-done
			w.t.Errorf("%v did not stop", args)
		}
		if w.t.Failed() {
			w.t.Logf("%v:\n%s", args, p.output)
		}
	})
	return p
}

// end waits for the end of a process.
func (w *world) end(p *process) error {
	w.t.Helper()
	select {
	case err := <-p.ended:
		return err
	case <-time.After(3 * time.Minute):
		w.t.Fatalf("%v goes on and on", p.Args)
		return nil
	}
}

// look opens the services of a running infra.
func (w *world) look() *services {
	w.t.Helper()
	var at addresses
	require.Eventually(w.t, func() bool {
		data, err := os.ReadFile(filepath.Join(w.tmp, filepath.Base(stateFile())))
		return err == nil && json.Unmarshal(data, &at) == nil
	}, 20*time.Second, 20*time.Millisecond)
	s, err := open(w.t.Context(), at)
	require.NoError(w.t, err)
	w.t.Cleanup(s.close)
	return s
}

// A worker is stopped in the middle of a job, gently or not at all; another one gets the job's end. The pod runs it once.
func TestAnotherWorkerJoins(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		signal os.Signal
		exit   string
	}{
		// asynq does not know yet that the worker is gone: it is Recover that finds the job.
		"kill -9": {signal: syscall.SIGKILL, exit: "signal: killed"},
		// The task is back on the queue at once, and its redelivery joins the running job.
		"SIGTERM": {signal: syscall.SIGTERM},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.start("infra", "-steps", "30")
			s := w.look()
			enqueue := w.start("enqueue")
			require.NoError(t, w.end(enqueue))
			id := strings.TrimSpace(enqueue.output.String())

			first := w.start("worker")
			record := w.until(s, id, func(r *comfyui.Record) bool {
				return r.Progress.Status == comfyui.StatusRunning && r.Progress.Fraction > 0
			})
			require.NoError(t, first.Process.Signal(c.signal))
			if err := w.end(first); c.exit == "" {
				require.NoError(t, err)
			} else {
				require.EqualError(t, err, c.exit)
			}
			former := record.Owner

			second := w.start("worker")
			record = w.until(s, id, func(r *comfyui.Record) bool { return r.Owner != former })
			require.Equal(t, comfyui.StatusRunning, record.Progress.Status, "the job was running when the other worker came")
			record = w.until(s, id, func(r *comfyui.Record) bool { return r.Progress.Status.Terminal() })
			require.Equal(t, comfyui.StatusSucceeded, record.Progress.Status)
			require.Len(t, record.Outputs, 1)
			require.Equal(t, 1, record.Attempt)
			runs, err := s.runs(t.Context(), record.PromptID)
			require.NoError(t, err)
			require.Equal(t, 1, runs)

			if c.signal == syscall.SIGKILL {
				task, err := s.tasks.GetTaskInfo(queue, id)
				require.NoError(t, err)
				require.Equal(t, asynq.TaskStateActive, task.State, "asynq still takes the dead worker's word for it")
			} else {
				w.completed(s, id)
			}
			require.NoError(t, second.Process.Signal(syscall.SIGTERM))
			require.NoError(t, w.end(second))
		})
	}
}

// until waits for a record that is as wanted.
func (w *world) until(s *services, id string, wanted func(*comfyui.Record) bool) (r *comfyui.Record) {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		var err error
		r, err = s.store.Get(w.t.Context(), id)
		return err == nil && wanted(r)
	}, time.Minute, 50*time.Millisecond)
	return r
}

// completed waits for the task's completion, and looks at its result.
func (w *world) completed(s *services, id string) {
	w.t.Helper()
	var task *asynq.TaskInfo
	require.Eventually(w.t, func() bool {
		var err error
		task, err = s.tasks.GetTaskInfo(queue, id)
		return err == nil && task.State == asynq.TaskStateCompleted
	}, time.Minute, 50*time.Millisecond)
	require.Zero(w.t, task.Retried)
	var result comfyui.Result
	require.NoError(w.t, json.Unmarshal(task.Result, &result))
	require.Equal(w.t, comfyui.StatusSucceeded, result.Status)
	require.Len(w.t, result.Outputs, 1)
}

// The three commands of the README, as they stand there.
func TestREADME(t *testing.T) {
	t.Parallel()
	needRedis(t)
	if testing.Short() {
		t.Skip("it takes asynq over a minute to be sure that a worker is dead")
	}
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	_, rest, _ := strings.Cut(string(readme), "```sh\n")
	commands, _, _ := strings.Cut(rest, "```")
	require.Equal(t, 3, strings.Count(commands, "\n"), "three commands")
	t.Cleanup(func() { _ = os.Remove("jobrunner") })

	tmp := t.TempDir()
	output, err := os.Create(filepath.Join(tmp, "output"))
	require.NoError(t, err)
	defer output.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	shell := exec.CommandContext(ctx, "sh", "-c", commands)
	shell.Env = append(os.Environ(), "TMPDIR="+tmp)
	shell.Stdout, shell.Stderr = output, output // a file: Wait does not wait for what is in the background
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	require.NoError(t, shell.Start())
	var stopped sync.Once
	stop := func() {
		stopped.Do(func() {
			_ = syscall.Kill(-shell.Process.Pid, syscall.SIGTERM)
			require.Eventually(t, func() bool {
				return errors.Is(syscall.Kill(-shell.Process.Pid, 0), syscall.ESRCH)
			}, 20*time.Second, 20*time.Millisecond)
		})
	}
	defer stop()
	err = shell.Wait()
	stop()
	text, readErr := os.ReadFile(output.Name())
	require.NoError(t, readErr)
	t.Logf("%s", text)
	require.NoError(t, err)
	require.Equal(t, 2, strings.Count(string(text), ": started\n"), "two workers began")
	require.Equal(t, 1, strings.Count(string(text), ": stopped\n"), "one came to its end")
	require.Contains(t, string(text), "taken over from a worker that is gone")
	require.Contains(t, string(text), "got the task; the job is known: running")
	require.Regexp(t, `\n[0-9a-f-]{36}: task completed, job succeeded, attempt 1, run by the pod: 1\n$`, string(text))
}

// A machine without redis-server gets a line that says what to do.
func TestWithoutRedis(t *testing.T) {
	t.Setenv("PATH", "")
	t.Setenv("TMPDIR", t.TempDir())
	err := run(t.Context(), []string{"infra"}, &bytes.Buffer{})
	require.ErrorContains(t, err, "apt-get install redis-server")
	require.ErrorContains(t, err, "-redis HOST:PORT")
}

func TestUnexpectedArgument(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"infra", "enqueue", "worker", "status"} {
		err := run(t.Context(), []string{command, "workflow.json"}, &bytes.Buffer{})
		require.EqualError(t, err, `unexpected argument "workflow.json"; jobrunner `+command+` -h tells the flags`)
	}
}
