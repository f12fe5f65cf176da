"""Published methods that are a gate with a forecaster: TaylorSeer, FORA and DBCache, by their own names."""

from __future__ import annotations

from fastdit.step_cache.forecasters.base import Forecaster
from fastdit.step_cache.forecasters.reuse import Reuse
from fastdit.step_cache.forecasters.taylor import PublishedTaylor
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.gates.step_mask import Interval
from fastdit.step_cache.policy import SkipPolicy


def TaylorSeer(interval: int = 4, order: int = 1, *, first: int = 3, per_image: bool = False) -> Interval:
    """Every `interval`-th step, TaylorSeer's extrapolation between (arXiv 2503.06923); the first 3 steps computed.

    It extrapolates the residual of the whole block stack, as the method's "Lite" form does.
    """
    return Interval(
        interval, forecast=PublishedTaylor(order), policy=SkipPolicy(first=first, last=0), per_image=per_image
    )


def FORA(interval: int = 3, *, per_image: bool = False) -> Interval:
    """Every `interval`-th step, the last residual between (arXiv 2407.01425)."""
    return Interval(interval, policy=SkipPolicy(first=1, last=0), per_image=per_image)


def DBCache(
    threshold: float = 0.08,
    leading: int = 8,
    trailing: int = 0,
    *,
    first: int = 8,
    max_consecutive: int | None = None,
    max_skipped: int | None = None,
    forecast: Forecaster | None = None,
    per_image: bool = False,
) -> FirstBlockCache:
    """First and last blocks always, the rest by the leading ones' change: cache-dit's F{leading}B{trailing}.

    Each block list decides for itself. `first` steps are computed. cache-dit's `W`, `MC` and `M` are `first`,
    `max_consecutive` and `max_skipped`.
    """
    return FirstBlockCache(
        threshold,
        leading=leading,
        trailing=trailing,
        scope="list",
        forecast=forecast if forecast is not None else Reuse(),
        policy=SkipPolicy(first=first, last=0, max_consecutive=max_consecutive, max_skipped=max_skipped),
        per_image=per_image,
    )
