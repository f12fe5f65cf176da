"""Pipelines beyond text to image, models with two denoisers, parts that change, types, gradients, FLOPs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    UniPCMultistepScheduler,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny
from fastdit import (
    RALU,
    FastditError,
    FirstBlockCache,
    SkipPolicy,
    UnsupportedModel,
    accelerate,
)

CACHE = FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))
SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
PICTURE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
KONTEXT = {"_auto_resize": False, "max_area": 128 * 128}


def of_class(cls: Any, pipe: Any) -> Any:
    made = cls(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


def actions(twin: Any) -> list[str]:
    return [step.action for step in twin.fastdit.last_run.steps]


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (0.3, 3), (1.0, 8)])
def test_image_to_image_counts_the_steps_that_really_run(strength: float, steps: int) -> None:
    pipe, call = tiny.flux(size=128, steps=8)
    pipe = of_class(FluxImg2ImgPipeline, pipe)
    options = {"image": PICTURE, "strength": strength}
    plain = tiny.run(pipe, call, **options)
    assert torch.equal(tiny.run(accelerate(pipe, []), call, **options), plain)
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call, **options)
    ran = actions(fast)
    assert ran == ["computed", *["reused"] * (len(ran) - 2), "computed"]
    assert abs(len(ran) - steps) <= 1


def test_kontext_takes_caches_and_the_schedule_with_a_picture_and_without_one() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    pipe = of_class(FluxKontextPipeline, pipe)
    plain = tiny.run(pipe, call, image=PICTURE, **KONTEXT)
    assert torch.equal(tiny.run(accelerate(pipe, []), call, image=PICTURE, **KONTEXT), plain)
    cached = accelerate(pipe, [CACHE])
    assert torch.isfinite(tiny.run(cached, call, image=PICTURE, **KONTEXT)).all()
    assert actions(cached) == ["computed", *["reused"] * 4, "computed"]
    drawn = accelerate(pipe, [SHORT])
    found = tiny.run(drawn, call, **KONTEXT)
    text_to_image, _ = tiny.flux(size=128)
    assert torch.equal(found, tiny.run(accelerate(text_to_image, [SHORT]), call))
    edited = tiny.run(drawn, call, image=PICTURE, **KONTEXT)
    assert edited.shape == found.shape
    assert not torch.equal(edited, found)


def test_a_model_with_two_denoisers_caches_each_apart() -> None:
    pipe, call = tiny.wan_two(steps=6)
    plain = tiny.run(pipe, call)
    assert torch.equal(tiny.run(accelerate(pipe, []), call), plain)
    assert torch.equal(tiny.run(accelerate(pipe, [FirstBlockCache(0.0)]), call), plain)
    fast = accelerate(pipe, [CACHE])
    assert torch.isfinite(tiny.run(fast, call)).all()
    with tiny.counted_blocks(pipe.transformer) as one, tiny.counted_blocks(pipe.transformer_2) as two:
        tiny.run(fast, call)
    # The second denoiser has no residual of its own at its first step, and must not take the first one's.
    assert one[0] + two[0] == len(actions(fast)) == 12
    assert one[0] and two[0]
    assert one[1] == 2
    assert two[1] == 4
    assert one[1] + two[1] == fast.fastdit.last_run.computed


def test_a_schedule_refuses_a_scheduler_that_does_not_match_flows() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    with pytest.raises(UnsupportedModel, match="UniPCMultistepScheduler"):
        tiny.run(accelerate(pipe, [SHORT]), call)


def test_a_transformer_that_is_replaced_is_used_from_then_on() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    fast = accelerate(pipe, [CACHE])
    tiny.run(fast, call)
    pipe.transformer = tiny.flux_transformer(seed=5, layers=3)
    expected = tiny.run(accelerate(pipe, [CACHE]), call)
    assert torch.equal(tiny.run(fast, call), expected)
    assert fast.fastdit.last_run.steps[0].blocks == 6
    own = tiny.flux_transformer(seed=6)
    fast.transformer = own
    other, _ = tiny.flux(size=128)
    other.transformer = own
    assert torch.equal(tiny.run(fast, call), tiny.run(accelerate(other, [CACHE]), call))
    assert pipe.transformer is not own


def test_a_block_that_is_replaced_inside_the_transformer_is_used_from_then_on() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    fast = accelerate(pipe, [CACHE])
    before = tiny.run(fast, call)
    pipe.transformer.transformer_blocks[1] = tiny.flux_transformer(seed=9).transformer_blocks[1]
    found = tiny.run(fast, call)
    assert torch.equal(found, tiny.run(accelerate(pipe, [CACHE]), call))
    assert not torch.equal(found, before)


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_half_precision_is_exact_when_neutral_and_finite_when_cached(name: str) -> None:
    pipe, call = tiny.PIPELINES[name]()
    pipe.to(torch.bfloat16)

    def half(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.bfloat16()
        return [half(item) for item in value] if isinstance(value, list) else value

    call = {key: half(value) for key, value in call.items()}
    plain = tiny.run(pipe, call)
    assert torch.equal(tiny.run(accelerate(pipe, []), call), plain)
    assert torch.equal(tiny.run(accelerate(pipe, [FirstBlockCache(0.0)]), call), plain)
    assert torch.isfinite(tiny.run(accelerate(pipe, [CACHE]), call).float()).all()


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (16, 112)])
def test_odd_token_grids_and_a_batch_of_three_can_be_cached(size: tuple[int, int]) -> None:
    pipe, call = tiny.flux(size=size, steps=6, batch=3)
    fast = accelerate(pipe, [CACHE])
    assert torch.isfinite(tiny.run(fast, call)).all()
    assert actions(fast) == ["computed", *["reused"] * 4, "computed"]
    assert {step.tokens for step in fast.fastdit.last_run.steps} == {size[0] * size[1] // 256}


def test_gradients_flow_through_a_bare_twin() -> None:
    pipe, call = tiny.flux(steps=4)
    calls = tiny.recorded_calls(pipe, call)
    gradients = []
    for transformer in (pipe.transformer, accelerate(pipe.transformer, [])):
        pipe.transformer.zero_grad()
        if transformer is pipe.transformer:
            outputs = [transformer(*args, **kwargs)[0] for args, kwargs in calls]
        else:
            with transformer.fastdit.run(num_inference_steps=4):
                outputs = [transformer(*args, **kwargs)[0] for args, kwargs in calls]
        sum(output.sum() for output in outputs).backward()
        gradients.append([p.grad.clone() for p in pipe.transformer.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", tiny.PIPELINES)
@pytest.mark.parametrize(
    "stack", [pytest.param([], marks=pytest.mark.exhaustive, id="empty"), pytest.param([CACHE], id="cache")]
)
def test_recorded_flops_equal_what_torch_counts_in_a_real_run(name: str, stack: list[Any]) -> None:
    pipe, call = tiny.PIPELINES[name](steps=3)
    call = {**call, "output_type": "latent"}
    fast = accelerate(pipe, stack)
    tiny.run(fast, call)
    # With the plain attention kernel every product is one that torch's counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny.run(fast, call)
    assert fast.fastdit.last_run.flops == counter.get_total_flops()


def test_a_copy_of_a_twin_works_or_is_refused_by_name() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    fast = accelerate(pipe, [CACHE])
    expected = tiny.run(fast, call)
    for duplicate in (copy.copy, copy.deepcopy):
        try:
            other = duplicate(fast)
        except FastditError:
            continue
        assert torch.equal(tiny.run(other, call), expected)
        assert torch.equal(tiny.run(fast, call), expected)
