// Package testdata holds the workflows that the quickstart runs, so that it finds them wherever it is started. It is no part of the
// API.
package testdata

import _ "embed"

// Workflow makes one image with nodes that every ComfyUI has, without a model.
//
//go:embed workflow.json
var Workflow []byte

// StepsWorkflow is Workflow with a node beside it that takes some seconds and reports its steps. Only the quickstart's embedded pod has
// that node, DrawJulia.
//
//go:embed workflow-steps.json
var StepsWorkflow []byte
