"""Every accelerator keeps the contract: one row a method."""

from __future__ import annotations

from typing import Any

import pytest

from fastdit import (
    DMD,
    FORA,
    CGTaylor,
    ClusCa,
    DBCache,
    DuCa,
    EasyCache,
    FirstBlockCache,
    FoCa,
    Interval,
    MagCache,
    MagnitudeCurve,
    PublishedTaylor,
    SeaCache,
    SkipPolicy,
    StepMask,
    Taylor,
    TaylorSeer,
    TeaCache,
    ToCa,
)
from fastdit.testing import STEPS, AcceleratorContract

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


TOKEN_ROWS: dict[str, tuple[Any, Any, bool]] = {
    "ToCa": (ToCa(3, 0.25, first=2), ToCa(1), False),
    "DuCa": (DuCa(4, 0.25, first=2), DuCa(1), False),
    "ClusCa": (ClusCa(3, clusters=4, first=2), ClusCa(1), False),
}
ROWS |= TOKEN_ROWS


#: Other forecasters and scopes, and each image by itself: of these the fast part has one, and all pairs elsewhere.
LONG = [name for name in ROWS if " " in name and name != "FirstBlockCache, per image"]


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name, marks=[pytest.mark.exhaustive] * (name in LONG)) for name, row in ROWS.items()]
)
class TestEveryCache(AcceleratorContract):
    @pytest.fixture(autouse=True)
    def chosen(self, row: tuple[Any, Any, bool]) -> None:
        """The contract reads its class's attributes; here a row fills them in."""
        self.accelerator, self.neutral, self.reads_signal = row  # type: ignore[misc]
