"""TeaCache's polynomials: evaluated, clamped, looked up by the model's name and never by another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from fastdit import (
    Coefficients,
    InvalidConfig,
    Stack,
    TeaCache,
    accelerate,
)
from fastdit.step_cache import published

PUBLISHED = (4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1)
"""FLUX.1-dev, by the authors of TeaCache."""


def named(transformer: Any, name: str) -> Any:
    transformer.register_to_config(_name_or_path=name)
    return transformer


@pytest.mark.parametrize("change", [0.0, 0.05, 0.1, 0.2, 0.3])
def test_the_published_flux_polynomial_is_evaluated_exactly(change: float) -> None:
    assert Coefficients(PUBLISHED)(change) == pytest.approx(float(np.polyval(PUBLISHED, change)))


def test_a_change_outside_the_calibrated_range_is_clamped_into_it() -> None:
    polynomial = Coefficients((1.0, 0.0, 0.0), signal_range=(0.1, 0.5))
    assert polynomial(0.3) == pytest.approx(0.09)
    assert polynomial(0.01) == pytest.approx(0.01)
    assert polynomial(7.0) == pytest.approx(0.25)


def test_a_polynomial_never_counts_backwards() -> None:
    assert Coefficients((0.0, 0.0, 0.0, 1.0, -0.5))(0.1) == 0.0


@pytest.mark.parametrize(
    "name", ["black-forest-labs/FLUX.1-dev", "/models/FLUX.1-dev", "/models/flux.1-dev/transformer"]
)
def test_a_model_is_found_by_the_name_it_was_loaded_under(name: str) -> None:
    pipe, call = tiny.flux(steps=8)
    named(pipe.transformer, name)
    fast = accelerate(pipe, [TeaCache(1e6)])
    same = accelerate(pipe, [TeaCache(1e6, coefficients="flux-dev")])
    explicit = accelerate(pipe, [TeaCache(1e6, coefficients=PUBLISHED)])
    found = tiny.run(fast, call)
    assert torch.equal(found, tiny.run(same, call))
    assert torch.equal(found, tiny.run(explicit, call))
    reasons = [[step.reason for step in twin.fastdit.last_run.steps] for twin in (fast, same, explicit)]
    assert reasons[0] == reasons[1] == reasons[2]


@pytest.mark.parametrize(
    "name",
    ["black-forest-labs/FLUX.1-schnell", "someone/FLUX.1-dev-turbo", "FLUX.1-Fill-dev", "not-FLUX.1-dev", "", None],
)
def test_another_model_s_numbers_are_never_used_unasked(name: str | None) -> None:
    pipe, _ = tiny.flux()
    named(pipe.transformer, name)
    with pytest.raises(InvalidConfig, match="calibrate"):
        accelerate(pipe, [TeaCache(0.25)])


def test_coefficients_keep_their_provenance_in_files(tmp_path: Path) -> None:
    polynomial = Coefficients((1.0, 0.5, 0.25), signal_range=(0.01, 0.3), provenance="thirty prompts")
    polynomial.save(tmp_path / "mine.json")
    assert Coefficients.load(tmp_path / "mine.json") == polynomial
    stack = Stack([TeaCache(0.3, coefficients=polynomial)])
    stack.save_pretrained(tmp_path)
    assert Stack.from_pretrained(tmp_path) == stack


@pytest.mark.parametrize(
    "text", ["", "[]", '{"values": [1.0]}', '{"values": [1], "signal_range": null, "provenance": "", "x": 1}']
)
def test_a_file_without_coefficients_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(InvalidConfig):
        Coefficients.load(tmp_path / "mine.json")


@pytest.mark.parametrize(
    "arguments",
    [
        {"values": ()},
        {"values": (float("nan"), 1.0)},
        {"values": (float("inf"), 1.0)},
        {"values": (1.0, 0.0), "signal_range": (0.5, 0.1)},
        {"values": (1.0, 0.0), "signal_range": (float("nan"), 0.1)},
        {"values": (1.0, 0.0), "signal_range": (0.1,)},
    ],
    ids=str,
)
def test_numbers_that_make_no_polynomial_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        Coefficients(**arguments)


ENTRIES = published.entries("coefficients.json")


def test_every_published_set_is_a_polynomial_with_a_publisher() -> None:
    assert len(ENTRIES) == 43
    for name in ENTRIES:
        found = Coefficients.named(name)
        assert len(found.values) in (5, 6)
        assert len(found.provenance) > 20


def test_a_model_has_at_most_one_default_set() -> None:
    models = [model.lower() for entry in ENTRIES.values() for model in entry["models"]]
    assert len(models) == len(set(models))


@pytest.mark.parametrize(
    ("model", "name", "signal"),
    [
        ("Qwen/Qwen-Image", "qwen-image", "modulated"),
        ("Qwen/Qwen-Image-2512", "qwen-image-2512", "modulated"),
        ("hunyuanvideo-community/HunyuanVideo", "hunyuanvideo", "modulated"),
        ("THUDM/CogVideoX-2b", "cogvideox-2b", "time_embedding"),
        ("Alpha-VLLM/Lumina-Image-2.0", "lumina-image-2.0", "time_embedding"),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan2.1-t2v-14b", "projected_time_embedding"),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "wan2.1-i2v-14b-480p", "projected_time_embedding"),
        ("HiDream-ai/HiDream-I1-Dev", "hidream-i1-dev", "hidden_states"),
        ("meituan-longcat/LongCat-Image", "longcat-image", "modulated"),
    ],
)
def test_a_model_s_default_is_of_the_signal_that_it_was_fitted_on(model: str, name: str, signal: str) -> None:
    found = Coefficients.for_model(named(tiny.flux_transformer(), model))
    assert found == Coefficients.named(name)
    assert found.signal == signal


@pytest.mark.parametrize(
    "model",
    [
        "black-forest-labs/FLUX.1-schnell",
        "black-forest-labs/FLUX.2-dev",
        "black-forest-labs/FLUX.2-klein-base-9B",
        "Tongyi-MAI/Z-Image-Turbo",
        "Tongyi-MAI/Z-Image",
        "THUDM/CogVideoX-5b-I2V",
        "BestWishYsh/ConsisID-preview",
        "nvidia/Cosmos-1.0-Diffusion-14B-Video2World",
        "HiDream-ai/HiDream-I1-Full",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "MiniMaxAI/MiniMax-H3",
    ],
)
def test_a_set_that_was_fitted_elsewhere_or_on_what_no_block_receives_is_nobody_s_default(model: str) -> None:
    with pytest.raises(InvalidConfig, match="calibrate_teacache"):
        Coefficients.for_model(named(tiny.flux_transformer(), model))


@pytest.mark.parametrize(
    "values", [(-450.0, 280.0, -45.0, 3.2, -0.02), (100.0, -1168.9676, 407.797856, -43.215575, 1.55959631, 0.102673255)]
)
def test_placeholders_are_not_published(values: tuple[float, ...]) -> None:
    assert values not in {Coefficients.named(name).values for name in ENTRIES}


def test_no_two_sets_are_the_same_numbers() -> None:
    assert len({Coefficients.named(name).values for name in ENTRIES}) == len(ENTRIES)


def test_a_file_from_before_there_were_signals_is_of_the_modulated_input(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"values": [1.0, 0.5], "signal_range": null, "provenance": "old"}')
    assert Coefficients.load(tmp_path / "old.json") == Coefficients((1.0, 0.5), None, "old", "modulated")


def test_the_signal_is_kept_in_files_and_checked(tmp_path: Path) -> None:
    polynomial = Coefficients((1.0, 0.5), signal="projected_time_embedding")
    polynomial.save(tmp_path / "mine.json")
    assert Coefficients.load(tmp_path / "mine.json") == polynomial
    with pytest.raises(InvalidConfig, match="projected_time_embedding"):
        Coefficients((1.0, 0.5), signal="output")


@pytest.mark.filterwarnings("ignore:the polynomial falls")  # as may one of random weights, which versions draw anew
def test_calibration_fits_a_polynomial_over_the_changes_that_it_saw() -> None:
    from fastdit.measure.calibration import calibrate_teacache

    pipe, call = tiny.flux(text=True, steps=8)
    options = {name: value for name, value in call.items() if name not in ("prompt", "num_inference_steps")}
    plain = tiny.run(pipe, call)
    fitted = calibrate_teacache(pipe, ["a red fox", "two cats"], num_inference_steps=8, **options)
    assert isinstance(fitted, Coefficients)
    assert len(fitted.values) == 5
    assert fitted.signal_range is not None
    low, high = fitted.signal_range
    assert 0 < low < high < 10
    assert all(np.isfinite(fitted(change)) for change in np.linspace(low, high, 20))
    assert torch.equal(tiny.run(pipe, call), plain)
    fast = accelerate(pipe, [TeaCache(1e6, coefficients=fitted)])
    tiny.run(fast, call)
    assert fast.fastdit.last_run.skipped == 6
