"""The one table of a measurement, for the terminal, the report and Markdown; losers are shown losing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .results import ConfigurationResult, Results
from .statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Verdict = Literal["wins", "loses", "ties", ""]

_ABSENT = "-"
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
    return ("configuration", "s/image", "speed-up", "fewer FLOPs", *scored, *distance, "sharpness", "PSNR dB", "SSIM")


def rows(results: Results) -> list[Row]:
    """One row a configuration, in the results' order."""
    return [_row(results, configuration) for configuration in results.configurations]


def rich_table(results: Results, *, narrow: bool = False) -> Table:
    """The table for the terminal; a narrow one breaks its cells before the intervals."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=results.title, title_justify="left", pad_edge=False)
    for index, name in enumerate(header(results)):
        table.add_column(name, justify="right" if index else "left")
    for row in rows(results):
        cells = [Text(cell, style=_STYLES[row.verdict] if " vs " in cell else "") for cell in row.cells]
        table.add_row(*(_broken(cell) if narrow else cell for cell in cells))
    return table


def markdown(results: Results) -> str:
    """The table for a README."""
    names = header(results)
    lines = [names, ("---", *("---:",) * (len(names) - 1)), *(row.cells for row in rows(results))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(advantage: Interval | None) -> Verdict:
    """What a paired difference says: a win or a loss only where its whole interval lies on that side of zero."""
    if advantage is None:
        return ""
    return "wins" if advantage.low > 0 else "loses" if advantage.high < 0 else "ties"


def _row(results: Results, configuration: ConfigurationResult) -> Row:
    name = configuration.name
    rival = results.rival(name)
    advantage = None if rival is None else results.advantage(name, rival, "judge")
    cells = [name, f"{configuration.median_seconds / results.images_per_round:.3f}"]
    cells.append(f"{results.speed_up(name):.2f}" if name != results.baseline else "1 (baseline)")
    cells.append(f"{results.flops_ratio(name):.2f}")
    if _has(results, "judge"):
        cells.append(_metric(configuration, "judge", ".3f"))
        cells.append(_ABSENT if advantage is None else f"{advantage:+.3f} vs {rival}")
    if _has(results, "frechet"):
        cells.append(_metric(configuration, "frechet", ".3f"))
    reference = results[results.baseline].metrics["sharpness"].interval.estimate
    sharp = configuration.metrics["sharpness"].interval.estimate
    cells.append(f"{sharp:.2f} ({sharp / reference:.0%})")
    for metric, spec in (("psnr", ".1f"), ("ssim", ".3f")):
        present = metric in configuration.metrics and name != results.baseline
        cells.append(f"{configuration.metrics[metric].interval.estimate:{spec}}" if present else _ABSENT)
    return Row(tuple(cells), verdict(advantage))


def _broken(cell: Text) -> Text:
    from rich.text import Text

    return Text(cell.plain.replace(" [", "\n[").replace(" vs ", "\nvs "), style=cell.style)


def _metric(configuration: ConfigurationResult, name: str, spec: str) -> str:
    return f"{configuration.metrics[name].interval:{spec}}" if name in configuration.metrics else _ABSENT


def _has(results: Results, metric: str) -> bool:
    return any(metric in configuration.metrics for configuration in results.configurations)
