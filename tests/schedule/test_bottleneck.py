"""Bottleneck Sampling: the stages it runs, a straight-line loop, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_stages import stage
from torch.nn import functional

import tiny
from fastdit import (
    BottleneckSampling,
    Interval,
    InvalidConfig,
    LatentLift,
    PixelLift,
    SkipPolicy,
    TokenCopy,
    accelerate,
)
from fastdit.layout import CoarseLayout, FineLayout
from fastdit.models.patches import assembled, patches

SIDE = 8
SHORT = BottleneckSampling((1, 2, 2), lift=LatentLift())


def test_it_runs_at_full_size_then_at_half_then_at_full_size_again() -> None:
    pipe, call = tiny.flux(size=128)
    fast = accelerate(pipe, [SHORT])
    assert torch.isfinite(tiny.run(fast, {**call, "num_inference_steps": 5})).all()
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [64, 16, 16, 64, 64]


def test_it_equals_the_straight_line_loop() -> None:
    pipe, call = tiny.flux(size=128, steps=5)
    noise = tiny.randn(1, SIDE * SIDE, 16, seed=5)
    found = tiny.run(accelerate(pipe, [SHORT]), call, latents=noise, output_type="latent")
    stages = SHORT.plan(SIDE, SIDE, None).stages
    coarse_noise = patches(functional.avg_pool2d(assembled(noise, SIDE, SIDE), 2) * 2)

    with torch.no_grad():
        _, clean = stage(pipe, call, noise, SIDE, stages[0].sigmas)
        start = stages[1].sigmas[0]
        small = patches(functional.avg_pool2d(assembled(clean, SIDE, SIDE), 2))
        _, clean = stage(pipe, call, (1 - start) * small + start * coarse_noise, SIDE // 2, stages[1].sigmas)
        start = stages[2].sigmas[0]
        large = patches(functional.interpolate(assembled(clean, SIDE // 2, SIDE // 2), scale_factor=2))
        expected, _ = stage(pipe, call, (1 - start) * large + start * noise, SIDE, stages[2].sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_a_cache_carries_follows_to_the_coarse_grid_and_back() -> None:
    pipe, call = tiny.flux(size=128, steps=9)
    cache = Interval(2, stage_change="carry", policy=SkipPolicy(last=0))
    fast = accelerate(pipe, [BottleneckSampling((2, 4, 3), lift=LatentLift()), cache])
    assert torch.isfinite(tiny.run(fast, call)).all()
    assert fast.fastdit.last_run.skipped > 3
    fine, coarse = FineLayout(4, 4), CoarseLayout(4, 4)
    assert fine.sources(coarse).tolist() == [[0, 2, 8, 10]]
    assert coarse.sources(fine).tolist() == [[0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]]


def test_pixels_may_be_what_is_resized() -> None:
    pipe, call = tiny.sd3(size=128, steps=5)
    fast = accelerate(pipe, [BottleneckSampling((1, 2, 2), lift=PixelLift())])
    assert torch.isfinite(tiny.run(fast, call)).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": (3, 11)},
        {"steps": (3, 0, 4)},
        {"ends": (0.6, 0.12)},
        {"starts": (0.2, 0.3)},
        {"starts": (0.0, 0.3)},
        {"lift": TokenCopy()},
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused_when_it_is_written(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        BottleneckSampling(**arguments)


def test_a_size_that_can_t_be_halved_and_fewer_steps_than_stages_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="even"):
        SHORT.plan(7, 8, None)
    with pytest.raises(InvalidConfig, match="3"):
        SHORT.plan(8, 8, 2)
