"""Results of a measurement as one JSON file: schema-versioned, raw samples kept, readable without this library."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fastdit.errors import FastditError
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import Interval, mean_difference, ratio_of_medians

#: What a JSON object holds.
JsonObject = dict[str, Any]

SCHEMA_VERSION = 1

_LESS_TIME = 0.03  # medians of the same work differ by this much from run to run on a busy machine
_MORE_TIME = 0.10  # a rival that gets more time than this is none


class ResultsError(FastditError, ValueError):
    """The data is no set of results, or none that this version can read."""


@dataclass(frozen=True)
class Metric:
    """One measured quantity with its interval and the raw samples under it.

    A quantity of a whole set of pictures has one value for each of some groups of them for samples, or none.
    """

    interval: Interval
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class ConfigurationResult:
    """All that was measured of one configuration; `seconds` and `flops` hold one value a round, in rounds' order.

    Where FLOPs can't be counted there are none. Where the clock ran apart from the pictures, `seconds` are of its own
    rounds. `stack` is the accelerators' own JSON, None for the untouched pipeline. `records` holds the run records of
    the first rounds, `images` the names of the pictures saved beside the file.
    """

    name: str
    stack: JsonObject | None
    call: JsonObject
    seconds: tuple[float, ...]
    flops: tuple[int, ...]
    metrics: dict[str, Metric] = field(default_factory=dict)
    records: tuple[JsonObject, ...] = ()
    images: tuple[str, ...] = ()

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


@lru_cache(maxsize=4096)
def _ratio(numerator: tuple[float, ...], denominator: tuple[float, ...]) -> Interval:
    """A page asks for each row's several times, and every answer is made of thousands of samples."""
    return ratio_of_medians(numerator, denominator)


@dataclass(frozen=True)
class Results:
    """One measurement: where it ran, how, and what came out; speed-ups are against the configuration `baseline`."""

    title: str
    baseline: str
    environment: Environment
    settings: JsonObject
    prompts: tuple[str, ...]
    images_per_round: int
    configurations: tuple[ConfigurationResult, ...]
    created: str
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        names = [configuration.name for configuration in self.configurations]
        if len(set(names)) != len(names) or self.baseline not in names:
            raise ResultsError(
                f"configurations need distinct names, the baseline {self.baseline!r} among them; got {names}"
            )

    def __getitem__(self, name: str) -> ConfigurationResult:
        for configuration in self.configurations:
            if configuration.name == name:
                return configuration
        raise ResultsError(f"no row is called {name!r}; there are {', '.join(c.name for c in self.configurations)}")

    def speed_up(self, name: str) -> Interval:
        """How many times faster than the baseline: ratio of median seconds, rounds paired."""
        return _ratio(tuple(self[self.baseline].seconds), tuple(self[name].seconds))

    def rival(self, name: str) -> str | None:
        """The fastest plain configuration that takes as long as an accelerated one, or at most a tenth longer."""
        if self[name].stack is None:
            return None
        least, most = (self[name].median_seconds * factor for factor in (1 - _LESS_TIME, 1 + _MORE_TIME))
        plain = [entry for entry in self.configurations if entry.stack is None]
        rivals = [entry for entry in plain if least <= entry.median_seconds <= most]
        return min(rivals, key=lambda entry: entry.median_seconds).name if rivals else None

    def advantage(self, name: str, rival: str | None, metric: str) -> Interval | None:
        """How much higher a metric is than the rival's, its samples paired; None where either lacks them."""
        pair = [self[one].metrics[metric].samples for one in (name, rival) if one and metric in self[one].metrics]
        return mean_difference(*pair) if len(pair) == 2 and all(pair) else None

    def flops_ratio(self, name: str) -> float | None:
        """How many times fewer FLOPs of the transformer than the baseline, on average; None where none were counted."""
        pair = self[self.baseline].flops, self[name].flops
        return fmean(pair[0]) / fmean(pair[1]) if all(pair) else None

    def to_json(self) -> JsonObject:
        """Plain JSON values; speed-ups and FLOPs ratios, which follow from the samples, are added for other readers."""
        derived = {
            entry.name: {
                "median_seconds": entry.median_seconds,
                "speed_up": asdict(self.speed_up(entry.name)),
                "flops_ratio": self.flops_ratio(entry.name),
            }
            for entry in self.configurations
        }
        return {**asdict(self), "derived": derived}

    def dumps(self) -> str:
        """The results as JSON text; a number that JSON can't hold (NaN, infinity) is refused."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        path.write_text(self.dumps() + "\n", encoding="utf-8")
