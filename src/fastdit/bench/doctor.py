"""What can work here: versions, devices, compilers, and what every accelerator says to a pipeline.

Nothing is guessed from names: an accelerator works if `accelerate` takes it for the pipeline, and what it answers
otherwise is the reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from typing import Any

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator
from fastdit.config import find_type, known_types
from fastdit.errors import FastditError
from fastdit.measure.environment import Environment

#: Adapters, by what they install.
ADAPTERS = {
    "OpenVINO": "fastdit-openvino",
    "Quantize": "fastdit-torchao",
    "TensorRT": "fastdit-tensorrt",
    "XFormers": "fastdit-xformers",
}

#: Arguments of accelerators that can't do without.
_EXAMPLES: dict[str, dict[str, Any]] = {"StepMask": {"mask": (1, 0)}}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` is the command or the change that mends it, if anything is wrong."""

    what: str
    works: bool
    told: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'ok' if self.works else 'no':3} {self.what}: {self.told}{f' -> {self.remedy}' if self.remedy else ''}"


def environment() -> Iterator[Finding]:
    """Look at what fastdit runs on."""
    import torch

    yield Finding("machine", True, str(Environment.capture("cuda" if torch.cuda.is_available() else "cpu")))
    yield from _requirements()
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        told = "OMP_WAIT_POLICY=PASSIVE: they sleep between operations, which small models feel"
        yield Finding("threads", False, told, "unset it, unless several processes share these cores")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("GPU", True, ", ".join(names))
        triton = find_spec("triton") is not None
        yield Finding(
            "compiler", triton, "Triton" if triton else "none for CUDA", "" if triton else "pip install triton"
        )
    else:
        told = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        yield Finding("GPU", False, told, "run on the CPU, or install torch's CUDA build and a driver")
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "cl")), None)
        yield Finding(
            "compiler",
            compiler is not None,
            f"{compiler}, for Compile and AOT" if compiler else "no C++ compiler, which Compile and AOT need on a CPU",
            "" if compiler else "install g++, or name one in $CXX",
        )
    for extra, packages in {"demo": ("torchmetrics", "jinja2")}.items():
        missing = [package for package in packages if find_spec(package) is None]
        told = "installed" if not missing else f"{', '.join(missing)} missing"
        yield Finding(f"extra {extra}", not missing, told, f"pip install 'fastdit[{extra}]'" if missing else "")
    installed = {entry.name for entry in entry_points(group="fastdit.accelerators")}
    for name, package in ADAPTERS.items():
        there = name in installed
        yield Finding(package, there, "installed" if there else "not there", "" if there else f"pip install {package}")


def _requirements() -> Iterator[Finding]:
    """Compare what is installed with what fastdit asks for."""
    from packaging.requirements import Requirement

    for line in requires("fastdit") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, False, "missing", f"pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            told = f"{found}, and fastdit needs {requirement.specifier}"
            yield Finding(requirement.name, False, told, f"pip install '{requirement}'")


def accelerators(pipeline: Any) -> Iterator[Finding]:
    """Ask every accelerator whether it can act on a pipeline, adapters' and attention kernels among them."""
    for made in every_accelerator():
        if isinstance(made, Finding):
            yield made
            continue
        try:
            accelerate(pipeline, [made])
        except FastditError as error:
            yield Finding(made.describe(), False, str(error).removeprefix(f"{made.describe()}").lstrip(": "))
        else:
            yield Finding(made.describe(), True, made.level.value)


def every_accelerator() -> Iterator[Accelerator | Finding]:
    """Make one of every accelerator that is installed, with what it can't do without; say of others why not."""
    find_type("")  # the library's own are registered with that
    names = dict.fromkeys([*known_types(), *(entry.name for entry in entry_points(group="fastdit.accelerators"))])
    for name in names:
        try:
            cls = find_type(name)
        except FastditError as error:
            yield Finding(name, False, str(error))
            continue
        if cls is None or not issubclass(cls, Accelerator):
            continue
        if name == "Attention":
            yield from map(cls, _backends())
        else:
            yield cls(**_EXAMPLES.get(name, {}))


def _backends() -> list[str]:
    """Give the attention kernels of diffusers that are no downloads."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [name.value for name in AttentionBackendName if not name.value.endswith("_hub")]
