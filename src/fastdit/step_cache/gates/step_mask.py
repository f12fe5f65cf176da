"""StepMask and Interval: the steps to compute, said beforehand."""

from __future__ import annotations

import dataclasses

from fastdit.config import is_count, register
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext
from fastdit.step_cache.base import Memory, StepCache, Verdict
from fastdit.step_cache.policy import SkipPolicy


@register
@dataclasses.dataclass(frozen=True)
class StepMask(StepCache):
    """Compute the steps whose entry in `mask` is true, skip the others.

    The mask has one entry for each step of the run. The first step of every stage is computed whatever it says.
    """

    mask: tuple[bool, ...] = ()
    _: dataclasses.KW_ONLY
    policy: SkipPolicy = dataclasses.field(default_factory=lambda: SkipPolicy(first=0, last=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mask, (tuple, list)) or not self.mask or any(entry not in (0, 1) for entry in self.mask):
            raise InvalidConfig(f"StepMask needs a sequence of booleans, one a step, got {self.mask!r}")
        object.__setattr__(self, "mask", tuple(bool(entry) for entry in self.mask))

    @property
    def neutral(self) -> bool:
        return all(self.mask)

    def check_run(self, total_steps: int) -> None:
        if len(self.mask) != total_steps:
            raise InvalidConfig(
                f"StepMask has {len(self.mask)} entries and the run has {total_steps} steps; give one entry a step"
            )

    def skippable(self, total_steps: int) -> int:
        steps = (StepContext(step, total_steps, 0, step, "main") for step in range(1, min(total_steps, len(self.mask))))
        free = sum(not self.mask[at.step] and self.policy.forced(at, 0, 0) is None for at in steps)
        return free if self.policy.max_skipped is None else min(free, self.policy.max_skipped)

    def outlook(self, total_steps: int) -> str | None:
        return None if self.skippable(total_steps) else super().outlook(total_steps)

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        return Verdict(self.mask[context.step], "mask")


@register
@dataclasses.dataclass(frozen=True)
class Interval(StepCache):
    """Compute every `interval`-th step after the policy's first ones and skip those between (1 = compute all).

    FORA (arXiv 2407.01425) with `Reuse()`, TaylorSeer (arXiv 2503.06923) with a Taylor forecaster. The count begins
    anew at every computed step, so a step that is forced moves those after it.
    """

    interval: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.interval, 1):
            raise InvalidConfig(f"Interval's interval is a whole number of steps from 1, got {self.interval!r}")

    @property
    def neutral(self) -> bool:
        return self.interval == 1

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        memory.accumulated += 1.0
        return Verdict(memory.accumulated >= self.interval, f"interval {self.interval}")
