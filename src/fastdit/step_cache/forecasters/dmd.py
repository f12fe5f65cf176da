"""DMD: dynamic mode decomposition of the computed residuals."""

from __future__ import annotations

import dataclasses

import torch

from fastdit.config import is_count, register
from fastdit.errors import InvalidConfig
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
