"""The transformer's twin: every call of it goes through the chain of the open run, and is recorded."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fastdit.blocks.chain import Chain, ForwardCall
from fastdit.errors import NoActiveRun
from fastdit.meter import FlopMeter
from fastdit.nested import ArgumentNames, Kwargs, Value
from fastdit.record import Outcome, StepRecord, Stopwatch
from fastdit.run import Run
from fastdit.schedule.stage_pass import StagePass
from fastdit.structure import identities, refuse_foreign_behaviour, same_object_twin
from fastdit.twins.making import overriding, twin_class


@dataclass(frozen=True)
class OpenRun:
    """A run that is open: its clock, the chain of what acts in it, its stages, and what stands in for components."""

    run: Run
    chain: Chain
    stages: StagePass | None
    components: Mapping[str, Value]


class Session(Protocol):
    """What a transformer's twin needs of whoever owns it: the run that is open, if any."""

    @property
    def open_run(self) -> OpenRun | None:
        """The run that is open."""

    @property
    def idle_is_plain(self) -> bool:
        """Whether a call outside a run is simply the plain forward (an empty stack)."""


class TransformerTwin:
    """Everything a transformer's twin does beyond its class: kept outside the module, which stays untouched.

    `name` is the component's name in its pipeline ("transformer"). `session` gives the twin's owner, None once that is
    gone: other libraries may keep a pipeline's transformer, and must not keep its twin by that.
    """

    def __init__(self, module: nn.Module, name: str, session: Callable[[], Session | None]) -> None:
        refuse_foreign_behaviour(module, name)
        self.module, self.name, self._session = module, name, session
        self._names = ArgumentNames(type(module).forward)
        self._meter: tuple[list[int], FlopMeter] | None = None
        self._metered: weakref.ref[Run] | None = None  # a run's layout holds tensors

    @property
    def session(self) -> Session:
        """The owner. Raises `NoActiveRun` once it is gone."""
        session = self._session()
        if session is None:
            raise NoActiveRun(f"{self.name} is of a pipeline's twin that is gone; keep what `accelerate` gave")
        return session

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        """Run one forward through the open run's chain and record it."""
        session = self._session() or self.session
        opened = session.open_run
        if opened is None:
            if session.idle_is_plain:
                return self.module(*args, **kwargs)
            raise NoActiveRun(
                f"{self.name} is accelerated and was called outside a run, where its caches have no clock; call the "
                "pipeline, or wrap your loop in `with twin.fastdit.run(num_inference_steps=...)`"
            )
        if not session.idle_is_plain:
            refuse_foreign_behaviour(self.module, self.name)
        arguments = self._names(args, kwargs)
        call = ForwardCall(self.module, self.name, opened.run.enter(arguments.get("timestep")), arguments)
        stopwatch = Stopwatch(call.device)
        output, outcome = opened.chain.run(call)
        stopwatch.stop()
        opened.run.note(stopwatch, self._record(opened, call, outcome), computed=outcome.action == "computed")
        return output

    def _record(self, opened: OpenRun, call: ForwardCall, outcome: Outcome) -> Callable[[float], StepRecord]:
        """Give what makes the record of a forward, once its time is known; no tensor of the call is kept."""
        run, chain, step, latents, tokens = opened.run, opened.chain, call.step, call.latents, outcome.tokens
        if run.layout is not None:
            tokens = tokens or run.layout.tokens
        elif tokens is None and isinstance(latents, torch.Tensor) and latents.dim() == 3:
            tokens = latents.shape[1]
        if self._metered is None or self._metered() is not run:
            self._metered = weakref.ref(run)
            structure = identities(self.module)
            if self._meter is None or self._meter[0] != structure:
                self._meter = structure, FlopMeter(self.module)
        assert self._meter is not None
        meter, sigma, batch = self._meter[1], run.sigma(step.step), len(latents)
        kind = meter.kind(call.arguments, call.children)
        called = kind.called = tuple(chain.called) or kind.called

        def make(seconds: float) -> StepRecord:
            return StepRecord(
                step.step, step.stage, step.branch, self.name, sigma, tokens, batch,
                outcome.action, outcome.reason, seconds, outcome.engine or "eager", outcome.saved, kind, called,
            )  # fmt: skip

        return make


def transformer_twin(twin: TransformerTwin) -> nn.Module:
    """Make the module that stands in for `twin.module`: same class name, same weights, same attributes.

    What other libraries put on it is put on the user's module, and refers to that.
    """
    module = twin.module
    cls: Any = type(module)

    @contextmanager
    def cache_context(self: Any, name: str, *args: Value, **kwargs: Value) -> Iterator[None]:
        opened = twin.session.open_run
        with ExitStack() as contexts:
            if opened is not None:
                contexts.enter_context(opened.run.branch(name))
            if opened is None or module.is_cache_enabled:
                contexts.enter_context(cls.cache_context(self, name, *args, **kwargs))
            yield

    def _reset_stateful_cache(self: Any, recurse: bool = True) -> None:
        # The class's own would write an empty registry to the user's module, where no cache of diffusers is enabled.
        if module.is_cache_enabled:
            cls._reset_stateful_cache(self, recurse)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if getattr(value, "_module_ref", None) is self:  # a registry of hooks of diffusers
            value._module_ref = module
        setattr(module, name, value)

    members: Kwargs = {
        "__call__": overriding(cls.__call__, lambda self, *args, **kwargs: twin(*args, **kwargs)),
        "__setattr__": __setattr__,
        "__eq__": lambda self, other: other is self or other is module,
        "__hash__": lambda self: hash(module),
        "__reduce_ex__": lambda self, protocol: self.fastdit.pickled(self) or (copy.copy, (module,)),
        "fastdit": property(lambda self: twin.session),
    }
    if hasattr(cls, "enable_group_offload"):
        members["enable_group_offload"] = property(lambda self: module.enable_group_offload)
    if hasattr(cls, "cache_context"):
        members["cache_context"] = cache_context
        members["_reset_stateful_cache"] = _reset_stateful_cache
    return same_object_twin(module, twin_class(cls, members))
