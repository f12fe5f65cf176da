"""Hooks that other libraries put on a transformer as a whole: offloading, casting, splitting a sequence over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdit.errors import IncompatibleStack
from fastdit.twins.foreign_state import sequence_group


def through_hooks(module: nn.Module, arguments: dict[str, Any], forward: Callable[[dict[str, Any]], Any]) -> Any:
    """Run `forward` between what the module's hooks do before and after it, outermost first.

    The hooks belong to the module object that the user holds, so a structural twin has none of its own. Raises
    `IncompatibleStack` for a hook that replaces the forward, which can't be run around another one.
    """
    hooks = list(_hooks(module))
    for hook in hooks:
        args, arguments = hook.pre_forward(module, **arguments)
        if args:
            raise IncompatibleStack(
                f"{type(hook).__name__} turns the arguments of {type(module).__name__} into positional ones, which "
                "can't be told apart here; take the hook off, or leave the stack out"
            )
    output = forward(arguments)
    for hook in reversed(hooks):
        output = hook.post_forward(module, output)
    return output


def _hooks(module: nn.Module) -> list[Any]:
    """List the hooks on the module itself, outermost first: accelerate's, then those of diffusers."""
    offload = module.__dict__.get("_hf_hook")
    registry = module.__dict__.get("_diffusers_hook")
    found = [registry.hooks[name] for name in reversed(registry._hook_order)] if registry is not None else []
    for hook in found:
        if hasattr(hook, "new_forward"):
            raise IncompatibleStack(
                f"{type(hook).__name__} replaces the forward of {type(module).__name__}, which a stack needs; take the "
                "hook off, or leave the stack out"
            )
    return [*([offload] if offload is not None else []), *found]


def rank_sum(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Give what adds a tensor up over the ranks that share the module's sequence; as it is where nothing is shared."""
    group = sequence_group(module)
    if group is None:
        return lambda tensor: tensor

    def add(tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor, group=group)
        return tensor

    return add
