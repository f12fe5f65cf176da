"""RALU on tiny SD3 and SD3.5 pipelines against the straight-line reference."""

from __future__ import annotations

from typing import Any

import pytest
import reference_ralu
import reference_sd3
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_ralu import Generators

import tiny
from fastdit import RALU, accelerate
from fastdit.schedule.matching import solve

pytestmark = pytest.mark.usefixtures("no_grad")

FRAMES = ("coarse", "fine")


def generator_of(seed: int, images: int | None) -> Generators:
    """One generator, or a list of one an image."""
    if images is None:
        return torch.Generator().manual_seed(seed)
    return [torch.Generator().manual_seed(100 * seed + image) for image in range(images)]


def compare(
    built: tiny.Built,
    accelerator: RALU,
    *,
    listed: bool = False,
    options: dict[str, Any] | None = None,
    **reference: Any,
) -> reference_ralu.Result:
    """Run both with the first seed at which the edge selection is unambiguous, and compare every step."""
    pipe, call = built
    fast = accelerate(pipe, [accelerator])
    plan = fast.fastdit.plan(call["height"], call["width"], call.get("num_inference_steps"))
    steps = tuple(stage.steps for stage in plan.stages)
    chosen = accelerator.recipe
    z = solve(steps, chosen.ends, accelerator.base_shift, accelerator.restart).restart
    images = call["prompt_embeds"].shape[0] if listed else None
    velocity = reference_sd3.guided(pipe, call, steps=steps, frame=accelerator.frame, **reference)
    for seed in range(40):
        try:
            expected = reference_ralu.ralu(
                reference_sd3.shape_only(pipe),
                pipe.vae,
                sigmas=[list(stage.sigmas) for stage in plan.stages],
                ends=chosen.ends,
                z=z,
                ratio=chosen.ratio,
                fidelity=accelerator.fidelity,
                generator=generator_of(seed, images),
                forward=velocity,
                **reference_ralu.flux_arguments(call),
            )
        except ValueError:
            continue
        break
    else:
        raise AssertionError("no seed with an unambiguous edge selection")
    seen: list[torch.Tensor] = []

    def note(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(reference_ralu.pack(tensors["latents"]))
        return {}

    found = tiny.run(
        fast,
        {**call, **(options or {})},
        generator=generator_of(seed, images),
        output_type="latent",
        callback_on_step_end=note,
    )
    borders = {steps[0] - 1, steps[0] + steps[1] - 1}
    for step, (mine, theirs) in enumerate(zip(seen, expected.trajectory, strict=True)):
        if step not in borders:  # at a border the callback sees the next stage's first latents
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4, msg=lambda m, s=step: f"step {s}: {m}")
    rows, columns = call["height"] // 16, call["width"] // 16
    whole = reference_ralu.unpack(expected.latents, rows, columns)
    torch.testing.assert_close(found, whole, rtol=2e-4, atol=2e-4)
    return expected


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("preset", "steps"), [("2x", 20), ("3x", 12)])
def test_a_preset_equals_the_straight_line_reference(preset: str, steps: int, frame: str) -> None:
    pipe, call = tiny.sd3(size=128)
    del call["num_inference_steps"]
    assert len(compare((pipe, call), RALU.paper(preset, fidelity="exact", frame=frame)).trajectory) == steps


@pytest.mark.parametrize(
    ("steps", "ends", "restart"), [((5, 6, 9), (0.2, 0.3), 4.131), ((3, 3, 6), (0.25, 0.3), 6.262)]
)
def test_the_presets_are_matched_to_the_published_restart(
    steps: tuple[int, int, int], ends: tuple[float, float], restart: float
) -> None:
    assert solve(steps, ends).restart == pytest.approx(restart, abs=5e-3)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_second_attention_and_normed_queries_equal_the_reference(frame: str) -> None:
    compare(tiny.sd3(size=(96, 160), steps=6, three_five=True), RALU.paper("2x", fidelity="exact", frame=frame))


def test_skip_layer_guidance_equals_the_reference() -> None:
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    built = tiny.sd3(size=128, steps=6, batch=2)
    result = compare(built, RALU.paper("3x", fidelity="exact"), options=skip, skip_layers=(1,), skip_steps=range(1, 6))
    assert result.selected[0] != result.selected[1]


def test_skip_layer_guidance_reaches_the_share_of_the_steps_that_are_run() -> None:
    pipe, call = tiny.sd3(size=128)
    del call["num_inference_steps"]
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.7}
    compare((pipe, call), RALU.paper("3x", fidelity="exact"), options=skip, skip_layers=(1,), skip_steps=range(4, 9))


@settings(max_examples=8)
@given(
    steps=st.tuples(*[st.integers(1, 3)] * 3),
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ends=st.tuples(st.floats(0.1, 0.5), st.floats(0.05, 0.4)),
    ratio=st.floats(0.05, 0.95),
    restart=st.floats(2.0, 8.0),
    fidelity=st.sampled_from(["exact", "paper"]),
    frame=st.sampled_from(FRAMES),
    batch=st.integers(1, 3),
    guidance=st.sampled_from([1.0, 3.0]),
    positions=st.integers(10, 21),
)
@example(
    # Two tokens with equal edges, of which the noise prefers the later one.
    steps=(2, 1, 1),
    sides=(3, 4),
    ends=(0.125, 0.125),
    ratio=0.5,
    restart=2.0,
    fidelity="paper",
    frame="coarse",
    batch=1,
    guidance=1.0,
    positions=10,
)
def test_any_schedule_on_any_size_equals_the_reference(
    steps: tuple[int, int, int],
    sides: tuple[int, int],
    ends: tuple[float, float],
    ratio: float,
    restart: float,
    fidelity: str,
    frame: str,
    batch: int,
    guidance: float,
    positions: int,
) -> None:
    ends = (ends[0], ends[0] + ends[1])
    accelerator = RALU(steps=steps, ends=ends, ratio=ratio, restart=restart, fidelity=fidelity, frame=frame)
    size = (32 * sides[0], 32 * sides[1])
    pipe, call = tiny.sd3(size=size, steps=sum(steps), batch=batch, positions=positions)
    compare((pipe, {**call, "guidance_scale": guidance}), accelerator, listed=batch > 1)
