"""Just-in-time sampling written out in a straight line, one image at a time, sharing nothing with the package.

The numbers of the first anchors, the nearest anchor, the blur and the variance are loops over cells; the transformer is
a function of tokens, their places and the noise level, so that FLUX and SD3 can both stand behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, list[tuple[int, int]], float], Tensor]


def first_anchors(rows: int, columns: int, count: int) -> list[int]:
    p = 1.3247179572447460
    numbers = [(row / p + column / p**2) % 1.0 for row in range(rows) for column in range(columns)]
    return sorted(sorted(range(rows * columns), key=lambda cell: (numbers[cell], cell))[:count])


def filled(tokens: Tensor, anchors: list[int], rows: int, columns: int) -> Tensor:
    """Nearest anchor (the earlier of two), a Gaussian blur, and the anchors' own tokens again: [rows * columns, C]."""
    nearest = torch.empty(rows, columns, tokens.shape[1])
    for row in range(rows):
        for column in range(columns):
            apart = [(a // columns - row) ** 2 + (a % columns - column) ** 2 for a in anchors]
            nearest[row, column] = tokens[apart.index(min(apart))]
    wide = 0.5 * math.sqrt(rows * columns / len(anchors))
    reach = math.ceil(2 * wide)
    offsets = range(-reach, reach + 1)
    total = sum(math.exp(-0.5 * (offset / wide) ** 2) for offset in offsets)
    blurred = torch.zeros_like(nearest)
    for row in range(rows):
        for column in range(columns):
            for down in offsets:
                for across in offsets:
                    weight = math.exp(-0.5 * (down**2 + across**2) / wide**2) / total**2
                    near = min(max(row + down, 0), rows - 1), min(max(column + across, 0), columns - 1)
                    blurred[row, column] += weight * nearest[near]
    whole = blurred.reshape(rows * columns, -1)
    whole[anchors] = tokens
    return whole


def chosen(whole: Tensor, anchors: list[int], count: int, rows: int, columns: int) -> list[int]:
    """The anchors, and as many further cells as are missing: those whose surroundings vary most."""
    grid = whole.double().reshape(rows, columns, -1)
    scores = []
    for row in range(rows):
        for column in range(columns):
            around = grid[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].flatten(0, 1)
            scores.append(float(around.var(dim=0, unbiased=False).mean()))
    others = sorted(set(range(rows * columns)) - set(anchors), key=lambda cell: (-scores[cell], cell))
    return sorted([*anchors, *others[: count - len(anchors)]])


def just_in_time(
    velocity: Velocity,
    noise: Tensor,
    rows: int,
    columns: int,
    sigmas: Sequence[Sequence[float]],
    counts: Sequence[int],
) -> tuple[Tensor, list[list[int]]]:
    """Give the tokens [rows * columns, C] at the end, and the anchors of every stage."""
    anchors = first_anchors(rows, columns, counts[0])
    x, stages = noise[anchors], [anchors]
    for stage, levels in enumerate(sigmas):
        clean = x
        for now, following in pairwise(levels):
            v = velocity(x, [divmod(anchor, columns) for anchor in anchors], now)
            clean, x = x - now * v, x + (following - now) * v
        if stage + 1 == len(sigmas):
            break
        whole = filled(clean, anchors, rows, columns)
        more = chosen(whole, anchors, counts[stage + 1], rows, columns)
        latents = (1 - levels[-1]) * whole + levels[-1] * noise
        latents[anchors] = x
        x, anchors = latents[more], more
        stages.append(anchors)
    return x, stages
