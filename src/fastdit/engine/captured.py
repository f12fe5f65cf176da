"""CUDA graphs by hand: all that a block launches is captured once and launched as one from then on.

    copy the arguments to where the graph reads them;   replay;   clone what it wrote

A capture holds the addresses of what it reads, the weights among them. So each block has its own of each engine, made
anew where a weight has moved; what is changed in place is seen. What the cache decides stays outside of every graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdit.engine.arguments import mapped, tensors_in
from fastdit.engine.base import Execute
from fastdit.nested import map_tensors

#: Runs before a capture, as torch.cuda.CUDAGraph asks for, so that nothing is set up inside of it.
_WARM_UPS = 2

#: Gives the output of a function and what writes it anew from the same memory.
Record = Callable[[Callable[[], Any], torch.device], tuple[Any, Callable[[], None]]]


class Captures:
    """Runs an engine's blocks by captures of them, which live as long as the blocks do."""

    def __init__(self, execute: Execute, record: Record | None = None) -> None:
        self._execute, self._record = execute, record or _CudaGraphs()
        self._blocks: weakref.WeakKeyDictionary[nn.Module, _Capture] = weakref.WeakKeyDictionary()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the output of a block, in memory of its own."""
        addresses = [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]
        found = self._blocks.get(module)
        if found is None or found.addresses != addresses:
            found = _Capture(self._execute, self._record, module, args, kwargs, addresses)
            self._blocks[module] = found
        return found.replay(args, kwargs)


class _Capture:
    """One block's capture, with the memory that its arguments are copied to."""

    def __init__(
        self,
        execute: Execute,
        record: Record,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        addresses: list[int],
    ) -> None:
        self.addresses = addresses
        own_args, own_kwargs = mapped(args, torch.clone), mapped(kwargs, torch.clone)
        self._arguments = tensors_in([own_args, own_kwargs])
        device = self._arguments[0].device
        self._output, self._replay = record(lambda: execute(module, own_args, own_kwargs), device)

    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for own, given in zip(self._arguments, tensors_in([args, kwargs]), strict=True):
            own.copy_(given)
        self._replay()
        return map_tensors(self._output, torch.clone)


class _CudaGraphs:
    """Captures functions. Their graphs share memory for what lies between arguments and output: they run in turns."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        with torch.cuda.device(device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = run()
        return output, graph.replay
