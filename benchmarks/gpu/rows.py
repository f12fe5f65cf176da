"""One configuration of a pipeline and what came of it; the cells that a claim is made of, the most telling first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastdit.accelerator import Accelerator
from fastdit.engine.aot import AOT
from fastdit.engine.base import Engine
from fastdit.engine.compile import Compile
from fastdit.schedule.preset_schedule import PresetSchedule
from fastdit.schedule.presets import RALU_PRESETS
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.schedule.ralu import RALU
from fastdit.step_cache.gates.step_mask import StepMask
from fastdit.token_cache.toca import ToCa
from published import Published

Rival = Callable[[Any], AbstractContextManager[Any]]
"""What another library does to a pipeline, for as long as it is entered; it gives the pipeline to call."""

#: Kernels of diffusers' dispatcher; one that is not installed is a row that says so.
KERNELS = ("_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "sage", "xformers")


@dataclass
class Stage:
    """What a whole step of one stage takes when it starts on an idle device.

    `host_seconds` until all of it is launched, `seconds` until it is done: where they are alike, the host is too slow.
    """

    stage: int
    steps: int
    host_seconds: float
    seconds: float


@dataclass
class Row:
    """What came of one configuration; `seconds` are those of its whole calls, one a round.

    `make` gives its accelerators; it is None for the untouched pipeline, or the one that `rival` makes faster while
    it is entered. A row that is the `same` must give the plain run's latents, and `error_to_plain` is how far it was.
    `step_seconds` are medians over the forwards that ran in whole, one a stage, and `stages` those of one more call
    that waits after every step. `peak_bytes` is what the row alone would need. `error` says why it was left.
    """

    name: str
    make: Callable[[], list[Accelerator]] | None
    steps: int | None
    rival: Rival | None = None
    same: bool = False
    batch: int = 1
    stack: Any = None
    prepared: float | None = None
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    forwards: int | None = None
    skipped: int | None = None
    peak_bytes: int | None = None
    error_to_plain: float | None = None
    error: str | None = None
    pipeline: Any = None
    held_bytes: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is the untouched pipeline."""
        return self.make is None and self.rival is None

    def to_json(self) -> dict[str, Any]:
        """Give what a result keeps of it."""
        hidden = {"make", "pipeline", "rival", "held_bytes"}
        shown = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in hidden}
        return shown | {"stages": [dataclasses.asdict(stage) for stage in self.stages]}


def plain(steps: int, batch: int = 1) -> Row:
    """The untouched pipeline."""
    return Row(f"plain, {steps} steps{_of(batch)}", None, steps, batch=batch)


def _of(batch: int) -> str:
    return "" if batch == 1 else f", batch {batch}"


def imposed(steps: int, share: float) -> StepMask:
    """Give a mask that computes the first step and, spread evenly, so large a share of all."""
    computed = {round(index * steps / round(share * steps)) for index in range(round(share * steps))}
    return StepMask(tuple(step in computed for step in range(steps)))


class Cells:
    """The rows of one model: what runs at which stages, by which engine, with which share of steps skipped."""

    def __init__(self, model: Published, directory: str) -> None:
        self.steps, self.share, self._directory = model.architecture.steps, model.computed, directory
        self.fewer = 28 if self.steps > 28 else self.steps // 2
        own = [name for name in RALU_PRESETS if name in model.architecture.presets]
        fast = next(name for name in ("7x", "6x") if name in model.architecture.presets)
        self.slow, self.fast = RALU(own[0]), RALU(own[-1])
        self.whole_slow, self.whole_fast = ProgressiveResolution(own[0]), ProgressiveResolution(fast)
        self.engines: dict[str, Engine | None] = {
            "": None,
            "Compile": Compile(directory=directory),
            "CUDA graphs": Compile(cuda_graphs=True, directory=directory),
            "AOT": AOT(directory=directory),
        }

    def cell(
        self, schedule: PresetSchedule | None = None, engine: str = "", *, masked: bool = False, batch: int = 1
    ) -> Row:
        """Give the row of a schedule, an engine and a mask, each or none."""
        steps = self.steps if schedule is None else sum(schedule.recipe.steps)
        parts: list[Accelerator | None] = [schedule, imposed(steps, self.share) if masked else None]
        made = [part for part in (*parts, self.engines[engine]) if part is not None]
        named = f"{type(schedule).__name__} {schedule.preset}" if schedule is not None else ""
        names = ", ".join(part for part in (named, "mask" if masked else "", engine) if part)
        title = (names or "empty stack") + _of(batch)
        whole = schedule is None
        return Row(title, lambda: made, self.steps if whole else None, same=whole and not masked, batch=batch)

    def claims(self) -> list[Row]:
        """List the cells {plain, RALU, two stages} x {eager, Compile, CUDA graphs, AOT} x {every step, mask}."""
        cell, fast, slow, whole = self.cell, self.fast, self.slow, self.whole_fast
        first = [
            plain(self.steps),
            plain(self.fewer),
            cell(engine="Compile"),
            cell(fast, "Compile", masked=True),
            cell(fast),
            cell(masked=True),
            cell(fast, masked=True),
            cell(fast, "Compile"),
            cell(engine="Compile", masked=True),
            cell(slow),
            cell(slow, "Compile"),
            cell(engine="CUDA graphs"),
            cell(engine="AOT"),
            cell(fast, "CUDA graphs", masked=True),
            cell(whole),
            cell(whole, "Compile", masked=True),
            cell(),
        ]
        four = [
            plain(self.steps, 4),
            plain(self.fewer, 4),
            cell(engine="Compile", batch=4),
            cell(fast, batch=4),
            cell(fast, "Compile", masked=True, batch=4),
        ]
        every = [
            cell(schedule, engine, masked=masked)
            for schedule in (None, fast, whole, slow, self.whole_slow)
            for masked in (False, True)
            for engine in self.engines
        ]
        kernels = [Row(f"attention {name}", partial(attention, name), self.steps, same=True) for name in KERNELS]
        others = [Row("ToCa", lambda: [ToCa()], self.steps), *kernels, *self.adapters()]
        return list({row.name: row for row in (*first, *four, *every, *others)}.values())

    def adapters(self) -> list[Row]:
        """List what other packages bring; one that is not installed is a row that says so."""
        return [
            Row("XFormers (adapter)", _xformers, self.steps, same=True),
            Row("TensorRT (adapter)", lambda: _tensorrt(self._directory), self.steps, same=True),
        ]


def attention(name: str) -> list[Accelerator]:
    """Give an attention kernel of diffusers' dispatcher."""
    from fastdit.attention.dispatcher import Attention

    return [Attention(name)]


def _xformers() -> list[Accelerator]:
    from fastdit_xformers import XFormers

    return [XFormers()]


def _tensorrt(directory: str) -> list[Accelerator]:
    from fastdit_tensorrt import TensorRT

    return [TensorRT(directory=directory)]
