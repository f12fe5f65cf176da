"""A lift between latents and pixels: latents are enlarged, and corrected where they are the least legal.

    z = L + w (P - L),   L the enlarged latents, P the latents of the enlarged picture

w is 0 but for the places where |P - L|, mean over channels, is largest: there it rises from 1/2 to 1. After SelfLift
(2026), which corrects the worst 30 to 40 %.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from torch.nn import functional

from fastdit.config import Range, register
from fastdit.schedule.lifts.base import Switch
from fastdit.schedule.lifts.pixel import PixelLift


@register
@dataclasses.dataclass(frozen=True)
class CorrectedLift(PixelLift):
    """Enlarges latents (bilinear) and corrects the worst places towards those of the enlarged picture (SelfLift, 2026).

    Costs what a `PixelLift` costs.

    Args:
        share: the part of the places that are corrected, above 0 and at most 1.
        noise: "shared", "fresh" or "hadamard" (see `CleanLift`).

    Raises:
        InvalidConfig: for values out of range.

    >>> CorrectedLift(share=0.5).share
    0.5
    """

    share: Annotated[float, Range(above=0, at_most=1)] = 0.35

    def lifted(self, switch: Switch, frames: torch.Tensor) -> torch.Tensor:
        enlarged = functional.interpolate(frames.float(), scale_factor=2, mode="bilinear")
        difference = super().lifted(switch, frames).float() - enlarged
        apart = difference.abs().mean(dim=1, keepdim=True)
        places = apart.flatten(1)
        least = places.quantile(1.0 - self.share, dim=1).view(-1, 1, 1, 1)
        most = places.amax(dim=1).view(-1, 1, 1, 1)
        weight = 0.5 + 0.5 * (apart - least) / (most - least).clamp_min(1e-12)
        return enlarged + torch.where(apart >= least, weight, 0.0) * difference
