"""The engine level: what a piece of a model is turned into for the shape of one stage, and the contract of that.

An engine runs *inside* what the other levels decide: a cache decides whether a block runs, the engine how. A piece is
a block of the model's block lists. It is built once for every key (`key.py`) and kept on disk (`registry.py`). A call
never reaches an engine of another key, whatever the compiler beneath would have made of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from fastdit.accelerator import Accelerator, Break, Change, Level, Need
from fastdit.config import LOCAL
from fastdit.engine.arguments import outline_of
from fastdit.engine.checksum import weights_of
from fastdit.engine.engine_pass import EnginePass
from fastdit.engine.fingerprint import structure_of
from fastdit.engine.key import EngineKey, Environment, environment_of
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.room import Requirement
from fastdit.engine.workshop import Workshop
from fastdit.run import Run


@dataclasses.dataclass(frozen=True)
class Engine(Accelerator):
    """Base of the engines. A subclass says how a piece is built; keys, checks, keeping and failures are common.

    Args:
        on_failure: "error" raises `EngineBuildFailed` where a piece can't be built for a shape; "eager" runs the piece
            as it is instead, says so once, and shows it in the record.
        directory: where engines are kept, ~/.cache/fastdit/engines unless given; it changes nothing that is computed,
            and is not saved with a stack.
    """

    _: dataclasses.KW_ONLY
    on_failure: Literal["error", "eager"] = "error"
    directory: str | None = dataclasses.field(default=None, metadata={LOCAL: True})

    level: ClassVar[Level] = Level.ENGINE
    changes: ClassVar[frozenset[Change]] = frozenset({Change.ARITHMETIC_ORDER, Change.COMPILED_ATTENTION})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BLOCK_LISTS, Need.WHOLE_BLOCKS, Need.FIXED_ROWS})
    breaks: ClassVar[frozenset[Break]] = frozenset({Break.BIT_EXACTNESS})

    #: Fields that don't change what is built.
    unkeyed: ClassVar[frozenset[str]] = frozenset({"on_failure", "directory"})

    #: Whether the weights become a part of the engine, so that it is built for one module and its weights.
    bakes_weights: ClassVar[bool] = False

    #: Whether an engine that is built still reads its folder; where it does not, what is kept is the one copy on disk.
    reads_folder: ClassVar[bool] = True

    def lasting(self) -> Workshop:
        return Workshop(self)

    def remarks(self, models: Sequence[nn.Module], stages: int, lasting: Workshop) -> tuple[str, ...]:
        each = sum(map(lasting.expected, models))
        return f"{stages * each} engines are needed, {each} for each stage", *lasting.remarks

    def enter(self, run: Run, lasting: Workshop) -> EnginePass:
        return EnginePass(lasting, run)

    @property
    def settings(self) -> str:
        """Everything of the configuration that changes what is built."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.unkeyed}
        return repr(sorted(shown.items()))

    def environment(self, device: torch.device) -> Environment:
        """List everything besides the model and the call that changes what is built; read at every forward."""
        return environment_of(device)

    def build(self, call: PieceCall, folder: Path) -> Execute:
        """Build an engine for a call, whose tensors are in canonical strides, and give what runs it.

        The call is of a copy of the piece, which shares its weights, and no other engine is built meanwhile. What is to
        be kept is written into `folder`, a private one that goes with the engine. Where the engine was kept, its files
        lie there already, exactly as they were written; where they are of no use, they are written anew. Whatever can't
        be built is raised.
        """
        raise NotImplementedError

    def least_bytes(self, module: nn.Module) -> int:
        """Say what the engine of a module takes on the disk at least: its weights, where they become a part of it."""
        tensors = (*module.parameters(), *module.buffers()) if self.bakes_weights else ()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def requirement(self, blocks: Sequence[nn.Module], stages: int) -> Requirement:
        """Say what the engines of blocks that each has its own take on the disk at least, at so many stages."""
        sizes = [self.least_bytes(block) for block in blocks]
        return Requirement(stages * len(sizes), stages * sum(sizes), max(sizes, default=0))

    def key(self, call: PieceCall, *, structure: str | None = None, weights: str | None = None) -> EngineKey:
        """Give the key of the engine for a call; a digest of the module may be given where it is known."""
        if weights is None:
            weights = weights_of(call.module) if self.bakes_weights else ""
        return EngineKey(
            engine=type(self).__name__,
            settings=self.settings,
            piece=type(call.module).__name__,
            structure=structure if structure is not None else structure_of(call.module),
            weights=weights,
            arguments=outline_of((call.args, call.kwargs)),
            stage=call.stage,
            attention=call.attention,
            mode="inference" if torch.is_inference_mode_enabled() else "no_grad",
            environment=self.environment(call.device),
        )
