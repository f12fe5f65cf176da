"""Families whose rotary child makes a table for the frame that it is given: a strip gets the layout's table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from fastdit.layout import TokenLayout
from fastdit.models.family import Arguments, Children, Pipeline, Tables, Transformer
from fastdit.models.frames import FrameFamily
from fastdit.models.rotary import PerImageTable, guided, rotary, shared


@dataclasses.dataclass(frozen=True)
class RotaryFrameFamily(FrameFamily):
    """Frames whose transformer has a child `rope` that gives cosines and sines for a frame's tokens.

    `tables` evaluates them at a layout's places, [1 or B, tokens, D] each.
    """

    tables: Callable[[Transformer, TokenLayout, torch.device], Tables] = dataclasses.field(kw_only=True)

    def child_overrides(self, transformer: Transformer, layout: TokenLayout, latents: torch.Tensor) -> Children:
        if layout.whole:
            return {}
        tables = self.tables(transformer.rope, layout, latents.device)
        return {"rope": _GivenTables(tuple(guided(table, latents.shape[0]) for table in tables))}


class _GivenTables(nn.Module):
    """A rotary child that gives the same tables for every frame."""

    def __init__(self, tables: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.__dict__["_tables"] = tables

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor | PerImageTable, ...]:
        return tuple(shared(table) for table in self.__dict__["_tables"])


@dataclasses.dataclass(frozen=True)
class HunyuanImageFamily(RotaryFrameFamily):
    """HunyuanImage 2.1: every latent pixel is a token."""

    def refusal(self, pipeline: Pipeline, arguments: Arguments) -> str | None:
        if pipeline.transformer.config.use_meanflow:
            return (
                "this distilled transformer is told the timestep at which a step ends, which the pipeline takes for "
                "the next step's own, and between two stages it is not; use the model that was not distilled"
            )
        guiders = (getattr(pipeline, name, None) for name in ("guider", "ocr_guider"))
        if any(getattr(guider, "adaptive_projected_guidance_momentum", None) is not None for guider in guiders):
            return (
                "the pipeline's guider averages predictions over its steps, whose tokens change; give guiders without "
                "adaptive_projected_guidance_momentum"
            )
        return super().refusal(pipeline, arguments)


def _plain(rope: Transformer, layout: TokenLayout, device: torch.device) -> Tables:
    cosines, sines = rotary(layout.positions(device), rope.rope_dim, rope.theta, use_real=True)
    return cosines, sines


def _spread(rope: Transformer, layout: TokenLayout, device: torch.device) -> Tables:
    """Evaluate whole indices of the range; a place between two tokens has one of its own where the range is finer."""
    places = layout.positions(device)
    indices = (places * places.new_tensor(rope.rope_axes_dim) / places.new_tensor(layout.extent)).floor()
    rows = rotary(indices, (rope.dim // 2, rope.dim // 2), rope.theta)
    return torch.cat([rows.real, rows.real], dim=-1), torch.cat([rows.imag, rows.imag], dim=-1)


HUNYUAN_IMAGE = HunyuanImageFamily("HunyuanImage", ("HunyuanImagePipeline",), patch=1, tables=_plain)
#: CogView4 spreads its rotary indices over a fixed range, whatever the picture's size.
COGVIEW4 = RotaryFrameFamily("CogView4", ("CogView4Pipeline",), tables=_spread)
FAMILIES = (HUNYUAN_IMAGE, COGVIEW4)
