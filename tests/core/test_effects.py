"""A subclass can't lose an effect: what any of its bases declares, it has; and conflicts follow from that."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import fastdit
from fastdit import (
    AOT,
    Attention,
    BottleneckSampling,
    ClusCa,
    Compile,
    DuCa,
    EasyCache,
    IncompatibleStack,
    Interval,
    JustInTime,
    Stack,
    StepMask,
    ToCa,
    config,
)
from fastdit.accelerator import Accelerator, Break, Change, Effects, Need

NAMES = ("changes", "needs", "breaks")
#: Whole forwards are skipped without a block being asked for, and torch's own attention is the plain pipeline's.
TAKEN_BACK: dict[str, set[Any]] = {
    "EasyCache": {Need.BLOCK_LISTS},
    "Attention": {Change.ARITHMETIC_ORDER, Change.ATTENTION_BACKEND, Break.BIT_EXACTNESS},
}


def registered() -> list[type[Accelerator]]:
    """Every accelerator that can be named in a stack's JSON."""
    for name in dir(fastdit):
        getattr(fastdit, name)
    found = [cls for cls in config._REGISTRY.values() if issubclass(cls, Accelerator)]
    return [cls for cls in found if cls.__module__.startswith("fastdit.")]


def made(cls: type[Accelerator]) -> Any:
    """An object with as few arguments as there must be."""
    arguments: dict[type, tuple[Any, ...]] = {
        StepMask: ((1, 0),),
        BottleneckSampling: ((2, 2, 2),),
        JustInTime: ((2, 2, 2),),
        Attention: ("native",),
    }
    return cls(*arguments.get(cls, ()))


@pytest.mark.parametrize("cls", registered(), ids=lambda cls: cls.__name__)
def test_an_accelerator_has_the_effects_that_any_of_its_bases_declares(cls: type[Accelerator]) -> None:
    effects = made(cls).effects
    for base in cls.__mro__:
        for name in NAMES:
            lost = vars(base).get(name, frozenset()) - getattr(effects, name)
            assert lost <= TAKEN_BACK.get(cls.__name__, set())


@pytest.mark.parametrize("cls", registered(), ids=lambda cls: cls.__name__)
def test_a_subclass_that_declares_effects_of_its_own_adds_them(cls: type[Accelerator]) -> None:
    added = {"changes": Change.KEY_PLACES, "needs": Need.ONE_FRAME}

    class Mine(cls):  # type: ignore[misc, valid-type]
        changes = frozenset({added["changes"]})
        needs = frozenset({added["needs"]})

    mine, theirs = (Accelerator.effects.fget(object.__new__(one)) for one in (Mine, cls))  # type: ignore[attr-defined]
    assert mine == Effects(theirs.changes | {added["changes"]}, theirs.needs | {added["needs"]}, theirs.breaks)


@pytest.mark.parametrize("engine", [Compile, AOT])
@pytest.mark.parametrize("cache", [ToCa(), DuCa(), ClusCa()], ids=lambda cache: type(cache).__name__)
def test_a_cache_that_runs_parts_of_blocks_is_refused_beside_an_engine_of_whole_blocks(cache: Any, engine: Any) -> None:
    assert Change.BLOCK_PARTS in cache.effects.changes
    with pytest.raises(
        IncompatibleStack, match=f"{engine.__name__}.*blocks that run as a whole.*{type(cache).__name__}"
    ):
        Stack([cache, engine()])


def test_duca_leaves_steps_out_as_well() -> None:
    assert {Change.STEP_ORDER, Change.BLOCK_PARTS} <= DuCa().effects.changes


def test_what_a_configuration_needs_follows_its_fields() -> None:
    assert Need.BLOCK_LISTS in Interval().effects.needs
    assert Need.BLOCK_LISTS not in Interval(scope="forward").effects.needs
    assert Need.BLOCK_LISTS not in EasyCache().effects.needs
    carried = dataclasses.replace(Interval(), stage_change="carry").effects.needs - Interval().effects.needs
    assert carried == {Need.CARRIED_TOKENS}
