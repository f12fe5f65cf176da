"""Canny's edges on the device, pixel for pixel those of OpenCV's `Canny` with an aperture of 3 and its L1 norm.

Sobel        dx, dy: the picture's border repeated
magnitude    m = |dx| + |dy|; 0 outside of the picture
thinning     a pixel stays where m is a peak along its gradient, which is taken as one of four directions
hysteresis   a pixel of m > high is an edge, and so is one of m > low that touches an edge
"""

from __future__ import annotations

import torch
from torch.nn import functional

_TAN_22 = 13573  # tan(22.5 degrees) in steps of 2**-15, as OpenCV rounds it; tan(67.5 degrees) is this plus 2
_SHIFT = 15

_AT_ONCE = 32  # pixels that edges grow along before the first look at whether they still do, which waits


def canny(shades: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Find the edges of pictures in grey, uint8 [B, H, W]: bool [B, H, W], on their device."""
    padded = functional.pad(shades[:, None].float(), (1, 1, 1, 1), mode="replicate")[:, 0].int()
    across, down = _smooth(padded, dim=1), _smooth(padded, dim=2)
    dx, dy = across[..., 2:] - across[..., :-2], down[:, 2:] - down[:, :-2]
    magnitude = dx.abs() + dy.abs()
    peaks = _peaks(dx, dy, magnitude) & (magnitude > low)
    return _grown(peaks & (magnitude > high), peaks)


def _smooth(padded: torch.Tensor, dim: int) -> torch.Tensor:
    """Weigh neighbours along a dimension by 1, 2, 1; the two at the ends are left out."""
    size = padded.shape[dim] - 2
    before, here, after = (padded.narrow(dim, start, size) for start in range(3))
    return before + 2 * here + after


def _peaks(dx: torch.Tensor, dy: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Whether each pixel's magnitude is above those before and behind it along its gradient.

    Along a row or a column the pixel behind may be as high, so that of two equal ones the later stays.
    """
    height, width = magnitude.shape[1:]
    padded = functional.pad(magnitude, (1, 1, 1, 1))

    def beside(rows: int, columns: int) -> torch.Tensor:
        return padded[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    run, rise = dx.abs(), dy.abs() << _SHIFT
    flat, steep = rise < run * _TAN_22, rise > run * (_TAN_22 + (2 << _SHIFT))
    row = (magnitude > beside(0, -1)) & (magnitude >= beside(0, 1))
    column = (magnitude > beside(-1, 0)) & (magnitude >= beside(1, 0))
    falling = (magnitude > beside(-1, -1)) & (magnitude > beside(1, 1))
    rising = (magnitude > beside(-1, 1)) & (magnitude > beside(1, -1))
    diagonal = torch.where((dx ^ dy) < 0, rising, falling)
    return torch.where(flat, row, torch.where(steep, column, diagonal))


def _grown(edges: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """Grow edges along the peaks that touch them, until none is left."""
    before, count = edges, _AT_ONCE
    while True:
        for _ in range(count):
            before, edges = edges, _spread(_spread(edges, dim=1), dim=2) & peaks
        if torch.equal(edges, before):
            return edges
        count *= 2  # so that few looks see the longest edge


def _spread(edges: torch.Tensor, dim: int) -> torch.Tensor:
    """Add the neighbours on both sides along a dimension."""
    spread, size = edges.clone(), edges.shape[dim] - 1
    spread.narrow(dim, 1, size).logical_or_(edges.narrow(dim, 0, size))
    spread.narrow(dim, 0, size).logical_or_(edges.narrow(dim, 1, size))
    return spread
