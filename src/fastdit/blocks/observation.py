"""What one observed forward tells about a DiT's blocks: which values are carried from block to block, and how.

Nothing is listed per model. A throw-away structural twin runs one plain forward whose block lists report every call;
an output of one block that *is* (the same tensor object) an argument of the next is a carried stream. The wiring is
then proved: a replay skips every block, injects the recorded ends of each chain, and must give the plain output bit
for bit. A second replay with other latents shows which chain is the first to see them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Protocol

import torch
from torch import nn

from fastdit.errors import UnsupportedModel
from fastdit.nested import map_tensors, tensors_of
from fastdit.structure import structural_twin

Port = int | str
"""An argument of a block call: its place, or its keyword."""


@dataclass(frozen=True)
class BlockPort:
    """Where the carried streams enter and leave one block. `outputs[i]` is None where stream i ends."""

    name: str
    index: int
    inputs: tuple[Port, ...]
    outputs: tuple[int | None, ...]
    returns: str
    width: int


@dataclass(frozen=True)
class Chain:
    """Blocks joined by carried streams; `latent_stream` is the stream that depends on the latents directly."""

    blocks: tuple[BlockPort, ...]
    latent_stream: int | None = None


@dataclass(frozen=True)
class Wiring:
    """The chains of one forward in the order they run; caches decide at `entry`, the first that sees the latents."""

    chains: tuple[Chain, ...]
    entry: int

    def where(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Index the chains: (list name, index) -> (chain, place in the chain)."""
        return {
            (port.name, port.index): (number, place)
            for number, chain in enumerate(self.chains)
            for place, port in enumerate(chain.blocks)
        }


BlockRunner = Callable[[str, int, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Runs a block that is not skipped."""


def run_plainly(name: str, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block as it is."""
    return block(*args, **kwargs)


class BlockHandler(Protocol):
    """Stands between a forward and its blocks."""

    def call(self, name: str, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer the call of block `index` of the list `name`."""


class _BlockProxy:
    """Looks like a block and lets a handler answer its calls."""

    __slots__ = ("_block", "_handler", "_index", "_name")

    def __init__(self, handler: BlockHandler, name: str, index: int, block: nn.Module) -> None:
        self._handler, self._name, self._index, self._block = handler, name, index, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler.call(self._name, self._index, self._block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class BlockStack(nn.ModuleList):
    """A block list whose items are handed out as proxies; the children themselves are the model's own."""

    def __init__(self, blocks: nn.ModuleList, name: str, handler: BlockHandler) -> None:
        # The list's own attributes, its children among them; the constructor would make empty ones at every forward.
        self.__dict__.update(blocks.__dict__)
        self.__dict__["_proxies"] = [
            _BlockProxy(handler, name, index, block) for index, block in enumerate(blocks._modules.values())
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["_proxies"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_proxies"][index]


def with_handler(
    module: nn.Module, handler: BlockHandler, children: Mapping[str, Any] | None = None, *, hooks: bool = True
) -> nn.Module:
    """Give a structural twin of `module` whose direct block lists call `handler`."""
    stacks = {
        name: BlockStack(child, name, handler)
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child)
    }
    return structural_twin(module, {**stacks, **(children or {})}, hooks=hooks)


def read_port(port: Port, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Read an argument of a call."""
    return args[port] if isinstance(port, int) else kwargs[port]


def returned(port: BlockPort, values: Mapping[int, torch.Tensor]) -> Any:
    """Build what a block returns from its outputs by place (None where there is none)."""
    if port.returns == "tensor":
        return values[0]
    items = [values.get(place) for place in range(port.width)]
    return tuple(items) if port.returns == "tuple" else items


def outputs_of(port: BlockPort, output: Any) -> dict[int, torch.Tensor]:
    """Take a block's result apart by place."""
    if isinstance(output, torch.Tensor):
        return {0: output}
    return {place: item for place, item in enumerate(output) if isinstance(item, torch.Tensor)}


@dataclass(frozen=True)
class BlockCall:
    """One observed call of a block: what went in, what came out, and whether it wrote into tensors that don't count."""

    name: str
    index: int
    block: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    versions: tuple[int, ...]
    wrote: bool = False

    @property
    def arguments(self) -> dict[Port, Any]:
        named: dict[Port, Any] = dict(enumerate(self.args))
        named.update(self.kwargs)
        return named

    def again(self, handler: BlockHandler) -> None:
        """Put the call to a handler; where it runs the block, the block answers what it answered before."""
        handler.call(self.name, self.index, _Answered(self.block, self.output), self.args, self.kwargs)


class _Answered:
    """A block that has run: calling it gives the output that it gave, everything else is the block's own."""

    __slots__ = ("_block", "_output")

    def __init__(self, block: Any, output: Any) -> None:
        self._block, self._output = block, output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._block)


class _Recorder:
    """Runs every block and keeps its inputs and outputs."""

    def __init__(self, run_block: BlockRunner) -> None:
        self.calls: list[BlockCall] = []
        self._run_block = run_block

    def call(self, name: str, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = tensors_of([args, kwargs])
        versions = tuple(version_of(tensor) for tensor in tensors)
        uncounted = [(tensor, tensor.clone()) for tensor in tensors if tensor.is_inference()]
        output = self._run_block(name, index, block, args, kwargs)
        wrote = not all(bool(((tensor == copy) | (copy != copy)).all()) for tensor, copy in uncounted)
        self.calls.append(BlockCall(name, index, block, args, kwargs, output, versions, wrote))
        return output


@dataclass(frozen=True)
class Observation:
    """What one observed forward gave: the wiring, the forward's own output, and its block calls."""

    wiring: Wiring
    output: Any
    calls: tuple[BlockCall, ...]


class _Replayer:
    """Skips every block of the chains, injects their recorded ends and notes the values that entered each chain."""

    def __init__(self, wiring: Wiring, ends: dict[int, list[torch.Tensor | None]], run_block: BlockRunner) -> None:
        self._wiring, self._where, self._ends, self._run_block = wiring, wiring.where(), ends, run_block
        self.entered: dict[int, list[torch.Tensor]] = {}

    def call(self, name: str, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self._where.get((name, index))
        if found is None:
            return self._run_block(name, index, block, args, kwargs)
        number, place = found
        port = self._wiring.chains[number].blocks[place]
        values: list[Any] = [read_port(source, args, kwargs) for source in port.inputs]
        if place == 0:
            self.entered[number] = values
        if place == len(self._wiring.chains[number].blocks) - 1:
            values = self._ends[number]
        return returned(port, {out: v for out, v in zip(port.outputs, values, strict=True) if out is not None})


def observe(
    module: nn.Module,
    kwargs: dict[str, Any],
    children: Mapping[str, Any] | None = None,
    run_block: BlockRunner = run_plainly,
) -> Observation:
    """Run one plain forward of `module`, its blocks by `run_block`, learn its wiring and prove it.

    Costs two forwards without their blocks besides the forward itself, whose output is given with the wiring. Raises
    `UnsupportedModel`, naming what was seen, where no block list is purely carried or the replay does not reproduce
    the plain output.
    """
    recorder = _Recorder(run_block)
    observed = with_handler(module, recorder, children)
    inner: list[tuple[dict[str, Any], Any]] = []

    def forward(**arguments: Any) -> Any:
        # What the user's hooks make of arguments and output is theirs; the proof is about the forward between them.
        inner.append((arguments, type(module).forward(observed, **arguments)))
        return inner[0][1]

    observed.__dict__["forward"] = forward
    with torch.no_grad():
        output = observed(**kwargs)
        arguments, plain = inner[0]
        _refuse_in_place(module, recorder.calls)
        chains, ends = _chains(recorder.calls)
        if not chains:
            raise UnsupportedModel(_explain(module, recorder.calls, kwargs))
        wiring = Wiring(tuple(chains), 0)
        # The replays get latents of their own: what writes in place must not reach the caller's.
        replayer, probe = _Replayer(wiring, ends, run_block), _Replayer(wiring, ends, run_block)
        replayed = with_handler(module, replayer, children, hooks=False)(**_scaled_latents(module, arguments, 1.0))
        if not _equal(plain, replayed):
            raise UnsupportedModel(
                f"{type(module).__name__}: skipping the blocks of {_names(wiring)} and injecting their recorded "
                "outputs does not reproduce the plain output, so something besides the carried streams leaves the "
                "blocks; use the accelerators that don't skip blocks, or describe the model in fastdit.models"
            )
        with_handler(module, probe, children, hooks=False)(**_scaled_latents(module, arguments, 2.0))
    wiring = _with_entry(module, wiring, replayer.entered, probe.entered)
    return Observation(wiring, output, tuple(recorder.calls))


def wiring_key(kwargs: Mapping[str, Any]) -> Hashable:
    """Name the kind of a call: which arguments are given, and the plain values that select a path."""
    return tuple([(name, type(value), _selecting(value)) for name, value in kwargs.items() if value is not None])


def _selecting(value: Any) -> Hashable:
    """Give an argument's value where it may select a path; this runs at every step."""
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(item, (int, str)) for item in value):
        return tuple(value)
    return None


def version_of(tensor: torch.Tensor) -> int:
    """Count in-place writes to a tensor; tensors made in inference mode don't count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def _refuse_in_place(module: nn.Module, calls: list[BlockCall]) -> None:
    for call in calls:
        after = tuple(version_of(tensor) for tensor in tensors_of([call.args, call.kwargs]))
        if after != call.versions or call.wrote:
            raise UnsupportedModel(
                f"{type(module).__name__}: something writes into the inputs of {call.name}.{call.index} in place, so "
                "what the blocks add can't be known; use kernels that don't, or a stack without a step cache"
            )


def _chains(calls: list[BlockCall]) -> tuple[list[Chain], dict[int, list[torch.Tensor | None]]]:
    """Group consecutive calls that are joined by identical tensors into chains."""
    groups: list[list[BlockCall]] = []
    for call in calls:
        if groups and _links(groups[-1][-1], call):
            groups[-1].append(call)
        else:
            groups.append([call])
    found: list[tuple[Chain, BlockCall]] = []
    for group in groups:
        whole = _chain(group)
        parts = [group] if whole is not None else [list(part) for _, part in groupby(group, lambda call: call.name)]
        found.extend((chain, part[-1]) for part in parts if (chain := _chain(part)) is not None)
    ends: dict[int, list[torch.Tensor | None]] = {}
    for number, (chain, last) in enumerate(found):
        outputs = outputs_of(chain.blocks[-1], last.output)
        ends[number] = [outputs[out] if out is not None else None for out in chain.blocks[-1].outputs]
    return [chain for chain, _ in found], ends


def _links(first: BlockCall, second: BlockCall) -> list[tuple[int, Port]]:
    """List the (output place, argument) pairs in which `second` receives an output tensor of `first` itself."""
    items = [first.output] if isinstance(first.output, torch.Tensor) else list(first.output)
    return [
        (place, port)
        for place, item in enumerate(items)
        if isinstance(item, torch.Tensor)
        for port, value in second.arguments.items()
        if value is item
    ]


def _chain(group: list[BlockCall]) -> Chain | None:
    """Follow the streams through a group of linked calls; None where the calls don't share one pattern."""
    if len(group) < 2:
        return None
    seen = {(call.name, call.index) for call in group}
    links = [_links(first, second) for first, second in pairwise(group)]
    if len(seen) != len(group) or any(len(link) != len(links[0]) for link in links):
        return None
    # A block takes its streams where the next block of its own list does.
    by_list: dict[str, list[tuple[int, Port]]] = {}
    for first, second, link in zip(group, group[1:], links, strict=False):
        if first.name == second.name and by_list.setdefault(first.name, sorted(link, key=_place)) != sorted(
            link, key=_place
        ):
            return None
    for second, link in zip(group[1:], links, strict=True):
        own = by_list.get(second.name)
        if own is not None and [port for _, port in own] != [port for _, port in sorted(link, key=_place)]:
            return None
    blocks = []
    for number, call in enumerate(group):
        own = by_list.get(call.name)
        if own is not None:
            inputs = tuple(port for _, port in own)
            outputs: tuple[int | None, ...] = tuple(place for place, _ in own)
        elif number > 0:
            inputs = tuple(port for _, port in sorted(links[number - 1], key=_place))
            outputs = tuple(place for place, _ in sorted(links[number - 1], key=_place))
        else:
            return None
        items = [call.output] if isinstance(call.output, torch.Tensor) else list(call.output)
        outputs = tuple(
            out if out is not None and out < len(items) and isinstance(items[out], torch.Tensor) else None
            for out in outputs
        )
        carried = {out for out in outputs if out is not None}
        if any(isinstance(item, torch.Tensor) and place not in carried for place, item in enumerate(items)):
            return None
        returns = "tensor" if isinstance(call.output, torch.Tensor) else type(call.output).__name__
        blocks.append(BlockPort(call.name, call.index, inputs, outputs, returns, len(items)))
    if any(out is None for block in blocks[:-1] for out in block.outputs):
        return None
    return Chain(tuple(blocks))


def _place(link: tuple[int, Port]) -> int:
    return link[0]


def _with_entry(
    module: nn.Module,
    wiring: Wiring,
    entered: dict[int, list[torch.Tensor]],
    probed: dict[int, list[torch.Tensor]],
) -> Wiring:
    """Find the first chain whose input follows the latents, and the stream that does."""
    for number, chain in enumerate(wiring.chains):
        for stream, (before, after) in enumerate(zip(entered[number], probed[number], strict=True)):
            if before.shape != after.shape or not torch.equal(before, after):
                chains = list(wiring.chains)
                chains[number] = Chain(chain.blocks, stream)
                return Wiring(tuple(chains), number)
    raise UnsupportedModel(
        f"{type(module).__name__}: no block chain of {_names(wiring)} receives the latents directly, so there is no "
        "signal to decide on; describe the model in fastdit.models"
    )


def _scaled_latents(module: nn.Module, kwargs: dict[str, Any], factor: float) -> dict[str, Any]:
    """Scale the first parameter of the forward, which is where every diffusers transformer takes its latents."""
    first = next(name for name in inspect.signature(type(module).forward).parameters if name != "self")
    return {**kwargs, first: map_tensors(kwargs[first], lambda tensor: tensor * factor)}


def _equal(first: Any, second: Any) -> bool:
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def _names(wiring: Wiring) -> str:
    return ", ".join(sorted({port.name for chain in wiring.chains for port in chain.blocks}))


def _explain(module: nn.Module, calls: list[BlockCall], kwargs: Mapping[str, Any]) -> str:
    given = sorted(name for name, value in kwargs.items() if value is not None)
    lists = sorted({call.name for call in calls})
    if not calls:
        seen = "it called no block of a direct nn.ModuleList"
    elif len(calls) == len(lists):
        return (
            f"{type(module).__name__}: {', '.join(lists)} called one block each, and it takes two of one list to show "
            "which stream passes from block to block; use a model with two blocks or more in one list"
        )
    else:
        seen = f"no output of a block of {', '.join(lists)} reaches the next block unchanged"
    return (
        f"{type(module).__name__}: {seen} (arguments given: {', '.join(given)}), so no block can be skipped; "
        "drop the arguments that alter hidden states between blocks (ControlNet residuals, for one), or describe the "
        "model in fastdit.models"
    )
