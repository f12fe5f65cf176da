"""A forecaster: the last residual, fading with every step that it stands in for."""

from __future__ import annotations

import dataclasses

from fastdit.config import Share, register
from fastdit.step_cache.forecasters.base import Features, Forecaster, History


class _Fading(History):
    """One copy of the features, and the step at which they were computed."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self._keep, self._step = keep, 0

    def record(self, step: int, features: Features) -> None:
        self.kept, self._step = [features], step

    def predict(self, step: int) -> Features:
        weight = self._keep ** (step - self._step)
        return [weight * feature for feature in self.kept[0]]


@register
@dataclasses.dataclass(frozen=True)
class Fading(Forecaster):
    """The last computed residual, smaller with every step: r(c + k) = keep^k r(c), c the last computed step.

    Args:
        keep: what is left of it after a step, from 0 to 1 (as `Reuse`).
    """

    keep: Share = 0.98

    @property
    def amplifies(self) -> bool:
        return False

    def begin(self) -> History:
        return _Fading(self.keep)
