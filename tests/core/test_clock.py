"""What is a step: loops of several schedulers, of several sections, forwards beside the loop, and no loop at all."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, SchedulerMixin

import tiny
from fastdit import (
    Attention,
    ClusCa,
    EasyCache,
    FirstBlockCache,
    Interval,
    MagCache,
    MagnitudeCurve,
    NeverFired,
    SkipPolicy,
    TaylorSeer,
    accelerate,
)
from fastdit.errors import UnsupportedModel
from fastdit.measure.calibration import calibrate_magcache
from fastdit.run import Run
from fastdit.step_cache.decision import BranchState
from fastdit.testing.tiny import assembled, component, counted_calls, flow_matching, randn
from fastdit.testing.unusual import UNUSUAL

SECOND = (0, 2, 4, 5)  # the steps of six that Interval(2) computes


def built(name: str, **options: Any) -> tiny.Built:
    try:
        return UNUSUAL[name](steps=6, output_type="latent", **options)
    except (UnsupportedModel, ImportError) as error:
        pytest.skip(str(error))


def generated(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    output = pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    return output[-1] if isinstance(output, list) else output


def steps_of(twin: Any) -> list[tuple[int, str]]:
    return [(step.step, step.action) for step in twin.fastdit.last_run.steps]


#: How often each step comes by: once a loop and branch.
FORWARDS = {
    "LTX2Pipeline": 1,
    "HunyuanVideoFramepackPipeline": 2,
    "GlmImagePipeline": 2,
    "SkyReelsV2DiffusionForcingPipeline": 4,
    "AnyFlowFARPipeline": 3,
}
BESIDE = {"GlmImagePipeline": 1, "AnyFlowFARPipeline": 2}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", FORWARDS)
def test_every_loop_of_a_call_is_cached_alike_and_what_stands_beside_it_is_no_step(name: str) -> None:
    pipe, call = built(name)
    plain = generated(pipe, call)
    neutral = accelerate(pipe, [FirstBlockCache(0.0)])
    assert torch.equal(generated(neutral, call), plain)
    fast = accelerate(pipe, [Interval(2)])
    first = generated(fast, call)
    assert not torch.equal(first, plain)
    assert torch.equal(generated(fast, call), first)
    forwards = Counter(steps_of(fast))
    assert forwards.pop((-1, "computed"), 0) == BESIDE.get(name, 0)
    expected = {(step, "computed" if step in SECOND else "reused"): FORWARDS[name] for step in range(6)}
    assert forwards == expected


def interval_by_hand(pipe: Any, call: dict[str, Any], before: int) -> torch.Tensor:
    """Interval(2) over whole forwards of two branches a step, written out; `before` forwards come before the loop."""
    plain, count, kept = pipe.transformer.forward, itertools.count(-before), {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        number = next(count)
        step, branch = divmod(number, 2)
        if number >= 0 and step not in SECOND:
            return (kwargs["hidden_states"] + kept[branch],)
        output = plain(*args, **kwargs)
        if number >= 0:
            kept[branch] = output[0] - kwargs["hidden_states"]
        return output

    pipe.transformer.forward = forward
    try:
        return generated(pipe, call)
    finally:
        del pipe.transformer.forward


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_forwards_before_the_loop_give_no_branch_their_residual(pictures: int) -> None:
    pipe, call = built("GlmImagePipeline")
    if pictures == 0:
        call = {
            name: call[name] for name in call if name not in ("image", "prior_token_image_ids", "source_image_grid_thw")
        }
    else:
        call["image"] = call["image"] * pictures
        call["prior_token_image_ids"] = [call["prior_token_image_ids"][0].repeat(pictures)]
        call["source_image_grid_thw"] = [call["source_image_grid_thw"][0].repeat(pictures, 1)]
    expected = interval_by_hand(pipe, call, before=pictures)
    fast = accelerate(pipe, [Interval(2, scope="forward")])
    assert torch.equal(generated(fast, call), expected)
    names = [step.branch for step in fast.fastdit.last_run.steps]
    assert names == ["outside of the loop"] * pictures + ["call 0", "call 1"] * 6


def test_where_a_forward_comes_between_the_timesteps_and_the_loop_no_branch_takes_another_s_history() -> None:
    run, now = Run(), torch.ones(1)
    run.begin(4)
    assert [run.enter(time).branch for time in (torch.zeros(1), now, now)] == ["call 0", "call 1", "call 2"]
    kept = run.state(("transformer", "call 1"), BranchState)
    run.tick()
    assert run.state(("transformer", "call 1"), BranchState) is not kept
    run.begin(4)
    assert [run.enter(time).branch for time in (now, now.clone())] == ["call 0", "call 1"]
    kept = run.state(("transformer", "call 1"), BranchState)
    run.tick()
    assert run.state(("transformer", "call 1"), BranchState) is kept


def test_what_a_pipeline_says_of_its_present_loop_counts_and_not_what_it_said_before() -> None:
    told: dict[str, int] = {"steps": 12}  # of all loops together
    run = Run()
    run.announce(lambda: told.get("steps"))
    run.begin(6)
    assert run.enter().total_steps == 6
    told["steps"] = 4
    assert (run.enter().total_steps, run.index) == (6, 0)
    run.begin(6)
    told["steps"] = 10
    assert (run.enter().total_steps, run.index) == (10, 0)
    run.begin(6)
    told["steps"] = 4
    assert (run.enter().total_steps, run.index) == (4, 2)


@pytest.mark.filterwarnings("ignore::fastdit.NeverFired")
def test_frames_that_are_denoised_one_after_another_take_more_steps_than_timesteps() -> None:
    pipe, call = built("SkyReelsV2DiffusionForcingPipeline", ar_step=1, base_num_frames=13, overlap_history=None)
    plain = generated(pipe, call)
    assert torch.equal(generated(accelerate(pipe, [FirstBlockCache(0.0)]), call), plain)
    fast = accelerate(pipe, [Interval(2)])
    generated(fast, call)
    steps = [step.step for step in fast.fastdit.last_run.steps]
    assert max(steps) > 6 and min(steps) == 0
    assert fast.fastdit.last_run.skipped > 0


def test_a_branch_that_is_called_for_each_part_of_a_picture_is_as_many_branches() -> None:
    run = Run()
    run.begin(4)
    for _ in range(2):
        names = []
        for _ in range(2):
            with run.branch("cond"):
                names.append(run.enter().branch)
        assert names == ["cond", "cond, call 1"]
        run.tick()
    assert run.step == 2


class Unscheduled(FluxPipeline):
    """Takes its steps itself."""

    def __call__(self, prompt_embeds: Any = None, pooled_prompt_embeds: Any = None, calls: int = 3) -> Any:
        latents = randn(1, 16, 16, seed=3)
        for step in range(calls):
            latents = (
                latents
                - 0.1
                * self.transformer(
                    hidden_states=latents,
                    timestep=torch.tensor([1.0 - step / calls]),
                    encoder_hidden_states=prompt_embeds,
                    pooled_projections=pooled_prompt_embeds,
                    img_ids=self._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
                    txt_ids=torch.zeros(6, 3),
                    guidance=torch.ones(1),
                    return_dict=False,
                )[0]
            )
        return latents


@pytest.mark.parametrize("stack", [[Interval(2)], [TaylorSeer()], [ClusCa()], [EasyCache(1.0)]], ids=str)
def test_a_pipeline_whose_scheduler_takes_no_step_is_not_silent(stack: Any) -> None:
    pipe, call = tiny.flux()
    pipe, call = Unscheduled(**pipe.components), {name: value for name, value in call.items() if "embeds" in name}
    fast = accelerate(pipe, stack)
    with pytest.warns(
        NeverFired, match=r"Unscheduled took no step with a transformer and a scheduler.*loop of your own"
    ):
        assert torch.equal(fast(**call), pipe(**call))
    assert {step.step for step in fast.fastdit.last_run.steps} == {-1}
    with pytest.raises(NeverFired):
        accelerate(pipe, stack, strict=True)(**call)


@pytest.mark.parametrize("stack", [[Interval(2)], [Attention("_native_math")]], ids=str)
def test_a_pipeline_whose_transformer_is_never_called_is_not_silent(stack: Any) -> None:
    pipe, call = tiny.flux()
    pipe, call = Unscheduled(**pipe.components), {name: value for name, value in call.items() if "embeds" in name}
    with pytest.warns(NeverFired, match="Unscheduled took no step"):
        accelerate(pipe, stack)(**call, calls=0)
    twin = accelerate(pipe.transformer, stack)
    with pytest.warns(NeverFired, match="FluxTransformer2DModel took no step"), twin.fastdit.run(4):
        pass


class Hidden(FluxPipeline):
    """Keeps its scheduler beside its components, for its constructor has a default for it."""

    def __init__(
        self, vae: Any, text_encoder: Any, tokenizer: Any, text_encoder_2: Any, tokenizer_2: Any, transformer: Any,
        image_encoder: Any = None, feature_extractor: Any = None, scheduler: SchedulerMixin | None = None,
    ) -> None:  # fmt: skip
        assert scheduler is not None
        super().__init__(scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer)


def test_a_scheduler_that_is_no_component_ticks_all_the_same() -> None:
    pipe, call = tiny.flux(steps=6)
    hidden = Hidden(**pipe.components)
    hidden.set_progress_bar_config(disable=True)
    assert "scheduler" not in hidden.components
    fast = accelerate(hidden, [Interval(2)])
    assert torch.equal(tiny.run(fast, call), tiny.run(accelerate(pipe, [Interval(2)]), call))
    assert [step for step, action in steps_of(fast) if action == "computed"] == list(SECOND)


def ideogram4() -> tiny.Built:
    if not hasattr(diffusers, "Ideogram4Pipeline"):
        pytest.skip("this diffusers has no Ideogram4Pipeline")

    class Ideogram4(diffusers.Ideogram4Pipeline):  # type: ignore[misc]
        """Its text encoder is left out: features are drawn."""

        def encode_prompt(self, prompt: str, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
            drawn = randn(1, max_sequence_length, 12, seed=21)
            features = torch.cat([drawn, torch.zeros(1, grid_h * grid_w, 12)], dim=1)
            return features, *self._prepare_ids([max_sequence_length], grid_h, grid_w, max_sequence_length, device)

    configuration = {
        "in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "intermediate_size": 32, "adaln_dim": 8, "llm_features_dim": 12, "mrope_section": (4, 2, 2),
    }  # fmt: skip
    one, other = (component("Ideogram4Transformer2DModel", configuration, seed=seed) for seed in (0, 7))
    pipe = Ideogram4(
        transformer=one, unconditional_transformer=other, vae=component("AutoencoderKLFlux2"),
        scheduler=flow_matching(shift=1.0), text_encoder=None, tokenizer=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe, {
        "prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 3.0,
        "guidance_schedule": None, "max_sequence_length": 8, "output_type": "latent",
    }  # fmt: skip


def test_a_second_transformer_of_any_name_is_found_by_its_class() -> None:
    pipe, call = ideogram4()
    plain = tiny.run(pipe, call)
    assert torch.equal(tiny.run(accelerate(pipe, [FirstBlockCache(0.0)]), call), plain)
    fast = accelerate(pipe, [Interval(2)])
    with counted_calls(pipe.transformer) as one, counted_calls(pipe.unconditional_transformer) as other:
        tiny.run(fast, call)
    assert one == other == [4, 4, 4]
    assert "acts in transformer and in unconditional_transformer" in fast.fastdit.explain(64, 64)
    branches = {(step.transformer, step.branch) for step in fast.fastdit.last_run.steps}
    assert branches == {("transformer", "call 0"), ("unconditional_transformer", "call 1")}
    fast.unconditional_transformer = component("Ideogram4Transformer2DModel", dict(other_configuration(pipe)), seed=9)
    assert type(fast.unconditional_transformer).__name__ == "Ideogram4Transformer2DModel"
    assert fast.unconditional_transformer.fastdit is fast.fastdit


def other_configuration(pipe: Any) -> dict[str, Any]:
    return {name: value for name, value in pipe.unconditional_transformer.config.items() if not name.startswith("_")}


def visual_cloze() -> tiny.Built:
    from PIL import Image

    if not hasattr(diffusers, "VisualClozePipeline"):
        pytest.skip("this diffusers has no VisualClozePipeline")
    pipe, _ = tiny.flux(text=True)
    transformer = component("FluxTransformer2DModel", {"in_channels": 16 + 16 + 256, "out_channels": 16})
    pipe = assembled("VisualClozePipeline", pipe.components | {"transformer": transformer, "resolution": 32})
    for inner in (pipe.generation_pipe, pipe.upsampling_pipe):
        inner.set_progress_bar_config(disable=True)
    one, two, three = (Image.new("RGB", (32, 32), (60 * shade, 90, 20)) for shade in (1, 2, 3))
    return pipe, {
        "task_prompt": "a red fox", "content_prompt": "two cats", "image": [[one, two], [three, None]],
        "upsampling_height": 64, "upsampling_width": 64, "num_inference_steps": 6, "guidance_scale": 30.0,
        "max_sequence_length": 16, "output_type": "np", "upsampling_strength": 1.0,
    }  # fmt: skip


def test_pipelines_that_a_pipeline_runs_are_accelerated_with_it() -> None:
    pipe, call = visual_cloze()

    def pictures(made: Any) -> torch.Tensor:
        return torch.as_tensor(made(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0])

    plain = pictures(pipe)
    assert torch.equal(pictures(accelerate(pipe, [FirstBlockCache(0.0)])), plain)
    fast = accelerate(pipe, [Interval(2)])
    with counted_calls(pipe.transformer) as blocks:
        assert not torch.equal(pictures(fast), plain)
    assert set(blocks) == {8}
    assert [step for step, action in steps_of(fast) if action == "computed"] == [*SECOND, *SECOND]
    assert torch.equal(pictures(pipe), plain)
    assert not hasattr(type(pipe.generation_pipe), "fastdit")


CURVE = MagnitudeCurve((1.0, 1.1, 0.9, 1.0, 0.8, 1.2), (1.0, 0.5, 0.5, 0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("branches", "curves"),
    [
        (("pred_cond", "pred_uncond"), (0, 1)),
        (("cond", "uncond"), (0, 1)),
        (("cond_uncond",), (0,)),
        (("pred_uncond", "pred_cond", "pred_cond_skip"), (1, 0, None)),
        (("cond", "uncond_stg", "uncond_modality"), (0, None, None)),
    ],
)
def test_magcache_knows_the_branches_by_the_names_of_guiders_and_computes_those_without_a_curve(
    branches: tuple[str, ...], curves: tuple[int | None, ...]
) -> None:
    module, call = tiny.TRANSFORMERS["sana"]()
    loose = SkipPolicy(first=1, last=0)
    twin = accelerate(module, [MagCache(1e6, CURVE, policy=loose)])
    with torch.no_grad(), twin.fastdit.run(6, branches=branches):
        for _ in range(6 * len(branches)):
            twin(**call)
    for branch, curve in zip(branches, curves, strict=True):
        steps = [step for step in twin.fastdit.last_run.steps if step.branch == branch][1:]
        if curve is None:
            assert {step.reason for step in steps} == {f"no magnitude curve for the branch {branch!r}"}
            assert {step.action for step in steps} == {"computed"}
            continue
        ratio, error, expected = 1.0, 0.0, []
        for entry in (CURVE.ratios if curve == 0 else CURVE.unconditional or ())[1:]:
            ratio *= entry
            error += abs(1.0 - ratio)
            expected.append(f"error {error:.4f}")
        assert [step.reason for step in steps] == expected


def test_magcache_starts_anew_in_every_section() -> None:
    pipe, call = built("HunyuanVideoFramepackPipeline")
    fast = accelerate(pipe, [MagCache(0.3, CURVE)])
    generated(fast, call)
    lines = [(step.step, step.action, step.reason) for step in fast.fastdit.last_run.steps]
    assert lines[:6] == lines[6:]
    assert lines[0][1] == "computed" and any(line[1] == "reused" for line in lines)


def test_calibration_takes_every_loop_for_a_run_of_its_own() -> None:
    pipe, call = built("HunyuanVideoFramepackPipeline")
    made = {name: value for name, value in call.items() if name not in ("num_inference_steps", "output_type")}
    generator = torch.Generator().manual_seed(0)
    curve = calibrate_magcache(pipe, [None], num_inference_steps=6, generator=generator, **made)  # type: ignore[list-item]
    assert len(curve.ratios) == 6
    assert curve.ratios[0] == 1.0
    assert curve.unconditional is None
