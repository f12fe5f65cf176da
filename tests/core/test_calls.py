"""How many Python calls of the package a forward costs, beside those of torch and diffusers."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import fastdit
from fastdit import RALU, TeaCache, accelerate
from fastdit.testing import generate, tiny_flux
from fastdit.twins.transformer import TransformerTwin

#: A forward of the tiny FLUX under RALU and TeaCache made 291 calls before the chain; what Python 3.12 inlines counts.
MOST = 150

_PACKAGE = fastdit.__path__[0]
_FORWARD: CodeType = TransformerTwin.__call__.__code__


def test_a_forward_under_a_schedule_and_a_cache_makes_few_calls() -> None:
    pipe, call = tiny_flux(steps=18)
    twin = accelerate(pipe, [RALU.paper("4x"), TeaCache(2.5, coefficients=(1.0, 0.0))])
    generate(twin, call)  # what is done once in a model's life is no part of a forward
    calls: list[int] = []
    inside: list[FrameType] = []

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is _FORWARD:
            inside.append(frame)
            calls.append(0)
        if inside and event == "call" and frame.f_code.co_filename.startswith(_PACKAGE):
            calls[-1] += 1
        if inside and event == "return" and frame is inside[-1]:
            inside.pop()

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        generate(twin, call)
    finally:
        sys.setprofile(before)
    assert len(calls) == 18
    assert all(most <= MOST for most in calls[1:]), calls
