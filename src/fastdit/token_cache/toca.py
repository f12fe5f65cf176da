"""ToCa: recompute, inside each block, only the tokens on which caching would do most harm (arXiv 2410.05317).

Every `interval`-th step is full. At the others each block takes its attention from the cache and runs its feed-forward
on the K tokens with the highest score: the token's weight in attention, the time since it was last recomputed, and a
bonus that spreads the choice over the picture (`fastdit.token_cache.scores` has the formulas).

    N_t = round(N / f(interval_slope, t / T))      the gap between full steps, longer or shorter as the run goes on

Differences from the paper: the default score is the norm of the attention's output, for which fused attention can be
used; `score="attention"` and `score="text"` are the paper's, which need the attention map. The tokens of the text are
taken from the cache at partial steps, where they can change no image token.
"""

from __future__ import annotations

import dataclasses

from fastdit.config import register
from fastdit.token_cache.scores import ScoredTokens


@register
@dataclasses.dataclass(frozen=True)
class ToCa(ScoredTokens):
    """Recompute the `ratio` of image tokens with the highest score between full steps, fewer in later blocks.

    `spatial_bonus` is given in stages whose tokens form a plain grid; a stage of mixed resolution goes without and
    says so.
    """

    _: dataclasses.KW_ONLY
    layer_slope: float = 0.5
