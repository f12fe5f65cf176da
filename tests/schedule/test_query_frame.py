"""frame="query": against attention written out pair by pair, in every family that can, beside other accelerators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference_ralu
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_query_frame import PairByPair, mixed_transformer
from test_ralu_reference import compare
from torch import Tensor

import tiny
from fastdit import (
    RALU,
    Attention,
    Compile,
    FirstBlockCache,
    IncompatibleStack,
    InvalidConfig,
    Stack,
    TeaCache,
    ToCa,
    UnsupportedModel,
    accelerate,
)
from fastdit.blocks.attention import AttentionCall
from fastdit.models.rotary import rotary
from fastdit.schedule.query_frame import QueryFrame
from fastdit.testing import AcceleratorContract

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma, inside diffusers
]

SHORT = {"steps": (2, 2, 2), "ends": (0.3, 0.45), "ratio": 0.3}
QUERY = RALU(**SHORT, frame="query")
WIDTHS = (4, 6, 6)


@pytest.mark.exhaustive
class TestContract(AcceleratorContract):
    accelerator = RALU(steps=(4, 4, 4), ends=(0.3, 0.45), ratio=0.3, frame="query")

    def pipeline(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        return super().pipeline(**{"size": 128, **options})


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_a_run_equals_the_reference_with_attention_pair_by_pair(size: tuple[int, int]) -> None:
    pipe, call = tiny.flux(size=size, batch=2, steps=6)
    coarse = size[0] // 32 * (size[1] // 32)

    def forward(*, image: int, step: int, img_ids: Tensor, **arguments: Any) -> Tensor:
        model = pipe.transformer
        if step in (2, 3):
            places = [(row, column) for _, row, column in img_ids.tolist()]
            model = mixed_transformer(model, arguments["txt_ids"].shape[0], places, coarse)
        return model(img_ids=img_ids, **arguments, return_dict=False)[0]

    accelerator = RALU(**{**SHORT, "ratio": 0.25}, restart=4.0, frame="query")
    compare((pipe, call), accelerator, ends=(0.3, 0.45), z=4.0, ratio=0.25, forward=forward, listed=True)


@given(
    words=st.integers(0, 4),
    kept=st.integers(1, 5),
    split=st.integers(1, 3),
    appended=st.integers(0, 3),
    masked=st.sampled_from(["no", "keys", "pairs", "added"]),
    seed=st.integers(0, 9),
)
def test_one_attention_equals_the_pairs_of_every_image(
    words: int, kept: int, split: int, appended: int, masked: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = [(float(row), float(column)) for row in range(3) for column in range(3)]
    sequences = []
    for _ in range(2):
        parents = [grid[index] for index in torch.randperm(9, generator=generator)[: kept + split].tolist()]
        children = [(r + i, c + j) for r, c in parents[kept:] for i, j in reference_ralu.CHILDREN]
        sequences.append([*parents[:kept], *children])
    others = [(0.0, float(3 + number)) for number in range(appended)]
    kinds = ["text"] * words + ["coarse"] * kept + ["fine"] * 4 * split + ["text"] * appended
    length = len(kinds)
    query, key, value = torch.randn(3, 2, 2, length, 16, generator=generator)
    mask: Tensor | None = None
    if masked == "added":
        mask = torch.randn(2, 1, length, length, generator=generator)
    elif masked != "no":
        mask = torch.rand(2, 1, 1 if masked == "keys" else length, length, generator=generator) < 0.7
        mask[..., words] = True  # every query sees something
    places = torch.tensor(sequences)
    table = rotary(torch.nn.functional.pad(places, (1, 0)), WIDTHS, 10000.0, use_real=True, freqs_dtype=torch.float64)

    def turned(states: Tensor, image: int) -> Tensor:
        """Turn [H, S, D] by the places of one image in the coarse frame."""
        own = torch.tensor([*[(0.0, 0.0)] * words, *sequences[image], *others])
        angles = rotary(torch.nn.functional.pad(own, (1, 0)), WIDTHS, 10000.0, freqs_dtype=torch.float64)
        return torch.view_as_real(torch.view_as_complex(states.double().unflatten(-1, (-1, 2))) * angles).flatten(-2)

    rows = [torch.stack([turned(x[image], image) for image in (0, 1)]).float() for x in (query, key)]
    found = QueryFrame(kept, 4 * split, appended, table)(AttentionCall(*rows, value, mask))
    for image in (0, 1):
        own = [*[(0.0, 0.0)] * words, *sequences[image], *others]
        reference = PairByPair(kinds, own, WIDTHS, 10000.0)
        if mask is not None:
            own_mask = mask[image, 0]
            hidden = torch.zeros(own_mask.shape).masked_fill(~own_mask, -torch.inf) if masked != "added" else own_mask
            reference.added = reference.added + hidden
        expected = reference.attend(*(x[image : image + 1].transpose(1, 2) for x in (query, key, value)))
        torch.testing.assert_close(found[image : image + 1], expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "FluxKontextPipeline", "FluxFillPipeline", "ChromaPipeline", "OvisImagePipeline",
             "BriaPipeline", "Flux2Pipeline"]
)  # fmt: skip
def test_every_image_of_a_batch_equals_its_own_run_in_every_family_that_can(
    name: str, generators: Callable[..., Any]
) -> None:
    pipe, call = tiny.described(name)
    fast = accelerate(pipe, [QUERY])
    together = tiny.run(fast, call, generator=generators(1, 2))
    single = {
        key: value[:1] if isinstance(value, (Tensor, list)) and len(value) == 2 else value
        for key, value in call.items()
    }
    alone = tiny.run(fast, single, generator=generators(1))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=2e-3)
    coarse = accelerate(pipe, [RALU(**SHORT)])
    assert not torch.allclose(tiny.run(coarse, call, generator=generators(1, 2)), together, atol=1e-3)


def test_guidance_by_the_same_prompt_changes_nothing() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    fast = accelerate(pipe, [QUERY])
    same = {f"negative_{name}": call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    assert torch.equal(tiny.run(fast, {**call, **same}, true_cfg_scale=2.0), tiny.run(fast, call))


@pytest.mark.parametrize("backend", ["_native_math", "_native_flash"])
def test_a_kernel_of_the_stack_computes_both_parts(backend: str) -> None:
    pipe, call = tiny.flux(size=128, batch=2, steps=6)
    expected = tiny.run(accelerate(pipe, [QUERY]), call)
    found = tiny.run(accelerate(pipe, [QUERY, Attention(backend)], strict=True), call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "cache",
    [TeaCache(0.0, (1.0, 0.0)), FirstBlockCache(0.0), ToCa(3, 1.0), FirstBlockCache(0.0, stage_change="carry")],
    ids=lambda cache: cache.describe(),
)
def test_beside_a_cache_that_skips_nothing_it_is_itself(cache: Any) -> None:
    pipe, call = tiny.flux(size=128, batch=2, steps=6)
    assert torch.equal(tiny.run(accelerate(pipe, [QUERY, cache]), call), tiny.run(accelerate(pipe, [QUERY]), call))


@pytest.mark.parametrize(
    "cache", [FirstBlockCache(5.0), ToCa(2, 0.25, first=1), ToCa(2, 0.25, first=1, score="value_norm")], ids=str
)
def test_caches_skip_inside_it(cache: Any) -> None:
    pipe, call = tiny.flux(size=128, batch=2, steps=12)
    fast = accelerate(pipe, [RALU(**{**SHORT, "steps": (4, 4, 4)}, frame="query"), cache])
    assert torch.isfinite(tiny.run(fast, call)).all()
    assert {step.action for step in fast.fastdit.last_run.steps if step.stage == 1} > {"computed"}


def test_what_it_can_t_go_together_with_is_refused_by_name() -> None:
    for other, reason in (
        (Compile(), "attention whose calls can be seen"),
        (FirstBlockCache(0.5, per_image=True), "the same images in every block call"),
        (ToCa(score="attention"), "one place for all queries"),
        (ToCa(score="text"), "one place for all queries"),
    ):
        with pytest.raises(IncompatibleStack, match=reason):
            Stack([QUERY, other])
    with pytest.raises(InvalidConfig, match="'coarse', 'fine', 'query'"):
        RALU(**SHORT, frame="key")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusion3Pipeline", "added to the tokens before the blocks"),
        ("QwenImagePipeline", "middle"),
        ("Lumina2Pipeline", "inside its forward"),
        ("SanaPipeline", "whole frames"),
    ],
)
def test_a_family_that_can_t_is_refused_with_the_reason(name: str, reason: str) -> None:
    pipe, _ = tiny.described(name)
    with pytest.raises(UnsupportedModel, match=reason):
        accelerate(pipe, [QUERY])


class ByHand:
    """A processor of the user's own, which multiplies matrices itself."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any) -> Any:
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def test_attention_that_can_t_be_seen_is_refused_by_name() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(IncompatibleStack, match=r"transformer_blocks\.0 is compiled"):
        accelerate(pipe, [QUERY])
    pipe, call = tiny.flux(size=128, steps=6)
    pipe.transformer.set_attn_processor(ByHand())
    with pytest.raises(UnsupportedModel, match="scaled_dot_product_attention"):
        tiny.run(accelerate(pipe, [QUERY]), call)


def test_attention_that_is_not_of_the_whole_sequence_is_refused_by_name() -> None:
    frame = QueryFrame(2, 4, 0, (torch.ones(1, 6, 16), torch.zeros(1, 6, 16)))
    states = torch.zeros(1, 2, 8, 16)
    for call in (
        AttentionCall(states, states[:, :, :5], states[:, :, :5]),
        AttentionCall(*3 * [states], is_causal=True),
    ):
        with pytest.raises(UnsupportedModel, match="frame='coarse'"):
            frame(call)
