"""Forecasters: what stands in for the blocks' residual at a step that is not computed.

A forecaster is configuration; `begin` makes the history of one run's branch, which takes in the features (a list of
tensors, the residuals of the carried streams) of the computed steps and predicts those of a skipped one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from fastdit.accelerator import is_count, register
from fastdit.errors import InvalidConfig

Features = list[torch.Tensor]


class History:
    """What a forecaster remembers: `kept` lists whole copies of the features, newest first."""

    def __init__(self) -> None:
        self.kept: list[Features] = []

    @property
    def filled(self) -> bool:
        """Whether there is anything to predict from."""
        return bool(self.kept)

    @property
    def extrapolates(self) -> bool:
        """Whether a prediction would be more than the last features."""
        return len(self.kept) > 1

    def record(self, step: int, features: Features) -> None:
        """Take in the features of a computed step."""
        raise NotImplementedError

    def predict(self, step: int) -> Features:
        """Give the features of a step that is not computed."""
        raise NotImplementedError

    def lift(self, stream: int, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Bring one stream of every copy to other tokens; `function` copies tokens, and all kept is linear in them."""
        self.kept = [
            [function(tensor) if place == stream else tensor for place, tensor in enumerate(features)]
            for features in self.kept
        ]

    def tensors(self) -> list[torch.Tensor]:
        """List what is kept, for the count of memory."""
        return [tensor for features in self.kept for tensor in features]


@dataclasses.dataclass(frozen=True)
class Forecaster:
    """Base of the forecasters. `amplifies` says that noise in the features grows in a prediction."""

    @property
    def amplifies(self) -> bool:
        return True

    def begin(self) -> History:
        """Make the history of one branch."""
        raise NotImplementedError


class _Last(History):
    def record(self, step: int, features: Features) -> None:
        self.kept = [features]

    def predict(self, step: int) -> Features:
        return list(self.kept[0])


@register
@dataclasses.dataclass(frozen=True)
class Reuse(Forecaster):
    """The last computed residual again (order 0)."""

    @property
    def amplifies(self) -> bool:
        return False

    def begin(self) -> History:
        return _Last()


class _Newton(History):
    """Differences of rising order, and the steps at which the features were taken, newest first.

    They are made when a prediction asks for them: until then `kept` is the newest features, and after them the
    differences as they were before those, of which fewer must be known.
    """

    def __init__(self, order: int) -> None:
        super().__init__()
        self._order = order
        self._steps: list[int] = []
        self._settled = True

    def record(self, step: int, features: Features) -> None:
        self._settle(self._order - 1)
        self.kept = [features, *self.kept[: self._order]]
        self._steps = [step, *self._steps[: self._order]]
        self._settled = False

    def _settle(self, order: int) -> None:
        """Make the differences up to `order` of the newest features and of the differences before them."""
        if self._settled:
            return
        fresh = self.kept[:1]
        for place, older in enumerate(self.kept[1 : order + 1], start=1):
            gap = self._gap(place)
            fresh.append([(new - old) / gap for new, old in zip(fresh[-1], older, strict=True)])
        self.kept, self._settled = fresh, True

    def _gap(self, order: int) -> int:
        # f[x0] = f(x0), f[x0..xk] = (f[x0..xk-1] - f[x1..xk]) / (x0 - xk).
        return self._steps[0] - self._steps[order]

    def predict(self, step: int) -> Features:
        self._settle(self._order)
        prediction = list(self.kept[0])
        weight = 1.0
        for node, difference in zip(self._steps, self.kept[1:], strict=False):
            weight *= step - node
            prediction = [p + d * weight for p, d in zip(prediction, difference, strict=True)]
        return prediction


class _Backward(_Newton):
    """Backward differences over the last gap, weighted as a Taylor series is."""

    def _gap(self, order: int) -> int:
        # F^(i+1) = (F^i_now - F^i_before) / gap, with the one gap between the last two computed steps.
        return self._steps[0] - self._steps[1]

    def predict(self, step: int) -> Features:
        self._settle(self._order)
        ahead = step - self._steps[0]
        prediction = list(self.kept[0])
        for order, difference in enumerate(self.kept[1:], start=1):
            weight = ahead**order / math.factorial(order)
            prediction = [p + d * weight for p, d in zip(prediction, difference, strict=True)]
        return prediction


@dataclasses.dataclass(frozen=True)
class _Ordered(Forecaster):
    order: int = 1

    def __post_init__(self) -> None:
        if not is_count(self.order) or self.order > 4:
            raise InvalidConfig(f"{type(self).__name__}'s order is a whole number from 0 to 4, got {self.order!r}")

    @property
    def amplifies(self) -> bool:
        return self.order > 0


@register
@dataclasses.dataclass(frozen=True)
class Taylor(_Ordered):
    """Extrapolation in Newton's form, exact for polynomials up to `order` sampled at any computed steps.

    Keeps order + 1 copies of the features. With fewer computed steps than that, the degree is lower.
    """

    def begin(self) -> History:
        return _Newton(self.order)


@register
@dataclasses.dataclass(frozen=True)
class PublishedTaylor(_Ordered):
    """TaylorSeer's own extrapolation (arXiv 2503.06923): sum_i F^i k^i / i!, F^i the backward differences.

    k counts steps since the last computed one. The weights are those of derivatives and the F^i are differences, so
    the form is exact for linear sequences only, whatever the order; `Taylor` is exact up to its order.
    """

    def begin(self) -> History:
        return _Backward(self.order)


class _FoCa(History):
    """`kept` is [newest computed, its slope a step, latest feature, the one before the latest]."""

    _step: int
    _latest: int

    def record(self, step: int, features: Features) -> None:
        if not self.kept:
            self.kept = [features]
        else:
            gap = step - self._step
            slope = [(new - old) / gap for new, old in zip(features, self.kept[0], strict=True)]
            before = self.kept[2] if len(self.kept) == 4 and step - self._latest == 1 else None
            # Where the step before was not predicted, the computed slope is the newest one that there is.
            before = before or [new - rise for new, rise in zip(features, slope, strict=True)]
            self.kept = [features, slope, features, before]
        self._step = self._latest = step

    def predict(self, step: int) -> Features:
        if len(self.kept) == 1:
            return list(self.kept[0])
        computed, slope, latest, before = self.kept
        ahead = (step - self._step) / 2
        prediction = [c + ahead * (s + (n - b)) for c, s, n, b in zip(computed, slope, latest, before, strict=True)]
        self.kept, self._latest = [computed, slope, prediction, latest], step
        return prediction


@register
@dataclasses.dataclass(frozen=True)
class FoCa(Forecaster):
    """Forecast-then-calibrate (arXiv 2508.16211): the mean of the computed slope and the newest one, predicted or not.

    F_(c+k) = F_c + k/2 ((F_c - F_p) / (c - p) + (F_(c+k-1) - F_(c+k-2))), c and p the last two computed steps; it
    feeds on its own predictions. The published form takes F_c - F_p undivided, which is the same for steps computed one
    after another; divided by the gap it is exact for linear sequences at any gap. Keeps four copies of the features.
    """

    def begin(self) -> History:
        return _FoCa()


class _Modes(History):
    """Snapshots newest first, and the operator that leads from one to the next, in the snapshots' own span."""

    def __init__(self, snapshots: int) -> None:
        super().__init__()
        self._most = snapshots
        self._steps: list[int] = []

    def record(self, step: int, features: Features) -> None:
        gap = step - self._steps[0] if self._steps else None
        regular = len(self._steps) < 2 or gap == self._steps[0] - self._steps[1]
        # Modes are per step of equal length: another gap starts a new series from the last snapshot.
        keep = self._most - 1 if regular else 1
        self.kept = [features, *self.kept[:keep]]
        self._steps = [step, *self._steps[:keep]]
        self._operator = self._fitted() if len(self.kept) > 2 else None

    def _fitted(self) -> torch.Tensor | None:
        """Fit c of x_new = sum_i c_i x_i over the older snapshots (oldest first) by least squares; give C."""
        flat = [torch.cat([tensor.flatten().double() for tensor in features]) for features in self.kept[::-1]]
        gram = torch.stack([torch.stack([one @ other for other in flat]) for one in flat]).cpu()
        if not bool(torch.isfinite(gram).all()):
            return None
        older, target = gram[:-1, :-1], gram[:-1, -1]
        weights = torch.linalg.lstsq(older, target[:, None], rcond=1e-10, driver="gelsd").solution[:, 0]
        companion = torch.diag(torch.ones(len(weights) - 1, dtype=torch.float64), 1)
        companion[-1] = weights
        return companion

    def predict(self, step: int) -> Features:
        if len(self.kept) < 2:
            return list(self.kept[0])
        ahead = (step - self._steps[0]) / (self._steps[0] - self._steps[1])
        if self._operator is None:
            return [new + ahead * (new - old) for new, old in zip(self.kept[0], self.kept[1], strict=True)]
        weights = _power_row(self._operator, ahead)
        # Row j of the companion's power writes the snapshot j places on in terms of the window of older ones.
        window = self.kept[:-1][::-1] if len(self.kept) > len(weights) else self.kept[::-1]
        return [
            torch.stack([weight * features[i] for weight, features in zip(weights.tolist(), window, strict=True)]).sum(
                0
            )
            for i in range(len(self.kept[0]))
        ]


def _power_row(companion: torch.Tensor, power: float) -> torch.Tensor:
    """Give the last row of companion ** power, real part, with growing modes held at modulus one."""
    values, vectors = torch.linalg.eig(companion)
    modulus = values.abs().clamp_min(1e-12)
    values = values / modulus * modulus.clamp_max(1.0)
    powers: torch.Tensor = values**power
    row: torch.Tensor = (vectors @ torch.diag(powers) @ torch.linalg.pinv(vectors)).real[-1]
    return row


@register
@dataclasses.dataclass(frozen=True)
class DMD(Forecaster):
    """Dynamic mode decomposition: the next features as the linear recurrence that the last `snapshots` ones follow.

    Snapshots x_1 .. x_m at equal gaps are fitted by x_(i+1) = A x_i in their own span (a companion matrix, least
    squares through their Gram matrix); x_(m+k) = A^k x_m, with the modulus of growing modes held at one. Exact for sums
    of fewer than m decaying exponentials. Three snapshots at least; with fewer it is linear extrapolation. Reads one
    small matrix from the device at each computed step. Keeps `snapshots` copies of the features.
    """

    snapshots: int = 4

    def __post_init__(self) -> None:
        if not is_count(self.snapshots, 3) or self.snapshots > 8:
            raise InvalidConfig(f"DMD keeps 3 to 8 snapshots, got {self.snapshots!r}")

    def begin(self) -> History:
        return _Modes(self.snapshots)


def is_forecaster(value: Any) -> bool:
    """Whether a configuration's value is a forecaster."""
    return isinstance(value, Forecaster) and type(value) is not Forecaster
