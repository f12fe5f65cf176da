"""A schedule in a run: the stage's latents and token places in every forward, and what the pipeline's loop still holds.

The pipeline's loop walks along the timesteps of all stages with latents of the stage's own shape. It knows nothing of
that: its first latents, the picture that it begins with and its masks are of full size, and are brought to the stage
here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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

    def begin_with(self, picture: torch.Tensor) -> None:
        """Take in the latents of the picture that the run begins with, where it does not begin with noise alone."""
        # Autoencoders of videos give a picture an axis of one frame.
        self._picture = picture.flatten(1, 2) if picture.dim() == 5 else picture

    def first_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Make the first step's latents of what the pipeline holds at full size, and stand on their layout."""
        run = self._run
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

    def observe(self, velocity: torch.Tensor) -> None:
        """See the velocity that a step was taken with."""
        self._own.observe(velocity)

    def next_stage(self, stage: int, latents: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """Turn the last latents of `stage` into the next stage's, given the estimate of the clean ones."""
        latents, layout = self._own.transition(stage, latents, denoised)
        self._shape = latents.shape[1:]
        self._children.clear()
        self._run.next_stage(layout)
        return latents

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
