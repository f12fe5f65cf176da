"""A model of two kinds of blocks that compiles in seconds, and an engine whose kept file decides what it computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.engine.base import Engine
from fastdit.engine.piece import Execute, PieceCall
from fastdit.nested import map_tensors
from fastdit.testing import seed_weights


class Block(nn.Module):
    """x + W gelu(x): as little as can be told from a plain pass-through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.gain = 0.5

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_states + scale * self.gain * self.linear(nn.functional.gelu(hidden_states))


class SmallWeights(nn.Module):
    """A block whose weights are a number, one element and a few, which compilers like to write into their code."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(0.0))
        self.element = nn.Parameter(torch.zeros(1))
        self.few = nn.Parameter(torch.zeros(8))
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        gained = hidden_states * (1.0 + self.number) + self.element * self.few
        return gained + self.kept.sum() * torch.tanh(hidden_states)


class Model(nn.Module):
    """Three such blocks in a row."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def model(seed: int = 0) -> Model:
    made = Model().eval()
    seed_weights(made, seed)
    return made


@dataclasses.dataclass(frozen=True)
class Written(Engine):
    """Runs a block and multiplies what it gives by the number that it keeps: 1, unless the file was tampered with.

    `fails` lets a build fail half way, after it has written.
    """

    _: dataclasses.KW_ONLY
    fails: bool = False

    def build(self, call: PieceCall, folder: Path) -> Execute:
        payload = folder / "deep" / "payload.txt"
        if not payload.exists():
            payload.parent.mkdir()
            payload.write_text("1.0" + " " * 4000)
            (folder / "log").mkdir()
            (folder / "log" / "other.bin").write_bytes(bytes(range(256)))
            if self.fails:
                raise RuntimeError("the compiler gave up")
        factor = float(payload.read_text())

        def execute(call: PieceCall) -> Any:
            return map_tensors(call.run(), lambda tensor: factor * tensor)

        return execute


@dataclasses.dataclass(frozen=True)
class Forgetful(Written):
    """Can't make anything of what it has kept itself."""

    def build(self, call: PieceCall, folder: Path) -> Execute:
        if any(folder.iterdir()):
            raise RuntimeError("written by a compiler that nobody remembers")
        return super().build(call, folder)


def inputs(tokens: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed))


def run(twin: Any, hidden_states: Tensor) -> Tensor:
    """One step of a bare twin."""
    with torch.no_grad(), twin.fastdit.run(1):
        output: Tensor = twin(hidden_states)
    return output
