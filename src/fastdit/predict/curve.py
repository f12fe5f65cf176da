"""How a cost grows with the images of a batch and their tokens.

    cost(rows, tokens) = a + rows (b + c tokens + d tokens^2),   a, b, c, d >= 0

Linear layers are linear in tokens and attention is quadratic; text tokens beside the image's are a part of b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Point = tuple[int, int, float]
"""Rows, image tokens, and what was measured there."""


@dataclass(frozen=True)
class Curve:
    """A cost as a function of rows and image tokens; see the module.

    >>> Curve(1.0, 0.0, 0.5, 0.0).at(rows=2, tokens=4)
    5.0
    """

    call: float = 0.0
    row: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0

    def at(self, rows: int, tokens: int) -> float:
        """Give the cost of so many rows of so many tokens."""
        return self.call + rows * (self.row + self.linear * tokens + self.quadratic * tokens**2)

    @classmethod
    def fit(cls, points: Sequence[Point]) -> Curve:
        """Fit the coefficients, none below 0, by least squares of the relative error. Raises `ValueError` for none.

        Of all sets of coefficients that may be above 0 (there are 15) the best one that is feasible is taken.
        """
        if not points:
            raise ValueError("a curve needs at least one point")
        rows, tokens, values = (np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))
        weights = 1.0 / np.maximum(values, 1e-30)
        features = np.stack([np.ones_like(rows), rows, rows * tokens, rows * tokens**2], axis=1) * weights[:, None]
        scales = np.maximum(np.abs(features).max(axis=0), 1e-300)
        best, least = np.zeros(4), float(len(points))
        for count in range(1, 5):
            for chosen in map(list, combinations(range(4), count)):
                found = np.linalg.lstsq(features[:, chosen] / scales[chosen], values * weights, rcond=None)[0]
                coefficients = np.zeros(4)
                coefficients[chosen] = found / scales[chosen]
                error = float(((features @ coefficients - values * weights) ** 2).sum())
                # One coefficient more must be worth it: noise alone would always take it.
                if (coefficients >= 0).all() and error < least * 0.999:
                    best, least = coefficients, error
        return cls(*map(float, best))
