"""What is left of a small embedded model's background, whose form is known: a colour under an evenly falling light.

A judge that a search was made with sees less and less of what the search walked past; this needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL.Image import Image

#: Errors of a background that are surely an object's, and how far from objects one looks, as a part of the side.
_OBJECT, _FAR = 0.09, 0.06
_TRUSTED = 0.6

Array = npt.NDArray[np.float64]


def residues(images: Sequence[Image]) -> list[float]:
    """Give what the best plane of each channel leaves far from objects: root mean square, in thousandths of white."""
    return [1000.0 * residue(np.asarray(image.convert("RGB"), dtype=np.float64) / 255.0) for image in images]


def residue(pixels: Array) -> float:
    """As `residues`, of pixels [H, W, 3] in [0, 1], and as a part of white."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    basis = np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], axis=-1).reshape(-1, 3).astype(np.float64)
    flat = pixels.reshape(-1, 3)
    trust = np.ones(len(flat), dtype=bool)
    for _ in range(5):
        found, *_ = np.linalg.lstsq(basis[trust], flat[trust], rcond=None)
        error = np.abs(flat - basis @ found).max(axis=1)
        trust = error <= np.quantile(error, _TRUSTED)
    far = ~_grown((error > _OBJECT).reshape(height, width), round(_FAR * width)).reshape(-1)
    if far.mean() < 0.02:
        return float(np.sqrt(np.square(flat - basis @ found).mean()))
    found, *_ = np.linalg.lstsq(basis[far], flat[far], rcond=None)
    return float(np.sqrt(np.square(flat[far] - basis[far] @ found).mean()))


def _grown(mask: npt.NDArray[np.bool_], by: int) -> npt.NDArray[np.bool_]:
    """A mask and all that is nearer to it than `by`, along rows and columns."""
    for axis in (0, 1):
        padded = np.pad(mask, [(by, by) if axis == other else (0, 0) for other in (0, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * by + 1, axis=axis)
        mask = windows.any(axis=-1)
    return mask
