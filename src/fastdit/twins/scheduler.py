"""The scheduler twin: the class's own steps, on the stages of a schedule, ticking the run's clock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastdit.errors import IncompatibleStack, UnsupportedModel
from fastdit.nested import Value
from fastdit.run import Run
from fastdit.schedule.stage_pass import StagePass
from fastdit.step import SchedulePlan
from fastdit.twins.making import overriding, twin_class

#: What a run's scheduler does in its own way.
_METHODS = ("set_timesteps", "set_begin_index", "scale_noise", "step")


def scheduler_twin(scheduler: Any, run: Run, stages: StagePass | None = None) -> Value:
    """Copy a scheduler for one run, whose steps it counts; `stages` are those of a schedule.

    Its state is the run's own; the user's scheduler is not touched.
    """
    cls = type(scheduler)
    if stages is not None and "FlowMatchEulerDiscreteScheduler" not in (base.__name__ for base in cls.__mro__):
        raise UnsupportedModel(
            f"a schedule re-noises latents between stages, which is defined for flow matching; {cls.__name__} is not "
            "FlowMatchEulerDiscreteScheduler, so set that scheduler or leave the schedule out"
        )
    if replaced := next((name for name in _METHODS if name in vars(scheduler)), None):
        raise IncompatibleStack(
            f"{cls.__name__} has a {replaced} of its own on the object, past which a run's clock would not tick; write "
            "a subclass with it"
        )
    twin = copy.deepcopy(scheduler)

    def set_timesteps(self: Any, *args: Value, **kwargs: Value) -> None:
        if stages is None:
            cls.set_timesteps(self, *args, **kwargs)
        else:
            _set_stages(self, stages.plan, kwargs.get("device") or torch.device("cpu"))
        sigmas = getattr(self, "sigmas", None)
        run.timetable(() if sigmas is None else sigmas, len(self.timesteps))

    def set_begin_index(self: Any, begin_index: int = 0) -> None:
        cls.set_begin_index(self, begin_index)
        run.begin(len(self.timesteps) - begin_index, begin_index)

    def scale_noise(self: Any, sample: Any, timestep: Any, noise: Any = None) -> Value:
        if stages is None:
            return cls.scale_noise(self, sample, timestep, noise)
        if run.step == 0:
            stages.begin_with(sample)
        else:
            # Between steps, what a mask protects is given the next step's noise.
            sample, noise = stages.followed(sample), stages.followed(noise, noise=True)
        # The class looks for its place in the timesteps, where the end of a stage is not the next one's start.
        self._step_index, self._begin_index = None, run.index
        return cls.scale_noise(self, sample, timestep, noise)

    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Value, **kwargs: Value) -> Value:
        if stages is None:
            result = cls.step(self, model_output, timestep, sample, *args, **kwargs)
            run.tick()
            return result
        if run.step == 0:
            # The pipeline still holds its full-size latents; the stage's own are made of them.
            sample = stages.first_latents(sample)
        with _in_stage(self, run, stages.plan) as sigma:
            result = cls.step(self, model_output, timestep, sample, *args, **kwargs)
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        stages.observe(model_output)
        stage, number = stages.plan.stages[run.stage], run.stage
        ends = run.stage_step + 1 == stage.steps and number + 1 < len(stages.plan.stages)
        run.tick()
        if ends:
            denoised = (sample.float() - sigma * model_output.float()).to(sample.dtype)
            latents = stages.next_stage(number, latents, denoised)
        return (latents, *result[1:]) if isinstance(result, tuple) else type(result)(prev_sample=latents)

    own: tuple[Callable[..., Any], ...] = (set_timesteps, set_begin_index, scale_noise, step)
    members = {
        name: overriding(getattr(cls, name), f) for name, f in zip(_METHODS, own, strict=True) if hasattr(cls, name)
    }
    if not hasattr(cls, "scale_model_input"):
        # Pipelines that compare a scheduler's class, and not what it can do, ask it of every other class.
        members["scale_model_input"] = lambda self, sample, *args, **kwargs: sample
    twin.__class__ = twin_class(cls, members)
    return twin


def _set_stages(scheduler: Any, plan: SchedulePlan, device: Any) -> None:
    """Publish the timesteps of every stage as one list, which is what the pipeline's loop walks along."""
    starts = [sigma for stage in plan.stages for sigma in (stage.sigmas or ())[:-1]]
    sigmas = torch.tensor(starts, dtype=torch.float32, device=device)
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    scheduler._stage_sigmas = [torch.tensor(stage.sigmas, dtype=torch.float32, device=device) for stage in plan.stages]
    scheduler.timesteps = sigmas * scheduler.config.num_train_timesteps
    scheduler.num_inference_steps = len(starts)
    scheduler._step_index = None
    scheduler._begin_index = None


@contextmanager
def _in_stage(scheduler: Any, run: Run, plan: SchedulePlan) -> Iterator[float]:
    """Stand at the present step of the present stage, for the class's own step between two of its noise levels."""
    sigmas = plan.stages[run.stage].sigmas
    assert sigmas is not None
    published = scheduler.sigmas
    scheduler.sigmas, scheduler._step_index = scheduler._stage_sigmas[run.stage], run.stage_step
    try:
        yield sigmas[run.stage_step]
    finally:
        scheduler.sigmas = published
