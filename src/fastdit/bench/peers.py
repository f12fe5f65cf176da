"""Other libraries' ways to make a pipeline faster, at their own defaults where the model has the blocks for them.

They change the pipeline, its transformer or its class, so each runs in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from fastdit.errors import FastditError


def _first_block_cache(pipeline: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def _taylor_seer(pipeline: Any) -> None:
    from diffusers import TaylorSeerCacheConfig

    pipeline.transformer.enable_cache(TaylorSeerCacheConfig())


def _compiled(pipeline: Any) -> None:
    pipeline.transformer.compile_repeated_blocks()


def _cache_dit(pipeline: Any) -> None:
    from torch.nn import ModuleList

    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")
    try:
        cache_dit: Any = import_module("cache_dit")
    except ImportError as error:
        raise FastditError("cache-dit is not installed; run: pip install cache-dit") from error
    # It knows a pipeline by its class's name, and patches that class: a subclass gets the name of what it is one of.
    own = next(cls for cls in type(pipeline).__mro__ if cls.__module__.startswith("diffusers."))
    pipeline.__class__ = type(own.__name__, (type(pipeline),), {})
    # By default 8 blocks are always computed; a model that has no more gets one, as with diffusers' FirstBlockCache.
    blocks = sum(len(one) for one in pipeline.transformer.children() if isinstance(one, ModuleList))
    few = {} if blocks > 8 else {"cache_config": cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0)}
    cache_dit.enable_cache(pipeline, **few)


PEERS: Mapping[str, Callable[[Any], None]] = {
    "diffusers FirstBlockCache": _first_block_cache,
    "diffusers TaylorSeer": _taylor_seer,
    "diffusers compile_repeated_blocks": _compiled,
    "cache-dit": _cache_dit,
}
"""What changes a pipeline in place, by name."""
