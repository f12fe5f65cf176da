"""Results of several measurements made one: pictures of one, seconds of another, beside whichever baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastdit.measure.results import ConfigurationResult, Results, ResultsError

#: Metrics that compare a picture with the baseline's.
_LIKENESS = ("psnr", "ssim")


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
