"""RALU's own lift: noisy tokens are copied to their four children, and correlated noise makes them independent again.

See `renoise` for the algebra. The paper (arXiv 2507.08422) calls it a nearest-neighbour upsampling; its
code copies whole tokens, the 2 x 2 latent pixels of one tiled four times, as here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fastdit.config import register
from fastdit.errors import InvalidConfig
from fastdit.layout import MixedLayout, gather_tokens
from fastdit.schedule import matching
from fastdit.schedule.lifts import renoise
from fastdit.schedule.lifts.base import Lift, Switch


@register
@dataclasses.dataclass(frozen=True)
class TokenCopy(Lift):
    """Copies noisy tokens and re-noises them to an earlier time.

    From the time e back to s, with Z = e (1 - s) / (s (1 - e)) and z noise of the covariance I - J / Z^2 among the four
    copies of a token,

        y = (x_e + Z (1 - e) z) / (Z (1 - e) + e)

    for which Z must be at least 2. Costs nothing, and takes back what the coarse stage had composed after s.

    Raises:
        InvalidConfig: from `check`, for times that are too close to each other.

    Paper: Jeong et al., Upsample What Matters: Region-Adaptive Latent Sampling for Accelerated Diffusion
    Transformers, arXiv 2507.08422.

    >>> TokenCopy().check(ends=(0.5,), starts=(0.3,))
    """

    def check(self, ends: Sequence[float], starts: Sequence[float]) -> None:
        for end, start in zip(ends, starts, strict=True):
            if matching.restart_factor(end, start) < 2.0 - 1e-9:
                raise InvalidConfig(
                    f"TokenCopy can go back from the time {end} to {end / (2.0 - end):.3f} at the latest, where the "
                    f"noise's covariance still exists, and not to {start}; start earlier, or lift the clean estimate"
                )

    def __call__(self, switch: Switch) -> torch.Tensor:
        restart = matching.restart_factor(switch.end, switch.start)
        before, after = switch.before, switch.after
        refines = isinstance(after, MixedLayout)
        if refines:
            copied = gather_tokens(switch.latents, before.sources(after))
            groups = slice(after.spread, None)
        else:
            copied = before.complete(switch.latents)
            groups = slice(0, 4 * before.spread)
        noise = switch.draw(copied.shape, copied.device)
        tokens = renoise.renoise(copied.float(), noise, groups, switch.end, restart, exact=switch.exact)
        return tokens if refines else before.to_raster(tokens)
