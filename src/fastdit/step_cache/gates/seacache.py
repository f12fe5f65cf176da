"""SeaCache: TeaCache's rule on a signal from which the noise's share of the spectrum is taken (2602.18993).

What is filtered is the grid of the tokens as they enter the blocks, which is linear in the latents.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import ClassVar

import torch

from fastdit.accelerator import Need
from fastdit.config import AtLeastZero, Positive, register
from fastdit.errors import InvalidConfig
from fastdit.layout import TokenLayout
from fastdit.step_cache.base import Site
from fastdit.step_cache.gates.threshold import AccumulatingGate
from fastdit.step_cache.policy import SkipPolicy

_EPSILON = 1e-16


@register
@dataclasses.dataclass(frozen=True)
class SeaCache(AccumulatingGate):
    """Skip steps until the change of the denoised tokens has added up to `threshold`.

        g(f) = a S(f) / (a^2 S(f) + b^2),   S(f) = 1 / (|f|^beta + eps),   a = 1 - sigma,  b = sigma
        s_t = the tokens' grid, filtered by g along rows and columns, g scaled to mean 1
        acc += mean|s_t - s_(t-1)| / mean|s_(t-1)|;   compute (and set acc = 0) where acc >= threshold

    g is the Wiener gain for a signal whose power falls as |f|^-beta in noise of level sigma, so what is compared is
    what the step can know of the picture. No calibration.

    Args:
        threshold: the sum of relative changes at which a step is computed, at least 0; 0 never skips. Published values
            lie between .25 and .3, larger ones skip more.
        power: beta, the exponent of the spectrum, above 0; 2 for pictures.
        policy: by default every third step is computed at least.

    And what every step cache takes: `forecast`, `per_image`, `stage_change`; one decision rules all blocks.

    Raises:
        InvalidConfig: for other values, and in a run without noise levels or without rows and columns of tokens.

    Paper: arXiv 2602.18993.

    >>> SeaCache(0.3).policy.max_consecutive
    2
    """

    threshold: AtLeastZero = 0.25
    _: dataclasses.KW_ONLY
    power: Positive = 2.0
    policy: SkipPolicy = dataclasses.field(default_factory=lambda: SkipPolicy(max_consecutive=2))

    needs: ClassVar = frozenset({Need.TOKEN_GRID, Need.WHOLE_FRAME})
    scopes: ClassVar = ("stack",)

    def signal(self, site: Site) -> torch.Tensor | None:
        if site.sigma is None or site.layout is None:
            raise InvalidConfig(
                "SeaCache filters by the noise level on the tokens' grid, and this run has none; use it with a "
                "pipeline that has a scheduler, or use FirstBlockCache"
            )
        return filtered(on_grid(site.entered, site.layout), site.sigma, self.power)


def on_grid(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Lay tokens [B, N, C] out as a grid [B, rows, columns, C]; all cells are filled from a mixed or sparse layout."""
    tokens = tokens[:, : layout.tokens]
    if not layout.uniform:
        tokens = layout.to_raster(layout.complete(tokens))
    return tokens.reshape(len(tokens), *(layout.grid or (layout.rows, layout.columns)), -1)


def filtered(grids: torch.Tensor, sigma: float, power: float) -> torch.Tensor:
    """Filter grids [B, H, W, C] along H and W, in float32.

    The gain is a product of one along each axis, so that the filter is a small matrix along each: less work than the
    transforms of a whole grid, for as many tokens as a side has.
    """
    sigma = min(max(sigma, 1e-6), 1.0 - 1e-6)
    height, width = grids.shape[1:3]
    rows = _responses(height, sigma, power, grids.device)
    columns = rows if width == height else _responses(width, sigma, power, grids.device)
    return (rows @ (columns @ grids.float()).flatten(2)).view(grids.shape)


@lru_cache(maxsize=128)  # two small matrices a step, the same ones in every run of a schedule
def _responses(length: int, sigma: float, power: float, device: torch.device) -> torch.Tensor:
    """What the filter along one axis makes of an impulse at each place, [length, length]."""
    frequencies: torch.Tensor = torch.fft.rfftfreq(length, dtype=torch.float32, device=device)
    clean = 1.0 / (frequencies**power + _EPSILON)
    signal = 1.0 - sigma
    gain = signal * clean / (signal**2 * clean + sigma**2)
    spectra = torch.fft.rfft(torch.eye(length, dtype=torch.float32, device=device))
    responses: torch.Tensor = torch.fft.irfft(spectra * gain, n=length)
    return responses / responses[0, 0]  # an impulse keeps the mean of the gain at its own place
