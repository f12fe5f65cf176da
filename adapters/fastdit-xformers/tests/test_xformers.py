"""xFormers is refused by name where it can't run, and keeps the contract where it can."""

from __future__ import annotations

import importlib.util
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from fastdit import Stack, UnsupportedModel, accelerate
from fastdit.blocks.attention import AttentionCall
from fastdit.testing import AcceleratorContract, generate, tiny_flux
from fastdit_xformers import XFormers, bias_of

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("xformers") is None,
    reason="xFormers has kernels for CUDA devices alone: this needs one, and xFormers",
)


def on_gpu(**options: Any) -> tuple[Any, dict[str, Any]]:
    pipeline, call = tiny_flux(**options)
    return pipeline.to("cuda"), {
        name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in call.items()
    }


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_refused_by_name_where_the_model_is_on_a_cpu_and_nothing_is_left_behind() -> None:
    pipeline, call = tiny_flux(steps=2)
    plain = generate(pipeline, call)
    with pytest.raises(UnsupportedModel, match=r"'xformers' can't be used for FluxTransformer2DModel on cpu") as caught:
        accelerate(pipeline, [XFormers()])
    assert caught.match("CUDA devices alone|xFormers can't be imported")
    assert torch.equal(generate(pipeline, call), plain)


def test_a_stack_with_it_is_read_where_nobody_has_imported_it() -> None:
    (entry,) = entry_points(group="fastdit.accelerators", name="XFormers")
    assert entry.load() is XFormers
    stack = Stack([XFormers()])
    assert Stack.from_json(stack.to_json()) == stack


MASKS = {
    "keys": (torch.arange(7) < 5).view(1, 1, 1, 7),
    "pairs": torch.arange(6).view(6, 1) >= torch.arange(7) - 2,
    "added": randn(2, 4, 6, 7, seed=4),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_bias_means_what_the_mask_means_to_torch_and_is_aligned(mask: str) -> None:
    query, key, value = (randn(2, 4, size, 8, seed=size) for size in (6, 7, 7))
    bias = bias_of(AttentionCall(query, key, value, MASKS[mask]))
    assert bias is not None and bias.shape == (2, 4, 6, 7)
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) == 1
    found = (query @ key.transpose(2, 3) * 8**-0.5 + bias).softmax(dim=3) @ value
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, MASKS[mask])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@needs_gpu
class TestContract(AcceleratorContract):
    accelerator = XFormers()

    def pipeline(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        return on_gpu(**options)


@needs_gpu
def test_it_gives_torch_s_attention() -> None:
    pipeline, call = on_gpu()
    expected = generate(pipeline, call)
    torch.testing.assert_close(generate(accelerate(pipeline, [XFormers()]), call), expected, rtol=0, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_masks_and_grouped_heads_mean_what_torch_says(mask: str, key_heads: int) -> None:
    query, key, value = (randn(2, heads, size, 8, seed=size).to("cuda", torch.float16) for heads, size in
                         ((4, 6), (key_heads, 7), (key_heads, 7)))  # fmt: skip
    allowed = MASKS[mask].to("cuda")
    allowed = allowed if allowed.dtype == torch.bool else allowed.to(query.dtype)
    call = AttentionCall(query, key, value, allowed, enable_gqa=key_heads < 4)
    expected = torch.nn.functional.scaled_dot_product_attention(*call)
    torch.testing.assert_close(XFormers().kernel("xformers")(call), expected, rtol=0, atol=1e-2)
