// Quickstart runs a workflow on a ComfyUI pod, shows its progress, and saves the images that it makes.
//
//	go run ./examples/quickstart                                    on a pod inside this program: nothing to install
//	go run ./examples/quickstart -pod http://127.0.0.1:8188         on a pod of your own
//	go run ./examples/quickstart -workflow FILE -set KSampler.seed=7 -pod URL
//
// Ctrl-C cancels the job on the pod. The paths of the saved files go to standard output, everything else to standard error.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/testdata"
)

// Exit statuses.
const (
	exitFailed      = 1
	exitInterrupted = 130 // 128 + SIGINT, as shells have it
)

func main() {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		cancel(errInterrupted) // run cancels the job on the pod
		<-signals
		fmt.Fprintln(os.Stderr, "\nquickstart: quit at once; the job may go on on the pod")
		os.Exit(exitInterrupted)
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

var errInterrupted = errors.New("interrupted")

// run is the program: it returns the exit status. The end of ctx is a Ctrl-C.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parseArgs(args, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err == nil {
		p := &program{options: o, stdout: stdout, screen: newScreen(stderr)}
		err = p.run(ctx)
		p.screen.clear()
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errInterrupted):
		_, _ = fmt.Fprintf(stderr, "quickstart: %s\n", oneLine(err))
		return exitInterrupted
	}
	_, _ = fmt.Fprintf(stderr, "quickstart: %s\n", oneLine(err))
	return exitFailed
}

// options are what the command line says.
type options struct {
	pod      string
	workflow string
	set      []assignment
	out      string
	wait     time.Duration
	previews bool
}

func parseArgs(args []string, help io.Writer) (*options, error) {
	o := &options{}
	flags := flag.NewFlagSet("quickstart", flag.ContinueOnError)
	flags.StringVar(&o.pod, "pod", "", "base `URL` of the pod, such as http://127.0.0.1:8188 (default: a pod inside this program)")
	flags.StringVar(&o.workflow, "workflow", "", "`FILE` with the workflow: JSON in API format, or an image that ComfyUI saved (default: one that needs no model)")
	flags.Func("set", "set an input, `NODE.INPUT=VALUE`; NODE is an id, title or class; VALUE is JSON, else a string; may be repeated", func(s string) error {
		a, err := parseAssignment(s)
		o.set = append(o.set, a)
		return err
	})
	flags.StringVar(&o.out, "out", "output", "`DIR` for the images, made if it is not there")
	flags.DurationVar(&o.wait, "wait", 15*time.Second, "how long to wait for a pod that does not answer yet")
	flags.BoolVar(&o.previews, "previews", false, "keep the newest preview image in DIR while the job runs")
	flags.SetOutput(io.Discard) // of a mistake, one line is enough
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(help)
		_, _ = fmt.Fprintln(help, "Usage: quickstart [flags]\n\nRuns a workflow on a ComfyUI pod and saves its images. Ctrl-C cancels the job on the pod.")
		flags.PrintDefaults()
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w; -h lists the flags", err)
	case flags.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q; -h lists the flags (a workflow is given with -workflow)", flags.Arg(0))
	case o.wait <= 0:
		return nil, fmt.Errorf("-wait %s is no time to wait; give one such as 30s", o.wait)
	}
	var empty error
	flags.Visit(func(f *flag.Flag) { // -pod "$POD" where there is no POD must not run on another pod
		if f.Name != "set" && f.Value.String() == "" {
			empty = fmt.Errorf("-%s is empty; give a value, or leave it out for the default", f.Name)
		}
	})
	return o, empty
}

// program is one run.
type program struct {
	*options
	stdout  io.Writer
	screen  *screen
	polling bool // the WebSocket is lost
}

func (p *program) run(ctx context.Context) error {
	w, err := p.loadWorkflow()
	if err != nil {
		return err
	}
	if err := prepareDir(p.out); err != nil {
		return err
	}
	if p.pod == "" {
		pod := startPod()
		defer pod.Close()
		p.pod = pod.URL()
		p.screen.say("no -pod given: starting a pod inside this program")
	}
	client, err := p.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }() // the job has ended, or is left alone on purpose
	if w, err = p.prepare(ctx, client, w); err != nil {
		return err
	}
	result, err := p.execute(ctx, client, w)
	if err != nil {
		return err
	}
	return p.save(ctx, result)
}

// loadWorkflow reads the workflow and, unless it is in the editor's format, sets its inputs.
func (p *program) loadWorkflow() (*comfyui.Workflow, error) {
	w, err := p.readWorkflow()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("there is no file %s; give the path of a workflow with -workflow, or leave it out to run the built-in one", p.workflow)
	case err != nil:
		return nil, fmt.Errorf("%w; -workflow takes JSON in API format (in the editor: Workflow, Export (API)) or an image that ComfyUI saved", err)
	case !inUIFormat(w):
		return w, assign(w, p.set)
	}
	return w, nil
}

func (p *program) readWorkflow() (*comfyui.Workflow, error) {
	switch {
	case p.workflow != "":
		return comfyui.LoadWorkflow(p.workflow)
	case p.pod == "":
		return comfyui.ParseWorkflow(testdata.StepsWorkflow)
	}
	return comfyui.ParseWorkflow(testdata.Workflow)
}

// inUIFormat: such a workflow has no nodes that could be named before it is converted.
func inUIFormat(w *comfyui.Workflow) bool {
	for range w.Nodes() {
		return false
	}
	return true
}

// prepareDir makes the directory and tries it: after a long job it is too late to find that it cannot be written to.
func prepareDir(dir string) error {
	const advice = "give another directory with -out"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("the output directory cannot be made: %w; %s", err, advice)
	}
	f, err := os.CreateTemp(dir, ".quickstart-*")
	if err != nil {
		return fmt.Errorf("the output directory cannot be written to: %w; %s", err, advice)
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// connect returns a client for the pod once the pod is ready.
func (p *program) connect(ctx context.Context) (*comfyui.PodClient, error) {
	var opts []comfyui.Option
	if p.previews {
		opts = append(opts, comfyui.WithPreviews())
	}
	client, err := comfyui.NewPodClient(p.pod, opts...)
	if err != nil {
		return nil, fmt.Errorf("-pod: %w", err)
	}
	p.screen.say("waiting for the pod at %s (up to %s)", client.Name(), p.wait)
	if err := p.untilReady(ctx, client); err != nil {
		_ = client.Close()
		return nil, err
	}
	return client, nil
}

func (p *program) untilReady(ctx context.Context, client *comfyui.PodClient) error {
	patient, cancel := context.WithTimeout(ctx, p.wait)
	defer cancel()
	err := client.WaitReady(patient)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%w before anything was sent to the pod", errInterrupted)
	case comfyui.CategoryOf(err) == comfyui.CategoryAuth:
		return p.notAllowed(client, err)
	case err != nil:
		why := rootReason(err)
		if errors.Is(why, context.DeadlineExceeded) {
			why = errors.New("it does not answer")
		}
		return fmt.Errorf("the pod at %s is not ready after %s (%w); is ComfyUI running there, and is the URL right? -wait waits longer, without -pod no server is needed",
			client.Name(), p.wait, why)
	}
	health, err := client.Health(ctx)
	if err != nil {
		return fmt.Errorf("%w before anything was sent to the pod", errInterrupted)
	}
	p.screen.say("the pod is %s: ComfyUI %s, %d running, %d waiting", health.State, health.Version, health.Running, health.Pending)
	return nil
}

// notAllowed: the pod wants credentials, or its certificate is not to be trusted.
func (p *program) notAllowed(client *comfyui.PodClient, err error) error {
	var untrusted *tls.CertificateVerificationError
	if errors.As(err, &untrusted) {
		return fmt.Errorf("the certificate of the pod at %s is not trusted (%w); add its authority to the system's, or name its file in SSL_CERT_FILE", client.Name(), untrusted.Err)
	}
	why := rootReason(err)
	if inner := errors.Unwrap(why); inner != nil { // without the state
		why = inner
	}
	return fmt.Errorf("the pod at %s wants other credentials (%w); put them into the URL, as http://user:password@host or https://host/?token=…",
		client.Name(), why)
}

// prepare converts a workflow in the editor's format, and sets its inputs.
func (p *program) prepare(ctx context.Context, client *comfyui.PodClient, w *comfyui.Workflow) (*comfyui.Workflow, error) {
	if !inUIFormat(w) {
		return w, nil
	}
	converted, err := client.Convert(ctx, w)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.workflow, reason(err))
	}
	return converted, assign(converted, p.set)
}

// execute runs the workflow, shows how it goes on, and returns its result.
func (p *program) execute(ctx context.Context, client *comfyui.PodClient, w *comfyui.Workflow) (*comfyui.Result, error) {
	job, err := client.Submit(ctx, w)
	if err != nil {
		return nil, p.notSubmitted(ctx, client, err)
	}
	p.screen.say("job %s", job.ID())
	p.follow(ctx, job)
	result, err := job.Wait(ctx)
	switch {
	case err == nil:
		return result, nil
	case ctx.Err() != nil && result == nil:
		return nil, p.cancel(ctx, job)
	}
	return nil, failure(err)
}

// notSubmitted: when ctx has ended the job may be on the pod all the same.
func (p *program) notSubmitted(ctx context.Context, client *comfyui.PodClient, err error) error {
	var e *comfyui.Error
	if ctx.Err() == nil || !errors.As(err, &e) {
		return failure(err)
	}
	job, err := client.Attach(context.WithoutCancel(ctx), e.JobID)
	if err != nil {
		return fmt.Errorf("%w before anything was sent to the pod", errInterrupted)
	}
	return p.cancel(ctx, job)
}

// cancelTime bounds a cancel, which a pod may take seconds to heed: it interrupts between two steps of a node.
const cancelTime = 30 * time.Second

// cancel takes the job off the pod and says what came of it.
func (p *program) cancel(ctx context.Context, job *comfyui.Job) error {
	p.screen.say("cancelling job %s on the pod; Ctrl-C again quits at once", job.ID())
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer stop()
	switch err := job.Cancel(ctx); {
	case err == nil:
	case ctx.Err() != nil:
		return fmt.Errorf("%w; the pod has not confirmed the cancel in %s, and job %s may go on there", errInterrupted, cancelTime, job.ID())
	default:
		return fmt.Errorf("%w; job %s may go on on the pod: %w", errInterrupted, job.ID(), reason(err))
	}
	result, err := job.Wait(ctx)
	switch {
	case errors.Is(err, comfyui.ErrCancelled):
		return fmt.Errorf("%w; job %s was cancelled on the pod", errInterrupted, job.ID())
	case err == nil:
		return fmt.Errorf("%w; job %s had finished before the cancel reached it, %d outputs are on the pod", errInterrupted, job.ID(), len(result.Outputs))
	}
	return fmt.Errorf("%w; job %s ended before the cancel reached it: %w", errInterrupted, job.ID(), failure(err))
}

// follow shows what happens to the job until it ends, or ctx does.
func (p *program) follow(ctx context.Context, job *comfyui.Job) {
	events := make(chan comfyui.Event)
	go func() {
		defer close(events)
		for ev := range job.Events(ctx) {
			events <- ev
		}
	}()
	tick := p.screen.ticks()
	defer tick.Stop()
	for {
		select {
		case ev, more := <-events:
			if !more {
				return
			}
			p.show(ev)
		case <-tick.C: // the time goes on while a node is silent
			p.screen.progress(job.Progress())
		}
	}
}

func (p *program) show(ev comfyui.Event) {
	switch ev.Kind {
	case comfyui.EventWarning:
		p.screen.say("warning: %s", oneLine(reason(ev.Err)))
	case comfyui.EventRetrying:
		p.screen.say("attempt %d follows: %s", ev.Attempt, oneLine(reason(ev.Err)))
	case comfyui.EventPreview:
		p.keepPreview(ev.Preview)
	case comfyui.EventStream:
		p.tellStream(ev.Stream)
	}
	p.screen.progress(ev.Progress)
}

// tellStream tells of each outage once, not of every attempt to end it.
func (p *program) tellStream(state comfyui.StreamState) {
	switch lost := state == comfyui.StreamDown || state == comfyui.StreamDeaf; {
	case lost && !p.polling:
		p.screen.say("the pod's WebSocket is %s: the job is followed by polling meanwhile", state)
		p.polling = true
	case state == comfyui.StreamUp && p.polling:
		p.screen.say("the pod's WebSocket is up again")
		p.polling = false
	}
}

func (p *program) keepPreview(preview *comfyui.Preview) {
	name := "preview.jpg"
	if preview.ContentType == "image/png" {
		name = "preview.png"
	}
	if err := os.WriteFile(filepath.Join(p.out, name), preview.Data, 0o644); err != nil {
		p.screen.say("warning: %s", oneLine(err))
	}
}

// save downloads the files of the result and prints where they are.
func (p *program) save(ctx context.Context, result *comfyui.Result) error {
	paths, err := result.SaveAll(ctx, p.out)
	p.screen.clear()
	for _, path := range paths {
		if _, err := fmt.Fprintln(p.stdout, path); err != nil {
			return fmt.Errorf("the paths cannot be printed: %w", err)
		}
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%w; the job is done, %d of its files were saved", errInterrupted, len(paths))
	case err != nil:
		return fmt.Errorf("not all files were saved: %w", reason(err))
	case len(paths) == 0:
		p.screen.say("the job is done; it made no files")
	default:
		p.screen.say("done in %s; files saved in %s: %d", result.FinishedAt.Sub(result.CreatedAt).Round(time.Millisecond), p.out, len(paths))
	}
	return nil
}

// failure says why a job failed, and what may help.
func failure(err error) error {
	var refused *comfyui.ValidationError
	var raised *comfyui.ExecutionError
	switch category := comfyui.CategoryOf(err); {
	case errors.As(err, &refused) && category == comfyui.CategoryMissingAsset:
		return fmt.Errorf("the pod lacks something that the workflow needs: %w; put it there, or use another workflow or -pod", refused)
	case errors.As(err, &refused) && len(refused.Nodes) > 0:
		return fmt.Errorf("the pod refuses the workflow: %w; correct it, for example with -set", refused)
	case errors.As(err, &refused):
		return fmt.Errorf("the pod refuses the workflow: %w; correct it in the editor", refused)
	case errors.As(err, &raised) && category == comfyui.CategoryOutOfMemory:
		return fmt.Errorf("the pod ran out of memory: %w; try a smaller image or batch", raised)
	case errors.As(err, &raised) && category == comfyui.CategoryPodFault:
		return fmt.Errorf("the pod itself is broken: %w; its jobs may fail until it is restarted", raised)
	case errors.As(err, &raised):
		return fmt.Errorf("the job failed: %w; the pod's log has the traceback", raised)
	case category.Retryable():
		return fmt.Errorf("the job failed: %w; it may succeed when it is run again", reason(err))
	}
	return fmt.Errorf("the job failed: %w", reason(err))
}

// reason is err without what the reader knows: the operation, the pod and the job.
func reason(err error) error {
	var e *comfyui.Error
	if !errors.As(err, &e) || e.Err == nil {
		return err
	}
	return e.Err
}

// rootReason looks behind the deadline that ended the wait, for what the pod last said.
func rootReason(err error) error {
	for {
		inner := reason(err)
		if inner == err { //nolint:errorlint // by identity: there is nothing more to look behind
			return err
		}
		err = inner
	}
}

// oneLine is the text of an error on one line.
func oneLine(err error) string {
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	lines = slices.DeleteFunc(lines, func(s string) bool { return strings.TrimSpace(s) == "" })
	text := printable(strings.Join(lines, "; "))
	return strings.TrimPrefix(strings.ReplaceAll(text, ": comfyui: ", ": "), "comfyui: ")
}
