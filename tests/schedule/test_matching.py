"""NT-matching against the paper's published numbers."""

from __future__ import annotations

import pytest
import reference_ralu

import tiny
from fastdit import RALU, accelerate
from fastdit.schedule.matching import _PUBLISHED, solve

# steps per stage, ends of stages 1 and 2, published (h1, h2, h3), published Z, ratio
PUBLISHED = {
    "4x": ((5, 6, 7), (0.30, 0.45), (5.019, 2.589, 2.226), 6.317, 0.3),
    "5x": ((4, 5, 6), (0.30, 0.45), (5.115, 2.642, 2.254), 7.522, 0.2),
    "7x": ((2, 3, 5), (0.20, 0.30), (8.141, 2.856, 2.193), 6.261, 0.1),
}

SIGMAS = {
    "4x": (
        (1, 0.9695, 0.9304, 0.8786, 0.8066, 0.7),
        (0.9365, 0.8925, 0.8426, 0.7854, 0.7192, 0.6418, 0.55),
        (0.8853, 0.8157, 0.7347, 0.6396, 0.526, 0.3881, 0.2173, 0),
    ),
    "5x": (
        (1, 0.9611, 0.9072, 0.8281, 0.7),
        (0.9461, 0.8925, 0.8295, 0.7543, 0.663, 0.55),
        (0.9019, 0.8202, 0.722, 0.602, 0.4517, 0.2583, 0),
    ),
    "7x": (
        (1, 0.9417, 0.8),
        (0.9616, 0.8946, 0.8101, 0.7),
        (0.9359, 0.8336, 0.7052, 0.539, 0.3158, 0),
    ),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_settings_have_their_published_shifts_and_restart(preset: str) -> None:
    steps, ends, shifts, restart, _ = PUBLISHED[preset]
    found = solve(steps, ends)
    assert found.shifts == pytest.approx(shifts, abs=2e-3)
    assert found.restart == pytest.approx(restart, abs=3e-3)


def test_the_settings_published_for_stable_diffusion_3_have_their_shifts_and_restart() -> None:
    found = solve((5, 6, 9), (0.2, 0.3))
    assert found.shifts == pytest.approx((6.121, 2.237, 1.973), abs=5e-3)
    assert found.restart == pytest.approx(4.132, abs=5e-3)


@pytest.mark.parametrize(("preset", "distance"), [("4x", 0.0175), ("5x", 0.0163), ("7x", 0.0266)])
def test_the_distance_at_the_optimum_is_the_known_one(preset: str, distance: float) -> None:
    steps, ends, *_ = PUBLISHED[preset]
    assert solve(steps, ends).distance == pytest.approx(distance, abs=2e-4)


@pytest.mark.parametrize(("steps", "ends"), _PUBLISHED, ids=str)
def test_the_search_finds_no_worse_than_was_published(
    steps: tuple[int, ...], ends: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = solve(steps, ends)
    assert solve(tuple(2 * count for count in steps), ends) == published
    monkeypatch.setattr("fastdit.schedule.matching._PUBLISHED", {})
    found = solve.__wrapped__(steps, ends)
    assert published.distance - 2e-3 < found.distance < published.distance
    assert found.shifts == pytest.approx(published.shifts, rel=0.12)
    assert solve.__wrapped__(steps, ends, restart=found.restart) == found


def test_the_search_works_where_gradients_are_off() -> None:
    import torch

    with torch.inference_mode():
        assert solve.__wrapped__((6, 6), (0.5,), starts=(0.15,)).shifts == pytest.approx((3.621, 3.046), abs=2e-3)


def test_a_fixed_restart_is_kept_and_only_the_shifts_are_solved() -> None:
    found = solve((5, 6, 7), (0.3, 0.45), restart=4.0)
    assert found.restart == 4.0
    assert found.distance == pytest.approx(0.0253, abs=3e-4)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_plan_has_the_published_noise_levels(preset: str) -> None:
    pipe, _ = tiny.flux()
    plan = accelerate(pipe, [RALU.paper(preset)]).fastdit.plan(1024, 1024)
    for stage, sigmas in zip(plan.stages, SIGMAS[preset], strict=True):
        assert stage.sigmas == pytest.approx(sigmas, abs=1.01e-4)
        assert stage.steps == len(sigmas) - 1 == len(stage.sigmas) - 1


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_plan_equals_the_reference_schedule(preset: str) -> None:
    pipe, _ = tiny.flux()
    plan = accelerate(pipe, [RALU.paper(preset)]).fastdit.plan(1024, 1024)
    steps, ends, shifts, z, _ = PUBLISHED[preset]
    for stage, sigmas in zip(plan.stages, reference_ralu.stage_sigmas(steps, ends, shifts, z), strict=True):
        assert stage.sigmas == pytest.approx(sigmas, abs=2e-4)


@pytest.mark.parametrize(
    ("preset", "tokens"), [("4x", (1024, 1945, 4096)), ("5x", (1024, 1636, 4096)), ("7x", (1024, 1330, 4096))]
)
def test_the_plan_counts_the_papers_tokens_at_1024_pixels(preset: str, tokens: tuple[int, ...]) -> None:
    pipe, _ = tiny.flux()
    plan = accelerate(pipe, [RALU.paper(preset)]).fastdit.plan(1024, 1024)
    assert tuple(stage.tokens for stage in plan.stages) == tokens


@pytest.mark.parametrize(
    ("count", "expected"), [(18, (5, 6, 7)), (36, (10, 12, 14)), (9, (2, 3, 4)), (4, (1, 1, 2)), (3, (1, 1, 1))]
)
def test_an_explicit_count_rescales_the_stages_in_proportion(count: int, expected: tuple[int, ...]) -> None:
    pipe, _ = tiny.flux()
    plan = accelerate(pipe, [RALU.paper("4x")]).fastdit.plan(128, 128, count)
    steps = tuple(stage.steps for stage in plan.stages)
    assert sum(steps) == count == plan.steps
    assert all(abs(found - wanted) <= 1 for found, wanted in zip(steps, expected, strict=True))


def test_a_rescaled_preset_is_matched_anew_and_the_plan_says_so() -> None:
    pipe, _ = tiny.flux()
    fast = accelerate(pipe, [RALU.paper("4x")])
    rescaled = fast.fastdit.plan(128, 128, 10)
    steps = tuple(stage.steps for stage in rescaled.stages)
    found = solve(steps, (0.3, 0.45))
    for stage, sigmas in zip(
        rescaled.stages, reference_ralu.stage_sigmas(steps, (0.3, 0.45), found.shifts, found.restart), strict=True
    ):
        assert stage.sigmas == pytest.approx(sigmas, abs=1e-6)
    assert set(rescaled.notes) - set(fast.fastdit.plan(128, 128).notes)
    assert all(note in str(rescaled) for note in rescaled.notes)
    assert any("10 steps" in note and "5/6/7" in note for note in rescaled.notes), rescaled.notes


def test_the_distilled_schedule_has_one_one_and_two_steps() -> None:
    pipe, _ = tiny.flux(guidance=False)
    plan = accelerate(pipe, [RALU(steps=(1, 1, 2), ends=(0.3, 0.45), ratio=0.3)]).fastdit.plan(128, 128)
    assert tuple(stage.steps for stage in plan.stages) == (1, 1, 2)
    for stage in plan.stages:
        assert all(a > b for a, b in zip(stage.sigmas, stage.sigmas[1:], strict=False))
    assert plan.stages[0].sigmas == pytest.approx((1.0, 0.7))
    assert plan.stages[2].sigmas[-1] == pytest.approx(0.0)
