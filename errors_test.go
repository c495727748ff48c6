package comfyui

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/comfypod/comfyui/internal/wire"
)

var categories = []Category{
	CategoryNetwork, CategoryTimeout, CategoryUnavailable, CategoryOverloaded, CategoryAuth, CategoryNotFound, CategoryTooLarge,
	CategoryValidation, CategoryConflict, CategoryMissingAsset, CategoryExecution, CategoryOutOfMemory, CategoryPodFault,
	CategoryInterrupted, CategoryLost, CategoryCancelled, CategoryContext, CategoryClosed, CategoryProtocol, CategoryStorage,
	CategoryUnknown,
}

func TestCategoryOf(t *testing.T) {
	t.Parallel()
	dial := &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	_, sockTimeout := (&net.Dialer{Timeout: time.Nanosecond}).DialContext(t.Context(), "tcp", "127.0.0.1:1")
	for _, test := range []struct {
		name string
		err  error
		want Category
	}{
		{"nil", nil, ""},
		{"closed", ErrClosed, CategoryClosed},
		{"job not found", ErrJobNotFound, CategoryNotFound},
		{"job conflict", ErrJobConflict, CategoryConflict},
		{"other pod", ErrOtherPod, CategoryConflict},
		{"held", ErrJobHeld, CategoryConflict},
		{"fenced", ErrFenced, CategoryConflict},
		{"schema", ErrSchema, CategoryStorage},
		{"lost", ErrJobLost, CategoryLost},
		{"gone", ErrPodGone, CategoryUnavailable},
		{"unknown outcome", ErrOutcomeUnknown, CategoryUnknown},
		{"interrupted", ErrInterrupted, CategoryInterrupted},
		{"removed", ErrRemoved, CategoryInterrupted},
		{"cancelled", ErrCancelled, CategoryCancelled},
		{"wrapped", fmt.Errorf("a: %w", ErrJobLost), CategoryLost},
		{"joined, the second tells", errors.Join(errors.New("x"), ErrJobLost), CategoryLost},
		{"the outer tells", &Error{Category: CategoryStorage, Err: ErrJobLost}, CategoryStorage},
		{"the outer tells nothing", &Error{Err: ErrJobLost}, CategoryLost},
		{"nothing at all", &Error{}, CategoryUnknown},
		{"a nil *Error", (*Error)(nil), CategoryUnknown},
		{"validation", &ValidationError{Type: "no_prompt"}, CategoryValidation},
		{"execution", &ExecutionError{ExceptionType: "ValueError"}, CategoryExecution},
		{"out of memory", &ExecutionError{ExceptionType: "torch.OutOfMemoryError"}, CategoryOutOfMemory},
		{"canceled", context.Canceled, CategoryContext},
		{"deadline", fmt.Errorf("x: %w", context.DeadlineExceeded), CategoryContext},
		{"socket timeout, which claims to be a deadline", sockTimeout, CategoryTimeout},
		{"os deadline", &net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, CategoryTimeout},
		{"dial", dial, CategoryNetwork},
		{"in a url.Error", &url.Error{Op: "Get", URL: "http://x", Err: dial}, CategoryNetwork},
		{"dns", &net.DNSError{Err: "no such host", Name: "x"}, CategoryNetwork},
		{"reset", syscall.ECONNRESET, CategoryNetwork},
		{"EOF", io.EOF, CategoryNetwork},
		{"half", io.ErrUnexpectedEOF, CategoryNetwork},
		{"closed conn", net.ErrClosed, CategoryNetwork},
		{"certificate", &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, CategoryAuth},
		{"http to https", tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}, CategoryProtocol},
		{"file", fs.ErrNotExist, CategoryUnknown},
		{"anything", errors.New("x"), CategoryUnknown},
		{"nil error", (*Error)(nil), CategoryUnknown},
		{"nil validation", (*ValidationError)(nil), CategoryUnknown},
		{"nil execution", (*ExecutionError)(nil), CategoryUnknown},
	} {
		assert.Equal(t, test.want, CategoryOf(test.err), test.name)
	}
}

func TestRetryable(t *testing.T) {
	t.Parallel()
	never := map[Category]bool{
		CategoryAuth: true, CategoryNotFound: true, CategoryTooLarge: true, CategoryValidation: true, CategoryConflict: true,
		CategoryExecution: true, CategoryCancelled: true, CategoryUnknown: true,
	}
	for _, c := range categories {
		assert.Equal(t, !never[c], c.Retryable(), "%s", c)
	}
	assert.False(t, Category("").Retryable())
	assert.False(t, Category("of a newer version").Retryable())
}

func TestErrorText(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  *Error
		want string
	}{
		{
			&Error{Op: "submit", Pod: "http://gpu:8188", JobID: "j1", Attempt: 2, Category: CategoryUnavailable, StatusCode: 502, Err: errors.New("Bad Gateway")},
			"comfyui: submit: pod http://gpu:8188: job j1 (attempt 2): unavailable (HTTP 502): Bad Gateway",
		},
		{
			&Error{Op: "wait", Pod: "p", JobID: "j1", Category: CategoryLost, Err: &Error{Op: "wait", Pod: "p", JobID: "j1", Category: CategoryLost, Err: ErrJobLost}},
			"comfyui: wait: pod p: job j1: lost: the pod restarted and the job is gone with it",
		},
		{
			&Error{Op: "execute", Pod: "p", Category: CategoryStorage, Err: &Error{Op: "create", Category: CategoryStorage, Err: errors.New("comfyui: no")}},
			"comfyui: execute: pod p: storage: create: no",
		},
		{&Error{Op: "wait", Category: CategoryCancelled, Err: ErrCancelled}, "comfyui: wait: cancelled"},
		{&Error{Op: "wait", Category: CategoryInterrupted, Err: ErrInterrupted}, "comfyui: wait: interrupted by someone else"},
		{&Error{Op: "wait", Category: CategoryTimeout, Err: errors.New("timeouts")}, "comfyui: wait: timeout: timeouts"},
		{&Error{}, "comfyui: unknown"},
		{nil, "<nil>"},
		{
			&Error{Op: "get", Category: CategoryNetwork, Err: errors.New(`Get "https://me:pa?ss@pod.example:8188/x?token=abc#frag": EOF`)},
			`comfyui: get: network: Get "https://pod.example:8188/x": EOF`,
		},
	} {
		assert.Equal(t, test.want, test.err.Error())
	}
	assert.Equal(t, "<nil>", (*ValidationError)(nil).Error())
	assert.Equal(t, "<nil>", (*ExecutionError)(nil).Error())
}

func TestRedactURLs(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"nothing here":                         "nothing here",
		"http://h:8188/a/b":                    "http://h:8188/a/b",
		"http://u:p@h/a":                       "http://h/a",
		"HTTPS://u:p@h/a?b=c":                  "HTTPS://h/a",
		"x wss://h/ws?clientId=1&token=2 y":    "x wss://h/ws y",
		"http://u:p?q@h/":                      "http://h/",
		"http://u:p#q@h":                       "http://h",
		"http://h/a#access_token=x":            "http://h/a",
		"http://tok@[::1]:80/":                 "http://[::1]:80/",
		"http://h/a@b":                         "http://h/a@b",
		"redis://:pw@r:6379/0, rediss://u:p@r": "redis://r:6379/0, rediss://r",
		"socks5://u:p@proxy:1080: refused":     "socks5://proxy:1080: refused",
		`parse "http://u:p@h/%zz": invalid`:    `parse "http://h/%zz": invalid`,
	} {
		assert.Equal(t, want, redactURLs(text))
	}
}

func TestValidationErrorText(t *testing.T) {
	t.Parallel()
	v := &ValidationError{Message: "Prompt outputs failed validation", Nodes: map[string]NodeErrors{
		"4": {Class: "KSampler", Errors: []NodeError{{Type: "value_smaller_than_min", Message: "Value 0 smaller than min of 1", Details: "steps"}}},
		"2": {Errors: []NodeError{{Type: "custom"}, {Type: "a"}, {Type: "b"}, {Type: "c"}, {Type: "d"}}},
	}}
	assert.Equal(t, "Prompt outputs failed validation; node 2: custom; node 2: a; node 2: b; node 2: c; node 2: d; and 1 more", v.Error())
	delete(v.Nodes, "2")
	assert.Equal(t, "Prompt outputs failed validation; node 4 (KSampler): Value 0 smaller than min of 1: steps", v.Error())
	assert.Equal(t, "No prompt (none)", (&ValidationError{Message: "No prompt", Details: "none"}).Error())
	assert.Equal(t, "the workflow was refused", (&ValidationError{}).Error())
}

// recorded yields the lines of the recordings that match, with their version.
func recorded(t testing.TB, pattern string, visit func(version, name string, line recordedLine)) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "captures", "*", pattern))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, path := range files {
		data, err := os.ReadFile(path)
		require.NoError(t, err)
		lines := bufio.NewScanner(bytes.NewReader(data))
		lines.Buffer(nil, 1<<24)
		for lines.Scan() {
			var l recordedLine
			require.NoError(t, json.Unmarshal(lines.Bytes(), &l), path)
			visit(filepath.Base(filepath.Dir(path)), strings.TrimSuffix(filepath.Base(path), ".jsonl"), l)
		}
		require.NoError(t, lines.Err())
	}
}

type recordedLine struct {
	Kind    string            `json:"kind"`
	Method  string            `json:"method"`
	Path    string            `json:"path"`
	Status  int               `json:"status"`
	Headers map[string]string `json:"headers"`
	Body    json.RawMessage   `json:"body"`
	Raw     string            `json:"body_text"` // JSON that Go refuses
	Text    string            `json:"text"`
}

func (l recordedLine) header() http.Header {
	h := http.Header{}
	for k, v := range l.Headers {
		h.Set(k, v)
	}
	return h
}

// bytes is the body as it was sent: JSON, or the text that the recording keeps as a JSON string.
func (l recordedLine) bytes() []byte {
	if l.Raw != "" {
		return []byte(l.Raw)
	}
	if !strings.Contains(l.Headers["Content-Type"], "json") {
		var text string
		if json.Unmarshal(l.Body, &text) == nil {
			return []byte(text)
		}
	}
	return l.Body
}

func TestRecordedExecutionErrors(t *testing.T) {
	t.Parallel()
	want := map[string]Category{
		"error-accelerator-oom":     CategoryOutOfMemory,
		"error-cuda-assert":         CategoryPodFault,
		"error-cuda-illegal-access": CategoryPodFault,
		"error-missing-file":        CategoryMissingAsset,
		"error-no-message":          CategoryExecution,
		"error-oom-allocation":      CategoryOutOfMemory,
		"error-oom":                 CategoryOutOfMemory,
		"error-runtime":             CategoryExecution,
		"error-shapes":              CategoryExecution,
		"error-then-success":        CategoryExecution,
		"error-value":               CategoryExecution,
	}
	seen := map[string]int{}
	recorded(t, "error-*.jsonl", func(version, name string, l recordedLine) {
		if l.Kind != "ws" || !strings.Contains(l.Text, `"execution_error"`) {
			return
		}
		m, err := wire.NewDecoder().Text([]byte(l.Text))
		require.NoError(t, err)
		if m.Type != wire.ExecutionError {
			return
		}
		seen[name]++
		category, x := classifyExecution(m.Failure)
		assert.Equal(t, want[name], category, "%s %s: %v", version, name, x)
		assert.Equal(t, category, CategoryOf(x), "the error alone tells the same")
		assert.NotContains(t, x.Message, "TIPS", "the server's advice is not the exception's message")
		assert.Equal(t, strings.TrimSpace(x.Message), x.Message)
		assert.NotEmpty(t, x.Traceback)
		assert.NotEmpty(t, x.NodeID)
		assert.Equal(t, name == "error-cuda-assert" || name == "error-cuda-illegal-access", poisonsPod(x), name)
	})
	for name := range want {
		assert.Equal(t, 5, seen[name], name)
	}
}

func TestExecutionCategories(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		exception, message string
		want               Category
		poisons            bool
	}{
		{"torch.cuda.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB", CategoryOutOfMemory, false},
		{"RuntimeError", "Allocation on device 0 would exceed allowed memory. (out of memory)", CategoryOutOfMemory, false},
		{"RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", CategoryOutOfMemory, false},
		{"RuntimeError", "MPS backend out of memory (MPS allocated: 1 GB)", CategoryOutOfMemory, false},
		{"RuntimeError", "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory", CategoryOutOfMemory, false},
		{"MemoryError", "", CategoryOutOfMemory, false},
		{"numpy._core._exceptions._ArrayMemoryError", "Unable to allocate 3 GiB", CategoryOutOfMemory, false},
		{"torch.AcceleratorError", "CUDA error: an illegal memory access was encountered", CategoryPodFault, true},
		{"torch.AcceleratorError", "something new", CategoryPodFault, true},
		{"RuntimeError", "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`", CategoryPodFault, true},
		{"RuntimeError", "CUDA error: invalid argument", CategoryPodFault, true},
		{"RuntimeError", "CUDA error: unspecified launch failure", CategoryPodFault, true},
		{"RuntimeError", "CUDA error: no kernel image is available for execution on the device", CategoryPodFault, false},
		{"RuntimeError", "No CUDA GPUs are available", CategoryPodFault, false},
		{"OSError", "[Errno 28] No space left on device", CategoryPodFault, false},
		{"RuntimeError", "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`", CategoryExecution, false},
		{"RuntimeError", "mat1 and mat2 shapes cannot be multiplied (77x768 and 2048x640)", CategoryExecution, false},
		{"RuntimeError", "The text says CUDA error: out of memory, but not at the start", CategoryExecution, false},
		{"FileNotFoundError", "[Errno 2] No such file or directory: 'a.safetensors'", CategoryMissingAsset, false},
		{"ModuleNotFoundError", "No module named 'insightface'", CategoryMissingAsset, false},
		{"safetensors_rust.SafetensorError", "Error while deserializing header: HeaderTooLarge", CategoryMissingAsset, false},
		{"graph.DependencyCycleError", "Dependency cycle detected", CategoryValidation, false},
		{"Exception", "Unauthorized: Please login first to use this node.", CategoryAuth, false},
		{"Exception", "", CategoryExecution, false},
		{"", "", CategoryExecution, false},
	} {
		x := &ExecutionError{ExceptionType: test.exception, Message: test.message}
		assert.Equal(t, test.want, CategoryOf(x), "%v", x)
		assert.Equal(t, test.poisons, poisonsPod(x), "%v", x)
	}
	assert.False(t, poisonsPod(nil))
}

// Every refused POST /prompt of the recordings, by its type.
func TestRecordedRefusals(t *testing.T) {
	t.Parallel()
	missing := map[string]bool{
		"invalid-missing-node-type": true, "invalid-model-not-in-list": true, "invalid-custom-validation": true,
		"invalid-custom-validation-probe": true,
	}
	plain := map[string]bool{ // refused before validation
		"invalid-empty-prompt": true, "invalid-no-outputs": true, "invalid-no-prompt-key": true, "invalid-body-list": true,
		"invalid-missing-node-type": true, "invalid-no-class-type": true,
	}
	seen := 0
	recorded(t, "invalid-*.jsonl", func(version, name string, l recordedLine) {
		if l.Kind != "http" || l.Method != http.MethodPost {
			return
		}
		seen++
		e := classifyRefusal(l.Status, l.header(), l.bytes(), asIs)
		assert.Equal(t, l.Status, e.StatusCode)
		if l.Status == http.StatusInternalServerError {
			assert.Equal(t, CategoryProtocol, e.Category, name)
			assert.Equal(t, "500 Internal Server Error Server got itself in trouble", e.Err.Error())
			return
		}
		want := CategoryValidation
		if missing[name] {
			want = CategoryMissingAsset
		}
		assert.Equal(t, want, e.Category, "%s %s: %v", version, name, e)
		var v *ValidationError
		require.ErrorAs(t, e, &v, name)
		assert.NotEmpty(t, v.Type)
		assert.NotEmpty(t, v.Message)
		if plain[name] || name == "invalid-cycle" && slices.Contains([]string{"0.3.40", "0.3.64", "0.8.0"}, version) {
			assert.Empty(t, v.Nodes, name)
			return
		}
		require.NotEmpty(t, v.Nodes, "%s %s", version, name)
		for id, n := range v.Nodes {
			assert.NotEmpty(t, n.Class, "%s %s", name, id)
			require.NotEmpty(t, n.Errors, name)
			assert.NotEmpty(t, n.Errors[0].Type)
			assert.Contains(t, e.Error(), "node "+id)
		}
	})
	assert.GreaterOrEqual(t, seen, 90)
}

func TestRecordedPartialAcceptance(t *testing.T) {
	t.Parallel()
	seen := 0
	recorded(t, "partly-valid.jsonl", func(_, _ string, l recordedLine) {
		if l.Method != http.MethodPost || l.Status != http.StatusOK {
			return
		}
		seen++
		reply, err := wire.DecodePromptReply(l.bytes())
		require.NoError(t, err)
		v := validationOf(reply.NodeErrors)
		require.NotNil(t, v)
		assert.Equal(t, []string{"4"}, v.Nodes["3"].DependentOutputs)
		assert.Equal(t, "width", v.Nodes["3"].Errors[0].Input)
		assert.Equal(t, CategoryValidation, CategoryOf(v))
	})
	assert.Equal(t, 5, seen)
	assert.Nil(t, validationOf(nil))
}

func TestValidationCategories(t *testing.T) {
	t.Parallel()
	notInList := func(details, extra string) NodeError {
		return NodeError{Type: "value_not_in_list", Details: details, ExtraInfo: json.RawMessage(extra)}
	}
	model := notInList("ckpt_name: 'x.safetensors' not in ['a.safetensors']", `{"received_value":"x.safetensors"}`)
	word := notInList("sampler_name: 'nope' not in (list of length 40)", `{"received_value":"nope"}`)
	for _, test := range []struct {
		name string
		v    ValidationError
		want Category
	}{
		{"a model", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{model}}}}, CategoryMissingAsset},
		{"a model in a folder", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{notInList(`lora: 'xl\\a.pt' not in (list of length 99)`, `{"received_value":"xl\\a.pt"}`)}}}}, CategoryMissingAsset},
		{"only the details tell", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{notInList("vae: 'a.ckpt' not in ['b']", "")}}}}, CategoryMissingAsset},
		{"an empty folder", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{notInList("model: 'nameless' not in []", "")}}}}, CategoryMissingAsset},
		{"a word", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{word}}}}, CategoryValidation},
		{"a number", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{notInList("x: 1.5 not in (list of length 40)", `{"received_value":1.5}`)}}}}, CategoryValidation},
		{"a model and a word", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{model}}, "2": {Errors: []NodeError{word}}}}, CategoryValidation},
		{"an audio file", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{{Type: "custom_validation_failed", Details: "audio - Invalid audio file: a.wav"}}}}}, CategoryMissingAsset},
		{"custom", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{{Type: "custom_validation_failed", Details: "x - must be even"}}}}}, CategoryValidation},
		{"raised", ValidationError{Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{{Type: "exception_during_validation", Details: "'77'"}}}}}, CategoryValidation},
		{"class", ValidationError{Type: "missing_node_type", Message: "Node 'X' not found. The custom node may not be installed."}, CategoryMissingAsset},
		{"class, 0.3.64", ValidationError{Type: "invalid_prompt", Message: "Cannot execute because node X does not exist."}, CategoryMissingAsset},
		{"class, a plain text", ValidationError{Message: "Cannot execute because node X does not exist."}, CategoryMissingAsset},
		{"no class", ValidationError{Type: "missing_node_type", Message: "Node 'X' has no class_type. The workflow may be corrupted"}, CategoryValidation},
		{"no class, 0.3.64", ValidationError{Type: "invalid_prompt", Message: "Cannot execute because a node is missing the class_type property."}, CategoryValidation},
		{"nothing", ValidationError{}, CategoryValidation},
	} {
		assert.Equal(t, test.want, validationCategory(&test.v), test.name)
	}
}

func asIs(text string) string { return text }

func TestClassifyRefusalStatuses(t *testing.T) {
	t.Parallel()
	page := "<!DOCTYPE html><html><head><title>\n Attention\n Required </title><style>x{}</style></head><body><p>hello</p></body></html>"
	for _, test := range []struct {
		status   int
		header   http.Header
		body     string
		category Category
		text     string
	}{
		{400, nil, "", CategoryValidation, "Bad Request"},
		{400, http.Header{"Content-Type": {"text/html"}}, page, CategoryProtocol, "Attention Required"},
		{400, nil, `{"error":"Invalid status value(s): bogus."}`, CategoryValidation, "Invalid status value(s): bogus."},
		{401, nil, "", CategoryAuth, "Unauthorized"},
		{402, nil, "", CategoryAuth, "Payment Required"},
		{403, nil, page, CategoryAuth, "Attention Required"},
		{404, nil, `{"error":"Job not found"}`, CategoryNotFound, "Job not found"},
		{405, nil, "405: Method Not Allowed", CategoryNotFound, "405: Method Not Allowed"},
		{407, nil, "", CategoryAuth, "Proxy Authentication Required"},
		{408, nil, "", CategoryTimeout, "Request Timeout"},
		{409, nil, `{"error":"prompt_id already exists"}`, CategoryConflict, "prompt_id already exists"},
		{413, nil, "Maximum request body size 1048576 exceeded.", CategoryTooLarge, "Maximum request body size 1048576 exceeded."},
		{414, nil, "", CategoryTooLarge, "Request URI Too Long"},
		{416, nil, "", CategoryProtocol, "Requested Range Not Satisfiable"},
		{418, nil, "\x00\x01 \xff tea", CategoryProtocol, "tea"},
		{429, http.Header{"Retry-After": {"30"}}, "", CategoryOverloaded, "Too Many Requests"},
		{431, nil, "", CategoryTooLarge, "Request Header Fields Too Large"},
		{500, nil, "500 Internal Server Error\n\nServer got itself in trouble", CategoryProtocol, "500 Internal Server Error Server got itself in trouble"},
		{502, nil, "<html><body><script>var x='<p>'</script><h1>502</h1> nginx</body></html>", CategoryUnavailable, "502 nginx"},
		{503, nil, `{"error":{"code":"SERVICE_DISABLED","message":"Assets system is disabled"}}`, CategoryUnavailable, "Assets system is disabled"},
		{504, nil, "", CategoryUnavailable, "Gateway Timeout"},
		{520, nil, "", CategoryUnavailable, "status 520"},
		{522, nil, "", CategoryUnavailable, "status 522"},
		{524, nil, "error code: 524", CategoryUnavailable, "error code: 524"},
		{530, nil, "", CategoryUnavailable, "status 530"},
		{599, nil, "", CategoryUnavailable, "status 599"},
		{302, http.Header{"Location": {"https://x.example/login?return=https%3A%2F%2Fpod&token=abc"}}, "", CategoryAuth, "redirect to https://x.example/login"},
		{302, http.Header{"Location": {"https://team.cloudflareaccess.com/cdn-cgi/x"}}, "", CategoryAuth, "redirect to https://team.cloudflareaccess.com/cdn-cgi/x"},
		{302, http.Header{"Location": {"https://accounts.google.com/o/x"}}, "", CategoryAuth, "redirect to https://accounts.google.com/o/x"},
		{303, http.Header{"Location": {"/result/7"}}, "", CategoryProtocol, "redirect to /result/7"},
		{303, http.Header{"Location": {"/result/7?sig=s3cret#k3y"}}, "", CategoryProtocol, "redirect to /result/7"},
		{303, http.Header{"Location": {"//u:pa55@x.example/?sig=s3cret"}}, "", CategoryProtocol, "redirect to //x.example/"},
		{303, http.Header{"Location": {"http://u:pa55@x y/?sig=s3cret"}}, "", CategoryProtocol, "redirect to what is no URL"},
		{307, nil, "", CategoryProtocol, "Temporary Redirect"},
		{101, nil, "", CategoryProtocol, "Switching Protocols"},
		{0, nil, "", CategoryProtocol, "status 0"},
	} {
		header := test.header
		if header == nil {
			header = http.Header{}
		}
		e := classifyRefusal(test.status, header, []byte(test.body), asIs)
		assert.Equal(t, test.category, e.Category, "%d %s", test.status, test.body)
		assert.Equal(t, test.text, e.Err.Error(), "%d", test.status)
		assert.Equal(t, test.status, e.StatusCode)
	}
	long := classifyRefusal(502, http.Header{}, []byte(strings.Repeat("ä ", 1<<15)), asIs)
	assert.LessOrEqual(t, utf8.RuneCountInString(long.Err.Error()), 210)
}

func TestParseRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"":                                0,
		"7":                               7 * time.Second,
		" 7 ":                             7 * time.Second,
		"0.5":                             500 * time.Millisecond,
		"-3":                              0,
		"NaN":                             0,
		"Inf":                             24 * time.Hour,
		"1e300":                           24 * time.Hour,
		"soon":                            0,
		"Tue, 24 Nov 2026 12:01:00 GMT":   time.Minute,
		"Tue, 24 Nov 2026 11:59:00 GMT":   0,
		"Tue, 24 Nov 2099 12:00:00 GMT":   24 * time.Hour,
		"Tuesday, 24-Nov-26 12:00:05 GMT": 5 * time.Second,
	} {
		assert.Equal(t, want, parseRetryAfter(value, now), "%q", value)
	}
}

// A date counts from the clock that wrote it, and that of a pod can be an hour off.
func TestRetryAfterByThePodsClock(t *testing.T) {
	t.Parallel()
	pod := time.Now().Add(-time.Hour)
	header := http.Header{"Retry-After": {pod.Add(7 * time.Second).UTC().Format(http.TimeFormat)}, "Date": {pod.UTC().Format(http.TimeFormat)}}
	assert.Equal(t, 7*time.Second, classifyRefusal(503, header, nil, asIs).RetryAfter)
	header["Date"] = []string{"yesterday"}
	assert.Zero(t, classifyRefusal(503, header, nil, asIs).RetryAfter)
}

func TestErrorJSONKeepsWhatErrorsFind(t *testing.T) {
	t.Parallel()
	validation := &ValidationError{Type: "t", Message: "m", Details: "d", Nodes: map[string]NodeErrors{
		"1": {Class: "K", DependentOutputs: []string{"9"}, Errors: []NodeError{{Type: "x", Input: "steps", ExtraInfo: json.RawMessage(`{"a":1}`)}}},
	}}
	execution := &ExecutionError{NodeID: "3", NodeType: "KSampler", ExceptionType: "torch.OutOfMemoryError", Message: "no", Traceback: []string{"a\n", "b"}}
	original := &Error{
		Op: "wait", Pod: "p", JobID: "j", PromptID: "q", Attempt: 2, Status: StatusFailed, Category: CategoryOutOfMemory,
		StatusCode: 500, RetryAfter: time.Second,
		Err: errors.Join(
			fmt.Errorf("first: %w", execution),
			&Error{Category: CategoryLost, Err: fmt.Errorf("second: %w", errors.Join(ErrJobLost, context.Canceled))},
			validation,
			fmt.Errorf("third: %w and %w", ErrRemoved, io.ErrUnexpectedEOF),
			&net.OpError{Op: "dial", Err: context.DeadlineExceeded},
		),
	}
	data, err := json.Marshal(original)
	require.NoError(t, err)
	var back *Error
	require.NoError(t, json.Unmarshal(data, &back))

	for _, target := range []error{ErrJobLost, ErrRemoved, context.Canceled, context.DeadlineExceeded, io.ErrUnexpectedEOF} {
		require.ErrorIs(t, back, target)
	}
	for _, c := range coded {
		assert.Equal(t, errors.Is(original, c.err), errors.Is(back, c.err), c.code)
	}
	var x *ExecutionError
	require.ErrorAs(t, back, &x)
	assert.Equal(t, execution, x)
	var v *ValidationError
	require.ErrorAs(t, back, &v)
	assert.Equal(t, validation, v)
	assert.Equal(t, original.Error(), back.Error())
	back2 := *back
	back2.Err, original.Err = nil, nil
	assert.Equal(t, original, &back2)

	again, err := json.Marshal(back)
	require.NoError(t, err)
	assert.JSONEq(t, string(data), string(again), "a second trip changes nothing")

	for _, c := range coded {
		data, err := json.Marshal(&Error{Err: c.err})
		require.NoError(t, err)
		var e Error
		require.NoError(t, json.Unmarshal(data, &e))
		assert.Equal(t, c.err, e.Err, c.code)
	}

	var null *Error
	data, err = json.Marshal(struct{ E *Error }{})
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal([]byte("null"), &null))
	assert.Nil(t, null)
	assert.JSONEq(t, `{"E":null}`, string(data))
}

func TestEncodeErrorTakesAnyError(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		nil, ErrClosed, context.Canceled, errors.New("plain"), &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED},
		&ExecutionError{NodeID: "1"}, &Error{Op: "x", Err: ErrFenced}, fmt.Errorf("x: %w", &ValidationError{Message: "m"}),
	} {
		data, fault := encodeError(err)
		require.NoError(t, fault)
		back, fault := decodeError(data)
		require.NoError(t, fault)
		assert.Equal(t, CategoryOf(err), CategoryOf(back), "%v", err)
		if err == nil {
			assert.NoError(t, back)
			continue
		}
		assert.Equal(t, err.Error(), back.Error())
	}
	_, fault := decodeError([]byte("{"))
	require.Error(t, fault)
}

// encodeError is the JSON of any error; null for nil. decodeError is its inverse.
func encodeError(err error) (json.RawMessage, error) {
	if err == nil {
		return json.RawMessage("null"), nil
	}
	return json.Marshal(causeToJSON(err, 0))
}

func decodeError(data []byte) (error, error) {
	var j *causeJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return nil, err
	}
	return j.toError(0), nil
}

// A cause can be a nil pointer: somebody has forgotten to ask whether there was an error.
func TestErrorJSONOfNilCauses(t *testing.T) {
	t.Parallel()
	for name, cause := range map[string]error{
		"error":      (*Error)(nil),
		"validation": (*ValidationError)(nil),
		"execution":  (*ExecutionError)(nil),
		"foreign":    (*net.OpError)(nil),
		"wrapped":    fmt.Errorf("wrapped: %w", (*ValidationError)(nil)),
		"joined":     errors.Join((*ExecutionError)(nil), ErrJobLost),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data, err := json.Marshal(&Error{Op: "x", Category: CategoryStorage, Err: cause})
			require.NoError(t, err)
			var back Error
			require.NoError(t, json.Unmarshal(data, &back))
			assert.Equal(t, CategoryStorage, back.Category)
			assert.Equal(t, name == "joined", errors.Is(&back, ErrJobLost))
		})
	}
}

func TestErrorJSONOfANewerVersion(t *testing.T) {
	t.Parallel()
	var e Error
	require.NoError(t, json.Unmarshal([]byte(`{"category":"quantum","cause":{"text":"odd","is":["a_new_one","job_lost"],"shape":1},"extra":true}`), &e))
	assert.Equal(t, Category("quantum"), e.Category)
	require.ErrorIs(t, &e, ErrJobLost)
	data, err := json.Marshal(&e)
	require.NoError(t, err)
	assert.Contains(t, string(data), "a_new_one", "what this version does not know goes on")
}

// What a caller put into a ValidationError need not be JSON; the rest of it is kept.
func TestErrorJSONOfBadExtraInfo(t *testing.T) {
	t.Parallel()
	v := &ValidationError{Nodes: map[string]NodeErrors{
		"1": {Class: "A", Errors: []NodeError{{Type: "x", ExtraInfo: json.RawMessage("{")}, {Type: "y", ExtraInfo: json.RawMessage("{}")}}},
	}}
	data, err := json.Marshal(&Error{Err: v})
	require.NoError(t, err)
	assert.Equal(t, "{", string(v.Nodes["1"].Errors[0].ExtraInfo), "the caller's own is as it was")
	var e Error
	require.NoError(t, json.Unmarshal(data, &e))
	var back *ValidationError
	require.ErrorAs(t, &e, &back)
	assert.Nil(t, back.Nodes["1"].Errors[0].ExtraInfo)
	assert.Equal(t, "{}", string(back.Nodes["1"].Errors[1].ExtraInfo))
}

func TestErrorJSONHoldsNoURLSecrets(t *testing.T) {
	t.Parallel()
	e := &Error{Pod: "p", Err: fmt.Errorf("x: %w", &url.Error{Op: "Get", URL: "https://u:pa55@h/p?token=s3cret", Err: ErrJobLost})}
	data, err := json.Marshal(e)
	require.NoError(t, err)
	for _, secret := range []string{"pa55", "s3cret"} {
		assert.NotContains(t, string(data), secret)
		assert.NotContains(t, e.Error(), secret)
	}
	require.NoError(t, json.Unmarshal(data, e))
	require.ErrorIs(t, e, ErrJobLost)

	const signed = `https://h/p?sig=s3cret`
	for _, cause := range []error{
		&ExecutionError{Message: "no " + signed, Traceback: []string{"kept", `get("` + signed + `")`}},
		&ValidationError{Message: "no " + signed, Details: signed, Nodes: map[string]NodeErrors{"1": {Errors: []NodeError{{
			Message: signed, Details: "of " + signed, ExtraInfo: json.RawMessage(`{"received": ["a \"https:\/\/h/p?sig=s3cret\" b", "` + signed + `"], "n": 1e400}`),
		}}}}},
	} {
		data, err := json.Marshal(&Error{Err: cause})
		require.NoError(t, err)
		assert.NotContains(t, string(data), "s3cret")
		assert.Contains(t, string(data), "https://h/p", "the rest is kept")
		require.NoError(t, json.Unmarshal(data, e))
		var v *ValidationError
		if errors.As(e, &v) {
			assert.Equal(t, `{"received":["a \"https://h/p\" b","https://h/p"],"n":1e400}`, string(v.Nodes["1"].Errors[0].ExtraInfo))
		}
	}
}

func errorTrees() *rapid.Generator[error] {
	leaf := rapid.Custom(func(t *rapid.T) error {
		switch rapid.IntRange(0, 3).Draw(t, "leaf") {
		case 0:
			return coded[rapid.IntRange(0, len(coded)-1).Draw(t, "code")].err
		case 1:
			return &ExecutionError{NodeID: rapid.String().Draw(t, "id"), ExceptionType: "E", Message: rapid.String().Draw(t, "message")}
		case 2:
			return &ValidationError{Message: rapid.String().Draw(t, "message")}
		}
		return errors.New(rapid.String().Draw(t, "text"))
	})
	var tree func(depth int) *rapid.Generator[error]
	tree = func(depth int) *rapid.Generator[error] {
		if depth == 0 {
			return leaf
		}
		return rapid.Custom(func(t *rapid.T) error {
			inner := func() error { return tree(depth-1).Draw(t, "inner") }
			switch rapid.IntRange(0, 3).Draw(t, "node") {
			case 0:
				return fmt.Errorf("%s: %w", rapid.String().Draw(t, "text"), inner())
			case 1:
				return errors.Join(inner(), inner())
			case 2:
				return &Error{
					Op: rapid.String().Draw(t, "op"), Category: rapid.SampledFrom(categories).Draw(t, "category"),
					Attempt: rapid.Int().Draw(t, "attempt"), Err: inner(),
				}
			}
			return leaf.Draw(t, "leaf")
		})
	}
	return tree(4)
}

func TestErrorJSONProperty(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		original := &Error{Op: "op", Category: CategoryExecution, Err: errorTrees().Draw(t, "err")}
		data, err := json.Marshal(original)
		require.NoError(t, err)
		var back Error
		require.NoError(t, json.Unmarshal(data, &back))
		for _, c := range coded {
			require.Equal(t, errors.Is(original, c.err), errors.Is(&back, c.err), c.code)
		}
		var x1, x2 *ExecutionError
		require.Equal(t, errors.As(original, &x1), errors.As(&back, &x2))
		require.Equal(t, x1, x2)
		var v1, v2 *ValidationError
		require.Equal(t, errors.As(original, &v1), errors.As(&back, &v2))
		require.Equal(t, CategoryOf(original.Err), CategoryOf(back.Err))
		require.Equal(t, original.Error(), back.Error())
		again, err := json.Marshal(&back)
		require.NoError(t, err)
		require.JSONEq(t, string(data), string(again))
	})
}

func FuzzErrorJSON(f *testing.F) {
	seed, err := json.Marshal(&Error{Op: "x", Category: CategoryLost, Err: errors.Join(ErrJobLost, &ExecutionError{NodeID: "1"}, &ValidationError{Nodes: map[string]NodeErrors{"1": {}}})})
	require.NoError(f, err)
	f.Add(seed)
	f.Add([]byte(`{"cause":{"causes":[{"is":["closed"]},null,{"error":{"cause":null}}]}}`))
	f.Add([]byte(`{"cause":` + strings.Repeat(`{"error":{"cause":`, 200) + `null` + strings.Repeat(`}}`, 200) + `}`))
	f.Add([]byte(`{"cause":{"validation":{"node_errors":{"1":{"errors":[{"extra_info":null}]}}}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var e Error
		if json.Unmarshal(data, &e) != nil {
			return
		}
		_ = e.Error()
		first, err := json.Marshal(&e)
		require.NoError(t, err)
		var back Error
		require.NoError(t, json.Unmarshal(first, &back))
		require.Equal(t, CategoryOf(&e), CategoryOf(&back))
		second, err := json.Marshal(&back)
		require.NoError(t, err)
		require.JSONEq(t, string(first), string(second))
	})
}

func FuzzClassifyRefusal(f *testing.F) {
	recorded(f, "invalid-*.jsonl", func(_, _ string, l recordedLine) {
		if l.Kind == "http" {
			f.Add(l.Status, l.Headers["Content-Type"], "", l.bytes())
		}
	})
	f.Add(502, "text/html", "", []byte("<html><title>x</title><!-- "))
	f.Add(302, "", "https://u:p@login.example/?token=1", []byte(nil))
	f.Fuzz(func(t *testing.T, status int, contentType, location string, body []byte) {
		e := classifyRefusal(status, http.Header{"Content-Type": {contentType}, "Location": {location}}, body, asIs)
		require.NotNil(t, e.Err)
		require.NotEmpty(t, e.Category)
		require.Equal(t, e.Category, CategoryOf(e))
		require.NotEmpty(t, e.Error())
		_, err := json.Marshal(e)
		require.NoError(t, err)
	})
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"7", "1e9", "-1", "NaN", "Tue, 24 Nov 2026 12:01:00 GMT", "Infinity", "0x1p-2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		d := parseRetryAfter(value, time.Unix(1_800_000_000, 0))
		require.GreaterOrEqual(t, d, time.Duration(0))
		require.LessOrEqual(t, d, maxRetryAfter)
	})
}
