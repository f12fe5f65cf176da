"""Graded damages, one for each way in which a sampler was seen to fail: what a judge is taught to see.

Each takes pictures [B, 3, H, W] in [0, 1], their objects' coverage [B, 1, H, W], a severity [B] in [0, 1] and a random
generator of the device, and gives damaged pictures. Zero severity changes nothing; severities are laid out so that the
least ones are barely visible. Lengths are in units of the side, so that a damage is the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Damage = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]

_LONGEST_BLUR = 0.008
_COARSEST_PIXEL = 0.012
_WIDEST_DOUBLE = 0.016
_SEAM_GRIDS = (8, 16, 32)


def blur(images: Tensor, objects: Tensor, severity: Tensor, random: torch.Generator) -> Tensor:
    """Soften everything, as too few steps do."""
    return _softened(images, severity * _LONGEST_BLUR * images.shape[-1])


def aliasing(images: Tensor, objects: Tensor, severity: Tensor, random: torch.Generator) -> Tensor:
    """Show coarser pixels with hard edges, as copied latents do."""
    side = images.shape[-1]
    coarse = 1 / side + severity * _COARSEST_PIXEL
    steps = (torch.arange(side, device=images.device) + 0.5) / side
    places = ((torch.floor(steps / coarse[:, None]) + 0.5) * coarse[:, None]).clamp(0, 1) * 2 - 1
    grid = torch.stack([places[:, None, :].expand(-1, side, -1), places[:, :, None].expand(-1, -1, side)], dim=-1)
    coarser = functional.grid_sample(images, grid, mode="nearest", align_corners=False)
    return torch.lerp(images, coarser, (4 * severity).clamp(max=1)[:, None, None, None])


def seams(images: Tensor, objects: Tensor, severity: Tensor, random: torch.Generator) -> Tensor:
    """Brighten and darken some squares of a grid of tokens, as a region's borders do."""
    count, cells = images.shape[0], _SEAM_GRIDS[int(_uniform(1, images, random).item() * len(_SEAM_GRIDS))]
    # mostly in brightness, a little in color
    steps = torch.empty(count, 4, cells, cells, device=images.device).normal_(generator=random)
    steps = steps[:, 3:] + 0.4 * steps[:, :3]
    steps = steps * (_uniform((count, 1, cells, cells), images, random) < 0.25)
    offset = functional.interpolate(steps, size=images.shape[-2:], mode="nearest")
    return (images + 0.12 * severity[:, None, None, None] * offset).clamp(0, 1)


def glow(images: Tensor, objects: Tensor, severity: Tensor, random: torch.Generator) -> Tensor:
    """Lay a white seam beside objects, on one side more than on the other."""
    side = images.shape[-1]
    reach = _between(0.006, 0.02, images.shape[0], images, random) * side
    ring = (_softened(objects, reach) * 2).clamp(0, 1) * (1 - objects)
    toward = torch.empty(images.shape[0], 2, device=images.device).normal_(generator=random)
    toward = functional.normalize(toward, dim=1)
    steps = torch.linspace(-1, 1, side, device=images.device)
    half = toward[:, 0, None, None] * steps[None, None, :] + toward[:, 1, None, None] * steps[None, :, None]
    ring = ring * (0.5 + half[:, None]).clamp(0.15, 1)
    return images + 0.9 * severity[:, None, None, None] * ring * (1 - images)


def bleaching(images: Tensor, objects: Tensor, severity: Tensor, random: torch.Generator) -> Tensor:
    """Pale the objects towards white."""
    return images + 0.6 * severity[:, None, None, None] * _softened(objects, images.new_full((len(images),), 1.0)) * (
        0.95 - images
    )


def doubled_edges(images: Tensor, objects: Tensor, severity: Tensor, random: torch.Generator) -> Tensor:
    """Mix a picture with itself, moved a little, as two clocks of one picture do."""
    count = images.shape[0]
    angle = _uniform(count, images, random) * 2 * torch.pi
    # two pixels of a picture of 512 at least: a shift that can't be resolved is a blur
    distance = (0.004 + severity * _WIDEST_DOUBLE) * 2
    move = torch.stack([angle.cos(), angle.sin()], dim=1) * distance[:, None]
    matrix = torch.eye(2, 3, device=images.device).repeat(count, 1, 1)
    matrix[:, :, 2] = move
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    return torch.lerp(images, moved, 0.5 * severity.clamp(max=0.5)[:, None, None, None] * 2)


DAMAGES: dict[str, Damage] = {
    "blur": blur,
    "aliasing": aliasing,
    "seams": seams,
    "glow": glow,
    "bleaching": bleaching,
    "doubled edges": doubled_edges,
}


def _softened(images: Tensor, deviations: Tensor) -> Tensor:
    """Blur each picture by a Gaussian of its own deviation in pixels."""
    deviations = deviations.clamp(min=1e-3)
    reach = max(1, int(3 * float(deviations.max()) + 0.5))
    # what falls on the area of each pixel, so that a deviation below a pixel softens, too
    borders = torch.arange(-reach, reach + 2, device=images.device, dtype=images.dtype) - 0.5
    kernels = torch.special.ndtr(borders / deviations[:, None]).diff(dim=1)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    count, channels = images.shape[:2]
    weights = kernels.repeat_interleave(channels, dim=0)[:, None]
    flat = functional.pad(images, [reach] * 4, mode="reflect").flatten(0, 1)[None]
    flat = functional.conv2d(flat, weights[:, :, None, :], groups=count * channels)
    return functional.conv2d(flat, weights[:, :, :, None], groups=count * channels)[0].unflatten(0, (count, channels))


def _uniform(shape: int | tuple[int, ...], like: Tensor, random: torch.Generator) -> Tensor:
    return torch.empty(shape, device=like.device).uniform_(generator=random)


def _between(low: float, high: float, count: int, like: Tensor, random: torch.Generator) -> Tensor:
    return low + (high - low) * _uniform(count, like, random)
