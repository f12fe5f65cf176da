"""Every described family on a tiny pipeline of its real class: bits, sizes, batches, seeds, places of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from fastdit import (
    RALU,
    EasyCache,
    FirstBlockCache,
    InvalidConfig,
    SeaCache,
    UnsupportedModel,
    accelerate,
)
from fastdit.layout import CoarseLayout, FineLayout, MixedLayout, TokenLayout, gather_tokens
from fastdit.models.family import Family, families, family_of
from fastdit.models.flux import LONGCAT_IMAGE
from fastdit.models.rotary import PerImageTable, rotary
from fastdit.nested import named_arguments, tensors_of
from fastdit.structure import structural_twin
from fastdit.testing import PIPELINES
from fastdit.testing.tiny import flow_matching

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma, inside diffusers
]

SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
DISTILLED = RALU(steps=(1, 1, 2), ends=(0.3, 0.45), ratio=0.3)
DESCRIBED = [
    name
    for name in PIPELINES
    if not name.endswith(("Img2ImgPipeline", "InpaintPipeline", "FillPipeline"))
    and any(name in family.pipelines and family.mixes for family in families())
]
#: Two calls of the transformer a step, one a branch.
TWO_CALLS = ("ChromaPipeline", "OvisImagePipeline", "Flux2KleinPipeline", "QwenImagePipeline", "HunyuanImagePipeline",
             "CogView4Pipeline", "Lumina2Pipeline")  # fmt: skip
#: Their forwards read lengths of prompts or the choices of experts, which shapes alone don't have.
UNCOUNTED = ("HunyuanImagePipeline", "Lumina2Pipeline", "HiDreamImagePipeline")


def only(call: dict[str, Any], image: int) -> dict[str, Any]:
    """The call of one prompt of two."""

    def own(name: str, value: Any) -> Any:
        if "embeds" not in name and "mask" not in name:
            return value
        return value[:, image : image + 1] if "llama3" in name else value[image : image + 1]

    return {name: own(name, value) for name, value in call.items()}


@pytest.fixture(scope="module", params=DESCRIBED)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    return request.param, *tiny.described(request.param)


def test_an_empty_stack_is_bit_equal_to_the_pipeline(case: Any, generators: Callable[..., Any]) -> None:
    _, pipe, call = case
    plain = tiny.run(pipe, call, generator=generators(1, 2))
    assert torch.equal(tiny.run(accelerate(pipe, []), call, generator=generators(1, 2)), plain)


def test_an_image_of_a_batch_equals_its_own_run_with_its_own_generator(
    case: Any, generators: Callable[..., Any]
) -> None:
    name, pipe, call = case
    fast = accelerate(pipe, [SHORT])
    together = tiny.run(fast, call, generator=generators(1, 2))
    assert torch.isfinite(together).all()
    assert together.shape == tiny.run(pipe, call, generator=generators(1, 2)).shape
    calls = 2 if name in TWO_CALLS else 1
    tokens = [step.tokens for step in fast.fastdit.last_run.steps]
    assert tokens == [count for count in (24, 24, 45, 45, 96, 96) for _ in range(calls)]
    for image in (0, 1):
        alone = tiny.run(fast, only(call, image), generator=generators(image + 1))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("frame", ["coarse", "fine"])
def test_four_steps_of_a_distilled_model_run_in_both_frames(case: Any, frame: str) -> None:
    _, pipe, call = case
    schedule = RALU(steps=(1, 1, 2), ends=(0.3, 0.45), ratio=0.3, frame=frame)
    fast = accelerate(pipe, [schedule])
    first = tiny.run(fast, call, num_inference_steps=4)
    assert torch.isfinite(first).all()
    assert torch.equal(tiny.run(fast, call, num_inference_steps=4), first)


def test_schnell_has_no_guidance_and_takes_four_steps() -> None:
    pipe, call = PIPELINES["FluxPipeline"](size=128, steps=4, transformer={"guidance_embeds": False})
    pipe.register_modules(scheduler=flow_matching())
    fast = accelerate(pipe, [DISTILLED])
    assert torch.isfinite(tiny.run(fast, call)).all()
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [16, 28, 64, 64]
    sigmas = [step.sigma for step in fast.fastdit.last_run.steps]
    assert sigmas[0] == 1.0
    assert sigmas[1] > 0.7  # renoised at the switch from a noise level of 0.7


def test_latents_that_are_asked_for_have_the_full_size_whenever_the_run_was_interrupted(case: Any) -> None:
    name, pipe, call = case
    fast = accelerate(pipe, [SHORT])
    whole = tiny.run(fast, call, output_type="latent")

    def callback(twin: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        twin._interrupt = step == 2
        return {}

    stopped = tiny.run(fast, call, output_type="latent", callback_on_step_end=callback)
    assert stopped.shape == whole.shape
    # Lumina's pipeline can't be interrupted.
    assert torch.equal(stopped, whole) is (name == "Lumina2Pipeline")


@pytest.mark.parametrize(
    "cache", [FirstBlockCache(1.0), SeaCache(0.9), EasyCache(5.0)], ids=lambda cache: cache.describe()
)
def test_a_cache_inside_the_stages_skips_or_is_refused_by_name(case: Any, cache: Any) -> None:
    name, pipe, call = case
    stack = [RALU(steps=(5, 6, 7), ends=(0.3, 0.45), ratio=0.3), cache]
    fast = accelerate(pipe, stack, strict=True)
    if name == "HiDreamImagePipeline":
        with pytest.raises(UnsupportedModel, match=r"no output of a block|latents' own shape"):
            tiny.run(fast, call, num_inference_steps=18)
        return
    found = tiny.run(fast, call, num_inference_steps=18)
    assert torch.isfinite(found).all()
    assert fast.fastdit.last_run.skipped
    assert torch.equal(tiny.run(fast, call, num_inference_steps=18), found)


def forwards(pipe: Any, call: dict[str, Any]) -> tuple[Family, dict[str, Any], TokenLayout]:
    """The arguments of a run's first forward by name, and the layout of its tokens."""
    family = family_of(pipe)
    assert family is not None
    args, kwargs = tiny.recorded_calls(pipe, call)[0]
    bound = inspect.signature(type(pipe.transformer).forward).bind(None, *args, **kwargs)
    arguments = dict(list(named_arguments(bound).items())[1:])
    return family, arguments, FineLayout(8, 12)


def output_tokens(family: Family, pipe: Any, arguments: dict[str, Any], children: Any, layout: TokenLayout) -> Any:
    with torch.no_grad():
        output = structural_twin(pipe.transformer, children)(**arguments)
    found = tensors_of(family.velocity(output, layout))
    if len(found) > 1:
        found = [torch.stack([frame.squeeze(1) for frame in found])]
    return family.tokens(found[0])


def permuted(images: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(count, generator=generator) for _ in range(images)])


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_tokens_of_one_resolution_in_any_order_give_the_plain_forward(case: Any, kind: str, images: int) -> None:
    name, pipe, _ = case
    call = tiny.described(name, batch=images)[1]
    family, arguments, fine = forwards(pipe, call)
    noise = family.latents_of(arguments, fine)
    raster = family.tokens(noise)
    order, empty = permuted(images, 24), torch.empty(images, 0, dtype=torch.long)
    if kind == "fine":
        plain, layout = fine, MixedLayout(8, 12, empty, order, "fine")
        places = layout.to_raster(torch.arange(96)[None, :, None].expand(images, -1, -1)).squeeze(2).argsort(dim=1)
    else:
        plain, layout = CoarseLayout(8, 12), MixedLayout(8, 12, order, empty)
        raster, places = raster[:, :24], order
    places = places.repeat(len(raster) // images, 1)
    straight = family.latents(raster, plain)
    expected = output_tokens(family, pipe, family.place(arguments, fine, straight, plain), {}, plain)
    strip = family.latents(gather_tokens(raster, places), layout)
    children = family.child_overrides(pipe.transformer, layout, strip)
    found = output_tokens(family, pipe, family.place(arguments, fine, strip, layout), children, layout)
    torch.testing.assert_close(found, gather_tokens(expected, places), rtol=0, atol=2e-5)
    assert not torch.allclose(found, expected, atol=1e-2)


def test_the_tokens_of_a_picture_that_qwen_image_edits_stay_in_place() -> None:
    pipe, call = tiny.described("QwenImagePipeline")
    family, arguments, fine = forwards(pipe, call)
    picture, sizes = tiny.randn(2, 15, 16, seed=9), [[(1, 8, 12), (1, 3, 5)]] * 2
    edited = {
        **arguments,
        "hidden_states": torch.cat([arguments["hidden_states"], picture], dim=1),
        "img_shapes": sizes,
    }
    assert torch.equal(family.latents_of(edited, fine), arguments["hidden_states"])
    raster, order = arguments["hidden_states"], permuted(2, 24)
    layout = MixedLayout(8, 12, torch.empty(2, 0, dtype=torch.long), order, "fine")
    places = layout.to_raster(torch.arange(96)[None, :, None].expand(2, -1, -1)).squeeze(2).argsort(dim=1)
    strip = gather_tokens(raster, places)
    placed = family.place(edited, fine, strip, layout)
    assert torch.equal(placed["hidden_states"][:, 96:], picture)
    children = family.child_overrides(pipe.transformer, layout, strip)
    found = output_tokens(family, pipe, placed, children, layout)
    plain = output_tokens(family, pipe, edited, {}, fine)
    torch.testing.assert_close(found, gather_tokens(plain, places), rtol=0, atol=2e-5)
    assert not torch.allclose(plain, output_tokens(family, pipe, arguments, {}, fine), atol=1e-2)


@pytest.mark.parametrize(("name", "picture"), [("QwenImageEditPipeline", 0), ("QwenImageEditPlusPipeline", -1)])
def test_the_picture_that_is_edited_decides_the_size_that_was_not_asked_for(name: str, picture: int) -> None:
    family = next(family for family in families() if name in family.pipelines)
    pipe, _ = tiny.described("QwenImagePipeline")
    images = [Image.new("RGB", (320, 160)), Image.new("RGB", (100, 100))]
    size = [(736, 1440), (1024, 1024)][picture]
    assert family.size(pipe, {"image": images, "height": None, "width": None}) == size
    assert family.size(pipe, {"image": images, "height": 64, "width": None}) == (64, size[1])


def test_ids_that_count_from_elsewhere_are_counted_on_from_there() -> None:
    fine = FineLayout(4, 4)
    ids = torch.tensor([[1, 7 + row, 9 + column] for row in range(4) for column in range(4)])
    given = {"hidden_states": torch.zeros(1, 16, 2), "img_ids": ids, "txt_ids": torch.zeros(3, 3)}
    mixed = MixedLayout(4, 4, torch.tensor([[0, 1, 3]]), torch.tensor([[2]]), "fine")
    placed = LONGCAT_IMAGE.place(given, fine, torch.zeros(1, 7, 2), mixed)
    kept = [[1, 7.5, 9.5], [1, 7.5, 11.5], [1, 9.5, 11.5]]
    assert placed["img_ids"].tolist() == [*kept, [1, 9, 9], [1, 9, 10], [1, 10, 9], [1, 10, 10]]
    again = LONGCAT_IMAGE.place(placed, mixed, torch.zeros(1, 7, 2), mixed)
    assert torch.equal(again["img_ids"], placed["img_ids"])


def test_places_between_cogview_s_tokens_are_those_of_a_picture_twice_as_large() -> None:
    pipe, call = tiny.described("CogView4Pipeline")
    family, arguments, fine = forwards(pipe, call)
    empty, order = torch.empty(2, 0, dtype=torch.long), permuted(2, 24)
    latents = family.latents_of(arguments, fine)
    outputs = []
    for frame in ("coarse", "fine"):
        layout = MixedLayout(8, 12, empty, order, frame)
        strip = family.latents(family.tokens(latents), layout)
        children = family.child_overrides(pipe.transformer, layout, strip)
        outputs.append(output_tokens(family, pipe, family.place(arguments, fine, strip, layout), children, layout))
    assert torch.equal(*outputs)


def test_two_turns_of_half_a_place_are_one_of_a_whole() -> None:
    places = torch.tensor([[0.5, 1.5], [2.5, 0.5]])
    half, whole = (rotary(scale * places, (4, 6), 100.0) for scale in (1.0, 2.0))
    torch.testing.assert_close(half * half, whole)


def test_a_table_of_a_batch_refuses_what_it_can_t_answer() -> None:
    table = PerImageTable(torch.zeros(2, 3, 4))
    assert table.unsqueeze(1).shape == (2, 3, 1, 4)
    assert table[None, :, None, :].shape == (2, 3, 1, 4)
    assert torch.cat([table, table], dim=0).table.shape == (2, 6, 4)
    for ask in (
        lambda: table[0],
        lambda: table.unsqueeze(-1),
        lambda: torch.cat([table], dim=1),
        lambda: torch.sin(table),
    ):
        with pytest.raises(TypeError, match="a rotary table of a batch"):
            ask()


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("Flux2Pipeline", {"image": torch.zeros(1, 3, 8, 8), "height": None}, "height"),
        ("ChromaPipeline", {"ip_adapter_image": torch.zeros(1, 3, 8, 8)}, "ip_adapter_image"),
        ("CogView4Pipeline", {"latents": torch.zeros(1, 4, 15, 16)}, "latents"),
        ("Lumina2Pipeline", {"height": 1024}, "32 positions"),
        ("ZImagePipeline", {"width": 1024}, "32 positions"),
        ("CogView4Pipeline", {"timesteps": [900, 100]}, "leave"),
    ],
)
def test_what_a_family_can_t_honour_is_refused_by_name(name: str, arguments: dict[str, Any], named: str) -> None:
    pipe, call = tiny.described(name)
    with pytest.raises(InvalidConfig, match=named):
        tiny.run(accelerate(pipe, [SHORT]), call, **arguments)


def test_hunyuan_image_refuses_what_ties_one_step_to_the_next() -> None:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    pipe, call = tiny.described("HunyuanImagePipeline")
    pipe.register_modules(guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_momentum=-0.5))
    with pytest.raises(InvalidConfig, match="momentum"):
        tiny.run(accelerate(pipe, [SHORT]), call)
    pipe.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(InvalidConfig, match="distilled"):
        tiny.run(accelerate(pipe, [SHORT]), call)


def test_kontext_keeps_the_picture_s_tokens_at_every_stage_and_sees_them() -> None:
    pipe, call = tiny.described("FluxKontextPipeline")
    fast = accelerate(pipe, [SHORT])
    first = tiny.run(fast, call)
    other = tiny.run(fast, call, image=torch.zeros(1, 3, 64, 96))
    assert not torch.allclose(first, other, atol=1e-2)
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [24, 24, 45, 45, 96, 96]


def test_counting_what_a_run_cost_leaves_the_pipeline_as_it_was(case: Any) -> None:
    name, pipe, call = case
    fast = accelerate(pipe, [SHORT])
    first = tiny.run(fast, call)
    steps = fast.fastdit.last_run.steps
    if name in UNCOUNTED:
        assert steps[0].flops is None and "can't be counted" in steps[0].flops_unknown
    else:
        assert 0 < steps[0].flops < steps[len(steps) // 2].flops < steps[-1].flops
    assert torch.equal(tiny.run(fast, call), first)
