"""Image metrics on pictures whose numbers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from fastdit.measure.images import (
    PSNR_CEILING,
    frechet_distance,
    psnr,
    relative_sharpness,
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
    assert relative_sharpness([picture(), blurred], [picture()])[1] < relative_sharpness([picture()], [picture()])[0]


def test_a_checkerboard_has_the_sharpness_of_its_laplacian() -> None:
    board = np.indices((16, 16)).sum(axis=0) % 2 * 255
    assert sharpness([Image.fromarray(board.astype(np.uint8)).convert("RGB")]) == pytest.approx([4 * 255])


def with_moments(mean: np.ndarray, covariance: np.ndarray, count: int = 50) -> np.ndarray:
    """Samples whose own mean and covariance are exactly these."""
    samples = np.random.default_rng(0).normal(size=(count, mean.size))
    samples -= samples.mean(axis=0)
    whitened = samples @ np.linalg.inv(np.linalg.cholesky(np.cov(samples, rowvar=False))).T
    return mean + whitened @ np.linalg.cholesky(covariance).T


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=4), st.floats(0.1, 4), st.floats(0.1, 4))
def test_the_frechet_distance_of_round_gaussians_is_its_closed_form(shift: list[float], one: float, two: float) -> None:
    mean = np.array(shift)
    first = with_moments(np.zeros(mean.size), one**2 * np.eye(mean.size))
    second = with_moments(mean, two**2 * np.eye(mean.size))
    expected = (mean**2).sum() + mean.size * (one - two) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_frechet_distance_of_crossed_gaussians_agrees_with_a_matrix_root() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    one, two = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    expected = np.trace(one + two - 2 * scipy_linalg.sqrtm(one @ two).real)
    assert frechet_distance(with_moments(np.zeros(2), one), with_moments(np.zeros(2), two)) == pytest.approx(expected)


def test_the_frechet_distance_is_symmetric_and_zero_to_itself_even_with_few_samples() -> None:
    random = np.random.default_rng(0)
    few, others = random.normal(size=(5, 12)), random.normal(size=(6, 12))
    assert frechet_distance(few, few, regularisation=1e-3) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, others) == pytest.approx(frechet_distance(others, few))


def test_bad_feature_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        frechet_distance([[math.nan, 1.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="width"):
        frechet_distance(np.ones((3, 2)), np.ones((3, 4)))


def test_images_without_references_are_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        psnr([picture()], [])
