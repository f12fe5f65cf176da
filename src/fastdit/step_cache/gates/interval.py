"""Interval: every so many steps one is computed."""

from __future__ import annotations

import dataclasses

from fastdit.config import Count, register
from fastdit.step import StepContext
from fastdit.step_cache.base import Memory, StepCache, Verdict


@register
@dataclasses.dataclass(frozen=True)
class Interval(StepCache):
    """Compute every `interval`-th step after the policy's first ones and skip those between.

    `FORA` and `TaylorSeer` are this gate with the policy and the forecaster of their papers.

    Args:
        interval: steps from one computed step to the next, from 1 (all are computed). The count begins anew at every
            computed step, so a step that is forced moves those after it.

    And what every step cache takes: `forecast`, `policy`, `per_image`, `scope`, `stage_change`.

    Raises:
        InvalidConfig: for other values.

    >>> Interval(3).policy
    SkipPolicy(first=1, last=1, max_consecutive=None, max_skipped=None, window=(0.0, 1.0))
    """

    interval: Count = 3

    @property
    def neutral(self) -> bool:
        return self.interval == 1

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        memory.accumulated += 1.0
        return Verdict(memory.accumulated >= self.interval, f"interval {self.interval}")
