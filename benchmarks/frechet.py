"""The Frechet distance of two sets of features, and its interval by a jackknife, where resampling would bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fastdit.measure.statistics import CONFIDENCE, Array, Interval

Statistic = Callable[[npt.NDArray[np.intp]], float]


def frechet_distance(first: npt.ArrayLike, second: npt.ArrayLike, *, regularisation: float = 0.0) -> float:
    """Frechet distance of two feature sets of shape (samples, features), each taken for a Gaussian.

    `regularisation` is added to both covariances' diagonals, relative to their mean variance; it steadies the distance
    of sets with fewer samples than features, whose covariances are singular. Too few samples raise the distance
    whatever is done, so compare only distances of equally many samples.
    """
    (mean_1, covariance_1), (mean_2, covariance_2) = _gaussian(first), _gaussian(second)
    if mean_1.shape != mean_2.shape:
        raise ValueError(f"feature sets must be of one width; got {mean_1.size} and {mean_2.size}")
    ridge = regularisation * (np.trace(covariance_1) + np.trace(covariance_2)) / (2 * mean_1.size)
    covariance_1 = covariance_1 + ridge * np.eye(mean_1.size)
    covariance_2 = covariance_2 + ridge * np.eye(mean_1.size)
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), and the latter is symmetric: its eigenvalues are real and, but for
    # rounding, not negative. The usual sqrtm(A @ B) turns complex on singular covariances.
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ covariance_2 @ root).clip(min=0)).sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1) + np.trace(covariance_2) - 2 * overlap
    return max(0.0, float(distance))


def jackknife(statistic: Statistic, count: int, *, groups: int = 20) -> Interval:
    """Interval of a statistic of the rows it is given, from leaving out one of `groups` groups at a time.

    For statistics that repeated rows bias, such as a Frechet distance: no resample ever holds a row twice.
    """
    return interval_of(influences(statistic, count, groups=groups))


def interval_of(values: Sequence[float]) -> Interval:
    """Give the jackknife's interval of influences."""
    estimate = float(np.mean(values))
    reach = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Interval(estimate, estimate - reach, estimate + reach)


def influences(statistic: Statistic, count: int, *, groups: int = 20) -> tuple[float, ...]:
    """Give one value a group of rows: their mean is the statistic, their standard error the jackknife's.

    Two statistics of the same rows can so be compared in pairs, as samples of single rows can.
    """
    if not 2 <= groups <= count:
        raise ValueError(f"a jackknife needs between 2 groups and one a row; got {groups} groups of {count} rows")
    rows = np.arange(count)
    left_out = np.array([statistic(rows[rows % groups != group]) for group in range(groups)])
    values = statistic(rows) + (groups - 1) * (left_out.mean() - left_out)
    return tuple(values.tolist())


def _gaussian(features: npt.ArrayLike) -> tuple[Array, Array]:
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 2 or not np.isfinite(array).all():
        raise ValueError(f"a feature set is a finite (samples >= 2, features) array; got shape {array.shape}")
    return array.mean(axis=0), np.atleast_2d(np.cov(array, rowvar=False))
