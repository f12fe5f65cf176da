"""An experiment as a TOML file, checked as a whole before anything is loaded; errors name the file and the line.

pipelines = ["mini", { name = "mini:sd3", dtype = "bfloat16" }]
sizes = [256, [256, 512]]
prompts = ["an apple", "two boats"]     # or the name of a file with a prompt a line

[stacks]
cache = "TeaCache .25"
both = "ProgressiveResolution 4x, TeaCache .25"
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdit.bench.experiment import Experiment
from fastdit.bench.grammar import nearest, parse_stack
from fastdit.bench.source import Source
from fastdit.errors import FastditError, InvalidConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same, before it was Python's own

_KEYS = [field.name for field in fields(Experiment)]


def read_experiment(path: Path) -> Experiment:
    """Read an experiment. Raises `InvalidConfig`, with the file and the line, for whatever is wrong in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: can't be read: {error}") from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise InvalidConfig(f"{path}:{line[1] if line else '?'}: no TOML: {error}") from error
    file = _File(path, text)
    for key in data:
        if key not in _KEYS:
            raise file.error(f"there is no {key!r}{nearest(key, _KEYS)}", key)
    made: dict[str, Any] = dict(data)
    made["pipelines"] = tuple(file.each("pipelines", data.get("pipelines"), _source))
    made["stacks"] = dict(file.stacks(data.get("stacks")))
    made["prompts"] = tuple(file.prompts(data.get("prompts")))
    if "sizes" in data:
        made["sizes"] = tuple(file.each("sizes", data["sizes"], _size))
    try:
        return Experiment(**made)
    except FastditError as error:
        told = str(error)
        key = next((key for key in data if re.search(rf"\b{key}\b", told)), None)
        named = next((name for name in made["stacks"] if told.startswith(f"{name} ")), None)
        raise file.error(told, named or key or "") from error


class _File:
    """The text that an error's line is found in."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines = path, text.splitlines()

    def error(self, told: str, *words: str) -> InvalidConfig:
        """Give an error at the line where the words are found, each at or after the one before."""
        place = 0
        for word in words:
            found = [index for index in range(place, len(self.lines)) if word and word in self.lines[index]]
            place = found[0] if found else place
        return InvalidConfig(f"{self.path}:{place + 1}: {told}")

    def each(self, key: str, given: Any, make: Any) -> Iterator[Any]:
        """Make something of every item of a list."""
        if not isinstance(given, list) or not given:
            raise self.error(f"{key} is a list of at least one, got {given!r}", key)
        for item in given:
            yield self._made(key, item, make)

    def _made(self, key: str, item: Any, make: Any) -> Any:
        try:
            return make(item)
        except (FastditError, TypeError) as error:
            word = item.get("name", "") if isinstance(item, dict) else str(item)
            raise self.error(f"{key}: {error}", key, str(word)) from error

    def stacks(self, given: Any) -> Iterator[tuple[str, Any]]:
        """Read the stacks, which are a table of names, or a list of texts that are their own names."""
        named = {text: text for text in given} if isinstance(given, list) else given
        if not isinstance(named, dict) or not named:
            raise self.error(f"stacks are a table of names and texts, or a list of texts, got {given!r}", "stacks")
        for name, text in named.items():
            if not isinstance(text, str):
                raise self.error(f"the stack {name!r} is a text, such as 'TeaCache .25', got {text!r}", "stacks", name)
            try:
                yield name, parse_stack(text)
            except FastditError as error:
                raise self.error(f"the stack {name!r}: {error}", "stacks", name) from error

    def prompts(self, given: Any) -> list[str]:
        """Read the prompts, which are a list, or the name of a file beside this one that has one a line."""
        if isinstance(given, str):
            try:
                given = (self.path.parent / given).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise self.error(f"prompts: {given} can't be read: {error}", "prompts") from error
            given = [line.strip() for line in given if line.strip()]
        return list(self.each("prompts", given, _prompt))


def _source(item: Any) -> Source:
    known = [field.name for field in fields(Source)]
    if isinstance(item, dict):
        for key in item:
            if key not in known:
                raise InvalidConfig(f"a pipeline has no {key!r}{nearest(key, known)}")
        return Source(**item)
    return Source(item)


def _size(item: Any) -> tuple[int, ...]:
    if isinstance(item, int):
        return item, item
    if not isinstance(item, list):
        raise InvalidConfig(f"a size is a number of pixels, or [height, width], got {item!r}")
    return tuple(item)


def _prompt(item: Any) -> str:
    if not isinstance(item, str) or not item.strip():
        raise InvalidConfig(f"a prompt is a text that is not empty, got {item!r}")
    return item
