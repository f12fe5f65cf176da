"""Bottleneck Sampling: full resolution, then half, then full again (arXiv 2503.18940).

The first full-size steps decide the composition as plain sampling does, the middle ones run on a quarter of the tokens,
the last ones put detail in. Differences from the paper: it resizes latents with a Lanczos filter and tunes a shift for
each stage; here the lift is a part like any other and NT-matching (RALU's) gives the shifts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from fastdit.accelerator import Break, Change, Need, Schedule, SchedulePlan, ScheduleRun, is_count, register
from fastdit.errors import InvalidConfig
from fastdit.models.family import Family

from .lift import CleanLift, LatentLift
from .staged import StagedRun, is_time, rising, staged_plan


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
    needs: ClassVar = frozenset({Need.FRAME_SIZES, Need.WHOLE_FRAME})
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
        return staged_plan(
            "BottleneckSampling",
            ("fine", "coarse", "fine"),
            rows,
            columns,
            num_inference_steps,
            steps=self.steps,
            ends=self.ends,
            starts=self.starts,
            base_shift=self.base_shift,
        )

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Any, generator: Any) -> ScheduleRun:
        """Make the state of one run."""
        return StagedRun(plan, family, pipeline, generator, lift=self.lift, ends=self.ends)
