package wire

import "encoding/json"

// Job is the answer to GET /api/jobs/{id}. While the job is pending or in progress only the first group is known.
type Job struct {
	ID           string
	Status       string // pending, in_progress, completed, failed, cancelled
	Number       float64
	CreateTime   int64 // ms, as the other times; 0: absent
	OutputsCount int
	WorkflowID   string

	StartTime, EndTime int64
	Outputs            []NodeOutput // edited by the server: nulls are gone, names of 3D files have become files
	Failure            *Failure     // execution_error; nil: absent
	History            HistoryEntry // made of execution_status, workflow and the fields above; zero while there is no execution_status
}

// DecodeJob reads the answer to GET /api/jobs/{id}. One without id or status is ErrMalformed. Graph and ExtraData of History are not kept.
func DecodeJob(body []byte) (Job, error) {
	d := borrow()
	defer d.giveBack()
	s := &d.s
	s.begin(body)
	var j Job
	var item QueueItem
	ended := false
	for s.object(); s.next(); {
		switch string(s.key) {
		case "id":
			j.ID = d.id()
		case "status":
			j.Status = d.id()
		case "priority":
			j.Number = s.number()
		case "create_time":
			j.CreateTime = s.integer()
		case "execution_start_time":
			j.StartTime = s.integer()
		case "execution_end_time":
			j.EndTime = s.integer()
		case "outputs_count":
			j.OutputsCount = s.int()
		case "workflow_id":
			j.WorkflowID = d.id()
		case "outputs":
			j.Outputs = d.nodeOutputs()
		case "execution_error":
			j.Failure = d.jobFailure()
		case "execution_status":
			ended = s.at() == '{'
			d.historyStatus(&j.History, false)
		case "workflow":
			item = d.jobWorkflow()
		default:
			s.skip()
		}
	}
	s.end()
	if j.ID == "" || j.Status == "" {
		s.fail()
	}
	if s.bad {
		return Job{}, s.err("job")
	}
	if ended {
		h := &j.History
		h.PromptID, h.Number, h.Outputs = j.ID, j.Number, j.Outputs
		h.ClientID, h.Marker = item.ClientID, item.Marker
	}
	return j, nil
}

func (d *Decoder) jobFailure() *Failure {
	if d.s.at() != '{' {
		d.s.skip()
		return nil
	}
	m := Message{Type: ExecutionError}
	d.data(&m)
	return m.Failure
}

func (d *Decoder) jobWorkflow() (item QueueItem) {
	s := &d.s
	if !s.object() {
		return item
	}
	for s.next() {
		if string(s.key) == "extra_data" {
			item = QueueItem{}
			d.extraData(&item, false)
		} else {
			s.skip()
		}
	}
	return item
}

// PromptReply is the answer to a POST /prompt that was accepted. NodeErrors can hold something all the same: those outputs are
// dropped and the rest runs.
type PromptReply struct {
	PromptID   string
	Number     float64
	NodeErrors map[string]NodeErrors
}

// NodeErrors is what validation says of one node.
type NodeErrors struct {
	Class            string
	DependentOutputs []string
	Errors           []NodeError
}

type NodeError struct {
	Type, Message, Details string
	Input                  string          // extra_info.input_name
	ExtraInfo              json.RawMessage // nil when null or absent
}

// DecodePromptReply reads the 200 of POST /prompt. One without prompt_id is ErrMalformed.
func DecodePromptReply(body []byte) (PromptReply, error) {
	d := borrow()
	defer d.giveBack()
	s := &d.s
	s.begin(body)
	var r PromptReply
	hasID := false
	for s.object(); s.next(); {
		switch string(s.key) {
		case "prompt_id":
			id := s.text()
			hasID = id != nil       // "" is an id to old servers
			r.PromptID = string(id) // seen once: nothing to intern
		case "number":
			r.Number = s.number()
		case "node_errors":
			r.NodeErrors = d.nodeErrors()
		default:
			s.skip()
		}
	}
	s.end()
	if !hasID {
		s.fail()
	}
	if s.bad {
		return PromptReply{}, s.err("reply to a prompt")
	}
	return r, nil
}

// Refusal is the answer to a POST /prompt that was refused, and {"error": text} of other routes.
type Refusal struct {
	Type, Message, Details string // of old servers and other routes only Message
	ExtraInfo              json.RawMessage
	Nodes                  map[string]NodeErrors
}

// DecodeRefusal reads a refusal; false: the body is none of ComfyUI's, an HTML page of a proxy, say.
func DecodeRefusal(body []byte) (Refusal, bool) {
	d := borrow()
	defer d.giveBack()
	s := &d.s
	s.reset(body)
	if s.at() != '{' {
		return Refusal{}, false
	}
	var e NodeError
	var nodes map[string]NodeErrors
	known := false
	for s.object(); s.next(); {
		switch string(s.key) {
		case "error":
			e = NodeError{}
			switch s.at() {
			case '"':
				known = true
				e.Message = string(s.str())
			case '{':
				known = true
				e = d.nodeError()
			default:
				known = false
				s.skip()
			}
		case "node_errors":
			nodes = d.nodeErrors()
		default:
			s.skip()
		}
	}
	s.end()
	if s.bad || !known {
		return Refusal{}, false
	}
	return Refusal{Type: e.Type, Message: e.Message, Details: e.Details, ExtraInfo: e.ExtraInfo, Nodes: nodes}, true
}

// nodeErrors reads node_errors; the empty list of old servers is nil, as is an empty object.
func (d *Decoder) nodeErrors() (nodes map[string]NodeErrors) {
	s := &d.s
	if !s.object() {
		return nil
	}
	for s.next() && s.take() {
		if nodes == nil {
			nodes = make(map[string]NodeErrors)
		}
		node := d.names.str(s.key)
		nodes[node] = d.errorsOfNode()
	}
	return nodes
}

func (d *Decoder) errorsOfNode() (n NodeErrors) {
	s := &d.s
	if !s.object() {
		return n
	}
	for s.next() {
		switch string(s.key) {
		case "class_type":
			n.Class = d.id()
		case "dependent_outputs":
			n.DependentOutputs = d.ids()
		case "errors":
			n.Errors = nil
			if s.list() {
				for s.elem() && s.take() {
					n.Errors = append(n.Errors, d.nodeError())
				}
			}
		default:
			s.skip()
		}
	}
	return n
}

func (d *Decoder) nodeError() (e NodeError) {
	s := &d.s
	if !s.object() {
		return e
	}
	for s.next() {
		switch string(s.key) {
		case "type":
			e.Type = d.id()
		case "message":
			e.Message = string(s.text())
		case "details":
			e.Details = string(s.text())
		case "extra_info":
			e.Input, e.ExtraInfo = d.extraInfo()
		default:
			s.skip()
		}
	}
	return e
}

func (d *Decoder) extraInfo() (input string, raw json.RawMessage) {
	s := &d.s
	if s.at() != '{' {
		return "", d.nonNull()
	}
	start := s.i
	for s.object(); s.next(); {
		if string(s.key) == "input_name" {
			input = d.id()
		} else {
			s.skip()
		}
	}
	return input, s.copyFrom(start)
}

// ObjectInfo reads the answer to GET /object_info and /object_info/{class}: what the pod says of each class, without NaN and Infinity.
func ObjectInfo(body []byte) (map[string]json.RawMessage, error) {
	d := borrow()
	defer d.giveBack()
	s := &d.s
	s.begin(body)
	classes := map[string]json.RawMessage{}
	for s.object(); s.next() && s.take(); {
		class := string(s.key)
		classes[class] = s.raw()
	}
	s.end()
	if s.bad {
		return nil, s.err("object_info")
	}
	return classes, nil
}

// SystemStats is the answer to GET /system_stats; sizes are in bytes.
type SystemStats struct {
	Version, OS, Python, PyTorch string
	Args                         []string
	RAMTotal, RAMFree            int64
	Devices                      []Device
	Raw                          json.RawMessage // without NaN and Infinity
}

type Device struct {
	Name, Type                    string
	Index                         int // 0 when null, as for the CPU
	VRAMTotal, VRAMFree           int64
	TorchVRAMTotal, TorchVRAMFree int64
}

// DecodeSystemStats reads the answer to GET /system_stats. One without system is ErrMalformed.
func DecodeSystemStats(body []byte) (SystemStats, error) {
	d := borrow()
	defer d.giveBack()
	s := &d.s
	s.begin(body)
	var stats SystemStats
	start, hasSystem := s.i, false
	for s.object(); s.next(); {
		switch string(s.key) {
		case "system":
			hasSystem = s.at() == '{'
			d.system(&stats)
		case "devices":
			stats.Devices = d.devices()
		default:
			s.skip()
		}
	}
	stats.Raw = s.copyFrom(start)
	s.end()
	if !hasSystem {
		s.fail()
	}
	if s.bad {
		return SystemStats{}, s.err("system_stats")
	}
	return stats, nil
}

func (d *Decoder) system(stats *SystemStats) {
	s := &d.s
	*stats = SystemStats{Devices: stats.Devices}
	if !s.object() {
		return
	}
	for s.next() {
		switch string(s.key) {
		case "comfyui_version":
			stats.Version = d.id()
		case "os":
			stats.OS = d.id()
		case "python_version":
			stats.Python = d.id()
		case "pytorch_version":
			stats.PyTorch = d.id()
		case "argv":
			stats.Args = d.lines()
		case "ram_total":
			stats.RAMTotal = s.integer()
		case "ram_free":
			stats.RAMFree = s.integer()
		default:
			s.skip()
		}
	}
}

func (d *Decoder) devices() (devices []Device) {
	s := &d.s
	if !s.list() {
		return nil
	}
	for s.elem() && s.take() {
		devices = append(devices, d.device())
	}
	return devices
}

func (d *Decoder) device() (v Device) {
	s := &d.s
	if !s.object() {
		return v
	}
	for s.next() {
		switch string(s.key) {
		case "name":
			v.Name = d.id()
		case "type":
			v.Type = d.id()
		case "index":
			v.Index = s.int()
		case "vram_total":
			v.VRAMTotal = s.integer()
		case "vram_free":
			v.VRAMFree = s.integer()
		case "torch_vram_total":
			v.TorchVRAMTotal = s.integer()
		case "torch_vram_free":
			v.TorchVRAMFree = s.integer()
		default:
			s.skip()
		}
	}
	return v
}
