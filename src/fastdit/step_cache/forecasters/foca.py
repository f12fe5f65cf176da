"""FoCa: forecast, then calibrate (arXiv 2508.16211)."""

from __future__ import annotations

import dataclasses

from fastdit.config import register
from fastdit.step_cache.forecasters.base import Features, Forecaster, History


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
    """Forecast, then calibrate: the mean of the computed slope and of the newest one, predicted or not.

        F_(c+k) = F_c + k/2 ((F_c - F_p) / (c - p) + (F_(c+k-1) - F_(c+k-2))),   c and p the last two computed steps

    It feeds on its own predictions and keeps four copies of the features. The published form takes F_c - F_p
    undivided, which is the same for steps computed one after another; divided by the gap it is exact for linear
    sequences at any gap.

    Paper: Zheng et al., Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers,
    arXiv 2508.16211.

    >>> FoCa().amplifies
    True
    """

    def begin(self) -> History:
        return _FoCa()
