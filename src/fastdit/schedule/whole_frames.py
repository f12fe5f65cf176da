"""Base of the schedules whose stages are all whole frames."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from fastdit.accelerator import Break, Change, Need
from fastdit.config import is_count
from fastdit.errors import InvalidConfig
from fastdit.models.family import Family
from fastdit.schedule.base import Schedule, ScheduleRun
from fastdit.schedule.lifts.base import CleanLift
from fastdit.schedule.lifts.latent import LatentLift
from fastdit.schedule.staged import (
    StagedRun,
    is_time,
    rising,
    staged_plan,
)
from fastdit.step import SchedulePlan


@dataclasses.dataclass(frozen=True)
class WholeFrames(Schedule):
    """Whole frames at full size ("fine") or half of it ("coarse"), in the order of `layouts`.

    `steps` counts the steps of each stage, `ends` are the times (0 = noise, 1 = data) at which all but the last end,
    `starts` those at which all but the first start, `lift` resizes the clean estimate at every switch. `base_shift` is
    the timestep shift that the model was trained for.

    Raises `InvalidConfig` for values out of range.
    """

    steps: tuple[int, ...]
    _: dataclasses.KW_ONLY
    ends: tuple[float, ...]
    starts: tuple[float, ...]
    lift: CleanLift = dataclasses.field(default_factory=lambda: LatentLift(resize="bicubic", noise="fresh"))
    base_shift: float = 3.0

    changes: ClassVar = frozenset({Change.TOKEN_COUNT, Change.TIMESTEPS})
    needs: ClassVar = frozenset({Need.FRAME_SIZES, Need.WHOLE_FRAME})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS, Break.SEED_IMAGE})

    #: The stages in their order.
    layouts: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        name, stages = type(self).__name__, len(self.layouts)
        for field in ("steps", "ends", "starts"):
            if isinstance(value := getattr(self, field), list):
                object.__setattr__(self, field, tuple(value))
        steps, starts = self.steps, self.starts
        if not isinstance(steps, tuple) or len(steps) != stages or not all(is_count(count, 1) for count in steps):
            raise InvalidConfig(f"{name} needs {stages} step counts of at least 1, got {steps!r}")
        if not rising(self.ends, stages - 1):
            raise InvalidConfig(f"ends are {stages - 1} rising times between 0 and 1, got {self.ends!r}")
        if not isinstance(starts, tuple) or len(starts) != stages - 1 or not all(map(is_time, starts)):
            raise InvalidConfig(f"starts are {stages - 1} times between 0 and 1, got {starts!r}")
        if not isinstance(self.lift, CleanLift):
            raise InvalidConfig(f"lift is a lift of the clean estimate such as PixelLift(), got {self.lift!r}")
        self.lift.check(self.ends, starts)

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Lay out the stages. Raises `InvalidConfig` for sizes that don't halve and for too few steps."""
        return staged_plan(
            type(self).__name__,
            self.layouts,
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
