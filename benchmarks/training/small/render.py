"""Draws training pictures: emoji sprites on a softly shaded background, with the words that describe them.

Sprites are rasterised once from their vectors at a few sizes (a mip pyramid); a picture is then two or three affine
warps, well under a millisecond, so training never sees the same picture twice.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

from fastdit.mini.prompts import (
    BACKGROUNDS,
    OBJECTS,
    PLACES,
    RELATIONS,
    Scene,
)

FloatArray = npt.NDArray[np.float32]

_VECTORS = Path(__file__).parent / "noto.json"
_SPRITE_SIZES = (64, 128, 256)
_BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 236),
    "gray": (142, 146, 150),
    "black": (34, 34, 40),
    "orange": (246, 172, 84),
    "green": (124, 196, 124),
    "blue": (108, 168, 232),
    "purple": (166, 124, 214),
    "pink": (248, 176, 200),
}
_SIZE_RANGES = {"small": (0.36, 0.43), None: (0.50, 0.60), "big": (0.74, 0.86)}
_MARGIN = 0.03
_SPRITE_PADDING = 140 / 128  # room around the drawing for its shadow


@dataclass(frozen=True)
class Placement:
    """Where one object lies, in units of the picture's side."""

    name: str
    center_x: float
    center_y: float
    size: float
    degrees: float


@dataclass(frozen=True)
class Picture:
    """Everything the renderer draws: a scene with its open choices filled in, at no particular resolution."""

    scene: Scene
    background: str
    placements: tuple[Placement, ...]
    light_direction: float
    light_strength: float


def random_scene(random: np.random.Generator, *, held_out: bool = False) -> Scene:
    """Draw a scene of the training or the held-out set: three single objects to one pair, words dropped at random."""
    for _ in range(1000):
        background = str(random.choice(BACKGROUNDS)) if random.random() < 0.9 else None
        if random.random() < 0.25:
            first, second = (str(name) for name in random.choice(OBJECTS, 2, replace=False))
            scene = Scene((first, second), background, relation=str(random.choice(RELATIONS)))
        else:
            size = (None, None, "small", "big")[random.integers(4)]
            place = str(random.choice(PLACES)) if random.random() < 0.6 and size != "big" else None
            scene = Scene((str(random.choice(OBJECTS)),), background, size, place)
        if scene.held_out == held_out:
            return scene
    raise RuntimeError("no scene of the wanted split in 1000 draws")


def random_picture(scene: Scene, random: np.random.Generator) -> Picture:
    """Fill in what the scene leaves open, and jitter the rest."""
    background = scene.background or str(random.choice(BACKGROUNDS))
    placements = _pair(scene, random) if scene.kind == "pair" else (_single(scene, random),)
    return Picture(scene, background, placements, random.uniform(0, 2 * np.pi), random.uniform(0.05, 0.16))


def draw(picture: Picture, size: int) -> FloatArray:
    """The picture as a [size, size, 3] array in [0, 1]."""
    canvas = _background(picture, size)
    for placement in picture.placements:
        pyramid = _sprites()[placement.name]
        pixels = placement.size * size * _SPRITE_PADDING
        sprite, shadow = next((level for level in pyramid if level[0].shape[0] >= pixels), pyramid[-1])
        scale = pixels / sprite.shape[0]
        matrix = cv2.getRotationMatrix2D(
            ((sprite.shape[1] - 1) / 2, (sprite.shape[0] - 1) / 2), placement.degrees, scale
        )
        matrix[:, 2] += (
            placement.center_x * size - sprite.shape[1] / 2,
            placement.center_y * size - sprite.shape[0] / 2,
        )
        drawn = cv2.warpAffine(sprite, matrix, (size, size), flags=cv2.INTER_LINEAR)
        matrix[:, 2] += (0.02 * pixels, 0.05 * pixels)
        shade = cv2.warpAffine(shadow, matrix, (size, size), flags=cv2.INTER_LINEAR)
        canvas *= (1 - 0.4 * shade)[..., None]
        canvas *= 1 - drawn[..., 3:]
        canvas += drawn[..., :3]
    return np.clip(canvas, 0, 1)


def random_batch(
    count: int, size: int, random: np.random.Generator, *, held_out: bool = False
) -> tuple[list[Picture], FloatArray]:
    """`count` pictures and their pixels [count, size, size, 3]."""
    pictures = [random_picture(random_scene(random, held_out=held_out), random) for _ in range(count)]
    return pictures, np.stack([draw(picture, size) for picture in pictures])


def _single(scene: Scene, random: np.random.Generator) -> Placement:
    size = random.uniform(*_SIZE_RANGES[scene.size])
    near = size / 2 + _MARGIN + random.uniform(0, 0.03)
    center_x, center_y = (0.5 + random.uniform(-0.03, 0.03) for _ in range(2))
    if scene.place == "left":
        center_x = near
    elif scene.place == "right":
        center_x = 1 - near
    elif scene.place == "top":
        center_y = near
    elif scene.place == "bottom":
        center_y = 1 - near
    return Placement(scene.objects[0], center_x, center_y, size, random.uniform(-8, 8))


def _pair(scene: Scene, random: np.random.Generator) -> tuple[Placement, ...]:
    horizontal = scene.relation in ("left of", "right of")
    along = [0.26, 0.74] if scene.relation in ("left of", "above") else [0.74, 0.26]
    placements = []
    for name, position in zip(scene.objects, along, strict=True):
        position += random.uniform(-0.015, 0.015)
        across = 0.5 + random.uniform(-0.04, 0.04)
        x, y = (position, across) if horizontal else (across, position)
        placements.append(Placement(name, x, y, random.uniform(0.41, 0.46), random.uniform(-8, 8)))
    return tuple(placements)


def _background(picture: Picture, size: int) -> FloatArray:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    ramp = np.cos(picture.light_direction) * axis[None, :] + np.sin(picture.light_direction) * axis[:, None]
    light = 1 + picture.light_strength * ramp
    color = np.asarray(_BACKGROUND_RGB[picture.background], np.float32) / 255
    background: FloatArray = (light[..., None] * color).astype(np.float32)
    return background


@cache
def _sprites() -> dict[str, list[tuple[FloatArray, FloatArray]]]:
    """Of every object, at every size: premultiplied RGBA, and the soft shadow's strength."""
    vectors = json.loads(_VECTORS.read_text())["objects"]
    return {name: [_rasterise(vectors[name], size) for size in _SPRITE_SIZES] for name in OBJECTS}


def _rasterise(body: str, size: int) -> tuple[FloatArray, FloatArray]:
    tag = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * size}" height="{2 * size}" viewBox="-6 -6 140 140">'
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=f"{tag}{body}</svg>")))).convert("RGBA")
    pixels = np.asarray(image, np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    # rasterised at twice the size: the average of 2x2 pixels has smoother edges than the rasteriser's own
    sprite = np.asarray(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA), np.float32)
    shadow = np.asarray(cv2.GaussianBlur(sprite[..., 3], (0, 0), size * 0.03), np.float32)
    return sprite, shadow
