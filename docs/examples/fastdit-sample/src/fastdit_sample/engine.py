"""An engine: what a block computes is recorded once for each shape, and replayed without the block's own Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastdit.config import register
from fastdit.engine.base import Engine
from fastdit.engine.piece import Execute, PieceCall


@register
@dataclasses.dataclass(frozen=True)
class Replay(Engine):
    """Run blocks as lists of torch's own operations, recorded by `make_fx` at a stage's shape.

    The weights are inputs of the list, so blocks of one structure share an engine, and weights that change are seen.
    """

    def build(self, call: PieceCall, folder: Path) -> Execute:
        def run(weights: dict[str, torch.Tensor], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            return torch.func.functional_call(call.module, weights, args, kwargs)

        recorded = make_fx(run)(_weights(call.module), call.args, call.kwargs)
        return lambda call: recorded(_weights(call.module), call.args, call.kwargs)


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
