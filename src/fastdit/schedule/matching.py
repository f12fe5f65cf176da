"""NT-matching: the timestep shifts and the restart noise of a multi-stage schedule (RALU, arXiv 2507.08422).

Time t runs from 0 (noise) to 1 (data), sigma = 1 - t. A flow model trained with shift h sees t with the density
f_h(t) = h / (1 + (h - 1) t)^2. A run that restarts each stage at a higher noise level visits some noise levels twice;
the solver picks a shift h_k for each stage and one restart factor Z so that the steps taken are distributed as the
plain schedule's plus the overlaps (least Jensen-Shannon distance between two histograms of t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt

from fastdit.errors import InvalidConfig

_GRID = np.linspace(0.0, 1.0, 1000)
_FLOOR = 1e-10
_SHIFT_BOUNDS = (0.5, 10.0)
_RESTART_BOUNDS = (2.0, 100.0)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Matching:
    """The solved shifts h_k (one a stage), the times at which the later stages start, and the distance reached.

    `restart` is the one factor Z = 1/sqrt(c) behind the starts, None where they were given instead.
    """

    shifts: tuple[float, ...]
    starts: tuple[float, ...]
    restart: float | None
    distance: float


def restart_time(end: float, restart: float) -> float:
    """Give the time s = e / (Z (1 - e) + e) at which the stage after one that ended at time e starts."""
    return end / (restart * (1.0 - end) + end)


def restart_factor(end: float, start: float) -> float:
    """Give Z of a switch from the time `end` back to `start`: the inverse of `restart_time`."""
    return end * (1.0 - start) / (start * (1.0 - end))


def stage_sigmas(start: float, end: float, shift: float, steps: int) -> tuple[float, ...]:
    """Space `steps` + 1 sigmas from 1 - `start` to 1 - `end`, uniform before the shift."""

    def unshift(sigma: float) -> float:
        return sigma / (shift - (shift - 1.0) * sigma)

    uniform = np.linspace(unshift(1.0 - start), unshift(1.0 - end), steps + 1)
    return tuple(float(sigma) for sigma in shift * uniform / (1.0 + (shift - 1.0) * uniform))


def _density(shift: float, start: float = 0.0, end: float = 1.0) -> Array:
    """Tabulate f_h truncated to [start, end] and normalised there."""

    def cumulative(time: float) -> float:
        return shift * time / (1.0 + (shift - 1.0) * time)

    inside = (start <= _GRID) & (end >= _GRID)
    mass = max(cumulative(end) - cumulative(start), _FLOOR)
    return np.where(inside, shift / (1.0 + (shift - 1.0) * _GRID) ** 2, 0.0) / mass


def _distance(
    shifts: Sequence[float] | Array,
    starts: Sequence[float],
    steps: Sequence[int],
    ends: Sequence[float],
    base_shift: float,
) -> float:
    from scipy.spatial.distance import jensenshannon

    target = _density(base_shift)
    for start, end in zip(starts, ends, strict=True):
        target = target + (end - start) * _density(base_shift, start, end)
    taken = np.zeros_like(_GRID)
    for count, shift, start, stop in zip(steps, shifts, [0.0, *starts], [*ends, 1.0], strict=True):
        taken = taken + count * _density(shift, start, stop)
    histograms = [np.clip(histogram, _FLOOR, None) for histogram in (target, taken)]
    return float(jensenshannon(*(histogram / histogram.sum() for histogram in histograms)))


@lru_cache(maxsize=256)
def solve(
    steps: tuple[int, ...],
    ends: tuple[float, ...],
    base_shift: float = 3.0,
    restart: float | None = None,
    starts: tuple[float, ...] | None = None,
) -> Matching:
    """Solve the matching for `steps` per stage and the stages' end times `ends` (the last stage ends at 1).

    With `restart` given, Z is fixed and only the shifts are solved: the objective is nearly flat in Z above 6, so the
    published values are local stops of the optimiser from (3, ..., 3, 2), which this reproduces. With `starts` given,
    the stages after the first start at those times, whatever Z that stands for.
    """
    from scipy.optimize import minimize

    if len(ends) != len(steps) - 1:
        raise InvalidConfig(f"{len(steps)} stages need {len(steps) - 1} end times, got {len(ends)}: {ends}")
    first = [3.0] * len(steps)
    bounds = [_SHIFT_BOUNDS] * len(steps)

    def started(restart: float) -> list[float]:
        return [restart_time(end, restart) for end in ends]

    def with_restart(parameters: Array) -> float:
        *shifts, restart = (float(value) for value in parameters)
        return _distance(shifts, started(restart), steps, ends, base_shift)

    if restart is None and starts is None:
        solution = minimize(with_restart, [*first, 2.0], bounds=[*bounds, _RESTART_BOUNDS])
        *shifts, restart = (float(value) for value in solution.x)
    else:
        fixed = started(restart) if restart is not None else starts
        solution = minimize(_distance, first, args=(fixed, steps, ends, base_shift), bounds=bounds)
        shifts = [float(value) for value in solution.x]
    taken = starts if restart is None else tuple(started(restart))
    return Matching(tuple(shifts), cast(tuple[float, ...], taken), restart, float(solution.fun))
