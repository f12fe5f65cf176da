"""A gate: skip the blocks while what enters them has moved little."""

from __future__ import annotations

import dataclasses

import torch

from fastdit.config import register
from fastdit.step import StepContext
from fastdit.step_cache.base import Memory, Site, Verdict
from fastdit.step_cache.gates.threshold import ThresholdGate


@register
@dataclasses.dataclass(frozen=True)
class LatentDrift(ThresholdGate):
    """Skip the blocks while the tokens that enter them are near those of the last computed step.

        skip where mean|h_t - h_c| < threshold * mean|h_c|,   c the last computed step

    Args:
        threshold: the relative change from which on a step is computed, at least 0; 0 never skips.
    """

    def signal(self, site: Site) -> torch.Tensor:
        return site.entered

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        return Verdict(change >= self.threshold, f"change {change:.4f}")
