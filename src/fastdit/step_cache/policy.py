"""SkipPolicy: the steps that every step cache computes whatever its gate says."""

from __future__ import annotations

import dataclasses
import math

from fastdit.config import Config, Count, Share, Whole, register
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext


@register
@dataclasses.dataclass(frozen=True)
class SkipPolicy(Config):
    """Which steps are computed whatever the gate says.

    Steps count the run's forwards of one branch: a scheduler of second order makes two for each of its steps. Where two
    transformers share a run, `first` is at the start of the first one's share and `last` at the end of the second
    one's. A step without a history to skip on, such as the first one of a stage, is computed in any case.

    Args:
        first: how many steps at the start of a run are computed, from 0.
        last: how many steps at its end are computed, from 0.
        max_consecutive: how many steps in a row may be skipped, from 1, or None for any number.
        max_skipped: how many steps of a stage may be skipped, from 1, or None for any number.
        window: the part of the run outside of which all steps are computed, as a rising pair of shares from 0 to 1.

    Raises:
        InvalidConfig: for other values.

    >>> SkipPolicy(first=2, last=1).skippable(10)
    7
    """

    first: Whole = 1
    last: Whole = 1
    max_consecutive: Count | None = None
    max_skipped: Count | None = None
    window: tuple[Share, Share] = (0.0, 1.0)

    def check_values(self) -> None:
        super().check_values()
        if not self.window[0] < self.window[1]:
            raise InvalidConfig(f"SkipPolicy's window is a rising pair of shares from 0 to 1, got {self.window!r}")

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
        begin, end = self.window
        return math.floor(begin * total_steps + 0.5) <= step < math.floor(end * total_steps + 0.5)
