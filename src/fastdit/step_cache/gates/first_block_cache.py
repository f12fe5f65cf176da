"""FirstBlockCache: run the first block; if it did about the same as at the last computed step, skip the rest.

This is the first-block cache of ParaAttention and of diffusers. The comparison with the last *computed* step is
cumulative by nature. A skipped step still costs the leading and the trailing blocks.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fastdit.config import AtLeastZero, Count, Whole, register
from fastdit.step import StepContext
from fastdit.step_cache.base import Memory, Site, Verdict
from fastdit.step_cache.gates.threshold import ThresholdGate


@register
@dataclasses.dataclass(frozen=True)
class FirstBlockCache(ThresholdGate):
    """Skip the blocks between the leading and the trailing ones while the leading ones' output changes little.

        f_t = (leading blocks)(x_t) - x_t;   skip where mean|f_t - f_c| < threshold * mean|f_c|

    c is the last computed step. It needs no calibration and works on any model whose blocks can be observed.

    Args:
        threshold: the relative change from which on a step is computed, at least 0; 0 never skips. Usual values lie
            between .05 and .3, larger ones skip more.
        leading: how many blocks always run and are compared, from 1.
        trailing: how many blocks at the end always run, from 0.
        scope: "stack" takes one decision for all blocks that follow; "list" one at the start of each block list, for
            which both counts then hold.

    And what every step cache takes: `forecast`, `policy`, `per_image`, `stage_change`.

    Raises:
        InvalidConfig: for other values, and in a run whose lists have too few blocks.

    >>> FirstBlockCache(0.1, leading=2).leading_blocks
    2
    """

    threshold: AtLeastZero = 0.1
    _: dataclasses.KW_ONLY
    leading: Count = 1
    trailing: Whole = 0

    scopes: ClassVar = ("stack", "list")

    @property
    def leading_blocks(self) -> int:
        return self.leading

    @property
    def trailing_blocks(self) -> int:
        return self.trailing

    def signal(self, site: Site) -> torch.Tensor | None:
        return site.hidden_states - site.entered

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        return Verdict(not change < self.threshold, f"change {change:.4f}")
