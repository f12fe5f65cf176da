"""One offline HTML page of a measurement: pictures, the speed/quality plot, the steps' timelines, the table."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fastdit.measure import charts
from fastdit.measure.noise import remarks, too_noisy
from fastdit.measure.results import ConfigurationResult, JsonObject, Results
from fastdit.measure.statistics import CONFIDENCE, Interval
from fastdit.measure.table import header, rows, verdict

#: What a step can be, in the legend's order.
ACTIONS = ("computed", "partial", "reused", "forecast")


@dataclass(frozen=True)
class Cell:
    """One step of a timeline: what was done, how many tokens it had relative to the most, and its story."""

    action: str
    height: float
    title: str


@dataclass(frozen=True)
class Band:
    """The steps of one stage."""

    tokens: int | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Timeline:
    """One configuration's steps; `share` is how many it took relative to the most."""

    name: str
    summary: str
    share: float
    bands: tuple[Band, ...]


#: Rows that are shown with pictures, steps and a label; the table has all of them.
DETAILED = 40

#: Bytes of pictures that a page holds at most, before they become text.
EMBEDDED = 18_000_000


def write_report(
    results: Results, directory: Path, name: str = "report.html", waterfalls: Sequence[charts.Waterfall] = ()
) -> Path:
    """Write `directory`/`name` with the pictures that lie there embedded; give its path."""
    path = directory / name
    path.write_text(render_report(results, directory, waterfalls), encoding="utf-8")
    return path


def render_report(results: Results, directory: Path, waterfalls: Sequence[charts.Waterfall] = ()) -> str:
    """The page as text; it refers to nothing outside itself."""
    environment = Environment(
        loader=PackageLoader("fastdit.measure"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    chosen = detailed(results)
    lines = timelines(chosen)
    done = {cell.action for line in lines for band in line.bands for cell in band.cells}
    shown = _pictures_that_fit(chosen, directory)
    pictures = {entry.name: [_data_uri(directory / name) for name in entry.images[:shown]] for entry in chosen}
    metric = next((name for name in ("judge", "ssim") if any(name in entry.metrics for entry in chosen)), None)
    points = [
        charts.Point(entry.name, results.speed_up(entry.name), _quality(entry, metric), entry.stack is None)
        for entry in chosen
        if metric is not None and (metric in entry.metrics or entry.stack is None)
    ]
    return environment.get_template("report.html.j2").render(
        results=results,
        summary=summary(results),
        remarks=list(remarks(results)),
        prompts=results.prompts[:shown],
        gallery=pictures.items() if shown else (),
        frame=charts,
        plot=charts.speed_quality(points) if len(points) > 1 else None,
        metric={"judge": "the judge", "ssim": "SSIM to the full run"}.get(metric or "", ""),
        waterfalls=waterfalls,
        left_out=len(results.configurations) - len(chosen),
        timelines=lines,
        actions=[action for action in ACTIONS if action in done],
        confidence=CONFIDENCE,
        machines=" and ".join(results.settings.get("machines", [str(results.environment)])),
        header=header(results),
        rows=rows(results),
    )


def _breakable(name: str) -> Markup:
    """Let a name be broken where a new word begins within it."""
    return Markup(re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\()", "<wbr>", str(escape(name))))


def detailed(results: Results) -> list[ConfigurationResult]:
    """Choose the rows that are shown in detail: the baseline, then whatever no other beats, then the fastest."""
    every = list(results.configurations)
    if len(every) <= DETAILED:
        return every
    baseline, *others = sorted(every, key=lambda entry: (entry.name != results.baseline, entry.median_seconds))
    best, front = float("-inf"), []
    for entry in others:
        value = max(
            (entry.metrics[name].interval.estimate for name in ("judge", "ssim") if name in entry.metrics), default=0.0
        )
        if value > best:
            best = value
            front.append(entry)
    rest = [entry for entry in others if entry not in front]
    return [baseline, *front, *rest][:DETAILED]


def _quality(entry: ConfigurationResult, metric: str | None) -> Interval:
    """Give a row's quality; the full run is like itself."""
    return entry.metrics[metric].interval if metric in entry.metrics else Interval(1.0, 1.0, 1.0)


def _pictures_that_fit(entries: Sequence[ConfigurationResult], directory: Path) -> int:
    """Count the pictures of each row that a page has room for."""
    shown = min(len(entry.images) for entry in entries)
    while shown and sum((directory / name).stat().st_size for one in entries for name in one.images[:shown]) > EMBEDDED:
        shown -= 1
    return shown


def summary(results: Results) -> list[str]:
    """What came out, in sentences: the fastest stack, its speed-up, and how it fares against its equal-time rival."""
    accelerated = [entry for entry in results.configurations if entry.stack is not None]
    if not accelerated:
        return []
    fastest = min(accelerated, key=lambda entry: entry.median_seconds)
    speed_up = results.speed_up(fastest.name)
    sentences = [f"{fastest.name} is {speed_up:.2f} times as fast as {results.baseline}."]
    if too_noisy(speed_up):
        sentences = [f"How much faster {fastest.name} is than {results.baseline} was not shown: times are too noisy."]
    rival = results.rival(fastest.name)
    advantage = results.advantage(fastest.name, rival, "judge")
    if rival is not None and advantage is not None:
        ours, theirs = (results[name].metrics["judge"].interval for name in (fastest.name, rival))
        outcome = {"wins": "better", "loses": "worse", "ties": "no measurable difference", "": ""}[verdict(advantage)]
        sentences.append(
            f"The judge gives it {ours:.3f}, and {theirs:.3f} to {_plain(rival)}, which takes "
            f"{results[rival].median_seconds:.2f} s against its {fastest.median_seconds:.2f} s: "
            f"{advantage:+.3f}, {outcome}."
        )
    return sentences


def _plain(name: str) -> str:
    return name if name.startswith("plain") else f"plain {name}"


def timelines(configurations: Sequence[ConfigurationResult]) -> list[Timeline]:
    """The first recorded run of every configuration."""
    recorded = [(entry, entry.records[0]["steps"]) for entry in configurations if entry.records]
    most_steps = max((len(steps) for _, steps in recorded), default=0)
    most_tokens = max((step["tokens"] or 0 for _, steps in recorded for step in steps), default=0)
    lines = []
    for entry, steps in recorded:
        stages = [list(members) for _, members in groupby(steps, key=lambda step: step["stage"])]
        bands = (Band(stage[0]["tokens"], tuple(_cell(step, most_tokens) for step in stage)) for stage in stages)
        run = sum(step["blocks_run"] for step in steps) / max(sum(step["blocks"] for step in steps), 1)
        told = f"{len(steps)} steps, {run:.0%} of their blocks run, {entry.median_seconds:.2f} s"
        lines.append(Timeline(entry.name, told, len(steps) / most_steps, tuple(bands)))
    return lines


def _cell(step: JsonObject, most_tokens: int) -> Cell:
    noise = "" if step["sigma"] is None else f", noise {step['sigma']:.3f}"
    reason = f" ({step['reason']})" if step["reason"] else ""
    flops = "" if step["flops"] is None else f", {step['flops'] / 1e9:.2f} GFLOPs"
    story = (
        f"step {step['step'] + 1}{noise}, {step['tokens']} tokens: {step['action']}{reason}, "
        f"{1000 * step['seconds']:.1f} ms{flops}"
    )
    return Cell(step["action"], step["tokens"] / most_tokens if step["tokens"] else 1.0, story)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
