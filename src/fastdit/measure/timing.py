"""Paired timing: several tasks take turns in rounds, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

#: What is timed. It is called with the number of its round, which may choose its input.
Task = Callable[[int], Any]


@dataclass(frozen=True)
class Sample:
    """One timed call of one task, with what it returned."""

    task: str
    round: int
    seconds: float
    output: Any


def interleave(
    tasks: Mapping[str, Task],
    *,
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Sample]:
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
    tasks: Mapping[str, Task],
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


def timed(task: Task, number: int, device: torch.device | str = "cpu") -> tuple[float, Any]:
    """Seconds and output of one call, from an idle device to an idle device."""
    module = torch.get_device_module(torch.device(device))
    module.synchronize()
    start = time.perf_counter()
    output = task(number)
    module.synchronize()
    return time.perf_counter() - start, output
