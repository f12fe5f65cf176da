"""Monte Carlo over every preset: whatever a stage hands on, the next begins with the flow's own marginal.

Given the clean latents x_1, the latents that a stage ends with are x_e = e x_1 + (1 - e) z. After the switch to the
start s they must have the mean s L(x_1), L the lift of the clean latents, and the covariance (1 - s)^2 I.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from fastdit import (
    RALU,
    BottleneckSampling,
    ProgressiveResolution,
    SpectralLift,
    TokenCopy,
)
from fastdit.layout import CoarseLayout, FineLayout, TokenLayout, gather_tokens
from fastdit.models.flux import FLUX
from fastdit.schedule.lifts.base import Switch
from fastdit.schedule.presets import PUBLISHED, RALU_PRESETS, WHOLE_PRESETS

SIDE = 8
CHANNELS = 16

PLANNED: dict[str, Any] = {
    **{f"whole frames {name}": ProgressiveResolution(name) for name in WHOLE_PRESETS},
    **{f"published {name}": ProgressiveResolution.published(name) for name in PUBLISHED},
    **{f"regions {name}": RALU(name) for name in RALU_PRESETS},
    "bottleneck": BottleneckSampling(),
}


def switches() -> list[Any]:
    """Every switch of every preset; those that an earlier one has, too, belong to the exhaustive part."""
    seen, listed = set(), []
    for name, schedule in PLANNED.items():
        lift, starts = schedule.recipe.lift, schedule.recipe.starts
        for number, end in enumerate(schedule.recipe.ends):
            start = None if starts is None else starts[number]
            # Without a start the matching finds one, which is this preset's own.
            key = repr((lift, schedule.recipe.layouts[number : number + 2], end, start or name))
            listed.append(pytest.param(name, number, marks=[pytest.mark.exhaustive] * (key in seen)))
            seen.add(key)
    return listed


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.flux(vae="tiny")[0]


def layouts(names: tuple[str, str], batch: int) -> tuple[TokenLayout, TokenLayout]:
    coarse = CoarseLayout(SIDE, SIDE)
    split = torch.tensor([[0, 3, 9]]).expand(batch, -1)
    every = {"coarse": coarse, "mixed": coarse.refined_at(split), "fine": FineLayout(SIDE, SIDE)}
    return every[names[0]], every[names[1]]


@pytest.mark.parametrize(("name", "number"), switches(), ids=str)
def test_after_every_switch_of_every_preset_the_latents_follow_the_flow(pipe: Any, name: str, number: int) -> None:
    schedule = PLANNED[name]
    lift, ends = schedule.recipe.lift, schedule.recipe.ends
    stages = list(pairwise(schedule.plan(SIDE, SIDE, None).stages))[number]
    # Noisy tokens are lifted in no time; the other lifts decode and encode.
    batch = 2000 if isinstance(lift, (TokenCopy, SpectralLift)) else 96
    before, after = layouts((stages[0].layout, stages[1].layout), batch)
    start, end = 1.0 - stages[1].sigmas[0], ends[number]
    generator = torch.Generator().manual_seed(7)
    clean = (0.5 * torch.randn(1, before.tokens, CHANNELS, generator=generator)).expand(batch, -1, -1)

    def switched(strength: float) -> Tensor:
        def draw(shape: Any, device: Any = None) -> Tensor:
            return strength * torch.randn(tuple(shape), generator=generator)

        field, noise = draw((batch, SIDE * SIDE, CHANNELS)), draw(clean.shape)
        latents = end * clean + (1.0 - end) * noise
        with torch.no_grad():
            return lift(Switch(FLUX, pipe, before, after, latents, clean, field, end, start, draw))

    mean = switched(0.0)[:1]
    rest = (switched(1.0) - mean) / (1.0 - start)
    tolerance = 5.0 * (2.0 / rest.numel()) ** 0.5
    assert rest.shape == (batch, after.tokens, CHANNELS)
    assert float(rest.mean().abs()) < tolerance
    assert float(rest.square().mean()) == pytest.approx(1.0, abs=tolerance)
    among = torch.einsum("btc,bsc->ts", rest, rest) / (batch * CHANNELS)
    torch.testing.assert_close(among, torch.eye(after.tokens), rtol=0, atol=6.5 * (2.0 / (batch * CHANNELS)) ** 0.5)
    if isinstance(lift, TokenCopy):
        copied = gather_tokens(clean, before.sources(after))
        torch.testing.assert_close(mean, start * copied[:1], rtol=0, atol=1e-5)
