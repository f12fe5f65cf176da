"""What a stack is made of is cited, once each, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest

import fastdit
from fastdit import (
    RALU,
    Compile,
    FirstBlockCache,
    FoCa,
    Interval,
    PixelLift,
    ProgressiveResolution,
    Stack,
    TaylorSeer,
    TeaCache,
    cite,
)
from fastdit.citation import WORKS


def keys(stack: Any) -> list[str]:
    return re.findall(r"@misc{(\w+),", cite(stack))


@pytest.mark.parametrize(
    ("stack", "cited"),
    [
        ([], []),
        (Interval(3), []),
        ([RALU("4x"), TeaCache(0.25, forecast=FoCa()), Compile()], ["ralu", "teacache", "foca"]),
        (Stack([TaylorSeer(interval=4)]), ["taylorseer"]),
        (ProgressiveResolution("4x"), []),
        (ProgressiveResolution.published("SPEED 1%"), ["speed"]),
        (ProgressiveResolution("4x", lift=PixelLift(noise="hadamard")), ["fresco"]),
        (RALU("4x", frame="query"), ["ralu", "crpa"]),
        (FirstBlockCache(0.1), ["paraattention"]),
    ],
    ids=str,
)
def test_every_method_of_a_stack_is_cited_once(stack: Any, cited: list[str]) -> None:
    assert keys(stack) == ["fastdit", *cited]


def test_every_name_in_the_table_is_a_public_class() -> None:
    assert [name for name in WORKS if not isinstance(getattr(fastdit, name, None), type)] == []


def test_an_entry_is_bibtex() -> None:
    entry = cite(TeaCache(0.25)).split("\n\n")[1]
    assert entry.count("{") == entry.count("}")
    assert "  eprint = {2411.19108}," in entry and "  author = {Liu, Feng and Zhang, Shiwei and " in entry
