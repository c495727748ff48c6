package comfyuitest

import (
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/gif"
	"math"
	"slices"
	"strings"
)

// channels of an image between nodes. The server keeps an alpha channel apart, as a mask.
const channels = 3

// maxImageFloats bounds what a node may allocate: 1 GiB, past which a real server of modest size is out of memory as well.
const maxImageFloats = 1 << 28

// imageBatch is an IMAGE as it passes between nodes: count images of one size, rows of RGB values from 0 to 1.
type imageBatch struct {
	count, width, height int
	pix                  []float32
}

// maskBatch is a MASK: 1 where the image is transparent.
type maskBatch struct {
	count, width, height int
	pix                  []float32
}

func newImageBatch(count, width, height int) (imageBatch, *NodeError) {
	if count < 1 || width < 1 || height < 1 {
		return imageBatch{}, &NodeError{"RuntimeError", fmt.Sprintf(
			"Trying to create tensor with negative dimension: [%d, %d, %d, %d]", count, height, width, channels)}
	}
	if count > maxImageFloats/channels/width/height {
		return imageBatch{}, &NodeError{"RuntimeError", fmt.Sprintf(
			"[enforce fail at alloc_cpu.cpp] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "+
				"[%d, %d, %d, %d] floats", count, height, width, channels)}
	}
	return imageBatch{count, width, height, make([]float32, count*width*height*channels)}, nil
}

// frame is the values of one image.
func (b imageBatch) frame(n int) []float32 {
	size := b.width * b.height * channels
	return b.pix[n*size : (n+1)*size]
}

// like is an empty batch of as many images as b, of another size.
func (b imageBatch) like(width, height int) (imageBatch, *NodeError) {
	return newImageBatch(b.count, width, height)
}

// String is Python's str of the tensor.
func (b imageBatch) String() string {
	return tensorText([]int{b.count, b.height, b.width, channels}, b.pix)
}

// String is Python's str of the tensor.
func (b maskBatch) String() string {
	return tensorText([]int{b.count, b.height, b.width}, b.pix)
}

// rgba is image n as SaveImage writes it: values are cut to eight bits, not rounded.
func (b imageBatch) rgba(n int) *image.RGBA {
	img := image.NewRGBA(image.Rect(0, 0, b.width, b.height))
	frame := b.frame(n)
	for i, j := 0, 0; i < len(frame); i, j = i+channels, j+4 {
		img.Pix[j], img.Pix[j+1], img.Pix[j+2], img.Pix[j+3] = toByte(frame[i]), toByte(frame[i+1]), toByte(frame[i+2]), 0xff
	}
	return img
}

func toByte(v float32) uint8 {
	return uint8(min(max(255*v, 0), 255))
}

// imagesOf makes a batch of pictures of one size; those of another size than the first are left out. Transparency goes
// into the mask, which is 64 by 64 and empty for pictures that have none.
func imagesOf(pictures []image.Image) (imageBatch, maskBatch, *NodeError) {
	size := pictures[0].Bounds().Size()
	same := pictures[:0:0]
	for _, picture := range pictures {
		if picture.Bounds().Size() == size {
			same = append(same, picture)
		}
	}
	batch, failure := newImageBatch(len(same), size.X, size.Y)
	if failure != nil {
		return imageBatch{}, maskBatch{}, failure
	}
	mask := maskBatch{count: len(same), width: 64, height: 64}
	transparent := !isOpaque(same[0])
	if transparent {
		mask.width, mask.height = size.X, size.Y
	}
	mask.pix = make([]float32, mask.count*mask.width*mask.height)
	i := 0
	for _, picture := range same {
		bounds := picture.Bounds()
		for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
			for x := bounds.Min.X; x < bounds.Max.X; x++ {
				c := nrgbaAt(picture, x, y)
				batch.pix[i*channels] = float32(c.R) / 255
				batch.pix[i*channels+1] = float32(c.G) / 255
				batch.pix[i*channels+2] = float32(c.B) / 255
				if transparent {
					mask.pix[i] = 1 - float32(c.A)/255
				}
				i++
			}
		}
	}
	return batch, mask, nil
}

// isOpaque tells whether the picture's format has no alpha channel, or a palette without transparency.
func isOpaque(picture image.Image) bool {
	switch picture := picture.(type) {
	case *image.NRGBA, *image.NRGBA64:
		return false
	case *image.Paletted:
		for _, c := range picture.Palette {
			if _, _, _, a := c.RGBA(); a != 0xffff {
				return false
			}
		}
	}
	return true
}

func nrgbaAt(picture image.Image, x, y int) color.NRGBA {
	switch picture := picture.(type) {
	case *image.NRGBA:
		return picture.NRGBAAt(x, y)
	case *image.RGBA:
		if c := picture.RGBAAt(x, y); c.A == 0xff {
			return color.NRGBA(c)
		}
	}
	c, _ := color.NRGBAModel.Convert(picture.At(x, y)).(color.NRGBA)
	return c
}

// composeGIF draws each frame of an animation onto what the ones before it left.
func composeGIF(all *gif.GIF) []image.Image {
	bounds := image.Rect(0, 0, all.Config.Width, all.Config.Height)
	canvas := image.NewNRGBA(bounds)
	frames := make([]image.Image, 0, len(all.Image))
	for i, frame := range all.Image {
		before := slices.Clone(canvas.Pix)
		draw.Draw(canvas, frame.Bounds(), frame, frame.Bounds().Min, draw.Over)
		frames = append(frames, &image.NRGBA{Pix: slices.Clone(canvas.Pix), Stride: canvas.Stride, Rect: bounds})
		switch all.Disposal[i] {
		case gif.DisposalBackground:
			draw.Draw(canvas, frame.Bounds(), image.Transparent, image.Point{}, draw.Src)
		case gif.DisposalPrevious:
			canvas.Pix = before
		}
	}
	return frames
}

// invert is 1 - b.
func (b imageBatch) invert() imageBatch {
	out := b
	out.pix = make([]float32, len(b.pix))
	for i, v := range b.pix {
		out.pix[i] = 1 - v
	}
	return out
}

// centerCrop cuts b to the aspect of width and height, equally on both sides.
func (b imageBatch) centerCrop(width, height int) imageBatch {
	oldAspect := float64(b.width) / float64(b.height)
	newAspect := float64(width) / float64(height)
	x, y := 0, 0
	switch {
	case oldAspect > newAspect:
		x = int(math.RoundToEven((float64(b.width) - float64(b.width)*(newAspect/oldAspect)) / 2))
	case oldAspect < newAspect:
		y = int(math.RoundToEven((float64(b.height) - float64(b.height)*(oldAspect/newAspect)) / 2))
	}
	if x == 0 && y == 0 {
		return b
	}
	out := imageBatch{count: b.count, width: b.width - 2*x, height: b.height - 2*y}
	out.pix = make([]float32, 0, out.count*out.width*out.height*channels)
	for n := range b.count {
		frame := b.frame(n)
		for row := y; row < b.height-y; row++ {
			start := (row*b.width + x) * channels
			out.pix = append(out.pix, frame[start:start+out.width*channels]...)
		}
	}
	return out
}

// The methods of ImageScale.
const (
	methodNearest  = "nearest-exact"
	methodBilinear = "bilinear"
	methodArea     = "area"
	methodBicubic  = "bicubic"
	methodLanczos  = "lanczos"
)

// scale resizes every image, with the same sampling as torch's interpolate; lanczos goes through eight bits, as Pillow does it.
func (b imageBatch) scale(method string, width, height int) (imageBatch, *NodeError) {
	out, failure := b.like(width, height)
	if failure != nil {
		return imageBatch{}, failure
	}
	columns, rows := tapsFor(method, b.width, width), tapsFor(method, b.height, height)
	for n := range b.count {
		source := b.frame(n)
		if method == methodLanczos {
			source = throughBytes(source, toByte)
		}
		// The order shows where steps are rounded: Pillow goes by the smaller picture in between.
		if width*b.height <= b.width*height {
			source = resizeRows(source, b.width, b.height, columns, method)
			source = resizeColumns(source, width, b.height, rows, method)
		} else {
			source = resizeColumns(source, b.width, b.height, rows, method)
			source = resizeRows(source, b.width, height, columns, method)
		}
		copy(out.frame(n), source)
	}
	return out, nil
}

// taps are the source positions that make one target position.
type taps struct {
	first   int
	weights []float32
}

func tapsFor(method string, from, to int) []taps {
	list := make([]taps, to)
	for i := range list {
		switch method {
		case methodBilinear:
			list[i] = bilinearTaps(i, from, to)
		case methodArea:
			list[i] = areaTaps(i, from, to)
		case methodBicubic:
			list[i] = bicubicTaps(i, from, to)
		case methodLanczos:
			list[i] = lanczosTaps(i, from, to)
		default:
			nearest := int((float32(i) + 0.5) * (float32(from) / float32(to)))
			list[i] = taps{min(nearest, from-1), []float32{1}}
		}
	}
	return list
}

func bilinearTaps(i, from, to int) taps {
	at := max((float32(i)+0.5)*(float32(from)/float32(to))-0.5, 0)
	first := min(int(at), from-1)
	if first == from-1 {
		return taps{first, []float32{1}}
	}
	part := at - float32(first)
	return taps{first, []float32{1 - part, part}}
}

// areaTaps average all that the target pixel covers, even in part.
func areaTaps(i, from, to int) taps {
	first := i * from / to
	end := ((i+1)*from + to - 1) / to
	weights := make([]float32, end-first)
	for k := range weights {
		weights[k] = 1 / float32(len(weights))
	}
	return taps{first, weights}
}

// bicubicTaps: Keys' kernel with a = -0.75; beyond the border the last pixel repeats.
func bicubicTaps(i, from, to int) taps {
	const a = -0.75
	at := (float64(i)+0.5)*(float64(from)/float64(to)) - 0.5
	base := int(math.Floor(at))
	part := at - float64(base)
	near := func(x float64) float64 { return ((a+2)*x-(a+3))*x*x + 1 }
	far := func(x float64) float64 { return ((a*x-5*a)*x+8*a)*x - 4*a }
	kernel := [4]float64{far(part + 1), near(part), near(1 - part), far(2 - part)}
	first := min(max(base-1, 0), from-1)
	last := min(max(base+2, 0), from-1)
	weights := make([]float32, last-first+1)
	for k, weight := range kernel {
		weights[min(max(base-1+k, 0), from-1)-first] += float32(weight)
	}
	return taps{first, weights}
}

// lanczosTaps: three lobes, widened when the image shrinks.
func lanczosTaps(i, from, to int) taps {
	scale := float64(from) / float64(to)
	stretch := max(scale, 1)
	support := 3 * stretch
	center := (float64(i) + 0.5) * scale
	first := max(int(center-support+0.5), 0)
	end := min(int(center+support+0.5), from)
	exact := make([]float64, end-first)
	sum := 0.0
	for k := range exact {
		exact[k] = lanczos((float64(k+first) - center + 0.5) / stretch)
		sum += exact[k]
	}
	weights := make([]float32, len(exact))
	for k := range weights {
		weights[k] = float32(exact[k] / sum)
	}
	return taps{first, weights}
}

func lanczos(x float64) float64 {
	if x < -3 || x >= 3 {
		return 0
	}
	return sinc(x) * sinc(x/3)
}

func sinc(x float64) float64 {
	if x == 0 {
		return 1
	}
	x *= math.Pi
	return math.Sin(x) / x
}

func resizeRows(source []float32, width, height int, columns []taps, method string) []float32 {
	out := make([]float32, len(columns)*height*channels)
	at := 0
	for y := range height {
		row := source[y*width*channels : (y+1)*width*channels]
		for _, t := range columns {
			for c := range channels {
				var sum float32
				for k, weight := range t.weights {
					sum += weight * row[(t.first+k)*channels+c]
				}
				out[at] = sum
				at++
			}
		}
	}
	if method == methodLanczos {
		return throughBytes(out, roundedByte)
	}
	return out
}

func resizeColumns(source []float32, width, height int, rows []taps, method string) []float32 {
	stride := width * channels
	out := make([]float32, len(rows)*stride)
	for y, t := range rows {
		target := out[y*stride : (y+1)*stride]
		for k, weight := range t.weights {
			row := source[(t.first+k)*stride : (t.first+k+1)*stride]
			for x, v := range row {
				target[x] += weight * v
			}
		}
	}
	if method == methodLanczos {
		return throughBytes(out, roundedByte)
	}
	return out
}

func roundedByte(v float32) uint8 { return uint8(min(max(255*v+0.5, 0), 255)) }

// throughBytes gives values the steps of eight bits.
func throughBytes(values []float32, toByte func(float32) uint8) []float32 {
	out := make([]float32, len(values))
	for i, v := range values {
		out[i] = float32(toByte(v)) / 255
	}
	return out
}

// blend mixes b with other, which is first brought to b's size.
func (b imageBatch) blend(other imageBatch, mode string, factor float32) (imageBatch, *NodeError) {
	if other.width != b.width || other.height != b.height {
		var failure *NodeError
		if other, failure = other.centerCrop(b.width, b.height).scale(methodBicubic, b.width, b.height); failure != nil {
			return imageBatch{}, failure
		}
	}
	mix, ok := blendModes[mode]
	if !ok {
		return imageBatch{}, &NodeError{"ValueError", "Unsupported blend mode: " + mode}
	}
	if b.count != other.count && b.count != 1 && other.count != 1 {
		return imageBatch{}, &NodeError{"RuntimeError", fmt.Sprintf(
			"The size of tensor a (%d) must match the size of tensor b (%d) at non-singleton dimension 0", b.count, other.count)}
	}
	out, failure := newImageBatch(max(b.count, other.count), b.width, b.height)
	if failure != nil {
		return imageBatch{}, failure
	}
	for n := range out.count {
		one, two, target := b.frame(min(n, b.count-1)), other.frame(min(n, other.count-1)), out.frame(n)
		for i := range target {
			target[i] = min(max(one[i]*(1-factor)+mix(one[i], two[i])*factor, 0), 1)
		}
	}
	return out, nil
}

var blendModes = map[string]func(a, b float32) float32{
	"normal":   func(_, b float32) float32 { return b },
	"multiply": func(a, b float32) float32 { return a * b },
	"screen":   func(a, b float32) float32 { return 1 - (1-a)*(1-b) },
	"overlay": func(a, b float32) float32 {
		if a <= 0.5 {
			return 2 * a * b
		}
		return 1 - 2*(1-a)*(1-b)
	},
	"soft_light": func(a, b float32) float32 {
		if b <= 0.5 {
			return a - (1-2*b)*a*(1-a)
		}
		bright := float32(math.Sqrt(float64(a)))
		if a <= 0.25 {
			bright = ((16*a-12)*a + 4) * a
		}
		return a + (2*b-1)*(bright-a)
	},
	"difference": func(a, b float32) float32 { return a - b },
}

// The limits of torch's printing: above so many values, only the edges of each dimension are shown.
const (
	tensorThreshold = 1000
	tensorEdge      = 3
	tensorLine      = 80
	tensorIndent    = len("tensor(")
)

// tensorText is how torch prints a tensor.
func tensorText(shape []int, values []float32) string {
	t := tensorPrinter{shape: shape, values: values, short: len(values) > tensorThreshold}
	t.measure()
	return "tensor(" + t.dimension(0, 0, tensorIndent) + ")"
}

type tensorPrinter struct {
	shape  []int
	values []float32
	short  bool
	verb   string
	suffix string
	width  int
}

// shown lists the positions of a dimension that are printed; -1 stands for the gap.
func (t *tensorPrinter) shown(dimension int) []int {
	n := t.shape[dimension]
	list := make([]int, 0, min(n, 2*tensorEdge+1))
	for i := range n {
		if t.short && n > 2*tensorEdge && i >= tensorEdge && i < n-tensorEdge {
			if i == tensorEdge {
				list = append(list, -1)
			}
			continue
		}
		list = append(list, i)
	}
	return list
}

// visit calls f for each printed value.
func (t *tensorPrinter) visit(dimension, offset int, f func(float64)) {
	if dimension == len(t.shape) {
		f(float64(t.values[offset]))
		return
	}
	for _, i := range t.shown(dimension) {
		if i >= 0 {
			t.visit(dimension+1, offset*t.shape[dimension]+i, f)
		}
	}
}

// measure chooses between whole numbers, four decimals and exponents, and the width of a value.
func (t *tensorPrinter) measure() {
	whole, least, most := true, math.Inf(1), 0.0
	t.visit(0, 0, func(v float64) {
		if v != 0 {
			whole = whole && v == math.Ceil(v)
			least, most = min(least, math.Abs(v)), max(most, math.Abs(v))
		}
	})
	switch {
	case most == 0:
		t.verb, t.suffix = "%.0f", "."
		return
	case most/least > 1000 || most > 1e8 || !whole && least < 1e-4:
		t.verb = "%.4e"
	case whole:
		t.verb, t.suffix = "%.0f", "."
	default:
		t.verb = "%.4f"
	}
	t.visit(0, 0, func(v float64) {
		if v != 0 {
			t.width = max(t.width, len(t.format(v)))
		}
	})
}

func (t *tensorPrinter) format(v float64) string {
	text := fmt.Sprintf(t.verb, v) + t.suffix
	return strings.Repeat(" ", max(t.width-len(text), 0)) + text
}

func (t *tensorPrinter) dimension(dimension, offset, indent int) string {
	last := dimension == len(t.shape)-1
	var parts []string
	for _, i := range t.shown(dimension) {
		inner := offset*t.shape[dimension] + i
		switch {
		case i < 0 && last:
			parts = append(parts, " ...")
		case i < 0:
			parts = append(parts, "...")
		case last:
			parts = append(parts, t.format(float64(t.values[inner])))
		default:
			parts = append(parts, t.dimension(dimension+1, inner, indent+1))
		}
	}
	if !last {
		separator := "," + strings.Repeat("\n", len(t.shape)-1-dimension) + strings.Repeat(" ", indent+1)
		return "[" + strings.Join(parts, separator) + "]"
	}
	perLine := max((tensorLine-indent)/(max(t.width, 1)+2), 1)
	var lines []string
	for start := 0; start < len(parts); start += perLine {
		lines = append(lines, strings.Join(parts[start:min(start+perLine, len(parts))], ", "))
	}
	return "[" + strings.Join(lines, ",\n"+strings.Repeat(" ", indent+1)) + "]"
}
