"""`accelerate`: a twin of a pipeline that runs a stack, and the controller behind it."""

from __future__ import annotations

import inspect
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

from torch import nn

from fastdit.accelerator import Accelerator, Level
from fastdit.config import is_count
from fastdit.engine.warmup import WarmUp, progress_bar
from fastdit.engine.workshop import Workshop
from fastdit.errors import ConcurrentCall, InvalidConfig, NeverFired
from fastdit.layout import FineLayout
from fastdit.models.components import (
    BARE,
    DENOISERS,
    denoisers_of,
    pipeline_type,
)
from fastdit.models.family import family_of
from fastdit.models.following import followed
from fastdit.nested import named_arguments
from fastdit.plan import (
    Plan,
    fewest_steps,
    make_plan,
    schedule_plan,
)
from fastdit.record import RunRecord
from fastdit.run import Run
from fastdit.stack import Stack
from fastdit.step_cache.base import StepCache
from fastdit.token_cache.base import TokenCache
from fastdit.twins.pipeline import lift, lifting_component, pipeline_twin
from fastdit.twins.scheduler import scheduler_twin
from fastdit.twins.transformer import Denoiser, denoiser_twin

_Base = TypeVar("_Base")


def accelerate(
    pipeline: _Base, stack: Stack | Iterable[Accelerator] | Accelerator = (), *, strict: bool = False
) -> _Base:
    """Give a twin of a diffusers pipeline, or of a bare transformer, that runs a stack of accelerators.

    The twin is an instance of the same class with the same call and shares the weights; `pipeline` itself is not
    touched. `strict` turns the warning about an accelerator that never fired into an error.

    Raises `InvalidConfig`, `IncompatibleStack` or `UnsupportedModel` and leaves no trace if the stack can't run.
    """
    stack = stack if isinstance(stack, Stack) else Stack(stack)
    if hasattr(type(pipeline), "fastdit"):
        raise InvalidConfig("this is a twin already; accelerate the pipeline it was made of, twin.fastdit.base")
    controller = Acceleration(pipeline, stack, strict=strict)
    if isinstance(pipeline, nn.Module):
        return cast(_Base, controller.component(BARE))
    return cast(_Base, pipeline_twin(pipeline, controller, _lifted(pipeline, stack)))


class Acceleration:
    """The controller behind a twin, reached as `twin.fastdit`: its stack, plan and last run."""

    def __init__(self, base: Any, stack: Stack, *, strict: bool, workshop: Workshop | None = None) -> None:
        stack.check(base)
        self.base = base
        self.stack = stack
        self.strict = strict
        self.active: Run | None = None
        self.last_run: RunRecord | None = None
        self.workshop = workshop if workshop is not None or stack.engine is None else Workshop(stack.engine)
        self._family = family_of(base) if isinstance(base, pipeline_type()) else None
        self._lock = threading.Lock()
        self._replaced: dict[str, Any] = {}
        self._scheduler: Any = None
        self._stand_ins: dict[str, Any] = {}
        self._denoisers: dict[str, tuple[Denoiser, nn.Module]] = {}
        for name, module in denoisers_of(base).items():
            self._twin_of(name, module)

    @property
    def idle_is_plain(self) -> bool:
        return len(self.stack) == 0

    def plan(self, height: int | None = None, width: int | None = None, num_inference_steps: int | None = None) -> Plan:
        """Plan a call: stages, tokens, noise levels. Raises what the call itself would raise for these values."""
        plan = make_plan(self.stack, self.base, height, width, num_inference_steps)
        if self.workshop is None:
            return plan
        counts = [self.workshop.expected(module) for module in denoisers_of(self.base).values()]
        need = f"{len(plan.stages) * sum(counts)} engines are needed, {sum(counts)} for each stage"
        return replace(plan, notes=(*plan.notes, need, *self.workshop.remarks))

    def explain(
        self, height: int | None = None, width: int | None = None, num_inference_steps: int | None = None
    ) -> str:
        """Give the plan as text."""
        return str(self.plan(height, width, num_inference_steps))

    def component(self, name: str) -> Any:
        """Give the component that the twin shows: the denoisers' and scheduler's twins, the base's own otherwise."""
        if isinstance(self.base, nn.Module):
            return self._denoisers[name][1]
        if name in self._stand_ins:
            return self._stand_ins[name]
        value = self._replaced[name] if name in self._replaced else getattr(self.base, name)
        if name in DENOISERS and isinstance(value, nn.Module):
            return self._twin_of(name, value)
        if name == "scheduler" and self._scheduler is not None:
            return self._scheduler
        return value

    def replace(self, name: str, value: Any) -> None:
        """Take a component assigned on the twin; the base keeps its own."""
        if name in self._denoisers and value is self._denoisers[name][1]:
            return
        if name in DENOISERS and value is not None:
            for accelerator in self.stack:
                accelerator.check(self.base, value)
            self.stack.check_state(name, value)
        self._replaced[name] = value

    def call(self, twin: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the pipeline's class in a run of its own."""
        function = type(self.base).__call__
        bound = _signature(function).bind(twin, *args, **kwargs)
        given = named_arguments(bound)
        bound.apply_defaults()
        arguments = named_arguments(bound)
        with self._exclusive():
            self._check_states()
            run = self._open(given, arguments)
            # Pipelines say here how many timesteps they will walk along, a pipeline's former call left out.
            twin.__dict__.pop("_num_timesteps", None)
            run.announced = lambda: twin.__dict__.get("_num_timesteps")
            with self._closing(run) as outcome:
                self._scheduler = scheduler_twin(self.component("scheduler"), run) if self._has_scheduler else None
                if run.plan is not None:
                    # The schedule's own count where the user gave none, for the loop's shares and its progress bar.
                    bound.arguments["num_inference_steps"] = run.plan.steps
                    args, kwargs = bound.args[1:], bound.kwargs
                    self._stand_ins = self._lifting()
                result = function(twin, *args, **kwargs)
                result = _lifted_result(run, arguments, result)
                outcome["completed"] = not getattr(twin, "_interrupt", False)
        return result

    @contextmanager
    def run(self, num_inference_steps: int, branches: Sequence[str] = ("main",)) -> Iterator[Run]:
        """Delimit a run of a bare module in somebody's own loop.

        Each step calls the module once for every branch, in the order of `branches`. Under
        `module.cache_context(name)`, where the class has it, a step may leave branches out.
        """
        if not is_count(num_inference_steps, 1):
            raise InvalidConfig(f"a run has a whole number of steps, at least 1, got {num_inference_steps!r}")
        if isinstance(branches, str) or not branches or len(set(branches)) != len(branches):
            raise InvalidConfig(f"branches are one or more different names in a tuple, got {branches!r}")
        if isinstance(self.base, pipeline_type()):
            raise InvalidConfig("a pipeline opens its own runs: call it")
        with self._exclusive():
            self._check_states()
            run = Run(total_steps=num_inference_steps, branches=branches, checks=self._checks())
            with self._closing(run) as outcome:
                yield run
                outcome["completed"] = True

    def warmup(
        self,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        progress: bool = True,
        **call: Any,
    ) -> WarmUp:
        """Build the engines of every stage of a call, so that the call itself builds none; say what each one took.

        It runs the pipeline, without the caches, for as few steps as pass through all stages. `call` holds what decides
        the shapes or the kind of the real calls besides their size: prompts or their embeddings (a prompt of no words
        if left out), guidance, the number of images. Raises what the call itself would raise.
        """
        if self.workshop is None or isinstance(self.base, nn.Module):
            raise InvalidConfig(
                "there is no engine to warm up; add Compile() or AOT() to the stack"
                if self.workshop is None
                else "a bare module is warmed up in your own loop: one step of each shape in `with twin.fastdit.run(1)`"
            )
        parameters = inspect.signature(type(self.base).__call__).parameters
        own: dict[str, Any] = {"output_type": "latent", "height": height, "width": width}
        if "prompt_embeds" not in call:
            own["prompt"] = ""
        given = {name: value for name, value in own.items() if name in parameters and value is not None} | call
        with self._exclusive():
            plan = make_plan(self.stack, self.base, height, width, num_inference_steps)
            bare = Stack(one for one in self.stack if one.level not in (Level.STEP_CACHE, Level.TOKEN_CACHE))
            controller = Acceleration(self.base, bare, strict=False, workshop=self.workshop)
            controller._replaced = self._replaced
            twin = pipeline_twin(self.base, controller, _lifted(self.base, bare))
            twin.set_progress_bar_config(disable=True)
            expected = len(plan.stages) * sum(map(self.workshop.expected, denoisers_of(self.base).values()))
            known, start = len(self.workshop.builds), time.perf_counter()
            with progress_bar(expected, shown=progress) as show:
                self.workshop.listener = show
                try:
                    twin(**given, num_inference_steps=fewest_steps(bare, self.base, plan, height, width))
                finally:
                    self.workshop.listener = None
        return WarmUp(tuple(self.workshop.builds[known:]), time.perf_counter() - start)

    @property
    def _has_scheduler(self) -> bool:
        return getattr(self.base, "scheduler", None) is not None

    def _twin_of(self, name: str, module: nn.Module) -> nn.Module:
        known = self._denoisers.get(name)
        if known is None or known[0].module is not module:
            stack = self.stack
            denoiser = Denoiser(
                module, name, self, stack.step_cache, self._family, stack.token_cache, stack.attention, self.workshop
            )
            known = (denoiser, denoiser_twin(denoiser, self))
            self._denoisers[name] = known
        return known[1]

    def _open(self, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Run:
        """Check a call's arguments and make its run; nothing has happened yet if this raises."""
        plan = schedule = follow = None
        if self.stack.schedule is not None:
            if given.get("sigmas") is not None or given.get("timesteps") is not None:
                raise InvalidConfig(
                    f"sigmas= was given, and {self.stack.schedule.describe()} owns the timesteps of the run; leave "
                    "sigmas out, or leave the schedule out"
                )
            assert self._family is not None
            if refusal := self._family.refusal(self.base, arguments):
                raise InvalidConfig(f"{self.stack.schedule.describe()}: {refusal}")
            plan = schedule_plan(self.stack, self.base, arguments, given.get("num_inference_steps"))
            assert plan is not None
            schedule = self.stack.schedule.begin(plan, self._family, self.base, arguments.get("generator"))
            follow = partial(followed, self._family)
        run = Run(plan=plan, schedule=schedule, checks=self._checks())
        run.follow = follow
        if self._family is not None:
            size = self._family.size(self.base, arguments)
            run.grid = FineLayout(*self._family.grid(self.base, *size))
        return run

    def _lifting(self) -> dict[str, Any]:
        """Make what stands in, during a run, for components whose methods may get latents of an early stage."""
        assert self._family is not None
        methods = [name.split(".") for name in self._family.pipeline_overrides() if "." in name]
        return {name: lifting_component(self.component(name), method, self) for name, method in methods}

    def _check_states(self) -> None:
        """Check the denoisers as they are now: one may have been quantised, or shared out, since the last run."""
        bare = isinstance(self.base, nn.Module)
        for name in DENOISERS:
            module = {BARE: self.base}.get(name) if bare else self._replaced.get(name, getattr(self.base, name, None))
            if isinstance(module, nn.Module):
                self.stack.check_state(name, module)

    def _checks(self) -> list[Callable[[int], None]]:
        """List what is checked once a run's number of steps is known, before its first step."""
        cache = self.stack.step_cache
        return [] if cache is None else [cache.check_run, self._refuse_idleness]

    def _refuse_idleness(self, total_steps: int) -> None:
        """Warn (or raise under `strict`) before the first step where no step of the run can be skipped."""
        cache = self.stack.step_cache
        if cache is not None and not cache.neutral and cache.skippable(total_steps) == 0:
            self._never_fired(cast(str, cache.outlook(total_steps)))

    def _never_fired(self, message: str) -> None:
        if self.strict:
            raise NeverFired(message)
        warnings.warn(message, NeverFired, stacklevel=6)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise ConcurrentCall(
                "this twin is already running a call; make one twin a thread with accelerate(pipe, stack), which "
                "shares the weights"
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _closing(self, run: Run) -> Iterator[dict[str, bool]]:
        """Hold a run open and drop its state whatever happens."""
        self.active = run
        outcome = {"completed": False}
        try:
            yield outcome
        finally:
            self.active, self._scheduler, self._stand_ins = None, None, {}
            self.last_run = run.finish(completed=outcome["completed"])
        if outcome["completed"]:
            self._report_idle(self.last_run)
            self._report_idle_attention(run)

    def _report_idle(self, record: RunRecord) -> None:
        """Warn (or raise under `strict`) when an accelerator changed nothing in a whole run."""
        cache: StepCache | TokenCache | None = self.stack.step_cache or self.stack.token_cache
        if cache is None or cache.neutral or record.skipped or record.partial or not record.steps:
            return
        steps = 1 + max(step.step for step in record.steps)
        if isinstance(cache, TokenCache) or cache.skippable(steps):
            advice = "raise its threshold" if isinstance(cache, StepCache) else "lower its first or raise its interval"
            self._never_fired(
                f"{cache.describe()} skipped none of {len(record.steps)} forwards, so it gained nothing; {advice}, run "
                "more steps (few-step models have nothing to skip), or leave it out"
            )

    def _report_idle_attention(self, run: Run) -> None:
        """Warn (or raise under `strict`) where a model computed no attention in a way that a kernel could answer."""
        kernel = self.stack.attention
        if kernel is not None and not kernel.neutral and cast(RunRecord, self.last_run).steps and not run.attended:
            self._never_fired(
                f"{kernel.describe()} answered no call of attention in the run: the model's attention does not call "
                "torch's scaled_dot_product_attention; set another attention processor, or leave it out"
            )


def _lifted(pipeline: Any, stack: Stack) -> tuple[str, ...]:
    """Name the methods of a pipeline that may get latents of an early stage."""
    family = family_of(pipeline) if stack.schedule is not None else None
    return family.pipeline_overrides() if family is not None else ()


def _lifted_result(run: Run, arguments: Mapping[str, Any], result: Any) -> Any:
    """Bring the latents of a run that was interrupted in an early stage to full size, where latents were asked for."""
    if run.schedule is None or arguments.get("output_type") != "latent":
        return result
    if isinstance(result, tuple):
        return (lift(run, result[0]), *result[1:])
    name = next(iter(result))  # images, or the frames of a video
    setattr(result, name, lift(run, result[name]))
    return result


@lru_cache(maxsize=64)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)
