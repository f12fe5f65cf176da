"""What a record knows of a forward to tell later what it cost: its shapes, the blocks that it called, no tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from weakref import WeakValueDictionary

import torch
from torch import nn

from fastdit.flops import FlopCount, Shape, count, outline_of, outline_of_value
from fastdit.nested import Value, map_tensors
from fastdit.structure import meta_twin, structural_twin, twin_with

#: What was counted in this process, or why it can't be, by what a module is made of and the shapes of a call.
_COUNTED: dict[Hashable, FlopCount | str] = {}
_MOST_COUNTED = 1024
_PLAIN = (NoneType, bool, int, str)


class FlopMeter:
    """Tells forwards of a module, as it is now, apart by shapes; forgets these with the records that have them."""

    def __init__(self, module: nn.Module) -> None:
        self._kinds: WeakValueDictionary[Hashable, ForwardKind] = WeakValueDictionary()
        try:
            self._module: nn.Module | str = meta_twin(module)
        except Exception as error:  # whatever a quantiser's tensors raise
            self._module = _because(module, error)

    @cached_property
    def _outline(self) -> Hashable:
        return outline_of(self._module) if isinstance(self._module, nn.Module) else None

    def kind(self, kwargs: Mapping[str, Value], children: Mapping[str, nn.Module] | None = None) -> ForwardKind:
        """Give the kind of a call, which has its shapes and not its tensors.

        `children` stand in for some of the module's own in this call, and cost the same for all of its shapes.
        """
        key = tuple([
            (name, (value.shape, value.dtype) if isinstance(value, torch.Tensor)
             else value if isinstance(value, _PLAIN) else outline_of_value(value))
            for name, value in kwargs.items()
        ])  # fmt: skip
        found = self._kinds.get(key)
        if found is None:
            outlines = {name: twin_with(child, Shape.of) for name, child in (children or {}).items()}
            found = self._kinds[key] = ForwardKind(self, key, map_tensors(dict(kwargs), Shape.of), outlines)
        return found

    def count(self, kind: ForwardKind) -> FlopCount | str:
        """Count a forward of a kind; a text says why it can't be counted."""
        if isinstance(self._module, str):
            return self._module
        same = self._outline, kind.key, tuple((name, type(child)) for name, child in kind.children.items())
        if same not in _COUNTED:
            if len(_COUNTED) >= _MOST_COUNTED:
                _COUNTED.clear()
            try:
                kwargs = map_tensors(kind.arguments, Shape.meta, kind=Shape)
                children = {name: twin_with(child, Shape.meta, kind=Shape) for name, child in kind.children.items()}
                _COUNTED[same] = count(structural_twin(self._module, children), **kwargs)
            except Exception as error:  # whatever a forward raises that asks for values where there are shapes alone
                _COUNTED[same] = _because(self._module, error)
        return _COUNTED[same]


@dataclass(eq=False)
class ForwardKind:
    """Forwards of the same shapes, which cost the same. `called` names the blocks that the last one to run called."""

    meter: FlopMeter
    key: Hashable
    arguments: Mapping[str, Value]
    children: Mapping[str, nn.Module]
    called: tuple[str, ...] = ()

    @cached_property
    def counted(self) -> FlopCount | str:
        """What such a forward costs, or why that can't be counted."""
        return self.meter.count(self)

    def flops(self, saved: Mapping[str, float]) -> int | None:
        """Give the FLOPs without the shares saved, by module path ("" is the whole); None where they are unknown."""
        if isinstance(self.counted, str):
            return None
        modules = self.counted.modules
        return self.counted.total - sum(round(share * modules.get(path, 0)) for path, share in saved.items())

    @property
    def blocks(self) -> tuple[str, ...] | None:
        """Name the blocks that the model calls: as they were seen, or else as they are counted."""
        if self.called or isinstance(self.counted, str):
            return self.called or None
        return tuple(name for name in self.counted.blocks if self.counted.modules.get(name, 0) > 0)


def _because(module: nn.Module, error: Exception) -> str:
    return f"the FLOPs of {type(module).__name__} can't be counted on shapes alone: {type(error).__name__}: {error}"
