"""One call of a twin: its clock, its branches and stages, the state that lives as long as it, and its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar, cast

import torch

from fastdit.errors import InvalidConfig
from fastdit.layout import TokenLayout
from fastdit.nested import Value, same_value
from fastdit.record import RunRecord, StepRecord, Stopwatch
from fastdit.step import OUTSIDE, SchedulePlan, StepContext


class RunState(Protocol):
    """What an accelerator keeps for a branch of a run."""

    def tensors(self) -> list[torch.Tensor]:
        """List every tensor that is kept."""

    def lift(self, sources: torch.Tensor, tokens: int) -> None:
        """Bring all that is kept to another layout: token i becomes a copy of token `sources[:, i]` of `tokens`."""


#: What to do with histories when a schedule changes the tokens: drop them, or copy them to the new tokens.
StageChange = Literal["reset", "carry"]

StateKey = tuple[str, ...]
_State = TypeVar("_State", bound=RunState)


class Run:
    """The one clock of a call and everything that must not outlive it.

    A pipeline's run ticks when its scheduler steps, and begins anew where the scheduler's timesteps are set; a forward
    outside of that loop is no step. The run of a bare module (which gives its `branches`) ticks when a branch comes
    round again. `plan` holds the stages of a schedule, `grid` is the picture's layout where the family is known. State
    is kept for (transformer, branch) and is void when the stage changes.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        branches: Sequence[str] | None = None,
        plan: SchedulePlan | None = None,
        grid: TokenLayout | None = None,
        checks: Sequence[Callable[[int], None]] = (),
    ) -> None:
        self.total_steps, self.plan, self.grid = total_steps, plan, grid
        self.layout: TokenLayout | None = None
        self.step = self.stage = self.stage_step = 0
        self._sigmas: tuple[float, ...] = ()
        self._checks = tuple(checks)
        self._announced: Callable[[], int | None] = lambda: None
        self._former: int | None = None
        self._settled = False
        self._looping, self.stepped = branches is not None, False
        self._first_index = 0
        self._branches = tuple(branches) if branches is not None else None
        self._named_branch: str | None = None
        self._calls: list[str] = []
        self._timestep: Value = None
        self._shifted = False
        self._states: dict[StateKey, RunState] = {}
        self._carried: set[StateKey] = set()
        self._pending: list[tuple[Stopwatch, Callable[[float], StepRecord]]] = []
        self._doubts = self._cache_bytes = 0
        self._started = time.perf_counter()

    @property
    def staged(self) -> bool:
        """Whether a schedule owns the timesteps."""
        return self.plan is not None

    @property
    def index(self) -> int:
        """The place of the present step in the scheduler's timesteps."""
        return self._first_index + self.step

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Name the branch of the forwards inside (conditional, unconditional, ...)."""
        before, self._named_branch = self._named_branch, name
        try:
            yield
        finally:
            self._named_branch = before

    def announce(self, steps: Callable[[], int | None]) -> None:
        """Say how to ask the pipeline for the number of timesteps that it will walk along; None where it tells none."""
        self._announced = steps

    def timetable(self, sigmas: torch.Tensor | Sequence[float], steps: int) -> None:
        """Take in the noise levels of the scheduler's timesteps, read once, and how many of these there are."""
        self.begin(steps)
        self._sigmas = tuple(sigmas.tolist() if isinstance(sigmas, torch.Tensor) else map(float, sigmas))

    def begin(self, total_steps: int, first_index: int = 0) -> None:
        """Begin a loop of so many steps at one of the scheduler's timesteps; what a loop before it left is void."""
        self._void()
        self._calls.clear()
        self._former = self._announced()  # before this loop
        self._settled, self._looping, self._shifted = False, True, False
        self.step = self.stage = self.stage_step = 0
        self.total_steps, self._first_index = total_steps, first_index
        if self.plan is not None:
            self.stage, self.stage_step = self.plan.at(first_index)

    def enter(self, timestep: Value = None) -> StepContext:
        """Count a forward and say where it stands. Raises `InvalidConfig` past the last step of a bare module's run."""
        past = self.total_steps is not None and self.step >= self.total_steps
        if not self._looping or (past and self._branches is None):
            return StepContext(OUTSIDE, 0, self.stage, OUTSIDE, "outside of the loop")
        if not self._settled:
            self._settle()
        name = self._branch()
        if self._branches is not None and self._begins_a_step(name):
            self.tick()
            name = self._branch()
            if self.total_steps is not None and self.step >= self.total_steps:
                raise InvalidConfig(
                    f"the run was opened for {self.total_steps} steps and was called once more; give run() the right "
                    "num_inference_steps, and name every branch of a step in branches=(...), in the order of the calls"
                )
        if not self._calls:
            self._timestep = timestep
        elif self.step == 0 and name.startswith("call "):
            self._shifted |= not same_value(self._timestep, timestep)
        self._calls.append(name)
        self.stepped |= self._branches is not None
        total = self.total_steps if self.total_steps is not None else self.step + 2
        return StepContext(self.step, total, self.stage, self.stage_step, name, self._first_index)

    def _settle(self) -> None:
        """Take in how long the run really is, and check it, before its first step."""
        if self.total_steps is None:
            return
        announced = self._announced()
        if announced and announced != self._former:
            # Fewer where first timesteps are left out without telling the scheduler; more where frames go one by one.
            self.begin(announced, self._first_index + max(self.total_steps - announced, 0))
        self._settled = True
        for check in self._checks:
            check(self.total_steps)

    def _begins_a_step(self, name: str) -> bool:
        """Whether a bare module's call belongs to the next step: its branch, or one after it, was called in this."""
        called, order = self._calls, self._branches or ()
        if name in called or name not in order:
            return name in called
        return any(other in order and order.index(other) > order.index(name) for other in called)

    def _branch(self) -> str:
        """Name the branch of a forward."""
        name, place = self._named_branch, len(self._calls)
        if self._branches is not None:
            return name or self._branches[place % len(self._branches)]
        if name is None:
            return f"call {place}"
        # What is called twice in a step, for parts of a picture, is as many branches.
        return f"{name}, call {place}" if name in self._calls else name

    def tick(self) -> None:
        """End a step. Without a forward since the last tick none ends: a loop may step several schedulers."""
        if not self._calls:
            self._looping = True  # whoever set the timesteps
            return
        if self._shifted:
            self._void()  # forwards of the first step had different timesteps: some stood before the loop
        self._shifted = False
        self.step += 1
        self.stage_step += 1
        self.stepped = True
        self._calls.clear()

    def stand_on(self, layout: TokenLayout) -> None:
        """Say on which layout the first stage's tokens lie."""
        self.layout = layout

    def next_stage(self, layout: TokenLayout) -> None:
        """Enter the next stage; what is kept for a stage is void, or carried where its owner asked for that."""
        before, self.layout = self.layout, layout
        self.stage += 1
        self.stage_step = 0
        self._weigh()
        carried = {key: state for key, state in self._states.items() if key in self._carried and before is not None}
        for state in carried.values():
            assert before is not None
            state.lift(before.sources(layout), before.tokens)
        self._states = carried

    def state(self, key: StateKey, make: Callable[[], _State], *, carry: bool = False) -> _State:
        """Get the state under `key`, made on first use and dropped at the run's end.

        At the next stage it is dropped too, or with `carry` lifted to the new tokens.
        """
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = make()
            if carry:
                self._carried.add(key)
        return cast(_State, found)

    def sigma(self, step: int) -> float | None:
        """Give the noise level of a step, or None where the scheduler has none."""
        index = step + self._first_index
        return self._sigmas[index] if step >= 0 and index < len(self._sigmas) else None

    def doubt(self) -> bool:
        """Count a signal that is not finite, and say whether it is the run's first."""
        self._doubts += 1
        return self._doubts == 1

    def note(self, stopwatch: Stopwatch, make: Callable[[float], StepRecord], *, computed: bool) -> None:
        """Add a record whose time is read at the end, so that no step waits for the device.

        What the caches hold grows where a forward was `computed`, and is weighed then.
        """
        self._pending.append((stopwatch, make))
        if computed and self._states:
            self._weigh()

    def _weigh(self) -> None:
        """Note how much memory the caches hold, each storage counted once."""
        sizes: dict[int, int] = {}
        for state in self._states.values():
            for tensor in state.tensors():
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        self._cache_bytes = max(self._cache_bytes, sum(sizes.values()))

    def _void(self) -> None:
        """Drop all state."""
        self._weigh()
        self._states.clear()

    def finish(self, *, completed: bool) -> RunRecord:
        """Close the run: drop all state and give the record."""
        self._void()
        self.layout = self.grid = None
        steps = tuple(make(stopwatch.seconds) for stopwatch, make in self._pending)
        self._pending.clear()
        return RunRecord(steps, time.perf_counter() - self._started, completed, self._doubts, self._cache_bytes)
