"""What the gates with a threshold share: zero never skips, and a change may be added up from step to step."""

from __future__ import annotations

import dataclasses

import torch

from fastdit.config import AtLeastZero
from fastdit.step import StepContext
from fastdit.step_cache.base import Memory, StepCache, Verdict


@dataclasses.dataclass(frozen=True)
class ThresholdGate(StepCache):
    """Base of the gates that skip below a `threshold`, at least 0 and without a unit; at 0 every step is computed."""

    threshold: AtLeastZero = 0.1

    @property
    def neutral(self) -> bool:
        return self.threshold == 0.0


@dataclasses.dataclass(frozen=True)
class AccumulatingGate(ThresholdGate):
    """Base of the gates that add up the change from step to step (acc) and compute where acc reaches `threshold`.

    The signal is compared to that of the step before, computed or not; `Memory.restart` sets acc = 0.
    """

    def rescaled(self, change: float) -> float:
        """Say what a relative change of the signal counts."""
        return change

    def remember(self, memory: Memory, signal: torch.Tensor, computed: bool) -> None:
        memory.signal = signal

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        memory.accumulated += self.rescaled(change)
        reason = f"change {change:.4f}, accumulated {memory.accumulated:.4f}"
        return Verdict(memory.accumulated >= self.threshold, reason)
