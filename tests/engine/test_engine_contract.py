"""Every engine of the library keeps the contract of the level."""

from __future__ import annotations

from typing import Any

import pieces
import pytest
import torch
from torch import nn

from fastdit import (
    AOT,
    Attention,
    Compile,
    accelerate,
)
from fastdit.testing import EngineContract, generate


@pytest.mark.exhaustive
class TestCompile(EngineContract):
    engine = staticmethod(Compile)


@pytest.mark.exhaustive
class TestPackedCompile(EngineContract):
    @staticmethod
    def engine(**options: Any) -> Compile:
        return Compile(packed=True, **options)


@pytest.mark.exhaustive
class TestAOT(EngineContract):
    engine = staticmethod(AOT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", [Compile, AOT])
def test_the_smallest_weights_of_a_block_are_its_own_too_and_seen_when_they_change(engine: Any) -> None:
    module = pieces.Model()
    module.blocks = nn.ModuleList(pieces.SmallWeights() for _ in range(3))
    fast = accelerate(module, [engine()])
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
        found = pieces.run(fast, pieces.inputs())
        with torch.no_grad():
            torch.testing.assert_close(found, module(pieces.inputs()), rtol=1e-5, atol=1e-5)
        assert {step.engine for step in fast.fastdit.last_run.steps} == {engine.__name__}
    assert len(fast.fastdit.workshop.builds) == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", [Compile, AOT])
def test_an_attention_kernel_is_compiled_in_and_keyed(engine: Any) -> None:
    pipeline, call = EngineContract().pipeline()
    fast = accelerate(pipeline, [Attention("_native_math"), engine()], strict=True)
    plain = generate(pipeline, call)
    for seed in (0, 1):
        found = generate(fast, call, seeds=seed)
        torch.testing.assert_close(found, generate(pipeline, call, seeds=seed) if seed else plain, rtol=1e-5, atol=1e-5)
    assert [build.failure for build in fast.fastdit.workshop.builds] == [None, None]
