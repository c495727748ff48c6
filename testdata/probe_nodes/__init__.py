"""Nodes that make a real ComfyUI server show its hard behaviours without any model.

Put this folder into custom_nodes/. Every node has a `seed` input: change it to defeat the cache.
Works on ComfyUI 0.3.64 and later. Test tool only: some nodes hang or break the server on purpose.
"""

import asyncio
import ctypes
import os
import time

import folder_paths
import torch
from comfy.utils import ProgressBar
from comfy_execution.graph_utils import GraphBuilder
from PIL import Image, ImageDraw
from server import PromptServer

try:
    from comfy_execution.graph_utils import ExecutionBlocker
except ImportError:  # before 0.3.48
    from comfy_execution.graph import ExecutionBlocker

CATEGORY = "probe"
SEED = ("INT", {"default": 0, "min": 0, "max": 2**63})
SECONDS = ("FLOAT", {"default": 0.1, "min": 0.0, "max": 3600.0, "step": 0.01})
STEPS = ("INT", {"default": 5, "min": 0, "max": 100000})

# Four latent channels to RGB: any numbers do, the preview only has to look like one.
LATENT_TO_RGB = [[0.35, 0.21, 0.20], [0.32, 0.38, 0.22], [-0.19, 0.01, 0.31], [-0.25, -0.18, -0.47]]


class FatalProbe(BaseException):
    """Not an Exception, so the server's executor does not catch it."""


def blank_image(width=8, height=8):
    return torch.zeros((1, height, width, 3))


def draw_preview(value, total, size=48):
    image = Image.new("RGB", (size, size), (20, 20, 60))
    width = size * value // max(total, 1)
    ImageDraw.Draw(image).rectangle((0, 0, width, size), fill=(200, 120, 30))
    return image


def latent_preview_image():
    from latent_preview import Latent2RGBPreviewer

    previewer = Latent2RGBPreviewer(LATENT_TO_RGB)
    return previewer.decode_latent_to_preview_image("JPEG", torch.randn(1, 4, 8, 8))


def make_preview(kind, value, total):
    """What ProgressBar.update_absolute takes as preview: (format, PIL image, longest side)."""
    if kind == "latent":
        return latent_preview_image()
    if kind == "jpeg":
        return ("JPEG", draw_preview(value, total), 64)
    if kind == "png":
        return ("PNG", draw_preview(value, total), 64)
    return None


def save_file(kind, subfolder, name, data):
    """Write bytes under the output or temp folder; return the file's entry for a ui list."""
    root = folder_paths.get_temp_directory() if kind == "temp" else folder_paths.get_output_directory()
    folder = os.path.join(root, subfolder)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as f:
        f.write(data)
    return {"filename": name, "subfolder": subfolder, "type": kind}


def png_bytes(number, size=8):
    from io import BytesIO

    buffer = BytesIO()
    Image.new("RGB", (size, size), (number * 37 % 256, number * 91 % 256, number % 256)).save(buffer, "PNG")
    return buffer.getvalue()


class ProbeSleep:
    """`bars` progress bars of `steps` steps, `seconds` a step, one after the other."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"steps": STEPS, "seconds": SECONDS, "seed": SEED},
            "optional": {
                "image": ("IMAGE",),
                "preview": (["none", "latent", "jpeg", "png"],),
                "bars": ("INT", {"default": 1, "min": 1, "max": 100}),
            },
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, steps, seconds, seed, image=None, preview="none", bars=1):
        for _ in range(bars):
            bar = ProgressBar(steps)
            for step in range(steps):
                time.sleep(seconds)
                bar.update_absolute(step + 1, steps, make_preview(preview, step + 1, steps))
        return (blank_image() if image is None else image,)


class ProbeSleepAsync:
    """Like ProbeSleep, as an async node: several of them run at the same time."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": STEPS, "seconds": SECONDS, "seed": SEED}, "optional": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    async def run(self, steps, seconds, seed, image=None):
        bar = ProgressBar(steps)
        for _ in range(steps):
            await asyncio.sleep(seconds)
            bar.update(1)
        return (blank_image() if image is None else image,)


class ProbeSleepSilent:
    """Sleeps without any progress tick, so an interrupt is not seen before the node ends."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": SECONDS, "seed": SEED}, "optional": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, seconds, seed, image=None):
        time.sleep(seconds)
        return (blank_image() if image is None else image,)


class ProbeList:
    """A list of `count` images: the node behind it runs once for each, with the same node id."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {"default": 3, "min": 0, "max": 1000}), "seed": SEED}}

    RETURN_TYPES = ("IMAGE",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, count, seed):
        return ([blank_image() for _ in range(count)],)


RAISERS = {
    "RuntimeError": lambda m: RuntimeError(m or "probe failed"),
    "ValueError": lambda m: ValueError(m or "probe got a bad value"),
    "no message": lambda m: Exception(),
    "oom": lambda m: torch.OutOfMemoryError(
        m or "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.10 GiB is free."
    ),
    "oom allocation": lambda m: torch.OutOfMemoryError(m or "Allocation on device"),
    "accelerator oom": lambda m: accelerator_error(m or "CUDA error: out of memory"),
    "cuda illegal access": lambda m: RuntimeError(m or "CUDA error: an illegal memory access was encountered"),
    "cuda assert": lambda m: accelerator_error(m or "CUDA error: device-side assert triggered"),
    "shapes": lambda m: RuntimeError(m or "mat1 and mat2 shapes cannot be multiplied (77x768 and 2048x640)"),
    "missing file": lambda m: FileNotFoundError(2, m or "No such file or directory", "model.safetensors"),
}


def accelerator_error(message):
    return getattr(torch, "AcceleratorError", RuntimeError)(message)


class ProbeRaise:
    """Raises, after `steps` progress ticks. Stands in the middle of a graph (image in, image out)."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"kind": (list(RAISERS),), "seed": SEED},
            "optional": {
                "image": ("IMAGE",),
                "message": ("STRING", {"default": ""}),
                "steps": STEPS,
            },
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, kind, seed, image=None, message="", steps=0):
        bar = ProgressBar(max(steps, 1))
        for _ in range(steps):
            bar.update(1)
        raise RAISERS[kind](message)


class ProbeBlock:
    """Returns an ExecutionBlocker, with a message or silent."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"message": ("STRING", {"default": ""}), "silent": ("BOOLEAN", {"default": False}), "seed": SEED},
            "optional": {"image": ("IMAGE",)},
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, message, silent, seed, image=None):
        return (ExecutionBlocker(None if silent else message),)


class ProbeExpand:
    """Expands to `count` ProbeSleep nodes in a row; `cycle` links them in a circle; `text` adds an inner output node."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"count": ("INT", {"default": 3, "min": 1, "max": 1000}), "steps": STEPS, "seconds": SECONDS, "seed": SEED},
            "optional": {
                "image": ("IMAGE",),
                "text": ("BOOLEAN", {"default": False}),
                "cycle": ("BOOLEAN", {"default": False}),
                "nested": ("BOOLEAN", {"default": False}),
                "fail": ("BOOLEAN", {"default": False}),
            },
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, count, steps, seconds, seed, image=None, text=False, cycle=False, nested=False, fail=False):
        graph = GraphBuilder()
        last = blank_image() if image is None else image
        first_node = None
        for i in range(count):
            if nested and i == 0:
                node = graph.node("ProbeExpand", count=2, steps=steps, seconds=seconds, seed=seed)
            elif fail and i == count - 1:
                node = graph.node("ProbeRaise", kind="RuntimeError", image=last, seed=seed)
            else:
                node = graph.node("ProbeSleep", image=last, steps=steps, seconds=seconds, seed=seed)
            first_node = first_node or node
            last = node.out(0)
        if cycle:
            first_node.set_input("image", last)
        if text:
            graph.node("ProbeText", text="inner text", image=last, seed=seed)
        return {"result": (last,), "expand": graph.finalize()}


class ProbeText:
    """Text under ui."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"text": ("STRING", {"default": "hello", "multiline": True}), "seed": SEED},
            "optional": {"image": ("IMAGE",)},
        }

    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = CATEGORY

    def run(self, text, seed, image=None):
        return {"ui": {"text": [text]}, "result": (text,)}


class ProbeProgressText:
    """Sends text progress (binary frame type 3): `scope` client aims at the job's client, all at everyone."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"text": ("STRING", {"default": "working"}), "scope": (["client", "all"],), "seed": SEED},
            "optional": {"image": ("IMAGE",)},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, text, scope, seed, image=None, unique_id=None):
        server = PromptServer.instance
        sid = server.client_id if scope == "client" else None
        server.send_progress_text(text, unique_id, sid)
        return (blank_image() if image is None else image,)


class ProbeFrames:
    """Sends frames of unknown types: a text frame "probe.custom" and a binary frame of type `binary_type`, `size` bytes."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "binary_type": ("INT", {"default": 99, "min": 0, "max": 2**31}),
                "size": ("INT", {"default": 16, "min": 0, "max": 2**28}),
                "seed": SEED,
            },
            "optional": {"image": ("IMAGE",)},
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, binary_type, size, seed, image=None):
        server = PromptServer.instance
        server.send_sync("probe.custom", {"any": ["thing", 1, None]}, server.client_id)
        server.send_sync("probe.list", [1, 2, 3], server.client_id)
        server.send_sync("probe.null", None, server.client_id)
        server.send_sync(binary_type, bytes(size), server.client_id)
        return (blank_image() if image is None else image,)


class ProbeNaN:
    """NaN and Infinity under ui, in the executed frame and in the history."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": SEED}, "optional": {"image": ("IMAGE",)}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = CATEGORY

    def run(self, seed, image=None):
        numbers = [float("nan"), float("inf"), float("-inf"), 1e308, 5e-324, 2**63, -0.0]
        return {"ui": {"numbers": numbers, "text": ["NaN in a string stays: NaN, Infinity"]}}


class ProbeHold:
    """Freezes the server: `loop` blocks the event loop, `gil` holds Python's lock, so that nothing at all runs."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"mode": (["loop", "gil"],), "seconds": SECONDS, "seed": SEED}, "optional": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, mode, seconds, seed, image=None):
        if mode == "gil":
            hold_gil(seconds)
        else:
            PromptServer.instance.loop.call_soon_threadsafe(time.sleep, seconds)
            time.sleep(seconds)
        return (blank_image() if image is None else image,)


def hold_gil(seconds):
    """A foreign call made through PyDLL keeps the lock while it sleeps: poll() with no descriptors is such a sleep."""
    poll = ctypes.PyDLL(None).poll
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        poll(None, 0, max(1, int(left * 1000)))


class ProbeManyImages:
    """`count` small PNG files in one output node."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "count": ("INT", {"default": 20, "min": 0, "max": 100000}),
                "folder": (["output", "temp"],),
                "subfolder": ("STRING", {"default": ""}),
                "seed": SEED,
            },
            "optional": {"image": ("IMAGE",)},
        }

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = CATEGORY

    def run(self, count, folder, subfolder, seed, image=None):
        files = [save_file(folder, subfolder, f"many_{seed}_{i:05}_.png", png_bytes(i)) for i in range(count)]
        return {"ui": {"images": files}}


class ProbeOddKeys:
    """Output under keys that custom nodes invent, and values that are no files."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": SEED}, "optional": {"image": ("IMAGE",)}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = CATEGORY

    def run(self, seed, image=None):
        gif = save_file("output", "probe/video", f"odd_{seed}.gif", png_bytes(1))
        sound = save_file("output", "audio", f"odd_{seed}.flac", b"fLaC\x00\x00\x00\x22")
        model = save_file("output", "3d", f"odd_{seed}.glb", b"glTF\x02\x00\x00\x00")
        other = save_file("temp", "probe sub/ünïcode", f"odd {seed} #1 & 100%.bin", b"odd bytes")
        ui = {
            "gifs": [{**gif, "format": "video/h264-mp4", "frame_rate": 8.0, "workflow": "odd.png", "fullpath": "/comfyui/output/odd.gif"}],
            "audio": [sound],
            "3d": [model],
            "files": [other],
            "result": [f"3d/odd_{seed}.glb", None, {"camera": {"x": 1}}],
            "animated": (True,),
            "number": [1, 2.5, -3],
            "a_string_becomes_letters": "abc",
            "a_dict_becomes_its_keys": {"first": 1, "second": 2},
            "nested": [[1, [2, 3]], {"deep": {"er": [True, None]}}],
            "empty": [],
        }
        return {"ui": ui}


class ProbeVideoLike:
    """A video file that stands under `images`, as the server's own SaveWEBM and SaveVideo put it."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": (["output", "temp"],), "seed": SEED}, "optional": {"image": ("IMAGE",)}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = CATEGORY

    def run(self, folder, seed, image=None):
        data = b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + bytes(64)
        video = save_file(folder, "video", f"clip_{seed}_00001_.mp4", data)
        return {"ui": {"images": [video], "animated": (True,)}}


DEATHS = {"SystemExit": lambda: SystemExit(1), "BaseException": lambda: FatalProbe("probe killed the worker")}


class ProbeDieThread:
    """Kills the prompt worker: HTTP goes on, prompts are accepted, none runs again."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (list(DEATHS),), "seed": SEED}, "optional": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, kind, seed, image=None):
        raise DEATHS[kind]()


class ProbeDieProcess:
    """Ends the server process at once, as a native crash does."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": SEED}, "optional": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, seed, image=None):
        os._exit(134)


class ProbeValidate:
    """Custom validation that passes, refuses with a text, or raises; `seconds` sleeps in it, on the event loop."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"mode": (["pass", "refuse", "raise"],), "seconds": SECONDS, "seed": SEED},
            "optional": {"image": ("IMAGE",)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, mode, seconds):
        time.sleep(seconds)
        if mode == "raise":
            raise KeyError("probe validation broke")
        return True if mode == "pass" else "Invalid image file: probe.png"

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, mode, seconds, seed, image=None):
        return (blank_image() if image is None else image,)


class ProbeEnd:
    """An output node without any ui output; `seconds` makes it a last node that hears no interrupt."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}, "optional": {"seconds": SECONDS}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = CATEGORY

    def run(self, image, seconds=0.0):
        time.sleep(seconds)
        return {}


NODES = [
    ProbeSleep, ProbeSleepAsync, ProbeSleepSilent, ProbeList, ProbeRaise, ProbeBlock, ProbeExpand, ProbeText,
    ProbeProgressText, ProbeFrames, ProbeNaN, ProbeHold, ProbeManyImages, ProbeOddKeys, ProbeVideoLike,
    ProbeDieThread, ProbeDieProcess, ProbeValidate, ProbeEnd,
]
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
