"""AOTInductor's packages as they run: their code, loaded once a process, and the weights of each module beside it.

A module's weights are the code's constants by their addresses alone. torch keeps every tensor that was ever a constant,
so what it gets are tensors that keep no memory, and whether the memory is still the module's is seen at each call.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdit.engine.flat import Output
from fastdit.engine.piece import PieceCall
from fastdit.engine.scratch import scratch
from fastdit.errors import EngineMismatch, UnsupportedModel

#: The files of an engine, and by what the names of a package's constants begin.
PACKAGE, CONSTANTS = "piece.pt2", "constants.safetensors"
PREFIX = "piece."

#: Where the code lies in a package.
_MODEL = "/data/aotinductor/model/"


class Packaged:
    """A package and its runners, one for each module that it has been called with."""

    def __init__(self, folder: Path, call: PieceCall) -> None:
        self._code = _unpacked(folder / PACKAGE)
        self._device = call.device
        self._output = Output(folder)
        self._lifted: dict[str, torch.Tensor] = {}
        if (folder / CONSTANTS).exists():
            from safetensors.torch import load_file

            self._lifted = load_file(folder / CONSTANTS, device=str(call.device))
        self._outlines = {name: _outline(tensor) for name, tensor in tensors_of_module(call.module)}
        self._runners: weakref.WeakKeyDictionary[nn.Module, _Runner] = weakref.WeakKeyDictionary()
        self._spare: _Runner | None = _Runner(self._code, self._device)  # what can't be loaded is found here

    def execute(self, call: PieceCall) -> object:
        return self._output.of(self._bound(call.module).run(call.tensors))

    def _bound(self, module: nn.Module) -> _Runner:
        """Give the runner of a module, with the tensors that the module has now."""
        runner = self._runners.get(module)
        if runner is None:
            spare, self._spare = self._spare, None
            runner = self._runners[module] = spare or _Runner(self._code, self._device)
        if not runner.bound:
            tensors = dict(tensors_of_module(module))
            for name, tensor in tensors.items():
                if _outline(tensor) != self._outlines.get(name):
                    raise EngineMismatch(
                        f"AOT for {type(module).__name__}: the weight {name} is {_outline(tensor)} and was "
                        f"{self._outlines.get(name)} when it was built; change the model between runs, not in them"
                    )
            runner.bind(module, {**self._lifted, **{PREFIX + name: tensor for name, tensor in tensors.items()}})
        return runner


def _unpacked(package: Path) -> Path:
    """Give the code of a package, as a file of this process that there is once for each code.

    Compilers write code such as a system never unloads, and a second file of the same would be loaded beside it.
    """
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if _MODEL in name]
        (code,) = (name for name in names if name.endswith(".so"))
        place = scratch() / f"code-{hashlib.sha256(archive.read(code)).hexdigest()}"
        if not place.exists():
            written = place.with_suffix(".partial")
            written.mkdir(exist_ok=True)
            for name in names:
                (written / Path(name).name).write_bytes(archive.read(name))
            os.replace(written, place)
    return place / Path(code).name


class _Runner:
    """Compiled code with the tensors of one module as its constants. It has their addresses, and does not keep them."""

    def __init__(self, code: Path, device: torch.device) -> None:
        kind = getattr(torch._C._aoti, f"AOTIModelContainerRunner{device.type.capitalize()}", None)
        if kind is None:
            raise UnsupportedModel(f"this torch runs no packages on {device.type}; take Compile()")
        self._model: Any = kind(str(code), 1, *(() if device.type == "cpu" else (str(device), str(code.parent))))
        self._names: dict[str, str] = self._model.get_constant_names_to_original_fqns()
        self._constants: dict[str, torch.Tensor] = {}
        self._bound: list[tuple[Mapping[str, torch.Tensor | None], str, weakref.ref[torch.Tensor], int]] = []

    @property
    def bound(self) -> bool:
        """Whether the module's tensors are still those that the code has the addresses of."""
        return bool(self._bound) and all(
            (tensor := place.get(name)) is not None and known() is tensor and tensor.data_ptr() == address
            for place, name, known, address in self._bound
        )

    def bind(self, module: nn.Module, constants: Mapping[str, torch.Tensor]) -> None:
        """Make the module's tensors the constants."""
        for name, original in self._names.items():
            self._constants[name] = _borrowed(constants[original], self._constants.get(name))
        use_inactive, validate_full_updates, user_managed = False, True, True
        self._model.update_constant_buffer(self._constants, use_inactive, validate_full_updates, user_managed)
        self._bound = [
            (place, name, weakref.ref(tensor), tensor.data_ptr())
            for part in module.modules()
            for place in (part._parameters, part._buffers)
            for name, tensor in place.items()
            if tensor is not None
        ]

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the code."""
        outputs: list[torch.Tensor] = self._model.run(tensors)
        return outputs


def _borrowed(tensor: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Give a tensor of the same memory that does not keep it: torch keeps all that was ever a constant.

    The one `before` serves again. What is kept for every move, among weights that go, leaves gaps that none fit in.
    """
    size = int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())
    memory = torch._C._construct_storage_from_data_pointer(tensor.data_ptr(), tensor.device, size)
    with torch.inference_mode(False):  # the next move may come outside of it
        borrowed = torch.empty(0, dtype=tensor.dtype, device=tensor.device) if before is None else before
        return borrowed.set_(memory, 0, tensor.shape, tensor.stride())


def tensors_of_module(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """List the weights and buffers of a module by name, those of two names twice."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _outline(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
