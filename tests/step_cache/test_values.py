"""What a step cache is without arguments, and what it does exactly at the edge of its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdit import (
    FORA,
    CGTaylor,
    Coefficients,
    DBCache,
    EasyCache,
    FirstBlockCache,
    Interval,
    InvalidConfig,
    MagCache,
    PublishedTaylor,
    Reuse,
    SeaCache,
    SkipPolicy,
    StepMask,
    Taylor,
    TaylorSeer,
    TeaCache,
)
from fastdit.layout import FineLayout
from fastdit.step import StepContext
from fastdit.step_cache.base import StepCache
from fastdit.step_cache.curves import MagnitudeCurve
from fastdit.step_cache.site import Site
from fastdit.step_cache.tally import Gains, Tally

#: Without arguments: own values by name, and the policy.
ALONE: dict[type[StepCache], tuple[dict[str, Any], SkipPolicy]] = {
    CGTaylor: ({"threshold": 0.1, "leading": 1, "trailing": 0, "forecast": Taylor(1)}, SkipPolicy(2, 1)),
    DBCache: ({"threshold": 0.08, "leading": 8, "trailing": 0, "first": 8, "scope": "list"}, SkipPolicy(8, 0)),
    EasyCache: ({"threshold": 0.05, "scope": "forward"}, SkipPolicy(2, 1)),
    FORA: ({"interval": 3}, SkipPolicy(1, 0)),
    FirstBlockCache: ({"threshold": 0.1, "leading": 1, "trailing": 0}, SkipPolicy(1, 1)),
    Interval: ({"interval": 3}, SkipPolicy(1, 1)),
    MagCache: ({"threshold": 0.24, "curve": None}, SkipPolicy(1, 0, max_consecutive=5, window=(0.1, 1.0))),
    SeaCache: ({"threshold": 0.25, "power": 2.0}, SkipPolicy(1, 1, max_consecutive=2)),
    TaylorSeer: ({"interval": 4, "order": 1, "first": 3, "forecast": PublishedTaylor(1)}, SkipPolicy(3, 0)),
    TeaCache: ({"threshold": 0.25, "coefficients": None}, SkipPolicy(1, 1)),
}
#: What rescales a change to itself.
SAME = Coefficients((1.0, 0.0))
COMMON = {"forecast": Reuse(), "per_image": False, "scope": "stack", "stage_change": "reset"}


def at(step: int, total: int = 10) -> StepContext:
    return StepContext(step, total, 0, step, "main")


@pytest.mark.parametrize("method", ALONE, ids=lambda method: method.__name__)
def test_a_method_without_arguments_has_the_values_that_its_page_names(method: type[StepCache]) -> None:
    own, policy = ALONE[method]
    made = method()
    assert {name: getattr(made, name) for name in {**COMMON, **own}} == {**COMMON, **own}
    assert made.policy == policy
    assert not made.neutral


def test_a_policy_without_arguments_computes_the_first_step_and_the_last() -> None:
    policy = SkipPolicy()
    assert (policy.first, policy.last, policy.window) == (1, 1, (0.0, 1.0))
    assert policy.max_consecutive is policy.max_skipped is None


def test_the_step_at_which_a_window_ends_is_outside_of_it() -> None:
    policy = SkipPolicy(1, 0, window=(0.0, 0.5))
    assert [policy.forced(at(step), 0, 0) for step in (4, 5, 6)] == [None, "outside the window", "outside the window"]


@pytest.mark.parametrize("cache", [FirstBlockCache(0.25), TeaCache(0.25, SAME), CGTaylor(0.25), SeaCache(0.25)])
def test_a_change_of_exactly_the_threshold_is_computed(cache: Any) -> None:
    assert cache.decide(cache.memory(), 0.25, at(3)).compute
    assert not cache.decide(cache.memory(), 0.2499, at(3)).compute


def test_an_error_of_exactly_the_threshold_is_skipped_by_magcache_as_in_its_code() -> None:
    cache = MagCache(0.25, MagnitudeCurve((1.0, 1.0, 0.75, 0.75)))
    assert not cache.decide(cache.memory(), 0.0, at(2, 4)).compute
    assert MagCache(0.24, cache.curve).decide(cache.memory(), 0.0, at(2, 4)).compute


def test_magcache_goes_by_the_place_in_the_pipeline_s_own_timesteps() -> None:
    cache = MagCache(0.1, MagnitudeCurve((1.0, 1.0, 1.0, 0.5)))
    later = StepContext(1, 2, 0, 1, "main", skipped_timesteps=2)
    assert cache.decide(cache.memory(), 0.0, later).compute
    assert not cache.decide(cache.memory(), 0.0, at(1, 4)).compute


@pytest.mark.parametrize(
    "made",
    [
        lambda: MagCache(-1.0),
        lambda: DBCache(-1.0),
        lambda: DBCache(first=-1),
        lambda: DBCache(max_skipped=0),
        lambda: MagCache(curve="no such model"),
        lambda: TaylorSeer(order=-1),
    ],
)
def test_values_out_of_range_are_refused_by_those_that_check_more_than_their_ranges(made: Any) -> None:
    with pytest.raises(InvalidConfig):
        made()


def test_dbcache_s_limits_are_its_policy_s() -> None:
    assert DBCache(first=3, max_consecutive=2, max_skipped=4).policy == SkipPolicy(
        3, 0, max_consecutive=2, max_skipped=4
    )


@pytest.mark.parametrize(
    ("cache", "neutral"),
    [(Interval(1), True), (Interval(2), False), (FORA(1), True), (StepMask((1, 1)), True), (StepMask((1, 0)), False)],
    ids=str,
)
def test_a_cache_that_may_skip_nothing_is_neutral(cache: StepCache, neutral: bool) -> None:
    assert cache.neutral is neutral


def test_a_run_in_which_a_step_could_have_been_skipped_and_none_was_is_idle() -> None:
    gains = Gains(Interval(2))
    for step in range(2):
        gains.adding(Tally(), step)
    assert gains.idle() is None, "the first step and the last one leave none"
    gains.adding(Tally(), 2)
    assert gains.idle() is not None
    gains.adding(Tally(reused=True), 3)
    assert gains.idle() is None


@pytest.mark.parametrize("method", ALONE, ids=lambda method: method.__name__)
def test_a_scope_that_a_method_s_signal_has_not_is_refused(method: type[StepCache]) -> None:
    for scope in ("stack", "list", "forward", "elsewhere"):
        if scope in method.scopes:
            assert method(scope=scope).scope == scope
        else:
            with pytest.raises(InvalidConfig, match="scope"):
                method(scope=scope)


@pytest.mark.parametrize(
    ("cache", "follows"),
    [
        (DBCache(first=5), {"policy": SkipPolicy(5, 0)}),
        (TaylorSeer(5, 2, first=4), {"policy": SkipPolicy(4, 0), "forecast": PublishedTaylor(2)}),
    ],
    ids=["DBCache", "TaylorSeer"],
)
def test_what_follows_from_other_values_is_neither_given_nor_shown(cache: StepCache, follows: dict[str, Any]) -> None:
    for name, value in follows.items():
        assert getattr(cache, name) == value
        assert name not in repr(cache)
        with pytest.raises(TypeError, match=name):
            type(cache)(**{name: value})


def test_a_mask_skips_what_it_says_within_the_limits_of_its_policy() -> None:
    mask = (1, 0, 0, 1, 0)
    assert StepMask(mask).skippable(5) == 3
    assert StepMask(mask).skippable(3) == 2
    assert StepMask(mask, policy=SkipPolicy(0, 0, max_skipped=2)).skippable(5) == 2
    assert StepMask(mask, policy=SkipPolicy(2, 1)).skippable(5) == 1
    assert StepMask(mask).outlook(5) is None
    assert StepMask(mask, policy=SkipPolicy(0, 4)).outlook(5) is not None


@pytest.mark.parametrize("known", [{"sigma": 0.5}, {"layout": FineLayout(2, 2)}], ids=["noise level", "grid"])
def test_seacache_is_refused_where_the_noise_level_or_the_grid_is_unknown(known: dict[str, Any]) -> None:
    tokens = torch.zeros(1, 4, 3)
    site = Site(tokens, tokens, None, (), {}, at(3), **known)
    with pytest.raises(InvalidConfig, match="noise level on the tokens' grid"):
        SeaCache().signal(site)
