"""What a module's own state changes for all that runs on it: rounded activations, a shared sequence, other attention.

These are the same changes that accelerators declare, and `fastdit.stack` compares them with the needs of every
accelerator as it compares two accelerators. Quantisation is told by what the libraries leave in a module: a class, an
attribute of a layer, or an attribute of a weight. Weights that are unpacked before the product change nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fastdit.accelerator import Change
from fastdit.blocks.parallel import sequence_group

#: Classes of layers that round what enters them, by name; their weights don't tell.
ROUNDING_LAYERS: dict[str, str] = {
    "BFLFP8RLinear": "diffusers' FP8 layer",
    "FP8Linear": "transformers' FP8 layer",
    "Float8Linear": "torchao's float8 training layer",
    "Linear8bitLt": "bitsandbytes' LLM.int8",
    "SVDQW4A4Linear": "SVDQuant with 4-bit activations",
}

#: Packages all of whose layers round what enters them.
_ROUNDING_PACKAGES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")

#: What layers hold that round what enters them, by a scale fixed beforehand.
_SCALES = ("input_scale", "act_scale", "activation_scale")

#: Whatever a layer of any kind holds that may tell how it rounds.
_ATTRIBUTES = frozenset({"activation_qtype", "input_quantizer", "sdnq_dequantizer", *_SCALES})

#: What weights hold (torchao's tensor subclasses) whose layers round what enters them, with a scale for each call.
_WEIGHT_OPTIONS = ("act_quant_kwargs", "input_quant_func")


@dataclass(frozen=True)
class StateChange:
    """A change that a module's state makes: the part that makes it, and what to do where something can't bear it."""

    change: Change
    cause: str
    remedy: str


def changes_of(module: nn.Module) -> tuple[StateChange, ...]:
    """List the changes that a module's own state makes, each once with its first cause."""
    return tuple(_changes(module))


def _changes(module: nn.Module) -> Iterator[StateChange]:
    if cause := _first_rounding(module):
        yield StateChange(Change.ACTIVATION_PRECISION, cause, "forecast with Reuse(), or quantise the weights alone")
    if sequence_group(module) is not None:
        cause = "context parallelism is enabled on it"
        yield StateChange(Change.SHARED_SEQUENCE, cause, "leave that accelerator out, or share the batch out instead")
    if cause := _attention_backend(module):
        yield StateChange(Change.ATTENTION_BACKEND, cause, "call its set_attention_backend('native') first")
    for name, part in module.named_modules():
        if part.__dict__.get("_compiled_call_impl") is not None:
            cause = f"{name or 'it'} is compiled"
            yield StateChange(Change.COMPILED_ATTENTION, cause, "accelerate a model whose blocks are not compiled")
            return


def _attention_backend(module: nn.Module) -> str | None:
    """Name the first processor that hands attention to another backend of diffusers than torch's, and who said so."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    for name, part in module.named_modules():
        processor: Any = getattr(part, "processor", None)
        if hasattr(processor, "_attention_backend"):
            own = processor._attention_backend
            backend = _AttentionBackendRegistry._active_backend if own is None else own
            if (backend := str(getattr(backend, "value", backend))) != "native":
                whose = "the whole process's" if own is None else f"set on {name or 'it'}'s processor"
                return f"the backend {backend!r}, {whose}"
    return None


def _first_rounding(module: nn.Module) -> str | None:
    """Name the first part of a module that rounds its inputs."""
    for name, part in module.named_modules():
        if how := _rounding(part):
            return f"{name or 'it'} is a {type(part).__name__}, {how}"
    return None


def _rounding(part: nn.Module) -> str | None:
    """Say how a layer rounds what enters it; None where it does not."""
    cls: Any = type(part)
    if known := _class_rounding(cls):
        return known
    if _class_has_any(cls, _ATTRIBUTES) or _holds_any(part, _ATTRIBUTES):
        if hasattr(part, "activation_qtype"):  # quanto's layers have scales whether they use them or not
            return "with quantised activations" if part.activation_qtype is not None else None
        quantizer: Any = getattr(part, "input_quantizer", None)
        if quantizer is not None and getattr(quantizer, "is_enabled", True):
            return "with a quantizer on its input"
        if getattr(getattr(part, "sdnq_dequantizer", None), "use_quantized_matmul", False):
            return "with a quantised matrix product"
        if scale := next((name for name in _SCALES if getattr(part, name, None) is not None), None):
            return f"with an {scale}"
    weights = (weight for weight in part._parameters.values() if weight is not None)
    return next((how for weight in weights if (how := _weight_rounding(weight))), None)


@lru_cache(maxsize=256)
def _class_rounding(cls: type[Any]) -> str | None:
    """Say how the layers of a class round what enters them, where the class alone tells it."""
    classes = cls.__mro__
    if any(one.__module__.startswith(_ROUNDING_PACKAGES) for one in classes):
        return "a layer of torch's own quantisation"
    return next((ROUNDING_LAYERS[one.__name__] for one in classes if one.__name__ in ROUNDING_LAYERS), None)


def _holds_any(part: nn.Module, names: frozenset[str]) -> bool:
    """Whether a layer itself holds any of some attributes. Every layer is asked at each run, and most hold none."""
    held = (part.__dict__, part._parameters, part._buffers, part._modules)
    return not all(holder.keys().isdisjoint(names) for holder in held)


@lru_cache(maxsize=256)
def _class_has_any(cls: type[Any], names: frozenset[str]) -> bool:
    """Whether a class has any of some attributes, or its own way to find attributes."""
    return any(hasattr(cls, name) for name in names) or cls.__getattr__ is not nn.Module.__getattr__


def _weight_rounding(weight: torch.Tensor) -> str | None:
    """Say how a weight's class makes its layer round what enters it; None where it does not."""
    if type(weight) in (torch.Tensor, nn.Parameter):
        return None
    inner = getattr(weight, "original_weight_tensor", None)
    for tensor in (weight, inner):
        if any(getattr(tensor, name, None) is not None for name in _WEIGHT_OPTIONS):
            return f"whose weight ({type(tensor).__name__}) quantises activations"
    return None
