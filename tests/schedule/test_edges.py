"""Edge scores and the choice of tokens, against the straight-line reference and against pictures made by hand."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import reference_ralu
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdit.schedule.selectors.canny import canny
from fastdit.schedule.selectors.edges import edge_scores, top_tokens


def square(dark: float, bright: float) -> torch.Tensor:
    """A 64 x 64 picture of `dark` with a `bright` square over the lower right quarter."""
    picture = torch.full((1, 3, 64, 64), dark)
    picture[:, :, 36:60, 36:60] = bright
    return picture


def test_edges_are_counted_in_the_token_where_they_are() -> None:
    scores = edge_scores(square(-0.5, 0.9), 4, 4, paper=False)[0]
    assert set(scores.nonzero().flatten().tolist()) == {10, 11, 14, 15}


def test_edges_in_dark_areas_are_seen_unless_the_paper_s_quirk_is_asked_for() -> None:
    dark = square(-0.95, -0.1)
    assert edge_scores(dark, 4, 4, paper=False).sum() > 0
    assert edge_scores(dark, 4, 4, paper=True).sum() == 0
    bright = square(0.1, 0.95)
    assert edge_scores(bright, 4, 4, paper=True).sum() > 0


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width))


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return cv2.resize(rng.integers(0, 256, (6, 6)).astype(np.float32), (width, height))


def disc(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return cv2.circle(np.full((height, width), 40.0), (width // 2, height // 2), min(height, width) // 3, 200.0, -1)


@pytest.mark.parametrize("draw", [noise, smooth, disc])
@pytest.mark.parametrize("size", [(64, 64), (17, 90), (3, 2), (1, 5)])
@pytest.mark.parametrize("thresholds", [(100, 200), (20, 60)])
def test_edges_are_those_of_opencv(draw: Any, size: tuple[int, int], thresholds: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(size))
    pictures = [np.ascontiguousarray(draw(rng, *size).astype(np.uint8)) for _ in range(2)]
    found = canny(torch.from_numpy(np.stack(pictures)), *thresholds)
    assert np.array_equal(found.numpy(), np.stack([cv2.Canny(picture, *thresholds) > 0 for picture in pictures]))


@pytest.mark.parametrize("fidelity", ["exact", "paper"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (1, 8)])
def test_scores_order_the_tokens_as_the_reference_does(fidelity: str, grid: tuple[int, int]) -> None:
    rows, columns = grid
    coarse = torch.randn(2, 3, rows * 2, columns * 2, generator=torch.Generator().manual_seed(rows))
    pictures = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear").clamp(-1, 1)
    found = edge_scores(pictures, rows, columns, paper=fidelity == "paper")
    for image in range(2):
        wanted = [
            torch.tensor(reference_ralu.edge_scores(pictures[image], rows, columns, fidelity=fidelity, rounding=how))
            for how in ("nearest", "down")
        ]
        assert any(torch.equal(255 * found[image].double(), scores.double()) for scores in wanted)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_the_tokens_with_the_highest_scores_are_chosen_and_ties_go_to_raster_order(
    scores: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(scores)))
    found = top_tokens(torch.tensor([scores], dtype=torch.float32), count)[0].tolist()
    expected = sorted(sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:count])
    assert sorted(found) == expected
