"""RALU in use: batches, seeds, sizes, records and refusals, on tiny FLUX pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from fastdit import (
    RALU,
    InvalidConfig,
    PixelLift,
    Stack,
    UnsupportedModel,
    accelerate,
)
from fastdit.models.flux import FLUX
from fastdit.models.qwen_image import QWEN_IMAGE
from fastdit.models.sd3 import SD3

SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)


@pytest.fixture(scope="module")
def built() -> tiny.Built:
    return tiny.flux(size=128, steps=6)


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (64, 224)])
def test_an_image_of_a_batch_equals_its_own_run_with_its_own_generator(
    size: tuple[int, int], generators: Callable[..., Any]
) -> None:
    pipe, call = tiny.flux(size=size, batch=3, steps=6)
    fast = accelerate(pipe, [SHORT])
    together = tiny.run(fast, call, generator=generators(1, 2, 3))
    for image, seed in enumerate((1, 2, 3)):
        single = {
            **call,
            "prompt_embeds": call["prompt_embeds"][image : image + 1],
            "pooled_prompt_embeds": call["pooled_prompt_embeds"][image : image + 1],
        }
        alone = tiny.run(fast, single, generator=generators(seed))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=0, atol=2e-3)
    assert not torch.equal(together[0], together[1])


def test_the_user_s_seed_decides_everything_and_the_global_one_nothing(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tiny.run(fast, call, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(tiny.run(fast, call, seed=3), first)
    assert not torch.equal(tiny.run(fast, call, seed=4), first)


def test_noise_is_fresh_in_each_call_that_shares_a_generator(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(tiny.run(fast, call, generator=generator), tiny.run(fast, call, generator=generator))


def test_fixed_latents_still_leave_the_switches_to_the_generator(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    latents = tiny.randn(1, 64, 16, seed=5)
    first = tiny.run(fast, call, latents=latents, seed=1)
    assert torch.equal(tiny.run(fast, call, latents=latents, seed=1), first)
    assert not torch.equal(tiny.run(fast, call, latents=latents, seed=2), first)


def test_a_call_without_a_generator_works_and_varies(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    assert not torch.equal(tiny.run(fast, call, seed=None), tiny.run(fast, call, seed=None))


@pytest.mark.parametrize(("preset", "steps"), [("4x", 18), ("5x", 15), ("7x", 10)])
def test_a_preset_brings_its_own_step_count(built: tiny.Built, preset: str, steps: int) -> None:
    pipe, call = built
    fast = accelerate(pipe, [RALU(preset)])
    without = {name: value for name, value in call.items() if name != "num_inference_steps"}
    tiny.run(fast, without)
    assert len(fast.fastdit.last_run.steps) == steps == fast.fastdit.plan(128, 128).steps


def test_without_a_preset_it_takes_the_first_of_the_pipeline_s_family() -> None:
    assert RALU().of(FLUX) == RALU("4x")
    assert RALU(lift=PixelLift(noise="fresh")).of(SD3) == RALU("2x", lift=PixelLift(noise="fresh"))
    own = RALU(steps=(4, 2, 2), ends=(0.3, 0.5), ratio=0.3)
    assert own.of(SD3) is own.of(QWEN_IMAGE) is own
    assert Stack.from_json(Stack([RALU()]).to_json()) == Stack([RALU()])


@pytest.mark.parametrize(("make", "preset"), [(tiny.flux, "4x"), (tiny.sd3, "2x")])
def test_a_pipeline_plans_and_runs_the_default_preset_of_its_family(make: Callable[..., Any], preset: str) -> None:
    pipe, call = make(size=128)
    plain, named = accelerate(pipe, [RALU()]), accelerate(pipe, [RALU(preset)])
    assert plain.fastdit.plan(128, 128).stages == named.fastdit.plan(128, 128).stages
    call = {**call, "num_inference_steps": 3}
    assert torch.equal(tiny.run(plain, call), tiny.run(named, call))


def test_a_family_without_presets_and_another_family_s_preset_are_refused_with_what_there_is() -> None:
    with pytest.raises(InvalidConfig, match=r"Qwen-Image, whose presets are: none.*give steps and ends"):
        accelerate(tiny.qwen_image()[0], [RALU()])
    with pytest.raises(InvalidConfig, match=r"'4x' is for FLUX\.1, .* Stable Diffusion 3, whose presets are: 2x, 3x"):
        accelerate(tiny.sd3()[0], [RALU("4x")])


def test_an_explicit_count_is_obeyed(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [RALU("4x")])
    tiny.run(fast, call)  # a twin's first forward also verifies its wiring
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call, num_inference_steps=9)
    record = fast.fastdit.last_run
    assert len(record.steps) == 9
    assert counts == [9] * 5
    assert [step.stage for step in record.steps] == sorted(step.stage for step in record.steps)


def test_the_record_tells_the_stages_tokens_and_noise_levels(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    tiny.run(fast, call)
    record, plan = fast.fastdit.last_run, fast.fastdit.plan(128, 128, 6)
    assert record.completed
    assert [step.tokens for step in record.steps] == [16, 16, 28, 28, 64, 64]
    expected = [sigma for stage in plan.stages for sigma in stage.sigmas[:-1]]
    assert [step.sigma for step in record.steps] == pytest.approx(expected, abs=1e-6)
    assert {step.action for step in record.steps} == {"computed"}
    assert record.flops == sum(step.flops for step in record.steps) > 0
    assert record.steps[0].flops < record.steps[2].flops < record.steps[4].flops


def test_latents_grow_from_stage_to_stage_and_the_callback_may_change_them(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    shapes, steps = [], []

    def callback(twin: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert twin is fast
        shapes.append(tuple(tensors["latents"].shape))
        steps.append(float(timestep))
        return {"latents": tensors["latents"] * 1.5} if step == 3 else {}

    changed = tiny.run(fast, call, callback_on_step_end=callback)
    assert shapes == [(1, n, 16) for n in (16, 28, 28, 64, 64, 64)]
    expected = [1000 * s for stage in fast.fastdit.plan(128, 128, 6).stages for s in stage.sigmas[:-1]]
    assert steps == pytest.approx(expected, abs=1e-2)
    assert not torch.equal(changed, tiny.run(fast, call))


@pytest.mark.parametrize("output_type", ["latent", "pt", "np", "pil"])
def test_every_output_type_has_the_full_size(built: tiny.Built, output_type: str) -> None:
    pipe, call = built
    found = tiny.run(accelerate(pipe, [SHORT]), call, output_type=output_type)
    if output_type == "latent":
        assert tuple(found.shape) == (1, 64, 16)
    elif output_type == "pil":
        assert found[0].size == (128, 128)
    else:
        assert tuple(found.shape) == ((1, 3, 128, 128) if output_type == "pt" else (1, 128, 128, 3))
        assert np.isfinite(np.asarray(found)).all()


def test_sizes_in_turn_leave_no_trace_of_each_other(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    first = tiny.run(fast, call)
    tiny.run(fast, call, height=64, width=192)
    tiny.run(fast, call, height=32, width=32)
    assert torch.equal(tiny.run(fast, call), first)


def test_the_smallest_picture_of_one_coarse_token_works(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    assert tuple(tiny.run(fast, call, height=32, width=32).shape) == (1, 3, 32, 32)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_at_either_end_works_or_is_refused_at_once(built: tiny.Built, ratio: float) -> None:
    pipe, call = built
    try:
        accelerator = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=ratio)
    except InvalidConfig:
        return
    found = tiny.run(accelerate(pipe, [accelerator]), call)
    assert torch.isfinite(found).all()
    assert tuple(found.shape) == (1, 3, 128, 128)


def test_true_guidance_runs_both_branches_on_the_same_tokens() -> None:
    pipe, call = tiny.flux(size=128, steps=6, batch=2)
    fast = accelerate(pipe, [SHORT])
    found = tiny.run(fast, tiny.flux_negative(call))
    assert torch.isfinite(found).all()
    record = fast.fastdit.last_run
    assert len(record.steps) == 12
    assert len({step.branch for step in record.steps}) == 2
    assert [step.tokens for step in record.steps] == [n for n in (16, 16, 28, 28, 64, 64) for _ in range(2)]


def test_true_guidance_with_the_same_prompt_twice_changes_nothing(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    doubled = {
        **call,
        "negative_prompt_embeds": call["prompt_embeds"],
        "negative_pooled_prompt_embeds": call["pooled_prompt_embeds"],
        "true_cfg_scale": 3.0,
    }
    torch.testing.assert_close(tiny.run(fast, doubled), tiny.run(fast, call), rtol=0, atol=1e-5)


def test_images_per_prompt_and_a_list_of_generators(built: tiny.Built, generators: Callable[..., Any]) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    both = tiny.run(fast, call, num_images_per_prompt=2, generator=generators(1, 2))
    assert tuple(both.shape) == (2, 3, 128, 128)
    torch.testing.assert_close(both[1:], tiny.run(fast, call, generator=generators(2)), rtol=0, atol=2e-3)


def test_half_precision_runs_in_the_latents_own_type() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    pipe.to(torch.bfloat16)
    call = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    seen = set()

    def callback(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.add(tensors["latents"].dtype)
        return {}

    found = tiny.run(accelerate(pipe, [SHORT]), call, output_type="latent", callback_on_step_end=callback)
    assert torch.isfinite(found.float()).all()
    assert seen == {torch.bfloat16}
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_interrupted_run_still_returns_a_picture_of_full_size(built: tiny.Built, stage: int) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])

    def callback(twin: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2 * stage:
            twin._interrupt = True
        return {}

    found = tiny.run(fast, call, callback_on_step_end=callback)
    assert tuple(found.shape) == (1, 3, 128, 128)
    assert torch.isfinite(found).all()
    assert not fast.fastdit.last_run.completed
    assert len(fast.fastdit.last_run.steps) == 2 * stage + 1
    expected = tiny.run(accelerate(pipe, [SHORT]), call)
    assert torch.equal(tiny.run(fast, call), expected)


def test_an_interrupted_run_returns_latents_of_full_size(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])

    def callback(twin: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        twin._interrupt = step == 0
        return {}

    found = tiny.run(fast, call, callback_on_step_end=callback, output_type="latent")
    assert tuple(found.shape) == (1, 64, 16)


@pytest.mark.parametrize("size", [(128, 144), (16, 128), (48, 48), (112, 128)])
def test_a_size_that_the_stages_cannot_tile_is_refused_by_name(built: tiny.Built, size: tuple[int, int]) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    with pytest.raises(InvalidConfig, match="RALU"):
        tiny.run(fast, call, height=size[0], width=size[1])
    with pytest.raises(InvalidConfig):
        fast.fastdit.plan(*size, 6)
    assert torch.equal(tiny.run(fast, call), tiny.run(accelerate(pipe, [SHORT]), call))


@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps_than_stages_are_refused_by_name(built: tiny.Built, steps: int) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    with pytest.raises(InvalidConfig, match="3"):
        tiny.run(fast, call, num_inference_steps=steps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"preset": "8x"},
        {"steps": (5, 6, 7)},
        {"steps": (5, 6), "ends": (0.3, 0.45), "ratio": 0.3},
        {"steps": (5, 6), "ends": (0.3,), "ratio": 0.3},
        {"steps": (5, 6, 7), "ends": (0.3, 0.45)},
        {"steps": (5, 6), "ends": (0.3,), "starts": (0.2,)},
        {"steps": (5, 6), "ends": (0.3,), "starts": (0.1, 0.2), "lift": PixelLift()},
        {"steps": (5, 6), "ends": (0.3,), "starts": (0.4,), "lift": PixelLift()},
        {"steps": (5, 6), "ends": (0.3,), "starts": (0.1,), "restart": 4.0, "lift": PixelLift()},
        {"steps": (5, 6), "ends": (0.3,), "lift": "pixels"},
        {"steps": (5, 0, 7), "ends": (0.3, 0.45), "ratio": 0.3},
        {"steps": (5, 6, -7), "ends": (0.3, 0.45), "ratio": 0.3},
        {"steps": (5, 6, 7), "ends": (0.45, 0.3), "ratio": 0.3},
        {"steps": (5, 6, 7), "ends": (0.3, 1.2), "ratio": 0.3},
        {"steps": (5, 6, 7), "ends": (0.0, 0.45), "ratio": 0.3},
        {"steps": (5, 6, 7), "ends": (0.3, 0.45), "ratio": 1.3},
        {"steps": (5, 6, 7), "ends": (0.3, 0.45), "ratio": -0.1},
        {"steps": (5, 6, 7), "ends": (0.3, 0.45), "ratio": float("nan")},
        {"steps": (5, 6, 7), "ends": (0.3, 0.45), "ratio": 0.3, "restart": 1.5},
        {"steps": (5, 6, 7), "ends": (0.3, 0.45), "ratio": 0.3, "restart": float("nan")},
        {"steps": (5, 6, 7), "ends": (0.3, 0.45), "ratio": 0.3, "fidelity": "rough"},
        {"steps": (5, 6, 7), "ends": (0.3, 0.45), "ratio": 0.3, "base_shift": 0.0},
        {"steps": (5, 3), "ends": (0.5,), "shifts": (3.0, 2.0)},
        {"steps": (5, 3), "ends": (0.5,), "starts": (0.15,), "shifts": (3.0,)},
        {"steps": (5, 3), "ends": (0.5,), "starts": (0.15,), "shifts": (3.0, 0.0)},
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused_when_it_is_written(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        RALU(**arguments)


def test_what_is_given_beside_a_preset_takes_the_place_of_its_own() -> None:
    late = RALU("4x", ends=(0.3, 0.8))
    assert late.recipe == RALU(steps=(5, 6, 7), ends=(0.3, 0.8), ratio=0.3).recipe
    pipe, _ = tiny.flux()
    plans = [accelerate(pipe, [ralu]).fastdit.plan(128, 128) for ralu in (late, RALU("4x"))]
    assert [[stage.steps for stage in plan.stages] for plan in plans] == [[5, 6, 7]] * 2
    assert plans[0].stages[1].sigmas[-1] == pytest.approx(0.2)


def test_two_stages_are_refused_with_the_name_that_they_have() -> None:
    with pytest.raises(InvalidConfig, match=r"write ProgressiveResolution\('10x'\), or choose one of 4x"):
        RALU("10x")
    with pytest.raises(InvalidConfig, match=r"write ProgressiveResolution\(steps=\(22, 6\), \.\.\.\)"):
        RALU(steps=(22, 6), ends=(0.5,))


def test_the_papers_recipe_is_kept_with_and_without_the_flaws_of_its_code() -> None:
    assert RALU.paper("4x").recipe == dataclasses.replace(RALU("4x").recipe, exact=False)
    assert RALU.paper("4x") == RALU(steps=(5, 6, 7), ends=(0.3, 0.45), ratio=0.3, fidelity="paper")
    assert RALU.paper("7x", fidelity="exact", restart=4.0) == RALU(
        steps=(2, 3, 5), ends=(0.2, 0.3), ratio=0.1, restart=4.0
    )
    with pytest.raises(InvalidConfig, match=r"4x.*5x.*7x"):
        RALU.paper("9x")


def test_the_message_for_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match=r"4x.*5x.*7x"):
        RALU("8x")


def test_a_pipeline_whose_tokens_are_unknown_is_refused_before_anything_happens() -> None:
    pipe, call = tiny.pixart()
    before = tiny.run(pipe, call)
    with pytest.raises(UnsupportedModel, match=r"RALU.*PixArtSigmaPipeline: .*is no flow-matching scheduler"):
        accelerate(pipe, [RALU("4x")])
    assert torch.equal(tiny.run(pipe, call), before)


def test_a_bare_transformer_has_no_pipeline_for_ralu_to_schedule() -> None:
    with pytest.raises((UnsupportedModel, InvalidConfig)):
        accelerate(tiny.flux_transformer(), [RALU("4x")])


def test_sigmas_of_the_user_s_own_are_refused_when_the_schedule_owns_them(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    with pytest.raises(InvalidConfig, match="sigmas"):
        tiny.run(fast, call, sigmas=[1.0, 0.8, 0.6, 0.4, 0.2, 0.1])


def test_ip_adapter_pictures_are_honoured_or_refused_by_name(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    with pytest.raises((InvalidConfig, UnsupportedModel), match="ip_adapter"):
        tiny.run(fast, call, ip_adapter_image_embeds=[torch.zeros(1, 1, 4)])
