"""StepMask: the steps to compute, said explicitly."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastdit.accelerator import register
from fastdit.errors import InvalidConfig
from fastdit.run import StepContext

from .step_cache import GateState, SkipPolicy, StepCache, Verdict


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

    def judge(self, state: GateState, signal: Any, context: StepContext, forced: str | None) -> Verdict:
        if forced is not None:
            return Verdict(True, forced)
        return Verdict(self.mask[context.step], "mask")
