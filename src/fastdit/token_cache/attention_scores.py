"""Scores of tokens, taken from attention at a full step; the attention itself is computed as ever.

    output_norm   ||o_i||: the norm of what attention gives token i. Needs to see nothing but that output
    value_norm    ||v_i||: the norm of the token's values, over all heads
    attention     sum_j a_ji: the attention that token i receives from image tokens, a the mean map of the heads
    text          1 + sum_j c_ij log c_ij, c_i the attention of token i to the text's tokens, made to sum to one

All but the last are divided by their norm over the image's tokens. Where a score needs more than the output, the
calls of `scaled_dot_product_attention` inside the attention module are watched and answered by torch's own (fused)
kernel. The two scores that need the map pay for one more product of queries and keys a block, head by head; a record's
seconds hold it and its FLOPs, which are the model's own, don't.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import nn

from fastdit.blocks.attention import AttentionCall, SeenAttention, weights_of
from fastdit.errors import IncompatibleStack
from fastdit.models.roles import TokenRoles
from fastdit.nested import Value, tensors_of


class AttentionScore(Enum):
    """Which score is taken of the attention."""

    OUTPUT_NORM = "output_norm"
    VALUE_NORM = "value_norm"
    ATTENTION = "attention"
    TEXT = "text"

    def child(self, roles: TokenRoles) -> str:
        """Name the child of a block that is watched."""
        return roles.cross_attention or roles.attention if self is AttentionScore.TEXT else roles.attention

    def result(self, seen: list[torch.Tensor], output: Value, tokens: int, text: int, where: str) -> torch.Tensor:
        """Give the score [B, N] of the image tokens once the attention has run; `text` tokens lead its output."""
        if self is AttentionScore.OUTPUT_NORM:
            image = tensors_of(output)[0][:, text:]
            return nn.functional.normalize(image.float().norm(dim=2), dim=1)
        if not seen:
            raise IncompatibleStack(
                f"the score {self.value!r} is read off scaled_dot_product_attention, which {where} did not call; use "
                "the score 'output_norm', 'random' or 'age', or the attention backend 'native'"
            )
        return seen[-1] if self is AttentionScore.TEXT else nn.functional.normalize(seen[-1], dim=1)


class _Watcher(SeenAttention):
    """Reduces each call of scaled_dot_product_attention to a score, and lets it pass."""

    def __init__(self, score: AttentionScore, tokens: int, roles: TokenRoles) -> None:
        super().__init__(self._watch)
        self._score, self._tokens, self._roles = score, tokens, roles
        self.seen: list[torch.Tensor] = []

    def _watch(self, call: AttentionCall) -> torch.Tensor:
        self.seen.append(self._read(call))
        return call.by_torch()

    def _read(self, call: AttentionCall) -> torch.Tensor:
        """Reduce one attention [B, H, S, D] to a score [B, N]."""
        image = self._image(call.query.shape[2])
        if self._score is AttentionScore.VALUE_NORM:
            norms: torch.Tensor = call.value[:, :, image].float().norm(dim=3).norm(dim=1)
            return norms
        total = call.query.new_zeros(1, dtype=torch.float32)
        for weights in weights_of(call, image):
            if self._score is AttentionScore.ATTENTION:
                total = total + weights.sum(dim=1)[:, image]
            else:
                total = total + self._to_text(weights, image)
        if self._score is AttentionScore.ATTENTION:
            return total / call.query.shape[1]
        shares = total / total.sum(dim=2, keepdim=True)
        return 1.0 + torch.xlogy(shares, shares).sum(dim=2)

    def _image(self, length: int) -> slice:
        """Where the image tokens lie among the queries."""
        start = length - self._tokens if self._roles.text_first else 0
        return slice(start, start + self._tokens)

    def _to_text(self, weights: torch.Tensor, image: slice) -> torch.Tensor:
        """Keep the columns of the text: all of them in cross attention, those beside the image's in joint attention."""
        if self._roles.cross_attention is not None:
            return weights
        return torch.cat([weights[:, :, : image.start], weights[:, :, image.stop :]], dim=2)


@contextmanager
def watching(score: AttentionScore, tokens: int, roles: TokenRoles) -> Iterator[list[torch.Tensor]]:
    """Collect a score for each attention inside; nothing is watched where the output alone is enough."""
    if score is AttentionScore.OUTPUT_NORM:
        yield []
        return
    with _Watcher(score, tokens, roles) as watcher:
        yield watcher.seen
