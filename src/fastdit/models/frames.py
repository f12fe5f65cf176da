"""Families whose latents travel through the pipeline's loop as frames, which the transformer cuts into patches itself.

A coarse or fine stage travels as a frame [B, C, h, w]. A mixed or sparse stage travels as a strip of 1 x N patches,
[B, C, p, N p], which the model's own patch embedding and unpatchify take as it is. Only the positions of a strip are
not its own: a child of the structural twin gives those of the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fastdit.layout import TokenLayout
from fastdit.models.family import decoded, encoded, refused_arguments
from fastdit.models.patches import assembled, patches


@dataclasses.dataclass(frozen=True)
class FrameFamily:
    """Tokens of `patch` x `patch` latent pixels. `refused` names arguments of a call that a strip can't honour."""

    name: str
    pipelines: tuple[str, ...]
    patch: int = 2
    refused: tuple[str, ...] = ()

    mixes: ClassVar[bool] = True
    one_plane: ClassVar[bool] = True
    one_frame: ClassVar[str | None] = "its transformer makes places inside its forward, undescribed"

    def matches(self, pipeline: Any) -> bool:
        return any(cls.__name__ in self.pipelines for cls in type(pipeline).__mro__)

    def of(self, pipeline: Any) -> FrameFamily:
        return self

    def size(self, pipeline: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        factor = pipeline.vae_scale_factor
        latents = arguments.get("latents")
        if isinstance(latents, torch.Tensor) and latents.dim() == 4:
            # The pipeline takes the user's latents at whatever size they have.
            return latents.shape[2] * factor, latents.shape[3] * factor
        default = self.default_side(pipeline)
        return arguments.get("height") or default, arguments.get("width") or default

    def default_side(self, pipeline: Any) -> int:
        """Give the side in pixels of a picture whose size was not asked for."""
        return int(pipeline.default_sample_size * pipeline.vae_scale_factor)

    def grid(self, pipeline: Any, height: int, width: int) -> tuple[int, int]:
        side = pipeline.vae_scale_factor * self.patch
        return int(height) // side, int(width) // side

    def refusal(self, pipeline: Any, arguments: Mapping[str, Any]) -> str | None:
        latents = arguments.get("latents")
        if latents is not None and (latents.dim() != 4 or any(side % self.patch for side in latents.shape[2:])):
            sides = "of even sides" if self.patch == 2 else f"whose sides are multiples of {self.patch}"
            return f"latents of shape {tuple(latents.shape)} are not frames [B, C, h, w] {sides}; reshape them"
        return refused_arguments(arguments, self.refused)

    def too_large(self, pipeline: Any, arguments: Mapping[str, Any], most: int) -> str | None:
        """Say that the finest stage has no positions, which the model itself would only say when it is reached."""
        rows, columns = self.grid(pipeline, *self.size(pipeline, arguments))
        if max(rows, columns) <= most:
            return None
        return f"{rows} x {columns} tokens are more than the model's {most} positions a side; choose a smaller size"

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        return patches(latents, self.patch)

    def latents(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return assembled(tokens, *(layout.grid or (1, layout.tokens)), self.patch)

    def unpack(self, latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return assembled(latents, rows, columns, self.patch)

    def pack(self, frames: torch.Tensor) -> torch.Tensor:
        return patches(frames, self.patch)

    def halved(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(frames, 2)

    def decode(self, pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
        return decoded(pipeline.vae, frames)

    def encode(self, pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
        return encoded(pipeline.vae, pixels)

    def latents_of(self, arguments: Mapping[str, Any], layout: TokenLayout) -> torch.Tensor:
        latents: torch.Tensor = next(iter(arguments.values()))
        return latents

    def appended(self, arguments: Mapping[str, Any], layout: TokenLayout) -> int:
        return 0

    def place(
        self, arguments: Mapping[str, Any], given: TokenLayout, latents: torch.Tensor, layout: TokenLayout
    ) -> dict[str, Any]:
        return {**arguments, next(iter(arguments)): latents}

    def velocity(self, output: Any, layout: TokenLayout) -> Any:
        return output

    def child_overrides(self, transformer: Any, layout: TokenLayout, latents: torch.Tensor) -> dict[str, Any]:
        raise NotImplementedError

    def turn(self, transformer: Any, layout: TokenLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def pipeline_overrides(self) -> tuple[str, ...]:
        return ("vae.decode",)
