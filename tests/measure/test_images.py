"""Image metrics on pictures whose numbers are known."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastdit.measure.images import (
    PSNR_CEILING,
    psnr,
    sharpness,
    ssim,
)


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 250, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_psnr_of_a_constant_shift_is_its_closed_form() -> None:
    shifted = Image.fromarray(np.asarray(picture()) + np.uint8(5))
    assert psnr([shifted], [picture()]) == pytest.approx([20 * math.log10(255 / 5)])


def test_equal_pictures_reach_the_ceiling_and_full_similarity() -> None:
    assert psnr([picture()], [picture()]) == pytest.approx([PSNR_CEILING])
    assert ssim([picture()], [picture()]) == pytest.approx([1.0])


def test_every_image_is_scored_by_itself() -> None:
    ours, theirs = [picture(0), picture(1)], [picture(0), picture(2)]
    assert psnr(ours, theirs)[1] < 12 < psnr(ours, theirs)[0]
    assert ssim(ours, theirs)[1] < 0.5 < ssim(ours, theirs)[0]


def test_many_pictures_score_as_each_does_alone_and_in_their_order() -> None:
    ours, theirs = [picture(number % 7) for number in range(70)], [picture(number % 5) for number in range(70)]
    for score in (psnr, ssim):
        alone = [score([one], [other])[0] for one, other in zip(ours, theirs, strict=True)]
        assert score(ours, theirs) == pytest.approx(alone, rel=1e-6)


def test_a_flat_picture_has_no_sharpness_and_blur_lowers_it() -> None:
    blurred = picture().filter(ImageFilter.GaussianBlur(2))
    assert sharpness([Image.new("RGB", (16, 16), "red")]) == [0.0]
    assert sharpness([blurred])[0] < sharpness([picture()])[0]


def test_a_checkerboard_has_the_sharpness_of_its_laplacian() -> None:
    board = np.indices((16, 16)).sum(axis=0) % 2 * 255
    assert sharpness([Image.fromarray(board.astype(np.uint8)).convert("RGB")]) == pytest.approx([4 * 255])


def test_sharpness_is_that_of_opencv_s_laplacian() -> None:
    luma = np.asarray(picture().convert("L"))
    assert sharpness([picture()]) == [float(np.abs(cv2.Laplacian(luma, cv2.CV_64F)).mean())]


def test_images_without_references_are_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        psnr([picture()], [])
