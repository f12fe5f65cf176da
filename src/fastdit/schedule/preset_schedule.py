"""Base of the schedules that come with presets, each for a family of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fastdit.config import Count, Shift
from fastdit.errors import InvalidConfig
from fastdit.models.family import Family, Pipeline, Transformer, family_of
from fastdit.schedule.base import ScheduleRun
from fastdit.schedule.lifts.base import Lift
from fastdit.schedule.presets import listed
from fastdit.schedule.recipe import Between, Recipe
from fastdit.schedule.staged import Generators, StagedRun, StagedSchedule
from fastdit.step import SchedulePlan


@dataclasses.dataclass(frozen=True)
class PresetSchedule(StagedSchedule):
    """Stages of `layouts` by a preset, or by steps and times of one's own; what is given beside a preset replaces its.

    A subclass declares the `presets`, and in `own` what a setting without a preset begins with.
    """

    preset: str | None = None
    _: dataclasses.KW_ONLY
    steps: tuple[Count, ...] | None = None
    ends: tuple[Between, ...] | None = None
    starts: tuple[Between, ...] | None = None
    shifts: tuple[Shift, ...] | None = None
    lift: Lift | None = None
    base_shift: Shift = 3.0

    layouts: ClassVar[tuple[str, ...]]
    presets: ClassVar[Mapping[str, Recipe]]
    own: ClassVar[Mapping[str, Any]] = {}

    def check_values(self) -> None:
        super().check_values()
        name = type(self).__name__
        if self.preset is not None and self.preset not in self.presets:
            raise InvalidConfig(f"{name} has no preset {self.preset!r}; choose one of {listed(self.presets)}")
        if self.preset is None and self.steps is not None and "ends" not in {**self.own, **self.settings}:
            raise InvalidConfig(f"{name} without a preset needs ends beside its steps, {len(self.layouts) - 1} of them")
        self.recipe.check(name)

    @property
    def settings(self) -> dict[str, Any]:
        """What is given, in a recipe's own words."""
        names = ("steps", "ends", "starts", "shifts", "lift", "base_shift")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def recipe(self) -> Recipe:
        if self.preset is None and self.steps is not None:
            return Recipe(self.layouts, **{**self.own, **self.settings})
        return dataclasses.replace(self.presets[self.preset or next(iter(self.presets))], **self.settings)

    def of(self, family: Family) -> PresetSchedule:
        """Give the schedule with the preset of a pipeline's family, where it names none and has no steps.

        Raises `InvalidConfig` for another family's preset.
        """
        if self.preset is None and self.steps is not None:
            return self
        known = [preset for preset, recipe in self.presets.items() if recipe.family == family.name]
        if self.preset in known:
            return self
        if self.preset is None and known:
            return dataclasses.replace(self, preset=known[0])
        name = type(self).__name__
        asked = f"{name}'s preset {self.preset!r} is for {self.recipe.family}" if self.preset else f"{name}() takes one"
        raise InvalidConfig(
            f"{asked}, and the pipeline is {family.name}, whose presets are: {', '.join(known) or 'none'}; choose "
            "one of them, or give steps and ends"
        )

    def check(self, pipeline: Pipeline, transformer: Transformer) -> None:
        """Raise `InvalidConfig` for another family's preset."""
        family = family_of(pipeline)
        if family is not None:
            self.of(family)

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Pipeline, generator: Generators) -> ScheduleRun:
        """Make the state of one run."""
        return StagedRun(self.of(family).recipe, plan, family, pipeline, generator)
