package wire

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// A form says what a document should look like; the writer keeps to it now and then.
type (
	objectForm map[string]any // by key
	mapForm    struct{ of any }
	listForm   struct{ of any }
	tupleForm  []any
	scalarForm []string // JSON texts to choose from
)

var (
	idForm     = scalarForm{`"1"`, `"57.0.0.1"`, `"57:8"`, `"3e6a5a3d-0469-45e3-bc84-0f5ecfa72c41"`, `""`, `7`, `true`, `null`, `"\u0031"`, `"\ud83d\ude00\ud800"`}
	textForm   = scalarForm{`"running"`, `"ExecutionBlocked"`, `"CUDA error: \"x\"\n"`, `"NaN, Infinity"`, "\"\xff\xc3 \xc3\xbc\"", `"\b\f\/\\"`, `null`}
	numberForm = scalarForm{
		`0`, `-0`, `1`, `7.0`, `0.1`, `-2.5e-3`, `1795489290218`, `123456789012345`, `1234567890123456789`, `9223372036854775808`, `1e308`, `1e999`,
		`-1e999`, `5e-324`, `NaN`, `Infinity`, `-Infinity`, `0.30000000000000004`, `null`, `"3"`,
	}
	anyForm = scalarForm{
		`[]`, `{}`, `[[], {"a": {"b": [NaN]}}]`, `true`, `false`, `null`, `"text"`, `12`, `-Infinity`,
		`{"filename": "a.png", "subfolder": "", "type": "output"}`, `{"filename": 3}`, `{"filename": ""}`,
	}
	brokenForm = scalarForm{`01`, `+1`, `.5`, `1.`, `1e`, `-`, `nul`, `tru`, `Nan`, `-NaN`, `infinity`, `"\x"`, `"\u12g4"`, "\"\n\"", `'a'`, `"`, `[`, `{`, `[1,]`, `{"a"}`, `{"a":}`, `{,}`, ``}

	failureForm = objectForm{
		"prompt_id": idForm, "node_id": idForm, "node_type": textForm, "exception_type": textForm, "exception_message": textForm,
		"traceback": listForm{textForm}, "executed": listForm{idForm}, "current_inputs": anyForm, "timestamp": numberForm,
	}
	stateForm = objectForm{
		"value": numberForm, "max": numberForm, "state": textForm, "node_id": idForm, "prompt_id": idForm,
		"display_node_id": idForm, "parent_node_id": idForm, "real_node_id": idForm,
	}
	dataForms = map[Type]any{
		Other: anyForm, FeatureFlags: objectForm{"supports_preview_metadata": anyForm, "prompt_id": idForm},
		Status:         objectForm{"status": objectForm{"exec_info": objectForm{"queue_remaining": numberForm}}, "sid": idForm},
		ExecutionStart: objectForm{"prompt_id": idForm, "timestamp": numberForm}, ExecutionSuccess: objectForm{"prompt_id": idForm, "timestamp": numberForm},
		ExecutionCached: objectForm{"prompt_id": idForm, "timestamp": numberForm, "nodes": listForm{idForm}},
		Executing:       objectForm{"prompt_id": idForm, "node": idForm, "display_node": idForm},
		Progress:        objectForm{"prompt_id": idForm, "node": idForm, "value": numberForm, "max": numberForm},
		ProgressState:   objectForm{"prompt_id": idForm, "nodes": mapForm{stateForm}},
		Executed:        objectForm{"prompt_id": idForm, "node": idForm, "display_node": idForm, "output": outputForm},
		ExecutionError:  failureForm, ExecutionInterrupted: failureForm,
	}
	outputForm = mapForm{listForm{anyForm}}
	itemForm   = tupleForm{
		numberForm, idForm,
		mapForm{objectForm{"class_type": textForm, "inputs": anyForm}},
		objectForm{"client_id": idForm, "comfyui_go": objectForm{"job_id": idForm, "attempt": numberForm, "nonce": idForm}, "x": anyForm},
		listForm{idForm},
		anyForm,
	}
	statusForm = objectForm{
		"status_str": textForm, "completed": anyForm,
		"messages": listForm{tupleForm{scalarForm{`"execution_start"`, `"execution_error"`, `"execution_interrupted"`, `"x"`}, failureForm}},
	}
	nodeErrorForm = objectForm{"type": textForm, "message": textForm, "details": textForm, "extra_info": objectForm{"input_name": idForm, "x": anyForm}}
	nodesForm     = mapForm{objectForm{"class_type": textForm, "dependent_outputs": listForm{idForm}, "errors": listForm{nodeErrorForm}}}

	queueForm   = objectForm{"queue_running": listForm{itemForm}, "queue_pending": listForm{itemForm}, "x": anyForm}
	historyForm = mapForm{objectForm{"prompt": itemForm, "outputs": mapForm{outputForm}, "status": statusForm, "meta": anyForm}}
	repliesForm = objectForm{
		"prompt_id": idForm, "number": numberForm, "node_errors": nodesForm, "error": nodeErrorForm,
		"id": idForm, "status": textForm, "priority": numberForm, "create_time": numberForm, "outputs_count": numberForm, "workflow_id": idForm,
		"execution_start_time": numberForm, "execution_end_time": numberForm, "outputs": mapForm{outputForm}, "execution_error": failureForm,
		"execution_status": statusForm, "workflow": objectForm{"prompt": anyForm, "extra_data": itemForm[3]},
		"system": objectForm{
			"comfyui_version": textForm, "os": textForm, "python_version": textForm, "pytorch_version": textForm,
			"argv": listForm{textForm}, "ram_total": numberForm, "ram_free": numberForm,
		},
		"devices": listForm{objectForm{
			"name": textForm, "type": textForm, "index": numberForm, "vram_total": numberForm, "vram_free": numberForm,
			"torch_vram_total": numberForm, "torch_vram_free": numberForm,
		}},
	}
)

func frameForm(t *rapid.T) any {
	typ := rapid.IntRange(int(Other), int(ExecutionInterrupted)).Draw(t, "type")
	return objectForm{"type": scalarForm{fmt.Sprintf("%q", Type(typ))}, "data": dataForms[Type(typ)], "x": anyForm}
}

// writer writes documents: keys in any order, some missing, some twice, some strange, values of the wrong type, space anywhere.
type writer struct {
	t      *rapid.T
	b      strings.Builder
	broken bool // may write what is no JSON
}

// chance is true in one of n cases, and false when the case shrinks.
func (w *writer) chance(n int) bool {
	return rapid.IntRange(0, n-1).Draw(w.t, "chance") == n-1
}

func (w *writer) space() {
	w.b.WriteString(rapid.SampledFrom([]string{"", " ", " ", "", "\n\t\r "}).Draw(w.t, "space"))
}

func (w *writer) value(form any) {
	w.space()
	switch {
	case w.broken && w.chance(50):
		form = brokenForm
	case w.chance(12):
		form = anyForm
	}
	switch form := form.(type) {
	case objectForm:
		w.object(form)
	case mapForm:
		w.mapOf(form.of)
	case listForm:
		w.list(slices.Repeat([]any{form.of}, rapid.IntRange(0, 3).Draw(w.t, "length")))
	case tupleForm:
		w.list(form[:len(form)-rapid.SampledFrom([]int{0, 0, 0, 1, 2}).Draw(w.t, "cut")])
	case scalarForm:
		w.b.WriteString(rapid.SampledFrom(form).Draw(w.t, "scalar"))
	}
	w.space()
}

func (w *writer) object(form objectForm) {
	keys := make([]string, 0, len(form))
	for key := range form {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	keys = rapid.Permutation(keys).Draw(w.t, "order")
	for range 2 {
		if w.chance(4) {
			keys = append(keys, rapid.SampledFrom(keys).Draw(w.t, "again"))
		}
		if w.chance(6) {
			keys = keys[1:]
		}
		if len(keys) == 0 {
			break
		}
	}
	w.pairs(keys, func(key string) any { return form[key] })
}

func (w *writer) mapOf(form any) {
	keys := rapid.SliceOfN(rapid.SampledFrom([]string{"1", "57.0.0.1", "images", "animated", "ü", "", "a\"b"}), 0, 4).Draw(w.t, "keys")
	w.pairs(keys, func(string) any { return form })
}

func (w *writer) pairs(keys []string, form func(string) any) {
	w.b.WriteByte('{')
	for i, key := range keys {
		if i > 0 {
			w.b.WriteByte(',')
		}
		w.space()
		w.key(key)
		w.space()
		w.b.WriteByte(':')
		w.value(form(key))
	}
	w.space()
	w.b.WriteByte('}')
}

// key writes a letter of the key as an escape now and then.
func (w *writer) key(key string) {
	if len(key) > 0 && w.chance(10) {
		fmt.Fprintf(&w.b, `"\u%04x%s"`, key[0], strings.ReplaceAll(key[1:], `"`, `\"`))
		return
	}
	fmt.Fprintf(&w.b, `"%s"`, strings.ReplaceAll(key, `"`, `\"`))
}

func (w *writer) list(forms []any) {
	w.b.WriteByte('[')
	for i, form := range forms {
		if i > 0 {
			w.b.WriteByte(',')
		}
		w.value(form)
	}
	w.space()
	w.b.WriteByte(']')
}

// documents are of the form, and damaged in some cases.
func documents(form func(*rapid.T) any) *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		w := &writer{t: t, broken: rapid.Bool().Draw(t, "broken")}
		w.value(form(t))
		b := []byte(w.b.String())
		switch {
		case !w.broken || len(b) == 0:
		case w.chance(4):
			b = b[:rapid.IntRange(0, len(b)-1).Draw(t, "truncated")]
		case w.chance(4):
			b[rapid.IntRange(0, len(b)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
		case w.chance(4):
			b = append(b, rapid.SampledFrom([]string{"}", "x", "{}", ",", "\x00", "null"}).Draw(t, "more")...)
		}
		return string(b)
	})
}

func TestDecodersAgreeWithEncodingJSON(t *testing.T) {
	t.Parallel()
	always := func(form any) func(*rapid.T) any { return func(*rapid.T) any { return form } }
	d := NewDecoder() // one for all frames: what one leaves behind must not show in the next
	for _, c := range []struct {
		name  string
		form  func(*rapid.T) any
		check func(testing.TB, []byte)
	}{
		{"Text", frameForm, func(t testing.TB, b []byte) { checkText(t, d, b) }},
		{"Queue", always(queueForm), checkQueue},
		{"History", always(historyForm), checkHistory},
		{"Outputs", always(outputForm), checkOutputs},
		{"Replies", always(repliesForm), checkReplies},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			generator := documents(c.form)
			rapid.Check(t, func(rt *rapid.T) {
				b := []byte(generator.Draw(rt, "document"))
				c.check(failer{t, rt}, b)
				checkSanitize(failer{t, rt}, b)
			})
		})
	}
}

// failer reports to rapid, which shrinks, where a testing.TB is asked for.
type failer struct {
	testing.TB
	rt *rapid.T
}

func (f failer) Helper()                        {}
func (f failer) Errorf(format string, a ...any) { f.rt.Errorf(format, a...) }
func (f failer) FailNow()                       { f.rt.FailNow() }
