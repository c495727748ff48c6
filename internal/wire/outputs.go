package wire

import "encoding/json"

// OutputValue is one value of a node's output: a file, a text, or anything else raw.
type OutputValue struct {
	Key    string
	File   *File
	Text   string
	IsText bool
	Raw    json.RawMessage // nil for files and texts; it shares memory with the node's output
}

// File is what /view asks for. Type is "" when the node gave none; /view then means output.
type File struct {
	Filename, Subfolder, Type string
}

// maxValues bounds the values of one node that are told apart. A list that would go beyond stays whole.
const maxValues = 1 << 16

// Outputs splits what a node has put under ui into its values, in the order of the JSON. Under each key stands a list as a rule, and
// any list can hold any value: an object with a filename is a file, a string is a text, null is left out, and all else is raw, as are
// the booleans under animated. Another value than a list is taken as the only one of its list. A list that is too long, with
// which the node would have more than 65,536 values, is one raw value. Null has no values.
func Outputs(node json.RawMessage) ([]OutputValue, error) {
	d := borrow()
	defer d.giveBack()
	s := &d.s
	s.reset(Sanitize(node))
	if c := s.at(); c != '{' && c != 'n' {
		s.fail()
	}
	var keys []outputKey
	var values []OutputValue
	if s.object() {
		for s.next() && s.take() {
			key := outputKey{key: d.names.str(s.key), from: len(values)}
			values = d.outputValues(values, key.key)
			key.to = len(values)
			keys = append(keys, key)
		}
	}
	s.end()
	if s.bad {
		return nil, s.err("output")
	}
	return d.lastOutputs(values, keys), nil
}

// outputKey is a key and where its values are.
type outputKey struct {
	key      string
	from, to int
}

// lastOutputs leaves out the values of a key that came again.
func (d *Decoder) lastOutputs(values []OutputValue, keys []outputKey) []OutputValue {
	n := len(keys)
	keys = lastWins(keys, d.emptied(), func(k *outputKey) string { return k.key })
	if len(keys) == n {
		return values
	}
	var last []OutputValue
	for _, k := range keys {
		last = append(last, values[k.from:k.to]...)
	}
	return last
}

func (d *Decoder) outputValues(values []OutputValue, key string) []OutputValue {
	s := &d.s
	if s.at() != '[' {
		return d.outputValue(values, key)
	}
	start, before := s.i, len(values)
	for s.list(); s.elem(); {
		if len(values) < maxValues {
			values = d.outputValue(values, key)
			continue
		}
		s.rewind(start, s.depth-1)
		s.skip()
		clear(values[before:]) // they hold files
		return append(values[:before], OutputValue{Key: key, Raw: s.since(start)})
	}
	return values
}

func (d *Decoder) outputValue(values []OutputValue, key string) []OutputValue {
	s := &d.s
	start := s.i
	v := OutputValue{Key: key}
	switch s.at() {
	case 'n':
		s.skip()
		return values
	case '"':
		v.Text, v.IsText = string(s.str()), true
	case '{':
		if v.File = d.file(); v.File == nil {
			v.Raw = s.since(start)
		}
	default:
		s.skip()
		v.Raw = s.since(start)
	}
	return append(values, v)
}

// file reads an object; nil: it names no file.
func (d *Decoder) file() *File {
	s := &d.s
	var f File
	for s.object(); s.next(); {
		switch string(s.key) {
		case "filename":
			f.Filename = d.string()
		case "subfolder":
			f.Subfolder = d.string()
		case "type":
			f.Type = d.string()
		default:
			s.skip()
		}
	}
	if f.Filename == "" {
		return nil
	}
	return &f
}

// string reads a string; "" for anything else.
func (d *Decoder) string() string {
	if d.s.at() != '"' {
		d.s.skip()
		return ""
	}
	return d.names.str(d.s.str())
}
