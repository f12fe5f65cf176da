"""What a gate's signal asks of a block's parts is not asked twice: the block, if it runs, is answered from it.

A modulated signal is the block's own norm of the block's own arguments, and a block that is computed calls that norm
again. An answer is given only for the very arguments (the same objects) that it was noted for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdit.blocks.ports import versions_of
from fastdit.errors import IncompatibleStack
from fastdit.nested import Args, Kwargs, Value, tensors_of
from fastdit.structure import behaves_otherwise


class WatchedBlock:
    """Shows a signal the parts of a block, and notes what they give it. `original` is the block itself."""

    __slots__ = ("_answers", "original")

    def __init__(self, block: nn.Module) -> None:
        self.original = block
        self._answers: dict[str, _Answers] = {}

    def __getattr__(self, name: str) -> Value:
        part = getattr(self.original, name)
        if not isinstance(part, nn.Module):
            return part
        return self._answers.setdefault(name, _Answers(part))

    def answers(self) -> Kwargs | None:
        """Give the parts that answer what they were asked before, in the place of the block's own.

        None where there are none, or where the block's object carries behaviour of its own, such as hooks.
        """
        noted = {name: part for name, part in self._answers.items() if part.noted}
        if not noted or behaves_otherwise(self.original):
            return None
        for part in noted.values():
            part.replays = True
        return noted

    def check(self) -> None:
        """Raise `IncompatibleStack` where the block wrote into an answer, which the gate still needs."""
        for name, part in self._answers.items():
            if part.replays and part.written:
                raise IncompatibleStack(
                    f"{type(self.original).__name__} writes in place into what its {name} gives, and the cache's "
                    "signal is made of that; use kernels that don't, or a cache without a modulated signal"
                )


class _Answers:
    """A part of a block: notes its calls, and once it `replays`, answers equal ones."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self.noted: list[tuple[Args, Kwargs, Any]] = []
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []
        self.replays = False

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        if self.replays:
            for noted_args, noted_kwargs, output in self.noted:
                given, noted = (*args, *kwargs.values()), (*noted_args, *noted_kwargs.values())
                if [*kwargs] == [*noted_kwargs] and [*map(id, given)] == [*map(id, noted)]:  # the very same objects
                    return output
            return self._part(*args, **kwargs)
        output = self._part(*args, **kwargs)
        tensors = tensors_of(output)
        for tensor in tensors:
            if tensor.is_inference():  # it doesn't count what is written to it
                return output
        self.noted.append((args, kwargs, output))
        self._tensors += tensors
        self._versions += versions_of(tensors)
        return output

    def __getattr__(self, name: str) -> Value:
        return getattr(self._part, name)

    @property
    def written(self) -> bool:
        """Whether something was written into an answer since it was given."""
        return versions_of(self._tensors) != self._versions
