"""Finished cells on disk, at once and whole: one call of one row each, so that a killed run goes on where it stood.

manifest.json                       the experiment, the command, the machine
GROUP/ROW/row.json                  what the row is, and what preparing it took
GROUP/ROW/0003.jsonl                its fourth round: seconds, FLOPs, memory, what every step did
GROUP/ROW/0003-0.png                and its pictures, of the rounds that are shown or scored
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdit.bench.experiment import Experiment, Group, Row
from fastdit.errors import FastditError
from fastdit.measure.environment import Environment

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA_VERSION = 1
_MANIFEST = "manifest.json"


class BenchError(FastditError):
    """A measurement can't be begun, gone on with, or read."""


@dataclass(frozen=True)
class Cell:
    """One timed call: its round, what it was given and what it came to.

    `bytes` is the most memory that was allocated on the device, None on a CPU; `record` what a stack's run tells, None
    for the untouched pipeline, whose `flops` are those of the same steps under an empty stack. `machine` says what it
    ran on where that is a cluster's.
    """

    number: int
    prompts: list[str]
    seeds: list[int]
    seconds: float
    flops: int | None
    bytes: int | None
    record: dict[str, Any] | None
    pictures: list[str]
    machine: str | None = None


class Store:
    """A folder of cells."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, experiment: Experiment, command: Sequence[str]) -> None:
        """Begin an experiment in the folder, or go on with the same one.

        Raises `BenchError` where another one is kept there, or nothing can be written.
        """
        path = self.directory / _MANIFEST
        if path.exists():
            if self.experiment().to_json() != experiment.to_json():
                raise BenchError(
                    f"{self.directory} holds another experiment; choose another folder, or repeat the one that it "
                    f"holds with `fastdit bench --rerun {self.directory}`"
                )
            return
        environment = asdict(Environment.capture())
        data = {"schema": SCHEMA_VERSION, "command": list(command), "environment": environment}
        self._write(path, {**data, "experiment": experiment.to_json()})

    def experiment(self) -> Experiment:
        """Read the experiment that the folder holds. Raises `BenchError` where it holds none that can be read."""
        try:
            return Experiment.from_json(self._manifest()["experiment"])
        except (KeyError, TypeError) as error:
            raise BenchError(f"{self.directory} holds no experiment that can be read: {error!r}") from error

    def environment(self) -> Environment:
        """Read what the experiment was begun on. Raises as `experiment` does."""
        return Environment(**self._manifest()["environment"])

    def machines(self) -> list[str]:
        """Name what the finished cells ran on: a cluster's machines, or the one that the experiment was begun on."""
        experiment = self.experiment()
        found = {
            cell.machine
            for group in experiment.groups()
            for row in experiment.rows(group)
            for cell in self.cells(group, row)
        }
        here = str(self.environment())
        return sorted(here if one is None else one for one in found) or [here]

    def command(self) -> str:
        """Read the command that the experiment was begun with, as a shell takes it. Raises as `experiment` does."""
        return shlex.join(["fastdit", *self._manifest()["command"][1:]])

    def _manifest(self) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads((self.directory / _MANIFEST).read_text(encoding="utf-8"))
            version = data["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{self.directory} holds no experiment that can be read: {error}") from error
        if version != SCHEMA_VERSION:
            raise BenchError(f"{self.directory} has version {version}, and this reads {SCHEMA_VERSION}")
        return data

    def write(self, name: str, data: Any) -> None:
        """Write plain data under a name of its own."""
        self._write(self.directory / name, data)

    def prepared(self, group: Group, row: Row) -> dict[str, Any] | None:
        """Give what preparing a row took, or None where it was not prepared yet."""
        path = self._folder(group, row) / "row.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def keep_row(self, group: Group, row: Row, found: dict[str, Any]) -> None:
        """Keep what a row is and what preparing it took."""
        self._write(self._folder(group, row) / "row.json", {**row.to_json(), **found})

    def added(self, group: Group) -> list[Row] | None:
        """Give the plain rows that were added to a group, as rivals of the same time; None if still to do."""
        path = self.directory / group.key / "rivals.json"
        return [rival(count) for count in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else None

    def keep_added(self, group: Group, rows: Sequence[Row]) -> None:
        """Keep the rivals of a group."""
        self._write(self.directory / group.key / "rivals.json", [row.steps for row in rows])

    def cells(self, group: Group, row: Row) -> list[Cell]:
        """Give a row's finished cells in the order of rounds."""
        paths = sorted(self._folder(group, row).glob("*.jsonl"))
        return [Cell(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def has(self, group: Group, row: Row, number: int) -> bool:
        """Whether a cell is finished."""
        return self._cell(group, row, number).exists()

    def keep(self, group: Group, row: Row, cell: Cell, images: Sequence[Image]) -> None:
        """Keep a finished cell: its pictures first, so that a cell that is there is whole."""
        folder = self._folder(group, row)
        for name, image in zip(cell.pictures, images, strict=False):
            write_whole(lambda path: image.save(path, format="PNG"), folder / name)  # noqa: B023  called at once
        self._write(self._cell(group, row, cell.number), asdict(cell))

    def picture(self, group: Group, row: Row, name: str) -> Path:
        """Give a kept picture's path."""
        return self._folder(group, row) / name

    def write_samples(self, name: str = "samples.parquet") -> Path:
        """Write every finished cell as a row of a Parquet file: group, row, round, seconds, FLOPs, bytes.

        Raises `BenchError` without pyarrow, and as `experiment` does.
        """
        arrow, experiment = parquet(), self.experiment()
        samples = [
            {
                "group": group.title,
                "row": row.name,
                "round": cell.number,
                "seconds": cell.seconds,
                "flops": cell.flops,
                "bytes": cell.bytes,
                "prompts": cell.prompts,
                "seeds": cell.seeds,
            }
            for group in experiment.groups()
            for row in experiment.rows(group) + (self.added(group) or [])
            for cell in self.cells(group, row)
        ]
        path = self.directory / name
        write_whole(lambda temporary: arrow.parquet.write_table(arrow.Table.from_pylist(samples), temporary), path)
        return path

    def _folder(self, group: Group, row: Row) -> Path:
        return self.directory / group.key / group.row_key(row)

    def _cell(self, group: Group, row: Row, number: int) -> Path:
        return self._folder(group, row) / f"{number:04}.jsonl"

    def _write(self, path: Path, data: Any) -> None:
        text = json.dumps(data, allow_nan=False) + "\n"
        write_whole(lambda temporary: temporary.write_text(text, encoding="utf-8"), path)


def write_whole(write: Callable[[Path], object], path: Path) -> None:
    """Write a file beside its place and move it there, so that it is whole or absent. Raises `BenchError`."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise BenchError(f"{path} can't be written: {error.strerror or error}; what was finished is kept") from error


def rival(steps: int) -> Row:
    """Give the plain pipeline of so many steps, as a rival of the same time."""
    return Row(f"plain, {steps} steps", None, steps)


def parquet() -> Any:
    """Import pyarrow. Raises `BenchError` with the command that installs it."""
    try:
        import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise BenchError(
            "Parquet needs pyarrow, which is not installed; run: pip install 'fastdit[parquet]'"
        ) from error
    return import_module("pyarrow")
