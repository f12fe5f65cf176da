"""PixelLift: the clean latents as a picture, enlarged and encoded again."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.nn import functional

from fastdit.config import register
from fastdit.models.autoencoders import Coding
from fastdit.schedule.lifts.base import CleanLift, Switch


@register
@dataclasses.dataclass(frozen=True)
class PixelLift(CleanLift):
    """Decodes the clean latents, enlarges the picture (bicubic) and encodes it again.

    The result is a legal latent of a picture that is soft and otherwise right, so the next stage may start late and
    keep what the coarse one composed. Costs a decoding at half the size and an encoding at the full one. MrFlow (arXiv
    2607.01642) enlarges in pixels with a trained network; this needs none.

    Args:
        noise: "shared", "fresh" or "hadamard" (see `CleanLift`).

    Raises:
        InvalidConfig: for another word.

    >>> PixelLift()
    PixelLift(noise='shared')
    """

    codes: ClassVar = (Coding.DECODE, Coding.ENCODE)

    def lifted(self, switch: Switch, frames: torch.Tensor) -> torch.Tensor:
        pixels = switch.family.decode(switch.pipeline, frames).float().clamp(-1.0, 1.0)
        enlarged = functional.interpolate(pixels, scale_factor=2, mode="bicubic").clamp(-1.0, 1.0)
        return switch.family.encode(switch.pipeline, enlarged)

    def lowered(self, switch: Switch, frames: torch.Tensor) -> torch.Tensor:
        pixels = switch.family.decode(switch.pipeline, frames).float().clamp(-1.0, 1.0)
        return switch.family.encode(switch.pipeline, functional.avg_pool2d(pixels, 2))
