"""The scheduler twin: the class's own steps, on the stages of a schedule, ticking the run's clock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from fastdit.errors import IncompatibleStack, UnsupportedModel
from fastdit.nested import Value
from fastdit.run import Run
from fastdit.schedule.stage_pass import StagePass
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
            stages.publish(self, kwargs.get("device"))
        sigmas = getattr(self, "sigmas", None)
        run.timetable(() if sigmas is None else sigmas, len(self.timesteps))

    def set_begin_index(self: Any, begin_index: int = 0) -> None:
        cls.set_begin_index(self, begin_index)
        run.begin(len(self.timesteps) - begin_index, begin_index)

    def scale_noise(self: Any, sample: Any, timestep: Any, noise: Any = None) -> Value:
        if stages is not None:
            sample, noise = stages.noised(self, sample, noise)
        return cls.scale_noise(self, sample, timestep, noise)

    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Value, **kwargs: Value) -> Value:
        def own(sample: Any) -> Value:
            return cls.step(self, model_output, timestep, sample, *args, **kwargs)

        if stages is not None:
            return stages.take_step(self, own, model_output, sample)
        result = own(sample)
        run.tick()
        return result

    own: tuple[Callable[..., Any], ...] = (set_timesteps, set_begin_index, scale_noise, step)
    members = {
        name: overriding(getattr(cls, name), f) for name, f in zip(_METHODS, own, strict=True) if hasattr(cls, name)
    }
    if not hasattr(cls, "scale_model_input"):
        # Pipelines that compare a scheduler's class, and not what it can do, ask it of every other class.
        members["scale_model_input"] = lambda self, sample, *args, **kwargs: sample
    twin.__class__ = twin_class(cls, members)
    return twin
