"""What the accelerators can do with each pipeline of the installed diffusers, found by running tiny ones.

Every pipeline class with a transformer is listed. "Yes" is said only of a class whose own tiny pipeline was run
(`testing.PIPELINES`, `testing.UNUSUAL`): the result was finite, the neutral configuration equal to the plain pipeline,
and what was to be skipped was skipped. Where only a tiny transformer exists (`testing.TRANSFORMERS`), or a pipeline of
another class with the same one, the caches are run on that: what it refuses its pipelines refuse too, and what it takes
is a remark. What was run on nothing says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator
from fastdit.errors import FastditError, FastditWarning, UnsupportedModel
from fastdit.models.family import families
from fastdit.models.undescribed import annotated, why_not, why_not_whole
from fastdit.process import unheard_warnings
from fastdit.schedule.base import Schedule
from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.schedule.ralu import RALU
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.policy import SkipPolicy
from fastdit.testing import PIPELINES, TRANSFORMERS, UNUSUAL
from fastdit.testing.tiny import TinyPipeline, TinySibling, flow_matching
from fastdit.token_cache.toca import ToCa

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

    from fastdit.record import RunRecord

STEPS = 6
_MIXED = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
_WHOLE = ProgressiveResolution(steps=(3, 3), ends=(0.5,), starts=(0.2,), lift=PixelLift())
_STEP_CACHE = FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))
_TOKEN_CACHE = ToCa(3, 0.5, first=1)
_NEUTRAL: dict[Accelerator, Accelerator] = {_STEP_CACHE: FirstBlockCache(0.0), _TOKEN_CACHE: ToCa(1, 0.5)}
_TINY: dict[str, TinyPipeline | TinySibling] = {**PIPELINES, **UNUSUAL}
_NOT_RUN = "not run: there is no tiny pipeline of it here"


@dataclasses.dataclass(frozen=True)
class Answer:
    """Whether something works on a pipeline: True or False by a run, None where none was made; and why."""

    works: bool | None
    reason: str = ""

    def __str__(self) -> str:
        return {True: "yes", False: "no", None: "not run"}[self.works]


@dataclasses.dataclass(frozen=True)
class Support:
    """One pipeline class: its family if one is described, and what each level can do with it."""

    pipeline: str
    transformer: str
    family: str | None
    mixed: Answer
    whole: Answer
    step_cache: Answer
    token_cache: Answer


def pipeline_classes() -> Iterator[type[DiffusionPipeline]]:
    """List the pipeline classes of the installed diffusers whose constructor takes a transformer, by name.

    Warns of those that diffusers itself can't import here, for want of a package that they need.
    """
    import diffusers

    for name in sorted(name for name in dir(diffusers) if name.endswith(("Pipeline", "Refiner"))):
        try:
            found = getattr(diffusers, name)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            warnings.warn(
                f"{name} is left out, since diffusers can't import it: {reason}", FastditWarning, stacklevel=2
            )
            continue
        if inspect.isclass(found) and "transformer" in inspect.signature(found.__init__).parameters:
            yield found


def supported(pipeline: type[DiffusionPipeline]) -> Support:
    """Find out what a pipeline class can do, by running its tiny pipeline or its tiny transformer."""
    name = pipeline.__name__
    family = next((family for family in families() if name in family.pipelines), None)
    transformer = ", ".join(annotated(pipeline, "transformer"))
    known = None if family is None else family.name

    def schedule(accelerator: Schedule) -> Answer:
        if name in _TINY:
            return _on_pipeline(name, accelerator)
        return Answer(None, f"described with {known}, and there is no tiny pipeline of it here")

    def cache(accelerator: Accelerator) -> Answer:
        if name in _TINY:
            return _on_pipeline(name, accelerator)
        found = _on_transformer(transformer, accelerator)
        return Answer(None, f"{_NOT_RUN}; its transformer takes them in a plain loop") if found.works else found

    mixed = schedule(_MIXED) if family is not None and family.mixes else Answer(False, why_not(pipeline))
    whole = schedule(_WHOLE) if family is not None else Answer(False, why_not_whole(pipeline))
    return Support(name, transformer, known, mixed, whole, cache(_STEP_CACHE), cache(_TOKEN_CACHE))


def _on_pipeline(name: str, accelerator: Accelerator) -> Answer:
    """Run an accelerator on a tiny pipeline of two prompts whose picture is not square.

    A schedule gets the flow-matching scheduler that it needs where a flow's pipeline comes with another one.
    """
    side, remarks = _TINY[name].token, []

    def run() -> bool:
        # A picture of another size than the pipeline's own, where it takes one.
        options: dict[str, Any] = {"size": (4 * side, 6 * side), "batch": 2} if name in PIPELINES else {}
        pipeline, call = _TINY[name](steps=STEPS, **options)
        scheduler = type(pipeline.scheduler).__name__
        if isinstance(accelerator, Schedule) and "FlowMatch" not in scheduler:
            pipeline.scheduler = flow_matching()
            remarks.append(f"with a FlowMatchEulerDiscreteScheduler in the place of its {scheduler}")

        def output(made: DiffusionPipeline) -> list[torch.Tensor]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # some draw from the global generator, too
                given = made(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
            return [torch.as_tensor(one) for one in (given if isinstance(given, list) else [given])]

        if accelerator in _NEUTRAL:
            plain, neutral = output(pipeline), output(accelerate(pipeline, [_NEUTRAL[accelerator]]))
            if not all(map(torch.equal, plain, neutral)):
                remarks.append("its neutral configuration differs from the plain pipeline")
                return False
        fast = accelerate(pipeline, [accelerator])
        return _ran(output(fast), fast.fastdit.last_run, accelerator)

    answer = _answered(run)
    return dataclasses.replace(answer, reason="; ".join(filter(None, (*remarks, answer.reason))))


@lru_cache
def _on_transformer(transformer: str, accelerator: Accelerator) -> Answer:
    """Run an accelerator on a tiny transformer, or on a tiny pipeline of another class that has the same one."""
    import diffusers

    found = next((built for built in _tiny_transformers() if type(built[0]).__name__ == transformer), None)
    if found is not None:
        return _answered(lambda: _loop(*found, accelerator))
    for name in PIPELINES:
        cls = getattr(diffusers, name, None)
        if cls is not None and transformer and transformer in annotated(cls, "transformer"):
            return _on_pipeline(name, accelerator)
    return Answer(None, _NOT_RUN)


@lru_cache
def _tiny_transformers() -> tuple[tuple[ModelMixin, dict[str, torch.Tensor]], ...]:
    """Make those that the installed diffusers has."""
    made = []
    for build in TRANSFORMERS.values():
        with suppress(UnsupportedModel):
            made.append(build())
    return tuple(made)


def _loop(model: ModelMixin, call: dict[str, torch.Tensor], accelerator: Accelerator) -> bool:
    twin = accelerate(model, [accelerator])
    first = next(iter(call))
    with torch.no_grad(), twin.fastdit.run(num_inference_steps=STEPS):
        for step in range(STEPS):
            output = twin(**{**call, first: call[first] * (1.0 - 0.1 * step)}, return_dict=False)[0]
    return _ran([output], twin.fastdit.last_run, accelerator)


def _ran(output: list[torch.Tensor], record: RunRecord, accelerator: Accelerator) -> bool:
    """Whether the result is finite, and what a cache was to skip was skipped."""
    saved = isinstance(accelerator, Schedule) or (record.partial > 0 if accelerator is _TOKEN_CACHE else _skips(record))
    return saved and all(bool(torch.isfinite(one).all()) for one in output)


def _skips(record: RunRecord) -> bool:
    """Whether the step cache skipped each step between a loop's first and last one, wherever it had a history."""
    before: dict[tuple[str, str], int] = {}
    for one in record.steps:
        branch = one.transformer, one.branch
        known = before.get(branch, -1) == one.step - 1 and 0 < one.step < STEPS - 1
        if known and one.action == "computed":
            return False
        before[branch] = one.step
    return record.skipped > 0


def _answered(run: Callable[[], bool]) -> Answer:
    with unheard_warnings():
        try:
            return Answer(True) if run() else Answer(False, "it ran, and too little was saved or the result is wrong")
        except FastditError as error:
            return Answer(False, f"{type(error).__name__}: {error}")


def table(rows: Iterable[Support]) -> str:
    """Write rows as a table in Markdown, and every reason once below it."""
    reasons: dict[str, int] = {}
    lines = [
        "| pipeline | family | mixed-resolution stages | whole-frame stages | step caches | token caches |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for answer in (row.mixed, row.whole, row.step_cache, row.token_cache):
            number = reasons.setdefault(gist(answer.reason), len(reasons) + 1) if answer.reason else None
            cells.append(f"{answer}" if number is None else f"{answer} ({number})")
        lines.append(f"| {row.pipeline} | {row.family or ''} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def gist(reason: str) -> str:
    """Give a reason without the names that differ from model to model, so that models share it."""
    shorter = re.sub(r"^\w+: (ToCa|FirstBlockCache)\(.*?\) ", r"\1 ", reason.partition(" (arguments given")[0])
    return re.sub(r" of \w+ \([\w.]+\)", " of its blocks", shorter)
