"""`--ray`: jobs on a cluster of two workers, one of which is killed at a cell; and what is said without Ray."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastdit.bench.cluster import TRIES, Cluster
from fastdit.bench.experiment import Experiment, Row
from fastdit.bench.grammar import parse_stack
from fastdit.bench.making import opened
from fastdit.bench.matrix import MatrixRun
from fastdit.bench.outcome import outcomes
from fastdit.bench.peers import PEERS
from fastdit.bench.protocol import GroupRun, measure
from fastdit.bench.source import Source
from fastdit.bench.store import BenchError, Store
from fastdit.bench.tune import Goal, Search, Tried, Workbench
from fastdit.bench.workers import Job, Made
from fastdit.cli import app
from fastdit.mini.prompts import training

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install 'fastdit[ray]')")

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "height": 64, "width": 64}
ASKED = {
    "bench": ["bench", "mini", "--stack", "Interval 2"],
    "tune": ["tune", "mini", "--seconds", "2"],
    "matrix": ["matrix", "mini"],
}


@pytest.mark.parametrize("command", ASKED.values(), ids=ASKED)
def test_without_ray_the_command_that_installs_it_is_named_before_anything_is_loaded(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(Source, "load", lambda _: pytest.fail("a pipeline was loaded"))
    done = CliRunner().invoke(app, [*command, "--ray", "auto", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "pip install 'fastdit[ray]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_budget_is_not_searched_on_a_cluster() -> None:
    done = CliRunner().invoke(app, ["tune", "mini", "--budget", "3", "--ray", "auto"])
    assert done.exit_code == 2 and "without --ray" in done.stderr


def experiment(**changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "pipelines": (Source("mini"),),
        "stacks": {"half": parse_stack("Interval 2"), "never": parse_stack("FirstBlockCache 1e-9")},
        "prompts": ("an apple", "two boats"),
        "sizes": ((64, 64),),
        "steps": (4,),
        "rounds": 4,
        "minutes": 1e-6,
    }
    return Experiment(**{**settings, **changes})


class TwoAtOnce:
    """Two workers as jobs see them, who make their cells in this process and note the jobs."""

    count = 2

    def __init__(self) -> None:
        self.jobs: list[list[Job]] = []

    def make(self, folder: Path, jobs: Sequence[Job]) -> Iterator[Made]:
        self.jobs.append(list(jobs))
        for job in jobs:
            make = opened(job.kind, job.common, folder)
            for cell in job.cells:
                make(cell)
                yield Made(cell)


@pytest.mark.exhaustive
def test_workers_get_whole_rounds_as_many_at_once_as_there_are_of_them(tmp_path: Path) -> None:
    made, store, workers = experiment(stacks={"half": parse_stack("Interval 2")}), Store(tmp_path), TwoAtOnce()
    store.begin(made, [])
    measure(made, store, workers=workers)
    (group,) = made.groups()
    assert all(one.rounds == 4 and one.error is None for one in outcomes(made, group, store))
    first = workers.jobs[0]
    assert [{cell["number"] for cell in job.cells} for job in first] == [{0}, {1}]
    assert all({cell["row"]["name"] for cell in job.cells} == {"plain", "half"} for job in first)
    assert all(not job.fresh for jobs in workers.jobs for job in jobs) and len(store.machines()) == 1


def test_rows_of_peers_are_jobs_of_their_own(tmp_path: Path) -> None:
    run = GroupRun(made := experiment(peers=True), next(made.groups()), Store(tmp_path), workers=TwoAtOnce())
    jobs = list(run._jobs(run.rows, 0))
    assert [job.fresh for job in jobs] == [False] + [True] * (len(jobs) - 1)
    assert {job.cells[0]["row"]["peer"] for job in jobs[1:]} == set(PEERS)
    assert {Row.from_json(cell["row"]).name for job in jobs for cell in job.cells} == {row.name for row in run.rows}


@pytest.fixture(scope="module")
def two_workers() -> Iterator[str]:
    """A cluster of two machines, each a raylet of this one, with a core to each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_DISABLE_IMPORT_WARNING", "1")):
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster as Local

        local = Local(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        local.add_node(num_cpus=1, num_gpus=0)
        try:
            yield local.address
        finally:
            local.shutdown()


class Killing(Cluster):
    """Kills a worker amid a cell: at the first one after so many answers, or at every one that a text is a part of."""

    def __init__(self, address: str, *, after: int = 0, every: str | None = None) -> None:
        super().__init__(address)
        self.after, self.every, self.answers = after, every, 0
        self.lost: list[Any] = []

    def _heard(self) -> Any:
        for hand in self._hands:
            if hand.queue is not None and self._doomed(hand.queue.cells[0]):
                while "Worker.cell" not in Path(f"/proc/{hand.process}/cmdline").read_text():
                    pass
                os.kill(hand.process, signal.SIGKILL)
                self.lost.append(hand.queue.cells[0])
                break
        self.answers += 1
        return super()._heard()

    def _doomed(self, cell: Any) -> bool:
        if self.every is not None:
            return self.every in json.dumps(cell)
        return not self.lost and self.answers >= self.after


@pytest.mark.exhaustive
@needs_ray
def test_a_worker_that_is_killed_loses_one_cell_and_the_run_ends_with_all(two_workers: str, tmp_path: Path) -> None:
    made, store = experiment(), Store(tmp_path)
    store.begin(made, [])
    with Killing(two_workers, after=6) as workers:
        assert workers.count == 2
        measure(made, store, workers=workers)
    (group,) = made.groups()
    rows = made.rows(group) + (store.added(group) or [])
    assert len(workers.lost) == 1
    assert all([cell.number for cell in store.cells(group, row)] == [0, 1, 2, 3] for row in made.rows(group))
    assert all(one.error is None for one in outcomes(made, group, store))
    assert all(cell.machine for row in rows for cell in store.cells(group, row))
    assert list(tmp_path.rglob("*.png")) and not [*tmp_path.rglob("*.part")]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    with Cluster(two_workers) as again:
        measure(made, store, workers=again)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == before


@pytest.mark.exhaustive
@needs_ray
def test_a_cell_that_kills_every_worker_is_a_cell_that_fails_and_the_others_go_on(
    two_workers: str, tmp_path: Path
) -> None:
    parts = [next(iter(parse_stack(text))) for text in ("Interval 2", "ToCa first=1", "FirstBlockCache 1e-9")]
    source = Source("mini")
    with Killing(two_workers, every='["ToCa') as workers:
        made = MatrixRun(source.load(), CALL, tmp_path, name="mini").run(parts, workers=workers)
    assert len(made.cells) == 6 and len(workers.lost) == TRIES * 2
    alone = made.cells[(parts[1].describe(),)]
    assert alone.status == "fails" and f"its worker died {TRIES} times" in alone.told
    assert made.cells[(parts[0].describe(),)].status == "exact"  # of two steps it skips none
    assert made.cells[parts[0].describe(), parts[2].describe()].status == "refused"


@pytest.mark.exhaustive
@needs_ray
def test_a_search_makes_its_trials_on_workers_and_knows_them_again(
    two_workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(Source("mini"), training(4, 0), (64, 64), 4)
    monkeypatch.setattr(Workbench, "tried", lambda *_: pytest.fail("a trial was made here"))
    goal = Goal(seconds=60.0)
    with Killing(two_workers) as workers:
        search = Search(bench, goal, tmp_path, workers=workers)
        search.run(5.0, trials=2)
        assert len(search.finished()) == 2 and len(workers.lost) == 1
        kept = [path.stat().st_mtime_ns for path in sorted((tmp_path / "trials").iterdir())]
        found = search._elsewhere([parse_stack(one.stack) for one in search.finished()], ())
        assert all(isinstance(one, Tried) for one in found.values())
        assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "trials").iterdir())] == kept


@pytest.mark.exhaustive
@needs_ray
def test_what_fails_on_a_worker_is_its_rows_and_an_address_without_a_cluster_is_named(
    two_workers: str, tmp_path: Path
) -> None:
    refused = parse_stack("ProgressiveResolution 2x")  # a preset of another family
    made, store = experiment(stacks={"refused": refused}, rounds=3), Store(tmp_path)
    store.begin(made, [])
    with Cluster(two_workers) as workers:
        measure(made, store, workers=workers)
    (group,) = made.groups()
    found = {one.row.name: one for one in outcomes(made, group, store)}
    assert found["plain"].rounds == 3 and "InvalidConfig" in (found["refused"].error or "")
    with pytest.raises(BenchError, match="there is no Ray cluster at 'nowhere"), Cluster("nowhere"):
        pass
