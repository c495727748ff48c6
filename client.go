package comfyui

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
)

// PodClient drives one ComfyUI process. It is safe for concurrent use. A zero PodClient answers every call with ErrClosed.
type PodClient struct {
	opts     *options
	endpoint *endpoint
}

// Option configures a PodClient; see NewPodClient.
type Option func(*options)

// options is what NewPodClient was given. It does not change afterwards.
type options struct {
	name        string
	base        *url.URL // without userinfo and query: may be printed
	query       url.Values
	userinfo    *url.Userinfo
	httpClient  *http.Client
	dialer      *websocket.Dialer
	header      http.Header
	headerFuncs []func(context.Context) (http.Header, error)
	apiKey      string // extra_data.api_key_comfy_org of every POST
	clientID    string
	store       Store
	retry       map[Category]RetryPolicy
	timing      Timing
	jobDefaults []JobOption
	maxInFlight int
	previews    bool
	logger      *slog.Logger
	hooks       Hooks
	faults      []error // what options refused; NewPodClient reports them together
}

func newOptions(baseURL string, opts []Option) (*options, error) {
	o := &options{
		header:   http.Header{},
		clientID: uuid.NewString(),
		retry:    map[Category]RetryPolicy{},
		logger:   slog.New(slog.DiscardHandler),
	}
	if err := o.parseBase(baseURL); err != nil {
		return nil, err
	}
	for _, opt := range opts {
		if opt != nil {
			opt(o)
		}
	}
	return o, nil
}

// parseBase takes "host:8188" as well as a URL with a path prefix, userinfo and a query.
func (o *options) parseBase(baseURL string) error {
	raw := strings.TrimSpace(baseURL)
	if raw == "" {
		return fmt.Errorf("comfyui: the pod's base URL is empty; give one such as http://127.0.0.1:8188")
	}
	if !strings.Contains(raw, "://") {
		raw = "http://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil {
		// url.Error repeats the URL, which can hold a password.
		return fmt.Errorf("comfyui: the pod's base URL cannot be parsed; give one such as http://127.0.0.1:8188")
	}
	switch u.Scheme {
	case "http", "https":
	case "ws":
		u.Scheme = "http"
	case "wss":
		u.Scheme = "https"
	default:
		return fmt.Errorf("comfyui: the pod's base URL has the scheme %q; use http or https", u.Scheme)
	}
	if u.Host == "" {
		return fmt.Errorf("comfyui: the pod's base URL names no host; give one such as http://127.0.0.1:8188")
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return fmt.Errorf("comfyui: the query of the pod's base URL cannot be parsed")
	}
	o.query, o.userinfo = query, u.User
	u.User, u.RawQuery, u.Fragment, u.RawFragment = nil, "", "", ""
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), strings.TrimRight(u.RawPath, "/")
	o.base = u
	o.name = u.String()
	return nil
}

// WithPodName sets the pod's name in records, errors, hooks and a Pool. The default is the base URL without userinfo and query.
func WithPodName(name string) Option { return func(o *options) { o.name = name } }

// WithHTTPClient sets the HTTP client. It is copied: redirects are the library's own business, and its Timeout is not applied
// to bodies (Timing.Request and Timing.BodyIdle are).
func WithHTTPClient(c *http.Client) Option { return func(o *options) { o.httpClient = c } }

// WithDialer sets the WebSocket dialer. The default is made from the HTTP client's *http.Transport (TLS, proxy, dial) and Jar.
func WithDialer(d *websocket.Dialer) Option { return func(o *options) { o.dialer = d } }

// WithHeader sets a header of every HTTP request and WebSocket handshake.
func WithHeader(name, value string) Option { return func(o *options) { o.header.Set(name, value) } }

// WithHeaderFunc adds headers that are asked for at each request and dial, such as short-lived tokens. An error of f fails
// that request with CategoryAuth.
func WithHeaderFunc(f func(context.Context) (http.Header, error)) Option {
	return func(o *options) {
		if f != nil {
			o.headerFuncs = append(o.headerFuncs, f)
		}
	}
}

// WithBearerToken is WithHeader("Authorization", "Bearer "+token).
func WithBearerToken(token string) Option { return WithHeader("Authorization", "Bearer "+token) }

// WithComfyAPIKey sends key as extra_data.api_key_comfy_org of every POST /prompt, for nodes that call paid services. It is
// never stored: whoever recovers the job needs the option too.
func WithComfyAPIKey(key string) Option { return func(o *options) { o.apiKey = key } }

// WithClientID sets the id under which the pod knows this client's WebSocket; the default is a new UUID. A stable id per
// worker slot lets events survive a restart of the worker. Two live processes must never share one: the pod sends the
// events to one of them.
func WithClientID(id string) Option { return func(o *options) { o.clientID = id } }

// WithStore sets where job records are kept; the default is NewMemoryStore(), which forgets them with the process.
func WithStore(s Store) Option { return func(o *options) { o.store = s } }

// WithRetry replaces the policy of a category; see RetryPolicy.
func WithRetry(c Category, p RetryPolicy) Option { return func(o *options) { o.retry[c] = p } }

// WithTiming replaces timings; zero fields keep their defaults.
func WithTiming(t Timing) Option { return func(o *options) { o.timing = t } }

// WithJobDefaults adds options that are applied before those of each Execute and Submit, and to recovered jobs.
func WithJobDefaults(opts ...JobOption) Option {
	return func(o *options) { o.jobDefaults = append(o.jobDefaults, opts...) }
}

// WithMaxInFlight makes Submit wait while n of this client's jobs are on the pod; 0 means no bound.
func WithMaxInFlight(n int) Option { return func(o *options) { o.maxInFlight = n } }

// WithPreviews asks for preview images: events of kind preview. Without it their bytes are not even copied off the socket.
func WithPreviews() Option { return func(o *options) { o.previews = true } }

// WithLogger sets the logger; the default is silence. No credential is ever logged.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) {
		if l != nil {
			o.logger = l
		}
	}
}

// WithHooks sets the hooks; see Hooks.
func WithHooks(h Hooks) Option { return func(o *options) { o.hooks = h } }

// Timing bounds every wait of a PodClient. A zero field keeps its default, a negative one switches the thing off where that
// makes sense.
type Timing struct {
	Connect       time.Duration // 10s   TCP + TLS + WebSocket handshake
	Request       time.Duration // 60s   one call, to the end of a small body; a download, to its headers
	BodyIdle      time.Duration // 30s   silence inside a download before it is resumed
	StreamWait    time.Duration // 3s    POST waits so long for a stream that is being dialled; not at all for one known to be down
	Ping          time.Duration // 20s   WebSocket ping period; dead after two without any frame
	ReconnectMin  time.Duration // 500ms
	ReconnectMax  time.Duration // 30s
	Poll          time.Duration // 1s    reconcile period while the stream is down
	PollStreaming time.Duration // 15s   reconcile period while it is up
	Grace         time.Duration // 10s   an unanswered POST is looked for so long; also between the two looks that make a job lost
	Settle        time.Duration // 10s   ended by the stream, /history still {}: waited so long, then the stream's outputs stand
	Gone          time.Duration // 10m   pod unreachable so long: its jobs end with ErrPodGone; negative: never
	Cancel        time.Duration // 30s   a cancel that has no ctx of its own (CancelWithContext, Limits) is tried so long
	Lease         time.Duration // 30s   renewed at a third
	StoreWait     time.Duration // 1s    Wait holds a known end back at most so long for its record to land
	ProgressWrite time.Duration // 500ms progress to the store, newest per job
	Retention     time.Duration // 24h   an ended record is kept so long
}

func (t Timing) withDefaults() Timing {
	or := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	or(&t.Connect, 10*time.Second)
	or(&t.Request, 60*time.Second)
	or(&t.BodyIdle, 30*time.Second)
	or(&t.StreamWait, 3*time.Second)
	or(&t.Ping, 20*time.Second)
	or(&t.ReconnectMin, 500*time.Millisecond)
	or(&t.ReconnectMax, 30*time.Second)
	or(&t.Poll, time.Second)
	or(&t.PollStreaming, 15*time.Second)
	or(&t.Grace, 10*time.Second)
	or(&t.Settle, 10*time.Second)
	or(&t.Gone, 10*time.Minute)
	or(&t.Cancel, 30*time.Second)
	or(&t.Lease, 30*time.Second)
	or(&t.StoreWait, time.Second)
	or(&t.ProgressWrite, 500*time.Millisecond)
	or(&t.Retention, 24*time.Hour)
	return t
}

// Hooks are told what happens. They are called on goroutines that block nothing else; nil ones are skipped.
type Hooks struct {
	Event  func(Event)          // every event of every job of the client
	Retry  func(RetryInfo)      // before every wait
	Health func(was, is Health) // when State changes
}

// RetryInfo tells Hooks.Retry what failed and how long the wait will be.
type RetryInfo struct {
	Pod, Op, JobID string
	Try            int // the one that failed, from 1
	Wait           time.Duration
	NewAttempt     bool // a new attempt of the job, not a repeated call
	Err            error
}

// Stats is a snapshot; counters are since NewPodClient.
type Stats struct {
	Following                              int // jobs followed now
	Owned                                  int // of these, driven by this client
	Stream                                 StreamState
	Submitted, Joined, Recovered           int64
	Succeeded, Failed, Cancelled           int64
	Attempts                               int64 // POSTs that opened a new attempt
	AmbiguousPosts, DuplicatesRemoved      int64
	Calls, CallErrors, Retries             int64
	Dials, DialErrors, Deaf                int64
	Frames, FrameBytes, FramesSkipped      int64
	StoreWrites, StoreErrors, StorePending int64 // StorePending: records that wait for the store now
}

// counters are the running totals behind Stats.
type counters struct {
	submitted, joined, recovered      atomic.Int64
	succeeded, failed, cancelled      atomic.Int64
	attempts                          atomic.Int64
	ambiguousPosts, duplicatesRemoved atomic.Int64
	calls, callErrors, retries        atomic.Int64
	dials, dialErrors, deaf           atomic.Int64
	frames, frameBytes, framesSkipped atomic.Int64
	storeWrites, storeErrors          atomic.Int64
}

// Name is the pod's name: WithPodName, else the base URL without userinfo and query.
func (c *PodClient) Name() string {
	if c == nil || c.opts == nil {
		return ""
	}
	return c.opts.name
}
