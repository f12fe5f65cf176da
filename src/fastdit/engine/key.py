"""What an engine is keyed by: everything that changes what it computes, or whether it can run here at all.

Whatever is left out of a key is a wrong picture without an error one day, so the module is described by its whole
structure (`fingerprint.py`) and the process by everything that compilers bake into code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
from collections.abc import Hashable
from importlib.metadata import version
from pathlib import Path

import torch

import fastdit
from fastdit.engine.arguments import outline_text
from fastdit.engine.sealed import digest_of

#: What an engine is built for besides a model and a call, by name.
Environment = tuple[tuple[str, Hashable], ...]

#: Raised whenever what is kept of an engine changes its meaning.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class EngineKey:
    """The key of one engine. `weights` is the checksum of those that are baked in, "" where they are not.

    `stage` names the picture's token layout (rows, columns, how they are split), None where it is not known.
    """

    engine: str
    settings: str
    piece: str
    structure: str
    weights: str
    arguments: Hashable
    stage: tuple[Hashable, ...] | None
    attention: str
    mode: str
    environment: Environment

    def to_json(self) -> dict[str, str]:
        """Give the key as plain texts."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value if isinstance(value, str) else outline_text(value) for name, value in values.items()}

    @functools.cached_property
    def digest(self) -> str:
        """The name under which the engine is kept."""
        return digest_of(self.to_json())


def environment_of(device: torch.device) -> Environment:
    """List what compilers bake into code besides the model: versions, device, and all switches of the process that
    Dynamo guards on or that choose another kernel. Cheap enough for every forward."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    reduced = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    return (
        *_machine(device),
        ("threads", torch.get_num_threads()),
        ("default", (torch.get_default_dtype(), torch.get_default_device())),
        ("deterministic", (*deterministic, torch._C._get_deterministic_fill_uninitialized_memory())),
        ("float32", _float32()),
        ("reduced precision", (*reduced, matmul.allow_fp16_accumulation)),
        ("autocast", tuple(map(_autocast, sorted({"cpu", "cuda", device.type})))),
        ("autocast cache", torch.is_autocast_cache_enabled()),
        ("attention", _attention()),
        ("convolution", (cudnn.benchmark, cudnn.deterministic)),
        ("functions", (torch._C._is_torch_function_enabled(), torch._C._is_torch_function_all_disabled())),
    )


@functools.cache
def _machine(device: torch.device) -> Environment:
    """List what stays as it is for the life of a process."""
    parts: list[tuple[str, Hashable]] = [
        ("format", FORMAT),
        ("fastdit", fastdit.__version__),
        ("torch", torch.__version__),
        ("diffusers", version("diffusers")),
        ("python", platform.python_version()),
        ("machine", platform.machine()),
    ]
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        parts += [("device", (name, capability)), ("cuda", torch.version.cuda)]
    else:
        parts += [("device", (device.type, torch.backends.cpu.get_cpu_capability(), _cpu_flags()))]
    return tuple(parts)


def _attention() -> tuple[Hashable, ...]:
    """Name diffusers' backend, which a model without one of its own follows, and what torch's own may choose from."""
    from diffusers.models import attention_dispatch

    cuda = torch.backends.cuda
    chosen, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    allowed = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    reduced = cuda.fp16_bf16_reduction_math_sdp_allowed()
    return str(chosen), *allowed, cuda.cudnn_sdp_enabled(), *torch._C._get_sdp_priority_order(), reduced


def _float32() -> tuple[str, ...]:
    """Name the precisions that products of float32 are computed in; what was never set is computed in its own.

    torch has two ways to set them, and what is read the older way is an error once the newer one was used.
    """
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    if read is None:
        return (torch.get_float32_matmul_precision(),)
    found = (read(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn"))
    return tuple("ieee" if precision == "none" else precision for precision in found)


def _autocast(kind: str) -> tuple[str, torch.dtype | None]:
    return kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _cpu_flags() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
