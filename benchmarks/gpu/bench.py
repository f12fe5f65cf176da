"""Rows prepared and run in turns on one device, within a time that nothing overruns."""

from __future__ import annotations

import gc
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch

from fastdit.acceleration import accelerate
from fastdit.measure.timing import wait_for
from fastdit.record import RunRecord, Stopwatch
from fastdit.stack import Stack
from gpu.rows import Row, Stage, plain
from published import Published

#: How far from the plain run's latents a row may be that should give them, relative to their size.
SAME = 0.05

#: The part of the time left that one row may take, and the part of all time in which new rows are begun.
SHARE, BEGINNING = 0.25, 0.6


class TimeUp(BaseException):
    """The time for something is over. No `Exception`, which a compiler would take for a failure of its own."""


class DeviceLost(RuntimeError):
    """The device answers no more in this process, as after an illegal access to its memory."""


class Bench:
    """One model on one device: prepares rows and runs them until `deadline`, a value of `time.monotonic`."""

    def __init__(self, model: Published, device: str, dtype: torch.dtype, deadline: float) -> None:
        self.device, self.deadline, self._model = torch.device(device), deadline, model
        self._began = time.monotonic()
        self.pipeline = model.build(device, dtype)
        self.weights_bytes = self._allocated()
        self._plain: dict[int, torch.Tensor] = {}

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def begins(self) -> bool:
        """Whether rows are still begun, before the others get all their rounds."""
        return time.monotonic() < self._began + BEGINNING * (self.deadline - self._began)

    def prepare(self, row: Row) -> None:
        """Make a row's twin, build its engines, check its latents, run it once, and see what its steps wait for."""

        def act() -> None:
            start, held = time.monotonic(), self._allocated()
            row.pipeline = self.pipeline
            if row.make is not None:
                stack = Stack(row.make())
                row.stack, row.pipeline = stack.to_json(), accelerate(self.pipeline, stack)
                if stack.engine is not None:
                    call = self._model.call(self.pipeline, batch=row.batch)
                    row.pipeline.fastdit.warmup(num_inference_steps=row.steps, progress=False, **call)
            self._check(row)
            row.prepared = time.monotonic() - start
            release(self.device)
            row.held_bytes = self._allocated() - held
            self._timed(row)
            row.stages = self._watched(row)

        self._attempt(row, act, self.left if row.plain else SHARE * self.left)

    def time(self, row: Row) -> None:
        """Run a row once more. One that finds no time left keeps what it has."""
        self._attempt(row, partial(self._timed, row), self.left)

    def _timed(self, row: Row) -> None:
        before = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        wait_for(self.device)
        clock = Stopwatch(self.device)
        self._run(row, row.steps)
        clock.stop()
        row.seconds.append(clock.seconds)
        if self.device.type == "cuda":
            # What other rows keep for themselves, such as the memory of their graphs, is not this row's.
            needed = torch.cuda.max_memory_allocated(self.device) - before + self.weights_bytes + row.held_bytes
            row.peak_bytes = max(row.peak_bytes or 0, needed)
        if row.make is not None:
            read_record(row, row.pipeline.fastdit.last_run)

    def _watched(self, row: Row) -> list[Stage]:
        """Run a row and wait after every step: what the host took to launch it, and when the device had done it."""
        found: list[tuple[float, float]] = []
        begun = 0.0

        def wait(pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            nonlocal begun
            launched = time.perf_counter()
            wait_for(self.device)
            now = time.perf_counter()
            found.append((launched - begun, now - begun))
            begun = time.perf_counter()
            return kwargs

        self._run(row, row.steps, "latent", callback_on_step_end=wait)
        told = row.pipeline.fastdit.last_run.steps if row.make is not None else [None] * len(found)
        stages: dict[int, list[tuple[float, float]]] = {}
        for index, (seconds, step) in enumerate(zip(found, told, strict=True)):
            if index and (step is None or step.action == "computed"):  # the first one waits for what lies before it
                stages.setdefault(0 if step is None else step.stage, []).append(seconds)
        return [
            Stage(stage, len(seen), *(median(column) for column in zip(*seen, strict=True)))
            for stage, seen in sorted(stages.items())
        ]

    def _run(self, row: Row, steps: int | None, output: str = "pt", **more: Any) -> torch.Tensor:
        call = self._model.call(self.pipeline, batch=row.batch) | more
        if steps is not None:
            call["num_inference_steps"] = steps
        generator = torch.Generator(self.device).manual_seed(0)
        with nullcontext(row.pipeline) if row.rival is None else row.rival(self.pipeline) as pipeline:
            made: torch.Tensor = pipeline(**call, output_type=output, generator=generator).images
        return made

    def _check(self, row: Row) -> None:
        """Compare the latents of two steps with the plain run's where they should be the same. Raises if they are not.

        Two steps, since what an engine rounds otherwise grows from step to step as any other rounding does.
        """
        latents = self._run(row, None if row.steps is None else 2, "latent").float()
        if not latents.isfinite().all():
            raise ArithmeticError("its latents are not finite")
        if row.same:
            exact = self._plain.get(row.batch)
            if exact is None:
                whole = plain(2, row.batch)
                whole.pipeline = self.pipeline
                exact = self._plain[row.batch] = self._run(whole, 2, "latent").float()
            row.error_to_plain = float((latents - exact).norm() / exact.norm())
            if row.error_to_plain > SAME:
                raise ArithmeticError(f"its latents are {row.error_to_plain:.3f} of their size from the plain run's")

    def _attempt(self, row: Row, act: Callable[[], None], seconds: float) -> None:
        """Do something for a row. What goes wrong is written into the row, which is then left; the others go on.

        Raises `DeviceLost` where nothing can go on.
        """
        try:
            with limited(seconds):
                act()
            return
        except TimeUp:
            if row.seconds:  # it keeps the rounds that it has had
                return
            row.error = "left out: the time was up"
        except Exception as error:
            row.error, row.seconds = f"{type(error).__name__}: {error}", []
        row.pipeline = None
        try:
            release(self.device)
            wait_for(self.device)
        except Exception as error:
            raise DeviceLost(
                f"after {row.name!r} the device fails: {error}; run again with --skip {row.name!r}"
            ) from error

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def measure(
    bench: Bench, rows: Sequence[Row], *, rounds: int, keep: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Begin rows in their order, each with its first round, then give rounds in turns; `keep` is called at every row.

    Rows for which there was no time at first are begun when all others have their rounds.
    """
    begun: list[Row] = []
    for late in (False, True):
        for row in rows:
            if row in begun or bench.left <= 0 or not (late or bench.begins or not begun):
                continue
            begun.append(row)
            bench.prepare(row)
            keep()
            say(f"{row.name}: {row.error or told(row)}")
        for number in range(1, rounds):
            running = [row for row in begun if row.error is None and len(row.seconds) == number]
            random.Random(number).shuffle(running)
            for row in running:
                if row.seconds[-1] > bench.left:
                    continue
                bench.time(row)
                keep()
            if running:
                say(f"round {number + 1}: {sum(len(row.seconds) > number for row in running)} of {len(running)} rows")
    for row in rows:
        if row not in begun:
            row.error = "left out: the time was up"
    keep()


def told(row: Row) -> str:
    """Say in a line what a row's first round came to."""
    launched = [f"{stage.host_seconds * 1e3:.1f} of {stage.seconds * 1e3:.1f}" for stage in row.stages]
    error = "" if row.error_to_plain is None else f", {row.error_to_plain:.1e} from plain"
    return (
        f"{row.seconds[-1]:.3f} s, prepared in {row.prepared:.1f} s{error}; ms to launch a step, of its ms, by stage: "
        f"{', '.join(launched) or 'none'}"
    )


def read_record(row: Row, record: RunRecord) -> None:
    """Take over how many forwards there were, and what those that ran in whole took at each stage."""
    row.forwards, row.skipped = len(record.steps), record.skipped + record.partial
    stages: dict[int, list[float]] = {}
    for step in record.steps:
        if step.action == "computed":
            stages.setdefault(step.stage, []).append(step.seconds)
    row.step_seconds = [median(seconds) for _, seconds in sorted(stages.items())]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in whatever runs inside once the seconds are over, or when it next returns from compiled code."""

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    try:  # it may ring at once
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
