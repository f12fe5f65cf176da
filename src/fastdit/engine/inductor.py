"""Inductor's files: where it keeps what it makes, and that all of it lies there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdit.process import environment, unheard_warnings

#: Inductor's switches for headers that are compiled once for all processes, by their names in different versions.
_SHARED_HEADERS = ("cpp_cache_precompile_headers", "aot_inductor.precompile_headers")


def forget_other_builds() -> None:
    """Let Inductor write all that an engine needs: what it holds in memory of another one it would not write again.

    So it is with the vector instructions that it found to work here: a new process would try them once more.
    """
    from torch._inductor import cpu_vec_isa
    from torch._inductor.utils import clear_inductor_caches

    clear_inductor_caches()
    kinds = [kind for kind in vars(cpu_vec_isa).values() if isinstance(kind, type)]
    for held in (*vars(cpu_vec_isa).values(), *(member for kind in kinds for member in vars(kind).values())):
        if hasattr(held, "cache_clear"):
            held.cache_clear()


@contextmanager
def inductor_in(folder: Path) -> Iterator[None]:
    """Let Inductor keep what it makes in a folder, and take from there what it has made before.

    Inductor is told of the folder by the process's environment, so one thread at a time is here. Headers that it has
    compiled before it takes from a folder of all processes, whoever has made that; so it compiles none.
    """
    config: Any = torch._inductor.config
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    shared = {name: False for name in _SHARED_HEADERS if name in config._config}
    with environment(folders), unheard_warnings(), config.patch(shared):  # the compiler's remarks on itself
        yield
