"""The rival that every acceleration must beat: fewer plain steps that take as long."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastdit.measure.timing import Task, medians, time_interleaved

_PROBE = (2, 8)  # two step counts far enough apart to tell a step's time from what every run costs


def equal_time_steps(
    plain: Callable[[int], Task],
    accelerated: Task,
    *,
    rounds: int = 3,
    most: int = 50,
    device: torch.device | str = "cpu",
) -> int:
    """The fewest plain steps whose median time is not below that of `accelerated`, found by measuring.

    `plain(n)` is the task of n plain steps. Time is affine in the steps, so two counts give a first guess, and
    interleaved rounds around it decide. The rival never gets less time than the accelerated run, up to `most` steps.
    """

    def median_seconds(*counts: int) -> tuple[float, dict[int, float]]:
        tasks = {"accelerated": accelerated} | {str(steps): plain(steps) for steps in counts}
        seconds = medians(time_interleaved(tasks, rounds=rounds, warmup=0, device=device))
        return seconds["accelerated"], {steps: seconds[str(steps)] for steps in counts}

    verdicts: dict[int, bool] = {}

    def long_enough(steps: int) -> bool:
        if steps not in verdicts:
            goal, seconds = median_seconds(steps)
            verdicts[steps] = seconds[steps] >= goal
        return verdicts[steps]

    few, many = _PROBE
    goal, seconds = median_seconds(few, many)
    step_seconds = max((seconds[many] - seconds[few]) / (many - few), seconds[few] / many)
    steps = min(max(math.ceil(few + (goal - seconds[few]) / step_seconds), 1), most)
    while steps < most and not long_enough(steps):
        steps += 1
    while steps > 1 and long_enough(steps - 1):
        steps -= 1
    return steps
