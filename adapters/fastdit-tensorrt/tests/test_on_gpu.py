"""The contract of every engine, profiles and refitting, where there is a GPU and TensorRT. See the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdit import UnsupportedModel, accelerate
from fastdit.engine.registry import Registry
from fastdit.testing import EngineContract, generate
from fastdit_tensorrt import TensorRT, _torch_tensorrt


def missing() -> str | None:
    """Say what is missing to run TensorRT here."""
    if not torch.cuda.is_available():
        return "TensorRT needs a CUDA device"
    try:
        _torch_tensorrt()
    except UnsupportedModel as error:
        return str(error)
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING := missing()), reason=MISSING or "")]


class TestContract(EngineContract):
    engine = staticmethod(TensorRT)
    tolerance = 1e-3

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return on_gpu()


def on_gpu() -> tuple[Any, dict[str, Any]]:
    pipeline, call = EngineContract().pipeline()
    return pipeline.to("cuda"), {
        name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in call.items()
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_one_engine_serves_the_stages_that_are_named_back_and_forth(tmp_path: Path) -> None:
    pipeline, call = on_gpu()
    fast = accelerate(pipeline, [TensorRT(tokens=(25, 36), directory=str(tmp_path))])
    for size in (80, 96, 80, 96):
        sides = {"height": size, "width": size}
        assert relative_error(generate(fast, call, **sides), generate(pipeline, call, **sides)) <= 1e-3
    programs = list(tmp_path.rglob("engine.ep"))
    assert len(programs) == fast.fastdit.workshop.expected(pipeline.transformer)


def test_changed_weights_are_refitted_into_the_engine_that_was_kept_without_them(tmp_path: Path) -> None:
    pipeline, call = on_gpu()
    fast = accelerate(pipeline, [TensorRT(directory=str(tmp_path))])
    generate(fast, call)

    def without_weights() -> list[str]:
        entries = Registry(tmp_path).entries()
        return sorted(entry.key["piece"] for entry in entries if "graph" in entry.key)

    kinds = without_weights()
    assert len(kinds) == 2  # one a kind of block: the second single block was refitted from the first one's
    for block in pipeline.transformer.single_transformer_blocks:
        block.proj_mlp.weight.data *= 1.5
    assert relative_error(generate(fast, call), generate(pipeline, call)) <= 1e-3
    assert without_weights() == kinds
