"""A run through stages of different token layouts, and what schedules of such stages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch

from fastdit.blocks.attention import SeenAttention
from fastdit.config import is_number
from fastdit.errors import InvalidConfig
from fastdit.layout import CoarseLayout, FineLayout, MixedLayout, TokenLayout
from fastdit.models.family import Family
from fastdit.models.roles import text_comes_first
from fastdit.schedule import matching
from fastdit.schedule.base import ScheduleRun
from fastdit.schedule.lifts.base import Lift, Switch, pooled
from fastdit.schedule.query_frame import QueryFrame
from fastdit.schedule.selectors import edges
from fastdit.schedule.selectors.base import Scene, Seen, Selector
from fastdit.schedule.selectors.edges import Edges
from fastdit.schedule.selectors.text_attention import SeenExchange, mean_exchange
from fastdit.step import SchedulePlan, StagePlan

if TYPE_CHECKING:
    from fastdit.step import StepContext


class StagedRun(ScheduleRun):
    """One run: the layout that it stands in, the noise that it began with, and its switches.

    The plan's stages are "coarse", "mixed" (after a coarse one) or "fine"; `ends` are the times at which all but the
    last end, `refined` counts the coarse tokens that a mixed stage splits, `selector` chooses them. `frame` is
    that of a layout, or "query".
    """

    def __init__(
        self,
        plan: SchedulePlan,
        family: Family,
        pipeline: Any,
        generator: Any,
        *,
        lift: Lift,
        ends: Sequence[float],
        refined: int = 0,
        selector: Selector | None = None,
        frame: str = "coarse",
        exact: bool = True,
    ) -> None:
        self._plan = plan
        self._lift, self._ends, self._refined = lift, tuple(ends), refined
        self._selector = selector or Edges()
        self._velocities: list[torch.Tensor] = []
        self._exchanges: list[SeenExchange] = []
        self._by_query = frame == "query"
        self._turn: tuple[torch.Tensor, torch.Tensor] | None = None
        self._family = family
        self._pipeline = pipeline
        self._generator = generator
        self._exact = exact
        self._rows, self._columns = plan.rows, plan.columns
        self._coarse = CoarseLayout(plan.rows, plan.columns, "coarse" if self._by_query else frame)
        self._fine = FineLayout(plan.rows, plan.columns)
        self._layout: TokenLayout = self._fine
        self._field: torch.Tensor | None = None
        self._begun: torch.Tensor | None = None

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        self._field = self._family.tokens(latents)
        if self._plan.stages[0].layout == "fine":
            return latents, self._fine
        self._layout = self._coarse
        # The sum of four unit normals over two is a unit normal, so seeds and `latents=` keep their meaning.
        noise = pooled(self._family, self._field, self._rows, self._columns).to(latents.dtype)
        return self._family.latents(noise, self._layout), self._layout

    def resume(
        self, stage: int, latents: torch.Tensor, clean: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, TokenLayout]:
        tokens = self._family.tokens(latents)
        frames = self._family.unpack(tokens, self._rows, self._columns).float()
        batches = len(tokens) // len(clean)
        self._field = self._family.pack((frames - (1.0 - sigma) * clean.float().repeat(batches, 1, 1, 1)) / sigma)
        if self._plan.stages[stage].layout == "fine":
            self._layout = self._fine
            return latents, self._fine
        own = torch.nn.functional.avg_pool2d(clean.float(), 2)
        picture = (1.0 - sigma) * own.repeat(batches, 1, 1, 1)
        # The picture is averaged as pictures are, and its noise so that it stays a unit normal.
        averaged = picture + 2.0 * (torch.nn.functional.avg_pool2d(frames, 2) - picture)
        coarse = self._family.pack(averaged.to(latents.dtype))
        self._layout = self._coarse
        if self._plan.stages[stage].layout == "mixed":
            if self._begun is None:
                self._begun = self._select(self._family.pack(own).to(latents.dtype))
            self._layout = self._coarse.refined_at(self._begun)
            coarse = self._layout.of_grids(coarse, tokens)
        return self._family.latents(coarse, self._layout), self._layout

    def forced(self, stage: int, stage_step: int) -> str | None:
        return "its attention chooses the tokens to refine" if self._shows_attention(stage, stage_step) else None

    def attending(self, context: StepContext, transformer: Any, arguments: Mapping[str, Any]) -> SeenAttention | None:
        layout = self._layout
        if self._shows_attention(context.stage, context.stage_step):
            appended, first = self._family.appended(arguments, layout), text_comes_first(transformer)
            self._exchanges.append(SeenExchange(layout.tokens, appended, text_first=bool(first)))
            return self._exchanges[-1]
        fine = layout.tokens - layout.spread
        if not self._by_query or not isinstance(layout, MixedLayout) or not fine:
            return None
        if self._turn is None:
            self._turn = self._family.turn(transformer, layout, layout.device)
        return SeenAttention(QueryFrame(layout.spread, fine, self._family.appended(arguments, layout), self._turn))

    def _shows_attention(self, stage: int, stage_step: int) -> bool:
        """Whether a step is the last coarse one, with a selector that looks at its attention."""
        plan = self._plan.stages[stage]
        last = plan.layout == "coarse" and stage_step + 1 == plan.steps
        return last and self._selector.sees is Seen.TEXT_ATTENTION

    def observe(self, velocity: torch.Tensor) -> None:
        if self._selector.sees is Seen.VELOCITIES and self._layout is self._coarse:
            self._velocities.append(self._family.tokens(velocity))

    def transition(self, stage: int, latents: torch.Tensor, denoised: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        assert self._field is not None
        before, following = self._layout, self._plan.stages[stage + 1]
        tokens, clean = self._family.tokens(latents), self._family.tokens(denoised)
        after: TokenLayout = self._fine if following.layout == "fine" else self._coarse
        if following.layout == "mixed":
            after = self._coarse.refined_at(self._select(clean))
        switch = Switch(
            self._family,
            self._pipeline,
            before,
            after,
            tokens,
            clean,
            self._field,
            self._ends[stage],
            1.0 - cast(tuple[float, ...], following.sigmas)[0],
            self._noise,
            self._exact,
        )
        lifted = self._lift(switch)
        self._layout = after
        return self._family.latents(lifted.to(latents.dtype), after), after

    def lift(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = self._layout.to_raster(self._layout.complete(self._family.tokens(latents)))
        return self._family.latents(tokens, self._fine)

    def _select(self, denoised: torch.Tensor) -> torch.Tensor:
        rows, columns = self._rows // 2, self._columns // 2
        exchange = mean_exchange(self._exchanges, len(denoised))
        scene = Scene(
            self._family,
            self._pipeline,
            rows,
            columns,
            denoised,
            tuple(self._velocities),
            exchange,
            exact=self._exact,
        )
        scores = self._selector.scores(scene)
        self._velocities.clear()
        self._exchanges.clear()
        if not self._exact:
            # In float32 so little noise would vanish beside the scores, and break no tie.
            scores = scores.double() + 1e-6 * self._noise(scores.shape, torch.device("cpu"))
        return edges.top_tokens(scores, self._refined).to(denoised.device)

    def _noise(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        noise: torch.Tensor = randn_tensor(tuple(shape), generator=self._generator, device=device, dtype=torch.float32)
        return noise


def staged_plan(
    name: str,
    layouts: Sequence[str],
    rows: int,
    columns: int,
    num_inference_steps: int | None,
    *,
    steps: tuple[int, ...],
    ends: tuple[float, ...],
    starts: tuple[float, ...] | None,
    base_shift: float,
    restart: float | None = None,
    shifts: tuple[float, ...] | None = None,
    refined: int = 0,
    notes: tuple[str, ...] = (),
) -> SchedulePlan:
    """Lay out stages of these layouts for the schedule `name`; without `shifts`, NT-matching gives them.

    `steps`, `ends` and `starts` are its recipe, `refined` counts the tokens that a mixed stage splits. `shifts` need
    `starts`. Raises `InvalidConfig` for sizes that don't halve and for fewer steps than stages.
    """
    if rows % 2 or columns % 2:
        raise InvalidConfig(
            f"{name} halves the token grid, and {rows} x {columns} tokens can't be halved; choose a size whose "
            f"grid is even, {rows + rows % 2} x {columns + columns % 2} or {rows - rows % 2} x "
            f"{columns - columns % 2} tokens"
        )
    steps, shared = shared_steps(name, steps, num_inference_steps)
    made = [f"{note}{'' if shifts else ' and the matching was solved anew'}" for note in shared]
    if shifts is None:
        solved = matching.solve(steps, ends, base_shift, restart, starts)
        shifts, starts = solved.shifts, solved.starts
        restarted = "" if solved.restart is None else f"restart Z {solved.restart:.3f}; "
        how = f"{restarted}matching distance {solved.distance:.4f}"
    else:
        how = "as given"
    made.append(f"shifts {', '.join(f'{shift:.3f}' for shift in shifts)}; {how}")
    assert starts is not None
    coarse = rows * columns // 4
    tokens = {"coarse": coarse, "mixed": coarse + 3 * refined, "fine": rows * columns}
    spans = zip(layouts, steps, [0.0, *starts], [*ends, 1.0], shifts, strict=True)
    stages = tuple(
        StagePlan(index, layout, tokens[layout], count, matching.stage_sigmas(start, stop, shift, count))
        for index, (layout, count, start, stop, shift) in enumerate(spans)
    )
    return SchedulePlan(stages, rows, columns, (*made, *notes))


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


def is_time(value: Any) -> bool:
    """Whether a value is a time between noise and data."""
    return is_number(value) and 0.0 < value < 1.0


def rising(times: Any, count: int) -> bool:
    """Whether these are so many rising times between noise and data."""
    return (
        isinstance(times, tuple)
        and len(times) == count
        and all(map(is_time, times))
        and all(early < late for early, late in pairwise(times))
    )
