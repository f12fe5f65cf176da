"""Pairwise coverage: few rows in which every two values of two factors meet.

    for row in pairwise({"gate": [...], "forecaster": [...], "model": [...]}, allowed):
        ...  # row["gate"], row["forecaster"], row["model"]

Faults of orthogonal options show where two of them meet, so a row a pair is worth a row a combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product

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
        yield row
        return

    def gain(value: str) -> int:
        return sum(frozenset(((name, value), given)) in wanted for given in row.items())

    for value in sorted(factors[name], key=gain, reverse=True):
        yield from _finished({**row, name: value}, factors, wanted, allowed)
