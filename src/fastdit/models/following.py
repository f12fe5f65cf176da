"""What a pipeline's loop holds at the full size and joins with the latents: masks, and the picture that they protect.

A picture and its mask follow a layout by their averages under coarse tokens, and as they are under fine ones; noise is
averaged so that it stays unit noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastdit.layout import TokenLayout, gather_tokens

from .family import Family


def followed(family: Family, latents: torch.Tensor, layout: TokenLayout, *, noise: bool = False) -> torch.Tensor:
    """Bring latents of the full grid, in the pipeline's shape, to a layout."""
    if not layout.coarse:
        return latents
    tokens = family.tokens(latents)
    frames = family.unpack(tokens, layout.rows, layout.columns).float()
    # The sum of four unit normals over two is a unit normal.
    pooled = torch.nn.functional.avg_pool2d(frames, 2) * (2.0 if noise else 1.0)
    coarse = family.pack(pooled.to(latents.dtype))
    if layout.kept is None or layout.refined is None:
        return family.latents(coarse, layout)
    children = gather_tokens(tokens, layout.cells(layout.refined))
    return family.latents(torch.cat([gather_tokens(coarse, layout.kept), children], dim=1), layout)


class Following:
    """A mask of the full size that stands in a pipeline's loop and is that of the present stage where it is used.

    It knows the few operations that loops do with masks: `1 - mask`, `mask * latents`, `mask.chunk(2)`.
    """

    def __init__(self, full: torch.Tensor, present: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._full = full
        self._present = present

    def __rsub__(self, other: Any) -> Following:
        return Following(other - self._full, self._present)

    def __mul__(self, latents: torch.Tensor) -> torch.Tensor:
        return self._present(self._full) * latents

    def chunk(self, parts: int) -> tuple[Following, ...]:
        """Split the mask of a guided batch."""
        return tuple(Following(part, self._present) for part in self._full.chunk(parts))
