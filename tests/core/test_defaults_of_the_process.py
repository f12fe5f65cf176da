"""Nothing that is computed depends on torch's default dtype or default device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdit
import tiny
from fastdit import (
    DMD,
    RALU,
    BottleneckSampling,
    CGTaylor,
    ClusCa,
    DuCa,
    EasyCache,
    FirstBlockCache,
    Interval,
    JustInTime,
    ProgressiveResolution,
    SeaCache,
    TeaCache,
    ToCa,
    accelerate,
)

SOURCE = Path(fastdit.__file__).parent

#: torch's functions that make a tensor of the process's default dtype, on its default device.
FACTORIES = {
    "arange", "empty", "eye", "fftfreq", "full", "hann_window", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "rfftfreq", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip

STACKS: dict[str, list[Any]] = {
    "RALU": [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)],
    "RALU, query": [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3, frame="query")],
    "Bottleneck": [BottleneckSampling((1, 3, 2))],
    "Progressive": [ProgressiveResolution(steps=(3, 3))],
    "JustInTime": [JustInTime((2, 2, 2))],
    "Sea": [SeaCache(0.6)],
    "Easy": [EasyCache(0.5)],
    "Tea": [TeaCache(0.5, (1.0, 0.0), per_image=True)],
    "First block": [FirstBlockCache(0.5)],
    "DMD": [Interval(2, forecast=DMD(3))],
    "CGTaylor": [CGTaylor(0.9)],
    "ToCa": [ToCa(3, score="attention", spatial_bonus=0.5, first=1)],
    "DuCa": [DuCa(3, age_weight=0.3, first=1)],
    "ClusCa": [ClusCa(3, clusters=4, first=1)],
}


@pytest.fixture
def another_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore::fastdit.errors.NeverFired")
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_under_another_default_dtype_a_stack_gives_what_it_gave(stack: list[Any], another_default: None) -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    expected = tiny.run(accelerate(pipe, stack), call)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        assert torch.equal(tiny.run(accelerate(pipe, stack), call), expected)


#: What works in a loop of one's own, which has no schedule and no noise levels.
IN_A_LOOP = ("Easy", "Tea", "First block", "DMD", "CGTaylor", "ToCa", "DuCa", "ClusCa")


@pytest.mark.filterwarnings("ignore::fastdit.errors.NeverFired")
@pytest.mark.parametrize("name", IN_A_LOOP)
def test_under_another_default_device_a_stack_gives_what_it_gave(name: str) -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    calls, stack = tiny.recorded_calls(pipe, call), STACKS[name]

    def outputs() -> list[torch.Tensor]:
        twin = accelerate(pipe.transformer, stack)
        with torch.no_grad(), twin.fastdit.run(num_inference_steps=len(calls)):
            return [twin(*args, **kwargs)[0] for args, kwargs in calls]

    expected = outputs()
    with torch.device("meta"):
        found = outputs()
    assert all(map(torch.equal, found, expected))


def test_no_tensor_is_made_without_dtype_and_device() -> None:
    bare = []
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in ("testing", "mini", "measure"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
                made_by_torch = ast.unparse(node.func).startswith("torch.")
                if made_by_torch and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}:
                    bare.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert not bare
