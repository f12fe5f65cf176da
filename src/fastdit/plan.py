"""Plans: what a call of a pipeline under a stack will do, found without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdit.errors import InvalidConfig
from fastdit.models.components import arguments_of, grid_of, require_family, size_remark, transformers_of
from fastdit.models.family import family_of
from fastdit.step import SchedulePlan, StagePlan

if TYPE_CHECKING:
    from fastdit.stack import Stack


@dataclass(frozen=True)
class Plan:
    """What a call will do: its stages and the accelerators that act in each. Printing it explains it."""

    stack: Stack
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def __str__(self) -> str:
        lines = [f"{self.steps} steps in {len(self.stages)} stage{'s' if len(self.stages) > 1 else ''}"]
        for stage in self.stages:
            tokens = f"{stage.tokens} tokens" if stage.tokens is not None else "the model's own tokens"
            noise = f", sigma {stage.sigmas[0]:.3f} to {stage.sigmas[-1]:.3f}" if stage.sigmas else ""
            kernel, engine = self.stack.attention, self.stack.engine
            attention = f", attention by {kernel.backend_in(stage.index)}" if kernel is not None else ""
            blocks = f", blocks by {type(engine).__name__}" if engine is not None else ""
            lines.append(
                f"  stage {stage.index + 1} ({stage.layout}): {stage.steps} steps, {tokens}{noise}{attention}{blocks}"
            )
        for accelerator in self.stack:
            lines.append(f"  {accelerator.level.value}: {accelerator.describe()}")
            lines.extend(
                f"    {effect.value}" for effect in sorted(accelerator.effects.breaks, key=lambda effect: effect.name)
            )
        if not self.stack:
            lines.append("  no accelerator: the plain pipeline, bit for bit")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def make_plan(
    stack: Stack,
    pipeline: Any,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
) -> Plan:
    """Plan a call of a pipeline without running it."""
    arguments = arguments_of(pipeline, height=height, width=width, num_inference_steps=num_inference_steps)
    family = family_of(pipeline)
    scheduled = schedule_plan(stack, pipeline, arguments, num_inference_steps)
    remark = () if family is None else size_remark(family, pipeline, arguments)
    if scheduled is not None:
        return Plan(stack, scheduled.stages, (*scheduled.notes, *remark, *_outlook(stack, scheduled.steps)))
    if (steps := arguments.get("num_inference_steps")) is None:
        raise InvalidConfig("this pipeline has no default for num_inference_steps; give it to plan()")
    tokens = None if family is None else math.prod(grid_of(family, pipeline, arguments))
    notes = ["the pipeline's own timesteps", *remark]
    if len(transformers := transformers_of(pipeline)) > 1:
        notes.append(f"the stack acts in {' and in '.join(transformers)}")
    order = getattr(getattr(pipeline, "scheduler", None), "order", 1)
    if order > 1:
        # Such schedulers of diffusers take their last step in one forward.
        given, steps = steps, order * (steps - 1) + 1
        notes.append(f"the scheduler takes {steps} forwards for {given} steps, and each forward counts as a step here")
    return Plan(stack, (StagePlan(0, "whole frame", tokens, steps),), (*notes, *_outlook(stack, steps)))


def _outlook(stack: Stack, steps: int) -> tuple[str, ...]:
    """Remark on a cache that has too few steps to be of use."""
    outlook = stack.step_cache.outlook(steps) if stack.step_cache is not None else None
    return () if outlook is None else (outlook,)


def schedule_plan(
    stack: Stack, pipeline: Any, arguments: Mapping[str, Any], num_inference_steps: int | None
) -> SchedulePlan | None:
    """Plan the schedule's stages for a call's size, or None where the stack has no schedule."""
    if stack.schedule is None:
        return None
    family = require_family(pipeline, stack.schedule)
    plan = stack.schedule.of(family).plan(*grid_of(family, pipeline, arguments), num_inference_steps)
    if stack.attention is not None:
        stack.attention.check_stages(len(plan.stages))
    return plan


def fewest_steps(stack: Stack, pipeline: Any, plan: Plan, height: int | None, width: int | None) -> int:
    """Count the steps of the shortest run with the same tokens in the same stages as a plan has."""
    tokens = [stage.tokens for stage in plan.stages]
    if stack.schedule is None:
        return min(2, plan.steps)
    for steps in range(len(tokens), plan.steps):
        try:
            shorter = make_plan(stack, pipeline, height, width, steps)
        except InvalidConfig:
            continue
        if [stage.tokens for stage in shorter.stages] == tokens:
            return steps
    return plan.steps
