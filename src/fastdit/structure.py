"""Structural twins and walks over nested arguments: what the wiring, the twins and the counters build on."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastdit.errors import IncompatibleStack
from fastdit.nested import Value, map_tensors

_Module = TypeVar("_Module", bound=nn.Module)


#: Attributes that stand for behaviour installed on one module object, not for its structure.
_BEHAVIOUR = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def structural_twin(module: _Module, children: Mapping[str, Value], *, hooks: bool = True) -> _Module:
    """Copy a module's own `__dict__` and replace some children; weights and the other children are the same objects.

    A part that is no module is replaced alike, by a module.

    Neither the module nor its class is written to. Hooks of offloading libraries that sit on the module object are
    left out: they belong to the object that the user holds. The user's forward hooks are left out without `hooks`.
    """
    twin = type(module).__new__(type(module))
    hidden = {*_BEHAVIOUR, *children}
    attributes = {name: value for name, value in module.__dict__.items() if name not in hidden}
    attributes["_modules"] = {**module._modules, **children}
    attributes["_compiled_call_impl"] = None
    if not hooks:
        attributes.update({name: OrderedDict() for name in _HOOKS})
    twin.__dict__.update(attributes)
    return twin


def behaves_otherwise(module: nn.Module) -> bool:
    """Whether a module's object carries behaviour or hooks of its own, which a structural twin would lose."""
    own = module.__dict__
    if [*map(own.get, _BEHAVIOUR)].count(None) < len(_BEHAVIOUR):
        return True
    return any(map(own.get, _HOOKS))


def refuse_foreign_behaviour(module: nn.Module, name: str) -> None:
    """Raise `IncompatibleStack` where something else already changes how the module runs as a whole."""
    if getattr(module, "is_cache_enabled", False):
        raise IncompatibleStack(
            f"{name} already has a cache of diffusers enabled, and two caches would feed on each other; call "
            f"{name}.disable_cache() first"
        )
    if "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None:
        raise IncompatibleStack(
            f"{name} is compiled as a whole, which hides its blocks; accelerate the uncompiled module, and compile its "
            "blocks with compile_repeated_blocks() if you wish"
        )


def refuse_replaced_forward(module: nn.Module, where: str) -> None:
    """Raise `IncompatibleStack` where a module object has a forward of its own, which a structural twin leaves out."""
    if _forward_replaced(module):
        raise IncompatibleStack(
            f"{where} ({type(module).__name__}) has a forward of its own on the object, by which it was patched or "
            "compiled, and what acts inside of it would leave that out; write a subclass with that forward, or take it "
            "off (del module.forward)"
        )


def refuse_checkpointing(module: nn.Module, where: str) -> None:
    """Raise `IncompatibleStack` where blocks run again in the backward pass, where no run is there to answer them."""
    if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        raise IncompatibleStack(
            f"{where} ({type(module).__name__}) has gradient checkpointing on, by which its blocks run again in the "
            "backward pass, after the run that skipped or replaced them; call disable_gradient_checkpointing() first, "
            "or run under torch.no_grad()"
        )


def _forward_replaced(module: nn.Module) -> bool:
    """Whether there is another forward beneath what hooks of accelerate and diffusers put there."""
    forward, registry = module.__dict__.get("forward"), module.__dict__.get("_diffusers_hook")
    within = iter(reversed(registry._fn_refs if registry is not None else ()))
    while isinstance(forward, functools.partial):
        if forward.func.__module__ == "accelerate.hooks":
            forward = module.__dict__.get("_old_forward")
        elif (hooked := next(within, None)) is not None:
            forward = hooked.original_forward or hooked.forward
        else:
            return True
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def meta_twin(module: _Module) -> _Module:
    """Copy a module, children included, without weights and without hooks: every tensor becomes a meta tensor.

    Attributes that hold no tensors (configurations, attention processors) are shared. A layer that computes a linear
    product in a way of its own, as quantisers' do, becomes a plain one.
    """

    def without_data(tensor: torch.Tensor) -> torch.Tensor:
        # A weight of a class of its own (packed by a quantiser) stands for a plain one of its shape and type.
        plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
        like = tensor if plain else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        copied = torch.empty_like(like, device="meta")
        return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied

    return twin_with(_with_plain_products(module), without_data)


def _with_plain_products(module: _Module) -> _Module:
    """Give a structural twin whose layers of `in_features` and `out_features` are all plain ones, without weights."""
    parts = {name: part for name, part in module._modules.items() if part is not None}
    if _is_product(module):
        plain: Any = _Product(cast(int, module.in_features), cast(int, module.out_features))
        return cast(_Module, plain)
    made = {name: _with_plain_products(part) for name, part in parts.items()}
    changed = {name: part for name, part in made.items() if part is not parts[name]}
    return structural_twin(module, changed, hooks=False) if changed else module


def _is_product(module: nn.Module) -> bool:
    """Whether a layer itself computes a linear product, and otherwise than torch's own layers do."""
    sides = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(side, int) for side in sides) or type(module).forward is nn.Linear.forward:
        return False
    return not any(hasattr(part, "in_features") for part in module.children())  # one that adds to another's product


class _Product(nn.Module):
    """A linear product of inputs of any type, which stay of that type; its weight is one of numbers, on no device."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = torch.empty(out_features, in_features, dtype=torch.float32, device="meta")
        self.bias = None

    def forward(self, hidden_states: torch.Tensor, *args: Value, **kwargs: Value) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight.to(hidden_states.dtype))


def twin_with(
    module: _Module, function: Callable[[Any], Any], kind: type[Any] | tuple[type[Any], ...] = torch.Tensor
) -> _Module:
    """Copy a module, children included, without hooks: `function` of every tensor (or other `kind`) in its place."""
    children = {name: twin_with(child, function, kind) for name, child in module._modules.items() if child is not None}
    twin = structural_twin(module, children, hooks=False)
    for name, value in twin.__dict__.items():
        if name in ("_parameters", "_buffers") or (name != "_modules" and _holds(value, kind)):
            twin.__dict__[name] = map_tensors(value, function, kind)
        elif _is_helper(value, module):
            twin.__dict__[name] = copied = copy.copy(value)
            for inner, part in vars(copied).items():
                if _holds(part, kind):
                    vars(copied)[inner] = map_tensors(part, function, kind)
    return twin


def _holds(value: Value, kind: type[Any] | tuple[type[Any], ...]) -> bool:
    found: list[Value] = []
    map_tensors(value, found.append, kind)
    return bool(found)


def _is_helper(value: Value, module: nn.Module) -> bool:
    """Whether an attribute is an object, but no module, of a class beside the module's own.

    Such objects keep tensors, some only from their first use on, and a copy of the module must not change them.
    """
    return type(value).__module__ == type(module).__module__ and not isinstance(value, (nn.Module, type))


class RunningParts:
    """Which parts of a module are running, by their paths, for torch's counter of FLOPs.

    torch's own tracker hooks every module of the process, and so whatever runs in other threads.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parents = {"Global"}
        self._module = module
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for path, part in self._module.named_modules():
            self._handles.append(part.register_forward_pre_hook(lambda *_, path=path: self.parents.add(path)))
            self._handles.append(part.register_forward_hook(lambda *_, path=path: self.parents.discard(path)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def same_object_twin(module: _Module, cls: type[_Module]) -> _Module:
    """Make a second object with another class and the very same `__dict__` as `module`.

    Whatever is loaded, moved or hooked through either is there in both; only the class, and with it the behaviour of
    a call, differs.
    """
    twin = cls.__new__(cls)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


def identities(module: nn.Module) -> list[int]:
    """List the identities of a module's parts; several times faster than `modules()`, which also looks for repeats."""
    found, waiting = [], [module]
    while waiting:
        part = waiting.pop()
        found.append(id(part))
        waiting.extend(child for child in part._modules.values() if child is not None)
    return found
