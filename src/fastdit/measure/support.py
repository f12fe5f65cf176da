"""What the accelerators can do with each pipeline of the installed diffusers, found by running tiny ones.

Every pipeline class with a transformer is listed. Where a tiny pipeline of the class exists (`tiny_pipelines`), RALU, a
step cache and a token cache are run on it; where only its transformer exists (`tiny_transformers`), the caches are run
on that, in a loop. What was run on nothing says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fastdit.accelerator import Accelerator
from fastdit.caching.first_block_cache import FirstBlockCache
from fastdit.caching.policy import SkipPolicy
from fastdit.caching.toca import ToCa
from fastdit.errors import FastditError, UnsupportedModel
from fastdit.models.family import Family, families
from fastdit.models.undescribed import annotated, why_not
from fastdit.spatial.ralu import RALU
from fastdit.stack import accelerate

from .tiny_pipelines import PIPELINES, TOKEN_PIXELS
from .tiny_transformers import TRANSFORMERS

STEPS = 6
_SCHEDULE = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
_STEP_CACHE = FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))
_TOKEN_CACHE = ToCa(3, 0.5, first=1)
_NOT_RUN = "not run: there is no tiny model of it here"


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
    step_cache: Answer
    token_cache: Answer

    def to_json(self) -> dict[str, Any]:
        """Give the row as plain data."""
        return dataclasses.asdict(self)


def pipeline_classes() -> Iterator[type[Any]]:
    """List the pipeline classes of the installed diffusers whose constructor takes a transformer, by name."""
    import diffusers

    for name in sorted(dir(diffusers)):
        found = getattr(diffusers, name) if name.endswith(("Pipeline", "Refiner")) else None
        if inspect.isclass(found) and "transformer" in inspect.signature(found.__init__).parameters:
            yield found


def supported(pipeline: type[Any]) -> Support:
    """Find out what a pipeline class can do, by running its tiny pipeline or its tiny transformer."""
    name = pipeline.__name__
    family = next((family for family in families() if name in family.pipelines), None)
    transformer = ", ".join(annotated(pipeline, "transformer"))
    if name in PIPELINES:
        caches = [_on_pipeline(name, cache, fired=True) for cache in (_STEP_CACHE, _TOKEN_CACHE)]
        mixed = _on_pipeline(name, _SCHEDULE) if family is not None else Answer(False, why_not(pipeline))
    else:
        caches = [_on_transformer(transformer, cache) for cache in (_STEP_CACHE, _TOKEN_CACHE)]
        mixed = Answer(None, _described(family)) if family is not None else Answer(False, why_not(pipeline))
    return Support(name, transformer, None if family is None else family.name, mixed, *caches)


def _described(family: Family) -> str:
    return f"described with {family.name}, and there is no tiny pipeline of it here"


def _on_pipeline(name: str, accelerator: Accelerator, *, fired: bool = False) -> Answer:
    """Run an accelerator on a tiny pipeline of two prompts whose picture is not square."""
    side = TOKEN_PIXELS.get(name, 16)

    def run() -> bool:
        pipeline, call = PIPELINES[name](size=(4 * side, 6 * side), steps=STEPS, batch=2)
        fast = accelerate(pipeline, [accelerator])
        output = fast(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        return _ran(output, fast.fastdit.last_run, fired)

    return _answered(run)


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
            return _on_pipeline(name, accelerator, fired=True)
    return Answer(None, _NOT_RUN)


@lru_cache
def _tiny_transformers() -> tuple[tuple[nn.Module, dict[str, Any]], ...]:
    """Make those that the installed diffusers has."""
    made = []
    for build in TRANSFORMERS.values():
        with suppress(UnsupportedModel):
            made.append(build())
    return tuple(made)


def _loop(model: nn.Module, call: dict[str, Any], accelerator: Accelerator) -> bool:
    twin: Any = accelerate(model, [accelerator])
    first = next(iter(call))
    with torch.no_grad(), twin.fastdit.run(num_inference_steps=STEPS):
        for step in range(STEPS):
            output = twin(**{**call, first: call[first] * (1.0 - 0.1 * step)}, return_dict=False)[0]
    return _ran(output, twin.fastdit.last_run, True)


def _ran(output: Any, record: Any, fired: bool) -> bool:
    tensor = output[0] if isinstance(output, list) else output
    return bool(torch.isfinite(torch.as_tensor(tensor)).all()) and (not fired or record.skipped + record.partial > 0)


def _answered(run: Callable[[], bool]) -> Answer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Answer(True) if run() else Answer(False, "it ran, and nothing was saved or the result is not finite")
        except FastditError as error:
            return Answer(False, f"{type(error).__name__}: {error}")


def table(rows: Iterable[Support]) -> str:
    """Write rows as a table in Markdown, and every reason once below it."""
    reasons: dict[str, int] = {}
    lines = [
        "| pipeline | family | mixed-resolution stages | step caches | token caches |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for answer in (row.mixed, row.step_cache, row.token_cache):
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
