"""Configurations as data: a registry of types that JSON may name, and checks of fields."""

from __future__ import annotations

import dataclasses
import math
from importlib.metadata import entry_points
from typing import Any, TypeVar

from fastdit.errors import InvalidConfig

_REGISTRY: dict[str, type[Any]] = {}


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

    for public in fastdit.__all__:
        getattr(fastdit, public)
    entry = None if name in _REGISTRY else next(iter(entry_points(group="fastdit.accelerators", name=name)), None)
    if entry is not None:
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise InvalidConfig(
                f"{name!r} belongs to {entry.value}, an installed adapter that can't be imported: {error}"
            ) from error


def encode(value: Any) -> Any:
    """Turn a registered configuration into plain JSON data, nested configurations included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if name not in _REGISTRY:
            raise InvalidConfig(f"{name} is not a registered configuration; decorate its class with @register")
        return {"type": name, **{f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(data: Any, where: str = "stack") -> Any:
    """Rebuild what `encode` wrote. Raises `InvalidConfig` for a type, a field or a value that is not allowed."""
    if isinstance(data, list):
        return tuple(decode(item, f"{where}[{index}]") for index, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    fields = dict(data)
    name = fields.pop("type", None)
    if isinstance(name, str) and name not in _REGISTRY:
        _load_type(name)
    if not isinstance(name, str) or name not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        raise InvalidConfig(
            f"{where}: unknown type {name!r}; the allowed types are {known}, and those of adapters once installed"
        )
    cls = _REGISTRY[name]
    allowed = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - allowed):
        raise InvalidConfig(f"{where}: {name} has no field {', '.join(unknown)}; its fields are {sorted(allowed)}")
    arguments = {key: decode(value, f"{where}.{key}") for key, value in fields.items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InvalidConfig(f"{where}: {name} can't be built from {sorted(arguments)}: {error}") from error


def is_number(value: Any) -> bool:
    """Whether a configuration's value is a finite real number (True and False are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a configuration's value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
