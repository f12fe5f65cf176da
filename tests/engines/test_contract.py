"""Every engine of the library keeps the contract of the level."""

from __future__ import annotations

from typing import Any

from fastdit import AOT, Compile
from fastdit.testing import EngineContract


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
