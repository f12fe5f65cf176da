"""Stable Diffusion 3 and 3.5: 2 x 2 patches of a latent frame, with a table of positions that is added to them.

The model's table [M, M, D] is separable: half of a place's row is that of its column, half that of its row, and each
half holds sin(w_k x) and cos(w_k x) of a coordinate x that grows evenly from index to index. So the row of a place
between two indices is that of the lower one, turned in each plane (sin, cos) by the same share of the angle between
the two. At whole indices this is the table itself; base size, scale and cropping are in it already.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fastdit.errors import InvalidConfig
from fastdit.layout import TokenLayout
from fastdit.models.family import Arguments, Children, Pipeline, Placed, Transformer, refused_arguments
from fastdit.models.frames import FrameFamily
from fastdit.models.rotary import guided
from fastdit.structure import structural_twin


@dataclasses.dataclass(frozen=True)
class SD3Family(FrameFamily):
    """Tokens of SD3 and SD3.5: 64 channels = 16 latent channels x 2 x 2 pixels, places in a centred crop of a table."""

    one_frame: ClassVar[str | None] = (
        "its places are added to the tokens before the blocks, so queries and keys are not turned by any"
    )

    picture_arguments: tuple[str, ...] = ("ip_adapter_image_embeds", "ip_adapter_masks", "ip_hidden_states")

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        attention = arguments.get("joint_attention_kwargs") or {}
        given = {f"joint_attention_kwargs[{name!r}]": True for name in self.picture_arguments if name in attention}
        if refusal := refused_arguments(given, tuple(given)):
            return refusal
        if arguments.get("mu") is not None:
            return "mu= shifts the pipeline's own timesteps, which the schedule owns; leave it out, or set base_shift"
        unfit = super().refusal(pipeline, arguments) or self._unfit(pipeline.transformer)
        return unfit or self.too_large(pipeline, arguments, pipeline.transformer.pos_embed.pos_embed_max_size)

    def place(self, arguments: Arguments, given: TokenLayout, latents: torch.Tensor, layout: TokenLayout) -> Placed:
        if arguments.get("block_controlnet_hidden_states") is not None:
            raise InvalidConfig(
                "block_controlnet_hidden_states are tied to one token layout, and the schedule changes it; leave the "
                "ControlNet out, or drop the schedule"
            )
        return super().place(arguments, given, latents, layout)

    def child_overrides(self, transformer: Transformer, layout: TokenLayout, latents: torch.Tensor) -> Children:
        if layout.whole:
            return {}
        embed = transformer.pos_embed
        table = guided(position_rows(embed, layout, latents.device), latents.shape[0])
        height, width = (side // embed.patch_size for side in latents.shape[2:])
        placed = structural_twin(embed, {})
        # An embedding without a maximal size takes its own table for latents of its own size: here, for the stage's.
        placed.__dict__.update(pos_embed_max_size=None, height=height, width=width)
        placed.__dict__["_buffers"] = {**embed._buffers, "pos_embed": table}
        return {"pos_embed": placed}

    def _unfit(self, transformer: Transformer) -> str | None:
        """Say what of the transformer's patches and positions is not as described."""
        embed = transformer.pos_embed
        if transformer.config.patch_size != self.patch:
            return (
                f"the transformer's patch size is {transformer.config.patch_size}, and only {self.patch} is described"
            )
        if embed.pos_embed_max_size is None or not _is_sinusoidal(_table(embed)):
            return (
                "the transformer's table of positions is not made of sines and cosines of rows and columns, so there "
                "is no place between two tokens; drop the schedule"
            )
        return None


def position_rows(embed: Transformer, layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """Evaluate a model's own position embedding at a layout's places, [1 or B, tokens, D].

    A frame of h x w tokens is the centred crop of the table, from index (M - h) // 2 and (M - w) // 2 on.
    """
    table = _table(embed).to(device)
    places = layout.positions(device)
    corner = [(embed.pos_embed_max_size - side) // 2 for side in layout.extent]
    half = table.shape[2] // 2
    columns = _between(table[0, :, :half], places[..., 1] + corner[1])
    rows = _between(table[:, 0, half:], places[..., 0] + corner[0])
    return torch.cat([columns, rows], dim=-1).to(table.dtype)


def _table(embed: Transformer) -> torch.Tensor:
    side: int = embed.pos_embed_max_size
    table: torch.Tensor = embed.pos_embed.reshape(side, side, -1)
    return table


def _between(axis: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Evaluate one axis [M, 2F], sines and then cosines, at places [..., N] in units of its index: [..., N, 2F]."""
    sine, cosine = axis.float().chunk(2, dim=1)
    across = sine[1:] * cosine[:-1] - cosine[1:] * sine[:-1]
    along = cosine[1:] * cosine[:-1] + sine[1:] * sine[:-1]
    angles = torch.atan2(across, along)
    angles = torch.cat([angles, angles[-1:]])
    below = places.floor().long().clamp(0, len(axis) - 1)
    turn = (places - below)[..., None] * angles[below]
    sine, cosine = sine[below], cosine[below]
    turned = sine * turn.cos() + cosine * turn.sin(), cosine * turn.cos() - sine * turn.sin()
    return torch.cat(turned, dim=-1)


def _is_sinusoidal(table: torch.Tensor) -> bool:
    """Whether a table [M, M, D] joins pairs of sines and cosines of its columns to those of its rows."""
    side, _, width = table.shape
    if side < 2 or width % 4:
        return False
    columns, rows = table[0, :, : width // 2].float(), table[:, 0, width // 2 :].float()
    # A checkpoint may have been rounded before it was loaded in the precision that it has here.
    tolerance = 8 * torch.finfo(torch.bfloat16).eps
    for axis in (columns, rows):
        sine, cosine = axis.chunk(2, dim=1)
        if ((sine**2 + cosine**2 - 1).abs() > tolerance).any():
            return False
    diagonal = table.diagonal().T.float()
    return bool(((diagonal - torch.cat([columns, rows], dim=1)).abs() <= tolerance).all())


SD3 = SD3Family(
    "Stable Diffusion 3",
    ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    refused=("ip_adapter_image", "ip_adapter_image_embeds"),
)
FAMILIES = (SD3,)
