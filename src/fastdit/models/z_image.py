"""Z-Image: lists of frames [C, 1, h, w], whose places the model makes as whole numbers."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastdit.layout import TokenLayout
from fastdit.models.family import Arguments, Children, Pipeline, Placed, Transformer
from fastdit.models.frames import FrameFamily
from fastdit.models.rotary import guided, rotary


@dataclasses.dataclass(frozen=True)
class ZImageFamily(FrameFamily):
    """Ids (text position, row, column); all tokens of the image share the position after the padded text's last."""

    def default_side(self, pipeline: Pipeline) -> int:
        return 1024

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        most = min(pipeline.transformer.axes_lens[1:])
        return super().refusal(pipeline, arguments) or self.too_large(pipeline, arguments, most)

    def latents_of(self, arguments: Arguments, layout: TokenLayout) -> torch.Tensor:
        return torch.stack([frame.squeeze(1) for frame in next(iter(arguments.values()))])

    def place(self, arguments: Arguments, given: TokenLayout, latents: torch.Tensor, layout: TokenLayout) -> Placed:
        return {**arguments, next(iter(arguments)): list(latents.unsqueeze(2).unbind())}

    def child_overrides(self, transformer: Transformer, layout: TokenLayout, latents: torch.Tensor) -> Children:
        if layout.whole:
            return {}
        places = guided(layout.positions(latents.device), latents.shape[0])
        return {"rope_embedder": _PlacedEmbedder(transformer.rope_embedder, places)}


class _PlacedEmbedder(nn.Module):
    """The model's embedder of ids with the tokens of strips at given places; ids of text stay as they are.

    The model asks for the rows of all images at once, each padded with ids of zeros, and then for those of all texts.
    """

    def __init__(self, embedder: Transformer, places: torch.Tensor) -> None:
        super().__init__()
        self.axes_dims, self.theta = tuple(embedder.axes_dims), embedder.theta
        self.__dict__["_places"] = places

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = self.__dict__["_places"]
        # A strip's columns count its tokens from 0 on, and a column above 0 is found in no text and no padding.
        column = ids[:, 2].long()
        first = (column == 0) & (column.roll(-1) == 1)
        number = (first.cumsum(0) - 1).clamp(min=0) % len(places)
        placed = torch.where((first | (column > 0))[:, None], places[number, column], ids[:, 1:].float())
        moved = torch.cat([ids[:, :1].float(), placed], dim=1)
        rows: torch.Tensor = rotary(moved, self.axes_dims, self.theta, freqs_dtype=torch.float64)
        return rows.to(torch.complex64)


Z_IMAGE = ZImageFamily("Z-Image", ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"))
FAMILIES = (Z_IMAGE,)
