"""Makes imageops.json: what torch and Pillow make of a small picture, for the test of the pod's image nodes."""

import json

import numpy as np
import torch
from PIL import Image


def pattern(width, height):
    """The picture that imageops_test.go makes too."""
    pixels = [[[(x * 37 + y * 91 + c * 53) % 256 for c in range(3)] for x in range(width)] for y in range(height)]
    return torch.tensor(pixels, dtype=torch.float32)[None] / 255.0


def to_bytes(image):
    return np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8)


def scale(image, method, width, height):
    if method == "lanczos":
        resized = Image.fromarray(to_bytes(image[0])).resize((width, height), resample=Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(resized).astype(np.float32) / 255.0)[None]
    return torch.nn.functional.interpolate(image.movedim(-1, 1), size=(height, width), mode=method).movedim(1, -1)


def soft(x):
    return torch.where(x <= 0.25, ((16 * x - 12) * x + 4) * x, torch.sqrt(x))


BLENDS = {
    "normal": lambda a, b: b,
    "multiply": lambda a, b: a * b,
    "screen": lambda a, b: 1 - (1 - a) * (1 - b),
    "overlay": lambda a, b: torch.where(a <= 0.5, 2 * a * b, 1 - 2 * (1 - a) * (1 - b)),
    "soft_light": lambda a, b: torch.where(b <= 0.5, a - (1 - 2 * b) * a * (1 - a), a + (2 * b - 1) * (soft(a) - a)),
    "difference": lambda a, b: a - b,
}

SOURCE = pattern(7, 5)
scaled = [
    {"method": method, "width": width, "height": height, "bytes": to_bytes(scale(SOURCE, method, width, height)[0]).flatten().tolist()}
    for method in ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
    for width, height in ((13, 11), (3, 4), (7, 9), (1, 1), (20, 2))
]
OTHER = 1 - pattern(7, 5)
blended = [
    {"mode": mode, "bytes": to_bytes(torch.clamp(SOURCE * 0.7 + blend(SOURCE, OTHER) * 0.3, 0, 1)[0]).flatten().tolist()}
    for mode, blend in BLENDS.items()
]
printed = [
    {"shape": list(tensor.shape), "values": [float(v) for v in tensor.flatten().tolist()], "text": str(tensor)}
    for tensor in (
        torch.zeros(1, 2, 2, 3),
        torch.ones(1, 1, 2, 3),
        SOURCE[:, :2, :2],
        torch.tensor([[[0.5, 0.0001, 0.25]]]),
        torch.tensor([[[0.5, 0.00001, 0.25]]]),
        torch.tensor([[[0.5, -1.25, 10.0]]]),
        torch.arange(30, dtype=torch.float32).reshape(1, 1, 30) / 255,
        torch.arange(1200, dtype=torch.float32).reshape(1, 30, 40),
    )
]
with open("imageops.json", "w") as f:
    json.dump({"scaled": scaled, "blended": blended, "printed": printed}, f)
