"""What a process measured, joined with what others measured before it on the same machine, and shown as a table.

One process may be lucky in where its memory lies. So an interval is given only where a row has three rounds in each of
two processes; until then a ratio is a ratio.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table

from fastdit.measure.environment import Environment
from fastdit.measure.statistics import Interval, ratio_of_medians
from gpu.rows import Row
from published import Published
from saving import write

ROUNDS, PROCESSES = 3, 2


class Results:
    """A file of results that this process adds to; written whole at every `keep`.

    What is there already stays where it is of the same machine, software and kind; else `add` raises `ValueError`.
    """

    def __init__(self, path: Path, *, device: str, dtype: torch.dtype, rehearsal: bool) -> None:
        self.path = path
        own = {"rehearsal": rehearsal, "dtype": str(dtype).removeprefix("torch."), "models": {}}
        self.data: dict[str, Any] = {"environment": dataclasses.asdict(Environment.capture(device)), **own}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            differ = [name for name in ("environment", "rehearsal", "dtype") if kept.get(name) != self.data[name]]
            if differ:
                raise ValueError(f"{path} is of another {' and '.join(differ)}; give another --out, or move it away")
            self.data = kept

    def add(self, name: str, model: Published, parameters: int) -> list[dict[str, Any]]:
        """Give the list of this process's rows of a model, to be filled; those of other processes stay."""
        known = self.data["models"].setdefault(
            name,
            {
                "pixels": model.pixels,
                "text_tokens": model.text_tokens,
                "parameters": parameters,
                "published_step_seconds": dict(model.step_seconds),
                "processes": [],
            },
        )
        rows: list[dict[str, Any]] = []
        known["processes"].append(rows)
        return rows

    def keep(self, name: str, rows: Sequence[Row], into: list[dict[str, Any]]) -> None:
        """Write what this process's rows are now, and what they come to with the other processes'."""
        into[:] = [row.to_json() for row in rows if row.seconds or row.error is not None]
        model = self.data["models"][name]
        model["comparison"] = [dataclasses.asdict(one) for one in compared(model["processes"])]
        write(self.path, self.data)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row beside the plain run of its batch: how many times faster, and which number of plain steps takes as long.

    `interval` is None until there are rounds and processes enough.
    """

    name: str
    seconds: float
    rounds: int
    processes: int
    speed_up: float
    interval: Interval | None
    equal_steps: float | None


def compared(processes: Sequence[Sequence[Mapping[str, Any]]]) -> list[Comparison]:
    """Set every row beside the plain run of most steps of its batch that the same processes have timed."""
    names = list(dict.fromkeys(row["name"] for rows in processes for row in rows if row["error"] is None))
    found = []
    for name in names:
        paired: list[tuple[list[float], list[float]]] = []
        lines: list[float] = []
        for rows in processes:
            timed = {row["name"]: row for row in rows if row["error"] is None and row["seconds"]}
            own = timed.get(name)
            if own is None:
                continue
            plain = [row for row in timed.values() if row["name"].startswith("plain") and row["batch"] == own["batch"]]
            if not plain:
                continue
            full = max(plain, key=lambda row: row["steps"])
            common = min(len(full["seconds"]), len(own["seconds"]))
            paired.append((full["seconds"][:common], own["seconds"][:common]))
            if (line := step_line(plain)) is not None:
                lines.append((median(own["seconds"]) - line[1]) / line[0])
        if not paired:
            continue
        above, below = ([second for pair in paired for second in pair[side]] for side in (0, 1))
        known = len(paired) >= PROCESSES and all(len(pair[0]) >= ROUNDS for pair in paired)
        found.append(
            Comparison(
                name,
                median(below),
                len(below),
                len(paired),
                median(above) / median(below),
                ratio_of_medians(above, below) if known else None,
                median(lines) if lines else None,
            )
        )
    return found


def step_line(plain: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Give the seconds of a plain step and of what every run costs beside; None where there is one number of steps."""
    if len(plain) < 2:
        return None
    each, rest = np.polyfit([row["steps"] for row in plain], [median(row["seconds"]) for row in plain], 1)
    return float(each), float(rest)


def table(title: str, model: Mapping[str, Any]) -> Table:
    """Show the rows that ran in the last process, beside the plain run."""
    shown = Table(title=title, title_justify="left")
    for heading in ("run", "s/run", "speed-up", "as plain steps", "s/step by stage", "host", "skipped", "peak GiB"):
        shown.add_column(heading, justify="left" if heading == "run" else "right")
    beside = {one["name"]: one for one in model["comparison"]}
    for row in model["processes"][-1]:
        if (one := beside.get(row["name"])) is None or row["error"] is not None:
            continue
        interval = one["interval"]
        between = "" if interval is None else f" [{interval['low']:.2f}, {interval['high']:.2f}]"
        shown.add_row(
            row["name"],
            f"{one['seconds']:.3f}",
            f"{one['speed_up']:.2f}{between}",
            "" if one["equal_steps"] is None else f"{one['equal_steps']:.1f}",
            " / ".join(f"{stage['seconds']:.4f}" for stage in row["stages"]),
            " / ".join(f"{stage['host_seconds'] / stage['seconds']:.0%}" for stage in row["stages"]),
            "" if row["forwards"] is None else f"{row['skipped']} of {row['forwards']}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        )
    return shown


def beside_published(model: Mapping[str, Any]) -> str:
    """Say what a plain step takes here, and what others published."""
    rows = model["processes"][-1]
    plain = [row for row in rows if row["name"].startswith("plain") and row["batch"] == 1 and row["seconds"]]
    line = step_line(plain)
    own = "a plain step was not timed" if line is None else f"a plain step takes {line[0]:.5f} s here"
    others = [f"{seconds:.5f} s ({where})" for where, seconds in model["published_step_seconds"].items()]
    return f"{own}; published: {', '.join(others) or 'nothing'}"
