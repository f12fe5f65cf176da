"""MagCache: skip while a calibrated curve of residual magnitudes says that reuse errs little (arXiv 2506.09045).

    since the last computed step:  a *= gamma_t;   e += |1 - a|;   skip where e <= threshold

gamma_t is the mean ratio of the residual's norm at step t to that of the step before, measured once for a model. The
signal is the step's place in the run alone, so nothing is read from the device. Differences from the published
scripts: warm-up, limits in a row and windows are the shared policy's (its K is `max_consecutive`, its retention the
window's start), and no single step is protected by hand.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from fastdit.accelerator import Need
from fastdit.config import is_number, register
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext
from fastdit.step_cache.base import Memory, StepCache, Verdict
from fastdit.step_cache.curves import MagnitudeCurve, for_model, named
from fastdit.step_cache.policy import SkipPolicy


@dataclasses.dataclass
class _Magnitude(Memory):
    ratio: float = 1.0

    def restart(self) -> None:
        super().restart()
        self.ratio = 1.0


@register
@dataclasses.dataclass(frozen=True)
class MagCache(StepCache):
    """Skip steps while the accumulated error stays at or below `threshold` (published .05 to .24, 0 = never).

    `curve` is a `MagnitudeCurve`, the name of a published one, or None to find the curve of this very model. Its
    entries belong to the pipeline's own timesteps, so it can't go with a schedule. Raises `InvalidConfig` when applied
    to a model without a curve.
    """

    threshold: float = 0.24
    curve: MagnitudeCurve | str | None = None
    _: dataclasses.KW_ONLY
    policy: SkipPolicy = dataclasses.field(
        default_factory=lambda: SkipPolicy(last=0, max_consecutive=5, window=(0.1, 1.0))
    )

    needs: ClassVar = frozenset({Need.BLOCK_LISTS, Need.OWN_TIMESTEPS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold) or self.threshold < 0.0:
            raise InvalidConfig(f"MagCache's threshold is an accumulated error of at least 0, got {self.threshold!r}")
        if isinstance(self.curve, str):
            named(self.curve)
        elif self.curve is not None and not isinstance(self.curve, MagnitudeCurve):
            raise InvalidConfig(f"curve is a MagnitudeCurve, a published one's name or None, got {self.curve!r}")

    @property
    def neutral(self) -> bool:
        return self.threshold == 0.0

    def memory(self) -> Memory:
        return _Magnitude()

    def check(self, pipeline: Any, transformer: Any) -> None:
        self.for_transformer(transformer)

    def for_transformer(self, transformer: Any) -> StepCache:
        if isinstance(self.curve, MagnitudeCurve):
            return self
        found = named(self.curve) if isinstance(self.curve, str) else for_model(transformer)
        return dataclasses.replace(self, curve=found)

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        assert isinstance(memory, _Magnitude) and isinstance(self.curve, MagnitudeCurve)
        place = context.step + context.skipped_timesteps
        steps = context.total_steps + context.skipped_timesteps
        memory.ratio *= self.curve.at(place, steps, curve_of(context.branch))
        memory.accumulated += abs(1.0 - memory.ratio)
        return Verdict(memory.accumulated > self.threshold, f"error {memory.accumulated:.4f}")


#: The names that pipelines and unnamed second calls of a step give to the second guidance branch.
_UNCONDITIONAL = ("uncond", "unconditional", "negative", "call 1")


def curve_of(branch: str) -> int:
    """Say which of a curve's two branches a run's branch takes: 1 for the second guidance branch, 0 for all others."""
    return int(branch in _UNCONDITIONAL)
