"""Linear layers whose weights are laid out for the processor's matrix units once, for every engine that runs them.

    y = x W^T + b,    with W kept a second time in the blocks that oneDNN multiplies by

torch lays a weight out anew at each call. Here that is done at a weight's first call, and again after it has changed:
when it has other memory or another version, or when one of 64 elements evenly spread over it differs. The last is what
sees a LoRA that is fused through `weight.data`, which torch's version counters don't.

It is an operator of torch's whose weight stays an input, so that what compilers keep holds for every block of a kind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastdit.engine.checksum import sample_of
from fastdit.errors import UnsupportedModel

DTYPES = (torch.float32, torch.bfloat16)


class _Packed(NamedTuple):
    """A weight as oneDNN takes it, and by what a change of the weight is seen."""

    laid_out: Tensor
    address: int
    version: int
    sample: Tensor


#: What was laid out in this process, each as long as its weight lives.
_PACKED = WeakTensorKeyDictionary()


def refuse_unpackable(module: nn.Module, device: torch.device) -> None:
    """Raise `UnsupportedModel` where linear layers can't be packed: another device, another precision, no oneDNN."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        where = device.type if device.type != "cpu" else "a torch without oneDNN"
        raise UnsupportedModel(f"weights are packed for CPUs by oneDNN, and this is {where}; leave `packed` out")
    if torch.is_autocast_enabled(device.type):
        raise UnsupportedModel("packed weights keep their precision, and autocast is on; leave one of the two out")
    for name, part in module.named_modules():
        weight = part.weight if isinstance(part, nn.Linear) else None
        if weight is None:
            continue
        if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in DTYPES:
            raise UnsupportedModel(
                f"the weight of {name} is a {type(weight).__name__} of {weight.dtype}, and packed are plain ones of "
                "float32 or bfloat16; leave `packed` out"
            )
        if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise UnsupportedModel(
                f"the weight of {name} is in bfloat16, which oneDNN does not multiply on this processor (it takes "
                "AVX-512); leave `packed` out"
            )


def packs(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether a call of a linear layer gains by packing: its weight lasts, and its input is a sequence of tokens.

    A vector for each image gains nothing, and the layers that take one are a good part of a model's weights.
    """
    return hidden_states.dim() > 2 and type(weight) is nn.Parameter and weight.dtype in DTYPES


def packed_linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer [..., in] -> [..., out], its weight [out, in] packed."""
    found: Tensor = torch.ops.fastdit.packed_linear(hidden_states, weight, bias)
    return found


def _packed_linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        hidden_states, _laid_out(weight, hidden_states), bias, "none", [], ""
    )
    return found


def _laid_out(weight: Tensor, hidden_states: Tensor) -> Tensor:
    """Give a weight as it was laid out for the first input that it met, unless it has changed since."""
    address, version = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    sample = sample_of(weight.detach())
    kept: _Packed | None = _PACKED.get(weight)
    if kept is None or (kept.address, kept.version) != (address, version) or not torch.equal(kept.sample, sample):
        rows = hidden_states.numel() // hidden_states.shape[-1]
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        kept = _PACKED[weight] = _Packed(laid_out, address, version, sample.clone())
    return kept.laid_out


def _outline(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:-1], weight.shape[0])


# `custom_op` wraps an operator in checks that cost more than a small layer gains.
_LIBRARY = torch.library.Library("fastdit", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor hidden_states, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake("fastdit::packed_linear", _outline, lib=_LIBRARY)
