"""Hooks that other libraries put on a transformer as a whole: offloading, casting, splitting a sequence over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastdit.blocks.chain import Forward, ForwardCall, Pass
from fastdit.errors import IncompatibleStack
from fastdit.nested import Value
from fastdit.structure import refuse_checkpointing, refuse_replaced_forward


class HookPass(Pass):
    """Runs what is inside between what the hooks on the module do before and after a forward, outermost first.

    The hooks belong to the module object that the user holds, so a structural twin has none of its own; where the
    module itself runs, they run with it. Raises `IncompatibleStack` for a hook that replaces the forward, which can't
    be run around another one.
    """

    def __init__(self, acts_on_blocks: bool) -> None:
        self._acts_on_blocks = acts_on_blocks

    def forward(self, call: ForwardCall, next: Forward) -> Value:
        module = call.module
        if not (self._acts_on_blocks or call.children):
            return next(call)
        if "forward" in module.__dict__:
            refuse_replaced_forward(module, call.name)
        if torch.is_grad_enabled():
            refuse_checkpointing(module, call.name)
        hooks = _hooks(module)
        if not hooks:
            return next(call)
        arguments = call.arguments
        for hook in hooks:
            args, arguments = hook.pre_forward(module, **arguments)
            if args:
                raise IncompatibleStack(
                    f"{type(hook).__name__} turns the arguments of {type(module).__name__} into positional ones, which "
                    "can't be told apart here; take the hook off, or leave the stack out"
                )
        output = next(call.with_arguments(arguments))
        for hook in reversed(hooks):
            output = hook.post_forward(module, output)
        return output


def with_hooks(passes: Sequence[Pass]) -> list[Pass]:
    """Put what runs the hooks on a module between the passes that act outside of them and the others."""
    outside = [one for one in passes if one.outside_hooks]
    inside = [one for one in passes if not one.outside_hooks]
    return [*outside, HookPass(any(one.acts_on_blocks for one in inside)), *inside] if passes else []


def _hooks(module: nn.Module) -> list[Value]:
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
