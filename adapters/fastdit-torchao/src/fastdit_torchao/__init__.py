"""Linear layers of few bits, quantised by torchao, as an accelerator of fastdit's weights level.

    int8, fp8    y_j = s_j sum_k x_k q_jk + b_j       one scale s_j for each row of W, q = W / s rounded to 8 bits
    int4         y_j = sum_g s_jg sum_{k in g} x_k (q_jk - z_jg) + b_j      a scale and a zero for each group of 128

The model's blocks run on a twin that has linear layers of its own (`layers.py`), so that all that acts on blocks, an
engine among them, sees those. Activations stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import nn

from fastdit.accelerator import Accelerator, Break, Change, Level, Need
from fastdit.blocks.chain import Forward, ForwardCall, Pass
from fastdit.config import register
from fastdit.errors import UnsupportedModel
from fastdit.nested import Value
from fastdit.run import Run

from .copies import Copies, linear_layers, refuse_foreign_parts
from .layers import bytes_of, quantised, refusal

__all__ = ["Quantize"]


@register
@dataclasses.dataclass(frozen=True)
class Quantize(Accelerator):
    """Run the linear layers of a model's blocks with weights of 8 or 4 bits.

    The pipeline keeps its own weights, and the twin has copies, made at its first run and again when weights change.
    With `hand_over` the pipeline's own layers take them, which frees the memory of the full weights; from the twin's
    first run on the plain pipeline then computes with few bits, too, and LoRA can't be fused into it.

    Args:
        precision: "int8" (everywhere), "fp8" (e4m3; where torch has it), or "int4" (CUDA devices, bfloat16).
        hand_over: give the memory of the pipeline's own full weights up.

    Raises:
        InvalidConfig: for another precision.
        UnsupportedModel: from `accelerate`, where torchao is missing, the device can't compute with such weights, the
            blocks have no plain linear layers, or something moves parts of them about (offloading).

    >>> Quantize("int8").describe()
    "Quantize(precision='int8')"
    """

    precision: Literal["int8", "fp8", "int4"] = "int8"
    _: dataclasses.KW_ONLY
    hand_over: bool = False

    level: ClassVar = Level.WEIGHTS
    changes: ClassVar = frozenset({Change.ARITHMETIC_ORDER})
    needs: ClassVar = frozenset({Need.BLOCK_LISTS})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS})

    def check(self, pipeline: object, transformer: nn.Module) -> None:
        layers = linear_layers(transformer)
        if not layers:
            raise UnsupportedModel(
                f"{self.describe()} found no linear layer of plain weights in the blocks of "
                f"{type(transformer).__name__}; a model that is quantised already needs no more of it"
            )
        refuse_foreign_parts(transformer)
        weight = layers[0].weight
        device = torch.device(getattr(pipeline, "_execution_device", None) or weight.device)
        if device.type != "meta" and (why := refusal(self.precision, device, weight.dtype)) is not None:
            other = "another precision" if self.precision != "int8" else "a torchao for your torch"
            raise UnsupportedModel(
                f"{self.describe()} can't compute in {weight.dtype} on {device}: {why}; take {other}"
            )

    def lasting(self) -> Copies:
        return Copies(lambda layer: quantised(self.precision, layer))

    def remarks(self, models: Sequence[nn.Module], stages: int, lasting: Copies) -> Iterable[str]:
        for model in models:
            if not (layers := linear_layers(model)):
                continue  # they were handed over
            full = sum(layer.weight.nbytes for layer in layers)
            few = sum(bytes_of(self.precision, layer) for layer in layers)
            how = "in the place of" if self.hand_over else "beside"
            yield (
                f"{len(layers)} linear layers of {type(model).__name__} take {few / 1e6:,.1f} MB in {self.precision}, "
                f"{how} {full / 1e6:,.1f} MB of the pipeline's own"
            )

    def enter(self, run: Run, lasting: Copies) -> Pass:
        return _Quantized(self, lasting)


class _Quantized(Pass):
    """Hands every forward on to the module's twin of few bits."""

    def __init__(self, settings: Quantize, copies: Copies) -> None:
        self._settings, self._copies = settings, copies
        self._begun: set[nn.Module] = set()

    @property
    def acts_on_blocks(self) -> bool:
        return True  # it is other blocks that run, without the hooks on the module itself

    def forward(self, call: ForwardCall, next: Forward) -> Value:
        module = call.module
        if module not in self._begun:
            self._begun.add(module)
            if self._settings.hand_over:
                self._copies.hand_over(module)
            self._copies.begin(module)
        of_few_bits = call.with_arguments(call.arguments)
        of_few_bits.module = self._copies.twin_of(module)
        return next(of_few_bits)
