"""DBCache: FirstBlockCache with several leading and trailing blocks in every block list, as cache-dit has it."""

from __future__ import annotations

import dataclasses

from fastdit.config import AtLeastZero, Count, Whole, register
from fastdit.step_cache.base import Scope
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.policy import SkipPolicy


@register
@dataclasses.dataclass(frozen=True)
class DBCache(FirstBlockCache):
    """Run the first and last blocks of every list, and the rest where the leading ones changed: F{leading}B{trailing}.

    The rule is that of `FirstBlockCache`; each block list decides for itself.

    Args:
        threshold: the relative change from which on the rest is computed, at least 0; 0 never skips.
        leading: how many blocks of each list always run and are compared, from 1 (cache-dit's F).
        trailing: how many blocks at the end of each list always run, from 0 (cache-dit's B).
        first: how many steps at the start are computed, from 0 (its W).
        max_consecutive: how many skips in a row are allowed, from 1, or None (its MC).
        max_skipped: how many skips in a stage are allowed, from 1, or None (its M).

    And what every step cache takes but `policy`: `forecast`, `per_image`, `scope`, `stage_change`.

    Raises:
        InvalidConfig: for other values, and in a run whose lists have too few blocks.

    >>> DBCache(0.08, 8, 0).policy
    SkipPolicy(first=8, last=0, max_consecutive=None, max_skipped=None, window=(0.0, 1.0))
    """

    threshold: AtLeastZero = 0.08
    leading: Count = 8
    trailing: Whole = 0
    _: dataclasses.KW_ONLY
    first: Whole = 8
    max_consecutive: Count | None = None
    max_skipped: Count | None = None
    scope: Scope = "list"
    policy: SkipPolicy = dataclasses.field(init=False, repr=False, default_factory=lambda: SkipPolicy(first=8, last=0))

    def check_values(self) -> None:
        super().check_values()
        policy = SkipPolicy(self.first, 0, max_consecutive=self.max_consecutive, max_skipped=self.max_skipped)
        object.__setattr__(self, "policy", policy)
