"""An empty stack and neutral settings change no bit, on every model and in loops of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from fastdit import (
    FirstBlockCache,
    NoActiveRun,
    SkipPolicy,
    Stack,
    accelerate,
)

EVERY = pytest.mark.parametrize("name", tiny.PIPELINES)
CALLS_A_STEP = {"qwen-image": 2, "wan": 2}
BRANCHES = {1: ("cond",), 2: ("cond", "uncond")}


@EVERY
def test_an_empty_stack_is_bit_equal_to_the_plain_pipeline(name: str) -> None:
    pipe, call = tiny.PIPELINES[name]()
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [])
    assert torch.equal(tiny.run(fast, call), plain)
    assert torch.equal(tiny.run(fast, call), plain)
    record = fast.fastdit.last_run
    assert record.completed
    assert {step.action for step in record.steps} == {"computed"}
    assert len(record.steps) == 4 * CALLS_A_STEP.get(name, 1)


@EVERY
def test_a_threshold_of_zero_is_bit_equal_to_the_plain_pipeline(name: str) -> None:
    pipe, call = tiny.PIPELINES[name]()
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [FirstBlockCache(0.0)])
    assert torch.equal(tiny.run(fast, call), plain)
    assert fast.fastdit.last_run.skipped == 0


@EVERY
def test_a_large_threshold_skips_and_the_record_equals_the_real_block_calls(name: str) -> None:
    pipe, call = tiny.PIPELINES[name](steps=6)
    fast = accelerate(pipe, [FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))])
    plain = tiny.run(pipe, call)
    tiny.run(fast, call)  # a twin's first forward also verifies its wiring
    with tiny.counted_blocks(pipe.transformer) as counts:
        found = tiny.run(fast, call)
    record = fast.fastdit.last_run
    calls = 6 * CALLS_A_STEP.get(name, 1)
    assert torch.isfinite(found).all()
    assert found.shape == plain.shape
    assert not torch.equal(found, plain)
    assert len(record.steps) == calls == record.computed + record.skipped
    assert record.computed == calls // 3
    assert counts == [calls] + [record.computed] * (len(counts) - 1)
    # Z-Image's refiners are blocks, too; they run before the first block of the main list, and so in every step.
    (blocks,) = {step.blocks for step in record.steps}
    always = calls * (blocks - len(counts))
    assert sum(step.blocks_run for step in record.steps) == sum(counts) + always
    assert always == (calls * 2 if name == "z-image" else 0)
    assert record.flops == sum(step.flops for step in record.steps)
    assert all((step.flops < step.full_flops) == (step.action != "computed") for step in record.steps)


@EVERY
def test_a_bare_transformer_in_a_loop_of_one_s_own_is_bit_equal_under_an_empty_stack(name: str) -> None:
    pipe, call = tiny.PIPELINES[name]()
    calls = tiny.recorded_calls(pipe, call)
    branches = BRANCHES[CALLS_A_STEP.get(name, 1)]
    twin = accelerate(pipe.transformer, [])
    with torch.no_grad(), twin.fastdit.run(num_inference_steps=4, branches=branches):
        found = [twin(*args, **kwargs) for args, kwargs in calls]
    with torch.no_grad():
        plain = [pipe.transformer(*args, **kwargs) for args, kwargs in calls]
    for mine, theirs in zip(found, plain, strict=True):
        assert equal(mine[0], theirs[0])
    assert [step.branch for step in twin.fastdit.last_run.steps] == list(branches) * 4


@EVERY
def test_a_bare_transformer_skips_as_the_pipeline_does(name: str) -> None:
    pipe, call = tiny.PIPELINES[name]()
    calls = tiny.recorded_calls(pipe, call)
    branches = BRANCHES[CALLS_A_STEP.get(name, 1)]
    twin = accelerate(pipe.transformer, [FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))])

    def whole() -> list[Any]:
        with torch.no_grad(), twin.fastdit.run(num_inference_steps=4, branches=branches):
            return [twin(*args, **kwargs)[0] for args, kwargs in calls]

    first = whole()  # a twin's first forward also verifies its wiring
    with tiny.counted_blocks(pipe.transformer) as counts:
        found = whole()
    assert all(equal(mine, theirs) for mine, theirs in zip(found, first, strict=True))
    assert all(torch.isfinite(tensor).all() for item in found for tensor in flat(item))
    assert counts == [4 * len(branches)] + [2 * len(branches)] * (len(counts) - 1)
    actions = [step.action for step in twin.fastdit.last_run.steps]
    assert [action == "computed" for action in actions] == [step in (0, 3) for step in range(4) for _ in branches]


def test_cached_steps_of_one_branch_never_see_the_other_s_state() -> None:
    pipe, call = tiny.flux(steps=5)
    fast = accelerate(pipe, [FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=0))])
    # With an unconditional prompt that equals the conditional one both branches are one, whatever the scale.
    same = {
        **call,
        "negative_prompt_embeds": call["prompt_embeds"],
        "negative_pooled_prompt_embeds": call["pooled_prompt_embeds"],
        "true_cfg_scale": 1.5,
    }
    torch.testing.assert_close(tiny.run(fast, same), tiny.run(fast, call), rtol=0, atol=1e-5)
    # With another one the conditional branch skips the same steps with its own residual.
    other = tiny.flux_negative(call)
    tiny.run(fast, other)
    branches = {step.branch for step in fast.fastdit.last_run.steps}
    assert len(branches) == 2
    assert len(fast.fastdit.last_run.steps) == 10


def test_a_bare_twin_outside_a_run_says_how_to_open_one() -> None:
    pipe, call = tiny.flux()
    ((args, kwargs), *_) = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [FirstBlockCache(0.1)])
    with pytest.raises(NoActiveRun, match="run"), torch.no_grad():
        twin(*args, **kwargs)


def test_a_bare_twin_takes_its_branch_from_cache_context() -> None:
    pipe, call = tiny.flux()
    calls = tiny.recorded_calls(pipe, tiny.flux_negative(call))
    twin = accelerate(pipe.transformer, [FirstBlockCache(1e6)])
    with torch.no_grad(), twin.fastdit.run(num_inference_steps=4, branches=("cond", "uncond")):
        for index, (args, kwargs) in enumerate(calls):
            with twin.cache_context(("cond", "uncond")[index % 2]):
                twin(*args, **kwargs)
    assert [step.branch for step in twin.fastdit.last_run.steps] == ["cond", "uncond"] * 4
    assert {step.branch for step in twin.fastdit.last_run.steps if step.action != "computed"} == {"cond", "uncond"}


@pytest.mark.parametrize("stack", [[], Stack([]), (), Stack(())], ids=["list", "Stack of list", "tuple", "Stack"])
def test_a_stack_may_be_given_in_any_form(stack: Any) -> None:
    pipe, _ = tiny.flux()
    assert isinstance(accelerate(pipe, stack).fastdit.stack, Stack)


def test_the_wiring_is_verified_once_with_one_forward_more_than_the_record_has() -> None:
    pipe, call = tiny.flux(steps=6)
    fast = accelerate(pipe, [FirstBlockCache(1e6)])
    totals = []
    for _ in range(3):
        with tiny.counted_blocks(pipe.transformer) as counts:
            tiny.run(fast, call)
        totals.append(sum(counts) - sum(step.blocks_run for step in fast.fastdit.last_run.steps))
    assert totals[0] in (0, 5)
    assert totals[1:] == [0, 0]


def test_two_block_lists_and_one_gate_take_one_decision() -> None:
    pipe, call = tiny.flux(steps=6)
    fast = accelerate(pipe, [FirstBlockCache(0.9)])
    tiny.run(fast, call)
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call)
    assert len(set(counts[1:])) == 1
    assert counts[0] == 6


def flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for item in value for tensor in flat(item)]


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))
