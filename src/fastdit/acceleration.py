"""`accelerate`: a twin of a pipeline that runs a stack, and the controller behind it."""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from torch import nn

from fastdit.accelerator import Accelerator, Level
from fastdit.blocks.chain import Chain, Pass
from fastdit.config import is_count
from fastdit.engine.warmup import WarmUp, progress_bar
from fastdit.engine.workshop import Workshop
from fastdit.errors import ConcurrentCall, InvalidConfig, NeverFired
from fastdit.layout import FineLayout
from fastdit.models.components import (
    BARE,
    grid_of,
    guiders_of,
    is_transformer,
    pipeline_type,
    require_family,
    schedulers_of,
    transformers_of,
)
from fastdit.models.family import family_of
from fastdit.models.turns import in_turn
from fastdit.nested import Args, Kwargs, Value, call_signature, named_arguments, replaced
from fastdit.plan import Plan, fewest_steps, make_plan, schedule_plan
from fastdit.predict.estimate import remarks
from fastdit.process import undoing
from fastdit.record import RunRecord
from fastdit.run import Run
from fastdit.schedule.stage_pass import StagePass
from fastdit.stack import Stack
from fastdit.twins.hooks import with_hooks
from fastdit.twins.pipeline import lifting_component, pipeline_twin
from fastdit.twins.scheduler import scheduler_twin
from fastdit.twins.transformer import OpenRun, TransformerTwin, transformer_twin

_Base = TypeVar("_Base")

#: The levels that act on a forward by itself, whether it is a step of a loop or not.
_TIMELESS = (Level.WEIGHTS, Level.ATTENTION, Level.ENGINE)


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
    if not isinstance(pipeline, nn.Module):
        controller.twin = pipeline_twin(pipeline, controller, _lifted(pipeline, stack))
    return cast(_Base, controller.twin)


class Acceleration:
    """The controller behind a twin, reached as `twin.fastdit`: its stack, plan and last run."""

    def __init__(self, base: Any, stack: Stack, *, strict: bool, kept: Iterable[tuple[Accelerator, Any]] = ()) -> None:
        self.base = self.twin = base  # what a run reads is read off a pipeline's twin, once that is made
        self.stack = stack
        self.strict = strict
        self.last_run: RunRecord | None = None
        known, own = {id(one): part for one, part in kept}, [one for one in stack if one.level is not Level.SCHEDULE]
        self._lasting = [(one, known[id(one)] if id(one) in known else one.lasting()) for one in own]
        self._turn: dict[int, object] = {}  # of each process: a forked child's parent does not run its calls
        self.open_run: OpenRun | None = None
        self.idle_is_plain = len(stack) == 0
        self._replaced: Kwargs = {}
        self._twins: dict[str, tuple[TransformerTwin, nn.Module]] = {}
        for name, module in transformers_of(base).items():
            self._twin_of(name, module)
        if isinstance(base, nn.Module):
            self.twin = self.component(BARE)
        stack.check(base)

    @property
    def active(self) -> Run | None:
        """The clock of the run that is open."""
        return None if self.open_run is None else self.open_run.run

    @property
    def stages(self) -> StagePass | None:
        """The stages of the run that is open, where it has a schedule."""
        return None if self.open_run is None else self.open_run.stages

    @property
    def workshop(self) -> Workshop | None:
        """Where the engines of the twin are built, where the stack has an engine."""
        return next((kept for _, kept in self._lasting if isinstance(kept, Workshop)), None)

    def plan(self, height: int | None = None, width: int | None = None, num_inference_steps: int | None = None) -> Plan:
        """Plan a call: stages, tokens, noise levels. Raises what the call itself would raise for these values."""
        plan = make_plan(self.stack, self.twin, height, width, num_inference_steps)
        models, stages = [*self._transformers.values()], len(plan.stages)
        said = [note for one, kept in self._lasting for note in one.remarks(models, stages, kept)]
        return replace(plan, notes=(*plan.notes, *said, *remarks(self.base, plan)))

    def explain(
        self, height: int | None = None, width: int | None = None, num_inference_steps: int | None = None
    ) -> str:
        """Give the plan as text."""
        return str(self.plan(height, width, num_inference_steps))

    def component(self, name: str) -> Value:
        """Give the component that the twin shows: transformers' and scheduler's twins, the base's own otherwise,
        those that keep something of a call in turn."""
        if isinstance(self.base, nn.Module):
            return self._twins[name][1]
        if self.open_run is not None and name in self.open_run.components:
            return self.open_run.components[name]
        value = self._replaced[name] if name in self._replaced else getattr(self.base, name)
        return self._twin_of(name, value) if is_transformer(self.base, name, value) else in_turn(value)

    def replace(self, name: str, value: Value) -> None:
        """Take a component assigned on the twin; the base keeps its own."""
        if name in self._twins and value is self._twins[name][1]:
            return
        if is_transformer(self.base, name, value):
            for accelerator in self.stack:
                accelerator.check(self.twin, value)
            self.stack.check_state(name, value)
        self._replaced[name] = value

    def plain(self, twin: Any) -> Value:
        """Give a pipeline of the class itself with what the twin shows."""
        plain: Any = object.__new__(type(self.base))
        vars(plain).update({**vars(self.base), **vars(twin)})
        for name, value in self._replaced.items():
            setattr(plain, name, value)
        return plain

    def pickled(self, twin: Any) -> tuple[Any, ...] | None:
        """Say how a copied or pickled twin is made anew; None for a pipeline's transformer, which is a plain module."""
        made = partial(accelerate, strict=self.strict), (self.base, self.stack)
        if isinstance(twin, nn.Module):
            return made if twin is self.twin else None
        return *made, (vars(twin), self._replaced)  # attributes, and what is set by name

    def call(self, twin: Any, args: Args, kwargs: Kwargs) -> Value:
        """Run one call of the pipeline's class in a run of its own."""
        signature = call_signature(type(self.base))
        bound = signature.bind(twin, *args, **kwargs)
        given = named_arguments(bound)
        bound.apply_defaults()
        arguments = named_arguments(bound)
        if isinstance(arguments.get("prompt"), list) and not arguments["prompt"]:
            raise InvalidConfig("prompt is an empty list; give one prompt or more")
        with self._exclusive():
            self._check_states()
            run, stages = self._begun(given, arguments)
            # Pipelines say here how many timesteps they will walk along, a pipeline's former call left out.
            twin.__dict__.pop("_num_timesteps", None)
            run.announce(lambda: twin.__dict__.get("_num_timesteps"))
            with self._open(run, stages) as finished:
                if stages is not None:
                    # The schedule's own count where the user gave none, for the loop's shares and its progress bar.
                    args, kwargs = replaced(signature, args, kwargs, "num_inference_steps", stages.plan.steps)
                result = type(self.base).__call__(twin, *args, **kwargs)
                if stages is not None and arguments.get("output_type") == "latent":
                    result = stages.lifted_result(result)
                if not getattr(twin, "_interrupt", False):
                    finished()
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
            run = Run(num_inference_steps, branches, checks=self._checks())
            with self._open(run, None) as finished:
                yield run
                finished()

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
        if left out), guidance, the number of images. A stack without an engine has nothing to build and runs nothing.
        Raises what the call itself would raise.
        """
        if isinstance(self.base, nn.Module):
            raise InvalidConfig(
                "a bare module is warmed up in your own loop: one step of each shape in `with twin.fastdit.run(1)`"
            )
        parameters = call_signature(type(self.base)).parameters
        own: Kwargs = {"output_type": "latent", "height": height, "width": width}
        if "prompt_embeds" not in call:
            own["prompt"] = ""
        given = {name: value for name, value in own.items() if name in parameters and value is not None} | call
        with self._exclusive():
            plan = make_plan(self.stack, self.twin, height, width, num_inference_steps)
            if self.workshop is None:
                return WarmUp((), 0.0)
            bare = Stack(one for one in self.stack if one.level not in (Level.STEP_CACHE, Level.TOKEN_CACHE))
            controller = Acceleration(self.base, bare, strict=False, kept=self._lasting)
            controller._replaced = self._replaced
            controller.twin = twin = pipeline_twin(self.plain(self.twin), controller, _lifted(self.twin, bare))
            twin.set_progress_bar_config(disable=True)
            expected = len(plan.stages) * sum(map(self.workshop.expected, self._transformers.values()))
            known, start = len(self.workshop.builds), time.perf_counter()
            with progress_bar(expected, shown=progress) as show:
                try:
                    self.workshop.listener = show
                    twin(**given, num_inference_steps=fewest_steps(bare, self.twin, plan, height, width))
                finally:
                    self.workshop.listener = None
        return WarmUp(tuple(self.workshop.builds[known:]), time.perf_counter() - start)

    def _twin_of(self, name: str, module: nn.Module) -> nn.Module:
        known = self._twins.get(name)
        if known is None or known[0].module is not module:
            owner: Any = (lambda: self) if module is self.base else weakref.ref(self)
            twin = TransformerTwin(module, name, owner)
            known = self._twins[name] = twin, transformer_twin(twin)
        return known[1]

    def _begun(self, given: Mapping[str, Value], arguments: Mapping[str, Value]) -> tuple[Run, StagePass | None]:
        """Check a call's arguments and make its run; nothing has happened yet if this raises."""
        plan, schedule, family = None, self.stack.schedule, family_of(self.twin)
        if schedule is not None:
            if given.get("sigmas") is not None or given.get("timesteps") is not None:
                raise InvalidConfig(
                    f"sigmas= was given, and {schedule.describe()} owns the timesteps of the run; leave sigmas out, or "
                    "leave the schedule out"
                )
            family = require_family(self.twin, schedule)
            if refusal := family.refusal(self.twin, arguments):
                raise InvalidConfig(f"{schedule.describe()}: {refusal}")
            plan = schedule_plan(self.stack, self.twin, arguments, given.get("num_inference_steps"))
        grid = None
        if family is not None:
            grid = FineLayout(*grid_of(family, self.twin, arguments))
        run = Run(plan=plan, grid=grid, checks=self._checks())
        if schedule is None or plan is None or family is None:
            return run, None
        own = schedule.begin(plan, family, self.twin, arguments.get("generator"))
        return run, StagePass(run, plan, own, family)

    def _chain(self, run: Run, stages: StagePass | None) -> Chain:
        """Fold what acts in a run, outermost first: the schedule, the levels in their order, what the schedule sees."""
        made = [(one.level, part) for one, kept in self._lasting if (part := one.enter(run, kept)) is not None]
        passes: list[Pass] = [part for _, part in made]
        if stages is not None:
            passes = [stages, *passes, *stages.passes]
        return Chain(with_hooks(passes), outside=Chain(with_hooks([one for level, one in made if level in _TIMELESS])))

    def _stand_ins(self, run: Run, stages: StagePass | None) -> Kwargs:
        """Make what stands in for components in a run: the scheduler, and those that get latents of an early stage."""
        made: Kwargs = {name: scheduler_twin(self.component(name), run, stages) for name in schedulers_of(self.base)}
        made |= {name: copy(self.component(name)) for name in guiders_of(self.base)}
        for name in () if stages is None else _lifted(self.twin, self.stack):
            if "." in name:
                component, method = name.split(".")
                made[component] = lifting_component(self.component(component), method, self)
        return made

    def _check_states(self) -> None:
        """Check the transformers as they are now: one may have been quantised, or shared out, since the last run."""
        for name, module in self._transformers.items():
            self.stack.check_state(name, module)

    @property
    def _transformers(self) -> dict[str, nn.Module]:
        return transformers_of(self.base, self._replaced)

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
        """Have the twin for one call; it is free and shows no run afterwards, at whatever line an interrupt comes."""
        mine, process = object(), os.getpid()

        def leave() -> None:
            if self._turn.get(process) is mine:
                self.open_run = None
                self._turn.clear()

        with undoing(leave):
            if self._turn.setdefault(process, mine) is not mine:
                raise ConcurrentCall(
                    "this twin is already running a call; make one twin a thread with accelerate(pipe, stack), which "
                    "shares the weights"
                )
            yield

    @contextmanager
    def _open(self, run: Run, stages: StagePass | None) -> Iterator[Callable[[], None]]:
        """Hold a run open and drop its state whatever happens; what is given says that the run came to its end."""
        chain, completed = self._chain(run, stages), False

        def finished() -> None:
            nonlocal completed
            completed = True

        try:
            self.open_run = OpenRun(run, chain, stages, self._stand_ins(run, stages))
            yield finished
        finally:
            chain.close()
            self.last_run = run.finish(completed=completed)
        reached = bool(self.last_run.steps)
        asked = [one.describe() for one in self.stack if not (one.neutral or (reached and one.level in _TIMELESS))]
        if completed and asked and not run.stepped:
            self._never_fired(
                f"{type(self.base).__name__} took no step with a transformer and a scheduler of its own, so "
                f"{', '.join(asked)} had nothing to go by; accelerate the transformer itself, in a loop of your own"
            )
        elif completed:
            for why in chain.idle():
                self._never_fired(why)


def _lifted(pipeline: Any, stack: Stack) -> tuple[str, ...]:
    """Name the methods of a pipeline that may get latents of an early stage."""
    family = family_of(pipeline) if stack.schedule is not None else None
    return family.pipeline_overrides() if family is not None else ()
