"""Pairwise coverage: few rows in which every two values of two factors meet.

    for row in pairwise({"gate": [...], "forecaster": [...], "model": [...]}, allowed):
        ...  # row["gate"], row["forecaster"], row["model"]

Faults of orthogonal options show where two of them meet, so a row a pair is worth a row a combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]


def pairwise(factors: Mapping[str, Sequence[str]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Give rows, each allowed, that hold every pair of values that an allowed row can hold; always the same ones.

    `allowed` is asked of unfinished rows, too: it must not refuse one for what a row lacks, and what it refuses it
    must refuse of every longer row.
    """
    rows: list[Row] = []
    open_pairs = dict.fromkeys(all_pairs(factors))
    while open_pairs:
        pair = next(iter(open_pairs))
        row = next(_finished(dict(pair), factors, open_pairs, allowed), None)
        del open_pairs[pair]
        if row is not None:
            rows.append(row)
            for met in pairs_of(row):
                open_pairs.pop(met, None)
    return rows


def all_pairs(factors: Mapping[str, Sequence[str]]) -> Iterator[Pair]:
    """Give every two values of two factors."""
    for one, other in combinations(factors, 2):
        for values in product(factors[one], factors[other]):
            yield frozenset(zip((one, other), values, strict=True))


def pairs_of(row: Row) -> Iterator[Pair]:
    """Give the pairs that meet in a row."""
    return map(frozenset, combinations(row.items(), 2))


def _finished(
    row: Row, factors: Mapping[str, Sequence[str]], wanted: Mapping[Pair, None], allowed: Callable[[Row], bool]
) -> Iterator[Row]:
    """Give the allowed rows that begin with this one, first those with the most wanted pairs (value by value)."""
    if not allowed(row):
        return
    name = next((name for name in factors if name not in row), None)
    if name is None:
        yield {name: row[name] for name in factors}  # a pair is a set, whose order no process shares
        return

    def gain(value: str) -> int:
        return sum(frozenset(((name, value), given)) in wanted for given in row.items())

    for value in sorted(factors[name], key=gain, reverse=True):
        yield from _finished({**row, name: value}, factors, wanted, allowed)


def crossed(*columns: Iterable[Any]) -> list[Any]:
    """Give parameter sets of all rows of some columns; those with a value each that no row before had stay fast.

    The others are exhaustive: what the columns do is shown by itself, and they hardly meet.
    """
    values = [list(column) for column in columns]
    fast = {tuple(place % len(column) for column in values) for place in range(max(map(len, values)))}
    rows = []
    for places in product(*(range(len(column)) for column in values)):
        row = [column[place] for column, place in zip(values, places, strict=True)]
        marks = () if places in fast else pytest.mark.exhaustive
        rows.append(pytest.param(*row, marks=marks, id="-".join(map(_name, row))))
    return rows


def _name(value: Any) -> str:
    if hasattr(value, "describe") and not isinstance(value, type):
        return str(value.describe())
    return str(getattr(value, "__name__", value))
