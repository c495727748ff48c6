// Jobrunner is an asynq worker that runs ComfyUI workflows. It may be killed at any moment: each job still runs once.
//
//	jobrunner infra      a private redis-server, and a pod inside this program, until it is interrupted
//	jobrunner enqueue    puts a job on the queue and prints its id
//	jobrunner worker     runs what is on the queue
//	jobrunner status     tells what has become of the jobs
//
// README.md shows kill -9 and recovery in three commands. With a Redis and a pod of your own: -redis HOST:PORT and -pod URL.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"

	"github.com/comfypod/comfyui"
)

const usage = "usage: jobrunner infra | enqueue | worker | status; with -h after it, a command tells its flags"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	logging.Disable()            // of go-redis, whose errors come back from the calls
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "jobrunner:", err)
		os.Exit(1)
	}
}

// run is the program. The end of ctx is a signal to stop.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	flags := flag.NewFlagSet("jobrunner "+args[0], flag.ContinueOnError)
	var at addresses
	flags.StringVar(&at.Redis, "redis", "", "`HOST:PORT` of a Redis; default: a private one, which infra runs")
	var command func(*services) error
	switch args[0] {
	case "infra":
		steps := flags.Int("steps", 90, "how many steps, of a second each, a job takes on the pod")
		if err := parse(flags, args[1:]); err != nil {
			return err
		}
		return runInfra(ctx, at.Redis, *steps, stdout)
	case "enqueue":
		file := flags.String("workflow", "", "`FILE` with a workflow in API format; default: one for infra's pod")
		command = func(s *services) error { return s.enqueue(ctx, *file, stdout) }
	case "worker":
		drain := flags.Bool("drain", false, "end when no task is left")
		command = func(s *services) error { return s.work(ctx, *drain) }
	case "status":
		command = func(s *services) error { return s.status(ctx, stdout) }
	default:
		return errors.New(usage)
	}
	flags.StringVar(&at.Pod, "pod", "", "`URL` of a ComfyUI pod; default: the one that infra runs")
	if err := parse(flags, args[1:]); err != nil {
		return err
	}
	s, err := open(ctx, at)
	if err != nil {
		return err
	}
	defer s.close()
	return command(s)
}

// parse reads the flags. Nothing else is taken: enqueue FILE would put another workflow on the queue than FILE.
func parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q; %s -h tells the flags", flags.Arg(0), flags.Name())
	}
	return nil
}

// services is what the commands work with: a Redis, which holds asynq's tasks and the records of the jobs, and a pod.
type services struct {
	redis redis.UniversalClient
	tasks *asynq.Inspector
	store *comfyui.RedisStore
	pod   *comfyui.PodClient
}

// lease is how long the jobs of a killed worker are left to it. It is short so that there is something to see; the default, 30 seconds,
// forgives a worker that hangs for a while.
const lease = 5 * time.Second

func open(ctx context.Context, at addresses) (*services, error) {
	at, err := at.complete(ctx)
	if err != nil {
		return nil, err
	}
	client := redis.NewClient(&redis.Options{Addr: at.Redis})
	store, err := comfyui.NewRedisStore(client)
	if err != nil {
		return nil, err
	}
	pod, err := comfyui.NewPodClient(at.Pod, comfyui.WithStore(store), comfyui.WithTiming(comfyui.Timing{Lease: lease}),
		comfyui.WithHooks(comfyui.Hooks{Event: eventLog()}))
	if err != nil {
		return nil, err
	}
	s := &services{redis: client, tasks: asynq.NewInspectorFromRedisClient(client), store: store, pod: pod}
	if err := client.Ping(ctx).Err(); err != nil {
		s.close()
		return nil, fmt.Errorf("no Redis at %s: %w", at.Redis, err)
	}
	return s, nil
}

func (s *services) close() {
	_ = s.pod.Close() // first: it gives its leases back
	_ = s.redis.Close()
}

const (
	taskType = "comfyui:workflow"
	queue    = "default"
)

// enqueue puts a workflow on the queue. The task's id is the job's id: whoever gets the task, and however often, speaks of the same job.
func (s *services) enqueue(ctx context.Context, file string, stdout io.Writer) error {
	workflow, err := loadWorkflow(file)
	if err != nil {
		return err
	}
	payload, err := json.Marshal(workflow)
	if err != nil {
		return err
	}
	task, err := asynq.NewClientFromRedisClient(s.redis).EnqueueContext(ctx, asynq.NewTask(taskType, payload), asynq.Queue(queue),
		asynq.TaskID(uuid.NewString()),
		asynq.Timeout(2*time.Hour),    // of one delivery: then the next one joins the job, which goes on
		asynq.Retention(24*time.Hour)) // as long as the library keeps the record of the job
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, task.ID)
	return err
}

func loadWorkflow(file string) (*comfyui.Workflow, error) {
	if file != "" {
		return comfyui.LoadWorkflow(file)
	}
	workflow, err := comfyui.ParseWorkflow([]byte(`{"1": {"class_type": "SlowSampler", "inputs": {"seed": 0}}}`))
	if err != nil {
		return nil, err
	}
	return workflow, workflow.Set("SlowSampler", "seed", rand.Uint32()) // pods do not run equal nodes again
}

// status prints a line for each task.
func (s *services) status(ctx context.Context, stdout io.Writer) error {
	for _, list := range []func(string, ...asynq.ListOption) ([]*asynq.TaskInfo, error){
		s.tasks.ListPendingTasks, s.tasks.ListActiveTasks, s.tasks.ListRetryTasks, s.tasks.ListCompletedTasks, s.tasks.ListArchivedTasks,
	} {
		tasks, err := list(queue)
		if err != nil && !errors.Is(err, asynq.ErrQueueNotFound) {
			return err
		}
		for _, task := range tasks {
			line := fmt.Sprintf("%s: task %s", task.ID, task.State)
			if record, err := s.store.Get(ctx, task.ID); err == nil {
				line += fmt.Sprintf(", job %s, attempt %d", record.Progress.Status, record.Attempt)
				if runs, err := s.runs(ctx, record.PromptID); err == nil {
					line += fmt.Sprintf(", run by the pod: %d", runs)
				}
			}
			if _, err := fmt.Fprintln(stdout, line); err != nil {
				return err
			}
		}
	}
	return nil
}

// runs asks infra's pod how often it began to run a prompt. A real pod keeps no such count.
func (s *services) runs(ctx context.Context, promptID string) (n int, err error) {
	answer, err := s.pod.Do(ctx, "GET", runsRoute, url.Values{"prompt": {promptID}}, nil)
	if err != nil {
		return 0, err
	}
	_, err = fmt.Fscan(answer.Body, &n)
	return n, errors.Join(err, answer.Body.Close())
}
