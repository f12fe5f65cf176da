"""AOTInductor packages for the blocks of a model: one for each kind of block and stage, loaded without any tracing.

    engine(block, x) = shared object compiled for type(block) at x's shape, its constants = the block's own weights

A package holds no weights. Every block has a runner of its own, whose constants are the module's tensors themselves, so
an in-place change (a LoRA that is fused) is seen at the next call, and tensors that are replaced are bound anew. The
compiled code checks nothing of its arguments and gives wrong numbers for a wrong stride; what keeps calls apart
is their key.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from fastdit.config import register
from fastdit.engine.compile import inductor_in
from fastdit.engine.flat import Flat, Output
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.processor import ProcessorEngine
from fastdit.errors import EngineMismatch, UnsupportedModel

_PACKAGE, _CONSTANTS = "piece.pt2", "constants.safetensors"
_PREFIX = "piece."

#: Weights stay outside, and none is taken for the number that all of it happens to be.
_OUTSIDE = {"aot_inductor.package_constants_in_so": False, "joint_graph_constant_folding": False}

#: Inductor writes numbers, and vectors of up to so many elements, into the code unless it is told to keep them.
_SMALL = 8


@register
@dataclasses.dataclass(frozen=True)
class AOT(ProcessorEngine):
    """Run blocks from packages that AOTInductor compiled ahead of time, which are loaded without any tracing.

    A second process starts in seconds. Packages hold no weights: all blocks of a kind share one, and a LoRA that is
    loaded, scaled or fused is seen. The arithmetic is the model's in another order, as `Compile`'s.

    Args:
        on_failure: "error", or "eager" to run a piece that can't be built as it is.
        attention: "fastest", or "torch" to leave attention on a CPU to torch's own kernel.
        directory: where packages are kept, ~/.cache/fastdit/engines unless given.

    Raises:
        InvalidConfig: for other values.
        UnsupportedModel: from `accelerate`, where this torch can't make packages without weights.
        EngineBuildFailed: from a call, where a block can't be exported, has weights of a class of its own (quantised
            ones), or gives something else than tensors, and `on_failure` is "error".

    >>> AOT(on_failure="eager").describe()
    "AOT(on_failure='eager')"
    """

    def check(self, pipeline: object, transformer: nn.Module) -> None:
        if not hasattr(torch._inductor.config.aot_inductor, "package_constants_in_so"):
            raise UnsupportedModel(
                f"AOT needs a torch whose packages can go without weights, and this is {torch.__version__}; take a "
                "newer one, or Compile()"
            )

    def build(self, call: PieceCall, folder: Path) -> Execute:
        if not (folder / _PACKAGE).exists():
            _package(call, folder, self.tracing(call, folder))
        packaged = _Packaged(folder, call)
        packaged.bound(call.module)  # what can't be loaded is found here, not in the middle of a run
        return packaged.execute


def _package(call: PieceCall, folder: Path, tracing: Callable[[], AbstractContextManager[object]]) -> None:
    """Compile a piece and write its package, the shape of its output, and what it holds besides weights."""
    for name, tensor in _tensors(call.module):
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise UnsupportedModel(
                f"its weight {name} is a {type(tensor).__name__}, the parts of which a package can't be given; take "
                "Compile()"
            )
    Output.keep(call.run(), folder)
    with inductor_in(folder.with_suffix(".work")):
        with tracing():
            exported = torch.export.export(Flat(call), tuple(call.tensors))
        own = dict(_tensors(call.module))
        lifted = {
            name: value.detach().contiguous()
            for name, value in exported.constants.items()
            if isinstance(value, torch.Tensor) and name.removeprefix(_PREFIX) not in own
        }
        keep = any(tensor.numel() <= _SMALL for tensor in own.values())
        if keep and (unnamed := [name for name, value in lifted.items() if value.numel() <= _SMALL]):
            # Kept numbers that are no weights lose their names; written into the code, so would the small weights be.
            raise UnsupportedModel(
                f"it has weights of a few elements, and numbers that it keeps as tensors besides ({unnamed[0]}), which "
                "a package can't tell apart; take Compile()"
            )
        torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(folder / _PACKAGE),
            inductor_configs={**_OUTSIDE, "always_keep_tensor_constants": keep},
        )
    if lifted:
        from safetensors.torch import save_file

        save_file(lifted, folder / _CONSTANTS)


class _Packaged:
    """A package and its runners, one for each module that it has been called with."""

    def __init__(self, folder: Path, call: PieceCall) -> None:
        self._package = str(folder / _PACKAGE)
        self._device = call.device
        self._output = Output(folder)
        self._lifted: dict[str, torch.Tensor] = {}
        if (folder / _CONSTANTS).exists():
            from safetensors.torch import load_file

            self._lifted = load_file(folder / _CONSTANTS, device=str(call.device))
        self._outlines = {name: _outline(tensor) for name, tensor in _tensors(call.module)}
        self._runners: weakref.WeakKeyDictionary[nn.Module, _Runner] = weakref.WeakKeyDictionary()

    def execute(self, call: PieceCall) -> object:
        return self._output.of(self.bound(call.module).run(call.tensors))

    def bound(self, module: nn.Module) -> _Runner:
        """Give the runner of a module, with the tensors that the module has now."""
        runner = self._runners.get(module)
        if runner is None:
            try:
                runner = _Runner(self._package, self._device)
            except (RuntimeError, OSError) as error:
                raise EngineMismatch(
                    f"AOT for {type(module).__name__}: the package can't be loaded ({error}); it is unpacked among "
                    "the temporary files, where there may be no room"
                ) from error
            self._runners[module] = runner
        if not runner.bound:
            tensors = dict(_tensors(module))
            for name, tensor in tensors.items():
                if _outline(tensor) != self._outlines.get(name):
                    raise EngineMismatch(
                        f"AOT for {type(module).__name__}: the weight {name} is {_outline(tensor)} and was "
                        f"{self._outlines.get(name)} when it was built; change the model between runs, not in them"
                    )
            runner.bind(module, {**self._lifted, **{_PREFIX + name: tensor for name, tensor in tensors.items()}})
        return runner


class _Runner:
    """Compiled code with the tensors of one module as its constants. It holds them: the code has their addresses."""

    def __init__(self, package: str, device: torch.device) -> None:
        # The loader runs a probe of the processor, which it finds in Inductor's folder or compiles there.
        with inductor_in(Path(package).parent.with_suffix(".work")):
            self._model = torch._inductor.aoti_load_package(
                package, device_index=-1 if device.index is None else device.index
            )
        self._names = self._model.get_constant_fqns()
        self._held: list[tuple[Mapping[str, torch.Tensor | None], str, torch.Tensor, int]] = []

    @property
    def bound(self) -> bool:
        """Whether the module's tensors are still those that the code has the addresses of."""
        return bool(self._held) and all(
            place.get(name) is tensor and tensor.data_ptr() == address for place, name, tensor, address in self._held
        )

    def bind(self, module: nn.Module, constants: Mapping[str, torch.Tensor]) -> None:
        """Make the module's tensors the constants."""
        needed = {name: constants[name].detach() for name in self._names}
        self._model.load_constants(needed, check_full_update=True, user_managed=True)
        self._constants = needed
        self._held = [
            (place, name, tensor, tensor.data_ptr())
            for part in module.modules()
            for place in (part._parameters, part._buffers)
            for name, tensor in place.items()
            if tensor is not None
        ]

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the code."""
        outputs: list[torch.Tensor] = self._model.loader.boxed_run(tensors)
        return outputs


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _outline(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
