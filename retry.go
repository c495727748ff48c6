package comfyui

import (
	"time"
)

// RetryPolicy: MaxAttempts counts the first try; 0 and 1 mean no retry, so the zero policy never retries. MaxElapsed 0: no
// bound but ctx. Policies apply to calls (network, timeout, unavailable, overloaded, protocol, storage) and to new attempts
// (lost: 2 in all; out_of_memory: 2, after /free; pod_fault, interrupted, execution, missing_asset: 1, but a Pool may move
// pod_fault and missing_asset to another pod).
type RetryPolicy struct {
	MaxAttempts                              int
	InitialInterval, MaxInterval, MaxElapsed time.Duration
	Multiplier, Jitter                       float64
}
