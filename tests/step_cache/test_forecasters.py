"""The forecasters extrapolate what they claim to, by themselves: features in, features out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastdit import (
    DMD,
    FoCa,
    InvalidConfig,
    PublishedTaylor,
    Reuse,
    Taylor,
)

FORECASTERS = [Reuse(), Taylor(1), Taylor(2), PublishedTaylor(1), PublishedTaylor(2), FoCa(), DMD(3), DMD(6)]


def feed(forecast: Any, steps: list[int], function: Any) -> Any:
    history = forecast.begin()
    for step in steps:
        history.record(step, [function(step)])
    return history


def polynomial(*coefficients: float) -> Any:
    shape = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(1, 3, 2)
    return lambda step: shape * sum(c * step**power for power, c in enumerate(coefficients))


@pytest.mark.parametrize("forecast", FORECASTERS, ids=str)
def test_a_feature_that_stands_still_is_forecast_as_it_is(forecast: Any) -> None:
    history = feed(forecast, [0, 1, 2, 3], polynomial(1.5))
    torch.testing.assert_close(history.predict(5)[0], polynomial(1.5)(5))


@pytest.mark.parametrize("forecast", [f for f in FORECASTERS if f != Reuse()], ids=str)
@given(slope=st.floats(-2, 2), gap=st.integers(1, 4), ahead=st.integers(1, 5))
def test_what_moves_in_a_line_is_forecast_on_it(forecast: Any, slope: float, gap: int, ahead: int) -> None:
    line = polynomial(1.0, slope)
    assume(not isinstance(forecast, DMD) or abs(slope) * gap > 1e-3)
    history = feed(forecast, [0, gap, 2 * gap, 3 * gap], line)
    predictions = [history.predict(3 * gap + k) for k in range(1, ahead + 1)]
    if isinstance(forecast, DMD):
        # Modes that grow are held, and a line is a double mode at one: near, not exact.
        return
    torch.testing.assert_close(predictions[-1][0], line(3 * gap + ahead), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [Taylor, PublishedTaylor])
@given(order=st.integers(0, 4), asked=st.lists(st.booleans(), min_size=7, max_size=7), gap=st.integers(1, 3))
def test_a_prediction_does_not_depend_on_those_asked_for_before_it(
    kind: Any, order: int, asked: list[bool], gap: int
) -> None:
    features = torch.randn(7, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    often, once = kind(order).begin(), kind(order).begin()
    for place, asks in enumerate(asked):
        often.record(place * gap, [features[place]])
        once.record(place * gap, [features[place]])
        assert len(often.tensors()) == len(once.tensors()) <= order + 1
        if asks:
            often.predict(place * gap + 1)
    assert torch.equal(often.predict(20)[0], once.predict(20)[0])


def test_newton_s_form_is_exact_on_a_quadratic_and_the_published_one_is_not() -> None:
    quadratic = polynomial(0.3, -0.7, 0.5)
    steps = [0, 2, 4]
    torch.testing.assert_close(feed(Taylor(2), steps, quadratic).predict(7)[0], quadratic(7))
    published = feed(PublishedTaylor(2), steps, quadratic).predict(7)[0]
    assert not torch.allclose(published, quadratic(7), rtol=1e-2)


@given(values=st.lists(st.floats(-3, 3), min_size=3, max_size=3), gap=st.integers(1, 5), ahead=st.integers(1, 6))
def test_the_published_taylor_is_its_formula(values: list[float], gap: int, ahead: int) -> None:
    history = PublishedTaylor(2).begin()
    for place, value in enumerate(values):
        history.record(place * gap, [torch.full((1, 2, 2), value, dtype=torch.float64)])
    first, second, third = values
    slope = (third - second) / gap
    curvature = (slope - (second - first) / gap) / gap
    expected = third + slope * ahead + curvature * ahead**2 / 2
    found = history.predict(2 * gap + ahead)[0]
    torch.testing.assert_close(found, torch.full((1, 2, 2), expected, dtype=torch.float64))


def test_foca_feeds_on_its_own_predictions() -> None:
    history = feed(FoCa(), [0, 1], polynomial(1.0, 2.0))
    shape = polynomial(1.0)(0)
    slope, computed = 2.0, 3.0
    latest, before = computed, 1.0
    for k in range(1, 5):
        expected = computed + k / 2 * (slope + (latest - before))
        found = history.predict(1 + k)[0]
        torch.testing.assert_close(found, shape * expected)
        before, latest = latest, expected


@given(
    modes=st.lists(st.floats(0.3, 0.95), min_size=1, max_size=2, unique=True),
    gap=st.integers(1, 3),
    ahead=st.integers(1, 6),
)
def test_dynamic_modes_forecast_sums_of_decaying_exponentials(modes: list[float], gap: int, ahead: int) -> None:
    assume(len(modes) == 1 or abs(modes[0] - modes[1]) > 0.1)
    shapes = torch.randn(len(modes), 1, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def decay(step: int) -> Tensor:
        return sum(shape * mode**step for shape, mode in zip(shapes, modes, strict=True))

    last = 5 * gap
    history = feed(DMD(5), list(range(0, last + 1, gap)), decay)
    torch.testing.assert_close(history.predict(last + ahead)[0], decay(last + ahead), rtol=1e-3, atol=1e-5)


def test_dynamic_modes_begin_anew_where_the_gap_changes() -> None:
    history = feed(DMD(4), [0, 1, 2, 5], polynomial(1.0, 1.0, 0.2))
    assert len(history.kept) == 2


@pytest.mark.parametrize("forecast", FORECASTERS, ids=str)
def test_lifting_a_history_is_the_history_of_the_lifted_features(forecast: Any) -> None:
    features = torch.randn(5, 1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([0, 0, 1, 2, 2, 3, 3, 3])
    own, lifted = forecast.begin(), forecast.begin()
    for step in range(5):
        own.record(step, [features[step]])
        lifted.record(step, [features[step][:, index]])
    if isinstance(forecast, DMD):
        lifted._operator = own._operator  # the modes stay those of the tokens that they were fitted on
    own.lift(0, lambda tensor: tensor[:, index])
    torch.testing.assert_close(own.predict(7)[0], lifted.predict(7)[0])


@pytest.mark.parametrize("forecast", FORECASTERS, ids=str)
def test_a_forecast_after_one_computed_step_is_that_step_s(forecast: Any) -> None:
    history = feed(forecast, [2], polynomial(1.0, 1.0))
    assert history.filled and not history.extrapolates
    assert torch.equal(history.predict(3)[0], polynomial(1.0, 1.0)(2))


@pytest.mark.parametrize("make", [lambda: Taylor(5), lambda: PublishedTaylor(-1), lambda: DMD(2), lambda: DMD(9.0)])
def test_what_can_t_be_kept_is_refused_when_it_is_written(make: Any) -> None:
    with pytest.raises(InvalidConfig):
        make()
