"""What a measurement can't tell: rounds that something else disturbed, speed-ups lost in them, too few prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fastdit.measure.results import Results
from fastdit.measure.statistics import Interval

#: A round is an outlier if it is further from the median than ten standard deviations, as hyperfine has it (a standard
#: deviation being 1.4826 median absolute deviations), and than a fifth of the median.
_DEVIATIONS = 14.826
_SHARE = 0.2

#: An interval is only called noisy if it is this wide beside its estimate: a narrow one around 1 is an answer.
_WIDE = 0.1


def too_noisy(speed_up: Interval) -> bool:
    """Whether a speed-up's interval is wider than its distance from 1, and wide."""
    width = speed_up.high - speed_up.low
    return width > max(abs(speed_up.estimate - 1), _WIDE * speed_up.estimate)


def outliers(seconds: Sequence[float]) -> list[float]:
    """The times that stand out from the rest."""
    times = np.asarray(seconds)
    distance = np.abs(times - np.median(times))
    return [float(time) for time in times[distance > max(_DEVIATIONS * np.median(distance), _SHARE * np.median(times))]]


def remarks(results: Results) -> Iterator[str]:
    """What a reader of the table must know of its noise, in sentences."""
    for entry in results.configurations:
        if found := outliers(entry.seconds):
            times = ", ".join(f"{time:.2f}" for time in sorted(found, reverse=True)[:3])
            yield (
                f"Outliers: {len(found)} of {len(entry.seconds)} rounds of {entry.name} stand out from the median of "
                f"{entry.median_seconds:.2f} s ({times} s{', ...' if len(found) > 3 else ''}); something else was "
                "running."
            )
    names = [entry.name for entry in results.configurations if entry.name != results.baseline]
    if noisy := [name for name in names if too_noisy(results.speed_up(name))]:
        yield (
            f"Too noisy: the speed-up of {', '.join(noisy)} has an interval wider than its effect; run again with "
            "nothing else running, or with more prompts."
        )
    if alone := [name for name in names if results[name].stack is not None and results.rival(name) is None]:
        nearest = ", ".join(f"{name} ({_nearest_plain(results, name)})" for name in alone)
        yield f"No plain run takes as long as {nearest}, or up to a tenth longer; so none is compared with it."
    advantages = [results.advantage(name, results.rival(name), "judge") for name in names]
    pictures = max(
        (len(one.metrics["judge"].samples) for one in results.configurations if "judge" in one.metrics), default=0
    )
    if spreads := [advantage.spread for advantage in advantages if advantage is not None]:
        yield (
            f"With {pictures} pictures of each, differences of the judge's score below {max(spreads):.3f} could not "
            "have shown."
        )


def _nearest_plain(results: Results, name: str) -> str:
    """Name the plain run whose time is nearest to a stack's, with how far it is."""
    own = results[name].median_seconds
    plain = [entry for entry in results.configurations if entry.stack is None]
    nearest = min(plain, key=lambda entry: abs(entry.median_seconds - own))
    return f"{nearest.name}: {nearest.median_seconds / own - 1:+.0%}"
