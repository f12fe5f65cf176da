"""What `fastdit compare` says of real runs where nothing changed, and of ones with a slowdown that is planted.

Every run is an experiment in a process of its own, as two calls of `fastdit bench` are. In a pair nothing differs, or
the later run's forwards wait for a twentieth of their time, which no stack shows. Exit 1 where a planted slowdown is
not found, or where of unchanged rows more than one in twenty are said to differ.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fastdit.accelerator import Accelerator, Level
from fastdit.bench.compare import changes
from fastdit.bench.experiment import Experiment
from fastdit.bench.protocol import measure
from fastdit.bench.source import Source
from fastdit.bench.store import Store
from fastdit.blocks.chain import Forward, ForwardCall, Pass
from fastdit.config import register
from fastdit.mini.prompts import training
from fastdit.run import Run
from fastdit.stack import Stack
from saving import save

#: What is planted, as a part of a forward's time.
SLOWER = 0.05


@dataclass(frozen=True)
class Waits(Accelerator):
    """Waits after every forward, for a part of what it took that no field tells."""

    level: ClassVar[Level] = Level.ATTENTION
    part: ClassVar[float] = 0.0

    @property
    def neutral(self) -> bool:
        return True

    def enter(self, run: Run, lasting: None) -> Pass:
        return _Waiting()


class _Waiting(Pass):
    def forward(self, call: ForwardCall, next: Forward) -> object:
        start = time.perf_counter()
        output = next(call)
        end = time.perf_counter() + Waits.part * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return output


def run(folder: Path, rounds: int, part: float) -> None:
    """Measure once more what every run measures, in this process, which knows `Waits` from then on."""
    register(Waits)
    Waits.part = part
    experiment = Experiment(
        (Source("mini"),),
        {"stack": Stack([Waits()])},
        tuple(training(4, 0)),
        sizes=((128, 128),),
        steps=(8,),
        rounds=rounds,
        minutes=1e-6,
    )
    store = Store(folder)
    store.begin(experiment, [])
    measure(experiment, store)


def main(
    pairs: Annotated[int, typer.Option(help="Of runs in which nothing changed.")] = 20,
    planted: Annotated[int, typer.Option(help="Pairs with the slowdown.")] = 5,
    rounds: int = 30,
    out: Path = Path("benchmarks/results/nothing-changed.json"),
) -> None:
    """Run pairs, compare them, and save what was said of every row."""
    register(Waits)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(planted + pairs):
            slower = number < planted
            folders = [Path(scratch) / f"{number}-{name}" for name in ("before", "after")]
            for folder, part in zip(folders, (0.0, SLOWER if slower else 0.0), strict=True):
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    pool.submit(run, folder, rounds, part).result()
            for change in changes(*map(Store, folders)):
                found.append({"planted": slower, "row": change.row, "verdict": change.verdict, "time": change.time})
                print(
                    f"{number} {'slower ' if slower else ''}{change.row}: {change.verdict}, {change.time}", flush=True
                )
    said = [
        Counter(one["verdict"] for one in found if one["row"] == "stack" and one["planted"] is asked)
        for asked in (False, True)
    ]
    save(out, {"rounds": rounds, "slower": SLOWER, "unchanged": said[0], "slowed": said[1], "rows": found})
    print(f"of {pairs} unchanged: {dict(said[0])}; of {planted} planted: {dict(said[1])}")
    sys.exit(int(pairs - said[0]["not shown"] > pairs // 20 or said[1]["slower"] < planted))


if __name__ == "__main__":
    typer.run(main)
