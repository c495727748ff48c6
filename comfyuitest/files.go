package comfyuitest

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

// The server's three folders, as /view and the entries of outputs name them.
const (
	kindInput  = "input"
	kindOutput = "output"
	kindTemp   = "temp"
)

// fileStore is the pod's disk, in memory. Input and output outlive restarts.
type fileStore struct {
	mu       sync.Mutex
	folders  map[folder]map[string]file
	counters map[string]int
}

type folder struct{ kind, path string }

// file is one stored file. Its data is never written to.
type file struct {
	data     []byte
	modified time.Time
}

func newFileStore() *fileStore {
	return &fileStore{folders: map[folder]map[string]file{}, counters: map[string]int{}}
}

// put stores a file, replacing one of that name. It copies data.
func (s *fileStore) put(kind, subfolder, name string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := folder{kind, cleanFolder(subfolder)}
	if s.folders[at] == nil {
		s.folders[at] = map[string]file{}
	}
	s.folders[at][name] = file{slices.Clone(data), time.Now()}
}

func (s *fileStore) get(kind, subfolder, name string) (file, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, there := s.folders[folder{kind, cleanFolder(subfolder)}][name]
	return f, there
}

func (s *fileStore) remove(kind, subfolder, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.folders[folder{kind, cleanFolder(subfolder)}], name)
}

// list returns the names in a folder, sorted, without those of folders below.
func (s *fileStore) list(kind, subfolder string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.folders[folder{kind, cleanFolder(subfolder)}]))
}

// all returns the paths of all files of a kind, sorted.
func (s *fileStore) all(kind string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var paths []string
	for at, files := range s.folders {
		if at.kind != kind {
			continue
		}
		for name := range files {
			paths = append(paths, path.Join(at.path, name))
		}
	}
	slices.Sort(paths)
	return paths
}

// clear removes all files of a kind, as the server does with temp when it starts.
func (s *fileStore) clear(kind string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.folders, func(at folder, _ map[string]file) bool { return at.kind == kind })
}

// nextName counts names up, without looking at what is there.
func (s *fileStore) nextName(prefix, ext string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counters[prefix+ext]++
	return fmt.Sprintf("%s_%05d_%s", prefix, s.counters[prefix+ext], ext)
}

func cleanFolder(p string) string { return strings.TrimPrefix(path.Clean("/"+p), "/") }

// etag is aiohttp's: the time of modification in nanoseconds and the size, both in hex.
func (f file) etag() string {
	return fmt.Sprintf(`"%x-%x"`, f.modified.UnixNano(), len(f.data))
}
