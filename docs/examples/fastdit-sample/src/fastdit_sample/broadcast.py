"""A pass of its own: what attention gave in one step stands in for it in the next ones.

After Zhao et al., Real-Time Video Generation with Pyramid Attention Broadcast, arXiv 2408.12588. There spatial,
temporal and cross attention have ranges of their own; here all attention has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fastdit.accelerator import Accelerator, Break, Change, Level, Need
from fastdit.blocks.chain import Block, BlockCall, Forward, ForwardCall, Pass
from fastdit.config import Count, Share, register
from fastdit.errors import UnsupportedModel
from fastdit.models.roles import token_roles
from fastdit.nested import tensors_of
from fastdit.record import Outcome
from fastdit.run import Run


@register
@dataclasses.dataclass(frozen=True)
class AttentionBroadcast(Accelerator):
    """Run the attention of a block in every `every`-th step, and the rest of the block in all of them.

    Args:
        every: steps from one computed attention to the next, from 1 (all are computed).
        window: the part of the run in which attention is reused, as shares of its steps.
    """

    every: Count = 2
    window: tuple[Share, Share] = (0.1, 0.9)

    level: ClassVar = Level.TOKEN_CACHE
    changes: ClassVar = frozenset({Change.BLOCK_PARTS})
    needs: ClassVar = frozenset({Need.BLOCK_LISTS, Need.FIXED_ROWS})
    breaks: ClassVar = frozenset({Break.BIT_EXACTNESS})

    @property
    def neutral(self) -> bool:
        return self.every == 1

    def check(self, pipeline: DiffusionPipeline | None, transformer: nn.Module) -> None:
        for blocks in transformer.children():
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                if token_roles(block) is None:
                    raise UnsupportedModel(
                        f"{self.describe()} does not know the attention of {type(block).__name__}; describe the block "
                        "in fastdit.models.roles"
                    )

    def enter(self, run: Run, lasting: None) -> Pass | None:
        return None if self.neutral else _Broadcast(self, run)


class _Kept:
    """What is kept of one branch: by block, the step of its attention, the shapes that went in, and what came out."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], tuple[int, list[torch.Size], object]] = {}

    def tensors(self) -> list[torch.Tensor]:
        return tensors_of([output for _, _, output in self.outputs.values()])

    def lift(self, sources: torch.Tensor, tokens: int) -> None:
        raise NotImplementedError  # only asked of what was made with carry=True


class _Broadcast(Pass):
    """The pass of one run."""

    def __init__(self, settings: AttentionBroadcast, run: Run) -> None:
        self._settings, self._run = settings, run
        self._saved: dict[str, float] = {}
        self._left_out = 0

    def forward(self, call: ForwardCall, next: Forward) -> object:
        step, window = call.step, self._settings.window
        inside = window[0] * step.total_steps <= step.step < window[1] * step.total_steps
        self._step, self._reuses = step.step, inside and step.forced is None
        self._kept = self._run.state((call.name, step.branch, "broadcast"), _Kept)
        self._saved = {}
        return next(call)

    def block(self, call: BlockCall, next: Block) -> object:
        roles = token_roles(call.block)
        if call.whole or roles is None or "forward" in vars(call.block):
            return next(call)  # a forward of its own, as offloading libraries put on a block, would be left out
        child = call.block.get_submodule(roles.attention)
        place, path = (call.name, call.index), f"{call.name}.{call.index}.{roles.attention}"

        def answer(*args: object, **kwargs: object) -> object:
            shapes = [tensor.shape for tensor in tensors_of((args, kwargs))]
            step, known, output = self._kept.outputs.get(place, (-self._settings.every, [], None))
            if self._reuses and known == shapes and self._step - step < self._settings.every:
                self._saved[path] = 1.0
                return output
            output = child(*args, **kwargs)
            self._kept.outputs[place] = self._step, shapes, output
            return output

        call.children = {**(call.children or {}), roles.attention: _StandIn(answer)}
        return next(call)

    def outcome(self) -> Outcome | None:
        saved, self._saved = self._saved, {}
        self._left_out += len(saved)
        return Outcome("partial", f"{len(saved)} attentions reused", saved) if saved else None

    def idle(self) -> str | None:
        return None if self._left_out else f"{self._settings.describe()} reused no attention; widen its window"


class _StandIn(nn.Module):
    """Stands where a block has its attention."""

    def __init__(self, answer: Callable[..., object]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.answer(*args, **kwargs)
