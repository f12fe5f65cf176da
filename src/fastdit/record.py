"""What happened: a record for each forward, and one for the whole call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import torch

from fastdit.meter import ForwardKind

JSON = dict[str, object]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one forward of one branch did. `seconds` is its wall-clock time, `sigma` its noise level where known.

    `transformer` names the module that ran. Steps count anew in each loop of a call; outside of one they are -1.

    `action` is "computed", "reused", "forecast", or "partial" where samples, tokens or block lists differ. `saved`
    gives the share of its FLOPs that a module did not spend, by the module's path: 1 for one that was skipped, "" for
    all. `engine` names what ran the blocks that did run: "eager" is the model's own code.
    """

    step: int
    stage: int
    branch: str
    transformer: str
    sigma: float | None
    tokens: int | None
    batch: int
    action: str
    reason: str
    seconds: float
    engine: str
    saved: Mapping[str, float] = field(repr=False, hash=False)
    _kind: ForwardKind = field(repr=False, compare=False)
    _called: tuple[str, ...] = field(repr=False, compare=False)

    @property
    def blocks(self) -> int | None:
        """How many blocks the model calls in a forward of this kind; None where they were neither seen nor counted."""
        called = self._called or self._kind.blocks
        return None if called is None else len(called)

    @property
    def blocks_run(self) -> int | None:
        """How many blocks this forward really ran, in whole or in part; None as for `blocks`."""
        if self.saved.get("") == 1.0:
            return 0
        called = self._called or self._kind.blocks
        return None if called is None else sum(self.saved.get(name) != 1.0 for name in called)

    @property
    def flops(self) -> int | None:
        """FLOPs that this forward cost (a gate's own are not in it); None where `flops_unknown` says why."""
        return self._kind.flops(self.saved)

    @property
    def full_flops(self) -> int | None:
        """FLOPs of the same forward with every block run on every token."""
        return self._kind.flops({})

    @property
    def flops_unknown(self) -> str | None:
        """Why the FLOPs can't be counted; None where they can."""
        return self._kind.counted if isinstance(self._kind.counted, str) else None

    def to_json(self) -> JSON:
        """Give the record as plain data, FLOPs included."""
        plain = [one.name for one in fields(self) if one.repr]
        return {name: getattr(self, name) for name in (*plain, "blocks_run", "blocks", "flops")}


@dataclass(frozen=True, repr=False)
class RunRecord:
    """The record of a whole call: one entry a forward, in order. `completed` is False after an error or interrupt.

    Prints as a table of its steps.

    `doubts` counts signals that were not finite, `cache_bytes` is the most that the caches held at a time.
    """

    steps: tuple[StepRecord, ...]
    seconds: float
    completed: bool
    doubts: int = 0
    cache_bytes: int = 0

    @property
    def computed(self) -> int:
        """How many forwards ran every block."""
        return sum(record.action == "computed" for record in self.steps)

    @property
    def skipped(self) -> int:
        """How many forwards reused or forecast blocks."""
        return sum(record.action in ("reused", "forecast") for record in self.steps)

    @property
    def partial(self) -> int:
        """How many forwards ran some blocks, tokens or samples and took the rest from a cache."""
        return sum(record.action == "partial" for record in self.steps)

    def __repr__(self) -> str:
        done = f"{len(self.steps)} forwards in {self.seconds:.3f} s{'' if self.completed else ', broken off'}"
        lines = [f"{done}: {self.computed} computed, {self.partial} partial, {self.skipped} skipped"]
        lines += ["step stage  sigma tokens       ms  blocks action   what ran them, branch, reason"] * bool(self.steps)
        for one in self.steps:
            sigma = "-" if one.sigma is None else f"{one.sigma:.3f}"
            place = f"{one.step + 1:>4} {one.stage + 1:>5} {sigma:>6} {one.tokens or '-':>6}"
            what = f"{1000 * one.seconds:>8.1f} {f'{one.blocks_run}/{one.blocks}':>7} {one.action:<8}"
            lines.append(f"{place} {what} {one.engine}, {one.branch}, {one.reason}")
        return "\n".join(lines)

    @property
    def flops(self) -> int | None:
        """FLOPs of the transformer over the call; None where those of a forward can't be counted (`flops_unknown`)."""
        counts = [flops for record in self.steps if (flops := record.flops) is not None]
        return sum(counts) if len(counts) == len(self.steps) else None

    @property
    def flops_unknown(self) -> str | None:
        """Why the FLOPs can't be counted; None where they can."""
        return next((why for record in self.steps if (why := record.flops_unknown) is not None), None)

    def to_json(self) -> JSON:
        """Give the record as plain data, FLOPs included."""
        counts = ("computed", "partial", "skipped", "flops", "flops_unknown")
        names = ("seconds", "completed", "doubts", "cache_bytes", *counts)
        return {name: getattr(self, name) for name in names} | {"steps": [record.to_json() for record in self.steps]}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass did in one forward, as `StepRecord` shows it; without one every block ran on every token.

    `engine` names what ran the blocks, where an engine was there to.
    """

    action: str = "computed"
    reason: str = "no cache"
    saved: Mapping[str, float] = field(default_factory=dict)
    tokens: int | None = None
    engine: str | None = None

    def around(self, inner: Outcome | None) -> Outcome:
        """Join this outcome with that of what acted inside the part that it ran."""
        if inner is None:
            return self
        engine = self.engine or inner.engine
        if inner.action == "computed":
            return Outcome(self.action, self.reason, self.saved, self.tokens, engine)
        action = "partial" if self.action in ("computed", "partial") else self.action
        reason = f"{self.reason}; {inner.reason}" if action == "partial" else self.reason
        return Outcome(action, reason, {**inner.saved, **self.saved}, self.tokens or inner.tokens, engine)


class Stopwatch:
    """Measures one forward: by host time, or by events on its device's stream, read only at the run's end."""

    __slots__ = ("_clock", "_device", "_end", "_seconds", "_start")

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._start: torch.cuda.Event | float = clock()
        self._end: torch.cuda.Event | None = None
        self._device, self._seconds, self._clock = device, 0.0, clock
        if device.type == "cuda":
            self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._start.record(torch.cuda.current_stream(device))

    def stop(self) -> None:
        """End the measurement, without waiting for the device."""
        if self._end is not None:
            self._end.record(torch.cuda.current_stream(self._device))
        elif isinstance(self._start, float):
            self._seconds = self._clock() - self._start

    @property
    def seconds(self) -> float:
        """What was measured; waits for the device."""
        if self._end is not None and not isinstance(self._start, float):
            self._end.synchronize()
            return float(self._start.elapsed_time(self._end)) / 1000.0
        return self._seconds
