"""Lumina-Image 2.0: frames whose tokens follow the text's in one sequence, with places made inside the model."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastdit.layout import TokenLayout
from fastdit.models.family import Arguments, Children, Pipeline, Transformer
from fastdit.models.frames import FrameFamily
from fastdit.models.rotary import guided, rotary


@dataclasses.dataclass(frozen=True)
class Lumina2Family(FrameFamily):
    """Ids (text position, row, column); all tokens of the image share the position after the text's last."""

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        most = min(pipeline.transformer.rope_embedder.axes_lens[1:])
        return super().refusal(pipeline, arguments) or self.too_large(pipeline, arguments, most)

    def child_overrides(self, transformer: Transformer, layout: TokenLayout, latents: torch.Tensor) -> Children:
        if layout.whole:
            return {}
        places = guided(layout.positions(latents.device), latents.shape[0])
        return {"rope_embedder": _PlacedEmbedder(transformer.rope_embedder, places)}


class _PlacedEmbedder(nn.Module):
    """The model's embedder of ids with the tokens of a strip at given places.

    It runs the forward of the model's own class, which finds here what it asks of itself: its patch size, and the rows
    of the ids that it made for a strip.
    """

    def __init__(self, embedder: Transformer, places: torch.Tensor) -> None:
        super().__init__()
        # Kept out of the module tree: the child belongs to the user's model.
        self.__dict__.update(_embedder=embedder, _places=places)
        self.patch_size = embedder.patch_size

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made: tuple[torch.Tensor, ...] = type(self.__dict__["_embedder"]).forward(self, hidden_states, attention_mask)
        return made

    def _get_freqs_cis(self, ids: torch.Tensor) -> torch.Tensor:
        embedder, places = self.__dict__["_embedder"], self.__dict__["_places"]
        # The image's tokens have the largest number of the first axis; in a strip the column tells which one it is.
        image = ids[..., :1] == ids[..., :1].amax(dim=1, keepdim=True)
        column = ids[..., 2:].long().expand(-1, -1, 2)
        placed = torch.where(image, places.expand(len(ids), -1, -1).gather(1, column), ids[..., 1:].float())
        kind = torch.float32 if ids.device.type == "mps" else torch.float64
        moved = torch.cat([ids[..., :1].float(), placed], dim=-1)
        rows: torch.Tensor = rotary(moved, embedder.axes_dim, embedder.theta, freqs_dtype=kind)
        return rows


LUMINA2 = Lumina2Family("Lumina-Image 2", ("Lumina2Pipeline",))
FAMILIES = (LUMINA2,)
