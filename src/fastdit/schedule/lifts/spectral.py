"""SpectralLift: the coarse latents' band is kept as it is, noise and all, and the bands above it are filled with noise.

With the orthonormal cosine transform (DCT-II), a coarse frame's coefficients are half as large as the fine frame's in
the same band, where the noise's are unit normals in both. So x_e = e X + (1 - e) n becomes, times k,

    k x_e = s (2 X) + (1 - s) n,   k = 2 / (2 - e),   s = e / (2 - e),

which is the fine flow's own marginal in that band at the earlier time s. What the fine frame has above the band is not
known yet: it begins as noise of the level (1 - s).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from fastdit.config import register
from fastdit.errors import InvalidConfig
from fastdit.schedule.lifts.base import Lift, Switch


@register
@dataclasses.dataclass(frozen=True)
class SpectralLift(Lift):
    """Keeps the coarse latents as the low band of the fine ones, and fills the bands above with noise.

    From the time e back to s = e / (2 - e), or earlier with more noise. Right where the picture has little above the
    coarse band beside the noise, which is early in a run. Takes whole frames: no mixed stage, and no stage that is
    coarser than the one before. Costs two products of small matrices.

    Raises:
        InvalidConfig: from `check`, for times that are too close to each other.

    Paper: Spectral Progressive Diffusion, arXiv 2605.18736.

    >>> SpectralLift().check(ends=(0.5,), starts=(0.3,))
    """

    whole_frames: ClassVar = True

    def check(self, ends: Sequence[float], starts: Sequence[float]) -> None:
        for end, start in zip(ends, starts, strict=True):
            if start > end / (2.0 - end) + 1e-9:
                raise InvalidConfig(
                    f"SpectralLift goes back from the time {end} to {end / (2.0 - end):.4f} at the latest, and not to "
                    f"{start}; start earlier, or lift the clean estimate"
                )

    def __call__(self, switch: Switch) -> torch.Tensor:
        family, rows, columns = switch.family, switch.before.rows, switch.before.columns
        coarse = family.unpack(switch.latents.float(), rows // 2, columns // 2)
        height, width = (_enlarging(size, coarse) for size in coarse.shape[-2:])
        noise = family.unpack(
            switch.draw((len(coarse), rows * columns, switch.latents.shape[2]), coarse.device), rows, columns
        )
        low = height @ (height.mT @ noise @ width) @ width.mT
        # What the kept band has of noise at the time s, and what the time asked for has beyond it.
        end, start = switch.end, switch.start
        scale = 2.0 * start / end
        more = math.sqrt(max((1.0 - start) ** 2 - (scale * (1.0 - end)) ** 2, 0.0))
        kept = height @ coarse @ width.mT
        return family.pack(scale * kept + more * low + (1.0 - start) * (noise - low))


def _enlarging(size: int, like: torch.Tensor) -> torch.Tensor:
    """Give [2 size, size], whose columns are orthonormal: it keeps cosine coefficients, at twice as many places."""
    coarse, fine = _cosines(size), _cosines(2 * size)
    return (fine[:size].mT @ coarse).to(like)


def _cosines(size: int) -> torch.Tensor:
    """Give the orthonormal DCT-II of a size as a matrix [frequencies, places], float64 on the host."""
    places = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
    frequencies = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / size * frequencies[:, None] * places) * math.sqrt(2.0 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix
