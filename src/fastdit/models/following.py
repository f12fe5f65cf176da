"""What a pipeline's loop holds at the full size and joins with the latents: masks, and the picture that they protect.

A picture and its mask follow a layout at half their size (`Family.halved`) under coarse tokens, and as they are under
fine ones, however many of them there are; noise is averaged so that it stays unit noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastdit.layout import TokenLayout

if TYPE_CHECKING:
    from fastdit.models.family import Family


def followed(family: Family, latents: torch.Tensor, layout: TokenLayout, *, noise: bool = False) -> torch.Tensor:
    """Bring latents of the full grid, in the pipeline's shape, to a layout."""
    if layout.kind == "fine":
        return latents
    coarse = tokens = family.tokens(latents)
    if layout.coarse:
        frames = family.unpack(tokens, layout.rows, layout.columns).float()
        # The sum of four unit normals over two is a unit normal.
        pooled = family.halved(frames) * (2.0 if noise else 1.0)
        coarse = family.pack(pooled.to(latents.dtype))
    return family.latents(layout.of_grids(coarse, tokens), layout)


class Following:
    """A tensor of the full size that stands in a pipeline's loop and is that of the present stage where it is used.

    It knows the few operations that loops do with masks: `1 - mask`, `mask * latents`, `mask.chunk(2)`, and joining
    them with each other and with the latents.
    """

    def __init__(self, full: torch.Tensor, present: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._full = full
        self._present = present

    def __rsub__(self, other: float) -> Following:
        return Following(other - self._full, self._present)

    def __mul__(self, latents: torch.Tensor) -> torch.Tensor:
        return self._present(self._full) * latents

    def chunk(self, parts: int) -> tuple[Following, ...]:
        """Split what holds both halves of a guided batch."""
        return tuple(Following(part, self._present) for part in self._full.chunk(parts))

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., torch.Tensor],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor | Following:
        if function is not torch.cat:
            raise TypeError(f"a mask that follows the stages was given to {function.__name__}, which it can't answer")
        parts, *others = args
        if all(isinstance(part, cls) for part in parts):
            return cls(torch.cat([part._full for part in parts], *others, **(kwargs or {})), parts[0]._present)
        now = [part._present(part._full) if isinstance(part, cls) else part for part in parts]
        return torch.cat(now, *others, **(kwargs or {}))
