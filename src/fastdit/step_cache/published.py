"""Numbers measured on models: the tables that ship with the library and the files that a user saved.

An entry of a table has the fields of its class and `models`, the names of those that it is the default of.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from fastdit.config import Config, parsed
from fastdit.errors import InvalidConfig

Entry = dict[str, Any]
_Self = TypeVar("_Self", bound="Measured")


@dataclasses.dataclass(frozen=True)
class Measured(Config):
    """Base of what was measured on a model: it can be saved, loaded, and looked up by its own name or the model's."""

    #: The file beside this one, what it holds, and which function measures it.
    table: ClassVar[str]
    what: ClassVar[str]
    measured_by: ClassVar[str]
    #: Fields that files of earlier releases lack.
    absent: ClassVar[Mapping[str, object]] = {}

    def save(self, path: str | Path) -> None:
        """Write the numbers with their provenance as JSON: whole or not at all."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls: type[_Self], path: str | Path) -> _Self:
        """Read what `save` wrote. Raises `InvalidConfig` for anything else."""
        data = parsed(Path(path), f"{cls.__name__}.save")
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or {*cls.absent, *data} != names:
            raise InvalidConfig(f"{path} does not hold {cls.what}: expected the fields {sorted(names)}")
        return cls(**{**cls.absent, **data})

    @classmethod
    def named(cls: type[_Self], name: str) -> _Self:
        """Get a published entry by its name. Raises `InvalidConfig` for an unknown one."""
        if name not in entries(cls.table):
            published = ", ".join(entries(cls.table))
            raise InvalidConfig(f"no {cls.what} are named {name!r}; the published ones are {published}")
        return cls(**{key: value for key, value in entries(cls.table)[name].items() if key != "models"})

    @classmethod
    def for_model(cls: type[_Self], transformer: nn.Module) -> _Self:
        """Find the entry that was measured on this very model, by the name it was loaded under.

        Raises `InvalidConfig` where there is none: another model's numbers are never used unasked.
        """
        source = source_of(transformer)
        parts = source.replace("\\", "/").lower().split("/")
        for name, found in entries(cls.table).items():
            if any(model.lower() in parts for model in found["models"]):
                return cls.named(name)
        raise InvalidConfig(
            f"there are no {cls.what} for {type(transformer).__name__} loaded as {source or 'an unnamed model'}; "
            f"measure them with fastdit.measure.calibration.{cls.measured_by}(pipe, prompts), or name a published one "
            f"({', '.join(entries(cls.table))}) if this model is a fine-tune of that one"
        )


@lru_cache(maxsize=8)
def entries(table: str) -> dict[str, Entry]:
    """Read a table of published entries by name."""
    published: dict[str, Entry] = json.loads(resources.files(__package__).joinpath(table).read_text(encoding="utf-8"))
    return published


def source_of(transformer: object) -> str:
    """Give the name or path that a model was loaded under; empty where it has none."""
    config = getattr(transformer, "config", {})
    return str(config.get("_name_or_path", "") or "") if hasattr(config, "get") else ""
