"""What a gate sees and says: where it looks, what it remembers, its verdict."""

from __future__ import annotations

import dataclasses

import torch

from fastdit.layout import TokenLayout
from fastdit.nested import Args, Kwargs
from fastdit.step import StepContext
from fastdit.step_cache.watching import WatchedBlock


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a gate looks, at the place where the skipped part would begin.

    `entered` is the latents' stream as it came to the blocks, `hidden_states` what the leading blocks made of it (the
    same tensor where there are none); `block` shows the parts of the next block, which is called with `args` and
    `kwargs`, and is None where whole forwards are skipped. `sigma` is the noise level where the run knows it, `layout`
    the token layout.
    """

    entered: torch.Tensor
    hidden_states: torch.Tensor
    block: WatchedBlock | None
    args: Args
    kwargs: Kwargs
    context: StepContext
    layout: TokenLayout | None = None
    sigma: float | None = None


@dataclasses.dataclass
class Memory:
    """What a gate remembers of one branch and stage: the signal it compares to, and what it has added up."""

    signal: torch.Tensor | None = None
    accumulated: float = 0.0

    def restart(self) -> None:
        """Begin to add up anew; called at every computed step, whatever it was computed for."""
        self.accumulated = 0.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A gate's answer, with its reason for the record."""

    compute: bool
    reason: str


def difference(signal: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Mean |signal - before| and mean |before|, float32 [2], left on their device."""
    moved = (signal - before).abs_().mean(dtype=torch.float32)
    return torch.stack([moved, before.abs().mean(dtype=torch.float32)])
