"""Progressive resolution: the stages that it runs, its presets, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import tiny
from counting import RunFlops, Stage
from fastdit import (
    RALU,
    InvalidConfig,
    LatentLift,
    PixelLift,
    ProgressiveResolution,
    Stack,
    TokenCopy,
    accelerate,
)
from fastdit.models.flux import FLUX
from fastdit.models.qwen_image import QWEN_IMAGE
from fastdit.models.sd3 import SD3

SHORT = ProgressiveResolution(steps=(3, 2))


def test_it_runs_at_half_size_then_at_full_size() -> None:
    pipe, call = tiny.flux(size=128, steps=5)
    fast = accelerate(pipe, [SHORT])
    tiny.run(fast, call, output_type="latent")
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [16, 16, 16, 64, 64]


@pytest.mark.parametrize(("preset", "steps"), [("4x", 28), ("5x", 24), ("7x", 17), ("10x", 12), ("14x", 7)])
def test_a_preset_brings_its_own_step_count(preset: str, steps: int) -> None:
    assert ProgressiveResolution(preset).plan(8, 8, None).steps == steps


def test_without_a_preset_it_takes_the_first_of_the_pipeline_s_family() -> None:
    assert ProgressiveResolution().of(FLUX) == ProgressiveResolution("4x")
    assert ProgressiveResolution(lift=LatentLift()).of(SD3) == ProgressiveResolution("2x", lift=LatentLift())
    assert SHORT.of(SD3) is SHORT.of(QWEN_IMAGE) is SHORT


def test_what_is_given_beside_a_preset_takes_the_place_of_its_own() -> None:
    late = ProgressiveResolution("4x", ends=(0.8,))
    whole = {"steps": (22, 6), "starts": (0.3,), "shifts": (2.0, 0.6), "lift": PixelLift()}
    assert late.recipe == ProgressiveResolution(**whole, ends=(0.8,)).recipe
    assert late.plan(8, 8, None).stages[0].sigmas[-1] == pytest.approx(0.2)


def test_given_shifts_space_the_stages_and_no_shifts_are_matched() -> None:
    stages = {"steps": (4, 3), "ends": (0.5,), "starts": (0.2,)}
    plan = ProgressiveResolution(**stages, shifts=(2.0, 0.5)).plan(8, 8, None)
    for stage, (start, stop, shift) in zip(plan.stages, [(1.0, 0.5, 2.0), (0.8, 0.0, 0.5)], strict=True):
        uniform = [sigma / (shift - (shift - 1) * sigma) for sigma in stage.sigmas]
        assert (stage.sigmas[0], stage.sigmas[-1]) == pytest.approx((start, stop))
        assert [b - a for a, b in pairwise(uniform)] == pytest.approx(
            [(uniform[-1] - uniform[0]) / stage.steps] * stage.steps
        )
    assert "shifts 2.000, 0.500; as given" in plan.notes
    matched = ProgressiveResolution(**stages).plan(8, 8, None)
    assert any("matching distance" in note for note in matched.notes)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "published"), [("SPEED 1%", 1.319), ("SPEED 5%", 1.623)])
def test_speed_s_recipes_cost_what_is_published(name: str, published: float) -> None:
    counter = RunFlops("flux-dev")
    plan = ProgressiveResolution.published(name).plan(64, 64, None)
    spent = counter.transformer([Stage(stage.steps, stage.tokens) for stage in plan.stages]).total
    plain = counter.transformer([Stage(50, 4096)]).total
    assert plain / spent == pytest.approx(published, rel=0.005)
    end = plan.stages[0].sigmas[-1]
    assert plan.stages[1].sigmas[0] == pytest.approx(2 * end / (1 + end), abs=1e-4)


@pytest.mark.parametrize(("name", "after"), [("SelfLift 4", 3), ("SelfLift 8", 6)])
def test_selflift_s_recipes_change_the_size_at_an_unchanged_noise_level(name: str, after: int) -> None:
    first, last = ProgressiveResolution.published(name).plan(8, 8, None).stages
    assert (first.steps, first.sigmas[-1]) == (after, last.sigmas[0])


def test_a_recipe_of_another_name_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"no recipe 'SPEED' is known; choose one of SPEED 1%"):
        ProgressiveResolution.published("SPEED")


def test_it_survives_json() -> None:
    stack = Stack([ProgressiveResolution(steps=(4, 3), starts=(0.3,), base_shift=5.0)])
    assert Stack.from_json(stack.to_json()) == stack


@pytest.mark.parametrize(
    "old", [{"preset": "4x"}, {"preset": None, "steps": [22, 6], "ends": [0.5]}, {"preset": None}], ids=str
)
def test_a_stack_that_was_saved_under_its_old_name_is_refused_with_the_new_one(old: dict[str, Any]) -> None:
    data = {"fastdit_stack": 1, "accelerators": [{"type": "RALU", **old}]}
    with pytest.raises(InvalidConfig, match="now written ProgressiveResolution"):
        Stack.from_json(data)
    kept = {"type": "RALU", "preset": None, "steps": [2, 2, 2], "ends": [0.3, 0.45], "ratio": 0.3}
    assert Stack.from_json({"fastdit_stack": 1, "accelerators": [kept]}) == Stack(
        [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)]
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": (3, 11, 4)},
        {"steps": 4, "ends": (0.5,)},
        {"steps": (0, 4)},
        {"steps": (4, 3), "ends": (0.2, 0.3)},
        {"steps": (4, 3), "starts": (0.6,)},
        {"steps": (4, 3), "lift": TokenCopy(), "starts": (0.4,)},
        {"steps": (4, 3), "shifts": (3.0,)},
        {"steps": (4, 3), "lift": "pixels"},
        {"preset": "8x"},
        {"preset": (4, 3)},
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused_when_it_is_written(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        ProgressiveResolution(**arguments)


def test_the_loop_s_scheduler_holds_the_sigmas_of_all_stages_and_one_zero() -> None:
    pipe, call = tiny.flux(steps=5)
    fast = accelerate(pipe, [ProgressiveResolution(steps=(3, 2))])
    seen: list[torch.Tensor] = []

    def look(twin: Any, _: int, __: Any, values: Any) -> Any:
        seen.append(twin.scheduler.sigmas.clone())
        return values

    tiny.run(fast, call, callback_on_step_end=look)
    first, last = fast.fastdit.plan().stages
    for sigmas in seen:
        assert sigmas.tolist() == pytest.approx([*first.sigmas[:-1], *last.sigmas[:-1], 0.0])
