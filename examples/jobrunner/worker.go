package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"sync"
	"time"

	"github.com/hibiken/asynq"

	"github.com/comfypod/comfyui"
)

// work runs what is on the queue until ctx ends, or with drain until no task is left.
func (s *services) work(ctx context.Context, drain bool) error {
	log.SetPrefix(fmt.Sprintf("worker %d: ", os.Getpid()))
	log.SetFlags(log.Ltime | log.Lmsgprefix)
	server := asynq.NewServerFromRedisClient(s.redis, asynq.Config{
		Concurrency:    8, // jobs on the pod, running or waiting: they cost this process next to nothing
		RetryDelayFunc: retryDelay,
		IsFailure:      func(err error) bool { return !workerGone(err) },
		LogLevel:       asynq.WarnLevel,
		// A worker that is told to stop does not wait for its jobs, which go on on the pod: after this time it puts their tasks back.
		ShutdownTimeout:          time.Second,
		DelayedTaskCheckInterval: time.Second,
	})
	if err := server.Start(&handler{pod: s.pod, store: s.store}); err != nil {
		return err
	}
	log.Print("started")

	// asynq delivers the tasks of a killed worker again once it is sure that it is dead, which takes a minute or two. Recover takes over
	// their jobs as soon as that worker's leases are out: somebody has to keep their limits, and to try again if the pod dies.
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var recovery sync.WaitGroup
	recovery.Go(func() {
		for job, err := range s.pod.Recover(ctx) {
			if err != nil {
				if ctx.Err() == nil { // else the worker stops
					log.Print(err)
				}
				continue
			}
			log.Printf("%s: taken over from a worker that is gone", job.ID())
		}
	})
	for ctx.Err() == nil && !(drain && s.drained()) {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
	stop()
	recovery.Wait()
	server.Shutdown()
	log.Print("stopped")
	return nil
}

func (s *services) drained() bool {
	q, err := s.tasks.GetQueueInfo(queue)
	return errors.Is(err, asynq.ErrQueueNotFound) || err == nil && q.Pending+q.Active+q.Scheduled+q.Retry == 0
}

// handler runs tasks.
type handler struct {
	pod   *comfyui.PodClient
	store comfyui.Store
}

// ProcessTask implements asynq.Handler.
func (h *handler) ProcessTask(ctx context.Context, task *asynq.Task) error {
	out := task.ResultWriter()
	return verdict(h.run(ctx, out.TaskID(), task.Payload(), out))
}

// verdict tells asynq what cannot get better. It retries all else.
func verdict(err error) error {
	if e, ok := errors.AsType[*comfyui.Error](err); ok && !e.Category.Retryable() {
		return fmt.Errorf("%w: %w", asynq.SkipRetry, err)
	}
	return err
}

// run takes a job to its end, whether this delivery is the first of its task or not: a job that is known is joined, and of one that
// has succeeded the stored result is returned. Meanwhile out is given the progress, and at last the result, as JSON.
func (h *handler) run(ctx context.Context, jobID string, payload []byte, out io.Writer) error {
	workflow, err := comfyui.ParseWorkflow(payload)
	if err != nil {
		return fmt.Errorf("%w: %w", asynq.SkipRetry, err)
	}
	options := []comfyui.JobOption{comfyui.WithJobID(jobID)}
	if h.mayRerun(ctx, jobID) {
		options = append(options, comfyui.RerunFailed())
	}
	// Submit and Wait are what Execute is made of. The events are read in between, and not by a callback, so that none of them is
	// written over the result.
	job, err := h.pod.Submit(ctx, workflow, options...)
	if err != nil {
		return err
	}
	var told comfyui.Progress
	for event := range job.Events(ctx) {
		if p := event.Progress; p.Status != told.Status || p.Fraction >= told.Fraction+0.01 {
			told = p
			if err := write(out, p); err != nil {
				log.Printf("%s: progress: %v", jobID, err) // which does the job no harm
			}
		}
	}
	result, err := job.Wait(ctx)
	if err != nil {
		return err
	}
	return write(out, result)
}

// mayRerun tells whether the job has ended in a way that a new attempt may better. Then an earlier delivery of the task has failed,
// and this one is its retry. Other ends stand, a cancel above all, even if asynq has not heard of them.
func (h *handler) mayRerun(ctx context.Context, jobID string) bool {
	record, err := h.store.Get(ctx, jobID)
	if err != nil {
		log.Printf("%s: got the task", jobID) // of a new job; if the store is down, Submit says so
		return false
	}
	p := record.Progress
	log.Printf("%s: got the task; the job is known: %s, %.0f %%", jobID, p.Status, 100*p.Fraction)
	return p.Status.Terminal() && record.Failure != nil && record.Failure.Category.Retryable()
}

func write(out io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = out.Write(data)
	return err
}

// workerGone tells that err ended a delivery and not the job: the worker stopped or was killed, or the delivery took too long. Such
// ends do not count against the task's retries.
func workerGone(err error) bool {
	category := comfyui.CategoryOf(err)
	return category == comfyui.CategoryContext || category == comfyui.CategoryClosed || errors.Is(err, asynq.ErrLeaseExpired)
}

func retryDelay(n int, err error, task *asynq.Task) time.Duration {
	if workerGone(err) {
		return 0 // the job goes on: join it
	}
	delay := asynq.DefaultRetryDelayFunc(n, err, task)
	if e, ok := errors.AsType[*comfyui.Error](err); ok {
		delay = max(delay, e.RetryAfter) // what the pod asked for
	}
	return delay
}

// eventLog logs what happens to the jobs, and each five percent of their progress.
func eventLog() func(comfyui.Event) {
	last := map[string]string{} // events come one at a time
	return func(event comfyui.Event) {
		line := fmt.Sprintf("%s: %s, %d %%", event.JobID, event.Progress.Status, int(20*event.Progress.Fraction)*5)
		if event.Err != nil {
			line += ": " + event.Err.Error()
		}
		if line != last[event.JobID] {
			log.Print(line)
		}
		last[event.JobID] = line
		if event.Progress.Status.Terminal() {
			delete(last, event.JobID)
		}
	}
}
