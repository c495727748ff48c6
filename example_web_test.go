package comfyui_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"mime"
	"net/http"
	"net/http/httptest"
	"path"
	"strings"

	"github.com/comfypod/comfyui"
)

// backend is a web server over one pod: POST /jobs, GET /jobs/ID/events, GET /jobs/ID/outputs/NAME.
type backend struct{ client *comfyui.PodClient }

func (b *backend) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /jobs", b.submit)
	mux.HandleFunc("GET /jobs/{id}/events", b.events)
	mux.HandleFunc("GET /jobs/{id}/outputs/{name}", b.output)
	return mux
}

// submit returns as soon as the pod has the job. A browser that asks again with the same key joins it.
func (b *backend) submit(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	workflow, err := comfyui.ParseWorkflow(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	job, err := b.client.Submit(r.Context(), workflow, comfyui.WithJobID(r.Header.Get("Idempotency-Key"))) // "": a new id
	if err != nil {
		b.fail(w, err)
		return
	}
	w.Header().Set("Location", "/jobs/"+job.ID())
	w.WriteHeader(http.StatusAccepted)
}

// events is a stream of server-sent events, of a job that waits, runs or has ended. It ends with the job, or when the browser goes.
func (b *backend) events(w http.ResponseWriter, r *http.Request) {
	job, err := b.client.Attach(r.Context(), r.PathValue("id"))
	if err != nil {
		b.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	for event := range job.Events(r.Context()) {
		data, err := json.Marshal(event.Progress)
		if err != nil {
			return
		}
		_, _ = fmt.Fprintf(w, "event: %s\ndata: %s\n\n", event.Kind, data)
		_ = http.NewResponseController(w).Flush()
	}
}

// output passes a file of the job on. The name is looked for among the outputs: nothing else of the pod can be read.
func (b *backend) output(w http.ResponseWriter, r *http.Request) {
	job, err := b.client.Attach(r.Context(), r.PathValue("id"))
	if err != nil {
		b.fail(w, err)
		return
	}
	result, err := job.Wait(r.Context())
	if err != nil {
		b.fail(w, err)
		return
	}
	for _, o := range result.Outputs {
		if o.File == nil || o.File.Filename != r.PathValue("name") {
			continue
		}
		file, err := o.Open(r.Context())
		if err != nil {
			b.fail(w, err)
			return
		}
		defer func() { _ = file.Close() }()
		w.Header().Set("Content-Type", mime.TypeByExtension(path.Ext(o.File.Filename)))
		_, _ = io.Copy(w, file)
		return
	}
	http.NotFound(w, r)
}

// fail answers by category. The error's text names the pod: it is for the log.
func (b *backend) fail(w http.ResponseWriter, err error) {
	status := http.StatusBadGateway
	switch comfyui.CategoryOf(err) {
	case comfyui.CategoryValidation, comfyui.CategoryMissingAsset:
		status = http.StatusUnprocessableEntity
	case comfyui.CategoryConflict:
		status = http.StatusConflict
	case comfyui.CategoryNotFound:
		status = http.StatusNotFound
	case comfyui.CategoryStorage, comfyui.CategoryUnavailable, comfyui.CategoryOverloaded:
		status = http.StatusServiceUnavailable
	}
	text := http.StatusText(status)
	var refused *comfyui.ValidationError
	if errors.As(err, &refused) {
		text = refused.Error()
	}
	http.Error(w, text, status)
}

// A web server submits jobs, streams their events to the browser, and serves what they made. Attach finds a job by its id, in any
// process that shares the store.
func ExamplePodClient_Attach() {
	pod, client := examplePod()
	defer pod.Close()
	defer client.Close()
	server := httptest.NewServer((&backend{client}).routes())
	defer server.Close()

	request, err := http.NewRequestWithContext(context.Background(), http.MethodPost, server.URL+"/jobs", strings.NewReader(samplerGraph))
	if err != nil {
		log.Fatal(err)
	}
	request.Header.Set("Idempotency-Key", "order-7")
	accepted, err := http.DefaultClient.Do(request)
	if err != nil {
		log.Fatal(err)
	}
	_ = accepted.Body.Close()
	fmt.Println(accepted.StatusCode, accepted.Header.Get("Location"))

	events := fetched(server.URL + "/jobs/order-7/events")
	fmt.Println(bytes.HasPrefix(events, []byte("event: snapshot\n")), bytes.Contains(events, []byte("event: succeeded\n")))
	image := fetched(server.URL + "/jobs/order-7/outputs/steps_00001_.png")
	fmt.Println(http.DetectContentType(image))
	fmt.Print(string(fetched(server.URL + "/jobs/order-8/events")))
	// Output:
	// 202 /jobs/order-7
	// true true
	// image/png
	// Not Found
}

func fetched(url string) []byte {
	request, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	if err != nil {
		log.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	return body
}
