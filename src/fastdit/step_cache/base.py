"""The step-cache level: a gate (when to compute), a forecaster (what stands in) and a skip policy.

    computed   run the blocks; keep r = (end of the blocks) - (their start), a tensor for each carried stream
    skipped    end = start + forecast(r)

A gate is the subclass: it names a signal, says how far the signal has moved, and decides on that one number. What is
common to all gates (forced steps, doubt, memory of the reference) is in `fastdit.step_cache.decision`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import torch

from fastdit.accelerator import (
    Accelerator,
    Break,
    Change,
    Effects,
    Level,
    Need,
)
from fastdit.blocks.chain import Pass
from fastdit.errors import InvalidConfig
from fastdit.run import Run, StageChange
from fastdit.step import StepContext
from fastdit.step_cache.block_pass import BlockCachePass, Learned
from fastdit.step_cache.forecasters.base import Forecaster
from fastdit.step_cache.forecasters.reuse import Reuse
from fastdit.step_cache.forward_pass import ForwardCachePass
from fastdit.step_cache.policy import SkipPolicy
from fastdit.step_cache.site import Memory, Site, Verdict, difference

__all__ = ["SCOPES", "Memory", "Site", "StepCache", "Verdict", "difference"]

#: What one decision stands for: all blocks that follow it, those of its own block list, or the whole forward.
Scope = Literal["stack", "list", "forward"]
SCOPES: tuple[str, ...] = get_args(Scope)


@dataclasses.dataclass(frozen=True)
class StepCache(Accelerator):
    """Base of the step caches.

    `per_image` decides and executes for each image of a batch by itself, so that an image does not depend on its
    batch-mates. `scope` "stack" takes one decision a step; "list" takes one at the start of every block list; "forward"
    skips whole forwards, (output - latents) taking the place of the blocks' residual, and needs no block lists.
    `stage_change` says what becomes of the histories when a schedule changes the tokens: "reset" computes the first
    step of every stage, "carry" copies them to the new tokens.
    """

    _: dataclasses.KW_ONLY
    forecast: Forecaster = dataclasses.field(default_factory=Reuse)
    policy: SkipPolicy = dataclasses.field(default_factory=SkipPolicy)
    per_image: bool = False
    scope: Scope = "stack"
    stage_change: StageChange = "reset"

    level: ClassVar = Level.STEP_CACHE
    changes: ClassVar = frozenset({Change.STEP_ORDER})
    needs: ClassVar = frozenset({Need.BLOCK_LISTS})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS, Break.WHOLE_GRAPH})

    #: The scopes that the gate's signal allows.
    scopes: ClassVar[tuple[str, ...]] = SCOPES

    #: How many steps must have been computed before the gate can skip one.
    warm_up: ClassVar[int] = 1

    def check_values(self) -> None:
        super().check_values()
        if self.scope not in self.scopes:
            raise InvalidConfig(
                f"{type(self).__name__}'s scope is one of {', '.join(self.scopes)}, where its signal is, got "
                f"{self.scope!r}"
            )

    @property
    def effects(self) -> Effects:
        declared = super().effects
        if self.whole_forward:
            declared = dataclasses.replace(declared, needs=declared.needs - {Need.BLOCK_LISTS})
        if self.stage_change == "carry":
            declared = declared.adding(needs={Need.CARRIED_TOKENS})
        if self.forecast.amplifies:
            declared = declared.adding(needs={Need.PRECISE_ACTIVATIONS})
        if self.per_image:
            return declared.adding(changes={Change.BATCH_ROWS}, needs={Need.SEPARABLE_ROWS})
        return declared.adding(breaks={Break.BATCH_INVARIANCE})

    def lasting(self) -> Learned:
        return Learned()

    def enter(self, run: Run, lasting: Learned) -> Pass:
        return ForwardCachePass(self, run) if self.whole_forward else BlockCachePass(self, run, lasting)

    @property
    def whole_forward(self) -> bool:
        """Whether the skipped part is the whole forward."""
        return self.scope == "forward"

    @property
    def leading_blocks(self) -> int:
        """How many blocks run before the gate sees its signal; they are never skipped."""
        return 0

    @property
    def trailing_blocks(self) -> int:
        """How many blocks at the end are never skipped."""
        return 0

    def memory(self) -> Memory:
        """Make the gate's memory of one branch and stage."""
        return Memory()

    def signal(self, site: Site) -> torch.Tensor | None:
        """Give the tensor [batch, ...] that the gate watches, or None where it needs none."""
        return None

    def change(self, memory: Memory, signal: torch.Tensor) -> torch.Tensor | None:
        """Say how far the signal is from the remembered one, as (amount, scale) in float32 [2], left on its device.

        Both parts are means (or sums) over tokens, so that ranks which hold parts of the tokens can add them up; the
        number that `decide` sees is amount / scale. None where there is nothing to compare to.
        """
        return None if memory.signal is None else difference(signal, memory.signal)

    def decide(self, memory: Memory, change: float, context: StepContext) -> Verdict:
        """Decide a step that nothing forces; `change` is finite, and 0 for a gate without a signal."""
        raise NotImplementedError

    def remember(self, memory: Memory, signal: torch.Tensor, computed: bool) -> None:
        """Keep the signal to compare the next one to: by default that of the last computed step."""
        if computed:
            memory.signal = signal

    def learn(self, memory: Memory, site: Site, end: torch.Tensor, computed: bool) -> None:
        """Take in what the latents' stream was at the end of a step (of the forward, for a whole-forward cache)."""

    def for_transformer(self, transformer: Any) -> StepCache:
        """Give the configuration with everything filled in that depends on the model."""
        return self

    def check_run(self, total_steps: int) -> None:
        """Raise `InvalidConfig` if the gate can't serve a run of this many steps."""

    def skippable(self, total_steps: int) -> int:
        """Count the steps of a run that may be skipped, as far as that is known beforehand."""
        policy = self.policy
        if policy.first < self.warm_up:
            policy = dataclasses.replace(policy, first=self.warm_up)
        return policy.skippable(total_steps)

    def outlook(self, total_steps: int) -> str | None:
        """Say before a run of how little use the cache can be in so few steps; None where there is room."""
        free = self.skippable(total_steps)
        if self.neutral or free > 2:
            return None
        gain = f"can skip at most {free} of {total_steps} steps" if free else f"can skip none of {total_steps} steps"
        return f"{self.describe()} {gain}: few-step models have little to reuse; run more steps, or leave it out"
