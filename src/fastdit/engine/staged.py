"""Engines that serve several stages: what differs between stages is the number of image tokens, and that is said."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastdit.config import is_count
from fastdit.engine.arguments import mapped, outline_of, tensors_in
from fastdit.engine.base import Engine, PieceCall
from fastdit.engine.flat import Flat
from fastdit.engine.key import EngineKey
from fastdit.errors import EngineMismatch, InvalidConfig, UnsupportedModel

#: The shape of each tensor of a call, in order.
Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class StagedEngine(Engine):
    """Base of the engines of which one may serve every stage of a run.

    `tokens` names the numbers of image tokens that stages have, such as (1024, 4096) for 512 x 512 and 1024 x 1024
    pixels of 16 a token. A call at one of them gets an engine for all of them; any other call gets one of its own, as
    all do where nothing is named.
    """

    _: dataclasses.KW_ONLY
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        name, tokens = type(self).__name__, self.tokens
        if not isinstance(tokens, tuple) or not all(is_count(count, 2) for count in tokens):
            raise InvalidConfig(f"{name}'s tokens are whole numbers of image tokens from 2, got {tokens!r}")
        if len(set(tokens)) < len(tokens) or len(tokens) == 1:
            raise InvalidConfig(f"{name}'s tokens are at least two different numbers, or none, got {tokens!r}")

    def shapes(self, call: PieceCall) -> tuple[Shapes, ...]:
        """Give the shapes that an engine for a call takes: one a stage that it serves, or the call's own."""
        own = tuple(tuple(tensor.shape) for tensor in tensors_in([call.args, call.kwargs]))
        sizes = {size for shape in own for size in shape}
        present = [count for count in self.tokens if count in sizes]
        if len(present) != 1:  # none, or not to be told apart from something else of that size
            return (own,)
        # The image's tokens, alone or in one sequence with something else (such as text) that the call also has alone.
        following = {present[0] + other: other for other in {0} | sizes - {present[0]}}
        return tuple(
            tuple(tuple(count + following[size] if size in following else size for size in shape) for shape in own)
            for count in self.tokens
        )

    def key(self, call: PieceCall, *, structure: str | None = None, weights: str | None = None) -> EngineKey:
        key = super().key(call, structure=structure, weights=weights)
        shapes = self.shapes(call)
        if len(shapes) == 1:
            return key
        first = iter(shapes[0])
        arguments = mapped((call.args, call.kwargs), lambda tensor: tensor.new_empty(()).expand(next(first)))
        return dataclasses.replace(key, arguments=outline_of(arguments), stage=None)


def stage_of(tensors: list[torch.Tensor], shapes: tuple[Shapes, ...]) -> int:
    """Say at which of the `shapes` that an engine takes a call is. Raises `EngineMismatch` where it is at none."""
    own = tuple(tuple(tensor.shape) for tensor in tensors)
    if own not in shapes:
        raise EngineMismatch(
            f"the call has tensors of {own}, and the engine takes {', or '.join(map(str, shapes))}; a size that "
            "happens to be a number of tokens may have been taken for one: leave `tokens` out, for one engine a stage"
        )
    return shapes.index(own)


def _varying(shapes: tuple[Shapes, ...]) -> list[set[int]]:
    """List the dimensions of each tensor that are not of one size in all of `shapes`."""
    return [
        {axis for axis, sizes in enumerate(zip(*each, strict=True)) if len(set(sizes)) > 1}
        for each in zip(*shapes, strict=True)
    ]


@contextmanager
def following_tokens(call: PieceCall, shapes: tuple[Shapes, ...]) -> Iterator[tuple[Any, Any]]:
    """Give a call's arguments to Dynamo, which traces inside, with a variable for each dimension that differs.

    Dimensions that happen to be of one size stay apart: image tokens may be as many as a token is wide, at one stage.
    """
    marks = iter(_varying(shapes))

    def marked(tensor: torch.Tensor) -> torch.Tensor:
        alias = tensor.detach()  # marks are attributes, and the caller's tensors get none
        for axis in next(marks):
            torch._dynamo.mark_dynamic(alias, axis)
        return alias

    if len(shapes) == 1:
        yield call.args, call.kwargs
        return
    tracing: Any = torch.fx.experimental._config
    with tracing.patch(use_duck_shape=False):
        yield mapped(call.args, marked), mapped(call.kwargs, marked)


def exported(call: PieceCall, shapes: tuple[Shapes, ...]) -> Any:
    """Export a piece as one program for all of `shapes`. Raises `UnsupportedModel` where it takes but one of them."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    varying = _varying(shapes)
    dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in varying)
    tensors = tuple(tensors_in([call.args, call.kwargs]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on itself
        program = torch.export.export(Flat(call), tensors, dynamic_shapes=(dynamic,) if any(dynamic) else None)
    inputs = set(program.graph_signature.user_inputs)
    placeholders = [node.meta["val"] for node in program.graph.nodes if node.name in inputs]
    for index, (placeholder, axes) in enumerate(zip(placeholders, varying, strict=True)):
        if fixed := [axis for axis in axes if is_concrete_int(placeholder.shape[axis])]:
            raise UnsupportedModel(
                f"dimension {fixed[0]} of tensor {index}, {list(tensors[index].shape)}, should follow the number of "
                "image tokens, and the module takes no other size there; leave `tokens` out, for one engine a stage"
            )
    return program
