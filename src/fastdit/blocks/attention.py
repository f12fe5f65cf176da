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

from fastdit.blocks.chain import Forward, ForwardCall, Pass
from fastdit.errors import UnsupportedModel
from fastdit.nested import Value
from fastdit.record import Outcome


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


#: Computes attention: [B, H, S, D_v] of one call.
Attend = Callable[[AttentionCall], torch.Tensor]

#: Answers a call that it sees, or gives None for one that it leaves alone.
See = Callable[[AttentionCall], torch.Tensor | None]


class AttentionSight(Pass):
    """Shows something the attention of some forwards; a subclass says of which, and what sees it."""

    def __init__(self) -> None:
        self._seen: SeenAttention | None = None

    def sight(self, call: ForwardCall) -> SeenAttention | None:
        """Give what sees the attention of a forward, and may answer it; None to leave it alone."""
        raise NotImplementedError

    def forward(self, call: ForwardCall, next: Forward) -> Value:
        self._seen = self.sight(call)
        if self._seen is None:
            return next(call)
        with self._seen:
            return next(call)

    def settled(self, call: ForwardCall, outcome: Outcome) -> None:
        seen, self._seen = self._seen, None
        if seen is not None and not seen.answered and outcome.action == "computed":
            raise UnsupportedModel(
                f"the schedule acts in the attention of {call.name} ({type(call.module).__name__}), and a forward that "
                "ran whole called torch's scaled_dot_product_attention with text and image together nowhere; set an "
                "attention processor that does, or take another selector or frame"
            )


class SeenAttention(TorchFunctionMode):
    """Shows `see` the calls of scaled_dot_product_attention on four-dimensional tensors; all else passes.

    `answered` says whether it has answered any.
    """

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see = see
        self.answered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Value:
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


class KernelMode(TorchFunctionMode):
    """Lets a kernel answer the calls of scaled_dot_product_attention on four-dimensional tensors; all else passes.

    `name` is for people, `label` tells kernels apart in the key of an engine that was compiled under one.
    """

    def __init__(self, attend: Attend, name: str, label: str = "") -> None:
        super().__init__()
        self._attend, self._name, self.label = attend, name, label
        self.answered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Value:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:
            # Dynamo knows the method, and can't trace its body, which calls super().
            return args[0].unflatten(*args[1:], **kwargs)
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = AttentionCall(*args, **kwargs)
        if call.query.dim() != 4:
            return func(*args, **kwargs)
        self.answered = True
        try:
            return self._attend(call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            masked = "" if call.attn_mask is None else f" under a mask {tuple(call.attn_mask.shape)}"
            raise UnsupportedModel(
                f"{self._name} failed on queries {tuple(call.query.shape)} in {call.query.dtype} on "
                f"{call.query.device}{masked}: {first_line(error)}; take another backend, or leave it out"
            ) from error


def first_line(remark: Warning | Exception | str) -> str:
    """Give the first line of what somebody else's code says."""
    text = str(remark).strip().split("\n")[0].rstrip(".: ")
    return f"{type(remark).__name__}: {text}" if isinstance(remark, Exception) and text else text or repr(remark)
