"""A lift: enlarge the clean latents and sharpen what enlarging has blurred."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from fastdit.config import AtLeastZero, register
from fastdit.schedule.lifts.base import CleanLift, Switch


@register
@dataclasses.dataclass(frozen=True)
class SharpLift(CleanLift):
    """The clean latents enlarged, u = bicubic(x0), with their fine part raised: u + amount (u - blur(u)).

    Args:
        amount: how much of the fine part is added, at least 0; 0 only enlarges.
        noise: "shared", "fresh" or "hadamard", as every lift of the clean estimate takes it.
    """

    amount: AtLeastZero = 0.5

    def lifted(self, switch: Switch, frames: torch.Tensor) -> torch.Tensor:
        return self.enlarged(frames)

    def enlarged(self, frames: torch.Tensor) -> torch.Tensor:
        """Give frames [B, C, h, w] at twice the height and width."""
        large = functional.interpolate(frames, scale_factor=2, mode="bicubic")
        blurred = functional.avg_pool2d(functional.pad(large, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return large + self.amount * (large - blurred)
