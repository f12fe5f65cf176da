"""Bottleneck Sampling: full resolution, then half, then full again (arXiv 2503.18940).

The first full-size steps decide the composition as plain sampling does, the middle ones run on a quarter of the tokens,
the last ones put detail in. Differences from the paper: it resizes latents with a Lanczos filter and tunes a shift for
each stage; here the lift is a part like any other and NT-matching (RALU's) gives the shifts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from fastdit.accelerator import Break, Change, Need, Schedule, SchedulePlan, ScheduleRun, StagePlan, is_count, register
from fastdit.errors import InvalidConfig
from fastdit.models.family import Family

from . import matching
from .lift import CleanLift, LatentLift
from .staged import StagedRun, is_time, proportional, rising


@register
@dataclasses.dataclass(frozen=True)
class BottleneckSampling(Schedule):
    """Three whole-frame stages: fine, coarse, fine.

    `steps` counts the steps of each, `ends` are the times (0 = noise, 1 = data) at which the first two end, `starts`
    those at which the last two start, `lift` resizes the clean estimate at both switches. `base_shift` is the timestep
    shift that the model was trained for. The default costs about a fifth of 50 steps.

    Raises `InvalidConfig` for values out of range.
    """

    steps: tuple[int, ...] = (3, 11, 4)
    _: dataclasses.KW_ONLY
    ends: tuple[float, ...] = (0.12, 0.60)
    starts: tuple[float, ...] = (0.08, 0.35)
    lift: CleanLift = dataclasses.field(default_factory=lambda: LatentLift(resize="bicubic", noise="fresh"))
    base_shift: float = 3.0

    changes: ClassVar = frozenset({Change.TOKEN_COUNT, Change.TIMESTEPS})
    needs: ClassVar = frozenset({Need.TOKEN_POSITIONS, Need.WHOLE_FRAME})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS, Break.SEED_IMAGE})

    def __post_init__(self) -> None:
        for name in ("steps", "ends", "starts"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.steps, tuple) or len(self.steps) != 3 or not all(is_count(n, 1) for n in self.steps):
            raise InvalidConfig(f"BottleneckSampling needs three step counts of at least 1, got {self.steps!r}")
        if not rising(self.ends, 2):
            raise InvalidConfig(f"ends are two rising times between 0 and 1, got {self.ends!r}")
        if not isinstance(self.starts, tuple) or len(self.starts) != 2 or not all(map(is_time, self.starts)):
            raise InvalidConfig(f"starts are two times between 0 and 1, got {self.starts!r}")
        if not isinstance(self.lift, CleanLift):
            raise InvalidConfig(f"lift is a lift of the clean estimate such as PixelLift(), got {self.lift!r}")
        self.lift.check(self.ends, self.starts)

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Lay out the stages. Raises `InvalidConfig` for sizes that don't halve and for too few steps."""
        if rows % 2 or columns % 2:
            raise InvalidConfig(
                f"BottleneckSampling halves the token grid, and {rows} x {columns} tokens can't be halved; choose a "
                "size whose grid is even"
            )
        steps = self.steps
        if num_inference_steps is not None and num_inference_steps != sum(steps):
            if num_inference_steps < len(steps):
                raise InvalidConfig(f"three stages can't run {num_inference_steps} steps; ask for at least 3")
            steps = proportional(steps, num_inference_steps)
        solved = matching.solve(steps, self.ends, self.base_shift, starts=self.starts)
        fine, coarse = rows * columns, rows * columns // 4
        spans = zip(steps, [0.0, *self.starts], [*self.ends, 1.0], solved.shifts, strict=True)
        stages = tuple(
            StagePlan(index, name, tokens, count, matching.stage_sigmas(start, stop, shift, count))
            for index, ((name, tokens), (count, start, stop, shift)) in enumerate(
                zip((("fine", fine), ("coarse", coarse), ("fine", fine)), spans, strict=True)
            )
        )
        shifts = ", ".join(f"{shift:.3f}" for shift in solved.shifts)
        return SchedulePlan(stages, rows, columns, (f"shifts {shifts}; matching distance {solved.distance:.4f}",))

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Any, generator: Any) -> ScheduleRun:
        """Make the state of one run."""
        return StagedRun(plan, family, pipeline, generator, lift=self.lift, ends=self.ends)
