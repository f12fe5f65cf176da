"""One compiled graph for all the stages whose numbers of tokens are named, and engines of their own for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fastdit import (
    Compile,
    InvalidConfig,
    ProgressiveResolution,
    accelerate,
)
from fastdit.engine.registry import Registry
from fastdit.schedule.lifts.token_copy import TokenCopy
from fastdit.testing import (
    EngineContract,
    flux_transformer,
    generate,
    tiny_flux,
)

#: Sides in tokens of pictures. Their numbers of tokens, with the text's six or without, are no size of anything else.
SIZES = ((5, 4), (6, 4), (5, 5), (7, 4), (7, 5))
TOKENS = tuple(rows * columns for rows, columns in SIZES)


@pytest.mark.exhaustive
class TestContract(EngineContract):
    @staticmethod
    def engine(**options: Any) -> Compile:
        return Compile(tokens=(12, 24), **options)


def small() -> tuple[Any, dict[str, Any]]:
    pipeline, call = tiny_flux(steps=2)
    pipeline.transformer = flux_transformer(layers=0, single_layers=2)
    return pipeline, call


def agrees(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.exhaustive
def test_any_number_of_named_stages_is_one_graph_for_a_kind_of_block(tmp_path: Path) -> None:
    pipeline, call = small()
    fast = accelerate(pipeline, [Compile(tokens=TOKENS, directory=str(tmp_path))])
    before = counters["stats"]["unique_graphs"]
    for rows, columns in (*SIZES, *reversed(SIZES)):
        size = {"height": 16 * rows, "width": 16 * columns}
        assert agrees(generate(fast, call, **size), generate(pipeline, call, **size)), (rows, columns)
    assert counters["stats"]["unique_graphs"] - before == 1
    assert len(Registry(tmp_path).entries()) == 1
    size = {"height": 96, "width": 32}  # 12 tokens, which nobody named
    assert agrees(generate(fast, call, **size), generate(pipeline, call, **size))
    assert counters["stats"]["unique_graphs"] - before == 2


@pytest.mark.exhaustive
def test_the_stages_of_a_schedule_are_one_graph() -> None:
    pipeline, call = small()
    schedule = ProgressiveResolution(steps=(2, 2), ends=(0.5,), lift=TokenCopy())
    fast = accelerate(pipeline, [schedule, Compile(tokens=(25, 100))])
    before = counters["stats"]["unique_graphs"]
    changes = {"height": 160, "width": 160, "num_inference_steps": None}
    expected = generate(accelerate(pipeline, [schedule]), call, **changes)
    assert agrees(generate(fast, call, **changes), expected)
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.exhaustive
def test_packed_weights_and_named_stages_go_together() -> None:
    pipeline, call = small()
    fast = accelerate(pipeline, [Compile(tokens=TOKENS, packed=True)])
    for rows, columns in SIZES[:3]:
        size = {"height": 16 * rows, "width": 16 * columns}
        assert agrees(generate(fast, call, **size), generate(pipeline, call, **size))


@pytest.mark.parametrize("tokens", [(20,), (20, 20), [20], 20, (1, 20), (20.0, 42)])
def test_tokens_that_are_no_stages_are_refused_by_name(tokens: Any) -> None:
    with pytest.raises(InvalidConfig, match="Compile's tokens"):
        Compile(tokens=tokens)
