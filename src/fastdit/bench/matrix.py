"""What goes together on a pipeline, by running it: singles, pairs and triples of accelerators, each a cell.

A cell is exact (bit-equal to the plain pipeline), works, is refused with its reason, or fails. Of one that ran it is
known which parts fired, whether a second call gives the same bits, whether the pipeline itself still makes the bits
that it made before, and what is gained over the product of the parts' own gains.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator, Level
from fastdit.bench.doctor import Finding, every_accelerator
from fastdit.bench.store import BenchError, write_whole
from fastdit.bench.workers import Job, Workers
from fastdit.errors import FastditError, FastditWarning, InvalidConfig, NeverFired
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import Interval, bootstrap
from fastdit.measure.timing import timed
from fastdit.stack import Stack

Status = Literal["exact", "works", "refused", "fails"]

#: What a table shows of a status.
SIGNS: dict[str, str] = {"exact": "=", "works": "ok", "refused": "-", "fails": "FAILS"}

#: Cells of a reason that are named.
_NAMED = 3


@dataclass(frozen=True)
class Cell:
    """What came of some accelerators together; `told` is the reason of a refusal, or the error.

    `fired` names the parts that acted; `repeats` says whether a second call gave the same bits, `off` whether the
    pipeline's own picture is what it was. `seconds` and `plain` are rounds in turns.
    """

    parts: tuple[str, ...]
    status: Status
    told: str = ""
    fired: tuple[str, ...] = ()
    repeats: bool | None = None
    off: bool | None = None
    seconds: tuple[float, ...] = ()
    plain: tuple[float, ...] = ()

    @property
    def gain(self) -> float | None:
        """How many times faster than the plain pipeline."""
        return median(self.plain) / median(self.seconds) if self.seconds else None

    @property
    def sound(self) -> bool:
        """Whether nothing about it is wrong: a refusal is an answer, too."""
        return self.status != "fails" and self.repeats is not False and self.off is not False


@dataclass(frozen=True)
class Matrix:
    """Every cell on one pipeline, by its parts."""

    pipeline: str
    machine: str
    parts: tuple[str, ...]
    cells: dict[tuple[str, ...], Cell]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Matrix:
        """Read what `to_json` gave."""
        own = [field.name for field in fields(Cell)]
        kept: list[Any] = [
            {name: tuple(one[name]) if isinstance(one[name], list) else one[name] for name in own}
            for one in data["cells"]
        ]
        cells = [Cell(**one) for one in kept]
        return cls(data["pipeline"], data["machine"], tuple(data["parts"]), {one.parts: one for one in cells})

    def over_product(self, cell: Cell) -> Interval | None:
        """Give a cell's gain over the product of its parts' own; None for a single, and where one did not run."""
        alone = [self.cells.get((part,)) for part in cell.parts]
        runs = [one for one in (cell, *alone) if one is not None and one.seconds]
        if len(cell.parts) < 2 or len(runs) != len(cell.parts) + 1:
            return None
        rounds = min(len(one.seconds) for one in runs)
        pairs = [(np.array(one.plain[:rounds]), np.array(one.seconds[:rounds])) for one in runs]

        def statistic(rows: Any) -> Any:
            gains = [np.median(plain[rows], axis=-1) / np.median(own[rows], axis=-1) for plain, own in pairs]
            return gains[0] / prod(gains[1:])

        return bootstrap(statistic, rounds)

    def markdown(self) -> str:
        """Give the pairs as a table, then every reason for a refusal."""
        lines = [
            f"# What goes together on {self.pipeline}",
            "",
            "Written by `fastdit matrix`, which ran every cell: `=` gives the plain pipeline's bits, `ok` works, `-` "
            "is refused by name; a number is the gain over the product of the two's own gains, with its interval. The "
            "diagonal holds each one's own gain.",
            "",
            f"| | {' | '.join(self.names)} |",
            f"|---|{'---|' * len(self.names)}",
        ]
        for row, name in zip(self.parts, self.names, strict=True):
            lines.append(f"| {name} | {' | '.join(self._shown(row, column) for column in self.parts)} |")
        lines += ["", "## Parts that did not fire", ""]
        lines += [f"* {part}: {', '.join(beside)}" for part, beside in self._idle().items()] or ["None."]
        lines += ["", "## Why cells are refused, or fail", ""]
        lines += [f"* {cells}: {why}" for cells, why in self._reasons()] or ["None is."]
        return "\n".join([*lines, "", f"Measured on {self.machine}.", ""])

    @property
    def names(self) -> list[str]:
        """Each part's class, or all of it where another part is of the same class."""
        classes = [part.partition("(")[0] for part in self.parts]
        return [one if classes.count(one) == 1 else part for one, part in zip(classes, self.parts, strict=True)]

    def _idle(self) -> dict[str, list[str]]:
        """Give the parts that did not fire, each with what was beside it."""
        found: dict[str, list[str]] = {}
        for cell in self.cells.values():
            for part in cell.parts if cell.seconds else ():
                if part not in cell.fired:
                    others = self._together(one for one in cell.parts if one != part)
                    found.setdefault(self._together([part]), []).append(f"beside {others}" if others else "alone")
        return found

    def _together(self, parts: Iterable[str]) -> str:
        return " + ".join(self.names[self.parts.index(part)] for part in parts)

    def _reasons(self) -> Iterator[tuple[str, str]]:
        """Give the cells of every reason, the first ones by name, and the reason as the first of them was told it."""
        cells: dict[str, list[Cell]] = {}
        for cell in self.cells.values():
            if cell.told:
                gist = cell.told
                for place, part in enumerate(cell.parts):
                    gist = gist.replace(part, f"part {place + 1}")
                cells.setdefault(gist, []).append(cell)
        for ones in cells.values():
            named = ", ".join(self._together(one.parts) for one in ones[:_NAMED])
            more = f", and {len(ones) - _NAMED} more" if len(ones) > _NAMED else ""
            yield named + more, ones[0].told

    def _shown(self, row: str, column: str) -> str:
        cell = self.cells.get((row,) if row == column else _key((row, column), self.parts))
        if cell is None:
            return ""
        wrong = "" if cell.sound else " (wrong)"
        if row == column:
            return SIGNS[cell.status] + ("" if cell.gain is None else f" {cell.gain:.2f}") + wrong
        over = self.over_product(cell)
        return SIGNS[cell.status] + ("" if over is None else f" {over:.2f}") + wrong

    def to_json(self) -> dict[str, Any]:
        """Give everything as plain data."""
        cells = []
        for cell in self.cells.values():
            over = self.over_product(cell)
            cells.append({**asdict(cell), "gain": cell.gain, "over_product": None if over is None else asdict(over)})
        return {"pipeline": self.pipeline, "machine": self.machine, "parts": list(self.parts), "cells": cells}

    def html(self) -> str:
        """Give the table as one page that refers to nothing outside of itself."""
        from jinja2 import Environment as Templates
        from jinja2 import PackageLoader, StrictUndefined

        templates = Templates(loader=PackageLoader("fastdit.measure"), autoescape=True, undefined=StrictUndefined)
        rows = [
            (name, [(self._shown(row, column), self._class(row, column)) for column in self.parts])
            for name, row in zip(self.names, self.parts, strict=True)
        ]
        return templates.get_template("matrix.html.j2").render(matrix=self, rows=rows, told=list(self._reasons()))

    def _class(self, row: str, column: str) -> str:
        cell = self.cells.get((row,) if row == column else _key((row, column), self.parts))
        return "none" if cell is None else cell.status if cell.sound else "fails"


class MatrixRun:
    """Runs the cells that a folder has not got yet; each is on disk at once."""

    def __init__(self, pipeline: Any, call: dict[str, Any], folder: Path, *, rounds: int = 3, name: str = "") -> None:
        self.pipeline, self.call, self.folder, self.rounds = pipeline, call, folder, rounds
        self.name = name or type(pipeline).__name__
        try:
            (folder / "cells").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"{folder} can't be written: {error.strerror or error}") from error
        self._reference: np.ndarray[Any, Any] | None = None
        self._check_same()

    def _check_same(self) -> None:
        """Refuse a folder of another pipeline or call. Raises `BenchError`."""
        asked = {"pipeline": self.name, "call": {key: str(value) for key, value in self.call.items()}}
        path = self.folder / "matrix-of.json"
        if not path.exists():
            path.write_text(json.dumps(asked), encoding="utf-8")
        elif json.loads(path.read_text(encoding="utf-8")) != asked:
            raise BenchError(f"{self.folder} holds the matrix of another pipeline or call; choose another folder")

    def run(
        self,
        parts: Sequence[Accelerator],
        most: int = 2,
        progress: Callable[[str, int, int], None] = lambda *_: None,
        workers: Workers | None = None,
    ) -> Matrix:
        """Run every cell of one to `most` parts, of different levels or not; what is refused together is found out.

        Workers of a cluster load the pipeline by its name. Raises `BenchError` where they can't.
        """
        texts = tuple(part.describe() for part in parts)
        wanted = [chosen for size in range(1, most + 1) for chosen in combinations(range(len(parts)), size)]
        asked = [[parts[index] for index in chosen] for chosen in wanted]
        if workers is not None:
            self._elsewhere(workers, asked, progress)
        cells: dict[tuple[str, ...], Cell] = {}
        for done, own in enumerate(asked):
            cell = self.cell(own)
            cells[cell.parts] = cell
            progress("cells", done + 1, len(wanted))
        return Matrix(self.name, str(Environment.capture(str(self.pipeline._execution_device))), texts, cells)

    def _elsewhere(
        self, workers: Workers, asked: Sequence[list[Accelerator]], progress: Callable[[str, int, int], None]
    ) -> None:
        """Have the cells that the folder has not got made by workers; one that kills them is one that fails."""
        missing = {_names(parts): parts for parts in asked if not self._path(_names(parts)).exists()}
        common = {"pipeline": self.name, "call": self.call, "rounds": self.rounds}
        jobs = [
            Job("matrix", common, ({"key": key, "parts": [Stack([part]).to_json() for part in parts]},))
            for key, parts in missing.items()
        ]
        for done, made in enumerate(workers.make(self.folder, jobs)):
            key = made.cell["key"]
            if made.error is not None and not made.died:
                raise BenchError(f"{' + '.join(key)} can't be run: {made.error}")
            if made.error is not None:
                self._keep(Cell(tuple(key), "fails", made.error))
            progress("cells", done + 1, len(jobs))

    def _path(self, key: tuple[str, ...]) -> Path:
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:24]
        return self.folder / "cells" / f"{digest}.json"

    def _keep(self, cell: Cell) -> None:
        text = json.dumps(asdict(cell)) + "\n"
        write_whole(lambda path: path.write_text(text, encoding="utf-8"), self._path(cell.parts))

    def cell(self, parts: list[Accelerator]) -> Cell:
        """Give what comes of some parts: what is kept, or is run and kept now."""
        key = _names(parts)
        path = self._path(key)
        if path.exists():
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kept: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
            return Cell(**kept)
        cell = self.tried(key, parts)
        self._keep(cell)
        return cell

    def tried(self, key: tuple[str, ...], parts: list[Accelerator]) -> Cell:
        """Run a cell."""
        try:
            twin = accelerate(self.pipeline, Stack(parts))
            call = self._call_of(twin)
        except FastditError as error:
            return Cell(key, "refused", str(error))
        reference = self._plain()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                first = self._picture(twin, call)
                again = self._picture(twin, call)
            seconds, plain = self._rounds(twin, call)
        except FastditError as error:
            return Cell(key, "refused", str(error))
        except Exception as error:  # whatever a model or a compiler raises is what is to be told
            return Cell(key, "fails", f"{type(error).__name__}: {error}")
        idle = unfired(parts, said)
        fired = tuple(part.describe() for part in parts if part not in idle)
        same = np.array_equal(first, reference)
        status: Status = "exact" if same else "works"
        if not np.isfinite(first).all():
            return Cell(key, "fails", "the picture is not finite")
        off = np.array_equal(self._picture(self.pipeline, self.call), reference)
        return Cell(key, status, "", fired, np.array_equal(first, again), off, seconds, plain)

    def _call_of(self, twin: Any) -> dict[str, Any]:
        """Give the call that a stack takes: its schedule's own steps where the asked ones don't fit."""
        size = self.call.get("height"), self.call.get("width")
        try:
            twin.fastdit.plan(*size, self.call.get("num_inference_steps"))
        except InvalidConfig:
            twin.fastdit.plan(*size, None)
            return {name: value for name, value in self.call.items() if name != "num_inference_steps"}
        return self.call

    def _picture(self, pipeline: Any, call: dict[str, Any]) -> np.ndarray[Any, Any]:
        generator = torch.Generator().manual_seed(0)
        images: np.ndarray[Any, Any] = np.asarray(pipeline(**call, generator=generator, output_type="np").images)
        return images

    def _plain(self) -> np.ndarray[Any, Any]:
        if self._reference is None:
            self._reference = self._picture(self.pipeline, self.call)
        return self._reference

    def _rounds(self, twin: Any, call: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Time the twin and the plain pipeline in turns."""
        device, own, base = self.pipeline._execution_device, [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastditWarning)
            for _ in range(self.rounds):
                own.append(timed(lambda _: self._picture(twin, call), 0, device)[0])
                base.append(timed(lambda _: self._picture(self.pipeline, self.call), 0, device)[0])
        return tuple(own), tuple(base)


def parts_for(pipeline: Any, levels: Sequence[Level] = tuple(Level)) -> Iterator[Accelerator]:
    """Give the accelerators of some levels that can act on a pipeline here, adapters' among them."""
    for made in every_accelerator():
        if isinstance(made, Finding) or made.level not in levels:
            continue
        try:
            accelerate(pipeline, [made])
        except FastditError:
            continue
        yield made


def unfired(parts: Iterable[Accelerator], said: Iterable[warnings.WarningMessage]) -> list[Accelerator]:
    """Give the parts of a stack that never acted, by what a call warned of."""
    told = " ".join(str(one.message) for one in said if isinstance(one.message, NeverFired))
    return [part for part in parts if part.describe() in told]


def _names(parts: Sequence[Accelerator]) -> tuple[str, ...]:
    return tuple(part.describe() for part in parts)


def _key(pair: tuple[str, str], order: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(pair, key=list(order).index))
