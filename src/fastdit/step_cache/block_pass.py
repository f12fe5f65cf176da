"""One forward under a step cache that skips runs of blocks: it answers every block call of the structural twin."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from fastdit.blocks.observation import (
    BlockCall,
    BlockPort,
    BlockRunner,
    outputs_of,
    read_port,
    returned,
    run_plainly,
    version_of,
)
from fastdit.errors import IncompatibleStack
from fastdit.nested import tensors_of
from fastdit.record import Outcome
from fastdit.run import Run
from fastdit.step import StepContext
from fastdit.step_cache.base import Site, StepCache, Verdict
from fastdit.step_cache.decision import BranchState, Decider, GroupState
from fastdit.step_cache.rows import on_rows, prove_rows
from fastdit.step_cache.segments import Cut, Segment
from fastdit.step_cache.tally import Tally
from fastdit.step_cache.watching import WatchedBlock

Reduce = Callable[[torch.Tensor], torch.Tensor]


class _Part:
    """The decision that some segments follow in one forward."""

    def __init__(self, groups: list[GroupState], verdicts: list[Verdict], site: Site) -> None:
        self.groups, self.verdicts, self.site = groups, verdicts, site
        self.computing = [index for index, verdict in enumerate(verdicts) if verdict.compute]
        self.whole = len(self.computing) == len(groups)


class BlockPass:
    """One forward under a step cache: answers every block call of the structural twin.

    `proved` holds the block lists whose rows were shown to be separable, with the shapes of their arguments, and is
    shared by the forwards of a denoiser. `run_block` runs a block that is not skipped, `run_leading` one that runs
    before the decision.
    """

    def __init__(
        self,
        cache: StepCache,
        cut: Cut,
        run: Run,
        *,
        reduce: Reduce = lambda changes: changes,
        run_block: BlockRunner = run_plainly,
        run_leading: BlockRunner = run_plainly,
        proved: set[Hashable] | None = None,
    ) -> None:
        self._cache, self._cut, self._run = cache, cut, run
        self._decider = Decider(cache, run, reduce)
        self._run_block, self._run_leading = run_block, run_leading
        self._proved = proved if proved is not None else set()

    def begin(self, context: StepContext, state: BranchState, observed: Sequence[BlockCall] = ()) -> None:
        """Start a forward; `observed` holds its block calls where it has already run to be observed."""
        self._context, self._state = context, state
        self._forced = "observed for the first time" if observed else None
        self._forced = state.enter(context.step) or self._forced
        self._parts: dict[int, _Part] = {}
        self._entered: torch.Tensor | None = None
        self._start: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._rows: list[torch.Tensor] = []
        self._tally = Tally()
        self._tokens: int | None = None
        for call in observed:
            call.again(self)

    def end(self) -> Outcome:
        """Let go of the forward's tensors and say what was done."""
        self._parts, self._entered, self._start, self._rows = {}, None, [], []
        return self._tally.outcome(self._tokens)

    def call(self, name: str, index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one block call: run it, pass its streams through, or give the end of its segment."""
        found = self._cut.places.get((name, index))
        if found is None:
            return self._run_block(name, index, block, args, kwargs)
        segment, place, port = found
        part = self._parts.get(segment.part)
        if part is not None and part.whole and segment.first < place < segment.stop - 1:
            return self._run_block(name, index, block, args, kwargs)  # inside of what is computed, nothing is seen to
        values = [read_port(source, args, kwargs) for source in port.inputs]
        if place == segment.enters and segment.decides:
            self._entered = values[self._watched(segment.chain, values)]
            if self._tokens is None and self._entered.dim() > 2:
                self._tokens = self._entered.shape[1]
        if place < segment.first:
            return self._run_leading(name, index, block, args, kwargs)
        if place == segment.first:
            if segment.decides:
                watched = WatchedBlock(block)
                self._decide(segment, values, watched, args, kwargs)
                # An engine or a token cache knows a block by its own object.
                block = watched if self._run_block is run_plainly else block
            self._start, self._rows = values, []
            self._versions = [version_of(value) for value in values]
        return self._inside(segment, place, port, values, block, args, kwargs)

    def _watched(self, chain: int, values: Sequence[torch.Tensor]) -> int:
        """Say which stream of a chain carries the latents: the one that was seen to, or else the largest."""
        stream = self._cut.chains[chain].latent_stream
        return stream if stream is not None else max(range(len(values)), key=lambda i: values[i].numel())

    def _decide(
        self, segment: Segment, values: list[Any], block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        assert self._entered is not None
        hidden_states = values[self._watched(segment.chain, values)]
        site = Site(
            self._entered, hidden_states, block, args, kwargs, self._context, self._run.layout or self._run.grid,
            self._run.sigma(self._context.step),
        )  # fmt: skip
        count = hidden_states.shape[0] if self._cache.per_image else 1
        shapes = tuple(value[:1].shape if self._cache.per_image else value.shape for value in values)
        groups = self._state.groups(segment.part, count, self._cache.memory)
        verdicts = self._decider.decide(groups, site, shapes, segment.number, self._forced)
        self._parts[segment.part] = _Part(groups, verdicts, site)
        self._tally.add(verdicts, groups, segment.number)

    def _inside(
        self,
        segment: Segment,
        place: int,
        port: BlockPort,
        values: list[Any],
        block: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        part = self._parts[segment.part]
        computing, last = part.computing, place == segment.stop - 1
        if part.whole:
            output = self._run_block(port.name, port.index, block, args, kwargs)
            if last:
                ends = outputs_of(port, output)
                self._keep(segment, part, port, [ends[out] if out is not None else None for out in port.outputs])
            return output
        self._tally.saved[f"{port.name}.{port.index}"] = 1.0 - len(computing) / len(part.groups)
        if computing:
            self._run_rows(port, computing, len(part.groups), block, args, kwargs)
        if last:
            ends_of_streams = self._ends(segment, part, port)
            values = [end if end is not None else value for end, value in zip(ends_of_streams, values, strict=True)]
            self._learn(segment, part, ends_of_streams, computing)
        return returned(port, {out: v for out, v in zip(port.outputs, values, strict=True) if out is not None})

    def _run_rows(
        self,
        port: BlockPort,
        rows: list[int],
        batch: int,
        block: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Run a block on the images that are computed. Their streams travel here, beside the forward's own."""
        # A tensor that all images share may have as many rows as there are images; it shows at these shapes alone.
        proved = (port.name, batch, tuple(tensor.shape for tensor in tensors_of([args, kwargs])))
        if proved not in self._proved:
            prove_rows(port, batch, block, args, kwargs)
            self._proved.add(proved)
        index = torch.tensor(rows, device=self._start[0].device)
        carried = dict(zip(port.inputs, self._rows, strict=True)) if self._rows else {}
        outputs = outputs_of(port, on_rows(block, args, kwargs, index, batch, carried))
        self._rows = [outputs[out] for out in port.outputs if out is not None]

    def _ends(self, segment: Segment, part: _Part, port: BlockPort) -> list[torch.Tensor | None]:
        """Give the end of every stream: start + forecast for skipped groups, what the blocks gave for the others."""
        step, alone = self._context.step, len(part.groups) == 1
        predictions = {
            index: group.histories[segment.number].predict(step)
            for index, (group, verdict) in enumerate(zip(part.groups, part.verdicts, strict=True))
            if not verdict.compute
        }
        order = {index: position for position, index in enumerate(part.computing)}
        ends: list[torch.Tensor | None] = []
        kept = 0
        for start, out in zip(self._start, port.outputs, strict=True):
            if out is None:
                ends.append(None)
                continue
            if alone:
                ends.append(start + predictions[0][kept])
            else:
                pieces = [
                    self._rows[kept][order[i] : order[i] + 1] if i in order else start[i : i + 1] + predictions[i][kept]
                    for i in range(len(part.groups))
                ]
                ends.append(torch.cat(pieces))
            kept += 1
        if part.computing:
            self._record(segment, part, ends)
        return ends

    def _keep(self, segment: Segment, part: _Part, port: BlockPort, ends: list[torch.Tensor | None]) -> None:
        """Keep the residuals of a computed segment. Raises if a block wrote into the tensors that entered it."""
        for start, version in zip(self._start, self._versions, strict=True):
            if version_of(start) != version:
                raise IncompatibleStack(
                    f"a block before {port.name}.{port.index} writes into its input in place, so the residual of the "
                    "blocks can't be known; use kernels that don't, or a stack without a step cache"
                )
        if not self._cache.neutral:
            self._record(segment, part, ends)
        self._learn(segment, part, ends, part.computing)

    def _record(self, segment: Segment, part: _Part, ends: Sequence[torch.Tensor | None]) -> None:
        features = [end - start for start, end in zip(self._start, ends, strict=True) if end is not None]
        watched = self._watched(segment.chain, self._start)
        self._state.streams[segment.number] = sum(end is not None for end in ends[:watched])
        for index in part.computing:
            group = part.groups[index]
            own = features if len(part.groups) == 1 else [feature[index : index + 1] for feature in features]
            if segment.number not in group.histories:
                group.histories[segment.number] = self._cache.forecast.begin()
            group.histories[segment.number].record(self._context.step, own)
            if segment.decides:
                one = slice(None) if len(part.groups) == 1 else slice(index, index + 1)
                group.shapes = tuple(start[one].shape for start in self._start)

    def _learn(
        self, segment: Segment, part: _Part, ends: Sequence[torch.Tensor | None], computing: Sequence[int]
    ) -> None:
        """Show the gate how the latents' stream left the last segment of its part."""
        if any(s.part == segment.part and s.number > segment.number for s in self._cut.segments):
            return
        given = [end for end in ends if end is not None]
        stream = self._cut.chains[segment.chain].latent_stream
        end = ends[stream] if stream is not None else None
        end = end if end is not None else max(given, key=torch.Tensor.numel)
        for index, group in enumerate(part.groups):
            own = end if len(part.groups) == 1 else end[index : index + 1]
            self._cache.learn(group.memory, part.site, own, index in computing)
