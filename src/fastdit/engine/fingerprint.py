"""What a module is: a digest of its structure, for which it is not run (`checksum.py` has that of its weights).

The structure is all that a module computes by besides the values of its weights: classes and their source, plain
attributes, shapes of weights, LoRA layers and their scales.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import operator
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from fastdit.engine.checksum import parts_of, sampled

#: How deep objects among a module's attributes are looked into.
_DEPTH = 4

#: What peft's layers remember of how they were made; it says where each layer is, and changes nothing.
_PEFT_NOTES = frozenset({"kwargs"})

#: Values that stand for themselves.
_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device)

_INTERNALS = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_hf_hook", "_diffusers_hook"}

#: What every module has and none computes a forward by, as it has no part in the comparison at each call.
_ASIDE = frozenset(vars(nn.Module())) - {
    "training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks",
}  # fmt: skip


class Structure:
    """All that a module computes by besides the values of its weights, as a digest, and whether it is still that.

    Two blocks of equal digests differ in their weights alone, so one engine serves both. `unchanged` compares what was
    looked at by identity, which is cheap enough for every call of a block. With `values` the weights count, too: it
    sees what torch counts as a change in place, and not what is written through `weight.data`.
    """

    def __init__(self, module: nn.Module, *, values: bool = False) -> None:
        held: list[Collection[object]] = []
        parts = [_part(name, part, held) for name, part in module.named_modules()]
        self._bare = [place for place in held if not place]  # most hooks and buffers: quicker asked than listed
        self._held = [place for place in held if place]
        self.digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        self._attributes = [vars(part) for part in module.modules()]
        self._read = [operator.itemgetter("training", *own.keys() - _ASIDE) for own in self._attributes]
        self._seen = self._now()
        weights = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        tensors = [item for item in self._seen if isinstance(item, torch.Tensor) and _has_address(item)]
        self._placed = [(tensor, tensor.data_ptr()) for tensor in tensors]
        counted = [tensor for tensor in tensors if values or id(tensor) not in weights]
        self._written = [(tensor, tensor._version) for tensor in counted if not tensor.is_inference()]

    @property
    def unchanged(self) -> bool:
        """Whether nothing was put in the place of anything that the digest was made of."""
        if any(self._bare):
            return False
        try:
            now = self._now()
        except KeyError:  # an attribute is gone
            return False
        if len(now) != len(self._seen) or not (all(map(operator.is_, now, self._seen)) or self._equal(now)):
            return False
        moved = any(tensor.data_ptr() != address for tensor, address in self._placed)
        return not moved and all(tensor._version == version for tensor, version in self._written)

    def _now(self) -> list[object]:
        """List all that was looked at as it is now, in one order. Raises `KeyError` where an attribute is gone."""
        read = map(operator.itemgetter.__call__, self._read, self._attributes)
        flat = itertools.chain.from_iterable
        return [*map(len, self._attributes), *flat(self._held), *flat(read)]

    def _equal(self, now: list[object]) -> bool:
        """Whether all that is another object is a plain value equal to the one before."""
        others = ((one, other) for one, other in zip(now, self._seen, strict=True) if one is not other)
        return all(type(one) is type(other) and isinstance(one, _PLAIN) and one == other for one, other in others)


def structure_of(module: nn.Module) -> str:
    """Give the digest of a module's structure."""
    return Structure(module).digest


def _part(name: str, part: nn.Module, held: list[Collection[object]]) -> tuple[object, ...]:
    hooks = part._forward_hooks, part._forward_pre_hooks  # which no engine may leave out
    held += [place.values() for place in (part._parameters, part._buffers, part._modules, *hooks)]
    passed_over = _INTERNALS | _PEFT_NOTES if type(part).__module__.startswith("peft.") else _INTERNALS
    own = {key: value for key, value in vars(part).items() if key not in passed_over}
    tensors = [(key, _tensor(tensor)) for key, tensor in (*part._parameters.items(), *part._buffers.items())]
    return name, _class_of(part), part.training, tensors, _described(own, _DEPTH, held)


def _has_address(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory of its own; one that is put together of others may have none."""
    return not parts_of(tensor)[0] and tensor.device.type != "meta"


def _tensor(tensor: torch.Tensor | None) -> object:
    if tensor is None:
        return None
    kind, shape = type(tensor).__name__, tuple(tensor.shape)
    own = kind, shape, tensor.stride(), str(tensor.dtype), str(tensor.device), tensor.requires_grad
    held, how = parts_of(tensor)
    return (own, [(name, _tensor(part)) for name, part in held.items()], _described(how, _DEPTH, [])) if held else own


def _described(value: object, depth: int, held: list[Collection[object]]) -> object:
    """Describe an attribute: plain values as they are, tensors by content, objects by class and attributes.

    What could be exchanged in it is added to `held`, as something that gives its items whenever it is walked through.
    """
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype), sampled([value])
    if isinstance(value, type):
        return _class(cast(Hashable, value))
    if depth == 0 or isinstance(value, nn.Module):  # a child of the module has an entry of its own
        return _class_of(value)
    if isinstance(value, Mapping):
        held += [value.keys(), value.values()]
        return [(str(key), _described(item, depth - 1, held)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        held.append(value)
        return [_described(item, depth - 1, held) for item in value]
    if isinstance(value, (set, frozenset)):
        held.append(value)
        return sorted(str(item) for item in value)
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__module__, value.__qualname__, _source_of(inspect.unwrap(value))
    return _class_of(value), _described(getattr(value, "__dict__", {}), depth - 1, held)


def _class_of(value: object) -> object:
    return _class(cast(Hashable, type(value)))


@functools.lru_cache(maxsize=1024)
def _class(cls: type) -> tuple[object, ...]:
    """Name a class with the source of the files that define it and its bases."""
    sources = [_source_of(base) for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    return cls.__module__, cls.__qualname__, tuple(sources)


def _source_of(thing: object) -> str:
    try:
        path = inspect.getsourcefile(thing)  # type: ignore[arg-type]
    except TypeError:
        path = None
    return _file(path) if path is not None and Path(path).exists() else ""


@functools.lru_cache(maxsize=256)
def _file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
