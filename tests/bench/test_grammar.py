"""Stacks as text: what is read, that it is what plans print, and how a slip is told."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdit import (
    RALU,
    Compile,
    FirstBlockCache,
    LatentLift,
    ProgressiveResolution,
    Stack,
    StepMask,
    Taylor,
    TeaCache,
    ToCa,
)
from fastdit.bench.grammar import parse_stack, stack_text
from fastdit.errors import FastditError

STACKS = {
    "": [],
    "Compile": [Compile()],
    "RALU 4x, TeaCache .25, Compile": [RALU("4x"), TeaCache(0.25), Compile()],
    "RALU('4x'), TeaCache(0.25)": [RALU("4x"), TeaCache(0.25)],
    "  FirstBlockCache  .1   leading=2 forecast=Taylor(1) ": [FirstBlockCache(0.1, leading=2, forecast=Taylor(1))],
    "FirstBlockCache .1 forecast=Taylor per_image=True": [FirstBlockCache(0.1, forecast=Taylor(), per_image=True)],
    "TeaCache coefficients=flux-dev": [TeaCache(coefficients="flux-dev")],
    "TeaCache .3 (1.0,-2.5)": [TeaCache(0.3, (1.0, -2.5))],
    "StepMask (1,0,1)": [StepMask((1, 0, 1))],
    "ProgressiveResolution steps=(12, 6) lift=LatentLift(resize='bicubic'), ToCa": [
        ProgressiveResolution(steps=(12, 6), lift=LatentLift(resize="bicubic")),
        ToCa(),
    ],
}


@pytest.mark.parametrize("text", STACKS)
def test_a_stack_is_read_from_text(text: str) -> None:
    assert parse_stack(text) == Stack(STACKS[text])


@pytest.mark.parametrize("text", STACKS)
def test_what_a_stack_is_written_as_is_read_again(text: str) -> None:
    assert parse_stack(stack_text(Stack(STACKS[text]))) == Stack(STACKS[text])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("TeeCache .25", r"nothing called 'TeeCache'; did you mean TeaCache\?"),
        ("teacache .25", r"did you mean TeaCache\?"),
        ("TeaCache .25 forcast=Taylor", r"TeaCache has no field 'forcast'; did you mean forecast\?"),
        ("TeaCache .25 threshold=.3", "threshold is given twice"),
        ("Compile 1 2 3 4 5 6 7 8 9", "without a name"),
        ("TeaCache(0.25", "not closed"),
        ("TeaCache .25,, Compile", "between two commas"),
        ("TeaCache(open('x'))", "nothing called 'open'"),
        ("TeaCache(1 + 1)", "is no value"),
        ("__import__('os').system('true')", "is no value"),
        ("TeaCache -1", "threshold"),
        ("Taylor 1", "no accelerator"),
        ("4x", "no part of a stack"),
        ("RALU 4x, RALU 7x", "schedule"),
    ],
)
def test_a_slip_is_told_with_what_was_meant(text: str, told: str) -> None:
    with pytest.raises(FastditError, match=told):
        parse_stack(text)


@given(st.text(max_size=60) | st.text("RALU(),=' .[]4xTeaCch", max_size=40))
def test_no_text_ends_in_anything_but_a_stack_or_a_named_error(text: str) -> None:
    with contextlib.suppress(FastditError):
        parse_stack(text)
