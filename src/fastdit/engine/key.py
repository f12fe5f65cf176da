"""What an engine is keyed by: everything that changes what it computes, or whether it can run here at all.

Whatever is left out of a key is a wrong picture without an error one day, so a module is described by its whole
structure (classes and their source, plain attributes, shapes of weights, LoRA layers and their scales are all of it)
and the process by everything that compilers bake into code.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import math
import platform
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import fastdit
from fastdit.engine.arguments import TensorOutline, outline_text

#: Raised whenever what is kept of an engine changes its meaning.
FORMAT = 1

#: How many elements of every weight its checksum looks at.
SAMPLES = 64
_GOLDEN = 0.618

_DEPTH = 4
#: What peft's layers remember of how they were made; it says where each layer is, and changes nothing.
_PEFT_NOTES = frozenset({"kwargs"})

_INTERNALS = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_hf_hook", "_diffusers_hook"}


_TEXTS = ("engine", "settings", "piece", "structure", "weights", "attention", "mode", "environment")


@dataclass(frozen=True)
class EngineKey:
    """The key of one engine. `weights` is the checksum of those that are baked in, "" where they are not.

    `stage` names the picture's token layout (rows, columns, how they are split), None where it is not known.
    """

    engine: str
    settings: str
    piece: str
    structure: str
    weights: str
    arguments: Hashable
    stage: tuple[Any, ...] | None
    attention: str
    mode: str
    environment: str

    def to_json(self) -> dict[str, str]:
        """Give the key as plain texts."""
        texts = {name: getattr(self, name) for name in _TEXTS}
        return {
            **texts,
            "arguments": outline_text(self.arguments),
            "stage": outline_text(self.stage),
        }

    @functools.cached_property
    def digest(self) -> str:
        """The name under which the engine is kept."""
        return _sha(repr(sorted(self.to_json().items())))[:32]

    @property
    def shape(self) -> str:
        """The largest tensor of the arguments, for a reader."""
        tensors = list(_tensor_outlines(self.arguments))
        return str(max(tensors, key=lambda one: torch.Size(one.shape).numel())) if tensors else "no tensors"


def _tensor_outlines(outline: Hashable) -> Iterator[TensorOutline]:
    if isinstance(outline, TensorOutline):
        yield outline
    elif isinstance(outline, tuple):
        for item in outline:
            yield from _tensor_outlines(item)


def environment_of(device: torch.device) -> str:
    """Write down what compilers bake into code besides the model: versions, device, threads, numeric switches."""
    parts: dict[str, Any] = {
        "format": FORMAT,
        "fastdit": fastdit.__version__,
        "torch": torch.__version__,
        "diffusers": _diffusers(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled(device.type) and str(torch.get_autocast_dtype(device.type)),
        "attention": _attention_backend(),
    }
    if device.type == "cuda":
        cuda = torch.backends.cuda
        parts["device"] = (torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
        parts["cuda"] = torch.version.cuda
        parts["sdpa"] = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    else:
        parts["device"] = (device.type, torch.backends.cpu.get_cpu_capability(), _cpu_flags())
    return repr(sorted(parts.items()))


def _attention_backend() -> str:
    """Name diffusers' attention backend of the process, which a model without one of its own follows."""
    from diffusers.models import attention_dispatch

    backend, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    return str(backend)


@functools.cache
def _diffusers() -> str:
    return version("diffusers")


@functools.cache
def _cpu_flags() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return _sha(flags)[:16]


def structure_of(module: nn.Module) -> str:
    """Give a digest of all that a module computes by, besides the values of its weights.

    Two blocks of equal structure differ in their weights alone, so one engine serves both.
    """
    return _sha(repr([_part(name, part) for name, part in module.named_modules()]))


def _part(name: str, part: nn.Module) -> tuple[Any, ...]:
    passed_over = _INTERNALS | _PEFT_NOTES if type(part).__module__.startswith("peft.") else _INTERNALS
    own = {key: value for key, value in vars(part).items() if key not in passed_over}
    tensors = [(key, _tensor(tensor)) for key, tensor in (*part._parameters.items(), *part._buffers.items())]
    return name, _class(cast(Hashable, type(part))), part.training, tensors, _described(own, _DEPTH)


def _tensor(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    kind, shape = type(tensor).__name__, tuple(tensor.shape)
    own = kind, shape, tensor.stride(), str(tensor.dtype), str(tensor.device), tensor.requires_grad
    parts = parts_of(tensor)
    if parts is None:
        return own
    held, how = parts
    return own, [(name, _tensor(part)) for name, part in held.items()], _described(how, _DEPTH)


def parts_of(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any] | None:
    """Give the tensors that a tensor of a class of its own holds (packed values, scales), by name, and how it reads
    them; None for one that is plain, or that does not say."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return None
    names, how = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, how


def adapters_of(module: nn.Module) -> tuple[Any, ...]:
    """Say which LoRA layers of a module act, and how strongly: what may change between two steps of one run."""
    return tuple(
        (str(getattr(part, "active_adapters", "")), str(part.scaling), str(getattr(part, "merged_adapters", "")))
        for part in module.modules()
        if isinstance(getattr(part, "scaling", None), dict)
    )


def _described(value: Any, depth: int) -> Any:
    """Describe an attribute: plain values as they are, tensors by content, objects by class and attributes."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype), _sampled([value])
    if isinstance(value, nn.Module):
        return _class(cast(Hashable, type(value)))  # its own entry, if it is one of the module's children
    if isinstance(value, type):
        return _class(cast(Hashable, value))
    if depth == 0:
        return _class(cast(Hashable, type(value)))
    if isinstance(value, Mapping):
        return [(str(key), _described(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [_described(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__module__, value.__qualname__, _source_of(inspect.unwrap(value))
    return _class(cast(Hashable, type(value))), _described(getattr(value, "__dict__", {}), depth - 1)


@functools.lru_cache(maxsize=1024)
def _class(cls: Any) -> tuple[Any, ...]:
    """Name a class with the source of the files that define it and its bases."""
    sources = [_source_of(base) for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    return cls.__module__, cls.__qualname__, tuple(sources)


def _source_of(thing: Any) -> str:
    try:
        path = inspect.getsourcefile(thing)
    except TypeError:
        path = None
    return _file(path) if path is not None and Path(path).exists() else ""


@functools.lru_cache(maxsize=256)
def _file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def weights_of(module: nn.Module) -> str:
    """Give a checksum of the values of a module's weights, by a sample of each: cheap enough for every run.

    It looks at 64 elements of every weight, evenly spread, so it sees whatever changes a weight as a whole (another
    checkpoint, a LoRA that is fused, scaled or unfused in place), and may miss an edit of a few elements by hand.
    """
    return _sampled([*module.parameters(), *module.buffers()])


def _sampled(tensors: Iterable[torch.Tensor]) -> str:
    with torch.no_grad():
        plain = [part for tensor in tensors for part in _unpacked(tensor.detach())]
        picked = [sample_of(tensor) for tensor in plain if tensor.numel() and tensor.device.type != "meta"]
        digest = hashlib.sha256()
        for device in dict.fromkeys(tensor.device for tensor in picked):
            # One transfer for all the weights of a device.
            together = torch.cat([tensor.double() for tensor in picked if tensor.device == device])
            digest.update(together.cpu().numpy().tobytes())
    return digest.hexdigest()


def _unpacked(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    parts = parts_of(tensor)
    if parts is None:
        yield tensor
        return
    for part in parts[0].values():
        yield from _unpacked(part)


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """Give 64 elements of a tensor, or about as many, spread over its rows and columns; a view where that can be."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    step, width = max(1, tensor.numel() // SAMPLES), tensor.shape[-1] if tensor.dim() > 1 else tensor.numel()
    if step >= width > 1:
        # Whole rows further would be the same column again; a golden part of a row further, all get their turn.
        further = next(part for part in itertools.count(round(_GOLDEN * width)) if math.gcd(part, width) == 1)
        step += further - step % width
    return tensor.reshape(-1)[::step]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
