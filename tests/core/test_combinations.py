"""Every two parts of a stack together, of whatever levels: a stack runs and each part acts in it, or it is refused.

Step caches with all their options and every model are in tests/step_cache/test_options_together.py. Here the levels
meet: what runs the blocks and what computes attention, under every schedule, step cache and token cache.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastdit import (
    DMD,
    RALU,
    Attention,
    BottleneckSampling,
    ClusCa,
    Compile,
    DBCache,
    DuCa,
    EasyCache,
    FastditError,
    FirstBlockCache,
    IncompatibleStack,
    Interval,
    JustInTime,
    NeverFired,
    ProgressiveResolution,
    Reuse,
    SeaCache,
    Stack,
    StepMask,
    Taylor,
    TaylorSeer,
    ToCa,
    accelerate,
)
from fastdit.attention.base import Attend, AttentionKernel
from fastdit.blocks.attention import AttentionCall
from fastdit.engine.base import Engine, Execute
from fastdit.testing import PIPELINES, counted_calls, generate
from pairwise import Row, all_pairs, pairs_of, pairwise

STEPS = 9


@dataclasses.dataclass(frozen=True)
class AsItIs(Engine):
    """Runs the block's own forward, and counts."""

    ran: ClassVar[list[str]] = []

    def build(self, call: Any, folder: Path) -> Execute:
        def execute(call: Any) -> Any:
            self.ran.append(call.module.__class__.__name__)
            return call.run()

        return execute


@dataclasses.dataclass(frozen=True)
class ByHand(AttentionKernel):
    """Computes attention in two products, and counts."""

    names: tuple[str, ...] = ("by hand",)
    ran: ClassVar[list[str]] = []

    @property
    def backends(self) -> tuple[str, ...]:
        return self.names

    def kernel(self, backend: str) -> Attend:
        def attend(call: AttentionCall) -> Tensor:
            self.ran.append(backend)
            mask = call.additive_mask()
            scores = call.query @ call.key.mT * (call.scale or call.query.shape[-1] ** -0.5)
            return (scores if mask is None else scores + mask).softmax(-1) @ call.value

        return attend


PARTS: dict[str, dict[str, Any]] = {
    "schedule": {
        "no schedule": None,
        "RALU": RALU(steps=(3, 3, 3), ends=(0.3, 0.45), ratio=0.3),
        "ProgressiveResolution": ProgressiveResolution(steps=(5, 4)),
        "BottleneckSampling": BottleneckSampling((3, 3, 3)),
        "JustInTime": JustInTime((3, 3, 3)),
    },
    "step cache": {
        "no step cache": None,
        "FirstBlockCache": FirstBlockCache(1.0),
        "DBCache": DBCache(1.0, 1, 0, first=1),
        "EasyCache": EasyCache(5.0),
        "SeaCache": SeaCache(1.0),
        "Interval": Interval(2),
        "StepMask": StepMask((1, 1, 0) * 3),
        "TaylorSeer": TaylorSeer(2, first=2),
    },
    "token cache": {
        "all tokens": None,
        "ToCa": ToCa(3, 0.25, first=1),
        "DuCa": DuCa(4, 0.25, first=1),
        "ClusCa": ClusCa(3, clusters=4, first=1),
    },
    "attention": {
        "own attention": None,
        "one kernel": ByHand(),
        "a kernel a stage": ByHand(("native", "by hand", "x")),
    },
    "engine": {"own code": None, "as it is": AsItIs()},
}
FORECASTS: dict[str, Any] = {"Reuse": Reuse(), "Taylor": Taylor(1), "DMD": DMD(3)}
MODELS = {"flux": "FluxPipeline", "sd3": "StableDiffusion3Pipeline"}
FACTORS = {
    "model": list(MODELS),
    **{level: list(parts) for level, parts in PARTS.items()},
    "forecast": list(FORECASTS),
    "scope": ["stack", "list", "forward"],
    "images": ["together", "each"],
}


def stack_of(row: Row) -> Stack:
    """Make the stack that a row, which may be unfinished, names."""
    found = {level: parts.get(row.get(level, "")) for level, parts in PARTS.items()}
    if found["step cache"] is not None:
        options = {"scope": row.get("scope", "stack"), "per_image": row.get("images") == "each"}
        if row["step cache"] != "TaylorSeer":
            options["forecast"] = FORECASTS[row.get("forecast", "Reuse")]
        found["step cache"] = dataclasses.replace(found["step cache"], **options)
    return Stack(part for part in found.values() if part is not None)


def stated(row: Row) -> bool:
    """Whether the stack can be stated, and an option is one of a step cache that is there."""
    optional = (row.get("forecast", "Reuse"), row.get("scope", "stack"), row.get("images", "together"))
    if row.get("step cache") == "no step cache" and optional != ("Reuse", "stack", "together"):
        return False
    if row.get("step cache") == "TaylorSeer" and row.get("forecast", "Reuse") != "Reuse":
        return False
    try:
        stack_of(row)
    except FastditError:
        return False
    return True


ROWS = pairwise(FACTORS, stated)


@cache
def pipeline(model: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = PIPELINES[MODELS[model]](steps=STEPS, batch=2, size=(64, 96), output_type="latent")
    return pipe, call


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    yield
    pipeline.cache_clear()


def run(row: Row, directory: Path) -> str | None:
    """Run a row's stack twice and check what each part promises; give the reason where it is refused."""
    pipe, call = pipeline(row["model"])
    stack = stack_of(row)
    if stack.engine is not None:
        stack = Stack(dataclasses.replace(p, directory=str(directory)) if p is stack.engine else p for p in stack)
    if stack.schedule is not None:
        call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fast = accelerate(pipe, stack)
            first = generate(fast, call)
        except FastditError as error:
            return str(error)
        AsItIs.ran.clear()
        ByHand.ran.clear()
        with counted_calls(pipe.transformer) as counts:
            second = generate(fast, call)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    record = fast.fastdit.last_run
    assert record.completed and record.doubts == 0
    if stack.schedule is not None:
        assert {step.stage for step in record.steps} == set(range(len(stack.schedule.steps)))
    idle = " ".join(str(warning.message) for warning in caught if isinstance(warning.message, NeverFired))
    if stack.step_cache is not None or stack.token_cache is not None:
        assert record.skipped + record.partial > 0 or idle
    if row["images"] == "together" and stack.token_cache is None:
        assert sum(step.blocks_run for step in record.steps) == sum(counts)
    whole = [step for step in record.steps if step.action == "computed"]
    if stack.engine is not None:
        assert {step.engine for step in whole} == {type(stack.engine).__name__}
        assert AsItIs.ran or not isinstance(stack.engine, AsItIs)
    if isinstance(stack.attention, ByHand):
        assert ByHand.ran
    return None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_a_stack_runs_with_each_part_acting_or_is_refused_with_a_reason(row: Row, tmp_path: Path) -> None:
    refusal = run(row, tmp_path)
    assert refusal is None or (refusal.startswith("ByHand") and "a kernel a stage" in row.values())


def test_two_values_that_are_in_no_row_cannot_be_in_a_stack() -> None:
    met = {pair for row in ROWS for pair in pairs_of(row)}
    apart = [dict(pair) for pair in all_pairs(FACTORS) if pair not in met]
    assert 0 < len(apart) < len(met) / 5
    for pair in apart:
        assert not any(stated({"step cache": name, **pair}) for name in PARTS["step cache"])


COMPILED = {
    "schedule": ["no schedule", "RALU"],
    "step cache": ["no step cache", "FirstBlockCache", "Interval"],
    "attention": ["own attention", "torch's plain one"],
}
PARTS["attention"]["torch's plain one"] = Attention("_native_math")
PARTS["engine"]["compiled"] = Compile()


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", pairwise(COMPILED), ids=lambda row: "-".join(row.values()))
def test_a_stack_with_compiled_blocks_runs_with_each_part_acting(
    row: Row, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rest = {"model": "flux", "token cache": "all tokens", "engine": "compiled", "scope": "stack", "images": "together"}
    assert run({**rest, **row}, tmp_path_factory.getbasetemp() / "compiled") is None


@pytest.mark.parametrize("name", ["ToCa", "DuCa", "ClusCa"])
def test_an_engine_beside_a_token_cache_is_refused_since_it_would_run_no_block(name: str) -> None:
    with pytest.raises(IncompatibleStack, match=f"{name}.*AsItIs|AsItIs.*{name}"):
        Stack([PARTS["token cache"][name], AsItIs()])
