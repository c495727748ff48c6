package comfyuitest

// nodeProgress is a node's entry in progress_state.
type nodeProgress struct {
	id         string
	value, max any
	state      string
	head, tail []byte // the parts of its JSON that do not change
}

func (r *run) entry(id string) *nodeProgress {
	for _, entry := range r.progress {
		if entry.id == id {
			return entry
		}
	}
	entry := &nodeProgress{id: id, value: 0, max: 1, state: "pending"}
	entry.head = append(appendJSONString(nil, id), `: {"value": `...)
	entry.tail = pyJSON(object{
		{"node_id", id},
		{"prompt_id", r.item.id},
		{"display_node_id", r.dyn.display(id)},
		{"parent_node_id", r.dyn.parent(id)},
		{"real_node_id", r.dyn.real(id)},
	})[1:]
	r.progress = append(r.progress, entry)
	return entry
}

func (r *run) startProgress(id string) {
	r.pace(paceRunning, id)
	r.mu.Lock()
	defer r.mu.Unlock()
	entry := r.entry(id)
	entry.state, entry.value, entry.max = "running", 0.0, 1.0
	r.sendProgressState()
}

func (r *run) finishProgress(id string) {
	r.pace(paceFinished, id)
	r.mu.Lock()
	defer r.mu.Unlock()
	entry := r.entry(id)
	entry.state, entry.value = "finished", entry.max
	r.sendProgressState()
}

// reportTick sends the frames of one step. An image of type 4 goes before the progress frame, one of type 1 after it.
func (r *run) reportTick(id string, value, limit any, image *previewImage) {
	r.mu.Lock()
	defer r.mu.Unlock()
	entry := r.entry(id)
	entry.state, entry.value, entry.max = "running", value, limit
	r.sendProgressState()
	described := image != nil && r.process.version.atLeast(0, 3, 45) && r.process.hub.supports(r.client, "supports_preview_metadata")
	if described {
		r.sendBinary(image.described(r, id))
	}
	r.process.hub.toClient(r.client, "progress", object{
		{"value", value}, {"max", limit}, {"prompt_id", r.item.id}, {"node", r.progressNode(id)},
	})
	if image != nil && !described {
		r.sendBinary(image.plain())
	}
}

// progressNode is the node that a progress frame names. Before 0.3.45 that was the one which clients had been told of last:
// none, in a job without a client.
func (r *run) progressNode(id string) any {
	if r.process.version.atLeast(0, 3, 45) {
		return id
	}
	if !r.client.known {
		return nil
	}
	return r.dyn.display(id)
}

// sendProgressState sends the state of all nodes that have begun. The caller holds mu.
func (r *run) sendProgressState() {
	if !r.process.version.atLeast(0, 3, 45) {
		return
	}
	payload := append(make([]byte, 0, 64+256*len(r.progress)), `{"type": "progress_state", "data": {"prompt_id": `...)
	payload = append(appendJSONString(payload, r.item.id), `, "nodes": {`...)
	for i, entry := range r.progress {
		if i > 0 {
			payload = append(payload, ", "...)
		}
		payload = appendJSON(append(payload, entry.head...), entry.value)
		payload = appendJSON(append(payload, `, "max": `...), entry.max)
		payload = append(payload, `, "state": "`...)
		payload = append(payload, entry.state...)
		payload = append(append(payload, `", `...), entry.tail...)
	}
	payload = append(payload, `}}}`...)
	to := r.client
	if !r.process.version.atLeast(0, 3, 58) {
		to = client{} // everyone (C#9706)
	}
	r.process.hub.send(to, newFrame(opText, payload))
}

func (r *run) sendBinary(f *frame) {
	r.process.hub.send(r.client, f)
}

// plain is the frame of type 1: a format, and no word about whose image it is.
func (i *previewImage) plain() *frame {
	format := [4]byte{3: 1}
	if i.contentType == "image/png" {
		format[3] = 2
	}
	return binaryFrame(1, format[:], i.data)
}

// described is the frame of type 4.
func (i *previewImage) described(r *run, id string) *frame {
	about := pyJSON(object{
		{"node_id", id},
		{"prompt_id", r.item.id},
		{"display_node_id", r.dyn.display(id)},
		{"parent_node_id", r.dyn.parent(id)},
		{"real_node_id", r.dyn.real(id)},
		{"image_type", i.contentType},
	})
	n := uint32(len(about))
	return binaryFrame(4, []byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, about, i.data)
}
