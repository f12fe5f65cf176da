"""Walks over nested arguments: the tensors in tuples, lists and dictionaries, and the names of a call's arguments."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from fastdit.errors import UnsupportedModel

#: What modules take and give: tensors, alone or nested in tuples, lists and dictionaries, beside plain values.
Value: TypeAlias = Any

#: The arguments of a call, by place and by name.
Args: TypeAlias = tuple[Value, ...]
Kwargs: TypeAlias = dict[str, Value]


def map_tensors(
    value: Any, function: Callable[[Any], Any], kind: type[Any] | tuple[type[Any], ...] = torch.Tensor
) -> Value:
    """Apply `function` to every tensor (or other `kind`) in nested tuples, lists and dictionaries."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function, kind) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function, kind) for key, item in value.items()}
    return value


def tensors_of(value: Value) -> list[torch.Tensor]:
    """List the tensors in nested tuples, lists and dictionaries, in order."""
    found: list[torch.Tensor] = []
    waiting = [value]
    while waiting:  # a walk without calls, since it is taken at every step
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            waiting.extend(reversed(item))
        elif isinstance(item, Mapping):
            waiting.extend(reversed([*item.values()]))
    return found


def same_value(first: Value, second: Value) -> bool:
    """Whether two values are one object, or tensors of equal values, which are read only where they are not."""
    tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    return first is second or (tensors and torch.equal(first, second))


class PerImage:
    """A value that is no tensor and holds something of each image of a batch."""

    def rows(self, index: torch.Tensor) -> PerImage:
        """Give the value for the images at `index` [K]."""
        raise NotImplementedError


def select_rows(value: Value, index: torch.Tensor, batch: int, axis: int = 0) -> Value:
    """Pick the images at `index` [K] in every tensor whose dimension `axis` is the batch; the rest is shared by all."""

    def pick(item: Value) -> Value:
        if isinstance(item, PerImage):
            return item.rows(index)
        return item.index_select(axis, index) if item.dim() > axis and item.shape[axis] == batch else item

    return map_tensors(value, pick, kind=(torch.Tensor, PerImage))


class Hole:
    """Where a tensor was in an output that is kept without its tensors."""


def refilled(value: Value, fillings: Iterator[Value]) -> Value:
    """Give a forward's output with the next of `fillings` in the place of each tensor, or of each `Hole`."""
    if isinstance(value, (torch.Tensor, Hole)):
        return next(fillings)
    if isinstance(value, (tuple, list)):
        return type(value)([refilled(item, fillings) for item in value])
    if isinstance(value, Mapping):
        filled: Any = copy.copy(value)
        for name, item in value.items():
            filled[name] = refilled(item, fillings)
        return filled
    return value


class ArgumentNames:
    """Names the arguments of a forward's calls, without its `self` and in its own order.

    `defaults` adds what a call leaves out, for whoever only reads the arguments. Calls that give everything by keyword,
    as pipelines do, are not bound.
    """

    def __init__(self, forward: Callable[..., Any], *, defaults: bool = False) -> None:
        self._signature = inspect.signature(forward)
        self._defaults = defaults
        own = list(self._signature.parameters.values())[1:]
        named = [p for p in own if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)]
        self._given = {p.name: p.default for p in named}
        self._required = {p.name for p in named if p.default is inspect.Parameter.empty}
        self._takes_any = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in self._signature.parameters.values())
        self._places = sum(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in named)

    def __call__(self, args: Args, kwargs: Mapping[str, Value]) -> Kwargs:
        """Give a call's arguments by name. Raises `TypeError` where the forward itself would.

        Raises `UnsupportedModel` for arguments by place that the forward has no names for, and could not be called with
        again.
        """
        if self._takes_any and not self._defaults and len(args) > self._places:
            raise UnsupportedModel(
                f"a forward{self._signature} has no names for {len(args)} arguments by place; give them by name"
            )
        if not args and self._required <= kwargs.keys() <= self._given.keys():
            if self._defaults:
                return {**self._given, **kwargs}
            return {name: kwargs[name] for name in self._given if name in kwargs}
        bound = self._signature.bind(None, *args, **kwargs)
        if self._defaults:
            bound.apply_defaults()
        return dict(list(named_arguments(bound).items())[1:])


def named_arguments(bound: inspect.BoundArguments) -> Kwargs:
    """Give a call's arguments by name, those that a `**kwargs` took among them."""
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def replaced(
    signature: inspect.Signature, args: Args, kwargs: Mapping[str, Value], name: str, value: Value
) -> tuple[Args, Kwargs]:
    """Give a method's arguments, its `self` left out, with another value of one, which stays by place or by name."""
    place = list(signature.parameters).index(name) - 1
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), dict(kwargs)
    return args, {**kwargs, name: value}


def call_signature(cls: type) -> inspect.Signature:
    """Give the whole signature of a class's `__call__`: where it has `*args` or `**kwargs`, with what is behind them.

    A class that hands arguments on is taken to give them to the next one in its line, in the order of their places. A
    parameter that both name is the first one's.
    """
    # What is kept of a twin's class would keep the twin.
    return _whole(*(inspect.unwrap(vars(one)["__call__"]) for one in cls.__mro__ if "__call__" in vars(one)))


@lru_cache(maxsize=64)
def _whole(own: Callable[..., Any], *behind: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(own)
    return _joined(signature, _whole(*behind)) if behind else signature


def _joined(own: inspect.Signature, behind: inspect.Signature) -> inspect.Signature:
    kinds = inspect.Parameter
    parameters = list(own.parameters.values())
    handed = {parameter.kind for parameter in parameters} & {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}
    placed = [one for one in parameters if one.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    taken = {one.name: one for one in placed}
    for place, one in enumerate(behind.parameters.values()):
        if one.name in taken or one.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            continue
        known = own.parameters.get(one.name, one)
        if kinds.VAR_POSITIONAL in handed and place >= len(placed) and one.kind is not kinds.KEYWORD_ONLY:
            taken[one.name] = known.replace(kind=one.kind)
        elif kinds.VAR_KEYWORD in handed:
            taken[one.name] = known.replace(kind=kinds.KEYWORD_ONLY)
    joined = {**taken, **{one.name: one for one in parameters if one.name not in taken}}
    return inspect.Signature(sorted(joined.values(), key=lambda one: one.kind))
