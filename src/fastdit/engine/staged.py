"""Engines that serve several stages: what differs between stages is the number of image tokens, and that is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fastdit.config import Range
from fastdit.engine.arguments import outline_of
from fastdit.engine.base import Engine
from fastdit.engine.flat import Flat
from fastdit.engine.key import EngineKey
from fastdit.engine.piece import PieceCall
from fastdit.engine.room import Requirement
from fastdit.errors import EngineMismatch, InvalidConfig, UnsupportedModel
from fastdit.process import switching, unheard_warnings

#: The shape of each tensor of a call, in order.
Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class StagedEngine(Engine):
    """Base of the engines of which one may serve every stage of a run.

    Args:
        tokens: the numbers of image tokens that stages have, two or more, such as (1024, 4096) for 512 x 512 and
            1024 x 1024 pixels of 16 a token. A call at one of them gets an engine for all of them; any other call gets
            one of its own, as all do where nothing is named.
    """

    _: dataclasses.KW_ONLY
    tokens: tuple[Annotated[int, Range(at_least=2)], ...] = ()

    def check_values(self) -> None:
        super().check_values()
        if len(set(self.tokens)) < len(self.tokens) or len(self.tokens) == 1:
            raise InvalidConfig(
                f"{type(self).__name__}'s tokens are at least two different numbers, or none, got {self.tokens!r}"
            )

    def shapes(self, call: PieceCall) -> tuple[Shapes, ...]:
        """Give the shapes that an engine for a call takes: one a stage that it serves, or the call's own."""
        own = tuple(tuple(tensor.shape) for tensor in call.tensors)
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

    def requirement(self, blocks: Sequence[nn.Module], stages: int) -> Requirement:
        return super().requirement(blocks, 1 if self.tokens else stages)

    def key(self, call: PieceCall, *, structure: str | None = None, weights: str | None = None) -> EngineKey:
        key = super().key(call, structure=structure, weights=weights)
        shapes = self.shapes(call)
        if len(shapes) == 1:
            return key
        first = iter(shapes[0])
        at_first = call.mapped(lambda tensor: tensor.new_empty(()).expand(next(first)))
        return dataclasses.replace(key, arguments=outline_of((at_first.args, at_first.kwargs)), stage=None)


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
def following_tokens(call: PieceCall, shapes: tuple[Shapes, ...]) -> Iterator[PieceCall]:
    """Give a call as Dynamo, which traces inside, should take it: with a variable for each dimension that differs.

    Dimensions that happen to be of one size stay apart: image tokens may be as many as a token is wide, at one stage.
    """
    if len(shapes) == 1:
        yield call
        return
    marks = iter(_varying(shapes))

    def marked(tensor: torch.Tensor) -> torch.Tensor:
        alias = tensor.detach()  # marks are attributes, and the caller's tensors get none
        for axis in next(marks):
            torch._dynamo.mark_dynamic(alias, axis)
        return alias

    tracing: Any = torch.fx.experimental._config
    with tracing.patch(use_duck_shape=False):
        yield call.mapped(marked)


def exported(call: PieceCall, shapes: tuple[Shapes, ...]) -> ExportedProgram:
    """Export a piece as one program for all of `shapes`. Raises `UnsupportedModel` where it takes but one of them."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    varying = _varying(shapes)
    dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in varying)
    tensors = tuple(call.tensors)
    with switching(), unheard_warnings():  # the exporter's remarks on itself
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
