"""CUDA graphs by hand: all that a block launches is captured once and launched as one from then on.

    copy the arguments to where the graph reads them;   replay;   clone what it wrote

A capture holds the addresses of what it reads, the weights among them. So each block has its own of each engine, made
anew where a weight has moved; what is changed in place is seen. What the cache decides stays outside of every graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdit.engine.piece import Execute, PieceCall
from fastdit.nested import map_tensors

#: Runs before a capture, as torch.cuda.CUDAGraph asks for, so that nothing is set up inside of it.
_WARM_UPS = 2

#: Gives the output of a function and what writes it anew from the same memory.
Record = Callable[[Callable[[], object], torch.device], tuple[object, Callable[[], None]]]


class Captures:
    """Runs an engine's blocks by captures of them, which live as long as the blocks do."""

    def __init__(self, execute: Execute, record: Record | None = None) -> None:
        self._execute, self._record = execute, record or _CudaGraphs()
        self._turn = threading.Lock()  # twins in several threads share an engine, and with it the memory of its blocks
        self._blocks: weakref.WeakKeyDictionary[nn.Module, _Capture] = weakref.WeakKeyDictionary()

    def __call__(self, call: PieceCall) -> object:
        """Give the output of a block, in memory of its own."""
        addresses = [tensor.data_ptr() for tensor in (*call.module.parameters(), *call.module.buffers())]
        with self._turn:
            found = self._blocks.get(call.module)
            if found is None or found.addresses != addresses:
                found = self._blocks[call.module] = _Capture(self._execute, self._record, call, addresses)
            return found.replay(call)


class _Capture:
    """One block's capture, with the memory that its arguments are copied to."""

    def __init__(self, execute: Execute, record: Record, call: PieceCall, addresses: list[int]) -> None:
        self.addresses = addresses
        own = call.mapped(torch.clone)
        self._arguments = own.tensors
        self._output, self._replay = record(lambda: execute(own), own.device)

    def replay(self, call: PieceCall) -> object:
        for own, given in zip(self._arguments, call.tensors, strict=True):
            own.copy_(given)
        self._replay()
        output: object = map_tensors(self._output, torch.clone)
        return output


class _CudaGraphs:
    """Captures functions. Their graphs share memory for what lies between arguments and output: they run in turns."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], object], device: torch.device) -> tuple[object, Callable[[], None]]:
        with torch.cuda.device(device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # "global" would make calls of CUDA in other threads fail meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = run()
        return output, graph.replay
