package comfyui

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"math/big"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/comfypod/comfyui/internal/rawjson"
)

// Titles that repeat, a class that repeats, a title that is another node's class, a title that is another node's id.
const sampleGraph = `{
  "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "a"}, "_meta": {"title": "Save"}},
  "3": {"inputs": {"seed": 18446744073709551615, "denoise": 0.50, "model": ["4", 0]}, "class_type": "KSampler",
        "_meta": {"title": "Sampler", "note": "kept"}, "color": "#232"},
  "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0]}, "_meta": {"title": "3"}},
  "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}, "_meta": {"title": "Prompt"}},
  "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog"}, "_meta": {"title": "Prompt"}},
  "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}, "_meta": {"title": "SaveImage"}},
  "57:8": {"class_type": "EmptyLatentImage", "inputs": {}}
}`

func parsed(t require.TestingT, text string) *Workflow {
	w, err := ParseWorkflow([]byte(text))
	require.NoError(t, err)
	return w
}

func marshalled(t require.TestingT, w *Workflow) string {
	data, err := json.Marshal(w)
	require.NoError(t, err)
	return string(data)
}

func TestLoadWorkflowFromMedia(t *testing.T) {
	t.Parallel()
	hashes := map[string]string{}
	for name, class := range map[string]string{
		"simple.png": "SaveImage", "subgraph.png": "SaveImage", "animated.png": "SaveAnimatedPNG", "animated.webp": "SaveAnimatedWEBP",
		"video.mp4": "SaveVideo", "video.webm": "SaveWEBM", "audio.mp3": "SaveAudioMP3", "audio.flac": "SaveAudio", "audio.opus": "SaveAudioOpus",
		"tensor.latent": "SaveLatent",
	} {
		path := filepath.Join("internal/media/testdata", name)
		w, err := LoadWorkflow(path)
		require.NoError(t, err, name)
		require.NoError(t, w.check(), name)
		classes := map[string]bool{}
		for n := range w.Nodes() {
			classes[n.Class] = true
		}
		assert.Contains(t, classes, class, name)
		hashes[name] = w.hash()

		data, err := os.ReadFile(path)
		require.NoError(t, err)
		fromBytes, err := ParseWorkflow(data)
		require.NoError(t, err, name)
		assert.Equal(t, w.hash(), fromBytes.hash(), name)
	}
	// One run of the server made the files of each pair.
	assert.Equal(t, hashes["animated.png"], hashes["animated.webp"])
	assert.Equal(t, hashes["video.mp4"], hashes["video.webm"])
	assert.Equal(t, hashes["audio.flac"], hashes["audio.opus"])
	assert.NotEqual(t, hashes["simple.png"], hashes["subgraph.png"])
}

func TestLoadWorkflowErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	_, err := LoadWorkflow(filepath.Join(dir, "none.json"))
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.ErrorContains(t, err, "none.json")
	var e *Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, CategoryNotFound, e.Category)

	for path, want := range map[string]string{
		dir:                                   "it is a directory",
		write("empty.json", " \n"):            "it is empty",
		write("cut.json", "{\n \"1\": {"):     "no valid JSON: line 2, column 7",
		write("plain.png", string(pngOf(""))): "carries no workflow",
		write("a.gif", "GIF89a"):              "no valid JSON: line 1, column 1",
	} {
		_, err := LoadWorkflow(path)
		require.ErrorContains(t, err, want)
		require.ErrorContains(t, err, path, "it says which file")
		require.ErrorAs(t, err, &e)
		assert.Equal(t, CategoryValidation, CategoryOf(err))
	}
}

func TestParseWorkflowForms(t *testing.T) {
	t.Parallel()
	const api = `{"1":{"class_type":"A","inputs":{"x":1}}}`
	const ui = `{"last_node_id":1,"nodes":[{"id":1,"type":"A"}],"links":[],"version":0.4}`
	for name, test := range map[string]struct{ data, want string }{
		"API":                      {api, api},
		"with a mark":              {"\ufeff" + api, api},
		"UI":                       {ui, ui},
		"a request":                {`{"prompt":` + api + `,"client_id":"c","extra_data":{"extra_pnginfo":{"workflow":` + ui + `}}}`, api},
		"a request with UI format": {`{"prompt":` + ui + `}`, ui},
		"a node that is called prompt": {
			`{"prompt":{"class_type":"A"},"number":{"class_type":"B"}}`, `{"prompt":{"class_type":"A"},"number":{"class_type":"B"}}`,
		},
		"a node that is called nodes": {`{"nodes":{"class_type":"A"}}`, `{"nodes":{"class_type":"A"}}`},
		"NaN from the server":         {`{"1":{"class_type":"A","inputs":{"x":NaN,"y":"NaN"},"is_changed":[NaN]}}`, `{"1":{"class_type":"A","inputs":{"x":null,"y":"NaN"}}}`},
		"a key twice":                 {`{"1":{"class_type":"A"},"2":{"class_type":"B"},"1":{"class_type":"C"}}`, `{"1":{"class_type":"C"},"2":{"class_type":"B"}}`},
		"PNG, prompt and workflow":    {string(pngOf(textChunk("workflow", ui) + textChunk("prompt", api))), api},
		"PNG, workflow only":          {string(pngOf(textChunk("workflow", ui))), ui},
		"PNG, words as prompt":        {string(pngOf(textChunk("prompt", "a cat") + textChunk("workflow", ui))), ui},
		"PNG, API format as workflow": {string(pngOf(textChunk("workflow", api))), api},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := parsed(t, test.data)
			assert.Equal(t, test.want, marshalled(t, w))
			assert.Equal(t, strings.Contains(test.want, "last_node_id"), w.isUI())
		})
	}
}

func TestParseWorkflowRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ data, want string }{
		"nothing":             {"", "it is empty"},
		"an empty object":     {"{}", "{} holds no nodes"},
		"null":                {"null", "this is null"},
		"a list":              {"[1]", "this is a list"},
		"a text":              {`"x"`, "this is a text"},
		"another object":      {`{"name":"x","version":"1.0"}`, "no entry of the JSON object is a node"},
		"nodes that are null": {`{"1":null}`, "no entry of the JSON object is a node"},
		"UTF-16":              {"\xff\xfe{\x00}\x00", "UTF-16"},
		"Latin-1":             {"{\"\xe9\":1}", "UTF-8"},
		"a bomb of brackets":  {strings.Repeat(`{"a":`, 1<<18), "nested deeper"},
		"a bomb of entries":   {`{"1":{"class_type":"A"}` + strings.Repeat(`,"":0`, 1<<18) + `}`, "more than 131072 members"},
		"cut":                 {`{"1":{"class_type":"A"}`, "no valid JSON: line 1, column 23"},
		"a request and more":  {`{"prompt":{"1":{"class_type":"A"}},"output":1}`, "no entry of the JSON object is a node"},
		"PNG, words":          {string(pngOf(textChunk("prompt", "a cat"))), "no valid JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, err := ParseWorkflow([]byte(test.data))
			require.ErrorContains(t, err, test.want)
			assert.Nil(t, w)
			assert.Equal(t, CategoryValidation, CategoryOf(err))
		})
	}
}

func TestWorkflowKeepsWhatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	w := parsed(t, sampleGraph)
	compact, err := rawjson.Compact([]byte(sampleGraph))
	require.NoError(t, err)
	assert.Equal(t, string(compact), marshalled(t, w))

	require.NoError(t, w.Set("Sampler", "denoise", 1))
	assert.Equal(t, strings.Replace(string(compact), `"denoise":0.50`, `"denoise":1`, 1), marshalled(t, w), "nothing else moves")
}

func TestSetNamesANode(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ node, input, id, err string }{
		{"3", "seed", "3", ""}, // its id, though another node has that title
		{"Sampler", "seed", "3", ""},
		{"KSampler", "seed", "3", ""},
		{"VAEDecode", "samples", "8", ""},
		{"SaveImage", "ckpt_name", "4", ""}, // its title, though another node has that class
		{"Save", "filename_prefix", "9", ""},
		{"Prompt", "text", "", `2 nodes have the title "Prompt"; name one by its id: "5" (CLIPTextEncode, "Prompt"), "6" (CLIPTextEncode, "Prompt")`},
		{"CLIPTextEncode", "text", "", `2 nodes have the class "CLIPTextEncode"; name one by its id: "5" (CLIPTextEncode, "Prompt"), "6" (CLIPTextEncode, "Prompt")`},
		{"ksampler", "seed", "", `no node has the id, title or class "ksampler"; there are "9" (SaveImage, "Save"), "3" (KSampler, "Sampler"), "8" (VAEDecode, "3"), `},
		{"", "seed", "", `no node has the id, title or class ""`}, // 57:8 has no title
		{"3", "sead", "", `node "3" (KSampler) has no input "sead"; it has seed, denoise, model`},
		{"57:8", "width", "", `node "57:8" (EmptyLatentImage) has no inputs`},
	} {
		t.Run(test.node+"."+test.input, func(t *testing.T) {
			t.Parallel()
			w := parsed(t, sampleGraph)
			before := marshalled(t, w)
			err := w.Set(test.node, test.input, "new")
			_, getErr := w.Get(test.node, test.input)
			hasErr := w.hasInput(test.node, test.input)
			if test.err != "" {
				require.ErrorContains(t, err, test.err)
				require.ErrorContains(t, getErr, test.err)
				require.ErrorContains(t, hasErr, test.err)
				assert.ErrorContains(t, err, "comfyui: set "+test.node+"."+test.input+": ")
				assert.Equal(t, CategoryValidation, CategoryOf(err))
				assert.Equal(t, before, marshalled(t, w), "an error changes nothing")
				return
			}
			require.NoError(t, errors.Join(err, getErr, hasErr))
			for n := range w.Nodes() {
				assert.Equal(t, n.ID == test.id, n.Inputs[test.input] == "new", n.ID)
			}
		})
	}
}

// A title that two nodes have names none of them, and so is no title for Set: a class of that name is.
func TestSetByClassWhereTitlesAreEqual(t *testing.T) {
	t.Parallel()
	w := parsed(t, `{"1":{"class_type":"A","inputs":{"x":1},"_meta":{"title":"K"}},"2":{"class_type":"B","inputs":{"x":2},"_meta":{"title":"K"}},"3":{"class_type":"K","inputs":{"x":3}}}`)
	require.NoError(t, w.Set("K", "x", 4))
	for id, want := range map[string]int64{"1": 1, "2": 2, "3": 4} {
		x, err := w.Get(id, "x")
		require.NoError(t, err)
		assert.Equal(t, want, x, id)
	}
}

func TestSetListsFewNodes(t *testing.T) {
	t.Parallel()
	var graph []string
	for i := range 1000 {
		graph = append(graph, fmt.Sprintf(`"%d":{"class_type":"A"}`, i))
	}
	err := parsed(t, "{"+strings.Join(graph, ",")+"}").Set("x", "y", 1)
	require.ErrorContains(t, err, "and 988 more")
	assert.Less(t, len(err.Error()), 500)
}

func TestSetValues(t *testing.T) {
	t.Parallel()
	type custom struct {
		A int `json:"a"`
	}
	huge, _ := new(big.Int).SetString("123456789012345678901234567890", 10)
	file := &FileRef{Filename: "b.png", Subfolder: "a", Type: "temp"}
	for _, test := range []struct {
		value any
		raw   string
		got   any
	}{
		{"a <b> & \"c\"\n", `"a <b> & \"c\"\u000a"`, "a <b> & \"c\"\n"},
		{42, "42", int64(42)},
		{uint64(math.MaxUint64), "18446744073709551615", uint64(math.MaxUint64)},
		{int64(math.MinInt64), "-9223372036854775808", int64(math.MinInt64)},
		{huge, "123456789012345678901234567890", json.Number("123456789012345678901234567890")},
		{json.Number("1e999"), "1e999", json.Number("1e999")},
		{json.Number("0.10"), "0.10", 0.1},
		{0.25, "0.25", 0.25},
		{3.0, "3", int64(3)},
		{true, "true", true},
		{nil, "null", nil},
		{(*int)(nil), "null", nil},
		{FileRef{Filename: "x.png", Type: "input"}, `"x.png"`, "x.png"},
		{file, `"a/b.png [temp]"`, "a/b.png [temp]"},
		{Output{File: file}, `"a/b.png [temp]"`, "a/b.png [temp]"},
		{Link{Node: "4", Slot: 2}, `["4",2]`, Link{"4", 2}},
		{&Link{Node: "57:8"}, `["57:8",0]`, Link{"57:8", 0}},
		{[]any{"4", 1}, `["4",1]`, Link{"4", 1}},
		{[]any{"4", 1.5}, `{"__value__":["4",1.5]}`, []any{"4", 1.5}},
		{[]int{1, 2}, `{"__value__":[1,2]}`, []any{int64(1), int64(2)}},
		{[]string{}, `{"__value__":[]}`, []any{}},
		{map[string]any{"__value__": []int{1}}, `{"__value__":[1]}`, []any{int64(1)}},
		{map[string]any{"__type__": "CURVE", "__value__": []int{1}}, `{"__type__":"CURVE","__value__":[1]}`, map[string]any{"__type__": "CURVE", "__value__": []any{int64(1)}}},
		{custom{7}, `{"a":7}`, map[string]any{"a": int64(7)}},
		{json.RawMessage(` {"b" : 1.0 , "a":2} `), `{"b":1.0,"a":2}`, map[string]any{"b": 1.0, "a": int64(2)}},
	} {
		t.Run(fmt.Sprintf("%T %v", test.value, test.value), func(t *testing.T) {
			t.Parallel()
			w := parsed(t, sampleGraph)
			require.NoError(t, w.Set("3", "model", test.value), "a link can be replaced")
			got, err := w.Get("3", "model")
			require.NoError(t, err)
			assert.Equal(t, test.got, got)
			data, err := w.MarshalJSON()
			require.NoError(t, err)
			assert.Contains(t, string(data), `"denoise":0.50,"model":`+test.raw+`}`)
		})
	}
}

func TestSetRefusesValues(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		value any
		want  string
	}{
		{math.NaN(), "the value is or holds NaN, which JSON cannot express"},
		{float32(math.Inf(-1)), "-Inf"},
		{map[string]any{"a": []any{math.Inf(1)}}, "+Inf"},
		{func() {}, "a func() cannot be a value"},
		{make(chan int), "a chan int cannot be a value"},
		{json.RawMessage("{"), "json.RawMessage cannot be a value"},
		{json.Number("x"), "json.Number cannot be a value"},
		{"\xff", "not valid UTF-8"},
		{FileRef{}, "names no file"},
		{(*FileRef)(nil), "names no file"},
		{Output{Text: "x"}, "names no file"},
		{(*Link)(nil), "the *Link is nil"},
		{Link{Node: "99"}, `the link leads to a node "99" that is not there; there are "9" (SaveImage`},
		{[]any{"99", 0}, `a node "99" that is not there`},
		{Link{Node: "4", Slot: -1}, "output -1"},
		{deep(rawjson.MaxDepth), "nested deeper"},
	} {
		w := parsed(t, sampleGraph)
		err := w.Set("3", "seed", test.value)
		require.ErrorContains(t, err, test.want)
		assert.ErrorContains(t, err, "set 3.seed")
		seed, err := w.Get("3", "seed")
		require.NoError(t, err)
		assert.Equal(t, uint64(math.MaxUint64), seed)
	}
}

func deep(n int) any {
	var v any
	for range n + 1 {
		v = map[string]any{"a": v}
	}
	return v
}

func TestCloneIsIndependent(t *testing.T) {
	t.Parallel()
	w := parsed(t, sampleGraph)
	before := w.hash()
	c := w.Clone()
	require.NoError(t, c.Set("5", "text", "changed"))
	assert.Equal(t, before, w.hash())
	require.NoError(t, w.Set("6", "text", "changed too"))
	text, err := c.Get("6", "text")
	require.NoError(t, err)
	assert.Equal(t, "a dog", text)
	assert.Same(t, w.graphInfo(), c.graphInfo())
}

func TestNodesAreCopies(t *testing.T) {
	t.Parallel()
	w := parsed(t, sampleGraph)
	var ids []string
	for n := range w.Nodes() {
		ids = append(ids, n.ID)
		n.Inputs["text"] = "changed"
		require.NoError(t, w.Set("5", "text", "set in the loop"))
	}
	assert.Equal(t, []string{"9", "3", "8", "5", "6", "4", "57:8"}, ids)
	text, err := w.Get("6", "text")
	require.NoError(t, err)
	assert.Equal(t, "a dog", text)
	for n := range w.Nodes() {
		if n.ID == "3" {
			assert.Equal(t, Node{"3", "KSampler", "Sampler", map[string]any{"seed": uint64(math.MaxUint64), "denoise": 0.5, "model": Link{"4", 0}}}, n)
		}
		break // and the range can be left
	}
}

func TestEmptyWorkflow(t *testing.T) {
	t.Parallel()
	for name, w := range map[string]*Workflow{"nil": nil, "zero": {}, "cloned zero": (&Workflow{}).Clone()} {
		require.ErrorContains(t, w.Set("1", "x", 1), "the workflow is empty; load one with LoadWorkflow", name)
		_, err := w.Get("1", "x")
		require.ErrorContains(t, err, "the workflow is empty", name)
		for range w.Nodes() {
			t.Error("a node")
		}
		var invalid *ValidationError
		require.ErrorAs(t, w.check(), &invalid, name)
		assert.Contains(t, invalid.Error(), "LoadWorkflow")
		assert.NotEmpty(t, w.hash())
		assert.Equal(t, 0, len(w.graphInfo().nodes))
		data, err := w.MarshalJSON()
		require.NoError(t, err)
		assert.Equal(t, map[bool]string{true: "null", false: "{}"}[w == nil], string(data))
	}
	assert.Nil(t, (*Workflow)(nil).Clone())
	require.Error(t, (*Workflow)(nil).UnmarshalJSON([]byte(sampleGraph)))
}

func TestUnmarshalWorkflow(t *testing.T) {
	t.Parallel()
	var in struct{ W, X, Y *Workflow }
	require.NoError(t, json.Unmarshal([]byte(`{"W":`+sampleGraph+`,"X":null,"Y":{}}`), &in))
	assert.Equal(t, parsed(t, sampleGraph).hash(), in.W.hash())
	assert.Nil(t, in.X)
	assert.Equal(t, "{}", marshalled(t, in.Y))
	require.NoError(t, in.W.UnmarshalJSON([]byte("null")))
	assert.Equal(t, 7, len(in.W.graphInfo().nodes), "null leaves it alone")
	require.ErrorContains(t, in.W.UnmarshalJSON([]byte(`[1]`)), "this is a list")
	assert.Equal(t, 7, len(in.W.graphInfo().nodes), "an error leaves it alone")
	for _, empty := range []string{"{}", " {\n} "} {
		w := parsed(t, sampleGraph)
		require.NoError(t, w.UnmarshalJSON([]byte(empty)))
		assert.Equal(t, 0, len(w.graphInfo().nodes))
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	require.NoError(t, parsed(t, sampleGraph).check())
	require.NoError(t, parsed(t, `{"1":{"class_type":"A"}}`).check(), "no inputs: that is for the server to judge")
	w := parsed(t, `{"1":{"class_type":"A"},"2":null,"3":"x","4":[1],"5":{"inputs":{}},"6":{"class_type":1},"7":{"class_type":"B","inputs":[]},"8":5,"version":true}`)
	var invalid *ValidationError
	require.ErrorAs(t, w.check(), &invalid)
	got := map[string]string{}
	for id, n := range invalid.Nodes {
		got[id] = n.Errors[0].Message
	}
	assert.Equal(t, map[string]string{
		"2": "it is null", "3": "it is a text", "4": "it is a list", "5": "it has no class_type", "6": "it has no class_type",
		"7": "it has inputs that are a list", "8": "it is a number", "version": "it is a boolean",
	}, got)
	assert.Contains(t, invalid.Error(), "a node is an object with a class_type")
	assert.Equal(t, CategoryValidation, CategoryOf(invalid))
}

// S10: a UI-format graph passed by mistake gives a clear error before any request.
func TestS10UIFormatIsRefusedBeforeAnyRequest(t *testing.T) {
	t.Parallel()
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) { t.Error("a request:", r.Method, r.URL) })

	w := parsed(t, `{"nodes":[{"id":1,"type":"SaveImage"}],"links":[],"version":0.4}`)
	for range w.Nodes() {
		t.Error("a node")
	}
	require.ErrorContains(t, w.Set("1", "x", 1), "Export (API)")
	require.ErrorContains(t, w.check(), "UI format")

	converted, err := c.Convert(t.Context(), w)
	assert.Nil(t, converted)
	var e *Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, CategoryValidation, e.Category)
	assert.Equal(t, "convert", e.Op)
	for _, word := range []string{"UI format", "Export (API)", "Save (API Format)"} {
		assert.ErrorContains(t, err, word)
	}

	api := parsed(t, sampleGraph)
	same, err := c.Convert(t.Context(), api)
	require.NoError(t, err)
	assert.Same(t, api, same)

	_, err = c.Convert(t.Context(), nil)
	require.ErrorAs(t, err, &e)
	assert.Equal(t, CategoryValidation, e.Category)
	_, err = (*PodClient)(nil).Convert(t.Context(), api)
	require.ErrorIs(t, err, ErrClosed)
	_, err = new(PodClient).Convert(t.Context(), api)
	require.ErrorIs(t, err, ErrClosed)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = c.Convert(ctx, api)
	require.ErrorIs(t, err, context.Canceled)
}

func TestGraphInfo(t *testing.T) {
	t.Parallel()
	g := parsed(t, sampleGraph).graphInfo()
	assert.Equal(t, 7, len(g.nodes))
	class, title, ok := g.node("3")
	assert.Equal(t, []any{"KSampler", "Sampler", true}, []any{class, title, ok})
	class, title, ok = g.node("57:8")
	assert.Equal(t, []any{"EmptyLatentImage", "", true}, []any{class, title, ok})
	for _, id := range []string{"", "57", "57:8.0", "99"} {
		_, _, ok = g.node(id)
		assert.False(t, ok, id)
	}
}

// Whatever was set comes back, nothing else changes, and equal graphs have equal hashes however they are written.
func TestWorkflowProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		graph := rapid.MapOfN(rapid.StringN(1, 8, -1), rapid.MapOfN(rapid.String(), digits(), 0, 4), 1, 5).Draw(t, "graph")
		order := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "order"), 0))
		w := parsed(t, render(graph, order))
		again := parsed(t, render(graph, order))
		require.Equal(t, w.hash(), again.hash())
		require.Equal(t, string(w.canonical()), string(canonicalOf(t, marshalled(t, w))))

		roundTrip := new(Workflow)
		require.NoError(t, json.Unmarshal([]byte(marshalled(t, w)), roundTrip))
		require.Equal(t, w.hash(), roundTrip.hash())

		for id, inputs := range graph {
			for input, number := range inputs {
				before, clone := w.hash(), w.Clone()
				got, err := w.Get(id, input)
				require.NoError(t, err)
				require.Equal(t, number, fmt.Sprint(got), "every digit")
				require.NoError(t, w.Set(id, input, got))
				require.Equal(t, before, w.hash(), "what is there, set again")
				require.NoError(t, w.Set(id, input, "x"))
				require.NotEqual(t, before, w.hash())
				require.Equal(t, before, clone.hash())
				require.NoError(t, w.Set(id, input, json.Number(number)))
				require.Equal(t, before, w.hash())
			}
		}
	})
}

// digits are integers of any length.
func digits() *rapid.Generator[string] { return rapid.StringMatching(`-?[1-9][0-9]{0,40}`) }

func render(graph map[string]map[string]string, order *rand.Rand) string {
	var nodes []string
	for id, inputs := range graph {
		var fields []string
		for name, number := range inputs {
			fields = append(fields, quoted(name)+" : "+number)
		}
		order.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
		node := []string{`"class_type": "` + "A" + `"`, `"inputs": {` + strings.Join(fields, ", ") + "}"}
		if order.IntN(2) == 0 {
			slices.Reverse(node)
		}
		nodes = append(nodes, quoted(id)+": {"+strings.Join(node, ",\n")+"}")
	}
	order.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
	return "{" + strings.Join(nodes, ",") + "}"
}

func quoted(s string) string {
	data, _ := json.Marshal(s)
	return string(data)
}

func canonicalOf(t require.TestingT, text string) []byte {
	raw, err := rawjson.Compact([]byte(text))
	require.NoError(t, err)
	return rawjson.AppendCanonical(nil, raw)
}

func FuzzParseWorkflow(f *testing.F) {
	f.Add([]byte(sampleGraph))
	f.Add([]byte(`{"nodes":[],"links":[]}`))
	f.Add([]byte(`{"prompt":{"1":{"class_type":"A","is_changed":[NaN]}},"client_id":"x"}`))
	f.Add([]byte(`{"1":null,"1":{"class_type":"\u0041","inputs":{"a":["1",0],"b":{"__value__":[1]}}}}`))
	f.Add([]byte("\ufeff{}"))
	f.Add(pngOf(textChunk("prompt", `{"1":{"class_type":"A"}}`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		w, err := ParseWorkflow(data)
		if err != nil {
			if w != nil {
				t.Fatal("a workflow beside an error")
			}
			return
		}
		text, err := w.MarshalJSON()
		if err != nil || !json.Valid(text) {
			t.Fatalf("%q: %v", text, err)
		}
		again, err := ParseWorkflow(text)
		if err != nil || again.hash() != w.hash() {
			t.Fatalf("%q does not come back: %v", text, err)
		}
		_ = w.check()
		for n := range w.Nodes() {
			for input, value := range n.Inputs {
				if _, err := w.Get(n.ID, input); err != nil {
					t.Fatal(err)
				}
				if link, isLink := value.(Link); isLink {
					if _, _, ok := w.graphInfo().node(link.Node); !ok {
						continue
					}
				}
				if err := w.Set(n.ID, input, value); err != nil && !strings.Contains(err.Error(), "link leads") {
					t.Fatalf("%s.%s: %v", n.ID, input, err)
				}
			}
		}
	})
}

func pngOf(chunks string) []byte { return []byte("\x89PNG\r\n\x1a\n" + chunks + pngChunk("IEND", "")) }

func textChunk(name, text string) string { return pngChunk("tEXt", name+"\x00"+text) }

func pngChunk(kind, data string) string {
	out := binary.BigEndian.AppendUint32(nil, uint32(len(data)))
	out = append(out, kind+data...)
	return string(binary.BigEndian.AppendUint32(out, crc32.ChecksumIEEE(out[4:])))
}

// A job takes a snapshot and a hash of its workflow, and a recovered one parses it.
func BenchmarkWorkflow(b *testing.B) {
	data, err := os.ReadFile("internal/media/testdata/subgraph.png")
	require.NoError(b, err)
	w := parsed(b, string(data))
	text, err := w.MarshalJSON()
	require.NoError(b, err)
	b.Run("hash", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(text)))
		for b.Loop() {
			w.Clone().hash()
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(text)))
		for b.Loop() {
			if err := new(Workflow).UnmarshalJSON(text); err != nil {
				b.Fatal(err)
			}
		}
	})
}
