"""Schedules at equal time on the embedded pipelines: ProgressiveResolution's presets beside their rivals.

`pictures` makes and scores everything and may share its machine; `clock` then times it all in turns on a quiet one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL.Image import Resampling
from rich.console import Console

from common import clock, compare, pipeline_of
from fastdit.accelerator import Accelerator
from fastdit.measure.experiment import Configuration, plain
from fastdit.measure.table import rich_table
from fastdit.mini import Architecture
from fastdit.schedule.bottleneck_sampling import BottleneckSampling
from fastdit.schedule.lifts.latent import LatentLift
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.schedule.ralu import RALU
from fastdit.stack import Stack
from measurements import load, with_baseline, with_pictures_of

RESULTS = Path("benchmarks/results")
DTYPE = torch.bfloat16
SIDE = 256
HALF_STEPS = 14

#: Plain step counts around the times of the schedules, the baseline first.
PLAIN: dict[Architecture, tuple[int, ...]] = {
    "flux": (50, 18, 16, 10, 9, 8, 7, 5, 4),
    "sd3": (50, 28, 18, 14, 12, 7, 5),
}

#: Steps of the rivals that take as long as a preset: the paper's recipe, BottleneckSampling, a progressive schedule.
RIVALS: dict[Architecture, dict[str, tuple[RALU, tuple[int, int, int], tuple[int, int]]]] = {
    "flux": {
        "4x": (RALU.paper("4x", steps=(6, 7, 8)), (4, 15, 5), (22, 7)),
        "7x": (RALU.paper("7x", steps=(3, 4, 6)), (2, 11, 3), (14, 4)),
        "10x": (RALU.paper("7x"), (2, 7, 2), (10, 3)),
        "14x": (RALU.paper("7x", steps=(1, 2, 3)), (1, 5, 2), (7, 2)),
    },
    "sd3": {
        "2x": (RALU.paper("2x", steps=(6, 7, 10)), (5, 18, 5), (28, 7)),
        "3x": (RALU.paper("3x", steps=(4, 4, 8)), (3, 13, 4), (20, 5)),
        "6x": (RALU.paper("3x", steps=(2, 2, 5)), (2, 7, 2), (7, 4)),
        "9x": (RALU.paper("3x", steps=(1, 2, 3)), (1, 5, 2), (5, 3)),
    },
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class HalfSize:
    """Pictures of half the size, enlarged: what a schedule must be better than, since the judge looks no closer."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.transformer = pipeline, pipeline.transformer

    def __call__(self, **call: Any) -> Any:
        made = self.pipeline(height=SIDE // 2, width=SIDE // 2, **call)
        made.images = [image.resize((SIDE, SIDE), Resampling.BICUBIC) for image in made.images]
        return made


def configurations(mini: Architecture) -> list[Configuration]:
    """Plain sampling, and the presets, each with the rivals that take as long."""
    half = {"pipeline": HalfSize(pipeline_of(mini, DTYPE)), "call": {"num_inference_steps": HALF_STEPS}}
    schedules: dict[str, Accelerator] = {}
    for preset, (recipe, bottleneck, progressive) in RIVALS[mini].items():
        schedules |= {
            f"ProgressiveResolution {preset}": ProgressiveResolution(preset),
            f"{preset} rival: paper's recipe, {_listed(recipe.recipe.steps)}": recipe,
            f"{preset} rival: BottleneckSampling, {_listed(bottleneck)}": BottleneckSampling(bottleneck),
            f"{preset} rival: latents enlarged, {_listed(progressive)}": enlarged(progressive),
        }
    return [
        *map(plain, PLAIN[mini]),
        Configuration(f"half the size, {HALF_STEPS} steps, enlarged", **half),
        *(Configuration(name, Stack([schedule])) for name, schedule in schedules.items()),
    ]


def enlarged(steps: tuple[int, int]) -> ProgressiveResolution:
    """The plainest of two stages: latents are enlarged, and noise is drawn anew."""
    return ProgressiveResolution(steps=steps, lift=LatentLift(resize="bicubic", noise="fresh"))


def _listed(steps: tuple[int, ...]) -> str:
    return " + ".join(map(str, steps))


MiniOption = Annotated[Architecture, typer.Option(help="Which embedded pipeline: flux or sd3.")]
OutOption = Annotated[Path | None, typer.Option(help="The JSON file; one by the pipeline's name in the results.")]


@app.command()
def pictures(
    mini: MiniOption = "flux",
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 200,
    each: Annotated[int, typer.Option(help="Pictures of each prompt, from as many seeds.")] = 1,
    batch: int = 8,
    seed: int = 0,
    only: Annotated[
        str,
        typer.Option(help="Rows whose names match this; they join the results that are there, or take their place."),
    ] = "",
    out: OutOption = None,
) -> None:
    """Make and score the pictures of everything; the seconds are of a machine as it is."""
    chosen = [entry for entry in configurations(mini) if re.search(only, entry.name)]
    results = compare(
        chosen, title=f"schedules, {mini}", prompts=prompts, each=each, batch=batch, seed=seed, mini=mini, dtype=DTYPE
    )
    path = _path(mini, out)
    (with_pictures_of(load(path), results) if only else results).save(path)


@app.command(name="clock")
def clock_(
    mini: MiniOption = "flux",
    rounds: Annotated[int, typer.Option(help="Rounds in turns, of the pictures' first prompts.")] = 6,
    out: OutOption = None,
) -> None:
    """Time everything in turns, write the seconds into the results, and print them."""
    rows = configurations(mini)
    results = clock(rows, load(_path(mini, out)), rounds=rounds, mini=mini, dtype=DTYPE)
    results = with_baseline(results, rows[0].name)
    Console(width=220).print(rich_table(results))
    results.save(_path(mini, out))


def _path(mini: Architecture, out: Path | None) -> Path:
    return out or RESULTS / f"spatial-{mini}.json"


if __name__ == "__main__":
    np.seterr(all="raise")
    app()
