"""Choosing tokens by a score: what ToCa and DuCa share.

    score  = base + age_weight * (steps since the token was recomputed) / interval
    score += spatial_bonus * score   for the best token of each cell x cell patch of the token grid
    K      = round(N * clamp(ratio * f(layer_slope, l / L) * f(step_slope, t / T), 0, 1)),   f(w, x) = 1 + w - 2 w x

The K best tokens of each image are recomputed; among equals the first in raster order. Every image of a batch has its
own, all images have K.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from fastdit.accelerator import Effects, Need
from fastdit.config import is_count, is_number
from fastdit.errors import InvalidConfig
from fastdit.step import StepContext
from fastdit.token_cache.attention_scores import AttentionScore
from fastdit.token_cache.base import Choice, TokenCache

#: Scores that are not taken of the attention: uniform noise, and nothing (the age alone decides).
_FREE_SCORES = ("random", "age")
SCORES: tuple[str, ...] = (*(score.value for score in AttentionScore), *_FREE_SCORES)


def slope(weight: float, progress: float) -> float:
    """Fall linearly from 1 + weight at the start to 1 - weight at the end."""
    return 1.0 + weight - 2.0 * weight * progress


@dataclasses.dataclass(frozen=True)
class ScoredTokens(TokenCache):
    """Base of the token caches that recompute the `ratio` of tokens with the highest score.

    `score` is one of output_norm, value_norm, attention, text (see `fastdit.token_cache.attention_scores`), random and
    age. `guidance_halves` says that the batch holds both branches of guidance, one half each, whose images then choose
    the same tokens by the mean of their scores.
    """

    ratio: float = 0.1
    score: str = "output_norm"
    _: dataclasses.KW_ONLY
    age_weight: float = 0.25
    spatial_bonus: float = 0.0
    cell: int = 2
    layer_slope: float = 0.0
    step_slope: float = 0.0
    interval_slope: float = 0.0
    guidance_halves: bool = False

    scores: ClassVar[tuple[str, ...]] = SCORES

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not is_number(self.ratio) or not 0.0 <= self.ratio <= 1.0:
            raise InvalidConfig(f"{name}'s ratio is the share of tokens to recompute, 0 to 1, got {self.ratio!r}")
        if self.score not in self.scores:
            raise InvalidConfig(f"{name} knows the scores {', '.join(self.scores)}, got {self.score!r}")
        for field in ("age_weight", "spatial_bonus"):
            if not is_number(getattr(self, field)) or getattr(self, field) < 0.0:
                raise InvalidConfig(f"{name}'s {field} is a number of at least 0, got {getattr(self, field)!r}")
        for field in ("layer_slope", "step_slope", "interval_slope"):
            if not is_number(getattr(self, field)):
                raise InvalidConfig(f"{name}'s {field} is a finite number, got {getattr(self, field)!r}")
        if not abs(self.interval_slope) < 1.0:
            raise InvalidConfig(f"{name}'s interval_slope lies between -1 and 1, got {self.interval_slope!r}")
        if not is_count(self.cell, 1):
            raise InvalidConfig(f"{name}'s cell is the side of a patch in tokens, at least 1, got {self.cell!r}")
        if not isinstance(self.guidance_halves, bool):
            raise InvalidConfig(f"{name}'s guidance_halves is True or False, got {self.guidance_halves!r}")

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
        return None if self.score in _FREE_SCORES else AttentionScore(self.score)

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
            base = torch.zeros(1, tokens, device=choice.device)
        elif memory.score is None:
            return None
        else:
            base = memory.score
        scores = base + self.age_weight * (context.step - memory.refreshed) / self.interval
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
    frame = scores.view(-1, 1, rows, columns)
    best = nn.functional.max_pool2d(frame, cell, cell, ceil_mode=True)
    best = best.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, :rows, :columns]
    return torch.where(frame == best, frame * (1.0 + bonus), frame).view_as(scores)
