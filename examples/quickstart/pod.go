package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"image"
	"image/color"
	"image/png"
	"math"
	"math/cmplx"
	"strconv"
	"time"

	"github.com/comfypod/comfyui/comfyuitest"
)

// startPod starts a pod inside this program, with a node beside the built-in ones that takes its time, as a sampler does.
func startPod() *comfyuitest.Pod {
	return comfyuitest.NewPod(comfyuitest.WithNode("DrawJulia", comfyuitest.Node{
		Output: true,
		Inputs: map[string]any{
			"width":           []any{"INT", map[string]any{"default": 512, "min": 16, "max": 2048}},
			"height":          []any{"INT", map[string]any{"default": 512, "min": 16, "max": 2048}},
			"real":            []any{"FLOAT", map[string]any{"default": -0.8, "min": -2.0, "max": 2.0}},
			"imaginary":       []any{"FLOAT", map[string]any{"default": 0.156, "min": -2.0, "max": 2.0}},
			"steps":           []any{"INT", map[string]any{"default": 40, "min": 1, "max": 1000}},
			"filename_prefix": []any{"STRING", map[string]any{"default": "julia"}},
		},
		Run: drawJulia,
	}))
}

// stepTime is how long a step takes, that there be something to see.
const stepTime = 60 * time.Millisecond

// drawJulia draws a Julia set, one iteration a step, with a preview now and then.
func drawJulia(ctx context.Context, c *comfyuitest.Call) error {
	width, height, steps := intInput(c, "width"), intInput(c, "height"), intInput(c, "steps")
	j := newJulia(width, height, complex(floatInput(c, "real"), floatInput(c, "imaginary")))
	ticker := time.NewTicker(stepTime)
	defer ticker.Stop()
	for step := 1; step <= steps; step++ {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		j.iterate()
		if step%10 != 0 {
			c.Progress(float64(step), float64(steps))
			continue
		}
		preview, err := encode(j.picture(), nil)
		if err != nil {
			return err
		}
		c.ProgressPreview(float64(step), float64(steps), "image/png", preview)
	}
	// As SaveImage does: the file carries the workflow that made it.
	picture, err := encode(j.picture(), graphOf(c))
	if err != nil {
		return err
	}
	c.Save("images", "output", fmt.Sprintf("%v_00001_.png", c.Inputs["filename_prefix"]), picture)
	return nil
}

// Validation has made numbers of them.
func intInput(c *comfyuitest.Call, name string) int {
	n, _ := strconv.Atoi(fmt.Sprint(c.Inputs[name]))
	return n
}

func floatInput(c *comfyuitest.Call, name string) float64 {
	f, _ := strconv.ParseFloat(fmt.Sprint(c.Inputs[name]), 64)
	return f
}

func graphOf(c *comfyuitest.Call) json.RawMessage {
	for _, p := range c.Pod().Prompts() {
		if p.ID == c.PromptID {
			return p.Graph
		}
	}
	return nil
}

// julia is the set of z → z² + c, each pixel with the iteration at which it ran away.
type julia struct {
	c       complex128
	points  []complex128
	escaped []float64 // 0: not yet
	bounds  image.Rectangle
	done    int
}

func newJulia(width, height int, c complex128) *julia {
	j := &julia{c: c, bounds: image.Rect(0, 0, width, height), points: make([]complex128, width*height), escaped: make([]float64, width*height)}
	scale := 3 / float64(max(min(width, height), 1))
	for i := range j.points {
		x, y := i%width, i/width
		j.points[i] = complex((float64(x)-float64(width)/2)*scale, (float64(y)-float64(height)/2)*scale)
	}
	return j
}

func (j *julia) iterate() {
	j.done++
	for i, z := range j.points {
		if j.escaped[i] > 0 {
			continue
		}
		z = z*z + j.c
		j.points[i] = z
		if r := cmplx.Abs(z); r > 16 {
			j.escaped[i] = math.Max(0.01, float64(j.done)+1-math.Log2(math.Log2(r)))
		}
	}
}

func (j *julia) picture() image.Image {
	img := image.NewNRGBA(j.bounds)
	wave := func(t, phase float64) uint8 { return uint8(127.5 + 127.5*math.Cos(6.28*(t+phase))) }
	for i, n := range j.escaped {
		pixel := color.NRGBA{A: 255}
		if n > 0 {
			t := math.Sqrt(n) / 8
			pixel = color.NRGBA{wave(t, 0.5), wave(t, 0.6), wave(t, 0.75), 255}
		}
		img.SetNRGBA(i%j.bounds.Dx(), i/j.bounds.Dx(), pixel)
	}
	return img
}

// encode is a PNG with the workflow in a text chunk "prompt" behind the header, as ComfyUI's own files have it.
func encode(img image.Image, workflow []byte) ([]byte, error) {
	var b bytes.Buffer
	if err := png.Encode(&b, img); err != nil || workflow == nil {
		return b.Bytes(), err
	}
	const header = 8 + 12 + 13 // signature and IHDR
	data := append([]byte("tEXtprompt\x00"), workflow...)
	chunk := binary.BigEndian.AppendUint32(nil, uint32(len(data)-4))
	chunk = append(chunk, data...)
	chunk = binary.BigEndian.AppendUint32(chunk, crc32.ChecksumIEEE(data))
	file := b.Bytes()
	return bytes.Join([][]byte{file[:header], chunk, file[header:]}, nil), nil
}
