"""ToCa: recompute, inside each block, only the tokens on which caching would do most harm (2410.05317).

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
    """Recompute between full steps the `ratio` of image tokens with the highest score, fewer in later blocks.

        full, partial, ..., partial, full        one cycle of `interval` steps

    At a partial step each block takes its attention from the cache and runs its feed-forward on the tokens with the
    highest score: the token's weight in attention, the time since it was last recomputed, and a bonus that spreads the
    choice over the picture. `ScoredTokens` has the formulas and all parameters.

    Args:
        interval: steps from one full step to the next, from 1 (all are full).
        ratio: the share of tokens that partial steps recompute, 0 to 1.
        score: what a token is worth: output_norm, value_norm, attention, text, random or age.
        layer_slope: how much more (above 0) the first blocks recompute than the last.

    Raises:
        InvalidConfig: for other values.
        UnsupportedModel: for a model whose blocks' parts aren't described.

    Paper: Zou et al., Accelerating Diffusion Transformers with Token-wise Feature Caching, arXiv 2410.05317.

    >>> ToCa(4, ratio=0.2).describe()
    "ToCa(interval=4, ratio=0.2, score='output_norm')"
    """

    _: dataclasses.KW_ONLY
    layer_slope: float = 0.5
