"""FLOPs of a module's forward, counted on the meta device: no weights, no arithmetic, attention included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .structure import map_tensors


@dataclass(frozen=True)
class FlopCount:
    """The FLOPs (two a multiply-add) of one forward: in total, and in each item of its top-level module lists."""

    total: int
    blocks: Mapping[str, int]


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module without its weights: every parameter and buffer becomes a meta tensor of the same shape."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def count(module: nn.Module, *args: Any, **kwargs: Any) -> FlopCount:
    """Count one forward of `module` for arguments of these shapes; tensors may be real or on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    twin = on_meta(module)
    args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to("meta"))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(*args, **kwargs)
    totals = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(twin).__name__
    blocks = {}
    for name, child in twin.named_children():
        if isinstance(child, nn.ModuleList):
            for index in range(len(child)):
                blocks[f"{name}.{index}"] = totals.get(f"{root}.{name}.{index}", 0)
    return FlopCount(counter.get_total_flops(), blocks)


class FlopMeter:
    """Counts the forwards of one module lazily, once for each set of shapes."""

    def __init__(self, module: Callable[[], nn.Module]) -> None:
        self._module = module
        self._specs: dict[str, Any] = {}
        self._counts: dict[str, FlopCount] = {}

    def key(self, kwargs: Mapping[str, Any]) -> str:
        """Remember the shapes (not the tensors) of a call and give the key under which they are counted."""
        spec = map_tensors(dict(kwargs), lambda tensor: _Shape(tuple(tensor.shape), tensor.dtype))
        key = repr(sorted(spec.items(), key=lambda item: item[0]))
        self._specs.setdefault(key, spec)
        return key

    def flops(self, key: str, skipped: tuple[str, ...]) -> int:
        """Give the FLOPs of a remembered call without the blocks that were skipped in it."""
        if key not in self._counts:
            kwargs = map_tensors(self._specs[key], _Shape.meta, kind=_Shape)
            self._counts[key] = count(self._module(), **kwargs)
        counted = self._counts[key]
        return counted.total - sum(counted.blocks[name] for name in skipped)


@dataclass(frozen=True)
class _Shape:
    """The shape and dtype of a tensor that is not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")
