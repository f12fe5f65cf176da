"""Any attention backend of diffusers, by its name there, for one twin alone.

diffusers has one function that dispatches attention to a backend. Its own `set_attention_backend` writes the choice
into the model's processors and, besides, into a default of the process that other models follow. Here the function is
called with the backend's name, on what the model hands to torch's attention; so models whose processors don't know
the dispatcher (SD3, PixArt) take every backend too. torch's own kernels are called directly (`torch_kernels.py`).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch

from fastdit.accelerator import Change, Effects
from fastdit.attention.base import AttentionKernel
from fastdit.attention.torch_kernels import KERNELS
from fastdit.blocks.attention import Attend, AttentionCall
from fastdit.config import Range, register
from fastdit.errors import InvalidConfig

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import AttentionBackendName

#: Backends that round queries and keys to a few bits, by how their names begin.
_ROUNDING = ("sage", "_sage")


@register
@dataclasses.dataclass(frozen=True)
class Attention(AttentionKernel):
    """Compute attention with a kernel of diffusers' dispatcher: "flash", "sage", "flex", "xformers", ...

    Every kernel computes softmax(scale q k^T + mask) v; those of "sage" round q and k to a few bits first.

    Args:
        backend: A name of `diffusers.models.attention_dispatch.AttentionBackendName`, or a tuple of names, one for each
            stage of the schedule. "native" leaves attention to torch, as the model does; with nothing else the outputs
            are bit-equal to the plain pipeline's.

    Raises:
        InvalidConfig: where diffusers knows no backend of that name.
        UnsupportedModel: from `accelerate`, where a few tokens can't be attended to on the model's device, with the
            names of the backends that can; from a call, where the kernel fails on what the model asks for (a mask that
            it does not take, for one). Nothing stands in for it in silence.

    Kernels of the Hub ("flash_hub", ...) are used once they are loaded, and are never downloaded from here:
    `with attention_backend("flash_hub"): pass`, of the same module, loads one.

    >>> from fastdit import RALU, Attention, Stack
    >>> stack = Stack([RALU("4x"), Attention(("native", "flash", "flash"))])  # three stages
    >>> Attention("native").neutral
    True
    """

    backend: str | Annotated[tuple[str, ...], Range(at_least=1)]

    def check_values(self) -> None:
        super().check_values()
        known = [name.value for name in _names()]
        for backend in self.backends:
            if backend not in known:
                raise InvalidConfig(
                    f"Attention takes the name of an attention backend of diffusers, or a tuple of one a stage, got "
                    f"{self.backend!r}; the names are {', '.join(known)}"
                )

    @property
    def backends(self) -> tuple[str, ...]:
        return self.backend if isinstance(self.backend, tuple) else (self.backend,)

    @property
    def effects(self) -> Effects:
        rounds = any(backend.startswith(_ROUNDING) for backend in self.backends)
        return super().effects.adding(changes={Change.ACTIVATION_PRECISION} if rounds else ())

    def alternatives(self) -> tuple[str, ...]:
        return tuple(name.value for name in _names())

    def kernel(self, backend: str) -> Attend:
        from diffusers.models.attention_dispatch import AttentionBackendName

        if backend in KERNELS:
            return KERNELS[backend]
        name = AttentionBackendName(backend)
        return partial(_dispatched, name, _options_of(name))


def _names() -> list[AttentionBackendName]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return list(AttentionBackendName)


def _options_of(name: AttentionBackendName) -> frozenset[str]:
    """List the options that a backend takes. Raises where its package or its kernel is missing."""
    from diffusers.models import attention_dispatch as dispatch

    dispatch._check_attention_backend_requirements(name)
    hub_kernel: Any = dispatch._HUB_KERNELS_REGISTRY.get(name)
    if hub_kernel is not None and hub_kernel.kernel_fn is None:
        raise RuntimeError("its kernel has not been loaded from the Hub, and a stack does not download code")
    if name not in dispatch._AttentionBackendRegistry._supported_arg_names:
        raise NotImplementedError("this diffusers names it and has no function for it")
    return frozenset(dispatch._AttentionBackendRegistry._supported_arg_names[name])


def _dispatched(name: AttentionBackendName, options: frozenset[str], call: AttentionCall) -> torch.Tensor:
    """Compute one call by the dispatcher. Raises for options that it would drop or misread in silence."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    asked = {
        "attn_mask": call.attn_mask is not None,
        "dropout_p": call.dropout_p > 0.0,
        "is_causal": call.is_causal,
        "enable_gqa": call.enable_gqa,
    }
    for option, is_asked in asked.items():
        if is_asked and option not in options:
            raise NotImplementedError(f"it does not take {option}")
    mask = call.mask()
    if mask is not None and "varlen" in name.value and mask.shape[2] != 1:
        raise NotImplementedError("it takes masks of keys alone, the same for every query")
    if name.value == "xformers":
        # diffusers casts a boolean mask to numbers for it, which adds one where it should hide.
        mask = call.additive_mask()
    found: torch.Tensor = dispatch_attention_fn(
        *(tensor.transpose(1, 2) for tensor in (call.query, call.key, call.value)),
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
        backend=name,
    )
    return found.transpose(1, 2)
