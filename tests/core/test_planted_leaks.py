"""The contract finds what it is there for: a leak that is planted fails it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastdit import FirstBlockCache
from fastdit.step_cache.forecasters.base import History
from fastdit.step_cache.forecasters.reuse import Reuse
from fastdit.testing import PROMISES, AcceleratorContract, tiny_flux

KEPT: list[Any] = []


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    KEPT.clear()


class Keeping(AcceleratorContract):
    accelerator = FirstBlockCache(0.8)
    plant = staticmethod(lambda pipeline: None)

    def pipeline(self, **options: int) -> Any:
        pipeline, call = tiny_flux(**options)
        self.plant(pipeline)
        return pipeline, call


@dataclasses.dataclass(frozen=True)
class KeepingForecaster(Reuse):
    """Its histories outlive their runs."""

    def begin(self) -> History:
        KEPT.append(super().begin())
        return KEPT[-1]


def keep_a_view(_: Any, __: Any, output: Any) -> None:
    """A block's output is held by a view of it, which is all that is left."""
    KEPT[:] = [output[0][:, :1]]


def test_without_a_leak_it_passes() -> None:
    PROMISES["any exit is clean"].check(Keeping().subject())


@pytest.mark.parametrize("leak", ["a history that is kept", "a view of a block's output"])
def test_a_planted_leak_is_found(leak: str) -> None:
    contract = Keeping()
    if leak == "a history that is kept":
        contract.accelerator = FirstBlockCache(0.8, forecast=KeepingForecaster())  # type: ignore[misc]
    else:
        contract.plant = lambda pipeline: pipeline.transformer.transformer_blocks[1].register_forward_hook(keep_a_view)
    with pytest.raises(AssertionError):
        PROMISES["any exit is clean"].check(contract.subject())


def test_a_feature_that_was_there_before_is_no_leak() -> None:
    KEPT.append(torch.zeros(1, 2, 3))
    test_without_a_leak_it_passes()
