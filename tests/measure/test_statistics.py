"""Intervals against closed forms, and the shapes of bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdit.measure.statistics import (
    Interval,
    mean,
    mean_difference,
    median_of_ratios,
    ratio_of_medians,
)

positive = st.lists(st.floats(0.01, 100), min_size=2, max_size=30)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_samples() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    interval = mean(list(values))
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.spread == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(2000), rel=0.05)


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    intervals = [mean(list(random.normal(0.0, 1.0, 60)), seed=trial) for trial in range(100)]
    assert 88 <= sum(interval.low <= 0 <= interval.high for interval in intervals) <= 100


@given(positive, st.floats(0.1, 10))
def test_a_constant_factor_between_paired_times_is_found_without_spread(seconds: list[float], factor: float) -> None:
    slower = [factor * value for value in seconds]
    for interval in (ratio_of_medians(slower, seconds), median_of_ratios(slower, seconds)):
        assert (interval.low, interval.estimate, interval.high) == pytest.approx((factor, factor, factor))


@given(positive)
def test_the_estimate_lies_inside_the_range_of_the_samples_and_the_seed_repeats_it(values: list[float]) -> None:
    interval = mean(values, seed=3)
    assert interval == mean(values, seed=3)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    random = np.random.default_rng(2)
    hard = random.normal(0, 5, 40)
    first, second = hard + 1 + random.normal(0, 0.1, 40), hard + random.normal(0, 0.1, 40)
    interval = mean_difference(list(first), list(second))
    assert interval.low > 0.9 and interval.high < 1.1


def test_an_interval_prints_its_estimate_and_its_ends() -> None:
    assert f"{Interval(4.123, 4.0, 4.2):.2f}" == "4.12 [4.00, 4.20]"


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_nothing_and_numbers_that_are_none_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean(values)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="paired"):
        ratio_of_medians([1.0, 2.0], [1.0])
