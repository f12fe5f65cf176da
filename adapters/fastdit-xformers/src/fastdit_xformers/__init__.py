"""xFormers' memory-efficient attention as an accelerator of fastdit's attention level.

xFormers computes softmax(q k^T * scale + bias) v without ever holding q k^T
(Rabe and Staats, arXiv 2112.05682). Its kernels are for CUDA devices alone.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from fastdit.attention.base import AttentionKernel
from fastdit.blocks.attention import Attend, AttentionCall
from fastdit.config import register

__all__ = ["XFormers", "bias_of"]

#: xFormers reads a bias in pieces of this many numbers, so its rows must start at multiples of it.
_ALIGNMENT = 8


@register
@dataclasses.dataclass(frozen=True)
class XFormers(AttentionKernel):
    """Compute attention with `xformers.ops.memory_efficient_attention`.

    `accelerate` raises `UnsupportedModel` where xFormers is missing, where the model is not on a CUDA device, and
    where no kernel of xFormers takes its precision or head size.
    """

    @property
    def backends(self) -> tuple[str, ...]:
        return ("xformers",)

    def kernel(self, backend: str) -> Attend:
        try:
            from xformers import ops
        except ImportError as error:
            raise ImportError(f"xFormers can't be imported ({error}); install the one for your torch") from error
        return partial(_attend, ops)


def _attend(ops: Any, call: AttentionCall) -> torch.Tensor:
    if call.query.device.type != "cuda":
        raise NotImplementedError(f"xFormers has kernels for CUDA devices alone, and this is {call.query.device}")
    if call.is_causal and call.attn_mask is not None:
        raise ValueError("is_causal and attn_mask exclude each other")
    key, value = call.key, call.value
    if call.enable_gqa:
        groups = call.query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    found: torch.Tensor = ops.memory_efficient_attention(
        *(tensor.transpose(1, 2) for tensor in (call.query, key, value)),
        attn_bias=ops.LowerTriangularMask() if call.is_causal else bias_of(call),
        p=call.dropout_p,
        scale=call.scale,
    )
    return found.transpose(1, 2)


def bias_of(call: AttentionCall) -> torch.Tensor | None:
    """Give a call's mask as xFormers takes it: [B, H, S, T], added to the scores, each row at an aligned address."""
    mask = call.additive_mask()
    if mask is None:
        return None
    batch, heads, queries = call.query.shape[:3]
    keys = call.key.shape[2]
    rows = call.query.new_zeros(*mask.shape[:3], -(-keys // _ALIGNMENT) * _ALIGNMENT)
    rows[..., :keys] = mask
    return rows[..., :keys].expand(batch, heads, queries, keys)
