"""Which coarse tokens show edges: Canny on the decoded preview, counted a token (the paper's selection)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fastdit.config import register
from fastdit.models.autoencoders import Coding
from fastdit.schedule.selectors.base import Scene, Selector
from fastdit.schedule.selectors.canny import canny

_LUMA = (0.299, 0.587, 0.114)
_LOW, _HIGH = 100, 200


def edge_scores(pixels: torch.Tensor, rows: int, columns: int, *, paper: bool) -> torch.Tensor:
    """Count the edge pixels of each of `rows` x `columns` cells.

    `pixels` [B, 3, H, W] lie in [-1, 1]; the result is float32 [B, rows * columns]. The published code clips them to
    [0, 1] without mapping, which blackens everything darker than mid-grey and hides its edges; `paper` repeats that,
    otherwise the range is mapped.
    """
    shades = grey(pixels)
    if not paper:
        shades = (shades + 1.0) / 2.0
    edges = canny((shades.clamp(0.0, 1.0) * 255.0).to(torch.uint8), _LOW, _HIGH)
    batch, height, width = edges.shape
    cells = edges.reshape(batch, rows, height // rows, columns, width // columns)
    return cells.sum(dim=(2, 4)).float().reshape(batch, rows * columns)


def grey(pixels: torch.Tensor) -> torch.Tensor:
    """Weigh the colours of pixels [B, 3, H, W] to shades of grey [B, H, W], float32, in the pixels' range."""
    weights = torch.stack([torch.full((1, 1), weight, dtype=torch.float32, device=pixels.device) for weight in _LUMA])
    return (pixels.float() * weights).sum(dim=1)


def top_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Pick the `count` best tokens of each image, ascending; equal scores go to the earlier token. [B, count]."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values


@register
@dataclasses.dataclass(frozen=True)
class Edges(Selector):
    """Counts the edge pixels that Canny's method finds in the decoded estimate, as RALU does (arXiv 2507.08422).

    Costs a decoding at half the size, and stays on the device.

    >>> Edges()
    Edges()
    """

    codes: ClassVar = (Coding.DECODE,)

    def scores(self, scene: Scene) -> torch.Tensor:
        return edge_scores(scene.decoded(), scene.rows, scene.columns, paper=not scene.exact)
