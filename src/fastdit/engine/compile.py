"""torch.compile for the blocks of a model: one isolated engine for each kind of block and stage.

    engine(block, x) = Inductor(graph of type(block).forward at x's shape)(weights of block, x)

Blocks of equal structure share one engine: the weights are inputs of the graph, so what is changed or replaced in place
(LoRA that is fused, another checkpoint) is seen at once. That holds for `packed` too, where linear layers multiply by a
copy of their weights that is laid out for the processor (`packed.py`). Weights as constants of the graph (Inductor's
freezing) are no faster, and would be a build for every block, in every process.

Compiled in one graph or not at all: a break or a second graph for the same key is an error, never a slow success.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdit.config import register
from fastdit.engine.arguments import tensors_in
from fastdit.engine.base import Execute, PieceCall
from fastdit.engine.captured import Captures
from fastdit.engine.packed import refuse_unpackable
from fastdit.engine.processor import ProcessorEngine
from fastdit.engine.staged import StagedEngine, following_tokens, stage_of
from fastdit.errors import EngineMismatch, InvalidConfig, UnsupportedModel

_NUMBERS = itertools.count()

#: Whether torch.compile can itself bound a function to one graph; older ones are told not to compile again.
_BOUNDED = {"isolate_recompiles", "recompile_limit"} <= set(inspect.signature(torch.compile).parameters)

#: What Dynamo raises where a call needs a second graph, by its names in different versions.
_SECOND_GRAPH = ("FailOnRecompileLimitHit", "RecompileError")

MODES = ("default", "max-autotune-no-cudagraphs")


@register
@dataclasses.dataclass(frozen=True)
class Compile(StagedEngine, ProcessorEngine):
    """Run blocks as compiled by Inductor.

    `tokens` names the numbers of image tokens of the run's stages, and gives one graph for all of them, in which the
    number of tokens is a variable; attention is torch's there. Without it every stage has an engine of its own.

    `packed` lays the weights of linear layers out for the processor, once for all stages: faster on CPUs, by how much
    depends on the processor and the precision (float32 or bfloat16), for a second copy of these weights in memory,
    which lives as long as they do. `cuda_graphs` captures every block of a model that is on a CUDA device and stays
    there (`captured.py`): less time between kernels, for a second copy of what enters and leaves a block. `mode` is
    torch.compile's; its modes that capture CUDA graphs are not offered, since one block's output would be overwritten
    by the next one's.
    """

    _: dataclasses.KW_ONLY
    packed: bool = False
    cuda_graphs: bool = False
    mode: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("packed", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidConfig(f"Compile's {name} is True or False, got {getattr(self, name)!r}")
        if self.cuda_graphs and self.tokens:
            raise InvalidConfig("a CUDA graph has one shape; leave tokens out of Compile(cuda_graphs=True)")
        if self.mode not in MODES:
            raise InvalidConfig(f"Compile's mode is one of {', '.join(MODES)}, got {self.mode!r}")

    def check(self, pipeline: Any, transformer: Any) -> None:
        super().check(pipeline, transformer)
        parameter = next(transformer.parameters(), None)
        device = torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
        if self.packed:
            refuse_unpackable(nn.Module(), device)
        if self.cuda_graphs and device.type != "cuda":
            raise UnsupportedModel(
                f"{self.describe()} captures what blocks launch on a CUDA device, and {type(transformer).__name__} is "
                f"on {device.type}; move it there first and leave it there (no offloading), or leave cuda_graphs out"
            )

    def build(self, call: PieceCall, folder: Path) -> Execute:
        shapes = self.shapes(call)
        if self.packed:
            refuse_unpackable(call.module, call.device)
        second_graph = tuple(error for name in _SECOND_GRAPH if (error := getattr(torch._dynamo.exc, name, None)))
        piece = _piece(self.tracing(call, folder, shapes=len(shapes), packed=self.packed))
        compiled = isolated(piece, mode=self.mode, dynamic=None if len(shapes) > 1 else False)
        with inductor_in(folder), following_tokens(call, shapes) as (args, kwargs):
            # Dynamo traces at the first call, so that is where building happens.
            compiled(call.module, args, kwargs)

        def execute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(shapes) > 1:
                stage_of(tensors_in([args, kwargs]), shapes)
            try:
                with nullcontext() if _BOUNDED else torch._dynamo.config.patch(error_on_recompile=True):
                    return compiled(module, args, kwargs)
            except second_graph as error:
                raise EngineMismatch(
                    f"{self.describe()} for {type(module).__name__} met something that was not there when it was "
                    f"built: {error}; change the model between runs, not in them"
                ) from error

        return Captures(execute) if self.cuda_graphs else execute


def _piece(tracing: Callable[[], AbstractContextManager[Any]]) -> Any:
    """Make the function that is compiled."""

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with tracing():
            return module(*args, **kwargs)

    return run


def isolated(function: Any, **options: Any) -> Any:
    """Compile a function in one graph, apart from every other engine.

    Dynamo keeps what it compiled with a function's code object, and few of them; so an engine has a code of its own.
    """
    own = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBERS)}"),
        function.__globals__,
        closure=function.__closure__,
    )
    if _BOUNDED:
        options |= {"isolate_recompiles": True, "recompile_limit": 1}
    return torch.compile(own, fullgraph=True, **options)


@contextmanager
def inductor_in(folder: Path) -> Iterator[None]:
    """Let Inductor keep what it makes in a folder, and take from there what it has made before."""
    before = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks on itself
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
