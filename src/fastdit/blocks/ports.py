"""Where the streams of a DiT enter and leave its blocks, and what is read and built by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastdit.nested import Args, Value

Port = int | str
"""An argument of a block call: its place, or its keyword."""


@dataclass(frozen=True)
class BlockPort:
    """Where the carried streams enter and leave one block. `outputs[i]` is None where stream i ends."""

    name: str
    index: int
    inputs: tuple[Port, ...]
    outputs: tuple[int | None, ...]
    returns: str
    width: int


@dataclass(frozen=True)
class Strand:
    """Blocks joined by carried streams; `latent_stream` is the stream that depends on the latents directly."""

    blocks: tuple[BlockPort, ...]
    latent_stream: int | None = None


@dataclass(frozen=True)
class Wiring:
    """The strands of one forward in the order they run; caches decide at `entry`, the first that sees the latents.

    `token_axis` is where its streams have their tokens: 1 in [B, S, C], 0 in the [S, B, C] of a few models.
    """

    strands: tuple[Strand, ...]
    entry: int
    token_axis: int = 1

    def where(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Index the strands: (list name, index) -> (strand, place in the strand)."""
        return {
            (port.name, port.index): (number, place)
            for number, strand in enumerate(self.strands)
            for place, port in enumerate(strand.blocks)
        }


def read_port(port: Port, args: Args, kwargs: Mapping[str, Value]) -> Value:
    """Read an argument of a call."""
    return args[port] if isinstance(port, int) else kwargs[port]


def returned(port: BlockPort, values: Mapping[int, torch.Tensor]) -> Value:
    """Build what a block returns from its outputs by place (None where there is none)."""
    if port.returns == "tensor":
        return values[0]
    items = [values.get(place) for place in range(port.width)]
    return tuple(items) if port.returns == "tuple" else items


def outputs_of(port: BlockPort, output: Value) -> dict[int, torch.Tensor]:
    """Take a block's result apart by place."""
    if isinstance(output, torch.Tensor):
        return {0: output}
    return {place: item for place, item in enumerate(output) if isinstance(item, torch.Tensor)}


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Count the in-place writes to each tensor; those made in inference mode don't count theirs."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
