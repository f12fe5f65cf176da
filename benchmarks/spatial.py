"""Schedules at equal time on the embedded pipelines: ProgressiveResolution's presets beside their rivals.

`pictures` makes and scores everything and may share its machine; `clock` then times it all in turns on a quiet one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

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
from fastdit.mini.language import language_of
from fastdit.schedule.bottleneck_sampling import BottleneckSampling
from fastdit.schedule.just_in_time import JustInTime
from fastdit.schedule.lifts.latent import LatentLift
from fastdit.schedule.lifts.spectral import SpectralLift
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.schedule.ralu import RALU
from fastdit.stack import Stack
from measurements import load, with_baseline, with_pictures_of
from peers import Peer

RESULTS = Path("benchmarks/results")
DTYPE = torch.bfloat16
SIDES: dict[Architecture, int] = {"flux": 256, "flux-512": 512, "sd3": 256}
HALF_STEPS = 14

#: Plain step counts around the times of the schedules, the baseline first.
PLAIN: dict[Architecture, tuple[int, ...]] = {
    "flux": (50, 18, 16, 10, 9, 8, 7, 5, 4),
    "flux-512": (50, 28, 20, 17, 14, 10, 9, 7, 6, 5),
    "sd3": (50, 28, 18, 14, 12, 7, 5),
}

#: Steps of the rivals that take as long as a preset: the paper's recipe, BottleneckSampling, a progressive schedule.
RIVALS: dict[Literal["flux", "sd3"], dict[str, tuple[RALU, tuple[int, int, int], tuple[int, int]]]] = {
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

#: At 1,024 tokens: every schedule by the steps that make it so many times faster than 50 steps.
AT: dict[str, dict[str, tuple[int, ...]]] = {
    "3x": {
        "RALU": (10, 8, 10),
        "RALU.paper": (10, 8, 10),
        "ProgressiveResolution": (24, 11),
        "BottleneckSampling": (4, 20, 8),
        "JustInTime": (11, 9, 7),
    },
    "5x": {
        "RALU": (7, 5, 6),
        "RALU.paper": (7, 5, 6),
        "ProgressiveResolution": (16, 6),
        "BottleneckSampling": (2, 14, 5),
        "JustInTime": (7, 5, 4),
    },
    "7x": {
        "RALU": (5, 3, 4),
        "RALU.paper": (5, 3, 4),
        "ProgressiveResolution": (12, 4),
        "BottleneckSampling": (2, 9, 3),
        "JustInTime": (5, 3, 3),
    },
    "10x": {
        "RALU": (4, 2, 3),
        "RALU.paper": (4, 2, 3),
        "ProgressiveResolution": (9, 3),
        "BottleneckSampling": (1, 7, 2),
        "JustInTime": (4, 2, 2),
    },
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class HalfSize:
    """Pictures of half the size, enlarged: what a schedule must be better than, since the judge looks no closer."""

    def __init__(self, pipeline: Any, side: int) -> None:
        self.pipeline, self.transformer, self.side = pipeline, pipeline.transformer, side

    def __call__(self, **call: Any) -> Any:
        made = self.pipeline(height=self.side // 2, width=self.side // 2, **call)
        made.images = [image.resize((self.side, self.side), Resampling.BICUBIC) for image in made.images]
        return made


def configurations(mini: Architecture) -> list[Configuration]:
    """Plain sampling, and the presets, each with the rivals that take as long."""
    half = {"pipeline": HalfSize(pipeline_of(mini, DTYPE), SIDES[mini]), "call": {"num_inference_steps": HALF_STEPS}}
    schedules = large_schedules() if mini == "flux-512" else small_schedules(mini)
    return [
        *map(plain, PLAIN[mini]),
        Peer(f"half the size, {HALF_STEPS} steps, enlarged", **half),
        *(Configuration(name, Stack([schedule])) for name, schedule in schedules.items()),
    ]


def small_schedules(mini: Literal["flux", "sd3"]) -> dict[str, Accelerator]:
    """The presets, each with the rivals that take as long."""
    schedules: dict[str, Accelerator] = {}
    for preset, (recipe, bottleneck, progressive) in RIVALS[mini].items():
        schedules |= {
            f"ProgressiveResolution {preset}": ProgressiveResolution(preset),
            f"{preset} rival: paper's recipe, {_listed(recipe.recipe.steps)}": recipe,
            f"{preset} rival: BottleneckSampling, {_listed(bottleneck)}": BottleneckSampling(bottleneck),
            f"{preset} rival: latents enlarged, {_listed(progressive)}": enlarged(progressive),
        }
    return schedules


def large_schedules() -> dict[str, Accelerator]:
    """Every spatial schedule at each speed."""
    schedules: dict[str, Accelerator] = {}
    for speed, steps in AT.items():
        two = steps["ProgressiveResolution"]
        schedules |= {
            f"{speed} RALU, {_listed(steps['RALU'])}": RALU("4x", steps=steps["RALU"]),
            f"{speed} RALU.paper, {_listed(steps['RALU.paper'])}": RALU.paper("4x", steps=steps["RALU.paper"]),
            f"{speed} ProgressiveResolution, {_listed(two)}": ProgressiveResolution("4x", steps=two),
            f"{speed} spectral, {_listed(two)}": ProgressiveResolution("4x", steps=two, lift=SpectralLift()),
            f"{speed} latents enlarged, {_listed(two)}": ProgressiveResolution(
                steps=two, lift=LatentLift(resize="bicubic", noise="fresh")
            ),
            f"{speed} JustInTime, {_listed(steps['JustInTime'])}": JustInTime(steps["JustInTime"]),
            f"{speed} BottleneckSampling, {_listed(steps['BottleneckSampling'])}": BottleneckSampling(
                steps["BottleneckSampling"]
            ),
        }
    return schedules


def enlarged(steps: tuple[int, int]) -> ProgressiveResolution:
    """The plainest of two stages: latents are enlarged, and noise is drawn anew."""
    return ProgressiveResolution(steps=steps, lift=LatentLift(resize="bicubic", noise="fresh"))


def _listed(steps: tuple[int, ...]) -> str:
    return " + ".join(map(str, steps))


MiniOption = Annotated[Architecture, typer.Option(help="Which embedded pipeline: flux, flux-512 or sd3.")]
OutOption = Annotated[Path | None, typer.Option(help="The JSON file; one by the pipeline's name in the results.")]


@app.command()
def pictures(
    mini: MiniOption = "flux",
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 200,
    each: Annotated[int, typer.Option(help="Pictures of each prompt, from as many seeds.")] = 1,
    batch: int = 8,
    seed: int = 0,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="What the pictures are made in.")] = "bfloat16",
    only: Annotated[
        str,
        typer.Option(help="Rows whose names match this; they join the results that are there, or take their place."),
    ] = "",
    out: OutOption = None,
) -> None:
    """Make and score the pictures of everything; the seconds are of a machine as it is."""
    chosen = [entry for entry in configurations(mini) if re.search(only, entry.name)]
    path = _path(mini, out)
    known = load(path) if only and path.exists() else None
    if known is not None and known.prompts != tuple(language_of(mini).held_out(prompts, seed, background=True) * each):
        raise SystemExit(f"{path} has {len(known.prompts)} pictures a row of other prompts; make all of it anew")
    results = compare(
        chosen,
        title=f"schedules, {mini}",
        prompts=prompts,
        each=each,
        batch=batch,
        seed=seed,
        mini=mini,
        dtype=getattr(torch, dtype),
    )
    (results if known is None else with_pictures_of(known, results)).save(path)


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
