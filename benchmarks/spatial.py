"""Schedules at equal time on the embedded pipelines: RALU's parts, its paper's recipe, rivals, fewer plain steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from common import compare
from fastdit.accelerator import Accelerator
from fastdit.measure.experiment import Configuration, plain
from fastdit.measure.table import rich_table
from fastdit.spatial.bottleneck import BottleneckSampling
from fastdit.spatial.lift import LatentLift, PixelLift
from fastdit.spatial.ralu import PRESETS, RALU
from fastdit.stack import Stack

#: Plain step counts around the times of the schedules, the baseline first.
PLAIN = {"flux": (50, 17, 12, 10, 8, 7), "sd3": (28, 14, 11, 9, 8)}

#: The presets of each embedded pipeline's family, and the one whose parts are exchanged.
OWN = {"flux": (("4x", "5x", "7x"), "5x"), "sd3": (("2x", "3x"), "3x")}


def schedules(mini: str) -> dict[str, Accelerator]:
    """The presets, the paper's, and one preset with one part changed at a time."""
    presets, varied = OWN[mini]
    coarse, fine = PRESETS[varied].steps
    whole = {"steps": (coarse, fine), "ends": (0.5,), "starts": (0.15,)}
    mixed = {"steps": (coarse - 4, 3, fine - 1), "ends": (0.5, 0.8), "starts": (0.2, 0.15), "ratio": 0.3}
    return {
        **{f"RALU {preset}": RALU(preset) for preset in presets},
        **{f"RALU {preset}, paper": RALU.paper(preset) for preset in presets},
        f"{varied}: noise drawn anew": RALU(varied, lift=PixelLift(noise="fresh")),
        f"{varied}: latents enlarged (progressive)": RALU(**whole, lift=LatentLift(resize="bicubic", noise="fresh")),
        f"{varied}: tokens copied": RALU(**whole),
        f"{varied}: a later start": RALU(varied, starts=(0.4,)),
        f"{varied}: a mixed stage, coarse frame": RALU(**mixed, lift=PixelLift()),
        f"{varied}: a mixed stage, fine frame": RALU(**mixed, lift=PixelLift(), frame="fine"),
        "BottleneckSampling": BottleneckSampling(),
        "BottleneckSampling, pixels": BottleneckSampling(lift=PixelLift()),
    }


def main(
    mini: Annotated[str, typer.Option(help="Which embedded pipeline: flux or sd3.")] = "flux",
    prompts: Annotated[int, typer.Option(help="Held-out prompts; one picture each.")] = 200,
    batch: int = 8,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file; one by the pipeline's name in the results.")] = None,
) -> None:
    """Generate, time and score everything in turns."""
    chosen = [
        *map(plain, PLAIN[mini]),
        *(Configuration(name, Stack([schedule])) for name, schedule in schedules(mini).items()),
    ]
    results = compare(chosen, title=f"schedules, {mini}", prompts=prompts, batch=batch, seed=seed, mini=mini)
    Console(width=200).print(rich_table(results))
    results.save(out or Path(f"benchmarks/results/spatial-{mini}.json"))


if __name__ == "__main__":
    np.seterr(all="raise")
    typer.run(main)
