"""The objects' pictures: Fluent emoji in 3D, 256 x 256 with alpha, as they were published (MIT)."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fastdit.mini.large.scenes import OBJECTS

FOLDER = Path(__file__).parent / "sprites"
#: The sides of the stored levels of every sprite; a picture takes the one that is fine enough.
LEVELS = (256, 128, 64)
#: A shadow's picture is larger than its object's, since it is blurred.
SHADOW_MARGIN = 1.5
SHADOW_SIDE = 64

#: Where each object is in the published package, by its Unicode code point.
_CODES = {
    "apple": "1f34e",
    "banana": "1f34c",
    "pineapple": "1f34d",
    "watermelon": "1f349",
    "owl": "1f989",
    "frog": "1f438",
    "panda": "1f43c",
    "fish": "1f420",
    "car": "1f697",
    "bus": "1f68c",
    "tractor": "1f69c",
    "rocket": "1f680",
    "tulip": "1f337",
    "cactus": "1f335",
    "sunflower": "1f33b",
    "tree": "1f333",
    "doughnut": "1f369",
    "burger": "1f354",
    "cupcake": "1f9c1",
    "pizza": "1f355",
    "robot": "1f916",
    "ball": "1f3c0",
    "balloon": "1f388",
    "drum": "1f941",
}


def collect(package: Path) -> None:
    """Copy the objects' pictures out of an unpacked package `@lobehub/fluent-emoji-3d`."""
    FOLDER.mkdir(exist_ok=True)
    for name in OBJECTS:
        shutil.copy(package / "assets" / f"{_CODES[name]}.webp", FOLDER / f"{name}.webp")


@cache
def levels(device: torch.device) -> dict[int, Tensor]:
    """All sprites at every level, [objects, 4, side, side]: colour times alpha, and alpha."""
    pictures = [np.asarray(Image.open(FOLDER / f"{name}.webp").convert("RGBA"), np.float32) / 255 for name in OBJECTS]
    full = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    full = torch.cat([full[:, :3] * full[:, 3:], full[:, 3:]], dim=1)
    return {side: functional.avg_pool2d(full, full.shape[-1] // side).to(device) for side in LEVELS}


@cache
def shadows(device: torch.device) -> Tensor:
    """The blurred outline of every sprite, [objects, 1, side, side], in a box that is larger by SHADOW_MARGIN."""
    inner = round(SHADOW_SIDE / SHADOW_MARGIN / 2) * 2
    alpha = functional.interpolate(levels(device)[128][:, 3:], size=(inner, inner), mode="area")
    padded = functional.pad(alpha, [(SHADOW_SIDE - inner) // 2] * 4)
    offsets = torch.arange(-7, 8, device=device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / 2.4).square())
    kernel = kernel / kernel.sum()
    blurred = functional.conv2d(padded, kernel[None, None, None, :], padding=(0, 7))
    return functional.conv2d(blurred, kernel[None, None, :, None], padding=(7, 0))
