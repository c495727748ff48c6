package comfyui_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/comfypod/comfyui"
	"github.com/comfypod/comfyui/comfyuitest/storetest"
)

func TestMemoryStoreConforms(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(*testing.T) comfyui.Store { return comfyui.NewMemoryStore() }, nil)
}

func TestMemoryStoreConformsInVirtualTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		storetest.Run(t, func(*testing.T) comfyui.Store { return comfyui.NewMemoryStore() }, time.Sleep)
	})
}
