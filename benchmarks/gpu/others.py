"""What other libraries do to a pipeline, entered while a row runs, so that all rows share one set of weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from fastdit.structure import structural_twin
from gpu.rows import Cells, Rival, Row, plain


class CompiledBlocks:
    """The blocks that diffusers' `compile_repeated_blocks` compiled, in use while entered; kept between."""

    def __init__(self) -> None:
        self._calls: dict[torch.nn.Module, Any] = {}

    @contextmanager
    def __call__(self, pipeline: Any) -> Iterator[Any]:
        if not self._calls:
            pipeline.transformer.compile_repeated_blocks()
            modules = pipeline.transformer.modules()
            self._calls = {part: call for part in modules if (call := part._compiled_call_impl) is not None}
        for part, call in self._calls.items():
            part._compiled_call_impl = call
        try:
            yield pipeline
        finally:
            for part in self._calls:
                del part._compiled_call_impl  # the class has None


class Autotuned:
    """The whole transformer compiled, its kernels chosen by trial and captured as CUDA graphs, while entered."""

    def __init__(self) -> None:
        self._compiled: Any = None

    @contextmanager
    def __call__(self, pipeline: Any) -> Iterator[Any]:
        transformer = pipeline.transformer
        if self._compiled is None:
            self._compiled = torch.compile(transformer, mode="max-autotune")
        pipeline.transformer = self._compiled
        try:
            yield pipeline
        finally:
            pipeline.transformer = transformer


def hooked(config: str) -> Rival:
    """Give a rival of diffusers' own caches, at its defaults."""

    @contextmanager
    def entered(pipeline: Any) -> Iterator[Any]:
        import diffusers

        pipeline.transformer.enable_cache(getattr(diffusers, config)())
        try:
            yield pipeline
        finally:
            pipeline.transformer.disable_cache()

    return entered


@contextmanager
def cache_dit(pipeline: Any) -> Iterator[Any]:
    """Enter cache-dit at its defaults. It patches a pipeline's class and its transformer, so it gets copies of both.

    By default it compares after eight blocks, of which a tiny model has fewer.
    """
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")
    library: Any = import_module("cache_dit")
    own = copy.copy(pipeline)
    own.__class__ = type(type(pipeline).__name__, (type(pipeline),), {})
    own.transformer = structural_twin(pipeline.transformer, {})  # the same weights
    lists = (child for child in pipeline.transformer.children() if isinstance(child, torch.nn.ModuleList))
    compared = min(8, sum(map(len, lists)) - 1)
    library.enable_cache(own, cache_config=library.DBCacheConfig(Fn_compute_blocks=compared))
    try:
        yield own
    finally:
        library.disable_cache(own)


def rivals(cells: Cells) -> list[Row]:
    """List other libraries' rows beside fastdit's that they are to be compared with, the most telling first."""
    steps, cell = cells.steps, cells.cell
    return [
        plain(steps),
        plain(cells.fewer),
        Row("diffusers compile_repeated_blocks", None, steps, CompiledBlocks(), same=True),
        cell(engine="Compile"),
        Row("torch.compile max-autotune, CUDA graphs", None, steps, Autotuned(), same=True),
        cell(engine="CUDA graphs"),
        Row("diffusers FirstBlockCache", None, steps, hooked("FirstBlockCacheConfig")),
        Row("diffusers TaylorSeer", None, steps, hooked("TaylorSeerCacheConfig")),
        cell(masked=True),
        cell(engine="Compile", masked=True),
        cell(cells.fast, "Compile", masked=True),
        Row("cache-dit", None, steps, cache_dit),
        cell(engine="AOT"),
        *cells.adapters(),
    ]
