"""DMD: dynamic mode decomposition of the computed residuals."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch

from fastdit.config import Range, register
from fastdit.step_cache.forecasters.base import Features, Forecaster, History


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
        companion = torch.diag(weights.new_ones(len(weights) - 1), 1)
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
        weighted = [[weight * x for x in features] for weight, features in zip(weights.tolist(), window, strict=True)]
        return [torch.stack(stream).sum(0) for stream in zip(*weighted, strict=True)]


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

        x_(m+k) = A^k x_m,   A the best x_(i+1) = A x_i for the snapshots x_1 .. x_m at equal gaps

    A is fitted in the snapshots' own span (a companion matrix, least squares through their Gram matrix), and the
    modulus of growing modes is held at one. It is exact for sums of fewer than m decaying exponentials; of fewer than
    three snapshots it extrapolates linearly. One small matrix is read from the device at each computed step.

    Args:
        snapshots: m, the number of computed steps that are kept, 3 to 8; each is a copy of the features.

    Raises:
        InvalidConfig: for other values.

    Paper: Schmid, Dynamic mode decomposition of numerical and experimental data, J. Fluid Mech. 656, 2010.

    >>> len(DMD(3).begin().kept)
    0
    """

    snapshots: Annotated[int, Range(at_least=3, at_most=8)] = 4

    def begin(self) -> History:
        return _Modes(self.snapshots)
