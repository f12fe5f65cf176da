"""Rotary tables that differ from image to image, where a model expects one table for its whole batch.

In a mixed stage every image has its own places. Models index a shared table [S, D] so that it broadcasts over the
batch; a table [B, S, D] answers the same index with its batch in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastdit.nested import PerImage


class PerImageTable(PerImage):
    """A rotary table [B, S, D] that answers what is asked of a shared one [S, D]."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def __getitem__(self, key: tuple[slice | None, ...]) -> torch.Tensor:
        # A shared table is indexed [None, :, None, :] or [None, None, :, :]; the leading None is our batch.
        if not isinstance(key, tuple) or key[0] is not None:
            raise TypeError(f"a rotary table of a batch was indexed with {key!r}, which it can't answer")
        places = (slice(None), *key[1:])
        return self.table[places]

    def unsqueeze(self, dim: int) -> torch.Tensor:
        """Add an axis for the heads: at `dim` of a shared table, one further here."""
        if dim < 0:
            raise TypeError(f"a rotary table of a batch was unsqueezed at {dim}, counted from its end")
        return self.table.unsqueeze(dim + 1)

    def rows(self, index: torch.Tensor) -> PerImageTable:
        return PerImageTable(self.table.index_select(0, index))

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., torch.Tensor],
        types: Sequence[type],
        args: tuple[Sequence[PerImageTable], ...] = (),
        kwargs: Mapping[str, int] | None = None,
    ) -> PerImageTable:
        """Join tables along their tokens, which models do with the text's and the image's."""
        if function is not torch.cat or (kwargs or {}).get("dim", 0) != 0 or len(args) > 1:
            raise TypeError(f"a rotary table of a batch was given to {function.__name__}, which it can't answer")
        return cls(torch.cat([table.table for table in args[0]], dim=1))


class PerImagePositions(nn.Module):
    """A rotary embedding of position ids that takes several images' ids side by side, [S, B * axes].

    Ids that are not widened go to the model's own embedding as they are.
    """

    def __init__(self, embed: nn.Module, axes: int) -> None:
        super().__init__()
        # Kept out of the module tree: the child belongs to the user's model.
        self.__dict__["_embed"] = embed
        self._axes = axes

    def forward(self, ids: torch.Tensor) -> tuple[PerImageTable, ...]:
        count, width = ids.shape
        images = width // self._axes
        flat = ids.view(count, images, self._axes).transpose(0, 1).flatten(0, 1)
        return tuple(PerImageTable(table.unflatten(0, (images, count))) for table in self.__dict__["_embed"](flat))


def rotary(places: torch.Tensor, widths: Sequence[int], theta: float, **options: Any) -> Any:
    """Evaluate rotary embeddings at places [..., axes], in units of an index, with `widths` of the head for each axis.

    Gives complex rows [..., D / 2] or, with `use_real=True`, cosines and sines [..., D], as
    `diffusers.models.embeddings.get_1d_rotary_pos_embed` does for one axis.
    """
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    shape = places.shape[:-1]
    flat = places.flatten(0, -2)
    rows = [get_1d_rotary_pos_embed(width, flat[:, axis], theta=theta, **options) for axis, width in enumerate(widths)]
    if isinstance(rows[0], tuple):
        return tuple(torch.cat(parts, dim=-1).unflatten(0, shape) for parts in zip(*rows, strict=True))
    return torch.cat(rows, dim=-1).unflatten(0, shape)


def turned(states: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries or keys [B, H, S, D] by cosines and sines [1 or B, S, D] of places, in float32.

    Neighbouring channels are a plane, as in FLUX. Turning twice is turning by the sum of both places. A batch that
    holds the table's several times in a row (guidance) is turned alike in each.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    parts = tuple(shared(guided(part, states.shape[0])) for part in table)
    result: torch.Tensor = apply_rotary_emb(states, parts, sequence_dim=2)
    return result


def shared(table: torch.Tensor) -> torch.Tensor | PerImageTable:
    """Give a table [1 or B, S, D] as a model takes it: shared where there is one for all images."""
    return table[0] if table.shape[0] == 1 else PerImageTable(table)


def guided(table: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat a table [1 or B, S, D] of a batch's images for a forward of `batch` rows that holds it several times."""
    return table if table.shape[0] == 1 else table.repeat(batch // table.shape[0], *(1,) * (table.dim() - 1))
