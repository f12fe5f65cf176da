"""Tokens as square patches of latent frames: what families of packed tokens and of frames have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from fastdit.layout import TokenLayout
from fastdit.models.autoencoders import at_hand, decoded, encoded
from fastdit.models.family import Arguments, Autoencoder, Children, Pipeline, Transformer, refused_arguments

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class PatchFamily:
    """Tokens of `patch` x `patch` latent pixels, for pipelines of the classes `pipelines` and those made of them.

    `refused` names arguments of a call that no stage but the last could honour. `decoding` and `encoding` translate
    between latent frames and pixels, given the autoencoder.
    """

    name: str
    pipelines: tuple[str, ...]
    _: dataclasses.KW_ONLY
    patch: int = 2
    refused: tuple[str, ...] = ()
    decoding: Callable[[Autoencoder, torch.Tensor], torch.Tensor] = decoded
    encoding: Callable[[Autoencoder, torch.Tensor], torch.Tensor] = encoded

    mixes: ClassVar[bool] = True
    one_plane: ClassVar[bool] = True
    one_frame: ClassVar[str | None] = None

    def matches(self, pipeline: Pipeline) -> bool:
        return any(cls.__name__ in self.pipelines for cls in type(pipeline).__mro__)

    def of(self, pipeline: Pipeline) -> Self:
        return self

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        default = self.default_side(pipeline)
        return arguments.get("height") or default, arguments.get("width") or default

    def default_side(self, pipeline: Pipeline) -> int:
        """Give the side in pixels of a picture whose size was not asked for."""
        side = getattr(pipeline, "default_sample_size", None) or pipeline.transformer.config.sample_size
        return int(side * pipeline.vae_scale_factor)

    def grid(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int]:
        side = self.token_side(pipeline)
        return int(height) // side, int(width) // side

    def token_side(self, pipeline: Pipeline) -> int:
        """Give the side of a token in pixels."""
        return int(pipeline.vae_scale_factor * self.patch)

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        return refused_arguments(arguments, self.refused)

    def unpack(self, latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return assembled(latents, rows, columns, self.patch)

    def pack(self, frames: torch.Tensor) -> torch.Tensor:
        return patches(frames, self.patch)

    def halved(self, frames: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(frames, 2)

    def decode(self, pipeline: Pipeline, frames: torch.Tensor) -> torch.Tensor:
        return self.decoding(at_hand(pipeline.vae), frames)

    def encode(self, pipeline: Pipeline, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoding(at_hand(pipeline.vae), pixels)

    def child_overrides(self, transformer: Transformer, layout: TokenLayout, latents: torch.Tensor) -> Children:
        return {}


def patches(frames: torch.Tensor, size: int = 2) -> torch.Tensor:
    """Cut frames [B, C, h, w] into tokens [B, h w / size^2, C size^2], in raster order."""
    batch, channels, height, width = frames.shape
    rows, columns = height // size, width // size
    cut = frames.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, rows * columns, channels * size * size)


def assembled(tokens: torch.Tensor, rows: int, columns: int, size: int = 2) -> torch.Tensor:
    """Undo `patches`: lay tokens [B, rows * columns, C size^2] out as frames [B, C, rows size, columns size]."""
    batch, _, width = tokens.shape
    channels = width // (size * size)
    cut = tokens.reshape(batch, rows, columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, channels, rows * size, columns * size)
