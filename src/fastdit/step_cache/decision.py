"""How a step is decided, whatever the gate: forced steps, doubt, one read from the device, and what is remembered."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastdit.errors import FastditWarning, IncompatibleStack
from fastdit.layout import gather_tokens
from fastdit.run import Run
from fastdit.step import StepContext
from fastdit.step_cache.forecasters.base import History
from fastdit.step_cache.site import Memory, Site, Verdict

if TYPE_CHECKING:
    from fastdit.step_cache.base import StepCache

Shapes = tuple[torch.Size, ...]


@dataclasses.dataclass
class GroupState:
    """What is kept for one group of images that are decided together: the whole batch, or one image of it."""

    memory: Memory
    histories: dict[int, History] = dataclasses.field(default_factory=dict)
    shapes: Shapes | None = None
    consecutive: int = 0
    skipped: int = 0


def _agree(known: Shapes, shapes: Shapes) -> bool:
    """Whether streams have the shapes that they had, as far as these are known."""
    return len(known) == len(shapes) and all(new[: len(old)] == old for old, new in zip(known, shapes, strict=True))


@dataclasses.dataclass
class BranchState:
    """All that a step cache keeps for one transformer, branch and stage: its groups, by the part that they decide."""

    parts: dict[int, list[GroupState]] = dataclasses.field(default_factory=dict)
    #: By segment, which of its features belongs to the latents' stream.
    streams: dict[int, int] = dataclasses.field(default_factory=dict)
    #: A forward's output without its tensors, for caches that skip whole forwards.
    shell: Any = None
    #: The last step at which the branch was called.
    step: int | None = None

    def enter(self, step: int) -> str | None:
        """Note a call at a step; say so where the branch was left out before it, and what is kept is old."""
        before, self.step = self.step, step
        return "left out before" if before is not None and step > before + 1 else None

    def groups(self, part: int, count: int, make: Callable[[], Memory]) -> list[GroupState]:
        """Get the groups of a part, fresh where their number changed."""
        if len(self.parts.get(part, ())) != count:
            self.parts[part] = [GroupState(make()) for _ in range(count)]
        return self.parts[part]

    def tensors(self) -> list[torch.Tensor]:
        """List every tensor that is kept."""
        kept: list[torch.Tensor] = []
        for part in self.parts.values():
            for group in part:
                kept += [value for value in vars(group.memory).values() if torch.is_tensor(value)]
                for history in group.histories.values():
                    kept += history.tensors()
        return kept

    def lift(self, sources: torch.Tensor, tokens: int) -> None:
        """Bring histories and signals to another token layout; what has no tokens in it stays, other signals go.

        Raises `IncompatibleStack` where the stream holds more than the layout's tokens.
        """
        for groups in self.parts.values():
            for index, group in enumerate(groups):
                place = index % len(sources)  # a guided batch holds the samples several times in a row
                own = sources if len(groups) == 1 else sources[place : place + 1]

                def lifted(values: torch.Tensor, own: torch.Tensor = own) -> torch.Tensor:
                    if values.shape[1] != tokens:
                        raise IncompatibleStack(
                            f"a history can't be carried to the next stage: the blocks' stream has {values.shape[1]} "
                            f"tokens, text beside the image's {tokens}; set stage_change='reset'"
                        )
                    return gather_tokens(values, own.to(values.device).repeat(values.shape[0] // len(own), 1))

                for number, history in group.histories.items():
                    history.lift(self.streams[number], lifted)
                for name, value in vars(group.memory).items():
                    if torch.is_tensor(value) and value.dim() > 0:
                        fits = value.dim() == 3 and value.shape[1] == tokens
                        setattr(group.memory, name, lifted(value) if fits else None)
                # Streams have other lengths now, and as many images as before.
                group.shapes = None if group.shapes is None else tuple(shape[:1] for shape in group.shapes)
                group.consecutive = group.skipped = 0


class Decider:
    """Takes the decisions of a run for the cache of one transformer."""

    def __init__(
        self, cache: StepCache, run: Run, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda changes: changes
    ) -> None:
        self.cache, self._run, self._reduce = cache, run, reduce

    def decide(
        self, groups: Sequence[GroupState], site: Site, shapes: Shapes, segment: int, forced: str | None = None
    ) -> list[Verdict]:
        """Decide for each group at the start of a segment.

        `shapes` are those of a group's streams; `forced` computes whatever the gate says.
        """
        cache, context = self.cache, site.context
        signal = cache.signal(site)
        asked, changes = [], []
        for index, group in enumerate(groups):
            own = signal if signal is None or len(groups) == 1 else signal[index : index + 1]
            reason, change = self._forced(group, context, shapes, segment), None
            reason = forced or reason
            if reason is None and own is not None:
                change = cache.change(group.memory, own)
                if change is None:
                    reason = "no history"
                else:
                    changes.append(change)
            asked.append((group, own, reason, change))
        read = iter(self._read(changes))
        verdicts = []
        for group, own, reason, change in asked:
            verdict = self._verdict(group, reason, 0.0 if change is None else next(read), context)
            if own is not None:
                cache.remember(group.memory, own, verdict.compute)
            if verdict.compute:
                group.memory.restart()
            group.consecutive = 0 if verdict.compute else group.consecutive + 1
            group.skipped += not verdict.compute
            verdicts.append(verdict)
        return verdicts

    def _forced(self, group: GroupState, context: StepContext, shapes: Shapes, segment: int) -> str | None:
        """Say why a group must be computed. A group of other shapes is emptied."""
        known, group.shapes = group.shapes, shapes
        if known is not None and known != shapes and not _agree(known, shapes):
            group.memory, group.histories = self.cache.memory(), {}
            group.consecutive = group.skipped = 0
            return "another shape"
        if reason := self.cache.policy.forced(context, group.consecutive, group.skipped):
            return reason
        if self.cache.neutral:
            return "neutral"
        if segment in group.histories and group.histories[segment].filled:
            return None
        return "first step of a stage" if context.stage_step == 0 else "no history"

    def _read(self, changes: list[torch.Tensor]) -> list[float]:
        """Read all changes at once: the one host-device synchronisation of a decision."""
        if not changes:
            return []
        together = torch.stack(changes) if len(changes) > 1 else changes[0][None]
        pairs: list[list[float]] = self._reduce(together).tolist()
        return [amount / scale if scale else math.nan for amount, scale in pairs]

    def _verdict(self, group: GroupState, forced: str | None, change: float, context: StepContext) -> Verdict:
        if forced is not None:
            return Verdict(True, forced)
        if math.isfinite(change):
            return self.cache.decide(group.memory, change, context)
        if self._run.doubt():
            warnings.warn(
                f"{type(self.cache).__name__}: the signal of step {context.step} ({context.branch}) gives no finite "
                "number; the step is computed. Look for NaN or inf in the latents or in the weights",
                FastditWarning,
                stacklevel=2,
            )
        return Verdict(True, "doubt: change is not finite")
