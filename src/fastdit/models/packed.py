"""Families whose latents travel through the pipeline's loop as tokens: FLUX and its relatives.

The transformer gets tokens [B, N, C] and a position for each. Tokens of pictures that a pipeline edits are appended to
the noisy ones, on whose layout they don't depend: they stay in place at every stage, and what the model says of them is
dropped.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import nn

from fastdit.layout import TokenLayout
from fastdit.models.family import PICTURE_ADAPTERS, Arguments, Children, Output, Pipeline, Placed, Tables, Transformer
from fastdit.models.following import followed
from fastdit.models.patches import PatchFamily
from fastdit.models.rotary import PerImagePositions, guided
from fastdit.nested import refilled, tensors_of


@dataclasses.dataclass(frozen=True)
class PackedFamily(PatchFamily):
    """Position ids of `axes` numbers, of which the 2nd and 3rd are the row and the column.

    `cell` is the side of a token in units of the pipeline's `vae_scale_factor`. The pipeline's method `unpacking` turns
    tokens into frames for the decoder.
    """

    cell: int = 2
    axes: int = 3
    unpacking: str = "_unpack_latents"
    refused: tuple[str, ...] = PICTURE_ADAPTERS

    def token_side(self, pipeline: Pipeline) -> int:
        return int(pipeline.vae_scale_factor * self.cell)

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def latents(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return tokens

    def latents_of(self, arguments: Arguments, layout: TokenLayout) -> torch.Tensor:
        tokens: torch.Tensor = next(iter(arguments.values()))
        return tokens[:, : layout.tokens, : self.channels(tokens.shape[2])]

    def appended(self, arguments: Arguments, layout: TokenLayout) -> int:
        tokens: torch.Tensor = next(iter(arguments.values()))
        return tokens.shape[1] - layout.tokens

    def channels(self, given: int) -> int:
        """Say how many of a token's channels are the latents'; the rest describe a picture and follow the layout."""
        return given

    def place(self, arguments: Arguments, given: TokenLayout, latents: torch.Tensor, layout: TokenLayout) -> Placed:
        name, tokens = next(iter(arguments.items()))
        count = given.tokens
        appended, joined = tokens[:, count:], tokens[:, :count, latents.shape[2] :]
        if joined.shape[2]:
            # The pipeline joins what follows the stages, but for the first step, which it begins at the full size.
            latents = torch.cat([latents, joined if given is layout else followed(self, joined, layout)], dim=2)
        placed = {**arguments, name: torch.cat([latents, appended], dim=1) if appended.shape[1] else latents}
        if arguments.get("attention_mask") is not None:
            text = arguments["attention_mask"][:, : arguments["encoder_hidden_states"].shape[1]]
            placed["attention_mask"] = torch.cat([text, text.new_ones(placed[name].shape[:2])], dim=1)
        return {**placed, **self._positions(arguments, appended.shape[1], layout, latents)}

    def velocity(self, output: Output, layout: TokenLayout) -> Output:
        count = layout.tokens
        if isinstance(output, tuple) and len(output) == 1:  # the common case, without a walk
            return cast(Output, (output[0][:, :count],))
        kept: Output = refilled(output, iter([tokens[:, :count] for tokens in tensors_of(output)]))
        return kept

    def child_overrides(self, transformer: Transformer, layout: TokenLayout, latents: torch.Tensor) -> Children:
        if layout.images == 1:
            return {}
        return {"pos_embed": PerImagePositions(transformer.pos_embed, self.axes)}

    def turn(self, transformer: Transformer, layout: TokenLayout, device: torch.device) -> Tables:
        places = nn.functional.pad(layout.positions(device), (1, self.axes - 3))
        cosines, sines = transformer.pos_embed(places.flatten(0, 1))
        return cosines.unflatten(0, places.shape[:2]), sines.unflatten(0, places.shape[:2])

    def pipeline_overrides(self) -> tuple[str, ...]:
        return (self.unpacking,)

    def _positions(self, arguments: Arguments, appended: int, layout: TokenLayout, latents: torch.Tensor) -> Arguments:
        """Make the ids of a layout; where images have places of their own, side by side [S, B * axes].

        A pipeline gives the same ids at every step, so what was made of them is kept with the layout.
        """
        given = arguments["img_ids"], arguments["txt_ids"], latents.shape[0], appended
        known = layout.__dict__.get("_ids")
        if known is not None and known[0][0] is given[0] and known[0][1] is given[1] and known[0][2:] == given[2:]:
            return dict(known[1])
        ids, text = (_shared(arguments[name])[:, : self.axes] for name in ("img_ids", "txt_ids"))
        own = len(ids) - appended
        # Fractional places are exact in float32 and not in bfloat16, so the ids' dtype is not kept. The ids count from
        # that of the first place, which a layout without a token there is half a place away from.
        places = guided(layout.positions(latents.device), latents.shape[0])
        places = nn.functional.pad(places, (1, self.axes - 3)) + ids[:own].float().amin(dim=0).floor()
        images = len(places)
        beside = torch.cat([places.transpose(0, 1).flatten(1), ids[own:].float().repeat(1, images)])
        made = {"img_ids": beside, "txt_ids": text.repeat(1, images)}
        object.__setattr__(layout, "_ids", (given, made))
        return made


def _shared(ids: torch.Tensor) -> torch.Tensor:
    """Give ids without a batch; those of a batch are alike, and models take the first."""
    return ids[0] if ids.dim() == 3 else ids
