"""Re-noising at a stage switch: copied tokens become indistinguishable from tokens of the flow at a noisier time.

Before the switch a group of copied tokens is N(e x, (1-e)^2 J) with J all ones: one noise, copied. The map

    y = a x_e + b z,   a = 1 / D,   b = Z (1-e) / D = 1 - s,   D = Z (1-e) + e,   s = e / D

with z ~ N(0, I - c J), c = 1/Z^2, gives N(s x, (1-s)^2 I): the flow's own marginal at time s. Tokens that are not
copied carry the variance (1-e)^2 already, so they need z ~ N(0, 1 - c); the published code gives them N(0, 1), which
leaves their variance too large by the factor 1 + c.
"""

from __future__ import annotations

import math

import torch


def coefficients(end: float, restart: float) -> tuple[float, float]:
    """Give (a, b), the weights of the old latents and of the new noise at a switch from time `end`."""
    scale = restart * (1.0 - end) + end
    return 1.0 / scale, restart * (1.0 - end) / scale


def correlate(noise: torch.Tensor, groups: slice, restart: float, *, exact: bool) -> torch.Tensor:
    """Give unit noise [B, N, C] the covariance of a switch; the tokens in `groups` are fours of siblings.

    A group w of four becomes w + (sqrt(1 - 4c) - 1) mean(w), whose covariance is I - cJ. The other tokens are scaled
    by sqrt(1 - c) where `exact`, and left alone otherwise.
    """
    correlation = 1.0 / restart**2
    result = noise * math.sqrt(1.0 - correlation) if exact else noise.clone()
    batch, _, channels = noise.shape
    siblings = noise[:, groups].reshape(batch, -1, 4, channels)
    mixed = siblings + (math.sqrt(max(1.0 - 4.0 * correlation, 0.0)) - 1.0) * siblings.mean(dim=2, keepdim=True)
    result[:, groups] = mixed.flatten(1, 2)
    return result


def renoise(
    latents: torch.Tensor, noise: torch.Tensor, groups: slice, end: float, restart: float, *, exact: bool
) -> torch.Tensor:
    """Move latents from the time `end` back to the restart time, in float32, and return them in their own dtype."""
    keep, add = coefficients(end, restart)
    moved = keep * latents.float() + add * correlate(noise.float(), groups, restart, exact=exact)
    return moved.to(latents.dtype)
