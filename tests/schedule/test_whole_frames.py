"""Families that take stages of whole frames only: of pictures, and the videos of Wan and HunyuanVideo."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional

import tiny
from fastdit import (
    RALU,
    BottleneckSampling,
    FirstBlockCache,
    InvalidConfig,
    LatentLift,
    PixelLift,
    ProgressiveResolution,
    SeaCache,
    TokenCopy,
    UnsupportedModel,
    accelerate,
)
from fastdit.models.family import families

pytestmark = [
    pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning"),  # PRX, inside diffusers
]
WHOLE = [name for family in families() if not family.mixes for name in family.pipelines]
VIDEOS = ("WanPipeline", "HunyuanVideoPipeline")
TWO = ProgressiveResolution(steps=(3, 3), ends=(0.5,), starts=(0.2,), lift=PixelLift())


def built(name: str, **options: Any) -> tiny.Built:
    pipe, call = tiny.described(name, **options)
    # Sana and Wan come with multistep solvers of the same flow.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe, call


def only(call: dict[str, Any], image: int) -> dict[str, Any]:
    return {name: value[image : image + 1] if torch.is_tensor(value) else value for name, value in call.items()}


@pytest.fixture(scope="module", params=WHOLE)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    return request.param, *built(request.param)


def test_an_empty_stack_is_bit_equal_to_the_pipeline(case: Any, generators: Callable[..., Any]) -> None:
    _, pipe, call = case
    plain = tiny.run(pipe, call, generator=generators(1, 2))
    assert torch.equal(tiny.run(accelerate(pipe, []), call, generator=generators(1, 2)), plain)


@pytest.mark.parametrize("lift", [PixelLift(), LatentLift(resize="bicubic", noise="fresh"), TokenCopy()], ids=str)
def test_an_image_of_a_batch_equals_its_own_run_with_its_own_generator(
    case: Any, lift: Any, generators: Callable[..., Any]
) -> None:
    name, pipe, call = case
    fast = accelerate(pipe, [ProgressiveResolution(steps=(3, 3), ends=(0.5,), starts=(0.2,), lift=lift)])
    together = tiny.run(fast, call, generator=generators(1, 2))
    assert torch.isfinite(together).all()
    assert together.shape == tiny.run(pipe, call, generator=generators(1, 2)).shape
    tokens = [step.tokens for step in fast.fastdit.last_run.steps]
    assert tokens == [count for count in (24, 96) for _ in range(6 if name in VIDEOS else 3)]
    # Wan's tiny autoencoder turns a millionth into a tenth in the few places whose channels are nearly zero.
    share = 0.01 if name == "WanPipeline" else 0.0
    for image in (0, 1):
        alone = tiny.run(fast, only(call, image), generator=generators(image + 1))
        assert ((together[image : image + 1] - alone).abs() > 1e-4).float().mean() <= share
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def velocity_of(name: str, pipe: Any, call: dict[str, Any], latents: Tensor, sigma: float) -> Tensor:
    """One prediction as the pipeline's loop makes it."""
    timestep = torch.full((len(latents),), 1000.0 * sigma)
    guided, negative = call["prompt_embeds"], call["negative_prompt_embeds"]

    def model(latents: Tensor, **arguments: Any) -> Tensor:
        predicted: Tensor = pipe.transformer(hidden_states=latents, **arguments, return_dict=False)[0]
        return predicted

    if name == "WanPipeline":
        with_text, without = (
            model(latents, timestep=timestep, encoder_hidden_states=text) for text in (guided, negative)
        )
        return without + call["guidance_scale"] * (with_text - without)
    twice = {
        "timestep": torch.cat([timestep, timestep]) / 1000.0,
        "encoder_hidden_states": torch.cat([negative, guided]),
    }
    without, with_text = model(torch.cat([latents, latents]), **twice).chunk(2)
    return without + call["guidance_scale"] * (with_text - without)


@pytest.mark.parametrize("name", ["AuraFlowPipeline", "WanPipeline"])
def test_two_stages_equal_the_straight_line_loop(name: str) -> None:
    pipe, call = built(name, batch=1)
    shape = (1, 4, 2, 16, 24) if name in VIDEOS else (1, 4, 16, 24)
    noise = tiny.randn(*shape, seed=5)
    schedule = ProgressiveResolution(steps=(3, 2), ends=(0.6,), starts=(0.2,), lift=LatentLift())
    found = tiny.run(accelerate(pipe, [schedule]), call, latents=noise, output_type="latent", num_inference_steps=5)
    plan = schedule.plan(8, 12, None)

    def resized(latents: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Resize every plane by itself."""
        if latents.dim() == 4:
            return function(latents)
        return torch.stack([function(plane) for plane in latents.unbind(2)], dim=2)

    with torch.no_grad():
        latents = resized(noise, lambda plane: 2.0 * functional.avg_pool2d(plane, 2))
        for now, following in pairwise(plan.stages[0].sigmas):
            velocity = velocity_of(name, pipe, call, latents, now)
            clean, latents = latents - now * velocity, latents + (following - now) * velocity
        start = plan.stages[1].sigmas[0]
        large = resized(clean, lambda plane: functional.interpolate(plane, scale_factor=2, mode="nearest"))
        latents = (1 - start) * large + start * noise
        for now, following in pairwise(plan.stages[1].sigmas):
            latents = latents + (following - now) * velocity_of(name, pipe, call, latents, now)
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


def test_a_bottleneck_runs_and_an_interrupted_run_gives_latents_of_full_size(case: Any) -> None:
    _, pipe, call = case
    fast = accelerate(pipe, [BottleneckSampling((2, 2, 2))])
    whole = tiny.run(fast, call, output_type="latent")
    assert torch.isfinite(whole).all()

    def callback(twin: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        twin._interrupt = step == 2
        return {}

    if hasattr(type(pipe), "interrupt"):
        for wanted in (True, False):
            stopped = fast(**{**call, "output_type": "latent"}, callback_on_step_end=callback, return_dict=wanted)
            assert next(iter(stopped.values() if wanted else stopped)).shape == whole.shape


@pytest.mark.parametrize("pipeline", WHOLE)
def test_stages_that_place_tokens_are_refused_with_the_reason(pipeline: str) -> None:
    pipe, _ = built(pipeline)
    with pytest.raises(UnsupportedModel, match=r"stages are whole frames: it.*ProgressiveResolution"):
        accelerate(pipe, [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)])


def test_a_cache_inside_a_video_starts_each_stage_anew_and_what_needs_one_plane_is_refused() -> None:
    pipe, call = built("WanPipeline", steps=8)
    fast = accelerate(pipe, [ProgressiveResolution(steps=(4, 4), ends=(0.5,), lift=PixelLift()), FirstBlockCache(1e6)])
    assert torch.isfinite(tiny.run(fast, call)).all()
    actions = [step.action for step in fast.fastdit.last_run.steps if step.branch == "cond"]
    assert actions == ["computed", *3 * ["reused"], "computed", "reused", "reused", "computed"]
    with pytest.raises(UnsupportedModel, match=r"SeaCache.*fill one for each of several frames"):
        accelerate(pipe, [SeaCache(0.2)])
    with pytest.raises(UnsupportedModel, match="set stage_change='reset'"):
        accelerate(pipe, [TWO, FirstBlockCache(0.1, stage_change="carry")])
    accelerate(pipe, [FirstBlockCache(0.1, stage_change="carry")])


def test_both_transformers_of_wan_get_the_stage_s_frames() -> None:
    pipe, call = tiny.wan_two(steps=6, boundary=0.9)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    fast = accelerate(pipe, [TWO])
    assert torch.isfinite(tiny.run(fast, call)).all()
    steps = fast.fastdit.last_run.steps
    assert {step.transformer for step in steps if step.stage == 0} == {"transformer", "transformer_2"}


def test_what_a_video_can_t_honour_is_refused_by_name() -> None:
    pipe, call = tiny.described("WanPipeline")
    with pytest.raises(UnsupportedModel, match="FlowMatchEulerDiscreteScheduler"):
        tiny.run(accelerate(pipe, [TWO]), call)
    pipe, call = built("WanPipeline")
    fast = accelerate(pipe, [TWO])
    with pytest.raises(InvalidConfig, match="videos"):
        tiny.run(fast, call, latents=torch.zeros(2, 4, 16, 24))
    fast.register_to_config(expand_timesteps=True)
    with pytest.raises(InvalidConfig, match="timestep of its own"):
        tiny.run(fast, call)


def test_a_video_of_no_size_that_was_asked_for_is_planned_at_the_pipeline_s_own() -> None:
    pipe, _ = built("WanPipeline")
    described = type(pipe)

    class Own(described):  # type: ignore[misc, valid-type]
        def __call__(self, **options: Any) -> Any:
            return super().__call__(**options)

    pipe.__class__ = Own
    assert accelerate(pipe, [TWO]).fastdit.plan(num_inference_steps=6).stages[1].tokens == 480 * 832 // 16**2


def test_a_picture_larger_than_auraflow_s_table_is_refused_before_it_runs() -> None:
    pipe, call = built("AuraFlowPipeline", rows=18, columns=8)
    with pytest.raises(InvalidConfig, match="18 x 8 tokens are more than the model's 16 positions"):
        tiny.run(accelerate(pipe, [TWO]), call)


@pytest.mark.parametrize(("name", "sample"), [("SanaPipeline", 16), ("PRXPipeline", 512)])
def test_a_size_that_is_binned_is_planned_as_the_pipeline_will_run_it(name: str, sample: int) -> None:
    pipe, call = built(name, batch=1)
    if name == "SanaPipeline":
        pipe.transformer.register_to_config(sample_size=sample)
    else:
        pipe.default_sample_size = sample
    fast = accelerate(pipe, [ProgressiveResolution(steps=(1, 1), ends=(0.5,), starts=(0.2,), lift=LatentLift())])
    asked = {"use_resolution_binning": True, "height": 400, "width": 600, "num_inference_steps": 2}
    found = tiny.run(fast, call, **asked)
    assert found.shape[2:] == (400, 600)
    coarse, fine = (step.tokens for step in fast.fastdit.last_run.steps)
    assert fine == 4 * coarse
