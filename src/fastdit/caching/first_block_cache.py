"""FirstBlockCache: run the first block; if it did about the same as at the last computed step, skip the rest.

    f_t = block_0(x_t) - x_t;   skip where mean|f_t - f_c| < threshold * mean|f_c|,  c the last computed step

(ParaAttention's first-block cache.) The comparison with the last *computed* step is cumulative by nature. It needs no
calibration and works on any model whose blocks can be observed; a skipped step still costs one block.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fastdit.accelerator import is_number, register
from fastdit.errors import InvalidConfig
from fastdit.run import StepContext

from .step_cache import GateState, StepCache, Verdict, finite, relative_change


@register
@dataclasses.dataclass(frozen=True)
class FirstBlockCache(StepCache):
    """Skip the blocks after the first while its residual changes by less than `threshold` (relative, 0 = never)."""

    threshold: float = 0.1

    leading_blocks: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold) or self.threshold < 0.0:
            raise InvalidConfig(
                f"FirstBlockCache's threshold is a relative change of at least 0, got {self.threshold!r}"
            )

    @property
    def neutral(self) -> bool:
        return self.threshold == 0.0

    def judge(self, state: GateState, signal: torch.Tensor, context: StepContext, forced: str | None) -> Verdict:
        if forced is not None or state.signal is None:
            state.signal = signal
            return Verdict(True, forced or "no history")
        change = finite(relative_change(signal, state.signal))
        if change is None or not change < self.threshold:
            state.signal = signal
            if change is None:
                return Verdict(True, "doubt: change is not finite", doubt=True)
            return Verdict(True, f"change {change:.4f}")
        return Verdict(False, f"change {change:.4f}")
