"""LatentLift: the clean latents themselves, resized."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch.nn import functional

from fastdit.config import register
from fastdit.schedule.lifts.base import CleanLift, Switch


@register
@dataclasses.dataclass(frozen=True)
class LatentLift(CleanLift):
    """Resizes the clean latents themselves, which costs nothing.

    An enlarged latent is no latent of an enlarged picture, which the steps that follow must mend.

    Args:
        resize: "nearest", "bilinear" or "bicubic".
        noise: "shared", "fresh" or "hadamard" (see `CleanLift`).

    Raises:
        InvalidConfig: for another word.

    >>> frames = torch.tensor([[[[1.0, 2.0]]]])
    >>> LatentLift().lifted(None, frames).tolist()
    [[[[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]]]
    """

    resize: Literal["nearest", "bilinear", "bicubic"] = "nearest"

    def lifted(self, switch: Switch, frames: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(frames, scale_factor=2, mode=self.resize)
