"""TeaCache against its straight-line reference on tiny FLUX pipelines, and its semantics in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_flux import denoise
from reference_teacache import TeaCacheReference

import tiny
from fastdit import (
    RALU,
    InvalidConfig,
    NeverFired,
    Reuse,
    SkipPolicy,
    StepMask,
    Taylor,
    TeaCache,
    UnsupportedModel,
    accelerate,
)

pytestmark = pytest.mark.usefixtures("no_grad")

IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)
"""P(d) = d."""
STEPS = 12


def computed(fast: Any, branch: int = 0) -> list[bool]:
    """Which steps ran all blocks, of the branch that comes first, second, ... in a step."""
    steps = fast.fastdit.last_run.steps
    names = list(dict.fromkeys(step.branch for step in steps))
    return [step.action == "computed" for step in steps if step.branch == names[branch]]


def reference(threshold: float, coefficients: tuple[float, ...] = IDENTITY, **policy: Any) -> TeaCacheReference:
    return TeaCacheReference(threshold, coefficients, STEPS, **policy)


@pytest.mark.parametrize("guidance", [True, False], ids=["guidance", "no guidance"])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9, 1.7, 100.0])
def test_latents_and_skip_schedule_equal_the_reference(threshold: float, guidance: bool) -> None:
    pipe, call = tiny.flux(steps=STEPS, guidance=guidance)
    fast = accelerate(pipe, [TeaCache(threshold, coefficients=IDENTITY)])
    found = tiny.run(fast, call, output_type="latent")
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [reference(threshold)])
    assert computed(fast) == expected.computed["cond"]
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coefficients", [(0.0, 0.0, 2.0, 0.5, 0.01), (3.0, -1.0, 0.5, 1.2, 0.05)])
def test_the_polynomial_is_evaluated_highest_power_first(coefficients: tuple[float, ...]) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [TeaCache(0.8, coefficients=coefficients)])
    found = tiny.run(fast, call, output_type="latent")
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [reference(0.8, coefficients)])
    assert computed(fast) == expected.computed["cond"]
    assert not all(expected.computed["cond"])
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        {"first": 3, "last": 1},
        {"first": 1, "last": 0},
        {"first": 1, "last": 4},
        {"first": 2, "last": 2, "max_consecutive": 1},
        {"first": 1, "last": 1, "max_consecutive": 2},
    ],
    ids=str,
)
def test_the_skip_policy_equals_the_reference(policy: dict[str, Any]) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [TeaCache(1.2, coefficients=IDENTITY, policy=SkipPolicy(**policy))])
    found = tiny.run(fast, call, output_type="latent")
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [reference(1.2, **policy)])
    assert computed(fast) == expected.computed["cond"]
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


def test_a_batch_decides_on_its_common_mean_as_the_reference_does() -> None:
    pipe, call = tiny.flux(steps=STEPS, batch=3, size=(64, 96))
    fast = accelerate(pipe, [TeaCache(0.7, coefficients=IDENTITY)])
    found = tiny.run(fast, call, output_type="latent")
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [reference(0.7)])
    assert computed(fast) == expected.computed["cond"]
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


def test_branches_of_true_guidance_decide_and_remember_apart() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    call = tiny.flux_negative(call)
    # A negative prompt of another size moves its branch's signal differently, so that the schedules part.
    call["negative_pooled_prompt_embeds"] = 8.0 * call["negative_pooled_prompt_embeds"]
    fast = accelerate(pipe, [TeaCache(0.75, coefficients=IDENTITY)])
    found = tiny.run(fast, call, output_type="latent")
    states = [reference(0.75), reference(0.75)]
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), states)
    assert expected.computed["cond"] != expected.computed["uncond"]
    assert computed(fast, 0) == expected.computed["cond"]
    assert computed(fast, 1) == expected.computed["uncond"]
    torch.testing.assert_close(found, expected.latents, rtol=1e-3, atol=1e-4)


def test_a_threshold_of_zero_is_bit_equal_to_the_plain_pipeline() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    plain = tiny.run(pipe, call)
    assert torch.equal(tiny.run(accelerate(pipe, [TeaCache(0.0, coefficients=IDENTITY)]), call), plain)


def test_real_block_calls_equal_the_record() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [TeaCache(0.7, coefficients=IDENTITY)])
    tiny.run(fast, call)  # a twin's first forward also verifies its wiring
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert record.computed + record.skipped == STEPS
    assert record.skipped > 0
    assert counts == [record.computed] * 5
    assert [step.blocks_run for step in record.steps] == [5 if c else 0 for c in computed(fast)]
    assert {step.blocks for step in record.steps} == {5}


def test_a_second_run_starts_from_nothing() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [TeaCache(0.7, coefficients=IDENTITY)])
    first = tiny.run(fast, call)
    pattern = computed(fast)
    tiny.run(fast, call, seed=5, num_inference_steps=5)
    assert torch.equal(tiny.run(fast, call), first)
    assert computed(fast) == pattern


def test_skipping_with_a_forecast_differs_from_reusing_and_keeps_the_schedule_s_reasons() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    reuse = accelerate(pipe, [TeaCache(0.7, coefficients=IDENTITY, forecast=Reuse())])
    taylor = accelerate(pipe, [TeaCache(0.7, coefficients=IDENTITY, forecast=Taylor(order=1))])
    assert not torch.equal(tiny.run(reuse, call), tiny.run(taylor, call))
    assert {step.action for step in reuse.fastdit.last_run.steps} == {"computed", "reused"}
    assert "forecast" in {step.action for step in taylor.fastdit.last_run.steps}
    assert all(step.reason for step in taylor.fastdit.last_run.steps)


@pytest.mark.parametrize("threshold", [0.6, 1e6])
def test_with_ralu_the_first_step_of_every_stage_is_computed_and_the_record_shows_both(threshold: float) -> None:
    pipe, call = tiny.flux(size=128)
    call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    fast = accelerate(pipe, [RALU.paper("4x", fidelity="exact"), TeaCache(threshold, coefficients=IDENTITY)])
    tiny.run(fast, call)  # a twin's first forward also verifies its wiring
    with tiny.counted_blocks(pipe.transformer) as counts:
        found = tiny.run(fast, call)
    assert torch.isfinite(found).all()
    record = fast.fastdit.last_run
    assert [step.stage for step in record.steps] == [0] * 5 + [1] * 6 + [2] * 7
    assert [step.tokens for step in record.steps] == [16] * 5 + [28] * 6 + [64] * 7
    pattern = computed(fast)
    assert [pattern[i] for i in (0, 5, 11)] == [True] * 3
    assert pattern[17]
    assert counts == [sum(pattern)] * 5
    if threshold == 1e6:
        assert [i for i, done in enumerate(pattern) if done] == [0, 5, 11, 17]


def test_with_ralu_a_threshold_of_zero_equals_ralu_alone_bit_for_bit() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    schedule = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
    alone = tiny.run(accelerate(pipe, [schedule]), call)
    both = tiny.run(accelerate(pipe, [schedule, TeaCache(0.0, coefficients=IDENTITY)]), call)
    assert torch.equal(both, alone)


def test_the_order_of_the_list_does_not_matter() -> None:
    pipe, call = tiny.flux(size=128, steps=9)
    schedule, cache = RALU(steps=(3, 3, 3), ends=(0.3, 0.45), ratio=0.3), TeaCache(0.6, coefficients=IDENTITY)
    one, other = accelerate(pipe, [schedule, cache]), accelerate(pipe, [cache, schedule])
    assert torch.equal(tiny.run(one, call), tiny.run(other, call))


def test_with_ralu_and_true_guidance_each_branch_starts_each_stage_anew() -> None:
    pipe, call = tiny.flux(size=128, steps=9)
    fast = accelerate(pipe, [RALU(steps=(3, 3, 3), ends=(0.3, 0.45), ratio=0.3), TeaCache(1e6, coefficients=IDENTITY)])
    tiny.run(fast, tiny.flux_negative(call))
    for branch in (0, 1):
        assert [i for i, done in enumerate(computed(fast, branch)) if done] == [0, 3, 6, 8]


def test_an_explicit_mask_with_ralu_computes_the_first_step_of_each_stage_anyway() -> None:
    pipe, call = tiny.flux(size=128, steps=9)
    fast = accelerate(pipe, [RALU(steps=(3, 3, 3), ends=(0.3, 0.45), ratio=0.3), StepMask((1, 0, 0, 0, 0, 0, 0, 0, 1))])
    tiny.run(fast, call)
    assert [i for i, done in enumerate(computed(fast)) if done] == [0, 3, 6, 8]


def test_the_published_flux_coefficients_can_be_named() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [TeaCache(1e6, coefficients="flux-dev")])
    assert torch.isfinite(tiny.run(fast, call)).all()
    assert [i for i, done in enumerate(computed(fast)) if done] == [0, STEPS - 1]


@pytest.mark.parametrize("coefficients", ["sd3", (), ("a", "b"), (float("nan"), 0.0, 0.0, 1.0, 0.0), 3], ids=str)
def test_unusable_coefficients_are_refused(coefficients: Any) -> None:
    pipe, _ = tiny.flux()
    with pytest.raises((InvalidConfig, TypeError)):
        accelerate(pipe, [TeaCache(0.25, coefficients=coefficients)])


def test_a_model_that_nobody_calibrated_is_refused_and_never_given_another_model_s_numbers() -> None:
    pipe, _ = tiny.qwen_image()
    with pytest.raises((InvalidConfig, UnsupportedModel), match=r"oefficients|signal"):
        accelerate(pipe, [TeaCache(0.25)])


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), "high", None])
def test_a_bad_threshold_is_refused_when_it_is_written(threshold: Any) -> None:
    with pytest.raises((InvalidConfig, TypeError)):
        TeaCache(threshold)


@pytest.mark.parametrize("policy", [{"first": -1}, {"first": 0.5}, {"last": -2}, {"max_consecutive": 0}], ids=str)
def test_a_bad_policy_is_refused_when_it_is_written(policy: dict[str, Any]) -> None:
    with pytest.raises((InvalidConfig, TypeError)):
        SkipPolicy(**policy)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_very_few_steps_work(steps: int) -> None:
    pipe, call = tiny.flux(steps=steps)
    fast = accelerate(pipe, [TeaCache(1e-9, coefficients=IDENTITY)])
    with pytest.warns(NeverFired):
        found = tiny.run(fast, call)
    assert torch.equal(found, tiny.run(pipe, call))
    assert computed(fast) == [True] * steps
