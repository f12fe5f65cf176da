"""The pictures of README and documentation: a grid of the embedded pipeline's, and plots of the committed results.

Tiles are WebP files by run and prompt. Plots are SVG files for light and for dark pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import typer

from advice import IMAGES, RUNS, Shown, results
from fastdit import ProgressiveResolution, Stack, Taylor, TeaCache, load_mini
from fastdit.measure.experiment import Configuration, plain
from fastdit.measure.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

app = typer.Typer(help=__doc__)

CONFIGURATIONS = {
    "plain-50": plain(50),
    "teacache": Configuration(
        "TeaCache .12, Taylor 1", Stack([TeaCache(0.12, forecast=Taylor(1))]), {"num_inference_steps": 50}
    ),
    "progressive-4x": Configuration("ProgressiveResolution 4x", Stack([ProgressiveResolution("4x")])),
    "plain-16": plain(16),
    "progressive-14x": Configuration("ProgressiveResolution 14x", Stack([ProgressiveResolution("14x")])),
    "plain-5": plain(5),
}


@app.command()
def pictures() -> None:
    """Draw the first held-out prompts with every run; the prompt's number is its seed."""
    pipeline = load_mini()
    prompts = Shown.prompts()
    for run in RUNS:
        configuration = CONFIGURATIONS[run.stem]
        generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
        images = configuration.open(pipeline)(prompts, generator=generators, **configuration.call).images
        for number, image in enumerate(images):
            image.save(IMAGES / "pictures" / f"{run.stem}-{number}.webp", quality=92)


@dataclass(frozen=True)
class Theme:
    """The colours of a page: its text, its lines, and those of series in the order that they are drawn in."""

    text: str
    grid: str
    series: tuple[str, ...]


THEMES = {
    "light": Theme("#24292f", "#d0d7de", ("#57606a", "#0969da", "#bc4c00", "#8250df", "#1a7f37")),
    "dark": Theme("#c9d1d9", "#30363d", ("#8b949e", "#58a6ff", "#f0883e", "#bc8cff", "#56d364")),
}


@dataclass(frozen=True)
class Series:
    """Runs that one colour joins: what they are, and each one's label, speed-up and quality."""

    name: str
    points: list[tuple[str, Interval, Interval]]


@app.command()
def plots() -> None:
    """Draw speed-up against the judge's score (schedules), and against likeness to 50 steps (caches)."""
    found = results("spatial-flux")
    presets = {
        "fewer plain steps": [run.name for run in found.configurations if run.stack is None],
        "ProgressiveResolution, early": [
            run.name for run in found.configurations if run.name.startswith("ProgressiveResolution ")
        ],
        "RALU, the paper's recipe": [run.name for run in found.configurations if "paper's recipe" in run.name],
        "latents enlarged": [run.name for run in found.configurations if "latents enlarged" in run.name],
    }
    _draw("speed-quality", "spatial-flux", "judge", "judge's score (higher is better)", presets)
    found = results("caching")
    names = [run.name for run in found.configurations if run.name != found.baseline]
    libraries = {
        "fewer plain steps": [name for name in names if name.endswith(" steps")],
        "fastdit": [name for name in names if "accelerators" in (found[name].stack or {}) and "Ca " not in name],
        "diffusers": [name for name in names if name.startswith("diffusers")],
        "cache-dit": [name for name in names if name.startswith("cache-dit")],
    }
    _draw("speed-likeness", "caching", "psnr", "PSNR to the pictures of 50 steps, dB", libraries)


def _draw(stem: str, source: str, metric: str, axis: str, groups: dict[str, list[str]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fastdit", "svg.fonttype": "path", "font.size": 11})
    from matplotlib import pyplot

    found = results(source)
    series = [
        Series(name, [(run, found.speed_up(run), found[run].metrics[metric].interval) for run in runs])
        for name, runs in groups.items()
    ]
    for name, theme in THEMES.items():
        figure, axes = pyplot.subplots(figsize=(7.6, 4.4), layout="constrained")
        _style(axes, theme, axis)
        for colour, one in zip(theme.series, series, strict=False):
            _series(axes, one, colour)
        axes.legend(frameon=False, labelcolor=theme.text, loc="best")
        figure.savefig(IMAGES / f"{stem}-{name}.svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def _style(axes: Axes, theme: Theme, quality: str) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 3, 4, 6, 8, 10])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("times faster than 50 plain steps", color=theme.text)
    axes.set_ylabel(quality, color=theme.text)
    axes.tick_params(colors=theme.text)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)


def _series(axes: Axes, series: Series, colour: str) -> None:
    points = sorted(series.points, key=lambda point: point[1].estimate)
    speed = [point[1].estimate for point in points]
    quality = [point[2].estimate for point in points]
    presets = series.name.startswith("ProgressiveResolution")
    joined = presets or series.name == "fewer plain steps"
    axes.plot(
        speed, quality, "o", ls="-" if joined else "", color=colour, label=series.name, markersize=5.5, linewidth=1.4
    )
    if presets:
        for run, x, y in points:
            axes.annotate(
                run.split()[1].rstrip(","),
                (x.estimate, y.estimate),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                color=colour,
            )


if __name__ == "__main__":
    app()
