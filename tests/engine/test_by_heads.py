"""Attention a few heads at a time: the formula's numbers, in parts of any size, as an operator for compilers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdit.blocks.attention import AttentionCall
from fastdit.engine import by_heads
from fastdit.engine.by_heads import attend_by_heads, takes


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, as it is written."""
    scores = scale * torch.einsum("bhsd,bhtd->bhst", query, key)
    weights = scores.exp() / scores.exp().sum(dim=3, keepdim=True)
    return torch.einsum("bhst,bhtd->bhsd", weights, value)


def made(
    batch: int, heads: int, queries: int, keys: int, size: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + heads + queries + keys + size)
    sides = (queries, keys, keys)
    return [torch.randn(batch, side, heads, size, generator=generator).to(dtype).transpose(1, 2) for side in sides]


@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 90), st.integers(1, 90), st.integers(1, 9)),
    scale=st.none() | st.floats(0.1, 2.0),
    room=st.sampled_from([1, 4096, 2**20]),
)
def test_some_heads_at_a_time_give_the_formula_in_parts_of_any_size(
    sizes: tuple[int, ...], scale: float | None, room: int
) -> None:
    query, key, value = made(*sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_heads, "_BYTES", room)
        found = attend_by_heads(AttentionCall(query, key, value, scale=scale))
    expected = reference(query, key, value, sizes[-1] ** -0.5 if scale is None else scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_the_formula_as_rounded_scores_allow() -> None:
    query, key, value = made(1, 3, 70, 50, 16, torch.bfloat16)
    expected = reference(query.float(), key.float(), value.float(), 0.25)
    found = attend_by_heads(AttentionCall(query, key, value))
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.008


def test_it_is_an_operator_that_compilers_can_take() -> None:
    torch.library.opcheck(torch.ops.fastdit.attention_by_heads.default, (*made(2, 3, 40, 30, 8), 0.3))


@pytest.mark.parametrize("option", [{"attn_mask": torch.ones(5, 7)}, {"dropout_p": 0.5}, {"is_causal": True}])
def test_masks_and_options_are_left_to_torch(option: dict[str, object]) -> None:
    query, key, value = made(1, 2, 5, 7, 4)
    assert takes(AttentionCall(query, key, value))
    assert not takes(AttentionCall(query, key, value, **option))  # type: ignore[arg-type]
    assert not takes(AttentionCall(query, key[:, :1], value[:, :1], enable_gqa=True))
    assert not takes(AttentionCall(query.to("meta"), key.to("meta"), value.to("meta")))
