"""FirstBlockCache: run the first block; if it did about the same as at the last computed step, skip the rest.

    f_t = block_0(x_t) - x_t;   skip where mean|f_t - f_c| < threshold * mean|f_c|,  c the last computed step

(ParaAttention's first-block cache; with more leading and trailing blocks, cache-dit's DBCache.) The comparison with
the last *computed* step is cumulative by nature. It needs no calibration and works on any model whose blocks can be
observed; a skipped step still costs the leading and the trailing blocks.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fastdit.config import is_count, is_number, register
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext
from fastdit.step_cache.base import (
    Memory,
    Site,
    StepCache,
    Verdict,
)


@register
@dataclasses.dataclass(frozen=True)
class FirstBlockCache(StepCache):
    """Skip the blocks after the `leading` ones while those change by less than `threshold` (relative, 0 = never).

    The last `trailing` blocks always run. With scope "list" both counts hold for every block list.
    """

    threshold: float = 0.1
    _: dataclasses.KW_ONLY
    leading: int = 1
    trailing: int = 0

    scopes: ClassVar = ("stack", "list")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold) or self.threshold < 0.0:
            raise InvalidConfig(
                f"FirstBlockCache's threshold is a relative change of at least 0, got {self.threshold!r}"
            )
        if not is_count(self.leading, 1) or not is_count(self.trailing):
            raise InvalidConfig(
                f"leading is a whole number of blocks from 1 and trailing one from 0, got {self.leading!r} and "
                f"{self.trailing!r}"
            )

    @property
    def neutral(self) -> bool:
        return self.threshold == 0.0

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
