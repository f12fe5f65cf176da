"""Procedural grounds: textures that are known functions of a few parameters, so that a picture's can be fitted.

Every ground is a height h(u, v) in [0, 1] of texture coordinates, one function for each name, which repeats after one
unit in u and in v. A picture shows it turned, scaled and shifted, between two colours, under a ramp of light:

    colour = tint * (1 + ramp . (x, y)) * (low + h(u, v) * (high - low))

So for the right turn, scale and shift each colour channel is a combination of 1, x, y, h, hx and hy. Whatever a picture
has beside that, far from its objects, is not ground. `pixel` is the width of a pixel in texture units: details that are
finer than it fade, and edges are one pixel soft, so that a ground looks the same at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def _wave(phase: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * phase)


def _fine(frequency: float, pixel: Tensor) -> Tensor:
    """What the area of a pixel leaves of a wave of some frequency."""
    return torch.exp(-6.0 * (frequency * pixel).square())


def _edge(distance: Tensor, pixel: Tensor) -> Tensor:
    """0 on one side of a line, 1 on the other, one pixel soft."""
    return (distance / pixel + 0.5).clamp(0, 1)


def _to_line(phase: Tensor) -> Tensor:
    """The distance to the next whole number."""
    return (phase - phase.round()).abs()


def _wood(u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    plank = torch.remainder(torch.floor(4 * v), 4)
    shift = torch.remainder(plank * 0.382, 1.0)
    along = u + shift
    across = 4 * v - torch.floor(4 * v)
    rings = _wave(1.7 * across + 0.35 * _wave(along) * _wave(0.5 * across) + shift)
    grain = _wave(7 * across + 0.9 * _wave(along + 0.3 * across) + 3 * shift)
    fibre = _wave(19 * across + 1.6 * _wave(2 * along + 0.5 * across)) * _fine(70, pixel)
    board = 0.56 + 0.13 * rings + 0.13 * grain * _fine(28, pixel) + 0.08 * fibre + 0.1 * _wave(plank * 0.382 + 0.1)
    gap = _edge(_to_line(4 * v) / 4 - 0.007, pixel)
    butt = _edge(_to_line(along * 1.0) - 0.005, pixel)
    return board * (0.25 + 0.75 * gap) * (0.35 + 0.65 * butt)


def _bricks(u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    row = torch.remainder(torch.floor(8 * v), 8)
    along = 4 * u + 0.5 * torch.remainder(row, 2)
    column = torch.remainder(torch.floor(along), 4)
    inside_u, inside_v = _to_line(along) / 4, _to_line(8 * v) / 8
    tone = 0.5 + 0.5 * _wave(0.29 * column + 0.41 * row)
    speckle = _wave(23 * u + 9 * v) * _wave(29 * v - 8 * u) * _fine(38, pixel)
    brick = 0.5 + 0.26 * tone + 0.07 * speckle - 0.12 * _edge(0.018 - inside_v, 4 * pixel)
    return brick * _edge(torch.minimum(inside_u, inside_v) - 0.0085, pixel)


def _grass(u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    broad = _wave(5 * u + 0.5 * _wave(3 * v + u)) * _wave(3 * v + 0.4 * _wave(2 * u))
    blades = _wave(16 * u + 0.9 * _wave(4 * v + 2 * u)) * _fine(18, pixel)
    tips = _wave(34 * u + 3 * v + 1.1 * _wave(7 * v - 3 * u)) * _fine(40, pixel)
    hairs = _wave(61 * u - 5 * v + 1.3 * _wave(9 * v + 4 * u)) * _fine(66, pixel)
    return 0.5 + 0.14 * broad + 0.16 * blades + 0.13 * tips + 0.07 * hairs


def _sand(u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    crest = 0.5 + 0.5 * _wave(7 * v + 0.45 * _wave(2 * u + 0.2 * _wave(v)) + 0.25 * _wave(3 * u + v))
    ripple = crest * crest * (3 - 2 * crest)
    grains = _wave(43 * u + 17 * v) * _wave(47 * v - 13 * u) * _fine(62, pixel)
    return 0.3 + 0.45 * ripple + 0.08 * grains + 0.06 * _wave(u + 2 * v)


def _water(u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    first = _wave(3 * u + 5 * v + 0.4 * _wave(2 * u - v))
    second = _wave(-4 * u + 6 * v + 0.35 * _wave(3 * v + u))
    third = _wave(7 * u + 9 * v + 0.5 * _wave(3 * u - 2 * v))
    swell = (2.0 + 0.9 * first + 0.9 * second) / 4
    glint = torch.relu((first * second + 0.4 * third) - 0.35)
    return 0.75 * swell * swell + 0.12 + 0.4 * glint.clamp(max=0.6)


def _sky(u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    puff = _wave(u + 0.2 * _wave(v + 0.3)) * _wave(2 * v + 0.25 * _wave(u)) + 0.35 * _wave(2 * u - v)
    ragged = 0.2 * _wave(3 * u + 2 * v + 0.4 * _wave(2 * u)) + 0.12 * _wave(5 * u - 4 * v + 0.4 * _wave(3 * v + u))
    wisps = 0.05 * _wave(9 * u + 7 * v + 0.5 * _wave(4 * u - 3 * v)) * _fine(12, pixel)
    cloud = ((puff + ragged + wisps + 0.25) / 1.3).clamp(0, 1)
    return 0.1 + 0.85 * cloud * cloud * (3 - 2 * cloud)


def _checks(u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    def stripe(phase: Tensor) -> Tensor:
        # +1 and -1 in turns of half a period
        half = (phase - torch.floor(phase) - 0.5).abs() - 0.25
        return 2 * _edge(half / 4, pixel) - 1

    weave = _wave(64 * u) * _wave(64 * v) * _fine(90, pixel)
    return 0.5 + 0.42 * stripe(4 * u) * stripe(4 * v) + 0.06 * weave


def _dots(u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    row = torch.floor(6 * v)
    along = 5 * u + 0.5 * torch.remainder(row, 2)
    across = (along - torch.floor(along) - 0.5) / 5
    down = (6 * v - row - 0.5) / 6
    dot = _edge(0.052 - (across.square() + down.square()).sqrt(), pixel)
    weave = _wave(48 * u + 48 * v) * _wave(48 * u - 48 * v) * _fine(96, pixel)
    return 0.08 + 0.84 * dot + 0.06 * weave


FORMS: dict[str, Form] = {
    "wood": _wood,
    "bricks": _bricks,
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "sky": _sky,
    "checks": _checks,
    "dots": _dots,
}


def texture_coordinates(x: Tensor, y: Tensor, repeats: Tensor, angle: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Turn, scale and shift picture coordinates [B, H, W]; `repeats` and `angle` are [B], `shift` is [B, 2]."""
    cosine, sine = (repeats * part(angle) for part in (torch.cos, torch.sin))
    across, down = x - 0.5, y - 0.5
    u = cosine[:, None, None] * across + sine[:, None, None] * down + shift[:, 0, None, None]
    v = cosine[:, None, None] * down - sine[:, None, None] * across + shift[:, 1, None, None]
    return u, v
