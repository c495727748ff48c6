// Package safename makes names for files out of names that a pod gave.
//
// A name comes out the same on every system, and is fit for all of them: what Windows forbids or reads as something else (drive
// letters, streams, devices, dots at the end) is replaced on Linux too, where directories are shared and copied as well.
package safename

import (
	"path"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	// maxBytes is the longest component. File systems take 255 bytes; Numbered needs some of them.
	maxBytes = 200
	maxDepth = 16
	maxExt   = 16
)

// Path returns a slash-separated path below some directory for a file in a subfolder. Slashes and backslashes separate, in both
// arguments. The path has no empty, "." or ".." component, is never absolute, and is never empty.
func Path(subfolder, filename string) string {
	folders := components(subfolder)
	names := components(filename)
	if len(names) == 0 {
		names = []string{""}
	}
	all := append(folders, names...)
	if len(all) > maxDepth {
		all = append(all[:maxDepth-1:maxDepth-1], all[len(all)-1])
	}
	for i, c := range all {
		all[i] = component(c)
	}
	return path.Join(all...)
}

// Numbered puts a number in front of the extension: "name (1).png". For n = 0 it is name itself.
func Numbered(name string, n int) string {
	if n == 0 {
		return name
	}
	stem, ext := split(name)
	return stem + " (" + strconv.Itoa(n) + ")" + ext
}

func components(p string) []string {
	return strings.FieldsFunc(p, func(r rune) bool { return r == '/' || r == '\\' })
}

func component(c string) string {
	c = strings.ToValidUTF8(c, "_")
	c = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || strings.ContainsRune(`<>:"|?*`, r) {
			return '_'
		}
		return r
	}, c)
	if strings.Trim(c, ". ") == "" { // "", ".", "..", and what Windows makes of "... "
		return strings.Repeat("_", max(1, min(len(c), maxBytes)))
	}
	c = shorten(strings.TrimRight(c, ". "))
	if isDevice(c) {
		c = shorten("_" + c)
	}
	return c
}

// isDevice: Windows takes these for devices, with any extension and with spaces in front of it.
// https://learn.microsoft.com/windows/win32/fileio/naming-a-file
func isDevice(c string) bool {
	stem, _, _ := strings.Cut(c, ".")
	stem = strings.ToUpper(strings.TrimRight(stem, " "))
	switch stem {
	case "CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$":
		return true
	}
	port, isCOM := strings.CutPrefix(stem, "COM")
	if !isCOM {
		var isLPT bool
		if port, isLPT = strings.CutPrefix(stem, "LPT"); !isLPT {
			return false
		}
	}
	return utf8.RuneCountInString(port) == 1 && strings.Contains("0123456789¹²³", port)
}

// shorten keeps the extension.
func shorten(c string) string {
	if len(c) <= maxBytes {
		return c
	}
	stem, ext := split(c)
	cut := maxBytes - len(ext)
	for !utf8.RuneStart(stem[cut]) {
		cut--
	}
	if stem = strings.TrimRight(stem[:cut], ". "); stem == "" {
		stem = "_"
	}
	return stem + ext
}

// split takes the extension off, if it looks like one.
func split(name string) (stem, ext string) {
	ext = path.Ext(name)
	if len(ext) > maxExt || len(ext) == len(path.Base(name)) {
		return name, ""
	}
	return name[:len(name)-len(ext)], ext
}
