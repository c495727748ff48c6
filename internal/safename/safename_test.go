package safename

import (
	"path"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
)

func TestPath(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ä", 200)
	for _, test := range []struct{ subfolder, filename, want string }{
		{"", "ComfyUI_00001_.png", "ComfyUI_00001_.png"},
		{"a/b", "x.png", "a/b/x.png"},
		{`a\b`, "x.png", "a/b/x.png"},
		{"probe sub/ünïcode", "odd 1 #1 & 100%.bin", "probe sub/ünïcode/odd 1 #1 & 100%.bin"},
		{"", "sub/x.png", "sub/x.png"},
		{".hidden", ".x", ".hidden/.x"},
		{"..", "x", "__/x"},
		{"../../etc", "passwd", "__/__/etc/passwd"},
		{"/etc", "/passwd", "etc/passwd"},
		{"a/./b//c", ".", "a/_/b/c/_"},
		{"", "..", "__"},
		{"", `..\..\x`, "__/__/x"},
		{"", "", "_"},
		{"/", "///", "_"},
		{"C:", `C:\x`, "C_/C_/x"},
		{"", "x.png:stream", "x.png_stream"},
		{"", "a\x00b\n\x7f.png", "a_b__.png"},
		{"", "\xff\xfe.png", "_.png"},
		{"", `<>"|?*.png`, "______.png"},
		{"con", "NUL.txt", "_con/_NUL.txt"},
		{"", "aux .tar.gz", "_aux .tar.gz"},
		{"COM1", "lpt9", "_COM1/_lpt9"},
		{"COM10", "COM", "COM10/COM"},
		{"com²", "CONIN$", "_com²/_CONIN$"},
		{"", "console.log", "console.log"},
		{"dots...", "end. . ", "dots/end"},
		{"... ", " ", "____/_"},
		{"", long + ".png", strings.Repeat("ä", 98) + ".png"},
		{"", long + "." + long, strings.Repeat("ä", 100)},
		{"CON" + strings.Repeat(" ", 250) + "x", strings.Repeat(" ", 250) + "x", "_CON/_"},
		{strings.Repeat("a/", 100), "x.png", strings.Repeat("a/", 15) + "x.png"},
	} {
		assert.Equal(t, test.want, Path(test.subfolder, test.filename), "%q %q", test.subfolder, test.filename)
	}
}

func TestNumbered(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"x.png": "x (2).png", "a.b/x": "a.b/x (2)", ".x": ".x (2)", "a/.x": "a/.x (2)", "x.tar.gz": "x.tar (2).gz",
		"x." + strings.Repeat("e", 20): "x." + strings.Repeat("e", 20) + " (2)",
	} {
		assert.Equal(t, want, Numbered(name, 2))
		assert.Equal(t, name, Numbered(name, 0))
	}
}

func FuzzSafeName(f *testing.F) {
	f.Add("a/b", "x.png", 1)
	f.Add("..", `C:\..\nul.txt. `, 0)
	f.Add("\x00", "\xff", 12345)
	f.Add("CON"+strings.Repeat(" ", 250)+"x", strings.Repeat(" ", 250)+".x", 1)
	f.Add(strings.Repeat("../", 40), strings.Repeat("é", 300)+".png", 2)
	f.Fuzz(func(t *testing.T, subfolder, filename string, n int) {
		p := Path(subfolder, filename)
		if p != Path(subfolder, filename) {
			t.Fatal("not the same twice")
		}
		if again := Path("", p); again != p {
			t.Fatalf("%q becomes %q", p, again)
		}
		p = Numbered(p, n&0xffff)
		if !utf8.ValidString(p) || !filepath.IsLocal(filepath.FromSlash(p)) || path.Clean(p) != p || p == "." {
			t.Fatalf("%q", p)
		}
		components := strings.Split(p, "/")
		if len(components) > maxDepth {
			t.Fatalf("%q is %d deep", p, len(components))
		}
		for _, c := range components {
			if c == "" || c == "." || c == ".." || len(c) > 255-len(" (65535)") || strings.ContainsAny(c, "\x00\\:*?\"<>|") || isDevice(c) ||
				strings.HasSuffix(c, ".") || strings.HasSuffix(c, " ") {
				t.Fatalf("%q in %q", c, p)
			}
		}
	})
}
