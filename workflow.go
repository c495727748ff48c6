package comfyui

type Workflow struct{ _ *struct{} }

type Node struct {
	ID, Class, Title string
	Inputs           map[string]any // a copy; a link is a Link
}

type Link struct {
	Node string
	Slot int
}
