"""Where the image tokens of a stage lie: which are coarse, which are children of which, and in what order.

A grid of `rows` x `columns` fine tokens is covered by coarse tokens (2 x 2 fine cells each) and by fine ones. A mixed
layout lists the kept coarse tokens first, in raster order, then four children (0,0), (0,1), (1,0), (1,1) for each
refined coarse token, in raster order. Every image of a batch has its own selection and all have the same count.

A sparse layout covers the grid with nothing but chosen fine tokens, its *anchors*, in raster order. What lies between
them is not computed; where a whole grid is asked for, every cell has its nearest anchor's.

Coarse and mixed stages give their tokens' places in one of two frames. In the coarse frame a coarse token has whole
coordinates and a child sits at an offset of 0 or 1/2 from its parent (top-left anchored), as if the picture were half
as large. In the fine frame a fine token has whole coordinates and a coarse one sits in the middle of its four cells,
at an offset of 1/2. The fine stage has whole coordinates in the fine frame.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch

#: The frames in which a coarse or mixed stage can give its tokens' places.
FRAMES = ("coarse", "fine")


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """The token order of one stage on a `rows` x `columns` fine grid.

    `kept` [B, K] and `refined` [B, R] hold raster indices of coarse tokens, ascending; both are None where the whole
    frame has one resolution, which `coarse` names. `frame` says in which frame a coarse or mixed stage gives places.
    `anchors` [1 or B, K] holds the raster indices of a sparse layout's fine tokens, ascending.
    """

    rows: int
    columns: int
    coarse: bool
    kept: torch.Tensor | None = None
    refined: torch.Tensor | None = None
    frame: str = "coarse"
    anchors: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """What the layout is called: "coarse", "mixed", "sparse" or "fine"."""
        if self.anchors is not None:
            return "sparse"
        return "mixed" if self.mixed else "coarse" if self.coarse else "fine"

    @property
    def mixed(self) -> bool:
        return self.kept is not None

    @property
    def uniform(self) -> bool:
        """Whether the tokens are all those of a grid, in raster order."""
        return not self.mixed and self.anchors is None

    @property
    def images(self) -> int:
        """How many images have tokens of their own; 1 where a batch shares them."""
        own = self.kept if self.anchors is None else self.anchors
        return 1 if own is None else len(own)

    @property
    def tokens(self) -> int:
        if self.anchors is not None:
            return self.anchors.shape[1]
        if self.kept is not None and self.refined is not None:
            return self.kept.shape[1] + 4 * self.refined.shape[1]
        return self.rows * self.columns // (4 if self.coarse else 1)

    @property
    def extent(self) -> tuple[int, int]:
        """The rows and columns of the frame in which `positions` are given."""
        scale = 2 if self.coarse and self.frame == "coarse" else 1
        return self.rows // scale, self.columns // scale

    @property
    def whole(self) -> bool:
        """Whether the tokens are all those of a picture of `extent`, in raster order."""
        return self.uniform and (not self.coarse or self.frame == "coarse")

    def of_images(self, index: torch.Tensor) -> TokenLayout:
        """Give the layout of the images at `index` [K]; an index past the batch starts it anew (guided batches)."""
        if self.anchors is not None:
            return dataclasses.replace(self, anchors=self.anchors[index.to(self.anchors.device) % len(self.anchors)])
        if self.kept is None or self.refined is None:
            return self
        own = index.to(self.kept.device) % len(self.kept)
        return dataclasses.replace(self, kept=self.kept[own], refined=self.refined[own])

    def positions(self, device: torch.device) -> torch.Tensor:
        """Give each token's (row, column) in the layout's frame, float32 [1 or B, tokens, 2]."""
        if not self.coarse:
            cells = raster(self.rows, self.columns, device)
            return cells[None] if self.anchors is None else cells[self.anchors.to(device)]
        # Twice the place in the coarse frame is the place in the fine one, but for a coarse token's middle.
        scale, middle = (1.0, 0.0) if self.frame == "coarse" else (2.0, 0.5)
        places = raster(self.rows // 2, self.columns // 2, device)
        if self.kept is None or self.refined is None:
            return (scale * places + middle)[None]
        kept = scale * places[self.kept.to(device)] + middle
        children = places[self.refined.to(device)][:, :, None, :] + raster(2, 2, device) / 2
        return torch.cat([kept, scale * children.flatten(1, 2)], dim=1)

    def refined_at(self, refined: torch.Tensor) -> TokenLayout:
        """Give the mixed layout in which the coarse tokens `refined` [B, R] of this coarse one are split."""
        count = self.rows * self.columns // 4
        mask = torch.ones(refined.shape[0], count, dtype=torch.bool, device=refined.device)
        mask.scatter_(1, refined, False)
        kept = mask.nonzero()[:, 1].view(refined.shape[0], count - refined.shape[1])
        return TokenLayout(self.rows, self.columns, True, kept, refined.sort(dim=1).values, self.frame)

    def refine(self, latents: torch.Tensor, refined: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """Split the coarse tokens `refined` [B, R] of a coarse stage by copying each to its four children.

        `latents` [B, tokens, C] become [B, K + 4R, C] in the mixed order.
        """
        following = self.refined_at(refined)
        return gather_tokens(latents, self.sources(following)), following

    def complete(self, latents: torch.Tensor) -> torch.Tensor:
        """Copy what is still coarse to its children: [new children of `kept`, in its order] ++ [the fine tokens].

        The result is in split order, not yet in raster order; `to_raster` sorts it. Of a sparse layout every cell gets
        its nearest anchor's token, in raster order.
        """
        if self.anchors is not None:
            return gather_tokens(latents, self.nearest)
        if self.kept is None:
            return latents.repeat_interleave(4, dim=1) if self.coarse else latents
        count = self.kept.shape[1]
        return torch.cat([latents[:, :count].repeat_interleave(4, dim=1), latents[:, count:]], dim=1)

    def to_raster(self, latents: torch.Tensor) -> torch.Tensor:
        """Sort tokens in split order (see `complete`) into the fine grid's raster order.

        A batch that holds the layout's several times in a row (guidance) is sorted alike in each.
        """
        if self.kept is not None and self.refined is not None:
            parents = torch.cat([self.kept, self.refined], dim=1)
        elif self.coarse:
            parents = torch.arange(self.rows * self.columns // 4, device=latents.device)[None]
        else:
            return latents
        return gather_tokens(latents, self.cells(parents).argsort(dim=1))

    def cells(self, parents: torch.Tensor) -> torch.Tensor:
        """List the fine grid's raster indices of the four children of each coarse token, [B, 4 K] for [B, K]."""
        half = self.columns // 2
        row, column = parents // half, parents % half
        offset_row = torch.tensor([0, 0, 1, 1], device=parents.device)
        offset_column = torch.tensor([0, 1, 0, 1], device=parents.device)
        cells = (2 * row[..., None] + offset_row) * self.columns + 2 * column[..., None] + offset_column
        return cells.flatten(1)

    @cached_property
    def nearest(self) -> torch.Tensor:
        """Say for each cell of the fine grid which anchor is nearest, the earlier of two, [1 or B, rows * columns]."""
        assert self.anchors is not None
        row, column = (self.anchors // self.columns)[:, None], (self.anchors % self.columns)[:, None]
        number = torch.arange(self.tokens, device=self.anchors.device)
        across = (torch.arange(self.columns, device=self.anchors.device)[:, None] - column) ** 2
        # A row of cells at a time, so that memory stays far below that of attention. Ties go to the smaller number.
        ranked = (((across + (row - own) ** 2) * self.tokens + number).amin(dim=2) for own in range(self.rows))
        return torch.cat(list(ranked), dim=1) % self.tokens

    def sources(self, following: TokenLayout) -> torch.Tensor:
        """Say for each token of the `following` layout which of this one it is a copy of, [1 or B, tokens].

        A coarse token that follows a fine grid has its first cell's.
        """
        if following.coarse and not self.coarse:
            parents = torch.arange(self.rows * self.columns // 4)[None]
            return self.cells(parents)[:, ::4]
        if following.kept is not None and following.refined is not None:
            return torch.cat([following.kept, following.refined.repeat_interleave(4, dim=1)], dim=1)
        own = self.kept if self.anchors is None else self.anchors
        numbers = torch.arange(self.tokens, device=None if own is None else own.device)
        cells = self.to_raster(self.complete(numbers.expand(self.images, -1)[..., None]))[..., 0]
        if following.anchors is None:
            return cells
        return cells.expand(following.images, -1).gather(1, following.anchors)


def raster(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """List the (row, column) of a grid in raster order, float32 [rows * columns, 2]."""
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=device),
        torch.arange(columns, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([row.flatten(), column.flatten()], dim=1)


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


def gather_tokens(latents: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pick tokens [B, K, C] of `latents` [B, N, C] by `index` [B, K].

    Latents that hold the index's batch several times in a row (guidance) are picked from alike in each.
    """
    index = index.repeat(latents.shape[0] // len(index), 1)
    return latents.gather(1, index[..., None].expand(-1, -1, latents.shape[2]))
