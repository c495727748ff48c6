package comfyuitest

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// differ holds what the pod says against what a recorded server said. What a server makes up in each run (ids, names of temp
// files, times) may differ, but the same one in the recording must be the same one here throughout; what is random in the
// real server (Python's sets) may come in any order; all else must be equal, the order of keys and 1 or 1.0 included.
type differ struct {
	renames *renames
	foreign func(promptID string) bool // tells prompts of other recordings, which the same server process remembered
	sets    bool                       // outputs of the history come from a set too, as before 0.3.68
	found   []string
}

func newDiffer() *differ { return &differ{renames: newRenames()} }

func (d *differ) fail(path, format string, args ...any) {
	d.found = append(d.found, path+": "+fmt.Sprintf(format, args...))
}

// differ without a memory, to try out whether two values match.
func (d *differ) matches(path string, got, want any) bool {
	trial := &differ{renames: d.renames, foreign: d.foreign, sets: d.sets}
	trial.compare(path, got, want)
	return len(trial.found) == 0
}

var (
	// momentKeys are times in milliseconds.
	momentKeys = []string{"timestamp", "create_time", "execution_start_time", "execution_end_time"}
	// setKeys are lists that the server makes of a Python set.
	setKeys = []string{"executed", "current_outputs", "errors"}
	// measuredKeys are facts of the machine.
	measuredKeys = []string{
		"ram_total", "ram_free", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free", "python_version", "pytorch_version",
		"argv", "required_frontend_version", "installed_templates_version", "required_templates_version", "comfy_package_versions",
		"deploy_environment", "os",
	}
)

func (d *differ) compare(path string, got, want any) {
	key := path[strings.LastIndexByte(path, '.')+1:]
	switch {
	case slices.Contains(momentKeys, key):
		d.compareMoment(path, got, want)
	case key == "traceback":
		d.compareTraceback(path, got, want)
	case key == "dependent_outputs":
		d.compareDependents(path, got, want)
	case slices.Contains(setKeys, key):
		d.compareSet(path, got, want)
	case slices.Contains(measuredKeys, key):
		if typeName(got) != typeName(want) {
			d.fail(path, "got %s, want %s", typeName(got), typeName(want))
		}
	case key == "details":
		d.compareLines(path, got, want)
	case key == "t" || key == "m":
		d.compareLog(path, got, want)
	default:
		d.compareValue(path, got, want)
	}
}

func (d *differ) compareValue(path string, got, want any) {
	switch want := want.(type) {
	case object:
		if got, ok := got.(object); ok {
			d.compareObject(path, got, want)
			return
		}
	case []any:
		if got, ok := got.([]any); ok {
			d.compareList(path, got, want)
			return
		}
	case string:
		if got, ok := got.(string); ok && d.renames.same(got, want) {
			return
		}
	default:
		if typeName(got) == typeName(want) && string(pyJSON(got)) == string(pyJSON(want)) {
			return
		}
	}
	d.fail(path, "got %s, want %s", short(pyJSON(got)), short(pyJSON(want)))
}

func short(text []byte) string {
	if len(text) > 400 {
		return string(text[:400]) + "…"
	}
	return string(text)
}

func (d *differ) compareObject(path string, got, want object) {
	// Go maps have no order, and the graph of an expansion comes as one.
	unordered := strings.HasSuffix(path, "node_errors") || strings.HasSuffix(path, "current_inputs") ||
		d.sets && (strings.HasSuffix(path, ".outputs") || strings.HasSuffix(path, ".meta"))
	var order []string
	if d.hasForeignJobs(want) {
		want = want.without("pagination")
		got = got.without("pagination")
	}
	for _, f := range want {
		if d.isForeign(f.key) && isHistoryEntry(f.value) {
			continue
		}
		value, ok := got.get(f.key)
		if !ok {
			value, ok = got.get(d.renames.actual(f.key))
		}
		if !ok {
			d.fail(path, "lacks %q: %s", f.key, short(pyJSON(f.value)))
			continue
		}
		order = append(order, d.renames.actual(f.key))
		d.compare(path+"."+f.key, value, f.value)
	}
	var given []string
	for _, f := range got {
		given = append(given, f.key)
		if !slices.Contains(order, f.key) {
			d.fail(path, "has %q too: %s", f.key, short(pyJSON(f.value)))
		}
	}
	if len(given) == len(order) && !unordered && !slices.Equal(given, order) {
		d.fail(path, "has keys %q, want %q", given, order)
	}
}

func (d *differ) isForeign(promptID string) bool { return d.foreign != nil && d.foreign(promptID) }

func isHistoryEntry(v any) bool {
	entry, _ := v.(object)
	_, is := entry.get("prompt")
	return is
}

// hasForeignJobs tells a page of /api/jobs that counts jobs of other recordings.
func (d *differ) hasForeignJobs(page object) bool {
	pagination, _ := page.get("pagination")
	counts, _ := pagination.(object)
	total, _ := counts.get("total")
	jobs, _ := page.get("jobs")
	list, _ := jobs.([]any)
	n, _ := total.(int64)
	return d.foreign != nil && (n > int64(len(list)) || slices.ContainsFunc(list, d.isForeignJob))
}

func (d *differ) isForeignJob(v any) bool {
	job, _ := v.(object)
	id, _ := job.get("id")
	text, isText := id.(string)
	return isText && d.isForeign(text)
}

func (d *differ) compareList(path string, got, want []any) {
	want = slices.DeleteFunc(slices.Clone(want), d.isForeignJob)
	if len(got) != len(want) {
		d.fail(path, "got %d values, want %d: %s, want %s", len(got), len(want), short(pyJSON(got)), short(pyJSON(want)))
		return
	}
	item := isQueueItem(want)
	for i := range want {
		inner := fmt.Sprintf("%s[%d]", path, i)
		if item && i == 4 {
			d.compareSet(inner, got[i], want[i]) // the outputs to run
			continue
		}
		d.compare(inner, got[i], want[i])
	}
}

// isQueueItem tells an item of /queue or /history: number, id, graph, extra_data, outputs.
func isQueueItem(list []any) bool {
	if len(list) < 5 {
		return false
	}
	_, isText := list[1].(string)
	_, isGraph := list[2].(object)
	_, isList := list[4].([]any)
	return isText && isGraph && isList
}

func (d *differ) compareMoment(path string, got, want any) {
	a, okA := got.(int64)
	b, okB := want.(int64)
	const year2001 = 1_000_000_000_000
	if okA != okB || okA && (a < year2001 || b < year2001) {
		d.fail(path, "got %s, want a time like %s", pyJSON(got), pyJSON(want))
	}
}

// compareTraceback: lines of code belong to a release.
func (d *differ) compareTraceback(path string, got, want any) {
	a, okA := got.([]any)
	b, okB := want.([]any)
	if !okA || !okB || (len(a) == 0) != (len(b) == 0) {
		d.fail(path, "got %s, want %s", short(pyJSON(got)), short(pyJSON(want)))
		return
	}
	for _, line := range a {
		if text, ok := line.(string); !ok || !strings.HasPrefix(text, "  File \"") || !strings.HasSuffix(text, "\n") {
			d.fail(path, "%s is no line of a traceback", pyJSON(line))
		}
	}
}

// compareDependents: which outputs a broken node is listed under depends on the order in which outputs were checked.
func (d *differ) compareDependents(path string, got, want any) {
	a, _ := got.([]any)
	b, _ := want.([]any)
	if len(a) == 0 || len(b) == 0 {
		d.fail(path, "got %s, want %s", pyJSON(got), pyJSON(want))
		return
	}
	fewer, more := a, b
	if len(fewer) > len(more) {
		fewer, more = more, fewer
	}
	for _, id := range fewer {
		if !isOneOf(id, more) {
			d.fail(path, "got %s, want %s", pyJSON(got), pyJSON(want))
		}
	}
}

var digits = regexp.MustCompile(`\d+`)

// compareLog: lines of the log and their times differ in numbers alone.
func (d *differ) compareLog(path string, got, want any) {
	a, okA := got.(string)
	b, okB := want.(string)
	if !okA || !okB || digits.ReplaceAllString(a, "0") != digits.ReplaceAllString(b, "0") {
		d.fail(path, "got %s, want %s", pyJSON(got), pyJSON(want))
	}
}

func (d *differ) compareSet(path string, got, want any) {
	a, okA := got.([]any)
	b, okB := want.([]any)
	if !okA || !okB || len(a) != len(b) {
		d.fail(path, "got %s, want %s", short(pyJSON(got)), short(pyJSON(want)))
		return
	}
	left := slices.Clone(a)
	for _, value := range b {
		at := slices.IndexFunc(left, func(candidate any) bool { return d.matches(path+"[]", candidate, value) })
		if at < 0 {
			d.fail(path, "lacks %s, has %s", short(pyJSON(value)), short(pyJSON(left)))
			continue
		}
		d.compare(path+"[]", left[at], value)
		left = slices.Delete(left, at, at+1)
	}
}

// compareLines: the reasons of several outputs come in random order.
func (d *differ) compareLines(path string, got, want any) {
	a, okA := got.(string)
	b, okB := want.(string)
	if !okA || !okB || !strings.Contains(b, "\n") {
		d.compareValue(path, got, want)
		return
	}
	if slices.Compare(slices.Sorted(strings.SplitSeq(a, "\n")), slices.Sorted(strings.SplitSeq(b, "\n"))) != 0 {
		d.fail(path, "got %q, want %q", a, b)
	}
}

// renames maps what the recorded run made up to what this one made up.
type renames struct {
	mu      sync.Mutex
	forward map[string]string
	back    map[string]string
	offsets map[string]int  // of the numbers of temp files, by recorded prefix
	given   map[string]bool // made up by the client, and sent as it was
}

func newRenames() *renames {
	return &renames{forward: map[string]string{}, back: map[string]string{}, offsets: map[string]int{}, given: map[string]bool{}}
}

var (
	madeUpID = regexp.MustCompile(`^(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32})$`)
	// fileMark is an ETag or the date of a file. Files written in one instant may share them.
	fileMark = regexp.MustCompile(`^(?:"[0-9a-f]+-[0-9a-f]+"|\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT)$`)
	tempName = regexp.MustCompile(`(ComfyUI_temp_[a-z]{5})_(\d{5})_`)
)

// know marks what the client itself made up: it comes back as it was sent.
func (r *renames) know(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.given[text] = true
}

// same tells whether got stands for want, and remembers it.
func (r *renames) same(got, want string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case madeUpID.MatchString(want) && !r.given[want]:
		return madeUpID.MatchString(got) && r.pair(got, want)
	case fileMark.MatchString(want) && fileMark.MatchString(got):
		known, isKnown := r.forward[want]
		r.forward[want] = got
		return !isKnown || known == got
	}
	names, wanted := tempName.FindAllStringSubmatch(got, -1), tempName.FindAllStringSubmatch(want, -1)
	if len(names) != len(wanted) {
		return false
	}
	for i := range names {
		if !r.temp(names[i], wanted[i]) {
			return false
		}
	}
	return tempName.ReplaceAllString(got, "") == tempName.ReplaceAllString(want, "")
}

// temp matches names of temp files. The letters are random, and the numbers go on from prompts before the recording.
func (r *renames) temp(got, want []string) bool {
	a, errA := strconv.Atoi(got[2])
	b, errB := strconv.Atoi(want[2])
	if errA != nil || errB != nil || !r.pair(got[1], want[1]) {
		return false
	}
	offset, known := r.offsets[want[1]]
	r.offsets[want[1]] = b - a
	r.forward[want[0]] = got[0]
	return !known || offset == b-a
}

func (r *renames) pair(got, want string) bool {
	known, isKnown := r.forward[want]
	other, isOther := r.back[got]
	if isKnown || isOther {
		return known == got && other == want
	}
	r.forward[want], r.back[got] = got, want
	return true
}

// actual is text with what the recorded run made up replaced by what this one did.
func (r *renames) actual(text string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if got, ok := r.forward[text]; ok {
		return got
	}
	// Longer ones first: the name of a temp file before its prefix.
	for _, want := range slices.SortedFunc(maps.Keys(r.forward), func(a, b string) int { return len(b) - len(a) }) {
		text = strings.ReplaceAll(text, want, r.forward[want])
	}
	return text
}

// recorded is the made-up text of the recording that text stands for, "" if there is none.
func (r *renames) recorded(text string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.back[text]
}

func TestDiffer(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		got, want string
		same      bool
	}{
		{`{"a": 1, "b": [1.0, null]}`, `{"a": 1, "b": [1.0, null]}`, true},
		{`{"b": [1.0], "a": 1}`, `{"a": 1, "b": [1.0]}`, false},
		{`{"a": 1}`, `{"a": 1.0}`, false},
		{`{"a": 1, "b": 2}`, `{"a": 1}`, false},
		{`{"a": 1}`, `{"a": 1, "b": 2}`, false},
		{`{"timestamp": 1795489296307}`, `{"timestamp": 1795489296306}`, true},
		{`{"timestamp": "x"}`, `{"timestamp": 1795489296306}`, false},
		{`{"executed": ["1", "2"]}`, `{"executed": ["2", "1"]}`, true},
		{`{"executed": ["1", "3"]}`, `{"executed": ["2", "1"]}`, false},
		{
			`["20402823-b7f4-443b-8207-7e336b5d673c", "20402823-b7f4-443b-8207-7e336b5d673c"]`,
			`["6ef650cb-b934-43b1-87e9-0c2a35ef9deb", "6ef650cb-b934-43b1-87e9-0c2a35ef9deb"]`, true,
		},
		{
			`["20402823-b7f4-443b-8207-7e336b5d673c", "30402823-b7f4-443b-8207-7e336b5d673c"]`,
			`["6ef650cb-b934-43b1-87e9-0c2a35ef9deb", "6ef650cb-b934-43b1-87e9-0c2a35ef9deb"]`, false,
		},
		{
			`["20402823-b7f4-443b-8207-7e336b5d673c", "20402823-b7f4-443b-8207-7e336b5d673c"]`,
			`["6ef650cb-b934-43b1-87e9-0c2a35ef9deb", "7ef650cb-b934-43b1-87e9-0c2a35ef9deb"]`, false,
		},
		{`"ComfyUI_temp_abcde_00001_.png"`, `"ComfyUI_temp_fghij_00001_.png"`, true},
		{
			`["ComfyUI_temp_abcde_00001_.png", "ComfyUI_temp_abcde_00002_.png"]`,
			`["ComfyUI_temp_fghij_00003_.png", "ComfyUI_temp_fghij_00004_.png"]`, true,
		},
		{
			`["ComfyUI_temp_abcde_00001_.png", "ComfyUI_temp_abcde_00003_.png"]`,
			`["ComfyUI_temp_fghij_00001_.png", "ComfyUI_temp_fghij_00002_.png"]`, false,
		},
		{`{"traceback": ["  File \"a\", line 1, in b\n"]}`, `{"traceback": ["  File \"x\", line 2, in y\n", "  File \"z\"\n"]}`, true},
		{`{"traceback": []}`, `{"traceback": ["  File \"x\", line 2, in y\n"]}`, false},
		{`{"node_errors": {"1": 1, "2": 2}}`, `{"node_errors": {"2": 2, "1": 1}}`, true},
		{`[1, "p", {}, {}, ["3", "9"]]`, `[1, "p", {}, {}, ["9", "3"]]`, true},
	} {
		d := newDiffer()
		d.compare("", parsed(t, []byte(tc.got)), parsed(t, []byte(tc.want)))
		if (len(d.found) == 0) != tc.same {
			t.Errorf("%s, want %s: %v", tc.got, tc.want, d.found)
		}
	}
}
