"""The description that a model family gives of its tokens, and the list of described families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from fastdit.layout import TokenLayout


class Family(Protocol):
    """How a family of pipelines lays its image tokens out.

    A schedule works on tokens [B, N, C]; through the pipeline's own loop its latents travel in the pipeline's shape,
    which `tokens` and `latents` translate.
    """

    name: str

    def matches(self, pipeline: Any) -> bool:
        """Whether this description holds for a pipeline (by its class)."""

    def size(self, pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Give the image's height and width in pixels for a call's arguments."""

    def grid(self, pipeline: Any, height: int, width: int) -> tuple[int, int]:
        """Give the rows and columns of image tokens for a size in pixels."""

    def refusal(self, pipeline: Any, arguments: Mapping[str, Any]) -> str | None:
        """Say which argument of a call a mixed-resolution schedule can't honour, and what to do; None if none is."""

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn a stage's latents, in the pipeline's shape, into its tokens [B, N, C]."""

    def latents(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Undo `tokens`: give a stage's tokens the shape in which they travel through the pipeline's loop."""

    def unpack(self, latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Turn tokens [B, rows * columns, C] into a latent frame [B, channels, height, width]."""

    def pack(self, frames: torch.Tensor) -> torch.Tensor:
        """Undo `unpack`."""

    def decode(self, pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
        """Decode latent frames to pixels [B, 3, H, W] in about [-1, 1]."""

    def place(self, arguments: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Give the denoiser's keyword arguments with the layout's positions in place."""

    def child_overrides(self, transformer: Any, layout: TokenLayout, latents: torch.Tensor) -> dict[str, Any]:
        """Give the children of the structural twin that a layout replaces, by name (none for most layouts).

        `latents` are a forward's own: their batch is that of the layout, or several of it in a row (guidance).
        """

    def pipeline_overrides(self) -> tuple[str, ...]:
        """Name the methods whose first argument is latents that may have to be lifted first.

        They are the pipeline's own, or one of a component's: "component.method".
        """


def family_of(pipeline: Any) -> Family | None:
    """Find the description of a pipeline's family, or None."""
    from .flux import FLUX
    from .sd3 import SD3

    families: tuple[Family, ...] = (FLUX, SD3)
    return next((family for family in families if family.matches(pipeline)), None)


def decoded(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Decode latent frames with an autoencoder whose latents are scaled and shifted."""
    scaled = frames / vae.config.scaling_factor + vae.config.shift_factor
    pixels: torch.Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return pixels
