"""`accelerate(pipe, [RALU(...)])` against the straight-line reference, on tiny FLUX pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference_ralu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ralu import Generators
from reference_sd3 import in_fine_frame

import tiny
from fastdit import RALU, accelerate
from fastdit.schedule.matching import solve

pytestmark = pytest.mark.usefixtures("no_grad")

PRESETS = {"4x": ((0.3, 0.45), 6.317, 0.3), "5x": ((0.3, 0.45), 7.522, 0.2), "7x": ((0.2, 0.3), 6.261, 0.1)}


def generator_of(seed: int, images: int | None) -> Generators:
    """One generator, or a list of one an image."""
    if images is None:
        return torch.Generator().manual_seed(seed)
    return [torch.Generator().manual_seed(100 * seed + image) for image in range(images)]


def compare(
    built: tiny.Built,
    accelerator: RALU,
    *,
    ends: tuple[float, float],
    z: float,
    ratio: float,
    fidelity: str = "exact",
    listed: bool = False,
    forward: Callable[..., torch.Tensor] | None = None,
    **extra: Any,
) -> reference_ralu.Result:
    """Run both with the first seed at which the edge selection is unambiguous, and compare every step."""
    pipe, call = built
    fast = accelerate(pipe, [accelerator])
    plan = fast.fastdit.plan(call["height"], call["width"], call.get("num_inference_steps"))
    sigmas = [list(stage.sigmas) for stage in plan.stages]
    images = call["prompt_embeds"].shape[0] if listed else None
    for seed in range(40):
        try:
            expected = reference_ralu.ralu(
                pipe.transformer,
                pipe.vae,
                sigmas=sigmas,
                ends=ends,
                z=z,
                ratio=ratio,
                fidelity=fidelity,
                generator=generator_of(seed, images),
                forward=forward,
                **reference_ralu.flux_arguments(call),
                **extra,
            )
        except ValueError:
            continue
        break
    else:
        raise AssertionError("no seed with an unambiguous edge selection")
    seen: list[torch.Tensor] = []

    def note(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        return {}

    found = tiny.run(
        fast,
        {**call, **extra},
        generator=generator_of(seed, images),
        output_type="latent",
        callback_on_step_end=note,
    )
    borders = {plan.stages[0].steps - 1, plan.stages[0].steps + plan.stages[1].steps - 1}
    for step, (mine, theirs) in enumerate(zip(seen, expected.trajectory, strict=True)):
        if step not in borders:  # at a border the callback sees the next stage's first latents
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4, msg=lambda m, s=step: f"step {s}: {m}")
    torch.testing.assert_close(found, expected.latents, rtol=2e-4, atol=2e-4)
    return expected


@pytest.mark.parametrize("fidelity", ["exact", "paper"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_equals_the_straight_line_reference(preset: str, fidelity: str) -> None:
    pipe, call = tiny.flux(size=128)
    del call["num_inference_steps"]
    ends, z, ratio = PRESETS[preset]
    compare((pipe, call), RALU.paper(preset, fidelity=fidelity), ends=ends, z=z, ratio=ratio, fidelity=fidelity)


@pytest.mark.parametrize("size", [(96, 160), (160, 64), (32, 256)])
def test_a_picture_of_any_aspect_ratio_equals_the_reference(size: tuple[int, int]) -> None:
    built = tiny.flux(size=size, steps=6)
    plan = accelerate(built[0], [RALU.paper("4x", fidelity="exact")]).fastdit.plan(*size, 6)
    z = solve(tuple(stage.steps for stage in plan.stages), (0.3, 0.45)).restart
    compare(built, RALU.paper("4x", fidelity="exact"), ends=(0.3, 0.45), z=z, ratio=0.3)


@pytest.mark.parametrize("listed", [False, True])
def test_a_batch_equals_the_reference_and_its_images_refine_different_tokens(listed: bool) -> None:
    accelerator = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.25, restart=4.0)
    built = tiny.flux(size=128, batch=2, steps=6)
    result = compare(built, accelerator, ends=(0.3, 0.45), z=4.0, ratio=0.25, listed=listed)
    assert result.selected[0] != result.selected[1]


def test_the_fine_frame_equals_the_reference_with_places_of_that_frame() -> None:
    pipe, call = tiny.flux(size=128, batch=2, steps=6)

    def forward(*, image: int, step: int, img_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if step < 4:
            places = [(row, column) for _, row, column in img_ids.tolist()]
            img_ids = reference_ralu.ids(in_fine_frame(places, 16))
        return pipe.transformer(img_ids=img_ids, **arguments, return_dict=False)[0]

    accelerator = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.25, restart=4.0, frame="fine")
    compare((pipe, call), accelerator, ends=(0.3, 0.45), z=4.0, ratio=0.25, forward=forward)


def test_a_distilled_model_in_four_steps_equals_the_reference() -> None:
    z = solve((1, 1, 2), (0.3, 0.45)).restart
    built = tiny.flux(size=128, steps=4, guidance=False)
    compare(built, RALU(steps=(1, 1, 2), ends=(0.3, 0.45), ratio=0.3), ends=(0.3, 0.45), z=z, ratio=0.3)


def test_latents_given_by_the_user_are_pooled_as_the_reference_pools_them() -> None:
    accelerator = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.25, restart=4.0)
    built = tiny.flux(size=128, steps=6)
    compare(built, accelerator, ends=(0.3, 0.45), z=4.0, ratio=0.25, latents=tiny.randn(1, 64, 16, seed=4))


@pytest.mark.parametrize("ratio", [0.07, 0.93])
def test_few_or_nearly_all_tokens_refined_equal_the_reference(ratio: float) -> None:
    accelerator = RALU(steps=(2, 2, 2), ends=(0.25, 0.5), ratio=ratio, restart=3.0)
    built = tiny.flux(size=128, steps=6)
    result = compare(built, accelerator, ends=(0.25, 0.5), z=3.0, ratio=ratio)
    assert len(result.selected[0]) == int(ratio * 16)


@settings(max_examples=12)
@given(
    steps=st.tuples(*[st.integers(1, 3)] * 3),
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ends=st.tuples(st.floats(0.1, 0.5), st.floats(0.05, 0.4)),
    ratio=st.floats(0.05, 0.95),
    restart=st.floats(2.0, 8.0),
    fidelity=st.sampled_from(["exact", "paper"]),
    batch=st.integers(1, 3),
    guidance=st.booleans(),
)
def test_any_schedule_on_any_size_equals_the_reference(
    steps: tuple[int, int, int],
    sides: tuple[int, int],
    ends: tuple[float, float],
    ratio: float,
    restart: float,
    fidelity: str,
    batch: int,
    guidance: bool,
) -> None:
    ends = (ends[0], ends[0] + ends[1])
    accelerator = RALU(steps=steps, ends=ends, ratio=ratio, restart=restart, fidelity=fidelity)
    size = (32 * sides[0], 32 * sides[1])
    built = tiny.flux(size=size, steps=sum(steps), batch=batch, guidance=guidance)
    compare(built, accelerator, ends=ends, z=restart, ratio=ratio, fidelity=fidelity, listed=batch > 1)
