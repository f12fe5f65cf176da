"""TeaCache's polynomials: published sets with their provenance, and the one type that carries them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastdit.config import is_number, register
from fastdit.errors import InvalidConfig
from fastdit.models.signals import SIGNAL_KINDS
from fastdit.step_cache import published

_TABLE = "coefficients.json"


@register
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """A polynomial P (highest power first) from the signal's relative change to the output's.

    `signal_range` is the range of changes that it was fitted on: inputs are clamped into it. None where it was not
    published; then only P itself is kept from going negative. `signal` is what it was fitted on, and is valid for
    nothing else: a key of `fastdit.models.signals.SIGNAL_KINDS`.
    """

    values: tuple[float, ...]
    signal_range: tuple[float, float] | None = None
    provenance: str = "given by the user"
    signal: str = "modulated"

    def __post_init__(self) -> None:
        if not self.values or not all(is_number(value) for value in self.values):
            raise InvalidConfig(f"a polynomial is one or more finite numbers, highest power first, got {self.values!r}")
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if self.signal_range is not None:
            numbers = [float(value) for value in self.signal_range if is_number(value)]
            if len(self.signal_range) != 2 or len(numbers) != 2 or numbers[0] > numbers[1]:
                raise InvalidConfig(f"signal_range is a rising pair of finite numbers, got {self.signal_range!r}")
            object.__setattr__(self, "signal_range", tuple(numbers))
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

    def save(self, path: str | Path) -> None:
        """Write the polynomial with its provenance as JSON."""
        published.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Coefficients:
        """Read what `save` wrote; a file without a signal is of the modulated input. Raises `InvalidConfig`."""
        return cls(**published.load(cls, path, "TeaCache coefficients", {"signal": "modulated"}))


def named(name: str) -> Coefficients:
    """Get a published set by its name. Raises `InvalidConfig` for an unknown one."""
    entry = published.entry(_TABLE, name, "coefficients")
    return Coefficients(tuple(entry["coefficients"]), entry["signal_range"], entry["provenance"], entry["signal"])


def for_model(transformer: Any) -> Coefficients:
    """Find the set that was fitted on this very model, by the name it was loaded under.

    Raises `InvalidConfig` where there is none: another model's numbers are never used unasked.
    """
    source = published.source_of(transformer)
    name = published.name_for(_TABLE, source)
    if name is not None:
        return named(name)
    raise InvalidConfig(
        f"TeaCache has no coefficients for {type(transformer).__name__} loaded as {source or 'an unnamed model'}; "
        "fit them with fastdit.measure.calibration.calibrate_teacache(pipe, prompts), or name a published set with "
        f"coefficients=... ({', '.join(published.entries(_TABLE))}) if this model is a fine-tune of that one"
    )
