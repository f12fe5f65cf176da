"""The engine level: what a piece of a model is turned into for the shape of one stage, and the contract of that.

An engine runs *inside* what the other levels decide: a cache decides whether a block runs, the engine how. A piece is
a block of the model's block lists. It is built once for every key (`key.py`) and kept on disk (`registry.py`); a call
that it was not built for is refused by name, whatever the compiler beneath would have made of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fastdit.accelerator import (
    Accelerator,
    Break,
    Change,
    Level,
    Need,
)
from fastdit.blocks.attention import KernelMode
from fastdit.engine.arguments import (
    differences,
    is_canonical,
    outline_of,
    tensors_in,
)
from fastdit.engine.key import (
    EngineKey,
    environment_of,
    structure_of,
    weights_of,
)
from fastdit.errors import EngineMismatch, InvalidConfig

if TYPE_CHECKING:
    from fastdit.blocks.chain import Pass
    from fastdit.engine.workshop import Workshop
    from fastdit.run import Run

#: What runs an engine: it gets a module of the engine's structure and a call's arguments in canonical strides.
Execute = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]

ON_FAILURE = ("error", "eager")


@dataclasses.dataclass(frozen=True)
class PieceCall:
    """One call of a piece of a model.

    `stage` names the token layout of the picture, None where it is not known; `attention` names the kernel of the stack
    that answers the model's attention, "" where none does.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    stage: tuple[Any, ...] | None = None
    attention: str = ""

    @property
    def device(self) -> torch.device:
        """Where the call runs."""
        tensors = tensors_in([self.args, self.kwargs])
        return tensors[0].device if tensors else torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Engine(Accelerator):
    """Base of the engines. A subclass says how a piece is built; keys, checks, keeping and failures are common.

    `on_failure` "error" raises `EngineBuildFailed` where a piece can't be built for a shape; "eager" runs the piece as
    it is instead, says so once, and shows it in the record. `directory` is where engines are kept, ~/.cache/fastdit
    unless given; it changes nothing of what is computed.
    """

    _: dataclasses.KW_ONLY
    on_failure: str = "error"
    directory: str | None = None

    level: ClassVar[Level] = Level.ENGINE
    changes: ClassVar[frozenset[Change]] = frozenset({Change.ARITHMETIC_ORDER, Change.COMPILED_ATTENTION})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BLOCK_LISTS, Need.WHOLE_BLOCKS, Need.FIXED_ROWS})
    breaks: ClassVar[frozenset[Break]] = frozenset({Break.BIT_EXACTNESS})

    #: Fields that don't change what is built.
    unkeyed: ClassVar[frozenset[str]] = frozenset({"on_failure", "directory"})

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.on_failure not in ON_FAILURE:
            raise InvalidConfig(f"{name}'s on_failure is one of {', '.join(ON_FAILURE)}, got {self.on_failure!r}")
        if self.directory is not None and not isinstance(self.directory, str):
            raise InvalidConfig(f"{name}'s directory is a path as text, or None, got {self.directory!r}")

    def lasting(self) -> Workshop:
        from fastdit.engine.workshop import Workshop

        return Workshop(self)

    def enter(self, run: Run, lasting: Workshop) -> Pass:
        return lasting.enter(run)

    @property
    def bakes_weights(self) -> bool:
        """Whether the weights become a part of the engine, so that it is built for one module and its weights."""
        return False

    @property
    def settings(self) -> str:
        """Everything of the configuration that changes what is built."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.unkeyed}
        return repr(sorted(shown.items()))

    def build(self, call: PieceCall, folder: Path) -> Execute:
        """Build an engine for a call, whose tensors are in canonical strides, and give what runs it.

        What is to be kept is written into `folder`, a private one that lives as long as the process. Where the engine
        was kept, its files lie there already, exactly as they were written. Whatever can't be built is raised.
        """
        raise NotImplementedError

    def key(self, call: PieceCall, *, structure: str | None = None, weights: str | None = None) -> EngineKey:
        """Give the key of the engine for a call; a digest of the module may be given where it is known."""
        if weights is None:
            weights = weights_of(call.module) if self.bakes_weights else ""
        return EngineKey(
            engine=type(self).__name__,
            settings=self.settings,
            piece=type(call.module).__name__,
            structure=structure if structure is not None else structure_of(call.module),
            weights=weights,
            arguments=outline_of((call.args, call.kwargs)),
            stage=call.stage,
            attention=call.attention,
            mode="inference" if torch.is_inference_mode_enabled() else "no_grad",
            environment=environment_of(call.device),
        )


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine for one key. Calling it checks everything that the key holds; `execute` runs it unchecked.

    `seconds` is what building took (or loading, where it was `kept`).
    """

    key: EngineKey
    engine: Engine
    execute: Execute = dataclasses.field(repr=False)
    seconds: float
    kept: bool

    def __call__(self, call: PieceCall) -> Any:
        """Run a call. Raises `EngineMismatch`, naming what differs, for one that the engine was not built for."""
        refuse_gradients()
        for position, tensor in enumerate(tensors_in([call.args, call.kwargs])):
            if not is_canonical(tensor):
                raise EngineMismatch(
                    f"{self.engine.describe()} for {self.key.piece}: tensor {position} of the arguments has strides "
                    f"{tensor.stride()}, and engines take row-major tensors; pass it through "
                    "fastdit.engine.arguments.canonical"
                )
        found = self.engine.key(call)
        if found != self.key:
            raise EngineMismatch(
                f"{self.engine.describe()} was built for another call of {self.key.piece}: "
                f"{'; '.join(_deviations(self.key, found))}; build an engine for this one"
            )
        return self.execute(call.module, call.args, call.kwargs)


def _deviations(expected: EngineKey, found: EngineKey) -> list[str]:
    """Say in what a call's key differs from an engine's."""
    named = {
        "piece": f"it is a {found.piece}",
        "structure": "the module's structure differs (layers, attributes, LoRA, shapes of weights)",
        "weights": "the weights are no longer those that were baked in",
        "stage": f"the stage is {found.stage} instead of {expected.stage}",
        "attention": f"attention is by {found.attention or 'the model'} instead of {expected.attention or 'the model'}",
        "mode": f"the mode is {found.mode} instead of {expected.mode}",
        "environment": "the process differs (versions, threads, device, numeric switches)",
        "settings": "the engine's settings differ",
    }
    texts = list(differences(expected.arguments, found.arguments))
    return texts + [text for name, text in named.items() if getattr(expected, name) != getattr(found, name)]


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
