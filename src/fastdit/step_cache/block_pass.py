"""A step cache that skips runs of blocks, in a run: it answers every block call of the forwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from fastdit.blocks.chain import Block, BlockCall, Forward, ForwardCall, Pass
from fastdit.blocks.observation import observe, wiring_key
from fastdit.blocks.parallel import rank_sum
from fastdit.blocks.ports import BlockPort, outputs_of, returned, versions_of
from fastdit.errors import IncompatibleStack, UnsupportedModel
from fastdit.nested import Value, tensors_of
from fastdit.record import Outcome
from fastdit.run import Run
from fastdit.step_cache.decision import BranchState, Decider, GroupState
from fastdit.step_cache.rows import on_rows, places, prove_rows
from fastdit.step_cache.segments import Cut, Segment
from fastdit.step_cache.site import Site, Verdict
from fastdit.step_cache.tally import Gains, Tally
from fastdit.step_cache.watching import WatchedBlock

if TYPE_CHECKING:
    from fastdit.step_cache.base import StepCache


@dataclasses.dataclass
class Learned:
    """What a twin keeps of its models: how their wiring is cut for its cache, and block lists with separable samples.

    Both are keyed by a transformer's name and the kind of the call, and hold no tensors.
    """

    cuts: dict[Hashable, Cut] = dataclasses.field(default_factory=dict)
    proved: set[Hashable] = dataclasses.field(default_factory=set)


class _Part:
    """The decision that some segments follow in one forward."""

    def __init__(self, groups: list[GroupState], verdicts: list[Verdict], site: Site) -> None:
        self.groups, self.verdicts, self.site = groups, verdicts, site
        self.computing = [index for index, verdict in enumerate(verdicts) if verdict.compute]
        self.whole = len(self.computing) == len(groups)

    def own(self, values: torch.Tensor, index: int) -> torch.Tensor:
        """Give what of a batch is a group's."""
        return values if len(self.groups) == 1 else values[index : index + 1]


class BlockCachePass(Pass):
    """A step cache that skips blocks, in one run."""

    def __init__(self, cache: StepCache, run: Run, learned: Learned) -> None:
        self._configured, self._run, self._learned = cache, run, learned
        self._deciders: dict[str, Decider] = {}
        self._gains = Gains(cache)
        self._tally: Tally | None = None
        self._let_go()

    def forward(self, call: ForwardCall, next: Forward) -> Value:
        if call.name not in self._deciders:
            own = self._configured.for_transformer(call.module)
            self._deciders[call.name] = Decider(own, self._run, rank_sum(call.module))
        self._decider, self._step = self._deciders[call.name], call.step
        self._cache = cache = self._decider.cache
        key = call.name, wiring_key(call.arguments)
        cut = self._learned.cuts.get(key)
        if cut is None:
            cut = self._learned.cuts[key] = Cut(observe(call, lambda wiring: Cut(wiring, cache).spans), cache)
        self._cut = cut
        state = self._run.state((call.name, call.step.branch), BranchState, carry=cache.stage_change == "carry")
        self._state, self._forced, self._tally = state, state.enter(call.step.step), Tally()
        try:
            return next(call)
        finally:
            self._let_go()

    def outcome(self) -> Outcome | None:
        tally, self._tally = self._tally, None
        return None if tally is None else self._gains.adding(tally, self._step.step)

    def idle(self) -> str | None:
        return self._gains.idle()

    def _let_go(self) -> None:
        """Drop the tensors of a forward."""
        self._parts: dict[int, _Part] = {}
        self._entered: torch.Tensor | None = None
        self._start: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._samples: list[torch.Tensor] = []

    def block(self, call: BlockCall, next: Block) -> Value:
        """Answer one block call: run it, pass its streams through, or give the end of its segment."""
        found = self._cut.places.get((call.name, call.index))
        if found is None:
            return next(call)
        segment, place, port = found
        part = self._parts.get(segment.part)
        watched = None
        if part is None or not part.whole or place <= segment.first:  # else the streams are not looked at
            try:
                values = [call.args[at] if isinstance(at, int) else call.kwargs[at] for at in port.inputs]
            except (KeyError, IndexError) as error:
                raise UnsupportedModel(
                    f"{call.name}.{call.index} is called by other names or places of its arguments than when it was "
                    "observed; call it alike in every forward, or leave out what skips blocks"
                ) from error
            if place == segment.enters and segment.decides:
                self._stream = self._watched(segment, values)
                self._entered = values[self._stream]
            if place < segment.first:
                call.whole = True
                return next(call)
            if place == segment.first:
                if segment.decides:
                    watched = WatchedBlock(call.block)
                    self._decide(segment, values, watched, call)
                    call.children = watched.answers()
                self._start, self._samples = values, []
                self._versions = versions_of(values)
            part = self._parts[segment.part]
            if not part.whole:
                return self._in_part(segment, values, call, next)
        output = next(call)
        if watched is not None:
            watched.check()
        if place == segment.stop - 1:
            ends = outputs_of(port, output)
            self._keep(segment, part, port, [ends[out] if out is not None else None for out in port.outputs])
        return output

    def _watched(self, segment: Segment, values: Sequence[torch.Tensor]) -> int:
        """Say which stream carries the latents: the one that was seen to, or else the largest."""
        stream = self._cut.strands[segment.strand].latent_stream
        return stream if stream is not None else max(range(len(values)), key=lambda i: values[i].numel())

    def _decide(self, segment: Segment, values: list[Value], block: WatchedBlock, call: BlockCall) -> None:
        assert self._entered is not None and self._tally is not None
        hidden_states = values[self._stream]
        if self._tally.tokens is None and self._entered.dim() > 2:
            self._tally.tokens = self._entered.shape[self._cut.token_axis]
        run, each = self._run, self._cache.per_image
        site = Site(
            self._entered, hidden_states, block, call.args, call.kwargs, self._step, run.layout or run.grid,
            run.sigma(self._step.step),
        )  # fmt: skip
        count = hidden_states.shape[0] if each else 1
        shapes = tuple([value[:1].shape if each else value.shape for value in values])
        groups = self._state.groups(segment.part, count, self._cache.memory)
        verdicts = self._decider.decide(groups, site, shapes, segment.number, self._forced)
        self._parts[segment.part] = _Part(groups, verdicts, site)
        self._tally.add(verdicts, groups, segment.number)

    def _in_part(self, segment: Segment, values: list[Value], call: BlockCall, next: Block) -> Value:
        """Answer a block that is skipped for some samples or for all."""
        assert self._tally is not None
        _, place, port = self._cut.places[call.name, call.index]
        part = self._parts[segment.part]
        self._tally.saved[f"{port.name}.{port.index}"] = 1.0 - len(part.computing) / len(part.groups)
        if part.computing:
            self._run_samples(port, part, call, next)
        if place == segment.stop - 1:
            ends = self._ends(segment, part, port)
            values = [end if end is not None else value for end, value in zip(ends, values, strict=True)]
            self._learn(segment, part, ends)
        return returned(port, {out: v for out, v in zip(port.outputs, values, strict=True) if out is not None})

    def _run_samples(self, port: BlockPort, part: _Part, call: BlockCall, next: Block) -> None:
        """Run a block on the samples that are computed. Their streams travel here, beside the forward's own."""
        batch = len(part.groups)
        # A tensor that all samples share may have as many rows as there are samples; it shows at these shapes alone.
        proved = (port.name, batch, tuple(tensor.shape for tensor in tensors_of([call.args, call.kwargs])))
        if proved not in self._learned.proved:
            prove_rows(port, batch, call, next)
            self._learned.proved.add(proved)
        index = places(part.computing, self._start[0].device)
        carried = dict(zip(port.inputs, self._samples, strict=True)) if self._samples else {}
        outputs = outputs_of(port, next(on_rows(call, index, batch, carried)))
        self._samples = [outputs[out] for out in port.outputs if out is not None]

    def _ends(self, segment: Segment, part: _Part, port: BlockPort) -> list[torch.Tensor | None]:
        """Give the end of every stream: start + forecast for skipped groups, what the blocks gave for the others."""
        step, alone = self._step.step, len(part.groups) == 1
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
                    part.own(self._samples[kept], order[i]) if i in order else part.own(start, i) + predictions[i][kept]
                    for i in range(len(part.groups))
                ]
                ends.append(torch.cat(pieces))
            kept += 1
        if part.computing:
            self._record(segment, part, ends)
        return ends

    def _keep(self, segment: Segment, part: _Part, port: BlockPort, ends: list[torch.Tensor | None]) -> None:
        """Keep the residuals of a computed segment. Raises if a block wrote into the tensors that entered it."""
        if versions_of(self._start) != self._versions:
            raise IncompatibleStack(
                f"a block before {port.name}.{port.index} writes into its input in place, so the residual of the "
                "blocks can't be known; use kernels that don't, or a stack without a step cache"
            )
        if not self._cache.neutral:
            self._record(segment, part, ends)
        self._learn(segment, part, ends)

    def _record(self, segment: Segment, part: _Part, ends: Sequence[torch.Tensor | None]) -> None:
        features = [end - start for start, end in zip(self._start, ends, strict=True) if end is not None]
        watched = self._watched(segment, self._start)
        self._state.streams[segment.number] = watched - ends[:watched].count(None)
        alone = len(part.groups) == 1
        for index in part.computing:
            group = part.groups[index]
            if segment.number not in group.histories:
                group.histories[segment.number] = self._cache.forecast.begin()
            own = features if alone else [part.own(feature, index) for feature in features]
            group.histories[segment.number].record(self._step.step, own)

    def _learn(self, segment: Segment, part: _Part, ends: Sequence[torch.Tensor | None]) -> None:
        """Show the gate how the latents' stream left the last segment of its part."""
        if not self._cut.ends_part[segment.number]:
            return
        stream = self._cut.strands[segment.strand].latent_stream
        end = ends[stream] if stream is not None else None
        end = end if end is not None else max((end for end in ends if end is not None), key=torch.Tensor.numel)
        for index, group in enumerate(part.groups):
            self._cache.learn(group.memory, part.site, part.own(end, index), index in part.computing)
