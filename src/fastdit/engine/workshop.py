"""Where a twin's engines are built, found and run: `Workshop` for as long as the twin, `EnginePass` for one forward."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdit.blocks.attention import KernelMode
from fastdit.blocks.chain import Block, BlockCall, Forward, ForwardCall, Pass
from fastdit.engine.arguments import (
    canonical,
    mapped,
    outline_of,
    tensors_in,
)
from fastdit.engine.base import (
    BuiltEngine,
    Engine,
    PieceCall,
    answering_kernel,
    refusal,
    refuse_gradients,
)
from fastdit.engine.key import (
    EngineKey,
    adapters_of,
    environment_of,
    structure_of,
    weights_of,
)
from fastdit.engine.registry import Registry
from fastdit.engine.scratch import scratch
from fastdit.errors import (
    EngineBuildFailed,
    EngineMismatch,
    EngineWarning,
    FastditError,
    UnsupportedModel,
)
from fastdit.record import Outcome
from fastdit.run import Run
from fastdit.structure import structural_twin

#: Engines of the process by where they are kept and the digests of their keys, each as long as some twin holds it.
_LIVING: weakref.WeakValueDictionary[tuple[Path, str], BuiltEngine] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Build:
    """What it took to get one engine: `kept` says that it was found on disk; `failure`, that there is none, and why."""

    piece: str
    shape: str
    stage: tuple[Any, ...] | None
    seconds: float
    kept: bool = False
    failure: str | None = None


@dataclass(frozen=True)
class Admission:
    """What was found out about a block for one run. `module` is what an engine runs: the block without its hooks.

    `refusal` says why no engine may run the block.
    """

    where: str
    module: nn.Module
    structure: str
    weights: str
    refusal: str | None = None


class Workshop:
    """Builds the engines of one twin and hands them out. `builds` tells of each that was asked for, in order."""

    def __init__(self, engine: Engine, listener: Callable[[Build], None] | None = None) -> None:
        self.engine = engine
        self.builds: list[Build] = []
        self.listener = listener
        self._registry = Registry(engine.directory)
        self._engines: dict[tuple[str, Hashable], BuiltEngine | None] = {}
        self._weights: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def enter(self, run: Run) -> EnginePass:
        """Give what runs the blocks of one run."""
        return EnginePass(self, run)

    def expected(self, model: nn.Module) -> int:
        """Count the engines that a model needs for one stage: one a kind of block, or one a block."""
        blocks = [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
        return len(blocks) if self.engine.bakes_weights else len({structure_of(block) for block in blocks})

    @property
    def remarks(self) -> tuple[str, ...]:
        """Say which pieces run eagerly, since no engine could be built for them, and why."""
        return tuple(
            f"{build.piece} {build.shape} runs eagerly: {build.failure}"
            for build in self.builds
            if build.failure is not None
        )

    def admit(self, block: nn.Module, where: str) -> Admission:
        """Look at a block before a run: what it is made of, and whether an engine may run it."""
        hooked = bool(block._forward_hooks or block._forward_pre_hooks)
        module = structural_twin(block, {}, hooks=False) if hooked else block
        weights = weights_of(block) if self.engine.bakes_weights else ""
        before = self._weights.get(block)
        self._weights[block] = weights
        if before not in (None, weights):
            self._engines = {quick: built for quick, built in self._engines.items() if quick[0] != before}
        return Admission(where, module, structure_of(block), weights, refusal(block, where))

    def get(self, call: PieceCall, admission: Admission, quick: Hashable) -> BuiltEngine | None:
        """Give the engine for a call; None where it could not be built and the piece then runs eagerly.

        `quick` stands for the call within this process. Raises `EngineBuildFailed` where that is what was asked for.
        """
        place = (admission.weights, quick)
        if place not in self._engines:
            self._engines[place] = self._made(call, admission)
        return self._engines[place]

    def _made(self, call: PieceCall, admission: Admission) -> BuiltEngine | None:
        start = time.perf_counter()
        try:
            if admission.refusal is not None:
                raise UnsupportedModel(admission.refusal)
            key = self.engine.key(call, structure=admission.structure, weights=admission.weights)
            living = self._registry.directory, key.digest
            built = _LIVING.get(living)
            if built is None:
                built = _LIVING[living] = self._build(key, call)
        except Exception as error:
            reason = str(error) if isinstance(error, FastditError) else f"{type(error).__name__}: {error}"
            failed = (
                f"{self.engine.describe()} can't build {admission.where} ({type(call.module).__name__}) for "
                f"tensors of {_shapes(call)}: {reason}"
            )
            if self.engine.on_failure == "error":
                raise EngineBuildFailed(f"{failed}; set on_failure='eager' to run such pieces as they are") from error
            warnings.warn(f"{failed}; it runs eagerly", EngineWarning, stacklevel=2)
            shape = str(max(_shapes(call), key=math.prod, default="no tensors"))
            self._note(Build(type(call.module).__name__, shape, call.stage, time.perf_counter() - start, False, reason))
            return None
        self._note(Build(key.piece, key.shape, call.stage, time.perf_counter() - start, built.kept))
        return built

    def _note(self, build: Build) -> None:
        self.builds.append(build)
        if self.listener is not None:
            self.listener(build)

    def _build(self, key: EngineKey, call: PieceCall) -> BuiltEngine:
        """Build an engine, or make it of what is kept, while no other process does the same."""
        start = time.perf_counter()
        folder = Path(tempfile.mkdtemp(dir=scratch()))
        with self._registry.locked(key):
            kept = self._registry.read(key, folder)
            try:
                execute = self.engine.build(call, folder)
            except Exception as error:
                if not kept:
                    raise
                warnings.warn(
                    f"the engine kept for {key.piece} {key.shape} is as it was written and of no use all the same "
                    f"({type(error).__name__}: {error}); it is removed and built again",
                    EngineWarning,
                    stacklevel=2,
                )
                self._registry.remove(key)
                shutil.rmtree(folder)
                folder.mkdir()
                kept, execute = False, self.engine.build(call, folder)
            if not kept:
                self._registry.keep(key, folder)
        return BuiltEngine(key, self.engine, execute, time.perf_counter() - start, kept)


class EnginePass(Pass):
    """An engine in one run: answers the calls of blocks that run."""

    def __init__(self, workshop: Workshop, run: Run) -> None:
        self._workshop, self._run = workshop, run
        self._admitted: dict[int, Admission] = {}
        self._adapters: dict[str, object] = {}
        self._kernel: KernelMode | None = None
        self._environment: str | None = None
        self._stage: tuple[Any, ...] | None = None
        self._called = False
        self._ran = self._eager = self._forwards = self._blocks = 0

    def forward(self, call: ForwardCall, next: Forward) -> Any:
        self._kernel = answering_kernel()
        adapters = adapters_of(call.module)
        if self._adapters.setdefault(call.name, adapters) != adapters:
            # A LoRA was switched or scaled between two steps.
            self._adapters[call.name] = adapters
            self._admitted.clear()
        self._stage, self._environment = _stage_of(self._run), None
        self._called, self._ran, self._eager = True, 0, 0
        self._forwards += 1
        return next(call)

    def outcome(self) -> Outcome:
        """Name what ran the forward's blocks: the engine, "eager", both with their shares, or "none" if none ran."""
        engine, ran, eager = type(self._workshop.engine).__name__, self._ran, self._eager
        if not self._called:
            ran = eager = 0
        self._called = False
        self._blocks += ran + eager
        if ran and eager:
            return Outcome(engine=f"{engine}, {eager} of {ran + eager} blocks eager")
        return Outcome(engine=engine if ran else "eager" if eager else "none")

    def idle(self) -> str | None:
        if self._blocks or not self._forwards:
            return None
        return (
            f"{self._workshop.engine.describe()} was asked for no block in {self._forwards} forwards, so it gained "
            "nothing; leave it out, or what skips all blocks"
        )

    def block(self, call: BlockCall, next: Block) -> Any:
        """Run one block by its engine, which is built at the first call of its shape."""
        refuse_gradients()
        block = call.block
        admission = self._admitted.get(id(block))
        if admission is None:
            admission = self._admitted[id(block)] = self._workshop.admit(block, f"{call.name}.{call.index}")
        if admission.module is block:
            return self._run_piece(admission, call.args, call.kwargs)
        # The hooks that the user put on the block run as ever, around the engine.
        hooked = structural_twin(block, {})
        hooked.__dict__["forward"] = lambda *args, **kwargs: self._run_piece(admission, args, kwargs)
        return hooked(*call.args, **call.kwargs)

    def _run_piece(self, admission: Admission, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = mapped(args, canonical), mapped(kwargs, canonical)
        attention = self._kernel.label if self._kernel is not None else ""
        call = PieceCall(admission.module, args, kwargs, self._stage, attention)
        if self._environment is None:
            self._environment = environment_of(call.device)
        quick = (
            admission.structure, admission.refusal, self._stage, attention, self._environment,
            torch.is_inference_mode_enabled(), outline_of((args, kwargs)),
        )  # fmt: skip
        built = self._workshop.get(call, admission, quick)
        if built is None:
            self._eager += 1
            return admission.module(*args, **kwargs)
        try:
            output = built.execute(admission.module, args, kwargs)
        except EngineMismatch as error:
            if self._workshop.engine.on_failure == "error":
                raise
            warnings.warn(f"{admission.where} runs eagerly: {error}", EngineWarning, stacklevel=2)
            self._eager += 1
            return admission.module(*args, **kwargs)
        self._ran += 1
        if self._kernel is not None:
            # It is compiled in, so that its answers are not seen by it.
            self._kernel.answered = True
        return output


def _stage_of(run: Run) -> tuple[Any, ...] | None:
    """Name the token layout of the picture: its grid, and how that is split."""
    layout = run.layout or run.grid
    if layout is None:
        return None
    return layout.rows, layout.columns, layout.kind, layout.frame


def _shapes(call: PieceCall) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors_in([call.args, call.kwargs])]
