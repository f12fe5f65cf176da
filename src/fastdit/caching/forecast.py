"""Forecasters: what stands in for the blocks' residual at a step that is not computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastdit.accelerator import is_count, register
from fastdit.errors import InvalidConfig

Features = list[torch.Tensor]


@dataclasses.dataclass
class History:
    """Divided differences of the features, newest first, and the steps at which they were taken."""

    steps: list[int] = dataclasses.field(default_factory=list)
    differences: list[Features] = dataclasses.field(default_factory=list)

    def fits(self, shapes: list[torch.Size]) -> bool:
        """Whether the remembered features have these shapes."""
        return bool(self.differences) and [f.shape for f in self.differences[0]] == shapes


@dataclasses.dataclass(frozen=True)
class Forecaster:
    """Base of the forecasters: a polynomial of degree `order` through the last computed features."""

    @property
    def degree(self) -> int:
        raise NotImplementedError

    def record(self, history: History, step: int, features: Features) -> None:
        """Take in the features of a computed step; at most degree + 1 copies are kept.

        Newton's divided differences: f[x0] = f(x0), f[x0..xk] = (f[x0..xk-1] - f[x1..xk]) / (x0 - xk).
        """
        fresh: list[Features] = [features]
        for older, nodes in zip(history.differences, history.steps[: self.degree], strict=False):
            gap = step - nodes
            fresh.append([(new - old) / gap for new, old in zip(fresh[-1], older, strict=True)])
        history.steps = [step, *history.steps][: self.degree + 1]
        history.differences = fresh[: self.degree + 1]

    def predict(self, history: History, step: int) -> Features:
        """Evaluate the polynomial at `step`; with fewer computed steps than degree + 1, the degree is lower."""
        prediction = list(history.differences[0])
        weight = 1.0
        for node, difference in zip(history.steps, history.differences[1:], strict=False):
            weight *= step - node
            prediction = [p + d * weight for p, d in zip(prediction, difference, strict=True)]
        return prediction


@register
@dataclasses.dataclass(frozen=True)
class Reuse(Forecaster):
    """The last computed residual again (order 0)."""

    @property
    def degree(self) -> int:
        return 0


@register
@dataclasses.dataclass(frozen=True)
class Taylor(Forecaster):
    """Extrapolation in Newton's form, exact for polynomials up to `order` sampled at any computed steps.

    The published TaylorSeer (arXiv 2503.06923) weights backward differences by k^i / i!, which is exact for linear
    sequences only; Newton's form with divided differences is exact for every degree, uneven gaps included.
    """

    order: int = 1

    def __post_init__(self) -> None:
        if not is_count(self.order) or self.order > 4:
            raise InvalidConfig(f"Taylor's order is a whole number from 0 to 4, got {self.order!r}")

    @property
    def degree(self) -> int:
        return self.order


def is_forecast(forecaster: Any, history: History) -> bool:
    """Whether a prediction would be more than the last features."""
    return forecaster.degree > 0 and len(history.differences) > 1
