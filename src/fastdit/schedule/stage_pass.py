"""A schedule in a run: the stage's latents and token places in every forward, and what the pipeline's loop still holds.

The pipeline's loop walks along the timesteps of all stages with latents of the stage's own shape. It knows nothing of
that: its first latents, the picture that it begins with and its masks are of full size, and are brought to the stage
here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fastdit.blocks.chain import Forward, ForwardCall, Pass
from fastdit.errors import InvalidConfig
from fastdit.layout import TokenLayout
from fastdit.models.family import Family
from fastdit.models.following import followed
from fastdit.run import Run
from fastdit.schedule.base import ScheduleRun
from fastdit.step import SchedulePlan


class StagePass(Pass):
    """Puts the stage's latents and token places into every forward, and takes the latents from stage to stage."""

    outside_hooks = True

    def __init__(self, run: Run, plan: SchedulePlan, own: ScheduleRun, family: Family) -> None:
        self.plan = plan
        self._run, self._own, self._family = run, own, family
        self._children: dict[tuple[str, int], dict[str, nn.Module]] = {}
        self._sigmas: list[torch.Tensor] = []
        self._shape: torch.Size | None = None
        self._picture: torch.Tensor | None = None

    @property
    def passes(self) -> Sequence[Pass]:
        """What the schedule itself lets act beside the attention."""
        return self._own.passes()

    def forward(self, call: ForwardCall, next: Forward) -> Any:
        run, family, step = self._run, self._family, call.step
        # At the first step the pipeline still holds its full-size noise.
        given = run.grid if step.step == 0 else run.layout
        assert given is not None
        latents = family.latents_of(call.arguments, given)
        if step.step == 0:
            latents = self.first_latents(latents)
        layout = run.layout
        assert layout is not None
        forced = self._own.forced(step.stage, step.stage_step)
        if forced is not None:
            call.step = dataclasses.replace(step, forced=forced)
        key = call.name, latents.shape[0]
        if key not in self._children:
            self._children[key] = family.child_overrides(call.module, layout, latents)
        call.arguments, call.children = family.place(call.arguments, given, latents, layout), self._children[key]
        call.select = partial(self._of_samples, layout)
        return family.velocity(next(call), layout)

    def _of_samples(self, layout: TokenLayout, call: ForwardCall, index: torch.Tensor) -> ForwardCall:
        """Give the call for some samples of a batch, whose layouts may be their own."""
        if not call.children:
            return call
        own = layout.of_images(index)
        latents = self._family.latents_of(call.arguments, own)
        arguments = self._family.place(call.arguments, own, latents, own)
        children = self._family.child_overrides(call.module, own, latents)
        return dataclasses.replace(call, arguments=arguments, children=children)

    def first_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Make the first step's latents of what the pipeline holds at full size, and stand on their layout."""
        run = self._run
        self._shape = None  # what the schedule decodes is not for the loop
        if self._picture is not None:
            sigmas = self.plan.stages[run.stage].sigmas
            assert sigmas is not None
            latents, layout = self._own.resume(run.stage, latents, self._picture, sigmas[run.stage_step])
        elif run.index > run.step:
            raise InvalidConfig(
                "a run that leaves out timesteps begins with a picture, whose latents the scheduler was not given; "
                "leave latents= out, or drop the schedule"
            )
        else:
            latents, layout = self._own.initial(latents)
        self._shape = latents.shape[1:]
        run.stand_on(layout)
        return latents

    def close(self) -> None:
        self._children.clear()
        self._own, self._picture = ScheduleRun(), None

    def publish(self, scheduler: Any, device: Any) -> None:
        """Publish the timesteps of every stage as one list, which is what the pipeline's loop walks along."""
        device = device or torch.device("cpu")
        own = [stage.sigmas or () for stage in self.plan.stages]
        together = torch.tensor([sigma for stage in own for sigma in stage], dtype=torch.float32, device=device)
        self._sigmas = list(together.split([*map(len, own)]))
        sigmas = torch.cat([stage[:-1] for stage in self._sigmas])
        scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        scheduler.timesteps = sigmas * scheduler.config.num_train_timesteps
        scheduler.num_inference_steps = len(sigmas)
        scheduler._step_index = None
        scheduler._begin_index = None

    def noised(self, scheduler: Any, sample: Any, noise: Any) -> tuple[Any, Any]:
        """Give what the scheduler is to mix in the loop: the picture to begin with, or what a mask protects."""
        if self._run.step == 0:
            # Autoencoders of videos give a picture an axis of one frame.
            self._picture = sample.flatten(1, 2) if sample.dim() == 5 else sample
        else:
            # Between steps, what a mask protects is given the next step's noise.
            sample, noise = self.followed(sample), self.followed(noise, noise=True)
        # The class looks for its place in the timesteps, where the end of a stage is not the next one's start.
        scheduler._step_index, scheduler._begin_index = None, self._run.index
        return sample, noise

    def take_step(self, scheduler: Any, own: Callable[[Any], Any], velocity: torch.Tensor, sample: torch.Tensor) -> Any:
        """Take the class's `own` step from `sample` between two noise levels of the stage, and go to the next one."""
        run = self._run
        if run.step == 0:
            # The pipeline still holds its full-size latents; the stage's own are made of them.
            sample = self.first_latents(sample)
        with self._at_step(scheduler) as sigma:
            result = own(sample)
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        self._own.observe(velocity)
        stage, number = self.plan.stages[run.stage], run.stage
        ends = run.stage_step + 1 == stage.steps and number + 1 < len(self.plan.stages)
        run.tick()
        if ends:
            denoised = (sample.float() - sigma * velocity.float()).to(sample.dtype)
            self._shape = None  # what the schedule decodes is not for the loop
            latents, layout = self._own.transition(number, latents, denoised)
            self._shape = latents.shape[1:]
            self._children.clear()
            run.next_stage(layout)
        return (latents, *result[1:]) if isinstance(result, tuple) else type(result)(prev_sample=latents)

    @contextmanager
    def _at_step(self, scheduler: Any) -> Iterator[float]:
        """Stand at the present step of the present stage, for the class's own step between two of its noise levels."""
        run, published = self._run, scheduler.sigmas
        sigmas = self.plan.stages[run.stage].sigmas
        assert sigmas is not None
        scheduler.sigmas, scheduler._step_index = self._sigmas[run.stage], run.stage_step
        try:
            yield sigmas[run.stage_step]
        finally:
            scheduler.sigmas = published

    def followed(self, latents: torch.Tensor, *, noise: bool = False) -> torch.Tensor:
        """Bring latents of the full grid to the present layout; with `noise` so that unit noise stays unit noise."""
        layout = self._run.layout
        return latents if layout is None else followed(self._family, latents, layout, noise=noise)

    def lifted(self, latents: torch.Tensor) -> torch.Tensor:
        """Bring latents that the run left in an early stage to the full grid; others are returned as they are."""
        layout = self._run.layout
        if layout is None or layout.kind == "fine" or latents.shape[1:] != self._shape:
            return latents
        return self._own.lift(latents)

    def lifted_result(self, result: Any) -> Any:
        """Bring the latents that a pipeline's call gives, of a run that was interrupted, to the full grid."""
        if isinstance(result, tuple):
            return (self.lifted(result[0]), *result[1:])
        name = next(iter(result))  # images, or the frames of a video
        setattr(result, name, self.lifted(result[name]))
        return result
