"""The embedded pipeline: a small text-to-image model in the real FLUX classes that needs no download.

`load_mini()` gives a `FluxPipeline` that makes 256 x 256 pictures of one or two objects; `fastdit.mini.judge` says
whether they show what was asked. `fastdit.mini.train` is the recipe of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastdit.mini.pipeline import MiniFluxPipeline

__all__ = ["load_mini"]


def load_mini(*, torch_dtype: torch.dtype | None = None, **options: Any) -> MiniFluxPipeline:
    """Load the embedded pipeline from the package, offline, in float32 or in `torch_dtype`.

    `options` go to `DiffusionPipeline.from_pretrained`.
    """
    from fastdit.mini.pipeline import load

    return load(torch_dtype=torch_dtype, **options)
