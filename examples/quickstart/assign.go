package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/comfypod/comfyui"
)

// assignment is a -set before it is known which nodes there are: titles and names of inputs may hold dots and equals signs, so that only the
// workflow tells where a name ends.
type assignment string

func parseAssignment(s string) (assignment, error) {
	target, _, ok := strings.Cut(s, "=")
	if !ok || strings.Trim(target, ".") == "" || !strings.Contains(s, ".") {
		return "", fmt.Errorf("want NODE.INPUT=VALUE, such as 3.seed=42 or 'KSampler.seed=42'")
	}
	return assignment(s), nil
}

// reading is one way to read an assignment.
type reading struct{ node, input, value string }

// readings are all ways, the likely ones first: the first equals sign ends the name of the input, and the last dot before it that of
// the node.
func (a assignment) readings() []reading {
	s := string(a)
	var all []reading
	for eq := range len(s) {
		if s[eq] != '=' {
			continue
		}
		for dot := eq - 1; dot >= 0; dot-- {
			if s[dot] == '.' && dot > 0 && dot+1 < eq {
				all = append(all, reading{s[:dot], s[dot+1 : eq], s[eq+1:]})
			}
		}
	}
	return all
}

// assign gives the workflow's inputs their values, in the order of the command line.
func assign(w *comfyui.Workflow, assignments []assignment) error {
	for _, a := range assignments {
		if err := a.apply(w); err != nil {
			return fmt.Errorf("-set %s: %w", a, err)
		}
	}
	return nil
}

func (a assignment) apply(w *comfyui.Workflow) error {
	readings := a.readings()
	if len(readings) == 0 {
		return fmt.Errorf("want NODE.INPUT=VALUE, such as 3.seed=42 or 'KSampler.seed=42'")
	}
	best := readings[0]
	if i := slices.IndexFunc(readings, func(r reading) bool { return r.exists(w) }); i >= 0 {
		best = readings[i]
	} else if i := slices.IndexFunc(readings, func(r reading) bool { return r.namesNode(w) }); i >= 0 {
		best = readings[i] // so that the error is about the input
	}
	err := w.Set(best.node, best.input, decode(best.value))
	if cause := errors.Unwrap(err); cause != nil { // without the node and the input, which the -set shows
		return cause
	}
	return err
}

func (r reading) exists(w *comfyui.Workflow) bool {
	_, err := w.Get(r.node, r.input)
	return err == nil
}

func (r reading) namesNode(w *comfyui.Workflow) bool {
	for n := range w.Nodes() {
		if r.node == n.ID || r.node == n.Title || r.node == n.Class {
			return true
		}
	}
	return false
}

// decode takes what is JSON as it is, every digit of a seed included, and anything else as a string.
func decode(value string) any {
	if json.Valid([]byte(value)) {
		return json.RawMessage(value)
	}
	return value
}
