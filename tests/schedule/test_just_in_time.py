"""Just-in-time sampling: straight-line references, what a switch leaves and adds, batches, families, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import reference_sd3
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_anchors import filled, first_anchors, just_in_time
from torch import Tensor

import tiny
from fastdit import (
    EasyCache,
    Edges,
    Interval,
    InvalidConfig,
    JustInTime,
    PixelGradient,
    SeaCache,
    SkipPolicy,
    Stack,
    TextAttention,
    UnsupportedModel,
    VelocityVariance,
    accelerate,
)
from fastdit.layout import FineLayout, TokenLayout, gather_tokens
from fastdit.models.flux import FLUX
from fastdit.models.patches import assembled, patches
from fastdit.schedule.anchors import (
    AnchorRun,
    SparseLayout,
    evenly_spread,
    interpolated,
    with_anchors,
)
from fastdit.schedule.matching import stage_sigmas
from fastdit.schedule.selectors.latent_variance import LatentVariance
from fastdit.step import SchedulePlan

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma, inside diffusers
]

SHORT = JustInTime((2, 2, 2))
FAMILIES = ("Flux2KleinPipeline", "QwenImagePipeline", "ChromaPipeline", "HunyuanImagePipeline", "CogView4Pipeline",
            "Lumina2Pipeline", "ZImagePipeline", "HiDreamImagePipeline", "FluxKontextPipeline")  # fmt: skip


def stages(plan: SchedulePlan) -> dict[str, Any]:
    return {"sigmas": [stage.sigmas for stage in plan.stages], "counts": [stage.tokens for stage in plan.stages]}


@pytest.mark.parametrize(
    ("schedule", "rows", "columns"),
    [
        (SHORT, 8, 8),
        (SHORT, 5, 7),
        (JustInTime((2, 1), shares=(0.2,), ends=(0.5,)), 6, 4),
        (JustInTime((1, 2, 1, 1), shares=(0.1, 0.4, 0.9), ends=(0.1, 0.4, 0.6), shift=1.5), 4, 10),
    ],
    ids=lambda value: value.describe() if isinstance(value, JustInTime) else str(value),
)
def test_a_flux_run_equals_the_straight_line_loop(schedule: JustInTime, rows: int, columns: int) -> None:
    pipe, call = tiny.flux(size=(16 * rows, 16 * columns), steps=sum(schedule.steps))
    noise = tiny.randn(1, rows * columns, 16, seed=5)
    fast = accelerate(pipe, [schedule])
    found = tiny.run(fast, call, latents=noise, output_type="latent")

    def velocity(tokens: Tensor, places: list[tuple[int, int]], sigma: float) -> Tensor:
        return pipe.transformer(
            hidden_states=tokens[None],
            timestep=torch.full((1,), sigma),
            guidance=torch.full((1,), 3.5),
            pooled_projections=call["pooled_prompt_embeds"],
            encoder_hidden_states=call["prompt_embeds"],
            txt_ids=torch.zeros(call["prompt_embeds"].shape[1], 3),
            img_ids=torch.tensor([[0.0, row, column] for row, column in places]),
            return_dict=False,
        )[0][0]

    expected, anchors = just_in_time(velocity, noise[0], rows, columns, **stages(schedule.plan(rows, columns, None)))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    counts = [len(own) for own, steps in zip(anchors, schedule.steps, strict=True) for _ in range(steps)]
    assert [step.tokens for step in fast.fastdit.last_run.steps] == counts


def test_a_guided_sd3_run_equals_the_straight_line_loop() -> None:
    rows, columns = 6, 8
    pipe, call = tiny.sd3(size=(16 * rows, 16 * columns), steps=6)
    noise, scale = tiny.randn(1, 4, 2 * rows, 2 * columns, seed=5), 3.0
    found = tiny.run(accelerate(pipe, [SHORT]), {**call, "guidance_scale": scale}, latents=noise, output_type="latent")
    top, left = reference_sd3.crop_corner(rows, columns, pipe.transformer.config.pos_embed_max_size)

    def velocity(tokens: Tensor, places: list[tuple[int, int]], sigma: float) -> Tensor:
        placed = [(top + row, left + column) for row, column in places]
        conditional, plain = (
            reference_sd3.forward(
                pipe.transformer,
                tokens,
                placed,
                torch.tensor([1000.0 * sigma]),
                call[f"{kind}prompt_embeds"][0],
                call[f"{kind}pooled_prompt_embeds"][0],
            )
            for kind in ("", "negative_")
        )
        return plain + scale * (conditional - plain)

    plan = SHORT.plan(rows, columns, None)
    expected, _ = just_in_time(velocity, patches(noise)[0], rows, columns, **stages(plan))
    torch.testing.assert_close(found, assembled(expected[None], rows, columns), rtol=2e-4, atol=2e-4)


def begun(schedule: JustInTime, field: Tensor, side: int) -> tuple[AnchorRun, Tensor, TokenLayout]:
    """A run on FLUX's tokens that has begun with a field of noise."""
    run = schedule.begin(schedule.plan(side, side, None), FLUX, None, None)
    assert isinstance(run, AnchorRun)
    return run, *run.initial(field)


def test_anchors_keep_their_latents_bit_for_bit_at_every_switch() -> None:
    run, latents, before = begun(SHORT, tiny.randn(2, 64, 16, seed=1), 8)
    for stage in (0, 1):
        latents = (latents + 0.1 * torch.randn(latents.shape)).bfloat16()
        after_latents, after = run.transition(stage, latents, torch.randn(latents.shape))
        grid = torch.zeros(2, 64, 16, dtype=torch.bfloat16)
        whole = after_latents if isinstance(after, FineLayout) else with_anchors(after, grid, after_latents)
        assert torch.equal(gather_tokens(whole, before.anchors), latents)
        latents, before = after_latents, after
    assert before.kind == "fine" and latents.shape == (2, 64, 16)


def test_a_token_that_joins_follows_the_flow_at_the_time_of_the_switch() -> None:
    batch, side = 4000, 4
    field = tiny.randn(batch, side * side, 4, seed=11)
    schedule = JustInTime((1, 1), shares=(0.4,), ends=(0.3,))
    run, latents, layout = begun(schedule, field, side)
    found, _ = run.transition(0, latents, torch.full_like(latents, 0.8))
    joined = sorted(set(range(side * side)) - set(layout.anchors[0].tolist()))
    rest = (found[:, joined] - 0.3 * 0.8).flatten(1) / 0.7
    assert rest.mean().abs() < 4 / rest.numel() ** 0.5
    covariance = rest.T @ rest / batch
    torch.testing.assert_close(covariance, torch.eye(rest.shape[1]), rtol=0, atol=6 * (2 / batch) ** 0.5)
    # It is the noise that the run began with at the token's place.
    torch.testing.assert_close(rest, field[:, joined].flatten(1))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 2), st.data())
def test_the_first_anchors_and_what_is_between_them_are_as_written_out(
    rows: int, columns: int, batch: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, rows * columns))
    anchors = evenly_spread(rows, columns, count)
    assert anchors[0].tolist() == first_anchors(rows, columns, count)
    layout = SparseLayout(rows, columns, anchors)
    tokens = tiny.randn(batch, count, 4, seed=2)
    whole = interpolated(layout, tokens)
    assert torch.equal(gather_tokens(whole, anchors.expand(batch, -1)), tokens)
    for image in range(batch):
        expected = filled(tokens[image], anchors[0].tolist(), rows, columns)
        torch.testing.assert_close(whole[image], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [8, 16, 31, 64])
def test_no_token_is_further_than_two_cells_from_the_first_anchors(side: int) -> None:
    anchors = evenly_spread(side, side, round(0.35 * side * side))
    layout = SparseLayout(side, side, anchors)
    places = layout.positions(torch.device("cpu"))[0]
    cells = FineLayout(side, side).positions(torch.device("cpu"))[0]
    assert (places[layout.nearest[0]] - cells).abs().amax() <= 2


@pytest.mark.parametrize(
    ("build", "selector"),
    [
        (tiny.flux, LatentVariance()),
        (tiny.flux, Edges()),
        (tiny.flux, PixelGradient()),
        (tiny.sd3, LatentVariance()),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_every_image_has_its_own_anchors_and_equals_its_single_run(build: Any, selector: Any, generators: Any) -> None:
    pipe, call = build(size=128, batch=2, steps=6)
    schedule = JustInTime((2, 2, 2), selector=selector)
    layouts: list[TokenLayout] = []

    def note(twin: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        layouts.append(twin.fastdit.active.layout)
        return {}

    fast = accelerate(pipe, [schedule])
    together = tiny.run(fast, call, generator=generators(1, 2), callback_on_step_end=note)
    assert not torch.equal(*layouts[2].anchors)
    assert torch.equal(tiny.run(fast, call, generator=generators(1, 2)), together)
    for image in (0, 1):
        own = {name: value[image : image + 1] if torch.is_tensor(value) else value for name, value in call.items()}
        alone = tiny.run(fast, own, generator=generators(image + 1))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_places_tokens_runs_on_anchors(name: str, generators: Any) -> None:
    pipe, call = tiny.described(name)
    fast = accelerate(pipe, [SHORT])
    found = tiny.run(fast, call, generator=generators(1, 2))
    assert torch.isfinite(found).all()
    assert found.shape == tiny.run(pipe, call, generator=generators(1, 2)).shape
    tokens = sorted({step.tokens for step in fast.fastdit.last_run.steps})
    assert tokens == [34, 60, 96]


def test_a_run_that_is_interrupted_gives_a_whole_picture_filled_from_its_anchors() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    seen: list[Tensor] = []

    def stop(twin: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        twin._interrupt = step == 0
        seen.append(tensors["latents"])
        return {}

    fast = accelerate(pipe, [SHORT])
    stopped = tiny.run(fast, call, output_type="pil", callback_on_step_end=stop)
    assert stopped[0].size == (128, 128)
    latents = tiny.run(fast, call, output_type="latent", callback_on_step_end=stop)
    torch.testing.assert_close(latents[0], filled(seen[0][0], first_anchors(8, 8, 22), 8, 8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline"])
@pytest.mark.parametrize("strength", [0.9, 0.5, 0.2])
def test_a_run_that_begins_with_a_picture_begins_on_the_anchors_of_its_stage(name: str, strength: float) -> None:
    pipe, call = tiny.described(name, strength=strength)
    fast = accelerate(pipe, [SHORT])
    assert torch.isfinite(tiny.run(fast, call)).all()
    counts = [34, 34, 60, 60, 96, 96]
    assert [step.tokens for step in fast.fastdit.last_run.steps] == counts[-len(fast.fastdit.last_run.steps) :]


def test_a_picture_s_own_variance_chooses_where_a_run_begins_in_a_later_stage() -> None:
    side, sigma = 8, 0.6
    clean, noise = tiny.randn(2, 4, 16, 16, seed=3), tiny.randn(2, 64, 16, seed=4)
    latents = (1 - sigma) * patches(clean) + sigma * noise
    run = SHORT.begin(SHORT.plan(side, side, None), FLUX, None, None)
    found, layout = run.resume(1, latents, clean, sigma)
    first = set(first_anchors(side, side, 22))
    assert all(first < set(own) for own in layout.anchors.tolist())
    assert not torch.equal(*layout.anchors)
    assert torch.equal(found, gather_tokens(latents, layout.anchors))
    # What joins later has the noise that the picture was given.
    after, _ = run.transition(1, found, torch.zeros_like(found))
    joined = [cell for cell in range(64) if cell not in layout.anchors[0].tolist()]
    start = SHORT.plan(side, side, None).stages[2].sigmas[0]
    torch.testing.assert_close(after[0, joined], start * noise[0, joined], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["FluxInpaintPipeline", "FluxFillPipeline", "StableDiffusion3InpaintPipeline"])
def test_a_mask_follows_the_anchors(name: str) -> None:
    pipe, call = tiny.described(name)
    fast = accelerate(pipe, [SHORT])
    assert torch.isfinite(tiny.run(fast, call)).all()
    if name == "FluxInpaintPipeline":
        nothing = {"mask_image": torch.zeros_like(call["mask_image"]), "output_type": "latent"}
        torch.testing.assert_close(tiny.run(fast, call, **nothing), tiny.run(pipe, call, **nothing))


def test_caches_begin_anew_at_a_switch_and_may_carry_what_they_keep() -> None:
    pipe, call = tiny.flux(size=128, steps=12)
    schedule, policy = JustInTime((4, 4, 4)), SkipPolicy(last=0)
    fast = accelerate(pipe, [schedule, Interval(4, policy=policy)])
    assert torch.isfinite(tiny.run(fast, call)).all()
    actions = [step.action for step in fast.fastdit.last_run.steps]
    assert [actions[first] for first in (0, 4, 8)] == 3 * ["computed"]
    fast = accelerate(pipe, [schedule, Interval(12, stage_change="carry", policy=policy)])
    assert torch.isfinite(tiny.run(fast, call)).all()
    assert fast.fastdit.last_run.computed == 1


@pytest.mark.parametrize(
    "cache", [SeaCache(0.9), EasyCache(5.0, per_image=True), Interval(2, per_image=True)], ids=lambda c: c.describe()
)
@pytest.mark.parametrize("build", [tiny.flux, tiny.sd3], ids=["flux", "sd3"])
def test_a_cache_acts_on_anchors_as_on_any_tokens(build: Any, cache: Any) -> None:
    pipe, call = build(size=128, steps=12, batch=2)
    fast = accelerate(pipe, [JustInTime((4, 4, 4)), cache], strict=True)
    assert torch.isfinite(tiny.run(fast, call)).all()
    assert fast.fastdit.last_run.skipped + fast.fastdit.last_run.partial > 0


def test_left_alone_it_takes_plain_sampling_s_steps_and_with_ends_it_stops_at_them() -> None:
    own = [sigma for stage in JustInTime(shift=3.0).plan(64, 64, None).stages for sigma in stage.sigmas[:-1]]
    plain = [3.0 * u / (1.0 + 2.0 * u) for u in (1 - step / 18 for step in range(18))]
    assert own == pytest.approx(plain)
    mean = sum(stage_sigmas(0.0, 1.0, JustInTime().shift, 10_000)) / 10_001
    assert mean == pytest.approx(1.4 / (1.4 + 0.42), abs=2e-3)
    plan = JustInTime(ends=(0.2, 0.5)).plan(64, 64, None)
    assert [stage.sigmas[-1] for stage in plan.stages] == pytest.approx([0.8, 0.5, 0.0])
    assert [stage.sigmas[0] for stage in plan.stages] == pytest.approx([1.0, 0.8, 0.5])
    assert [stage.tokens for stage in plan.stages] == [1434, 2540, 4096]
    asked = JustInTime().plan(64, 64, 9)
    assert asked.steps == 9 and "7/6/5 became" in asked.notes[0]


def test_it_survives_json_and_says_what_it_does() -> None:
    stack = Stack([JustInTime((4, 3), shares=(0.5,), ends=(0.4,), selector=PixelGradient())])
    assert Stack.from_json(stack.to_json()) == stack
    pipe, _ = tiny.flux(size=128)
    assert "stage 1 (sparse): 7 steps, 22 tokens" in str(accelerate(pipe, [JustInTime()]).fastdit.plan(128, 128))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": (4,)}, "steps is"),
        ({"steps": (0, 4, 4)}, "steps is"),
        ({"shares": (0.35,)}, "shares"),
        ({"shares": (0.6, 0.3)}, "shares"),
        ({"shares": (0.35, 1.0)}, "shares"),
        ({"ends": (0.5,)}, "ends"),
        ({"selector": "edges"}, "selector"),
        ({"selector": VelocityVariance()}, "clean estimate alone"),
        ({"selector": TextAttention()}, "clean estimate alone"),
        ({"shift": 0.0}, "shift"),
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused_when_it_is_written(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidConfig, match=named):
        JustInTime(**arguments)


def test_fewer_steps_than_stages_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="3 stages"):
        JustInTime().plan(8, 8, 2)


@pytest.mark.parametrize("name", ["SanaPipeline", "AuraFlowPipeline", "WanPipeline"])
def test_a_family_of_whole_frames_is_refused_by_name_with_the_reason(name: str) -> None:
    pipe, _ = tiny.described(name)
    with pytest.raises(UnsupportedModel, match=f"must place tokens, and can't in {name}, whose stages are whole"):
        accelerate(pipe, [SHORT])
