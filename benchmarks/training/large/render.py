"""Draws scenes: numbers for what a scene leaves open first, then whole batches as tensors on any device.

A `Picture` is the truth of one picture, at no particular resolution. `Batch` holds the numbers of many as tensors, and
`render` draws them, or windows of them, without a loop over pictures: objects are resampled by two matrix products
each, whose weights are the areas that a pixel shares with a sprite's, so that they are smooth at every size.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdit.mini.large.scenes import GROUNDS, KINDS, LIGHTS, OBJECTS, Scene, parse, random_scene
from training.large import sprites
from training.large.grounds import FORMS, texture_coordinates

Color = tuple[float, float, float]

MOST_OBJECTS = 3
_ATTEMPTS = 60
_MARGIN = 0.02
_SIZES = {"small": (0.22, 0.29), None: (0.33, 0.54), "big": (0.60, 0.74)}
_COUNTED_SIZES = {2: (0.26, 0.40), 3: (0.23, 0.32)}
_PAIR_SIZES = (0.27, 0.40)
_GROUND_HUES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    # hue, saturation and value of the bright colour; the dark one follows from it
    "wood": ((0.06, 0.10), (0.45, 0.65), (0.75, 0.95)),
    "bricks": ((0.00, 0.06), (0.45, 0.65), (0.70, 0.90)),
    "grass": ((0.24, 0.33), (0.55, 0.75), (0.70, 0.90)),
    "sand": ((0.10, 0.14), (0.25, 0.45), (0.88, 1.00)),
    "water": ((0.48, 0.56), (0.15, 0.35), (0.92, 1.00)),
    "sky": ((0.50, 0.65), (0.00, 0.06), (0.95, 1.00)),
    "checks": ((0.00, 1.00), (0.00, 0.08), (0.93, 1.00)),
    "dots": ((0.00, 1.00), (0.05, 0.25), (0.93, 1.00)),
}


@dataclass(frozen=True)
class Placement:
    """One object: which, and the center and side of its square, in units of the picture's side."""

    name: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Ground:
    """One ground's parameters; see `grounds`."""

    name: str
    repeats: float
    angle: float
    shift: tuple[float, float]
    low: Color
    high: Color


@dataclass(frozen=True)
class Light:
    """The tint of everything, a ramp over the picture, and the objects' shadow."""

    name: str | None
    tint: Color
    ramp: tuple[float, float]
    shadow: float
    fall: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """What is to be seen: a scene with all that it leaves open filled in. Later placements lie in front."""

    scene: Scene
    placements: tuple[Placement, ...]
    ground: Ground
    light: Light


@dataclass(frozen=True)
class Batch:
    """The numbers of many pictures as tensors; `objects` is -1 where a picture has fewer."""

    objects: Tensor
    centers: Tensor
    sizes: Tensor
    grounds: Tensor
    repeats: Tensor
    angles: Tensor
    shifts: Tensor
    low: Tensor
    high: Tensor
    tint: Tensor
    ramp: Tensor
    shadow: Tensor
    fall: Tensor

    @property
    def count(self) -> int:
        return self.objects.shape[0]


def random_pictures(
    count: int, random: np.random.Generator, *, held_out: bool = False, scenes: Sequence[Scene] | None = None
) -> list[Picture]:
    """Draw pictures of random scenes, or of the given ones."""
    drawn = scenes or [random_scene(random, held_out=held_out) for _ in range(count)]
    return [random_picture(scene, random) for scene in drawn]


def random_picture(scene: Scene, random: np.random.Generator) -> Picture:
    """Fill in what the scene leaves open."""
    names = _names(scene, random)
    if scene.relation is not None:
        placements = _related(names, scene.relation, random)
    elif scene.count > 1:
        placements = _scattered(names, random)
    else:
        placements = (_alone(names[0], scene, random),)
    ground = scene.ground or str(random.choice(list(GROUNDS)))
    light = scene.light or (str(random.choice(list(LIGHTS))) if random.random() < 0.3 else None)
    return Picture(scene, placements, _ground(ground, random), _light(light, random))


def pack(pictures: Sequence[Picture], device: torch.device | str = "cpu") -> Batch:
    """Give pictures' numbers as tensors on a device."""

    def tensor(values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    padded = [[*p.placements, *[None] * (MOST_OBJECTS - len(p.placements))] for p in pictures]
    objects = [[-1 if place is None else OBJECTS.index(place.name) for place in row] for row in padded]
    centers = [[(0.5, 0.5) if place is None else (place.x, place.y) for place in row] for row in padded]
    return Batch(
        objects=torch.tensor(objects, device=device),
        centers=tensor(centers),
        sizes=tensor([[1.0 if place is None else place.size for place in row] for row in padded]),
        grounds=torch.tensor([list(FORMS).index(p.ground.name) for p in pictures], device=device),
        repeats=tensor([p.ground.repeats for p in pictures]),
        angles=tensor([p.ground.angle for p in pictures]),
        shifts=tensor([p.ground.shift for p in pictures]),
        low=tensor([p.ground.low for p in pictures]),
        high=tensor([p.ground.high for p in pictures]),
        tint=tensor([p.light.tint for p in pictures]),
        ramp=tensor([p.light.ramp for p in pictures]),
        shadow=tensor([p.light.shadow for p in pictures]),
        fall=tensor([p.light.fall for p in pictures]),
    )


def whole(batch: Batch) -> Tensor:
    """The windows [B, 3] that show whole pictures: left, top, extent."""
    return torch.tensor([0.0, 0.0, 1.0], device=batch.sizes.device).expand(batch.count, 3)


@torch.no_grad()
def render(batch: Batch, pixels: int, windows: Tensor | None = None) -> Tensor:
    """Draw pictures [B, 3, pixels, pixels] in [0, 1], or only `windows` [B, 3] of them (left, top, extent)."""
    windows = whole(batch) if windows is None else windows
    x, y, pixel = _coordinates(windows, pixels)
    canvas = draw_ground(batch, x, y, pixel)
    for slot in range(MOST_OBJECTS):
        if (found := objects_of(batch, slot, pixels, windows)) is not None:
            chosen, layer, shade = found
            below = canvas[chosen] * (1 - batch.shadow[chosen][:, None, None, None] * shade)
            canvas[chosen] = below * (1 - layer[:, 3:]) + layer[:, :3]
    return (canvas * light_of(batch, x, y)).clamp(0, 1)


def rendered_prompts(prompts: Sequence[str], seed: int, pixels: int) -> list[np.ndarray]:
    """Draw what prompts ask for, each [pixels, pixels, 3] in 8 bits."""
    random = np.random.default_rng(seed)
    pictures = (random_picture(parse(prompt), random) for prompt in prompts)
    drawn = (render(pack([picture]), pixels)[0] for picture in pictures)
    return [(image * 255.0).round().byte().permute(1, 2, 0).numpy() for image in drawn]


@torch.no_grad()
def coverage(batch: Batch, pixels: int) -> Tensor:
    """Where objects are, [B, 1, pixels, pixels]."""
    bare = torch.zeros(batch.count, 1, pixels, pixels, device=batch.sizes.device)
    for slot in range(MOST_OBJECTS):
        if (found := objects_of(batch, slot, pixels, whole(batch))) is not None:
            chosen, layer, _ = found
            bare[chosen] = bare[chosen] * (1 - layer[:, 3:]) + layer[:, 3:]
    return bare


def objects_of(batch: Batch, slot: int, pixels: int, windows: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Give which pictures have an object in a slot, its colour and alpha [C, 4, H, W], its shadow [C, 1, H, W]."""
    chosen = (batch.objects[:, slot] >= 0).nonzero()[:, 0]
    if not chosen.numel():
        return None
    x, y, pixel = _coordinates(windows[chosen], pixels)
    sprite, center, size = (tensor[chosen, slot] for tensor in (batch.objects, batch.centers, batch.sizes))
    level = sprites.levels(center.device)[_level(float((size / pixel).max()))][sprite]
    layer = _resample(level, (x, y), center, size, pixel)
    fallen = center + batch.fall[chosen] * size[:, None]
    shadow = sprites.shadows(center.device)[sprite]
    return chosen, layer, _resample(shadow, (x, y), fallen, size * sprites.SHADOW_MARGIN, pixel)


def draw_ground(batch: Batch, x: Tensor, y: Tensor, pixel: Tensor) -> Tensor:
    """The unlit grounds [B, 3, H, W] at columns `x` [B, W] and rows `y` [B, H], of pixels as wide as `pixel` [B]."""
    height = x.new_empty(batch.count, y.shape[1], x.shape[1])
    across, down = x[:, None, :].expand_as(height), y[:, :, None].expand_as(height)
    u, v = texture_coordinates(across, down, batch.repeats, batch.angles, batch.shifts)
    footprint = (pixel * batch.repeats)[:, None, None]
    for index, form in enumerate(FORMS.values()):
        chosen = (batch.grounds == index).nonzero()[:, 0]
        if chosen.numel():
            height[chosen] = form(u[chosen], v[chosen], footprint[chosen])
    low, high = batch.low[:, :, None, None], batch.high[:, :, None, None]
    return low + height[:, None] * (high - low)


def light_of(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
    """What everything is multiplied by, [B, 3, H, W]."""
    ramp = batch.ramp[:, 0, None, None] * (x[:, None, :] - 0.5) + batch.ramp[:, 1, None, None] * (y[:, :, None] - 0.5)
    return batch.tint[:, :, None, None] * (1 + ramp)[:, None]


def _coordinates(windows: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    steps = (torch.arange(pixels, device=windows.device, dtype=torch.float32) + 0.5) / pixels
    extent = windows[:, 2:]
    return windows[:, :1] + extent * steps, windows[:, 1:2] + extent * steps, windows[:, 2] / pixels


def _level(wanted: float) -> int:
    return next((side for side in reversed(sprites.LEVELS) if side >= wanted), sprites.LEVELS[0])


def _resample(tile: Tensor, axes: tuple[Tensor, Tensor], center: Tensor, size: Tensor, pixel: Tensor) -> Tensor:
    """Put square tiles [B, C, T, T] into pictures: [B, C, H, W], zero outside of them."""
    side = tile.shape[-1]
    places = torch.arange(side, device=tile.device, dtype=torch.float32)
    # a pixel takes from every texel what they have in common, and between two texels when it is smaller than one
    reach = (pixel * side / size).clamp(min=1.0)[:, None, None]

    def weights(axis: Tensor, middle: Tensor) -> Tensor:
        texel = ((axis - middle[:, None]) / size[:, None] + 0.5) * side - 0.5
        return ((reach + 1) / 2 - (texel[:, :, None] - places).abs()).clamp(0, 1) / reach

    columns, rows = weights(axes[0], center[:, 0]), weights(axes[1], center[:, 1])
    return rows[:, None] @ (tile @ columns.mT[:, None])


def _names(scene: Scene, random: np.random.Generator) -> list[str]:
    names: list[str] = []
    for noun in scene.nouns * scene.count:
        others = () if scene.relation is None else (*names, *scene.nouns)
        choices = [name for name in KINDS.get(noun, ()) if name not in others]
        names.append(str(random.choice(choices)) if choices else noun)
    return names


def _alone(name: str, scene: Scene, random: np.random.Generator) -> Placement:
    size = random.uniform(*_SIZES[scene.size])
    least, most = size / 2 + _MARGIN, 1 - size / 2 - _MARGIN
    near = (least, least + 0.45 * (most - least) * (0.5 if scene.size is None else 0.7))
    far = (1 - near[1], 1 - near[0])
    x, y = random.uniform(least, most), random.uniform(least, most)
    if scene.place in ("left", "right"):
        x = random.uniform(*(near if scene.place == "left" else far))
    if scene.place in ("top", "bottom"):
        y = random.uniform(*(near if scene.place == "top" else far))
    return Placement(name, x, y, size)


def _scattered(names: list[str], random: np.random.Generator) -> tuple[Placement, ...]:
    """Objects of about one size that hardly touch, the lower in front."""
    largest = random.uniform(*_COUNTED_SIZES[len(names)])
    placements: list[Placement] = []
    while len(placements) < len(names):
        placements = []
        # what doesn't fit gets smaller, so this ends
        largest *= 0.97
        for name in names:
            size = largest * random.uniform(0.88, 1.0)
            for _ in range(_ATTEMPTS):
                x, y = random.uniform(size / 2 + _MARGIN, 1 - size / 2 - _MARGIN, 2)
                if all(max(abs(x - p.x), abs(y - p.y)) > 0.48 * (size + p.size) for p in placements):
                    placements.append(Placement(name, float(x), float(y), size))
                    break
    return tuple(sorted(placements, key=lambda placement: placement.y))


def _related(names: list[str], relation: str, random: np.random.Generator) -> tuple[Placement, ...]:
    sizes = random.uniform(*_PAIR_SIZES, 2)
    if relation == "behind":
        # the first is seen beside the second, a part of it covered
        sizes[0] = min(1.0, sizes[0] / sizes[1]) * sizes[1] * random.uniform(0.9, 1.05)
        middle = (sizes[0] + sizes[1]) / 2
        away = (random.choice((-1, 1)) * random.uniform(0.42, 0.6) * middle, -random.uniform(0.15, 0.4) * middle)
    else:
        apart = (sizes[0] + sizes[1]) / 2 * random.uniform(0.97, 1.3)
        across = random.uniform(-0.12, 0.12)
        away = (-apart, across) if relation == "left of" else (across, -apart)
    boxes = ((0.0, 0.0), (-away[0], -away[1]))
    start = []
    for i in range(2):
        low = min(box[i] - size / 2 for box, size in zip(boxes, sizes, strict=True))
        high = max(box[i] + size / 2 for box, size in zip(boxes, sizes, strict=True))
        start.append(random.uniform(_MARGIN - low, max(_MARGIN - low + 1e-6, 1 - _MARGIN - high)))
    return tuple(
        Placement(name, start[0] + box[0], start[1] + box[1], float(size))
        for name, box, size in zip(names, boxes, sizes, strict=True)
    )


def _ground(name: str, random: np.random.Generator) -> Ground:
    hues, saturations, values = _GROUND_HUES[name]
    hue, saturation, value = random.uniform(*hues), random.uniform(*saturations), random.uniform(*values)
    high = colorsys.hsv_to_rgb(hue, saturation, value)
    if name in ("checks", "dots"):
        low = colorsys.hsv_to_rgb(random.uniform(), random.uniform(0.45, 0.7), random.uniform(0.55, 0.8))
    elif name == "sky":
        low = colorsys.hsv_to_rgb(hue, random.uniform(0.55, 0.75), random.uniform(0.7, 0.9))
    elif name == "water":
        low = colorsys.hsv_to_rgb(hue + 0.04, random.uniform(0.75, 0.9), random.uniform(0.45, 0.6))
    elif name == "bricks":
        low = colorsys.hsv_to_rgb(0.1, random.uniform(0.02, 0.12), random.uniform(0.8, 0.9))
        # mortar is bright: the height's zero, and the brick's tones run away from it
        high = colorsys.hsv_to_rgb(hue, min(1.0, saturation + 0.2), value * 0.55)
    else:
        low = colorsys.hsv_to_rgb(hue, min(1.0, saturation + 0.15), value * 0.35)
    turn = 0.0 if name == "sky" else random.uniform(-0.14, 0.14)
    shift = (float(random.uniform()), float(random.uniform()))
    return Ground(name, random.uniform(0.8, 1.25), turn, shift, low, high)


def _light(name: str | None, random: np.random.Generator) -> Light:
    direction = random.uniform(0.15 * math.pi, 0.85 * math.pi)
    slope = random.uniform(0.1, 0.35)
    # light comes from above: what it reaches last, and where shadows fall, is below
    ramp = (-slope * math.cos(direction), -slope * math.sin(direction))
    fall = random.uniform(0.05, 0.10)
    if name == "night":
        tint = (random.uniform(0.36, 0.44), random.uniform(0.42, 0.50), random.uniform(0.62, 0.74))
    elif name == "sunset":
        tint = (1.0, random.uniform(0.70, 0.78), random.uniform(0.48, 0.58))
    else:
        tint = (random.uniform(0.94, 1.0),) * 3
    shadow = random.uniform(0.25, 0.5)
    return Light(name, tint, ramp, shadow, (fall * math.cos(direction), fall * math.sin(direction)))
