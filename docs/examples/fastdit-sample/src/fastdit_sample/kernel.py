"""An attention kernel: some queries at a time, so that the scores of all of them never exist at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch

from fastdit.attention.base import AttentionKernel
from fastdit.blocks.attention import AttentionCall
from fastdit.config import Count, register


@register
@dataclasses.dataclass(frozen=True)
class QueryChunks(AttentionKernel):
    """softmax(scale q k^T + mask) v for `queries` queries at a time: queries x T scores a head instead of S x T.

    Args:
        queries: how many at a time, from 1.
    """

    queries: Count = 256

    @property
    def backends(self) -> tuple[str, ...]:
        return ("query chunks",)

    def kernel(self, backend: str) -> Callable[[AttentionCall], torch.Tensor]:
        return partial(_attend, self.queries)


def _attend(queries: int, call: AttentionCall) -> torch.Tensor:
    if call.is_causal or call.enable_gqa or call.dropout_p:
        raise NotImplementedError("causal or grouped attention, and dropout, are not written")
    scale = 1.0 / math.sqrt(call.query.shape[3]) if call.scale is None else call.scale
    mask, found = call.additive_mask(), []
    for start in range(0, call.query.shape[2], queries):
        some = slice(start, start + queries)
        scores = scale * call.query[:, :, some] @ call.key.transpose(2, 3)
        if mask is not None:
            scores = scores + (mask if mask.shape[2] == 1 else mask[:, :, some])
        found.append(scores.softmax(dim=3) @ call.value)
    return torch.cat(found, dim=2)
