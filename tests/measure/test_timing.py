"""The order of interleaved tasks, what is timed, and the equal-time rival."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest

from fastdit.measure.timing import (
    equal_time_steps,
    interleave,
    medians,
    time_interleaved,
)


def test_every_task_runs_once_a_round_with_the_rounds_number() -> None:
    calls: list[tuple[str, int]] = []
    tasks = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    samples = list(interleave(tasks, rounds=4, warmup=1))
    assert Counter(calls[3:]) == Counter((name, number) for name in "abc" for number in range(4))
    assert [(sample.task, sample.round) for sample in samples] == calls[3:]


def test_a_random_order_repeats_for_its_seed_only() -> None:
    def order(seed: int) -> list[str]:
        return [sample.task for sample in interleave({n: lambda _: None for n in "abcd"}, rounds=9, seed=seed)]

    assert order(1) == order(1) != order(2)


def test_the_callers_work_between_samples_is_not_timed() -> None:
    samples = interleave({"nothing": lambda _: None}, rounds=3)
    seconds = []
    for sample in samples:
        seconds.append(sample.seconds)
        time.sleep(0.02)
    assert max(seconds) < 0.02


def test_a_slower_task_is_seen_to_be_slower_and_progress_is_told() -> None:
    heard: list[tuple[int, int]] = []
    tasks = {"slow": lambda _: time.sleep(0.02), "fast": lambda _: time.sleep(0.001)}
    seconds = time_interleaved(tasks, rounds=3, progress=lambda done, total: heard.append((done, total)))
    assert medians(seconds)["slow"] > medians(seconds)["fast"]
    assert heard == [(done, 6) for done in range(1, 7)]


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds"):
        list(interleave({"a": lambda _: None}, rounds=0))


@pytest.mark.parametrize(("goal", "expected"), [(0.052, 5), (0.001, 1), (0.9, 6)])
def test_the_rival_gets_the_fewest_steps_that_take_as_long(goal: float, expected: int) -> None:
    def plain(steps: int) -> Callable[[int], None]:
        return lambda _: time.sleep(0.012 * steps)

    heard: list[tuple[int, int]] = []
    found = equal_time_steps(
        plain, lambda _: time.sleep(goal), rounds=1, most=6, progress=lambda done, total: heard.append((done, total))
    )
    assert found == expected
    assert heard[0] == (1, 7) and all(done <= total for done, total in heard) and heard[-1][0] == heard[-1][1]
