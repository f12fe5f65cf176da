"""The denoiser twin: the transformer's own forward, on a structural twin, with the stage and the caches in place."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fastdit.attention.base import AttentionKernel
from fastdit.blocks.attention import SeenAttention
from fastdit.blocks.observation import (
    observe,
    run_plainly,
    wiring_key,
    with_handler,
)
from fastdit.engine.workshop import EnginePass, Workshop
from fastdit.errors import IncompatibleStack, NoActiveRun, UnsupportedModel
from fastdit.layout import FineLayout
from fastdit.meter import FlopMeter
from fastdit.models.family import Family
from fastdit.nested import ArgumentNames, tensors_of
from fastdit.record import Clock, Outcome, StepRecord
from fastdit.run import Run
from fastdit.step import StepContext
from fastdit.step_cache.base import StepCache
from fastdit.step_cache.block_pass import BlockPass
from fastdit.step_cache.decision import BranchState
from fastdit.step_cache.forward_pass import ForwardPass
from fastdit.step_cache.segments import Cut
from fastdit.structure import same_object_twin, structural_twin
from fastdit.token_cache.base import TokenCache
from fastdit.token_cache.memory import TokenState
from fastdit.token_cache.token_pass import TokenPass
from fastdit.twins.hooks import rank_sum, through_hooks
from fastdit.twins.making import overriding, twin_class


class Session(Protocol):
    """What a denoiser twin needs of whoever owns it: the run that is open, if any."""

    active: Run | None

    @property
    def idle_is_plain(self) -> bool:
        """Whether a call outside a run is simply the plain forward (an empty stack)."""


@dataclass(frozen=True)
class _Call:
    """One forward in a run: where it stands, the children that a layout replaces, the engine that runs its blocks."""

    run: Run
    context: StepContext
    children: dict[str, Any]
    engine: EnginePass | None


class Denoiser:
    """Everything a denoiser twin does beyond its class: kept outside the module, so that the module stays untouched.

    `name` is the component's name in its pipeline ("transformer"). The wiring that was observed is kept between runs,
    keyed by which arguments were given, as it is cut for the cache; it describes the model and holds no tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        session: Session,
        cache: StepCache | None,
        family: Family | None,
        token_cache: TokenCache | None = None,
        attention: AttentionKernel | None = None,
        workshop: Workshop | None = None,
    ) -> None:
        refuse_foreign_behaviour(module, name)
        self.module = module
        self.name = name
        self.session = session
        self._cache = cache.for_transformer(module) if cache is not None else None
        self._token_cache = token_cache if token_cache is not None and not token_cache.neutral else None
        self._attention = attention if attention is not None and not attention.neutral else None
        self._workshop = workshop
        self._family = family
        self._cuts: dict[Hashable, Cut] = {}
        self._proved: set[Hashable] = set()
        self._meter: tuple[tuple[int, ...], FlopMeter] | None = None
        self._names = ArgumentNames(type(module).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward in the open run and record it."""
        run = self.session.active
        if run is None:
            if self.session.idle_is_plain:
                return self.module(*args, **kwargs)
            raise NoActiveRun(
                f"{self.name} is accelerated and was called outside a run, where its caches have no clock; call the "
                "pipeline, or wrap your loop in `with twin.fastdit.run(num_inference_steps=...)`"
            )
        if not self.session.idle_is_plain:
            refuse_foreign_behaviour(self.module, self.name)
        context = run.enter(self.name)
        arguments = self._names(args, kwargs)
        children: dict[str, Any] = {}
        seen: SeenAttention | None = None
        if run.schedule is not None:
            arguments, children = self._at_stage(run, arguments)
            seen = run.schedule.attending(context, self.module, arguments)
        engine = None
        if self._workshop is not None:
            engine = EnginePass(self._workshop, run, self.module, self._attention)
        clock = Clock(_device(arguments))
        with ExitStack() as acting:
            if self._attention is not None:
                acting.enter_context(self._attention.acting(run))
            if seen is not None:
                acting.enter_context(seen)
            if self._cache is None and self._token_cache is None and engine is None and not children:
                output, outcome = self.module(**arguments), Outcome()
            else:
                output, outcome = self._through_stack(_Call(run, context, children, engine), arguments)
        clock.stop()
        if seen is not None and not seen.answered and outcome.action == "computed":
            raise UnsupportedModel(
                f"the schedule acts in the attention of {self.name} ({type(self.module).__name__}), and a forward that "
                "ran whole called torch's scaled_dot_product_attention with text and image together nowhere; set an "
                "attention processor that does, or take another selector or frame"
            )
        if run.schedule is not None:
            assert self._family is not None and run.layout is not None
            output = self._family.velocity(output, run.layout)
        name = engine.name if engine is not None else "eager"
        self._record(run, context, arguments, children, clock, outcome, name)
        return output

    def _at_stage(self, run: Run, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put the stage's latents and token positions in place."""
        assert self._family is not None and run.schedule is not None
        # At the first step the pipeline still holds its full-size noise.
        given = run.grid if run.step == 0 else run.layout
        assert given is not None
        latents = self._family.latents_of(arguments, given)
        if run.step == 0:
            latents, layout = run.first_latents(latents)
            run.layout, run.stage_shape = layout, latents.shape[1:]
        assert run.layout is not None
        placed = self._family.place(arguments, given, latents, run.layout)
        key = self.name, latents.shape[0]
        if key not in run.stage_children:
            run.stage_children[key] = self._family.child_overrides(self.module, run.layout, latents)
        return placed, run.stage_children[key]

    def _through_stack(self, call: _Call, arguments: dict[str, Any]) -> tuple[Any, Outcome]:
        """Run the forward on a structural twin, between the hooks of the user's module."""
        if self._cache is not None and self._cache.whole_forward:
            return self._through_forward(call, arguments, self._cache)
        outcomes: list[Outcome] = []

        def forward(given: dict[str, Any]) -> Any:
            tokens = self._token_pass(call, given)
            if self._cache is not None:
                output, outcome = self._through_blocks(call, given, self._cache, tokens)
            else:
                output, outcome = self._uncached(call, given, call.children, tokens)
            outcomes.append(outcome)
            return output

        output = through_hooks(self.module, arguments, forward)
        call.run.weigh()
        return output, outcomes[0]

    def _uncached(
        self, call: _Call, arguments: dict[str, Any], children: dict[str, Any], tokens: TokenPass | None
    ) -> tuple[Any, Outcome]:
        """Run a forward that is not skipped, under the token cache or the engine if there is one."""
        if tokens is not None:
            return with_handler(self.module, tokens, children)(**arguments), tokens.end()
        if call.engine is not None:
            return with_handler(self.module, call.engine, children)(**arguments), Outcome()
        return structural_twin(self.module, children)(**arguments), Outcome()

    def _through_forward(self, call: _Call, arguments: dict[str, Any], cache: StepCache) -> tuple[Any, Outcome]:
        """Run or skip the whole forward; a token cache or an engine acts in those that run."""
        run, latents = call.run, next(iter(arguments.values()))
        if run.schedule is not None and cache.stage_change == "carry" and latents.dim() != 3:
            raise IncompatibleStack(
                f"{cache.describe()} keeps whole latents, and those of {self.name} change their shape with the stage; "
                "set stage_change='reset', or use a cache that skips blocks"
            )
        inner: list[Outcome] = []

        def compute(given: Mapping[str, Any], images: torch.Tensor | None) -> Any:
            own = call.children
            if images is not None and own:
                assert self._family is not None and run.layout is not None
                layout = run.layout.of_images(images)
                latents = self._family.latents_of(given, layout)
                given = self._family.place(given, layout, latents, layout)
                own = self._family.child_overrides(self.module, layout, latents)

            def forward(given: dict[str, Any]) -> Any:
                output, outcome = self._uncached(call, given, own, self._token_pass(call, given))
                inner.append(outcome)
                return output

            return through_hooks(self.module, dict(given), forward)

        passed = ForwardPass(cache, run)
        passed.begin(call.context, self._state(call, cache))
        output = passed.forward(arguments, compute)
        run.weigh()
        return output, passed.end().around(inner[0] if inner else None)

    def _through_blocks(
        self, call: _Call, arguments: dict[str, Any], cache: StepCache, tokens: TokenPass | None
    ) -> tuple[Any, Outcome]:
        """Run a forward whose blocks the step cache answers for; the first of its kind is observed as it runs."""
        key = wiring_key(arguments)
        children, run_block = call.children, call.engine.call if call.engine is not None else run_plainly
        seen = None if key in self._cuts else observe(self.module, arguments, children, run_block)
        if seen is not None:
            self._cuts[key] = Cut(seen.wiring, cache)
        passed = BlockPass(
            cache,
            self._cuts[key],
            call.run,
            reduce=rank_sum(self.module),
            run_block=tokens.call if tokens is not None else run_block,
            run_leading=run_block,
            proved=self._proved,
        )
        passed.begin(call.context, self._state(call, cache), seen.calls if seen is not None else ())
        output = seen.output if seen is not None else with_handler(self.module, passed, children)(**arguments)
        return output, passed.end().around(tokens.end() if tokens is not None else None)

    def _state(self, call: _Call, cache: StepCache) -> BranchState:
        return call.run.state((self.name, call.context.branch), BranchState, carry=cache.stage_change == "carry")

    def _token_pass(self, call: _Call, arguments: Mapping[str, Any]) -> TokenPass | None:
        """Begin a forward under the token cache, if there is one."""
        if self._token_cache is None:
            return None
        run, context, latents = call.run, call.context, next(iter(arguments.values()))
        layout = run.layout or run.grid
        patch = getattr(getattr(self.module, "config", None), "patch_size", None)
        if layout is None and isinstance(latents, torch.Tensor) and latents.dim() == 4 and isinstance(patch, int):
            layout = FineLayout(latents.shape[2] // patch, latents.shape[3] // patch)
        passed = TokenPass(self._token_cache, run)
        carry = self._token_cache.stage_change == "carry"
        passed.begin(context, run.state((self.name, context.branch, "tokens"), TokenState, carry=carry), layout)
        return passed

    def _current_meter(self) -> FlopMeter:
        """Get a counter for the module as it is: a new one where a child was added or replaced (LoRA, fusing)."""
        structure = tuple(_identities(self.module))
        if self._meter is None or self._meter[0] != structure:
            self._meter = (structure, FlopMeter(self.module))
        return self._meter[1]

    def _record(
        self,
        run: Run,
        context: StepContext,
        arguments: dict[str, Any],
        children: dict[str, Any],
        clock: Clock,
        outcome: Outcome,
        engine: str,
    ) -> None:
        first = next(iter(arguments.values()))
        latents = first if isinstance(first, torch.Tensor) else tensors_of(first)[0]
        batch = latents.shape[0] if isinstance(first, torch.Tensor) else len(first)
        tokens = outcome.tokens
        if tokens is None and run.layout is not None:
            tokens = run.layout.tokens
        elif tokens is None and latents.dim() == 3:
            tokens = latents.shape[1]
        sigma, meter = run.sigma(context.step), run.meter(self.name, self._current_meter)
        key = meter.key(arguments, children)

        def make(seconds: float) -> StepRecord:
            return StepRecord(
                context.step, context.stage, context.branch, self.name, None if sigma is None else float(sigma), tokens,
                batch, outcome.action, outcome.reason, seconds, engine, outcome.saved, meter, key,
            )  # fmt: skip

        run.note(clock, make)


def denoiser_twin(denoiser: Denoiser, controller: Any) -> nn.Module:
    """Make the module that stands in for `denoiser.module`: same class name, same weights, same attributes."""
    module = denoiser.module
    cls = type(module)

    @contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        run = denoiser.session.active
        with ExitStack() as contexts:
            if run is not None:
                contexts.enter_context(run.branch(name))
            if run is None or module.is_cache_enabled:
                contexts.enter_context(cls.cache_context(self, name, *args, **kwargs))  # type: ignore[attr-defined]
            yield

    def _reset_stateful_cache(self: Any, recurse: bool = True) -> None:
        # The class's own would write an empty registry to the user's module, where no cache of diffusers is enabled.
        if module.is_cache_enabled:
            cls._reset_stateful_cache(self, recurse)  # type: ignore[attr-defined]

    members: dict[str, Any] = {
        "__call__": overriding(cls.__call__, lambda self, *args, **kwargs: denoiser(*args, **kwargs)),
        "fastdit": property(lambda self: controller),
    }
    if hasattr(cls, "cache_context"):
        members["cache_context"] = cache_context
        members["_reset_stateful_cache"] = _reset_stateful_cache
    return same_object_twin(module, twin_class(cls, members))


def refuse_foreign_behaviour(module: nn.Module, name: str) -> None:
    """Raise `IncompatibleStack` where something else already changes how the module runs as a whole."""
    if getattr(module, "is_cache_enabled", False):
        raise IncompatibleStack(
            f"{name} already has a cache of diffusers enabled, and two caches would feed on each other; call "
            f"{name}.disable_cache() first"
        )
    if "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None:
        raise IncompatibleStack(
            f"{name} is compiled as a whole, which hides its blocks; accelerate the uncompiled module, and compile its "
            "blocks with compile_repeated_blocks() if you wish"
        )


def _identities(module: nn.Module) -> list[int]:
    """List the identities of a module's parts; several times faster than `modules()`, which also looks for repeats."""
    found, waiting = [], [module]
    while waiting:
        part = waiting.pop()
        found.append(id(part))
        waiting.extend(child for child in part._modules.values() if child is not None)
    return found


def _device(arguments: Mapping[str, Any]) -> torch.device:
    return tensors_of(next(iter(arguments.values())))[0].device
