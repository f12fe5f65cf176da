"""RALU's settings: what a recipe says, our presets, the published ones, and what no recipe may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

from fastdit.config import is_count, is_number
from fastdit.errors import InvalidConfig
from fastdit.schedule.lifts.base import Lift
from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.lifts.token_copy import TokenCopy
from fastdit.schedule.staged import is_time, rising

_FLUX, _SD3 = "FLUX.1", "Stable Diffusion 3"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of `RALU`, one value a stage or a switch; `family` names the models that a preset is for."""

    steps: tuple[int, ...]
    ends: tuple[float, ...]
    ratio: float | None = None
    starts: tuple[float, ...] | None = None
    lift: Lift = dataclasses.field(default_factory=TokenCopy)
    shifts: tuple[float, ...] | None = None
    family: str | None = dataclasses.field(default=None, compare=False)

    def check(self, restart: float | None, base_shift: float, fidelity: str) -> None:
        """Raise `InvalidConfig` where the settings, or what `RALU` takes beside them, contradict each other."""
        steps, ends, starts = self.steps, self.ends, self.starts
        if not isinstance(steps, tuple) or len(steps) not in (2, 3) or not all(is_count(count, 1) for count in steps):
            raise InvalidConfig(f"RALU needs two or three step counts of at least 1, got steps={steps!r}")
        if not rising(ends, len(steps) - 1):
            raise InvalidConfig(
                f"{len(steps)} stages need {len(steps) - 1} end time{'s that rise' if len(steps) == 3 else ''} "
                f"between 0 and 1, got ends={ends!r}"
            )
        if len(steps) == 3 and (not is_number(self.ratio) or not 0.0 < cast(float, self.ratio) < 1.0):
            raise InvalidConfig(
                f"a mixed stage refines a share of tokens between 0 and 1 (exclusive), got ratio={self.ratio!r}"
            )
        if len(steps) == 2 and self.ratio is not None:
            raise InvalidConfig(
                f"two stages have none between them that would refine a share, got ratio={self.ratio!r}"
            )
        if restart is not None and not (is_number(restart) and restart >= 2.0):
            raise InvalidConfig(f"restart must be at least 2 for the noise's covariance to exist, got {restart!r}")
        if starts is not None:
            if restart is not None:
                raise InvalidConfig("starts and restart both say where stages start; give one of them")
            if not isinstance(starts, tuple) or len(starts) != len(ends) or not all(map(is_time, starts)):
                raise InvalidConfig(f"{len(ends)} switches need as many start times between 0 and 1, got {starts!r}")
            self.lift.check(ends, starts)
        shifts = self.shifts
        positive = isinstance(shifts, tuple) and all(is_number(shift) and shift > 0.0 for shift in shifts)
        if shifts is not None and (not positive or len(shifts) != len(steps)):
            raise InvalidConfig(f"{len(steps)} stages need as many timestep shifts above 0, got shifts={shifts!r}")
        if shifts is not None and starts is None:
            raise InvalidConfig("shifts say how stages with known starts are spaced; give starts beside them")
        if not is_number(base_shift) or base_shift <= 0.0:
            raise InvalidConfig(f"base_shift must be positive, got {base_shift!r}")
        if fidelity not in ("exact", "paper"):
            raise InvalidConfig(f'fidelity is "exact" or "paper", got {fidelity!r}')


def _whole(steps: tuple[int, int], shifts: tuple[float, float], family: str, start: float = 0.15) -> Recipe:
    return Recipe(steps, (0.50,), None, (start,), PixelLift(), shifts, family)


#: The settings by how many times fewer FLOPs they cost than 50 steps (28 of SD3), each for its family of models. The
#: first stage has the family's own shift at half the size; the last one steps more evenly than plain sampling does.
PRESETS = {
    "4x": _whole((22, 6), (2.0, 0.6), _FLUX),
    "5x": _whole((20, 4), (2.0, 0.8), _FLUX),
    "7x": _whole((14, 3), (2.0, 1.2), _FLUX),
    "10x": _whole((10, 2), (2.0, 1.2), _FLUX, start=0.20),
    "14x": _whole((5, 2), (2.0, 1.2), _FLUX, start=0.20),
    "2x": _whole((28, 6), (3.0, 0.4), _SD3),
    "3x": _whole((20, 4), (3.0, 0.6), _SD3),
    "6x": _whole((7, 3), (3.0, 0.6), _SD3),
    "9x": _whole((5, 2), (3.0, 1.0), _SD3, start=0.20),
}

#: The published settings.
PAPER = {
    "4x": Recipe((5, 6, 7), (0.30, 0.45), 0.3, family=_FLUX),
    "5x": Recipe((4, 5, 6), (0.30, 0.45), 0.2, family=_FLUX),
    "7x": Recipe((2, 3, 5), (0.20, 0.30), 0.1, family=_FLUX),
    "2x": Recipe((5, 6, 9), (0.20, 0.30), 0.3, family=_SD3),
    "3x": Recipe((3, 3, 6), (0.25, 0.30), 0.2, family=_SD3),
}


def listed(recipes: Mapping[str, Recipe]) -> str:
    """Name recipes with the models that each is for."""
    return ", ".join(f"{name} ({recipe.family})" for name, recipe in recipes.items())
