"""Noise of a finer grid that a coarser grid's own noise is part of (Fresco, arXiv 2601.07462).

    (c1, c2, c3, c4) = H / 2 (p, n1, n2, n3),   H the 4 x 4 Hadamard matrix, symmetric with H H = 4 I

gives the four children of a parent p: H / 2 is orthogonal, so they are independent unit normals where p and the fresh
n are, and their sum, halved, is p again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

_HALF_HADAMARD = ((0.5, 0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5), (0.5, 0.5, -0.5, -0.5), (0.5, -0.5, -0.5, 0.5))


def children(parents: torch.Tensor, draw: Callable[[Sequence[int], torch.device], torch.Tensor]) -> torch.Tensor:
    """Give frames of noise [B, C, 2 h, 2 w] of frames [B, C, h, w] of it, a pixel's four in place of it.

    `draw` makes the fresh normals n1, n2 and n3, [B, 3 C, h, w].
    """
    batch, channels, rows, columns = parents.shape
    fresh = draw((batch, 3 * channels, rows, columns), parents.device)
    own = torch.cat([parents[:, :, None], fresh.unflatten(1, (channels, 3)).to(parents.dtype)], dim=2)
    mixed = torch.einsum("ij,bcjhw->bcihw", parents.new_tensor(_HALF_HADAMARD), own)
    return functional.pixel_shuffle(mixed.flatten(1, 2), 2)
