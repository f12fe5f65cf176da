"""The larger embedded pipeline loads fast and offline, keeps its size, and its judges read its renders."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import fastdit
from fastdit import FastditWarning, InvalidConfig, ProgressiveResolution, TeaCache, UnsupportedModel, accelerate
from fastdit.mini.language import judge_of, language_of
from fastdit.mini.large.judges import DAMAGES, is_trained, load_judge
from fastdit.mini.large.scenes import parse
from training.large import damages
from training.large.render import rendered_prompts

WEIGHTS = Path(fastdit.__file__).parent / "mini" / "large" / "weights"
trained = pytest.mark.skipif(not (WEIGHTS / "transformer").is_dir(), reason="it is not trained to its end yet")


@pytest.mark.skipif((WEIGHTS / "transformer").is_dir(), reason="it is there")
def test_a_model_that_is_not_trained_yet_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"not trained to its end; take load_mini\(\)"):
        fastdit.load_mini("flux-512")


@pytest.fixture(scope="module")
def large() -> Any:
    pipeline = fastdit.load_mini("flux-512", torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@trained
def test_it_loads_within_four_seconds_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fastdit.load_mini("flux-512")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    start = time.perf_counter()
    assert isinstance(fastdit.load_mini("flux-512"), FluxPipeline)
    assert time.perf_counter() - start < 4.0


@trained
def test_weights_and_judges_stay_below_their_limits() -> None:
    sizes = {path: path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 40 * 2**20
    assert all(size < 5 * 2**20 for path, size in sizes.items() if path.name.startswith("judge-"))


@trained
@pytest.mark.parametrize(("size", "tokens"), [(512, 1024), (256, 256)])
def test_it_makes_pictures_at_both_sizes(large: Any, size: int, tokens: int) -> None:
    call = {"height": size, "width": size, "num_inference_steps": 2, "output_type": "latent"}
    latents = large("an owl on wood", generator=torch.Generator().manual_seed(0), **call).images
    assert latents.shape == (1, tokens, 64)
    assert torch.isfinite(latents).all()


@trained
def test_the_defaults_are_the_model_s_own(large: Any) -> None:
    assert large("an owl on wood", num_inference_steps=1).images[0].size == (512, 512)
    assert accelerate(large).fastdit.plan().steps == 50


@trained
def test_a_schedule_and_a_cache_act_on_it(large: Any) -> None:
    fast = accelerate(large, [ProgressiveResolution(steps=(3, 2), ends=(0.5,), starts=(0.3,)), TeaCache(0.0)])
    image = fast("two owls on wood", generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (512, 512)
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [256, 256, 256, 1024, 1024]


@trained
def test_words_that_it_does_not_know_are_said(large: Any) -> None:
    with pytest.warns(FastditWarning, match=r"does not know 'fox' and .* large.scenes.vocabulary\(\)"):
        large("a fox on wood", num_inference_steps=1, output_type="latent", height=128, width=128)


@pytest.mark.parametrize("purpose", [judge for judge in ("search", "tables") if is_trained(judge)])
def test_a_judge_reads_renders_that_it_never_saw(purpose: Any) -> None:
    language = language_of("flux-512")
    prompts = language.held_out(24, 3, background=True)
    pixels = torch.stack([torch.from_numpy(one) for one in rendered_prompts(prompts, 4, 256)])
    images = pixels.permute(0, 3, 1, 2).float() / 255.0
    judge = judge_of("flux-512", purpose)
    assert judge is not None
    right, wrong = judge.score(images, prompts), judge.score(images, prompts[1:] + prompts[:1])
    assert right.mean() > 0.6 > 0.2 > wrong.mean()
    assert judge.parts(images, prompts)["background_right"].mean() > 0.9
    assert judge.features(images).shape[0] == 24
    bleached = damages.bleaching(images, torch.ones_like(images[:, :1]), torch.full((24,), 0.7), torch.Generator())
    assert judge.score(bleached, prompts).mean() < right.mean() - 0.2


def test_judges_are_for_searches_or_for_tables() -> None:
    assert tuple(damages.DAMAGES) == DAMAGES
    with pytest.raises(InvalidConfig, match="'search' and for 'tables', got 'fun'"):
        load_judge("fun")  # type: ignore[arg-type]


def test_prompts_of_tables_were_never_trained_on() -> None:
    language = language_of("flux-512")
    held_out, trained = language.held_out(50, 1, background=True), language.training(50, 1)
    assert held_out == language.held_out(50, 1, background=True) != language.held_out(50, 2, background=True)
    assert all(parse(prompt).held_out and parse(prompt).ground for prompt in held_out)
    assert not any(parse(prompt).held_out for prompt in trained)
