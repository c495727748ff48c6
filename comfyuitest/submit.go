package comfyuitest

import (
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// secretKeys are the keys of extra_data that newer servers show nowhere.
var secretKeys = []string{"auth_token_comfy_org", "api_key_comfy_org"}

// postPrompt is POST /prompt, in the order in which the server does things: what fails late has used up a number, and a
// failure to queue comes after all the rest.
func (p *process) postPrompt(r *request) *answer {
	p.log("got prompt\n", false)
	v, ok := r.jsonBody()
	if !ok {
		return troubleAnswer()
	}
	body, isObject := v.(object)
	if !isObject {
		return p.noDictPrompt(v)
	}
	number, ok := p.numberOf(body)
	if !ok {
		return troubleAnswer()
	}
	prompt, given := body.get("prompt")
	if !given {
		return noPrompt()
	}
	id, refused := p.promptID(body)
	if refused != nil {
		return refused
	}
	targets, hasTargets, ok := targetsOf(body, prompt)
	if !ok {
		return troubleAnswer()
	}
	tree, isGraph := prompt.(object)
	if !isGraph {
		return p.noGraph(prompt)
	}
	g := newGraph(tree)
	sentGraph := g.raw // validation may convert values
	outputs, nodeErrors, refusal := validatePrompt(p.version, p.pod.classes, p.files, id, g, targets, hasTargets)
	extra, clientID, extraOK := p.extraData(body)
	switch {
	case refusal != nil && refusal.body == nil, !extraOK:
		return troubleAnswer()
	case refusal != nil:
		return jsonError(refusal.status, refusal.body)
	}
	outputs = p.pod.chance.order(id, outputs)
	it := &item{number: number, id: id, graph: g, prompt: encoded(g.raw), outputs: outputs}
	sent, _ := body.get("extra_data")
	sentExtra, _ := sent.(object)
	if !it.setExtra(p.version, extra) {
		return troubleAnswer()
	}
	it.shown = sync.OnceValue(func() encoded { return pyJSON(it.tuple(it.extra)) })
	p.pod.book.queued(id, clientID, rawMembers(sentExtra), sentGraph)
	if err := p.queue.put(it); err != nil {
		return troubleAnswer() // and it is queued all the same
	}
	return jsonAnswer(object{{"prompt_id", id}, {"number", number}, {"node_errors", nodeErrors}})
}

// noDictPrompt answers a body that is JSON but no object: a list or a text can be searched for the keys.
func (p *process) noDictPrompt(v any) *answer {
	if notADict(v, "number", "front").status != http.StatusOK {
		return troubleAnswer()
	}
	p.number++
	if notADict(v, "prompt").status != http.StatusOK {
		return troubleAnswer()
	}
	return noPrompt()
}

func noPrompt() *answer {
	return refusedPrompt("no_prompt", "No prompt provided", "No prompt provided")
}

func refusedPrompt(kind, message, details string) *answer {
	return jsonError(http.StatusBadRequest, object{
		{"error", object{{"type", kind}, {"message", message}, {"details", details}, {"extra_info", object{}}}},
		{"node_errors", object{}},
	})
}

// noGraph answers a prompt that is no object. Until the server looked for replaced nodes (0.14.0), an empty list or text was a
// graph without outputs; anything else raises.
func (p *process) noGraph(prompt any) *answer {
	if p.version.atLeast(0, 14, 0) {
		return troubleAnswer()
	}
	switch prompt := prompt.(type) {
	case []any:
		if len(prompt) > 0 {
			return troubleAnswer()
		}
	case string:
		if prompt != "" {
			return troubleAnswer()
		}
	default:
		return troubleAnswer()
	}
	return refusedPrompt("prompt_no_outputs", "Prompt has no outputs", "")
}

// numberOf is the place in the queue: the caller's, as a float, or the counter's.
func (p *process) numberOf(body object) (any, bool) {
	if given, has := body.get("number"); has {
		number, raised := toFloat(given)
		return number, raised == nil
	}
	number := p.number
	if front, _ := body.get("front"); toBool(front) {
		number = -number
	}
	p.number++
	return number, true
}

// promptID is the id that the prompt gets, by version: the server's own, any text, or a canonical UUID.
func (p *process) promptID(body object) (string, *answer) {
	given, has := body.get("prompt_id")
	if !p.version.atLeast(0, 3, 45) || !has {
		return uuid.NewString(), nil
	}
	if !p.version.atLeast(0, 25, 0) {
		return pyStr(given), nil
	}
	if given == nil {
		return uuid.NewString(), nil
	}
	text, isText := given.(string)
	if !isText || !isCanonicalUUID(text) {
		return "", refusedPrompt("invalid_prompt_id", "prompt_id must be a valid UUID",
			"prompt_id must be a UUID string in canonical lowercase hyphenated form; omit it to let the server generate one")
	}
	return text, nil
}

func isCanonicalUUID(text string) bool {
	id, err := uuid.Parse(text)
	return err == nil && id.String() == text
}

// targetsOf reads partial_execution_targets. A text is searched for each id, as Python does.
func targetsOf(body object, prompt any) (targets []string, has, ok bool) {
	given, _ := body.get("partial_execution_targets")
	switch given := given.(type) {
	case nil:
		return nil, false, true
	case []any:
		for _, v := range given {
			if id, isText := v.(string); isText {
				targets = append(targets, id)
			}
		}
		return targets, true, true
	case object:
		for _, f := range given {
			targets = append(targets, f.key)
		}
		return targets, true, true
	case string:
		graph, _ := prompt.(object)
		for _, f := range graph {
			if strings.Contains(given, f.key) {
				targets = append(targets, f.key)
			}
		}
		return targets, true, true
	default:
		return nil, false, false
	}
}

// extraData is extra_data with the client_id in it.
func (p *process) extraData(body object) (extra any, clientID string, ok bool) {
	extra, given := body.get("extra_data")
	if !given {
		extra = object{}
	}
	id, has := body.get("client_id")
	clientID, _ = id.(string)
	o, isObject := extra.(object)
	switch {
	case isObject && has:
		return slices.Clone(o).set("client_id", id), clientID, true
	case isObject:
		return slices.Clone(o), clientID, true
	default:
		return extra, clientID, !has
	}
}

// setExtra completes extra_data and finds the client in it; false where the server raises.
func (it *item) setExtra(v version, extra any) bool {
	o, isObject := extra.(object)
	if isObject {
		if id, has := o.get("client_id"); has && id != nil {
			it.client = client{known: true, sid: clientKey(id), fatal: !hashable(id)}
		}
	}
	if v.atLeast(0, 3, 68) {
		if !isObject {
			return false
		}
		for _, key := range secretKeys {
			if secret, has := o.get(key); has {
				it.sensitive = append(it.sensitive, field{key, secret})
				o = o.without(key)
			}
		}
	}
	if v.atLeast(0, 3, 69) {
		o = o.set("create_time", time.Now().UnixMilli())
	}
	it.extra = extra
	if isObject {
		it.extra = o
	}
	return true
}

// clientKey is the sid that a client_id stands for. One that is no text is no socket's.
func clientKey(id any) string {
	if text, isText := id.(string); isText {
		return text
	}
	return "\x00" + string(pyJSON(id))
}

// publicExtra is extra_data as the history has it: without secrets since 0.3.45, which came before they were kept out of
// the queue.
func (it *item) publicExtra(v version) any {
	o, isObject := it.extra.(object)
	if !isObject || !v.atLeast(0, 3, 45) {
		return it.extra
	}
	for _, key := range secretKeys {
		o = o.without(key)
	}
	return o
}
