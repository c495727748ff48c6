package comfyuitest

import "testing"

func TestParseVersion(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		text string
		want version
		ok   bool
	}{
		{"0.3.40", version{0, 3, 40}, true},
		{"0.38.0", version{0, 38, 0}, true},
		{"0.8", version{0, 8, 0}, true},
		{"v0.27.0", version{0, 27, 0}, true},
		{"1.2.3", version{1, 2, 3}, true},
		{"0.3.39", version{}, false},
		{"0.3", version{}, false},
		{"", version{}, false},
		{"0", version{}, false},
		{"0.33.0.1", version{}, false},
		{"0.-1.0", version{}, false},
		{"0.33.x", version{}, false},
		{"0.99999999999.0", version{}, false},
	} {
		got, err := parseVersion(tc.text)
		if (err == nil) != tc.ok || got != tc.want {
			t.Errorf("parseVersion(%q) = %v, %v; want %v, ok %v", tc.text, got, err, tc.want, tc.ok)
		}
	}
}

func TestVersionAtLeast(t *testing.T) {
	t.Parallel()
	ascending := []version{{0, 3, 40}, {0, 3, 64}, {0, 8, 0}, {0, 27, 0}, {0, 27, 1}, {0, 33, 0}, {1, 0, 0}}
	for i, v := range ascending {
		for j, other := range ascending {
			if got, want := v.atLeast(other.major, other.minor, other.patch), i >= j; got != want {
				t.Errorf("%v.atLeast(%v) = %v, want %v", v, other, got, want)
			}
		}
	}
}
