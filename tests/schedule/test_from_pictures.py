"""Runs that begin with a picture: the schedule starts at the stage that the strength reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from fastdit import (
    RALU,
    FirstBlockCache,
    InvalidConfig,
    JustInTime,
    accelerate,
)
from fastdit.layout import CoarseLayout, FineLayout, MixedLayout
from fastdit.models import family_of
from fastdit.models.flux import FLUX
from fastdit.models.following import followed
from fastdit.testing import PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # Chroma, in diffusers

SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
FROM_PICTURES = [name for name in PIPELINES if "Img2Img" in name or "Inpaint" in name or "Fill" in name]
INPAINTING = [name for name in FROM_PICTURES if "Inpaint" in name]
TOKENS = [24, 24, 45, 45, 96, 96]


def only(call: dict[str, Any], image: int) -> dict[str, Any]:
    names = [name for name in call if "embeds" in name or "mask" in name or "image" in name]
    return {**call, **{name: call[name][image : image + 1] for name in names}}


@pytest.mark.parametrize(("strength", "left_out"), [(1.0, 0), (0.75, 1), (0.6, 2), (0.34, 3), (0.3, 4)])
@pytest.mark.parametrize("name", FROM_PICTURES)
def test_a_run_starts_at_the_stage_that_the_strength_reaches_and_an_image_equals_its_own_run(
    name: str, strength: float, left_out: int, generators: Callable[..., Any]
) -> None:
    pipe, call = tiny.described(name, strength=strength)
    plain = tiny.run(pipe, call, generator=generators(1, 2))
    assert torch.equal(tiny.run(accelerate(pipe, []), call, generator=generators(1, 2)), plain)
    fast = accelerate(pipe, [SHORT])
    together = tiny.run(fast, call, generator=generators(1, 2))
    assert torch.isfinite(together).all()
    assert together.shape == plain.shape
    steps = {step.step: step for step in fast.fastdit.last_run.steps}
    assert [step.tokens for step in steps.values()] == TOKENS[left_out:]
    assert steps[0].stage == left_out // 2
    for image in (0, 1):
        alone = tiny.run(fast, only(call, image), generator=generators(image + 1))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_picture_is_averaged_and_its_noise_stays_unit_noise(stage: int) -> None:
    pipe, _ = tiny.flux(size=(64, 96))
    clean, noise = tiny.randn(1, 4, 8, 12, seed=1), tiny.randn(1, 4, 8, 12, seed=2)
    sigma = 0.6
    latents = FLUX.pack((1 - sigma) * clean + sigma * noise)
    state = SHORT.begin(SHORT.plan(4, 6, None), FLUX, pipe, torch.Generator().manual_seed(0))
    found, layout = state.resume(stage, latents, clean, sigma)
    if stage == 2:
        assert torch.equal(found, latents)
        return
    coarse = torch.empty(1, 4, 4, 6)
    for row in range(4):
        for column in range(6):
            window = (slice(None), slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            average, draw = clean[window].sum(dim=(2, 3)) / 4, noise[window].sum(dim=(2, 3)) / 2
            coarse[:, :, row, column] = (1 - sigma) * average + sigma * draw
    expected = FLUX.pack(coarse)
    if stage == 1:
        cells = [
            (2 * (p // 3) + i) * 6 + 2 * (p % 3) + j for p in layout.refined[0].tolist() for i in (0, 1) for j in (0, 1)
        ]
        expected = torch.cat([expected[:, layout.kept[0]], latents[:, cells]], dim=1)
    torch.testing.assert_close(found, expected)


def test_a_cache_inside_sees_the_shorter_run() -> None:
    pipe, call = tiny.described("FluxImg2ImgPipeline")
    long = RALU(steps=(5, 6, 7), ends=(0.3, 0.45), ratio=0.3)
    fast = accelerate(pipe, [long, FirstBlockCache(1.0)], strict=True)
    found = tiny.run(fast, {**call, "num_inference_steps": 18}, strength=0.6)
    assert torch.isfinite(found).all()
    assert len(fast.fastdit.last_run.steps) == 11
    assert fast.fastdit.last_run.skipped


def test_latents_of_the_user_s_tell_nothing_of_the_picture_and_are_refused() -> None:
    pipe, call = tiny.described("FluxImg2ImgPipeline")
    with pytest.raises(InvalidConfig, match="latents"):
        tiny.run(accelerate(pipe, [SHORT]), call, strength=0.6, latents=torch.zeros(2, 96, 16))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", INPAINTING)
def test_what_the_mask_protects_is_the_picture_and_the_rest_is_not(name: str, strength: float) -> None:
    pipe, call = tiny.described(name, strength=strength)
    fast = accelerate(pipe, [SHORT])
    found = tiny.run(fast, call, output_type="latent")
    nothing = tiny.run(fast, call, output_type="latent", mask_image=torch.zeros_like(call["mask_image"]))
    everything = tiny.run(fast, call, output_type="latent", mask_image=torch.ones_like(call["mask_image"]))
    # Of a picture that is protected as a whole, the plain pipeline leaves the same.
    plain = tiny.run(pipe, call, output_type="latent", mask_image=torch.zeros_like(call["mask_image"]))
    torch.testing.assert_close(nothing, plain)
    frames = [
        latents if latents.dim() == 4 else FLUX.unpack(latents, 8, 12) for latents in (found, nothing, everything)
    ]
    torch.testing.assert_close(frames[0][..., :12], frames[1][..., :12])
    assert not torch.allclose(frames[0][..., 12:], frames[1][..., 12:], atol=0.1)
    assert not torch.allclose(frames[0], frames[2], atol=0.1)


def test_fill_s_mask_is_that_of_a_picture_half_as_large_in_the_first_stage() -> None:
    pipe, call = tiny.described("FluxFillPipeline")
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    seen: list[dict[str, Any]] = []
    mask = torch.rand(2, 1, 128, 192, generator=torch.Generator().manual_seed(4)).round()
    fast = accelerate(pipe, [SHORT])
    tiny.run(fast, call, mask_image=mask)
    joined = [given["hidden_states"] for given in seen]
    assert [tuple(tokens.shape) for tokens in joined] == [(2, tokens, 288) for tokens in TOKENS]
    half = torch.nn.functional.avg_pool2d(mask, 2)
    arguments = (2, 4, 1, 64, 96, torch.float32, "cpu", None)
    small, _ = pipe.prepare_mask_latents(half, torch.zeros(2, 3, 64, 96), *arguments)
    large, _ = pipe.prepare_mask_latents(mask, torch.zeros(2, 3, 128, 192), 2, 4, 1, 128, 192, *arguments[5:])
    for step in (0, 1):
        torch.testing.assert_close(joined[step][:, :, 32:], small)
    assert torch.equal(joined[5][:, :, 32:], large)
    picture = FLUX.unpack(joined[5][:, :, 16:32], 8, 12)
    torch.testing.assert_close(joined[0][:, :, 16:32], FLUX.pack(torch.nn.functional.avg_pool2d(picture, 2)))


def test_a_mask_is_averaged_under_coarse_tokens_and_itself_under_fine_ones() -> None:
    mask = torch.zeros(1, 4, 8, 12)
    mask[..., 5:] = 1.0
    kept, refined = torch.tensor([[0, 1, 3, 4]]), torch.tensor([[2, 5]])
    layout = MixedLayout(4, 6, kept, refined)
    found = followed(FLUX, FLUX.pack(mask), layout)
    half = torch.nn.functional.avg_pool2d(mask, 2)
    assert half.unique().tolist() == [0.0, 0.5, 1.0]
    cells = [(2 * (p // 3) + i) * 6 + 2 * (p % 3) + j for p in (2, 5) for i in (0, 1) for j in (0, 1)]
    assert torch.equal(found, torch.cat([FLUX.pack(half)[:, kept[0]], FLUX.pack(mask)[:, cells]], dim=1))
    assert torch.equal(followed(FLUX, FLUX.pack(mask), FineLayout(4, 6)), FLUX.pack(mask))
    assert torch.equal(followed(FLUX, FLUX.pack(mask), CoarseLayout(4, 6), noise=True), 2 * FLUX.pack(half))


@pytest.mark.parametrize("schedule", [SHORT, JustInTime((3, 3), shares=(0.4,))], ids=["coarse", "anchors"])
@pytest.mark.parametrize("picture", [(64, 96), (96, 64), (70, 100)])
def test_kontext_s_inpainting_has_the_size_of_its_picture(schedule: Any, picture: tuple[int, int]) -> None:
    pipe, call = tiny.described("FluxKontextInpaintPipeline")
    height, width = picture
    call |= {"image": torch.rand(2, 3, height, width), "mask_image": torch.ones(2, 1, height, width), "strength": 1.0}
    plain = tiny.run(pipe, call, output_type="latent")
    fast = accelerate(pipe, [schedule])
    assert tiny.run(fast, call, output_type="latent").shape == plain.shape
    assert fast.fastdit.last_run.steps[-1].tokens == (height // 16) * (width // 16)


def test_kontext_s_inpainting_takes_the_trained_size_of_the_nearest_shape() -> None:
    pipe, call = tiny.described("FluxKontextInpaintPipeline")
    family = family_of(pipe)
    for picture, size in ((torch.rand(1, 3, 64, 64), (1024, 1024)), ([torch.rand(1, 3, 32, 80)], (672, 1568))):
        assert family.size(pipe, {**call, "image": picture, "_auto_resize": True}) == size


@pytest.mark.parametrize("schedule", [SHORT, JustInTime((3, 3), shares=(0.4,))], ids=["coarse", "anchors"])
def test_fill_takes_an_autoencoder_of_another_factor(schedule: Any) -> None:
    levels = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (4,) * 3,
    }
    pipe, call = tiny.described(
        "FluxFillPipeline", 8, 12, vae=levels, transformer={"in_channels": 96, "out_channels": 16}
    )
    assert pipe.vae_scale_factor == 4
    plain = tiny.run(pipe, call, output_type="latent")
    found = tiny.run(accelerate(pipe, [schedule]), call, output_type="latent")
    assert found.shape == plain.shape and torch.isfinite(found).all()
