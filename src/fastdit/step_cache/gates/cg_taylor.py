"""CGTaylor: skip while the first block's output is predicted well, and predict the rest alike (2508.02240).

Differences from the paper: it predicts the last block's output, where here the residual of all blocks is predicted by
whichever forecaster is given; and the error is the ratio of means that all gates here take.
"""

from __future__ import annotations

import dataclasses

import torch

from fastdit.config import AtLeastZero, Count, Whole, register
from fastdit.step_cache.base import Memory, difference
from fastdit.step_cache.forecasters.base import Forecaster
from fastdit.step_cache.forecasters.taylor import Taylor
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.policy import SkipPolicy


@dataclasses.dataclass
class _Line(Memory):
    """The signal of the last computed step, its slope there, and the steps since."""

    slope: torch.Tensor | None = None
    since: int = 0


@register
@dataclasses.dataclass(frozen=True)
class CGTaylor(FirstBlockCache):
    """Skip the blocks while a line through the leading blocks' last computed outputs predicts this one's well.

        f_t = (leading blocks)(x_t) - x_t;   p_t = f_c + (t - c) (f_c - f_b) / (c - b);   b < c the last computed steps
        skip where mean|f_t - p_t| < threshold * mean|p_t|

    The error that the prediction makes where it can be seen stands for that of the forecast of the other blocks.

    Args:
        threshold: the relative error from which on a step is computed, at least 0; 0 never skips. It is not the
            paper's, which measures the error of the output and not of what the blocks add.
        leading: how many blocks always run and are compared, from 1.
        trailing: how many blocks at the end always run, from 0.
        forecast: by default the line through the last two computed residuals, as the gate's own prediction.
        policy: by default the first two steps and the last are computed: two are needed for a line.

    And what every step cache takes: `per_image`, `scope` ("stack" or "list"), `stage_change`.

    Raises:
        InvalidConfig: for other values, and in a run whose lists have too few blocks.

    Paper: Guan et al., Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor,
    arXiv 2508.02240.

    >>> CGTaylor(0.1).forecast
    Taylor(order=1)
    """

    threshold: AtLeastZero = 0.1
    _: dataclasses.KW_ONLY
    leading: Count = 1
    trailing: Whole = 0
    forecast: Forecaster = dataclasses.field(default_factory=lambda: Taylor(1))
    policy: SkipPolicy = dataclasses.field(default_factory=lambda: SkipPolicy(first=2))

    def memory(self) -> Memory:
        return _Line()

    def change(self, memory: Memory, signal: torch.Tensor) -> torch.Tensor | None:
        assert isinstance(memory, _Line)
        if memory.signal is None:
            return None
        predicted = memory.signal if memory.slope is None else memory.signal + memory.since * memory.slope
        return difference(signal, predicted)

    def remember(self, memory: Memory, signal: torch.Tensor, computed: bool) -> None:
        assert isinstance(memory, _Line)
        if computed:
            before, gap = memory.signal, memory.since
            memory.slope = None if before is None else (signal - before) / gap
            memory.signal, memory.since = signal, 0
        memory.since += 1
