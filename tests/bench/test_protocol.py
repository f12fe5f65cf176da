"""A whole experiment on the embedded pipeline: its cells, that it goes on where it was stopped, what it shows."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdit import InvalidConfig, Stack
from fastdit.bench.experiment import Experiment
from fastdit.bench.grammar import parse_stack
from fastdit.bench.outcome import outcomes, results
from fastdit.bench.peers import PEERS
from fastdit.bench.protocol import measure
from fastdit.bench.source import Source
from fastdit.bench.store import BenchError, Store
from fastdit.measure.report import render_report
from fastdit.mini.prompts import held_out

MINI = Source("mini")


def experiment(**changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "pipelines": (MINI,),
        "stacks": {"half": parse_stack("Interval 2"), "never": parse_stack("FirstBlockCache 1e-9")},
        "prompts": ("an apple", "two boats"),
        "sizes": ((64, 64),),
        "steps": (8,),
        "minutes": 1e-6,
    }
    return Experiment(**{**settings, **changes})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Store]:
    made, store = experiment(prompts=tuple(held_out(2, 0))), Store(tmp_path_factory.mktemp("bench"))
    store.begin(made, ["fastdit", "bench"])
    measure(made, store)
    return made, store


def test_every_row_has_its_rounds_and_a_rival_that_takes_as_long(measured: tuple[Experiment, Store]) -> None:
    made, store = measured
    (group,) = made.groups()
    found = outcomes(made, group, store)
    assert [one.row.name for one in found[:3]] == ["plain", "half", "never"]
    assert all(one.rounds >= 3 and one.error is None for one in found)
    assert found[0].speed_up is None and found[0].status() == "baseline"
    assert all(one.row.name.startswith("plain, ") for one in found[3:])
    assert store.added(group) == [one.row for one in found[3:]]  # none where a stack takes as long as the full run
    half = found[1]
    assert half.flops is not None and found[0].flops is not None and half.flops < 0.7 * found[0].flops
    assert set(half.metrics) == {"psnr", "ssim", "judge", "sharpness"} and "psnr" not in found[0].metrics
    assert any("FirstBlockCache" in note for note in found[2].notes)
    assert found[2].metrics["ssim"].interval.low == pytest.approx(1.0, abs=1e-3)
    assert set(half.phases) == {"load", "build", "first"}


def test_what_was_measured_is_a_page_with_its_rows_steps_and_pictures(measured: tuple[Experiment, Store]) -> None:
    made, store = measured
    (group,) = made.groups()
    shown = results(made, group, store, outcomes(made, group, store))
    assert shown.baseline == "plain" and {"half", "never"} < {entry.name for entry in shown.configurations}
    page = render_report(shown, store.directory)
    assert page.count("data:image/png") >= 6 and "half" in page and "8 steps" in page


def test_every_sample_is_a_row_of_a_parquet_file(
    measured: tuple[Experiment, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow.parquet import read_table

    _, store = measured
    rows = read_table(store.write_samples()).to_pylist()
    assert len(rows) == len(list(store.directory.rglob("*.jsonl"))) - _probes(store)
    assert {"group", "row", "round", "seconds", "flops", "bytes", "prompts", "seeds"} == set(rows[0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BenchError, match="pip install 'fastdit"):
        store.write_samples()


def _probes(store: Store) -> int:
    """Count the cells of the short run that rivals were chosen by, which is no row."""
    experiment = store.experiment()
    (group,) = experiment.groups()
    named = {group.row_key(row) for row in [*experiment.rows(group), *(store.added(group) or [])]}
    return sum(path.parent.name not in named for path in store.directory.rglob("*.jsonl"))


def test_a_finished_experiment_is_not_run_again(measured: tuple[Experiment, Store]) -> None:
    made, store = measured
    before = {path: path.stat().st_mtime_ns for path in store.directory.rglob("*.jsonl")}
    store.begin(made, ["fastdit", "bench"])
    measure(made, store)
    assert {path: path.stat().st_mtime_ns for path in store.directory.rglob("*.jsonl")} == before


def test_a_cell_that_is_missing_is_run_and_no_other(measured: tuple[Experiment, Store], tmp_path: Path) -> None:
    made, whole = measured
    store = Store(tmp_path / "copy")
    shutil.copytree(whole.directory, store.directory)
    cells = sorted(store.directory.rglob("*.jsonl"))
    next(path for path in cells if path.parent.name.startswith("half")).unlink()
    times = {path: path.stat().st_mtime_ns for path in cells if path.exists()}
    measure(made, store)
    assert sorted(store.directory.rglob("*.jsonl")) == cells
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_another_experiment_is_refused_where_one_is_kept(measured: tuple[Experiment, Store]) -> None:
    made, store = measured
    with pytest.raises(BenchError, match="holds another experiment"):
        store.begin(experiment(seeds=(1,)), [])
    assert store.experiment() == made


def test_a_folder_that_can_t_be_written_is_one_error_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BenchError, match="can't be written"):
        Store(tmp_path / "taken" / "below").begin(experiment(), [])


def test_a_row_that_fails_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    refused = parse_stack("ProgressiveResolution 2x")  # a preset of another family
    made, store = experiment(stacks={"refused": refused, "half": parse_stack("Interval 2")}), Store(tmp_path)
    store.begin(made, [])
    measure(made, store)
    (group,) = made.groups()
    found = {one.row.name: one for one in outcomes(made, group, store)}
    assert found["refused"].status() == "failed" and "InvalidConfig" in (found["refused"].error or "")
    assert found["half"].rounds >= 3


@pytest.mark.exhaustive
def test_peers_run_in_processes_of_their_own_and_leave_the_others_alone(tmp_path: Path) -> None:
    made, store = experiment(stacks={"half": parse_stack("Interval 2")}, peers=True), Store(tmp_path)
    store.begin(made, [])
    measure(made, store)
    (group,) = made.groups()
    found = {one.row.name: one for one in outcomes(made, group, store)}
    assert set(PEERS) <= set(found)
    for name in ("diffusers FirstBlockCache", "diffusers TaylorSeer"):
        assert found[name].error is None and found[name].rounds >= 3 and found[name].metrics["psnr"].interval.low > 5


@pytest.mark.exhaustive
def test_every_resume_after_a_kill_ends_with_the_same_cells(tmp_path: Path) -> None:
    made = experiment(stacks={"half": parse_stack("Interval 2")})
    folder = tmp_path / "kept"

    def measured(begun: Any) -> None:
        (store := Store(folder)).begin(made, [])
        begun.set()
        measure(made, store)

    random, processes = np.random.default_rng(0), multiprocessing.get_context("fork")
    for _ in range(20):
        process = processes.Process(target=measured, args=(begun := processes.Event(),))
        process.start()
        assert begun.wait(60)
        time.sleep(random.uniform(0.0, 6.0))
        process.kill()
        process.join()
    store = Store(folder)
    measure(made, store)
    (group,) = made.groups()
    rows = made.rows(group) + (store.added(group) or [])
    assert all([cell.number for cell in store.cells(group, row)] == [0, 1, 2] for row in rows)
    assert not [path for path in folder.rglob("*.jsonl") if not json.loads(path.read_text())["seconds"] > 0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stacks": {}}, "at least one of its stacks"),
        ({"prompts": ()}, "at least one of its prompts"),
        ({"prompts": ("",)}, "prompts"),
        ({"sizes": ((100, 64),)}, "multiples of 8"),
        ({"sizes": ((64,),)}, "sizes"),
        ({"sizes": ((80, 80),), "stacks": {"two": parse_stack("ProgressiveResolution 4x")}}, "two can't make pictures"),
        ({"batch": 3}, "no whole calls"),
        ({"rounds": 1}, "rounds"),
        ({"stacks": {"plain": Stack()}}, "called plain"),
        ({"prompts": ("one",), "ssim_floor": 0.9}, "floor"),
        ({"precision": "2%"}, "precision"),
    ],
)
def test_an_experiment_that_can_t_be_run_is_refused_when_it_is_made(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfig, match=told):
        experiment(**changes)


@pytest.mark.parametrize("name", ["mini:sd4", "no such folder", "/tmp", "a/b/c", ""])
def test_a_pipeline_s_name_that_can_be_none_is_refused_before_anything_is_loaded(name: str) -> None:
    with pytest.raises(InvalidConfig):
        Source(name)


def test_an_experiment_survives_json() -> None:
    made = experiment(seeds=(3, 4), batch=2)
    assert Experiment.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert dataclasses.replace(made, seeds=(3, 5)) != made


def test_a_round_s_prompts_and_seeds_come_again_after_the_last_picture() -> None:
    made = experiment(seeds=(0, 7))
    assert [made.inputs(number) for number in range(5)] == [
        (["an apple"], [0]),
        (["two boats"], [1]),
        (["an apple"], [14]),
        (["two boats"], [15]),
        (["an apple"], [0]),
    ]
