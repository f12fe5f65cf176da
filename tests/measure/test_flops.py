"""FLOPs of FLUX.1-dev, counted without weights, against what is published."""

from __future__ import annotations

import functools

import pytest
import torch

from counting import (
    RunFlops,
    Stage,
    count,
    stages_of,
)
from fastdit import RALU

TERA = 1e12


@functools.cache
def runs(name: str, text_tokens: int | None = None) -> RunFlops:
    """One counter a model and text, which makes its modules once and counts every size once."""
    return RunFlops(name, text_tokens=text_tokens)


def test_a_linear_layer_and_an_attention_are_told_apart() -> None:
    with torch.device("meta"):
        linear = count(torch.nn.Linear(8, 16), torch.empty(4, 8))
        query = torch.empty(1, 2, 6, 4)
        attention = count(torch.nn.functional.scaled_dot_product_attention, query, query, query)
    assert (linear.linear, linear.attention) == (2 * 4 * 8 * 16, 0)
    assert (attention.linear, attention.attention) == (0, 2 * 2 * 2 * 6 * 6 * 4)


@pytest.mark.exhaustive
def test_fifty_steps_of_flux_cost_what_they_must() -> None:
    flux = runs("flux-dev")
    stages = [Stage(50, flux.image_tokens)]
    assert flux.transformer(stages).total / TERA == pytest.approx(3719.2, rel=1e-3)
    assert flux.published(stages) / TERA == pytest.approx(2991.0, rel=0.01)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("preset", "counted", "published", "text_tokens"),
    [("4x", 844.0, 723.2, 512), ("5x", 687.2, 540.47, 256), ("7x", 493.5, 426.01, 512)],
)
def test_ralu_costs_what_is_published_in_either_accounting(
    preset: str, counted: float, published: float, text_tokens: int
) -> None:
    stages = stages_of(RALU.paper(preset).plan(64, 64, None))
    assert runs("flux-dev").transformer(stages).total / TERA == pytest.approx(counted, rel=0.005)
    flux = runs("flux-dev", None if text_tokens == 512 else text_tokens)
    assert flux.published(stages) / TERA == pytest.approx(published, rel=0.01)


@pytest.mark.exhaustive
def test_stable_diffusion_3_costs_what_is_published_with_guidance_and_all_its_encoders() -> None:
    sd3 = runs("sd3-medium")
    plain = [Stage(28, sd3.image_tokens)]
    assert sd3.published(plain) / TERA == pytest.approx(351.66, rel=0.002)
    assert sd3.published([Stage(14, sd3.image_tokens)]) / TERA == pytest.approx(183.30, rel=0.002)
    assert sd3.transformer(plain).total / TERA == pytest.approx(498.6, rel=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("preset", "published"), [("2x", 181.09), ("3x", 116.61)])
def test_ralu_on_stable_diffusion_3_costs_what_is_published(preset: str, published: float) -> None:
    stages = stages_of(RALU.paper(preset).plan(64, 64, None))
    assert runs("sd3-medium").published(stages) / TERA == pytest.approx(published, rel=0.002)
