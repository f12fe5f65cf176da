"""The embedded pipelines: small text-to-image models in the real FLUX and SD3 classes that need no download.

`load_mini()` gives a `FluxPipeline`, `load_mini("sd3")` a `StableDiffusion3Pipeline`; both make 256 x 256 pictures of
one or two objects, and `fastdit.mini.judge` says whether they show what was asked. `load_mini("flux-512")` is for a
larger `FluxPipeline` of 512 x 512 pictures, which is still being trained. The recipes are in the repository's
benchmarks/training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

if TYPE_CHECKING:
    import torch

    from fastdit.mini.large.pipeline import LargeMiniFluxPipeline
    from fastdit.mini.pipeline_flux import MiniFluxPipeline
    from fastdit.mini.pipeline_sd3 import MiniStableDiffusion3Pipeline

__all__ = ["load_mini"]

Architecture = Literal["flux", "flux-512", "sd3"]


@overload
def load_mini(architecture: Literal["flux"] = ..., *, torch_dtype: torch.dtype | None = ...) -> MiniFluxPipeline: ...
@overload
def load_mini(architecture: Literal["flux-512"], *, torch_dtype: torch.dtype | None = ...) -> LargeMiniFluxPipeline: ...
@overload
def load_mini(
    architecture: Literal["sd3"], *, torch_dtype: torch.dtype | None = ...
) -> MiniStableDiffusion3Pipeline: ...
@overload
def load_mini(
    architecture: Architecture, *, torch_dtype: torch.dtype | None = ...
) -> MiniFluxPipeline | MiniStableDiffusion3Pipeline: ...


def load_mini(
    architecture: Architecture = "flux", *, torch_dtype: torch.dtype | None = None
) -> MiniFluxPipeline | MiniStableDiffusion3Pipeline:
    """Load an embedded pipeline from the package, offline, in float32 or in `torch_dtype`.

    `architecture` is "flux" (guidance as an input, 50 steps) or "sd3" (guided by a second prediction, 28 steps). Raises
    `InvalidConfig` for any other, and `UnsupportedModel` for "flux-512", whose weights aren't part of this version.
    """
    if architecture == "flux":
        from fastdit.mini.pipeline_flux import load as load_flux

        return load_flux(torch_dtype=torch_dtype)
    if architecture == "flux-512":
        from fastdit.mini.large.pipeline import load as load_large

        return load_large(torch_dtype=torch_dtype)
    if architecture == "sd3":
        from fastdit.mini.pipeline_sd3 import load as load_sd3

        return load_sd3(torch_dtype=torch_dtype)
    from fastdit.errors import InvalidConfig

    raise InvalidConfig(f"the embedded pipelines are 'flux' and 'sd3', got {architecture!r}; give one of them")
