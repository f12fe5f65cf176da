"""torch's own attention kernels, each called by itself.

torch chooses among its kernels by switches of the process. diffusers' backends of these names set the switches around
a call: whatever else attends meanwhile, in another thread, follows, and two threads that do so leave kernels switched
off for good. A kernel that is called needs no switch.
"""

from __future__ import annotations

import torch
from torch import nn

from fastdit.blocks.attention import Attend, AttentionCall

#: What the fused kernels for CUDA want the strides of a mask, in elements, and head sizes to be multiples of.
_MASK_STRIDE, _HEAD_SIZE = 16, 8


def _math(call: AttentionCall) -> torch.Tensor:
    output, _ = torch.ops.aten._scaled_dot_product_attention_math(
        call.query,
        call.key,
        call.value,
        call.additive_mask(),
        call.dropout_p,
        call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )
    found: torch.Tensor = output
    return found


def _flash(call: AttentionCall) -> torch.Tensor:
    if call.attn_mask is not None:
        raise NotImplementedError("it takes no mask")
    query, key, value = _fused_arguments(call)
    options = call.dropout_p, call.is_causal
    if query.device.type == "cpu":
        found: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, *options, scale=call.scale
        )[0]
        return found
    size = query.shape[3]
    scale = call.scale if call.scale is not None else size**-0.5
    padded = (nn.functional.pad(each, (0, -each.shape[3] % _HEAD_SIZE)) for each in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention(*padded, *options, scale=scale)[0]
    return found[..., :size]


def _efficient(call: AttentionCall) -> torch.Tensor:
    return _of_cuda(torch.ops.aten._scaled_dot_product_efficient_attention, call)


def _cudnn(call: AttentionCall) -> torch.Tensor:
    # Called by itself it gives other numbers where memory is not in the order of the dimensions.
    whole = call._replace(query=call.query.contiguous(), key=call.key.contiguous(), value=call.value.contiguous())
    return _of_cuda(torch.ops.aten._scaled_dot_product_cudnn_attention, whole)


def _of_cuda(kernel: torch._ops.OpOverloadPacket, call: AttentionCall) -> torch.Tensor:
    """Call one of the kernels that take a mask for each pair of tokens, and say whether gradients are wanted."""
    if call.query.device.type != "cuda":
        raise NotImplementedError("it is a kernel for CUDA devices alone")
    query, key, value = _fused_arguments(call)
    mask = call.additive_mask()
    if mask is not None:
        keys = key.shape[2]
        aligned = nn.functional.pad(mask.expand(*mask.shape[:3], keys), (0, -keys % _MASK_STRIDE))
        mask = aligned[..., :keys].expand(*query.shape[:3], keys)
    gradients = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    found: torch.Tensor = kernel(query, key, value, mask, gradients, call.dropout_p, call.is_causal, scale=call.scale)[
        0
    ]
    return found


def _fused_arguments(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give query, key and value as the fused kernels take them, which check little: as many heads of each, a batch."""
    query, key, value = call.query, call.key, call.value
    if call.enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    if not query.shape[:2] == key.shape[:2] == value.shape[:2] or key.shape[2] != value.shape[2]:
        raise NotImplementedError("it takes as many images, heads and tokens of keys and values as of each other")
    if not query.shape[3] == key.shape[3] == value.shape[3]:
        raise NotImplementedError("it takes queries, keys and values of one head size")
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    return query, key, value


#: The kernels by the names of diffusers' backends.
KERNELS: dict[str, Attend] = {
    "_native_math": _math,
    "_native_flash": _flash,
    "_native_efficient": _efficient,
    "_native_cudnn": _cudnn,
}
