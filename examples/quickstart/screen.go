package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/comfypod/comfyui"
)

// screen shows messages and progress: on a terminal one line that is drawn again and again, elsewhere a line for each node,
// each place in the queue and each tenth of the way.
type screen struct {
	out   io.Writer
	bar   bool
	drawn string // the bar that stands on the current line; "": none

	doing string // what the last plain line said
	tenth int    // the last one that was reached
}

func newScreen(out io.Writer) *screen {
	return &screen{out: out, bar: isTerminal(out), tenth: -1}
}

func isTerminal(out io.Writer) bool {
	file, ok := out.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// In a narrow terminal a bar that wrapped could not be drawn over.
const noWrap, wrap = "\x1b[?7l", "\x1b[?7h"

// ticks is when the bar is to be drawn although nothing was heard.
func (s *screen) ticks() *time.Ticker {
	t := time.NewTicker(250 * time.Millisecond)
	if !s.bar {
		t.Stop()
	}
	return t
}

// say prints a line of its own.
func (s *screen) say(format string, args ...any) {
	s.clear()
	_, _ = fmt.Fprintln(s.out, printable(fmt.Sprintf(format, args...))) // there is nobody to tell that it failed
}

// clear takes the bar away.
func (s *screen) clear() {
	if s.drawn != "" {
		_, _ = io.WriteString(s.out, "\r\x1b[K")
		s.drawn = ""
	}
}

func (s *screen) progress(p comfyui.Progress) {
	if s.bar {
		const width = 79 // that of most terminals, less the last column
		if line := cut(barLine(p), width); line != s.drawn {
			_, _ = io.WriteString(s.out, "\r"+noWrap+line+"\x1b[K"+wrap)
			s.drawn = line
		}
		return
	}
	tenth := int(p.Fraction * 10)
	doing := activity(p)
	if doing == s.doing && tenth <= s.tenth {
		return
	}
	s.doing, s.tenth = doing, max(s.tenth, tenth)
	_, _ = fmt.Fprintln(s.out, plainLine(p))
}

func barLine(p comfyui.Progress) string {
	const cells = 24
	full := int(p.Fraction * cells)
	bar := strings.Repeat("=", full) + strings.Repeat(" ", cells-full)
	return fmt.Sprintf("[%s] %s", bar, plainLine(p))
}

// plainLine is such as " 45%  Julia set (5) 18/40  1.2s, 1.5s left".
func plainLine(p comfyui.Progress) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%3.0f%%  %s", math.Floor(p.Fraction*100), activity(p))
	if p.Steps > 1 && p.Node != "" {
		fmt.Fprintf(&b, " %g/%g", p.Step, p.Steps)
	}
	if p.Elapsed > 0 {
		fmt.Fprintf(&b, "  %s", p.Elapsed.Round(100*time.Millisecond))
	}
	if left := p.Remaining.Round(100 * time.Millisecond); left > 0 && !p.Status.Terminal() {
		fmt.Fprintf(&b, ", %s left", left)
	}
	return b.String()
}

func activity(p comfyui.Progress) string {
	switch {
	case p.Status == comfyui.StatusQueued && p.QueueAhead > 0:
		return fmt.Sprintf("queued, %d ahead", p.QueueAhead)
	case p.Status != comfyui.StatusRunning || p.Node == "":
		return string(p.Status)
	case p.NodeTitle != "":
		return printable(fmt.Sprintf("%s (%s)", p.NodeTitle, p.Node))
	}
	return printable(fmt.Sprintf("%s (%s)", p.NodeClass, p.Node))
}

// printable takes out what could move the cursor: titles and errors come from elsewhere.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

// cut shortens s to so many runes.
func cut(s string, width int) string {
	runes := []rune(s)
	if len(runes) <= width {
		return s
	}
	return string(runes[:width-1]) + "…"
}
