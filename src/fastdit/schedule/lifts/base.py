"""What becomes of the tokens at a stage switch: the contract of a lift, and the lifts of a clean estimate.

A switch takes latents at the time `end` on one layout to latents at an earlier time `start` on another, most often a
finer one. A lift of noisy latents copies them and mends their noise (`token_copy`); a lift of the clean
estimate brings that to the other layout and adds noise anew,

    x_start = start * lifted + (1 - start) * z,   z ~ N(0, I),

which is the flow's own marginal for whatever clean latents `lifted` is, at any start.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from fastdit.config import Config
from fastdit.errors import InvalidConfig
from fastdit.layout import FineLayout, MixedLayout, TokenLayout
from fastdit.models.autoencoders import Coding
from fastdit.models.family import Family, Pipeline
from fastdit.schedule.lifts import hadamard


@dataclasses.dataclass(frozen=True)
class Switch:
    """Where a run stands between two stages.

    `latents` and `denoised`, the estimate of the clean latents, are tokens [B, N, C] of the layout `before`. `field` is
    the noise that the run began with, tokens [B, rows * columns, C] of the whole fine grid; `draw` makes fresh unit
    noise of a shape, in float32. `exact` is False where known flaws of the published code are wanted.
    """

    family: Family
    pipeline: Pipeline
    before: TokenLayout
    after: TokenLayout
    latents: torch.Tensor
    denoised: torch.Tensor
    field: torch.Tensor
    end: float
    start: float
    draw: Callable[[Sequence[int], torch.device], torch.Tensor]
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Lift(Config, ABC):
    """Base of what a schedule does at a switch."""

    #: Whether the lift takes whole frames alone, and none of which regions are finer.
    whole_frames: ClassVar[bool] = False

    #: What it asks of the autoencoder at a switch: to decode the whole frame before it, to encode the one after it.
    codes: ClassVar[tuple[Coding, ...]] = ()

    def check(self, ends: Sequence[float], starts: Sequence[float]) -> None:
        """Raise `InvalidConfig` where the lift can't go back from the times `ends` to `starts`."""

    @abstractmethod
    def __call__(self, switch: Switch) -> torch.Tensor:
        """Give the tokens [B, N', C] of the layout `switch.after` at the time `switch.start`, in float32."""


@dataclasses.dataclass(frozen=True)
class CleanLift(Lift):
    """Base of the lifts of the clean estimate.

    Args:
        noise: with "shared" every token has the noise that the run began with at its place (four cells' sum, halved,
            for a coarse token), so that what a stage has drawn out of its noise, the next finds in its own. "fresh"
            draws anew. With "hadamard" a coarse token has the shared noise, and fine ones are its Hadamard children:
            the coarse part of their noise is the run's, its details are drawn anew at every switch (Fresco, arXiv
            2601.07462). That follows the same law as "shared", whose details are the run's too.
    """

    _: dataclasses.KW_ONLY
    noise: Literal["shared", "fresh", "hadamard"] = "shared"

    def check(self, ends: Sequence[float], starts: Sequence[float]) -> None:
        if any(start > end for start, end in zip(starts, ends, strict=True)):
            raise InvalidConfig(
                f"a stage starts at no later time than the one before it ended, got ends={tuple(ends)} and "
                f"starts={tuple(starts)}"
            )

    @abstractmethod
    def lifted(self, switch: Switch, frames: torch.Tensor) -> torch.Tensor:
        """Bring frames [B, C, h, w] of clean coarse latents to twice the height and width."""

    def lowered(self, switch: Switch, frames: torch.Tensor) -> torch.Tensor:
        """Bring frames of clean fine latents to half the height and width, for schedules that go back."""
        return functional.avg_pool2d(frames, 2)

    def __call__(self, switch: Switch) -> torch.Tensor:
        before, after, denoised = switch.before, switch.after, switch.denoised.float()
        rows, columns = before.rows, before.columns
        if before.coarse:
            coarse = coarse_tokens(switch.family, before, denoised)
            frames = self.lifted(switch, switch.family.unpack(coarse, rows // 2, columns // 2))
            fine = with_refined(before, denoised, switch.family.pack(frames.float()))
        else:
            frames = self.lowered(switch, switch.family.unpack(denoised, rows, columns))
            coarse, fine = switch.family.pack(frames.float()), denoised
        clean = after.of_grids(coarse, fine)
        field = self._noise_of(switch)
        return switch.start * clean + (1.0 - switch.start) * field

    def _noise_of(self, switch: Switch) -> torch.Tensor:
        after = switch.after
        if self.noise == "fresh":
            tokens = after.tokens
            return switch.draw((len(switch.latents), tokens, switch.latents.shape[2]), switch.latents.device)
        family, fine = switch.family, switch.field.float()
        coarse = pooled(family, fine, after.rows, after.columns)
        if self.noise == "hadamard" and isinstance(after, FineLayout | MixedLayout):
            parents = family.unpack(coarse, after.rows // 2, after.columns // 2)
            fine = family.pack(hadamard.children(parents, switch.draw))
        return after.of_grids(coarse, fine)


def pooled(family: Family, noise: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Make unit noise of the coarse grid from that of the fine one [B, rows * columns, C]: four cells' sum, halved."""
    return family.pack(functional.avg_pool2d(family.unpack(noise.float(), rows, columns), 2) * 2.0)


def coarse_tokens(family: Family, layout: TokenLayout, clean: torch.Tensor) -> torch.Tensor:
    """Give the coarse grid's tokens, in raster order, of clean latents on a coarse or mixed layout.

    A refined token is the average of its children: no exact latent, and only its neighbours' seams see it.
    """
    if not isinstance(layout, MixedLayout):
        return clean
    count = layout.spread
    whole = clean.new_zeros(len(clean), layout.rows * layout.columns, clean.shape[2])
    cells = layout.cells(layout.refined)[..., None].expand(-1, -1, clean.shape[2])
    frames = family.unpack(whole.scatter(1, cells, clean[:, count:]), layout.rows, layout.columns)
    coarse = family.pack(functional.avg_pool2d(frames, 2))
    return coarse.scatter(1, layout.kept[..., None].expand(-1, -1, clean.shape[2]), clean[:, :count])


def with_refined(layout: TokenLayout, clean: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Put what a mixed layout has refined already in its cells of the fine grid, where nothing need be lifted."""
    if not isinstance(layout, MixedLayout):
        return fine
    cells = layout.cells(layout.refined)[..., None].expand(-1, -1, fine.shape[2])
    return fine.scatter(1, cells, clean[:, layout.spread :])
