"""What people do with a pipeline works through its twin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate as hf_accelerate
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline

import tiny
from fastdit import (
    RALU,
    FirstBlockCache,
    InvalidConfig,
    SkipPolicy,
    TeaCache,
    accelerate,
)

CACHE = FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))
SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
STACKS = {"empty": [], "cache": [CACHE], "ralu": [SHORT]}
EACH = pytest.mark.parametrize("stack", STACKS)


def build(**changes: Any) -> tiny.Built:
    return tiny.flux(**{"size": 128, "steps": 6, **changes})


@EACH
@pytest.mark.parametrize("through", ["twin", pytest.param("pipeline", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("when", ["before", "after", "between runs"])
def test_a_lora_acts_the_same_however_and_whenever_it_is_loaded(stack: str, through: str, when: str) -> None:
    pipe, call = build()
    weights = tiny.lora(pipe.transformer)
    other, _ = build()
    other.load_lora_weights(weights, adapter_name="style")
    with_lora, expected = tiny.run(other, call), tiny.run(accelerate(other, STACKS[stack]), call)
    if when == "before":
        pipe.load_lora_weights(weights, adapter_name="style")
        fast = accelerate(pipe, STACKS[stack])
    else:
        fast = accelerate(pipe, STACKS[stack])
        if when == "between runs":
            without = tiny.run(fast, call)
        (fast if through == "twin" else pipe).load_lora_weights(weights, adapter_name="style")
    found = tiny.run(fast, call)
    assert torch.equal(found, expected)
    assert torch.equal(tiny.run(pipe, call), with_lora)
    if stack == "empty":
        assert torch.equal(found, with_lora)
    if when == "between runs":
        assert not torch.equal(without, found)


@pytest.mark.parametrize("through", ["twin", "pipeline"])
def test_a_lora_can_be_scaled_switched_and_unloaded_again(through: str) -> None:
    pipe, call = build()
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [])
    handle = fast if through == "twin" else pipe
    one, two = tiny.lora(pipe.transformer, seed=1), tiny.lora(pipe.transformer, seed=2)
    handle.load_lora_weights(one, adapter_name="one")
    handle.load_lora_weights(two, adapter_name="two")
    handle.set_adapters(["one", "two"], [0.7, 0.4])
    assert handle.get_active_adapters() == ["one", "two"]
    assert torch.equal(tiny.run(fast, call), tiny.run(pipe, call))
    scaled = tiny.run(fast, call, joint_attention_kwargs={"scale": 0.5})
    assert torch.equal(scaled, tiny.run(pipe, call, joint_attention_kwargs={"scale": 0.5}))
    assert not torch.equal(scaled, tiny.run(pipe, call))
    handle.delete_adapters("two")
    assert torch.equal(tiny.run(fast, call), tiny.run(pipe, call))
    handle.unload_lora_weights()
    assert torch.equal(tiny.run(fast, call), plain)
    assert torch.equal(tiny.run(pipe, call), plain)


@pytest.mark.parametrize("through", ["twin", "pipeline"])
def test_a_lora_can_be_fused_through_either(through: str) -> None:
    pipe, call = build()
    fast = accelerate(pipe, [])
    handle = fast if through == "twin" else pipe
    handle.load_lora_weights(tiny.lora(pipe.transformer), adapter_name="style")
    loose = tiny.run(pipe, call)
    handle.fuse_lora()
    assert torch.equal(tiny.run(fast, call), tiny.run(pipe, call))
    torch.testing.assert_close(tiny.run(fast, call), loose, rtol=0, atol=1e-4)
    handle.unfuse_lora()
    assert torch.equal(tiny.run(fast, call), tiny.run(pipe, call))


@EACH
def test_casting_the_twin_casts_the_pipeline(stack: str) -> None:
    pipe, call = build()
    other, _ = build()
    other.to(torch.bfloat16)
    half = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    expected = tiny.run(accelerate(other, STACKS[stack]), half)
    fast = accelerate(pipe, STACKS[stack])
    tiny.run(fast, call)
    assert fast.to(torch.bfloat16) is fast
    assert pipe.transformer.dtype == fast.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert fast.dtype == torch.bfloat16
    assert torch.equal(tiny.run(fast, half), expected)


def test_moving_the_twin_to_a_device_returns_the_twin() -> None:
    pipe, call = build()
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [])
    assert fast.to("cpu") is fast
    assert fast.device == pipe.device
    assert torch.equal(tiny.run(fast, call), plain)


@EACH
@pytest.mark.parametrize("through", ["twin", "pipeline before", "pipeline after"])
def test_model_offload_works_through_either(stack: str, through: str) -> None:
    pipe, call = build()
    expected = tiny.run(accelerate(pipe, STACKS[stack]), call)
    if through == "pipeline before":
        pipe.enable_model_cpu_offload(device="cpu")
    fast = accelerate(pipe, STACKS[stack])
    if through == "pipeline after":
        pipe.enable_model_cpu_offload(device="cpu")
    if through == "twin":
        fast.enable_model_cpu_offload(device="cpu")
    moves = count_moves(pipe)
    assert torch.equal(tiny.run(fast, call), expected)
    assert moves["transformer"] >= 1
    assert torch.equal(tiny.run(fast, call), expected)
    pipe.remove_all_hooks()
    assert torch.equal(tiny.run(fast, call), expected)


def count_moves(pipe: Any) -> dict[str, int]:
    """Count how often the offload hook of each component brings it in."""
    counts = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        counts[name] = 0
        hook = module._hf_hook
        original = hook.pre_forward

        def pre_forward(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        hook.pre_forward = pre_forward

    for name in ("transformer", "vae"):
        watch(name, getattr(pipe, name))
    return counts


@EACH
def test_hooks_of_accelerate_on_the_transformer_see_every_call(stack: str) -> None:
    pipe, call = build()
    expected = tiny.run(accelerate(pipe, STACKS[stack]), call)
    fast = accelerate(pipe, STACKS[stack])

    class Watch(hf_accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            Watch.calls += 1
            return args, kwargs

    hf_accelerate.hooks.add_hook_to_module(pipe.transformer, Watch())
    assert torch.equal(tiny.run(fast, call), expected)
    assert Watch.calls == 6
    hf_accelerate.hooks.remove_hook_from_module(pipe.transformer)
    assert torch.equal(tiny.run(fast, call), expected)
    assert Watch.calls == 6


@pytest.mark.parametrize("stack", ["empty", "cache"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload_of_the_transformer_works(stack: str, level: str) -> None:
    pipe, call = build()
    expected = tiny.run(accelerate(pipe, STACKS[stack]), call)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    try:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=level, **options
        )
        tiny.run(pipe, call)
    except AttributeError:
        pytest.skip("this version of diffusers can't offload groups without an accelerator")
    assert torch.equal(tiny.run(accelerate(pipe, STACKS[stack]), call), expected)


@pytest.fixture
def attention_registry() -> Iterator[None]:
    """Setting a backend on one model also makes it the process's default in diffusers; put that back."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@EACH
@pytest.mark.usefixtures("attention_registry")
@pytest.mark.parametrize("through", ["twin", "pipeline"])
def test_attention_backends_and_slicing_are_set_through_either(stack: str, through: str) -> None:
    pipe, call = build()
    fast = accelerate(pipe, STACKS[stack])
    expected = tiny.run(fast, call)
    handle = fast if through == "twin" else pipe
    handle.enable_attention_slicing()
    torch.testing.assert_close(tiny.run(fast, call), expected, rtol=0, atol=1e-4)
    handle.disable_attention_slicing()
    handle.transformer.set_attention_backend("_native_math")
    backends = {block.attn.processor._attention_backend.value for block in pipe.transformer.transformer_blocks}
    assert backends == {"_native_math"}
    torch.testing.assert_close(tiny.run(fast, call), expected, rtol=0, atol=1e-4)
    handle.transformer.reset_attention_backend()
    assert all(block.attn.processor._attention_backend is None for block in pipe.transformer.transformer_blocks)
    torch.testing.assert_close(tiny.run(fast, call), expected, rtol=0, atol=1e-4)


def test_vae_options_and_its_replacement_are_seen() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [])
    fast.vae.enable_slicing()
    assert pipe.vae.use_slicing
    pipe.vae.disable_slicing()
    assert torch.equal(tiny.run(fast, call), tiny.run(pipe, call))


@EACH
def test_prompts_as_text_and_a_batch_of_prompts(stack: str) -> None:
    pipe, call = build(text=True, batch=2)
    fast = accelerate(pipe, STACKS[stack])
    found = tiny.run(fast, call)
    assert tuple(found.shape) == (2, 3, 128, 128)
    assert not torch.equal(found[0], found[1])
    if stack == "empty":
        assert torch.equal(found, tiny.run(pipe, call))


@pytest.mark.parametrize("stack", ["empty", "cache"])
@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_one_generator_or_a_list(stack: str, seeds: tuple[int, ...], generators: Callable[..., Any]) -> None:
    pipe, call = build(batch=2)
    fast = accelerate(pipe, STACKS[stack])
    found = tiny.run(fast, call, generator=generators(*seeds))
    assert torch.equal(found, tiny.run(fast, call, generator=generators(*seeds)))
    if stack == "empty":
        assert torch.equal(found, tiny.run(pipe, call, generator=generators(*seeds)))


@pytest.mark.parametrize("images", [2, 3])
def test_several_images_a_prompt(images: int) -> None:
    pipe, call = build(batch=2, text=True)
    fast = accelerate(pipe, [])
    found = tiny.run(fast, call, num_images_per_prompt=images)
    assert torch.equal(found, tiny.run(pipe, call, num_images_per_prompt=images))
    assert {step.batch for step in accelerated_steps(fast)} == {2 * images}


def accelerated_steps(fast: Any) -> Any:
    return fast.fastdit.last_run.steps


@pytest.mark.parametrize("stack", ["empty", "cache"])
def test_latents_of_the_user_s_own(stack: str) -> None:
    pipe, call = build()
    latents = tiny.randn(1, 64, 16, seed=9)
    kept = latents.clone()
    fast = accelerate(pipe, STACKS[stack])
    found = tiny.run(fast, call, latents=latents)
    assert torch.equal(latents, kept)
    assert torch.equal(found, tiny.run(fast, call, latents=latents, seed=77))
    if stack == "empty":
        assert torch.equal(found, tiny.run(pipe, call, latents=latents))


@pytest.mark.parametrize("stack", ["empty", "cache"])
def test_sigmas_of_the_user_s_own_go_with_caches(stack: str) -> None:
    pipe, call = build()
    sigmas = [1.0, 0.9, 0.7, 0.2]
    fast = accelerate(pipe, STACKS[stack])
    found = tiny.run(fast, call, sigmas=sigmas)
    record = fast.fastdit.last_run
    assert len(record.steps) == 4
    if stack == "empty":
        assert torch.equal(found, tiny.run(pipe, call, sigmas=sigmas))
    else:
        assert [step.action == "computed" for step in record.steps] == [True, False, False, True]


def test_sigmas_are_refused_when_a_schedule_owns_them() -> None:
    pipe, call = build()
    fast = accelerate(pipe, STACKS["ralu"])
    with pytest.raises(InvalidConfig, match="sigmas"):
        tiny.run(fast, call, sigmas=[1.0, 0.9, 0.7, 0.5, 0.3, 0.2])
    tiny.run(fast, call)


@EACH
def test_true_guidance_runs_two_branches_and_records_both(stack: str) -> None:
    pipe, call = build()
    call = tiny.flux_negative(call)
    fast = accelerate(pipe, STACKS[stack])
    found = tiny.run(fast, call)
    steps = fast.fastdit.last_run.steps
    assert [step.step for step in steps] == [step for step in range(6) for _ in range(2)]
    names = [step.branch for step in steps]
    assert names == names[:2] * 6
    assert names[0] != names[1]
    if stack == "empty":
        assert torch.equal(found, tiny.run(pipe, call))
    if stack == "cache":
        assert [s.action == "computed" for s in steps] == [s in (0, 5) for s in range(6) for _ in range(2)]


@EACH
@pytest.mark.parametrize("output_type", ["latent", pytest.param("np", marks=pytest.mark.exhaustive), "pil"])
def test_every_output_type(stack: str, output_type: str) -> None:
    pipe, call = build()
    fast = accelerate(pipe, STACKS[stack])
    found = fast(**call | {"output_type": output_type}, generator=torch.Generator().manual_seed(0))
    plain = pipe(**call | {"output_type": output_type}, generator=torch.Generator().manual_seed(0))
    assert type(found) is type(plain)
    assert type(found.images) is type(plain.images)
    mine, theirs = np.asarray(found.images[0]), np.asarray(plain.images[0])
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    if stack == "empty":
        assert np.array_equal(mine, theirs)


@EACH
def test_a_callback_sees_the_twin_and_may_change_the_latents(stack: str) -> None:
    pipe, call = build()
    fast = accelerate(pipe, STACKS[stack])
    seen = []

    def callback(twin: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((twin is fast, step, twin.num_timesteps))
        return {"latents": 0.5 * tensors["latents"]} if step == 4 else {}

    changed = tiny.run(fast, call, callback_on_step_end=callback)
    assert seen == [(True, step, 6) for step in range(6)]
    assert not torch.equal(changed, tiny.run(fast, call))
    if stack == "empty":

        def again(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": 0.5 * tensors["latents"]} if step == 4 else {}

        assert torch.equal(changed, tiny.run(pipe, call, callback_on_step_end=again))


def test_a_callback_may_ask_for_prompt_embeddings_and_change_them() -> None:
    pipe, call = build()

    def callback(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": 0.5 * tensors["prompt_embeds"]} if step == 2 else {}

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    assert torch.equal(tiny.run(accelerate(pipe, []), call, **options), tiny.run(pipe, call, **options))


@pytest.mark.parametrize("stack", ["empty", "cache"])
def test_an_interrupt_ends_the_run_as_in_the_plain_pipeline(stack: str) -> None:
    pipe, call = build()
    fast = accelerate(pipe, STACKS[stack])

    def callback(handle: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        handle._interrupt = step == 2
        return {}

    found = tiny.run(fast, call, callback_on_step_end=callback)
    record = fast.fastdit.last_run
    assert len(record.steps) == 3
    assert not record.completed
    assert not getattr(pipe, "_interrupt", False)
    if stack == "empty":
        assert torch.equal(found, tiny.run(pipe, call, callback_on_step_end=callback))


@EACH
@pytest.mark.parametrize("given", [True, False], ids=["count given", "count left to the pipeline"])
def test_the_progress_bar_has_the_right_total_and_reaches_it(
    stack: str, given: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, call = build()
    if not given:
        call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    fast = accelerate(pipe, STACKS[stack])
    fast.set_progress_bar_config(disable=False, leave=True, ncols=80)
    tiny.run(fast, call)
    total = 6 if given or stack == "ralu" else 28
    assert f"{total}/{total}" in capsys.readouterr().err
    assert len(accelerated_steps(fast)) == total


def test_saving_the_twin_saves_the_pipeline(tmp_path: Path) -> None:
    pipe, call = build(text=True)
    pipe.set_progress_bar_config(disable=True)
    plain = tiny.run(pipe, call)
    accelerate(pipe, [SHORT, CACHE]).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert "fastdit" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    again = FluxPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.run(again, call), plain)


def test_a_new_scheduler_on_the_twin_is_used() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [])
    before = tiny.run(fast, call)
    shifted = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, base_shift=2.0, max_shift=3.0)
    fast.scheduler = shifted
    other, _ = build()
    other.scheduler = FlowMatchEulerDiscreteScheduler.from_config(shifted.config)
    expected = tiny.run(other, call)
    assert torch.equal(tiny.run(fast, call), expected)
    assert not torch.equal(before, expected)


def test_a_new_scheduler_on_the_pipeline_is_used_by_its_twin() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [])
    tiny.run(fast, call)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, base_shift=2.0, max_shift=3.0)
    assert torch.equal(tiny.run(fast, call), tiny.run(pipe, call))


def test_a_multistep_scheduler_keeps_its_own_history_apart_from_the_pipeline_s() -> None:
    pipe, call = tiny.pixart(steps=6)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [])
    seen = []

    def callback(step: int, timestep: int, latents: torch.Tensor) -> None:
        if step == 2:
            seen.append(torch.equal(tiny.run(pipe, call), plain))

    if "callback" in call:
        raise AssertionError
    assert torch.equal(tiny.run(fast, call, callback=callback), plain)
    assert seen == [True]


def test_components_make_another_pipeline_of_the_same_parts() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [])
    rebuilt = FluxPipeline(
        **{n: c for n, c in pipe.components.items() if n not in ("image_encoder", "feature_extractor")}
    )
    rebuilt.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.run(accelerate(rebuilt, []), call), tiny.run(fast, call))


def test_a_twin_of_a_twin_is_built_on_the_pipeline_or_refused_by_name() -> None:
    pipe, call = build()
    fast = accelerate(pipe, [CACHE])
    expected = tiny.run(accelerate(pipe, [SHORT]), call)
    try:
        again = accelerate(fast, [SHORT])
    except Exception as error:
        from fastdit import FastditError

        assert isinstance(error, FastditError)
        return
    assert torch.equal(tiny.run(again, call), expected)


@pytest.mark.parametrize("stack", ["empty", "cache"])
def test_sizes_in_turn_give_what_fresh_twins_give(stack: str) -> None:
    pipe, call = build()
    fast = accelerate(pipe, STACKS[stack])
    for size in ((128, 128), (64, 160), (128, 128), (16, 16)):
        changes = {"height": size[0], "width": size[1]}
        assert torch.equal(tiny.run(fast, call, **changes), tiny.run(accelerate(pipe, STACKS[stack]), call, **changes))


def test_batches_and_step_counts_in_turn_give_what_fresh_twins_give() -> None:
    pipe, call = build(batch=2, text=True)
    stack = [TeaCache(0.7, coefficients=(0, 0, 0, 1, 0))]
    fast = accelerate(pipe, stack)
    for changes in ({}, {"num_images_per_prompt": 3}, {"num_inference_steps": 9}, {"num_inference_steps": 3}, {}):
        assert torch.equal(tiny.run(fast, call, **changes), tiny.run(accelerate(pipe, stack), call, **changes))


def test_the_call_signature_and_help_are_the_class_s_own() -> None:
    import inspect

    pipe, _ = build()
    fast = accelerate(pipe, [])
    assert inspect.signature(fast.__call__) == inspect.signature(pipe.__call__)
    assert type(fast).__call__.__doc__ == type(pipe).__call__.__doc__
    assert "FluxPipeline" in repr(fast)
