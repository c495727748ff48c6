package comfyuitest

// chance is what a real server leaves to chance. Nil functions leave it to the pod, which takes outputs in the order of the
// graph and wastes no time. Tests of this package set it before the first request, to play a recording as it happened.
type chance struct {
	// orderOutputs is the order in which a prompt's outputs are taken: in the real server that of a Python set.
	orderOutputs func(promptID string, outputs []string) []string
	// pace is called by the worker before it does a step of a job that clients see, and may hold it up, as a busy machine and
	// the garbage collector do.
	pace func(promptID, step string)
}

// The steps of a job; those of a node are followed by a space and its id, ticks by the value too.
const (
	paceTake     = "take"
	paceStart    = "start"
	paceCached   = "cached"
	paceRunning  = "running"
	paceExecute  = "execute"
	paceTick     = "tick"
	paceExecuted = "executed"
	paceFinished = "finished"
	paceEnd      = "end"
	paceIdle     = "idle"
)

func (c chance) order(promptID string, outputs []string) []string {
	if c.orderOutputs == nil {
		return outputs
	}
	return c.orderOutputs(promptID, outputs)
}

func (c chance) hold(promptID, step string) {
	if c.pace != nil {
		c.pace(promptID, step)
	}
}

// pace lets chance hold up a step of this job, named by its kind and what it is a step of.
func (r *run) pace(step string, of ...any) {
	if r.process.pod.chance.pace == nil {
		return
	}
	for _, v := range of {
		step += " " + pyStr(v)
	}
	r.process.pod.chance.hold(r.item.id, step)
}
