"""Edge scores and the choice of tokens, against the straight-line reference and against pictures made by hand."""

from __future__ import annotations

import pytest
import reference_ralu
import torch
from hypothesis import given
from hypothesis import strategies as st

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
        assert any(torch.equal(scaled(found[image]), scaled(scores)) for scores in wanted)


def scaled(scores: torch.Tensor) -> torch.Tensor:
    """Counts of edge pixels, whatever an edge pixel is worth."""
    scores = scores.double().flatten()
    return scores / 255 if float(scores.max()) > 256 else scores


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_the_tokens_with_the_highest_scores_are_chosen_and_ties_go_to_raster_order(
    scores: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(scores)))
    found = top_tokens(torch.tensor([scores], dtype=torch.float32), count)[0].tolist()
    expected = sorted(sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:count])
    assert sorted(found) == expected
