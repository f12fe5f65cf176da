"""LatentVariance: where the clean latents differ from those around them."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from fastdit.config import register
from fastdit.schedule.selectors.base import Scene, Selector


@register
@dataclasses.dataclass(frozen=True)
class LatentVariance(Selector):
    """The variance of the clean latents over a token and those around it (3 x 3), mean over channels.

    Stays on the device and decodes nothing; the activation of JiT (arXiv 2603.10744) is guided by such a variance.

    >>> from fastdit.schedule.selectors.base import Scene
    >>> clean = torch.tensor([0.0, 0.0, 0.0, 3.0])[None, :, None]  # four tokens in a row, one channel
    >>> LatentVariance().scores(Scene(None, None, 1, 4, clean)).tolist()
    [[0.0, 0.0, 2.0, 2.25]]
    """

    def scores(self, scene: Scene) -> torch.Tensor:
        grid = scene.clean.float().transpose(1, 2).unflatten(2, (scene.rows, scene.columns))
        mean, square = (
            functional.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)
            for values in (grid, grid.square())
        )
        return (square - mean.square()).mean(dim=1).flatten(1)
