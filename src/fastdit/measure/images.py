"""What pictures are worth: likeness to a reference (PSNR, SSIM), and sharpness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Array = npt.NDArray[np.float64]

#: Decibels of pictures that differ by no more than rounding to 8 bits (1/12 of a step squared); equal ones get this.
PSNR_CEILING = 10 * math.log10(255**2 * 12)

_AT_ONCE = 32


def psnr(images: Sequence[Image], references: Sequence[Image]) -> list[float]:
    """Peak signal-to-noise ratio of each image to its reference, in dB, at most `PSNR_CEILING`."""
    values = []
    for ours, theirs in _paired_batches(images, references):
        ratios = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
        values += ratios.clamp(max=PSNR_CEILING).tolist()
    return values


def ssim(images: Sequence[Image], references: Sequence[Image]) -> list[float]:
    """Structural similarity of each image to its reference; 1 for equal ones."""
    values = []
    for ours, theirs in _paired_batches(images, references):
        # In float32 with channels last, as pictures come, torch's convolution is several times faster than in float64.
        found = structural_similarity_index_measure(ours.float(), theirs.float(), data_range=1.0, reduction="none")
        assert isinstance(found, torch.Tensor)
        values += found.reshape(-1).tolist()
    return values


def sharpness(images: Sequence[Image]) -> list[float]:
    """Mean absolute Laplacian of each image's luma (0 to 255): blur lowers it, and so does missing texture."""
    return [float(np.abs(_laplacian(np.asarray(image.convert("L"), dtype=np.float64))).mean()) for image in images]


def _laplacian(luma: Array) -> Array:
    """The four neighbours less four times the pixel itself; the border mirrors what is inside of it."""
    wide = np.pad(luma, 1, mode="reflect")
    return wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:] - 4.0 * luma


def _paired_batches(
    images: Sequence[Image], references: Sequence[Image]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give some pairs at a time: a window's sums of a thousand pictures would fill a machine's memory."""
    if len(images) != len(references) or not images:
        raise ValueError(f"every image needs its reference; got {len(images)} and {len(references)}")
    for first in range(0, len(images), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        yield _batch(images[part]), _batch(references[part])


def _batch(images: Sequence[Image]) -> torch.Tensor:
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
