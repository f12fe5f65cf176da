"""Which accelerators go together: every combination is run on a tiny pipeline, or refused by name with the reason."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator
from fastdit.attention.dispatcher import Attention
from fastdit.config import register
from fastdit.engine.base import Engine, Execute, PieceCall
from fastdit.errors import FastditError, FastditWarning
from fastdit.schedule.bottleneck_sampling import BottleneckSampling
from fastdit.schedule.just_in_time import JustInTime
from fastdit.schedule.lifts.latent import LatentLift
from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.schedule.ralu import RALU
from fastdit.schedule.selectors.text_attention import TextAttention
from fastdit.stack import Stack
from fastdit.step_cache.base import StepCache
from fastdit.step_cache.curves import MagnitudeCurve
from fastdit.step_cache.forecasters.base import Forecaster
from fastdit.step_cache.forecasters.dmd import DMD
from fastdit.step_cache.forecasters.foca import FoCa
from fastdit.step_cache.forecasters.reuse import Reuse
from fastdit.step_cache.forecasters.taylor import PublishedTaylor, Taylor
from fastdit.step_cache.gates.easycache import EasyCache
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.gates.interval import Interval
from fastdit.step_cache.gates.magcache import MagCache
from fastdit.step_cache.gates.seacache import SeaCache
from fastdit.step_cache.gates.step_mask import StepMask
from fastdit.step_cache.gates.teacache import TeaCache
from fastdit.testing import counted_calls, generate, tiny_flux
from fastdit.token_cache.clusca import ClusCa
from fastdit.token_cache.duca import DuCa
from fastdit.token_cache.toca import ToCa

STEPS = 18

#: Every schedule runs as many steps as there are without one, which is what a mask counts.
SCHEDULES: Mapping[str, Accelerator | None] = {
    "none": None,
    "ProgressiveResolution": ProgressiveResolution(steps=(11, 7), ends=(0.5,), starts=(0.15,), lift=PixelLift()),
    "RALU": RALU(steps=(5, 6, 7), ends=(0.30, 0.45), ratio=0.3),
    "RALU, the query's frame, text attention": RALU(
        steps=(5, 6, 7), ends=(0.30, 0.45), ratio=0.3, frame="query", selector=TextAttention()
    ),
    "ProgressiveResolution, latents enlarged": ProgressiveResolution(steps=(11, 7), lift=LatentLift(resize="bicubic")),
    "BottleneckSampling": BottleneckSampling((4, 8, 6)),
    "JustInTime": JustInTime((7, 6, 5)),
}

STEP_CACHES: Mapping[str, StepCache | None] = {
    "none": None,
    "TeaCache": TeaCache(0.6, (1.0, 0.0)),
    "FirstBlockCache": FirstBlockCache(1.0),
    "MagCache": MagCache(0.2, MagnitudeCurve(tuple(1.0 - 0.01 * step for step in range(STEPS)))),
    "EasyCache": EasyCache(0.6),
    "SeaCache": SeaCache(0.9),
    "Interval": Interval(2),
    "StepMask": StepMask((True, True, True, True, False, False) * 3),
}

TOKEN_CACHES: Mapping[str, Accelerator | None] = {
    "none": None,
    "ToCa": ToCa(3, 0.25, first=2),
    "DuCa": DuCa(4, 0.25, first=2),
    "ClusCa": ClusCa(3, clusters=4, first=2),
}

FORECASTERS: Mapping[str, Forecaster] = {
    "Reuse": Reuse(),
    "Taylor": Taylor(1),
    "PublishedTaylor": PublishedTaylor(1),
    "FoCa": FoCa(),
    "DMD": DMD(3),
}

#: A step cache's options that change what it does with a batch or at a switch.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "per image": {"per_image": True},
    "carried": {"stage_change": "carry"},
}


@register
@dataclasses.dataclass(frozen=True)
class Straight(Engine):
    """Runs every piece as the model has it: an engine's place in a stack, without a compiler's minutes."""

    def build(self, call: PieceCall, folder: Path) -> Execute:
        """Give what calls the piece."""
        return PieceCall.run


ATTENTIONS: Mapping[str, Accelerator | None] = {
    "none": None,
    "native": Attention("native"),
    "math": Attention("_native_math"),
}

ENGINES: Mapping[str, Accelerator | None] = {"none": None, "straight": Straight()}


class Names(NamedTuple):
    """The parts of a stack by their names in the tables above."""

    schedule: str
    step_cache: str
    forecaster: str
    option: str
    token_cache: str
    attention: str = "none"
    engine: str = "none"


@dataclasses.dataclass(frozen=True)
class Combination:
    """What came of one stack: `refusal` is the error's text, None where it ran."""

    names: Names
    refusal: str | None = None
    computed: int = 0
    skipped: int = 0
    partial: int = 0


def stated(names: Names) -> Stack | str:
    """Give a combination's stack, or the reason for which it can't be stated."""
    parts = [
        SCHEDULES[names.schedule],
        TOKEN_CACHES[names.token_cache],
        ATTENTIONS[names.attention],
        ENGINES[names.engine],
    ]
    cache = STEP_CACHES[names.step_cache]
    if cache is not None:
        changes: dict[str, Any] = {"forecast": FORECASTERS[names.forecaster], **OPTIONS[names.option]}
        parts.append(dataclasses.replace(cache, **changes))
    try:
        return Stack(part for part in parts if part is not None)
    except FastditError as error:
        return f"{type(error).__name__}: {error}"


def combinations() -> Iterator[Names]:
    """Give every combination of schedule, step cache with forecaster and option, and token cache."""
    for schedule, step_cache, token_cache in itertools.product(SCHEDULES, STEP_CACHES, TOKEN_CACHES):
        variants = itertools.product(FORECASTERS, OPTIONS) if STEP_CACHES[step_cache] is not None else (("", ""),)
        for forecaster, option in variants:
            yield Names(schedule, step_cache, forecaster, option, token_cache)


def pairs() -> Iterator[Names]:
    """Give so many combinations of all levels that any two parts that can be in one stack are in one of them.

    Two that can't are in one that is refused.
    """
    caches = [name for name, cache in STEP_CACHES.items() if cache is not None]
    others = tuple(map(list, (TOKEN_CACHES, ATTENTIONS, ENGINES)))
    yield from _covering([list(SCHEDULES), ["none"], [""], [""], *others])
    yield from _covering([list(SCHEDULES), caches, list(FORECASTERS), list(OPTIONS), *others])


def _covering(axes: Sequence[Sequence[str]]) -> Iterator[Names]:
    """Cover every pair of values of two axes, greedily: a pair that is open yet, filled up with what covers most.

    An axis begins with the value that goes with everything. A pair that is refused even so is a row of its own.
    """
    places = list(itertools.combinations(range(len(axes)), 2))
    missing = {(a, x, b, y): None for a, b in places for x in axes[a] for y in axes[b]}  # in order, unlike a set

    def covered(row: Sequence[str]) -> list[tuple[int, str, int, str]]:
        return [pair for a, b in places if (pair := (a, row[a], b, row[b])) in missing]

    while missing:
        a, x, b, y = next(iter(missing))
        row = [axis[0] for axis in axes]
        row[a], row[b] = x, y
        if isinstance(stated(Names(*row)), str):
            del missing[a, x, b, y]
        else:
            for place in set(range(len(axes))) - {a, b}:
                tries = ([*row[:place], value, *row[place + 1 :]] for value in axes[place])
                allowed = [one for one in tries if isinstance(stated(Names(*one)), Stack)]
                row = max(allowed, key=lambda one: len(covered(one)))
            for pair in covered(row):
                del missing[pair]
        yield Names(*row)


def tried(names: Names) -> Combination:
    """Run a combination twice on a tiny pipeline with two images, and check what every stack promises.

    Raises `AssertionError` where one that runs is not finite, not deterministic, or miscounts its blocks.
    """
    stack = stated(names)
    if isinstance(stack, str):
        return Combination(names, stack)
    pipeline, call = tiny_flux(steps=STEPS, batch=2, size=128)
    if stack.schedule is not None:
        call.pop("num_inference_steps")
    with warnings.catch_warnings():
        # A bonus that a mixed stage goes without, or nothing to skip beside a schedule, is no conflict.
        warnings.simplefilter("ignore", FastditWarning)
        try:
            fast = accelerate(pipeline, stack)
            first = generate(fast, call, seeds=(1, 2))
        except FastditError as error:
            return Combination(names, f"{type(error).__name__}: {error}")
        with counted_calls(pipeline.transformer) as counts:
            second = generate(fast, call, seeds=(1, 2))
    record = fast.fastdit.last_run
    assert bool(torch.isfinite(first).all()), names
    assert torch.equal(first, second), names
    if (
        stack.engine is None
        and stack.token_cache is None
        and stack.step_cache is not None
        and not stack.step_cache.per_image
    ):
        assert sum(counts) == sum(step.blocks_run for step in record.steps), names
    return Combination(names, None, record.computed, record.skipped, record.partial)
