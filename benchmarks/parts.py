"""What each part of a schedule is worth: a preset on the embedded pipeline, one part exchanged at a time.

`pictures` makes and scores everything and may share its machine; `clock` then times it all in turns on a quiet one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from common import clock, compare
from fastdit.accelerator import Accelerator
from fastdit.measure.experiment import Configuration
from fastdit.measure.table import rich_table
from fastdit.schedule.just_in_time import JustInTime
from fastdit.schedule.lifts.corrected import CorrectedLift
from fastdit.schedule.lifts.latent import LatentLift
from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.lifts.token_copy import TokenCopy
from fastdit.schedule.presets import WHOLE_PRESETS
from fastdit.schedule.progressive_resolution import ProgressiveResolution
from fastdit.schedule.ralu import RALU
from fastdit.schedule.selectors.base import Selector
from fastdit.schedule.selectors.edges import Edges
from fastdit.schedule.selectors.pixel_gradient import PixelGradient
from fastdit.schedule.selectors.text_attention import TextAttention
from fastdit.schedule.selectors.velocity_variance import VelocityVariance
from fastdit.stack import Stack
from measurements import load

DTYPE = torch.bfloat16
PRESET = "7x"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def configurations() -> list[Configuration]:
    """The preset, which all others are compared with, and the preset with one part exchanged."""
    schedules: dict[str, Accelerator] = {
        f"ProgressiveResolution {PRESET}": ProgressiveResolution(PRESET),
        **whole_frames(),
        **mixed_stages(),
        **sparse_stages(),
    }
    return [Configuration(name, Stack([schedule])) for name, schedule in schedules.items()]


def whole_frames() -> dict[str, Accelerator]:
    """Two stages, as the preset has them, with another lift, noise, start or spacing."""
    recipe = WHOLE_PRESETS[PRESET]
    matched = ProgressiveResolution(steps=recipe.steps, ends=recipe.ends, starts=recipe.starts, lift=PixelLift())
    return {
        "lift: latents enlarged": ProgressiveResolution(PRESET, lift=LatentLift(resize="bicubic")),
        "lift: latents enlarged, a third corrected": ProgressiveResolution(PRESET, lift=CorrectedLift()),
        "lift: noisy tokens copied": ProgressiveResolution(PRESET, lift=TokenCopy()),
        "noise: drawn anew": ProgressiveResolution(PRESET, lift=PixelLift(noise="fresh")),
        "noise: Hadamard children": ProgressiveResolution(PRESET, lift=PixelLift(noise="hadamard")),
        "switch: a later start": ProgressiveResolution(PRESET, starts=(0.4,)),
        "switch: a later end": ProgressiveResolution(PRESET, ends=(0.7,)),
        "spacing: shifts matched": matched,
    }


def mixed_stages() -> dict[str, Accelerator]:
    """A mixed stage of three steps between the two, for which the last one has a step less."""
    recipe = WHOLE_PRESETS[PRESET]
    coarse, fine = recipe.steps
    assert recipe.shifts is not None

    def mixed(selector: Selector | None = None, frame: str = "coarse") -> RALU:
        return RALU(
            steps=(coarse - 3, 3, fine - 1),
            ends=(0.5, 0.8),
            starts=(0.2, 0.15),
            ratio=0.3,
            shifts=(recipe.shifts[0], 1.0, recipe.shifts[1]),
            lift=PixelLift(),
            selector=selector,
            frame=frame,
        )

    return {
        "mixed stage: edges, coarse frame": mixed(Edges()),
        "mixed stage: edges, fine frame": mixed(Edges(), "fine"),
        "mixed stage: gradient, fine frame": mixed(PixelGradient(), "fine"),
        "mixed stage: settled first, fine frame": mixed(VelocityVariance(), "fine"),
        "mixed stage: turning first, fine frame": mixed(VelocityVariance("turning"), "fine"),
        "mixed stage: attended by the text first, fine frame": mixed(TextAttention(), "fine"),
        "mixed stage: attending to the text first, fine frame": mixed(TextAttention("given"), "fine"),
        "mixed stage: edges, the query's frame": mixed(Edges(), "query"),
    }


def sparse_stages() -> dict[str, Accelerator]:
    """Anchors of the full frame instead of a coarse one, in steps that cost as much together."""
    steps = (5, 3, 3)
    return {
        "anchors: 5 + 3 + 3 steps, most variance first": JustInTime(steps),
        "anchors: 5 + 3 + 3 steps, gradient": JustInTime(steps, selector=PixelGradient()),
        "anchors: 5 + 3 + 3 steps, earlier switches": JustInTime(steps, ends=(0.05, 0.2)),
    }


OutOption = Annotated[Path, typer.Option(help="The JSON file.")]
RESULT = Path("benchmarks/results/parts.json")


@app.command()
def pictures(
    prompts: Annotated[int, typer.Option(help="Held-out prompts; one picture each.")] = 200,
    batch: int = 8,
    seed: int = 0,
    out: OutOption = RESULT,
) -> None:
    """Make and score the pictures of everything; the seconds are of a machine as it is."""
    compare(configurations(), title="parts", prompts=prompts, batch=batch, seed=seed, dtype=DTYPE).save(out)


@app.command(name="clock")
def clock_(
    rounds: Annotated[int, typer.Option(help="Rounds in turns, of the pictures' first prompts.")] = 6,
    out: OutOption = RESULT,
) -> None:
    """Time everything in turns, write the seconds into the results, and print them."""
    results = clock(configurations(), load(out), rounds=rounds, dtype=DTYPE)
    Console(width=220).print(rich_table(results))
    results.save(out)


if __name__ == "__main__":
    np.seterr(all="raise")
    app()
