"""SeaCache: TeaCache's rule on a signal from which the noise's share of the spectrum is taken (arXiv 2602.18993).

    g(f) = a S(f) / (a^2 S(f) + b^2),   S(f) = 1 / (|f|^beta + eps),   a = 1 - sigma,  b = sigma
    s_t = the tokens' frame, filtered by g along rows and columns, g scaled to mean 1
    acc += mean|s_t - s_(t-1)| / mean|s_(t-1)|;   compute (and set acc = 0) where acc >= threshold

g is the Wiener gain for a signal whose power falls as |f|^-beta in noise of level sigma, so what is compared is what
the step can know of the picture. The frame is that of the tokens as they enter the blocks, which is linear in the
latents. No calibration. It needs the rows and columns of the tokens and the noise levels of a scheduler.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import ClassVar

import torch

from fastdit.accelerator import Need
from fastdit.config import is_number, register
from fastdit.errors import InvalidConfig
from fastdit.layout import TokenLayout
from fastdit.step import StepContext
from fastdit.step_cache.base import (
    Memory,
    Site,
    StepCache,
    Verdict,
)
from fastdit.step_cache.policy import SkipPolicy

_EPSILON = 1e-16


@register
@dataclasses.dataclass(frozen=True)
class SeaCache(StepCache):
    """Skip steps until the accumulated change of the filtered tokens reaches `threshold` (published .25 to .3).

    `power` is beta, 2 for pictures. Raises `InvalidConfig` in a run without noise levels.
    """

    threshold: float = 0.25
    _: dataclasses.KW_ONLY
    power: float = 2.0
    policy: SkipPolicy = dataclasses.field(default_factory=lambda: SkipPolicy(max_consecutive=2))

    needs: ClassVar = frozenset({Need.BLOCK_LISTS, Need.TOKEN_GRID, Need.WHOLE_FRAME})
    scopes: ClassVar = ("stack",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold) or self.threshold < 0.0:
            raise InvalidConfig(f"SeaCache's threshold is an accumulated change of at least 0, got {self.threshold!r}")
        if not is_number(self.power) or self.power <= 0.0:
            raise InvalidConfig(f"SeaCache's power is the exponent of a spectrum, above 0, got {self.power!r}")

    @property
    def neutral(self) -> bool:
        return self.threshold == 0.0

    def signal(self, site: Site) -> torch.Tensor | None:
        if site.sigma is None or site.layout is None:
            raise InvalidConfig(
                "SeaCache filters by the noise level on the tokens' grid, and this run has none; use it with a "
                "pipeline that has a scheduler, or use FirstBlockCache"
            )
        return filtered(frame(site.entered, site.layout), float(site.sigma), self.power)

    def remember(self, memory: Memory, signal: torch.Tensor, computed: bool) -> None:
        memory.signal = signal

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        memory.accumulated += change
        reason = f"change {change:.4f}, accumulated {memory.accumulated:.4f}"
        return Verdict(memory.accumulated >= self.threshold, reason)


def frame(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Lay tokens [B, N, C] out as a frame [B, rows, columns, C]; all cells are filled from a mixed or sparse layout."""
    tokens = tokens[:, : layout.tokens]
    if not layout.uniform:
        tokens = layout.to_raster(layout.complete(tokens))
    return tokens.reshape(len(tokens), *(layout.grid or (layout.rows, layout.columns)), -1)


def filtered(frames: torch.Tensor, sigma: float, power: float) -> torch.Tensor:
    """Filter frames [B, H, W, C] along H and W, in float32.

    The gain is a product of one along each axis, so that the filter is a small matrix along each: less work than the
    transforms of a whole frame, for as many tokens as a side has.
    """
    sigma = min(max(sigma, 1e-6), 1.0 - 1e-6)
    height, width = frames.shape[1:3]
    rows = _responses(height, sigma, power, frames.device)
    columns = rows if width == height else _responses(width, sigma, power, frames.device)
    return (rows @ (columns @ frames.float()).flatten(2)).view(frames.shape)


@lru_cache(maxsize=128)  # two small matrices a step, the same ones in every run of a schedule
def _responses(length: int, sigma: float, power: float, device: torch.device) -> torch.Tensor:
    """What the filter along one axis makes of an impulse at each place, [length, length]."""
    frequencies: torch.Tensor = torch.fft.rfftfreq(length, device=device)
    clean = 1.0 / (frequencies**power + _EPSILON)
    signal = 1.0 - sigma
    gain = signal * clean / (signal**2 * clean + sigma**2)
    spectra = torch.fft.rfft(torch.eye(length, device=device))
    responses: torch.Tensor = torch.fft.irfft(spectra * gain, n=length)
    return responses / responses[0, 0]  # an impulse keeps the mean of the gain at its own place
