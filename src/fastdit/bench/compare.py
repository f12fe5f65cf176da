"""Two measurements of one experiment: which rows became faster, slower, or were not shown to be either.

Whether a row differs is decided by a permutation test, which keeps its promise at any count of rounds: where nothing
changed, at most 5 of 100 comparisons say otherwise. How much is the ratio of medians, with a bootstrap interval. What
differs by less than the tolerance is left alone: a process has a speed of its own by a hundredth or so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from fastdit.bench.experiment import FEWEST_ROUNDS
from fastdit.bench.store import BenchError, Store
from fastdit.measure.statistics import CONFIDENCE, RESAMPLES, Interval

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """What became of a row: `time` and `memory` are the later run's over the earlier one's."""

    group: str
    row: str
    time: Interval | None
    memory: float | None
    verdict: str

    @property
    def worse(self) -> bool:
        return self.verdict in ("slower", "more memory", "failed")


def changes(before: Store, after: Store, *, time: float = 0.02, memory: float = 0.01) -> list[Change]:
    """Compare every row that both stores have; `time` and `memory` are what is tolerated, as parts.

    Raises `BenchError` where the two are not of one experiment.
    """
    experiment = before.experiment()
    if after.experiment().to_json() != experiment.to_json():
        raise BenchError(f"{before.directory} and {after.directory} hold different experiments; compare runs of one")
    found = []
    for group in experiment.groups():
        for row in experiment.rows(group):
            broke = (after.prepared(group, row) or {}).get("error") is not None
            old, new = before.cells(group, row), after.cells(group, row)
            seconds = [cell.seconds for cell in new], [cell.seconds for cell in old]
            enough = min(len(old), len(new)) >= FEWEST_ROUNDS
            ratio = ratio_of_separate_medians(*seconds) if enough else None
            peaks = [max((cell.bytes or 0 for cell in cells), default=0) for cells in (old, new)]
            grown = peaks[1] / peaks[0] if all(peaks) else None
            if ratio is None:
                verdict = "failed" if broke and old else "too few rounds"
            elif differs(*seconds) and _beyond(ratio, time):
                verdict = "slower" if ratio.estimate > 1 else "faster"
            else:
                verdict = "more memory" if grown is not None and grown > 1 + memory else "not shown"
            found.append(Change(group.title, row.name, ratio, grown, verdict))
    return found


def _beyond(ratio: Interval, tolerance: float) -> bool:
    return not 1 / (1 + tolerance) <= ratio.estimate <= 1 + tolerance


def differs(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> bool:
    """Whether two samples of seconds differ in their medians, at the level of 5 %, by a permutation test."""
    pooled = np.log(np.asarray([*first, *second], dtype=np.float64))
    seen = abs(median(np.log(first)) - median(np.log(second)))
    orders = np.random.default_rng(seed).random((RESAMPLES, pooled.size)).argsort(axis=-1)
    shuffled = pooled[orders]
    apart = np.abs(np.median(shuffled[:, : len(first)], axis=-1) - np.median(shuffled[:, len(first) :], axis=-1))
    # The order that was seen is one of them, so that the level holds exactly.
    return bool((np.count_nonzero(apart >= seen - 1e-12) + 1) / (RESAMPLES + 1) <= 1 - CONFIDENCE)


def ratio_of_separate_medians(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Interval:
    """Median over median of two runs that had no rounds together, each resampled by itself."""
    generator = np.random.default_rng(seed)

    def medians(values: Sequence[float]) -> Array:
        array = np.asarray(values, dtype=np.float64)
        drawn: Array = np.median(array[generator.integers(array.size, size=(RESAMPLES, array.size))], axis=-1)
        return drawn

    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians(numerator) / medians(denominator), (tail, 1 - tail))
    return Interval(median(numerator) / median(denominator), float(low), float(high))


def lines(found: Sequence[Change]) -> Iterator[str]:
    """Say each change in a line."""
    for change in found:
        time = "" if change.time is None else f": {change.time:.3f} of the time before"
        memory = "" if change.memory is None else f", {change.memory:.3f} of the memory"
        yield f"{change.verdict:14} {change.group}, {change.row}{time}{memory}"
