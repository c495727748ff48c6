package main

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/comfypod/comfyui"
)

func TestAssign(t *testing.T) {
	t.Parallel()
	const graph = `{
		"3": {"class_type": "KSampler", "inputs": {"seed": 1, "cfg": 7.5, "sampler_name": "euler", "model": ["4", 0]}, "_meta": {"title": "Sampler v1.5"}},
		"4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}, "_meta": {"title": "a=b.c"}},
		"57:8": {"class_type": "Resize", "inputs": {"resize_type": "by size", "resize_type.width": 512}}
	}`
	for _, test := range []struct {
		set         string
		node, input string
		want        any
	}{
		{"3.seed=18446744073709551615", "3", "seed", uint64(18446744073709551615)},
		{"KSampler.cfg=8", "3", "cfg", int64(8)},
		{"KSampler.cfg=1e1", "3", "cfg", 10.0},
		{"Sampler v1.5.seed=2", "3", "seed", int64(2)},
		{"3.sampler_name=dpmpp_2m", "3", "sampler_name", "dpmpp_2m"},
		{`3.sampler_name="5"`, "3", "sampler_name", "5"},
		{"3.sampler_name=", "3", "sampler_name", ""},
		{"3.sampler_name=a=b.c", "3", "sampler_name", "a=b.c"},
		{"3.sampler_name=true", "3", "sampler_name", true},
		{"3.sampler_name=null", "3", "sampler_name", nil},
		{"3.sampler_name=a photo of 3.5 cats", "3", "sampler_name", "a photo of 3.5 cats"},
		{`3.model=["57:8", 1]`, "3", "model", comfyui.Link{Node: "57:8", Slot: 1}},
		{"a=b.c.ckpt_name=b.safetensors", "4", "ckpt_name", "b.safetensors"},
		{"57:8.resize_type.width=640", "57:8", "resize_type.width", int64(640)},
		{"Resize.resize_type=by side", "57:8", "resize_type", "by side"},
	} {
		t.Run(test.set, func(t *testing.T) {
			t.Parallel()
			w, err := comfyui.ParseWorkflow([]byte(graph))
			require.NoError(t, err)
			before, err := json.Marshal(w)
			require.NoError(t, err)
			a, err := parseAssignment(test.set)
			require.NoError(t, err)
			require.NoError(t, assign(w, []assignment{a}))
			got, err := w.Get(test.node, test.input)
			require.NoError(t, err)
			assert.Equal(t, test.want, got)
			after, err := json.Marshal(w)
			require.NoError(t, err)
			assert.NotEqual(t, string(before), string(after))
		})
	}
}

func TestAssignTellsTheLikelyMistake(t *testing.T) {
	t.Parallel()
	w, err := comfyui.ParseWorkflow([]byte(`{"3": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "Sampler v1.5"}}}`))
	require.NoError(t, err)
	for set, want := range map[string]string{
		"Sampler v1.5.sed=2": `has no input "sed"; it has seed`,
		"4.seed=2":           `no node has the id, title or class "4"`,
		".seed=2":            "want NODE.INPUT=VALUE",
		"3.=2":               "want NODE.INPUT=VALUE",
	} {
		assert.ErrorContains(t, assign(w, []assignment{assignment(set)}), want, set)
	}
	for _, set := range []string{"", "=", "3", "3.seed", "seed=1", "..=1"} {
		_, err := parseAssignment(set)
		assert.ErrorContains(t, err, "want NODE.INPUT=VALUE", set)
	}
}
