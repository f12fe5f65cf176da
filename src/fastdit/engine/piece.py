"""A piece of a model, as an engine meets it: a call of it, and what runs such calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import torch
from torch import nn

from fastdit.engine.arguments import mapped, tensor_outline, tensors_in
from fastdit.structure import twin_with


@dataclasses.dataclass(frozen=True)
class PieceCall:
    """One call of a piece of a model: what an engine is built for, and what it runs.

    `stage` names the token layout of the picture, None where it is not known; `attention` names the kernel of the stack
    that answers the model's attention, "" where none does.
    """

    module: nn.Module
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = dataclasses.field(default_factory=dict)
    stage: tuple[Hashable, ...] | None = None
    attention: str = ""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in order."""
        return tensors_in((self.args, self.kwargs))

    @property
    def device(self) -> torch.device:
        """Where the call runs."""
        tensors = self.tensors
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def shape(self) -> str:
        """The largest tensor of the arguments, for a reader."""
        largest = max(self.tensors, key=torch.Tensor.numel, default=None)
        return "no tensors" if largest is None else str(tensor_outline(largest))

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PieceCall:
        """Give the call with `function` of each tensor in its place."""
        args, kwargs = mapped((self.args, self.kwargs), function)
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def apart(self) -> PieceCall:
        """Give the call of a copy of the piece, which shares its weights and nothing else that a build might touch.

        Tracing puts other tensors in the place of weights, and a trial run writes to whatever the piece counts in.
        """
        return dataclasses.replace(self, module=twin_with(self.module, _own))

    def run(self) -> object:
        """Run the piece as it is."""
        return self.module(*self.args, **self.kwargs)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if type(tensor) is torch.Tensor else tensor


#: What runs an engine: it gets a call of a module of the engine's structure, its tensors in canonical strides.
Execute = Callable[[PieceCall], object]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """List the blocks of a model's block lists."""
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
