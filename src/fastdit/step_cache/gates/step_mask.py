"""StepMask: the steps to compute, each said beforehand."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from fastdit.config import Range, register
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext
from fastdit.step_cache.base import Memory, StepCache, Verdict
from fastdit.step_cache.policy import SkipPolicy


@register
@dataclasses.dataclass(frozen=True)
class StepMask(StepCache):
    """Compute the steps whose entry in `mask` is true, skip the others.

    Args:
        mask: one entry, True or False (1 or 0), for each step of the run. The first step of every stage is computed
            whatever it says.
        policy: by default no step is forced.

    And what every step cache takes: `forecast`, `per_image`, `scope`, `stage_change`.

    Raises:
        InvalidConfig: for other values, and in a run of another number of steps.

    >>> StepMask((1, 0, 0, 1)).skippable(4)
    2
    """

    mask: Annotated[tuple[bool | Literal[0, 1], ...], Range(at_least=1)] = ()
    _: dataclasses.KW_ONLY
    policy: SkipPolicy = dataclasses.field(default_factory=lambda: SkipPolicy(first=0, last=0))

    def check_values(self) -> None:
        super().check_values()
        object.__setattr__(self, "mask", tuple(map(bool, self.mask)))

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
        return Verdict(bool(self.mask[context.step]), "mask")
