"""How cells are measured: rows are prepared once and take turns, from an idle device to an idle device."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, Any

from fastdit.acceleration import accelerate
from fastdit.bench.experiment import FEWEST_ROUNDS, Experiment, Group, Row
from fastdit.bench.peers import PEERS
from fastdit.bench.store import BenchError, Cell, Store, rival
from fastdit.bench.workers import Job, Processes, Workers
from fastdit.errors import FastditWarning
from fastdit.measure.statistics import Interval, ratio_of_medians
from fastdit.measure.timing import Progress, silent, timed
from fastdit.stack import Stack

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

#: Steps of the plain run that, beside the full one, tells a step's time from what every run costs.
_PROBE_STEPS = 2

#: Rounds after which rivals are chosen.
_RIVALS_AFTER = 2


def measure(experiment: Experiment, store: Store, progress: Progress = silent, workers: Workers | None = None) -> None:
    """Measure everything that the store has not got yet, a group after another; here, or by a cluster's workers."""
    for group in experiment.groups():
        GroupRun(experiment, group, store, progress, workers).run()


class GroupRun:
    """The rows of one group, taking turns until every speed-up is known as well as asked, or the time is up.

    Workers make as many rounds at once as there are of them, each of them all rows of a round, in turns on one machine.
    """

    def __init__(
        self,
        experiment: Experiment,
        group: Group,
        store: Store,
        progress: Progress = silent,
        workers: Workers | None = None,
    ) -> None:
        self.experiment, self.group, self.store, self.progress = experiment, group, store, progress
        self.workers = workers
        self.rows = experiment.rows(group) + (store.added(group) or [])
        self._bench: Bench | None = None

    def run(self) -> None:
        """Run rounds; what is on disk already is not run again."""
        ends = time.monotonic() + 60.0 * self.experiment.minutes
        number = 0
        while number < self.experiment.least_rounds or (time.monotonic() < ends and not self.precise()):
            if number == _RIVALS_AFTER and self.store.added(self.group) is None:
                self._add_rivals()
            numbers = range(number, number + self._at_once(number))
            self._rounds(self.rows, numbers)
            number = numbers.stop
            self.progress(self.group.title, number, max(number, self.experiment.least_rounds))

    def _at_once(self, number: int) -> int:
        """Say how many rounds are run together: no more than are needed in any case, and none before its rivals."""
        goal = _RIVALS_AFTER if number < _RIVALS_AFTER else self.experiment.least_rounds
        most = 1 if self.workers is None else self.workers.count
        return min(most, goal - number) if number < goal else most

    def _rounds(self, rows: Sequence[Row], numbers: Sequence[int]) -> None:
        """Run rounds of the rows that have not had them, each in an order of its own."""
        if self.workers is None:
            for number in numbers:
                for row in self._missing(rows, number):
                    self._cell(row, number)
        else:
            self._elsewhere(self.workers, [job for number in numbers for job in self._jobs(rows, number)])

    def _missing(self, rows: Sequence[Row], number: int) -> list[Row]:
        missing = [row for row in rows if not (self.error(row) or self.store.has(self.group, row, number))]
        random.Random(number).shuffle(missing)
        return missing

    def _cell(self, row: Row, number: int) -> None:
        """Measure a cell. A row that fails says so from then on, and the others go on."""
        if self._apart(row):
            # As many rounds as an interval needs: loading takes its time.
            self._elsewhere(Processes(), [self._job([(row, number + more) for more in range(FEWEST_ROUNDS)], True)])
            return
        try:
            self.bench.cell(row, number)
        except Exception as error:
            # Without the plain run there is nothing to compare with, and a full disk is none of the row's.
            if row is self.rows[0] or isinstance(error, BenchError):
                raise
            self._leave(row, f"{type(error).__name__}: {error}")

    def _apart(self, row: Row) -> bool:
        return self.experiment.isolate or row.peer is not None

    def _jobs(self, rows: Sequence[Row], number: int) -> Iterator[Job]:
        """Give a round as jobs: its rows in turns on one machine, and those apart each in a process of its own."""
        missing = self._missing(rows, number)
        if together := [(row, number) for row in missing if not self._apart(row)]:
            yield self._job(together, False)
        yield from (self._job([(row, number)], True) for row in missing if self._apart(row))

    def _job(self, cells: Sequence[tuple[Row, int]], fresh: bool) -> Job:
        common = {"experiment": self.experiment.to_json(), "group": self.group.key}
        asked = tuple({"row": row.to_json(), "number": number} for row, number in cells)
        return Job("bench", {**common, "elsewhere": self.workers is not None}, asked, fresh)

    def _elsewhere(self, workers: Workers, jobs: Sequence[Job]) -> None:
        """Have jobs done. Raises `BenchError` where the plain run fails."""
        for made in workers.make(self.store.directory, jobs):
            row = Row.from_json(made.cell["row"])
            if made.error is None:
                continue
            if row == self.rows[0]:
                raise BenchError(f"the plain pipeline can't be run: {made.error}")
            self._leave(row, made.error)

    def _leave(self, row: Row, told: str) -> None:
        self.store.keep_row(self.group, row, {"error": told})

    def error(self, row: Row) -> str | None:
        """Say why a row was left; None where it was not."""
        return (self.store.prepared(self.group, row) or {}).get("error")

    @property
    def bench(self) -> Bench:
        """The group's pipeline, loaded when the first cell needs it."""
        if self._bench is None:
            self._bench = Bench(self.experiment, self.group, self.store)
        return self._bench

    def seconds(self, row: Row) -> list[float]:
        """Give what a row's rounds took so far."""
        return [cell.seconds for cell in self.store.cells(self.group, row)]

    def precise(self) -> bool:
        """Whether every stack's speed-up is known as well as asked."""
        stacks = [row for row in self.rows if not row.plain and self.error(row) is None]
        return all(
            found is not None and found.spread <= self.experiment.precision * found.estimate
            for found in map(self.speed_up, stacks)
        )

    def speed_up(self, row: Row) -> Interval | None:
        """Give how many times faster than the plain pipeline a row is, over the rounds that both have had."""
        base, own = self.seconds(self.rows[0]), self.seconds(row)
        common = min(len(base), len(own))
        return ratio_of_medians(base[:common], own[:common]) if common >= FEWEST_ROUNDS else None

    def _add_rivals(self) -> None:
        """Add, for every stack, the plain run of fewest steps that does not take less time, and give it its rounds.

        A run's time is affine in its steps: a short one and the full one tell of all. Where the run that is found takes
        less time than its stack all the same, one of a step more is added.
        """
        full, short = self.rows[0], rival(_PROBE_STEPS)
        self._rounds([short], range(_RIVALS_AFTER))
        steps = (self.store.prepared(self.group, full) or {})["steps"]
        slow, quick = (median(self.seconds(row)) for row in (full, short))
        if steps <= _PROBE_STEPS or slow <= quick:
            self.store.keep_added(self.group, [])
            return
        each = (slow - quick) / (steps - _PROBE_STEPS)
        goals = [median(self.seconds(row)) for row in self.rows if not row.plain and self.error(row) is None]
        counts = {goal: min(max(ceil(_PROBE_STEPS + (goal - quick) / each - 0.01), 1), steps) for goal in goals}
        added = [rival(count) for count in sorted({*counts.values()} - {full.steps})]
        self._rounds(added, range(_RIVALS_AFTER))
        took = {row.steps: median(self.seconds(row)) for row in (*added, full)}
        quicker = {count + 1 for goal, count in counts.items() if took.get(count, goal) < goal} - {*counts.values()}
        added += [rival(count) for count in sorted(quicker) if count < steps]
        self.store.keep_added(self.group, added)
        self.rows = [*self.rows, *added]
        self._rounds(added, range(_RIVALS_AFTER))


@dataclass
class Prepared:
    """What makes a row's pictures, and the FLOPs that stand for each of its rounds where no record tells them."""

    pipeline: Any
    flops: int | None


class Bench:
    """A group's pipeline in this process."""

    def __init__(self, experiment: Experiment, group: Group, store: Store) -> None:
        self.experiment, self.group, self.store = experiment, group, store
        start = time.perf_counter()
        self.pipeline = group.source.load()
        self.load_seconds = time.perf_counter() - start
        self.machine: str | None = None
        self._prepared: dict[str, Prepared] = {}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.pipeline._execution_device
        return device

    def cell(self, row: Row, number: int) -> None:
        """Measure one cell and keep it."""
        prepared = self._prepare(row)
        self._forget_peak()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastditWarning)  # they are among the row's notes
            seconds, images = timed(lambda number: self._call(prepared.pipeline, row, number), number, self.device)
        record = None if row.stack is None else prepared.pipeline.fastdit.last_run.to_json()
        # A picture that comes again is the same one, and would only seem to be a further sample.
        pictured = number < self.experiment.rounds_of_pictures
        cell = Cell(
            number,
            *self.experiment.inputs(number),
            seconds,
            prepared.flops if record is None else record["flops"],
            self._peak(),
            record,
            [f"{number:04}-{index}.png" for index in range(len(images))] if pictured else [],
            self.machine,
        )
        self.store.keep(self.group, row, cell, images if pictured else [])

    def _prepare(self, row: Row) -> Prepared:
        """Open a row once: its twin, its engines, its first call; keep what each took."""
        if row.name in self._prepared:
            return self._prepared[row.name]
        start = time.perf_counter()
        pipeline = self._open(row)
        built = time.perf_counter()
        # The untouched pipeline tells nothing of itself: an empty stack over it runs the same steps.
        recorder = accelerate(self.pipeline, Stack()) if row.plain else pipeline
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self._call(recorder, row, 0)
        found: dict[str, Any] = {
            "seconds": {"load": self.load_seconds, "build": built - start, "first": time.perf_counter() - built},
            "notes": sorted({str(one.message) for one in said if isinstance(one.message, FastditWarning)}),
        }
        flops = None
        if row.peer is None:
            record = recorder.fastdit.last_run
            found["steps"] = record.steps[-1].step + 1
            flops = record.flops
        self.store.keep_row(self.group, row, found)
        self._prepared[row.name] = Prepared(pipeline, flops if row.plain else None)
        return self._prepared[row.name]

    def _open(self, row: Row) -> Any:
        """Give what makes a row's pictures, its engines built."""
        if row.peer is not None:
            PEERS[row.peer](self.pipeline)
        if row.stack is None:
            return self.pipeline
        twin = accelerate(self.pipeline, row.stack)
        if row.stack.engine is not None:
            height, width = self.group.size or (None, None)
            twin.fastdit.warmup(height, width, num_inference_steps=row.steps, progress=False)
        return twin

    def _call(self, pipeline: Any, row: Row, number: int) -> list[Image]:
        import torch

        prompts, seeds = self.experiment.inputs(number)
        call = dict(self.experiment.call)
        if self.group.size is not None:
            call |= {"height": self.group.size[0], "width": self.group.size[1]}
        if row.steps is not None:
            call["num_inference_steps"] = row.steps
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images: list[Image] = pipeline(prompt=prompts, generator=generators, output_type="pil", **call).images
        return images

    def _forget_peak(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
