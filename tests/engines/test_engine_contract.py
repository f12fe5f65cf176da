"""Every engine of the library keeps the contract of the level."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdit import AOT, Attention, Compile, accelerate
from fastdit.testing import EngineContract, generate


class TestCompile(EngineContract):
    engine = staticmethod(Compile)


class TestFrozenCompile(EngineContract):
    @staticmethod
    def engine(**options: Any) -> Compile:
        return Compile(freeze=True, **options)

    #: It would take an engine for every block and size; the others show it.
    test_after_a_warm_up_nothing_is_built_or_compiled_for_other_prompts_seeds_guidance_and_sizes_seen = None


class TestAOT(EngineContract):
    engine = staticmethod(AOT)


@pytest.mark.parametrize("engine", [Compile, AOT])
def test_an_attention_kernel_is_compiled_in_and_keyed(engine: Any) -> None:
    pipeline, call = EngineContract().pipeline()
    fast = accelerate(pipeline, [Attention("_native_math"), engine()], strict=True)
    plain = generate(pipeline, call)
    for seed in (0, 1):
        found = generate(fast, call, seeds=seed)
        torch.testing.assert_close(found, generate(pipeline, call, seeds=seed) if seed else plain, rtol=1e-5, atol=1e-5)
    assert [build.failure for build in fast.fastdit.workshop.builds] == [None, None]
