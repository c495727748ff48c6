package comfyuitest

import (
	"fmt"
	"strconv"
	"strings"
)

// version is the release of ComfyUI that a pod imitates.
type version struct{ major, minor, patch int }

// newestVersion is the newest release whose behaviour is known.
var newestVersion = version{0, 38, 0}

// oldestVersion is the oldest release that a pod can imitate: before it, refusals had other shapes.
var oldestVersion = version{0, 3, 40}

// parseVersion reads "0.33.0", also with a leading v and without the patch, as /system_stats and release tags write it.
func parseVersion(s string) (version, error) {
	parts := strings.Split(strings.TrimPrefix(s, "v"), ".")
	if len(parts) != 2 && len(parts) != 3 {
		return version{}, fmt.Errorf("version %q: want major.minor.patch", s)
	}
	var n [3]int
	for i, part := range parts {
		value, err := strconv.ParseUint(part, 10, 16)
		if err != nil {
			return version{}, fmt.Errorf("version %q: %w", s, err)
		}
		n[i] = int(value)
	}
	v := version{n[0], n[1], n[2]}
	if !v.atLeast(oldestVersion.major, oldestVersion.minor, oldestVersion.patch) {
		return version{}, fmt.Errorf("version %s is older than %s, the oldest that is known", v, oldestVersion)
	}
	return v, nil
}

func (v version) atLeast(major, minor, patch int) bool {
	if v.major != major {
		return v.major > major
	}
	if v.minor != minor {
		return v.minor > minor
	}
	return v.patch >= patch
}

func (v version) String() string {
	return fmt.Sprintf("%d.%d.%d", v.major, v.minor, v.patch)
}
