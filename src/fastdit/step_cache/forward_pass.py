"""A step cache that skips whole forwards, in a run: v = output - latents stands for the blocks' residual."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch

from fastdit.blocks.chain import Forward, ForwardCall, Pass
from fastdit.blocks.ports import versions_of
from fastdit.errors import IncompatibleStack, UnsupportedModel
from fastdit.nested import Hole, Value, refilled, tensors_of
from fastdit.record import Outcome
from fastdit.run import Run
from fastdit.step_cache.decision import BranchState, Decider, GroupState
from fastdit.step_cache.rows import places
from fastdit.step_cache.site import Site, Verdict
from fastdit.step_cache.tally import Gains, Tally

if TYPE_CHECKING:
    from fastdit.step_cache.base import StepCache


class ForwardCachePass(Pass):
    """A step cache that skips whole forwards, in one run."""

    outside_hooks = True

    def __init__(self, cache: StepCache, run: Run) -> None:
        self._configured, self._run = cache, run
        self._deciders: dict[str, Decider] = {}
        self._gains = Gains(cache)
        self._tally: Tally | None = None

    def forward(self, call: ForwardCall, next: Forward) -> Value:
        """Give the forward's output, from what is inside or from the history, for each sample or for all."""
        if call.name not in self._deciders:
            self._deciders[call.name] = Decider(self._configured.for_transformer(call.module), self._run)
        decider, run, step = self._deciders[call.name], self._run, call.step
        self._cache = cache = decider.cache
        state = run.state((call.name, step.branch), BranchState, carry=cache.stage_change == "carry")
        self._state, self._step, self._tally = state, step, Tally()
        given = call.latents
        latents = self._latents(given)
        if run.staged and cache.stage_change == "carry" and latents.dim() != 3:
            raise IncompatibleStack(
                f"{cache.describe()} keeps whole latents, and those of {call.name} change their shape with the stage; "
                "set stage_change='reset', or use a cache that skips blocks"
            )
        self._tally.tokens = latents.shape[1] if latents.dim() == 3 else None
        count = latents.shape[0] if cache.per_image else 1
        groups = state.groups(0, count, cache.memory)
        state.streams[0] = 0
        site = Site(latents, latents, None, (), call.arguments, step, run.layout or run.grid, run.sigma(step.step))
        shape = latents[:1].shape if cache.per_image else latents.shape
        verdicts = decider.decide(groups, site, (shape,), 0, state.enter(step.step))
        self._tally.add(verdicts, groups, 0)
        computing = [index for index, verdict in enumerate(verdicts) if verdict.compute]
        if len(computing) < count:
            self._tally.saved[""] = 1.0 - len(computing) / count
        versions = versions_of([latents])
        whole = self._computed(call, latents, computing, count, next)
        if versions_of([latents]) != versions:
            raise IncompatibleStack(
                f"the forward writes into its latents in place, so {cache.describe()} can't know what it adds to "
                "them; use kernels that don't, or a stack without a step cache"
            )
        pieces = self._pieces(latents, groups, verdicts, whole)
        for index, (group, piece) in enumerate(zip(groups, pieces, strict=True)):
            own = latents if count == 1 else latents[index : index + 1]
            if verdicts[index].compute and not cache.neutral:
                history = group.histories.setdefault(0, cache.forecast.begin())
                history.record(step.step, [piece - own])
            cache.learn(group.memory, site, piece, verdicts[index].compute)
        if whole is not None and len(computing) == count:
            return whole
        output = pieces[0] if count == 1 else torch.cat(pieces)
        return refilled(state.shell, iter([output] if torch.is_tensor(given) else output.unbind()))

    def outcome(self) -> Outcome | None:
        tally, self._tally = self._tally, None
        return None if tally is None else self._gains.adding(tally, self._step.step)

    def idle(self) -> str | None:
        return self._gains.idle()

    def _latents(self, given: Value) -> torch.Tensor:
        """Give the latents in one tensor; a list of an image each, as some models take, is stacked."""
        if isinstance(given, torch.Tensor):
            return given
        tensors = tensors_of(given)
        if not tensors or any(tensor.shape != tensors[0].shape for tensor in tensors):
            raise UnsupportedModel(
                f"{self._cache.describe()} skips whole forwards and needs latents in one tensor or in a list of equal "
                f"ones, got {type(given).__name__}; use a cache that skips blocks"
            )
        if self._cache.per_image:
            raise UnsupportedModel(
                f"{self._cache.describe()} can't pick images out of latents that come as a {type(given).__name__}; "
                "leave per_image out, or use a cache that skips blocks"
            )
        return torch.stack(tensors)

    def _computed(
        self, call: ForwardCall, latents: torch.Tensor, computing: list[int], count: int, next: Forward
    ) -> Value:
        """Run the forward for the samples that are computed; None where there are none."""
        if not computing:
            return None
        if len(computing) < count:
            call = call.of_samples(places(computing, latents.device), count)
        output = next(call)
        tensors = tensors_of(output)
        if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in tensors_of(call.latents)]:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UnsupportedModel(
                f"{self._cache.describe()} needs an output of the latents' own shape {tuple(latents.shape)}, and the "
                f"forward gave {shapes}; use a cache that skips blocks"
            )
        self._state.shell = refilled(output, repeat(Hole()))
        return output

    def _pieces(
        self, latents: torch.Tensor, groups: list[GroupState], verdicts: list[Verdict], whole: Any
    ) -> list[torch.Tensor]:
        """Give every group's output."""
        tensors = tensors_of(whole)
        if tensors and tensors[0].dim() < latents.dim():
            tensors = [torch.stack(tensors)]
        computed = iter(tensors[0].split(1) if len(groups) > 1 and tensors else tensors)
        pieces = []
        for index, (group, verdict) in enumerate(zip(groups, verdicts, strict=True)):
            own = latents if len(groups) == 1 else latents[index : index + 1]
            if verdict.compute:
                pieces.append(next(computed))
            else:
                pieces.append(own + group.histories[0].predict(self._step.step)[0])
        return pieces
