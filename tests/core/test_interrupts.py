"""An interrupt at any line of a call: the twin is free, shows nothing of the run, and its next call is the same."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

import tiny
from fastdit import RALU, Attention, FirstBlockCache, NeverFired, Taylor, accelerate, acceleration, process, run
from fastdit.attention import base as attention
from fastdit.blocks import chain
from fastdit.engine.inductor import inductor_in
from fastdit.testing import flux_transformer
from fastdit.twins import scheduler, transformer

STACKS = {
    "none": [],
    "cache and kernel": [FirstBlockCache(1e6, forecast=Taylor(order=1)), Attention("_native_math")],
    "schedule and cache": [RALU(steps=(1, 1, 1), ends=(0.3, 0.45), ratio=0.3), FirstBlockCache(0.0)],
}
#: Whose lines are interrupted: whatever holds something for a call, and has to let it go.
WATCHED = (acceleration, process, chain, transformer, run, scheduler, attention)
#: About as many lines are tried in the fast part; all of them in the exhaustive one.
SAMPLE = 20


class Lines:
    """Counts the lines of some modules while a function runs, and interrupts it at one of them."""

    def __init__(self, modules: tuple[ModuleType, ...], at: int | None = None) -> None:
        self._files = {module.__file__ for module in modules}
        self._at, self.count, self.place = at, 0, ""

    def run(self, function: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            function()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            if self.count == self._at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt  # which also ends the tracing
            self.count += 1
        return self._line


def build() -> tiny.Built:
    pipe, call = tiny.flux(size=64, steps=3)
    pipe.transformer = flux_transformer(layers=2, single_layers=0)
    return pipe, call


@pytest.mark.parametrize("stack", STACKS)
def test_after_an_interrupt_at_any_line_the_twin_is_free_and_its_next_call_is_the_same(
    stack: str, pytestconfig: pytest.Config
) -> None:
    pipe, call = build()
    fast = accelerate(pipe, STACKS[stack])

    def called() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NeverFired)
            return tiny.run(fast, call, output_type="latent")

    expected = called()
    lines = Lines(WATCHED)
    lines.run(called)
    assert lines.count > 200
    step = 1 if pytestconfig.getoption("--exhaustive") else lines.count // SAMPLE
    for at in range(0, lines.count, step):
        interrupted = Lines(WATCHED, at)
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(called)
        assert fast.fastdit.open_run is None, interrupted.place
        assert fast.scheduler is pipe.scheduler, interrupted.place
        assert _get_current_function_mode_stack() == [], interrupted.place
        assert torch.equal(called(), expected), interrupted.place


def test_after_an_interrupt_at_any_line_of_a_build_s_surroundings_the_process_is_as_before(tmp_path: Any) -> None:
    before, filters = dict(os.environ), list(warnings.filters)

    def building() -> None:
        with inductor_in(tmp_path):
            pass

    lines = Lines((process,))
    lines.run(building)
    for at in range(lines.count):
        interrupted = Lines((process,), at)
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(building)
        assert dict(os.environ) == before and warnings.filters == filters, interrupted.place
        # Leaving a lock's own `with` is a line to a tracer, and nothing that an interrupt can come between.
        process._renew()
