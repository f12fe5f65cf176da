"""Calibration against straight-line loops, and against the calibration that diffusers has of its own."""

from __future__ import annotations

import importlib
import io
import json
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_flux import Embedded, denoise, run_blocks
from torch import Tensor

import tiny
from fastdit import (
    Coefficients,
    FastditWarning,
    InvalidConfig,
    MagCache,
    MagnitudeCurve,
    Stack,
    TeaCache,
    UnsupportedModel,
    accelerate,
)
from fastdit.measure.calibration import calibrate_magcache, calibrate_teacache

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 6
PROMPTS = ["a red fox", "two cats"]


class Measured:
    """A plain step of FLUX that writes down ||r_t|| / ||r_(t-1)||, averaged over the image's tokens, in float64."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.ratios: list[float] = []

    def __call__(self, model: Any, at: Embedded, step: int) -> tuple[Tensor, bool, float]:
        image = run_blocks(model, at, at.image, at.text, 0)[-1]
        norms = (image - at.image).double().pow(2).sum(dim=2).sqrt()
        self.ratios.append(1.0 if self.before is None else float((norms / self.before).mean()))
        self.before = norms
        return image, True, 0.0


def options_of(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in ("prompt", "num_inference_steps", "output_type")}


def loops(pipe: Any, call: dict[str, Any], negative: str | None = None) -> list[list[list[float]]]:
    """The ratios of every prompt's plain loop, by branch; the noise goes on from prompt to prompt."""
    found: list[list[list[float]]] = [[] for _ in range(1 if negative is None else 2)]
    generator = torch.Generator().manual_seed(3)
    for prompt in PROMPTS:
        embedded = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), encoded(pipe, prompt), strict=True))
        if negative is not None:
            names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
            embedded |= dict(zip(names, encoded(pipe, negative), strict=True))
        stacks = [Measured() for _ in found]
        denoise(pipe, {**call, **embedded}, generator, stacks)
        for branch, stack in zip(found, stacks, strict=True):
            branch.append(stack.ratios)
    return found


def encoded(pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
    embeds, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=16)
    return embeds, pooled


def test_a_calibrated_curve_is_the_mean_of_plain_loops() -> None:
    pipe, call = tiny.flux(text=True, steps=STEPS, size=(64, 96))
    plain = tiny.run(pipe, call)
    heard: list[tuple[str, int, int]] = []
    curve = calibrate_magcache(
        pipe,
        PROMPTS,
        num_inference_steps=STEPS,
        progress=lambda *news: heard.append(news),
        generator=torch.Generator().manual_seed(3),
        **options_of(call),
    )
    (expected,) = loops(pipe, call)
    assert curve.ratios[0] == 1.0
    assert curve.ratios == pytest.approx(np.mean(expected, axis=0), rel=1e-4)
    assert curve.unconditional is None
    assert [done for _, done, total in heard if total == 2] == [0, 1, 2]
    spread = np.std(expected, axis=0)
    for said in ("FluxPipeline", "2 prompts", f"{STEPS} steps", "height=64", f"{spread[1:].mean():.2g} in the mean"):
        assert said in curve.provenance
    assert f"ratios {min(curve.ratios[1:]):.4g} to {max(curve.ratios[1:]):.4g}" in curve.provenance
    assert torch.equal(tiny.run(pipe, call), plain)


def test_with_true_guidance_each_branch_gets_its_own_curve() -> None:
    pipe, call = tiny.flux(text=True, steps=STEPS)
    guided = {"true_cfg_scale": 2.0}
    curve = calibrate_magcache(
        pipe,
        PROMPTS,
        num_inference_steps=STEPS,
        negative_prompt="the sea",
        generator=torch.Generator().manual_seed(3),
        **options_of(call),
        **guided,
    )
    first, second = loops(pipe, {**call, **guided}, negative="the sea")
    assert curve.unconditional is not None
    assert curve.ratios == pytest.approx(np.mean(first, axis=0), rel=1e-4)
    assert curve.unconditional == pytest.approx(np.mean(second, axis=0), rel=1e-4)
    assert curve.ratios != pytest.approx(curve.unconditional, rel=1e-2)
    assert "second branch" in curve.provenance


def _registered(block: str) -> bool:
    """Whether diffusers' hooks know a class of blocks."""
    helpers = importlib.import_module("diffusers.hooks._helpers")
    helpers._register_transformer_blocks_metadata()
    return block in {cls.__name__ for cls in helpers.TransformerBlockRegistry._registry}


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen-image", "wan"])
def test_the_ratios_are_those_of_diffusers_own_calibration(name: str) -> None:
    """FLUX.2's last blocks take text and image joined, Qwen-Image and Wan have two branches."""
    from fastdit.measure.calibration import _Residuals

    diffusers = importlib.import_module("diffusers")
    if not hasattr(diffusers, "MagCacheConfig"):
        pytest.skip("this diffusers has no MagCache")
    if name == "flux2" and not _registered("Flux2TransformerBlock"):
        pytest.skip("this diffusers has no MagCache for FLUX.2")
    pipe, call = tiny.PIPELINES[name](steps=STEPS)
    recorder = _Residuals()
    tiny.run(accelerate(pipe, [recorder]), call)
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(num_inference_steps=STEPS, calibrate=True))
    with redirect_stdout(io.StringIO()) as printed:
        tiny.run(pipe, call)
    expected = [json.loads(line[line.index("[") :]) for line in printed.getvalue().splitlines() if "[1.0" in line]
    found = [ratios for _, ratios in recorder.finish()]
    assert len(found) == len(expected) == (2 if name in ("qwen-image", "wan") else 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_stack_s_json_holds_calibrated_numbers_as_they_are(tmp_path: Path) -> None:
    pipe, call = tiny.flux(text=True, steps=STEPS)
    curve = calibrate_magcache(pipe, PROMPTS[:1], num_inference_steps=STEPS, **options_of(call))
    curve.save(tmp_path / "curve.json")
    stack = Stack([MagCache(0.24, curve=MagnitudeCurve.load(tmp_path / "curve.json"))])
    stack.save_pretrained(tmp_path)
    again = Stack.from_pretrained(tmp_path)
    assert again == stack
    assert again[0].curve == curve
    twins = [accelerate(pipe, chosen) for chosen in (stack, again)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastditWarning)  # random weights may leave nothing to skip
        pictures = [tiny.run(twin, call) for twin in twins]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("steps", [1, 0, (6, 4), True, 2.5], ids=str)
def test_a_curve_of_no_or_many_step_counts_is_refused(steps: Any) -> None:
    pipe, _ = tiny.flux(text=True)
    with pytest.raises(InvalidConfig, match="one step count"):
        calibrate_magcache(pipe, PROMPTS, num_inference_steps=steps)


@pytest.mark.parametrize("prompts", [[], "a red fox"], ids=str)
def test_prompts_are_a_list_with_something_in_it(prompts: Any) -> None:
    pipe, _ = tiny.flux(text=True)
    for calibrate in (calibrate_magcache, calibrate_teacache):
        with pytest.raises(InvalidConfig, match="list of prompts"):
            calibrate(pipe, prompts, num_inference_steps=STEPS)


def test_latents_that_are_not_finite_give_no_curve() -> None:
    pipe, call = tiny.flux(text=True, steps=STEPS)
    broken = {"callback_on_step_end": lambda pipe, step, time, given: {"latents": given["latents"] * torch.nan}}
    with pytest.raises(InvalidConfig, match=r"step 1 of the run of 'a red fox'.*NaN"):
        calibrate_magcache(pipe, PROMPTS, num_inference_steps=STEPS, **options_of(call), **broken)


def fitted(pipe: Any, call: dict[str, Any], **changes: Any) -> Coefficients:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastditWarning)  # random weights give polynomials of all shapes
        return calibrate_teacache(pipe, PROMPTS, **{"num_inference_steps": 8, **options_of(call), **changes})


@pytest.mark.parametrize("signal", ["modulated", "hidden_states"])
def test_a_polynomial_is_fitted_on_the_signal_that_was_asked_for(signal: str) -> None:
    pipe, call = tiny.flux(text=True, steps=8)
    found = fitted(pipe, call, signal=signal)
    assert found.signal == signal
    assert found.signal_range is not None
    assert "14 points, R squared" in found.provenance
    assert f"changes {found.signal_range[0]:.4g} to {found.signal_range[1]:.4g}" in found.provenance
    fast = accelerate(pipe, [TeaCache(1e6, coefficients=found)])
    tiny.run(fast, call)
    assert fast.fastdit.last_run.skipped == 6


def test_a_time_signal_is_calibrated_where_a_block_receives_it() -> None:
    pipe, call = tiny.wan(steps=8)

    class Prompted(type(pipe)):  # type: ignore[misc]
        def __call__(self, prompt: Any = None, **options: Any) -> Any:
            return super().__call__(**{**call, **options})

    pipe.__class__ = Prompted
    found = fitted(pipe, {}, signal="projected_time_embedding")
    assert found.signal == "projected_time_embedding"
    accelerate(pipe, [TeaCache(0.25, coefficients=found)])


@pytest.mark.parametrize(
    ("signal", "error", "match"),
    [
        ("time_embedding", UnsupportedModel, "FluxTransformerBlock has no signal 'time_embedding'"),
        ("first_block_residual", UnsupportedModel, "FirstBlockCache"),
        ("output", InvalidConfig, "hidden_states"),
    ],
)
def test_a_signal_that_can_t_be_watched_is_refused(signal: str, error: Any, match: str) -> None:
    pipe, call = tiny.flux(text=True)
    with pytest.raises(error, match=match):
        fitted(pipe, call, signal=signal)


def test_too_few_changes_for_a_polynomial_are_refused() -> None:
    pipe, call = tiny.flux(text=True)
    with pytest.raises(InvalidConfig, match=r"2 step-to-step changes .* more steps"):
        fitted(pipe, call, num_inference_steps=2)


def test_a_polynomial_that_falls_inside_its_range_is_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdit.measure import calibration

    rising, falling = [(x / 10, x / 10) for x in range(1, 10)], [(x / 10, 1 - x / 10) for x in range(1, 10)]

    def calibrated(pairs: list[tuple[float, float]]) -> Coefficients:
        def runs(pipeline: Any, recorder: Any, *_: Any) -> Any:
            recorder.pairs.extend(pairs)
            return iter(())

        monkeypatch.setattr(calibration, "_runs", runs)
        return calibrate_teacache(None, PROMPTS)

    assert "R squared 1.000, changes 0.1 to 0.9" in calibrated(rising).provenance
    assert "falls" not in calibrated(rising).provenance
    with pytest.warns(FastditWarning, match=r"falls from 0\.9 to 0\.1 while .* grows from 0\.1 to 0\.9"):
        assert "falls between 0.1 and 0.9" in calibrated(falling).provenance
