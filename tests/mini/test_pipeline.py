"""The embedded pipeline loads fast and offline, makes pictures at both sizes, and its judge reads real renders."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import fastdit
from fastdit import FastditWarning, accelerate
from fastdit.errors import UnsupportedModel
from fastdit.mini.judge import load_judge, wanted
from fastdit.mini.parts import load_clip, quiet
from fastdit.mini.prompts import held_out, parse

WEIGHTS = Path(fastdit.__file__).parent / "mini" / "weights"
PROMPT = "an apple on a blue background"


@pytest.fixture(scope="module")
def mini() -> Any:
    pipeline = fastdit.load_mini()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_pipeline_loads_within_three_seconds_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fastdit.load_mini()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    start = time.perf_counter()
    pipeline = fastdit.load_mini()
    assert time.perf_counter() - start < 3.0
    assert isinstance(pipeline, FluxPipeline)
    assert isinstance(pipeline.transformer, FluxTransformer2DModel)


def test_all_weights_together_stay_below_their_limits() -> None:
    sizes = {path: path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 40 * 2**20
    assert (WEIGHTS / "judge.safetensors").stat().st_size < 3 * 2**20


@pytest.mark.parametrize(("size", "tokens"), [(256, 256), (128, 64)])
def test_it_makes_pictures_at_both_sizes(mini: Any, size: int, tokens: int) -> None:
    call = {"height": size, "width": size, "num_inference_steps": 2, "output_type": "latent"}
    latents = mini(PROMPT, generator=torch.Generator().manual_seed(0), **call).images
    assert latents.shape == (1, tokens, 64)
    assert torch.isfinite(latents).all()


def test_the_defaults_are_the_model_s_own(mini: Any) -> None:
    image = mini(PROMPT, num_inference_steps=1).images[0]
    assert image.size == (256, 256)
    assert fastdit.accelerate(mini).fastdit.plan().steps == 50


@pytest.mark.parametrize("architecture", ["flux", "sd3"])
def test_words_that_the_model_does_not_know_are_said(architecture: Any) -> None:
    pipeline = fastdit.load_mini(architecture)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 128, "num_inference_steps": 1, "output_type": "latent"}
    noise = torch.Generator().manual_seed(0)
    with pytest.warns(FastditWarning, match="does not know 'fox', 'red', 'snow' and reads"):
        pipeline(["A red fox in the snow", "a cat"], generator=noise, **call)
    guided = {"true_cfg_scale": 2.0} if architecture == "flux" else {}
    with pytest.warns(FastditWarning, match="does not know 'blurry'"):
        accelerate(pipeline)("a cat", negative_prompt="blurry", generator=noise, **guided, **call)
    known = [pipeline(said, generator=noise.manual_seed(0), **call).images for said in ("A Cat", "a cat")]
    assert torch.equal(*known)


def test_a_seed_gives_the_same_picture_twice(mini: Any) -> None:
    first, second = (
        np.asarray(mini(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0])
        for _ in range(2)
    )
    assert np.array_equal(first, second)


@pytest.mark.exhaustive
def test_the_judge_reads_renders_that_it_never_saw() -> None:
    render = pytest.importorskip("training.small.render")
    random = np.random.default_rng(4242)
    prompts = held_out(160, seed=5, background=True)
    judge = load_judge()
    for size in (128, 256):
        pictures = [render.draw(render.random_picture(parse(prompt), random), size) for prompt in prompts]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        parts = judge.parts(pixels, prompts)
        assert parts["objects_right"].mean() >= 0.97
        assert parts["background_right"].mean() >= 0.99
        assert judge.score(pixels, prompts).mean() > 0.8


@pytest.mark.exhaustive
def test_the_judge_refuses_destroyed_pictures_and_wrong_prompts() -> None:
    render = pytest.importorskip("training.small.render")
    random = np.random.default_rng(77)
    prompts = held_out(48, seed=6, background=True)
    pixels = torch.from_numpy(np.stack([render.draw(render.random_picture(parse(p), random), 128) for p in prompts]))
    pixels = pixels.permute(0, 3, 1, 2)
    judge = load_judge()
    whole = judge.score(pixels, prompts).mean()
    noisy = (pixels + 0.35 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))).clamp(0.0, 1.0)
    assert judge.score(noisy, prompts).mean() < 0.4 * whole
    assert judge.score(pixels, prompts[::-1]).mean() < 0.3 * whole


def test_what_a_prompt_leaves_open_is_not_judged() -> None:
    assert "background" not in wanted(parse("a small apple on the left"))
    assert wanted(parse("an apple right of a ball")) == wanted(parse("a ball left of an apple"))


@pytest.mark.exhaustive
def test_three_steps_are_worse_than_twelve_by_the_judge(mini: Any) -> None:
    prompts = held_out(16, 5, kind="single", background=True)
    scores = []
    for steps in (12, 3):
        made = mini(prompts, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="pt")
        scores.append(load_judge().score(made.images, prompts))
    assert (scores[0] - scores[1]).mean() > 0.02
    assert (scores[0] > scores[1]).float().mean() > 0.6


def test_a_seed_reaches_a_schedule_through_the_pipeline_s_own_keywords(mini: Any) -> None:
    fast = fastdit.accelerate(mini, [fastdit.ProgressiveResolution("7x")])
    first, second = (
        fast(PROMPT, generator=torch.Generator().manual_seed(1), output_type="latent").images for _ in range(2)
    )
    assert torch.equal(first, second)


def test_weights_under_names_that_the_library_does_not_know_are_refused_not_drawn_at_random(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder"
    shutil.copytree(WEIGHTS / "text_encoder", folder)
    weights = load_file(folder / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"doesn't know \d+ weights of CLIPTextModel"), quiet():
        load_clip(tmp_path, torch.float32)


def test_the_text_encoder_has_the_names_that_every_version_of_transformers_reads() -> None:
    assert all(name.startswith("text_model.") for name in load_file(WEIGHTS / "text_encoder" / "model.safetensors"))
