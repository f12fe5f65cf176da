"""The one table of a measurement, for the terminal, the report and Markdown; losers are shown losing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastdit.measure.noise import too_noisy
from fastdit.measure.results import ConfigurationResult, Results
from fastdit.measure.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["wins", "loses", "ties", ""]

#: Writes an interval under a number's format.
Show = Callable[[Interval, str], str]

_ABSENT = "-"
_CELL_WIDTH = 11  # characters of any other cell in a narrow one: "vs 15 steps"
_NAME_WIDTH = 11  # characters that a configuration's name keeps in any terminal
#: The columns of a narrow terminal.
_NARROW = ("run", "s/image", "speed-up", "judge", "judge vs plain at its time", "PSNR dB")
_STYLES: dict[Verdict, str] = {"wins": "green", "loses": "red", "ties": "dim", "": ""}


@dataclass(frozen=True)
class Row:
    """One configuration's cells, in the order of `header`, and how it fares against plain steps at its time."""

    cells: tuple[str, ...]
    verdict: Verdict


def header(results: Results) -> tuple[str, ...]:
    """The columns' names."""
    return tuple(_columns(results, format))


def rows(results: Results, show: Show = format) -> list[Row]:
    """One row a configuration, in the results' order; `show` writes an interval under a format."""
    columns = _columns(results, show).values()
    return [
        Row(
            tuple(cell(entry) for cell in columns),
            verdict(results.advantage(entry.name, results.rival(entry.name), "judge")),
        )
        for entry in results.configurations
    ]


def rich_table(results: Results, *, narrow: bool = False) -> Table:
    """The table for the terminal; a narrow one (80 characters) has fewer columns, and half the intervals' widths."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=results.title, title_justify="left", pad_edge=False, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = header(results)
    shown = [index for index, name in enumerate(names) if not narrow or name in _NARROW]
    for index in shown:
        widths = {"max_width": _CELL_WIDTH if narrow else None} if index else {"min_width": _NAME_WIDTH}
        table.add_column(names[index], justify="right" if index else "left", **widths)
    for row in rows(results, _broken if narrow else format):
        cells = [row.cells[index] for index in shown]
        cells = [re.sub(r" (?=vs |too |\()", "\n", cell) if narrow else cell for cell in cells]
        table.add_row(*(Text(cell, style=_STYLES[row.verdict] if "vs " in cell else "") for cell in cells))
    return table


def verdict(advantage: Interval | None) -> Verdict:
    """What a paired difference says: a win or a loss only where its whole interval lies on that side of zero."""
    if advantage is None:
        return ""
    return "wins" if advantage.low > 0 else "loses" if advantage.high < 0 else "ties"


def _columns(results: Results, show: Show) -> dict[str, Callable[[ConfigurationResult], str]]:
    """Every column's name, and what writes a configuration's cell in it."""
    baseline, names = results.baseline, {name for entry in results.configurations for name in entry.metrics}
    sharpest = results[baseline].metrics["sharpness"].interval.estimate

    def seconds(entry: ConfigurationResult) -> str:
        return f"{entry.median_seconds / results.images_per_round:.3f}"

    def speed_up(entry: ConfigurationResult) -> str:
        found = results.speed_up(entry.name)
        noisy = f"{found.estimate:.2f} too noisy"
        return "1" if entry.name == baseline else noisy if too_noisy(found) else show(found, ".2f")

    def fewer_flops(entry: ConfigurationResult) -> str:
        ratio = results.flops_ratio(entry.name)
        return _ABSENT if ratio is None else f"{ratio:.2f}"

    def measured(name: str) -> Callable[[ConfigurationResult], str]:
        return lambda entry: show(entry.metrics[name].interval, ".3f") if name in entry.metrics else _ABSENT

    def against_plain(metric: str, *, named: bool) -> Callable[[ConfigurationResult], str]:
        def cell(entry: ConfigurationResult) -> str:
            rival = results.rival(entry.name)
            advantage = results.advantage(entry.name, rival, metric)
            if rival is None or advantage is None:
                return _ABSENT
            return show(advantage, "+.3f") + (f" vs {rival} ({seconds(results[rival])} s)" if named else "")

        return cell

    def likeness(name: str, spec: str) -> Callable[[ConfigurationResult], str]:
        return lambda entry: (
            format(entry.metrics[name].interval.estimate, spec)
            if name in entry.metrics and entry.name != baseline
            else _ABSENT
        )

    def sharpness(entry: ConfigurationResult) -> str:
        own = entry.metrics["sharpness"].interval.estimate
        return f"{own:.2f} ({own / sharpest:.0%})"

    columns: dict[str, Callable[[ConfigurationResult], str]] = {
        "run": lambda entry: entry.name,
        "s/image": seconds,
        "speed-up": speed_up,
        "fewer FLOPs": fewer_flops,
    }
    if "judge" in names:
        columns["judge"] = measured("judge")
        columns["judge vs plain at its time"] = against_plain("judge", named=True)
    if "frechet" in names:
        columns["Frechet distance"] = measured("frechet")
        if any(entry.metrics["frechet"].samples for entry in results.configurations if "frechet" in entry.metrics):
            columns["Frechet vs plain at its time"] = against_plain("frechet", named=False)
    columns |= {"sharpness": sharpness, "PSNR dB": likeness("psnr", ".1f"), "SSIM": likeness("ssim", ".3f")}
    networks = {"lpips": "LPIPS", "dinov2": "DINOv2"}
    columns |= {title: likeness(name, ".3f") for name, title in networks.items() if name in names}
    truths = {"residue": "ground's residue, 1/1000", "palette": "palette", "edges": "edges, px"}
    return columns | {title: measured(name) for name, title in truths.items() if name in names}


def _broken(interval: Interval, spec: str) -> str:
    return f"{interval.estimate:{spec}}\n±{interval.spread:{spec.lstrip('+')}}"
