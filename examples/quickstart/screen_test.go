package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/comfypod/comfyui"
)

func TestPlainLine(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		p    comfyui.Progress
		want string
	}{
		{"waiting", comfyui.Progress{Status: comfyui.StatusQueued, QueueAhead: 2}, "  0%  queued, 2 ahead"},
		{"next", comfyui.Progress{Status: comfyui.StatusQueued}, "  0%  queued"},
		{
			"running",
			comfyui.Progress{
				Status: comfyui.StatusRunning, Fraction: 0.459, Node: "3", NodeTitle: "Sampler", NodeClass: "KSampler", Step: 9, Steps: 20,
				Elapsed: 1234 * time.Millisecond, Remaining: 1450 * time.Millisecond,
			},
			" 45%  Sampler (3) 9/20  1.2s, 1.5s left",
		},
		{"without a title", comfyui.Progress{Status: comfyui.StatusRunning, Node: "3", NodeClass: "KSampler"}, "  0%  KSampler (3)"},
		{"a title that moves the cursor", comfyui.Progress{Status: comfyui.StatusRunning, Node: "3", NodeTitle: "a\x1b[2Jb\r"}, "  0%  a [2Jb  (3)"},
		{"almost done", comfyui.Progress{Status: comfyui.StatusRunning, Fraction: 0.999}, " 99%  running"},
		{"done", comfyui.Progress{Status: comfyui.StatusSucceeded, Fraction: 1, Elapsed: time.Second}, "100%  succeeded  1s"},
	} {
		assert.Equal(t, test.want, plainLine(test.p), test.name)
	}
}

func TestBarIsDrawnOverItself(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	s := newScreen(&out)
	s.bar = true
	half := comfyui.Progress{Status: comfyui.StatusRunning, Fraction: 0.5, Node: "3", NodeTitle: strings.Repeat("long ", 40)}
	s.progress(half)
	s.progress(half) // nothing has changed
	s.say("a message\x07")
	s.progress(half)
	s.clear()
	s.clear()

	line := "\r\x1b[?7l" + cut(barLine(half), 79) + "\x1b[K\x1b[?7h" // without a line break, however narrow the terminal is
	assert.Equal(t, line+"\r\x1b[Ka message \n"+line+"\r\x1b[K", out.String())
	assert.Equal(t, 79, len([]rune(cut(barLine(half), 79))))
}

func TestPlainLinesAreFew(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	s := newScreen(&out)
	for i := range 1000 {
		s.progress(comfyui.Progress{Status: comfyui.StatusRunning, Fraction: float64(i) / 1000, Node: "3"})
	}
	assert.Equal(t, 10, strings.Count(out.String(), "\n"))
	s.progress(comfyui.Progress{Status: comfyui.StatusRunning, Fraction: 0.999, Node: "4"})
	assert.Equal(t, 11, strings.Count(out.String(), "\n"), "another node is worth a line")
}
