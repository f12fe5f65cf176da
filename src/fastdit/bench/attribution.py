"""What each part of a stack is worth: alone, added last, and on average over every order (its Shapley value).

For parts N and a value v of every subset,

    alone_i = v({i}) - v({}),   last_i = v(N) - v(N - i),
    shapley_i = sum over S without i of |S|! (|N| - |S| - 1)! / |N|! (v(S + i) - v(S))

With v = -log(seconds) the differences are factors of speed-up, and the Shapley values multiply to the whole stack's.
With v = quality they are differences, and add up to the whole stack's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from math import factorial

import numpy as np
import numpy.typing as npt

from fastdit.errors import InvalidConfig
from fastdit.measure.statistics import Interval, bootstrap
from fastdit.stack import Stack

Parts = frozenset[int]
Array = npt.NDArray[np.float64]

#: Parts up to which every subset is run.
MOST_PARTS = 5

#: A gain or loss that is small enough to be called none, as a part.
SLIGHT = 0.1


@dataclass(frozen=True)
class PartGain:
    """What a part of a stack is worth; gains are factors of speed-up where times were given, else differences."""

    name: str
    alone: Interval
    last: Interval
    shapley: Interval

    @property
    def dead_weight(self) -> bool:
        """Whether the stack is no faster with the part than without it, as far as a tenth."""
        return self.last.low <= 1.0 and not self.unsure

    @property
    def unsure(self) -> bool:
        """Whether times are too noisy to tell if the stack is faster with the part than without it."""
        return self.last.low <= 1.0 and self.last.high > 1.0 + SLIGHT


@dataclass(frozen=True)
class Interaction:
    """How much two parts gain together, over the product of what each gains without the other."""

    names: tuple[str, str]
    over_product: Interval

    def __str__(self) -> str:
        first, second = self.names
        low, high = self.over_product.low, self.over_product.high
        if low > 1.0 or high < 1.0:
            told = f"gain {'more' if low > 1.0 else 'less'} than the product of their own"
        elif low >= 1.0 - SLIGHT and high <= 1.0 + SLIGHT:
            told = "gain as much as the product of their own"
        else:
            told = "are not shown to gain more or less than the product of their own"
        return f"{first} and {second} {told}: {self.over_product:.2f} of it"


def subsets(stack: Stack) -> dict[Parts, Stack]:
    """Give the stack of every subset of the parts, but the empty one.

    Raises `InvalidConfig` for more than `MOST_PARTS` parts.
    """
    parts = list(stack)
    if len(parts) > MOST_PARTS:
        raise InvalidConfig(
            f"every subset of {len(parts)} parts is {2 ** len(parts)} stacks; attribute at most {MOST_PARTS} parts"
        )
    return {chosen: Stack([parts[index] for index in sorted(chosen)]) for chosen in _subsets(len(parts)) if chosen}


def subset_name(name: str, stack: Stack, parts: Parts) -> str:
    """Name a subset of a stack by its parts' classes."""
    kinds = [type(part).__name__ for part in stack]
    return f"{name}: {' + '.join(kinds[index] for index in sorted(parts))}"


def gains(names: Sequence[str], seconds: Mapping[Parts, Sequence[float]]) -> list[PartGain]:
    """Give what each part is worth, from the seconds of every subset's rounds (the empty one's are the plain run's).

    Every subset has as many rounds, paired by their numbers; intervals are bootstrapped over rounds.
    """
    rounds = _rounds(names, seconds)
    every = frozenset(range(len(names)))
    found = []
    for part, name in enumerate(names):
        one = frozenset([part])
        alone = {one: 1.0, frozenset(): -1.0}
        last = {every: 1.0, every - one: -1.0}
        found.append(
            PartGain(name, *(_factor(rounds, weights) for weights in (alone, last, shapley(part, len(names)))))
        )
    return found


def quality_gains(names: Sequence[str], scores: Mapping[Parts, Sequence[float]]) -> list[PartGain]:
    """Give what each part is worth in quality, from the scores of every subset's pictures, as differences of means.

    Every subset has as many pictures, of the same prompts and seeds; intervals are bootstrapped over pictures.
    """
    pictures = _rounds(names, scores)
    every = frozenset(range(len(names)))
    found = []
    for part, name in enumerate(names):
        one = frozenset([part])
        designs = {one: 1.0, frozenset(): -1.0}, {every: 1.0, every - one: -1.0}, shapley(part, len(names))
        found.append(PartGain(name, *(_difference(pictures, weights) for weights in designs)))
    return found


def interactions(names: Sequence[str], seconds: Mapping[Parts, Sequence[float]]) -> list[Interaction]:
    """Give what every pair of parts gains over the product of its own two gains, within the whole stack's other parts.

    Parts beside the pair are present, since that is how they will run.
    """
    rounds = _rounds(names, seconds)
    every = frozenset(range(len(names)))
    found = []
    for first, second in combinations(range(len(names)), 2):
        rest = every - {first, second}
        weights = {every: 1.0, rest | {first}: -1.0, rest | {second}: -1.0, rest: 1.0}
        found.append(Interaction((names[first], names[second]), _factor(rounds, weights)))
    return found


def shapley(part: int, count: int) -> dict[Parts, float]:
    """Give the weights of every subset's value in the Shapley value of a part of `count`."""
    weights: dict[Parts, float] = {}
    for chosen in _subsets(count):
        if part not in chosen:
            weight = factorial(len(chosen)) * factorial(count - len(chosen) - 1) / factorial(count)
            weights |= {chosen | {part}: weight, chosen: -weight}
    return weights


def _subsets(count: int) -> list[Parts]:
    places = range(count)
    return [
        frozenset(chosen) for chosen in chain.from_iterable(combinations(places, size) for size in range(count + 1))
    ]


def _rounds(names: Sequence[str], seconds: Mapping[Parts, Sequence[float]]) -> dict[Parts, Array]:
    """Check that every subset is there with as many rounds."""
    missing = [chosen for chosen in _subsets(len(names)) if chosen not in seconds]
    if missing or len({len(values) for values in seconds.values()}) != 1:
        raise ValueError(f"attribution needs every subset of {list(names)} with as many rounds; missing: {missing}")
    return {chosen: np.asarray(values, dtype=np.float64) for chosen, values in seconds.items()}


def _factor(rounds: Mapping[Parts, Array], weights: Mapping[Parts, float]) -> Interval:
    """Bootstrap a factor of speed-up over rounds: the weighted sum of -log(median seconds) of subsets."""

    def statistic(rows: npt.NDArray[np.intp]) -> Array:
        logs = [weight * np.log(np.median(rounds[parts][rows], axis=-1)) for parts, weight in weights.items()]
        factor: Array = np.exp(-np.sum(logs, axis=0))
        return factor

    return bootstrap(statistic, next(iter(rounds.values())).size)


def _difference(pictures: Mapping[Parts, Array], weights: Mapping[Parts, float]) -> Interval:
    """Bootstrap a difference over pictures: the weighted sum of subsets' means."""

    def statistic(rows: npt.NDArray[np.intp]) -> Array:
        total: Array = np.sum(
            [weight * pictures[parts][rows].mean(axis=-1) for parts, weight in weights.items()], axis=0
        )
        return total

    return bootstrap(statistic, next(iter(pictures.values())).size)
