"""Configurations as data: a registry of types that JSON may name, and fields whose annotation is their check.

@register
@dataclasses.dataclass(frozen=True)
class Mine(Config):
    threshold: AtLeastZero = 0.25
    mode: Literal["fast", "exact"] = "fast"
    rounds: Annotated[int, Range(at_least=1, at_most=8)] | None = None
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Iterator, Sized
from importlib.metadata import entry_points
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from fastdit.errors import InvalidConfig

_REGISTRY: dict[str, type[Any]] = {}

#: How many characters of a wrong value a message shows.
_LONGEST_SHOWN = 200


_Type = TypeVar("_Type", bound=type[Any])


def register(cls: _Type) -> _Type:
    """Allow a configuration class to be named in a stack's JSON. Raises `InvalidConfig` for a name already taken."""
    if _REGISTRY.get(cls.__name__, cls) is not cls:
        raise InvalidConfig(f"the configuration name {cls.__name__!r} is already registered; rename the new class")
    _REGISTRY[cls.__name__] = cls
    return cls


def _load_type(name: str) -> None:
    """Import what may register a configuration of this name: the library's own, then an installed adapter's.

    An adapter names its classes as entry points of the group `fastdit.accelerators`; only the one asked for is loaded.
    """
    import fastdit

    for public in dir(fastdit):
        getattr(fastdit, public)
    entry = None if name in _REGISTRY else next(iter(entry_points(group="fastdit.accelerators", name=name)), None)
    if entry is not None:
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise InvalidConfig(
                f"{name!r} belongs to {entry.value}, an installed adapter that can't be imported: {error}"
            ) from error


#: The key in a field's metadata that keeps it out of JSON: what it says holds for this machine alone.
LOCAL = "local"


def _saved_fields(cls: type[Any]) -> list[str]:
    """List the fields that JSON holds; one that no caller gives is derived from the others."""
    return [field.name for field in dataclasses.fields(cls) if field.init and not field.metadata.get(LOCAL)]


def find_type(name: str) -> type[Any] | None:
    """Find a configuration by its name: one of the library's own, or of an installed adapter."""
    if name not in _REGISTRY:
        _load_type(name)
    return _REGISTRY.get(name)


def known_types() -> list[str]:
    """Name every configuration that has been registered so far."""
    return sorted(_REGISTRY)


def encode(value: Any) -> Any:
    """Turn a registered configuration into plain JSON data, nested configurations included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if name not in _REGISTRY:
            raise InvalidConfig(f"{name} is not a registered configuration; decorate its class with @register")
        return {"type": name, **{field: encode(getattr(value, field)) for field in _saved_fields(type(value))}}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def parsed(path: Path, writer: str) -> Any:
    """Read a file of JSON. Raises `InvalidConfig` where it is none, and says that `writer` writes them."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{path} is not JSON that can be read: {error}; write it with {writer}") from error


def decode(data: Any, where: str = "stack") -> Any:
    """Rebuild what `encode` wrote. Raises `InvalidConfig` for a type, a field or a value that is not allowed."""
    try:
        return _decoded(data, where)
    except RecursionError:
        raise InvalidConfig(f"{where}: what it holds is nested without end; write it with `encode`") from None


def _decoded(data: Any, where: str) -> Any:
    if isinstance(data, list):
        return tuple(_decoded(item, f"{where}[{index}]") for index, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    if not all(isinstance(key, str) for key in data):
        raise InvalidConfig(f"{where}: names of fields are texts, got {shown([*data])}")
    fields = dict(data)
    name = fields.pop("type", None)
    cls = find_type(name) if isinstance(name, str) else None
    if cls is None:
        raise InvalidConfig(
            f"{where}: unknown type {shown(name)}; a class of your own has to be imported first, or named as an entry "
            "point of fastdit.accelerators in a package that is installed, as adapters are; the known ones are "
            f"{', '.join(known_types())}"
        )
    allowed = _saved_fields(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get(LOCAL) and fields.pop(field.name, None) is not None:
            raise InvalidConfig(
                f"{where}: {name}'s {field.name} names a folder of this machine, which data from elsewhere may not; "
                "leave it out of the JSON, and set it in code"
            )
    if unknown := sorted(set(fields) - set(allowed)):
        raise InvalidConfig(f"{where}: {name} has no field {', '.join(unknown)}; its fields are {sorted(allowed)}")
    arguments = {key: _decoded(value, f"{where}.{key}") for key, value in fields.items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InvalidConfig(f"{where}: {name} can't be built from {sorted(arguments)}: {error}") from error


#: An annotation; Python has no type for all of them.
_Annotation: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, or of a sequence's length, for `Annotated`; `above` and `below` are themselves outside.

    >>> str(Range(above=0, at_most=1))
    '> 0 and <= 1'
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float | Sized) -> bool:
        """Whether a number or the length of a sequence is within."""
        number = len(value) if isinstance(value, Sized) else value
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = ((">=", self.at_least), (">", self.above), ("<=", self.at_most), ("<", self.below))
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


Whole = Annotated[int, Range(at_least=0)]
Count = Annotated[int, Range(at_least=1)]
AtLeastZero = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
#: A timestep shift: beyond these, nearly all steps of a run would be taken at one noise level.
Shift = Annotated[float, Range(at_least=0.01, at_most=100)]


class Config:
    """Base of frozen dataclasses whose fields are checked against their annotations when an object is made.

    What one annotation can't say, such as two fields that contradict each other, a class says in `check_values`.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__post_init__" in vars(cls):
            raise TypeError(
                f"{cls.__name__}.__post_init__ would leave its fields unchecked; write check_values instead"
            )

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_values()

    def check_values(self) -> None:
        """Raise `InvalidConfig` where fields, each as annotated, can't go together; derived ones are set here."""


def check_fields(value: Any) -> None:
    """Raise `InvalidConfig` for the first field of a dataclass that is not as annotated.

    A list becomes a tuple, and whole numbers of other libraries Python's own.

    The annotations of the bases hold as well, so a class that annotates a field anew can narrow it and no more.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Mine(Config):
    ...     share: Share = 0.5
    >>> Mine(1.5)
    Traceback (most recent call last):
    fastdit.errors.InvalidConfig: Mine's share is a finite number >= 0 and <= 1, got 1.5
    """
    for name, annotation in _annotations(type(value)):
        given = getattr(value, name)
        if _fits(given, annotation):
            continue
        plain = tuple(map(_plain, given)) if isinstance(given, (list, tuple)) else _plain(given)
        if not _fits(plain, annotation):
            raise InvalidConfig(f"{type(value).__name__}'s {name} is {_described(annotation)}, got {shown(given)}")
        object.__setattr__(value, name, plain)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def shown(value: Any) -> str:
    """Show a value in a message, shortened, whatever it is."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__} that can't be shown"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _annotations(cls: type[Any]) -> Iterator[tuple[str, _Annotation]]:
    """Give the fields of a dataclass with each of their annotations, read where they were written."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for owner in cls.__mro__:
        for name, annotation in inspect.get_annotations(owner).items():
            if name in fields and isinstance(annotation, str):
                annotation = eval(annotation, vars(sys.modules[owner.__module__]))
            if name in fields:
                yield name, annotation


def _fits(value: Any, annotation: _Annotation) -> bool:
    """Whether a value is of an annotated type."""
    origin: _Annotation = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        ranges = [range for range in arguments[1:] if isinstance(range, Range)]
        return _fits(value, arguments[0]) and all(range.holds(value) for range in ranges)
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is tuple and isinstance(value, tuple):
        each = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(each) and all(map(_fits, value, each))
    if annotation in (int, float):
        return is_number(value) and isinstance(value, int if annotation is int else (int, float))
    return annotation is Any or isinstance(value, origin or annotation)


def _described(annotation: _Annotation) -> str:
    """Say in words what an annotation allows."""
    origin: _Annotation = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        ranges = " and ".join(str(range) for range in arguments[1:] if isinstance(range, Range))
        length = " of length" if get_origin(arguments[0]) is tuple else ""
        return _described(arguments[0]) + (f"{length} {ranges}" if ranges else "")
    if origin in (Union, UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return f"a sequence ({', '.join('...' if each is ... else _described(each) for each in arguments)})"
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a text", NoneType: "None"}
    return words.get(annotation) or f"a {getattr(origin or annotation, '__name__', annotation)}"


def is_number(value: Any) -> bool:
    """Whether a configuration's value is a finite real number (True and False are not); whole ones fit in 64 bits."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, float) and math.isfinite(value)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a configuration's value is a whole number of at least `least`."""
    return isinstance(value, int) and is_number(value) and value >= least
