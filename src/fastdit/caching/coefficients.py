"""TeaCache's polynomials: published sets with their provenance, and the one type that carries them."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from fastdit.accelerator import is_number, register
from fastdit.errors import InvalidConfig


@register
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """A degree-4 polynomial P (highest power first) from the signal's relative change to the output's.

    `signal_range` is the range of changes that it was fitted on: inputs are clamped into it. None where it was not
    published; then only P itself is kept from going negative.
    """

    values: tuple[float, ...]
    signal_range: tuple[float, float] | None = None
    provenance: str = "given by the user"

    def __post_init__(self) -> None:
        if not self.values or not all(is_number(value) for value in self.values):
            raise InvalidConfig(f"a polynomial is one or more finite numbers, highest power first, got {self.values!r}")
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if self.signal_range is not None:
            numbers = [float(value) for value in self.signal_range if is_number(value)]
            if len(self.signal_range) != 2 or len(numbers) != 2 or numbers[0] > numbers[1]:
                raise InvalidConfig(f"signal_range is a rising pair of finite numbers, got {self.signal_range!r}")
            object.__setattr__(self, "signal_range", tuple(numbers))

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
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Coefficients:
        """Read what `save` wrote. Raises `InvalidConfig` for anything else."""
        try:
            data = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise InvalidConfig(f"{path} is not JSON: {error}; write it with Coefficients.save") from error
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise InvalidConfig(f"{path} does not hold TeaCache coefficients: expected the fields {sorted(names)}")
        return cls(**data)


@lru_cache(maxsize=1)
def _published() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath("coefficients.json").read_text(encoding="utf-8")
    published: dict[str, dict[str, Any]] = json.loads(text)
    return published


def named(name: str) -> Coefficients:
    """Get a published set by its name. Raises `InvalidConfig` for an unknown one."""
    if name not in _published():
        raise InvalidConfig(f"no coefficients are named {name!r}; the published sets are {', '.join(_published())}")
    entry = _published()[name]
    return Coefficients(tuple(entry["coefficients"]), entry["signal_range"], entry["provenance"])


def for_model(transformer: Any) -> Coefficients:
    """Find the set that was fitted on this very model, by the name it was loaded under.

    Raises `InvalidConfig` where there is none: another model's numbers are never used unasked.
    """
    config = getattr(transformer, "config", {})
    source = str(config.get("_name_or_path", "") or "") if hasattr(config, "get") else ""
    parts = source.replace("\\", "/").lower().split("/")
    for name, entry in _published().items():
        if any(model.lower() in parts for model in entry["models"]):
            return named(name)
    raise InvalidConfig(
        f"TeaCache has no coefficients for {type(transformer).__name__} loaded as {source or 'an unnamed model'}; "
        "fit them with fastdit.measure.calibration.calibrate_teacache(pipe, prompts), or name a published set with "
        f"coefficients=... ({', '.join(_published())}) if this model is a fine-tune of that one"
    )
