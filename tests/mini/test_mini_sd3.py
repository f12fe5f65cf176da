"""The embedded SD3 pipeline: it loads offline, its pictures show what was asked, and accelerators run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

import fastdit
from fastdit import (
    EasyCache,
    FirstBlockCache,
    InvalidConfig,
    ProgressiveResolution,
    TeaCache,
    accelerate,
)
from fastdit.mini.judge import load_judge
from fastdit.mini.pipeline_sd3 import MiniStableDiffusion3Pipeline
from fastdit.mini.prompts import held_out

OWN = Path(fastdit.__file__).parent / "mini" / "weights" / "sd3"
PROMPT = "an apple on a blue background"


@pytest.fixture(scope="module")
def mini() -> MiniStableDiffusion3Pipeline:
    pipeline = fastdit.load_mini("sd3")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, **call: Any) -> torch.Tensor:
    made: torch.Tensor = pipeline(
        PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **call
    ).images
    return made


def test_it_loads_without_a_network_and_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    pipeline = fastdit.load_mini("sd3")
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    assert isinstance(pipeline.transformer, SD3Transformer2DModel)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(InvalidConfig, match="'flux' and 'sd3', got 'sd4'"):
        fastdit.load_mini("sd4")  # type: ignore[call-overload]


def test_its_own_files_stay_below_fifteen_megabytes() -> None:
    assert sum(path.stat().st_size for path in OWN.rglob("*") if path.is_file()) <= 15e6


@pytest.mark.parametrize("size", [256, 128])
def test_it_makes_latents_at_both_sizes(mini: Any, size: int) -> None:
    made = latents(mini, height=size, width=size, num_inference_steps=2)
    assert made.shape == (1, 16, size // 8, size // 8)
    assert torch.isfinite(made).all()


def test_its_defaults_are_the_model_s_own(mini: Any) -> None:
    assert mini(PROMPT, num_inference_steps=1).images[0].size == (256, 256)
    assert accelerate(mini).fastdit.plan().steps == 28


def test_both_clip_places_give_the_embedded_clip_s_own_outputs(mini: Any) -> None:
    flux = fastdit.load_mini()
    ids = flux.tokenizer([PROMPT], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        clip = flux.text_encoder(ids, output_hidden_states=True)
        t5 = flux.text_encoder_2(ids).last_hidden_state
        tokens, _, pooled, _ = mini.encode_prompt([PROMPT], None, None, max_sequence_length=16)
    torch.testing.assert_close(pooled, clip.pooler_output.repeat(1, 2))
    torch.testing.assert_close(tokens, torch.cat([clip.hidden_states[-2], t5], dim=1))


def test_a_saved_pipeline_makes_the_same_picture(mini: Any, tmp_path: Path) -> None:
    mini.save_pretrained(tmp_path)
    again = MiniStableDiffusion3Pipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, num_inference_steps=2), latents(mini, num_inference_steps=2))


@pytest.mark.exhaustive
def test_the_judge_finds_what_held_out_prompts_asked_for(mini: Any) -> None:
    prompts = held_out(8, 7, kind="single", background=True)
    images = mini(prompts, generator=torch.Generator().manual_seed(7), output_type="pt").images
    parts = load_judge().parts(images, prompts)
    assert parts["objects_right"].sum() >= 6
    assert parts["background_right"].sum() >= 7
    assert load_judge().score(images, prompts).mean() > 0.65


def test_the_model_in_training_is_the_one_that_is_saved() -> None:
    build = pytest.importorskip("training.small.sd3").build
    trained = build()
    torch.nn.init.normal_(trained.proj_out.weight)
    loaded = SD3Transformer2DModel.from_config(trained.config)
    loaded.load_state_dict(trained.state_dict())
    call = {
        "hidden_states": torch.randn(2, 16, 16, 16),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 32, 128),
        "pooled_projections": torch.randn(2, 256),
        "return_dict": False,
    }
    with torch.no_grad():
        torch.testing.assert_close(trained(**call)[0], loaded(**call)[0], atol=1e-4, rtol=1e-4)


def test_an_empty_stack_is_bit_equal(mini: Any) -> None:
    call = {"num_inference_steps": 4}
    assert torch.equal(latents(accelerate(mini, []), **call), latents(mini, **call))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "cache", [TeaCache(0.2, (1.0, 0.0)), FirstBlockCache(0.1), EasyCache(0.1)], ids=lambda cache: type(cache).__name__
)
def test_caches_skip_steps_and_stay_near_the_plain_picture(mini: Any, cache: Any) -> None:
    fast = accelerate(mini, [cache])
    plain, made = latents(mini), latents(fast)
    assert fast.fastdit.last_run.computed < 28
    assert (made - plain).norm() < 0.3 * plain.norm()


@pytest.mark.exhaustive
def test_a_schedule_s_pictures_still_show_what_was_asked(mini: Any) -> None:
    prompts = held_out(8, 7, kind="single", background=True)
    fast = accelerate(mini, [ProgressiveResolution("2x")])
    images = fast(prompts, generator=torch.Generator().manual_seed(7), output_type="pt").images
    assert load_judge().parts(images, prompts)["objects_right"].sum() >= 6
