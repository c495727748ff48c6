package comfyuitest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"image"
	"image/gif"
	_ "image/jpeg" // LoadImage reads it
	"image/png"
	"math"
	"math/rand/v2"
	"mime"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// builtinClasses are the classes that need no model, as release v has them.
func builtinClasses(v version) map[string]*class {
	classes := map[string]*class{}
	for _, c := range []*class{
		emptyImageClass(v), loadImageClass(v), imageScaleClass(v), imageScaleByClass(v), imageInvertClass(v), imageBlendClass(v),
		saveImageClass(v), previewImageClass(v),
		primitiveClass(v, "PrimitiveString", "STRING"), primitiveClass(v, "PrimitiveStringMultiline", "STRING"),
		primitiveClass(v, "PrimitiveInt", "INT"), primitiveClass(v, "PrimitiveFloat", "FLOAT"),
		primitiveClass(v, "PrimitiveBoolean", "BOOLEAN"),
	} {
		classes[c.name] = c
	}
	return classes
}

// since is a text that came with a release.
type since struct {
	major, minor, patch int
	text                string
}

// pick returns the newest text that v has; changes are in order.
func (v version) pick(initial string, changes ...since) string {
	for _, change := range changes {
		if v.atLeast(change.major, change.minor, change.patch) {
			initial = change.text
		}
	}
	return initial
}

var imageReturn = []returnSlot{{typ: "IMAGE"}}

func emptyImageClass(v version) *class {
	return &class{
		name: "EmptyImage", displayName: v.pick("EmptyImage", since{0, 21, 0, "Empty Image"}), category: "image", module: "nodes",
		inputs: parseInputs(`{"required": {
			"width": ["INT", {"default": 512, "min": 1, "max": 16384, "step": 1}],
			"height": ["INT", {"default": 512, "min": 1, "max": 16384, "step": 1}],
			"batch_size": ["INT", {"default": 1, "min": 1, "max": 4096}],
			"color": ["INT", {"default": 0, "min": 0, "max": 16777215, "step": 1, "display": "color"}]}}`),
		returns: imageReturn,
		run: func(_ context.Context, c *Call) error {
			args := arguments{call: c}
			width, height := args.int("width"), args.int("height")
			count, color := args.intOr("batch_size", 1), args.intOr("color", 0)
			if args.failure != nil {
				return args.failure
			}
			batch, failure := newImageBatch(count, width, height)
			if failure != nil {
				return failure
			}
			rgb := [channels]float32{float32(color>>16&0xff) / 0xff, float32(color>>8&0xff) / 0xff, float32(color&0xff) / 0xff}
			for i := range batch.pix {
				batch.pix[i] = rgb[i%channels]
			}
			c.Return(batch)
			return nil
		},
	}
}

func imageScaleClass(v version) *class {
	return &class{
		name: "ImageScale", displayName: "Upscale Image", category: "image/upscaling", module: "nodes",
		essentials:    v.pick("", since{0, 15, 0, "Image Tools"}),
		searchAliases: []string{"resize", "resize image", "scale image", "image resize", "zoom", "zoom in", "change size"},
		inputs: parseInputs(`{"required": {
			"image": ["IMAGE"],
			"upscale_method": [["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]],
			"width": ["INT", {"default": 512, "min": 0, "max": 16384, "step": 1}],
			"height": ["INT", {"default": 512, "min": 0, "max": 16384, "step": 1}],
			"crop": [["disabled", "center"]]}}`),
		returns: imageReturn,
		run: func(_ context.Context, c *Call) error {
			args := arguments{call: c}
			batch, method := args.images("image"), args.text("upscale_method")
			width, height, crop := args.int("width"), args.int("height"), args.text("crop")
			if args.failure != nil {
				return args.failure
			}
			if width == 0 && height == 0 {
				c.Return(batch)
				return nil
			}
			if width == 0 {
				width = max(1, int(math.RoundToEven(float64(batch.width)*float64(height)/float64(batch.height))))
			} else if height == 0 {
				height = max(1, int(math.RoundToEven(float64(batch.height)*float64(width)/float64(batch.width))))
			}
			if crop == "center" && width > 0 && height > 0 {
				batch = batch.centerCrop(width, height)
			}
			return returnScaled(c, batch, method, width, height)
		},
	}
}

func imageScaleByClass(v version) *class {
	return &class{
		name: "ImageScaleBy", displayName: "Upscale Image By", category: "image/upscaling", module: "nodes",
		essentials: v.pick("", since{0, 18, 0, "Image Tools"}),
		inputs: parseInputs(`{"required": {
			"image": ["IMAGE"],
			"upscale_method": [["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]],
			"scale_by": ["FLOAT", {"default": 1.0, "min": 0.01, "max": 8.0, "step": 0.01}]}}`),
		returns: imageReturn,
		run: func(_ context.Context, c *Call) error {
			args := arguments{call: c}
			batch, method, factor := args.images("image"), args.text("upscale_method"), args.float("scale_by")
			if args.failure != nil {
				return args.failure
			}
			width := int(math.RoundToEven(float64(batch.width) * factor))
			height := int(math.RoundToEven(float64(batch.height) * factor))
			return returnScaled(c, batch, method, width, height)
		},
	}
}

func returnScaled(c *Call, batch imageBatch, method string, width, height int) error {
	scaled, failure := batch.scale(method, width, height)
	if failure != nil {
		return failure
	}
	c.Return(scaled)
	return nil
}

func imageInvertClass(v version) *class {
	return &class{
		name: "ImageInvert", module: "nodes",
		displayName: v.pick("Invert Image", since{0, 21, 0, "Invert Image Colors"}),
		category:    v.pick("image", since{0, 21, 0, "image/color"}),
		essentials:  v.pick("", since{0, 15, 0, "Image Tools"}), searchAliases: []string{"reverse colors"},
		inputs:  parseInputs(`{"required": {"image": ["IMAGE"]}}`),
		returns: imageReturn,
		run: func(_ context.Context, c *Call) error {
			args := arguments{call: c}
			batch := args.images("image")
			if args.failure != nil {
				return args.failure
			}
			c.Return(batch.invert())
			return nil
		},
	}
}

// imageBlendClass became a schema class with 0.3.61, and its list a COMBO.
func imageBlendClass(v version) *class {
	schema := v.atLeast(0, 3, 61)
	displayName := v.pick("Image Blend", since{0, 3, 61, ""}, since{0, 15, 0, "Image Blend"}, since{0, 21, 0, "Blend Images"})
	mode := `[["normal", "multiply", "screen", "overlay", "soft_light", "difference"]]`
	options := ``
	if schema {
		mode = `["COMBO", {"multiselect": false, "options": ["normal", "multiply", "screen", "overlay", "soft_light", "difference"]}]`
		options = `, {}`
	}
	c := &class{
		name: "ImageBlend", displayName: displayName, module: "comfy_extras.nodes_post_processing", schema: schema,
		category:   v.pick("image/postprocessing", since{0, 22, 0, "image/filters"}),
		essentials: v.pick("", since{0, 18, 0, "Image Tools"}),
		inputs: parseInputs(`{"required": {"image1": ["IMAGE"` + options + `], "image2": ["IMAGE"` + options + `],
			"blend_factor": ["FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}], "blend_mode": ` + mode + `}}`),
		returns: imageReturn,
		run: func(_ context.Context, c *Call) error {
			args := arguments{call: c}
			one, two := args.images("image1"), args.images("image2")
			factor, mode := args.float("blend_factor"), args.text("blend_mode")
			if args.failure != nil {
				return args.failure
			}
			mixed, failure := one.blend(two, mode, float32(factor))
			if failure != nil {
				return failure
			}
			c.Return(mixed)
			return nil
		},
	}
	if v.atLeast(0, 21, 0) {
		c.searchAliases = []string{"mix images"}
	}
	return c
}

// primitiveClass is a value that is a node of its own. These became schema classes with 0.3.57.
func primitiveClass(v version, name, typ string) *class {
	schema := v.atLeast(0, 3, 57)
	multiline := name == "PrimitiveStringMultiline"
	options := `{}`
	switch {
	case multiline:
		options = `{"multiline": true}`
	case typ == "STRING" && schema:
		options = `{"multiline": false}`
	case typ == "INT":
		after := v.pick(`true`, since{0, 21, 0, `"fixed"`})
		options = `{"min": -9223372036854775807, "max": 9223372036854775807, "control_after_generate": ` + after + `}`
	case typ == "FLOAT":
		step := v.pick(``, since{0, 8, 0, `, "step": 0.1`})
		options = `{"min": -9223372036854775807, "max": 9223372036854775807` + step + `}`
	}
	c := &class{
		name: name, displayName: primitiveName(v, name), module: "comfy_extras.nodes_primitive", schema: schema,
		category: v.pick("utils/primitive", since{0, 23, 0, "utilities/primitive"}),
		inputs:   parseInputs(`{"required": {"value": ["` + typ + `", ` + options + `]}}`),
		returns:  []returnSlot{{typ: typ}},
		run: func(_ context.Context, c *Call) error {
			c.Return(c.Inputs["value"])
			return nil
		},
	}
	if multiline {
		c.essentials = v.pick("", since{0, 15, 0, "Basics"})
	}
	if typ == "STRING" && v.atLeast(0, 21, 0) {
		c.searchAliases = []string{"text", "string", "text box", "prompt"}
		if multiline {
			c.searchAliases = []string{"text", "string", "text multiline", "string multiline", "text box", "prompt"}
		}
	}
	c.deprecated = name == "PrimitiveString" && v.atLeast(0, 26, 0) && !v.atLeast(0, 28, 0)
	return c
}

func primitiveName(v version, name string) string {
	switch name {
	case "PrimitiveString":
		return v.pick("String", since{0, 21, 0, "Text String"}, since{0, 26, 0, "Text String (DEPRECATED)"}, since{0, 28, 0, "Text"})
	case "PrimitiveStringMultiline":
		return v.pick("String (Multiline)", since{0, 21, 0, "Text String (Multiline)"}, since{0, 26, 0, "Input Text"},
			since{0, 28, 0, "Text (Multiline)"})
	default:
		return strings.TrimPrefix(name, "Primitive")
	}
}

func saveImageClass(v version) *class {
	c := &class{
		name: "SaveImage", displayName: "Save Image", category: "image", module: "nodes", output: true,
		description:   "Saves the input images to your ComfyUI output directory.",
		essentials:    v.pick("", since{0, 15, 0, "Basics"}),
		searchAliases: []string{"save", "save image", "export image", "output image", "write image", "download"},
		inputs: parseInputs(`{"required": {
			"images": ["IMAGE", {"tooltip": "The images to save."}],
			"filename_prefix": ["STRING", {"default": "ComfyUI", "tooltip": "The prefix for the file to save. This may include ` +
			`formatting information such as %date:yyyy-MM-dd% or %Empty Latent Image.width% to include values from nodes."}]},
			"hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}}`),
		returns: savedReturn(v),
		run: func(ctx context.Context, c *Call) error {
			args := arguments{call: c}
			prefix := args.textOr("filename_prefix", "ComfyUI")
			if args.failure != nil {
				return args.failure
			}
			return saveImages(ctx, c, "output", prefix, png.DefaultCompression)
		},
	}
	return c
}

func previewImageClass(v version) *class {
	return &class{
		name: "PreviewImage", displayName: "Preview Image", category: "image", module: "nodes", output: true,
		description: v.pick("Saves the input images to your ComfyUI output directory.",
			since{0, 28, 0, "Preview the images without saving them to the ComfyUI output directory."}),
		essentials:    v.pick("", since{0, 15, 0, "Basics"}),
		searchAliases: []string{"preview", "preview image", "show image", "view image", "display image", "image viewer"},
		inputs: parseInputs(`{"required": {"images": ["IMAGE"]},
			"hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}}`),
		returns: savedReturn(v),
		run: func(ctx context.Context, c *Call) error {
			prefix, _ := c.object(func() any { return previewPrefix() }).(string)
			return saveImages(ctx, c, "temp", prefix, png.BestSpeed)
		},
	}
}

// savedReturn: saved images can be linked further since 0.26.0.
func savedReturn(v version) []returnSlot {
	if !v.atLeast(0, 26, 0) {
		return nil
	}
	return []returnSlot{{typ: "IMAGE", name: "images"}}
}

// previewPrefix is drawn once for each instance of PreviewImage. The letters are the server's own.
func previewPrefix() string {
	const letters = "abcdefghijklmnopqrstupvxyz"
	name := []byte("ComfyUI_temp_")
	for range 5 {
		name = append(name, letters[rand.IntN(len(letters))])
	}
	return string(name)
}

func saveImages(ctx context.Context, c *Call, kind, prefix string, level png.CompressionLevel) error {
	args := arguments{call: c}
	batch := args.images("images")
	if args.failure != nil {
		return args.failure
	}
	subfolder, name, counter, failure := savePath(c.files(), kind, prefix, batch.width, batch.height)
	if failure != nil {
		return failure
	}
	texts, failure := pngTexts(c)
	if failure != nil {
		return failure
	}
	for n := range batch.count {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := encodePNG(batch.rgba(n), level, texts)
		if err != nil {
			return err
		}
		file := fmt.Sprintf("%s_%05d_.png", strings.ReplaceAll(name, "%batch_num%", strconv.Itoa(n)), counter+n)
		c.files().put(kind, subfolder, file, data)
		c.Put("images", object{{"filename", file}, {"subfolder", subfolder}, {"type", kind}})
	}
	c.Return(batch)
	return nil
}

// pngTexts is the graph under prompt, and what extra_data.extra_pnginfo holds, the editor's graph among it.
func pngTexts(c *Call) ([]textChunk, *NodeError) {
	texts := []textChunk{{"prompt", string(c.promptGraph())}}
	switch info := c.extraPNGInfo().(type) {
	case nil:
	case object:
		for _, f := range info {
			keyword, failure := latin1(f.key)
			if failure != nil {
				return nil, failure
			}
			texts = append(texts, textChunk{keyword, string(pyJSON(f.value))})
		}
	case []any:
		if len(info) > 0 {
			return nil, &NodeError{"TypeError", "list indices must be integers or slices, not " + typeName(info[0])}
		}
	default:
		return nil, &NodeError{"TypeError", fmt.Sprintf("'%s' object is not iterable", typeName(info))}
	}
	return texts, nil
}

// latin1 is the encoding of PNG keywords.
func latin1(s string) (string, *NodeError) {
	out := make([]byte, 0, len(s))
	for i, r := range []rune(s) {
		if r > 0xff {
			return "", &NodeError{"UnicodeEncodeError", fmt.Sprintf(
				"'latin-1' codec can't encode character '\\u%04x' in position %d: ordinal not in range(256)", r, i)}
		}
		out = append(out, byte(r))
	}
	return string(out), nil
}

// savePath finds where files of a prefix go and the first free number: one more than the highest there is.
func savePath(files *fileStore, kind, prefix string, width, height int) (subfolder, name string, counter int, failure *NodeError) {
	if strings.Contains(prefix, "%") {
		prefix = fillIn(prefix, width, height, time.Now())
	}
	subfolder, name = path.Split(path.Clean(prefix))
	if subfolder != "/" {
		subfolder = strings.TrimSuffix(subfolder, "/")
	}
	if strings.HasPrefix(subfolder, "/") || subfolder == ".." || strings.HasPrefix(subfolder, "../") {
		return "", "", 0, &NodeError{"Exception", fmt.Sprintf(
			"**** ERROR: Saving image outside the output folder is not allowed.\n full_output_folder: %s\n         output_dir: %s",
			path.Join("/comfyui", kind, subfolder), path.Join("/comfyui", kind))}
	}
	// The server takes the length of the prefix as it was written: with a slash at its end no file counts, and the
	// number stays 1.
	written := prefix[strings.LastIndex(prefix, "/")+1:]
	for _, file := range files.list(kind, subfolder) {
		runes := []rune(file)
		length := len([]rune(written))
		if len(runes) <= length || string(runes[:length]) != name || runes[length] != '_' {
			continue
		}
		digits, _, _ := strings.Cut(string(runes[length+1:]), "_")
		if n, err := strconv.Atoi(digits); err == nil {
			counter = max(counter, n)
		}
	}
	return subfolder, name, counter + 1, nil
}

// fillIn replaces what a prefix may hold of the image's size and the time.
func fillIn(prefix string, width, height int, now time.Time) string {
	return strings.NewReplacer(
		"%width%", strconv.Itoa(width), "%height%", strconv.Itoa(height),
		"%year%", now.Format("2006"), "%month%", now.Format("01"), "%day%", now.Format("02"),
		"%hour%", now.Format("15"), "%minute%", now.Format("04"), "%second%", now.Format("05"),
	).Replace(prefix)
}

func loadImageClass(v version) *class {
	inputs := parseInputs(`{"required": {"image": [[], {"image_upload": true}]}}`)
	inputs[0].choices = inputImages
	return &class{
		name: "LoadImage", displayName: "Load Image", category: "image", module: "nodes",
		essentials: v.pick("", since{0, 15, 0, "Basics"}),
		searchAliases: []string{
			"load image", "open image", "import image", "image input", "upload image", "read image", "image loader",
		},
		inputs:       inputs,
		returns:      []returnSlot{{typ: "IMAGE"}, {typ: "MASK"}},
		validateArgs: []string{"image"},
		validate: func(env *validation, inputs map[string]any) (string, *exception) {
			name, isText := inputs["image"].(string)
			if !isText {
				return "", raise("AttributeError", "'%s' object has no attribute 'endswith'", typeName(inputs["image"]))
			}
			if !existsAnnotated(env.files, name) {
				return "Invalid image file: " + name, nil
			}
			return "", nil
		},
		changed: func(files *fileStore, inputs map[string]any) string {
			name, _ := inputs["image"].(string)
			found, _ := files.get(annotated(name))
			sum := sha256.Sum256(found.data)
			return hex.EncodeToString(sum[:])
		},
		run: func(_ context.Context, c *Call) error {
			args := arguments{call: c}
			name := args.text("image")
			if args.failure != nil {
				return args.failure
			}
			pictures, failure := readPictures(c.files(), name)
			if failure != nil {
				return failure
			}
			batch, mask, failure := imagesOf(pictures)
			if failure != nil {
				return failure
			}
			c.Return(batch, mask)
			return nil
		},
	}
}

// inputImages lists the pictures at the top of the input folder.
func inputImages(files *fileStore) []any {
	names := slices.Clone(files.list("input", ""))
	slices.Sort(names)
	list := []any{}
	for _, name := range names {
		if strings.HasPrefix(mime.TypeByExtension(path.Ext(name)), "image/") {
			list = append(list, name)
		}
	}
	return list
}

// annotated reads "sub/name.png [output]"; without the note at the end a name is one of the input folder.
func annotated(name string) (kind, subfolder, file string) {
	kind = "input"
	for _, folder := range []string{"output", "input", "temp"} {
		if note := "[" + folder + "]"; strings.HasSuffix(name, note) {
			kind = folder
			name = name[:max(len(name)-len(note)-1, 0)]
			break
		}
	}
	subfolder, file = path.Split(path.Clean("/" + name))
	return kind, strings.Trim(subfolder, "/"), file
}

func existsAnnotated(files *fileStore, name string) bool {
	kind, subfolder, file := annotated(name)
	if file == "" {
		return true // the folder itself
	}
	_, ok := files.get(kind, subfolder, file)
	return ok
}

// readPictures decodes a file of the pod. GIFs give all their frames.
func readPictures(files *fileStore, name string) ([]image.Image, *NodeError) {
	kind, subfolder, file := annotated(name)
	full := path.Join("/comfyui", kind, subfolder, file)
	found, ok := files.get(kind, subfolder, file)
	if !ok {
		return nil, &NodeError{"FileNotFoundError", fmt.Sprintf("[Errno 2] No such file or directory: '%s'", full)}
	}
	unreadable := &NodeError{"PIL.UnidentifiedImageError", fmt.Sprintf("cannot identify image file '%s'", full)}
	header, format, err := image.DecodeConfig(bytes.NewReader(found.data))
	if err != nil {
		return nil, unreadable
	}
	if header.Width < 1 || header.Height < 1 || header.Width > maxImageFloats/channels/header.Height {
		return nil, &NodeError{"PIL.Image.DecompressionBombError", fmt.Sprintf(
			"Image size (%d x %d pixels) exceeds limit of %d pixels, could be decompression bomb DOS attack.",
			header.Width, header.Height, maxImageFloats/channels)}
	}
	if format == "gif" {
		return gifFrames(found.data, unreadable)
	}
	picture, _, err := image.Decode(bytes.NewReader(found.data))
	if err != nil {
		return nil, unreadable
	}
	if orientation := exifOrientation(found.data); format == "jpeg" && orientation != upright {
		picture = turned{picture, orientation}
	}
	return []image.Image{picture}, nil
}

// gifFrames draws each frame onto what the ones before it left.
func gifFrames(data []byte, unreadable *NodeError) ([]image.Image, *NodeError) {
	all, err := gif.DecodeAll(bytes.NewReader(data))
	if err != nil || len(all.Image) == 0 {
		return nil, unreadable
	}
	if len(all.Image) == 1 {
		return []image.Image{all.Image[0]}, nil
	}
	return composeGIF(all), nil
}

// arguments reads the inputs of a call; the first that is wrong fails as the node's Python would.
type arguments struct {
	call    *Call
	failure error
}

func (a *arguments) fail(failure *NodeError) {
	if a.failure == nil {
		a.failure = failure
	}
}

func (a *arguments) text(name string) string {
	text, ok := a.call.Inputs[name].(string)
	if !ok {
		a.fail(&NodeError{"TypeError", fmt.Sprintf("%s must be str, not %s", name, typeName(a.call.Inputs[name]))})
	}
	return text
}

func (a *arguments) textOr(name, missing string) string {
	if _, ok := a.call.Inputs[name]; !ok {
		return missing
	}
	return a.text(name)
}

func (a *arguments) float(name string) float64 {
	switch v := a.call.Inputs[name].(type) {
	case json.Number:
		if f, err := strconv.ParseFloat(string(v), 64); err == nil {
			return f
		}
	case float64:
		return v
	case float32:
		return float64(v)
	case int:
		return float64(v)
	case int64:
		return float64(v)
	case bool:
		if v {
			return 1
		}
		return 0
	}
	a.fail(&NodeError{"TypeError", fmt.Sprintf("%s must be real number, not %s", name, typeName(a.call.Inputs[name]))})
	return 0
}

func (a *arguments) int(name string) int {
	f := a.float(name)
	if a.failure == nil && (f != math.Trunc(f) || math.Abs(f) > math.MaxInt32) {
		a.fail(&NodeError{"TypeError", fmt.Sprintf("%s must be an integer, got %v", name, f)})
		return 0
	}
	return int(f)
}

func (a *arguments) intOr(name string, missing int) int {
	if _, ok := a.call.Inputs[name]; !ok {
		return missing
	}
	return a.int(name)
}

// images takes what a node returned as IMAGE; a scripted node may return any image.Image.
func (a *arguments) images(name string) imageBatch {
	switch v := a.call.Inputs[name].(type) {
	case imageBatch:
		return v
	case image.Image:
		batch, _, failure := imagesOf([]image.Image{v})
		if failure != nil {
			a.fail(failure)
		}
		return batch
	case string:
		a.fail(&NodeError{"AttributeError", "'str' object has no attribute 'shape'"})
	default:
		a.fail(&NodeError{"TypeError", fmt.Sprintf("'%s' object is not subscriptable", typeName(v))})
	}
	return imageBatch{}
}
