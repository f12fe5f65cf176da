"""How a step is decided, by itself: what forces it, what a gate sees and remembers, what is kept and carried."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastdit import FirstBlockCache, Interval, Reuse, SkipPolicy, Taylor
from fastdit.accelerator import Break, Change, Need
from fastdit.errors import FastditWarning, IncompatibleStack, InvalidConfig
from fastdit.run import Run
from fastdit.step import StepContext
from fastdit.step_cache.base import StepCache
from fastdit.step_cache.decision import BranchState, Decider, GroupState
from fastdit.step_cache.site import Memory, Site, Verdict, difference
from fastdit.step_cache.tally import Gains, Tally

SHAPE = torch.Size((2, 3, 4))
FREE = SkipPolicy(first=0, last=0)


@dataclasses.dataclass(frozen=True)
class Moved(StepCache):
    """Computes where what has moved, added up, reaches a half."""

    policy: SkipPolicy = FREE

    def signal(self, site: Site) -> torch.Tensor | None:
        return site.hidden_states

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        memory.accumulated += change
        return Verdict(memory.accumulated >= 0.5, f"moved {memory.accumulated:.2f}")


def at(step: int, total: int = 9, **options: Any) -> StepContext:
    return StepContext(step, total, 0, step, "main", **options)


def site(signal: torch.Tensor, context: StepContext) -> Site:
    return Site(signal, signal, None, (), {}, context)


def filled(memory: Memory | None = None, forecast: Any = None) -> GroupState:
    """A group that has something to skip on."""
    history = (forecast or Reuse()).begin()
    history.record(0, [torch.zeros(SHAPE)])
    return GroupState(memory or Memory(), {0: history})


def decided(decider: Decider, groups: list[GroupState], value: Any, step: int, **options: Any) -> list[Verdict]:
    signal = value if torch.is_tensor(value) else torch.full(SHAPE, float(value))
    return decider.decide(groups, site(signal, at(step)), (signal.shape,), 0, **options)


def test_small_changes_add_up_until_a_step_is_computed_and_begin_anew_there() -> None:
    decider, group = Decider(Moved(), Run()), filled()
    said = [decided(decider, [group], value, step)[0] for step, value in enumerate((1.0, 1.2, 1.2, 1.3, 1.3, 1.3))]
    assert said[0] == Verdict(True, "no history")  # there is nothing to compare to
    assert [verdict.compute for verdict in said[1:]] == [False, False, True, False, False]
    assert [verdict.reason for verdict in said[1:4]] == ["moved 0.20", "moved 0.40", "moved 0.70"]
    assert said[4].reason == "moved 0.00"  # the signal is that of the last computed step
    assert (group.consecutive, group.skipped) == (2, 4)


def test_the_limits_of_a_policy_count_skips_in_a_row_and_in_all() -> None:
    row = Decider(Moved(policy=SkipPolicy(0, 0, max_consecutive=2)), Run())
    group = filled()
    reasons = [decided(row, [group], 1.0, step)[0].reason for step in range(7)]
    assert reasons == ["no history", *(["moved 0.00"] * 2 + ["most skips in a row"]) * 2]
    stage = Decider(Moved(policy=SkipPolicy(0, 0, max_skipped=2)), Run())
    group = filled()
    reasons = [decided(stage, [group], 1.0, step)[0].reason for step in range(5)]
    assert reasons == ["no history", "moved 0.00", "moved 0.00", "most skips in a stage", "most skips in a stage"]


def test_what_forces_a_step_comes_in_one_order_and_no_gate_is_asked() -> None:
    decider = Decider(Moved(), Run())
    empty = GroupState(Memory())
    assert decided(decider, [empty], 1.0, 0)[0] == Verdict(True, "first step of a stage")
    assert decided(decider, [GroupState(Memory())], 1.0, 3)[0] == Verdict(True, "no history")
    assert decided(decider, [filled(Memory(torch.ones(SHAPE)))], 1.0, 3, forced="asked")[0] == Verdict(True, "asked")
    other = filled(Memory(torch.ones(SHAPE)))
    verdict = decider.decide([other], site(torch.ones(SHAPE), at(3)), (SHAPE,), 1)[0]
    assert verdict == Verdict(True, "no history")  # the other segment has one
    schedule = site(torch.ones(SHAPE), at(3, forced="the schedule looks at it"))
    assert decider.decide([filled()], schedule, (SHAPE,), 0)[0].reason == "the schedule looks at it"
    neutral = Decider(FirstBlockCache(0.0, policy=FREE), Run())
    assert decided(neutral, [filled()], 1.0, 3)[0] == Verdict(True, "neutral")


def test_another_shape_empties_what_is_kept_and_is_computed() -> None:
    decider, group = Decider(Moved(), Run()), filled(Memory(torch.ones(SHAPE), 0.3))
    decided(decider, [group], 1.0, 1)
    group.consecutive = group.skipped = 4
    wide = torch.ones(2, 5, 4)
    assert decided(decider, [group], wide, 2)[0] == Verdict(True, "another shape")
    assert group.histories == {} and group.memory.accumulated == 0.0
    assert (group.consecutive, group.skipped, group.shapes) == (0, 0, (wide.shape,))
    assert group.memory.signal is wide
    carried = filled()
    carried.shapes = (SHAPE[:1],)  # as many images, of a length that is not known yet
    assert decided(decider, [carried], wide, 2)[0].reason != "another shape"
    more = filled()
    more.shapes = (SHAPE, SHAPE)
    assert decided(decider, [more], 1.0, 2)[0].reason == "another shape"


def test_images_that_are_decided_one_by_one_have_a_row_of_the_signal_each_and_one_read_together() -> None:
    reads: list[torch.Tensor] = []

    def reduce(changes: torch.Tensor) -> torch.Tensor:
        reads.append(changes)
        return changes

    decider = Decider(Moved(), Run(), reduce)
    groups = [filled(Memory(torch.ones(1, 3, 4))), filled(Memory(torch.ones(1, 3, 4)))]
    signal = torch.stack([torch.full((3, 4), 1.1), torch.full((3, 4), 1.9)])
    verdicts = decider.decide(groups, site(signal, at(3)), (SHAPE,), 0)
    assert [verdict.compute for verdict in verdicts] == [False, True]
    assert len(reads) == 1 and reads[0].shape == (2, 2)
    torch.testing.assert_close(reads[0], torch.tensor([[0.1, 1.0], [0.9, 1.0]]))
    assert groups[0].memory.signal is not None and float(groups[0].memory.signal.max()) == 1.0
    assert groups[1].memory.signal is not None and float(groups[1].memory.signal.min()) > 1.8
    decided(decider, [filled()], 1.0, 3)
    assert len(reads) == 1  # nothing to compare to is nothing to read


def test_doubt_computes_is_counted_and_warned_about_once() -> None:
    run = Run()
    decider = Decider(Moved(), run)
    with pytest.warns(FastditWarning, match=r"signal of step 3 \(main\) gives no finite"):
        verdict = decided(decider, [filled(Memory(torch.ones(SHAPE)))], float("nan"), 3)[0]
    assert verdict == Verdict(True, "doubt: change is not finite")
    assert decided(decider, [filled(Memory(torch.zeros(SHAPE)))], 1.0, 4)[0] == verdict  # against nothing
    assert run.finish(completed=True).doubts == 2


def test_a_branch_that_was_left_out_before_says_so_and_groups_are_fresh_where_their_number_changed() -> None:
    state = BranchState()
    assert [state.enter(step) for step in (0, 1, 1, 3, 4)] == [None, None, None, "left out before", None]
    one = state.groups(0, 1, Memory)
    assert state.groups(0, 1, Memory) is one and len(one) == 1
    assert len(state.groups(0, 2, Memory)) == 2
    assert state.groups(1, 1, Memory) is not one


def test_all_tensors_of_memories_and_histories_are_listed() -> None:
    state = BranchState({0: [filled(Memory(torch.ones(5)))], 1: [filled()]})
    assert sorted(tensor.numel() for tensor in state.tensors()) == [5, 24, 24]


def test_a_carried_state_holds_copies_of_its_tokens_and_forgets_what_has_none() -> None:
    history = Reuse().begin()
    text, image = torch.zeros(2, 2, 1), torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]]])
    history.record(0, [text, image])
    memory = Memory(image + 10)
    memory.other = torch.ones(2, 2)  # type: ignore[attr-defined]
    memory.number = torch.tensor(3.0)  # type: ignore[attr-defined]
    group = GroupState(memory, {0: history}, (text.shape, image.shape), 3, 4)
    state = BranchState({0: [group]}, {0: 1})
    state.lift(torch.tensor([[1, 0, 1]]), 2)
    (kept,) = history.kept
    assert kept[0] is text and kept[1].flatten().tolist() == [1, 0, 1, 3, 2, 3]
    assert memory.signal is not None and memory.signal.flatten().tolist() == [11, 10, 11, 13, 12, 13]
    assert vars(memory)["other"] is None and float(vars(memory)["number"]) == 3.0
    assert group.shapes == (text.shape[:1], image.shape[:1])
    assert (group.consecutive, group.skipped) == (0, 0)
    apart = [GroupState(Memory(image[i : i + 1])) for i in (0, 1, 0)]  # a guided batch of one image more
    BranchState({0: apart}).lift(torch.tensor([[0, 0], [1, 1]]), 2)
    assert [group.memory.signal.flatten().tolist() for group in apart] == [[0, 0], [3, 3], [0, 0]]  # type: ignore[union-attr]
    assert apart[0].shapes is None
    history.kept = [[text, torch.zeros(2, 3, 1)]]
    with pytest.raises(IncompatibleStack, match="has 3 tokens, text beside the image's 2"):
        state.lift(torch.tensor([[0, 1]]), 2)


def test_a_change_is_the_mean_movement_over_the_mean_size() -> None:
    moved = difference(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -2.0]))
    assert moved.tolist() == [1.0, 2.0] and moved.dtype == torch.float32
    memory = Memory(torch.ones(1), 0.4)
    memory.restart()
    assert memory.accumulated == 0.0
    assert Moved().change(Memory(), torch.ones(1)) is None


def test_effects_follow_from_scope_forecaster_carrying_and_images() -> None:
    plain, effects = Interval(2).effects, Interval(2, forecast=Taylor(1), stage_change="carry").effects
    assert plain.needs == {Need.BLOCK_LISTS} and Break.BATCH_INVARIANCE in plain.breaks
    assert effects.needs == {Need.BLOCK_LISTS, Need.CARRIED_TOKENS, Need.PRECISE_ACTIVATIONS}
    assert Need.BLOCK_LISTS not in Interval(2, scope="forward").effects.needs
    apart = Interval(2, per_image=True).effects
    assert Change.BATCH_ROWS in apart.changes and Need.SEPARABLE_ROWS in apart.needs
    assert Break.BATCH_INVARIANCE not in apart.breaks


@dataclasses.dataclass(frozen=True)
class Late(Moved):
    """Needs two computed steps, and decides for the stack alone."""

    warm_up = 2
    scopes = ("stack",)


def test_what_may_be_skipped_begins_after_the_warm_up_and_little_room_is_said() -> None:
    assert (Moved().skippable(6), Late().skippable(6)) == (5, 4)
    assert Late(policy=SkipPolicy(3, 1)).skippable(6) == 2
    assert Moved().outlook(4) is None
    assert "can skip at most 2 of 3 steps" in (Moved().outlook(3) or "")
    assert "can skip none of 1 steps" in (Moved().outlook(1) or "")
    assert FirstBlockCache(0.0, policy=FREE).outlook(1) is None
    assert (Interval().interval, Interval(1).neutral, Interval(2).neutral) == (3, True, False)
    assert (Moved().leading_blocks, Moved().trailing_blocks) == (0, 0)
    with pytest.raises(InvalidConfig, match="scope is one of stack, where"):
        Late(scope="list")


def test_a_tally_tells_computed_reused_forecast_and_mixed_steps_apart() -> None:
    taylor = filled(forecast=Taylor(1))
    taylor.histories[0].record(1, [torch.ones(SHAPE)])
    cases = [
        ([True], [filled()], "computed"),
        ([False], [filled()], "reused"),
        ([False], [taylor], "forecast"),
        ([True, False], [filled(), filled()], "partial"),
        ([True, False], [filled(), taylor], "partial"),
        ([False, False], [filled(), taylor], "forecast"),
    ]
    for computed, groups, action in cases:
        tally = Tally()
        tally.add([Verdict(one, str(one)) for one in computed], groups, 0)
        assert tally.outcome.action == action
        assert tally.outcome.reason == "; ".join(map(str, computed if len(set(computed)) > 1 else computed[:1]))
    assert (Tally().outcome.action, Tally().outcome.reason) == ("computed", "no block was called")


def test_a_cache_that_skipped_nothing_says_so_unless_nothing_could_be() -> None:
    def gains(cache: StepCache, *actions: str) -> str | None:
        gained = Gains(cache)
        for step, action in enumerate(actions):
            gained.adding(Tally(**{action: 1}), step)
        return gained.idle()

    assert "skipped none of 4 forwards" in (gains(Moved(), *["computed"] * 4) or "")
    assert gains(Moved(), "computed", "reused") is None
    assert gains(Moved(), "computed", "forecast") is None
    assert gains(Moved()) is None
    assert gains(Moved(), "computed") is None  # one step can't be skipped
    assert gains(FirstBlockCache(0.0, policy=FREE), *["computed"] * 4) is None


def test_the_window_of_a_policy_is_rounded_to_whole_steps_and_counts_what_is_free() -> None:
    policy = SkipPolicy(1, 2, window=(0.25, 0.75))
    inside = [step for step in range(10) if policy.forced(at(step, 10), 0, 0) is None]
    assert inside == [3, 4, 5, 6, 7]
    assert policy.skippable(10) == 5
    assert SkipPolicy(0, 0).skippable(4) == 3  # the first has nothing to skip on
    assert SkipPolicy(1, 1, max_skipped=2).skippable(10) == 2
    assert [policy.forced(at(step, 10), 0, 0) for step in (0, 1, 8)] == [
        "first steps",
        "outside the window",
        "last steps",
    ]
    limits = SkipPolicy(0, 0, max_consecutive=2, max_skipped=3)
    assert [limits.forced(at(5), *skips) for skips in ((1, 2), (2, 2), (1, 3))] == [
        None,
        "most skips in a row",
        "most skips in a stage",
    ]
    with pytest.raises(InvalidConfig, match="rising pair"):
        SkipPolicy(window=(0.5, 0.5))
