"""Calls of torch's attention that something sees while a forward runs, and the map that a call stands for.

The mode that was entered last sees a call first. What it answers by `AttentionCall.by_torch` goes on to the modes
around it, so a kernel of the stack computes it as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .kernel import AttentionCall

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
