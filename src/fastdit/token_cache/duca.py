"""DuCa: aggressive and careful caching by turns (arXiv 2412.18911).

    full, reused, partial, reused, partial, ..., full        one cycle of `interval` steps

A reused step runs no block: each adds the residual that it had when it last ran. A partial step recomputes some tokens
as in ToCa and renews the residuals. Tokens are chosen at random, which the paper finds as good as any score.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastdit.accelerator import Change
from fastdit.config import register
from fastdit.step import StepContext
from fastdit.token_cache.base import COMPUTED, PARTIAL, REUSED
from fastdit.token_cache.scores import ScoredTokens


@register
@dataclasses.dataclass(frozen=True)
class DuCa(ScoredTokens):
    """Alternate between steps that skip every block and steps that recompute the `ratio` of image tokens."""

    score: str = "random"
    _: dataclasses.KW_ONLY
    age_weight: float = 0.0

    changes: ClassVar = frozenset({Change.STEP_ORDER})
    reuses_blocks: ClassVar[bool] = True

    def phase(self, context: StepContext, since: int) -> str:
        if since >= self.interval_at(context):
            return COMPUTED
        return REUSED if since % 2 else PARTIAL
