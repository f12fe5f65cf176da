"""TextAttention: the attention that it reads against maps written out, and what it goes together with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from reference_token_cache import attend
from torch import Tensor

import tiny
from fastdit import (
    RALU,
    Attention,
    Compile,
    DuCa,
    FirstBlockCache,
    IncompatibleStack,
    Interval,
    InvalidConfig,
    Stack,
    StepMask,
    TextAttention,
    ToCa,
    UnsupportedModel,
    accelerate,
)
from fastdit.schedule.selectors.base import Scene
from fastdit.testing import AcceleratorContract

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma, inside diffusers
]

SHORT = {"steps": (3, 2, 2), "ends": (0.3, 0.45), "ratio": 0.3}
RECEIVED = RALU(**SHORT, selector=TextAttention())


@pytest.mark.exhaustive
class TestContract(AcceleratorContract):
    accelerator = RALU(**{**SHORT, "steps": (4, 4, 4)}, selector=TextAttention())
    # The choice is made by the maps of both branches, so it is another one beside another branch.
    test_branches_apart = None

    def pipeline(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        return super().pipeline(**{"size": 128, **options})


@contextmanager
def attention_inputs(transformer: Any) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Every call of the attention in the main blocks: the module and its arguments."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def note(attn: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        calls.append((attn, {"hidden_states": args[0], **given} if args else given))

    handles = [block.attn.register_forward_pre_hook(note, with_kwargs=True) for block in tiny.main_blocks(transformer)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def flux_map(attn: Any, given: dict[str, Any]) -> Tensor:
    text = given.get("encoder_hidden_states")
    return attend(attn, given["hidden_states"], text, given["image_rotary_emb"])[1]


def sd3_map(attn: Any, given: dict[str, Any]) -> Tensor:
    """[B, H, S, S] of an SD3 block, the image's tokens first."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (attn.heads, -1))

    image, text = given["hidden_states"], given["encoder_hidden_states"]
    query, key = heads(attn.to_q(image)), heads(attn.to_k(image))
    text_query, text_key = heads(attn.add_q_proj(text)), heads(attn.add_k_proj(text))
    if attn.norm_q is not None:
        query, key = attn.norm_q(query), attn.norm_k(key)
        text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
    query, key = torch.cat([query, text_query], dim=1), torch.cat([key, text_key], dim=1)
    return torch.einsum("bqhd,bkhd->bhqk", query, key).div(math.sqrt(query.shape[3])).softmax(3)


def expected_exchange(
    maps: list[Tensor], tokens: int, images: int, *, text_first: bool
) -> tuple[list[list[float]], list[list[float]]]:
    """Lists of what each image's tokens give to the text and receive from it, one number after the other."""
    given = [[0.0] * tokens for _ in range(images)]
    received = [[0.0] * tokens for _ in range(images)]
    terms = [0] * images
    for each in maps:
        rows, heads, length, _ = each.shape
        words = length - tokens
        image = range(words, length) if text_first else range(tokens)
        text = range(words) if text_first else range(tokens, length)
        for row in range(rows):
            terms[row % images] += 1
            mean = sum(each[row, head] for head in range(heads)) / heads
            for number, token in enumerate(image):
                given[row % images][number] += float(sum(mean[token, word] for word in text))
                received[row % images][number] += float(sum(mean[word, token] for word in text)) / words
    return (
        [[value / terms[i] for value in row] for i, row in enumerate(given)],
        [[value / terms[i] for value in row] for i, row in enumerate(received)],
    )


@pytest.mark.parametrize("kind", ["flux", "flux, guided", "flux, kontext", "sd3, guided", "sd3.5, guided"])
def test_what_is_exchanged_equals_the_maps_of_the_last_coarse_step_written_out(kind: str) -> None:
    flux = kind.startswith("flux")
    if kind == "flux, kontext":
        pipe, call = tiny.described("FluxKontextPipeline", rows=8, columns=8, steps=7)
    elif flux:
        pipe, call = tiny.flux(size=128, batch=2, steps=7)
        call = tiny.flux_negative(call) if "guided" in kind else call
    else:
        pipe, call = tiny.sd3(size=128, batch=2, steps=7, three_five="3.5" in kind)
    scenes: list[Scene] = []

    class Seeing(TextAttention):
        def scores(self, scene: Scene) -> Tensor:
            scenes.append(scene)
            return super().scores(scene)

    fast = accelerate(pipe, [RALU(**SHORT, selector=Seeing())])
    with attention_inputs(pipe.transformer) as calls:
        tiny.run(fast, call)
    blocks = len(tiny.main_blocks(pipe.transformer))
    forwards = 2 if kind == "flux, guided" else 1
    last = calls[2 * forwards * blocks : 3 * forwards * blocks]
    tokens, images = scenes[0].rows * scenes[0].columns, len(scenes[0].clean)
    maps = [(flux_map if flux else sd3_map)(attn, given) for attn, given in last]
    if kind == "flux, kontext":  # the picture's tokens that follow count neither as image nor as text
        words = call["prompt_embeds"].shape[1]
        maps = [each[:, :, : words + tokens, : words + tokens] for each in maps]
    given, received = expected_exchange(maps, tokens, images, text_first=flux)
    found = scenes[0].exchange
    assert found is not None
    torch.testing.assert_close(found.given, torch.tensor(given), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.received, torch.tensor(received), rtol=1e-4, atol=1e-6)
    assert torch.equal(TextAttention().scores(scenes[0]), found.received)
    assert torch.equal(TextAttention("given").scores(scenes[0]), found.given)


@pytest.mark.parametrize("build", [tiny.flux, tiny.sd3], ids=["flux", "sd3"])
@pytest.mark.parametrize(
    "cache",
    [
        StepMask((True, False, False, True, False, True, False)),
        Interval(5, scope="forward"),
        FirstBlockCache(1e9, per_image=True),
        ToCa(4, 0.25, first=1),
        DuCa(4, first=1),
    ],
    ids=lambda cache: type(cache).__name__,
)
def test_caches_run_the_last_coarse_step_whole_and_say_why(build: Any, cache: Any) -> None:
    pipe, call = build(size=128, steps=7)
    fast = accelerate(pipe, [RECEIVED, cache])
    assert torch.isfinite(tiny.run(fast, call)).all()
    steps = fast.fastdit.last_run.steps
    assert steps[2].action == "computed" and "its attention chooses" in steps[2].reason
    assert steps[1].action != "computed"


def test_a_kernel_of_the_stack_changes_no_choice() -> None:
    pipe, call = tiny.flux(size=128, batch=2, steps=7)
    expected = tiny.run(accelerate(pipe, [RECEIVED]), call)
    found = tiny.run(accelerate(pipe, [RECEIVED, Attention("_native_math")], strict=True), call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


class ByHand:
    """A processor of the user's own, which calls no attention of torch's."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any) -> Any:
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def test_attention_that_can_t_be_seen_is_refused_by_name() -> None:
    with pytest.raises(IncompatibleStack, match="attention whose calls can be seen"):
        Stack([RECEIVED, Compile()])
    for name in ("ChromaPipeline", "QwenImagePipeline"):
        with pytest.raises(UnsupportedModel, match="TOKEN_ROLES"):
            accelerate(tiny.described(name)[0], [RECEIVED])
    pipe, call = tiny.flux(size=128, steps=7)
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(IncompatibleStack, match=r"transformer_blocks\.0 is compiled"):
        accelerate(pipe, [RECEIVED])
    pipe, call = tiny.flux(size=128, steps=7)
    pipe.transformer.set_attn_processor(ByHand())
    with pytest.raises(UnsupportedModel, match="scaled_dot_product_attention"):
        tiny.run(accelerate(pipe, [RECEIVED]), call)


def test_what_can_t_be_asked_for_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="received"):
        TextAttention("both")
    with pytest.raises(InvalidConfig, match="higher strength"):
        TextAttention().scores(Scene(None, None, 4, 4, torch.zeros(1, 16, 16)))  # type: ignore[arg-type]


def test_a_stack_with_both_parts_survives_json() -> None:
    stack = Stack([RALU(**SHORT, selector=TextAttention("given"), frame="query")])
    assert Stack.from_json(stack.to_json()) == stack
