"""Intervals for what was measured: seeded percentile bootstraps.

Everything is paired: a resample draws rounds (or prompts), never the samples of one configuration by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds it at the given confidence."""

    estimate: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    def __format__(self, spec: str) -> str:
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, ".3g")

    @property
    def spread(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median over median, paired by round: the speed-up, if given the seconds of the baseline and of the candidate."""
    above, below = _paired(numerator, denominator)
    return bootstrap(lambda rows: np.median(above[rows], axis=-1) / np.median(below[rows], axis=-1), above.size)


def median_of_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """The median of each round's own ratio: sharpest for small differences, because drift cancels in every round."""
    above, below = _paired(numerator, denominator)
    return bootstrap(lambda rows: np.median((above / below)[rows], axis=-1), above.size)


def mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean, for example of judge scores."""
    array = _checked(values)
    return bootstrap(lambda rows: array[rows].mean(axis=-1), array.size, seed)


def mean_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of `first - second`, paired by position: far narrower than the difference of two separate means."""
    ahead, behind = _paired(first, second)
    return mean(list(ahead - behind))


def bootstrap(statistic: Callable[[npt.NDArray[np.intp]], Array], count: int, seed: int = 0) -> Interval:
    """Percentile interval; `statistic` maps an array of row numbers to values along its last axis."""
    rows = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(rows), (tail, 1 - tail))
    return Interval(float(statistic(np.arange(count))), float(low), float(high))


def _checked(values: Sequence[float]) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"statistics need at least one finite number; got {values!r}")
    return array


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[Array, Array]:
    one, other = _checked(first), _checked(second)
    if one.size != other.size:
        raise ValueError(f"paired statistics need as many of either; got {one.size} and {other.size}")
    return one, other
