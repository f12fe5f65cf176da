"""Choosing tokens by a score: what ToCa and DuCa share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

import torch
from torch import nn

from fastdit.accelerator import Effects, Need
from fastdit.config import AtLeastZero, Count, Range, Share
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext
from fastdit.token_cache.attention_scores import AttentionScore
from fastdit.token_cache.base import Choice, TokenCache

#: The scores: those taken of the attention, and two that are not: uniform noise, and nothing (the age alone decides).
Score = Literal["output_norm", "value_norm", "attention", "text", "random", "age"]
SCORES: tuple[str, ...] = get_args(Score)


def slope(weight: float, progress: float) -> float:
    """Fall linearly from 1 + weight at the start to 1 - weight at the end.

    >>> slope(0.5, 0.0), slope(0.5, 0.5), slope(0.5, 1.0)
    (1.5, 1.0, 0.5)
    """
    return 1.0 + weight - 2.0 * weight * progress


@dataclasses.dataclass(frozen=True)
class ScoredTokens(TokenCache):
    """Base of the token caches that recompute the tokens with the highest score.

        score  = base + age_weight * (steps since the token was recomputed) / interval
        score += spatial_bonus * score   for the best token of each cell x cell patch of the token grid
        K      = round(N * clamp(ratio * f(layer_slope, l / L) * f(step_slope, t / T), 0, 1))
        N_t    = round(interval / f(interval_slope, t / T)), at least 1;   f(w, x) = 1 + w - 2 w x

    The K best of each image's N tokens are recomputed; among equals the first in raster order. Every image of a batch
    has its own, all images have K. l of L is the block, t of T the step; N_t steps lie from one full step to the next.

    Args:
        interval: steps from one full step to the next, from 1 (all are full).
        ratio: the share of tokens that is recomputed, 0 to 1 (all of them).
        score: the base score: output_norm, value_norm, attention or text (`fastdit.token_cache.attention_scores` has
            the formulas), random (uniform in 0 to 1) or age (0).
        first: how many steps at the start of the run are full, from 0.
        age_weight: the weight of the time since a token was recomputed, at least 0.
        spatial_bonus: what the best token of a patch gains, as a share of its score, at least 0; it spreads the choice
            over the picture, in stages whose tokens form a plain grid. A stage of mixed resolution goes without it and
            says so.
        cell: the side of a patch in tokens, from 1.
        layer_slope: how much more (above 0) the first blocks recompute than the last.
        step_slope: how much more the first steps recompute than the last.
        interval_slope: how much shorter the interval is at the start than at the end, between -1 and 1.
        guidance_halves: whether the batch holds both branches of guidance, one half each, whose images then choose the
            same tokens by the mean of their scores.
        seed: of the random score, from 0.
        stage_change: "reset" makes the first step of a stage full, "carry" copies what is kept to the new tokens.
    """

    ratio: Share = 0.1
    score: Score = "output_norm"
    _: dataclasses.KW_ONLY
    age_weight: AtLeastZero = 0.25
    spatial_bonus: AtLeastZero = 0.0
    cell: Count = 2
    layer_slope: float = 0.0
    step_slope: float = 0.0
    interval_slope: Annotated[float, Range(above=-1, below=1)] = 0.0
    guidance_halves: bool = False

    @property
    def effects(self) -> Effects:
        declared, watched = super().effects, self.watches
        if watched in (None, AttentionScore.OUTPUT_NORM):
            return declared
        of_a_map = watched is not AttentionScore.VALUE_NORM
        return declared.adding(needs={Need.PLAIN_ATTENTION, *([Need.ONE_FRAME] if of_a_map else [])})

    @property
    def neutral(self) -> bool:
        return super().neutral or self.ratio == 1.0

    @property
    def watches(self) -> AttentionScore | None:
        return None if self.score in ("random", "age") else AttentionScore(self.score)

    @property
    def wants_grid(self) -> bool:
        return self.spatial_bonus > 0.0

    def interval_at(self, context: StepContext) -> int:
        """N_t = round(N / f(interval_slope, t / T)), at least 1."""
        return max(1, round(self.interval / slope(self.interval_slope, context.step / context.total_steps)))

    def count(self, tokens: int, layer: int, layers: int, context: StepContext) -> int:
        """How many of an image's tokens a block recomputes at a partial step."""
        share = self.ratio * slope(self.layer_slope, layer / layers)
        share *= slope(self.step_slope, context.step / context.total_steps)
        return round(tokens * min(max(share, 0.0), 1.0))

    def choose(self, choice: Choice) -> torch.Tensor | None:
        memory, context = choice.memory, choice.context
        batch, tokens = memory.shape
        if memory.refreshed is None:
            return None
        if self.score == "random":
            base = choice.state.uniform(tokens, self.seed, choice.device)
        elif self.score == "age":
            base = torch.zeros(1, tokens, dtype=torch.float32, device=choice.device)
        elif memory.score is None:
            return None
        else:
            base = memory.score
        scores = base + self.age_weight * (context.step - memory.refreshed).float() / self.interval
        if self.guidance_halves:
            if batch % 2:
                raise InvalidConfig(
                    f"{self.describe()}: guidance_halves needs a batch of two halves and got {batch} images; set it "
                    "only where the pipeline puts both branches of guidance into one batch"
                )
            scores = scores.unflatten(0, (2, batch // 2)).mean(0).repeat(2, 1)
        if choice.grid is not None:
            scores = with_spatial_bonus(scores, choice.grid, self.cell, self.spatial_bonus)
        count = self.count(tokens, memory.place, len(choice.state.blocks), context)
        return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def with_spatial_bonus(scores: torch.Tensor, grid: tuple[int, int], cell: int, bonus: float) -> torch.Tensor:
    """Raise the highest score of each cell x cell patch of the grid by `bonus` times itself; scores are [B, N]."""
    rows, columns = grid
    patches = scores.view(-1, 1, rows, columns)
    best = nn.functional.max_pool2d(patches, cell, cell, ceil_mode=True)
    best = best.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, :rows, :columns]
    return torch.where(patches == best, patches * (1.0 + bonus), patches).view_as(scores)
