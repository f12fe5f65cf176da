"""Schedules that follow a recipe of coarse, mixed and fine stages, and the state of one run through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from torch.nn import functional

from fastdit.blocks.attention import AttentionSight, SeenAttention
from fastdit.blocks.chain import ForwardCall, Pass
from fastdit.layout import CoarseLayout, FineLayout, MixedLayout, TokenLayout
from fastdit.models.autoencoders import Coding
from fastdit.models.family import Family, Pipeline
from fastdit.models.roles import text_comes_first
from fastdit.schedule.base import Schedule, ScheduleRun
from fastdit.schedule.lifts.base import Switch, pooled
from fastdit.schedule.query_frame import QueryFrame
from fastdit.schedule.recipe import Recipe
from fastdit.schedule.selectors.base import Scene, Seen
from fastdit.schedule.selectors.edges import top_tokens
from fastdit.schedule.selectors.text_attention import SeenExchange, mean_exchange
from fastdit.step import SchedulePlan, StagePlan

Generators = torch.Generator | list[torch.Generator] | None


@dataclasses.dataclass(frozen=True)
class StagedSchedule(Schedule):
    """Base of the schedules that follow a recipe."""

    @property
    def recipe(self) -> Recipe:
        """The recipe in force."""
        raise NotImplementedError

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Lay out the stages. Raises `InvalidConfig` for sizes that don't halve and for too few steps."""
        return self.recipe.plan(type(self).__name__, rows, columns, num_inference_steps)

    def codings(self, before: StagePlan, after: StagePlan, cells: int) -> Sequence[tuple[Coding, int]]:
        """Name what the lift asks for, of the frame before and the one after, and the selector of the coarse one."""
        coarse = cells // 4
        decoded, encoded = (cells, coarse) if after.layout == "coarse" else (coarse, cells)
        sizes = {Coding.DECODE: decoded, Coding.ENCODE: encoded}
        lifted = [(coding, sizes[coding]) for coding in self.recipe.lift.codes]
        chosen = self.recipe.selector.codes if after.layout == "mixed" else ()
        return [*lifted, *((coding, coarse) for coding in chosen)]

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Pipeline, generator: Generators) -> ScheduleRun:
        """Make the state of one run."""
        return StagedRun(self.recipe, plan, family, pipeline, generator)


class StagedRun(ScheduleRun):
    """One run: the layout that it stands in, the noise that it began with, and its switches."""

    def __init__(
        self,
        recipe: Recipe,
        plan: SchedulePlan,
        family: Family,
        pipeline: Pipeline,
        generator: Generators,
    ) -> None:
        self._recipe, self._plan, self._family = recipe, plan, family
        self._pipeline, self._generator = pipeline, generator
        self._by_query = recipe.frame == "query"
        self._coarse = CoarseLayout(plan.rows, plan.columns, "coarse" if self._by_query else recipe.frame)
        self._fine = FineLayout(plan.rows, plan.columns)
        self._layout: TokenLayout = self._fine
        self._field: torch.Tensor | None = None
        self._begun: torch.Tensor | None = None
        self._velocities: list[torch.Tensor] = []
        self._exchanges: list[SeenExchange] = []
        self._turn: tuple[torch.Tensor, torch.Tensor] | None = None

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        self._field = self._family.tokens(latents)
        if self._plan.stages[0].layout == "fine":
            return latents, self._fine
        self._layout = self._coarse
        # The sum of four unit normals over two is a unit normal, so seeds and `latents=` keep their meaning.
        noise = pooled(self._family, self._field, self._plan.rows, self._plan.columns).to(latents.dtype)
        return self._family.latents(noise, self._layout), self._layout

    def resume(
        self, stage: int, latents: torch.Tensor, clean: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, TokenLayout]:
        tokens = self._family.tokens(latents)
        frames = self._family.unpack(tokens, self._plan.rows, self._plan.columns).float()
        batches = len(tokens) // len(clean)
        self._field = self._family.pack((frames - (1.0 - sigma) * clean.float().repeat(batches, 1, 1, 1)) / sigma)
        if self._plan.stages[stage].layout == "fine":
            self._layout = self._fine
            return latents, self._fine
        own = functional.avg_pool2d(clean.float(), 2)
        picture = (1.0 - sigma) * own.repeat(batches, 1, 1, 1)
        # The picture is averaged as pictures are, and its noise so that it stays a unit normal.
        averaged = picture + 2.0 * (functional.avg_pool2d(frames, 2) - picture)
        self._layout = self._coarse
        if self._plan.stages[stage].layout == "mixed":
            if self._begun is None:
                self._begun = self._select(self._family.pack(own).to(latents.dtype))
            self._layout = self._coarse.refined_at(self._begun)
        begun = self._layout.of_grids(self._family.pack(averaged.to(latents.dtype)), tokens)
        return self._family.latents(begun, self._layout), self._layout

    def forced(self, stage: int, stage_step: int) -> str | None:
        return "its attention chooses the tokens to refine" if self._shows_attention(stage, stage_step) else None

    def passes(self) -> Sequence[Pass]:
        return [_Sight(self)] if self._by_query or self._recipe.selector.sees is Seen.TEXT_ATTENTION else []

    def sight(self, call: ForwardCall) -> SeenAttention | None:
        """Give what sees the attention of one forward, whose arguments have the stage's latents in place."""
        layout, transformer, arguments = self._layout, call.module, call.arguments
        if self._shows_attention(call.step.stage, call.step.stage_step):
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
        return last and self._recipe.selector.sees is Seen.TEXT_ATTENTION

    def observe(self, velocity: torch.Tensor) -> None:
        if self._recipe.selector.sees is Seen.VELOCITIES and self._layout is self._coarse:
            self._velocities.append(self._family.tokens(velocity))

    def transition(self, stage: int, latents: torch.Tensor, denoised: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        assert self._field is not None
        following = self._plan.stages[stage + 1]
        tokens, clean = self._family.tokens(latents), self._family.tokens(denoised)
        after: TokenLayout = self._fine if following.layout == "fine" else self._coarse
        if following.layout == "mixed":
            after = self._coarse.refined_at(self._select(clean))
        switch = Switch(
            self._family,
            self._pipeline,
            self._layout,
            after,
            tokens,
            clean,
            self._field,
            self._recipe.ends[stage],
            1.0 - cast(tuple[float, ...], following.sigmas)[0],
            self._noise,
            self._recipe.exact,
        )
        lifted = self._recipe.lift(switch)
        self._layout = after
        return self._family.latents(lifted.to(latents.dtype), after), after

    def lift(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = self._layout.to_raster(self._layout.complete(self._family.tokens(latents)))
        return self._family.latents(tokens, self._fine)

    def _select(self, denoised: torch.Tensor) -> torch.Tensor:
        """Choose the coarse tokens to refine [B, R] by the clean estimate and what else the selector saw."""
        rows, columns = self._coarse.grid
        exchange = mean_exchange(self._exchanges, len(denoised))
        seen = tuple(self._velocities), exchange, self._recipe.exact
        scores = self._recipe.selector.scores(Scene(self._family, self._pipeline, rows, columns, denoised, *seen))
        self._velocities.clear()
        self._exchanges.clear()
        if not self._recipe.exact:
            # In float32 so little noise would vanish beside the scores, and break no tie.
            scores = scores.double() + 1e-6 * self._noise(scores.shape, denoised.device).to(scores.device)
        return top_tokens(scores, self._recipe.refined(self._plan.rows, self._plan.columns)).to(denoised.device)

    def _noise(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        noise: torch.Tensor = randn_tensor(tuple(shape), generator=self._generator, device=device, dtype=torch.float32)
        return noise


class _Sight(AttentionSight):
    """Shows a run the attention of the forwards that it wants to see."""

    def __init__(self, staged: StagedRun) -> None:
        super().__init__()
        self._staged = staged

    def sight(self, call: ForwardCall) -> SeenAttention | None:
        return self._staged.sight(call)
