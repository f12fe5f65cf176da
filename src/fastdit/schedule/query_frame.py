"""The query's own frame: in a mixed stage every query sees keys at the distances of its own resolution.

A model knows its tokens' distances by how far rotary embeddings turn their queries and keys against each other, and has
learned whole ones. In one frame for all, fine tokens are half a step apart, or coarse ones two. Here a query measures
in steps of its own resolution (arXiv 2511.19778, without the trained resizer at the border of two resolutions):

    a fine query at (r, c)     sees fine keys at their cells, and a coarse key (p, q) at its first cell, (2p, 2q)
    a coarse query at (r, c)   sees coarse keys at their places, and of a split token's four children the first alone,
                               at (p, q): the children's grid, taken in steps of two

So all distances are whole, and a coarse query sees one key for each coarse place. The text, and tokens of pictures that
are edited, keep their places, and see what coarse queries see. A place in the fine frame is twice that in the coarse
one, which the model has turned by: queries and keys are turned by it once more, R(2x) = R(x) R(x), for fine queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fastdit.blocks.attention import AttentionCall
from fastdit.errors import UnsupportedModel
from fastdit.models.rotary import turned


@dataclasses.dataclass(frozen=True)
class QueryFrame:
    """Computes the attention of a mixed stage, whose tokens the model has turned by their places in the coarse frame.

    A sequence is the text, `kept` coarse tokens, `fine` ones in fours of siblings, and `appended` ones. `turn` holds
    cosines and sines [1 or B, kept + fine, D] of the coarse frame's places.
    """

    kept: int
    fine: int
    appended: int
    turn: tuple[torch.Tensor, torch.Tensor]

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """Give the attention [B, H, S, D_v], in two calls: for the fine queries, and for all others.

        Raises `UnsupportedModel` for a call that is not the attention of the whole sequence to itself.
        """
        length = call.query.shape[2]
        first = length - self.kept - self.fine - self.appended
        if first < 0 or call.key.shape[2] != length or call.is_causal:
            raise UnsupportedModel(
                f"frame='query' splits the attention of text and image together, and the model asks for one of "
                f"{length} queries and {call.key.shape[2]} keys{', causal' if call.is_causal else ''} beside "
                f"{self.kept + self.fine} image tokens; use frame='coarse' or frame='fine'"
            )
        middle, stop = first + self.kept, first + self.kept + self.fine
        cosines, sines = self.turn
        children = cosines[:, self.kept :], sines[:, self.kept :]
        keys = [call.key[:, :, :first], turned(call.key[:, :, first:stop], self.turn), call.key[:, :, stop:]]
        of_fine = call._replace(
            query=turned(call.query[:, :, middle:stop], children),
            key=torch.cat(keys, dim=2),
            attn_mask=_mask_of(call, [slice(middle, stop)], [slice(None)]),
        ).by_torch()
        others = [slice(0, middle), slice(stop, None)]
        seen = [slice(0, middle), slice(middle, stop, 4), slice(stop, None)]
        of_others = call._replace(
            query=_picked(call.query, 2, others),
            key=_picked(call.key, 2, seen),
            value=_picked(call.value, 2, seen),
            attn_mask=_mask_of(call, others, seen),
        ).by_torch()
        return torch.cat([of_others[:, :, :middle], of_fine, of_others[:, :, middle:]], dim=2)


def _picked(tensor: torch.Tensor, dim: int, parts: Sequence[slice]) -> torch.Tensor:
    return torch.cat([tensor[(slice(None),) * dim + (part,)] for part in parts], dim=dim)


def _mask_of(call: AttentionCall, queries: Sequence[slice], keys: Sequence[slice]) -> torch.Tensor | None:
    """Give the part of a call's mask that is of some queries and keys."""
    mask = call.mask()
    if mask is None:
        return None
    for dim, parts in ((2, queries), (3, keys)):
        if mask.shape[dim] > 1:
            mask = _picked(mask, dim, parts)
    return mask
