"""The machine and the software that numbers were taken on; nothing that names the machine or its owner."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fastdit import __version__


@dataclass(frozen=True)
class Environment:
    """What a timing depends on. `accelerator` is the GPU's name, or None on a CPU.

    `system` names OpenMP's policy of waiting threads where one is set: threads that sleep between operations make a
    small model on a CPU much slower.
    """

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
            system=_system(),
            python=platform.python_version(),
            torch=torch.__version__,
            diffusers=version("diffusers"),
            fastdit=__version__,
            accelerator=torch.cuda.get_device_name(device) if kind == "cuda" else None if kind == "cpu" else kind,
        )

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        device = "" if self.accelerator is None else f"{self.accelerator}, "
        software = f"Python {self.python}, torch {self.torch}, diffusers {self.diffusers}, fastdit {self.fastdit}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{device}{self.cpu}, {threads}{memory}, {self.system}; {software}"


def _system() -> str:
    policy = os.environ.get("OMP_WAIT_POLICY")
    return f"{platform.system()} {platform.machine()}{'' if policy is None else f' with OMP_WAIT_POLICY={policy}'}"


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    if named := next((line for line in lines if line.startswith("model name")), None):
        return named.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return float(round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1))
