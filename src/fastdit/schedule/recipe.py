"""Stages as data: their layouts, steps and noise levels, what happens between them, and the plan that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from fastdit.config import Range
from fastdit.errors import InvalidConfig
from fastdit.schedule import matching
from fastdit.schedule.lifts.base import Lift
from fastdit.schedule.lifts.token_copy import TokenCopy
from fastdit.schedule.selectors.base import Seen, Selector
from fastdit.schedule.selectors.edges import Edges
from fastdit.step import SchedulePlan, StagePlan

#: A time between noise (0) and data (1), or a share of tokens.
Between = Annotated[float, Range(above=0, below=1)]
#: Where coarse and mixed stages place their tokens.
Frame = Literal["coarse", "fine", "query"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a schedule of stages does, one value a stage or a switch.

    `layouts` names the stages' layouts, in their order: "coarse", "mixed" (after a coarse one) or "fine". `ends` are
    the times (0 = noise, 1 = data) at which all stages but the last end, `starts` those at which all but the first
    start; left out, they follow from the ends with one factor, `restart`, which the matching solves where it is left
    out too. `shifts` space the steps inside the stages; left out, the matching solves them for a model that was trained
    with `base_shift`. `lift` brings tokens over a switch. A mixed stage refines the share `ratio` of the coarse tokens,
    those that `selector` scores highest. `frame` is that of a layout, or "query". Without `exact`, flaws of RALU's
    published code are repeated. `family` names the models that a preset is for.
    """

    layouts: tuple[str, ...]
    steps: tuple[int, ...]
    ends: tuple[float, ...]
    ratio: float | None = None
    starts: tuple[float, ...] | None = None
    lift: Lift = dataclasses.field(default_factory=TokenCopy)
    shifts: tuple[float, ...] | None = None
    restart: float | None = None
    base_shift: float = 3.0
    selector: Selector = dataclasses.field(default_factory=Edges)
    frame: Frame = "coarse"
    exact: bool = True
    family: str | None = dataclasses.field(default=None, compare=False)

    def check(self, name: str) -> None:
        """Raise `InvalidConfig` where the values of the schedule `name` contradict each other."""
        steps, ends, starts, shifts, stages = self.steps, self.ends, self.starts, self.shifts, len(self.layouts)
        if len(steps) != stages:
            raise InvalidConfig(f"{name} needs {stages} step counts, got steps={steps!r}")
        check_rising(f"{name}'s ends", ends, stages - 1)
        if (self.ratio is None) == ("mixed" in self.layouts):
            raise InvalidConfig(
                "a mixed stage, and no other, refines a share of the tokens: give `ratio` with one, got "
                f"ratio={self.ratio!r}"
            )
        if self.lift.whole_frames and "mixed" in self.layouts:
            raise InvalidConfig(f"{self.lift!r} takes whole frames, and {name} has a mixed stage; take another lift")
        if starts is not None:
            if self.restart is not None:
                raise InvalidConfig("starts and restart both say where stages start; give one of them")
            if len(starts) != len(ends):
                raise InvalidConfig(f"{len(ends)} switches need as many start times, got {starts!r}")
            self.lift.check(ends, starts)
        if shifts is not None and (starts is None or len(shifts) != stages):
            raise InvalidConfig(
                f"shifts say how {stages} stages with known starts are spaced; give starts and as many shifts, got "
                f"shifts={shifts!r} and starts={starts!r}"
            )

    def refined(self, rows: int, columns: int) -> int:
        """How many coarse tokens of a `rows` x `columns` fine grid are split in a mixed stage."""
        return int((self.ratio or 0.0) * (rows * columns // 4))

    def plan(self, name: str, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Lay out the stages of the schedule `name`.

        Raises `InvalidConfig` for sizes that don't halve, and for fewer steps than stages, or than the selector needs.
        """
        if rows % 2 or columns % 2:
            raise InvalidConfig(
                f"{name} halves the token grid, and {rows} x {columns} tokens can't be halved; choose a size whose "
                f"grid is even, {rows + rows % 2} x {columns + columns % 2} or {rows - rows % 2} x "
                f"{columns - columns % 2} tokens"
            )
        steps, shared = shared_steps(name, self.steps, num_inference_steps)
        notes = [f"{note}{'' if self.shifts else ' and the matching was solved anew'}" for note in shared]
        if self.selector.sees is Seen.VELOCITIES and steps[0] < 2:
            raise InvalidConfig(
                f"{self.selector!r} compares the steps of the coarse stage, which has one here; give it two or more"
            )
        shifts, starts, how = self._spaced(steps)
        notes.append(f"shifts {', '.join(f'{shift:.3f}' for shift in shifts)}; {how}")
        coarse, refined = rows * columns // 4, self.refined(rows, columns)
        if "mixed" in self.layouts and not refined:
            stage = self.layouts.index("mixed") + 1
            notes.append(
                f"a share of {self.ratio} of {coarse} coarse tokens is less than one, so stage {stage} refines nothing"
            )
        tokens = {"coarse": coarse, "mixed": coarse + 3 * refined, "fine": rows * columns}
        spans = zip(self.layouts, steps, [0.0, *starts], [*self.ends, 1.0], shifts, strict=True)
        stages = tuple(
            StagePlan(index, layout, tokens[layout], count, matching.stage_sigmas(start, stop, shift, count))
            for index, (layout, count, start, stop, shift) in enumerate(spans)
        )
        return SchedulePlan(stages, rows, columns, tuple(notes))

    def _spaced(self, steps: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[float, ...], str]:
        """Give the shifts and the starts for these step counts, and say where they come from."""
        if self.shifts is not None and self.starts is not None:
            return self.shifts, self.starts, "as given"
        solved = matching.solve(steps, self.ends, self.base_shift, self.restart, self.starts)
        restarted = "" if solved.restart is None else f"restart Z {solved.restart:.3f}; "
        return solved.shifts, solved.starts, f"{restarted}matching distance {solved.distance:.4f}"


def shared_steps(
    name: str, steps: tuple[int, ...], num_inference_steps: int | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Give the step counts that the schedule `name` makes of its own for a call, and a note where they are others.

    Raises `InvalidConfig` for fewer steps than stages.
    """
    if num_inference_steps is None or num_inference_steps == sum(steps):
        return steps, ()
    if num_inference_steps < len(steps):
        raise InvalidConfig(
            f"{name} has {len(steps)} stages and can't run {num_inference_steps} steps; ask for at least "
            f"{len(steps)}, or leave num_inference_steps out for its own {sum(steps)}"
        )
    shared = proportional(steps, num_inference_steps)
    own, asked = ("/".join(map(str, counts)) for counts in (steps, shared))
    return shared, (f"{num_inference_steps} steps were asked for: {own} became {asked}",)


def proportional(steps: Sequence[int], total: int) -> tuple[int, ...]:
    """Share `total` steps out in proportion to `steps`, at least one each, by largest remainder."""
    exact = [total * count / sum(steps) for count in steps]
    shares = [max(1, int(value)) for value in exact]
    while sum(shares) < total:
        index = max(range(len(shares)), key=lambda i: exact[i] - shares[i])
        shares[index] += 1
    while sum(shares) > total:
        index = min((i for i in range(len(shares)) if shares[i] > 1), key=lambda i: exact[i] - shares[i])
        shares[index] -= 1
    return tuple(shares)


def check_rising(what: str, values: Sequence[float], count: int) -> None:
    """Raise `InvalidConfig` where these are not so many values that rise."""
    if len(values) != count or any(early >= late for early, late in pairwise(values)):
        raise InvalidConfig(f"{what} are {count} value{'s that rise' if count > 1 else ''}, got {values!r}")
