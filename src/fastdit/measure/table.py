"""The one table of a measurement, for the terminal, the report and Markdown; losers are shown losing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastdit.measure.results import ConfigurationResult, Results
from fastdit.measure.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["wins", "loses", "ties", ""]

#: Writes an interval under a number's format.
Show = Callable[[Interval, str], str]

_ABSENT = "-"
_NAME_WIDTH = 10  # characters that a configuration's name keeps in any terminal
_STYLES: dict[Verdict, str] = {"wins": "green", "loses": "red", "ties": "dim", "": ""}


@dataclass(frozen=True)
class Row:
    """One configuration's cells, in the order of `header`, and how it fares against plain steps at its time."""

    cells: tuple[str, ...]
    verdict: Verdict


def header(results: Results) -> tuple[str, ...]:
    """The columns' names."""
    scored = ("judge", "judge vs plain at its time") if _has(results, "judge") else ()
    distance = ("Frechet distance",) if _has(results, "frechet") else ()
    paired = ("Frechet vs plain at its time",) if _has_samples(results, "frechet") else ()
    return ("run", "s/image", "speed-up", "fewer FLOPs", *scored, *distance, *paired, "sharpness", "PSNR dB", "SSIM")


def rows(results: Results, show: Show = format) -> list[Row]:
    """One row a configuration, in the results' order; `show` writes an interval under a format."""
    return [_row(results, configuration, show) for configuration in results.configurations]


def rich_table(results: Results, *, narrow: bool = False) -> Table:
    """The table for the terminal; a narrow one (80 columns) breaks its cells and shows half the intervals' widths."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=results.title, title_justify="left", pad_edge=False, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header(results)):
        title = re.sub(r"(?<=[-/])| ", "\n", name) if narrow else name
        table.add_column(title, justify="right" if index else "left", min_width=None if index else _NAME_WIDTH)
    for row in rows(results, _broken if narrow else format):
        cells = [re.sub(r" (?=vs |\()", "\n", cell) if narrow else cell for cell in row.cells]
        table.add_row(*(Text(cell, style=_STYLES[row.verdict] if "vs " in cell else "") for cell in cells))
    return table


def verdict(advantage: Interval | None) -> Verdict:
    """What a paired difference says: a win or a loss only where its whole interval lies on that side of zero."""
    if advantage is None:
        return ""
    return "wins" if advantage.low > 0 else "loses" if advantage.high < 0 else "ties"


def _row(results: Results, configuration: ConfigurationResult, show: Show) -> Row:
    name = configuration.name
    rival = results.rival(name)
    advantage = None if rival is None else results.advantage(name, rival, "judge")
    cells = [name, f"{configuration.median_seconds / results.images_per_round:.3f}"]
    cells.append(show(results.speed_up(name), ".2f") if name != results.baseline else "1")
    cells.append(f"{results.flops_ratio(name):.2f}")
    if _has(results, "judge"):
        cells.append(_metric(configuration, "judge", show))
        cells.append(_ABSENT if advantage is None else f"{show(advantage, '+.3f')} vs {rival}")
    if _has(results, "frechet"):
        cells.append(_metric(configuration, "frechet", show))
    if _has_samples(results, "frechet"):
        farther = None if rival is None else results.advantage(name, rival, "frechet")
        cells.append(_ABSENT if farther is None else show(farther, "+.3f"))
    reference = results[results.baseline].metrics["sharpness"].interval.estimate
    sharp = configuration.metrics["sharpness"].interval.estimate
    cells.append(f"{sharp:.2f} ({sharp / reference:.0%})")
    for metric, spec in (("psnr", ".1f"), ("ssim", ".3f")):
        present = metric in configuration.metrics and name != results.baseline
        cells.append(f"{configuration.metrics[metric].interval.estimate:{spec}}" if present else _ABSENT)
    return Row(tuple(cells), verdict(advantage))


def _broken(interval: Interval, spec: str) -> str:
    return f"{interval.estimate:{spec}}\n±{interval.spread:{spec.lstrip('+')}}"


def _metric(configuration: ConfigurationResult, name: str, show: Show) -> str:
    return show(configuration.metrics[name].interval, ".3f") if name in configuration.metrics else _ABSENT


def _has(results: Results, metric: str) -> bool:
    return any(metric in configuration.metrics for configuration in results.configurations)


def _has_samples(results: Results, metric: str) -> bool:
    return any(entry.metrics[metric].samples for entry in results.configurations if metric in entry.metrics)
