"""The machine and the software that numbers were taken on; nothing that names the machine or its owner."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """What a timing depends on. `accelerator` is the GPU's name, or None on a CPU."""

    cpu: str
    threads: int
    memory_gib: float | None
    system: str
    python: str
    torch: str
    diffusers: str
    fastdit: str
    accelerator: str | None = None

    @classmethod
    def capture(cls, device: str = "cpu") -> Environment:
        """Describe this machine, as torch sees it now."""
        import torch

        kind = torch.device(device).type
        return cls(
            cpu=_cpu_model(),
            threads=torch.get_num_threads(),
            memory_gib=_memory_gib(),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=torch.__version__,
            diffusers=version("diffusers"),
            fastdit=_own_version(),
            accelerator=torch.cuda.get_device_name(device) if kind == "cuda" else None if kind == "cpu" else kind,
        )

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        device = "" if self.accelerator is None else f"{self.accelerator}, "
        software = f"Python {self.python}, torch {self.torch}, diffusers {self.diffusers}, fastdit {self.fastdit}"
        return f"{device}{self.cpu}, {self.threads} threads{memory}, {self.system}; {software}"


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True
        ).stdout.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return float(round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1))


def _own_version() -> str:
    try:
        return version("fastdit")
    except PackageNotFoundError:
        return "not installed"
