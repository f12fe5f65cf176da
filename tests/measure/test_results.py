"""What results say of each other, and the table that shows it."""

from __future__ import annotations

import dataclasses
import json
import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fastdit.measure.environment import Environment
from fastdit.measure.results import Metric, ResultsError
from fastdit.measure.statistics import Interval
from fastdit.measure.table import header, rich_table, rows, verdict
from tests.measure.samples import make_results, with_metric


def test_the_file_tells_other_readers_the_speed_ups(tmp_path: Path) -> None:
    derived = json.loads(make_results().dumps())["derived"]
    assert derived["RALU 4x"]["speed_up"]["estimate"] == pytest.approx(4.3, rel=0.1)


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


def test_the_rival_is_the_fastest_plain_run_that_gets_as_much_time_and_at_most_a_tenth_more() -> None:
    results = make_results()
    assert [results.rival(entry.name) for entry in results.configurations] == [None, None, None, None, "11 steps"]
    column = header(results).index("judge vs plain at its time")
    cells = [row.cells[column] for row in rows(results)]
    assert cells[:4] == ["-"] * 4
    assert cells[4].endswith(f" vs 11 steps ({results['11 steps'].median_seconds:.3f} s)")


def test_a_metric_of_whole_sets_is_compared_in_pairs_where_it_has_samples() -> None:
    results = make_results()
    whole = {entry.name: Metric(Interval(2.0, 1.0, 3.0)) for entry in results.configurations}
    assert "Frechet vs plain at its time" not in header(with_metric(results, "frechet", whole))
    nearer = {name: Metric(metric.interval, (1.0 + (name == "11 steps"),) * 4) for name, metric in whole.items()}
    table = with_metric(results, "frechet", nearer)
    column = header(table).index("Frechet vs plain at its time")
    assert [row.cells[column] for row in rows(table)][3:] == ["-", "-1.000 [-1.000, -1.000]"]


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
    assert rich_table(results, narrow=True).row_count == len(results.configurations)
    written = StringIO()
    Console(width=80, file=written).print(rich_table(results, narrow=True))
    assert "…" not in written.getvalue() and all(
        title in written.getvalue() for title in ("s/image", "speed-up", "PSNR dB")
    )


def test_where_flops_can_t_be_counted_the_table_has_none_and_the_rest_stands() -> None:
    results = make_results()
    uncounted = tuple(dataclasses.replace(entry, flops=()) for entry in results.configurations)
    shown = dataclasses.replace(results, configurations=uncounted)
    column = header(shown).index("fewer FLOPs")
    assert {row.cells[column] for row in rows(shown)} == {"-"}
    assert json.loads(shown.dumps())["derived"]["RALU 4x"]["flops_ratio"] is None
