"""Calls of torch's attention that something sees while a forward runs, and the map that a call stands for.

The mode that was entered last sees a call first. What it answers by `AttentionCall.by_torch` goes on to the modes
around it, so a kernel of the stack computes it as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class AttentionCall(NamedTuple):
    """One call of `scaled_dot_product_attention`: query [B, H, S, D], key and value [B, H_k, T, D], and its options.

    `attn_mask` broadcasts to [B, H, S, T]: boolean (True takes part) or added to the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def mask(self) -> torch.Tensor | None:
        """Give the mask in four dimensions."""
        if self.attn_mask is None:
            return None
        return self.attn_mask.view(*(1,) * (4 - self.attn_mask.dim()), *self.attn_mask.shape)

    def additive_mask(self) -> torch.Tensor | None:
        """Give the mask in four dimensions as what is added to the scores."""
        mask = self.mask()
        if mask is None or mask.dtype != torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=self.query.dtype).masked_fill(~mask, -torch.inf)

    def by_torch(self) -> torch.Tensor:
        """Compute the call by torch's own function, or by what answers that outside of the mode that sees the call."""
        return nn.functional.scaled_dot_product_attention(*self[:6], scale=self.scale, enable_gqa=self.enable_gqa)


#: Answers a call that it sees, or gives None for one that it leaves alone.
See = Callable[[AttentionCall], torch.Tensor | None]


class SeenAttention(TorchFunctionMode):
    """Shows `see` the calls of scaled_dot_product_attention on four-dimensional tensors; all else passes.

    `answered` says whether it has answered any.
    """

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see = see
        self.answered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            call = AttentionCall(*args, **kwargs)
            found = self._see(call) if call.query.dim() == 4 else None
            if found is not None:
                self.answered = True
                return found
        return func(*args, **kwargs)


def weights_of(call: AttentionCall, queries: slice = slice(None)) -> Iterator[torch.Tensor]:
    """Give the attention weights [B, Q, T] of a call's `queries` in float32, one head after the other.

    That is one more product of queries and keys; the call itself is not computed.
    """
    query, key, mask = call.query, call.key, call.mask()
    scale = call.scale if call.scale is not None else query.shape[3] ** -0.5
    heads = query.shape[1]
    for head in range(heads):
        own = key[:, head // (heads // key.shape[1])]
        logits = query[:, head, queries].float() @ own.float().transpose(1, 2) * scale
        if mask is not None:
            rows = mask.expand(query.shape[0], heads, query.shape[2], key.shape[2])[:, head, queries]
            logits = logits.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else logits + rows
        yield logits.softmax(dim=2)
