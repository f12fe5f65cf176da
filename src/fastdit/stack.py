"""`accelerate` and `Stack`: state a stack, check it, explain it, run it, save it."""

from __future__ import annotations

import inspect
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from .accelerator import (
    VIOLATIONS,
    Accelerator,
    Level,
    Need,
    Schedule,
    SchedulePlan,
    StagePlan,
    decode,
    encode,
    is_count,
)
from .attention.kernel import AttentionKernel
from .caching.step_cache import StepCache
from .caching.token_cache import TokenCache
from .engines.engine import Engine
from .engines.warmup import WarmUp, progress_bar
from .engines.workshop import Workshop
from .errors import ConcurrentCall, IncompatibleStack, InvalidConfig, NeverFired, UnsupportedModel
from .layout import TokenLayout
from .models.family import Family, family_of
from .models.following import followed
from .models.state import changes_of
from .models.undescribed import why_not
from .run import Run, RunRecord
from .structure import named_arguments
from .twins.denoiser import Denoiser, denoiser_twin
from .twins.pipeline import lift, lifting_component, pipeline_twin
from .twins.scheduler import scheduler_twin

VERSION = 1
_FILE = "stack.json"
_BARE = "transformer"
_DENOISERS = (_BARE, "transformer_2")
_Base = TypeVar("_Base")


class Stack(Sequence[Accelerator]):
    """Accelerators that act together, ordered by level. Raises `IncompatibleStack` if two can't."""

    def __init__(self, accelerators: Iterable[Accelerator] | Accelerator = ()) -> None:
        if not isinstance(accelerators, (Accelerator, Iterable)):
            raise InvalidConfig(f"a stack is made of accelerators, got {accelerators!r}; write [RALU('4x'), ...]")
        given = (accelerators,) if isinstance(accelerators, Accelerator) else tuple(accelerators)
        for accelerator in given:
            if not isinstance(accelerator, Accelerator):
                raise InvalidConfig(
                    f"a stack is made of accelerators, got {accelerator!r}; write RALU('4x'), TeaCache(0.25), ..."
                )
        order = list(Level)
        self._accelerators = tuple(sorted(given, key=lambda accelerator: order.index(accelerator.level)))
        self._check_declarations()

    def __getitem__(self, index: Any) -> Any:
        return self._accelerators[index]

    def __len__(self) -> int:
        return len(self._accelerators)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and self._accelerators == other._accelerators

    def __hash__(self) -> int:
        return hash(self._accelerators)

    def __repr__(self) -> str:
        return f"Stack([{', '.join(accelerator.describe() for accelerator in self)}])"

    @property
    def schedule(self) -> Schedule | None:
        """The accelerator of the schedule level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, Schedule)), None)

    @property
    def step_cache(self) -> StepCache | None:
        """The accelerator of the step-cache level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, StepCache)), None)

    @property
    def token_cache(self) -> TokenCache | None:
        """The accelerator of the token-cache level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, TokenCache)), None)

    @property
    def attention(self) -> AttentionKernel | None:
        """The accelerator of the attention level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, AttentionKernel)), None)

    @property
    def engine(self) -> Engine | None:
        """The accelerator of the engine level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, Engine)), None)

    def _check_declarations(self) -> None:
        """Derive every conflict from what the accelerators declare."""
        for level in Level:
            names = [accelerator.describe() for accelerator in self if accelerator.level is level]
            if len(names) > 1:
                raise IncompatibleStack(
                    f"{' and '.join(names)} both decide the {level.value} level, where one must rule; keep one of them"
                )
        for one in self:
            for other in self:
                for need in one.effects.needs:
                    if one is not other and VIOLATIONS.get(need) in other.effects.changes:
                        raise IncompatibleStack(
                            f"{one.describe()} needs {need.value}, and {other.describe()} changes "
                            f"{VIOLATIONS[need].value}; drop one of them"
                        )
        if self.attention is not None and self.schedule is None:
            self.attention.check_stages(1)

    def check(self, pipeline: Any = None) -> None:
        """Raise a named error if the stack can't run on this pipeline or bare module; nothing is changed."""
        self._check_declarations()
        if pipeline is not None:
            transformers = _denoisers_of(pipeline)
            for accelerator in self:
                if accelerator.effects.needs & {Need.FRAME_SIZES, Need.TOKEN_POSITIONS, Need.TOKEN_GRID}:
                    self._check_family(pipeline, accelerator)
                if Need.BLOCK_LISTS in accelerator.effects.needs:
                    _require_block_lists(transformers, accelerator)
                for transformer in transformers.values():
                    accelerator.check(pipeline, transformer)
            for name, transformer in transformers.items():
                self.check_state(name, transformer)

    def _check_family(self, pipeline: Any, accelerator: Accelerator) -> None:
        """Raise `UnsupportedModel` if the tokens of a pipeline's family are not as an accelerator needs them."""
        family, needs = _require_family(pipeline, accelerator), accelerator.effects.needs
        if Need.TOKEN_POSITIONS in needs and not family.mixes:
            raise UnsupportedModel(
                f"{accelerator.describe()} must place tokens, and can't in {type(pipeline).__name__}, whose stages "
                f"are whole frames: {why_not(type(pipeline))}; give two stages, and leave frame out"
            )
        if family.one_plane:
            return
        several = f"needs {Need.TOKEN_GRID.value}, and {type(pipeline).__name__}'s fill one for each of several frames"
        if Need.TOKEN_GRID in needs:
            raise UnsupportedModel(f"{accelerator.describe()} {several}; use another, such as FirstBlockCache")
        for cache in (self.step_cache, self.token_cache):
            if Need.FRAME_SIZES in needs and cache is not None and cache.stage_change == "carry":
                raise UnsupportedModel(f"{cache.describe()} {several}; set stage_change='reset'")

    def check_state(self, name: str, module: nn.Module) -> None:
        """Raise `IncompatibleStack` if the state that a denoiser is in changes what an accelerator needs."""
        violable = [(one, need) for one in self for need in one.effects.needs if need in VIOLATIONS]
        for made in changes_of(module) if violable else ():
            for accelerator, need in violable:
                if VIOLATIONS[need] is made.change:
                    raise IncompatibleStack(
                        f"{accelerator.describe()} needs {need.value}, and {name} ({type(module).__name__}) changes "
                        f"{made.change.value} ({made.cause}); {made.remedy}"
                    )

    def explain(
        self,
        pipeline: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
    ) -> str:
        """Give the plan of a call as readable text: stages, tokens, noise levels, and what acts where."""
        return str(make_plan(self, pipeline, height, width, num_inference_steps))

    def to_json(self) -> dict[str, Any]:
        """Give the stack as plain, versioned data."""
        return {"fastdit_stack": VERSION, "accelerators": [encode(accelerator) for accelerator in self]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stack:
        """Rebuild a stack. Raises `InvalidConfig` for another version, an unknown type or an unknown field."""
        if not isinstance(data, Mapping) or set(data) != {"fastdit_stack", "accelerators"}:
            raise InvalidConfig("a stack's JSON has exactly the keys 'fastdit_stack' and 'accelerators'")
        if type(data["fastdit_stack"]) is not int or data["fastdit_stack"] != VERSION:
            raise InvalidConfig(
                f"this stack was written in version {data['fastdit_stack']!r} and this fastdit reads {VERSION}; write "
                "it again with a matching release"
            )
        if not isinstance(data["accelerators"], list):
            raise InvalidConfig("'accelerators' must be a list of accelerators")
        return cls(decode(item, f"accelerators[{index}]") for index, item in enumerate(data["accelerators"]))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write stack.json into a directory, which is made if needed."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / _FILE).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Stack:
        """Read what `save_pretrained` wrote."""
        path = Path(directory) / _FILE
        try:
            data = json.loads(path.read_bytes())
        except ValueError as error:
            raise InvalidConfig(f"{path} is not JSON: {error}; write it with Stack.save_pretrained") from error
        return cls.from_json(data)


@dataclass(frozen=True)
class Plan:
    """What a call will do: its stages and the accelerators that act in each. Printing it explains it."""

    stack: Stack
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def __str__(self) -> str:
        lines = [f"{self.steps} steps in {len(self.stages)} stage{'s' if len(self.stages) > 1 else ''}"]
        for stage in self.stages:
            tokens = f"{stage.tokens} tokens" if stage.tokens is not None else "the model's own tokens"
            noise = f", sigma {stage.sigmas[0]:.3f} to {stage.sigmas[-1]:.3f}" if stage.sigmas else ""
            kernel, engine = self.stack.attention, self.stack.engine
            attention = f", attention by {kernel.backend_in(stage.index)}" if kernel is not None else ""
            blocks = f", blocks by {type(engine).__name__}" if engine is not None else ""
            lines.append(
                f"  stage {stage.index + 1} ({stage.layout}): {stage.steps} steps, {tokens}{noise}{attention}{blocks}"
            )
        for accelerator in self.stack:
            lines.append(f"  {accelerator.level.value}: {accelerator.describe()}")
            lines.extend(
                f"    {effect.value}" for effect in sorted(accelerator.effects.breaks, key=lambda effect: effect.name)
            )
        if not self.stack:
            lines.append("  no accelerator: the plain pipeline, bit for bit")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)


def make_plan(
    stack: Stack,
    pipeline: Any,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
) -> Plan:
    """Plan a call of a pipeline without running it."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(pipeline).__call__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    asked = {"height": height, "width": width}
    arguments = {**defaults, **{name: value for name, value in asked.items() if value is not None}}
    schedule_plan = _schedule_plan(stack, pipeline, arguments, num_inference_steps)
    if schedule_plan is not None:
        return Plan(stack, schedule_plan.stages, (*schedule_plan.notes, *_outlook(stack, schedule_plan.steps)))
    steps = num_inference_steps if num_inference_steps is not None else defaults.get("num_inference_steps")
    if steps is None:
        raise InvalidConfig("this pipeline has no default for num_inference_steps; give it to plan()")
    family = family_of(pipeline)
    tokens = None
    if family is not None:
        rows, columns = family.grid(pipeline, *family.size(pipeline, arguments))
        tokens = rows * columns
    notes = ["the pipeline's own timesteps"]
    order = getattr(getattr(pipeline, "scheduler", None), "order", 1)
    if order > 1:
        # Such schedulers of diffusers take their last step in one forward.
        given, steps = steps, order * (steps - 1) + 1
        notes.append(f"the scheduler takes {steps} forwards for {given} steps, and each forward counts as a step here")
    return Plan(stack, (StagePlan(0, "whole frame", tokens, steps),), (*notes, *_outlook(stack, steps)))


def _outlook(stack: Stack, steps: int) -> tuple[str, ...]:
    """Remark on a cache that has too few steps to be of use."""
    outlook = stack.step_cache.outlook(steps) if stack.step_cache is not None else None
    return () if outlook is None else (outlook,)


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
        self._family = family_of(base) if isinstance(base, _pipeline_type()) else None
        self._lock = threading.Lock()
        self._replaced: dict[str, Any] = {}
        self._scheduler: Any = None
        self._stand_ins: dict[str, Any] = {}
        self._denoisers: dict[str, tuple[Denoiser, nn.Module]] = {}
        for name, module in _denoisers_of(base).items():
            self._twin_of(name, module)

    @property
    def idle_is_plain(self) -> bool:
        return len(self.stack) == 0

    def plan(self, height: int | None = None, width: int | None = None, num_inference_steps: int | None = None) -> Plan:
        """Plan a call: stages, tokens, noise levels. Raises what the call itself would raise for these values."""
        plan = make_plan(self.stack, self.base, height, width, num_inference_steps)
        if self.workshop is None:
            return plan
        counts = [self.workshop.expected(module) for module in _denoisers_of(self.base).values()]
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
        if name in _DENOISERS and isinstance(value, nn.Module):
            return self._twin_of(name, value)
        if name == "scheduler" and self._scheduler is not None:
            return self._scheduler
        return value

    def replace(self, name: str, value: Any) -> None:
        """Take a component assigned on the twin; the base keeps its own."""
        if name in self._denoisers and value is self._denoisers[name][1]:
            return
        if name in _DENOISERS and value is not None:
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
        if isinstance(self.base, _pipeline_type()):
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
            expected = len(plan.stages) * sum(map(self.workshop.expected, _denoisers_of(self.base).values()))
            known, start = len(self.workshop.builds), time.perf_counter()
            with progress_bar(expected, shown=progress) as show:
                self.workshop.listener = show
                try:
                    twin(**given, num_inference_steps=_fewest_steps(bare, self.base, plan, height, width))
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
            plan = _schedule_plan(self.stack, self.base, arguments, given.get("num_inference_steps"))
            assert plan is not None
            schedule = self.stack.schedule.begin(plan, self._family, self.base, arguments.get("generator"))
            follow = partial(followed, self._family)
        run = Run(plan=plan, schedule=schedule, checks=self._checks())
        run.follow = follow
        if self._family is not None:
            size = self._family.size(self.base, arguments)
            run.grid = TokenLayout(*self._family.grid(self.base, *size), coarse=False)
        return run

    def _lifting(self) -> dict[str, Any]:
        """Make what stands in, during a run, for components whose methods may get latents of an early stage."""
        assert self._family is not None
        methods = [name.split(".") for name in self._family.pipeline_overrides() if "." in name]
        return {name: lifting_component(self.component(name), method, self) for name, method in methods}

    def _check_states(self) -> None:
        """Check the denoisers as they are now: one may have been quantised, or shared out, since the last run."""
        bare = isinstance(self.base, nn.Module)
        for name in _DENOISERS:
            module = {_BARE: self.base}.get(name) if bare else self._replaced.get(name, getattr(self.base, name, None))
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
        return cast(_Base, controller.component(_BARE))
    return cast(_Base, pipeline_twin(pipeline, controller, _lifted(pipeline, stack)))


def _lifted(pipeline: Any, stack: Stack) -> tuple[str, ...]:
    """Name the methods of a pipeline that may get latents of an early stage."""
    family = family_of(pipeline) if stack.schedule is not None else None
    return family.pipeline_overrides() if family is not None else ()


def _fewest_steps(stack: Stack, pipeline: Any, plan: Plan, height: int | None, width: int | None) -> int:
    """Count the steps of the shortest run with the same tokens in the same stages as a plan has."""
    tokens = [stage.tokens for stage in plan.stages]
    if stack.schedule is None:
        return min(2, plan.steps)
    for steps in range(len(tokens), plan.steps):
        try:
            shorter = make_plan(stack, pipeline, height, width, steps)
        except InvalidConfig:
            continue
        if [stage.tokens for stage in shorter.stages] == tokens:
            return steps
    return plan.steps


@lru_cache(maxsize=64)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _pipeline_type() -> type:
    from diffusers import DiffusionPipeline

    return cast(type, DiffusionPipeline)


def _denoisers_of(base: Any) -> dict[str, nn.Module]:
    """Find the transformers of a pipeline, or the bare module itself."""
    if isinstance(base, nn.Module):
        return {_BARE: base}
    if not isinstance(base, _pipeline_type()):
        raise UnsupportedModel(
            f"accelerate takes a diffusers pipeline or a torch module, got {type(base).__name__}; pass the pipeline "
            "object itself"
        )
    found = {name: getattr(base, name, None) for name in _DENOISERS}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        components = ", ".join(cast(Any, base).components)
        raise UnsupportedModel(
            f"{type(base).__name__} has no transformer (its components are {components}); fastdit accelerates "
            "diffusion transformers"
        )
    return modules


def _require_block_lists(transformers: Mapping[str, nn.Module], accelerator: Accelerator) -> None:
    for name, module in transformers.items():
        if not any(isinstance(child, nn.ModuleList) and len(child) for child in module.children()):
            raise UnsupportedModel(
                f"{accelerator.describe()} skips blocks, and {name} ({type(module).__name__}) has no nn.ModuleList of "
                "blocks among its children; use accelerators that need no blocks"
            )


def _require_family(base: Any, accelerator: Accelerator) -> Family:
    family = None if isinstance(base, nn.Module) else family_of(base)
    if family is None:
        raise UnsupportedModel(
            f"{accelerator.describe()} must know how tokens lie, and can't in {type(base).__name__}: {_why_not(base)}; "
            "use it with a pipeline that `fastdit matrix` lists, describe the family in fastdit.models, or keep to "
            "accelerators that need no description of the tokens"
        )
    return family


def _why_not(base: Any) -> str:
    return "a bare module has no description of its pipeline" if isinstance(base, nn.Module) else why_not(type(base))


def _schedule_plan(
    stack: Stack, pipeline: Any, arguments: Mapping[str, Any], num_inference_steps: int | None
) -> SchedulePlan | None:
    """Plan the schedule's stages for a call's size, or None where the stack has no schedule."""
    if stack.schedule is None:
        return None
    family = _require_family(pipeline, stack.schedule)
    height, width = family.size(pipeline, arguments)
    plan = stack.schedule.plan(*family.grid(pipeline, height, width), num_inference_steps)
    if stack.attention is not None:
        stack.attention.check_stages(len(plan.stages))
    return plan


def _lifted_result(run: Run, arguments: Mapping[str, Any], result: Any) -> Any:
    """Bring the latents of a run that was interrupted in an early stage to full size, where latents were asked for."""
    if run.schedule is None or arguments.get("output_type") != "latent":
        return result
    if isinstance(result, tuple):
        return (lift(run, result[0]), *result[1:])
    name = next(iter(result))  # images, or the frames of a video
    setattr(result, name, lift(run, result[name]))
    return result
