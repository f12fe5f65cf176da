"""FORA: the blocks' residual again, computed anew every few steps (2407.01425)."""

from __future__ import annotations

import dataclasses

from fastdit.config import Count, register
from fastdit.step_cache.gates.interval import Interval
from fastdit.step_cache.policy import SkipPolicy


@register
@dataclasses.dataclass(frozen=True)
class FORA(Interval):
    """Compute every `interval`-th step, beginning with the first; the last computed residual stands in between.

    The paper keeps what attention and feed-forward give in each block; here it is what all blocks together add.

    Args:
        interval: steps from one computed step to the next, from 1 (all are computed).

    And what every step cache takes: `forecast`, `policy`, `per_image`, `scope`, `stage_change`.

    Raises:
        InvalidConfig: for other values.

    Paper: Selvaraju et al., FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, arXiv 2407.01425.

    >>> FORA(3).forecast
    Reuse()
    """

    interval: Count = 3
    _: dataclasses.KW_ONLY
    policy: SkipPolicy = dataclasses.field(default_factory=lambda: SkipPolicy(first=1, last=0))
