"""AOTInductor packages for the blocks of a model: one for each kind of block and stage, loaded without any tracing.

    engine(block, x) = shared object compiled for type(block) at x's shape, its constants = the block's own weights

A package holds no weights. Every block has a runner of its own, whose constants are the module's tensors themselves, so
an in-place change (a LoRA that is fused) is seen at the next call, and tensors that are replaced are bound anew. The
compiled code checks nothing of its arguments and gives wrong numbers for a wrong stride; what keeps calls apart
is their key.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from fastdit.config import register
from fastdit.engine.flat import Flat, Output
from fastdit.engine.inductor import inductor_in
from fastdit.engine.packaged import CONSTANTS, PACKAGE, PREFIX, Packaged, tensors_of_module
from fastdit.engine.piece import Execute, PieceCall
from fastdit.engine.processor import ProcessorEngine
from fastdit.errors import UnsupportedModel

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
        if not (folder / PACKAGE).exists():
            _package(call, folder, self.tracing(call, folder))
        return Packaged(folder, call).execute


def _package(call: PieceCall, folder: Path, tracing: Callable[[], AbstractContextManager[object]]) -> None:
    """Compile a piece and write its package, the shape of its output, and what it holds besides weights."""
    for name, tensor in tensors_of_module(call.module):
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise UnsupportedModel(
                f"its weight {name} is a {type(tensor).__name__}, the parts of which a package can't be given; take "
                "Compile()"
            )
    Output.keep(call.run(), folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as work, inductor_in(Path(work)):
        with tracing():
            exported = torch.export.export(Flat(call), tuple(call.tensors))
        own = dict(tensors_of_module(call.module))
        lifted = {
            name: value.detach().contiguous()
            for name, value in exported.constants.items()
            if isinstance(value, torch.Tensor) and name.removeprefix(PREFIX) not in own
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
            package_path=str(folder / PACKAGE),
            inductor_configs={**_OUTSIDE, "always_keep_tensor_constants": keep},
        )
    if lifted:
        from safetensors.torch import save_file

        save_file(lifted, folder / CONSTANTS)
