"""A run on anchors alone: where they lie at first, what is between them, and how more tokens become anchors.

The latents of a stage are those of its anchors, at their places in the full frame. At a switch the anchors keep their
latents, and so their noise level; a token that becomes one is set to the flow's own marginal at that time t,

    x_t = t * x0 + (1 - t) * z,

x0 the anchors' clean estimate interpolated to its place, z the noise that the run began with there.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch.nn import functional

from fastdit.layout import FineLayout, TokenLayout, gather_tokens
from fastdit.models.family import Family, Pipeline
from fastdit.schedule.base import ScheduleRun
from fastdit.schedule.selectors.base import Scene, Selector
from fastdit.schedule.selectors.edges import top_tokens
from fastdit.step import SchedulePlan

#: The real root of p^3 = p + 1. Multiples of 1/p and 1/p^2 spread over a square as those of the golden ratio do over
#: a line.
_PLASTIC = 1.3247179572447460


@dataclasses.dataclass(frozen=True)
class SparseLayout(TokenLayout):
    """Chosen fine tokens alone, the anchors: their raster indices [1 or B, K], ascending.

    What lies between them is not computed; where a whole grid is asked for, every cell has its nearest anchor's.
    """

    anchors: torch.Tensor

    kind: ClassVar[str] = "sparse"

    @property
    def tokens(self) -> int:
        return self.anchors.shape[1]

    @property
    def images(self) -> int:
        return len(self.anchors)

    @property
    def device(self) -> torch.device:
        return self.anchors.device

    def of_images(self, index: torch.Tensor) -> SparseLayout:
        return dataclasses.replace(self, anchors=self.anchors[index.to(self.device) % self.images])

    def first_cells(self, device: torch.device) -> torch.Tensor:
        return self.anchors.to(device)

    def of_grids(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        return gather_tokens(fine, self.anchors)

    def complete(self, latents: torch.Tensor) -> torch.Tensor:
        return gather_tokens(latents, self.nearest)

    @cached_property
    def nearest(self) -> torch.Tensor:
        """Say for each cell of the fine grid which anchor is nearest, the earlier of two, [1 or B, rows * columns]."""
        row, column = (self.anchors // self.columns)[:, None], (self.anchors % self.columns)[:, None]
        number = torch.arange(self.tokens, dtype=torch.long, device=self.device)
        across = (torch.arange(self.columns, dtype=torch.long, device=self.device)[:, None] - column) ** 2
        # A row of cells at a time, so that memory stays far below that of attention. Ties go to the smaller number.
        ranked = (((across + (row - own) ** 2) * self.tokens + number).amin(dim=2) for own in range(self.rows))
        return torch.cat(list(ranked), dim=1) % self.tokens


class AnchorRun(ScheduleRun):
    """One run: the anchors that it stands on, and the noise that it began with.

    The plan's stages are "sparse", with as many anchors as they have tokens, but for the last, which is "fine". Those
    of the first are evenly spread and the same for all images, further ones are what `selector` scores highest.
    """

    def __init__(self, plan: SchedulePlan, family: Family, pipeline: Pipeline, selector: Selector) -> None:
        self._plan, self._family, self._pipeline, self._selector = plan, family, pipeline, selector
        self._fine = FineLayout(plan.rows, plan.columns)
        self._layout: TokenLayout = self._fine
        self._field: torch.Tensor | None = None
        self._begun: TokenLayout | None = None

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        self._field = self._family.tokens(latents)
        self._layout = self._first(latents.device)
        return self._at_anchors(self._field)

    def resume(
        self, stage: int, latents: torch.Tensor, clean: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, TokenLayout]:
        tokens, own = self._family.tokens(latents), self._family.pack(clean.float())
        picture = (1.0 - sigma) * own.repeat(len(tokens) // len(own), 1, 1)
        self._field = (tokens.float() - picture) / sigma
        if self._begun is None:
            first = self._first(latents.device)
            self._begun = first if stage == 0 else self._grown(first, stage, own)
        self._layout = self._begun
        return self._at_anchors(tokens)

    def transition(self, stage: int, latents: torch.Tensor, denoised: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        assert self._field is not None
        before, sigmas = self._layout, self._plan.stages[stage + 1].sigmas
        assert isinstance(before, SparseLayout)
        tokens, clean = self._family.tokens(latents), interpolated(before, self._family.tokens(denoised))
        sigma = cast(tuple[float, ...], sigmas)[0]
        begun = (1.0 - sigma) * clean + sigma * self._field.float()
        self._layout = self._grown(before, stage + 1, clean)
        return self._at_anchors(with_anchors(before, begun.to(tokens.dtype), tokens))

    def lift(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = self._family.tokens(latents)
        return self._family.latents(interpolated(self._layout, tokens).to(tokens.dtype), self._fine)

    def _first(self, device: torch.device) -> TokenLayout:
        rows, columns = self._plan.rows, self._plan.columns
        anchors = evenly_spread(rows, columns, cast(int, self._plan.stages[0].tokens)).to(device)
        return SparseLayout(rows, columns, anchors)

    def _grown(self, before: TokenLayout, stage: int, clean: torch.Tensor) -> TokenLayout:
        """Give the layout of a stage, whose anchors are those of an earlier one and more of every image's own."""
        following = self._plan.stages[stage]
        if following.layout == "fine":
            return self._fine
        assert isinstance(before, SparseLayout)
        scene = Scene(self._family, self._pipeline, before.rows, before.columns, clean)
        scores = self._selector.scores(scene).to(clean.device)
        scores = scores.scatter(1, before.anchors.expand(len(scores), -1), math.inf)
        return SparseLayout(before.rows, before.columns, top_tokens(scores, cast(int, following.tokens)))

    def _at_anchors(self, tokens: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """Give what of a whole grid's tokens the present layout has, in the pipeline's shape."""
        return self._family.latents(self._layout.of_grids(tokens, tokens), self._layout), self._layout


def evenly_spread(rows: int, columns: int, count: int) -> torch.Tensor:
    """Choose `count` cells of a grid as even as a lattice leaves them at any count: raster indices [1, count].

    The cell (r, c) has the number r / p + c / p^2 modulo 1, p the plastic ratio, and those with the lowest are chosen.
    So what is chosen of more cells holds what is chosen of fewer.
    """
    places = FineLayout(rows, columns).positions(torch.device("cpu")).double()
    return top_tokens(-((places[..., 0] / _PLASTIC + places[..., 1] / _PLASTIC**2) % 1.0), count)


def interpolated(layout: TokenLayout, tokens: torch.Tensor) -> torch.Tensor:
    """Fill the grid [B, rows * columns, C] from a sparse layout's tokens [B, K, C], in float32.

    Every cell has its nearest anchor's token, blurred by a Gaussian half as wide as anchors lie apart, sqrt(N / K)
    cells in the mean; the anchors have their own.
    """
    if not isinstance(layout, SparseLayout):
        return tokens.float()
    wide = 0.5 * math.sqrt(layout.rows * layout.columns / layout.tokens)
    reach = math.ceil(2.0 * wide)
    away = torch.arange(-reach, reach + 1, dtype=torch.float32, device=tokens.device)
    weights = torch.exp(-0.5 * (away / wide) ** 2)
    weights = weights / weights.sum()
    cells = layout.complete(tokens).float()
    grid = cells.transpose(1, 2).reshape(-1, 1, layout.rows, layout.columns)
    padded = functional.pad(grid, (reach, reach, reach, reach), mode="replicate")
    blurred = functional.conv2d(functional.conv2d(padded, weights[None, None, :, None]), weights[None, None, None, :])
    return with_anchors(layout, blurred.view(len(cells), -1, cells.shape[1]).transpose(1, 2), tokens.float())


def with_anchors(layout: SparseLayout, grid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Put the tokens [B, K, C] of a sparse layout in their cells of a grid [B, rows * columns, C]."""
    anchors = layout.anchors.repeat(len(tokens) // len(layout.anchors), 1)
    return grid.scatter(1, anchors[..., None].expand_as(tokens), tokens)
