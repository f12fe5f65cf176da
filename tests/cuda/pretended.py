"""Tensors that say that they are on a CUDA device and compute real values on the CPU, where there is no such device.

What a GPU would refuse is refused: a call with tensors of both devices, a generator of the other. What makes the host
wait for a GPU is counted, with the line of the source that asked for it. It takes a build of torch with CUDA and no
driver: the device's name is what such a build knows, and no kernel of it is ever called.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)

#: Operators whose result the host reads, or whose size it must know.
WAITING = frozenset(
    {
        *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave", "bincount"),
        *("_unique2", "unique_dim", "unique_consecutive", "linalg_eig", "_linalg_eigh", "_linalg_svd"),
    }
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
_SOURCE = str(Path(__file__).parents[2] / "src")


class Waits:
    """How often the host waited: `by_line` counts (what, the innermost line outside of torch)."""

    def __init__(self) -> None:
        self.by_line: Counter[tuple[str, str]] = Counter()
        self.launches = 0

    def add(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if _outside(frame.filename)]
        inner = frames[-1]
        self.by_line[what, f"{inner.filename.removeprefix(_SOURCE)}:{inner.lineno}"] += 1

    @property
    def ours(self) -> dict[str, int]:
        """Those that a line of fastdit asked for."""
        return {
            f"{what} at {line}": count for (what, line), count in self.by_line.items() if line.startswith("/fastdit/")
        }


WAITS = Waits()


def _outside(filename: str) -> bool:
    return f"{Path(torch.__file__).parent}" not in filename and filename != __file__ and not filename.startswith("<")


class PretendedTensor(torch.Tensor):
    """A tensor of `held` values that says it is on the device."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> PretendedTensor:
        assert not isinstance(real, PretendedTensor)
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=CUDA,
        )
        made.held = real
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendedTensor({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendedTensor:
        return memo.setdefault(id(self), PretendedTensor(self.held.clone()))

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        WAITS.add("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return answer(func, args, kwargs or {})


#: Torch hands a generator on as one of its own class, so those of the device are known by their seeds.
_SEEDS = 1 << 40


class PretendedGenerator(torch.Generator):
    """A generator that says it is on the device; its seed is one of a range that others have not."""

    device: ClassVar[torch.device] = CUDA  # type: ignore[misc]

    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(_SEEDS + seed)


class _Generators(type(torch.Generator)):  # type: ignore[misc]
    """Makes a generator of the device where one is asked for, and knows every generator for one."""

    def __call__(cls, device: object = "cpu") -> torch.Generator:
        return PretendedGenerator() if torch.device(device).type == "cuda" else _GENERATOR(device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _GENERATOR)


_GENERATOR = torch.Generator


class _Generator(metaclass=_Generators):
    """What torch.Generator is while there is a device."""


def answer(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator on the real values, as the device would, and give its result where the device would."""
    name = func._schema.name.split("::")[1]
    flat, _ = tree_flatten((args, kwargs))
    there = [item for item in flat if isinstance(item, PretendedTensor)]
    here = [item for item in flat if isinstance(item, torch.Tensor) and not isinstance(item, PretendedTensor)]
    named = kwargs.get("device")
    wanted = named is not None and torch.device(named).type == "cuda"
    options = {**kwargs, **({"device": torch.device("cpu")} if wanted else {})}
    if options.get("pin_memory"):
        options["pin_memory"] = False
    if name == "_to_copy":
        return _copied(func, args, options, bool(there), bool(there) if named is None else wanted)
    if name == "copy_":
        into, given = args[0], args[1]
        if isinstance(into, PretendedTensor) != isinstance(given, PretendedTensor):
            WAITS.add("copy to the device" if isinstance(into, PretendedTensor) else "copy to the host")
        func(_real(into), _real(given))
        return into
    generator = kwargs.get("generator")
    if generator is not None and (generator.initial_seed() >= _SEEDS) != (bool(there) or wanted):
        raise RuntimeError(f"Expected a generator of the tensor's device for {name}")
    if not there and not wanted:
        return func(*args, **kwargs)
    if there and any(item.dim() for item in here):
        if name not in _INDEXING:
            raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu in {name}")
        WAITS.add("copy of an index to the device")
    if there and name in WAITING:
        WAITS.add(name)
    if there and name in _INDEXING and any(_mask(item) for item in args[1]):
        WAITS.add("index by a mask")
    if name == "_fused_sdp_choice":
        return 0
    if not any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns):
        WAITS.launches += 1
    output = func(*tree_map(_real, args), **tree_map(_real, options))
    written = {id(item.held): item for item in _written(func, args, kwargs)}
    return tree_map(lambda item: written[id(item)] if id(item) in written else _pretended(item), output)


def _copied(func: Any, args: tuple[Any, ...], options: dict[str, Any], there: bool, goes_there: bool) -> Any:
    output = func(*tree_map(_real, args), **options)
    if there != goes_there:
        WAITS.add("copy to the device" if goes_there else "copy to the host")
        output = output.clone() if output is _real(args[0]) else output
    return PretendedTensor(output) if goes_there else output


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[PretendedTensor]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (item for item in tree_flatten(value)[0] if isinstance(item, PretendedTensor))


def _mask(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


def _real(value: Any) -> Any:
    return value.held if isinstance(value, PretendedTensor) else value


def _pretended(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, PretendedTensor)
    return PretendedTensor(value) if plain else value


class _Device(TorchDispatchMode):
    """Answers factories of the device, too. Under this key torch does not look for a driver."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return answer(func, args, kwargs or {})


class Event:
    """An event of the device; `recorded` lists the streams on which any was recorded."""

    recorded: ClassVar[list[object]] = []

    def __init__(self, *, enable_timing: bool = False) -> None:
        self.timed = enable_timing

    def record(self, stream: object = None) -> None:
        self.recorded.append(stream)

    def synchronize(self) -> None:
        WAITS.add("event")

    def elapsed_time(self, other: Event) -> float:
        assert self.timed and other.timed
        return 1.0


@contextmanager
def pretending(patch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Let there be a device in all that runs inside, and give what the host waits for, counted from now on."""
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream", torch.device(device or CUDA)))
    patch.setattr(torch.accelerator, "synchronize", lambda device=None: WAITS.add(f"synchronize {device}"))
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended")
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch, "Generator", _Generator)
    # Engines refuse what sees operators, which here is the device itself.
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack
    others = lambda: [mode for mode in modes() if not isinstance(mode, _Device)]  # noqa: E731
    patch.setattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", others)
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    WAITS.by_line.clear()
    try:
        with _Device():
            yield WAITS
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def moved(pipeline: Any) -> Any:
    """Move a pipeline to the device, in place."""
    for component in pipeline.components.values():
        for part in component.modules() if isinstance(component, nn.Module) else ():
            for name, weight in part._parameters.items():
                if weight is not None and not isinstance(weight, PretendedTensor):
                    part._parameters[name] = nn.Parameter(PretendedTensor(weight.data), requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None and not isinstance(buffer, PretendedTensor):
                    part._buffers[name] = PretendedTensor(buffer)
    return pipeline
