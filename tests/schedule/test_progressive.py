"""Progressive resolution: the stages that it runs, that it is RALU of the plainest parts, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from fastdit import (
    RALU,
    InvalidConfig,
    LatentLift,
    ProgressiveResolution,
    Stack,
    TokenCopy,
    accelerate,
)

SHORT = ProgressiveResolution((3, 2))


def test_it_runs_at_half_size_then_at_full_size_as_ralu_of_the_same_parts_does() -> None:
    pipe, call = tiny.flux(size=128, steps=5)
    fast = accelerate(pipe, [SHORT])
    found = tiny.run(fast, call, output_type="latent")
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [16, 16, 16, 64, 64]
    parts = RALU(steps=(3, 2), ends=(0.5,), starts=(0.15,), lift=LatentLift(resize="bicubic", noise="fresh"))
    assert torch.equal(found, tiny.run(accelerate(pipe, [parts]), call, output_type="latent"))


def test_it_brings_its_own_step_count_and_survives_json() -> None:
    assert ProgressiveResolution().plan(8, 8, None).steps == 23
    stack = Stack([ProgressiveResolution((4, 3), starts=(0.3,), base_shift=5.0)])
    assert Stack.from_json(stack.to_json()) == stack


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": (3, 11, 4)},
        {"steps": 4},
        {"steps": (0, 4)},
        {"ends": (0.2, 0.3)},
        {"starts": (0.6,)},
        {"lift": TokenCopy()},
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused_when_it_is_written(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        ProgressiveResolution(**arguments)
