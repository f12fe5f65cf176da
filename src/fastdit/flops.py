"""FLOPs of a module's forward, counted on the meta device: no weights, no arithmetic, attention included."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fastdit.nested import Value, map_tensors
from fastdit.structure import RunningParts, meta_twin


@dataclass(frozen=True)
class FlopCount:
    """The FLOPs (two a multiply-add) of one forward: in total, and in each module by its path.

    `blocks` names the items of the top-level module lists.
    """

    total: int
    modules: Mapping[str, int]
    blocks: tuple[str, ...]


def count(module: nn.Module, *args: Value, **kwargs: Value) -> FlopCount:
    """Count one forward of `module` for arguments of these shapes; tensors may be real or on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    twin = meta_twin(module)
    args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to("meta"))
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = cast(Any, RunningParts(twin))
    with torch.no_grad(), counter:
        twin(*args, **kwargs)
    modules = {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items() if path != "Global"}
    modules[""] = counter.get_total_flops()
    lists = [(name, child) for name, child in twin.named_children() if isinstance(child, nn.ModuleList)]
    blocks = tuple(f"{name}.{index}" for name, child in lists for index in range(len(child)))
    return FlopCount(counter.get_total_flops(), modules, blocks)


def outline_of(module: nn.Module) -> Hashable:
    """Describe what decides the FLOPs of a module: its parts, their classes, shapes and plain attributes."""
    return (
        repr(getattr(module, "config", None)),
        *(
            (
                path,
                type(part),
                tuple((name, weight.shape) for name, weight in part._parameters.items() if weight is not None),
                tuple(
                    (name, repr(value) if isinstance(value, (bool, int, float, str, tuple)) else type(value).__name__)
                    for name, value in part.__dict__.items()
                    if not name.startswith("_")
                ),
            )
            for path, part in module.named_modules()
        ),
    )


@dataclass(frozen=True)
class Shape:
    """The shape and dtype of a tensor that is not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Shape:
        return cls(tuple(tensor.shape), tensor.dtype)

    def meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def outline_of_value(value: Value) -> Hashable:
    """Tell values apart that make a forward cost differently."""
    return float if isinstance(value, float) else repr(map_tensors(value, Shape.of))
