"""Results survive a round trip; what isn't theirs is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from fastdit.measure.environment import Environment
from fastdit.measure.results import (
    SCHEMA_VERSION,
    Metric,
    Results,
    ResultsError,
)
from fastdit.measure.statistics import Interval
from fastdit.measure.table import (
    header,
    markdown,
    rich_table,
    rows,
    verdict,
)
from tests.measure.samples import make_results


def with_metric(results: Results, metric: str, values: dict[str, Metric]) -> Results:
    """These results with one more metric of the named rows."""
    rows = tuple(
        dataclasses.replace(entry, metrics={**entry.metrics, metric: values[entry.name]})
        if entry.name in values
        else entry
        for entry in results.configurations
    )
    return dataclasses.replace(results, configurations=rows)


def test_results_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    results = make_results()
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


def test_the_file_tells_other_readers_the_speed_ups(tmp_path: Path) -> None:
    derived = json.loads(make_results().dumps())["derived"]
    assert derived["RALU 4x"]["speed_up"]["estimate"] == pytest.approx(4.3, rel=0.1)


@pytest.mark.parametrize("version", [None, 0, SCHEMA_VERSION + 1, str(SCHEMA_VERSION)])
def test_another_schema_version_is_refused(version: object) -> None:
    data = make_results().to_json() | {"schema_version": version}
    with pytest.raises(ResultsError, match="schema version"):
        Results.from_json(data)


def test_missing_and_unknown_fields_are_named() -> None:
    data = make_results().to_json()
    data["surprise"] = data.pop("prompts")
    with pytest.raises(ResultsError, match=r"missing \['prompts'\], unknown \['surprise'\]"):
        Results.from_json(data)


def test_numbers_that_json_has_not_are_refused() -> None:
    broken = with_metric(make_results(), "judge", {"50 steps": Metric(Interval(math.nan, 0, 1))})
    with pytest.raises(ValueError, match="JSON compliant"):
        broken.dumps()


def test_a_baseline_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ResultsError, match="baseline"):
        dataclasses.replace(make_results(), baseline="51 steps")


def test_a_row_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(ResultsError, match=r"no row is called 'RALU 9x'; there are 50 steps"):
        make_results()["RALU 9x"]


def test_the_rival_is_the_fastest_plain_run_that_gets_as_much_time() -> None:
    results = make_results()
    assert [results.rival(entry.name) for entry in results.configurations] == [None, None, None, "28 steps", "11 steps"]


def test_a_clock_of_its_own_takes_the_place_of_the_seconds_alone() -> None:
    results = make_results()
    timed = results.with_seconds({entry.name: (2.0, 2.0) for entry in results.configurations})
    assert timed.speed_up("RALU 4x").estimate == 1.0
    assert timed.with_seconds({entry.name: entry.seconds for entry in results.configurations}) == results


def test_pictures_made_anew_take_their_rows_and_keep_the_clock() -> None:
    results = make_results()
    anew = results.with_seconds({entry.name: (9.0,) for entry in results.configurations})
    scored = with_metric(anew, "judge", {"RALU 4x": Metric(Interval(0.5, 0.4, 0.6), (0.5, 0.5))})
    one = dataclasses.replace(scored, baseline="RALU 4x", configurations=(scored["RALU 4x"],))
    merged = results.with_pictures_of(one)
    assert merged["RALU 4x"].metrics["judge"].samples == (0.5, 0.5)
    assert merged["RALU 4x"].seconds == results["RALU 4x"].seconds
    assert merged["TeaCache"] == results["TeaCache"]
    longer = results["RALU 4x"].seconds * 2
    fresh = dataclasses.replace(one["RALU 4x"], name="RALU 9x", seconds=longer)
    joined = results.with_pictures_of(dataclasses.replace(one, baseline="RALU 9x", configurations=(fresh,)))
    assert joined.configurations[:-1] == results.configurations
    assert joined.speed_up("RALU 9x") == joined.speed_up("RALU 4x")
    assert Results.from_json(joined.to_json()) == joined
    with pytest.raises(ResultsError, match="same prompts"):
        results.with_pictures_of(dataclasses.replace(one, prompts=("a fish",)))


def test_another_baseline_leaves_out_the_likeness_to_the_one_before() -> None:
    alike = {"psnr": Metric(Interval(40.0, 39.0, 41.0))}
    first, *others = make_results().configurations
    results = dataclasses.replace(make_results(), configurations=(dataclasses.replace(first, metrics=alike), *others))
    other = results.with_baseline("11 steps")
    assert other.speed_up("11 steps").estimate == 1.0
    assert "psnr" not in other[first.name].metrics
    assert results.with_baseline(results.baseline) is results


def test_a_metric_of_whole_sets_is_compared_in_pairs_where_it_has_samples() -> None:
    results = make_results()
    whole = {entry.name: Metric(Interval(2.0, 1.0, 3.0)) for entry in results.configurations}
    assert "Frechet vs plain at its time" not in header(with_metric(results, "frechet", whole))
    nearer = {name: Metric(metric.interval, (1.0 + (name == "11 steps"),) * 4) for name, metric in whole.items()}
    table = with_metric(results, "frechet", nearer)
    column = header(table).index("Frechet vs plain at its time")
    assert [row.cells[column] for row in rows(table)][3:] == ["+0.000 [+0.000, +0.000]", "-1.000 [-1.000, -1.000]"]


def test_the_environment_names_the_software_but_no_machine() -> None:
    import platform

    environment = Environment.capture()
    assert environment.cpu and environment.threads >= 1
    assert platform.node() not in str(environment)


def test_losing_is_only_said_of_a_whole_interval() -> None:
    assert verdict(Interval(0.1, 0.05, 0.15)) == "wins"
    assert verdict(Interval(-0.1, -0.15, -0.05)) == "loses"
    assert verdict(Interval(-0.1, -0.25, 0.05)) == "ties"
    assert verdict(None) == ""


def test_every_row_of_the_table_has_a_cell_for_every_column() -> None:
    results = make_results()
    assert {len(row.cells) for row in rows(results)} == {len(header(results))}
    assert markdown(results).count("\n") == len(results.configurations) + 1
    assert rich_table(results, narrow=True).row_count == len(results.configurations)
