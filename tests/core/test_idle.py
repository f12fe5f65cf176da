"""Every member of a stack says for itself that it gained nothing, whatever its neighbours did."""

from __future__ import annotations

import warnings

import pytest

from fastdit import FirstBlockCache, Interval, NeverFired, ToCa, accelerate
from fastdit.testing import STEPS, generate, tiny_flux


def test_an_idle_token_cache_is_noticed_beside_a_step_cache_that_acts() -> None:
    pipe, call = tiny_flux()
    twin = accelerate(pipe, [Interval(2), ToCa(first=STEPS)])
    with pytest.warns(NeverFired, match=r"ToCa.* left out no token"):
        generate(twin, call)
    assert twin.fastdit.last_run.skipped


def test_an_idle_step_cache_is_noticed_beside_a_token_cache_that_acts() -> None:
    pipe, call = tiny_flux()
    twin = accelerate(pipe, [FirstBlockCache(1e-9), ToCa(first=2)])
    with pytest.warns(NeverFired, match=r"FirstBlockCache.* skipped none"):
        generate(twin, call)
    assert twin.fastdit.last_run.partial


def test_strict_makes_an_error_of_an_idle_member() -> None:
    pipe, call = tiny_flux()
    twin = accelerate(pipe, [Interval(2), ToCa(first=STEPS)], strict=True)
    with pytest.raises(NeverFired, match="ToCa"):
        generate(twin, call)


def test_members_that_acted_say_nothing() -> None:
    pipe, call = tiny_flux()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NeverFired)
        generate(accelerate(pipe, [Interval(2), ToCa(first=2)]), call)
