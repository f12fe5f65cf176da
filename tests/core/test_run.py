"""The clock of a run and the chain of its passes, by themselves: no pipeline is called."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastdit.blocks.chain import BlockCall, Chain, ForwardCall, Pass, run_block
from fastdit.errors import InvalidConfig, NoActiveRun
from fastdit.layout import CoarseLayout, FineLayout
from fastdit.record import Outcome
from fastdit.run import Run
from fastdit.step import OUTSIDE, SchedulePlan, StagePlan, StepContext

PLAN = SchedulePlan((StagePlan(0, "coarse", 4, 2), StagePlan(1, "fine", 16, 3)), 4, 4)


class Kept:
    """What a cache keeps, with a note of how it was lifted."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.kept = list(tensors)
        self.lifted: list[tuple[list[int], int]] = []

    def tensors(self) -> list[torch.Tensor]:
        return self.kept

    def lift(self, sources: torch.Tensor, tokens: int) -> None:
        self.lifted.append((sources.flatten().tolist(), tokens))


def stood(run: Run, **options: Any) -> tuple[int, int, int, str]:
    """Where a forward stands."""
    at = run.enter(**options)
    return at.step, at.stage, at.stage_step, at.branch


def test_before_timesteps_are_set_and_past_the_last_step_a_forward_is_no_step() -> None:
    run = Run(plan=PLAN)
    outside = (OUTSIDE, 0, OUTSIDE, "outside of the loop")
    assert stood(run) == outside
    run.begin(2)
    assert stood(run) == (0, 0, 0, "call 0")
    run.tick()
    assert stood(run) == (1, 0, 1, "call 0")
    run.tick()
    assert stood(run) == outside
    assert run.enter().total_steps == 0
    assert run.stepped


def test_a_tick_without_a_forward_ends_no_step_but_a_loop_begins_there() -> None:
    run = Run()
    run.tick()
    assert (run.step, run.stepped) == (0, False)
    assert stood(run) == (0, 0, 0, "call 0")
    assert not run.stepped
    run.tick()
    run.tick()
    assert (run.step, run.stage_step, run.stepped) == (1, 1, True)
    assert run.enter().total_steps == 3  # unknown: one more at least


def test_a_loop_that_begins_anew_begins_at_its_first_step_in_the_stage_of_its_first_timestep() -> None:
    run = Run(plan=PLAN)
    run.begin(5)
    for _ in range(2):
        run.enter()
        run.tick()
    run.begin(2, first_index=3)
    assert (run.step, run.index, run.stage, run.stage_step) == (0, 3, 1, 1)
    at = run.enter()
    assert (at.total_steps, at.skipped_timesteps) == (2, 3)
    run.begin(2)
    assert (run.step, run.index, run.stage, run.stage_step) == (0, 0, 0, 0)
    assert run.staged and not Run().staged


def test_the_noise_level_of_a_step_is_that_of_its_timestep() -> None:
    run = Run()
    run.timetable([0.9, 0.6, 0.3], 3)
    assert [run.sigma(step) for step in (OUTSIDE, 0, 2, 3)] == [None, 0.9, 0.3, None]
    run.begin(2, first_index=1)
    assert [run.sigma(step) for step in (0, 1, 2)] == [0.6, 0.3, None]


def test_a_loop_s_length_is_checked_once_and_before_its_first_step() -> None:
    asked: list[int] = []
    run = Run(checks=[asked.append])
    run.begin(3)
    assert asked == []
    for _ in range(2):
        run.enter()
        run.tick()
    assert asked == [3]
    run.begin(2)
    run.enter()
    assert asked == [3, 2]
    bare = Run(4, ("main",), checks=[asked.append])
    bare.enter()
    assert asked == [3, 2, 4]
    open_ended = Run(None, ("main",), checks=[asked.append])
    open_ended.enter()
    assert asked == [3, 2, 4]


def test_the_step_of_a_bare_module_ends_when_a_branch_comes_round_again() -> None:
    run = Run(3, ("cond", "uncond"))
    assert not run.stepped
    steps = [stood(run)[::3] for _ in range(5)]
    assert steps == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"), (2, "cond")]
    assert run.stepped
    with run.branch("uncond"):
        assert stood(run)[::3] == (2, "uncond")
    with pytest.raises(InvalidConfig, match="opened for 3 steps"):
        run.enter()


def test_a_branch_that_is_left_out_of_a_step_does_not_keep_the_next_one_from_beginning() -> None:
    run = Run(9, ("a", "b"))
    names = []
    for name in ("a", "b", "b", "a", "a", "other", "a"):
        with run.branch(name):
            names.append((run.enter().step, name))
    assert names == [(0, "a"), (0, "b"), (1, "b"), (2, "a"), (3, "a"), (3, "other"), (4, "a")]
    with run.branch("outer"):
        with run.branch("inner"):
            assert run.enter().branch == "inner"
        assert run.enter().branch == "outer"
    assert run.enter().branch in ("a", "b")


def test_what_stood_before_the_loop_with_another_timestep_leaves_no_state_and_is_forgotten_with_the_step() -> None:
    run = Run()
    run.begin(4)
    for timestep in (0, 1):
        run.enter(timestep)
    before = run.state(("t", "call 0"), Kept)
    run.tick()
    run.enter(2)
    kept = run.state(("t", "call 0"), Kept)
    assert kept is not before
    run.tick()
    run.enter(3)
    assert run.state(("t", "call 0"), Kept) is kept


def test_named_branches_may_have_timesteps_of_their_own() -> None:
    run = Run()
    run.begin(4)
    for timestep, name in enumerate(("cond", "uncond")):
        with run.branch(name):
            run.enter(timestep)
    kept = run.state(("t", "cond"), Kept)
    run.tick()
    assert run.state(("t", "cond"), Kept) is kept


def test_at_the_next_stage_what_is_kept_is_void_unless_it_is_carried_to_the_new_tokens() -> None:
    run = Run(plan=PLAN)
    run.begin(5)
    run.stand_on(CoarseLayout(4, 4))
    lost, carried = run.state(("t", "lost"), Kept), run.state(("t", "carried"), Kept, carry=True)
    for _ in range(2):
        run.enter()
        run.tick()
    run.next_stage(FineLayout(4, 4))
    assert (run.stage, run.stage_step, run.step) == (1, 0, 2)
    assert run.state(("t", "lost"), Kept) is not lost
    assert run.state(("t", "carried"), Kept) is carried
    assert carried.lifted == [(CoarseLayout(4, 4).sources(FineLayout(4, 4)).flatten().tolist(), 4)]
    assert isinstance(run.layout, FineLayout)
    unplaced = Run()
    carried = unplaced.state(("t", "carried"), Kept, carry=True)
    unplaced.next_stage(FineLayout(4, 4))
    assert unplaced.state(("t", "carried"), Kept) is not carried and carried.lifted == []


def test_the_most_that_was_kept_at_a_time_is_weighed_each_storage_once() -> None:
    run = Run()
    run.begin(3)
    watch: Any = SimpleNamespace(seconds=0.5)
    shared = torch.zeros(8)
    state = run.state(("t", "a"), lambda: Kept(shared, shared[2:]))
    run.state(("t", "b"), lambda: Kept(torch.zeros(2)))
    run.note(watch, lambda seconds: seconds, computed=True)  # type: ignore[arg-type, return-value]
    state.kept = [torch.zeros(2)]
    run.note(watch, lambda seconds: -seconds, computed=True)  # type: ignore[arg-type, return-value]
    record = run.finish(completed=True)
    assert record.cache_bytes == (8 + 2) * 4
    assert record.steps == (0.5, -0.5) and record.completed
    assert 0.0 < record.seconds < 60.0
    assert run.finish(completed=False).steps == ()
    late = Run()
    late.state(("t", "a"), lambda: Kept(shared))
    late.note(watch, lambda seconds: seconds, computed=False)  # type: ignore[arg-type, return-value]
    assert late._cache_bytes == 0
    assert late.finish(completed=False).cache_bytes == 32


def test_of_signals_that_are_not_finite_the_first_is_told_apart_and_all_are_counted() -> None:
    run = Run(grid=FineLayout(4, 4))
    assert [run.doubt() for _ in range(3)] == [True, False, False]
    record = run.finish(completed=False)
    assert (record.doubts, record.completed) == (3, False)
    assert run.grid is None


class Model(nn.Module):
    """Two blocks, and a list that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])
        self.none = nn.ModuleList()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Telling(Pass):
    """Adds its number to what is inside, and tells of all that it is asked."""

    def __init__(self, number: int, told: list[Any]) -> None:
        self.number, self.told = number, told

    def forward(self, call: ForwardCall, next: Any) -> Any:
        self.told.append(("forward", self.number))
        return next(call) + self.number

    def block(self, call: BlockCall, next: Any) -> Any:
        self.told.append((call.name, call.index, self.number))
        return next(call)

    def outcome(self) -> Outcome | None:
        return Outcome(reason=f"pass {self.number}") if self.number else None

    def settled(self, call: ForwardCall, outcome: Outcome) -> None:
        self.told.append(("settled", self.number, outcome.reason))

    def close(self) -> None:
        self.told.append(("closed", self.number))

    def idle(self) -> str | None:
        return f"pass {self.number} was idle" if self.number else None


def forward_of(module: nn.Module, step: int = 0) -> ForwardCall:
    return ForwardCall(module, "transformer", StepContext(step, 4, 0, 0, "main"), {"hidden_states": torch.ones(1, 2)})


@pytest.mark.usefixtures("no_grad")
def test_passes_stand_around_a_forward_and_its_blocks_the_first_outermost_and_close_in_reverse() -> None:
    told: list[Any] = []
    module = Model()
    plain = module(torch.ones(1, 2))
    chain = Chain([Telling(1, told), Pass(), Telling(2, told)])
    assert chain.acts_on_blocks and not Chain([Pass()]).acts_on_blocks
    output, outcome = chain.run(forward_of(module))
    assert torch.equal(output, plain + 3)
    blocks = [("blocks", index, number) for index in (0, 1) for number in (1, 2)]
    settled = [("settled", number, outcome.reason) for number in (1, 2)]
    assert told == [("forward", 1), ("forward", 2), *blocks, *settled]
    assert "pass 1" in outcome.reason
    assert chain.called == ["blocks.0", "blocks.1"]
    chain.run(forward_of(module))
    assert chain.called == ["blocks.0", "blocks.1"]
    assert list(chain.idle()) == ["pass 1 was idle", "pass 2 was idle"]
    told.clear()
    chain.close()
    assert told == [("closed", 2), ("closed", 1)]
    with pytest.raises(NoActiveRun, match="has ended"):
        chain.run(forward_of(module))


@pytest.mark.usefixtures("no_grad")
def test_a_forward_outside_of_the_loop_has_a_chain_of_its_own_whose_blocks_and_end_are_the_run_s() -> None:
    told: list[Any] = []
    outside = Chain([Telling(2, told)])
    chain = Chain([Telling(1, told)], outside)
    module = Model()
    output, outcome = chain.run(forward_of(module, OUTSIDE))
    assert torch.equal(output, module(torch.ones(1, 2)) + 2)
    assert outcome.reason == "pass 2"
    assert chain.called == ["blocks.0", "blocks.1"]
    assert ("forward", 1) not in told
    assert Chain([Telling(1, told)]).run(forward_of(module, OUTSIDE))[1].reason == "pass 1"
    told.clear()
    chain.close()
    assert told == [("closed", 2), ("closed", 1)]


@pytest.mark.usefixtures("no_grad")
def test_without_a_pass_the_module_itself_runs_and_nothing_is_said() -> None:
    module = Model()
    calls: list[object] = []
    module.register_forward_hook(lambda one, *_: calls.append(one))
    output, outcome = Chain([]).run(forward_of(module))
    assert torch.equal(output, module(torch.ones(1, 2)))
    assert calls[0] is module
    assert outcome == Outcome()
    assert Chain([Telling(0, [])]).run(forward_of(module))[1] == Outcome()
    assert list(Chain([Pass(), Telling(0, [])]).idle()) == []


@pytest.mark.usefixtures("no_grad")
def test_children_stand_in_for_a_forward_s_and_a_block_s_own_parts_and_for_no_longer() -> None:
    module = Model()
    twice = nn.ModuleList([nn.Identity(), nn.Identity()])
    for chain in (Chain([]), Chain([Telling(0, [])])):
        call = forward_of(module)
        call.children = {"blocks": twice}
        assert torch.equal(chain.run(call)[0], torch.ones(1, 2))
    block = nn.Sequential(nn.Linear(2, 2))
    assert torch.equal(run_block(BlockCall("b", 0, block, (torch.ones(2),), {}, {"0": nn.Identity()})), torch.ones(2))
    assert torch.equal(run_block(BlockCall("b", 0, block, (torch.ones(2),), {})), block(torch.ones(2)))


@pytest.mark.usefixtures("no_grad")
def test_blocks_that_are_put_in_the_place_of_others_are_seen_at_the_next_forward() -> None:
    module, told = Model(), []
    chain = Chain([Telling(1, told)])
    chain.run(forward_of(module))
    known = dict(chain._stacks)
    chain.run(forward_of(module))
    assert all(chain._stacks[key][1] is stack for key, (_, stack) in known.items())
    module.blocks[0] = nn.Identity()
    assert torch.equal(chain.run(forward_of(module))[0], torch.full((1, 2), 2.0))


def test_a_chain_that_is_closed_keeps_no_block_of_the_model() -> None:
    module = Model()
    chain = Chain([Telling(1, [])])
    chain.run(forward_of(module))
    held = weakref.ref(module.blocks[0])
    gc.disable()
    try:
        chain.close()
        del module
        assert held() is None
    finally:
        gc.enable()


def test_modes_that_an_interrupted_pass_left_on_torch_s_stack_are_taken_off() -> None:
    class Interrupted(Pass):
        def forward(self, call: ForwardCall, next: Any) -> Any:
            torch._C._push_on_torch_function_stack(torch.overrides.BaseTorchFunctionMode())
            raise KeyboardInterrupt

    before = torch._C._len_torch_function_stack()
    with pytest.raises(KeyboardInterrupt):
        Chain([Interrupted()]).run(forward_of(Model()))
    assert torch._C._len_torch_function_stack() == before


def test_a_call_for_some_samples_has_their_rows_alone_and_the_schedule_s_say() -> None:
    module = Model()
    call = forward_of(module)
    call.arguments = {
        "hidden_states": torch.arange(6.0).view(3, 2),
        "encoder_hidden_states_llama3": torch.arange(12.0).view(2, 3, 2),
        "scale": 2.0,
    }
    chosen = call.of_samples(torch.tensor([2, 0]), 3)
    assert chosen.arguments["hidden_states"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert chosen.arguments["encoder_hidden_states_llama3"][:, :, 0].tolist() == [[4.0, 0.0], [10.0, 6.0]]
    assert chosen.arguments["scale"] == 2.0
    assert (chosen.module, chosen.name, chosen.step) == (module, call.name, call.step)
    call.select = lambda one, index: one.with_arguments({"hidden_states": index})
    assert call.of_samples(torch.tensor([1]), 3).latents.tolist() == [1]
    assert call.device == torch.device("cpu")
    assert call.with_arguments({"hidden_states": [torch.ones(1, device="meta")]}).device == torch.device("meta")
