"""Measurements read back from their files, and several made one: pictures of one, seconds of another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastdit.measure.environment import Environment
from fastdit.measure.results import SCHEMA_VERSION, ConfigurationResult, Metric, Results, ResultsError
from fastdit.measure.statistics import Interval

#: Metrics that compare a picture with the baseline's.
_LIKENESS = ("psnr", "ssim")


def load(path: Path) -> Results:
    """Read what `Results.save` wrote."""
    return from_json(json.loads(path.read_text(encoding="utf-8")))


def from_json(data: Mapping[str, Any]) -> Results:
    """Rebuild what `Results.to_json` gave. Raises `ResultsError` for another schema version and for other fields."""
    found = data.get("schema_version") if isinstance(data, Mapping) else None
    if found != SCHEMA_VERSION:
        raise ResultsError(f"results of schema version {found!r} can't be read; this version reads {SCHEMA_VERSION}")
    values = _checked(Results, {name: value for name, value in data.items() if name != "derived"})
    values["environment"] = Environment(**_checked(Environment, values["environment"]))
    values["configurations"] = tuple(map(_configuration, values["configurations"]))
    return Results(**values)


def _configuration(data: Mapping[str, Any]) -> ConfigurationResult:
    values = _checked(ConfigurationResult, data)
    metrics = {name: _checked(Metric, metric) for name, metric in values["metrics"].items()}
    values["metrics"] = {name: Metric(Interval(**one["interval"]), one["samples"]) for name, one in metrics.items()}
    return ConfigurationResult(**values)


def _checked(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Give a class's fields, lists as the tuples that they were. Raises `ResultsError` for others than it has."""
    expected = {entry.name for entry in fields(cls)}
    if set(data) != expected:
        missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
        raise ResultsError(f"{cls.__name__}: missing {missing}, unknown {unknown}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def with_seconds(results: Results, seconds: Mapping[str, Sequence[float]]) -> Results:
    """The configurations of `seconds`, in its order, timed anew: it holds one value a round, in rounds' order."""
    configurations = tuple(replace(results[name], seconds=tuple(values)) for name, values in seconds.items())
    return replace(results, configurations=configurations)


def with_pictures_of(results: Results, other: Results) -> Results:
    """Results with another measurement's scores of the same prompts, by name; rows that are new come last.

    The seconds of rows that were here stay, and new rows have those of as many rounds. Likeness to another baseline
    is left out. Raises `ResultsError` for other prompts.
    """
    if other.prompts != results.prompts:
        raise ResultsError("pictures can only join those of the same prompts and seed; make all anew")
    alike = other.baseline == results.baseline
    made = {entry.name: entry if alike else _without_likeness(entry) for entry in other.configurations}
    rows = [
        replace(made.pop(entry.name), seconds=entry.seconds) if entry.name in made else entry
        for entry in results.configurations
    ]
    rounds = len(results[results.baseline].seconds)
    fresh = [replace(entry, seconds=entry.seconds[:rounds]) for entry in made.values()]
    return replace(results, configurations=(*rows, *fresh))


def with_baseline(results: Results, name: str) -> Results:
    """Results beside another configuration's; likeness to the pictures of the one before is left out."""
    if name == results.baseline:
        return results
    return replace(results, baseline=name, configurations=tuple(map(_without_likeness, results.configurations)))


def _without_likeness(entry: ConfigurationResult) -> ConfigurationResult:
    kept = {name: metric for name, metric in entry.metrics.items() if name not in _LIKENESS}
    return replace(entry, metrics=kept)
