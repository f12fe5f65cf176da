"""NT-matching: the timestep shifts and the restart noise of a multi-stage schedule (RALU, arXiv 2507.08422).

Time t runs from 0 (noise) to 1 (data), sigma = 1 - t. A flow model trained with shift h sees t with the density
f_h(t) = h / (1 + (h - 1) t)^2. A run that restarts each stage at a higher noise level visits some noise levels twice;
the solver picks a shift h_k for each stage and one restart factor Z so that the steps taken are distributed as the
plain schedule's plus the overlaps (least Jensen-Shannon distance between two histograms of t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fastdit.errors import InvalidConfig

_FLOOR = 1e-10
_SHIFT_BOUNDS = (0.5, 10.0)
_RESTART_BOUNDS = (2.0, 100.0)

_FIRST_SHIFT = 3.0
_HALVINGS = 24  # of the range of log Z, by the golden section

#: What the authors' optimiser found for their settings: shifts and Z, by the stages' shares of the steps and their
#: ends. The distance is nearly flat in Z above 6, and it stops where Z is a little below that of the least.
_PUBLISHED: dict[tuple[tuple[int, ...], tuple[float, ...]], tuple[tuple[float, ...], float]] = {
    ((5, 6, 7), (0.30, 0.45)): ((5.01926, 2.589014, 2.226193), 6.316913),
    ((4, 5, 6), (0.30, 0.45)): ((5.115546, 2.642455, 2.25452), 7.522263),
    ((2, 3, 5), (0.20, 0.30)): ((8.140178, 2.855682, 2.192995), 6.261162),
    ((5, 6, 9), (0.20, 0.30)): ((6.120547, 2.236837, 1.972854), 4.131579),
    ((1, 1, 2), (0.25, 0.30)): ((6.401273, 2.601433, 2.273383), 6.258576),
}


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


def _histogram(shift: float | torch.Tensor, start: float, end: float) -> torch.Tensor:
    """Give the share of each of a thousand slices of time under f_h truncated to [start, end]."""
    slices = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64, device="cpu").clamp(min=start).clamp(max=end)
    passed = shift * slices / (1.0 + (shift - 1.0) * slices)
    return passed.diff() / (passed[-1] - passed[0]).clamp(min=_FLOOR)


def _distance(
    shifts: Sequence[float] | Sequence[torch.Tensor],
    starts: Sequence[float],
    steps: Sequence[int],
    ends: Sequence[float],
    base_shift: float,
) -> torch.Tensor:
    """Compare the times that the stages' steps visit with those that they should: a Jensen-Shannon distance."""
    target = _histogram(base_shift, 0.0, 1.0)
    for start, end in zip(starts, ends, strict=True):
        target = target + (end - start) * _histogram(base_shift, start, end)
    taken = torch.zeros_like(target)
    for stage, (count, start, stop) in enumerate(zip(steps, (0.0, *starts), (*ends, 1.0), strict=True)):
        taken = taken + count * _histogram(shifts[stage], start, stop)
    ours, theirs = (histogram.clamp(min=_FLOOR) / histogram.clamp(min=_FLOOR).sum() for histogram in (target, taken))
    middle = (ours + theirs) / 2.0
    divergence = (ours * (ours / middle).log() + theirs * (theirs / middle).log()).sum() / 2.0
    return divergence.sqrt()


def _shifts(starts: Sequence[float], steps: Sequence[int], ends: Sequence[float], base_shift: float) -> list[float]:
    """Find the shifts of the least distance; a logistic map of their range makes the search one without bounds."""
    low, high = _SHIFT_BOUNDS
    with torch.inference_mode(False), torch.enable_grad():
        first = torch.full((len(steps),), (_FIRST_SHIFT - low) / (high - low), dtype=torch.float64, device="cpu")
        place = torch.logit(first).requires_grad_()
        search = torch.optim.LBFGS([place], max_iter=100, tolerance_change=1e-12, line_search_fn="strong_wolfe")

        def evaluated() -> torch.Tensor:
            search.zero_grad()
            distance = _distance(list(low + (high - low) * place.sigmoid()), starts, steps, ends, base_shift)
            distance.backward()
            return distance

        search.step(evaluated)
        found: list[float] = (low + (high - low) * place.sigmoid()).tolist()
        return found


@lru_cache(maxsize=256)
def solve(
    steps: tuple[int, ...],
    ends: tuple[float, ...],
    base_shift: float = 3.0,
    restart: float | None = None,
    starts: tuple[float, ...] | None = None,
) -> Matching:
    """Solve the matching for `steps` per stage and the stages' end times `ends` (the last stage ends at 1).

    With `restart` given, Z is fixed and only the shifts are solved. With `starts` given, the stages after the first
    start at those times, whatever Z that stands for. RALU's published settings have their published numbers.
    """
    if len(ends) != len(steps) - 1:
        raise InvalidConfig(f"{len(steps)} stages need {len(steps) - 1} end times, got {len(ends)}: {ends}")

    def matched(restart: float | None, starts: Sequence[float]) -> Matching:
        shifts = _shifts(starts, steps, ends, base_shift)
        distance = float(_distance(shifts, starts, steps, ends, base_shift))
        return Matching(tuple(shifts), tuple(starts), restart, distance)

    def restarted(restart: float) -> Matching:
        return matched(restart, [restart_time(end, restart) for end in ends])

    if starts is not None:
        return matched(restart, starts)
    if restart is not None:
        return restarted(restart)
    common = math.gcd(*steps)
    proportion = tuple(count // common for count in steps)
    if (proportion, ends) in _PUBLISHED and base_shift == 3.0:
        shifts, restart = _PUBLISHED[proportion, ends]
        starts = tuple(restart_time(end, restart) for end in ends)
        return Matching(shifts, starts, restart, float(_distance(shifts, starts, steps, ends, base_shift)))
    return _least(restarted)


def _least(restarted: Callable[[float], Matching]) -> Matching:
    """Find the restart factor of the least distance within its bounds, by the golden section of its logarithm."""
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    low, high = map(math.log, _RESTART_BOUNDS)
    left, right = (restarted(math.exp(place)) for place in (high - golden * (high - low), low + golden * (high - low)))
    for _ in range(_HALVINGS):
        if left.distance <= right.distance:
            high = low + golden * (high - low)
            left, right = restarted(math.exp(high - golden * (high - low))), left
        else:
            low = high - golden * (high - low)
            left, right = right, restarted(math.exp(low + golden * (high - low)))
    return min(left, right, key=lambda matching: matching.distance)
