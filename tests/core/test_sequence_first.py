"""Blocks that take the sequence first, [S, B, C]: what is a token and what is a sample is seen, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdit import FastditError, FirstBlockCache, Interval, SeaCache, ToCa, accelerate
from fastdit.errors import UnsupportedModel
from fastdit.testing import seed_weights
from fastdit.testing.tiny import component, randn

SAMPLES, ROWS, COLUMNS, TEXT, STEPS = 2, 4, 6, 5, 6


def ernie() -> tuple[nn.Module, dict[str, Any]]:
    """ERNIE-Image: image and text in one stream, 24 + 5 tokens of two samples."""
    try:
        model = component("ErnieImageTransformer2DModel", {"in_channels": 4, "out_channels": 4}, seed=0)
    except UnsupportedModel as error:
        pytest.skip(str(error))
    return model, {
        "hidden_states": randn(SAMPLES, 4, ROWS, COLUMNS, seed=31),
        "timestep": torch.tensor([700, 700]),
        "text_bth": randn(SAMPLES, TEXT, 16, seed=32),
        "text_lens": torch.tensor([5, 3]),
    }


class Block(nn.Module):
    """Attention over the first axis, modulated by the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x, (16,)) * scale
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.feed_forward(torch.relu(x))


class SequenceFirst(nn.Module):
    """A transformer of one's own: tokens come batch first, as everywhere, and its blocks turn them round."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        x = hidden_states.transpose(0, 1).contiguous()
        for block in self.blocks:
            x = block(x, 1.0 + timestep[:, None] * 1e-3)
        return (x.transpose(0, 1),)


def own() -> tuple[nn.Module, dict[str, Any]]:
    model = SequenceFirst().eval()
    seed_weights(model, 0)
    return model, {"hidden_states": randn(SAMPLES, 24, 16, seed=31), "timestep": torch.tensor([700.0, 700.0])}


MODELS = {"ErnieImage": (ernie, ROWS * COLUMNS + TEXT), "a model of one's own": (own, 24)}


def loop(twin: Any, call: dict[str, Any]) -> list[Tensor]:
    """A few steps with a falling noise level."""
    with torch.no_grad(), twin.fastdit.run(num_inference_steps=STEPS):
        return [
            twin(**{**call, "hidden_states": call["hidden_states"] * (1 - 0.1 * step)}, return_dict=False)[0]
            for step in range(STEPS)
        ]


@pytest.mark.parametrize("name", MODELS)
def test_the_record_says_how_many_tokens_and_samples_there_are(name: str) -> None:
    build, tokens = MODELS[name]
    model, call = build()
    twin: Any = accelerate(model, [Interval(2)])
    loop(twin, call)
    steps = twin.fastdit.last_run.steps
    assert {step.batch for step in steps} == {SAMPLES}
    assert {step.tokens for step in steps} == {tokens}


@pytest.mark.parametrize("name", MODELS)
def test_samples_that_are_decided_one_by_one_are_the_samples_or_that_is_refused(name: str) -> None:
    model, call = MODELS[name][0]()
    twin: Any = accelerate(model, [FirstBlockCache(0.5, per_image=True)])
    try:
        together = loop(twin, call)
    except FastditError:
        return
    reasons = [step.reason for step in twin.fastdit.last_run.steps]
    assert {reason.count("change") for reason in reasons if "change" in reason} == {SAMPLES}
    for sample in range(SAMPLES):
        one = {key: value[sample : sample + 1] for key, value in call.items()}
        alone = loop(accelerate(model, [FirstBlockCache(0.5, per_image=True)]), one)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[sample : sample + 1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_where_nothing_is_skipped_the_outputs_are_the_model_s_own(name: str) -> None:
    model, call = MODELS[name][0]()
    twin: Any = accelerate(model, [FirstBlockCache(0.0)])
    with torch.no_grad():
        plain = model(**call, return_dict=False)[0]
    assert torch.equal(loop(twin, call)[0], plain)


@pytest.mark.parametrize("cache", [SeaCache(0.9), ToCa(3, 0.25, first=1)], ids=["SeaCache", "ToCa"])
@pytest.mark.parametrize("name", MODELS)
def test_what_needs_the_tokens_grid_is_refused_by_name(name: str, cache: Any) -> None:
    model, call = MODELS[name][0]()
    with pytest.raises(FastditError, match=type(cache).__name__):
        loop(accelerate(model, [cache]), call)
