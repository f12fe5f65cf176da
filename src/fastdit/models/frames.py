"""Families whose latents travel through the pipeline's loop as frames, which the transformer cuts into patches itself.

A coarse or fine stage travels as a frame [B, C, h, w]. A mixed or sparse stage travels as a strip of 1 x N patches,
[B, C, p, N p], which the model's own patch embedding and unpatchify take as it is. Only the positions of a strip are
not its own: a child of the structural twin gives those of the layout.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fastdit.layout import TokenLayout
from fastdit.models.family import Arguments, Output, Pipeline, Placed, Tables, Transformer
from fastdit.models.patches import PatchFamily, assembled, patches


@dataclasses.dataclass(frozen=True)
class FrameFamily(PatchFamily):
    """Frames. `refused` names arguments of a call that a strip can't honour."""

    one_frame: ClassVar[str | None] = "its transformer makes places inside its forward, undescribed"

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        factor = pipeline.vae_scale_factor
        latents = arguments.get("latents")
        if isinstance(latents, torch.Tensor) and latents.dim() == 4:
            # The pipeline takes the user's latents at whatever size they have.
            return latents.shape[2] * factor, latents.shape[3] * factor
        return super().size(pipeline, arguments)

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        latents = arguments.get("latents")
        if latents is not None and (latents.dim() != 4 or any(side % self.patch for side in latents.shape[2:])):
            sides = "of even sides" if self.patch == 2 else f"whose sides are multiples of {self.patch}"
            return f"latents of shape {tuple(latents.shape)} are not frames [B, C, h, w] {sides}; reshape them"
        return super().refusal(pipeline, arguments)

    def too_large(self, pipeline: Pipeline, arguments: Arguments, most: int) -> str | None:
        """Say that the finest stage has no positions, which the model itself would only say when it is reached."""
        rows, columns = self.grid(pipeline, *self.size(pipeline, arguments))
        if max(rows, columns) <= most:
            return None
        return f"{rows} x {columns} tokens are more than the model's {most} positions a side; choose a smaller size"

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        return patches(latents, self.patch)

    def latents(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return assembled(tokens, *(layout.grid or (1, layout.tokens)), self.patch)

    def latents_of(self, arguments: Arguments, layout: TokenLayout) -> torch.Tensor:
        latents: torch.Tensor = next(iter(arguments.values()))
        return latents

    def appended(self, arguments: Arguments, layout: TokenLayout) -> int:
        return 0

    def place(self, arguments: Arguments, given: TokenLayout, latents: torch.Tensor, layout: TokenLayout) -> Placed:
        return {**arguments, next(iter(arguments)): latents}

    def velocity(self, output: Output, layout: TokenLayout) -> Output:
        return output

    def turn(self, transformer: Transformer, layout: TokenLayout, device: torch.device) -> Tables:
        raise NotImplementedError

    def pipeline_overrides(self) -> tuple[str, ...]:
        return ("vae.decode",)
