"""FLOPs of FLUX.1-dev, counted without weights, against what is published."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture(scope="module")
def flux() -> Iterator[RunFlops]:
    yield RunFlops("flux-dev")


def test_a_linear_layer_and_an_attention_are_told_apart() -> None:
    with torch.device("meta"):
        linear = count(torch.nn.Linear(8, 16), torch.empty(4, 8))
        query = torch.empty(1, 2, 6, 4)
        attention = count(torch.nn.functional.scaled_dot_product_attention, query, query, query)
    assert (linear.linear, linear.attention) == (2 * 4 * 8 * 16, 0)
    assert (attention.linear, attention.attention) == (0, 2 * 2 * 2 * 6 * 6 * 4)


def test_fifty_steps_of_flux_cost_what_they_must(flux: RunFlops) -> None:
    stages = [Stage(50, flux.image_tokens)]
    assert flux.transformer(stages).total / TERA == pytest.approx(3719.2, rel=1e-3)
    assert flux.published(stages) / TERA == pytest.approx(2991.0, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "counted", "published", "text_tokens"),
    [("4x", 844.0, 723.2, 512), ("5x", 687.2, 540.47, 256), ("7x", 493.5, 426.01, 512)],
)
def test_ralu_costs_what_is_published_in_either_accounting(
    flux: RunFlops, preset: str, counted: float, published: float, text_tokens: int
) -> None:
    stages = stages_of(RALU.paper(preset).plan(64, 64, None))
    assert flux.transformer(stages).total / TERA == pytest.approx(counted, rel=0.005)
    assert RunFlops("flux-dev", text_tokens=text_tokens).published(stages) / TERA == pytest.approx(published, rel=0.01)


def test_stable_diffusion_3_costs_what_is_published_with_guidance_and_all_its_encoders() -> None:
    sd3 = RunFlops("sd3-medium")
    plain = [Stage(28, sd3.image_tokens)]
    assert sd3.published(plain) / TERA == pytest.approx(351.66, rel=0.002)
    assert sd3.published([Stage(14, sd3.image_tokens)]) / TERA == pytest.approx(183.30, rel=0.002)
    assert sd3.transformer(plain).total / TERA == pytest.approx(498.6, rel=1e-3)
    for preset, published in (("2x", 181.09), ("3x", 116.61)):
        assert sd3.published(stages_of(RALU.paper(preset).plan(64, 64, None))) / TERA == pytest.approx(
            published, rel=0.002
        )
