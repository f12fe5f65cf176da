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
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastdit.config import register
from fastdit.engine.captured import Captures
from fastdit.engine.inductor import forget_other_builds, inductor_in
from fastdit.engine.packed import refuse_unpackable
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.processor import ProcessorEngine
from fastdit.engine.staged import StagedEngine, following_tokens, stage_of
from fastdit.errors import EngineMismatch, InvalidConfig, UnsupportedModel
from fastdit.process import switching

_NUMBERS = itertools.count()

#: When the graph was compiled. Where that has to be done again, what is kept is of no use.
_COMPILED = "compiled.txt"

#: Whether torch.compile can itself bound a function to one graph; older ones are told not to compile again.
_BOUNDED = {"isolate_recompiles", "recompile_limit"} <= set(inspect.signature(torch.compile).parameters)

#: What Dynamo raises where a call needs a second graph, by its names in different versions.
_SECOND_GRAPH = ("FailOnRecompileLimitHit", "RecompileError")


@register
@dataclasses.dataclass(frozen=True)
class Compile(StagedEngine, ProcessorEngine):
    """Run blocks as compiled by Inductor, each kind of block in one graph or not at all.

    The arithmetic is the model's, in another order: outputs agree to rounding and are not bit-equal. `warmup` builds
    all that a call needs, seconds to minutes for each kind of block and stage, and a later process finds it on disk. A
    model that takes prompts at their own length (Qwen-Image) needs engines for each length.

    Args:
        tokens: the numbers of image tokens of the run's stages, such as (1024, 4096): one graph for all of them, in
            which the number of tokens is a variable, and attention is torch's. Without it every stage has an engine of
            its own, which is faster to run and takes longer to build.
        packed: lay the weights of linear layers out for the processor, once for all stages: faster on CPUs, by how much
            depends on the processor and the precision (float32 or bfloat16), for a second copy of these weights in
            memory, which lives as long as they do.
        cuda_graphs: capture every block of a model that is on a CUDA device and stays there: less time between kernels,
            for a second copy of what enters and leaves a block.
        on_failure: "error", or "eager" to run a piece that can't be built as it is.

    To tinker with:
        mode: torch.compile's; its modes that capture CUDA graphs are not offered, since one block's output would be
            overwritten by the next one's.
        attention: "fastest", or "torch" to leave attention on a CPU to torch's own kernel.
        directory: where engines are kept, ~/.cache/fastdit/engines unless given.

    Raises:
        InvalidConfig: for other values, and for `cuda_graphs` beside `tokens`, since a captured graph has one shape.
        UnsupportedModel: from `accelerate`, where the model is not on a device that `packed` or `cuda_graphs` is for.
        EngineBuildFailed: from a call, where a block can't be compiled in one graph and `on_failure` is "error".

    >>> from fastdit import RALU, Compile, Stack, TeaCache
    >>> stack = Stack([RALU("4x"), TeaCache(0.25, "flux-dev"), Compile()])
    >>> Compile(tokens=(1024, 4096)).describe()
    'Compile(tokens=(1024, 4096))'
    """

    _: dataclasses.KW_ONLY
    packed: bool = False
    cuda_graphs: bool = False
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"

    def check_values(self) -> None:
        super().check_values()
        if self.cuda_graphs and self.tokens:
            raise InvalidConfig("a CUDA graph has one shape; leave tokens out of Compile(cuda_graphs=True)")

    def check(self, pipeline: object, transformer: nn.Module) -> None:
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
        tracing = self.tracing(call, folder, shapes=len(shapes), packed=self.packed)
        compiled = isolated(piece_under(tracing), mode=self.mode, dynamic=None if len(shapes) > 1 else False)
        with inductor_in(folder), following_tokens(call, shapes) as first:
            # Dynamo traces at the first call, so that is where building happens.
            if not (folder / _COMPILED).exists():
                forget_other_builds()
            traced, found = _graphs()
            compiled(first.module, first.args, first.kwargs)
            if _graphs()[0] == traced:
                raise UnsupportedModel("torch.compile is switched off in this process (a stance, or its configuration)")
            if _graphs()[1] == found:
                (folder / _COMPILED).write_text(f"{time.time_ns()}\n", encoding="utf-8")

        def execute(call: PieceCall) -> object:
            if len(shapes) > 1:
                stage_of(call.tensors, shapes)
            try:
                with nullcontext() if _BOUNDED else _no_second_graph():
                    return compiled(call.module, call.args, call.kwargs)
            except second_graph as error:
                raise EngineMismatch(
                    f"{self.describe()} for {type(call.module).__name__} met something that was not there when it was "
                    f"built: {error}; change the model between runs, not in them"
                ) from error

        return Captures(execute) if self.cuda_graphs else execute


def _graphs() -> tuple[int, int]:
    """Count the graphs of this process that were traced, and those found among what was compiled before."""
    from torch._dynamo.utils import counters

    found = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    return counters["stats"]["unique_graphs"], found


_Piece = Callable[[nn.Module, tuple[object, ...], Mapping[str, object]], object]


def piece_under(tracing: Callable[[], AbstractContextManager[object]]) -> _Piece:
    """Give what is compiled: a call of a module, traced under what answers its operations."""

    def piece(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        with tracing():
            return module(*args, **kwargs)

    return piece


def isolated(
    function: _Piece, *, mode: str, dynamic: bool | None, backend: str | Callable[..., Any] = "inductor"
) -> _Piece:
    """Compile a function in one graph, apart from every other engine.

    Dynamo keeps what it compiled with a function's code object, and few of them; so an engine has a code of its own.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBERS)}")
    own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    bounds: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": 1} if _BOUNDED else {}
    compiled: _Piece = torch.compile(own, fullgraph=True, mode=mode, dynamic=dynamic, backend=backend, **bounds)
    return compiled


@contextmanager
def _no_second_graph() -> Iterator[None]:
    """Let Dynamo refuse to compile again, which older versions are told by a switch of the process."""
    with switching(), torch._dynamo.config.patch(error_on_recompile=True):
        yield
