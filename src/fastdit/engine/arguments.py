"""What a call's arguments look like to an engine: their outline, and the one memory layout in which it takes them.

A compiled piece of a model is right for one outline: the shape, dtype and device of every tensor, and every plain
value. Tensors reach it in canonical strides. A dimension of size 1 may have any stride and still count as contiguous,
and a slice of a joined sequence has an odd one there, for which a compiler would build a second engine.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

from fastdit.errors import EngineMismatch
from fastdit.nested import PerImage, map_tensors

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)

_Nested = TypeVar("_Nested")


class TensorOutline(NamedTuple):
    """What an engine must know of a tensor whose strides are canonical."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} on {self.device}"


def tensor_outline(tensor: torch.Tensor) -> TensorOutline:
    """Give the outline of a tensor."""
    return TensorOutline(tuple(tensor.shape), tensor.dtype, tensor.device)


def outline_of(value: object, where: str = "arguments") -> Hashable:
    """Give the outline of nested arguments; equal ones may go to one engine.

    Raises `EngineMismatch` for a value of which nothing is known, since an engine could not tell it from another.
    """
    if isinstance(value, torch.Tensor):
        return tensor_outline(value)
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(outline_of(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, Mapping):
        return "dict", tuple((key, outline_of(item, f"{where}[{key!r}]")) for key, item in value.items())
    if isinstance(value, PerImage):
        return type(value).__name__, outline_of(vars(value), where)
    raise EngineMismatch(
        f"{where} is a {type(value).__name__}, and an engine takes tensors, numbers, texts and what is nested of them; "
        "leave that argument out, or leave the engine out"
    )


def outline_text(outline: Hashable) -> str:
    """Write an outline down, the same for equal ones, in this process and the next."""
    if isinstance(outline, TensorOutline):
        return str(outline)
    if isinstance(outline, tuple):
        return f"({', '.join(outline_text(item) for item in outline)})"
    return repr(outline)


def mapped(value: _Nested, function: Callable[[torch.Tensor], object]) -> _Nested:
    """Apply `function` to every tensor in nested arguments, those that hold something of each image among them."""

    def of_one(item: torch.Tensor | PerImage) -> object:
        if isinstance(item, torch.Tensor):
            return function(item)
        twin = copy.copy(item)
        twin.__dict__.update(mapped(vars(item), function))
        return twin

    found: _Nested = map_tensors(value, of_one, (torch.Tensor, PerImage))
    return found


def tensors_in(value: object) -> list[torch.Tensor]:
    """List the tensors in nested arguments, in the order of `mapped`."""
    found: list[torch.Tensor] = []
    mapped(value, found.append)
    return found


@functools.lru_cache(maxsize=1024)
def canonical_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the strides of a row-major tensor of this shape, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_canonical(tensor: torch.Tensor) -> bool:
    """Whether a tensor's strides are those that engines are built for."""
    return tensor.stride() == canonical_strides(tuple(tensor.shape))


def in_canonical_strides(value: _Nested) -> _Nested:
    """Give nested arguments with every tensor in canonical strides; the very same ones where all of them are."""
    waiting: list[object] = [value]
    while waiting:  # a walk without calls, since it is taken at every call of a block
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            if item.requires_grad or not is_canonical(item):
                return mapped(value, canonical)
        elif isinstance(item, (tuple, list)):
            waiting.extend(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, PerImage):
            waiting.append(vars(item))
    return value


def canonical(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor in canonical strides: itself, a view of it where it counts as contiguous, else a copy."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if is_canonical(tensor):
        return tensor
    if tensor.is_contiguous():
        return tensor.as_strided(tensor.shape, canonical_strides(tuple(tensor.shape)))
    return tensor.contiguous()
