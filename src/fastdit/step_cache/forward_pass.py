"""One forward of a step cache that skips it whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

import torch

from fastdit.blocks.observation import version_of
from fastdit.errors import IncompatibleStack, UnsupportedModel
from fastdit.nested import (
    Hole,
    refilled,
    select_rows,
    tensors_of,
)
from fastdit.record import Outcome
from fastdit.run import Run
from fastdit.step import StepContext
from fastdit.step_cache.base import Site, StepCache, Verdict
from fastdit.step_cache.decision import BranchState, Decider, GroupState
from fastdit.step_cache.tally import Tally


class ForwardPass:
    """One forward of a cache that skips it whole: v = output - latents stands for the blocks' residual."""

    def __init__(self, cache: StepCache, run: Run) -> None:
        self._cache, self._run = cache, run
        self._decider = Decider(cache, run)

    def begin(self, context: StepContext, state: BranchState) -> None:
        """Start a forward."""
        self._context, self._state = context, state
        self._forced = state.enter(context.step)
        self._tally = Tally()
        self._tokens: int | None = None

    def forward(
        self, arguments: Mapping[str, Any], compute: Callable[[Mapping[str, Any], torch.Tensor | None], Any]
    ) -> Any:
        """Give the forward's output, from `compute` or from the history, for each image or for all.

        `compute` gets the arguments and the images that they are of, None for all.
        """
        given = next(iter(arguments.values()))
        latents = self._latents(given)
        self._tokens = latents.shape[1] if latents.dim() == 3 else None
        count = latents.shape[0] if self._cache.per_image else 1
        groups = self._state.groups(0, count, self._cache.memory)
        self._state.streams[0] = 0
        site = Site(
            latents, latents, None, (), dict(arguments), self._context, self._run.layout or self._run.grid,
            self._run.sigma(self._context.step),
        )  # fmt: skip
        shape = latents[:1].shape if self._cache.per_image else latents.shape
        verdicts = self._decider.decide(groups, site, (shape,), 0, self._forced)
        self._tally.add(verdicts, groups, 0)
        computing = [index for index, verdict in enumerate(verdicts) if verdict.compute]
        if len(computing) < count:
            self._tally.saved[""] = 1.0 - len(computing) / count
        version = version_of(latents)
        whole = self._output(arguments, latents, computing, count, compute)
        if version_of(latents) != version:
            raise IncompatibleStack(
                f"the forward writes into its latents in place, so {self._cache.describe()} can't know what it adds to "
                "them; use kernels that don't, or a stack without a step cache"
            )
        pieces = self._pieces(latents, groups, verdicts, whole)
        for index, (group, piece) in enumerate(zip(groups, pieces, strict=True)):
            own = latents if count == 1 else latents[index : index + 1]
            if verdicts[index].compute and not self._cache.neutral:
                history = group.histories.setdefault(0, self._cache.forecast.begin())
                history.record(self._context.step, [piece - own])
                group.shapes = (shape,)
            self._cache.learn(group.memory, site, piece, verdicts[index].compute)
        if whole is not None and len(computing) == count:
            return whole
        output = pieces[0] if count == 1 else torch.cat(pieces)
        return refilled(self._state.shell, iter([output] if torch.is_tensor(given) else output.unbind()))

    def end(self) -> Outcome:
        """Say what was done."""
        return self._tally.outcome(self._tokens)

    def _latents(self, given: Any) -> torch.Tensor:
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

    def _output(
        self,
        arguments: Mapping[str, Any],
        latents: torch.Tensor,
        computing: list[int],
        count: int,
        compute: Callable[[Mapping[str, Any], torch.Tensor | None], Any],
    ) -> Any:
        """Run the forward for the images that are computed; None where there are none."""
        if not computing:
            return None
        images = None
        if len(computing) < count:
            images = torch.tensor(computing, device=latents.device)
            arguments = select_rows(dict(arguments), images, count)
        output = compute(arguments, images)
        given, tensors = next(iter(arguments.values())), tensors_of(output)
        expected = [tensor.shape for tensor in tensors_of(given)]
        if [tensor.shape for tensor in tensors] != expected:
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
                pieces.append(own + group.histories[0].predict(self._context.step)[0])
        return pieces
