"""FLOPs of a module's forward, counted on the meta device: no weights, no arithmetic, attention included."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fastdit.errors import UnsupportedModel
from fastdit.nested import Value, map_tensors
from fastdit.structure import RunningParts, meta_twin, structural_twin, twin_with


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


#: What was counted in this process, by what a module is made of and the shapes of a call.
_COUNTED: dict[Hashable, FlopCount] = {}
_MOST_COUNTED = 1024


def _outline_of(module: nn.Module) -> Hashable:
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


class FlopMeter:
    """Counts the forwards of one module as it is now, lazily, once for each set of shapes; it keeps no weights."""

    def __init__(self, module: nn.Module) -> None:
        self._module = meta_twin(module)
        self._specs: dict[Hashable, Any] = {}
        self._counts: dict[Hashable, FlopCount] = {}
        self._outline: Hashable = None

    def key(self, kwargs: Mapping[str, Value], children: Mapping[str, nn.Module] | None = None) -> Hashable:
        """Remember the shapes (not the tensors) of a call and give the key under which they are counted.

        `children` stand in for some of the module's own in this call, and cost the same for all of its shapes.
        """
        key = tuple(
            [
                (name, (value.shape, value.dtype) if isinstance(value, torch.Tensor) else _kind(value))
                for name, value in kwargs.items()
            ]
        )
        if key not in self._specs:
            outlines = {name: twin_with(child, _Shape.of) for name, child in (children or {}).items()}
            self._specs[key] = map_tensors(dict(kwargs), _Shape.of), outlines
        return key

    def flops(self, key: Hashable, saved: Mapping[str, float]) -> int:
        """Give the FLOPs of a remembered call without the shares saved in it, by module path ("" is the whole)."""
        counted = self._count(key)
        return counted.total - sum(round(share * counted.modules.get(path, 0)) for path, share in saved.items())

    def blocks(self, key: Hashable) -> tuple[str, ...]:
        """Name the blocks that the model itself calls in a remembered call."""
        counted = self._count(key)
        return tuple(name for name in counted.blocks if counted.modules.get(name, 0) > 0)

    def _count(self, key: Hashable) -> FlopCount:
        if key not in self._counts:
            shapes, outlines = self._specs[key]
            if self._outline is None:
                self._outline = _outline_of(self._module)
            same = self._outline, key, tuple((name, type(child)) for name, child in outlines.items())
            if same in _COUNTED:
                self._counts[key] = _COUNTED[same]
                return self._counts[key]
            kwargs = map_tensors(shapes, _Shape.meta, kind=_Shape)
            children = {name: twin_with(child, _Shape.meta, kind=_Shape) for name, child in outlines.items()}
            try:
                self._counts[key] = count(structural_twin(self._module, children), **kwargs)
            except NotImplementedError as error:
                raise UnsupportedModel(
                    f"the FLOPs of {type(self._module).__name__} can't be counted, since one of its kernels can't be "
                    f"run on shapes alone ({error}); count them on the same model without quantisation"
                ) from error
            if len(_COUNTED) >= _MOST_COUNTED:
                _COUNTED.clear()
            _COUNTED[same] = self._counts[key]
        return self._counts[key]


@dataclass(frozen=True)
class _Shape:
    """The shape and dtype of a tensor that is not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Shape:
        return cls(tuple(tensor.shape), tensor.dtype)

    def meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _kind(value: Value) -> Hashable:
    """Tell values apart that make a forward cost differently; this runs at every step."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return repr(map_tensors(value, _Shape.of))
