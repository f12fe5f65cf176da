"""Magnitude curves: resampled by the published rule, looked up by the model's name and never by another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from fastdit import InvalidConfig
from fastdit.config import decode, encode
from fastdit.step_cache import published
from fastdit.step_cache.curves import MagnitudeCurve

ENTRIES = published.entries("magnitudes.json")
RATIOS = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=60).map(tuple)


def resampled(curve: MagnitudeCurve, steps: int, branch: int = 0) -> list[float]:
    return [curve.at(step, steps, branch) for step in range(steps)]


@given(RATIOS)
def test_a_run_of_the_curve_s_own_length_takes_the_curve_itself(ratios: tuple[float, ...]) -> None:
    assert resampled(MagnitudeCurve(ratios), len(ratios)) == list(ratios)


@given(RATIOS, st.integers(2, 100))
def test_the_ends_of_a_run_take_the_ends_of_the_curve(ratios: tuple[float, ...], steps: int) -> None:
    curve = MagnitudeCurve(ratios)
    assert curve.at(0, steps) == ratios[0]
    assert curve.at(steps - 1, steps) == ratios[-1]


@given(RATIOS, st.integers(1, 100))
def test_resampling_is_numpy_s_nearest_neighbour(ratios: tuple[float, ...], steps: int) -> None:
    places = np.round(np.arange(steps) * ((len(ratios) - 1) / max(steps - 1, 1))).astype(int)
    expected = [ratios[-1]] if steps == 1 else [ratios[place] for place in places]
    assert resampled(MagnitudeCurve(ratios), steps) == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 27, 28, 29, 50, 113])
def test_the_published_flux_curve_is_resampled_as_diffusers_resamples_it(steps: int) -> None:
    mag_cache = pytest.importorskip("diffusers.hooks.mag_cache")
    expected = mag_cache.nearest_interp(torch.as_tensor(mag_cache.FLUX_MAG_RATIOS), steps)
    found = torch.tensor(resampled(MagnitudeCurve.named("flux-dev"), steps))
    assert torch.equal(found, expected.to(found.dtype))


def test_branches_of_one_curve_share_it_and_two_curves_are_kept_apart() -> None:
    shared = MagnitudeCurve((1.0, 0.9))
    apart = MagnitudeCurve((1.0, 0.9), (1.0, 0.8))
    assert [shared.at(1, 2, branch) for branch in (0, 1, 2)] == [0.9, 0.9, 0.9]
    assert [apart.at(1, 2, branch) for branch in (0, 1)] == [0.9, 0.8]
    with pytest.raises(InvalidConfig, match="two branches"):
        apart.at(1, 2, 2)


@pytest.mark.parametrize(("step", "steps"), [(-1, 4), (4, 4), (0, 0), (0.5, 4), (True, 4)])
def test_a_step_outside_the_run_is_refused(step: Any, steps: int) -> None:
    with pytest.raises(InvalidConfig, match="a step is"):
        MagnitudeCurve((1.0, 0.9)).at(step, steps)


STEPS = {
    "flux-dev": 28,
    "flux-kontext-dev": 28,
    "framepack": 25,
    "framepack-f1": 25,
    "hunyuanvideo-720p": 50,
    "hunyuanvideo-544p": 50,
    "qwen-image": 50,
    "qwen-image-edit": 50,
    "wan2.1-t2v-14b": 50,
    "wan2.1-t2v-1.3b": 50,
    "wan2.1-i2v-14b-480p": 40,
    "wan2.1-i2v-14b-720p": 40,
    "wan2.1-vace-1.3b": 50,
    "wan2.1-vace-14b": 50,
    "wan2.2-t2v-a14b": 40,
    "wan2.2-ti2v-5b-t2v": 50,
    "wan2.2-ti2v-5b-i2v": 50,
    "wan2.2-i2v-a14b": 40,
    "fastdit-mini": 50,
}


def test_the_published_curves_have_an_entry_a_step_and_begin_with_one() -> None:
    assert list(ENTRIES) == list(STEPS)
    for name, steps in STEPS.items():
        curve = MagnitudeCurve.named(name)
        branches = [curve.ratios] + ([] if curve.unconditional is None else [curve.unconditional])
        assert len(branches) == (2 if name.startswith(("qwen", "wan")) else 1)
        for ratios in branches:
            assert len(ratios) == steps
            assert ratios[0] == 1.0
            assert 0.5 < min(ratios) <= max(ratios) < 1.7
        assert f"{steps} steps" in curve.provenance


@pytest.mark.parametrize(
    ("name", "conditional", "unconditional"),
    [
        ("flux-dev", (1.0, 1.21094, 0.89062), None),
        ("qwen-image", (1.0, 1.64062, 0.55078), (1.0, 1.64062, 0.55078)),
        ("wan2.1-t2v-1.3b", (1.0, 1.0124, 0.81838), (1.0, 1.02213, 0.81939)),
        ("wan2.1-i2v-14b-480p", (1.0, 0.98783, 0.92617), (1.0, 0.98993, 0.92616)),
    ],
)
def test_interleaved_curves_are_parted_by_branch(name: str, conditional: Any, unconditional: Any) -> None:
    curve = MagnitudeCurve.named(name)
    assert (*curve.ratios[:2], curve.ratios[-1]) == conditional
    if unconditional is None:
        assert curve.unconditional is None
    else:
        assert curve.unconditional is not None
        assert (*curve.unconditional[:2], curve.unconditional[-1]) == unconditional


def transformer(name: str | None) -> Any:
    model = tiny.flux_transformer()
    model.register_to_config(_name_or_path=name)
    return model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux-dev"),
        ("/models/Wan2.1-T2V-14B-Diffusers/transformer", "wan2.1-t2v-14b"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan2.2-t2v-a14b"),
        ("hunyuanvideo-community/HunyuanVideo", "hunyuanvideo-720p"),
        ("fastdit-mini", "fastdit-mini"),
    ],
)
def test_a_model_s_curve_is_found_by_the_name_it_was_loaded_under(model: str, name: str) -> None:
    assert MagnitudeCurve.for_model(transformer(model)) == MagnitudeCurve.named(name)


@pytest.mark.parametrize(
    "model", ["black-forest-labs/FLUX.1-schnell", "Wan-AI/Wan2.1-VACE-14B-diffusers", "not-FLUX.1-dev", "", None]
)
def test_another_model_s_curve_is_never_used_unasked_and_the_error_says_what_to_do(model: str | None) -> None:
    with pytest.raises(InvalidConfig, match=r"FluxTransformer2DModel.*calibrate_magcache.*flux-dev"):
        MagnitudeCurve.for_model(transformer(model))


def test_a_model_has_at_most_one_default_curve() -> None:
    models = [model.lower() for entry in ENTRIES.values() for model in entry["models"]]
    assert len(models) == len(set(models))


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match="qwen-image-edit"):
        MagnitudeCurve.named("sd3")


@pytest.mark.parametrize("unconditional", [None, (1.0, 0.8)])
def test_a_curve_survives_a_file_and_a_stack_s_json(unconditional: Any, tmp_path: Path) -> None:
    curve = MagnitudeCurve((1.0, 0.9), unconditional, "one prompt")
    curve.save(tmp_path / "curve.json")
    assert MagnitudeCurve.load(tmp_path / "curve.json") == curve
    assert [path.name for path in tmp_path.iterdir()] == ["curve.json"]
    assert decode(encode(curve)) == curve


@pytest.mark.parametrize("text", ["", "[]", '{"ratios": [1.0]}', '{"ratios": [], "unconditional": null}'])
def test_a_file_without_a_curve_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(InvalidConfig, match=r"curve\.json"):
        MagnitudeCurve.load(tmp_path / "curve.json")


@pytest.mark.parametrize(
    "arguments",
    [
        {"ratios": ()},
        {"ratios": None},
        {"ratios": 1.0},
        {"ratios": (1.0, 0.0)},
        {"ratios": (1.0, -0.5)},
        {"ratios": (1.0, float("nan"))},
        {"ratios": (1.0, float("inf"))},
        {"ratios": (1.0, "0.9")},
        {"ratios": (1.0, 0.9), "unconditional": ()},
        {"ratios": (1.0, 0.9), "unconditional": (1.0,)},
    ],
    ids=str,
)
def test_numbers_that_make_no_curve_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=r"MagnitudeCurve|magnitude curve"):
        MagnitudeCurve(**arguments)
