"""What makes the cells of a job in another process: of experiments, of matrices, and the trials of a search.

A maker is opened once for many cells, so that a pipeline is loaded and engines are built once, and leaves what a
finished cell is made of as files in a folder. `python -m fastdit.bench.making FOLDER` reads a job from its input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from fastdit.bench.experiment import Experiment, Row
from fastdit.bench.matrix import MatrixRun
from fastdit.bench.protocol import Bench
from fastdit.bench.source import Source
from fastdit.bench.store import Store
from fastdit.bench.tune import Trials
from fastdit.bench.workers import Plain
from fastdit.measure.environment import Environment
from fastdit.stack import Stack

#: Makes one cell, as it is asked for.
Maker = Callable[[Plain], None]


def _cells(common: Plain, folder: Path) -> Maker:
    experiment, store = Experiment.from_json(common["experiment"]), Store(folder)
    group = next(group for group in experiment.groups() if group.key == common["group"])
    bench = Bench(experiment, group, store)
    if common["elsewhere"]:
        bench.machine = str(Environment.capture(str(bench.device)))

    def make(cell: Plain) -> None:
        row = Row.from_json(cell["row"])
        if not store.has(group, row, cell["number"]):
            bench.cell(row, cell["number"])

    return make


def _matrix(common: Plain, folder: Path) -> Maker:
    run = MatrixRun(
        Source(common["pipeline"]).load(), common["call"], folder, rounds=common["rounds"], name=common["pipeline"]
    )

    def make(cell: Plain) -> None:
        parts = [part for one in cell["parts"] for part in Stack.from_json(one)]
        run.cell(parts)

    return make


def _trials(common: Plain, folder: Path) -> Maker:
    return Trials.from_json(common, folder).make


KINDS: dict[str, Callable[[Plain, Path], Maker]] = {"bench": _cells, "matrix": _matrix, "trial": _trials}
"""What opens a maker, by the kind of its jobs."""


def opened(kind: str, common: Plain, folder: Path) -> Maker:
    """Open what makes a job's cells, which leaves their files in a folder."""
    return KINDS[kind](common, folder)


def _main() -> None:
    job = json.load(sys.stdin)
    make = opened(job["kind"], job["common"], Path(sys.argv[1]))
    for cell in job["cells"]:
        make(cell)


if __name__ == "__main__":
    _main()
