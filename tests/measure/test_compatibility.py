"""Accelerators of all levels run together and keep their promises, or are refused by name with a reason."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import combinations
from combinations import Names, pairs, stated, tried
from fastdit import Stack

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

ROWS = list(pairs())


def marked() -> Iterator[ParameterSet]:
    """Leave to the exhaustive part the rows that run and hold no part which those before do not hold."""
    seen: set[tuple[int, str]] = set()
    for row in ROWS:
        runs, parts = isinstance(stated(row), Stack), set(enumerate(row))
        yield pytest.param(row, id="-".join(row), marks=pytest.mark.exhaustive if runs and parts <= seen else ())
        seen |= parts if runs else set()


@pytest.fixture(autouse=True)
def engines_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIT_CACHE", str(tmp_path))


def test_any_two_parts_are_in_one_row_and_run_unless_they_conflict() -> None:
    """Whatever is in no row that runs was in one that is refused."""
    running = [row for row in ROWS if isinstance(stated(row), Stack)]
    refused = [row for row in ROWS if row not in running]
    axes = [list(getattr(combinations, table)) for table in ("SCHEDULES", "TOKEN_CACHES", "ATTENTIONS", "ENGINES")]
    places = [Names._fields.index(name) for name in ("schedule", "token_cache", "attention", "engine")]
    for (a, xs), (b, ys) in itertools.combinations(zip(places, axes, strict=True), 2):
        for x, y in itertools.product(xs, ys):
            assert any(row[a] == x and row[b] == y for row in running) or any(
                row[a] == x and row[b] == y for row in refused
            ), (x, y)
    assert len(running) < 120


@pytest.mark.parametrize("names", list(marked()))
def test_a_combination_runs_and_keeps_its_promises_or_is_refused_with_a_reason(names: Names) -> None:
    found = tried(names)
    assert found.refusal is None or len(found.refusal) > 40


def test_what_is_refused_is_refused_for_the_effects_that_were_declared() -> None:
    for row in combinations.combinations():
        curve_and_schedule = row.step_cache == "MagCache" and row.schedule != "none"
        same_rows = row.token_cache != "none" or "the query's frame" in row.schedule
        expected = curve_and_schedule or (row.option == "per image" and same_rows)
        assert isinstance(stated(row), str) is expected, row
