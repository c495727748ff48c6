package comfyui

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gorilla/websocket"

	"github.com/comfypod/comfyui/internal/wire"
)

// Category says what kind of failure an error is, and so what may help: it chooses the RetryPolicy. New ones may be added.
type Category string

const (
	CategoryNetwork      Category = "network"       // no connection, or it broke
	CategoryTimeout      Category = "timeout"       // no answer in time, or a job that reached one of its Limits
	CategoryUnavailable  Category = "unavailable"   // the pod or its proxy cannot serve now: 502, 503, 504, 52x, a pod that starts
	CategoryOverloaded   Category = "overloaded"    // 429
	CategoryAuth         Category = "auth"          // 401, 403, a login page, a certificate that is not trusted
	CategoryNotFound     Category = "not_found"     // no such job, file, model folder or route
	CategoryTooLarge     Category = "too_large"     // over a limit of the pod or of its proxy
	CategoryValidation   Category = "validation"    // the caller's input, here or on the pod
	CategoryConflict     Category = "conflict"      // something else stands in the way: another workflow, owner, pod or job
	CategoryMissingAsset Category = "missing_asset" // a node class, model or input file that this pod does not have
	CategoryExecution    Category = "execution"     // a node failed
	CategoryOutOfMemory  Category = "out_of_memory" // of the GPU or of the machine
	CategoryPodFault     Category = "pod_fault"     // the pod itself is broken: a CUDA fault, no GPU, a full disk
	CategoryInterrupted  Category = "interrupted"   // by someone else
	CategoryLost         Category = "lost"          // gone with the process that had it
	CategoryCancelled    Category = "cancelled"     // as the caller wanted
	CategoryContext      Category = "context"       // the caller's ctx ended; says nothing of the job
	CategoryClosed       Category = "closed"        // the client is closed; says nothing of the job
	CategoryProtocol     Category = "protocol"      // an answer that no ComfyUI pod should give
	CategoryStorage      Category = "storage"       // the Store failed
	CategoryUnknown      Category = "unknown"       // nothing is known, above all of the outcome
)

// Retryable tells whether the same job, unchanged, may succeed later: on this pod, or on another one that has what this one
// misses. It is advice to whoever schedules jobs; what the library repeats by itself is the business of RetryPolicy.
func (c Category) Retryable() bool {
	switch c {
	case CategoryNetwork, CategoryTimeout, CategoryUnavailable, CategoryOverloaded, CategoryMissingAsset, CategoryOutOfMemory,
		CategoryPodFault, CategoryInterrupted, CategoryLost, CategoryContext, CategoryClosed, CategoryProtocol, CategoryStorage:
		return true
	}
	return false
}

// Error is the type of every error that the package returns, but for those of pure functions. Its text, its JSON and its
// cause hold no credential: userinfo and queries of URLs are left out, and so are the values of the client's own headers.
type Error struct {
	Op, Pod, JobID, PromptID string
	Attempt                  int
	Status                   Status // of the job, when known: terminal means over; else the job goes on, and Execute joins it
	Category                 Category
	StatusCode               int           // HTTP; 0: none
	RetryAfter               time.Duration // what the pod asked for; 0: nothing
	Err                      error
}

// Error names the operation, the pod, the job, what kind of failure it is, and the cause.
func (e *Error) Error() string {
	if e == nil {
		return "<nil>"
	}
	return "comfyui: " + redactURLs(e.describe(&Error{}))
}

// describe leaves out what an outer error has said already.
func (e *Error) describe(outer *Error) string {
	var parts []string
	if e.Op != outer.Op {
		parts = append(parts, e.Op)
	}
	if e.Pod != outer.Pod && e.Pod != "" {
		parts = append(parts, "pod "+e.Pod)
	}
	if e.JobID != outer.JobID && e.JobID != "" {
		job := "job " + e.JobID
		if e.Attempt > 0 {
			job += fmt.Sprintf(" (attempt %d)", e.Attempt)
		}
		parts = append(parts, job)
	}
	kind := string(cmp.Or(e.Category, CategoryUnknown))
	if e.StatusCode != 0 {
		kind += fmt.Sprintf(" (HTTP %d)", e.StatusCode)
	}
	if e.Category != outer.Category || e.StatusCode != outer.StatusCode || e.Err == nil {
		parts = append(parts, kind)
	}
	switch cause := e.Err.(type) { //nolint:errorlint // only a direct *Error shares its fields with this one
	case nil:
	case *Error:
		if cause != nil {
			parts = append(parts, cause.describe(e))
		}
	default:
		text := strings.TrimPrefix(cause.Error(), "comfyui: ")
		if last := len(parts) - 1; last >= 0 && parts[last] == kind && strings.HasPrefix(text+" ", kind+" ") {
			parts = parts[:last] // "interrupted by someone else" names its category
		}
		parts = append(parts, text)
	}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), ": ")
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error {
	if e == nil {
		return nil
	}
	return e.Err
}

// ValidationError is a workflow that the pod refused, or in part: then the outputs that failed are those named in
// DependentOutputs, and the rest runs. Of old servers only Message is known.
type ValidationError struct {
	Type, Message, Details string
	Nodes                  map[string]NodeErrors
}

// Error names the first errors of each node; all of them are in Nodes.
func (e *ValidationError) Error() string {
	if e == nil {
		return "<nil>"
	}
	const most = 5
	var b strings.Builder
	b.WriteString(cmp.Or(e.Message, e.Type, "the workflow was refused"))
	if e.Details != "" && len(e.Nodes) == 0 {
		fmt.Fprintf(&b, " (%s)", e.Details)
	}
	said := 0
	for _, id := range slices.Sorted(maps.Keys(e.Nodes)) {
		node := e.Nodes[id]
		for _, ne := range node.Errors {
			if said++; said > most {
				continue
			}
			fmt.Fprintf(&b, "; node %s", id)
			if node.Class != "" {
				fmt.Fprintf(&b, " (%s)", node.Class)
			}
			fmt.Fprintf(&b, ": %s", cmp.Or(ne.Message, ne.Type))
			if ne.Details != "" {
				fmt.Fprintf(&b, ": %s", ne.Details)
			}
		}
	}
	if said > most {
		fmt.Fprintf(&b, "; and %d more", said-most)
	}
	return b.String()
}

// NodeErrors is what validation says of one node.
type NodeErrors struct {
	Class            string      `json:"class_type"`
	DependentOutputs []string    `json:"dependent_outputs"`
	Errors           []NodeError `json:"errors"`
}

// NodeError is one thing that validation found. Type is the server's word, such as "value_not_in_list".
type NodeError struct {
	Type      string          `json:"type"`
	Message   string          `json:"message"`
	Details   string          `json:"details"`
	Input     string          `json:"input_name,omitempty"` // extra_info.input_name
	ExtraInfo json.RawMessage `json:"extra_info,omitempty"`
}

// ExecutionError is a node that raised an exception while the workflow ran. Message is the exception's, without the line feed
// and the advice on memory that the server puts behind it.
type ExecutionError struct {
	NodeID, NodeType, ExceptionType, Message string
	Traceback                                []string
}

// Error names the node and the exception, without the traceback.
func (e *ExecutionError) Error() string {
	if e == nil {
		return "<nil>"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "node %s", e.NodeID)
	if e.NodeType != "" {
		fmt.Fprintf(&b, " (%s)", e.NodeType)
	}
	fmt.Fprintf(&b, " raised %s", cmp.Or(e.ExceptionType, "an exception"))
	if e.Message != "" {
		fmt.Fprintf(&b, ": %s", e.Message)
	}
	return b.String()
}

// Sentinels, for errors.Is. They stand inside an *Error and survive its JSON.
var (
	ErrClosed         error = &sentinel{CategoryClosed, "the client is closed; the job goes on"}
	ErrJobNotFound    error = &sentinel{CategoryNotFound, "no such job"}
	ErrJobConflict    error = &sentinel{CategoryConflict, "the job id belongs to another workflow"}
	ErrOtherPod       error = &sentinel{CategoryConflict, "the job is on a pod that this client does not drive"}
	ErrJobHeld        error = &sentinel{CategoryConflict, "another owner holds the job's lease"}
	ErrFenced         error = &sentinel{CategoryConflict, "a newer epoch or another owner has the job"}
	ErrSchema         error = &sentinel{CategoryStorage, "the record has a newer schema than this version reads"}
	ErrJobLost        error = &sentinel{CategoryLost, "the pod restarted and the job is gone with it"}
	ErrPodGone        error = &sentinel{CategoryUnavailable, "the pod has been unreachable for too long"}
	ErrOutcomeUnknown error = &sentinel{CategoryUnknown, "it may have run, and nothing tells how it ended"}
	ErrInterrupted    error = &sentinel{CategoryInterrupted, "interrupted by someone else"}
	ErrRemoved        error = &sentinel{CategoryInterrupted, "removed from the pod's queue by someone else"}
	ErrCancelled      error = &sentinel{CategoryCancelled, "cancelled"}
)

// sentinel is an error that is known by its identity; in JSON by its code, see coded.
type sentinel struct {
	category Category
	text     string
}

func (s *sentinel) Error() string { return s.text }

// coded are the errors that JSON keeps by code: the sentinels, and those of the standard library that callers ask for.
var coded = []struct {
	code string
	err  error
}{
	{"closed", ErrClosed},
	{"job_not_found", ErrJobNotFound},
	{"job_conflict", ErrJobConflict},
	{"other_pod", ErrOtherPod},
	{"job_held", ErrJobHeld},
	{"fenced", ErrFenced},
	{"schema", ErrSchema},
	{"job_lost", ErrJobLost},
	{"pod_gone", ErrPodGone},
	{"outcome_unknown", ErrOutcomeUnknown},
	{"interrupted", ErrInterrupted},
	{"removed", ErrRemoved},
	{"cancelled", ErrCancelled},
	{"context_canceled", context.Canceled},
	{"context_deadline_exceeded", context.DeadlineExceeded},
	{"os_deadline_exceeded", os.ErrDeadlineExceeded},
	{"net_closed", net.ErrClosed},
	{"eof", io.EOF},
	{"unexpected_eof", io.ErrUnexpectedEOF},
	{"not_exist", fs.ErrNotExist},
	{"exist", fs.ErrExist},
	{"permission", fs.ErrPermission},
}

func errorOfCode(code string) error {
	for _, c := range coded {
		if c.code == code {
			return c.err
		}
	}
	return nil
}

// CategoryOf walks err's chain for the first error that tells its category. It is "" for nil, and CategoryUnknown when none does.
func CategoryOf(err error) Category {
	if err == nil {
		return ""
	}
	return cmp.Or(toldCategory(err, 0), decodedCategory(err, 0), plainCategory(err))
}

// maxErrorDepth bounds the walk over a chain of errors, which comes from JSON too.
const maxErrorDepth = 64

// toldCategory is that of the package's own errors.
func toldCategory(err error, depth int) Category {
	if isNil(err) || depth > maxErrorDepth {
		return ""
	}
	switch e := err.(type) { //nolint:errorlint // this is the walk over the chain
	case *Error:
		if e.Category != "" {
			return e.Category
		}
	case *sentinel:
		return e.category
	case *ValidationError:
		return validationCategory(e)
	case *ExecutionError:
		return executionCategory(e.ExceptionType, e.Message)
	}
	for _, cause := range causesOf(err) {
		if c := toldCategory(cause, depth+1); c != "" {
			return c
		}
	}
	return ""
}

// decodedCategory is what plainCategory said before the error went through JSON.
func decodedCategory(err error, depth int) Category {
	if err == nil || depth > maxErrorDepth {
		return ""
	}
	if e, ok := err.(*decodedError); ok && e.category != "" { //nolint:errorlint // this is the walk over the chain
		return e.category
	}
	for _, cause := range causesOf(err) {
		if c := decodedCategory(cause, depth+1); c != "" {
			return c
		}
	}
	return ""
}

// plainCategory is that of errors from elsewhere.
func plainCategory(err error) Category {
	// By identity: a timeout of a socket claims to be context.DeadlineExceeded.
	if holds(err, context.Canceled, 0) || holds(err, context.DeadlineExceeded, 0) {
		return CategoryContext
	}
	var untrusted *tls.CertificateVerificationError
	var unknown x509.UnknownAuthorityError
	var hostname x509.HostnameError
	var invalid x509.CertificateInvalidError
	if errors.As(err, &untrusted) || errors.As(err, &unknown) || errors.As(err, &hostname) || errors.As(err, &invalid) {
		return CategoryAuth
	}
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return CategoryTimeout
	}
	var notTLS tls.RecordHeaderError
	if errors.As(err, &notTLS) || errors.Is(err, http.ErrSchemeMismatch) {
		return CategoryProtocol
	}
	var dns *net.DNSError
	var op *net.OpError
	var sys syscall.Errno
	var frame *websocket.CloseError
	if errors.As(err, &op) || errors.As(err, &dns) || errors.As(err, &frame) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) || errors.As(err, &sys) && isConnectionErrno(sys) {
		return CategoryNetwork
	}
	return CategoryUnknown
}

func isConnectionErrno(e syscall.Errno) bool {
	switch e {
	case syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE, syscall.EHOSTUNREACH, syscall.ENETUNREACH:
		return true
	}
	return false
}

// causesOf is what err unwraps to.
func causesOf(err error) []error {
	switch e := err.(type) { //nolint:errorlint // this is the walk over the chain
	case interface{ Unwrap() error }:
		if cause := e.Unwrap(); cause != nil {
			return []error{cause}
		}
	case interface{ Unwrap() []error }:
		return e.Unwrap()
	}
	return nil
}

// holds is errors.Is by identity alone.
func holds(err, target error, depth int) bool {
	if err == nil || depth > maxErrorDepth {
		return false
	}
	if err == target { //nolint:errorlint // by identity
		return true
	}
	return slices.ContainsFunc(causesOf(err), func(cause error) bool { return holds(cause, target, depth+1) })
}

// ---- JSON

// errorJSON is an *Error on disk.
type errorJSON struct {
	Op         string     `json:"op,omitempty"`
	Pod        string     `json:"pod,omitempty"`
	JobID      string     `json:"job_id,omitempty"`
	PromptID   string     `json:"prompt_id,omitempty"`
	Attempt    int        `json:"attempt,omitempty"`
	Status     Status     `json:"status,omitempty"`
	Category   Category   `json:"category"`
	StatusCode int        `json:"status_code,omitempty"`
	RetryAfter int64      `json:"retry_after_ns,omitempty"`
	Cause      *causeJSON `json:"cause,omitempty"`
}

// causeJSON is any error on disk: one of the package's types, or the text of another one with what is known of it.
type causeJSON struct {
	Error      *errorJSON      `json:"error,omitempty"`
	Validation *validationJSON `json:"validation,omitempty"`
	Execution  *executionJSON  `json:"execution,omitempty"`

	Text     string       `json:"text,omitempty"`
	Category Category     `json:"category,omitempty"`
	Is       []string     `json:"is,omitempty"` // codes
	Causes   []*causeJSON `json:"causes,omitempty"`
}

type validationJSON struct {
	Type    string                `json:"type,omitempty"`
	Message string                `json:"message,omitempty"`
	Details string                `json:"details,omitempty"`
	Nodes   map[string]NodeErrors `json:"node_errors,omitempty"`
}

type executionJSON struct {
	NodeID        string   `json:"node_id,omitempty"`
	NodeType      string   `json:"node_type,omitempty"`
	ExceptionType string   `json:"exception_type,omitempty"`
	Message       string   `json:"exception_message,omitempty"`
	Traceback     []string `json:"traceback,omitempty"`
}

// decodedError is an error of another package that came back from JSON: its text, and what errors.Is and errors.As may find.
type decodedError struct {
	text     string
	category Category
	codes    []string // those of a newer version are kept
	causes   []error
}

func (e *decodedError) Error() string { return cmp.Or(e.text, strings.Join(e.codes, ", ")) }

func (e *decodedError) Unwrap() []error {
	all := slices.Clone(e.causes)
	for _, code := range e.codes {
		if err := errorOfCode(code); err != nil {
			all = append(all, err)
		}
	}
	return all
}

// MarshalJSON keeps the category, the detail (ValidationError, ExecutionError) and the sentinels, so that errors.Is and
// errors.As find the same in what UnmarshalJSON makes of it, joined causes included. Causes from other packages become their text.
func (e *Error) MarshalJSON() ([]byte, error) {
	if e == nil {
		return []byte("null"), nil
	}
	return json.Marshal(e.toJSON(0))
}

// UnmarshalJSON is the inverse of MarshalJSON.
func (e *Error) UnmarshalJSON(data []byte) error {
	if bytes.Equal(bytes.TrimSpace(data), []byte("null")) {
		return nil
	}
	var j errorJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return fmt.Errorf("comfyui: error is malformed: %w", err)
	}
	*e = *j.toError(0)
	return nil
}

func (e *Error) toJSON(depth int) *errorJSON {
	j := &errorJSON{
		Op: e.Op, Pod: redactURLs(e.Pod), JobID: e.JobID, PromptID: e.PromptID, Attempt: e.Attempt, Status: e.Status,
		Category: e.Category, StatusCode: e.StatusCode, RetryAfter: int64(e.RetryAfter),
	}
	j.Cause = causeToJSON(e.Err, depth+1)
	return j
}

func (j *errorJSON) toError(depth int) *Error {
	e := &Error{
		Op: j.Op, Pod: j.Pod, JobID: j.JobID, PromptID: j.PromptID, Attempt: j.Attempt, Status: j.Status,
		Category: j.Category, StatusCode: j.StatusCode, RetryAfter: time.Duration(j.RetryAfter),
	}
	e.Err = j.Cause.toError(depth + 1)
	return e
}

func causeToJSON(err error, depth int) *causeJSON {
	switch {
	case isNil(err):
		return nil
	case depth > maxErrorDepth:
		return &causeJSON{Text: redactURLs(err.Error())}
	}
	switch e := err.(type) { //nolint:errorlint // this is the walk over the chain
	case *Error:
		return &causeJSON{Error: e.toJSON(depth)}
	case *ValidationError:
		return &causeJSON{Validation: &validationJSON{e.Type, redactURLs(e.Message), redactURLs(e.Details), nodesToJSON(e.Nodes)}}
	case *ExecutionError:
		return &causeJSON{Execution: &executionJSON{e.NodeID, e.NodeType, e.ExceptionType, redactURLs(e.Message), redactedLines(e.Traceback)}}
	case *decodedError:
		return &causeJSON{Text: redactURLs(e.text), Category: e.category, Is: e.codes, Causes: causesToJSON(e.causes, depth+1)}
	}
	j := &causeJSON{Text: redactURLs(err.Error()), Causes: causesToJSON(causesOf(err), depth+1)}
	if c := CategoryOf(err); c != CategoryUnknown {
		j.Category = c
	}
	for _, c := range coded {
		if err == c.err { //nolint:errorlint // by identity
			return &causeJSON{Is: []string{c.code}}
		}
		// What an Is method claims, and what the causes do not say themselves.
		if errors.Is(err, c.err) && !slices.ContainsFunc(causesOf(err), func(cause error) bool { return errors.Is(cause, c.err) }) {
			j.Is = append(j.Is, c.code)
		}
	}
	return j
}

// causesToJSON leaves out causes of which nothing but their text is known: it is in the text of what wraps them.
func causesToJSON(causes []error, depth int) []*causeJSON {
	var kept []*causeJSON
	for _, cause := range causes {
		if j := causeToJSON(cause, depth); j != nil && !j.isText() {
			kept = append(kept, j)
		}
	}
	return kept
}

func (j *causeJSON) isText() bool {
	return j.Error == nil && j.Validation == nil && j.Execution == nil && len(j.Is) == 0 && len(j.Causes) == 0
}

func (j *causeJSON) toError(depth int) error {
	switch {
	case j == nil || depth > maxErrorDepth:
		return nil
	case j.Error != nil:
		return j.Error.toError(depth)
	case j.Validation != nil:
		v := ValidationError(*j.Validation)
		return &v
	case j.Execution != nil:
		x := ExecutionError(*j.Execution)
		return &x
	}
	if j.Text == "" && len(j.Causes) == 0 && len(j.Is) == 1 {
		if err := errorOfCode(j.Is[0]); err != nil {
			return err
		}
	}
	e := &decodedError{text: j.Text, category: j.Category, codes: j.Is}
	for _, cause := range j.Causes {
		if err := cause.toError(depth + 1); err != nil {
			e.causes = append(e.causes, err)
		}
	}
	return e
}

// nodesToJSON is nodes without the tokens of URLs, and without what json.Marshal would fail on: an ExtraInfo that a caller
// filled with what is no JSON.
func nodesToJSON(nodes map[string]NodeErrors) map[string]NodeErrors {
	if nodes == nil {
		return nil
	}
	kept := make(map[string]NodeErrors, len(nodes))
	for id, n := range nodes {
		n.Errors = slices.Clone(n.Errors)
		for i := range n.Errors {
			e := &n.Errors[i]
			e.Message, e.Details, e.ExtraInfo = redactURLs(e.Message), redactURLs(e.Details), redactedJSON(e.ExtraInfo)
		}
		kept[id] = n
	}
	return kept
}

// ---- credentials

// urlSecrets finds userinfo, query and fragment of the URLs in a text. A password may hold an unescaped "?" or "#".
var urlSecrets = regexp.MustCompile(`(?i)\b((?:https?|wss?|socks5h?|rediss?)://)(?:[^\s/"'<>]*@)?([^\s"'<>?#]*)(?:[?#][^\s"'<>]*)?`)

// redactURLs takes them out: tokens stand there.
func redactURLs(text string) string {
	if !strings.Contains(text, "://") {
		return text
	}
	return urlSecrets.ReplaceAllString(text, "$1$2")
}

// withoutSecrets is a URL, which need not be a whole one, without userinfo, query and fragment.
func withoutSecrets(location string) string {
	u, err := url.Parse(location)
	if err != nil {
		return "what is no URL"
	}
	u.User, u.RawQuery, u.ForceQuery, u.Fragment, u.RawFragment = nil, "", false, "", ""
	return u.String()
}

func redactedLines(lines []string) []string {
	if !slices.ContainsFunc(lines, func(line string) bool { return strings.Contains(line, "://") }) {
		return lines
	}
	clean := make([]string, len(lines))
	for i, line := range lines {
		clean[i] = redactURLs(line)
	}
	return clean
}

// redactedJSON takes them out of the strings of a JSON text; nil for what is no JSON.
func redactedJSON(raw json.RawMessage) json.RawMessage {
	if !bytes.Contains(raw, []byte(`://`)) && !bytes.ContainsRune(raw, '\\') && json.Valid(raw) {
		return raw
	}
	return cleanJSON(raw, redactURLs)
}

// cleanJSON cleans the strings of a JSON text; nil for what is no JSON.
func cleanJSON(raw json.RawMessage, clean func(string) string) json.RawMessage {
	if !json.Valid(raw) {
		return nil
	}
	return jsonString.ReplaceAllFunc(raw, func(quoted []byte) []byte {
		var text string
		if json.Unmarshal(quoted, &text) != nil {
			return quoted
		}
		cleaned := clean(text)
		if cleaned == text {
			return quoted
		}
		quoted, _ = json.Marshal(cleaned)
		return quoted
	})
}

var jsonString = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)

// withoutURL unwraps the error that net/http and net/url put around a cause, because it repeats the whole URL.
func withoutURL(err error) error {
	for {
		var u *url.Error
		if err == nil || !errors.As(err, &u) || u.Err == nil {
			return err
		}
		err = u.Err
	}
}

// ---- what the pod's answers mean

// classifyRefusal turns an HTTP answer that is no success into an *Error. body may be cut short. clean takes credentials out of
// the texts that are kept of it: after they are decoded and before they are cut, since JSON can write a credential with
// escapes, and must still be read where a word of it is in a header.
func classifyRefusal(status int, header http.Header, body []byte, clean func(string) string) *Error {
	now, err := http.ParseTime(header.Get("Date")) // a date in Retry-After is by the same clock
	if err != nil {
		now = time.Now()
	}
	e := &Error{StatusCode: status, RetryAfter: parseRetryAfter(header.Get("Retry-After"), now)}
	if refusal, ok := wire.DecodeRefusal(body); ok {
		if status == http.StatusBadRequest {
			v := refusedWorkflow(refusal)
			e.Category, e.Err = validationCategory(v), v
			v.clean(clean)
			return e
		}
		e.Err = errors.New(clip(clean(cmp.Or(refusal.Message, refusal.Details, refusal.Type, "no reason given"))))
	}
	e.Category = statusCategory(status, header, body)
	if e.Err == nil {
		e.Err = errors.New(excerpt(status, header, body, clean))
	}
	return e
}

// clean changes the texts that can repeat what the request held.
func (e *ValidationError) clean(clean func(string) string) {
	e.Message, e.Details = clean(e.Message), clean(e.Details)
	for _, n := range e.Nodes {
		for i := range n.Errors {
			ne := &n.Errors[i]
			ne.Message, ne.Details = clean(ne.Message), clean(ne.Details)
			ne.ExtraInfo = cleanJSON(ne.ExtraInfo, clean)
		}
	}
}

func statusCategory(status int, header http.Header, body []byte) Category {
	switch status {
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		if isHTML(header, body) {
			return CategoryProtocol // a proxy's page: ComfyUI sends none
		}
		return CategoryValidation
	case http.StatusUnauthorized, http.StatusPaymentRequired, http.StatusForbidden, http.StatusProxyAuthRequired,
		http.StatusNetworkAuthenticationRequired:
		return CategoryAuth
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusGone, http.StatusNotImplemented:
		return CategoryNotFound
	case http.StatusRequestTimeout:
		return CategoryTimeout
	case http.StatusConflict, http.StatusPreconditionFailed, http.StatusLocked:
		return CategoryConflict
	case http.StatusRequestEntityTooLarge, http.StatusRequestURITooLong, http.StatusRequestHeaderFieldsTooLarge:
		return CategoryTooLarge
	case http.StatusTooManyRequests:
		return CategoryOverloaded
	case http.StatusTooEarly, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, 598, 599:
		return CategoryUnavailable
	}
	switch {
	case status >= 520 && status <= 530: // Cloudflare's own
		return CategoryUnavailable
	case status >= 300 && status < 400 && isLogin(header.Get("Location")):
		return CategoryAuth
	}
	return CategoryProtocol
}

// isLogin tells whether a redirect leads to a login page.
func isLogin(location string) bool {
	u, err := url.Parse(location)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(strings.FieldsFunc(strings.ToLower(u.Host+u.Path), func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r)
	}), func(word string) bool {
		switch word {
		case "login", "signin", "sign", "auth", "oauth", "oauth2", "sso", "saml", "authorize", "accounts", "cloudflareaccess":
			return true
		}
		return false
	})
}

// isHTML tells whether a body is a page, as proxies send them.
func isHTML(header http.Header, body []byte) bool {
	if strings.Contains(strings.ToLower(header.Get("Content-Type")), "html") {
		return true
	}
	start := strings.ToLower(string(bytes.TrimSpace(body[:min(len(body), 64)])))
	return strings.HasPrefix(start, "<!doctype") || strings.HasPrefix(start, "<html")
}

var (
	htmlTitle  = regexp.MustCompile(`(?is)<title[^>]*>(.*?)</title>`)
	htmlHidden = regexp.MustCompile(`(?is)<(script|style|head)\b.*?(</(script|style|head)>|\z)|<!--.*?(-->|\z)`)
	htmlTag    = regexp.MustCompile(`(?s)<[^>]*(>|\z)`)
)

// excerpt is what a human can read of an answer, in one short line, cleaned before it is cut.
func excerpt(status int, header http.Header, body []byte, clean func(string) string) string {
	text := string(body)
	if isHTML(header, body) {
		if m := htmlTitle.FindStringSubmatch(text); m != nil && strings.TrimSpace(m[1]) != "" {
			text = m[1]
		} else {
			text = htmlTag.ReplaceAllString(htmlHidden.ReplaceAllString(text, " "), " ")
		}
	}
	if location := header.Get("Location"); location != "" && status >= 300 && status < 400 {
		text = "redirect to " + withoutSecrets(location)
	}
	return cmp.Or(clip(clean(text)), http.StatusText(status), "status "+strconv.Itoa(status))
}

// clip makes one printable line of at most 200 runes of a text that is not ours, without the tokens of its URLs.
func clip(text string) string {
	const most = 200
	var b strings.Builder
	n, space := 0, false
	for _, r := range redactURLs(text) {
		if unicode.IsSpace(r) || !unicode.IsPrint(r) || r == utf8.RuneError {
			space = n > 0
			continue
		}
		if space {
			b.WriteByte(' ')
			space = false
			n++
		}
		if n >= most {
			b.WriteString("…")
			break
		}
		b.WriteRune(r)
		n++
	}
	return b.String()
}

// maxRetryAfter keeps a Retry-After within what time.Duration and reason can hold.
const maxRetryAfter = 24 * time.Hour

// parseRetryAfter reads seconds or a date; 0: nothing to wait for.
func parseRetryAfter(value string, now time.Time) time.Duration {
	value = strings.TrimSpace(value)
	if value == "" {
		return 0
	}
	if seconds, err := strconv.ParseFloat(value, 64); err == nil {
		if !(seconds > 0) {
			return 0
		}
		return time.Duration(min(seconds, maxRetryAfter.Seconds()) * float64(time.Second))
	}
	date, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(date.Sub(now), 0), maxRetryAfter)
}

// refusedWorkflow is the ValidationError of a 400.
func refusedWorkflow(r wire.Refusal) *ValidationError {
	v := validationOf(r.Nodes)
	if v == nil {
		v = &ValidationError{}
	}
	v.Type, v.Message, v.Details = r.Type, r.Message, r.Details
	return v
}

// validationOf is the ValidationError of an accepted prompt's node_errors: those outputs were dropped. nil: there are none.
func validationOf(nodes map[string]wire.NodeErrors) *ValidationError {
	if len(nodes) == 0 {
		return nil
	}
	v := &ValidationError{
		Type:    "prompt_outputs_failed_validation",
		Message: "Prompt outputs failed validation",
		Nodes:   make(map[string]NodeErrors, len(nodes)),
	}
	for id, n := range nodes {
		to := NodeErrors{Class: n.Class, DependentOutputs: n.DependentOutputs}
		for _, e := range n.Errors {
			to.Errors = append(to.Errors, NodeError(e))
		}
		v.Nodes[id] = to
	}
	return v
}

// validationCategory is missing_asset when all that is wrong is something that this pod does not have and another one may;
// anything else is the caller's to correct.
func validationCategory(v *ValidationError) Category {
	missing := false
	for _, n := range v.Nodes {
		for _, e := range n.Errors {
			if !isMissingAsset(e) {
				return CategoryValidation
			}
			missing = true
		}
	}
	if missing || len(v.Nodes) == 0 && isMissingClass(v) {
		return CategoryMissingAsset
	}
	return CategoryValidation
}

// isMissingClass tells a node class that is not installed from a node that names no class: both have the same type. Servers
// before missing_node_type said it in the message.
func isMissingClass(v *ValidationError) bool {
	switch v.Type {
	case "missing_node_type":
		return !strings.Contains(v.Message, "has no class_type")
	case "invalid_prompt", "":
		return strings.HasPrefix(v.Message, "Cannot execute because node ") && strings.HasSuffix(v.Message, " does not exist.")
	}
	return false
}

func isMissingAsset(e NodeError) bool {
	switch e.Type {
	case "value_not_in_list":
		// A list without a choice is a folder without models. Otherwise a file name tells a model from a misspelt word.
		return strings.HasSuffix(e.Details, " not in []") || isFileName(receivedValue(e))
	case "custom_validation_failed":
		return invalidFile.MatchString(e.Details)
	}
	return false
}

// invalidFile is what the nodes that load images, audio and video say of an input file that is not there.
var invalidFile = regexp.MustCompile(`(^| - )Invalid [\w ]*file: `)

// receivedValue is extra_info.received_value, or what the details quote.
func receivedValue(e NodeError) string {
	var info struct {
		Received any `json:"received_value"`
	}
	if json.Unmarshal(e.ExtraInfo, &info) == nil {
		if s, ok := info.Received.(string); ok {
			return s
		}
	}
	if m := quotedValue.FindStringSubmatch(e.Details); m != nil {
		return m[1]
	}
	return ""
}

var quotedValue = regexp.MustCompile(`^[^:]*: '(.*?)' not in `)

// isFileName tells names such as "sdxl/base_1.0.safetensors" from words such as "dpmpp_2m".
func isFileName(s string) bool {
	ext := strings.TrimPrefix(path.Ext(strings.ReplaceAll(s, `\`, "/")), ".")
	return len(ext) > 0 && len(ext) <= 12 && strings.ContainsFunc(ext, unicode.IsLetter) && !strings.ContainsFunc(ext, unicode.IsSpace)
}

// classifyExecution turns what the pod says of a failed node into an error and its category.
func classifyExecution(f *wire.Failure) (Category, *ExecutionError) {
	e := &ExecutionError{
		NodeID: f.NodeID, NodeType: f.NodeType, ExceptionType: f.ExceptionType,
		Message: exceptionMessage(f.Message), Traceback: f.Traceback,
	}
	return executionCategory(e.ExceptionType, e.Message), e
}

// memoryAdvice is what the server puts behind the message of an exception that it takes for out of memory.
const memoryAdvice = "\nThis error means you ran out of memory on your GPU."

func exceptionMessage(s string) string {
	s, _, _ = strings.Cut(s, memoryAdvice)
	return strings.TrimSpace(s)
}

// executionSigns are tried in order; the first that fits decides. A sign fits when the exception's type, without its
// module, is among types (none: any), and its message begins with one of the starts (none: any).
var executionSigns = []struct {
	category Category
	types    []string
	starts   []string
}{
	{category: CategoryOutOfMemory, types: []string{"OutOfMemoryError", "MemoryError", "_ArrayMemoryError"}},
	{category: CategoryOutOfMemory, starts: []string{
		"Allocation on device", "CUDA out of memory", "HIP out of memory", "XPU out of memory", "MPS backend out of memory",
		"CUDA error: out of memory", "HIP error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
		"cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory", "DefaultCPUAllocator: ", "[enforce fail at alloc_cpu.cpp",
	}},
	// What cuBLAS says of its arguments is no fault of the device.
	{category: CategoryExecution, starts: []string{
		"CUDA error: CUBLAS_STATUS_INVALID_VALUE", "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED",
	}},
	{category: CategoryPodFault, types: []string{"AcceleratorError"}},
	{category: CategoryPodFault, starts: []string{
		"CUDA error: ", "HIP error: ", "CUDA driver error: ", "CUDA unknown error", "cuDNN error: ", "cuda runtime error", "Triton Error [CUDA]: ",
		"NCCL error", "Unable to find a valid cuDNN algorithm", "GET was unable to find an engine to execute this computation",
		"No CUDA GPUs are available", "Found no NVIDIA driver on your system", "The NVIDIA driver on your system is too old",
		"Torch not compiled with CUDA enabled", "[Errno 28] No space left on device",
	}},
	{category: CategoryMissingAsset, types: []string{"FileNotFoundError", "ModuleNotFoundError", "ImportError"}},
	{category: CategoryMissingAsset, starts: []string{"[Errno 2] No such file or directory"}},
	// A model file that is cut short or no model file at all: this pod's copy is bad.
	{category: CategoryMissingAsset, types: []string{"SafetensorError"}},
	// Found only when an expansion makes the cycle; a static one is refused by validation.
	{category: CategoryValidation, types: []string{"DependencyCycleError", "NodeInputError", "NodeNotFoundError"}},
	// Nodes that call paid services.
	{category: CategoryAuth, starts: []string{"Unauthorized: Please login first to use this node", "Payment Required: "}},
}

// executionCategory classifies an exception by its type and the start of its message.
func executionCategory(exceptionType, message string) Category {
	bare := exceptionType[strings.LastIndexByte(exceptionType, '.')+1:]
	for _, sign := range executionSigns {
		if len(sign.types) > 0 && !slices.Contains(sign.types, bare) {
			continue
		}
		if len(sign.starts) > 0 && !slices.ContainsFunc(sign.starts, func(s string) bool { return strings.HasPrefix(message, s) }) {
			continue
		}
		return sign.category
	}
	return CategoryExecution
}

// poisonsPod tells whether an exception leaves the process without a working GPU until it is restarted: after most CUDA errors
// every later call fails as well. Running out of memory does not do that, nor do faults that a restart cannot clear.
func poisonsPod(e *ExecutionError) bool {
	if e == nil || executionCategory(e.ExceptionType, e.Message) != CategoryPodFault {
		return false
	}
	if strings.HasPrefix(e.Message, "CUDA error: no kernel image is available") {
		return false // the wrong build for this GPU
	}
	return strings.HasSuffix(e.ExceptionType, "AcceleratorError") || slices.ContainsFunc([]string{
		"CUDA error: ", "HIP error: ", "CUDA driver error: ", "CUDA unknown error", "cuda runtime error", "Triton Error [CUDA]: ",
	}, func(s string) bool { return strings.HasPrefix(e.Message, s) })
}
