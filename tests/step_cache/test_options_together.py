"""Gates, forecasters, scopes, options, schedules, token caches and models: every two of them together in some stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from fastdit import (
    DMD,
    RALU,
    BottleneckSampling,
    ClusCa,
    DuCa,
    EasyCache,
    FirstBlockCache,
    FoCa,
    IncompatibleStack,
    Interval,
    JustInTime,
    MagCache,
    MagnitudeCurve,
    ProgressiveResolution,
    PublishedTaylor,
    Reuse,
    SeaCache,
    Stack,
    StepMask,
    Taylor,
    TeaCache,
    ToCa,
    UnsupportedModel,
    accelerate,
)
from fastdit.testing.tiny import counted_calls
from pairwise import Row, all_pairs, pairs_of, pairwise

STEPS = 6
GATES: dict[str, Any] = {
    "no gate": None,
    "TeaCache": TeaCache(1.0, (1.0, 0.0)),
    "FirstBlockCache": FirstBlockCache(1.0),
    "EasyCache": EasyCache(100.0),
    "SeaCache": SeaCache(1.0),
    "MagCache": MagCache(0.5, MagnitudeCurve(tuple(1.0 - 0.01 * step for step in range(STEPS)))),
    "Interval": Interval(2),
    "StepMask": StepMask((1, 1, 0) * 2),
}
FORECASTS: dict[str, Any] = {
    "Reuse": Reuse(),
    "Taylor": Taylor(2),
    "PublishedTaylor": PublishedTaylor(1),
    "FoCa": FoCa(),
    "DMD": DMD(3),
}
SCHEDULES: dict[str, Any] = {
    "no schedule": None,
    "RALU": RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3),
    "ProgressiveResolution": ProgressiveResolution(steps=(3, 3)),
    "BottleneckSampling": BottleneckSampling((2, 2, 2)),
    "JustInTime": JustInTime((2, 2, 2)),
}
TOKENS: dict[str, Any] = {
    "all tokens": None,
    "ToCa": ToCa(3, 0.25, first=1),
    "DuCa": DuCa(4, 0.25, first=1),
    "ClusCa": ClusCa(3, clusters=4, first=1),
}
#: Pixels of a side: eight tokens.
SIZES = {"flux": 128, "flux2": 32, "sd3": 128, "qwen-image": 64, "wan": 64, "z-image": 128, "pixart": 128}

FACTORS = {
    "model": list(tiny.PIPELINES),
    "gate": list(GATES),
    "forecast": list(FORECASTS),
    "schedule": list(SCHEDULES),
    "tokens": list(TOKENS),
    "scope": ["stack", "list", "forward"],
    "images": ["together", "each"],
    "change": ["reset", "carry"],
}


def allowed(row: Row) -> bool:
    """Whether a stack can be stated and runs; why each of the others is refused is tested by itself."""
    model, gate, scope = (row.get(name, "") for name in ("model", "gate", "scope"))
    staged = row.get("schedule", "no schedule") != "no schedule"
    by_tokens = row.get("tokens", "all tokens") != "all tokens"
    each, carried = row.get("images") == "each", row.get("change") == "carry"
    return not (
        (gate == "no gate" and (scope in ("list", "forward") or each or row.get("forecast", "Reuse") != "Reuse"))
        or (GATES.get(gate) is not None and scope and scope not in GATES[gate].scopes)
        or (gate == "MagCache" and staged)
        or (gate == "SeaCache" and model in ("wan", "pixart"))
        or (scope == "forward" and (model == "pixart" or (model == "z-image" and each)))
        or (by_tokens and (each or model in ("flux2", "qwen-image", "wan", "z-image")))
        or (staged and model in ("wan", "pixart"))
        or (staged and carried and not _carries(model, scope, each))
    )


def _carries(model: str, scope: str, each: bool) -> bool:
    """Whether histories can follow the tokens from stage to stage, or fail to in one of the ways tested below."""
    if model in ("flux2", "z-image"):
        return scope in ("", "forward")
    return model != "sd3" or not (scope == "forward" or each)


ROWS = pairwise(FACTORS, allowed)


def stack_of(row: Row) -> list[Any]:
    """The accelerators that a row names."""
    gate, tokens = GATES[row["gate"]], TOKENS[row["tokens"]]
    if gate is not None:
        gate = dataclasses.replace(
            gate,
            forecast=FORECASTS[row["forecast"]],
            scope=row["scope"],
            per_image=row["images"] == "each",
            stage_change=row["change"],
        )
    if tokens is not None:
        tokens = dataclasses.replace(tokens, stage_change=row["change"])
    return [part for part in (SCHEDULES[row["schedule"]], gate, tokens) if part is not None]


@cache
def pipeline(model: str) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A pipeline with two prompts, a call, and what it gives without fastdit."""
    pipe, call = tiny.PIPELINES[model](steps=STEPS, batch=2, size=SIZES[model])
    return pipe, call, tiny.run(pipe, call, output_type="latent")


@pytest.fixture(scope="module", autouse=True)
def untouched() -> Iterator[None]:
    """After all the stacks, each pipeline gives what it gave before them."""
    yield
    for model in SIZES:
        pipe, call, plain = pipeline(model)
        assert torch.equal(tiny.run(pipe, call, output_type="latent"), plain)
    pipeline.cache_clear()


@pytest.mark.filterwarnings("ignore::fastdit.FastditWarning")  # a short stage may leave nothing to skip
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_two_options_together_keep_every_promise(row: Row) -> None:
    pipe, call, plain = pipeline(row["model"])
    stack = Stack(stack_of(row))
    assert Stack.from_json(stack.to_json()) == stack
    fast = accelerate(pipe, stack)
    if stack.schedule is not None:
        call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    first = tiny.run(fast, call, output_type="latent")
    lists = [child for child in pipe.transformer.children() if isinstance(child, nn.ModuleList)]
    with counted_calls(pipe.transformer, [block for blocks in lists for block in blocks]) as counts:
        second = tiny.run(fast, call, output_type="latent")
    record = fast.fastdit.last_run
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert record.completed and record.doubts == 0
    acted = record.skipped + record.partial > 0
    assert acted or stack.schedule is not None or not stack
    assert torch.equal(first, plain) == (not acted and stack.schedule is None)
    if not stack.schedule and not stack.token_cache and row["images"] == "together" and row["model"] in ("flux", "sd3"):
        # To count blocks is to run the model on the meta device, for each shape and each twin.
        assert sum(step.blocks_run for step in record.steps) == sum(counts)
    if row["change"] == "reset":
        for one, other in zip(record.steps, record.steps[1:], strict=False):
            assert other.stage == one.stage or other.action == "computed"


def test_the_rows_hold_every_pair_and_are_few() -> None:
    met = {pair for row in ROWS for pair in pairs_of(row)}
    impossible = [pair for pair in all_pairs(FACTORS) if pair not in met]
    assert all(any(allowed(row) for row in ROWS if pair <= set(row.items())) is False for pair in impossible)
    assert len(met) > 350
    assert len(ROWS) < 70


PLACES = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    banned=st.sets(
        st.tuples(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.tuples(st.integers(0, 3), st.integers(0, 3)))
    ),
)
def test_pairwise_rows_are_allowed_the_same_each_time_and_hold_every_pair_that_can_be(
    sizes: list[int], banned: set[tuple[tuple[int, int], tuple[int, int]]]
) -> None:
    factors = {str(place): [str(value) for value in range(size)] for place, size in enumerate(sizes)}
    forbidden = [{(str(place), str(value)) for place, value in pair} for pair in banned]

    def allowed(row: Row) -> bool:
        return not any(pair <= set(row.items()) for pair in forbidden)

    every = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    possible = {pair for row in every if allowed(row) for pair in pairs_of(row)}
    rows = pairwise(factors, allowed)
    assert all(row.keys() == factors.keys() and allowed(row) for row in rows)
    assert {pair for row in rows for pair in pairs_of(row)} == possible
    assert rows == pairwise(factors, allowed)
    assert len(rows) <= len(possible)


#: The first step of the second stage is skipped.
SKIPS_A_SWITCH = StepMask((1, 1, 0, 0, 1, 1), stage_change="carry")


@pytest.mark.parametrize(("model", "scope"), [("flux2", "stack"), ("z-image", "list")])
def test_a_history_that_is_not_of_the_image_s_tokens_alone_is_not_carried_and_that_is_said(
    model: str, scope: str
) -> None:
    """Single blocks of FLUX.2 and all of Z-Image see text and image in one sequence."""
    pipe, call, _ = pipeline(model)
    call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    with pytest.raises((IncompatibleStack, UnsupportedModel), match="stage_change"):
        tiny.run(
            accelerate(pipe, [SCHEDULES["RALU"], StepMask((1, 1, 0, 0, 1, 1), scope=scope, stage_change="carry")]), call
        )


def test_images_decided_one_by_one_are_carried_in_a_guided_batch_too() -> None:
    pipe, call, _ = pipeline("sd3")
    call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    fast = accelerate(pipe, [SCHEDULES["RALU"], dataclasses.replace(SKIPS_A_SWITCH, per_image=True)])
    together = accelerate(pipe, [SCHEDULES["RALU"], SKIPS_A_SWITCH])
    torch.testing.assert_close(tiny.run(fast, call), tiny.run(together, call), rtol=1e-3, atol=1e-4)
