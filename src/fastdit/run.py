"""One call of a twin: its clock, its branches and stages, the state that lives as long as it, and its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch

from fastdit.errors import InvalidConfig
from fastdit.layout import TokenLayout
from fastdit.meter import FlopMeter
from fastdit.record import Clock, RunRecord, StepRecord
from fastdit.schedule.base import ScheduleRun
from fastdit.step import SchedulePlan, StepContext


class RunState(Protocol):
    """What an accelerator keeps for a branch of a run."""

    def tensors(self) -> list[torch.Tensor]:
        """List every tensor that is kept."""

    def lift(self, sources: torch.Tensor, tokens: int) -> None:
        """Bring all that is kept to another layout: token i becomes a copy of token `sources[:, i]` of `tokens`."""


_State = TypeVar("_State", bound=RunState)


class Run:
    """The one clock of a call and everything that must not outlive it.

    A pipeline's run ticks when its scheduler steps; the run of a bare module (which gives its `branches`) ticks when a
    branch comes round again. State is kept for (owner, denoiser, branch) and is void when the stage changes.
    """

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        branches: Sequence[str] | None = None,
        plan: SchedulePlan | None = None,
        schedule: ScheduleRun | None = None,
        checks: Sequence[Callable[[int], None]] = (),
    ) -> None:
        self.total_steps = total_steps
        self.plan = plan
        self.schedule = schedule
        self.layout: TokenLayout | None = None
        self.stage_shape: torch.Size | None = None
        self.stage_children: dict[tuple[str, int], dict[str, Any]] = {}
        self.step = 0
        self.stage = 0
        self.stage_step = 0
        self.sigmas: tuple[Any, ...] = ()
        self.stage_sigmas: list[torch.Tensor] = []
        #: The latents of the picture that a run begins with, where it does not begin with noise alone.
        self.picture: torch.Tensor | None = None
        #: Brings latents of the full grid to a layout; with `noise=True` so that unit noise stays unit noise.
        self.follow: Callable[..., torch.Tensor] | None = None
        self.doubts = 0
        #: Whether a kernel of the stack has answered the model's attention.
        self.attended = False
        #: What the engine found out about each block, and about each model's adapters, by their ids.
        self.admitted: dict[int, Any] = {}
        self.adapters: dict[int, Any] = {}
        self.grid: TokenLayout | None = None
        #: Gives the number of timesteps that the pipeline says it walks along; None where it says nothing.
        self.announced: Callable[[], int | None] = lambda: None
        self.stages_without_grid: set[int] = set()
        self._cache_bytes = 0
        self._checks = tuple(checks)
        self._settled = False
        self._first_index = 0
        self._branches = tuple(branches) if branches is not None else None
        self._named_branch: str | None = None
        self._calls: dict[str, list[str]] = {}
        self._states: dict[tuple[Any, ...], RunState] = {}
        self._carried: set[tuple[Any, ...]] = set()
        self._meters: dict[str, FlopMeter] = {}
        self._pending: list[tuple[Clock, Callable[[float], StepRecord]]] = []
        self._started = time.perf_counter()

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Name the branch of the forwards inside (conditional, unconditional, ...)."""
        before, self._named_branch = self._named_branch, name
        try:
            yield
        finally:
            self._named_branch = before

    def begin(self, total_steps: int, first_index: int = 0) -> None:
        """Say how many steps the run will have, and at which of the scheduler's timesteps it starts."""
        self.total_steps, self._first_index = total_steps, first_index
        if self.plan is not None:
            self.stage, self.stage_step = self.plan.at(first_index)

    @property
    def index(self) -> int:
        """The place of the present step in the scheduler's timesteps."""
        return self._first_index + self.step

    def followed(self, latents: torch.Tensor, *, noise: bool = False) -> torch.Tensor:
        """Bring latents of the full grid to the layout that the run stands in."""
        if self.follow is None or self.layout is None:
            return latents
        return self.follow(latents, self.layout, noise=noise)

    def first_latents(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """Make the first step's latents and layout of what the pipeline holds at full size."""
        assert self.plan is not None and self.schedule is not None
        if self.picture is not None:
            sigmas = self.plan.stages[self.stage].sigmas
            assert sigmas is not None
            return self.schedule.resume(self.stage, latents, self.picture, sigmas[self.stage_step])
        if self._first_index:
            raise InvalidConfig(
                "a run that leaves out timesteps begins with a picture, whose latents the scheduler was not given; "
                "leave latents= out, or drop the schedule"
            )
        return self.schedule.initial(latents)

    def enter(self, denoiser: str) -> StepContext:
        """Count one forward of `denoiser` and say where it stands. Raises `InvalidConfig` past the last step."""
        self._settle()
        name = self._branch_of(denoiser)
        if self._begins_a_step(denoiser, name):
            self.tick()
            name = self._branch_of(denoiser)
            if self.total_steps is not None and self.step >= self.total_steps:
                raise InvalidConfig(
                    f"the run was opened for {self.total_steps} steps and was called once more; give run() the right "
                    "num_inference_steps, and name every branch of a step in branches=(...), in the order of the calls"
                )
        self._calls.setdefault(denoiser, []).append(name)
        total = self.total_steps if self.total_steps is not None else self.step + 2
        forced = self.schedule.forced(self.stage, self.stage_step) if self.schedule is not None else None
        return StepContext(self.step, total, self.stage, self.stage_step, name, self._first_index, forced)

    def _settle(self) -> None:
        """Take in how long the run really is, and check it, before its first step."""
        if self.total_steps is None or self._settled:
            return
        self._settled = True
        announced = self.announced()
        if announced is not None and 0 < announced < self.total_steps:
            # An image-to-image pipeline that leaves out the first timesteps without telling the scheduler.
            self.begin(announced, self._first_index + self.total_steps - announced)
        for check in self._checks:
            check(self.total_steps)

    def _begins_a_step(self, denoiser: str, name: str) -> bool:
        """Whether a bare module's call belongs to the next step: its branch, or one after it, was called in this."""
        if self._branches is None:
            return False
        called, order = self._calls.get(denoiser, []), self._branches
        if name in called or name not in order:
            return name in called
        return any(other in order and order.index(other) > order.index(name) for other in called)

    def _branch_of(self, denoiser: str) -> str:
        if self._named_branch is not None:
            return self._named_branch
        calls = len(self._calls.get(denoiser, ()))
        if self._branches is None:
            return f"call {calls}"
        return self._branches[calls % len(self._branches)]

    def tick(self) -> None:
        """End a step."""
        self.step += 1
        self.stage_step += 1
        self._calls.clear()

    def next_stage(self, latents: torch.Tensor, layout: TokenLayout) -> None:
        """Enter the next stage; what is kept for a stage is void, or carried where its owner asked for that."""
        before = self.layout
        self.stage += 1
        self.stage_step = 0
        self.layout, self.stage_shape = layout, latents.shape[1:]
        self.stage_children.clear()
        carried = {key: state for key, state in self._states.items() if key in self._carried and before is not None}
        for state in carried.values():
            assert before is not None
            state.lift(before.sources(layout), before.tokens)
        self._states = carried

    def state(self, key: tuple[Any, ...], make: Callable[[], _State], *, carry: bool = False) -> _State:
        """Get the state under `key`, made on first use and dropped at the run's end.

        At the next stage it is dropped too, or with `carry` lifted to the new tokens.
        """
        if key not in self._states:
            self._states[key] = make()
            if carry:
                self._carried.add(key)
        return cast(_State, self._states[key])

    def weigh(self) -> None:
        """Note how much memory the caches hold, each storage counted once."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for state in self._states.values()
            for tensor in state.tensors()
            for storage in (tensor.untyped_storage(),)
        }
        self._cache_bytes = max(self._cache_bytes, sum(storages.values()))

    def meter(self, denoiser: str, make: Callable[[], FlopMeter]) -> FlopMeter:
        """Get the run's counter for a denoiser, taken as the module is at its first forward in the run."""
        if denoiser not in self._meters:
            self._meters[denoiser] = make()
        return self._meters[denoiser]

    def note(self, clock: Clock, make: Callable[[float], StepRecord]) -> None:
        """Add a record whose time is read at the end, so that no step waits for the device."""
        self._pending.append((clock, make))

    def sigma(self, step: int) -> Any:
        """Give the noise level of a step as the scheduler holds it (a 0-d tensor, not read here), or None."""
        index = step + self._first_index
        return self.sigmas[index] if index < len(self.sigmas) else None

    def finish(self, *, completed: bool) -> RunRecord:
        """Close the run: drop all state and give the record."""
        self._states.clear()
        self.stage_children.clear()
        self.admitted.clear()
        steps = tuple(make(clock.seconds()) for clock, make in self._pending)
        self._pending.clear()
        return RunRecord(steps, time.perf_counter() - self._started, completed, self.doubts, self._cache_bytes)
