"""Two measurements of one experiment: which rows became faster, slower, or were not shown to be either.

A machine has no speed of its own: between two runs of the same work it may change by more than what is looked for, and
nothing in a run tells by how much. So a row's time is taken over the plain pipeline's of the same round, which had the
same machine, and the plain pipeline's own change is told and not judged. `absolute` compares seconds as they are.

Whether a row differs is decided by a permutation test, which keeps its promise at any count of rounds: where nothing
changed, at most 5 of 100 comparisons say otherwise. How much is the ratio of medians, with a bootstrap interval, which
must not hold 1 either. What differs by less than the tolerance is left alone: a process has a speed of its own by a
hundredth or so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from fastdit.bench.experiment import FEWEST_ROUNDS
from fastdit.bench.store import BenchError, Cell, Store
from fastdit.measure.statistics import CONFIDENCE, RESAMPLES, Interval

Array = npt.NDArray[np.float64]

#: How far the plain pipeline's own time may have changed, as a part, for two runs to be of machines alike.
ALIKE = 0.25


@dataclass(frozen=True)
class Change:
    """What became of a row: `time` and `memory` are the later run's over the earlier one's.

    `verdict` is "faster", "slower", "more memory", "not shown", "failed", "too few rounds", or "reference" for the
    plain pipeline's row, by whose times the others are measured.
    """

    group: str
    row: str
    time: Interval | None
    memory: float | None
    verdict: str

    @property
    def worse(self) -> bool:
        return self.verdict in ("slower", "more memory", "failed")


def changes(
    before: Store, after: Store, *, time: float = 0.02, memory: float = 0.01, absolute: bool = False
) -> list[Change]:
    """Compare every row that both stores have; `time` and `memory` are what is tolerated, as parts.

    `absolute` compares seconds and not what they are of the plain pipeline's, for machines that are always as fast.
    Raises `BenchError` where the two are not of one experiment.
    """
    experiment = before.experiment()
    if after.experiment().to_json() != experiment.to_json():
        raise BenchError(f"{before.directory} and {after.directory} hold different experiments; compare runs of one")
    found = []
    for group in experiment.groups():
        plain, *_ = rows = experiment.rows(group)
        for row in rows:
            judged = absolute or row is not plain
            broke = (after.prepared(group, row) or {}).get("error") is not None
            old, new = before.cells(group, row), after.cells(group, row)
            if absolute or row is plain:
                times = [[cell.seconds for cell in cells] for cells in (new, old)]
            else:
                times = [_over(new, after.cells(group, plain)), _over(old, before.cells(group, plain))]
            ratio = ratio_of_separate_medians(*times) if min(map(len, times)) >= FEWEST_ROUNDS else None
            peaks = [max((cell.bytes or 0 for cell in cells), default=0) for cells in (old, new)]
            grown = peaks[1] / peaks[0] if all(peaks) else None
            if ratio is None:
                verdict = "failed" if broke and old else "too few rounds"
            elif judged and _beyond(ratio, time) and _shown(ratio) and differs(*times):
                verdict = "slower" if ratio.estimate > 1 else "faster"
            elif grown is not None and grown > 1 + memory:
                verdict = "more memory"
            else:
                verdict = "not shown" if judged else "reference"
            found.append(Change(group.title, row.name, ratio, grown, verdict))
    return found


def remarks(found: Sequence[Change]) -> Iterator[str]:
    """Say what a reader must know of the machine, and in a word what came of it all."""
    for change in found:
        if change.verdict == "reference" and change.time is not None and _beyond(change.time, ALIKE):
            yield (
                f"{change.group}: the plain pipeline took {change.time.estimate:.2f} of its time before, so one of the "
                "runs was on another machine, or on a busy one; what is said of the other rows may not hold on either"
            )
    worse = [change for change in found if change.worse]
    yield f"{len(worse)} of {len(found)} rows became worse" if worse else "nothing was shown to be worse"


def _over(cells: Sequence[Cell], plain: Sequence[Cell]) -> list[float]:
    """Give each round's seconds over the plain pipeline's, where there are both."""
    beside = {cell.number: cell.seconds for cell in plain}
    return [cell.seconds / beside[cell.number] for cell in cells if cell.number in beside]


def _shown(ratio: Interval) -> bool:
    return not ratio.low <= 1.0 <= ratio.high


def _beyond(ratio: Interval, tolerance: float) -> bool:
    return not 1 / (1 + tolerance) <= ratio.estimate <= 1 + tolerance


def differs(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> bool:
    """Whether two samples of times differ in their medians, at the level of 5 %, by a permutation test."""
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
        if change.verdict == "reference":
            time += ", by which the others' times are measured"
        memory = "" if change.memory is None else f", {change.memory:.3f} of the memory"
        yield f"{change.verdict:14} {change.group}, {change.row}{time}{memory}"
