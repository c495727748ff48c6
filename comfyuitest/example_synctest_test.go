package comfyuitest_test

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/comfypod/comfyui/comfyuitest"
)

// testADayOfWork is a test of a job that takes a day, and takes no time: in a bubble the clock moves on whenever everybody waits.
// The pod and all its clients are made inside, and meet over pipes.
func testADayOfWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.Start(t, comfyuitest.WithPipes(), comfyuitest.WithNode("Sampler", comfyuitest.Steps(24, time.Hour)))
		began := time.Now()
		request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Sampler", "inputs": {}}}}`)
		if err := pod.WaitIdle(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 24*time.Hour {
			t.Errorf("done after %v", took)
		}
	})
}

// testLateRequest: a proxy gives up with a 524, and the pod gets the request all the same, half a minute later.
func testLateRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pod := comfyuitest.Start(t, comfyuitest.WithPipes(), comfyuitest.WithNode("Work", comfyuitest.Steps(1, 0)))
		pod.Inject(comfyuitest.Fault{Route: "POST /prompt", Effect: comfyuitest.AnswerBefore, Status: 524, Delay: 30 * time.Second})
		request(pod, http.MethodPost, "/prompt", `{"prompt": {"1": {"class_type": "Work", "inputs": {}}}}`)
		if n := len(pod.Prompts()); n != 0 {
			t.Errorf("%d prompts at once", n)
		}
		time.Sleep(time.Minute)
		if n := len(pod.Prompts()); n != 1 {
			t.Errorf("%d prompts a minute later", n)
		}
	})
}

// Tests in a bubble of testing/synctest, where hours pass at once.
func Example_synctest() {
	// func TestADayOfWork(t *testing.T) and func TestLateRequest(t *testing.T) in a _test.go file
	_, _ = testADayOfWork, testLateRequest
}
