package comfyuitest

// nodeResult is one call's share of what a node gave.
type nodeResult struct {
	values    []any
	blocked   *blocker
	expansion *expansion
}

// expand puts the subgraphs of a node's calls into the graph; the node waits for what its results link to.
func (r *run) expand(id string, results []nodeResult) (stepResult, *nodeFailure) {
	var added, outputs []string
	var links []link
	for _, result := range results {
		if result.expansion == nil {
			continue
		}
		for _, n := range result.expansion.nodes {
			display := id
			if other, has := result.expansion.display[n.id]; has {
				display = other
			}
			r.dyn.add(n, id, display)
			class := r.process.pod.classes[n.class]
			if class == nil {
				return r.fail(id, nil, &NodeError{"KeyError", pyRepr(n.class)})
			}
			added = append(added, n.id)
			if class.output {
				outputs = append(outputs, n.id)
			}
		}
		for _, v := range result.expansion.results {
			if l, linked := v.(link); linked {
				links = append(links, l)
			}
		}
	}
	r.executor.cache.expand(r.dyn, id, added, r.signer.sign)
	for _, output := range outputs {
		if err := r.list.add(output); err != nil {
			return r.fail(id, nil, &NodeError{err.typ, err.message})
		}
	}
	for _, l := range links {
		if err := r.list.link(l.node, id); err != nil {
			return r.fail(id, nil, &NodeError{err.typ, err.message})
		}
	}
	r.inner[id] = results
	return stepPending, nil
}

// resolve replaces the links of an expansion's results by what they link to.
func (r *run) resolve(id string, results []nodeResult) (stepResult, *nodeFailure) {
	for i, result := range results {
		if result.expansion == nil {
			continue
		}
		var values []any
		for _, v := range result.expansion.results {
			l, linked := v.(link)
			if !linked {
				values = append(values, v)
				continue
			}
			if outputs, _ := r.executor.cache.get(r.dyn, l.node); outputs != nil {
				slot, _ := outputs.slot(l.slot)
				values = append(values, slot...)
			}
		}
		results[i] = nodeResult{values: values}
	}
	return r.store(id, r.process.pod.classes[r.dyn.node(id).class], results)
}

// store keeps a node's outputs for the nodes behind it and for later jobs.
func (r *run) store(id string, class *class, results []nodeResult) (stepResult, *nodeFailure) {
	r.executor.cache.setOutputs(r.dyn, id, mergeResults(class, results))
	r.finishProgress(id)
	r.executed = append(r.executed, id)
	return stepDone, nil
}

// mergeResults makes of the values of each call the lists of each slot.
func mergeResults(class *class, results []nodeResult) *nodeOutputs {
	outputs := &nodeOutputs{}
	count := 0
	if !class.anyReturns {
		count = len(class.returns)
	} else {
		for _, result := range results {
			count = max(count, len(result.values))
		}
	}
	outputs.slots = make([][]any, count)
	for slot := range count {
		isList := slot < len(class.returns) && class.returns[slot].list
		for _, result := range results {
			switch {
			case result.blocked != nil:
				outputs.slots[slot] = append(outputs.slots[slot], result.blocked)
			case slot >= len(result.values):
				if !isList {
					outputs.slots[slot] = append(outputs.slots[slot], nil)
				}
			default:
				outputs.slots[slot] = appendSlot(outputs.slots[slot], result.values[slot], isList)
			}
		}
	}
	if class.anyReturns {
		for _, result := range results {
			if result.blocked != nil {
				outputs.rest = append(outputs.rest, result.blocked)
			}
		}
	}
	return outputs
}

func appendSlot(slot []any, value any, isList bool) []any {
	if list, ok := value.([]any); ok && isList {
		return append(slot, list...)
	}
	return append(slot, value)
}
