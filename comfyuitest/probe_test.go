package comfyuitest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"math"
	"slices"
	"strconv"
	"time"
)

// The recorded servers ran a pack of custom nodes that show their hard behaviours without a model. Here are the same nodes,
// as far as a client can see them, for the pod that the recordings are replayed against.

const (
	probeSeed    = `["INT", {"default": 0, "min": 0, "max": 9223372036854775808}]`
	probeSeconds = `["FLOAT", {"default": 0.1, "min": 0.0, "max": 3600.0, "step": 0.01}]`
	probeSteps   = `["INT", {"default": 5, "min": 0, "max": 100000}]`
	probeImage   = `"optional": {"image": ["IMAGE"]}`
)

// probeClasses are the node pack, and what else the recordings name, on release v.
func probeClasses(v version) []*class {
	classes := []*class{
		{name: "ProbeSleep", returns: imageReturn, run: probeSleep, inputs: parseInputs(
			`{"required": {"steps": ` + probeSteps + `, "seconds": ` + probeSeconds + `, "seed": ` + probeSeed + `}, "optional": {
			"image": ["IMAGE"], "preview": [["none", "latent", "jpeg", "png"]], "bars": ["INT", {"default": 1, "min": 1, "max": 100}]}}`)},
		{name: "ProbeSleepAsync", async: true, returns: imageReturn, run: probeSleep, inputs: parseInputs(
			`{"required": {"steps": ` + probeSteps + `, "seconds": ` + probeSeconds + `, "seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeSleepSilent", returns: imageReturn, run: probeSleepSilent, inputs: parseInputs(
			`{"required": {"seconds": ` + probeSeconds + `, "seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeList", returns: []returnSlot{{typ: "IMAGE", list: true}}, run: probeList, inputs: parseInputs(
			`{"required": {"count": ["INT", {"default": 3, "min": 0, "max": 1000}], "seed": ` + probeSeed + `}}`)},
		{name: "ProbeRaise", returns: imageReturn, run: probeRaise, inputs: parseInputs(
			`{"required": {"kind": [["RuntimeError", "ValueError", "no message", "oom", "oom allocation", "accelerator oom",
			"cuda illegal access", "cuda assert", "shapes", "missing file"]], "seed": ` + probeSeed + `}, "optional": {
			"image": ["IMAGE"], "message": ["STRING", {"default": ""}], "steps": ` + probeSteps + `}}`)},
		{name: "ProbeBlock", returns: imageReturn, run: probeBlock, inputs: parseInputs(
			`{"required": {"message": ["STRING", {"default": ""}], "silent": ["BOOLEAN", {"default": false}], "seed": ` + probeSeed + `}, ` +
				probeImage + `}`)},
		{name: "ProbeExpand", returns: imageReturn, run: probeExpand, inputs: parseInputs(
			`{"required": {"count": ["INT", {"default": 3, "min": 1, "max": 1000}], "steps": ` + probeSteps + `, "seconds": ` + probeSeconds +
				`, "seed": ` + probeSeed + `}, "optional": {"image": ["IMAGE"], "text": ["BOOLEAN", {"default": false}],
			"cycle": ["BOOLEAN", {"default": false}], "nested": ["BOOLEAN", {"default": false}], "fail": ["BOOLEAN", {"default": false}]}}`)},
		{name: "ProbeText", output: true, returns: []returnSlot{{typ: "STRING"}}, run: probeText, inputs: parseInputs(
			`{"required": {"text": ["STRING", {"default": "hello", "multiline": true}], "seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeProgressText", returns: imageReturn, run: probeProgressText, inputs: parseInputs(
			`{"required": {"text": ["STRING", {"default": "working"}], "scope": [["client", "all"]], "seed": ` + probeSeed + `}, ` + probeImage +
				`, "hidden": {"unique_id": "UNIQUE_ID"}}`)},
		{name: "ProbeFrames", returns: imageReturn, run: probeFrames, inputs: parseInputs(
			`{"required": {"binary_type": ["INT", {"default": 99, "min": 0, "max": 2147483648}],
			"size": ["INT", {"default": 16, "min": 0, "max": 268435456}], "seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeNaN", output: true, run: probeNaN, inputs: parseInputs(`{"required": {"seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeHold", returns: imageReturn, run: probeHold, inputs: parseInputs(
			`{"required": {"mode": [["loop", "gil"]], "seconds": ` + probeSeconds + `, "seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeManyImages", output: true, run: probeManyImages, inputs: parseInputs(
			`{"required": {"count": ["INT", {"default": 20, "min": 0, "max": 100000}], "folder": [["output", "temp"]],
			"subfolder": ["STRING", {"default": ""}], "seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeOddKeys", output: true, run: probeOddKeys, inputs: parseInputs(`{"required": {"seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeVideoLike", output: true, run: probeVideoLike, inputs: parseInputs(
			`{"required": {"folder": [["output", "temp"]], "seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeDieThread", returns: imageReturn, run: probeDieThread, inputs: parseInputs(
			`{"required": {"kind": [["SystemExit", "BaseException"]], "seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{name: "ProbeDieProcess", returns: imageReturn, run: probeDieProcess, inputs: parseInputs(
			`{"required": {"seed": ` + probeSeed + `}, ` + probeImage + `}`)},
		{
			name: "ProbeValidate", returns: imageReturn, run: probePass, inputs: parseInputs(
				`{"required": {"mode": [["pass", "refuse", "raise"]], "seconds": ` + probeSeconds + `, "seed": ` + probeSeed + `}, ` + probeImage + `}`),
			validateArgs: []string{"mode", "seconds"}, validate: probeValidate,
		},
		{name: "ProbeEnd", output: true, run: probeEnd, inputs: parseInputs(
			`{"required": {"image": ["IMAGE"]}, "optional": {"seconds": ` + probeSeconds + `}}`)},
	}
	for _, c := range classes {
		c.displayName, c.category, c.module = c.name, "probe", "custom_nodes.probe_nodes"
	}
	return append(classes, modelClasses(v)...)
}

// modelClasses are those built-in classes that need a model, as far as refused graphs of the recordings name them.
func modelClasses(v version) []*class {
	const resolution = `"width": ["INT", {"default": 512, "min": 16, "max": 16384}], "height": ["INT", {"default": 512, "min": 16, "max": 16384}]`
	return []*class{
		{name: "CheckpointLoaderSimple", returns: []returnSlot{{typ: "MODEL"}, {typ: "CLIP"}, {typ: "VAE"}}, inputs: parseInputs(
			`{"required": {"ckpt_name": [[], {"tooltip": "The name of the checkpoint (model) to load."}]}}`)},
		{name: "CLIPTextEncode", returns: []returnSlot{{typ: "CONDITIONING"}}, inputs: parseInputs(
			`{"required": {"text": ["STRING", {"multiline": true}], "clip": ["CLIP"]}}`)},
		{name: "EmptyLatentImage", returns: []returnSlot{{typ: "LATENT"}}, inputs: parseInputs(
			`{"required": {` + resolution + `, "batch_size": ["INT", {"default": 1, "min": 1, "max": 4096}]}}`)},
		{name: "KSampler", returns: []returnSlot{{typ: "LATENT"}}, inputs: kSamplerInputs(v)},
		{name: "KSamplerSelect", returns: []returnSlot{{typ: "SAMPLER"}}, inputs: parseInputs(`{"required": {"sampler_name": [["euler"]]}}`)},
		{name: "VAEDecode", returns: imageReturn, inputs: parseInputs(`{"required": {"samples": ["LATENT"], "vae": ["VAE"]}}`)},
	}
}

// kSamplerInputs: of the samplers the recordings show only how many there are.
func kSamplerInputs(v version) []input {
	samplers, schedulers := 38, `"normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta"`
	if v.atLeast(0, 3, 64) {
		samplers, schedulers = 42, `"simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"`
	}
	if v.atLeast(0, 8, 0) {
		samplers = 44
	}
	inputs := parseInputs(`{"required": {"model": ["MODEL"], "seed": ` + probeSeed + `, "steps": ["INT", {"default": 20, "min": 1, "max": 10000}],
		"cfg": ["FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}], "sampler_name": [["euler"]], "scheduler": [[` + schedulers + `,
		"linear_quadratic", "kl_optimal"],
		{"tooltip": "The scheduler controls how noise is gradually removed to form the image."}],
		"positive": ["CONDITIONING"], "negative": ["CONDITIONING"], "latent_image": ["LATENT"],
		"denoise": ["FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}]}}`)
	names := make([]any, samplers)
	for i := range names {
		names[i] = "sampler " + strconv.Itoa(i)
	}
	for i := range inputs {
		if inputs[i].name == "sampler_name" {
			inputs[i].typ = names
		}
	}
	return inputs
}

// sleep is time.sleep: nothing but the end of the process ends it.
func sleep(c *Call, seconds float64) bool {
	if seconds > 0 {
		wait(c.run.process.ctx, time.Duration(seconds*float64(time.Second)))
	}
	return c.life.Err() == nil
}

// began is how many nodes of the job began before this one.
func (c *Call) began() int {
	c.run.mu.Lock()
	defer c.run.mu.Unlock()
	return slices.IndexFunc(c.run.progress, func(p *nodeProgress) bool { return p.id == c.NodeID })
}

func probeReturn(c *Call) {
	if given := c.Inputs["image"]; given != nil {
		c.Return(given)
		return
	}
	c.Return(imageBatch{count: 1, width: 8, height: 8, pix: make([]float32, 8*8*channels)})
}

func probePass(_ context.Context, c *Call) error {
	probeReturn(c)
	return nil
}

func probeSleep(_ context.Context, c *Call) error {
	args := arguments{call: c}
	steps, seconds := args.int("steps"), args.float("seconds")
	bars, preview := args.intOr("bars", 1), args.textOr("preview", "none")
	if args.failure != nil {
		return args.failure
	}
	if c.class.async {
		// Nodes that began in one instant of a synctest bubble go on in the order in which they began.
		wait(c.run.process.ctx, time.Duration(c.began())*10*time.Microsecond)
	}
	for range bars {
		for step := range steps {
			if !sleep(c, seconds) {
				return nil
			}
			value, limit := float64(step+1), float64(steps)
			if preview == "none" {
				c.Progress(value, limit)
				continue
			}
			contentType, data := drawPreview(preview)
			c.ProgressPreview(value, limit, contentType, data)
		}
	}
	probeReturn(c)
	return nil
}

func drawPreview(kind string) (contentType string, data []byte) {
	img := image.NewRGBA(image.Rect(0, 0, 48, 48))
	for i := range img.Pix {
		img.Pix[i] = uint8(i)
	}
	var b bytes.Buffer
	encode := func() error { return jpeg.Encode(&b, img, nil) }
	contentType = "image/jpeg"
	if kind == "png" {
		encode = func() error { return png.Encode(&b, img) }
		contentType = "image/png"
	}
	if err := encode(); err != nil {
		panic(err)
	}
	return contentType, b.Bytes()
}

func probeSleepSilent(_ context.Context, c *Call) error {
	args := arguments{call: c}
	sleep(c, args.float("seconds"))
	probeReturn(c)
	return args.failure
}

func probeList(_ context.Context, c *Call) error {
	args := arguments{call: c}
	list := make([]any, args.int("count"))
	for i := range list {
		list[i] = imageBatch{count: 1, width: 8, height: 8, pix: make([]float32, 8*8*channels)}
	}
	c.Return(list)
	return args.failure
}

func probeRaise(_ context.Context, c *Call) error {
	args := arguments{call: c}
	kind, message, steps := args.text("kind"), args.textOr("message", ""), args.intOr("steps", 0)
	if args.failure != nil {
		return args.failure
	}
	for step := range steps {
		c.Progress(float64(step+1), float64(steps))
	}
	or := func(standard string) string {
		if message == "" {
			return standard
		}
		return message
	}
	switch kind {
	case "RuntimeError":
		return &NodeError{"RuntimeError", or("probe failed")}
	case "ValueError":
		return &NodeError{"ValueError", or("probe got a bad value")}
	case "no message":
		return &NodeError{"Exception", ""}
	case "oom":
		return &NodeError{"torch.OutOfMemoryError", or("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of " +
			"23.69 GiB of which 1.10 GiB is free.")}
	case "oom allocation":
		return &NodeError{"torch.OutOfMemoryError", or("Allocation on device")}
	case "accelerator oom":
		return &NodeError{"torch.AcceleratorError", or("CUDA error: out of memory")}
	case "cuda illegal access":
		return &NodeError{"RuntimeError", or("CUDA error: an illegal memory access was encountered")}
	case "cuda assert":
		return &NodeError{"torch.AcceleratorError", or("CUDA error: device-side assert triggered")}
	case "shapes":
		return &NodeError{"RuntimeError", or("mat1 and mat2 shapes cannot be multiplied (77x768 and 2048x640)")}
	default:
		return &NodeError{"FileNotFoundError", "[Errno 2] " + or("No such file or directory") + ": 'model.safetensors'"}
	}
}

func probeBlock(_ context.Context, c *Call) error {
	if c.Inputs["silent"] == true {
		c.Block("")
		return nil
	}
	args := arguments{call: c}
	c.Block(args.text("message"))
	return args.failure
}

func probeExpand(_ context.Context, c *Call) error {
	args := arguments{call: c}
	count := args.int("count")
	if args.failure != nil {
		return args.failure
	}
	var last any = imageBatch{count: 1, width: 8, height: 8, pix: make([]float32, 8*8*channels)}
	if given := c.Inputs["image"]; given != nil {
		last = given
	}
	graph := map[string]any{}
	node := func(class string, inputs map[string]any) {
		inputs["seed"] = c.Inputs["seed"]
		id := strconv.Itoa(len(graph) + 1)
		graph[id] = map[string]any{"class_type": class, "inputs": inputs}
		last = []any{id, 0}
	}
	for i := range count {
		switch {
		case c.Inputs["nested"] == true && i == 0:
			node("ProbeExpand", map[string]any{"count": 2, "steps": c.Inputs["steps"], "seconds": c.Inputs["seconds"]})
		case c.Inputs["fail"] == true && i == count-1:
			node("ProbeRaise", map[string]any{"kind": "RuntimeError", "image": last})
		default:
			node("ProbeSleep", map[string]any{"image": last, "steps": c.Inputs["steps"], "seconds": c.Inputs["seconds"]})
		}
	}
	result := last
	if c.Inputs["cycle"] == true {
		first, _ := graph["1"].(map[string]any)
		inputs, _ := first["inputs"].(map[string]any)
		inputs["image"] = last
	}
	if c.Inputs["text"] == true {
		node("ProbeText", map[string]any{"text": "inner text", "image": last})
	}
	c.Expand(graph, result)
	return nil
}

func probeText(_ context.Context, c *Call) error {
	c.Put("text", c.Inputs["text"])
	c.Return(c.Inputs["text"])
	return nil
}

func probeProgressText(_ context.Context, c *Call) error {
	args := arguments{call: c}
	text := args.text("text")
	if c.Inputs["scope"] == "client" {
		c.Text(text)
	} else {
		c.sendText(client{}, text)
	}
	probeReturn(c)
	return args.failure
}

func probeFrames(_ context.Context, c *Call) error {
	args := arguments{call: c}
	kind, size := args.int("binary_type"), args.int("size")
	if args.failure != nil {
		return args.failure
	}
	c.Send("probe.custom", map[string]any{"any": []any{"thing", 1, nil}})
	c.Send("probe.list", []int{1, 2, 3})
	c.Send("probe.null", nil)
	to := c.run.client
	c.run.process.hub.enqueue(envelope{frame: binaryFrame(uint32(kind), make([]byte, size)), sid: to.sid, everyone: !to.known})
	probeReturn(c)
	return nil
}

func probeNaN(_ context.Context, c *Call) error {
	c.Put("numbers", math.NaN(), math.Inf(1), math.Inf(-1), 1e308, 5e-324, json.Number("9223372036854775808"), math.Copysign(0, -1))
	c.Put("text", "NaN in a string stays: NaN, Infinity")
	return nil
}

// probeHold freezes the event loop, or everything; here nothing else runs that the interpreter lock would hold up.
func probeHold(_ context.Context, c *Call) error {
	args := arguments{call: c}
	thaw := c.Pod().Freeze()
	sleep(c, args.float("seconds"))
	thaw()
	probeReturn(c)
	return args.failure
}

func numberedPNG(n int) []byte {
	img := image.NewRGBA(image.Rect(0, 0, 8, 8))
	for y := range 8 {
		for x := range 8 {
			img.SetRGBA(x, y, color.RGBA{uint8(n * 37), uint8(n * 91), uint8(n), 0xff})
		}
	}
	data, err := encodePNG(img, png.DefaultCompression, nil)
	if err != nil {
		panic(err)
	}
	return data
}

func probeManyImages(_ context.Context, c *Call) error {
	args := arguments{call: c}
	count, folder, subfolder := args.int("count"), args.text("folder"), args.text("subfolder")
	for i := range count {
		c.Save("images", folder, fmt.Sprintf("%s/many_%s_%05d_.png", subfolder, c.Inputs["seed"], i), numberedPNG(i))
	}
	return args.failure
}

// probeSave stores a file without listing it.
func probeSave(c *Call, kind, subfolder, name string, data []byte) object {
	c.files().put(kind, subfolder, name, data)
	return object{{"filename", name}, {"subfolder", subfolder}, {"type", kind}}
}

func probeOddKeys(_ context.Context, c *Call) error {
	name := fmt.Sprintf("odd_%s", c.Inputs["seed"])
	gif := probeSave(c, "output", "probe/video", name+".gif", numberedPNG(1))
	c.Put("gifs", append(gif, field{"format", "video/h264-mp4"}, field{"frame_rate", 8.0}, field{"workflow", "odd.png"},
		field{"fullpath", "/comfyui/output/odd.gif"}))
	c.Put("audio", probeSave(c, "output", "audio", name+".flac", []byte("fLaC\x00\x00\x00\x22")))
	c.Put("3d", probeSave(c, "output", "3d", name+".glb", []byte("glTF\x02\x00\x00\x00")))
	other := fmt.Sprintf("odd %s #1 & 100%%.bin", c.Inputs["seed"])
	c.Put("files", probeSave(c, "temp", "probe sub/ünïcode", other, []byte("odd bytes")))
	c.Put("result", "3d/"+name+".glb", nil, object{{"camera", object{{"x", 1}}}})
	c.Put("animated", true)
	c.Put("number", 1, 2.5, -3)
	c.Put("a_string_becomes_letters", "a", "b", "c")
	c.Put("a_dict_becomes_its_keys", "first", "second")
	c.Put("nested", []any{1, []any{2, 3}}, object{{"deep", object{{"er", []any{true, nil}}}}})
	c.Put("empty")
	return nil
}

func probeVideoLike(_ context.Context, c *Call) error {
	args := arguments{call: c}
	data := append([]byte("\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2"), make([]byte, 64)...)
	c.Save("images", args.text("folder"), fmt.Sprintf("video/clip_%s_00001_.mp4", c.Inputs["seed"]), data)
	c.Put("animated", true)
	return args.failure
}

func probeDieThread(context.Context, *Call) error {
	return &NodeError{"SystemExit", "1"}
}

func probeDieProcess(_ context.Context, c *Call) error {
	c.Pod().Restart(time.Hour)
	return nil
}

func probeValidate(_ *validation, inputs map[string]any) (string, *exception) {
	seconds, _ := inputs["seconds"].(json.Number)
	wait, err := seconds.Float64()
	if err != nil {
		return "", raise("TypeError", "'%s' object cannot be interpreted as an integer", typeName(inputs["seconds"]))
	}
	time.Sleep(time.Duration(wait * float64(time.Second)))
	switch inputs["mode"] {
	case "pass":
		return "", nil
	case "raise":
		return "", raise("KeyError", "'probe validation broke'")
	default:
		return "Invalid image file: probe.png", nil
	}
}

func probeEnd(_ context.Context, c *Call) error {
	args := arguments{call: c}
	if _, given := c.Inputs["seconds"]; given {
		sleep(c, args.float("seconds"))
	}
	return args.failure
}
