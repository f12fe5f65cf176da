"""The pipeline twin: an instance of the pipeline's class whose transformers and scheduler are twins."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch

from fastdit.models.components import parts_of, pipeline_type
from fastdit.models.following import Following
from fastdit.nested import Args, Kwargs, Value, map_tensors
from fastdit.schedule.stage_pass import StagePass
from fastdit.structure import same_object_twin
from fastdit.twins.making import overriding, twin_class

#: Attributes about the shared weights' placement and adapters: one truth for the pipeline and its twin.
_SHARED = ("_all_hooks", "_offload_device", "_offload_gpu_id", "hf_device_map", "num_fused_loras", "_merged_adapters")

#: The method by which pipelines make their mask, and the latents of the picture that it hides.
_MASKS = "prepare_mask_latents"


class PipelineSession(Protocol):
    """What a pipeline twin needs of its controller."""

    base: Any

    @property
    def stages(self) -> StagePass | None:
        """The stages of the run that is open; None where none is, or it has no schedule."""

    def component(self, name: str) -> Value:
        """Give the component that the twin shows under a name."""

    def replace(self, name: str, value: Value) -> None:
        """Take a component that was assigned on the twin."""

    def call(self, twin: Any, args: Args, kwargs: Kwargs) -> Value:
        """Run one call."""


def pipeline_twin(pipeline: Any, session: PipelineSession, lifted: tuple[str, ...]) -> Value:
    """Make the twin. `lifted` names methods whose first argument is latents that may stand in an early stage."""
    cls = type(pipeline)
    members: Kwargs = {
        "__call__": overriding(cls.__call__, lambda self, *args, **kwargs: session.call(self, args, kwargs)),
        "save_pretrained": overriding(
            cls.save_pretrained, lambda self, *args, **kwargs: self.fastdit.plain(self).save_pretrained(*args, **kwargs)
        ),
        "__reduce_ex__": lambda self, protocol: self.fastdit.pickled(self),
        "fastdit": property(lambda self: session),
    }
    for name in parts_of(pipeline):
        members[name] = _component(session, name)
    for name in _SHARED:
        members[name] = _shared(session, name)
    for name in lifted:
        if "." not in name:
            members[name] = _lifting(session, cls, name)
    if lifted and hasattr(cls, _MASKS):
        members[_MASKS] = _following(session, cls)
    twin = _showing(pipeline, members)
    for name, value in vars(pipeline).items():
        if isinstance(value, pipeline_type()):
            twin.__dict__[name] = _inner_twin(value, pipeline, session)
    return twin


def _showing(pipeline: Any, members: Kwargs) -> Value:
    """Make an object of a subclass with `members`, and with the attributes of a pipeline that they don't stand for."""
    twin_cls: Any = twin_class(type(pipeline), members)
    twin = twin_cls.__new__(twin_cls)
    twin.__dict__.update({key: value for key, value in vars(pipeline).items() if key not in members})
    return twin


def _inner_twin(inner: Any, pipeline: Any, session: PipelineSession) -> Value:
    """Make the twin of a pipeline that another one runs: the parts of the other that it is made of are the twin's."""
    names = {id(part): name for name, part in parts_of(pipeline).items() if part is not None}
    shared = {name: names[id(part)] for name, part in parts_of(inner).items() if id(part) in names}
    return _showing(inner, {name: _component(session, outer) for name, outer in shared.items()})


def _component(session: PipelineSession, name: str) -> property:
    return property(lambda self: session.component(name), lambda self, value: session.replace(name, value))


def _shared(session: PipelineSession, name: str) -> property:
    def read(self: Any) -> Value:
        return getattr(session.base, name)

    def write(self: Any, value: Value) -> None:
        setattr(session.base, name, value)

    return property(read, write)


def _lifting(session: PipelineSession, cls: type, name: str) -> Value:
    """Wrap a (static) method of the pipeline so that latents of an interrupted run reach it at full size."""
    original = getattr(cls, name)
    static = isinstance(inspect.getattr_static(cls, name), staticmethod)

    def lifted(self: Any, latents: torch.Tensor, *args: Value, **kwargs: Value) -> Value:
        latents = lift(session.stages, latents)
        return original(latents, *args, **kwargs) if static else original(self, latents, *args, **kwargs)

    return overriding(original, lifted)


def _following(session: PipelineSession, cls: type) -> Value:
    """Wrap what makes a mask: the loop gets what follows the stages of the run."""
    original = getattr(cls, _MASKS)

    def following(self: Any, *args: Value, **kwargs: Value) -> Value:
        made = original(self, *args, **kwargs)
        stages = session.stages
        return made if stages is None else map_tensors(made, lambda full: Following(full, stages.followed))

    return overriding(original, following)


def lifting_component(component: Any, method: str, session: PipelineSession) -> Value:
    """Stand in for a component: latents of an interrupted run reach its `method` at full size."""

    def lifted(self: Any, latents: torch.Tensor, *args: Value, **kwargs: Value) -> Value:
        own = vars(self).get(method) or getattr(type(component), method).__get__(self)
        return own(lift(session.stages, latents), *args, **kwargs)

    # A property, for a method that was replaced on the object itself (by a compiled one) comes before the class's.
    shown = property(lambda self: lifted.__get__(self))
    return same_object_twin(component, twin_class(type(component), {method: shown}))


def lift(stages: StagePass | None, latents: torch.Tensor) -> torch.Tensor:
    """Bring latents that a run left in an early stage to the full grid; others are returned as they are."""
    return latents if stages is None else stages.lifted(latents)
