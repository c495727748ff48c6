package media

import (
	"encoding/binary"
	"encoding/json"
	"errors"
)

// looksLikeSafetensors: the length of a JSON header, then the header. SaveLatent writes such files.
func looksLikeSafetensors(head []byte, size int64) bool {
	if len(head) < 10 || head[8] != '{' {
		return false
	}
	length := binary.LittleEndian.Uint64(head)
	return length >= 2 && length <= uint64(size-8)
}

func scanSafetensors(f *file) error {
	head, err := f.bytes(0, 8)
	if err != nil {
		return err
	}
	data, err := f.bytes(8, int64(binary.LittleEndian.Uint64(head)))
	if err != nil {
		return err
	}
	var header struct {
		Metadata map[string]string `json:"__metadata__"`
	}
	if err := json.Unmarshal(data, &header); err != nil {
		return errors.Join(ErrFormat, err)
	}
	for name, text := range header.Metadata {
		f.keep(name, []byte(text))
	}
	return nil
}
