"""Which accelerators go together: every combination is run on a tiny pipeline, or refused by name with the reason."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator
from fastdit.errors import FastditError, FastditWarning
from fastdit.schedule.bottleneck_sampling import BottleneckSampling
from fastdit.schedule.just_in_time import JustInTime
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
    "RALU": RALU(steps=(11, 7), ends=(0.5,), starts=(0.15,), lift=PixelLift()),
    "RALU, mixed stage": RALU(steps=(5, 6, 7), ends=(0.30, 0.45), ratio=0.3),
    "RALU, the query's frame, text attention": RALU(
        steps=(5, 6, 7), ends=(0.30, 0.45), ratio=0.3, frame="query", selector=TextAttention()
    ),
    "ProgressiveResolution": ProgressiveResolution((11, 7)),
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


class Names(NamedTuple):
    """The parts of a stack by their names in the tables above."""

    schedule: str
    step_cache: str
    forecaster: str
    option: str
    token_cache: str


@dataclasses.dataclass(frozen=True)
class Combination:
    """What came of one stack: `refusal` is the error's text, None where it ran."""

    names: Names
    refusal: str | None = None
    computed: int = 0
    skipped: int = 0
    partial: int = 0


def combinations(forecasters: Iterable[str] = tuple(FORECASTERS)) -> Iterator[tuple[Names, Stack | str]]:
    """Give every combination's names with its stack, or with the reason for which it can't be stated."""
    forecasters = tuple(forecasters)
    for schedule, step_cache, token_cache in itertools.product(SCHEDULES, STEP_CACHES, TOKEN_CACHES):
        cache = STEP_CACHES[step_cache]
        variants = itertools.product(forecasters, OPTIONS) if cache is not None else (("", ""),)
        for forecaster, option in variants:
            names = Names(schedule, step_cache, forecaster, option, token_cache)
            parts = [SCHEDULES[schedule], TOKEN_CACHES[token_cache]]
            if cache is not None:
                changes: dict[str, Any] = {"forecast": FORECASTERS[forecaster], **OPTIONS[option]}
                parts.append(dataclasses.replace(cache, **changes))
            try:
                yield names, Stack(part for part in parts if part is not None)
            except FastditError as error:
                yield names, f"{type(error).__name__}: {error}"


def tried(names: Names, stack: Stack | str) -> Combination:
    """Run a combination twice on a tiny pipeline with two images, and check what every stack promises.

    Raises `AssertionError` where one that runs is not finite, not deterministic, or miscounts its blocks.
    """
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
            second, third = (generate(fast, call, seeds=(1, 2)) for _ in range(2))
    record = fast.fastdit.last_run
    assert bool(torch.isfinite(first).all()), names
    assert torch.equal(second, third), names
    if stack.token_cache is None and stack.step_cache is not None and not stack.step_cache.per_image:
        assert sum(counts) == 2 * sum(step.blocks_run for step in record.steps), names
    return Combination(names, None, record.computed, record.skipped, record.partial)
