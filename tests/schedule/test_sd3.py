"""RALU in use on tiny SD3 pipelines: batches, seeds, sizes, latents, interruptions, caches inside, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from torch import nn

import tiny
from fastdit import (
    RALU,
    EasyCache,
    FirstBlockCache,
    IncompatibleStack,
    Interval,
    InvalidConfig,
    SeaCache,
    Stack,
    TeaCache,
    ToCa,
    UnsupportedModel,
    accelerate,
)
from fastdit.layout import CoarseLayout
from fastdit.models.sd3 import SD3
from fastdit.testing.promises import Made

SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
LONG = RALU(steps=(5, 6, 7), ends=(0.3, 0.45), ratio=0.3)
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")


@pytest.fixture(scope="module")
def built() -> tiny.Built:
    return tiny.sd3(size=128, steps=6)


def only(call: dict[str, Any], image: int) -> dict[str, Any]:
    """The call of one image of a batch."""
    return {**call, **{name: call[name][image : image + 1] for name in EMBEDS if name in call}}


def calling_back(function: Callable[[Any, int], None]) -> dict[str, Any]:
    def callback(twin: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        function(twin, step)
        return {}

    return {"callback_on_step_end": callback}


@pytest.mark.parametrize("three_five", [False, True])
def test_an_empty_stack_is_bit_equal_to_the_pipeline(three_five: bool) -> None:
    pipe, call = tiny.sd3(size=(96, 64), batch=2, three_five=three_five)
    assert torch.equal(tiny.run(accelerate(pipe, []), call), tiny.run(pipe, call))


@pytest.mark.parametrize("frame", ["coarse", "fine"])
@pytest.mark.parametrize("size", [(128, 128), (64, 224)])
def test_an_image_of_a_guided_batch_equals_its_own_run_with_its_own_generator(
    size: tuple[int, int], frame: str, generators: Callable[..., Any]
) -> None:
    pipe, call = tiny.sd3(size=size, batch=3, steps=6, three_five=True)
    fast = accelerate(pipe, [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3, frame=frame)])
    together = tiny.run(fast, call, generator=generators(1, 2, 3))
    assert [(step.tokens, step.batch) for step in fast.fastdit.last_run.steps][::2] == [
        (size[0] * size[1] // cells + 3 * extra, 6)
        for cells, extra in ((1024, 0), (1024, int(0.3 * (size[0] * size[1] // 1024))), (256, 0))
    ]
    for image, seed in enumerate((1, 2, 3)):
        alone = tiny.run(fast, only(call, image), generator=generators(seed))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=0, atol=2e-3)
    assert not torch.equal(together[0], together[1])


def test_images_per_prompt_and_a_list_of_generators(generators: Callable[..., Any]) -> None:
    pipe, call = tiny.sd3(size=128, steps=6, text=True)
    fast = accelerate(pipe, [SHORT])
    both = tiny.run(fast, call, num_images_per_prompt=2, generator=generators(1, 2))
    assert tuple(both.shape) == (2, 3, 128, 128)
    torch.testing.assert_close(both[1:], tiny.run(fast, call, generator=generators(2)), rtol=0, atol=2e-3)


def test_the_seed_decides_everything_and_the_frames_differ(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    first = tiny.run(fast, call, seed=3)
    torch.manual_seed(2)
    assert torch.equal(tiny.run(fast, call, seed=3), first)
    other = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3, frame="fine")
    assert not torch.equal(tiny.run(accelerate(pipe, [other]), call, seed=3), first)


def test_latents_of_the_user_s_are_the_pipeline_s_own_noise_and_bring_their_size(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 4, 12, 20, generator=generator)
    found = tiny.run(fast, call, latents=latents, generator=generator)
    assert tuple(found.shape) == (1, 3, 96, 160)
    assert torch.equal(found, tiny.run(fast, call, seed=7, height=96, width=160))


def test_latents_travel_in_the_stage_s_own_shape_and_the_callback_may_change_them(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    shapes = []

    def callback(twin: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert twin is fast
        shapes.append(tuple(tensors["latents"].shape))
        return {"latents": tensors["latents"] * 1.5} if step == 3 else {}

    changed = tiny.run(fast, call, callback_on_step_end=callback)
    assert shapes == [(1, 4, 8, 8), *[(1, 4, 2, 56)] * 2, *[(1, 4, 16, 16)] * 3]
    assert not torch.equal(changed, tiny.run(fast, call))


@pytest.mark.parametrize("output_type", ["latent", "pt", "np", "pil"])
@pytest.mark.parametrize("stop", [None, 0, 2, 4])
def test_every_output_has_the_full_size_whenever_the_run_was_interrupted(
    built: tiny.Built, output_type: str, stop: int | None
) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])

    def callback(twin: Any, step: int) -> None:
        twin._interrupt = step == stop

    found = tiny.run(fast, call, output_type=output_type, **calling_back(callback))
    assert fast.fastdit.last_run.completed is (stop is None)
    if output_type == "pil":
        assert found[0].size == (128, 128)
    else:
        shapes = {"latent": (1, 4, 16, 16), "pt": (1, 3, 128, 128), "np": (1, 128, 128, 3)}
        assert tuple(found.shape) == shapes[output_type]
    if stop is not None:
        assert len(fast.fastdit.last_run.steps) == stop + 1
    assert torch.equal(tiny.run(fast, call), tiny.run(accelerate(pipe, [SHORT]), call))


def test_an_interrupted_picture_is_that_of_its_lifted_latents_even_with_a_decoder_of_the_user_s(
    built: tiny.Built,
) -> None:
    pipe, call = tiny.sd3(size=128, steps=6)
    fast = accelerate(pipe, [SHORT])
    stop = calling_back(lambda twin, step: setattr(twin, "_interrupt", step == 2))
    latents = tiny.run(fast, call, output_type="latent", **stop)
    own, seen = pipe.vae.decode, []

    def decode(latents: torch.Tensor, **options: Any) -> Any:
        seen.append(tuple(latents.shape))
        return own(latents, **options)

    pipe.vae.decode = decode
    found = tiny.run(fast, call, **stop)
    assert seen == [(1, 4, 8, 8), (1, 4, 16, 16)]  # the preview of the edges, the picture
    config = pipe.vae.config
    with torch.no_grad():
        picture = own(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    torch.testing.assert_close(found, pipe.image_processor.postprocess(picture, output_type="pt"))
    assert fast.vae is pipe.vae


def test_a_preset_brings_its_own_step_count_to_the_pipeline_s_loop(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [RALU("3x")])
    without = {name: value for name, value in call.items() if name != "num_inference_steps"}
    totals = []
    pipe_class_bar = fast.progress_bar
    fast.progress_bar = lambda *args, **options: totals.append(options.get("total")) or pipe_class_bar(*args, **options)
    tiny.run(fast, without)
    assert len(fast.fastdit.last_run.steps) == 12 == fast.fastdit.plan(128, 128).steps
    assert totals == [12]


def test_half_precision_runs_in_the_latents_own_type() -> None:
    pipe, call = tiny.sd3(size=128, steps=6)
    pipe.to(torch.bfloat16)
    call = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    found = tiny.run(accelerate(pipe, [SHORT]), call, output_type="latent")
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found.float()).all()


def test_under_model_offload_the_autoencoder_sends_the_transformer_away_only_for_the_picture() -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module

    calls: list[int | None] = []

    class Heard(CpuOffload):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            run = fast.fastdit.active
            calls.append(None if run is None else run.stage)
            return super().pre_forward(module, *args, **kwargs)

    pipe, call = tiny.sd3(size=128, steps=6)
    expected = tiny.run(accelerate(pipe, [SHORT]), call)
    pipe.enable_model_cpu_offload(device="cpu")
    before = pipe.vae._hf_hook.prev_module_hook
    assert before.model is pipe.transformer
    add_hook_to_module(pipe.vae, Heard(torch.device("cpu"), before))
    fast = accelerate(pipe, [SHORT])
    assert torch.equal(tiny.run(fast, call), expected)
    assert calls == [len(fast.fastdit.plan(128, 128).stages) - 1]


@pytest.mark.parametrize("stop", [None, 2])
def test_model_offload_works_and_leaves_the_decoder_as_it_was(stop: int | None) -> None:
    pipe, call = tiny.sd3(size=128, steps=6)
    expected = tiny.run(accelerate(pipe, [SHORT]), call)
    pipe.enable_model_cpu_offload(device="cpu")
    fast = accelerate(pipe, [SHORT])
    tiny.run(fast, call, **calling_back(lambda twin, step: setattr(twin, "_interrupt", step == stop)))
    assert torch.equal(tiny.run(fast, call), expected)
    assert fast.vae is pipe.vae
    assert tuple(pipe.vae.decode(torch.zeros(1, 4, 2, 56)).sample.shape) == (1, 3, 16, 448)


def test_the_record_tells_tokens_and_flops_of_every_stage(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert [step.tokens for step in record.steps] == [16, 16, 28, 28, 64, 64]
    assert 0 < record.steps[0].flops < record.steps[2].flops < record.steps[4].flops
    assert record.steps[2].blocks_run == 3


@pytest.mark.parametrize(
    "cache",
    [
        TeaCache(0.6, (1.0, 0.0)),
        FirstBlockCache(1.0),
        Interval(2),
        EasyCache(0.6),
        SeaCache(0.9),
        ToCa(3, 0.25, first=2),
        ToCa(3, 0.25, first=2, stage_change="carry"),
        FirstBlockCache(1.0, stage_change="carry"),
        TeaCache(0.6, (1.0, 0.0), per_image=True),
    ],
    ids=lambda cache: cache.describe(),
)
def test_a_cache_inside_skips_and_starts_each_stage_anew(cache: Any) -> None:
    pipe, call = tiny.sd3(size=128, batch=2)
    del call["num_inference_steps"]
    fast = accelerate(pipe, [LONG, cache], strict=True)
    first = tiny.run(fast, call)
    record = fast.fastdit.last_run
    assert torch.isfinite(first).all()
    assert record.skipped + record.partial > 0
    if getattr(cache, "stage_change", "reset") == "reset":
        assert all(record.steps[start].action == "computed" for start in (0, 5, 11))
    assert not torch.equal(first, tiny.run(accelerate(pipe, [LONG]), call))
    assert torch.equal(tiny.run(fast, call), first)


@pytest.mark.parametrize("cache", [TeaCache(0.0, (1.0, 0.0)), FirstBlockCache(0.0), EasyCache(0.0), ToCa(1)])
def test_a_neutral_cache_inside_changes_no_bit(built: tiny.Built, cache: Any) -> None:
    pipe, call = built
    expected = tiny.run(accelerate(pipe, [SHORT]), call)
    assert torch.equal(tiny.run(accelerate(pipe, [SHORT, cache]), call), expected)


@pytest.mark.parametrize("threshold", [0.6, 1.0, 1.2])
@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_images_whose_whole_forward_is_skipped_one_by_one_equal_their_own_runs(
    model: str, threshold: float, generators: Callable[..., Any]
) -> None:
    pipe, call = tiny.sd3(size=128, batch=3) if model == "sd3" else tiny.flux(size=128, batch=3)
    del call["num_inference_steps"]
    if model == "sd3":
        call["guidance_scale"] = 1.0
    fast = accelerate(pipe, [LONG, EasyCache(threshold, per_image=True)])
    together = tiny.run(fast, call, generator=generators(1, 2, 3))
    actions = [step.action for step in fast.fastdit.last_run.steps]
    if (model, threshold) != ("sd3", 1.0):
        assert "partial" in actions[5:11]  # in the mixed stage, where each image has places of its own
    for image, seed in enumerate((1, 2, 3)):
        alone = tiny.run(fast, only(call, image), generator=generators(seed))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=0, atol=1e-4)


def test_a_history_of_whole_latents_can_t_be_carried_to_another_shape_and_says_so(built: tiny.Built) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT, EasyCache(0.6, stage_change="carry")])
    with pytest.raises(IncompatibleStack, match=r"EasyCache.*reset"):
        tiny.run(fast, call)


@pytest.mark.parametrize("preset", ["4x", "7x"])
def test_a_preset_of_flux_is_refused_and_the_message_names_those_of_sd3(built: tiny.Built, preset: str) -> None:
    with pytest.raises(InvalidConfig, match=r"FLUX\.1.*2x, 3x;"):
        accelerate(built[0], [RALU(preset)])
    with pytest.raises(InvalidConfig, match=r"Stable Diffusion 3.*4x, 5x, 7x;"):
        accelerate(tiny.flux()[0], [RALU("2x")])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"ip_adapter_image_embeds": torch.zeros(2, 1, 4)}, "ip_adapter_image_embeds"),
        ({"ip_adapter_image": torch.zeros(1, 3, 8, 8)}, "ip_adapter_image"),
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": torch.zeros(2, 1, 4)}}, "joint_attention_kwargs"),
        ({"mu": 1.0}, "mu="),
        ({"sigmas": [1.0, 0.5]}, "sigmas"),
        ({"latents": torch.zeros(1, 64, 16)}, "latents"),
        ({"latents": torch.zeros(1, 4, 16, 15)}, "latents"),
        ({"height": 112}, "RALU"),
        ({"width": 144}, "RALU"),
        ({"height": 320}, "20 x 8"),
        ({"num_inference_steps": 2}, "3 stages"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)
def test_what_can_t_be_honoured_is_refused_by_name_before_anything_runs(
    built: tiny.Built, arguments: dict[str, Any], named: str
) -> None:
    pipe, call = built
    fast = accelerate(pipe, [SHORT])
    with tiny.counted_blocks(pipe.transformer) as counts, pytest.raises(InvalidConfig, match=named):
        tiny.run(fast, call, **arguments)
    assert not any(counts)


def test_a_controlnet_is_refused_by_name() -> None:
    pipe, _ = tiny.sd3()
    controlnet = SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=1)
    controlled = StableDiffusion3ControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    with pytest.raises(UnsupportedModel, match="StableDiffusion3ControlNetPipeline"):
        accelerate(controlled, [SHORT])
    with pytest.raises(InvalidConfig, match="block_controlnet_hidden_states"):
        layout = CoarseLayout(8, 8)
        arguments = {
            "hidden_states": torch.zeros(1, 4, 8, 8),
            "block_controlnet_hidden_states": [torch.zeros(1, 16, 32)],
        }
        SD3.place(arguments, layout, arguments["hidden_states"], layout)


def test_a_table_that_is_not_made_of_sines_is_refused_by_name() -> None:
    pipe, call = tiny.sd3(size=128, steps=6)
    pipe.transformer.pos_embed.pos_embed.mul_(1.2)
    with pytest.raises(InvalidConfig, match="table of positions"):
        tiny.run(accelerate(pipe, [SHORT]), call)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_table_that_was_rounded_before_it_was_loaded_is_taken(stored: torch.dtype) -> None:
    pipe, call = tiny.sd3(size=128, steps=6)
    table = pipe.transformer.pos_embed.pos_embed
    table.copy_(table.to(stored))
    assert torch.isfinite(tiny.run(accelerate(pipe, [SHORT]), call)).all()


@pytest.mark.parametrize("frame", ["middle", None, 1])
def test_an_unknown_frame_is_refused_when_it_is_written(frame: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"coarse.*fine"):
        RALU("2x", frame=frame)


def test_a_stack_with_a_frame_survives_json() -> None:
    stack = Stack([RALU("2x", frame="fine")])
    assert Stack.from_json(stack.to_json()) == stack


@pytest.mark.parametrize("last", [0, 2, 5])
def test_an_exception_leaves_nothing_behind(last: int) -> None:
    pipe, call = tiny.sd3(size=128, steps=6)
    modules = {name: (module, dict(module.__dict__)) for name, module in pipe.transformer.named_modules()}
    fast = accelerate(pipe, [SHORT, FirstBlockCache(1.0)])
    expected = tiny.run(fast, call)

    def stop(twin: Any, step: int) -> None:
        if step == last:
            raise KeyboardInterrupt

    with Made() as made, pytest.raises(KeyboardInterrupt):
        tiny.run(fast, call, **calling_back(stop))
    assert not made.alive()
    assert not fast.fastdit.last_run.completed
    assert fast.vae is pipe.vae
    assert torch.equal(tiny.run(fast, call), expected)
    now: dict[str, tuple[nn.Module, dict[str, Any]]]
    now = {name: (module, dict(module.__dict__)) for name, module in pipe.transformer.named_modules()}
    assert now == modules
