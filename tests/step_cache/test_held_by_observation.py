"""The forward that a wiring is learned from holds what leaves the lists, however many blocks there are."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import FirstBlockCache, accelerate
from fastdit.accelerator import Accelerator
from fastdit.testing import flux_transformer, generate, tiny_flux


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        items = output if isinstance(output, (tuple, list)) else [output]
        self._made += [weakref.ref(item) for item in items if isinstance(item, torch.Tensor)]
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        storages = [tensor.untyped_storage() for tensor in alive]
        self.bytes = max(self.bytes, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return output


def peak_of(forward: Callable[[], object]) -> int:
    with torch.no_grad(), Peak() as peak:
        forward()
    return peak.bytes


TOKENS, WIDTH = 256, 32
STREAMS = 4 * WIDTH * (TOKENS + 6)  # bytes of all that is carried from block to block


def held(cache: Accelerator, layers: int, single_layers: int) -> float:
    """Say how much more than the plain forward the first one under a cache holds, in bytes of all carried streams."""
    pipeline, call = tiny_flux(steps=1, size=256)
    pipeline.transformer = flux_transformer(layers=layers, single_layers=single_layers)
    plain = peak_of(lambda: generate(pipeline, call))
    twin = accelerate(pipeline, [cache])
    return (peak_of(lambda: generate(twin, call)) - plain) / STREAMS


@pytest.mark.parametrize(
    "cache", [FirstBlockCache(0.1), FirstBlockCache(0.1, leading=2, trailing=2)], ids=["all", "amid"]
)
@pytest.mark.filterwarnings("ignore::fastdit.NeverFired")
def test_the_observed_forward_holds_no_more_for_more_blocks(cache: Accelerator) -> None:
    few, many = held(cache, 4, 4), held(cache, 12, 20)
    assert many <= few + 0.01
    assert many < 6  # of 32 blocks
