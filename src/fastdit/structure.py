"""Structural twins and walks over nested arguments: what the wiring, the twins and the counters build on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)

#: Attributes that stand for behaviour installed on one module object, not for its structure.
_BEHAVIOUR = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")


def structural_twin(module: _Module, children: Mapping[str, Any]) -> _Module:
    """Copy a module's own `__dict__` and replace some children; weights and the other children are the same objects.

    Neither the module nor its class is written to. Hooks of offloading libraries that sit on the module object are
    left out: they belong to the object that the user holds.
    """
    twin = type(module).__new__(type(module))
    attributes = {name: value for name, value in module.__dict__.items() if name not in _BEHAVIOUR}
    attributes["_modules"] = {**module._modules, **children}
    attributes["_compiled_call_impl"] = None
    twin.__dict__.update(attributes)
    return twin


def same_object_twin(module: _Module, cls: type[_Module]) -> _Module:
    """Make a second object with another class and the very same `__dict__` as `module`.

    Whatever is loaded, moved or hooked through either is there in both; only the class, and with it the behaviour of
    a call, differs.
    """
    twin = cls.__new__(cls)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


def map_tensors(value: Any, function: Callable[[Any], Any], kind: type[Any] = torch.Tensor) -> Any:
    """Apply `function` to every tensor (or other `kind`) in nested tuples, lists and dictionaries."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function, kind) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function, kind) for key, item in value.items()}
    return value


def tensors_of(value: Any) -> list[torch.Tensor]:
    """List the tensors in nested tuples, lists and dictionaries, in order."""
    found: list[torch.Tensor] = []
    map_tensors(value, found.append)
    return found
