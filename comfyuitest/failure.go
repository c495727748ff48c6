package comfyuitest

import "strings"

// nodeFailure ends a job.
type nodeFailure struct {
	node        string // of the posted graph
	interrupted bool
	typ         string
	message     string
	traceback   []string
	inputs      any
}

// failCall ends the job by a call's error; the worker itself dies of what Python's Exception does not cover.
func (r *run) failCall(id string, in nodeInputValues, outcome *callOutcome) (stepResult, *nodeFailure) {
	if outcome.interrupted {
		return stepFailed, &nodeFailure{node: r.dyn.real(id), interrupted: true}
	}
	return r.fail(id, in.formatted(), outcome.raised)
}

func (r *run) fail(id string, inputs object, raised *NodeError) (stepResult, *nodeFailure) {
	if raised.ExceptionType == "SystemExit" || raised.ExceptionType == "KeyboardInterrupt" {
		r.executor.kill()
		return stepDead, nil
	}
	if inputs == nil {
		inputs = object{}
	}
	class := r.dyn.node(id).class
	return stepFailed, &nodeFailure{
		node: r.dyn.real(id), typ: raised.ExceptionType, message: raised.Message + r.process.version.tips(class, raised),
		traceback: traceback(class, raised), inputs: inputs,
	}
}

const (
	tipsMemory = "This error means you ran out of memory on your GPU.\n\n" +
		"TIPS: If the workflow worked before you might have accidentally set the batch_size to a large number."
	tipsShapes = "\n\nTIPS: If you have any \"Load CLIP\" or \"*CLIP Loader\" nodes in your workflow connected to this sampler " +
		"node make sure the correct file(s) and type is selected."
)

// tips is what the server appends to a message: since 0.3.42 a line feed, and advice where it has some.
func (v version) tips(class string, e *NodeError) string {
	if !v.atLeast(0, 3, 42) {
		return ""
	}
	return "\n" + v.advice(class, e)
}

func (v version) advice(class string, e *NodeError) string {
	switch {
	case e.ExceptionType == "torch.OutOfMemoryError" || e.ExceptionType == "torch.cuda.OutOfMemoryError":
		return tipsMemory
	case e.ExceptionType == "torch.AcceleratorError" && strings.Contains(e.Message, "out of memory") && v.atLeast(0, 17, 0):
		return tipsMemory
	case e.ExceptionType == "RuntimeError" && strings.Contains(e.Message, "mat1 and mat2 shapes") && strings.Contains(class, "Sampler") && v.atLeast(0, 14, 0):
		return tipsShapes
	}
	return ""
}

// traceback has the form of a real one: the server's own frames, then the node's.
func traceback(class string, e *NodeError) []string {
	return []string{
		"  File \"/comfyui/execution.py\", line 510, in execute\n    output_data, output_ui, has_subgraph, has_pending_tasks = await get_output_data(prompt_id, unique_id, obj, input_data_all)\n",
		"  File \"/comfyui/execution.py\", line 286, in process_inputs\n    result = f(**inputs)\n",
		"  File \"/comfyui/custom_nodes/comfyuitest.py\", line 1, in run\n    raise " + e.ExceptionType + "  # " + class + "\n",
	}
}

// reportFailure sends the terminal event of a job that did not succeed.
func (r *run) reportFailure(f *nodeFailure, known []string) {
	r.pace(paceEnd)
	class := ""
	if n := r.item.graph.nodes[f.node]; n != nil {
		class = n.class
	}
	data := object{
		{"prompt_id", r.item.id}, {"node_id", f.node}, {"node_type", class}, {"executed", append([]string{}, r.executed...)},
	}
	if f.interrupted {
		r.process.pod.book.interrupted(r.item.id)
		r.addMessage("execution_interrupted", data, true)
		return
	}
	r.addMessage("execution_error", append(data,
		field{"exception_message", f.message}, field{"exception_type", f.typ}, field{"traceback", append([]string{}, f.traceback...)},
		field{"current_inputs", f.inputs}, field{"current_outputs", known}), false)
}
