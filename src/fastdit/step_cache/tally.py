"""What the decisions of one forward led to, added up for its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastdit.record import Outcome
from fastdit.step_cache.decision import GroupState
from fastdit.step_cache.site import Verdict

if TYPE_CHECKING:
    from fastdit.step_cache.base import StepCache


@dataclass
class Tally:
    """Adds up what the decisions of one forward led to."""

    saved: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    tokens: int | None = None
    computed: bool = False
    reused: bool = False
    forecast: bool = False

    def add(self, verdicts: Sequence[Verdict], groups: Sequence[GroupState], segment: int) -> None:
        """Note what was decided for each group."""
        for verdict, group in zip(verdicts, groups, strict=True):
            if verdict.compute:
                self.computed = True
            elif group.histories[segment].extrapolates:
                self.forecast = True
            else:
                self.reused = True
        if len(verdicts) == 1:
            self.reasons.append(verdicts[0].reason)
        else:
            kinds = dict.fromkeys(verdict.reason for verdict in verdicts)
            self.reasons.append(next(iter(kinds)) if len(kinds) == 1 else "; ".join(v.reason for v in verdicts))

    @property
    def outcome(self) -> Outcome:
        """The sum."""
        return Outcome(self.action, "; ".join(self.reasons) or "no block was called", self.saved, self.tokens)

    @property
    def action(self) -> str:
        """`computed`, `reused` or `forecast` where all that was decided agrees; `partial` where it does not."""
        if self.computed:
            return "partial" if self.reused or self.forecast else "computed"
        if self.forecast:
            return "forecast"
        return "reused" if self.reused else "computed"


class Gains:
    """What a cache gained over a run."""

    def __init__(self, cache: StepCache) -> None:
        self._cache = cache
        self._forwards = self._steps = self._skipped = 0

    def adding(self, tally: Tally, step: int) -> Outcome:
        """Add up one forward, and give what was done in it."""
        self._forwards += 1
        self._steps = max(self._steps, step + 1)
        self._skipped += tally.reused or tally.forecast
        return tally.outcome

    def idle(self) -> str | None:
        """Say why nothing was skipped in the run where something could have been; None where something was."""
        cache = self._cache
        if cache.neutral or self._skipped or not self._forwards or not cache.skippable(self._steps):
            return None
        return (
            f"{cache.describe()} skipped none of {self._forwards} forwards, so it gained nothing; raise its threshold, "
            "run more steps (few-step models have nothing to skip), or leave it out"
        )
