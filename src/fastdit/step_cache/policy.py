"""SkipPolicy: the steps that every step cache computes whatever its gate says."""

from __future__ import annotations

import dataclasses
import math

from fastdit.config import is_count, is_number, register
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext


@register
@dataclasses.dataclass(frozen=True)
class SkipPolicy:
    """Which steps are computed whatever the gate says.

    The first `first` and last `last` steps of a run, steps outside `window` (two shares of the run, 0 to 1), any step
    after `max_consecutive` skipped ones in a row, and all steps once `max_skipped` were skipped in the stage. The first
    step of a stage is always computed where there is no history to skip on. Raises `InvalidConfig` for other values.

    Steps count the run's forwards of one branch: a scheduler of second order makes two for each of its steps. Where two
    denoisers share a run, `first` is at the start of the first one's share and `last` at the end of the second one's; a
    denoiser's own first step is computed for want of a history.
    """

    first: int = 1
    last: int = 1
    max_consecutive: int | None = None
    max_skipped: int | None = None
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not is_count(self.first) or not is_count(self.last):
            raise InvalidConfig(f"SkipPolicy counts steps: first and last are whole numbers from 0, got {self}")
        for name in ("max_consecutive", "max_skipped"):
            value = getattr(self, name)
            if value is not None and not is_count(value, 1):
                raise InvalidConfig(f"{name} must be at least 1 or None, got {value!r}")
        if not isinstance(self.window, (tuple, list)) or len(self.window) != 2 or not all(map(is_number, self.window)):
            raise InvalidConfig(f"window is two shares of the run such as (0.2, 0.9), got {self.window!r}")
        object.__setattr__(self, "window", tuple(float(share) for share in self.window))
        if not 0.0 <= self.window[0] < self.window[1] <= 1.0:
            raise InvalidConfig(f"window is a rising pair of shares from 0 to 1, got {self.window!r}")

    def forced(self, context: StepContext, consecutive: int, skipped: int) -> str | None:
        """Say why a step must be computed after that many skips (in a row; in the stage), or None."""
        if context.forced is not None:
            return context.forced
        if context.step < self.first:
            return "first steps"
        if context.step >= context.total_steps - self.last:
            return "last steps"
        if not self._inside(context.step, context.total_steps):
            return "outside the window"
        if self.max_consecutive is not None and consecutive >= self.max_consecutive:
            return "most skips in a row"
        if self.max_skipped is not None and skipped >= self.max_skipped:
            return "most skips in a stage"
        return None

    def skippable(self, total_steps: int) -> int:
        """Count the steps of a run that are not forced beforehand (limits on skips in a row left aside)."""
        free = range(max(self.first, 1), total_steps - self.last)
        inside = sum(self._inside(step, total_steps) for step in free)
        return inside if self.max_skipped is None else min(inside, self.max_skipped)

    def _inside(self, step: int, total_steps: int) -> bool:
        """Whether a step lies in the window, whose ends are rounded to whole steps."""
        begin, end = (math.floor(share * total_steps + 0.5) for share in self.window)
        return begin <= step < end
