"""Every accelerator keeps every promise: on the tiny FLUX, and in turns on the tiny pipelines of all other kinds.

A method is a row. A pipeline that a method refuses by name has kept its promise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from fastdit import (
    DMD,
    FORA,
    RALU,
    Attention,
    BottleneckSampling,
    CGTaylor,
    ClusCa,
    DBCache,
    DuCa,
    EasyCache,
    FastditError,
    FirstBlockCache,
    FoCa,
    Interval,
    JustInTime,
    MagCache,
    MagnitudeCurve,
    ProgressiveResolution,
    PublishedTaylor,
    SeaCache,
    SkipPolicy,
    StepMask,
    Taylor,
    TaylorSeer,
    TeaCache,
    ToCa,
)
from fastdit.testing import PIPELINES, PROMISES, STEPS, Inapplicable, Subject, of_accelerator

#: P(d) = d: the accumulated change is the plain sum of changes.
LINE = (1.0, 0.0)
CURVE = MagnitudeCurve((1.0, *(1.0 - 0.01 * step for step in range(STEPS - 1))))

ROWS: dict[str, tuple[Any, Any, bool]] = {
    "TeaCache": (TeaCache(0.6, LINE), TeaCache(0.0, LINE), True),
    "TeaCache, per image": (TeaCache(0.6, LINE, per_image=True), TeaCache(0.0, LINE, per_image=True), True),
    "TeaCache with Taylor": (TeaCache(0.6, LINE, forecast=Taylor(1)), TeaCache(0.0, LINE, forecast=Taylor(1)), True),
    "FirstBlockCache": (FirstBlockCache(0.8), FirstBlockCache(0.0), True),
    "FirstBlockCache, per image": (FirstBlockCache(0.8, per_image=True), FirstBlockCache(0.0, per_image=True), True),
    "FirstBlockCache with FoCa": (FirstBlockCache(0.8, forecast=FoCa()), FirstBlockCache(0.0, forecast=FoCa()), True),
    "CGTaylor": (CGTaylor(0.8), CGTaylor(0.0), True),
    "DBCache": (DBCache(0.9, 1, 0, first=2), DBCache(0.0, 1, 0, first=2), True),
    "EasyCache": (EasyCache(0.9), EasyCache(0.0), True),
    "EasyCache, per image": (EasyCache(0.9, per_image=True), EasyCache(0.0, per_image=True), True),
    "SeaCache": (SeaCache(0.9), SeaCache(0.0), True),
    "SeaCache, per image": (SeaCache(0.9, per_image=True), SeaCache(0.0, per_image=True), True),
    "MagCache": (MagCache(0.2, CURVE), MagCache(0.0, CURVE), False),
    "Interval": (Interval(3), Interval(1), False),
    "Interval with DMD": (Interval(2, forecast=DMD(3)), Interval(1, forecast=DMD(3)), False),
    "Interval, per image": (Interval(3, per_image=True), Interval(1, per_image=True), False),
    "Interval of whole forwards": (
        Interval(3, scope="forward", forecast=Taylor(1)),
        Interval(1, scope="forward", forecast=Taylor(1)),
        False,
    ),
    "TaylorSeer": (TaylorSeer(3, 2), TaylorSeer(1, 2), False),
    "FORA": (FORA(3), FORA(1), False),
    "StepMask": (
        StepMask((1, 1, 0) * 4, forecast=PublishedTaylor(1), policy=SkipPolicy(first=1, last=1)),
        StepMask((1,) * STEPS),
        False,
    ),
}


ROWS |= {
    "ToCa": (ToCa(3, 0.25, first=2), ToCa(1), False),
    "DuCa": (DuCa(4, 0.25, first=2), DuCa(1), False),
    "ClusCa": (ClusCa(3, clusters=4, first=2), ClusCa(1), False),
    "RALU": (RALU(steps=(4, 4, 4), ends=(0.3, 0.45), ratio=0.3), None, False),
    "ProgressiveResolution": (ProgressiveResolution(steps=(6, 6)), None, False),
    "BottleneckSampling": (BottleneckSampling((4, 4, 4)), None, False),
    "JustInTime": (JustInTime((4, 4, 4)), None, False),
    "Attention": (Attention("_native_math"), Attention("native"), False),
}

#: Other forecasters and scopes, and each image by itself: of these the fast part has one.
LONG = [name for name in ROWS if " " in name and name != "FirstBlockCache, per image"]
#: What takes two pipelines, or processes of its own: in the fast part for these alone.
WIDE = ("pipelines apart", "threads apart", "branches apart", "gradients are whole", "pickles or says so")
FEW = ("FirstBlockCache", "ToCa", "RALU")
#: On how many of the other pipelines each method is tried, with one promise each: so that it is asked for all of them.
TRIED = 20


def in_short(row: str, promise: str) -> bool:
    """Whether the fast part asks it: a few methods for everything, others for a third, another one for each."""
    wide = promise in WIDE or (list(ROWS).index(row) + list(PROMISES).index(promise)) % 3
    return row not in LONG and (row in FEW or not wide)


def check(promise: str, subject: Subject) -> None:
    try:
        PROMISES[promise].check(subject)
    except Inapplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.rows(200)  # `in_short` chooses
@pytest.mark.parametrize(
    ("row", "promise"),
    [
        pytest.param(
            row,
            promise,
            id=f"{row}: {promise}",
            marks=[] if in_short(row, promise) else [pytest.mark.exhaustive],
        )
        for row in ROWS
        for promise in PROMISES
    ],
)
def test_every_accelerator_keeps_every_promise_on_flux(row: str, promise: str) -> None:
    accelerator, neutral, reads_signal = ROWS[row]
    check(promise, of_accelerator(accelerator, neutral, reads_signal=reads_signal))


def in_turns() -> Iterator[tuple[str, str, str]]:
    """Give every method `TRIED` pipelines with a promise each, beginning with another pipeline and another promise."""
    asked = [promise for promise in PROMISES if promise != "acts"]  # the rows' settings act on FLUX
    for place, row in enumerate(ROWS):
        pipelines = itertools.islice(itertools.cycle(PIPELINES), place * len(PIPELINES) // len(ROWS), None)
        for number, pipeline in enumerate(itertools.islice(pipelines, TRIED)):
            yield pipeline, row, asked[(number + 5 * place) % len(asked)]


def test_every_method_is_asked_for_every_promise_and_so_is_every_pipeline() -> None:
    pairs = list(in_turns())
    for row in ROWS:
        assert {promise for _, of, promise in pairs if of == row} == {*PROMISES} - {"acts"}
    for pipeline in PIPELINES:
        assert len({promise for of, _, promise in pairs if of == pipeline}) > len(PROMISES) // 2


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::fastdit.NeverFired")  # the rows' settings act on FLUX
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # by diffusers, in models of its own
@pytest.mark.parametrize(("pipeline", "row", "promise"), list(in_turns()))
def test_every_accelerator_keeps_its_promises_on_every_pipeline(pipeline: str, row: str, promise: str) -> None:
    accelerator, neutral, _ = ROWS[row]
    build = functools.partial(PIPELINES[pipeline], steps=STEPS, output_type="latent")
    try:
        check(promise, of_accelerator(accelerator, neutral, build=build))
    except FastditError as refusal:
        pytest.skip(str(refusal))
