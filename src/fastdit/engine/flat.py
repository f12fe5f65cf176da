"""A piece of a model as compilers take it: a function from tensors to tensors, how its output is put together, and
whether an engine that was made of it gives the piece's own numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdit.engine.arguments import mapped
from fastdit.engine.base import PieceCall
from fastdit.errors import EngineBuildFailed, UnsupportedModel
from fastdit.nested import Hole, tensors_of


class Flat(nn.Module):
    """A piece as a function from the tensors among its arguments to those among its outputs."""

    def __init__(self, call: PieceCall) -> None:
        super().__init__()
        self.piece = call.module
        self.__dict__["_call"] = call

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        call, given = self.__dict__["_call"], iter(tensors)
        args, kwargs = mapped([call.args, call.kwargs], lambda _: next(given))
        return tensors_of(self.piece(*args, **kwargs))


def encoded(output: Any) -> Any:
    """Write down how a piece's output is nested: "tensor", null, or one of these in a tuple, a list or a dictionary."""
    if isinstance(output, torch.Tensor):
        return "tensor"
    if output is None:
        return None
    if type(output) in (tuple, list):
        return {type(output).__name__: [encoded(item) for item in output]}
    if type(output) is dict:
        return {"dict": {name: encoded(item) for name, item in output.items()}}
    raise UnsupportedModel(f"its output holds a {type(output).__name__}, which a package can't give; use Compile()")


def decoded(data: Any) -> Any:
    """Undo `encoded`, with a hole for each tensor."""
    if data is None:
        return None
    if data == "tensor":
        return Hole()
    ((kind, items),) = data.items()
    if kind == "dict":
        return {name: decoded(item) for name, item in items.items()}
    nested = [decoded(item) for item in items]
    return tuple(nested) if kind == "tuple" else nested


def prove(expected: list[torch.Tensor], found: list[torch.Tensor], tolerance: float) -> None:
    """Raise `EngineBuildFailed` unless each tensor that an engine gave is the piece's, to a relative error.

    The error is |found - expected| / |expected| in the Euclidean norm; one that is not finite is too large.
    """
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise EngineBuildFailed(
                f"it gives {list(other.shape)} in {other.dtype} as output {index}, and the module itself "
                f"{list(one.shape)} in {one.dtype}; use another engine for this model"
            )
        error = float((other.double() - one.double()).norm() / one.double().norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise EngineBuildFailed(
                f"its output {index} differs from the module's own by {error:.1e} of its size, where {tolerance:.0e} "
                "is allowed; use another engine or a higher precision for this model"
            )
