"""Which stack to take: what the committed results say, as Markdown for the pages that advise. No number is typed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastdit.measure.results import ConfigurationResult, Results
from fastdit.measure.statistics import Interval
from fastdit.measure.table import verdict
from fastdit.mini.prompts import held_out
from measurements import load

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"

#: Measurements at equal time on an embedded pipeline, and the model that it was.
EQUAL_TIME = {
    "caching": "FLUX",
    "quality-fast": "FLUX",
    "presets-flux": "FLUX",
    "spatial-flux": "FLUX",
    "spatial-sd3": "SD3",
}

#: Where the presets of a family were measured as they are.
PRESETS = {"flux": "presets-flux", "sd3": "spatial-sd3"}

#: How many prompts the gallery shows: the first held-out ones of a single object, with a background.
GALLERY = 8


@dataclass(frozen=True)
class Shown:
    """A run whose pictures are shown: the file names' stem, the measurement that times it, and its name there."""

    stem: str
    source: str
    name: str

    @staticmethod
    def prompts() -> list[str]:
        """What the pictures show."""
        return held_out(GALLERY, kind="single", background=True)


#: The runs of the gallery, each schedule before the plain run that takes as long; `figures.py` draws them.
RUNS = (
    Shown("plain-50", "presets-flux", "50 steps"),
    Shown("teacache", "caching", "TeaCache .12, Taylor 1"),
    Shown("progressive-4x", "presets-flux", "ProgressiveResolution 4x"),
    Shown("plain-16", "presets-flux", "16 steps"),
    Shown("progressive-14x", "presets-flux", "ProgressiveResolution 14x"),
    Shown("plain-5", "presets-flux", "5 steps"),
)

_VERDICTS = {"wins": "ahead", "loses": "behind", "ties": "no difference shown"}
_PLAIN = "judge, against plain steps of its time"


@cache
def results(name: str) -> Results:
    """A measurement at equal time."""
    return load(RESULTS / f"{name}.json")


@cache
def data(name: str) -> dict[str, Any]:
    """Any other committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def measured(kind: str) -> str:
    """Every run at equal time that an accelerator took part in."""
    rows = [
        (model, run.name, *_fared(results(name), run))
        for name, model in EQUAL_TIME.items()
        for run in results(name).configurations
        if kind in (one["type"] for one in (run.stack or {}).get("accelerators", ()))
    ]
    if not rows:
        return "Not measured at equal time."
    return (
        "Each run beside plain sampling of fewer steps that takes as long, on held-out prompts of the embedded\n"
        "pipelines; a higher score is better ([results](../results.md)).\n\n"
        + _table(("embedded model", "run", "times faster than 50 steps", _PLAIN, "so it is"), rows, left=(0, 1, 4))
    )


def numbers() -> str:
    """Three numbers for somebody who looks for the first time."""
    spatial, caching, parts = results("presets-flux"), results("caching"), data("composition")["speed_ups"]
    preset, cached, few = "ProgressiveResolution 4x", "TeaCache .18, Taylor 1", "15 steps"
    rival, longer = _beside(spatial, spatial[preset])
    factors = " x ".join(f"{parts[part]['estimate']:.1f}" for part in ("ProgressiveResolution", "TeaCache", "engine"))
    return "\n".join(
        (
            f'* **{_faster(spatial, preset)} times** faster than 50 steps with `ProgressiveResolution("4x")`; a judge '
            f"scores its pictures\n  {spatial.advantage(preset, rival, 'judge'):+.3f} to plain sampling that takes "
            f"{'longer' if longer else 'as long'} ({rival}).",
            f"* **{_likeness(caching, cached)}** between the pictures of 50 steps and those of `TeaCache(0.18, "
            f"forecast=Taylor(1))`,\n  {_faster(caching, cached)} times faster; {few}, {_faster(caching, few)} times "
            f"faster, come to {_likeness(caching, few)}.",
            f"* **{parts['together']['estimate']:.1f} times** for a schedule, a cache and an engine together "
            f"({factors} for each alone):\n  speed only, on random weights.",
        )
    )


def purposes() -> str:
    """The stack for a purpose, and what was measured of it."""
    stage = data("engines")["stages"][-1]
    error = stage["errors"]["AOT"] / stage["errors"]["eager"]
    rows = [
        (
            "exact but for rounding",
            "`[AOT()]`",
            f"{Interval(**stage['ratios']['AOT']):.2f}",
            f"error to float32 {error:.2f} times the plain model's ({stage['tokens']} tokens, a CPU)",
        )
    ]
    for purpose, stack, found, name in (
        ("near-lossless", "`[TeaCache(0.12, forecast=Taylor(1))]`", results("caching"), "TeaCache .12, Taylor 1"),
        ("fast", '`[ProgressiveResolution("4x")]`', results("presets-flux"), "ProgressiveResolution 4x"),
        ("fastest", '`[ProgressiveResolution("14x")]`', results("presets-flux"), "ProgressiveResolution 14x"),
    ):
        speed, judged, said = _fared(found, found[name])
        rows.append((purpose, stack, speed, said if judged == "-" else f"judge {judged}; {_ground(found, name)}"))
    return _table(("you want it", "take", "times faster, at 50 steps", "measured"), rows, left=(0, 1, 3))


def presets(model: str) -> str:
    """A family's presets of `ProgressiveResolution`: FLOPs of the published model, time and score of the embedded."""
    found, counted = results(PRESETS[model]), data({"flux": "flops", "sd3": "flops-sd3-medium"}[model])
    plain = next(iter(counted["tflops"].values()))["transformer"]
    rows = [
        (
            f"`{run.name.split()[1]}`",
            f"{plain / counted['tflops'][run.name]['transformer']:.2f}",
            *_fared(found, run),
        )
        for run in found.configurations
        if run.name.startswith("ProgressiveResolution ")
    ]
    fewer = f"times fewer FLOPs, {counted['model']} at {counted['pixels']} px"
    return _table(("preset", fewer, "times faster, embedded pipeline", _PLAIN, "so it is"), rows, left=(0, 4))


def caches() -> str:
    """The caches of 50 steps, the fastest first, and how near the plain run comes that takes a little longer."""
    found = results("caching")
    own = [run for run in found.configurations if "accelerators" in (run.stack or {})]
    rows = [
        (run.name, f"{found.speed_up(run.name):.2f}", _likeness(found, run.name), *_slower(found, run))
        for run in sorted(own, key=lambda run: -found.speed_up(run.name).estimate)
    ]
    return _table(("run", "times faster than 50 steps", "PSNR to 50 steps", "plain run next to it", "its PSNR"), rows)


def engines() -> str:
    """What engines gain at a number of tokens, and how long a first picture takes."""
    found = data("engines")
    names = list(found["stages"][0]["ratios"])
    rows = [
        (f"times faster, {stage['tokens']} tokens", *(f"{Interval(**stage['ratios'][name]):.2f}" for name in names))
        for stage in found["stages"]
    ]
    for process, words in enumerate(("first picture of a first process", "of a second process")):
        rows.append((f"{words}, s", *(f"{found['starts'][name][process]:.1f}" for name in names)))
    return _table(("", *names), rows)


def pictures(folder: str, prompts: str, runs: str) -> str:
    """The first pictures of the first runs, as a table; `folder` is where pictures lie, seen from the page."""
    shown = RUNS[: int(runs)]
    width = 640 // len(shown)
    heads = [
        run.name.replace("Resolution", "<br>Resolution")
        + ("" if run.name == results(run.source).baseline else f"<br>{_faster(results(run.source), run.name)} times")
        for run in shown
    ]
    rows = [
        tuple(
            f'<img src="{folder}/pictures/{run.stem}-{number}.webp" alt="{prompt}: {run.name}" width="{width}">'
            for run in shown
        )
        for number, prompt in enumerate(Shown.prompts()[: int(prompts)])
    ]
    return _table(tuple(heads), rows, left=(), others=":-:")


def _fared(found: Results, run: ConfigurationResult) -> tuple[str, str, str]:
    """A run's speed-up, the judge's paired difference to plain steps of its time, and what that says.

    Where no plain run takes about as long, a slower one stands for it: by likeness to the full run where the seed's
    picture is kept, by the judge otherwise.
    """
    speed = f"{found.speed_up(run.name):.2f}"
    if found.rival(run.name) is None and "psnr" in run.metrics:
        slower, likeness = _slower(found, run)
        return speed, "-", f"{_likeness(found, run.name)} to 50 steps; {slower}: {likeness}"
    rival, longer = _beside(found, run)
    advantage = found.advantage(run.name, rival, "judge")
    assert advantage is not None, f"{run.name} or {rival} has no judge's scores"
    return speed, f"{advantage:+.3f} to {rival}{', slower' if longer else ''}", _VERDICTS[verdict(advantage)]


def _beside(found: Results, run: ConfigurationResult) -> tuple[str, bool]:
    """Name the plain run that a run is compared with, and whether it takes longer: the next slower one, then."""
    rival = found.rival(run.name)
    return (rival, False) if rival is not None else (_next_slower(found, run), True)


def _ground(found: Results, name: str) -> str:
    """What is left of a background whose form is known, beside that of the full run."""
    run, full = (found[one].metrics["residue"].interval.estimate for one in (name, found.baseline))
    return f"even grounds off by {run:.1f} thousandths, at 50 steps {full:.1f}"


def _slower(found: Results, run: ConfigurationResult) -> tuple[str, str]:
    """The fastest plain run that takes at least as long, by its name and speed, and its likeness to 50 steps."""
    slower = _next_slower(found, run)
    likeness = _likeness(found, slower) if slower != found.baseline else "the same"
    return f"{slower}, {_faster(found, slower)} times faster", likeness


def _next_slower(found: Results, run: ConfigurationResult) -> str:
    plain = [one for one in found.configurations if one.stack is None and one.median_seconds >= run.median_seconds]
    return min(plain, key=lambda one: one.median_seconds).name


def _faster(found: Results, name: str) -> str:
    return f"{found.speed_up(name).estimate:.1f}"


def _likeness(found: Results, name: str) -> str:
    return f"{found[name].metrics['psnr'].interval.estimate:.1f} dB"


def _table(
    names: tuple[str, ...], rows: Iterable[tuple[str, ...]], left: tuple[int, ...] = (0,), others: str = "--:"
) -> str:
    rule = ("---" if column in left else others for column in range(len(names)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, tuple(rule), *rows))
