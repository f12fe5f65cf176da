"""Cells that are made elsewhere: in processes of their own here, or on a cluster's machines. Both get the same jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

Plain = Mapping[str, Any]
"""What is sent to another process, as JSON can hold it."""


@dataclass(frozen=True)
class Job:
    """Cells that one process makes in turn, as plain data.

    `kind` names what makes them (see `fastdit.bench.making`), `common` is what all of them share, such as the pipeline,
    and `cells` is what is asked of each. With `fresh` the process makes nothing else, before or after.
    """

    kind: str
    common: Plain
    cells: tuple[Plain, ...]
    fresh: bool = False


@dataclass(frozen=True)
class Made:
    """A cell that is in the folder, or why it is not: an `error`, for which its process may have `died`."""

    cell: Plain
    error: str | None = None
    died: bool = False


class Workers(Protocol):
    """Processes that make cells into a folder."""

    @property
    def count(self) -> int:
        """How many jobs are done at once."""

    def make(self, folder: Path, jobs: Sequence[Job]) -> Iterator[Made]:
        """Do jobs, in whatever order; tell of each cell once its files are in the folder, each of them whole."""


class Processes:
    """A process of this machine for every job, one after another."""

    count = 1

    def make(self, folder: Path, jobs: Sequence[Job]) -> Iterator[Made]:
        """Do jobs; the processes write into the folder themselves."""
        for job in jobs:
            command = [sys.executable, "-m", "fastdit.bench.making", str(folder)]
            given = json.dumps(asdict(job))
            done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
            error = None
            if done.returncode:
                told = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
                error = f"a process of its own ended with {done.returncode}: {told}"
            for cell in job.cells:
                yield Made(cell, error)
