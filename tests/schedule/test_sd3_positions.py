"""The positions of SD3's mixed stages: the model's own at whole places, the sine and cosine between them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from hypothesis import given
from hypothesis import strategies as st
from reference_sd3 import crop_corner, in_fine_frame, position_embedding

import tiny
from fastdit.layout import CoarseLayout, FineLayout, MixedLayout, TokenLayout
from fastdit.models.patches import assembled, patches
from fastdit.models.sd3 import SD3, position_rows

pytestmark = pytest.mark.usefixtures("no_grad")

CPU = torch.device("cpu")
WIDTH = 16


def embedding(*, side: int = 12, base: int = 6, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> PatchEmbed:
    """A patch embedding as SD3's, with seeded weights."""
    embed = PatchEmbed(
        height=2 * base,
        width=2 * base,
        patch_size=2,
        in_channels=4,
        embed_dim=WIDTH,
        interpolation_scale=scale,
        pos_embed_max_size=side,
    )
    tiny.seed_weights(embed, 3)
    return embed.to(dtype).eval()


def transformer_with(embed: PatchEmbed) -> Any:
    transformer = copy.copy(tiny.sd3()[0].transformer)
    transformer.__dict__["_modules"] = {**transformer._modules, "pos_embed": embed}
    return transformer


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    side=st.integers(12, 15),
    base=st.integers(3, 12),
    scale=st.sampled_from([0.5, 1.0, 2.0]),
    frame=st.sampled_from(["coarse", "fine"]),
    seed=st.integers(0, 99),
)
def test_a_strip_of_the_whole_frame_in_any_order_equals_the_model_s_own_embedding(
    grid: tuple[int, int], side: int, base: int, scale: float, frame: str, seed: int
) -> None:
    embed = embedding(side=side, base=base, scale=scale)
    rows, columns = grid
    order = torch.stack(
        [torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1)]
    )
    none = torch.empty(2, 0, dtype=torch.long)
    # All coarse tokens kept, in the coarse frame, or all refined, in the fine one: whole places in a mixed layout.
    if frame == "coarse":
        layout = MixedLayout(2 * rows, 2 * columns, order, none, "coarse")
        numbers = order
    else:
        layout = MixedLayout(2 * rows, 2 * columns, none, order, "fine")
        top = 2 * (order // columns)[..., None] + torch.tensor([0, 0, 1, 1])
        left = 2 * (order % columns)[..., None] + torch.tensor([0, 1, 0, 1])
        numbers = (top * 2 * columns + left).flatten(1)
    height, width = layout.extent
    frames = tiny.randn(2, 4, 2 * height, 2 * width, seed=seed)
    own = embed(frames).gather(1, numbers[..., None].expand(-1, -1, WIDTH))
    strip = assembled(patches(frames).gather(1, numbers[..., None].expand(-1, -1, 16)), 1, layout.tokens)
    child = SD3.child_overrides(transformer_with(embed), layout, strip)["pos_embed"]
    torch.testing.assert_close(child(strip), own, rtol=0, atol=2e-6)
    doubled = torch.cat([strip] * 2)
    child = SD3.child_overrides(transformer_with(embed), layout, doubled)["pos_embed"]
    torch.testing.assert_close(child(doubled), torch.cat([own] * 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("frame", ["coarse", "fine"])
@pytest.mark.parametrize("size", [(12, 12), (8, 4), (2, 10)])
def test_places_between_two_tokens_have_the_sine_and_cosine_of_the_place(size: tuple[int, int], frame: str) -> None:
    side, base = 12, 7
    coarse = size[0] * size[1] // 4
    refined = torch.arange(0, coarse, 2)[None]
    kept = torch.arange(1, coarse, 2)[None]
    layout = MixedLayout(*size, kept, refined, frame)
    half = MixedLayout(*size, kept, refined).positions(CPU)[0].tolist()
    places = half if frame == "coarse" else in_fine_frame(half, coarse)
    assert layout.positions(CPU)[0].tolist() == [list(place) for place in places]
    extent = (size[0] // 2, size[1] // 2) if frame == "coarse" else size
    top, left = crop_corner(*extent, side)
    expected = position_embedding([(top + row, left + column) for row, column in places], WIDTH, side=side, base=base)
    found = position_rows(embedding(side=side, base=base), layout, CPU)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_whole_places_are_the_table_s_own_rows_in_half_precision_too() -> None:
    embed = embedding(dtype=torch.bfloat16)
    layout = MixedLayout(8, 10, torch.empty(1, 0, dtype=torch.long), torch.arange(20)[None], "fine")
    found = CoarseLayout(8, 10).complete(torch.arange(20.0)[None, :, None]).shape
    assert found == (1, 80, 1)
    rows = layout.to_raster(position_rows(embed, layout, CPU))
    assert torch.equal(rows, embed.cropped_pos_embed(16, 20))


def test_the_user_s_embedding_is_neither_written_to_nor_copied() -> None:
    embed = embedding()
    before = dict(embed.__dict__), dict(embed._buffers)
    layout = MixedLayout(4, 4, torch.tensor([[0, 1, 2]]), torch.tensor([[3]]))
    child = SD3.child_overrides(transformer_with(embed), layout, torch.zeros(1, 4, 2, 14))["pos_embed"]
    assert child.proj is embed.proj
    assert type(child) is PatchEmbed
    assert (dict(embed.__dict__), dict(embed._buffers)) == before


@pytest.mark.parametrize("layout", [FineLayout(4, 6), CoarseLayout(4, 6)], ids=["fine", "coarse"])
def test_a_stage_that_is_a_picture_of_its_own_size_keeps_the_model_s_own_embedding(layout: TokenLayout) -> None:
    assert SD3.child_overrides(transformer_with(embedding()), layout, torch.zeros(1, 4, 8, 12)) == {}
