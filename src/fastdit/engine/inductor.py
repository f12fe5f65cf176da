"""Inductor's files: where it keeps what it makes, and that all of it lies there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastdit.engine.scratch import scratch
from fastdit.process import environment, undoing, unheard_warnings

#: Inductor's switches for compiling headers once, by their names in different versions.
_COMPILED_HEADERS = ("cpp_cache_precompile_headers", "aot_inductor.precompile_headers")

#: What is among Inductor's settings and is none: it writes there what it has found out about the last build's machine,
#: and finds no graph of before once that is another one.
WRITTEN = ("aot_inductor.metadata",)

#: Where Inductor keeps compiled headers, and what makes them.
_HEADER_FOLDERS, _HEADER_MAKER = ("_HEADER_DIR", "_HEADER_LOCK_DIR"), "_precompile_header"


def forget_other_builds() -> None:
    """Let Inductor write all that an engine needs: what it holds in memory of another one it would not write again.

    So it is with the vector instructions that it found to work here: a new process would try them once more, and begin
    without what was found of bfloat16's.
    """
    from torch._inductor import cpu_vec_isa
    from torch._inductor.utils import clear_inductor_caches

    clear_inductor_caches()
    kinds = [kind for kind in vars(cpu_vec_isa).values() if isinstance(kind, type)]
    for held in (*vars(cpu_vec_isa).values(), *(member for kind in kinds for member in vars(kind).values())):
        if hasattr(held, "cache_clear"):
            held.cache_clear()
    for isa in getattr(cpu_vec_isa, "supported_vec_isa_list", ()):
        for name in [name for name in vars(isa) if name.startswith("_is_") and name.endswith("_supported")]:
            setattr(isa, name, getattr(type(isa), name))


@contextmanager
def inductor_in(folder: Path) -> Iterator[None]:
    """Let Inductor keep what it makes in a folder, and take from there what it has made before.

    Inductor is told of the folder by the process's environment, so one thread at a time is here.
    """
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    config: Any = torch._inductor.config
    empty: dict[str, dict[str, str]] = {name: {} for name in WRITTEN if name in config._config}
    with environment(folders), unheard_warnings(), _headers(), config.patch(empty):  # unheard: its remarks on itself
        yield


@contextmanager
def _headers() -> Iterator[None]:
    """Let Inductor compile the headers of its C++ code once in a process: half of what a build takes.

    It would take them from a folder of all processes, whoever has made that; so they lie in this process's own. Where
    a version of torch has no such folder by a known name, none are compiled.
    """
    from torch._inductor import codecache

    names = *_HEADER_FOLDERS, _HEADER_MAKER
    before = {name: vars(codecache)[name] for name in names if name in vars(codecache)}
    if len(before) < len(names):
        config: Any = torch._inductor.config
        with config.patch({name: False for name in _COMPILED_HEADERS if name in config._config}):
            yield
        return
    own = scratch() / "headers"

    def restore() -> None:
        vars(codecache).update(before)

    with undoing(restore):
        vars(codecache).update(zip(names, (str(own), str(own / "locks"), _maker(own)), strict=True))
        yield


@cache
def _maker(folder: Path) -> Callable[..., str]:
    """Give what makes headers in a folder. Torch's own remembers what it made in another one."""
    from torch._inductor import codecache

    maker: Callable[..., str] = vars(codecache)[_HEADER_MAKER].__wrapped__
    return cache(maker)
