"""Results come back as they were; those that are merged keep what is theirs and leave out what no longer holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastdit.measure.results import SCHEMA_VERSION, Metric, ResultsError
from fastdit.measure.statistics import Interval
from measurements import from_json, load, with_baseline, with_pictures_of, with_seconds
from tests.measure.samples import make_results, with_metric


def test_results_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    results = make_results()
    results.save(tmp_path / "results.json")
    assert load(tmp_path / "results.json") == results


@pytest.mark.parametrize("version", [None, 0, SCHEMA_VERSION + 1, str(SCHEMA_VERSION)])
def test_another_schema_version_is_refused(version: object) -> None:
    data = make_results().to_json() | {"schema_version": version}
    with pytest.raises(ResultsError, match="schema version"):
        from_json(data)


def test_missing_and_unknown_fields_are_named() -> None:
    data = make_results().to_json()
    data["surprise"] = data.pop("prompts")
    with pytest.raises(ResultsError, match=r"missing \['prompts'\], unknown \['surprise'\]"):
        from_json(data)


def test_a_clock_of_its_own_takes_the_place_of_the_seconds_alone() -> None:
    results = make_results()
    timed = with_seconds(results, {entry.name: (2.0, 2.0) for entry in results.configurations})
    assert timed.speed_up("RALU 4x").estimate == 1.0
    assert with_seconds(timed, {entry.name: entry.seconds for entry in results.configurations}) == results


def test_pictures_made_anew_take_their_rows_and_keep_the_clock() -> None:
    results = make_results()
    anew = with_seconds(results, {entry.name: (9.0,) for entry in results.configurations})
    scored = with_metric(anew, "judge", {"RALU 4x": Metric(Interval(0.5, 0.4, 0.6), (0.5, 0.5))})
    one = dataclasses.replace(scored, baseline="RALU 4x", configurations=(scored["RALU 4x"],))
    merged = with_pictures_of(results, one)
    assert merged["RALU 4x"].metrics["judge"].samples == (0.5, 0.5)
    assert merged["RALU 4x"].seconds == results["RALU 4x"].seconds
    assert merged["TeaCache"] == results["TeaCache"]
    longer = results["RALU 4x"].seconds * 2
    fresh = dataclasses.replace(one["RALU 4x"], name="RALU 9x", seconds=longer)
    joined = with_pictures_of(results, dataclasses.replace(one, baseline="RALU 9x", configurations=(fresh,)))
    assert joined.configurations[:-1] == results.configurations
    assert joined.speed_up("RALU 9x") == joined.speed_up("RALU 4x")
    assert from_json(joined.to_json()) == joined
    with pytest.raises(ResultsError, match="same prompts"):
        with_pictures_of(results, dataclasses.replace(one, prompts=("a fish",)))


def test_another_baseline_leaves_out_the_likeness_to_the_one_before() -> None:
    alike = {"psnr": Metric(Interval(40.0, 39.0, 41.0))}
    first, *others = make_results().configurations
    results = dataclasses.replace(make_results(), configurations=(dataclasses.replace(first, metrics=alike), *others))
    other = with_baseline(results, "11 steps")
    assert other.speed_up("11 steps").estimate == 1.0
    assert "psnr" not in other[first.name].metrics
    assert with_baseline(results, results.baseline) is results
