"""What parts of a stack are worth: planted gains are found, with their interactions and dead weight."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdit import Compile, ProgressiveResolution, Stack, TeaCache
from fastdit.bench.attribution import Parts, gains, interactions, subsets

NAMES = ["schedule", "cache", "engine"]


def planted(factors: dict[Parts, float], *, noise: float = 0.01, rounds: int = 24) -> dict[Parts, list[float]]:
    """Seconds of every subset: 10 over its factor, with noise that each round shares and some of its own."""
    random = np.random.default_rng(0)
    shared = random.normal(0.0, 5 * noise, rounds)
    return {
        parts: (10.0 / factor * np.exp(shared + random.normal(0.0, noise, rounds))).tolist()
        for parts, factor in factors.items()
    }


def product(own: list[float], **changes: float) -> dict[Parts, float]:
    places = range(len(own))
    every = [frozenset(i for i in places if mask >> i & 1) for mask in range(2 ** len(own))]
    return {
        parts: math.prod(own[i] for i in parts) * changes.get("".join(map(str, sorted(parts))), 1.0) for parts in every
    }


def test_parts_that_multiply_have_their_own_gains_and_no_interaction() -> None:
    seconds = planted(product([4.0, 2.0, 1.3]))
    for gain, own in zip(gains(NAMES, seconds), [4.0, 2.0, 1.3], strict=True):
        for interval in (gain.alone, gain.last, gain.shapley):
            assert interval.low < own < interval.high and interval.spread < 0.03 * own
        assert not gain.dead_weight
    assert all("as much as" in str(one) for one in interactions(NAMES, seconds))


def test_shapley_values_multiply_to_the_whole_stack_s_gain() -> None:
    seconds = planted(product([4.0, 2.0, 1.3], **{"012": 0.7, "02": 1.2}), noise=0.0)
    whole = np.median(seconds[frozenset()]) / np.median(seconds[frozenset({0, 1, 2})])
    assert math.prod(gain.shapley.estimate for gain in gains(NAMES, seconds)) == pytest.approx(whole)


def test_an_engine_that_runs_eagerly_under_a_cache_is_found() -> None:
    # Alone the engine gains 1.3 times; wherever the cache is, nothing.
    seconds = planted(product([4.0, 2.0, 1.3], **{"12": 1 / 1.3, "012": 1 / 1.3}))
    engine = gains(NAMES, seconds)[2]
    assert engine.alone.low > 1.25 and engine.dead_weight and engine.last.high < 1.02
    (told,) = [one for one in interactions(NAMES, seconds) if one.names == ("cache", "engine")]
    assert "cache and engine gain less than the product of their own" in str(told)
    assert told.over_product.low < 1 / 1.3 < told.over_product.high


def test_every_subset_is_a_stack_and_too_many_parts_are_refused() -> None:
    stack = Stack([ProgressiveResolution("4x"), TeaCache(0.2), Compile()])
    found = subsets(stack)
    assert len(found) == 7
    assert all(list(one) == [list(stack)[i] for i in sorted(parts)] for parts, one in found.items())
    with pytest.raises(ValueError, match="every subset"):
        gains(NAMES, {frozenset(): [1.0]})
