"""Reading published numbers: the tables that ship with the library and the files that a user saved."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from fastdit.errors import InvalidConfig

Entries = dict[str, dict[str, Any]]


@lru_cache(maxsize=8)
def entries(table: str) -> Entries:
    """Read a table of published entries by name; an entry's `models` are those that it is the default of."""
    published: Entries = json.loads(resources.files(__package__).joinpath(table).read_text(encoding="utf-8"))
    return published


def entry(table: str, name: str, what: str) -> dict[str, Any]:
    """Get a published entry by its name. Raises `InvalidConfig` for an unknown one."""
    if name not in entries(table):
        raise InvalidConfig(f"no {what} are named {name!r}; the published ones are {', '.join(entries(table))}")
    return entries(table)[name]


def source_of(transformer: Any) -> str:
    """Give the name or path that a model was loaded under; empty where it has none."""
    config = getattr(transformer, "config", {})
    return str(config.get("_name_or_path", "") or "") if hasattr(config, "get") else ""


def name_for(table: str, source: str) -> str | None:
    """Find the entry that is the default of the very model loaded from `source`: a whole part of the path matches."""
    parts = source.replace("\\", "/").lower().split("/")
    for name, found in entries(table).items():
        if any(model.lower() in parts for model in found["models"]):
            return name
    return None


def save(value: Any, path: str | Path) -> None:
    """Write a dataclass as JSON: whole or not at all, for it is written beside and then put in place."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(dataclasses.asdict(value), indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(cls: type[Any], path: str | Path, what: str, absent: dict[str, Any]) -> dict[str, Any]:
    """Read the fields that `save` wrote; `absent` fills in fields that older files lack. Raises `InvalidConfig`."""
    try:
        data = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InvalidConfig(f"{path} is not JSON: {error}; write it with {cls.__name__}.save") from error
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(data, dict) or {**absent, **data}.keys() != names:
        raise InvalidConfig(f"{path} does not hold {what}: expected the fields {sorted(names)}")
    return {**absent, **data}
