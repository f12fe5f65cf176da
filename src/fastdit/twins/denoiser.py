"""The denoiser twin: the transformer's own forward, on a structural twin, with the stage and the caches in place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from fastdit.caching.step_cache import BranchState, CachePass, StepCache
from fastdit.caching.token_cache import TokenCache, TokenPass, TokenState
from fastdit.errors import IncompatibleStack, NoActiveRun
from fastdit.flops import FlopMeter
from fastdit.layout import TokenLayout
from fastdit.models.family import Family
from fastdit.run import Clock, Run, StepContext, StepRecord
from fastdit.structure import named_arguments, same_object_twin, structural_twin, tensors_of
from fastdit.wiring import Wiring, observe, wiring_key, with_handler

from .making import overriding, twin_class


class Session(Protocol):
    """What a denoiser twin needs of whoever owns it: the run that is open, if any."""

    active: Run | None

    @property
    def idle_is_plain(self) -> bool:
        """Whether a call outside a run is simply the plain forward (an empty stack)."""


class Denoiser:
    """Everything a denoiser twin does beyond its class: kept outside the module, so that the module stays untouched.

    `name` is the component's name in its pipeline ("transformer"). The wiring that was observed is kept between runs,
    keyed by which arguments were given; it describes the model and holds no tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        session: Session,
        cache: StepCache | None,
        family: Family | None,
        token_cache: TokenCache | None = None,
    ) -> None:
        refuse_foreign_behaviour(module, name)
        self.module = module
        self.name = name
        self.session = session
        self._cache = cache.for_transformer(module) if cache is not None else None
        self._token_cache = token_cache if token_cache is not None and not token_cache.neutral else None
        self._family = family
        self._wirings: dict[str, Wiring] = {}
        self._meter: tuple[tuple[int, ...], FlopMeter] | None = None
        self._signature = inspect.signature(type(module).forward)

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
        arguments = _named(self._signature, args, kwargs)
        children: dict[str, Any] = {}
        if run.schedule is not None:
            arguments, children = self._at_stage(run, arguments)
        clock = Clock(_device(arguments))
        passed: CachePass | TokenPass | None = None
        if self._cache is None and self._token_cache is None and not children:
            output = self.module(**arguments)
        else:
            output, passed = self._through_stack(run, context, arguments, children)
        clock.stop()
        self._record(run, context, arguments, clock, passed)
        return output

    def _at_stage(self, run: Run, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put the stage's latents and token positions in place."""
        assert self._family is not None and run.schedule is not None
        first = next(iter(arguments))
        latents = arguments[first]
        if run.layout is None:
            latents, run.layout = run.schedule.initial(latents)
            run.stage_latents = latents
        elif run.step == 0:
            latents = run.stage_latents  # another branch of the first step
        placed = self._family.place({**arguments, first: latents}, run.layout)
        if self.name not in run.stage_children:
            overrides = self._family.child_overrides(self.module, run.layout, latents.device)
            run.stage_children[self.name] = overrides
        return placed, run.stage_children[self.name]

    def _through_stack(
        self, run: Run, context: StepContext, arguments: dict[str, Any], children: dict[str, Any]
    ) -> tuple[Any, CachePass | TokenPass | None]:
        """Run the forward on a structural twin, with offload hooks of the user's module around it."""
        hook = self.module.__dict__.get("_hf_hook")
        if hook is not None:
            _, arguments = hook.pre_forward(self.module, **arguments)
        passed: CachePass | TokenPass | None = None
        if self._cache is None and self._token_cache is None:
            output = structural_twin(self.module, children)(**arguments)
        elif self._cache is None:
            passed = self._token_pass(run, context, arguments)
            output = with_handler(self.module, passed, children)(**arguments)
            passed.end()
        else:
            key = wiring_key(arguments)
            seen = None if key in self._wirings else observe(self.module, arguments, children)
            if seen is not None:
                self._wirings[key] = seen.wiring
            passed = CachePass(self._cache, self._wirings[key], run)
            state = run.state((self.name, context.branch), BranchState)
            passed.begin(context, state, seen.calls if seen is not None else ())
            output = seen.output if seen is not None else with_handler(self.module, passed, children)(**arguments)
            passed.end()
        return (hook.post_forward(self.module, output) if hook is not None else output), passed

    def _token_pass(self, run: Run, context: StepContext, arguments: dict[str, Any]) -> TokenPass:
        """Begin a forward under the token cache."""
        assert self._token_cache is not None
        layout, latents = run.layout, next(iter(arguments.values()))
        patch = getattr(getattr(self.module, "config", None), "patch_size", None)
        if layout is None and run.grid is not None:
            layout = TokenLayout(*run.grid, coarse=False)
        elif layout is None and isinstance(latents, torch.Tensor) and latents.dim() == 4 and isinstance(patch, int):
            layout = TokenLayout(latents.shape[2] // patch, latents.shape[3] // patch, coarse=False)
        passed = TokenPass(self._token_cache, run)
        passed.begin(context, run.state((self.name, context.branch, "tokens"), TokenState), layout)
        return passed

    def _current_meter(self) -> FlopMeter:
        """Get a counter for the module as it is: a new one where a child was added or replaced (LoRA, fusing)."""
        structure = tuple(id(module) for module in self.module.modules())
        if self._meter is None or self._meter[0] != structure:
            self._meter = (structure, FlopMeter(self.module))
        return self._meter[1]

    def _record(
        self,
        run: Run,
        context: StepContext,
        arguments: dict[str, Any],
        clock: Clock,
        passed: CachePass | TokenPass | None,
    ) -> None:
        first = next(iter(arguments.values()))
        latents = first if isinstance(first, torch.Tensor) else tensors_of(first)[0]
        batch = latents.shape[0] if isinstance(first, torch.Tensor) else len(first)
        tokens = passed.tokens if passed is not None else latents.shape[1] if latents.dim() == 3 else None
        if isinstance(passed, TokenPass):
            saved = passed.saved
        else:
            saved = dict.fromkeys(passed.skipped, 1.0) if passed is not None else {}
        action = passed.action if passed is not None else "computed"
        reason = passed.reason if passed is not None else "no cache"
        sigma, meter = run.sigma(context.step), run.meter(self.name, self._current_meter)
        key = meter.key(arguments)

        def make(seconds: float) -> StepRecord:
            return StepRecord(
                context.step, context.stage, context.branch, None if sigma is None else float(sigma), tokens, batch,
                action, reason, seconds, saved, meter, key,
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
    if hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None:
        raise IncompatibleStack(
            f"{name} is compiled as a whole, which hides its blocks; accelerate the uncompiled module, and compile its "
            "blocks with compile_repeated_blocks() if you wish"
        )


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a forward, without its `self`, in the forward's order."""
    return dict(list(named_arguments(signature.bind(None, *args, **kwargs)).items())[1:])


def _device(arguments: Mapping[str, Any]) -> torch.device:
    return tensors_of(next(iter(arguments.values())))[0].device
