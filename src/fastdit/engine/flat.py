"""A piece of a model as compilers take it: a function from tensors to tensors, how its output is put together, and
whether an engine that was made of it gives the piece's own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from fastdit.engine.arguments import mapped
from fastdit.engine.piece import PieceCall
from fastdit.errors import EngineBuildFailed, UnsupportedModel
from fastdit.nested import Hole, refilled, tensors_of

#: How an output is nested, as JSON: "tensor", null, or one of these in a tuple, a list or a dictionary.
Nesting: TypeAlias = "str | dict[str, list[Nesting] | dict[str, Nesting]] | None"

_OUTPUT = "output.json"


class Flat(nn.Module):
    """A piece as a function from the tensors among its arguments to those among its outputs."""

    def __init__(self, call: PieceCall) -> None:
        super().__init__()
        self.piece = call.module
        self.__dict__["_call"] = call

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        call, given = self.__dict__["_call"], iter(tensors)
        args, kwargs = mapped((call.args, call.kwargs), lambda _: next(given))
        return tensors_of(self.piece(*args, **kwargs))


class Output:
    """How the output of an engine is put together of its tensors; it is kept in the engine's folder."""

    def __init__(self, folder: Path) -> None:
        self._nesting = _decoded(json.loads((folder / _OUTPUT).read_bytes()))

    @staticmethod
    def keep(output: object, folder: Path) -> None:
        """Write down how an output is nested. Raises `UnsupportedModel` where it holds something else than tensors."""
        (folder / _OUTPUT).write_text(json.dumps(_encoded(output)), encoding="utf-8")

    def of(self, tensors: list[torch.Tensor]) -> object:
        """Put an output together."""
        return refilled(self._nesting, iter(tensors))


def _encoded(output: object) -> Nesting:
    if isinstance(output, torch.Tensor):
        return "tensor"
    if output is None:
        return None
    if isinstance(output, (tuple, list)) and type(output) in (tuple, list):
        return {type(output).__name__: [_encoded(item) for item in output]}
    if isinstance(output, dict) and type(output) is dict:
        return {"dict": {name: _encoded(item) for name, item in output.items()}}
    raise UnsupportedModel(f"its output holds a {type(output).__name__}, which a package can't give; use Compile()")


def _decoded(data: Nesting) -> object:
    """Undo `_encoded`, with a hole for each tensor."""
    if data is None:
        return None
    if isinstance(data, str):
        return Hole()
    ((kind, items),) = data.items()
    if isinstance(items, dict):
        return {name: _decoded(item) for name, item in items.items()}
    nested = [_decoded(item) for item in items]
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
