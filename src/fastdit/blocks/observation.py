"""What one observed forward tells about a DiT's blocks: which values are carried from block to block, and how.

Nothing is listed per model. A throw-away structural twin runs one plain forward whose blocks report every call; an
output of one block that *is* (the same tensor object) an argument of the next is a carried stream. Two replays that
skip every block and inject the recorded ends of each strand, one of them with other latents, show which strand is the
first to see them. The wiring is then proved as it will be used: a replay that skips what the cache will skip, and runs
all the rest, must give the plain output bit for bit.

All of that runs beside the call that asks for it, on latents and containers of its own, without the hooks that the user
put on the model: it leaves no trace in a run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn

from fastdit.blocks.chain import BlockCall, ForwardCall, with_answers
from fastdit.blocks.ports import BlockPort, Port, Strand, Wiring, outputs_of, read_port, returned, versions_of
from fastdit.errors import UnsupportedModel
from fastdit.nested import Value, map_tensors, tensors_of
from fastdit.structure import structural_twin

Place = tuple[str, int]
"""A block: the name of its list, and its index there."""


@dataclass(frozen=True)
class _Seen:
    """One observed call of a block, without its tensors.

    `links` are the (output place, argument) pairs in which the call got an output tensor of the call before itself.
    `items` says of each item that came out whether it is a tensor, `returns` what they came in.
    """

    name: str
    index: int
    links: tuple[tuple[int, Port], ...]
    items: tuple[bool, ...]
    returns: str


class _Recorder:
    """Runs every block without the user's hooks on it, and keeps how calls are joined.

    Of the tensors it keeps those at which a strand may end: what leaves linked blocks of a list, or is not passed on.
    Any other is let go when the next block is called, and until then no other tensor can have its identity.
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[_Seen] = []
        self.ends: dict[Place, Value] = {}
        self._module = module
        self._before: Value = None
        self._within = False  # whether the last block was linked to the one before in its own list

    def answer(self, call: BlockCall) -> Value:
        tensors = tensors_of([call.args, call.kwargs])
        links = _links(self._before, [*enumerate(call.args), *call.kwargs.items()])
        self._before = None
        last = self.calls[-1] if links else None
        if last is not None and (last.name == call.name or not self._within):
            self.ends.pop((last.name, last.index), None)
        self._within = last is not None and last.name == call.name
        versions = versions_of(tensors)
        uncounted = [(tensor, tensor.clone()) for tensor in tensors if tensor.is_inference()]
        output = run_unhooked(call)
        wrote = not all(bool(((tensor == copy) | (copy != copy)).all()) for tensor, copy in uncounted)
        if wrote or versions_of(tensors) != versions:
            raise UnsupportedModel(
                f"{type(self._module).__name__}: something writes into the inputs of {call.name}.{call.index} in "
                "place, so what the blocks add can't be known; use kernels that don't, or a stack without a step cache"
            )
        items = tuple(isinstance(item, torch.Tensor) for item in _items(output))
        returns = "tensor" if isinstance(output, torch.Tensor) else type(output).__name__
        self.calls.append(_Seen(call.name, call.index, links, items, returns))
        self._before = output
        if links:
            self.ends[call.name, call.index] = output
        return output


class _Keeper:
    """Runs every block, and keeps what comes out of some."""

    def __init__(self, wanted: Container[Place]) -> None:
        self.kept: dict[Place, Value] = {}
        self._wanted = wanted

    def answer(self, call: BlockCall) -> Value:
        output = run_unhooked(call)
        if (call.name, call.index) in self._wanted:
            self.kept[call.name, call.index] = output
        return output


Span = tuple[int, int, int]
"""Blocks of a strand that are skipped together: the strand's number, the first place, and the one behind the last."""


class _Replayer:
    """Skips the blocks of some spans, injects their recorded ends and notes the values that entered each strand."""

    def __init__(self, wiring: Wiring, spans: Iterable[Span], ends: Mapping[Place, Value]) -> None:
        self._wiring, self._where = wiring, wiring.where()
        self._skipped = {(number, place): stop for number, first, stop in spans for place in range(first, stop)}
        self._ends = ends
        self.entered: dict[int, list[torch.Tensor]] = {}

    def answer(self, call: BlockCall) -> Value:
        number, place = self._where.get((call.name, call.index), (-1, 0))
        stop = self._skipped.get((number, place))
        if stop is None:
            return run_unhooked(call)
        port = self._wiring.strands[number].blocks[place]
        values: list[Value] = [read_port(source, call.args, call.kwargs) for source in port.inputs]
        if place == 0:
            self.entered[number] = values
        if place == stop - 1:
            ends = outputs_of(port, self._ends[call.name, call.index])
            values = [ends[out] if out is not None else None for out in port.outputs]
        given = zip(port.outputs, values, strict=True)
        return returned(port, {out: value for out, value in given if out is not None})


def run_unhooked(call: BlockCall) -> Value:
    """Run a block without the user's forward hooks; one whose forward something replaced runs as it is."""
    block = call.block
    if "forward" not in block.__dict__:
        block = structural_twin(block, call.children or {}, hooks=False)
    return block(*call.args, **call.kwargs)


def observe(call: ForwardCall, skipped: Callable[[Wiring], Iterable[Span]]) -> Wiring:
    """Run one plain forward beside a call, learn its wiring and prove it; the call itself is left as it is.

    `skipped` gives the spans of a wiring that are to be skipped. Costs a forward, two more without their blocks, one
    without what is skipped, and another one where that ends amid a list; and the memory of what leaves the lists.
    Raises `UnsupportedModel`, naming what was seen, where no block list is purely carried or a replay does not
    reproduce the plain output.
    """
    module, name = call.module, type(call.module).__name__
    recorder = _Recorder(module)
    with torch.no_grad():
        plain = _forward(call, recorder, 1.0)
        strands = _strands(recorder.calls)
        if not strands:
            raise UnsupportedModel(_explain(module, recorder.calls, call.arguments))
        wiring = Wiring(tuple(strands), 0)
        if len(wiring.where()) < sum(len(strand.blocks) for strand in strands):
            raise UnsupportedModel(
                f"{name}: blocks of {_names(wiring)} are called for several streams in one forward, which can't be "
                "told apart; use accelerators that don't skip blocks"
            )
        every = [(number, 0, len(strand.blocks)) for number, strand in enumerate(strands)]
        replayer, probe = (_Replayer(wiring, every, recorder.ends) for _ in range(2))
        _forward(call, replayer, 1.0)
        _forward(call, probe, 2.0)
        wiring = _with_entry(call, wiring, replayer.entered, probe.entered)
        spans = list(skipped(wiring))
        ends = {_end(wiring, span): recorder.ends.pop(_end(wiring, span), None) for span in spans}
        if wanted := {place for place, end in ends.items() if end is None}:
            _forward(call, keeper := _Keeper(wanted), 1.0)
            ends.update(keeper.kept)
        if not _equal(plain, _forward(call, _Replayer(wiring, spans, ends), 1.0)):
            raise UnsupportedModel(
                f"{name}: skipping {_spanned(wiring, spans)} and injecting the recorded outputs does not reproduce the "
                "plain output, so something besides the carried streams leaves the blocks, such as a long skip to a "
                "later one; skip up to the last block, or use accelerators that don't skip blocks"
            )
    return wiring


def _end(wiring: Wiring, span: Span) -> Place:
    number, _, stop = span
    last = wiring.strands[number].blocks[stop - 1]
    return last.name, last.index


def _forward(call: ForwardCall, blocks: _Recorder | _Keeper | _Replayer, factor: float) -> Value:
    """Run the forward with its first argument scaled and finite, where every diffusers transformer takes its latents.

    The forward gets latents and containers of its own: what writes to them must not reach the caller's.
    """
    first = next(iter(call.arguments))
    arguments = _own_containers(call.arguments)
    # Numbers of tokens are no latents; such a model's wiring is refused where nothing is seen to follow the factor.
    arguments[first] = map_tensors(
        call.arguments[first],
        lambda tensor: tensor.nan_to_num() * factor if tensor.is_floating_point() else tensor.clone(),
    )
    return with_answers(call.module, blocks.answer, call.children)(**arguments)


def _own_containers(value: Value) -> Value:
    """Copy what a forward may empty or write to: lists, dictionaries, and objects such as a cache of keys and values.

    The tensors in lists and dictionaries are shared, and so are modules, generators and functions.
    """
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_own_containers(item) for item in value)
    if type(value) is dict:
        return {name: _own_containers(item) for name, item in value.items()}
    if isinstance(value, (torch.Tensor, torch.Generator, nn.Module)):
        return value
    return copy.deepcopy(value)


def wiring_key(arguments: Mapping[str, Value]) -> Hashable:
    """Name the kind of a call: which arguments are given, and the plain values that select a path."""
    return tuple(
        [
            (name, type(value), None if isinstance(value, torch.Tensor) else _selecting(value))
            for name, value in arguments.items()
            if value is not None
        ]
    )


def _selecting(value: Value) -> Hashable:
    """Give an argument's value where it may select a path; this runs at every step."""
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(item, (int, str)) for item in value):
        return tuple(value)
    return None


def _strands(calls: list[_Seen]) -> list[Strand]:
    """Group consecutive calls that are joined by identical tensors into strands."""
    groups: list[list[_Seen]] = []
    for call in calls:
        if groups and call.links:
            groups[-1].append(call)
        else:
            groups.append([call])
    found: list[Strand] = []
    for group in groups:
        whole = _strand(group)
        parts = [group] if whole is not None else [list(part) for _, part in groupby(group, lambda call: call.name)]
        found.extend(strand for part in parts if (strand := _strand(part)) is not None)
    return found


def _items(output: Value) -> list[Value]:
    """Take what a block gave apart."""
    return list(output) if isinstance(output, Iterable) and not isinstance(output, torch.Tensor) else [output]


def _links(output: Value, arguments: Sequence[tuple[Port, Value]]) -> tuple[tuple[int, Port], ...]:
    """List the (output place, argument) pairs in which a call receives an output tensor of the one before itself."""
    return tuple(
        (place, port)
        for place, item in enumerate(_items(output))
        if isinstance(item, torch.Tensor)
        for port, value in arguments
        if value is item
    )


def _strand(group: list[_Seen]) -> Strand | None:
    """Follow the streams through a group of linked calls; None where the calls don't share one pattern."""
    if len(group) < 2:
        return None
    seen = {(call.name, call.index) for call in group}
    links = [call.links for call in group[1:]]
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
        outputs = tuple(
            out if out is not None and out < len(call.items) and call.items[out] else None for out in outputs
        )
        carried = {out for out in outputs if out is not None}
        if any(tensor and place not in carried for place, tensor in enumerate(call.items)):
            return None
        blocks.append(BlockPort(call.name, call.index, inputs, outputs, call.returns, len(call.items)))
    if any(out is None for block in blocks[:-1] for out in block.outputs):
        return None
    return Strand(tuple(blocks))


def _place(link: tuple[int, Port]) -> int:
    return link[0]


def _with_entry(
    call: ForwardCall,
    wiring: Wiring,
    entered: dict[int, list[torch.Tensor]],
    probed: dict[int, list[torch.Tensor]],
) -> Wiring:
    """Find the first strand whose input follows the latents, the stream that does, and the axis of its tokens."""
    batch = len(call.latents)
    # Where weights make everything NaN nothing shows a difference, and the first of them is as good as any.
    for same in (_equal, torch.equal):
        for number, strand in enumerate(wiring.strands):
            for stream, (before, after) in enumerate(zip(entered[number], probed[number], strict=True)):
                if before.shape != after.shape or not same(before, after):
                    strands = list(wiring.strands)
                    strands[number] = replace(strand, latent_stream=stream)
                    first = before.dim() == 3 and before.shape[0] != batch and before.shape[1] == batch
                    return Wiring(tuple(strands), number, 0 if first else 1)
    raise UnsupportedModel(
        f"{type(call.module).__name__}: no block list of {_names(wiring)} receives the latents directly, so there is "
        "no signal to decide on; describe the model in fastdit.models"
    )


def _equal(first: Value, second: Value) -> bool:
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    return bool(pairs) and all(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


def _spanned(wiring: Wiring, spans: Iterable[Span]) -> str:
    skipped = [wiring.strands[number].blocks[first:stop] for number, first, stop in spans]
    return ", ".join(f"{ports[0].name}.{ports[0].index} to {ports[-1].name}.{ports[-1].index}" for ports in skipped)


def _names(wiring: Wiring) -> str:
    return ", ".join(sorted({port.name for strand in wiring.strands for port in strand.blocks}))


def _explain(module: nn.Module, calls: list[_Seen], kwargs: Mapping[str, Value]) -> str:
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
