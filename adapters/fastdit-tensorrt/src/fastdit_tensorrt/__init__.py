"""TensorRT, by torch-tensorrt, for the blocks of a model on a CUDA device.

    engine(block, x) = TensorRT's engine for block, with one fixed optimisation profile for each stage's shape of x

A block is exported by torch, compiled as a whole (an operation that TensorRT does not take is an error, never a piece
of eager torch inside), and kept as an exported program. Weights are a part of it: when they change, TensorRT's own
cache (`cache.py`) gives the engine without weights and torch-tensorrt refits it, in seconds instead of minutes. The
blocks of one kind share that cache, so that one of them is built and the others are refitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fastdit.config import register
from fastdit.engine.flat import Output, prove
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.places import cache_home, made, others_write
from fastdit.engine.sealed import digest_of
from fastdit.engine.staged import Shapes, StagedEngine, exported, stage_of
from fastdit.errors import EngineBuildFailed, EngineMismatch, UnsupportedModel
from fastdit.nested import tensors_of

from .cache import sealed_cache

__all__ = ["TensorRT"]

_PROGRAM = "engine.ep"

#: The largest error relative to the block's own output for which an engine is kept.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@register
@dataclasses.dataclass(frozen=True)
class TensorRT(StagedEngine):
    """Run blocks by TensorRT.

    `tokens` names the numbers of image tokens of the run's stages, and gives one engine with a profile for each of
    them. Without it every stage has an engine of its own.

    `accelerate` raises `UnsupportedModel` where torch-tensorrt can't be imported or the model is not on a CUDA device.
    """

    bakes_weights: ClassVar[bool] = True
    reads_folder: ClassVar[bool] = False

    @property
    def settings(self) -> str:
        return f"{super().settings}, {_version('torch-tensorrt')}, {_version('tensorrt-cu13-libs')}"

    def check(self, pipeline: object, transformer: nn.Module) -> None:
        device = next((parameter.device for parameter in transformer.parameters()), torch.device("cpu"))
        if device.type != "cuda":
            raise UnsupportedModel(f"TensorRT() needs a CUDA device and the model is on {device}; move the pipeline")
        _torch_tensorrt()

    def build(self, call: PieceCall, folder: Path) -> Execute:
        shapes, built = self.shapes(call), (folder / _PROGRAM).exists()
        if not built:
            self._compile(call, shapes, folder)
            Output.keep(call.run(), folder)
        program = _torch_tensorrt().load(str(folder / _PROGRAM)).module()
        engine = _Profiled(program, shapes, Output(folder))
        if not built:
            engine.prove(call)
        return engine.execute

    def _compile(self, call: PieceCall, shapes: tuple[Shapes, ...], folder: Path) -> None:
        """Compile a piece with a profile for each of `shapes`, or refit what was compiled for other weights."""
        torch_tensorrt = _torch_tensorrt()
        program = exported(call, shapes)
        timings = made(cache_home() / "tensorrt")
        if others_write(timings) is not None:  # whose file TensorRT would read
            timings = folder.parent
        compiled = torch_tensorrt.dynamo.compile(
            program,
            arg_inputs=inputs_of(torch_tensorrt.Input, call.tensors, shapes),
            device=call.device,
            require_full_compilation=True,
            min_block_size=1,
            pass_through_build_failures=True,
            disable_tf32=torch.get_float32_matmul_precision() == "highest",
            immutable_weights=False,
            cache_built_engines=True,
            reuse_cached_engines=True,
            custom_engine_cache=sealed_cache(self.directory, type(call.module).__name__, self._fingerprint(call)),
            timing_cache_path=str(timings / "timing.bin"),
        )
        # Without tracing it once more, which would need the dimensions that differ to be named again.
        torch_tensorrt.save(compiled, str(folder / _PROGRAM), output_format="exported_program", retrace=False)

    def _fingerprint(self, call: PieceCall) -> str:
        """Name everything that makes an engine except the weights."""
        return digest_of(self.key(call, weights="").to_json())


def inputs_of(make: Any, tensors: list[torch.Tensor], shapes: tuple[Shapes, ...]) -> list[Any]:
    """Describe a call's tensors, each with one fixed profile a stage; `make` is `torch_tensorrt.Input`."""
    if len(shapes) == 1:
        return [make(shape=tuple(tensor.shape), dtype=tensor.dtype) for tensor in tensors]
    return [
        make(profiles=[{"min_shape": s, "opt_shape": s, "max_shape": s} for s in each], dtype=tensor.dtype)
        for tensor, each in zip(tensors, zip(*shapes, strict=True), strict=True)
    ]


class _Profiled:
    """A loaded program that is switched to a profile when the stage changes, and proved once at each."""

    def __init__(self, program: nn.Module, shapes: tuple[Shapes, ...], output: Output) -> None:
        self._program, self._shapes, self._output = program, shapes, output
        self._engines = list(_engines_in(program))
        self._active: int | None = None
        self._proved: set[int] = set()
        if not self._engines:
            raise EngineBuildFailed("the compiled program holds no TensorRT engine; report this to fastdit-tensorrt")

    def execute(self, call: PieceCall) -> object:
        """Run a call."""
        found = self._run(call.tensors)
        if self._active not in self._proved:
            try:
                self._compare(call, found)
            except EngineBuildFailed as error:
                raise EngineMismatch(f"TensorRT's engine of {type(call.module).__name__}: {error}") from error
        return self._output.of(found)

    def prove(self, call: PieceCall) -> None:
        """Raise `EngineBuildFailed` unless the engine gives the module's own numbers for a call."""
        self._compare(call, self._run(call.tensors))

    def _compare(self, call: PieceCall, found: list[torch.Tensor]) -> None:
        expected = tensors_of(call.run())
        prove(expected, found, max(_TOLERANCE.get(tensor.dtype, 0.0) for tensor in expected))
        self._proved.add(self._active or 0)

    def _run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        index = stage_of(tensors, self._shapes)
        if index != self._active:
            for engine in self._engines if len(self._shapes) > 1 else ():
                engine.set_active_profile(index)
            self._active = index
        return tensors_of(self._program(*tensors))


def _engines_in(program: nn.Module) -> Iterator[Any]:
    """Find the TensorRT engines of a loaded program, which are attributes of its modules."""
    for module in program.modules():
        for value in vars(module).values():
            if hasattr(value, "set_active_profile"):
                yield value


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _torch_tensorrt() -> Any:
    try:
        import torch_tensorrt
    except Exception as error:  # it raises a bare Exception where the TensorRT libraries are missing
        raise UnsupportedModel(
            f"torch-tensorrt can't be imported: {error}; it needs torch 2.14 and the TensorRT libraries "
            "(pip install fastdit-tensorrt, on a machine that reaches NVIDIA's package index)"
        ) from error
    return torch_tensorrt
