"""An engine that was built, and what it refuses: calls it was not built for, gradients, what compiled code leaves out.

Inside a run the workshop finds the engine by everything that its key holds, so what is checked here is checked for
whoever calls an engine by hand.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastdit.blocks.attention import KernelMode
from fastdit.engine.arguments import differences, is_canonical
from fastdit.engine.key import EngineKey
from fastdit.engine.piece import Execute, PieceCall
from fastdit.errors import EngineMismatch

if TYPE_CHECKING:
    from fastdit.engine.base import Engine

#: What may differ in a key besides the arguments, and how that is said.
_DEVIATIONS = {
    "piece": "it is a {found}",
    "structure": "the module's structure differs (layers, attributes, LoRA, shapes of weights)",
    "weights": "the weights are no longer those that were baked in",
    "stage": "the stage is {found} instead of {expected}",
    "attention": "attention is by {found!r} instead of {expected!r}",
    "mode": "the mode is {found} instead of {expected}",
    "environment": "the process differs (versions, threads, device, numeric switches)",
    "settings": "the engine's settings differ",
}


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine for one key. Calling it checks everything that the key holds; `execute` runs it unchecked.

    `kept` says that it was found on disk.
    """

    key: EngineKey
    engine: Engine
    execute: Execute = dataclasses.field(repr=False)
    kept: bool

    def __call__(self, call: PieceCall) -> object:
        """Run a call. Raises `EngineMismatch`, naming what differs, for one that the engine was not built for."""
        refuse_gradients()
        for position, tensor in enumerate(call.tensors):
            if not is_canonical(tensor):
                raise EngineMismatch(
                    f"{self.engine.describe()} for {self.key.piece}: tensor {position} of the arguments has strides "
                    f"{tensor.stride()}, and engines take row-major tensors; pass the call's "
                    "`mapped(fastdit.engine.arguments.canonical)`"
                )
        found = self.engine.key(call)
        if found != self.key:
            raise EngineMismatch(
                f"{self.engine.describe()} was built for another call of {self.key.piece}: "
                f"{'; '.join(_deviations(self.key, found))}; build an engine for this one"
            )
        return self.execute(call)


def _deviations(expected: EngineKey, found: EngineKey) -> list[str]:
    """Say in what a call's key differs from an engine's."""
    fields = {name: (getattr(expected, name), getattr(found, name)) for name in _DEVIATIONS}
    return [*differences(expected.arguments, found.arguments)] + [
        _DEVIATIONS[name].format(expected=one, found=other) for name, (one, other) in fields.items() if one != other
    ]


def refuse_gradients() -> None:
    """Raise `EngineMismatch` where gradients are recorded, which engines don't give."""
    if torch.is_grad_enabled():
        raise EngineMismatch("an engine gives no gradients; call the module under torch.no_grad()")


def answering_kernel() -> KernelMode | None:
    """Give the stack's attention kernel that answers the model's attention; it is compiled in.

    Raises `EngineMismatch` where something else answers torch's functions, which compiled code does not call.
    """
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext  # the default device, which compilers know

    acting = _get_current_function_mode_stack()
    for mode in acting:
        if not isinstance(mode, (DeviceContext, KernelMode)):
            raise EngineMismatch(
                f"{type(mode).__name__} answers calls of torch's functions, and an engine would leave it out; leave "
                "one of the two out"
            )
    return next((mode for mode in reversed(acting) if isinstance(mode, KernelMode)), None)


def refusal(block: nn.Module, where: str) -> str | None:
    """Say what sits on a block, or in it, that compiled code would leave out; None where nothing does.

    Hooks on the block itself are the user's and run around the engine.
    """
    for name, part in block.named_modules():
        replaced = "forward" in part.__dict__ or part.__dict__.get("_compiled_call_impl") is not None
        if replaced or (name and (part._forward_hooks or part._forward_pre_hooks)):
            return (
                f"{where}{'.' if name else ''}{name} ({type(part).__name__}) has a hook or a forward of its own (an "
                "offloading hook, or compilation), which an engine would leave out; take it off, offload whole models, "
                "or leave the engine out"
            )
    return None
