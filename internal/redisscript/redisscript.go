// Package redisscript holds the Lua scripts of the Redis store. Each is atomic, touches the keys of one hash slot, takes its
// times from the server, and gives the same result when it is run again with the same arguments. They need Redis 6.2 or
// later, and no function libraries.
package redisscript

import (
	_ "embed" // the scripts

	"github.com/redis/go-redis/v9"
)

var (
	//go:embed common.lua
	common string
	//go:embed create.lua
	create string
	//go:embed get.lua
	get string
	//go:embed update.lua
	update string
	//go:embed claim.lua
	claim string
	//go:embed renew.lua
	renew string
	//go:embed release.lua
	release string
	//go:embed cancel.lua
	cancel string
	//go:embed cancels.lua
	cancels string
	//go:embed scan.lua
	scan string
	//go:embed read.lua
	read string
	//go:embed forget.lua
	forget string
)

// The scripts; each file says what its keys and arguments are.
var (
	Create        = redis.NewScript(common + create)
	Get           = redis.NewScript(common + get)
	Update        = redis.NewScript(common + update)
	Claim         = redis.NewScript(common + claim)
	Renew         = redis.NewScript(common + renew)
	Release       = redis.NewScript(common + release)
	RequestCancel = redis.NewScript(common + cancel)
	Cancels       = redis.NewScript(cancels)
	Scan          = redis.NewScript(scan)
	Read          = redis.NewScript(read)
	Forget        = redis.NewScript(forget)
)

// Fields are those of a job's hash that make up a record, in the order in which replies have them.
var Fields = []string{"owner", "epoch", "rev", "lease", "cancel", "record", "workflow"}

// The verdicts that begin a reply. Written is followed by the first five of Fields; There, Held and Fenced by all; Schema by the
// stored schema; Absent and NeedWorkflow by nothing.
const (
	Written      = "written"
	There        = "there"
	Absent       = "absent"
	Held         = "held"
	Fenced       = "fenced"
	Schema       = "schema"
	NeedWorkflow = "workflow"
)
