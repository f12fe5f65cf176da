"""Stages as data, by themselves: what contradicts itself, how steps are shared out, what a plan holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastdit import RALU, BottleneckSampling, ProgressiveResolution, SpectralLift, VelocityVariance
from fastdit.errors import InvalidConfig
from fastdit.schedule import matching
from fastdit.schedule.presets import PUBLISHED, RALU_PRESETS, WHOLE_PRESETS, listed
from fastdit.schedule.recipe import Recipe, check_rising, proportional, shared_steps

WHOLE, MIXED = ("coarse", "fine"), ("coarse", "mixed", "fine")
TWO = Recipe(WHOLE, (4, 4), (0.5,), starts=(0.2,), shifts=(2.0, 1.0))
THREE = Recipe(MIXED, (2, 3, 4), (0.3, 0.45), 0.3)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (dataclasses.replace(TWO, steps=(4, 4, 4)), "needs 2 step counts"),
        (dataclasses.replace(TWO, ends=(0.3, 0.5)), "ends are 1 value, got"),
        (dataclasses.replace(THREE, ends=(0.5, 0.5)), "2 values that rise"),
        (dataclasses.replace(TWO, ratio=0.3), "give `ratio` with one, got ratio=0.3"),
        (dataclasses.replace(THREE, ratio=None), "got ratio=None"),
        (dataclasses.replace(THREE, lift=SpectralLift()), "takes whole frames"),
        (dataclasses.replace(TWO, restart=3.0), "give one of them"),
        (dataclasses.replace(TWO, starts=(0.1, 0.2), shifts=None), "1 switches need as many start times"),
        (dataclasses.replace(TWO, starts=(0.6,), shifts=None), "start"),
        (dataclasses.replace(TWO, starts=None), "give starts and as many shifts"),
        (dataclasses.replace(TWO, shifts=(1.0,)), "spaced; give starts"),
    ],
)
def test_values_that_contradict_each_other_are_refused_by_name(recipe: Recipe, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        recipe.check("Mine")


@pytest.mark.parametrize("recipe", [TWO, THREE, dataclasses.replace(TWO, shifts=None)])
def test_values_that_agree_are_taken(recipe: Recipe) -> None:
    recipe.check("Mine")


def test_a_plan_holds_the_stages_tokens_steps_and_noise_levels() -> None:
    plan = TWO.plan("Mine", 4, 8, None)
    assert [(one.index, one.layout, one.tokens, one.steps) for one in plan.stages] == [
        (0, "coarse", 8, 4),
        (1, "fine", 32, 4),
    ]
    assert (plan.rows, plan.columns) == (4, 8)
    assert plan.notes == ("shifts 2.000, 1.000; as given",)
    first, last = (one.sigmas or () for one in plan.stages)
    assert (first[0], last[-1]) == (1.0, 0.0)
    assert (first[-1], last[0]) == pytest.approx((0.5, 0.8))
    assert len(first) == len(last) == 5
    assert last == pytest.approx((0.8, 0.6, 0.4, 0.2, 0.0))  # no shift, even steps
    mixed = THREE.plan("Mine", 4, 8, None)
    assert THREE.refined(4, 8) == 2
    assert [one.tokens for one in mixed.stages] == [8, 8 + 3 * 2, 32]
    assert mixed.notes[0].startswith("shifts ") and "; restart Z " in mixed.notes[0]
    assert len(mixed.notes) == 1


def test_a_plan_says_what_became_of_the_step_counts_and_of_a_share_of_no_token() -> None:
    notes = THREE.plan("Mine", 2, 2, 18).notes
    assert notes[0] == "18 steps were asked for: 2/3/4 became 4/6/8 and the matching was solved anew"
    assert notes[-1] == "a share of 0.3 of 1 coarse tokens is less than one, so stage 2 refines nothing"
    assert TWO.plan("Mine", 4, 4, 4).notes[0] == "4 steps were asked for: 4/4 became 2/2"


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (4, 3)])
def test_a_grid_that_can_t_be_halved_is_refused_with_those_beside_it(rows: int, columns: int) -> None:
    up, down = (f"{rows + step * (rows % 2)} x {columns + step * (columns % 2)}" for step in (1, -1))
    with pytest.raises(InvalidConfig, match=f"{rows} x {columns} tokens can't be halved.* {up} or {down} tokens"):
        TWO.plan("Mine", rows, columns, None)


def test_a_selector_that_compares_steps_needs_two_of_them() -> None:
    recipe = dataclasses.replace(THREE, selector=VelocityVariance())
    with pytest.raises(InvalidConfig, match="has one here; give it two or more"):
        recipe.plan("Mine", 4, 8, 3)
    assert recipe.plan("Mine", 4, 8, 9).stages[0].steps == 2


def test_steps_are_shared_out_in_proportion_and_no_stage_has_none() -> None:
    assert shared_steps("Mine", (2, 3), None) == shared_steps("Mine", (2, 3), 5) == ((2, 3), ())
    assert shared_steps("Mine", (2, 3), 2)[0] == (1, 1)
    with pytest.raises(InvalidConfig, match=r"has 2 stages and can't run 1 steps; ask for at least 2,.* its own 5"):
        shared_steps("Mine", (2, 3), 1)
    assert proportional((2, 3, 5), 20) == (4, 6, 10)
    assert proportional((1, 1, 1), 5) == (2, 2, 1)
    assert proportional((1, 10, 10), 5) == (1, 2, 2)
    assert proportional((1, 1, 20), 4) == (1, 1, 2)
    assert proportional((1, 1, 1, 3), 5) == (1, 1, 1, 2)


def test_rising_values_rise() -> None:
    check_rising("ends", (0.1, 0.2), 2)
    for values, count in (((0.2, 0.1), 2), ((0.1, 0.1), 2), ((0.1,), 2)):
        with pytest.raises(InvalidConfig, match="ends are 2 values that rise"):
            check_rising("ends", values, count)


def test_restarts_and_their_factors_are_inverse_and_stages_are_spaced_by_their_shift() -> None:
    assert matching.restart_time(0.5, 3.0) == 0.25
    assert matching.restart_factor(0.5, 0.25) == pytest.approx(3.0)
    assert matching.stage_sigmas(0.0, 1.0, 3.0, 2) == pytest.approx((1.0, 0.75, 0.0))
    assert matching.stage_sigmas(0.2, 0.6, 1.0, 4) == pytest.approx((0.8, 0.7, 0.6, 0.5, 0.4))
    with pytest.raises(InvalidConfig, match="3 stages need 2 end times, got 1"):
        matching.solve((1, 2, 3), (0.5,))


def test_published_settings_have_their_published_numbers_at_any_multiple_of_the_steps_and_no_other_shift() -> None:
    own = matching.solve((5, 6, 7), (0.30, 0.45))
    assert own.shifts == (5.01926, 2.589014, 2.226193) and own.restart == 6.316913
    assert own.starts == tuple(matching.restart_time(end, 6.316913) for end in (0.30, 0.45))
    assert matching.solve((10, 12, 14), (0.30, 0.45)) == own
    assert 0.0 < own.distance < 0.2
    given = matching.solve((5, 6, 7), (0.30, 0.45), 3.0, 6.316913)
    assert given.restart == 6.316913 and given.starts == own.starts and given.shifts != own.shifts
    assert given.shifts == pytest.approx(own.shifts, rel=0.1)
    by_starts = matching.solve((5, 6, 7), (0.30, 0.45), 3.0, None, own.starts)
    assert by_starts.shifts == given.shifts and by_starts.restart is None
    assert matching.solve((5, 6, 7), (0.30, 0.45), 2.0, 6.316913).shifts != given.shifts


def test_presets_of_regions_are_the_paper_s() -> None:
    assert {name: (one.steps, one.ends, one.ratio, one.family) for name, one in RALU_PRESETS.items()} == {
        "4x": ((5, 6, 7), (0.3, 0.45), 0.3, "FLUX.1"),
        "5x": ((4, 5, 6), (0.3, 0.45), 0.2, "FLUX.1"),
        "7x": ((2, 3, 5), (0.2, 0.3), 0.1, "FLUX.1"),
        "2x": ((5, 6, 9), (0.2, 0.3), 0.3, "Stable Diffusion 3"),
        "3x": ((3, 3, 6), (0.25, 0.3), 0.2, "Stable Diffusion 3"),
    }


def test_presets_of_whole_frames_are_what_was_measured() -> None:
    """A stack that names one draws the same picture tomorrow."""
    assert {name: (one.steps, one.starts, one.shifts) for name, one in WHOLE_PRESETS.items()} == {
        "4x": ((22, 6), (0.3,), (2.0, 0.6)),
        "5x": ((20, 4), (0.3,), (2.0, 0.8)),
        "7x": ((14, 3), (0.3,), (2.0, 1.2)),
        "10x": ((10, 2), (0.3,), (2.0, 1.2)),
        "14x": ((5, 2), (0.3,), (2.0, 1.2)),
        "2x": ((28, 6), (0.15,), (3.0, 0.4)),
        "3x": ((20, 4), (0.15,), (3.0, 0.6)),
        "6x": ((7, 3), (0.15,), (3.0, 0.6)),
        "9x": ((5, 2), (0.2,), (3.0, 1.0)),
    }
    assert {one.ends for one in WHOLE_PRESETS.values()} == {(0.5,)}


def test_every_preset_can_be_laid_out() -> None:
    every = [*RALU_PRESETS.items(), *WHOLE_PRESETS.items(), *PUBLISHED.items()]
    for name, recipe in every:
        recipe.check(name)
        assert recipe.plan(name, 8, 8, None).steps == sum(recipe.steps)
        assert all(0.0 < start <= end for start, end in zip(recipe.starts or (), recipe.ends, strict=False))
    assert PUBLISHED["SPEED 1%"].steps == (17, 33) and PUBLISHED["SelfLift 4"].steps == (3, 1)
    assert listed({"a": TWO, "4x": RALU_PRESETS["4x"]}) == "a (None), 4x (FLUX.1)"


def test_the_published_switches_of_speed_are_where_the_band_drowns_and_back_where_its_noise_is_right() -> None:
    for recipe, end in ((PUBLISHED["SPEED 1%"], 0.1472), (PUBLISHED["SPEED 5%"], 0.2818)):
        assert recipe.ends == (end,) and recipe.shifts == (3.0, 3.0)
        assert recipe.starts == (pytest.approx(end / (2.0 - end)),)


def test_of_a_preset_what_is_given_beside_it_is_replaced_and_steps_alone_need_ends() -> None:
    changed = RALU("4x", steps=(1, 2, 3)).recipe
    assert changed == dataclasses.replace(RALU_PRESETS["4x"], steps=(1, 2, 3))
    assert RALU().recipe.steps == RALU_PRESETS["4x"].steps
    with pytest.raises(InvalidConfig, match=r"has no preset '8x'; choose one of 4x \(FLUX.1\)"):
        RALU("8x")
    with pytest.raises(InvalidConfig, match="needs ends beside its steps, 2 of them"):
        RALU(steps=(1, 2, 3))
    own: Any = ProgressiveResolution(steps=(4, 4), ends=(0.5,), base_shift=2.0)
    assert (own.recipe.base_shift, own.recipe.layouts, own.recipe.family) == (2.0, WHOLE, None)
    assert BottleneckSampling(steps=(1, 2, 1)).recipe.layouts == ("fine", "coarse", "fine")
