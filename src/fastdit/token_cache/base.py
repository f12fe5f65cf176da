"""The token-cache level: which image tokens are recomputed inside the blocks of a step that runs.

    computed   every child of every block runs on every token; the outputs of the children are kept
    partial    attention is not run (its kept output stands in); the feed-forward runs on the chosen tokens only and
               their rows replace those of its kept output
    reused     blocks are not run: output = input + the residual that the block had when it last ran

A block runs as its class's own forward on a structural twin whose children are stood in for; which child plays which
part is data (`fastdit.models.roles`). State is per run, transformer, branch and stage, and void when shapes change.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from fastdit.accelerator import (
    Accelerator,
    Break,
    Change,
    Effects,
    Level,
    Need,
)
from fastdit.blocks.chain import Pass
from fastdit.config import Count, Whole
from fastdit.errors import UnsupportedModel
from fastdit.models.roles import token_roles
from fastdit.run import Run, StageChange
from fastdit.step import StepContext
from fastdit.token_cache.attention_scores import AttentionScore
from fastdit.token_cache.choice import COMPUTED, PARTIAL, REUSED, Choice, undescribed
from fastdit.token_cache.memory import TokenState
from fastdit.token_cache.token_pass import TokenPass

__all__ = ["COMPUTED", "PARTIAL", "REUSED", "Choice", "TokenCache"]


@dataclasses.dataclass(frozen=True)
class TokenCache(Accelerator):
    """Base of the token caches: every `interval`-th step is full, and so are the first `first` of the run.

    The first step of a stage is full too, unless `stage_change` is "carry": then all that is kept is copied to the new
    tokens where a schedule changes them. A subclass chooses the tokens of the steps between, and may leave the blocks
    out altogether in some of them.
    """

    interval: Count = 4
    _: dataclasses.KW_ONLY
    first: Whole = 3
    seed: Whole = 0
    stage_change: StageChange = "reset"

    level: ClassVar = Level.TOKEN_CACHE
    changes: ClassVar = frozenset({Change.BLOCK_PARTS})
    needs: ClassVar = frozenset({Need.BLOCK_LISTS, Need.FIXED_ROWS, Need.WHOLE_FRAME})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS})

    #: Whether some steps leave the blocks out, so that their residuals must be kept.
    reuses_blocks: ClassVar[bool] = False

    @property
    def neutral(self) -> bool:
        return self.interval == 1

    @property
    def effects(self) -> Effects:
        declared = super().effects
        return declared.adding(needs={Need.CARRIED_TOKENS}) if self.stage_change == "carry" else declared

    def enter(self, run: Run, lasting: None) -> Pass | None:
        return None if self.neutral else TokenPass(self, run)

    @property
    def watches(self) -> AttentionScore | None:
        """Which score of the attention is taken at full steps, if any."""
        return None

    @property
    def wants_grid(self) -> bool:
        """Whether the choice of tokens looks at where they lie."""
        return False

    def interval_at(self, context: StepContext) -> int:
        """How many steps lie between a full step and the next, as seen from one step."""
        return self.interval

    def phase(self, context: StepContext, since: int) -> str:
        """Say what a block does that was last run in full `since` steps ago (at least one)."""
        return COMPUTED if since >= self.interval_at(context) else PARTIAL

    def choose(self, choice: Choice) -> torch.Tensor | None:
        """Choose the tokens of one block: raster indices [B, K]; None where the block had better run in full."""
        raise NotImplementedError

    def merge(self, kept: torch.Tensor, fresh: torch.Tensor, index: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Put fresh rows [B, K, C] of image tokens into a copy of the kept ones [B, N, C]."""
        return kept.scatter(1, index[..., None].expand_as(fresh), fresh)

    def learn(self, state: TokenState, image: torch.Tensor) -> None:
        """Take in the image tokens [B, N, C] as they leave the blocks of a full step."""

    def check(self, pipeline: Any, transformer: Any) -> None:
        for name, child in transformer.named_children():
            if isinstance(child, nn.ModuleList):
                for block in child:
                    if token_roles(block) is None:
                        where = f"{type(transformer).__name__}.{name}"
                        raise UnsupportedModel(undescribed(self.describe(), where, block))
