"""A schedule: one stage of the model's own grid, with noise levels along a quarter of a cosine."""

from __future__ import annotations

import dataclasses
import math

import torch
from diffusers import DiffusionPipeline

from fastdit.config import Count, register
from fastdit.layout import FineLayout, TokenLayout
from fastdit.models.family import Family
from fastdit.schedule.base import Schedule, ScheduleRun
from fastdit.step import SchedulePlan, StagePlan


@register
@dataclasses.dataclass(frozen=True)
class CosineSteps(Schedule):
    """Noise levels sigma_i = cos(pi i / 2 n), i = 0 .. n: short steps at first, long ones at the end.

    Args:
        steps: n, where a call doesn't say num_inference_steps.
    """

    steps: Count = 20

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        steps = num_inference_steps or self.steps
        sigmas = (*(math.cos(math.pi * step / (2 * steps)) for step in range(steps)), 0.0)
        stage = StagePlan(0, "fine", tokens=rows * columns, steps=steps, sigmas=sigmas)
        return SchedulePlan((stage,), rows, columns)

    def begin(
        self,
        plan: SchedulePlan,
        family: Family,
        pipeline: DiffusionPipeline,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> ScheduleRun:
        return _Run(plan)


class _Run(ScheduleRun):
    """One stage that stays as it is, so there is no `transition` to write."""

    def __init__(self, plan: SchedulePlan) -> None:
        self._layout = FineLayout(plan.rows, plan.columns)

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        return latents, self._layout

    def resume(
        self, stage: int, latents: torch.Tensor, clean: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, TokenLayout]:
        return latents, self._layout

    def lift(self, latents: torch.Tensor) -> torch.Tensor:
        return latents
