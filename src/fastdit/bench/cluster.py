"""Jobs on a Ray cluster: a worker with a GPU of its own where there are any, else one on each machine with its cores.

A worker gives each finished cell's files back, and they are put into the results' folder here, so that no folder need
be shared. A worker that dies loses the cell that it was at; another one takes up its job there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import fastdit
from fastdit.bench.store import BenchError, write_whole
from fastdit.bench.workers import Job, Made, Plain, Workers
from fastdit.errors import InvalidConfig

#: How often a cell is tried whose worker died.
TRIES = 3

#: Seconds in which a cluster must give a first worker.
PATIENCE = 120.0


def ray() -> Any:
    """Import Ray. Raises `InvalidConfig` with the command that installs it."""
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        raise InvalidConfig("a cluster needs Ray, which is not installed; run: pip install 'fastdit[ray]'") from error


def workers_at(address: str | None) -> AbstractContextManager[Workers | None]:
    """Give the workers of a cluster, to be entered; none without an address. Raises as `ray` and `Cluster` do."""
    return nullcontext() if address is None else Cluster(address)


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


class Worker:
    """What runs on a cluster: makes cells in a folder of its own, and gives their files."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fastdit-cells-")
        self._opened: tuple[str, Any] | None = None

    def about(self) -> tuple[str, int]:
        """Say which fastdit is installed here, and which process this is."""
        return fastdit.__version__, os.getpid()

    def cell(self, kind: str, common: Plain, cell: Plain) -> dict[str, bytes] | str:
        """Make a cell; give its files by their paths, in the order in which they were written, or the error."""
        from fastdit.bench.making import opened

        folder, key = Path(self._folder.name), json.dumps([kind, common], sort_keys=True)
        try:
            if self._opened is None or self._opened[0] != key:
                self._opened = None
                self._opened = key, opened(kind, common, folder)
            self._opened[1](cell)
        except Exception as error:  # whatever a model or a compiler raises is the cell's, and told as such
            return f"{type(error).__name__}: {error}"
        written = sorted(
            (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns
        )
        files = {str(path.relative_to(folder)): path.read_bytes() for path in written}
        for path in written:
            path.unlink()
        return files


@dataclass(frozen=True)
class Place:
    """Where a worker runs: a machine of the cluster, and what it has there."""

    node: str
    cores: int
    gpus: int


@dataclass
class _Queue:
    """What is left of a job, and how often its first cell was tried."""

    job: Job
    cells: deque[Plain]
    tried: int = 0


@dataclass
class _Hand:
    """A worker and what it is at: `doing` is what Ray will answer, `queue` the job; without one it is starting."""

    place: Place
    actor: Any
    doing: Any
    queue: _Queue | None = None
    used: bool = False
    process: int = 0


class Cluster:
    """Workers of a Ray cluster, while it is entered. `address` is Ray's: "auto", "10.0.0.1:6379", or "local".

    Raises `InvalidConfig` without Ray, and when it is entered `BenchError` where there is no such cluster.
    """

    def __init__(self, address: str) -> None:
        self._ray, self._address = ray(), address
        self._hands: list[_Hand] = []

    def __enter__(self) -> Cluster:
        options: dict[str, Any] = {"include_dashboard": False} if self._address == "local" else {}
        try:
            self._ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            told = str(error).strip().splitlines()
            raise BenchError(f"there is no Ray cluster at {self._address!r}: {told[0] if told else error!r}") from error
        self._hands = [self._started(place) for place in self.places()]
        if not self._hands:
            self._ray.shutdown()
            raise BenchError(f"the Ray cluster at {self._address!r} has no machine with cores to run on")
        return self

    def __exit__(self, *_: object) -> None:
        self._hands = []
        self._ray.shutdown()

    @property
    def count(self) -> int:
        """How many jobs are done at once."""
        return max(len(self._hands), 1)

    def places(self) -> list[Place]:
        """Find where workers can run: one for each GPU, or without any one for each machine."""
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        own = [(node["NodeID"], node["Resources"]) for node in nodes]
        with_gpus = [
            Place(name, max(int(has["CPU"] // has["GPU"]), 1), 1)
            for name, has in own
            for _ in range(int(has.get("GPU", 0)))
        ]
        return with_gpus or [Place(name, int(has["CPU"]), 0) for name, has in own]

    def make(self, folder: Path, jobs: Sequence[Job]) -> Iterator[Made]:
        """Do jobs, as many at once as there are workers; cells of dead workers are tried again elsewhere."""
        waiting = deque(_Queue(job, deque(job.cells)) for job in jobs if job.cells)
        try:
            # Ray prints that a worker died, where a command prints its results.
            with redirect_stdout(sys.stderr):
                while waiting or any(hand.queue for hand in self._hands):
                    self._hand_out(waiting)
                    hand = self._heard()
                    yield from self._answered(hand, folder, waiting)
        finally:
            for hand in [hand for hand in self._hands if hand.queue is not None]:
                self._renew(hand)

    def _hand_out(self, waiting: deque[_Queue]) -> None:
        """Give every idle worker a job, and those that have one its next cell."""
        for hand in list(self._hands):
            if hand.doing is not None or not (hand.queue or waiting):
                continue
            if hand.queue is None and waiting[0].job.fresh and hand.used:
                self._renew(hand)
                continue
            queue = hand.queue or waiting.popleft()
            job = queue.job
            hand.queue, hand.used, queue.tried = queue, True, queue.tried + 1
            hand.doing = hand.actor.cell.remote(job.kind, job.common, queue.cells[0])

    def _heard(self) -> _Hand:
        """Wait for a worker's answer. Raises `BenchError` where none is left, or none comes up."""
        doing = {hand.doing: hand for hand in self._hands if hand.doing is not None}
        if not doing:
            raise BenchError("every worker of the cluster is gone; what was finished is kept, and the same goes on")
        starting = all(hand.queue is None for hand in doing.values())
        ready, _ = self._ray.wait(list(doing), num_returns=1, timeout=PATIENCE if starting else None)
        if not ready:
            raise BenchError(
                f"the cluster gave no worker in {PATIENCE:.0f} s: something else has its GPUs or cores (see `ray "
                "status`); what was finished is kept"
            )
        return doing[ready[0]]

    def _answered(self, hand: _Hand, folder: Path, waiting: deque[_Queue]) -> Iterator[Made]:
        """Take a worker's answer: that it is up, a cell's files or error, or that it died."""
        queue, doing = hand.queue, hand.doing
        try:
            answer = self._ray.get(doing)
        except self._ray.exceptions.RayActorError as error:
            self._renew(hand)
            if queue is not None:
                yield from self._lost(queue, str(error), waiting)
            return
        hand.doing = None
        if queue is None:
            version, hand.process = answer
            self._check_version(version)
            return
        if not isinstance(answer, str):
            for path, content in answer.items():
                write_whole(partial(_write, content), folder / path)
        yield Made(queue.cells.popleft(), answer if isinstance(answer, str) else None)
        queue.tried = 0
        if not queue.cells:
            hand.queue = None
            if queue.job.fresh:
                self._renew(hand)

    def _lost(self, queue: _Queue, told: str, waiting: deque[_Queue]) -> Iterator[Made]:
        """Have a dead worker's job taken up at the cell that was lost, unless that was tried often enough."""
        if queue.tried >= TRIES:
            last = told.strip().splitlines()[0]
            yield Made(queue.cells.popleft(), f"its worker died {queue.tried} times: {last}", died=True)
            queue.tried = 0
        if queue.cells:
            waiting.appendleft(queue)

    def _check_version(self, theirs: str) -> None:
        if theirs != fastdit.__version__:
            raise BenchError(
                f"a worker of the cluster has fastdit {theirs}, and this is {fastdit.__version__}; install the same on "
                "all machines"
            )

    def _renew(self, hand: _Hand) -> None:
        """Put a new worker in the place of one, if its machine is still there."""
        self._ray.kill(hand.actor)
        self._hands.remove(hand)
        if any(place.node == hand.place.node for place in self.places()):
            self._hands.append(self._started(hand.place))

    def _started(self, place: Place) -> _Hand:
        strategies = import_module("ray.util.scheduling_strategies")
        made = self._ray.remote(Worker).options(
            num_cpus=place.cores,
            num_gpus=place.gpus,
            scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(place.node, soft=False),
        )
        actor = made.remote()
        return _Hand(place, actor, actor.about.remote())
