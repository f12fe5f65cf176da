"""DuCa: aggressive and careful caching by turns (2412.18911)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastdit.accelerator import Change
from fastdit.config import AtLeastZero, register
from fastdit.step import StepContext
from fastdit.token_cache.base import COMPUTED, PARTIAL, REUSED
from fastdit.token_cache.scores import Score, ScoredTokens


@register
@dataclasses.dataclass(frozen=True)
class DuCa(ScoredTokens):
    """Alternate between steps that skip every block and steps that recompute the `ratio` of image tokens.

        full, reused, partial, reused, partial, ..., full        one cycle of `interval` steps

    At a reused step no block runs: each adds the residual that it had when it last ran. A partial step recomputes some
    tokens as in `ToCa` and renews the residuals. Tokens are chosen at random, which the paper finds as good as any
    score. `ScoredTokens` has the formulas and all parameters.

    Args:
        interval: steps from one full step to the next, from 1 (all are full).
        ratio: the share of tokens that partial steps recompute, 0 to 1.
        score: what a token is worth: output_norm, value_norm, attention, text, random or age.
        age_weight: the weight of the time since a token was recomputed, at least 0.

    Raises:
        InvalidConfig: for other values.
        UnsupportedModel: for a model whose blocks' parts aren't described.

    Paper: Zou et al., Accelerating Diffusion Transformers with Dual Feature Caching, arXiv 2412.18911.

    >>> DuCa(5).score
    'random'
    """

    score: Score = "random"
    _: dataclasses.KW_ONLY
    age_weight: AtLeastZero = 0.0

    changes: ClassVar = frozenset({Change.STEP_ORDER})
    reuses_blocks: ClassVar[bool] = True

    def phase(self, context: StepContext, since: int) -> str:
        if since >= self.interval_at(context):
            return COMPUTED
        return REUSED if since % 2 else PARTIAL
