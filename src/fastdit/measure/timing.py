"""Paired timing: several tasks take turns in rounds, so that whatever slows the machine down slows all of them.

With it goes the rival that every acceleration must beat: fewer plain steps that take as long.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

import torch

Output = TypeVar("Output")

#: What is timed. It is called with the number of its round, which may choose its input.
Task = Callable[[int], Output]

#: Hears what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

_PROBE = (2, 8)  # two step counts far enough apart to tell a step's time from what every run costs


def silent(phase: str, done: int, total: int) -> None:
    """Hear of progress and say nothing."""


@dataclass(frozen=True)
class Sample(Generic[Output]):
    """One timed call of one task, with what it returned."""

    task: str
    round: int
    seconds: float
    output: Output


def interleave(
    tasks: Mapping[str, Task[Output]],
    *,
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Sample[Output]]:
    """Yield a sample for every task of every round, as each is measured; warm-up rounds are run but not yielded.

    Work that the caller does between two samples is not timed. The order within a round is random, so that no task
    always follows the same other one, whose leftovers in the caches it would inherit.
    """
    if not tasks or rounds < 1 or warmup < 0:
        raise ValueError(f"timing needs tasks, rounds >= 1 and warmup >= 0; got {list(tasks)}, {rounds} and {warmup}")
    for number in range(warmup):
        for task in tasks.values():
            timed(task, number, device)
    shuffler = random.Random(seed)
    names = list(tasks)
    for number in range(rounds):
        shuffler.shuffle(names)
        for name in names:
            seconds, output = timed(tasks[name], number, device)
            yield Sample(name, number, seconds, output)


def time_interleaved(
    tasks: Mapping[str, Task[object]],
    *,
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[float, ...]]:
    """The seconds of every task in every round, paired by round; `progress` hears (samples taken, all samples)."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    samples = interleave(tasks, rounds=rounds, warmup=warmup, seed=seed, device=device)
    for taken, sample in enumerate(samples, start=1):
        seconds[sample.task].append(sample.seconds)
        if progress is not None:
            progress(taken, rounds * len(tasks))
    return {name: tuple(values) for name, values in seconds.items()}


def medians(seconds: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """The median seconds of every task."""
    return {name: median(values) for name, values in seconds.items()}


def timed(task: Task[Output], number: int, device: torch.device | str = "cpu") -> tuple[float, Output]:
    """Seconds and output of one call, from an idle device to an idle device."""
    wait_for(device)
    start = time.perf_counter()
    output = task(number)
    wait_for(device)
    return time.perf_counter() - start, output


def wait_for(device: torch.device | str) -> None:
    """Wait until a device, which need not be the present one of its kind, has done all that it was given."""
    place = torch.device(device)
    if place.type != "cpu":
        torch.accelerator.synchronize(place)


def equal_time_steps(
    plain: Callable[[int], Task[object]],
    accelerated: Task[object],
    *,
    rounds: int = 3,
    most: int = 50,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """The fewest plain steps whose median time is not below that of `accelerated`, found by measuring.

    `plain(n)` is the task of n plain steps. Time is affine in the steps, so two counts give a first guess, and
    interleaved rounds around it decide. The rival never gets less time than the accelerated run, up to `most` steps.
    `progress` hears (samples taken, samples that are expected), for how long the search goes on is not known before.
    """
    taken = 0

    def measured(*counts: int) -> tuple[float, ...]:
        """Median seconds of the accelerated run, and of so many plain steps."""
        nonlocal taken
        tasks = {"accelerated": accelerated} | {str(steps): plain(steps) for steps in counts}
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for sample in interleave(tasks, rounds=rounds, warmup=0, device=device):
            seconds[sample.task].append(sample.seconds)
            taken += 1
            if progress is not None:
                progress(taken, max(taken, 7 * rounds))
        return tuple(median(values) for values in seconds.values())

    verdicts: dict[int, bool] = {}

    def long_enough(steps: int) -> bool:
        if steps not in verdicts:
            goal, seconds = measured(steps)
            verdicts[steps] = seconds >= goal
        return verdicts[steps]

    few, many = _PROBE
    goal, short, long = measured(few, many)
    step_seconds = max((long - short) / (many - few), short / many)
    steps = min(max(math.ceil(few + (goal - short) / step_seconds), 1), most)
    while steps < most and not long_enough(steps):
        steps += 1
    while steps > 1 and long_enough(steps - 1):
        steps -= 1
    if progress is not None:
        progress(taken, taken)
    return steps
