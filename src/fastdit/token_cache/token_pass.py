"""A token cache in a run: it answers every block call, and runs blocks whole, in part or not at all.

A block that runs is its class's own forward on a structural twin whose children are stood in for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastdit.blocks.chain import Block, BlockCall, Forward, ForwardCall, Pass
from fastdit.errors import FastditWarning, IncompatibleStack, UnsupportedModel
from fastdit.layout import FineLayout, TokenLayout
from fastdit.models.roles import TokenRoles, token_roles
from fastdit.nested import Value
from fastdit.record import Outcome
from fastdit.run import Run
from fastdit.token_cache.choice import COMPUTED, PARTIAL, REUSED, Choice, undescribed
from fastdit.token_cache.memory import BlockMemory, TokenState
from fastdit.token_cache.visit import Visit, arguments_of, refuse_own_behaviour, stream_of, with_residual

if TYPE_CHECKING:
    from fastdit.token_cache.base import TokenCache


class TokenPass(Pass):
    """A token cache in one run."""

    def __init__(self, cache: TokenCache, run: Run) -> None:
        self._cache, self._run = cache, run
        self._forwards = self._acted = 0
        self._without_grid: set[int] = set()
        self._outcome: Outcome | None = None

    def forward(self, call: ForwardCall, next: Forward) -> Value:
        carry = self._cache.stage_change == "carry"
        state = self._run.state((call.name, call.step.branch, "tokens"), TokenState, carry=carry)
        if not state.settled:
            state.drop()
        state.settled = False
        self._context, self._state, self._layout = call.step, state, self._laid_out(call)
        self._image: torch.Tensor | None = None
        self._called: set[tuple[str, int]] = set()
        self._tally: list[tuple[int, int]] = []
        self._actions: set[str] = set()
        self._saved: dict[str, float] = {}
        self._reason = "no block was called"
        self._tokens: int | None = None
        output = next(call)
        self._outcome = self._end()
        self._forwards += 1
        self._acted += self._outcome.action != COMPUTED
        return output

    def _laid_out(self, call: ForwardCall) -> TokenLayout | None:
        """Say where the image tokens lie, where that is known."""
        layout, latents = self._run.layout or self._run.grid, call.latents
        patch = getattr(getattr(call.module, "config", None), "patch_size", None)
        if layout is None and isinstance(latents, torch.Tensor) and latents.dim() == 4 and isinstance(patch, int):
            return FineLayout(latents.shape[2] // patch, latents.shape[3] // patch)
        return layout

    def outcome(self) -> Outcome | None:
        outcome, self._outcome = self._outcome, None
        return outcome

    def idle(self) -> str | None:
        if self._acted or not self._forwards:
            return None
        return (
            f"{self._cache.describe()} left out no token in {self._forwards} forwards, so it gained nothing; lower its "
            "first or raise its interval, run more steps (few-step models have nothing to skip), or leave it out"
        )

    def block(self, call: BlockCall, next: Block) -> Value:
        """Answer one block call: run it in full or on the chosen tokens, or give its input and kept residual."""
        if call.whole:
            return next(call)
        name, index, block = call.name, call.index, call.block
        roles = token_roles(block)
        if roles is None:
            raise UnsupportedModel(undescribed(self._cache.describe(), f"{name}.{index}", block))
        if (name, index) in self._called:
            raise IncompatibleStack(
                f"{name}.{index} is called more than once in a forward, so what is kept of it would be of another "
                f"call; leave {type(self._cache).__name__} out of the stack"
            )
        self._called.add((name, index))
        refuse_own_behaviour(block, f"{name}.{index}")
        values = arguments_of(call)
        image = values[roles.image]
        self._tokens = image.shape[1] if self._tokens is None else self._tokens
        memory = self._memory((name, index), roles, image, tuple(values[stream].shape for stream in roles.returns))
        action, reason = self._decide(memory)
        chosen = None
        if action == PARTIAL:
            grid = self._grid(image.shape[1])
            chosen = self._cache.choose(Choice(self._state, memory, self._context, image.device, grid))
            if chosen is None:
                action, reason = COMPUTED, "no scores"
        if action == REUSED:
            self._saved[f"{name}.{index}"] = 1.0
            output = with_residual(roles, values, memory)
        else:
            text = values[roles.text].shape[1] if roles.joined and roles.text is not None else 0
            visit = Visit(self._cache, self._state, memory, chosen, text, f"{name}.{index}")
            call.children = {**(call.children or {}), **visit.children(block)}
            output = next(call)
            self._saved.update(visit.saved)
            self._refresh(roles, memory, values, output, chosen)
        ran = 0 if action == REUSED else image.shape[1] if chosen is None else chosen.shape[1]
        self._tally.append((ran, image.shape[1]))
        self._actions.add(action)
        self._reason = reason
        self._image = stream_of(roles, output, roles.image)
        return output

    def _end(self) -> Outcome:
        """Close the forward, whose results count from now on, and say what was done."""
        action = PARTIAL if len(self._actions) > 1 else next(iter(self._actions), COMPUTED)
        if action == PARTIAL:
            ran, tokens = (sum(counts) for counts in zip(*self._tally, strict=True))
            self._reason = f"{ran / tokens:.1%} of the tokens, {self._reason}"
        blocks = self._state.blocks.values()
        if self._image is not None and all(memory.full_step == self._context.step for memory in blocks):
            self._cache.learn(self._state, self._image)
        self._image = None
        self._state.settled = True
        return Outcome(action, self._reason, self._saved, self._tokens)

    def _memory(
        self, key: tuple[str, int], roles: TokenRoles, image: torch.Tensor, streams: tuple[torch.Size, ...]
    ) -> BlockMemory:
        """Get what is kept of a block, nothing where streams of other shapes come in."""
        blocks, shape = self._state.blocks, (image.shape[0], image.shape[1])
        if key not in blocks:
            blocks[key] = BlockMemory(len(blocks), roles, shape, streams)
        elif blocks[key].streams != streams:
            blocks[key] = BlockMemory(blocks[key].place, roles, shape, streams)
            self._state.generator = self._state.centroids = self._state.clusters = None
        return blocks[key]

    def _decide(self, memory: BlockMemory) -> tuple[str, str]:
        context = self._context
        if context.forced is not None:
            return COMPUTED, context.forced
        if context.step < self._cache.first:
            return COMPUTED, "first steps"
        if memory.full_step < 0:
            return COMPUTED, "first step of a stage" if context.stage_step == 0 else "no history"
        since = context.step - memory.full_step
        plural = "s" if since > 1 else ""
        return self._cache.phase(context, since), f"{since} step{plural} after a full one"

    def _refresh(
        self, roles: TokenRoles, memory: BlockMemory, values: Mapping[str, Value], output: Value, chosen: Any
    ) -> None:
        """Note what a block that ran has refreshed."""
        step = self._context.step
        if chosen is None:
            memory.full_step = step
            memory.refreshed = torch.full(memory.shape, step, dtype=torch.long, device=values[roles.image].device)
        else:
            assert memory.refreshed is not None
            memory.refreshed = memory.refreshed.scatter(1, chosen, step)
        if self._cache.reuses_blocks:
            streams = [stream_of(roles, output, stream) for stream in roles.returns]
            memory.residual = tuple(
                None if out is None else out - values[stream]
                for out, stream in zip(streams, roles.returns, strict=True)
            )

    def _grid(self, tokens: int) -> tuple[int, int] | None:
        """Give the rows and columns of the image tokens; None where they form no plain grid that is known."""
        if not self._cache.wants_grid:
            return None
        layout = self._layout
        if layout is not None and layout.grid is not None and layout.tokens == tokens:
            return layout.grid
        side = math.isqrt(tokens)
        if layout is None and side * side == tokens:
            return side, side
        if self._context.stage not in self._without_grid:
            self._without_grid.add(self._context.stage)
            warnings.warn(
                f"{self._cache.describe()}: the {tokens} image tokens of stage {self._context.stage} form no plain "
                "grid, so no spatial bonus is given in it; set spatial_bonus=0 if that is meant",
                FastditWarning,
                stacklevel=2,
            )
        return None
