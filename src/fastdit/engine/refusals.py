"""What an engine refuses, or leaves to the block itself, since compiled code would leave it out in silence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastdit.blocks.attention import KernelMode
from fastdit.engine.fingerprint import Structure
from fastdit.errors import EngineMismatch


@dataclass(frozen=True)
class Admission:
    """What was found out about a block, good as long as `structure` is unchanged, and no longer than a run.

    `module` is what an engine runs: the block without its hooks. `refusal` says why no engine may run the block.
    """

    where: str
    module: nn.Module
    structure: Structure
    weights: str
    refusal: str | None = None


def refuse_gradients() -> None:
    """Raise `EngineMismatch` where gradients are recorded, which engines don't give."""
    if torch.is_grad_enabled():
        raise EngineMismatch("an engine gives no gradients; call the module under torch.no_grad()")


def answering_kernel() -> KernelMode | None:
    """Give the stack's attention kernel that answers the model's attention; it is compiled in.

    Raises `EngineMismatch` where something else answers torch's functions, or sees its operators, as counters do:
    compiled code calls other ones.
    """
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext  # the default device, which compilers know
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    acting = _get_current_function_mode_stack()
    for mode in (*acting, *_get_current_dispatch_mode_stack()):
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
