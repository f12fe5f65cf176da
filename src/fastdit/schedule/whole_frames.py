"""Base of the schedules whose stages are all whole frames."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastdit.config import Count, Shift
from fastdit.schedule.lifts.base import CleanLift
from fastdit.schedule.lifts.latent import LatentLift
from fastdit.schedule.recipe import Between, Recipe
from fastdit.schedule.staged import StagedSchedule


@dataclasses.dataclass(frozen=True)
class WholeFrames(StagedSchedule):
    """Whole frames at full size ("fine") or half of it ("coarse"), in the order of `layouts`.

    Args:
        steps: how many a stage, each at least 1.
        ends: the times (0 = noise, 1 = data) at which all stages but the last end, rising.
        starts: the times at which all but the first start, each before the end of the stage before it.
        lift: resizes the clean estimate at every switch.

    And to tinker with: `base_shift`, .01 to 100, the timestep shift that the model was trained for, to which
    NT-matching fits the stages' own.

    Raises:
        InvalidConfig: for values out of range.
    """

    steps: tuple[Count, ...]
    _: dataclasses.KW_ONLY
    ends: tuple[Between, ...]
    starts: tuple[Between, ...]
    lift: CleanLift = dataclasses.field(default_factory=lambda: LatentLift(resize="bicubic", noise="fresh"))
    base_shift: Shift = 3.0

    #: The stages in their order.
    layouts: ClassVar[tuple[str, ...]]

    def check_values(self) -> None:
        super().check_values()
        self.recipe.check(type(self).__name__)

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            self.layouts, self.steps, self.ends, starts=self.starts, lift=self.lift, base_shift=self.base_shift
        )
