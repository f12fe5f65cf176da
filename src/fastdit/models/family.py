"""The description that a model family gives of its tokens, and the list of described families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from fastdit.layout import TokenLayout


class Family(Protocol):
    """How a family of pipelines lays its image tokens out. Latents are packed tokens [B, N, C]."""

    name: str

    def matches(self, pipeline: Any) -> bool:
        """Whether this description holds for a pipeline (by its class)."""

    def size(self, pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Give the image's height and width in pixels for a call's arguments."""

    def grid(self, pipeline: Any, height: int, width: int) -> tuple[int, int]:
        """Give the rows and columns of image tokens for a size in pixels."""

    def refusal(self, pipeline: Any, arguments: Mapping[str, Any]) -> str | None:
        """Say which argument of a call a mixed-resolution schedule can't honour, and what to do; None if none is."""

    def unpack(self, latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Turn tokens [B, rows * columns, C] into a latent frame [B, channels, height, width]."""

    def pack(self, frames: torch.Tensor) -> torch.Tensor:
        """Undo `unpack`."""

    def decode(self, pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
        """Decode latent frames to pixels [B, 3, H, W] in about [-1, 1]."""

    def place(self, arguments: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Give the denoiser's keyword arguments with the layout's positions in place."""

    def child_overrides(self, transformer: Any, layout: TokenLayout, device: torch.device) -> dict[str, Any]:
        """Give the children of the structural twin that a layout replaces, by name (none for most layouts)."""

    def pipeline_overrides(self) -> tuple[str, ...]:
        """Name the pipeline's methods whose first argument is latents that may have to be lifted first."""


def family_of(pipeline: Any) -> Family | None:
    """Find the description of a pipeline's family, or None."""
    from .flux import FLUX

    return next((family for family in (FLUX,) if family.matches(pipeline)), None)
