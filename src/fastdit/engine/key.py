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
    environment: str

    def to_json(self) -> dict[str, str]:
        """Give the key as plain texts."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value if isinstance(value, str) else outline_text(value) for name, value in values.items()}

    @functools.cached_property
    def digest(self) -> str:
        """The name under which the engine is kept."""
        return digest_of(self.to_json())


def environment_of(device: torch.device) -> str:
    """Write down what compilers bake into code besides the model: versions, device, threads, numeric switches."""
    parts: dict[str, object] = {
        "format": FORMAT,
        "fastdit": fastdit.__version__,
        "torch": torch.__version__,
        "diffusers": _diffusers(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled(device.type) and str(torch.get_autocast_dtype(device.type)),
        "attention": _attention_backend(),
    }
    if device.type == "cuda":
        cuda = torch.backends.cuda
        parts["device"] = (torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
        parts["cuda"] = torch.version.cuda
        parts["sdpa"] = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    else:
        parts["device"] = (device.type, torch.backends.cpu.get_cpu_capability(), _cpu_flags())
    return repr(sorted(parts.items()))


def _attention_backend() -> str:
    """Name diffusers' attention backend of the process, which a model without one of its own follows."""
    from diffusers.models import attention_dispatch

    backend, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    return str(backend)


@functools.cache
def _diffusers() -> str:
    return version("diffusers")


@functools.cache
def _cpu_flags() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
