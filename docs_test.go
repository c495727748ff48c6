package comfyui_test

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/doc/comment"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
)

// documents are the pages for users.
func documents(t *testing.T) []string {
	t.Helper()
	var pages []string
	require.NoError(t, filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || d.Name() == ".git"):
			return filepath.SkipDir
		case filepath.Ext(path) == ".md":
			pages = append(pages, path)
		}
		return nil
	}))
	require.Subset(t, pages, []string{"README.md", "CHANGELOG.md", "docs/usage.md", "docs/recovery.md", "examples/jobrunner/README.md"})
	return pages
}

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(text)
}

var codeBlock = regexp.MustCompile("(?ms)^```go\n(.*?)^```$")

func codeOf(page string) []string {
	var blocks []string
	for _, m := range codeBlock.FindAllStringSubmatch(page, -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// The usage example of the README is one that runs: Example calls it.
func TestReadmeShowsTheExample(t *testing.T) {
	t.Parallel()
	source := readText(t, "example_test.go")
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, "example_test.go", source, parser.ParseComments)
	require.NoError(t, err)
	blocks := codeOf(readText(t, "README.md"))
	require.Len(t, blocks, 1)
	for _, decl := range file.Decls {
		if f, ok := decl.(*ast.FuncDecl); ok && f.Name.Name == "generate" {
			assert.Equal(t, source[set.Position(f.Doc.Pos()).Offset:set.Position(f.End()).Offset]+"\n", blocks[0])
			return
		}
	}
	t.Fatal("example_test.go has no function generate")
}

// docScaffold is around the statements of a document: what its text says is there.
const docScaffold = `package docs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

%s

func statements(
	ctx context.Context, t *testing.T, client *comfyui.PodClient, w *comfyui.Workflow, job *comfyui.Job, jobs []*comfyui.Job, store comfyui.Store,
	data []byte, file, maskFile io.Reader, result *comfyui.Result, requeue func(error), finish func(*comfyui.Job),
	freshToken func(context.Context) (string, error), newMyStore func(*testing.T) comfyui.Store,
) (err error) {
	{
		%s
	}
	return err
}
`

// All Go code in the documents, and in the package's own comment, compiles.
func TestDocumentedCodeCompiles(t *testing.T) {
	t.Parallel()
	imports := newExports(t)
	checked := 0
	for _, page := range append(documents(t), "doc.go") {
		var blocks []string
		if text := readText(t, page); strings.HasSuffix(page, ".go") {
			blocks = codeOfComment(t, text)
		} else {
			blocks = codeOf(text)
		}
		for _, block := range blocks {
			checked++
			assert.NoError(t, compileDocumented(imports, block), "%s:\n%s", page, block)
		}
	}
	assert.Greater(t, checked, 20)
	assert.Error(t, compileDocumented(imports, "client.NoSuchMethod()"))
}

// codeOfComment is the Go code in a package comment; shell commands stand there, too.
func codeOfComment(t *testing.T, source string) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "doc.go", source, parser.ParseComments|parser.PackageClauseOnly)
	require.NoError(t, err)
	var blocks []string
	for _, block := range new(comment.Parser).Parse(file.Doc.Text()).Content {
		if code, ok := block.(*comment.Code); ok && !strings.HasPrefix(code.Text, "go run ") {
			blocks = append(blocks, code.Text)
		}
	}
	return blocks
}

// compileDocumented type-checks declarations or statements. What is not used is no fault there.
func compileDocumented(imports types.Importer, code string) error {
	source := fmt.Sprintf(docScaffold, "", code)
	if _, err := parser.ParseFile(token.NewFileSet(), "", "package p\n"+code, 0); err == nil {
		source = fmt.Sprintf(docScaffold, code, "")
	}
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, "", source, parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	var first error
	config := types.Config{Importer: imports, Error: func(err error) {
		if e, ok := err.(types.Error); first == nil && (!ok || !e.Soft) { //nolint:errorlint // go/types gives exactly these
			first = err
		}
	}}
	_, _ = config.Check("docs", set, []*ast.File{file}, nil) // Error has been told
	return first
}

var (
	markdownLink = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading      = regexp.MustCompile(`(?m)^#+ (.*)$`)
	fence        = regexp.MustCompile("(?ms)^```.*?^```$")
)

// Links within the project lead somewhere.
func TestDocumentLinks(t *testing.T) {
	t.Parallel()
	for _, page := range documents(t) {
		for _, m := range markdownLink.FindAllStringSubmatch(fence.ReplaceAllString(readText(t, page), ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			path, anchor, _ := strings.Cut(m[1], "#")
			target := page
			if path != "" {
				target = filepath.Join(filepath.Dir(page), path)
			}
			if _, err := os.Stat(target); !assert.NoError(t, err, "%s: %s", page, m[1]) || anchor == "" {
				continue
			}
			assert.Contains(t, anchorsOf(readText(t, target)), anchor, "%s: %s", page, m[1])
		}
	}
}

// anchorsOf names headings as the usual renderers of Markdown do.
func anchorsOf(page string) []string {
	var anchors []string
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		name := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case strings.ContainsRune("`,.;:()/'?!", r):
				return -1
			}
			return r
		}, strings.ToLower(m[1]))
		anchors = append(anchors, name)
	}
	return anchors
}

// table returns the rows of the table that has such a head, cells without backquotes.
func table(t *testing.T, page, head string) [][]string {
	t.Helper()
	_, rest, found := strings.Cut(page, head+"\n")
	require.True(t, found, "no table %q", head)
	var rows [][]string
	for line := range strings.Lines(rest) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			break
		}
		var cells []string
		for cell := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.Trim(strings.TrimSpace(cell), "`"))
		}
		rows = append(rows, cells)
	}
	require.Greater(t, len(rows), 1)
	return rows[1:] // without the line under the head
}

// The tables of docs/errors.md say what the code does.
func TestErrorTables(t *testing.T) {
	t.Parallel()
	page := readText(t, "docs/errors.md")

	var listed []string
	for _, row := range table(t, page, "| category | means | calls | attempts | retryable |") {
		c := comfyui.Category(row[0])
		listed = append(listed, row[0])
		tries := fmt.Sprint(comfyui.DefaultRetryPolicy(c).MaxAttempts)
		for _, cell := range row[2:4] {
			if cell != "" {
				assert.Equal(t, tries, cell, c)
			}
		}
		assert.Equal(t, map[bool]string{true: "yes", false: "no"}[c.Retryable()], row[4], c)
	}
	assert.ElementsMatch(t, allCategories(t), listed)

	var retried []string
	for _, row := range table(t, page, "| category | tries | first wait | longest wait | gives up after |") {
		p := comfyui.DefaultRetryPolicy(comfyui.Category(row[0]))
		elapsed := ""
		if p.MaxElapsed > 0 {
			elapsed = p.MaxElapsed.String()
		}
		assert.Equal(t, []string{row[0], fmt.Sprint(p.MaxAttempts), p.InitialInterval.String(), p.MaxInterval.String(), elapsed}, row)
		assert.InDelta(t, 2, p.Multiplier, 0)
		assert.InDelta(t, 0.5, p.Jitter, 0)
		retried = append(retried, row[0])
	}
	for _, c := range allCategories(t) {
		assert.Equal(t, comfyui.DefaultRetryPolicy(comfyui.Category(c)).MaxAttempts > 1, slices.Contains(retried, c), c)
	}

	sentinels := map[string]error{
		"ErrClosed": comfyui.ErrClosed, "ErrJobNotFound": comfyui.ErrJobNotFound, "ErrJobConflict": comfyui.ErrJobConflict,
		"ErrOtherPod": comfyui.ErrOtherPod, "ErrJobHeld": comfyui.ErrJobHeld, "ErrFenced": comfyui.ErrFenced, "ErrSchema": comfyui.ErrSchema,
		"ErrJobLost": comfyui.ErrJobLost, "ErrPodGone": comfyui.ErrPodGone, "ErrOutcomeUnknown": comfyui.ErrOutcomeUnknown,
		"ErrInterrupted": comfyui.ErrInterrupted, "ErrRemoved": comfyui.ErrRemoved, "ErrCancelled": comfyui.ErrCancelled,
	}
	rows := table(t, page, "| | category | |")
	assert.Len(t, rows, len(sentinels))
	for _, row := range rows {
		require.Contains(t, sentinels, row[0])
		assert.Equal(t, row[1], string(comfyui.CategoryOf(sentinels[row[0]])), row[0])
	}
}

// allCategories are those that the package declares.
func allCategories(t *testing.T) []string {
	t.Helper()
	var all []string
	p, err := newExports(t).Import(module)
	require.NoError(t, err)
	for _, name := range p.Scope().Names() {
		if c, ok := p.Scope().Lookup(name).(*types.Const); ok && strings.HasSuffix(c.Type().String(), ".Category") {
			all = append(all, strings.Trim(c.Val().ExactString(), `"`))
		}
	}
	return all
}

var documentedName = regexp.MustCompile("`(?:comfyui\\.|comfyuitest\\.|pod\\.|client\\.)?([A-Z][A-Za-z]*[a-z][A-Za-z]*)(?:\\([^`]*\\))?(?:\\.([A-Z][A-Za-z]+))?")

// What the documents name exists.
func TestDocumentedNames(t *testing.T) {
	t.Parallel()
	names := map[string]bool{}
	for _, path := range []string{module, module + "/comfyuitest", module + "/comfyuitest/storetest"} {
		p, err := newExports(t).Import(path)
		require.NoError(t, err)
		for _, name := range p.Scope().Names() {
			names[name] = true
			addMembers(names, p.Scope().Lookup(name))
		}
	}
	for _, elsewhere := range []string{
		"LoadImage", "SaveImage", "PreviewImage", "KSampler", "Upgrade", "Connection", "Origin", "Content", "Accept", // nodes of ComfyUI, headers
		"OutOfMemoryError", "MemoryError", "AcceleratorError", "FileNotFoundError", "ModuleNotFoundError", "ImportError", "SafetensorError", // exceptions
		"ReadTimeout", "WriteTimeout", "RoundTripper", "Response", "Maximum", // of go-redis and net/http; the first word of a message
	} {
		names[elsewhere] = true
	}
	found := 0
	for _, page := range documents(t) {
		for _, m := range documentedName.FindAllStringSubmatch(fence.ReplaceAllString(readText(t, page), ""), -1) {
			for _, name := range m[1:] {
				if found++; name != "" {
					assert.True(t, names[name], "%s: %s: there is no %s", page, m[0], name)
				}
			}
		}
	}
	assert.Greater(t, found, 300)
}

// addMembers adds the exported fields and methods of a type.
func addMembers(names map[string]bool, object types.Object) {
	named, ok := object.Type().(*types.Named)
	if _, isType := object.(*types.TypeName); !ok || !isType {
		return
	}
	for method := range types.NewMethodSet(types.NewPointer(named)).Methods() {
		names[method.Obj().Name()] = true
	}
	switch under := named.Underlying().(type) {
	case *types.Struct:
		for field := range under.Fields() {
			names[field.Name()] = true
		}
	case *types.Interface:
		for method := range under.Methods() {
			names[method.Name()] = true
		}
	}
}

var (
	documentedTime = regexp.MustCompile("`Timing\\.(\\w+)` \\((\\d+) (ms|s|min|h)\\)")
	defaultTime    = regexp.MustCompile(`(?m)^\tor\(&t\.(\w+), (?:(\d+) ?\* ?)?time\.(\w+)\)$`)
)

// The times that the documents name are the defaults.
func TestDocumentedTimes(t *testing.T) {
	t.Parallel()
	units := map[string]time.Duration{
		"ms": time.Millisecond, "s": time.Second, "min": time.Minute, "h": time.Hour,
		"Millisecond": time.Millisecond, "Second": time.Second, "Minute": time.Minute, "Hour": time.Hour,
	}
	duration := func(count, unit string) time.Duration {
		n, err := strconv.Atoi(cmp.Or(count, "1"))
		require.NoError(t, err)
		require.Contains(t, units, unit)
		return time.Duration(n) * units[unit]
	}
	defaults := map[string]time.Duration{}
	for _, m := range defaultTime.FindAllStringSubmatch(readText(t, "client.go"), -1) {
		defaults[m[1]] = duration(m[2], m[3])
	}
	require.Equal(t, reflect.TypeFor[comfyui.Timing]().NumField(), len(defaults))
	named := 0
	for _, page := range documents(t) {
		for _, m := range documentedTime.FindAllStringSubmatch(readText(t, page), -1) {
			named++
			assert.Equal(t, defaults[m[1]], duration(m[2], m[3]), "%s: %s", page, m[0])
		}
	}
	assert.GreaterOrEqual(t, named, 5)
}
