"""What a measurement can't tell is said beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from fastdit.measure.noise import outliers, remarks, too_noisy
from fastdit.measure.results import Results
from fastdit.measure.statistics import Interval
from fastdit.measure.table import header, rich_table, rows
from tests.measure.samples import make_results


def with_seconds(name: str, seconds: Sequence[float]) -> Results:
    results = make_results()
    changed = [
        dataclasses.replace(entry, seconds=tuple(seconds)) if entry.name == name else entry
        for entry in results.configurations
    ]
    return dataclasses.replace(results, configurations=tuple(changed))


@pytest.mark.parametrize(
    ("interval", "noisy"),
    [
        (Interval(6.58, 1.0, 93.2), True),
        (Interval(1.2, 1.0, 1.4), True),
        (Interval(4.1, 3.9, 4.3), False),
        (Interval(1.01, 0.99, 1.03), False),
    ],
    ids=str,
)
def test_an_interval_wider_than_its_effect_is_noise_and_a_narrow_one_an_answer(interval: Interval, noisy: bool) -> None:
    assert too_noisy(interval) == noisy


def test_rounds_that_something_else_disturbed_stand_out_and_usual_spread_does_not() -> None:
    usual = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.03, 0.97, 1.0, 1.1]
    assert outliers(usual) == []
    assert outliers([*usual, 2.7, 82.0]) == [2.7, 82.0]
    assert outliers([1.0] * 9 + [1.1]) == []


def test_a_quiet_measurement_says_only_what_it_could_have_shown() -> None:
    rivalless, said = remarks(make_results())
    assert rivalless == (
        "No plain run takes as long as TeaCache (28 steps: +38%), or up to a tenth longer; so none is compared with it."
    )
    assert said.startswith("With 12 pictures of each, differences of the judge's score below 0.")


def test_outliers_are_named() -> None:
    said = " ".join(remarks(with_seconds("RALU 4x", [0.23] * 10 + [2.7, 82.0])))
    assert "Outliers: 2 of 12 rounds of RALU 4x stand out from the median of 0.23 s (82.00, 2.70 s)" in said


def test_a_speed_up_that_is_noise_is_no_number_of_the_table() -> None:
    noisy = with_seconds("TeaCache", [0.05, 5.0] * 6)
    assert any(said.startswith("Too noisy: the speed-up of TeaCache has") for said in remarks(noisy))
    cells = dict(zip(header(noisy), rows(noisy)[3].cells, strict=True))
    assert cells["speed-up"].endswith(" too noisy") and "[" not in cells["speed-up"]
    narrow = rich_table(noisy, narrow=True)
    assert any("too noisy" in str(cell) and "±" not in str(cell) for cell in narrow.columns[2].cells)
