"""Linear layers whose weights have few bits: what torchao made of a layer, and whether a device can compute with it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fastdit.errors import UnsupportedModel
from fastdit.process import unheard_warnings

#: How many weights of a row share a scale in 4 bits.
GROUP = 128

#: The largest error relative to the layer's own output for which a precision is taken on a device.
_TOLERANCE = {"int8": 0.02, "fp8": 0.05, "int4": 0.2}


class EightBitLinear(nn.Module):
    """A linear layer of 8-bit weights: x [..., in] -> (x q^T) * s + b [..., out], computed in the precision of x.

    It is made of plain tensors, which every compiler takes. `weight` is the matrix as numbers, made anew at each use.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, packed: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale.reshape(-1))
        self.register_parameter("bias", layer.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [out, in] that the layer multiplies by."""
        return self.packed.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(hidden_states, self.packed.to(hidden_states.dtype)) * self.scale
        return product if self.bias is None else product + self.bias


def quantised(precision: str, layer: nn.Linear) -> nn.Module:
    """Give a layer of few bits for a layer, with its bias."""
    with torch.inference_mode(False), torch.no_grad():
        own = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        own.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        _quantize(own, precision)
        weight: Any = own.weight
        if precision == "int4":
            own.register_parameter("bias", layer.bias)
            return own
        return EightBitLinear(layer, weight.qdata, weight.scale.to(layer.weight.dtype))


def bytes_of(precision: str, layer: nn.Linear) -> int:
    """Say how many bytes the weights of a layer take in a precision."""
    if precision == "int4":
        groups = -(-layer.in_features // GROUP)
        return layer.weight.numel() // 2 + layer.out_features * groups * 2 * 2
    return layer.weight.numel() + layer.out_features * layer.weight.element_size()


@functools.lru_cache(maxsize=64)
def refusal(precision: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a device can't compute with such weights, found by a small layer; None where it can."""
    with torch.no_grad():
        try:
            layer = nn.Linear(GROUP, GROUP, device=device, dtype=dtype)
            layer.weight.copy_(torch.linspace(-1.0, 1.0, GROUP * GROUP).sin().view(GROUP, GROUP))
            hidden_states = torch.linspace(-1.0, 1.0, 16 * GROUP).view(16, GROUP).to(device, dtype)
            expected, found = layer(hidden_states).float(), quantised(precision, layer)(hidden_states).float()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is said'}"
    off = float((found - expected).norm() / expected.norm())
    return None if off <= _TOLERANCE[precision] else f"its products are off by {off:.1%}"


def _quantize(layer: nn.Linear, precision: str) -> None:
    """Let torchao quantise a layer in place. No setting of the process is left changed, as its defaults would."""
    with unheard_warnings():
        try:
            from torchao import quantization as torchao
        except ImportError as error:
            raise UnsupportedModel(f"torchao can't be imported ({error}); pip install torchao") from error
        if precision == "int8":
            config: Any = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
        elif precision == "fp8":
            config = torchao.Float8WeightOnlyConfig(set_inductor_config=False)
        else:
            config = torchao.Int4WeightOnlyConfig(
                group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
        torchao.quantize_(layer, config)
