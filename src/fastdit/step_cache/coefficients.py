"""Coefficients: TeaCache's polynomials, published ones with their provenance and a user's own."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from fastdit.config import Range, register
from fastdit.errors import InvalidConfig
from fastdit.models.signals import SIGNAL_KINDS
from fastdit.step_cache.published import Measured


@register
@dataclasses.dataclass(frozen=True)
class Coefficients(Measured):
    """A polynomial P from the relative change of a model's signal to that of its output.

        P(d) = c_0 d^n + ... + c_n,   never below 0;   d is clamped into `signal_range`

    Args:
        values: c_0 .. c_n, the highest power first.
        signal_range: the smallest and the largest d that it was fitted on; None where that was not published.
        provenance: who fitted it, on which model and on what.
        signal: what it was fitted on, and is valid for nothing else: a key of `fastdit.models.signals.SIGNAL_KINDS`.

    Raises:
        InvalidConfig: for other values.

    >>> Coefficients((2.0, 0.5), signal_range=(0.1, 0.3))(0.2)
    0.9
    """

    values: Annotated[tuple[float, ...], Range(at_least=1)]
    signal_range: tuple[float, float] | None = None
    provenance: str = "given by the user"
    signal: str = "modulated"

    table: ClassVar = "coefficients.json"
    what: ClassVar = "coefficients"
    measured_by: ClassVar = "calibrate_teacache"
    absent: ClassVar = {"signal": "modulated"}

    def check_values(self) -> None:
        super().check_values()
        if self.signal_range is not None and self.signal_range[0] > self.signal_range[1]:
            raise InvalidConfig(f"Coefficients' signal_range is a rising pair, got {self.signal_range!r}")
        if self.signal not in SIGNAL_KINDS:
            raise InvalidConfig(f"a polynomial's signal is one of {', '.join(SIGNAL_KINDS)}, got {self.signal!r}")

    def __call__(self, change: float) -> float:
        """Evaluate max(P(change), 0) with the change clamped into the calibrated range."""
        if self.signal_range is not None:
            change = min(max(change, self.signal_range[0]), self.signal_range[1])
        result = 0.0
        for value in self.values:
            result = result * change + value
        return max(result, 0.0)
