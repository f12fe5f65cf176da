"""Comparing two runs: a planted slowdown is found, and where nothing changed that is hardly ever said to have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastdit.bench.compare import changes, differs, remarks
from fastdit.bench.experiment import Experiment, Row
from fastdit.bench.grammar import parse_stack
from fastdit.bench.outcome import RowOutcome
from fastdit.bench.source import Source
from fastdit.bench.store import BenchError, Cell, Store
from fastdit.cli import app
from fastdit.measure.statistics import Interval


def drawn(random: np.random.Generator, rounds: int, factor: float = 1.0) -> list[float]:
    """Seconds as a busy machine gives them: noise of 1 % with now and then a long one."""
    noise = np.exp(random.normal(0.0, 0.01, rounds)) * np.where(random.random(rounds) < 0.1, 1.5, 1.0)
    return (factor * noise).tolist()


@pytest.mark.parametrize("rounds", [4, 6, 12])
def test_where_nothing_changed_a_difference_is_said_in_at_most_five_of_a_hundred(rounds: int) -> None:
    random = np.random.default_rng(rounds)
    said = sum(differs(drawn(random, rounds), drawn(random, rounds)) for _ in range(200))
    assert said <= 16  # ten are expected at most; above 16 the level is missed with certainty


def test_a_planted_slowdown_of_a_twentieth_is_found() -> None:
    random = np.random.default_rng(0)
    assert sum(differs(drawn(random, 12, 1.05), drawn(random, 12)) for _ in range(100)) >= 95


def measured(folder: Path, factor: Callable[[bool, str, int], float], grown: float = 1.0) -> tuple[Store, Store]:
    """The same experiment twice, with noise of 1 %, factors by run, row and round, and growth of the later memory."""
    experiment = Experiment((Source("mini"),), {"half": parse_stack("Interval 2")}, ("an apple",))
    random = np.random.default_rng(0)
    made = []
    for name in ("before", "after"):
        store, later = Store(folder / name), name == "after"
        store.begin(experiment, [])
        (group,) = experiment.groups()
        for row in experiment.rows(group):
            used = int(1000 * (grown if later and row.name == "half" else 1.0))
            for number, seconds in enumerate(drawn(random, 12)):
                took = factor(later, row.name, number) * seconds
                store.keep(group, row, Cell(number, ["an apple"], [0], took, 1, used, None, []), [])
        made.append(store)
    return made[0], made[1]


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Store, Store]:
    """The same experiment twice, the later one's stack 5 % slower and with more memory."""
    return measured(tmp_path, lambda later, row, number: 1.05 if later and row == "half" else 1.0, grown=1.05)


def test_a_row_that_became_slower_is_told_and_ends_the_command_with_1(stores: tuple[Store, Store]) -> None:
    before, after = stores
    assert {change.row: change.verdict for change in changes(before, after)} == {"plain": "reference", "half": "slower"}
    assert {change.verdict for change in changes(after, before)} == {"reference", "faster"}
    done = CliRunner().invoke(app, ["compare", str(before.directory), str(after.directory)])
    assert done.exit_code == 1 and "slower" in done.output and "1 of 2 rows became worse" in done.output
    again = CliRunner().invoke(app, ["compare", str(after.directory), str(before.directory)])
    assert again.exit_code == 0 and "nothing was shown to be worse" in again.output


def test_what_is_tolerated_is_no_change_but_memory_is_looked_at_by_itself(stores: tuple[Store, Store]) -> None:
    assert {change.verdict for change in changes(*stores, time=0.1)} == {"reference", "more memory"}
    assert {change.verdict for change in changes(*stores, time=0.1, memory=0.1)} == {"reference", "not shown"}


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Store, Store]:
    """The same experiment twice, the later one on a machine that is slower by a fifth, and more and more so."""
    return measured(tmp_path, lambda later, row, number: 1.2 + 0.01 * number if later else 1.0)


def test_a_slower_machine_makes_no_row_slower_unless_seconds_are_asked_for(machines: tuple[Store, Store]) -> None:
    found = {change.row: change for change in changes(*machines)}
    assert {row: change.verdict for row, change in found.items()} == {"plain": "reference", "half": "not shown"}
    assert "took 1.2" in next(remarks([*found.values()]))
    assert found["plain"].time.estimate > 1.2 and found["half"].time.estimate == pytest.approx(1.0, abs=0.05)
    assert {change.verdict for change in changes(*machines, absolute=True)} == {"slower"}
    done = CliRunner().invoke(app, ["compare", *(str(store.directory) for store in machines)])
    assert done.exit_code == 0 and "by which the others' times are measured" in done.output


def test_two_experiments_are_refused(stores: tuple[Store, Store], tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    other.begin(Experiment((Source("mini"),), {"half": parse_stack("Interval 3")}, ("an apple",)), [])
    with pytest.raises(BenchError, match="different experiments"):
        changes(stores[0], other)
    shutil.rmtree(other.directory)
    assert CliRunner().invoke(app, ["compare", str(stores[0].directory), str(other.directory)]).exit_code == 2


@pytest.mark.parametrize(
    ("speed_up", "status"),
    [
        (Interval(1.5, 1.4, 1.6), "faster"),
        (Interval(0.8, 0.75, 0.85), "slower"),
        (Interval(1.1, 0.9, 1.3), "not shown"),
        (Interval(1.12, 1.12, 1.73), "not shown"),  # too noisy, as the table has it
    ],
)
def test_a_row_is_called_faster_only_where_the_table_prints_how_much(speed_up: Interval, status: str) -> None:
    row = RowOutcome(Row("half", None, 4), 3, 1.0, speed_up, None, None, None, None, {}, {}, (), None)
    assert row.status() == status
