"""Taylor and PublishedTaylor: extrapolation from differences of the computed residuals."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, TypeAlias

from fastdit.config import Range, register
from fastdit.step_cache.forecasters.base import Features, Forecaster, History


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


Order: TypeAlias = Annotated[int, Range(at_least=0, at_most=4)]


@dataclasses.dataclass(frozen=True)
class _Ordered(Forecaster):
    order: Order = 1

    @property
    def amplifies(self) -> bool:
        return self.order > 0


@register
@dataclasses.dataclass(frozen=True)
class Taylor(_Ordered):
    """Extrapolation along the polynomial through the last computed steps, in Newton's form.

        r(t) = sum_i r[t_0 .. t_i] (t - t_0) ... (t - t_(i-1)),   t_0 > t_1 > ... the last computed steps

    It is exact for polynomials of degree `order`, whatever the gaps between computed steps.

    Args:
        order: the degree, 0 (as `Reuse`) to 4; lower while fewer steps are computed. order + 1 copies are kept.

    Raises:
        InvalidConfig: for other values.

    >>> Taylor(0).amplifies, Taylor(2).amplifies
    (False, True)
    """

    def begin(self) -> History:
        return _Newton(self.order)


@register
@dataclasses.dataclass(frozen=True)
class PublishedTaylor(_Ordered):
    """TaylorSeer's own extrapolation: backward differences with the weights of a Taylor series.

        r(c + k) = sum_i F^i k^i / i!,   c the last computed step, F^i its i-th backward difference over the last gap

    The weights are those of derivatives and the F^i are differences, so the form is exact for linear sequences only,
    whatever the order; `Taylor` is exact up to its order.

    Args:
        order: the highest i, 0 (as `Reuse`) to 4; lower while fewer steps are computed. order + 1 copies are kept.

    Raises:
        InvalidConfig: for other values.

    Paper: Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv 2503.06923.

    >>> PublishedTaylor(2)
    PublishedTaylor(order=2)
    """

    def begin(self) -> History:
        return _Backward(self.order)
