"""Some samples of a batch, run through a block by themselves; and the proof that a block allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastdit.blocks.chain import Block, BlockCall
from fastdit.blocks.ports import BlockPort, Port, outputs_of
from fastdit.errors import UnsupportedModel
from fastdit.nested import select_rows

_ROWS = (
    "per_image needs blocks that treat the images of a batch one by one, and {port} gives an image by itself something "
    "else than in its batch; leave per_image out"
)


def on_rows(call: BlockCall, index: torch.Tensor, batch: int, carried: Mapping[Port, torch.Tensor]) -> BlockCall:
    """Give a block's call for some samples of a batch; `carried` holds arguments that are of those samples already."""
    arguments: dict[Port, Any] = dict(enumerate(call.args))
    arguments.update(call.kwargs)
    chosen = {
        port: carried[port] if port in carried else select_rows(value, index, batch)
        for port, value in arguments.items()
    }
    args = tuple(chosen[place] for place in range(len(call.args)))
    return BlockCall(call.name, call.index, call.block, args, {key: chosen[key] for key in call.kwargs})


def places(samples: Sequence[int], device: torch.device) -> torch.Tensor:
    """Give the places of samples in a batch, made on the device: a copy of the host's numbers would be waited for."""
    every = torch.arange(max(samples) + 1, dtype=torch.long, device=device)
    return torch.cat([every[place : place + 1] for place in samples])


def prove_rows(port: BlockPort, batch: int, call: BlockCall, run: Block) -> None:
    """Show once that a block gives a sample by itself what it gives it in a batch. Raises `UnsupportedModel`."""
    whole = outputs_of(port, run(BlockCall(call.name, call.index, call.block, call.args, call.kwargs)))
    first = places([0], next(iter(whole.values())).device)
    try:
        alone = outputs_of(port, run(on_rows(call, first, batch, {})))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnsupportedModel(_ROWS.format(port=f"{port.name}.{port.index}") + f" ({error})") from error
    for out in port.outputs:
        if out is not None and not _alike(alone[out], whole[out][:1]):
            raise UnsupportedModel(_ROWS.format(port=f"{port.name}.{port.index}"))


def _alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two results differ by rounding only: kernels may add in another order for another batch."""
    if first.shape != second.shape:
        return False
    distance = (first - second).abs().max()
    return bool(distance <= 64 * torch.finfo(first.dtype).eps * second.abs().max())
