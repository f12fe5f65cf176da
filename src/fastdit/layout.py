"""Where the image tokens of a stage lie: which are coarse, which are children of which, and in what order.

A grid of `rows` x `columns` fine tokens is covered by coarse tokens (2 x 2 fine cells each), by fine ones, or by both,
coarse ones first. Each way to cover it is a class, which says in which cells its tokens lie; what else is asked of a
layout follows from that. A schedule may have a way of its own, as `fastdit.schedule.anchors` has.

Layouts with coarse tokens give places in one of two frames. In the coarse frame a coarse token has whole coordinates
and a child sits at an offset of 0 or 1/2 from its parent (top-left anchored), as if the picture were half as large. In
the fine frame a fine token has whole coordinates and a coarse one sits in the middle of its four cells, at an offset of
1/2. Layouts of fine tokens alone give places in the fine frame.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

#: The frames in which a coarse or mixed stage can give its tokens' places.
FRAMES = ("coarse", "fine")


@dataclasses.dataclass(frozen=True)
class TokenLayout(ABC):
    """The token order of one stage on a `rows` x `columns` fine grid: the protocol of all layouts."""

    rows: int
    columns: int

    kind: ClassVar[str]  #: What the layout is called.
    coarse: ClassVar[bool] = False  #: Whether it has coarse tokens.

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many tokens an image has."""

    @property
    def spread(self) -> int:
        """How many of the tokens are coarse; they come first."""
        return 0

    @property
    def grid(self) -> tuple[int, int] | None:
        """The rows and columns of the tokens, where they are all those of a grid in raster order."""
        return None

    @property
    def uniform(self) -> bool:
        """Whether the tokens are all those of a grid, in raster order."""
        return self.grid is not None

    @property
    def frame(self) -> str:
        """The frame in which `positions` are given."""
        return "fine"

    @property
    def extent(self) -> tuple[int, int]:
        """The rows and columns of the frame in which `positions` are given."""
        scale = 2 if self.frame == "coarse" else 1
        return self.rows // scale, self.columns // scale

    @property
    def whole(self) -> bool:
        """Whether the tokens are all those of a picture of `extent`, in raster order."""
        return self.grid == self.extent

    @property
    def images(self) -> int:
        """How many images have tokens of their own; 1 where a batch shares them."""
        return 1

    @property
    def device(self) -> torch.device:
        """Where the images' own tokens are listed; the CPU where a batch shares them."""
        return torch.device("cpu")

    def of_images(self, index: torch.Tensor) -> TokenLayout:
        """Give the layout of the images at `index` [K]; an index past the batch starts it anew (guided batches)."""
        return self

    @abstractmethod
    def first_cells(self, device: torch.device) -> torch.Tensor:
        """Give the raster index of each token's cell, or of a coarse token's first, [1 or B, tokens]."""

    @abstractmethod
    def of_grids(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """Pick the layout's tokens out of both grids' own [B, N, C], each in raster order."""

    def positions(self, device: torch.device) -> torch.Tensor:
        """Give each token's (row, column) in the layout's frame, float32 [1 or B, tokens, 2]."""
        known: torch.Tensor | None = self.__dict__.get("_places")
        if known is None or known.device != device:
            cells = self.first_cells(device)
            known = torch.stack([cells // self.columns, cells % self.columns], dim=2).float()
            if self.frame == "coarse":
                known = known / 2.0
            elif self.spread:
                known[:, : self.spread] += 0.5
            object.__setattr__(self, "_places", known)  # every step of a stage asks for them
        return known

    def complete(self, latents: torch.Tensor) -> torch.Tensor:
        """Give every cell of the fine grid a token: [copies of the coarse ones, in fours] ++ [the fine ones].

        The result is in split order, not yet in raster order; `to_raster` sorts it.
        """
        if not self.spread:
            return latents
        return torch.cat([latents[:, : self.spread].repeat_interleave(4, dim=1), latents[:, self.spread :]], dim=1)

    def to_raster(self, latents: torch.Tensor) -> torch.Tensor:
        """Sort tokens in split order (see `complete`) into the fine grid's raster order.

        A batch that holds the layout's several times in a row (guidance) is sorted alike in each.
        """
        if not self.coarse:
            return latents
        cells = self.first_cells(latents.device)
        split = torch.cat([self.siblings(cells[:, : self.spread]), cells[:, self.spread :]], dim=1)
        return gather_tokens(latents, split.argsort(dim=1))

    def sources(self, following: TokenLayout) -> torch.Tensor:
        """Say for each token of the `following` layout which of this one it is a copy of, [1 or B, tokens].

        A coarse token that follows a fine grid has its first cell's.
        """
        images, device = max(self.images, following.images), (following if self.uniform else self).device
        numbers = torch.arange(self.tokens, dtype=torch.long, device=device).expand(self.images, -1)[..., None]
        filled = self.to_raster(self.complete(numbers))[..., 0]
        return filled.expand(images, -1).gather(1, following.first_cells(device).expand(images, -1))

    def cells(self, parents: torch.Tensor) -> torch.Tensor:
        """List the fine grid's raster indices of the four children of each coarse token, [B, 4 K] for [B, K]."""
        return self.siblings(self.corners(parents))

    def corners(self, parents: torch.Tensor) -> torch.Tensor:
        """Give the raster index of each coarse token's first cell in the fine grid."""
        half = self.columns // 2
        return parents // half * (2 * self.columns) + parents % half * 2

    def siblings(self, corners: torch.Tensor) -> torch.Tensor:
        """List the four cells (0,0), (0,1), (1,0), (1,1) of each first one, [B, 4 K] for [B, K]."""
        pair = torch.arange(2, dtype=corners.dtype, device=corners.device)  # numbers of the host would be waited for
        return (corners[..., None] + (pair[:, None] * self.columns + pair).flatten()).flatten(1)


@dataclasses.dataclass(frozen=True)
class FineLayout(TokenLayout):
    """All cells of the grid, in raster order."""

    kind: ClassVar[str] = "fine"

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows, self.columns

    def first_cells(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.tokens, dtype=torch.long, device=device)[None]

    def of_grids(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        return fine


@dataclasses.dataclass(frozen=True)
class CoarseLayout(TokenLayout):
    """All tokens of the coarse grid, in raster order."""

    frame: str = "coarse"

    kind: ClassVar[str] = "coarse"
    coarse: ClassVar[bool] = True

    @property
    def tokens(self) -> int:
        return self.rows * self.columns // 4

    @property
    def spread(self) -> int:
        return self.tokens

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows // 2, self.columns // 2

    def first_cells(self, device: torch.device) -> torch.Tensor:
        return self.corners(torch.arange(self.tokens, dtype=torch.long, device=device))[None]

    def of_grids(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        return coarse

    def refined_at(self, refined: torch.Tensor) -> MixedLayout:
        """Give the mixed layout in which the coarse tokens `refined` [B, R] are split."""
        mask = torch.ones(refined.shape[0], self.tokens, dtype=torch.bool, device=refined.device)
        mask.scatter_(1, refined, False)
        kept = mask.logical_not().byte().argsort(dim=1, stable=True)[:, : self.tokens - refined.shape[1]]
        return MixedLayout(self.rows, self.columns, kept, refined.sort(dim=1).values, self.frame)


@dataclasses.dataclass(frozen=True)
class MixedLayout(TokenLayout):
    """Coarse tokens that are kept, in raster order, then the children of those that are refined, four by four.

    `kept` [B, K] and `refined` [B, R] hold raster indices of the coarse grid, ascending. Every image of a batch has its
    own selection and all have the same count.
    """

    kept: torch.Tensor
    refined: torch.Tensor
    frame: str = "coarse"

    kind: ClassVar[str] = "mixed"
    coarse: ClassVar[bool] = True

    @property
    def tokens(self) -> int:
        return self.kept.shape[1] + 4 * self.refined.shape[1]

    @property
    def spread(self) -> int:
        return self.kept.shape[1]

    @property
    def images(self) -> int:
        return len(self.kept)

    @property
    def device(self) -> torch.device:
        return self.kept.device

    def of_images(self, index: torch.Tensor) -> MixedLayout:
        own = index.to(self.device) % self.images
        return dataclasses.replace(self, kept=self.kept[own], refined=self.refined[own])

    def first_cells(self, device: torch.device) -> torch.Tensor:
        return torch.cat([self.corners(self.kept), self.cells(self.refined)], dim=1).to(device)

    def of_grids(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        return torch.cat([gather_tokens(coarse, self.kept), gather_tokens(fine, self.cells(self.refined))], dim=1)


def gather_tokens(latents: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pick tokens [B, K, C] of `latents` [B, N, C] by `index` [B, K].

    Latents that hold the index's batch several times in a row (guidance) are picked from alike in each.
    """
    index = index.repeat(latents.shape[0] // len(index), 1)
    return latents.gather(1, index[..., None].expand(-1, -1, latents.shape[2]))
