"""A run reads what the twin shows, not what it was made of; and what is put on a twin leaves no twin in the model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, LayerSkipConfig
from diffusers.guiders import SkipLayerGuidance

import tiny
from fastdit import (
    RALU,
    EasyCache,
    FirstBlockCache,
    Interval,
    JustInTime,
    ProgressiveResolution,
    SkipPolicy,
    accelerate,
)
from fastdit.schedule.lifts import PixelLift
from fastdit.schedule.selectors import Edges
from fastdit.testing import flux_transformer, kl_autoencoder

CACHE = FirstBlockCache(1e6, policy=SkipPolicy(first=1, last=1))
DECODING = {
    "lift": ProgressiveResolution(steps=(2, 2), ends=(0.5,), starts=(0.15,), shifts=(2.0, 0.6), lift=PixelLift()),
    "selector": RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3),
    "anchors": JustInTime((2, 2), shares=(0.4,), selector=Edges()),
}


def build(**options: Any) -> tiny.Built:
    return tiny.flux(**{"size": 128, "steps": 4, **options})


@pytest.mark.parametrize("schedule", DECODING.values(), ids=DECODING)
@pytest.mark.parametrize("model", [tiny.flux, tiny.sd3], ids=["flux", "sd3"])
def test_a_run_decodes_with_the_autoencoder_that_the_twin_shows(schedule: Any, model: Any) -> None:
    channels = model(size=128, steps=4)[0].vae.config.latent_channels
    pipe, call = model(size=128, steps=4)
    call.pop("num_inference_steps")
    call["output_type"] = "latent"
    expected = tiny.run(accelerate(pipe, [schedule]), call)
    good = pipe.vae
    pipe.vae = copy.deepcopy(good)
    with torch.no_grad():
        for parameter in pipe.vae.parameters():
            parameter.fill_(torch.nan)
    fast = accelerate(pipe, [schedule])
    fast.vae = good
    assert channels == good.config.latent_channels
    assert torch.equal(tiny.run(fast, call), expected)
    assert pipe.vae is not good


def test_a_size_that_was_set_on_the_twin_is_planned_and_run() -> None:
    pipe, call = build()
    call = {name: value for name, value in call.items() if name not in ("height", "width", "num_inference_steps")}
    pipe.default_sample_size = 1
    fast = accelerate(pipe, [ProgressiveResolution(steps=(2, 2))])
    fast.default_sample_size = 16
    assert [stage.tokens for stage in fast.fastdit.plan().stages] == [16, 64]
    tiny.run(fast, call)
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [16, 16, 64, 64]


def test_a_pipeline_is_saved_with_what_was_assigned_to_the_twin(tmp_path: Path) -> None:
    pipe, _ = build()
    fast = accelerate(pipe, [CACHE])
    fast.vae, fast.scheduler = kl_autoencoder(seed=5), FlowMatchEulerDiscreteScheduler(shift=7.0)
    fast.transformer = flux_transformer(seed=9)
    fast.save_pretrained(tmp_path)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert torch.equal(vae.decoder.conv_in.weight, fast.vae.decoder.conv_in.weight)
    assert not torch.equal(vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler").config.shift == 7.0
    transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert torch.equal(transformer.proj_out.weight, fast.transformer.proj_out.weight)
    assert pipe.scheduler.config.shift == 3.0


def guided() -> tiny.Built:
    pipe, call = tiny.described("HunyuanImagePipeline", steps=4, batch=1)
    layers = LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    pipe.guider = pipe.ocr_guider = SkipLayerGuidance(
        skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.9, skip_layer_config=layers
    )
    return pipe, call


def controllers_left(fast: Any) -> weakref.ref[Any]:
    return weakref.ref(fast.fastdit)


def test_a_guider_s_hooks_are_the_user_s_module_s_and_no_twin_outlives_its_pipeline() -> None:
    pipe, call = guided()
    plain = tiny.run(pipe, call)
    del pipe.transformer._diffusers_hook
    fast = accelerate(pipe, [EasyCache(0.0)])
    assert torch.equal(tiny.run(fast, call), plain)
    controller = controllers_left(fast)
    del fast
    gc.collect()
    assert controller() is None
    assert pipe.transformer._diffusers_hook._module_ref is pipe.transformer
    torch.save(pipe.transformer, io.BytesIO())
    assert type(copy.deepcopy(pipe.transformer)) is type(pipe.transformer)
    assert torch.equal(tiny.run(pipe, call), plain)


@pytest.mark.parametrize("through", ["pipeline", "transformer", "function", "cache", "compile", "offload"])
def test_what_is_put_on_the_model_through_a_twin_keeps_no_twin(through: str) -> None:
    from diffusers.hooks import apply_group_offloading

    pipe, call = build()
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [CACHE])
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    kind = {"offload_type": "block_level", "num_blocks_per_group": 1}
    try:
        if through == "pipeline":
            fast.enable_group_offload(**where, **kind)
        elif through == "transformer":
            fast.transformer.enable_group_offload(**where, **kind)
        elif through == "function":
            apply_group_offloading(fast.transformer, **where, **kind)
        elif through == "cache":
            from diffusers import FirstBlockCacheConfig

            fast.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
            fast.transformer.disable_cache()
        elif through == "compile":
            fast.transformer.compile(backend="eager")
            pipe.transformer._compiled_call_impl = None
        else:
            fast.enable_model_cpu_offload(device="cpu")
    except AttributeError:
        pytest.skip("this version of diffusers can't offload groups without an accelerator")
    tiny.run(fast, call)
    assert [step.action for step in fast.fastdit.last_run.steps] == ["computed", "reused", "reused", "computed"]
    controller = controllers_left(fast)
    del fast
    gc.collect()
    assert controller() is None
    assert torch.equal(tiny.run(pipe, call), plain)


@pytest.mark.parametrize("stack", [[DECODING["selector"], CACHE], [CACHE]], ids=["schedule", "cache"])
def test_a_twin_dies_with_its_last_name_after_plans_and_runs(stack: list[Any]) -> None:
    pipe, call = build(steps=6)
    fast = accelerate(pipe, stack)
    assert fast.fastdit.plan(128, 128).steps and fast.fastdit.explain(128, 128)
    tiny.run(fast, call)
    controller = controllers_left(fast)
    del fast
    gc.collect()
    assert controller() is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda twin: pickle.loads(pickle.dumps(twin))])
def test_a_twin_that_is_copied_or_pickled_is_a_twin_again_and_a_run_of_its_own(duplicate: Any) -> None:
    pipe, call = build(steps=6)
    fast = accelerate(pipe, [CACHE], strict=True)
    fast.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    expected = tiny.run(fast, call)
    other = duplicate(fast)
    assert other.fastdit is not fast.fastdit and other.fastdit.strict
    assert other.fastdit.stack == fast.fastdit.stack
    assert torch.equal(tiny.run(other, call), expected)
    assert other.fastdit.last_run.skipped == fast.fastdit.last_run.skipped == 4
    assert type(duplicate(fast.transformer)) is type(pipe.transformer)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda twin: pickle.loads(pickle.dumps(twin))])
def test_a_bare_twin_that_is_copied_or_pickled_runs_its_stack_on_its_own_copy(duplicate: Any) -> None:
    pipe, call = build(steps=6)
    calls = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [Interval(3)])
    other = duplicate(twin)
    outputs = []
    for one in (twin, other):
        with torch.no_grad(), one.fastdit.run(num_inference_steps=6):
            outputs.append([one(*args, **kwargs)[0] for args, kwargs in calls])
        assert one.fastdit.last_run.skipped == 3
    assert all(map(torch.equal, *outputs))
    if duplicate is not copy.copy:
        with torch.no_grad():
            other.proj_out.weight.zero_()
        assert pipe.transformer.proj_out.weight.abs().sum() > 0


@pytest.mark.exhaustive
def test_a_twin_reaches_another_process_by_a_pickle(tmp_path: Path) -> None:
    pipe, call = build(steps=6)
    fast = accelerate(pipe, [CACHE])
    (tmp_path / "twin").write_bytes(pickle.dumps((fast, call)))
    program = (
        "import pickle, sys, pathlib, torch; torch.set_num_threads(1);"
        "folder = pathlib.Path(sys.argv[1]); fast, call = pickle.loads((folder / 'twin').read_bytes());"
        "images = fast(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0];"
        "torch.save((images, fast.fastdit.last_run.skipped), folder / 'images')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    images, skipped = torch.load(tmp_path / "images")
    assert skipped == 4 and torch.equal(images, tiny.run(fast, call))


def test_a_transformer_whose_pipeline_s_twin_is_gone_says_so() -> None:
    from fastdit import NoActiveRun

    pipe, _ = build()
    transformer = accelerate(pipe, [CACHE]).transformer
    gc.collect()
    with pytest.raises(NoActiveRun, match="keep what `accelerate` gave"):
        transformer()
