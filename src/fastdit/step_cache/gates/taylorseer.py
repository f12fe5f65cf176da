"""TaylorSeer: every few steps is computed, those between are extrapolated (2503.06923).

The paper extrapolates what attention and feed-forward give in each block; here it is the residual of the whole block
stack, as in the method's "Lite" form.
"""

from __future__ import annotations

import dataclasses

from fastdit.config import Count, Whole, register
from fastdit.step_cache.forecasters.base import Forecaster
from fastdit.step_cache.forecasters.taylor import Order, PublishedTaylor
from fastdit.step_cache.gates.interval import Interval
from fastdit.step_cache.policy import SkipPolicy


@register
@dataclasses.dataclass(frozen=True)
class TaylorSeer(Interval):
    """Compute the first steps and then every `interval`-th; a Taylor series of the residual stands in between.

        r(c + k) = sum_i F^i k^i / i!,   c the last computed step, F^i its i-th backward difference

    Args:
        interval: steps from one computed step to the next, from 1 (all are computed).
        order: the highest i, 0 to 4; order + 1 copies of the residual are kept.
        first: how many steps at the start are computed, from 0.

    And what every step cache takes but `forecast` and `policy`: `per_image`, `scope`, `stage_change`.

    Raises:
        InvalidConfig: for other values.

    Paper: Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv 2503.06923.

    >>> TaylorSeer(4, 2).forecast
    PublishedTaylor(order=2)
    """

    interval: Count = 4
    order: Order = 1
    _: dataclasses.KW_ONLY
    first: Whole = 3
    forecast: Forecaster = dataclasses.field(init=False, repr=False, default_factory=PublishedTaylor)
    policy: SkipPolicy = dataclasses.field(init=False, repr=False, default_factory=lambda: SkipPolicy(3, 0))

    def check_values(self) -> None:
        super().check_values()
        object.__setattr__(self, "forecast", PublishedTaylor(self.order))
        object.__setattr__(self, "policy", SkipPolicy(self.first, 0))
