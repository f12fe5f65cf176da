"""The Frechet distance against closed forms, and the jackknife that gives it an interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdit.measure.statistics import mean, mean_difference
from frechet import frechet_distance, influences, jackknife


def with_moments(mean: np.ndarray, covariance: np.ndarray, count: int = 50) -> np.ndarray:
    """Samples whose own mean and covariance are exactly these."""
    samples = np.random.default_rng(0).normal(size=(count, mean.size))
    samples -= samples.mean(axis=0)
    whitened = samples @ np.linalg.inv(np.linalg.cholesky(np.cov(samples, rowvar=False))).T
    return mean + whitened @ np.linalg.cholesky(covariance).T


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=4), st.floats(0.1, 4), st.floats(0.1, 4))
def test_the_frechet_distance_of_round_gaussians_is_its_closed_form(shift: list[float], one: float, two: float) -> None:
    mean = np.array(shift)
    first = with_moments(np.zeros(mean.size), one**2 * np.eye(mean.size))
    second = with_moments(mean, two**2 * np.eye(mean.size))
    expected = (mean**2).sum() + mean.size * (one - two) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_frechet_distance_of_crossed_gaussians_agrees_with_a_matrix_root() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    one, two = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    expected = np.trace(one + two - 2 * scipy_linalg.sqrtm(one @ two).real)
    assert frechet_distance(with_moments(np.zeros(2), one), with_moments(np.zeros(2), two)) == pytest.approx(expected)


def test_the_frechet_distance_is_symmetric_and_zero_to_itself_even_with_few_samples() -> None:
    random = np.random.default_rng(0)
    few, others = random.normal(size=(5, 12)), random.normal(size=(6, 12))
    assert frechet_distance(few, few, regularisation=1e-3) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, others) == pytest.approx(frechet_distance(others, few))


def test_bad_feature_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        frechet_distance([[math.nan, 1.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="width"):
        frechet_distance(np.ones((3, 2)), np.ones((3, 4)))


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(3).normal(0, 1, 200)
    interval = jackknife(lambda rows: float(values[rows].mean()), 200, groups=200)
    assert interval.spread == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(200), rel=0.01)


def test_influences_have_the_statistic_for_mean_and_pair_up() -> None:
    random = np.random.default_rng(4)
    hard = random.normal(0, 5, 60)
    first, second = hard + 1 + random.normal(0, 0.1, 60), hard + random.normal(0, 0.1, 60)

    def spread_of(values: np.ndarray) -> tuple[float, ...]:
        return influences(lambda rows: float(values[rows].var(ddof=1)), 60, groups=30)

    assert np.mean(spread_of(first)) == pytest.approx(first.var(ddof=1))
    alone = mean(spread_of(first)).spread
    assert mean_difference(spread_of(first), spread_of(second)).spread < alone / 5


@pytest.mark.parametrize("groups", [1, 11])
def test_a_jackknife_of_one_group_or_of_more_than_rows_is_refused(groups: int) -> None:
    with pytest.raises(ValueError, match="between 2 groups and one a row"):
        influences(lambda rows: 0.0, 10, groups=groups)
