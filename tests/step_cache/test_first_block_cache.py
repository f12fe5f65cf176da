"""First-block cache against its straight-line reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_first_block_cache import FirstBlockReference
from reference_flux import denoise

import tiny
from fastdit import (
    FirstBlockCache,
    InvalidConfig,
    SkipPolicy,
    accelerate,
)

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 12


def pattern(fast: Any, branch: int = 0) -> list[bool]:
    steps = fast.fastdit.last_run.steps
    names = list(dict.fromkeys(step.branch for step in steps))
    return [step.action == "computed" for step in steps if step.branch == names[branch]]


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("threshold", [0.6, 0.8, 1.0, 10.0])
def test_latents_and_skip_schedule_equal_the_reference(threshold: float, last: int) -> None:
    pipe, call = tiny.flux(steps=STEPS, batch=2, size=(64, 96))
    fast = accelerate(pipe, [FirstBlockCache(threshold, policy=SkipPolicy(first=1, last=last))])
    found = tiny.run(fast, call, output_type="latent")
    state = FirstBlockReference(threshold, STEPS, last=last)
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [state])
    assert pattern(fast) == expected.computed["cond"]
    assert not all(pattern(fast))
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


def test_branches_of_true_guidance_equal_the_reference() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    call = tiny.flux_negative(call)
    fast = accelerate(pipe, [FirstBlockCache(0.8, policy=SkipPolicy(first=1, last=0))])
    found = tiny.run(fast, call, output_type="latent")
    states = [FirstBlockReference(0.8, STEPS) for _ in range(2)]
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), states)
    assert expected.computed["cond"] != expected.computed["uncond"]
    assert pattern(fast, 0) == expected.computed["cond"]
    assert pattern(fast, 1) == expected.computed["uncond"]
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


def test_only_the_first_block_runs_in_a_skipped_step_and_the_record_says_so() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [FirstBlockCache(10.0)])
    tiny.run(fast, call)  # a twin's first forward also verifies its wiring
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert counts == [STEPS] + [record.computed] * 4
    assert [step.blocks_run for step in record.steps] == [5 if done else 1 for done in pattern(fast)]
    assert sum(counts) == sum(step.blocks_run for step in record.steps)


def test_flops_count_what_ran() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    plain, fast = accelerate(pipe, []), accelerate(pipe, [FirstBlockCache(10.0)])
    tiny.run(plain, call)
    tiny.run(fast, call)
    per_step = plain.fastdit.last_run.flops / STEPS
    for step in fast.fastdit.last_run.steps:
        if step.action == "computed":
            assert step.flops == pytest.approx(per_step)
        else:
            assert 0 < step.flops < 0.6 * per_step
    assert fast.fastdit.last_run.flops < plain.fastdit.last_run.flops


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), "x"])
def test_a_bad_threshold_is_refused_when_it_is_written(threshold: Any) -> None:
    with pytest.raises((InvalidConfig, TypeError)):
        FirstBlockCache(threshold)
