"""Where a twin's engines are built, found and run, for as long as the twin lives."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastdit.engine.arguments import outline_of
from fastdit.engine.checksum import weights_of
from fastdit.engine.fingerprint import Structure, structure_of
from fastdit.engine.key import EngineKey, Environment
from fastdit.engine.piece import Execute, PieceCall, blocks_of
from fastdit.engine.refusals import Admission, refusal
from fastdit.engine.registry import Registry, warn_of_no_use
from fastdit.engine.scratch import remove, scratch, state_of
from fastdit.engine.warmup import Build
from fastdit.errors import EngineBuildFailed, EngineMismatch, EngineWarning, FastditError, UnsupportedModel
from fastdit.process import switching
from fastdit.structure import structural_twin

if TYPE_CHECKING:
    from fastdit.engine.base import Engine


@dataclass(frozen=True)
class BuiltEngine:
    """An engine for one key: what runs calls of that key, whose tensors are in canonical strides, unchecked.

    `kept` says that it was found on disk.
    """

    key: EngineKey
    execute: Execute
    kept: bool


_COMPILED_AGAIN = "(it was compiled again: are the compiler's caches off?); what was made now takes its place"

#: Engines of the process by where they are kept and the digests of their keys, each as long as some twin holds it.
_LIVING: weakref.WeakValueDictionary[tuple[Path, str], BuiltEngine] = weakref.WeakValueDictionary()


class Workshop:
    """Builds the engines of one twin and runs calls by them. `builds` tells of each that was asked for, in order."""

    def __init__(self, engine: Engine, listener: Callable[[Build], None] | None = None) -> None:
        self.engine = engine
        self.builds: list[Build] = []
        self.listener = listener
        self._registry = Registry(engine.directory)
        self._engines: dict[tuple[Hashable, ...], BuiltEngine | None] = {}
        self._surroundings: dict[Environment, int] = {}
        self._weights: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def expected(self, model: nn.Module) -> int:
        """Count the engines that a model needs for one stage: one a kind of block, or one a block."""
        blocks = blocks_of(model)
        return len(blocks) if self.engine.bakes_weights else len({structure_of(block) for block in blocks})

    def expect(self, model: nn.Module, stages: int) -> None:
        """See that the engines of a model can be kept, before one is built. Raises `EngineBuildFailed`."""
        if self.engine.bakes_weights and self.engine.on_failure == "error" and self._registry.only_read is None:
            self._registry.room.require(model, self.engine.requirement(blocks_of(model), stages))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Say which pieces run eagerly, since no engine could be built for them, and why."""
        return tuple(str(build) for build in self.builds if build.failure is not None)

    def admit(self, block: nn.Module, where: str) -> Admission:
        """Look at a block: what it is made of, and whether an engine may run it."""
        hooked = bool(block._forward_hooks or block._forward_pre_hooks)
        module = structural_twin(block, {}, hooks=False) if hooked else block
        weights = weights_of(block) if self.engine.bakes_weights else ""
        before = self._weights.get(block)
        self._weights[block] = weights
        if before not in (None, weights):
            self._engines = {place: built for place, built in self._engines.items() if place[0] != before}
        structure = Structure(block, values=self.engine.bakes_weights)
        return Admission(where, module, structure, weights, refusal(block, where))

    def surroundings(self, device: torch.device) -> int:
        """Number what the engine says of a forward besides its calls; the same has the same number."""
        return self._surroundings.setdefault(self.engine.environment(device), len(self._surroundings))

    def run(self, call: PieceCall, admission: Admission, surroundings: int) -> tuple[object, bool]:
        """Run a call by its engine, which is built at the first such call; say whether the engine ran, or the module.

        Raises `EngineBuildFailed` or `EngineMismatch` where the engine can't run the call, unless its `on_failure` is
        "eager".
        """
        built = self.get(call, admission, surroundings)
        if built is None:
            return call.run(), False
        try:
            return built.execute(call), True
        except EngineMismatch as error:
            self.excuse(admission.where, error)
            return call.run(), False

    def excuse(self, where: str, error: EngineMismatch) -> None:
        """Say that something runs eagerly, since no engine can run it now; raise the error where that is not wanted."""
        if self.engine.on_failure == "error":
            raise error
        warnings.warn(f"{where} runs eagerly: {error}", EngineWarning, stacklevel=2)

    def get(self, call: PieceCall, admission: Admission, surroundings: int) -> BuiltEngine | None:
        """Give the engine for a call; None where it could not be built and the piece runs eagerly."""
        place = (
            admission.weights, admission.structure.digest, admission.refusal, call.stage, call.attention,
            surroundings, torch.is_inference_mode_enabled(), outline_of((call.args, call.kwargs)),
        )  # fmt: skip
        found = self._engines.get(place)
        if found is None and place not in self._engines:
            start = time.perf_counter()
            found, failure = self._made(call, admission)
            self._engines[place] = found
            kept, seconds = found is not None and found.kept, time.perf_counter() - start
            self.builds.append(Build(type(call.module).__name__, call.shape, call.stage, seconds, kept, failure))
            if self.listener is not None:
                self.listener(self.builds[-1])
        return found

    def _made(self, call: PieceCall, admission: Admission) -> tuple[BuiltEngine | None, str | None]:
        """Give an engine of the process, one that is built now, or None and the reason."""
        try:
            if admission.refusal is not None:
                raise UnsupportedModel(admission.refusal)
            key = self.engine.key(call, structure=admission.structure.digest, weights=admission.weights)
            living = self._registry.directory, key.digest
            with switching():  # what compilers set belongs to the process
                built = _LIVING.get(living)
                if built is None:
                    built = _LIVING[living] = self._build(key, call)
        except Exception as error:
            reason = str(error) if isinstance(error, FastditError) else f"{type(error).__name__}: {error}"
            failed = (
                f"{self.engine.describe()} can't build {admission.where} ({type(call.module).__name__}) for "
                f"tensors of {[list(tensor.shape) for tensor in call.tensors]}: {reason}"
            )
            if self.engine.on_failure == "error":
                raise EngineBuildFailed(f"{failed}; set on_failure='eager' to run such pieces as they are") from error
            warnings.warn(f"{failed}; it runs eagerly", EngineWarning, stacklevel=2)
            return None, reason
        return built, None

    def _build(self, key: EngineKey, call: PieceCall) -> BuiltEngine:
        """Build an engine, or make it of what is kept, while no other process does the same."""
        folder = Path(tempfile.mkdtemp(dir=scratch()))
        call = call.apart()
        try:
            with self._registry.locked(key):
                kept = self._registry.read(key, folder)
                if not kept:
                    self._registry.make_room(key, self.engine.least_bytes(call.module), building=True)
                before = state_of(folder)
                try:
                    execute = self.engine.build(call, folder)
                except Exception as error:
                    if not kept or isinstance(error, OSError):
                        raise
                    warn_of_no_use(key, call.shape, f"({type(error).__name__}: {error}); it is removed and built again")
                    self._registry.remove(key)
                    shutil.rmtree(folder)
                    folder.mkdir()
                    kept, execute = False, self.engine.build(call, folder)
                if kept and state_of(folder) != before:
                    warn_of_no_use(key, call.shape, _COMPILED_AGAIN)
                    kept = False
                if not kept:
                    self._registry.keep(key, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        built = BuiltEngine(key, execute, kept)
        self._registry.room.hold(key.digest, built)
        gone = weakref.finalize(built, remove, folder, os.getpid())
        gone.atexit = False  # all of `scratch` goes then
        if not self.engine.reads_folder:
            gone()
        return built
