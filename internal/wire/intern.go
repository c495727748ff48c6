package wire

const (
	maxInterned    = 4096
	maxInternedLen = 64
)

// interner gives equal texts one string. It is emptied when it is full: a stream's ids come and go with its jobs.
type interner struct {
	known map[string]string
}

func (n *interner) str(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	if len(b) > maxInternedLen {
		return string(b)
	}
	if s, ok := n.known[string(b)]; ok {
		return s
	}
	if n.known == nil {
		n.known = make(map[string]string)
	}
	if len(n.known) >= maxInterned {
		clear(n.known)
	}
	s := string(b)
	n.known[s] = s
	return s
}
