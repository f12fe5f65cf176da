"""Tokens as square patches of latent frames."""

from __future__ import annotations

import torch


def patches(frames: torch.Tensor, size: int = 2) -> torch.Tensor:
    """Cut frames [B, C, h, w] into tokens [B, h w / size^2, C size^2], in raster order."""
    batch, channels, height, width = frames.shape
    rows, columns = height // size, width // size
    cut = frames.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, rows * columns, channels * size * size)


def assembled(tokens: torch.Tensor, rows: int, columns: int, size: int = 2) -> torch.Tensor:
    """Undo `patches`: lay tokens [B, rows * columns, C size^2] out as frames [B, C, rows size, columns size]."""
    batch, _, width = tokens.shape
    channels = width // (size * size)
    cut = tokens.reshape(batch, rows, columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, channels, rows * size, columns * size)
