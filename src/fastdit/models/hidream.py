"""HiDream-I1: frames that the model cuts into patches itself, or tokens with ids, which mixed stages give it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from fastdit.layout import TokenLayout
from fastdit.models.family import Arguments, Pipeline, Placed
from fastdit.models.frames import FrameFamily
from fastdit.models.rotary import guided


@dataclasses.dataclass(frozen=True)
class HiDreamFamily(FrameFamily):
    """Ids (0, row, column).

    The model pads frames that are not square to its largest number of tokens; given tokens it pads nothing, so only
    square pictures are left to it.
    """

    def size(self, pipeline: Pipeline, arguments: Arguments) -> tuple[int, int]:
        default = self.default_side(pipeline)
        height, width = arguments.get("height") or default, arguments.get("width") or default
        # The pipeline keeps the aspect ratio and makes the area its own.
        scale, division = math.sqrt(default**2 / (width * height)), pipeline.vae_scale_factor * self.patch
        return int(height * scale // division * division), int(width * scale // division * division)

    def place(self, arguments: Arguments, given: TokenLayout, latents: torch.Tensor, layout: TokenLayout) -> Placed:
        name, batch = next(iter(arguments)), latents.shape[0]
        rows, columns = (side // self.patch for side in latents.shape[2:])
        if rows == columns and layout.whole:
            return {**arguments, name: latents}
        ids = nn.functional.pad(layout.positions(latents.device), (1, 0))
        # The model's own order: the channels of a patch's pixel side by side.
        tokens = self.tokens(latents).unflatten(2, (-1, self.patch**2)).transpose(2, 3).flatten(2)
        return {
            **arguments,
            name: tokens,
            "img_ids": guided(ids, batch).expand(batch, -1, -1),
            "img_sizes": [(rows, columns)] * batch,
            "hidden_states_masks": tokens.new_ones(tokens.shape[:2]),
        }

    def latents_of(self, arguments: Arguments, layout: TokenLayout) -> torch.Tensor:
        latents: torch.Tensor = next(iter(arguments.values()))
        if latents.dim() == 4:
            return latents
        return self.latents(latents.unflatten(2, (self.patch**2, -1)).transpose(2, 3).flatten(2), layout)


HIDREAM = HiDreamFamily("HiDream-I1", ("HiDreamImagePipeline",))
FAMILIES = (HIDREAM,)
