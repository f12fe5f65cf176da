"""Lifts of the clean estimate: a straight-line loop, the marginal that they leave, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_stages import stage
from torch import Tensor
from torch.nn import functional

import tiny
from fastdit import (
    RALU,
    CorrectedLift,
    InvalidConfig,
    LatentLift,
    PixelLift,
    ProgressiveResolution,
    SpectralLift,
    TokenCopy,
    accelerate,
)
from fastdit.layout import CoarseLayout, FineLayout, TokenLayout
from fastdit.models.flux import FLUX
from fastdit.models.patches import assembled, patches
from fastdit.schedule.lifts.base import Lift, Switch

SIDE = 8
LIFTS = [
    LatentLift(),
    LatentLift(resize="bicubic"),
    LatentLift(noise="hadamard"),
    PixelLift(),
    PixelLift(noise="fresh"),
]


def straight_line(
    pipe: Any, call: dict[str, Any], schedule: ProgressiveResolution, noise: Tensor, generator: torch.Generator
) -> Tensor:
    """Two whole-frame stages written out, without twins: the tokens at the end, [1, SIDE * SIDE, C]."""
    plan = schedule.plan(SIDE, SIDE, None)
    vae = pipe.vae

    frames = assembled(noise, SIDE, SIDE)
    halved = sum(frames[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 2
    coarse = patches(halved)
    _, clean = stage(pipe, call, coarse, SIDE // 2, plan.stages[0].sigmas)
    small = assembled(clean, SIDE // 2, SIDE // 2)
    if isinstance(schedule.lift, PixelLift):
        pixels = vae.decode(small / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
        large = functional.interpolate(pixels, scale_factor=2, mode="bicubic").clamp(-1, 1)
        latents = (vae.encode(large).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    else:
        latents = functional.interpolate(small, scale_factor=2, mode=schedule.lift.resize)
    start = plan.stages[1].sigmas[0]
    drawn = noise
    if schedule.lift.noise == "fresh":
        drawn = torch.randn(noise.shape, generator=generator)
    elif schedule.lift.noise == "hadamard":
        drawn = patches(hadamard(halved, torch.randn(1, 12, SIDE, SIDE, generator=generator)))
    return stage(pipe, call, (1 - start) * patches(latents) + start * drawn, SIDE, plan.stages[1].sigmas)[0]


def hadamard(parents: Tensor, fresh: Tensor) -> Tensor:
    """The children of frames [B, C, h, w] with the fresh noise [B, 3 C, h, w], written out: signs by rows of H."""
    p, (a, b, c) = parents, (fresh[:, i::3] for i in range(3))
    made = torch.empty(*parents.shape[:2], 2 * parents.shape[2], 2 * parents.shape[3])
    made[:, :, 0::2, 0::2] = (p + a + b + c) / 2
    made[:, :, 0::2, 1::2] = (p - a + b - c) / 2
    made[:, :, 1::2, 0::2] = (p + a - b - c) / 2
    made[:, :, 1::2, 1::2] = (p - a - b + c) / 2
    return made


@pytest.mark.parametrize("lift", LIFTS, ids=str)
def test_two_whole_frame_stages_equal_the_straight_line_loop(lift: Any) -> None:
    pipe, call = tiny.flux(size=128, steps=5)
    ralu = ProgressiveResolution(steps=(3, 2), ends=(0.6,), starts=(0.2,), lift=lift)
    noise = tiny.randn(1, SIDE * SIDE, 16, seed=5)
    found = tiny.run(accelerate(pipe, [ralu]), call, latents=noise, output_type="latent", seed=4)
    with torch.no_grad():
        expected = straight_line(pipe, call, ralu, noise, torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def switched(lift: Lift, before: TokenLayout, after: TokenLayout, clean: Tensor, start: float) -> Tensor:
    batch, channels = len(clean), clean.shape[2]
    generator = torch.Generator().manual_seed(11)
    field = torch.randn(batch, before.rows * before.columns, channels, generator=generator)

    def draw(shape: Any, device: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=generator)

    return lift(Switch(FLUX, None, before, after, clean, clean, field, 0.7, start, draw))


@pytest.mark.parametrize("noise", ["shared", "fresh", "hadamard"])
@pytest.mark.parametrize("stages", [("coarse", "fine"), ("coarse", "mixed"), ("mixed", "fine")], ids="-".join)
def test_the_latents_after_a_switch_follow_the_flow_given_the_clean_ones(stages: tuple[str, str], noise: str) -> None:
    batch, start = 4000, 0.3
    coarse = CoarseLayout(4, 4)
    split = torch.tensor([[0, 3]]).expand(batch, -1)
    layouts = {"coarse": coarse, "mixed": coarse.refined_at(split), "fine": FineLayout(4, 4)}
    before, after = (layouts[name] for name in stages)
    clean = torch.full((batch, before.tokens, 4), 0.8)
    found = switched(LatentLift(noise=noise), before, after, clean, start)
    rest = (found - start * 0.8).flatten(1) / (1 - start)
    assert found.shape == (batch, after.tokens, 4)
    assert rest.mean().abs() < 4 / rest.numel() ** 0.5
    covariance = rest.T @ rest / batch
    torch.testing.assert_close(covariance, torch.eye(rest.shape[1]), rtol=0, atol=6 * (2 / batch) ** 0.5)


def test_the_noise_of_hadamard_children_pools_to_that_of_their_parents() -> None:
    coarse, fine = CoarseLayout(4, 4), FineLayout(4, 4)
    zero = torch.zeros(3, coarse.tokens, 8)
    found, shared = (switched(LatentLift(noise=noise), coarse, fine, zero, 0.3) for noise in ("hadamard", "shared"))
    parents = (FLUX.pack(functional.avg_pool2d(FLUX.unpack(noise, 4, 4), 2) * 2) for noise in (found, shared))
    torch.testing.assert_close(*parents, rtol=0, atol=1e-6)
    assert not torch.allclose(found, shared, atol=0.1)


def test_shared_noise_is_that_of_the_same_place_and_needs_no_generator() -> None:
    pipe, call = tiny.flux(size=128, steps=5)
    fast = accelerate(pipe, [ProgressiveResolution(steps=(3, 2), ends=(0.6,), starts=(0.2,), lift=PixelLift())])
    latents = tiny.randn(1, SIDE * SIDE, 16, seed=5)
    first = tiny.run(fast, call, latents=latents, seed=1)
    assert torch.equal(tiny.run(fast, call, latents=latents, seed=2), first)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_corrected_lift_moves_the_worst_places_half_the_way_or_more_to_the_pixels(share: float) -> None:
    pipe, _ = tiny.flux(size=128)
    vae, small = pipe.vae, tiny.randn(2, 4, SIDE, SIDE, seed=7)
    switch = Switch(FLUX, pipe, *2 * [CoarseLayout(SIDE, SIDE)], *3 * [small], 0.6, 0.2, torch.zeros)
    with torch.no_grad():
        found = CorrectedLift(share=share).lifted(switch, small)
        pixels = vae.decode(small / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
        large = functional.interpolate(pixels, scale_factor=2, mode="bicubic").clamp(-1, 1)
        legal = (vae.encode(large).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    enlarged = functional.interpolate(small, scale_factor=2, mode="bilinear")
    for own, direct, aim in zip(found, enlarged, legal, strict=True):
        apart = (aim - direct).abs().mean(dim=0)
        order = apart.flatten().sort(descending=True).indices
        worst = order[: round(share * apart.numel())]
        moved = ((own - direct).abs().mean(dim=0) / apart).flatten()
        torch.testing.assert_close(moved[worst[0]], torch.tensor(1.0))
        assert (moved[worst] >= 0.5 - 1e-4).all() and (moved[worst] <= 1.0 + 1e-4).all()
        assert (moved[order[len(worst) + 1 :]] == 0).all()


def test_what_a_mixed_stage_has_refined_is_not_lifted_again() -> None:
    coarse = CoarseLayout(4, 4)
    mixed, fine = coarse.refined_at(torch.tensor([[1]])), FineLayout(4, 4)
    clean = tiny.randn(1, mixed.tokens, 4, seed=3)
    found = switched(LatentLift(), mixed, fine, clean, 1.0 - 1e-6)
    cells = mixed.cells(torch.tensor([[1]]))[0]
    torch.testing.assert_close(found[0, cells], clean[0, -4:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("lift", "ends", "starts"),
    [
        (PixelLift(), (0.5,), (0.6,)),
        (LatentLift(), (0.5,), (0.7,)),
        (TokenCopy(), (0.5,), (0.4,)),
        (SpectralLift(), (0.5,), (0.4,)),
    ],
    ids=str,
)
def test_a_start_that_a_lift_can_t_go_back_to_is_refused(lift: Lift, ends: Any, starts: Any) -> None:
    with pytest.raises(InvalidConfig):
        ProgressiveResolution(steps=(2, 2), ends=ends, starts=starts, lift=lift)


def test_a_spectral_lift_keeps_the_coarse_band_and_fills_what_is_above_it_with_noise() -> None:
    scipy = pytest.importorskip("scipy.fft")
    end, start = 0.3, 0.3 / 1.7
    latents, noise = tiny.randn(1, 16, 16, seed=1), tiny.randn(1, 64, 16, seed=2)
    made = Switch(
        FLUX, None, CoarseLayout(8, 8), FineLayout(8, 8), latents, latents, noise, end, start, lambda *_: noise
    )
    found = scipy.dctn(assembled(SpectralLift()(made), 8, 8).numpy(), axes=(2, 3), norm="ortho")
    coarse = scipy.dctn(assembled(latents, 4, 4).numpy(), axes=(2, 3), norm="ortho")
    fresh = scipy.dctn(assembled(noise, 8, 8).numpy(), axes=(2, 3), norm="ortho")
    expected = (1 - start) * fresh
    rows, columns = coarse.shape[2:]
    expected[:, :, :rows, :columns] = 2 / (2 - end) * coarse
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)


def test_a_spectral_lift_is_refused_where_regions_are_refined() -> None:
    with pytest.raises(InvalidConfig, match=r"SpectralLift\(\) takes whole frames, and RALU has a mixed stage"):
        RALU("4x", lift=SpectralLift())


def test_token_copy_may_start_as_late_as_its_covariance_allows() -> None:
    assert ProgressiveResolution(steps=(2, 2), ends=(0.5,), starts=(0.5 / 1.5,), lift=TokenCopy()).recipe.starts == (
        0.5 / 1.5,
    )


@pytest.mark.parametrize("share", [0.0, 1.5, "half"])
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(InvalidConfig, match="share"):
        CorrectedLift(share=share)


@pytest.mark.parametrize("arguments", [{"noise": "loud"}, {"resize": "sinc"}], ids=str)
def test_a_lift_of_no_known_kind_is_refused(arguments: dict[str, str]) -> None:
    with pytest.raises(InvalidConfig):
        LatentLift(**arguments)
