"""Token layouts: nothing is lost between the stages, and every token is where its position says."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdit.layout import CoarseLayout, FineLayout, MixedLayout, TokenLayout, gather_tokens
from fastdit.schedule.anchors import SparseLayout

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))


@st.composite
def refinements(draw: st.DrawFn) -> tuple[CoarseLayout, torch.Tensor]:
    """A coarse layout of any shape, and for each image of a batch a choice of tokens of one common count."""
    rows, columns, batch = draw(SIZES)
    count = draw(st.integers(0, rows * columns))
    chosen = [draw(st.permutations(range(rows * columns)))[:count] for _ in range(batch)]
    return CoarseLayout(2 * rows, 2 * columns), torch.tensor(chosen, dtype=torch.long).reshape(batch, count)


def split(coarse: CoarseLayout, latents: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, MixedLayout]:
    """Split the chosen tokens of a coarse stage: each is copied to its four children."""
    mixed = coarse.refined_at(chosen)
    return gather_tokens(latents, coarse.sources(mixed)), mixed


def marked(layout: TokenLayout, batch: int) -> torch.Tensor:
    """Latents whose channels are image, row and column of the token, in the coarse frame."""
    places = layout.positions(torch.device("cpu")).expand(batch, -1, -1)
    images = torch.arange(batch, dtype=torch.float32)[:, None, None].expand(-1, places.shape[1], 1)
    return torch.cat([images, places], dim=2)


@given(refinements())
def test_a_refined_token_becomes_four_children_at_half_offsets(case: tuple[CoarseLayout, torch.Tensor]) -> None:
    coarse, chosen = case
    batch = chosen.shape[0]
    latents, layout = split(coarse, marked(coarse, batch), chosen)
    positions = layout.positions(torch.device("cpu")).expand(batch, -1, -1)
    assert latents.shape[1] == layout.tokens == positions.shape[1] == coarse.tokens + 3 * chosen.shape[1]
    assert torch.equal(latents[:, :, 0], torch.arange(float(batch))[:, None].expand(-1, layout.tokens))
    assert torch.equal(latents[:, :, 1:], positions.floor())
    kept = coarse.tokens - chosen.shape[1]
    assert torch.equal(positions[:, :kept], positions[:, :kept].floor())
    offsets = (positions - positions.floor())[:, kept:].reshape(batch, -1, 4, 2)
    expected = torch.tensor([[0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5]])
    assert torch.equal(offsets, expected.expand_as(offsets))


@given(refinements())
def test_kept_tokens_come_first_and_both_groups_are_in_raster_order(case: tuple[CoarseLayout, torch.Tensor]) -> None:
    coarse, chosen = case
    batch, columns = chosen.shape[0], coarse.columns // 2
    layout = coarse.refined_at(chosen)
    places = layout.positions(torch.device("cpu")).expand(batch, -1, -1).floor()
    number = (places[..., 0] * columns + places[..., 1]).long()
    kept = coarse.tokens - chosen.shape[1]
    for image in range(batch):
        wanted = sorted(chosen[image].tolist())
        assert number[image, :kept].tolist() == [token for token in range(coarse.tokens) if token not in wanted]
        assert number[image, kept:].reshape(-1, 4).tolist() == [[token] * 4 for token in wanted]


@given(refinements())
def test_completing_a_mixed_layout_gives_every_cell_of_the_fine_grid_once(
    case: tuple[CoarseLayout, torch.Tensor],
) -> None:
    coarse, chosen = case
    batch = chosen.shape[0]
    layout = coarse.refined_at(chosen)
    fine = FineLayout(coarse.rows, coarse.columns)
    # A kept token carries its coarse position, a child its own: after completion the two differ by the offset only.
    complete = layout.to_raster(layout.complete(marked(layout, batch)))
    cells = fine.positions(torch.device("cpu"))
    assert complete.shape[1] == fine.tokens == coarse.rows * coarse.columns
    assert torch.equal((complete[:, :, 1:]).floor(), (cells / 2).floor().expand(batch, -1, -1))
    for image in range(batch):
        refined = set(chosen[image].tolist())
        for token, (row, column) in zip(complete[image, :, 1:].tolist(), cells[0].tolist(), strict=True):
            parent = int(row // 2) * (coarse.columns // 2) + int(column // 2)
            assert token == ([row / 2, column / 2] if parent in refined else [row // 2, column // 2])


@given(refinements())
def test_refining_and_completing_is_nearest_neighbour_upsampling_of_tokens(
    case: tuple[CoarseLayout, torch.Tensor],
) -> None:
    coarse, chosen = case
    batch, rows, columns = chosen.shape[0], coarse.rows // 2, coarse.columns // 2
    values = tiny_noise(batch, rows * columns, 5)
    latents, layout = split(coarse, values, chosen)
    found = layout.to_raster(layout.complete(latents))
    grid = values.reshape(batch, rows, columns, 5).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    assert torch.equal(found, grid.reshape(batch, -1, 5))


@given(SIZES)
def test_uniform_layouts_count_their_tokens_and_keep_raster_order(size: tuple[int, int, int]) -> None:
    rows, columns, batch = size
    coarse = CoarseLayout(2 * rows, 2 * columns)
    fine = FineLayout(2 * rows, 2 * columns)
    assert (coarse.tokens, fine.tokens) == (rows * columns, 4 * rows * columns)
    values = tiny_noise(batch, fine.tokens, 3)
    assert torch.equal(fine.to_raster(fine.complete(values)), values)


@st.composite
def sparse_layouts(draw: st.DrawFn) -> SparseLayout:
    """A sparse layout of any shape, with a choice of cells of one common count for each image of a batch."""
    rows, columns, batch = draw(SIZES)
    count = draw(st.integers(1, rows * columns))
    chosen = [sorted(draw(st.permutations(range(rows * columns)))[:count]) for _ in range(batch)]
    return SparseLayout(rows, columns, torch.tensor(chosen))


@given(sparse_layouts())
def test_a_sparse_layout_has_its_anchors_at_their_cells_and_gives_each_image_its_own(layout: SparseLayout) -> None:
    batch = len(layout.anchors)
    assert (layout.kind, layout.images, layout.tokens) == ("sparse", batch, layout.anchors.shape[1])
    assert not layout.whole and not layout.uniform and layout.extent == (layout.rows, layout.columns)
    places = layout.positions(torch.device("cpu"))
    assert torch.equal((places[..., 0] * layout.columns + places[..., 1]).long(), layout.anchors)
    last = layout.of_images(torch.tensor([batch - 1, 2 * batch - 1]))
    assert torch.equal(last.anchors, layout.anchors[[-1, -1]])


@given(sparse_layouts())
def test_completing_a_sparse_layout_gives_every_cell_its_nearest_anchor_s(layout: SparseLayout) -> None:
    values = tiny_noise(len(layout.anchors), layout.tokens, 3)
    complete = layout.to_raster(layout.complete(values))
    sources = layout.sources(FineLayout(layout.rows, layout.columns))
    assert torch.equal(complete, values.gather(1, sources[..., None].expand(-1, -1, 3)))
    for image, anchors in enumerate(layout.anchors.tolist()):
        for cell in range(layout.rows * layout.columns):
            row, column = divmod(cell, layout.columns)
            apart = [(a // layout.columns - row) ** 2 + (a % layout.columns - column) ** 2 for a in anchors]
            assert sources[image, cell] == apart.index(min(apart))


@given(sparse_layouts(), st.data())
def test_tokens_of_further_anchors_are_copies_of_the_nearest_and_those_that_stay_are_their_own(
    layout: SparseLayout, data: st.DataObject
) -> None:
    cells = layout.rows * layout.columns
    more = data.draw(st.integers(layout.tokens, cells))
    rows = [
        sorted(anchors + [cell for cell in range(cells) if cell not in anchors][: more - layout.tokens])
        for anchors in layout.anchors.tolist()
    ]
    following = SparseLayout(layout.rows, layout.columns, torch.tensor(rows))
    sources = layout.sources(following)
    assert sources.shape == (len(rows), more)
    for image, anchors in enumerate(layout.anchors.tolist()):
        for number, anchor in enumerate(anchors):
            assert sources[image, rows[image].index(anchor)] == number
    back = following.sources(layout)
    assert torch.equal(following.anchors.gather(1, back), layout.anchors)


def tiny_noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
