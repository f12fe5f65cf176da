"""A schedule that somebody else writes: what it needs of a pipeline is declared by its base."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import tiny
from fastdit import IncompatibleStack, MagCache, Stack, UnsupportedModel, accelerate
from fastdit.accelerator import Change, Need
from fastdit.layout import FineLayout, TokenLayout
from fastdit.schedule.base import Schedule, ScheduleRun
from fastdit.step import SchedulePlan, StagePlan


@dataclasses.dataclass(frozen=True)
class EvenSteps(Schedule):
    """One stage of evenly spaced noise levels; it declares nothing."""

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        steps = num_inference_steps or 4
        sigmas = tuple(1.0 - step / steps for step in range(steps + 1))
        return SchedulePlan((StagePlan(0, "fine", rows * columns, steps, sigmas),), rows, columns)

    def begin(self, plan: SchedulePlan, family: Any, pipeline: Any, generator: Any) -> ScheduleRun:
        return EvenRun(plan)


@dataclasses.dataclass(frozen=True)
class PlacedSteps(EvenSteps):
    """It declares what it needs beside."""

    needs = frozenset({Need.TOKEN_POSITIONS})


class EvenRun(ScheduleRun):
    def __init__(self, plan: SchedulePlan) -> None:
        self._plan = plan

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        return latents, FineLayout(self._plan.rows, self._plan.columns)

    def lift(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def test_a_schedule_that_declares_nothing_changes_and_needs_what_every_schedule_does() -> None:
    effects = EvenSteps().effects
    assert effects.changes == {Change.TOKEN_COUNT, Change.TIMESTEPS}
    assert effects.needs == {Need.FRAME_SIZES, Need.WHOLE_FRAME}
    with pytest.raises(IncompatibleStack, match="the timesteps of the run"):
        Stack([EvenSteps(), MagCache(0.1)])


def test_it_runs_on_a_pipeline_of_a_described_family() -> None:
    pipe, call = tiny.flux()
    fast = accelerate(pipe, [EvenSteps()])
    assert torch.isfinite(tiny.run(fast, call)).all()
    assert [step.sigma for step in fast.fastdit.last_run.steps] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", [EvenSteps(), PlacedSteps()], ids=["declares nothing", "declares a need"])
def test_a_pipeline_without_a_family_is_refused_by_name_when_the_twin_is_made(schedule: Schedule) -> None:
    pipe, _ = tiny.pixart()
    with pytest.raises(UnsupportedModel, match=r"Steps\(\) must know how tokens lie, and can't in PixArtSigmaPipeline"):
        accelerate(pipe, [schedule])
