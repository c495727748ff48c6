package comfyui

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/comfypod/comfyui/internal/safename"
)

// FileRef names a file on a pod. Type is "input", "output" or "temp"; temp files are gone when the pod restarts.
type FileRef struct {
	Filename  string `json:"filename"`
	Subfolder string `json:"subfolder"`
	Type      string `json:"type"`
}

// String returns what LoadImage and its kin take: "sub/name.png" for an input (and for a FileRef without a type),
// "sub/name.png [output]" or "sub/name.png [temp]" for others.
func (f FileRef) String() string {
	name := f.Filename
	if f.Subfolder != "" {
		name = f.Subfolder + "/" + name
	}
	if (f.Type == "" || f.Type == "input") && !strings.HasSuffix(name, "]") { // "x [output]" can be the name of an input
		return name
	}
	return name + " [" + cmp.Or(f.Type, "input") + "]"
}

// query asks /view for the file. The server looks at the last component of a filename only.
func (f FileRef) query() url.Values {
	folder, name := path.Split(f.Filename)
	q := url.Values{"filename": {name}, "type": {cmp.Or(f.Type, "output")}}
	subfolder := f.Subfolder
	if folder != "" {
		subfolder = path.Join(subfolder, folder)
	}
	if subfolder != "" {
		q.Set("subfolder", subfolder)
	}
	return q
}

// isOutside tells whether the server's own check of the folder fails: 403, as for wrong credentials.
func (f FileRef) isOutside() bool {
	folder := f.query().Get("subfolder")
	return !filepath.IsLocal(filepath.FromSlash(cmp.Or(folder, "."))) || path.IsAbs(folder)
}

// Output is one value that a node has put out: a file, a text, or anything else as Raw. Key is under which it stood, such as
// "images", "gifs", "audio" or "text".
type Output struct {
	Node string          `json:"node"`
	Key  string          `json:"key"`
	File *FileRef        `json:"file,omitempty"`
	Text string          `json:"text,omitempty"`
	Raw  json.RawMessage `json:"raw,omitempty"`
	pod  *PodClient      // nil after decoding by hand, and for another pod's: then use PodClient.Open
}

// outputsFrom are copies of what a job has put out on the named pod, which open there. On another pod, which can have a file of that
// name too, they do not.
func (c *PodClient) outputsFrom(pod string, outs []Output) []Output {
	if pod != c.Name() {
		c = nil
	}
	copies := append(make([]Output, 0, len(outs)), outs...) // in JSON a list, also when it is empty
	for i := range copies {
		copies[i].pod = c
	}
	return copies
}

// Open downloads the file, as PodClient.Open does. An Output that is no file, one that was decoded from JSON by hand, and one
// of a job that ended on another pod than the client's, is an Error of CategoryValidation; for the latter two use PodClient.Open with its File.
func (o Output) Open(ctx context.Context) (io.ReadCloser, error) {
	if err := o.check(viewOp); err != nil {
		return nil, err
	}
	return o.pod.Open(ctx, *o.File)
}

// Save downloads the file into dir, which is made if it is not there, and returns its path. It keeps the subfolder that the file
// has on the pod, and makes of both a name that is fit for every file system and never leaves dir, through symbolic links
// neither; see Result.SaveAll. The file appears under its name when it is complete: before, it has a temporary name,
// ".comfyui-….part", beside it.
//
// A download that is cut is resumed or begun again, as PodClient.Open describes. An error of the local file system has
// CategoryStorage.
func (o Output) Save(ctx context.Context, dir string) (string, error) {
	if err := o.check(saveOp); err != nil {
		return "", err
	}
	root, err := o.pod.openDir(dir)
	if err != nil {
		return "", err
	}
	defer func() { _ = root.Close() }() // nothing is written through it any more
	name, err := o.pod.save(ctx, root, *o.File)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.FromSlash(name)), nil
}

func (o Output) check(op string) error {
	switch {
	case o.File == nil:
		return &Error{Op: op, Pod: o.pod.Name(), Category: CategoryValidation, Err: fmt.Errorf("output %q of node %q is no file", o.Key, o.Node)}
	case o.pod == nil:
		return &Error{Op: op, Category: CategoryValidation, Err: errors.New("the output knows no pod: it was decoded from JSON, or its job ended on another pod; use PodClient.Open with its File")}
	}
	return nil
}

// SaveAll saves all files of the result under dir, which is made if it is not there, and returns their paths in the order of Outputs.
// Outputs that are no files are left out, and a file that is listed twice is saved once.
//
// Subfolders are kept. Whatever the pod calls a file, it never lands outside dir: "..", absolute paths, drive letters, NUL and other characters
// that some file system forbids, device names (CON, NUL, COM1) and dots at the end are replaced or dropped, long names are
// cut, and a symbolic link in dir that leads outside is an error. A file that is there already with the same content is
// kept; another file of that name is left alone, and the new one becomes "name (1).png".
//
// Up to four files are downloaded at a time. A failure does not stop the others, unless all would fail like it (ctx has ended, the client is
// closed, the pod wants other credentials): the paths of those that were saved come back beside the error.
func (r *Result) SaveAll(ctx context.Context, dir string) ([]string, error) {
	if r == nil {
		return nil, &Error{Op: saveOp, Category: CategoryValidation, Err: errors.New("the *Result is nil")}
	}
	files := filesOf(r.Outputs)
	if len(files) == 0 {
		return nil, nil
	}
	root, err := files[0].pod.openDir(dir)
	if err != nil {
		return nil, r.saveError([]error{err})
	}
	defer func() { _ = root.Close() }() // nothing is written through it any more
	saveFiles(ctx, root, files)

	var paths []string
	var errs []error
	for _, f := range files {
		switch p := filepath.Join(dir, filepath.FromSlash(f.saved)); {
		case f.err != nil:
			errs = append(errs, f.err)
		case f.saved != "" && !slices.Contains(paths, p):
			paths = append(paths, p)
		}
	}
	if len(errs) > 0 {
		return paths, r.saveError(errs)
	}
	return paths, nil
}

func (r *Result) saveError(errs []error) error {
	e := &Error{
		Op: saveOp, Pod: r.Pod, JobID: r.JobID, PromptID: r.PromptID, Attempt: r.Attempt, Status: r.Status,
		Category: CategoryOf(errs[0]), Err: errs[0],
	}
	if len(errs) > 1 {
		e.Err = errors.Join(errs...)
	}
	return e
}

// savedFile is a file of a result, and what became of it. Neither saved nor err: it was not tried.
type savedFile struct {
	pod   *PodClient
	ref   FileRef
	fault error // why it cannot be tried
	saved string
	err   error
}

// filesOf lists each file once.
func filesOf(outputs []Output) []*savedFile {
	var files []*savedFile
	seen := map[FileRef]bool{}
	for _, o := range outputs {
		if o.File == nil || seen[*o.File] {
			continue
		}
		seen[*o.File] = true
		files = append(files, &savedFile{pod: o.pod, ref: *o.File, fault: o.check(saveOp)})
	}
	return files
}

// saveWorkers is how many files SaveAll downloads at a time: enough to hide the round trips of small ones.
const saveWorkers = 4

// saveFiles fills in what became of each. Files of one name are saved one after the other, so that it is always the same that get
// numbers.
func saveFiles(ctx context.Context, root *os.Root, files []*savedFile) {
	var groups [][]*savedFile
	places := map[string]int{}
	for _, f := range files {
		name := strings.ToLower(safename.Path(f.ref.Subfolder, f.ref.Filename))
		at, known := places[name]
		if !known {
			at = len(groups)
			places[name] = at
			groups = append(groups, nil)
		}
		groups[at] = append(groups[at], f)
	}
	work := make(chan []*savedFile, len(groups))
	for _, group := range groups {
		work <- group
	}
	close(work)

	var hopeless atomic.Bool
	var workers sync.WaitGroup
	for range min(saveWorkers, len(groups)) {
		workers.Go(func() {
			for group := range work {
				for _, f := range group {
					if hopeless.Load() {
						return
					}
					f.save(ctx, root)
					switch CategoryOf(f.err) {
					case CategoryContext, CategoryClosed, CategoryAuth:
						hopeless.Store(true)
					}
				}
			}
		})
	}
	workers.Wait()
}

func (f *savedFile) save(ctx context.Context, root *os.Root) {
	if f.err = f.fault; f.err == nil {
		f.saved, f.err = f.pod.save(ctx, root, f.ref)
	}
}

// Open downloads a file. The reader resumes by itself: when the connection is cut, or silent for Timing.BodyIdle, it asks for
// the rest, as often as the retry policies allow and as long as the download moves. What is appended is compared first: when the
// file has changed on the pod meanwhile (another Etag, or none to compare) and some of it was handed out, reading ends with
// an Error of CategoryConflict.
//
// ctx bounds the reading too. Timing.Request bounds the wait for each answer. A file that is not there is CategoryNotFound: temp
// files are gone when a pod restarts. The caller closes the reader. io.Copy from it uses a large buffer of its own.
func (c *PodClient) Open(ctx context.Context, f FileRef) (io.ReadCloser, error) {
	d, err := c.download(ctx, f)
	if err != nil {
		return nil, err
	}
	return d, nil
}

const (
	viewOp = "open file"
	saveOp = "save file"
)

// download is a file that is being read.
type download struct {
	pod    *PodClient
	file   FileRef
	ctx    context.Context
	cancel context.CancelFunc

	// restart takes back what was handed out; nil: nobody can.
	restart func() error

	mu     sync.Mutex // for body, which only the reader changes, and closed
	body   io.ReadCloser
	closed bool

	etag     string // a strong one, else ""
	size     int64  // -1: not known
	at       int64  // so many bytes were handed out
	late     error  // came with bytes, and is for the next Read
	end      error  // of all reading
	cuts     int    // since enough came
	cutAt    int64
	restarts int
}

const (
	maxCuts     = 5       // in a row, with fewer than enoughBytes between them
	enoughBytes = 1 << 20 // a download that yields so much between two cuts goes on for ever
	maxRestarts = 5       // of a file that changes as it is read
)

func (c *PodClient) download(ctx context.Context, f FileRef) (*download, error) {
	if f.Filename == "" {
		return nil, c.refuse(viewOp, "the FileRef has no filename")
	}
	d := &download{pod: c, file: f, size: -1}
	d.ctx, d.cancel = context.WithCancel(ctx)
	if err := d.request(); err != nil {
		d.cancel()
		return nil, err
	}
	return d, nil
}

// Read reads on, over as many connections as it takes.
func (d *download) Read(p []byte) (int, error) {
	if d.isClosed() {
		return 0, &Error{Op: viewOp, Pod: d.pod.Name(), Category: CategoryContext, Err: fs.ErrClosed}
	}
	if len(p) == 0 {
		return 0, nil
	}
	for d.end == nil {
		n, err := 0, d.late
		if d.late = nil; err == nil {
			n, err = d.body.Read(p)
			d.at += int64(n)
		}
		if n > 0 || err == nil {
			d.late = err
			return n, nil
		}
		if errors.Is(err, io.EOF) && (d.size < 0 || d.at == d.size) {
			d.finish(io.EOF)
		} else if err := d.resume(err); err != nil {
			d.finish(err)
		}
	}
	return 0, d.end
}

// WriteTo is Read for io.Copy.
func (d *download) WriteTo(w io.Writer) (int64, error) {
	buf := downloadBuffers.Get().(*[]byte) //nolint:forcetypeassert // nothing else is in it
	defer downloadBuffers.Put(buf)
	for written := int64(0); ; {
		n, err := d.Read(*buf)
		if n > 0 {
			m, err := w.Write((*buf)[:n])
			written += int64(m)
			if err == nil && m < n {
				err = io.ErrShortWrite
			}
			if err != nil {
				return written, err
			}
		}
		if err == io.EOF { //nolint:errorlint // Read returns it bare
			return written, nil
		}
		if err != nil {
			return written, err
		}
	}
}

// downloadBuffers hold what io.Copy would move in eight pieces.
var downloadBuffers = sync.Pool{New: func() any {
	buf := make([]byte, 256<<10)
	return &buf
}}

// Close ends a Read that is under way.
func (d *download) Close() error {
	d.mu.Lock()
	body, closed := d.body, d.closed
	d.closed = true
	d.mu.Unlock()
	if closed {
		return nil
	}
	d.cancel()
	return body.Close()
}

func (d *download) isClosed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closed
}

// finish frees what the download holds, for a caller who forgets to close it.
func (d *download) finish(end error) {
	d.end = end
	_ = d.body.Close()
	d.cancel()
}

// resume asks for the rest after a cut.
func (d *download) resume(cut error) error {
	if errors.Is(cut, io.EOF) {
		cut = &Error{
			Op: viewOp, Pod: d.pod.Name(), Category: CategoryNetwork,
			Err: fmt.Errorf("%w after %d of %d bytes", io.ErrUnexpectedEOF, d.at, d.size),
		}
	}
	switch CategoryOf(cut) {
	case CategoryContext, CategoryClosed:
		return cut
	}
	if d.at-d.cutAt >= enoughBytes {
		d.cuts = 0
	}
	d.cutAt = d.at
	if d.cuts++; d.cuts > maxCuts {
		return cut
	}
	_ = d.body.Close()
	return d.request()
}

// request asks for the file from where it stands, until there is an answer that can be read on from.
func (d *download) request() error {
	what := retryOp{op: viewOp, safe: func(err error) bool { return CategoryOf(err) != CategoryStorage }} // restart's: it is ours
	return d.pod.repeat(d.ctx, what, func(context.Context) error {
		resp, err := d.ask() // not bound to the loop: the body outlives it
		if err != nil {
			return err
		}
		err = d.take(resp)
		if errors.Is(err, errRestarted) {
			_ = resp.Body.Close()
			if resp, err = d.ask(); err != nil {
				return err
			}
			err = d.take(resp)
		}
		if err != nil {
			_ = resp.Body.Close()
		}
		return err
	})
}

func (d *download) ask() (*http.Response, error) {
	header := http.Header{}
	if d.at > 0 { // If-Range would be of no use: the server ignores an Etag in it
		header.Set("Range", "bytes="+strconv.FormatInt(d.at, 10)+"-")
	}
	return d.pod.view(d.ctx, viewOp, d.file, header)
}

// exists is an error of category not_found unless the pod has the file.
func (c *PodClient) exists(ctx context.Context, op string, f FileRef) error {
	resp, err := c.view(ctx, op, f, http.Header{"Range": {"bytes=0-0"}})
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }() // nothing is read of it
	return c.checkFile(resp, op, f)
}

// view asks for a file and says what a refusal means for it.
func (c *PodClient) view(ctx context.Context, op string, f FileRef, header http.Header) (*http.Response, error) {
	resp, err := c.endpoint.view(ctx, op, f.query(), header)
	var failed *Error
	switch {
	case !errors.As(err, &failed):
	case failed.Category == CategoryNotFound:
		hint := ""
		if f.Type == "temp" {
			hint = ", and temp files are gone when a pod restarts"
		}
		failed.Err = fmt.Errorf("the pod has no file %s%s: %w", f, hint, failed.Err)
	case failed.StatusCode == http.StatusBadRequest && failed.Category == CategoryValidation:
		failed.Err = fmt.Errorf("the pod takes no file name or type such as those of %s: %w", f, failed.Err)
	case failed.StatusCode == http.StatusForbidden && f.isOutside(): // it is not about credentials
		failed.Category = CategoryValidation
		failed.Err = fmt.Errorf("the pod serves no file outside its folders, as %s is: %w", f, failed.Err)
	}
	return resp, err
}

// errRestarted: what was handed out has been taken back, and the answer is of no use.
var errRestarted = errors.New("the download begins again")

// take makes the body of an answer the one that is read on from.
func (d *download) take(resp *http.Response) error {
	if err := d.pod.checkFile(resp, viewOp, d.file); err != nil {
		return err
	}
	whole := resp.StatusCode == http.StatusOK
	same := d.etag != "" && strongEtag(resp) == d.etag
	switch {
	case d.at > 0 && same && d.continues(resp):
		_, d.size, _ = contentRange(resp)
	case d.at > 0 && same && whole: // Range was ignored, as by a proxy
		switch _, err := io.CopyN(io.Discard, resp.Body, d.at); {
		case errors.Is(err, io.EOF): // bare, it would end the reading as if all had come
			return d.pod.protocolError(resp, viewOp, fmt.Sprintf("%d bytes of the file have come, and now it is shorter", d.at))
		case err != nil:
			return err
		}
	case d.at > 0:
		if err := d.again(); err != nil {
			return err
		}
		if !whole {
			return errRestarted
		}
		d.etag, d.size = strongEtag(resp), resp.ContentLength
	case whole:
		d.etag, d.size = strongEtag(resp), resp.ContentLength
	default:
		return d.pod.protocolError(resp, viewOp, "the whole file was asked for, and another answer came")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return &Error{Op: viewOp, Pod: d.pod.Name(), Category: CategoryContext, Err: fs.ErrClosed}
	}
	d.body = resp.Body
	return nil
}

// continues tells whether an answer is the rest of the file.
func (d *download) continues(resp *http.Response) bool {
	start, total, ok := contentRange(resp)
	return resp.StatusCode == http.StatusPartialContent && ok && start == d.at && (d.size < 0 || total == d.size)
}

// again takes back what was handed out, since the file is not the one it was, or nothing tells whether it is.
func (d *download) again() error {
	if d.restart == nil || d.restarts == maxRestarts {
		return &Error{
			Op: viewOp, Pod: d.pod.Name(), Category: CategoryConflict,
			Err: fmt.Errorf("the download of %s was cut after %d bytes and cannot be resumed: the file has changed on the pod, or nothing tells whether it has", d.file, d.at),
		}
	}
	d.restarts++
	if err := d.restart(); err != nil {
		return d.pod.localError(err)
	}
	d.at, d.cutAt = 0, 0
	return nil
}

// checkFile refuses answers that are no files.
func (c *PodClient) checkFile(resp *http.Response, op string, f FileRef) error {
	// The server names a type by the file's name; a page in place of a picture is a proxy's.
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if mediaType == "text/html" && !strings.Contains(strings.ToLower(path.Ext(f.Filename)), "htm") {
		page, _ := io.ReadAll(io.LimitReader(resp.Body, refusalReply)) // what there is of it
		answer := &reply{status: resp.StatusCode, header: resp.Header, sent: resp.Request.Header, url: resp.Request.URL, body: page}
		return c.endpoint.malformed(op, answer, errors.New("a page came instead of the file"))
	}
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return c.protocolError(resp, op, "the file came compressed, which was not asked for")
	}
	return nil
}

func (c *PodClient) protocolError(resp *http.Response, op, text string) error {
	return &Error{Op: op, Pod: c.Name(), Category: CategoryProtocol, StatusCode: resp.StatusCode, Err: errors.New(text)}
}

// localError is one of the local file system.
func (c *PodClient) localError(err error) error {
	return &Error{Op: saveOp, Pod: c.Name(), Category: CategoryStorage, Err: err}
}

// strongEtag is "" for a weak one: it does not promise the same bytes (RFC 9110, 8.8.1).
func strongEtag(resp *http.Response) string {
	etag := resp.Header.Get("Etag")
	if !strings.HasPrefix(etag, `"`) {
		return ""
	}
	return etag
}

// contentRange reads "bytes start-end/total".
func contentRange(resp *http.Response) (start, total int64, ok bool) {
	text, isBytes := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes ")
	span, totalText, hasTotal := strings.Cut(text, "/")
	startText, _, isSpan := strings.Cut(span, "-")
	start, err := strconv.ParseInt(startText, 10, 64)
	total, totalErr := strconv.ParseInt(totalText, 10, 64)
	return start, total, isBytes && hasTotal && isSpan && err == nil && totalErr == nil
}

// ---------------------------------------------------------------- saving

func (c *PodClient) openDir(dir string) (*os.Root, error) {
	if dir == "" {
		return nil, &Error{Op: saveOp, Pod: c.Name(), Category: CategoryValidation, Err: errors.New(`the name of the directory is empty; "." is the current one`)}
	}
	if err := os.MkdirAll(dir, 0o777); err != nil { //nolint:gosec // the umask is the user's to choose, here as for os.Create
		return nil, c.localError(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, c.localError(err)
	}
	return root, nil
}

// save downloads a file into root and returns its slash-separated name there.
func (c *PodClient) save(ctx context.Context, root *os.Root, f FileRef) (name string, err error) {
	d, err := c.download(ctx, f)
	if err != nil {
		return "", err
	}
	defer func() { _ = d.Close() }() // read to its end, or failed already
	name = safename.Path(f.Subfolder, f.Filename)
	part, err := newPartFile(root, path.Dir(name))
	if err != nil {
		return "", c.localError(err)
	}
	defer part.remove()
	d.restart = part.rewind
	if _, err := d.WriteTo(part.file); err != nil {
		if errors.As(err, new(*Error)) {
			return "", err
		}
		return "", c.localError(err)
	}
	if err := part.file.Close(); err != nil {
		return "", c.localError(err)
	}
	if name, err = part.publish(name); err != nil {
		return "", c.localError(err)
	}
	return name, nil
}

// partFile is a file that is not complete.
type partFile struct {
	root *os.Root
	name string
	file *os.File
	link func(from, to string) error // root.Link
}

func newPartFile(root *os.Root, dir string) (*partFile, error) {
	if err := root.MkdirAll(dir, 0o777); err != nil {
		return nil, err
	}
	name := path.Join(dir, ".comfyui-"+rand.Text()+".part")
	file, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, err
	}
	return &partFile{root, name, file, root.Link}, nil
}

func (p *partFile) rewind() error {
	if err := p.file.Truncate(0); err != nil {
		return err
	}
	_, err := p.file.Seek(0, io.SeekStart)
	return err
}

func (p *partFile) remove() {
	_ = p.file.Close()        // closed already, if all went well
	_ = p.root.Remove(p.name) // gone already, if it was renamed
}

// maxNumber bounds the files of one name in a directory.
const maxNumber = 10_000

// publish gives the complete file the first name that is free. If an equal file has one of the names before that, it stands
// for this one.
func (p *partFile) publish(name string) (string, error) {
	for n := range maxNumber {
		numbered := safename.Numbered(name, n)
		err := p.appear(numbered)
		if !errors.Is(err, fs.ErrExist) {
			return numbered, err
		}
		if p.equals(numbered) {
			return numbered, nil
		}
	}
	return "", fmt.Errorf("%s: %w, with %d numbers", name, fs.ErrExist, maxNumber)
}

// appear gives the file its name at once and whole, unless the name is taken: fs.ErrExist. A hard link is the one way that does both.
func (p *partFile) appear(name string) error {
	err := p.link(p.name, name)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return err
	}
	// No hard links here (FAT, some network file systems). Renaming would replace a file that appears in between.
	renames.Lock()
	defer renames.Unlock()
	if _, err := p.root.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = fs.ErrExist
		}
		return err
	}
	return p.root.Rename(p.name, name)
}

// renames keeps this process from replacing its own files.
var renames sync.Mutex

// equals compares with a file that is there. One that cannot be read is another.
func (p *partFile) equals(name string) bool {
	there, err := p.root.Lstat(name)
	if err != nil || !there.Mode().IsRegular() {
		return false
	}
	here, err := p.root.Lstat(p.name)
	if err != nil || here.Size() != there.Size() {
		return false
	}
	a, err := p.root.Open(p.name)
	if err != nil {
		return false
	}
	defer func() { _ = a.Close() }() // it was only read
	b, err := p.root.Open(name)
	if err != nil {
		return false
	}
	defer func() { _ = b.Close() }() // it was only read
	return sameBytes(a, b)
}

func sameBytes(a, b io.Reader) bool {
	bufA, bufB := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errA := io.ReadFull(a, bufA)
		m, errB := io.ReadFull(b, bufB)
		if !bytes.Equal(bufA[:n], bufB[:m]) {
			return false
		}
		if errA != nil || errB != nil {
			return atEnd(errA) && atEnd(errB)
		}
	}
}

// atEnd tells the end of a file from a failure, as io.ReadFull reports them.
func atEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }
