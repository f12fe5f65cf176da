"""MagCache: skip while a calibrated curve of residual magnitudes says that reuse errs little (2506.09045).

Differences from the published scripts: warm-up, limits in a row and windows are the shared policy's (its K is
`max_consecutive`, its retention the window's start), and no single step is protected by hand.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from fastdit.accelerator import Need
from fastdit.config import AtLeastZero, register
from fastdit.step import StepContext
from fastdit.step_cache.base import Memory, Verdict
from fastdit.step_cache.curves import MagnitudeCurve
from fastdit.step_cache.gates.threshold import ThresholdGate
from fastdit.step_cache.policy import SkipPolicy

#: The names that pipelines, guiders and unnamed calls of a step give to the branches of a magnitude curve.
_CURVES = (
    ("main", "cond", "conditional", "positive", "pred_cond", "cond_uncond", "call 0"),
    ("uncond", "unconditional", "negative", "pred_uncond", "call 1"),
)


@dataclasses.dataclass
class _Magnitude(Memory):
    ratio: float = 1.0

    def restart(self) -> None:
        super().restart()
        self.ratio = 1.0


@register
@dataclasses.dataclass(frozen=True)
class MagCache(ThresholdGate):
    """Skip steps while the error that reuse adds up by the model's magnitude curve is at most `threshold`.

        since the last computed step:  a *= gamma_t;   e += |1 - a|;   skip where e <= threshold

    gamma_t is the mean ratio of the residual's norm at step t to that of the step before, measured once for a model.
    The signal is the step's place in the run alone, so nothing is read from the device.

    Args:
        threshold: the largest error at which a step is skipped, at least 0; 0 never skips. Published values lie between
            .05 and .24, larger ones skip more.
        curve: a `MagnitudeCurve`, the name of a published one, or None to find the curve of this very model. Its
            entries belong to the pipeline's own timesteps, so it can't go with a schedule.
        policy: by default the first tenth of the run is computed, and every sixth step at least.

    And what every step cache takes: `forecast`, `per_image`, `scope`, `stage_change`.

    Raises:
        InvalidConfig: for other values, and where the model has no published curve and none is given.

    Paper: Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, arXiv 2506.09045.

    >>> MagCache(0.1, MagnitudeCurve((1.0, 0.98, 0.95))).neutral
    False
    """

    threshold: AtLeastZero = 0.24
    curve: MagnitudeCurve | str | None = None
    _: dataclasses.KW_ONLY
    policy: SkipPolicy = dataclasses.field(
        default_factory=lambda: SkipPolicy(last=0, max_consecutive=5, window=(0.1, 1.0))
    )

    needs: ClassVar = frozenset({Need.OWN_TIMESTEPS})

    def check_values(self) -> None:
        super().check_values()
        if isinstance(self.curve, str):
            MagnitudeCurve.named(self.curve)

    def memory(self) -> Memory:
        return _Magnitude()

    def check(self, pipeline: object, transformer: nn.Module) -> None:
        self.for_transformer(transformer)

    def for_transformer(self, transformer: nn.Module) -> MagCache:
        if isinstance(self.curve, MagnitudeCurve):
            return self
        name = self.curve
        found = MagnitudeCurve.named(name) if isinstance(name, str) else MagnitudeCurve.for_model(transformer)
        return dataclasses.replace(self, curve=found)

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        assert isinstance(memory, _Magnitude) and isinstance(self.curve, MagnitudeCurve)
        place = context.step + context.skipped_timesteps
        steps = context.total_steps + context.skipped_timesteps
        curve = curve_of(context.branch)
        if curve is None:
            return Verdict(True, f"no magnitude curve for the branch {context.branch!r}")
        memory.ratio *= self.curve.at(place, steps, curve)
        memory.accumulated += abs(1.0 - memory.ratio)
        return Verdict(memory.accumulated > self.threshold, f"error {memory.accumulated:.4f}")


def curve_of(branch: str) -> int | None:
    """Say which curve a run's branch takes: 0, 1 for the second of guidance, None for others, of skipped layers say."""
    return next((number for number, names in enumerate(_CURVES) if branch in names), None)
