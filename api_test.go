package comfyui_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const module = "github.com/comfypod/comfyui"

// TestExportedAPI holds the exported API of the module against the declarations in testdata/api, which programs are written against:
// all of them are there with the same signatures, fields, tags and values, and nothing is beside them but what is listed here with a
// reason.
func TestExportedAPI(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, path string
		// absent are declarations that are not built yet: by name, types with all their methods.
		absent map[string]string
		// extra is exported beside the declarations.
		extra map[string]string
		// has are types of which the declarations say in words that their pointers implement interfaces.
		has map[string][]string
	}{
		{
			name: "comfyui", path: module,
			absent: map[string]string{
				"Pool": "many pods behind one Execute", "PoolOption": "of Pool", "NewPool": "of Pool", "WithPicker": "of Pool",
			},
			has: map[string][]string{"MemoryStore": {"Store", "Watcher"}, "RedisStore": {"Store", "Watcher"}},
		},
		{
			name: "comfyuitest", path: module + "/comfyuitest",
			extra: map[string]string{
				"(Call).Block":           "a node that blocks its outputs (ExecutionBlocker) is one of the real server's behaviours; nothing else says it",
				"(Call).Expand":          "a node that expands into a subgraph at run time, likewise",
				"(Call).Pod":             "a node that harms its own server: a dead worker, a crash, a held event loop",
				"(Call).ProgressPreview": "samplers send step and image as one, never throttled; Progress and Preview make two steps",
				"(Call).Return":          "the values of a node's outputs, without which scripted nodes cannot be chained",
				"(Call).Text":            "text progress, a binary frame of type 3",
				"Node.Async":             "several nodes that run at once interleave their frames only so",
				"Node.InputIsList":       "list inputs decide how often a node runs",
				"Node.OutputIsList":      "list outputs, likewise",
				"WithCompression":        "--enable-compress-response-body, which breaks clients that trust Content-Length",
			},
		},
		{name: "storetest", path: module + "/comfyuitest/storetest"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			imports := newExports(t)
			wanted := apiOf(declaredIn(t, imports, test.path, "testdata/api/"+test.name+".go.txt"))
			built, err := imports.Import(test.path)
			require.NoError(t, err)
			got := apiOf(built)

			for owner, interfaces := range test.has {
				addMethods(wanted, owner, interfaces)
			}

			for name := range test.absent {
				if wanted[name] == "" {
					t.Errorf("%s is listed as absent, and nothing asks for it", name)
				}
				if got[name] != "" {
					t.Errorf("%s is there now: take it off the list of what is absent", name)
				}
			}
			for name, reason := range test.extra {
				if reason == "" || wanted[name] != "" || got[name] == "" {
					t.Errorf("%s is listed as exported beside the declarations: it needs a reason (%q), must not be one of them (%q), and must be there (%q)",
						name, reason, wanted[name], got[name])
				}
			}
			for _, name := range slices.Sorted(maps.Keys(wanted)) {
				if test.absent[ownerOf(name)] == "" {
					assert.Equal(t, wanted[name], got[name], name)
				}
			}
			for _, name := range slices.Sorted(maps.Keys(got)) {
				if wanted[name] == "" && test.extra[name] == "" {
					t.Errorf("%s is exported, and not declared in testdata/api: %s", name, got[name])
				}
			}
		})
	}
}

// TestAPIComparison shows that the comparison sees what it is for.
func TestAPIComparison(t *testing.T) {
	t.Parallel()
	const base = `package p
		type T struct { A int ` + "`json:\"a\"`" + `; b string }
		func (T) Value() {}
		func (*T) Pointer(x, y int, z ...string) error { return nil }
		type I interface { M(int) string }
		type F func(*T)
		const C F2 = "x"
		type F2 string
		var V error
		func New(a, b int, opts ...F) (*T, error) { return nil, nil }
		func hidden() {}
	`
	for _, test := range []struct {
		name, from, to string
		changed        []string
	}{
		{"nothing", "", "", nil},
		{"names of parameters", "New(a, b int,", "New(x int, y int,", nil},
		{"what is not exported", "b string", "c, d float64", nil},
		{"a field's type", "A int", "A int64", []string{"T.A"}},
		{"a field's tag", `json:"a"`, `json:"b"`, []string{"T.A"}},
		{"a new field", "A int", "B, A int", []string{"T.B"}},
		{"a receiver", "func (T) Value", "func (*T) Value", []string{"(T).Value"}},
		{"a parameter", "z ...string", "z []string", []string{"(T).Pointer"}},
		{"a result", "error { return nil }", "(int, error) { return 0, nil }", []string{"(T).Pointer"}},
		{"an interface's method", "M(int) string", "M(int) int", []string{"I.M"}},
		{"a kind", "type F func(*T)", "type F func(T)", []string{"F"}},
		{"a constant's value", `= "x"`, `= "y"`, []string{"C"}},
		{"a variable's type", "V error", "V any", []string{"V"}},
		{"a name", "func New", "func Make", []string{"Make", "New"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			before := apiOf(checked(t, nil, "p", "base.go", base))
			after := apiOf(checked(t, nil, "p", "changed.go", strings.Replace(base, test.from, test.to, 1)))
			var changed []string
			for name := range maps.Keys(before) {
				if before[name] != after[name] {
					changed = append(changed, name)
				}
			}
			for name := range maps.Keys(after) {
				if _, was := before[name]; !was {
					changed = append(changed, name)
				}
			}
			slices.Sort(changed)
			assert.Equal(t, test.changed, changed)
		})
	}
}

// apiOf describes what a package exports, by name: "New", "T", "T.Field", "(T).Method", "I.Method". Names of a
// function's parameters, comments and whatever is not exported have no part in it.
func apiOf(p *types.Package) map[string]string {
	api := map[string]string{}
	for _, name := range p.Scope().Names() {
		object := p.Scope().Lookup(name)
		if !object.Exported() {
			continue
		}
		switch o := object.(type) {
		case *types.Const:
			api[name] = fmt.Sprintf("const %s = %s", typeText(o.Type()), o.Val().ExactString())
		case *types.Var:
			api[name] = "var " + typeText(o.Type())
		case *types.Func:
			api[name] = typeText(o.Type())
		case *types.TypeName:
			describeType(api, name, o)
		}
	}
	return api
}

func describeType(api map[string]string, name string, o *types.TypeName) {
	api[name] = "type " + kindText(o.Type())
	switch u := o.Type().Underlying().(type) {
	case *types.Struct:
		for i := range u.NumFields() {
			if f := u.Field(i); f.Exported() {
				api[name+"."+f.Name()] = fmt.Sprintf("field %s `%s` embedded:%t", typeText(f.Type()), u.Tag(i), f.Embedded())
			}
		}
	case *types.Interface:
		for i := range u.NumMethods() {
			m := u.Method(i)
			api[name+"."+m.Name()] = typeText(m.Type())
		}
		return
	}
	onValue := types.NewMethodSet(o.Type())
	for m := range types.NewMethodSet(types.NewPointer(o.Type())).Methods() {
		if m.Obj().Exported() {
			api["("+name+")."+m.Obj().Name()] = fmt.Sprintf("method %s on value:%t",
				typeText(m.Obj().Type()), onValue.Lookup(o.Pkg(), m.Obj().Name()) != nil)
		}
	}
}

// kindText is a type's form; of structs and interfaces the parts are described one by one.
func kindText(t types.Type) string {
	switch u := t.Underlying().(type) {
	case *types.Struct:
		return "struct"
	case *types.Interface:
		return "interface"
	default:
		return typeText(u)
	}
}

// typeText is a type without the names of parameters.
func typeText(t types.Type) string {
	if s, ok := t.(*types.Signature); ok {
		t = types.NewSignatureType(nil, nil, nil, nameless(s.Params()), nameless(s.Results()), s.Variadic())
	}
	return types.TypeString(t, nil)
}

func nameless(from *types.Tuple) *types.Tuple {
	var vars []*types.Var
	for v := range from.Variables() {
		vars = append(vars, types.NewParam(token.NoPos, nil, "", v.Type()))
	}
	return types.NewTuple(vars...)
}

// addMethods adds the methods of interfaces to those of a type's pointer.
func addMethods(api map[string]string, owner string, interfaces []string) {
	for _, name := range interfaces {
		for _, method := range slices.Sorted(maps.Keys(api)) {
			if short, ok := strings.CutPrefix(method, name+"."); ok {
				api["("+owner+")."+short] = fmt.Sprintf("method %s on value:false", api[method])
			}
		}
	}
}

// ownerOf is the top-level name that a name of apiOf belongs to.
func ownerOf(name string) string {
	name, _, _ = strings.Cut(strings.Trim(name, "("), ".")
	return strings.TrimSuffix(name, ")")
}

func declaredIn(t *testing.T, imports types.Importer, path, file string) *types.Package {
	t.Helper()
	source, err := os.ReadFile(file)
	require.NoError(t, err)
	return checked(t, imports, path, file, string(source))
}

// checked type-checks one file as the package of that path.
func checked(t *testing.T, imports types.Importer, path, name, source string) *types.Package {
	t.Helper()
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, name, source, parser.SkipObjectResolution)
	require.NoError(t, err)
	config := types.Config{Importer: imports, IgnoreFuncBodies: true}
	p, err := config.Check(path, set, []*ast.File{file}, nil)
	require.NoError(t, err)
	return p
}

// exportFiles are where the go command keeps what the compiler knows of each package that the module and its documents use.
var exportFiles = sync.OnceValues(func() (map[string]string, error) {
	args := []string{"list", "-export", "-deps", "-f", "{{.ImportPath}}\t{{.Export}}", "./...", "testing/synctest", "log"}
	var complaints bytes.Buffer
	list := exec.Command("go", args...)
	list.Stderr = &complaints
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, complaints.String())
	}
	files := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), "\t")
		files[path] = file
	}
	return files, nil
})

// newExports imports packages as the compiler sees them. An importer is for one goroutine.
func newExports(t *testing.T) types.Importer {
	t.Helper()
	files, err := exportFiles()
	require.NoError(t, err)
	return importer.ForCompiler(token.NewFileSet(), "gc", func(path string) (io.ReadCloser, error) {
		file := files[path]
		if file == "" {
			return nil, fmt.Errorf("no package %s", path)
		}
		return os.Open(file)
	})
}
