"""What the decisions of one forward led to, added up for its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdit.record import Outcome
from fastdit.step_cache.base import Verdict
from fastdit.step_cache.decision import GroupState


@dataclass
class Tally:
    """Adds up what the decisions of one forward led to."""

    saved: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    computed: int = 0
    reused: int = 0
    forecast: int = 0

    def add(self, verdicts: Sequence[Verdict], groups: Sequence[GroupState], segment: int) -> None:
        """Count what was decided for each group."""
        for verdict, group in zip(verdicts, groups, strict=True):
            if verdict.compute:
                self.computed += 1
            elif group.histories[segment].extrapolates:
                self.forecast += 1
            else:
                self.reused += 1
        if len(verdicts) == 1:
            self.reasons.append(verdicts[0].reason)
        else:
            kinds = dict.fromkeys(verdict.reason for verdict in verdicts)
            self.reasons.append(next(iter(kinds)) if len(kinds) == 1 else "; ".join(v.reason for v in verdicts))

    def outcome(self, tokens: int | None) -> Outcome:
        """Give the sum."""
        return Outcome(self.action, "; ".join(self.reasons) or "no block was called", self.saved, tokens)

    @property
    def action(self) -> str:
        """`computed`, `reused` or `forecast` where all that was decided agrees; `partial` where it does not."""
        if self.computed:
            return "partial" if self.reused or self.forecast else "computed"
        if self.forecast:
            return "forecast"
        return "reused" if self.reused else "computed"
