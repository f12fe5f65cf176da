"""One offline HTML page of a measurement: pictures, the speed/quality plot, the steps' timelines, the table."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastdit.measure import charts
from fastdit.measure.noise import remarks
from fastdit.measure.results import ConfigurationResult, JsonObject, Results
from fastdit.measure.statistics import CONFIDENCE
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


def write_report(results: Results, directory: Path, name: str = "report.html") -> Path:
    """Write `directory`/`name` with the pictures that lie there embedded; give its path."""
    path = directory / name
    path.write_text(render_report(results, directory), encoding="utf-8")
    return path


def render_report(results: Results, directory: Path) -> str:
    """The page as text; it refers to nothing outside itself."""
    environment = Environment(
        loader=PackageLoader("fastdit.measure"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lines = timelines(results.configurations)
    done = {cell.action for line in lines for band in line.bands for cell in band.cells}
    shown = min(len(entry.images) for entry in results.configurations)
    pictures = {entry.name: [_data_uri(directory / name) for name in entry.images] for entry in results.configurations}
    points = [
        charts.Point(entry.name, results.speed_up(entry.name), entry.metrics["judge"].interval, entry.stack is None)
        for entry in results.configurations
        if "judge" in entry.metrics
    ]
    return environment.get_template("report.html.j2").render(
        results=results,
        summary=summary(results),
        remarks=list(remarks(results)),
        prompts=results.prompts[:shown],
        gallery=pictures.items() if shown else (),
        frame=charts,
        plot=charts.speed_quality(points) if points else None,
        timelines=lines,
        actions=[action for action in ACTIONS if action in done],
        confidence=CONFIDENCE,
        header=header(results),
        rows=rows(results),
    )


def summary(results: Results) -> list[str]:
    """What came out, in sentences: the fastest stack, its speed-up, and how it fares against its equal-time rival."""
    accelerated = [entry for entry in results.configurations if entry.stack is not None]
    if not accelerated:
        return []
    fastest = min(accelerated, key=lambda entry: entry.median_seconds)
    sentences = [f"{fastest.name} is {results.speed_up(fastest.name):.2f} times as fast as {results.baseline}."]
    rival = results.rival(fastest.name)
    advantage = results.advantage(fastest.name, rival, "judge")
    if rival is not None and advantage is not None:
        ours, theirs = (results[name].metrics["judge"].interval for name in (fastest.name, rival))
        outcome = {"wins": "better", "loses": "worse", "ties": "no measurable difference", "": ""}[verdict(advantage)]
        sentences.append(
            f"The judge gives it {ours:.3f}, and {theirs:.3f} to plain {rival}, which take "
            f"{results[rival].median_seconds:.2f} s against its {fastest.median_seconds:.2f} s: "
            f"{advantage:+.3f}, {outcome}."
        )
    return sentences


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
