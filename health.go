package comfyui

import (
	"time"
)

type HealthState string

const (
	HealthReady    HealthState = "ready"
	HealthBusy     HealthState = "busy"     // works, and has jobs
	HealthStarting HealthState = "starting" // refuses or 502/503, never yet ready
	HealthDegraded HealthState = "degraded" // HTTP works, the stream does not
	HealthStalled  HealthState = "stalled"  // jobs wait and none runs
	HealthPoisoned HealthState = "poisoned" // a CUDA fault that only a restart clears
	HealthDown     HealthState = "down"
)

type StreamState string

const (
	StreamIdle       StreamState = "idle" // not needed: no job is followed
	StreamConnecting StreamState = "connecting"
	StreamUp         StreamState = "up"
	StreamDeaf       StreamState = "deaf"
	StreamDown       StreamState = "down"
)

type Health struct {
	Pod              string
	State            HealthState
	Version          string
	Devices          []Device
	Running, Pending int
	Latency          time.Duration
	Stream           StreamState
	Reasons          []string
	CheckedAt        time.Time
}
