"""What a token cache decides of a block: whether it runs in full, in part or not at all, and on which tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastdit.step import StepContext
from fastdit.token_cache.memory import BlockMemory, TokenState

COMPUTED, PARTIAL, REUSED = "computed", "partial", "reused"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where a token cache stands when it chooses the tokens of one block. `grid` is None where tokens form none."""

    state: TokenState
    memory: BlockMemory
    context: StepContext
    device: torch.device
    grid: tuple[int, int] | None


def undescribed(cache: str, where: str, block: nn.Module) -> str:
    """Say that a block has no `TokenRoles`, and what to do."""
    return (
        f"{cache} recomputes tokens inside blocks, and fastdit has no description of {type(block).__name__} "
        f"({where}); say which of its children are attention and feed-forward in a TokenRoles entry of "
        "fastdit.models.roles.TOKEN_ROLES, or use an accelerator that treats blocks as a whole"
    )
