"""The scheduler twin: the class's own steps, on the stages of a schedule, ticking the run's clock."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fastdit.errors import UnsupportedModel
from fastdit.run import Run
from fastdit.twins.making import overriding, twin_class


def scheduler_twin(scheduler: Any, run: Run) -> Any:
    """Copy a scheduler for one run. Its state is the run's own; the user's scheduler is not touched."""
    cls = type(scheduler)
    if run.plan is not None and "FlowMatchEulerDiscreteScheduler" not in (base.__name__ for base in cls.__mro__):
        raise UnsupportedModel(
            f"a schedule re-noises latents between stages, which is defined for flow matching; {cls.__name__} is not "
            "FlowMatchEulerDiscreteScheduler, so set that scheduler or leave the schedule out"
        )
    twin = copy.deepcopy(scheduler)

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if run.plan is None:
            cls.set_timesteps(self, *args, **kwargs)
        else:
            _set_stages(self, run, kwargs.get("device"))
        sigmas = getattr(self, "sigmas", None)
        run.sigmas = () if sigmas is None else tuple(sigmas)
        run.begin(len(self.timesteps))

    def set_begin_index(self: Any, begin_index: int = 0) -> None:
        cls.set_begin_index(self, begin_index)
        run.begin(len(self.timesteps) - begin_index, begin_index)

    def scale_noise(self: Any, sample: Any, timestep: Any, noise: Any = None) -> Any:
        if run.plan is None:
            return cls.scale_noise(self, sample, timestep, noise)
        if run.step == 0:
            # Autoencoders of videos give a picture an axis of one frame.
            run.picture = sample.flatten(1, 2) if sample.dim() == 5 else sample
        else:
            # Between steps, what a mask protects is given the next step's noise.
            sample, noise = run.followed(sample), run.followed(noise, noise=True)
        # The class looks for its place in the timesteps, where the end of a stage is not the next one's start.
        self._step_index, self._begin_index = None, run.index
        return cls.scale_noise(self, sample, timestep, noise)

    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if run.schedule is None:
            result = cls.step(self, model_output, timestep, sample, *args, **kwargs)
            run.tick()
            return result
        return _staged_step(self, cls, run, model_output, timestep, sample, args, kwargs)

    members = {
        name: overriding(getattr(cls, name), function)
        for name, function in (
            ("set_timesteps", set_timesteps),
            ("set_begin_index", set_begin_index),
            ("scale_noise", scale_noise),
            ("step", step),
        )
        if hasattr(cls, name)
    }
    if not hasattr(cls, "scale_model_input"):
        # Pipelines that compare a scheduler's class, and not what it can do, ask it of every other class.
        members["scale_model_input"] = lambda self, sample, *args, **kwargs: sample
    twin.__class__ = twin_class(cls, members)
    return twin


def _set_stages(scheduler: Any, run: Run, device: Any) -> None:
    """Publish the timesteps of every stage as one list, which is what the pipeline's loop walks along."""
    assert run.plan is not None
    starts = [sigma for stage in run.plan.stages for sigma in (stage.sigmas or ())[:-1]]
    sigmas = torch.tensor(starts, dtype=torch.float32, device=device)
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    run.stage_sigmas = [torch.tensor(stage.sigmas, dtype=torch.float32, device=device) for stage in run.plan.stages]
    scheduler.timesteps = sigmas * scheduler.config.num_train_timesteps
    scheduler.num_inference_steps = len(starts)
    scheduler._step_index = None
    scheduler._begin_index = None


def _staged_step(
    scheduler: Any, cls: type, run: Run, model_output: Any, timestep: Any, sample: Any, args: Any, kwargs: Any
) -> Any:
    """Take the class's own step between two sigmas of the stage, and switch stages after its last."""
    assert run.plan is not None and run.schedule is not None
    if run.step == 0:
        # The pipeline still holds its full-size latents; the stage's own are made of them.
        sample, _ = run.first_latents(sample)
    stage = run.plan.stages[run.stage]
    assert stage.sigmas is not None
    published = scheduler.sigmas
    sigma = stage.sigmas[run.stage_step]
    scheduler.sigmas = run.stage_sigmas[run.stage]
    scheduler._step_index = run.stage_step
    try:
        result = cls.step(scheduler, model_output, timestep, sample, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        scheduler.sigmas = published
    run.schedule.observe(model_output)
    latents = result[0] if isinstance(result, tuple) else result.prev_sample
    ends = run.stage_step + 1 == stage.steps and run.stage + 1 < len(run.plan.stages)
    number = run.stage
    run.tick()
    if ends:
        denoised = (sample.float() - sigma * model_output.float()).to(sample.dtype)
        latents, layout = run.schedule.transition(number, latents, denoised)
        run.next_stage(latents, layout)
    if isinstance(result, tuple):
        return (latents, *result[1:])
    return type(result)(prev_sample=latents)
